"""Aggregation against numpy and plain joint losses; see also paths_test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import assert_trees_close, bigram

from pin_jax import aggregation
from pin_jax.aggregation import weightings
from pin_jax.data import activeness, batches, splits
from pin_jax.data.interactions import Interactions
from pin_jax.training import objectives

LENGTHS = (3, 3, 4, 5, 6, 6, 8, 9, 10, 13)
NUM_ITEMS = 12
NUM_GROUPS = 3


pytestmark = pytest.mark.usefixtures("compile_quickly", "few_at_a_time")


# The algebra on a small tree.


def small_tree():
  rng = np.random.default_rng(0)
  shapes = {"a": (3, 4, 5), "b": {"c": (3,), "d": (3, 2, 1, 2)}}
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32), shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def flat_rows(tree):
  leaves = jax.tree.leaves(tree)
  return np.concatenate(
    [np.asarray(x, np.float64).reshape(len(x), -1) for x in leaves], 1
  )


def test_gramian_cosines_and_combine_against_numpy():
  tree = small_tree()
  rows = flat_rows(tree)
  products = aggregation.gramian(tree)
  assert products.dtype == jnp.float32
  np.testing.assert_allclose(products, rows @ rows.T, rtol=1e-5)
  unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  np.testing.assert_allclose(
    aggregation.cosines(products), unit @ unit.T, atol=1e-6
  )
  weights = np.array([0.5, -2.0, 0.25], np.float32)
  combined = aggregation.combine(weights, tree)
  assert jax.tree.structure(combined) == jax.tree.structure(tree)
  for got, grads in zip(
    jax.tree.leaves(combined), jax.tree.leaves(tree), strict=True
  ):
    assert got.shape == grads.shape[1:]
    expected = sum(w * g for w, g in zip(weights, grads, strict=True))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_zero_gradients_have_cosine_zero():
  tree = jax.tree.map(lambda x: x * np.float32([0, 1, 0]).reshape(
    (3,) + (1,) * (x.ndim - 1)), small_tree())
  cosines = aggregation.cosines(aggregation.gramian(tree))
  np.testing.assert_allclose(cosines, np.diag([0.0, 1.0, 0.0]), atol=1e-6)
  nothing = aggregation.cosines(jnp.zeros((3, 3)))
  np.testing.assert_array_equal(nothing, np.zeros((3, 3)))


# Weights and errors.


def test_backdoor_normalises():
  weighting = aggregation.backdoor([1, 3, 0])
  assert weighting.reads == "nothing"
  weights, state = weighting.update(
    jnp.full((3, 3), jnp.nan), jnp.full(3, jnp.nan), weighting.init()
  )
  np.testing.assert_array_equal(weights, [0.25, 0.75, 0])
  assert weights.dtype == jnp.float32
  assert state == ()


@pytest.mark.parametrize("prior", [
  [0.5, -0.1], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [[0.5, 0.5]], 1.0, [],
])
def test_backdoor_rejects(prior):
  with pytest.raises(ValueError, match="prior="):
    aggregation.backdoor(prior)


def test_unknown_path():
  with pytest.raises(ValueError, match="'fast' is unknown.*stacked"):
    aggregation.aggregate(None, aggregation.backdoor([1]), path="fast")


@pytest.mark.parametrize("path", ["accumulated", "weighted"])
def test_paths_of_known_weights_reject_rules_that_read_gradients(path):
  with pytest.raises(ValueError, match=f"{path}.*these read gradients"):
    aggregation.aggregate(None, weightings.upgrad(), path=path)


# Sequences, with independent windows and losses.


def tiny_split():
  rng = np.random.default_rng(1)
  offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
  data = Interactions(
    name="tiny",
    items=rng.integers(1, NUM_ITEMS + 1, offsets[-1]).astype(np.int32),
    offsets=offsets,
    times=None,
    user_ids=np.arange(len(LENGTHS)),
    item_ids=np.arange(1, NUM_ITEMS + 1),
    notes={},
  )
  everything = np.array(LENGTHS, np.int32)
  none = np.full(len(LENGTHS), -1, np.int32)
  return splits.Split(data, everything, none, none, "all interactions", {})


def user_sequences(split):
  data = split.interactions
  return [
    data.items[a:b]
    for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)
  ]


def numpy_windows(split, length):
  """[(user, history [L], targets [L])] with every target once, by a loop."""
  rows = []
  for user, items in enumerate(user_sequences(split)):
    for first in range(0, len(items) - 1, length):
      last = min(first + length, len(items) - 1)
      pad = [0] * (length - (last - first))
      history, targets = items[first:last], items[first + 1 : last + 1]
      rows.append((user, pad + list(history), pad + list(targets)))
  users, history, targets = zip(*rows, strict=True)
  return np.array(users), np.array(history), np.array(targets)


def complete_data(split, groups, length):
  """Every window of every user by `cut_windows`; [G, B] with empty rows."""
  sequences = batches.make_sequences(split)
  counts = np.asarray(split.train_end) - 1
  windows = [
    [
      (user, first)
      for user in np.flatnonzero(groups == g)
      for first in range(0, counts[user], length)
    ]
    for g in range(groups.max() + 1)
  ]
  size = max(map(len, windows))
  beyond = 10**6  # a window that starts after the last target is empty
  padded = np.array([
    rows + [(rows[0][0], beyond)] * (size - len(rows)) for rows in windows
  ])
  users, first = jnp.asarray(padded[..., 0]), jnp.asarray(padded[..., 1])
  windows = batches.Windows(users, first, jnp.asarray(counts)[users], users < 0)
  batch = batches.cut_windows(sequences, windows, length=length)
  empty = padded[..., 1] == beyond
  assert (np.asarray(batch.targets)[empty] == 0).all()
  return objectives.GroupBatch(batch, None)


def plain_loss(backbone, params, history, targets, weights):
  """sum weights * cross-entropy over real items, without package losses."""
  rows, columns = np.indices(history.shape).reshape(2, -1)
  states = backbone.at(backbone.encode(params, history), rows, columns)
  represented = backbone.represent(params, states, None)
  logits = backbone.score(params, represented, None)[:, 1:]
  logs = jax.nn.log_softmax(logits).reshape(*history.shape, -1)
  chosen = jnp.take_along_axis(
    logs, jnp.maximum(targets - 1, 0)[..., None], axis=-1
  )[..., 0]
  return -(chosen * jnp.where(targets > 0, weights, 0)).sum()


def user_groups(split):
  groups = activeness.assign_groups(split.activeness, num_groups=NUM_GROUPS)
  assert len(np.unique(groups)) == NUM_GROUPS
  return groups


def prior_of(kind, split, groups):
  return activeness.prior(
    kind, groups, batches.training_targets(split), NUM_GROUPS
  )


def joint_weights(kind, users, targets):
  """Weights of the mean over targets, or over users of the user's mean."""
  if kind == "interactions":
    return np.full(targets.shape, 1 / (targets > 0).sum())
  counts = np.bincount(users, (targets > 0).sum(1))
  return np.repeat(
    1 / (len(LENGTHS) * counts[users])[:, None], targets.shape[1], axis=1
  )


# What a prior makes of group losses.


# A row is a window: for the mean over users a user has to be one window.
@pytest.mark.parametrize(
  ("kind", "length"), [("interactions", 4), ("users", max(LENGTHS))]
)
def test_natural_prior_gives_the_joint_gradient(kind, length):
  split = tiny_split()
  groups = user_groups(split)
  backbone = bigram(NUM_ITEMS)
  params = backbone.init(jax.random.key(1))
  loss = objectives.group_losses(backbone, mean=kind).group_loss
  weighting = aggregation.backdoor(prior_of(kind, split, groups))
  keys = jax.random.split(jax.random.key(0), NUM_GROUPS)
  run = jax.jit(aggregation.aggregate(loss, weighting).step)
  out = run(params, complete_data(split, groups, length), keys, ())
  users, history, targets = numpy_windows(split, length)
  assert (targets > 0).sum() == sum(LENGTHS) - len(LENGTHS)
  value, gradient = jax.jit(jax.value_and_grad(
    lambda p: plain_loss(
      backbone, p, history, targets, joint_weights(kind, users, targets)
    )
  ))(params)
  np.testing.assert_allclose(
    jnp.vdot(out.weights, out.losses), value, rtol=1e-5
  )
  assert_trees_close(out.gradient, gradient)


def sampled_gradients(kind, prior, length, batch_size, count):
  """Aggregated gradients of `count` sampled batches of a bigram table."""
  split = tiny_split()
  groups = user_groups(split)
  backbone = bigram(NUM_ITEMS)
  params = backbone.init(jax.random.key(1))
  sequences = batches.make_sequences(split)
  pool = batches.make_pool(
    batches.training_targets(split), groups, num_groups=NUM_GROUPS,
    length=length,
  )
  weighting = aggregation.backdoor(prior(split, groups))
  loss = objectives.group_losses(backbone, mean=kind).group_loss
  run = aggregation.aggregate(loss, weighting, path="weighted").step

  def one(key):
    batch = batches.Draw(batch_size=batch_size, length=length, draw=kind).batch(
      key, sequences, pool
    )
    keys = jax.random.split(key, NUM_GROUPS)
    return run(params, objectives.GroupBatch(batch, None), keys, ()).gradient

  keys = jax.random.split(jax.random.key(2), count)
  sampled = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)["table"]
  users, history, targets = numpy_windows(split, 1)
  joint = jax.jit(jax.grad(lambda p: plain_loss(
    backbone, p, history, targets, joint_weights(kind, users, targets)
  )))(params)["table"]
  return np.asarray(sampled, np.float64), np.asarray(joint, np.float64)


def z_scores(sampled, expected):
  """(mean - expected) / standard error, of real items' entries."""
  error = sampled.std(0) / np.sqrt(len(sampled))
  return ((sampled.mean(0) - expected) / np.maximum(error, 1e-7))[1:, 1:]


# Over interactions, windows with unequal numbers of targets make the mean a
# ratio of two random sums, biased by O(1 / batch): large batches. With one
# target a window, and over users with any window, there is no bias.
@pytest.mark.parametrize(("kind", "length", "batch_size"), [
  ("interactions", 1, 32),
  ("interactions", 6, 512),
  ("interactions", 15, 512),
  ("users", 1, 32),
  ("users", 6, 32),
])
def test_stratified_sampling_is_accounted_for(kind, length, batch_size):
  count = 20000 // batch_size + 200
  sampled, joint = sampled_gradients(
    kind, lambda *x: prior_of(kind, *x), length, batch_size, count
  )
  z = z_scores(sampled, joint)
  assert np.abs(z).max() < 5
  assert np.sqrt((z**2).mean()) < 1.7


def test_equal_weights_miss_the_joint_gradient():
  sampled, joint = sampled_gradients(
    "interactions", lambda *x: prior_of("uniform", *x), 1, 32, 800
  )
  assert np.sqrt((z_scores(sampled, joint) ** 2).mean()) > 5


def test_conflict_rate_counts_pairs_with_a_negative_cosine():
  cosines = jnp.array([[1.0, -0.1, 0.2], [-0.1, 1.0, 0.0], [0.2, 0.0, 1.0]])
  np.testing.assert_allclose(aggregation.conflict_rate(cosines), 1 / 3)
  assert aggregation.conflict_rate(jnp.ones((1, 1))) == 0
  unknown = cosines.at[0, 1].set(jnp.nan)
  assert jnp.isnan(aggregation.conflict_rate(unknown))


@pytest.mark.parametrize(
  ("weights", "want"),
  [
    ([0.25] * 4, 4), ([0, 0, 3], 1), ([0.5, 0.25, 0.25], 1 / 0.375),
    ([0, 0], 0),
  ],
)
def test_effective_groups(weights, want):
  got = aggregation.effective_groups(jnp.array(weights, jnp.float32))
  np.testing.assert_allclose(got, want, rtol=1e-6)
