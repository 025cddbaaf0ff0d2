"""Sequences in the layout of S3-Rec, which TADA and others read.

  python -m third_party.s3rec Beauty.txt --output=beauty.parquet

writes a file for --config=experiments/configs/files.py:path=beauty.parquet (or
beauty.py, toys.py with the same argument). A line is a user, `user item item …`
in order of time, ids from 1 on; see aHuiWang/CIKM2020-S3Rec, data/*.txt, and
KingGugu/TADA, src/utils.py. TADA leaves out users with fewer than four items;
we keep them unless --config.data.min_length=4.
"""

from typing import Any

import numpy as np
from etils import epath

from pin_jax.data.interactions import Interactions, from_columns
from pin_jax.types import InputError
from third_party import sequences

_NEGATIVES = "_sample", "_neg"  # the same layout, but no histories


def read(path: epath.PathLike, **options: Any) -> Interactions:
  """Reads a file of sequences.

  Args:
    path: such as Beauty.txt.
    **options: those of `pin_jax.data.interactions.from_columns`.

  Returns:
    The interactions, with the ids of the file; times are 0-based positions
    within the user.

  Raises:
    InputError: if the file is absent or empty, a line is no such sequence, a
      user occurs twice, or it holds upstream's sampled negatives.
  """
  path = epath.Path(path).expanduser()
  if path.stem.endswith(_NEGATIVES):
    raise InputError(
      f"{path} holds sampled negatives by its name, not histories; name the "
      "file without that ending"
    )
  first: dict[int, int] = {}
  histories = []
  for number, (user, *items) in sequences.numbered_lines(path):
    if not items:
      raise InputError(
        f"{path} line {number}: user {user} has no items; a line is a user "
        "and all items, so remove it or read the file as another layout"
      )
    if user in first:
      raise InputError(
        f"{path} line {number}: user {user} has line {first[user]} already; "
        "join them, or read the file with third_party.llm_esr"
      )
    first[user] = number
    histories.append(items)
  counts = [len(items) for items in histories]
  return from_columns(
    np.repeat(np.fromiter(first, np.int64), counts),
    np.concatenate(histories),
    np.concatenate([np.arange(count) for count in counts]),
    **{"name": path.stem, **options},
  )


if __name__ == "__main__":
  sequences.launch(read)
