"""Propensities and importance weights against enumeration and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from pin_jax.data import batches, simulator, splits
from pin_jax.training import loop, propensity
from pin_jax.training.optimizers import make_optimizer
from pin_jax.training.steps import Operands, init_state
from pin_jax.types import Backbone, Batch

NUM_ITEMS = 6
NUM_GROUPS = 3
WORLD = simulator.make_world(simulator.WorldSpec(
  num_items=NUM_ITEMS, borders=(5, 8, 20, 61), confounding=0.9,
  rank=4, prior_decay=0.5,
), seed=9)


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


def random_classifier(width, hidden=5):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(
    lambda: propensity.init_classifier(
      jax.random.key(0), width, NUM_GROUPS, hidden=hidden
    )
  )
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
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


def event_distribution():
  """(shares [G] of training events, P(x|d) [G, V], P(x) [V])."""
  lengths = np.arange(WORLD.length_pmf.shape[1])
  per_user = (WORLD.length_pmf * np.maximum(lengths - 3, 0)).sum(1)
  shares = WORLD.prior * per_user / (WORLD.prior * per_user).sum()
  return shares, WORLD.initial, shares @ WORLD.initial


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


def test_exact_weights_have_mean_one_and_adjust():
  """Enumerates every x: sum_x P(x|d) w_d(x) = 1, and P(x|d) w_d(x) = P(x)."""
  shares, given_group, p_x = event_distribution()
  posterior = (shares[:, None] * given_group / p_x).T  # [V, G]
  np.testing.assert_allclose(
    posterior,
    simulator.stratum_posterior(
      WORLD, jnp.arange(1, NUM_ITEMS + 1)[:, None], event="training"
    ),
    rtol=1e-4,
  )
  logs = np.broadcast_to(np.log(posterior), (NUM_GROUPS, *posterior.shape))
  weights = propensity.stabilised_weights(
    jnp.asarray(logs, jnp.float32), jnp.asarray(shares, jnp.float32), np.inf
  )
  np.testing.assert_allclose((given_group * weights).sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(
    given_group * weights, np.broadcast_to(p_x, weights.shape), rtol=1e-5
  )
  assert weights.max() > 2 > 1 > weights.min()


# The classifier.


def test_classifier_starts_ignorant():
  params = propensity.init_classifier(jax.random.key(0), 7, NUM_GROUPS)
  assert params["w1"].shape == (7, 64)
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


def test_classifier_recovers_the_known_posterior():
  """P(d|x) of training events, in a world that knows it; the rest is frozen."""
  data, strata = simulator.simulate(WORLD, num_users=20_000, seed=1)
  split = splits.leave_one_out(data)
  targets = batches.training_targets(split)
  pool = batches.make_pool(
    targets, np.zeros_like(strata), num_groups=1, length=1
  )
  backbone = last_item()
  table = {"table": jnp.eye(NUM_ITEMS + 1)}
  before = np.array(table["table"])
  optimizer = make_optimizer(300, learning_rate=0.02)
  step = propensity.classifier_step(backbone, optimizer, batches.Draw(1024, 1))
  params = propensity.init_classifier(
    jax.random.key(1), NUM_ITEMS + 1, NUM_GROUPS, hidden=16
  )
  operands = Operands(
    jax.random.key(0), batches.make_sequences(split), pool,
    {"backbone": table, "groups": jnp.asarray(strata)},
  )
  _, steps, result = loop.run(
    step, init_state(params, optimizer), operands,
    loop.Plan(300, 300, dispatch=300),
  )
  np.testing.assert_array_equal(operands.frozen["backbone"]["table"], before)
  assert jax.tree.structure(result.best) == jax.tree.structure(params)

  shares, given_group, p_x = event_distribution()
  posterior = (shares[:, None] * given_group / p_x).T
  fitted = propensity.log_propensity(
    backbone, table, result.best, jnp.arange(1, NUM_ITEMS + 1)[:, None]
  )[:, 0]
  apart = p_x @ (posterior * (np.log(posterior) - fitted)).sum(-1)
  ignorance = p_x @ (posterior * np.log(posterior / shares)).sum(-1)
  print(f"KL {apart:.5f} of {ignorance:.5f}")
  assert apart < 0.002 < 0.1 * ignorance
  loss = steps.logs["loss"][:, 0]
  entropy = -p_x @ (posterior * np.log(posterior)).sum(-1)
  np.testing.assert_allclose(loss[0], np.log(NUM_GROUPS), rtol=1e-5)
  np.testing.assert_allclose(loss[-100:].mean(), entropy, rtol=0.02)
