"""Our own files: written whole or not at all, read whole or refused."""

import contextlib
import errno
import io
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import IO

import filelock
import polars as pl
from etils import epath

from pin_jax.types import InputError, WriteError

_WRONG_PATH = (
  errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
  errno.ENOENT, errno.ENOTDIR,
)


def place(
  name: str, path: epath.PathLike, *, here: bool = False
) -> epath.Path:
  """A path as it is meant: `~` is the home directory.

  Args:
    name: of the argument, for the message.
    path: of a file or directory, which need not exist.
    here: whether it must be on this machine.

  Raises:
    InputError: for what is no path, is empty, or is not where it must be.
  """
  if not isinstance(path, str | os.PathLike):
    raise InputError(f"{name}={path!r} is no path; give one")
  text = os.fspath(path)
  if not text.strip() or "\0" in text:
    raise InputError(f"{name}={text!r} is no path; name a file or directory")
  if here and "://" in text:
    raise InputError(
      f"{name}={text} is not on this machine; copy it here or mount it"
    )
  return epath.Path(text).expanduser()


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
  """What the system refuses in the block becomes a line that names the path.

  Raises:
    InputError: if there can be no such file.
    WriteError: if it cannot be written as things stand.
  """
  try:
    yield
  except WriteError:
    raise
  except OSError as error:
    kind = InputError if error.errno in _WRONG_PATH else WriteError
    raise kind(
      f"{path} cannot be written ({error.strerror or brief(error)}); free "
      "space there, make it writable or name another place"
    ) from error


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[IO[bytes]]:
  """Yields a file that takes the place of `path` once it is whole.

  Its directory is made where it is missing. Until the block ends the file has a
  name that nobody can foresee and that was not there before. Raises as
  `writing`.
  """
  path = epath.Path(path)
  temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
  bucket = "://" in os.fspath(path)  # which knows no exclusive creation
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.exists(path) and not os.path.isfile(path):  # such as a device
      with open(path, "wb") as file:
        yield file
      return
    try:
      with temporary.open("wb") if bucket else open(temporary, "xb") as file:
        yield file
      temporary.replace(path)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise


def clear(directory: epath.Path) -> None:
  """Deletes what kills of processes that wrote in a directory left there."""
  for path in directory.iterdir():
    if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
      path.unlink(missing_ok=True)


def write(files: Mapping[epath.PathLike, bytes | str]) -> None:
  """Writes files, {path: content}, none of them before all are on the disk.

  Raises as `writing`; every file is then as it was.
  """
  with contextlib.ExitStack() as stack:
    for path, data in files.items():
      file = stack.enter_context(replacing(path))
      file.write(data.encode() if isinstance(data, str) else data)
      file.flush()


@contextlib.contextmanager
def reading(path: epath.PathLike, remedy: str) -> Iterator[None]:
  """Any exception of the block but of output is an InputError with the path."""
  try:
    yield
  except (InputError, WriteError, UnicodeEncodeError):
    raise
  except Exception as error:  # content can be wrong in any way
    if isinstance(error, OSError) and error.filename is None:
      raise  # of what the block writes to
    raise InputError(
      f"{path} is damaged or not what it should be ({brief(error)}); {remedy}"
    ) from error


def read_parquet(data: bytes, most_rows: int | None = None) -> pl.DataFrame:
  """The table of a Parquet file, of which no more than `most_rows` are read.

  Where the reader panics it raises ValueError, and is not heard.
  """
  with unheard():
    try:
      return pl.read_parquet(io.BytesIO(data), n_rows=most_rows)
    except pl.exceptions.PanicException as error:
      raise ValueError(brief(error)) from None


@contextlib.contextmanager
def unheard() -> Iterator[None]:
  """The process's standard error goes nowhere while the block runs."""
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


def brief(error: BaseException) -> str:
  """What an exception says, in one line."""
  text = " ".join(str(error).split())[:200]
  return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check_new(path: epath.PathLike) -> pathlib.Path:
  """The path of a directory to make; raises InputError where it exists."""
  path = pathlib.Path(place("directory", path, here=True))
  if os.path.lexists(path):
    raise InputError(f"{path} exists; delete it or give another directory")
  return path


@contextlib.contextmanager
def new_directory(path: epath.PathLike) -> Iterator[pathlib.Path]:
  """Makes a directory as a whole: a kill leaves none, and a rerun mends.

  The block fills another one beside it, `.NAME.partial`. What a killed run has
  left there is deleted; a run that lives keeps it.

  Raises:
    InputError: if it exists, or another process is writing it.
    WriteError: if it cannot be written.
  """
  path = check_new(path)
  partial, lock = (
    path.with_name(f".{path.name}.{x}") for x in ("partial", "lock")
  )
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{path} is being written by another process; wait for it"
    with locked(lock, busy):
      try:
        check_new(path)
        if os.path.lexists(partial):
          shutil.rmtree(partial)  # which follows no link
        partial.mkdir()
        try:
          yield partial
          partial.rename(path)
        finally:
          shutil.rmtree(partial, ignore_errors=True)
      finally:
        lock.unlink()


@contextlib.contextmanager
def locked(file: epath.PathLike, busy: str | None = None) -> Iterator[None]:
  """Lets one process after another into the block.

  The lock goes with the process, however it ends. File systems without locks
  are not guarded.

  Args:
    file: of the lock, made where it is missing.
    busy: message where another process has the lock; None waits for it.

  Raises:
    InputError: with that message.
    OSError: if there can be no such file.
  """
  # Where there can be no such file, the library would wait for it.
  os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW))
  lock = filelock.FileLock(os.fspath(file), timeout=-1 if busy is None else 0)
  try:
    lock.acquire()
  except filelock.Timeout:
    raise InputError(busy) from None
  except NotImplementedError:  # of such a file system
    pass
  try:
    yield
  finally:
    lock.release()
