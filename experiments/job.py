"""The main job: data -> stages -> full ranking -> comparison.

A workdir belongs to one configuration and one data set. It holds config.json,
log.jsonl, events/, checkpoints/, rows.parquet, the tables and plots/.
"""

import hashlib
import json
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import rich.console
from etils import epath
from ml_collections import ConfigDict

from experiments import logs, report, settings, truth
from experiments.methods import METHODS, Stage, stages_of
from pin_jax import (
  activeness,
  aggregation,
  batches,
  checkpoints,
  evaluation,
  metrics,
  plugins,
  propensity,
  splits,
  training,
)
from pin_jax.backbones.sasrec import sasrec
from pin_jax.types import Backbone, InputError, Plugin, PyTree

BACKBONES = {"sasrec": sasrec}
PLUGINS = {"bottleneck": plugins.bottleneck}
SEGMENTS = ("tail", "head")
CUTOFF = 10
TRUTH_USERS = 2000


class Problem(NamedTuple):
  """The data of a job, ready for training; arrays are [U] unless said.

  Attributes:
    split: interactions with their training, validation and test parts.
    targets: number of training targets.
    groups: activeness group.
    segments: 0 tail, 1 head.
    prior: [G], P(d).
    sequences: interactions on the device.
    world: the simulator's exact model, or None.
  """

  split: splits.Split
  targets: np.ndarray
  groups: np.ndarray
  segments: np.ndarray
  prior: np.ndarray
  sequences: batches.Sequences
  world: Any


class Networks(NamedTuple):
  """The functions that a job trains."""

  backbone: Backbone
  plugin: Plugin


def make_problem(config: ConfigDict) -> Problem:
  """Loads the data, splits it and derives groups, segments and the prior."""
  interactions, world = settings.load_data(config.data)
  if config.split.protocol == "leave_one_out":
    split = splits.leave_one_out(interactions)
  else:
    split = splits.temporal_fractions(
      interactions,
      validation=config.split.validation,
      test=config.split.test,
    )
  for name in ("validation", "test"):
    if not (getattr(split, name) >= 0).any():
      raise InputError(
        f"no user has a {name} target; raise split.{name} or give more data"
      )
  rule = config.groups
  groups = activeness.assign_groups(
    split.activeness,
    num_groups=rule.num_groups,
    rule=rule.rule,
    thresholds=tuple(rule.thresholds) or None,
    head_share=rule.head_share,
  )
  targets = batches.training_targets(split)
  prior = activeness.prior(
    config.prior.kind, groups, targets, rule.num_groups,
    tuple(config.prior.get("values")) or None,
  )
  segments = activeness.assign_segments(
    split.activeness, head_share=rule.head_share
  )
  sequences = batches.make_sequences(split)
  return Problem(split, targets, groups, segments, prior, sequences, world)


def make_networks(config: ConfigDict, num_items: int) -> Networks:
  """Builds the backbone and the plugin that the config names."""
  options = config.backbone.to_dict()
  backbone = BACKBONES[options.pop("name")](num_items, **options)
  options = config.plugin.to_dict()
  plugin = PLUGINS[options.pop("name")](config.backbone.width, **options)
  return Networks(backbone, plugin)


def requests_for(problem: Problem, part: str, users: np.ndarray) -> (
  evaluation.Requests
):
  """Requests to rank the `part` ('validation' or 'test') targets of users."""
  positions = getattr(problem.split, part)
  return evaluation.Requests(
    users.astype(np.int32), positions[users].astype(np.int32),
    problem.segments[users].astype(np.int32),
  )


class Trainer:
  """Trains the stages of one seed; each once, resuming where it can."""

  def __init__(
    self,
    config: ConfigDict,
    problem: Problem,
    networks: Networks,
    workdir: epath.Path,
    seed: int,
    log: logs.RunLog,
    progress: logs.JobProgress,
  ) -> None:
    """Prepares what the stages share."""
    self._config, self._problem, self._networks = config, problem, networks
    self._workdir, self._seed = workdir, seed
    self._log, self._progress = log, progress
    self._key = jax.random.key(seed)
    self.cost: dict[str, dict[str, Any]] = {}
    self.length = config.backbone.length
    self._rankers: dict[bool, evaluation.RankFn] = {}
    self.trained: dict[str, training.FitResult] = {}

  def ranker(self, with_plugin: bool) -> evaluation.RankFn:
    """The ranking function, with or without plugins; compiled once."""
    if with_plugin not in self._rankers:
      self._rankers[with_plugin] = evaluation.make_ranker(
        self.model(with_plugin),
        num_items=self._problem.split.interactions.num_items,
        length=self._config.backbone.length,
        **self._config.evaluation,
      )
    return self._rankers[with_plugin]

  def model(self, with_plugin: bool) -> evaluation.Model:
    """The functions of what is evaluated."""
    plugin = self._networks.plugin if with_plugin else None
    return evaluation.Model(self._networks.backbone, plugin)

  def weights(
    self, backbone: str, plugin: str | None
  ) -> evaluation.Weights:
    """The trained parameters of two stages."""
    return evaluation.Weights(
      self.trained[backbone].best, plugin and self.trained[plugin].best
    )

  def train(self, stage: Stage) -> None:
    """Trains a stage, or reads its finished checkpoint."""
    steps = num_steps(self._config, stage)
    run = self.run_name(stage)
    store = checkpoints.Checkpoints(
      self._workdir / "checkpoints" / run.replace("/", "-")
    )
    build = {
      "backbone": self._backbone_run,
      "plugin": self._plugin_run,
      "classifier": self._classifier_run,
    }[stage.kind]
    step, state, operands, evaluate, names = build(stage, steps)
    counted = 0

    def advance(count: int, resumed: bool = False) -> None:
      nonlocal counted
      counted += count
      if resumed:
        self._progress.skip(count)
      else:
        self._progress.advance(run, count)

    def on_resume(t: int) -> None:
      self._log.rewind(run, t)
      advance(t, resumed=True)

    def on_steps(start: int, log: dict[str, np.ndarray]) -> None:
      self._log.steps(run, start, log)
      advance(len(log["loss"]))

    def on_evaluation(t: int, values: np.ndarray) -> None:
      self._log.evaluation(run, t, dict(zip(names, values, strict=True)))

    self.trained[stage.name] = training.fit(
      step, state, operands,
      name=run,
      num_steps=steps,
      evaluate=evaluate,
      evaluate_every=self._config.validation.every,
      dispatch=self._config.dispatch,
      patience=self._config.validation.patience,
      stacked=stage.kind == "plugin",
      evaluate_first=stage.kind == "plugin" or stage.start is not None,
      checkpoints=store,
      on_steps=on_steps,
      on_evaluation=on_evaluation,
      on_resume=on_resume,
    )
    store.close()
    result = self.trained[stage.name]
    self.cost[run] = {
      "steps": result.last_step,
      "best_steps": result.best_steps,
      "validation": result.best_values,
      "cpu_seconds": round(result.cpu_seconds, 1),
    }
    if counted < steps:
      advance(steps - counted, resumed=True)

  def run_name(self, stage: Stage) -> str:
    """The stage's name in logs; led by the seed where there are several."""
    several = len(self._config.seeds) > 1
    return f"seed{self._seed}/{stage.name}" if several else stage.name

  def _stage_key(self, name: str) -> jax.Array:
    return jax.random.fold_in(self._key, zlib.crc32(name.encode()))

  def _optimizer(self, steps: int, prefix: str = "") -> tuple:
    options = self._config.optimizer.to_dict()
    options.pop("average")
    rates = {
      kind: options.pop(f"{kind}learning_rate")
      for kind in ("plugin_", "classifier_", "")
    }
    return training.make_optimizer(
      steps, learning_rate=rates[prefix], **options
    )

  def _pool(self, groups: np.ndarray, num_groups: int) -> batches.Pool:
    return batches.make_pool(
      self._problem.targets, groups, num_groups=num_groups,
      length=self._config.backbone.length,
    )

  def _sampling(self, stage: Stage) -> tuple[str, str]:
    config = self._config
    return {
      "joint": (config.joint.draw, config.joint.mean),
      "groups": (config.pin.draw, config.pin.mean),
      "uniform": ("users", "users"),
      "plugin": (config.pin.plugin_draw, config.pin.plugin_mean),
    }[stage.sampling]

  def _backbone_run(self, stage: Stage, steps: int) -> tuple:
    config, problem = self._config, self._problem
    num_groups = config.groups.num_groups
    groups, prior = problem.groups, problem.prior
    if not stage.grouped:
      groups = np.where(_in_segment(problem, stage.users), 0, -1)
      prior = np.ones(1)
    rows = config.batch_size // num_groups
    weighting = aggregation.backdoor(prior)
    optimizer, schedule = self._optimizer(steps)
    draw, mean = self._sampling(stage)
    importance, frozen = None, None
    if stage.exact:
      importance = propensity.fitted_importance(
        self._networks.backbone, clip=config.pin.clip_importance
      )
      shares = np.bincount(problem.groups, problem.targets, num_groups)
      frozen = {
        "backbone": self.trained["base"].best,
        "classifier": self.trained[stage.exact].best,
        "shares": jnp.asarray(shares / shares.sum(), jnp.float32),
      }
    step = training.backbone_step(
      self._networks.backbone, weighting, optimizer, schedule,
      batch_size=rows if stage.grouped else rows * num_groups,
      length=config.backbone.length, draw=draw, mean=mean,
      path=config.pin.path if stage.grouped else "sequential",
      average=config.optimizer.average, importance=importance,
    )
    params = (
      self.trained[stage.start].best if stage.start
      else jax.jit(self._networks.backbone.init)(self._stage_key("init"))
    )
    state = training.init_state(
      params, optimizer, weighting, average=config.optimizer.average > 0
    )
    operands = training.Operands(
      self._stage_key(stage.name), problem.sequences,
      self._pool(groups, len(prior)), frozen,
    )
    rank, requests = self.ranker(False), self._validation(stage.users)

    def evaluate(params: PyTree) -> np.ndarray:
      weights = evaluation.Weights(params, None)
      ranks = rank(weights, problem.sequences, requests)
      return metrics.ndcg(ranks.rank, CUTOFF).mean()[None]

    return step, state, operands, evaluate, (stage.users,)

  def _plugin_run(self, stage: Stage, steps: int) -> tuple:
    config, problem = self._config, self._problem
    frozen = self.trained[stage.start].best
    optimizer, schedule = self._optimizer(steps, "plugin_")
    draw, mean = self._sampling(stage)
    step = training.plugin_step(
      *self._networks, optimizer, schedule,
      batch_size=config.batch_size // len(SEGMENTS),
      length=config.backbone.length, draw=draw, mean=mean,
    )
    init = jax.jit(plugins.init_stacked, static_argnums=(0, 2))
    params = init(
      self._networks.plugin, self._stage_key(stage.name + "/init"),
      len(SEGMENTS),
    )
    state = training.init_state(params, optimizer, stacked=True)
    operands = training.Operands(
      self._stage_key(stage.name), problem.sequences,
      self._pool(problem.segments, len(SEGMENTS)), frozen,
    )
    rank, requests = self.ranker(True), self._validation("all")

    def evaluate(params: PyTree) -> np.ndarray:
      weights = evaluation.Weights(frozen, params)
      ranks = rank(weights, problem.sequences, requests)
      values = metrics.ndcg(ranks.rank, CUTOFF)
      sizes = np.bincount(requests.segments, minlength=len(SEGMENTS))
      sums = np.bincount(requests.segments, values, len(SEGMENTS))
      return sums / np.maximum(sizes, 1)

    return step, state, operands, evaluate, SEGMENTS

  def _classifier_run(self, stage: Stage, steps: int) -> tuple:
    config, problem = self._config, self._problem
    backbone, length = self._networks.backbone, config.backbone.length
    optimizer, schedule = self._optimizer(steps, "classifier_")
    step = propensity.classifier_step(
      backbone, optimizer, schedule, batch_size=config.batch_size,
      length=length,
    )
    params = propensity.init_classifier(
      self._stage_key(stage.name + "/init"), config.backbone.width,
      config.groups.num_groups,
    )
    frozen = {
      "backbone": self.trained[stage.start].best,
      "groups": jnp.asarray(problem.groups, jnp.int32),
    }
    pool = self._pool(np.zeros_like(problem.groups), 1)
    operands = training.Operands(
      self._stage_key(stage.name), problem.sequences, pool, frozen
    )
    held_out = batches.draw_batch(
      self._stage_key(stage.name + "/validation"), problem.sequences, pool,
      batch_size=4 * config.batch_size, length=length, draw="interactions",
    )
    held_out = jax.tree.map(lambda x: x[0], held_out)
    loss = jax.jit(
      lambda params: propensity.classifier_loss(
        backbone, frozen["backbone"], params, held_out, frozen["groups"]
      )
    )

    def evaluate(params: PyTree) -> np.ndarray:
      return -np.asarray(loss(params))[None]

    state = training.init_state(params, optimizer)
    return step, state, operands, evaluate, ("log_likelihood",)

  def _validation(self, users: str) -> evaluation.Requests:
    problem = self._problem
    chosen = np.flatnonzero(
      _in_segment(problem, users) & (problem.split.validation >= 0)
    )
    if not len(chosen):
      raise InputError(
        f"no {users} user has a validation target; change split.validation "
        "or groups.head_share"
      )
    limit = self._config.validation.users
    if 0 < limit < len(chosen):
      rng = np.random.default_rng(0)
      chosen = np.sort(rng.choice(chosen, limit, replace=False))
    return requests_for(problem, "validation", chosen)


def num_steps(config: ConfigDict, stage: Stage) -> int:
  """Steps of a stage."""
  first, second = config.backbone_steps, config.plugin_steps
  return {
    "backbone": first,
    "plugin": second,
    "both": first + second,
    "classifier": config.classifier_steps,
  }[stage.phase]


def _in_segment(problem: Problem, users: str) -> np.ndarray:
  if users == "all":
    return np.ones(len(problem.segments), bool)
  return problem.segments == SEGMENTS.index(users)


def method_rows(
  name: str, seed: int, problem: Problem, trainer: Trainer
) -> pl.DataFrame:
  """Ranks the test targets with a method's models; one row a user."""
  users = np.flatnonzero(problem.split.test >= 0)
  columns = np.zeros((4, len(users)))
  for serve, chosen in _by_model(METHODS[name].serve, problem, users):
    ranks = trainer.ranker(serve[1] is not None)(
      trainer.weights(*serve), problem.sequences,
      requests_for(problem, "test", users[chosen]),
    )
    columns[:, chosen] = np.stack(ranks)
  data = problem.split.interactions
  target = data.items[data.offsets[users] + problem.split.test[users]]
  rank, candidates, rank_unmasked, candidates_unmasked = columns
  return pl.DataFrame({
    "model": [METHODS[name].title] * len(users),
    "seed": np.full(len(users), seed, np.int32),
    "user": pl.Series(data.user_ids[users].tolist()),
    "group": problem.groups[users].astype(np.int32),
    "segment": problem.segments[users].astype(np.int32),
    "activeness": problem.split.activeness[users].astype(np.int32),
    "target": pl.Series(data.item_ids[target - 1].tolist()),
    "rank": rank,
    "candidates": candidates.astype(np.int32),
    "rank_unmasked": rank_unmasked,
    "candidates_unmasked": candidates_unmasked.astype(np.int32),
  })


def _by_model(serve: tuple, problem: Problem, users: np.ndarray) -> list:
  """(serve entry, mask over users), each model once."""
  of_user = problem.segments[users]
  return [
    (entry, np.isin(of_user, [s for s, e in enumerate(serve) if e == entry]))
    for entry in dict.fromkeys(serve)
  ]


def model_log_probabilities(
  name: str, problem: Problem, trainer: Trainer, users: np.ndarray
) -> np.ndarray:
  """log P(y|x) of a method's models at users' test events; [n, V]."""
  out = np.zeros((len(users), problem.split.interactions.num_items), np.float32)
  for serve, chosen in _by_model(METHODS[name].serve, problem, users):
    compute = evaluation.make_log_probabilities(
      trainer.model(serve[1] is not None), length=trainer.length
    )
    out[chosen] = compute(
      trainer.weights(*serve), problem.sequences,
      requests_for(problem, "test", users[chosen]),
    )
  return out


def fingerprint(problem: Problem) -> str:
  """Digest of the data and its split, for every result."""
  digest = hashlib.sha256(problem.split.interactions.fingerprint.encode())
  for array in (problem.split.train_end, problem.groups, problem.segments):
    digest.update(np.ascontiguousarray(array, np.int64).tobytes())
  return digest.hexdigest()[:16]


def claim_workdir(
  workdir: epath.Path, config: ConfigDict, data_fingerprint: str
) -> None:
  """Makes the workdir this job's, or checks that it is.

  Raises:
    InputError: if it belongs to another configuration or data set.
  """
  mine = {"config": config.to_dict(), "data": data_fingerprint}
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
  claim_workdir(workdir, config, fingerprint(problem))
  if (workdir / "summary.json").exists():
    console.print(f"{workdir} is finished; reprinting its tables")
    return report.write_report(workdir, console=console)
  _describe(problem, console)
  rows, closeness, cost = _train_all(
    config, problem, networks, workdir, console
  )
  with (workdir / "rows.parquet").open("wb") as file:
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
  stages = stages_of(tuple(config.methods))
  total = sum(num_steps(config, s) for s in stages) * len(config.seeds)
  log = logs.RunLog(workdir)
  progress = logs.JobProgress(total, console)
  rows, closeness, cost = [], [], {}
  try:
    for seed in config.seeds:
      trainer = Trainer(
        config, problem, networks, workdir, seed, log, progress
      )
      for stage in stages:
        trainer.train(stage)
      cost |= trainer.cost
      for name in config.methods:
        rows.append(method_rows(name, seed, problem, trainer))
      if problem.world is not None:
        closeness.append(_closeness(config, problem, trainer))
  finally:
    log.close()
    progress.close()
  return pl.concat(rows), truth.average(closeness), cost


def _closeness(
  config: ConfigDict, problem: Problem, trainer: Trainer
) -> pl.DataFrame:
  users = np.flatnonzero(problem.split.test >= 0)[:TRUTH_USERS]
  requests = requests_for(problem, "test", users)
  history = evaluation.read_windows(
    problem.sequences, jnp.asarray(requests.users),
    jnp.asarray(requests.positions), trainer.length,
  )
  data = problem.split.interactions
  models = {
    METHODS[name].title: model_log_probabilities(name, problem, trainer, users)
    for name in config.methods
  }
  target = data.items[data.offsets[users] + requests.positions]
  return truth.closeness(
    problem.world, np.asarray(history), target, models
  )


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
  base, *_, other = (METHODS[name].title for name in config.methods)
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
