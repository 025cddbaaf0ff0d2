"""Metrics against scipy, scikit-learn and values that a hand can check."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics

from pin_jax.evaluation import metrics
from pin_jax.types import InputError


def _tied_scores(seed=0, shape=(4, 6, 30)):
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, 8, shape).astype(np.float32)
  targets = rng.integers(0, shape[-1], shape[:-1])
  return scores, targets


def test_average_rank_equals_scipy():
  scores, targets = _tied_scores()
  got = jax.jit(metrics.average_rank)(scores, targets)
  every = scipy.stats.rankdata(-scores, method="average", axis=-1)
  want = np.take_along_axis(every, targets[..., None], -1)[..., 0]
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ("scores", "rank"),
  [
    ([math.nan, 1, 2, 3], 4),
    ([2.5, 1, math.nan, 3], 3),
    ([-math.inf, -math.inf, 0, 1], 3.5),
    ([math.inf, 1, 2, 3], 1),
    ([0] * 101, (1 + 101) / 2),
  ],
)
def test_average_rank_of_scores_that_are_not_finite(scores, rank):
  assert metrics.average_rank(jnp.array(scores), 0) == rank


@pytest.mark.parametrize("k", [1, 5, 10, 30])
def test_mean_ndcg_of_the_tied_places_equals_sklearn(k):
  scores, targets = _tied_scores(5)
  for row, target in zip(scores.reshape(-1, 30), targets.ravel(), strict=True):
    rank = metrics.average_rank(row, target)
    tied = np.sum(row == row[target])
    places = rank - (tied - 1) / 2 + np.arange(tied)
    want = sklearn.metrics.ndcg_score([np.arange(30) == target], [row], k=k)
    assert metrics.ndcg(places, k).mean() == pytest.approx(want, abs=1e-12)
    if k == 30:
      assert metrics.ndcg(rank, k) <= want + 1e-12


def test_values_at_the_cutoff():
  ranks = [1, 2, 2.5, 10, 10.5, 11]
  np.testing.assert_array_equal(metrics.hit_rate(ranks, 10), [1, 1, 1, 1, 0, 0])
  np.testing.assert_allclose(
    metrics.ndcg(ranks, 10),
    [1, 1 / math.log2(3), 1 / math.log2(3.5), 1 / math.log2(11), 0, 0],
  )
  np.testing.assert_allclose(
    metrics.reciprocal_rank(ranks, 10), [1, 1 / 2, 1 / 2.5, 1 / 10, 0, 0]
  )
  np.testing.assert_allclose(
    metrics.reciprocal_rank(ranks), [1 / rank for rank in ranks]
  )


@pytest.mark.parametrize("metric", metrics.METRICS.values())
def test_metrics_keep_the_shape_and_never_rise_with_the_rank(metric):
  ranks = np.linspace(1, 40, 79).reshape(1, 79)
  values = metric(ranks, 20)
  assert values.shape == ranks.shape
  assert values.dtype == np.float64
  assert np.all(np.diff(values) <= 0)
  assert metric(np.zeros((0, 3)) + 1, 5).shape == (0, 3)


def test_a_metric_by_its_name():
  ranks = np.array([1, 4.5, 10, 11])
  for name, want in (
    ("NDCG@10", metrics.ndcg(ranks, 10)), ("hr@4.5", [1, 1, 0, 0]),
    ("mrr", 1 / ranks), ("mrr@10", 1 / ranks * (ranks <= 10)),
  ):
    np.testing.assert_array_equal(metrics.metric(name)(ranks), want)
  for name, message in (
    ("recall@5", "'recall@5' is unknown; give one of .'hr'"),
    ("hr@0", "cutoff k is 0"), ("hr@ten", "cutoff k is nan"),
    ("hr@", "cutoff k is nan"),
  ):
    with pytest.raises(InputError, match=message):
      metrics.metric(name)


# Metrics of sampled impressions.


def _impressions(seed=0, users=40, negatives=7):
  """Scores with ties, and labels of the flat list."""
  rng = np.random.default_rng(seed)
  positive = rng.integers(0, 9, users) / 2 + 0.5
  scores = rng.integers(0, 9, (users, negatives)) / 2
  labels = np.concatenate([np.ones(users), np.zeros(users * negatives)])
  return positive, scores, labels


def test_user_auc_equals_scikit_learn():
  positive, negatives, _ = _impressions()
  every = np.concatenate([positive[:, None], negatives], axis=1)
  ranks = metrics.average_rank(every, np.zeros(len(every), int))
  got = metrics.user_auc(ranks, every.shape[1])
  want = [sklearn.metrics.roc_auc_score([1] + [0] * 7, row) for row in every]
  np.testing.assert_allclose(got, want, atol=1e-12)
  assert metrics.user_auc(1, 100) == 1 and metrics.user_auc(100, 100) == 0
  assert metrics.user_auc(50.5, 100) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_mean_of_the_components_is_the_pooled_auc(seed):
  positive, negatives, labels = _impressions(seed)
  scores = np.concatenate([positive, negatives.ravel()])
  want = sklearn.metrics.roc_auc_score(labels, scores)
  got = metrics.auc_components(positive, negatives)
  assert got.shape == positive.shape
  assert got.mean() == pytest.approx(want, abs=1e-12)


def test_spread_of_the_components_is_the_sampling_error_of_the_auc():
  """Users as clusters: against the AUC of freshly drawn sets of users."""
  rng = np.random.default_rng(0)

  def draw(users):
    own = rng.normal(size=(users, 1))  # shared by a user's impressions
    scores = own + rng.normal(size=(users, 6))
    return metrics.auc_components(scores[:, 0] + 1, scores[:, 1:])

  means = [draw(150).mean() for _ in range(1500)]
  predicted = np.mean([draw(150).std() for _ in range(50)]) / math.sqrt(150)
  assert np.std(means) == pytest.approx(predicted, rel=0.1)


def test_scores_of_nan_never_help_the_auc():
  positive, negatives, _ = _impressions()
  whole = metrics.auc_components(positive, negatives).mean()
  positive[3], negatives[5, 2] = np.nan, np.nan
  assert metrics.auc_components(positive, negatives).mean() < whole
  nothing = np.full_like(negatives, np.nan)
  assert metrics.auc_components(positive * np.nan, nothing).mean() == 0


def test_log_loss_equals_scikit_learn():
  positive, negatives, labels = _impressions()
  got = metrics.log_loss(positive, negatives)
  logits = np.concatenate([positive, negatives.ravel()])
  want = sklearn.metrics.log_loss(labels, scipy.special.expit(logits))
  assert got.shape == positive.shape
  assert got.mean() == pytest.approx(want, rel=1e-12)
  assert np.isfinite(metrics.log_loss([-1e5], [[1e5]])).all()
