"""Weightings: golden values, claimed properties, degenerate input, solvers.

Golden values marked TorchJD come from torchjd 0.18.0 (torch 2.13.0, float64;
solvers cvxpy 1.9.3, clarabel 0.11.1, quadprog 0.1.14, ecos) on the matrix J
below, with the packages' own regularisation turned down to 1e-12 where it can
be set. Neither package is imported here.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from scipy import optimize

from pin_jax import aggregation
from pin_jax.aggregation import weightings

_OF_PAGE = toys.of_page()
RULES = {  # CONTRIBUTING.md's example passes what all others do
  **toys.RULES, "inverse_norms": lambda prior: _OF_PAGE["inverse_norms"](),
}

quick_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

# One small matrix: a row is a group's gradient.
J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0], [1.0, 0.0, -2.0]])
LOSSES = np.array([1.0, 3.0, 2.0])
PRIOR = np.array([0.5, 0.3, 0.2])

KNOWN = (  # before any loss
  "backdoor", "joint", "inverse_propensity",
  "annealed_backdoor",
)
BY_LOSS = ("group_dro", "streaming_dro", "cvar", "famo")
BLIND = (*KNOWN, *BY_LOSS)  # to the gradients
SIMPLEX = (*BLIND, "mgda")
NON_CONFLICTING = ("mgda", "upgrad", "nash_mtl")
LINEAR = (*BLIND, "pcgrad", "gradvac", "upgrad")
RANDOM = ("pcgrad", "gradvac")
ORDERED = ("gradient_alignment",)  # by activeness
SEEING = tuple(name for name in RULES if name not in BLIND)


@functools.cache
def rule(name, prior=tuple(PRIOR)):
  weighting = RULES[name](np.array(prior))
  return weighting, quick_jit(weighting.update)


def gramian_of(gradients):
  """In float64, then rounded once: what a perfect float32 Gramian holds."""
  return jnp.asarray(gradients @ gradients.T, jnp.float32)


def weigh(name, gradients, losses=None, prior=None, state=None):
  size = len(gradients)
  if prior is None:
    prior = PRIOR if size == len(PRIOR) else np.ones(size) / size
  weighting, update = rule(name, tuple(prior))
  losses = np.arange(1.0, size + 1) if losses is None else losses
  state = weighting.init() if state is None else state
  weights, _ = update(
    gramian_of(gradients), jnp.asarray(losses, jnp.float32), state
  )
  assert weights.shape == (size,)
  assert weights.dtype == jnp.float32
  return np.asarray(weights, np.float64)


def run(weighting, gramians, losses):
  """Weights of successive updates, and the last state."""
  state, out = weighting.init(), []
  update = quick_jit(weighting.update)
  for gramian, loss in zip(gramians, losses, strict=True):
    weights, state = update(gramian, jnp.asarray(loss, jnp.float32), state)
    out.append(np.asarray(weights))
  return np.stack(out), state


def examples(seed=0, count=12):
  """Three gradients: independent, dependent, nearly equal, of mixed norms."""
  rng = np.random.default_rng(seed)
  yield J
  for i in range(count):
    gradients = rng.normal(size=(3, (2, 3, 50)[i % 3]))
    if i % 4 == 1:
      gradients = 0.1 * gradients + rng.normal(size=gradients.shape[1])
    if i % 4 == 2:
      gradients *= 10.0 ** rng.uniform(-2, 2, (3, 1))
    yield gradients


# Golden values.

GOLDEN = {
  # TorchJD. mgda by hand: G w = (2, 2, 2) / 5 for w = (2, 1, 2) / 5.
  "mgda": [0.4, 0.2, 0.4],
  "upgrad": [1.09753086, 0.598084291, 0.971902937],
  "cagrad": [0.446644878, 1 / 3, 1 / 3],
  "imtl_g": [0.413508668, 0.217528729, 0.368962603],
  "nash_mtl": [1.10204717, 0.573023031, 1.05382334],
  "aligned_mtl": [0.370486253, 0.208690684, 0.355406069],
  # By hand: norms sqrt(18), sqrt(38), sqrt(5).
  "normalized": np.sqrt([18, 38, 5]).mean() / 3 / np.sqrt([18, 38, 5]),
  "inverse_norms": 1 / np.sqrt([18, 38, 5]) / sum(1 / np.sqrt([18, 38, 5])),
  # By hand: G 1 = (-10, 20, 3), so 1 and 2 are kept; both row sums are
  # 1 + cos(1, 2).
  "consensus": [0, 0.5, 0.5],
  # By hand: t = (J0 + J1) / 2 = (1, 1, 1), <t, J> = (-2, 8, -1), so 2 t / 3 is
  # added to J0 and t / 3 to J2: t in all, divided by 3.
  "gradient_alignment": [0.5, 0.5, 1 / 3],
  # By hand, losses (1, 3, 2) and prior (.5, .3, .2): of the worst mass .4,
  # group 1 has .3 and group 2 the rest.
  "cvar": [0, 0.75, 0.25],
  **dict.fromkeys(KNOWN, PRIOR),
  "inverse_propensity": np.sqrt(PRIOR) / np.sqrt(PRIOR).sum(),
  **dict.fromkeys(
    ("group_dro", "streaming_dro"),
    PRIOR * np.exp(0.1 * LOSSES) / (PRIOR * np.exp(0.1 * LOSSES)).sum(),
  ),
  "famo": 1 / LOSSES / (1 / LOSSES).sum(),
}


def test_every_rule_has_golden_values():
  assert set(GOLDEN) | set(RANDOM) == set(RULES)  # RANDOM below


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
  np.testing.assert_allclose(
    weigh(name, J, LOSSES), GOLDEN[name], rtol=2e-5, atol=1e-7
  )


def projected(gradients, orders):
  """PCGrad on vectors, as its algorithm 1 is printed, but for the mean."""
  total = 0
  for g, order in enumerate(orders):
    p = gradients[g]
    for h in order:
      if p @ gradients[h] < 0:
        p = p - (p @ gradients[h]) / (gradients[h] @ gradients[h]) * (
          gradients[h]
        )
    total = total + p / len(gradients)
  return total


def aligned(gradients):
  """Each gradient's part against the tail's mean taken out; the mean."""
  tail = gradients[: max(len(gradients) - 1, 1)].mean(0)
  total = np.zeros_like(tail)
  for gradient in gradients:
    along = gradient @ tail / (tail @ tail)
    total += gradient - tail * along if along < 0 else gradient
  return total / len(gradients)


def test_gradient_alignment_is_the_mean_of_projections():
  rng, met = np.random.default_rng(1), 0
  for _ in range(20):
    gradients = rng.normal(size=(4, 5)) * 10.0 ** rng.uniform(-1, 1, (4, 1))
    expected = aligned(gradients)
    np.testing.assert_allclose(
      weigh("gradient_alignment", gradients) @ gradients, expected, rtol=0,
      atol=1e-5 * np.abs(gradients).max(),
    )
    met += not np.allclose(expected, gradients.mean(0))
  assert met > 5  # that many have a conflict


def test_gradient_alignment_without_conflict_or_head_is_the_mean():
  agreeing = np.array([[1.0, 2, 0], [1, 0, 1], [2, 1, 1]])
  np.testing.assert_allclose(
    weigh("gradient_alignment", agreeing), [1 / 3] * 3, rtol=1e-5
  )
  assert weigh("gradient_alignment", J[:1]) == pytest.approx([1])
  # The tail's gradients cancel: there is nothing to align with.
  opposite = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0]])
  np.testing.assert_allclose(
    weigh("gradient_alignment", opposite), [1 / 3] * 3, rtol=1e-5
  )


def all_orders(size):
  others = [[h for h in range(size) if h != g] for g in range(size)]
  return itertools.product(*(itertools.permutations(o) for o in others))


def test_pcgrad_takes_every_order_equally_often():
  weighting, _ = rule("pcgrad")
  keys = jax.random.split(jax.random.PRNGKey(1), 3000)
  draw = lambda key: weighting.update(gramian_of(J), jnp.ones(3), key)[0]
  draws = np.asarray(quick_jit(jax.vmap(draw))(keys), np.float64)
  outcomes = np.array([projected(J, orders) for orders in all_orders(3)])
  outcomes, counts = np.unique(
    outcomes.round(6), axis=0, return_counts=True
  )
  directions = draws @ J
  distance = np.abs(directions[:, None] - outcomes[None]).max(-1)
  assert distance.min(1).max() < 1e-4
  seen = np.bincount(distance.argmin(1), minlength=len(outcomes)) / 3000
  # Five standard errors of a share.
  np.testing.assert_allclose(seen, counts / counts.sum(), atol=0.046)


def test_gradvac_golden_values():
  # Two groups, so that there is one order. TorchJD, beta = .5, its sum halved.
  weights, (targets, _) = run(
    weightings.gradvac(2, 0.5), [gramian_of(J[:2])] * 3, [[1, 1]] * 3
  )
  expected = [
    [2.22222222, 1.57894737],
    [1.8579878, 1.40641528],
    [1.58335643, 1.27632673],
  ]
  np.testing.assert_allclose(2 * weights, expected, rtol=1e-5)
  cosine = -22 / np.sqrt(18 * 38)
  np.testing.assert_allclose(
    targets, (1 - 0.5**3) * cosine * (1 - np.eye(2)), rtol=1e-5
  )


def test_gradvac_learns_nothing_from_a_gradient_that_vanished():
  """With c = -1 and target 0, p_0 = grad_0 + grad_1 = 0 has no cosine."""
  gradients = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
  weighting = weightings.gradvac(3, 0.5)
  update, seen = quick_jit(weighting.update), set()
  for seed in range(12):
    targets = jnp.zeros((3, 3)).at[0, 2].set(0.5)
    state = targets, jax.random.PRNGKey(seed)
    _, (targets, _) = update(gramian_of(gradients), LOSSES, state)
    seen.add(float(targets[0, 2]))
  # Unmoved where group 1 comes first; else half way to the cosine 0.
  assert seen == {0.5, 0.25}


def test_gradvac_without_memory_is_pcgrad():
  got, _ = run(weightings.gradvac(3, 0.0), [gramian_of(J)], [[1, 1, 1]])
  np.testing.assert_allclose(got[0], weigh("pcgrad", J), rtol=1e-5)


def test_famo_golden_values():
  losses = [[1, 2, 3], [0.9, 1.9, 3.1], [0.5, 1.95, 2], [0.4, 1, 1.5]]
  weights, _ = run(weightings.famo(3), [gramian_of(J)] * 4, losses)
  expected = [  # TorchJD, each batch's losses also "after" the last update
    [0.545454544, 0.272727273, 0.181818183],
    [0.562147681, 0.266280499, 0.17157182],
    [0.65183043, 0.174012892, 0.174156678],
    [0.585461767, 0.245552542, 0.168985691],
  ]
  np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_famo_gives_an_empty_group_no_weight():
  losses = [[1, 0, 3], [0.9, 1.9, 0], [0.5, 1.95, 2], [0, 0, 0]]
  weights, _ = run(weightings.famo(3), [gramian_of(J)] * 4, losses)
  np.testing.assert_array_equal(weights[:3] == 0, np.equal(losses[:3], 0))
  np.testing.assert_allclose(weights[0], [0.75, 0, 0.25], rtol=1e-5)
  np.testing.assert_allclose(weights[3], np.ones(3) / 3, rtol=1e-6)


def test_consensus_stops_where_the_majority_disagrees():
  one_against_two = np.array([[10.0, 1], [-1, 0], [-1, 1]])
  np.testing.assert_array_equal(weigh("consensus", one_against_two), 0)
  two_against_one = np.array([[-10.0, 1], [-1, 0], [1, 1]])
  assert weigh("consensus", two_against_one).sum() == pytest.approx(1)


def test_exponentiated_weights_over_steps():
  losses = np.random.default_rng(0).exponential(size=(6, 3))
  weights, _ = run(
    weightings.group_dro(PRIOR, 0.3), [gramian_of(J)] * 6, losses
  )
  expected = PRIOR * np.exp(0.3 * np.cumsum(losses, 0))
  np.testing.assert_allclose(
    weights, expected / expected.sum(1, keepdims=True), rtol=1e-4
  )
  smooth = [losses[0]]
  for loss in losses[1:]:
    smooth.append(0.8 * smooth[-1] + 0.2 * loss)
  weights, _ = run(
    weightings.streaming_dro(PRIOR, 0.3, 0.2), [gramian_of(J)] * 6, losses
  )
  expected = PRIOR * np.exp(0.3 * np.cumsum(smooth, 0))
  np.testing.assert_allclose(
    weights, expected / expected.sum(1, keepdims=True), rtol=1e-4
  )


def test_a_group_without_prior_stays_without_weight():
  for make in (weightings.group_dro, weightings.streaming_dro):
    weights, _ = run(make([0, 1, 3], 1.0), [gramian_of(J)] * 2, [[9, 1, 1]] * 2)
    np.testing.assert_allclose(weights[1], [0, 0.25, 0.75], rtol=1e-5)


def test_cvar_shares_ties_and_ends_at_the_prior():
  update = weightings.cvar(PRIOR, 0.4).update
  tied = update(gramian_of(J), jnp.array([2.0, 2.0, 1.0]), ())[0]
  np.testing.assert_allclose(tied, [0.5 / 0.8, 0.3 / 0.8, 0], rtol=1e-5)
  whole = weightings.cvar(PRIOR, 1).update(gramian_of(J), LOSSES, ())[0]
  np.testing.assert_allclose(whole, PRIOR, rtol=1e-5)


def test_tempered():
  np.testing.assert_allclose(weightings.tempered([2, 0, 7], 0), [0.5, 0, 0.5])
  np.testing.assert_allclose(weightings.tempered([1, 3], 2), [0.1, 0.9])
  np.testing.assert_allclose(weightings.tempered([1, 3], -1), [0.75, 0.25])
  np.testing.assert_allclose(weightings.tempered([1, 3], 1e4), [0, 1])


def test_annealing_is_linear_then_stays():
  weighting = weightings.annealed_backdoor([1, 9], [1, 1], 4)
  weights, state = run(weighting, [jnp.eye(2)] * 7, [[1, 1]] * 7)
  share = np.array([0, 0.25, 0.5, 0.75, 1, 1, 1])
  np.testing.assert_allclose(
    weights[:, 0], (1 - share) * 0.1 + share * 0.5, rtol=1e-5
  )
  assert state == 4


def known(weighting):
  """The weights of a rule that reads nothing."""
  unread = jnp.full((3, 3), jnp.nan)
  return weighting.update(unread, unread[0], weighting.init())[0]


def test_inverse_propensity_from_joint_to_equal():
  shares = np.array([0.7, 0.2, 0.1])
  make = lambda *args: known(weightings.inverse_propensity(shares, *args))
  np.testing.assert_allclose(make(0), shares, rtol=1e-6)
  np.testing.assert_allclose(make(1), np.ones(3) / 3, rtol=1e-6)
  # The clip 2 binds where 1 / share is 5 and 10: .7 / .7, .2 * 2, .1 * 2.
  np.testing.assert_allclose(make(1, 2), np.array([5, 2, 1]) / 8, rtol=1e-6)
  empty = known(weightings.inverse_propensity([0.5, 0, 0.5], 1))
  np.testing.assert_allclose(empty, [0.5, 0, 0.5])


@pytest.mark.parametrize("name", list(RULES))
def test_rules_read_no_more_than_they_say(name):
  weighting, update = rule(name)
  unread = jnp.full((3, 3), jnp.nan)
  want = (
    "nothing" if name in KNOWN else "losses" if name in BY_LOSS else "gradients"
  )
  assert weighting.reads == want
  if want == "gradients":
    return
  losses = jnp.asarray(LOSSES) if want == "losses" else unread[0]
  weights, _ = update(unread, losses, weighting.init())
  np.testing.assert_allclose(weights, weigh(name, J, LOSSES), rtol=1e-6)


def test_preferences_before_a_rule():
  # Without conflict, the backdoor adjustment; with it, UPGrad on s * J.
  agreeing = np.array([[1.0, 2, 0], [1, 0, 1], [2, 1, 1]])
  for name in ("pcgrad", "upgrad"):
    first = weightings.preceded_by(PRIOR, RULES[name](PRIOR))
    update = quick_jit(first.update)
    weights, _ = update(gramian_of(agreeing), LOSSES, first.init())
    np.testing.assert_allclose(weights, PRIOR, rtol=1e-5)
  scale = 3 * PRIOR
  weights, _ = update(gramian_of(J), LOSSES, ())
  expected = scale * weigh("upgrad", scale[:, None] * J)
  np.testing.assert_allclose(weights, expected, rtol=1e-5)
  assert first.reads == "gradients"


def test_preferences_before_losses_and_constants():
  first = weightings.preceded_by(PRIOR, weightings.group_dro([1, 1, 1], 0.5))
  weights, _ = first.update(gramian_of(J), LOSSES, first.init())
  q = np.exp(0.5 * 3 * PRIOR * LOSSES)
  np.testing.assert_allclose(weights, 3 * PRIOR * q / q.sum(), rtol=1e-5)
  uniform = aggregation.backdoor([1, 1, 1])
  np.testing.assert_allclose(
    known(weightings.preceded_by(PRIOR, uniform)), PRIOR, rtol=1e-6
  )


# Properties.


@pytest.mark.parametrize("name", SIMPLEX)
def test_weights_are_on_the_simplex(name):
  for gradients in examples():
    weights = weigh(name, gradients, LOSSES)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-5)


def test_consensus_is_on_the_simplex_or_zero():
  sums = [weigh("consensus", gradients).sum() for gradients in examples()]
  assert all(s == 0 or s == pytest.approx(1, abs=1e-5) for s in sums)


def least_projection(gradients, weights):
  """min_g <grad_g, d> / ||grad_g||, in units of the largest part of d."""
  norms = np.linalg.norm(gradients, axis=1)
  parts = np.abs(weights * norms).max()
  return (gradients @ (weights @ gradients) / norms).min() / parts


@pytest.mark.parametrize("name", NON_CONFLICTING)
def test_non_conflicting(name):
  # Where G w is exactly 0 or larger, float32 leaves the square root of its
  # resolution: at a Pareto stationary point d is what is left of 0.
  for gradients in examples():
    assert least_projection(gradients, weigh(name, gradients)) > -5e-4


@pytest.mark.parametrize("name", sorted({*RULES} - {*RANDOM, *ORDERED}))
def test_permutation_equivariant(name):
  order = np.array([2, 0, 1])
  for gradients in examples(count=6):
    weights = weigh(name, gradients, LOSSES, PRIOR)
    permuted = weigh(name, gradients[order], LOSSES[order], PRIOR[order])
    parts = weights * np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(
      permuted @ gradients[order], weights @ gradients, rtol=0,
      atol=1e-3 * np.abs(parts).max(),
    )


@pytest.mark.parametrize("name", LINEAR)
def test_linear_under_scaling(name):
  rng = np.random.default_rng(3)
  for gradients in examples(count=6):
    a, b = rng.uniform(0.1, 3, (2, 3, 1))
    of = lambda c, x=gradients: weigh(name, c * x, LOSSES) @ (c * x)
    expected = 2 * of(a) + 3 * of(b)
    norms = np.linalg.norm((2 * a + 3 * b) * gradients, axis=1)
    np.testing.assert_allclose(
      of(2 * a + 3 * b), expected, rtol=0, atol=1e-5 * norms.mean()
    )


@pytest.mark.parametrize("scale", [1e-10, 1e10])
@pytest.mark.parametrize("name", RULES)
def test_scale_of_all_gradients(name, scale):
  degree = 0 if name == "nash_mtl" else 1
  for gradients in (J, J[:, :2], np.array([[1.0, 0], [-1, 0], [0, 1]])):
    direction = weigh(name, gradients) @ gradients
    got = weigh(name, scale * gradients) @ (scale * gradients)
    np.testing.assert_allclose(
      got / scale**degree, direction, rtol=1e-3,
      atol=1e-3 * max(np.abs(direction).max(), 0.1),
    )


# Every rule's direction in float64, by another way than the rule's own.


def _nash(unit):
  """log w of w^T C w / 2 - sum log w, which is convex in it."""
  cosine = unit @ unit.T
  value = lambda z: np.exp(z) @ cosine @ np.exp(z) / 2 - z.sum()
  slope = lambda z: np.exp(z) * (cosine @ np.exp(z)) - 1
  best = optimize.minimize(
    value, np.zeros(len(unit)), jac=slope, options={"gtol": 1e-10}
  )
  return np.exp(best.x) @ unit


def _cagrad(gradients, c=0.4):
  size = len(gradients)
  best = min((
    optimize.minimize(
      cagrad_dual(gradients, c), start, jac=True, method="SLSQP",
      bounds=[(0, 1)] * size, options={"ftol": 1e-15, "maxiter": 500},
      constraints={
        "type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like,
      },
    ) for start in (np.eye(size) + 1) / (size + 1)
  ), key=lambda found: found.fun)
  worst, mean = best.x @ gradients, gradients.mean(0)
  return mean + c * np.linalg.norm(mean) * worst / np.linalg.norm(worst)


def _mgda(gradients, norms):
  # argmin ||J^T x||^2 + (1^T x - 1)^2 over x >= 0 is a multiple of w.
  x, _ = optimize.nnls(
    np.vstack([gradients.T / norms.min(), np.ones(len(norms))]),
    np.append(np.zeros(gradients.shape[1]), 1), maxiter=4000,
  )
  return (x / x.sum()) @ gradients


def _upgrad(unit, norms):
  # p - grad_g is the point of the cone nearest to -grad_g.
  rows = [
    n * (u + nearest(unit.T, -u)) for u, n in zip(unit, norms, strict=True)
  ]
  return np.mean(rows, axis=0)


def _aligned_mtl(gradients):
  u, s, v = np.linalg.svd(gradients, full_matrices=False)
  return s.min() * (u @ v).mean(0)


def _consensus(gradients, unit):
  kept = unit[gradients @ gradients.mean(0) > 0]
  scores = np.exp((kept @ kept.T).sum(1)) * (
    len(kept) >= len(unit) - len(kept)
  )
  kept = gradients[gradients @ gradients.mean(0) > 0]
  return scores / max(scores.sum(), 1e-300) @ kept


def directions(name, gradients):
  """d of a rule that reads gradients; all that chance may give."""
  norms = np.linalg.norm(gradients, axis=1)
  unit = gradients / norms[:, None]
  if name in RANDOM:  # without a memory, gradvac is pcgrad
    return [projected(gradients, o) for o in all_orders(len(gradients))]
  if name == "imtl_g":
    weights = np.linalg.solve(unit @ unit.T, np.ones(len(unit))) / norms
    return [weights / weights.sum() @ gradients]
  return [{
    "normalized": lambda: unit.mean(0) * norms.mean(),
    "consensus": lambda: _consensus(gradients, unit),
    "mgda": lambda: _mgda(gradients, norms),
    "upgrad": lambda: _upgrad(unit, norms),
    "cagrad": lambda: _cagrad(gradients / norms.max()) * norms.max(),
    "nash_mtl": lambda: _nash(unit),
    "aligned_mtl": lambda: _aligned_mtl(gradients),
    "gradient_alignment": lambda: aligned(gradients),
    "inverse_norms": lambda: unit.sum(0) / sum(1 / norms),
  }[name]()]


@pytest.mark.parametrize("name", SEEING)
def test_directions_where_some_gradients_are_far_smaller(name):
  degree = 0 if name == "nash_mtl" else 1
  rng = np.random.default_rng(23)
  for ratios in ([400, 1, 1], [1, 1, 400], [1, 400, 400], [400, 1, 1e4]):
    gradients = rng.normal(size=(3, 6)) / np.array(ratios)[:, None]
    wanted = np.array(directions(name, gradients))
    for scale in (1e-6, 1, 1e6):
      got = weigh(name, scale * gradients) @ (scale * gradients)
      apart = np.linalg.norm(got / scale**degree - wanted, axis=1).min()
      assert apart <= 1e-4 * np.linalg.norm(wanted, axis=1).max(), (
        ratios, scale
      )


def test_aligned_mtl_tells_dependence_by_unit_gradients():
  """Of two parallel gradients and a small one, two components are left."""
  gradients = np.array([[3.0, 0, 0], [-6, 0, 0], [0, 2e-3, 1e-3]])
  u, s, v = np.linalg.svd(gradients)
  expected = s[1] * (u[:, :2] @ v[:2]).mean(0)
  for scale in (1e-6, 1, 1e6):
    got = weigh("aligned_mtl", scale * gradients) @ gradients
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-9)


# Degenerate input.

_e = np.eye(3)
DEGENERATE = {
  "zero": np.zeros((3, 2)),
  "identical": np.ones((3, 2)),
  "nearly identical": np.ones((3, 2)) + 1e-6 * _e[:, :2],
  "opposite": np.array([[1.0, 2], [-1, -2], [1, 2]]),
  "stationary": np.array([[1.0, 0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]]),
  "rank one": np.array([[1.0, 2], [2, 4], [5, 10]]),
  "orthogonal": _e,
  "one empty": J * [[1], [0], [1]],
  "two empty": J * [[0], [0], [1]],
  "mixed scales": J * [[1e-10], [1], [1e10]],
  "tiny": 1e-10 * J,
  "huge": 1e10 * J,
  "tiny opposite": 1e-10 * np.array([[1.0, 2], [-1, -2], [1, 2]]),
  "huge identical": 1e10 * np.ones((3, 2)),
}


@pytest.mark.parametrize("name", RULES)
def test_degenerate_gradients_give_finite_weights(name):
  for case, gradients in DEGENERATE.items():
    norms = np.linalg.norm(gradients, axis=1)
    for losses in (LOSSES, np.zeros(3), LOSSES * (norms > 0), 1e10 * LOSSES):
      weights = weigh(name, gradients, losses)
      assert np.isfinite(weights).all(), (case, losses)
      if name in SIMPLEX:
        assert weights.sum() == pytest.approx(1, abs=1e-5), case


@pytest.mark.parametrize("name", RULES)
def test_one_group(name):
  for gradients in (np.array([[3.0, 4.0]]), np.zeros((1, 2))):
    weights = weigh(name, gradients)
    norm = np.linalg.norm(gradients)
    if not norm:
      assert np.isfinite(weights).all()
      continue
    # CAGrad goes further by its radius, Nash-MTL's step has norm 1.
    expected = {"cagrad": 1.4, "nash_mtl": 1 / norm}.get(name, 1)
    np.testing.assert_allclose(weights, [expected], rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in SEEING if n != "mgda"])
def test_an_empty_group_leaves_the_direction_to_the_others(name):
  two = np.array([[3.0, 1, 0], [-1, 2, 1]])
  three = np.insert(two, 1, 0, axis=0)
  got = weigh(name, three) @ three
  expected = weigh(name, two) @ two
  np.testing.assert_allclose(
    got / np.linalg.norm(got), expected / np.linalg.norm(expected), atol=1e-4
  )


def test_a_zero_gradient_stops_mgda():
  np.testing.assert_allclose(
    weigh("mgda", DEGENERATE["one empty"]), [0, 1, 0], atol=1e-5
  )


@pytest.mark.parametrize("name", ["mgda", "upgrad", "nash_mtl"])
def test_identical_gradients_share_equally(name):
  weights = weigh(name, DEGENERATE["identical"])
  np.testing.assert_allclose(weights, weights.mean(), rtol=1e-3)


@pytest.mark.parametrize("name", NON_CONFLICTING)
def test_no_direction_at_a_stationary_point(name):
  # Float32 resolves a direction to the root of 1e-7 of its parts.
  for case in ("opposite", "stationary", "tiny opposite"):
    gradients = DEGENERATE[case]
    weights = weigh(name, gradients)
    parts = np.linalg.norm(weights[:, None] * gradients, axis=1).max()
    assert np.linalg.norm(weights @ gradients) < 2e-3 * parts, case


# State.


@pytest.mark.parametrize("name", RULES)
def test_state_is_arrays_that_keep_their_types(name):
  weighting, update = rule(name)
  start = weighting.init()
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(start))
  _, state = jax.eval_shape(update, jnp.eye(3), jnp.ones(3), start)
  assert state == jax.eval_shape(weighting.init)


# The solvers against scipy, in float64, at G = 20.

SIZE = 20


def hard_cases():
  rng = np.random.default_rng(11)
  for width in (6, 20, 60, 200):
    gradients = rng.normal(size=(SIZE, width))
    yield f"random {width}", gradients
    common = rng.normal(size=width)
    yield f"shifted {width}", gradients + 0.7 * common
    yield f"close {width}", 1e-2 * gradients + common
    yield f"nearly equal {width}", 1e-4 * gradients + common
    yield (
      f"scaled {width}", gradients * 10.0 ** rng.uniform(-2, 2, (SIZE, 1))
    )
    yield f"tiny {width}", 1e-10 * gradients
    yield f"huge {width}", 1e10 * gradients


CASES = dict(hard_cases())


def nearest(columns, target):
  """The point of the cone of `columns` nearest to the target."""
  return columns @ optimize.nnls(columns, target, maxiter=4000)[0]


@pytest.mark.parametrize(("name", "most", "cases"), [
  ("mgda", 1e-3, CASES), ("upgrad", 1e-4, CASES),
  ("aligned_mtl", 1e-3, ("random 60", "shifted 200", "tiny 60", "huge 200")),
])
def test_directions_of_many_groups_against_scipy(name, most, cases):
  for case in cases:
    gradients = CASES[case]
    norms = np.linalg.norm(gradients, axis=1)
    weights = weigh(name, gradients)
    apart = weights @ gradients - directions(name, gradients)[0]
    assert np.linalg.norm(apart) < most * (weights * norms).max(), case


def cagrad_dual(gradients, c):
  """w -> (value, slope); over the simplex, no feasible d does better."""
  gramian = gradients @ gradients.T
  mean, radius = gramian.mean(1), c * np.sqrt(gramian.mean())

  def dual(w):
    root = np.sqrt(max(w @ gramian @ w, 0) + 1e-18)
    return mean @ w + radius * root, mean + radius * gramian @ w / root

  return dual


def test_cagrad_has_no_duality_gap():
  for case, gradients in CASES.items():
    gradients = gradients / np.linalg.norm(gradients, axis=1).max()
    mean = gradients.mean(0)
    weights = weigh("cagrad", gradients)
    direction = weights @ gradients
    radius = np.linalg.norm(direction - mean) / np.linalg.norm(mean)
    assert radius < 0.4 * (1 + 1e-4), case
    multipliers = np.maximum(weights - 1 / SIZE, 0)
    bound, _ = cagrad_dual(gradients, 0.4)(multipliers / multipliers.sum())
    gap = bound - (gradients @ direction).min()
    assert gap < 1e-4 * np.linalg.norm(mean), case


def test_nash_mtl_solves_its_equation():
  solved = 0
  for case, gradients in CASES.items():
    norms = np.linalg.norm(gradients, axis=1)
    unit = gradients / norms[:, None]
    columns = np.vstack([unit.T, np.ones(SIZE)])
    shortest = nearest(columns, np.eye(len(columns))[-1])[:-1]
    if np.linalg.norm(shortest) < 0.05:
      continue  # stationary or nearly: no solution
    solved += 1
    weights = weigh("nash_mtl", gradients)
    products = gradients @ gradients.T @ weights
    np.testing.assert_allclose(weights * products, 1, atol=1e-3, err_msg=case)
    length = np.linalg.norm(weights @ gradients)
    np.testing.assert_allclose(length**2, SIZE, rtol=1e-3, err_msg=case)
  assert solved >= 15


# Arguments.

BAD = {
  "exponent": lambda: weightings.tempered([1, 1], np.nan),
  "prior": lambda: weightings.tempered([-1, 1], 1),
  "steps": lambda: weightings.annealed_backdoor([1, 1], [1, 2], 0),
  "groups": lambda: weightings.annealed_backdoor([1, 1], [1, 2, 3], 1),
  "exponent=-1": lambda: weightings.inverse_propensity([1, 1], -1),
  "clip": lambda: weightings.inverse_propensity([1, 1], 1, 0),
  "step_size": lambda: weightings.group_dro([1, 1], -0.1),
  "step_size=inf": lambda: weightings.streaming_dro([1, 1], np.inf),
  "smoothing": lambda: weightings.streaming_dro([1, 1], 0.1, 0),
  "alpha": lambda: weightings.cvar([1, 1], 0),
  "alpha=1.5": lambda: weightings.cvar([1, 1], 1.5),
  "beta": lambda: weightings.gradvac(2, 2),
  "c=": lambda: weightings.cagrad(0),
  "prior=": lambda: weightings.preceded_by([0, 0], weightings.mgda()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
  with pytest.raises(ValueError, match=message):
    BAD[message]()
