"""Losses and parameters that are not finite: found or skipped.

A gradient that is not finite makes the parameters not finite in the same step
and the loss in the next. The loop therefore looks at the losses, which it reads
anyway, and at the parameters before each validation. Steps are deterministic:
the same run under JAX's own NaN checks (`jax_debug_nans`) stops at the
step at fault.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.types import PyTree, TrainingError

SKIPPED = "skipped"
_REMEDY = (
  "lower the learning rate or the clipping norm, or skip such steps; the same "
  "run with JAX_DEBUG_NANS=True stops at that step"
)


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


def check_losses(log: dict[str, np.ndarray], name: str, start: int) -> None:
  """Raises TrainingError at the first loss [count, ...] that is not finite."""
  loss = log["loss"]
  skipped = log.get(SKIPPED, np.zeros(len(loss)))
  skipped = np.reshape(skipped, skipped.shape + (1,) * (loss.ndim - 1))
  bad = np.argwhere(~(np.isfinite(loss) | (skipped > 0)))
  if len(bad):
    offset, group = bad[0][0], bad[0][1:].tolist()
    raise TrainingError(
      f"{name}: the loss of group {group} is {loss[tuple(bad[0])]} at step "
      f"{start + offset}; {_REMEDY}"
    )


def check_params(params: PyTree, name: str, step: int) -> None:
  """Raises TrainingError if a parameter is not finite after `step` steps."""
  if not all_finite(params):
    raise TrainingError(
      f"{name}: a parameter is not finite after step {step - 1}; {_REMEDY}"
    )
