"""Exact backdoor adjustment: importance weights from a group classifier.

Group weights P(d) alone converge to sum_d P(y|x,d) Q(d|x) with
Q(d|x) proportional to P(d) P(x|d). Weighting every example of group d by
P(x)/P(x|d) = share_d / P(d|x) first, and the group's loss by P(d) then,
converges to the interventional sum_d P(y|x,d) P(d) (Pearl 2009, theorem 3.3.2,
by inverse propensity). Ours; the paper is not known to do it.

The classifier, the shares and the groups' batches follow one distribution of
events: windows drawn the same way, their positions weighted by the same mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pin_jax.data.batches import Draw, target_chances, training_targets
from pin_jax.data.splits import Split
from pin_jax.models import packing
from pin_jax.training.objectives import position_weights
from pin_jax.training.optimizers import Optimizer
from pin_jax.training.steps import Importance, Operands, Step, TrainState
from pin_jax.types import Backbone, Batch, PyTree


def init_classifier(
  key: jax.Array, width: int, num_groups: int, *, hidden: int = 64
) -> PyTree:
  """Parameters of a two-layer network D -> hidden -> G."""
  scale = width**-0.5
  return {
    "w1": jax.random.normal(key, (width, hidden)) * scale,
    "b1": jnp.zeros(hidden),
    "w2": jnp.zeros((hidden, num_groups)),
    "b2": jnp.zeros(num_groups),
  }


def log_propensity(
  backbone: Backbone, frozen: PyTree, params: PyTree, history: jax.Array
) -> jax.Array:
  """log P(d|x) after every history position; [B, L] -> [B, L, G]."""
  rows, columns = jnp.indices(history.shape).reshape(2, -1)
  context = packing.encode(backbone, frozen, history)
  states = backbone.at(context, rows, columns)
  padding = jnp.zeros(1, jnp.int32)
  x = backbone.represent(frozen, states, padding)[:, 0]
  h = jax.nn.gelu(x @ params["w1"] + params["b1"])
  logits = h @ params["w2"] + params["b2"]
  return jax.nn.log_softmax(logits).reshape(*history.shape, -1)


class Fit(NamedTuple):
  """How well a classifier's P(d|x) fits events.

  Attributes:
    log_likelihood: mean of log P(d|x) of the users' groups, nats: what is
      maximised.
    shares_log_likelihood: the same of the groups' shares of the events, which
      know nothing of x.
    calibration_error: classwise, see `calibration_error`.
  """

  log_likelihood: jax.Array
  shares_log_likelihood: jax.Array
  calibration_error: jax.Array


def classifier_fit(
  backbone: Backbone, frozen: PyTree, params: PyTree, batch: Batch,
  groups: jax.Array, mean: str = "interactions",
) -> Fit:
  """The fit on the real positions of a batch.

  Args:
    backbone: frozen model whose representation the classifier reads.
    frozen: its params.
    params: the classifier's.
    batch: [B] windows drawn from the training distribution of events.
    groups: [U] group of each user.
    mean: see `position_weights`.
  """
  logs = log_propensity(backbone, frozen, params, batch.history)
  weights = position_weights(batch.targets, mean)
  label = jnp.broadcast_to(groups[batch.users][:, None], weights.shape)
  hits = jax.nn.one_hot(label, logs.shape[-1]) * weights[..., None]
  return Fit(
    jnp.sum(logs * hits),
    -jnp.sum(jax.scipy.special.entr(hits.sum((0, 1)))),
    calibration_error(jnp.exp(logs), label, weights),
  )


def calibration_error(
  probability: jax.Array, label: jax.Array, weights: jax.Array, bins: int = 15
) -> jax.Array:
  """Classwise expected calibration error of a group classifier.

  1/G sum_d sum_b n_db / n |share of label d in bin (d, b) - mean P(d|x) there|,
  with bins of equal width on P(d|x): 0 where P(d|x) = p says that a share p of
  such events is of group d.

  Args:
    probability: [..., G], P(d|x) of every event.
    label: [...] int, its user's group.
    weights: [...], what each event counts, n_db and n in all; 0 = nothing.
    bins: bins of [0, 1] a group.

  Reference: Kull et al., "Beyond temperature scaling", NeurIPS 2019
    (classwise-ECE).
  """
  count = probability.shape[-1]
  excess = jax.nn.one_hot(label, count) - probability
  excess = excess * weights[..., None]
  bin_of = jnp.clip(jnp.floor(probability * bins), 0, bins - 1)
  place = jnp.arange(count) * bins + bin_of.astype(jnp.int32)
  gaps = jax.ops.segment_sum(excess.ravel(), place.ravel(), count * bins)
  total = weights.sum()
  return jnp.abs(gaps).sum() / (count * jnp.where(total > 0, total, 1))


def classifier_step(
  backbone: Backbone, optimizer: Optimizer, draw: Draw
) -> Step:
  """One step of fitting P(d|x) on the windows that the groups are drawn from.

  `operands.frozen` holds `backbone` (params) and `groups` [U]; the pool has
  one group, so that windows come in their natural proportion. How they are
  drawn is that of the groups' own step, but for their number.
  """

  def step(
    state: TrainState, operands: Operands, t: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    batch = draw.batch(
      jax.random.fold_in(operands.key, t), operands.sequences, operands.pool
    )
    batch = jax.tree.map(lambda x: x[0], batch)
    loss, grads = jax.value_and_grad(
      lambda params: -classifier_fit(
        backbone, operands.frozen["backbone"], params, batch,
        operands.frozen["groups"], draw.mean,
      ).log_likelihood
    )(state.params)
    updates, opt_state = optimizer.transformation.update(
      grads, state.optimizer, state.params
    )
    params = optax.apply_updates(state.params, updates)
    log = {"loss": loss[None], "learning_rate": optimizer.schedule(t)}
    return state._replace(params=params, optimizer=opt_state), log

  return step


def event_shares(
  split: Split, groups: np.ndarray, num_groups: int, draw: Draw
) -> np.ndarray:
  """Share of each group in the events that the classifier is fitted on.

  Args:
    split: holds the training targets.
    groups: [U] group of each user.
    num_groups: G.
    draw: how windows are drawn, and how their positions count.
  """
  if draw.mean == "interactions":
    _, users, chances = target_chances(
      split, length=draw.length, draw=draw.draw
    )
    mass = np.bincount(users, chances, len(groups))
  else:  # every window alike
    windows = -(-training_targets(split) // draw.length)
    mass = windows if draw.draw == "interactions" else np.sign(windows)
  of_groups = np.bincount(groups, mass, num_groups)
  return of_groups / of_groups.sum()


def stabilised_weights(
  log_probability: jax.Array, shares: jax.Array, clip: float
) -> jax.Array:
  """min(share_d / P(d|x), clip) for every group's own examples.

  Their mean is 1 in each group where the propensities are exact and unclipped.

  Args:
    log_probability: [G, ..., G], log P(.|x) of the examples of group g.
    shares: [G], of `event_shares`.
    clip: largest weight.
  """
  groups = jnp.arange(shares.shape[0])
  own = jax.vmap(lambda x, g: x[..., g])(log_probability, groups)
  shares = shares.reshape((-1,) + (1,) * (own.ndim - 1))
  return jnp.minimum(shares * jnp.exp(-own), clip)


def fitted_importance(backbone: Backbone, *, clip: float = 10.0) -> Importance:
  """Weights of the examples from the fitted classifier, at most `clip`.

  Returns:
    (frozen, batch [G, B]) -> [G, B, L]; `frozen` holds `backbone`,
    `classifier` (params) and `shares` [G].
  """

  def importance(frozen: PyTree, batch: Batch) -> jax.Array:
    logs = jax.lax.map(
      lambda history: log_propensity(
        backbone, frozen["backbone"], frozen["classifier"], history
      ),
      batch.history,
    )
    return stabilised_weights(logs, frozen["shares"], clip)

  return importance
