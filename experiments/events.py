"""TensorBoard event files that can be rewound: one a run, without gaps.

An event file is a sequence of records (length, its checksum, data, its
checksum). A run that continues from a checkpoint cuts its file after the
checkpoint's step and appends; readers see every step once.
"""

import io
import time
from collections.abc import Iterator, Mapping

from etils import epath
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter, masked_crc32c
from tensorboardX.summary import scalar

from pin_jax import disk

_NAME = "events.out.tfevents.run"
_VERSION = "brain.Event:2"


class EventFile:
  """The scalars of one run."""

  def __init__(
    self, directory: epath.Path, *, after: int | None = None
  ) -> None:
    """Opens the run's file for appending.

    Args:
      directory: of the run; made where it is missing.
      after: drop what is of a later step; None drops everything.
    """
    directory.mkdir(parents=True, exist_ok=True)
    self._path, self._buffer = directory / _NAME, io.BytesIO()
    data = self._path.read_bytes() if self._path.exists() else b""
    end = 0 if after is None else _end_of(data, after)
    if end < len(data):
      disk.write({self._path: data[:end]})
    if not end:
      self._write(Event(wall_time=time.time(), file_version=_VERSION))
      self.flush()

  def add(self, step: int, values: Mapping[str, float]) -> None:
    """Adds one scalar a tag."""
    for tag, value in values.items():
      self._write(Event(
        wall_time=time.time(), step=step, summary=scalar(tag, value)
      ))

  def flush(self) -> None:
    """Hands everything added to the operating system."""
    with self._path.open("ab") as file:
      file.write(self._buffer.getvalue())
    self._buffer = io.BytesIO()

  def _write(self, event: Event) -> None:
    _Records(self._buffer).write(event.SerializeToString())


class _Records(RecordWriter):
  """tensorboardX's format, into any file."""

  def __init__(self, file: io.BytesIO) -> None:
    self._writer = file


def read_events(path: epath.PathLike) -> list[Event]:
  """The whole records at the start of an event file, its version first."""
  data = epath.Path(path).read_bytes()
  return [event for event, _ in _records(data)]


def _end_of(data: bytes, after: int) -> int:
  """Where the first record of a later step, or a damaged one, begins."""
  end = 0
  for event, stop in _records(data):
    if event.step > after:
      break
    end = stop
  return end


def _records(data: bytes) -> Iterator[tuple[Event, int]]:
  """(event, where it ends) of the whole records at the start."""
  start = 0
  while len(data) >= start + 12:
    length = int.from_bytes(data[start : start + 8], "little")
    body = data[start + 12 : start + 12 + length]
    crc = data[start + 12 + length : start + 16 + length]
    if crc != masked_crc32c(body).to_bytes(4, "little"):
      return
    start += 16 + length
    yield Event.FromString(body), start
