"""Losses: the last axis is the list, leading axes are batch, never reduced.

A `LossSpec` says what training minimises at every position: the cross-entropy
over the whole catalogue, or a loss of the target against drawn negatives, which
are then all that the model scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pin_jax.training.negatives import Negatives, Proposal
from pin_jax.types import Batch, InputError

SampledLoss = Callable[
  [jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array
]


class LossSpec(NamedTuple):
  """What is minimised at every position.

  Attributes:
    loss: (target's logit [M], negatives' [M, C], log_counts, where) -> [M];
      None is the softmax over the catalogue.
    draw: (key, batch [B]) -> Negatives; None where nothing is drawn.
    focusing: gamma of `focal`; 0 leaves the loss as it is.
  """

  loss: SampledLoss | None = None
  draw: Callable[[jax.Array, Batch], Negatives | None] = lambda *_: None
  focusing: float = 0.0


SOFTMAX = LossSpec()


def sampled(
  loss: SampledLoss, proposal: Proposal, *, count: int, shared: bool = True
) -> LossSpec:
  """The spec of a loss of sampled negatives.

  Args:
    loss: a value of `SAMPLED_LOSSES`, or like one.
    proposal: what to draw from.
    count: C.
    shared: one list of negatives for all rows of a batch, else one for each of
      its M = B L positions.
  """

  def draw(key: jax.Array, batch: Batch) -> Negatives:
    shape = (count,) if shared else (batch.targets.size, count)
    items = proposal.sample(key, batch, shape)
    return Negatives(items, proposal.log_counts(items, batch, count))

  return LossSpec(loss, draw)


def softmax_cross_entropy(
  logits: jax.Array, target: jax.Array, where: jax.Array | None = None
) -> jax.Array:
  """-log softmax(logits)[target], unreduced.

  Args:
    logits: [..., C], any float type; accumulated in float32.
    target: [...] int, index into the last axis.
    where: optional [..., C] bool, candidates that take part.

  Returns:
    [...] float32, nats.
  """
  return _cross_entropy(logits, target, where)


@jax.custom_vjp
def _cross_entropy(
  logits: jax.Array, target: jax.Array, where: jax.Array | None
) -> jax.Array:
  return _cross_entropy_forward(logits, target, where)[0]


def _cross_entropy_forward(
  logits: jax.Array, target: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, tuple]:
  wide = logits.astype(jnp.float32)
  if where is not None:
    wide = jnp.where(where, wide, -jnp.inf)
  largest = wide.max(-1, keepdims=True)
  powers = jnp.exp(wide - largest)
  total = powers.sum(-1, keepdims=True)
  chosen = jnp.take_along_axis(wide, target[..., None], axis=-1)
  loss = jnp.log(total) + largest - chosen
  kind = jnp.zeros(0, logits.dtype)
  return loss[..., 0], (powers, total, target, kind)


def _cross_entropy_backward(residuals: tuple, slope: jax.Array) -> tuple:
  """slope (softmax(logits) - onehot(target)), in one pass."""
  powers, total, target, kind = residuals
  slope = slope[..., None]
  index = jax.lax.broadcasted_iota(jnp.int32, powers.shape, powers.ndim - 1)
  hit = index == target[..., None]
  of_logits = powers * (slope / total) - jnp.where(hit, slope, 0)
  return of_logits.astype(kind.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def focal(loss: jax.Array, focusing: float) -> jax.Array:
  """(1 - p)^gamma loss, where p = e^-loss is the target's probability.

  Events that the model predicts well count less: head users', it is hoped, more
  often than tail users'. The loss is the cross-entropy of a softmax, in nats;
  `focusing` = gamma = 0 leaves it as it is.

  Reference: Lin et al., "Focal loss for dense object detection", ICCV 2017,
    equation 4.
  """
  missed = jnp.maximum(-jnp.expm1(-loss), jnp.finfo(loss.dtype).tiny)
  return missed**focusing * loss


def sampled_softmax(
  positive: jax.Array, negatives: jax.Array, log_counts: jax.Array,
  where: jax.Array | None = None,
) -> jax.Array:
  """Softmax cross-entropy with the normaliser estimated from negatives (logQ).

  -log( e^s+ / (e^s+ + sum_j e^(s_j - log n_j)) )

  with n_j the expected number of times that item j is drawn. Where the
  negatives are draws from all items and draws of the target are masked, the
  normaliser is unbiased, and loss and gradient approach those of
  `softmax_cross_entropy` with a bias of O(1 / C).

  Args:
    positive: [...] logit s+ of the target.
    negatives: [..., C] logits s_j.
    log_counts: [..., C] log n_j, which is log(C q_j) for C independent draws
      from q.
    where: optional [..., C] bool, negatives that take part.

  Returns:
    [...] float32, nats.

  Reference: Bengio & Senecal, IEEE Trans. Neural Networks 2008 (importance-
    sampled normaliser); Yi et al., RecSys 2019 (logQ for batch negatives).
    Deviation: the target is in the normaliser by construction, not by a draw,
    so its own logit is not corrected (as Khrylchenko et al., RecSys 2025,
    arXiv 2507.09331, argue); Yi et al. correct it too, which is biased.
  """
  positive = positive.astype(jnp.float32)
  corrected = negatives.astype(jnp.float32) - log_counts
  margins = corrected - positive[..., None]
  if where is not None:
    margins = jnp.where(where, margins, -jnp.inf)
  own = jnp.zeros_like(positive)[..., None]
  return jax.nn.logsumexp(jnp.concatenate([own, margins], axis=-1), axis=-1)


def binary_cross_entropy(
  positive: jax.Array, negatives: jax.Array, where: jax.Array | None = None,
  *, power: float = 1.0,
) -> jax.Array:
  """-(power log sigmoid(s+) + sum_j log(1 - sigmoid(s_j))) / (1 + k).

  k counts the negatives that take part. With `power` = beta of `gbce_power`
  this is gBCE: sigmoid(s+)^beta stands for the probability of the target.

  Args: as `sampled_softmax`; [...] float32, nats a term.

  Reference: Petrov & Macdonald, RecSys 2023, arXiv 2308.07192, equations of BCE
    and gBCE. Deviation: masked negatives leave the divisor too.
  """
  positive = jax.nn.softplus(-positive.astype(jnp.float32))
  terms = jax.nn.softplus(negatives.astype(jnp.float32))
  total, count = _masked_sum(terms, where)
  return (power * positive + total) / (1 + count)


def gbce_power(rate: float, calibration: float) -> float:
  """beta = alpha (t (1 - 1 / alpha) + 1 / alpha) of gBCE.

  t = 0 gives 1 (plain BCE), t = 1 gives alpha (the positive's probability is
  then calibrated against the overconfidence of sampling).

  Args:
    rate: alpha = k / (V - 1) in (0, 1], the share of the negatives that are
      sampled; else InputError.
    calibration: t in [0, 1].

  Reference: Petrov & Macdonald, RecSys 2023, arXiv 2308.07192.
  """
  if not 0 < rate <= 1:
    raise InputError(
      f"rate={rate:g} is outside (0, 1]; sample at most as many negatives as "
      "there are items, less one"
    )
  return rate * (calibration * (1 - 1 / rate) + 1 / rate)


def bayesian_personalized_ranking(
  positive: jax.Array, negatives: jax.Array, where: jax.Array | None = None
) -> jax.Array:
  """Mean over the negatives of -log sigmoid(s+ - s_j); 0 without negatives.

  Args: as `sampled_softmax`; [...] float32, nats.

  Reference: Rendle et al., UAI 2009. Deviation: the mean over several negatives
    (the paper has one a step); the prior on the parameters is the optimizer's
    weight decay.
  """
  margins = negatives.astype(jnp.float32) - positive[..., None]
  total, count = _masked_sum(jax.nn.softplus(margins), where)
  return total / jnp.maximum(count, 1)


def _masked_sum(
  terms: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """(sum, number) of the terms that take part, over the last axis."""
  where = jnp.broadcast_to(True if where is None else where, terms.shape)
  return jnp.where(where, terms, 0).sum(-1), where.sum(-1)


def _without_counts(
  loss: Callable[..., jax.Array], **options: float
) -> SampledLoss:
  return lambda positive, negatives, log_counts, where: loss(
    positive, negatives, where, **options
  )


# name -> (rate C / (V - 1), calibration t) -> loss; one's own goes here.
SAMPLED_LOSSES: dict[str, Callable[[float, float], SampledLoss]] = {
  "sampled_softmax": lambda rate, t: sampled_softmax,
  "gbce": lambda rate, t: _without_counts(
    binary_cross_entropy, power=gbce_power(rate, t)
  ),
  "bce": lambda rate, t: _without_counts(binary_cross_entropy),
  "bpr": lambda rate, t: _without_counts(bayesian_personalized_ranking),
}
