"""Plugins: a small prediction network for each segment of users.

Segments' parameters are stacked along a leading axis [S, ...]; the frozen
backbone is an argument that is not differentiated.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from pin_jax.types import InputError, Plugin, PyTree


class _Bottleneck(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = jax.nn.gelu(nn.Dense(self.hidden)(x))
    return x + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros)(h)


def bottleneck(width: int, *, hidden: int | None = None) -> Plugin:
  """Residual bottleneck network, y = x + W2 gelu(W1 x + b1) + b2.

  The bottleneck of half the width is inferred from the first author's later
  public work; leaving out its outer activation and starting at W2 = b2 = 0,
  which makes the plugin start as the identity, is ours.

  Args:
    width: D of the representation.
    hidden: width of the bottleneck; default D / 2.

  Returns:
    The plugin.

  Raises:
    InputError: if `hidden` is smaller than 1.
  """
  hidden = max(width // 2, 1) if hidden is None else hidden
  if hidden < 1:
    raise InputError(f"plugin.hidden={hidden} is too small; give at least 1")
  module = _Bottleneck(hidden)
  init = lambda key: module.init(key, jnp.zeros((1, width)))["params"]
  return Plugin(init, lambda params, x: module.apply({"params": params}, x))


def init_stacked(plugin: Plugin, key: jax.Array, num_segments: int) -> PyTree:
  """Parameters of all segments, stacked; leaves [S, ...]."""
  return jax.vmap(plugin.init)(jax.random.split(key, num_segments))


def apply_by_segment(
  plugin: Plugin, params: PyTree, x: jax.Array, segments: jax.Array
) -> jax.Array:
  """Applies to every row the plugin of its own segment.

  Args:
    plugin: the network.
    params: stacked, leaves [S, ...].
    x: [M, K, D] representations.
    segments: [M] int32.

  Returns:
    [M, K, D].
  """
  outputs = jax.vmap(plugin.apply, (0, None))(params, x)
  return outputs[segments, jnp.arange(x.shape[0])]
