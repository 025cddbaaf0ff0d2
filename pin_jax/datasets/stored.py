"""Interactions on disk, read by position: for data that memory does not hold.

A directory holds the users' items as one flat array, cut into records of an
ArrayRecord file, which grain reads in any order, and what there is of every
user and item as arrays. Times are not kept: the order of a user's items is.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python import array_record_module
from etils import epath

from pin_jax.interactions import Interactions
from pin_jax.types import InputError

_SCHEMA = 1
_BLOCK = 1024  # items a record
_FILES = {
  name: f"{name}.npy" for name in ("lengths", "user_ids", "item_ids")
}
_ITEMS, _ABOUT = "items.array_record", "about.json"


class Items:
  """[N] int32 on disk; slices and indices of any shape are read when asked for.

  Safe to read from several threads. As a whole it is read by `numpy.asarray`.
  """

  dtype = np.dtype(np.int32)
  ndim = 1

  def __init__(self, path: epath.PathLike, size: int) -> None:
    """Opens the file; N = `size`."""
    self._source = grain.sources.ArrayRecordDataSource([os.fspath(path)])
    self.shape = (size,)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
    if isinstance(index, slice):
      start, stop, step = index.indices(len(self))
      first = start // _BLOCK
      blocks = range(first, -(-stop // _BLOCK) if stop > start else first)
      flat = self._read(blocks)
      return flat[start - first * _BLOCK : stop - first * _BLOCK : step]
    index = np.asarray(index)
    block, place = np.divmod(index, _BLOCK)
    blocks, row = np.unique(block, return_inverse=True)
    flat = self._read(blocks.tolist())
    return flat[row.reshape(index.shape) * _BLOCK + place]

  def __array__(
    self, dtype: np.dtype | None = None, copy: bool | None = None
  ) -> np.ndarray:
    return self[:].astype(dtype or self.dtype, copy=False)

  def _read(self, blocks: Iterable[int]) -> np.ndarray:
    """Blocks one after another; only the last of the file is shorter."""
    blocks = list(blocks)
    records = self._source.__getitems__(blocks) if blocks else []
    return np.frombuffer(b"".join(records), "<i4").astype(np.int32, copy=False)


class Slices(NamedTuple):
  """Some slices of a flat array one after another, read where they are asked.

  Attributes:
    items: what to read from.
    starts: [n] where each slice begins.
    offsets: [n+1] where each begins in the result.
    size: of the result, at least offsets[n]; the rest is 0.
  """

  items: Items
  starts: np.ndarray
  offsets: np.ndarray
  size: int

  def read(self, start: int, stop: int) -> np.ndarray:
    """[stop - start] int32, a part of the result."""
    place = np.arange(start, min(stop, self.offsets[-1]))
    row = np.searchsorted(self.offsets, place, side="right") - 1
    out = np.zeros(stop - start, np.int32)
    if len(place):
      where = self.starts[row] + place - self.offsets[row]
      out[: len(place)] = self.items[where]
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Stored(Interactions):
  """Interactions whose `items` are an `Items`.

  Attributes:
    digest: the fingerprint of the same in memory.
  """

  digest: str = ""

  @property
  def fingerprint(self) -> str:
    """As `Interactions.fingerprint`, computed when they were written."""
    return self.digest

  def select_users(self, mask_or_indices: Any) -> Interactions:
    """Refused: what is on disk stays as it is."""
    raise InputError(
      f"{self.name!r} is read from disk and holds users that the split drops; "
      "store it with min_length=3"
    )


def read(path: epath.PathLike, *, stream: bool = True) -> Interactions:
  """Opens what `write` has written.

  Args:
    path: the directory.
    stream: leave the items on disk; else read them into memory.

  Returns:
    The interactions.

  Raises:
    InputError: if the directory is not of this form or not complete.
  """
  directory = epath.Path(path).expanduser()
  try:
    about = json.loads((directory / _ABOUT).read_text())
    arrays = {key: _load(directory / name) for key, name in _FILES.items()}
    offsets = np.concatenate([[0], np.cumsum(arrays.pop("lengths"), dtype=int)])
    items = Items(directory / _ITEMS, int(offsets[-1]))
    whole = items[:] if not stream else items
    items[max(len(items) - 1, 0) :]  # the file is as long as it should be
  except (KeyError, OSError, RuntimeError, ValueError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise InputError(
      f"{directory} holds no stored interactions ({reason}); write them with "
      "python -m experiments.store"
    ) from error
  if about["schema"] != _SCHEMA:
    raise InputError(
      f"{directory} is of schema {about['schema']}, not {_SCHEMA}; store it "
      "anew"
    )
  made = {
    "name": about["name"], "items": whole, "offsets": offsets, "times": None,
    "notes": about["notes"], **arrays,
  }
  if not stream:
    return Interactions(**made)
  return Stored(**made, digest=about["fingerprint"])


def write(data: Interactions, path: epath.PathLike) -> None:
  """Writes interactions in memory; see `write_chunks`."""
  chunk = 1_000_000
  write_chunks(
    path, lengths=data.lengths, user_ids=data.user_ids, item_ids=data.item_ids,
    items=(
      data.items[start : start + chunk]
      for start in range(0, len(data.items), chunk)
    ),
    name=data.name, notes=dict(data.notes),
  )


def write_chunks(
  path: epath.PathLike,
  *,
  lengths: np.ndarray,
  items: Iterable[np.ndarray],
  user_ids: np.ndarray,
  item_ids: np.ndarray,
  name: str,
  notes: dict[str, Any],
) -> None:
  """Writes interactions that come in pieces.

  Args:
    path: the directory, which is made; complete once about.json is there.
    lengths: [U], of each user's history.
    items: pieces of [N] int32 in 1..V, users one after another.
    user_ids: [U].
    item_ids: [V].
    name: of the data set.
    notes: see `Interactions`.

  Raises:
    InputError: if the directory exists, or the pieces are not N items.
  """
  directory = epath.Path(path).expanduser()
  if directory.exists():
    raise InputError(f"{directory} exists; delete it or give another directory")
  directory.mkdir(parents=True)
  arrays = {"lengths": lengths, "user_ids": user_ids, "item_ids": item_ids}
  for key, values in arrays.items():
    with (directory / _FILES[key]).open("wb") as file:
      np.save(file, _plain(np.asarray(values)), allow_pickle=False)
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(directory / _ITEMS), "group_size:1"
  )
  written = 0
  for block in _blocks(items):
    writer.write(block.astype("<i4").tobytes())
    written += len(block)
  writer.close()
  total = int(np.sum(lengths, dtype=np.int64))
  if written != total:
    raise InputError(f"{directory}: {written} items for {total} interactions")
  whole = Interactions(
    name, Items(directory / _ITEMS, total),
    np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), None,
    np.asarray(user_ids), np.asarray(item_ids),
  )
  about = {
    "schema": _SCHEMA, "name": name, "notes": notes,
    "fingerprint": whole.fingerprint,
  }
  (directory / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def _blocks(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """The same items in pieces of `_BLOCK`, the last but shorter."""
  left = np.zeros(0, np.int32)
  for piece in pieces:
    left = np.concatenate([left, np.asarray(piece, np.int32)])
    whole = len(left) // _BLOCK * _BLOCK
    yield from left[:whole].reshape(-1, _BLOCK)
    left = left[whole:]
  if len(left):
    yield left


def _plain(values: np.ndarray) -> np.ndarray:
  """Text ids as fixed-width text, which numpy stores without objects."""
  return values.astype(np.str_) if values.dtype == object else values


def _load(path: epath.Path) -> np.ndarray:
  with path.open("rb") as file:
    values = np.load(file, allow_pickle=False)
  return values.astype(object) if values.dtype.kind == "U" else values
