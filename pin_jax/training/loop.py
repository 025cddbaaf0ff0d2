"""The one loop of both stages: train, validate, select, checkpoint, resume.

    for event in run(step, state, operands, plan, evaluate):
      print(event)
    best = event.best  # a `Result` comes last
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pin_jax import disk
from pin_jax.scale import streaming
from pin_jax.training.checkpoints import Checkpoints
from pin_jax.training.steps import (
  SKIPPED,
  Operands,
  Step,
  TrainState,
  all_finite,
  copied,
)
from pin_jax.types import InputError, Interrupted, PyTree, TrainingError

_REMEDY = (
  "lower the learning rate or the clipping norm, or skip such steps; the same "
  "run with JAX_DEBUG_NANS=True stops at that step"
)


class Plan(NamedTuple):
  """How a run is trained, or N runs at once.

  Attributes:
    num_steps: steps of a run.
    evaluate_every: steps between validations (and checkpoints).
    select: names of the validation values, higher is better, that select the
      params: one, or where `stacked` one for each slot. With none nothing is
      validated, and the last params are kept.
    dispatch: steps a dispatch, a divisor of `evaluate_every`.
    patience: stop after so many validations without improvement; 0 = never.
    stacked: params lead with [S]; each slot is selected by itself.
    evaluate_first: validate before step 0 too, so that the start can be best.
    names: [N], the runs' names in errors.
  """

  num_steps: int
  evaluate_every: int
  select: tuple[str, ...] = ()
  dispatch: int = 10
  patience: int = 0
  stacked: bool = False
  evaluate_first: bool = False
  names: tuple[str, ...] = ("run",)


class Started(NamedTuple):
  """Run k goes on after `step`, from a checkpoint; -1 = from nothing."""

  run: int
  step: int


class Steps(NamedTuple):
  """Run k has made a dispatch of steps.

  Attributes:
    run: k.
    start: the first of them.
    logs: of the steps, [count, ...] each.
  """

  run: int
  start: int
  logs: dict[str, np.ndarray]


class Validation(NamedTuple):
  """The validation values of run k after `step` steps, by name."""

  run: int
  step: int
  values: Mapping[str, float]


class Result(NamedTuple):
  """What run k has come to.

  Attributes:
    best: params at the best validated step (each slot's own where stacked).
    best_steps: that step, a list of length 1 or S.
    best_values: its validation value.
    last_step: steps trained.
    cpu_seconds: processor time of all launches, validation included; what runs
      at once take together is shared out evenly among those not yet stopped.
    run: k.
  """

  best: PyTree
  best_steps: list[int]
  best_values: list[float]
  last_step: int
  cpu_seconds: float
  run: int = 0


class Progress(NamedTuple):
  """Host state of a run, saved with every checkpoint."""

  step: int
  values: list[float]  # the best of every slot
  steps: list[int]  # when they were
  stale: int  # validations since any slot has improved
  cpu_seconds: float


def run(
  step: Step,
  state: TrainState,
  operands: Operands,
  plan: Plan,
  evaluate: Callable[[int, PyTree], Mapping[str, float]] | None = None,
  *,
  checkpoints: Checkpoints | None = None,
  interrupted: Callable[[], bool] = lambda: False,
  stream: Callable[[int, int], streaming.Streamed] | None = None,
) -> Iterator[Started | Steps | Validation | Result]:
  """Runs steps, validates, keeps the best params, checkpoints, resumes.

  `dispatch` steps run in one compiled scan; the next is queued before the
  logs of the last are read. N runs advance together and are selected and
  stopped each by itself: one that has stopped is computed on, for the others'
  sake, but neither logged nor validated any more.

  Args:
    step: the pure step, with N > 1 names that of `many`.
    state: the state before step 0; donated. Its leaves lead with [N] where
      N > 1.
    operands: what the step reads.
    plan: how long, how often, what selects.
    evaluate: (run k, its params) -> validation values by name.
    checkpoints: where to save and resume, all runs as one; None = nowhere.
    interrupted: whether to save and end, asked before every dispatch.
    stream: (first step, count) -> their batches, where they come from disk.

  Yields:
    Of every run: `Started`; `Steps` after each dispatch; `Validation`, before
    its checkpoint is saved; `Result`, at the end.

  Raises:
    TrainingError: if a loss or a parameter is not finite, if most steps were
      skipped, or if a save fails.
    Interrupted: where `interrupted` says so, once all is saved.
    InputError: if `dispatch` does not divide `evaluate_every`, or for a
      checkpoint that cannot be continued.
  """
  if plan.dispatch < 1 or plan.evaluate_every % plan.dispatch:
    raise InputError(
      f"dispatch={plan.dispatch} does not divide evaluate_every="
      f"{plan.evaluate_every}; give a divisor of at least 1"
    )
  advance, runs = compile_steps(step), _Runs(plan, state, checkpoints)
  state = runs.restore(state)
  for k, one in enumerate(runs.progress):
    yield Started(k, one.step if runs.resumed else -1)
  if plan.evaluate_first and not runs.progress[0].values:
    yield from runs.validate(0, state, evaluate)
  elif not runs.resumed:
    runs.save(0, state)
  pending, t = None, max(one.step for one in runs.progress)
  while t < plan.num_steps and runs.live():
    if interrupted():
      yield from runs.read(pending)
      runs.leave(t, state)
    until = plan.evaluate_every - t % plan.evaluate_every
    count = min(plan.dispatch, until, plan.num_steps - t)
    if stream is not None:
      operands = operands._replace(streamed=stream(t, count))
    state, logs = advance(state, operands, t, count)
    yield from runs.read(pending)  # the last ones, while these are computed
    pending, t = (t, logs), t + count
    if count == until or t == plan.num_steps:
      yield from runs.read(pending)
      pending = None
      yield from runs.validate(t, state, evaluate)
  if checkpoints:
    checkpoints.wait()
  yield from results(runs.best, _to_record(runs.progress))


def compile_steps(step: Step) -> Callable[..., tuple[TrainState, PyTree]]:
  """(state, operands, first step, count) -> (state, logs), in one dispatch.

  The state is donated; every `count` has a program of its own.
  """

  def run(
    state: TrainState, operands: Operands, start: int, count: int
  ) -> tuple[TrainState, PyTree]:
    body = lambda s, t: step(s, operands, t)
    return jax.lax.scan(body, state, start + jnp.arange(count))

  return jax.jit(run, static_argnums=3, donate_argnums=0)


def results(
  best: PyTree, record: dict[str, Any], where: epath.PathLike = "a checkpoint"
) -> list[Result]:
  """What `run` ended with, from its last checkpoint at `where`.

  Raises:
    InputError: if the record is not what `run` saves.
  """
  progress = _from_record(record, where)
  return [
    Result(
      _of_run(best, k, len(progress)), one.steps, one.values, one.step,
      one.cpu_seconds, k,
    )
    for k, one in enumerate(progress)
  ]


class _Runs:
  """How far N runs are, and their best params so far."""

  def __init__(
    self, plan: Plan, state: TrainState, checkpoints: Checkpoints | None
  ) -> None:
    self._plan, self._checkpoints = plan, checkpoints
    self.best = copied(_served(state))
    self.progress = [Progress(0, [], [], 0, 0.0)] * len(plan.names)
    self.resumed = False
    self._skipped: list[list[int]] = [[] for _ in plan.names]
    self._clock = time.process_time()

  def live(self) -> list[int]:
    """The runs that patience has not stopped."""
    return [
      k for k, one in enumerate(self.progress)
      if not 0 < self._plan.patience <= one.stale
    ]

  def restore(self, state: TrainState) -> TrainState:
    """The state of the newest checkpoint, or the given one."""
    saved = self._checkpoints and self._checkpoints.restore((state, self.best))
    if not saved:
      return state
    (state, self.best), record = saved
    self.progress = _from_record(record, self._checkpoints.directory)
    self.resumed = True
    return state

  def save(self, t: int, state: TrainState) -> None:
    """Queues a checkpoint."""
    if self._checkpoints:
      record = _to_record(self.progress)
      self._checkpoints.save(t, (state, self.best), record)

  def leave(self, t: int, state: TrainState) -> None:
    """Saves and raises Interrupted."""
    for k in self.live():
      self.progress[k] = self.progress[k]._replace(step=t)
    self.save(t, state)
    if self._checkpoints:
      self._checkpoints.wait()
    raise Interrupted(f"{self._plan.names[0]}: interrupted after step {t}")

  def read(self, pending: tuple[int, PyTree] | None) -> Iterator[Steps]:
    """Waits for a dispatch, (first step, logs); checks its losses."""
    if pending is None:
      return
    start, logs = pending[0], jax.device_get(pending[1])
    own = {k: logs for k in self.live()}
    if len(self.progress) > 1:
      own = {k: jax.tree.map(lambda x, k=k: x[:, k], logs) for k in own}
    for k, log in own.items():
      loss, skipped = log["loss"], log.get(SKIPPED, np.zeros(len(log["loss"])))
      bad = np.argwhere(~np.isfinite(loss[skipped == 0]))
      if len(bad):
        first, *group = bad[0].tolist()
        step = start + np.flatnonzero(skipped == 0)[first]
        raise TrainingError(
          f"{self._plan.names[k]}: the loss of group {group} is "
          f"{loss[skipped == 0][tuple(bad[0])]} at step {step}; {_REMEDY}"
        )
      self._skipped[k] += skipped.tolist()
    for k, log in own.items():
      yield Steps(k, start, log)

  def validate(
    self, t: int, state: TrainState, evaluate: Callable[..., Any] | None
  ) -> Iterator[Validation]:
    """Validates and selects after t steps; saves."""
    live, served = self.live(), _served(state)
    slots = len(self._plan.select) or 1
    better = np.zeros((len(self.progress), slots), bool)
    for k in live:
      self._check(k, t, state)
    for k in live:
      values = [float(t)]  # the last is best
      if self._plan.select:
        found = evaluate(k, self._own(served, k))
        yield Validation(k, t, found)
        values = [found[name] for name in self._plan.select]
      self.progress[k], better[k] = _compare(self.progress[k], t, values)
    now = time.process_time()
    share, self._clock = (now - self._clock) / len(live), now
    for k in live:
      total = self.progress[k].cpu_seconds + share
      self.progress[k] = self.progress[k]._replace(cpu_seconds=total)
    self.best = _select(better, served, self.best, self._plan.stacked)
    self.save(t, state)

  def _check(self, k: int, t: int, state: TrainState) -> None:
    """Raises TrainingError where run k cannot go on after t steps."""
    if not all_finite(self._own(state.params, k)):
      raise TrainingError(
        f"{self._plan.names[k]}: a parameter is not finite after step {t - 1}; "
        f"{_REMEDY}"
      )
    skipped = self._skipped[k]
    if 2 * sum(skipped) > len(skipped):
      raise TrainingError(
        f"{self._plan.names[k]}: {sum(skipped):.0f} of the {len(skipped)} "
        f"steps before step {t} were not finite and skipped; lower the "
        "learning rate or the clipping norm"
      )
    skipped.clear()

  def _own(self, tree: PyTree, k: int) -> PyTree:
    """The part of run k."""
    return _of_run(tree, k, len(self.progress))


def _served(state: TrainState) -> PyTree:
  return state.params if state.average is None else state.average


def _to_record(progress: list[Progress]) -> dict[str, Any]:
  """What a checkpoint holds of N runs; of one, its own record."""
  records = [one._asdict() for one in progress]
  return {"runs": records} if len(records) > 1 else records[0]


def _from_record(
  record: dict[str, Any], where: epath.PathLike
) -> list[Progress]:
  with disk.reading(where, "delete it to train the run again"):
    return [Progress(**one) for one in record.get("runs", [record])]


def _compare(
  old: Progress, t: int, values: list[float]
) -> tuple[Progress, np.ndarray]:
  """(progress after a validation, which of its slots improved)."""
  values = np.asarray(values, np.float64)
  before = np.asarray(old.values or [-math.inf] * len(values))
  better = values > before
  steps = old.steps or [0] * len(values)
  return Progress(
    t,
    np.where(better, values, before).tolist(),
    [t if b else s for b, s in zip(better, steps, strict=True)],
    0 if better.any() else old.stale + 1,
    old.cpu_seconds,
  ), better


def _of_run(tree: PyTree, k: int, count: int) -> PyTree:
  """The part of run k in a tree of `count` runs."""
  return tree if count == 1 else _take(tree, k)


@jax.jit
def _take(tree: PyTree, k: int) -> PyTree:
  return jax.tree.map(lambda x: x[k], tree)


def _select(
  better: np.ndarray, new: PyTree, old: PyTree, stacked: bool
) -> PyTree:
  """The new leaves where better [N, S] (not stacked: [N, 1]), else the old."""
  better = better if stacked else better[:, 0]
  if len(better) == 1:
    better = better[0]
  if not better.ndim:
    return copied(new) if better else old
  return _pick(jnp.asarray(better), new, old)


@jax.jit
def _pick(better: jax.Array, new: PyTree, old: PyTree) -> PyTree:
  def pick(new: jax.Array, old: jax.Array) -> jax.Array:
    chosen = better.reshape(better.shape + (1,) * (new.ndim - better.ndim))
    return jnp.where(chosen, new, old)

  return jax.tree.map(pick, new, old)
