"""Trains the stages of a job."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
from etils import epath
from ml_collections import ConfigDict

from experiments import logs, processes, reuse, schema
from experiments.build import (
  Networks,
  Ranker,
  check_adjustments,
  make_adjustment,
  make_loss,
  make_optimizer,
  make_ranker,
  num_steps,
  sampling,
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
from pin_jax.models.backbones import conditioned
from pin_jax.models.memory import Memory
from pin_jax.scale import sharding, streaming
from pin_jax.training import loop, propensity, steps
from pin_jax.training.checkpoints import Checkpoints
from pin_jax.training.steps import Adjustment, Operands, TrainState
from pin_jax.types import InputError, PyTree, Requests

_PARTS = ("part0", "part1")  # what a plugin serves where segments are random
_USERS_READ = 4096  # users whose histories are read at once


class Run(NamedTuple):
  """A stage ready for training, of all seeds at once.

  Attributes:
    step: as `non_finite` says.
    windows: (key, t, pool) -> which windows the step reads; None where it
      cannot read them from disk.
    pool: whom to draw from.
    start: () -> state before step 0.
    frozen: () -> params that stay as they are.
    evaluate: (seed, params) -> validation values by name.
    select: names of those that select, the others are only logged; none where
      the last step is kept.
  """

  step: steps.Step
  windows: Callable[..., batches.Windows] | None
  pool: batches.Pool | batches.HeldOut
  start: Callable[[], TrainState]
  frozen: Callable[[], PyTree]
  evaluate: Callable[[int, PyTree], dict[str, float]]
  select: tuple[str, ...]


class Monitor(NamedTuple):
  """Follows the training of stages.

  Attributes:
    log: takes every step and validation.
    progress: tells of them.
    interrupted: whether to save and end.
  """

  log: logs.RunLog | logs.NoLog
  progress: logs.Progress
  interrupted: Callable[[], bool] = lambda: False

  def take(self, name: str, kind: str, steps: int, event: tuple) -> None:
    """Logs and tells of an event of a run; see `logs.Progress.take`."""
    self.log.take(name, event)
    self.progress.take(name, kind, steps, event)


class Trainer:
  """Trains the stages of one seed, or of several seeds at once.

  Each stage is trained once and resumes where it can. Several seeds share the
  steps' dispatches and the checkpoints; each has its own selection, its own
  patience and its own logs, as if it were alone. The directories of stages are
  in `root`, see `experiments.reuse`; `store` opens the checkpoints there.

  Attributes:
    trained: stage -> seed -> result.
    cost: run -> steps, best steps and validation.
    cpu_seconds: run -> processor time.
    length: L.
    streams: whether they are.
  """

  def __init__(
    self,
    config: ConfigDict,
    problem: Problem,
    networks: Networks,
    root: epath.Path,
    seeds: tuple[int, ...],
    store: Callable[..., Checkpoints] = reuse.open_checkpoints,
  ) -> None:
    """Prepares what the stages share."""
    self._config, self._problem, self._networks = config, problem, networks
    self._layout, self._store = networks.layout, store
    self._root, self._seeds = root, seeds
    self._identities: dict[str, reuse.Identity] = {}
    self.streams = isinstance(problem.split.interactions, Stored)
    self.length = config.backbone.length
    self.trained: dict[str, dict[int, loop.Result]] = {}
    self.cost: dict[str, dict[str, Any]] = {}
    self.cpu_seconds: dict[str, float] = {}
    self._rankers: dict[tuple, Ranker] = {}

  @functools.cached_property
  def sequences(self) -> batches.Sequences | None:
    """The interactions on the devices; None where they stay on disk."""
    if self.streams:
      return None
    return sharding.spread_flat(self._problem.sequences, self._layout)

  @property
  def remembered(self) -> splits.Split:
    """The split whose training prefix the memory holds when test users come."""
    return learnt_split(self._problem, "all" if self._config.refit else "none")

  def ranker(
    self, plugin: str | None, reads_activeness: bool = False
  ) -> Ranker:
    """The ranking function of a `model`; compiled once."""
    kind = plugin, reads_activeness
    if kind not in self._rankers:
      rank = make_ranker(
        self._config, self._problem, self.model(*kind), self._layout
      )
      if self.streams:
        rank = streaming.make_ranker(
          rank, self._problem.sequences, layout=self._layout,
          users=_USERS_READ,
        )
      self._rankers[kind] = rank
    return self._rankers[kind]

  def model(
    self, plugin: str | None, reads_activeness: bool = False
  ) -> plugins.Model:
    """The functions of what is evaluated, with a kind of plugin or none."""
    chosen = plugin and self._networks.plugins[plugin]
    backbone = self._networks.backbone
    if reads_activeness:
      backbone = conditioned(backbone)
    return plugins.Model(backbone, chosen)

  def weights(
    self, seed: int, backbone: str, plugin: Stage | None,
    validating: bool = False,
  ) -> plugins.Weights:
    """The trained parameters of a seed's two stages, and what they read.

    While `validating` that holds no validation target.
    """
    if plugin is None:
      return plugins.Weights(self._best(backbone, seed), None)
    return plugins.Weights(
      self._best(backbone, seed), self._best(plugin.name, seed),
      self._evidence(plugin, bool(self._config.refit) and not validating),
    )

  def _evidence(self, stage: Stage, refit: bool = False) -> Memory | None:
    """What the plugins of a stage read besides, None where that is nothing."""
    mixes = self._networks.plugins[stage.plugin].mix is not None
    return self._networks.evidence(refit) if mixes else None

  def _best(self, stage: str, seed: int) -> PyTree:
    return self.trained[stage][seed].best

  @functools.cached_property
  def _digests(self) -> dict[str, str]:
    return reuse.digests(self._problem)

  def _identity(self, stage: Stage) -> reuse.Identity:
    """What determines a stage, after those that it builds on."""
    return self._identities.setdefault(stage.name, reuse.identify(
      self._config, self._digests, stage, self._seeds, self._identities
    ))

  @contextlib.contextmanager
  def _opened(self, stage: Stage) -> Iterator[Checkpoints]:
    """A stage's directory, made where it is missing, for this process alone."""
    identity, first = self._identity(stage), processes.is_first()
    path = self._root / identity.directory
    with contextlib.ExitStack() as stack:
      processes.together(
        lambda: first and stack.enter_context(reuse.held(path, identity))
      )
      yield stack.enter_context(
        contextlib.closing(self._checkpoints(path, identity))
      )

  def _checkpoints(
    self, path: epath.Path, identity: reuse.Identity
  ) -> Checkpoints:
    """Tables may be padded for another mesh; several seeds are on no mesh."""
    several = len(self._seeds) > 1
    tables = () if several else self._networks.backbone.tables
    return self._store(path, identity.about, tables)

  def train(self, stage: Stage, monitor: Monitor | None = None) -> None:
    """Trains a stage, or reads its finished checkpoint."""
    quiet = rich.console.Console(quiet=True)
    monitor = monitor or Monitor(logs.NoLog(), logs.Progress((), 1, "", quiet))
    config, seeds, run = self._config, self._seeds, self.prepare(stage)
    plan = loop.Plan(
      num_steps(config, stage), config.validation.every, run.select,
      dispatch=config.dispatch, patience=config.validation.patience,
      stacked=stage.kind == "plugin",
      evaluate_first=bool(run.select and stage.start),
      names=tuple(reuse.run_name(config, stage.name, seed) for seed in seeds),
    )
    self.trained[stage.name] = {}
    with self._opened(stage) as checkpoints:
      for event in loop.run(
        run.step, run.start(), self.operands(stage, run), plan,
        lambda k, params: run.evaluate(seeds[k], params),
        checkpoints=checkpoints, interrupted=monitor.interrupted,
        stream=self._stream(stage, run) if self.streams else None,
      ):
        name = plan.names[event.run]
        monitor.take(name, stage.kind, plan.num_steps, event)
        if isinstance(event, loop.Result):
          self.trained[stage.name][seeds[event.run]] = event
          self.cost[name] = {
            "steps": event.last_step,
            "best_steps": event.best_steps,
            "validation": event.best_values if run.select else [],
            **monitor.log.skipped(name),
          }
          self.cpu_seconds[name] = round(event.cpu_seconds, 1)

  def read(self, stage: Stage) -> None:
    """Reads the selected parameters of a finished stage; writes nothing.

    Raises:
      InputError: if its newest checkpoint is absent or damaged, or belongs to
        another job.
    """
    state = jax.eval_shape(self.prepare(stage).start)
    best = state.params if state.average is None else state.average
    identity, saved = self._identity(stage), None
    path = self._root / identity.directory
    if not path.exists():
      path = self._root / identity.former
    if path.exists():
      with contextlib.closing(self._checkpoints(path, identity)) as checkpoints:
        saved = checkpoints.restore((state, best), older=False)
    if not saved:
      raise InputError(
        f"{self._root / identity.directory} is absent or empty; run the job "
        "again"
      )
    found = loop.results(saved[0][1], saved[1], path)
    self.trained[stage.name] = dict(zip(self._seeds, found, strict=True))

  def prepare(self, stage: Stage) -> Run:
    """What a stage is trained with; the stages it builds on are trained."""
    return {
      "backbone": self._backbone_run,
      "plugin": self._plugin_run,
      "classifier": self._classifier_run,
    }[stage.kind](stage)

  def _step(self, step: steps.Step) -> steps.Step:
    if self._config.non_finite == "skip":
      step = sharding.kept(steps.skipping(step), self._layout)
    return step if len(self._seeds) == 1 else steps.many(step)

  def _each(self, of_seed: Callable[[int], PyTree]) -> Callable[[], PyTree]:
    """() -> what the seeds have, joined."""
    return lambda: steps.join_runs([of_seed(seed) for seed in self._seeds])

  def operands(self, stage: Stage, run: Run) -> Operands:
    """What the steps of all seeds read."""
    keys = self._each(lambda seed: _stage_key(seed, stage.name))
    return Operands(
      sharding.built(keys, self._layout)(),
      self.sequences, None if self.streams else run.pool, run.frozen(),
      self._evidence(stage) if stage.kind == "plugin" else None,
      num_steps=np.int32(num_steps(self._config, stage)),
    )

  def _stream(self, stage: Stage, run: Run) -> streaming.Stream:
    """The batches of a stage, of the one seed that is trained at a time."""
    return streaming.Stream(
      self._problem.sequences, run.windows, run.pool,
      key=_stage_key(self._seeds[0], stage.name),
      num_steps=num_steps(self._config, stage),
      dispatch=self._config.dispatch, length=self.length, layout=self._layout,
    )

  def _backbone_run(self, stage: Stage) -> Run:
    config, problem, layout = self._config, self._problem, self._layout
    split = learnt_split(problem, stage.learns)
    if stage.grouped:
      groups, count = problem.groups, config.groups.num_groups
      shares = np.bincount(groups, batches.training_targets(split), count)
      adjustment = make_adjustment(
        config.pin, problem.prior, shares / shares.sum(), stage.rule
      )
    else:
      groups, count = np.where(in_segment(problem, stage.users), 0, -1), 1
      adjustment = Adjustment(aggregation.backdoor(np.ones(1)))
    draw = self._draw(stage, windows_of_step(config, grouped=stage.grouped))
    loss = make_loss(config, split, groups, count, draw)
    if stage.focal:
      loss = loss._replace(focusing=config.loss.focusing)
    backbone = self.model(None, stage.reads_activeness).backbone
    importance = None
    if stage.exact:
      importance = propensity.fitted_importance(
        backbone, clip=config.pin.clip_importance
      )
    optimizer = self._optimizer(stage)
    step = steps.backbone_step(
      backbone, adjustment, optimizer, draw, loss=loss, importance=importance,
      layout=layout,
    )
    init = sharding.built(backbone.init, layout)

    def start(seed: int) -> TrainState:
      params = (
        self._best(stage.start, seed) if stage.start
        else init(_stage_key(seed, "init"))
      )
      return steps.init_state(params, optimizer, adjustment, layout=layout)

    def frozen(seed: int) -> PyTree:
      shares = propensity.event_shares(problem.split, groups, count, draw)
      return {
        "backbone": self._best("base", seed),
        "classifier": self._best(stage.exact, seed),
        "shares": sharding.put_replicated(shares.astype(np.float32), layout),
      }

    return Run(
      self._step(step),
      lambda key, t, pool: draw.windows(steps.backbone_keys(key, t)[0], pool),
      self._pool(split, groups, count), self._each(start),
      self._each(frozen) if stage.exact else lambda: None,
      self._evaluation(
        stage, self.validation(stage.users, stage.learns == "half"),
        (*SEGMENTS, "all") if stage.users == "all" else (stage.users,),
      ),
      () if stage.learns == "all" else (stage.users,),
    )

  def _evaluation(
    self, stage: Stage, requests: Requests, names: Sequence[str]
  ) -> Callable[[int, PyTree], dict[str, float]]:
    """(seed, params) -> the metric of segments, of all, of plugins' users."""
    metric = metrics.metric(self._config.evaluation.metrics[0])
    segments = self._problem.segments[requests.users]
    plugged = stage.kind == "plugin"
    rank = self.ranker(
      stage.plugin if plugged else None, stage.reads_activeness
    )

    def evaluate(seed: int, params: PyTree) -> dict[str, float]:
      weights = plugins.Weights(params, None)
      if plugged:
        weights = plugins.Weights(
          self._best(stage.start, seed), params, self._evidence(stage)
        )
      ranks = rank(weights, self.sequences, requests)
      values = metric(ranks.rank)
      named = _means(values, segments, SEGMENTS)
      named |= _means(values, requests.segments, _PARTS)
      named |= {"all": float(values.mean()), stage.users: float(values.mean())}
      return {name: named[name] for name in names}

    return evaluate

  def _plugin_run(self, stage: Stage) -> Run:
    config, problem, layout = self._config, self._problem, self._layout
    plugin = self._networks.plugins[stage.plugin]
    segments, count = assigned(problem, stage)
    optimizer = self._optimizer(stage)
    draw = self._draw(stage, config.batch_size // count)
    learnt = segments
    if draw.draw == "validation":
      learnt = np.where(fitted_users(len(segments)), segments, -1)
      pool = batches.make_held_out(
        problem.split.validation, learnt, num_groups=count
      )
      if not self.streams:
        pool = sharding.put_replicated(pool, layout)
    else:
      pool = self._pool(problem.split, segments, count, "groups.head_share")
    loss = make_loss(config, problem.split, learnt, count, draw)
    init = jax.jit(plugins.init_stacked, static_argnums=(0, 2))

    def start(seed: int) -> TrainState:
      params = init(plugin, _stage_key(seed, stage.name + "/init"), count)
      return steps.init_state(params, optimizer, stacked=True, layout=layout)

    step = steps.plugin_step(
      self._networks.backbone, plugin, optimizer, draw, loss=loss,
      layout=layout,
    )
    requests = self.validation("all", draw.draw == "validation")
    requests = requests._replace(
      segments=segments[requests.users].astype(np.int32)
    )
    parts = SEGMENTS if stage.assign == "activeness" else _PARTS
    return Run(
      self._step(step),
      lambda key, t, pool: draw.windows(jax.random.fold_in(key, t), pool),
      pool, self._each(start),
      self._each(lambda seed: self._best(stage.start, seed)),
      self._evaluation(
        stage, requests, tuple(dict.fromkeys((*SEGMENTS, "all", *parts)))
      ),
      parts if count > 1 else ("all",),
    )

  def _classifier_run(self, stage: Stage) -> Run:
    config, problem, layout = self._config, self._problem, self._layout
    backbone, optimizer = self._networks.backbone, self._optimizer(stage)
    draw = self._draw(stage, config.batch_size)
    step = propensity.classifier_step(backbone, optimizer, draw)
    groups = sharding.put_replicated(problem.groups.astype(np.int32), layout)
    pool = self._pool(problem.split, np.zeros_like(problem.groups), 1)

    def start(seed: int) -> TrainState:
      params = propensity.init_classifier(
        _stage_key(seed, stage.name + "/init"), config.backbone.width,
        config.groups.num_groups,
      )
      return steps.init_state(params, optimizer, layout=layout)

    @functools.cache
    def held_out(seed: int) -> batches.Batch:
      many = draw._replace(batch_size=4 * config.batch_size)
      key = _stage_key(seed, stage.name + "/validation")
      batch = many.batch(key, self.sequences, pool)
      return jax.tree.map(lambda x: x[0], batch)

    fit = jax.jit(functools.partial(
      propensity.log_likelihood, backbone, mean=draw.mean
    ))

    def evaluate(seed: int, params: PyTree) -> dict[str, float]:
      frozen = self._best(stage.start, seed)
      found = fit(frozen, params, held_out(seed), groups)
      return {"log_likelihood": float(found)}

    frozen = lambda seed: {
      "backbone": self._best(stage.start, seed), "groups": groups
    }
    return Run(
      self._step(sharding.kept(step, layout)), None, pool, self._each(start),
      self._each(frozen), evaluate, ("log_likelihood",),
    )

  def _optimizer(self, stage: Stage) -> steps.Optimizer:
    return make_optimizer(
      self._config, stage, num_steps(self._config, stage),
      self._networks.backbone,
    )

  def _draw(self, stage: Stage, batch_size: int) -> batches.Draw:
    return batches.Draw(
      batch_size, self.length, *sampling(self._config, stage)
    )

  def _pool(
    self, split: splits.Split, groups: np.ndarray, num_groups: int,
    section: str = "groups",
  ) -> batches.Pool:
    with schema.section(section):
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

  def validation(self, users: str, half: bool) -> Requests:
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
  if stage.plugin not in ("own", "gates"):
    return np.zeros_like(problem.segments), 1
  if stage.assign == "random":
    rng = np.random.default_rng(0)
    return rng.permutation(problem.segments), len(SEGMENTS)
  return problem.segments, len(SEGMENTS)


def routed(
  problem: Problem, method: Method, serve: tuple[str, str | None]
) -> tuple[Stage | None, np.ndarray, int]:
  """(plugin stage of an entry of `method.serve`, then as `assigned`).

  The other way round where the method swaps segments.
  """
  if serve[1] is None:
    return None, np.zeros_like(problem.segments), 1
  stage = method.stage(serve[1])
  segments, count = assigned(problem, stage)
  return stage, count - 1 - segments if method.swapped else segments, count


def _means(
  values: np.ndarray, segments: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
  """Mean of each segment's users, 0 where it has none."""
  sizes = np.bincount(segments, minlength=len(names))
  sums = np.bincount(segments, values, len(names))
  return dict(zip(names, sums / np.maximum(sizes, 1), strict=True))


def _stage_key(seed: int, name: str) -> jax.Array:
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def check(config: ConfigDict, problem: Problem, networks: Networks) -> None:
  """Raises InputError where the data do not allow what the config asks for.

  Every stage is prepared, and what is then there is thrown away.
  """
  data, options = problem.split.interactions, config.evaluation
  params = jax.eval_shape(networks.backbone.init, jax.random.key(0))
  check_adjustments(config, problem.prior, params)
  trainer = Trainer(
    config, problem, networks, epath.Path(), tuple(config.seeds[:1])
  )
  for stage in stages_of(selected(config)):
    trainer.prepare(stage)
  for part in ("validation", "test") if options.protocol == "sampled" else ():
    users = np.flatnonzero(getattr(problem.split, part) >= 0)
    with schema.section("evaluation.negatives"):
      ranking.draw_unseen(
        data, requests_for(problem, part, users), count=options.negatives,
        seed=options.seed,
      )
