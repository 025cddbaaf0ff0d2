"""What every backbone keeps, and each of them against its numpy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import scipy.special
from references import BUILDERS, ITEMS, LENGTH, WIDTH, wide
from toys import noisy

from pin_jax.data.batches import Sequences
from pin_jax.evaluation.ranking import make_ranker
from pin_jax.models.backbones import tied_score
from pin_jax.models.plugins import Model, Weights, bottleneck
from pin_jax.training import objectives
from pin_jax.types import Batch, InputError, Plugin, Requests

HISTORY = np.asarray(
  [
    [0, 0, 0, 5, 2, 9, 4, 1],
    [7, 3, 11, 8, 12, 6, 10, 2],
    [0, 0, 0, 0, 0, 0, 0, 3],
    [0, 0, 0, 0, 0, 0, 0, 0],
  ]
)


pytestmark = pytest.mark.usefixtures("compile_quickly", "few_at_a_time")


def _scorer(backbone):
  """(params, history, key, candidates) -> logits [B, L, C], jitted."""

  @jax.jit
  def run(params, history, key=None, candidates=None):
    rows, columns = jnp.indices(history.shape).reshape(2, -1)
    context = backbone.encode(params, history, key)
    states = backbone.at(context, rows, columns)
    represented = backbone.represent(params, states, candidates)
    logits = backbone.score(params, represented, candidates)
    return logits.reshape(*history.shape, -1)

  return run


@pytest.fixture(scope="module", params=BUILDERS)
def name(request):
  return request.param


@pytest.fixture(scope="module")
def model(name):
  backbone = BUILDERS[name](dropout=0.5)
  return backbone, noisy(backbone.init), _scorer(backbone)


@pytest.fixture(scope="module")
def logits(model):
  _, params, run = model
  return np.asarray(run(params, HISTORY))


def test_logits_equal_a_numpy_loop_over_every_prefix(name, model, logits):
  _, params, _ = model
  for row, column in np.argwhere(HISTORY > 0):
    read = HISTORY[row, : column + 1]
    want = getattr(references, name)(
      params, read[read > 0], later=LENGTH - 1 - column
    )
    np.testing.assert_allclose(
      logits[row, column], want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("name", "options"), [
  ("sasrec", {"blocks": 2}), ("gru4rec", {"layers": 2}),
  ("hstu", {"blocks": 2, "heads": 1}), ("hstu", {"blocks": 2, "heads": 4}),
])
def test_stacked_layers_equal_numpy(name, options):
  backbone = BUILDERS[name](**options)
  params = noisy(backbone.init)
  states = jax.jit(backbone.encode)(params, HISTORY[:2])[:, -1:]
  got = tied_score(params, states, None)
  for row, logits in zip(HISTORY[:2], got, strict=True):
    want = getattr(references, name)(params, row[row > 0], **options)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_start_is_finite(name, model):
  backbone, _, run = model
  params = jax.jit(backbone.init)(jax.random.key(0))
  assert params["items"].shape == (ITEMS + 1, WIDTH)
  np.testing.assert_array_equal(params.get("bias", 0), 0)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  out = np.asarray(run(params, HISTORY))
  assert np.isfinite(out).all() and out.std() > 0 and np.abs(out).max() < 100


def test_a_state_reads_the_items_up_to_its_position_and_no_other(name, model):
  _, params, run = model
  row, candidate = HISTORY[:1], 12

  def read(table):
    other = {**params, "items": table}
    return run(other, row, None, jnp.asarray([candidate]))[0, :, 0]

  jacobian = jax.jit(jax.jacobian(read))(params["items"])  # [L, V+1, D]
  reads = np.abs(jacobian).sum(-1) > 0
  for t in range(LENGTH):
    want = (set(row[0, : t + 1]) if row[0, t] else {0}) - {0}
    assert set(np.flatnonzero(reads[t])) - {candidate} == want


def test_left_padding_does_not_matter(model, logits):
  _, params, run = model
  short = run(params, HISTORY[:1, 3:])
  np.testing.assert_allclose(short, logits[:1, 3:], rtol=1e-5, atol=1e-5)


def test_states_of_padding_hold_nothing(model):
  backbone, params, _ = model

  @jax.jit
  def represent(params):
    rows, columns = np.nonzero(HISTORY == 0)
    states = backbone.at(backbone.encode(params, HISTORY, None), rows, columns)
    return backbone.represent(params, states, jnp.asarray([3, 4]))

  np.testing.assert_array_equal(represent(params), 0)


def test_dropout_follows_the_key(model, logits):
  _, params, run = model
  keys = jax.random.split(jax.random.key(0), 2)
  first, again, second = (
    np.asarray(run(params, HISTORY, keys[i])) for i in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first[1] != second[1]).any()
  assert (first[1] != logits[1]).any()
  np.testing.assert_array_equal(first[HISTORY == 0], logits[HISTORY == 0])


@pytest.mark.parametrize("form", ["shared", "own"])
def test_candidates_give_columns_of_the_full_scores(model, logits, form):
  _, params, run = model
  rng = np.random.default_rng(0)
  rows = HISTORY.size
  candidates = {
    "shared": np.asarray([4, 0, 12, 4, 7]),
    "own": rng.integers(0, ITEMS + 1, (rows, 5)),
  }[form]
  got = np.asarray(run(params, HISTORY, None, candidates))
  index = np.broadcast_to(candidates, (rows, candidates.shape[-1]))
  want = np.take_along_axis(logits.reshape(rows, -1), index, -1)
  np.testing.assert_allclose(
    got.reshape(rows, -1), want, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(("name", "options", "message"), [
  ("sasrec", {"width": 6, "heads": 4}, "width=6.*heads=4"),
  ("hstu", {"width": 6, "heads": 4}, "width=6.*heads=4"),
  ("sasrec", {"width": 8, "heads": 0}, "heads=0"),
])
def test_bad_options_are_named_in_one_line(name, options, message):
  with pytest.raises(InputError, match=message) as error:
    BUILDERS[name](**options)
  assert "\n" not in str(error.value)


def test_long_histories_are_refused(model):
  backbone, params, _ = model
  with pytest.raises(InputError, match="a history of 9 .* length=8"):
    backbone.encode(params, jnp.ones((1, LENGTH + 1), jnp.int32), None)


def _batch():
  """Windows of 7, 4 and 3 items and one of padding alone."""
  rng = np.random.default_rng(3)
  sequences = np.zeros((4, 7), np.int32)
  for row, count in enumerate((7, 4, 3)):
    sequences[row, -count:] = rng.integers(1, ITEMS + 1, count)
  targets = np.where(sequences[:, :-1] > 0, sequences[:, 1:], 0)
  return Batch(*map(jnp.asarray, (range(4), sequences[:, :-1], targets)))


def _position_losses(name, params, batch):
  """(row, loss) of every real position, one history at a time."""
  _, histories, rows = map(np.asarray, batch[:3])
  for row, (history, targets) in enumerate(zip(histories, rows, strict=True)):
    for t in np.flatnonzero(targets):
      read = history[: t + 1]
      logits = getattr(references, name)(
        params, read[read > 0], later=len(history) - 1 - t
      )[1:]
      yield row, scipy.special.logsumexp(logits) - logits[targets[t] - 1]


def test_group_loss_and_its_gradient(name, model):
  backbone, params, _ = model
  batch = _batch()
  loss = objectives.group_losses(
    BUILDERS[name](dropout=0.0), mean="users"
  ).group_loss
  group = objectives.GroupBatch(batch, None)
  run = jax.jit(jax.value_and_grad(loss))
  got, grad = run(params, group, jax.random.key(0))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))

  def reference(params):
    rows = [[], [], []]
    for row, value in _position_losses(name, params, batch):
      rows[row].append(value)
    return np.mean([np.mean(r) for r in rows])

  start = wide(params)
  np.testing.assert_allclose(got, reference(start), rtol=1e-5)
  direction = wide(noisy(backbone.init, 7))
  step = lambda s: jax.tree.map(lambda p, d: p + s * d, start, direction)
  slope = (reference(step(1e-5)) - reference(step(-1e-5))) / 2e-5
  products = jax.tree.map(lambda g, d: np.sum(g * d), wide(grad), direction)
  np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-3)


def _requests():
  items = np.asarray([3, 9, 1, 12, 5, 7, 7, 2, 10, 4, 6, 8], np.int32)
  starts = np.asarray([0, 5, 9], np.int32)
  sequences = Sequences(
    jnp.asarray(items), jnp.asarray(starts), jnp.zeros(3, jnp.int32)
  )
  requests = Requests(
    np.arange(3), np.asarray([4, 3, 2]), np.asarray([1, 0, 1])
  )
  return items, starts, sequences, requests


def test_ranks_with_plugins_equal_brute_force(name, model):
  backbone, params, _ = model
  plugin = Plugin(lambda key: jnp.ones(()), lambda p, x: p * x)
  factors = np.asarray([1.0, -2.0], np.float32)
  items, starts, sequences, requests = _requests()
  rank = make_ranker(
    Model(backbone, plugin), num_items=ITEMS, length=6
  )
  got = rank(Weights(params, factors), sequences, requests)
  for i in range(3):
    first, last = starts[i], starts[i] + requests.positions[i]
    factor = factors[requests.segments[i]]
    logits = getattr(references, name)(params, items[first:last], factor)
    above = set(np.flatnonzero(logits > logits[items[last]] + 1e-6)) - {0}
    assert got.rank_unmasked[i] == 1 + len(above)
    assert got.rank[i] == 1 + len(above - set(items[first:last]))


def test_plugin_training_starts_at_the_backbones_loss(name, model):
  backbone, frozen, _ = model
  batch, plugin = _batch(), bottleneck(WIDTH, hidden=2)
  params = jax.jit(plugin.init)(jax.random.key(1))
  loss = objectives.next_item_loss(
    objectives.with_plugin_context(backbone),
    objectives.plugin_head(backbone, plugin),
  )

  @jax.jit
  @jax.value_and_grad
  def run(params, frozen):
    context = backbone.encode(frozen, batch.history, None)
    weights = objectives.position_weights(batch.targets, "interactions")
    return loss(
      params, (frozen, None), (context, None), batch.targets, weights
    )[0]

  value, grad = run(params, frozen)
  losses = [x for _, x in _position_losses(name, frozen, batch)]
  np.testing.assert_allclose(value, np.mean(losses), rtol=1e-5)
  assert np.abs(grad["Dense_1"]["kernel"]).max() > 0


def test_dropout_of_gru4rec_acts_behind_the_last_layer():
  backbone = BUILDERS["gru4rec"](dropout=0.5)
  params = noisy(backbone.init)
  states = jax.jit(backbone.encode)(params, HISTORY, jax.random.key(1))
  assert 0.2 < np.mean(np.asarray(states[1]) == 0) < 0.8
