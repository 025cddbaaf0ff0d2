"""The main job: data -> stages -> full ranking -> report.

A workdir belongs to one data set, and to one process at a time; another
configuration of the job reuses the stages that it shares with the last (see
`reuse`). It holds config.json, log.jsonl, events/, checkpoints/, rows.parquet
(rows_sampled.parquet for sampled candidates), summary.json and report.md, all
of which are the same however often the job was killed, cpu_seconds.json, which
is not, and report.html and report.tex, which tell of it. With several
processes (see `processes`) the first writes all but the checkpoints.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import rich.console
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from experiments import (
  build,
  commands,
  logs,
  processes,
  report,
  results,
  reuse,
  schema,
  sizes,
  truth,
  workdir,
)
from experiments.build import Networks, networks_of
from experiments.methods import (
  METHODS,
  SEGMENTS,
  Method,
  choose,
  compared,
  information,
  learns,
  selected,
  stages_of,
)
from experiments.problem import (
  Problem,
  fingerprint,
  prepare,
  requests_for,
)
from experiments.results import MIN_SEEDS, SUFFIXES, few_seeds, number_range
from experiments.stages import (
  Monitor,
  Trainer,
  check,
  num_steps,
  routed,
)
from pin_jax import disk
from pin_jax.data import activeness, batches
from pin_jax.evaluation import metrics, ranking
from pin_jax.training import checkpoints
from pin_jax.types import InputError, Interrupted

TRUTH_USERS = 2000  # events at which the simulator's distributions are taken
_OF_DATA = "data", "split", "groups"  # keys that the fingerprint follows from
_METRICS = "evaluation.metrics"
_SHOWN = "data", "claims", "dispatch", _METRICS  # no row depends on them
_TYPES = {  # of what a ranker returns
  "rank": np.float64,
  "candidates": np.int32,
  "rank_unmasked": np.float64,
  "candidates_unmasked": np.int32,
  "score": np.float32,
  "negative_scores": np.float32,
}


def method_rows(
  key: str, method: Method, seed: int, problem: Problem, trainer: Trainer
) -> pl.DataFrame:
  """Ranks the test targets with a method's models; one row a user."""
  users = np.flatnonzero(problem.split.test >= 0)
  columns = {}
  for chosen, kind, operands in _by_model(
    method, seed, problem, trainer, users
  ):
    for name, values in trainer.ranker(*kind)(*operands)._asdict().items():
      shape = len(users), *values.shape[1:]
      columns.setdefault(name, np.zeros(shape, values.dtype))[chosen] = values
  return result_rows(key, seed, problem, users, columns)


def result_rows(
  model: str, seed: int, problem: Problem, users: np.ndarray,
  columns: Mapping[str, np.ndarray],
) -> pl.DataFrame:
  """One row a user, as every table reads them.

  Args:
    model: key of its method, or the name of another library's.
    seed: of its training.
    problem: the data.
    users: [n], who have test targets.
    columns: what a ranker returned, fields of `ranking.Ranks` or
      `ranking.SampledRanks`.
  """
  data = problem.split.interactions
  target = data.items[data.offsets[users] + problem.split.test[users]]
  return pl.DataFrame({
    "model": [model] * len(users),
    "seed": np.full(len(users), seed, np.int32),
    "user": pl.Series(data.user_ids[users].tolist()),
    "group": problem.groups[users].astype(np.int32),
    "segment": problem.segments[users].astype(np.int32),
    "activeness": problem.split.activeness[users].astype(np.int32),
    "target": pl.Series(data.item_ids[target - 1].tolist()),
    **{key: values.astype(_TYPES[key]) for key, values in columns.items()},
  })


def validated(
  key: str, seed: int, problem: Problem, trainer: Trainer, half: bool
) -> dict[str, np.ndarray]:
  """Segment -> a method's ranks of its validation targets, before `refit`.

  Args:
    key: of the method.
    seed: of its training.
    problem: the data.
    trainer: whose stages are trained.
    half: leave those out from whose validation targets a method has learnt.
  """
  requests = trainer.validation("all", half)
  ranks = np.zeros(len(requests.users))
  for chosen, kind, operands in _by_model(
    METHODS[key], seed, problem, trainer, requests.users, "validation"
  ):
    ranks[chosen] = trainer.ranker(*kind)(*operands).rank
  return {
    name: ranks[requests.segments == s] for s, name in enumerate(SEGMENTS)
  }


def _choice(
  found: Mapping[str, Sequence[Mapping[str, np.ndarray]]], metric: str
) -> dict[str, Any]:
  """What serves whom, and by which values of a metric.

  Args:
    found: key -> of each seed, as of `validated`.
    metric: name of one.
  """
  values = metrics.metric(metric)
  first = next(iter(found.values()))[0]
  validation = {
    key: {
      part: float(values(np.stack([own[part] for own in seeds])).mean())
      if len(first[part]) else 0.0 for part in SEGMENTS
    } for key, seeds in found.items()
  }
  return {
    **choose(validation), "validation": validation,
    "users": {part: len(ranks) for part, ranks in first.items()},
  }


def _by_model(
  method: Method, seed: int, problem: Problem, trainer: Trainer,
  users: np.ndarray, part: str = "test",
) -> Iterator[tuple[np.ndarray, tuple, tuple]]:
  """Yields (mask over users, a model's kind, what it is applied to)."""
  of_user = problem.segments[users]
  for entry in dict.fromkeys(method.serve):
    here = [s for s, other in enumerate(method.serve) if other == entry]
    chosen = np.isin(of_user, here)
    stage, segments, _ = routed(problem, method, entry)
    requests = requests_for(problem, part, users[chosen])
    requests = requests._replace(
      segments=segments[requests.users].astype(np.int32)
    )
    kind = stage and stage.plugin, method.stage(entry[0]).reads_activeness
    weights = trainer.weights(seed, entry[0], stage, part == "validation")
    yield chosen, kind, (weights, trainer.sequences, requests)


def model_log_probabilities(
  method: Method, seed: int, problem: Problem, trainer: Trainer,
  users: np.ndarray,
) -> np.ndarray:
  """log P(y|x) of a method's models at users' test events; [n, V]."""
  num_items = problem.split.interactions.num_items
  out = np.zeros((len(users), num_items), np.float32)
  for chosen, kind, operands in _by_model(
    method, seed, problem, trainer, users
  ):
    out[chosen] = ranking.make_log_probabilities(
      trainer.model(*kind), num_items=num_items, length=trainer.length
    )(*operands)
  return out


def claim_workdir(
  directory: epath.Path, config: ConfigDict, data_fingerprint: str,
  stages: epath.Path | None = None,
  adopt: Callable[[dict[str, Any], bool], None] = lambda config, changed: None,
) -> None:
  """Makes the workdir this job's, or checks that it is of the same data.

  Results of another configuration are deleted, its stages stay.

  Args:
    directory: the workdir.
    config: whose results it is to hold.
    data_fingerprint: of the data.
    stages: where trained stages are; None = in the workdir.
    adopt: takes the configuration that was there, and whether rows change.

  Raises:
    InputError: if it belongs to other data, or to another library's model.
    WriteError: if it cannot be written.
  """
  if (directory / "peer.json").exists():
    raise InputError(
      f"workdir {directory} holds the results of another library's model; use "
      "another --workdir"
    )
  mine = {"config": of_results(config), "data": data_fingerprint}
  if paths := workdir.absolute(config.data):
    mine["paths"] = paths
  if stages not in (None, directory / "checkpoints"):
    mine["stages"] = os.fspath(
      stages if "://" in os.fspath(stages) else stages.absolute()
    )
  path, results_in = directory / "config.json", directory / "summary.json"
  if not path.exists():
    if results_in.exists():
      raise InputError(
        f"workdir {directory} holds results without the configuration of a "
        "job; use another --workdir"
      )
    if not processes.is_first():
      raise InputError(
        f"workdir {directory} does not hold what process 0 wrote there; use "
        "one that all processes see"
      )
    disk.write({path: json.dumps(mine, indent=2) + "\n"})
    return
  theirs = workdir.read_json(path, config={}, data="")
  with disk.reading(path, "delete it or use another workdir"):
    there = of_results(schema.completed(theirs["config"]))
  changes = [*schema.differences(mine["config"], there, {})]
  of_data = [*changes, ("data", data_fingerprint, theirs["data"])]
  for key, new, old in of_data if theirs["data"] != data_fingerprint else ():
    if key.startswith(_OF_DATA):
      raise InputError(
        f"workdir {directory} is of other data: {key} is {old!r} there and "
        f"{new!r} here; use another --workdir or the same setting"
      )
  if not processes.is_first():  # which has written what is there
    for key, new, old in changes:
      raise InputError(
        f"{key} is {old!r} in process 0 and {new!r} here; give all processes "
        "the same"
      )
    return
  changed = any(
    not key.startswith(_SHOWN) or key == _METRICS and new[:1] != old[:1]
    for key, new, old in changes
  )
  adopt(theirs["config"], changed)
  if changed:
    results_in.unlink(missing_ok=True)  # first, for it says that all is whole
    for suffix in SUFFIXES.values():
      (directory / f"rows{suffix}.parquet").unlink(missing_ok=True)
  if theirs != mine:
    disk.write({path: json.dumps(mine, indent=2) + "\n"})


def of_results(config: ConfigDict) -> dict[str, Any]:
  """The config as JSON, without the keys on which no result depends."""
  whole = schema.canonical(config.to_dict())
  whole.pop("mesh", None)
  whole["data"].pop("stream", None)
  return whole


class Options(NamedTuple):
  """How a job runs, whatever it computes; see `run`."""

  console: rich.console.Console
  command: str
  root: epath.Path
  other_versions: bool
  interrupted: Callable[[], bool]

  def say(self, line: str) -> None:
    """Prints a line as it is."""
    self.console.print(line, markup=False, emoji=False, soft_wrap=True)

  def check(self) -> None:
    """Raises Interrupted where the job is to end."""
    if self.interrupted():
      raise Interrupted("interrupted between two stages")


def run(
  config: ConfigDict,
  directory: epath.PathLike,
  console: rich.console.Console | None = None,
  *,
  command: str = "",
  stages: epath.PathLike | None = None,
  other_versions: bool = False,
  interrupted: Callable[[], bool] = lambda: False,
) -> None:
  """Runs the main job, or what is left of it, and prints its tables.

  Args:
    config: as from `experiments.configs.base.default`; its sizes that are None
      are fitted to the data.
    directory: the job's workdir.
    console: where to print; standard output by default.
    command: how the job was launched, for its summary.
    stages: directory of trained stages that several jobs share; by default
      one of the job's own.
    other_versions: continue what other versions of libraries began.
    interrupted: whether to save and end; see `commands.noticed`.

  Raises:
    InputError: for any bad input, before training starts.
    TrainingError: if a loss is not finite, or a checkpoint cannot be written.
    Interrupted: where `interrupted` says so; the next run continues.
    WriteError: if the disk is full or read-only.
  """
  console = console or commands.Console()
  if not processes.is_first():
    console = rich.console.Console(quiet=True)
  asked = processes.any_of(interrupted)
  directory = disk.place("workdir", directory)
  root = disk.place("stages", stages or directory / "checkpoints")
  options = Options(console, command, root, other_versions, asked)
  checkpoints.check_directory(directory)
  checkpoints.check_directory(root)
  processes.together(lambda: build.check(sizes.for_any_data(config)))
  ways = {"mesh": config.mesh.to_dict(), "stream": config.data.get("stream")}
  processes.agree("mesh or data.stream", json.dumps(ways))  # in no claim
  fitted, problem, networks = processes.together(lambda: _prepare(config))
  if line := sizes.told(config, fitted):
    options.say(line)
  config = fitted
  with contextlib.ExitStack() as stack:
    _claim(config, problem, directory, root, stack)
    there = (directory / "summary.json").exists()  # as the first sees it
    if multihost_utils.broadcast_one_to_all(np.asarray(there)):
      options.say(f"{directory} is finished; reprinting its tables")
    else:
      _compute(config, problem, networks, directory, options)
    options.check()
    if processes.is_first():
      report.write_report([directory], console=console)


def _prepare(config: ConfigDict) -> tuple[ConfigDict, Problem, Networks]:
  """Reads the data and checks the config by them; writes nothing."""
  asked, (config, problem) = config, prepare(config)
  if sizes.told(asked, config):  # sizes that the data gave
    build.check(config)
  networks = networks_of(config, problem)
  check(config, problem, networks)
  return config, problem, networks


def _claim(
  config: ConfigDict, problem: Problem, directory: epath.Path,
  root: epath.Path, stack: contextlib.ExitStack,
) -> None:
  """Makes the workdir this job's and no other's until the stack unwinds."""
  digest, first = fingerprint(problem), processes.is_first()
  processes.agree("data set (fingerprint)", digest)
  processes.together(
    lambda: first and stack.enter_context(workdir.held(directory))
  )
  for turn in (True, False):  # the first makes what the others check
    processes.together(lambda turn=turn: first == turn and claim_workdir(
      directory, config, digest, root, lambda there, changed: reuse.adopt(
        directory, root, there, reuse.digests(problem), changed
      ),
    ))


def _compute(
  config: ConfigDict, problem: Problem, networks: Networks,
  directory: epath.Path, options: Options,
) -> None:
  """Trains and ranks; writes the rows and, last of all, the summary."""
  _describe(problem, options.say)
  if changed := results.changed_settings(of_results(config)).items():
    options.say(
      "settings other than the defaults: "
      + ", ".join(f"{key}={value!r}" for key, value in changed)
    )
  if learnt := information(selected(config), config):
    options.say(learnt)
  if len(config.seeds) < MIN_SEEDS:
    options.say(
      f"{few_seeds(len(config.seeds))}; --config.seeds=0,1,2 or more "
      "give a verdict"
    )
  rows, choice, closeness, cost = _train_all(
    config, problem, networks, directory, options
  )
  if not processes.is_first():
    return
  name = f"rows{SUFFIXES[config.evaluation.protocol]}.parquet"
  workdir.write_rows(directory / name, rows)
  about, (base, other) = about_data(problem), compared([*selected(config)])
  if learnt:
    about["protocol"] += f"; {learnt}"
  summary = {
    **about, "base": base, "other": other, "choice": choice,
    "closeness": closeness, "cost": cost, "command": options.command,
    "versions": workdir.provenance(),
  }
  disk.write({
    directory / "summary.json": json.dumps(summary, indent=2) + "\n"
  })


def _train_all(
  config: ConfigDict, problem: Problem, networks: Networks,
  directory: epath.Path, options: Options,
) -> tuple[pl.DataFrame, dict, list[dict[str, Any]], dict[str, Any]]:
  """(rows, choice, closeness, cost) of all methods and seeds."""
  methods = selected(config)
  found = {key: [] for key in methods}
  asked = {"pin": {**config.pin}}
  half = any(learns(METHODS[key], asked) == "half" for key in methods)
  stages = stages_of(methods)
  data = reuse.digests(problem)
  if processes.is_first():
    for line in reuse.told(options.root, reuse.identities(config, data)):
      options.say(line)
    reuse.take_logs_back(directory, options.root, config, data)
  log = logs.RunLog(directory) if processes.is_first() else logs.NoLog()
  to_come = [(stage.kind, num_steps(config, stage)) for stage in stages]
  progress = logs.Progress(
    to_come * len(config.seeds), config.validation.every,
    config.evaluation.metrics[0], options.console,
  )
  monitor = Monitor(log, progress, options.interrupted)
  store = functools.partial(
    reuse.open_checkpoints, versions=workdir.versions(), say=options.say,
    other_versions=options.other_versions,
  )
  rows, closeness, cost, seconds = [], [], {}, {}
  try:
    for seeds in reuse.seed_groups(config):
      trainer = Trainer(config, problem, networks, options.root, seeds, store)
      for stage in stages:
        trainer.train(stage, monitor)
      cost |= trainer.cost
      seconds |= trainer.cpu_seconds
      options.say(
        f"ranking for {(problem.split.test >= 0).sum():,} test users: "
        f"{', '.join(methods)}"
      )
      for seed in seeds:
        for key, method in methods.items():
          options.check()
          rows.append(method_rows(key, method, seed, problem, trainer))
          found[key].append(validated(key, seed, problem, trainer, half))
        if problem.world is not None and config.loss.name in build.PROPER:
          closeness.append(_closeness(methods, seed, problem, trainer))
  finally:
    progress.close()
    log.close()
  # Apart from the summary, for only this depends on interruptions.
  text = json.dumps(seconds, indent=2) + "\n"
  if processes.is_first():
    disk.write({directory / "cpu_seconds.json": text})
  choice = _choice(found, config.evaluation.metrics[0])
  return pl.concat(rows), choice, truth.average(closeness), cost


def _closeness(
  methods: Mapping[str, Method], seed: int, problem: Problem, trainer: Trainer
) -> pl.DataFrame:
  users = np.flatnonzero(problem.split.test >= 0)[:TRUTH_USERS]
  requests = requests_for(problem, "test", users)
  history, _ = batches.last_items(
    problem.sequences, requests.users, requests.positions, trainer.length
  )
  data = problem.split.interactions
  models = {
    key: model_log_probabilities(method, seed, problem, trainer, users)
    for key, method in methods.items()
    if not any(stage.focal for stage in method.stages)
  }
  target = data.items[data.offsets[users] + requests.positions]
  return truth.closeness(problem.world, np.asarray(history), target, models)


def _describe(problem: Problem, say: Callable[[str], None]) -> None:
  data = problem.split.interactions
  say(
    f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, "
    f"{data.num_interactions:,} interactions; fingerprint "
    f"{fingerprint(problem)}"
  )
  for title, notes in (("read", data.notes), ("split", problem.split.notes)):
    loud = {k: v for k, v in notes.items() if k in ("assumed", "warnings")}
    facts = ", ".join(f"{k} {v}" for k, v in notes.items() if k not in loud)
    say(f"{title}: {facts}")
    for key, texts in loud.items():
      for text in texts.split("; "):
        say(f"{key.removesuffix('s').upper()}: {text}")
  found = _distribution(problem)
  say(
    f"activeness: median {found['median']:g}, mean {found['mean']:.1f}, "
    f"largest {found['max']:,}, Gini {found['gini']:.2f}; the "
    f"{found['head_users']:.0%} head users have "
    f"{found['head_interactions']:.0%} of the training interactions"
  )
  for line in found["groups"]:
    say(
      f"  group {line['group']}: {line['users']:,} users with "
      f"{number_range(line['min'], line['max'])} interactions, P(d) "
      f"{problem.prior[line['group']]:.3f}"
    )


def _distribution(problem: Problem) -> dict[str, Any]:
  return activeness.describe(
    problem.split.activeness, problem.groups, problem.segments
  )


def about_data(problem: Problem) -> dict[str, Any]:
  """What the tables say of the data and their split."""
  data = problem.split.interactions
  return {
    "data": data.name,
    "fingerprint": fingerprint(problem),
    "notes": {**data.notes},
    "split_notes": {**problem.split.notes},
    "description": _distribution(problem),
    "prior": problem.prior.tolist(),
    "protocol": problem.split.protocol,
    "num_items": data.num_items,
  }
