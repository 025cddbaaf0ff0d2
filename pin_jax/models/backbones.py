"""What backbones share: rows of items in, logits tied to the item table out.

A new backbone is one file with one function: a Flax module that maps `Rows` to
states [B, L, D] and starts from `item_inputs`, made a `Backbone` by
`from_encoder`. One that attends to the candidate brings its own `represent` and
`score`, as `din` does.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from pin_jax.models.layers import lookup, product
from pin_jax.types import Backbone, InputError, PyTree, Rows

TABLES = ("items", "bias")  # what `tied_score` reads
ACTIVENESS = "activeness"  # the params that `conditioned` adds
_BUCKETS = 16


def check_heads(width: int, heads: int) -> None:
  """Raises InputError unless `heads` divide `width`."""
  if heads < 1 or width % heads:
    raise InputError(
      f"width={width} is no multiple of heads={heads}; change one of them"
    )


def as_rows(history: jax.Array | Rows, length: int) -> Rows:
  """One history a row, if they are not laid out in rows already.

  Raises:
    InputError: if the rows are longer than the backbone reads.
  """
  rows = history if isinstance(history, Rows) else _one_a_row(history)
  if rows.items.shape[-1] > length:
    raise InputError(
      f"a history of {rows.items.shape[-1]} is longer than length={length}; "
      "raise it or cut the history"
    )
  return rows


def _one_a_row(history: jax.Array, activeness: jax.Array | None = None) -> Rows:
  """Rows of one history each; activeness [B, L]."""
  history = jnp.asarray(history)
  later = jnp.arange(history.shape[-1] - 1, -1, -1)
  return Rows(history, (history > 0).astype(jnp.int32), later, activeness)


def item_inputs(
  module: nn.Module, rows: Rows, num_items: int, width: int
) -> jax.Array:
  """What a module reads, sqrt(D) E[items]; [B, L, D].

  Adds the params `items` E [V+1, D] and `bias` [V+1] to the module. Rows with
  activeness have its embedding added, see `conditioned`.
  """
  table = module.param(
    "items", nn.initializers.normal(width**-0.5), (num_items + 1, width)
  )
  module.param("bias", nn.initializers.zeros, (num_items + 1,))
  x = lookup(table, rows.items) * math.sqrt(width)
  if rows.activeness is None:
    return x
  added = module.get_variable("params", ACTIVENESS)
  return x + embed_activeness(added, rows.activeness)


def from_encoder(encoder: nn.Module, length: int) -> Backbone:
  """A backbone whose states ignore the candidate, with tied output.

    logit(v) = <h_t, E_v> + b_v

  Args:
    encoder: maps Rows to states [B, L, D], has a field `num_items` and calls
      `item_inputs`; reads the rng 'dropout' where there is one.
    length: longest history.

  Returns:
    The backbone; its `encode` raises InputError for a longer history.
  """

  def init(key: jax.Array) -> PyTree:
    nothing = as_rows(jnp.zeros((1, length), jnp.int32), length)
    return encoder.init(key, nothing)["params"]

  def encode(
    params: PyTree, history: jax.Array | Rows, key: jax.Array | None = None
  ) -> jax.Array:
    rngs = None if key is None else {"dropout": key}
    sized = encoder.clone(num_items=len(params["items"]) - 1)
    return sized.apply({"params": params}, as_rows(history, length), rngs=rngs)

  return Backbone(
    init, encode, lambda context, rows, columns: context[rows, columns],
    lambda params, states, candidates: states[:, None], tied_score, TABLES,
  )


def tied_score(
  params: PyTree, representations: jax.Array, candidates: jax.Array | None
) -> jax.Array:
  """Logits [M, C] = <r, E_v> + b_v against the item table, in float32.

  Args:
    params: holds `items` E [V+1, D] and `bias` b [V+1].
    representations: r, [M, 1 or C, D], of any float type.
    candidates: [C], [M, C] or None, as in `types.Backbone`.
  """
  table, bias = params["items"], params["bias"]
  if candidates is not None:
    table, bias = lookup(table, candidates), bias[candidates]
  ours, theirs = "mcd", "cd" if table.ndim == 2 else "mcd"
  if representations.shape[1] == 1:
    ours, representations = "md", representations[:, 0]
  return product(f"{ours},{theirs}->mc", representations, table) + bias


def conditioned(backbone: Backbone) -> Backbone:
  """The backbone that reads each user's activeness: P(Y|X,d). Ours.

    x_t = E[item_t] + A[min(floor(log2 n), 15)], A = 0 at the start

  with E the scaled item embedding that the model reads at position t and n the
  user's training interactions (a new user's: those given). The params get A
  [16, D] as `activeness`; at the start the model is the plain one. A control:
  does a method gain because it adjusts for activeness, or would a base that is
  simply told of it gain as much?

  Args:
    backbone: one with params `items` [V+1, D].

  Returns:
    The backbone; its `encode` takes Rows with activeness, which `given` makes,
    and raises ValueError for others.
  """

  def init(key: jax.Array) -> PyTree:
    params = backbone.init(key)
    width = params["items"].shape[-1]
    return {**params, ACTIVENESS: jnp.zeros((_BUCKETS, width))}

  def encode(
    params: PyTree, history: Rows, key: jax.Array | None = None
  ) -> PyTree:
    if getattr(history, "activeness", None) is None:
      raise ValueError("the backbone reads activeness; give the users'")
    return backbone.encode(params, history, key)

  return backbone._replace(init=init, encode=encode, reads_activeness=True)


def given(
  backbone: Backbone, history: jax.Array, activeness: jax.Array | None
) -> jax.Array | Rows:
  """What `encode` reads of [B, L]: with activeness [B] if the backbone does."""
  if not backbone.reads_activeness or activeness is None:
    return history
  spread = jnp.broadcast_to(activeness[:, None], history.shape)
  return _one_a_row(history, spread)


def embed_activeness(table: jax.Array, activeness: jax.Array) -> jax.Array:
  """Rows of A; [...] int32 numbers of interactions -> [..., D]."""
  bits = 31 - jax.lax.clz(jnp.maximum(activeness, 1).astype(jnp.int32))
  return lookup(table, jnp.minimum(bits, len(table) - 1))
