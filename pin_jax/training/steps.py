"""The two training steps, as pure functions.

Stage 1 learns a backbone from group gradients (`backbone_step`), stage 2 a
plugin for each segment on the frozen backbone (`plugin_step`). Joint training
is stage 1 with a single group. Runs that differ in their seeds are trained at
once (`many`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pin_jax import aggregation
from pin_jax.data.batches import (
  HeldOut,
  Pool,
  Sequences,
  draw_batch,
  draw_held_out,
  read_back,
)
from pin_jax.models import packing
from pin_jax.models.backbones import given
from pin_jax.scale import sharding, streaming
from pin_jax.scale.sharding import LOCAL, Layout
from pin_jax.training import criteria, sparse
from pin_jax.training.criteria import SOFTMAX, Criterion
from pin_jax.training.objectives import (
  GroupBatch,
  group_losses,
  next_item_loss,
  plugin_head,
  position_weights,
  with_plugin_context,
)
from pin_jax.types import (
  Backbone,
  Batch,
  Plugin,
  PyTree,
)

_NEGATIVES = 2**32 - 1  # stage 2's stream of negatives; no step counts so far


_NOISE = "noise_conflict_rate", "noise_cosine"  # of groups dealt at random


class TrainState(NamedTuple):
  """All that changes from step to step.

  Attributes:
    params: what is trained; leaves [S, ...] in stage 2.
    optimizer: optax state; leaves [S, ...] in stage 2.
    weighting: state of the weighting.
    average: exponential moving average of params, or None.
  """

  params: PyTree
  optimizer: PyTree
  weighting: PyTree
  average: PyTree


class Operands(NamedTuple):
  """What a step reads and never changes.

  Attributes:
    key: the run's PRNG key; step t uses fold_in(key, t).
    sequences: the interactions.
    pool: users to draw from, by group (stage 1) or segment (stage 2).
    frozen: the frozen backbone's params in stage 2; in stage 1 what
      `importance` needs, else None.
    evidence: what the plugins read besides, the same for all runs, or None.
    streamed: the batches of a dispatch, where they come from disk; sequences
      and pool are then None.
  """

  key: jax.Array
  sequences: Sequences | None
  pool: Pool | HeldOut | None
  frozen: PyTree
  evidence: PyTree = None
  streamed: streaming.Streamed | None = None


Step = Callable[
  [TrainState, Operands, jax.Array], tuple[TrainState, dict[str, jax.Array]]
]


Importance = Callable[[PyTree, Batch], jax.Array]


def backbone_step(
  backbone: Backbone,
  weighting: aggregation.Rules,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  batch_size: int,
  length: int,
  draw: str,
  mean: str,
  path: str = "auto",
  blocks: aggregation.Blocks | None = None,
  diagnose_every: int = 0,
  average: float = 0.0,
  importance: Importance | None = None,
  criterion: Criterion = SOFTMAX,
  runs: int = 1,
  layout: Layout = LOCAL,
  row_sparse: bool = False,
) -> Step:
  """One step of stage 1: group gradients, aggregation, update.

  Args:
    backbone: the model.
    weighting: rule for the groups' weights, or one for each block.
    optimizer: optax transformation.
    schedule: its learning rate, for the log.
    batch_size: B, windows a group.
    length: L.
    draw: see `draw_batch`.
    mean: see `position_weights`.
    path: see `aggregation.aggregate`.
    blocks: see `aggregation.aggregate`.
    diagnose_every: steps from one that takes a path with the whole Gramian to
      the next, for the log, and beside it that of `dealt_anew`; 0 = none but
      those that the path forms.
    average: decay of the moving average of params, 0 = none.
    importance: (frozen, batch [G, B]) -> weights [G, B, L] of the examples,
      for exact backdoor adjustment.
    criterion: what is minimised at every position.
    runs: N, where the step goes through `many`; see `aggregation.aggregate`.
    layout: how batch and state are split over devices.
    row_sparse: the optimizer is a `sparse.row_sparse`, and the criterion draws
      negatives: the tables are read and written by rows.

  Returns:
    The step.
  """
  losses = group_losses(
    backbone, mean=mean, criterion=criterion, layout=layout
  )

  def aggregator(rules: aggregation.Rules, path: str) -> Callable:
    return aggregation.aggregate(
      losses.group_loss, rules, path=path, blocks=blocks,
      weighted_loss=losses.weighted_loss, gramians=losses.gramians, runs=runs,
    ).step

  cheap = aggregator(weighting, path)
  telling = aggregator(aggregation.informed(weighting), "auto")

  Told = tuple[aggregation.Aggregate, dict[str, jax.Array]]

  def unlooked(*args: PyTree) -> Told:
    return cheap(*args), dict.fromkeys(_NOISE, jnp.float32(jnp.nan))

  def diagnosed(
    params: PyTree, groups: GroupBatch, keys: jax.Array, state: PyTree
  ) -> Told:
    out = telling(params, groups, keys, state)
    if groups.negatives is None:  # those of the groups, not of what is dealt
      groups = groups._replace(negatives=jax.vmap(
        lambda key, batch: criteria.draw(
          criterion, criteria.split_key(criterion, key)[1], batch
        )
      )(keys, groups.batch))
    key = jax.random.fold_in(keys[0], _NEGATIVES)
    dealt = telling(params, dealt_anew(key, groups), keys, state)
    cosines = aggregation.cosines(dealt.gramian)
    found = aggregation.conflict_rate(cosines), aggregation.mean_cosine(cosines)
    return out, dict(zip(_NOISE, found, strict=True))

  def aggregate(t: jax.Array, *args: PyTree) -> Told:
    if not diagnose_every:
      return cheap(*args), {}
    return jax.lax.cond(t % diagnose_every == 0, diagnosed, unlooked, *args)

  def sparse_update(
    t: jax.Array, state: TrainState, groups: GroupBatch, keys: jax.Array
  ) -> tuple[Told, PyTree, PyTree]:
    view = sparse.view(
      state.params, groups, keys, criterion=criterion, tables=backbone.tables,
      layout=layout,
    )
    told = aggregate(t, view.params, view.groups, keys, state.weighting)
    updates, opt_state = optimizer.update(
      told[0].gradient, state.optimizer, view.params, rows=view.rows
    )
    params = sparse.add_rows(
      state.params, updates, view.rows, backbone.tables
    )
    return told, params, opt_state

  def step(
    state: TrainState, operands: Operands, t: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    draw_key, drop_key = backbone_keys(operands.key, t)
    if operands.streamed is None:
      batch = draw_batch(
        draw_key, operands.sequences, operands.pool,
        batch_size=batch_size, length=length, draw=draw,
      )
    else:
      batch = streaming.batch_of(operands.streamed, t)
    batch = sharding.split_rows(batch, layout, 1)
    weights = None
    if importance is not None:
      weights = importance(operands.frozen, batch)
    keys = jax.random.split(drop_key, batch.users.shape[0])
    groups = GroupBatch(batch, weights)
    if row_sparse:
      told, params, opt_state = sparse_update(t, state, groups, keys)
      out, noise = told
    else:
      out, noise = aggregate(t, state.params, groups, keys, state.weighting)
      updates, opt_state = optimizer.update(
        out.gradient, state.optimizer, state.params
      )
      params = optax.apply_updates(state.params, updates)
    log = {**gradient_log(out), **noise, "learning_rate": schedule(t)}
    if weights is not None:
      log["effective_share"] = effective_share(weights, batch.targets > 0)
    moving = _move_average(state.average, params, average)
    return TrainState(params, opt_state, out.state, moving), log

  return sharding.kept(step, layout)


def dealt_anew(key: jax.Array, groups: GroupBatch) -> GroupBatch:
  """The windows of G groups dealt to G groups at random: what noise alone does.

  The b-th windows of all groups go to groups in an order that is drawn for each
  b. Where the groups have one distribution of windows, hence one true gradient,
  the new groups' gradients are distributed as the old ones'; where not, their
  true gradients are one, the groups' mean, with the noise of as many windows.
  Conflicts and cosines of the old groups beyond those of the new ones are the
  groups' own. Windows have their importance along; negatives stay.

  Args:
    key: PRNG key.
    groups: leaves [G, B, ...].
  """
  order = jax.random.uniform(key, groups.batch.targets.shape[:2]).argsort(0)
  deal = lambda x: jnp.take_along_axis(
    x, order.reshape(order.shape + (1,) * (x.ndim - 2)), 0
  )
  batch, importance = jax.tree.map(deal, (groups.batch, groups.importance))
  return groups._replace(batch=batch, importance=importance)


def backbone_keys(key: jax.Array, t: jax.Array) -> jax.Array:
  """The keys of step t of stage 1: what its batch follows from, and dropout."""
  return jax.random.split(jax.random.fold_in(key, t))


def gradient_log(out: aggregation.Aggregate) -> dict[str, jax.Array]:
  """What an aggregation tells: losses, weights, norms, cosines and the like.

  Where blocks have weights of their own, 'weights' [G] is their mean and
  'block_weights' [K, G] holds them in the order of their names.
  """
  cosines = aggregation.cosines(out.gramian)
  weights, log = out.weights, {}
  if isinstance(weights, dict):
    of_blocks = jnp.stack([weights[name] for name in sorted(weights)])
    weights, log = of_blocks.mean(0), {"block_weights": of_blocks}
  return log | {
    "loss": out.losses,
    "weights": weights,
    "norms": jnp.sqrt(jnp.diagonal(out.gramian)),
    "cosines": cosines,
    "conflict_rate": aggregation.conflict_rate(cosines),
    "effective_groups": aggregation.effective_groups(weights),
  }


def plugin_step(
  backbone: Backbone,
  plugin: Plugin,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  batch_size: int,
  length: int,
  draw: str,
  mean: str,
  criterion: Criterion = SOFTMAX,
  layout: Layout = LOCAL,
) -> Step:
  """One step of stage 2: every segment's plugin on its own users.

  The backbone's params come in as `operands.frozen` and are not
  differentiated; segments share nothing, not even the clipping norm.

  Args:
    backbone: the frozen model, read without dropout.
    plugin: the network of one segment.
    optimizer: optax transformation, applied to each segment by itself.
    schedule: its learning rate, for the log.
    batch_size: B, windows a segment.
    length: L.
    draw: see `draw_batch`; 'validation' learns from the held-out targets of
      `operands.pool`, a HeldOut.
    mean: see `position_weights`.
    criterion: what is minimised at every position.
    layout: how the batch is split over devices.

  Returns:
    The step; its state's leaves lead with [S].
  """
  loss = next_item_loss(
    with_plugin_context(backbone), plugin_head(backbone, plugin),
    criterion=criterion, layout=layout,
  )

  def encode(
    params: PyTree, frozen: PyTree, batch: Batch
  ) -> tuple[PyTree, PyTree]:
    """(context, the backbone's params as the plugin wants them)."""
    history = given(backbone, batch.history, batch.activeness)
    if plugin.adapt is None:
      context = packing.encode(backbone, frozen, history)
      return jax.lax.stop_gradient(context), frozen
    frozen = plugin.adapt(params, frozen)
    return backbone.encode(frozen, history, None), frozen

  def segment_loss(
    params: PyTree, operands: Operands, batch: Batch, key: jax.Array
  ) -> jax.Array:
    context, frozen = encode(params, operands.frozen, batch)
    of_plugin = None
    if plugin.recent:
      columns = jnp.arange(1 - length, 1)
      users = jnp.broadcast_to(batch.users[:, None], batch.history.shape)
      of_plugin = read_back(
        operands.sequences, users, batch.last[:, None] + columns, plugin.recent
      )
    weights = position_weights(batch.targets, mean)
    negatives = criteria.draw(criterion, key, batch)
    return loss(
      params, (jax.lax.stop_gradient(frozen), operands.evidence),
      (context, of_plugin), batch.targets, weights, negatives=negatives,
    )[0]

  def next_batch(operands: Operands, t: jax.Array) -> Batch:
    if operands.streamed is not None:
      return streaming.batch_of(operands.streamed, t)
    key = jax.random.fold_in(operands.key, t)
    sizes = {"batch_size": batch_size, "length": length}
    if draw == "validation":
      return draw_held_out(key, operands.sequences, operands.pool, **sizes)
    return draw_batch(
      key, operands.sequences, operands.pool, draw=draw, **sizes
    )

  def step(
    state: TrainState, operands: Operands, t: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    batch = next_batch(operands, t)
    batch = sharding.split_rows(batch, layout, 1)
    draw_key = jax.random.fold_in(operands.key, _NEGATIVES)
    keys = jax.random.split(
      jax.random.fold_in(draw_key, t), batch.users.shape[0]
    )
    value_and_grad = jax.value_and_grad(segment_loss)
    losses, grads = jax.lax.map(
      lambda x: value_and_grad(x[0], operands, *x[1:]),
      (state.params, batch, keys),
    )
    updates, opt_state = jax.vmap(optimizer.update)(
      grads, state.optimizer, state.params
    )
    params = optax.apply_updates(state.params, updates)
    norms = jax.vmap(optax.tree.norm)(grads)
    log = {"loss": losses, "norms": norms, "learning_rate": schedule(t)}
    return state._replace(params=params, optimizer=opt_state), log

  return sharding.kept(step, layout)


def init_state(
  params: PyTree,
  optimizer: optax.GradientTransformation,
  weighting: aggregation.Rules | None = None,
  *,
  blocks: aggregation.Blocks | None = None,
  average: bool = False,
  stacked: bool = False,
  layout: Layout = LOCAL,
) -> TrainState:
  """State before the first step.

  Args:
    params: what is trained.
    optimizer: optax transformation.
    weighting: rule for the weights, or one for each block; None in stage 2.
    blocks: see `aggregation.aggregate`.
    average: keep a moving average of params.
    stacked: params lead with [S] and each segment has its own optimizer.
    layout: how it is split over devices.

  Returns:
    The state; it shares no buffer with `params`.
  """
  init = jax.vmap(optimizer.init) if stacked else optimizer.init

  @jax.jit
  def start(params: PyTree) -> TrainState:
    state = TrainState(
      copied(params),
      init(params),
      () if weighting is None
      else aggregation.initial_state(weighting, params, blocks),
      copied(params) if average else None,
    )
    return sharding.constrain(state, layout)

  return start(params)


def many(step: Step) -> Step:
  """N runs of a step at once: `vmap` over what each run has of its own.

  Run k does what `step` does with run k's state, key and frozen params, up to
  the rounding of batched products. All runs are at the same t, so that what
  depends on t alone (`diagnose_every`) stays a branch; a loop whose length
  depends on the data (`losses.accumulated`) takes as long as the longest. Runs
  may also differ in what an optimizer of `optax.inject_hyperparams` keeps in
  its state, such as the learning rate.

  Args:
    step: of one run.

  Returns:
    The step of N runs: the leaves of its state and logs, `operands.key` and
    the leaves of `operands.frozen` lead with [N] (see `join_runs`);
    `operands.sequences` and `operands.pool` are shared.
  """
  return jax.vmap(step, (0, Operands(0, None, None, 0, None, None), None))


def join_runs(trees: Sequence[PyTree]) -> PyTree:
  """Stacks the trees of N runs, leaves [N, ...]; a single one stays as is."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def effective_share(weights: jax.Array, real: jax.Array) -> jax.Array:
  """Kish's effective sample size over the sample size, by group.

  (sum w)^2 / (n sum w^2) over the real positions; [G, B, L] -> [G].
  """
  weights = weights * real
  count = jnp.maximum(real.sum((1, 2)), 1)
  squares = jnp.maximum((weights**2).sum((1, 2)), 1e-30)
  return weights.sum((1, 2)) ** 2 / (count * squares)


def _move_average(average: PyTree, params: PyTree, decay: float) -> PyTree:
  if average is None:
    return None
  return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


@jax.jit
def copied(tree: PyTree) -> PyTree:
  """A copy that shares no buffer, so that the original can be donated."""
  return jax.tree.map(jnp.copy, tree)
