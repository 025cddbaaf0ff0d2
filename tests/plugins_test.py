"""Plugins: identity at the start, the formula, and routing by segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pin_jax.plugins import apply_by_segment, bottleneck, init_stacked
from pin_jax.types import InputError, Plugin

WIDTH, SEGMENTS = 6, 3


def _x(rows=5, k=2):
  x = np.random.default_rng(0).normal(size=(rows, k, WIDTH))
  return jnp.asarray(x, jnp.float32)


def _noisy(init):
  """Random parameters of the shapes that `init` gives."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
    jax.eval_shape(init, jax.random.key(0)),
  )


@pytest.mark.parametrize("hidden", [None, 1, 9])
def test_bottleneck_starts_as_the_identity_bit_by_bit(hidden):
  plugin = bottleneck(WIDTH, hidden=hidden)
  segments = jnp.asarray([2, 0, 1, 1, 0])

  @jax.jit
  def run(x):
    params = init_stacked(plugin, jax.random.key(1), SEGMENTS)
    return apply_by_segment(plugin, params, x, segments)

  np.testing.assert_array_equal(run(_x()), _x())


def test_bottleneck_learns_from_the_start():
  plugin = bottleneck(WIDTH)
  params = jax.jit(plugin.init)(jax.random.key(0))
  loss = lambda p: (plugin.apply(p, _x()) ** 2).sum()
  grad = jax.jit(jax.grad(loss))(params)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grad)) > 0


def test_bottleneck_equals_its_formula():
  plugin = bottleneck(WIDTH, hidden=4)
  params = _noisy(plugin.init)
  w1, b1 = (np.asarray(params["Dense_0"][n]) for n in ("kernel", "bias"))
  w2, b2 = (np.asarray(params["Dense_1"][n]) for n in ("kernel", "bias"))
  assert w1.shape == (WIDTH, 4) and w2.shape == (4, WIDTH)
  x = np.asarray(_x(), np.float64)
  h = x @ w1 + b1
  h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  got = jax.jit(plugin.apply)(params, _x())
  np.testing.assert_allclose(got, x + h @ w2 + b2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "hidden"), [(6, 3), (7, 3), (1, 1)])
def test_the_default_bottleneck_has_half_the_width(width, hidden):
  params = jax.eval_shape(bottleneck(width).init, jax.random.key(0))
  assert params["Dense_0"]["kernel"].shape == (width, hidden)


@pytest.mark.parametrize("hidden", [0, -3])
def test_a_bottleneck_needs_a_hidden_unit(hidden):
  with pytest.raises(InputError, match=f"plugin.hidden={hidden}"):
    bottleneck(WIDTH, hidden=hidden)


def test_segments_start_from_different_parameters():
  plugin = bottleneck(WIDTH)
  init = jax.jit(init_stacked, static_argnums=(0, 2))
  stacked = init(plugin, jax.random.key(0), SEGMENTS)
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
  params = _noisy(lambda key: init_stacked(plugin, key, 2))
  segments = np.asarray([0, 1, 1, 0, 1])
  run = jax.jit(lambda p: apply_by_segment(plugin, p, _x(), segments))
  before = np.asarray(run(params))
  after = np.asarray(run(jax.tree.map(lambda x: x.at[1].add(0.5), params)))
  np.testing.assert_array_equal(after[segments == 0], before[segments == 0])
  assert (after[segments == 1] != before[segments == 1]).any(-1).all()


def test_a_segments_gradient_comes_from_its_own_rows():
  plugin = bottleneck(WIDTH)
  params = _noisy(lambda key: init_stacked(plugin, key, 2))
  segments = jnp.asarray([0, 1, 1, 0, 1])
  loss = lambda p: (apply_by_segment(plugin, p, _x(), segments)[0] ** 2).sum()
  for grad in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
    assert np.abs(grad[0]).max() > 0
    np.testing.assert_array_equal(grad[1], 0)
