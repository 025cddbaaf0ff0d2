"""Interactions: who did what, in order, as compact user-sorted arrays.

Everything downstream reads the same few flat arrays; a user's history is a
slice of them. The original ids travel along, so that results can be joined
back to the source, and a fingerprint names the contents.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from pin_jax.types import InputError, at_least

Column = np.ndarray | pl.Series | Sequence
DUPLICATES = ("keep", "exact", "first", "last")
_CHUNK = 2**22  # elements at a time
_UNITS = {"ms": 10**3, "us": 10**6, "ns": 10**9}  # in a second
_NO_TIMES_NOTE = "row order (the source has no times)"


@dataclasses.dataclass(frozen=True, eq=False)
class Interactions:
  """Interactions of U users with V items, users contiguous, in time order.

  Attributes:
    name: What to call the data in logs and tables.
    items: [N] int32 in 1..V (0 is padding); equal times keep the row order.
    offsets: [U+1] int64; user u owns items[offsets[u]:offsets[u+1]].
    times: [N] int64 or float64 as in the source, or None where it has none.
      They never merge what the source tells apart.
    user_ids: [U] original ids, ascending: int64, or object array of str.
    item_ids: [V] original id of item v is item_ids[v-1]; same types.
    notes: What reading and filtering did: rows_read, duplicates_dropped,
      users_dropped, items_dropped, order, and tied_share where times exist.
  """

  name: str
  items: np.ndarray
  offsets: np.ndarray
  times: np.ndarray | None
  user_ids: np.ndarray
  item_ids: np.ndarray
  notes: Mapping[str, int | float | str] = dataclasses.field(
    default_factory=dict
  )

  @property
  def num_users(self) -> int:
    """U."""
    return len(self.offsets) - 1

  @property
  def num_items(self) -> int:
    """V, without the padding item."""
    return len(self.item_ids)

  @property
  def num_interactions(self) -> int:
    """N."""
    return len(self.items)

  @property
  def lengths(self) -> np.ndarray:
    """[U] int64 number of interactions of each user."""
    return np.diff(self.offsets)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 (hex) of the contents; `name` and `notes` do not count."""
    digest = hashlib.sha256()
    for values in (
      self.items, self.offsets, self.times, self.user_ids, self.item_ids
    ):
      _update_digest(digest, values)
    return digest.hexdigest()

  def select_users(self, mask_or_indices: Column) -> "Interactions":
    """Returns the chosen users with the item catalogue left as it is.

    Args:
      mask_or_indices: [U] booleans, or distinct user indices, whose order
        becomes the new order of the users.

    Returns:
      The selection; `tied_share` is computed anew, other notes are kept.

    Raises:
      InputError: for a wrong shape or type, an index that is out of range or
        repeated, or an empty selection.
    """
    users = _as_indices(np.asarray(mask_or_indices), self.num_users)
    lengths = self.lengths[users]
    offsets = _offsets(lengths)
    shift = np.repeat(self.offsets[users] - offsets[:-1], lengths)
    rows = np.arange(offsets[-1]) + shift
    times = None if self.times is None else self.times[rows]
    return dataclasses.replace(
      self,
      items=self.items[rows],
      offsets=offsets,
      times=times,
      user_ids=self.user_ids[users],
      notes={**self.notes, **_tied_share(offsets, times)},
    )


def from_columns(
  users: Column,
  items: Column,
  times: Column | None = None,
  *,
  name: str = "data",
  duplicates: str = "keep",
  k_core: int = 0,
  min_length: int = 1,
  max_history: int | None = None,
) -> Interactions:
  """Builds Interactions from one row per interaction, in any row order.

  Users and items are numbered by their sorted original ids, so numbering does
  not depend on the order of rows. Steps, in this order: sort by (user, time),
  drop duplicates, filter by `k_core` and `min_length` together until nothing
  changes, cut to `max_history`, drop items that occur no more.

  Args:
    users: [N] integers or strings.
    items: [N] integers or strings.
    times: [N] numbers, or dates, which become Unix seconds (UTC), or stay in
      their own unit where float64 seconds would merge some; None keeps the row
      order.
    name: What to call the data.
    duplicates: 'keep'; 'exact' drops repeats of (user, item, time); 'first' and
      'last' keep one interaction per (user, item).
    k_core: Every user and every item has at least this many interactions.
    min_length: Users with fewer interactions are dropped.
    max_history: Keep only a user's last so many interactions.

  Returns:
    The interactions, with counts of what was dropped in `notes`.

  Raises:
    InputError: for empty or mismatched columns, null, empty or merged ids,
      times that are not finite or whose type merges them, unknown options, or
      no user left.
  """
  _check_options(duplicates, k_core, min_length, max_history)
  users, items = _series(users, "users"), _series(items, "items")
  times = None if times is None else _series(times, "times")
  _check_lengths(users, items, times)
  times = None if times is None else _numbers(times)
  rows_read = len(users)
  users, user_ids = _encode(_ids(users))
  items, item_ids = _encode(_ids(items))
  found = len(user_ids), len(item_ids)

  if not _is_sorted(users, times):
    order = np.lexsort((users,) if times is None else (times, users))
    users, items, times = _take(order, users, items, times)
    del order
  if duplicates != "keep":
    keep = _distinct(users, items, times, duplicates, len(item_ids))
    users, items, times = _take(keep, users, items, times)
  distinct = len(users)
  users, items, times = _core(users, items, times, k_core, min_length)
  if not len(users):
    raise InputError(
      f"no user of {name!r} is left after k_core={k_core}, "
      f"min_length={min_length}; lower them"
    )
  filtered = len(users)
  if max_history is not None:
    keep = _positions_from_end(users) < min(max_history, len(users))
    users, items, times = _take(keep, users, items, times)
  users, user_ids = _compact(users, user_ids)
  items, item_ids = _compact(items, item_ids)
  offsets = _offsets(_counts(users, len(user_ids)))
  notes = {
    "rows_read": rows_read,
    "duplicates_dropped": rows_read - distinct,
    "users_dropped": found[0] - len(user_ids),
    "items_dropped": found[1] - len(item_ids),
    "order": _NO_TIMES_NOTE if times is None else "time, ties in row order",
    **_tied_share(offsets, times),
  }
  if max_history is not None:
    notes["history_cut"] = filtered - len(items)
  items += 1
  if times is not None and not times.flags.writeable:
    times = times.copy()  # a view of the caller's memory
  return Interactions(name, items, offsets, times, user_ids, item_ids, notes)


def _check_options(
  duplicates: str, k_core: int, min_length: int, max_history: int | None
) -> None:
  """Raises InputError for an option that is out of range."""
  if duplicates not in DUPLICATES:
    raise InputError(
      f"duplicates={duplicates!r} is unknown; use one of {DUPLICATES}"
    )
  at_least(0, k_core=k_core)
  at_least(1, min_length=min_length)
  if max_history is not None:
    at_least(1, max_history=max_history)


def _series(values: Column, axis: str) -> pl.Series:
  """Returns a flat polars Series without nulls."""
  if not isinstance(values, pl.Series):
    if isinstance(values, np.ndarray) and values.ndim != 1:
      raise InputError(f"{axis} has shape {values.shape}; give a flat column")
    if getattr(values, "dtype", None) == np.dtype(object):
      values = list(values)
    try:
      values = pl.Series(axis, values, strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
      raise InputError(
        f"{axis} mixes types or holds unknown ones; give integers or strings"
      ) from None
  if values.null_count():
    row = values.is_null().arg_max()
    raise InputError(f"{axis}[{row}] is null; drop or fill such rows")
  return values.alias(axis)


def _ids(values: pl.Series) -> pl.Series:
  """Returns ids as Int32, Int64 or String."""
  axis, kind = values.name, values.dtype
  if kind in (pl.Categorical, pl.Enum):
    values = values.cast(pl.String)
  if values.dtype == pl.String:
    if (values == "").any():
      row = (values == "").arg_max()
      raise InputError(f"{axis}[{row}] = '' is empty; drop or fill such rows")
    return values
  if kind.is_float():
    whole = values.is_finite() & (values.floor() == values)
    if not whole.all():
      row = whole.arg_min()
      raise InputError(
        f"{axis}[{row}] = {values[row]} is no id; give integers or strings"
      )
    _check_exact(values, "ids", "give integers or strings")
  elif not kind.is_integer():
    raise InputError(f"{axis} are {kind}; give integers or strings")
  return _as_int64(values, "give them as strings")


def _check_exact(values: pl.Series, what: str, remedy: str) -> None:
  """Raises InputError for floats so large that whole numbers have merged."""
  digits = 53 if values.dtype == pl.Float64 else 24
  if values.dtype == pl.Float16:
    digits = 11
  row = values.abs().arg_max()
  if len(values) and abs(values[row]) >= 2**digits:
    raise InputError(
      f"{values.name}[{row}] = {values[row]} is a {values.dtype} at or beyond "
      f"2^{digits}, where different {what} are merged; {remedy}"
    )


def _as_int64(values: pl.Series, remedy: str) -> pl.Series:
  """Returns whole numbers as they are where they are Int32, else as Int64."""
  if values.dtype == pl.Int32:
    return values
  try:
    return values.cast(pl.Int64)
  except pl.exceptions.PolarsError:
    raise InputError(
      f"{values.name} span {values.min()} to {values.max()}, beyond int64; "
      f"{remedy}"
    ) from None


def _numbers(values: pl.Series) -> np.ndarray:
  """Returns times as int64 or float64; dates become Unix seconds."""
  if values.dtype.is_temporal():
    return _unix_seconds(values)
  if values.dtype.is_integer():
    whole = _as_int64(values, "use a coarser unit")
    return whole.cast(pl.Int64).to_numpy()
  if not values.dtype.is_float():
    raise InputError(
      f"times are {values.dtype}; give numbers, or dates as datetimes"
    )
  finite = values.is_finite()
  if not finite.all():
    row = finite.arg_min()
    raise InputError(
      f"times[{row}] = {values[row]} is not finite; drop the row"
    )
  _check_exact(values, "times", "give integers, or use a coarser unit")
  return values.cast(pl.Float64).to_numpy()


def _unix_seconds(values: pl.Series) -> np.ndarray:
  """Returns dates as int64 or float64 seconds, or in their unit; see above."""
  if values.dtype in (pl.Time, pl.Duration):
    raise InputError(f"times are {values.dtype}; give dates or numbers")
  if values.dtype == pl.Date:
    return values.to_physical().cast(pl.Int64).to_numpy() * 86_400
  unit = _UNITS[values.dtype.time_unit]
  ticks = values.to_physical().to_numpy()
  if not (ticks % unit).any():
    return ticks // unit
  distinct = np.unique(ticks)
  merged = (np.diff(distinct / unit) <= 0).any()
  return ticks.copy() if merged else ticks / unit


def _check_lengths(
  users: pl.Series, items: pl.Series, times: pl.Series | None
) -> None:
  """Raises InputError for columns that are empty or of different lengths."""
  lengths = {"users": len(users), "items": len(items)}
  if times is not None:
    lengths["times"] = len(times)
  if len(set(lengths.values())) > 1:
    raise InputError(f"columns differ in length: {lengths}; give equal ones")
  if not lengths["users"]:
    raise InputError("there are no interactions (0 rows); check the source")


def _encode(values: pl.Series) -> tuple[np.ndarray, np.ndarray]:
  """Returns [N] int32 codes and the ids they stand for, ascending."""
  if values.dtype.is_integer():
    low, span = values.min(), values.max() - values.min() + 1
    if span <= max(len(values), _CHUNK):
      return _encode_dense(values, low, span)
    values = values.cast(pl.Int64)
  ids = values.unique().sort()
  numbers = pl.Series(np.arange(len(ids), dtype=np.int32))
  codes = values.replace_strict(ids, numbers, return_dtype=pl.Int32)
  return codes.to_numpy(), ids.to_numpy(writable=True)


def _encode_dense(
  values: pl.Series, low: int, span: int
) -> tuple[np.ndarray, np.ndarray]:
  """`_encode` of integers low .. low + span - 1, in little more memory."""
  present = np.zeros(span, bool)
  codes = np.empty(len(values), np.int32)
  chunks = range(0, len(values), _CHUNK)
  place = lambda start: (
    values.slice(start, _CHUNK).cast(pl.Int64).to_numpy() - low
  )
  for start in chunks:
    present[place(start)] = True
  number = np.cumsum(present, dtype=np.int32) - np.int32(1)
  for start in chunks:
    codes[start : start + _CHUNK] = number[place(start)]
  return codes, np.flatnonzero(present) + low


def _is_sorted(users: np.ndarray, times: np.ndarray | None) -> bool:
  """Tells whether rows are already in (user, time) order."""
  if (users[1:] < users[:-1]).any():
    return False
  if times is None:
    return True
  back = times[1:] < times[:-1]
  back &= users[1:] == users[:-1]
  return not back.any()


def _take(
  rows: np.ndarray,
  users: np.ndarray,
  items: np.ndarray,
  times: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Returns the columns at `rows`, a mask or indices."""
  return users[rows], items[rows], None if times is None else times[rows]


def _distinct(
  users: np.ndarray,
  items: np.ndarray,
  times: np.ndarray | None,
  duplicates: str,
  num_items: int,
) -> np.ndarray:
  """Returns the [N] mask of rows that `duplicates` keeps; rows are sorted."""
  blocks = users.astype(np.int64)
  if duplicates == "exact":
    if times is None:
      raise InputError(
        "duplicates='exact' needs times; use 'first' or 'last' without them"
      )
    starts = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
    blocks = np.concatenate([[0], np.cumsum(starts)])
  keys = pl.Series(blocks * num_items + items)
  if duplicates == "last":
    return keys.is_last_distinct().to_numpy()
  return keys.is_first_distinct().to_numpy()


def _core(
  users: np.ndarray,
  items: np.ndarray,
  times: np.ndarray | None,
  k_core: int,
  min_length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Drops users and items that are too rare until none is left."""
  least = max(k_core, min_length)
  while len(users) and least > 1:
    keep = (np.bincount(users) >= least)[users]
    keep &= (np.bincount(items) >= k_core)[items]
    if keep.all():
      break
    users, items, times = _take(keep, users, items, times)
  return users, items, times


def _positions_from_end(users: np.ndarray) -> np.ndarray:
  """Returns how many later interactions the same user has; 0 = the last."""
  ends = np.cumsum(np.bincount(users))
  return ends[users] - 1 - np.arange(len(users))


def _compact(
  codes: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Renumbers codes so that every id occurs; keeps their order."""
  present = _counts(codes, len(ids)) > 0
  if present.all():
    return codes if codes.flags.writeable else codes.copy(), ids
  renumber = np.cumsum(present, dtype=np.int32) - 1
  return renumber[codes], ids[present]


def _counts(codes: np.ndarray, size: int) -> np.ndarray:
  """Returns how often each of 0 .. size - 1 occurs."""
  counts = np.zeros(size, np.int64)
  for start in range(0, len(codes), _CHUNK):
    counts += np.bincount(codes[start : start + _CHUNK], minlength=size)
  return counts


def _offsets(lengths: np.ndarray) -> np.ndarray:
  """Returns [U+1] int64 borders of slices of the given lengths."""
  return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _tied_share(
  offsets: np.ndarray, times: np.ndarray | None
) -> dict[str, float]:
  """Returns the share of a user's adjacent pairs that have equal times."""
  if times is None:
    return {}
  same = times[1:] == times[:-1]
  borders = offsets[1:-1]
  ties = int(same.sum()) - int(same[borders[borders > 0] - 1].sum())
  pairs = len(times) - (len(offsets) - 1)
  return {"tied_share": ties / pairs if pairs else 0.0}


def _as_indices(chosen: np.ndarray, num_users: int) -> np.ndarray:
  """Returns user indices for a mask or for indices, checked."""
  if chosen.dtype == bool:
    if chosen.shape != (num_users,):
      raise InputError(
        f"the mask of users has shape {chosen.shape}; give ({num_users},)"
      )
    chosen = np.flatnonzero(chosen)
  if chosen.ndim != 1 or not chosen.size:
    raise InputError(
      f"the selection of users has shape {chosen.shape}; choose at least one"
    )
  if not np.issubdtype(chosen.dtype, np.integer):
    raise InputError(
      f"the selection of users is {chosen.dtype}; give booleans or integers"
    )
  if chosen.min() < 0 or chosen.max() >= num_users:
    raise InputError(
      f"user indices span {chosen.min()}..{chosen.max()}; "
      f"give 0..{num_users - 1}"
    )
  if len(np.unique(chosen)) != len(chosen):
    raise InputError("a user index is repeated; give each user once")
  return chosen


def _update_digest(
  digest: "hashlib._Hash", values: np.ndarray | None
) -> None:
  """Adds type, length and contents of an array, unambiguously."""
  if values is None:
    digest.update(b"none;")
    return
  if values.dtype == object:
    texts = [text.encode() for text in values]
    digest.update(f"str {len(texts)};".encode())
    lengths = np.array([len(text) for text in texts], "<i8")
    digest.update(lengths.tobytes())
    digest.update(b"".join(texts))
    return
  kind = values.dtype.newbyteorder("<")
  digest.update(f"{kind.str} {len(values)};".encode())
  for start in range(0, len(values), _CHUNK):
    part = values[start : start + _CHUNK]
    digest.update(np.ascontiguousarray(part.astype(kind, copy=False)))
