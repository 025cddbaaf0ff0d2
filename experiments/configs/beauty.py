"""Amazon Beauty 2014, 5-core: 22,363 users, 12,101 items, 198,502 reviews.

  python -m experiments.main --config=beauty \
    --workdir=runs/beauty

Some 13 minutes on one CPU core (base 210 CPU-seconds);
results: docs/findings.md.

A base of width 256 (`--config.backbone.width=256
--config.optimizer.learning_rate=2e-3`) takes three times as long and has .0698
on validation, this one .0688 (seed 0 and three seeds).

PIN with other groups, priors, blocks and borders of the segments, at width 64
and with the transition memory alone:
  python -m experiments.sweep --config=beauty \
    --workdir=runs/axes
Of these `pin.weighting=annealed_backdoor:steps=1250` has the best backbone on
validation, and is the default here.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE, recipe=… of `base`."""
  # From the joint gradient's weights to P(d), over the whole of stage 1.
  weights = {"pin.weighting": "annealed_backdoor:steps=1250"}
  return base.amazon(argument, "amazon_beauty_s3rec.parquet", weights)


def sweep() -> list[dict[str, Any]]:
  """Lists one change at a time of what PIN divides users by and weighs with."""
  common = {
    "backbone.width": 64, "optimizer.learning_rate": 2e-3,
    "memory.relations": (), "pin.weighting": "backdoor",
    "methods": ("pin_backbone", "pin"),
  }
  # Groups of as many users make P(d) of users uniform, whatever its exponent;
  # that of interactions is the joint gradient's.
  changes = [
    {"groups.num_groups": 2}, {"groups.num_groups": 10},
    {"groups.rule": "interactions"}, {"prior.kind": "interactions"},
    {"prior.kind": "interactions", "prior.exponent": 0.5},
    {"prior.kind": "interactions", "prior.exponent": 2.0},
    {"pin.blocks": ("items|bias=joint",)},  # adjusts the encoder alone
    {"pin.weighting": "annealed_backdoor:steps=1250"},  # shares to P(d)
    # Other users are tail users then, for every model.
    *(
      {
        "groups.head_share": share,
        "methods": ("base", "joint_shared", "pin_backbone", "pin"),
      }
      for share in (0.5, 0.1)
    ),
  ]
  return [common | change for change in changes]
