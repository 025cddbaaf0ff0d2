"""Losses against scipy and against the plain, unchunked formula."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from pin_jax.training.losses import (
  bayesian_personalized_ranking,
  binary_cross_entropy,
  focal,
  gbce_power,
  sampled_softmax,
  softmax_cross_entropy,
)
from pin_jax.types import InputError


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_cross_entropy_of_the_candidates_that_take_part_equals_scipy(share):
  rng = np.random.default_rng(1)
  logits = 9 * rng.normal(size=(2, 4, 8)).astype(np.float32)
  target = rng.integers(0, 8, (2, 4))
  where = rng.random((2, 4, 8)) < share
  np.put_along_axis(where, target[..., None], True, -1)
  got = softmax_cross_entropy(logits, target, where if share < 1 else None)
  assert got.shape == (2, 4)
  for i in np.ndindex(2, 4):
    kept = logits[i][where[i]].astype(np.float64)
    want = scipy.special.logsumexp(kept) - logits[i][target[i]]
    np.testing.assert_allclose(got[i], want, rtol=1e-6, atol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
  logits = jnp.asarray([500.0, 500.0, -500.0])
  np.testing.assert_allclose(
    softmax_cross_entropy(logits, jnp.asarray(1)), math.log(2), atol=1e-4
  )


@pytest.mark.parametrize("focusing", [0.0, 0.5, 2.0])
def test_focal_loss_and_its_slope_equal_the_formula(focusing):
  p = np.asarray([1e-6, 0.1, 0.5, 0.9, 0.999])
  loss = jnp.asarray(-np.log(p), jnp.float32)
  got = focal(loss, focusing)
  np.testing.assert_allclose(got, -((1 - p) ** focusing) * np.log(p), rtol=2e-4)
  step = 1e-5
  value = lambda p: -((1 - p) ** focusing) * np.log(p)
  by_p = (value(p * (1 + step)) - value(p * (1 - step))) / (2 * step)
  slopes = jax.vmap(jax.grad(lambda x: focal(x, focusing)))(loss)
  np.testing.assert_allclose(slopes, -by_p, rtol=1e-3)  # d loss = -dp / p


def test_focal_loss_of_a_sure_hit_has_a_finite_slope():
  slope = jax.grad(lambda x: focal(x, 0.5))(jnp.float32(0))
  assert np.isfinite(slope)


def test_cross_entropy_accumulates_bfloat16_in_float32():
  logits = jnp.linspace(-3, 3, 4001).astype(jnp.bfloat16)
  got = softmax_cross_entropy(logits, jnp.asarray(17))
  wide = np.asarray(logits, np.float64)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, scipy.special.logsumexp(wide) - wide[17], rtol=1e-6
  )


# Sampled negatives.

SAMPLED = {
  "bce": jax.jit(binary_cross_entropy),
  "gbce": jax.jit(functools.partial(binary_cross_entropy, power=0.3)),
  "bpr": jax.jit(bayesian_personalized_ranking),
  "softmax": jax.jit(
    lambda p, n, where=None: sampled_softmax(p, n, jnp.zeros_like(n), where)
  ),
}


def _by_hand(name, positive, negatives, log_counts):
  """The loss of one row in float64, from the formula's own terms."""
  sigmoid = scipy.special.expit
  if name == "softmax":
    others = np.exp(negatives - log_counts).sum()
    return -math.log(math.exp(positive) / (math.exp(positive) + others))
  if name == "bpr":
    terms = [-math.log(sigmoid(positive - s)) for s in negatives]
    return sum(terms) / max(len(terms), 1)
  power = {"bce": 1, "gbce": 0.3}[name]
  terms = [-math.log(sigmoid(positive) ** power)]
  terms += [-math.log(1 - sigmoid(s)) for s in negatives]
  return sum(terms) / len(terms)


def _draws(seed=0, shape=(2, 3), negatives=5):
  rng = np.random.default_rng(seed)
  draw = lambda *more: 2 * rng.normal(size=(*shape, *more)).astype(np.float32)
  where = rng.random((*shape, negatives)) < 0.6
  where[0, 0], where[0, 1] = False, True
  return draw(), draw(negatives), draw(negatives), where


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("masked", [False, True])
def test_sampled_losses_equal_a_loop(name, masked):
  positive, negatives, log_counts, where = _draws()
  mask = where if masked else None
  if name == "softmax":
    got = jax.jit(sampled_softmax)(positive, negatives, log_counts, mask)
  else:
    got = SAMPLED[name](positive, negatives, mask)
  assert got.shape == positive.shape and got.dtype == jnp.float32
  for i in np.ndindex(positive.shape):
    kept = where[i] if masked else np.ones(5, bool)
    want = _by_hand(
      name, float(positive[i]), negatives[i][kept].astype(float),
      log_counts[i][kept].astype(float),
    )
    np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_masked_negative_takes_no_part(name):
  positive, negatives, _, where = _draws(1)
  negatives[~where] = np.nan
  loss = lambda p, n: SAMPLED[name](p, n, where).sum()
  run = jax.jit(jax.value_and_grad(loss, (0, 1)))
  value, (of_positive, of_negatives) = run(
    positive, np.nan_to_num(negatives)
  )
  of_negatives = np.asarray(of_negatives)
  np.testing.assert_array_equal(of_negatives[~where], 0)
  assert (of_negatives[where] > 0).all()
  assert np.isfinite(value) and (np.asarray(of_positive) <= 0).all()
  assert np.isfinite(SAMPLED[name](positive, negatives, where)).all()


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_losses_of_extreme_logits_are_finite(name):
  for scale in (1e4, 1e30):
    positive = jnp.asarray([1.0, -1.0]) * scale
    negatives = jnp.asarray([[-1.0, 0.0], [1.0, 1.0]]) * scale
    loss = lambda p, n: SAMPLED[name](p, n).sum()
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, grads = run(positive, negatives)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)
    assert SAMPLED[name](positive, negatives)[0] < 0.7 < value


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_losses_accumulate_bfloat16_in_float32(name):
  negatives = jnp.linspace(-3, 3, 4001).astype(jnp.bfloat16)
  got = SAMPLED[name](jnp.bfloat16(0.5), negatives)
  want = _by_hand(name, 0.5, np.asarray(negatives, float), np.zeros(4001))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gbce_power():
  rate = 256 / 11_923
  assert gbce_power(rate, 0.0) == pytest.approx(1)
  assert gbce_power(rate, 1.0) == pytest.approx(rate)
  want = rate * (0.75 * (1 - 11_923 / 256) + 11_923 / 256)
  assert gbce_power(rate, 0.75) == pytest.approx(want)
  assert gbce_power(1.0, 0.5) == pytest.approx(1)


def test_gbce_in_the_limit_recovers_the_sampled_out_odds():
  """t = 1: at the optimum sigmoid(s) is the item's true probability.

  One item with probability p of being the target; else it is a negative with
  chance alpha: the minimiser of p * beta * softplus(-s) + (1 - p) * alpha *
  softplus(s) is sigmoid(s) = p, as in the paper.
  """
  p, rate = 0.3, 0.05
  power = gbce_power(rate, 1.0)
  expected = lambda s: (
    p * binary_cross_entropy(s, jnp.zeros(0), power=power)
    + (1 - p) * rate * jax.nn.softplus(s)
  )
  slope = jax.jit(jax.grad(expected))(jnp.float32(math.log(p / (1 - p))))
  np.testing.assert_allclose(slope, 0, atol=1e-7)


def test_gbce_refuses_more_negatives_than_there_are():
  with pytest.raises(InputError, match="rate=1.2"):
    gbce_power(1.2, 0.5)
