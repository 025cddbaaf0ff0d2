"""Splits: which of a user's interactions train, validate and test."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from pin_jax.data.interactions import Interactions
from pin_jax.types import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Positions within each user's history that train, validate and test.

  The history of a target is everything of that user before its position: the
  test history includes the validation target.

  Attributes:
    interactions: The users that the split keeps.
    train_end: [U] int32; a user's first train_end interactions are training.
    validation: [U] int32 position of the validation target, -1 = none.
    test: [U] int32 position of the test target, -1 = none.
    protocol: One line that every table of results prints.
    notes: users_dropped, and the numbers of targets.
  """

  interactions: Interactions
  train_end: np.ndarray
  validation: np.ndarray
  test: np.ndarray
  protocol: str
  notes: Mapping[str, int | float | str]

  @property
  def activeness(self) -> np.ndarray:
    """[U] int64 number of training interactions of each user."""
    return self.train_end.astype(np.int64)


def leave_one_out(interactions: Interactions) -> Split:
  """Tests on each user's last interaction, validates on the one before it.

  Users with fewer than three interactions are dropped.

  Raises:
    InputError: if no user has three interactions.
  """
  keep = interactions.lengths >= 3
  if not keep.any():
    raise InputError(
      f"no user of {interactions.name!r} has 3 interactions (longest: "
      f"{interactions.lengths.max()}); leave-one-out needs them, so check the "
      "user column or max_history"
    )
  lengths = interactions.lengths
  return _split(
    interactions, keep, lengths - 2, lengths - 2, lengths - 1,
    "leave-one-out: a user's last interaction is the test target, the "
    "second-last the validation target",
  )


def temporal(
  interactions: Interactions, *, validation_time: float, test_time: float
) -> Split:
  """Trains before one time, validates before another, tests from then on.

  train < validation_time <= validation target < test_time <= test target,
  where a target is the user's first interaction in its period. Users without
  training interactions are dropped; one without interactions in a period has no
  target there.

  Raises:
    InputError: if times are absent or in the wrong order, if no user has
      training interactions, or if no user has a target in one of the periods.
  """
  _check_times(interactions)
  if not -math.inf < validation_time < test_time < math.inf:
    raise InputError(
      f"validation_time={validation_time} is not before test_time={test_time}; "
      "give ascending times"
    )
  train_end = _count_before(interactions, validation_time)
  test_start = _count_before(interactions, test_time)
  keep = train_end > 0
  if not keep.any():
    raise InputError(
      f"no user of {interactions.name!r} has an interaction before "
      f"validation_time={validation_time} (earliest: "
      f"{interactions.times.min()}); give a later time"
    )
  return _split(
    interactions, keep, train_end,
    np.where(test_start > train_end, train_end, -1),
    np.where(interactions.lengths > test_start, test_start, -1),
    f"temporal: training < {validation_time} <= validation target < "
    f"{test_time} <= test target; targets are a user's first in the period",
  )


def temporal_fractions(
  interactions: Interactions, *, validation: float = 0.1, test: float = 0.1
) -> Split:
  """Calls `temporal` with times that leave about these shares of interactions.

  Interactions at equal times are never separated.

  Raises:
    InputError: for shares that are not positive or leave nothing to train on,
      and as `temporal` does.
  """
  _check_times(interactions)
  if not (validation > 0 and test > 0 and validation + test < 1):
    raise InputError(
      f"validation={validation}, test={test} are no shares; give positive "
      "numbers whose sum is below 1"
    )
  validation_time, test_time = np.quantile(
    interactions.times, [1 - validation - test, 1 - test], method="higher"
  ).tolist()
  return temporal(
    interactions, validation_time=validation_time, test_time=test_time
  )


def _check_times(interactions: Interactions) -> None:
  """Raises InputError where times are absent."""
  if interactions.times is None:
    raise InputError(
      f"{interactions.name!r} has no times, which a temporal split needs; "
      "name the time column or use leave_one_out"
    )


def _count_before(interactions: Interactions, time: float) -> np.ndarray:
  """[U] int32 numbers of interactions before a time."""
  if interactions.times.dtype.kind == "i":
    time = math.ceil(time)  # whole numbers compare exactly, floats merge some
  before = np.concatenate([[0], np.cumsum(interactions.times < time)])
  return np.diff(before[interactions.offsets]).astype(np.int32)


def _split(
  interactions: Interactions,
  keep: np.ndarray,
  train_end: np.ndarray,
  validation: np.ndarray,
  test: np.ndarray,
  protocol: str,
) -> Split:
  """The Split of the users to keep; refuses a period without any target."""
  train_end, validation, test = (
    x[keep].astype(np.int32) for x in (train_end, validation, test)
  )
  notes = {"users_dropped": int((~keep).sum())}
  for period, position in (("validation", validation), ("test", test)):
    notes[f"{period}_targets"] = int((position >= 0).sum())
    if not notes[f"{period}_targets"]:
      raise InputError(
        f"no user of {interactions.name!r} with training interactions has a "
        f"{period} target ({protocol}); move the times"
      )
  if not keep.all():
    interactions = interactions.select_users(keep)
  return Split(interactions, train_end, validation, test, protocol, notes)


def with_validation(split: Split, users: np.ndarray) -> Split:
  """The split with the validation targets of a mask of users in the prefix.

  `validation` and `test` keep their positions. A validation target follows the
  prefix directly, so that the longer prefix has no gap.
  """
  grown = np.asarray(users, bool) & (split.validation >= 0)
  return dataclasses.replace(
    split, train_end=split.train_end + grown.astype(np.int32)
  )


def is_training(split: Split, *, skip: int = 0) -> np.ndarray:
  """[N] bool, the training prefixes; `skip` leaves out their first items."""
  data = split.interactions
  positions = np.arange(data.num_interactions)
  positions -= np.repeat(data.offsets[:-1], data.lengths)
  ends = np.repeat(split.train_end, data.lengths)
  return (positions >= skip) & (positions < ends)


def training_counts(split: Split) -> np.ndarray:
  """[V+1] float64, how often each item occurs in the training interactions."""
  data = split.interactions
  return np.bincount(data.items, is_training(split), data.num_items + 1)
