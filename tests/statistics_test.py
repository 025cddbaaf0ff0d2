"""Bootstrap intervals against plain numpy, and their coverage."""

import math
import warnings

import numpy as np
import pytest

from pin_jax import statistics
from pin_jax.types import InputError


@pytest.fixture(autouse=True)
def _no_warnings():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def _pair(num_users=300, seed=0):
  rng = np.random.default_rng(seed)
  base = rng.exponential(1.0, num_users)
  return base, base * rng.uniform(0.6, 1.7, num_users)


def _numpy_percentile(statistic, num_users, resamples=2000, seed=99):
  rng = np.random.default_rng(seed)
  values = [
    statistic(rng.integers(0, num_users, num_users)) for _ in range(resamples)
  ]
  return np.percentile(values, [2.5, 97.5])


def test_relative_change_equals_a_numpy_bootstrap():
  base, other = _pair()
  got = statistics.relative_change(base, other)
  want = _numpy_percentile(lambda i: other[i].mean() / base[i].mean() - 1, 300)
  width = want[1] - want[0]
  assert got.estimate == pytest.approx(other.mean() / base.mean() - 1)
  np.testing.assert_allclose([got.low, got.high], want, atol=0.08 * width)


def test_mean_interval_equals_a_numpy_bootstrap():
  values, _ = _pair()
  got = statistics.mean_interval(values)
  want = _numpy_percentile(lambda i: values[i].mean(), 300)
  width = want[1] - want[0]
  assert got.estimate == pytest.approx(values.mean())
  np.testing.assert_allclose([got.low, got.high], want, atol=0.08 * width)


def test_pairing_makes_the_interval_narrow():
  base, _ = _pair()
  other = 1.1 * base
  paired = statistics.relative_change(base, other)
  broken = statistics.relative_change(base, other[::-1])
  assert paired.estimate == pytest.approx(0.1)
  np.testing.assert_allclose([paired.low, paired.high], 0.1, atol=1e-12)
  assert broken.high - broken.low > 0.1


def test_interval_covers_the_truth_about_95_times_in_100():
  truth, hits, trials = 0.1, 0, 400
  for seed in range(trials):
    rng = np.random.default_rng(seed)
    base = rng.uniform(0, 2, 80)
    other = 1.1 * base + rng.normal(0, 0.5, 80)
    change = statistics.relative_change(
      base, other, num_resamples=300, seed=seed
    )
    hits += change.low <= truth <= change.high
  spread = math.sqrt(0.95 * 0.05 / trials)
  assert abs(hits / trials - 0.95) < 3.5 * spread


def test_higher_confidence_is_wider():
  base, other = _pair()
  wide = statistics.relative_change(base, other, confidence=0.99)
  narrow = statistics.relative_change(base, other, confidence=0.8)
  assert wide.low < narrow.low < narrow.high < wide.high


def test_leading_axes_share_their_resamples():
  base, other = np.stack([_pair(seed=s) for s in range(6)], axis=1)
  base, other = base.reshape(2, 3, -1), other.reshape(2, 3, -1)
  together = statistics.relative_change(base, other)
  assert together.low.shape == (2, 3)
  alone = statistics.relative_change(base[1, 2], other[1, 2])
  np.testing.assert_allclose([field[1, 2] for field in together], alone)


def test_batches_do_not_change_the_result(monkeypatch):
  base, other = _pair()
  whole = statistics.relative_change(base, other)
  monkeypatch.setattr(statistics, "_BATCH_ELEMENTS", 10 * len(base))
  np.testing.assert_allclose(statistics.relative_change(base, other), whole)


def test_result_follows_from_the_seed():
  base, other = _pair()
  first = statistics.relative_change(base, other, seed=3)
  assert first == statistics.relative_change(base, other, seed=3)
  assert first != statistics.relative_change(base, other, seed=4)


def test_rows_of_a_user_are_averaged_before_resampling():
  base, other = _pair(50)
  users = np.array([f"user {u}" for u in range(50)], object)
  rng = np.random.default_rng(5)
  order = rng.permutation(150)
  noise = rng.normal(size=(3, 50))
  noise -= noise.mean(0)
  rows = (base + noise).ravel()[order], (other - noise).ravel()[order]
  got = statistics.relative_change(*rows, users=np.tile(users, 3)[order])
  by_name = np.argsort(users)
  want = statistics.relative_change(base[by_name], other[by_name])
  np.testing.assert_allclose(got, want)


def test_repeated_rows_do_not_narrow_the_interval():
  values, _ = _pair(50)
  users = np.arange(50)
  once = statistics.mean_interval(values, users=users)
  thrice = statistics.mean_interval(np.tile(values, 3), users=np.tile(users, 3))
  np.testing.assert_allclose(thrice, once)


@pytest.mark.parametrize("num_users", [0, 1])
def test_fewer_than_two_users_have_no_interval(num_users):
  ones = np.ones(num_users)
  change = statistics.relative_change(ones, 2 * ones)
  mean = statistics.mean_interval(ones, users=np.arange(num_users))
  assert np.isnan([*change[1:], *mean[1:]]).all()
  if num_users:
    assert (change.estimate, mean.estimate) == (1, 1)
  else:
    assert np.isnan([change.estimate, mean.estimate]).all()


def test_two_seeds_of_one_user_are_one_user():
  change = statistics.relative_change([1.0, 2], [2.0, 4], users=[7, 7])
  assert change.estimate == 1
  assert math.isnan(change.low)


@pytest.mark.parametrize("other", [np.zeros(20), np.ones(20)])
def test_zero_base_mean_is_nan(other):
  assert np.isnan(statistics.relative_change(np.zeros(20), other)).all()


def test_a_base_that_some_resamples_miss_has_no_interval():
  base = np.eye(1, 50)[0]
  change = statistics.relative_change(base, np.ones(50))
  assert change.estimate == pytest.approx(49)
  assert math.isnan(change.low) and math.isnan(change.high)


def test_bad_input_names_the_remedy():
  with pytest.raises(InputError, match="same rows of both models"):
    statistics.relative_change(np.ones(3), np.ones(4))
  with pytest.raises(InputError, match="one user id for each"):
    statistics.mean_interval(np.ones(3), users=[1, 2])
  with pytest.raises(InputError, match="confidence is 95"):
    statistics.mean_interval(np.ones(3), confidence=95)
  with pytest.raises(InputError, match="num_resamples is 0"):
    statistics.mean_interval(np.ones(3), num_resamples=0)
