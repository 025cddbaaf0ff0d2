"""Stores the interactions of a file for jobs that read them from disk.

  python -m experiments.store --input=my.parquet --output=DIR

--input is a file or a directory of Parquet files; its columns are found as by
`pin_jax.data.files`, or named by --user, --item, --time. Users with fewer
than three interactions, which leave-one-out cannot use, are left out.
"""

from collections.abc import Sequence

from absl import flags

from experiments.commands import launch
from pin_jax import disk
from pin_jax.data import files, stored

_ROLES = "user", "item", "time"


def main(_: Sequence[str]) -> None:
  """Reads, sorts and stores."""
  values = flags.FLAGS
  disk.check_new(values.output)
  data = files.read(
    values.input, min_length=values.min_length, k_core=values.k_core,
    **{role: values[role].value for role in _ROLES},
  )
  stored.write(data, values.output)
  print(
    f"{values.output}: {data.num_users:,} users, {data.num_items:,} items, "
    f"{data.num_interactions:,} interactions; fingerprint {data.fingerprint}"
  )


def _launch() -> None:
  flags.DEFINE_string("input", None, "file or directory to read", required=True)
  flags.DEFINE_string("output", None, "directory to make", required=True)
  for role in _ROLES:
    flags.DEFINE_string(role, None, f"name of the {role} column")
  flags.DEFINE_integer(
    "min_length", 3, "users with fewer interactions are left out"
  )
  flags.DEFINE_integer(
    "k_core", 0, "users and items with fewer interactions are left out"
  )
  launch(main)


if __name__ == "__main__":
  _launch()
