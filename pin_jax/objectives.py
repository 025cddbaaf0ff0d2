"""Objectives: what training minimises at every position, as one value.

`SOFTMAX` is the cross-entropy over the whole catalogue. `sampled` compares the
target with drawn negatives, which is all that the model then scores.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pin_jax import losses
from pin_jax.negatives import Negatives, Proposal, draw_negatives
from pin_jax.types import Backbone, Batch, Plugin, PyTree

SampledLoss = Callable[
  [jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array
]


class Objective(NamedTuple):
  """How a position's loss comes about.

  Attributes:
    loss: (target's logit [M], negatives' [M, C], log_counts, where) -> [M];
      None is the softmax over the catalogue.
    draw: (key, batch [B]) -> Negatives; None where nothing is drawn.
  """

  loss: SampledLoss | None
  draw: Callable[[jax.Array, Batch], Negatives] | None


SOFTMAX = Objective(None, None)


def sampled(
  loss: SampledLoss, proposal: Proposal, *, count: int, shared: bool = True
) -> Objective:
  """The objective of a loss of sampled negatives.

  Args:
    loss: a value of `SAMPLED_LOSSES`, or like one.
    proposal: what to draw from.
    count: C.
    shared: one list of negatives for all rows of a batch, or one for each.

  Returns:
    The objective.
  """

  def draw(key: jax.Array, batch: Batch) -> Negatives:
    return draw_negatives(proposal, key, batch, count=count, shared=shared)

  return Objective(loss, draw)


def _without_counts(loss: Callable[..., jax.Array]) -> SampledLoss:
  return lambda positive, negatives, log_counts, where: loss(
    positive, negatives, where
  )


def _gbce(rate: float, calibration: float) -> SampledLoss:
  power = losses.gbce_power(rate, calibration)
  return lambda positive, negatives, log_counts, where: (
    losses.binary_cross_entropy(positive, negatives, where, power=power)
  )


# name -> (sampling rate C / (V - 1), calibration t) -> loss
SAMPLED_LOSSES: Mapping[str, Callable[[float, float], SampledLoss]] = {
  "sampled_softmax": lambda rate, t: losses.sampled_softmax,
  "gbce": _gbce,
  "bce": lambda rate, t: _without_counts(losses.binary_cross_entropy),
  "bpr": lambda rate, t: _without_counts(losses.bayesian_personalized_ranking),
}


def split_key(
  objective: Objective, key: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Keys for the model and the negatives, independent of each other.

  Where nothing is drawn the model has the key itself.
  """
  if objective.draw is None:
    return key, None
  model_key, draw_key = jax.random.split(key)
  return model_key, draw_key


def draw(
  objective: Objective, key: jax.Array | None, batch: Batch
) -> Negatives | None:
  """The batch's negatives, None where nothing is drawn."""
  return None if objective.draw is None else objective.draw(key, batch)


Head = Callable[[PyTree, PyTree, PyTree, jax.Array | None], jax.Array]


def backbone_head(backbone: Backbone) -> Head:
  """(params, None, states [M], candidates) -> logits [M, C], no plugin."""

  def head(
    params: PyTree, shared: PyTree, states: PyTree, candidates: jax.Array | None
  ) -> jax.Array:
    del shared
    representations = backbone.represent(params, states, candidates)
    return backbone.score(params, representations, candidates)

  return head


def plugin_head(backbone: Backbone, plugin: Plugin) -> Head:
  """(plugin params, backbone params, states [M], candidates) -> [M, C]."""

  def head(
    params: PyTree, shared: PyTree, states: PyTree, candidates: jax.Array | None
  ) -> jax.Array:
    representations = backbone.represent(shared, states, candidates)
    return backbone.score(
      shared, plugin.apply(params, representations), candidates
    )

  return head


def next_item_loss(
  backbone: Backbone,
  head: Head,
  *,
  objective: Objective = SOFTMAX,
  chunk: int = 256,
) -> Callable[..., jax.Array]:
  """The objective at every real position, weighted and summed.

  Args:
    backbone: gives the states of the positions.
    head: turns states and candidates into logits.
    objective: what is minimised.
    chunk: positions whose logits are alive at a time.

  Returns:
    f(params, shared, context, targets [B, L], weights [B, L], negatives) ->
    scalar; negatives as `draw` returns them, by default None.
  """
  row_loss = (
    _softmax_rows(head) if objective.loss is None
    else _sampled_rows(head, objective.loss)
  )
  total = losses.chunked(row_loss, chunk)

  def loss(
    params: PyTree,
    shared: PyTree,
    context: PyTree,
    targets: jax.Array,
    weights: jax.Array,
    negatives: Negatives | None = None,
  ) -> jax.Array:
    length = targets.shape[-1]
    real_first = jnp.argsort(targets.reshape(-1) == 0, stable=True)
    rows, columns = real_first // length, real_first % length
    states = backbone.at(context, rows, columns)
    common, own = negatives, None
    if negatives is not None and negatives.items.ndim == 2:
      common, own = None, jax.tree.map(lambda x: x[real_first], negatives)
    return total(
      params, (shared, common), states, (targets[rows, columns], own),
      weights[rows, columns],
    )

  return loss


def _softmax_rows(head: Head) -> losses.RowLoss:
  def row_loss(
    params: PyTree, shared: PyTree, states: PyTree, constants: PyTree
  ) -> jax.Array:
    logits = head(params, shared[0], states, None)
    return losses.softmax_cross_entropy(
      logits, constants[0], jnp.arange(logits.shape[-1]) > 0
    )

  return row_loss


def _sampled_rows(head: Head, loss: SampledLoss) -> losses.RowLoss:
  def row_loss(
    params: PyTree, shared: PyTree, states: PyTree, constants: PyTree
  ) -> jax.Array:
    (frozen, common), (targets, own) = shared, constants
    items, log_counts = common if own is None else own
    targets = targets[:, None]
    positive = head(params, frozen, states, targets)[:, 0]
    negatives = head(params, frozen, states, items)
    where = (items > 0) & (items != targets)
    return loss(positive, negatives, log_counts, where)

  return row_loss
