"""Batches and histories from disk, for interactions that no device holds.

Which windows a batch has follows from (seed, t), as on the device, and is drawn
on the host by the same function; only what they hold is read, ahead of the
steps. A process reads the rows of its own devices. The batches are those of the
device bit by bit, and a run continues at any step without an iterator's state.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pin_jax.data.batches import Sequences, Windows, cut_windows
from pin_jax.scale import sharding
from pin_jax.scale.sharding import Layout
from pin_jax.types import Batch, PyTree, Requests

_AHEAD = 2  # dispatches that are read while one is computed


class Streamed(NamedTuple):
  """The batches of one dispatch, on the device.

  Attributes:
    start: its first step.
    batches: leaves [steps, G, B, ...].
  """

  start: jax.Array
  batches: Batch


def batch_of(streamed: Streamed, t: jax.Array) -> Batch:
  """The batch of step t, [G, B]."""
  return jax.tree.map(lambda x: x[t - streamed.start], streamed.batches)


class Stream:
  """The batches of a stage, dispatch by dispatch."""

  def __init__(
    self,
    sequences: Sequences,
    draw: Callable[..., Windows],
    drawn_from: tuple[PyTree, ...],
    *,
    key: jax.Array,
    num_steps: int,
    dispatch: int,
    length: int,
    layout: Layout,
  ) -> None:
    """Nothing is read before the first batch is asked for.

    Args:
      sequences: on disk.
      draw: (key of the run, t, *drawn_from) -> the windows of step t, [G, B].
      drawn_from: arrays.
      key: the run's.
      num_steps: of the stage.
      dispatch: steps at a time.
      length: L.
      layout: rows are split over its `data` axis.
    """
    host = jax.local_devices(backend="cpu")[0]
    self._args = jax.device_put((key, drawn_from), host)
    self._draw = jax.jit(lambda key, steps, args: jax.vmap(
      lambda t: draw(key, t, *args)
    )(steps))
    self._sequences, self._layout = sequences, layout
    self._num_steps, self._dispatch = num_steps, dispatch
    self._length, self._host = length, host
    self._next = -1
    self._pieces: Iterator[dict] = iter(())

  def __call__(self, t: int, count: int) -> Streamed:
    """The batches of the steps t .. t + count - 1."""
    index, inside = divmod(t, self._dispatch)
    if inside or count != self._count(index):
      return self._put(t, count, self._read(t, count))
    if index != self._next:
      self._pieces = self._reading_from(index)
    self._next = index + 1
    return self._put(t, count, next(self._pieces))

  def _count(self, index: int) -> int:
    return min(self._dispatch, self._num_steps - index * self._dispatch)

  def _reading_from(self, index: int) -> Iterator[dict]:
    """Dispatches in order, a few of them read ahead."""
    last = -(-self._num_steps // self._dispatch)
    read = lambda k: self._read(int(k) * self._dispatch, self._count(int(k)))
    options = grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
    steps = grain.MapDataset.range(index, last)
    return iter(steps.map(read).to_iter_dataset(options))

  def _read(self, t: int, count: int) -> dict[tuple, Batch]:
    """{rows: their batches} of all that this process's devices hold."""
    key, drawn_from = self._args
    steps = jax.device_put(np.arange(t, t + count, dtype=np.int32), self._host)
    windows = jax.device_get(self._draw(key, steps, drawn_from))
    return {
      (rows.start, rows.stop): cut_windows(
        self._sequences, Windows(*(x[..., rows] for x in windows)),
        length=self._length,
      )
      for rows in self._rows(windows.users.shape)
    }

  def _rows(self, shape: tuple[int, ...]) -> list[slice]:
    """The rows of the batch axis, each once."""
    if self._layout.mesh is None:
      return [slice(0, shape[2])]
    split = NamedSharding(self._layout.mesh, _SPLIT)
    found = split.addressable_devices_indices_map(shape).values()
    return [
      slice(*bounds) for bounds in
      sorted({index[2].indices(shape[2])[:2] for index in found})
    ]

  def _put(self, t: int, count: int, pieces: dict[tuple, Batch]) -> Streamed:
    mesh = self._layout.mesh
    if mesh is None:
      (batches,) = pieces.values()
      return Streamed(jnp.int32(t), jax.device_put(batches))
    split = NamedSharding(mesh, _SPLIT)

    def put(name: str) -> jax.Array:
      parts = {rows: getattr(part, name) for rows, part in pieces.items()}
      some = next(iter(parts.values()))
      size = some.shape[2] * self._layout.data
      shape = (*some.shape[:2], size, *some.shape[3:])
      return jax.make_array_from_callback(
        shape, split, lambda index: parts[index[2].indices(size)[:2]]
      )

    start = sharding.put_replicated(np.int32(t), self._layout)
    return Streamed(start, Batch(*map(put, Batch._fields)))


_SPLIT = PartitionSpec(None, None, sharding.DATA)


def make_ranker(
  rank: Callable[[Any, Sequences, Requests], PyTree],
  sequences: Sequences,
  *,
  users: int,
  layout: Layout,
) -> Callable[[Any, None, Requests], PyTree]:
  """A ranking function that reads the histories of some users at a time.

  Args:
    rank: (weights, sequences, requests) -> arrays [n, ...], a user's of its own
      interactions alone.
    sequences: on disk.
    users: at a time.
    layout: the histories are spread over its devices.

  Returns:
    (weights, None, requests) -> what `rank` returns.
  """

  def run(weights: Any, _: None, requests: Requests) -> PyTree:
    parts = []
    for start in range(0, max(len(requests.users), 1), users):
      own = Requests(*(x[start : start + users] for x in requests))
      near, own = _nearer(sequences, own, layout)
      parts.append(rank(weights, near, own))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)

  return run


def _nearer(
  sequences: Sequences, requests: Requests, layout: Layout
) -> tuple[Sequences, Requests]:
  """The histories of the requests and their targets, and users renumbered."""
  lengths = requests.positions.astype(np.int64) + 1
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  size = 1 << max(int(offsets[-1]) - 1, 1).bit_length()  # few shapes
  begins = sequences.starts[requests.users]

  def read(start: int, stop: int) -> np.ndarray:
    place = np.arange(start, min(stop, offsets[-1]))
    row = np.searchsorted(offsets, place, side="right") - 1
    items = sequences.items[begins[row] + place - offsets[row]]
    return np.pad(items, (0, stop - start - len(items)))

  numbers = np.arange(len(lengths), dtype=np.int32)
  starts = offsets[:-1].astype(np.int32)
  targets = np.asarray(sequences.targets[requests.users], np.int32)
  near = Sequences(
    sharding.spread_pieces(read, size, np.int32, layout),
    *sharding.spread_flat((starts, targets), layout),
  )
  return near, requests._replace(users=numbers)
