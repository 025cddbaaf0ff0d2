"""SIGTERM, Ctrl-C: save, then exit with a code that means 'run me again'."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
GRACE = 8.0  # seconds from the signal to the exit, saved or not
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def noticed(grace: float = GRACE) -> Iterator[Callable[[], bool]]:
  """Notes SIGTERM and SIGINT while the block runs; for the main thread alone.

  A thread is woken even while the main one compiles or computes, which may
  last; after `grace` seconds it ends the process, and the newest checkpoint
  stands. A second SIGINT does so at once.

  Args:
    grace: seconds to save in.

  Yields:
    A function: whether the signal has come.
  """
  came, over = threading.Event(), threading.Event()
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch() -> None:
    while (number := os.read(reader, 1)[0]) not in _SIGNALS:
      if over.is_set():
        return
    came.set()
    if number == signal.SIGINT:
      print(
        "\nsaving; Ctrl-C again ends at once", file=sys.stderr, flush=True
      )
    limit = time.monotonic() + grace
    while not over.is_set() and (left := limit - time.monotonic()) > 0:
      ready, _, _ = select.select([reader], [], [], left)
      if ready and os.read(reader, 1)[0] == signal.SIGINT:
        break
    if not over.is_set():
      print(
        "interrupted while busy; the same command continues from the last "
        "checkpoint", file=sys.stderr, flush=True,
      )
      os._exit(EXIT_CODE)

  before = {
    number: signal.signal(number, lambda *_: came.set()) for number in _SIGNALS
  }
  awake = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=watch, daemon=True).start()
  try:
    yield came.is_set
  finally:
    over.set()
    signal.set_wakeup_fd(awake)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.write(writer, b"\0")
    os.close(writer)
