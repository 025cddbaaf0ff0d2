"""Plugins: identity at the start, the formula, and routing by segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import wide

from pin_jax.data.batches import make_sequences, read_back
from pin_jax.models import memory
from pin_jax.models.layers import Block
from pin_jax.models.plugins import (
  adapter,
  bottleneck,
  gated,
  init_stacked,
  low_rank,
  memory_alone,
  memory_mix,
  translation,
)
from pin_jax.models.sasrec import sasrec
from pin_jax.types import InputError
from tests.toys import noisy, split_of

WIDTH, SEGMENTS = 6, 3


def _x(rows=5, k=2):
  x = np.random.default_rng(0).normal(size=(rows, k, WIDTH))
  return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("hidden", [1, 9])
def test_bottleneck_starts_as_the_identity_bit_by_bit(hidden):
  plugin = bottleneck(WIDTH, hidden=hidden)

  @jax.jit
  def run(x):
    return plugin.apply(plugin.init(jax.random.key(1)), x)

  np.testing.assert_array_equal(run(_x()), _x())


def test_bottleneck_equals_its_formula():
  plugin = bottleneck(WIDTH, hidden=4)
  params = noisy(plugin.init)
  w1, b1 = (np.asarray(params["Dense_0"][n]) for n in ("kernel", "bias"))
  w2, b2 = (np.asarray(params["Dense_1"][n]) for n in ("kernel", "bias"))
  assert w1.shape == (WIDTH, 4) and w2.shape == (4, WIDTH)
  x = np.asarray(_x(), np.float64)
  h = x @ w1 + b1
  h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  got = jax.jit(plugin.apply)(params, _x())
  np.testing.assert_allclose(got, x + h @ w2 + b2, rtol=1e-4, atol=1e-5)


def test_segments_start_from_different_parameters():
  plugin = bottleneck(WIDTH, hidden=2)
  init = jax.jit(init_stacked, static_argnums=(0, 2))
  stacked = init(plugin, jax.random.key(0), SEGMENTS)
  kernels = np.asarray(stacked["Dense_0"]["kernel"])
  assert kernels.shape[0] == SEGMENTS
  assert (kernels[0] != kernels[1]).all() and (kernels[1] != kernels[2]).all()


def test_a_translation_moves_every_representation_alike():
  plugin = translation(WIDTH)
  np.testing.assert_array_equal(plugin.init(jax.random.key(0)), np.zeros(WIDTH))
  z = np.arange(WIDTH, dtype=np.float32)
  np.testing.assert_array_equal(
    plugin.apply(jnp.asarray(z), _x()), np.asarray(_x()) + z
  )


def _backbone(**options):
  backbone = sasrec(7, length=4, width=WIDTH, heads=2, **options)
  return backbone, noisy(backbone.init)


HISTORY = jnp.asarray([[0, 3, 1, 5], [2, 6, 4, 7]])


@pytest.mark.parametrize("make", [
  lambda like: low_rank(like, rank=2),
  lambda like: adapter(like, width=WIDTH, hidden=3),
])
def test_inner_plugins_start_as_the_identity_and_reach_the_states(make):
  backbone, frozen = _backbone()
  plugin = make(frozen)
  params = plugin.init(jax.random.key(0))
  run = jax.jit(
    lambda p: backbone.encode(plugin.adapt(p, frozen), HISTORY, None)
  )
  plain = backbone.encode(frozen, HISTORY, None)
  np.testing.assert_allclose(run(params), plain, rtol=1e-5, atol=1e-5)
  grad = jax.grad(lambda p: (run(p)[:, -1] ** 2).sum())(params)
  for name, of_matrix in grad.items():
    assert max(np.abs(g).max() for g in jax.tree.leaves(of_matrix)) > 0, name


def test_low_rank_adds_a_product_to_the_blocks_alone():
  _, frozen = _backbone()
  plugin = low_rank(frozen, rank=2)
  params = noisy(plugin.init)
  changed = plugin.adapt(params, frozen)
  name = "Block_0/MLP_0/Dense_0/kernel"
  want = np.asarray(frozen["Block_0"]["MLP_0"]["Dense_0"]["kernel"]) + (
    np.asarray(params[name]["a"]) @ np.asarray(params[name]["b"])
  )
  np.testing.assert_allclose(
    changed["Block_0"]["MLP_0"]["Dense_0"]["kernel"], want, rtol=1e-5
  )
  for name in ("items", "bias", "positions"):
    assert changed[name] is frozen[name]


def test_an_adapter_follows_its_blocks_mlp():
  _, frozen = _backbone(blocks=1)
  plugin = adapter(frozen, width=WIDTH, hidden=3)
  params = noisy(plugin.init)
  block = Block(2, 4 * WIDTH, 0.0, jax.nn.initializers.normal(0.02))
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.normal(size=(1, 4, WIDTH)), jnp.float32)
  windows = jnp.ones((1, 4), jnp.int32)
  plain = np.asarray(
    block.apply({"params": frozen["Block_0"]}, x, windows), np.float64
  )
  got = block.apply(
    {"params": plugin.adapt(params, frozen)["Block_0"]}, x, windows
  )
  h = plain @ np.asarray(params["Block_0"]["down"])
  h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  want = plain + h @ np.asarray(params["Block_0"]["up"])
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "message"), [
  (lambda like: low_rank({"items": jnp.ones((2, 2))}, rank=1), "LoRA"),
  (lambda like: adapter({"items": 0}, width=WIDTH, hidden=1), "adapter"),
])
def test_plugins_refuse_what_does_not_suit_them(make, message):
  with pytest.raises(InputError, match=message):
    make(_backbone()[1])


HISTORIES = [[1, 2, 3, 4, 1], [2, 3, 5, 1], [3, 1, 2]]  # before the test
SPLIT = split_of([[1, 2, 3, 4, 1, 1], [2, 3, 5, 1, 1], [3, 1, 2, 2]])
LOGITS = jnp.asarray(np.random.default_rng(3).normal(size=(3, 6)), jnp.float32)
STATES = jnp.asarray(
  np.random.default_rng(4).normal(size=(3, WIDTH)), jnp.float32
)
FEW = jnp.asarray([4, 1, 1])


def _world(*names, recent=3):
  """(options, memory, context of the last position, scores [K + R, M, V+1])."""
  options = memory.Options(
    window=2, neighbours=4, recent=recent, relations=names
  )
  built = memory.build(SPLIT, options)
  context = read_back(
    make_sequences(SPLIT), jnp.arange(3), jnp.asarray(SPLIT.test - 1), recent
  )
  scores = memory.dense(memory.lookup(built, context, options), None, 5)
  assert np.all(np.asarray(scores).any((1, 2)))
  return options, built, context, np.asarray(scores, np.float64)


def _mixed(plugin, params, built, context, want, tolerance=1e-5):
  """Asserts what a plugin makes of LOGITS, of all items and of a few."""
  run = jax.jit(plugin.mix)
  got = run(params, built, STATES, context, LOGITS, None)
  np.testing.assert_allclose(got, want, rtol=10 * tolerance, atol=tolerance)
  some = run(params, built, STATES, context, LOGITS[:, FEW], FEW)
  np.testing.assert_allclose(
    some, want[:, FEW], rtol=10 * tolerance, atol=tolerance
  )


@pytest.mark.parametrize("make", [
  memory_mix,
  lambda options: gated(WIDTH, options, hidden=4),
  lambda options: gated(WIDTH, options, hidden=4, reads_state=False),
  lambda options: gated(WIDTH, options, hidden=4, own_repeats=True),
])
def test_mixing_starts_as_the_identity_and_learns(make):
  options, built, context, _ = _world("cosine")
  plugin = make(options)
  params = plugin.init(jax.random.key(0))
  run = lambda p: plugin.mix(p, built, STATES, context, LOGITS, None)
  np.testing.assert_array_equal(run(params), LOGITS)
  grad = jax.grad(lambda p: (run(p) ** 2).sum())(params)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grad)) > 0


def test_the_memory_mix_equals_its_formula():
  options, built, context, scores = _world("linear")
  weights = np.asarray([0.5, -1.0, 2.0, 0.3])
  known = np.log(scores + 1e-3) - np.log(1e-3)
  want = LOGITS + np.einsum("k,kmv->mv", weights, known)
  _mixed(memory_mix(options), jnp.asarray(weights), built, context, want)


@pytest.mark.parametrize("names", [(), ("two_step", "linear")])
def test_the_memory_alone_equals_its_formula(names):
  options, built, context, scores = _world(*names)
  want = np.log1p(scores[:3].sum(0) / 1e-3)
  want += np.log1p(scores[3:] / 1e-3).sum(0)
  _mixed(memory_alone(options), 1.0, built, context, want)


@pytest.mark.parametrize("own_repeats, names", [
  (False, ()), (True, ()), (True, ("linear", "cosine")),
])
def test_the_gate_equals_its_formula(own_repeats, names):
  options, built, context, scores = _world(*names, recent=5)
  plugin = gated(WIDTH, options, hidden=4, own_repeats=own_repeats)
  params = noisy(plugin.init)
  activeness = np.log(SPLIT.activeness)
  activeness = (activeness - activeness.mean()) / activeness.std()
  trained = [
    item for row, end in zip(HISTORIES, SPLIT.train_end, strict=True)
    for item in row[:end]
  ]
  popular = np.log1p(np.bincount(trained, minlength=6))
  popular = (popular - popular.mean()) / popular.std()
  state = np.asarray(STATES, np.float64)
  state = state - state.mean(-1, keepdims=True)
  state = state / np.sqrt((state**2).mean(-1, keepdims=True) + 1e-5)
  features = np.concatenate([
    activeness[:, None], np.asarray([[5], [4], [3]]) / 5,
    np.log1p(scores.sum(-1).T / 1e-3) / 5, state,
  ], 1)
  if own_repeats:
    own = np.zeros((1, 3, 6))
    for user, row in enumerate(HISTORIES):
      for age, item in enumerate(reversed(row)):
        own[0, user, item] += 0.8**age
    scores = np.concatenate([scores, own])
  first, second = (wide(params[f"Dense_{i}"]) for i in range(2))
  h = np.tanh(features @ first["kernel"] + first["bias"])
  w = h @ second["kernel"] + second["bias"]
  want = (1 + w[:, :1]) * np.asarray(LOGITS) + w[:, -1:] * popular
  want += np.einsum("mk,kmv->mv", w[:, 1:-1], np.log1p(scores / 1e-3))
  _mixed(plugin, params, built, context, want, 1e-4)
