"""Rules for the weights of the groups, beside `aggregation.backdoor`.

Each rule is one function that returns an `aggregation.Weighting`: pure, on the
Gramian G_gh = <grad_g, grad_h>, the losses L_g and a state of arrays. The dict
WEIGHTINGS at the end names them all.

Facts that a docstring may state, with d = sum_g w_g grad_g:

  simplex          w_g >= 0 and sum_g w_g = 1
  non-conflicting  <grad_g, d> >= 0 for every g: no group's loss rises
  linear           scaling grad_g by c_g > 0 makes d linear in c, at given
                   losses and state

The rules are other people's, published under the reference given, unless marked
*ours* or *inferred*; where one departs from its paper, it says so. None but
`consensus` is known to have been used in PIN. A group whose gradient is exactly
zero (an empty group) leaves the direction to the others, except in `mgda`. The
arithmetic is on unit gradients, so that their scale does not matter. Where
gradients are dependent, solvers determine d, but not always the weights.

Symbols: d_g = ||grad_g||, C the cosine matrix, so that G_gh = d_g C_gh d_h.
`prior` and `shares` are G numbers >= 0 with a positive sum, and are normalised.
An argument out of its range raises a ValueError that names it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.aggregation.aggregator import (
  PyTree,
  Weighting,
  backdoor,
  cosines,
  normalised,
)
from pin_jax.aggregation.solvers import divide, nonnegative, singular

Array = jax.Array
Weighed = tuple[Array, PyTree]

# What a float32 Gramian cannot resolve, relative to unit gradients. It makes
# every solution unique: the one of least norm.
_RIDGE = 1e-6
_NEWTON_STEPS = 50
_DINKELBACH_STEPS = 8


def tempered(prior: Sequence[float], exponent: float) -> np.ndarray:
  """P(d)^a, normalised: a = 1 is the prior, a = 0 uniform on its support. Ours.

  a = `exponent` is finite; [G] float32, on the simplex.
  """
  weights = normalised(prior).astype(np.float64)
  _require(np.isfinite(exponent), f"exponent={exponent} must be finite")
  logs = exponent * np.log(np.where(weights > 0, weights, 1))
  logs = np.where(weights > 0, logs, -np.inf)
  powers = np.exp(logs - logs.max())
  return (powers / powers.sum()).astype(np.float32)


def joint(shares: Sequence[float]) -> Weighting:
  """The joint gradient: the groups' shares of the examples. Simplex; linear."""
  return backdoor(shares)


def annealed_backdoor(
  start: Sequence[float], end: Sequence[float], steps: int
) -> Weighting:
  """Backdoor weights that move from one prior to another. Ours.

  w(t) = (1 - f) start + f end, f = min(t / steps, 1); steps >= 1. Simplex;
  linear. State: t.
  """
  start, end = normalised(start), normalised(end)
  _require(
    len(start) == len(end),
    f"start has {len(start)} groups and end {len(end)}; give as many",
  )
  _require(steps >= 1, f"steps={steps} must be at least 1")

  def update(gramian: Array, losses: Array, state: PyTree) -> Weighed:
    share = jnp.minimum(state / steps, 1).astype(jnp.float32)
    next_state = jnp.minimum(state + 1, steps)
    return (1 - share) * start + share * end, next_state

  return Weighting(lambda: jnp.zeros((), jnp.int32), update, "nothing")


def inverse_propensity(
  shares: Sequence[float], exponent: float = 1, clip: float = np.inf
) -> Weighting:
  """Examples weighted by 1 / share^a of their group, clipped. Ours.

  w_g ~ share_g min(share_g^-a, clip), a = `exponent` >= 0, clip > 0: a = 0 is
  the joint gradient, a = 1 without a clip equal weights. Simplex; linear. The
  standard estimator with the group in the place of the treatment.

  Reference: Horvitz & Thompson, "A generalization of sampling without
    replacement from a finite universe", JASA 1952; the clip: Ionides,
    "Truncated importance sampling", JCGS 2008.
  """
  shares = normalised(shares).astype(np.float64)
  _require(
    np.isfinite(exponent) and exponent >= 0,
    f"exponent={exponent} must be finite and >= 0",
  )
  _require(clip > 0, f"clip={clip} must be positive")
  examples = np.where(shares > 0, shares, 1) ** -exponent
  return backdoor(shares * np.minimum(examples, clip))


def preceded_by(prior: Sequence[float], weighting: Weighting) -> Weighting:
  """Any rule preceded by preferences: it sees G P(d=g) grad_g and losses. Ours.

  w = s * rule(diag(s) G diag(s), s * L), s = G P(d). A rule that is the mean
  without conflict becomes the backdoor adjustment without conflict. Stays
  non-conflicting where P(d) > 0, and linear; leaves the simplex.
  """
  prior = normalised(prior)
  scale = len(prior) * prior

  def update(gramian: Array, losses: Array, state: PyTree) -> Weighed:
    gramian = gramian * scale[:, None] * scale[None, :]
    weights, state = weighting.update(gramian, scale * losses, state)
    return scale * weights, state

  return Weighting(weighting.init, update, weighting.reads)


def group_dro(prior: Sequence[float], step_size: float = 0.01) -> Weighting:
  """Online group DRO: weights move towards the groups with large losses.

  q_g <- q_g exp(eta L_g) / sum_h q_h exp(eta L_h), from the prior; w = q;
  eta = `step_size` >= 0. Simplex; linear. State: log q. Without the paper's
  adjustment C / sqrt(n_g).

  Reference: Sagawa et al., "Distributionally robust neural networks for group
    shifts", ICLR 2020, algorithm 1.
  """
  prior = normalised(prior)
  _require_step(step_size)

  def update(gramian: Array, losses: Array, state: PyTree) -> Weighed:
    log_q = jax.nn.log_softmax(state + step_size * losses)
    return jnp.exp(log_q), log_q

  return Weighting(lambda: jnp.log(prior), update, "losses")


def streaming_dro(
  prior: Sequence[float], step_size: float = 0.01, smoothing: float = 0.1
) -> Weighting:
  """Group DRO on losses that are smoothed over steps.

  l_g <- (1 - gamma) l_g + gamma L_g, from the first L_g on; then `group_dro`
  on l. gamma = `smoothing` is in (0, 1]; 1 is `group_dro`. Simplex; linear.
  State: log q, l and whether l has started. Inferred: from the paper's abstract
  and accounts by others.

  Reference: Wen et al., "Distributionally-robust recommendations for improving
    worst-case user experience", WWW 2022.
  """
  prior = normalised(prior)
  _require_step(step_size)
  _require(0 < smoothing <= 1, f"smoothing={smoothing} must be in (0, 1]")

  def update(gramian: Array, losses: Array, state: PyTree) -> Weighed:
    log_q, smooth, started = state
    gamma = jnp.where(started, smoothing, 1)
    smooth = (1 - gamma) * smooth + gamma * losses
    log_q = jax.nn.log_softmax(log_q + step_size * smooth)
    return jnp.exp(log_q), (log_q, smooth, jnp.ones((), bool))

  start = lambda: (
    jnp.log(prior), jnp.zeros(len(prior)), jnp.zeros((), bool)
  )
  return Weighting(start, update, "losses")


def cvar(prior: Sequence[float], alpha: float) -> Weighting:
  """Conditional value at risk: the worst share alpha of the prior mass.

  w = argmax sum_g w_g L_g over 0 <= w_g <= P(d=g) / alpha, sum_g w_g = 1;
  equal losses share in proportion to P(d). alpha is in (0, 1]; 1 is `backdoor`.
  Simplex; linear. Over groups, where the literature has examples.

  Reference: Rockafellar & Uryasev, "Optimization of conditional value-at-risk",
    Journal of Risk 2000.
  """
  prior = normalised(prior)
  _require(0 < alpha <= 1, f"alpha={alpha} must be in (0, 1]")

  def weights(gramian: Array, losses: Array) -> Array:
    worse = (losses[None, :] > losses[:, None]) @ prior
    tied = (losses[None, :] == losses[:, None]) @ prior
    taken = jnp.clip(divide(alpha - worse, tied), 0, 1)
    mass = prior * taken
    return mass / mass.sum()

  return _stateless(weights, "losses")


def famo(num_groups: int) -> Weighting:
  """Fast adaptive multitask optimization: equal rates of decrease.

  w_g ~ z_g / L_g, z = softmax(xi); xi follows Adam (.025; .9, .999) on the
  gradient (diag(z) - z z^T) (log L(t-1) - log L(t)) + .001 xi. Simplex; linear;
  for losses > 0: a group whose loss is not positive gets weight 0 (all equal if
  none is). State: xi, Adam's moments, the number of updates, losses.

  Deviation: the paper evaluates a batch again after the update. Here log L(t-1)
  and log L(t) come from consecutive batches: no further forward pass, more
  noise.

  Reference: Liu et al., "FAMO: Fast adaptive multitask optimization",
    NeurIPS 2023.
  """
  step_size, b1, b2, decay = 0.025, 0.9, 0.999, 1e-3

  def update(gramian: Array, losses: Array, state: PyTree) -> Weighed:
    logits, first, second, count, before = state
    both = (before > 0) & (losses > 0)
    drop = jnp.log(jnp.where(both, divide(before, losses), 1))
    z = jax.nn.softmax(logits)
    gradient = z * (drop - z @ drop) + decay * logits
    first = b1 * first + (1 - b1) * gradient
    second = b2 * second + (1 - b2) * gradient**2
    # The first losses have nothing before them: gradient 0, count 0.
    age = jnp.maximum(count, 1)
    scale = jnp.sqrt(second / (1 - b2**age)) + 1e-8
    logits = logits - step_size * first / (1 - b1**age) / scale

    z = jax.nn.softmax(logits)
    weights = jnp.where(losses > 0, divide(z, losses), 0)
    weights = jnp.where((losses > 0).any(), weights, 1)
    state = (logits, first, second, count + 1, losses.astype(jnp.float32))
    return weights / weights.sum(), state

  zeros = lambda: jnp.zeros(num_groups)
  init = lambda: (zeros(), zeros(), zeros(), jnp.zeros((), jnp.int32), zeros())
  return Weighting(init, update, "losses")


def normalized() -> Weighting:
  """Group gradients of equal norm. Ours.

  w_g = mean_h d_h / (G d_g), the mean over non-zero gradients: d is the mean
  unit gradient times the mean norm, so that it scales with the gradients (is
  homogeneous of degree 1 in them). Not non-conflicting.
  """

  def weights(gramian: Array, losses: Array) -> Array:
    norms, inverse, _ = _unit(gramian)
    mean = divide(norms.sum(), (norms > 0).sum())
    return mean * inverse / len(norms)

  return _stateless(weights)


def consensus() -> Weighting:
  """Aggregation by agreement with the mean gradient. Inferred.

  Kept are the groups with cos(grad_g, mean gradient) > 0; w = softmax over the
  kept g of sum_{kept h} C_gh. Where more groups disagree with the mean (< 0)
  than agree, w = 0: no update. Simplex or all zero; not non-conflicting.

  Inferred from later public work of PIN's first author, where each parameter
  tensor goes by itself: `aggregate(..., blocks=str)`. Cosines that float32
  cannot tell from 0 neither agree nor disagree (ours).
  """

  def weights(gramian: Array, losses: Array) -> Array:
    norms, _, cosine = _unit(gramian)
    with_mean = cosine @ norms
    noise = _RIDGE * norms.sum()
    kept = (with_mean > noise) & (norms > 0)
    against = (with_mean < -noise) & (norms > 0)
    carried = kept.any() & (against.sum() <= kept.sum())
    scores = jnp.where(kept, cosine @ kept.astype(jnp.float32), -jnp.inf)
    scores = jnp.where(carried, scores, 0)
    return jnp.where(carried, jax.nn.softmax(scores), 0)

  return _stateless(weights)


def pcgrad() -> Weighting:
  """Gradient surgery: projections of conflicting gradients, in random order.

  For each g, over the others h in random order: if <p_g, grad_h> < 0,
  p_g <- p_g - <p_g, grad_h> / ||grad_h||^2 grad_h. d = mean_g p_g. Linear, at a
  given state. Non-conflicting with two groups only. State: the random key.
  Deviation: the mean where the paper has the sum.

  Reference: Yu et al., "Gradient surgery for multi-task learning",
    NeurIPS 2020, algorithm 1.
  """

  def update(gramian: Array, losses: Array, state: PyTree) -> Weighed:
    _, _, cosine = _unit(gramian)
    state, orders = _orders(state, len(gramian))

    def project(g: Array, order: Array) -> Array:
      def body(row: Array, h: Array) -> tuple[Array, None]:
        conflict = jnp.where(h != g, jnp.minimum(cosine[h] @ row, 0), 0)
        return row.at[h].add(-conflict), None

      start = jax.nn.one_hot(g, len(gramian))
      return jax.lax.scan(body, start, order)[0]

    rows = jax.vmap(project)(jnp.arange(len(gramian)), orders)
    return _mean_of_rows(rows, gramian), state

  return Weighting(lambda: jax.random.PRNGKey(0), update)


def gradvac(num_groups: int, beta: float = 0.01) -> Weighting:
  """Gradient vaccine: gradients are turned towards their usual cosine.

  For each g, over the others h in random order, with c = cos(p_g, grad_h) and
  its running mean t_gh: if c < t_gh, p_g gets as much of grad_h added as makes
  c = t_gh; t_gh <- (1 - beta) t_gh + beta c, beta in [0, 1]. d = mean_g p_g.
  Linear, at a given state. State: t [G, G] and the random key. t = 0 and
  beta = 0 is `pcgrad`. Deviation: the mean where the paper has the sum; pairs
  with a zero gradient are left alone.

  Reference: Wang et al., "Gradient vaccine: investigating and improving
    multi-task optimization in massively multilingual models", ICLR 2021.
  """
  _require(0 <= beta <= 1, f"beta={beta} must be in [0, 1]")
  sine = lambda cosine: jnp.sqrt(jnp.maximum(1 - cosine**2, 0))

  def update(gramian: Array, losses: Array, state: PyTree) -> Weighed:
    targets, key = state
    norms, _, cosine = _unit(gramian)
    key, orders = _orders(key, num_groups)

    def turn(g: Array, target: Array, order: Array) -> tuple[Array, Array]:
      def body(carry: PyTree, h: Array) -> tuple[PyTree, None]:
        row, target = carry
        norm = jnp.sqrt(jnp.maximum(row @ cosine @ row, 0))
        real = (norm > 1e-3) & (norms[g] > 0) & (norms[h] > 0) & (h != g)
        now = jnp.clip(divide(cosine[h] @ row, norm), -1, 1)
        usual = jnp.clip(target[h], -1 + _RIDGE, 1 - _RIDGE)
        more = norm * (usual * sine(now) / sine(usual) - now)
        row = row.at[h].add(jnp.where(real & (now < usual), more, 0))
        target = target.at[h].add(jnp.where(real, beta * (now - target[h]), 0))
        return (row, target), None

      start = jax.nn.one_hot(g, num_groups), target
      return jax.lax.scan(body, start, order)[0]

    rows, targets = jax.vmap(turn)(jnp.arange(num_groups), targets, orders)
    return _mean_of_rows(rows, gramian), (targets, key)

  shape = num_groups, num_groups
  init = lambda: (jnp.zeros(shape), jax.random.PRNGKey(0))
  return Weighting(init, update)


def mgda() -> Weighting:
  """Multiple-gradient descent: the shortest convex combination.

  w = argmin w^T G w over the simplex. Simplex; non-conflicting. The optimum of
  max_d min_g <grad_g, d> - ||d||^2 / 2. Small gradients get large weights, a
  zero gradient all of the weight: such a point is Pareto stationary. Of several
  solutions the one that is shortest in (w_g d_g).

  Solved as min x^T G x / 2 - sum_g x_g over x >= 0, w = x / sum_g x_g.

  Reference: Desideri, "Multiple-gradient descent algorithm for multiobjective
    optimization", Comptes Rendus Mathematique 2012; Sener & Koltun, "Multi-task
    learning as multi-objective optimization", NeurIPS 2018 (solved there to a
    tolerance by Frank-Wolfe, here by an interior point).
  """

  def weights(gramian: Array, losses: Array) -> Array:
    norms, _, cosine = _unit(gramian)
    least = jnp.min(jnp.where(norms > 0, norms, jnp.inf))
    inverse = jnp.where(norms > 0, divide(least, norms), 1e4)
    x = inverse * nonnegative(_ridged(cosine), inverse)
    return x / x.sum()

  return _stateless(weights)


def upgrad() -> Weighting:
  """Mean of the gradients, each projected on the dual cone of all.

  d = mean_g argmin_p ||p - grad_g|| over <grad_h, p> >= 0 for all h; the
  projection is p = sum_h v_h grad_h, v = argmin v^T G v over v >= e_g.
  Non-conflicting; linear; w_g >= 1 / G for a non-zero gradient.

  Reference: Quinton & Rey, "Jacobian descent for multi-objective
    optimization", arXiv 2406.16232 (2024).
  """

  def weights(gramian: Array, losses: Array) -> Array:
    _, _, cosine = _unit(gramian)
    solve = lambda row: nonnegative(_ridged(cosine), -row)
    rows = jnp.eye(len(cosine)) + jax.vmap(solve)(cosine)
    return _mean_of_rows(rows, gramian)

  return _stateless(weights)


def cagrad(c: float = 0.4) -> Weighting:
  """Conflict-averse gradient: best worst case near the mean gradient.

  d = argmax min_g <grad_g, d> over ||d - m|| <= c ||m||, m = mean_g grad_g.
  c > 0; c < 1 for convergence to a minimum of the mean loss, and then not
  non-conflicting. Homogeneous of degree 1 in the gradients, w_g >= 1 / G.

  By duality d = m + c ||m|| sum_g x_g grad_g, where x >= 0 minimises
  (x^T G x / 2 + sum_g x_g <grad_g, m> / (c ||m||) + 1 / 2) / sum_g x_g: a ratio
  (Dinkelbach 1967). At a Pareto stationary point d -> m, as in the authors'
  code.

  Reference: Liu et al., "Conflict-averse gradient descent for multi-task
    learning", NeurIPS 2021, algorithm 1.
  """
  _require(0 < c < np.inf, f"c={c} must be positive and finite")

  def weights(gramian: Array, losses: Array) -> Array:
    norms, inverse, cosine = _unit(gramian)
    size, matrix = len(norms), _ridged(cosine)
    d, largest = divide(norms, norms.max()), norms.max()
    length = jnp.sqrt(jnp.maximum(d @ cosine @ d, 0))  # G ||m||
    linear = cosine @ d / jnp.maximum(length, _RIDGE * size) / c

    def body(_: int, y: Array) -> Array:
      ratio = (jnp.sqrt(y @ matrix @ y) + linear @ y) / (per @ y)
      y = nonnegative(matrix, ratio * per - linear)
      return y / y.max()

    per = jnp.where(largest > 0, divide(inverse, inverse.max()), 1)
    y = jax.lax.fori_loop(0, _DINKELBACH_STEPS, body, jnp.ones(size))
    y = y / jnp.sqrt(y @ matrix @ y)
    return (1 + c * length * largest * inverse * y) / size

  return _stateless(weights)


def imtl_g() -> Weighting:
  """Impartial multi-task learning: equal projections on every gradient.

  <d, grad_g> / d_g the same for all g, sum_g w_g = 1: w ~ D^-1 C^+ 1 with
  D = diag(d_g). Weights may be negative; neither simplex nor non-conflicting.
  w = 0 where the sum of the solution vanishes, as for opposite gradients, and
  for zero gradients. The losses' half of the method (IMTL-L) is left out.

  Reference: Liu et al., "Towards impartial multi-task learning", ICLR 2021; the
    pseudo-inverse for dependent gradients: Quinton & Rey, arXiv 2406.16232
    (there of G, here of C: the same d where equal projections exist).
  """

  def weights(gramian: Array, losses: Array) -> Array:
    _, inverse, cosine = _unit(gramian)
    inverse = divide(inverse, inverse.max())
    w = inverse * jnp.linalg.pinv(cosine, hermitian=True).sum(1)
    real = jnp.abs(w.sum()) > 1e-5 * inverse.sum()
    return jnp.where(real, divide(w, w.sum()), 0)

  return _stateless(weights)


def nash_mtl() -> Weighting:
  """Multi-task learning as a bargaining game: G w = 1 / w.

  w = argmin w^T G w / 2 - sum_g log w_g over w > 0. Non-conflicting:
  <grad_g, d> = 1 / w_g. ||d||^2 is the number of groups with a gradient,
  whatever the gradients' scale: the step neither shrinks near a stationary
  point nor scales with the loss. At a Pareto stationary point there is no
  solution, and d = 0 up to what float32 resolves. Zero gradients have weight 0.

  Deviations: solved exactly by damped Newton, where the paper iterates a convex
  approximation; every step; no bound on ||d||.

  Reference: Navon et al., "Multi-task learning as a bargaining game",
    ICML 2022.
  """

  def weights(gramian: Array, losses: Array) -> Array:
    _, inverse, cosine = _unit(gramian)
    matrix, size = _ridged(cosine), len(cosine)

    def body(_: int, y: Array) -> Array:
      y = y * jnp.sqrt(size / (y @ matrix @ y))  # the best multiple of y
      scaled = y[:, None] * matrix * y[None, :]
      slope = 1 - scaled.sum(1)
      step = jnp.linalg.solve(scaled + jnp.eye(size), slope)
      decrement = jnp.sqrt(jnp.maximum(slope @ step, 0))
      return y * (1 + step / jnp.where(decrement > 0.25, 1 + decrement, 1))

    return inverse * jax.lax.fori_loop(0, _NEWTON_STEPS, body, jnp.ones(size))

  return _stateless(weights)


def aligned_mtl() -> Weighting:
  """Independent component alignment: principal components of equal size.

  G = V diag(s) V^T; w = sqrt(min s) V diag(s)^-1/2 V^T 1 / G over s > 0: the
  mean of the nearest orthogonal gradients. Homogeneous of degree 1 in the
  gradients; not non-conflicting. Equal weights if all gradients are zero.
  As many s count as 0 as eigenvalues of C lie below 10 G eps (eps of float32)
  of its largest: what depends on others is told by unit gradients, however
  unequal the norms. Where gradients become dependent, d jumps, as in the paper.

  The s and V are found as singular values and vectors of C^1/2 D.

  Reference: Senushkin et al., "Independent component alignment for multi-task
    learning", CVPR 2023, algorithm 1.
  """

  def weights(gramian: Array, losses: Array) -> Array:
    norms, _, cosine = _unit(gramian)
    size = len(norms)
    squares, vectors = jnp.linalg.eigh(cosine)
    floor = 10 * size * jnp.finfo(jnp.float32).eps * squares.max()
    independent = squares > floor
    root = jnp.sqrt(jnp.where(independent, squares, 0))[:, None] * vectors.T
    sizes, vectors = singular(root * divide(norms, norms.max()))
    rank = independent.sum() - (norms == 0).sum()
    real = (sizes > 0) & (jnp.argsort(jnp.argsort(-sizes)) < rank)
    least = jnp.min(jnp.where(real, sizes, jnp.inf))
    scale = divide(least, jnp.where(real, sizes, 0))
    mean = (vectors * (scale * vectors.mean(0))).sum(1)
    return jnp.where(real.any(), mean, 1 / size)

  return _stateless(weights)


def gradient_alignment() -> Weighting:
  """Gradients turned until none opposes the tail's: from the head to the tail.

    t   = mean of grad_h over the tail, all groups but the last
    p_g = argmin_p ||p - grad_g|| over <t, p> >= 0
        = grad_g - min(<t, grad_g>, 0) / ||t||^2 t
    d   = mean_g p_g

  so w_g = 1 / G, and beside it -sum_h min(<t, grad_h>, 0) / (G T ||t||^2) for
  each of the T = G - 1 groups of the tail. What head users teach passes unless
  it raises the tail's mean loss, which falls at least as fast as its own share
  of the mean gradient makes it: <t, d> >= T ||t||^2 / G. Homogeneous of degree
  1 in the gradients, w_g >= 1 / G; not non-conflicting, and the order of the
  groups matters. One group is all tail.

  After Grad-Transfer. *Published*, in its abstract: a gradient alignment
  optimizer and an adversarial training scheme, for transfer from head to tail
  users. *Inferred*, from a caption quoted in an account of the paper: updates
  as in Reptile, which hold the gradient of the inner products of the users'
  gradients. *Ours*: activeness groups in place of users, and the projection,
  since no weights on group gradients give that gradient; the discriminator of
  activeness is left out.

  Reference: Yin et al., "Learning transferrable parameters for long-tailed
    sequential user behavior modeling", KDD 2020; Nichol et al., "On first-order
    meta-learning algorithms", arXiv 1803.02999 (2018); the projection on one
    half-space: Chaudhry et al., "Efficient lifelong learning with A-GEM",
    ICLR 2019, equation 11.
  """

  def weights(gramian: Array, losses: Array) -> Array:
    norms, _, cosine = _unit(gramian)
    size = len(norms)
    in_tail = jnp.arange(size) < max(size - 1, 1)
    tail = divide(norms, norms.max()) * in_tail  # t, of unit gradients
    square = tail @ cosine @ tail
    real = square > _RIDGE * tail.sum() ** 2
    conflict = jnp.minimum(cosine @ tail, 0)
    added = jnp.where(real, divide(-conflict, square), 0)
    rows = jnp.eye(size) + added[:, None] * tail
    return _mean_of_rows(rows, gramian)

  return _stateless(weights)


# What the rules share.


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _require_step(size: float) -> None:
  _require(0 <= size < np.inf, f"step_size={size} must be finite and >= 0")


def _stateless(
  weights: Callable[[Array, Array], Array], reads: str = "gradients"
) -> Weighting:
  update = lambda gramian, losses, state: (weights(gramian, losses), state)
  return Weighting(lambda: (), update, reads)


def _unit(gramian: Array) -> tuple[Array, Array, Array]:
  """(d [G], 1 / d or 0 [G], C [G, G]); C is 1 on the diagonal, always."""
  norms = jnp.sqrt(jnp.diagonal(gramian))
  same = jnp.eye(len(gramian), dtype=bool)
  cosine = jnp.where(same, 1, cosines(gramian))
  return norms, divide(1, norms), cosine


def _ridged(matrix: Array) -> Array:
  return matrix + _RIDGE * jnp.eye(len(matrix))


def _mean_of_rows(rows: Array, gramian: Array) -> Array:
  """Weights of mean_g d_g sum_h rows_gh u_h, u the unit gradients."""
  norms, inverse, _ = _unit(gramian)
  largest = norms.max()
  return divide(norms, largest) @ rows * (largest * inverse) / len(norms)


def _orders(key: Array, size: int) -> tuple[Array, Array]:
  """The next key, and one random order of all groups for each [G, G]."""
  key, now = jax.random.split(key)
  permutation = lambda key: jax.random.permutation(key, size)
  return key, jax.vmap(permutation)(jax.random.split(now, size))


# Published for each parameter tensor by itself.
BY_TENSOR = ("consensus",)

# A new rule is one function and its name here.
WEIGHTINGS = {
  rule.__name__: rule for rule in (
    backdoor, joint, annealed_backdoor, inverse_propensity,
    group_dro, streaming_dro, cvar, famo, normalized, consensus, pcgrad,
    gradvac, mgda, upgrad, cagrad, imtl_g, nash_mtl, aligned_mtl,
    gradient_alignment,
  )
}
