"""Packing: short histories share a row, so that padding is not paid for. Ours.

Where most users are barely active, most of a batch's positions are padding, and
an encoder of one history a row computes them all. Packed, several histories lie
in a row and read nothing of each other; the rows in use come in chunks, and a
loop stops after the last.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pin_jax.types import Backbone, PyTree, Rows


class Packed(NamedTuple):
  """Where the positions of B histories went.

  Attributes:
    source: [B, L] which position b L + c of the histories is there; -1 = none.
    place: [B, L] where each position of the histories lies, row L + column;
      -1 = nowhere, for it is padding.
    used: scalar, rows that hold any.
  """

  source: jax.Array
  place: jax.Array
  used: jax.Array


def pack(history: jax.Array) -> Packed:
  """Lays histories into rows, each into the open row or else a new one.

  Next-fit, in log2(B) steps: the histories that open a row are those reached
  from the first by repeatedly going to the next that does not fit.

  Args:
    history: [B, L], right-aligned, 0 = padding.
  """
  count, length = history.shape
  sizes = jnp.max((history > 0) * jnp.arange(length, 0, -1), -1)
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  following = jnp.searchsorted(ends, starts + length, side="right")
  jump = jnp.append(following, count)
  opens = jnp.zeros(count + 1, bool).at[0].set(True)
  for _ in range(math.ceil(math.log2(count)) if count > 1 else 0):
    opens = opens.at[jump].max(opens)
    jump = jump[jump]
  opens = opens[:count]
  rows = jnp.cumsum(opens) - 1
  first = starts - jax.lax.cummax(jnp.where(opens, starts, 0))
  column = jnp.arange(length) - (length - sizes[:, None])  # within the history
  place = rows[:, None] * length + first[:, None] + column
  target = jnp.where(column >= 0, place, count * length)
  source = jnp.full(count * length, -1).at[target.reshape(-1)].set(
    jnp.arange(count * length), mode="drop"
  )
  return Packed(
    source.reshape(count, length), jnp.where(column >= 0, place, -1),
    rows[-1] + 1,
  )


def take(values: jax.Array, source: jax.Array) -> jax.Array:
  """values [B, L, ...] at positions [...], zeros where there is none."""
  flat = values.reshape(-1, *values.shape[2:])
  real = (source >= 0).reshape(*source.shape, *[1] * (values.ndim - 2))
  return jnp.where(real, flat[jnp.maximum(source, 0)], 0)


def rows_of(history: jax.Array | Rows, source: jax.Array) -> Rows:
  """The packed rows of histories [B, L] that `source` [R, L] names."""
  items, activeness = _parts(history)
  length = items.shape[1]
  later = jnp.where(source >= 0, length - 1 - source % length, 0)
  if activeness is not None:
    activeness = take(activeness, source)
  return Rows(take(items, source), source // length + 1, later, activeness)


def _parts(history: jax.Array | Rows) -> tuple[jax.Array, jax.Array | None]:
  """Items and activeness, each [B, L]."""
  whole = isinstance(history, Rows)
  return (history.items, history.activeness) if whole else (history, None)


def encode(
  backbone: Backbone, params: PyTree, history: jax.Array | Rows
) -> PyTree:
  """The context of histories without dropout, in packed rows where that is on.

  Equals `backbone.encode(params, history)` up to rounding, with zeros at
  padding. Packed, it is not differentiable in reverse: the loop ends with the
  rows in use.

  Args:
    backbone: every leaf of its context leads with [B, L].
    params: its parameters.
    history: [B, L], right-aligned, or one a row with the users' activeness.
  """
  chunk = backbone.packed
  if not chunk:
    return backbone.encode(params, history, None)
  packed = pack(_parts(history)[0])
  source = source_chunks(packed, chunk)

  def one(index: jax.Array) -> PyTree:
    return backbone.encode(params, rows_of(history, source[index]), None)

  def body(index: jax.Array, whole: PyTree) -> PyTree:
    return jax.tree.map(lambda x, new: x.at[index].set(new), whole, one(index))

  shapes = jax.eval_shape(one, jnp.int32(0))
  nothing = jax.tree.map(
    lambda x: jnp.zeros((len(source), *x.shape), x.dtype), shapes
  )
  context = jax.lax.fori_loop(0, -(-packed.used // chunk), body, nothing)
  merge = lambda x: x.reshape(-1, *x.shape[2:])
  return jax.tree.map(lambda x: take(merge(x), packed.place), context)


def source_chunks(packed: Packed, chunk: int) -> jax.Array:
  """`source` by chunks of rows, [chunks, chunk, L]; the last one filled up."""
  source = packed.source
  pad = [(0, -len(source) % chunk), (0, 0)]
  padded = jnp.pad(source, pad, constant_values=-1)
  return padded.reshape(-1, chunk, source.shape[1])
