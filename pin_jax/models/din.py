"""DIN (Zhou et al., KDD 2018, arXiv 1706.06978).

Deviations from the paper: items alone, no user profile and no context features;
PReLU where the paper prefers Dice, whose batch statistics would make a user's
scores depend on the others of the batch; dropout on the history in place of
the mini-batch aware regulariser; the loss is left to the caller. As published,
the attention has no softmax and the model knows no order of the history. The
difference e_h - e_c among the activation unit's inputs and the product among
those of the last network are from the authors' code.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from pin_jax.models.backbones import ACTIVENESS, as_rows, embed_activeness
from pin_jax.models.layers import dropout as drop
from pin_jax.models.layers import lookup
from pin_jax.types import Backbone, PyTree, Rows

_MAX_ELEMENTS = 2**24  # activations of the unit that are alive at a time


class _ActivationUnit(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, past: jax.Array, candidates: jax.Array) -> jax.Array:
    """Weights [M, L, C] of past [M, L, D] for candidates [(M,) C, D].

    W [e_h, e_c, e_h - e_c, e_h * e_c] is a sum of what the item gives, what the
    candidate gives and one product, so that no [M, L, C, 4 D] is formed.
    """
    width = past.shape[-1]
    kernel = self.param(
      "kernel", nn.initializers.lecun_normal(), (4 * width, self.hidden)
    )
    bias = self.param("bias", nn.initializers.zeros, (self.hidden,))
    item, candidate, difference, product = jnp.split(kernel, 4)
    of_item = past @ (item + difference)
    of_candidate = candidates @ (candidate - difference) + bias
    mixed = candidates[..., None, :] * product.T  # [(M,) C, H, D]
    rows = "m" if candidates.ndim == 3 else ""
    h = jnp.einsum(f"mld,{rows}chd->mlch", past, mixed)
    if not rows:
      of_candidate = of_candidate[None]
    h = nn.PReLU()(h + of_item[:, :, None] + of_candidate[:, None])
    return nn.Dense(1)(h)[..., 0]


class _Predictor(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, read: jax.Array, candidates: jax.Array) -> jax.Array:
    """Logits [M, C] of what was read [M, 1 or C, D] and [(M,) C, D]."""
    product = read * candidates
    parts = (jnp.broadcast_to(x, product.shape) for x in (read, candidates))
    h = jnp.concatenate([*parts, product], -1)
    for size in (self.hidden, max(self.hidden // 2, 1)):
      h = nn.PReLU()(nn.Dense(size)(h))
    return nn.Dense(1, dtype=jnp.float32)(h)[..., 0]


def din(
  num_items: int,
  *,
  length: int = 50,
  width: int = 64,
  attention_hidden: int = 36,
  hidden: int = 80,
  dropout: float = 0.2,
) -> Backbone:
  """Builds DIN: the candidate decides what is read of the history.

    a(h, c)  = w PReLU(W [e_h, e_c, e_h - e_c, e_h * e_c] + b) + b_a
    r_c      = sum over the history of a(h, c) e_h
    logit(c) = MLP([r_c, e_c, r_c * e_c])

  `represent` takes candidates in chunks whose activations are formed again in
  the backward pass: memory is that of one chunk and of the result [M, C, D].
  Every candidate costs L D `attention_hidden` products: train on sampled ones.

  Args:
    num_items: V.
    length: longest history L; no parameter depends on it.
    width: D.
    attention_hidden: width of the activation unit.
    hidden: width of the last network; its second layer has half of it.
    dropout: rate in [0, 1) at which history items are left out, rescaled.
  """
  unit, predictor = _ActivationUnit(attention_hidden), _Predictor(hidden)
  indices = lambda x: jnp.arange(num_items + 1) if x is None else x

  def init(key: jax.Array) -> PyTree:
    keys = jax.random.split(key, 3)
    one = jnp.zeros((1, 1, width))
    normal = nn.initializers.normal(width**-0.5)
    return {
      "items": normal(keys[0], (num_items + 1, width)),
      "unit": unit.init(keys[1], one, one)["params"],
      "predictor": predictor.init(keys[2], one, one)["params"],
    }

  def encode(
    params: PyTree, history: jax.Array | Rows, key: jax.Array | None = None
  ) -> tuple[jax.Array, ...]:
    del params
    items, windows, _, activeness = as_rows(history, length)
    factors = (items > 0).astype(jnp.float32)
    if key is not None:
      factors = drop(factors, dropout, key)
    known = () if activeness is None else (activeness,)
    return items, factors, windows, *known

  def represent(
    params: PyTree, states: tuple, candidates: jax.Array | None
  ) -> jax.Array:
    items, factors, *known = states
    past = lookup(params["items"], items)
    for activeness in known:
      added = embed_activeness(params[ACTIVENESS], activeness)
      past += added[:, None]

    def pool(index: jax.Array) -> jax.Array:
      embedded = lookup(params["items"], index)
      weights = _within(unit, params["unit"], past, embedded)
      weights = (weights * factors[..., None]).astype(past.dtype)
      return jnp.einsum("mlc,mld->mcd", weights, past)

    size = max(_MAX_ELEMENTS // (items.size * attention_hidden), 1)
    return _in_chunks(pool, indices(candidates), size)

  def score(
    params: PyTree, representations: jax.Array, candidates: jax.Array | None
  ) -> jax.Array:
    embedded = lookup(params["items"], indices(candidates))
    return _within(predictor, params["predictor"], representations, embedded)

  return Backbone(init, encode, _prefix, represent, score)


def _within(module: nn.Module, params: PyTree, *args: jax.Array) -> jax.Array:
  return module.apply({"params": params}, *args)


def _prefix(
  context: tuple[jax.Array, ...], rows: jax.Array, columns: jax.Array
) -> tuple[jax.Array, ...]:
  """Items [M, L], factors [M, L], 0 behind the column; activeness [M]."""
  items, factors, windows, *known = context
  seen = jnp.arange(items.shape[1]) <= columns[:, None]
  seen &= windows[rows] == windows[rows, columns][:, None]
  return items[rows], factors[rows] * seen, *(x[rows, columns] for x in known)


def _in_chunks(
  pool: Callable[[jax.Array], jax.Array], index: jax.Array, size: int
) -> jax.Array:
  """pool(index) [M, C, D] in chunks of `size` candidates."""
  count = index.shape[-1]
  if size >= count:
    return pool(index)
  pad = [(0, 0)] * (index.ndim - 1) + [(0, -count % size)]
  chunks = jnp.pad(index, pad).reshape(*index.shape[:-1], -1, size)
  pooled = jax.lax.map(jax.checkpoint(pool), jnp.moveaxis(chunks, -2, 0))
  pooled = jnp.moveaxis(pooled, 0, 1)  # [M, chunks, size, D]
  return pooled.reshape(pooled.shape[0], -1, pooled.shape[-1])[:, :count]
