"""Your own interactions: CSV, TSV, Parquet or a RecBole .inter file.

  python -m experiments.main \
    --config=experiments/configs/files.py:path=my.csv --workdir=runs/mine

Arguments besides path: user, item, time (column names, guessed where absent)
and separator. Anything else as --config.data.k_core=5 and the like. Sizes
follow from the data, read here once for that, see `fit_sizes`; set any of them
as --config.backbone.length=50.
"""

import json
import subprocess
import sys

import numpy as np
from ml_collections import ConfigDict

from experiments.configs import base
from pin_jax.types import InputError

EPOCHS = 40
POSITIONS = 4000  # real ones in a batch, about


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE[,user=…,item=…,time=…]."""
  values = base.parse(
    argument, path="", user="", item="", time="", separator=""
  )
  if not values["path"]:
    raise InputError(
      "files.py needs a path; give --config=experiments/configs/files.py:"
      "path=my.csv"
    )
  config = base.default()
  config.data = base.files_section(values.pop("path"), **values)
  found = _look(config.data.to_dict())
  if found:
    fit_sizes(config, *found)
  return config


def _look(data: dict) -> tuple[np.ndarray, int] | None:
  """(interactions of every user, number of items), or None for a bad file.

  Read by a process of its own: this one may yet divide, before which it must
  start no threads. What is wrong with a file the job will say.
  """
  done = subprocess.run(
    [sys.executable, "-m", "experiments.configs.files", json.dumps(data)],
    capture_output=True, text=True, check=False,
  )
  if done.returncode:
    return None
  lengths, users, num_items = json.loads(done.stdout.splitlines()[-1])
  return np.repeat(lengths, users), num_items


def fit_sizes(
  config: ConfigDict, counts: np.ndarray, num_items: int
) -> None:
  """Chooses sizes that suit the data; ours, by rule of thumb.

  The window holds the whole history of nine users out of ten (8 to 200 items);
  a batch about 4,000 targets; training 40 passes over the data, 500 to 5,000
  steps, a fifth of them in stage 2. Histories that fill less than half of
  their windows are packed; from 20,000 items on the softmax is sampled. Where
  the least active group would have no training target (one training interaction
  is none), groups hold as many interactions each instead of as many users.

  Args:
    config: changed in place.
    counts: [U] interactions of every user, held-out ones included.
    num_items: V.
  """
  most = float(np.quantile(counts, 0.9, method="lower"))
  length = int(np.clip(8 * np.ceil(most / 8), 8, 200))
  read = float(np.minimum(counts, length).mean())
  groups = config.groups.num_groups
  per_group = int(np.clip(POSITIONS / read / groups, 10, 100))
  config.backbone.update(
    length=length, dropout=0.4 if np.median(counts) < 20 else 0.2,
    pack_rows=8 if read < length / 2 else 0,
  )
  config.memory.recent = min(config.memory.recent, length)
  config.batch_size = per_group * groups
  windows = np.ceil(counts / length).sum()
  steps = int(np.clip(EPOCHS * windows / config.batch_size, 500, 5000))
  config.plugin_steps = steps // 500 * 100
  config.backbone_steps = steps // 100 * 100 - config.plugin_steps
  config.validation.every = max(100, steps // 1500 * 100)
  training = counts[counts > 2] - 2
  if len(training) and np.quantile(training, 1 / groups, method="higher") < 2:
    config.groups.rule = "interactions"
  if num_items >= 20_000:
    config.loss.update(name="sampled_softmax", negatives=2048)


def _tell(data: dict) -> None:
  """Prints lengths of histories, users of each length and the items, as JSON.
  """
  from experiments import settings

  found, _ = settings.load_data(ConfigDict(data))
  lengths = np.unique(np.diff(found.offsets), return_counts=True)
  print(json.dumps([*(x.tolist() for x in lengths), found.num_items]))


if __name__ == "__main__":
  _tell(json.loads(sys.argv[1]))
