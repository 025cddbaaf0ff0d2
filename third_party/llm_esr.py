"""Interactions in the layout of LLM-ESR.

  python -m third_party.llm_esr data/yelp/handled/inter.txt \
    --output=yelp.parquet

writes a file for --config=experiments/configs/files.py:path=yelp.parquet (or
yelp.py with the same argument). A line is an interaction, `user item`, a user's
lines in order of time, ids from 1 on; see liuqidong07/LLM-ESR,
data/convert_inter.ipynb and generators/generator.py. Its inter_seq.txt, from
which upstream makes that file, has the layout of third_party.s3rec.
"""

from typing import Any

import numpy as np
from etils import epath

from pin_jax.data.interactions import Interactions, from_columns
from pin_jax.types import InputError
from third_party import sequences


def read(path: epath.PathLike, **options: Any) -> Interactions:
  """Reads a file of interactions.

  Args:
    path: such as inter.txt.
    **options: those of `pin_jax.data.interactions.from_columns`.

  Returns:
    The interactions, with the ids of the file; times are 0-based positions
    within the user.

  Raises:
    InputError: if the file is absent or empty, or a line is no pair of ids.
  """
  path = epath.Path(path).expanduser()
  pairs, count, times = [], {}, []
  for number, ids in sequences.numbered_lines(path):
    if len(ids) != 2:
      raise InputError(
        f"{path} line {number}: {len(ids)} numbers, not 'user item'; read "
        "sequences with third_party.s3rec"
      )
    pairs.append(ids)
    times.append(count.get(ids[0], 0))
    count[ids[0]] = times[-1] + 1
  users, items = np.array(pairs, np.int64).T
  name = path.stem
  if path.parent.name == "handled":  # data/yelp/handled/inter.txt
    name = path.parent.parent.name
  return from_columns(users, items, times, **{"name": name, **options})


if __name__ == "__main__":
  sequences.launch(read)
