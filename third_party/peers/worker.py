"""One run of another library: train, validate at marks, rank the test targets.

The other end of third_party/driver.py, under the other library's interpreter:

    python recbole_worker.py SETTINGS.json

Lines about the progress go to standard output; what libraries print, to
standard error. The folder of the settings then holds ranks.npz and, last of
all, result.json. Standard library and numpy alone.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import protocol


class Settings(NamedTuple):
  """What to run.

  Attributes:
    data: file that `protocol.read_data` reads.
    folder: where to write.
    model: the library's name of it.
    seed: of the run.
    sizes: length, width, blocks, heads, dropout, expansion and layers, as in
      our configurations; a model takes those that it has.
    options: the library's own settings, which come last.
    cpu_seconds: of training, or None.
    epochs: of training, or None; one of the two.
    validations: how many, at equal distances, of cpu_seconds.
  """

  data: str
  folder: str
  model: str
  seed: int
  sizes: dict[str, Any]
  options: dict[str, Any]
  cpu_seconds: float | None
  epochs: int | None
  validations: int


class Peer(Protocol):
  """A library's model with its trainer."""

  def fit(self, watch: "Watch") -> None:
    """Trains until the watch, told of every batch and epoch, says so."""

  def scores(
    self, users: np.ndarray, positions: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows into users, scores [n, V + 1]) until all are scored.

    A user's history is all before the position; -inf: cannot be scored. Leaves
    a model in training as it was.
    """

  def state(self) -> Any:
    """A copy of the parameters."""

  def load(self, state: Any) -> None:
    """Puts parameters back."""


def rank(peer: Peer, data: protocol.Data, positions: np.ndarray) -> np.ndarray:
  """`protocol.Ranks` of the targets at `positions` [U] that exist, [4, n]."""
  users = np.flatnonzero(positions >= 0)
  positions = positions[users]
  target = data.items[data.starts[users] + positions]
  out = np.full((len(protocol.Ranks._fields), len(users)), np.nan)
  for rows, scores in peer.scores(users, positions):
    seen = protocol.seen_items(data, users[rows], positions[rows])
    out[:, rows] = protocol.ranks_of(scores, target[rows], *seen)
  if np.isnan(out).any():
    raise ValueError(f"{np.isnan(out[0]).sum()} users were not scored")
  return out


class Watch:
  """Told of a training's batches, validates at marks and keeps the best.

  The clock is this process's processor time since the start, without that of
  the validations.
  """

  def __init__(
    self, peer: Peer, data: protocol.Data, settings: Settings,
    say: Callable[[str], None],
  ) -> None:
    """Starts the clock."""
    self._peer, self._data, self._settings = peer, data, settings
    self._say, self._mark = say, 1
    self.steps = self.epochs = self.best_step = 0
    self.best, self.state = -1.0, None
    self.validation_seconds, self.curve = 0.0, []
    self._start = time.process_time()

  def spent(self) -> float:
    """CPU-seconds of training."""
    return time.process_time() - self._start - self.validation_seconds

  def batch(self) -> bool:
    """To be called after every step; whether training is over."""
    self.steps += 1
    budget, spent = self._settings.cpu_seconds, self.spent()
    if budget is None or spent < self._next():
      return False
    while spent >= self._next():
      self._mark += 1
    self._look(spent)
    return spent >= budget

  def epoch(self) -> bool:
    """To be called after every epoch; whether training is over."""
    self.epochs += 1
    if self._settings.epochs is None:
      return False
    self._look(self.spent())
    return self.epochs >= self._settings.epochs

  def _next(self) -> float:
    """CPU-seconds at which to validate next."""
    settings = self._settings
    return self._mark * settings.cpu_seconds / settings.validations

  def _look(self, spent: float) -> None:
    start = time.process_time()
    ranks = rank(self._peer, self._data, self._data.validation)
    value = float(protocol.ndcg(ranks[0]).mean())
    if value > self.best:
      self.best, self.best_step = value, self.steps
      self.state = self._peer.state()
    self.validation_seconds += time.process_time() - start
    self.curve.append([round(spent, 2), self.steps, round(value, 6)])
    self._say(
      f"{spent:.0f} CPU-seconds, {self.steps:,} steps: validation NDCG@10 "
      f"{value:.4f}"
    )


def run(build: Callable[[protocol.Data, Settings], Peer]) -> None:
  """Runs what the settings in the file on the command line say.

  Args:
    build: makes the untrained model from the data and the settings.
  """
  wire = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  with open(sys.argv[1]) as file:
    settings = Settings(**json.load(file))
  data = protocol.read_data(settings.data)
  say = lambda line: print(line, file=wire, flush=True)
  peer = build(data, settings)
  watch = Watch(peer, data, settings, say)
  peer.fit(watch)
  spent = watch.spent()
  peer.load(watch.state)
  ranks = rank(peer, data, data.test)
  path = os.path.join(settings.folder, "ranks.npz")
  np.savez(path, **dict(zip(protocol.Ranks._fields, ranks, strict=True)))
  path = os.path.join(settings.folder, "result.json")
  with open(f"{path}.tmp", "w") as file:
    json.dump({
      "steps": watch.steps, "epochs": watch.epochs,
      "best_step": watch.best_step, "validation": watch.best,
      "cpu_seconds": spent, "curve": watch.curve,
      "validation_cpu_seconds": watch.validation_seconds,
    }, file, indent=2)
  os.replace(f"{path}.tmp", path)
