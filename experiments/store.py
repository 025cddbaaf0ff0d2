"""Stores the interactions of a file for jobs that read them from disk.

  python -m experiments.store --input=my.parquet --output=DIR

--input is a file or a directory of Parquet files; its columns are found as by
`pin_jax.datasets.files`, or named by --user, --item, --time. Users with fewer
than three interactions, which leave-one-out cannot use, are left out.
"""

from collections.abc import Sequence

from absl import flags

from experiments.commands import launch
from pin_jax.datasets import files, stored

_INPUT = flags.DEFINE_string("input", None, "File or directory to read.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to make.")
_COLUMNS = {
  role: flags.DEFINE_string(role, None, f"Name of the {role} column.")
  for role in ("user", "item", "time")
}
_MIN_LENGTH = flags.DEFINE_integer(
  "min_length", 3, "Users with fewer interactions are left out."
)
_K_CORE = flags.DEFINE_integer(
  "k_core", 0, "Users and items with fewer interactions are left out."
)
flags.mark_flags_as_required(["input", "output"])


def main(_: Sequence[str]) -> None:
  """Reads, sorts and stores."""
  data = files.read(
    _INPUT.value, min_length=_MIN_LENGTH.value, k_core=_K_CORE.value,
    **{role: flag.value for role, flag in _COLUMNS.items()},
  )
  stored.write(data, _OUTPUT.value)
  print(
    f"{_OUTPUT.value}: {data.num_users:,} users, {data.num_items:,} items, "
    f"{data.num_interactions:,} interactions; fingerprint {data.fingerprint}"
  )


if __name__ == "__main__":
  launch(main)
