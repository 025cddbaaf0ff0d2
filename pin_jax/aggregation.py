"""Gradient aggregation: from per-group gradients to the one that is applied.

The idea of the method, free of recommendation: G groups, one loss each, one
shared parameter tree. A *weighting* turns the Gramian of the group gradients
and the group losses into weights; `combine` applies them.

    losses, grads = vmap(value_and_grad(group_loss), (None, 0, 0))(params, ...)
    weights, state = weighting.update(gramian(grads), losses, state)
    gradient = combine(weights, grads)

Example (two groups, one parameter; the prior decides who is served):

  >>> import jax, jax.numpy as jnp
  >>> loss = lambda theta, centre, key: 0.5 * (theta - centre) ** 2
  >>> step = aggregate(loss, backdoor([0.25, 0.75]))
  >>> theta, state = jnp.float32(0.0), ()
  >>> keys = jax.random.split(jax.random.key(0), 2)
  >>> for _ in range(100):
  ...   out = step(theta, jnp.array([0.0, 4.0]), keys, state)
  ...   theta = theta - 0.5 * out.gradient
  >>> round(float(theta), 3)
  3.0
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
GroupLoss = Callable[[PyTree, PyTree, jax.Array], jax.Array]


class Weighting(NamedTuple):
  """A rule that turns group gradients and losses into weights [G].

  Attributes:
    init: () -> state.
    update: (gramian [G, G], losses [G], state) -> (weights [G], state).
    constant: the weights where they depend on nothing, else None; only
      constant weights may take the paths without per-group gradients.
  """

  init: Callable[[], PyTree]
  update: Callable[[jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]]
  constant: np.ndarray | None = None


class Aggregate(NamedTuple):
  """What one aggregation yields.

  Attributes:
    gradient: like params, sum_g weights_g * grad_g.
    losses: [G] float32.
    weights: [G] float32.
    gramian: [G, G] float32, <grad_g, grad_h>; NaN where the path does not
      form it.
    state: the weighting's next state.
  """

  gradient: PyTree
  losses: jax.Array
  weights: jax.Array
  gramian: jax.Array
  state: PyTree


def backdoor(prior: Sequence[float]) -> Weighting:
  """Backdoor adjustment weights: weight_g = P(d = g).

  The published core of PIN (arXiv 2208.09130, abstract): group gradients are
  combined by the prior of the confounder instead of its share in the data.

  Args:
    prior: [G] numbers >= 0 with a positive sum; normalised.

  Raises:
    ValueError: if an entry is negative or not finite, or all are zero.
  """
  prior = np.asarray(prior, np.float64)
  bad = prior.ndim != 1 or not np.isfinite(prior).all() or (prior < 0).any()
  if bad or prior.sum() <= 0:
    raise ValueError(
      f"prior={prior.tolist()} must be one list of finite numbers >= 0 with "
      "a positive sum"
    )
  weights = (prior / prior.sum()).astype(np.float32)
  update = lambda gramian, losses, state: (jnp.asarray(weights), state)
  return Weighting(lambda: (), update, weights)


def gramian(grads: PyTree) -> jax.Array:
  """<grad_g, grad_h> summed over all leaves; [G, ...] -> [G, G] float32."""

  def of_leaf(leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(leaf.shape[0], -1)
    return jnp.matmul(flat, flat.T, preferred_element_type=jnp.float32)

  return sum(of_leaf(leaf) for leaf in jax.tree.leaves(grads))


def cosines(gramian: jax.Array) -> jax.Array:
  """Cosine matrix of the group gradients; 0 where a gradient is zero."""
  norms = jnp.sqrt(jnp.diagonal(gramian))
  scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
  return gramian * scale[:, None] * scale[None, :]


def conflict_rate(cosines: jax.Array) -> jax.Array:
  """Share of the pairs of groups whose gradients have a negative cosine.

  NaN cosines (a path that does not form them) give NaN; one group gives 0.
  """
  pairs = cosines[jnp.triu_indices(cosines.shape[0], 1)]
  if not pairs.size:
    return jnp.float32(0)
  return jnp.where(jnp.isnan(pairs).any(), jnp.nan, jnp.mean(pairs < 0))


def effective_groups(weights: jax.Array) -> jax.Array:
  """(sum |w|)^2 / sum w^2: G for equal weights, 1 for one group, 0 for none."""
  squares = jnp.sum(weights**2)
  total = jnp.sum(jnp.abs(weights)) ** 2
  return jnp.where(squares > 0, total / jnp.where(squares > 0, squares, 1), 0)


def combine(weights: jax.Array, grads: PyTree) -> PyTree:
  """sum_g weights_g * grads_g; leaves [G, ...] -> [...]."""
  scale = lambda weight, grad: jax.tree.map(lambda x: weight * x, grad)
  scaled = jax.vmap(scale)(weights, grads)
  return jax.tree.map(lambda x: x.sum(0), scaled)


AggregateFn = Callable[[PyTree, PyTree, jax.Array, PyTree], Aggregate]


def aggregate(
  group_loss: GroupLoss, weighting: Weighting, *, path: str = "stacked"
) -> AggregateFn:
  """Builds the function that aggregates the gradients of G groups.

  All paths yield the same gradient and differ in cost and by-products:

    stacked      per-group gradients under vmap: the reference
    sequential   the same, one group after another
    accumulated  one group after another, never two gradients alive; constant
                 weights; the Gramian's diagonal only
    weighted     one backward pass of sum_g w_g L_g; constant weights; no
                 Gramian

  Args:
    group_loss: (params, batch, key) -> scalar loss of one group.
    weighting: the rule for the weights.
    path: one of the above.

  Returns:
    (params, batches [G, ...], keys [G], state) -> Aggregate.

  Raises:
    ValueError: for an unknown path, or one that needs constant weights where
      the weighting has none.
  """
  if path not in PATHS:
    raise ValueError(f"path={path!r} is unknown; use one of {list(PATHS)}")
  if path in CONSTANT_PATHS and weighting.constant is None:
    raise ValueError(
      f"path={path!r} needs constant weights; use 'stacked' or 'sequential'"
    )
  return PATHS[path](group_loss, weighting)


def _per_group(
  group_loss: GroupLoss, weighting: Weighting, sequential: bool
) -> AggregateFn:
  value_and_grad = jax.value_and_grad(group_loss)

  def run(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    one = lambda group: value_and_grad(params, *group)
    over_groups = jax.lax.map if sequential else lambda f, x: jax.vmap(f)(x)
    losses, grads = over_groups(one, (batches, keys))
    products = gramian(grads)
    weights, state = weighting.update(products, losses, state)
    return Aggregate(combine(weights, grads), losses, weights, products, state)

  return run


def _stacked(group_loss: GroupLoss, weighting: Weighting) -> AggregateFn:
  return _per_group(group_loss, weighting, sequential=False)


def _sequential(group_loss: GroupLoss, weighting: Weighting) -> AggregateFn:
  return _per_group(group_loss, weighting, sequential=True)


def _accumulated(group_loss: GroupLoss, weighting: Weighting) -> AggregateFn:
  value_and_grad = jax.value_and_grad(group_loss)

  def run(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    def body(total: PyTree, group: PyTree) -> tuple[PyTree, PyTree]:
      weight, batch, key = group
      loss, grad = value_and_grad(params, batch, key)
      total = jax.tree.map(lambda t, g: t + weight * g, total, grad)
      square = sum(
        jnp.sum(jnp.square(x), dtype=jnp.float32)
        for x in jax.tree.leaves(grad)
      )
      return total, (loss, square)

    weights = jnp.asarray(weighting.constant)
    zeros = jax.tree.map(jnp.zeros_like, params)
    total, (losses, squares) = jax.lax.scan(
      body, zeros, (weights, batches, keys)
    )
    diagonal = jnp.where(
      jnp.eye(len(weighting.constant), dtype=bool), squares, jnp.nan
    )
    return Aggregate(total, losses, weights, diagonal, state)

  return run


def _weighted(group_loss: GroupLoss, weighting: Weighting) -> AggregateFn:
  def run(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    weights = jnp.asarray(weighting.constant)

    def weighted_loss(params: PyTree) -> tuple[jax.Array, jax.Array]:
      one = lambda group: group_loss(params, *group)
      losses = jax.lax.map(one, (batches, keys))
      return jnp.vdot(weights, losses), losses

    gradient, losses = jax.grad(weighted_loss, has_aux=True)(params)
    size = len(weighting.constant)
    unknown = jnp.full((size, size), jnp.nan, jnp.float32)
    return Aggregate(gradient, losses, weights, unknown, state)

  return run


CONSTANT_PATHS = ("accumulated", "weighted")
PATHS = {
  "stacked": _stacked,
  "sequential": _sequential,
  "accumulated": _accumulated,
  "weighted": _weighted,
}
