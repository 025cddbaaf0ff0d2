"""Sums over chunks of rows, whose memory does not grow with the rows.

The gradient is formed in the forward pass, chunk by chunk, so neither pass
holds what more than a chunk needs and nothing is computed twice.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pin_jax.types import PyTree

RowLoss = Callable[[PyTree, PyTree, PyTree, PyTree], jax.Array]
ChunkLoss = Callable[
  [PyTree, PyTree, PyTree, PyTree], tuple[jax.Array, jax.Array]
]


def chunked(
  row_loss: RowLoss, chunk: int, axis: str | None = None
) -> Callable[..., tuple]:
  """Sum_i scale_i * weight_i * row_loss_i, one chunk of rows alive at a time.

  The sum is `accumulated`; the chunks after the last row of non-zero weight
  cost nothing. A row of zero weight repeats a real one, so that what it holds
  cannot turn the gradient into NaN.

  Args:
    row_loss: (params, shared, inputs [M, ...], constants [M, ...]) -> [M].
    chunk: rows a chunk; the last ones are a quarter of that, if it divides.
    axis: name of a vmapped axis along which all go through as many chunks as
      the one with the most rows, so that the loop stays one loop.

  Returns:
    f(params, shared, inputs, constants, weights [M], scale [M]) -> (scalar,
    weight_i * row_loss_i [M]), float32. The scalar is differentiable in params
    and the floating-point inputs, constant in the others; the rows are
    constants.
  """

  def of_chunk(
    params: PyTree, shared: PyTree, inputs: PyTree, constants: PyTree
  ) -> tuple[jax.Array, jax.Array]:
    shared, repeated = shared
    constants, weights, scale = constants
    real = weights != 0

    def fill(x: jax.Array, other: jax.Array) -> jax.Array:
      return jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, other)

    inputs, constants = jax.tree.map(fill, (inputs, constants), repeated)
    losses = row_loss(params, shared, inputs, constants)
    losses = jnp.where(real, losses, 0) * weights
    return jnp.sum(losses * scale), losses

  total = accumulated(of_chunk, chunk, chunk // 4 if chunk % 4 == 0 else chunk)

  def run(
    params: PyTree, shared: PyTree, inputs: PyTree, constants: PyTree,
    weights: jax.Array, scale: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    real = weights != 0
    used = jnp.max(jnp.where(real, jnp.arange(len(real)) + 1, 0))
    used = used if axis is None else jax.lax.pmax(used, axis)
    first = jnp.argmax(real)
    repeated = jax.tree.map(lambda x: x[first], (inputs, constants))
    return total(
      params, (shared, repeated), inputs, (constants, weights, scale), used
    )

  return run


def accumulated(
  chunk_loss: ChunkLoss, chunk: int, rest: int
) -> Callable[..., tuple]:
  """Sum of a function over chunks of rows, its gradient formed on the way.

  The gradient of params adds up in float32 at least. Rows from `used` on cost
  nothing but what fills up a chunk (under vmap: from the most used on).

  Args:
    chunk_loss: (params, shared, inputs [c, ...], constants [c, ...]) ->
      (scalar, rows [c, ...] float32), called with c = `chunk` and c = `rest`.
    chunk: rows a chunk, while so many are left.
    rest: rows of the chunks after that, at most `chunk`.

  Returns:
    f(params, shared, inputs [M, ...], constants [M, ...], used) -> (scalar,
    rows [M, ...]). The scalar is differentiable in params and the
    floating-point inputs, constant in the others; the rows are constants, 0
    from the last chunk on.
  """

  def run(
    slopes: bool, params: PyTree, shared: PyTree, inputs: PyTree,
    constants: PyTree, used: jax.Array,
  ) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
    """((scalar, rows), (slopes of params, of inputs) or nothing)."""
    of_chunk = lambda params, *rows: chunk_loss(params, shared, *rows)
    value_and_grad = jax.value_and_grad(
      of_chunk, (0, 1), has_aux=True, allow_int=True
    )
    count = len(jax.tree.leaves((inputs, constants))[0])
    pad = lambda x: jnp.pad(
      x, [(0, -count % chunk)] + [(0, 0)] * (x.ndim - 1)
    )
    padded = jax.tree.map(pad, (inputs, constants))

    def add(carry: PyTree, first: jax.Array, size: int) -> PyTree:
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size)
      put = lambda whole, x: (
        jax.lax.dynamic_update_slice_in_dim(whole, x, first, 0)
        if _is_float(whole) else whole
      )
      value, rows, gradients = carry
      arguments = params, *jax.tree.map(take, padded)
      if slopes:
        (more, new), (of_params, of_inputs) = value_and_grad(*arguments)
        gradients = (
          jax.tree.map(jnp.add, gradients[0], of_params),
          jax.tree.map(put, gradients[1], of_inputs),
        )
      else:
        more, new = of_chunk(*arguments)
      return value + more, put(rows, new), gradients

    of_row = jax.eval_shape(of_chunk, params, *padded)[1].shape[1:]
    gradients = (
      jax.tree.map(_zeros_wide, params),
      jax.tree.map(jnp.zeros_like, padded[0]),
    ) if slopes else ()
    rows = jnp.zeros((count + -count % chunk, *of_row))
    start = jnp.float32(0), rows, gradients
    value, rows, gradients = _loop(add, start, used, chunk, rest)
    if slopes:
      cast = jax.tree.map(lambda x, p: x.astype(p.dtype), gradients[0], params)
      gradients = cast, jax.tree.map(lambda x: x[:count], gradients[1])
    return (value, rows[:count]), gradients

  @jax.custom_vjp
  def total(*args: PyTree) -> tuple[jax.Array, jax.Array]:
    return run(False, *args)[0]

  def forward(*args: PyTree) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
    return run(True, *args)

  def backward(residuals: PyTree, cotangents: tuple) -> tuple:
    of_params, of_inputs = jax.tree.map(
      lambda x: (x * cotangents[0]).astype(x.dtype) if _is_float(x) else None,
      residuals,
    )
    return of_params, None, of_inputs, None, None

  total.defvjp(forward, backward)
  return total


def _loop(
  add: Callable, carry: PyTree, used: jax.Array, chunk: int, rest: int
) -> PyTree:
  """add(carry, first row, rows) over the rows in use."""
  whole = (used + rest - 1) // chunk
  carry = jax.lax.fori_loop(
    0, whole, lambda i, carry: add(carry, i * chunk, chunk), carry
  )
  if rest == chunk:
    return carry
  left = jnp.maximum(used - whole * chunk, 0)
  return jax.lax.fori_loop(
    0, -(-left // rest),
    lambda i, carry: add(carry, whole * chunk + i * rest, rest), carry,
  )


def _zeros_wide(x: jax.Array) -> jax.Array:
  """Zeros like x, to add up in: float32 where x is narrower."""
  wide = jnp.promote_types(x.dtype, jnp.float32) if _is_float(x) else x.dtype
  return jnp.zeros(x.shape, wide)


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)
