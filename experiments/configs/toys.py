"""Amazon Toys and Games 2014, 5-core: 19,412 users, 11,924 items.

  python -m experiments.main --config=experiments/configs/toys.py \
    --workdir=runs/toys

About 30 minutes on one busy CPU core (base 600 CPU-seconds). Expect, history
masked, a base of NDCG@10 .055 (tail .056, head .049) and PIN at -15 %
[-18, -12] for tail and -16 % [-22, -10] for head users.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  return base.amazon(argument, "amazon_toys_s3rec.parquet")
