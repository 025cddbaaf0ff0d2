"""Every rule and reweighting on Amazon Beauty, tuned in as many trials each.

  python -m experiments.sweep --config=rules \
    --workdir=runs/rules --parallel=2

A small SASRec (width 64), so that all of them can be tried: each at two
learning rates. At 2e-3 every one of them was worse on validation than at 4e-3.
What the rules have of their own stays as published.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments import methods
from experiments.configs import beauty


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  config = beauty.get_config(argument)
  config.backbone.width = 64
  config.methods = (
    "base", "user_uniform", "tail_only", "head_only", "fine_tuned", "focal",
    "base_activeness", *methods.RULES, "pin_backbone", "pin_exact_backbone",
    "joint_shared", "pin_exact", "pin",
  )
  return config


def sweep() -> list[dict[str, Any]]:
  """Lists the trials."""
  return [{"optimizer.learning_rate": rate} for rate in (4e-3, 8e-3)]
