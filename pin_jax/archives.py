"""Archives: named members in one sealed file, an uncompressed zip.

The zip's comment, its last 64 bytes, is the SHA-256 of all bytes before it, so
that a file is read as it was written or refused. Nothing is unpacked to disk,
and nothing expands: a member takes the bytes that it takes in the file.
"""

import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from typing import IO, Any

from etils import epath

from pin_jax import disk
from pin_jax.types import InputError

MANIFEST = "manifest.json"
_SEAL = 64  # hexadecimal digits
_CHUNK = 1 << 20
_MOST_MANIFEST = 1 << 24  # bytes


def write(
  path: epath.PathLike, manifest: Mapping[str, Any], members: Mapping[str, Any]
) -> None:
  """Writes an archive as a whole: a kill leaves the old file or the new one.

  Args:
    path: of the file.
    manifest: JSON; gets the sizes and SHA-256 sums of the members as `members`.
    members: name -> bytes, or a flat array of them.

  Raises:
    WriteError: if it cannot be written.
  """
  sums = {
    name: {"bytes": memoryview(data).nbytes, "sha256": _digest(data)}
    for name, data in members.items()
  }
  text = json.dumps({**manifest, "members": sums}, indent=1)
  with disk.writing(path), tempfile.TemporaryFile() as file:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
      archive.comment = b"0" * _SEAL
      archive.writestr(zipfile.ZipInfo(MANIFEST), text)
      for name, data in members.items():  # ZipInfo: the same date always
        info = zipfile.ZipInfo(name)
        with archive.open(info, "w", force_zip64=True) as member:
          member.write(data)
    seal = _seal(file)
    file.seek(-_SEAL, io.SEEK_END)
    file.write(seal)
    file.seek(0)
    with disk.replacing(path) as target:
      shutil.copyfileobj(file, target, _CHUNK)


def read(path: epath.PathLike) -> tuple[dict[str, Any], dict[str, bytes]]:
  """Reads an archive.

  Args:
    path: of the file.

  Returns:
    (manifest, name -> bytes of the other members).

  Raises:
    InputError: if the file is absent, no archive, or damaged.
  """
  path = disk.place("path", path)
  if not path.is_file():
    raise InputError(f"{path} does not exist or is no file; check the path")
  with path.open("rb") as file:
    try:
      sealed = _seal(file)
      if file.read(_SEAL) != sealed:
        raise _damaged(path, "its bytes do not match its checksum")
      return _members(path, file)
    except (
      zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError,
      NotImplementedError, RuntimeError, OSError,
    ) as error:
      if isinstance(error, InputError):
        raise
      raise _damaged(path, str(error)) from error


def _members(
  path: epath.Path, file: IO[bytes]
) -> tuple[dict[str, Any], dict[str, bytes]]:
  size = file.seek(0, io.SEEK_END)
  with zipfile.ZipFile(file) as archive:
    infos = {info.filename: info for info in archive.infolist()}
    stored = all(
      info.compress_type == zipfile.ZIP_STORED
      and info.file_size == info.compress_size for info in infos.values()
    )
    whole = sum(info.file_size for info in infos.values())
    if not stored or whole > size:
      raise _damaged(path, "its members are compressed or overlap")
    if MANIFEST not in infos:
      raise _damaged(path, f"it has no {MANIFEST}")
    if infos[MANIFEST].file_size > _MOST_MANIFEST:
      raise _damaged(path, f"its {MANIFEST} has over {_MOST_MANIFEST:,} bytes")
    manifest = json.loads(archive.read(MANIFEST))
    members = {}
    for name, known in manifest["members"].items():
      if name not in infos:
        raise _damaged(path, f"its member {name} is missing")
      members[name] = archive.read(name)
      if _digest(members[name]) != known["sha256"]:
        raise _damaged(path, f"its member {name} does not match its checksum")
  return manifest, members


def _damaged(path: epath.Path, why: str) -> InputError:
  return InputError(
    f"{path} is damaged or no exported model ({' '.join(why.split())}); copy "
    "or export it again"
  )


def _digest(data: Any) -> str:
  return hashlib.sha256(data).hexdigest()


def _seal(file: IO[bytes]) -> bytes:
  """The SHA-256 of all but the last bytes, at which the file then stands."""
  left = max(file.seek(0, io.SEEK_END) - _SEAL, 0)
  file.seek(0)
  digest = hashlib.sha256()
  while left:
    piece = file.read(min(left, _CHUNK))
    if not piece:
      break
    digest.update(piece)
    left -= len(piece)
  return digest.hexdigest().encode()
