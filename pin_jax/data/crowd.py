"""A crowd of users, as large as wanted, drawn chunk by chunk.

Where `simulator` knows every distribution of a few hundred items, of a crowd
nothing is known but its rule, by which activeness confounds here too:

    n ~ Pareto, at least 5, at most 2000, the same users whatever the chunks
    x_1 ~ p(v) with density 1 / (v + 10) over ranks v of popularity
    x_{i+1} = x_i + d + 1 (mod V) with probability 1/2, else ~ p, independent
"""

import dataclasses
import functools

import numpy as np

from pin_jax.types import InputError, at_least

SHORTEST, LONGEST = 5, 2000
STRATA = (10, 20, 50, 200)  # lengths from which the next stratum begins
FOLLOWS = 0.5
USERS_A_CHUNK = 100_000  # what memory grows with, besides U
_HEAD = 10.0  # ranks over which popularity is flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crowd:
  """Users to be drawn; a chunk is a function of the seed and its number.

  Attributes:
    num_users: U.
    num_items: V.
    num_interactions: N; the mean length N / U lies from 6 to 500.
    seed: of all draws.
  """

  num_users: int
  num_items: int
  num_interactions: int
  seed: int = 0

  def __post_init__(self) -> None:
    """Raises InputError for numbers out of range."""
    at_least(
      1, num_users=self.num_users, num_interactions=self.num_interactions
    )
    at_least(2, num_items=self.num_items)
    at_least(0, seed=self.seed)
    for name in ("num_users", "num_items"):
      if getattr(self, name) >= 2**31:
        raise InputError(
          f"{name}={getattr(self, name)} is invalid; give less than 2^31"
        )
    if not 6 <= self.num_interactions / self.num_users <= 500:
      raise InputError(
        f"num_interactions={self.num_interactions} is invalid; give 6 to 500 "
        f"times num_users={self.num_users}"
      )

  @property
  def num_chunks(self) -> int:
    """How many chunks there are."""
    return -(-self.num_users // USERS_A_CHUNK)

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

  def chunk(self, index: int) -> np.ndarray:
    """Items of the users of chunk `index`, one after another; int32 in 1..V."""
    start = index * USERS_A_CHUNK
    lengths = self.lengths[start : start + USERS_A_CHUNK].astype(np.int64)
    starts, total = np.cumsum(lengths) - lengths, int(lengths.sum())
    rng = np.random.default_rng((self.seed, 1, index))
    fresh = rng.random(total) >= FOLLOWS
    fresh[starts] = True
    last_fresh = np.maximum.accumulate(np.where(fresh, np.arange(total), 0))
    # Ranks by the inverse of the distribution function of their density.
    low, high = np.log(_HEAD), np.log(self.num_items + _HEAD)
    ranks = (np.exp(rng.uniform(low, high, total)) - _HEAD).astype(np.int64)
    ranks = np.minimum(ranks, self.num_items - 1)[last_fresh]
    step = np.searchsorted(STRATA, lengths, side="right") + 1
    run = np.arange(total) - last_fresh
    ranks = (ranks + run * np.repeat(step, lengths)) % self.num_items
    return (ranks + 1).astype(np.int32)


def _pareto(drawn: np.ndarray, exponent: float) -> np.ndarray:
  """Lengths of a Pareto distribution, from uniform numbers."""
  lengths = SHORTEST * (1 - drawn) ** (-1 / exponent)
  return np.minimum(lengths, LONGEST).astype(np.int32)
