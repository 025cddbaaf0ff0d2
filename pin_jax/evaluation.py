"""Evaluation: full ranking, in chunks of users and items.

A user's target is ranked among the whole catalogue, once with the items of
its history left out ('history masked'; the target always takes part) and once
with all of them. Ties are ranked at their average.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.batches import Sequences
from pin_jax.plugins import apply_by_segment
from pin_jax.types import Backbone, Plugin, PyTree


class Model(NamedTuple):
  """The functions of what is evaluated; `plugin` is None without plugins."""

  backbone: Backbone
  plugin: Plugin | None


class Weights(NamedTuple):
  """The parameters of what is evaluated; `plugins` leaves lead with [S]."""

  backbone: PyTree
  plugins: PyTree


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


class Ranks(NamedTuple):
  """Ranks of the targets, each [n]; 1 is best, ties at their average.

  Attributes:
    rank: among the items that the user's history does not hold.
    candidates: how many these are, the target included.
    rank_unmasked: among all items.
    candidates_unmasked: V.
  """

  rank: np.ndarray
  candidates: np.ndarray
  rank_unmasked: np.ndarray
  candidates_unmasked: np.ndarray


def read_windows(
  sequences: Sequences, users: jax.Array, positions: jax.Array, length: int
) -> jax.Array:
  """The `length` items before a position, right-aligned; [...] -> [..., L]."""
  index = positions[..., None] - jnp.arange(length, 0, -1)
  flat = sequences.starts[users][..., None] + jnp.maximum(index, 0)
  return jnp.where(index >= 0, sequences.items[flat], 0)


def score_items(
  model: Model,
  weights: Weights,
  states: PyTree,
  segments: jax.Array,
  candidates: jax.Array | None,
) -> jax.Array:
  """Logits [M, C] of the backbone's states, through the users' plugins."""
  backbone, plugin = model
  representations = backbone.represent(weights.backbone, states, candidates)
  if plugin is not None:
    representations = apply_by_segment(
      plugin, weights.plugins, representations, segments
    )
  return backbone.score(weights.backbone, representations, candidates)


def last_states(
  model: Model, weights: Weights, history: jax.Array
) -> PyTree:
  """The backbone's states after the whole window; [B, L] -> [B]."""
  rows, length = history.shape
  context = model.backbone.encode(weights.backbone, history, None)
  return model.backbone.at(
    context, jnp.arange(rows), jnp.full(rows, length - 1)
  )


RankFn = Callable[[Weights, Sequences, Requests], Ranks]


def make_ranker(
  model: Model,
  *,
  num_items: int,
  length: int,
  user_chunk: int = 256,
  item_chunk: int = 65_536,
) -> RankFn:
  """Builds the full ranking of users' targets.

  Memory is bounded by user_chunk x min(V, item_chunk) scores. With one item
  chunk the scores are computed once; with several, a first pass over the
  chunks reads the target's score and a second counts the items above it, so
  that ties are exact.

  Args:
    model: what is evaluated.
    num_items: V.
    length: L, what the model reads of a history.
    user_chunk: users a chunk.
    item_chunk: items a chunk.

  Returns:
    (weights, sequences, requests) -> Ranks.
  """
  chunks = -(-(num_items + 1) // item_chunk)
  width = num_items + 1 if chunks == 1 else item_chunk

  def rank_chunk(
    weights: Weights, sequences: Sequences, requests: Requests, size: int
  ) -> Ranks:
    users, positions, segments = requests
    states = last_states(
      model, weights, read_windows(sequences, users, positions, length)
    )
    target = sequences.items[sequences.starts[users] + positions][:, None]
    row, seen = _seen_items(sequences, users, positions, size)

    def scores(index: jax.Array) -> tuple[jax.Array, jax.Array]:
      items = index * width + jnp.arange(width)
      candidates = None if chunks == 1 else jnp.minimum(items, num_items)
      logits = score_items(model, weights, states, segments, candidates)
      return logits, items

    def target_score(total: jax.Array, index: jax.Array) -> tuple:
      logits, items = scores(index)
      return total + jnp.where(items == target, logits, 0).sum(-1), None

    def count(totals: jax.Array, index: jax.Array) -> tuple:
      logits, items = scores(index)
      return totals + counts(logits, items, total, index), None

    def counts(
      logits: jax.Array, items: jax.Array, total: jax.Array, index: jax.Array
    ) -> jax.Array:
      mask = jnp.zeros(logits.shape, bool)
      column = seen - index * width
      column = jnp.where((column >= 0) & (column < width), column, width)
      mask = mask.at[row, column].set(True, mode="drop")
      other = (items > 0) & (items <= num_items) & (items != target)
      above = other & ~(logits <= total[:, None])
      tied = other & (logits == total[:, None])
      kept = other & ~mask
      terms = (above & ~mask, tied & ~mask, kept, above, tied, other)
      return jnp.stack([x.sum(-1, dtype=jnp.int32) for x in terms])

    if chunks == 1:
      logits, items = scores(jnp.int32(0))
      total = jnp.take_along_axis(logits, target, axis=1)[:, 0]
      out = counts(logits, items, total, jnp.int32(0))
    else:
      index = jnp.arange(chunks)
      zero = jnp.zeros(users.shape, jnp.float32)
      total, _ = jax.lax.scan(target_score, zero, index)
      zeros = jnp.zeros((6, *users.shape), jnp.int32)
      out, _ = jax.lax.scan(count, zeros, index)
    above, tied, kept, above_all, tied_all, others = out
    return Ranks(
      1 + above + 0.5 * tied, kept + 1, 1 + above_all + 0.5 * tied_all,
      others + 1,
    )

  def rank_all(
    weights: Weights, sequences: Sequences, requests: Requests, size: int
  ) -> Ranks:
    one = lambda chunk: rank_chunk(weights, sequences, chunk, size)
    return jax.lax.map(one, requests)

  compiled = jax.jit(rank_all, static_argnums=3)

  def rank(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> Ranks:
    rows = len(requests.users)
    if not rows:
      return Ranks(*(np.zeros(0) for _ in Ranks._fields))
    chunk = min(user_chunk, rows)
    pad = -rows % chunk
    padded = Requests(*(np.pad(x, (0, pad), mode="edge") for x in requests))
    by_chunk = Requests(
      *(np.asarray(x, np.int32).reshape(-1, chunk) for x in padded)
    )
    size = int(by_chunk.positions.sum(1, dtype=np.int64).max())
    out = jax.device_get(compiled(weights, sequences, by_chunk, max(size, 1)))
    return Ranks(*(x.reshape(-1)[:rows] for x in out))

  return rank


def _seen_items(
  sequences: Sequences, users: jax.Array, positions: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
  """(row, item) of every history item of the chunk, flat; rows past the end
  are out of bounds and dropped by the scatter."""
  ends = jnp.cumsum(positions)
  slot = jnp.arange(size)
  row = jnp.searchsorted(ends, slot, side="right")
  real = row < users.shape[0]
  safe = jnp.minimum(row, users.shape[0] - 1)
  inner = slot - (ends[safe] - positions[safe])
  flat = sequences.starts[users[safe]] + jnp.where(real, inner, 0)
  return row, jnp.where(real, sequences.items[flat], -1)


def make_log_probabilities(
  model: Model, *, num_items: int, length: int, user_chunk: int = 256
) -> Callable[[Weights, Sequences, Requests], np.ndarray]:
  """Builds (weights, sequences, requests) -> log softmax over items [n, V]."""

  @jax.jit
  def compute(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> jax.Array:
    users, positions, segments = requests
    history = read_windows(sequences, users, positions, length)
    states = last_states(model, weights, history)
    logits = score_items(model, weights, states, segments, None)
    return jax.nn.log_softmax(logits[:, 1:], axis=-1)

  def run(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> np.ndarray:
    parts = [np.zeros((0, num_items), np.float32)]
    for start in range(0, len(requests.users), user_chunk):
      part = Requests(*(x[start : start + user_chunk] for x in requests))
      parts.append(np.asarray(compute(weights, sequences, part)))
    return np.concatenate(parts)

  return run
