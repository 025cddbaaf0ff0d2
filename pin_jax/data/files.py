"""Interactions from a user's own files: CSV, TSV, Parquet, RecBole atomic.

Columns are found by their usual names, or named by the caller. Ids stay what
they are in the source: text ids become integers only if every one of a column
survives the round trip, so '007' remains '007'.
"""

import dataclasses
import decimal
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
from etils import epath

from pin_jax import disk
from pin_jax.data.interactions import Interactions, from_columns
from pin_jax.types import InputError

USER_COLUMNS = (
  "user_id", "user", "userId", "uid", "reviewerID", "reviewer_id",
  "customer_id", "customerId", "customer", "visitorid", "session_id",
  "sessionId",
)
ITEM_COLUMNS = (
  "item_id", "item", "itemId", "iid", "movieId", "movie_id", "asin",
  "parent_asin", "product_id", "productId", "business_id", "book_id",
  "track_id", "video_id", "article_id", "product", "sku",
)
TIME_COLUMNS = (
  "timestamp", "time", "unixReviewTime", "unix_timestamp", "ts", "datetime",
  "date", "event_time", "created_at",
)
_ISO_DATE = r"^\d{4}-\d{2}-\d{2}"
_NANOSECONDS = r"\.\d{7}"  # seconds with more digits than microseconds
_FINER = r"\.\d{10}"
_SEPARATORS = "\t;|, "


def read_csv(
  path: epath.PathLike,
  *,
  user: str | None = None,
  item: str | None = None,
  time: str | None = None,
  separator: str | None = None,
  **options: Any,
) -> Interactions:
  """Reads a delimited text file with a header line.

  Args:
    path: The file.
    user: Name of the user column; None takes the first of USER_COLUMNS that
      occurs, whatever its case.
    item: Likewise, from ITEM_COLUMNS.
    time: Likewise, from TIME_COLUMNS; where none occurs, file order is the
      order. Numbers stay as they are; ISO dates become Unix seconds (UTC).
    separator: One character; None is a tab for '.tsv' and a comma otherwise.
    **options: Those of `interactions.from_columns`.

  Returns:
    The interactions; `notes` names the columns used.

  Raises:
    InputError: for a missing, empty or malformed file, a missing column, an
      empty id, an unusable time, and as `from_columns` does.
  """
  path = _check_file(path)
  if separator is None:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
  return _read_text(path, separator, '"', False, (user, item, time), options)


def read_inter(
  path: epath.PathLike,
  *,
  user: str | None = None,
  item: str | None = None,
  time: str | None = None,
  separator: str = "\t",
  **options: Any,
) -> Interactions:
  """Reads RecBole's atomic format: a header of `name:type`, tab separated.

  Arguments and errors are those of `read_csv`; columns are named without their
  type.
  """
  path = _check_file(path)
  return _read_text(path, separator, None, True, (user, item, time), options)


def read_parquet(
  path: epath.PathLike,
  *,
  user: str | None = None,
  item: str | None = None,
  time: str | None = None,
  **options: Any,
) -> Interactions:
  """Reads a Parquet file; only the columns needed are loaded.

  Arguments and errors are those of `read_csv`; ids keep their stored type. A
  directory is read as its .parquet files one after another, by name.
  """
  path = disk.place("path", path, here=True)
  files = [path]
  if path.is_dir():  # not by glob, to which the path itself is a pattern
    files = sorted(x for x in path.iterdir() if x.name.endswith(".parquet"))
  files = [os.fspath(_check_file(file)) for file in files or [path]]
  source = _guarded(path, lambda: pl.scan_parquet(files, glob=False))
  names = _guarded(path, lambda: source.collect_schema().names())
  chosen = _resolve(path, {name: name for name in names}, (user, item, time))
  frame = _collect(path, source, chosen)

  def place(row: int) -> str:
    return f"{path} row {row + 1}"

  if chosen["time"] and frame.schema["time"] == pl.String:
    frame = frame.with_columns(_parse_times(frame["time"], place))
  return _build(path, frame, chosen, place, options)


def read(path: epath.PathLike, **options: Any) -> Interactions:
  """Reads a file with the reader that its suffix names.

  Args:
    path: A .csv, .tsv, .parquet or .inter file, or a directory of .parquet
      files.
    **options: Those of the reader.

  Returns:
    The interactions.

  Raises:
    InputError: for an unknown suffix, and as the reader does.
  """
  path = disk.place("path", path, here=True)
  suffix = ".parquet" if path.is_dir() else path.suffix.lower()
  if suffix not in READERS:
    raise InputError(
      f"{os.fspath(path)} has the unknown suffix {suffix!r}; "
      f"use one of {tuple(READERS)}, or call a reader by name"
    )
  return READERS[suffix](path, **options)


READERS: Mapping[str, Callable[..., Interactions]] = {
  ".csv": read_csv,
  ".tsv": read_csv,
  ".parquet": read_parquet,
  ".inter": read_inter,
}


def _read_text(
  path: epath.Path,
  separator: str,
  quote: str | None,
  typed: bool,
  asked: Sequence[str | None],
  options: Mapping[str, Any],
) -> Interactions:
  """Reads every column as text, then decides on types."""
  if not _is_separator(separator):
    raise InputError(f"separator={separator!r} is invalid; give one character")
  source = _guarded(path, lambda: pl.scan_csv(
    os.fspath(path), separator=separator, quote_char=quote,
    infer_schema=False, glob=False,
  ))
  names = _guarded(path, lambda: source.collect_schema().names())
  if typed and not all(":" in name for name in names):
    raise InputError(
      f"{path} has the header {names}, not name:type; read it with "
      "read_csv(separator='\\t')"
    )
  columns = {name.split(":")[0] if typed else name: name for name in names}
  _check_separator(path, names, separator)
  chosen = _resolve(path, columns, asked)
  frame = _collect(path, source, chosen)

  def place(row: int) -> str:
    return f"{path} line {row + 2}"

  _check_nulls(frame, chosen, place)
  frame = frame.with_columns(_parse_ids(frame["user"]))
  frame = frame.with_columns(_parse_ids(frame["item"]))
  if chosen["time"]:
    frame = frame.with_columns(_parse_times(frame["time"], place))
  return _build(path, frame, chosen, place, options)


def _is_separator(value: Any) -> bool:
  """Whether it is one byte that neither ends a line nor quotes."""
  return (
    isinstance(value, str) and len(value.encode()) == 1
    and value not in "\r\n\"\0"
  )


def _check_separator(
  path: epath.Path, names: Sequence[str], separator: str
) -> None:
  """Raises InputError for a header of one column that another would cut."""
  seems = [x for x in _SEPARATORS if x in names[0] and x != separator]
  if len(names) == 1 and seems:
    raise InputError(
      f"{path} has no {separator!r} in its header {names[0]!r}; the separator "
      f"seems to be {seems[0]!r}, so give separator={seems[0]!r}"
    )


def _check_file(path: epath.PathLike) -> epath.Path:
  """Returns the path of a file that exists and has contents."""
  path = disk.place("path", path, here=True)
  if not path.exists():
    raise InputError(f"{path} does not exist; check the path")
  if path.is_dir():
    raise InputError(f"{path} is a directory; name one file in it")
  if not path.stat().length:
    raise InputError(f"{path} is empty (0 bytes); check how it was made")
  return path


def _guarded(path: epath.Path, step: Callable[[], Any]) -> Any:
  """Runs a step of polars; its errors become one line with the path."""
  try:
    return step()
  except (pl.exceptions.PolarsError, OSError) as error:
    reason = str(error).strip().split("\n")[0]
    raise InputError(
      f"{path} cannot be read ({reason}); check its format and separator"
    ) from None


def _collect(
  path: epath.Path, source: pl.LazyFrame, chosen: Mapping[str, str | None]
) -> pl.DataFrame:
  """Loads the chosen columns as user, item and, if any, time."""
  columns = [pl.col(name).alias(role) for role, name in chosen.items() if name]
  frame = _guarded(path, lambda: source.select(columns).collect())
  if not frame.height:
    raise InputError(f"{path} has a header but no rows; check how it was made")
  return frame


def _resolve(
  path: epath.Path, columns: Mapping[str, str], asked: Sequence[str | None]
) -> dict[str, str | None]:
  """Returns the source's column for user, item and time (None = absent)."""
  chosen = {}
  guesses = {"user": USER_COLUMNS, "item": ITEM_COLUMNS, "time": TIME_COLUMNS}
  for (role, names), name in zip(guesses.items(), asked, strict=True):
    chosen[role] = (
      _guess(columns, names) if name is None else
      columns.get(name, name if name in columns.values() else None)
    )
    if chosen[role] is None and (name is not None or role != "time"):
      wanted = f"column {name!r}" if name is not None else f"{role} column"
      raise InputError(
        f"{path} has no {wanted}, only {list(columns)}; give {role}=<column>"
      )
  return chosen


def _guess(columns: Mapping[str, str], names: Sequence[str]) -> str | None:
  """Returns the column that the earliest of the names fits, in any case."""
  for name in names:
    for short, column in columns.items():
      if short.lower() == name.lower():
        return column
  return None


def _check_nulls(
  frame: pl.DataFrame,
  chosen: Mapping[str, str | None],
  place: Callable[[int], str],
) -> None:
  """Raises InputError for the first empty cell, quoted or not."""
  for role in frame.columns:
    empty = frame[role].is_null()
    if frame.schema[role] == pl.String:
      empty |= (frame[role] == "").fill_null(True)
    if empty.any():
      row = empty.arg_max()
      raise InputError(
        f"{place(row)}: {role} column {chosen[role]!r} is empty; "
        "fill or remove such rows"
      )


def _parse_ids(texts: pl.Series) -> pl.Series:
  """Returns Int64 if every text is that integer's own spelling."""
  numbers = texts.cast(pl.Int64, strict=False)
  if numbers.null_count() or (numbers.cast(pl.String) != texts).any():
    return texts
  return numbers


def _parse_times(texts: pl.Series, place: Callable[[int], str]) -> pl.Series:
  """Returns texts as Int64, Float64 or Datetime; nulls stay."""
  for kind in (pl.Int64, pl.Float64):
    times = texts.cast(kind, strict=False)
    if times.null_count() == texts.null_count():
      _check_numbers(texts, times, place)
      return times
  dated = texts.str.contains(_ISO_DATE)
  if dated.drop_nulls().first():
    try:
      dates = _parse_dates(texts, place)
      bad = dates.is_null() | ~dated
    except pl.exceptions.PolarsError:
      bad = dated
    if not (bad & texts.is_not_null()).any():
      return dates
  else:
    bad = times.is_null()
  row = (bad & texts.is_not_null()).arg_max()
  raise InputError(
    f"{place(row)}: time {texts[row]!r} is neither a number nor an ISO date "
    "like the others; correct it"
  )


def _check_numbers(
  texts: pl.Series, times: pl.Series, place: Callable[[int], str]
) -> None:
  """Raises InputError where floats merge numbers that differ as written."""
  if not times.dtype.is_float():
    return
  spellings = pl.DataFrame({"text": texts, "time": times}).unique()
  spellings = spellings.filter(pl.col("time").is_finite())
  for _, own in spellings.filter(pl.col("time").is_duplicated()).group_by(
    "time"
  ):
    written = {decimal.Decimal(text): text for text in own["text"]}
    if len(written) > 1:
      one, two = sorted(written.values())[:2]
      raise InputError(
        f"{place((texts == two).arg_max())}: times {one} and {two} are one as "
        "float64, since not all are integers of 64 bits; use a coarser unit"
      )


def _parse_dates(texts: pl.Series, place: Callable[[int], str]) -> pl.Series:
  """Returns ISO dates in microseconds, or nanoseconds where they have them."""
  parse = lambda unit: texts.str.to_datetime(time_unit=unit, strict=False)
  dates = parse("us")
  if not texts.str.contains(_NANOSECONDS).any():
    return dates
  finer = parse("ns")  # wraps round outside the years 1678 to 2261
  wrapped = (finer.dt.cast_time_unit("us") != dates).fill_null(False)
  bad = texts.str.contains(_FINER) | wrapped
  if bad.any():
    row = bad.arg_max()
    raise InputError(
      f"{place(row)}: time {texts[row]!r} does not fit nanoseconds of 64 bits, "
      "which others need; use a coarser unit"
    )
  return finer


def _build(
  path: epath.Path,
  frame: pl.DataFrame,
  chosen: Mapping[str, str | None],
  place: Callable[[int], str],
  options: Mapping[str, Any],
) -> Interactions:
  """Passes the columns on and notes where they came from."""
  _check_nulls(frame, chosen, place)
  if chosen["time"] and frame.schema["time"].is_float():
    finite = frame["time"].is_finite()
    if not finite.all():
      row = finite.arg_min()
      raise InputError(
        f"{place(row)}: time {frame['time'][row]} is not finite; correct it"
      )
  data = from_columns(*frame.get_columns(), **{"name": path.stem, **options})
  used = {f"{role}_column": name or "none" for role, name in chosen.items()}
  return dataclasses.replace(data, notes={**data.notes, **used})
