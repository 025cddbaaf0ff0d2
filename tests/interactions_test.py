"""Interactions against a brute-force reading with dictionaries."""

import collections
import dataclasses

import numpy as np
import polars as pl
import pytest

from pin_jax.data.interactions import Interactions, from_columns
from pin_jax.types import InputError


def brute_force(
  users, items, times=None, *, duplicates="keep", k_core=0, min_length=1,
  max_history=None,
):
  """Returns {user: [(item, time), ...]} by the definition of each option."""
  stamps = [0] * len(users) if times is None else times
  rows = sorted(zip(users, stamps, range(len(users)), items, strict=True),
                key=lambda row: (row[0], row[1], row[2]))
  rows = [(user, item, time) for user, time, _, item in rows]
  if duplicates == "exact":
    rows = list(dict.fromkeys(rows))
  elif duplicates == "first":
    rows = [row for n, row in enumerate(rows)
            if row[:2] not in [other[:2] for other in rows[:n]]]
  elif duplicates == "last":
    rows = [row for n, row in enumerate(rows)
            if row[:2] not in [other[:2] for other in rows[n + 1:]]]
  while True:
    of_user = collections.Counter(row[0] for row in rows)
    of_item = collections.Counter(row[1] for row in rows)
    kept = [
      row for row in rows
      if of_user[row[0]] >= max(k_core, min_length)
      and of_item[row[1]] >= k_core
    ]
    if kept == rows:
      break
    rows = kept
  histories = collections.defaultdict(list)
  for user, item, time in rows:
    histories[user].append((item, time))
  return {
    user: history[-max_history:] if max_history else history
    for user, history in sorted(histories.items())
  }


def as_histories(data: Interactions):
  """Returns {user: [(item, time), ...]} of original ids."""
  histories = {}
  for u, user in enumerate(data.user_ids):
    rows = slice(data.offsets[u], data.offsets[u + 1])
    items = [data.item_ids[v - 1] for v in data.items[rows]]
    times = [0] * len(items) if data.times is None else data.times[rows]
    histories[user] = list(zip(items, times, strict=True))
  return histories


def random_columns(seed, rows=300, strings=False):
  rng = np.random.default_rng(seed)
  users = rng.integers(0, 25, rows) ** 2 - 50
  items = rng.integers(0, 30, rows) * 7
  times = rng.integers(0, 12, rows)
  if strings:
    users = np.array([f"u{user}é" for user in users], object)
    items = np.array([f"{item:03d}" for item in items], object)
  return users, items, times


OPTIONS = [
  {},
  {"duplicates": "exact"},
  {"duplicates": "first"},
  {"duplicates": "last"},
  {"k_core": 7},
  {"k_core": 6, "duplicates": "exact"},
  {"min_length": 12},
  {"k_core": 6, "min_length": 8, "max_history": 4},
  {"max_history": 1},
]


class TestFromColumns:

  @pytest.mark.parametrize("options", OPTIONS)
  @pytest.mark.parametrize("strings", [False, True])
  @pytest.mark.parametrize("seed", [0, 1])
  def test_equals_brute_force(self, options, strings, seed):
    columns = random_columns(seed, strings=strings)
    data = from_columns(*columns, **options)
    expected = brute_force(*columns, **options)
    assert as_histories(data) == expected
    found = {item for history in expected.values() for item, _ in history}
    assert data.item_ids.tolist() == sorted(found)
    assert data.user_ids.tolist() == sorted(expected)
    assert data.num_users == len(expected)
    assert data.num_items == len(found)
    assert data.num_interactions == data.lengths.sum() == len(data.items)

  @pytest.mark.parametrize("options", [
    {}, {"duplicates": "last"}, {"k_core": 5}
  ])
  def test_without_times_the_row_order_decides(self, options):
    users, items, _ = random_columns(2)
    data = from_columns(users, items, **options)
    assert data.times is None
    assert as_histories(data) == brute_force(users, items, **options)
    assert "row order" in data.notes["order"]
    assert "tied_share" not in data.notes

  def test_types(self):
    data = from_columns(*random_columns(0))
    assert data.items.dtype == np.int32
    assert data.offsets.dtype == data.lengths.dtype == np.int64
    assert data.times.dtype == data.user_ids.dtype == np.int64
    assert data.items.min() == 1 and data.items.max() == data.num_items
    strings = from_columns(*random_columns(0, strings=True))
    assert strings.user_ids.dtype == strings.item_ids.dtype == object
    assert isinstance(strings.user_ids[0], str)

  def test_notes_count_what_was_dropped(self):
    users = [1, 1, 1, 1, 2, 2, 3]
    items = [5, 5, 6, 7, 5, 6, 8]
    times = [0, 0, 1, 1, 0, 0, 0]
    notes = from_columns(
      users, items, times, duplicates="exact", min_length=2, max_history=2
    ).notes
    assert notes["rows_read"] == 7
    assert notes["duplicates_dropped"] == 1
    assert notes["users_dropped"] == 1
    assert notes["items_dropped"] == 1  # 8, of user 3
    assert notes["history_cut"] == 1
    assert notes["tied_share"] == 2 / 2  # one pair a user, both tied

  def test_tied_share_ignores_pairs_across_users(self):
    data = from_columns([1, 1, 1, 2, 2], [1, 2, 3, 1, 2], [4, 4, 7, 7, 8])
    assert data.notes["tied_share"] == 1 / 3
    data = from_columns([1, 2], [1, 1], [4, 4])
    assert data.notes["tied_share"] == 0.0

  def test_polars_series_in_chunks(self):
    columns = [pl.Series(column) for column in random_columns(3)]
    chunked = [column[:100].append(column[100:]) for column in columns]
    assert chunked[0].n_chunks() == 2
    assert (
      from_columns(*chunked).fingerprint == from_columns(*columns).fingerprint
    )

  @pytest.mark.parametrize("kind", [
    pl.Int8, pl.UInt32, pl.UInt64, pl.Float32, pl.Float64
  ])
  def test_any_whole_numbers_are_integer_ids(self, kind):
    users = pl.Series([3, 1, 3], dtype=kind)
    data = from_columns(users, [1, 2, 3])
    assert data.user_ids.dtype == np.int64
    assert data.user_ids.tolist() == [1, 3]

  def test_whole_numbers_beyond_int64_are_string_ids(self):
    users = np.array([2**64 - 1, 5], np.uint64)
    data = from_columns(users, [1, 2])
    assert data.user_ids.tolist() == ["18446744073709551615", "5"]

  def test_categories_are_string_ids(self):
    users = pl.Series(["b", "a"], dtype=pl.Categorical)
    assert from_columns(users, [1, 2]).user_ids.tolist() == ["a", "b"]

  def test_dates_become_unix_seconds(self):
    days = np.array(["1970-01-02", "1970-01-01"], "datetime64[D]")
    whole = from_columns([1, 1], [1, 2], days.astype("datetime64[ms]"))
    assert whole.times.dtype == np.int64
    assert whole.times.tolist() == [0, 86400]
    assert whole.items.tolist() == [2, 1]
    dates = pl.Series(days).cast(pl.Date)
    assert from_columns([1, 1], [1, 2], dates).times.tolist() == [0, 86400]
    parts = pl.Series([1_500_000, 0]).cast(pl.Datetime("us"))
    assert from_columns([1, 1], [1, 2], parts).times.tolist() == [0, 1.5]

  def test_a_cut_may_be_longer_than_any_integer_of_numpy(self):
    data = from_columns([1, 1], [1, 2], max_history=10**30)
    assert data.num_interactions == 2

  def test_keeps_no_view_of_the_callers_memory(self):
    columns = np.array([1, 1]), np.array([1, 2]), np.array([1, 2])
    data = from_columns(*columns)
    for column in columns:
      column[:] = 0
    assert data.times.tolist() == [1, 2]
    assert data.items.tolist() == [1, 2]
    assert data.user_ids.tolist() == [1]


class TestFingerprint:

  def test_ignores_the_order_of_users_and_names(self):
    users, items, times = random_columns(4)
    one = from_columns(users, items, times)
    by_user = np.argsort(-users, kind="stable")  # keeps order within a user
    other = from_columns(
      users[by_user], items[by_user], times[by_user], name="other"
    )
    assert one.fingerprint == other.fingerprint
    assert len(one.fingerprint) == 64

  def test_depends_on_the_order_within_a_user(self):
    one = from_columns([1, 1], [1, 2], [5, 5])
    other = from_columns([1, 1], [2, 1], [5, 5])
    assert one.fingerprint != other.fingerprint

  def test_depends_on_every_part(self):
    data = from_columns([1, 1, 2], ["a", "b", "a"], [1, 2, 3])
    changes = [
      {"items": data.items[[1, 0, 2]]},
      {"offsets": np.array([0, 1, 3])},
      {"times": data.times + 1},
      {"times": None},
      {"user_ids": data.user_ids + 1},
      {"user_ids": data.user_ids.astype(str).astype(object)},
      {"item_ids": np.array(["ab", ""], object)},
    ]
    prints = {
      dataclasses.replace(data, **change).fingerprint for change in changes
    }
    assert len(prints | {data.fingerprint}) == len(changes) + 1

  def test_golden(self):
    data = from_columns([2, 1, 2], ["a", "b", "c"], [3, 2, 1])
    assert data.fingerprint == (
      "0cbc3e8bf5162ad042a50fcdab3e1ac33fb76ce6d1c757672204ca312f1132cd"
    ), "stored results name their data by this; change it only on purpose"


class TestSelectUsers:

  def test_a_mask(self):
    data = from_columns(*random_columns(5))
    histories = as_histories(data)
    mask = np.arange(data.num_users) % 3 == 1
    part = data.select_users(mask)
    assert as_histories(part) == {
      user: histories[user] for user in data.user_ids[mask].tolist()
    }
    assert part.item_ids is data.item_ids
    assert part.offsets.dtype == np.int64
    assert part.items.dtype == np.int32

  def test_tied_share_is_the_selections(self):
    data = from_columns([1, 1, 2, 2], [1, 2, 1, 2], [1, 1, 1, 2])
    assert data.notes["tied_share"] == 0.5
    part = data.select_users(np.array([True, False]))
    assert part.notes["tied_share"] == 1.0


class TestBadInput:

  @pytest.mark.parametrize("columns, message", [
    (([], []), "0 rows"),
    (([1, 2], [1]), "'users': 2, 'items': 1"),
    (([1, 2], [1, 2], [1]), "'times': 1"),
    ((np.ones((2, 1), int), [1, 2]), r"users has shape \(2, 1\)"),
    (([[1], [2, 3]], [1, 2]), "users are List"),
    (([1, None], [1, 2]), r"users\[1\] is empty"),
    (([1, 2], ["a", None]), r"items\[1\] is empty"),
    (([1, 2], np.array(["a", None], object)), r"items\[1\] is empty"),
    (([1, "a"], [1, 2]), "users mixes types"),
    (([1, 2], [0.5, 1]), r"items\[0\] = 0.5"),
    (([np.nan, 2], [1, 2]), r"users\[0\] = nan"),
    (([True, False], [1, 2]), "Boolean"),
    ((["a", ""], [1, 2]), r"users\[1\] is empty"),
    (([2.0**53, 1.0], [1, 2]), r"users\[0\].*2\^53"),
    (([1, 2], np.array([1, 2**24], np.float32)), r"items\[1\].*2\^24"),
    (([1, 2], [1, 2], [2**63, 1]), "times span 1 to .*coarser unit"),
    (([1, 2], [1, 2], [1e16, 1]), r"times\[0\].*coarser unit"),
    (([1, 2], [1, 2], [1.0, np.nan]), r"times\[1\] = nan"),
    (([1, 2], [1, 2], [np.inf, 0.0]), r"times\[0\] = inf"),
    (([1, 2], [1, 2], [1, None]), r"times\[1\] is empty"),
    (([1, 2], [1, 2], ["1", "2"]), "times are String"),
  ])
  def test_columns(self, columns, message):
    with pytest.raises(InputError, match=message) as error:
      from_columns(*columns)
    assert "\n" not in str(error.value)

  @pytest.mark.parametrize("options, message", [
    ({"duplicates": "drop"}, "'drop' is unknown.*exact"),
    ({"duplicates": "exact"}, "needs times"),
    ({"k_core": -1}, "k_core=-1"),
    ({"k_core": 1.5}, "k_core=1.5"),
    ({"k_core": True}, "k_core=True"),
    ({"min_length": 10**30}, "lower"),
    ({"min_length": 0}, "min_length=0"),
    ({"max_history": 0}, "max_history=0"),
    ({"k_core": 3}, "no user of 'data' is left after k_core=3"),
    ({"min_length": 4}, "min_length=4; lower"),
  ])
  def test_options(self, options, message):
    with pytest.raises(InputError, match=message):
      from_columns([1, 1, 2], [1, 2, 1], **options)
