"""Item-to-item models alone, untrained: which of them, and how strong a ridge.

  python -m experiments.sweep --config=linear \
    --workdir=runs/linear

On Toys. Each is the row 'memory alone': the transition memory and, by the
settings, relations of items, beside the trained base, which the jobs share.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import toys


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  config = toys.get_config(argument)
  config.methods, config.seeds = ("base", "memory_alone"), (0, 1, 2)
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
