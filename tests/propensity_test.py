"""Propensities and importance weights against enumeration and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from toys import noisy

from pin_jax.training import propensity
from pin_jax.types import Backbone, Batch

NUM_ITEMS = 6
NUM_GROUPS = 3


def last_item(width=NUM_ITEMS + 1):
  """A backbone whose representation is a row of its table for the last item."""

  def encode(params, history, key=None):
    assert key is None  # a frozen model is read without dropout
    return history

  return Backbone(
    init=lambda key: {"table": jax.random.normal(key, (NUM_ITEMS + 1, width))},
    encode=encode,
    at=lambda context, rows, columns: context[rows, columns],
    represent=lambda params, states, candidates: params["table"][states][
      :, None
    ],
    score=None,
  )


def random_classifier(width):
  return noisy(
    lambda key: propensity.init_classifier(key, width, NUM_GROUPS), scale=1
  )


def numpy_log_propensity(table, params, history):
  """Two-layer network on the row of every position's item; [B, L, G]."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  out = np.zeros((*history.shape, NUM_GROUPS))
  for b, t in np.ndindex(history.shape):
    h = np.asarray(table, np.float64)[history[b, t]] @ p["w1"] + p["b1"]
    inner = np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)
    logits = h / 2 * (1 + np.tanh(inner)) @ p["w2"] + p["b2"]
    out[b, t] = logits - special.logsumexp(logits)
  return out


def some_windows(seed=0):
  rng = np.random.default_rng(seed)
  history = rng.integers(1, NUM_ITEMS + 1, (4, 3))
  targets = rng.integers(1, NUM_ITEMS + 1, (4, 3))
  history[0, :2] = targets[0, :2] = 0
  history[3] = targets[3] = 0
  return Batch(np.array([2, 0, 1, 2]), history, targets)


# Weights.


def test_stabilised_weights_by_formula():
  rng = np.random.default_rng(0)
  log_probability = np.log(rng.dirichlet(np.ones(3), size=(3, 4, 2)))
  shares = np.array([0.2, 0.3, 0.5])
  got = propensity.stabilised_weights(
    jnp.asarray(log_probability, jnp.float32), jnp.asarray(shares, jnp.float32),
    1.5,
  )
  assert got.shape == (3, 4, 2)
  for g, b, t in np.ndindex(got.shape):
    exact = shares[g] / np.exp(log_probability[g, b, t, g])
    np.testing.assert_allclose(got[g, b, t], min(exact, 1.5), rtol=1e-5)
  assert (got == 1.5).any()
  assert (got < 1.5).any()


def test_weights_of_impossible_examples_are_clipped_not_infinite():
  impossible = jnp.array([[[-jnp.inf, 0.0]], [[-200.0, 0.0]]])
  got = propensity.stabilised_weights(impossible, jnp.array([0.5, 0.5]), 7.0)
  np.testing.assert_array_equal(got, [[7.0], [0.5]])


# The classifier.


def test_classifier_starts_ignorant():
  params = propensity.init_classifier(jax.random.key(0), 7, NUM_GROUPS)
  backbone = last_item()
  got = propensity.log_propensity(
    backbone, backbone.init(jax.random.key(1)), params,
    jnp.asarray(some_windows().history),
  )
  np.testing.assert_allclose(got, -np.log(NUM_GROUPS), rtol=1e-6)


@pytest.mark.parametrize("width", [1, 4])
def test_log_propensity_against_numpy(width):
  backbone, params = last_item(width), random_classifier(width)
  frozen = backbone.init(jax.random.key(1))
  history = some_windows().history
  got = propensity.log_propensity(
    backbone, frozen, params, jnp.asarray(history)
  )
  assert got.shape == (4, 3, NUM_GROUPS)
  np.testing.assert_allclose(
    got, numpy_log_propensity(frozen["table"], params, history),
    rtol=1e-4, atol=1e-4,
  )
  np.testing.assert_allclose(np.exp(got).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("mean", ["interactions", "users"])
def test_log_likelihood_against_numpy(mean):
  backbone, params = last_item(4), random_classifier(4)
  frozen = backbone.init(jax.random.key(1))
  batch, groups = some_windows(), np.array([1, 0, 2])
  logs = numpy_log_propensity(frozen["table"], params, batch.history)
  label = groups[batch.users]
  rows = [
    [logs[b, t, label[b]] for t in range(3) if batch.targets[b, t] > 0]
    for b in range(4)
  ]
  count = np.array([len(row) for row in rows])
  assert count.tolist() == [1, 3, 3, 0]
  counted = count if mean == "interactions" else count > 0
  want = sum(np.mean(r) * n for r, n in zip(rows, counted, strict=True) if r)
  run = lambda batch: propensity.log_likelihood(
    backbone, frozen, params, jax.tree.map(jnp.asarray, batch),
    jnp.asarray(groups), mean,
  )
  np.testing.assert_allclose(run(batch), want / counted.sum(), rtol=1e-4)
  assert run(batch._replace(targets=0 * batch.targets)) == 0


def test_fitted_importance_weighs_each_group_by_its_own_propensity():
  backbone, params = last_item(4), random_classifier(4)
  table = backbone.init(jax.random.key(1))
  windows = [some_windows(seed) for seed in range(NUM_GROUPS)]
  by_field = zip(*(window[:3] for window in windows), strict=True)
  batch = Batch(*(jnp.asarray(np.stack(x)) for x in by_field))
  shares = np.array([0.2, 0.3, 0.5])
  frozen = {
    "backbone": table, "classifier": params,
    "shares": jnp.asarray(shares, jnp.float32),
  }
  got = propensity.fitted_importance(backbone, clip=3.0)(frozen, batch)
  assert got.shape == (NUM_GROUPS, 4, 3)
  for g, window in enumerate(windows):
    logs = numpy_log_propensity(table["table"], params, window.history)
    np.testing.assert_allclose(
      got[g], np.minimum(shares[g] / np.exp(logs[..., g]), 3.0),
      rtol=1e-3,
    )
