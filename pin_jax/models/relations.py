"""Item-to-item models in closed form, fitted to the training prefixes.

With X[u, a] = 1 where user u's prefix holds item a and n = X'X, so that n(a, b)
users have both and n(a) = n(a, a) have a, each gives a table B(a, b) of scores,
0 for b = a. They reach items that never stood near one of the history, which
transitions cannot. Unlike these they hold what the user itself did: only
targets outside the training prefix can teach how far to trust them.

Each function returns the one that computes some rows of B.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
import scipy.sparse

Table = scipy.sparse.csr_array
Rows = Callable[[slice], Table]


def cosine(both: Table, shrink: float) -> Rows:
  """B(a, b) = n(a, b) / sqrt((n(a) + s) (n(b) + s)).

  Args:
    both: n, [V+1, V+1].
    shrink: s; ours.

  Reference:
    Deshpande & Karypis, TOIS 2004.
  """
  scale = scipy.sparse.diags_array((both.diagonal() + shrink) ** -0.5)
  table = (scale @ both @ scale).tocsr()
  return lambda rows: table[rows]


def random_walk(counts: Table, shrink: float, factor: np.ndarray) -> Rows:
  """B(a, b) = (P P)(a, b) f(b), a walk of two steps P = C(a, b) / (R(a) + s).

  Args:
    counts: C, transitions; R are its row sums.
    shrink: s.
    factor: f [V+1].

  Reference:
    Paudel et al., TiiS 2017, walk from users; over places of a sequence it is
    ours.
  """
  scale = scipy.sparse.diags_array(1 / (counts.sum(1) + shrink))
  step = (scale @ counts).tocsr()
  last = (step @ scipy.sparse.diags_array(factor)).tocsr()
  return lambda rows: step[rows] @ last


def ease(both: Table, ridge: float) -> Rows:
  """B(a, b) = -Q(a, b) / Q(b, b), Q = (n + l I)^-1; negative scores are 0.

  The least squares of X = X B with a zero diagonal; some V^3 operations.

  Args:
    both: n, [V+1, V+1].
    ridge: l.

  Reference:
    EASE: Steck, WWW 2019.
  """
  inverse = scipy.linalg.inv(
    _ridged(both, ridge), overwrite_a=True, check_finite=False, assume_a="pos"
  )
  scale = -1 / np.diag(inverse)
  return lambda rows: Table(np.maximum(inverse[rows] * scale, 0))


def slit(
  items: np.ndarray, starts: np.ndarray, num_items: int, *, recent: int,
  decay: float, ridge: float,
) -> Rows:
  """B = (S'S + m I)^-1 S'T, the least squares of T = S B; negatives are 0.

  A row for every place p of a sequence but its first, T its item and S those
  before it, S[p, x_(p-1-h)] = decay^h for h < H. Some V^3 operations.

  Args:
    items: [T] the users' sequences, one after another.
    starts: [U+1] where each begins.
    num_items: V.
    recent: H.
    decay: weight of each older item.
    ridge: m.

  Reference:
    SLIT: Choi et al., WWW 2021; their T holds all later items.
  """
  places = np.arange(len(items))
  depth = places - np.repeat(starts[:-1], np.diff(starts))  # items before it
  rows, ages = np.nonzero(np.arange(recent) < depth[:, None])
  shape = (len(items), num_items + 1)
  before = Table((decay**ages, (rows, items[rows - 1 - ages])), shape)
  later = places[depth > 0]
  own = Table((np.ones(len(later)), (later, items[later])), shape)
  solved = scipy.linalg.solve(
    _ridged(before.T @ before, ridge),
    (before.T @ own).toarray().astype(np.float32), overwrite_a=True,
    overwrite_b=True, check_finite=False, assume_a="pos",
  )
  return lambda rows: Table(np.maximum(solved[rows], 0))


def _ridged(gram: Table, ridge: float) -> np.ndarray:
  """The Gram matrix, dense, with the ridge on its diagonal."""
  dense = gram.toarray().astype(np.float32)
  dense[np.diag_indices_from(dense)] += ridge
  return dense
