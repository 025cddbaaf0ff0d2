"""Every key of a configuration, once: meaning, type, range, default.

  python -m experiments.schema > docs/keys.md

writes the page of all keys. `configs.base.default` and the checks at launch
follow from the same table.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.methods import METHODS
from pin_jax.types import InputError

MOST = 2**31 - 1  # of whole numbers, which go to int32
NEEDED = ...  # the default of a key that has none


class Key(NamedTuple):
  """What a key takes.

  Attributes:
    default: its value unless it is set.
    kind: int, float, bool, str or tuple.
    meaning: what it sets.
    least: the smallest number, or the fewest elements.
    most: the largest number; with `below` it is too large itself.
    choices: of a text; () = any but the empty one.
    item: what a tuple's elements are.
    once: whether each element may be there only once.
    none: whether None is taken, for what is found out or left out.
  """

  default: Any
  kind: type
  meaning: str = ""
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
  def takes(self) -> str:
    """The values that it takes, in words."""
    if self.kind is tuple:
      few = f"at least {self.least} of" * (self.least > 0)
      once = ", each once" * self.once
      return f"a tuple{once}; {few or 'of each'}: {self.item.takes}"
    if self.kind is int:
      return f"a whole number from {self.least} to {self.most}"
    if self.kind is float:
      below = "below " * self.below
      return f"a number from {self.least:g} to {below}{self.most:g}"
    if self.kind is bool:
      return "True or False"
    if self.choices:
      return f"one of {list(self.choices)}"
    return "text that is not empty"

  @property
  def remedy(self) -> str:
    """What to give instead of what the key does not take."""
    return f"{'use' if self.choices else 'give'} {self.takes}"

  def canonical(self, value: Any) -> Any:
    """The one form of what is the same value: 1 or 1.0, list or tuple."""
    if value is None or not self.accepts(value):
      return value
    if self.kind is tuple:
      return [self.item.canonical(x) for x in value]
    return float(value) + 0.0 if self.kind is float else value  # no -0.0


def _whole(
  default: Any, meaning: str = "", least: int = 1, most: int = MOST
) -> Key:
  return Key(default, int, meaning, least, most)


def _number(default: Any, meaning: str = "", most: float = 1e6) -> Key:
  return Key(default, float, meaning, 0, most)


def _positive(default: Any, meaning: str, most: float = 1e6) -> Key:
  return Key(default, float, meaning, 1e-9, most)


def _share(default: Any, meaning: str) -> Key:
  return Key(default, float, meaning, 0, 1, below=True)


def _flag(default: bool, meaning: str) -> Key:
  return Key(default, bool, meaning)


def _text(default: Any, meaning: str = "", *choices: str) -> Key:
  return Key(default, str, meaning, choices=choices)


def _several(
  default: Any, meaning: str, item: Key, least: int = 0, once: bool = True
) -> Key:
  return Key(default, tuple, meaning, least, item=item, once=once)


def _optional(kind: type, meaning: str, least: int = 1) -> Key:
  return Key(None, kind, meaning, least, none=True)


def _size(default: int, meaning: str, least: int = 1) -> Key:
  """A dimension; more than its most is a slip of the pen."""
  return _whole(default, meaning, least, 2**16)


_STEPS = 10**9
_DRAWS = "interactions", "users"


def _sampling(stage: str) -> dict[str, Key]:
  draw = f"{stage}: windows are drawn by interactions or by users"
  mean = "means are over interactions (positions) or users (rows)"
  return {
    "draw": _text("interactions", draw, *_DRAWS),
    "mean": _text("interactions", f"{stage}: {mean}", *_DRAWS),
  }


KEYS = {
  "methods": _several(
    ("base", "pin_backbone", "pin"), "rows of the tables; the first is the one "
    "compared with", _text(NEEDED, "", *METHODS), 1,
  ),
  "seeds": _several(
    (0,), "a run of every method each; intervals average a user over seeds",
    _whole(NEEDED, least=0), 1,
  ),
  "num_seeds": _size(1, "seeds trained at once, in as many times the memory"),
  "data": {
    "source": _text("simulator", "where the interactions come from",
                    "simulator", "files", "stored", "tfds"),
  },
  "split": {
    "protocol": _text("leave_one_out", "how targets are held out",
                      "leave_one_out", "temporal"),
    "validation": _share(0.1, "temporal: share of interactions after the cut"),
    "test": _share(0.1, "temporal: share of them after the test cut"),
  },
  "groups": {
    "num_groups": _size(5, "G, number of activeness groups"),
    "rule": _text(
      "users", "groups of as many users each, as many interactions each, or by "
      "thresholds", "users", "interactions", "thresholds",
    ),
    "thresholds": _several((), "smallest activeness of each group but the "
                           "first", _whole(NEEDED, least=0)),
    "head_share": _share(0.2, "share of users in the head, the most active"),
  },
  "prior": {
    "kind": _text("users", "P(d), the weights over groups", "users", "uniform",
                  "interactions", "custom"),
    "values": _several((), "custom: P(d) up to a factor",
                       _number(NEEDED, most=1e9), once=False),
    "exponent": _number(1.0, "P(d) is raised to it and normalised again", 1e3),
  },
  "backbone": {
    "name": _text("sasrec", "architecture; keys not its own stay at their "
                  "defaults", "sasrec", "gru4rec", "hstu", "din"),
    "length": _size(50, "L, items of the history that it reads"),
    "width": _size(64, "D, of embeddings and states"),
    "dropout": _share(0.2, "share of units dropped in training"),
    "blocks": _whole(2, "sasrec, hstu: number of blocks", most=128),
    "heads": _size(2, "sasrec, hstu: attention heads"),
    "expansion": _whole(4, "sasrec: feed-forward width over D", most=256),
    "layers": _whole(1, "gru4rec: number of layers", most=128),
    "attention_hidden": _size(36, "din: hidden units of the attention"),
    "hidden": _size(80, "din: hidden units of the score"),
    "pack_rows": _size(
      0, "rows of L encoded at a time, short histories one after another in "
      "each; 0 = a history a row. Saves time where batches are mostly padding",
      0,
    ),
    "compute": _text("float32", "type of the products' operands; params, "
                     "optimizer and sums are float32", "float32", "bfloat16"),
  },
  "plugin": {
    "name": _text("bottleneck", "what serves a segment; keys not its own stay "
                  "at their defaults", "bottleneck", "translation", "adapter",
                  "lora", "memory", "gated"),
    "hidden": _size(32, "bottleneck, adapter, gated: hidden units"),
    "rank": _size(4, "lora: rank of the updates"),
    "reads_state": _flag(True, "gated: whether the gate reads the state"),
  },
  "memory": {
    "channels": _several(
      ("around", "after", "next"), "item-to-item transitions that 'memory' and "
      "'gated' read", _text(NEEDED, "", "around", "after", "next"), 1,
    ),
    "window": _whole(5, "places that count as a transition", most=1024),
    "decay": _positive(0.7, "weight of each further place", 1),
    "neighbours": _size(50, "kept an item"),
    "recent": _size(10, "newest items of a history that are looked up, at most "
                    "`backbone.length`"),
    "history_decay": _positive(0.8, "weight of each older one", 1),
    "shrink": _number(2.0, "added to the row sums"),
    "popularity_power": _number(
      0.25, "scores are divided by popularity to this power", 4
    ),
    "relations": _several(
      (), "item-to-item models besides; they hold the user's own items, so "
      "that plugins need `pin.plugin_draw='validation'`",
      _text(NEEDED, "", "cosine", "two_step", "linear", "next"),
    ),
    "ridge": _positive(100.0, "ridge of 'linear'"),
    "next_ridge": _positive(100.0, "ridge of 'next'"),
  },
  "joint": {
    **_sampling("joint stages"),
    "batch_size": _whole(0, "windows a step of joint stages, for as many "
                         "targets as PIN's; 0 = `batch_size`", 0, 2**24),
  },
  "pin": {
    **_sampling("stage 1"),
    "plugin_draw": _text(
      "interactions", "stage 2: likewise; with 'validation' it learns from the "
      "validation targets of half of the users and is selected on the others'",
      *_DRAWS, "validation",
    ),
    "weighting": _text(
      "backdoor", "how the groups' gradients are weighted: a name of "
      "`weightings.WEIGHTINGS`; 'cagrad:c=0.4' sets options",
    ),
    "granularity": _text(
      "rule", "weights of the whole gradient, of each tensor by itself, or as "
      "the rule was published", "rule", "whole", "tensor",
    ),
    "blocks": _several(
      (), "parameters with a weighting of their own: 'items|bias=joint' gives "
      "those whose name matches the joint gradient", _text(NEEDED),
    ),
    "path": _text(
      "auto", "how the groups' gradients are computed; results are equal",
      "auto", "stacked", "sequential", "accumulated", "weighted",
    ),
    "diagnose_every": _whole(10, "steps between Gramians; 0 = off", 0),
    "clip_importance": _positive(10.0, "exact adjustment: largest importance"),
  },
  "loss": {
    "name": _text(
      "softmax", "'softmax' over the whole catalogue, or a loss of sampled "
      "negatives: 'sampled_softmax' (logQ-corrected), 'gbce', 'bce', 'bpr', or "
      "one's own, a name of `losses.SAMPLED_LOSSES`",
    ),
    "negatives": _whole(256, "sampled a step or a position", most=2**20),
    "candidates": _text("shared", "negatives are shared by a batch's "
                        "positions, or each has its own", "shared", "own"),
    "proposal": _text(
      "uniform", "where negatives come from: 'uniform', 'popularity', "
      "'in_batch', or shares such as 'in_batch:0.5,uniform:0.5'",
    ),
    "exponent": _number(1.0, "popularity: of the training counts", 4),
    "calibration": _number(0.75, "gbce: t", 1),
    "focusing": _number(2.0, "gamma of the method 'focal'", 100),
  },
  "batch_size": _whole(250, "windows a step, over all groups", 2, 2**24),
  "backbone_steps": _whole(1500, "steps of stage 1", most=_STEPS),
  "plugin_steps": _whole(300, "steps of stage 2", most=_STEPS),
  "classifier_steps": _whole(300, "exact adjustment: of P(d|x)", most=_STEPS),
  "refit": _whole(
    0, "steps of a last phase of every row, once all choices are made: its "
    "backbone trains on with all validation targets, plugins stay; 0 = off", 0,
    _STEPS,
  ),
  "optimizer": {
    "learning_rate": _positive(2e-3, "of stage 1", 1e3),
    "plugin_learning_rate": _positive(1e-3, "of stage 2", 1e3),
    "warmup": _whole(50, "steps of linear warm-up", 0, _STEPS),
    "weight_decay": _number(0.0, "decoupled (AdamW)", 1e3),
    "clip": _positive(5.0, "largest norm of the gradient"),
    "average": _share(0.0, "decay of the parameters' average, which serves"),
    "tables": _text(
      "dense", "how item tables are updated; row_sparse (with sampled "
      "negatives): the rows that a step reads, and their moments, alone",
      "dense", "row_sparse",
    ),
  },
  "validation": {
    "every": _whole(100, "steps between validations", most=_STEPS),
    "users": _whole(0, "validate on so many, drawn once; 0 = all", 0),
    "patience": _whole(0, "validations without gain before a stop; 0 = off", 0),
  },
  "evaluation": {
    "metrics": _several(
      ("ndcg@10", "hr@10", "ndcg@20", "hr@20"), "what tables show, of ranks: "
      "names of `metrics.METRICS`, most with a cutoff. The first, higher is "
      "better, selects on validation, and the claim is on it",
      _text(NEEDED), 1,
    ),
    "protocol": _text("full", "full ranking, or the target among sampled "
                      "negatives; never in one table", "full", "sampled"),
    "negatives": _whole(99, "sampled: how many", most=2**24),
    "seed": _whole(0, "sampled: what they are drawn by", 0),
  },
  "dispatch": _whole(10, "steps sent to the device at a time", most=10**6),
  "mesh": {
    "data": _size(1, "devices that every batch is split over; results do not "
                  "depend on the mesh, and a job may go on with another"),
    "model": _size(1, "devices that item tables are split over"),
  },
  "claims": {
    "non_inferiority_margin": _share(
      0.02, "declared before training: the relative loss of the first metric "
      "that head users may have"
    ),
  },
  "non_finite": _text("stop", "at a value that is not finite: stop, or skip "
                      "the step and count it", "stop", "skip"),
}

_FILTERS = {
  "duplicates": _text("keep", "of a user and item", "keep", "exact", "first",
                      "last"),
  "k_core": _whole(0, "drop users and items with fewer, again and again", 0),
  "min_length": _whole(1, "drop users with fewer interactions"),
  "max_history": _optional(int, "keep a user's newest so many"),
}

# What each `data.source` takes besides: the arguments of its reader.
SOURCES = {
  "simulator": {
    "seed": _whole(0, "of the world and its users", 0),
    "num_users": _whole(4000, "U", most=10**7),
    "num_items": _whole(300, "V; squared, for every group", 2, 10_000),
    "borders": _several(
      (5, 8, 12, 20, 40, 151), "lengths of the sequences of each group",
      _whole(NEEDED, least=3, most=100_000), 2,
    ),
    "confounding": _number(
      0.4, "how much activeness shapes histories and targets", 1
    ),
  },
  "files": {
    "path": _text(NEEDED, "CSV, TSV, JSON lines, Parquet, .inter, …"),
    "user": _optional(str, "column of users; None = by its usual names"),
    "item": _optional(str, "column of items; likewise"),
    "time": _optional(str, "column of times; likewise"),
    "separator": _optional(str, "of text; None = by the first lines"),
    **_FILTERS,
  },
  "stored": {
    "path": _text(NEEDED, "directory that `experiments.store` wrote"),
    "stream": _flag(False, "leave the interactions on disk"),
  },
  "tfds": {
    "name": _text(NEEDED, "of the data set"),
    "data_dir": _optional(str, "where TFDS keeps it"),
    "manual_dir": _optional(str, "where its downloaded archive is"),
    **_FILTERS,
  },
}

ANY = ...
# Keys of older versions -> the only value that means the job of today; ANY
# where no result depends on it.
RETIRED = {
  "claims.power": ANY,
  "claims.assumed_ndcg": ANY,
  "claims.assumed_correlation": ANY,
  "claims.assumed_seed_spread": ANY,
  "evaluation.user_chunk": ANY,
  "evaluation.item_chunk": ANY,
  "backbone.reads_activeness": False,
  "optimizer.b2": 0.98,
  "optimizer.classifier_learning_rate": 2e-3,
  "optimizer.final": 0.01,
  "pin.plugin_mean": "interactions",
  **{
    f"rules.{method.stages[-1].rule.split(':')[0]}": method.stages[-1].rule
    for method in METHODS.values() if method.stages[-1].rule
  },
  "data.length_exponent": 1.5,
  "data.prior_decay": 0.9,
  "data.scale": 1.75,
  "data.rank": 8,
  "data.popularity_exponent": 0.6,
  "data.popularity_tilt": 0.25,
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

  What is None is left out, and so is what RETIRED lists at its value there.
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
        if own := of(value, f"{prefix}{name}."):
          out[name] = own
      elif value is not None and RETIRED.get(prefix + name) not in (ANY, value):
        key = keys.get(prefix + name)
        out[name] = key.canonical(value) if key else value
    return out

  return of(config, "")


def completed(config: dict[str, Any]) -> ConfigDict:
  """The whole of a configuration that a job of any version has written.

  What it lacks has its default, and is not what a result depends on.
  """
  kept, whole = canonical(config), ConfigDict(defaults())
  known = dict(flatten(whole.to_dict()))
  with whole.ignore_type(), whole.unlocked():
    whole.data = ConfigDict(kept.pop("data"))
    whole.update_from_flattened_dict({
      key: value for key, value in flatten(kept) if key in known
    })
  return whole


def check_keys(config: ConfigDict) -> None:
  """Checks that every key is known, there, and takes its value.

  Raises:
    InputError: for the first that is not so.
  """
  given = dict(flatten(config.to_dict()))
  source = given.get("data.source")
  if not KEYS["data"]["source"].accepts(source):
    raise bad("data.source", source, KEYS["data"]["source"].remedy)
  keys = keys_of(source)
  for name, value in given.items():
    if name not in keys and not (name.startswith("data.") and value is None):
      unknown = "unknown key"
      if name.startswith("data."):
        unknown = f"source {source!r} does not use it"
      raise bad(name, value, f"{unknown}; {nearest(name, keys)}")
  for name, key in keys.items():
    value, needed = given.get(name), key.default is NEEDED
    if value is not None or (name in given and not needed):
      if not key.accepts(value):
        raise bad(name, value, key.remedy)
    elif needed or not name.startswith("data."):
      raise InputError(f"config key {name} is missing; give {key.takes}")


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
  """Says of an InputError of the library what of the config it comes from.

  Args:
    name: a section such as 'backbone', or a key such as 'pin.weighting'.

  Raises:
    InputError: that of the block; one that names the config is left alone.
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


def _rows() -> Iterator[tuple[str, str, str, str]]:
  """Yields (name, default, meaning, what it takes) of every key."""
  found = dict(flatten(KEYS))
  for source, own in SOURCES.items():
    found |= {f"data.{name} ({source})": key for name, key in own.items()}
  for name, key in found.items():
    default = "needed" if key.default is NEEDED else repr(key.default)
    takes = key.takes.replace("a whole number from", "int,")
    takes = takes.replace("a number from", "float,")
    yield name, default, key.meaning, takes


def page() -> str:
  """docs/keys.md."""
  rows = [("key", "default", "meaning", "takes"), ("---",) * 4]
  rows += [(f"`{name}`", f"`{value}`", *rest) for name, value, *rest in _rows()]
  return (
    "# Keys of a configuration\n\n"
    "Written by `python -m experiments.schema > docs/keys.md`. Each follows "
    "`--config.` on the command line, as in `--config.backbone.width=128`; "
    "`experiments/schema.py` is where they are defined. Those of one "
    "`data.source` alone name it. Sizes that a config leaves at None are "
    "fitted to the data (`experiments/sizes.py`). A config sets values of its "
    "own; those of a job are in its config.json. Tuples are written "
    "`0,1,2`.\n\n"
  ) + "".join(
    "| " + " | ".join(x.replace("|", "\\|") for x in row) + " |\n"
    for row in rows
  )


if __name__ == "__main__":
  print(page(), end="")
