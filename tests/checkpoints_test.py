"""Checkpoints: what is restored, what is kept, and how damage is reported."""

import gc
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pin_jax.training.checkpoints import Checkpoints
from pin_jax.types import InputError, PyTree

pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def _collect():
  """Collects the futures that orbax leaves behind when a restore fails."""
  yield
  gc.collect()


class State(NamedTuple):
  params: PyTree
  optimizer: PyTree
  weighting: PyTree
  average: PyTree


def _state(seed=0, width=3):
  rng = np.random.default_rng(seed)
  params = {
    "table": jnp.asarray(rng.normal(size=(5, width)), jnp.float32),
    "half": jnp.asarray(rng.normal(size=width), jnp.bfloat16),
    "empty": {},
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  weighting = (), jnp.asarray([np.nan, -0.0, np.inf], jnp.float32)
  return State(params, optimizer.init(params), weighting, None)


def _bits(tree):
  return [
    (x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)
  ]


def _assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert _bits(got) == _bits(want)


TABLE = jax.tree_util.DictKey("table")
RECORD = {"step": 7, "values": [0.1, -1e-300], "steps": [3, 4], "stale": 0}


@pytest.fixture
def saved(tmp_path):
  """A directory with step 7 in it, written by a manager that is gone."""
  checkpoints = Checkpoints(tmp_path / "run")
  checkpoints.save(7, (_state(), _state(1).params), RECORD)
  checkpoints.close()
  return tmp_path / "run"


def test_nothing_saved_is_none(tmp_path):
  checkpoints = Checkpoints(tmp_path / "deep" / "run")
  assert checkpoints.restore(_state()) is None
  checkpoints.close()


def test_round_trip_is_bit_equal(saved):
  checkpoints = Checkpoints(saved)
  like = jax.tree.map(jnp.zeros_like, (_state(), _state().params))
  tree, record = checkpoints.restore(like)
  checkpoints.close()
  _assert_same(tree, (_state(), _state(1).params))
  assert isinstance(tree[0], State) and tree[0].average is None
  assert record == RECORD


def test_the_newest_are_kept_and_the_newest_is_restored(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (2, 9, 10):
    checkpoints.save(step, {"x": jnp.full(2, step)}, {"step": step})
  checkpoints.wait()
  steps = sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir())
  assert steps == [9, 10]
  tree, record = checkpoints.restore({"x": jnp.zeros(2, jnp.int32)})
  checkpoints.close()
  np.testing.assert_array_equal(tree["x"], [10, 10])
  assert record == {"step": 10}


def test_a_saved_tree_may_be_donated_at_once(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  x = jnp.arange(1000.0)
  checkpoints.save(1, {"x": x}, {})
  jax.jit(lambda x: x * 0, donate_argnums=0)(x)
  checkpoints.wait()
  tree, _ = checkpoints.restore({"x": jnp.zeros(1000)})
  checkpoints.close()
  np.testing.assert_array_equal(tree["x"], np.arange(1000))


def _assert_refused(directory, like):
  checkpoints = Checkpoints(directory)
  with pytest.raises(InputError) as error:
    checkpoints.restore(like)
  checkpoints.close()
  message = str(error.value)
  assert str(directory / "7") in message and "delete" in message
  assert "\n" not in message


@pytest.mark.parametrize("change", ["shape", "missing", "extra", "rank"])
def test_a_tree_of_another_shape_is_refused(saved, change):
  state, best = _state(), _state().params
  if change == "shape":
    state, best = _state(width=4), _state(width=4).params
  elif change == "missing":
    best = {"table": best["table"], "empty": {}}
  elif change == "extra":
    best = {**best, "more": jnp.zeros(2)}
  else:
    best = {**best, "table": best["table"].reshape(-1)}
  _assert_refused(saved, (state, best))


def _files(directory):
  return sorted(p for p in (directory / "7").rglob("*") if p.is_file())


def test_no_single_damaged_file_goes_unnoticed(saved, tmp_path):
  refused = 0
  like = _state(), _state().params
  for path in _files(saved):
    inner = path.relative_to(saved)
    for damage in ("deleted", "garbled"):
      copy = tmp_path / damage / inner.name
      shutil.copytree(saved, copy)
      if damage == "deleted":
        (copy / inner).unlink()
      else:
        (copy / inner).write_bytes(b"\xff" * path.stat().st_size)
      checkpoints = Checkpoints(copy)
      try:
        tree, record = checkpoints.restore(like)
        _assert_same(tree, (_state(), _state(1).params))
        assert record == RECORD
      except InputError as error:
        assert str(copy / "7") in str(error) and "\n" not in str(error)
        refused += 1
      finally:
        checkpoints.close()
      shutil.rmtree(copy)
  assert refused >= 4


def _with_rows(state, rows):
  """The state with a table of `rows` rows, those beyond the fifth 0."""
  pad = lambda x: jnp.pad(x, [(0, rows - 5), (0, 0)])
  return jax.tree_util.tree_map_with_path(
    lambda path, x: pad(x) if path[-1] == TABLE else x, state
  )


@pytest.mark.parametrize("there, here", [(5, 8), (8, 5), (6, 8), (8, 6)])
def test_tables_change_their_padding(tmp_path, there, here):
  store = Checkpoints(tmp_path, tables=("table",))
  store.save(7, _with_rows(_state(), there), RECORD)
  store.wait()
  tree, record = store.restore(_with_rows(_state(1), here))
  _assert_same(tree, _with_rows(_state(), here))
  assert record == RECORD
  store.close()


def test_rows_of_a_table_are_not_lost(tmp_path):
  """Fewer rows than are in use are refused by the digest."""
  store = Checkpoints(tmp_path, tables=("table",))
  store.save(7, _state(), RECORD)
  store.wait()
  fewer = jax.tree_util.tree_map_with_path(
    lambda path, x: x[:4] if path[-1] == TABLE else x, _state()
  )
  with pytest.raises(InputError, match="do not match their checksum"):
    store.restore(fewer)
  store.close()


def test_other_leaves_keep_their_rows(tmp_path):
  store = Checkpoints(tmp_path, tables=("other",))
  store.save(7, _state(), RECORD)
  store.wait()
  with pytest.raises(InputError, match="holds another tree.*table"):
    store.restore(_with_rows(_state(), 8))
  store.close()
