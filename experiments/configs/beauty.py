"""Amazon Beauty 2014, 5-core: 22,363 users, 12,101 items, 198,502 reviews.

  python -m experiments.main --config=experiments/configs/beauty.py \
    --workdir=runs/beauty

About 20 minutes on one busy CPU core (base 500 CPU-seconds). Expect, history
masked, a base of NDCG@10 .051 (tail .047, head .070) and PIN at -14 %
[-17, -12] for tail and -16 % [-20, -11] for head users.

The strongest base so far has width 256 (.057; about 20 CPU-minutes a seed):
  --config.backbone.width=256 --config.optimizer.learning_rate=1e-3 \
    --config.loss.name=sampled_softmax --config.loss.negatives=2048
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  return base.amazon(argument, "amazon_beauty_s3rec.parquet")
