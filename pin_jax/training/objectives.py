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
from pin_jax.training import criteria
from pin_jax.training.criteria import SOFTMAX, Criterion, Head
from pin_jax.training.losses import accumulated, chunked
from pin_jax.training.negatives import Negatives
from pin_jax.types import Backbone, Batch, Plugin, PyTree

MEANS = ("interactions", "users")
_ITEM_BLOCK = 4096


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
    gramians: (params, GroupBatch [G], keys [G]) -> (losses [G], [G, G] of
      every leaf), in blocks of items; None for sampled negatives, a focal loss,
      or where the backbone has no table.
  """

  group_loss: aggregation.GroupLoss
  weighted_loss: aggregation.WeightedLoss | None
  gramians: aggregation.Gramians | None


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

  if criterion.draw is not None:
    return GroupLosses(group_loss, None, None)
  gramians = None
  if backbone.tables and layout.model == 1 and not criterion.focusing:
    gramians = table_gramians(backbone, mean=mean, chunk=chunk)
  return GroupLosses(group_loss, weighted_loss, gramians)


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
    history = given(backbone, batch.history, batch.activeness)
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


class _FirstPass(NamedTuple):
  """What is left of a group once its loss is known: no table, no logits.

  Attributes:
    loss: scalar.
    others: gradient of the params that are no table.
    items: [B * L] the history's items.
    lookups: gradient of their rows, by table.
    states: [B * L, ...] states, those with a target first.
    targets: [B * L] their targets.
    weights: [B * L] their weights.
    log_norms: [B * L] log sum_v exp(logit_v).
  """

  loss: jax.Array
  others: PyTree
  items: jax.Array
  lookups: dict[str, jax.Array]
  states: PyTree
  targets: jax.Array
  weights: jax.Array
  log_norms: jax.Array


def table_gramians(
  backbone: Backbone, *, mean: str, chunk: int = 128, block: int = _ITEM_BLOCK
) -> aggregation.Gramians:
  """Gramians of the group gradients without G gradients of the item table.

  A group's gradient of the table has two parts: rows that its histories look up
  (a few), and sum_i w_i (softmax_iv - [v = target_i]) r_i of the softmax (all
  rows). The first pass keeps the lookups' gradients, the states and the
  softmax's normalisers; the second forms the gradients of a block of items, of
  all groups, adds up their products and forgets them. Ours.

  Args:
    backbone: one with tables.
    mean: see `position_weights`.
    chunk: positions whose logits are alive at a time.
    block: items whose gradients are alive at a time.
  """
  head = backbone_head(backbone)

  def split_head(
    others: PyTree, tables: PyTree, states: PyTree, candidates: None
  ) -> jax.Array:
    return head({**others, **tables}, None, states, candidates)

  def block_loss(
    tables: PyTree, shared: PyTree, states: PyTree, known: PyTree
  ) -> jax.Array:
    """A linear form in the block's logits whose gradient is the loss's."""
    others, items = shared
    targets, log_norms = known
    logits = split_head(others, tables, states, None)
    softmax = jnp.where(items > 0, jnp.exp(logits - log_norms[:, None]), 0)
    slope = softmax - (items == targets[:, None])
    return jnp.sum(jax.lax.stop_gradient(slope) * logits, -1)

  total = chunked(criteria.row_loss(SOFTMAX, split_head), chunk)
  block_total = chunked(block_loss, chunk)

  def first_pass(
    params: PyTree, tables: PyTree, group: GroupBatch, key: jax.Array
  ) -> _FirstPass:
    others = {k: v for k, v in params.items() if k not in tables}
    history, targets = group.batch.history, group.batch.targets
    items, (rows, columns) = history.reshape(-1), real_first(targets)
    slots = jnp.where(items > 0, 1 + jnp.arange(len(items)), 0)
    index = jnp.concatenate([jnp.zeros(1, items.dtype), items])

    def states_of(others: PyTree, lookups: PyTree) -> PyTree:
      read = slots.reshape(history.shape)
      read = given(backbone, read, group.batch.activeness)
      context = backbone.encode({**others, **lookups}, read, key)
      return backbone.at(context, rows, columns)

    lookups = {name: table[index] for name, table in tables.items()}
    states, pull = jax.vjp(states_of, others, lookups)
    targets, weights = (
      x[rows, columns]
      for x in (targets, position_weights(targets, mean, group.importance))
    )
    (loss, losses), (of_others, of_states) = jax.value_and_grad(
      total, (0, 2), has_aux=True
    )(
      others, (tables, None), states, (targets, None), weights,
      jnp.ones(len(items)),
    )
    through_states, of_lookups = pull(of_states)
    chosen = backbone.score(
      params, backbone.represent(params, states, targets[:, None]),
      targets[:, None],
    )[:, 0]
    log_norms = chosen + losses / jnp.where(weights != 0, weights, 1)
    return _FirstPass(
      loss, jax.tree.map(jnp.add, of_others, through_states), items,
      {name: x[1:] for name, x in of_lookups.items()}, states, targets,
      weights, log_norms,
    )

  def block_gradient(
    others: PyTree, part: PyTree, items: jax.Array, group: _FirstPass
  ) -> PyTree:
    gradient = jax.grad(lambda *args: block_total(*args)[0])(
      part, (others, items), group.states, (group.targets, group.log_norms),
      group.weights, jnp.ones(len(group.weights)),
    )
    row = group.items - items[0]
    row = jnp.where((row >= 0) & (row < len(items)), row, len(items))
    return {
      name: x.at[row].add(group.lookups[name], mode="drop")
      for name, x in gradient.items()
    }

  def run(
    params: PyTree, groups: GroupBatch, keys: jax.Array
  ) -> tuple[jax.Array, PyTree]:
    tables = {name: params[name] for name in backbone.tables}
    others = {k: v for k, v in params.items() if k not in tables}
    size = len(next(iter(tables.values())))
    width = min(block, size)
    passed = jax.lax.map(
      lambda group: first_pass(params, tables, *group), (groups, keys)
    )

    def add(index: jax.Array, products: PyTree) -> PyTree:
      first = jnp.minimum(index * width, size - width)
      items = first + jnp.arange(width)
      part = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, first, width), tables
      )
      gradients = jax.lax.map(
        lambda group: block_gradient(others, part, items, group), passed
      )
      new = items >= index * width  # the last block reaches back
      keep = lambda x: jnp.where(new.reshape(-1, *[1] * (x.ndim - 2)), x, 0)
      return jax.tree.map(
        lambda total, x: total + aggregation.leaf_gramian(keep(x)),
        products, gradients,
      )

    zero = {name: jnp.zeros((len(keys),) * 2, jnp.float32) for name in tables}
    products = jax.lax.fori_loop(0, -(-size // width), add, zero)
    products |= jax.tree.map(aggregation.leaf_gramian, passed.others)
    return passed.loss, products

  return run
