"""Several processes that run one job together, each on its own devices.

All run the same program; the first writes. Where one is lost the others end
with one line and `LOST` or, where the runtime is faster, with its own message;
the same command, given to all, continues the job.
"""

import contextlib
import os
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pin_jax.types import InputError

LOST = 4  # exit code
_WORDS = 1000  # bytes of a message that goes to the other processes
_SIGNS = (
  "Gloo", "NCCL", "coordination service", "CoordinationService", "heartbeat",
  "Connection reset by peer", "Socket closed", "barrier",
)


class Lost(RuntimeError):
  """Another process is gone, or never came."""


class Place(NamedTuple):
  """Where a process belongs.

  Attributes:
    coordinator: host:port of the first process; None = what the environment
      says, as are the next two.
    num_processes: of the job.
    process_id: of this one, 0 .. num_processes - 1.
    heartbeat: seconds without a sign of life until a process is lost.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat: int = 100


def check_place(place: Place) -> None:
  """Raises InputError where a place is none."""
  address, count, index = place[:3]
  if address is count is index is None:
    return
  if None in place[:3]:
    raise InputError(
      f"flag --coordinator={address}: give --coordinator, --num_processes and "
      "--process_id together, or --distributed alone"
    )
  port = re.fullmatch(r"[^\s/]+:([0-9]{1,5})", address)
  if not port or not 1 <= int(port[1]) <= 65_535:
    raise InputError(
      f"flag --coordinator={address}: give host:port, the port from 1 to 65535"
    )
  if index >= count:
    raise InputError(
      f"flag --process_id={index}: give 0 to num_processes - 1, another one to "
      "each process"
    )


@contextlib.contextmanager
def joined(place: Place) -> Iterator[None]:
  """Joins the other processes; to be entered before JAX is used.

  Raises:
    InputError: if neither the place nor the environment says where they are.
    Lost: if they do not come, or one is lost within the block.
  """
  try:
    try:
      jax.distributed.initialize(
        *place[:3], heartbeat_timeout_seconds=place.heartbeat,
        shutdown_timeout_seconds=place.heartbeat,
      )
    except ValueError as error:
      raise InputError(
        "flag --distributed: the environment does not say which processes "
        f"there are ({error}); give --coordinator, --num_processes and "
        "--process_id"
      ) from error
    yield
  except InputError:
    raise
  except Exception as error:  # backends raise many kinds
    if not any(sign in traceback.format_exc() for sign in _SIGNS):
      raise
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next(filter(None, lines), "no sign of life")[:150]
    raise Lost(
      f"another process of the job is lost ({reason}); start all of them again "
      "by the same commands: they continue from the last whole checkpoint"
    ) from error


def usable_cores() -> int:
  """How many cores this process may use."""
  usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
  return len(usable(0))


def is_first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def together(action: Callable[[], Any]) -> Any:
  """Runs an action that waits for no other process in every one of them.

  Returns:
    What the action returns here.

  Raises:
    InputError: this process's own, or else that of the first that raised one.
  """
  if jax.process_count() == 1:
    return action()
  result, refusal = None, None
  try:
    result = action()
  except InputError as error:
    refusal = error
  said = _gather(str(refusal or ""))
  if refusal:
    raise refusal
  for index, message in enumerate(said):
    if message:
      raise InputError(f"process {index}: {message}")
  return result


def agree(what: str, value: str) -> None:
  """Raises InputError in all processes where they differ in something."""
  if jax.process_count() == 1:
    return
  values = _gather(value)
  for index, other in enumerate(values):
    if other != values[0]:
      raise InputError(
        f"process {index} has another {what} than process 0: {other} and "
        f"{values[0]}; give all processes the same"
      )


def _gather(text: str) -> list[str]:
  """The texts of all processes, cut short."""
  sent = np.zeros(_WORDS, np.uint8)
  data = text.encode()[:_WORDS]
  sent[: len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(sent)
  return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def any_of(asked: Callable[[], bool]) -> Callable[[], bool]:
  """A question whose answer is yes once it is in any process.

  All processes ask it equally often and get the same answers: those to the
  question before, so that nobody waits for one.
  """
  if jax.process_count() == 1:
    return asked
  mesh = Mesh(jax.devices(), ("devices",))
  split = NamedSharding(mesh, PartitionSpec("devices"))
  combine = jax.jit(
    lambda x: x.any(), out_shardings=NamedSharding(mesh, PartitionSpec())
  )
  answer = None

  def ask() -> bool:
    nonlocal answer
    before = answer is not None and bool(jax.device_get(answer))
    here = np.full(jax.local_device_count(), asked())
    answer = combine(jax.make_array_from_process_local_data(split, here))
    return before

  return ask
