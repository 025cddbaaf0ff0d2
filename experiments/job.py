"""The main job: data -> stages -> full ranking -> comparison.

A workdir belongs to one configuration and one data set. It holds config.json,
log.jsonl, events/, checkpoints/, rows.parquet (rows_sampled.parquet for
sampled candidates), the tables and plots/.
"""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import polars as pl
import rich.console
from etils import epath
from ml_collections import ConfigDict

from experiments import logs, report, settings, truth
from experiments.methods import METHODS, method_names, stages_of
from experiments.problem import (
  Problem,
  fingerprint,
  make_problem,
  requests_for,
)
from experiments.tables import SUFFIXES
from experiments.trainer import (
  Networks,
  Trainer,
  check_adjustment,
  check_candidates,
  check_loss,
  make_networks,
  num_steps,
)
from pin_jax import activeness, evaluation
from pin_jax.types import InputError

TRUTH_USERS = 2000  # events at which the simulator's distributions are taken
# What these minimise makes the softmax of the logits an estimate of P(y|x).
PROPER = ("softmax", "sampled_softmax")
_TYPES = {  # of what a ranker returns
  "rank": np.float64,
  "candidates": np.int32,
  "rank_unmasked": np.float64,
  "candidates_unmasked": np.int32,
  "score": np.float32,
  "negative_scores": np.float32,
}


def method_rows(
  name: str, seed: int, problem: Problem, trainer: Trainer
) -> pl.DataFrame:
  """Ranks the test targets with a method's models; one row a user."""
  users = np.flatnonzero(problem.split.test >= 0)
  columns = {}
  for serve, chosen in _by_model(METHODS[name].serve, problem, users):
    ranks = trainer.ranker(serve[1] is not None)(
      trainer.weights(seed, *serve), problem.sequences,
      requests_for(problem, "test", users[chosen]),
    )
    for key, values in ranks._asdict().items():
      shape = len(users), *values.shape[1:]
      columns.setdefault(key, np.zeros(shape, values.dtype))[chosen] = values
  data = problem.split.interactions
  target = data.items[data.offsets[users] + problem.split.test[users]]
  return pl.DataFrame({
    "model": [METHODS[name].title] * len(users),
    "seed": np.full(len(users), seed, np.int32),
    "user": pl.Series(data.user_ids[users].tolist()),
    "group": problem.groups[users].astype(np.int32),
    "segment": problem.segments[users].astype(np.int32),
    "activeness": problem.split.activeness[users].astype(np.int32),
    "target": pl.Series(data.item_ids[target - 1].tolist()),
    **{key: values.astype(_TYPES[key]) for key, values in columns.items()},
  })


def _by_model(serve: tuple, problem: Problem, users: np.ndarray) -> list:
  """(serve entry, mask over users), each model once."""
  of_user = problem.segments[users]
  return [
    (entry, np.isin(of_user, [s for s, e in enumerate(serve) if e == entry]))
    for entry in dict.fromkeys(serve)
  ]


def model_log_probabilities(
  name: str, seed: int, problem: Problem, trainer: Trainer, users: np.ndarray
) -> np.ndarray:
  """log P(y|x) of a method's models at users' test events; [n, V]."""
  out = np.zeros((len(users), problem.split.interactions.num_items), np.float32)
  for serve, chosen in _by_model(METHODS[name].serve, problem, users):
    compute = evaluation.make_log_probabilities(
      trainer.model(serve[1] is not None),
      num_items=problem.split.interactions.num_items,
      length=trainer.length,
    )
    out[chosen] = compute(
      trainer.weights(seed, *serve), problem.sequences,
      requests_for(problem, "test", users[chosen]),
    )
  return out


def claim_workdir(
  workdir: epath.Path, config: ConfigDict, data_fingerprint: str
) -> None:
  """Makes the workdir this job's, or checks that it is.

  Raises:
    InputError: if it belongs to another configuration or data set.
  """
  mine = {"config": config.to_dict(), "data": data_fingerprint}
  del mine["config"]["mesh"]  # results do not depend on it
  mine = json.loads(json.dumps(mine))
  path = workdir / "config.json"
  if not path.exists():
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=2) + "\n")
    return
  theirs = settings.read_json(path)
  for key, new, old in settings.differences(mine, theirs):
    raise InputError(
      f"workdir {workdir} belongs to another job: {key} is {old!r} there and "
      f"{new!r} here; use another --workdir or the same setting"
    )


def run(
  config: ConfigDict,
  workdir: epath.PathLike,
  console: rich.console.Console | None = None,
) -> pl.DataFrame:
  """Runs the main job, or what is left of it, and prints its tables.

  Args:
    config: as from `experiments.configs.base.default`.
    workdir: directory of the job.
    console: where to print; standard output by default.

  Returns:
    The comparison table.

  Raises:
    InputError: for any bad input, before training starts.
    TrainingError: if a loss is not finite.
  """
  console = console or rich.console.Console(highlight=False, soft_wrap=True)
  workdir = epath.Path(workdir)
  settings.check(config)
  problem = make_problem(config)
  networks = make_networks(config, problem.split.interactions.num_items)
  check_adjustment(config, problem, networks)
  check_loss(config, problem)
  check_candidates(config, problem)
  claim_workdir(workdir, config, fingerprint(problem))
  if (workdir / "summary.json").exists():
    console.print(f"{workdir} is finished; reprinting its tables")
    return report.write_report(workdir, console=console)
  _describe(problem, console)
  rows, closeness, cost = _train_all(
    config, problem, networks, workdir, console
  )
  name = f"rows{SUFFIXES[config.evaluation.protocol]}.parquet"
  with (workdir / name).open("wb") as file:
    rows.write_parquet(file)
  summary = {**_summary(config, problem, closeness), "cost": cost}
  temporary = workdir / "summary.json.tmp"
  temporary.write_text(json.dumps(summary, indent=2) + "\n")
  temporary.rename(workdir / "summary.json")
  return report.write_report(workdir, console=console)


def _train_all(
  config: ConfigDict,
  problem: Problem,
  networks: Networks,
  workdir: epath.Path,
  console: rich.console.Console,
) -> tuple[pl.DataFrame, list[dict[str, Any]], dict[str, Any]]:
  names = method_names(config.methods, config.pin.weighting)
  stages = stages_of(names)
  total = sum(num_steps(config, s) for s in stages) * len(config.seeds)
  log = logs.RunLog(workdir)
  progress = logs.JobProgress(total, console)
  rows, closeness, cost = [], [], {}
  try:
    for first in range(0, len(config.seeds), config.num_seeds):
      seeds = tuple(config.seeds[first : first + config.num_seeds])
      trainer = Trainer(
        config, problem, networks, workdir, seeds, log, progress
      )
      for stage in stages:
        trainer.train(stage)
      cost |= trainer.cost
      for seed in seeds:
        for name in names:
          rows.append(method_rows(name, seed, problem, trainer))
        if problem.world is not None and config.loss.name in PROPER:
          closeness.append(_closeness(names, seed, problem, trainer))
  finally:
    log.close()
    progress.close()
  return pl.concat(rows), truth.average(closeness), cost


def _closeness(
  names: tuple[str, ...], seed: int, problem: Problem, trainer: Trainer
) -> pl.DataFrame:
  users = np.flatnonzero(problem.split.test >= 0)[:TRUTH_USERS]
  requests = requests_for(problem, "test", users)
  history = evaluation.read_windows(
    problem.sequences, jnp.asarray(requests.users),
    jnp.asarray(requests.positions), trainer.length,
  )
  data = problem.split.interactions
  models = {
    METHODS[name].title: model_log_probabilities(
      name, seed, problem, trainer, users
    )
    for name in names
  }
  target = data.items[data.offsets[users] + requests.positions]
  return truth.closeness(problem.world, np.asarray(history), target, models)


def _describe(problem: Problem, console: rich.console.Console) -> None:
  data = problem.split.interactions
  console.print(
    f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, "
    f"{data.num_interactions:,} interactions; fingerprint "
    f"{fingerprint(problem)}"
  )
  for title, notes in (("read", data.notes), ("split", problem.split.notes)):
    facts = ", ".join(f"{key} {value}" for key, value in notes.items())
    console.print(f"{title}: {facts}")
  prior = " ".join(f"{p:.3f}" for p in problem.prior)
  console.print(f"activeness groups 0..{len(problem.prior) - 1}: P(d) {prior}")


def _summary(
  config: ConfigDict, problem: Problem, closeness: list[dict[str, Any]]
) -> dict[str, Any]:
  """What the tables need besides the rows."""
  data = problem.split.interactions
  names = method_names(config.methods, config.pin.weighting)
  base, other = (METHODS[names[i]].title for i in (0, -1))
  return {
    "data": data.name,
    "fingerprint": fingerprint(problem),
    "notes": {**data.notes},
    "split_notes": {**problem.split.notes},
    "description": activeness.describe(
      problem.split.activeness, problem.groups, problem.segments
    ),
    "prior": problem.prior.tolist(),
    "base": base,
    "other": other,
    "protocol": problem.split.protocol,
    "num_items": data.num_items,
    "closeness": closeness,
  }
