"""Packed rows give what one history a row gives, and skip what is empty."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import BUILDERS, ITEMS
from toys import assert_trees_close, bigram, noisy

from pin_jax.models import packing
from pin_jax.training import losses, negatives, objectives
from pin_jax.types import Batch

LENGTH = 7
COUNTS = np.asarray([3, 7, 0, 1, 4, 6, 5, 7, 2, 1])  # the histories' lengths

pytestmark = pytest.mark.usefixtures("compile_quickly", "few_at_a_time")


def _batch(counts=COUNTS, seed=0):
  """Windows of the given numbers of targets."""
  rng = np.random.default_rng(seed)
  items = rng.integers(1, ITEMS + 1, (len(counts), LENGTH + 1))
  real = np.arange(LENGTH) >= LENGTH - np.asarray(counts)[:, None]
  cut = lambda x: jnp.asarray(np.where(real, x, 0), jnp.int32)
  users = jnp.arange(len(counts))
  return Batch(users, cut(items[:, :-1]), cut(items[:, 1:]))


def _build(name, **more):
  backbone = BUILDERS[name](length=LENGTH, **more)
  return backbone, noisy(backbone.init)


def _next_fit(history):
  """The rows of a loop that puts each history behind the last, if it fits."""
  rows = [[]]
  for b, row in enumerate(history):
    own = [b * len(row) + c for c in np.flatnonzero(row)]
    if len(rows[-1]) + len(own) > len(row):
      rows.append([])
    rows[-1] += own
  return rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_packing_equals_a_loop_of_next_fit(count, seed):
  counts = np.random.default_rng(seed).integers(0, LENGTH + 1, count)
  history = np.asarray(_batch(counts).history)
  got = jax.jit(packing.pack)(history)
  rows = _next_fit(history)
  want = np.full(history.shape, -1)
  for row, own in zip(want, rows, strict=False):
    row[: len(own)] = own
  np.testing.assert_array_equal(got.source, want)
  assert got.used == len(rows)
  places = np.full(history.size, -1)
  for row, own in enumerate(rows):
    places[own] = row * LENGTH + np.arange(len(own))
  np.testing.assert_array_equal(got.place.reshape(-1), places)


def test_packed_rows_hold_items_owners_and_distances():
  history = jnp.asarray([[0, 0, 5], [0, 8, 9], [2, 3, 4]])
  got = packing.rows_of(history, packing.pack(history).source)
  np.testing.assert_array_equal(got.items, [[5, 8, 9], [2, 3, 4], [0, 0, 0]])
  np.testing.assert_array_equal(got.windows, [[1, 2, 2], [3, 3, 3], [0, 0, 0]])
  np.testing.assert_array_equal(got.later[:2], [[0, 1, 0], [2, 1, 0]])


@pytest.mark.parametrize("name", BUILDERS)
def test_states_equal_those_of_one_history_a_row(name):
  backbone, params = _build(name)
  history = _batch().history
  rows, columns = np.nonzero(history)

  def logits(context):
    states = backbone.at(context, rows, columns)
    candidates = jnp.arange(1, 6)
    represented = backbone.represent(params, states, candidates)
    return backbone.score(params, represented, candidates)

  encode = jax.jit(packing.encode, static_argnums=0)
  want = logits(encode(backbone, params, history))
  assert np.std(want) > 0
  if name == "din":  # its states are the items, in packed rows
    packed = packing.pack(history)
    context = backbone.encode(params, packing.rows_of(history, packed.source))
    place = packed.place[rows, columns]
    rows, columns = place // LENGTH, place % LENGTH
  else:
    context = encode(backbone._replace(packed=3), params, history)
    for leaf in jax.tree.leaves(context):
      np.testing.assert_array_equal(leaf[np.asarray(history) == 0], 0)
  np.testing.assert_allclose(logits(context), want, rtol=1e-4, atol=1e-5)


_PROPOSAL = negatives.uniform(ITEMS)
SPECS = {
  "softmax": losses.SOFTMAX,
  "shared": losses.sampled(losses.sampled_softmax, _PROPOSAL, count=5),
  "own": losses.sampled(
    losses.sampled_softmax, _PROPOSAL, count=5, shared=False
  ),
}


def _importance(shape):
  return jnp.asarray(np.random.default_rng(5).uniform(0.1, 3, shape))


@pytest.mark.parametrize(
  ("name", "spec", "rows"),
  [("sasrec", "softmax", 3), ("gru4rec", "own", 64), ("hstu", "shared", 1),
   ("din", "own", 2)],
)
def test_group_loss_and_gradient_equal_the_plain_ones(name, spec, rows):
  backbone, params = _build(name, dropout=0.0)
  batch = _batch()
  group = objectives.GroupBatch(batch, _importance(batch.targets.shape))

  def run(backbone):
    loss = objectives.group_losses(
      backbone, mean="users", loss=SPECS[spec]
    ).group_loss
    return jax.jit(jax.value_and_grad(loss))(params, group, jax.random.key(2))

  want, want_grad = run(backbone)
  got, grad = run(backbone._replace(packed=rows))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert_trees_close(grad, want_grad)


def test_groups_share_rows_where_one_loss_serves_them_all():
  backbone, params = _build("sasrec", dropout=0.0)
  stack = lambda *x: jnp.stack(x)
  batch = jax.tree.map(stack, _batch(), _batch(COUNTS[::-1], 1))
  groups = objectives.GroupBatch(batch, _importance(batch.targets.shape))
  keys = jax.random.split(jax.random.key(0), 2)
  weights = jnp.asarray([0.3, 2.0])

  def run(backbone):
    loss = objectives.group_losses(backbone, mean="interactions").weighted_loss
    total = lambda params: loss(params, groups, keys, weights)
    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

  assert_trees_close(run(backbone._replace(packed=3)), run(backbone))


@pytest.mark.parametrize("transform", ["map", "vmap"])
def test_a_stack_of_losses_equals_each_of_them(transform):
  backbone, params = _build("gru4rec", dropout=0.5)
  stack = lambda *x: jnp.stack(x)
  batches = jax.tree.map(stack, _batch(COUNTS), _batch([1] * 10, 1))
  keys = jax.random.split(jax.random.key(0), 2)
  loss = objectives.group_losses(
    backbone._replace(packed=2), mean="users"
  ).group_loss
  one = lambda x: jax.value_and_grad(loss)(
    params, objectives.GroupBatch(x[0], None), x[1]
  )
  over = jax.vmap(one) if transform == "vmap" else (
    functools.partial(jax.lax.map, one)
  )
  take = lambda i: jax.tree.map(lambda x: x[i], (batches, keys))
  alone = jax.jit(one)
  assert_trees_close(
    jax.jit(over)((batches, keys)),
    jax.tree.map(stack, alone(take(0)), alone(take(1))),
  )


def test_rows_that_hold_nothing_are_not_encoded():
  """This backbone breaks on a chunk without items."""
  plain = bigram(ITEMS)

  def encode(params, history, key=None):
    broken = jnp.where((history.items > 0).any(), 0.0, jnp.nan)
    return plain.encode(params, history.items, key) + broken

  backbone = plain._replace(encode=encode, packed=2)
  params = jax.jit(plain.init)(jax.random.key(0))
  group = objectives.GroupBatch(_batch(), None)
  assert packing.pack(group.batch.history).used < len(COUNTS) - 2
  loss = objectives.group_losses(backbone, mean="users").group_loss
  value, grad = jax.jit(jax.value_and_grad(loss))(
    params, group, jax.random.key(0)
  )
  assert np.isfinite(value)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))
  context = packing.encode(backbone, params, group.batch.history)
  assert np.isfinite(context).all()


def test_dropout_follows_the_key_and_differs_between_chunks():
  backbone, params = _build("sasrec", dropout=0.5)
  batch = _batch([LENGTH] * 4)
  same = jax.tree.map(lambda x: jnp.stack([x[0]] * 4), batch)
  losses_of = objectives.windows_loss(
    objectives.next_item_loss(backbone, lambda p, _, states, items: (
      backbone.score(p, backbone.represent(p, states, items), items)
    )),
    backbone._replace(packed=1),
  )
  weights = jnp.ones((1, 4, LENGTH))
  one = jax.tree.map(lambda x: x[None], same)
  run = jax.jit(lambda key: losses_of(
    params, one, weights, jnp.ones(1), key[None]
  )[1][0].sum(-1))
  keys = jax.random.split(jax.random.key(0), 2)
  first, again, second = (np.asarray(run(keys[i])) for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != second).all()
  assert len(set(first.tolist())) == 4
