"""Amazon Beauty 2014, 5-core: 22,363 users, 12,101 items, 198,502 reviews.

  python -m experiments.main --config=experiments/configs/beauty.py \
    --workdir=runs/beauty

Some 13 minutes on one CPU core (base 195 CPU-seconds). Expect, history masked,
over three seeds a base of NDCG@10 .0525 (tail .048, head .070), PIN at +5 %
[+1, +9] for tail and +5 % [-1, +12] for head users, and a joint backbone with
one gate for all users at +6 % [+2, +11] and +7 % [+3, +12].

The strongest base so far has width 256 (.057; about 20 CPU-minutes a seed):
  --config.backbone.width=256 --config.optimizer.learning_rate=1e-3 \
    --config.batch_size=255 --config.backbone_steps=2000 \
    --config.plugin_steps=500
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  return base.amazon(argument, "amazon_beauty_s3rec.parquet")
