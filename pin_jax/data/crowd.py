"""A crowd of users, as large as wanted, drawn chunk by chunk.

Where `simulator` knows every distribution of a few hundred items, a crowd has
the sizes, the long tails and an order to learn, and nothing else is known of
it. Activeness D confounds here too, by the rule that a stratum follows:

    n ~ Pareto, at least 5, at most 2000, the same users whatever the chunks
    x_1 ~ p(v) with density 1 / (v + 10) over ranks v of popularity
    x_{i+1} = x_i + d + 1 (mod V) with probability 1/2, else ~ p, independent
"""

import functools
from typing import NamedTuple

import numpy as np

from pin_jax.types import InputError, at_least

SHORTEST, LONGEST = 5, 2000
STRATA = (10, 20, 50, 200)  # lengths from which the next stratum begins
FOLLOWS = 0.5
_HEAD = 10.0  # ranks over which popularity is flat
_FIRST_SECOND, _SECONDS = 1_600_000_000, 3600  # between two interactions


class Chunk(NamedTuple):
  """Some users and what they do, users one after another.

  Attributes:
    users: [n] int64 numbers, 0 ..
    lengths: [n] int64.
    items: [sum of lengths] int32 in 1..V.
    times: of the same shape, int64 seconds.
  """

  users: np.ndarray
  lengths: np.ndarray
  items: np.ndarray
  times: np.ndarray


class Crowd:
  """Users to be drawn; a chunk is a function of the seed and its number."""

  def __init__(
    self,
    *,
    num_users: int,
    num_items: int,
    num_interactions: int,
    seed: int = 0,
    users_a_chunk: int = 100_000,
  ) -> None:
    """Fixes how long every history is.

    Args:
      num_users: U.
      num_items: V.
      num_interactions: N; the mean length N / U lies from 6 to 500.
      seed: of all draws.
      users_a_chunk: what memory grows with, besides U.

    Raises:
      InputError: for numbers out of range.
    """
    at_least(1, num_users=num_users, users_a_chunk=users_a_chunk)
    at_least(2, num_items=num_items)
    at_least(0, seed=seed)
    for name, count in (("num_users", num_users), ("num_items", num_items)):
      if count >= 2**31:
        raise InputError(f"{name}={count} is invalid; give less than 2^31")
    at_least(1, num_interactions=num_interactions)
    if not 6 * num_users <= num_interactions <= 500 * num_users:
      raise InputError(
        f"num_interactions={num_interactions} is invalid; give 6 to 500 times "
        f"num_users={num_users}"
      )
    self.num_users, self.num_items = num_users, num_items
    self.num_interactions, self.seed = num_interactions, seed
    self._size = users_a_chunk

  @property
  def num_chunks(self) -> int:
    """How many chunks there are."""
    return -(-self.num_users // self._size)

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """[U] int32, of each user's history; their sum is N."""
    drawn = np.random.default_rng((self.seed, 0)).random(self.num_users)
    # The mean falls with the exponent: bisection.
    low, high = 0.05, 20.0
    for _ in range(40):
      exponent = (low + high) / 2
      if _pareto(drawn, exponent).sum(dtype=np.int64) < self.num_interactions:
        high = exponent
      else:
        low = exponent
    lengths = _pareto(drawn, high)
    missing = self.num_interactions - int(lengths.sum(dtype=np.int64))
    short = np.flatnonzero(lengths < LONGEST)
    each, left = divmod(missing, len(short))
    lengths[short] += each
    lengths[short[:left]] += 1
    return lengths

  def chunk(self, index: int) -> Chunk:
    """Chunk `index`, from 0."""
    users = np.arange(
      index * self._size, min((index + 1) * self._size, self.num_users)
    )
    lengths = self.lengths[users].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    rng = np.random.default_rng((self.seed, 1, index))
    place = np.arange(total) - np.repeat(starts, lengths)
    fresh = rng.random(total) >= FOLLOWS
    fresh[starts] = True
    last_fresh = np.maximum.accumulate(np.where(fresh, np.arange(total), 0))
    rank = _popular(rng, total, self.num_items)[last_fresh]
    step = np.searchsorted(STRATA, lengths, side="right") + 1
    run = np.arange(total) - last_fresh
    rank = (rank + run * np.repeat(step, lengths)) % self.num_items
    began = rng.integers(0, 10**8, len(users))
    times = _FIRST_SECOND + np.repeat(began, lengths) + _SECONDS * place
    return Chunk(users, lengths, (rank + 1).astype(np.int32), times)


def _pareto(drawn: np.ndarray, exponent: float) -> np.ndarray:
  """Lengths of a Pareto distribution, from uniform numbers."""
  lengths = SHORTEST * (1 - drawn) ** (-1 / exponent)
  return np.minimum(lengths, LONGEST).astype(np.int32)


def _popular(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
  """Ranks 0 .. size - 1 by the inverse of their distribution function."""
  low, high = np.log(_HEAD), np.log(size + _HEAD)
  ranks = np.exp(rng.uniform(low, high, count)) - _HEAD
  return np.minimum(ranks.astype(np.int64), size - 1)
