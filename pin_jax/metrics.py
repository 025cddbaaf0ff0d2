"""Ranks from scores, and the ranking metrics of one relevant item.

Every metric is a function of the target's rank alone, so that evaluation has to
store nothing but ranks. A rank is 1 for the best place and may be fractional:
a target that ties with other candidates gets the average of the tied places.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pin_jax.types import InputError


def average_rank(
  scores: ArrayLike, target_index: ArrayLike, valid: ArrayLike | None = None
) -> jax.Array:
  """Rank of the target among its candidates, ties at their average.

  rank = 1 + #(scores > target) + #(other scores == target) / 2

  A score that cannot be compared never helps the target: other candidates with
  a NaN count as ahead of it, and a target with a NaN is placed last. A diverged
  model therefore scores badly rather than perfectly.

  Args:
    scores: [..., C], one score a candidate, compared in float32.
    target_index: [...], position of the target in 0..C-1.
    valid: [..., C], false for candidates that do not take part, such as padding
      or items of the history. The target always takes part.

  Returns:
    [...] float32 ranks between 1 and the number of candidates.
  """
  scores = jnp.asarray(scores, jnp.float32)
  target_index = jnp.asarray(target_index)[..., None]
  target = jnp.take_along_axis(scores, target_index, axis=-1)
  rivals = jnp.arange(scores.shape[-1]) != target_index
  if valid is not None:
    rivals &= jnp.asarray(valid, bool)
  ahead = jnp.sum(rivals & ~(scores <= target), axis=-1)
  tied = jnp.sum(rivals & (scores == target), axis=-1)
  return 1.0 + ahead + 0.5 * tied


def _checked(ranks: ArrayLike, k: float) -> np.ndarray:
  ranks = np.asarray(ranks, np.float64)
  if not np.all(ranks >= 1):
    raise InputError(
      f"ranks contain {np.min(ranks)}; pass ranks of 1 (best) and more"
    )
  if not k >= 1:
    raise InputError(f"cutoff k is {k}; pass a number of at least 1")
  return ranks


def hit_rate(ranks: ArrayLike, k: float) -> np.ndarray:
  """HR@K: 1 where rank <= K, else 0.

  Args:
    ranks: of any shape, 1 is best, fractions allowed.
    k: cutoff K.

  Returns:
    float64 values of the shape of `ranks`.

  Raises:
    InputError: if a rank or the cutoff is below 1 or NaN.
  """
  ranks = _checked(ranks, k)
  return (ranks <= k).astype(np.float64)


def ndcg(ranks: ArrayLike, k: float) -> np.ndarray:
  """NDCG@K of one relevant item: 1 / log2(1 + rank) where rank <= K, else 0.

  A tied target is discounted at its average rank. Averaging the discounts of
  the tied places instead, as scikit-learn does, gives a value that is at least
  as high where the cutoff does not bind.

  Args:
    ranks: of any shape, 1 is best, fractions allowed.
    k: cutoff K.

  Returns:
    float64 values of the shape of `ranks`.

  Raises:
    InputError: if a rank or the cutoff is below 1 or NaN.
  """
  ranks = _checked(ranks, k)
  return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def reciprocal_rank(ranks: ArrayLike, k: float = math.inf) -> np.ndarray:
  """MRR@K: 1 / rank where rank <= K, else 0.

  Args:
    ranks: of any shape, 1 is best, fractions allowed.
    k: cutoff K; infinite (no cutoff) by default.

  Returns:
    float64 values of the shape of `ranks`.

  Raises:
    InputError: if a rank or the cutoff is below 1 or NaN.
  """
  ranks = _checked(ranks, k)
  return np.where(ranks <= k, 1 / ranks, 0.0)


METRICS: Mapping[str, Callable[[ArrayLike, float], np.ndarray]] = {
  "hr": hit_rate,
  "ndcg": ndcg,
  "mrr": reciprocal_rank,
}
