"""Training steps and the loop, against optax and losses run by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import assert_trees_close, bigram

from pin_jax import aggregation
from pin_jax.data import batches, splits
from pin_jax.data.batches import Draw
from pin_jax.data.interactions import Interactions
from pin_jax.models import plugins, sasrec
from pin_jax.training import checkpoints, loop, objectives
from pin_jax.training.optimizers import make_optimizer
from pin_jax.training.steps import (
  Adjustment,
  Operands,
  TrainState,
  backbone_step,
  effective_share,
  init_state,
  plugin_step,
)
from pin_jax.types import TrainingError

NUM_ITEMS = 9
SIZE = NUM_ITEMS + 1


pytestmark = pytest.mark.usefixtures("compile_quickly")


def data_of(sequences, groups, length):
  """Everything trains; -> (sequences, pool) on the device."""
  offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])])
  data = Interactions(
    name="tiny", items=np.concatenate(sequences).astype(np.int32),
    offsets=offsets, times=None, user_ids=np.arange(len(sequences)),
    item_ids=np.arange(1, SIZE), notes={},
  )
  none = np.full(len(sequences), -1, np.int32)
  split = splits.Split(
    data, np.diff(offsets).astype(np.int32), none, none, "all train", {}
  )
  pool = batches.make_pool(
    batches.training_targets(split), np.array(groups),
    num_groups=max(groups) + 1, length=length,
  )
  return batches.make_sequences(split), pool


def random_sequences(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(1, SIZE, n) for n in lengths]


def assert_trees_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# Weights of positions and examples.


def numpy_position_weights(targets, mean, importance):
  weights = np.zeros(targets.shape)
  for b, row in enumerate(targets):
    for position, target in enumerate(row):
      if target > 0:
        weights[b, position] = 1 if mean == "interactions" else (
          1 / (row > 0).sum()
        )
  return weights / weights.sum() * (1 if importance is None else importance)


@pytest.mark.parametrize("mean", objectives.MEANS)
@pytest.mark.parametrize("weighted", [False, True])
def test_position_weights_against_a_loop(mean, weighted):
  rng = np.random.default_rng(0)
  targets = rng.integers(0, 3, (6, 5))
  targets[2] = 0
  importance = rng.exponential(size=(6, 5)) if weighted else None
  got = objectives.position_weights(jnp.asarray(targets), mean, importance)
  expected = numpy_position_weights(targets, mean, importance)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-8)
  assert got.dtype == jnp.float32
  assert not objectives.position_weights(jnp.zeros((2, 3), int), mean).any()


def test_effective_share_by_formula():
  rng = np.random.default_rng(0)
  weights = rng.exponential(size=(3, 4, 5)).astype(np.float32)
  real = rng.random((3, 4, 5)) < 0.6
  weights[1] = 2.5
  real[2] = False
  got = effective_share(jnp.asarray(weights), jnp.asarray(real))
  w = weights[0][real[0]].astype(np.float64)
  np.testing.assert_allclose(
    got, [w.sum() ** 2 / (len(w) * (w**2).sum()), 1, 0], rtol=1e-5
  )


def test_learning_rate_warms_up_and_decays_as_a_cosine():
  schedule = make_optimizer(
    100, learning_rate=0.2, warmup=10, final=0.05
  ).schedule
  for t in (0, 3, 10, 40, 100):
    expected = 0.2 * t / 10 if t < 10 else 0.2 * (
      0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * (t - 10) / 90))
    )
    np.testing.assert_allclose(schedule(t), expected, rtol=1e-5)


@pytest.mark.parametrize(("num_steps", "warmup"), [
  (1, 50), (2, 50), (7, 50), (200, 50), (200, 0),
])
def test_one_optimizer_serves_runs_of_any_length(num_steps, warmup):
  """As optax's own AdamW with that run's schedule."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 0.3, min(warmup, num_steps // 2), max(num_steps, 2), 0.3 * 0.01
  )
  theirs = optax.chain(
    optax.clip_by_global_norm(5.0),
    optax.adamw(schedule, b2=0.98, weight_decay=0.1),
  )
  mine = make_optimizer(
    1000, learning_rate=0.3, warmup=warmup, weight_decay=0.1
  )
  states = [x.init(jnp.ones(2)) for x in (theirs, mine.transformation)]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
  jitted, steps = jax.jit(mine.update), np.int32(num_steps)
  update = lambda *args: jitted(*args, num_steps=steps)
  params = [jnp.ones(2)] * 2
  for t in range(min(num_steps, 20)):
    for k, step in enumerate((theirs.update, update)):
      updates, states[k] = step(jnp.array([0.1, -t]), states[k], params[k])
      params[k] = optax.apply_updates(params[k], updates)
    np.testing.assert_allclose(*params, rtol=1e-5)
    rate = mine.schedule(t, steps)
    np.testing.assert_allclose(rate, schedule(t), rtol=1e-5, atol=1e-9)


# One step by hand. A group of one user whose targets fit in one window always
# yields that window, whatever the draw.

GROUP_SEQUENCES = random_sequences([3, 5, 6])
PRIOR = np.array([0.2, 0.5, 0.3])


def numpy_bigram_loss(table, sequence, weights):
  """Loss and gradient of weighted next-item cross-entropy over items 1..V."""
  loss, gradient = 0.0, np.zeros_like(table)
  for a, b, weight in zip(sequence[:-1], sequence[1:], weights, strict=True):
    logits = table[a, 1:]
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    loss -= weight * np.log(probability[b - 1])
    gradient[a, 1:] += weight * probability
    gradient[a, b] -= weight
  return loss, gradient


@pytest.mark.parametrize("draw", batches.DRAWS)
@pytest.mark.parametrize("weighted", [False, True])
def test_backbone_step_equals_optax_by_hand(draw, weighted):
  length = 7
  sequences, pool = data_of(GROUP_SEQUENCES, [0, 1, 2], length)
  importance = np.random.default_rng(1).exponential(size=(3, 1, length))
  backbone = bigram(NUM_ITEMS)
  adjustment = Adjustment(aggregation.backdoor(PRIOR), diagnose_every=1)
  optimizer = make_optimizer(
    10, learning_rate=0.1, warmup=0, clip=0.05, weight_decay=0.01
  )
  step = backbone_step(
    backbone, adjustment, optimizer, Draw(1, length, draw, draw),
    importance=(
      (lambda frozen, batch: frozen["importance"]) if weighted else None
    ),
  )
  params = backbone.init(jax.random.key(0))
  state = init_state(params, optimizer, adjustment)
  frozen = {"importance": jnp.asarray(importance, jnp.float32)}
  operands = Operands(jax.random.key(1), sequences, pool, frozen)
  after, log = jax.jit(step)(state, operands, jnp.int32(0))

  table = np.asarray(params["table"], np.float64)
  losses, gradients, shares = [], [], []
  for sequence, given in zip(GROUP_SEQUENCES, importance[:, 0], strict=True):
    count = len(sequence) - 1
    weights = given[-count:] if weighted else np.ones(count)
    shares.append(weights.sum() ** 2 / (count * (weights**2).sum()))
    weights = weights / count
    loss, gradient = numpy_bigram_loss(table, sequence, weights)
    losses.append(loss)
    gradients.append(gradient)
  combined = np.einsum("g,gij->ij", PRIOR, gradients)
  norms = np.sqrt(np.einsum("gij,gij->g", gradients, gradients))
  assert np.sqrt((combined**2).sum()) > 0.05  # clipping is at work
  by_hand = optax.chain(
    optax.clip_by_global_norm(0.05),
    optax.adamw(0.1, b2=0.98, weight_decay=0.01),
  )
  updates, _ = by_hand.update(
    {"table": jnp.asarray(combined, jnp.float32)}, by_hand.init(params),
    params,
  )
  expected = optax.apply_updates(params, updates)
  np.testing.assert_allclose(
    after.params["table"], expected["table"], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(log["loss"], losses, rtol=1e-5)
  np.testing.assert_allclose(log["weights"], PRIOR, rtol=1e-6)
  np.testing.assert_allclose(log["norms"], norms, rtol=1e-5)
  np.testing.assert_allclose(
    log["cosines"],
    np.einsum("gij,hij->gh", gradients, gradients) / np.outer(norms, norms),
    rtol=1e-4, atol=1e-5,
  )
  np.testing.assert_allclose(log["learning_rate"], 0.1, rtol=1e-6)
  assert ("effective_share" in log) == weighted
  if weighted:
    np.testing.assert_allclose(log["effective_share"], shares, rtol=1e-5)


def small_sasrec(length, dropout=0.0):
  backbone = sasrec.sasrec(
    NUM_ITEMS, length=length, width=4, blocks=1, heads=1, dropout=dropout,
    expansion=1,
  )
  return backbone, jax.jit(backbone.init)(jax.random.key(0))


def mean_cross_entropy(logits, targets):
  """Plain mean over real targets; logits [M, V+1], targets [M]."""
  logs = jax.nn.log_softmax(logits[:, 1:])
  chosen = logs[jnp.arange(len(targets)), jnp.maximum(targets - 1, 0)]
  return -jnp.sum(chosen * (targets > 0)) / jnp.sum(targets > 0)


def test_joint_training_is_one_group():
  """Five steps, against a loop of jax.grad and optax on the same batches."""
  length, batch_size, num_steps = 4, 3, 5
  data = random_sequences([2, 4, 6, 9, 12])
  sequences, pool = data_of(data, [0] * 5, length)
  backbone, params = small_sasrec(length)
  adjustment = Adjustment(aggregation.backdoor([1.0]))
  optimizer = make_optimizer(
    num_steps, learning_rate=0.03, warmup=2, clip=1.0, weight_decay=0.1
  )
  step = backbone_step(
    backbone, adjustment, optimizer, Draw(batch_size, length)
  )
  operands = Operands(jax.random.key(1), sequences, pool, None)
  _, steps, result = loop.run(
    step, init_state(params, optimizer, adjustment), operands,
    loop.Plan(num_steps, num_steps, dispatch=num_steps),
  )

  def loss(params, history, targets):
    states = backbone.encode(params, history).reshape(-1, 4)
    logits = states @ params["items"].T + params["bias"]
    return mean_cross_entropy(logits, targets.reshape(-1))

  rate = optax.warmup_cosine_decay_schedule(0.0, 0.03, 2, 5, 0.0003)
  by_hand = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(rate, b2=0.98, weight_decay=0.1),
  )
  value_and_grad = jax.jit(jax.value_and_grad(loss))
  update = jax.jit(by_hand.update)
  opt_state, losses = by_hand.init(params), []
  for t in range(num_steps):
    draw_key, _ = jax.random.split(jax.random.fold_in(operands.key, t))
    batch = batches.Draw(batch_size, length).batch(draw_key, sequences, pool)
    value, gradient = value_and_grad(
      params, batch.history[0], batch.targets[0]
    )
    updates, opt_state = update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    losses.append(value)
  np.testing.assert_allclose(steps.logs["loss"][:, 0], losses, rtol=1e-5)
  assert_trees_close(result.best, params)


def test_moving_average_by_formula():
  sequences, pool = data_of(GROUP_SEQUENCES, [0, 1, 2], 3)
  backbone = bigram(NUM_ITEMS)
  adjustment = Adjustment(aggregation.backdoor(PRIOR), path="weighted")
  optimizer = make_optimizer(9, learning_rate=0.1, warmup=0, average=0.7)
  step = backbone_step(
    backbone, adjustment, optimizer, Draw(2, 3, "users", "users")
  )
  params = backbone.init(jax.random.key(0))
  initial = lambda: init_state(params, optimizer, adjustment)
  operands = Operands(jax.random.key(1), sequences, pool, None)
  state, run = initial(), jax.jit(step)
  expected = np.asarray(params["table"], np.float64)
  for t in range(6):
    state, _ = run(state, operands, jnp.int32(t))
    current = np.asarray(state.params["table"], np.float64)
    expected = 0.7 * expected + 0.3 * current
  np.testing.assert_allclose(state.average["table"], expected, rtol=1e-5)
  *_, seen, result = loop.run(
    step, initial(), operands, loop.Plan(6, 6, ("all",), dispatch=3),
    lambda k, params: {"all": 0, "table": np.asarray(params["table"])},
  )
  np.testing.assert_allclose(seen.values["table"], expected, rtol=1e-5)
  np.testing.assert_allclose(result.best["table"], expected, rtol=1e-5)


def test_cosines_are_logged_every_few_steps():
  """Of groups with one next item each: over uniform p, p - e_2 and p - e_3."""
  data, pool = data_of([[1, 2], [1, 3]] * 5, [0, 1] * 5, 1)
  backbone = bigram(NUM_ITEMS)
  adjustment = Adjustment(aggregation.backdoor([0.5, 0.5]), diagnose_every=4)
  optimizer = make_optimizer(9, learning_rate=0.1)
  step = jax.jit(backbone_step(
    backbone, adjustment, optimizer, Draw(8, 1, "users", "users")
  ))
  params = {"table": jnp.zeros((SIZE, SIZE))}
  state = init_state(params, optimizer, adjustment)
  operands = Operands(jax.random.key(1), data, pool, None)
  for t in range(9):
    log = step(state, operands, jnp.int32(t))[1]
    if t % 4:
      assert np.isnan(log["conflict_rate"])
    else:
      assert log["conflict_rate"] == 1
      np.testing.assert_allclose(log["cosines"][0, 1], -1 / 8, rtol=1e-4)


# Stage 2.

SEGMENTS = [0, 0, 1, 1]


def plugin_training(data, num_steps, *, clip=0.01, length=6):
  """Trains plugins; -> (backbone, before, frozen, result, start, logs)."""
  sequences, pool = data_of(data, SEGMENTS, length)
  backbone, frozen = small_sasrec(length, dropout=0.5)
  plugin = plugins.bottleneck(4, hidden=2)
  optimizer = make_optimizer(
    num_steps, learning_rate=0.05, warmup=0, clip=clip
  )
  step = plugin_step(
    backbone, plugin, optimizer, Draw(2, length, "users", "users")
  )
  start = jax.jit(lambda key: plugins.init_stacked(plugin, key, 2))(
    jax.random.key(2)
  )
  state = init_state(start, optimizer, stacked=True)
  before = jax.tree.map(np.array, frozen)
  operands = Operands(jax.random.key(3), sequences, pool, frozen)
  _, steps, result = loop.run(
    step, state, operands, loop.Plan(num_steps, num_steps, dispatch=num_steps)
  )
  return before, operands.frozen, result, start, steps.logs


def test_stage_two_freezes_the_backbone():
  data = random_sequences([4, 6, 5, 7])
  before, frozen, result, start, _ = plugin_training(data, 4)
  assert_trees_equal(frozen, before)
  assert jax.tree.structure(result.best) == jax.tree.structure(start)
  for old, new in zip(
    jax.tree.leaves(start), jax.tree.leaves(result.best), strict=True
  ):
    assert (np.asarray(old) != np.asarray(new)).any()


def test_stage_two_state_holds_plugin_params_only():
  plugin = plugins.bottleneck(4, hidden=2)
  start = plugins.init_stacked(plugin, jax.random.key(2), 2)
  optimizer = make_optimizer(4)
  state = init_state(start, optimizer, stacked=True)
  shapes = {x.shape for x in jax.tree.leaves(start)} | {(2,)}
  assert {x.shape for x in jax.tree.leaves(state)} == shapes
  count = len(jax.tree.leaves(start))
  assert len(jax.tree.leaves(state.optimizer)) <= 2 * count + 2
  assert state.average is None
  assert state.weighting == ()
  own = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.params)}
  given = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(start)}
  assert not own & given


def test_segments_are_independent():
  data = random_sequences([4, 6, 5, 7])
  altered = data[:2] + random_sequences([5, 7], seed=5)
  _, _, first, _, logs = plugin_training(data, 6)
  _, _, second, _, _ = plugin_training(altered, 6)
  assert (logs["norms"] > 0.01).any()  # clipping is at work
  of = lambda tree, s: jax.tree.map(lambda x: x[s], tree)
  assert_trees_equal(of(first.best, 0), of(second.best, 0))
  with pytest.raises(AssertionError):
    assert_trees_equal(of(first.best, 1), of(second.best, 1))


def test_plugin_step_equals_optax_by_hand():
  """One step of both segments; the loss reads the plugin without dropout."""
  data = random_sequences([4, 4, 7, 7])
  data = [data[0], data[0], data[2], data[2]]  # equal users: one batch
  _, frozen, result, start, logs = plugin_training(data, 1, length=6)
  backbone, _ = small_sasrec(6)

  def loss(plugin, items):
    history = np.zeros((1, 6), np.int32)
    history[0, 7 - len(items) :] = items[:-1]
    states = backbone.encode(frozen, history)[0, 7 - len(items) :]
    hidden = jax.nn.gelu(
      states @ plugin["Dense_0"]["kernel"] + plugin["Dense_0"]["bias"]
    )
    states = states + hidden @ plugin["Dense_1"]["kernel"]
    states = states + plugin["Dense_1"]["bias"]
    logits = states @ frozen["items"].T + frozen["bias"]
    return mean_cross_entropy(logits, jnp.asarray(items[1:]))

  by_hand = optax.chain(
    optax.clip_by_global_norm(0.01), optax.adamw(0.05, b2=0.98, weight_decay=0)
  )
  for segment, items in ((0, data[0]), (1, data[2])):
    own = jax.tree.map(lambda x, s=segment: x[s], start)
    value, gradient = jax.jit(jax.value_and_grad(
      lambda p, items=items: loss(p, items)
    ))(own)
    updates, _ = by_hand.update(gradient, by_hand.init(own), own)
    expected = optax.apply_updates(own, updates)
    got = jax.tree.map(lambda x, s=segment: x[s], result.best)
    np.testing.assert_allclose(logs["loss"][0, segment], value, rtol=1e-5)
    np.testing.assert_allclose(
      logs["norms"][0, segment], optax.tree.norm(gradient), rtol=1e-4
    )
    assert_trees_close(got, expected, tolerance=1e-4)


# The loop, with a step that counts: params at step t are start + t.


def counting_step(bad_at=None):
  def step(state, operands, t):
    params = jax.tree.map(lambda x: x + 1, state.params)
    loss = jnp.zeros(2)
    if bad_at is not None:
      loss = loss.at[1].set(jnp.where(t == bad_at, jnp.nan, 0))
    return state._replace(params=params), {"loss": loss, "t": t}

  return step


def counted(values, *, start=0.0, step=None, checkpoints=None, **options):
  """The loop with scripted validation values; -> (result, calls)."""
  calls = {"steps": [], "evaluations": [], "params": [], "resumed": []}
  slots = "abc"[: np.size(start)]
  script = iter(values)

  def evaluate(k, params):
    calls["params"].append(np.asarray(params["w"]).tolist())
    return dict(zip(slots, next(script), strict=True))

  params = {"w": jnp.asarray(start, jnp.float32)}
  options = {"num_steps": 12, "evaluate_every": 4, "dispatch": 2} | options
  plan = loop.Plan(select=tuple(slots), names=("counting",), **options)
  for event in loop.run(
    step or counting_step(), TrainState(params, (), (), None), None, plan,
    evaluate, checkpoints=checkpoints,
  ):
    match event:
      case loop.Started(_, t):
        calls["resumed"].append(t)
      case loop.Steps(_, t, log):
        calls["steps"].append((t, log["t"].tolist()))
      case loop.Validation(_, t, found):
        calls["evaluations"].append((t, [*found.values()]))
  return event, calls


def test_the_loop_runs_every_step_once_and_validates_on_time():
  result, calls = counted([[0.1], [0.3], [0.2]])
  assert [t for t, _ in calls["steps"]] == [0, 2, 4, 6, 8, 10]
  assert sum((ts for _, ts in calls["steps"]), []) == list(range(12))
  assert calls["evaluations"] == [(4, [0.1]), (8, [0.3]), (12, [0.2])]
  assert calls["params"] == [4.0, 8.0, 12.0]
  assert result.best["w"] == 8
  assert result[1:4] == ([8], [0.3], 12)


def test_steps_need_not_be_a_multiple_of_dispatch():
  result, calls = counted(
    [[0.1], [0.2]], num_steps=11, evaluate_every=6, dispatch=3
  )
  lists = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
  assert calls["steps"] == [(ts[0], ts) for ts in lists]
  assert [t for t, _ in calls["evaluations"]] == [6, 11]
  assert result.best["w"] == 11
  assert result.last_step == 11


@pytest.mark.parametrize("dispatch", [0, 3, 8])
def test_dispatch_must_divide_evaluate_every(dispatch):
  with pytest.raises(ValueError, match=f"dispatch={dispatch} .*every=4"):
    counted([], dispatch=dispatch)


@pytest.mark.parametrize(("values", "options", "expected"), [
  # An equal value is no improvement.
  ([[0.5], [0.4], [0.5], [0.6]], {"patience": 2}, ([4], [0.5], 12)),
  ([[0.5], [0.4], [0.6], [0.5], [0.5], [0.9]], {"patience": 2},
   ([12], [0.6], 20)),
  # Any slot that improves counts.
  ([[0.5, 0.1], [0.5, 0.2], [0.5, 0.3], [0.5, 0.3]],
   {"patience": 1, "start": [0.0, 0.0], "stacked": True},
   ([4, 12], [0.5, 0.3], 16)),
  ([[0.5], [0.4]] + [[0.4]] * 9, {"evaluate_first": True}, ([0], [0.5], 40)),
])  # fmt: skip
def test_patience_counts_from_the_last_improvement(values, options, expected):
  result, calls = counted(values, num_steps=40, **options)
  assert result[1:4] == expected
  validated = [t for t, _ in calls["evaluations"]]
  first = 0 if "evaluate_first" in options else 4
  assert validated == list(range(first, expected[-1] + 1, 4))
  np.testing.assert_array_equal(result.best["w"], np.squeeze(expected[0]))


def test_each_slot_keeps_its_own_best_from_the_start_on():
  values = [[0.5, 0.1, 0.2], [0.4, 0.3, 0.2], [0.6, 0.2, 0.1], [0.6, 0.2, 0.1]]
  result, calls = counted(
    values, start=[100.0, 200.0, 300.0], stacked=True, evaluate_first=True
  )
  assert [t for t, _ in calls["evaluations"]] == [0, 4, 8, 12]
  assert result.best_steps == [8, 4, 0]
  assert result.best_values == [0.6, 0.3, 0.2]
  np.testing.assert_array_equal(result.best["w"], [108.0, 204.0, 300.0])


def test_non_finite_loss_names_run_group_and_step():
  with pytest.raises(TrainingError, match=r"counting.*\[1\].*nan at step 7"):
    counted([[0.1]] * 3, step=counting_step(bad_at=7))


def test_a_state_shares_no_buffer_with_params():
  backbone = bigram(NUM_ITEMS)
  adjustment = Adjustment(aggregation.backdoor([1.0]))
  optimizer = make_optimizer(2, average=0.5)
  sequences, pool = data_of(GROUP_SEQUENCES, [0, 0, 0], 3)
  step = backbone_step(
    backbone, adjustment, optimizer, Draw(2, 3, "users", "users")
  )
  params = backbone.init(jax.random.key(0))
  state = init_state(params, optimizer, adjustment)
  operands = Operands(jax.random.key(1), sequences, pool, None)
  list(loop.run(step, state, operands, loop.Plan(2, 2, dispatch=1)))
  assert np.isfinite(np.asarray(params["table"])).all()  # not donated


# Resuming.


def wave(k, params):
  """A validation value that goes up and down as params change."""
  return {"wave": np.sin(40 * np.asarray(params["table"]).std())}


def resumable(directory, *, average, stop_at=None, evaluate_first=False):
  """A short run with dropout; -> (result, logs by step, values, state)."""
  sequences, pool = data_of(
    random_sequences([3, 5, 7, 9]), [0, 0, 1, 1], 4
  )
  backbone = bigram(NUM_ITEMS, dropout=0.3)
  params = backbone.init(jax.random.key(0))
  adjustment = Adjustment(aggregation.backdoor([0.4, 0.6]), path="sequential")
  optimizer = make_optimizer(
    14, learning_rate=0.05, warmup=3, average=0.8 if average else 0.0
  )
  step = backbone_step(
    backbone, adjustment, optimizer, Draw(2, 4, mean="users")
  )
  state = init_state(params, optimizer, adjustment)
  shapes = jax.eval_shape(lambda: (state, params))
  operands = Operands(jax.random.key(1), sequences, pool, None)
  logs, values, resumed = {}, [], []

  saved = checkpoints.Checkpoints(directory)
  plan = loop.Plan(14, 4, ("wave",), 2, evaluate_first=evaluate_first)
  result = None
  for event in loop.run(step, state, operands, plan, wave, checkpoints=saved):
    match event:
      case loop.Started(_, t):
        resumed.append(t)
      case loop.Steps(_, first, log):
        for offset in range(len(log["loss"])):
          logs[first + offset] = {k: v[offset] for k, v in log.items()}
      case loop.Validation(_, t, found):
        if t == stop_at:  # a crash
          break
        values.append((t, found["wave"]))
      case loop.Result():
        result = event
  saved.close()
  saved = checkpoints.Checkpoints(directory)
  final = saved.restore(shapes)
  saved.close()
  return result, logs, values, resumed, final


@pytest.mark.parametrize("fancy", [False, True])
def test_resumed_equals_uninterrupted(tmp_path, fancy):
  options = {"average": fancy, "evaluate_first": fancy}
  whole, logs, values, resumed, final = resumable(tmp_path / "a", **options)
  assert resumed == [-1]
  assert sorted(logs) == list(range(14))
  crashed, before, early, _, _ = resumable(
    tmp_path / "b", stop_at=12, **options
  )
  assert crashed is None
  again, after, late, resumed, state = resumable(tmp_path / "b", **options)
  assert resumed == [8]
  assert sorted(after) == list(range(8, 14))
  assert_trees_equal(again.best, whole.best)
  assert again[1:4] == whole[1:4]
  assert early + late == values
  assert_trees_equal({**before, **after}, logs)
  assert_trees_equal(state[0], final[0])
  for record in (state[1], final[1]):
    record.pop("cpu_seconds")
  assert state[1] == final[1]
  assert state[1]["step"] == 14
  done, none, nothing, resumed, _ = resumable(tmp_path / "b", **options)
  assert (none, nothing, resumed) == ({}, [], [14])
  assert_trees_equal(done.best, whole.best)
  assert done[1:4] == whole[1:4]


def test_early_stop_is_remembered(tmp_path):
  options = {"num_steps": 40, "patience": 1}
  for values, expected in (([[0.5], [0.4]], [-1]), ([], [8])):
    saved = checkpoints.Checkpoints(tmp_path)
    result, calls = counted(values, checkpoints=saved, **options)
    saved.close()
    assert calls["resumed"] == expected
    assert result[1:4] == ([4], [0.5], 8)
    assert result.best["w"] == 4
