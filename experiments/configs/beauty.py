"""Amazon Beauty 2014, 5-core: 22,363 users, 12,101 items, 198,502 reviews.

  python -m experiments.main --config=experiments/configs/beauty.py \
    --workdir=runs/beauty

About 25 minutes on one busy CPU core (base 580 CPU-seconds). Expect, history
masked, a base of NDCG@10 .051 (tail .046, head .069) and PIN at -13 %
[-16, -10] for tail and -16 % [-20, -11] for head users.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  return base.amazon(argument, "amazon_beauty_s3rec.parquet")
