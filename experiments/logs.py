"""Logs of a job: JSON lines, TensorBoard event files, progress with ETA."""

import contextlib
import json
import math
import time
from typing import IO, Any

import numpy as np
import rich.console
from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from pin_jax import disk
from pin_jax.training.steps import SKIPPED


class _Records(RecordWriter):
  """TensorBoard's format, into any file; what fails is raised here."""

  def __init__(self, file: IO[bytes]) -> None:
    self._writer = file

  def add(self, **fields: Any) -> None:
    event = Event(wall_time=time.time(), **fields)
    self.write(event.SerializeToString())


class RunLog:
  """log.jsonl and event files of a workdir; one record a step.

  A run that continues from a checkpoint drops what it had logged since: of
  log.jsonl the lines; for TensorBoard a further file says from which step on
  those before are void.
  """

  def __init__(self, directory: epath.Path) -> None:
    """Opens the logs of a workdir for appending."""
    self._path = directory / "log.jsonl"
    self._directory = directory / "events"
    self._events: dict[str, _Records] = {}
    with disk.writing(self._path):
      self._file = self._path.open("a")

  def rewind(self, run: str, step: int) -> None:
    """Drops what `run` logged after its checkpoint of `step`; -1 = all."""
    self._file.flush()
    text = self._path.read_bytes().decode(errors="replace")
    lines = [x for x in text.splitlines() if not _is_later(x, run, step)]
    kept = "".join(line + "\n" for line in lines)
    with disk.writing(self._path):
      if kept != text:
        self._file.close()
        disk.write({self._path: kept})
        self._file = self._path.open("a")
    directory = self._directory / run
    with disk.writing(directory):
      directory.mkdir(parents=True, exist_ok=True)
      before = sorted(directory.glob("events.out.tfevents.*"))
      if step < 0:
        for path in before:
          path.unlink()
        before = []
      file = directory / f"events.out.tfevents.run{len(before):05d}"
      self._events[run] = _Records(file.open("wb"))
      self._events[run].add(file_version="brain.Event:2")
      start = SessionLog(status=SessionLog.START)
      self._events[run].add(step=step + 1, session_log=start)

  def steps(self, run: str, start: int, logs: dict[str, np.ndarray]) -> None:
    """Writes one record for each step of a dispatch."""
    count = len(next(iter(logs.values())))
    for offset in range(count):
      record = {key: _plain(value[offset]) for key, value in logs.items()}
      self._write({"run": run, "step": start + offset + 1, **record})
    for offset, values in sorted(_newest(logs).items()):
      self._scalars(run, start + offset + 1, values)
    self.flush()

  def evaluation(self, run: str, step: int, values: dict[str, float]) -> None:
    """Writes one validation record."""
    plain = {key: _plain(value) for key, value in values.items()}
    self._write({"run": run, "step": step, "validation": plain})
    self._scalars(
      run, step, {f"validation/{k}": np.asarray(v) for k, v in values.items()}
    )
    self.flush()

  def skipped(self, run: str) -> dict[str, int]:
    """How many steps of a run had no effect, where they are counted."""
    self.flush()
    counts = [
      record[SKIPPED] for record in read_log(self._path.parent)
      if record.get("run") == run and SKIPPED in record
    ]
    return {SKIPPED: int(sum(counts))} if counts else {}

  def flush(self) -> None:
    """Hands everything to the operating system."""
    with disk.writing(self._path):
      self._file.flush()
      for events in self._events.values():
        events.flush()

  def close(self) -> None:
    """Flushes and closes all files."""
    try:
      self.flush()
    finally:  # what could not be written is not tried again
      for file in (self._file, *self._events.values()):
        with contextlib.suppress(OSError):
          file.close()

  def _write(self, record: dict[str, Any]) -> None:
    with disk.writing(self._path):
      self._file.write(json.dumps(record) + "\n")

  def _scalars(self, run: str, step: int, values: dict[str, Any]) -> None:
    for key, value in values.items():
      for index in np.ndindex(np.shape(value)):
        twice = key == "cosines" and index[0] >= index[1]
        if math.isfinite(value[index]) and not twice:
          tag = "/".join([key, *map(str, index)])
          self._events[run].add(
            step=step, summary=scalar(tag, float(value[index]))
          )


class NoLog:
  """Stands for the `RunLog` in a process that does not write."""

  def _nothing(self, *_: Any) -> dict[str, int]:
    return {}

  rewind = steps = evaluation = skipped = close = _nothing


def read_log(directory: epath.Path) -> list[dict[str, Any]]:
  """The records of log.jsonl in a workdir.

  Raises:
    InputError: if a line is damaged.
  """
  path = directory / "log.jsonl"
  records = []
  for number, line in enumerate(path.read_bytes().splitlines(), 1):
    with disk.reading(f"{path} line {number}", "delete that line"):
      records.append({**json.loads(line)})
  return records


def _newest(logs: dict[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
  """Of a dispatch's logs, each one's newest whole value, by its offset.

  What is looked at every few steps alone is not finite between.
  """
  found: dict[int, dict[str, np.ndarray]] = {}
  for key, values in logs.items():
    whole = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    offset = int(np.flatnonzero(whole)[-1]) if whole.any() else len(values) - 1
    found.setdefault(offset, {})[key] = values[offset]
  return found


def _is_later(line: str, run: str, step: int) -> bool:
  try:
    record = json.loads(line)
    return record["run"] == run and record["step"] > step
  except (ValueError, KeyError, TypeError):  # the line a kill cut short
    return True


def _plain(value: Any) -> Any:
  """Lists and floats, with None where a number is not finite."""
  if np.ndim(value):
    return [_plain(x) for x in value]
  value = float(value)
  return round(value, 7) if math.isfinite(value) else None


class JobProgress:
  """Says how far a job is and how long it takes: every ten seconds a line."""

  def __init__(self, total: int, console: rich.console.Console) -> None:
    """Starts the clock; `total` counts the steps of all runs."""
    self._console, self._total = console, total
    self._done = self._skipped = 0
    self._start = self._printed = time.monotonic()
    self._begun, self._compiled = None, 0.0

  def begin(self, run: str) -> None:
    """Says that a run's programs are compiled now, before its first steps."""
    self._begun = time.monotonic()
    self._console.print(f"{run}: compiling, once for all its steps")

  def advance(self, run: str, steps: int) -> None:
    """Counts steps that were trained."""
    self._done += steps
    now = time.monotonic()
    if self._begun is not None:
      waited, self._begun = now - self._begun, None
      self._compiled += waited if self._compiled else now - self._start
      self._console.print(
        f"{run}: compiled, and trained the first {steps:,} steps, in "
        f"{waited:.1f} s"
      )
    trained = self._done - self._skipped
    soon = trained == steps or now - self._printed < 10
    if soon and self._done < self._total:
      return
    self._printed = now
    spent = now - self._start - self._compiled  # compiling tells nothing
    left = (self._total - self._done) * spent / max(trained, 1)
    self._console.print(
      f"{run}: step {self._done:,} of {self._total:,} in all, "
      f"{now - self._start:.0f} s gone, about {left:.0f} s left"
    )

  def skip(self, steps: int) -> None:
    """Counts steps that need no training (resumed or stopped early)."""
    self._done += steps
    self._skipped += steps
