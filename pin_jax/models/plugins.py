"""Plugins: a small prediction network for each segment of users.

Segments' parameters are stacked along a leading axis [S, ...]; the frozen
backbone is an argument that is not differentiated. Every plugin starts as the
identity, and validation may leave it there.
"""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.data.splits import Split
from pin_jax.models import memory
from pin_jax.models import relations as related
from pin_jax.models.memory import Memory
from pin_jax.types import Backbone, InputError, Plugin, PyTree, Reading


class Evidence(NamedTuple):
  """What `memory_mix` and `gated` read, from the training prefix alone.

  Attributes:
    memory: the transitions.
    activeness: [U] float32, log activeness, standardised over users.
    popularity: [V+1] float32, log(1 + training count), standardised over items.
    relations: of the items, or None.
  """

  memory: Memory
  activeness: jax.Array
  popularity: jax.Array
  relations: related.Relations | None = None


def make_evidence(
  split: Split, *, relations: related.Relations | None = None, **options: Any
) -> Evidence:
  """Builds the evidence of a split.

  Args:
    split: whose training prefix counts.
    relations: of its items, see `relations.relate`; None = none.
    **options: of `memory.build`.

  Raises:
    InputError: for a bad option of `memory.build`.
  """
  built = memory.build(split, **options)
  counts = np.asarray(built.popularity, np.float64)
  popularity = np.log1p(counts)
  return Evidence(
    built, jnp.asarray(known_activeness(split.activeness, split.activeness)),
    jnp.asarray(_standardized(popularity, popularity)), relations,
  )


def known_activeness(
  activeness: np.ndarray, population: np.ndarray
) -> np.ndarray:
  """What plugins read of activeness: its log, standardised; [n] float32.

  Args:
    activeness: [n] numbers of training interactions.
    population: [U], those of the users that are standardised over.
  """
  log = lambda x: np.log(np.maximum(x, 1))
  return _standardized(log(activeness), log(population))


def _standardized(x: np.ndarray, over: np.ndarray) -> np.ndarray:
  return ((x - over.mean()) / (over.std() or 1)).astype(np.float32)


class Consultation(NamedTuple):
  """How the memory is asked; see `memory.consult`.

  Attributes:
    recent: H, items of the history that are looked up.
    history_decay: weight of each older one.
    shrink: added to the row sums.
    popularity_power: of the division by the item's popularity.
  """

  recent: int = 10
  history_decay: float = 0.8
  shrink: float = 2.0
  popularity_power: float = 0.25


class _Bottleneck(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = jax.nn.gelu(nn.Dense(self.hidden)(x))
    return x + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros)(h)


def bottleneck(width: int, *, hidden: int | None = None) -> Plugin:
  """Residual bottleneck network, y = x + W2 gelu(W1 x + b1) + b2.

  The bottleneck of half the width is inferred from the first author's later
  public work; leaving out its outer activation and starting at W2 = b2 = 0,
  which makes the plugin start as the identity, is ours.

  Args:
    width: D of the representation.
    hidden: width of the bottleneck; default D / 2.

  Returns:
    The plugin.

  Raises:
    InputError: if `hidden` is smaller than 1.
  """
  hidden = max(width // 2, 1) if hidden is None else hidden
  _check_size("hidden", hidden)
  module = _Bottleneck(hidden)
  init = lambda key: module.init(key, jnp.zeros((1, width)))["params"]
  return Plugin(init, lambda params, x: module.apply({"params": params}, x))


def translation(width: int) -> Plugin:
  """Moves the representation by a constant, y = x + z.

  With a tied output this is an item bias <z, E_v> of rank one in the item
  table: what a segment likes more than another. Ours.

  Args:
    width: D.
  """
  return Plugin(lambda key: jnp.zeros(width), lambda z, x: x + z)


def low_rank(
  like: PyTree, *, rank: int, pattern: str = "Block|_Unit|inputs|recurrent"
) -> Plugin:
  """LoRA: W + A B for the backbone's matrices, A random, B = 0 at the start.

  Args:
    like: the backbone's params, or their shapes.
    rank: columns of A.
    pattern: regular expression of the names (joined by '/') of the matrices; a
      kernel of more axes is one matrix [first axis, others].

  Returns:
    The plugin.

  Raises:
    InputError: if `rank` is smaller than 1, or nothing matches.

  Reference:
    Hu et al., ICLR 2022, arXiv 2106.09685. Deviation: no scaling alpha / r.
  """
  _check_size("rank", rank)
  leaves = jax.tree_util.tree_leaves_with_path(like)
  chosen = {
    name: leaf.shape
    for name, leaf in ((_name(path), leaf) for path, leaf in leaves)
    if leaf.ndim > 1 and re.search(pattern, name)
  }
  if not chosen:
    raise InputError(
      f"plugin.name='lora': no matrix of the backbone matches {pattern!r}; "
      "use a plugin that acts on the representation"
    )

  def init(key: jax.Array) -> PyTree:
    keys = jax.random.split(key, len(chosen))
    return {
      name: {
        "a": jax.random.normal(k, (shape[0], rank)) * shape[0] ** -0.5,
        "b": jnp.zeros((rank, *shape[1:])),
      }
      for k, (name, shape) in zip(keys, chosen.items(), strict=True)
    }

  def adapt(params: PyTree, backbone: PyTree) -> PyTree:
    def add(path: tuple, leaf: jax.Array) -> jax.Array:
      if _name(path) not in params:
        return leaf
      pair = params[_name(path)]
      return leaf + jnp.tensordot(pair["a"], pair["b"], 1)

    return jax.tree_util.tree_map_with_path(add, backbone)

  return Plugin(init, adapt=adapt)


def adapter(like: PyTree, *, width: int, hidden: int) -> Plugin:
  """Bottlenecks inside the blocks, after each block's MLP.

    y = x + W2 gelu(W1 x), W2 = 0 at the start

  The backbone applies them where its params hold an 'adapter' (`layers.Block`).

  Args:
    like: the backbone's params, or their shapes.
    width: D.
    hidden: width of the bottlenecks.

  Returns:
    The plugin.

  Raises:
    InputError: if `hidden` is smaller than 1, or the backbone has no `Block`.

  Reference:
    Houlsby et al., ICML 2019, arXiv 1902.00751. Deviation: one adapter a
    block, after the second residual, on frozen norms.
  """
  _check_size("hidden", hidden)
  blocks = [name for name in like if name.startswith("Block")]
  if not blocks:
    raise InputError(
      "plugin.name='adapter': the backbone has no transformer blocks; use "
      "'lora' or 'bottleneck'"
    )

  def init(key: jax.Array) -> PyTree:
    keys = jax.random.split(key, len(blocks))
    return {
      name: {
        "down": jax.random.normal(k, (width, hidden)) * width**-0.5,
        "up": jnp.zeros((hidden, width)),
      }
      for k, name in zip(keys, blocks, strict=True)
    }

  def adapt(params: PyTree, backbone: PyTree) -> PyTree:
    added = {
      name: {**backbone[name], "adapter": params[name]} for name in blocks
    }
    return {**backbone, **added}

  return Plugin(init, adapt=adapt)


def memory_mix(num_channels: int, consultation: Consultation) -> Plugin:
  """Adds the transition memory, and relations of items, to the logits.

    logit'(v) = logit(v) + sum_k w_k log(1 + m_k(v) / e), w = 0 at the start

  Args:
    num_channels: K, channels of the memory and relations together.
    consultation: how the memory is asked.
  """

  def mix(
    params: jax.Array, evidence: Evidence, representation: jax.Array,
    reading: Reading, logits: jax.Array, candidates: jax.Array | None,
  ) -> jax.Array:
    del representation
    known = _consult(evidence, reading, consultation).known(candidates)
    return logits + jnp.einsum("k,kmc->mc", params, known)

  init = lambda key: jnp.zeros(num_channels)
  return Plugin(init, mix=mix, recent=consultation.recent)


def memory_alone(consultation: Consultation) -> Plugin:
  """The memory without the backbone, and the relations of items.

    logit(v) = b (log(1 + sum_k m_k(v) / e) + sum_k log(1 + r_k(v) / e)), b = 1

  No job trains b, which orders no items.
  """

  def mix(
    params: jax.Array, evidence: Evidence, representation: jax.Array,
    reading: Reading, logits: jax.Array, candidates: jax.Array | None,
  ) -> jax.Array:
    del representation, logits
    found = _consult(evidence, reading, consultation)
    channels = found.memory.scores.sum(0, keepdims=True)
    whole = found._replace(memory=found.memory._replace(scores=channels))
    return params * whole.known(candidates).sum(0)

  return Plugin(lambda key: jnp.ones(()), mix=mix, recent=consultation.recent)


class _Gate(nn.Module):
  """Weights of the experts, 0 at the start."""

  hidden: int
  experts: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = jnp.tanh(nn.Dense(self.hidden)(x))
    zeros = nn.initializers.zeros
    return nn.Dense(self.experts, kernel_init=zeros)(h)


def gated(
  width: int,
  num_channels: int,
  consultation: Consultation,
  *,
  hidden: int,
  reads_state: bool = True,
  repeats: bool = False,
) -> Plugin:
  """Mixes the backbone, the memory's channels and popularity for each position.

    logit'(v) = (1 + w_0) logit(v) + sum_k w_k log(1 + m_k(v) / e)
                + w_(K+1) pop(v),   w = W2 tanh(W1 f + b1) + b2

  with W2 = b2 = 0 at the start, m_k the memory's channels and then the
  relations of items, and f of activeness, what each of these knows
  (log of its whole score), the share of the window that is filled and the
  normalised representation. With `repeats` one more expert, ahead of
  popularity, is the user's own history, w log(1 + r(v) / e) with r of
  `memory.repeats`; it moves items of the history alone, so nothing where these
  are masked. Ours.

  Args:
    width: D.
    num_channels: K, channels of the memory and relations together.
    consultation: how the memory is asked.
    hidden: width of the gate.
    reads_state: whether f holds the representation.
    repeats: whether the user's own repeats are an expert; for data that have
      any, see `memory.holds_repeats`.

  Returns:
    The plugin; its evidence is an `Evidence`.

  Raises:
    InputError: if `hidden` is smaller than 1.
  """
  _check_size("hidden", hidden)
  gate = _Gate(hidden, num_channels + 2 + repeats)
  size = 2 + num_channels + (width if reads_state else 0)

  def features(
    evidence: Evidence, representation: jax.Array, reading: Reading,
    found: _Found,
  ) -> jax.Array:
    parts = [
      evidence.activeness[reading.users][:, None],
      (reading.items > 0).mean(-1, keepdims=True),
      memory.evidence(found.totals()).T / 5,
    ]
    if reads_state:
      x = representation.astype(jnp.float32)
      parts.append(jax.nn.standardize(x))
    return jnp.concatenate(parts, -1)

  def mix(
    params: PyTree, evidence: Evidence, representation: jax.Array,
    reading: Reading, logits: jax.Array, candidates: jax.Array | None,
  ) -> jax.Array:
    found = _consult(evidence, reading, consultation)
    seen = features(evidence, representation, reading, found)
    weights = gate.apply({"params": params}, seen)
    known = found.known(candidates)
    if repeats:
      own = memory.repeats(reading, consultation.history_decay)
      own = memory.dense(own, candidates, found.num_items)
      known = jnp.concatenate([known, memory.evidence(own)])
    popularity = evidence.popularity
    if candidates is not None:
      popularity = popularity[candidates]
    return (
      (1 + weights[:, :1]) * logits
      + jnp.einsum("mk,kmc->mc", weights[:, 1:-1], known)
      + weights[:, -1:] * popularity
    )

  init = lambda key: gate.init(key, jnp.zeros((1, size)))["params"]
  return Plugin(init, mix=mix, recent=consultation.recent)


class _Found(NamedTuple):
  """What the evidence says of M positions, K = channels and relations."""

  memory: memory.Sparse
  related: memory.Sparse | None
  num_items: int

  def totals(self) -> jax.Array:
    """Whole score of each, [K, M]."""
    parts = [self.memory.scores.sum(-1)]
    if self.related is not None:
      parts.append(self.related.scores[:, 0].sum(-1))
    return jnp.concatenate(parts)

  def known(self, candidates: jax.Array | None) -> jax.Array:
    """What each says of the candidates, [K, M, C]."""
    parts = [memory.dense(self.memory, candidates, self.num_items)]
    if self.related is not None:
      parts.append(related.dense(self.related, candidates, self.num_items))
    return memory.evidence(jnp.concatenate(parts))


def _consult(
  evidence: Evidence, reading: Reading, consultation: Consultation
) -> _Found:
  options = consultation._asdict()
  del options["recent"]
  sparse = memory.consult(evidence.memory, reading, **options)
  others = evidence.relations
  if others is not None:
    others = related.consult(
      others, reading, history_decay=consultation.history_decay
    )
  return _Found(sparse, others, len(evidence.popularity) - 1)


def _check_size(name: str, value: int) -> None:
  if value < 1:
    raise InputError(f"plugin.{name}={value} is too small; give at least 1")


def _name(path: tuple) -> str:
  return "/".join(str(key.key) for key in path)


def init_stacked(plugin: Plugin, key: jax.Array, num_segments: int) -> PyTree:
  """Parameters of all segments, stacked; leaves [S, ...]."""
  return jax.vmap(plugin.init)(jax.random.split(key, num_segments))


def logits(
  backbone: Backbone,
  plugin: Plugin | None,
  params: PyTree,
  frozen: PyTree,
  evidence: PyTree,
  states: PyTree,
  reading: Reading | None,
  candidates: jax.Array | None,
  items: jax.Array | None = None,
) -> jax.Array:
  """Logits of the backbone's states through one segment's plugin.

  Args:
    backbone: the model.
    plugin: the network; None = the backbone alone.
    params: of the segment's plugin.
    frozen: the backbone's params, adapted where the plugin adapts them.
    evidence: what `plugin.mix` reads, or None.
    states: [M, ...].
    reading: of the M positions; None where `plugin.mix` is.
    candidates: [C], [M, C] or None, as in `types.Backbone`.
    items: [C], which items `candidates=None` are where the backbone's tables
      hold some of the catalogue alone.

  Returns:
    [M, C].
  """
  representations = backbone.represent(frozen, states, candidates)
  if plugin is None:
    return backbone.score(frozen, representations, candidates)
  moved = representations
  if plugin.apply is not None:
    moved = plugin.apply(params, representations)
  scores = backbone.score(frozen, moved, candidates)
  return mixed(
    backbone, plugin, params, frozen, evidence, states, reading, scores,
    items if candidates is None else candidates,
  )


def mixed(
  backbone: Backbone,
  plugin: Plugin | None,
  params: PyTree,
  frozen: PyTree,
  evidence: PyTree,
  states: PyTree,
  reading: Reading | None,
  scores: jax.Array,
  candidates: jax.Array | None,
) -> jax.Array:
  """Logits [M, C] with the plugin's evidence, where it mixes any in.

  Args:
    scores: [M, C] logits without it.
    candidates: what they are of, [C], [M, C] or None for 0..V.

  For the others see `logits`.
  """
  if plugin is None or plugin.mix is None:
    return scores
  padding = jnp.zeros(1, jnp.int32)
  own = backbone.represent(frozen, states, padding)[:, 0]
  return plugin.mix(params, evidence, own, reading, scores, candidates)


def adapted(plugin: Plugin | None, params: PyTree, frozen: PyTree) -> PyTree:
  """The backbone's params as a segment's plugin wants them."""
  if plugin is None or plugin.adapt is None:
    return frozen
  return plugin.adapt(params, frozen)
