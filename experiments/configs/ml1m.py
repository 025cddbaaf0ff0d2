"""MovieLens-1M: 6,040 users, 3,706 items, 1,000,209 ratings.

  python -m experiments.main --config=ml1m \
    --workdir=runs/ml1m

Some 13 minutes on one CPU core (base 225 CPU-seconds);
results: docs/findings.md.

The gate reads the transition memory alone, its other settings are those of the
Amazon sets, taken over without a search. With relations as there it has .1565
on validation for .1534 (one gate on PIN's backbone, seed 0; not run over three
seeds). A window of 200 makes a stronger base (.173; see docs/findings.md).

With windows of 5, 10, 20 and 50, which hide activeness more or less:
  python -m experiments.sweep --config=ml1m \
    --workdir=runs/windows
  python -m experiments.report runs/windows/* --output=runs/windows-report
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE, source=tfds, recipe=…"""
  config, recipe = base.movielens(
    argument, "ml-1m.parquet", "movielens/1m", "gated"
  )
  config.backbone.update(length=50, dropout=0.2, pack_rows=8)
  config.batch_size = 65
  config.joint.draw = "users"
  config.backbone_steps, config.plugin_steps = 3000, 300
  config.optimizer.learning_rate = 1.5e-3
  config.validation.every = 500
  base.recipe(config, recipe, {"memory.relations": ()})
  return config


def sweep() -> list[dict[str, Any]]:
  """Lists the window lengths, with as many behaviours a step."""
  return [
    {
      "backbone.length": length, "batch_size": batch_size,
      "backbone.pack_rows": pack_rows, "memory.recent": min(length, 10),
      "methods": ("base", "joint_shared", "pin_backbone", "pin"),
    }
    for length, batch_size, pack_rows in (
      (5, 650, 80), (10, 325, 8), (20, 165, 8), (50, 65, 8)
    )
  ]
