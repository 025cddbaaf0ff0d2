"""Plugins: a small prediction network for each segment of users.

Segments' parameters are stacked along a leading axis [S, ...]; the frozen
backbone is an argument that is not differentiated. Every plugin starts as the
identity, and validation may leave it there.
"""

import functools
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pin_jax.models.memory import (
  Memory,
  Options,
  dense,
  log_scores,
  lookup,
  repeats,
)
from pin_jax.types import (
  Backbone,
  InputError,
  Plugin,
  PluginContext,
  PyTree,
)

_MATRICES = "Block|_Unit|inputs|recurrent"  # that LoRA adapts, by name


class Model(NamedTuple):
  """The functions of a model; `plugin` is None where there is none."""

  backbone: Backbone
  plugin: Plugin | None


class Weights(NamedTuple):
  """The parameters of a `Model`.

  Attributes:
    backbone: of the backbone.
    plugins: of the plugins, leaves [S, ...], or of one segment's; None without.
    evidence: what the plugins read besides, such as a `Memory`, or None.
  """

  backbone: PyTree
  plugins: PyTree
  evidence: PyTree = None


class _Bottleneck(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = jax.nn.gelu(nn.Dense(self.hidden)(x))
    return x + nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros)(h)


def bottleneck(width: int, *, hidden: int) -> Plugin:
  """Residual bottleneck network, y = x + W2 gelu(W1 x + b1) + b2.

  The bottleneck of half the width is inferred from the first author's later
  public work; leaving out its outer activation and starting at W2 = b2 = 0,
  which makes the plugin start as the identity, is ours.

  Args:
    width: D.
    hidden: width of the bottleneck.
  """
  module = _Bottleneck(hidden)
  init = lambda key: module.init(key, jnp.zeros((1, width)))["params"]
  return Plugin(init, lambda params, x: module.apply({"params": params}, x))


def translation(width: int) -> Plugin:
  """Moves the representation by a constant, y = x + z.

  With a tied output this is an item bias <z, E_v> of rank one in the item
  table: what a segment likes more than another. Ours.
  """
  return Plugin(lambda key: jnp.zeros(width), lambda z, x: x + z)


def low_rank(like: PyTree, *, rank: int) -> Plugin:
  """LoRA: W + A B for the backbone's matrices, A random, B = 0 at the start.

  A kernel of more axes is one matrix [first axis, others].

  Args:
    like: the backbone's params, or their shapes.
    rank: columns of A.

  Raises:
    InputError: if no matrix matches.

  Reference:
    Hu et al., ICLR 2022, arXiv 2106.09685. Deviation: no scaling alpha / r.
  """
  named = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
  chosen = {
    named(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(like)
    if leaf.ndim > 1 and re.search(_MATRICES, named(path))
  }
  if not chosen:
    raise InputError(
      "LoRA finds no matrix of the backbone to adapt; use a plugin that acts "
      "on the representation"
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
      pair = params.get(named(path))
      return leaf + jnp.tensordot(pair["a"], pair["b"], 1) if pair else leaf

    return jax.tree.map_with_path(add, backbone)

  return Plugin(init, adapt=adapt)


def adapter(like: PyTree, *, width: int, hidden: int) -> Plugin:
  """Bottlenecks inside the blocks, after each block's MLP.

    y = x + W2 gelu(W1 x), W2 = 0 at the start

  The backbone applies them where its params hold an 'adapter' (`layers.Block`).

  Args:
    like: the backbone's params, or their shapes.
    width: D.
    hidden: width of the bottlenecks.

  Raises:
    InputError: if the backbone has no `Block`.

  Reference:
    Houlsby et al., ICML 2019, arXiv 1902.00751. Deviation: one adapter a
    block, after the second residual, on frozen norms.
  """
  blocks = [name for name in like if name.startswith("Block")]
  if not blocks:
    raise InputError(
      "an adapter needs a backbone with transformer blocks; use LoRA or a "
      "plugin that acts on the representation"
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


def memory_mix(options: Options) -> Plugin:
  """Adds item neighbours to the logits.

    logit'(v) = logit(v) + sum_k w_k log(1 + m_k(v) / e), w = 0 at the start

  Args:
    options: of the memory, its evidence.
  """

  def mix(
    params: jax.Array, memory: Memory, representation: jax.Array,
    context: PluginContext, logits: jax.Array, candidates: jax.Array | None,
  ) -> jax.Array:
    del representation
    found = lookup(memory, context, options)
    known = log_scores(dense(found, candidates, memory.num_items))
    return logits + jnp.einsum("k,kmc->mc", params, known)

  init = lambda key: jnp.zeros(options.num_channels)
  return Plugin(init, mix=mix, recent=options.recent)


def memory_alone(options: Options) -> Plugin:
  """The item neighbours without the backbone.

    logit(v) = b (log(1 + sum_k m_k(v) / e) + sum_r log(1 + m_r(v) / e)), b = 1

  over the transitions' channels k and the relations r. No job trains b, which
  orders no items.

  Args:
    options: of the memory, its evidence.
  """
  transitions = len(options.channels)

  def mix(
    params: jax.Array, memory: Memory, representation: jax.Array,
    context: PluginContext, logits: jax.Array, candidates: jax.Array | None,
  ) -> jax.Array:
    del representation, logits
    found = lookup(memory, context, options)
    scores = dense(found, candidates, memory.num_items)
    known = log_scores(scores[:transitions].sum(0))
    return params * (known + log_scores(scores[transitions:]).sum(0))

  return Plugin(lambda key: jnp.ones(()), mix=mix, recent=options.recent)


class _Gate(nn.Module):
  hidden: int
  experts: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = jnp.tanh(nn.Dense(self.hidden)(x))
    return nn.Dense(self.experts, kernel_init=nn.initializers.zeros)(h)


def gated(
  width: int,
  options: Options,
  *,
  hidden: int,
  reads_state: bool = True,
  own_repeats: bool = False,
) -> Plugin:
  """Mixes backbone, item neighbours and popularity for each position. Ours.

    logit'(v) = (1 + w_0) logit(v) + sum_k w_k log(1 + m_k(v) / e)
                + w_(K+1) pop(v),   w = W2 tanh(W1 f + b1) + b2

  with W2 = b2 = 0 at the start, m_k the memory's K channels and f of
  activeness, the share of the window that is filled, what each channel knows
  (log of its whole score) and the normalised representation. With `own_repeats`
  one more expert, ahead of popularity, is the user's own history, w log(1 +
  r(v) / e) with r of `memory.repeats`; it moves items of the history alone, so
  nothing where these are masked.

  Args:
    width: D.
    options: of the memory, its evidence.
    hidden: width of the gate.
    reads_state: whether f holds the representation.
    own_repeats: whether the user's own repeats are an expert; for data that
      have any, see `memory.holds_repeats`.
  """
  gate = _Gate(hidden, options.num_channels + 2 + own_repeats)
  size = 2 + options.num_channels + (width if reads_state else 0)

  def mix(
    params: PyTree, memory: Memory, representation: jax.Array,
    context: PluginContext, logits: jax.Array, candidates: jax.Array | None,
  ) -> jax.Array:
    found = lookup(memory, context, options)
    features = [
      memory.activeness[context.users][:, None],
      (context.items > 0).mean(-1, keepdims=True),
      log_scores(found.scores.sum(-1)).T / 5,
    ]
    if reads_state:
      features.append(jax.nn.standardize(representation.astype(jnp.float32)))
    weights = gate.apply({"params": params}, jnp.concatenate(features, -1))
    scores = dense(found, candidates, memory.num_items)
    if own_repeats:
      own = repeats(context, options.history_decay)
      own = dense(own, candidates, memory.num_items)
      scores = jnp.concatenate([scores, own])
    popularity = memory.popularity
    if candidates is not None:
      popularity = popularity[candidates]
    return (
      (1 + weights[:, :1]) * logits
      + jnp.einsum("mk,kmc->mc", weights[:, 1:-1], log_scores(scores))
      + weights[:, -1:] * popularity
    )

  init = lambda key: gate.init(key, jnp.zeros((1, size)))["params"]
  return Plugin(init, mix=mix, recent=options.recent)


def init_stacked(plugin: Plugin, key: jax.Array, num_segments: int) -> PyTree:
  """Parameters of all segments, stacked; leaves [S, ...]."""
  return jax.vmap(plugin.init)(jax.random.split(key, num_segments))


def logits(
  model: Model,
  weights: Weights,
  states: PyTree,
  context: PluginContext | None,
  candidates: jax.Array | None,
  items: jax.Array | None = None,
) -> jax.Array:
  """Logits [M, C] of the backbone's states through one segment's plugin.

  Args:
    model: backbone and plugin.
    weights: of one segment, the backbone's adapted where the plugin does so.
    states: [M, ...].
    context: of the M positions; None where the plugin reads none.
    candidates: [C], [M, C] or None, as in `types.Backbone`.
    items: [C], the items that `candidates=None` stands for where the backbone's
      tables hold a part of the catalogue.
  """
  backbone, plugin = model
  represented = backbone.represent(weights.backbone, states, candidates)
  if plugin is not None and plugin.apply is not None:
    represented = plugin.apply(weights.plugins, represented)
  scores = backbone.score(weights.backbone, represented, candidates)
  own = items if candidates is None else candidates
  return mixed(model, weights, states, context, scores, own)


def mixed(
  model: Model,
  weights: Weights,
  states: PyTree,
  context: PluginContext | None,
  scores: jax.Array,
  candidates: jax.Array | None,
) -> jax.Array:
  """Logits [M, C] with the plugin's evidence, where it mixes any in.

  Args as in `logits`, but `scores` are the logits without it, and `candidates`
  what they are of: [C], [M, C] or None for 0..V.
  """
  backbone, plugin = model
  if plugin is None or plugin.mix is None:
    return scores
  padding = jnp.zeros(1, jnp.int32)
  own = backbone.represent(weights.backbone, states, padding)[:, 0]
  return plugin.mix(
    weights.plugins, weights.evidence, own, context, scores, candidates
  )


def adapted(plugin: Plugin | None, params: PyTree, frozen: PyTree) -> PyTree:
  """The backbone's params as a segment's plugin wants them."""
  if plugin is None or plugin.adapt is None:
    return frozen
  return plugin.adapt(params, frozen)
