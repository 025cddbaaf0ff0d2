"""Fixtures that several test modules share."""

import os
import pathlib

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
  """Compiles each program once a session, however many tests build it."""
  jax.config.update(
    "jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache"))
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module")
def compile_quickly():
  """For modules whose programs take longer to compile than to run."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


_DEFAULT = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> pathlib.Path:
  """Directory of the real data sets; skips the test where it is absent."""
  path = pathlib.Path(os.environ.get("PIN_JAX_DATA", _DEFAULT))
  if not path.is_dir():
    pytest.skip(f"real data sets are absent: {path} (set PIN_JAX_DATA)")
  return path
