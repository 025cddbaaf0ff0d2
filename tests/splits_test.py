"""Splits against a loop over users that follows the definitions."""

import numpy as np
import pytest

from pin_jax.data import splits
from pin_jax.data.interactions import from_columns
from pin_jax.types import InputError


def random_data(seed=0, rows=200, users=40):
  rng = np.random.default_rng(seed)
  return from_columns(
    rng.integers(0, users, rows), rng.integers(0, 9, rows),
    rng.integers(0, 50, rows),
  )


class TestLeaveOneOut:

  def test_positions(self):
    data = from_columns([1] * 5 + [2] * 2 + [3] * 3, range(10), range(10))
    split = splits.leave_one_out(data)
    assert split.interactions.user_ids.tolist() == [1, 3]
    assert split.train_end.tolist() == [3, 1]
    assert split.validation.tolist() == [3, 1]
    assert split.test.tolist() == [4, 2]
    assert split.notes["users_dropped"] == 1
    assert split.interactions.item_ids is data.item_ids
    for positions in (split.train_end, split.validation, split.test):
      assert positions.dtype == np.int32
    assert split.activeness.dtype == np.int64
    assert "leave-one-out" in split.protocol and "\n" not in split.protocol

  def test_no_user_left(self):
    with pytest.raises(InputError, match=r"3 interactions \(longest: 2\)"):
      splits.leave_one_out(from_columns([1, 1, 2], [1, 2, 3]))


class TestTemporal:

  def test_borders(self):
    """A time equal to a border belongs to the later period."""
    data = from_columns([1] * 4, [1, 2, 3, 4], [9, 10, 19, 20])
    split = splits.temporal(data, validation_time=10, test_time=20)
    assert split.train_end.tolist() == [1]
    assert split.validation.tolist() == [1]
    assert split.test.tolist() == [3]
    assert "10" in split.protocol and "20" in split.protocol

  @pytest.mark.parametrize("times, message", [
    ({"validation_time": 3, "test_time": 3}, "not before test_time=3"),
    ({"validation_time": 3, "test_time": 2}, "not before test_time=2"),
    ({"validation_time": np.nan, "test_time": 2}, "not before"),
    ({"validation_time": 0, "test_time": 2}, r"no user .* \(earliest: 1\)"),
    ({"validation_time": 2, "test_time": 9}, "has a test target"),
    ({"validation_time": 2.5, "test_time": 2.75}, "has a validation target"),
  ])
  def test_bad_times(self, times, message):
    data = from_columns([1, 1, 1], [1, 2, 3], [1, 2, 3])
    with pytest.raises(InputError, match=message):
      splits.temporal(data, **times)

  def test_without_times(self):
    data = from_columns([1, 1, 1], [1, 2, 3])
    with pytest.raises(InputError, match="has no times"):
      splits.temporal(data, validation_time=2, test_time=3)
    with pytest.raises(InputError, match="has no times"):
      splits.temporal_fractions(data)


class TestTemporalFractions:

  def test_shares_of_distinct_times(self):
    rng = np.random.default_rng(0)
    data = from_columns(
      rng.integers(0, 20, 1000), rng.integers(0, 9, 1000),
      rng.permutation(1000),
    )
    split = splits.temporal_fractions(data, validation=0.15, test=0.25)
    assert split.notes["users_dropped"] == 0
    # All users are kept, so the training interactions are 60 % of 1000.
    assert abs(split.activeness.sum() - 600) <= 1
    first_test = split.interactions.offsets[:-1] + split.test
    assert split.interactions.times[first_test].min() >= 749

  def test_times_keep_their_type(self):
    data = from_columns([1] * 9, range(9), np.arange(9) + 2**60)
    split = splits.temporal_fractions(data, validation=0.2, test=0.2)
    assert str(2**60 + 7) in split.protocol

  @pytest.mark.parametrize("validation, test", [
    (0, 0.1), (0.1, -0.1), (0.5, 0.5), (np.nan, 0.1)
  ])
  def test_bad_shares(self, validation, test):
    with pytest.raises(InputError, match="sum is below 1"):
      splits.temporal_fractions(
        random_data(), validation=validation, test=test
      )

  def test_all_times_equal(self):
    data = from_columns([1, 1, 1], [1, 2, 3], [5, 5, 5])
    with pytest.raises(InputError, match="ascending times"):
      splits.temporal_fractions(data)


def test_cuts_tell_nanoseconds_apart():
  """As float64, the four times of a user are one."""
  start = 17 * 10**17
  data = from_columns([1] * 4 + [2] * 4, [*range(4)] * 2, [
    start + t for t in (0, 1, 2, 3, 0, 1, 2, 3)
  ])
  split = splits.temporal_fractions(data, validation=0.25, test=0.25)
  assert split.train_end.tolist() == [2, 2]
  assert split.validation.tolist() == [2, 2]
  assert split.test.tolist() == [3, 3]
