"""Batches from disk against those of the device, bit by bit."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from experiments import build, stages
from experiments.configs import base
from experiments.methods import METHODS
from experiments.problem import fingerprint, make_problem
from pin_jax.data import batches, stored
from pin_jax.data.interactions import from_columns
from pin_jax.data.splits import leave_one_out
from pin_jax.evaluation import ranking
from pin_jax.models import plugins
from pin_jax.models.gru4rec import gru4rec
from pin_jax.scale import sharding, streaming
from pin_jax.types import InputError, Requests

USERS, ITEMS, LENGTH, ROWS, STEPS, DISPATCH = 300, 50, 6, 8, 6, 4

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def data():
  """Histories of 3 to 40 items."""
  rng = np.random.default_rng(0)
  users = np.repeat(np.arange(USERS), rng.integers(3, 40, USERS))
  items = rng.integers(0, ITEMS, len(users))
  return from_columns([f"u{u:03}" for u in users], items)


@pytest.fixture(scope="module")
def path(data, tmp_path_factory):
  path = tmp_path_factory.mktemp("stored") / "data"
  stored.write(data, path)
  return path


def test_what_is_stored_is_read_again(data, path):
  items = data.items
  for stream in (True, False):
    again = stored.read(path, stream=stream)
    assert again.items.flags.owndata != stream  # else it is mapped
    np.testing.assert_array_equal(again.items, items)
    np.testing.assert_array_equal(again.offsets, data.offsets)
    assert again.user_ids.tolist() == data.user_ids.tolist()
    np.testing.assert_array_equal(again.item_ids, data.item_ids)
    assert again.fingerprint == data.fingerprint
    assert again.notes == data.notes


def _changed(name, change):
  def apply(folder):
    values = np.load(folder / f"{name}.npy")
    np.save(folder / f"{name}.npy", change(values))

  return apply


def _huge_header(folder):
  """Claims 2^40 lengths of the few bytes there are."""
  file = folder / "lengths.npy"
  whole = file.read_bytes()
  size = str(USERS).encode()
  file.write_bytes(whole.replace(b"(%s,)" % size, b"(%d,)" % 2**40, 1))


def _garbled_header(folder):
  file = folder / "user_ids.npy"
  file.write_bytes(file.read_bytes().replace(b"{", b"(", 1))


def _file(name, content):
  return lambda folder: (folder / name).write_bytes(content)


def _former_form(folder):
  """Whose items were an ArrayRecord file."""
  (folder / "items.npy").rename(folder / "items.array_record")
  about = json.loads((folder / "about.json").read_text())
  (folder / "about.json").write_text(json.dumps(about | {"schema": 1}))


@pytest.mark.parametrize(("harm", "says"), [
  (_changed("lengths", lambda x: np.roll(x, 1)), "fingerprint"),
  (_changed("lengths", lambda x: x + (np.arange(len(x)) == 0)), "fingerprint"),
  (_changed("lengths", lambda x: x / 2), "."),
  (_changed("lengths", lambda x: x * 2**50), "."),
  (_changed("lengths", lambda x: x[1:]), "fingerprint"),
  (_huge_header, "."),
  (_garbled_header, "."),
  (_file("item_ids.npy", b""), "."),
  (_file("items.npy", b""), "."),
  (_changed("user_ids", lambda x: x[:-1]), "fingerprint"),
  (_changed("user_ids", lambda x: x[::-1]), "fingerprint"),
  (_changed("item_ids", lambda x: x[:-1]), "fingerprint"),
  (_changed("items", lambda x: x[::-1]), "fingerprint"),
  (_changed("items", lambda x: x[:-1]), "fingerprint"),
  (_changed("items", lambda x: x.astype(np.int64)), "fingerprint"),
  (_file("about.json", b"[]"), "."),
  (lambda folder: (folder / "about.json").unlink(), "."),
  (_former_form, "its form is 1, this version reads 2"),
])
def test_what_was_changed_is_refused(data, tmp_path, harm, says):
  stored.write(data, tmp_path / "s")
  harm(tmp_path / "s")
  for stream in (True, False):
    with pytest.raises(InputError, match=f"s is .*{says}.*store the") as error:
      stored.read(tmp_path / "s", stream=stream)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "says"), [
  ({"items": [np.array([1, 2, 2**32 + 1])]}, "items span 1 to 4294967297"),
  ({"items": [np.array([1, 2, 3])]}, "items span 1 to 3, not 1 to 2"),
  ({"items": [np.array([0, 1, 2])]}, "items span 0 to 2"),
  ({"items": [np.array([1.0, 2.0, 1.5])]}, "items are float64"),
  ({"lengths": np.array([4, -1])}, "lengths span -1 to 4"),
  ({"lengths": np.array([1.5, 1.5])}, "lengths are float64"),
  ({"items": [np.array([1, 2])]}, "2 items for 3"),
  ({"user_ids": np.array([7])}, "1 user_ids for 2 lengths"),
  ({"item_ids": np.array(["a", "b\0"], object)}, "NUL"),
  ({"item_ids": np.array(["a", 3], object)}, "no text"),
])
def test_what_does_not_fit_is_not_stored(tmp_path, change, says):
  good = {
    "lengths": np.array([2, 1]), "items": [np.array([1, 2, 2])],
    "user_ids": np.array([7, 8]), "item_ids": np.array(["a", "b"], object),
    "name": "x", "notes": {},
  }
  with pytest.raises(InputError, match=says):
    stored.write_chunks(tmp_path / "x", **(good | change))
  assert not list(tmp_path.iterdir())
  stored.write_chunks(tmp_path / "x", **good)
  with pytest.raises(InputError, match="exists"):
    stored.write_chunks(tmp_path / "x", **good)
  again = stored.read(tmp_path / "x")
  assert again.item_ids[again.items[:] - 1].tolist() == ["a", "b", "b"]


@pytest.mark.parametrize("name", ["a b", "a\nb", "é", "x@3", "d[1]", "a*b"])
def test_a_directory_of_any_name_is_read_back(data, path, tmp_path, name):
  """Also where a sibling fits its name as a pattern."""
  few = data.select_users(np.arange(USERS) < 3)
  stored.write(data, tmp_path / "d1")
  stored.write(few, tmp_path / name)
  again = stored.read(tmp_path / name)
  assert again.fingerprint == few.fingerprint
  np.testing.assert_array_equal(again.items[:], few.items)


def _drawn(split, draw):
  """(windows function, what it draws from, batch function of one key)."""
  groups = np.arange(split.interactions.num_users) % 2
  how = batches.Draw(ROWS, LENGTH, draw)
  on_device = batches.make_sequences(split)
  if draw == "validation":
    pool = batches.make_held_out(split.validation, groups, num_groups=2)
  else:
    pool = batches.make_pool(
      batches.training_targets(split), groups, num_groups=2, length=LENGTH
    )
  return (
    lambda key, t, pool: how.windows(jax.random.fold_in(key, t), pool), pool,
    lambda key: how.batch(key, on_device, pool),
  )


@pytest.mark.parametrize("draw", [
  "interactions", pytest.param("users", marks=pytest.mark.slow), "validation",
])
def test_batches_are_those_of_the_device(data, path, draw):
  """In order, from the start again, of another size, and the last twice."""
  windows, pool, batch = _drawn(leave_one_out(data), draw)
  batch = jax.jit(batch)
  sequences = batches.host_sequences(leave_one_out(stored.read(path)))
  key = jax.random.key(3)
  stream = streaming.Stream(
    sequences, windows, pool, key=key, num_steps=STEPS,
    dispatch=DISPATCH, length=LENGTH, layout=sharding.LOCAL,
  )
  for t, count in ((0, 4), (4, 2), (0, 4), (5, 1), (4, 2), (4, 2)):
    streamed = stream(t, count)
    for step in range(t, t + count):
      got = streaming.batch_of(streamed, step)
      want = batch(jax.random.fold_in(key, step))
      for name, value in got._asdict().items():
        wanted = getattr(want, name)
        assert value.dtype == wanted.dtype
        np.testing.assert_array_equal(value, wanted, err_msg=name)


def test_ranks_are_those_of_the_device(data, path):
  split = leave_one_out(data)
  backbone = gru4rec(data.num_items, length=LENGTH, width=4)
  rank = ranking.make_ranker(
    plugins.Model(backbone, None), num_items=data.num_items, length=LENGTH,
  )
  weights = plugins.Weights(backbone.init(jax.random.key(0)), None)
  users = np.random.default_rng(2).permutation(USERS)[:70].astype(np.int32)
  requests = Requests(users, split.test[users], users * 0)
  want = rank(weights, batches.make_sequences(split), requests)
  on_disk = batches.host_sequences(leave_one_out(stored.read(path)))
  streamed = streaming.make_ranker(
    rank, on_disk, users=32, layout=sharding.LOCAL
  )
  for got, wanted in zip(streamed(weights, None, requests), want, strict=True):
    np.testing.assert_array_equal(got, wanted)
  nobody = Requests(*(x[:0] for x in requests))
  assert len(streamed(weights, None, nobody).rank) == 0


def _config(path, stream):
  config = base.default()
  config.data = ConfigDict(
    {"source": "stored", "path": str(path), "stream": stream}
  )
  config.groups.num_groups = 3
  config.backbone.update(name="gru4rec", length=LENGTH, width=8, dropout=0.1)
  config.plugin.hidden = 4
  config.batch_size = 24
  config.backbone_steps = config.plugin_steps = 10
  config.dispatch = config.validation.every = 5
  config.pin.diagnose_every = 0
  return config


def _trained(config, workdir):
  build.check(config)
  problem = make_problem(config)
  networks = build.make_networks(
    config, problem.split.interactions.num_items
  )
  out = stages.Trainer(config, problem, networks, epath.Path(workdir), (0,))
  for stage in METHODS["pin"].stages:
    out.train(stage)
  return fingerprint(problem), out


@pytest.mark.slow
def test_a_job_from_disk_is_the_job_from_the_device(path, tmp_path):
  found = {
    stream: _trained(_config(path, stream), tmp_path / str(stream))
    for stream in (True, False)
  }
  assert found[True][0] == found[False][0]
  assert found[True][1].sequences is None
  for stage, result in found[False][1].trained.items():
    streamed = found[True][1].trained[stage][0]
    assert streamed.best_values == result[0].best_values
    jax.tree.map(np.testing.assert_array_equal, streamed.best, result[0].best)


@pytest.mark.parametrize(("key", "value"), [
  ("num_seeds", 2), ("split.protocol", "temporal"), ("plugin.name", "memory"),
  ("loss.proposal", "popularity"), ("methods", ("base", "pin_exact")),
])
def test_what_needs_all_interactions_is_refused(path, key, value):
  config = _config(path, True)
  changes = {key: value, "loss.name": "sampled_softmax", "seeds": (0, 1)}
  config.update_from_flattened_dict(changes)
  config.memory.recent = LENGTH
  with pytest.raises(InputError, match=f"{key}=.*data.stream=False"):
    build.check(config)
  config.data.stream = False
  build.check(config)


def test_users_that_the_split_drops_are_not_stored(tmp_path):
  short = from_columns([0, 0, 0, 1], [1, 2, 3, 1])
  stored.write(short, tmp_path / "short")
  with pytest.raises(InputError, match="min_length=3"):
    leave_one_out(stored.read(tmp_path / "short"))
