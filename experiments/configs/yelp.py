"""Yelp (the version of LLM-ESR): 15,720 users, 11,383 items.

  python -m experiments.main --config=experiments/configs/yelp.py \
    --workdir=runs/yelp

Some 12 minutes on one CPU core (base 200 CPU-seconds). Expect, history masked,
over three seeds a base of NDCG@10 .0263 (tail .027, head .025), PIN at +25 %
[+17, +35] for tail and +9 % [-5, +26] for head users, and a joint backbone with
one gate for all users at +28 % [+20, +37] and +21 % [+8, +37].

The settings are those of the Amazon sets, with fewer windows a step: histories
are longer, so that it reads as many targets. A quarter of the users have one
training interaction, which is no target; groups of as many users each would
leave the first without any. Of the weights tried on validation, those of P(d)
of interactions to the power 1/2 cost the backbone least (docs/findings.md).
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  config = base.amazon(argument, "yelp_llmesr.parquet")
  config.batch_size = 255
  config.prior.update(kind="interactions", exponent=0.5)
  config.groups.update(rule="thresholds", thresholds=(3, 5, 9, 20))
  return config
