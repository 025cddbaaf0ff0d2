"""Losses and parameters that are not finite: found or skipped.

A gradient that is not finite makes the parameters not finite in the same step
and the loss in the next. The loop therefore looks at the losses, which it reads
anyway, and at the parameters before each validation. Steps are deterministic:
the same run under JAX's own NaN checks (`jax_debug_nans`) stops at the
step at fault.
"""

import numpy as np

from pin_jax.training.steps import SKIPPED, all_finite
from pin_jax.types import PyTree, TrainingError

_REMEDY = (
  "lower the learning rate or the clipping norm, or skip such steps; the same "
  "run with JAX_DEBUG_NANS=True stops at that step"
)


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
