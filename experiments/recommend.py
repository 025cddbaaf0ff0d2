"""Recommends with what a finished job trained, or an exported model.

  python -m experiments.recommend --workdir=DIR --method=pin --users=a,b,c
  python -m experiments.recommend --model=FILE --all_users --output=FILE.parquet

Whom to: --users (original ids, or a text file of one a line), --all_users, or
--history, a .parquet or .json file with a row a history: `items` (original ids,
oldest first) and, where there is one, `user`. Users of the training data are
read up to the end of --prefix; 'validation' is what the job's test ranks were
computed from. Writes a row an item to --output (.parquet or .json); without it
prints the lists of a few users.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import polars as pl
import rich.cells
import rich.console
import rich.progress
from absl import flags, logging
from etils import epath

from experiments import commands, finished
from pin_jax import disk, serving
from pin_jax.types import InputError

MOST_PRINTED = 20  # requests


class Source(NamedTuple):
  """What recommends: a job's workdir with a method and seed, or a file."""

  workdir: str | None = None
  model: str | None = None
  method: str = "pin"
  seed: int = 0


class Whom(NamedTuple):
  """Whom to recommend to; one of the first three."""

  users: str | None = None
  history: str | None = None
  all_users: bool = False
  prefix: str = "all"


def recommend(
  source: Source,
  whom: Whom,
  *,
  k: int = 10,
  allow: str | None = None,
  deny: str | None = None,
  mask_history: bool = True,
  output: epath.PathLike | None = None,
  console: rich.console.Console,
) -> pl.DataFrame:
  """Recommends, and writes or prints the lists.

  Args:
    source: what recommends.
    whom: whom to.
    k: items a list.
    allow: ids of the only items, see `read_ids`; None = all.
    deny: ids of items never to recommend; None = none.
    mask_history: whether to leave out items of the history.
    output: a .parquet or .json file; None prints.
    console: where to print.

  Returns:
    The lists, as of `serving.recommend`.

  Raises:
    InputError: for any bad input, before anything is computed.
    WriteError: if `output` cannot be written; it is then as it was.
  """
  given = [whom.users is not None, whom.history is not None, whom.all_users]
  if sum(given) != 1:
    raise InputError(
      f"{sum(given)} of --users, --history and --all_users are given; give one"
    )
  if whom.history is not None and whom.prefix != "all":
    raise InputError(
      f"--prefix={whom.prefix} cuts histories that are known and not those of "
      "--history; leave it out"
    )
  write = None if output is None else _writer(disk.place("output", output))
  lists = {
    name: None if text is None else read_ids(name, text)
    for name, text in (("allow", allow), ("deny", deny))
  }
  users = None if whom.users is None else read_ids("users", whom.users)
  histories = None
  if whom.history is not None:
    histories = _read_histories(
      disk.place("--history", whom.history, here=True)
    )
  made = _recommender(source)
  if histories is not None:
    requests = serving.of_histories(made, *histories)
  else:
    requests = serving.of_users(made, users, prefix=whom.prefix)
  count = len(requests.users)
  if write is None and count > MOST_PRINTED:
    raise InputError(
      f"{count} lists are too many to print; name a file, as "
      "--output=recs.parquet"
    )
  with _progress(count, console, shown=write is not None) as advance:
    table = serving.recommend(
      made, requests, k=k, mask_history=mask_history, on_users=advance, **lists
    )
  if write is None:
    _print(table, console)
  else:
    write(table)
    console.out(
      f"{len(table):,} items for {count:,} requests written to {output}",
      highlight=False,
    )
  return table


def _recommender(source: Source) -> serving.Recommender:
  if (source.workdir is None) == (source.model is None):
    raise InputError(
      "name either --workdir=DIR of a finished job or --model=FILE; see --help"
    )
  if source.model is not None:
    return serving.load(source.model)
  return finished.recommender(
    source.workdir, method=source.method, seed=source.seed
  )


def read_ids(name: str, text: str) -> list[str]:
  """Original ids as they are: between commas, or the lines of a file.

  Args:
    name: of the flag.
    text: 'a,b,c', or the path of a text file.

  Raises:
    InputError: if the file does not exist or cannot be read, or there is no id
      or an empty one.
  """
  path = os.path.expanduser(text)
  if os.path.isfile(path):  # False for ids that are no path at all
    try:
      with open(path, "rb") as file:
        lines = file.read().decode("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
      raise InputError(
        f"--{name}={text} cannot be read ({error}); give text, an id a line"
      ) from error
    if all(line.endswith("\r") for line in lines[:-1]):
      lines = [line.removesuffix("\r") for line in lines]
    ids = [line for line in lines if line]
  elif text.endswith(".txt"):
    raise InputError(f"--{name}={text} does not exist; check the path")
  else:
    ids = text.split(",")
  if not ids or not all(ids):
    which = "is empty" if not any(ids) else "has an empty id"
    raise InputError(f"--{name}={text} {which}; name at least one id")
  return ids


def _read_histories(
  path: epath.Path,
) -> tuple[list[list[Any]], list[Any] | None]:
  """(items of each row, users of each row or None)."""
  read = _by_suffix("history", path, _parquet_histories, _json_histories)
  if not path.is_file():
    raise InputError(f"--history={path} does not exist; check the path")
  try:
    return read(path.read_bytes())
  except (
    OSError, RecursionError, TypeError, ValueError, pl.exceptions.PolarsError
  ) as error:
    why = " ".join(str(error).split())[:200]
    raise InputError(
      f"--history={path} cannot be read ({why}); give lists of items as "
      "`items` in every row, an empty list for no history, and, if there is "
      "one, `user`"
    ) from error


def _parquet_histories(data: bytes) -> tuple[list, list | None]:
  table = pl.read_parquet(io.BytesIO(data))
  kind = table.schema.get("items")
  if not isinstance(kind, pl.List) or table["items"].has_nulls():
    raise ValueError(f"its columns are {dict(table.schema)}")
  users = table["user"].to_list() if "user" in table.columns else None
  return table["items"].to_list(), users


def _json_histories(data: bytes) -> tuple[list, list | None]:
  """By the standard library: polars goes by the first records' keys."""
  rows = json.loads(data)
  if not isinstance(rows, list):
    raise ValueError("it is no list of rows")
  for number, own in enumerate(rows, 1):
    if not isinstance(own, dict) or not isinstance(own.get("items"), list):
      raise ValueError(f"row {number} has no list of `items`")
  named = any("user" in own for own in rows)
  users = [own.get("user") for own in rows] if named else None
  return [own["items"] for own in rows], users


def _writer(path: epath.Path) -> Callable[[pl.DataFrame], None]:
  """Writes a table to a file; raises InputError where that cannot be."""
  put = _by_suffix(
    "output", path, pl.DataFrame.write_parquet, pl.DataFrame.write_json
  )
  if not path.parent.is_dir():
    raise InputError(
      f"--output={path}: {path.parent} is no directory; make it first"
    )

  def write(table: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    put(table, buffer)
    disk.write({path: buffer.getvalue()})

  return write


def _by_suffix(
  flag: str, path: epath.Path, parquet: Callable, json: Callable
) -> Callable:
  by_suffix = {".parquet": parquet, ".json": json}
  if path.suffix not in by_suffix:
    raise InputError(
      f"--{flag}={path} has suffix {path.suffix!r}; use one of "
      f"{list(by_suffix)}"
    )
  return by_suffix[path.suffix]


@contextlib.contextmanager
def _progress(
  total: int, console: rich.console.Console, *, shown: bool
) -> Iterator[Callable[[int], None]]:
  """A bar over the requests, where it is shown; yields how to advance it."""
  bar = rich.progress.Progress(
    rich.progress.TextColumn("recommending"), rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn("left"), rich.progress.TimeRemainingColumn(),
    console=console, disable=not shown,
  )
  with bar:
    task = bar.add_task("", total=total)
    yield lambda count: bar.advance(task, count)


def _print(table: pl.DataFrame, console: rich.console.Console) -> None:
  """A line an item, its ids as they are, however long."""
  columns = ["user", "segment", "source", "rank", "item", "score"]
  lines = [columns]
  for row in table.iter_rows(named=True):
    user = "(new)" if row["user"] is None else str(row["user"])
    segment = ("tail", "head")[row["segment"]]
    lines.append([
      user, segment, row["source"], str(row["rank"]), str(row["item"]),
      f"{row['score']:.4f}",
    ])
  sizes = [max(map(rich.cells.cell_len, x)) for x in zip(*lines, strict=True)]
  for line in lines:
    cells = []
    for name, size, cell in zip(columns, sizes, line, strict=True):
      gap = " " * (size - rich.cells.cell_len(cell))
      cells.append(gap + cell if name in ("rank", "score") else cell + gap)
    console.out("  ".join(cells), highlight=False)


def _main(_: Sequence[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  values = flags.FLAGS
  recommend(
    Source(values.workdir, values.model, values.method, values.seed),
    Whom(values.users, values.history, values.all_users, values.prefix),
    k=values.k, allow=values.allow, deny=values.deny,
    mask_history=values.mask_history, output=values.output,
    console=commands.Console(),
  )


def _launch() -> None:
  flags.DEFINE_string("workdir", None, "directory of a finished job")
  flags.DEFINE_string("model", None, "exported model, instead of --workdir")
  flags.DEFINE_string("method", "pin", "one of the job's methods")
  flags.DEFINE_integer("seed", 0, "one of the job's seeds")
  flags.DEFINE_string("users", None, "ids as a,b,c, or a file of one a line")
  flags.DEFINE_string("history", None, ".parquet or .json file of histories")
  flags.DEFINE_bool("all_users", False, "all users of the training data")
  flags.DEFINE_string("prefix", "all", f"one of {serving.PREFIXES}")
  flags.DEFINE_integer("k", 10, "items a list")
  flags.DEFINE_string("output", None, ".parquet or .json file")
  flags.DEFINE_string("allow", None, "the only items; ids or file as --users")
  flags.DEFINE_string("deny", None, "items to leave out; as --allow")
  flags.DEFINE_bool("mask_history", True, "leave out items of the history")
  commands.launch(_main)


if __name__ == "__main__":
  _launch()
