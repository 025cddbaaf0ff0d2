"""Gradient aggregation: from per-group gradients to the one that is applied.

`aggregate` builds the step for any loss and any parameter tree, over the whole
gradient or block by block, on one of several equal paths. Example: two tasks
that share a parameter and own one each; UPGrad lets neither loss rise.

  >>> import jax, jax.numpy as jnp, optax
  >>> from pin_jax.aggregation.weightings import upgrad
  >>> def loss(params, task, key):
  ...   return (params["shared"] - task["target"]) ** 2 + (
  ...     params["own"][task["index"]] - 1) ** 2
  >>> tasks = {"target": jnp.array([0.0, 4.0]), "index": jnp.arange(2)}
  >>> init, step = aggregate(loss, upgrad())
  >>> params = {"shared": jnp.float32(9.0), "own": jnp.zeros(2)}
  >>> optimizer = optax.sgd(0.2)
  >>> state, opt_state = init(params), optimizer.init(params)
  >>> step = jax.jit(step)
  >>> for key in jax.random.split(jax.random.key(0), 100):
  ...   out = step(params, tasks, jax.random.split(key, 2), state)
  ...   updates, opt_state = optimizer.update(out.gradient, opt_state)
  ...   params, state = optax.apply_updates(params, updates), out.state
  >>> bool(0 <= params["shared"] <= 4), params["own"].round(3).tolist()
  (True, [1.0, 1.0])
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.aggregation.solvers import divide

PyTree = Any
GroupLoss = Callable[[PyTree, PyTree, jax.Array], jax.Array]
WeightedLoss = Callable[..., tuple[jax.Array, jax.Array]]
Blocks = Callable[[str], str]

PATHS = ("stacked", "sequential", "accumulated", "weighted")
_READS = ("nothing", "losses", "gradients")
# Up to so many bytes of G gradients, one group at a time gains more from a
# CPU's caches than passing over the parameters G times costs.
_CACHED_BYTES = 50_000_000
_GRAMIAN_CHUNK = 4096


class Weighting(NamedTuple):
  """A rule that turns group gradients and losses into weights [G].

  Attributes:
    init: () -> state.
    update: (gramian [G, G], losses [G], state) -> (weights [G], state).
    reads: the most that `update` reads besides its state: 'nothing', 'losses'
      or 'gradients'. What it does not read may be NaN; the less it reads, the
      more paths it may take.
  """

  init: Callable[[], PyTree]
  update: Callable[..., tuple[Any, PyTree]]
  reads: str = "gradients"


Rules = Weighting | Mapping[str, Weighting]


class Aggregate(NamedTuple):
  """What one aggregation yields.

  Attributes:
    gradient: like params, sum_g weights_g * grad_g.
    losses: [G] float32.
    weights: [G] float32, or {block: [G]} where blocks are given.
    gramian: [G, G] float32, <grad_g, grad_h> over the whole gradient; NaN
      where the path does not form it.
    state: the weighting's next state.
  """

  gradient: PyTree
  losses: jax.Array
  weights: jax.Array | dict[str, jax.Array]
  gramian: jax.Array
  state: PyTree


class Aggregator(NamedTuple):
  """Two pure functions.

  Attributes:
    init: params -> the weighting's state.
    step: (params, batches [G, ...], keys [G], state) -> Aggregate.
  """

  init: Callable[[PyTree], PyTree]
  step: Callable[[PyTree, PyTree, jax.Array, PyTree], Aggregate]


def backdoor(prior: Sequence[float]) -> Weighting:
  """Backdoor adjustment weights: weight_g = P(d = g).

  The published core of PIN (arXiv 2208.09130, abstract): group gradients are
  combined by the prior of the confounder instead of its share in the data.

  Args:
    prior: [G] numbers >= 0 with a positive sum (else ValueError); normalised.
  """
  weights = normalised(prior)
  update = lambda gramian, losses, state: (jnp.asarray(weights), state)
  return Weighting(lambda: (), update, "nothing")


def normalised(prior: Sequence[float]) -> np.ndarray:
  """The prior divided by its sum, [G] float32; raises as `backdoor`."""
  prior = np.asarray(prior, np.float64)
  bad = prior.ndim != 1 or not np.isfinite(prior).all() or (prior < 0).any()
  if bad or prior.sum() <= 0:
    raise ValueError(
      f"prior={prior.tolist()} must be one list of finite numbers >= 0 with "
      "a positive sum"
    )
  return (prior / prior.sum()).astype(np.float32)


def gramian(grads: PyTree) -> jax.Array:
  """<grad_g, grad_h> summed over all leaves; [G, ...] -> [G, G] float32."""
  return sum(_leaf_gramian(leaf) for leaf in jax.tree.leaves(grads))


def combine(weights: jax.Array, grads: PyTree) -> PyTree:
  """sum_g weights_g * grads_g in float32 at least; leaves [G, ...] -> [...]."""

  def of_leaf(leaf: jax.Array) -> jax.Array:
    total = jnp.tensordot(weights, _wide(leaf), 1, precision="highest")
    return total.astype(leaf.dtype)

  return jax.tree.map(of_leaf, grads)


def aggregate(
  group_loss: GroupLoss,
  weighting: Rules,
  *,
  path: str = "auto",
  blocks: Blocks | None = None,
  weighted_loss: WeightedLoss | None = None,
) -> Aggregator:
  """Builds the function that aggregates the gradients of G groups.

  All paths yield the same gradient, in the types of the parameters; sums over
  groups are formed in float32 at least. They differ in cost and by-products:

    stacked      per-group gradients under vmap: the reference
    sequential   the same, one group after another
    accumulated  one group after another, never two gradients alive; for rules
                 that read nothing; the Gramian's diagonal only
    weighted     one backward pass of sum_g w_g L_g; for rules that read
                 nothing, over the whole gradient; no Gramian. Without a
                 `weighted_loss`, or with parameters narrower than float32, in
                 which that would sum, it is `accumulated`

  'auto' takes the cheapest that the rule allows. Where it reads nothing:
  `weighted`, but `accumulated` on CPU as long as the parameters are small, for
  its working set suits caches. Else `stacked`, and on CPU `sequential`.

  Args:
    group_loss: (params, batch, key) -> scalar loss of one group.
    weighting: the rule for the weights, or one for each block by its name.
    path: one of the above.
    blocks: None = one rule over the whole gradient; else the name of a leaf
      ('encoder/kernel') -> the block it belongs to. Each block gets weights
      from its own Gramian and state: `blocks=str` is every tensor by itself.
    weighted_loss: optional faster form of the losses, for weights that are
      known beforehand: (params, batches, keys, weights [G]) -> (sum_g w_g L_g,
      losses [G]).

  Raises:
    ValueError: for an unknown path, a rule that reads more than the path gives,
      or (when params are first seen) blocks without a rule.
  """
  reads = _reads_of(weighting, path, blocks)
  value_and_grad = jax.value_and_grad(
    lambda params, batch, key: _wide(group_loss(params, batch, key))
  )

  def step(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    update, gramian_of, combined = _algebra(weighting, blocks, params)
    groups = batches, keys
    narrow = any(_wide(x).dtype != x.dtype for x in jax.tree.leaves(params))
    fused = weighted_loss is not None and blocks is None and not narrow
    chosen = path
    if path == "auto":
      size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
      chosen = _automatic(reads, len(keys) * size, fused)
    if chosen in ("stacked", "sequential"):
      at_once = lambda f, groups: jax.vmap(f)(groups)
      over_groups = at_once if chosen == "stacked" else jax.lax.map
      losses, grads = over_groups(lambda x: value_and_grad(params, *x), groups)
      products = gramian_of(grads)
      weights, state = update(products, losses, state)
      gradient, total = combined(weights, grads), sum(jax.tree.leaves(products))
      return Aggregate(gradient, losses, weights, total, state)
    unknown = jnp.full((len(keys), len(keys)), jnp.nan, jnp.float32)
    nothing = gramian_of(jax.tree.map(lambda _: unknown, params))
    weights, state = update(nothing, unknown[0], state)
    if chosen == "accumulated" or not fused:
      return _accumulated(
        value_and_grad, combined, params, groups, weights, state
      )
    gradient, losses = jax.grad(weighted_loss, has_aux=True)(
      params, *groups, weights
    )
    return Aggregate(gradient, losses, weights, unknown, state)

  init = lambda params: initial_state(weighting, params, blocks)
  return Aggregator(init, step)


def _accumulated(
  value_and_grad: Callable, combine: Callable, params: PyTree,
  groups: tuple[PyTree, jax.Array], weights: PyTree, state: PyTree,
) -> Aggregate:
  """Adds w_g grad_g to a sum in float32, group by group."""

  def body(total: PyTree, group: PyTree) -> tuple[PyTree, PyTree]:
    weights, batch, key = group
    loss, grad = value_and_grad(params, batch, key)
    weights, one = jax.tree.map(lambda x: _wide(x)[None], (weights, grad))
    total = jax.tree.map(jnp.add, total, combine(weights, one))
    return total, (loss, gramian(one)[0, 0])

  zeros = jax.tree.map(lambda x: jnp.zeros_like(_wide(x)), params)
  total, (losses, squares) = jax.lax.scan(body, zeros, (weights, *groups))
  gradient = jax.tree.map(lambda x, p: x.astype(p.dtype), total, params)
  diagonal = jnp.where(jnp.eye(len(losses), dtype=bool), squares, jnp.nan)
  return Aggregate(gradient, losses, weights, diagonal, state)


def _automatic(reads: str, gradient_bytes: int, fused: bool) -> str:
  """The path of 'auto'; `fused`: one weighted loss serves all groups."""
  on_cpu = jax.default_backend() == "cpu"
  if reads != "nothing":
    return "sequential" if on_cpu else "stacked"
  cached = on_cpu and gradient_bytes <= _CACHED_BYTES
  return "weighted" if fused and not cached else "accumulated"


def _reads_of(rules: Rules, path: str, blocks: Blocks | None) -> str:
  """The most that the rules read; checks path and blocks against it."""
  by_block = not isinstance(rules, Weighting)
  if by_block and blocks is None:
    raise ValueError(
      f"weightings for the blocks {sorted(rules)} need blocks=: a function "
      "from a leaf's name to its block's"
    )
  every = list(rules.values()) if by_block else [rules]
  reads = max((rule.reads for rule in every), key=_READS.index)
  if path not in ("auto", *PATHS):
    raise ValueError(
      f"path={path!r} is unknown; use one of {['auto', *PATHS]}"
    )
  if path in ("accumulated", "weighted") and reads != "nothing":
    raise ValueError(
      f"path={path!r} needs weights that read nothing, and these read {reads}; "
      "use 'auto'"
    )
  if path == "weighted" and blocks is not None:
    raise ValueError(
      "path='weighted' has one backward pass, with the same weights for every "
      "block; use 'accumulated' or 'auto'"
    )
  return reads


def informed(weighting: Rules) -> Rules:
  """The same rules, given gradients whether they read them or not.

  'auto' then takes a path that forms the Gramian, for diagnosis.
  """
  if isinstance(weighting, Weighting):
    return weighting._replace(reads="gradients")
  return {name: informed(rule) for name, rule in weighting.items()}


def initial_state(
  weighting: Rules, params: PyTree, blocks: Blocks | None = None
) -> PyTree:
  """The state before the first step; arguments as of `aggregate`."""
  if blocks is None:
    return weighting.init()
  names = _blocks_of(weighting, blocks, params)
  if not isinstance(weighting, Weighting):
    return {name: weighting[name].init() for name in dict.fromkeys(names)}
  count = len(set(names))
  return jax.tree.map(lambda x: jnp.stack([x] * count), weighting.init())


# Blocks: parts of the gradient with weights of their own.


def leaf_names(params: PyTree) -> list[str]:
  """The leaves' names, such as 'Block_0/MLP_0/Dense_0/kernel'."""
  paths = jax.tree_util.tree_leaves_with_path(params)
  return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]


def _blocks_of(rules: Rules, blocks: Blocks, params: PyTree) -> list[str]:
  """The block of each leaf."""
  leaves = leaf_names(params)
  names = [blocks(name) for name in leaves]
  if not isinstance(rules, Weighting) and set(names) != set(rules):
    raise ValueError(
      f"the parameters have blocks {sorted(set(names))} and the weightings are "
      f"for {sorted(rules)}; name the same ones (leaves: {leaves})"
    )
  return names


def _algebra(
  rules: Rules, blocks: Blocks | None, params: PyTree
) -> tuple[Callable, Callable, Callable]:
  """Update, `gramian` and `combine`, over dicts of blocks if there are."""
  if blocks is None:
    return rules.update, gramian, combine
  of_leaf = _blocks_of(rules, blocks, params)
  names = list(dict.fromkeys(of_leaf))

  def products(grads: PyTree) -> dict[str, jax.Array]:
    leaves = list(zip(of_leaf, jax.tree.leaves(grads), strict=True))
    return {k: gramian([x for name, x in leaves if name == k]) for k in names}

  def combined(weights: dict[str, jax.Array], grads: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(grads)
    return structure.unflatten([
      combine(weights[k], x) for k, x in zip(of_leaf, leaves, strict=True)
    ])

  def update(
    gramians: dict[str, jax.Array], losses: jax.Array, state: PyTree
  ) -> tuple[dict[str, jax.Array], PyTree]:
    if isinstance(rules, Weighting):
      stacked = jnp.stack([gramians[k] for k in names])
      weights, state = jax.vmap(rules.update, (0, None, 0))(
        stacked, losses, state
      )
      return dict(zip(names, weights, strict=True)), state
    found = {k: rules[k].update(gramians[k], losses, state[k]) for k in names}
    return {k: w for k, (w, _) in found.items()}, {
      k: state for k, (_, state) in found.items()
    }

  return update, products, combined


def _leaf_gramian(leaf: jax.Array) -> jax.Array:
  """<x_g, x_h> of one leaf [G, ...]; on CPU in chunks that suit its cache."""

  def product(x: jax.Array) -> jax.Array:
    axes = tuple(range(1, x.ndim))
    return jnp.tensordot(
      x, x, (axes, axes), precision="highest",
      preferred_element_type=jnp.float32,
    )

  def chunked(x: jax.Array) -> jax.Array:
    x = x.reshape(len(x), -1)
    width = max(min(_GRAMIAN_CHUNK, x.shape[1]), 1)
    count = x.shape[1] // width
    take = lambda i: jax.lax.dynamic_slice_in_dim(x, i * width, width, 1)
    return jax.lax.fori_loop(
      0, count, lambda i, total: total + product(take(i)),
      product(x[:, count * width :]),
    )

  return jax.lax.platform_dependent(leaf, cpu=chunked, default=product)


def _wide(x: jax.Array) -> jax.Array:
  """x in float32 where its type is narrower."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# What is logged of an aggregation.


def cosines(gramian: jax.Array) -> jax.Array:
  """Cosine matrix of the group gradients; 0 where a gradient is zero."""
  scale = divide(1, jnp.sqrt(jnp.diagonal(gramian)))
  return gramian * scale[:, None] * scale[None, :]


def conflict_rate(cosines: jax.Array) -> jax.Array:
  """Share of the pairs of groups whose gradients have a negative cosine.

  NaN cosines (a path that does not form them) give NaN; one group gives 0.
  """
  pairs = cosines[jnp.triu_indices(len(cosines), 1)]
  share = jnp.sum(pairs < 0) / max(pairs.size, 1)
  return jnp.where(jnp.isnan(pairs).any(), jnp.nan, share)


def effective_groups(weights: jax.Array) -> jax.Array:
  """(sum |w|)^2 / sum w^2: G for equal weights, 1 for one group, 0 for none."""
  return divide(jnp.sum(jnp.abs(weights)) ** 2, jnp.sum(weights**2))
