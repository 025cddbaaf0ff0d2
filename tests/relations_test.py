"""Relations of items: every number against loops and the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from pin_jax.data.batches import make_sequences, read_back
from pin_jax.models import relations
from pin_jax.types import InputError
from tests.toys import split_of, training_rows

ITEMS, WINDOW, DECAY, SHRINK, POWER = 12, 3, 0.6, 2.0, 0.25
RECENT, HISTORY_DECAY = 3, 0.7
OPTIONS = {
  "window": WINDOW, "decay": DECAY, "shrink": SHRINK,
  "popularity_power": POWER, "neighbours": ITEMS, "ridge": 1.5,
  "next_ridge": 0.8, "recent": RECENT, "history_decay": HISTORY_DECAY,
}


def _split(users=14):
  """Sequences with repeated items; every item occurs."""
  rng = np.random.default_rng(0)
  rows = [rng.integers(1, ITEMS + 1, rng.integers(3, 9)) for _ in range(users)]
  rows.append(np.arange(1, ITEMS + 1))
  return split_of(rows)


def _cosine(rows):
  sets = [set(row) for row in rows]
  n = lambda *items: sum(all(i in s for i in items) for s in sets)
  return lambda a, b: (
    n(a, b) / np.sqrt((n(a) + SHRINK) * (n(b) + SHRINK))
  )


def _two_step(rows):
  counts = np.zeros((ITEMS + 1, ITEMS + 1))
  for row in rows:
    distinct = list(dict.fromkeys(row))
    for p, a in enumerate(distinct):
      for q, b in enumerate(distinct):
        if 1 <= abs(p - q) <= WINDOW:
          counts[a, b] += DECAY ** (abs(p - q) - 1) / 2
  step = counts / (counts.sum(1, keepdims=True) + SHRINK)
  popularity = [max(sum(row.count(i) for row in rows), 1) for i in range(13)]
  return lambda a, b: (
    sum(step[a, c] * step[c, b] for c in range(ITEMS + 1))
    * popularity[b] ** -POWER
  )


def _linear(rows):
  """Each column by itself: ridge regression on the others, by lstsq."""
  held = np.zeros((len(rows), ITEMS + 1))
  for user, row in enumerate(rows):
    held[user, row] = 1
  table = np.zeros((ITEMS + 1, ITEMS + 1))
  for b in range(1, ITEMS + 1):
    others = [a for a in range(1, ITEMS + 1) if a != b]
    x = np.concatenate([
      held[:, others], np.sqrt(OPTIONS["ridge"]) * np.eye(len(others))
    ])
    y = np.concatenate([held[:, b], np.zeros(len(others))])
    table[others, b] = np.linalg.lstsq(x, y)[0]
  return lambda a, b: table[a, b]


def _next(rows):
  """Ridge regression of each next item on those before it, by lstsq."""
  x, y = [], []
  for row in rows:
    distinct = list(dict.fromkeys(row))
    for place in range(1, len(distinct)):
      before = np.zeros(ITEMS + 1)
      for age in range(min(RECENT, place)):
        before[distinct[place - 1 - age]] += HISTORY_DECAY**age
      x.append(before)
      y.append(np.eye(ITEMS + 1)[distinct[place]])
  ridge = np.sqrt(OPTIONS["next_ridge"]) * np.eye(ITEMS + 1)
  y.extend(np.zeros((ITEMS + 1, ITEMS + 1)))
  table = np.linalg.lstsq(np.concatenate([x, ridge]), np.asarray(y))[0]
  return lambda a, b: table[a, b]


LOOPS = {
  "cosine": _cosine, "two_step": _two_step, "linear": _linear, "next": _next
}


@pytest.mark.parametrize("name", relations.RELATIONS)
def test_the_scores_equal_the_definition(name):
  split = _split()
  built = relations.relate(split, (name,), **OPTIONS)
  want = LOOPS[name](training_rows(split))
  got = np.zeros((ITEMS + 1, ITEMS + 1))
  for a in range(ITEMS + 1):
    for b, score in zip(
      np.asarray(built.neighbours[0, a]), np.asarray(built.scores[0, a]),
      strict=True,
    ):
      got[a, b] += score
  for a in range(1, ITEMS + 1):
    for b in range(1, ITEMS + 1):
      value = max(want(a, b), 0) if a != b else 0
      assert got[a, b] == pytest.approx(value, rel=1e-4, abs=1e-6)
  assert not got[0].any() and not got[:, 0].any()


@pytest.mark.parametrize("name", relations.RELATIONS)
def test_a_row_keeps_its_largest_scores(name):
  split = _split()
  few = relations.relate(split, (name,), **OPTIONS | {"neighbours": 3})
  want = LOOPS[name](training_rows(split))
  for a in range(1, ITEMS + 1):
    row = [max(want(a, b), 0) for b in range(1, ITEMS + 1) if b != a]
    np.testing.assert_allclose(
      few.scores[0, a], sorted(row, reverse=True)[:3], rtol=1e-4, atol=1e-6
    )


def test_histories_add_up_their_items_scores():
  split = _split()
  names = ("linear", "cosine")
  built = relations.relate(split, names, **OPTIONS)
  users = np.arange(split.interactions.num_users)
  recent = 4
  reading = read_back(
    make_sequences(split), jnp.asarray(users), jnp.asarray(split.test - 1),
    recent,
  )
  sparse = relations.consult(built, reading, history_decay=0.8)
  got = relations.dense(sparse, None, ITEMS)
  few = jnp.asarray([3, 7, 7])
  some = relations.dense(sparse, few, ITEMS)
  own = relations.dense(sparse, jnp.tile(few, (len(users), 1)), ITEMS)
  data, rows = split.interactions, training_rows(split)
  for k, name in enumerate(names):
    score = LOOPS[name](rows)
    for user in users:
      first = data.offsets[user]
      history = data.items[first : first + split.test[user]][::-1][:recent]
      want = np.zeros(ITEMS + 1)
      for age, a in enumerate(history.tolist()):
        for b in range(1, ITEMS + 1):
          want[b] += 0.8**age * (max(score(a, b), 0) if a != b else 0)
      np.testing.assert_allclose(got[k, user], want, rtol=1e-4, atol=1e-6)
      np.testing.assert_allclose(some[k, user], want[few], rtol=1e-4, atol=1e-6)
      np.testing.assert_allclose(own[k, user], want[few], rtol=1e-4, atol=1e-6)


def test_items_after_the_training_prefix_relate_nothing():
  split = split_of([[1, 2, 3, 4], [2, 1, 4, 3]])  # trained: 1, 2
  built = relations.relate(split, relations.RELATIONS, neighbours=4)
  ids = dict(enumerate(split.interactions.item_ids.tolist(), 1))
  near = {
    ids[i] for i in np.asarray(built.neighbours).ravel().tolist() if i
  }
  assert near == {1, 2}


def test_no_names_relate_nothing():
  assert relations.relate(_split(), ()) is None


def test_many_rows_go_by_blocks(monkeypatch):
  split = _split()
  whole = relations.relate(split, ("linear",), **OPTIONS)
  monkeypatch.setattr(relations, "_BLOCK", 5)
  blocks = relations.relate(split, ("linear",), **OPTIONS)
  np.testing.assert_array_equal(whole.neighbours, blocks.neighbours)
  np.testing.assert_array_equal(whole.scores, blocks.scores)


@pytest.mark.parametrize("names, options, says", [
  (("likeness",), {}, "memory.relations"),
  (("cosine", "cosine"), {}, "each once"),
  (("linear",), {"ridge": 0.0}, "memory.ridge"),
])
def test_bad_options_are_named(names, options, says):
  with pytest.raises(InputError, match=says):
    relations.relate(_split(), names, **options)


def test_too_many_items_for_a_dense_matrix_are_refused():
  relations.check(("linear",), relations.MOST_ITEMS)
  relations.check(("cosine", "two_step"), relations.MOST_ITEMS + 1)
  with pytest.raises(InputError, match="50,001 x 50,001.*k_core"):
    relations.check(("linear",), relations.MOST_ITEMS + 1)
