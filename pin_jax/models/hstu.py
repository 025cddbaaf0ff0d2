"""HSTU (Zhai et al., ICML 2024, arXiv 2402.17152).

Deviations from the paper: rows hold items alone, neither actions nor times,
so the relative bias is one of positions (one table a unit, shared by its heads)
and there is no table of absolute positions; the output is a final LayerNorm and
a product with the item table plus a bias, where the authors' code normalises
both to unit length and divides by a temperature; the loss is left to the
caller. Norms inside a unit have no parameters, as in the authors' code.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.models.backbones import check_heads, from_encoder, item_inputs
from pin_jax.models.layers import Dropout, product, reads
from pin_jax.types import Backbone, Rows

_INIT = nn.initializers.normal(0.02)


class _Unit(nn.Module):
  length: int
  heads: int
  dropout: float

  @nn.compact
  def __call__(self, x: jax.Array, windows: jax.Array) -> jax.Array:
    rows, now, width = x.shape
    norm = nn.LayerNorm(use_bias=False, use_scale=False)
    project = nn.Dense(4 * width, use_bias=False, kernel_init=_INIT)
    bias = self.param("positions", _INIT, (self.length,))
    u, *vqk = jnp.split(jax.nn.silu(project(norm(x))), 4, -1)
    by_head = (rows, now, self.heads, width // self.heads)
    v, q, k = (h.reshape(by_head) for h in vqk)
    distance = np.subtract.outer(np.arange(now), np.arange(now))
    logits = product("bqhd,bkhd->bhqk", q, k)
    logits = logits + bias[np.maximum(distance, 0)]
    weights = jax.nn.silu(logits) / self.length
    weights = jnp.where(reads(windows)[:, None], weights, 0)
    weights = weights.astype(x.dtype)
    read = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    gated = Dropout(self.dropout)(norm(read) * u)
    out = nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())
    return x + out(gated)


class _Encoder(nn.Module):
  num_items: int
  length: int
  width: int
  blocks: int
  heads: int
  dropout: float

  @nn.compact
  def __call__(self, rows: Rows) -> jax.Array:
    x = item_inputs(self, rows, self.num_items, self.width)
    x = Dropout(self.dropout)(x)
    for _ in range(self.blocks):
      x = _Unit(self.length, self.heads, self.dropout)(x, rows.windows)
    return nn.LayerNorm()(x) * (rows.items > 0)[..., None]


def hstu(
  num_items: int,
  *,
  length: int = 50,
  width: int = 64,
  blocks: int = 2,
  heads: int = 2,
  dropout: float = 0.2,
) -> Backbone:
  """Builds HSTU: pointwise aggregated attention, gated, no softmax.

    U, V, Q, K = split(silu(W_1 norm(X)))
    A          = silu(Q K^T + b_(i-j)) / N, masked
    X          = X + W_2 (norm(A V) * U) + b_2

  N is `length`, the longest history, as in the paper: neither padding nor the
  length of the window changes it. The norm that follows takes it out but for
  its epsilon. logit(v) = <h_t, E_v> + b_v.

  Args:
    num_items: V.
    length: N, longest history L that the model reads.
    width: D, a multiple of `heads`; all heads together have D columns.
    blocks: units.
    heads: of the attention.
    dropout: rate in [0, 1) on embeddings and ahead of W_2.

  Raises:
    InputError: if `width` is no multiple of `heads`.
  """
  check_heads(width, heads)
  encoder = _Encoder(num_items, length, width, blocks, heads, dropout)
  return from_encoder(encoder, length)
