"""Runs every job that a config file's `sweep()` lists.

  python -m experiments.sweep --config=experiments/configs/ml1m.py \
    --workdir=runs/windows --parallel=2

`sweep()` returns a list of settings, dictionaries of dotted key -> value, such
as {"backbone.length": 5, "seeds": (0, 1, 2)}. A job's directory is the hash
of the whole configuration, so that another one never finds its results; a file
`done` marks it as finished on the data that it names. A
killed sweep continues where it was, the jobs too. On a cluster every task runs
one job: --index=$SLURM_ARRAY_TASK_ID. --dry_run prints the commands, --table
only the table of what is finished, from the result files alone. It compares
models with each job's base, or with --base=MODEL; where a job has none, with
that of the job at --beside=WORKDIR.
"""

import fcntl
import hashlib
import json
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import rich.box
import rich.console
import rich.table
import rich.text
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from experiments import commands, schema, settings, sizes, summaries, trials
from experiments.job import of_results
from experiments.methods import METHODS
from experiments.tables import MIN_SEEDS, change_text, user_ids
from pin_jax import disk
from pin_jax.evaluation import metrics, statistics
from pin_jax.types import InputError

_POLL = 0.2  # seconds between looks at whether jobs have ended
_LOOK = 60  # seconds between reports of how far they are
_LAST_LINES = 3  # of a failed job's output


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


def make_jobs(config: str, root: epath.PathLike) -> list[Job]:
  """The jobs of a config file, each checked as far as its settings go.

  Args:
    config: path of the config file, with arguments after a colon.
    root: directory of the sweep.

  Returns:
    The jobs, in the order of `sweep()`.

  Raises:
    InputError: if the file or `sweep()` is missing, or a setting is wrong.
  """
  path = config.partition(":")[0]
  module = _load(path)
  listed = module["sweep"]()
  if not isinstance(listed, list | tuple) or not listed:
    raise InputError(
      f"sweep() of {path} returns {listed!r}; return a list of dictionaries"
    )
  return _jobs_of(config, module, root, listed)


def _jobs_of(
  config: str, module: Mapping[str, Any], root: epath.PathLike,
  listed: Sequence[Any],
) -> list[Job]:
  """A job for each of the listed settings, checked."""
  argument = config.partition(":")[2]
  jobs, seen = [], {}
  for number, chosen in enumerate(listed):
    resolved = _resolved(module, argument, chosen, number)
    name = job_name(resolved)
    if name in seen:
      raise InputError(
        f"settings {number} of the sweep repeat settings {seen[name]}: "
        f"{chosen}; list each once"
      )
    seen[name] = number
    place = disk.place("workdir", root) / name
    command = _command(config, place, chosen)
    jobs.append(Job(place, chosen, command, _data_files(resolved.data)))
  return jobs


def more_jobs(
  config: str, root: epath.PathLike, seeds: Sequence[int]
) -> list[Job]:
  """Jobs that give the models at their chosen settings more seeds.

  Args:
    config: path of the config file, with arguments after a colon.
    root: directory of the sweep.
    seeds: that no job has had.

  Returns:
    One job for every setting that a model does best with on validation.

  Raises:
    InputError: if a job of the sweep is not done, or has one of the seeds.
  """
  jobs = make_jobs(config, root)
  for job in jobs:
    if not job.done:
      raise InputError(
        f"job {job.workdir} is not done, and more seeds are for what is chosen "
        "among all; finish the sweep first"
      )
  found = trials.read([job.workdir for job in jobs])
  chosen = trials.choose(found)
  had = sorted(set(seeds) & {seed for own in chosen for seed in own.seeds})
  if had:
    raise InputError(f"seed {had[0]} is in the sweep already; give others")
  more = []
  for index, of_setting in enumerate(found.jobs):
    methods = tuple(own.method for own in chosen if own.chosen == index)
    if not methods:
      continue
    names = {results.name for results in of_setting}
    first = next(job for job in jobs if job.workdir.name in names)
    more.append({
      **first.settings, "seeds": tuple(seeds), "methods": methods
    })
  return _jobs_of(config, _load(config.partition(":")[0]), root, more)


def _load(path: str) -> dict[str, Any]:
  """The names that a config file defines."""
  try:
    module = runpy.run_path(path)
  except (OSError, SyntaxError) as error:
    raise InputError(
      f"config file {path} cannot be read ({error}); see --help"
    ) from error
  for name in ("get_config", "sweep"):
    if name not in module:
      raise InputError(f"config file {path} has no {name}(); define it there")
  return module


def _resolved(
  module: Mapping[str, Any], argument: str, chosen: Any, number: int
) -> ConfigDict:
  """The configuration with settings, checked."""
  if not isinstance(chosen, dict):
    raise InputError(
      f"settings {number} of the sweep are {chosen!r}; give a dictionary of "
      "dotted key -> value"
    )
  try:
    config: ConfigDict = module["get_config"](*filter(None, [argument]))
    config.update_from_flattened_dict(chosen)
  except InputError:
    raise
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    reason = " ".join(str(error).strip("\"'").split())
    raise InputError(
      f"settings {number} of the sweep, {chosen}: {reason}"
    ) from error
  try:
    settings.check(sizes.for_any_data(config))
  except InputError as error:
    raise InputError(f"settings {number} of the sweep: {error}") from error
  return config


def job_name(config: ConfigDict) -> str:
  """Hash of all of a configuration on which results depend."""
  text = json.dumps(of_results(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _data_files(data: ConfigDict) -> str:
  """Names, sizes and times of the files that are read, '' for none."""
  if data.get("path") is None:
    return ""
  path = epath.Path(data.path).expanduser()
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  stats = [(x.name, x.stat()) for x in files if x.exists()]
  return repr([(name, stat.length, stat.mtime) for name, stat in stats])


def _command(
  config: str, workdir: epath.Path, chosen: Mapping[str, Any]
) -> list[str]:
  return [
    sys.executable, "-m", "experiments.main", f"--config={config}",
    f"--workdir={workdir}",
    *(f"--config.{key}={_written(value)}" for key, value in chosen.items()),
  ]


def _written(value: Any) -> str:
  """A value as a flag takes it."""
  if isinstance(value, list | tuple):
    return repr(tuple(value))
  return str(value)


def printed(job: Job) -> str:
  """The job's command, to be pasted."""
  return shlex.join(["python", *job.command[1:]])


def run(
  jobs: Sequence[Job], *, parallel: int, console: rich.console.Console
) -> list[Job]:
  """Runs jobs that are not done, several at a time, and reports progress.

  A job's output goes to output.log in its directory; its last line is shown
  every minute. When this process ends, the running jobs end too.

  Args:
    jobs: to run.
    parallel: how many at a time.
    console: where to print.

  Returns:
    The jobs that failed.

  Raises:
    InputError: if a job is running already.
  """
  waiting = {job.workdir.name: job for job in jobs if not job.done}
  if len(waiting) < len(jobs):
    console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are done")
  names, total, failed = [*waiting], len(waiting), []
  running: dict[str, subprocess.Popen] = {}
  start = looked = time.monotonic()
  try:
    while names or running:
      while names and len(running) < parallel:
        name = names.pop(0)
        console.print(f"{name}: {waiting[name].settings}", markup=False)
        running[name] = _start(waiting[name])
      for name in [n for n, p in running.items() if p.poll() is not None]:
        failed += _finish(waiting[name], running.pop(name).returncode, console)
        finished = total - len(names) - len(running)
        _print_progress(finished, total, start, console)
      if time.monotonic() - looked > _LOOK:
        looked = time.monotonic()
        for name in running:
          console.print(f"{name}: {_last_line(waiting[name])}", markup=False)
      time.sleep(_POLL)
  finally:
    for process in running.values():
      process.terminate()
    for process in running.values():
      process.wait()
  return failed


def _start(job: Job) -> subprocess.Popen:
  """Starts a job, which holds a lock on its directory as long as it lives.

  Raises:
    InputError: if it lives already, left by a sweep that was killed.
  """
  job.workdir.mkdir(parents=True, exist_ok=True)
  with (
    (job.workdir / "lock").open("ab") as lock,
    (job.workdir / "output.log").open("ab") as output,
  ):
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f"job {job.workdir} is running elsewhere; wait for it, or end it"
      ) from error
    return subprocess.Popen(
      job.command, stdin=subprocess.DEVNULL, stdout=output,
      stderr=subprocess.STDOUT, pass_fds=[lock.fileno()],
    )


def _output(job: Job) -> list[str]:
  data = (job.workdir / "output.log").read_bytes()
  return data.decode(errors="replace").splitlines()


def _last_line(job: Job) -> str:
  lines = _output(job)
  return lines[-1] if lines else "starts"


def _finish(job: Job, code: int, console: rich.console.Console) -> list[Job]:
  """Marks a job as done, or says why it is not; returns it in that case."""
  if code == 0:
    disk.write({job.workdir / "done": f"{printed(job)}\n{job.data}\n"})
    return []
  lines = _output(job)
  console.print(
    f"{job.workdir.name} failed with exit code {code}; the end of "
    f"{job.workdir / 'output.log'}:", markup=False,
  )
  for line in lines[-_LAST_LINES:]:
    console.print(f"  {line}", markup=False)
  return [job]


def _print_progress(
  finished: int, total: int, start: float, console: rich.console.Console
) -> None:
  gone = time.monotonic() - start
  left = gone * (total - finished) / finished
  console.print(
    f"{finished} of {total} jobs, {gone:.0f} s gone, about {left:.0f} s left"
  )


def table(
  root: epath.PathLike, *, base: str | None = None,
  beside: epath.PathLike | None = None, cutoff: int = 10,
  jobs: Sequence[Job] | None = None,
) -> pl.DataFrame:
  """One line a job and model, from the result files of a sweep alone.

  Args:
    root: directory of the sweep.
    base: model to compare with; None takes that of the job at `beside`, or
      each job's own.
    beside: workdir of a finished job, whose base is compared with where a job
      has none of that name.
    cutoff: K of NDCG, first list of candidates.
    jobs: to read those that are done of; None = all that are in the directory,
      of whatever configuration.

  Returns:
    job, a column for every setting in which the jobs differ (but `methods`,
    which the models tell), model, seeds,
    validation (the selected step's, mean over seeds; NaN where a model is not
    one trained stage for all users), and NDCG overall, tail and head on test;
    where there is a base, the change against it in %, with its 95 % interval
    (paired bootstrap over users and seeds). Settings are to be chosen by
    validation.

  Raises:
    InputError: if no job has finished, the base is nowhere, or the jobs to be
      compared with `beside` have other users, targets, segments or seeds.
  """
  done = [job.workdir.name for job in jobs or () if job.done]
  found = {
    path.name: summaries.read(path) for path in trials.finished(root)
    if jobs is None or path.name in done
  }
  if not found:
    raise InputError(f"{root} holds no finished job of this configuration")
  flat = {
    name: {
      "data": r.summary["data"],
      **{k: v for k, v in schema.flatten(r.config) if k != "methods"},
    }
    for name, r in found.items()
  }
  differing = trials.differing_keys(flat)
  other = None
  if beside is not None:
    if not (epath.Path(beside) / "summary.json").exists():
      raise InputError(
        f"--beside={beside} is no workdir of a finished job (a summary of one "
        "does not say which user is which); name one"
      )
    results = summaries.read(beside)
    base = base or _base_of(results)
    other = _rows_of(results, base)
    if other is None:
      raise InputError(
        f"--beside={beside} has no model {base!r}; name one of "
        f"{results.rows['model'].unique().to_list()} by --base"
      )
  lines = []
  for name, results in found.items():
    chosen = {key: _written(flat[name].get(key)) for key in differing}
    own = _rows_of(results, base or _base_of(results))
    compared = (own, name) if own is not None else (other, beside)
    lines += [
      {"job": name, **chosen, **line}
      for line in _models(results, *compared, cutoff)
    ]
  out = pl.DataFrame(lines)
  if (out["tail %"] == "").all():
    if base is not None:
      raise InputError(f"--base={base}: no job of {root} has that model")
    out = out.drop("tail %", "head %")
  return out


def _base_of(results: summaries.Results) -> str:
  return results.summary.get("base", "base")


def _rows_of(results: summaries.Results, model: str) -> pl.DataFrame | None:
  rows = results.rows.filter(model=model)
  return rows if rows.height else None


def _models(
  results: summaries.Results, base: pl.DataFrame | None, origin: str,
  cutoff: int,
) -> Iterator[dict[str, Any]]:
  column = next(iter(results.lists.values()))
  with_values = lambda frame: frame.with_columns(
    value=metrics.ndcg(frame[column].to_numpy(), cutoff)
  )
  rows = with_values(results.rows)
  base = None if base is None else with_values(base)
  best = _validation(results.summary.get("cost", {}))
  for model in rows["model"].unique(maintain_order=True):
    own = rows.filter(pl.col("model") == model)
    parts = {
      "overall": own, "tail": own.filter(segment=0),
      "head": own.filter(segment=1),
    }
    yield {
      "model": model,
      "seeds": own["seed"].n_unique(),
      "validation": best.get(model, float("nan")),
      **{
        f"NDCG@{cutoff} {name}": part["value"].mean()
        for name, part in parts.items()
      },
      **_changes(base, own, (results.name, origin)),
    }


def _changes(
  base: pl.DataFrame | None, own: pl.DataFrame, places: tuple[str, str]
) -> dict[str, str]:
  """Changes of `value` in %, with intervals, by segment; '' for none."""
  names = {0: "tail %", 1: "head %"}
  if base is None or base["model"][0] == own["model"][0]:
    return dict.fromkeys(names.values(), "")
  keys = ["seed", "user", "target", "segment"]
  pairs = base.join(own, on=keys, suffix="_own", maintain_order="left")
  if not len(pairs) == len(base) == len(own):
    raise InputError(
      f"jobs {places[0]} and {places[1]} differ in users, targets, segments or "
      "seeds; compare jobs of the same data, seeds and groups.head_share"
    )
  out = {}
  for segment, name in names.items():
    part = pairs.filter(segment=segment)
    change = statistics.relative_change(
      part["value"].to_numpy(), part["value_own"].to_numpy(),
      users=user_ids(part), seeds=part["seed"].to_numpy(),
    )
    out[name] = change_text(change.estimate, change.low, change.high)
  return out


def _validation(cost: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """Title of a model -> validation of the one stage that serves everybody."""
  stages: dict[str, list[float]] = {}
  for run, entry in cost.items():
    if len(entry["validation"]) == 1:
      stage = summaries.without_seed(run)
      stages.setdefault(stage, []).append(entry["validation"][0])
  return {
    method.title: float(np.mean(stages[method.stages[-1].name]))
    for method in METHODS.values()
    if len(set(method.serve)) == 1
    and method.stages[-1].users == "all"
    and method.stages[-1].name in stages
  }


def print_table(lines: pl.DataFrame, console: rich.console.Console) -> None:
  """Prints what `table` returns."""
  out = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for name, kind in lines.schema.items():
    side = "right" if kind.is_numeric() else "left"
    out.add_column(rich.text.Text(name), justify=side)
  for line in lines.iter_rows():
    out.add_row(*(rich.text.Text(_cell(value)) for value in line))
  console.print(out)
  if lines["seeds"].min() < MIN_SEEDS:
    console.print("Fewer than three seeds prove nothing: see --more_seeds.")


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return "n/a" if np.isnan(value) else f"{value:.4f}"
  return str(value)


def _selected(jobs: Sequence[Job], index: int | None) -> Sequence[Job]:
  if index is None:
    return jobs
  if not 0 <= index < len(jobs):
    raise InputError(f"--index={index}: give 0 to {len(jobs) - 1}")
  return [jobs[index]]


def _table_by_flags(jobs: Sequence[Job] | None = None) -> pl.DataFrame:
  values = flags.FLAGS
  return table(
    values.workdir, base=values.base, beside=values.beside, jobs=jobs
  )


def _main(_: Sequence[str]) -> int:
  values = flags.FLAGS
  console = commands.Console()
  if values.parallel < 1:
    raise InputError(f"--parallel={values.parallel}: give at least 1")
  if values.config is None and not values.table:
    raise InputError("--config is missing; name a config file with a sweep()")
  listed = values.config and make_jobs(values.config, values.workdir)
  if values.table:
    print_table(_table_by_flags(listed), console)
    return 0
  if values.more_seeds:
    wrong = [seed for seed in values.more_seeds if not seed.isdecimal()]
    if wrong:
      raise InputError(f"--more_seeds has {wrong[0]!r}; give whole numbers")
    seeds = [int(seed) for seed in values.more_seeds]
    jobs = more_jobs(values.config, values.workdir, seeds)
    listed = [*listed, *jobs]
  else:
    jobs = listed
  jobs = _selected(jobs, values.index)
  if values.dry_run:
    for job in jobs:
      print(printed(job) + ("  # done" if job.done else ""))
    return 0
  failed = run(jobs, parallel=values.parallel, console=console)
  if any(job.done for job in jobs):
    print_table(_table_by_flags(listed), console)
  if failed:
    names = ", ".join(job.workdir.name for job in failed)
    print(f"error: {len(failed)} jobs failed: {names}", file=sys.stderr)
  return 1 if failed else 0


def launch() -> None:
  """Entry point: exit code 2 for bad input, 1 where a job fails."""
  flags.DEFINE_string("config", None, "config file with a sweep()")
  flags.DEFINE_string("workdir", None, "directory of the sweep", required=True)
  flags.DEFINE_integer("parallel", 1, "jobs at a time")
  flags.DEFINE_integer("index", None, "run this job alone, from 0")
  flags.DEFINE_list(
    "more_seeds", [], "more seeds for every model at its chosen setting"
  )
  flags.DEFINE_bool("dry_run", False, "print the commands")
  flags.DEFINE_bool("table", False, "print the table of finished jobs")
  flags.DEFINE_string("base", None, "model that the table compares with")
  flags.DEFINE_string(
    "beside", None, "workdir of a finished job that has the base, for jobs "
    "without",
  )
  commands.launch(_main)


if __name__ == "__main__":
  launch()
