"""Draws as many users as wanted, chunk by chunk, and writes them to disk.

  python -m experiments.simulate --users=10_000_000 --items=1_000_000 \
    --interactions=300_000_000 --output=DIR --format=stored

--format=parquet writes files that `pin_jax.data.files` reads, 'stored' the
form that jobs read from disk. A chunk follows from the seed and its number
alone, and memory from the chunk's size and the number of users.
"""

import io
from collections.abc import Sequence

import numpy as np
import polars as pl
from absl import flags

from experiments.commands import launch
from pin_jax import disk
from pin_jax.data import crowd, stored
from pin_jax.types import InputError


def main(_: Sequence[str]) -> None:
  """Draws and writes."""
  values = flags.FLAGS
  drawn = crowd.Crowd(
    num_users=_number("users"), num_items=_number("items"),
    num_interactions=_number("interactions"), seed=values.seed,
  )
  write = {"parquet": write_parquet, "stored": write_stored}[values.format]
  write(drawn, values.output)
  print(
    f"{values.output}: {drawn.num_users:,} users, {drawn.num_items:,} items, "
    f"{drawn.num_interactions:,} interactions, the longest history "
    f"{int(drawn.lengths.max()):,}"
  )


def _number(name: str) -> int:
  """A flag's whole number, with underscores if liked."""
  try:
    return int(flags.FLAGS[name].value)
  except ValueError:
    raise InputError(
      f"flag --{name}={flags.FLAGS[name].value}: give a whole number"
    ) from None


def write_parquet(drawn: crowd.Crowd, path: str) -> None:
  """One file a chunk, with columns user_id, item_id and timestamp.

  Raises:
    InputError: if the directory exists.
    OSError: if it cannot be written; nothing is left then.
  """
  with disk.new_directory(path) as directory:
    for index in range(drawn.num_chunks):
      chunk = drawn.chunk(index)
      table = pl.DataFrame({
        "user_id": np.repeat(chunk.users.astype(np.int32), chunk.lengths),
        "item_id": chunk.items, "timestamp": chunk.times,
      })
      buffer = io.BytesIO()  # polars has errors of its own for a full disk
      table.write_parquet(buffer)
      (directory / f"part-{index:05}.parquet").write_bytes(buffer.getvalue())


def write_stored(drawn: crowd.Crowd, path: str) -> None:
  """The form of `pin_jax.data.stored`."""
  stored.write_chunks(
    path, lengths=drawn.lengths,
    items=(drawn.chunk(index).items for index in range(drawn.num_chunks)),
    user_ids=np.arange(drawn.num_users),
    item_ids=np.arange(1, drawn.num_items + 1), name="crowd",
    notes={"order": "as simulated", "seed": drawn.seed},
  )


def _launch() -> None:
  flags.DEFINE_string("users", "10_000_000", "U")
  flags.DEFINE_string("items", "1_000_000", "V")
  flags.DEFINE_string("interactions", "300_000_000", "N")
  flags.DEFINE_integer("seed", 0, "of all draws", lower_bound=0)
  flags.DEFINE_string("output", None, "directory to make", required=True)
  flags.DEFINE_enum(
    "format", "parquet", ["parquet", "stored"], "what to write"
  )
  launch(main)


if __name__ == "__main__":
  _launch()
