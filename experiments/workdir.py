"""A job's directory: held by one process, written so that kills do no harm."""

import contextlib
import errno
import fcntl
import io
import os
import platform
from collections.abc import Iterator

import jax
import jaxlib
import numpy as np
import optax
import orbax.checkpoint
import polars as pl
from etils import epath

from pin_jax.types import InputError

# What may change the last bits of a result.
_LIBRARIES = (jax, jaxlib, np, optax, orbax.checkpoint)
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


def versions() -> dict[str, str]:
  """What a job runs on: libraries, Python and the kind of device."""
  return {
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    **{library.__name__: library.__version__ for library in _LIBRARIES},
  }


def write(path: epath.Path, data: bytes) -> None:
  """Writes a file as a whole: a kill leaves the old one or the new one."""
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_bytes(data)
  temporary.replace(path)


def write_rows(path: epath.Path, rows: pl.DataFrame) -> None:
  """Writes a table as Parquet, as `write` does."""
  buffer = io.BytesIO()
  rows.write_parquet(buffer)
  write(path, buffer.getvalue())


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
  """Keeps other processes out of a workdir while the block runs.

  The lock goes with the process, however it ends. File systems without locks,
  such as buckets, are not guarded.

  Args:
    workdir: an existing directory.

  Raises:
    InputError: if another process holds it.
  """
  file = workdir / "checkpoints" / "lock"
  file.parent.mkdir(parents=True, exist_ok=True)
  try:
    handle = os.open(os.fspath(file), os.O_RDWR | os.O_CREAT)
  except FileNotFoundError:  # a bucket
    yield
    return
  try:
    _lock(handle, workdir)
    yield
  finally:
    os.close(handle)


def _lock(handle: int, workdir: epath.Path) -> None:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    owner = os.pread(handle, 100, 0).decode(errors="replace").strip()
    raise InputError(
      f"workdir {workdir} is in use by {owner or 'another process'}; wait for "
      "it to end or use another --workdir"
    ) from None
  except OSError as error:
    if error.errno not in _UNSUPPORTED:
      raise
    return
  os.ftruncate(handle, 0)
  os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
