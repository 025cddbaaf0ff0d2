"""A whole job that takes seconds: the config of chaos, faults and bad input.

  python -m experiments.main --config=tests/tiny.py --workdir=DIR
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = base.default()
  config.methods = ("base", "pin")
  config.data = ConfigDict({
    "source": "simulator", "seed": 0, "num_users": 80, "num_items": 30,
    "borders": (4, 6, 9, 30),
  })
  config.groups.num_groups = 3
  config.backbone.update(length=6, width=8, blocks=1, dropout=0.1)
  config.plugin.hidden = 4
  config.batch_size = 24
  config.backbone_steps, config.plugin_steps = 60, 40
  config.pin.diagnose_every = 0
  config.dispatch, config.validation.every = 5, 10
  return config
