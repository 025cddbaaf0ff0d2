"""Item-to-item relations: neighbourhood models fitted in closed form.

A relation gives an item a row of scores over the others; a history x_1 .. x_n
then scores an item by

    r(v) = sum_h decay^h B(x_(n-h), v)

With X[u, a] = 1 where user u's training prefix holds item a, n(a, b) the users
who have both, n(a) those who have a, C, R the memory's counts 'around' an item
and their row sums, and p(v) the item's training count, B(a, b) is

    cosine     n(a, b) / sqrt((n(a) + s) (n(b) + s))
               (Deshpande & Karypis, TOIS 2004; the shrinkage s is ours)
    two_step   (P P)(a, b) / p(b)^q with P(a, b) = C(a, b) / (R(a) + s),
               a walk of two steps (as Paudel et al., TiiS 2017, walk from
               users; over places of a sequence it is ours)
    linear     -Q(a, b) / Q(b, b) with Q = (X'X + l I)^-1, the least squares
               of X = X B with a zero diagonal (EASE: Steck, WWW 2019)
    next       ((S'S + m I)^-1 S'T)(a, b), the least squares of T = S B, with a
               row for every place of a sequence but its first, T its item and
               S the items before it, S[., x_(p-1-h)] = decay^h for h < H
               (SLIT: Choi et al., WWW 2021; their T holds all later items)

and 0 for b = a. They reach items that never stood near one of the history,
which the transitions cannot. Unlike these they hold what the user itself did,
so that only targets outside the training prefix can teach how far to trust
them.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse

from pin_jax.data.splits import Split, training_counts
from pin_jax.models import memory
from pin_jax.types import InputError, Reading

RELATIONS = ("cosine", "two_step", "linear", "next")
DENSE = ("linear", "next")
MOST_ITEMS = 50_000  # of DENSE ones
_BLOCK = 1024  # rows


class Relations(NamedTuple):
  """The largest scores of each item's row, sparse on the device.

  Attributes:
    neighbours: [R, V+1, N] int32, the items, 0 = none.
    scores: [R, V+1, N] float32, B(item, neighbour).
  """

  neighbours: jax.Array
  scores: jax.Array


def relate(
  split: Split,
  names: tuple[str, ...],
  *,
  window: int = 5,
  decay: float = 0.7,
  neighbours: int = 50,
  shrink: float = 2.0,
  popularity_power: float = 0.25,
  ridge: float = 100.0,
  next_ridge: float = 100.0,
  recent: int = 10,
  history_decay: float = 0.8,
) -> Relations | None:
  """Fits relations to the training prefixes.

  'linear' and 'next' solve dense systems of all items, some V^3 operations.

  Args:
    split: whose training interactions count.
    names: R of RELATIONS.
    window: places that count as a transition, for 'two_step'.
    decay: weight of each further place.
    neighbours: N, the largest entries of a row that are kept, if positive.
    shrink: s.
    popularity_power: q.
    ridge: l, of 'linear'.
    next_ridge: m, of 'next'.
    recent: H, of 'next'.
    history_decay: of 'next', weight of each older item.

  Returns:
    The relations; None without names.

  Raises:
    InputError: for an unknown name, an option out of range, or a catalogue of
      more than MOST_ITEMS for those of DENSE.
  """
  count = split.interactions.num_items
  check(names, count)
  for key, value in (("ridge", ridge), ("next_ridge", next_ridge)):
    if value <= 0:
      raise InputError(f"memory.{key}={value}: give a positive number")
  if not names:
    return None
  items, starts, _ = memory.distinct_sequences(split)
  users = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
  held = scipy.sparse.csr_array(
    (np.ones(len(items)), (users, items)), (len(starts) - 1, count + 1)
  )
  both = (held.T @ held).tocsr()
  fitted = {
    "cosine": lambda: _cosine(both, shrink),
    "two_step": lambda: _two_step(
      memory.around(items, starts, count, window=window, decay=decay), shrink,
      np.maximum(training_counts(split), 1) ** -popularity_power,
    ),
    "linear": lambda: _linear(both, ridge),
    "next": lambda: _next(
      *_before(items, starts, count, recent, history_decay), next_ridge
    ),
  }
  tables = [
    scipy.sparse.vstack([_thinned(block, neighbours) for block in rows])
    for rows in (fitted[name]() for name in names)
  ]
  kept = [memory.largest(table, neighbours) for table in tables]
  rows = np.arange(count + 1)[:, None]
  scores = [
    np.where(near > 0, memory.entries(table, rows, near), 0)
    for table, near in zip(tables, kept, strict=True)
  ]
  return Relations(
    jnp.asarray(np.stack(kept), jnp.int32),
    jnp.asarray(np.stack(scores), jnp.float32),
  )


def check(names: tuple[str, ...], num_items: int = 0) -> None:
  """Raises InputError for what `relate` does not take.

  Args:
    names: of the relations.
    num_items: V, where it is known.
  """
  unknown = [name for name in names if name not in RELATIONS]
  if unknown or len(set(names)) < len(names):
    raise InputError(
      f"memory.relations={tuple(names)}: give some of {list(RELATIONS)}, each "
      "once, or none"
    )
  dense = [name for name in names if name in DENSE]
  if dense and num_items > MOST_ITEMS:
    raise InputError(
      f"memory.relations={tuple(names)}: {dense[0]!r} solves a system of "
      f"{num_items:,} x {num_items:,} items, over {MOST_ITEMS:,} each way; "
      "leave it out, or drop rare items with data.k_core"
    )


def _cosine(
  both: scipy.sparse.csr_array, shrink: float
) -> Iterator[scipy.sparse.csr_array]:
  scale = scipy.sparse.diags_array((both.diagonal() + shrink) ** -0.5)
  yield from _blocks((scale @ both @ scale).tocsr(), lambda rows: rows)


def _two_step(
  around: scipy.sparse.csr_array, shrink: float, factor: np.ndarray
) -> Iterator[scipy.sparse.csr_array]:
  scale = scipy.sparse.diags_array(1 / (around.sum(1) + shrink))
  step = (scale @ around).tocsr()
  last = (step @ scipy.sparse.diags_array(factor)).tocsr()
  yield from _blocks(step, lambda rows: rows @ last)


def _linear(
  both: scipy.sparse.csr_array, ridge: float
) -> Iterator[scipy.sparse.csr_array]:
  inverse = scipy.linalg.inv(
    _ridged(both, ridge), overwrite_a=True, check_finite=False, assume_a="pos"
  )
  scale = -1 / np.diag(inverse)
  yield from _blocks(
    inverse, lambda rows: scipy.sparse.csr_array(np.maximum(rows * scale, 0))
  )


def _ridged(gram: scipy.sparse.csr_array, ridge: float) -> np.ndarray:
  """The Gram matrix, dense, with the ridge on its diagonal."""
  dense = gram.toarray().astype(np.float32)
  dense[np.diag_indices_from(dense)] += ridge
  return dense


def _before(
  items: np.ndarray, starts: np.ndarray, num_items: int, recent: int,
  decay: float,
) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
  """(S, T) of 'next', a row for every place."""
  places = np.arange(len(items))
  depth = places - np.repeat(starts[:-1], np.diff(starts))  # items before it
  rows, ages = np.nonzero(np.arange(recent) < depth[:, None])
  shape = (len(items), num_items + 1)
  before = scipy.sparse.csr_array(
    (decay**ages, (rows, items[rows - 1 - ages])), shape
  )
  later = places[depth > 0]
  own = scipy.sparse.csr_array(
    (np.ones(len(later)), (later, items[later])), shape
  )
  return before, own


def _next(
  before: scipy.sparse.csr_array, own: scipy.sparse.csr_array, ridge: float
) -> Iterator[scipy.sparse.csr_array]:
  solved = scipy.linalg.solve(
    _ridged(before.T @ before, ridge),
    (before.T @ own).toarray().astype(np.float32), overwrite_a=True,
    overwrite_b=True, check_finite=False, assume_a="pos",
  )
  yield from _blocks(
    solved, lambda rows: scipy.sparse.csr_array(np.maximum(rows, 0))
  )


def _blocks(table: Any, rows_of: Callable) -> Iterator[scipy.sparse.csr_array]:
  """The rows of B without its diagonal, so many at a time."""
  for first in range(0, table.shape[0], _BLOCK):
    block = rows_of(table[first : first + _BLOCK])
    block.setdiag(0, k=first)
    yield block


def _thinned(
  block: scipy.sparse.csr_array, count: int
) -> scipy.sparse.csr_array:
  """Without the entries below the `count` largest of their row."""
  for start, end in itertools.pairwise(block.indptr):
    row = block.data[start:end]
    if len(row) > count:
      row[row < np.partition(row, -count)[-count]] = 0
  block.eliminate_zeros()
  return block


def consult(
  relations: Relations, reading: Reading, *, history_decay: float
) -> memory.Sparse:
  """r(v) of the neighbours of the recent items.

  Args:
    relations: the scores.
    reading: the histories' newest items, E = H N.
    history_decay: weight of each older item of the history.

  Returns:
    The scores by relation: items [R, M, E], scores [R, 1, M, E].
  """
  age = history_decay ** jnp.arange(reading.items.shape[1])
  near = relations.neighbours[:, reading.items]  # [R, M, H, N]
  scores = relations.scores[:, reading.items] * age[:, None]
  flat = lambda x: x.reshape(*x.shape[:-2], -1)
  return memory.Sparse(flat(near), flat(scores)[:, None])


def dense(
  sparse: memory.Sparse, candidates: jax.Array | None, num_items: int
) -> jax.Array:
  """The scores of candidates, [R, M, C]; see `memory.dense`."""
  one = lambda x: memory.dense(x, candidates, num_items)[0]
  return jax.vmap(one)(sparse)
