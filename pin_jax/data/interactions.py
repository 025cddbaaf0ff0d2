"""Interactions: who did what, in order, as compact user-sorted arrays.

The original ids travel along, so that results can be joined back to the source,
and a fingerprint names the contents.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import polars as pl

from pin_jax.types import InputError, at_least

Column = np.ndarray | pl.Series | Sequence
DUPLICATES = ("keep", "exact", "first", "last")
_CHUNK = 2**22  # elements at a time
_MANY_REPEATS, _MANY_TIES = 0.01, 0.2  # shares that are worth a warning
_UNITS = {"ms": 10**3, "us": 10**6, "ns": 10**9}  # in a second


class RowError(InputError):
  """A value that cannot be used; says which and why."""

  def __init__(self, axis: str, row: int, fault: str) -> None:
    super().__init__(f"{axis}[{row}] {fault}")
    self.axis, self.row, self.fault = axis, row, fault


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
      users_dropped, items_dropped, order, tied_share where times exist, and
      `warnings` of what makes results mean little, where there are any.
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

  def __repr__(self) -> str:
    """Sizes and notes, and warnings last."""
    notes = [f"{key} {value}" for key, value in self.notes.items()]
    return "\n  ".join((
      f"{self.name}: {self.num_users:,} users, {self.num_items:,} items, "
      f"{self.num_interactions:,} interactions",
      *sorted(notes, key=lambda note: note.startswith("warnings")),
    ))

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

  def select_users(self, mask: np.ndarray) -> "Interactions":
    """The users of a mask [U], with the catalogue of items left as it is.

    `tied_share` is computed anew; other notes are kept.
    """
    rows = np.repeat(mask, self.lengths)
    offsets = offsets_of(self.lengths[mask])
    times = None if self.times is None else self.times[rows]
    return dataclasses.replace(
      self, items=self.items[rows], offsets=offsets, times=times,
      user_ids=self.user_ids[mask],
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
    name: of the data.
    duplicates: 'keep'; 'exact' drops repeats of (user, item, time); 'first' and
      'last' keep one interaction per (user, item).
    k_core: Every user and every item has at least this many interactions.
    min_length: Users with fewer interactions are dropped.
    max_history: Keep only a user's last so many interactions.

  Raises:
    InputError: for empty or mismatched columns, null, empty or merged ids,
      times that are not finite or whose type merges them, unknown options, or
      no user left.
  """
  if duplicates not in DUPLICATES:
    raise InputError(
      f"duplicates={duplicates!r} is unknown; use one of {DUPLICATES}"
    )
  at_least(0, k_core=k_core)
  cut = 1 if max_history is None else max_history
  at_least(1, min_length=min_length, max_history=cut)
  if duplicates == "exact" and times is None:
    raise InputError(
      "duplicates='exact' needs times; use 'first' or 'last' without them"
    )
  columns, user_ids, item_ids = _sorted(users, items, times)
  rows_read = len(columns[0])
  if duplicates != "keep":
    columns = _distinct(columns, duplicates)
  distinct = len(columns[0])
  columns = _core(columns, k_core, max(k_core, min_length))
  filtered = len(columns[0])
  if not filtered:
    raise InputError(
      f"no user of {name!r} is left after k_core={k_core}, "
      f"min_length={min_length}; lower them"
    )
  if max_history is not None:
    later = np.cumsum(np.bincount(columns[0]))[columns[0]] - np.arange(filtered)
    columns = [x[later <= min(max_history, filtered)] for x in columns]
  (users, items, *rest), read = columns, (len(user_ids), len(item_ids))
  del columns
  users, user_ids = _compact(users, user_ids)
  items, item_ids = _compact(items, item_ids)
  times = rest[0] if rest else None
  offsets = offsets_of(_counts(users, len(user_ids)))
  notes = {
    "rows_read": rows_read,
    "duplicates_dropped": rows_read - distinct,
    "users_dropped": read[0] - len(user_ids),
    "items_dropped": read[1] - len(item_ids),
    "order": "row order (the source has no times)" if times is None else
    "time, ties in row order",
    **_tied_share(offsets, times),
  }
  if max_history is not None:
    notes["history_cut"] = filtered - len(items)
  if found := [*_doubts(users, items, times, offsets)]:
    notes["warnings"] = "; ".join(found)
  if times is not None and not times.flags.writeable:
    times = times.copy()  # a view of the caller's memory
  items += 1
  return Interactions(name, items, offsets, times, user_ids, item_ids, notes)


def _distinct(columns: list[np.ndarray], duplicates: str) -> list[np.ndarray]:
  keys = pl.DataFrame(columns[: 3 if duplicates == "exact" else 2])
  rows = np.sort(keys.with_row_index("row").unique(
    keys.columns, keep="last" if duplicates == "last" else "first"
  )["row"])
  return [x[rows] for x in columns]


def _sorted(
  users: Column, items: Column, times: Column | None
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
  """Columns of codes, and times if any, by (user, time); ids of both codes."""
  given = {"users": users, "items": items, "times": times}
  series = {x: as_series(v, x) for x, v in given.items() if v is not None}
  lengths = {axis: len(values) for axis, values in series.items()}
  if len(set(lengths.values())) > 1:
    raise InputError(f"columns differ in length: {lengths}; give equal ones")
  if not lengths["users"]:
    raise InputError("there are no interactions (0 rows); check the source")
  columns = [_numbers(series["times"])] if times is not None else []
  items, item_ids = _encode(_ids(series["items"]))
  users, user_ids = _encode(_ids(series["users"]))
  columns = [users, items, *columns]
  back = users[1:] < users[:-1]
  for times in columns[2:]:
    back |= (times[1:] < times[:-1]) & (users[1:] == users[:-1])
  if back.any():
    order = np.lexsort((*columns[2:], users))
    columns = [x[order] for x in columns]
  return columns, user_ids, item_ids


def _core(
  columns: list[np.ndarray], of_item: int, of_user: int
) -> list[np.ndarray]:
  """Drops users and items that are too rare until none is left."""
  while max(of_item, of_user) > 1 and len(columns[0]):
    users, items = columns[:2]
    keep = (np.bincount(users) >= of_user)[users]
    keep &= (np.bincount(items) >= of_item)[items]
    if keep.all():
      break
    columns = [x[keep] for x in columns]
  return columns


def offsets_of(lengths: np.ndarray) -> np.ndarray:
  """[n+1] int64, where slices of the given lengths begin and end."""
  return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def as_series(values: Column, axis: str) -> pl.Series:
  """A column as polars has it; raises InputError for nulls and mixed types."""
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
  values = values.alias(axis)
  _refuse(values, values.is_null(), "is empty; fill or drop such rows")
  return values


def _refuse(values: pl.Series, bad: pl.Series, fault: str) -> None:
  """Raises RowError for the first value that is bad; {} of the fault is it."""
  if bad.any():
    row = bad.arg_max()
    raise RowError(values.name, row, fault.format(values[row]))


def _ids(values: pl.Series) -> pl.Series:
  """Ids as Int32, Int64 or String."""
  axis, kind = values.name, values.dtype
  if kind in (pl.Categorical, pl.Enum):
    values = values.cast(pl.String)
  if values.dtype == pl.String:
    _refuse(values, values == "", "is empty; fill or drop such rows")
    return values
  if kind.is_float():
    whole = values.is_finite() & (values.floor() == values)
    _refuse(values, ~whole, "= {} is no id; give integers or strings")
    _refuse_merged(values, "ids", "give integers or strings")
  elif not kind.is_integer():
    raise InputError(f"{axis} are {kind}; give integers or strings")
  try:
    return values if kind == pl.Int32 else values.cast(pl.Int64)
  except pl.exceptions.PolarsError:  # such as hashes of 64 bits
    return values.cast(pl.String)


def _refuse_merged(values: pl.Series, what: str, remedy: str) -> None:
  """Raises RowError for floats so large that whole numbers have merged."""
  digits = {pl.Float64: 53, pl.Float32: 24, pl.Float16: 11}[values.dtype]
  _refuse(
    values, values.abs() >= 2**digits,
    f"= {{}} is a {values.dtype} at or beyond 2^{digits}, where different "
    f"{what} are merged; {remedy}",
  )


def _numbers(values: pl.Series) -> np.ndarray:
  """Times as int64 or float64; dates become Unix seconds."""
  if values.dtype.is_temporal():
    return _unix_seconds(values)
  if values.dtype.is_integer():
    try:
      return values.cast(pl.Int64).to_numpy()
    except pl.exceptions.PolarsError:
      raise InputError(
        f"times span {values.min()} to {values.max()}, beyond int64; use a "
        "coarser unit"
      ) from None
  if not values.dtype.is_float():
    raise InputError(
      f"times are {values.dtype}; give numbers, or dates as datetimes"
    )
  _refuse(values, ~values.is_finite(), "= {} is not finite; drop the row")
  _refuse_merged(values, "times", "give integers, or use a coarser unit")
  return values.cast(pl.Float64).to_numpy()


def _unix_seconds(values: pl.Series) -> np.ndarray:
  """Dates as int64 or float64 seconds, or in their unit; see above."""
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


def _encode(values: pl.Series) -> tuple[np.ndarray, np.ndarray]:
  """[N] int32 codes and the ids that they stand for, ascending."""
  if values.dtype.is_integer():
    values = values.cast(pl.Int64)
  ids = values.unique().sort()
  numbers = pl.Series(np.arange(len(ids), dtype=np.int32))
  codes = values.replace_strict(ids, numbers, return_dtype=pl.Int32)
  return codes.to_numpy(), ids.to_numpy(writable=True)


def _compact(
  codes: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Renumbers codes so that every id occurs; keeps their order."""
  present = _counts(codes, len(ids)) > 0
  renumber = np.cumsum(present, dtype=np.int32) - np.int32(1)
  return renumber[codes], ids[present]


def _counts(codes: np.ndarray, size: int) -> np.ndarray:
  """How often each of 0 .. size - 1 occurs; numpy makes int64 of a chunk."""
  counts = np.zeros(size, np.int64)
  for start in range(0, len(codes), _CHUNK):
    counts += np.bincount(codes[start : start + _CHUNK], minlength=size)
  return counts


def _tied_share(
  offsets: np.ndarray, times: np.ndarray | None
) -> dict[str, float]:
  """The share of a user's adjacent pairs that have equal times."""
  if times is None:
    return {}
  same = times[1:] == times[:-1]
  same[offsets[1:-1] - 1] = False  # of two users
  pairs = len(times) - len(offsets) + 1
  return {"tied_share": float(same.sum() / max(pairs, 1))}


def _doubts(
  users: np.ndarray, items: np.ndarray, times: np.ndarray | None,
  offsets: np.ndarray,
) -> Iterator[str]:
  """Yields what makes the order, or a long tail, of interactions doubtful."""
  if times is not None and len(times) > 1:
    same = (times[1:] == times[:-1]) & (users[1:] == users[:-1])
    tied = np.append(same, False) | np.append(False, same)
    rows = pl.DataFrame([x[tied] for x in (users, items, times)])
    repeats = len(rows) - rows.n_unique()
    if repeats > _MANY_REPEATS * len(users):
      yield (
        f"{repeats:,} of {len(users):,} rows repeat another's user, item and "
        "time: duplicates='exact' drops them"
      )
    share = (same.sum() - repeats) / max(len(times) - len(offsets) + 1, 1)
    if share > _MANY_TIES:
      yield (
        f"{share:.0%} of a user's successive interactions have equal times, "
        "so that the order of the rows decides which is the last: give finer "
        "times, or split by time"
      )
  lengths = np.sort(np.diff(offsets))
  usual = lengths[0]
  if len(lengths) == 1:
    return
  if usual == lengths[-1]:
    yield (
      f"all users have {usual} interactions: none is more active than others, "
      "so that who is head or tail is chance"
    )
  elif usual == lengths[len(lengths) * 4 // 5]:
    yield (
      f"{(lengths == usual).mean():.0%} of the users have {usual} "
      "interactions, the fewest: for most it is chance who is head or tail"
    )


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
