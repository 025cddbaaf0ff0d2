"""Runs a model of another library on our split, into a workdir of ours.

  python -m third_party.recbole --python=B/bin/python \
    --config=experiments/configs/beauty.py --config.seeds=0,1,2 \
    --model=SASRec --cpu_seconds=500 --workdir=runs/recbole --beside=runs/beauty

The configuration says what the data are, how they are split, the seeds and the
sizes of the model; --option=name=value sets the library's own settings. The
library trains its own model with its own loaders and trainer, in a process
under the interpreter of its own environment (README.md beside this file says
how to make one), for so many CPU-seconds or --epochs. At marks it ranks our
validation targets, which is timed apart; the best state by NDCG@10 (history
masked) ranks our test targets once, among the whole catalogue.

The workdir then is that of a finished job for experiments.report. With
--beside=DIR its rows hold the models of that job first, a job of ours or
another library's run, so that all are compared user by user in one table; data,
split, targets and seeds must be the same. The same command continues: a seed
that has finished is not trained again.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import rich.console
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from experiments import (
  commands,
  job,
  report,
  schema,
  workdir,
)
from experiments.problem import Problem, fingerprint, prepare
from experiments.results import key_of, read_rows
from pin_jax import disk
from pin_jax.data.splits import Split
from pin_jax.types import InputError
from third_party.peers import protocol

PEERS = pathlib.Path(__file__).parent / "peers"
ENVIRONMENT = {  # one core, no accelerator
  "OMP_NUM_THREADS": "1",
  "MKL_NUM_THREADS": "1",
  "OPENBLAS_NUM_THREADS": "1",
  "CUDA_VISIBLE_DEVICES": "",
}
SIZES = (
  "length", "width", "blocks", "heads", "dropout", "expansion", "layers"
)
_PROBE = """
import importlib.metadata as metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
  try:
    found[name] = metadata.version(name)
  except metadata.PackageNotFoundError:
    found[name] = None
print(json.dumps(found))
"""


class Peer(NamedTuple):
  """Another library.

  Attributes:
    name: what tables call it.
    package: its distribution.
    version: the one needed, or what it begins with.
    worker: script of a run, see peers/worker.py.
  """

  name: str
  package: str
  version: str
  worker: pathlib.Path


class Plan(NamedTuple):
  """What to run of a library, with each of the configuration's seeds.

  Attributes:
    python: the interpreter of its environment.
    model: the library's name of it.
    options: the library's own settings.
    cpu_seconds: of training, or None.
    epochs: of training, or None; one of the two.
    validations: how many, at equal distances, of cpu_seconds; epochs have one
      each.
  """

  python: str
  model: str
  options: Mapping[str, Any]
  cpu_seconds: float | None = None
  epochs: int | None = None
  validations: int = 20


def data_of(split: Split) -> protocol.Data:
  """A split as the other libraries' processes read it."""
  data = split.interactions
  return protocol.Data(
    data.items, data.offsets, split.train_end, split.validation, split.test,
    data.num_items,
  )


def run(
  config: ConfigDict,
  peer: Peer,
  plan: Plan,
  directory: epath.PathLike,
  *,
  beside: epath.PathLike | None = None,
  command: str = "",
  console: rich.console.Console | None = None,
) -> None:
  """Runs a library's model, or what is left to run, and prints the tables.

  Args:
    config: as from `experiments.configs.base.default`.
    peer: the library.
    plan: what to run of it.
    directory: the workdir, on this machine.
    beside: workdir of finished results to compare with.
    command: how it was launched, for the summary.
    console: where to print; standard output by default.

  Raises:
    InputError: for any bad input, and with what the library said last if its
      process fails.
  """
  console = console or rich.console.Console(highlight=False, soft_wrap=True)
  check_plan(config, plan)
  found = versions(peer, plan.python)
  config, problem = prepare(config)
  title = f"{peer.name} {plan.model}"
  other = None
  if beside is not None:
    other = _results_beside(epath.Path(beside), problem, config.seeds, title)
  directory = disk.place("workdir", directory)
  directory = epath.Path(os.path.abspath(os.fspath(directory)))
  about = {
    **plan._asdict(), "peer": peer.package, "versions": found,
    "sizes": {key: config.backbone[key] for key in SIZES},
    "data": fingerprint(problem),
  }
  del about["python"]
  with workdir.held(directory):
    _claim(directory, about)
    file = directory / "peer" / "data.npz"
    file.parent.mkdir(exist_ok=True)
    protocol.write_data(os.fspath(file), data_of(problem.split))
    results = {
      seed: _train(peer, plan, directory, about["sizes"], seed, console)
      for seed in config.seeds
    }
    rows = [
      _rows(title, seed, problem, directory / "peer" / f"seed{seed}")
      for seed in config.seeds
    ]
    summary = {
      **job.about_data(problem), "base": title, "other": title,
      "closeness": [], "peer": about, "command": command,
      "versions": {**workdir.provenance(), **_named(peer, found)},
      "cost": _costs(peer, plan, results),
    }
    seconds = {
      run: result["cpu_seconds"]
      for run, result in zip(summary["cost"], results.values(), strict=True)
    }
    _write(directory, pl.concat(rows), summary, seconds, other)
  report.write_report([directory], console=console)


def check_plan(config: ConfigDict, plan: Plan) -> None:
  """Raises InputError for a plan that cannot be run."""
  if config.evaluation.protocol != "full":
    raise InputError(
      f"evaluation.protocol={config.evaluation.protocol!r}, but other "
      "libraries rank the whole catalogue; use "
      "--config.evaluation.protocol=full"
    )
  budgets = {"cpu_seconds": plan.cpu_seconds, "epochs": plan.epochs}
  given = {key: x for key, x in budgets.items() if x is not None}
  if len(given) != 1 or next(iter(given.values())) <= 0:
    raise InputError(
      f"the budget is {given or 'absent'}; give a positive --cpu_seconds or "
      "--epochs, one of the two"
    )
  if plan.validations < 1:
    raise InputError(
      f"validations={plan.validations}; give at least 1, for the best state "
      "is chosen by them"
    )


def versions(peer: Peer, python: str) -> dict[str, str | None]:
  """The versions of Python, the library and torch in its environment.

  Raises:
    InputError: if there is no such interpreter, or it has another version.
  """
  remedy = (
    f"make an environment with {peer.package} {peer.version} as "
    "third_party/README.md says and name its bin/python"
  )
  command = [_path_of(python), "-c", _PROBE, peer.package, "torch"]
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, check=True, env=_environment()
    )
    found = json.loads(done.stdout)
  except (OSError, subprocess.CalledProcessError, ValueError) as error:
    reason = getattr(error, "strerror", None) or "it is no Python interpreter"
    raise InputError(
      f"--python={python} cannot be run ({reason}); {remedy}"
    ) from error
  version = found[peer.package]
  if version is None or not f"{version}.".startswith(f"{peer.version}."):
    raise InputError(
      f"--python={python} has {peer.package} {version or 'not installed'} and "
      f"{peer.version} is needed; {remedy}"
    )
  return found


def _path_of(python: str) -> str:
  """Absolute, for processes run elsewhere; links are kept, as venvs need."""
  return os.path.abspath(shutil.which(os.path.expanduser(python)) or python)


def _environment() -> dict[str, str]:
  """Without our search path, which may hold our versions of libraries."""
  own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  return {**own, **ENVIRONMENT}


def _named(peer: Peer, found: Mapping[str, str | None]) -> dict[str, str]:
  """The peer's versions under names that ours do not have."""
  names = {"python": f"python of {peer.name}", "torch": f"torch of {peer.name}"}
  return {names.get(key, key): str(value) for key, value in found.items()}


def _claim(directory: epath.Path, about: Mapping[str, Any]) -> None:
  """Makes the workdir this run's, or checks that it is; raises InputError."""
  path = directory / "peer.json"
  mine = json.loads(json.dumps(about))
  if path.exists():
    theirs = workdir.read_json(path)
    for key, new, old in schema.differences(mine, theirs, {}):
      raise InputError(
        f"workdir {directory} belongs to another run: {key} is {old!r} there "
        f"and {new!r} here; use another --workdir or the same setting"
      )
    return
  if (directory / "config.json").exists():
    raise InputError(
      f"workdir {directory} belongs to a job; use another --workdir (and "
      f"--beside={directory} to compare with it)"
    )
  disk.write({path: json.dumps(mine, indent=2) + "\n"})


def _train(
  peer: Peer, plan: Plan, directory: epath.Path, sizes: Mapping[str, Any],
  seed: int, console: rich.console.Console,
) -> dict[str, Any]:
  """The result.json of a seed, trained where there is none."""
  folder = directory / "peer" / f"seed{seed}"
  say = lambda text: console.print(
    f"{peer.name} {plan.model}, seed {seed}: {text}", markup=False,
    soft_wrap=True,
  )
  if (folder / "result.json").exists():
    say("finished before")
    return workdir.read_json(folder / "result.json")
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  asked = {
    **plan._asdict(), "data": os.fspath(folder.parent / "data.npz"),
    "folder": os.fspath(folder), "seed": seed, "sizes": dict(sizes),
  }
  del asked["python"]
  (folder / "settings.json").write_text(json.dumps(asked, indent=2) + "\n")
  code = _call(
    [_path_of(plan.python), os.fspath(peer.worker), "settings.json"], folder,
    say,
  )
  if code or not (folder / "result.json").exists():
    log = folder / "log.txt"
    lines = log.read_bytes().decode(errors="replace").split("\n")
    last = next((x.strip() for x in reversed(lines) if x.strip()), "nothing")
    raise InputError(
      f"{peer.name} {plan.model}, seed {seed}, ended with exit code {code} and "
      f"said last: {last}; all that it said is in {log}"
    )
  return workdir.read_json(folder / "result.json")


def _call(
  command: Sequence[str], folder: epath.Path, say: Callable[[str], None]
) -> int:
  """Runs a worker, passes its lines on; returns its exit code."""
  with (folder / "log.txt").open("w") as errors:
    process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=errors, text=True,
      cwd=os.fspath(folder), env=_environment(),
    )
    try:
      for line in process.stdout:
        say(line.rstrip("\n"))
      return process.wait()
    finally:
      process.kill()
      process.wait()
      process.stdout.close()


def _rows(
  title: str, seed: int, problem: Problem, folder: epath.Path
) -> pl.DataFrame:
  """Result rows of a seed, from the ranks that its worker wrote."""
  with np.load(os.fspath(folder / "ranks.npz"), allow_pickle=False) as file:
    columns = {name: file[name] for name in protocol.Ranks._fields}
  users = np.flatnonzero(problem.split.test >= 0)
  return job.result_rows(title, seed, problem, users, columns)


def _costs(
  peer: Peer, plan: Plan, results: Mapping[int, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
  """What each seed's run took, by its name, as jobs report it."""
  name = f"{peer.package}/{plan.model}"
  return {
    f"seed{seed}/{name}" if len(results) > 1 else name: {
      "steps": result["steps"],
      "best_steps": [result["best_step"]],
      "validation": [result["validation"]],
      "epochs": result["epochs"],
      "validation_cpu_seconds": result["validation_cpu_seconds"],
    }
    for seed, result in results.items()
  }


class _Beside(NamedTuple):
  """Results that others are put beside.

  Attributes:
    rows: of all its models.
    summary: content of its summary.json.
    seconds: content of its cpu_seconds.json.
    config: content of its config.json, or None.
  """

  rows: pl.DataFrame
  summary: dict[str, Any]
  seconds: dict[str, float]
  config: dict[str, Any] | None


def _results_beside(
  path: epath.Path, problem: Problem, seeds: Sequence[int], title: str
) -> _Beside:
  """Reads finished results; raises InputError where they do not compare."""
  rows, suffix = read_rows(path)
  if suffix:
    raise InputError(
      f"--beside={path} ranked sampled candidates and other libraries rank the "
      "whole catalogue; name a job with evaluation.protocol=full"
    )
  if not (path / "summary.json").exists():
    raise InputError(f"--beside={path} has no summary.json; finish it first")
  summary = workdir.read_json(path / "summary.json")
  for key, mine in (
    ("fingerprint", fingerprint(problem)),
    ("protocol", problem.split.protocol),
  ):
    if summary.get(key) != mine:
      raise InputError(
        f"--beside={path} has {key} {summary.get(key)!r} and the "
        f"configuration's data have {mine!r}; use the configuration of that job"
      )
  users = np.flatnonzero(problem.split.test >= 0)
  expected = job.result_rows(title, 0, problem, users, {})
  keys = ["user", "target"]
  theirs = rows.select(keys).unique().sort(keys)
  if not theirs.equals(expected.select(keys).sort(keys)):
    raise InputError(
      f"--beside={path} holds other users or targets than the configuration's "
      "data; use the configuration of that job"
    )
  own = set(rows.filter(model=key_of(summary["base"]))["seed"])
  if own != set(seeds):
    raise InputError(
      f"--beside={path} has seeds {sorted(own)} and here are {sorted(seeds)}; "
      "pairs need the same ones"
    )
  if title in rows["model"].unique():
    raise InputError(
      f"--beside={path} has a model {title!r} already; name a job without it"
    )
  read = lambda name: (
    workdir.read_json(path / name) if (path / name).exists() else None
  )
  return _Beside(
    rows, summary, read("cpu_seconds.json") or {}, read("config.json")
  )


def _write(
  directory: epath.Path, rows: pl.DataFrame, summary: dict[str, Any],
  seconds: dict[str, float], other: _Beside | None,
) -> None:
  """Writes what the report reads, the other results' models first."""
  if other is not None:
    rows = pl.concat([other.rows, rows])
    for key in ("cost", "versions"):
      summary[key] = {**other.summary.get(key, {}), **summary[key]}
    summary["base"] = key_of(other.summary["base"])
    summary["closeness"] = other.summary.get("closeness", [])
    summary["command"] = "\n".join(
      filter(None, [other.summary.get("command"), summary["command"]])
    )
    seconds = {**other.seconds, **seconds}
  config = directory / "config.json"
  config.unlink(missing_ok=True)
  if other is not None and other.config is not None:
    # Marked, for a job that comes by must not take the workdir for its own.
    marked = {**other.config, "peer": summary["peer"]["peer"]}
    disk.write({config: json.dumps(marked, indent=2) + "\n"})
  workdir.write_rows(directory / "rows.parquet", rows)
  for name, content in (("cpu_seconds", seconds), ("summary", summary)):
    text = json.dumps(content, indent=2) + "\n"
    disk.write({directory / f"{name}.json": text})


def options_of(texts: Sequence[str]) -> dict[str, Any]:
  """name=value of each; a value is JSON where it can be read so, else text.

  Raises:
    InputError: for a text without '=', or a name given twice.
  """
  options: dict[str, Any] = {}
  for text in texts:
    name, equals, value = text.partition("=")
    if not name or not equals or name in options:
      raise InputError(
        f"--option={text}; give name=value, each name once"
      )
    try:
      options[name] = json.loads(value)
    except ValueError:
      options[name] = value
  return options


def launch(peer: Peer) -> None:
  """Entry point of a library's adapter: defines the flags and runs."""
  config = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, with arguments after a colon."
  )
  for name, text in (
    ("python", f"interpreter with {peer.package} {peer.version}"),
    ("workdir", "directory of the results; made where it is missing"),
  ):
    flags.DEFINE_string(name, None, text, required=True)
  flags.DEFINE_string("model", "SASRec", f"name of a model of {peer.name}")
  flags.DEFINE_float("cpu_seconds", None, "of training, validation apart")
  flags.DEFINE_integer("epochs", None, "of training; instead of cpu_seconds")
  flags.DEFINE_integer(
    "validations", 20, "how many in cpu_seconds; epochs have one each"
  )
  flags.DEFINE_multi_string(
    "option", [], f"name=value, a setting of {peer.name}; may be repeated"
  )
  flags.DEFINE_string("beside", None, "workdir of results to compare with")
  flags.mark_flag_as_required("config")

  def main(_: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    plan = Plan(
      values.python, values.model, options_of(values.option),
      values.cpu_seconds, values.epochs, values.validations,
    )
    command = ["python", "-m", f"third_party.{peer.package}", *sys.argv[1:]]
    run(
      config.value, peer, plan, values.workdir, beside=values.beside,
      command=shlex.join(command),
    )

  commands.launch(main, config)
