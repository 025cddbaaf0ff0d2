"""Interactions on disk, read by position: for data that memory does not hold.

A directory holds numpy's own files: the users' items as one flat array, the
length of every history, and the ids. Times are not kept: the order of a user's
items is.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from pin_jax import disk
from pin_jax.data.interactions import Interactions, offsets_of
from pin_jax.types import InputError

_SCHEMA = 2  # 1 had the items as an ArrayRecord file
_CHUNK = 1_000_000  # items


class Stored(Interactions):
  """Interactions whose `items` are on disk."""

  def select_users(self, users: np.ndarray) -> Interactions:
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

  Raises:
    InputError: if the directory is not of this form, not complete, or not what
      was written.
  """
  directory = disk.place("path", path, here=True)
  with disk.reading(directory, "store the interactions anew"):
    about = json.loads((directory / "about.json").read_text())
    if about["schema"] != _SCHEMA:
      raise ValueError(
        f"its form is {about['schema']}, this version reads {_SCHEMA}"
      )
    items, lengths, user_ids, item_ids = (
      _mapped(directory / f"{name}.npy")
      for name in ("items", "lengths", "user_ids", "item_ids")
    )
    made = (Stored if stream else Interactions)(
      about["name"], items if stream else items.copy(), offsets_of(lengths),
      None, _ids(user_ids), _ids(item_ids), about["notes"],
    )
    if made.fingerprint != about["fingerprint"]:
      raise ValueError("its contents do not match its fingerprint")
  return made


def write(data: Interactions, path: epath.PathLike) -> None:
  """Writes interactions in memory; see `write_chunks`."""
  starts = range(0, len(data.items), _CHUNK)
  write_chunks(
    path, lengths=data.lengths, user_ids=data.user_ids, item_ids=data.item_ids,
    items=(data.items[start : start + _CHUNK] for start in starts),
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
  """Writes interactions that come in chunks.

  Args:
    path: the directory, which is made, as a whole or not at all.
    lengths: [U], of each user's history.
    items: chunks of [N] integers in 1..V, users one after another.
    user_ids: [U] int64, or text.
    item_ids: [V], likewise.
    name, notes: see `Interactions`.

  Raises:
    InputError: if the directory exists, or the arrays do not fit each other.
    WriteError: if it cannot be written.
  """
  arrays = {"lengths": lengths, "user_ids": user_ids, "item_ids": item_ids}
  try:
    for key, values in arrays.items():
      kinds = "iu" if key == "lengths" else "iOU"
      if values.ndim != 1 or values.dtype.kind not in kinds or not len(values):
        raise ValueError(f"{key} are {values.dtype} of shape {values.shape}")
    if len(user_ids) != len(lengths):
      raise ValueError(f"{len(user_ids)} user_ids for {len(lengths)} lengths")
    if len(item_ids) >= 2**31:
      raise ValueError(f"{len(item_ids)} item_ids exceed int32")
    if lengths.min() < 0 or lengths.sum(dtype=np.float64) >= 2**62:
      raise ValueError(f"lengths span {lengths.min()} to {lengths.max()}")
    total = int(lengths.sum(dtype=np.int64))
    with disk.new_directory(path) as directory:
      for key, values in arrays.items():
        with (directory / f"{key}.npy").open("wb") as file:
          np.save(file, _plain(values), allow_pickle=False)
      # Not through a mapping, in which a full disk is a signal.
      with (directory / "items.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {
          "descr": "<i4", "fortran_order": False, "shape": (total,)
        })
        written = 0
        for chunk in items:
          written += len(chunk)
          file.write(_checked(chunk, len(item_ids)).tobytes())
      if written != total:
        raise ValueError(f"{written} items for {total} interactions")
      whole = Interactions(
        name, _mapped(directory / "items.npy"), offsets_of(lengths), None,
        user_ids, item_ids,
      )
      about = {
        "schema": _SCHEMA, "name": name, "notes": notes,
        "fingerprint": whole.fingerprint,
      }
      (directory / "about.json").write_text(json.dumps(about, indent=2) + "\n")
  except InputError:
    raise
  except ValueError as error:
    raise InputError(f"{path} cannot be stored: {error}") from error


def _checked(items: np.ndarray, num_items: int) -> np.ndarray:
  if items.dtype.kind not in "iu" or items.ndim != 1:
    raise ValueError(f"items are {items.dtype} of shape {items.shape}")
  if items.size and not 1 <= items.min() <= items.max() <= num_items:
    raise ValueError(
      f"items span {items.min()} to {items.max()}, not 1 to {num_items}"
    )
  return items.astype("<i4")


def _plain(values: np.ndarray) -> np.ndarray:
  """Text ids as fixed-width text, which numpy stores without objects."""
  if values.dtype != object:
    return values
  plain = values.astype(np.str_)
  if (plain != values).any():
    bad = values[np.argmax(plain != values)]
    raise ValueError(f"the id {bad!r} ends with NUL or is no text; rename it")
  return plain


def _mapped(path: os.PathLike) -> np.ndarray:
  """An array on disk: nothing is allocated for what its header promises."""
  array = np.load(os.fspath(path), mmap_mode="r", allow_pickle=False)
  return array.view(np.ndarray)


def _ids(values: np.ndarray) -> np.ndarray:
  return values.astype(object if values.dtype.kind == "U" else np.int64)
