"""Interactions from a user's own files: CSV, TSV, Parquet, RecBole atomic.

Columns are found by their usual names, or named by the caller. Ids stay what
they are in the source: text ids become integers only if every one of a column
survives the round trip, so '007' remains '007'.
"""

import contextlib
import dataclasses
import decimal
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl
from etils import epath

from pin_jax import disk
from pin_jax.data.interactions import Interactions, RowError, from_columns
from pin_jax.types import InputError

SUFFIXES = (".csv", ".tsv", ".inter", ".parquet")
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
_FINER = r"\.\d{7}"  # seconds with more digits than microseconds


def read(
  path: epath.PathLike,
  *,
  user: str | None = None,
  item: str | None = None,
  time: str | None = None,
  separator: str | None = None,
  **options: Any,
) -> Interactions:
  """Reads a file in the format that its suffix names.

  Args:
    path: .csv or .tsv, delimited text with a header line; .inter, RecBole's
      format, whose header is of `name:type`; .parquet; or a directory, of which
      the .parquet files are read one after another, by name.
    user: Name of the user column (without RecBole's type); None takes the first
      of USER_COLUMNS that occurs, whatever its case.
    item: Likewise, from ITEM_COLUMNS.
    time: Likewise, from TIME_COLUMNS; where none occurs, file order is the
      order. Numbers stay as they are; ISO dates become Unix seconds (UTC).
    separator: of text, one character; None is a comma for .csv, else a tab.
    **options: Those of `interactions.from_columns`.

  Returns:
    The interactions; `notes` names the columns used.

  Raises:
    InputError: for an unknown suffix, a missing, empty or malformed file, a
      missing column, an empty id, an unusable time, and as `from_columns` does.
  """
  path = disk.place("path", path, here=True)
  suffix = ".parquet" if path.is_dir() else path.suffix.lower()
  if suffix not in SUFFIXES:
    raise InputError(
      f"{path} has the unknown suffix {suffix!r}; use one of {SUFFIXES}"
    )
  with _guarded(path):
    if suffix == ".parquet":
      source, columns = _scan_parquet(path)
    else:
      source, columns = _scan_text(path, suffix, separator)
    chosen = _resolve(path, columns, (user, item, time))
    frame = source.select(
      pl.col(name).alias(f"{role}s") for role, name in chosen.items() if name
    ).collect()
  if not frame.height:
    raise InputError(f"{path} has a header but no rows; check how it was made")
  try:
    series = frame.to_dict()
    if suffix != ".parquet":
      series |= {axis: _parse_ids(series[axis]) for axis in ("users", "items")}
    if "times" in series and series["times"].dtype == pl.String:
      series["times"] = _parse_times(series["times"])
    data = from_columns(**series, **{"name": path.stem, **options})
  except RowError as error:
    place = ("row", 1) if suffix == ".parquet" else ("line", 2)
    role = error.axis[:-1]
    raise InputError(
      f"{path} {place[0]} {error.row + place[1]}: {role} column "
      f"{chosen[role]!r} {error.fault}"
    ) from None
  used = {f"{role}_column": name or "none" for role, name in chosen.items()}
  return dataclasses.replace(data, notes={**data.notes, **used})


def _scan_parquet(path: epath.Path) -> tuple[pl.LazyFrame, dict[str, str]]:
  """A file or directory, and its columns by name."""
  files = [path]
  if path.is_dir():  # not by glob, to which the path itself is a pattern
    files = sorted(x for x in path.iterdir() if x.name.endswith(".parquet"))
  for file in files or [path]:
    _check_file(file)
  source = pl.scan_parquet([os.fspath(file) for file in files], glob=False)
  return source, {name: name for name in source.collect_schema()}


def _scan_text(
  path: epath.Path, suffix: str, separator: str | None
) -> tuple[pl.LazyFrame, dict[str, str]]:
  """A file whose every column is text, and its columns by short name."""
  _check_file(path)
  if separator is None:
    separator = "," if suffix == ".csv" else "\t"
  if (
    not isinstance(separator, str) or len(separator.encode()) != 1
    or separator in "\r\n\"\0"
  ):
    raise InputError(f"separator={separator!r} is invalid; give one character")
  typed = suffix == ".inter"
  source = pl.scan_csv(
    os.fspath(path), separator=separator, quote_char=None if typed else '"',
    infer_schema=False, glob=False,
  )
  names = source.collect_schema().names()
  if typed and not all(":" in name for name in names):
    raise InputError(
      f"{path} has the header {names}, not name:type; save it as .tsv or .csv"
    )
  return source, {name.split(":")[0] if typed else name: name for name in names}


def _check_file(path: epath.Path) -> None:
  """Raises InputError for what is no file with contents."""
  if not path.exists():
    raise InputError(f"{path} does not exist; check the path")
  if path.is_dir():
    raise InputError(f"{path} is a directory; name one file in it")
  if not path.stat().length:
    raise InputError(f"{path} is empty (0 bytes); check how it was made")


@contextlib.contextmanager
def _guarded(path: epath.Path) -> Iterator[None]:
  """Errors of polars become one line with the path."""
  try:
    yield
  except (pl.exceptions.PolarsError, OSError) as error:
    reason = str(error).strip().split("\n")[0]
    raise InputError(
      f"{path} cannot be read ({reason}); check its format and separator"
    ) from None


def _resolve(
  path: epath.Path, columns: Mapping[str, str], asked: Sequence[str | None]
) -> dict[str, str | None]:
  """The source's column for user, item and time (None = absent)."""
  chosen = {}
  guesses = {"user": USER_COLUMNS, "item": ITEM_COLUMNS, "time": TIME_COLUMNS}
  lower = {short.lower(): name for short, name in reversed(columns.items())}
  for (role, names), name in zip(guesses.items(), asked, strict=True):
    if name is None:
      found = (lower[x.lower()] for x in names if x.lower() in lower)
      chosen[role] = next(found, None)
    else:
      whole = name if name in columns.values() else None
      chosen[role] = columns.get(name, whole)
    if chosen[role] is None and (name is not None or role != "time"):
      wanted = f"column {name!r}" if name is not None else f"{role} column"
      remedy = "separator=<character>" if len(columns) == 1 else (
        f"{role}=<column>"
      )
      raise InputError(
        f"{path} has no {wanted}, only {list(columns)}; give {remedy}"
      )
  return chosen


def _parse_ids(texts: pl.Series) -> pl.Series:
  """Int64 if every text is that integer's own spelling."""
  numbers = texts.cast(pl.Int64, strict=False)
  if numbers.null_count() or (numbers.cast(pl.String) != texts).any():
    return texts
  return numbers


def _parse_times(texts: pl.Series) -> pl.Series:
  """Texts as Int64, Float64 or Datetime; nulls stay."""
  for kind in (pl.Int64, pl.Float64):
    times = texts.cast(kind, strict=False)
    if times.null_count() == texts.null_count():
      if kind == pl.Float64:
        _check_numbers(texts, times)
      return times
  dated = texts.str.contains(_ISO_DATE)
  if dated.drop_nulls().first():
    try:
      dates = _parse_dates(texts)
      bad = dates.is_null() | ~dated
    except pl.exceptions.PolarsError:
      bad = dated
    if not (bad & texts.is_not_null()).any():
      return dates
  else:
    bad = times.is_null()
  row = (bad & texts.is_not_null()).arg_max()
  raise RowError(
    "times", row, f"= {texts[row]!r} is neither a number nor an ISO date like "
    "the others; correct it"
  )


def _check_numbers(texts: pl.Series, times: pl.Series) -> None:
  """Raises RowError where floats merge numbers that differ as written."""
  spellings = pl.DataFrame({"text": texts, "time": times}).unique()
  for _, own in spellings.filter(
    pl.col("time").is_duplicated() & pl.col("time").is_finite()
  ).group_by("time"):
    written = {decimal.Decimal(text): text for text in own["text"]}
    if len(written) > 1:
      one, two = sorted(written.values())[:2]
      raise RowError(
        "times", (texts == two).arg_max(), f"= {two} and {one} are one as "
        "float64, since not all are integers of 64 bits; use a coarser unit"
      )


def _parse_dates(texts: pl.Series) -> pl.Series:
  """ISO dates in microseconds."""
  bad = texts.str.contains(_FINER).fill_null(False)
  if bad.any():
    row = bad.arg_max()
    raise RowError(
      "times", row, f"= {texts[row]!r} is finer than microseconds; use a "
      "coarser unit"
    )
  return texts.str.to_datetime(time_unit="us", strict=False)
