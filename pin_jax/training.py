"""Training: pure steps for both stages and the one loop that drives them.

Stage 1 learns a backbone from group gradients (`backbone_step`), stage 2 a
plugin for each segment on the frozen backbone (`plugin_step`). Joint training
is stage 1 with a single group. N runs that differ in their seeds can be trained
at once (`many`, `fit_many`).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from pin_jax import (
  aggregation,
  criteria,
  disk,
  finite,
  packing,
  sharding,
  sparse,
  streaming,
)
from pin_jax.backbones.conditioned import given
from pin_jax.batches import (
  HeldOut,
  Pool,
  Sequences,
  draw_batch,
  draw_held_out,
  read_back,
)
from pin_jax.checkpoints import Checkpoints
from pin_jax.criteria import SOFTMAX, Criterion
from pin_jax.objectives import (
  GroupBatch,
  group_losses,
  next_item_loss,
  plugin_head,
  position_weights,
  with_reading,
)
from pin_jax.sharding import LOCAL, Layout
from pin_jax.types import (
  Backbone,
  Batch,
  InputError,
  Interrupted,
  Plugin,
  PyTree,
  at_least,
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


def make_optimizer(
  num_steps: int,
  *,
  learning_rate: float = 1e-3,
  warmup: int = 50,
  final: float = 0.01,
  b2: float = 0.98,
  weight_decay: float = 0.0,
  clip: float = 5.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW with warm-up, cosine decay and gradient clipping.

  Args:
    num_steps: steps of the whole run.
    learning_rate: peak value.
    warmup: steps of linear warm-up.
    final: last learning rate as a share of the peak.
    b2: decay of the second moment.
    weight_decay: decoupled decay, scaled by the learning rate.
    clip: largest global norm of the gradient.

  Returns:
    The transformation and its learning-rate schedule.

  Raises:
    InputError: if there is no step, or the learning rate is not positive.
  """
  at_least(1, num_steps=num_steps)
  if not learning_rate > 0:
    raise InputError(f"learning_rate={learning_rate!r}; give a positive number")
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, min(warmup, num_steps // 2), max(num_steps, 2),
    final * learning_rate,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(clip),
    optax.adamw(schedule, b2=b2, weight_decay=weight_decay),
  )
  return optimizer, schedule


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
    with_reading(backbone), plugin_head(backbone, plugin),
    criterion=criterion, layout=layout,
  )

  def encode(
    params: PyTree, frozen: PyTree, batch: Batch
  ) -> tuple[PyTree, PyTree]:
    """(context, the backbone's params as the plugin wants them)."""
    history = given(frozen, batch.history, batch.activeness)
    if plugin.adapt is None:
      context = packing.encode(backbone, frozen, history)
      return jax.lax.stop_gradient(context), frozen
    frozen = plugin.adapt(params, frozen)
    return backbone.encode(frozen, history, None), frozen

  def segment_loss(
    params: PyTree, operands: Operands, batch: Batch, key: jax.Array
  ) -> jax.Array:
    context, frozen = encode(params, operands.frozen, batch)
    reading = None
    if plugin.recent:
      columns = jnp.arange(1 - length, 1)
      users = jnp.broadcast_to(batch.users[:, None], batch.history.shape)
      reading = read_back(
        operands.sequences, users, batch.last[:, None] + columns, plugin.recent
      )
    weights = position_weights(batch.targets, mean)
    negatives = criteria.draw(criterion, key, batch)
    return loss(
      params, (jax.lax.stop_gradient(frozen), operands.evidence),
      (context, reading), batch.targets, weights, negatives=negatives,
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
      _copy(params),
      init(params),
      () if weighting is None
      else aggregation.initial_state(weighting, params, blocks),
      _copy(params) if average else None,
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


class FitResult(NamedTuple):
  """What `fit` returns of a run.

  Attributes:
    best: params at the best validated step (each segment's own in stage 2).
    best_steps: that step, a list of length 1 or S.
    best_values: its validation value.
    last_step: steps trained.
    cpu_seconds: processor time of all launches, validation included; what runs
      at once take together is shared out evenly among those not yet stopped.
  """

  best: PyTree
  best_steps: list[int]
  best_values: list[float]
  last_step: int
  cpu_seconds: float


class Progress(NamedTuple):
  """Host state of a run in the loop; saved with every checkpoint.

  Attributes:
    step: steps done.
    values: best validation value of every slot.
    steps: the step it was reached at.
    stale: validations since the last improvement of any slot.
    cpu_seconds: processor time so far.
  """

  step: int
  values: list[float]
  steps: list[int]
  stale: int
  cpu_seconds: float


def fit(
  step: Step,
  state: TrainState,
  operands: Operands,
  *,
  name: str,
  evaluate: Callable[[PyTree], np.ndarray],
  on_steps: Callable[[int, dict[str, np.ndarray]], None] = lambda t, log: None,
  on_evaluation: Callable[[int, np.ndarray], None] = lambda t, values: None,
  on_resume: Callable[[int], None] = lambda t: None,
  **options: Any,
) -> FitResult:
  """One run: `fit_many` with a single name, so that no axis [N] is there.

  Args:
    step: the pure step.
    state: the state before step 0; donated.
    operands: what the step reads.
    name: the run's name in errors.
    evaluate: params -> validation values.
    on_steps: called with the first step and the stacked logs of a dispatch.
    on_evaluation: called with the step and the validation values.
    on_resume: called with the step that a checkpoint continues from, with -1
      before a start from nothing.
    **options: the others of `fit_many`.

  Returns:
    The best params and how they were reached.

  Raises:
    As `fit_many`.
  """
  return fit_many(
    step, state, operands, names=(name,),
    evaluate=lambda k, params: evaluate(params),
    on_steps=lambda k, t, log: on_steps(t, log),
    on_evaluation=lambda k, t, values: on_evaluation(t, values),
    on_resume=lambda k, t: on_resume(t), **options,
  )[0]


def fit_many(
  step: Step,
  state: TrainState,
  operands: Operands,
  *,
  names: Sequence[str],
  num_steps: int,
  evaluate: Callable[[int, PyTree], np.ndarray] | None,
  evaluate_every: int,
  dispatch: int = 10,
  patience: int = 0,
  stacked: bool = False,
  evaluate_first: bool = False,
  checkpoints: Checkpoints | None = None,
  on_steps: Callable[[int, int, dict[str, np.ndarray]], None] = (
    lambda k, t, log: None
  ),
  on_evaluation: Callable[[int, int, np.ndarray], None] = (
    lambda k, t, values: None
  ),
  on_resume: Callable[[int, int], None] = lambda k, t: None,
  interrupted: Callable[[], bool] = lambda: False,
  stream: Callable[[int, int], streaming.Streamed] | None = None,
) -> list[FitResult]:
  """Runs steps, validates, keeps the best params, checkpoints, resumes.

  `dispatch` steps run in one compiled scan; the next is queued before the
  logs of the last are read. N runs advance together and are selected and
  stopped each by itself: one that has stopped is computed on, for the others'
  sake, but neither logged nor validated any more.

  Args:
    step: the pure step, with N > 1 names that of `many`.
    state: the state before step 0; donated. Its leaves lead with [N] where
      N > 1.
    operands: what the step reads.
    names: [N], the runs' names in errors.
    num_steps: steps of a run.
    evaluate: (run k, its params) -> validation values, higher is better: [1],
      or [S] where each segment keeps its own best; None = the last is kept.
    evaluate_every: steps between validations (and checkpoints).
    dispatch: steps a dispatch, a divisor of `evaluate_every`.
    patience: stop after so many validations without improvement; 0 = never.
    stacked: params of a run lead with [S]; each slot is selected by itself.
    evaluate_first: validate before step 0 too, so that the start can be best.
    checkpoints: where to save and resume, all runs as one; None = nowhere.
    on_steps: called with the run, the first step and the stacked logs of a
      dispatch.
    on_evaluation: called with the run, the step and the validation values.
    on_resume: called with the run and the step that a checkpoint continues
      from, with -1 before a start from nothing.
    interrupted: whether to save and end, asked before every dispatch.
    stream: (first step, count) -> their batches, where they come from disk.

  Returns:
    [N] best params and how they were reached.

  Raises:
    TrainingError: if a loss or a parameter is not finite, or a save fails.
    Interrupted: where `interrupted` says so, once all is saved.
    InputError: if `dispatch` does not divide `evaluate_every`, or for a
      checkpoint that cannot be continued.
  """
  if dispatch < 1 or evaluate_every % dispatch:
    raise InputError(
      f"dispatch={dispatch} does not divide evaluate_every={evaluate_every}; "
      "give a divisor of at least 1"
    )
  run = compile_steps(step)

  def at(t: int, count: int) -> PyTree:
    if stream is None:
      return operands
    return operands._replace(streamed=stream(t, count))

  of_run = _take if len(names) > 1 else lambda tree, k: tree
  served = lambda s: s.params if s.average is None else s.average
  best = _copy(served(state))
  progress = [Progress(0, [], [], 0, 0.0)] * len(names)
  saved = checkpoints and checkpoints.restore((state, best))
  if saved:
    (state, best), progress = saved[0], _from_record(
      saved[1], checkpoints.directory
    )
  for k, one in enumerate(progress):
    on_resume(k, one.step if saved else -1)
  if checkpoints and not (saved or evaluate_first):
    checkpoints.save(0, (state, best), _to_record(progress))
  clock = time.process_time()

  def live() -> list[int]:
    stopped = [0 < patience <= one.stale for one in progress]
    return [k for k in range(len(names)) if not stopped[k]]

  def validate(t: int) -> None:
    nonlocal best, clock
    better, running = {}, live()
    for k in running:
      finite.check_params(of_run(state.params, k), names[k], t)
    for k in running:
      if evaluate is None:
        values = np.array([float(t)])
      else:
        params = of_run(served(state), k)
        values = np.asarray(evaluate(k, params), np.float64).reshape(-1)
        on_evaluation(k, t, values)
      progress[k], better[k] = _compare(progress[k], t, values)
    now = time.process_time()
    share, clock = (now - clock) / len(running), now
    for k in running:
      total = progress[k].cpu_seconds + share
      progress[k] = progress[k]._replace(cpu_seconds=total)
    nothing = np.zeros(len(progress[0].values), bool)
    chosen = np.stack([better.get(k, nothing) for k in range(len(names))])
    best = _select(chosen, served(state), best, stacked)
    if checkpoints:
      checkpoints.save(t, (state, best), _to_record(progress))

  def leave(t: int) -> None:
    for k in live():
      progress[k] = progress[k]._replace(step=t)
    if checkpoints:
      checkpoints.save(t, (state, best), _to_record(progress))
      checkpoints.wait()
    raise Interrupted(f"{names[0]}: interrupted after step {t}")

  def advance(t: int) -> int:
    """Trains until the next validation; returns its step."""
    nonlocal state
    pending, stop = None, t + evaluate_every - t % evaluate_every
    stop = min(stop, num_steps)
    while t < stop:
      if interrupted():
        _deliver(pending, names, live(), on_steps)
        leave(t)
      count = min(dispatch, stop - t)
      state, logs = run(state, at(t, count), t, count)
      _deliver(pending, names, live(), on_steps)
      pending, t = (t, logs), t + count
    _deliver(pending, names, live(), on_steps)
    return t

  if evaluate_first and not progress[0].values:
    validate(0)
  t = max(one.step for one in progress)
  while t < num_steps and live():
    t = advance(t)
    validate(t)
  if checkpoints:
    checkpoints.wait()
  return results(best, _to_record(progress))


def results(
  best: PyTree, record: dict[str, Any], where: epath.PathLike = "a checkpoint"
) -> list[FitResult]:
  """What `fit_many` returned, from its last checkpoint.

  Args:
    best: the selected params, of N > 1 runs leading with [N].
    record: of that checkpoint.
    where: the checkpoints' directory, for messages.

  Raises:
    InputError: if the record is not what `fit_many` saves.
  """
  progress = _from_record(record, where)
  of_run = _take if len(progress) > 1 else lambda tree, k: tree
  return [
    FitResult(of_run(best, k), one.steps, one.values, one.step, one.cpu_seconds)
    for k, one in enumerate(progress)
  ]


def _to_record(progress: list[Progress]) -> dict[str, Any]:
  """What a checkpoint holds of N runs; of one, its own record."""
  records = [one._asdict() for one in progress]
  return {"runs": records} if len(records) > 1 else records[0]


def _from_record(
  record: dict[str, Any], where: epath.PathLike
) -> list[Progress]:
  with disk.reading(where, "delete it to train the run again"):
    found = [Progress(**one) for one in record.get("runs", [record])]
    for one in found:
      if min(one.step, one.stale, *one.steps) < 0:
        raise ValueError("it counts from below 0")
      np.array([one.values, one.steps], float) + one.cpu_seconds
  return found


def _compare(
  old: Progress, t: int, values: np.ndarray
) -> tuple[Progress, np.ndarray]:
  """(progress after a validation, which of its slots improved)."""
  before = np.asarray(old.values or [-math.inf] * len(values))
  better = values > before
  steps = old.steps or [0] * len(values)
  return Progress(
    t,
    np.where(better, values, before).tolist(),
    [t if b else s for b, s in zip(better, steps, strict=True)],
    0 if better.any() else old.stale + 1,
    old.cpu_seconds,
  ), better


def compile_steps(step: Step) -> Callable[..., tuple[TrainState, PyTree]]:
  """(state, operands, first step, count) -> (state, logs), in one dispatch.

  The state is donated; every `count` has a program of its own.
  """

  def run(
    state: TrainState, operands: Operands, start: int, count: int
  ) -> tuple[TrainState, PyTree]:
    body = lambda s, t: step(s, operands, t)
    return jax.lax.scan(body, state, start + jnp.arange(count))

  return jax.jit(run, static_argnums=3, donate_argnums=0)


@jax.jit
def _copy(tree: PyTree) -> PyTree:
  return jax.tree.map(jnp.copy, tree)


@jax.jit
def _take(tree: PyTree, k: int) -> PyTree:
  return jax.tree.map(lambda x: x[k], tree)


def _select(
  better: np.ndarray, new: PyTree, old: PyTree, stacked: bool
) -> PyTree:
  """The new leaves where better [N, S] (not stacked: [N, 1]), else the old."""
  better = better if stacked else better[:, 0]
  if len(better) == 1:
    better = better[0]
  if not better.ndim:
    return _copy(new) if better else old
  return _pick(jnp.asarray(better), new, old)


@jax.jit
def _pick(better: jax.Array, new: PyTree, old: PyTree) -> PyTree:
  def pick(new: jax.Array, old: jax.Array) -> jax.Array:
    chosen = better.reshape(better.shape + (1,) * (new.ndim - better.ndim))
    return jnp.where(chosen, new, old)

  return jax.tree.map(pick, new, old)


def _deliver(
  pending: tuple[int, Any] | None,
  names: Sequence[str],
  live: list[int],
  on_steps: Callable[..., None],
) -> None:
  if pending is None:
    return
  start, logs = pending[0], jax.device_get(pending[1])
  of_run = lambda k: jax.tree.map(lambda x: x[:, k], logs)
  by_run = {k: of_run(k) for k in live} if len(names) > 1 else {0: logs}
  for k, log in by_run.items():
    finite.check_losses(log, names[k], start)
  for k, log in by_run.items():
    on_steps(k, start, log)
