"""Your own interactions: CSV or other text, JSON lines, Parquet.

  python -m experiments.main --config=files:path=my.csv --workdir=runs/mine

Compares what is worth serving, and says what to serve to whom. Arguments
besides path: recipe=published or recipe=gated, for other rows (`base.recipe`);
user, item, time (columns by name or number, guessed where absent) and
separator. Anything else as --config.data.k_core=5 and the like. Sizes follow
from the data and are printed, see `experiments.sizes`; set any of them as
--config.backbone.length=50.
"""

from ml_collections import ConfigDict

from experiments import sizes
from experiments.configs import base
from pin_jax.types import InputError


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE[,recipe=…,user=…,…]."""
  values = base.parse(
    argument, path="", user="", item="", time="", separator="", recipe="answer"
  )
  if not values["path"]:
    raise InputError(
      "files needs a path; give --config=files:path=my.csv"
    )
  config = base.default()
  config.data = base.data_section("files", **values)
  base.leave_to_data(config, sizes.KEYS)
  base.recipe(config, values["recipe"])
  return config
