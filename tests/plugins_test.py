"""Plugins: identity at the start, the formula, and routing by segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pin_jax.plugins import apply_by_segment, bottleneck, init_stacked
from pin_jax.types import InputError, Plugin

WIDTH, SEGMENTS = 6, 3


def _x(rows=5, k=2):
  return jax.random.normal(jax.random.key(0), (rows, k, WIDTH))


def _noisy(params, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
  )


@pytest.mark.parametrize("hidden", [None, 1, 9])
def test_bottleneck_starts_as_the_identity_bit_by_bit(hidden):
  plugin = bottleneck(WIDTH, hidden=hidden)
  params = init_stacked(plugin, jax.random.key(1), SEGMENTS)
  segments = jnp.asarray([2, 0, 1, 1, 0])
  run = lambda p, x: apply_by_segment(plugin, p, x, segments)
  np.testing.assert_array_equal(run(params, _x()), _x())
  np.testing.assert_array_equal(jax.jit(run)(params, _x()), _x())


def test_bottleneck_learns_from_the_start():
  plugin = bottleneck(WIDTH)
  params = plugin.init(jax.random.key(0))
  grad = jax.grad(lambda p: (plugin.apply(p, _x()) ** 2).sum())(params)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grad)) > 0


def test_bottleneck_equals_its_formula():
  plugin = bottleneck(WIDTH, hidden=4)
  params = _noisy(plugin.init(jax.random.key(0)))
  w1, b1 = (np.asarray(params["Dense_0"][n]) for n in ("kernel", "bias"))
  w2, b2 = (np.asarray(params["Dense_1"][n]) for n in ("kernel", "bias"))
  assert w1.shape == (WIDTH, 4) and w2.shape == (4, WIDTH)
  x = np.asarray(_x(), np.float64)
  h = x @ w1 + b1
  h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  np.testing.assert_allclose(
    plugin.apply(params, _x()), x + h @ w2 + b2, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(("width", "hidden"), [(6, 3), (7, 3), (1, 1)])
def test_the_default_bottleneck_has_half_the_width(width, hidden):
  params = bottleneck(width).init(jax.random.key(0))
  assert params["Dense_0"]["kernel"].shape == (width, hidden)


@pytest.mark.parametrize("hidden", [0, -3])
def test_a_bottleneck_needs_a_hidden_unit(hidden):
  with pytest.raises(InputError, match=f"plugin.hidden={hidden}"):
    bottleneck(WIDTH, hidden=hidden)


def test_segments_start_from_different_parameters():
  plugin = bottleneck(WIDTH)
  stacked = init_stacked(plugin, jax.random.key(0), SEGMENTS)
  kernels = np.asarray(stacked["Dense_0"]["kernel"])
  assert kernels.shape[0] == SEGMENTS
  assert (kernels[0] != kernels[1]).all() and (kernels[1] != kernels[2]).all()


@pytest.mark.parametrize("k", [1, 4])
def test_a_row_reads_its_own_segment(k):
  scale = Plugin(lambda key: jnp.ones(()), lambda p, x: p * x)
  factors = jnp.asarray([2.0, -3.0, 5.0])
  segments = np.asarray([1, 1, 2, 0, 2, 0, 1])
  x = _x(7, k)
  got = apply_by_segment(scale, factors, x, jnp.asarray(segments))
  want = np.asarray(factors)[segments][:, None, None] * np.asarray(x)
  np.testing.assert_array_equal(got, want)


def test_perturbing_a_segment_leaves_the_others_bit_equal():
  plugin = bottleneck(WIDTH)
  params = _noisy(init_stacked(plugin, jax.random.key(0), 2))
  segments = np.asarray([0, 1, 1, 0, 1])
  run = jax.jit(lambda p: apply_by_segment(plugin, p, _x(), segments))
  before = np.asarray(run(params))
  after = np.asarray(run(jax.tree.map(lambda x: x.at[1].add(0.5), params)))
  np.testing.assert_array_equal(after[segments == 0], before[segments == 0])
  assert (after[segments == 1] != before[segments == 1]).any(-1).all()


def test_a_segments_gradient_comes_from_its_own_rows():
  plugin = bottleneck(WIDTH)
  params = _noisy(init_stacked(plugin, jax.random.key(0), 2))
  segments = jnp.asarray([0, 1, 1, 0, 1])
  loss = lambda p: (apply_by_segment(plugin, p, _x(), segments)[0] ** 2).sum()
  for grad in jax.tree.leaves(jax.grad(loss)(params)):
    assert np.abs(grad[0]).max() > 0
    np.testing.assert_array_equal(grad[1], 0)
