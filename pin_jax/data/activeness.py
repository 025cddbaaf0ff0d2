"""Activeness: groups, segments and priors, from training data only.

A user's activeness is the number of their training interactions. One order
serves groups and segments alike: more active first, and among equals by a fixed
hash of the user's original id, never by index, which often tells a user's age.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from pin_jax.types import InputError

GROUP_RULES = ("users", "interactions", "thresholds")
PRIORS = ("users", "uniform", "interactions", "custom")


def assign_groups(
  activeness: np.ndarray,
  ids: ArrayLike | None = None,
  *,
  num_groups: int = 5,
  rule: str = "users",
  thresholds: Sequence[float] | None = None,
) -> np.ndarray:
  """Stratifies users into groups by activeness; 0 is the least active.

  Args:
    activeness: [U] numbers of training interactions.
    ids: [U] original ids of the users, which break ties, see `id_hash`; by
      default 0..U-1.
    num_groups: G.
    rule: 'users' (equal numbers of users), 'interactions' (equal numbers of
      interactions), 'thresholds' (group = number of borders <= activeness).
    thresholds: G-1 ascending borders, for that rule only.

  Returns:
    [U] int32 in 0..G-1. Equal activeness may be separated by every rule but
    'thresholds'; the lower hash of the id then counts as more active.

  Raises:
    InputError: for bad activeness, an unknown rule, borders that do not fit, or
      a group that would be empty.
  """
  if rule not in GROUP_RULES:
    raise InputError(f"rule={rule!r} is unknown; use one of {GROUP_RULES}")
  activeness = _check_activeness(activeness)
  if not 1 <= num_groups <= len(activeness):
    raise InputError(
      f"num_groups={num_groups} does not suit {len(activeness)} users; "
      f"give 1..{len(activeness)}"
    )
  if (thresholds is not None) != (rule == "thresholds"):
    raise InputError(
      f"rule={rule!r} with thresholds={thresholds!r}; give thresholds with "
      "rule='thresholds' and only then"
    )
  if rule == "thresholds":
    borders = np.asarray(thresholds, np.float64)
    if borders.shape != (num_groups - 1,):
      raise InputError(
        f"thresholds have shape {borders.shape} for num_groups={num_groups}; "
        f"give {num_groups - 1} borders"
      )
    if not (np.diff(borders) > 0).all() or np.isnan(borders).any():
      raise InputError(
        f"thresholds={borders.tolist()} do not ascend; sort them, without "
        "repeats"
      )
    groups = np.searchsorted(borders, activeness, side="right")
  else:
    # A user is in the group that holds the middle of their own weight.
    order = _most_active_first(activeness, ids)[::-1]
    weights = activeness[order] if rule == "interactions" else 1 + 0 * order
    ends = np.cumsum(weights)
    middles = (2 * ends - weights) / max(2 * ends[-1], 1)
    groups = np.empty(len(order), np.int32)
    groups[order] = np.minimum(middles * num_groups, num_groups - 1)
  sizes = np.bincount(groups, minlength=num_groups)
  if not sizes.all():
    raise InputError(
      f"rule={rule!r} leaves groups {np.flatnonzero(sizes == 0).tolist()} of "
      f"num_groups={num_groups} empty; lower num_groups or change the rule"
    )
  return groups.astype(np.int32)


def assign_segments(
  activeness: np.ndarray, ids: ArrayLike | None = None, *,
  head_share: float = 0.2,
) -> np.ndarray:
  """Splits users into tail (0) and head (1), the most active ones.

  Args:
    activeness: [U] numbers of training interactions.
    ids: as of `assign_groups`.
    head_share: The head has round(head_share * U) users, but at least one, and
      leaves at least one to the tail.

  Returns:
    [U] int32. Among equals the lower hash of the id goes first into the head.

  Raises:
    InputError: for bad activeness, fewer than two users, or a share outside
      (0, 1).
  """
  activeness = _check_activeness(activeness)
  if not 0 < head_share < 1:
    raise InputError(
      f"head_share={head_share} is no share of users; give 0 < head_share < 1"
    )
  num_users = len(activeness)
  if num_users < 2:
    raise InputError(
      f"{num_users} user cannot form a tail and a head; give at least 2"
    )
  size = min(max(round(head_share * num_users), 1), num_users - 1)
  segments = np.zeros(num_users, np.int32)
  segments[_most_active_first(activeness, ids)[:size]] = 1
  return segments


def id_hash(ids: ArrayLike) -> np.ndarray:
  """The first 8 bytes of BLAKE2b of each id's text in UTF-8; [U] uint64.

  A number has its decimal digits as text: 7 and '7' are one id.
  """
  digest = lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest()
  texts = map(str, np.asarray(ids).tolist())
  return np.frombuffer(b"".join(map(digest, texts)), ">u8").astype(np.uint64)


def prior(
  kind: str,
  groups: np.ndarray,
  activeness: np.ndarray,
  num_groups: int,
  values: Sequence[float] | None = None,
) -> np.ndarray:
  """Returns P(d): the weights over groups that the adjustment sums with.

  Args:
    kind: 'users' (share of users), 'uniform' (1/G), 'interactions' (share of
      `activeness`), or 'custom' (`values`, scaled to sum to 1).
    groups: [U] group of each user.
    activeness: [U] weight of each user for 'interactions'; pass the numbers of
      training targets to get the distribution that joint training follows.
    num_groups: G.
    values: [G] numbers >= 0, for 'custom' only.

  Returns:
    [G] float64 that sums to 1.

  Raises:
    InputError: for an unknown kind, values that do not fit, nothing to share.
  """
  if kind not in PRIORS:
    raise InputError(f"prior {kind!r} is unknown; use one of {PRIORS}")
  if (values is not None) != (kind == "custom"):
    raise InputError(
      f"prior {kind!r} with values={values!r}; give values with 'custom' and "
      "only then"
    )
  if kind == "custom":
    weights = np.asarray(values, np.float64)
    if weights.shape != (num_groups,) or not (
      np.isfinite(weights) & (weights >= 0)
    ).all():
      raise InputError(
        f"the custom prior is {weights.tolist()}; give {num_groups} finite "
        "numbers >= 0"
      )
  elif kind == "uniform":
    weights = np.ones(num_groups)
  else:
    counted = None if kind == "users" else activeness
    weights = np.bincount(groups, counted, num_groups).astype(np.float64)
  if not weights.sum() > 0:
    raise InputError(f"prior {kind!r} sums to 0; every weight is 0")
  return weights / weights.sum()


def describe(
  activeness: np.ndarray, groups: np.ndarray, segments: np.ndarray
) -> dict[str, Any]:
  """Summarises the activeness [U] of users in groups [U] and segments [U].

  The Gini coefficient is sum_i (2 i - U - 1) a_i / (U sum_i a_i) over ascending
  a_1..a_U: 0 if all users are equally active.

  Returns:
    users, interactions, min, median, mean, max, gini, head_users (share of
    users in the head), head_interactions (share of interactions there), and
    `groups`: of each its number, users, interactions, min, max.
  """
  counts = pl.col("activeness")
  total = pl.DataFrame({"activeness": activeness, "head": segments == 1})
  numbers = {
    "users": pl.len(), "interactions": counts.sum(), "min": counts.min(),
    "max": counts.max(),
  }
  all_users = total.select(
    **numbers, median=counts.median(), mean=counts.mean(),
    head_users=pl.col("head").mean(),
    head_interactions=(counts * pl.col("head")).sum()
    / pl.max_horizontal(counts.sum(), 1),
    gini=(counts.sort() * (2 * pl.int_range(1, pl.len() + 1) - pl.len() - 1))
    .sum() / pl.max_horizontal(counts.sum() * pl.len(), 1),
  )
  of_groups = total.group_by(pl.Series("group", groups)).agg(**numbers)
  return {
    **all_users.to_dicts()[0], "groups": of_groups.sort("group").to_dicts()
  }


def _check_activeness(activeness: np.ndarray) -> np.ndarray:
  activeness = np.asarray(activeness)
  if activeness.ndim != 1 or not activeness.size:
    raise InputError(
      f"activeness has shape {activeness.shape}; give one number per user"
    )
  valid = np.isfinite(activeness) & (activeness >= 0)
  if not valid.all():
    user = int(valid.argmin())
    raise InputError(
      f"activeness[{user}] = {activeness[user]}; give finite numbers >= 0"
    )
  kind = np.float64 if activeness.dtype.kind == "f" else np.int64
  return activeness.astype(kind)


def _most_active_first(
  activeness: np.ndarray, ids: ArrayLike | None
) -> np.ndarray:
  """Users by descending activeness; equals by the hash of their ids."""
  ids = np.asarray(range(len(activeness)) if ids is None else ids)
  if ids.shape != activeness.shape:
    raise InputError(
      f"ids have shape {ids.shape}, activeness {activeness.shape}; give one of "
      "each per user"
    )
  return np.lexsort((id_hash(ids), -activeness))
