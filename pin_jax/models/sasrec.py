"""SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

Deviations from the paper: pre-norm blocks with a final LayerNorm; GELU MLP of
`expansion` times the width; an item bias in the output; softmax training is
left to the caller. Positions are counted from the end of the window, so the
newest item always has the same position.
"""

import flax.linen as nn
import jax

from pin_jax.models.backbones import check_heads, from_encoder, item_inputs
from pin_jax.models.layers import Block, Dropout, lookup
from pin_jax.types import Backbone, Rows


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
    num_items: V.
    length: longest history L that the model reads.
    width: D, a multiple of `heads`.
    blocks: transformer blocks.
    heads: of the attention.
    dropout: rate in [0, 1) on embeddings, attention weights and residuals.
    expansion: width of the MLP as a multiple of D.

  Raises:
    InputError: if `width` is no multiple of `heads`.
  """
  check_heads(width, heads)
  encoder = _Encoder(
    num_items, length, width, blocks, heads, dropout, expansion
  )
  return from_encoder(encoder, length)
