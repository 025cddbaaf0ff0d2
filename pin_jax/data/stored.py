"""Interactions on disk, read by position: for data that memory does not hold.

A directory holds the users' items as one flat array, cut into records of an
ArrayRecord file, which grain reads in any order, and what there is of every
user and item as arrays. Times are not kept: the order of a user's items is. It
is written as a whole, and what was changed since is refused.
"""

import json
import os
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python import array_record_module
from etils import epath

from pin_jax import disk
from pin_jax.data.interactions import Interactions
from pin_jax.types import InputError

_SCHEMA = 1
_BLOCK = 1024  # items a record
_FILES = {
  name: f"{name}.npy" for name in ("lengths", "user_ids", "item_ids")
}
_DAMAGE = (  # what numpy, grain and json raise
  ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError,
  TypeError, ValueError, tokenize.TokenError,
)
_ITEMS, _ABOUT = "items.array_record", "about.json"


class Items:
  """[N] int32 on disk; slices and indices of any shape are read when asked for.

  Safe to read from several threads. As a whole it is read by `numpy.asarray`.
  """

  dtype = np.dtype(np.int32)
  ndim = 1

  def __init__(self, path: epath.PathLike) -> None:
    """Opens the file."""
    self._source = grain.sources.ArrayRecordDataSource([os.fspath(path)])
    last = len(self._source) - 1
    self.shape = (last * _BLOCK + len(self._read([last])),)

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


class Stored(Interactions):
  """Interactions whose `items` are an `Items`."""

  def select_users(self, mask_or_indices: Any) -> Interactions:
    """Refused: what is on disk stays as it is."""
    raise InputError(
      f"{self.name!r} is read from disk and holds users that the split drops; "
      "store it with min_length=3"
    )


def read(path: epath.PathLike, *, stream: bool = True) -> Interactions:
  """Opens what `write` has written, and reads it once to see that it is that.

  Args:
    path: the directory.
    stream: leave the items on disk; else read them into memory.

  Returns:
    The interactions.

  Raises:
    InputError: if the directory is not of this form, not complete, or not what
      was written.
  """
  directory = disk.place("path", path, here=True)
  try:
    about = json.loads((directory / _ABOUT).read_text())
    if about["schema"] != _SCHEMA:
      raise ValueError(f"schema {about['schema']} instead of {_SCHEMA}")
    mapped = {key: _mapped(directory / name) for key, name in _FILES.items()}
    total, items = _total(**mapped), Items(directory / _ITEMS)
    if len(items) != total:
      raise ValueError(f"{len(items)} items for {total} interactions")
    made = (Stored if stream else Interactions)(
      name=str(about["name"]), items=items if stream else items[:],
      offsets=_offsets(mapped["lengths"]), times=None,
      user_ids=_ids(mapped["user_ids"]), item_ids=_ids(mapped["item_ids"]),
      notes=dict(about["notes"]),
    )
    if made.fingerprint != about["fingerprint"]:
      raise ValueError("its contents do not match its fingerprint")
  except _DAMAGE as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise InputError(
      f"{directory} holds no stored interactions ({reason}); store them anew"
    ) from error
  return made


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
    path: the directory, which is made, as a whole or not at all.
    lengths: [U], of each user's history.
    items: pieces of [N] integers in 1..V, users one after another.
    user_ids: [U] int64, or text.
    item_ids: [V], likewise.
    name: of the data set.
    notes: see `Interactions`.

  Raises:
    InputError: if the directory exists, or the arrays do not fit each other.
    OSError: if it cannot be written.
  """
  arrays = {
    "lengths": np.asarray(lengths), "user_ids": np.asarray(user_ids),
    "item_ids": np.asarray(item_ids),
  }
  total = _guarded(path, lambda: _total(**arrays))
  with disk.new_directory(path) as directory:
    for key, values in arrays.items():
      with (directory / _FILES[key]).open("wb") as file:
        plain = _guarded(path, lambda values=values: _plain(values))
        np.save(file, plain, allow_pickle=False)
    written = _write_items(directory / _ITEMS, items, len(item_ids), path)
    if written != total:
      raise InputError(f"{path}: {written} items for {total} interactions")
    whole = Interactions(
      name, Items(directory / _ITEMS), _offsets(arrays["lengths"]), None,
      arrays["user_ids"], arrays["item_ids"],
    )
    about = {
      "schema": _SCHEMA, "name": name, "notes": notes,
      "fingerprint": whole.fingerprint,
    }
    (directory / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def _write_items(
  file: os.PathLike, pieces: Iterable[np.ndarray], num_items: int,
  path: epath.PathLike,
) -> int:
  """Writes the pieces, each checked; returns how many items they hold."""

  def checked(piece: np.ndarray) -> np.ndarray:
    piece = np.asarray(piece)
    if piece.dtype.kind not in "iu" or piece.ndim != 1:
      raise ValueError(f"items are {piece.dtype} of shape {piece.shape}")
    if piece.size and not 1 <= piece.min() <= piece.max() <= num_items:
      raise ValueError(
        f"items span {piece.min()} to {piece.max()}, not 1 to {num_items}"
      )
    return piece.astype(np.int32)

  pieces = (_guarded(path, lambda p=piece: checked(p)) for piece in pieces)
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(file), "group_size:1"
  )
  written = 0
  for block in _blocks(pieces):
    writer.write(block.astype("<i4").tobytes())
    written += len(block)
  try:
    writer.close()
  except (RuntimeError, ValueError) as error:  # what it could not write
    raise OSError(str(error).partition(";")[0]) from error
  return written


def _guarded(path: epath.PathLike, step: Callable[[], Any]) -> Any:
  """A ValueError of the step becomes an InputError with the path."""
  try:
    return step()
  except ValueError as error:
    raise InputError(f"{path} cannot be stored: {error}") from error


def _total(
  lengths: np.ndarray, user_ids: np.ndarray, item_ids: np.ndarray
) -> int:
  """N; raises ValueError for arrays that do not fit each other."""
  for name, values, kinds in (
    ("lengths", lengths, "iu"), ("user_ids", user_ids, "iOU"),
    ("item_ids", item_ids, "iOU"),
  ):
    if values.ndim != 1 or values.dtype.kind not in kinds or not len(values):
      raise ValueError(
        f"{name} are {values.dtype} of shape {values.shape}, not one "
        f"{'whole number' if kinds == 'iu' else 'integer or text'} of each"
      )
  if len(user_ids) != len(lengths):
    raise ValueError(f"{len(user_ids)} user_ids for {len(lengths)} lengths")
  if len(item_ids) >= 2**31:
    raise ValueError(f"{len(item_ids)} item_ids exceed int32")
  if lengths.min() < 0 or lengths.sum(dtype=np.float64) >= 2**62:
    raise ValueError(f"lengths span {lengths.min()} to {lengths.max()}")
  return int(lengths.sum(dtype=np.int64))


def _offsets(lengths: np.ndarray) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _blocks(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """The same items in pieces of `_BLOCK`, the last but shorter."""
  left = np.zeros(0, np.int32)
  for piece in pieces:
    left = np.concatenate([left, piece])
    whole = len(left) // _BLOCK * _BLOCK
    yield from left[:whole].reshape(-1, _BLOCK)
    left = left[whole:]
  if len(left):
    yield left


def _plain(values: np.ndarray) -> np.ndarray:
  """Text ids as fixed-width text, which numpy stores without objects."""
  if values.dtype != object:
    return values
  plain = values.astype(np.str_)
  if (plain != values).any():
    bad = values[np.argmax(plain != values)]
    raise ValueError(f"the id {bad!r} ends with NUL or is no text; rename it")
  return plain


def _mapped(path: epath.Path) -> np.ndarray:
  """An array on disk: nothing is allocated for what its header promises."""
  return np.load(os.fspath(path), mmap_mode="r", allow_pickle=False)


def _ids(values: np.ndarray) -> np.ndarray:
  return values.astype(object if values.dtype.kind == "U" else np.int64)
