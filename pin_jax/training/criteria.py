"""Criteria: what training minimises at every position, as one value.

`SOFTMAX` is the cross-entropy over the whole catalogue. `sampled` compares the
target with drawn negatives, which is all that the model then scores.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pin_jax.training import losses
from pin_jax.training.negatives import Negatives, Proposal, draw_negatives
from pin_jax.types import Batch, PyTree

SampledLoss = Callable[
  [jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array
]


class Criterion(NamedTuple):
  """How a position's loss comes about.

  Attributes:
    loss: (target's logit [M], negatives' [M, C], log_counts, where) -> [M];
      None is the softmax over the catalogue.
    draw: (key, batch [B]) -> Negatives; None where nothing is drawn.
    focusing: gamma of `losses.focal`; 0 leaves the loss as it is.
  """

  loss: SampledLoss | None
  draw: Callable[[jax.Array, Batch], Negatives] | None
  focusing: float = 0.0


SOFTMAX = Criterion(None, None)


def sampled(
  loss: SampledLoss, proposal: Proposal, *, count: int, shared: bool = True
) -> Criterion:
  """The criterion of a loss of sampled negatives.

  Args:
    loss: a value of `SAMPLED_LOSSES`, or like one.
    proposal: what to draw from.
    count: C.
    shared: one list of negatives for all rows of a batch, or one for each.

  Returns:
    The criterion.
  """

  def draw(key: jax.Array, batch: Batch) -> Negatives:
    return draw_negatives(proposal, key, batch, count=count, shared=shared)

  return Criterion(loss, draw)


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
  criterion: Criterion, key: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Keys for the model and the negatives, independent of each other.

  Where nothing is drawn the model has the key itself.
  """
  if criterion.draw is None:
    return key, None
  model_key, draw_key = jax.random.split(key)
  return model_key, draw_key


def draw(
  criterion: Criterion, key: jax.Array | None, batch: Batch
) -> Negatives | None:
  """The batch's negatives, None where nothing is drawn."""
  return None if criterion.draw is None else criterion.draw(key, batch)


Head = Callable[[PyTree, PyTree, PyTree, jax.Array | None], jax.Array]


def row_loss(criterion: Criterion, head: Head) -> losses.RowLoss:
  """The criterion at each of M positions, for `losses.chunked`.

  Args:
    criterion: what is minimised.
    head: (params, frozen, states [M], candidates) -> logits [M, C]; no
      candidates are the whole catalogue 0..V.

  Returns:
    f(params, (frozen, negatives of all rows or None), states [M],
    (targets [M], negatives of each row or None)) -> [M].
  """
  if criterion.loss is None:
    rows = _softmax_rows(head)
  else:
    rows = _sampled_rows(head, criterion.loss)
  if not criterion.focusing:
    return rows
  return lambda *args: losses.focal(rows(*args), criterion.focusing)


def _softmax_rows(head: Head) -> losses.RowLoss:
  def rows(
    params: PyTree, shared: PyTree, states: PyTree, constants: PyTree
  ) -> jax.Array:
    logits = head(params, shared[0], states, None)
    return losses.softmax_cross_entropy(
      logits, constants[0], jnp.arange(logits.shape[-1]) > 0
    )

  return rows


def _sampled_rows(head: Head, loss: SampledLoss) -> losses.RowLoss:
  def rows(
    params: PyTree, shared: PyTree, states: PyTree, constants: PyTree
  ) -> jax.Array:
    (frozen, common), (targets, own) = shared, constants
    items, log_counts = common if own is None else own
    targets = targets[:, None]
    positive = head(params, frozen, states, targets)[:, 0]
    negatives = head(params, frozen, states, items)
    where = (items > 0) & (items != targets)
    return loss(positive, negatives, log_counts, where)

  return rows
