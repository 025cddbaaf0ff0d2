"""Checks a configuration before any long work."""

import numpy as np
from ml_collections import ConfigDict

from experiments import build, schema
from experiments.configs.base import default
from experiments.methods import selected, stages_of
from pin_jax.types import InputError

_OF_ANY_BACKBONE = {"name", "pack_rows", "compute", "reads_activeness"}
# What these minimise makes the softmax of the logits an estimate of P(y|x).
PROPER = ("softmax", "sampled_softmax")


def check(config: ConfigDict) -> None:
  """Checks keys, types and values of a whole configuration.

  Raises:
    InputError: for the first key or value that is wrong.
  """
  _check_keys(config)
  build.check_adjustments(config, np.ones(config.groups.num_groups))
  _check_backbone(config.backbone)
  _check_plugin(config)
  _check_together(config)
  _check_mesh(config)
  _check_sparse(config)
  _check_stream(config)


def _check_backbone(backbone: ConfigDict) -> None:
  """A key that the backbone does not take must stay at its default."""
  taken = build.backbone_options(backbone).keys()
  for key, default_value in default().backbone.items():
    if key in taken | _OF_ANY_BACKBONE or backbone[key] == default_value:
      continue
    raise schema.bad(
      f"backbone.{key}", backbone[key],
      f"{backbone.name!r} does not take it; leave it at {default_value!r} or "
      f"set one of {sorted(taken)}",
    )
  if "heads" in taken and backbone.width % backbone.heads:
    raise schema.bad(
      "backbone.width", backbone.width,
      f"give a multiple of backbone.heads={backbone.heads}",
    )


def _check_plugin(config: ConfigDict) -> None:
  """A key that the plugin does not take must stay at its default."""
  taken = build.PLUGINS[config.plugin.name][0]
  for key, default_value in default().plugin.items():
    if key in taken | {"name", "hidden"}:
      continue  # `hidden` is the default plugin's; configs set it for all
    if config.plugin[key] != default_value:
      raise schema.bad(
        f"plugin.{key}", config.plugin[key],
        f"{config.plugin.name!r} does not take it; leave it at "
        f"{default_value!r} or set one of {sorted(taken)}",
      )
  options = config.memory
  mixes = config.plugin.name in build.MIXING
  if mixes and options.relations and config.pin.plugin_draw != "validation":
    raise schema.bad(
      "memory.relations", tuple(options.relations),
      "they hold what users did in training, so that plugins need "
      "pin.plugin_draw='validation'; set that, or no relations"
    )
  if mixes and config.memory.recent > config.backbone.length:
    raise schema.bad(
      "memory.recent", config.memory.recent,
      f"give at most backbone.length={config.backbone.length}, what the model "
      "reads",
    )


def _check_together(config: ConfigDict) -> None:
  if len(config.seeds) % config.num_seeds:
    raise schema.bad(
      "num_seeds", config.num_seeds,
      f"the number of seeds, {len(config.seeds)}, must be a multiple of it",
    )
  exact = any(s.kind == "classifier" for s in stages_of(selected(config)))
  if config.backbone.reads_activeness and exact:
    raise schema.bad(
      "backbone.reads_activeness", True,
      "exact adjustment estimates P(d|x) from states that must not hold d; "
      "set False or leave 'pin_exact' out",
    )
  shares = build.proposal_shares(config.loss.proposal)
  if config.loss.name == "gbce" and set(shares) != {"uniform"}:
    raise schema.bad(
      "loss.proposal", config.loss.proposal,
      "loss.name='gbce' is made for 'uniform' negatives",
    )
  if "focal" in config.methods and config.loss.name not in PROPER:
    raise schema.bad(
      "loss.name", config.loss.name,
      f"the method 'focal' takes one of {PROPER}",
    )
  if config.batch_size < config.groups.num_groups:
    raise schema.bad(
      "batch_size", config.batch_size,
      f"give at least groups.num_groups={config.groups.num_groups}",
    )
  windows = max(config.batch_size, config.joint.batch_size)
  if windows * config.backbone.length > schema.MOST:
    raise schema.bad(
      "batch_size", windows,
      f"a step would read backbone.length={config.backbone.length} times as "
      f"many positions, over {schema.MOST}; lower one of the two",
    )
  if config.validation.every % config.dispatch:
    raise schema.bad(
      "validation.every", config.validation.every,
      f"give a multiple of dispatch={config.dispatch}",
    )
  for used, key, value in (
    (config.groups.rule == "thresholds", "groups.thresholds",
     config.groups.thresholds),
    (config.prior.kind == "custom", "prior.values",
     config.prior.get("values")),
  ):
    if used != bool(value):
      other = key.split(".")[0] + (".rule" if "groups" in key else ".kind")
      raise schema.bad(
        key, tuple(value),
        f"give numbers exactly where {other} asks for them",
      )


def _check_mesh(config: ConfigDict) -> None:
  """What does not go together with more than one device."""
  data, devices = config.mesh.data, config.mesh.data * config.mesh.model
  kinds = _kinds_of_plugins(config)
  mixed = kinds and config.plugin.name in build.MIXING
  for wrong, key, value, remedy in (
    (devices > 1 and config.num_seeds > 1, "num_seeds", config.num_seeds,
     "several devices train one seed at a time; set 1"),
    (config.mesh.model > 1 and (mixed or "memory_alone" in kinds), "mesh.model",
     config.mesh.model,
     "plugins that mix the memory into the logits read the whole catalogue; "
     "set 1, or another plugin.name and methods without 'memory_alone'"),
    (data > 1 and config.backbone.pack_rows, "backbone.pack_rows",
     config.backbone.pack_rows,
     f"rows are not packed across mesh.data={data} devices; set 0"),
    (config.joint.batch_size % data, "joint.batch_size",
     config.joint.batch_size, f"give a multiple of mesh.data={data}"),
    *((share % data, "batch_size", config.batch_size,
       f"{share} windows a {whose} must be a multiple of mesh.data={data}")
      for whose, share in (
        ("group", config.batch_size // config.groups.num_groups),
        ("segment", config.batch_size // 2),
        ("shared plugin", config.batch_size if "shared" in kinds else 0),
      )),
  ):
    if wrong:
      raise schema.bad(key, value, remedy)


def _kinds_of_plugins(config: ConfigDict) -> set[str]:
  """`Stage.plugin` of the stages that train plugins."""
  stages = stages_of(selected(config))
  return {s.plugin for s in stages if s.kind == "plugin"}


def _check_sparse(config: ConfigDict) -> None:
  """What the row-sparse optimizer does not go together with."""
  if config.optimizer.tables == "dense":
    return
  for wrong, key, value, remedy in (
    (config.loss.name == "softmax", "loss.name", config.loss.name,
     "it reads every row; use a sampled loss such as 'sampled_softmax'"),
    (config.optimizer.average > 0, "optimizer.average",
     config.optimizer.average, "it writes every row; set 0"),
    (config.backbone.name == "din", "backbone.name", config.backbone.name,
     "it has no table that can be cut by rows; use another"),
  ):
    if wrong:
      raise schema.bad(
        key, value, f"optimizer.tables='row_sparse': {remedy}, or set 'dense'"
      )


def _check_stream(config: ConfigDict) -> None:
  """What does not go together with interactions that stay on disk."""
  if config.data.source != "stored" or not config.data.stream:
    return
  kinds = _kinds_of_plugins(config)
  mixed = kinds and config.plugin.name in build.MIXING
  for wrong, key, value, remedy in (
    (config.num_seeds > 1, "num_seeds", config.num_seeds, "set 1"),
    (config.split.protocol != "leave_one_out", "split.protocol",
     config.split.protocol, "times are not stored; set 'leave_one_out'"),
    (mixed, "plugin.name", config.plugin.name,
     "the memory is made of all interactions; use another"),
    ("memory_alone" in kinds, "methods", tuple(config.methods),
     "the memory is made of all interactions; leave 'memory_alone' out"),
    (any(s.kind == "classifier" for s in stages_of(selected(config))),
     "methods",
     tuple(config.methods), "exact adjustment needs them on the device; leave "
     "it out"),
    (config.loss.name != "softmax"
     and set(build.proposal_shares(config.loss.proposal)) != {"uniform"},
     "loss.proposal", config.loss.proposal, "set 'uniform'"),
  ):
    if wrong:
      raise schema.bad(
        key, value,
        f"data.stream=True leaves the interactions on disk: {remedy}, or set "
        "data.stream=False"
      )


def _check_keys(config: ConfigDict) -> None:
  """Checks every key by the schema."""
  given = dict(schema.flatten(config.to_dict()))
  source = given.get("data.source")
  if not schema.KEYS["data"]["source"].accepts(source):
    remedy = schema.KEYS["data"]["source"].remedy
    raise schema.bad("data.source", source, remedy)
  keys = schema.keys_of(source)
  for name, value in given.items():
    if name not in keys and not (name.startswith("data.") and value is None):
      unknown = "unknown key"
      if name.startswith("data."):
        unknown = f"source {source!r} does not use it"
      raise schema.bad(name, value, f"{unknown}; {schema.nearest(name, keys)}")
  for name, key in keys.items():
    value, needed = given.get(name), key.default is schema.NEEDED
    if name not in given or (needed and value is None):
      if needed or not name.startswith("data."):
        raise InputError(
          f"config key {name} is missing; source {source!r} needs it" if needed
          else f"config key {name} is missing; its default is {key.default!r}"
        )
    elif not key.accepts(value):
      raise schema.bad(name, value, key.remedy)
