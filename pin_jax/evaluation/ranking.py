"""Evaluation: full ranking, in chunks of users and items; sampled ranking.

A user's target is ranked among the whole catalogue, once with the items of
its history left out ('history masked'; the target always takes part) and once
with all of them. Ties are ranked at their average.

Sampled ranking, among a few items that the user never interacts with, is the
protocol of older papers. Its numbers are not comparable with those of the full
ranking, nor do they order models as these do (Krichene & Rendle, KDD 2020).

How a product of matrices is rounded depends on its shape. So histories are
encoded and items scored in tiles of one size, whatever the chunks, the number
of requests or of devices: ranks are the same to the last bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.data.batches import Sequences, read_back, training_activeness
from pin_jax.data.interactions import Interactions
from pin_jax.evaluation.metrics import average_rank
from pin_jax.models import packing, plugins
from pin_jax.models.backbones import given
from pin_jax.models.plugins import Model, Weights
from pin_jax.scale import sharding
from pin_jax.types import (
  InputError,
  PluginContext,
  PyTree,
  Requests,
  at_least,
)


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


class States(NamedTuple):
  """Rows of one segment, ready to be scored.

  Attributes:
    states: the backbone's, leading axis M.
    context: what the plugin reads of the history, or None.
    weights: of the segment: its plugin's own, the backbone's as the plugin
      wants them.
  """

  states: PyTree
  context: PluginContext | None
  weights: Weights


class Tile(NamedTuple):
  """The shape of what is computed at a time, of a kind of device.

  Attributes:
    rows: histories.
    items: candidates; at least V + 1 where the catalogue is small.
  """

  rows: int
  items: int


def tile_for(num_items: int, platform: str | None = None) -> Tile:
  """The tile of a catalogue of V items.

  Args:
    num_items: V.
    platform: 'cpu', 'gpu' or 'tpu'; None = that of the default device.
  """
  small = (platform or jax.default_backend()) == "cpu"
  rows, items = (128, 4096) if small else (256, 32_768)
  return Tile(rows, min(items, 1 << num_items.bit_length()))


def by_tiles(
  run: Callable[[PyTree], PyTree], rows: PyTree, size: int
) -> PyTree:
  """run(rows) on `size` rows at a time; the last tile is filled up.

  Args:
    run: leaves [size, ...] -> leaves [size, ...]; rows do not interact.
    rows: leaves [M, ...].
    size: of a tile.
  """
  count = len(jax.tree.leaves(rows)[0])
  tiles = -(-count // size)

  def cut(x: jax.Array) -> jax.Array:
    pad = [(0, tiles * size - count)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad, mode="edge").reshape(tiles, size, *x.shape[1:])

  rows = jax.tree.map(cut, rows)
  out = jax.lax.map(run, rows)
  merge = lambda x: x.reshape(tiles * size, *x.shape[2:])[:count]
  return jax.tree.map(merge, out)


def score_items(
  model: Model, rows: States, candidates: jax.Array | None,
  items: jax.Array | None = None,
) -> jax.Array:
  """Logits [M, C] of rows of one segment, through its plugin.

  For `candidates` and `items` see `plugins.logits`.
  """
  return plugins.logits(
    model, rows.weights, rows.states, rows.context, candidates, items
  )


def score_in_tiles(
  model: Model, rows: States, tile: Tile, num_items: int,
  candidates: jax.Array | None,
) -> jax.Array:
  """`score_items` of candidates [C], or None for 0..V, tile by tile."""
  index = jnp.arange(num_items + 1) if candidates is None else candidates
  tiles = -(-len(index) // tile.items)
  pad = tiles * tile.items - len(index)
  columns = jnp.pad(index, (0, pad)).reshape(tiles, tile.items)
  plain = model.plugin and model.plugin._replace(mix=None)

  def of_rows(part: tuple[PyTree, PluginContext | None]) -> jax.Array:
    own = rows._replace(states=part[0], context=part[1])
    some = lambda items: score_items(model._replace(plugin=plain), own, items)
    logits = jnp.moveaxis(jax.lax.map(some, columns), 0, 1)
    logits = logits.reshape(tile.rows, -1)[:, : len(index)]
    return plugins.mixed(model, rows.weights, *part, logits, candidates)

  return by_tiles(of_rows, (rows.states, rows.context), tile.rows)


def states_before(
  model: Model,
  weights: Weights,
  sequences: Sequences,
  users: jax.Array,
  positions: jax.Array,
  segment: jax.Array,
  length: int,
  size: int,
) -> States:
  """The states after the `length` items before a position; [B].

  Args:
    model: what is evaluated.
    weights: of all segments.
    sequences: the interactions.
    users: [B].
    positions: [B] in-user position of the target.
    segment: scalar, that of all rows.
    length: L.
    size: rows of a tile.
  """
  own = jax.tree.map(lambda x: x[segment], weights.plugins)
  frozen = plugins.adapted(model.plugin, own, weights.backbone)

  def of_rows(part: tuple[jax.Array, jax.Array]) -> PyTree:
    history = given(
      model.backbone, read_windows(sequences, *part, length),
      training_activeness(sequences, part[0]),
    )
    context = packing.encode(model.backbone, frozen, history)
    return model.backbone.at(
      context, jnp.arange(size), jnp.full(size, length - 1)
    )

  states = by_tiles(of_rows, (users, positions), size)
  context = None
  if model.plugin is not None and model.plugin.recent:
    context = read_back(sequences, users, positions - 1, model.plugin.recent)
  return States(states, context, Weights(frozen, own, weights.evidence))


def count_above(
  logits: jax.Array, total: jax.Array, other: jax.Array, seen: jax.Array
) -> jax.Array:
  """Counts of some candidates, for `ranks_of`; [6, M] int32.

  Args:
    logits: [M, C].
    total: [M], the target's logit.
    other: [M, C] bool, candidates that count and are not the target.
    seen: [M, C] bool, items of the history.
  """
  above = other & ~(logits <= total[:, None])
  tied = other & (logits == total[:, None])
  terms = (above & ~seen, tied & ~seen, other & ~seen, above, tied, other)
  return jnp.stack([x.sum(-1, dtype=jnp.int32) for x in terms])


def ranks_of(counts: jax.Array) -> Ranks:
  """Ranks from the summed counts of `count_above`, ties at their average."""
  above, tied, kept, above_all, tied_all, others = counts
  return Ranks(
    1 + above + 0.5 * tied, kept + 1, 1 + above_all + 0.5 * tied_all,
    others + 1,
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
    user_chunk: users a chunk, up to a multiple of `tile_for`'s rows.
    item_chunk: items a chunk.

  Returns:
    (weights, sequences, requests) -> Ranks.
  """
  at_least(
    1, num_items=num_items, length=length, user_chunk=user_chunk,
    item_chunk=item_chunk,
  )
  tile = tile_for(num_items)
  chunks = -(-(num_items + 1) // item_chunk)
  width = num_items + 1 if chunks == 1 else item_chunk

  def rank_chunk(
    weights: Weights, sequences: Sequences, requests: Requests, size: int
  ) -> Ranks:
    users, positions, segments = requests
    states = states_before(
      model, weights, sequences, users, positions, segments[0], length,
      tile.rows,
    )
    target = sequences.items[sequences.starts[users] + positions][:, None]
    row, seen = seen_items(sequences, users, positions, size)

    def scores(index: jax.Array) -> tuple[jax.Array, jax.Array]:
      items = index * width + jnp.arange(width)
      candidates = None if chunks == 1 else jnp.minimum(items, num_items)
      return score_in_tiles(model, states, tile, num_items, candidates), items

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
      return count_above(logits, total, other, mask)

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
    return ranks_of(out)

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
    index = chunk_index(model, requests, user_chunk, tile.rows)
    by_chunk = take_chunks(requests, index)
    size = history_size(by_chunk)
    out = sharding.fetch(compiled(weights, sequences, by_chunk, size))
    return from_chunks(out, index, rows)

  return rank


def chunk_index(
  model: Model, requests: Requests, user_chunk: int, multiple: int = 1
) -> np.ndarray:
  """Which request lies where, [chunks, chunk].

  A chunk is of one segment, where there are plugins; a segment's last chunk is
  filled up with its last request. The size of a chunk is rounded up to a
  multiple of `multiple`; few requests make a smaller one.
  """
  segments = np.asarray(requests.segments)
  if model.plugin is None:
    segments = np.zeros_like(segments)
  chunk = -(-min(user_chunk, len(segments)) // multiple) * multiple
  parts = []
  for segment in np.unique(segments):
    own = np.flatnonzero(segments == segment)
    parts.append(np.pad(own, (0, -len(own) % chunk), mode="edge"))
  return np.concatenate(parts).reshape(-1, chunk)


def take_chunks(tree: PyTree, index: np.ndarray) -> PyTree:
  """Arrays [n, ...] -> int32 [chunks, chunk, ...]."""
  return jax.tree.map(lambda x: np.asarray(x, np.int32)[index], tree)


def history_size(chunks: Requests) -> int:
  """Interactions of a chunk's histories, at most.

  A power of two, so that few programs serve all requests.
  """
  largest = int(chunks.positions.sum(1, dtype=np.int64).max())
  return 1 << max(largest - 1, 0).bit_length()


def from_chunks(tree: PyTree, index: np.ndarray, rows: int) -> PyTree:
  """Arrays [chunks, chunk, ...] -> [n, ...], in the order of the requests."""

  def place(x: np.ndarray) -> np.ndarray:
    out = np.zeros((rows, *x.shape[2:]), x.dtype)
    out[index.reshape(-1)] = np.asarray(x).reshape(-1, *x.shape[2:])
    return out

  return jax.tree.map(place, tree)


def seen_items(
  sequences: Sequences, users: jax.Array, positions: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
  """(row, item) of every history item of the chunk, flat; [size] each.

  Rows past the end are out of bounds and dropped by a scatter.
  """
  ends = jnp.cumsum(positions)
  slot = jnp.arange(size)
  row = jnp.searchsorted(ends, slot, side="right")
  real = row < users.shape[0]
  safe = jnp.minimum(row, users.shape[0] - 1)
  inner = slot - (ends[safe] - positions[safe])
  flat = sequences.starts[users[safe]] + jnp.where(real, inner, 0)
  return row, jnp.where(real, sequences.items[flat], -1)


def draw_unseen(
  interactions: Interactions, requests: Requests, *, count: int, seed: int
) -> np.ndarray:
  """Draws items that a user never interacts with, uniformly, each once.

  What is held out counts as interacted with. The items of a request follow
  from the seed, the user's index and the target's position alone, so that all
  models rank the same ones, and validation and test different ones.

  Args:
    interactions: all of them, held-out ones included.
    requests: whose candidates to draw.
    count: C, items a request.
    seed: of the draws.

  Returns:
    [n, C] int32.

  Raises:
    InputError: if a user has interacted with all but fewer than C items.
  """
  out = np.zeros((len(requests.users), count), np.int32)
  for row, user, position in zip(
    out, requests.users, requests.positions, strict=True
  ):
    own = slice(*interactions.offsets[user : user + 2])
    seen = np.unique(interactions.items[own])
    left = interactions.num_items - len(seen)
    if left < count:
      raise InputError(
        f"evaluation.negatives={count} is more than the {left} items that user "
        f"{interactions.user_ids[user]!r} never interacts with; give at most "
        "that"
      )
    rng = np.random.default_rng((seed, int(user), int(position)))
    picks = rng.choice(left, count, replace=False)
    skipped = np.searchsorted(
      seen - 1 - np.arange(len(seen)), picks, side="right"
    )
    row[:] = 1 + picks + skipped
  return out


class SampledRanks(NamedTuple):
  """Sampled ranking of the targets, each [n] unless said.

  Attributes:
    rank: of the target among itself and C drawn items, ties at their average.
    candidates: C + 1.
    score: the target's logit.
    negative_scores: [n, C] logits of the drawn items.
  """

  rank: np.ndarray
  candidates: np.ndarray
  score: np.ndarray
  negative_scores: np.ndarray


SampledRankFn = Callable[[Weights, Sequences, Requests], SampledRanks]


def make_sampled_ranker(
  model: Model,
  interactions: Interactions,
  *,
  length: int,
  count: int = 99,
  seed: int = 0,
  user_chunk: int = 256,
) -> SampledRankFn:
  """Builds the ranking of users' targets among drawn items.

  Args:
    model: what is evaluated.
    interactions: see `draw_unseen`.
    length: L, what the model reads of a history.
    count: C, drawn items a target.
    seed: see `draw_unseen`.
    user_chunk: users a chunk.

  Returns:
    (weights, sequences, requests) -> SampledRanks.
  """

  tile = tile_for(interactions.num_items)

  @jax.jit
  def score_all(
    weights: Weights, sequences: Sequences, requests: Requests,
    negatives: jax.Array,
  ) -> jax.Array:
    def one(rows: tuple[Requests, jax.Array]) -> jax.Array:
      (users, positions, segments), drawn = rows
      states = states_before(
        model, weights, sequences, users, positions, segments[0], length,
        tile.rows,
      )
      target = sequences.items[sequences.starts[users] + positions]
      candidates = jnp.concatenate([target[:, None], drawn], axis=1)

      def of_rows(part: tuple) -> jax.Array:
        own = states._replace(states=part[0], context=part[1])
        return score_items(model, own, part[2])

      parts = (states.states, states.context, candidates)
      return by_tiles(of_rows, parts, tile.rows)

    return jax.lax.map(one, (requests, negatives))

  def rank(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> SampledRanks:
    rows = len(requests.users)
    if not rows:
      nothing = np.zeros(0)
      return SampledRanks(nothing, nothing, nothing, np.zeros((0, count)))
    drawn = draw_unseen(interactions, requests, count=count, seed=seed)
    index = chunk_index(model, requests, user_chunk, tile.rows)
    scores = sharding.fetch(score_all(
      weights, sequences, *take_chunks((requests, drawn), index)
    ))
    scores = from_chunks(scores, index, rows)
    return SampledRanks(
      np.asarray(average_rank(scores, np.zeros(rows, np.int32))),
      np.full(rows, 1 + count), scores[:, 0], scores[:, 1:],
    )

  return rank


def make_log_probabilities(
  model: Model, *, num_items: int, length: int, user_chunk: int = 256
) -> Callable[[Weights, Sequences, Requests], np.ndarray]:
  """Builds (weights, sequences, requests) -> log softmax over items [n, V]."""
  tile = tile_for(num_items)

  @jax.jit
  def compute(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> jax.Array:
    users, positions, segments = requests
    states = states_before(
      model, weights, sequences, users, positions, segments[0], length,
      tile.rows,
    )
    logits = score_in_tiles(model, states, tile, num_items, None)
    return jax.nn.log_softmax(logits[:, 1 : num_items + 1], axis=-1)

  def run(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> np.ndarray:
    out = np.zeros((len(requests.users), num_items), np.float32)
    if not len(out):
      return out
    for index in chunk_index(model, requests, user_chunk, tile.rows):
      part = take_chunks(requests, index)
      out[index] = sharding.fetch(compute(weights, sequences, part))
    return out

  return run
