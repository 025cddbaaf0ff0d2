"""Batches and histories from disk, for interactions that fit no device.

Which windows a batch has follows from (seed, t), as on the device, and is drawn
on the host by the same function; only what they hold is read, ahead of the
steps. A process reads the rows of its own devices. The batches are those of the
device bit by bit, and a run continues at any step without an iterator's state.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

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
  """The batches of a stage, dispatch by dispatch, a few of them read ahead."""

  def __init__(
    self,
    sequences: Sequences,
    draw: Callable[..., Windows],
    pool: PyTree,
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
      draw: (key of the run, t, pool) -> the windows of step t, [G, B].
      pool: arrays to draw from.
      key: the run's.
      num_steps: of the stage.
      dispatch: steps at a time.
      length: L.
      layout: rows are split over its `data` axis.
    """
    self._host = jax.local_devices(backend="cpu")[0]
    self._args = jax.device_put((key, pool), self._host)
    self._draw = jax.jit(jax.vmap(draw, (None, 0, None)))
    self._sequences, self._length, self._layout = sequences, length, layout
    self._num_steps, self._dispatch = num_steps, dispatch
    self._reader = ThreadPoolExecutor(1)
    self._ahead: dict[tuple[int, int], Future] = {}

  def __call__(self, t: int, count: int) -> Streamed:
    """The batches of the steps t .. t + count - 1."""
    get = lambda *one: (
      self._ahead.get(one) or self._reader.submit(self._read, *one)
    )
    now = get(t, count)
    self._ahead = {
      (start, size): get(start, size)
      for start in range(t + count, self._num_steps, self._dispatch)[:_AHEAD]
      for size in [min(self._dispatch, self._num_steps - start)]
    }
    return self._put(t, now.result())

  def _read(self, t: int, count: int) -> dict[tuple, Batch]:
    """{rows: their batches} of all that this process's devices hold."""
    key, pool = self._args
    steps = jax.device_put(np.arange(t, t + count, dtype=np.int32), self._host)
    windows = jax.device_get(self._draw(key, steps, pool))
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

  def _put(self, t: int, parts: dict[tuple, Batch]) -> Streamed:
    mesh = self._layout.mesh
    if mesh is None:
      (batches,) = parts.values()
      return Streamed(jnp.int32(t), jax.device_put(batches))
    split = NamedSharding(mesh, _SPLIT)

    def put(*own: np.ndarray) -> jax.Array:
      size = own[0].shape[2] * self._layout.data
      shape = (*own[0].shape[:2], size, *own[0].shape[3:])
      of_rows = dict(zip(parts, own, strict=True))
      return jax.make_array_from_callback(
        shape, split, lambda index: of_rows[index[2].indices(size)[:2]]
      )

    start = sharding.put_replicated(np.int32(t), self._layout)
    return Streamed(start, jax.tree.map(put, *parts.values()))


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
  starts = np.cumsum(lengths) - lengths
  row = np.repeat(np.arange(len(lengths)), lengths)
  size = 1 << max(len(row) - 1, 1).bit_length()  # few shapes
  items = np.zeros(size, np.int32)
  place = sequences.starts[requests.users][row] + np.arange(len(row))
  items[: len(row)] = sequences.items[place - starts[row]]
  targets = sequences.targets[requests.users]
  near = Sequences(
    items, starts.astype(np.int32), np.asarray(targets, np.int32)
  )
  numbers = np.arange(len(lengths), dtype=np.int32)
  return sharding.spread_flat(near, layout), requests._replace(users=numbers)
