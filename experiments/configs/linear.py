"""Item-to-item models alone, untrained: which of them, and how strong a ridge.

  python -m experiments.sweep --config=experiments/configs/linear.py \
    --workdir=runs/linear
  python -m experiments.sweep --workdir=runs/linear --table --beside=runs/toys

On Toys, or with `linear.py:data=beauty` or yelp. Each is the row 'memory
alone': the transition memory and, by the settings, relations of items. The
table shows them beside the trained base of a finished job with the same seeds.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import base, beauty, toys, yelp
from pin_jax.types import InputError

DATA = {"toys": toys, "beauty": beauty, "yelp": yelp}


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: data=NAME, one of DATA."""
  name = base.parse(argument, data="toys")["data"]
  if name not in DATA:
    raise InputError(f"data={name}: give one of {list(DATA)}")
  config = DATA[name].get_config()
  config.methods, config.seeds = ("memory_alone",), (0, 1, 2)
  # They have no use for the backbone that stage 2 is handed.
  config.backbone_steps = config.plugin_steps = 1
  return config


def sweep() -> list[dict[str, Any]]:
  """Lists the settings."""
  return [
    {"memory.relations": ()},
    {"memory.relations": ("linear",)},
    {"memory.relations": ("cosine", "two_step", "linear")},
    {"memory.relations": ("cosine", "two_step", "linear", "next")},
    {"memory.relations": ("linear", "next")},
    *(
      {"memory.relations": ("next",), "memory.next_ridge": ridge}
      for ridge in (100.0, 30.0)
    ),
  ]
