"""Checks a configuration and loads the data it names, before any long work."""

import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from experiments.configs.base import default
from experiments.methods import METHODS, method_names, stages_of
from pin_jax import (
  aggregation,
  batches,
  criteria,
  memory,
  objectives,
  relations,
)
from pin_jax.backbones.din import din
from pin_jax.backbones.gru4rec import gru4rec
from pin_jax.backbones.hstu import hstu
from pin_jax.backbones.precision import COMPUTE
from pin_jax.backbones.sasrec import sasrec
from pin_jax.datasets import files, simulator, stored
from pin_jax.interactions import Interactions
from pin_jax.plugins import (
  Consultation,
  adapter,
  bottleneck,
  gated,
  low_rank,
  memory_mix,
  translation,
)
from pin_jax.types import InputError, Plugin, PyTree

BACKBONES = {"sasrec": sasrec, "gru4rec": gru4rec, "hstu": hstu, "din": din}
# name -> (keys of the `plugin` section that it takes, builder from what is
# around it: the backbone's params, width D, channels of the memory and
# relations K, consultation).
PLUGINS: dict[str, tuple[set[str], Callable[..., Plugin]]] = {
  "bottleneck": ({"hidden"}, lambda like, d, k, c, o: bottleneck(d, **o)),
  "translation": (set(), lambda like, d, k, c, o: translation(d)),
  "adapter": ({"hidden"}, lambda like, d, k, c, o: adapter(like, width=d, **o)),
  "lora": ({"rank"}, lambda like, d, k, c, o: low_rank(like, **o)),
  "memory": (set(), lambda like, d, k, c, o: memory_mix(k, c)),
  "gated": (
    {"hidden", "reads_state"}, lambda like, d, k, c, o: gated(d, k, c, **o)
  ),
}
_MIXING = ("memory", "gated")  # plugins that read the memory
PROPOSALS = ("uniform", "popularity", "in_batch")
_OF_ANY_BACKBONE = {"name", "pack_rows", "compute", "reads_activeness"}

_FILTERS = {"duplicates", "k_core", "min_length", "max_history"}
_WORLD = {
  "num_items", "borders", "length_exponent", "prior_decay", "confounding",
  "scale", "rank", "popularity_exponent", "popularity_tilt",
}


def _load_simulator(
  *, seed: int = 0, num_users: int = 4000, **options: Any
) -> tuple[Interactions, simulator.World]:
  world = simulator.make_world(seed=seed, **options)
  drawn, _ = simulator.simulate(world, num_users=num_users, seed=seed + 1)
  return drawn, world


def _load_file(*, path: str, **options: Any) -> tuple[Interactions, None]:
  return files.read(path, **options), None


def _load_tfds(*, name: str, **options: Any) -> tuple[Interactions, None]:
  from pin_jax.datasets import tfds  # slow to import, seldom used

  return tfds.read_tfds(name, **options), None


def _load_stored(*, path: str, stream: bool) -> tuple[Interactions, None]:
  return stored.read(path, stream=stream), None


_SOURCES: dict[str, tuple[Callable[..., tuple], set[str], set[str]]] = {
  # source: (loader, keys it needs, keys it may have)
  "simulator": (_load_simulator, set(), {"seed", "num_users"} | _WORLD),
  "files": (
    _load_file, {"path"}, {"user", "item", "time", "separator"} | _FILTERS
  ),
  "stored": (_load_stored, {"path", "stream"}, set()),
  "tfds": (_load_tfds, {"name"}, {"data_dir", "manual_dir"} | _FILTERS),
}

_CHOICES = {
  "split.protocol": ("leave_one_out", "temporal"),
  "groups.rule": ("users", "interactions", "thresholds", "head_share"),
  "prior.kind": ("users", "uniform", "interactions", "custom"),
  "backbone.name": tuple(BACKBONES),
  "backbone.compute": COMPUTE,
  "plugin.name": tuple(PLUGINS),
  "joint.draw": batches.DRAWS,
  "joint.mean": objectives.MEANS,
  "pin.draw": batches.DRAWS,
  "pin.mean": objectives.MEANS,
  "pin.plugin_draw": (*batches.DRAWS, "validation"),
  "pin.plugin_mean": objectives.MEANS,
  "pin.path": ("auto", *aggregation.PATHS),
  "pin.granularity": ("rule", "whole", "tensor"),
  "loss.name": ("softmax", *criteria.SAMPLED_LOSSES),
  "loss.candidates": ("shared", "own"),
  "evaluation.protocol": ("full", "sampled"),
  "optimizer.tables": ("dense", "row_sparse"),
  "non_finite": ("stop", "skip"),
}
# What these minimise makes the softmax of the logits an estimate of P(y|x).
PROPER = ("softmax", "sampled_softmax")
_AT_LEAST = {
  "num_seeds": 1,
  "groups.num_groups": 1,
  "backbone.length": 1,
  "backbone.blocks": 1,
  "backbone.expansion": 1,
  "backbone.layers": 1,
  "backbone.attention_hidden": 1,
  "backbone.hidden": 1,
  "backbone.pack_rows": 0,
  "backbone_steps": 1,
  "plugin_steps": 1,
  "plugin.hidden": 1,
  "plugin.rank": 1,
  "memory.window": 1,
  "memory.neighbours": 1,
  "memory.recent": 1,
  "memory.shrink": 0,
  "memory.popularity_power": 0,
  "classifier_steps": 1,
  "loss.negatives": 1,
  "loss.focusing": 0,
  "batch_size": 2,
  "joint.batch_size": 0,
  "dispatch": 1,
  "pin.diagnose_every": 0,
  "optimizer.warmup": 0,
  "optimizer.weight_decay": 0,
  "validation.every": 1,
  "validation.users": 0,
  "validation.patience": 0,
  "evaluation.negatives": 1,
  "evaluation.seed": 0,
  "evaluation.user_chunk": 1,
  "evaluation.item_chunk": 1,
  "mesh.data": 1,
  "mesh.model": 1,
}
_POSITIVE = (
  "optimizer.learning_rate", "optimizer.plugin_learning_rate",
  "optimizer.classifier_learning_rate", "optimizer.clip",
  "pin.clip_importance", "memory.decay", "memory.history_decay",
  "memory.ridge", "memory.next_ridge", "claims.power",
)
_SHARES = (
  "groups.head_share", "split.validation", "split.test", "backbone.dropout",
  "optimizer.average", "optimizer.b2", "optimizer.final",
  "claims.non_inferiority_margin", "claims.power",
)


def load_data(data: ConfigDict) -> tuple[Interactions, Any]:
  """Loads the interactions, and the simulator's world where there is one."""
  options = {k: v for k, v in data.items() if v is not None}
  return _SOURCES[options.pop("source")][0](**options)


def backbone_options(backbone: ConfigDict) -> dict[str, Any]:
  """The keys of the `backbone` section that the named backbone takes."""
  taken = inspect.signature(BACKBONES[backbone.name]).parameters
  return {key: value for key, value in backbone.items() if key in taken}


def consultation(config: ConfigDict) -> Consultation:
  """How the config asks the memory."""
  return Consultation(**{
    key: config.memory[key] for key in Consultation._fields
  })


def make_plugin(
  config: ConfigDict, like: PyTree, *, widen: int = 1, repeats: bool = False
) -> Plugin:
  """Builds the plugin that the config names.

  Args:
    config: the whole configuration.
    like: the backbone's params, or their shapes.
    widen: factor of `hidden` and `rank`, for a plugin that several segments
      share.
    repeats: `Problem.repeats`, for 'gated'.

  Raises:
    InputError: if the backbone does not suit it.
  """
  taken, build = PLUGINS[config.plugin.name]
  options = {key: config.plugin[key] for key in sorted(taken)}
  for key in taken & {"hidden", "rank"}:
    options[key] *= widen
  if config.plugin.name == "gated":
    options["repeats"] = repeats
  return build(
    like, config.backbone.width,
    len(config.memory.channels) + len(config.memory.relations),
    consultation(config), options,
  )


def check(config: ConfigDict) -> None:
  """Checks keys, types and values of a whole configuration.

  Raises:
    InputError: for the first key or value that is wrong.
  """
  _check_keys(config)
  _check_data(config.data)
  flat = dict(flatten(config.to_dict()))
  for key, choices in _CHOICES.items():
    if flat[key] not in choices:
      raise _bad(key, flat[key], f"use one of {list(choices)}")
  for key, least in _AT_LEAST.items():
    if flat[key] < least:
      raise _bad(key, flat[key], f"give at least {least}")
  for key in _POSITIVE:
    if not flat[key] > 0:
      raise _bad(key, flat[key], "give a positive number")
  for key in _SHARES:
    if not 0 <= flat[key] < 1:
      raise _bad(key, flat[key], "give a share from 0 to below 1")
  if not 0 <= flat["loss.exponent"] < math.inf:
    raise _bad("loss.exponent", flat["loss.exponent"], "give a finite number")
  if not 0 <= flat["loss.calibration"] <= 1:
    raise _bad("loss.calibration", flat["loss.calibration"], "give 0 to 1")
  _check_backbone(config.backbone)
  _check_plugin(config)
  _check_together(config)
  _check_mesh(config)
  _check_sparse(config)
  _check_stream(config)


def proposal_shares(spec: str) -> dict[str, float]:
  """Reads `loss.proposal`: a name, or shares 'name:number,name:number'.

  Raises:
    InputError: for an unknown or repeated name, or a bad share.
  """
  shares = {}
  for item in spec.split(","):
    name, _, number = item.partition(":")
    try:
      share = float(number or 1)
    except ValueError:
      share = math.nan
    if name not in PROPOSALS or name in shares or not 0 < share < math.inf:
      raise _bad(
        "loss.proposal", spec,
        f"use one of {list(PROPOSALS)}, or a positive share of several, each "
        "once, such as 'in_batch:0.5,uniform:0.5'",
      )
    shares[name] = share
  return shares


def _check_backbone(backbone: ConfigDict) -> None:
  """A key that the backbone does not take must stay at its default."""
  taken = backbone_options(backbone).keys()
  for key, default_value in default().backbone.items():
    if key in taken | _OF_ANY_BACKBONE or backbone[key] == default_value:
      continue
    raise _bad(
      f"backbone.{key}", backbone[key],
      f"{backbone.name!r} does not take it; leave it at {default_value!r} or "
      f"set one of {sorted(taken)}",
    )


def _check_plugin(config: ConfigDict) -> None:
  """A key that the plugin does not take must stay at its default."""
  taken = PLUGINS[config.plugin.name][0]
  for key, default_value in default().plugin.items():
    if key in taken | {"name", "hidden"}:
      continue  # `hidden` is the default plugin's; configs set it for all
    if config.plugin[key] != default_value:
      raise _bad(
        f"plugin.{key}", config.plugin[key],
        f"{config.plugin.name!r} does not take it; leave it at "
        f"{default_value!r} or set one of {sorted(taken)}",
      )
  options = config.memory
  memory.check_options(
    tuple(options.channels), options.window, options.decay, options.neighbours
  )
  relations.check(tuple(options.relations))
  mixes = config.plugin.name in _MIXING
  if mixes and options.relations and config.pin.plugin_draw != "validation":
    raise _bad(
      "memory.relations", tuple(options.relations),
      "they hold what users did in training, so that plugins need "
      "pin.plugin_draw='validation'; set that, or no relations"
    )
  if options.history_decay > 1:
    raise _bad("memory.history_decay", options.history_decay, "give at most 1")
  if mixes and config.memory.recent > config.backbone.length:
    raise _bad(
      "memory.recent", config.memory.recent,
      f"give at most backbone.length={config.backbone.length}, what the model "
      "reads",
    )


def _check_together(config: ConfigDict) -> None:
  unknown = [name for name in config.methods if name not in METHODS]
  if unknown or len(config.methods) < 1:
    raise _bad(
      "methods", tuple(config.methods),
      f"give one or more of {list(METHODS)}, first the one compared with",
    )
  if not config.seeds or len(set(config.seeds)) < len(config.seeds):
    raise _bad("seeds", tuple(config.seeds), "give one or more, each once")
  if len(config.seeds) % config.num_seeds:
    raise _bad(
      "num_seeds", config.num_seeds,
      f"the number of seeds, {len(config.seeds)}, must be a multiple of it",
    )
  names = method_names(config.methods, config.pin.weighting)
  exact = any(s.kind == "classifier" for s in stages_of(names))
  if config.backbone.reads_activeness and exact:
    raise _bad(
      "backbone.reads_activeness", True,
      "exact adjustment estimates P(d|x) from states that must not hold d; "
      "set False or leave 'pin_exact' out",
    )
  shares = proposal_shares(config.loss.proposal)
  if config.loss.name == "gbce" and set(shares) != {"uniform"}:
    raise _bad(
      "loss.proposal", config.loss.proposal,
      "loss.name='gbce' is made for 'uniform' negatives",
    )
  if "focal" in config.methods and config.loss.name not in PROPER:
    raise _bad(
      "loss.name", config.loss.name,
      f"the method 'focal' takes one of {PROPER}",
    )
  if config.batch_size < config.groups.num_groups:
    raise _bad(
      "batch_size", config.batch_size,
      f"give at least groups.num_groups={config.groups.num_groups}",
    )
  if config.validation.every % config.dispatch:
    raise _bad(
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
      raise _bad(
        key, tuple(value),
        f"give numbers exactly where {other} asks for them",
      )


def _check_mesh(config: ConfigDict) -> None:
  """What does not go together with more than one device."""
  data, devices = config.mesh.data, config.mesh.data * config.mesh.model
  kinds = _kinds_of_plugins(config)
  mixed = kinds and config.plugin.name in _MIXING
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
      raise _bad(key, value, remedy)


def _kinds_of_plugins(config: ConfigDict) -> set[str]:
  """`Stage.plugin` of the stages that train plugins."""
  names = method_names(config.methods, config.pin.weighting)
  return {s.plugin for s in stages_of(names) if s.kind == "plugin"}


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
      raise _bad(
        key, value, f"optimizer.tables='row_sparse': {remedy}, or set 'dense'"
      )


def _check_stream(config: ConfigDict) -> None:
  """What does not go together with interactions that stay on disk."""
  if config.data.source != "stored" or not config.data.stream:
    return
  kinds = _kinds_of_plugins(config)
  names = method_names(config.methods, config.pin.weighting)
  mixed = kinds and config.plugin.name in _MIXING
  for wrong, key, value, remedy in (
    (config.num_seeds > 1, "num_seeds", config.num_seeds, "set 1"),
    (config.split.protocol != "leave_one_out", "split.protocol",
     config.split.protocol, "times are not stored; set 'leave_one_out'"),
    (mixed, "plugin.name", config.plugin.name,
     "the memory is made of all interactions; use another"),
    ("memory_alone" in kinds, "methods", tuple(config.methods),
     "the memory is made of all interactions; leave 'memory_alone' out"),
    (any(s.kind == "classifier" for s in stages_of(names)), "methods",
     tuple(config.methods), "exact adjustment needs them on the device; leave "
     "it out"),
    (config.loss.name != "softmax"
     and set(proposal_shares(config.loss.proposal)) != {"uniform"},
     "loss.proposal", config.loss.proposal, "set 'uniform'"),
  ):
    if wrong:
      raise _bad(
        key, value,
        f"data.stream=True leaves the interactions on disk: {remedy}, or set "
        "data.stream=False"
      )


def _check_keys(config: ConfigDict) -> None:
  known = dict(flatten(default().to_dict()))
  given = {
    k: v for k, v in flatten(config.to_dict()) if not k.startswith("data.")
  }
  known = {k: v for k, v in known.items() if not k.startswith("data.")}
  for key, value in given.items():
    if key not in known:
      raise _bad(key, value, f"unknown key; {_nearest(key, known)}")
  for key, value in known.items():
    if key not in given:
      raise InputError(f"config key {key} is missing; its default is {value!r}")
    _check_type(key, given[key], value)


def _check_type(key: str, value: Any, like: Any) -> None:
  kinds = {
    int: (int,), float: (int, float), str: (str,), tuple: (tuple, list),
    bool: (bool,),
  }
  wanted = kinds[type(like)]
  is_bool = isinstance(value, bool) and not isinstance(like, bool)
  if not isinstance(value, wanted) or is_bool:
    raise _bad(key, value, f"give a value of type {wanted[-1].__name__}")
  if key == "seeds" and not all(isinstance(v, int) for v in value):
    raise _bad(key, value, "give whole numbers")


def _check_data(data: ConfigDict) -> None:
  source = data.get("source")
  if source not in _SOURCES:
    raise _bad("data.source", source, f"use one of {list(_SOURCES)}")
  _, needed, optional = _SOURCES[source]
  given = {k for k, v in data.items() if v is not None} - {"source"}
  for key in sorted(given - needed - optional):
    raise _bad(
      f"data.{key}", data[key],
      f"source {source!r} does not use it; {_nearest(key, needed | optional)}",
    )
  for key in sorted(needed - given):
    raise InputError(
      f"config key data.{key} is missing; source {source!r} needs it"
    )


def _bad(key: str, value: Any, remedy: str) -> InputError:
  return InputError(f"config key {key}={value!r}: {remedy}")


def _nearest(key: str, known: Any) -> str:
  near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f"did you mean {near[0]}?" if near else f"known: {sorted(known)}"


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple]:
  """Yields ('a.b', value) for every leaf of nested dictionaries."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def differences(
  mine: dict, theirs: dict, defaults: dict
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (key, mine, theirs) wherever two nested dictionaries differ.

  What `theirs` lacks is taken from `defaults`.
  """
  mine = dict(flatten(mine))
  theirs = {**dict(flatten(defaults)), **dict(flatten(theirs))}
  for key in sorted(mine.keys() | theirs.keys()):
    if mine.get(key) != theirs.get(key):
      yield key, mine.get(key), theirs.get(key)


def read_json(path: epath.Path) -> dict[str, Any]:
  """Reads a JSON file of a workdir.

  Raises:
    InputError: if it is damaged.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise InputError(
      f"{path} is damaged ({error}); delete it or use another workdir"
    ) from error
