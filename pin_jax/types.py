"""Containers and protocols that every module shares.

Axis letters: U users, V items, G groups, S segments, B batch, L history
length, D width, C candidates, K cutoff. Item 0 is padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any


class InputError(ValueError):
  """Bad input: one line that names the input, its value and the remedy."""


class TrainingError(RuntimeError):
  """Training cannot go on: names the run, the step, the value, the remedy."""


class WriteError(OSError):
  """A file cannot be written: names it, the reason and the remedy."""


class Interrupted(RuntimeError):
  """The process was asked to end; what is saved allows to continue."""


def at_least(least: int, **numbers: Any) -> None:
  """Raises InputError for the first that is no whole number >= `least`."""
  for name, value in numbers.items():
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or (
      value < least
    ):
      raise InputError(
        f"{name}={value!r} is invalid; give a whole number of at least {least}"
      )


class Rows(NamedTuple):
  """Histories laid one after another in the rows of a batch.

  Attributes:
    items: [B, L] int32, 0 = padding.
    windows: [B, L] int32, which history a position belongs to, 0 = none; a
      history is contiguous and reads nothing of another.
    later: [L] or [B, L] int32, columns that follow in the position's history.
    activeness: [B, L] int32, training interactions of the position's user; None
      where the backbone reads none.
  """

  items: jax.Array
  windows: jax.Array
  later: jax.Array
  activeness: jax.Array | None = None


class Backbone(NamedTuple):
  """A sequence model as five pure functions over a plain parameter tree.

  `score(represent(at(encode(history))))` are the logits. `represent` is apart
  for models that attend to the candidate (DIN pools the history once a
  candidate; SASRec and GRU4Rec only add the axis). Plugins act on what it
  returns.

  Attributes:
    init: key -> params.
    encode: (params, history [B, L] or Rows, key or None) -> context of the B
      rows; a key switches dropout on. With Rows, a position's context is that
      of its history alone.
    at: (context, rows [M], columns [M]) -> states after reading
      history[row, :column + 1], leading axis M.
    represent: (params, states [M], candidates) -> [M, 1 or C, D].
    score: (params, representations [M, 1 or C, D], candidates) -> logits
      [M, C].
    tables: names of the params that hold one row an item, [V+1, ...], where
      `encode` reads no more than `table[history]`, whatever the number of rows,
      and `score` gives the logits of the rows there are.
    packed: rows that are encoded at a time, several histories in each (see
      `packing`); 0 = one history a row, all at once.
    reads_activeness: whether `encode` wants Rows with the users' activeness
      (see `backbones.conditioned`).

  Candidates are item indices [C] (shared by all rows) or [M, C], or None for
  the whole catalogue with padding, 0..V in order.
  """

  init: Callable[[jax.Array], PyTree]
  encode: Callable[[PyTree, Any, jax.Array | None], PyTree]
  at: Callable[[PyTree, jax.Array, jax.Array], PyTree]
  represent: Callable[[PyTree, PyTree, jax.Array | None], jax.Array]
  score: Callable[[PyTree, jax.Array, jax.Array | None], jax.Array]
  tables: tuple[str, ...] = ()
  packed: int = 0
  reads_activeness: bool = False


class PluginContext(NamedTuple):
  """What a plugin may read of a position besides its state; leading axes [M].

  Attributes:
    users: [M] int32.
    items: [M, H] int32, the history's last items, the newest first, 0 = none.
    interactions: [M, H] int32, index of each among all interactions.
  """

  users: jax.Array
  items: jax.Array
  interactions: jax.Array


class Plugin(NamedTuple):
  """A segment's prediction network: pure functions that start as the identity.

  A plugin moves the representation (`apply`), the backbone's weights (`adapt`)
  or the logits (`mix`); what it does not do is None.

  Attributes:
    init: key -> params of one segment.
    apply: (params, representations [..., D]) -> [..., D].
    adapt: (params, backbone params) -> the params that encode and score.
    mix: (params, evidence, representation [M, D], PluginContext, logits [M, C],
      candidates) -> logits [M, C]; what the evidence is, the plugin says. The
      representation is that of the padding item where it depends on the
      candidate.
    recent: H of the PluginContext, at most L; 0 = none.
  """

  init: Callable[[jax.Array], PyTree]
  apply: Callable[[PyTree, jax.Array], jax.Array] | None = None
  adapt: Callable[[PyTree, PyTree], PyTree] | None = None
  mix: Callable[..., jax.Array] | None = None
  recent: int = 0


class Batch(NamedTuple):
  """Training windows; the leading axes are [B] or [G, B].

  Attributes:
    users: [B] int32, user indices.
    history: [B, L] int32, what the model reads, right-aligned, 0 = padding.
    targets: [B, L] int32, the item after each history position, 0 = none.
    last: [B] int32, in-user position of the last column of the history; None
      where nobody asks.
    activeness: [B] int32, the user's training interactions (1 for none); None
      where nobody asks.
  """

  users: jax.Array
  history: jax.Array
  targets: jax.Array
  last: jax.Array | None = None
  activeness: jax.Array | None = None


class Requests(NamedTuple):
  """Whom to evaluate, and on what.

  Attributes:
    users: [n] int32 user indices.
    positions: [n] int32, in-user position of the target; the history is
      everything before it.
    segments: [n] int32.
  """

  users: np.ndarray
  positions: np.ndarray
  segments: np.ndarray
