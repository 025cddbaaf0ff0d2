"""Fixtures that several test modules share."""

import os
import pathlib

import pytest

_DEFAULT = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> pathlib.Path:
  """Directory of the real data sets; skips the test where it is absent."""
  path = pathlib.Path(os.environ.get("PIN_JAX_DATA", _DEFAULT))
  if not path.is_dir():
    pytest.skip(f"real data sets are absent: {path} (set PIN_JAX_DATA)")
  return path
