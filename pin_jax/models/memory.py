"""Transition memory: what other users did next after a history's items.

A memory counts, over the training sequences, how often item b stands g places
after (or before) item a,

    C_k(a, b) = sum_u sum_g kernel_k(g) [b stands g places from a in u],

with one kernel for each of K channels. Each user enters with the first
occurrence of every item, so that a pair counts at most once a user; what a user
contributed to the rows that it reads is taken out again, exactly, in training
and in evaluation alike: the memory that a user consults is that of the others.
A history x_1 .. x_n then scores an item by

    m_k(v) = sum_h decay^h C'_k(x_(n-h), v) / (R'_k(x_(n-h)) + shrink) / p(v)^a

with C', R' the counts and row sums of the others and p(v) the item's training
count. It is an item-to-item neighbourhood model (Deshpande & Karypis, TOIS
2004; Davidson et al., RecSys 2010) with decays as sequence-aware neighbours
have them (Ludewig & Jannach, UMUAI 2018); leaving out the user's own counts is
ours.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from pin_jax.data.splits import Split, is_training, training_counts
from pin_jax.types import InputError, Reading

EPSILON = 1e-3  # of the score's logarithm
_REPEATS = 0.01  # share of the training interactions that makes them a habit


class Memory(NamedTuple):
  """The counts on the device, sparse: every row keeps its N largest.

  Attributes:
    neighbours: [V+1, N] int32, items next to each item, 0 = none.
    counts: [K, V+1, N] float32, C_k(item, neighbour) of all users.
    totals: [K, V+1] float32, row sums, of all items.
    popularity: [V+1] float32, training interactions of each item.
    items: [T] int32, each user's distinct training items in order.
    starts: [U+1] int32, where a user's begin in `items`.
    place: [I] int32, where an interaction's item lies in `items`; -1 where the
      user's training prefix does not hold it.
    kernel: [K, 2, W] float32, weight of b standing 1 .. W places after
      (row 0) and before (row 1) a.
  """

  neighbours: jax.Array
  counts: jax.Array
  totals: jax.Array
  popularity: jax.Array
  items: jax.Array
  starts: jax.Array
  place: jax.Array
  kernel: jax.Array


def _kernels(window: int, decay: float) -> Mapping[str, np.ndarray]:
  """Name of each channel -> [2, W] weights of the places after and before."""
  places = decay ** np.arange(window)
  return {
    "around": np.stack([places, places]) / 2,
    "after": np.stack([places, np.zeros(window)]),
    "next": np.stack([np.eye(1, window)[0], np.zeros(window)]),
  }


CHANNELS = tuple(_kernels(1, 1.0))


def build(
  split: Split,
  *,
  channels: tuple[str, ...] = ("around", "next"),
  window: int = 5,
  decay: float = 0.7,
  neighbours: int = 50,
) -> Memory:
  """Counts the transitions of the training prefix.

  Args:
    split: whose training interactions count.
    channels: of 'around' (after and before alike), 'after' and 'next' (the
      very next item alone).
    window: W, places that count.
    decay: weight of each further place.
    neighbours: N, the largest entries of a row (of the first channel's, then
      the others') that are kept.

  Returns:
    The memory.

  Raises:
    InputError: for an unknown channel or an option out of range.
  """
  check_options(channels, window, decay, neighbours)
  data = split.interactions
  items, starts, place = distinct_sequences(split)
  named = _kernels(window, decay)
  kernel = np.stack([named[name] for name in channels])
  shape = (data.num_items + 1,) * 2
  tables = [_count(items, starts, one, shape) for one in kernel]
  union = sum(table / max(table.max(), 1) for table in tables).tocsr()
  kept = largest(union, neighbours)
  rows = np.arange(shape[0])[:, None]
  counts = [
    np.where(kept > 0, entries(table, rows, kept), 0) for table in tables
  ]
  as_float = lambda x: jnp.asarray(x, jnp.float32)
  as_int = lambda x: jnp.asarray(x, jnp.int32)
  return Memory(
    as_int(kept), as_float(np.stack(counts)),
    as_float(np.stack([table.sum(1) for table in tables])),
    as_float(training_counts(split)), as_int(items), as_int(starts),
    as_int(place), as_float(kernel),
  )


def check_options(
  channels: tuple[str, ...], window: int, decay: float, neighbours: int
) -> None:
  """Raises InputError for an option that `build` does not take."""
  unknown = [name for name in channels if name not in CHANNELS]
  if unknown or not channels or len(set(channels)) < len(channels):
    raise InputError(
      f"memory.channels={tuple(channels)}: give some of {list(CHANNELS)}, each "
      "once"
    )
  for name, value in (("window", window), ("neighbours", neighbours)):
    if value < 1:
      raise InputError(f"memory.{name}={value} is too small; give at least 1")
  if not 0 < decay <= 1:
    raise InputError(
      f"memory.decay={decay} is outside (0, 1]; give a share such as 0.7"
    )


def distinct_sequences(
  split: Split,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Each user's training items in the order of their first occurrence.

  Returns:
    (items [T], starts [U+1], place [I]) as in `Memory`.
  """
  data = split.interactions
  users = np.repeat(np.arange(data.num_users), data.lengths)
  pairs = users * (data.num_items + 1) + data.items
  _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
  trained = is_training(split)[first]  # a later occurrence trains no earlier
  kept = np.sort(first[trained])
  place = np.where(trained, np.searchsorted(kept, first), -1)[inverse]
  sizes = np.bincount(users[kept], minlength=data.num_users)
  starts = np.concatenate([[0], np.cumsum(sizes)])
  return data.items[kept], starts, place


def around(
  items: np.ndarray, starts: np.ndarray, num_items: int, *, window: int,
  decay: float,
) -> scipy.sparse.csr_array:
  """C(a, b) of the channel 'around', of all users; [V+1, V+1].

  Args:
    items: [T] of `distinct_sequences`.
    starts: [U+1] likewise.
    num_items: V.
    window: places that count.
    decay: weight of each further place.
  """
  kernel = _kernels(window, decay)["around"]
  return _count(items, starts, kernel, (num_items + 1,) * 2)


def _count(
  items: np.ndarray, starts: np.ndarray, kernel: np.ndarray, shape: tuple
) -> scipy.sparse.csr_array:
  """C(a, b) of one channel, from its kernel [2, W]."""
  users = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
  total = scipy.sparse.csr_array(shape, dtype=np.float64)
  for gap in range(1, kernel.shape[1] + 1):
    left = np.arange(max(len(items) - gap, 0))
    left = left[users[left] == users[left + gap]]
    pairs = items[left], items[left + gap]
    ones = scipy.sparse.coo_array((np.ones(len(left)), pairs), shape).tocsr()
    after, before = kernel[:, gap - 1]
    if after:
      total += after * ones
    if before:
      total += before * ones.T
  return total.tocsr()


def largest(table: scipy.sparse.csr_array, count: int) -> np.ndarray:
  """[V+1, count] columns of the largest entries of each row, 0 = none.

  Of equal entries those of the smaller column.
  """
  entries = table.tocoo()
  rows, columns = entries.coords
  order = np.lexsort((columns, -entries.data, rows))
  rows, columns = rows[order], columns[order]
  rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
  kept = np.zeros((table.shape[0], count), np.int64)
  near = rank < count
  kept[rows[near], rank[near]] = columns[near]
  return kept


def entries(
  table: scipy.sparse.csr_array, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
  """table[rows, columns], by a search in the sorted entries."""
  entries = table.tocoo()
  width = table.shape[1]
  keys = entries.coords[0].astype(np.int64) * width + entries.coords[1]
  order = np.argsort(keys, kind="stable")
  keys, values = np.append(keys[order], -1), np.append(entries.data[order], 0)
  wanted = rows.astype(np.int64) * width + columns
  index = np.searchsorted(keys[:-1], wanted)
  return np.where(keys[index] == wanted, values[index], 0)


class Sparse(NamedTuple):
  """Scores of the items that have any: [M, E] items, [K, M, E] scores.

  An item may stand several times; its score is then the sum.
  """

  items: jax.Array
  scores: jax.Array


def consult(
  memory: Memory,
  reading: Reading,
  *,
  history_decay: float,
  shrink: float,
  popularity_power: float,
) -> Sparse:
  """m_k(v) of the neighbours of the recent items, the user's own taken out.

  Args:
    memory: the counts.
    reading: the histories' newest items, E = H N.
    history_decay: weight of each older item of the history.
    shrink: added to the row sums.
    popularity_power: a, of the division by the item's popularity.
  """
  shape = reading.items.shape
  near = memory.neighbours[reading.items]  # [M, H, N]
  counts = memory.counts[:, reading.items]  # [K, M, H, N]
  totals = memory.totals[:, reading.items]  # [K, M, H]
  own_items, own_weights = _own_transitions(memory, reading)
  same = own_items[..., None] == near[..., None, :]  # [M, H, 2W, N]
  own = jnp.einsum(
    "kmhw,mhwn->kmhn", own_weights, same.astype(jnp.float32),
    precision="highest",
  )
  counts = jnp.maximum(counts - own, 0)
  totals = jnp.maximum(totals - own_weights.sum(-1), 0)
  age = history_decay ** jnp.arange(shape[1])
  known = memory.popularity[near]
  factor = jnp.where(
    near > 0, jnp.maximum(known, 1) ** -popularity_power, 0
  ) * age[:, None]
  scores = counts / (totals[..., None] + shrink) * factor
  flat = lambda x: x.reshape(*x.shape[:-2], -1)
  return Sparse(flat(near), flat(scores))


def _own_transitions(
  memory: Memory, reading: Reading
) -> tuple[jax.Array, jax.Array]:
  """What the user itself added to the rows of its recent items.

  Returns:
    Items [M, H, 2W], 0 = none, and their weights [K, M, H, 2W].
  """
  width = memory.kernel.shape[-1]
  steps = jnp.arange(1, width + 1)
  place = memory.place[reading.interactions]
  place = jnp.where(reading.items > 0, place, -1)[..., None]
  index = place + jnp.concatenate([steps, -steps])
  first = memory.starts[reading.users][:, None, None]
  last = memory.starts[reading.users + 1][:, None, None]
  inside = (place >= 0) & (index >= first) & (index < last)
  index = jnp.clip(index, 0, memory.items.shape[0] - 1)
  items = jnp.where(inside, memory.items[index], 0)
  weights = memory.kernel.reshape(len(memory.kernel), -1)
  return items, weights[:, None, None] * inside


def repeats(reading: Reading, history_decay: float) -> Sparse:
  """r(v) = sum_h decay^h [x_(n-h) = v], what the user itself did before; K = 1.

  It reads no target and nobody else, so that there is nothing to take out.

  Args:
    reading: the histories' newest items, E = H.
    history_decay: weight of each older item.
  """
  age = history_decay ** jnp.arange(reading.items.shape[1])
  return Sparse(reading.items, jnp.where(reading.items > 0, age, 0)[None])


def holds_repeats(split: Split) -> bool:
  """Whether 1 % of the training interactions repeat an item of their user.

  Fewer are taken for slips of a log that records first encounters.
  """
  distinct, _, _ = distinct_sequences(split)
  total = int(np.sum(split.train_end))
  return total - len(distinct) >= _REPEATS * max(total, 1)


def dense(
  sparse: Sparse, candidates: jax.Array | None, num_items: int
) -> jax.Array:
  """The scores of candidates, [K, M, C].

  Args:
    sparse: scores of the items that have any.
    candidates: [C] shared, [M, C], or None for 0..V in order.
    num_items: V.
  """
  channels, rows, _ = sparse.scores.shape
  row = jnp.arange(rows)[:, None]
  if candidates is None or candidates.ndim == 2:
    nothing = jnp.zeros((channels, rows, num_items + 1))
    out = nothing.at[:, row, sparse.items].add(sparse.scores)
    if candidates is None:
      return out
    return jnp.take_along_axis(out, candidates[None], axis=-1)
  count = len(candidates)
  slots = jnp.full(num_items + 1, count)
  slots = slots.at[candidates].set(jnp.arange(count))
  nothing = jnp.zeros((channels, rows, count))
  out = nothing.at[:, row, slots[sparse.items]].add(sparse.scores, mode="drop")
  return out[..., slots[candidates]]


def evidence(scores: jax.Array) -> jax.Array:
  """log(m + e) - log e, which is 0 where the memory knows nothing."""
  return jnp.log1p(scores / EPSILON)
