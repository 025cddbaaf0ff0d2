"""Runs a job for each of several settings, of any config.

  python -m experiments.sweep --workdir=runs/widths --parallel=2
    --config=files:path=my.csv --sweep.backbone.width=32,64,128

Each --sweep.KEY=VALUE,VALUE multiplies the jobs; --config.KEY=VALUE holds for
all. --sweep=FILE reads JSON: a list of settings (dotted key -> value), or key
-> list of values, to be multiplied. Without either, the config's own `sweep()`
lists them. A killed sweep continues by the same command, its jobs too. On a
cluster every task runs one job: --index=$SLURM_ARRAY_TASK_ID.

--table prints what is finished, from the result files alone; into a pipe it
goes as tab-separated values. --output=DIR chooses for every model the setting
that it does best with on validation, and writes a summary of these for
experiments.report; --more_seeds=1,2 trains them with more seeds.
"""

# A job's directory is named after its settings and a hash of its whole
# configuration, so that another one never finds its results; a file `done`
# marks it as finished on the data that it names. Stages that are the same in
# several jobs are trained once.

import ast
import functools
import hashlib
import itertools
import json
import math
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import rich.console
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from experiments import build, commands, schema, sizes
from experiments.configs.base import default
from experiments.job import of_results
from experiments.methods import METHODS
from experiments.report import print_table, to_tsv
from experiments.results import (
  MIN_SEEDS,
  SLICES,
  Column,
  Results,
  Table,
  check_claims,
  differing,
  key_of,
  mean_metric,
  metrics_of,
  model_rows,
  models_of,
  read,
  same_users,
  value_text,
  write_summary,
)
from pin_jax import disk
from pin_jax.types import InputError

_NONE: Mapping[str, Any] = MappingProxyType({})
_FREE = "seeds", "methods"  # keys in which jobs of one setting may differ
_POLL = 0.2  # seconds between looks at whether jobs have ended


class Job(NamedTuple):
  """One job of a sweep.

  Attributes:
    workdir: its directory.
    settings: dotted key -> value.
    command: as arguments.
    data: what is on disk of the data, as of `_data_files`.
  """

  workdir: epath.Path
  settings: Mapping[str, Any]
  command: Sequence[str]
  data: str = ""

  @property
  def done(self) -> bool:
    """Whether it has finished, on the data that are there."""
    path = self.workdir / "done"
    return path.exists() and self.data in path.read_text()


def split_arguments(
  arguments: Sequence[str],
) -> tuple[list[str], dict[str, Any], dict[str, list[Any]]]:
  """Takes settings out of a command line.

  Returns:
    The other arguments, key -> value of `--config.KEY=VALUE`, and key -> values
    of `--sweep.KEY=VALUE,VALUE`.
  """
  rest, fixed, swept = [], {}, {}
  for argument in arguments:
    found = re.fullmatch(r"--?(config|sweep)\.([\w.]+)=(.+)", argument)
    if not found:
      rest.append(argument)
      continue
    section, key, text = found.groups()
    try:
      values = list(ast.literal_eval(f"[{text}]"))
    except (SyntaxError, ValueError):
      values = text.split(",")
    known = schema.keys_of(None).get(key)
    several = known is not None and known.kind is tuple
    if section == "sweep":
      swept[key] = [
        (x,) if several and not isinstance(x, tuple) else x for x in values
      ]
    elif several and not isinstance(values[0], tuple):
      fixed[key] = tuple(values)
    else:
      fixed[key] = values[0] if len(values) == 1 else text
  return rest, fixed, swept


def multiplied(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
  """Every combination of keys' values."""
  return [
    dict(zip(values, some, strict=True))
    for some in itertools.product(*values.values())
  ]


def read_settings(path: epath.PathLike) -> list[Any]:
  """The settings that a JSON file lists, or whose values it multiplies."""
  with disk.reading(path, "give a list of settings, or key -> values"):
    found = json.loads(
      epath.Path(path).read_text(), object_hook=lambda x: {
        k: tuple(v) if isinstance(v, list) else v for k, v in x.items()
      }
    )
    return multiplied(found) if isinstance(found, dict) else [*found]


def _module(config: str) -> dict[str, Any]:
  """What a config file defines."""
  path = config.partition(":")[0]
  try:
    module = runpy.run_path(path)
  except (OSError, SyntaxError) as error:
    raise InputError(
      f"config file {path} cannot be read ({error}); see --help"
    ) from error
  if "get_config" not in module:
    raise InputError(
      f"config file {path} has no get_config(); define it there"
    )
  return module


def make_jobs(
  config: str, root: epath.PathLike,
  listed: Sequence[Any] | None = None, fixed: Mapping[str, Any] = _NONE,
) -> list[Job]:
  """The jobs of a config file, each checked as far as its settings go.

  Args:
    config: path of the config file, with arguments after a colon.
    root: directory of the sweep.
    listed: settings of the jobs; None = those that its `sweep()` lists.
    fixed: settings of all jobs besides.

  Raises:
    InputError: if the file or `sweep()` is missing, or a setting is wrong.
  """
  module, (path, _, argument) = _module(config), config.partition(":")
  if listed is None:
    if "sweep" not in module:
      raise InputError(
        f"config file {path} has no sweep(); give --sweep.KEY=VALUE,VALUE"
      )
    listed = module["sweep"]()
  if not isinstance(listed, list | tuple) or not listed:
    raise InputError(
      f"the sweep of {path} lists {listed!r}; give a list of dictionaries"
    )
  jobs: dict[str, Job] = {}
  for number, own in enumerate(listed):
    chosen = {**fixed, **own} if isinstance(own, dict) else own
    whole = _resolved(module["get_config"], argument, chosen, number)
    name = job_name(whole)
    if name in jobs:
      raise InputError(
        f"settings {number} of the sweep repeat settings {[*jobs].index(name)}:"
        f" {chosen}; list each once"
      )
    root = disk.place("workdir", root)
    called = "-".join((*map(_slug, sorted(own.items())), name))
    place = next(iter(root.glob(f"*{name}")), root / called)
    jobs[name] = Job(place, chosen, [
      sys.executable, "-m", "experiments.main", f"--config={config}",
      f"--workdir={place}", f"--stages={root / '.stages'}",
      *(f"--config.{key}={value_text(value)}" for key, value in chosen.items()),
    ], _data_files(whole.data))  # fmt: skip
  return [*jobs.values()]


def _resolved(
  get_config: Callable[..., ConfigDict], argument: str, chosen: Any, number: int
) -> ConfigDict:
  """The configuration with settings, checked."""
  try:
    if not isinstance(chosen, dict):
      raise TypeError("give a dictionary of dotted key -> value")
    config = get_config(*filter(None, [argument]))
    config.update_from_flattened_dict(chosen)
    build.check(sizes.for_any_data(config))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    reason = " ".join(str(error).strip("\"'").split())
    raise InputError(
      f"settings {number} of the sweep, {chosen}: {reason}"
    ) from error
  return config


def more_jobs(
  config: str, root: epath.PathLike, jobs: Sequence[Job], seeds: Sequence[int]
) -> list[Job]:
  """Jobs that give the models at their chosen settings more seeds.

  Args:
    config: path of the config file, with arguments after a colon.
    root: directory of the sweep.
    jobs: of the sweep.
    seeds: that no job has had.

  Returns:
    One job for every setting that a model does best with on validation.

  Raises:
    InputError: if a job of the sweep is not done, or has one of the seeds.
  """
  for job in jobs:
    if not job.done:
      raise InputError(
        f"job {job.workdir} is not done, and more seeds are for what is chosen "
        "among all; finish the sweep first"
      )
  sweep = by_setting(finished(root, jobs))
  chosen = choose(sweep)
  had = sorted(set(seeds) & {seed for own in chosen for seed in own["seeds"]})
  if had:
    raise InputError(f"seed {had[0]} is in the sweep already; give others")
  more = []
  for index, of_setting in enumerate(sweep.jobs):
    methods = tuple(own["model"] for own in chosen if own["chosen"] == index)
    if methods:
      names = {own.name for own in of_setting}
      first = next(job for job in jobs if job.workdir.name in names)
      more.append({
        **first.settings, "seeds": tuple(seeds), "methods": methods
      })
  return make_jobs(config, root, more)


def job_name(config: ConfigDict) -> str:
  """Hash of all of a configuration that is not the default."""
  known = of_results(default())
  text = json.dumps([
    found[:2] for found in schema.differences(of_results(config), known, known)
  ])
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _slug(setting: tuple[str, Any]) -> str:
  """A setting as a part of a directory's name."""
  value = re.sub(r"[^\w.]+", "-", str(setting[1])).strip("-")
  return f"{setting[0].rpartition('.')[2]}={value[:24]}"


def _data_files(data: ConfigDict) -> str:
  """Names, sizes and times of the files that are read, '' for none."""
  if data.get("path") is None:
    return ""
  path = epath.Path(data.path).expanduser()
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  stats = [(x.name, x.stat()) for x in files if x.exists()]
  return repr([(name, stat.length, stat.mtime) for name, stat in stats])


def printed(job: Job) -> str:
  """The job's command, to be pasted."""
  return shlex.join(["python", *job.command[1:]])


def run(
  jobs: Sequence[Job], *, parallel: int, console: rich.console.Console
) -> list[Job]:
  """Runs jobs that are not done, several at a time, and reports progress.

  A job's output goes to output.log in its directory. When this process ends,
  the running jobs end too.

  Args:
    jobs: to run.
    parallel: how many at a time.
    console: where to print.

  Returns:
    The jobs that failed.
  """
  waiting = [job for job in jobs if not job.done]
  console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are done")
  total, failed, start = len(waiting), [], time.monotonic()
  running: dict[subprocess.Popen, Job] = {}
  try:
    while waiting or running:
      while waiting and len(running) < parallel:
        job = waiting.pop(0)
        console.print(f"{job.workdir.name}: {job.settings}", markup=False)
        job.workdir.mkdir(parents=True, exist_ok=True)
        with (job.workdir / "output.log").open("ab") as output:
          running[subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
          )] = job  # fmt: skip
      time.sleep(_POLL)
      for process in [p for p in running if p.poll() is not None]:
        job = running.pop(process)
        if process.returncode:
          failed.append(job)
          log = job.workdir / "output.log"
          last = log.read_bytes().decode(errors="replace").splitlines()[-3:]
          console.print("\n  ".join([
            f"{job.workdir.name} failed with exit code {process.returncode}; "
            f"the end of {log}:", *last,
          ]), markup=False)  # fmt: skip
        else:
          disk.write({job.workdir / "done": f"{printed(job)}\n{job.data}\n"})
        finished = total - len(waiting) - len(running)
        gone = time.monotonic() - start
        console.print(
          f"{finished} of {total} jobs, {gone:.0f} s gone, about "
          f"{gone * (total / finished - 1):.0f} s left"
        )
  finally:
    for process in running:
      process.terminate()
    for process in running:
      process.wait()
  return failed


class Sweep(NamedTuple):
  """The finished jobs of a sweep by setting.

  Attributes:
    settings: those keys, and their values, that differ between settings.
    jobs: of each setting its jobs' results.
  """

  settings: Sequence[Mapping[str, Any]]
  jobs: Sequence[Sequence[Results]]


def finished(
  root: epath.PathLike, jobs: Sequence[Job] | None = None
) -> list[Results]:
  """Results of those of a sweep's jobs that are done, at least one.

  Args:
    root: directory of the sweep.
    jobs: None = all in the directory, of whatever configuration.
  """
  root = disk.place("workdir", root)
  if not root.is_dir():
    raise InputError(f"{root} is no directory; name that of a sweep")
  done = [job.workdir.name for job in jobs or () if job.done]
  paths = [
    path for path in sorted(root.iterdir())
    if (path / "done").exists() and (jobs is None or path.name in done)
  ]
  if not paths:
    raise InputError(
      f"{root} holds no finished job of this configuration; run the sweep first"
    )
  return [read(path) for path in paths]


def by_setting(found: Sequence[Results]) -> Sweep:
  """Sorts finished jobs by their settings, in the order of the values.

  Jobs that differ only in their seeds or methods are of one setting.
  """
  together: dict[str, list[Results]] = {}
  flat = {}
  for own in found:
    chosen = dict(schema.flatten(own.config))
    chosen = {key: chosen[key] for key in chosen if key not in _FREE}
    name = json.dumps(chosen, sort_keys=True)
    together.setdefault(name, []).append(own)
    flat[name] = chosen
  keys = differing([*flat.values()])
  chosen = {name: {k: own.get(k) for k in keys} for name, own in flat.items()}
  order = sorted(flat, key=lambda name: _order(chosen[name]))
  return Sweep([chosen[name] for name in order], [together[n] for n in order])


def _order(chosen: Mapping[str, Any]) -> list[tuple]:
  """What sorts settings by their values, numbers first."""
  return [
    ("", x) if isinstance(x, int | float) else (str(x), 0)
    for x in chosen.values()
  ]


def choose(sweep: Sweep) -> list[dict[str, Any]]:
  """The best setting of every model, by validation.

  A model's validation is that of the stages that serve tail and head users,
  weighted by how many users these are. Test results play no part.

  Args:
    sweep: as from `by_setting`.

  Returns:
    Of each model, in the order of the first job: `model`; `validation` of each
    setting, the mean over `seeds`, those that it has in all of them; `chosen`,
    the index of the best setting, the first of equals.

  Raises:
    InputError: if a model is none of METHODS, or has no seed in all of its
      settings.
  """
  models = dict.fromkeys(
    model for jobs in sweep.jobs for own in jobs
    for model in models_of(own.rows)
  )
  trials = []
  for model in models:
    if model not in METHODS:
      raise InputError(
        f"model {model!r} is no method of experiments/methods.py, so that its "
        "validation is not known; leave its job out"
      )
    of_settings = [
      {k: v for own in jobs for k, v in validation(own, model).items()}
      for jobs in sweep.jobs
    ]
    seeds = sorted(set.intersection(*(set(own) for own in of_settings if own)))
    if not seeds:
      raise InputError(
        f"model {model!r} has no training seed in all of its settings; run "
        "them with the same"
      )
    values = [
      float(np.mean([own[seed] for seed in seeds])) if own else math.nan
      for own in of_settings
    ]
    trials.append({
      "model": model, "validation": values, "seeds": seeds,
      "chosen": int(np.nanargmax(values)),
    })
  return trials


def validation(own: Results, model: str) -> dict[int, float]:
  """Seed -> a method's validation in a job, over what serves tail and head."""
  method, rows = METHODS[model], own.rows.filter(model=model)
  head, cost = (rows["segment"] == 1).mean() or 0.0, own.summary["cost"]
  out = {}
  for seed in rows["seed"].unique().sort():
    parts = []
    for segment, (backbone, plugin) in enumerate(method.serve):
      stage = plugin or backbone
      values = cost.get(f"seed{seed}/{stage}", cost.get(stage))["validation"]
      parts.append(values[segment if len(values) > 1 else 0])
    out[seed] = (1 - head) * parts[0] + head * parts[1]
  return out


def best(
  name: str, sweep: Sweep, trials: Sequence[Mapping[str, Any]]
) -> Results:
  """The results of every model at its chosen setting, as of one job.

  Args:
    name: of the result.
    sweep: as from `by_setting`.
    trials: as from `choose`.

  Returns:
    The results, settings that differ 'as chosen'. What is of one setting alone
    is left out: the stages' cost and the group gradients.

  Raises:
    InputError: if jobs of a setting have a model with the same seed twice, or
      the chosen jobs differ in users, targets or groups.
  """
  first = sweep.jobs[0][0]
  rows = pl.concat([
    own.rows.filter(model=trial["model"])
    for trial in trials for own in sweep.jobs[trial["chosen"]]
  ])
  same_users(rows, models_of(rows), on=["user"])
  config = json.loads(json.dumps(first.config))
  for key in sweep.settings[0]:
    *path, last = key.split(".")
    functools.reduce(dict.get, path, config)[last] = "as chosen"
  config["seeds"] = rows["seed"].unique().sort().to_list()
  config["methods"] = [trial["model"] for trial in trials]
  left = "cost", "command"
  return first._replace(
    name=name, rows=rows, config=config, gradients={},
    summary={k: v for k, v in first.summary.items() if k not in left},
    trials={"settings": [*map(dict, sweep.settings)], "models": [*trials]},
  )


def table(found: Sequence[Results], *, base: str | None = None) -> Table:
  """One line a job and model: settings, validation, test, changes.

  Settings are to be chosen by validation, a mean over seeds.

  Args:
    found: as from `finished`.
    base: model to compare with; None takes each job's own.

  Raises:
    InputError: if no job has the base.
  """
  flat = [
    {"data": own.summary["data"], **dict(schema.flatten(own.config))}
    for own in found
  ]
  keys = [key for key in differing(flat) if key != "methods"]
  metric, lines = metrics_of(found[0].config)[0], []
  chosen_of = lambda pair: {key: pair[1].get(key) for key in keys}
  for own, chosen in sorted(
    zip(found, flat, strict=True), key=lambda pair: _order(chosen_of(pair))
  ):
    column, models = next(iter(own.lists.values())), models_of(own.rows)
    against = key_of(base or own.summary.get("base", "base"))
    claims = {} if against not in models else {
      claim.model: claim for claim in check_claims(
        own.rows, base=against, margin=0, metric=metric, column=column
      )
    }
    for model in models:
      rows, values = model_rows(own.rows, model), [math.nan]
      if model in METHODS and own.summary.get("cost"):
        values = [*validation(own, model).values()]
      claim = claims.get(model)
      lines.append((
        *(value_text(chosen.get(key)) for key in keys), model,
        rows["seed"].n_unique(), float(np.mean(values)),
        *(mean_metric(rows.filter(x), metric, column) for x in SLICES.values()),
        *((claim.tail, claim.head) if claim else ("", "")), own.name,
      ))
  if base is not None and not any(line[-2] for line in lines):
    raise InputError(f"--base={base}: no job has that model")
  few = any(line[len(keys) + 1] < MIN_SEEDS for line in lines)
  return Table(
    f"{metric.upper()} of finished jobs",
    [*map(Column, keys), Column("model", "model"), Column("seeds", "count"),
     Column("validation", "level"),
     *(Column(name, "level") for name in SLICES),
     Column("tail change %", "change"), Column("head change %", "change"),
     Column("job")],
    lines, "Fewer than three seeds prove nothing: see --more_seeds." * few,
  )  # fmt: skip


def _main(
  fixed: Mapping[str, Any], swept: Mapping[str, list[Any]]
) -> int:
  values = flags.FLAGS
  console, listed, jobs = commands.Console(), None, None
  if values.config is None and not (values.table or values.output):
    raise InputError("--config is missing; name a config file")
  if values.sweep is not None or swept:
    listed = [
      {**own, **some} if isinstance(own, dict) else own
      for own in (read_settings(values.sweep) if values.sweep else [{}])
      for some in multiplied(swept)
    ]
  if values.config is not None:
    jobs = make_jobs(values.config, values.workdir, listed, fixed)

  def show() -> None:
    found = table(finished(values.workdir, jobs), base=values.base)
    if console.is_terminal:
      print_table(found, console)
    else:
      console.file.write(to_tsv(found))

  if values.output is not None:
    sweep = by_setting(finished(values.workdir, jobs))
    output = disk.place("output", values.output)
    write_summary(best(output.name, sweep, choose(sweep)), output)
    console.print(f"{output}: every model at the setting best on validation")
    return 0
  if values.table:
    show()
    return 0
  some = jobs
  if values.more_seeds:
    wrong = [seed for seed in values.more_seeds if not seed.isdecimal()]
    if wrong:
      raise InputError(f"--more_seeds has {wrong[0]!r}; give whole numbers")
    seeds = [int(seed) for seed in values.more_seeds]
    some = more_jobs(values.config, values.workdir, jobs, seeds)
    jobs = [*jobs, *some]
  if values.index is not None:
    if not 0 <= values.index < len(some):
      raise InputError(f"--index={values.index}: give 0 to {len(some) - 1}")
    some = [some[values.index]]
  if values.dry_run:
    for job in some:
      print(printed(job) + ("  # done" if job.done else ""))
    return 0
  failed = run(
    some, parallel=values.parallel, console=commands.Console(stderr=True)
  )
  if any(job.done for job in some):
    show()
  if failed:
    names = ", ".join(job.workdir.name for job in failed)
    print(f"error: {len(failed)} jobs failed: {names}", file=sys.stderr)
  return 1 if failed else 0


def launch() -> None:
  """Entry point: exit code 2 for bad input, 1 where a job fails."""
  sys.argv[1:], fixed, swept = split_arguments(sys.argv[1:])
  flags.DEFINE_string("config", None, "config file")
  flags.DEFINE_string("sweep", None, "JSON file of settings")
  flags.DEFINE_string("workdir", None, "directory of the sweep", required=True)
  flags.DEFINE_integer("parallel", 1, "jobs at a time", lower_bound=1)
  flags.DEFINE_integer("index", None, "run this job alone, from 0")
  flags.DEFINE_list(
    "more_seeds", [], "more seeds for every model at its chosen setting"
  )
  flags.DEFINE_bool("dry_run", False, "print the commands")
  flags.DEFINE_bool("table", False, "print the table of finished jobs")
  flags.DEFINE_string(
    "output", None, "directory for a summary of each model at its best setting"
  )
  flags.DEFINE_string("base", None, "model that the table compares with")
  commands.launch(lambda _: _main(fixed, swept))


if __name__ == "__main__":
  launch()
