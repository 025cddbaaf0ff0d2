"""A world in which activeness confounds history and next behaviour.

The structural causal model (ours, made for tests and controlled studies):

    D -> N       stratum d ~ P(d); sequence length n ~ P(n|d), disjoint ranges
    D -> X, Y    x_1 ~ pi_d, x_{i+1} ~ T_d[x_i, .], pi_d stationary under T_d
    X -> Y       the next behaviour depends on the last one, through T_d

so that the observational P(y|x), the interventional P(y|do(x)) and all that
lies between them are known exactly and a trained model can be held to them.

`World` holds float64 numpy arrays and is closed over, not passed to, a jitted
function: `jax.jit(functools.partial(observational, world, event="test"))`.
Histories are [B, L] int32, right-aligned, 0 is padding; column v-1 of every
returned distribution belongs to item v.

The distributions describe evaluation-type windows: the min(t, L) most recent
items before a target at in-user position t. A trainer that cuts sequences into
rows of several positions shows early positions of a row fewer items than that.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax import types
from pin_jax.data import interactions as interactions_lib

Event = Literal["training", "test"]
_LONGEST = 10**6  # lengths of histories
_LARGEST = 2**28  # elements of an array
_LENGTH_EXPONENT = 1.5
_POPULARITY_EXPONENT = 0.6  # 0 makes items equally popular a priori
_POPULARITY_TILT = 0.25  # how much more the inactive follow popularity


@dataclasses.dataclass(frozen=True, eq=False)
class World:
  """The exact distributions of a structural causal model; index v-1 is item v.

  Attributes:
    prior: [G] P(d), the share of users in each stratum.
    initial: [G, V] P(x_1|d), stationary under `transition`.
    transition: [G, V, V] P(y|x, d), rows sum to one.
    length_pmf: [G, N+1] P(total sequence length = n|d), n = 0..N.
  """

  prior: np.ndarray
  initial: np.ndarray
  transition: np.ndarray
  length_pmf: np.ndarray

  @property
  def num_items(self) -> int:
    """V."""
    return self.transition.shape[1]


@dataclasses.dataclass(frozen=True)
class WorldSpec:
  """What a world is drawn by; strata differ more, the larger `confounding`.

      P(d) ∝ prior_decay^d
      P(n|d) ∝ n^-1.5  for borders[d] <= n < borders[d+1]
      T_d[x, y] ∝ popularity_y^{a_d} exp(scale <u_d(x), v(y)>)
      u_d(x) = cos(θ) u(x) + sin(θ) w_d(x),  θ = confounding π/2
      a_d = 0.6 (1 + confounding c_d / 4)

  where popularity is 1/1 .. 1/V in random order, v(y) is standard normal, u(x)
  and w_d(x) are orthogonal unit vectors, and c_d falls from 1 (least active) to
  -1. The random draws do not depend on any parameter but the sizes, so a sweep
  over `confounding` changes nothing else.

  Attributes:
    num_items: V.
    borders: G+1 ascending lengths; stratum d has borders[d] .. borders[d+1]-1.
    prior_decay: ratio of P(d+1) to P(d); 1 is uniform.
    confounding: 0 (all strata alike) .. 1 (nothing but popularity shared).
    scale: standard deviation of the preference logits over items.
    rank: of the preference logits, at least 2.
  """

  num_items: int = 300
  borders: Sequence[int] = (5, 8, 12, 20, 40, 151)
  prior_decay: float = 0.9
  confounding: float = 0.4
  scale: float = 1.75
  rank: int = 8

  def __post_init__(self) -> None:
    """Raises InputError for what is out of range."""
    types.at_least(2, num_items=self.num_items, rank=self.rank)
    if len(self.borders) < 2 or not all(
      isinstance(x, int) and low < x < _LONGEST
      for x, low in zip(self.borders, (2, *self.borders), strict=False)
    ):
      raise types.InputError(
        f"borders={self.borders!r}: give two or more ascending lengths from 3 "
        f"to {_LONGEST - 1}"
      )
    if not 0 <= self.confounding <= 1:
      raise types.InputError(f"confounding={self.confounding}: give 0 to 1")
    size = (len(self.borders) - 1) * self.num_items**2
    if size > _LARGEST:
      raise types.InputError(
        f"num_items={self.num_items}: {size} probabilities; give sizes with at "
        f"most {_LARGEST}"
      )


def make_world(spec: WorldSpec, *, seed: int) -> World:
  """Draws a world; the seed is that of embeddings and order of popularity."""
  types.at_least(0, seed=seed)
  num_strata, size = len(spec.borders) - 1, (spec.num_items, spec.rank)
  rng = np.random.default_rng(seed)
  log_popularity = -np.log(1.0 + rng.permutation(spec.num_items))
  item = rng.normal(size=size)
  shared = _unit(rng.normal(size=size))
  own = rng.normal(size=(num_strata, *size))
  own = _unit(own - (own * shared).sum(-1, keepdims=True) * shared)
  angle = spec.confounding * np.pi / 2
  taste = np.cos(angle) * shared + np.sin(angle) * own
  slope = np.linspace(1.0, -1.0, num_strata) if num_strata > 1 else np.zeros(1)
  exponent = _POPULARITY_EXPONENT * (
    1 + spec.confounding * _POPULARITY_TILT * slope
  )
  logits = exponent[:, None, None] * log_popularity
  logits = logits + spec.scale * taste @ item.T
  transition = np.exp(logits - logits.max(-1, keepdims=True))
  transition /= transition.sum(-1, keepdims=True)
  prior = float(spec.prior_decay) ** np.arange(num_strata)
  return World(
    prior=prior / prior.sum(),
    initial=np.stack([_stationary(t) for t in transition]),
    transition=transition,
    length_pmf=_length_pmf(spec.borders),
  )


def simulate(
  world: World, *, num_users: int, seed: int
) -> tuple[interactions_lib.Interactions, np.ndarray]:
  """Draws users from the world.

  Every item keeps its number, whether or not it occurs: item v is original id
  v. There are no times; the order within a user is the order of behaviours.

  Returns:
    The interactions, and the stratum of each user [U] int32.

  Raises:
    InputError: `num_users` is not positive, or so many users are expected to
      have more interactions than int32 offsets reach.
  """
  types.at_least(1, num_users=num_users)
  types.at_least(0, seed=seed)
  mean = world.prior @ world.length_pmf @ np.arange(world.length_pmf.shape[1])
  if num_users * mean >= 2**31:
    raise types.InputError(
      f"num_users={num_users}: about {mean:.0f} interactions each exceed int32 "
      "offsets; give fewer"
    )
  rng = np.random.default_rng(seed)
  one = np.zeros(num_users, np.int64)
  strata = _invert(_cumulative(world.prior[None]), one, rng)
  lengths = _invert(_cumulative(world.length_pmf), strata, rng)
  offsets = interactions_lib.offsets_of(lengths)
  items = np.empty(offsets[-1], np.int32)
  users = np.argsort(-lengths, kind="stable")
  active = np.searchsorted(-lengths[users], -np.arange(lengths.max()))
  cumulative = _cumulative(world.transition.reshape(-1, world.num_items))
  for position, count in enumerate(active):
    users = users[:count]
    if position == 0:
      last = _invert(_cumulative(world.initial), strata[users], rng)
    else:
      rows = strata[users] * world.num_items + last[:count]
      last = _invert(cumulative, rows, rng)
    items[offsets[users] + position] = last + 1
  notes = {
    "rows_read": len(items), "order": "as simulated", "seed": seed,
    "items_unseen": world.num_items - len(np.unique(items)),
  }
  data = interactions_lib.Interactions(
    "simulator", items, offsets, None, np.arange(num_users),
    np.arange(1, world.num_items + 1), notes,
  )
  return data, strata.astype(np.int32)


def stratum_posterior(
  world: World, history: jax.Array, *, event: Event
) -> jax.Array:
  """P(d|x): the stratum of a random event whose window is x.

      P(d|x) ∝ P(d) P(x_1..x_k|d) m_d(k)

  with k the number of items in the window and m_d(k) the expected number of
  events a user of stratum d has with such a window. A training event is any
  target at in-user position 1..n-3 of a user with n interactions (leave-one-out
  keeps n-2 and n-1 for validation and test); a test event is the target at n-1.
  A full window, k = L, stands for all longer histories as well; as pi_d is
  stationary, its likelihood does not depend on where it starts.

  Returns:
    [B, G]; a row of zeros where no event has that window (no items, say).
  """
  mass = world.prior[:, None] * _expected_events(world, event)
  return _posterior(world, history, mass)


def conditional(world: World, history: jax.Array) -> jax.Array:
  """P(y|x, d) = T_d[x_last, y] [B, G, V]; without items, pi_d."""
  rows = np.concatenate([world.initial[:, None], world.transition], axis=1)
  table = jnp.asarray(rows, jnp.float32)
  return jnp.swapaxes(table[:, history[:, -1]], 0, 1)


def interventional(world: World, history: jax.Array) -> jax.Array:
  """P(y|do(x)) = sum_d P(d) P(y|x, d) [B, V]: backdoor adjustment."""
  choice = conditional(world, history)
  prior = jnp.asarray(world.prior, jnp.float32)
  return _mix(jnp.broadcast_to(prior, choice.shape[:2]), choice)


def observational(
  world: World, history: jax.Array, *, event: Event
) -> jax.Array:
  """P(y|x) = sum_d P(d|x) P(y|x, d) [B, V]: what joint training fits."""
  posterior = stratum_posterior(world, history, event=event)
  return _mix(posterior, conditional(world, history))


def kl_divergence(p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL(p||q) = sum_y p(y) (log p(y) - log q(y)) in nats; 0 log 0 = 0.

  Args:
    p: [..., V] probabilities.
    log_q: [..., V] log-probabilities; may be -inf where p is 0.

  Returns:
    [...], float32; inf where q lacks support.
  """
  p = jnp.asarray(p, jnp.float32)
  log_q = jnp.asarray(log_q, jnp.float32)
  seen = p > 0
  log_ratio = jnp.log(jnp.where(seen, p, 1.0)) - jnp.where(seen, log_q, 0.0)
  return jnp.sum(jnp.where(seen, p * log_ratio, 0.0), axis=-1)


def _expected_events(world: World, event: Event) -> np.ndarray:
  """[G, N+1] expected events of a user of d with the target at position t."""
  size = world.length_pmf.shape[1]
  shift = {"training": 3, "test": 1}.get(event)
  if shift is None:
    raise types.InputError(f"event={event!r}: choose 'training' or 'test'")
  padded = np.pad(world.length_pmf, ((0, 0), (0, shift)))
  if event == "training":  # one event at each t with t + 3 <= n
    padded = padded[:, ::-1].cumsum(axis=1)[:, ::-1]
  expected = padded[:, shift : shift + size].copy()
  expected[:, 0] = 0.0  # a target needs a history
  return expected


def _posterior(
  world: World, history: jax.Array, mass: np.ndarray
) -> jax.Array:
  """[B, G] ∝ P(x|d) times the mass [G, N+1] of target positions."""
  length = history.shape[1]
  by_count = np.zeros((len(mass), length + 1))
  short = mass[:, :length]
  by_count[:, : short.shape[1]] = short
  by_count[:, length] = mass[:, length:].sum(axis=1)
  with np.errstate(divide="ignore"):
    log_mass = jnp.asarray(np.log(by_count), jnp.float32)
  count = jnp.sum(history > 0, axis=1)
  score = log_mass[:, count] + _log_likelihood(world, history)  # [G, B]
  top = jnp.max(score, axis=0)
  score = jnp.exp(score - jnp.where(jnp.isfinite(top), top, 0.0))
  total = jnp.sum(score, axis=0)
  return (score / jnp.where(total > 0, total, 1.0)).T


def _log_likelihood(world: World, history: jax.Array) -> jax.Array:
  """log P(x|d) up to a term that all strata share [G, B]."""
  initial = jnp.asarray(_relative_log(world.initial), jnp.float32)
  transition = jnp.asarray(_relative_log(world.transition), jnp.float32)
  before = jnp.pad(history, ((0, 0), (1, 0)))[:, :-1]
  starts = (before == 0) & (history > 0)
  moves = (before > 0) & (history > 0)
  steps = jnp.where(starts, initial[:, history - 1], 0.0)
  steps += jnp.where(moves, transition[:, before - 1, history - 1], 0.0)
  return jnp.sum(steps, axis=-1)


def _mix(posterior: jax.Array, choice: jax.Array) -> jax.Array:
  return jnp.einsum("bg,bgv->bv", posterior, choice, precision="highest")


def _relative_log(probability: np.ndarray) -> np.ndarray:
  """log p_d - max_d log p_d, which keeps float32 sums over long windows exact.

  A factor that all strata share cancels in the posterior.
  """
  with np.errstate(divide="ignore"):
    logs = np.log(probability)
  top = logs.max(axis=0)
  return logs - np.where(np.isfinite(top), top, 0.0)


def _stationary(transition: np.ndarray) -> np.ndarray:
  """The pi [V] with pi T = pi and sum(pi) = 1, as a linear system."""
  system = transition.T - np.eye(len(transition))
  system[-1] = 1.0
  return np.linalg.solve(system, np.eye(len(transition))[-1])


def _length_pmf(borders: Sequence[int]) -> np.ndarray:
  """[G, N+1] truncated power laws on the ranges between borders."""
  lengths = np.arange(borders[-1])
  low, high = np.asarray(borders[:-1]), np.asarray(borders[1:])
  inside = (lengths >= low[:, None]) & (lengths < high[:, None])
  pmf = inside * np.maximum(lengths, 1.0) ** -_LENGTH_EXPONENT
  return pmf / pmf.sum(axis=1, keepdims=True)


def _unit(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _cumulative(rows: np.ndarray) -> np.ndarray:
  """Row r of a table of distributions as a CDF from r to r+1, flattened."""
  cumulative = rows.cumsum(axis=1)
  cumulative /= cumulative[:, -1:]
  return (cumulative + np.arange(len(rows))[:, None]).ravel()


def _invert(
  cumulative: np.ndarray, rows: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Draws a column from each of `rows`; the CDFs are searched as one array."""
  width = len(cumulative) // round(cumulative[-1])
  drawn = np.searchsorted(cumulative, rows + rng.random(len(rows)), "right")
  return np.minimum(drawn - rows * width, width - 1)
