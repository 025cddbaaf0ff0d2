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


def chunked(row_loss: RowLoss, chunk: int) -> Callable[..., tuple]:
  """Sum_i scale_i * weight_i * row_loss_i, one chunk of rows alive at a time.

  The gradient is formed in the forward pass, chunk by chunk, so neither pass
  holds more than `chunk` rows of logits and no logit is computed twice. The
  chunks after the last row of non-zero weight cost nothing (under vmap: after
  the last of any example). A row of zero weight repeats a real one, so that
  what it holds cannot turn the gradient into NaN.

  Args:
    row_loss: (params, shared, inputs [M, ...], constants [M, ...]) -> [M].
    chunk: rows a chunk; the last ones are a quarter of that, if it divides.

  Returns:
    f(params, shared, inputs, constants, weights [M], scale [M]) -> (scalar,
    weight_i * row_loss_i [M]), float32. The scalar is differentiable in params
    and the floating-point inputs, constant in the others; the rows are
    constants.
  """

  small = chunk // 4 if chunk % 4 == 0 else chunk

  def chunk_sum(
    params: PyTree,
    inputs: PyTree,
    shared: PyTree,
    constants: PyTree,
    weights: jax.Array,
    scale: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    losses = row_loss(params, shared, inputs, constants)
    losses = jnp.where(weights != 0, losses, 0) * weights
    return jnp.sum(losses * scale), losses

  def pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1))

  def loop(body: Callable, carry: PyTree, rows: PyTree) -> PyTree:
    """Runs body(carry, rows of the chunk, first row) over the rows in use."""
    real = rows[2] != 0
    used = jnp.max(jnp.where(real, jnp.arange(len(real)) + 1, 0))
    whole = (used + small - 1) // chunk
    repeated = jnp.argmax(real)
    padded = jax.tree.map(pad, (*rows, real))

    def step(carry: PyTree, first: jax.Array, size: int) -> PyTree:
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size)
      inputs, constants, weights, scale, real = jax.tree.map(take, padded)
      fill = lambda x, whole: jnp.where(
        real.reshape(-1, *[1] * (x.ndim - 1)), x, whole[repeated]
      )
      filled = jax.tree.map(fill, (inputs, constants), rows[:2])
      return body(carry, (*filled, weights, scale), first)

    carry = jax.lax.fori_loop(
      0, whole, lambda i, c: step(c, i * chunk, chunk), carry
    )
    rest = jnp.maximum(used - whole * chunk, 0)
    return jax.lax.fori_loop(
      0, -(-rest // small),
      lambda i, c: step(c, whole * chunk + i * small, small), carry,
    )

  def put(whole: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0)

  @jax.custom_vjp
  def total(
    params: PyTree,
    shared: PyTree,
    inputs: PyTree,
    constants: PyTree,
    weights: jax.Array,
    scale: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    def body(carry: PyTree, rows: PyTree, first: jax.Array) -> PyTree:
      inputs, constants, weights, scale = rows
      part, losses = chunk_sum(
        params, inputs, shared, constants, weights, scale
      )
      return carry[0] + part, put(carry[1], losses, first)

    zero = jnp.float32(0), pad(jnp.zeros(weights.shape, jnp.float32))
    value, losses = loop(body, zero, (inputs, constants, weights, scale))
    return value, losses[: len(weights)]

  def forward(
    params: PyTree,
    shared: PyTree,
    inputs: PyTree,
    constants: PyTree,
    weights: jax.Array,
    scale: jax.Array,
  ) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
    def body(carry: PyTree, rows: PyTree, first: jax.Array) -> PyTree:
      value, losses, of_params, of_inputs = carry
      inputs, constants, weights, scale = rows
      (part, row_losses), (params_part, inputs_part) = jax.value_and_grad(
        chunk_sum, (0, 1), has_aux=True, allow_int=True
      )(params, inputs, shared, constants, weights, scale)
      return (
        value + part,
        put(losses, row_losses, first),
        jax.tree.map(jnp.add, of_params, params_part),
        jax.tree.map(
          lambda whole, x: put(whole, x, first) if _is_float(x) else whole,
          of_inputs, inputs_part,
        ),
      )

    zero = (
      jnp.float32(0),
      pad(jnp.zeros(weights.shape, jnp.float32)),
      jax.tree.map(jnp.zeros_like, params),
      jax.tree.map(lambda x: pad(jnp.zeros_like(x)), inputs),
    )
    value, losses, of_params, of_inputs = loop(
      body, zero, (inputs, constants, weights, scale)
    )
    losses, of_inputs = jax.tree.map(
      lambda x: x[: len(weights)], (losses, of_inputs)
    )
    return (value, losses), (of_params, of_inputs)

  def backward(residuals: PyTree, cotangents: tuple) -> tuple:
    of_params, of_inputs = jax.tree.map(
      lambda x: x * cotangents[0] if _is_float(x) else None, residuals
    )
    return of_params, None, of_inputs, None, None, None

  total.defvjp(forward, backward)
  return total


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)
