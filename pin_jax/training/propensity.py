"""Exact backdoor adjustment: importance weights from a group classifier.

Group weights P(d) alone converge to sum_d P(y|x,d) Q(d|x) with
Q(d|x) proportional to P(d) P(x|d). Weighting every example of group d by
P(x)/P(x|d) = share_d / P(d|x) first, and the group's loss by P(d) then,
converges to the interventional sum_d P(y|x,d) P(d) (Pearl 2009, theorem 3.3.2,
by inverse propensity). Ours; the paper is not known to do it.

The classifier, the shares and the groups' batches follow one distribution of
events: windows drawn the same way, their positions weighted by the same mean.
"""

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

_HIDDEN = 64


def init_classifier(key: jax.Array, width: int, num_groups: int) -> PyTree:
  """Parameters of a two-layer network, D -> 64 -> G."""
  return {
    "w1": jax.random.normal(key, (width, _HIDDEN)) * width**-0.5,
    "b1": jnp.zeros(_HIDDEN),
    "w2": jnp.zeros((_HIDDEN, num_groups)),
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


def log_likelihood(
  backbone: Backbone, frozen: PyTree, params: PyTree, batch: Batch,
  groups: jax.Array, mean: str = "interactions",
) -> jax.Array:
  """Mean of log P(d|x) of the users' groups over real positions, nats.

  The batch has [B] windows of the training distribution of events, `groups`
  [U] the group of each user; for `mean` see `position_weights`.
  """
  logs = log_propensity(backbone, frozen, params, batch.history)
  weights = position_weights(batch.targets, mean)
  hits = jax.nn.one_hot(groups[batch.users], logs.shape[-1])[:, None]
  return jnp.sum(logs * (hits * weights[..., None]))


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
      lambda params: -log_likelihood(
        backbone, operands.frozen["backbone"], params, batch,
        operands.frozen["groups"], draw.mean,
      )
    )(state.params)
    updates, opt_state = optimizer.update(
      grads, state.optimizer, state.params, num_steps=operands.num_steps
    )
    params = optax.apply_updates(state.params, updates)
    rate = optimizer.schedule(t, operands.num_steps)
    log = {"loss": loss[None], "learning_rate": rate}
    return state._replace(params=params, optimizer=opt_state), log

  return step


def event_shares(
  split: Split, groups: np.ndarray, num_groups: int, draw: Draw
) -> np.ndarray:
  """Share [G] of each group in the events that the classifier is fitted on.

  `groups` is [U], the group of each user.
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
