"""The optimizer of both stages: AdamW with warm-up, decay and clipping."""

from typing import NamedTuple

import optax

from pin_jax.types import InputError, at_least


class Optimizer(NamedTuple):
  """How gradients move the params of a stage.

  Attributes:
    transformation: of optax.
    schedule: its learning rate by step, for the log.
    average: decay of an exponential moving average of the params, which is then
      what is validated and kept; 0 = none.
    tables: the params that it updates by the rows that a step reads, where the
      transformation is a `sparse.row_sparse`; else none.
  """

  transformation: optax.GradientTransformation
  schedule: optax.Schedule
  average: float = 0.0
  tables: tuple[str, ...] = ()


def make_optimizer(
  num_steps: int,
  *,
  learning_rate: float = 1e-3,
  warmup: int = 50,
  final: float = 0.01,
  b2: float = 0.98,
  weight_decay: float = 0.0,
  clip: float = 5.0,
  average: float = 0.0,
) -> Optimizer:
  """AdamW with warm-up, cosine decay and gradient clipping.

  Args:
    num_steps: steps of the whole run.
    learning_rate: peak value.
    warmup: steps of linear warm-up.
    final: last learning rate as a share of the peak.
    b2: decay of the second moment.
    weight_decay: decoupled decay, scaled by the learning rate.
    clip: largest global norm of the gradient.
    average: see `Optimizer`.

  Raises:
    InputError: if there is no step, or the learning rate is not positive.
  """
  at_least(1, num_steps=num_steps)
  if not learning_rate > 0:
    raise InputError(f"learning_rate={learning_rate!r}; give a positive number")
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, min(warmup, num_steps // 2), max(num_steps, 2),
    final * learning_rate,
  )
  transformation = optax.chain(
    optax.clip_by_global_norm(clip),
    optax.adamw(schedule, b2=b2, weight_decay=weight_decay),
  )
  return Optimizer(transformation, schedule, average)
