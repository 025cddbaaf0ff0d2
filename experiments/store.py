"""Stores interactions for jobs that read them from disk: those of a file,

  python -m experiments.store --input=my.parquet --output=DIR

or of as many drawn users as wanted, chunk by chunk:

  python -m experiments.store --users=10_000_000 --items=1_000_000 \\
    --interactions=300_000_000 --output=DIR

--input is a file or a directory of Parquet files; its columns are found as by
`pin_jax.data.files`, or named by --user, --item, --time. Users with fewer
than three interactions, which leave-one-out cannot use, are left out.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments.commands import launch
from pin_jax import disk
from pin_jax.data import files, stored
from pin_jax.data.crowd import Crowd
from pin_jax.types import InputError

_ROLES = "user", "item", "time"
_SIZES = "users", "items", "interactions"


def main(_: Sequence[str]) -> None:
  """Reads or draws, sorts and stores."""
  values = flags.FLAGS
  disk.check_new(values.output)
  if values.input is None:
    sizes = {f"num_{name}": values[name].value for name in _SIZES}
    if None in sizes.values():
      raise InputError(
        "--input is missing; give a file to read, or the numbers of --users, "
        "--items and --interactions to draw"
      )
    write_crowd(Crowd(**sizes, seed=values.seed), values.output)
  else:
    stored.write(files.read(
      values.input, min_length=values.min_length, k_core=values.k_core,
      **{role: values[role].value for role in _ROLES},
    ), values.output)
  data = stored.read(values.output)
  print(
    f"{values.output}: {data.num_users:,} users, {data.num_items:,} items, "
    f"{data.num_interactions:,} interactions, the longest history "
    f"{int(data.lengths.max()):,}; fingerprint {data.fingerprint}"
  )


def write_crowd(drawn: Crowd, path: str) -> None:
  """Draws and stores a crowd, in the memory of a chunk and of U lengths."""
  stored.write_chunks(
    path, lengths=drawn.lengths,
    items=(drawn.chunk(index) for index in range(drawn.num_chunks)),
    user_ids=np.arange(drawn.num_users),
    item_ids=np.arange(1, drawn.num_items + 1), name="crowd",
    notes={"order": "as simulated", "seed": drawn.seed},
  )


if __name__ == "__main__":
  flags.DEFINE_string("input", None, "file or directory to read")
  flags.DEFINE_string("output", None, "directory to make", required=True)
  for role in _ROLES:
    flags.DEFINE_string(role, None, f"name of the {role} column")
  flags.DEFINE_integer(
    "min_length", 3, "users with fewer interactions are left out"
  )
  flags.DEFINE_integer(
    "k_core", 0, "users and items with fewer interactions are left out"
  )
  for name in _SIZES:
    flags.DEFINE_integer(name, None, f"number of {name} to draw")
  flags.DEFINE_integer("seed", 0, "of all draws", lower_bound=0)
  launch(main)
