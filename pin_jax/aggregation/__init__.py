"""The idea, free of recommendation: G gradients become one.

    losses, grads = vmap(value_and_grad(group_loss), (None, 0, 0))(params, ...)
    weights, state = weighting.update(gramian(grads), losses, state)
    updates, opt_state = optimizer.update(combine(weights, grads), opt_state)

`aggregator`: the Gramian, the combination and the paths to them;
`weightings`: the rules that weight the gradients;
`solvers`: what some of them solve.
"""

from pin_jax.aggregation.aggregator import (
  PATHS,
  Aggregate,
  Blocks,
  GroupLoss,
  Rules,
  WeightedLoss,
  Weighting,
  aggregate,
  backdoor,
  combine,
  conflict_rate,
  cosines,
  effective_groups,
  gramian,
  informed,
  initial_state,
  leaf_names,
)

__all__ = [
  "Aggregate", "Blocks", "GroupLoss", "PATHS", "Rules", "WeightedLoss",
  "Weighting", "aggregate", "backdoor", "combine", "conflict_rate", "cosines",
  "effective_groups", "gramian", "informed", "initial_state", "leaf_names",
]
