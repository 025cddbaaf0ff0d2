"""Paths on this machine: checked, held by one process, written as a whole."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

from pin_jax.types import InputError


def local(path: epath.PathLike, name: str = "path") -> epath.Path:
  """The path with `~` expanded.

  Args:
    path: of a file or directory on this machine, which need not exist.
    name: what to call it where it is none.

  Raises:
    InputError: for what is no path, is empty, or names another machine.
  """
  if not isinstance(path, str | os.PathLike):
    raise InputError(f"{name}={path!r} is no path; give one")
  text = os.fspath(path)
  if not text or "\0" in text:
    raise InputError(f"{name}={text!r} is no path; give one that is not empty")
  if "://" in text:
    raise InputError(
      f"{name}={text} is not on this machine; copy it here or mount it"
    )
  return epath.Path(text).expanduser()


def _open_directory(path: epath.Path) -> int:
  flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
  return os.open(os.fspath(path), flags)


def check_new(path: epath.PathLike) -> pathlib.Path:
  """The path of a directory to make; raises InputError where it exists."""
  path = pathlib.Path(local(path, "directory"))
  if os.path.lexists(path):
    raise InputError(f"{path} exists; delete it or give another directory")
  return path


@contextlib.contextmanager
def new_directory(path: epath.PathLike) -> Iterator[pathlib.Path]:
  """Makes a directory as a whole: a kill leaves none, and a rerun mends.

  It is filled under another name beside its own, `.NAME.partial`. What a killed
  run has left there is deleted; a run that lives keeps it.

  Args:
    path: of the directory, which must not exist.

  Yields:
    Where to write.

  Raises:
    InputError: if it exists, or another process is writing it.
    OSError: if it cannot be written; nothing is left then.
  """
  path = check_new(path)
  partial = path.with_name(f".{path.name}.partial")
  with contextlib.ExitStack() as stack:
    try:
      partial.parent.mkdir(parents=True, exist_ok=True)
      with contextlib.suppress(FileExistsError):
        partial.mkdir()
      handle = _open_directory(partial)
      stack.callback(os.close, handle)
      _hold(handle, f"{path} is being written by another process; wait for it")
      check_new(path)
      stack.callback(shutil.rmtree, partial, ignore_errors=True)
      for left in partial.iterdir():
        left.unlink()
      yield partial
      partial.rename(path)
    except OSError as error:
      why = error.strerror or error
      raise OSError(
        f"{path} cannot be written ({why}); free space there, make it writable "
        "or give another directory"
      ) from error


def _hold(handle: int, held: str) -> None:
  """Locks without waiting; file systems without locks are not guarded."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise InputError(held) from None
  except OSError:
    pass


@contextlib.contextmanager
def one_at_a_time(directory: epath.PathLike) -> Iterator[Any]:
  """Lets one process after another into the block, by a lock on a directory.

  Args:
    directory: made where it is missing.
  """
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  handle = _open_directory(directory)
  try:
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)
