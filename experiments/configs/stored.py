"""Interactions stored by `experiments.store`.

  python -m experiments.main --config=stored:path=DIR \
    --workdir=runs/stored

They stay on disk and batches are read ahead of the steps, the same batches as
from the device (--config.data.stream=False).
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration."""
  config = base.default()
  path = base.parse(argument, path="stored")["path"]
  config.data = base.data_section("stored", path=path, stream=True)
  return config
