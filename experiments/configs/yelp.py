"""Yelp (the version of LLM-ESR): 15,720 users, 11,383 items.

  python -m experiments.main --config=experiments/configs/yelp.py \
    --workdir=runs/yelp

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
