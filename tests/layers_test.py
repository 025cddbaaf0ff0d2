"""Layers: dropout's statistics, attention and GRU against loops."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import scipy.special
import scipy.stats
from toys import noisy

from pin_jax.models.layers import (
  GRU,
  CausalAttention,
  Dropout,
  dropout,
  hardware_bits,
  hash_bits,
)

SIZE = 100_000
NORMAL = nn.initializers.normal(0.5)


def _masks(keys, rate=0.5, size=SIZE):
  drop = jax.vmap(lambda key: dropout(jnp.ones(size), rate, key))
  return np.asarray(jax.jit(drop)(keys)) > 0


def _normal(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_dropout_keeps_its_share_and_the_mean(rate, seed):
  run = jax.jit(dropout, static_argnums=1)
  out = np.asarray(run(jnp.ones(SIZE), rate, jax.random.key(seed)))
  kept = out != 0
  sigma = math.sqrt(rate * (1 - rate) / SIZE)
  assert abs(kept.mean() - (1 - rate)) < 5 * sigma
  assert abs(out.mean(dtype=np.float64) - 1) < 5 * sigma / (1 - rate)
  np.testing.assert_allclose(out[kept], 1 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize("derive", ["split", "fold_in"])
def test_masks_of_different_keys_are_independent(derive):
  key = jax.random.key(3)
  keys = {
    "split": jax.random.split(key, 6),
    "fold_in": jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(6)),
  }[derive]
  correlation = np.corrcoef(_masks(keys))
  off = correlation[~np.eye(6, dtype=bool)]
  assert np.abs(off).max() < 5 / math.sqrt(SIZE)


def test_vmapped_keys_give_the_masks_of_each_key():
  keys = jax.random.split(jax.random.key(4), 3)
  masks = _masks(keys, 0.3, 200)
  for key, mask in zip(keys, masks, strict=True):
    alone = np.asarray(dropout(np.ones(200, np.float32), 0.3, key)) > 0
    np.testing.assert_array_equal(mask, alone)
  assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()


@pytest.mark.parametrize("lag", [1, 2, 64, 3200])
def test_elements_of_a_mask_are_independent(lag):
  mask = _masks(jax.random.key(5)[None])[0].astype(float)
  assert abs(np.corrcoef(mask[lag:], mask[:-lag])[0, 1]) < 5 / math.sqrt(SIZE)


def test_hash_bits_are_uniform():
  bits = np.asarray(hash_bits(jax.random.key(6), (SIZE,)))
  counts = np.bincount(bits >> 24, minlength=256)
  assert scipy.stats.chisquare(counts).pvalue > 1e-4
  ones = ((bits[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(0)
  assert np.abs(ones - 0.5).max() < 5 * 0.5 / math.sqrt(SIZE)


# Accelerators draw their masks by hardware; here by XLA's generator for CPU.


def _transformed(how):
  """A program that draws masks; its keys and x."""
  drop = lambda x, key: dropout(x, 0.5, key)
  x, keys = jnp.ones((3, 8, 8)), jax.random.split(jax.random.key(0), 3)
  over = {
    "vmap": jax.vmap(drop),
    "scan": lambda x, keys: jax.lax.map(lambda a: drop(*a), (x, keys)),
    "gradient": jax.grad(
      lambda x, keys: jnp.sum(jax.checkpoint(jax.vmap(drop))(x, keys) ** 2)
    ),
  }[how]
  return jax.jit(over), x, keys


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("how", ["vmap", "scan", "gradient"])
def test_each_platform_lowers_its_own_generator_alone(how, platform):
  run, *args = _transformed(how)
  text = run.trace(*args).lower(lowering_platforms=(platform,)).as_text()
  assert ("rng_bit_generator" in text) == (platform != "cpu")
  hashed = str(0x9E3779B9) in text  # the constant of the counter
  assert hashed == (platform == "cpu")


def test_one_export_serves_every_platform():
  run, *args = _transformed("vmap")
  exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(*args)
  assert exported.platforms == ("cpu", "cuda", "tpu")
  np.testing.assert_array_equal(exported.call(*args), run(*args))


def test_masks_on_cpu_are_the_hash():
  key = jax.random.key(9)
  for how in (lambda f: f, jax.jit):
    out = how(lambda key: dropout(jnp.ones((4, 60)), 0.5, key))(key)
    np.testing.assert_array_equal(out > 0, hash_bits(key, (4, 60)) >> 31)
  # murmur3's finaliser by hand, with the words of a key of four.
  words = jnp.asarray([11, 22, 33, 44], jnp.uint32)
  wrap = 2**32
  for i, got in enumerate(np.asarray(hash_bits(words, (5,)))):
    bits = (i * 0x9E3779B9 % wrap) ^ 11
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      bits = ((bits ^ (bits >> shift)) * factor + 44) % wrap
    assert got == bits ^ (bits >> 16)


def test_hardware_bits_follow_the_key():
  key = jax.random.key(7)
  want = hardware_bits(key, (3, 50))
  raw = hardware_bits(jax.random.key_data(key), (3, 50))
  four = hardware_bits(jax.random.key(7, impl="rbg"), (3, 50))
  for got in (raw, four):
    np.testing.assert_array_equal(got, want)
  assert (want != hardware_bits(jax.random.key(8), (3, 50))).any()
  np.testing.assert_array_equal(
    want, jax.random.bits(jax.random.key(7, impl="rbg"), (3, 50))
  )


def test_vmapped_hardware_masks_are_parts_of_the_first_keys_stream():
  keys = jax.random.split(jax.random.key(4), 3)
  draw = jax.vmap(lambda key: hardware_bits(key, (SIZE,)))
  bits = np.asarray(jax.jit(draw)(keys))
  np.testing.assert_array_equal(bits, hardware_bits(keys[0], (3, SIZE)))
  off = np.corrcoef(bits >= 2**31)[~np.eye(3, dtype=bool)]
  assert np.abs(off).max() < 5 / math.sqrt(SIZE)
  shared = jax.vmap(lambda x: x * hardware_bits(keys[0], (5,)))
  rows = np.asarray(shared(jnp.ones((2, 1), jnp.uint32)))
  np.testing.assert_array_equal(rows[0], rows[1])  # one key, one mask


def test_dropout_layer_is_off_without_a_key():
  x = jnp.arange(1, 41.0).reshape(4, 10)
  layer = Dropout(0.5)
  np.testing.assert_array_equal(layer.apply({}, x), x)
  on = layer.apply({}, x, rngs={"dropout": jax.random.key(0)})
  assert 0 < np.sum(np.asarray(on) == 0) < x.size
  off = Dropout(0.0).apply({}, x, rngs={"dropout": jax.random.key(0)})
  np.testing.assert_array_equal(off, x)


def _attention(length=6, width=4, heads=2):
  layer = CausalAttention(heads, 0.0, NORMAL)
  x = _normal(2, length, width)
  mask = jnp.arange(length) >= jnp.asarray([[0], [3]])
  return layer, jax.jit(layer.init)(jax.random.key(1), x, mask), x, mask


def test_attention_over_padding_alone_is_finite():
  layer, variables, x, mask = _attention()
  run = lambda x: layer.apply(variables, x, jnp.zeros_like(mask)).sum()
  value, grad = jax.jit(jax.value_and_grad(run))(x)
  assert np.isfinite(value) and np.isfinite(grad).all()


def _gru(length=6, width=4, hidden=3):
  layer = GRU(hidden)
  x = _normal(2, length, width)
  mask = jnp.arange(length) >= jnp.asarray([[0], [2]])
  return layer, noisy(lambda key: layer.init(key, x, mask)), x, mask


def test_gru_keeps_its_state_over_padding():
  layer, variables, x, mask = _gru()
  gap = mask.at[0, 3].set(False)
  got = jax.jit(layer.apply)(variables, x, gap)
  np.testing.assert_array_equal(got[0, 3], got[0, 2])
  keep = np.asarray([0, 1, 2, 4, 5])
  p = references.wide(variables["params"])
  want = references.gru(p, x[0, keep])
  np.testing.assert_allclose(got[0, keep], want, atol=1e-5)


def test_gru_starts_orthogonal():
  layer, _, x, mask = _gru()
  params = jax.jit(layer.init)(jax.random.key(1), x, mask)["params"]
  for kernel in np.split(np.asarray(params["recurrent"]), 3, -1):
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(3), atol=1e-5)
