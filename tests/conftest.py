"""Fixtures that several test modules share."""

import ctypes
import gc
import os
import pathlib
import tempfile

import jax
import pytest

from pin_jax.training import objectives


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
  """Compiles each program once, for all workers and the programs they start."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  root = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    root = root.parent
  for name, value in (
    ("jax_compilation_cache_dir", str(root / "cache")),
    ("jax_persistent_cache_min_compile_time_secs", 0.0),
  ):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory):
  """What libraries forget, such as TFDS its folders, goes with pytest's own."""
  tempfile.tempdir = os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))


_MOST = 1e9  # bytes of a worker, beyond which it lets go of its programs


@pytest.fixture(autouse=True)
def _programs():
  """Keeps a worker's memory bounded, where the system says how much it is."""
  yield
  statm = pathlib.Path("/proc/self/statm")
  if not statm.exists():
    return
  pages = int(statm.read_text().split()[1])
  if pages * os.sysconf("SC_PAGE_SIZE") > _MOST:
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory is kept


@pytest.fixture(scope="module")
def compile_quickly():
  """For modules whose programs take longer to compile than to run."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def few_at_a_time():
  """Chunks of positions that are small enough for several to be needed."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(objectives, "CHUNK", 4)
    yield


_DEFAULT = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> pathlib.Path:
  """Directory of the real data sets; skips the test where it is absent."""
  path = pathlib.Path(os.environ.get("PIN_JAX_DATA", _DEFAULT))
  if not path.is_dir():
    pytest.skip(f"real data sets are absent: {path} (set PIN_JAX_DATA)")
  return path
