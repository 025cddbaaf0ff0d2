"""The crowd against its rules, counted one by one."""

import shutil
import types

import numpy as np
import polars as pl
import pytest
from absl import flags

from experiments import commands, simulate, store
from pin_jax import disk
from pin_jax.data import crowd, files, stored
from pin_jax.types import InputError, WriteError

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
  ({"num_items": 2**31}, "num_items=2147483648"),
  ({"num_users": 2**31, "num_interactions": 2**35}, "num_users=2147483648"),
  ({"num_interactions": 6.5 * U}, "num_interactions=13000.0"),
])
def test_sizes_out_of_range_are_named(change, named):
  sizes = {"num_users": U, "num_items": V, "num_interactions": N}
  with pytest.raises(InputError, match=named):
    crowd.Crowd(**(sizes | change))


WRITERS = {
  "parquet": simulate.write_parquet, "stored": simulate.write_stored,
}


class Failing:
  """A crowd of which a chunk cannot be drawn, as where the disk is full."""

  def __init__(self, drawn, error):
    self._drawn, self._error = drawn, error

  def __getattr__(self, name):
    return getattr(self._drawn, name)

  def chunk(self, index):
    if index:
      raise self._error
    return self._drawn.chunk(index)


@pytest.mark.parametrize("form", WRITERS)
def test_what_is_written_is_whole_or_absent(drawn, tmp_path, form):
  full = OSError(28, "No space left on device")
  with pytest.raises(OSError, match="d cannot be written .No space.*name"):
    WRITERS[form](Failing(drawn, full), str(tmp_path / "d"))
  with pytest.raises(KeyboardInterrupt):
    WRITERS[form](Failing(drawn, KeyboardInterrupt()), str(tmp_path / "d"))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", WRITERS)
def test_a_rerun_mends_what_a_kill_left(drawn, tmp_path, form):
  """At a kill there is what a copy, made in the middle, has."""
  partial, left = tmp_path / ".d.partial", tmp_path / "left"

  class Copying(Failing):

    def chunk(self, index):
      if index:
        assert not (tmp_path / "d").exists()
        shutil.copytree(partial, left)
      return super().chunk(index)

  with pytest.raises(KeyboardInterrupt):
    WRITERS[form](Copying(drawn, KeyboardInterrupt()), str(tmp_path / "d"))
  assert list(left.iterdir())
  left.rename(partial)
  WRITERS[form](drawn, str(tmp_path / "d"))
  assert [x.name for x in tmp_path.iterdir()] == ["d"]
  read = files.read if form == "parquet" else stored.read
  np.testing.assert_array_equal(read(tmp_path / "d").lengths, drawn.lengths)


def test_one_writes_and_a_planted_link_is_not_followed(drawn, tmp_path):
  with disk.new_directory(tmp_path / "d"):
    with pytest.raises(InputError, match="being written by another"):
      simulate.write_parquet(drawn, str(tmp_path / "d"))
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "kept").touch()
  (tmp_path / ".e.partial").symlink_to(tmp_path / "mine")
  with pytest.raises(WriteError, match="e cannot be written"):
    simulate.write_parquet(drawn, str(tmp_path / "e"))
  assert (tmp_path / "mine" / "kept").exists()


class Flags:
  """Flags as a command reads them."""

  def __init__(self, **given):
    self.__dict__.update({
      "users": "9", "items": "9", "interactions": "90", "seed": 0,
      "format": "stored", "min_length": 3, "k_core": 0, "user": None,
      "item": None, "time": None, **given,
    })

  def __getitem__(self, name):
    return types.SimpleNamespace(value=getattr(self, name))


@pytest.mark.parametrize(("module", "given", "code", "says"), [
  (simulate, {"output": "W", "stray": "x"}, 2, "unexpected arguments: ['x']"),
  (simulate, {"output": "s3://b/x"}, 2, "s3://b/x is not on this machine"),
  (simulate, {"output": ""}, 2, "directory='' is no path"),
  (simulate, {"output": "/proc/x"}, 2, "/proc/x cannot be written"),
  (simulate, {"output": "W", "users": "1e9"}, 2, "--users=1e9"),
  (store, {"input": "A", "output": "W", "stray": "x"}, 2, "unexpected"),
  (store, {"input": "s3://b/a.csv", "output": "W"}, 2, "not on this machine"),
  (store, {"input": "", "output": "W"}, 2, "path='' is no path"),
  (store, {"input": "A", "output": "A"}, 2, "exists; delete it"),
  (store, {"input": "A", "output": "/proc/x"}, 2, "/proc/x cannot be written"),
])
def test_commands_end_in_one_line(
  tmp_path, monkeypatch, capsys, module, given, code, says
):
  file = tmp_path / "a.csv"
  file.write_text("user,item\n" + "1,2\n" * 3)
  places = {"A": str(file), "W": str(tmp_path / "w")}
  given = {key: places.get(value, value) for key, value in given.items()}
  argv = ["command", *([given.pop("stray")] if "stray" in given else [])]
  monkeypatch.setattr(flags, "FLAGS", Flags(**given))
  monkeypatch.setattr(
    commands.app, "run", lambda main, flags_parser: main(argv)
  )
  with pytest.raises(SystemExit) as end:
    commands.launch(module.main)
  said = capsys.readouterr().err
  assert end.value.code == code and says in said
  assert said.startswith("error: ") and said.count("\n") == 1
  assert [x.name for x in tmp_path.iterdir()] == ["a.csv"]
