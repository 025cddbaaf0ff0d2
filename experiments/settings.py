"""What keys must be to each other: checked at launch, before any long work."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import build, schema
from experiments.configs.base import default
from experiments.methods import GATES, selected, stages_of
from pin_jax.evaluation import metrics

_OF_ANY_BACKBONE = {"name", "pack_rows", "compute", "reads_activeness"}
# What these minimise makes the softmax of the logits an estimate of P(y|x).
PROPER = ("softmax", "sampled_softmax")


def check(config: ConfigDict) -> None:
  """Checks a whole configuration: keys, values, and what they are together.

  Raises:
    InputError: for the first key or value that is wrong.
  """
  schema.check_keys(config)
  build.check_adjustments(config, np.ones(config.groups.num_groups))
  build.proposal_shares(config.loss.proposal)
  with schema.section("evaluation.metrics"):
    for name in config.evaluation.metrics:
      metrics.metric(name)
  for rules in (_of_others, _rules, _of_scale):
    for wrong, key, remedy in rules(config):
      if wrong:
        raise schema.bad(key, _value(config, key), remedy)


def _value(config: ConfigDict, key: str) -> Any:
  for name in key.split("."):
    config = config[name]
  return tuple(config) if isinstance(config, list) else config


def _of_others(config: ConfigDict) -> Iterator[tuple[bool, str, str]]:
  """Keys that the named backbone or plugin does not take."""
  for section, taken, common in (
    ("backbone", build.backbone_options(config.backbone), _OF_ANY_BACKBONE),
    # `hidden` is the default plugin's; configs set it for all.
    ("plugin", build.PLUGINS[config.plugin.name][0], {"name", "hidden"}),
  ):
    for name, known in default()[section].items():
      yield (
        name not in {*taken, *common} and config[section][name] != known,
        f"{section}.{name}",
        f"{config[section].name!r} does not take it; leave it at {known!r} or "
        f"set one of {sorted(taken)}",
      )


def _rules(config: ConfigDict) -> Iterator[tuple[bool, str, str]]:
  """(whether it is broken, key, remedy) of what keys must be together."""
  backbone, groups, loss = config.backbone, config.groups, config.loss
  mixes = config.plugin.name in build.MIXING
  gates = any(s.plugin in GATES for s in stages_of(selected(config)))
  windows = max(config.batch_size, config.joint.batch_size)
  yield from (
    ("heads" in build.backbone_options(backbone)
     and backbone.width % backbone.heads > 0, "backbone.width",
     f"give a multiple of backbone.heads={backbone.heads}"),
    (mixes and len(config.memory.relations) > 0
     and config.pin.plugin_draw != "validation", "memory.relations",
     "they hold what users did in training, so that plugins need "
     "pin.plugin_draw='validation'; set that, or no relations"),
    ((mixes or gates) and config.memory.recent > backbone.length,
     "memory.recent",
     f"give at most backbone.length={backbone.length}, what the model reads"),
    (len(config.seeds) % config.num_seeds > 0, "num_seeds",
     f"the number of seeds, {len(config.seeds)}, must be a multiple of it"),
    (backbone.reads_activeness and _exact(config), "backbone.reads_activeness",
     "exact adjustment estimates P(d|x) from states that must not hold d; "
     "set False or leave 'pin_exact' out"),
    (loss.name == "gbce" and _not_uniform(config), "loss.proposal",
     "loss.name='gbce' is made for 'uniform' negatives"),
    ("focal" in config.methods and loss.name not in PROPER, "loss.name",
     f"the method 'focal' takes one of {PROPER}"),
    (config.batch_size < groups.num_groups, "batch_size",
     f"give at least groups.num_groups={groups.num_groups}"),
    (windows * backbone.length > schema.MOST, "batch_size",
     f"a step would read backbone.length={backbone.length} times as many "
     f"positions, over {schema.MOST}; lower one of the two"),
    (config.validation.every % config.dispatch > 0, "validation.every",
     f"give a multiple of dispatch={config.dispatch}"),
    ((groups.rule == "thresholds") != bool(groups.thresholds),
     "groups.thresholds", "give numbers exactly where groups.rule asks for "
     "them"),
    ((config.prior.kind == "custom") != bool(config.prior.get("values")),
     "prior.values", "give numbers exactly where prior.kind asks for them"),
  )


def _of_scale(config: ConfigDict) -> Iterator[tuple[bool, str, str]]:
  """Likewise, of what does not go together with scale."""
  data, model, loss = config.mesh.data, config.mesh.model, config.loss
  kinds = {
    stage.plugin for stage in stages_of(selected(config))
    if stage.kind == "plugin"
  }
  mixed = bool(kinds & {*GATES}) or (
    bool(kinds) and config.plugin.name in build.MIXING
  )
  alone = "memory_alone" in kinds
  yield from (
    (data * model > 1 and config.num_seeds > 1, "num_seeds",
     "several devices train one seed at a time; set 1"),
    (model > 1 and (mixed or alone), "mesh.model",
     "plugins that mix the memory into the logits read the whole catalogue; "
     "set 1, or another plugin.name and methods without 'memory_alone' and "
     "gates"),
    (data > 1 and config.backbone.pack_rows > 0, "backbone.pack_rows",
     f"rows are not packed across mesh.data={data} devices; set 0"),
    (config.joint.batch_size % data > 0, "joint.batch_size",
     f"give a multiple of mesh.data={data}"),
    *((share % data > 0, "batch_size",
       f"{share} windows a {whose} must be a multiple of mesh.data={data}")
      for whose, share in (
        ("group", config.batch_size // config.groups.num_groups),
        ("segment", config.batch_size // 2),
        ("shared plugin", config.batch_size if "shared" in kinds else 0),
      )),
  )
  if config.optimizer.tables != "dense":
    for wrong, key, remedy in (
      (loss.name == "softmax", "loss.name",
       "it reads every row; use a sampled loss such as 'sampled_softmax'"),
      (config.optimizer.average > 0, "optimizer.average",
       "it writes every row; set 0"),
      (config.backbone.name == "din", "backbone.name",
       "it has no table that can be cut by rows; use another"),
    ):
      yield wrong, key, (
        f"optimizer.tables='row_sparse': {remedy}, or set 'dense'"
      )
  if config.data.source == "stored" and config.data.stream:
    memory = "the memory is made of all interactions; "
    for wrong, key, remedy in (
      (config.num_seeds > 1, "num_seeds", "set 1"),
      (config.split.protocol != "leave_one_out", "split.protocol",
       "times are not stored; set 'leave_one_out'"),
      (mixed, "plugin.name", f"{memory}use another, and methods without gates"),
      (alone, "methods", f"{memory}leave 'memory_alone' out"),
      (_exact(config), "methods",
       "exact adjustment needs them on the device; leave it out"),
      (loss.name != "softmax" and _not_uniform(config), "loss.proposal",
       "set 'uniform'"),
    ):
      yield wrong, key, (
        f"data.stream=True leaves the interactions on disk: {remedy}, or set "
        "data.stream=False"
      )


def _exact(config: ConfigDict) -> bool:
  return any(s.kind == "classifier" for s in stages_of(selected(config)))


def _not_uniform(config: ConfigDict) -> bool:
  return set(build.proposal_shares(config.loss.proposal)) != {"uniform"}
