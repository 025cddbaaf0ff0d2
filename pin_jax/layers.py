"""Layers that the backbones share: dropout, causal attention, MLP, GRU."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def hash_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Counter-based random bits: murmur3's finaliser of (counter, key).

  A few integer operations an element, against the twenty rounds of threefry;
  good enough for dropout masks, not for statistics. It mixes the counter, not
  the key: the keys of neighbouring seeds (`key(0)`, `key(1)`) give correlated
  bits, those that `split` or `fold_in` derive do not.

  Args:
    key: typed or raw PRNG key, from `split` or `fold_in`.
    shape: shape of the result.

  Returns:
    uint32 array of the given shape.
  """
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.key_data(key)
  low, high = key[..., 0], key[..., -1]
  bits = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(_GOLDEN)
  bits = bits ^ low
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits + high
  return (bits ^ (bits >> 16)).reshape(shape)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Zeroes a share `rate` of the elements and rescales the others."""
  threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  keep = hash_bits(key, x.shape) >= threshold
  return jnp.where(keep, x / (1 - rate), 0)


class Dropout(nn.Module):
  """`dropout` as a layer; off where no 'dropout' key is given."""

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies dropout to x of any shape."""
    if self.rate == 0 or not self.has_rng("dropout"):
      return x
    return dropout(x, self.rate, self.make_rng("dropout"))


def reads(windows: jax.Array) -> jax.Array:
  """Whether t reads s: s <= t, both of one window; [B, L] -> [B, L, L]."""
  causal = jnp.tril(jnp.ones((windows.shape[-1],) * 2, bool))
  of_key = windows[:, None, :]
  return causal & (of_key == windows[:, :, None]) & (of_key > 0)


class CausalAttention(nn.Module):
  """Multi-head self-attention: t reads the positions <= t of its window.

  Every position may read itself, so a row of padding stays finite.
  """

  heads: int
  dropout: float
  kernel_init: Any

  @nn.compact
  def __call__(self, x: jax.Array, windows: jax.Array) -> jax.Array:
    """Attends within windows; x [B, L, D], windows [B, L] (0 = padding)."""
    length, width = x.shape[-2:]
    dense = lambda name: nn.DenseGeneral(
      (self.heads, width // self.heads), kernel_init=self.kernel_init, name=name
    )
    query, key, value = (dense(name)(x) for name in ("query", "key", "value"))
    visible = reads(windows) | jnp.eye(length, dtype=bool)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    logits = logits / math.sqrt(width // self.heads)
    logits = jnp.where(visible[:, None], logits, jnp.finfo(logits.dtype).min)
    weights = Dropout(self.dropout)(jax.nn.softmax(logits, axis=-1))
    read = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return nn.DenseGeneral(
      width, axis=(-2, -1), kernel_init=self.kernel_init, name="out"
    )(read)


class MLP(nn.Module):
  """Two dense layers with GELU between them."""

  hidden: int
  dropout: float
  kernel_init: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., D] to [..., D]."""
    h = nn.Dense(self.hidden, kernel_init=self.kernel_init)(x)
    h = Dropout(self.dropout)(jax.nn.gelu(h))
    return nn.Dense(x.shape[-1], kernel_init=self.kernel_init)(h)


class Block(nn.Module):
  """Pre-norm transformer block: attention, then MLP, each residual."""

  heads: int
  hidden: int
  dropout: float
  kernel_init: Any

  @nn.compact
  def __call__(self, x: jax.Array, windows: jax.Array) -> jax.Array:
    """Maps x [B, L, D] with windows [B, L] to [B, L, D]."""
    attention = CausalAttention(self.heads, self.dropout, self.kernel_init)
    mlp = MLP(self.hidden, self.dropout, self.kernel_init)
    drop = lambda h: Dropout(self.dropout)(h)
    x = x + drop(attention(nn.LayerNorm()(x), windows))
    return x + drop(mlp(nn.LayerNorm()(x)))


class GRU(nn.Module):
  """Gated recurrent unit over time, with the gates of `flax.linen.GRUCell`.

    r, z = sigmoid(W x + b + U h)
    n    = tanh(W_n x + b_n + r (U_n h + c_n))
    h'   = (1 - z) n + z h

  W x of all positions is one product ahead of the scan, which then costs one
  product [B, H] x [H, 3 H] a step. The state starts at zero, anew where one
  window follows another, and padding leaves it as it is.
  """

  width: int

  @nn.compact
  def __call__(self, x: jax.Array, windows: jax.Array) -> jax.Array:
    """Maps x [B, L, D] with windows [B, L] to states [B, L, H]."""
    recurrent = self.param("recurrent", _orthogonal, (self.width, 3))
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    by_time = jnp.swapaxes(x, 0, 1)
    inputs = nn.Dense(3 * self.width, name="inputs")(by_time)

    def step(
      h: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
      given, real, first = now
      h = jnp.where(first[:, None], 0, h)
      gates, new = jnp.split(given, [2 * self.width], -1)
      of_gates, of_new = jnp.split(h @ recurrent, [2 * self.width], -1)
      reset, keep = jnp.split(jax.nn.sigmoid(gates + of_gates), 2, -1)
      new = jnp.tanh(new + reset * (of_new + bias))
      h = jnp.where(real[:, None], (1 - keep) * new + keep * h, h)
      return h, h

    start = jnp.zeros((x.shape[0], self.width), inputs.dtype)
    before = jnp.pad(windows, [(0, 0), (1, 0)])[:, :-1]
    opens = (windows != before) & (windows > 0) & (before > 0)
    steps = inputs, windows.T > 0, opens.T
    states = jax.lax.scan(step, start, steps)[1]
    return jnp.swapaxes(states, 0, 1)


def _orthogonal(
  key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32
) -> jax.Array:
  """One orthogonal matrix a gate, side by side; (H, gates) -> [H, gates H]."""
  width, gates = shape
  draw = nn.initializers.orthogonal()
  keys = jax.random.split(key, gates)
  return jnp.concatenate([draw(k, (width, width), dtype) for k in keys], 1)
