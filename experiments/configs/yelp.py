"""Yelp (the version of LLM-ESR): 15,720 users, 11,383 items.

  python -m experiments.main --config=experiments/configs/yelp.py \
    --workdir=runs/yelp

Some 15 minutes on one CPU core (base 225 CPU-seconds). Expect, history masked,
over three seeds a base of NDCG@10 .0252 (tail .025, head .025), PIN at -5 %
[-12, +4] for tail and -24 % [-38, -8] for head users, and a joint backbone with
one gate for all users at +14 % [+6, +22] and +6 % [-7, +20].

The settings are those of the Amazon sets, taken over without a search, with
fewer windows a step: histories are longer, so that it reads as many targets. A
quarter of the users have one training interaction, which is no target; groups
of as many users each would leave the first without any.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  config = base.amazon(argument, "yelp_llmesr.parquet")
  config.batch_size = 255
  config.groups.update(rule="thresholds", thresholds=(3, 5, 9, 20))
  return config
