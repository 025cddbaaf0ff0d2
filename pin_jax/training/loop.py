"""The one loop of both stages: validate, select, checkpoint, resume."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pin_jax import disk
from pin_jax.scale import streaming
from pin_jax.training import finite
from pin_jax.training.checkpoints import Checkpoints
from pin_jax.training.steps import Operands, Step, TrainState, copied
from pin_jax.types import (
  InputError,
  Interrupted,
  PyTree,
)


class FitResult(NamedTuple):
  """What `fit` returns of a run.

  Attributes:
    best: params at the best validated step (each segment's own in stage 2).
    best_steps: that step, a list of length 1 or S.
    best_values: its validation value.
    last_step: steps trained.
    cpu_seconds: processor time of all launches, validation included; what runs
      at once take together is shared out evenly among those not yet stopped.
  """

  best: PyTree
  best_steps: list[int]
  best_values: list[float]
  last_step: int
  cpu_seconds: float


class Progress(NamedTuple):
  """Host state of a run in the loop; saved with every checkpoint.

  Attributes:
    step: steps done.
    values: best validation value of every slot.
    steps: the step it was reached at.
    stale: validations since the last improvement of any slot.
    cpu_seconds: processor time so far.
  """

  step: int
  values: list[float]
  steps: list[int]
  stale: int
  cpu_seconds: float


def fit(
  step: Step,
  state: TrainState,
  operands: Operands,
  *,
  name: str,
  evaluate: Callable[[PyTree], np.ndarray],
  on_steps: Callable[[int, dict[str, np.ndarray]], None] = lambda t, log: None,
  on_evaluation: Callable[[int, np.ndarray], None] = lambda t, values: None,
  on_resume: Callable[[int], None] = lambda t: None,
  **options: Any,
) -> FitResult:
  """One run: `fit_many` with a single name, so that no axis [N] is there.

  Args:
    step: the pure step.
    state: the state before step 0; donated.
    operands: what the step reads.
    name: the run's name in errors.
    evaluate: params -> validation values.
    on_steps: called with the first step and the stacked logs of a dispatch.
    on_evaluation: called with the step and the validation values.
    on_resume: called with the step that a checkpoint continues from, with -1
      before a start from nothing.
    **options: the others of `fit_many`.

  Returns:
    The best params and how they were reached.

  Raises:
    As `fit_many`.
  """
  return fit_many(
    step, state, operands, names=(name,),
    evaluate=lambda k, params: evaluate(params),
    on_steps=lambda k, t, log: on_steps(t, log),
    on_evaluation=lambda k, t, values: on_evaluation(t, values),
    on_resume=lambda k, t: on_resume(t), **options,
  )[0]


def fit_many(
  step: Step,
  state: TrainState,
  operands: Operands,
  *,
  names: Sequence[str],
  num_steps: int,
  evaluate: Callable[[int, PyTree], np.ndarray] | None,
  evaluate_every: int,
  dispatch: int = 10,
  patience: int = 0,
  stacked: bool = False,
  evaluate_first: bool = False,
  checkpoints: Checkpoints | None = None,
  on_steps: Callable[[int, int, dict[str, np.ndarray]], None] = (
    lambda k, t, log: None
  ),
  on_evaluation: Callable[[int, int, np.ndarray], None] = (
    lambda k, t, values: None
  ),
  on_resume: Callable[[int, int], None] = lambda k, t: None,
  interrupted: Callable[[], bool] = lambda: False,
  stream: Callable[[int, int], streaming.Streamed] | None = None,
) -> list[FitResult]:
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
    names: [N], the runs' names in errors.
    num_steps: steps of a run.
    evaluate: (run k, its params) -> validation values, higher is better: [1],
      or [S] where each segment keeps its own best; None = the last is kept.
    evaluate_every: steps between validations (and checkpoints).
    dispatch: steps a dispatch, a divisor of `evaluate_every`.
    patience: stop after so many validations without improvement; 0 = never.
    stacked: params of a run lead with [S]; each slot is selected by itself.
    evaluate_first: validate before step 0 too, so that the start can be best.
    checkpoints: where to save and resume, all runs as one; None = nowhere.
    on_steps: called with the run, the first step and the stacked logs of a
      dispatch.
    on_evaluation: called with the run, the step and the validation values.
    on_resume: called with the run and the step that a checkpoint continues
      from, with -1 before a start from nothing.
    interrupted: whether to save and end, asked before every dispatch.
    stream: (first step, count) -> their batches, where they come from disk.

  Returns:
    [N] best params and how they were reached.

  Raises:
    TrainingError: if a loss or a parameter is not finite, or a save fails.
    Interrupted: where `interrupted` says so, once all is saved.
    InputError: if `dispatch` does not divide `evaluate_every`, or for a
      checkpoint that cannot be continued.
  """
  if dispatch < 1 or evaluate_every % dispatch:
    raise InputError(
      f"dispatch={dispatch} does not divide evaluate_every={evaluate_every}; "
      "give a divisor of at least 1"
    )
  run = compile_steps(step)

  def at(t: int, count: int) -> PyTree:
    if stream is None:
      return operands
    return operands._replace(streamed=stream(t, count))

  of_run = _take if len(names) > 1 else lambda tree, k: tree
  served = lambda s: s.params if s.average is None else s.average
  best = copied(served(state))
  progress = [Progress(0, [], [], 0, 0.0)] * len(names)
  saved = checkpoints and checkpoints.restore((state, best))
  if saved:
    (state, best), progress = saved[0], _from_record(
      saved[1], checkpoints.directory
    )
  for k, one in enumerate(progress):
    on_resume(k, one.step if saved else -1)
  if checkpoints and not (saved or evaluate_first):
    checkpoints.save(0, (state, best), _to_record(progress))
  clock = time.process_time()

  def live() -> list[int]:
    stopped = [0 < patience <= one.stale for one in progress]
    return [k for k in range(len(names)) if not stopped[k]]

  def validate(t: int) -> None:
    nonlocal best, clock
    better, running = {}, live()
    for k in running:
      finite.check_params(of_run(state.params, k), names[k], t)
    for k in running:
      if evaluate is None:
        values = np.array([float(t)])
      else:
        params = of_run(served(state), k)
        values = np.asarray(evaluate(k, params), np.float64).reshape(-1)
        on_evaluation(k, t, values)
      progress[k], better[k] = _compare(progress[k], t, values)
    now = time.process_time()
    share, clock = (now - clock) / len(running), now
    for k in running:
      total = progress[k].cpu_seconds + share
      progress[k] = progress[k]._replace(cpu_seconds=total)
    nothing = np.zeros(len(progress[0].values), bool)
    chosen = np.stack([better.get(k, nothing) for k in range(len(names))])
    best = _select(chosen, served(state), best, stacked)
    if checkpoints:
      checkpoints.save(t, (state, best), _to_record(progress))

  def leave(t: int) -> None:
    for k in live():
      progress[k] = progress[k]._replace(step=t)
    if checkpoints:
      checkpoints.save(t, (state, best), _to_record(progress))
      checkpoints.wait()
    raise Interrupted(f"{names[0]}: interrupted after step {t}")

  def advance(t: int) -> int:
    """Trains until the next validation; returns its step."""
    nonlocal state
    pending, stop = None, t + evaluate_every - t % evaluate_every
    stop = min(stop, num_steps)
    while t < stop:
      if interrupted():
        _deliver(pending, names, live(), on_steps)
        leave(t)
      count = min(dispatch, stop - t)
      state, logs = run(state, at(t, count), t, count)
      _deliver(pending, names, live(), on_steps)
      pending, t = (t, logs), t + count
    _deliver(pending, names, live(), on_steps)
    return t

  if evaluate_first and not progress[0].values:
    validate(0)
  t = max(one.step for one in progress)
  while t < num_steps and live():
    t = advance(t)
    validate(t)
  if checkpoints:
    checkpoints.wait()
  return results(best, _to_record(progress))


def results(
  best: PyTree, record: dict[str, Any], where: epath.PathLike = "a checkpoint"
) -> list[FitResult]:
  """What `fit_many` returned, from its last checkpoint.

  Args:
    best: the selected params, of N > 1 runs leading with [N].
    record: of that checkpoint.
    where: the checkpoints' directory, for messages.

  Raises:
    InputError: if the record is not what `fit_many` saves.
  """
  progress = _from_record(record, where)
  of_run = _take if len(progress) > 1 else lambda tree, k: tree
  return [
    FitResult(of_run(best, k), one.steps, one.values, one.step, one.cpu_seconds)
    for k, one in enumerate(progress)
  ]


def _to_record(progress: list[Progress]) -> dict[str, Any]:
  """What a checkpoint holds of N runs; of one, its own record."""
  records = [one._asdict() for one in progress]
  return {"runs": records} if len(records) > 1 else records[0]


def _from_record(
  record: dict[str, Any], where: epath.PathLike
) -> list[Progress]:
  with disk.reading(where, "delete it to train the run again"):
    found = [Progress(**one) for one in record.get("runs", [record])]
    for one in found:
      if min(one.step, one.stale, *one.steps) < 0:
        raise ValueError("it counts from below 0")
      np.array([one.values, one.steps], float) + one.cpu_seconds
  return found


def _compare(
  old: Progress, t: int, values: np.ndarray
) -> tuple[Progress, np.ndarray]:
  """(progress after a validation, which of its slots improved)."""
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


def _deliver(
  pending: tuple[int, Any] | None,
  names: Sequence[str],
  live: list[int],
  on_steps: Callable[..., None],
) -> None:
  if pending is None:
    return
  start, logs = pending[0], jax.device_get(pending[1])
  of_run = lambda k: jax.tree.map(lambda x: x[:, k], logs)
  by_run = {k: of_run(k) for k in live} if len(names) > 1 else {0: logs}
  for k, log in by_run.items():
    finite.check_losses(log, names[k], start)
  for k, log in by_run.items():
    on_steps(k, start, log)
