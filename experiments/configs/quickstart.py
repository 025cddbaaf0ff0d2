"""The embedded default: simulated users whose activeness confounds choice.

  python -m experiments.main --config=experiments/configs/quickstart.py \
    --workdir=runs/quickstart

The groups are the simulator's strata, so every exact distribution is known.
"""

from ml_collections import ConfigDict

from experiments.configs import base

_BORDERS = (5, 8, 12, 20, 40, 151)  # of the whole sequence's length


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = base.default()
  config.data = ConfigDict({
    "source": "simulator", "seed": 0, "num_users": 6000, "borders": _BORDERS,
  })
  config.groups.rule = "thresholds"
  config.groups.thresholds = tuple(b - 2 for b in _BORDERS[1:-1])
  config.backbone.update(length=32, width=32, blocks=1, dropout=0.1)
  config.plugin.hidden = 16
  config.backbone_steps, config.plugin_steps = 800, 200
  return config
