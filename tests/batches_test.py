"""Batches against slices of python lists, and against exact probabilities."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pin_jax.data.batches import (
  Draw,
  Pool,
  Windows,
  cut_windows,
  make_held_out,
  make_pool,
  make_sequences,
  read_back,
  training_targets,
)
from pin_jax.data.interactions import from_columns
from pin_jax.data.splits import leave_one_out
from pin_jax.training.objectives import position_weights
from pin_jax.types import InputError

LENGTH, BATCH, STEPS = 4, 64, 200
SIZES = (10, 3, 7, 4, 5, 11, 2, 3, 8, 14, 24, 6)  # interactions a user


@pytest.fixture(scope="module")
def split():
  """Every interaction is an item of its own, numbered by user and time."""
  users = np.repeat(np.arange(len(SIZES)), SIZES)
  return leave_one_out(from_columns(users, np.arange(len(users))))


@pytest.fixture(scope="module")
def histories(split):
  """Lists of the training items of every user."""
  data = split.interactions
  starts = data.offsets[:-1]
  return [
    data.items[s : s + n].tolist()
    for s, n in zip(starts, split.train_end, strict=True)
  ]


@pytest.fixture(scope="module")
def groups(split):
  return np.arange(split.interactions.num_users) % 2


@pytest.fixture(scope="module")
def draws(split, groups):
  """Rows [G, STEPS * B, ...] of many steps, for each way to draw."""
  sequences = make_sequences(split)
  pool = make_pool(
    training_targets(split), groups, num_groups=2, length=LENGTH
  )
  keys = jax.random.split(jax.random.key(0), STEPS)

  def run(draw):
    one = lambda key: Draw(batch_size=BATCH, length=LENGTH, draw=draw).batch(
      key, sequences, pool
    )
    out = jax.jit(jax.vmap(one, out_axes=1))(keys)
    merge = lambda x: np.asarray(x).reshape(2, STEPS * BATCH, *x.shape[3:])
    return jax.tree.map(merge, out)

  return {draw: run(draw) for draw in ("interactions", "users")}


def test_the_fixture_covers_the_edges(split, histories):
  assert split.interactions.num_users == len(SIZES) - 1
  assert [len(h) for h in histories] == [s - 2 for s in SIZES if s > 2]
  assert sum(len(h) == 1 for h in histories) == 2
  assert any((len(h) - 1) % LENGTH == 0 and len(h) > 1 for h in histories)


def test_training_targets_count_all_but_the_first_item(split, histories):
  want = [len(h) - 1 for h in histories]
  np.testing.assert_array_equal(training_targets(split), want)
  np.testing.assert_array_equal(make_sequences(split).targets, want)


def test_too_many_windows_for_int32_are_refused():
  targets, groups = np.array([2**30, 2**30 - 1]), np.zeros(2, int)
  pool = make_pool(targets, groups, num_groups=1, length=1)
  assert pool.window_starts.tolist() == [0, 2**30, 2**31 - 1]
  with pytest.raises(InputError, match="length=1 makes 2147483648 windows"):
    make_pool(targets + [0, 1], groups, num_groups=1, length=1)


def test_too_many_interactions_for_int32_are_refused():
  data = types.SimpleNamespace(num_interactions=2**31)
  with pytest.raises(InputError, match="2147483648.*int32"):
    make_sequences(types.SimpleNamespace(interactions=data))


def _window(history, first, length):
  """One window by slices: (items read, targets), right-aligned."""
  targets = range(max(first, 0), min(first + length, len(history) - 1))
  read = [history[j] for j in targets]
  next_items = [history[j + 1] for j in targets]
  pad = [0] * (length - len(read))
  return pad + read, pad + next_items


@pytest.mark.parametrize("length", [1, LENGTH, 30])
def test_tiles_hold_every_target_once_whatever_the_offset(
  split, histories, length
):
  rows = []
  for user, history in enumerate(histories):
    count = len(history) - 1
    tiles = math.ceil(count / length)
    for offset in range(tiles * length - count + 1):
      rows += [(user, offset, k * length - offset) for k in range(tiles)]
  users, offsets, first = np.asarray(rows, np.int32).T
  sequences = make_sequences(split)
  cut = jax.jit(cut_windows, static_argnames="length")
  windows = Windows(users, first, sequences.targets[users], users < 0)
  batch = cut(sequences, windows, length=length)
  seen = {}
  for i, (user, offset, start) in enumerate(rows):
    read, targets = _window(histories[user], start, length)
    np.testing.assert_array_equal(batch.history[i], read)
    np.testing.assert_array_equal(batch.targets[i], targets)
    assert targets[-1] > 0
    seen.setdefault((user, offset), []).extend(x for x in targets if x)
  assert {user for user, _ in seen} == {
    u for u, h in enumerate(histories) if len(h) > 1
  }
  for (user, _), targets in seen.items():
    assert targets == histories[user][1:]
  np.testing.assert_array_equal(batch.users, users)


@pytest.mark.parametrize("draw", ["interactions", "users"])
def test_draws_are_windows_of_the_users_training_items(
  draws, histories, groups, draw
):
  for g in range(2):
    users, history, targets, last = (x[g] for x in draws[draw][:4])
    newest = [histories[u][p] for u, p in zip(users, last, strict=True)]
    np.testing.assert_array_equal(history[:, -1], newest)
    assert set(users) == {
      u for u, h in enumerate(histories) if groups[u] == g and len(h) > 1
    }
    windows = {
      (u, *_window(h, first, LENGTH)[0], *_window(h, first, LENGTH)[1])
      for u, h in enumerate(histories)
      for first in range(1 - LENGTH, len(h) - 1)
    }
    rows = np.concatenate([users[:, None], history, targets], 1).tolist()
    assert set(map(tuple, rows)) <= windows
    assert (targets[:, -1] > 0).all()


def _tile(histories, user, targets):
  """Index of the tile, from the last target it holds."""
  last = histories[user].index(targets[-1])
  return math.ceil(last / LENGTH) - 1


def test_interactions_draws_windows_uniformly(draws, histories, groups):
  users, _, targets, *_ = draws["interactions"]
  for g in range(2):
    windows = [
      (u, k)
      for u, h in enumerate(histories)
      if groups[u] == g
      for k in range(math.ceil((len(h) - 1) / LENGTH))
    ]
    counts = dict.fromkeys(windows, 0)
    for user, row in zip(users[g], targets[g], strict=True):
      counts[user, _tile(histories, user, row)] += 1
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_offsets_are_uniform_up_to_the_slack(draws, histories, groups):
  users, _, targets, *_ = draws["interactions"]
  for user, history in enumerate(histories):
    count, g = len(history) - 1, groups[user]
    slack = -count % LENGTH
    if count <= LENGTH or slack == 0:
      continue
    lasts = [history.index(v) for v in targets[g, users[g] == user, -1]]
    offsets = [LENGTH - last for last in lasts if last <= LENGTH]
    counts = np.bincount(offsets, minlength=slack + 1)
    assert len(counts) == slack + 1
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_users_draws_users_uniformly(draws, histories, groups):
  for g in range(2):
    drawn = [
      u for u, h in enumerate(histories) if groups[u] == g and len(h) > 1
    ]
    counts = np.bincount(draws["users"].users[g], minlength=len(histories))
    assert counts.sum() == counts[drawn].sum()
    assert scipy.stats.chisquare(counts[drawn]).pvalue > 1e-3


def _by_target(weights, targets, size):
  """Mean and standard error, over rows, of the weight of every item."""
  rows = np.zeros((len(targets), size))
  np.put_along_axis(rows, targets, weights, axis=1)
  rows = rows[:, 1:]
  return rows.mean(0), rows.std(0, ddof=1) / math.sqrt(len(rows))


def _assert_within_five_sigma(mean, error, want):
  assert (mean[want == 0] == 0).all()
  held = want > 0
  assert (np.abs(mean - want)[held] < 5 * error[held] + 1e-12).all()


def test_users_draw_with_users_mean_is_unbiased(
  draws, split, histories, groups
):
  size = split.interactions.num_items + 1
  for g in range(2):
    targets = draws["users"].targets[g]
    batches = jnp.asarray(targets.reshape(STEPS, BATCH, LENGTH))
    weights = jax.vmap(lambda x: position_weights(x, "users"))(batches)
    np.testing.assert_allclose(weights.sum(-1), 1 / BATCH, rtol=1e-5)
    weights = BATCH * np.asarray(weights, np.float64).reshape(-1, LENGTH)
    mean, error = _by_target(weights, targets, size)
    mine = [h for u, h in enumerate(histories) if groups[u] == g]
    mine = [h for h in mine if len(h) > 1]
    want = np.zeros(size)
    for history in mine:
      want[history[1:]] = 1 / (len(mine) * (len(history) - 1))
    np.testing.assert_allclose(want.sum(), 1)
    _assert_within_five_sigma(mean, error, want[1:])


def test_interactions_draw_holds_every_target_equally_often(
  draws, split, histories, groups
):
  size = split.interactions.num_items + 1
  for g in range(2):
    targets = draws["interactions"].targets[g]
    mean, error = _by_target((targets > 0).astype(float), targets, size)
    mine = [h for u, h in enumerate(histories) if groups[u] == g]
    windows = sum(math.ceil((len(h) - 1) / LENGTH) for h in mine)
    want = np.zeros(size)
    for history in mine:
      want[history[1:]] = 1 / windows
    _assert_within_five_sigma(mean, error, want[1:])


@pytest.mark.parametrize("draw", ["interactions", "users"])
def test_a_batch_is_a_function_of_its_key(split, groups, draw):
  sequences = make_sequences(split)
  pool = make_pool(
    training_targets(split), groups, num_groups=2, length=LENGTH
  )
  run = lambda seed: Draw(batch_size=16, length=LENGTH, draw=draw).batch(
    jax.random.key(seed), sequences, pool
  )
  first, again, other = jax.jit(run)(1), run(1), jax.jit(run)(2)
  assert first.history.shape == (2, 16, LENGTH)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert (first.history != other.history).any()


def test_pool_sorts_users_by_group_and_counts_windows():
  targets = np.asarray([5, 0, 1, 8, 9, 4])
  groups = np.asarray([1, 0, 0, -1, 1, 0])
  got = make_pool(targets, groups, num_groups=2, length=4)
  want = Pool(
    [2, 5, 0, 4], [1, 4, 5, 9], [0, 2, 4], [0, 1, 2, 4, 7]
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ("targets", "groups"),
  [([3, 0, 0], [0, 1, 1]), ([3, 2, 4], [0, 0, 2]), ([2, 2, 2], [0, 0, -1])],
)
def test_a_group_that_cannot_train_is_named(targets, groups):
  with pytest.raises(InputError, match="group 1 of 3") as error:
    make_pool(targets, groups, num_groups=3, length=4)
  assert "\n" not in str(error.value)


def test_held_out_batches_hold_the_validation_target_alone(split):
  data, groups = split.interactions, np.arange(len(split.validation)) % 2
  groups[0] = -1
  pool = make_held_out(split.validation, groups, num_groups=2)
  draw = jax.jit(lambda key: Draw(200, LENGTH, "validation").batch(
    key, make_sequences(split), pool
  ))
  batch = jax.tree.map(np.asarray, draw(jax.random.key(0)))
  for g in range(2):
    assert set(batch.users[g]) == set(np.flatnonzero(groups == g))
    for user, history, targets, last in zip(
      *(x[g] for x in batch[:4]), strict=True
    ):
      sequence = data.items[data.offsets[user] : data.offsets[user + 1]]
      position = split.validation[user]
      read = sequence[max(position - LENGTH, 0) : position]
      np.testing.assert_array_equal(
        history, np.pad(read, (LENGTH - len(read), 0))
      )
      assert targets[-1] == sequence[position] and not targets[:-1].any()
      assert last == position - 1


def test_a_group_without_held_out_targets_is_refused():
  with pytest.raises(InputError, match="group 1 of 2 .* validation target"):
    make_held_out(np.asarray([3, -1]), np.asarray([0, 1]), num_groups=2)


def test_reading_back_gives_the_newest_items_first(split):
  data = split.interactions
  users = np.asarray([0, 1, 2, 2])
  last = np.asarray([split.test[0], 2, 1, -1])
  got = read_back(make_sequences(split), jnp.asarray(users), last, 4)
  for m, (user, newest) in enumerate(zip(users, last, strict=True)):
    for h in range(4):
      index = data.offsets[user] + newest - h
      if newest < h:
        assert got.items[m, h] == 0
      else:
        assert got.items[m, h] == data.items[index]
        assert got.interactions[m, h] == index
