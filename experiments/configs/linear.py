"""Item-to-item models alone, untrained: which of them, and how strong a ridge.

  python -m experiments.sweep --config=experiments/configs/linear.py \
    --workdir=runs/linear
  python -m experiments.sweep --workdir=runs/linear --table --beside=runs/toys

On Toys. Each is the row 'memory alone': the transition memory and, by the
settings, relations of items. The table shows them beside the trained base of a
finished job with the same seeds.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import toys


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  config = toys.get_config(argument)
  config.methods, config.seeds = ("memory_alone",), (0, 1, 2)
  # They have no use for the backbone that stage 2 is handed.
  config.backbone_steps = config.plugin_steps = 1
  return config


def sweep() -> list[dict[str, Any]]:
  """Lists the settings."""
  relations = [
    (), ("linear",), ("cosine", "two_step", "linear"),
    ("cosine", "two_step", "linear", "next"), ("linear", "next"),
  ]
  return [
    *({"memory.relations": names} for names in relations),
    *(
      {"memory.relations": ("next",), "memory.next_ridge": ridge}
      for ridge in (100.0, 30.0)
    ),
  ]
