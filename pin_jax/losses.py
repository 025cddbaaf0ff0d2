"""Losses: the last axis is the list, leading axes are batch, never reduced.

`chunked` turns any per-row loss into a weighted sum whose memory does not
grow with rows x catalogue.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pin_jax.types import PyTree


def softmax_cross_entropy(
  logits: jax.Array,
  target: jax.Array,
  where: jax.Array | None = None,
) -> jax.Array:
  """-log softmax(logits)[target], unreduced.

  Args:
    logits: [..., C], any float type; accumulated in float32.
    target: [...] int, index into the last axis.
    where: optional [..., C] bool, candidates that take part.

  Returns:
    [...] float32, nats.
  """
  logits = logits.astype(jnp.float32)
  if where is not None:
    logits = jnp.where(where, logits, -jnp.inf)
  chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


RowLoss = Callable[[PyTree, PyTree, PyTree, PyTree], jax.Array]


def chunked(row_loss: RowLoss, chunk: int) -> Callable[..., jax.Array]:
  """Sum_i weight_i * row_loss_i in chunks of rows, one chunk alive at a time.

  The gradient is formed in the forward pass, chunk by chunk, so neither pass
  holds more than `chunk` rows of logits and no logit is computed twice. A
  chunk of zero weights is skipped (outside vmap, where a condition branches);
  elsewhere a row of zero weight repeats a real one, so that what it holds
  cannot turn the gradient into NaN.

  Args:
    row_loss: (params, shared, inputs [M, ...], constants [M, ...]) -> [M].
    chunk: rows a chunk.

  Returns:
    f(params, shared, inputs, constants, weights [M]) -> scalar float32;
    differentiable in params and the floating-point inputs, constant in the
    others.
  """

  def chunk_sum(
    params: PyTree,
    inputs: PyTree,
    shared: PyTree,
    constants: PyTree,
    weights: jax.Array,
  ) -> jax.Array:
    real = weights != 0
    fill = lambda x: jnp.where(
      real.reshape(-1, *[1] * (x.ndim - 1)), x, x[jnp.argmax(real)]
    )
    inputs, constants = jax.tree.map(fill, (inputs, constants))
    losses = row_loss(params, shared, inputs, constants)
    return jnp.sum(jnp.where(real, losses, 0) * weights)

  def is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)

  def split(x: jax.Array) -> jax.Array:
    pad = [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, pad).reshape(-1, chunk, *x.shape[1:])

  @jax.custom_vjp
  def total(
    params: PyTree,
    shared: PyTree,
    inputs: PyTree,
    constants: PyTree,
    weights: jax.Array,
  ) -> jax.Array:
    def body(value: jax.Array, rows: PyTree) -> tuple[jax.Array, None]:
      inputs, constants, weights = rows
      run = lambda v: v + chunk_sum(params, inputs, shared, constants, weights)
      return jax.lax.cond(jnp.any(weights != 0), run, lambda v: v, value), None

    rows = jax.tree.map(split, (inputs, constants, weights))
    return jax.lax.scan(body, jnp.float32(0), rows)[0]

  def forward(
    params: PyTree,
    shared: PyTree,
    inputs: PyTree,
    constants: PyTree,
    weights: jax.Array,
  ) -> tuple[jax.Array, PyTree]:
    def body(carry: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
      inputs, constants, weights = rows

      def run(carry: PyTree) -> tuple[PyTree, PyTree]:
        value, (of_params, of_inputs) = jax.value_and_grad(
          chunk_sum, (0, 1), allow_int=True
        )(params, inputs, shared, constants, weights)
        of_inputs = jax.tree.map(
          lambda x, g: g if is_float(x) else jnp.zeros_like(x),
          inputs, of_inputs,
        )
        return jax.tree.map(jnp.add, carry, (value, of_params)), of_inputs

      skip = lambda carry: (carry, jax.tree.map(jnp.zeros_like, inputs))
      return jax.lax.cond(jnp.any(weights != 0), run, skip, carry)

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    rows = jax.tree.map(split, (inputs, constants, weights))
    (value, of_params), of_inputs = jax.lax.scan(body, zero, rows)
    merge = lambda x: x.reshape(-1, *x.shape[2:])[: weights.shape[0]]
    return value, (of_params, jax.tree.map(merge, of_inputs))

  def backward(residuals: PyTree, cotangent: jax.Array) -> tuple:
    of_params, of_inputs = jax.tree.map(
      lambda x: x * cotangent if is_float(x) else None, residuals
    )
    return of_params, None, of_inputs, None, None

  total.defvjp(forward, backward)
  return total
