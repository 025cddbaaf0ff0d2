"""Every key of a configuration, once: meaning, type, choices, range, default.

`experiments.configs.base.default` and the checks at launch follow from it.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.methods import METHODS
from pin_jax.types import InputError

MOST = 2**31 - 1  # of whole numbers, which go to int32
NEEDED = ...  # the default of a key that has none


class Key(NamedTuple):
  """What a key takes.

  Attributes:
    default: its value unless it is set.
    kind: int, float, bool, str or tuple.
    least: the smallest number, or the fewest elements.
    most: the largest number.
    below: whether a number must be below `most`.
    choices: of a text; () = any but the empty one.
    item: what a tuple's elements are.
    once: whether each element may be there only once.
    none: whether None is taken, for what is found out or left out.
  """

  default: Any
  kind: type
  least: float = 0
  most: float = MOST
  below: bool = False
  choices: tuple[str, ...] = ()
  item: "Key | None" = None
  once: bool = False
  none: bool = False

  def accepts(self, value: Any) -> bool:
    """Whether the key takes a value."""
    if value is None:
      return self.none
    if self.kind is tuple:
      return (
        isinstance(value, tuple | list) and len(value) >= self.least
        and all(map(self.item.accepts, value))
        and not (self.once and len(set(value)) < len(value))
      )
    if self.kind is str:
      chosen = not self.choices or value in self.choices
      return isinstance(value, str) and value != "" and chosen
    if self.kind is bool or isinstance(value, bool):
      return self.kind is bool and isinstance(value, bool)
    numbers = int if self.kind is int else int | float
    if not isinstance(value, numbers) or not self.least <= value <= self.most:
      return False  # NaN too
    return value < self.most or not self.below

  @property
  def remedy(self) -> str:
    """What to give instead of what the key does not take."""
    if self.kind is tuple:
      few = f"at least {self.least} of" * (self.least > 0)
      once = ", each once" * self.once
      return f"give a tuple{once}; {few or 'of each'}: {self.item.remedy}"
    if self.kind is int:
      return f"give a whole number from {self.least} to {self.most}"
    if self.kind is float:
      below = "below " * self.below
      return f"give a number from {self.least:g} to {below}{self.most:g}"
    if self.kind is bool:
      return "give True or False"
    if self.choices:
      return f"use one of {list(self.choices)}"
    return "give text that is not empty"

  def canonical(self, value: Any) -> Any:
    """The one form of what is the same value: 1 or 1.0, list or tuple."""
    if value is None or not self.accepts(value):
      return value
    if self.kind is tuple:
      return [self.item.canonical(x) for x in value]
    return float(value) + 0.0 if self.kind is float else value  # no -0.0


def _whole(default: Any, least: int = 1, most: int = MOST) -> Key:
  return Key(default, int, least, most)


def _number(default: Any, most: float = 1e6, least: float = 0) -> Key:
  return Key(default, float, least, most)


def _positive(default: Any, most: float = 1e6) -> Key:
  return Key(default, float, 1e-9, most)


def _share(default: Any) -> Key:
  return Key(default, float, 0, 1, below=True)


def _flag(default: bool) -> Key:
  return Key(default, bool)


def _text(default: Any, *choices: str) -> Key:
  return Key(default, str, choices=choices)


def _several(default: Any, item: Key, least: int = 0, once: bool = True) -> Key:
  return Key(default, tuple, least, item=item, once=once)


def _optional(key: Key) -> Key:
  return key._replace(none=True)


_SIZE = 2**16  # of a dimension; more is a slip of the pen
_STEPS = 10**9
_DRAWS = _MEANS = "interactions", "users"

KEYS = {
  # Rows of the tables, see experiments/methods.py; the first is the one
  # compared with.
  "methods": _several(
    ("base", "pin_backbone", "pin"), _text(NEEDED, *METHODS), 1
  ),
  # One run of every method a seed; intervals average a user over seeds.
  "seeds": _several((0,), _whole(NEEDED, 0), 1),
  # How many of them are trained at once, as one vectorised run: much faster on
  # an accelerator, in `num_seeds` times the memory; 1 = one after another.
  "num_seeds": _whole(1, most=_SIZE),
  # The other keys are the source's, see SOURCES.
  "data": {
    "source": _text("simulator", "simulator", "files", "stored", "tfds")
  },
  # 'leave_one_out', or 'temporal' with the shares of interactions that lie
  # after the validation and the test cut.
  "split": {
    "protocol": _text("leave_one_out", "leave_one_out", "temporal"),
    "validation": _share(0.1),
    "test": _share(0.1),
  },
  "groups": {
    "num_groups": _whole(5, most=_SIZE),
    "rule": _text(
      "users", "users", "interactions", "thresholds", "head_share"
    ),
    "thresholds": _several((), _whole(NEEDED, 0)),
    "head_share": _share(0.2),  # of users; also the border of the segments
  },
  # P(d): 'custom' has `values`; raised to the power `exponent` and normalised
  # again.
  "prior": {
    "kind": _text("users", "users", "uniform", "interactions", "custom"),
    "values": _several((), _number(NEEDED, 1e9), once=False),
    "exponent": _number(1.0, 1e3),
  },
  # The named backbone leaves a key that is not its own at its default.
  "backbone": {
    "name": _text("sasrec", "sasrec", "gru4rec", "hstu", "din"),
    "length": _whole(50, most=_SIZE),
    "width": _whole(64, most=_SIZE),
    "dropout": _share(0.2),
    "blocks": _whole(2, most=128),  # sasrec, hstu
    "heads": _whole(2, most=_SIZE),  # sasrec, hstu
    "expansion": _whole(4, most=256),  # sasrec
    "layers": _whole(1, most=128),  # gru4rec
    "attention_hidden": _whole(36, most=_SIZE),  # din
    "hidden": _whole(80, most=_SIZE),  # din
    # Lay short histories one after another in rows of L and encode so many
    # rows at a time; 0 = a history a row, all at once. Saves time where most
    # of a batch is padding, and on CPU where a batch outgrows the caches.
    "pack_rows": _whole(0, 0, _SIZE),
    # Type of the products' operands: 'float32', or 'bfloat16' for
    # accelerators. Params, optimizer and sums are float32 in any case.
    "compute": _text("float32", "float32", "bfloat16"),
    # Adds an embedding of the user's training activeness to what the model
    # reads; the method 'base_activeness' does so for the base alone.
    "reads_activeness": _flag(False),
  },
  # The named plugin leaves a key that is not its own at its default.
  "plugin": {
    "name": _text(
      "bottleneck", "bottleneck", "translation", "adapter", "lora", "memory",
      "gated",
    ),
    "hidden": _whole(32, most=_SIZE),  # bottleneck, adapter, gated
    "rank": _whole(4, most=_SIZE),  # lora
    "reads_state": _flag(True),  # gated
  },
  # Item-to-item transitions of the training prefix, for 'memory' and 'gated'.
  "memory": {
    "channels": _several(
      ("around", "after", "next"), _text(NEEDED, "around", "after", "next"), 1
    ),
    "window": _whole(5, most=1024),  # places that count as a transition
    "decay": _positive(0.7, 1),  # weight of each further place
    "neighbours": _whole(50, most=_SIZE),  # kept an item
    # Items of a history that are looked up, at most `length`.
    "recent": _whole(10, most=_SIZE),
    "history_decay": _positive(0.8, 1),  # weight of each older one
    "shrink": _number(2.0),  # added to the row sums
    # Scores are divided by popularity^power.
    "popularity_power": _number(0.25, 4),
    # They reach items that never stood near one of the history, and hold the
    # user's own items too, so that plugins need `pin.plugin_draw`
    # 'validation'.
    "relations": _several(
      (), _text(NEEDED, "cosine", "two_step", "linear", "next")
    ),
    "ridge": _positive(100.0),  # of 'linear'
    "next_ridge": _positive(100.0),  # of 'next'
  },
  # draw: windows by 'interactions' or 'users'; mean: over 'interactions'
  # (positions) or 'users' (rows).
  "joint": {
    "draw": _text("interactions", *_DRAWS),
    "mean": _text("interactions", *_MEANS),
    # Of joint stages, where PIN's windows are longer or shorter on average, to
    # give both as many targets; 0 = the common `batch_size`.
    "batch_size": _whole(0, 0, 2**24),
  },
  "pin": {
    "draw": _text("interactions", *_DRAWS),
    "mean": _text("interactions", *_MEANS),
    # With 'validation', stage 2 learns from the validation targets of half of
    # the users and is selected on the others'.
    "plugin_draw": _text("interactions", *_DRAWS, "validation"),
    "plugin_mean": _text("interactions", *_MEANS),
    # A name of `weightings.WEIGHTINGS`; 'cagrad:c=0.4' sets options.
    "weighting": _text("backdoor"),
    # Over the 'whole' gradient, each 'tensor' by itself, or as the 'rule' was
    # published.
    "granularity": _text("rule", "rule", "whole", "tensor"),
    # Parameters with a weighting of their own: ('items|bias=joint',) gives
    # those whose name matches the regular expression the joint gradient.
    "blocks": _several((), _text(NEEDED)),
    # 'auto', or a name of pin_jax.aggregation.aggregator.PATHS.
    "path": _text(
      "auto", "auto", "stacked", "sequential", "accumulated", "weighted",
    ),
    "diagnose_every": _whole(10, 0),  # steps between Gramians; 0 = off
    "clip_importance": _positive(10.0),
  },
  # Weightings of the methods of these names, as `pin.weighting`; they share
  # PIN's draw, mean, granularity and path.
  "rules": {
    "inverse_propensity": _text("inverse_propensity"),
    "group_dro": _text("group_dro"),
    "streaming_dro": _text("streaming_dro"),
    "cvar": _text("cvar:alpha=0.4"),
    "pcgrad": _text("pcgrad"),
    "upgrad": _text("upgrad"),
    "consensus": _text("consensus"),
    "gradient_alignment": _text("gradient_alignment"),
  },
  # 'softmax' over the whole catalogue, or of sampled negatives
  # ('sampled_softmax' is logQ-corrected); the other keys are theirs.
  "loss": {
    "name": _text(
      "softmax", "softmax", "sampled_softmax", "gbce", "bce", "bpr"
    ),
    "negatives": _whole(256, most=2**20),
    # By a batch's positions, or each its 'own'.
    "candidates": _text("shared", "shared", "own"),
    # 'uniform', 'popularity', 'in_batch', or shares of the negatives, such as
    # 'in_batch:0.5,uniform:0.5'.
    "proposal": _text("uniform"),
    "exponent": _number(1.0, 4),  # of the training counts in 'popularity'
    "calibration": _number(0.75, 1),  # t of gbce
    "focusing": _number(2.0, 100),  # gamma of the method 'focal'
  },
  "batch_size": _whole(250, 2, 2**24),  # windows a step, over all groups
  "backbone_steps": _whole(1500, most=_STEPS),
  "plugin_steps": _whole(300, most=_STEPS),
  "classifier_steps": _whole(300, most=_STEPS),
  # Steps of a last phase of every row, once all choices are made: its backbone
  # trains on with all validation targets among its training targets, the
  # memory counts them, plugins stay as fitted. 0 = off.
  "refit": _whole(0, 0, _STEPS),
  "optimizer": {
    "learning_rate": _positive(2e-3, 1e3),
    "plugin_learning_rate": _positive(1e-3, 1e3),
    "classifier_learning_rate": _positive(2e-3, 1e3),
    "warmup": _whole(50, 0, _STEPS),
    "final": _share(0.01),
    "b2": _share(0.98),
    "weight_decay": _number(0.0, 1e3),
    "clip": _positive(5.0),
    "average": _share(0.0),
    # How the item tables are updated: 'dense', or with sampled negatives
    # 'row_sparse': the rows that a step reads, and their moments, alone.
    "tables": _text("dense", "dense", "row_sparse"),
  },
  "validation": {
    "every": _whole(100, most=_STEPS),
    "users": _whole(0, 0),  # validate on so many, drawn once; 0 = all
    # Validations without improvement before a stop; 0 = off.
    "patience": _whole(0, 0),
  },
  "evaluation": {
    # 'full' ranking, or 'sampled': the target among so many `negatives`, drawn
    # by `seed`, not by the runs' seeds. Never in one table.
    "protocol": _text("full", "full", "sampled"),
    "negatives": _whole(99, most=2**24),
    "seed": _whole(0, 0),
  },
  "dispatch": _whole(10, most=10**6),  # steps a dispatch
  # Devices: every batch is split over `data` of them, the item tables over
  # `model`, the interactions over all; 1 x 1 is one device. Results do not
  # depend on it, and a job may go on with another mesh.
  "mesh": {"data": _whole(1, most=_SIZE), "model": _whole(1, most=_SIZE)},
  # What the report tests, declared before training: tail users better, head
  # users no worse than by the margin, a relative loss of NDCG@10. `power` is
  # the probability with which the printed effects are found.
  "claims": {
    "non_inferiority_margin": _share(0.02),
    "power": Key(0.8, float, 0.01, 1, below=True),
  },
  # A loss, gradient or parameter that is not finite: 'stop', or 'skip' the step
  # and count it.
  "non_finite": _text("stop", "stop", "skip"),
}

_FILTERS = {
  "duplicates": _text("keep", "keep", "exact", "first", "last"),
  "k_core": _whole(0, 0),
  "min_length": _whole(1),
  "max_history": _optional(_whole(None)),
}

# What each `data.source` takes besides: the arguments of its reader.
SOURCES = {
  "simulator": {
    "seed": _whole(0, 0),
    "num_users": _whole(4000, most=10**7),
    "num_items": _whole(300, 2, 10_000),  # squared, for every stratum
    "borders": _several(
      (5, 8, 12, 20, 40, 151), _whole(NEEDED, 3, 100_000), 2
    ),
    "length_exponent": _number(1.5, 20),
    "prior_decay": _positive(0.9, 1e3),
    "confounding": _number(0.4, 1),
    "scale": _number(1.75, 1e3),
    "rank": _whole(8, 2, 1024),
    "popularity_exponent": _number(0.6, 100),
    "popularity_tilt": _number(0.25, 100),
  },
  "files": {
    "path": _text(NEEDED),
    # Names of columns; None = found by their usual names.
    "user": _optional(_text(None)),
    "item": _optional(_text(None)),
    "time": _optional(_text(None)),
    "separator": _optional(_text(None)),  # one character; None = by the suffix
    **_FILTERS,
  },
  # `stream` leaves the interactions on disk.
  "stored": {"path": _text(NEEDED), "stream": _flag(False)},
  "tfds": {
    "name": _text(NEEDED),
    "data_dir": _optional(_text(None)),
    "manual_dir": _optional(_text(None)),
    **_FILTERS,
  },
}


# Keys of older versions, on which no result depends.
RETIRED = {
  *(f"claims.assumed_{x}" for x in ("ndcg", "correlation", "seed_spread")),
  *(f"evaluation.{x}_chunk" for x in ("user", "item")),
}


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple]:
  """Yields ('a.b', value) for every leaf of nested dictionaries."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def keys_of(source: Any) -> dict[str, Key]:
  """Dotted name -> what it takes, of every key where the data are such."""
  own = {f"data.{name}": key for name, key in SOURCES.get(source, {}).items()}
  return dict(flatten(KEYS)) | own


def defaults(keys: dict[str, Any] = KEYS) -> dict[str, Any]:
  """Nested dictionaries of the defaults."""
  return {
    name: defaults(key) if isinstance(key, dict) else key.default
    for name, key in keys.items()
  }


def canonical(config: dict[str, Any]) -> dict[str, Any]:
  """A configuration as JSON has it, the same whatever way a key was set.

  What is None is as if it were not there.
  """
  source = config.get("data", {}).get("source")
  keys = keys_of(source)
  own = {
    name: key.default for name, key in SOURCES.get(source, {}).items()
    if key.default is not NEEDED
  }
  config = {**config, "data": {**own, **config.get("data", {})}}

  def of(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
      if isinstance(value, dict):
        out[name] = of(value, f"{prefix}{name}.")
      elif value is not None and prefix + name not in RETIRED:
        key = keys.get(prefix + name)
        out[name] = key.canonical(value) if key else value
    return out

  return of(config, "")


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
  """Says of an InputError of the library what of the config it comes from.

  The library names its own arguments; those of a builder bear the names of the
  section's keys, so that 'config section backbone: heads=3 ...' says it all.

  Args:
    name: a section such as 'backbone', or a key such as 'pin.weighting'.

  Raises:
    InputError: that of the block; what names the config already is left alone.
  """
  try:
    yield
  except InputError as error:
    if str(error).startswith("config "):
      raise
    kind = "section" if isinstance(KEYS.get(name), dict) else "key"
    raise InputError(f"config {kind} {name}: {error}") from error


def number(text: str) -> float:
  """The number that a text says, an int where it is whole; else NaN."""
  try:
    value = float(text)
  except ValueError:
    return math.nan
  return int(value) if value.is_integer() else value


def bad(key: str, value: Any, remedy: str) -> InputError:
  """The error of a key that does not take a value."""
  return InputError(f"config key {key}={value!r}: {remedy}")


def nearest(key: str, known: Any) -> str:
  """A hint at the key that was meant."""
  near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f"did you mean {near[0]}?" if near else f"known: {sorted(known)}"


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
