"""Ranks from scores, and the ranking metrics of one relevant item.

The ranking metrics are functions of the target's rank alone, so that full
ranking has to store nothing but ranks. A rank is 1 for the best place and may
be fractional: a target that ties with other candidates gets the average of the
tied places. The metrics of sampled impressions (AUC, log loss) need the scores
of a positive and its negatives.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pin_jax.types import InputError


def average_rank(scores: ArrayLike, target_index: ArrayLike) -> jax.Array:
  """Rank of the target among its candidates, ties at their average.

  rank = 1 + #(scores > target) + #(other scores == target) / 2

  A score that cannot be compared never helps the target: other candidates with
  a NaN count as ahead of it, and a target with a NaN is placed last. A diverged
  model therefore scores badly rather than perfectly.

  Args:
    scores: [..., C], one score a candidate, compared in float32.
    target_index: [...], position of the target in 0..C-1.

  Returns:
    [...] float32 ranks between 1 and the number of candidates.
  """
  scores = jnp.asarray(scores, jnp.float32)
  target_index = jnp.asarray(target_index)[..., None]
  target = jnp.take_along_axis(scores, target_index, axis=-1)
  rivals = jnp.arange(scores.shape[-1]) != target_index
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
    k: cutoff K, at least 1.

  Returns:
    float64 values of the shape of `ranks`.

  Raises:
    InputError: if a rank or the cutoff is below 1 or NaN; so do all metrics.
  """
  ranks = _checked(ranks, k)
  return (ranks <= k).astype(np.float64)


def ndcg(ranks: ArrayLike, k: float) -> np.ndarray:
  """NDCG@K of one relevant item: 1 / log2(1 + rank) where rank <= K, else 0.

  A tied target is discounted at its average rank. Averaging the discounts of
  the tied places instead, as scikit-learn does, gives a value that is at least
  as high where the cutoff does not bind. Arguments are those of `hit_rate`.
  """
  ranks = _checked(ranks, k)
  return np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0)


def reciprocal_rank(ranks: ArrayLike, k: float = math.inf) -> np.ndarray:
  """MRR@K: 1 / rank where rank <= K, else 0; arguments as of `hit_rate`."""
  ranks = _checked(ranks, k)
  return np.where(ranks <= k, 1 / ranks, 0.0)


# name -> function of ranks and a cutoff, higher is better; one's own goes here.
METRICS: dict[str, Callable[[ArrayLike, float], np.ndarray]] = {
  "hr": hit_rate,
  "ndcg": ndcg,
  "mrr": reciprocal_rank,
}


def metric(name: str) -> Callable[[ArrayLike], np.ndarray]:
  """The function of ranks that a name means, such as 'ndcg@10' or 'mrr'.

  Raises:
    InputError: if METRICS has no such name, or the cutoff is no number >= 1.
  """
  key, at, cutoff = name.lower().partition("@")
  if key not in METRICS:
    raise InputError(
      f"metric {name!r} is unknown; give one of {[*METRICS]}, with a cutoff as "
      "in 'ndcg@10' or without"
    )
  try:
    k = float(cutoff) if at else math.inf
  except ValueError:
    k = math.nan
  _checked([], k)
  return functools.partial(METRICS[key], k=k)


def user_auc(ranks: ArrayLike, candidates: ArrayLike) -> np.ndarray:
  """AUC of one positive among its candidates: (C - rank) / (C - 1).

  The share of the negatives that score below the positive, ties half.

  Args:
    ranks: of any shape, 1 is best, ties at their average.
    candidates: C, the positive included; at least 2.

  Returns:
    float64 values of the shape of `ranks`.
  """
  ranks, candidates = _checked(ranks, 1), np.asarray(candidates, np.float64)
  return (candidates - ranks) / (candidates - 1)


def auc_components(positive: ArrayLike, negatives: ArrayLike) -> np.ndarray:
  """A value a user whose mean over users is the AUC of all impressions pooled.

  psi_u = V10(u) + mean_j V01(u, j) - AUC

  with V10(u) the share of all users' negatives below u's positive, and V01(u,
  j) the share of all users' positives above u's negative j; ties count half.
  As every user has as many impressions, the mean of psi is the AUC, and its
  spread over users is, to first order, the AUC's sampling error with users as
  clusters; so a bootstrap of the users may resample psi.

  Args:
    positive: [N] score of each user's positive; a NaN counts as -inf.
    negatives: [N, C] scores of its negatives; a NaN counts as +inf.

  Returns:
    [N] float64.

  Reference:
    DeLong et al., Biometrics 1988 (the components); Obuchowski, Biometrics
    1997 (clusters). Averaging them by user is ours.
  """
  positive = np.where(np.isnan(positive), -np.inf, positive)
  negatives = np.where(np.isnan(negatives), np.inf, negatives)
  below = _share_below(np.sort(negatives, axis=None), positive)
  above = 1 - _share_below(np.sort(positive), negatives)
  return below + above.mean(-1) - below.mean()


def _share_below(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Share of the sorted numbers below each value, equal ones half."""
  left = np.searchsorted(ordered, values, side="left")
  right = np.searchsorted(ordered, values, side="right")
  return (left + right) / (2 * len(ordered))


def log_loss(positive: ArrayLike, negatives: ArrayLike) -> np.ndarray:
  """Mean of -log P(label) over a user's impressions, P = sigmoid(logit).

  It compares models whose logits are meant as such log-odds (trained by binary
  cross-entropy), and at one ratio of negatives to positives.

  Args:
    positive: [N] logit of each user's positive.
    negatives: [N, C] logits of its negatives.

  Returns:
    [N] float64, nats.
  """
  positive, negatives = (
    np.asarray(scores, np.float64) for scores in (positive, negatives)
  )
  total = np.logaddexp(0, -positive) + np.logaddexp(0, negatives).sum(-1)
  return total / (1 + negatives.shape[-1])
