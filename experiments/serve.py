"""Recommends with a trained model, or writes the model into one file.

  python -m experiments.serve --workdir=DIR --users=a,b,c
  python -m experiments.serve --workdir=DIR --history=new.csv --output=recs.csv
  python -m experiments.serve --workdir=DIR --export=model.pin
  python -m experiments.serve --model=model.pin --all_users --output=recs.csv

Ids that the model does not know are named and left out. docs/serving.md says
what the files hold.
"""

import io
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import jax
import numpy as np
import polars as pl
import rich.cells
import rich.console
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from experiments import build, commands, reuse, schema
from experiments.build import networks_of
from experiments.job import of_results
from experiments.methods import (
  SEGMENTS,
  Method,
  chosen,
  compared,
  selected,
)
from experiments.problem import Problem, fingerprint, make_problem
from experiments.stages import Trainer, routed
from experiments.workdir import read_json, versions
from pin_jax import disk, serving
from pin_jax.data import files
from pin_jax.training import checkpoints
from pin_jax.types import InputError

MOST_PRINTED = 20  # requests
WRITERS = {
  ".csv": pl.DataFrame.write_csv, ".jsonl": pl.DataFrame.write_ndjson,
  ".json": pl.DataFrame.write_json, ".parquet": pl.DataFrame.write_parquet,
}


class Options(NamedTuple):
  """The flags."""

  workdir: Annotated[str | None, "directory of a finished job"] = None
  model: Annotated[str | None, "exported model, instead of --workdir"] = None
  method: Annotated[
    str | None, "one of the job's methods; default: what validation chose"
  ] = None
  seed: Annotated[int | None, "one of the job's seeds; default: first"] = None
  users: Annotated[str | None, "ids as a,b,c, or a file of one a line"] = None
  history: Annotated[str | None, "file of anybody's interactions"] = None
  all_users: Annotated[bool, "all users of the training data"] = False
  prefix: Annotated[
    str, f"how much of a known user's history to read: {serving.PREFIXES}"
  ] = "all"
  k: Annotated[int, "items a list"] = 10
  allow: Annotated[str | None, "the only items; as --users"] = None
  deny: Annotated[str | None, "items to leave out; as --users"] = None
  mask_history: Annotated[bool, "leave out items of the history"] = True
  strict: Annotated[bool, "end where an id is unknown"] = False
  output: Annotated[str | None, f"file: {', '.join(WRITERS)}"] = None
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
    f"{_origin(made)}: {len(made.users.ids):,} users, {len(made.item_ids):,} "
    f"items, {path.stat().length:,} bytes in {path}", highlight=False,
  )


def _recommend(options: Options, console: rich.console.Console) -> None:
  of_file = options.history is not None
  if of_file and options.prefix != "all":
    raise InputError(
      f"--prefix={options.prefix} cuts histories that are known and not those "
      "of --history; leave it out"
    )
  path = of_file and disk.place("--history", options.history, here=True)
  if of_file and not path.exists():
    raise InputError(f"--history={path} does not exist; check the path")
  write = None if options.output is None else writer(options.output)
  allow, deny, users = (
    None if getattr(options, name) is None
    else read_ids(name, getattr(options, name))
    for name in ("allow", "deny", "users")
  )
  made, histories = None, None
  if options.model is not None:
    made = serving.load(options.model)
  if of_file:
    config = made.origin.get("config", {}) if made else (
      _config(disk.place("workdir", options.workdir))[0]
    )
    histories, users = read_histories(path, config.get("data", {}))
  made = made or recommender(
    options.workdir, method=options.method, seed=options.seed
  )
  asked = made.users.ids if users is None else users
  count = len(histories if of_file else asked)
  if write is None and count > MOST_PRINTED:
    raise InputError(
      f"{count} lists are too many to print; name a file, as "
      "--output=recs.csv"
    )
  with warnings.catch_warnings():
    warnings.simplefilter(
      "error" if options.strict else "always", serving.UnknownWarning
    )
    warnings.showwarning = lambda message, *_: print(
      f"warning: {message}; left out", file=sys.stderr
    )
    table = made.recommend(
      users, histories=histories, prefix=options.prefix, k=options.k,
      mask_history=options.mask_history, allow=allow, deny=deny,
    )
  if write is None:
    print_lists(table, console)
    return
  write(table)
  console.out(
    f"{len(table):,} items for {table['request'].n_unique():,} of {count:,} "
    f"requests, by {_origin(made)}, written to {options.output}",
    highlight=False,
  )


def _origin(made: serving.Recommender) -> str:
  return f"{made.origin.get('method')}, seed {made.origin.get('seed')}"


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
    with disk.reading(f"--{name}={text}", "give text, an id a line"):
      lines = epath.Path(path).read_bytes().decode("utf-8-sig")
    ids = [x for x in lines.replace("\r\n", "\n").split("\n") if x]
  elif text.endswith(".txt"):
    raise InputError(f"--{name}={text} does not exist; check the path")
  else:
    ids = text.split(",")
  if not ids or not all(ids):
    which = "is empty" if not any(ids) else "has an empty id"
    raise InputError(f"--{name}={text} {which}; name at least one id")
  return ids


def read_histories(
  path: epath.Path, data: Mapping[str, Any]
) -> tuple[list[list[Any]], list[Any] | None]:
  """(items of each row, users of each row or None) of a file.

  Args:
    path: of rows of `items`, or of interactions as `files.read` takes them.
    data: of the job's config, which names the columns of interactions.
  """
  with disk.reading(f"--history={path}", (
    "give lists of items as `items` in every row, an empty list for no "
    "history, and, if there is one, `user`; or interactions"
  )):
    # By the standard library: polars goes by the first records' keys.
    rows = None
    if path.suffix == ".json":
      rows = json.loads(path.read_bytes())
      if not isinstance(rows, list):
        raise ValueError("it is no list of rows")
    elif path.suffix == ".jsonl":
      lines = filter(None, path.read_bytes().splitlines())
      rows = [json.loads(line) for line in lines]
    elif path.suffix == ".parquet":
      rows = disk.read_parquet(path.read_bytes()).to_dicts()
    if path.suffix == ".json" or any("items" in own for own in rows or ()):
      for number, own in enumerate(rows, 1):
        if not isinstance(own, dict) or not isinstance(own.get("items"), list):
          raise ValueError(f"row {number} has no list of `items`")
      named = any("user" in own for own in rows)
      users = [own.get("user") for own in rows] if named else None
      return [own["items"] for own in rows], users
  columns = ("user", "item", "time", "separator")
  found = files.read(path, **{
    key: data[key] for key in columns if data.get(key) is not None
  })
  items = found.item_ids[found.items - 1].tolist()
  bounds = found.offsets.tolist()
  return [
    items[start:end] for start, end in itertools.pairwise(bounds)
  ], found.user_ids.tolist()


def writer(name: str) -> Callable[[pl.DataFrame], None]:
  """Writes a table to a file; raises InputError where that cannot be."""
  path = disk.place("output", name)
  if path.suffix not in WRITERS:
    raise InputError(
      f"--output={path} has suffix {path.suffix!r}; use one of {[*WRITERS]}"
    )
  if not path.parent.is_dir():
    raise InputError(
      f"--output={path}: {path.parent} is no directory; make it first"
    )

  def write(table: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    WRITERS[path.suffix](table, buffer)
    disk.write({path: buffer.getvalue()})

  return write


def print_lists(table: pl.DataFrame, console: rich.console.Console) -> None:
  """A line an item, its ids as they are, however long."""
  columns = ["user", "segment", "source", "rank", "item", "score"]
  lines = [columns, *(
    [
      "(new)" if user is None else str(user), ("tail", "head")[segment],
      source, str(rank), str(item), f"{score: .4f}",
    ] for user, segment, source, rank, item, score
    in table.select(columns).iter_rows()
  )]
  sizes = [max(map(rich.cells.cell_len, x)) for x in zip(*lines, strict=True)]
  for line in lines:
    console.out("  ".join(
      cell + " " * (size - rich.cells.cell_len(cell))
      for size, cell in zip(sizes, line, strict=True)
    ).rstrip(), highlight=False)


# Loading a job.


def recommender(
  directory: epath.PathLike, *, method: str | None = None,
  seed: int | None = None,
) -> serving.Recommender:
  """The recommender of a finished job.

  The data are read again from where the job had them.

  Args:
    directory: the workdir; nothing is written there.
    method: one of the job's; None = for each segment what validation chose, or
      in jobs of older versions the method under test.
    seed: one of the job's; None = the first.

  Returns:
    The recommender, with the parameters that validation selected.

  Raises:
    InputError: if the job is not finished or has no such method or seed, or
      if its data or checkpoints are not what they were.
  """
  directory = disk.place("workdir", directory)
  checkpoints.check_directory(directory)
  config, data, root = _config(directory)
  methods = selected(config)
  choice = read_json(directory / "summary.json").get("choice")
  if method is None and choice:
    method = " and ".join(f"{choice[part]} for {part}" for part in SEGMENTS)
    if choice["tail"] == choice["head"]:
      method = choice["tail"]
    methods[method] = chosen(choice, methods)
  name = method or compared([*methods])[1]
  seed = config.seeds[0] if seed is None else seed
  for what, wanted, there in (
    ("method", name, list(methods)), ("seed", seed, list(config.seeds))
  ):
    if wanted not in there:
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
    "versions": versions(),
  })


def _config(directory: epath.Path) -> tuple[ConfigDict, str, epath.Path]:
  """(config, for one device; fingerprint; stages) of a finished job."""
  path = directory / "config.json"
  if not path.exists() or not (directory / "summary.json").exists():
    raise InputError(
      f"workdir {directory} holds no finished job; run it to its end with "
      "experiments.main, or check the path"
    )
  stored = read_json(path, config={}, data="")
  with disk.reading(path, "restore it from a copy, or run the job again"):
    config = schema.completed(stored["config"])
    config.data.update(stored.get("paths", {}))
    if kept := config.data.get("path"):  # a workdir may have moved with them
      path = directory.joinpath("data", *epath.Path(kept).parts[-2:])
      config.data.path = os.fspath(path) if path.exists() else kept
    build.check(config)
    root = epath.Path(stored.get("stages", directory / "checkpoints"))
  return config, stored["data"], root


def _made(
  method: Method, seed: int, problem: Problem, trainer: Trainer,
  origin: dict[str, Any],
) -> serving.Recommender:
  """Lays a method's parameters out by slots, one a plugin."""
  slots, slot_models, of_new = [], [], []
  of_users = np.zeros(len(problem.segments), np.int32)
  first, models = {}, {}
  for segment, entry in enumerate(method.serve):
    stage, plugin_of, count = routed(problem, method, entry)
    kind = stage and stage.plugin, method.stage(entry[0]).reads_activeness
    if entry not in first:
      first[entry] = len(slots)
      weights = trainer.weights(seed, entry[0], stage)
      for k in range(count):
        own = jax.tree.map(lambda x, k=k: x[k], weights.plugins)
        slots.append(weights._replace(plugins=own))
        slot_models.append(models.setdefault(kind, len(models)))
    mine = problem.segments == segment
    of_users[mine] = first[entry] + plugin_of[mine]
    own = min(segment, count - 1)
    of_new.append(first[entry] + (count - 1 - own if method.swapped else own))
  return serving.make(
    [trainer.model(*kind) for kind in models], serving.Routes(
      slots, slot_models, problem.segments, of_users, of_new
    ), problem.split, length=trainer.length, origin=origin,
    remembered=trainer.remembered.train_end,
  )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines a flag for each of the options."""
  hints = get_type_hints(Options, include_extras=True)
  for option, hint in hints.items():
    kind, *_ = get_args(hint.__origin__) or [hint.__origin__]  # `int | None`
    define = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer}.get(
      kind, flags.DEFINE_string
    )
    default = Options._field_defaults[option]
    define(option, default, hint.__metadata__[0], flag_values=values)


def _main(_: Sequence[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  values = (flags.FLAGS[name].value for name in Options._fields)
  serve(Options(*values), commands.Console())


if __name__ == "__main__":
  define_flags()
  commands.launch(_main)
