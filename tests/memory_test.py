"""Transition memory: every number against loops over users and positions."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pin_jax.data.batches import make_sequences, read_back
from pin_jax.models import memory
from pin_jax.types import InputError
from tests.toys import split_of, training_rows

ITEMS, WINDOW, DECAY = 12, 3, 0.6
OPTIONS = memory.Options(window=WINDOW, decay=DECAY, neighbours=ITEMS)


def _split(seed=0, users=9):
  """Sequences with repeated items, some short."""
  rng = np.random.default_rng(seed)
  rows = [rng.integers(1, ITEMS + 1, rng.integers(3, 14)) for _ in range(users)]
  rows.append(np.arange(1, ITEMS + 1))  # every item occurs
  return split_of(rows)


def _training(split):
  """Each user's training items, first occurrences only."""
  return [list(dict.fromkeys(row)) for row in training_rows(split)]


def _weight(channel, gap):
  """Weight of b standing `gap` places after a (negative: before)."""
  if not 1 <= abs(gap) <= WINDOW:
    return 0.0
  if channel == "around":
    return DECAY ** (abs(gap) - 1) / 2
  if channel == "after":
    return DECAY ** (gap - 1) if gap > 0 else 0.0
  return float(gap == 1)


def _counts(rows, channel):
  counts = collections.defaultdict(float)
  for row in rows:
    for p, a in enumerate(row):
      for q, b in enumerate(row):
        if p != q:
          counts[a, b] += _weight(channel, q - p)
  return counts


def _score(split, user, position, channel, recent=4):
  """m(v) of a user's history before a position, over the other users."""
  rows = _training(split)
  counts = _counts(rows[:user] + rows[user + 1 :], channel)
  data = split.interactions
  popularity = collections.Counter(
    i for row in training_rows(split) for i in row
  )
  first = data.offsets[user]
  history = data.items[first : first + position][::-1][:recent]
  out = np.zeros(ITEMS + 1)
  for age, a in enumerate(history.tolist()):
    total = sum(counts[a, b] for b in range(1, ITEMS + 1))
    for b in range(1, ITEMS + 1):
      out[b] += (
        0.8**age * counts[a, b] / (total + 2) * max(popularity[b], 1) ** -0.25
      )
  return out


@pytest.mark.parametrize("channel", memory.CHANNELS)
def test_the_table_equals_a_loop_over_pairs(channel):
  split = _split()
  built = memory.build(split, OPTIONS._replace(channels=(channel,)))
  want = _counts(_training(split), channel)
  got = np.zeros((ITEMS + 1, ITEMS + 1))
  near, counts = np.asarray(built.neighbours), np.asarray(built.counts[0])
  for a in range(1, ITEMS + 1):
    for b, value in zip(near[a], counts[a], strict=True):
      got[a, b] += value
  for a in range(1, ITEMS + 1):
    for b in range(1, ITEMS + 1):
      np.testing.assert_allclose(got[a, b], want[a, b], rtol=1e-6)
    np.testing.assert_allclose(
      built.totals[0, a], sum(want[a, b] for b in range(1, ITEMS + 1)),
      rtol=1e-6,
    )


def test_a_row_keeps_its_largest_entries():
  split = _split()
  few = memory.build(
    split, OPTIONS._replace(channels=("around",), neighbours=2)
  )
  want = _counts(_training(split), "around")
  for a in range(1, ITEMS + 1):
    row = [want[a, b] for b in range(1, ITEMS + 1)]
    np.testing.assert_allclose(
      few.counts[0, a], sorted(row, reverse=True)[:2], rtol=1e-6
    )


@pytest.mark.parametrize("part", ["validation", "test"])
def test_scores_equal_a_loop_without_the_user(part):
  split = _split()
  built = memory.build(split, OPTIONS)
  users = np.arange(split.interactions.num_users)
  positions = getattr(split, part)
  context = read_back(
    make_sequences(split), jnp.asarray(users), jnp.asarray(positions - 1), 4
  )
  run = jax.jit(lambda context: memory.dense(
    memory.lookup(built, context, OPTIONS), None, ITEMS
  ))
  got = np.asarray(run(context))
  for k, channel in enumerate(memory.CHANNELS):
    for u in users:
      want = _score(split, u, positions[u], channel)
      np.testing.assert_allclose(
        got[k, u], want, rtol=1e-4, atol=1e-6, err_msg=f"{channel} user {u}"
      )


@pytest.mark.parametrize("recent", [1, 4, 20])
def test_own_repeats_equal_a_loop_over_the_history(recent):
  split = _split(seed=3)
  data, sequences = split.interactions, make_sequences(split)
  several = 0
  for user, position in (
    (u, p) for u in range(data.num_users) for p in range(data.lengths[u] - 1)
  ):
    own = data.items[data.offsets[user] : data.offsets[user + 1]]
    want = np.zeros(ITEMS + 1)
    for age, item in enumerate(own[position::-1][:recent]):
      want[item] += 0.8**age
    several += max(np.bincount(own[: position + 1][-recent:])) > 1
    context = read_back(
      sequences, jnp.asarray([user]), jnp.asarray([position]), recent
    )
    got = memory.dense(memory.repeats(context, 0.8), None, ITEMS)
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-6)
  assert several > 20 or recent == 1


def test_only_the_training_prefix_is_asked_for_repeats():
  split = lambda *rows: split_of(rows)
  distinct = [1, 2, 3, 4, 5]
  assert not memory.holds_repeats(split(distinct, [4, 2, 3, 2, 3]))
  assert not memory.holds_repeats(split(distinct, distinct))
  assert memory.holds_repeats(split(distinct, [4, 2, 4, 3, 1]))
  many = [*range(100)]  # 98 of each in training
  assert memory.holds_repeats(split([0, *many[:-1]]))
  assert not memory.holds_repeats(split([0, *many[:-1]], many))


@pytest.mark.parametrize("candidates", [
  [3, 1, 3, 12], [[1, 2], [12, 12], [5, 1]],
])
def test_candidates_are_columns_of_the_whole(candidates):
  rng = np.random.default_rng(1)
  found = memory.Scores(
    jnp.asarray(rng.integers(0, ITEMS + 1, (2, 3, 8))),
    jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32),
  )
  want = np.zeros((2, 3, ITEMS + 1))
  for k in range(2):
    for m in range(3):
      for e in range(8):
        want[k, m, found.items[k, m, e]] += found.scores[k, m, e]
  whole = memory.dense(found, None, ITEMS)
  np.testing.assert_allclose(whole, want, rtol=1e-5, atol=1e-6)
  candidates = np.asarray(candidates)
  chosen = np.broadcast_to(candidates, (3, candidates.shape[-1]))
  got = memory.dense(found, jnp.asarray(candidates), ITEMS)
  np.testing.assert_allclose(
    got, np.take_along_axis(want, chosen[None], -1), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(("options", "message"), [
  ({"channels": ("sideways",)}, "channels="),
  ({"channels": ()}, "channels="),
  ({"relations": ("likeness",)}, "relations="),
  ({"relations": ("cosine", "cosine")}, "each once"),
])
def test_bad_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    memory.build(_split(), memory.Options(**options))


def test_too_many_items_for_a_dense_system_are_refused():
  options = memory.Options(relations=("linear",))
  memory.check(options, memory.MOST_ITEMS)
  few = memory.Options(relations=("cosine", "two_step"))
  memory.check(few, memory.MOST_ITEMS + 1)
  with pytest.raises(InputError, match="50,001 x 50,001.*rare items"):
    memory.check(options, memory.MOST_ITEMS + 1)
