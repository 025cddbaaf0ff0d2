"""Negatives: chi-square of the draws, and the gradient that they estimate."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from pin_jax.data import batches, splits
from pin_jax.data.interactions import from_columns
from pin_jax.training import negatives
from pin_jax.training.losses import sampled, sampled_softmax
from pin_jax.types import Batch

ITEMS = 6
COUNTS = np.asarray([99, 8, 0, 1, 3, 4, 4])  # the first stands for padding
LOGITS = np.asarray([0.9, -0.4, 0.3, -1.0, 0.0, 0.5], np.float32)


pytestmark = pytest.mark.usefixtures("compile_quickly")


def _batch(targets, users=None):
  targets = jnp.asarray(targets, jnp.int32)
  users = jnp.zeros(len(targets), jnp.int32) if users is None else users
  return Batch(users, targets * 0, targets)


BATCH = _batch([[0, 0, 3], [5, 5, 1]])
EMPIRICAL = np.bincount([3, 5, 5, 1], minlength=ITEMS + 1)


def _proposals():
  uniform = negatives.uniform(ITEMS)
  popular = negatives.popularity(COUNTS)
  return {
    "uniform": (uniform, np.ones(ITEMS)),
    "popularity": (popular, COUNTS[1:]),
    "tempered": (negatives.popularity(COUNTS, 0.5), np.sqrt(COUNTS[1:])),
    "exponent 0": (negatives.popularity(COUNTS, 0.0), np.ones(ITEMS)),
    "in_batch": (
      negatives.in_batch(EMPIRICAL[None], np.zeros(1)), EMPIRICAL[1:]
    ),
    "mixture": (
      negatives.mixture([(1.0, uniform), (3.0, popular)]),
      np.ones(ITEMS) / ITEMS + 3 * COUNTS[1:] / COUNTS[1:].sum(),
    ),
  }


NAMES = tuple(_proposals())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shared", [True, False])
def test_draws_follow_the_distribution(name, shared):
  proposal, mass = _proposals()[name]
  count = 40_000 if shared else 8_000
  draw = sampled(None, proposal, count=count, shared=shared).draw
  drawn = jax.jit(draw)(jax.random.key(3), BATCH)
  assert drawn.items.shape == ((count,) if shared else (6, count))
  assert drawn.log_counts.shape == drawn.items.shape
  observed = np.bincount(np.ravel(drawn.items), minlength=ITEMS + 1)
  assert observed[0] == 0 and len(observed) == ITEMS + 1
  want = mass / np.sum(mass) * observed.sum()
  np.testing.assert_array_equal(observed[1:][want == 0], 0)
  kept = want > 0
  assert scipy.stats.chisquare(observed[1:][kept], want[kept]).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_log_counts_are_the_expected_numbers(name):
  proposal, mass = _proposals()[name]
  items = jnp.arange(1, ITEMS + 1)
  got = np.exp(proposal.log_counts(items, BATCH, 64))
  want = 64 * mass / np.sum(mass)
  if name == "in_batch":
    want = want * 3 / 4  # the row's own position is one of the four
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_log_counts_of_batches_are_their_groups():
  counts = np.asarray([[0, 1, 3], [0, 2, 2]])
  proposal = negatives.in_batch(counts, np.asarray([1, 0, -1, 1]))
  items = jnp.asarray([1, 2])
  for user, want in ((0, [0.5, 0.5]), (1, [0.25, 0.75]), (3, [0.5, 0.5])):
    batch = _batch([[1, 2]], users=jnp.asarray([user]))
    got = np.exp(proposal.log_counts(items, batch, 10))
    np.testing.assert_allclose(got, 5 * np.asarray(want), rtol=1e-5)


MASSES = {
  "the last is 0": [1, 5, 2, 0],
  "only zeros around": [0, 0, 3, 0, 1, 0, 0],
  "one item": [0, 7, 0],
  "all of the float range": [1e300, 1e-300, 0, 1e300],
  "flat": np.ones(100_003),
  "flat, every other": np.arange(200_000) % 2,
  "a long tail": 1 / np.arange(1.0, 150_001),
}


@pytest.mark.parametrize("name", MASSES)
def test_shares_drawn_are_shares_counted(name, monkeypatch):
  """Every 2^14th of the 2^32 bit patterns, and the last."""
  mass = np.asarray(MASSES[name], float)
  grid = np.arange(2**14 - 1, 2**32, 2**14, dtype=np.uint32)
  monkeypatch.setattr(jax.random, "bits", lambda *_: jnp.asarray(grid))
  proposal = negatives.popularity([9, *mass])
  drawn = np.bincount(proposal.sample(None, BATCH, (1,)))[1:]
  drawn = np.pad(drawn, (0, len(mass) - len(drawn)))
  share = mass / mass.max() / (mass / mass.max()).sum()
  assert np.abs(drawn - len(grid) * share).max() < 1.01
  assert not drawn[mass == 0].any()
  logs = proposal.log_counts(jnp.arange(1, len(mass) + 1), BATCH, 1)
  chances = np.exp(np.asarray(logs, np.float64))
  assert ((chances > 0) == (mass > 0)).all()
  np.testing.assert_allclose(chances.sum(), 1, rtol=1e-6)
  np.testing.assert_allclose(chances, share, rtol=1e-3, atol=2**-31)


@pytest.mark.parametrize("size", [
  10**6, pytest.param(10**7, marks=pytest.mark.slow),
])
def test_millions_of_items_are_drawn_alike(size):
  proposal = negatives.popularity(np.ones(size + 1))
  drawn = proposal.sample(jax.random.key(0), BATCH, (200_000,))
  parts = np.bincount((np.asarray(drawn) - 1) * 100 // size, minlength=100)
  assert scipy.stats.chisquare(parts).pvalue > 1e-3
  widths = negatives.unit_widths(np.ones(size + 1))
  assert widths.sum() == 2**32
  assert len(widths) == size and np.abs(widths - 2**32 / size).max() <= 1


def test_the_key_decides_and_rows_differ():
  proposal = negatives.uniform(1000)
  run = lambda seed, shared: np.asarray(
    sampled(None, proposal, count=9, shared=shared)
    .draw(jax.random.key(seed), BATCH).items
  )
  np.testing.assert_array_equal(run(0, True), run(0, True))
  assert (run(0, True) != run(1, True)).any()
  own = run(0, False)
  assert len({tuple(row) for row in own.tolist()}) == 6


def test_a_batch_without_targets_gives_no_items():
  proposal = negatives.in_batch(COUNTS[None], np.zeros(1))
  draw = sampled(None, proposal, count=3).draw
  drawn = draw(jax.random.key(0), _batch([[0, 0]]))
  np.testing.assert_array_equal(drawn.items, 0)


def test_mixture_rounds_to_the_number_of_draws():
  parts = [(0.2, negatives.uniform(ITEMS)), (0.8, negatives.popularity(COUNTS))]
  proposal = negatives.mixture(parts)
  for count in (1, 2, 3, 7, 100):
    drawn = proposal.sample(jax.random.key(0), BATCH, (4, count))
    assert drawn.shape == (4, count)
    logs = proposal.log_counts(jnp.arange(1, ITEMS + 1), BATCH, count)
    np.testing.assert_allclose(np.exp(logs).sum(), count, rtol=1e-5)


# What the draws are for: the gradient of the full softmax.

TARGET = 5


def _covering(name):
  """A proposal under which every item can be drawn, and random batches."""
  counts = np.where(COUNTS > 0, COUNTS, 2)
  counts[0] = 0
  uniform = negatives.uniform(ITEMS)
  popular = negatives.popularity(counts, 0.7)
  return counts, {
    "uniform": uniform,
    "popularity": popular,
    "in_batch": negatives.in_batch(counts[None], np.zeros(1)),
    "mixture": negatives.mixture([
      (1.0, negatives.in_batch(counts[None], np.zeros(1))), (1.0, uniform)
    ]),
  }[name]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
  "name", ["uniform", "popularity", "in_batch", "mixture"]
)
def test_corrected_gradient_tends_to_that_of_the_full_softmax(name, shared):
  """The mean over draws, and for batch negatives over batches; bias ~ 1/C."""
  counts, proposal = _covering(name)
  chances = jnp.asarray(counts / counts.sum())
  full = scipy.special.softmax(LOGITS.astype(float))
  full -= np.arange(1, ITEMS + 1) == TARGET

  def gradient(key, count):
    """Of the row of the batch's first position, whose target is TARGET."""
    others_key, key = jax.random.split(key)
    others = jax.random.choice(others_key, ITEMS + 1, (4 * count,), p=chances)
    batch = _batch(jnp.concatenate([jnp.asarray([TARGET]), others])[None])
    drawn = sampled(None, proposal, count=count, shared=shared).draw(key, batch)
    items, logs = drawn if shared else (x[0] for x in drawn)
    logits = lambda x: sampled_softmax(
      x[TARGET - 1], x[items - 1], logs, items != TARGET
    )
    return jax.grad(logits)(jnp.asarray(LOGITS))

  biases = []
  for count, repeats in ((4, 4000), (32, 2000)):
    keys = jax.random.split(jax.random.key(count), repeats)
    grads = jax.jit(jax.vmap(lambda k, c=count: gradient(k, c)))(keys)
    grads = np.asarray(grads, np.float64)
    error = grads.std(0) / math.sqrt(repeats)
    biases.append((grads.mean(0) - full, error))
  (few, few_error), (many, many_error) = biases
  assert np.abs(few).max() > 5 * few_error.max()  # it is biased, ...
  # ... and eight times the draws leave an eighth of it, give or take noise.
  expected = few / 8
  margin = 5 * np.sqrt(many_error**2 + (few_error / 8) ** 2)
  np.testing.assert_array_less(
    np.abs(many - expected), margin + 0.5 * np.abs(expected).max()
  )


# Counts.


def _split():
  rng = np.random.default_rng(0)
  sizes = rng.integers(3, 15, 12)
  users = np.repeat(np.arange(12), sizes)
  items = rng.integers(0, 9, len(users))
  items[:9] = np.arange(9)
  return splits.leave_one_out(from_columns(users, items))


def test_training_counts_leave_out_what_is_held_out():
  split = _split()
  data = split.interactions
  want = np.zeros(data.num_items + 1)
  for first, last in itertools.pairwise(data.offsets):
    for item in data.items[first : last - 2]:
      want[item] += 1
  np.testing.assert_array_equal(splits.training_counts(split), want)


@pytest.mark.parametrize("length", [3, 12])
@pytest.mark.parametrize("draw", [*batches.DRAWS, "validation"])
def test_batch_counts_are_what_batches_hold(draw, length):
  """Against the targets of many batches; histories of 1 to 12 targets."""
  split = _split()
  groups, sequences = np.arange(12) % 3 - 1, batches.make_sequences(split)
  sizes = {"batch_size": 6000, "length": length}
  if draw == "validation":
    pool = batches.make_held_out(split.validation, groups, num_groups=2)
    drawn = batches.Draw(**sizes, draw="validation").batch(
      jax.random.key(0), sequences, pool
    )
  else:
    targets = batches.training_targets(split)
    pool = batches.make_pool(targets, groups, num_groups=2, length=length)
    drawn = batches.Draw(**sizes, draw=draw).batch(
      jax.random.key(0), sequences, pool
    )
  counts = negatives.batch_counts(
    split, groups, 2, batches.Draw(1, length, draw)
  )
  proposal = negatives.in_batch(counts, groups)
  for group in range(2):
    batch = jax.tree.map(lambda x, g=group: x[g], drawn)
    held = np.asarray(batch.targets)
    observed = np.bincount(held[held > 0], minlength=counts.shape[1])
    shares = counts[group] / counts[group].sum()
    np.testing.assert_allclose(
      observed / observed.sum(), shares, atol=0.01
    )
    own = proposal.sample(jax.random.key(1), batch, (2000,))
    assert np.isfinite(proposal.log_counts(own, batch, 9)).all()


@pytest.mark.parametrize("length", [1, 4, 10])
@pytest.mark.parametrize("count", [1, 4, 7, 10, 23])
def test_target_chances_by_users_against_every_draw(count, length):
  """All n targets and all offsets, one after another."""
  users = np.repeat([0, 1], [count + 3, 4])
  split = splits.leave_one_out(from_columns(users, np.arange(len(users))))
  rows, owners, chances = batches.target_chances(
    split, length=length, draw="users"
  )
  slack = -count % length
  want = np.zeros(count)
  for target in range(count):
    for offset in range(slack + 1):
      first = (target + offset) // length * length - offset
      held = slice(max(first, 0), first + length)
      want[held] += 1 / (slack + 1) / count
  assert rows.tolist() == [*range(1, count + 1), count + 4]
  assert owners.tolist() == [0] * count + [1]
  np.testing.assert_allclose(chances, [*want, 1])
