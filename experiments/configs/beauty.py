"""Amazon Beauty 2014, 5-core: 22,363 users, 12,101 items, 198,502 reviews.

  python -m experiments.main --config=experiments/configs/beauty.py \
    --workdir=runs/beauty
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  return base.amazon(argument, "amazon_beauty_s3rec.parquet")
