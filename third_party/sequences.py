"""Text files of other people's sequences: whole numbers, in order of time.

What the layouts of s3rec.py and llm_esr.py share: reading their lines, and
turning a file into one that experiments/configs/files.py reads.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import polars as pl
from absl import flags
from etils import epath

from experiments import commands
from pin_jax import disk
from pin_jax.data.interactions import Interactions
from pin_jax.types import InputError


def numbered_lines(path: epath.PathLike) -> Iterator[tuple[int, list[int]]]:
  """Yields (line number, ids) of every line that is not blank.

  Raises:
    InputError: if the file is absent, empty or not text, or holds what is no
      whole number from 1 on.
  """
  path = epath.Path(path).expanduser()
  if not path.is_file():
    raise InputError(f"{path} is no file; check the path")
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as error:
    raise InputError(
      f"{path} is no text ({error.reason} at byte {error.start}); name the "
      ".txt file that upstream wrote"
    ) from error
  if not any(line.strip() for line in lines):
    raise InputError(f"{path} is empty; check how it was made")
  for number, line in enumerate(lines, 1):
    words = line.split()
    bad = [x for x in words if not (x.isascii() and x.isdigit() and int(x))]
    if bad:
      raise InputError(
        f"{path} line {number}: {bad[0]!r} is no id, a whole number from 1 on; "
        "name the file of sequences that upstream wrote"
      )
    if words:
      yield number, [int(word) for word in words]


def write(data: Interactions, path: epath.PathLike) -> None:
  """Writes columns user, item, time (positions within the user) as Parquet.

  Raises:
    InputError: if the path is no .parquet file in a directory that exists.
  """
  path = disk.place("output", path)
  if path.suffix != ".parquet" or not path.parent.is_dir():
    raise InputError(
      f"--output={path} is no .parquet file in a directory that exists; name "
      "one"
    )
  frame = pl.DataFrame({
    "user": np.repeat(data.user_ids, data.lengths),
    "item": data.item_ids[data.items - 1],
    "time": data.times,
  })
  with disk.replacing(path) as file:
    frame.write_parquet(file)


def launch(read: Callable[[str], Interactions]) -> None:
  """Entry point of a converter: FILE --output=NEW.parquet.

  Args:
    read: the reader of the layout.
  """
  flags.DEFINE_string("output", None, "Parquet file to write", required=True)

  def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
      raise InputError(f"arguments are {argv[1:]}; name one file")
    data, output = read(argv[1]), flags.FLAGS.output
    write(data, output)
    print(
      f"{output}: {data.num_users:,} users, {data.num_items:,} items, "
      f"{data.num_interactions:,} interactions; fingerprint {data.fingerprint}"
    )

  commands.launch(main, words=True)
