"""Relations of items: every number against loops and the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from pin_jax.data.batches import make_sequences, read_back
from pin_jax.models import memory
from tests.toys import split_of, training_rows

ITEMS, WINDOW, DECAY, SHRINK, POWER = 12, 3, 0.6, 2.0, 0.25
RECENT, HISTORY_DECAY = 3, 0.7
OPTIONS = memory.Options(
  window=WINDOW, decay=DECAY, shrink=SHRINK, popularity_power=POWER,
  neighbours=ITEMS, ridge=1.5, next_ridge=0.8, recent=RECENT,
  history_decay=HISTORY_DECAY,
)


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


def _random_walk(rows):
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


def _ease(rows):
  """Each column by itself: ridge regression on the others, by lstsq."""
  held = np.zeros((len(rows), ITEMS + 1))
  for user, row in enumerate(rows):
    held[user, row] = 1
  table = np.zeros((ITEMS + 1, ITEMS + 1))
  for b in range(1, ITEMS + 1):
    others = [a for a in range(1, ITEMS + 1) if a != b]
    x = np.concatenate([
      held[:, others], np.sqrt(OPTIONS.ridge) * np.eye(len(others))
    ])
    y = np.concatenate([held[:, b], np.zeros(len(others))])
    table[others, b] = np.linalg.lstsq(x, y)[0]
  return lambda a, b: table[a, b]


def _slit(rows):
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
  ridge = np.sqrt(OPTIONS.next_ridge) * np.eye(ITEMS + 1)
  y.extend(np.zeros((ITEMS + 1, ITEMS + 1)))
  table = np.linalg.lstsq(np.concatenate([x, ridge]), np.asarray(y))[0]
  return lambda a, b: table[a, b]


LOOPS = {
  "cosine": _cosine, "two_step": _random_walk, "linear": _ease, "next": _slit
}


def _build(split, *names, **more):
  return memory.build(split, OPTIONS._replace(relations=names, **more))


@pytest.mark.parametrize("name", memory.RELATIONS)
def test_the_scores_equal_the_definition(name):
  split = _split()
  built = _build(split, name)
  want = LOOPS[name](training_rows(split))
  got = np.zeros((ITEMS + 1, ITEMS + 1))
  for a in range(ITEMS + 1):
    for b, score in zip(
      np.asarray(built.related[0, a]), np.asarray(built.related_scores[0, a]),
      strict=True,
    ):
      got[a, b] += score
  for a in range(1, ITEMS + 1):
    for b in range(1, ITEMS + 1):
      value = max(want(a, b), 0) if a != b else 0
      assert got[a, b] == pytest.approx(value, rel=1e-4, abs=1e-6)
  assert not got[0].any() and not got[:, 0].any()


def test_histories_add_up_their_items_scores():
  split = _split()
  names = ("linear", "cosine")
  built = _build(split, *names)
  users = np.arange(split.interactions.num_users)
  recent = 4
  context = read_back(
    make_sequences(split), jnp.asarray(users), jnp.asarray(split.test - 1),
    recent,
  )
  found = memory.lookup(built, context, OPTIONS._replace(history_decay=0.8))
  found = memory.Scores(found.items[-2:], found.scores[-2:])
  got = memory.dense(found, None, ITEMS)
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


def test_items_after_the_training_prefix_relate_nothing():
  split = split_of([[1, 2, 3, 4], [2, 1, 4, 3]])  # trained: 1, 2
  built = _build(split, *memory.RELATIONS, neighbours=4)
  ids = dict(enumerate(split.interactions.item_ids.tolist(), 1))
  assert {ids[i] for i in np.unique(built.related).tolist() if i} == {1, 2}


def test_many_rows_go_by_chunks(monkeypatch):
  split = _split()
  whole = _build(split, "linear")
  monkeypatch.setattr(memory, "_CHUNK", 5)
  chunks = _build(split, "linear")
  np.testing.assert_array_equal(whole.related, chunks.related)
  np.testing.assert_array_equal(whole.related_scores, chunks.related_scores)
