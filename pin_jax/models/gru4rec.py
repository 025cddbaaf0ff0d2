"""GRU4Rec (Hidasi et al., ICLR 2016, arXiv 1511.06939).

Deviations from the paper: rows are windows of a user's history, not
session-parallel mini-batches; the output is tied to the input embeddings (the
'constrained embedding' of the authors' later releases) and stays linear; the
reset gate acts after the recurrent product, as in cuDNN; embeddings are scaled
by sqrt(D); the loss (Hidasi & Karatzoglou, CIKM 2018, arXiv 1706.03847) is left
to the caller.
"""

import flax.linen as nn
import jax

from pin_jax.models.backbones import from_encoder, item_inputs
from pin_jax.models.layers import GRU, Dropout
from pin_jax.types import Backbone, Rows


class _Encoder(nn.Module):
  num_items: int
  width: int
  layers: int
  dropout: float

  @nn.compact
  def __call__(self, rows: Rows) -> jax.Array:
    x = item_inputs(self, rows, self.num_items, self.width)
    x = Dropout(self.dropout)(x)
    for _ in range(self.layers):
      x = Dropout(self.dropout)(GRU(self.width)(x, rows.windows))
    return x


def gru4rec(
  num_items: int,
  *,
  length: int = 50,
  width: int = 64,
  layers: int = 1,
  dropout: float = 0.2,
) -> Backbone:
  """Builds GRU4Rec: gated recurrent units with tied item embeddings.

  logit(v) = <h_t, E_v> + b_v, with h_t the top layer's state after item t.

  Args:
    num_items: V.
    length: longest history L; no parameter depends on it.
    width: D, of the embeddings and of every layer.
    layers: recurrent layers.
    dropout: rate in [0, 1) on embeddings and on the output of every layer.
  """
  return from_encoder(_Encoder(num_items, width, layers, dropout), length)
