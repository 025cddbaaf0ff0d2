"""Negatives: items drawn on the device, a function of a key.

A proposal says how items are drawn and how often each is expected, which is
what corrects the softmax (logQ). Padding is never drawn; draws of a row's own
target are masked by `objectives.next_item_loss`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from pin_jax.data.batches import Draw, target_chances
from pin_jax.data.splits import Split
from pin_jax.types import Batch

Shape = tuple[int, ...]


class Negatives(NamedTuple):
  """The drawn items.

  Attributes:
    items: [C], shared by all rows of a batch, or [M, C]; 0 = none.
    log_counts: of the same shape, log of the number of times that the item is
      expected among the C draws.
  """

  items: jax.Array
  log_counts: jax.Array


class Proposal(NamedTuple):
  """A distribution to draw from, as two pure functions.

  Attributes:
    sample: (key, batch [B], shape [..., C]) -> items of that shape.
    log_counts: (items, batch [B], C) -> log of the expected number of draws of
      each item, of the same shape; -inf for an item that is never drawn.
  """

  sample: Callable[[jax.Array, Batch, Shape], jax.Array]
  log_counts: Callable[[jax.Array, Batch, int], jax.Array]


def uniform(num_items: int) -> Proposal:
  """q(v) = 1 / V over the items 1..V."""

  def sample(key: jax.Array, batch: Batch, shape: Shape) -> jax.Array:
    return jax.random.randint(key, shape, 1, num_items + 1)

  def log_counts(items: jax.Array, batch: Batch, count: int) -> jax.Array:
    return jnp.full(items.shape, math.log(count / num_items), jnp.float32)

  return Proposal(sample, log_counts)


def popularity(counts: ArrayLike, exponent: float = 1.0) -> Proposal:
  """q(v) proportional to count_v^a, by inverting the distribution function.

  The function is held in units of 2^-32, so that the q of the correction is
  the q that is drawn from, to the last digit; O(log V) a draw. An item that
  does not occur in training is never drawn (but with a = 0).

  Arguments are those of `unit_widths`.
  """
  widths = unit_widths(counts, exponent)
  ends = np.cumsum(widths)
  last = int(np.flatnonzero(widths)[-1])
  # An end of 2^32 is one unit too low here; `last` makes up for it.
  ends = jnp.asarray(np.minimum(ends, 2**32 - 1).astype(np.uint32))
  with np.errstate(divide="ignore"):
    logs = np.log(np.concatenate([[0], widths]) / 2**32)
  log_q = jnp.asarray(logs, jnp.float32)

  def sample(key: jax.Array, batch: Batch, shape: Shape) -> jax.Array:
    bits = jax.random.bits(key, shape, jnp.uint32)
    index = jnp.searchsorted(ends, bits, side="right").astype(jnp.int32)
    return 1 + jnp.minimum(index, last)

  def log_counts(items: jax.Array, batch: Batch, count: int) -> jax.Array:
    return math.log(count) + log_q[items]

  return Proposal(sample, log_counts)


def unit_widths(counts: ArrayLike, exponent: float = 1.0) -> np.ndarray:
  """Shares of the items in units of 2^-32: whole numbers that sum to 2^32.

  An item with a count has one unit, and of the rest in proportion to
  max(count^a - one unit, 0), to within one unit.

  Args:
    counts: [V+1], finite and >= 0, some of them positive; the first is ignored.
    exponent: a, finite and >= 0.

  Returns:
    [V] int64, 0 for an item that is never drawn.
  """
  counts = np.asarray(counts, np.float64)[1:]
  mass = (counts / counts.max()) ** exponent
  one = (counts > 0) | (mass > 0)
  more = np.maximum(mass * (2**32 / mass.sum()) - 1, 0)
  whole = np.cumsum(more)  # divided first, so that the end is exact
  whole = np.floor(whole / whole[-1] * (2**32 - one.sum()))
  return np.diff(whole, prepend=0).astype(np.int64) + one


def in_batch(counts: ArrayLike, groups: ArrayLike) -> Proposal:
  """Draws from the batch's own targets, with replacement.

  A draw hits the row's own position with chance 1 / n, n the number of targets
  in the batch, and else another position, whose target follows the batch's
  distribution q: n_v = C (1 - 1/n) q(v). A group's batch has its group's q;
  correcting it by the q of all users would take from the model what makes the
  groups differ.

  Args:
    counts: [G, V+1], how often an item is expected among the targets of the
      batches of each group, in any unit; see `batch_counts`.
    groups: [U], the group whose batches hold a user.

  The batches must be of one group each.

  Reference: Yi et al., RecSys 2019. Deviation: C of the targets are drawn, not
    all taken; q is counted beforehand, not estimated while training. The
    positions of one window are not independent; q is the distribution of each.
  """
  counts = np.asarray(counts, np.float64)
  with np.errstate(divide="ignore"):
    logs = np.log(counts / np.maximum(counts.sum(1, keepdims=True), 1e-300))
  log_q = jnp.asarray(logs, jnp.float32)
  groups = jnp.asarray(groups, jnp.int32)

  def sample(key: jax.Array, batch: Batch, shape: Shape) -> jax.Array:
    targets = batch.targets.reshape(-1)
    real_first = jnp.argsort(targets == 0, stable=True)
    last = jnp.maximum((targets > 0).sum(), 1)
    return targets[real_first[jax.random.randint(key, shape, 0, last)]]

  def log_counts(items: jax.Array, batch: Batch, count: int) -> jax.Array:
    real = jnp.maximum((batch.targets > 0).sum(), 2)
    own = log_q[groups[batch.users[0]]]
    return math.log(count) + jnp.log1p(-1 / real) + own[items]

  return Proposal(sample, log_counts)


def mixture(parts: Sequence[tuple[float, Proposal]]) -> Proposal:
  """Gives each proposal a fixed part of the C draws: n_v = sum_k n_kv.

  The expected number under all of them (the balance heuristic) keeps the
  normaliser unbiased and its weights bounded where one proposal is.

  Args:
    parts: (share > 0, proposal), at least one; shares are normalised, and the C
      draws rounded to them.

  Reference: Veach & Guibas, SIGGRAPH 1995 (the weights); Yang et al., WWW 2020
    (batch and uniform negatives mixed).
  """
  shares = [share for share, _ in parts]
  borders = np.cumsum([0, *shares]) / np.sum(shares)

  def sizes(count: int) -> list[int]:
    return np.diff(np.rint(borders * count)).astype(int).tolist()

  def sample(key: jax.Array, batch: Batch, shape: Shape) -> jax.Array:
    keys = jax.random.split(key, len(parts))
    drawn = [
      proposal.sample(k, batch, (*shape[:-1], size))
      for k, size, (_, proposal) in zip(
        keys, sizes(shape[-1]), parts, strict=True
      )
      if size
    ]
    return jnp.concatenate(drawn, axis=-1)

  def log_counts(items: jax.Array, batch: Batch, count: int) -> jax.Array:
    logs = [
      proposal.log_counts(items, batch, size)
      for size, (_, proposal) in zip(sizes(count), parts, strict=True)
      if size
    ]
    return jax.nn.logsumexp(jnp.stack(logs), axis=0)

  return Proposal(sample, log_counts)


def batch_counts(
  split: Split, groups: np.ndarray, num_groups: int, draw: Draw
) -> np.ndarray:
  """How often an item is expected among the targets of each group's batches.

  Args:
    split: holds the targets.
    groups: [U] group of each user; -1 leaves the user out.
    num_groups: G.
    draw: how the batches are drawn.

  Returns:
    [G, V+1] float64, in any unit.
  """
  data = split.interactions
  if draw.draw == "validation":  # the held-out targets, all alike
    users = np.flatnonzero((split.validation >= 0) & (groups >= 0))
    rows = data.offsets[:-1][users] + split.validation[users]
    chances = np.ones(len(rows))
  else:
    rows, users, chances = target_chances(
      split, length=draw.length, draw=draw.draw
    )
  items, groups = np.asarray(data.items[rows]), np.asarray(groups)[users]
  return np.stack([
    np.bincount(items[own], chances[own], data.num_items + 1)
    for own in (groups == g for g in range(num_groups))
  ])
