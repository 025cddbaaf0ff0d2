"""Gradient aggregation: from per-group gradients to the one that is applied.

The idea of the method, free of recommendation: G groups, one loss each, one
shared parameter tree. A *weighting* turns the Gramian of the group gradients
and the group losses into weights; `combine` applies them.

    losses, grads = vmap(value_and_grad(group_loss), (None, 0, 0))(params, ...)
    weights, state = weighting.update(gramian(grads), losses, state)
    gradient = combine(weights, grads)

`aggregate` builds that step for any loss and any parameter tree, over the whole
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

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
GroupLoss = Callable[[PyTree, PyTree, jax.Array], jax.Array]
WeightedLoss = Callable[..., tuple[jax.Array, jax.Array]]
Gramians = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]

READS = ("nothing", "losses", "gradients")
# Copies of the gradient may take this share of a device's memory.
_COPIES_SHARE = 0.25
# Up to so many bytes of G gradients, one group at a time gains more from a
# CPU's caches than passing over the parameters G times costs.
_CACHED_BYTES = 50_000_000
_GRAMIAN_BLOCK = 4096


class Weighting(NamedTuple):
  """A rule that turns group gradients and losses into weights [G].

  Attributes:
    init: () -> state.
    update: (gramian [G, G], losses [G], state) -> (weights [G], state).
    reads: the most that `update` reads beside its state: 'nothing', 'losses'
      or 'gradients'. What it does not read may be NaN; the less it reads, the
      more paths are open to it.
  """

  init: Callable[[], PyTree]
  update: Callable[[jax.Array, jax.Array, PyTree], tuple[jax.Array, PyTree]]
  reads: str = "gradients"


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
    prior: [G] numbers >= 0 with a positive sum; normalised.

  Raises:
    ValueError: if an entry is negative or not finite, or all are zero.
  """
  weights = normalised(prior)
  update = lambda gramian, losses, state: (jnp.asarray(weights), state)
  return Weighting(lambda: (), update, "nothing")


def normalised(prior: Sequence[float]) -> np.ndarray:
  """The prior divided by its sum; [G] float32.

  Raises:
    ValueError: as `backdoor`.
  """
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
  return sum(leaf_gramian(leaf) for leaf in jax.tree.leaves(grads))


def leaf_gramian(leaf: jax.Array) -> jax.Array:
  """<x_g, x_h> of one leaf [G, ...]; [G, G] float32.

  On CPU in blocks that stay in the cache: three to five times faster than one
  product of a few very long rows.
  """

  def product(x: jax.Array) -> jax.Array:
    axes = tuple(range(1, x.ndim))
    return jnp.tensordot(
      x, x, (axes, axes), precision="highest",
      preferred_element_type=jnp.float32,
    )

  def blocked(x: jax.Array) -> jax.Array:
    flat = x.reshape(len(x), -1)
    width = max(min(_GRAMIAN_BLOCK, flat.shape[1]), 1)
    blocks = flat.shape[1] // width
    take = lambda i: jax.lax.dynamic_slice_in_dim(flat, i * width, width, 1)
    return jax.lax.fori_loop(
      0, blocks, lambda i, total: total + product(take(i)),
      product(flat[:, blocks * width :]),
    )

  return jax.lax.platform_dependent(leaf, cpu=blocked, default=product)


def cosines(gramian: jax.Array) -> jax.Array:
  """Cosine matrix of the group gradients; 0 where a gradient is zero."""
  norms = jnp.sqrt(jnp.diagonal(gramian))
  scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
  return gramian * scale[:, None] * scale[None, :]


def conflict_rate(cosines: jax.Array) -> jax.Array:
  """Share of the pairs of groups whose gradients have a negative cosine.

  NaN cosines (a path that does not form them) give NaN; one group gives 0.
  """
  pairs = _pairs(cosines)
  if not pairs.size:
    return jnp.float32(0)
  return jnp.where(jnp.isnan(pairs).any(), jnp.nan, jnp.mean(pairs < 0))


def mean_cosine(cosines: jax.Array) -> jax.Array:
  """Mean over the pairs of groups; one group gives 0."""
  pairs = _pairs(cosines)
  return pairs.mean() if pairs.size else jnp.float32(0)


def _pairs(cosines: jax.Array) -> jax.Array:
  return cosines[jnp.triu_indices(cosines.shape[0], 1)]


def effective_groups(weights: jax.Array) -> jax.Array:
  """(sum |w|)^2 / sum w^2: G for equal weights, 1 for one group, 0 for none."""
  squares = jnp.sum(weights**2)
  total = jnp.sum(jnp.abs(weights)) ** 2
  return jnp.where(squares > 0, total / jnp.where(squares > 0, squares, 1), 0)


def combine(weights: jax.Array, grads: PyTree) -> PyTree:
  """sum_g weights_g * grads_g; leaves [G, ...] -> [...]."""
  return jax.tree.map(lambda leaf: _combine_leaf(weights, leaf), grads)


def _combine_leaf(weights: jax.Array, leaf: jax.Array) -> jax.Array:
  total = jnp.tensordot(weights, _wide(leaf), 1, precision="highest")
  return total.astype(leaf.dtype)


def _wide(x: jax.Array) -> jax.Array:
  """x in float32 where its type is narrower."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Blocks: parts of the gradient with weights of their own.


def leaf_names(params: PyTree) -> list[str]:
  """The leaves' names, such as 'Block_0/MLP_0/Dense_0/kernel'."""
  paths = jax.tree_util.tree_leaves_with_path(params)
  return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in paths]


Blocks = Callable[[str], str]
Rules = Weighting | Mapping[str, Weighting]


class _Plan(NamedTuple):
  """How the leaves of a tree fall into K blocks and what weighs them.

  Attributes:
    names: [K] the blocks, in the order of their first leaves.
    of_leaf: the block of each leaf, an index into `names`.
    init: () -> state.
    update: (gramians [K, G, G], losses [G], state) -> (weights [K, G], state).
    present: weights [K, G] -> what `Aggregate.weights` holds.
  """

  names: list[str]
  of_leaf: list[int]
  init: Callable[[], PyTree]
  update: Callable[..., tuple[jax.Array, PyTree]]
  present: Callable[[jax.Array], Any]


def _whole(rule: Weighting, num_leaves: int) -> _Plan:
  def update(
    gramians: jax.Array, losses: jax.Array, state: PyTree
  ) -> tuple[jax.Array, PyTree]:
    weights, state = rule.update(gramians[0], losses, state)
    return weights[None], state

  return _Plan(["all"], [0] * num_leaves, rule.init, update, lambda w: w[0])


def _plan(rules: Rules, blocks: Blocks | None, params: PyTree) -> _Plan:
  leaves = leaf_names(params)
  if blocks is None:
    return _whole(rules, len(leaves))
  of_leaf = [blocks(name) for name in leaves]
  names = list(dict.fromkeys(of_leaf))
  of_leaf = [names.index(block) for block in of_leaf]
  present = lambda w: dict(zip(names, w, strict=True))
  if isinstance(rules, Weighting):
    init = lambda: jax.tree.map(
      lambda x: jnp.stack([x] * len(names)), rules.init()
    )
    update = jax.vmap(rules.update, (0, None, 0))
    return _Plan(names, of_leaf, init, update, present)
  if set(names) != set(rules):
    raise ValueError(
      f"the parameters have blocks {sorted(names)} and the weightings are for "
      f"{sorted(rules)}; name the same ones (leaves: {leaves})"
    )

  def update(
    gramians: jax.Array, losses: jax.Array, state: PyTree
  ) -> tuple[jax.Array, PyTree]:
    out = {
      name: rules[name].update(gramians[k], losses, state[name])
      for k, name in enumerate(names)
    }
    weights = jnp.stack([out[name][0] for name in names])
    return weights, {name: out[name][1] for name in names}

  init = lambda: {name: rules[name].init() for name in names}
  return _Plan(names, of_leaf, init, update, present)


def _block_gramians(plan: _Plan, leaf_gramians: list[jax.Array]) -> jax.Array:
  totals = [jnp.float32(0)] * len(plan.names)
  for block, products in zip(plan.of_leaf, leaf_gramians, strict=True):
    totals[block] = totals[block] + products
  return jnp.stack(totals)


def _leafwise(
  plan: _Plan, weights: jax.Array, tree: PyTree, function: Callable
) -> PyTree:
  """Maps function(weights of the leaf's block, leaf) over a tree."""
  leaves, structure = jax.tree.flatten(tree)
  pairs = zip(plan.of_leaf, leaves, strict=True)
  return structure.unflatten([function(weights[k], leaf) for k, leaf in pairs])


# Paths.


class _Problem(NamedTuple):
  """What the paths share; see `aggregate`."""

  group_loss: GroupLoss
  weighted_loss: WeightedLoss | None
  gramians: Gramians | None


def aggregate(
  group_loss: GroupLoss,
  weighting: Rules,
  *,
  path: str = "auto",
  blocks: Blocks | None = None,
  weighted_loss: WeightedLoss | None = None,
  gramians: Gramians | None = None,
  runs: int = 1,
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
                 which that would sum, the gradient is `accumulated`
    two_pass     what the rule reads in a first pass, the weighted gradient in a
                 second: never G gradients alive, whatever the rule. The Gramian
                 comes from `gramians`; without it group by group against each
                 other, at (G + 1) / 2 times the cost of all the gradients.

  'auto' takes the cheapest that the rule allows. Where it reads nothing:
  `weighted`, given a `weighted_loss`, but `accumulated` on CPU as long as the
  parameters are small, for its working set suits caches. Else G gradients at
  once, `stacked` on accelerators and `sequential` on CPU, as long as they fit a
  quarter of the memory, and `two_pass` beyond.

  Args:
    group_loss: (params, batch, key) -> scalar loss of one group.
    weighting: the rule for the weights, or one for each block by its name.
    path: one of the above.
    blocks: None = one rule over the whole gradient; else the name of a leaf
      ('encoder/kernel') -> the block it belongs to. Each block gets weights
      from its own Gramian and state: `blocks=str` is every tensor by itself.
    weighted_loss: optional faster form of the losses, for the pass whose
      weights are known: (params, batches, keys, weights [G]) -> (sum_g w_g L_g,
      losses [G]).
    gramians: optional form of the Gramian that never holds G gradients:
      (params, batches, keys) -> (losses [G], tree of each leaf's [G, G]).
    runs: how many of these are computed at once, under a `vmap` around the
      step: 'auto' counts the memory of them all.

  Returns:
    The aggregator.

  Raises:
    ValueError: for an unknown path or rule, one that reads more than the path
      gives, or (when params are first seen) blocks without a rule.
  """
  by_block = not isinstance(weighting, Weighting)
  if by_block and blocks is None:
    raise ValueError(
      f"weightings for the blocks {sorted(weighting)} need blocks=: a function "
      "from a leaf's name to its block's"
    )
  rules = list(weighting.values()) if by_block else [weighting]
  for rule in rules:
    if rule.reads not in READS:
      raise ValueError(f"reads={rule.reads!r} is unknown; use one of {READS}")
  reads = max((rule.reads for rule in rules), key=READS.index)
  _check_path(path, reads, blocks is None)

  def wide_loss(params: PyTree, batch: PyTree, key: jax.Array) -> jax.Array:
    return _wide(group_loss(params, batch, key))

  def step(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    plan = _plan(weighting, blocks, params)
    problem = _Problem(wide_loss, weighted_loss, gramians)
    if any(_wide(x).dtype != x.dtype for x in jax.tree.leaves(params)):
      problem = _Problem(wide_loss, None, None)
    chosen = path
    if path == "auto":
      chosen = choose_path(
        reads, len(keys), runs * _bytes(params),
        fused=problem.weighted_loss is not None and blocks is None,
      )
    run = PATHS[chosen](problem, plan, reads)
    return run(params, batches, keys, state)

  init = lambda params: initial_state(weighting, params, blocks)
  return Aggregator(init, step)


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
  return _plan(weighting, blocks, params).init()


def _check_path(path: str, reads: str, whole: bool) -> None:
  """Raises ValueError unless the path exists and gives what is read."""
  if path != "auto" and path not in PATHS:
    raise ValueError(
      f"path={path!r} is unknown; use one of {['auto', *PATHS]}"
    )
  if path in ("accumulated", "weighted") and reads != "nothing":
    raise ValueError(
      f"path={path!r} needs weights that read nothing, and these read {reads}; "
      "use 'auto'"
    )
  if path == "weighted" and not whole:
    raise ValueError(
      "path='weighted' has one backward pass, with the same weights for every "
      "block; use 'accumulated' or 'auto'"
    )


def choose_path(
  reads: str,
  num_groups: int,
  gradient_bytes: int,
  *,
  fused: bool,
  backend: str | None = None,
  memory: int | None = None,
) -> str:
  """The path that 'auto' takes; see `aggregate`.

  Args:
    reads: what the rules read.
    num_groups: G.
    gradient_bytes: size of one gradient.
    fused: whether one weighted loss serves all groups and blocks.
    backend: 'cpu', 'gpu' or 'tpu'; by default the one in use.
    memory: bytes of a device; by default what the device says.

  Returns:
    One of PATHS.
  """
  on_cpu = (backend or jax.default_backend()) == "cpu"
  if reads == "nothing":
    cached = on_cpu and num_groups * gradient_bytes <= _CACHED_BYTES
    return "weighted" if fused and not cached else "accumulated"
  memory = _device_memory() if memory is None else memory
  if num_groups * gradient_bytes > _COPIES_SHARE * memory:
    return "two_pass"
  return "sequential" if on_cpu else "stacked"


def _device_memory() -> int:
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes(params: PyTree) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


Run = Callable[[PyTree, PyTree, jax.Array, PyTree], Aggregate]


def _unknown(size: int) -> jax.Array:
  return jnp.full((size, size), jnp.nan, jnp.float32)


def _known_weights(
  plan: _Plan, size: int, state: PyTree
) -> tuple[jax.Array, PyTree]:
  """Weights [K, G] of rules that read nothing."""
  nothing = jnp.full((len(plan.names), size, size), jnp.nan, jnp.float32)
  return plan.update(nothing, nothing[0, 0], state)


def _per_group(problem: _Problem, plan: _Plan, over_groups: Callable) -> Run:
  value_and_grad = jax.value_and_grad(problem.group_loss)

  def run(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    one = lambda group: value_and_grad(params, *group)
    losses, grads = over_groups(one, (batches, keys))
    products = _block_gramians(
      plan, [leaf_gramian(leaf) for leaf in jax.tree.leaves(grads)]
    )
    weights, state = plan.update(products, losses, state)
    gradient = _leafwise(plan, weights, grads, _combine_leaf)
    return Aggregate(
      gradient, losses, plan.present(weights), products.sum(0), state
    )

  return run


def _stacked(problem: _Problem, plan: _Plan, reads: str) -> Run:
  del reads
  return _per_group(problem, plan, lambda f, groups: jax.vmap(f)(groups))


def _sequential(problem: _Problem, plan: _Plan, reads: str) -> Run:
  del reads
  return _per_group(problem, plan, jax.lax.map)


def _accumulate(
  problem: _Problem,
  plan: _Plan,
  weights: jax.Array,
  params: PyTree,
  groups: tuple[PyTree, jax.Array],
) -> tuple[PyTree, jax.Array, jax.Array]:
  """(sum_g w_kg grad_g, losses [G], ||grad_g||^2 [G]), group by group."""
  value_and_grad = jax.value_and_grad(problem.group_loss)

  def body(total: PyTree, group: PyTree) -> tuple[PyTree, PyTree]:
    weights, batch, key = group
    loss, grad = value_and_grad(params, batch, key)
    grad = jax.tree.map(_wide, grad)
    scaled = _leafwise(plan, weights, grad, jnp.multiply)
    square = sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grad))
    return jax.tree.map(jnp.add, total, scaled), (loss, square)

  zeros = jax.tree.map(lambda x: jnp.zeros_like(_wide(x)), params)
  total, out = jax.lax.scan(body, zeros, (weights.T, *groups))
  return jax.tree.map(lambda x, p: x.astype(p.dtype), total, params), *out


def _accumulated(problem: _Problem, plan: _Plan, reads: str) -> Run:
  del reads

  def run(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    weights, state = _known_weights(plan, len(keys), state)
    total, losses, squares = _accumulate(
      problem, plan, weights, params, (batches, keys)
    )
    diagonal = jnp.where(jnp.eye(len(keys), dtype=bool), squares, jnp.nan)
    return Aggregate(total, losses, plan.present(weights), diagonal, state)

  return run


def _known_gradient(
  problem: _Problem,
  plan: _Plan,
  weights: jax.Array,
  params: PyTree,
  groups: tuple[PyTree, jax.Array],
) -> tuple[PyTree, jax.Array]:
  """(sum_g w_kg grad_g, losses [G]), in one backward pass where that serves."""
  if problem.weighted_loss is None or len(plan.names) > 1:
    return _accumulate(problem, plan, weights, params, groups)[:2]
  weighted = jax.grad(problem.weighted_loss, has_aux=True)
  return weighted(params, *groups, weights[0])


def _weighted(problem: _Problem, plan: _Plan, reads: str) -> Run:
  del reads

  def run(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    weights, state = _known_weights(plan, len(keys), state)
    gradient, losses = _known_gradient(
      problem, plan, weights, params, (batches, keys)
    )
    return Aggregate(
      gradient, losses, plan.present(weights), _unknown(len(keys)), state
    )

  return run


def _two_pass(problem: _Problem, plan: _Plan, reads: str) -> Run:
  if reads == "nothing":
    known = _weighted if len(plan.names) == 1 else _accumulated
    return known(problem, plan, reads)

  def run(
    params: PyTree, batches: PyTree, keys: jax.Array, state: PyTree
  ) -> Aggregate:
    groups = batches, keys
    if reads == "gradients":
      of_leaves = problem.gramians or _pairwise_gramians(problem.group_loss)
      losses, products = of_leaves(params, *groups)
      products = _block_gramians(plan, jax.tree.leaves(products))
    else:
      losses = jax.lax.map(lambda x: problem.group_loss(params, *x), groups)
      products = jnp.stack([_unknown(len(keys))] * len(plan.names))
    weights, state = plan.update(products, losses, state)
    gradient, _ = _known_gradient(problem, plan, weights, params, groups)
    return Aggregate(
      gradient, losses, plan.present(weights), products.sum(0), state
    )

  return run


def _pairwise_gramians(group_loss: GroupLoss) -> Gramians:
  """Each gradient against those before it; two of them alive at a time."""
  value_and_grad = jax.value_and_grad(group_loss)

  def run(
    params: PyTree, batches: PyTree, keys: jax.Array
  ) -> tuple[jax.Array, PyTree]:
    size = len(keys)
    groups = jnp.arange(size), batches, keys
    dot = lambda x, y: jnp.tensordot(
      x, y, x.ndim, precision="highest", preferred_element_type=jnp.float32
    )

    def row(group: PyTree) -> tuple[jax.Array, PyTree]:
      g, batch, key = group
      loss, grad = value_and_grad(params, batch, key)

      def entry(other: PyTree) -> PyTree:
        h, batch, key = other
        compute = lambda: jax.tree.map(
          dot, grad, value_and_grad(params, batch, key)[1]
        )
        later = lambda: jax.tree.map(lambda x: jnp.float32(0), grad)
        return jax.lax.cond(h < g, compute, later)

      lower = jax.lax.map(entry, groups)
      square = jax.tree.map(lambda x: dot(x, x), grad)
      return loss, jax.tree.map(lambda x, s: x.at[g].set(s), lower, square)

    losses, lower = jax.lax.map(row, groups)
    mirror = lambda x: x + jnp.tril(x, -1).T
    return losses, jax.tree.map(mirror, lower)

  return run


PATHS = {
  "stacked": _stacked,
  "sequential": _sequential,
  "accumulated": _accumulated,
  "weighted": _weighted,
  "two_pass": _two_pass,
}
