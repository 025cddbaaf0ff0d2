"""Activeness as an input of the backbone: against numpy, packed, everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import scipy.special
from etils import epath
from references import BUILDERS, ITEMS, LENGTH, WIDTH
from toys import noisy

import tests.tiny
from experiments import build, stages
from experiments.methods import selected, stages_of
from experiments.problem import make_problem
from pin_jax import serving
from pin_jax.data import batches, splits, stored
from pin_jax.data.interactions import from_columns
from pin_jax.evaluation import ranking
from pin_jax.models import packing, plugins
from pin_jax.models.backbones import conditioned, given
from pin_jax.scale import sharding, streaming
from pin_jax.training import objectives
from pin_jax.types import Batch, Requests

HISTORY = np.asarray([
  [0, 0, 0, 5, 2, 9, 4, 1],
  [7, 3, 11, 8, 12, 6, 10, 2],
  [0, 0, 0, 0, 0, 0, 0, 3],
  [0, 0, 0, 0, 0, 0, 9, 9],
])
ACTIVENESS = np.asarray([7, 70_000, 1, 8], np.int32)  # of buckets 2, 15, 0, 3

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module", params=[
  "sasrec",
  *(pytest.param(x, marks=pytest.mark.slow) for x in [*BUILDERS][1:]),
])
def name(request):
  return request.param


@pytest.fixture(scope="module")
def model(name):
  backbone = conditioned(BUILDERS[name]())
  return backbone, noisy(backbone.init)


def logits_of(backbone, params, history, activeness):
  """[B, L, V+1], by way of packed rows where the backbone is packed."""

  @jax.jit
  def run(params, history, activeness):
    rows, columns = jnp.indices(history.shape).reshape(2, -1)
    read = given(backbone, history, activeness)
    states = backbone.at(
      packing.encode(backbone, params, read), rows, columns
    )
    represented = backbone.represent(params, states, None)
    logits = backbone.score(params, represented, None)
    return logits.reshape(*history.shape, -1)

  return np.asarray(run(params, history, activeness))


@pytest.mark.parametrize("packed", [0, 3])
def test_logits_equal_a_numpy_loop_over_every_prefix(name, model, packed):
  backbone, params = model
  backbone = backbone._replace(packed=packed)
  got = logits_of(backbone, params, HISTORY, ACTIVENESS)
  moved = 0
  for row, column in np.argwhere(HISTORY > 0):
    read = HISTORY[row, : column + 1]
    want = getattr(references, name)(
      params, read[read > 0], later=LENGTH - 1 - column, told=ACTIVENESS[row]
    )
    np.testing.assert_allclose(got[row, column], want, rtol=1e-4, atol=1e-4)
    plain = getattr(references, name)(
      params, read[read > 0], later=LENGTH - 1 - column
    )
    moved += np.abs(want - plain).max() > 1e-3
  assert moved == (HISTORY > 0).sum()


def test_the_start_is_the_plain_model_to_the_bit(name, model):
  backbone, plain = model[0], BUILDERS[name]()
  params = backbone.init(jax.random.key(3))
  without = plain.init(jax.random.key(3))
  table = params.pop("activeness")
  jax.tree.map(np.testing.assert_array_equal, params, without)
  assert table.shape == (16, WIDTH) and not table.any()
  params["activeness"] = table
  np.testing.assert_array_equal(
    logits_of(backbone, params, HISTORY, ACTIVENESS),
    logits_of(plain, without, HISTORY, ACTIVENESS),
  )


def test_histories_without_activeness_are_refused(model):
  backbone, params = model
  with pytest.raises(ValueError, match="reads activeness; give"):
    logits_of(backbone, params, HISTORY, None)


@pytest.mark.parametrize("packed", [0, 2])
def test_the_loss_of_groups_reads_each_users_activeness(name, model, packed):
  backbone, params = model
  cut = np.where(HISTORY[:, 1:] > 0, HISTORY[:, :-1], 0)
  history = np.pad(cut, [(0, 0), (1, 0)])
  targets, users = np.where(history > 0, HISTORY, 0), np.arange(4)
  stack = lambda x: jnp.asarray(np.stack([x, x[::-1]]), jnp.int32)
  batch = Batch(*map(stack, (users, history, targets, users, ACTIVENESS)))
  losses = objectives.group_losses(
    backbone._replace(packed=packed), mean="interactions"
  )
  args = objectives.GroupBatch(batch, None), jax.random.split(
    jax.random.key(0), 2
  ), jnp.asarray([0.3, 0.7])
  run = jax.jit(jax.value_and_grad(losses.weighted_loss, has_aux=True))
  (value, _), gradient = run(params, *args)
  used = np.abs(gradient["activeness"]).max(1) > 0
  # The row of activeness 1 has no target.
  np.testing.assert_array_equal(np.flatnonzero(used), [2, 3, 15])
  logits = logits_of(backbone, params, history, ACTIVENESS)[..., 1:]
  logs = scipy.special.log_softmax(logits, -1)[targets > 0]
  own = logs[np.arange(len(logs)), targets[targets > 0] - 1]
  np.testing.assert_allclose(value, -own.mean(), rtol=1e-5)


USERS = 40


@pytest.fixture(scope="module")
def split():
  rng = np.random.default_rng(1)
  users = np.repeat(np.arange(USERS), rng.integers(3, 40, USERS))
  items = rng.integers(0, ITEMS, len(users))
  items[:ITEMS] = np.arange(ITEMS)
  return splits.leave_one_out(from_columns(users, items))


def test_batches_tell_the_training_interactions_alone(split):
  counted = split.interactions.lengths - 2  # all but validation and test
  sequences, key = batches.make_sequences(split), jax.random.key(0)
  sizes = {"batch_size": 30, "length": LENGTH}
  pool = batches.make_pool(
    batches.training_targets(split), np.zeros(USERS, int), num_groups=1,
    length=LENGTH,
  )
  held_out = batches.make_held_out(
    split.validation, np.zeros(USERS, int), num_groups=1
  )
  for batch in (
    batches.Draw(**sizes, draw="users").batch(key, sequences, pool),
    batches.Draw(**sizes, draw="validation").batch(key, sequences, held_out),
  ):
    users = np.asarray(batch.users)
    assert len(np.unique(users)) > 10
    np.testing.assert_array_equal(batch.activeness, counted[users])


def ranks_by_hand(params, split, positions, activeness):
  """Rank of the item at each user's position, nothing masked, by GRU4Rec."""
  data, out = split.interactions, []
  for user, position in enumerate(positions):
    own = data.items[data.offsets[user] : data.offsets[user + 1]]
    read = own[max(position - LENGTH, 0) : position]
    logits = references.gru4rec(params, read, told=activeness[user])
    out.append(1 + (logits[1:] > logits[own[position]] + 1e-6).sum())
  return np.asarray(out)


def test_ranks_read_training_activeness_in_validation_and_test(split, tmp_path):
  stored.write(split.interactions, tmp_path / "data")
  on_disk = batches.host_sequences(
    splits.leave_one_out(stored.read(tmp_path / "data"))
  )
  backbone = conditioned(BUILDERS["gru4rec"]())
  params = noisy(backbone.init)
  params["activeness"] *= 4
  weights = plugins.Weights(params, None)
  rank = ranking.make_ranker(
    plugins.Model(backbone, None), num_items=ITEMS, length=LENGTH
  )
  streamed = streaming.make_ranker(
    rank, on_disk, users=16, layout=sharding.LOCAL
  )
  users = np.arange(USERS)
  counted = split.interactions.lengths - 2
  for positions in (split.validation, split.test):
    requests = Requests(users, positions, users * 0)
    got = rank(weights, batches.make_sequences(split), requests)
    want = ranks_by_hand(params, split, positions, counted)
    np.testing.assert_array_equal(got.rank_unmasked, want)
    whole = ranks_by_hand(params, split, positions, 4 * counted)
    assert (want != whole).any()
    again = streamed(weights, None, requests)
    np.testing.assert_array_equal(again.rank_unmasked, want)


@pytest.mark.parametrize("way", ["made", "loaded"])
@pytest.mark.parametrize("name", ["gru4rec", "din"])
def test_serving_tells_training_interactions_or_those_given(
  split, tmp_path, name, way
):
  backbone = conditioned(BUILDERS[name]())
  params = noisy(backbone.init)
  model = serving.make(
    [plugins.Model(backbone, None)], serving.Routes(
      [plugins.Weights(params, None)], [0], *np.zeros((2, USERS), int), (0, 0)
    ), split, length=LENGTH, origin={},
  )
  if way == "loaded":
    serving.save(model, tmp_path / "model.pin", ["cpu"])
    model = serving.load(tmp_path / "model.pin")
  data = split.interactions
  own = data.items[data.offsets[3] : data.offsets[4]].tolist()
  cases = (  # (id, indices of the history, activeness)
    (None, own[:9], 9), (None, own[:2], 2), (3, own[:2], len(own) - 2),
  )
  table = model.recommend(
    [user for user, _, _ in cases],
    histories=[data.item_ids[np.asarray(h) - 1].tolist() for _, h, _ in cases],
    k=ITEMS, mask_history=False,
  )
  for k, (_, history, told) in enumerate(cases):
    want = getattr(references, name)(params, history[-LENGTH:], told=told)[1:]
    part = table.filter(table["request"] == k).sort("item")
    np.testing.assert_allclose(part["score"], want, rtol=1e-4, atol=1e-4)


def tiny(**changes):
  made = tests.tiny.get_config()
  made.backbone.update(name="gru4rec", blocks=2)
  made.backbone_steps, made.plugin_steps, made.dispatch = 10, 10, 10
  made.update_from_flattened_dict(changes)
  build.check(made)
  return made


def trained(made, workdir):
  problem = make_problem(made)
  networks = build.networks_of(made, problem)
  out = stages.Trainer(made, problem, networks, epath.Path(workdir), (0,))
  for stage in stages_of(selected(made)):
    out.train(stage)
  return {name: found[0].best for name, found in out.trained.items()}


def test_the_row_trains_the_table_and_leaves_the_base_alone(tmp_path):
  changes = {
    "loss.name": "sampled_softmax", "loss.negatives": 9,
    "optimizer.tables": "row_sparse",
  }
  both = tiny(methods=("base", "base_activeness"), **changes)
  found = trained(both, tmp_path / "row")
  assert "activeness" not in found["base"]
  assert np.abs(found["base-activeness"]["activeness"]).max() > 1e-4
  alone = tiny(methods=("base",), **changes)
  alone = trained(alone, tmp_path / "alone")["base"]
  jax.tree.map(np.testing.assert_array_equal, alone, found["base"])
