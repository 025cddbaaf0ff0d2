"""Properties of readers, splits and statistics."""

import collections
import csv
import decimal
import io
import itertools
import tempfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest

from pin_jax import serving
from pin_jax.data import files, splits, stored
from pin_jax.data.interactions import from_columns
from pin_jax.evaluation import statistics
from pin_jax.types import InputError

hypothesis.settings.register_profile(
  "short", max_examples=30, deadline=None, derandomize=True, database=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("short")

ROWS = st.lists(
  st.tuples(st.integers(0, 6), st.integers(0, 8), st.integers(0, 5)),
  min_size=1, max_size=60,
)
IDS = st.text(
  st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1,
  max_size=4,
)


def _columns(rows):
  return [list(column) for column in zip(*rows, strict=True)]


def _histories(rows):
  """user -> [(time, item)] in time order, ties in row order; by hand."""
  found = collections.defaultdict(list)
  for user, item, time in rows:
    found[user].append((time, item))
  return {u: sorted(h, key=lambda x: x[0]) for u, h in sorted(found.items())}


def _of(data, user):
  own = slice(*data.offsets[user : user + 2])
  return data.item_ids[data.items[own] - 1].tolist()


# Readers.


@hypothesis.given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=20))
def test_a_csv_file_gives_back_its_ids(pairs):
  text = io.StringIO()
  csv.writer(text).writerows([("user", "item"), *pairs])
  with tempfile.NamedTemporaryFile(suffix=".csv") as file:
    file.write(text.getvalue().encode())
    file.flush()
    data = files.read(file.name)
  got = [
    (str(user), str(item))
    for index, user in enumerate(data.user_ids.tolist())
    for item in _of(data, index)
  ]
  assert collections.Counter(got) == collections.Counter(pairs)


ANY_IDS = st.one_of(
  st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=9),
  st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9),
)


@hypothesis.given(ANY_IDS, st.booleans())
def test_ids_are_stored_and_found_as_they_are(ids, on_disk):
  """From Parquet, through the store, and by what a command line can say."""
  frame = pl.DataFrame({"user": ids, "item": ids})
  with tempfile.TemporaryDirectory() as folder:
    frame.write_parquet(f"{folder}/a.parquet")
    data = files.read(f"{folder}/a.parquet")
    if on_disk and any(str(x).endswith("\0") for x in ids):
      with pytest.raises(InputError, match="NUL"):
        stored.write(data, f"{folder}/s")
      return
    if on_disk:
      stored.write(data, f"{folder}/s")
      data = stored.read(f"{folder}/s")
    want = sorted(set(ids))
    assert data.user_ids.tolist() == data.item_ids.tolist() == want
    users = serving.Users(data.user_ids, *[np.arange(len(want) + 1)] * 2,
                          {"all": np.zeros(len(want), int)})
    known = serving.Recommender((), None, users, *[None] * 5)
    for form in (lambda x: x, str):
      found = serving.of_users(known, [form(x) for x in ids])
      assert found.names == ids
    spelled = [f" {ids[0]}", f"{ids[0]} ", f"+{ids[0]}", f"0{ids[0]}"]
    for other in set(spelled) - set(map(str, ids)):
      with pytest.raises(InputError, match="unknown"):
        serving.of_users(known, [other])


def _digits(most):
  return st.integers(0, 10**most - 1).map(lambda x: f"{x:0{most}}")


NUMBERS = st.one_of(
  st.integers(-(2**70), 2**70).map(str),
  st.integers(17 * 10**17, 17 * 10**17 + 9).map(str),
  st.builds("{}.{}".format, st.integers(0, 17 * 10**8), _digits(3)),
  st.builds("1700000000.{}".format, _digits(9)),
)
DATES = st.builds(
  "2023-11-14T22:13:2{}.{}".format, st.integers(0, 9),
  st.one_of(_digits(3), _digits(6), _digits(9)),
)


@hypothesis.given(st.one_of(
  *(st.lists(kind, min_size=2, max_size=9) for kind in (NUMBERS, DATES))
))
def test_order_in_time_is_kept_or_refused(times):
  """Against exact decimals; equal times keep the order of the rows."""
  exact = [
    decimal.Decimal(text.rpartition("T22:13:2")[2]) for text in times
  ]
  want = sorted(range(len(times)), key=lambda row: exact[row])
  text = "user,item,time\n" + "".join(
    f"1,{row},{time}\n" for row, time in enumerate(times)
  )
  with tempfile.NamedTemporaryFile(suffix=".csv") as file:
    file.write(text.encode())
    file.flush()
    try:
      data = files.read(file.name)
    except InputError as error:
      assert "coarser unit" in str(error) and "\n" not in str(error)
      assert max(map(len, times)) > 12  # what is coarse is read
    else:
      assert _of(data, 0) == want


@hypothesis.given(
  st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=9),
  st.sampled_from(["ms", "us", "ns"]), st.integers(0, 9),
)
def test_order_of_datetimes_is_kept(ticks, unit, power):
  ticks = [tick // 10 ** (2 * power) for tick in ticks]
  times = pl.Series(ticks).cast(pl.Datetime(unit))
  data = from_columns([1] * len(ticks), range(len(ticks)), times)
  assert _of(data, 0) == sorted(range(len(ticks)), key=lambda n: ticks[n])
  assert (np.diff(data.times) == 0).tolist() == [
    a == b for a, b in itertools.pairwise(sorted(ticks))
  ]


@hypothesis.given(
  st.binary(max_size=80), st.sampled_from([".csv", ".inter", ".json", ""])
)
def test_any_bytes_are_read_or_refused(data, suffix):
  with tempfile.NamedTemporaryFile(suffix=suffix) as file:
    file.write(data)
    file.flush()
    try:
      got = files.read(file.name)
    except InputError as error:
      assert "\n" not in str(error)
    else:
      assert got.num_interactions == got.offsets[-1] > 0


# Splits.


@hypothesis.given(ROWS)
def test_leave_one_out_holds_out_the_last_two(rows):
  want = {u: h for u, h in _histories(rows).items() if len(h) >= 3}
  if not want:
    with pytest.raises(InputError):
      splits.leave_one_out(from_columns(*_columns(rows)))
    return
  split = splits.leave_one_out(from_columns(*_columns(rows)))
  assert split.interactions.user_ids.tolist() == list(want)
  for index, history in enumerate(want.values()):
    items = _of(split.interactions, index)
    assert items[: split.train_end[index]] == [i for _, i in history[:-2]]
    assert items[split.validation[index]] == history[-2][1]
    assert items[split.test[index]] == history[-1][1]


@hypothesis.given(ROWS, st.integers(1, 4), st.integers(1, 3))
def test_a_temporal_split_never_looks_ahead(rows, validation, gap):
  test = validation + gap
  histories = {
    u: h for u, h in _histories(rows).items() if h[0][0] < validation
  }
  try:
    split = splits.temporal(
      from_columns(*_columns(rows)), validation_time=validation,
      test_time=test,
    )
  except InputError:
    late = [any(t >= test for t, _ in h) for h in histories.values()]
    between = [
      any(validation <= t < test for t, _ in h) for h in histories.values()
    ]
    assert not any(late) or not any(between)
    return
  first = lambda h, low, high: next(
    (n for n, (t, _) in enumerate(h) if low <= t < high), -1
  )
  for index, history in enumerate(histories.values()):
    train = sum(t < validation for t, _ in history)
    assert split.train_end[index] == train
    assert split.validation[index] == first(history, validation, test)
    assert split.test[index] == first(history, test, 99)


# Statistics.


VALUES = st.lists(
  st.floats(0.0625, 16, width=32), min_size=3, max_size=20
)


@hypothesis.given(VALUES, st.integers(0, 9))
def test_an_interval_holds_resampled_means_and_follows_its_unit(values, seed):
  bootstrap = statistics.Bootstrap(num_resamples=50, seed=seed)
  one = statistics.mean_interval(np.array(values), bootstrap)
  np.testing.assert_allclose(one.estimate, np.mean(values))
  slack = 1e-9 * max(values)
  assert min(values) - slack <= one.low <= one.high <= max(values) + slack
  two = statistics.mean_interval(4 * np.array(values), bootstrap)
  np.testing.assert_allclose([two.low, two.high], [4 * one.low, 4 * one.high])
