"""The crowd against its rules, counted one by one; what stores it."""

import shutil
import types

import numpy as np
import pytest
from absl import flags

from experiments import commands, store
from pin_jax import disk
from pin_jax.data import crowd, stored
from pin_jax.types import InputError, WriteError

U, V, N = 2000, 500, 60_000
SIZES = {"num_users": U, "num_items": V, "num_interactions": N, "seed": 3}


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(crowd, "USERS_A_CHUNK", 700)
    yield


@pytest.fixture(scope="module")
def drawn():
  return crowd.Crowd(**SIZES)


@pytest.fixture(scope="module")
def histories(drawn):
  """Items of every user."""
  items = [drawn.chunk(index) for index in range(drawn.num_chunks)]
  return np.split(np.concatenate(items), np.cumsum(drawn.lengths)[:-1])


def test_the_sizes_are_those_asked_for(drawn, histories):
  lengths = np.array([len(items) for items in histories])
  np.testing.assert_array_equal(lengths, drawn.lengths)
  assert len(lengths) == U and lengths.sum() == N
  assert crowd.SHORTEST <= lengths.min() and lengths.max() > 300
  items = np.concatenate(histories)
  assert items.dtype == np.int32
  assert 1 <= items.min() and items.max() <= V


def test_a_chunk_follows_from_the_seed_and_its_number(histories):
  alone = crowd.Crowd(**SIZES).chunk(1)
  np.testing.assert_array_equal(alone, np.concatenate(histories[700:1400]))
  assert len(crowd.Crowd(**SIZES | {"seed": 4}).chunk(1)) != len(alone)


def test_activeness_has_a_long_tail(drawn):
  """The most active fifth have most of the interactions, not all."""
  lengths = np.sort(drawn.lengths)
  assert 0.5 < lengths[-U // 5 :].sum() / N < 0.9
  assert np.median(lengths) < N / U / 2


def test_items_follow_by_the_rule_of_the_stratum(histories):
  """Half of the steps, and of the others as many as chance has it."""
  follows, count = np.zeros(5), np.zeros(5)
  for items in histories:
    stratum = sum(len(items) >= x for x in crowd.STRATA)
    follows[stratum] += (np.diff(items) % V == stratum + 1).sum()
    count[stratum] += len(items) - 1
  share = follows / count
  assert (count > 1000).all()
  spread = 5 * np.sqrt(0.25 / count)
  assert (np.abs(share - crowd.FOLLOWS - 0.004) < spread + 0.004).all()


def test_popularity_has_a_long_tail(histories):
  """A tenth of the items: log((50 + 10) / 10) / log((500 + 10) / 10)."""
  first = np.array([items[0] for items in histories])
  want = np.log(6) / np.log(51)
  assert abs((first <= 50).mean() - want) < 5 * np.sqrt(0.25 / U)


def test_what_is_stored_is_the_crowd(drawn, histories, tmp_path):
  store.write_crowd(drawn, tmp_path / "d")
  on_disk = stored.read(tmp_path / "d")
  np.testing.assert_array_equal(on_disk.items, np.concatenate(histories))
  np.testing.assert_array_equal(on_disk.lengths, drawn.lengths)


@pytest.mark.parametrize(("change", "named"), [
  ({"num_users": 0}, "num_users=0"), ({"num_items": 1}, "num_items=1"),
  ({"num_interactions": 5 * U}, "num_interactions="),
  ({"num_interactions": 501 * U}, "num_interactions="), ({"seed": -1}, "seed"),
  ({"num_items": 2**31}, "num_items=2147483648"),
  ({"num_users": 2**31, "num_interactions": 2**35}, "num_users=2147483648"),
  ({"num_interactions": 6.5 * U}, "num_interactions=13000.0"),
])
def test_sizes_out_of_range_are_named(change, named):
  with pytest.raises(InputError, match=named):
    crowd.Crowd(**(SIZES | change))


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


def test_what_is_written_is_whole_or_absent(drawn, tmp_path):
  full = OSError(28, "No space left on device")
  with pytest.raises(OSError, match="d cannot be written .No space.*name"):
    store.write_crowd(Failing(drawn, full), tmp_path / "d")
  with pytest.raises(KeyboardInterrupt):
    store.write_crowd(Failing(drawn, KeyboardInterrupt()), tmp_path / "d")
  assert not list(tmp_path.iterdir())


def test_a_rerun_mends_what_a_kill_left(drawn, tmp_path):
  """At a kill there is what a copy, made in the middle, has."""
  partial, left = tmp_path / ".d.partial", tmp_path / "left"

  class Copying(Failing):

    def chunk(self, index):
      if index:
        assert not (tmp_path / "d").exists()
        shutil.copytree(partial, left)
      return super().chunk(index)

  with pytest.raises(KeyboardInterrupt):
    store.write_crowd(Copying(drawn, KeyboardInterrupt()), tmp_path / "d")
  assert list(left.iterdir())
  left.rename(partial)
  store.write_crowd(drawn, tmp_path / "d")
  assert [x.name for x in tmp_path.iterdir()] == ["d"]
  np.testing.assert_array_equal(
    stored.read(tmp_path / "d").lengths, drawn.lengths
  )


def test_one_writes_and_a_planted_link_is_not_followed(drawn, tmp_path):
  with disk.new_directory(tmp_path / "d"):
    with pytest.raises(InputError, match="being written by another"):
      store.write_crowd(drawn, tmp_path / "d")
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "kept").touch()
  for link in (".e.partial", ".f.lock"):
    (tmp_path / link).symlink_to(tmp_path / "mine")
    with pytest.raises((InputError, WriteError), match="cannot be written"):
      store.write_crowd(drawn, tmp_path / link[1])
  assert (tmp_path / "mine" / "kept").exists()


class Flags:
  """Flags as a command reads them."""

  def __init__(self, **given):
    self.__dict__.update({
      "users": 9, "items": 9, "interactions": 90, "seed": 0,
      "input": None, "min_length": 3, "k_core": 0, "user": None, "item": None,
      "time": None, **given,
    })

  def __getitem__(self, name):
    return types.SimpleNamespace(value=getattr(self, name))


@pytest.mark.parametrize(("given", "says"), [
  ({"output": "W", "stray": "x"}, "unexpected arguments: ['x']"),
  ({"output": "s3://b/x"}, "s3://b/x is not on this machine"),
  ({"output": "/proc/x"}, "/proc/x cannot be written"),
  ({"output": "W", "users": None}, "--input is missing; give a file to read"),
  ({"input": "A", "output": "A"}, "exists; delete it"),
])
def test_the_command_ends_in_one_line(
  tmp_path, monkeypatch, capsys, given, says
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
    commands.launch(store.main)
  said = capsys.readouterr().err
  assert end.value.code == 2 and says in said
  assert said.startswith("error: ") and said.count("\n") == 1
  assert [x.name for x in tmp_path.iterdir()] == ["a.csv"]
