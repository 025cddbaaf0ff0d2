"""Interactions from a user's own tables, whatever file they are in.

What a file is follows from its contents: Parquet, JSON, or text with any
separator, with or without a header, compressed or not. Columns are found by
their usual names, or named by the caller. Ids stay what they are in the source:
text ids become integers only if every one of a column survives the round trip,
so '007' remains '007'.
"""

import contextlib
import csv
import dataclasses
import gzip
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
from etils import epath

from pin_jax import disk
from pin_jax.data import times as times_lib
from pin_jax.data.interactions import (
  Column,
  Interactions,
  RowError,
  as_series,
  from_columns,
)
from pin_jax.types import InputError

# Compared without case and without what is neither letter nor digit.
USER_COLUMNS = (
  "user_id", "user", "uid", "reviewer_id", "customer_id", "customer",
  "client_id", "buyer_id", "account_id", "member_id", "visitor_id",
  "session_id",
)
ITEM_COLUMNS = (
  "item_id", "item", "iid", "movie_id", "asin", "parent_asin", "product_id",
  "business_id", "book_id", "isbn", "track_id", "song_id", "video_id",
  "article_id", "product", "sku",
)
TIME_COLUMNS = (
  "timestamp", "time", "unix_review_time", "unix_timestamp", "ts", "datetime",
  "date", "event_time", "created_at", "purchase_date", "order_date",
  "invoice_date", "review_time",
)
_RATINGS = ("ratings.csv", "ratings.dat", "u.data")  # of MovieLens' archives
_SEPARATORS = (",", "\t", ";", "|", "::", " ")
_ATOMIC = r".+:(token|float)(_seq)?"  # RecBole's name:type
_SAMPLE = 200  # rows by which a table is recognised
_OTHER = "\x1f"  # in place of a separator of several characters
_NAMED_TIME = r"(?i)(^|[\W_])(time|date|datetime|timestamp)([\W_]|$)"


class _Table(NamedTuple):
  """A table whose columns are not read yet.

  Attributes:
    frame: as polars or as the caller has it.
    columns: short name -> name in the frame.
    first: what a row is called, and the number of the first.
    usual: role -> column, where columns have no names.
    assumed: what was assumed of it.
  """

  frame: pl.LazyFrame | Mapping[str, Column]
  columns: dict[str, str]
  first: tuple[str, int] = ("row", 1)
  usual: dict[str, str] | None = None
  assumed: tuple[str, ...] = ()

  def take(
    self, names: Mapping[str, str], rows: int | None = None
  ) -> dict[str, Column]:
    """Columns by the keys of `names`; of the first rows, if so asked."""
    if not isinstance(self.frame, pl.LazyFrame):
      return {
        key: self.frame[name][slice(rows)] for key, name in names.items()
      }
    frame = self.frame if rows is None else self.frame.head(rows)
    return frame.select(
      pl.col(name).alias(key) for key, name in names.items()
    ).collect().to_dict()


def read(
  source: epath.PathLike | pl.DataFrame | pl.LazyFrame | Mapping[str, Column],
  *,
  user: str | None = None,
  item: str | None = None,
  time: str | None = None,
  separator: str | None = None,
  **options: Any,
) -> Interactions:
  """Reads a file, or a table in memory, one interaction a row.

  Args:
    source: a DataFrame of polars or pandas, a dictionary of arrays, or a path:
      delimited text (CSV, TSV, MovieLens' .dat and .data, RecBole's .inter), a
      user a line with all items (S3-Rec's .txt), JSON lines or an array of
      objects, Parquet, a directory of which the .parquet files are read one
      after another by name, an archive of MovieLens; text may be compressed
      (gzip, zstd).
    user: Name of the user column (without RecBole's type), or its number from
      1; None takes the first of USER_COLUMNS that occurs, whatever its case,
      or by position where there is no header.
    item: Likewise, from ITEM_COLUMNS.
    time: Likewise, from TIME_COLUMNS; where none occurs, the order of rows is
      the order. Numbers stay as they are; dates become Unix seconds (UTC).
    separator: of text; None goes by the first lines.
    **options: Those of `interactions.from_columns`.

  Returns:
    The interactions; `notes` names the columns used, what was `assumed`, and
    `warnings`.

  Raises:
    InputError: for a missing, empty or malformed table, a missing column, an
      empty id, an unusable time, and as `from_columns` does.
  """
  asked = {"user": user, "item": item, "time": time}
  if isinstance(source, pl.DataFrame | pl.LazyFrame):
    names = source.lazy().collect_schema()
    table = _Table(source.lazy(), {x: x for x in names})
  elif isinstance(source, Mapping) or hasattr(source, "columns"):
    names = getattr(source, "columns", source)
    table = _Table(source, {x: x for x in names})
  else:
    table = None
    source = disk.place("source", source, here=True)
  where = source if table is None else "the table"
  with _guarded(where):
    if table is None:
      table, chosen, series = _read_file(source, separator, asked)
    else:
      table, chosen, series = _taken(table, where, asked)
  if not len(series["users"]):
    raise InputError(
      f"{where} has a header but no rows; check how it was made"
    )
  warnings = _missed_time(table, chosen)
  assumed = list(table.assumed)
  name = "data" if where == "the table" else _stem(source).stem
  try:
    if table.first[0] == "line":
      series |= {axis: _parse_ids(series[axis]) for axis in ("users", "items")}
    if "times" in series:
      series["times"] = as_series(series["times"], "times")
    if "times" in series and series["times"].dtype == pl.String:
      series["times"], form = times_lib.parse(series["times"])
      assumed += [f"dates are {form}"] * bool(form)
      if "though" in form:
        warnings.append(f"dates are read as {form}: write them as 2024-01-31")
    data = from_columns(**series, **{"name": name, **options})
  except RowError as error:
    unit, first = table.first
    role = error.axis[:-1]
    raise InputError(
      f"{where} {unit} {error.row + first}: {role} column "
      f"{chosen[role]!r} {error.fault}"
    ) from None
  notes = {**data.notes}
  for key, texts in (("assumed", assumed), ("warnings", warnings)):
    if texts:
      notes[key] = "; ".join(filter(None, [notes.get(key), *texts]))
  used = {f"{role}_column": name or "none" for role, name in chosen.items()}
  return dataclasses.replace(data, notes={**notes, **used})


def _stem(path: epath.Path) -> epath.Path:
  """The path without the suffix of its compression."""
  return path.with_suffix("") if path.suffix in (".gz", ".zst") else path


def _read_file(
  path: epath.Path, separator: str | None, asked: Mapping[str, str | None]
) -> tuple[_Table, dict[str, str | None], dict[str, Column]]:
  """What `_taken` returns, of a file in whatever encoding."""
  try:
    return _taken(_opened(path, separator, asked), path, asked)
  except (pl.exceptions.ComputeError, UnicodeError) as error:
    if "utf" not in str(error).lower():
      raise
    content, encoding = _decoded(path)
    table = _opened(path, separator, asked, content)
    said = f"the encoding is {encoding}"
    table = table._replace(assumed=(said, *table.assumed))
    return _taken(table, path, asked)


def _taken(
  table: _Table, where: epath.Path | str, asked: Mapping[str, str | None]
) -> tuple[_Table, dict[str, str | None], dict[str, Column]]:
  """The table, its column of each role, and users, items and times."""
  chosen = _resolve(table, where, asked)
  named = {f"{role}s": name for role, name in chosen.items() if name}
  return table, chosen, table.take(named)


def _opened(
  path: epath.Path, separator: str | None, asked: Mapping[str, str | None],
  content: bytes | None = None,
) -> _Table:
  """A file or directory; `content` stands for that of the file."""
  if path.is_dir():  # not by glob, to which the path itself is a pattern
    parts = sorted(x for x in path.iterdir() if x.name.endswith(".parquet"))
    return _scan_parquet(parts or [path])
  _check_file(path)
  with path.open("rb") as file:
    magic = file.read(4)
  if magic == b"PAR1" or path.suffix.lower() == ".parquet":
    return _scan_parquet([path])
  if content is None and magic.startswith(b"PK"):
    content = _content(path)
  source = os.fspath(path) if content is None else content
  lines = pl.scan_lines(source, glob=False).head(_SAMPLE).collect()["line"]
  lines = [line for line in lines if line.strip("\ufeff \t\r")]
  if any("\0" in line for line in lines):
    raise UnicodeError("NULs, as in UTF-16")
  if not lines:
    raise InputError(f"{path} has no lines; check how it was made")
  lines[0] = lines[0].removeprefix("\ufeff")
  if lines[0].lstrip().startswith(("{", "[")):
    array = lines[0].lstrip().startswith("[")
    frame = (
      pl.read_json(source, infer_schema_length=None).lazy() if array
      else pl.scan_ndjson(source, infer_schema_length=None)
    )
    return _Table(frame, {name: name for name in frame.collect_schema()})
  return _scan_text(path, source, lines, separator, asked)


def _scan_parquet(files: Sequence[epath.Path]) -> _Table:
  for file in files:
    _check_file(file)
  frame = pl.scan_parquet([os.fspath(file) for file in files], glob=False)
  return _Table(frame, {name: name for name in frame.collect_schema()})


def _scan_text(
  path: epath.Path, source: str | bytes, lines: list[str],
  separator: str | None, asked: Mapping[str, str | None],
) -> _Table:
  """Delimited text, every column of which is text; `lines` are the first."""
  assumed = []
  if separator is None and _are_sequences(lines):
    return _scan_sequences(source)
  if separator is None:
    usual = ".csv" if _stem(path).suffix.lower() == ".csv" else ".tsv"
    usual = {".csv": ",", ".tsv": "\t"}[usual]
    separator = max((usual, *_SEPARATORS), key=lambda x: _fields(lines, x))
    if separator != usual:
      assumed.append(f"the separator is {separator!r}")
  if not isinstance(separator, str) or not separator or (
    set(separator) & set("\r\n\"\0")
  ):
    raise InputError(
      f"separator={separator!r} is invalid; give one character or more"
    )
  atomic = all(re.fullmatch(_ATOMIC, x) for x in lines[0].split(separator))
  if len(separator.encode()) != 1:  # which polars does not read
    text = pl.scan_lines(source, glob=False).collect()["line"]
    text = text.str.replace_all(separator, _OTHER, literal=True)
    source = text.str.join("\n").item().encode()
    lines = [line.replace(separator, _OTHER) for line in lines]
    separator = _OTHER
  quoting = csv.QUOTE_NONE if atomic else csv.QUOTE_MINIMAL
  rows = list(csv.reader(lines, delimiter=separator, quoting=quoting))
  header = _has_header(path, rows, asked)
  names = None if header else [str(n + 1) for n in range(len(rows[0]))]
  frame = pl.scan_csv(
    source, separator=separator, quote_char=None if atomic else '"',
    has_header=header, new_columns=names, infer_schema=False, glob=False,
  )
  names = names or frame.collect_schema().names()
  columns = {x.rpartition(":")[0] if atomic else x: x for x in names}
  table = _Table(frame, columns, ("line", 1 + header), None, tuple(assumed))
  return table if header else _by_position(table)


def _are_sequences(lines: Sequence[str]) -> bool:
  """Whether they are `user item item …`, of users with unlike many items."""
  words = [line.strip().split(" ") for line in lines]  # no tabs
  lengths = {*map(len, words)}
  return min(lengths) > 1 < len(lengths) and all(
    word.isdecimal() for line in words for word in line
  )


def _scan_sequences(source: str | bytes) -> _Table:
  """A user a line, and all items in order of time, as S3-Rec and others have.

  Times are positions within the user.
  """
  words = pl.col("line").str.extract_all(r"\S+").cast(pl.List(pl.Int64))
  frame = (
    pl.scan_lines(source, glob=False).select(words)
    .filter(pl.col("line").list.len() > 0)
    .select(user=pl.col("line").list.first(), item=pl.col("line").list.slice(1))
    .explode("item")
    .with_columns(time=pl.int_range(pl.len()).over("user"))
  )
  said = "a line is a user and all items, in order of time"
  columns = {x: x for x in ("user", "item", "time")}
  return _Table(frame, columns, assumed=(said,))


def _fields(lines: Sequence[str], separator: str) -> int:
  """How many fields every line has at least."""
  if len(separator) > 1:
    return min(line.count(separator) for line in lines) + 1
  return min(map(len, csv.reader(lines, delimiter=separator)))


def _has_header(
  path: epath.Path, rows: list[list[str]], asked: Mapping[str, str | None]
) -> bool:
  """Whether the first row holds names; a row of data has a number or a date."""
  first, *rest = rows
  known = [{*map(_plain, x)} for x in (USER_COLUMNS, ITEM_COLUMNS)]
  found = [bool(names & {*map(_plain, first)}) for names in known]
  if all(found) or {*filter(None, asked.values())} & {*first}:
    return True
  if len(first) > 2 and first == [str(n) for n in range(len(first))]:
    raise InputError(
      f"{path} line 1 is {','.join(first)}, a header of numbers or a row; "
      "write names there"
    )
  is_number = lambda x: times_lib.looks_like(pl.Series([x])) or (
    pl.Series([x]).cast(pl.Float64, strict=False).is_not_null().item()
  )
  if any(map(is_number, first)):
    return False
  numeric = any(all(map(is_number, x)) for x in zip(*rest, strict=False))
  positions = any(x and x.isdigit() for x in asked.values())
  return any(found) or (bool(rest) and numeric) or not positions


def _by_position(table: _Table) -> _Table:
  """A table without names: user, item, and a time where one looks like it."""
  names = [*table.columns.values()]
  sample = table.take({name: name for name in names}, _SAMPLE)
  times = [x for x in names[2:] if times_lib.looks_like(sample[x])]
  times += names[3:4]  # user, item, rating, time
  usual = dict(zip(("user", "item"), names, strict=False))
  if times:
    usual["time"] = times[0]
  said = ", ".join(f"{role} is column {x}" for role, x in usual.items())
  return table._replace(
    usual=usual, assumed=(*table.assumed, f"there is no header: {said}")
  )


def _content(path: epath.Path) -> bytes:
  """The bytes of a file, or of the ratings in an archive, decompressed."""
  raw = path.read_bytes()
  if raw.startswith(b"\x1f\x8b"):
    return gzip.decompress(raw)
  if not raw.startswith(b"PK"):
    return raw
  with zipfile.ZipFile(path) as archive:
    names = [x for x in archive.namelist() if not x.endswith("/")]
    ratings = [x for x in names if x.rpartition("/")[2] in _RATINGS] or names
    if len(ratings) != 1:
      raise InputError(
        f"{path} is an archive of {names[:5]}; unpack it and name one file, or "
        "save a table as CSV"
      )
    return archive.read(ratings[0])


def _decoded(path: epath.Path) -> tuple[bytes, str]:
  """The content in UTF-8 of a file in another encoding, and which that is."""
  raw = _content(path)
  # Of ASCII in UTF-16 every other byte is 0.
  zeros = [0 in raw[start:1000:2] for start in (0, 1)]
  if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
    encoding = "utf-16"
  else:
    encoding = {
      (False, True): "utf-16-le", (True, False): "utf-16-be",
      (False, False): "cp1252",
    }.get(tuple(zeros), "ascii")
  try:
    return raw.decode(encoding).encode(), encoding
  except UnicodeDecodeError:
    raise InputError(
      f"{path} is no text in UTF-8, UTF-16 or cp1252; save it as CSV in UTF-8 "
      "or as Parquet"
    ) from None


def _check_file(path: epath.Path) -> None:
  """Raises InputError for what is no file with contents."""
  if not path.exists():
    raise InputError(f"{path} does not exist; check the path")
  if path.is_dir():
    raise InputError(f"{path} is a directory; name one file in it")
  if not path.stat().length:
    raise InputError(f"{path} is empty (0 bytes); check how it was made")


@contextlib.contextmanager
def _guarded(where: epath.Path | str) -> Iterator[None]:
  """Errors of the readers become one line with the path."""
  try:
    yield
  except (
    pl.exceptions.PolarsError, OSError, EOFError, RuntimeError, UnicodeError,
    csv.Error, zipfile.BadZipFile, zlib.error,
  ) as error:
    reason = str(error).strip().split("\n")[0]
    raise InputError(
      f"{where} cannot be read ({reason}); check its format and separator"
    ) from None


def _plain(name: Any) -> str:
  """A column's name without case, spaces, hyphens and underscores."""
  return re.sub(r"[\W_]+", "", str(name)).lower()


def _resolve(
  table: _Table, where: epath.Path | str, asked: Mapping[str, str | None]
) -> dict[str, str | None]:
  """The source's column for user, item and time (None = absent)."""
  chosen, columns = {}, table.columns
  guesses = {"user": USER_COLUMNS, "item": ITEM_COLUMNS, "time": TIME_COLUMNS}
  plain = {_plain(short): name for short, name in reversed(columns.items())}
  for role, names in guesses.items():
    name = asked[role]
    if name is None and table.usual:
      chosen[role] = table.usual.get(role)
    elif name is None:
      found = (plain[_plain(x)] for x in names if _plain(x) in plain)
      chosen[role] = next(found, None)
    else:
      numbers = {str(n): x for n, x in enumerate(columns.values(), 1)}
      whole = name if name in columns.values() else numbers.get(str(name))
      chosen[role] = columns.get(name, whole)
    if chosen[role] is None and (name is not None or role != "time"):
      wanted = f"column {name!r}" if name is not None else f"{role} column"
      remedy = "separator=<character>" if len(columns) == 1 else (
        f"{role}=<column>, its name or number"
      )
      raise InputError(
        f"{where} has no {wanted}, only {list(columns)}; give {remedy}"
      )
  return chosen


def _missed_time(
  table: _Table, chosen: Mapping[str, str | None]
) -> list[str]:
  """A warning where no column is taken for the time but one looks like it."""
  if chosen["time"] is not None:
    return []
  for short, name in table.columns.items():
    if name in chosen.values():
      continue
    try:
      values = as_series(table.take({"times": name}, _SAMPLE)["times"], "times")
    except InputError:  # of what is no column of times
      continue
    if times_lib.looks_like(values) or re.search(_NAMED_TIME, str(short)):
      return [
        "no time column was recognised and the order of the rows is taken for "
        f"that in time, but {short!r} ({values[0]}) looks like a time: give "
        f"time={short}"
      ]
  return []


def _parse_ids(texts: pl.Series) -> pl.Series:
  """Int64 if every text is that integer's own spelling."""
  numbers = texts.cast(pl.Int64, strict=False)
  if numbers.null_count() or (numbers.cast(pl.String) != texts).any():
    return texts
  return numbers
