"""SIGTERM: save, then exit with a code that means 'run me again'."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
GRACE = 8.0  # seconds from the signal to the exit, saved or not


@contextlib.contextmanager
def noticed(grace: float = GRACE) -> Iterator[Callable[[], bool]]:
  """Notes a SIGTERM while the block runs; only for the main thread.

  A thread is woken even while the main one compiles or computes, which may
  last; after `grace` seconds it ends the process, and the newest checkpoint
  stands.

  Args:
    grace: seconds to save in.

  Yields:
    A function: whether the signal has come.
  """
  came, over = threading.Event(), threading.Event()
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch() -> None:
    while os.read(reader, 1)[0] != signal.SIGTERM:
      if over.is_set():
        return
    came.set()
    time.sleep(grace)
    if not over.is_set():
      print(
        "interrupted while busy; the same command continues from the last "
        "checkpoint", file=sys.stderr, flush=True,
      )
      os._exit(EXIT_CODE)

  before = signal.signal(signal.SIGTERM, lambda *_: came.set())
  awake = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=watch, daemon=True).start()
  try:
    yield came.is_set
  finally:
    over.set()
    signal.set_wakeup_fd(awake)
    signal.signal(signal.SIGTERM, before)
    os.write(writer, b"\0")
    os.close(writer)
