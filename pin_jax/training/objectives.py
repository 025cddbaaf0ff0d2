"""What the steps minimise: weighted next-item losses of windows and groups."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pin_jax import aggregation
from pin_jax.models import packing, plugins
from pin_jax.models.conditioned import given
from pin_jax.scale import sharding
from pin_jax.scale.sharding import LOCAL, Layout
from pin_jax.training import criteria
from pin_jax.training.criteria import SOFTMAX, Criterion, Head
from pin_jax.training.losses import accumulated, chunked
from pin_jax.training.negatives import Negatives
from pin_jax.types import Backbone, Batch, Plugin, PyTree

MEANS = ("interactions", "users")


def position_weights(
  targets: jax.Array, mean: str, importance: jax.Array | None = None
) -> jax.Array:
  """Weights of the positions in a group's loss.

  mean = 'interactions' weights every real position alike, mean = 'users'
  every row alike and the positions within it alike; their sum is 1. Importance
  weights multiply these. Their sum is left as it is: dividing by it, group by
  group, would make another prior of P(d) where a group has less of it.

  Args:
    targets: [B, L], 0 = none.
    mean: 'interactions' or 'users'.
    importance: optional [B, L] weights >= 0.

  Returns:
    [B, L] float32.
  """
  real = (targets > 0).astype(jnp.float32)
  if mean == "users":
    real = real / jnp.maximum(real.sum(-1, keepdims=True), 1)
  real = real / jnp.maximum(real.sum(), jnp.finfo(jnp.float32).tiny)
  return real if importance is None else real * importance


def backbone_head(backbone: Backbone) -> Head:
  """(params, None, states [M], candidates) -> logits [M, C], no plugin."""

  def head(
    params: PyTree, shared: PyTree, states: PyTree, candidates: jax.Array | None
  ) -> jax.Array:
    del shared
    representations = backbone.represent(params, states, candidates)
    return backbone.score(params, representations, candidates)

  return head


def plugin_head(backbone: Backbone, plugin: Plugin) -> Head:
  """The head of stage 2; its context is that of `with_reading`.

  Returns:
    (plugin params, (backbone params, evidence), (states [M], Reading [M]),
    candidates) -> [M, C].
  """

  def head(
    params: PyTree, shared: PyTree, states: PyTree, candidates: jax.Array | None
  ) -> jax.Array:
    return plugins.logits(
      backbone, plugin, params, *shared, *states, candidates
    )

  return head


def with_reading(backbone: Backbone) -> Backbone:
  """The backbone over contexts (context, Reading [B, L] or None)."""

  def at(context: PyTree, rows: jax.Array, columns: jax.Array) -> PyTree:
    own, reading = context
    reading = jax.tree.map(lambda x: x[rows, columns], reading)
    return backbone.at(own, rows, columns), reading

  return backbone._replace(at=at)


def next_item_loss(
  backbone: Backbone,
  head: Head,
  *,
  criterion: Criterion = SOFTMAX,
  chunk: int = 128,
  layout: Layout = LOCAL,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """The criterion at every real position.

  Args:
    backbone: gives the states of the positions.
    head: turns states and candidates into logits.
    criterion: what is minimised.
    chunk: positions whose logits are alive at a time, on each device.
    layout: how the windows are split over devices.

  Returns:
    f(params, shared, context, targets [B, L], weights [B, L],
    scale [B, L] or None, negatives as `criteria.draw` gives them, by default
    None) -> (sum of scale * weights * loss, weights * loss [B, L]).
  """
  total = chunked(
    criteria.row_loss(criterion, head), chunk, sharding.shards_axis(layout)
  )

  def loss(
    params: PyTree,
    shared: PyTree,
    context: PyTree,
    targets: jax.Array,
    weights: jax.Array,
    scale: jax.Array | None = None,
    negatives: Negatives | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    scale = jnp.ones(targets.shape) if scale is None else scale
    rows, columns = real_first(targets)
    states = backbone.at(context, rows, columns)
    common, own = negatives, None
    if negatives is not None and negatives.items.ndim == 2:
      position = rows * targets.shape[1] + columns
      common, own = None, jax.tree.map(lambda x: x[position], negatives)
    value, losses = total(
      params, (shared, common), states, (targets[rows, columns], own),
      weights[rows, columns], scale[rows, columns],
    )
    return value, jnp.zeros(targets.shape).at[rows, columns].set(losses)

  return sharding.over_shards(loss, layout)


def real_first(targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(rows, columns) of all positions, those with a target first; [B * L]."""
  order = jnp.argsort(targets.reshape(-1) == 0, stable=True)
  return order // targets.shape[-1], order % targets.shape[-1]


class GroupBatch(NamedTuple):
  """One group's windows.

  Attributes:
    batch: the windows.
    importance: [B, L] weights of the examples, or None.
    negatives: drawn beforehand; by default the group's key draws them.
  """

  batch: Batch
  importance: jax.Array | None
  negatives: Negatives | None = None


class GroupLosses(NamedTuple):
  """The groups' losses in the forms that `aggregation.aggregate` takes.

  Attributes:
    group_loss: (params, GroupBatch, key) -> scalar.
    weighted_loss: (params, GroupBatch [G], keys [G], weights [G]) ->
      (sum_g w_g L_g, losses [G]): one softmax over the positions of all groups;
      None for sampled negatives, which are each group's own.
  """

  group_loss: aggregation.GroupLoss
  weighted_loss: aggregation.WeightedLoss | None


def group_losses(
  backbone: Backbone,
  *,
  mean: str,
  criterion: Criterion = SOFTMAX,
  chunk: int = 128,
  layout: Layout = LOCAL,
) -> GroupLosses:
  """The mean next-item loss of a group, and of many at once.

  Args:
    backbone: the model.
    mean: see `position_weights`.
    criterion: what is minimised at every position.
    chunk: positions whose logits are alive at a time, on each device.
    layout: how windows and tables are split over devices.
  """
  loss = windows_loss(next_item_loss(
    backbone, backbone_head(backbone), criterion=criterion, chunk=chunk,
    layout=layout,
  ), backbone, layout)

  def group_loss(
    params: PyTree, group: GroupBatch, key: jax.Array
  ) -> jax.Array:
    drop_key, draw_key = criteria.split_key(criterion, key)
    batch = group.batch
    weights = position_weights(batch.targets, mean, group.importance)
    negatives = group.negatives
    if negatives is None:
      negatives = criteria.draw(criterion, draw_key, batch)
    one = jax.tree.map(lambda x: x[None], (batch, weights))
    return loss(
      params, *one, jnp.ones(1), drop_key[None], negatives=negatives
    )[0]

  def weighted_loss(
    params: PyTree, groups: GroupBatch, keys: jax.Array, weights: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    of_positions = jax.vmap(
      lambda targets, importance: position_weights(targets, mean, importance)
    )(groups.batch.targets, groups.importance)
    value, losses = loss(params, groups.batch, of_positions, weights, keys)
    return value, losses.sum((1, 2))

  fused = weighted_loss if criterion.draw is None else None
  return GroupLosses(group_loss, fused)


WindowsLoss = Callable[..., tuple[jax.Array, jax.Array]]


def windows_loss(
  loss: Callable[..., tuple], backbone: Backbone, layout: Layout = LOCAL
) -> WindowsLoss:
  """The loss of G stacks of windows, packed where the backbone is.

  Args:
    loss: as `next_item_loss` returns it.
    backbone: encodes the windows.
    layout: where rows are split, a row's windows of all groups stay together.

  Returns:
    f(params, batch [G, B], weights [G, B, L], scale [G], keys [G], negatives or
    None) -> (sum of scale * weights * loss, weights * loss [G, B, L]).
  """
  merge, part = _merge, _part
  if layout.data > 1:
    merge = lambda x: _merge(jnp.swapaxes(x, 0, 1))
    part = lambda x, groups: jnp.swapaxes(
      x.reshape(-1, groups, *x.shape[1:]), 0, 1
    )
  if backbone.packed:
    of_layout = _packed_loss(loss, backbone)
  else:
    of_layout = _plain_loss(loss, backbone, merge, part)

  def run(
    params: PyTree,
    batch: Batch,
    weights: jax.Array,
    scale: jax.Array,
    keys: jax.Array,
    negatives: Negatives | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    factors = jnp.broadcast_to(scale[:, None, None], weights.shape)
    merged = jax.tree.map(merge, (batch, weights, factors))
    value, losses = of_layout(params, *merged, keys, negatives)
    return value, part(losses, len(weights))

  return run


def _merge(x: jax.Array) -> jax.Array:
  return x.reshape(-1, *x.shape[2:])


def _part(x: jax.Array, groups: int) -> jax.Array:
  return x.reshape(groups, -1, *x.shape[1:])


def _plain_loss(
  loss: Callable[..., tuple], backbone: Backbone, merge: Callable,
  part: Callable,
) -> WindowsLoss:
  """One window a row: (params, batch [G B], weights, factors, keys [G], …)."""

  def run(
    params: PyTree, batch: Batch, weights: jax.Array, factors: jax.Array,
    keys: jax.Array, negatives: Negatives | None,
  ) -> tuple[jax.Array, jax.Array]:
    encode = lambda history, key: backbone.encode(params, history, key)
    history = given(params, batch.history, batch.activeness)
    if len(keys) == 1:
      context = encode(history, keys[0])
    else:
      stacks = jax.tree.map(lambda x: part(x, len(keys)), history)
      context = jax.tree.map(merge, jax.vmap(encode)(stacks, keys))
    return loss(
      params, None, context, batch.targets, weights, factors, negatives
    )

  return run


def _packed_loss(loss: Callable[..., tuple], backbone: Backbone) -> WindowsLoss:
  """`_plain_loss` over packed rows, `backbone.packed` of them at a time.

  The gradient is formed in the forward pass, chunk by chunk. Without dropout
  value and gradient equal the plain ones up to rounding; with dropout the masks
  follow from the first key and the chunk.
  """

  def part(
    params: PyTree, shared: PyTree, inputs: None, constants: PyTree
  ) -> tuple[jax.Array, jax.Array]:
    batch, weights, factors, key, common, own = shared
    source, index = jax.tree.map(lambda x: x[0], constants)
    history = given(params, batch.history, batch.activeness)
    context = backbone.encode(
      params, packing.rows_of(history, source), jax.random.fold_in(key, index)
    )
    targets, weights, factors = (
      packing.take(x, source) for x in (batch.targets, weights, factors)
    )
    if own is not None:
      place = jnp.maximum(source.reshape(-1), 0)
      common = jax.tree.map(lambda x: x[place], own)
    value, losses = loss(
      params, None, context, targets, weights, factors, common
    )
    return value, losses[None]

  total = accumulated(part, 1, 1)

  def run(
    params: PyTree, batch: Batch, weights: jax.Array, factors: jax.Array,
    keys: jax.Array, negatives: Negatives | None,
  ) -> tuple[jax.Array, jax.Array]:
    packed = packing.pack(batch.history)
    source = packing.source_chunks(packed, backbone.packed)
    own = negatives is not None and negatives.items.ndim == 2
    negatives = (None, negatives) if own else (negatives, None)
    value, losses = total(
      params, (batch, weights, factors, keys[0], *negatives), None,
      (source, jnp.arange(len(source))), -(-packed.used // backbone.packed),
    )
    return value, packing.take(_merge(losses), packed.place)

  return run
