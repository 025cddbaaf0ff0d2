"""The two training steps, as pure functions.

Stage 1 learns a backbone from group gradients (`backbone_step`), stage 2 a
plugin for each segment on the frozen backbone (`plugin_step`). Joint training
is stage 1 with a single group. Runs that differ in their seeds are trained at
once (`many`).

On one device (`layout=LOCAL`) the calls of `sharding` change nothing.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from pin_jax import aggregation
from pin_jax.data.batches import Draw, HeldOut, Pool, Sequences, read_back
from pin_jax.models import packing
from pin_jax.models.backbones import given
from pin_jax.scale import sharding, streaming
from pin_jax.scale.sharding import LOCAL, Layout
from pin_jax.training import sparse
from pin_jax.training.losses import SOFTMAX, LossSpec
from pin_jax.training.objectives import (
  GroupBatch,
  GroupLosses,
  group_losses,
  next_item_loss,
  plugin_head,
  position_weights,
  with_plugin_context,
)
from pin_jax.training.optimizers import Optimizer
from pin_jax.types import Backbone, Batch, Plugin, PyTree

SKIPPED = "skipped"
_NEGATIVES = 2**32 - 1  # stage 2's stream of negatives; no step counts so far


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
    num_steps: of the run; None = those that the optimizer was made for.
  """

  key: jax.Array
  sequences: Sequences | None
  pool: Pool | HeldOut | None
  frozen: PyTree
  evidence: PyTree = None
  streamed: streaming.Streamed | None = None
  num_steps: jax.Array | None = None


class Adjustment(NamedTuple):
  """How the gradients of the groups become one.

  Attributes:
    rules: weighting of the groups, or one for each block of parameters.
    blocks: see `aggregation.aggregate`.
    path: see `aggregation.aggregate`.
    diagnose_every: every so many steps the log has the whole Gramian; 0 = what
      the path forms anyway.
  """

  rules: aggregation.Rules
  blocks: aggregation.Blocks | None = None
  path: str = "auto"
  diagnose_every: int = 0


Log = dict[str, jax.Array]
Step = Callable[[TrainState, Operands, jax.Array], tuple[TrainState, Log]]
Importance = Callable[[PyTree, Batch], jax.Array]


def backbone_step(
  backbone: Backbone,
  adjustment: Adjustment,
  optimizer: Optimizer,
  draw: Draw,
  *,
  loss: LossSpec = SOFTMAX,
  importance: Importance | None = None,
  layout: Layout = LOCAL,
) -> Step:
  """One step of stage 1: group gradients, aggregation, update.

  Args:
    backbone: the model.
    adjustment: how the groups' gradients are combined.
    optimizer: applied to the one gradient. With `tables`, the loss draws
      negatives, and the tables are read and written by rows.
    draw: how the windows of every group are drawn.
    loss: what is minimised at every position.
    importance: (frozen, batch [G, B]) -> weights [G, B, L] of the examples,
      for exact backdoor adjustment.
    layout: how batch and state are split over devices.
  """
  losses = group_losses(backbone, mean=draw.mean, loss=loss, layout=layout)
  aggregate = _aggregator(losses, adjustment)

  def step(
    state: TrainState, operands: Operands, t: jax.Array
  ) -> tuple[TrainState, Log]:
    draw_key, drop_key = backbone_keys(operands.key, t)
    batch = _next_batch(draw, draw_key, operands, t, layout)
    importances = None
    if importance is not None:
      importances = importance(operands.frozen, batch)
    groups = GroupBatch(batch, importances)
    keys = jax.random.split(drop_key, len(batch.users))
    params, rows = state.params, {}
    if optimizer.tables:
      view = sparse.view(
        params, groups, keys, loss=loss, tables=optimizer.tables,
        layout=layout,
      )
      params, groups, rows = view.params, view.groups, {"rows": view.rows}
    out = aggregate(t, params, groups, keys, state.weighting)
    updates, opt_state = optimizer.update(
      out.gradient, state.optimizer, params, num_steps=operands.num_steps,
      **rows,
    )
    if rows:
      params = sparse.add_rows(
        state.params, updates, view.rows, optimizer.tables
      )
    else:
      params = optax.apply_updates(params, updates)
    rate = optimizer.schedule(t, operands.num_steps)
    log = gradient_log(out) | {"learning_rate": rate}
    if importances is not None:
      log["effective_share"] = effective_share(importances, batch.targets > 0)
    average = state.average
    if average is not None:
      average = jax.tree.map(
        lambda a, p: optimizer.average * a + (1 - optimizer.average) * p,
        average, params,
      )
    return TrainState(params, opt_state, out.state, average), log

  return sharding.kept(step, layout)


def _next_batch(
  draw: Draw, key: jax.Array, operands: Operands, t: jax.Array, layout: Layout
) -> Batch:
  """The batch of step t, its rows split over the devices."""
  if operands.streamed is None:
    batch = draw.batch(key, operands.sequences, operands.pool)
  else:
    batch = streaming.batch_of(operands.streamed, t)
  return sharding.lay(batch, layout, None, sharding.DATA)


def _aggregator(
  losses: GroupLosses, adjustment: Adjustment
) -> Callable[..., aggregation.Aggregate]:
  """(t, params, groups, keys, state) -> what one aggregation yields."""
  rules, blocks, path, every = adjustment

  def aggregator(rules: aggregation.Rules, path: str) -> Callable:
    return aggregation.aggregate(
      losses.group_loss, rules, path=path, blocks=blocks,
      weighted_loss=losses.weighted_loss,
    ).step

  cheap = aggregator(rules, path)
  whole = aggregator(aggregation.informed(rules), "auto")

  if not every:
    return lambda t, *args: cheap(*args)
  return lambda t, *args: jax.lax.cond(t % every == 0, whole, cheap, *args)


def backbone_keys(key: jax.Array, t: jax.Array) -> jax.Array:
  """The keys of step t of stage 1: what its batch follows from, and dropout."""
  return jax.random.split(jax.random.fold_in(key, t))


def gradient_log(out: aggregation.Aggregate) -> Log:
  """What is logged of an aggregation: losses, weights, norms, cosines.

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


def effective_share(weights: jax.Array, real: jax.Array) -> jax.Array:
  """Kish's effective sample size over the sample size, by group.

  (sum w)^2 / (n sum w^2) over the real positions; [G, B, L] -> [G].
  """
  weights = weights * real
  count = jnp.maximum(real.sum((1, 2)), 1)
  squares = jnp.maximum((weights**2).sum((1, 2)), 1e-30)
  return weights.sum((1, 2)) ** 2 / (count * squares)


def plugin_step(
  backbone: Backbone,
  plugin: Plugin,
  optimizer: Optimizer,
  draw: Draw,
  *,
  loss: LossSpec = SOFTMAX,
  layout: Layout = LOCAL,
) -> Step:
  """One step of stage 2: every segment's plugin on its own users.

  The backbone's params come in as `operands.frozen` and are not
  differentiated; segments share nothing, not even the clipping norm.

  Args:
    backbone: the frozen model, read without dropout.
    plugin: the network of one segment.
    optimizer: applied to each segment by itself.
    draw: how the windows of every segment are drawn; by 'validation' from
      `operands.pool`, a HeldOut.
    loss: what is minimised at every position.
    layout: how the batch is split over devices.

  Returns:
    The step; its state's leaves lead with [S].
  """
  total = next_item_loss(
    with_plugin_context(backbone), plugin_head(backbone, plugin), loss=loss,
    layout=layout,
  )

  def segment_loss(
    params: PyTree, operands: Operands, batch: Batch, key: jax.Array
  ) -> jax.Array:
    context, frozen = _encoded(backbone, plugin, params, operands.frozen, batch)
    of_plugin = None
    if plugin.recent:
      columns = jnp.arange(1 - draw.length, 1)
      users = jnp.broadcast_to(batch.users[:, None], batch.history.shape)
      of_plugin = read_back(
        operands.sequences, users, batch.last[:, None] + columns, plugin.recent
      )
    weights = position_weights(batch.targets, draw.mean)
    negatives = loss.draw(key, batch)
    return total(
      params, (jax.lax.stop_gradient(frozen), operands.evidence),
      (context, of_plugin), batch.targets, weights, negatives=negatives,
    )[0]

  def step(
    state: TrainState, operands: Operands, t: jax.Array
  ) -> tuple[TrainState, Log]:
    key = jax.random.fold_in(operands.key, t)
    batch = _next_batch(draw, key, operands, t, layout)
    drawn = jax.random.fold_in(jax.random.fold_in(operands.key, _NEGATIVES), t)
    keys = jax.random.split(drawn, len(batch.users))
    losses, grads = jax.lax.map(
      lambda x: jax.value_and_grad(segment_loss)(x[0], operands, *x[1:]),
      (state.params, batch, keys),
    )
    update = functools.partial(optimizer.update, num_steps=operands.num_steps)
    updates, opt_state = jax.vmap(update)(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = jax.vmap(optax.tree.norm)(grads)
    rate = optimizer.schedule(t, operands.num_steps)
    log = {"loss": losses, "norms": norms, "learning_rate": rate}
    return state._replace(params=params, optimizer=opt_state), log

  return sharding.kept(step, layout)


def _encoded(
  backbone: Backbone, plugin: Plugin, params: PyTree, frozen: PyTree,
  batch: Batch,
) -> tuple[PyTree, PyTree]:
  """(context, the backbone's params as the plugin wants them)."""
  history = given(backbone, batch.history, batch.activeness)
  if plugin.adapt is None:
    context = packing.encode(backbone, frozen, history)
    return jax.lax.stop_gradient(context), frozen
  frozen = plugin.adapt(params, frozen)
  return backbone.encode(frozen, history, None), frozen


def init_state(
  params: PyTree,
  optimizer: Optimizer,
  adjustment: Adjustment | None = None,
  *,
  stacked: bool = False,
  layout: Layout = LOCAL,
) -> TrainState:
  """State before the first step.

  Args:
    params: what is trained.
    optimizer: that of the step.
    adjustment: that of the step; None in stage 2.
    stacked: params lead with [S] and each segment has its own optimizer.
    layout: how it is split over devices.

  Returns:
    The state; it shares no buffer with `params`.
  """
  init = optimizer.transformation.init
  if stacked:
    init = jax.vmap(init)

  @jax.jit
  def start(params: PyTree) -> TrainState:
    weighting = () if adjustment is None else aggregation.initial_state(
      adjustment.rules, params, adjustment.blocks
    )
    average = copied(params) if optimizer.average else None
    state = TrainState(copied(params), init(params), weighting, average)
    return sharding.constrain(state, layout)

  return start(params)


def many(step: Step) -> Step:
  """N runs of a step at once: `vmap` over what each run has of its own.

  Run k does what `step` does with run k's state, key and frozen params, up to
  the rounding of batched products. All runs are at the same t, so that what
  depends on t alone (`diagnose_every`) stays a branch; a loop whose length
  depends on the data (`chunks.accumulated`) takes as long as the longest.

  Args:
    step: of one run.

  Returns:
    The step of N runs: the leaves of its state and logs, `operands.key` and
    the leaves of `operands.frozen` lead with [N] (see `join_runs`);
    `operands.sequences` and `operands.pool` are shared.
  """
  return jax.vmap(step, (0, Operands(0, None, None, 0), None))


def join_runs(trees: Sequence[PyTree]) -> PyTree:
  """Stacks the trees of N runs, leaves [N, ...]; a single one stays as is."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def skipping(step: Step) -> Step:
  """A step that leaves the state as it is where its result is not finite.

  Loss, gradient and parameters count; the log's 'skipped' is 1 for a step
  without effect, else 0. Nothing leaves the device. (`optax.apply_if_finite`
  would let the weighting's state, which follows the losses, become NaN.)
  """

  def skip(
    state: TrainState, operands: Operands, t: jax.Array
  ) -> tuple[TrainState, Log]:
    new, log = step(state, operands, t)
    good = all_finite((new.params, log["loss"]))
    kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
    return kept, {**log, SKIPPED: 1 - good.astype(jnp.int32)}

  return skip


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
  """Whether every floating-point number of a tree is finite."""
  leaves = [
    jnp.isfinite(x).all() for x in jax.tree.leaves(tree)
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
  ]
  return jnp.stack([jnp.array(True), *leaves]).all()


@jax.jit
def copied(tree: PyTree) -> PyTree:
  """A copy that shares no buffer, so that the original can be donated."""
  return jax.tree.map(jnp.copy, tree)
