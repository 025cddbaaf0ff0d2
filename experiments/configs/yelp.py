"""Yelp (the version of LLM-ESR): 15,720 users, 11,383 items.

  python -m experiments.main --config=yelp \
    --workdir=runs/yelp

Some 12 minutes on one CPU core (base 200 CPU-seconds);
results: docs/findings.md.

The settings are those of the Amazon sets, with fewer windows a step: histories
are longer, so that it reads as many targets. A quarter of the users have one
training interaction, which is no target; groups of as many users each would
leave the first without any. Of the weights tried on validation, those of P(d)
of interactions to the power 1/2 cost the backbone least (docs/findings.md).
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE, recipe=… of `base`."""
  weights = {"prior.kind": "interactions", "prior.exponent": 0.5}
  config = base.amazon(argument, "yelp_llmesr.parquet", weights)
  config.batch_size = 255
  config.groups.update(rule="thresholds", thresholds=(3, 5, 9, 20))
  return config
