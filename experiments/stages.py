"""Trains the stages of a job."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from experiments import logs, schema
from experiments.build import (
  Networks,
  Ranker,
  make_adjustment,
  make_loss,
  make_optimizer,
  make_ranker,
  make_sampled_loss,
  stage_adjustment,
  windows_of_step,
)
from experiments.methods import Method, Stage, selected, stages_of
from experiments.problem import (
  SEGMENTS,
  Problem,
  fitted_users,
  in_segment,
  learnt_split,
  requests_for,
)
from pin_jax import aggregation
from pin_jax.data import batches, splits
from pin_jax.data.stored import Stored
from pin_jax.evaluation import metrics, ranking
from pin_jax.models import plugins
from pin_jax.models.conditioned import conditioned
from pin_jax.scale import sharding, streaming
from pin_jax.training import (
  checkpoints,
  loop,
  propensity,
)
from pin_jax.training.loop import FitResult
from pin_jax.training.loop import results as fit_results
from pin_jax.training.optimizers import Optimizer
from pin_jax.training.steps import (
  SKIPPED,
  Adjustment,
  Operands,
  Step,
  TrainState,
  backbone_keys,
  backbone_step,
  init_state,
  join_runs,
  many,
  plugin_step,
  skipping,
)
from pin_jax.types import (
  InputError,
  PyTree,
  Requests,
  TrainingError,
)

CUTOFF = 10
_PARTS = ("part0", "part1")  # what a plugin serves where segments are random
_USERS_READ = 4096  # users whose histories are read at once


class Run(NamedTuple):
  """A stage ready for training; what the seeds differ in is by seed.

  Attributes:
    step: of one seed.
    windows: (key, t, targets, pool) -> which windows the step reads; None
      where it cannot read them from disk.
    pool: whom to draw from.
    start: seed -> state before step 0.
    frozen: seed -> params that stay as they are.
    evaluator: seed -> (params -> validation values by name).
    criteria: names of those that select, the others are only logged; none
      where the last step is kept.
  """

  step: Step
  windows: Callable[..., batches.Windows] | None
  pool: batches.Pool
  start: Callable[[int], TrainState]
  frozen: Callable[[int], PyTree]
  evaluator: Callable[[int], Callable[[PyTree], dict[str, float]]]
  criteria: tuple[str, ...]


class Trainer:
  """Trains the stages of one seed, or of several seeds at once.

  Each stage is trained once and resumes where it can. Several seeds share the
  steps' dispatches and the checkpoints; each has its own selection, its own
  patience and its own logs, as if it were alone.
  """

  def __init__(
    self,
    config: ConfigDict,
    problem: Problem,
    networks: Networks,
    workdir: epath.Path,
    seeds: tuple[int, ...],
    log: logs.RunLog | logs.NoLog | None = None,
    progress: logs.JobProgress | None = None,
    *,
    store: Callable[..., checkpoints.Checkpoints] = checkpoints.Checkpoints,
    interrupted: Callable[[], bool] = lambda: False,
  ) -> None:
    """Prepares what the stages share.

    Args:
      config: the whole configuration.
      problem: its data.
      networks: its backbone and plugin.
      workdir: where checkpoints go.
      seeds: what to train at once.
      log: takes every step and validation, a `RunLog` or `NoLog`; None where
        nothing is trained.
      progress: counts the steps; None likewise.
      store: opens the checkpoints of a directory.
      interrupted: see `fit_many`.
    """
    self._store, self._interrupted = store, interrupted
    self._layout = networks.layout
    self._config, self._networks = config, networks
    self._problem = problem
    self.sequences = None if self.streams else sharding.spread_flat(
      problem.sequences, self._layout
    )
    self._workdir, self._seeds = workdir, seeds
    self._log, self._progress = log, progress
    self.cost: dict[str, dict[str, Any]] = {}
    self.cpu_seconds: dict[str, float] = {}
    self.length = config.backbone.length
    self._rankers: dict[str | None, Ranker] = {}
    self.trained: dict[str, dict[int, FitResult]] = {}

  @property
  def tables(self) -> tuple[str, ...]:
    """Of the checkpoints, whose rows may be padded for another mesh."""
    one = len(self._seeds) == 1  # leaves of several lead with their number
    return self._networks.backbone.tables if one else ()

  @property
  def remembered(self) -> splits.Split:
    """The split whose training prefix the memory holds when test users come."""
    return learnt_split(self._problem, "all" if self._config.refit else "none")

  @property
  def streams(self) -> bool:
    """Whether the interactions stay on disk."""
    return isinstance(self._problem.split.interactions, Stored)

  def ranker(self, plugin: str | None) -> Ranker:
    """The ranking function, with a kind of plugin or none; compiled once."""
    if plugin not in self._rankers:
      rank = make_ranker(
        self._config, self._problem, self.model(plugin), self._layout
      )
      if self.streams:
        rank = streaming.make_ranker(
          rank, self._problem.sequences, layout=self._layout,
          users=_USERS_READ,
        )
      self._rankers[plugin] = rank
    return self._rankers[plugin]

  def model(self, plugin: str | None) -> ranking.Model:
    """The functions of what is evaluated."""
    chosen = plugin and self._networks.plugins[plugin]
    return ranking.Model(self._networks.backbone, chosen)

  def weights(
    self, seed: int, backbone: str, plugin: Stage | None
  ) -> ranking.Weights:
    """The trained parameters of a seed's two stages."""
    if plugin is None:
      return ranking.Weights(self._best(backbone, seed), None)
    return ranking.Weights(
      self._best(backbone, seed), self._best(plugin.name, seed),
      self._evidence(plugin.plugin, refit=bool(self._config.refit)),
    )

  def _evidence(
    self, plugin: str, *, refit: bool = False
  ) -> plugins.Evidence | None:
    """What a kind of plugin reads besides, None where that is nothing."""
    mixes = self._networks.plugins[plugin].mix is not None
    return self._networks.evidence(refit) if mixes else None

  def _best(self, stage: str, seed: int) -> PyTree:
    return self.trained[stage][seed].best

  def train(self, stage: Stage) -> None:
    """Trains a stage, or reads its finished checkpoint."""
    steps = num_steps(self._config, stage)
    seeds = self._seeds
    runs = [self.run_name(stage, seed) for seed in seeds]
    store = self._store(
      self._workdir / "checkpoints" / self.directory(stage), tables=self.tables
    )
    run = self.prepare(stage)
    operands = self.operands(stage, run)
    evaluators = [run.evaluator(seed) for seed in seeds]
    counted = [0] * len(seeds)
    skips: list[np.ndarray] = [np.zeros(0)] * len(seeds)  # since a validation
    validations: list[dict[str, float]] = [{} for _ in seeds]

    def evaluate(k: int, params: PyTree) -> np.ndarray:
      validations[k] = evaluators[k](params)
      return np.array([validations[k][name] for name in run.criteria])

    def advance(k: int, count: int, resumed: bool = False) -> None:
      counted[k] += count
      if resumed:
        self._progress.skip(count)
      else:
        self._progress.advance(runs[k], count)

    def on_resume(k: int, t: int) -> None:
      self._log.rewind(runs[k], t)
      advance(k, max(t, 0), resumed=True)
      if k == 0 and t < steps:
        self._progress.begin(runs[0])

    def on_steps(k: int, start: int, log: dict[str, np.ndarray]) -> None:
      self._log.steps(runs[k], start, log)
      advance(k, len(log["loss"]))
      skips[k] = np.append(skips[k], log.get(SKIPPED, ()))

    def on_evaluation(k: int, t: int, values: np.ndarray) -> None:
      self._log.evaluation(runs[k], t, validations[k])
      since, skips[k] = skips[k], np.zeros(0)
      if 2 * since.sum() > len(since):
        raise TrainingError(
          f"{runs[k]}: {since.sum():.0f} of the {len(since)} steps before step "
          f"{t} were not finite and skipped; lower optimizer.learning_rate or "
          "optimizer.clip"
        )

    with contextlib.closing(store):
      results = loop.fit_many(
        self.step(run), self.start(run), operands,
        names=runs,
        num_steps=steps,
        evaluate=evaluate if run.criteria else None,
        evaluate_every=self._config.validation.every,
        dispatch=self._config.dispatch,
        patience=self._config.validation.patience,
        stacked=stage.kind == "plugin",
        evaluate_first=bool(
          run.criteria and (stage.kind == "plugin" or stage.start)
        ),
        checkpoints=store,
        on_steps=on_steps,
        on_evaluation=on_evaluation,
        on_resume=on_resume,
        interrupted=self._interrupted,
        stream=self._stream(stage, run, steps) if self.streams else None,
      )
    self.trained[stage.name] = dict(zip(seeds, results, strict=True))
    for k, result in enumerate(results):
      self.cost[runs[k]] = {
        "steps": result.last_step,
        "best_steps": result.best_steps,
        "validation": result.best_values if run.criteria else [],
        **self._log.skipped(runs[k]),
      }
      self.cpu_seconds[runs[k]] = round(result.cpu_seconds, 1)
      if counted[k] < steps:
        advance(k, steps - counted[k], resumed=True)

  def read(self, stage: Stage) -> None:
    """Reads the selected parameters of a finished stage; writes nothing.

    Raises:
      InputError: if its newest checkpoint is absent or damaged, or belongs to
        another job.
    """
    path = self._workdir / "checkpoints" / self.directory(stage)
    if not path.exists():
      raise InputError(
        f"{path} is absent; run the job again in another workdir"
      )
    run = self.prepare(stage)
    state = jax.eval_shape(lambda: self.start(run))
    best = state.params if state.average is None else state.average
    with contextlib.closing(self._store(path, tables=self.tables)) as store:
      (_, best), record = store.newest((state, best))
    self.trained[stage.name] = dict(
      zip(self._seeds, fit_results(best, record, path), strict=True)
    )

  def prepare(self, stage: Stage) -> Run:
    """What a stage is trained with; the stages it builds on are trained."""
    build = {
      "backbone": self.backbone_run,
      "plugin": self._plugin_run,
      "classifier": self._classifier_run,
    }[stage.kind]
    return build(stage, num_steps(self._config, stage))

  def step(self, run: Run) -> Step:
    """The step of all seeds at once, as `non_finite` says."""
    step = run.step
    if self._config.non_finite == "skip":
      step = sharding.kept(skipping(step), self._layout)
    return step if len(self._seeds) == 1 else many(step)

  def start(self, run: Run) -> TrainState:
    """The state of all seeds before the first step."""
    return join_runs([run.start(seed) for seed in self._seeds])

  def operands(self, stage: Stage, run: Run) -> Operands:
    """What the steps of all seeds read."""
    seeds = self._seeds
    keys = lambda: join_runs([
      _stage_key(seed, stage.name) for seed in seeds
    ])
    return Operands(
      sharding.built(keys, self._layout)(),
      self.sequences, None if self.streams else run.pool,
      join_runs([run.frozen(seed) for seed in seeds]),
      self._evidence(stage.plugin) if stage.kind == "plugin" else None,
    )

  def _stream(
    self, stage: Stage, run: Run, steps: int
  ) -> streaming.Stream:
    """The batches of a stage, of the one seed that is trained at a time."""
    sequences = self._problem.sequences
    return streaming.Stream(
      sequences, run.windows, (run.pool,),
      key=_stage_key(self._seeds[0], stage.name), num_steps=steps,
      dispatch=self._config.dispatch, length=self.length, layout=self._layout,
    )

  def run_name(self, stage: Stage, seed: int) -> str:
    """The stage's name in logs; led by the seed where there are several."""
    several = len(self._config.seeds) > 1
    return f"seed{seed}/{stage.name}" if several else stage.name

  def directory(self, stage: Stage) -> str:
    """The name of the checkpoints' directory, one for all seeds at once."""
    first, *others = (self.run_name(stage, seed) for seed in self._seeds)
    if others:
      first = f"seeds{'-'.join(map(str, self._seeds))}/{stage.name}"
    return first.replace("/", "-")

  def _optimizer(self, stage: Stage, steps: int) -> Optimizer:
    return make_optimizer(
      self._config, stage.kind, steps, self._networks.backbone
    )

  def _pool(
    self, split: splits.Split, groups: np.ndarray, num_groups: int
  ) -> batches.Pool:
    pool = batches.make_pool(
      batches.training_targets(split), groups, num_groups=num_groups,
      length=self.length,
    )
    if self.streams:
      return pool
    flat = sharding.spread_flat(pool, self._layout)
    return flat._replace(
      group_starts=sharding.put_replicated(pool.group_starts, self._layout)
    )

  def _draw(self, stage: Stage, batch_size: int) -> batches.Draw:
    config = self._config
    return batches.Draw(batch_size, self.length, *{
      "joint": (config.joint.draw, config.joint.mean),
      "groups": (config.pin.draw, config.pin.mean),
      "uniform": ("users", "users"),
      "plugin": (config.pin.plugin_draw, "interactions"),
    }[stage.sampling])

  def backbone_run(self, stage: Stage, steps: int) -> Run:
    """What stage 1 is fitted with."""
    config, problem = self._config, self._problem
    split = learnt_split(problem, stage.learns)
    shares = target_shares(problem, config.groups.num_groups, split)
    groups, pools = drawn_from(config, problem, stage)
    if stage.grouped:
      adjustment = stage_adjustment(
        config, stage.rule, problem.prior, shares
      )
    else:
      adjustment = Adjustment(aggregation.backdoor(np.ones(1)))
    draw = self._draw(stage, windows_of_step(config, grouped=stage.grouped))
    importance = None
    if stage.exact:
      importance = propensity.fitted_importance(
        self._networks.backbone, clip=config.pin.clip_importance
      )
    loss = make_loss(config, split, groups, num_groups=pools, draw=draw.draw)
    if stage.focal:
      loss = loss._replace(focusing=config.loss.focusing)
    optimizer = self._optimizer(stage, steps)
    step = backbone_step(
      self._networks.backbone, adjustment, optimizer, draw,
      loss=loss, importance=importance, layout=self._layout,
    )
    backbone = self._networks.backbone
    if stage.reads_activeness:
      backbone = conditioned(backbone)
    init = sharding.built(backbone.init, self._layout)

    def start(seed: int) -> TrainState:
      params = (
        self._best(stage.start, seed) if stage.start
        else init(_stage_key(seed, "init"))
      )
      return init_state(params, optimizer, adjustment, layout=self._layout)

    def frozen(seed: int) -> PyTree:
      if not stage.exact:
        return None
      return {
        "backbone": self._best("base", seed),
        "classifier": self._best(stage.exact, seed),
        "shares": sharding.put_replicated(np.asarray(propensity.event_shares(
          problem.split, groups, num_groups=pools, length=self.length,
          draw=draw.draw, mean=draw.mean,
        ), np.float32), self._layout),
      }

    rank = self.ranker(None)
    requests = self._validation(stage.users, stage.learns == "half")
    segments = problem.segments[requests.users]

    def evaluate(params: PyTree) -> dict[str, float]:
      weights = ranking.Weights(params, None)
      ranks = rank(weights, self.sequences, requests)
      values = metrics.ndcg(ranks.rank, CUTOFF)
      of_segments = _means(values, segments, SEGMENTS)
      chosen = {stage.users: float(values.mean())}
      return {**of_segments, **chosen} if stage.users == "all" else chosen

    windows = lambda key, t, pool: draw.windows(backbone_keys(key, t)[0], pool)
    return Run(
      step, windows, self._pool(split, groups, pools), start, frozen,
      lambda seed: evaluate, () if stage.learns == "all" else (stage.users,),
    )

  def _plugin_run(self, stage: Stage, steps: int) -> Run:
    config, problem = self._config, self._problem
    plugin = self._networks.plugins[stage.plugin]
    segments, count = assigned(problem, stage)
    optimizer = self._optimizer(stage, steps)
    draw = self._draw(stage, config.batch_size // count)
    held_out = draw.draw == "validation"
    learnt = segments
    if held_out:
      learnt = np.where(fitted_users(len(segments)), segments, -1)
    step = plugin_step(
      self._networks.backbone, plugin, optimizer, draw,
      loss=make_loss(
        config, problem.split, learnt, num_groups=count, draw=draw.draw
      ),
      layout=self._layout,
    )
    init = jax.jit(plugins.init_stacked, static_argnums=(0, 2))

    def start(seed: int) -> TrainState:
      key = _stage_key(seed, stage.name + "/init")
      params = init(plugin, key, count)
      return init_state(
        params, optimizer, stacked=True, layout=self._layout
      )

    requests = self._validation("all", held_out)
    pool = None
    if held_out:
      pool = batches.make_held_out(
        problem.split.validation, learnt, num_groups=count
      )
      if not self.streams:
        pool = sharding.put_replicated(pool, self._layout)
    requests = requests._replace(
      segments=segments[requests.users].astype(np.int32)
    )
    rank = self.ranker(stage.plugin)

    actual = problem.segments[requests.users]
    parts = SEGMENTS if stage.assign == "activeness" else _PARTS

    def evaluate(seed: int, params: PyTree) -> dict[str, float]:
      weights = ranking.Weights(
        self._best(stage.start, seed), params, self._evidence(stage.plugin)
      )
      ranks = rank(weights, self.sequences, requests)
      values = metrics.ndcg(ranks.rank, CUTOFF)
      named = _means(values, actual, SEGMENTS) | {"all": float(values.mean())}
      if stage.assign == "random":
        named |= _means(values, requests.segments, _PARTS)
      return named

    windows = lambda key, t, pool: draw.windows(
      jax.random.fold_in(key, t), pool
    )
    return Run(
      step, windows, pool or self._pool(problem.split, segments, count), start,
      lambda seed: self._best(stage.start, seed),
      lambda seed: functools.partial(evaluate, seed),
      parts if count > 1 else ("all",),
    )

  def _classifier_run(self, stage: Stage, steps: int) -> Run:
    config, problem = self._config, self._problem
    backbone = self._networks.backbone
    optimizer = self._optimizer(stage, steps)
    draw = self._draw(stage, config.batch_size)
    step = propensity.classifier_step(backbone, optimizer, draw)
    groups = sharding.put_replicated(
      problem.groups.astype(np.int32), self._layout
    )
    pool = self._pool(problem.split, np.zeros_like(problem.groups), 1)

    def start(seed: int) -> TrainState:
      params = propensity.init_classifier(
        _stage_key(seed, stage.name + "/init"), config.backbone.width,
        config.groups.num_groups,
      )
      return init_state(params, optimizer, layout=self._layout)

    def frozen(seed: int) -> PyTree:
      return {"backbone": self._best(stage.start, seed), "groups": groups}

    def evaluator(seed: int) -> Callable[[PyTree], dict[str, float]]:
      held_out = draw._replace(batch_size=4 * config.batch_size).batch(
        _stage_key(seed, stage.name + "/validation"), self.sequences, pool
      )
      held_out = jax.tree.map(lambda x: x[0], held_out)
      fit = jax.jit(functools.partial(
        propensity.classifier_fit, backbone, mean=draw.mean
      ))
      params_of_backbone = self._best(stage.start, seed)
      return lambda params: {
        name: float(value) for name, value in fit(
          params_of_backbone, params, held_out, groups
        )._asdict().items()
      }

    return Run(
      sharding.kept(step, self._layout), None, pool, start, frozen, evaluator,
      ("log_likelihood",),
    )

  def _validation(self, users: str, half: bool) -> Requests:
    """Requests to rank the targets that select; not those learnt from."""
    problem = self._problem
    chosen = np.flatnonzero(
      in_segment(problem, users) & (problem.split.validation >= 0)
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
    if half:
      chosen = chosen[~fitted_users(len(problem.segments))[chosen]]
    return requests_for(problem, "validation", chosen)


def assigned(problem: Problem, stage: Stage) -> tuple[np.ndarray, int]:
  """([U] segment whose plugin of a stage serves each user, how many there are).
  """
  if stage.plugin != "own":
    return np.zeros_like(problem.segments), 1
  if stage.assign == "random":
    rng = np.random.default_rng(0)
    return rng.permutation(problem.segments), len(SEGMENTS)
  return problem.segments, len(SEGMENTS)


def routed(
  problem: Problem, method: Method, stage: Stage
) -> tuple[np.ndarray, int]:
  """`assigned`, the other way round where the method swaps segments."""
  segments, count = assigned(problem, stage)
  return (count - 1 - segments if method.swapped else segments), count


def _means(
  values: np.ndarray, segments: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
  """Mean of each segment's users, 0 where it has none."""
  sizes = np.bincount(segments, minlength=len(names))
  sums = np.bincount(segments, values, len(names))
  return dict(zip(names, sums / np.maximum(sizes, 1), strict=True))


def _stage_key(seed: int, name: str) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def target_shares(
  problem: Problem, num_groups: int, split: splits.Split
) -> np.ndarray:
  """[G] share of a split's training targets in each group."""
  targets = batches.training_targets(split)
  counts = np.bincount(problem.groups, targets, num_groups)
  return counts / counts.sum()


def check_loss(config: ConfigDict, problem: Problem) -> None:
  """Raises InputError where the catalogue does not allow `loss`."""
  if config.loss.name != "softmax":
    make_sampled_loss(config.loss, problem.split.interactions.num_items)


def drawn_from(
  config: ConfigDict, problem: Problem, stage: Stage
) -> tuple[np.ndarray, int]:
  """([U] group that a stage 1 draws each user for, -1 for none; how many)."""
  if stage.grouped:
    return problem.groups, config.groups.num_groups
  return np.where(in_segment(problem, stage.users), 0, -1), 1


def check_pools(config: ConfigDict, problem: Problem) -> None:
  """Raises InputError where a stage has a part without training targets."""
  held_out = config.pin.plugin_draw == "validation"
  for stage in stages_of(selected(config)):
    if stage.kind == "plugin" and not (
      held_out and stage.sampling == "plugin"
    ):
      segments, count = assigned(problem, stage)
      if not np.bincount(segments[problem.targets > 0], minlength=count).all():
        raise InputError(
          f"config key groups.head_share={config.groups.head_share}: a segment "
          "has no user with two training interactions, so that its plugin has "
          "nothing to learn; give a smaller share"
        )
    if stage.kind == "backbone":
      groups, count = drawn_from(config, problem, stage)
      split = learnt_split(problem, stage.learns)
      batches.make_pool(
        batches.training_targets(split), groups, num_groups=count,
        length=config.backbone.length,
      )


def check_candidates(config: ConfigDict, problem: Problem) -> None:
  """Raises InputError where a user leaves too few items to sample."""
  if config.evaluation.protocol == "full":
    return
  for part in ("validation", "test"):
    users = np.flatnonzero(getattr(problem.split, part) >= 0)
    with schema.section("evaluation.negatives"):
      ranking.draw_unseen(
        problem.split.interactions, requests_for(problem, part, users),
        count=config.evaluation.negatives, seed=config.evaluation.seed,
      )


def check_adjustment(
  config: ConfigDict, problem: Problem, networks: Networks
) -> None:
  """Raises InputError where PIN's settings are contradictory."""
  shares = target_shares(problem, config.groups.num_groups, problem.split)
  made = make_adjustment(config.pin, problem.prior, shares)
  params = jax.eval_shape(networks.backbone.init, jax.random.key(0))
  try:
    aggregation.aggregate(
      lambda *_: None, made.rules, path=made.path, blocks=made.blocks
    ).init(params)
  except ValueError as error:
    raise InputError(
      f"config keys pin.path={config.pin.path!r}, pin.weighting="
      f"{config.pin.weighting!r}, pin.blocks={tuple(config.pin.blocks)}: "
      f"{error}"
    ) from error


def num_steps(config: ConfigDict, stage: Stage) -> int:
  """Steps of a stage."""
  first, second = config.backbone_steps, config.plugin_steps
  return {
    "backbone": first,
    "plugin": second,
    "both": first + second,
    "none": 0,
    "refit": config.refit,
    "classifier": config.classifier_steps,
  }[stage.phase]
