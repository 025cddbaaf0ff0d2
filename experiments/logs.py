"""Logs of a job: JSON lines, TensorBoard event files, progress with ETA."""

import collections
import contextlib
import json
import math
import time
from collections.abc import Sequence
from typing import IO, Any

import jax
import numpy as np
import rich.console
from etils import epath
from rich.control import Control
from rich.segment import ControlType
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from pin_jax import disk
from pin_jax.training import loop
from pin_jax.training.steps import SKIPPED

_CLEAR = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
_COSTS = {"backbone": 1.0, "plugin": 0.4, "classifier": 0.4}  # of a step, about


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

  def take(self, run: str, event: tuple) -> None:
    """Writes what an event of `loop.run` says of a run."""
    match event:
      case loop.Started(_, step):
        self.rewind(run, step)
      case loop.Steps(_, start, log):
        self.steps(run, start, log)
      case loop.Validation(_, step, values):
        self.evaluation(run, step, values)

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

  take = skipped = close = _nothing


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


class _Compiling:
  """The seconds that JAX has traced and compiled in this process."""

  seconds = 0.0

  def __call__(self, event: str, duration: float, **_: Any) -> None:
    """Takes what `jax.monitoring` tells."""
    if event.startswith("/jax/core/compile/"):
      self.seconds += duration


_compiling = _Compiling()
jax.monitoring.register_event_duration_secs_listener(_compiling)


class Progress:
  """Says how training goes: losses, validation, and the time that is left.

  On a terminal the line of a run moves in place; elsewhere there is one every
  ten seconds. The time left follows from the seconds that steps and validations
  have taken; what compiling takes, as JAX measures it, is counted apart.
  """

  def __init__(
    self, stages: Sequence[tuple[str, int]], every: int, metric: str,
    console: rich.console.Console,
  ) -> None:
    """Starts the clock.

    Args:
      stages: (kind, steps) of all that are to come, those of each seed.
      every: steps between validations.
      metric: what validation gives of users.
      console: where to print.
    """
    self._console, self._every, self._metric = console, every, metric
    self._left = collections.Counter()  # steps, by kind
    for kind, steps in stages:
      self._left[kind] += steps
    self._steps, self._seconds = collections.Counter(), collections.Counter()
    self._to_compile, self._compiled = len(stages), 0
    self._validating = 0.0  # seconds of the newest
    self._since: dict[str, float] = {}  # when a run began
    self._found: dict[str, str] = {}  # its newest validation
    self._before = self._compiling = _compiling.seconds
    self._now = self._shown = time.monotonic()

  def take(self, name: str, kind: str, steps: int, event: tuple) -> None:
    """Tells of an event of the run of a name, of its kind and steps."""
    before, self._now = self._now, time.monotonic()
    compiling, self._compiling = self._compiling, _compiling.seconds
    seconds = self._now - before - (self._compiling - compiling)
    match event:
      case loop.Started(run, step):
        self._left[kind] -= max(step, 0)
        self._to_compile -= 1
        if step < steps:
          self._since[name], self._found[name] = self._now, ""
        if run == 0 and step < steps:
          self._compiled += 1
          begun = f"continued from step {step:,} of" * (step > 0)
          begun = begun or "compiling, then"
          self._say(f"{name}: {begun} {steps:,} steps")
      case loop.Steps(_, start, log):
        count = len(log["loss"])
        self._left[kind] -= count
        self._steps[kind] += count
        self._seconds[kind] += max(seconds, 0.0)
        losses = np.mean(log["loss"], 0).reshape(-1)
        losses = losses if len(losses) < 3 else [losses.mean()]
        self._pass(
          f"{name} {start + count:,}/{steps:,}{self._time_left()}, loss "
          f"{'/'.join(f'{x:.3g}' for x in losses)}{self._found[name]}"
        )
      case loop.Validation(_, _, values):
        self._validating = max(seconds, 0.0)
        named = [f"{key} {_short(value)}" for key, value in values.items()]
        self._found[name] = f", {' '.join(named)}"
      case loop.Result(_, of_best, values, last) if name in self._since:
        self._left[kind] -= steps - last
        best = " and ".join(
          f"{_short(value)} at step {step:,}"
          for value, step in zip(values, of_best, strict=True)
        )
        metric = "validation" if kind == "classifier" else self._metric
        validated = f", best {metric} {best}" * bool(self._found[name])
        self._say(
          f"{name}: {last:,} steps in {_span(self._now - self._since[name])}"
          f"{validated}{self._time_left()}"
        )

  def close(self) -> None:
    """Leaves the terminal's line empty."""
    self._console.control(_CLEAR)

  def _time_left(self) -> str:
    """', 2 min left'; '' where there is nothing yet to tell it from."""
    costs = sum(_COSTS[kind] * n for kind, n in self._steps.items())
    if not costs or not self._validating:
      return ""
    usual = sum(self._seconds.values()) / costs
    seconds = self._to_compile * (
      (self._compiling - self._before) / self._compiled
    )
    for kind, steps in self._left.items():
      pace = _COSTS[kind] * usual
      if self._steps[kind]:
        pace = self._seconds[kind] / self._steps[kind]
      seconds += steps * (pace + self._validating / self._every)
    return f", {_span(seconds)} left"

  def _say(self, line: str) -> None:
    self.close()
    self._console.print(line)

  def _pass(self, line: str) -> None:
    """Shows a line in place, or every ten seconds one that stays."""
    moves = self._console.is_terminal
    if self._now - self._shown < (0.5 if moves else 10):
      return
    self._shown = self._now
    if moves:
      self.close()
      self._console.print(line[: self._console.width - 1], end="")
    else:
      self._say(line)


def _short(value: float) -> str:
  """'.1234'."""
  return f"{value:.4f}".removeprefix("0")


def _span(seconds: float) -> str:
  """'40 s', '3 min' or '1.5 h'."""
  for unit, size in (("h", 3600), ("min", 60)):
    if seconds >= 1.7 * size:
      return f"{seconds / size:.{1 - (unit == 'min')}f} {unit}"
  return f"{seconds:.0f} s"
