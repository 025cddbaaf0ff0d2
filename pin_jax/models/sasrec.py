"""SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

Deviations from the paper: pre-norm blocks with a final LayerNorm; GELU MLP of
`expansion` times the width; an item bias in the output; softmax training is
left to the caller. Positions are counted from the end of the window, so the
newest item always has the same position.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from pin_jax.models import conditioned
from pin_jax.models.layers import Block, Dropout, lookup, product
from pin_jax.types import Backbone, Histories, InputError, PyTree, Rows


class _Encoder(nn.Module):
  num_items: int
  length: int
  width: int
  blocks: int
  heads: int
  dropout: float
  expansion: int

  @nn.compact
  def __call__(self, rows: Rows) -> jax.Array:
    init = nn.initializers.normal(0.02)
    x = item_inputs(self, rows, self.num_items, self.width)
    positions = self.param("positions", init, (self.length, self.width))
    mask = rows.items > 0
    placed = lookup(positions, self.length - 1 - rows.later)
    x = Dropout(self.dropout)((x + placed) * mask[..., None])
    for _ in range(self.blocks):
      x = Block(self.heads, self.expansion * self.width, self.dropout, init)(
        x, rows.windows
      )
    return nn.LayerNorm()(x) * mask[..., None]


def sasrec(
  num_items: int,
  *,
  length: int = 50,
  width: int = 64,
  blocks: int = 2,
  heads: int = 2,
  dropout: float = 0.2,
  expansion: int = 4,
) -> Backbone:
  """Builds SASRec: causal self-attention with tied item embeddings.

  logit(v) = <h_t, E_v> + b_v, with h_t the state after reading item t.

  Args:
    num_items: V; item 0 is padding.
    length: longest history L that the model reads.
    width: D, a multiple of `heads`.
    blocks: number of transformer blocks.
    heads: number of attention heads.
    dropout: rate in [0, 1) on embeddings, attention weights and residuals.
    expansion: width of the MLP as a multiple of D.

  Returns:
    The backbone's pure functions.

  Raises:
    InputError: if `width` is no multiple of `heads`, or `dropout` is outside
      [0, 1).
  """
  check_heads(width, heads)
  check_dropout(dropout)
  encoder = _Encoder(
    num_items, length, width, blocks, heads, dropout, expansion
  )
  return from_encoder(encoder, length)


def check_heads(width: int, heads: int) -> None:
  """Raises InputError if `width` is no multiple of `heads`."""
  if heads < 1 or width % heads:
    raise InputError(
      f"backbone.width={width} is no multiple of backbone.heads={heads}; "
      "change one of them"
    )


def check_dropout(dropout: float) -> None:
  """Raises InputError if the rate is outside [0, 1)."""
  if not 0 <= dropout < 1:
    raise InputError(
      f"backbone.dropout={dropout} is outside [0, 1); give a share such as 0.2"
    )


def as_rows(history: jax.Array | Histories | Rows, length: int) -> Rows:
  """One history a row, if they are not laid out in rows already.

  Raises:
    InputError: if the rows are longer than the backbone reads.
  """
  if isinstance(history, Rows):
    return history
  activeness = None
  if isinstance(history, Histories):
    history, activeness = history
    activeness = jnp.broadcast_to(activeness[:, None], history.shape)
  if history.shape[-1] > length:
    raise InputError(
      f"a history of {history.shape[-1]} is longer than "
      f"backbone.length={length}; raise it or cut the history"
    )
  history = jnp.asarray(history)
  later = jnp.arange(history.shape[-1] - 1, -1, -1)
  return Rows(history, (history > 0).astype(jnp.int32), later, activeness)


def item_table(module: nn.Module, num_items: int, width: int) -> jax.Array:
  """Adds `items` [V+1, D] and `bias` [V+1] to a module; returns `items`."""
  table = module.param(
    "items", nn.initializers.normal(width**-0.5), (num_items + 1, width)
  )
  module.param("bias", nn.initializers.zeros, (num_items + 1,))
  return table


def item_inputs(
  module: nn.Module, rows: Rows, num_items: int, width: int
) -> jax.Array:
  """What a module with an `item_table` reads, sqrt(D) E[items]; [B, L, D].

  Where its params hold `conditioned.TABLE`, the users' activeness is added.
  """
  table = item_table(module, num_items, width)
  x = lookup(table, rows.items) * math.sqrt(width)
  if not module.has_variable("params", conditioned.TABLE):
    return x
  added = module.get_variable("params", conditioned.TABLE)
  return x + conditioned.embedded(added, rows.activeness)


def from_encoder(encoder: nn.Module, length: int) -> Backbone:
  """A backbone whose states ignore the candidate, with tied output.

  Args:
    encoder: maps Rows to states [B, L, D]; holds the parameters of
      `item_table`; reads the rng 'dropout' where there is one.
    length: longest history.

  Returns:
    The backbone; its `encode` raises InputError for a longer history.
  """

  def init(key: jax.Array) -> PyTree:
    nothing = as_rows(jnp.zeros((1, length), jnp.int32), length)
    return encoder.init(key, nothing)["params"]

  def encode(
    params: PyTree, history: jax.Array | Histories | Rows,
    key: jax.Array | None = None,
  ) -> jax.Array:
    rngs = None if key is None else {"dropout": key}
    sized = encoder.clone(num_items=len(params["items"]) - 1)
    return sized.apply({"params": params}, as_rows(history, length), rngs=rngs)

  return Backbone(
    init, encode, take_position, add_candidate_axis, tied_score, TABLES
  )


TABLES = ("items", "bias")  # what `tied_score` reads


def take_position(
  context: jax.Array, rows: jax.Array, columns: jax.Array
) -> jax.Array:
  """States of the chosen positions; [B, L, D] -> [M, D]."""
  return context[rows, columns]


def add_candidate_axis(
  params: PyTree, states: jax.Array, candidates: jax.Array | None
) -> jax.Array:
  """The representation where it ignores the candidate; [M, D] -> [M, 1, D]."""
  del params, candidates
  return states[:, None]


def tied_score(
  params: PyTree, representations: jax.Array, candidates: jax.Array | None
) -> jax.Array:
  """logit = <r, E_v> + b_v against the item table, in float32.

  Args:
    params: holds `items` [V+1, D] and `bias` [V+1].
    representations: [M, 1 or C, D], of any float type.
    candidates: item indices, [C] shared by all rows or [M, C]; None = the
      whole table 0..V, in order.

  Returns:
    [M, C] logits.
  """
  table, bias = params["items"], params["bias"]
  if candidates is not None:
    table, bias = lookup(table, candidates), bias[candidates]
  spec = "mkd,cd->mkc" if table.ndim == 2 else "mkd,mcd->mkc"
  if representations.shape[1] > 1:
    spec = "mcd,cd->mc" if table.ndim == 2 else "mcd,mcd->mc"
  logits = product(spec, representations, table)
  return (logits[:, 0] if logits.ndim == 3 else logits) + bias
