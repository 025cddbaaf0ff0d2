"""A job's directory: held by one process, written so that kills do no harm."""

import contextlib
import io
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jaxlib
import numpy as np
import optax
import orbax.checkpoint
import polars as pl
import scipy
from etils import epath

from experiments import processes
from pin_jax import disk

# What may change the last bits of a result.
_LIBRARIES = (jax, jaxlib, np, optax, orbax.checkpoint)


def versions() -> dict[str, str]:
  """What a job runs on: libraries, Python, kind of device, a CPU's cores.

  XLA shares a sum out among the cores, so that its last bits follow from their
  number.
  """
  device = jax.devices()[0]
  cores = {"cores": str(processes.usable_cores())}
  return {
    "python": platform.python_version(),
    "device": device.device_kind,
    **(cores if device.platform == "cpu" else {}),
    **{library.__name__: library.__version__ for library in _LIBRARIES},
  }


def provenance() -> dict[str, str]:
  """What a result was computed with: `versions`, and the state of the code."""
  command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
  try:
    commit = subprocess.run(
      command, cwd=pathlib.Path(__file__).parent, capture_output=True,
      text=True, check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    commit = "not a checkout"
  return {
    "code": commit, **versions(), "devices": str(jax.device_count()),
    "polars": pl.__version__, "scipy": scipy.__version__,
    "machine": platform.machine(),
  }


def write_rows(path: epath.Path, rows: pl.DataFrame) -> None:
  """Writes a table as Parquet, as `disk.write` does."""
  buffer = io.BytesIO()
  rows.write_parquet(buffer)
  disk.write({path: buffer.getvalue()})


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
  """Keeps other processes out of a workdir while the block runs.

  Args:
    workdir: the directory, made where it is missing; a bucket is not guarded.

  Raises:
    InputError: if another process holds it, or it cannot be.
    WriteError: if it cannot be written.
  """
  with contextlib.ExitStack() as stack:
    with disk.writing(f"--workdir={workdir}"):
      (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
      if "://" not in os.fspath(workdir):
        stack.enter_context(disk.locked(
          workdir / "checkpoints" / "lock",
          f"workdir {workdir} is in use by another process; wait for it to end "
          "or use another --workdir",
        ))
    with disk.writing(workdir):
      disk.clear(workdir)
    yield


def absolute(data: Mapping[str, Any]) -> dict[str, str]:
  """The paths of a `data` section, such as find the data from any folder."""
  keys = "path", "data_dir", "manual_dir"
  return {
    key: data[key] if "://" in data[key] else os.path.abspath(
      os.path.expanduser(data[key])
    )
    for key in keys if data.get(key)
  }


def read_json(path: epath.Path, **needed: Any) -> dict[str, Any]:
  """Reads a JSON object of a workdir.

  Args:
    path: of the file.
    **needed: key -> any value of the type that the file must have there.

  Raises:
    InputError: if it is damaged.
  """
  with disk.reading(path, "delete it or use another workdir"):
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, like in {None: {}, **needed}.items():
      value = content if key is None else content[key]
      if not isinstance(value, type(like)):
        raise TypeError(f"{key or 'it'} is {str(value)[:50]!r}")
    return content
