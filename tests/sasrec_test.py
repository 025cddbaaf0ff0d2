"""SASRec against a numpy transformer; other architectures, one interface."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pin_jax import objectives
from pin_jax.backbones import sasrec as lib
from pin_jax.batches import Sequences
from pin_jax.evaluation import Model, Requests, Weights, make_ranker
from pin_jax.plugins import bottleneck
from pin_jax.types import Backbone, Batch, InputError, Plugin

ITEMS, LENGTH, WIDTH = 12, 8, 4
HISTORY = np.asarray(
  [
    [0, 0, 0, 5, 2, 9, 4, 1],
    [7, 3, 11, 8, 12, 6, 10, 2],
    [0, 0, 0, 0, 0, 0, 0, 3],
    [0, 0, 0, 0, 0, 0, 0, 0],
  ]
)


def _noisy(init, seed=0, scale=0.5):
  """Random parameters of the shapes that `init` gives."""
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
  return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture(scope="module")
def model():
  backbone = lib.sasrec(ITEMS, length=LENGTH, width=WIDTH, dropout=0.5)
  return backbone, _noisy(backbone.init), jax.jit(backbone.encode)


def _norm(p, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x * p["scale"] + p["bias"]


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _dense(p, x):
  return x @ p["kernel"] + p["bias"]


def _attend(p, x, mask):
  out = np.zeros_like(x) + p["out"]["bias"]
  for head in range(p["query"]["kernel"].shape[1]):
    query, key, value = (
      x @ p[n]["kernel"][:, head] + p[n]["bias"][head]
      for n in ("query", "key", "value")
    )
    for t in range(len(x)):
      read = [s for s in range(t + 1) if mask[s] or s == t]
      logits = key[read] @ query[t] / math.sqrt(query.shape[-1])
      pooled = scipy.special.softmax(logits) @ value[read]
      out[t] += pooled @ p["out"]["kernel"][head]
  return out


def _encode_row(params, history, blocks):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  mask = history > 0
  x = p["items"][history] * math.sqrt(WIDTH) + p["positions"][-len(history):]
  x = x * mask[:, None]
  for i in range(blocks):
    block = p[f"Block_{i}"]
    attention, mlp = block["CausalAttention_0"], block["MLP_0"]
    x = x + _attend(attention, _norm(block["LayerNorm_0"], x), mask)
    h = _gelu(_dense(mlp["Dense_0"], _norm(block["LayerNorm_1"], x)))
    x = x + _dense(mlp["Dense_1"], h)
  return _norm(p["LayerNorm_0"], x) * mask[:, None]


def test_encoder_equals_a_numpy_transformer(model):
  _, params, encode = model
  want = [_encode_row(params, row, blocks=2) for row in HISTORY]
  np.testing.assert_allclose(
    encode(params, HISTORY), want, rtol=1e-4, atol=1e-4
  )


def test_start_is_finite_and_unbiased():
  backbone = lib.sasrec(ITEMS, length=LENGTH, width=WIDTH)
  params = jax.jit(backbone.init)(jax.random.key(0))
  assert params["items"].shape == (ITEMS + 1, WIDTH)
  np.testing.assert_array_equal(params["bias"], 0)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_state_reads_the_items_up_to_its_position_and_no_other(model):
  backbone, params, _ = model
  row = HISTORY[:1]

  def read(table):
    return backbone.encode({**params, "items": table}, row, None)[0]

  jacobian = jax.jit(jax.jacobian(read))(params["items"])  # [L, D, V+1, D]
  reads = np.abs(jacobian).sum((1, 3)) > 0
  for t in range(LENGTH):
    want = set(row[0, : t + 1]) - {0} if row[0, t] else set()
    assert set(np.flatnonzero(reads[t])) == want


def test_the_embedding_of_padding_has_no_influence(model):
  _, params, encode = model
  other = {**params, "items": params["items"].at[0].set(-1e6)}
  np.testing.assert_array_equal(
    encode(other, HISTORY), encode(params, HISTORY)
  )


def test_left_padding_does_not_matter(model):
  backbone, params, encode = model
  short = jax.jit(backbone.encode)(params, HISTORY[:1, 3:])
  padded = encode(params, HISTORY)[:1, 3:]
  np.testing.assert_allclose(short, padded, rtol=1e-5, atol=1e-5)


def test_states_of_padding_are_zero(model):
  _, params, encode = model
  np.testing.assert_array_equal(encode(params, HISTORY)[HISTORY == 0], 0)


def test_a_user_does_not_depend_on_the_batch(model):
  _, params, encode = model
  other = HISTORY.copy()
  other[[0, 2, 3]] = np.arange(1, 9)
  np.testing.assert_array_equal(
    encode(params, other)[1], encode(params, HISTORY)[1]
  )


def test_dropout_follows_the_key(model):
  _, params, encode = model
  keys = jax.random.split(jax.random.key(0), 2)
  first, again, second = (
    np.asarray(encode(params, HISTORY, keys[i])) for i in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first[1] != second[1]).any()
  assert (first[1] != np.asarray(encode(params, HISTORY))[1]).any()
  np.testing.assert_array_equal(first[HISTORY == 0], 0)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"width": 6, "heads": 4}, "width=6.*heads=4"),
    ({"width": 8, "heads": 0}, "heads=0"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"dropout": -0.1}, "dropout=-0.1"),
  ],
)
def test_bad_options_are_named_in_one_line(options, message):
  with pytest.raises(InputError, match=message) as error:
    lib.sasrec(ITEMS, **options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["shared", "own", "one", "all"])
@pytest.mark.parametrize("per_candidate", [False, True])
def test_tied_score_equals_a_loop(form, per_candidate):
  rng = np.random.default_rng(0)
  params = {
    "items": rng.normal(size=(ITEMS + 1, WIDTH)).astype(np.float32),
    "bias": rng.normal(size=ITEMS + 1).astype(np.float32),
  }
  rows = 3
  candidates = {
    "shared": np.asarray([4, 0, 12, 4, 7]),
    "own": rng.integers(0, ITEMS + 1, (rows, 5)),
    "one": rng.integers(0, ITEMS + 1, (rows, 1)),
    "all": None,
  }[form]
  index = np.arange(ITEMS + 1) if form == "all" else candidates
  index = np.broadcast_to(index, (rows, index.shape[-1]))
  k = index.shape[1] if per_candidate else 1
  states = rng.normal(size=(rows, k, WIDTH)).astype(np.float32)
  got = jax.jit(lib.tied_score)(params, states, candidates)
  want = np.zeros(index.shape)
  for m in range(rows):
    for c, v in enumerate(index[m]):
      state = states[m, c if per_candidate else 0].astype(np.float64)
      want[m, c] = state @ params["items"][v] + params["bias"][v]
  assert got.shape == index.shape and got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tied_score_accumulates_bfloat16_in_float32():
  ones = jnp.ones((2, 1001), jnp.bfloat16)
  params = {"items": ones, "bias": jnp.zeros(2)}
  got = lib.tied_score(params, ones[:1, None], None)
  np.testing.assert_array_equal(got, [[1001, 1001]])


def _toy_table(key):
  return {
    "items": jax.random.normal(key, (ITEMS + 1, WIDTH)),
    "bias": jnp.zeros(ITEMS + 1),
  }


def _din():
  """Target attention: the candidate decides what is read of the history."""

  def init(key):
    return {**_toy_table(key), "mix": jnp.eye(WIDTH)}

  def encode(params, history, key=None):
    del key
    return params["items"][history] @ params["mix"], history > 0

  def at(context, rows, columns):
    past, mask = context
    seen = jnp.arange(mask.shape[1]) <= columns[:, None]
    return past[rows], mask[rows] & seen

  def represent(params, states, candidates):
    past, mask = states
    table = params["items"]
    table = table if candidates is None else table[candidates]
    spec = "mld,cd->mcl" if table.ndim == 2 else "mld,mcd->mcl"
    logits = jnp.einsum(spec, past, table)
    logits = jnp.where(mask[:, None], logits, -1e9)
    weights = jax.nn.softmax(logits) * mask[:, None]
    return jnp.einsum("mcl,mld->mcd", weights, past)

  return Backbone(init, encode, at, represent, lib.tied_score)


def _din_logits(params, history):
  """[V+1] logits after one history without padding, by loops."""
  past = [params["items"][v] @ params["mix"] for v in history]
  logits = []
  for v in range(ITEMS + 1):
    e = params["items"][v]
    weights = scipy.special.softmax([p @ e for p in past])
    pooled = sum(w * p for w, p in zip(weights, past, strict=True))
    logits.append(pooled @ e + params["bias"][v])
  return np.asarray(logits)


def _gru():
  """A minimal gated recurrent unit; its state ignores the candidate."""

  def init(key):
    square = lambda: jnp.zeros((WIDTH, WIDTH))
    return {**_toy_table(key), "z": square(), "u": square()}

  def encode(params, history, key=None):
    del key

    def cell(h, v):
      e = params["items"][v]
      z = jax.nn.sigmoid(e @ params["z"])
      new = (1 - z) * h + z * jnp.tanh(e + h @ params["u"])
      h = jnp.where((v > 0)[:, None], new, h)
      return h, h

    start = jnp.zeros((history.shape[0], WIDTH))
    return jax.lax.scan(cell, start, history.T)[1].swapaxes(0, 1)

  return Backbone(
    init, encode, lib.take_position, lib.add_candidate_axis, lib.tied_score
  )


def _gru_logits(params, history):
  h = np.zeros(WIDTH)
  for v in history:
    e = params["items"][v]
    z = scipy.special.expit(e @ params["z"])
    h = (1 - z) * h + z * np.tanh(e + h @ params["u"])
  return params["items"] @ h + params["bias"]


TOYS = {"din": (_din, _din_logits), "gru": (_gru, _gru_logits)}
TOY_NAMES = tuple(TOYS)


def _wide(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def _position_losses(logits_of, params, batch):
  """(row, loss) of every real position, one history at a time."""
  _, histories, rows = map(np.asarray, batch)
  for row, (history, targets) in enumerate(zip(histories, rows, strict=True)):
    for t in np.flatnonzero(targets):
      read = history[: t + 1]
      logits = logits_of(params, read[read > 0])[1:]
      yield row, scipy.special.logsumexp(logits) - logits[targets[t] - 1]


def _toy_batch():
  rng = np.random.default_rng(3)
  sequences = np.zeros((3, 7), np.int32)
  for row, count in enumerate((7, 4, 3)):
    sequences[row, -count:] = rng.integers(1, ITEMS + 1, count)
  targets = np.where(sequences[:, :-1] > 0, sequences[:, 1:], 0)
  return Batch(*map(jnp.asarray, (range(3), sequences[:, :-1], targets)))


@pytest.mark.parametrize("name", TOY_NAMES)
def test_group_loss_takes_any_architecture(name):
  build, logits_of = TOYS[name]
  backbone, batch = build(), _toy_batch()
  params = _noisy(backbone.init)
  loss = objectives.group_losses(backbone, mean="users", chunk=4).group_loss
  group = objectives.GroupBatch(batch, None)
  run = jax.jit(jax.value_and_grad(loss))
  got, grad = run(params, group, jax.random.key(0))

  def reference(params):
    rows = [[], [], []]
    for row, value in _position_losses(logits_of, params, batch):
      rows[row].append(value)
    return np.mean([np.mean(r) for r in rows])

  wide = _wide(params)
  np.testing.assert_allclose(got, reference(wide), rtol=1e-5)
  direction = _wide(_noisy(backbone.init, 7))
  step = lambda s: jax.tree.map(lambda p, d: p + s * d, wide, direction)
  slope = (reference(step(1e-5)) - reference(step(-1e-5))) / 2e-5
  products = jax.tree.map(lambda g, d: np.sum(g * d), _wide(grad), direction)
  np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-3)


def _toy_requests():
  items = np.asarray([3, 9, 1, 12, 5, 7, 7, 2, 10, 4, 6, 8], np.int32)
  starts = np.asarray([0, 5, 9], np.int32)
  sequences = Sequences(
    jnp.asarray(items), jnp.asarray(starts), jnp.zeros(3, jnp.int32)
  )
  requests = Requests(
    np.arange(3), np.asarray([4, 3, 2]), np.asarray([1, 0, 1])
  )
  return items, starts, sequences, requests


@pytest.mark.parametrize("name", TOY_NAMES)
@pytest.mark.parametrize("item_chunk", [100, 5])
def test_ranker_takes_any_architecture_with_plugins(name, item_chunk):
  build, logits_of = TOYS[name]
  backbone = build()
  params = _noisy(backbone.init, scale=1.0)
  plugin = Plugin(lambda key: jnp.ones(()), lambda p, x: p * x)
  factors = np.asarray([1.0, -2.0], np.float32)
  items, starts, sequences, requests = _toy_requests()
  rank = make_ranker(
    Model(backbone, plugin), num_items=ITEMS, length=6, item_chunk=item_chunk
  )
  got = rank(Weights(params, factors), sequences, requests)
  wide = {**_wide(params), "bias": np.zeros(ITEMS + 1)}
  for i in range(3):
    first, last = starts[i], starts[i] + requests.positions[i]
    factor = factors[requests.segments[i]]
    logits = factor * logits_of(wide, items[first:last])
    logits += np.asarray(params["bias"])
    above = np.flatnonzero(logits > logits[items[last]] + 1e-6)
    above = set(above) - {0}
    assert got.rank_unmasked[i] == 1 + len(above)
    assert got.rank[i] == 1 + len(above - set(items[first:last]))


@pytest.mark.parametrize("name", TOY_NAMES)
def test_plugin_training_takes_any_architecture(name):
  build, logits_of = TOYS[name]
  backbone, batch = build(), _toy_batch()
  plugin = bottleneck(WIDTH)
  frozen = _noisy(backbone.init)
  params = jax.jit(plugin.init)(jax.random.key(1))
  loss = objectives.next_item_loss(
    backbone, objectives.plugin_head(backbone, plugin), chunk=4
  )

  @jax.jit
  @jax.value_and_grad
  def run(params, frozen):
    context = backbone.encode(frozen, batch.history, None)
    weights = objectives.position_weights(batch.targets, "interactions")
    return loss(params, frozen, context, batch.targets, weights)

  value, grad = run(params, frozen)
  losses = [x for _, x in _position_losses(logits_of, _wide(frozen), batch)]
  np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
  assert np.abs(grad["Dense_1"]["kernel"]).max() > 0
