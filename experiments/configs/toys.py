"""Amazon Toys and Games 2014, 5-core: 19,412 users, 11,924 items.

  python -m experiments.main --config=experiments/configs/toys.py \
    --workdir=runs/toys

Some 13 minutes on one CPU core (base 190 CPU-seconds). Expect, history masked,
over three seeds a base of NDCG@10 .0585 (tail .060, head .055), PIN at +8 %
[+5, +12] for tail and +3 % [-3, +9] for head users, and a joint backbone with
one gate for all users at +11 % [+9, +14] and +6 % [+0, +11].
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  return base.amazon(argument, "amazon_toys_s3rec.parquet")
