"""Recommends with a trained model, or writes the model into one file.

  python -m experiments.serve --workdir=DIR --method=pin --users=a,b,c
  python -m experiments.serve --model=FILE --all_users --output=FILE.parquet
  python -m experiments.serve --workdir=DIR --method=pin --export=FILE

The model is a method of a finished job, or a file that --export wrote. Whom to:
--users (original ids, or a text file of one a line), --all_users, or --history,
a .parquet or .json file with a row a history: `items` (original ids, oldest
first) and, where there is one, `user`. Writes a row an item to --output;
without it prints the lists of a few users.
"""

import io
import json
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

import jax
import numpy as np
import polars as pl
import rich.cells
import rich.console
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from experiments import commands, reuse, schema, settings, workdir
from experiments.build import networks_of
from experiments.job import of_results
from experiments.methods import Method, exact_form, selected
from experiments.problem import Problem, fingerprint, make_problem
from experiments.stages import Trainer, routed
from pin_jax import disk, serving
from pin_jax.training import checkpoints
from pin_jax.types import InputError

MOST_PRINTED = 20  # requests


class Options(NamedTuple):
  """The flags."""

  workdir: Annotated[str | None, "directory of a finished job"] = None
  model: Annotated[str | None, "exported model, instead of --workdir"] = None
  method: Annotated[str, "one of the job's methods"] = "pin"
  seed: Annotated[int, "one of the job's seeds"] = 0
  users: Annotated[str | None, "ids as a,b,c, or a file of one a line"] = None
  history: Annotated[str | None, ".parquet or .json file of histories"] = None
  all_users: Annotated[bool, "all users of the training data"] = False
  prefix: Annotated[
    str, "how much of a known user's history to read, one of "
    f"{serving.PREFIXES}; 'validation' gives the test ranks of the job"
  ] = "all"
  k: Annotated[int, "items a list"] = 10
  allow: Annotated[str | None, "the only items; as --users"] = None
  deny: Annotated[str | None, "items to leave out; as --users"] = None
  mask_history: Annotated[bool, "leave out items of the history"] = True
  output: Annotated[str | None, ".parquet or .json file"] = None
  export: Annotated[
    str | None, "file to write the model to; nothing is recommended"
  ] = None


def serve(options: Options, console: rich.console.Console) -> None:
  """Recommends, and writes or prints the lists; or exports.

  Args:
    options: what to do.
    console: where to print.

  Raises:
    InputError: for any bad input, before anything is computed.
    WriteError: if a file cannot be written; it is then as it was.
  """
  if (options.workdir is None) == (options.model is None):
    raise InputError(
      "name either --workdir=DIR of a finished job or --model=FILE; see --help"
    )
  whom = [name for name in ("users", "history", "all_users")
          if getattr(options, name) not in (None, False)]
  if options.export is not None:
    if whom or options.model is not None:
      raise InputError(
        "--export writes a job's model and recommends nothing; give --workdir "
        "with it, and neither --model nor anybody to recommend to"
      )
    _export(options, console)
    return
  if len(whom) != 1:
    raise InputError(
      f"{len(whom)} of --users, --history and --all_users are given; give one"
    )
  _recommend(options, console)


def _export(options: Options, console: rich.console.Console) -> None:
  path = disk.place("--export", options.export)
  if not path.parent.is_dir() or path.is_dir():
    raise InputError(
      f"--export={path} is no file in a directory that exists; make its "
      "directory or name another file"
    )
  made = recommender(options.workdir, method=options.method, seed=options.seed)
  serving.save(made, path)
  console.out(
    f"{options.method}, seed {options.seed}, of {options.workdir}: "
    f"{len(made.users.ids):,} users, {len(made.item_ids):,} items, "
    f"{path.stat().length:,} bytes in {path}", highlight=False,
  )


def _recommend(options: Options, console: rich.console.Console) -> None:
  if options.history is not None and options.prefix != "all":
    raise InputError(
      f"--prefix={options.prefix} cuts histories that are known and not those "
      "of --history; leave it out"
    )
  write = None if options.output is None else writer(options.output)
  allow, deny, users = (
    None if getattr(options, name) is None
    else read_ids(name, getattr(options, name))
    for name in ("allow", "deny", "users")
  )
  of_file = options.history is not None
  histories = read_histories(options.history) if of_file else ()
  made = recommender(
    options.workdir, method=options.method, seed=options.seed
  ) if options.model is None else serving.load(options.model)
  if of_file:
    requests = serving.of_histories(made, *histories)
  else:
    requests = serving.of_users(made, users, prefix=options.prefix)
  count = len(requests.users)
  if write is None and count > MOST_PRINTED:
    raise InputError(
      f"{count} lists are too many to print; name a file, as "
      "--output=recs.parquet"
    )
  table = serving.recommend(
    made, requests, k=options.k, mask_history=options.mask_history,
    allow=allow, deny=deny,
  )
  if write is None:
    print_lists(table, console)
    return
  write(table)
  console.out(
    f"{len(table):,} items for {count:,} requests written to {options.output}",
    highlight=False,
  )


# What goes in and out.


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


def read_histories(name: str) -> tuple[list[list[Any]], list[Any] | None]:
  """(items of each row, users of each row or None) of a file."""
  path = disk.place("--history", name, here=True)
  # By the standard library: polars goes by the first records' keys.
  read = _by_suffix(
    "history", path, lambda x: disk.read_parquet(x).to_dicts(), json.loads
  )
  if not path.is_file():
    raise InputError(f"--history={path} does not exist; check the path")
  with disk.reading(f"--history={path}", (
    "give lists of items as `items` in every row, an empty list for no "
    "history, and, if there is one, `user`"
  )):
    rows = read(path.read_bytes())
    if not isinstance(rows, list):
      raise ValueError("it is no list of rows")
    for number, own in enumerate(rows, 1):
      if not isinstance(own, dict) or not isinstance(own.get("items"), list):
        raise ValueError(f"row {number} has no list of `items`")
  named = any("user" in own for own in rows)
  users = [own.get("user") for own in rows] if named else None
  return [own["items"] for own in rows], users


def writer(name: str) -> Callable[[pl.DataFrame], None]:
  """Writes a table to a file; raises InputError where that cannot be."""
  path = disk.place("output", name)
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


def print_lists(table: pl.DataFrame, console: rich.console.Console) -> None:
  """A line an item, its ids as they are, however long."""
  columns = ["user", "segment", "source", "rank", "item", "score"]
  lines = [columns, *(
    [
      "(new)" if user is None else str(user), ("tail", "head")[segment],
      source, str(rank), str(item), f"{score:.4f}",
    ] for user, segment, source, rank, item, score
    in table.select(columns).iter_rows()
  )]
  sizes = [max(map(rich.cells.cell_len, x)) for x in zip(*lines, strict=True)]
  for line in lines:
    cells = []
    for name, size, cell in zip(columns, sizes, line, strict=True):
      gap = " " * (size - rich.cells.cell_len(cell))
      cells.append(gap + cell if name in ("rank", "score") else cell + gap)
    console.out("  ".join(cells), highlight=False)


# Loading a job.


def recommender(
  directory: epath.PathLike, *, method: str = "pin", seed: int = 0
) -> serving.Recommender:
  """The recommender of a finished job's method and seed.

  The data are read again from where the job had them.

  Args:
    directory: the workdir; nothing is written there.
    method: one of the job's.
    seed: one of the job's.

  Returns:
    The recommender, with the parameters that validation selected.

  Raises:
    InputError: if the job is not finished or has no such method or seed, or
      if its data or checkpoints are not what they were.
  """
  directory = disk.place("workdir", directory)
  checkpoints.check_directory(directory)
  config, data, root = _config(directory)
  methods, name = selected(config), exact_form(method, config)
  for what, wanted, there in (
    ("method", method if name not in methods else None, list(methods)),
    ("seed", seed if seed not in config.seeds else None, list(config.seeds)),
  ):
    if wanted is not None:
      raise InputError(
        f"{what} {wanted!r} is not in workdir {directory}; use one of {there}"
      )
  problem = make_problem(config)
  if fingerprint(problem) != data:
    raise InputError(
      f"workdir {directory} is of data {data} and the config's data are now "
      f"{fingerprint(problem)}; put back what it was trained on"
    )
  seeds = next(x for x in reuse.seed_groups(config) if seed in x)
  trainer = Trainer(
    config, problem, networks_of(config, problem), root, seeds
  )
  for stage in methods[name].stages:
    trainer.read(stage)
  return _made(methods[name], seed, problem, trainer, {
    "method": name, "seed": seed, "data": data, "config": of_results(config),
    "versions": workdir.versions(),
  })


def _config(directory: epath.Path) -> tuple[ConfigDict, str, epath.Path]:
  """(config, for one device; fingerprint; stages) of a finished job."""
  path = directory / "config.json"
  if not path.exists() or not (directory / "summary.json").exists():
    raise InputError(
      f"workdir {directory} holds no finished job; run it to its end with "
      "experiments.main, or check the path"
    )
  stored = workdir.read_json(path, config={}, data="")
  with disk.reading(path, "restore it from a copy, or run the job again"):
    config = schema.completed(stored["config"])
    config.data.update(stored.get("paths", {}))
    settings.check(config)
    root = epath.Path(stored.get("stages", directory / "checkpoints"))
  return config, stored["data"], root


def _made(
  method: Method, seed: int, problem: Problem, trainer: Trainer,
  origin: dict[str, Any],
) -> serving.Recommender:
  """Lays a method's parameters out by slots, one a plugin."""
  slots, of_new = [], []
  of_users = np.zeros(len(problem.segments), np.int32)
  first = {}
  for segment, entry in enumerate(method.serve):
    stage = entry[1] and method.stage(entry[1])
    if stage is None:
      plugin_of, count = np.zeros_like(of_users), 1
    else:
      plugin_of, count = routed(problem, method, stage)
    if entry not in first:
      first[entry] = len(slots)
      weights = trainer.weights(seed, entry[0], stage)
      for k in range(count):
        own = jax.tree.map(lambda x, k=k: x[k], weights.plugins)
        slots.append(weights._replace(plugins=own))
    mine = problem.segments == segment
    of_users[mine] = first[entry] + plugin_of[mine]
    own = min(segment, count - 1)
    of_new.append(first[entry] + (count - 1 - own if method.swapped else own))
  return serving.make(
    trainer.model(
      stage and stage.plugin, method.stage(entry[0]).reads_activeness
    ), serving.Routes(slots, problem.segments, of_users, of_new),
    problem.split, length=trainer.length, origin=origin,
    remembered=trainer.remembered.train_end,
  )


def _main(_: Sequence[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  values = (flags.FLAGS[name].value for name in Options._fields)
  serve(Options(*values), commands.Console())


if __name__ == "__main__":
  for option, hint in get_type_hints(Options, include_extras=True).items():
    default_value = Options._field_defaults[option]
    kinds = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer}
    define = kinds.get(type(default_value), flags.DEFINE_string)
    define(option, default_value, hint.__metadata__[0])
  commands.launch(_main)
