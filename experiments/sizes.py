"""Sizes that a config leaves to the data: those of its keys that are None.

They are fitted once everything else is known, from the interactions that the
job reads in any case. A size that is given stands, and the others heed it.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import schema
from experiments.configs.base import default
from pin_jax.data import activeness
from pin_jax.types import InputError

EPOCHS = 40
POSITIONS = 4000  # real ones in a batch, about
LINEAR_ITEMS = 15_000  # whose 'linear' relation takes a minute
KEYS = (
  "groups.num_groups", "groups.rule", "groups.head_share", "backbone.length",
  "backbone.dropout", "backbone.pack_rows", "memory.recent",
  "memory.relations", "batch_size", "backbone_steps", "plugin_steps", "refit",
  "validation.every", "loss.name", "loss.negatives",
)


def fitted(
  config: ConfigDict, lengths: np.ndarray, active: np.ndarray, num_items: int
) -> ConfigDict:
  """A copy of the config with sizes that suit the data; ours, by rule.

  The window holds the whole history of nine users out of ten (8 to 200 items);
  a batch about 4,000 targets; training 40 passes over the data, 500 to 5,000
  steps, a fifth of them in stage 2, and half as many more with all validation
  targets (`refit`). Histories that fill less than half of their windows are
  packed; from 20,000 items on the softmax is sampled. Groups and segments: see
  `_fit_groups`.

  Args:
    config: the whole configuration.
    lengths: [U] interactions of every user, held-out ones included.
    active: [U], activeness.
    num_items: V.
  """
  out = ConfigDict(config.to_dict())
  if wanted := _open(config):
    found = _sizes(_flat(config), lengths, active, num_items)
    out.update_from_flattened_dict({key: found[key] for key in wanted})
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
  except (ArithmeticError, KeyError, TypeError, ValueError):
    out = ConfigDict(config.to_dict())  # what is wrong the check will say
    known = _flat(default())
    out.update_from_flattened_dict({key: known[key] for key in _open(config)})
    return out


def told(config: ConfigDict, complete: ConfigDict) -> str:
  """One line that says what was fitted; empty where nothing was."""
  known = _flat(complete)
  sizes = [f"{key}={known[key]!r}" for key in _open(config)]
  return "fitted to the data: " * bool(sizes) + ", ".join(sizes)


def _flat(config: ConfigDict) -> dict[str, Any]:
  return dict(schema.flatten(config.to_dict()))


def _open(config: ConfigDict) -> list[str]:
  """Keys of sizes that are None."""
  given = _flat(config)
  return [key for key in KEYS if given.get(key, 0) is None]


def _sizes(
  given: dict[str, Any], lengths: np.ndarray, active: np.ndarray, num_items: int
) -> dict[str, Any]:
  """The values of all keys, by their dotted names."""
  out, known = dict(given), _flat(default())

  def size(key: str, value: Any) -> Any:
    """What is given, else the value."""
    if out[key] is None:
      out[key] = value
    return out[key]

  _fit_groups(out, np.sort(active))
  most = float(np.quantile(lengths, 0.9, method="lower"))
  length = size("backbone.length", int(np.clip(8 * np.ceil(most / 8), 8, 200)))
  read = float(np.minimum(lengths, length).mean())
  size("backbone.dropout", 0.4 if np.median(lengths) < 20 else 0.2)
  devices = out["mesh.data"]
  size("backbone.pack_rows", 8 if read < length / 2 and devices == 1 else 0)
  size("memory.recent", min(known["memory.recent"], length))
  dense = num_items <= LINEAR_ITEMS
  size("memory.relations", ("cosine", "two_step", *["linear"] * dense))
  step = 1 if devices == 1 else 2 * devices
  groups = out["groups.num_groups"]
  per_group = int(np.clip(POSITIONS / read / groups, 10, 100))
  batch = size("batch_size", groups * step * max(per_group // step, 1))
  windows = np.ceil(lengths / length).sum()
  steps = int(np.clip(EPOCHS * windows / batch, 500, 5000))
  plugin_steps = size("plugin_steps", steps // 500 * 100)
  size("backbone_steps", max(steps // 100 * 100 - plugin_steps, 100))
  size("refit", max(plugin_steps // 2, 1))
  every, dispatch = max(100, steps // 1500 * 100), out["dispatch"]
  size("validation.every", -(-every // dispatch) * dispatch)
  large = num_items >= 20_000
  sampled = large or out["optimizer.tables"] != "dense"
  size("loss.name", "sampled_softmax" if sampled else "softmax")
  size("loss.negatives", 2048 if large else known["loss.negatives"])
  return out


def _fit_groups(out: dict[str, Any], active: np.ndarray) -> None:
  """The most groups, and the largest head, that leave all something to learn.

  A user with one training interaction has no target. Groups of as many users
  each come before those of as many interactions each. Of the users with
  targets, the head has half at most, so that the tail has some.
  """
  known = default().groups
  rule, number = out["groups.rule"], out["groups.num_groups"]
  borders = len(out["groups.thresholds"])
  most = borders + 1 if rule == "thresholds" else known.num_groups
  tried = [
    (count, which)
    for count in ([number] if number else range(most, 0, -1))
    for which in ([rule] if rule else ("users", "interactions"))
  ]
  out["groups.num_groups"], out["groups.rule"] = next(
    (pair for pair in tried if _all_learn(active, *pair)), tried[0]
  )
  if out["groups.head_share"] is None:
    half = float(f"{(active > 1).mean() / 2:.2g}") or known.head_share
    out["groups.head_share"] = min(known.head_share, half)


def _all_learn(active: np.ndarray, num_groups: int, rule: str) -> bool:
  """Whether every group has a training target; `active` ascends."""
  if rule == "thresholds":
    return True
  try:
    found = activeness.assign_groups(active, num_groups=num_groups, rule=rule)
  except InputError:
    return False
  return bool((np.bincount(found, active > 1) > 0).all())
