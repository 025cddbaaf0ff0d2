"""Evaluation that does not fit into memory goes on with smaller chunks."""

from collections.abc import Callable
from typing import Any

import jax

from pin_jax.types import TrainingError

_FULL = "RESOURCE_EXHAUSTED"


def smaller_where_full(
  build: Callable[[int], Callable[..., Any]],
  chunk: int,
  *,
  say: Callable[[str], None] = lambda line: None,
) -> Callable[..., Any]:
  """A function built for chunks of a size that shrinks where memory is full.

  Args:
    build: users a chunk -> the function.
    chunk: users a chunk to begin with.
    say: takes a line for each time it is halved.

  Returns:
    The function of the largest chunk that fits; what fitted once is kept.

  Raises:
    TrainingError: (the function) if one user at a time does not fit.
  """
  size, run = chunk, build(chunk)

  def halved(*args: Any) -> Any:
    nonlocal size, run
    while True:
      try:
        return run(*args)
      except jax.errors.JaxRuntimeError as error:
        if _FULL not in str(error):
          raise
        if size == 1:
          raise TrainingError(
            "evaluation of one user at a time does not fit into memory; lower "
            "evaluation.item_chunk"
          ) from error
      size = max(size // 2, 1)
      say(f"evaluation does not fit into memory; user_chunk is now {size}")
      run = build(size)

  return halved
