"""Item neighbours: what other users did next, and relations of items.

A memory counts, over the training sequences, how often item b stands g places
after (or before) item a,

    C_k(a, b) = sum_u sum_g kernel_k(g) [b stands g places from a in u],

with one kernel for each of K channels. Each user enters with the first
occurrence of every item, so that a pair counts at most once a user; what a user
contributed to the rows that it reads is taken out again, exactly, in training
and in evaluation alike: what a user looks up is the memory of the others. A
history x_1 .. x_n then scores an item by

    m_k(v) = sum_h decay^h C'_k(x_(n-h), v) / (R'_k(x_(n-h)) + shrink) / p(v)^a

with C', R' the counts and row sums of the others and p(v) the item's training
count. It is an item-to-item neighbourhood model (Deshpande & Karypis, TOIS
2004; Davidson et al., RecSys 2010) with decays as sequence-aware neighbours
have them (Ludewig & Jannach, UMUAI 2018); leaving out the user's own counts is
ours. R further channels are relations of items (see `relations`),

    m_k(v) = sum_h decay^h B_k(x_(n-h), v),

from which nothing is taken out.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from pin_jax.data.splits import Split, is_training, training_counts
from pin_jax.models import relations
from pin_jax.models.relations import Table
from pin_jax.types import InputError, PluginContext

# 'two_step' is the random walk, 'linear' EASE, 'next' SLIT.
RELATIONS = ("cosine", "two_step", "linear", "next")
MOST_ITEMS = 50_000  # of 'linear' and 'next', which solve dense systems
EPSILON = 1e-3  # of the score's logarithm
_CHUNK = 1024  # rows of a table at a time
_REPEATS = 0.01  # share of the training interactions that makes them a habit


class Options(NamedTuple):
  """What a memory holds, and how it is looked up.

  Attributes:
    channels: of 'around' (after and before alike), 'after' and 'next' (the
      very next item alone).
    window: W, places that count as a transition.
    decay: weight of each further place.
    neighbours: N, how many items of a row are kept: those with the largest sum
      over channels, each divided by its largest entry. Of a relation likewise.
    recent: H, items of the history that are looked up.
    history_decay: weight of each older one.
    shrink: added to row sums and norms.
    popularity_power: a, of the division by the item's popularity.
    relations: of RELATIONS.
    ridge: of 'linear'.
    next_ridge: of 'next'.
  """

  channels: tuple[str, ...] = ("around", "after", "next")
  window: int = 5
  decay: float = 0.7
  neighbours: int = 50
  recent: int = 10
  history_decay: float = 0.8
  shrink: float = 2.0
  popularity_power: float = 0.25
  relations: tuple[str, ...] = ()
  ridge: float = 100.0
  next_ridge: float = 100.0

  @property
  def num_channels(self) -> int:
    """K + R."""
    return len(self.channels) + len(self.relations)


class Memory(NamedTuple):
  """What plugins know of the training prefix, on the device.

  Attributes:
    neighbours: [V+1, N] items next to each item, 0 = none.
    counts: [K, V+1, N] C_k(item, neighbour) of all users.
    totals: [K, V+1] their row sums, of all items.
    related: [R, V+1, N] each item's neighbours by relation, 0 = none.
    related_scores: [R, V+1, N] B_k(item, neighbour).
    interactions: [V+1] training interactions of each item.
    popularity: [V+1] log(1 + interactions), standardised over items.
    activeness: [U] log activeness, standardised over users.
    items: [T] each user's distinct training items in order.
    starts: [U+1] where a user's begin in `items`.
    place: [I] where an interaction's item lies in `items`; -1 where the user's
      training prefix does not hold it.
    kernel: [K, 2, W] weight of b standing 1 .. W places after (row 0) and
      before (row 1) a.
  """

  neighbours: jax.Array
  counts: jax.Array
  totals: jax.Array
  related: jax.Array
  related_scores: jax.Array
  interactions: jax.Array
  popularity: jax.Array
  activeness: jax.Array
  items: jax.Array
  starts: jax.Array
  place: jax.Array
  kernel: jax.Array

  @property
  def num_items(self) -> int:
    """V."""
    return len(self.popularity) - 1


def _kernels(window: int, decay: float) -> Mapping[str, np.ndarray]:
  """Name of each channel -> [2, W] weights of the places after and before."""
  places = decay ** np.arange(window)
  return {
    "around": np.stack([places, places]) / 2,
    "after": np.stack([places, np.zeros(window)]),
    "next": np.stack([np.eye(1, window)[0], np.zeros(window)]),
  }


CHANNELS = tuple(_kernels(1, 1.0))


def check(options: Options, num_items: int) -> None:
  """Raises InputError for options that `build` does not take."""
  for key, known in (("channels", CHANNELS), ("relations", RELATIONS)):
    names = tuple(getattr(options, key))
    bad = set(names) - set(known) or len(set(names)) < len(names)
    if bad or (key == "channels" and not names):
      raise InputError(
        f"{key}={names} is invalid; give some of {list(known)}, each once"
      )
  dense = [name for name in options.relations if name in ("linear", "next")]
  if dense and num_items > MOST_ITEMS:
    raise InputError(
      f"relations={tuple(options.relations)}: {dense[0]!r} solves a system of "
      f"{num_items:,} x {num_items:,} items, over {MOST_ITEMS:,} each way; "
      "leave it out, or drop rare items first"
    )


def build(
  split: Split, options: Options, *, activeness: np.ndarray | None = None
) -> Memory:
  """Counts the transitions of the training prefix, and fits the relations.

  Args:
    split: whose training interactions count.
    options: of the memory.
    activeness: [U] of the users, by default that of the split.

  Raises:
    InputError: for an unknown name, or a catalogue of more than MOST_ITEMS for
      a relation that solves a dense system.
  """
  num_items = split.interactions.num_items
  check(options, num_items)
  items, starts, place = distinct_sequences(split)
  named = _kernels(options.window, options.decay)
  kernel = np.stack([named[name] for name in options.channels])
  tables = [_count(items, starts, one, num_items) for one in kernel]
  union = sum(table / max(table.max(), 1) for table in tables).tocsr()
  shape = num_items + 1, options.neighbours
  kept, _ = _largest(lambda rows: union[rows], shape)
  interactions = training_counts(split)
  related = np.reshape([
    _largest(_fitted(name, items, starts, interactions, options), shape)
    for name in options.relations
  ], (-1, 2, *shape))
  known = split.activeness if activeness is None else activeness
  popularity = np.log1p(interactions)
  as_float = lambda x: jnp.asarray(x, jnp.float32)
  as_int = lambda x: jnp.asarray(x, jnp.int32)
  return Memory(
    as_int(kept), as_float(np.stack([_entries(x, kept) for x in tables])),
    as_float(np.stack([table.sum(1) for table in tables])),
    as_int(related[:, 0]), as_float(related[:, 1]),
    as_float(interactions), as_float(_standardized(popularity, popularity)),
    as_float(known_activeness(known, known)), as_int(items), as_int(starts),
    as_int(place), as_float(kernel),
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


def holds_repeats(split: Split) -> bool:
  """Whether 1 % of the training interactions repeat an item of their user.

  Fewer are taken for slips of a log that records first encounters.
  """
  distinct, _, _ = distinct_sequences(split)
  total = int(np.sum(split.train_end))
  return total - len(distinct) >= _REPEATS * max(total, 1)


def known_activeness(
  activeness: np.ndarray, population: np.ndarray
) -> np.ndarray:
  """Log activeness [n], standardised over that of a population [U]; float32."""
  log = lambda x: np.log(np.maximum(x, 1))
  return _standardized(log(activeness), log(population))


def _standardized(x: np.ndarray, over: np.ndarray) -> np.ndarray:
  return ((x - over.mean()) / (over.std() or 1)).astype(np.float32)


def _count(
  items: np.ndarray, starts: np.ndarray, kernel: np.ndarray, num_items: int
) -> Table:
  """C(a, b) of one channel, from its kernel [2, W]; [V+1, V+1]."""
  shape = (num_items + 1,) * 2
  users = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
  total = Table(shape, dtype=np.float64)
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


def _fitted(
  name: str, items: np.ndarray, starts: np.ndarray, interactions: np.ndarray,
  options: Options,
) -> relations.Rows:
  """A relation, fitted to the sequences."""
  num_items = len(interactions) - 1
  if name == "two_step":
    kernel = _kernels(options.window, options.decay)["around"]
    return relations.random_walk(
      _count(items, starts, kernel, num_items), options.shrink,
      np.maximum(interactions, 1) ** -options.popularity_power,
    )
  if name == "next":
    return relations.slit(
      items, starts, num_items, recent=options.recent,
      decay=options.history_decay, ridge=options.next_ridge,
    )
  users = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
  held = Table(
    (np.ones(len(items)), (users, items)), (len(starts) - 1, num_items + 1)
  )
  both = (held.T @ held).tocsr()
  if name == "cosine":
    return relations.cosine(both, options.shrink)
  return relations.ease(both, options.ridge)


def _largest(
  rows_of: relations.Rows, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Columns [V+1, N] and values of each row's largest entries, 0 = none.

  The diagonal is left out; of equal entries the smaller column comes first.
  """
  columns, values = np.zeros(shape), np.zeros(shape)
  for first in range(0, shape[0], _CHUNK):
    chunk = rows_of(slice(first, first + _CHUNK))
    chunk.setdiag(0, k=first)
    chunk.eliminate_zeros()
    chunk.sort_indices()
    for row, span in enumerate(itertools.pairwise(chunk.indptr), first):
      entries = chunk.data[slice(*span)]
      order = np.argsort(-entries, kind="stable")[: shape[1]]
      columns[row, : len(order)] = chunk.indices[slice(*span)][order]
      values[row, : len(order)] = entries[order]
  return columns.astype(np.int64), values


def _entries(table: Table, columns: np.ndarray) -> np.ndarray:
  """Entries of each row at its columns [V+1, N]; 0 at column 0."""
  rows = np.broadcast_to(np.arange(len(columns))[:, None], columns.shape)
  return np.where(columns > 0, table[rows, columns].toarray(), 0)


class Scores(NamedTuple):
  """Scores of the items that have any, by channel; both are [K, M, E].

  An item may stand several times; its score is then the sum.
  """

  items: jax.Array
  scores: jax.Array


def lookup(memory: Memory, context: PluginContext, options: Options) -> Scores:
  """m_k(v) of the neighbours of the recent items, K + R channels, E = H N.

  What the user itself added to the transitions is taken out.
  """
  recent = context.items
  near = memory.neighbours[recent]  # [M, H, N]
  own_items, own_weights = _own_transitions(memory, context)
  same = own_items[..., None] == near[..., None, :]  # [M, H, 2W, N]
  own = jnp.einsum(
    "kmhw,mhwn->kmhn", own_weights, same.astype(jnp.float32),
    precision="highest",
  )
  counts = jnp.maximum(memory.counts[:, recent] - own, 0)  # [K, M, H, N]
  totals = jnp.maximum(memory.totals[:, recent] - own_weights.sum(-1), 0)
  age = options.history_decay ** jnp.arange(recent.shape[1])[:, None]
  popularity = jnp.maximum(memory.interactions[near], 1)
  factor = jnp.where(near > 0, popularity**-options.popularity_power, 0) * age
  scores = counts / (totals[..., None] + options.shrink) * factor
  near = jnp.broadcast_to(near, scores.shape)
  items = jnp.concatenate([near, memory.related[:, recent]])
  related = memory.related_scores[:, recent] * age
  flat = lambda x: x.reshape(*x.shape[:-2], -1)
  return Scores(flat(items), flat(jnp.concatenate([scores, related])))


def _own_transitions(
  memory: Memory, context: PluginContext
) -> tuple[jax.Array, jax.Array]:
  """What the user itself added to the rows of its recent items.

  Items [M, H, 2W], 0 = none, and their weights [K, M, H, 2W].
  """
  width = memory.kernel.shape[-1]
  steps = jnp.arange(1, width + 1)
  place = memory.place[context.interactions]
  place = jnp.where(context.items > 0, place, -1)[..., None]
  index = place + jnp.concatenate([steps, -steps])
  first = memory.starts[context.users][:, None, None]
  last = memory.starts[context.users + 1][:, None, None]
  inside = (place >= 0) & (index >= first) & (index < last)
  index = jnp.clip(index, 0, memory.items.shape[0] - 1)
  items = jnp.where(inside, memory.items[index], 0)
  weights = memory.kernel.reshape(len(memory.kernel), -1)
  return items, weights[:, None, None] * inside


def repeats(context: PluginContext, history_decay: float) -> Scores:
  """r(v) = sum_h decay^h [x_(n-h) = v], what the user itself did before.

  One channel, E = H. It reads no target and nobody else: there is nothing to
  take out.
  """
  age = history_decay ** jnp.arange(context.items.shape[1])
  scores = jnp.where(context.items > 0, age, 0)
  return Scores(context.items[None], scores[None])


def dense(
  found: Scores, candidates: jax.Array | None, num_items: int
) -> jax.Array:
  """The scores [K, M, C] of candidates: [C], [M, C] or, if None, 0..V."""
  row = jnp.arange(found.items.shape[1])[:, None]
  count, slots = num_items + 1, jnp.arange(num_items + 1)
  if candidates is not None and candidates.ndim == 1:
    count = len(candidates)
    slots = jnp.full(num_items + 1, count).at[candidates].set(jnp.arange(count))

  def one(items: jax.Array, scores: jax.Array) -> jax.Array:
    nothing = jnp.zeros((items.shape[0], count))
    return nothing.at[row, slots[items]].add(scores, mode="drop")

  out = jax.vmap(one)(*found)
  if candidates is None:
    return out
  if candidates.ndim == 1:
    return out[..., slots[candidates]]
  return jnp.take_along_axis(out, candidates[None], axis=-1)


def log_scores(scores: jax.Array) -> jax.Array:
  """log(m + e) - log e, which is 0 where the memory knows nothing."""
  return jnp.log1p(scores / EPSILON)
