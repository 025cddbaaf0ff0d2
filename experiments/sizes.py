"""Sizes that a config leaves to the data: those of its keys that are None.

They are fitted once everything else is known, from the interactions that the
job reads in any case. A size that is given stands, and the others heed it.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict

from experiments.configs.base import default
from pin_jax.data import activeness
from pin_jax.types import InputError

EPOCHS = 40
POSITIONS = 4000  # real ones in a batch, about
KEYS = {
  "groups.num_groups": int, "groups.rule": str, "groups.head_share": float,
  "backbone.length": int, "backbone.dropout": float, "backbone.pack_rows": int,
  "memory.recent": int, "batch_size": int, "backbone_steps": int,
  "plugin_steps": int, "validation.every": int, "loss.name": str,
  "loss.negatives": int,
}


def leave_to_data(config: ConfigDict) -> None:
  """Makes all of KEYS None; they keep their types."""
  for key, kind in KEYS.items():
    section, last = _place(config, key)
    section[last] = config_dict.placeholder(kind)


def fitted(
  config: ConfigDict, lengths: np.ndarray, active: np.ndarray, num_items: int
) -> ConfigDict:
  """A copy of the config with the sizes that suit the data; see `fit`."""
  out = ConfigDict(config.to_dict())
  if _open(config):
    fit(out, lengths, active, num_items)
  return out


def for_any_data(
  config: ConfigDict, *, users: int = 100, items: int = 100,
  interactions: int = 1200,
) -> ConfigDict:
  """A copy with sizes of some data, to check all else before they are read."""
  mean = max(interactions // users, 3)
  lengths = np.full(min(users, 10_000), mean)
  try:
    return fitted(config, lengths, lengths - 2, items)
  except (ArithmeticError, AttributeError, TypeError, ValueError):
    out = ConfigDict(config.to_dict())  # what is wrong the check will say
    for key in _open(config):
      section, last = _place(out, key)
      section[last] = _place(default(), key)[0][last]
    return out


def told(config: ConfigDict, complete: ConfigDict) -> str:
  """One line that says what was fitted; empty where nothing was."""
  sizes = [
    f"{key}={_place(complete, key)[0][key.split('.')[-1]]!r}"
    for key in _open(config)
  ]
  return "fitted to the data: " * bool(sizes) + ", ".join(sizes)


def _place(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
  """The section of a key, and its name there."""
  section, _, last = key.rpartition(".")
  return (config.get(section, ConfigDict()) if section else config), last


def _open(config: ConfigDict) -> list[str]:
  """Keys of sizes that are None."""
  places = {key: _place(config, key) for key in KEYS}
  return [k for k, (own, last) in places.items() if own.get(last, 0) is None]


def fit(
  config: ConfigDict, lengths: np.ndarray, active: np.ndarray, num_items: int
) -> None:
  """Chooses sizes that suit the data, where they are None; ours, by rule.

  The window holds the whole history of nine users out of ten (8 to 200 items);
  a batch about 4,000 targets; training 40 passes over the data, 500 to 5,000
  steps, a fifth of them in stage 2. Histories that fill less than half of
  their windows are packed; from 20,000 items on the softmax is sampled. Groups
  and segments: see `_fit_groups`.

  Args:
    config: changed in place.
    lengths: [U] interactions of every user, held-out ones included.
    active: [U], activeness.
    num_items: V.
  """

  def size(key: str, value: Any) -> Any:
    """What is given, else the value."""
    section, last = _place(config, key)
    if section[last] is None:
      section[last] = value
    return section[last]

  _fit_groups(config.groups, active)
  most = float(np.quantile(lengths, 0.9, method="lower"))
  length = size("backbone.length", int(np.clip(8 * np.ceil(most / 8), 8, 200)))
  read = float(np.minimum(lengths, length).mean())
  size("backbone.dropout", 0.4 if np.median(lengths) < 20 else 0.2)
  packed = read < length / 2 and config.mesh.data == 1
  size("backbone.pack_rows", 8 if packed else 0)
  size("memory.recent", min(default().memory.recent, length))
  step = 1 if config.mesh.data == 1 else 2 * config.mesh.data
  groups = config.groups.num_groups
  per_group = int(np.clip(POSITIONS / read / groups, 10, 100))
  batch = size("batch_size", groups * step * max(per_group // step, 1))
  windows = np.ceil(lengths / length).sum()
  steps = int(np.clip(EPOCHS * windows / batch, 500, 5000))
  plugin_steps = size("plugin_steps", steps // 500 * 100)
  size("backbone_steps", max(steps // 100 * 100 - plugin_steps, 100))
  every = max(100, steps // 1500 * 100)
  size("validation.every", -(-every // config.dispatch) * config.dispatch)
  large = num_items >= 20_000
  sampled = large or config.optimizer.tables != "dense"
  size("loss.name", "sampled_softmax" if sampled else "softmax")
  size("loss.negatives", 2048 if large else default().loss.negatives)


def _fit_groups(groups: ConfigDict, active: np.ndarray) -> None:
  """The most groups, and the largest head, that leave all something to learn.

  A user with one training interaction has no target. Groups of as many users
  each come before those of as many interactions each. Of the users with
  targets, the head has half at most, so that the tail has some.
  """
  known, active = default().groups, np.sort(active)
  fixed = {"head_share": 2, "thresholds": len(groups.thresholds) + 1}
  most = fixed.get(groups.rule, known.num_groups)
  tried = [
    (number, rule)
    for number in (groups.num_groups and [groups.num_groups])
    or range(most, 0, -1)
    for rule in (groups.rule and [groups.rule]) or ("users", "interactions")
  ]
  groups.num_groups, groups.rule = next(
    (pair for pair in tried if _all_learn(active, *pair)), tried[0]
  )
  if groups.head_share is None:
    half = float(f"{(active > 1).mean() / 2:.2g}") or known.head_share
    groups.head_share = min(known.head_share, half)


def _all_learn(active: np.ndarray, num_groups: int, rule: str) -> bool:
  """Whether every group has a training target; `active` ascends."""
  if rule in ("thresholds", "head_share"):
    return True
  try:
    found = activeness.assign_groups(
      active, num_groups=num_groups, rule=rule
    )
  except InputError:
    return False
  return bool((np.bincount(found, active > 1) > 0).all())
