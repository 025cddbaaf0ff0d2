"""The causal claim: where each kind of training converges, in a known world.

A table of bigram logits reads the last item alone, so that with plentiful data
each training rule has one limit, and the simulator knows it in closed form:

    joint                         P(y|x)         observational
    groups, weighted by P(d)      sum_d P(y|x,d) Q(d|x), prior-shifted
    the same, examples weighted   P(y|do(x)) = sum_d P(y|x,d) P(d)
    by share_d / P(d|x)

Windows of one target make the windows of training those of the closed forms.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import bigram

from experiments.methods import METHODS
from pin_jax import aggregation
from pin_jax.data import activeness, batches, simulator, splits
from pin_jax.data.interactions import from_columns
from pin_jax.training import loop, objectives, propensity
from pin_jax.training.optimizers import make_optimizer
from pin_jax.training.steps import (
  Adjustment,
  Operands,
  backbone_step,
  init_state,
)
from pin_jax.types import Batch

NUM_ITEMS = 8
NUM_GROUPS = 3
BORDERS = (5, 8, 20, 61)
NUM_USERS = 40_000
FORMS = ("observational", "prior_shifted", "interventional")


def make_world(confounding):
  return simulator.make_world(simulator.WorldSpec(
    num_items=NUM_ITEMS, borders=BORDERS, confounding=confounding,
    scale=2.5, rank=4, prior_decay=0.5,
  ), seed=9)


def one_item_windows():
  return jnp.arange(1, NUM_ITEMS + 1)[:, None]


def closed_forms(world):
  """{name: [V, V] limit after each last item}."""
  x = one_item_windows()
  shifted = world.prior[:, None] * world.initial  # P(d) P(x|d)
  forms = (
    simulator.observational(world, x, event="training"),
    np.einsum("gx,gxy->xy", shifted / shifted.sum(0), world.transition),
    simulator.interventional(world, x),
  )
  return dict(zip(FORMS, (np.asarray(f, np.float64) for f in forms),
                  strict=True))


def event_distribution(world):
  """Share of training events in each stratum, and P(x) over them, by hand.

  A user with n interactions has n - 3 training targets, all distributed as
  the stationary distribution of the stratum.
  """
  lengths = np.arange(world.length_pmf.shape[1])
  events = world.prior * (world.length_pmf * np.maximum(lengths - 3, 0)).sum(1)
  share = events / events.sum()
  return share, share @ world.initial


def divergence(world, target, log_probability):
  """Mean over training events of KL(target || trained), nats."""
  _, p_x = event_distribution(world)
  ratio = np.log(target) - log_probability
  return float(p_x @ (target * ratio).sum(-1))


@functools.cache
def problem(confounding):
  """Data of a world: (world, sequences, pool of G groups, of one, prior).

  Groups and prior come from activeness alone, as in an experiment; lengths
  of strata are disjoint, so that groups are the strata.
  """
  world = make_world(confounding)
  data, strata = simulator.simulate(world, num_users=NUM_USERS, seed=1)
  split = splits.leave_one_out(data)
  groups = activeness.assign_groups(
    split.activeness, num_groups=NUM_GROUPS, rule="thresholds",
    thresholds=[b - 2 for b in BORDERS[1:-1]],
  )
  np.testing.assert_array_equal(groups, strata)
  targets = batches.training_targets(split)
  pool = lambda groups, count: batches.make_pool(
    targets, groups, num_groups=count, length=1
  )
  prior = lambda kind: activeness.prior(kind, groups, targets, NUM_GROUPS)
  return (
    world, batches.make_sequences(split), pool(groups, NUM_GROUPS),
    pool(np.zeros_like(groups), 1), prior, jnp.asarray(groups),
  )


def run(step, state, sequences, pool, frozen, num_steps):
  """The loop from start to end; -> (params, stacked logs)."""
  _, *events, result = loop.run(
    step, state, Operands(jax.random.key(0), sequences, pool, frozen),
    loop.Plan(num_steps, num_steps, dispatch=num_steps // 2),
  )
  logs = [event.logs for event in events]
  return result.best, jax.tree.map(lambda *x: np.concatenate(x), *logs)


def train(
  confounding, prior, *, groups=True, importance=None, frozen=None,
  num_steps=500,
):
  """Trains the table; -> (log P(y|x) [V, V] of the table, logs)."""
  _, sequences, by_group, together, _, _ = problem(confounding)
  backbone = bigram(NUM_ITEMS, init=jax.nn.initializers.zeros)
  weighting = aggregation.backdoor(prior)
  optimizer = make_optimizer(
    num_steps, learning_rate=0.1, final=0.003, b2=0.99
  )
  adjustment = Adjustment(weighting, path="accumulated")
  step = backbone_step(
    backbone, adjustment, optimizer, batches.Draw(512 if groups else 1536, 1),
    importance=importance,
  )
  state = init_state(
    backbone.init(jax.random.key(0)), optimizer, adjustment
  )
  pool = by_group if groups else together
  params, logs = run(step, state, sequences, pool, frozen, num_steps)
  logits = np.asarray(params["table"], np.float64)[1:, 1:]
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True)), logs


def known_posterior(world):
  """P(d|x) of training events by Bayes' rule [V+1, G]; row 0 unused."""
  share, p_x = event_distribution(world)
  return np.concatenate(
    [np.ones((1, NUM_GROUPS)), (share[:, None] * world.initial / p_x).T]
  )


def known_importance(frozen, batch):
  """share_d / P(d|x) with the world's own propensities; [G, B, L]."""
  groups = jnp.arange(NUM_GROUPS)[:, None, None]
  propensities = frozen["posterior"][batch.history, groups]
  return frozen["shares"][groups] / propensities


def joint(confounding):
  return train(confounding, [1.0], groups=False)


def group_weights(confounding):
  return train(confounding, problem(confounding)[4]("users"))


def exact_backdoor(confounding):
  world = problem(confounding)[0]
  frozen = {
    "posterior": jnp.asarray(known_posterior(world), jnp.float32),
    "shares": jnp.asarray(event_distribution(world)[0], jnp.float32),
  }
  return train(
    confounding, problem(confounding)[4]("users"),
    importance=known_importance, frozen=frozen,
  )


def fitted_backdoor(confounding):
  _, sequences, _, together, prior, groups = problem(confounding)
  backbone = bigram(NUM_ITEMS, init=jax.nn.initializers.zeros)
  optimizer = make_optimizer(300, learning_rate=0.02)
  step = propensity.classifier_step(backbone, optimizer, batches.Draw(1024, 1))
  params = propensity.init_classifier(
    jax.random.key(1), NUM_ITEMS + 1, NUM_GROUPS
  )
  frozen = {"backbone": backbone.init(jax.random.key(0)), "groups": groups}
  classifier, _ = run(
    step, init_state(params, optimizer), sequences, together, frozen,
    300,
  )
  return train(
    confounding, prior("users"),
    importance=propensity.fitted_importance(backbone, clip=50.0),
    frozen={
      "backbone": frozen["backbone"],
      "classifier": classifier,
      "shares": jnp.asarray(prior("interactions"), jnp.float32),
    },
  )


LIMITS = {
  "joint": (joint, "observational", 0.003),
  "group_weights": (group_weights, "prior_shifted", 0.003),
  "exact_backdoor": (exact_backdoor, "interventional", 0.003),
  "fitted_backdoor": (fitted_backdoor, "interventional", 0.006),
}


def test_closed_forms_differ_where_activeness_confounds():
  world = make_world(0.9)
  forms = closed_forms(world)
  for p in FORMS:
    for q in FORMS:
      apart = divergence(world, forms[p], np.log(forms[q]))
      assert (apart > 0.1) == (p != q), (p, q, apart)


@pytest.mark.parametrize("kind", LIMITS)
def test_training_converges_to_its_own_limit(kind):
  rule, own, tolerance = LIMITS[kind]
  log_probability, logs = rule(0.9)
  world = problem(0.9)[0]
  apart = {
    form: divergence(world, target, log_probability)
    for form, target in closed_forms(world).items()
  }
  print(kind, {form: round(value, 5) for form, value in apart.items()})
  assert apart.pop(own) < tolerance
  assert min(apart.values()) > 10 * tolerance, apart
  if kind == "exact_backdoor":  # 1 / sum_x P(x|d) (share_d / P(d|x))^2
    _, p_x = event_distribution(world)
    share = 1 / (p_x**2 / world.initial).sum(-1)
    np.testing.assert_allclose(
      logs["effective_share"].mean(0), share, rtol=0.02
    )
    assert share.min() < 0.8


# Events (x, y) of two groups; group 1 never shows the history 3.
EVENTS = (
  [(1, 1)] * 3 + [(1, 2)] + [(2, 3)] * 2 + [(3, 1)] * 4 + [(3, 2)] * 2,
  [(1, 3)] * 4 + [(2, 3)] * 2 + [(2, 1)] * 6,
)


@pytest.mark.parametrize("path", ["stacked", "accumulated", "weighted"])
def test_exact_weights_keep_the_prior_where_histories_are_never_shown(path):
  """At a table of zeros: sum_d P(d) sum_x P(x) (softmax - P(y|x,d))."""
  prior, size = np.array([0.5, 0.5]), 4
  count = np.array([len(events) for events in EVENTS])
  counts = np.zeros((2, size, size))
  for group, events in enumerate(EVENTS):
    np.add.at(counts[group], tuple(np.transpose(events)), 1)
  of_x, p_x = counts.sum(-1), counts.sum((0, 2)) / count.sum()
  expected = np.zeros((size, size))
  for group, history in np.argwhere(of_x):
    slope = (np.arange(size) > 0) / 3 - (
      counts[group, history] / of_x[group, history]
    )
    expected[history] += prior[group] * p_x[history] * slope
  events = jnp.asarray(EVENTS)
  batch = Batch(jnp.zeros((2, 12), int), events[..., :1], events[..., 1:])
  shares = count / count.sum()
  given = of_x / np.maximum(of_x.sum(0), 1)  # P(d|x)
  weights = [
    [[shares[g] / given[g, x]] for x, _ in EVENTS[g]] for g in range(2)
  ]
  losses = objectives.group_losses(
    bigram(size - 1, init=jax.nn.initializers.zeros), mean="interactions"
  )
  out = aggregation.aggregate(
    losses.group_loss, aggregation.backdoor(prior), path=path,
    weighted_loss=losses.weighted_loss,
  ).step(
    {"table": jnp.zeros((size, size))},
    objectives.GroupBatch(batch, jnp.asarray(weights)),
    jax.random.split(jax.random.key(0), 2), (),
  )
  got = np.asarray(out.gradient["table"])
  one = (got * expected).sum() / (expected**2).sum()  # for both groups
  np.testing.assert_allclose(got, one * expected, atol=1e-6)


@pytest.mark.parametrize("mean", objectives.MEANS)
@pytest.mark.parametrize("draw", batches.DRAWS)
def test_shares_are_those_of_the_classifiers_batches(draw, mean):
  """Of the weights in batches of everybody, histories beyond a window."""
  rng = np.random.default_rng(2)
  lengths = rng.integers(3, 25, 30)
  users = np.repeat(np.arange(30), lengths)
  split = splits.leave_one_out(
    from_columns(users, rng.integers(0, 9, len(users)))
  )
  groups = np.digitize(lengths, (8, 18))
  pool = batches.make_pool(
    batches.training_targets(split), np.zeros(30, int), num_groups=1, length=5
  )
  batch = jax.tree.map(lambda x: x[0], batches.Draw(20_000, 5, draw).batch(
    jax.random.key(0), batches.make_sequences(split), pool
  ))
  weights = np.asarray(objectives.position_weights(batch.targets, mean))
  observed = np.bincount(groups[batch.users], weights.sum(-1))
  got = propensity.event_shares(
    split, groups, 3, batches.Draw(1, 5, draw, mean)
  )
  np.testing.assert_allclose(got, observed, atol=0.01)
  counted = batches.training_targets(split)
  if (draw, mean) == ("users", "users"):
    counted = counted > 0
  if draw == mean:
    want = np.bincount(groups, counted) / counted.sum()
    np.testing.assert_allclose(got, want)


def test_the_classifier_follows_the_draw_of_the_groups():
  stages = {stage.name: stage for stage in METHODS["pin_exact"].stages}
  exact = stages["pin-exact/backbone"]
  assert stages[exact.exact].sampling == exact.sampling


@pytest.mark.parametrize("kind", ["joint", "group_weights", "exact_backdoor"])
def test_all_limits_coincide_without_confounding(kind):
  log_probability, logs = LIMITS[kind][0](0.0)
  world = problem(0.0)[0]
  for target in closed_forms(world).values():
    apart = divergence(world, target, log_probability)
    assert apart < 0.003
  print(kind, round(apart, 5))
  if "effective_share" in logs:
    np.testing.assert_allclose(logs["effective_share"], 1, rtol=1e-4)
