"""Stateless samplers: the batch of step t follows from (seed, t), on device.

A user with n training interactions has n - 1 training targets (the first
interaction has no history). They are tiled by K = ceil((n - 1) / L) windows
of L targets; a random offset below the slack K L - (n - 1) shifts the tiling,
so that every target lies in exactly one window, whatever the offset.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.data.splits import Split, is_training
from pin_jax.data.stored import Stored
from pin_jax.types import Batch, InputError, PluginContext, at_least

DRAWS = ("interactions", "users")


class Sequences(NamedTuple):
  """The interactions, compact; on the device, or yet on the host.

  Attributes:
    items: [N] int32, users contiguous.
    starts: [U] int32, a user's first index into `items`.
    targets: [U] int32, number of training targets.
  """

  items: jax.Array
  starts: jax.Array
  targets: jax.Array


class Pool(NamedTuple):
  """The users to draw from, sorted by group.

  Attributes:
    users: [P] int32.
    targets: [P] int32, how many targets each of them has.
    group_starts: [G+1] int32, borders of the groups in `users`.
    window_starts: [P+1] int32, windows before each user of the pool.
  """

  users: jax.Array
  targets: jax.Array
  group_starts: jax.Array
  window_starts: jax.Array


def training_targets(split: Split) -> np.ndarray:
  """Number of training targets of every user, max(train_end - 1, 0); [U]."""
  return np.maximum(np.asarray(split.train_end, np.int64) - 1, 0)


def host_sequences(split: Split) -> Sequences:
  """A split's interactions on the host, or on disk where they are `Stored`.

  Raises:
    InputError: if there are 2^31 interactions or more (int32 offsets) that a
      device is to hold.
  """
  interactions = split.interactions
  streamed = isinstance(interactions, Stored)
  if not streamed and interactions.num_interactions >= 2**31:
    raise InputError(
      f"{interactions.num_interactions} interactions exceed int32 offsets; "
      "split the data"
    )
  targets = training_targets(split).astype(np.int32)
  if streamed:
    return Sequences(interactions.items, interactions.offsets[:-1], targets)
  return Sequences(
    np.asarray(interactions.items, np.int32),
    interactions.offsets[:-1].astype(np.int32), targets,
  )


def make_sequences(split: Split) -> Sequences:
  """The same on the device."""
  return jax.tree.map(jnp.asarray, host_sequences(split))


def make_pool(
  targets: np.ndarray, groups: np.ndarray, *, num_groups: int, length: int
) -> Pool:
  """The users of every group that have a training target.

  Args:
    targets: [U], training targets of each user.
    groups: [U], group of each user; -1 leaves the user out.
    num_groups: G.
    length: L, targets a window.

  Raises:
    InputError: if a group has no user with a training target, for other groups,
      or for more windows than int32 counts.
  """
  at_least(1, num_groups=num_groups, length=length)
  targets = np.asarray(targets)
  users, borders = _by_group(
    np.where(targets > 0, groups, -1), num_groups, "two training interactions; "
    "lower num_groups or change the rule of the groups",
  )
  counts = targets[users]
  windows = -(-counts // length)
  starts = np.concatenate([[0], np.cumsum(windows, dtype=np.int64)])
  if starts[-1] >= 2**31:
    raise InputError(
      f"length={length} makes {starts[-1]} windows, beyond int32; give a "
      "longer one, or fewer users"
    )
  arrays = users, counts, borders, starts
  return Pool(*(jnp.asarray(x, jnp.int32) for x in arrays))


def _by_group(
  groups: np.ndarray, num_groups: int, needed: str
) -> tuple[np.ndarray, np.ndarray]:
  """(users by group, where each group begins [G+1]); group -1 is left out."""
  if groups.size and not -1 <= groups.min() <= groups.max() < num_groups:
    raise InputError(
      f"groups span {groups.min()}..{groups.max()}; give -1..{num_groups - 1}"
    )
  kept = np.flatnonzero(groups >= 0)
  users = kept[np.argsort(groups[kept], kind="stable")]
  sizes = np.bincount(groups[users], minlength=num_groups)
  if (sizes == 0).any():
    raise InputError(
      f"group {int(np.argmin(sizes))} of {num_groups} has no user with {needed}"
    )
  return users, np.concatenate([[0], np.cumsum(sizes)])


def training_activeness(sequences: Sequences, users: jax.Array) -> jax.Array:
  """Training interactions of users, 1 for none; int32, whatever is read."""
  return sequences.targets[users] + 1


class HeldOut(NamedTuple):
  """Users by group, each with one held-out target.

  Attributes:
    users: [n] int32 user indices, by group.
    group_starts: [G+1] int32, where each group begins in `users`.
    positions: [U] int32, in-user position of the target.
  """

  users: jax.Array
  group_starts: jax.Array
  positions: jax.Array


def make_held_out(
  positions: np.ndarray, groups: np.ndarray, *, num_groups: int
) -> HeldOut:
  """The users of every group that have a held-out target.

  Args:
    positions: [U], position of the target; -1 = none.
    groups: [U], group of each user; -1 leaves the user out.
    num_groups: G.

  Raises:
    InputError: if a group has no user with a held-out target.
  """
  users, starts = _by_group(
    np.where(np.asarray(positions) >= 0, groups, -1), num_groups,
    "a validation target; give the group some or hold more out",
  )
  arrays = users, starts, positions
  return HeldOut(*(jnp.asarray(x, jnp.int32) for x in arrays))


class Windows(NamedTuple):
  """Which windows a batch has; leading axes [...].

  Attributes:
    users: int32 user indices.
    first: int32 index of the window's first target, may be negative.
    count: int32 number of the user's targets.
    only_last: bool, whether it has but the last of its targets.
  """

  users: jax.Array
  first: jax.Array
  count: jax.Array
  only_last: jax.Array


class Draw(NamedTuple):
  """How a batch is drawn, and how its positions count.

  'interactions' draws windows uniformly: with the mean over positions a group's
  loss estimates the mean over its interactions. 'users' draws users uniformly,
  then the window of a uniform target of theirs: with the mean over users the
  loss is the mean over users of their mean loss. 'validation' draws users
  uniformly, with the history before their held-out target and that target
  alone, in the last column. All draw with replacement.

  Attributes:
    batch_size: B, windows a group (or segment).
    length: L.
    draw: 'interactions' or 'users', from a Pool; or 'validation', from a
      HeldOut.
    mean: 'interactions' or 'users', see `objectives.position_weights`.
  """

  batch_size: int
  length: int
  draw: str = "interactions"
  mean: str = "interactions"

  def windows(self, key: jax.Array, pool: Pool | HeldOut) -> Windows:
    """Which windows a key's batch has, [G, B].

    Raises:
      InputError: for an unknown `draw`.
    """
    if self.draw not in (*DRAWS, "validation"):
      raise InputError(f"draw={self.draw!r} is unknown; use one of {DRAWS}")
    first, last = pool.group_starts[:-1, None], pool.group_starts[1:, None]
    shape = (len(first), self.batch_size)
    if self.draw == "validation":
      users = pool.users[jax.random.randint(key, shape, first, last)]
      count = pool.positions[users]
      return Windows(users, count - self.length, count, jnp.ones(shape, bool))
    pick_key, inner_key, offset_key = jax.random.split(key, 3)
    if self.draw == "users":
      index = jax.random.randint(pick_key, shape, first, last)
    else:
      starts = pool.window_starts
      window = jax.random.randint(pick_key, shape, starts[first], starts[last])
      index = jnp.searchsorted(starts, window, side="right") - 1
    users, count = pool.users[index], pool.targets[index]
    slack = -count % self.length
    offset = jax.random.randint(offset_key, shape, 0, slack + 1)
    if self.draw == "users":
      target = jax.random.randint(inner_key, shape, 0, count)
      tile = (target + offset) // self.length
    else:
      tile = window - starts[index]
    first = tile * self.length - offset
    return Windows(users, first, count, jnp.zeros(shape, bool))

  def batch(
    self, key: jax.Array, sequences: Sequences, pool: Pool | HeldOut
  ) -> Batch:
    """The batch of a step's key, leading axes [G, B]."""
    return cut_windows(sequences, self.windows(key, pool), length=self.length)


def target_chances(
  split: Split, *, length: int, draw: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """How often each training target is expected in a window of `Draw`.

  Windows by 'interactions' hold every target alike. The window of a uniform
  target of a user's n, drawn by 'users', holds target i = 0 .. n-1 with the
  chance E[size of the window around i] / n. With the slack s and
  T(m) = 1 + .. + m that size is

    L - (T(min(s, L-1-i)) + T(min(s, L-1-(n-1-i)))) / (s + 1)

  since an offset below s + 1 cuts what the first and the last window lose.

  Args:
    split: holds the targets.
    length: L.
    draw: 'interactions' or 'users'.

  Returns:
    of all training targets, [T] each: their index into the interactions, their
    user, and the chance, in a unit that is the same for all.
  """
  rows = np.flatnonzero(is_training(split, skip=1))
  starts = split.interactions.offsets[:-1]
  users = np.searchsorted(starts, rows, side="right") - 1
  if draw == "interactions":
    return rows, users, np.ones(len(rows))
  count = training_targets(split)[users]
  slack = -count % length
  lost = 0
  before = rows - starts[users] - 1
  for place in (before, count - 1 - before):
    most = np.clip(length - 1 - place, 0, slack)
    lost = lost + most * (most + 1) / 2
  return rows, users, (length - lost / (slack + 1)) / count


def cut_windows(
  sequences: Sequences, windows: Windows, *, length: int
) -> Batch:
  """Cuts the targets first .. first + L - 1 that exist, right-aligned.

  The windows [...] are where the interactions are, on the device or on the
  host; the batch has the same leading axes.
  """
  users, first, count, only_last = windows
  last = (first + length).clip(max=count) - 1
  begin = first.clip(min=0)
  history, _ = last_items(sequences, users, last + 1, length, begin=begin)
  begin = begin + only_last * (last - begin).clip(min=0)
  targets, _ = last_items(sequences, users, last + 2, length, begin=begin + 1)
  return Batch(
    users, history, targets, last, training_activeness(sequences, users)
  )


def last_items(
  sequences: Sequences, users: jax.Array, end: jax.Array, length: int, *,
  begin: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
  """The last `length` items before a position of a user's history.

  Args:
    sequences: the interactions, on the device or on the host.
    users: [...] user indices, in the same place.
    end: [...] in-user position behind the last item; may be 0 or less.
    length: L.
    begin: [...] in-user position of the first item that counts.

  Returns:
    [..., L] items, right-aligned, 0 = none, and the index of each among all
    interactions.
  """
  xp = end.__array_namespace__()
  place = end[..., None] - xp.arange(length, 0, -1)
  index = sequences.starts[users][..., None] + place.clip(min=0)
  real = place >= xp.asarray(begin)[..., None]
  return xp.where(real, sequences.items[index], 0), index


def read_back(
  sequences: Sequences, users: jax.Array, last: jax.Array, count: int
) -> PluginContext:
  """The `count` items up to in-user position `last`, the newest first; [...].
  """
  items, index = last_items(sequences, users, last + 1, count)
  return PluginContext(users, items[..., ::-1], index[..., ::-1])
