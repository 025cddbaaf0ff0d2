"""Losses against scipy and against the plain, unchunked formula."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from pin_jax.training.chunks import chunked
from pin_jax.training.losses import (
  bayesian_personalized_ranking,
  binary_cross_entropy,
  focal,
  gbce_power,
  sampled_softmax,
  softmax_cross_entropy,
)
from pin_jax.types import InputError

WIDTH, ITEMS = 3, 11


def test_cross_entropy_equals_scipy():
  rng = np.random.default_rng(0)
  logits = 9 * rng.normal(size=(2, 4, 7)).astype(np.float32)
  target = rng.integers(0, 7, (2, 4))
  chosen = np.take_along_axis(logits, target[..., None], -1)[..., 0]
  want = scipy.special.logsumexp(logits.astype(np.float64), axis=-1) - chosen
  got = softmax_cross_entropy(logits, target)
  assert got.shape == (2, 4)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_cross_entropy_sees_only_the_candidates_that_take_part():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(5, 8)).astype(np.float32)
  where = rng.random((5, 8)) < 0.6
  target = rng.integers(0, 8, 5)
  where[np.arange(5), target] = True
  got = softmax_cross_entropy(logits, target, where)
  for row in range(5):
    part = logits[row][where[row]].astype(np.float64)
    want = scipy.special.logsumexp(part) - logits[row, target[row]]
    np.testing.assert_allclose(got[row], want, rtol=1e-6, atol=1e-6)
  twos = jnp.full(5, 2)
  shared = softmax_cross_entropy(logits[:, :4], twos, jnp.arange(4) > 0)
  part = logits[:, 1:4].astype(np.float64)
  want = scipy.special.logsumexp(part, axis=-1) - logits[:, 2]
  np.testing.assert_allclose(shared, want, rtol=1e-6, atol=1e-6)


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
  logits = jnp.asarray([[0.3, -1.2, 2.0, 0.0]])
  where = jnp.asarray([[False, True, True, True]])
  grad = jax.grad(
    lambda x: softmax_cross_entropy(x, jnp.asarray([2]), where).sum()
  )(logits)
  softmax = scipy.special.softmax([-1.2, 2.0, 0.0])
  want = [[0, *(softmax - [0, 1, 0])]]
  np.testing.assert_allclose(grad, want, atol=1e-6)


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


def _logits(params, shared, inputs):
  return shared * (inputs["h"] @ params["table"].T) + params["bias"]


def _row_loss(params, shared, inputs, targets):
  return softmax_cross_entropy(_logits(params, shared, inputs), targets)


def _direct(params, shared, inputs, targets, weights):
  logits = _logits(params, shared, inputs)
  softmax = jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True)
  chosen = softmax[jnp.arange(len(targets)), targets]
  return jnp.sum(weights * -jnp.log(chosen))


def _problem(rows, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"table": normal(ITEMS, WIDTH), "bias": normal(ITEMS)}
  targets = jnp.asarray(rng.integers(0, ITEMS, rows), jnp.int32)
  weights = jnp.asarray(rng.uniform(0.1, 2, rows), jnp.float32)
  return params, jnp.float32(1.3), {"h": normal(rows, WIDTH)}, targets, weights


def _assert_close(got, want):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()
    ),
    got,
    want,
  )


def _with_gradients(f):
  return jax.jit(jax.value_and_grad(f, (0, 2)))


def _sum(row_loss, chunk):
  """The chunked sum alone, every row at scale 1."""
  f = chunked(row_loss, chunk)
  return lambda *args: f(*args, jnp.ones(len(args[-1])))[0]


@pytest.mark.parametrize(
  ("rows", "chunk"), [(7, 3), (5, 8), (6, 3), (14, 8), (9, 4), (1, 8)]
)
def test_chunked_equals_the_direct_sum(rows, chunk):
  problem = _problem(rows)
  want = _with_gradients(_direct)(*problem)
  f = _sum(_row_loss, chunk)
  _assert_close(jax.jit(f)(*problem), want[0])
  _assert_close(_with_gradients(f)(*problem), want)


def test_chunked_without_jit_scales_with_the_cotangent():
  problem = _problem(7)
  scaled = lambda f: lambda *args: -2.5 * f(*args) ** 2
  want = _with_gradients(scaled(_direct))(*problem)
  run = jax.value_and_grad(scaled(_sum(_row_loss, 4)), (0, 2))
  got = run(*problem)
  _assert_close(got, want)


@pytest.mark.parametrize("transform", ["vmap", "map"])
def test_chunked_over_a_leading_axis_equals_a_loop(transform):
  problems = [_problem(7, seed) for seed in range(2)]
  problems[1] = (*problems[1][:4], problems[1][4].at[:4].set(0))
  want = [_with_gradients(_direct)(*p) for p in problems]
  stack = lambda *xs: np.stack(xs)
  stacked = jax.tree.map(stack, *problems)
  one = _with_gradients(_sum(_row_loss, 4))
  if transform == "vmap":
    got = jax.vmap(one)(*stacked)
  else:
    got = jax.lax.map(lambda x: one(*x), stacked)
  _assert_close(got, jax.tree.map(stack, *want))


def test_chunked_vmapped_over_weights_alone():
  params, shared, inputs, targets, weights = _problem(5)
  many = jnp.stack([weights, weights * 0, weights.at[3:].set(0)])
  run = lambda f: jax.vmap(
    _with_gradients(f), (None, None, None, None, 0)
  )(params, shared, inputs, targets, many)
  _assert_close(run(_sum(_row_loss, 2)), run(_direct))


@pytest.mark.parametrize("vmapped", [False, True])
def test_rows_of_zero_weight_do_not_poison(vmapped):
  rows = {0: math.nan, 1: math.inf, 3: math.nan, 6: -math.inf}  # chunks of 2
  bad, kept = np.asarray(list(rows)), np.asarray([2, 4, 5])
  params, shared, inputs, targets, weights = _problem(7)
  only = lambda x: x[kept]
  want, (of_params, of_inputs) = _with_gradients(_direct)(
    params, shared, {"h": only(inputs["h"])}, only(targets), only(weights)
  )
  values = jnp.asarray(list(rows.values()))[:, None]
  inputs = {"h": inputs["h"].at[bad].set(values)}
  args = params, shared, inputs, targets, weights.at[bad].set(0)
  run = _with_gradients(_sum(_row_loss, 2))
  if vmapped:
    got = jax.vmap(run)(*jax.tree.map(lambda x: jnp.stack([x, x]), args))
    got = jax.tree.map(lambda x: np.asarray(x)[1], got)
  else:
    got = run(*args)
  _assert_close((got[0], got[1][0]), (want, of_params))
  np.testing.assert_array_equal(got[1][1]["h"][bad], 0)
  _assert_close(only(got[1][1]["h"]), of_inputs["h"])


def test_padding_to_whole_chunks_does_not_poison():
  def cosine(params, shared, inputs, constants):
    norm = jnp.sqrt(jnp.sum(inputs**2, -1))
    return inputs @ params / norm / constants

  inputs = jnp.asarray([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
  args = jnp.asarray([1.0, 2.0]), None, inputs, jnp.ones(3), jnp.ones(3)
  value, grad = jax.jit(jax.value_and_grad(_sum(cosine, 2)))(*args)
  np.testing.assert_allclose(value, 11 / 5 + 2 + 1, rtol=1e-6)
  np.testing.assert_allclose(grad, [3 / 5 + 0 + 1, 4 / 5 + 1 + 0], rtol=1e-6)


def test_weights_of_zero_give_zero():
  params, shared, inputs, targets, weights = _problem(5)
  value, grads = _with_gradients(_sum(_row_loss, 2))(
    params, shared, inputs, targets, weights * 0
  )
  assert value == 0
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), grads)


def test_scale_multiplies_rows_that_come_back_without_it():
  problem = _problem(9)
  scale = jnp.asarray([0.0, 2.0, -1.0, 0.5, 0.0, 1.0, 3.0, 0.0, 1.0])
  (value, rows), grads = jax.jit(
    jax.value_and_grad(chunked(_row_loss, 4), (0, 2), has_aux=True)
  )(*problem, scale)
  *given, weights = problem
  want = _with_gradients(_direct)(*given, weights * scale)
  _assert_close((value, grads), want)
  each = [_direct(*given, weights * jax.nn.one_hot(i, 9)) for i in range(9)]
  np.testing.assert_allclose(rows, each, rtol=1e-5)


def test_rows_after_the_last_weight_are_never_computed():
  """A row loss that counts its rows: whole chunks, then quarters."""
  rows, chunk = 40, 8
  params, shared, inputs, targets, _ = _problem(rows)
  seen = []

  def counted(params, shared, inputs, targets):
    jax.debug.callback(lambda: seen.append(len(targets)))
    return _row_loss(params, shared, inputs, targets)

  for used, want in ((0, []), (3, [2, 2]), (7, [8]), (19, [8, 8, 2, 2])):
    seen.clear()
    weights = jnp.where(jnp.arange(rows) < used, 1.0, 0.0)
    _sum(counted, chunk)(params, shared, inputs, targets, weights)
    jax.effects_barrier()
    assert seen == want


def test_shared_and_weights_are_constants():
  problem = _problem(5)
  run = jax.jit(jax.grad(_sum(_row_loss, 2), (1, 4)))
  of_shared, of_weights = run(*problem)
  assert of_shared == 0
  np.testing.assert_array_equal(of_weights, 0)


def _largest(text):
  shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
  return max(math.prod(map(int, s.split(","))) for s in shapes)


@pytest.mark.parametrize("stage", ["jaxpr", "hlo"])
def test_no_intermediate_of_all_rows_by_all_items(stage):
  rows, items = 24, 101
  params, shared, inputs, targets, weights = _problem(rows)
  params = {"table": jnp.ones((items, WIDTH)), "bias": jnp.zeros(items)}
  args = params, shared, inputs, targets, weights

  def largest(f):
    run = _with_gradients(f)
    if stage == "jaxpr":
      return _largest(str(jax.make_jaxpr(run)(*args)))
    return _largest(jax.jit(run).lower(*args).compile().as_text())

  assert largest(_direct) >= rows * items
  assert largest(_sum(_row_loss, rows)) >= rows * items
  assert largest(_sum(_row_loss, 8)) == 8 * items


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


def test_sampled_softmax_over_all_others_is_the_softmax():
  rng = np.random.default_rng(2)
  logits = jnp.asarray(3 * rng.normal(size=(4, 9)), jnp.float32)
  target = np.asarray([0, 8, 3, 3])
  others = np.stack([np.delete(np.arange(9), t) for t in target])
  rows = np.arange(4)[:, None]

  def sampled(logits):
    return sampled_softmax(
      logits[rows[:, 0], target], logits[rows, others], jnp.zeros((4, 8))
    ).sum()

  full = lambda x: softmax_cross_entropy(x, jnp.asarray(target)).sum()
  run = lambda f: jax.jit(jax.value_and_grad(f))(logits)
  got, want = run(sampled), run(full)
  _assert_close(got, want)


def test_bias_of_the_sampled_softmax_halves_as_the_draws_double():
  """Exact expectation over all draws of C items from q, target masked."""
  logits = np.asarray([0.7, -0.4, 1.1, 0.0], np.float32)
  q, target = np.asarray([0.4, 0.3, 0.1, 0.2]), 1
  softmax = scipy.special.softmax(logits.astype(float))
  full = softmax - np.eye(4)[target]

  @jax.jit
  @jax.vmap
  def gradient(counts):
    """Of one multiset of draws: an item drawn m times weighs m."""

    def loss(x):
      log_counts = jnp.log(counts.sum() * q) - jnp.log(jnp.maximum(counts, 1))
      where = (counts > 0) & (jnp.arange(4) != target)
      return sampled_softmax(x[target], x, log_counts, where)

    return jax.grad(loss)(jnp.asarray(logits))

  biases = []
  for draws in (8, 16, 32, 64):
    grid = np.indices([draws + 1] * 3).reshape(3, -1).T
    grid = grid[grid.sum(1) <= draws]
    counts = np.concatenate([grid, draws - grid.sum(1, keepdims=True)], 1)
    chances = scipy.stats.multinomial.pmf(counts, draws, q)
    grads = np.asarray(gradient(counts.astype(np.float32)), np.float64)
    biases.append(chances @ grads - full)
  sizes = np.abs(biases).max(1)
  assert sizes[0] > 0.005
  np.testing.assert_allclose(sizes[1:] / sizes[:-1], 0.5, atol=0.12)
  np.testing.assert_allclose(sizes[-1] / sizes[-2], 0.5, atol=0.02)


def test_gbce_power():
  rate = 256 / 11_923
  assert gbce_power(rate, 0.0) == pytest.approx(1)
  assert gbce_power(rate, 1.0) == pytest.approx(rate)
  want = rate * (0.75 * (1 - 11_923 / 256) + 11_923 / 256)
  assert gbce_power(rate, 0.75) == pytest.approx(want)
  assert gbce_power(1.0, 0.5) == pytest.approx(1)


def test_gbce_without_calibration_is_bce():
  positive, negatives, _, where = _draws(3)
  power = gbce_power(0.1, 0.0)
  run = jax.jit(functools.partial(binary_cross_entropy, power=power))
  np.testing.assert_allclose(
    run(positive, negatives, where),
    SAMPLED["bce"](positive, negatives, where), rtol=1e-6,
  )


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


@pytest.mark.parametrize(
  ("rate", "calibration", "message"),
  [(1.2, 0.5, "rate=1.2"), (0.0, 0.5, "rate=0 "), (0.5, -1, "=-1")],
)
def test_gbce_refuses_bad_numbers(rate, calibration, message):
  with pytest.raises(InputError, match=message):
    gbce_power(rate, calibration)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_chunks_of_narrow_parameters_add_up_in_float32(dtype):
  """600 rows of gradient 1: in bfloat16 their sum would stop at 256."""
  rows = jnp.ones(600)
  total = chunked(lambda p, shared, x, c: p * x, 1)
  gradient = jax.grad(
    lambda p: total(p, None, rows.astype(dtype), rows, rows, rows)[0]
  )(jnp.ones((), dtype))
  assert gradient.dtype == dtype
  assert gradient == 600
