"""Amazon Toys and Games 2014, 5-core: 19,412 users, 11,924 items.

  python -m experiments.main --config=experiments/configs/toys.py \
    --workdir=runs/toys

Some 13 minutes on one CPU core (base 190 CPU-seconds). Expect, history masked,
over three seeds a base of NDCG@10 .0585 (tail .060, head .055), PIN at +8 %
[+5, +12] for tail and +3 % [-3, +9] for head users, and a joint backbone with
one gate for all users at +11 % [+9, +14] and +6 % [+0, +11].

The gate reads the transition memory alone, and the weights are P(d). What
Beauty gains by was not tried here over three seeds:
  --config.optimizer.learning_rate=3e-3 \
    --config.pin.weighting=annealed_backdoor:steps=1250 \
    --config.memory.relations="('cosine','two_step','linear')"
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  config = base.amazon(argument, "amazon_toys_s3rec.parquet")
  # Beauty's annealing is level with it on validation (.0702, .0705).
  config.prior.update(kind="interactions", exponent=0.5)
  return config
