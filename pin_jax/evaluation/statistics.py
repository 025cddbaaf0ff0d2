"""What may be claimed of users and seeds: intervals and tests.

Users and training seeds are resampled, each as a whole (crossed): the
behaviours of one user are not independent, nor are the results of one trained
model. All models share the draws, so that comparisons are paired.

Crossing is on the safe side where a user's result varies from seed to seed for
its own sake: that part of the variance counts up to three times. It is not
where the seeds' means themselves differ and there are few: were they all the
spread there is, a 95 % interval would cover 75 % at three seeds and 84 % at
five. Give several seeds, and look at each seed's own result. With one seed
nothing is known of the spread over seeds, and the intervals leave it out.

Reference:
  McCullagh, Bernoulli 2000 (resampling dyadic arrays); Owen, Annals of Applied
  Statistics 2007 (the pigeonhole bootstrap, its bias).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pin_jax.types import InputError

_BATCH_ELEMENTS = 2**21


class Interval(NamedTuple):
  """An estimate with its interval; each field has shape [...]."""

  estimate: np.ndarray
  low: np.ndarray
  high: np.ndarray


class Change(NamedTuple):
  """A relative change with its interval and test; each of shape [...].

  Attributes:
    estimate: mean(other) / mean(base) - 1, a fraction.
    low: lower end of the interval.
    high: upper end.
    p_value: of the hypothesis that the change is at most -margin.
    p_harm: of the hypothesis that it is at least -margin.
  """

  estimate: np.ndarray
  low: np.ndarray
  high: np.ndarray
  p_value: np.ndarray
  p_harm: np.ndarray


class Bootstrap(NamedTuple):
  """How users and seeds are resampled.

  Attributes:
    confidence: coverage of the percentile interval.
    num_resamples: R.
    seed: of the draws.
  """

  confidence: float = 0.95
  num_resamples: int = 2000
  seed: int = 0


_DEFAULT = Bootstrap()


def by_seed(
  values: ArrayLike, users: ArrayLike, seeds: ArrayLike
) -> np.ndarray:
  """Lays rows out by seed and user: [..., N] -> [..., S, U].

  Args:
    values: [..., N], one value a row.
    users: [N], the user of each row.
    seeds: [N], the seed of each row.

  Returns:
    [..., S, U] float64, in the order of the sorted seeds and user ids.

  Raises:
    InputError: if lengths differ, or a user and seed have not just one row.
  """
  values = np.asarray(values, np.float64)
  users, seeds = np.asarray(users), np.asarray(seeds)
  if not users.shape == seeds.shape == values.shape[-1:]:
    raise InputError(
      f"users has shape {users.shape}, seeds {seeds.shape} but values "
      f"{values.shape}; pass one user id and one seed for each entry of the "
      "last axis"
    )
  names, column = np.unique(users, return_inverse=True)
  kinds, row = np.unique(seeds, return_inverse=True)
  place = row * len(names) + column
  if not np.array_equal(np.sort(place), np.arange(len(kinds) * len(names))):
    raise InputError(
      f"{len(place)} rows of {len(names)} users and {len(kinds)} seeds; "
      "pass one row for every user under every seed"
    )
  shape = values.shape[:-1] + (len(kinds), len(names))
  return values[..., np.argsort(place)].reshape(shape)


def _resample(
  parts: Sequence[ArrayLike],
  statistic: Callable[[np.ndarray], np.ndarray],
  bootstrap: Bootstrap,
) -> tuple[Interval, np.ndarray]:
  """A statistic of the means of K parts [..., S, U_k], and its sorted draws.

  A resample draws each part's users and the seeds, once for all series, which
  so stay paired; how often it draws each makes its means matrix products.
  """
  confidence, num_resamples, seed = bootstrap
  parts = [np.atleast_2d(np.asarray(part, np.float64)) for part in parts]
  *shape, num_seeds, _ = parts[0].shape
  sizes = [part.shape[-1] for part in parts]
  means = np.full((num_resamples, len(parts), math.prod(shape)), np.nan)
  rng = np.random.default_rng(seed)
  most = max(1, _BATCH_ELEMENTS // max(*sizes, 1))
  for start in range(0, num_resamples if min(sizes) > 1 else 0, most):
    count = min(most, num_resamples - start)
    drawn = [_counts(rng, count, n) for n in sizes]
    seeds = np.ones((count, 1))
    if num_seeds > 1:
      seeds = _counts(rng, count, num_seeds)
    for k, (users, part) in enumerate(zip(drawn, parts, strict=True)):
      values = part.reshape(-1, sizes[k]).T
      own = (users @ values / sizes[k]).reshape(count, -1, num_seeds)
      means[start : start + count, k] = np.einsum(
        "rms,rs->rm", own, seeds
      ) / num_seeds
  means = np.moveaxis(means, 0, -1).reshape(len(parts), *shape, num_resamples)
  draws = np.sort(statistic(means), -1)
  unknown = np.isnan(draws[..., -1])  # NaN is last
  # 1 - confidence as one writes it: .05, not .05000000000000004.
  level = round(1 - confidence, 12)
  outside = (_p_of(np.arange(num_resamples), num_resamples) < level).sum()
  ends = np.full((2, *unknown.shape), np.nan)
  if outside:
    ends = draws[..., outside - 1], draws[..., num_resamples - outside]
  estimate = statistic(np.stack([_mean(part) for part in parts]))
  low, high = (np.where(unknown, np.nan, end) for end in ends)
  return Interval(estimate, low, high), draws


def _p_of(count: ArrayLike, num_resamples: int) -> np.ndarray:
  """p = 2 (1 + count) / (R + 1), at most 1; of the draws beyond a border."""
  return np.minimum(1, 2 * (1 + np.asarray(count)) / (num_resamples + 1))


def _counts(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
  """How often each of `size` units is drawn, [rows, size]."""
  drawn = rng.integers(0, size, (rows, size))
  return np.asarray(
    [np.bincount(row, minlength=size) for row in drawn], np.float64
  )


def _mean(cube: np.ndarray) -> np.ndarray:
  shape = cube.shape[:-2]
  return cube.mean((-2, -1)) if cube.size else np.full(shape, np.nan)


def mean_interval(
  values: ArrayLike, bootstrap: Bootstrap = _DEFAULT
) -> Interval:
  """Mean over users and seeds with a percentile bootstrap interval.

  Args:
    values: [..., S, U], see `by_seed`; or [U], of one seed.
    bootstrap: how it is resampled.

  Returns:
    Estimate and interval, each [...]. The interval is NaN for fewer than two
    users.
  """
  return _resample([values], lambda means: means[0], bootstrap)[0]


def _ratio(base: np.ndarray, other: np.ndarray) -> np.ndarray:
  with np.errstate(all="ignore"):
    return np.where(base == 0, np.nan, other / base - 1).round(12)


def relative_change(
  base: ArrayLike,
  other: ArrayLike,
  *,
  margin: float = 0.0,
  bootstrap: Bootstrap = _DEFAULT,
) -> Change:
  """Relative change of a mean: paired interval, and a one-sided test.

  change = mean(other) / mean(base) - 1,  H0: change <= -margin

  With margin 0 the test is of superiority, with a positive one of
  non-inferiority. With d the resampled changes,

    p = 2 (1 + #{d <= -margin}) / (R + 1),  p_harm = 2 (1 + #{d >= -margin}) /
    (R + 1),  at most 1;  low = d_(j), high = d_(R + 1 - j) of the ordered d,
    j the number of counts k with 2 (1 + k) / (R + 1) < 1 - confidence

  Both tests are one-sided at half the level, and p < .05 if and only if the
  95 % interval lies above -margin, p_harm < .05 if and only if below. A
  resample takes both models' values of each drawn user and seed. All leading
  axes share their resamples. Changes are rounded to 1e-12.

  Args:
    base: [..., S, U], see `by_seed`; or [U], of one seed.
    other: of the same shape, the same users and seeds under the other model.
    margin: the relative loss that still counts as no worse.
    bootstrap: how it is resampled.

  Returns:
    Fractions (.1 is +10 %) and p-values, each [...]. Interval and p-values are
    NaN for fewer than two users, and where the base mean is zero in a resample,
    so that the ratio has no bound; all are NaN where the base mean is zero. The
    interval is NaN where resamples are too few for the confidence, below 40 for
    95 %.

  Reference:
    Piaggio et al., JAMA 2012 (non-inferiority by the interval's lower end).
  """
  change, draws = _resample(
    [np.stack([np.atleast_2d(base), np.atleast_2d(other)])],
    lambda means: _ratio(*means[0]), bootstrap,
  )
  border, unknown = round(-margin, 12), np.isnan(draws[..., -1])
  p_values = (
    np.where(unknown, np.nan, _p_of(beyond.sum(-1), bootstrap.num_resamples))
    for beyond in (draws <= border, draws >= border)
  )
  return Change(*change, *p_values)


def gap(
  head: ArrayLike, tail: ArrayLike, bootstrap: Bootstrap = _DEFAULT
) -> Interval:
  """Signed gap mean(head) - mean(tail): positive where the tail is worse off.

  The two segments' users are resampled apart, the seeds together.

  Args:
    head: [..., S, U_head], see `by_seed`.
    tail: [..., S, U_tail].
    bootstrap: how they are resampled.

  Returns:
    Estimate and percentile interval, each [...]; the interval is NaN for fewer
    than two users in a segment.
  """
  difference = lambda means: means[0] - means[1]
  return _resample([head, tail], difference, bootstrap)[0]


def holm(p_values: ArrayLike) -> np.ndarray:
  """Holm's adjusted p-values: below alpha with family-wise error alpha.

  p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)),  p_(1) <= ... <= p_(m)

  Args:
    p_values: [m], one a hypothesis; NaN stands for a test that could not be
      made: it stays NaN and counts towards m.

  Returns:
    [m] adjusted p-values.

  Reference:
    Holm, Scandinavian Journal of Statistics 1979.
  """
  p_values = np.asarray(p_values, np.float64)
  order = np.argsort(p_values, kind="stable")  # NaN last
  scaled = p_values[order] * (len(order) - np.arange(len(order)))
  adjusted = np.empty_like(p_values)
  adjusted[order] = np.minimum(1, np.maximum.accumulate(scaled))
  return adjusted
