"""Layers that backbones share: dropout, causal attention, MLP, GRU.

They compute in the type of their parameters and inputs; `product`, `lookup`,
dropout's factor, softmax and the GRU's state are float32 throughout.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


def hash_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Counter-based random uint32: murmur3's finaliser of (counter, key).

  A few integer operations an element, against the twenty rounds of threefry;
  good enough for dropout masks, not for statistics. It mixes the counter, not
  the key: take keys from `split` or `fold_in`, for those of neighbouring seeds
  (`key(0)`, `key(1)`) give correlated bits.
  """
  key = _key_words(key)
  low, high = key[..., 0], key[..., -1]
  bits = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(_GOLDEN)
  bits = bits ^ low
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits + high
  return (bits ^ (bits >> 16)).reshape(shape)


def hardware_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Random uint32 of the device's generator, XLA's RngBitGenerator.

  Stateless: the generator's state is the key, twice if it has two words, as
  JAX makes its 'rbg' keys; key derivation stays threefry's. The bits differ
  from one kind of device to another.

  Under `vmap` over keys all examples take consecutive parts of the first key's
  stream: their masks are independent, but not those that the keys give one by
  one, as in `lax.map` and `scan`. A sharded result is the unsharded one.
  """
  key = _key_words(key)
  state = jnp.tile(key, 4 // key.shape[-1])
  return jax.lax.rng_bit_generator(state, shape)[1]


def _key_words(key: jax.Array) -> jax.Array:
  """The raw words of a key, typed or raw; [..., 2 or 4] uint32."""
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    key = jax.random.key_data(key)
  return key


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Zeroes a share `rate` of the elements and rescales the others.

  The factor 1 / (1 - rate) applies in float32. The mask follows from the key:
  by `hash_bits` on CPU, by `hardware_bits` on accelerators. The platform is
  that of the lowering: one traced program is right for each, and holds one
  branch.
  """
  threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  bits = jax.lax.platform_dependent(
    _key_words(key), cpu=functools.partial(hash_bits, shape=x.shape),
    default=functools.partial(hardware_bits, shape=x.shape),
  )
  keep = bits >= threshold
  scaled = x.astype(jnp.float32) / (1 - rate)
  return jnp.where(keep, scaled.astype(x.dtype), 0)


def lookup(table: jax.Array, index: jax.Array) -> jax.Array:
  """table[index], whose gradient adds up in float32, whatever the type."""
  return table.astype(jnp.float32)[index].astype(table.dtype)


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """einsum(spec, x, y) accumulated and given in float32.

  The two products of the backward pass take the gradient rounded to the type
  of the operands, so that they too have operands of that type alone; without
  it, they would multiply float32 with bfloat16. For float32 this is `einsum`.
  """
  if x.dtype == y.dtype and x.dtype != jnp.float32:
    return _narrow_product(spec, x, y)
  return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _product_forward(
  spec: str, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _narrow_product(spec, x, y), (x, y)


def _product_backward(
  spec: str, operands: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  _, pull = jax.vjp(functools.partial(jnp.einsum, spec), *operands)
  return pull(gradient.astype(operands[0].dtype))


_narrow_product.defvjp(_product_forward, _product_backward)


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
    logits = product("bqhd,bkhd->bhqk", query, key)
    logits = logits / math.sqrt(width // self.heads)
    logits = jnp.where(visible[:, None], logits, jnp.finfo(logits.dtype).min)
    weights = Dropout(self.dropout)(jax.nn.softmax(logits, axis=-1))
    read = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(x.dtype), value)
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
  """Pre-norm transformer block: attention, then MLP, each residual.

  Where its params hold an 'adapter' {down [D, h], up [h, D]}, which `init`
  never makes, x + gelu(x down) up follows (see `plugins.adapter`).
  """

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
    x = x + drop(mlp(nn.LayerNorm()(x)))
    if not self.has_variable("params", "adapter"):
      return x
    adapter = self.get_variable("params", "adapter")
    return x + jax.nn.gelu(x @ adapter["down"]) @ adapter["up"]


class GRU(nn.Module):
  """Gated recurrent unit over time, with the gates of `flax.linen.GRUCell`.

    r, z = sigmoid(W x + b + U h)
    n    = tanh(W_n x + b_n + r (U_n h + c_n))
    h'   = (1 - z) n + z h

  W x of all positions is one product ahead of the scan. The state starts at
  zero, anew where one window follows another, and padding leaves it as it is.
  State and gates are float32 whatever the type of the parameters: (1 - z) n of
  a gate close to 1 would vanish beside z h otherwise.
  """

  width: int

  @nn.compact
  def __call__(self, x: jax.Array, windows: jax.Array) -> jax.Array:
    """Maps x [B, L, D] with windows [B, L] to states [B, L, H]."""
    recurrent = self.param("recurrent", _orthogonal, (self.width, 3))
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    by_time = jnp.swapaxes(x, 0, 1)
    inputs = nn.Dense(3 * self.width, name="inputs")(by_time)
    narrow = lambda x: x.astype(inputs.dtype)
    # As float32 the scan's operands have gradients that add up in it.
    recurrent, bias = (x.astype(jnp.float32) for x in (recurrent, bias))

    def step(
      h: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
      given, real, first = now
      h = jnp.where(first[:, None], 0, h)
      gates, new = jnp.split(given, [2 * self.width], -1)
      of_state = product("bh,hk->bk", narrow(h), narrow(recurrent))
      of_gates, of_new = jnp.split(of_state, [2 * self.width], -1)
      reset, keep = jnp.split(jax.nn.sigmoid(gates + of_gates), 2, -1)
      new = jnp.tanh(new + reset * (of_new + bias))
      h = jnp.where(real[:, None], (1 - keep) * new + keep * h, h)
      return h, narrow(h)

    start = jnp.zeros((x.shape[0], self.width), jnp.float32)
    before = jnp.pad(windows, [(0, 0), (1, 0)])[:, :-1]
    opens = (windows != before) & (windows > 0) & (before > 0)
    steps = inputs, windows.T > 0, opens.T
    states = jax.lax.scan(step, start, steps)[1]
    return jnp.swapaxes(states, 0, 1)


def _orthogonal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """One orthogonal matrix a gate, side by side; (H, gates) -> [H, gates H]."""
  width, gates = shape
  draw = nn.initializers.orthogonal()
  keys = jax.random.split(key, gates)
  return jnp.concatenate([draw(k, (width, width)) for k in keys], 1)
