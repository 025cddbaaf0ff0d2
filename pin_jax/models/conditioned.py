"""Activeness as an input of the backbone: P(Y|X,d) in one model.

A control: whoever wants to know whether a method gains because it adjusts for
activeness must ask what a base gains that is simply told of it.
"""

import jax
import jax.numpy as jnp

from pin_jax.models.layers import lookup
from pin_jax.types import Backbone, Histories, PyTree

TABLE = "activeness"  # the name of its params
_BUCKETS = 16


def conditioned(backbone: Backbone) -> Backbone:
  """The backbone told of each user's activeness. Ours.

    x_t = E[item_t] + A[min(floor(log2 n), 15)], A = 0 at the start

  with E the scaled item embedding that the model reads at position t and n the
  user's training interactions (of somebody new, those given). The params get A
  [16, D] as `activeness`; a backbone whose params hold it reads `Histories`
  (see `given`), and is the plain one where they do not. At the start the two
  are the same.

  Args:
    backbone: one with params `items` [V+1, D].
  """

  def init(key: jax.Array) -> PyTree:
    params = backbone.init(key)
    width = params["items"].shape[-1]
    return {**params, TABLE: jnp.zeros((_BUCKETS, width))}

  return backbone._replace(init=init)


def reads(params: PyTree) -> bool:
  """Whether the backbone of these params reads activeness."""
  return isinstance(params, dict) and TABLE in params


def given(
  params: PyTree, history: jax.Array, activeness: jax.Array | None
) -> jax.Array | Histories:
  """What `encode` reads: histories, with activeness where params hold A.

  Args:
    params: of the backbone.
    history: [B, L].
    activeness: [B] training interactions of their users.

  Raises:
    ValueError: if params hold A and there is no activeness.
  """
  if reads(params) and activeness is None:
    raise ValueError(f"params hold {TABLE!r}; give the users' activeness")
  return Histories(history, activeness) if reads(params) else history


def embedded(table: jax.Array, activeness: jax.Array) -> jax.Array:
  """Rows of A; [...] int32 numbers of interactions -> [..., D]."""
  bits = 31 - jax.lax.clz(jnp.maximum(activeness, 1).astype(jnp.int32))
  return lookup(table, jnp.minimum(bits, len(table) - 1))
