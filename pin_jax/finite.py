"""Losses and parameters that are not finite: found, skipped, reproduced.

A gradient that is not finite makes the parameters not finite in the same step
and the loss in the next. The loop therefore looks at the losses, which it reads
anyway, and at the parameters before each validation, and `locate` then finds
the step at fault by taking the steps again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.types import PyTree, TrainingError

SKIPPED = "skipped"
_REMEDY = (
  "lower optimizer.learning_rate or optimizer.clip, or set non_finite='skip'"
)


class NonFinite(TrainingError):
  """A loss or a parameter that is not finite, seen after `step` steps."""

  def __init__(self, message: str, run: int, step: int) -> None:
    super().__init__(message)
    self.run, self.step = run, step


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
  """Whether every floating-point number of a tree is finite."""
  leaves = [
    jnp.isfinite(x).all() for x in jax.tree.leaves(tree)
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
  ]
  return jnp.stack([jnp.array(True), *leaves]).all()


def skipping(step: Callable[..., tuple]) -> Callable[..., tuple]:
  """A step that leaves the state as it is where its result is not finite.

  Loss, gradient and parameters count; the log's 'skipped' is 1 for a step
  without effect, else 0. Nothing leaves the device.

  Args:
    step: (state, operands, t) -> (state, log).

  Returns:
    The step, of the same form.
  """

  def skip(state: PyTree, operands: PyTree, t: jax.Array) -> tuple:
    new, log = step(state, operands, t)
    good = all_finite((new.params, log["loss"]))
    kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
    return kept, {**log, SKIPPED: 1 - good.astype(jnp.int32)}

  return skip


def check_losses(
  log: dict[str, np.ndarray], name: str, run: int, start: int
) -> None:
  """Raises NonFinite at the first loss [count, ...] that is not finite."""
  loss = log["loss"]
  skipped = log.get(SKIPPED, np.zeros(len(loss)))
  skipped = np.reshape(skipped, skipped.shape + (1,) * (loss.ndim - 1))
  bad = np.argwhere(~(np.isfinite(loss) | (skipped > 0)))
  if len(bad):
    offset, group = bad[0][0], bad[0][1:].tolist()
    raise NonFinite(
      f"{name}: the loss of group {group} is {loss[tuple(bad[0])]} at step "
      f"{start + offset}; {_REMEDY}", run, int(start + offset) + 1,
    )


def check_params(params: PyTree, name: str, run: int, step: int) -> None:
  """Raises NonFinite if a parameter is not finite after `step` steps."""
  if not all_finite(params):
    raise NonFinite(
      f"{name}: a parameter is not finite after step {step - 1}; {_REMEDY}",
      run, step,
    )


class Culprit(NamedTuple):
  """The step at fault: its number, the state before it and its log."""

  step: int
  state: PyTree
  log: dict[str, Any]


def locate(
  step: Callable[..., tuple],
  state: PyTree,
  operands_at: Callable[[int], PyTree],
  *,
  start: int,
  stop: int,
  of_run: Callable[[PyTree], PyTree],
) -> Culprit | None:
  """Takes the steps start .. stop - 1 again until one is not finite.

  Args:
    step: (state, operands, t) -> (state, log).
    state: before the step `start`; kept.
    operands_at: t -> what step t reads.
    start: the first step.
    stop: one past the last.
    of_run: cuts the run at fault out of a state's params or a log.

  Returns:
    The first step whose loss or resulting parameters are not finite; None
    where all are.
  """
  run = jax.jit(step)
  for t in range(start, stop):
    after, log = run(state, operands_at(t), jnp.int32(t))
    if not all_finite(of_run((after.params, log["loss"]))):
      return Culprit(t, state, jax.device_get(log))
    state = after
  return None
