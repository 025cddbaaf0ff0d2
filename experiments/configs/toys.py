"""Amazon Toys and Games 2014, 5-core: 19,412 users, 11,924 items.

  python -m experiments.main --config=experiments/configs/toys.py \
    --workdir=runs/toys

Some 15 minutes on one CPU core (base 335 CPU-seconds). Expect, history masked,
over three seeds a base of NDCG@10 .0605 (tail .061, head .056), PIN at +16 %
[+13, +19] for tail and +6 % [+1, +13] for head users, and a joint backbone with
one gate for all users at +16 % [+13, +19] and +8 % [+3, +13].

The settings are Beauty's but for the weights: those of P(d) of interactions to
the power 1/2 have .0705 on validation, annealed ones .0702, the base .0732.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  config = base.amazon(argument, "amazon_toys_s3rec.parquet")
  config.prior.update(kind="interactions", exponent=0.5)
  return config
