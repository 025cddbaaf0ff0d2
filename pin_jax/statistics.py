"""Bootstrap intervals over users: of a mean, and of a relative change.

Users are the resampling unit, because the behaviours of one user (and the
results of one user under several seeds) are not independent. The intervals
speak of the users that might have been sampled; they do not cover the spread
over training seeds.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from pin_jax.types import InputError

_BATCH_ELEMENTS = 2**21


class MeanInterval(NamedTuple):
  """A mean over users with its interval; each field has shape [...]."""

  estimate: np.ndarray
  low: np.ndarray
  high: np.ndarray


class RelativeChange(NamedTuple):
  """mean(other) / mean(base) - 1 with its interval; each of shape [...]."""

  estimate: np.ndarray
  low: np.ndarray
  high: np.ndarray


def average_within_users(
  values: ArrayLike, users: ArrayLike | None
) -> np.ndarray:
  """Averages the rows of each user: [..., N] -> [..., U].

  Args:
    values: [..., N], one value a row.
    users: [N], the user of each row; None if every row is a user of its own.

  Returns:
    [..., U] float64, in the order of the sorted user ids.

  Raises:
    InputError: if `users` has another length than `values`.
  """
  values = np.asarray(values, np.float64)
  if users is None:
    return values
  users = np.asarray(users)
  if users.shape != values.shape[-1:]:
    raise InputError(
      f"users has shape {users.shape} but values {values.shape}; "
      "pass one user id for each entry of the last axis"
    )
  _, index, counts = np.unique(users, return_inverse=True, return_counts=True)
  order = np.argsort(index, kind="stable")
  starts = np.cumsum(counts) - counts
  if not counts.size:
    return values
  return np.add.reduceat(values[..., order], starts, axis=-1) / counts


def _percentiles(
  values: np.ndarray,
  statistic: Callable[[np.ndarray], np.ndarray],
  *,
  confidence: float,
  num_resamples: int,
  seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Percentile interval of a statistic of resampled means.

  What scipy resamples are the users' indices, once for all series, so that the
  series stay paired. A resample enters as the number of times it draws each
  user, which turns its means into one matrix product.

  Args:
    values: [U, M], M series of values.
    statistic: function of the means, [M, R] -> [..., R].
    confidence: coverage of the interval.
    num_resamples: R, over all batches.
    seed: of the resampling.

  Returns:
    Lower and upper end, each [...]; NaN where a resample is undefined.
  """
  num_users = len(values)

  def resampled(indices: np.ndarray, axis: int = -1) -> np.ndarray:
    del axis  # Always the last one.
    draws = [np.bincount(row, minlength=num_users) for row in indices]
    means = np.asarray(draws, np.float64) @ values / num_users
    return statistic(means.T)

  with warnings.catch_warnings(), np.errstate(all="ignore"):
    warnings.simplefilter("ignore")
    interval = scipy.stats.bootstrap(
      (np.arange(num_users),),
      resampled,
      n_resamples=num_resamples,
      batch=max(1, _BATCH_ELEMENTS // num_users),
      vectorized=True,
      axis=-1,
      confidence_level=confidence,
      method="percentile",
      rng=np.random.default_rng(seed),
    ).confidence_interval
  return np.asarray(interval.low), np.asarray(interval.high)


def _check_options(confidence: float, num_resamples: int) -> None:
  if not 0 < confidence < 1:
    raise InputError(
      f"confidence is {confidence}; pass a share between 0 and 1, as .95"
    )
  if num_resamples < 1:
    raise InputError(f"num_resamples is {num_resamples}; pass at least 1")


def mean_interval(
  values: ArrayLike,
  *,
  users: ArrayLike | None = None,
  confidence: float = 0.95,
  num_resamples: int = 2000,
  seed: int = 0,
) -> MeanInterval:
  """Mean over users with a percentile bootstrap interval.

  Args:
    values: [..., N], one value a row.
    users: [N], the user of each row. Rows of one user (several seeds) are
      averaged first. None: every row is a user of its own.
    confidence: coverage of the interval.
    num_resamples: number of bootstrap resamples of the users.
    seed: of the resampling.

  Returns:
    Estimate and interval, each [...]. The interval is NaN for fewer than two
    users.

  Raises:
    InputError: if shapes differ or an option is out of range.
  """
  _check_options(confidence, num_resamples)
  values = average_within_users(values, users)
  shape, num_users = values.shape[:-1], values.shape[-1]
  estimate = values.mean(-1) if num_users else np.full(shape, np.nan)
  if num_users < 2:
    return MeanInterval(estimate, *np.full((2, *shape), np.nan))
  low, high = _percentiles(
    values.reshape(-1, num_users).T,
    lambda means: means,
    confidence=confidence,
    num_resamples=num_resamples,
    seed=seed,
  )
  return MeanInterval(estimate, low.reshape(shape), high.reshape(shape))


def _ratio(base: np.ndarray, other: np.ndarray) -> np.ndarray:
  with np.errstate(all="ignore"):
    return np.where(base == 0, np.nan, other / base - 1)


def relative_change(
  base: ArrayLike,
  other: ArrayLike,
  *,
  users: ArrayLike | None = None,
  confidence: float = 0.95,
  num_resamples: int = 2000,
  seed: int = 0,
) -> RelativeChange:
  """Relative change of a mean, with a paired percentile bootstrap interval.

  change = mean(other) / mean(base) - 1

  A resample draws users with replacement and takes both models' values of
  each. All leading axes share their resamples.

  Args:
    base: [..., N], one value a row.
    other: [..., N], the same rows under the other model.
    users: [N], the user of each row. Rows of one user (several seeds) are
      averaged first. None: every row is a user of its own.
    confidence: coverage of the interval.
    num_resamples: number of bootstrap resamples of the users.
    seed: of the resampling.

  Returns:
    Estimate and interval as fractions (.1 is +10 %), each [...]. The interval
    is NaN for fewer than two users, and where the base mean is zero in a
    resample, so that the ratio has no bound; the estimate is NaN where the base
    mean itself is zero.

  Raises:
    InputError: if shapes differ or an option is out of range.
  """
  _check_options(confidence, num_resamples)
  base, other = np.asarray(base), np.asarray(other)
  if base.shape != other.shape:
    raise InputError(
      f"base has shape {base.shape} but other {other.shape}; "
      "pass the same rows of both models"
    )
  pair = average_within_users(np.stack([base, other]), users)
  shape, num_users = pair.shape[1:-1], pair.shape[-1]
  if num_users < 1:
    return RelativeChange(*np.full((3, *shape), np.nan))
  estimate = _ratio(*pair.mean(-1))
  if num_users < 2:
    return RelativeChange(estimate, *np.full((2, *shape), np.nan))
  low, high = _percentiles(
    pair.reshape(-1, num_users).T,
    lambda means: _ratio(*np.split(means, 2)),
    confidence=confidence,
    num_resamples=num_resamples,
    seed=seed,
  )
  return RelativeChange(estimate, low.reshape(shape), high.reshape(shape))
