"""The crowd against its rules, counted one by one."""

import numpy as np
import polars as pl
import pytest

from experiments import simulate
from pin_jax.datasets import crowd, files, stored
from pin_jax.types import InputError

U, V, N = 2000, 500, 60_000


@pytest.fixture(scope="module")
def drawn():
  return crowd.Crowd(
    num_users=U, num_items=V, num_interactions=N, seed=3, users_a_chunk=700
  )


@pytest.fixture(scope="module")
def chunks(drawn):
  return [drawn.chunk(index) for index in range(drawn.num_chunks)]


def test_the_sizes_are_those_asked_for(drawn, chunks):
  assert [len(c.users) for c in chunks] == [700, 700, 600]
  np.testing.assert_array_equal(
    np.concatenate([c.users for c in chunks]), np.arange(U)
  )
  lengths = np.concatenate([c.lengths for c in chunks])
  np.testing.assert_array_equal(lengths, drawn.lengths)
  assert lengths.sum() == N == sum(len(c.items) for c in chunks)
  assert crowd.SHORTEST <= lengths.min() and lengths.max() > 300
  items = np.concatenate([c.items for c in chunks])
  assert items.dtype == np.int32
  assert 1 <= items.min() and items.max() <= V


def test_a_chunk_follows_from_the_seed_and_its_number(chunks):
  make = lambda seed: crowd.Crowd(
    num_users=U, num_items=V, num_interactions=N, seed=seed, users_a_chunk=700
  )
  alone = make(3).chunk(1)
  for got, want in zip(alone, chunks[1], strict=True):
    np.testing.assert_array_equal(got, want)
  assert len(make(4).chunk(1).items) != len(alone.items)


def test_activeness_has_a_long_tail(drawn):
  """The most active fifth have most of the interactions, not all."""
  lengths = np.sort(drawn.lengths)
  assert 0.5 < lengths[-U // 5 :].sum() / N < 0.9
  assert np.median(lengths) < N / U / 2


def test_items_follow_by_the_rule_of_the_stratum(chunks):
  """Half of the steps, and of the others as many as chance has it."""
  follows, count = np.zeros(5), np.zeros(5)
  for chunk in chunks:
    for user, items in enumerate(
      np.split(chunk.items, np.cumsum(chunk.lengths)[:-1])
    ):
      stratum = sum(chunk.lengths[user] >= x for x in crowd.STRATA)
      for before, after in zip(items[:-1], items[1:], strict=True):
        follows[stratum] += (after - before) % V == stratum + 1
        count[stratum] += 1
  share = follows / count
  assert (count > 1000).all()
  spread = 5 * np.sqrt(0.25 / count)
  assert (np.abs(share - crowd.FOLLOWS - 0.004) < spread + 0.004).all()


def test_times_ascend_within_a_user(chunks):
  for chunk in chunks:
    for times in np.split(chunk.times, np.cumsum(chunk.lengths)[:-1]):
      assert (np.diff(times) > 0).all()


def test_popularity_has_a_long_tail(chunks):
  """A tenth of the items: log((50 + 10) / 10) / log((500 + 10) / 10)."""
  first = np.concatenate([
    c.items[np.cumsum(c.lengths) - c.lengths] for c in chunks
  ])
  want = np.log(6) / np.log(51)
  assert abs((first <= 50).mean() - want) < 5 * np.sqrt(0.25 / U)


def test_both_forms_hold_the_same(drawn, chunks, tmp_path):
  simulate.write_parquet(drawn, str(tmp_path / "parquet"))
  simulate.write_stored(drawn, str(tmp_path / "stored"))
  read = files.read(tmp_path / "parquet")
  items = np.concatenate([c.items for c in chunks])
  np.testing.assert_array_equal(read.lengths, drawn.lengths)
  np.testing.assert_array_equal(read.item_ids[read.items - 1], items)
  on_disk = stored.read(tmp_path / "stored")
  np.testing.assert_array_equal(on_disk.items[:], items)
  np.testing.assert_array_equal(on_disk.lengths, drawn.lengths)
  times = pl.read_parquet(tmp_path / "parquet" / "part-00001.parquet")
  np.testing.assert_array_equal(times["timestamp"], chunks[1].times)
  for write, name in (
    (simulate.write_parquet, "parquet"), (simulate.write_stored, "stored")
  ):
    with pytest.raises(InputError, match="exists"):
      write(drawn, str(tmp_path / name))


@pytest.mark.parametrize(("change", "named"), [
  ({"num_users": 0}, "num_users=0"), ({"num_items": 1}, "num_items=1"),
  ({"num_interactions": 5 * U}, "num_interactions="),
  ({"num_interactions": 501 * U}, "num_interactions="), ({"seed": -1}, "seed"),
])
def test_sizes_out_of_range_are_named(change, named):
  sizes = {"num_users": U, "num_items": V, "num_interactions": N}
  with pytest.raises(InputError, match=named):
    crowd.Crowd(**(sizes | change))
