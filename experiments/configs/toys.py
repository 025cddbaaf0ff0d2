"""Amazon Toys and Games 2014, 5-core: 19,412 users, 11,924 items.

  python -m experiments.main --config=toys \
    --workdir=runs/toys

Some 15 minutes on one CPU core (base 335 CPU-seconds);
results: docs/findings.md.

The settings are Beauty's but for the weights: those of P(d) of interactions to
the power 1/2 have .0705 on validation, annealed ones .0702, the base .0732.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE, recipe=… of `base`."""
  weights = {"prior.kind": "interactions", "prior.exponent": 0.5}
  return base.amazon(argument, "amazon_toys_s3rec.parquet", weights)
