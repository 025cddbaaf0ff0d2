"""Ranking: of the whole catalogue, over any devices; among sampled items.

A user's target is ranked among the whole catalogue, once with the items of
its history left out ('history masked'; the target always takes part) and once
with all of them. Ties are ranked at their average.

Sampled ranking, among a few items that the user never interacts with, is the
protocol of older papers. Its numbers are not comparable with those of the full
ranking, nor do they order models as these do (Krichene & Rendle, KDD 2020).

How a product of matrices is rounded depends on its shape. So histories are
encoded and items scored in chunks of one size, whatever the number of requests,
items or devices: ranks are the same to the last bit.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.data.batches import (
  Sequences,
  last_items,
  read_back,
  training_activeness,
)
from pin_jax.data.interactions import Interactions
from pin_jax.evaluation.metrics import average_rank
from pin_jax.models import packing, plugins
from pin_jax.models.backbones import given
from pin_jax.models.plugins import Model, Weights
from pin_jax.scale import sharding
from pin_jax.scale.sharding import DATA, LOCAL, MODEL, Layout
from pin_jax.types import InputError, PluginContext, PyTree, Requests


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


# Scores of a chunk of users.


class States(NamedTuple):
  """Rows of one segment, ready for `plugins.logits`.

  Attributes:
    weights: of the segment: its plugin's own, the backbone's as the plugin
      wants them.
    states: the backbone's, leading axis M.
    context: what the plugin reads of the history, or None.
  """

  weights: Weights
  states: PyTree
  context: PluginContext | None


class Chunk(NamedTuple):
  """The shape of what a device computes at a time.

  Attributes:
    users: histories.
    items: candidates; at least V + 1 where the catalogue is small.
    kept: items whose scores are kept at once.
  """

  users: int
  items: int
  kept: int = 65_536


def chunk_of(num_items: int, layout: Layout = LOCAL) -> Chunk:
  """The chunk of a catalogue of V items, by the kind of the layout's devices.
  """
  device = layout.mesh and layout.mesh.devices.flat[0].platform
  small = (device or jax.default_backend()) == "cpu"
  users, items = (128, 4096) if small else (256, 32_768)
  return Chunk(users, min(items, 1 << num_items.bit_length()))


def _score_in_chunks(
  model: Model, rows: States, width: int, num_items: int,
  candidates: jax.Array | None,
) -> jax.Array:
  """Logits of [C] or, if None, 0..V, by chunks, [C / width, M, width].

  The last chunk is filled up with the padding item. What a plugin mixes, it
  mixes once: one chunk then holds all, [1, M, C].
  """
  index = jnp.arange(num_items + 1) if candidates is None else candidates
  columns = jnp.pad(index, (0, -len(index) % width)).reshape(-1, width)
  mixes = model.plugin is not None and model.plugin.mix is not None
  plain = model
  if mixes:
    plain = Model(model.backbone, model.plugin._replace(mix=None))
  logits = jax.lax.map(
    lambda items: plugins.logits(plain, *rows, items), columns
  )
  if not mixes:
    return logits
  flat = _joined(logits)[:, : len(index)]
  return plugins.mixed(model, *rows, flat, candidates)[None]


def _joined(logits: jax.Array) -> jax.Array:
  """The chunks side by side; [K, M, C] -> [M, K C]."""
  return jnp.moveaxis(logits, 0, 1).reshape(logits.shape[1], -1)


def _states_before(
  model: Model, weights: Weights, sequences: Sequences, requests: Requests,
  length: int,
) -> States:
  """The states after the `length` items before the targets of a chunk."""
  users, positions, segments = requests
  own = jax.tree.map(lambda x: x[segments[0]], weights.plugins)
  frozen = plugins.adapted(model.plugin, own, weights.backbone)
  history = given(
    model.backbone, last_items(sequences, users, positions, length)[0],
    training_activeness(sequences, users),
  )
  encoded = packing.encode(model.backbone, frozen, history)
  states = model.backbone.at(
    encoded, jnp.arange(len(users)), jnp.full(len(users), length - 1)
  )
  context = None
  if model.plugin is not None and model.plugin.recent:
    context = read_back(sequences, users, positions - 1, model.plugin.recent)
  return States(Weights(frozen, own, weights.evidence), states, context)


# Chunk after chunk of requests.


class Program(NamedTuple):
  """What is compiled to evaluate requests.

  Attributes:
    run: (weights, sequences, leaves [chunks, users, ...] whose first are
      Requests, interactions of a chunk's histories at most or 0) -> leaves
      [chunks, users, ...].
    users: of a chunk, all of one segment.
    nothing: what there is for no request.
  """

  run: Callable[[Weights, Sequences, tuple, int], PyTree]
  users: int
  nothing: PyTree


def _compiled(
  of_chunk: Callable[..., PyTree], users: int, nothing: PyTree,
  layout: Layout = LOCAL,
) -> Program:
  """Of (weights, sequences, requests, ..., size) -> leaves [users, ...]."""

  @functools.partial(jax.jit, static_argnums=3)
  def run(
    weights: Weights, sequences: Sequences, rows: tuple, size: int
  ) -> PyTree:
    one = lambda chunk: of_chunk(weights, sequences, *chunk, size)
    return sharding.lay(jax.lax.map(one, rows), layout)

  return Program(run, users, nothing)


def _evaluate(
  model: Model, program: Program, weights: Weights, sequences: Sequences,
  requests: Requests, *rest: np.ndarray, masked: bool = False,
) -> PyTree:
  """Runs a program on requests (and more of them): leaves [n, ...]."""
  if not len(requests.users):
    return program.nothing
  index = _chunk_index(model, requests, program.users)
  take = lambda x: np.asarray(x, np.int32)[index]
  rows = jax.tree.map(take, (requests, *rest))
  size = 0
  if masked:  # A power of two, so that few programs serve all requests.
    largest = int(rows[0].positions.sum(1, dtype=np.int64).max())
    size = 1 << max(largest - 1, 0).bit_length()

  def place(x: np.ndarray) -> np.ndarray:
    out = np.zeros((len(requests.users), *x.shape[2:]), x.dtype)
    out[index] = x
    return out

  found = program.run(weights, sequences, rows, size)
  return jax.tree.map(place, sharding.fetch(found))


def _chunk_index(model: Model, requests: Requests, users: int) -> np.ndarray:
  """Which request lies where, [chunks, users]; with plugins by segment."""
  segments = np.asarray(requests.segments)
  if model.plugin is None:
    segments = np.zeros_like(segments)
  chunks = []
  for segment in np.unique(segments):
    own = np.flatnonzero(segments == segment)
    chunks.append(np.pad(own, (0, -len(own) % users), mode="edge"))
  return np.concatenate(chunks).reshape(-1, users)


# Full ranking.


class _Scored(NamedTuple):
  """Some of the catalogue, in K chunks of C columns."""

  logits: jax.Array  # [K, M, C]
  items: jax.Array  # [K, C] int32, which items they are of
  fresh: jax.Array  # [K, C] bool, items 1..V that no column before has held
  column: Callable[[jax.Array], jax.Array]  # items -> where in K C, or beyond


# (number of steps, function of states and a step's index)
_Catalogue = tuple[int, Callable[[States, jax.Array], _Scored]]


def _whole(model: Model, num_items: int, width: int, most: int) -> _Catalogue:
  """The catalogue by `most` items, which are scored `width` at a time."""
  steps = -(-(num_items + 1) // most)
  size = num_items + 1 if steps == 1 else most

  def scored(states: States, index: jax.Array) -> _Scored:
    candidates = None
    if steps > 1:
      candidates = jnp.minimum(index * size + jnp.arange(size), num_items)
    logits = _score_in_chunks(model, states, width, num_items, candidates)
    chunks, _, columns = logits.shape
    place = jnp.arange(chunks * columns).reshape(chunks, columns)
    items = index * size + place
    fresh = (items > 0) & (items <= num_items) & (place < size)

    def column(of: jax.Array) -> jax.Array:
      at = of - index * size
      return jnp.where((at >= 0) & (at < size), at, chunks * columns)

    return _Scored(logits, items, fresh, column)

  return steps, scored


def _split(
  model: Model, num_items: int, width: int, layout: Layout
) -> _Catalogue:
  """The catalogue by `width` rows that each device along `model` holds.

  The last chunk reaches back where they do not come out even; a part smaller
  than a chunk is filled up with zeros.
  """
  shards, own = layout.model, layout.rows // layout.model
  part = max(own, width)

  def cut(x: jax.Array, first: jax.Array) -> jax.Array:
    by_shard = x.reshape(shards, own, *x.shape[1:])
    by_shard = sharding.lay(by_shard, layout, MODEL)
    pad = [(0, 0), (0, part - own)] + [(0, 0)] * (x.ndim - 1)
    by_shard = sharding.lay(jnp.pad(by_shard, pad), layout, MODEL)
    some = jax.lax.dynamic_slice_in_dim(by_shard, first, width, 1)
    rows = some.reshape(shards * width, *x.shape[1:])
    return sharding.lay(rows, layout, MODEL)

  def scored(states: States, index: jax.Array) -> _Scored:
    first = jnp.minimum(index * width, part - width)
    row = first + jnp.arange(width)
    items = (jnp.arange(shards)[:, None] * own + row).reshape(-1)
    fresh = jnp.tile((row >= index * width) & (row < own), shards)
    whole = states.weights.backbone
    tables = {name: cut(whole[name], first) for name in layout.tables}
    weights = states.weights._replace(backbone={**whole, **tables})
    states = states._replace(weights=weights)
    logits = plugins.logits(model, *states, None, items)

    def column(of: jax.Array) -> jax.Array:
      row = of % own - first
      inside = (of >= 0) & (row >= 0) & (row < width)
      return jnp.where(inside, of // own * width + row, shards * width)

    fresh &= (items > 0) & (items <= num_items)
    logits = sharding.lay(logits, layout, DATA, MODEL)
    return _Scored(logits[None], items[None], fresh[None], column)

  return -(-part // width), scored


def _seen_items(
  sequences: Sequences, requests: Requests, size: int
) -> tuple[jax.Array, jax.Array]:
  """(row, item) of every history's items, each once, [size]; else row M."""
  users, positions, _ = requests
  ends = jnp.cumsum(positions)
  slot = jnp.arange(size)
  row = jnp.searchsorted(ends, slot, side="right")
  safe = jnp.minimum(row, len(users) - 1)
  inner = jnp.where(row == safe, slot - (ends[safe] - positions[safe]), 0)
  item = sequences.items[sequences.starts[users[safe]] + inner]
  row, item = jax.lax.sort((row, item), num_keys=2)
  again = (row[1:] == row[:-1]) & (item[1:] == item[:-1])
  return jnp.where(jnp.append(False, again), len(users), row), item


def _points(logits: jax.Array, total: jax.Array) -> jax.Array:
  """2 for what is above the target (NaN too), 1 for what is tied, 0 below."""
  not_below = ~(logits < total)
  return not_below.astype(jnp.int32) + ~(logits <= total)


RankFn = Callable[[Weights, Sequences, Requests], Ranks]


def rank_program(
  model: Model, *, num_items: int, length: int, layout: Layout = LOCAL
) -> Program:
  """The program of `make_ranker`."""
  shape = chunk_of(num_items, layout)
  if layout.tables:
    steps, scored = _split(model, num_items, shape.items, layout)
  else:
    layout = LOCAL
    steps, scored = _whole(model, num_items, shape.items, shape.kept)

  def of_chunk(
    weights: Weights, sequences: Sequences, requests: Requests, size: int
  ) -> Ranks:
    requests = sharding.lay(requests, layout, DATA)
    states = _states_before(model, weights, sequences, requests, length)
    users, positions, _ = requests
    target = sequences.items[sequences.starts[users] + positions]
    row, seen = _seen_items(sequences, requests, size)
    # A user's target takes part, though the history may hold it.
    row = jnp.where(seen == target[row], len(users), row)

    def place(found: _Scored, row: jax.Array, item: jax.Array) -> tuple:
      """Where the logits of items in rows are; beyond, if not here."""
      chunk, column = jnp.divmod(found.column(item), found.items.shape[-1])
      return chunk, row, column

    def score(found: _Scored) -> jax.Array:
      if layout.mesh is None:
        at = place(found, jnp.arange(len(users)), target)
        return found.logits.at[at].get(mode="fill", fill_value=0)
      own = found.items[:, None] == target[:, None]  # each device its columns
      return jnp.where(found.fresh[:, None] & own, found.logits, 0).sum((0, 2))

    def count(found: _Scored, total: jax.Array) -> jax.Array:
      """Points of all items, and of those in the history; [2, M]."""
      other = found.fresh[:, None] & (found.items[:, None] != target[:, None])
      points = jnp.where(other, _points(found.logits, total[:, None]), 0)
      at = place(found, row, seen)
      if layout.mesh is None:
        known = found.logits.at[at].get(mode="fill", fill_value=0)
        known = _points(known, total[row])
        known = jnp.where(at[0] < len(found.items), known, 0)
        known = jnp.zeros_like(users).at[row].add(known, mode="drop")
      else:
        held = jnp.zeros(points.shape, bool)
        held = sharding.lay(held, layout, None, DATA, MODEL)
        held = held.at[at].set(True, mode="drop")
        known = jnp.where(held, points, 0).sum((0, 2))
      return jnp.stack([points.sum((0, 2)), known])

    if steps == 1:
      found = scored(states, jnp.int32(0))
      counts = count(found, score(found))
    else:
      zero = jnp.zeros(len(users))
      by_step = functools.partial(jax.lax.fori_loop, 0, steps)
      total = by_step(lambda i, x: x + score(scored(states, i)), zero)
      counts = by_step(
        lambda i, x: x + count(scored(states, i), total),
        jnp.zeros((2, len(users)), jnp.int32),
      )
    points, known = counts
    seen_items = jnp.zeros_like(points).at[row].add(1, mode="drop")
    rank = lambda points: 1 + points // 2 + 0.5 * (points % 2)
    return Ranks(
      rank(points - known), num_items - seen_items,
      rank(points), jnp.full_like(points, num_items),
    )

  nothing = Ranks(*(np.zeros(0) for _ in Ranks._fields))
  return _compiled(of_chunk, shape.users * layout.data, nothing, layout)


def make_ranker(
  model: Model, *, num_items: int, length: int, layout: Layout = LOCAL
) -> RankFn:
  """Builds the full ranking of users' targets.

  The scores of a chunk of users are kept at once if the catalogue is one chunk
  of items. With several, a first pass over the chunks reads the target's score
  and a second counts the items above it and level with it, so that ties are
  exact. Over the devices of a mesh, users are split over `data` and every
  device scores the items whose rows it holds; what crosses devices are counts,
  never rows of the tables. The ranks are those of one device.

  Args:
    model: what is evaluated.
    num_items: V.
    length: L, what the model reads of a history.
    layout: of the mesh; where it splits no tables, one device ranks.

  Returns:
    (weights, sequences, requests) -> Ranks.
  """
  program = rank_program(
    model, num_items=num_items, length=length, layout=layout
  )
  return functools.partial(_evaluate, model, program, masked=True)


# Sampled ranking.

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
        f"count={count} is more than the {left} items that user "
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
) -> SampledRankFn:
  """Builds the ranking of users' targets among drawn items.

  Args:
    model: what is evaluated.
    interactions: see `draw_unseen`.
    length: L, what the model reads of a history.
    count: C, drawn items a target.
    seed: see `draw_unseen`.

  Returns:
    (weights, sequences, requests) -> SampledRanks.
  """

  def of_chunk(
    weights: Weights, sequences: Sequences, requests: Requests,
    drawn: jax.Array, _: int,
  ) -> jax.Array:
    states = _states_before(model, weights, sequences, requests, length)
    target = sequences.items[sequences.starts[requests[0]] + requests[1]]
    candidates = jnp.concatenate([target[:, None], drawn], axis=1)
    return plugins.logits(model, *states, candidates)

  program = _compiled(
    of_chunk, chunk_of(interactions.num_items).users, np.zeros((0, 1 + count))
  )

  def rank(
    weights: Weights, sequences: Sequences, requests: Requests
  ) -> SampledRanks:
    drawn = draw_unseen(interactions, requests, count=count, seed=seed)
    scores = _evaluate(model, program, weights, sequences, requests, drawn)
    rank = average_rank(scores, np.zeros(len(scores), np.int32))
    return SampledRanks(
      np.asarray(rank), np.full(len(scores), 1 + count), scores[:, 0],
      scores[:, 1:],
    )

  return rank


def make_log_probabilities(
  model: Model, *, num_items: int, length: int
) -> Callable[[Weights, Sequences, Requests], np.ndarray]:
  """Builds (weights, sequences, requests) -> log softmax over items [n, V]."""
  shape = chunk_of(num_items)

  def of_chunk(
    weights: Weights, sequences: Sequences, requests: Requests, _: int
  ) -> jax.Array:
    states = _states_before(model, weights, sequences, requests, length)
    logits = _score_in_chunks(model, states, shape.items, num_items, None)
    whole = _joined(logits)[:, 1 : num_items + 1]
    return jax.nn.log_softmax(whole, axis=-1)

  program = _compiled(of_chunk, shape.users, np.zeros((0, num_items)))
  return functools.partial(_evaluate, model, program)
