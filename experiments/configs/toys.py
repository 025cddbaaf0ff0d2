"""Amazon Toys and Games 2014, 5-core: 19,412 users, 11,924 items.

  python -m experiments.main --config=experiments/configs/toys.py \
    --workdir=runs/toys

About 20 minutes on one CPU core (base 450 CPU-seconds). Expect, history masked,
a base of NDCG@10 .056 (tail .057, head .050) and PIN at -17 % [-20, -14] for
tail and -19 % [-25, -13] for head users.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  return base.amazon(argument, "amazon_toys_s3rec.parquet")
