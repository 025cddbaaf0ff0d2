"""The optimizer of both stages: AdamW with warm-up, decay and clipping."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pin_jax.types import InputError, PyTree, at_least


class Optimizer(NamedTuple):
  """How gradients move the params of a stage.

  Attributes:
    transformation: of optax. Its `update` takes `num_steps=` besides, that of
      the run where it is not the one that it was made for: so one program
      serves runs of any length.
    schedule: (step, num_steps) -> its learning rate, for the log.
    average: decay of an exponential moving average of the params, which is then
      what is validated and kept; 0 = none.
    tables: the params that it updates by the rows that a step reads, where the
      transformation is a `sparse.row_sparse`; else none.
  """

  transformation: optax.GradientTransformation
  schedule: Callable[..., jax.Array]
  average: float = 0.0
  tables: tuple[str, ...] = ()

  def update(
    self, gradient: PyTree, state: PyTree, params: PyTree, **extra: Any
  ) -> tuple[PyTree, PyTree]:
    """(updates, state); `extra` is what the transformation takes besides."""
    whole = optax.with_extra_args_support(self.transformation)
    return whole.update(gradient, state, params, **extra)


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

  def schedule(t: jax.Array, steps: jax.Array | None = None) -> jax.Array:
    steps = num_steps if steps is None else steps
    warm = jnp.minimum(warmup, steps // 2)
    share = (t - warm) / jnp.maximum(jnp.maximum(steps, 2) - warm, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(share, 1)))
    return learning_rate * jnp.where(
      t < warm, t / jnp.maximum(warm, 1), (1 - final) * cosine + final
    )

  def scale(
    updates: PyTree, state: optax.ScaleByScheduleState, params: PyTree = None,
    *, num_steps: jax.Array | None = None, **_: Any,
  ) -> tuple[PyTree, optax.ScaleByScheduleState]:
    rate = -schedule(state.count, num_steps)
    scaled = jax.tree.map(lambda x: rate.astype(x.dtype) * x, updates)
    return scaled, state._replace(count=optax.safe_increment(state.count))

  counted = optax.scale_by_schedule(lambda t: 0.0)  # state as of any schedule
  transformation = optax.chain(
    optax.clip_by_global_norm(clip),
    optax.chain(
      optax.scale_by_adam(b2=b2), optax.add_decayed_weights(weight_decay),
      optax.GradientTransformationExtraArgs(counted.init, scale),
    ),
  )
  return Optimizer(transformation, schedule, average)
