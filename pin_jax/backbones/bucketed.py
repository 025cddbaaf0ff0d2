"""Encoding short rows by short programs: padding is not paid for.

Ours. Where most users are barely active, most of a batch's positions are
padding, and a plain encoder computes them all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pin_jax.types import Backbone, InputError, PyTree


def bucketed(
  backbone: Backbone, *, rows: int = 64, shortest: int = 4
) -> Backbone:
  """Wraps a backbone so that a row costs about its own length.

  The rows of a batch are sorted by length and cut into equal chunks of at most
  `rows`; a chunk runs the program of the shortest power-of-two length that
  holds its longest row, on history[:, -length:], and the result is padded with
  zeros on the left. Nothing is cut off and all shapes are static. The backward
  pass encodes a chunk again, so that nothing but its history is kept between
  the passes. Without dropout the context equals the plain one up to rounding;
  with dropout its masks differ from the plain ones but follow from the key.

  The contract: histories are right-aligned, every leaf of the context leads
  with [B, L], what it holds of a position does not depend on the columns of
  padding ahead of the row, and it holds zeros at padding.

  It gains where rows differ in length and lengths are far below L, and loses
  the second encoding where all rows are full. DIN encodes nothing, so it has
  nothing to gain. Under `vmap` the choice of a program becomes a select that
  runs them all: use `lax.map` or `scan`.

  Args:
    backbone: the backbone to wrap.
    rows: most rows of a chunk.
    shortest: shortest program; the others double it, up to L.

  Returns:
    The backbone with another `encode`, which raises ValueError where the
    context breaks the contract of [B, L].

  Raises:
    InputError: if `rows` or `shortest` is smaller than 1.
  """
  for name, value in (("bucket_rows", rows), ("shortest", shortest)):
    if value < 1:
      raise InputError(f"backbone.{name}={value} is too small; give at least 1")

  def encode(
    params: PyTree, history: jax.Array, key: jax.Array | None = None
  ) -> PyTree:
    history = jnp.asarray(history)
    count, length = history.shape
    num_chunks = -(-count // rows)
    fill = -count % num_chunks
    real = jnp.max((history > 0) * jnp.arange(length, 0, -1), -1)
    order = jnp.argsort(real)
    # What fills the chunks up comes first, with the shortest rows.
    cut = lambda x: jnp.concatenate(
      [jnp.zeros((fill, *x.shape[1:]), x.dtype), x[order]]
    ).reshape(num_chunks, -1, *x.shape[1:])
    sizes = _doubling(shortest, length)
    which = jnp.searchsorted(jnp.asarray(sizes), cut(real).max(-1))
    programs = [_program(backbone.encode, size, length) for size in sizes]

    def run(chunk: tuple) -> PyTree:
      index, *operands = chunk
      return jax.lax.switch(index, programs, params, *operands)

    keys = None if key is None else jax.random.split(key, num_chunks)
    context = jax.lax.map(run, (which, cut(history), keys))
    back = fill + jnp.argsort(order)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[back], context)

  return backbone._replace(encode=encode)


def _doubling(shortest: int, length: int) -> list[int]:
  """shortest, 2 shortest, 4 shortest, … below `length`, then `length`."""
  sizes = []
  while shortest < length:
    sizes.append(shortest)
    shortest *= 2
  return [*sizes, length]


def _program(
  encode: Callable[..., PyTree], size: int, length: int
) -> Callable[..., PyTree]:
  """Encodes the last `size` columns; pads the context to `length`."""

  def pad(leaf: jax.Array, history: jax.Array) -> jax.Array:
    if leaf.shape[:2] != history.shape:
      raise ValueError(
        f"bucketed: a leaf {leaf.shape} of the context does not lead with "
        f"[B, L] = {history.shape}"
      )
    ahead = [(0, 0), (length - size, 0)] + [(0, 0)] * (leaf.ndim - 2)
    return jnp.pad(leaf, ahead)

  @jax.checkpoint
  def run(
    params: PyTree, history: jax.Array, key: jax.Array | None
  ) -> PyTree:
    history = history[:, length - size :]
    context = encode(params, history, key)
    return jax.tree.map(lambda x: pad(x, history), context)

  return run
