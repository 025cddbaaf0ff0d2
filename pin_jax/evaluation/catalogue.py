"""Ranking over a catalogue that is split over devices.

Every device scores the items whose rows it holds, a piece at a time; what
crosses devices are counts, never rows of the table.
The results are those of one device, ties included.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.data.batches import Sequences
from pin_jax.evaluation.ranking import (
  Model,
  RankFn,
  Ranks,
  Requests,
  States,
  Tile,
  Weights,
  chunk_index,
  count_above,
  from_chunks,
  history_size,
  ranks_of,
  score_items,
  seen_items,
  states_before,
  take_chunks,
  tile_for,
)
from pin_jax.scale import sharding
from pin_jax.scale.sharding import Layout
from pin_jax.types import PyTree


class Piece(NamedTuple):
  """Some rows of every device's part of the tables.

  Attributes:
    params: of the backbone, its tables cut down to these rows.
    items: [C] int32, which items they are.
    first: the first row, within each device's part.
    fresh: [C] bool, items 1..V that no piece before has held.
  """

  params: PyTree
  items: jax.Array
  first: jax.Array
  fresh: jax.Array


class Catalogue(NamedTuple):
  """The catalogue by pieces.

  Attributes:
    pieces: how many there are.
    piece: (params, index) -> Piece.
    column: (items, Piece) -> their place in the piece, C where they are not
      in it.
  """

  pieces: int
  piece: Callable[[PyTree, jax.Array], Piece]
  column: Callable[[jax.Array, Piece], jax.Array]


def cut_catalogue(num_items: int, layout: Layout, *, width: int) -> Catalogue:
  """Cuts the catalogue into pieces of `width` items a device.

  Args:
    num_items: V.
    layout: how the tables are split.
    width: rows of every device's part in a piece.

  Returns:
    The pieces; the last reaches back where they do not come out even. A part
    smaller than a piece is filled up with zeros.
  """
  shards, own = layout.model, layout.rows // layout.model
  part = max(own, width)

  def piece(params: PyTree, index: jax.Array) -> Piece:
    first = jnp.minimum(index * width, part - width)

    def cut(x: jax.Array) -> jax.Array:
      by_shard = x.reshape(shards, own, *x.shape[1:])
      by_shard = sharding.split_tables(by_shard, layout)
      pad = [(0, 0), (0, part - own)] + [(0, 0)] * (x.ndim - 1)
      by_shard = jnp.pad(by_shard, pad)
      by_shard = sharding.split_tables(by_shard, layout)
      some = jax.lax.dynamic_slice_in_dim(by_shard, first, width, 1)
      rows = some.reshape(shards * width, *x.shape[1:])
      return sharding.split_tables(rows, layout)

    row = first + jnp.arange(width)
    items = (jnp.arange(shards)[:, None] * own + row).reshape(-1)
    fresh = jnp.tile((row >= index * width) & (row < own), shards)
    fresh &= (items > 0) & (items <= num_items)
    tables = {name: cut(params[name]) for name in layout.tables}
    return Piece({**params, **tables}, items, first, fresh)

  def column(items: jax.Array, piece: Piece) -> jax.Array:
    row = items % own - piece.first
    inside = (items >= 0) & (row >= 0) & (row < width)
    return jnp.where(inside, items // own * width + row, shards * width)

  return Catalogue(-(-part // width), piece, column)


def _scores(
  model: Model, states: States, piece: Piece, layout: Layout
) -> jax.Array:
  weights = states.weights._replace(backbone=piece.params)
  states = states._replace(weights=weights)
  logits = score_items(model, states, None, piece.items)
  return sharding.split_columns(logits, layout)


def _seen(
  catalogue: Catalogue, piece: Piece, shape: tuple[int, int],
  row: jax.Array, items: jax.Array, layout: Layout,
) -> jax.Array:
  """[M, C] bool, the items of the rows' histories."""
  mask = sharding.split_columns(jnp.zeros(shape, bool), layout)
  column = catalogue.column(items, piece)
  return mask.at[row, column].set(True, mode="drop")


def tile_on(num_items: int, layout: Layout) -> Tile:
  """The tile of the mesh's kind of device, each device's own."""
  platform = layout.mesh and layout.mesh.devices.flat[0].platform
  return tile_for(num_items, platform)


def users_at_once(num_items: int, layout: Layout) -> int:
  """Users of a chunk: a tile's rows on each device along `data`."""
  return tile_on(num_items, layout).rows * layout.data


def _states(
  model: Model, weights: Weights, sequences: Sequences, requests: Requests,
  length: int, layout: Layout,
) -> tuple[jax.Array, jax.Array, States]:
  """(users, positions, states) of a chunk of requests, split over `data`."""
  users, positions, _ = sharding.split_rows(requests, layout)
  return users, positions, states_before(
    model, weights, sequences, users, positions, requests.segments[0], length,
    len(users),
  )


def rank_program(
  model: Model,
  *,
  num_items: int,
  length: int,
  layout: Layout,
) -> Callable[[Weights, Sequences, Requests, int], Ranks]:
  """The compiled program of `make_ranker`.

  A first pass over the pieces reads the target's score, a second counts the
  items above it and level with it; users are split over `data`.

  Args:
    model: what is evaluated; its backbone has tables.
    num_items: V.
    length: L, what the model reads of a history.
    layout: of the mesh.

  Returns:
    (weights, sequences, requests [chunks, `users_at_once`], interactions of a
    chunk's histories, at most) -> Ranks, [chunks, chunk].
  """
  tile = tile_on(num_items, layout)
  catalogue = cut_catalogue(num_items, layout, width=tile.items)
  index = jnp.arange(catalogue.pieces)

  def rank_chunk(
    weights: Weights, sequences: Sequences, requests: Requests, size: int
  ) -> Ranks:
    users, positions, states = _states(
      model, weights, sequences, requests, length, layout
    )
    target = sequences.items[sequences.starts[users] + positions][:, None]
    row, seen = seen_items(sequences, *requests[:2], size)

    def target_score(total: jax.Array, index: jax.Array) -> tuple:
      piece = catalogue.piece(states.weights.backbone, index)
      logits = _scores(model, states, piece, layout)
      own = piece.fresh & (piece.items == target)
      return total + jnp.where(own, logits, 0).sum(-1), None

    def count(totals: jax.Array, index: jax.Array) -> tuple:
      piece = catalogue.piece(states.weights.backbone, index)
      logits = _scores(model, states, piece, layout)
      mask = _seen(catalogue, piece, logits.shape, row, seen, layout)
      other = piece.fresh & (piece.items != target)
      return totals + count_above(logits, total, other, mask), None

    zero = jnp.zeros(users.shape, jnp.float32)
    total, _ = jax.lax.scan(target_score, zero, index)
    zeros = jnp.zeros((6, *users.shape), jnp.int32)
    out, _ = jax.lax.scan(count, zeros, index)
    return ranks_of(out)

  return _compiled(rank_chunk, layout)


def make_ranker(
  model: Model,
  *,
  num_items: int,
  length: int,
  layout: Layout,
) -> RankFn:
  """`evaluation.make_ranker` over the devices of a mesh.

  Args:
    model: what is evaluated; its backbone has tables.
    num_items: V.
    length: L, what the model reads of a history.
    layout: of the mesh.

  Returns:
    (weights, sequences, requests) -> Ranks.
  """
  compiled = rank_program(
    model, num_items=num_items, length=length, layout=layout
  )
  run = _by_chunk(compiled, model, num_items, layout)

  def rank(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> Ranks:
    if not len(requests.users):
      return Ranks(*(np.zeros(0) for _ in Ranks._fields))
    return run(weights, sequences, requests)

  return rank


def _compiled(of_chunk: Callable, layout: Layout) -> Callable:
  def run(
    weights: Weights, sequences: Sequences, requests: Requests, size: int
  ) -> PyTree:
    one = lambda chunk: of_chunk(weights, sequences, chunk, size)
    return sharding.replicate(jax.lax.map(one, requests), layout)

  return jax.jit(run, static_argnums=3)


def _by_chunk(
  compiled: Callable, model: Model, num_items: int, layout: Layout
) -> Callable[[Weights, Sequences, Requests], PyTree]:
  """Runs a program over chunks of users, a tile for each device."""
  chunk = users_at_once(num_items, layout)

  def run(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> PyTree:
    index = chunk_index(model, requests, chunk, chunk)
    chunks = take_chunks(requests, index)
    out = compiled(weights, sequences, chunks, history_size(chunks))
    return from_chunks(jax.device_get(out), index, len(requests.users))

  return run
