"""Plugins: identity at the start, the formula, and routing by segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pin_jax.data.batches import make_sequences, read_back
from pin_jax.models import memory, relations
from pin_jax.models.layers import Block
from pin_jax.models.plugins import (
  Consultation,
  adapter,
  bottleneck,
  gated,
  init_stacked,
  low_rank,
  make_evidence,
  memory_alone,
  memory_mix,
  translation,
)
from pin_jax.models.sasrec import sasrec
from pin_jax.types import InputError
from tests.toys import split_of

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

  @jax.jit
  def run(x):
    return plugin.apply(plugin.init(jax.random.key(1)), x)

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


def test_a_translation_moves_every_representation_alike():
  plugin = translation(WIDTH)
  np.testing.assert_array_equal(plugin.init(jax.random.key(0)), np.zeros(WIDTH))
  z = np.arange(WIDTH, dtype=np.float32)
  np.testing.assert_array_equal(
    plugin.apply(jnp.asarray(z), _x()), np.asarray(_x()) + z
  )


def _backbone(**options):
  backbone = sasrec(7, length=4, width=WIDTH, heads=2, **options)
  return backbone, _noisy(backbone.init)


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
  params = _noisy(plugin.init)
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
  params = _noisy(plugin.init)
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
  (lambda like: low_rank(like, rank=0), "plugin.rank=0"),
  (lambda like: low_rank({"items": jnp.ones((2, 2))}, rank=1), "lora"),
  (lambda like: adapter(like, width=WIDTH, hidden=0), "plugin.hidden=0"),
  (lambda like: adapter({"items": 0}, width=WIDTH, hidden=1), "adapter"),
  (lambda like: gated(WIDTH, 1, Consultation(), hidden=0), "plugin.hidden=0"),
])
def test_inner_plugins_refuse_what_does_not_suit_them(make, message):
  with pytest.raises(InputError, match=message):
    make(_backbone()[1])


def _world(recent=3):
  """(evidence, reading of the last position, split) of three users."""
  split = split_of([[1, 2, 3, 4, 1, 1], [2, 3, 5, 1, 1], [3, 1, 2, 2]])
  evidence = make_evidence(split, window=2, neighbours=4)
  users = jnp.arange(3)
  reading = read_back(
    make_sequences(split), users, jnp.asarray(split.test - 1), recent
  )
  return evidence, reading, split


LOGITS = jnp.asarray(np.random.default_rng(3).normal(size=(3, 6)), jnp.float32)
STATES = jnp.asarray(
  np.random.default_rng(4).normal(size=(3, WIDTH)), jnp.float32
)
ASKED = Consultation(recent=3)


@pytest.mark.parametrize("plugin", [
  memory_mix(3, ASKED), gated(WIDTH, 3, ASKED, hidden=4),
  gated(WIDTH, 3, ASKED, hidden=4, reads_state=False),
  gated(WIDTH, 3, ASKED, hidden=4, repeats=True),
])
def test_mixing_starts_as_the_identity_and_learns(plugin):
  evidence, reading, _ = _world()
  evidence = evidence._replace(memory=_three_channels())
  params = plugin.init(jax.random.key(0))
  run = lambda p: plugin.mix(p, evidence, STATES, reading, LOGITS, None)
  np.testing.assert_array_equal(run(params), LOGITS)
  grad = jax.grad(lambda p: (run(p) ** 2).sum())(params)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grad)) > 0


def _three_channels():
  split = _world()[2]
  return memory.build(
    split, channels=("around", "after", "next"), window=2, neighbours=4
  )


def test_the_memory_mix_equals_its_formula():
  evidence, reading, _ = _world()
  evidence = evidence._replace(memory=_three_channels())
  sparse = memory.consult(
    evidence.memory, reading, history_decay=0.8, shrink=2.0,
    popularity_power=0.25,
  )
  scores = np.asarray(memory.dense(sparse, None, 5), np.float64)
  weights = np.asarray([0.5, -1.0, 2.0])
  want = LOGITS + np.einsum("k,kmv->mv", weights, np.log(scores + 1e-3))
  want -= weights.sum() * np.log(1e-3)
  plugin = memory_mix(3, ASKED)
  got = plugin.mix(
    jnp.asarray(weights), evidence, STATES, reading, LOGITS, None
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  few = jnp.asarray([4, 1, 1])
  np.testing.assert_allclose(
    plugin.mix(
      jnp.asarray(weights), evidence, STATES, reading, LOGITS[:, few], few
    ), want[:, few], rtol=1e-4, atol=1e-5,
  )


@pytest.mark.parametrize("names", [(), ("two_step", "linear")])
def test_the_memory_alone_equals_its_formula(names):
  evidence, reading, split = _world()
  related = relations.relate(split, names, neighbours=4)
  evidence = evidence._replace(relations=related)
  scores = memory.dense(memory.consult(
    evidence.memory, reading, history_decay=0.8, shrink=2.0,
    popularity_power=0.25,
  ), None, 5)
  want = np.log1p(np.asarray(scores, np.float64).sum(0) / 1e-3)
  for k in range(len(names)):
    added = np.zeros_like(want)
    for user, row in enumerate(np.asarray(reading.items)):
      for age, item in enumerate(row):
        for b, score in zip(
          np.asarray(related.neighbours[k, item]),
          np.asarray(related.scores[k, item]), strict=True,
        ):
          added[user, b] += 0.8**age * score
    want += np.log1p(added / 1e-3)
  alone = memory_alone(ASKED).mix(
    1.0, evidence, STATES, reading, LOGITS, None
  )
  np.testing.assert_allclose(alone, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("repeats, names", [
  (False, ()), (True, ()), (True, ("linear", "cosine")),
])
def test_the_gate_equals_its_formula(repeats, names):
  evidence, reading, split = _world(recent=5)
  related = relations.relate(split, names, neighbours=4)
  evidence = evidence._replace(memory=_three_channels(), relations=related)
  plugin = gated(
    WIDTH, 3 + len(names), Consultation(recent=5), hidden=4, repeats=repeats
  )
  params = _noisy(plugin.init)
  sparse = memory.consult(
    evidence.memory, reading, history_decay=0.8, shrink=2.0,
    popularity_power=0.25,
  )
  scores = np.asarray(memory.dense(sparse, None, 5), np.float64)
  for k in range(len(names)):
    table, added = np.zeros((6, 6)), np.zeros((1, 3, 6))
    for a in range(6):
      for b, score in zip(
        related.neighbours[k, a], related.scores[k, a], strict=True
      ):
        table[a, b] += score
    for user, row in enumerate([[1, 2, 3, 4, 1], [2, 3, 5, 1], [3, 1, 2]]):
      for age, item in enumerate(reversed(row)):
        added[0, user] += 0.8**age * table[item]
    assert added.any()
    scores = np.concatenate([scores, added])
  known = np.log1p(scores / 1e-3)
  activeness = np.log(split.activeness)
  activeness = (activeness - activeness.mean()) / activeness.std()
  counts = np.zeros(6)
  for user, end in enumerate(split.train_end):
    first = split.interactions.offsets[user]
    for item in split.interactions.items[first : first + end]:
      counts[item] += 1
  popular = np.log1p(counts)
  popular = (popular - popular.mean()) / popular.std()
  features_of = np.log1p(scores.sum(-1).T / 1e-3) / 5
  if repeats:
    own = np.zeros((1, 3, 6))
    for user, row in enumerate([[1, 2, 3, 4, 1], [2, 3, 5, 1], [3, 1, 2]]):
      for age, item in enumerate(reversed(row)):  # what comes before the test
        own[0, user, item] += 0.8**age
    known = np.concatenate([known, np.log1p(own / 1e-3)])
    assert own[0, 0, 1] == pytest.approx(1 + 0.8**4)
  state = np.asarray(STATES, np.float64)
  state = state - state.mean(-1, keepdims=True)
  state = state / np.sqrt((state**2).mean(-1, keepdims=True) + 1e-5)
  features = np.concatenate([
    activeness[:, None],
    (np.asarray(reading.items) > 0).mean(1, keepdims=True),
    features_of, state,
  ], 1)
  dense = [
    (np.asarray(params[n]["kernel"]), np.asarray(params[n]["bias"]))
    for n in ("Dense_0", "Dense_1")
  ]
  h = np.tanh(features @ dense[0][0] + dense[0][1])
  w = h @ dense[1][0] + dense[1][1]
  want = (1 + w[:, :1]) * np.asarray(LOGITS) + w[:, -1:] * popular
  want += np.einsum("mk,kmv->mv", w[:, 1:-1], known)
  got = plugin.mix(params, evidence, STATES, reading, LOGITS, None)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
  few = jnp.asarray([4, 1, 1])
  np.testing.assert_allclose(
    plugin.mix(params, evidence, STATES, reading, LOGITS[:, few], few),
    want[:, few], rtol=1e-3, atol=1e-3,
  )
