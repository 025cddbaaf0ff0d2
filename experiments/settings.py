"""Checks a configuration and loads the data it names, before any long work."""

import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from experiments import schema
from experiments.configs.base import default
from experiments.methods import selected, stages_of
from pin_jax import disk
from pin_jax.aggregation.weightings import WEIGHTINGS
from pin_jax.data import files, simulator, stored
from pin_jax.data.interactions import Interactions
from pin_jax.models.din import din
from pin_jax.models.gru4rec import gru4rec
from pin_jax.models.hstu import hstu
from pin_jax.models.plugins import (
  Consultation,
  adapter,
  bottleneck,
  gated,
  low_rank,
  memory_mix,
  translation,
)
from pin_jax.models.sasrec import sasrec
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


def _load_simulator(
  *, seed: int = 0, num_users: int = 4000, **options: Any
) -> tuple[Interactions, simulator.World]:
  world = simulator.make_world(seed=seed, **options)
  drawn, _ = simulator.simulate(world, num_users=num_users, seed=seed + 1)
  return drawn, world


def _load_file(*, path: str, **options: Any) -> tuple[Interactions, None]:
  return files.read(path, **options), None


def _load_tfds(*, name: str, **options: Any) -> tuple[Interactions, None]:
  from pin_jax.data import tfds  # slow to import, seldom used

  return tfds.read_tfds(name, **options), None


def _load_stored(
  *, path: str, stream: bool = False
) -> tuple[Interactions, None]:
  return stored.read(path, stream=stream), None


_SOURCES: dict[str, Callable[..., tuple]] = {
  "simulator": _load_simulator,
  "files": _load_file,
  "stored": _load_stored,
  "tfds": _load_tfds,
}

# What these minimise makes the softmax of the logits an estimate of P(y|x).
PROPER = ("softmax", "sampled_softmax")
OTHERS = "others"  # the block of the parameters that no pattern matches


def load_data(data: ConfigDict) -> tuple[Interactions, Any]:
  """Loads the interactions, and the simulator's world where there is one."""
  options = {k: v for k, v in data.items() if v is not None}
  return _SOURCES[options.pop("source")](**options)


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
  _check_weightings(config)
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
  if "heads" in taken and backbone.width % backbone.heads:
    raise _bad(
      "backbone.width", backbone.width,
      f"give a multiple of backbone.heads={backbone.heads}",
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
  mixes = config.plugin.name in _MIXING
  if mixes and options.relations and config.pin.plugin_draw != "validation":
    raise _bad(
      "memory.relations", tuple(options.relations),
      "they hold what users did in training, so that plugins need "
      "pin.plugin_draw='validation'; set that, or no relations"
    )
  if mixes and config.memory.recent > config.backbone.length:
    raise _bad(
      "memory.recent", config.memory.recent,
      f"give at most backbone.length={config.backbone.length}, what the model "
      "reads",
    )


def _check_together(config: ConfigDict) -> None:
  if len(config.seeds) % config.num_seeds:
    raise _bad(
      "num_seeds", config.num_seeds,
      f"the number of seeds, {len(config.seeds)}, must be a multiple of it",
    )
  exact = any(s.kind == "classifier" for s in stages_of(selected(config)))
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
  windows = max(config.batch_size, config.joint.batch_size)
  if windows * config.backbone.length > schema.MOST:
    raise _bad(
      "batch_size", windows,
      f"a step would read backbone.length={config.backbone.length} times as "
      f"many positions, over {schema.MOST}; lower one of the two",
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
      raise _bad(
        key, value, f"optimizer.tables='row_sparse': {remedy}, or set 'dense'"
      )


def _check_stream(config: ConfigDict) -> None:
  """What does not go together with interactions that stay on disk."""
  if config.data.source != "stored" or not config.data.stream:
    return
  kinds = _kinds_of_plugins(config)
  mixed = kinds and config.plugin.name in _MIXING
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
  """Checks every key by the schema."""
  given = dict(schema.flatten(config.to_dict()))
  source = given.get("data.source")
  if not schema.KEYS["data"]["source"].accepts(source):
    raise _bad("data.source", source, schema.KEYS["data"]["source"].remedy)
  keys = schema.keys_of(source)
  for name, value in given.items():
    if name not in keys and not (name.startswith("data.") and value is None):
      unknown = "unknown key"
      if name.startswith("data."):
        unknown = f"source {source!r} does not use it"
      raise _bad(name, value, f"{unknown}; {_nearest(name, keys)}")
  for name, key in keys.items():
    value, needed = given.get(name), key.default is schema.NEEDED
    if name not in given or (needed and value is None):
      if needed or not name.startswith("data."):
        raise InputError(
          f"config key {name} is missing; source {source!r} needs it" if needed
          else f"config key {name} is missing; its default is {key.default!r}"
        )
    elif not key.accepts(value):
      raise _bad(name, value, key.remedy)


def _check_weightings(config: ConfigDict) -> None:
  """Names and options of all weightings."""
  weighting_options("pin.weighting", config.pin.weighting)
  for rule, spec in config.rules.items():
    weighting_options(f"rules.{rule}", spec)
  named_blocks(config.pin.blocks)


def weighting_options(key: str, spec: str) -> tuple[str, dict[str, float]]:
  """Reads a weighting, 'name' or 'name:option=number,…'.

  Args:
    key: of the config, for the errors.
    spec: its value.

  Returns:
    The name, one of WEIGHTINGS, and the options by name.

  Raises:
    InputError: for an unknown name, for an option that is unknown, repeated or
      not the user's to set, or a bad number.
  """
  name, colon, text = spec.partition(":")
  if name not in WEIGHTINGS:
    raise _bad(key, spec, f"use one of {list(WEIGHTINGS)}")
  parameters = inspect.signature(WEIGHTINGS[name]).parameters.values()
  known = {
    parameter.name: schema.Key(None, parameter.annotation)
    for parameter in parameters
    if parameter.annotation in (int, float) and parameter.name != "num_groups"
  }
  given: dict[str, float] = {}
  for item in text.split(",") if colon else ():
    option, _, written = item.partition("=")
    if option not in known or option in given:
      raise _bad(
        key, spec,
        f"{item!r} is no option, or repeated; options are {list(known)}, each "
        "as option=number"
      )
    try:
      number = float(written)
    except ValueError:
      number = math.nan
    if number.is_integer():
      number = int(number)
    if not known[option].accepts(number):
      raise _bad(key, spec, f"{item!r}: {known[option].remedy}")
    given[option] = number
  for one in parameters:
    if one.name in known.keys() - given and one.default is one.empty:
      raise _bad(key, spec, f"give {one.name}, as {name}:{one.name}=number")
  return name, given


def named_blocks(blocks: Iterable[str]) -> dict[str, str]:
  """Reads `pin.blocks`: pattern -> weighting.

  Raises:
    InputError: for what is no pattern=weighting, or repeated.
  """
  named: dict[str, str] = {}
  for item in blocks:
    pattern, _, spec = item.partition("=")
    try:
      re.compile(pattern)
    except re.error as error:
      raise _bad(
        "pin.blocks", tuple(blocks),
        f"{pattern!r} is no regular expression ({error})",
      ) from error
    if not (pattern and spec):
      raise _bad(
        "pin.blocks", tuple(blocks),
        f"{item!r} must be pattern=weighting, such as 'items|bias=joint'",
      )
    if pattern in (*named, OTHERS):
      raise _bad(
        "pin.blocks", tuple(blocks),
        f"{pattern!r} is repeated, or the name of what no pattern matches, "
        "which has pin.weighting; give each pattern once",
      )
    weighting_options("pin.blocks", spec)
    named[pattern] = spec
  return named


def _bad(key: str, value: Any, remedy: str) -> InputError:
  return InputError(f"config key {key}={value!r}: {remedy}")


def _nearest(key: str, known: Any) -> str:
  near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f"did you mean {near[0]}?" if near else f"known: {sorted(known)}"


def differences(
  mine: dict, theirs: dict, defaults: dict
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (key, mine, theirs) wherever two nested dictionaries differ.

  What `theirs` lacks is taken from `defaults`.
  """
  mine = dict(schema.flatten(mine))
  theirs = {**dict(schema.flatten(defaults)), **dict(schema.flatten(theirs))}
  for key in sorted(mine.keys() | theirs.keys()):
    if mine.get(key) != theirs.get(key):
      yield key, mine.get(key), theirs.get(key)


def read_json(path: epath.Path, **needed: Any) -> dict[str, Any]:
  """Reads a JSON object of a workdir.

  Args:
    path: of the file.
    **needed: key -> any value of the type that the file must have there.

  Raises:
    InputError: if it is damaged.
  """
  with disk.reading(path, "delete it or use another workdir"):
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, like in {None: {}, **needed}.items():
      value = content if key is None else content[key]
      if not isinstance(value, type(like)):
        raise TypeError(f"{key or 'it'} is {str(value)[:50]!r}")
    return content
