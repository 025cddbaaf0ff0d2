"""What the processes of other libraries share: data, ranks, clock and wire.

A system of benchmarks/throughput.py runs in a process of its own and answers
JSON lines on its standard output, one for each line on its standard input; for
the adapters of third_party/driver.py see worker.py. Standard library and numpy
alone: it serves every environment.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

CUTOFF = 10


class System(Protocol):
  """What a system can do; every method waits for its result."""

  def train(self, seconds: float) -> int:
    """Trains for at least so many CPU-seconds; returns the targets."""

  def evaluate(self) -> int:
    """Ranks the test targets of the chosen users; returns their number."""

  def validate(self) -> float:
    """NDCG@10 of all validation targets, history masked."""

  def restart(self) -> None:
    """Sets parameters and optimizer back to the start; keeps programs."""


class Data(NamedTuple):
  """The interactions and their split as the driver writes them.

  The history of a target is everything of that user before its position.

  Attributes:
    items: [N], users contiguous, in the order of time; item 0 is padding.
    offsets: [U + 1], user u owns items[offsets[u]:offsets[u + 1]].
    train_end: [U], a user's first train_end interactions train.
    validation: [U], in-user position of the validation target, -1 = none.
    test: [U], in-user position of the test target, -1 = none.
    num_items: V.
  """

  items: np.ndarray
  offsets: np.ndarray
  train_end: np.ndarray
  validation: np.ndarray
  test: np.ndarray
  num_items: int

  @property
  def starts(self) -> np.ndarray:
    """[U], a user's first index into `items`."""
    return self.offsets[:-1]

  @property
  def targets(self) -> np.ndarray:
    """[U], training targets: all of the training prefix but the first."""
    return np.maximum(self.train_end - 1, 0)

  def histories(
    self, counts: np.ndarray, users: np.ndarray | None = None
  ) -> Iterator[np.ndarray]:
    """The first `counts` [n] items of users [n], or of all of them."""
    starts = self.starts if users is None else self.starts[users]
    for start, count in zip(starts, counts, strict=True):
      yield self.items[start : start + count]


def write_data(path: str, data: Data) -> None:
  """Writes the .npz that `read_data` reads."""
  np.savez(path, **data._asdict())


def read_data(path: str) -> Data:
  """Reads what `write_data` wrote."""
  with np.load(path, allow_pickle=False) as file:
    values = {name: file[name] for name in Data._fields}
  return Data(**{**values, "num_items": int(values["num_items"])})


def chosen_users(data: Data, count: int) -> np.ndarray:
  """The users whose test targets all systems rank; the same for all."""
  users = np.random.default_rng(0).permutation(len(data.starts))
  return np.sort(users[:count])


def seen_items(
  data: Data, users: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(row, item) of every item before the targets, flat.

  Args:
    data: the interactions.
    users: [n].
    positions: [n], in-user positions of the targets.
  """
  row = np.repeat(np.arange(len(users)), positions)
  inner = np.arange(len(row)) - np.repeat(
    np.cumsum(positions) - positions, positions
  )
  return row, data.items[data.starts[users][row] + inner]


def ndcg(ranks: np.ndarray) -> np.ndarray:
  """1 / log2(1 + rank) where rank <= 10, else 0."""
  return np.where(ranks <= CUTOFF, 1 / np.log2(1 + ranks), 0)


class Ranks(NamedTuple):
  """Ranks of the targets, each [n]; as `pin_jax.evaluation.ranking.Ranks`.

  Attributes:
    rank: among the items that the user's history does not hold.
    candidates: how many these are, the target included.
    rank_unmasked: among all items.
    candidates_unmasked: V.
  """

  rank: np.ndarray
  candidates: np.ndarray
  rank_unmasked: np.ndarray
  candidates_unmasked: np.ndarray


def ranks_of(
  scores: np.ndarray, target: np.ndarray, row: np.ndarray, seen: np.ndarray
) -> Ranks:
  """Ranks of the targets among the items 1..V.

  rank = 1 + #{above} + #{tied} / 2 over the other candidates. An item that the
  model cannot score has -inf and ties with its like; a target without a number
  is last.

  Args:
    scores: [n, V + 1].
    target: [n] items; always a candidate.
    row: rows of `seen`.
    seen: items of the histories.
  """
  users = np.arange(len(target))
  own = scores[users, target][:, None]
  others = np.ones(scores.shape, bool)
  others[:, 0] = others[users, target] = False
  unseen = others.copy()
  unseen[row, seen] = False
  above, tied = ~(scores <= own), scores == own

  def of(candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = lambda mask: np.count_nonzero(mask & candidates, axis=1)
    return 1 + count(above) + 0.5 * count(tied), 1 + candidates.sum(1)

  return Ranks(*of(unseen), *of(others))


def clock(run: Callable[[], Any]) -> tuple[Any, float]:
  """(result, CPU-seconds of this process)."""
  start = time.process_time()
  result = run()
  return result, time.process_time() - start


def repeat(batch: Callable[[], int], seconds: float) -> int:
  """Runs whole batches for at least so many CPU-seconds; adds up counts."""
  start, count = time.process_time(), batch()
  while time.process_time() - start < seconds:
    count += batch()
  return count


def reach(
  system: System, target: float, cap: float, first: float, ratio: float
) -> dict[str, Any]:
  """Trains until the validation NDCG@10 first reaches the target.

  Validates at marks of training time first, first * ratio, first * ratio^2, …
  so the answer is known up to the factor `ratio`.

  Args:
    system: trained from the start.
    target: the NDCG@10 to reach.
    cap: CPU-seconds of training after which to give up.
    first: CPU-seconds before the first validation.
    ratio: of one mark to the last.

  Returns:
    reached: whether it did; cpu_seconds: of training until then; below: the
    time of the last validation that fell short; validation_cpu_seconds;
    curve: [time, NDCG@10] of every validation.
  """
  system.restart()
  spent, validation, mark, curve = 0.0, 0.0, min(first, cap), []
  while True:
    _, seconds = clock(lambda: system.train(mark - spent))  # noqa: B023
    spent += seconds
    value, seconds = clock(system.validate)
    validation += seconds
    curve.append([round(spent, 2), round(value, 5)])
    if value >= target or spent >= cap:
      break
    while mark <= spent:
      mark *= ratio
    mark = min(mark, cap)
  return {
    "reached": value >= target,
    "cpu_seconds": spent,
    "below": curve[-2][0] if len(curve) > 1 else 0.0,
    "validation_cpu_seconds": validation,
    "curve": curve,
  }


def answer(system: System, request: dict[str, Any]) -> dict[str, Any]:
  """What a system replies to a request; see `Child` in the driver."""
  options = {key: value for key, value in request.items() if key != "do"}
  if request["do"] == "reach":
    return reach(system, **options)
  if request["do"] == "warm":
    run = lambda: (system.train(options["seconds"]), system.evaluate())
    return {"cpu_seconds": clock(run)[1]}
  work = {
    "train": lambda: system.train(options["seconds"]),
    "evaluate": system.evaluate,
  }[request["do"]]
  count, seconds = clock(work)
  return {"count": count, "cpu_seconds": seconds}


def serve(build: Callable[..., System]) -> None:
  """Answers requests until standard input ends.

  The first request is {"do": "start", "data": FILE, …}; its other keys are
  the settings that `build` takes. What libraries print goes to standard error.
  """
  wire = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  system = None
  for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "start":
      del request["do"]
      system, seconds = clock(lambda: build(**request))  # noqa: B023
      reply = {"cpu_seconds": seconds}
    else:
      reply = answer(system, request)
    wire.write(json.dumps(reply) + "\n")
    wire.flush()
