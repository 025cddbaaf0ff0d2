"""Chunked sums against the plain, unchunked formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import assert_trees_close

from pin_jax.training.chunks import chunked
from pin_jax.training.losses import softmax_cross_entropy

WIDTH, ITEMS = 3, 11


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
  assert_trees_close(jax.jit(f)(*problem), want[0])
  assert_trees_close(_with_gradients(f)(*problem), want)


def test_chunked_without_jit_scales_with_the_cotangent():
  problem = _problem(7)
  scaled = lambda f: lambda *args: -2.5 * f(*args) ** 2
  want = _with_gradients(scaled(_direct))(*problem)
  run = jax.value_and_grad(scaled(_sum(_row_loss, 4)), (0, 2))
  got = run(*problem)
  assert_trees_close(got, want)


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
  assert_trees_close(got, jax.tree.map(stack, *want))


def test_chunked_vmapped_over_weights_alone():
  params, shared, inputs, targets, weights = _problem(5)
  many = jnp.stack([weights, weights * 0, weights.at[3:].set(0)])
  run = lambda f: jax.vmap(
    _with_gradients(f), (None, None, None, None, 0)
  )(params, shared, inputs, targets, many)
  assert_trees_close(run(_sum(_row_loss, 2)), run(_direct))


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
  assert_trees_close((got[0], got[1][0]), (want, of_params))
  np.testing.assert_array_equal(got[1][1]["h"][bad], 0)
  assert_trees_close(only(got[1][1]["h"]), of_inputs["h"])


def test_padding_to_whole_chunks_does_not_poison():
  def cosine(params, shared, inputs, constants):
    norm = jnp.sqrt(jnp.sum(inputs**2, -1))
    return inputs @ params / norm / constants

  inputs = jnp.asarray([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
  args = jnp.asarray([1.0, 2.0]), None, inputs, jnp.ones(3), jnp.ones(3)
  value, grad = jax.jit(jax.value_and_grad(_sum(cosine, 2)))(*args)
  np.testing.assert_allclose(value, 11 / 5 + 2 + 1, rtol=1e-6)
  np.testing.assert_allclose(grad, [3 / 5 + 0 + 1, 4 / 5 + 1 + 0], rtol=1e-6)


def test_scale_multiplies_rows_that_come_back_without_it():
  problem = _problem(9)
  scale = jnp.asarray([0.0, 2.0, -1.0, 0.5, 0.0, 1.0, 3.0, 0.0, 1.0])
  (value, rows), grads = jax.jit(
    jax.value_and_grad(chunked(_row_loss, 4), (0, 2), has_aux=True)
  )(*problem, scale)
  *given, weights = problem
  want = _with_gradients(_direct)(*given, weights * scale)
  assert_trees_close((value, grads), want)
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
