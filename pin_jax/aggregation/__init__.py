"""The idea, free of recommendation: many gradients become one.

`aggregator`: the Gramian, the combination and the paths to them;
`weightings`: the rules that weight the gradients.
"""

from pin_jax.aggregation.aggregator import (
  PATHS,
  Aggregate,
  Aggregator,
  Blocks,
  GroupLoss,
  PyTree,
  Rules,
  WeightedLoss,
  Weighting,
  aggregate,
  backdoor,
  choose_path,
  combine,
  conflict_rate,
  cosines,
  effective_groups,
  gramian,
  informed,
  initial_state,
  leaf_names,
  mean_cosine,
  normalised,
)

__all__ = [
  "Aggregate",
  "Aggregator",
  "Blocks",
  "GroupLoss",
  "PATHS",
  "PyTree",
  "Rules",
  "WeightedLoss",
  "Weighting",
  "aggregate",
  "backdoor",
  "choose_path",
  "combine",
  "conflict_rate",
  "cosines",
  "effective_groups",
  "gramian",
  "informed",
  "initial_state",
  "leaf_names",
  "mean_cosine",
  "normalised",
]
