"""What the steps minimise: weighted next-item losses of windows and groups."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pin_jax import aggregation
from pin_jax.models import packing, plugins
from pin_jax.models.backbones import given
from pin_jax.scale import sharding
from pin_jax.scale.sharding import LOCAL, Layout
from pin_jax.training import losses
from pin_jax.training.chunks import RowLoss, accumulated, chunked
from pin_jax.training.losses import SOFTMAX, LossSpec
from pin_jax.training.negatives import Negatives
from pin_jax.types import Backbone, Batch, Plugin, PyTree

MEANS = ("interactions", "users")
CHUNK = 128  # positions whose logits are alive at a time, on each device
Head = Callable[[PyTree, PyTree, PyTree, jax.Array | None], jax.Array]
WindowsLoss = Callable[..., tuple[jax.Array, jax.Array]]


def position_weights(
  targets: jax.Array, mean: str, importance: jax.Array | None = None
) -> jax.Array:
  """Weights of the positions in a group's loss.

  mean = 'interactions' weights every real position alike, mean = 'users'
  every row alike and the positions within it alike; their sum is 1. Importance
  weights >= 0 multiply these. Their sum is left as it is: dividing by it, group
  by group, would make another prior of P(d) where a group has less of it.
  Targets (0 = none), importance and the result are [B, L].
  """
  real = (targets > 0).astype(jnp.float32)
  if mean == "users":
    real = real / jnp.maximum(real.sum(-1, keepdims=True), 1)
  real = real / jnp.maximum(real.sum(), jnp.finfo(jnp.float32).tiny)
  return real if importance is None else real * importance


def plugin_head(backbone: Backbone, plugin: Plugin) -> Head:
  """The head of stage 2; its states are those of `with_plugin_context`.

  Returns:
    (plugin params, (backbone params, evidence), (states [M], PluginContext [M]
    or None), candidates) -> [M, C].
  """
  model = plugins.Model(backbone, plugin)

  def head(
    params: PyTree, shared: PyTree, states: PyTree, candidates: jax.Array | None
  ) -> jax.Array:
    frozen, evidence = shared
    weights = plugins.Weights(frozen, params, evidence)
    return plugins.logits(model, weights, *states, candidates)

  return head


def with_plugin_context(backbone: Backbone) -> Backbone:
  """The backbone over contexts (its own, PluginContext [B, L] or None)."""

  def at(context: PyTree, rows: jax.Array, columns: jax.Array) -> PyTree:
    own, of_plugin = context
    of_plugin = jax.tree.map(lambda x: x[rows, columns], of_plugin)
    return backbone.at(own, rows, columns), of_plugin

  return backbone._replace(at=at)


def _row_loss(spec: LossSpec, head: Head) -> RowLoss:
  """The loss at each of M positions, for `chunked`."""

  def rows(
    params: PyTree, shared: PyTree, states: PyTree, constants: PyTree
  ) -> jax.Array:
    (frozen, common), (targets, own) = shared, constants
    if spec.loss is None:
      logits = head(params, frozen, states, None)
      real = jnp.arange(logits.shape[-1]) > 0
      loss = losses.softmax_cross_entropy(logits, targets, real)
    else:
      items, log_counts = common if own is None else own
      targets = targets[:, None]
      positive = head(params, frozen, states, targets)[:, 0]
      negatives = head(params, frozen, states, items)
      where = (items > 0) & (items != targets)
      loss = spec.loss(positive, negatives, log_counts, where)
    return losses.focal(loss, spec.focusing) if spec.focusing else loss

  return rows


def next_item_loss(
  backbone: Backbone, head: Head, *, loss: LossSpec = SOFTMAX,
  layout: Layout = LOCAL,
) -> WindowsLoss:
  """The loss at every real position.

  Args:
    backbone: gives the states of the positions.
    head: (params, shared, states [M], candidates) -> logits [M, C]; no
      candidates are the whole catalogue 0..V.
    loss: what is minimised.
    layout: how the windows are split over devices.

  Returns:
    f(params, shared, context, targets [B, L], weights [B, L],
    scale [B, L] or None, negatives that `loss` draws, by default None) ->
    (sum of scale * weights * loss, weights * loss [B, L]).
  """
  axis = sharding.SHARDS if layout.data > 1 else None
  total = chunked(_row_loss(loss, head), CHUNK, axis)

  def run(
    params: PyTree, shared: PyTree, context: PyTree, targets: jax.Array,
    weights: jax.Array, scale: jax.Array | None = None,
    negatives: Negatives | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    scale = jnp.ones(targets.shape) if scale is None else scale
    order = jnp.argsort(targets.reshape(-1) == 0, stable=True)  # real first
    rows, columns = order // targets.shape[-1], order % targets.shape[-1]
    states = backbone.at(context, rows, columns)
    common, own = negatives, None
    if negatives is not None and negatives.items.ndim == 2:
      position = rows * targets.shape[1] + columns
      common, own = None, jax.tree.map(lambda x: x[position], negatives)
    value, of_rows = total(
      params, (shared, common), states, (targets[rows, columns], own),
      weights[rows, columns], scale[rows, columns],
    )
    return value, jnp.zeros(targets.shape).at[rows, columns].set(of_rows)

  return sharding.over_shards(run, layout)


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


def _keys(spec: LossSpec, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A group's keys for dropout and the negatives; one key where none are."""
  return (key, key) if spec.loss is None else tuple(jax.random.split(key))


def group_negatives(
  spec: LossSpec, keys: jax.Array, batch: Batch
) -> Negatives | None:
  """What the losses of G groups draw from their keys [G]; [G, ...]."""
  draw = lambda key, batch: spec.draw(_keys(spec, key)[1], batch)
  return jax.vmap(draw)(keys, batch)


def group_losses(
  backbone: Backbone, *, mean: str, loss: LossSpec = SOFTMAX,
  layout: Layout = LOCAL,
) -> GroupLosses:
  """The mean next-item loss of a group, and of many at once.

  Args:
    backbone: the model.
    mean: see `position_weights`.
    loss, layout: see `next_item_loss`.
  """
  head = lambda params, shared, states, candidates: backbone.score(
    params, backbone.represent(params, states, candidates), candidates
  )
  total = windows_loss(
    next_item_loss(backbone, head, loss=loss, layout=layout), backbone, layout
  )

  def group_loss(
    params: PyTree, group: GroupBatch, key: jax.Array
  ) -> jax.Array:
    drop_key, draw_key = _keys(loss, key)
    weights = position_weights(group.batch.targets, mean, group.importance)
    negatives = group.negatives
    if negatives is None:
      negatives = loss.draw(draw_key, group.batch)
    one = jax.tree.map(lambda x: x[None], (group.batch, weights))
    return total(
      params, *one, jnp.ones(1), drop_key[None], negatives=negatives
    )[0]

  def weighted_loss(
    params: PyTree, groups: GroupBatch, keys: jax.Array, weights: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    of_positions = jax.vmap(
      lambda targets, importance: position_weights(targets, mean, importance)
    )(groups.batch.targets, groups.importance)
    value, of_groups = total(params, groups.batch, of_positions, weights, keys)
    return value, of_groups.sum((1, 2))

  return GroupLosses(group_loss, weighted_loss if loss.loss is None else None)


def windows_loss(
  loss: WindowsLoss, backbone: Backbone, layout: Layout = LOCAL
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
  turned = (lambda x: jnp.swapaxes(x, 0, 1)) if layout.data > 1 else lambda x: x
  merge = lambda x: _merge(turned(x))

  def stacks(x: jax.Array, groups: int) -> jax.Array:
    split = (-1, groups) if layout.data > 1 else (groups, -1)
    return turned(x.reshape(*split, *x.shape[1:]))

  def plain(
    params: PyTree, batch: Batch, weights: jax.Array, factors: jax.Array,
    keys: jax.Array, negatives: Negatives | None,
  ) -> tuple[jax.Array, jax.Array]:
    """One window a row."""
    encode = lambda history, activeness, key: backbone.encode(
      params, given(backbone, history, activeness), key
    )
    read = batch.history, batch.activeness
    if len(keys) == 1:
      context = encode(*read, keys[0])
    else:
      each = jax.tree.map(lambda x: stacks(x, len(keys)), read)
      context = jax.tree.map(merge, jax.vmap(encode)(*each, keys))
    return loss(
      params, None, context, batch.targets, weights, factors, negatives
    )

  of_layout = _packed_loss(loss, backbone) if backbone.packed else plain

  def run(
    params: PyTree, batch: Batch, weights: jax.Array, scale: jax.Array,
    keys: jax.Array, negatives: Negatives | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    factors = jnp.broadcast_to(scale[:, None, None], weights.shape)
    merged = jax.tree.map(merge, (batch, weights, factors))
    value, of_windows = of_layout(params, *merged, keys, negatives)
    return value, stacks(of_windows, len(weights))

  return run


def _merge(x: jax.Array) -> jax.Array:
  return x.reshape(-1, *x.shape[2:])


def _packed_loss(loss: WindowsLoss, backbone: Backbone) -> WindowsLoss:
  """The same over packed rows; dropout follows from the first key and chunk.
  """

  def chunk_loss(
    params: PyTree, shared: PyTree, inputs: None, constants: PyTree
  ) -> tuple[jax.Array, jax.Array]:
    batch, weights, factors, key, common, own = shared
    source, index = jax.tree.map(lambda x: x[0], constants)
    history = given(backbone, batch.history, batch.activeness)
    context = backbone.encode(
      params, packing.rows_of(history, source), jax.random.fold_in(key, index)
    )
    targets, weights, factors = (
      packing.take(x, source) for x in (batch.targets, weights, factors)
    )
    if own is not None:
      place = jnp.maximum(source.reshape(-1), 0)
      common = jax.tree.map(lambda x: x[place], own)
    value, of_rows = loss(
      params, None, context, targets, weights, factors, common
    )
    return value, of_rows[None]

  total = accumulated(chunk_loss, 1, 1)

  def run(
    params: PyTree, batch: Batch, weights: jax.Array, factors: jax.Array,
    keys: jax.Array, negatives: Negatives | None,
  ) -> tuple[jax.Array, jax.Array]:
    packed = packing.pack(batch.history)
    source = packing.source_chunks(packed, backbone.packed)
    own = negatives is not None and negatives.items.ndim == 2
    negatives = (None, negatives) if own else (negatives, None)
    value, of_rows = total(
      params, (batch, weights, factors, keys[0], *negatives), None,
      (source, jnp.arange(len(source))), -(-packed.used // backbone.packed),
    )
    return value, packing.take(_merge(of_rows), packed.place)

  return run
