"""What a job says while it trains."""

import io
import re
import types

import numpy as np
import pytest

from experiments import commands, logs
from pin_jax.training import loop


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass, and of them those that JAX compiles."""
  clock = types.SimpleNamespace(now=0.0, compiled=0.0)
  monkeypatch.setattr(logs.time, "monotonic", lambda: clock.now)
  monkeypatch.setattr(
    logs, "_compiling", types.SimpleNamespace(seconds=0.0)
  )

  def passes(seconds, compiling=0.0):
    clock.now += seconds + compiling
    logs._compiling.seconds += compiling

  return passes


def _console(**options):
  return commands.Console(file=io.StringIO(), width=80, **options)


def _train(progress, passes, name, kind, steps, start=-1):
  """A stage: ten steps in 1 s, a hundred validated in 1 s, 20 s compiling."""
  progress.take(name, kind, steps, loop.Started(0, start))
  passes(0, compiling=20)
  for first in range(max(start, 0), steps, 10):
    passes(1)
    losses = np.full((10, 3), [1.0, 2.0, 3.0])
    progress.take(name, kind, steps, loop.Steps(0, first, {"loss": losses}))
    if (first + 10) % 100 == 0:
      passes(1)
      values = {"tail": 0.25, "head": 0.5, "all": 0.3}
      progress.take(name, kind, steps, loop.Validation(0, first + 10, values))
  result = loop.Result({}, [100], [0.25], steps, 1.0)
  progress.take(name, kind, steps, result)


def test_lines_tell_of_losses_segments_and_the_time_left(clock):
  console = _console()
  stages = [("backbone", 1000), ("backbone", 1000), ("plugin", 500)]
  progress = logs.Progress(stages, 100, "NDCG@10", console)
  _train(progress, clock, "base", "backbone", 1000)
  first, *lines, last = console.file.getvalue().splitlines()
  assert first == "base: compiling, then 1,000 steps"
  assert lines[0] == "base 10/1,000, loss 2"  # no validation, no time yet
  assert len(lines) == 10  # one every ten seconds
  for line in lines[1:]:
    found = re.fullmatch(
      r"base (\d+)/1,000, (\d+) (s|min) left, loss 2, tail .2500 head "
      r".5000 all .3000", line
    )
    # A step takes 0.11 s, validation included; a plugin's 0.05 at a guess.
    left = (2000 - int(found[1])) * 0.11 + 500 * 0.05 + 2 * 20
    unit = {"s": 1, "min": 60}[found[3]]
    assert int(found[2]) == pytest.approx(left / unit, abs=0.6), line
  assert last == (
    "base: 1,000 steps in 2 min, best NDCG@10 .2500 at step 100, 3 min left"
  )


def test_a_continued_stage_says_from_where(clock):
  console = _console()
  progress = logs.Progress([("plugin", 200)], 100, "MRR", console)
  _train(progress, clock, "pin/plugins", "plugin", 200, start=100)
  first, *_, last = console.file.getvalue().splitlines()
  assert first == "pin/plugins: continued from step 100 of 200 steps"
  assert last.endswith("0 s left")


def test_on_a_terminal_the_line_moves(clock):
  console = _console(force_terminal=True)
  progress = logs.Progress([("backbone", 300)], 100, "MRR", console)
  _train(progress, clock, "base", "backbone", 300)
  *lines, last = console.file.getvalue().split("\r\x1b[2K")
  assert [line for line in lines if "\n" in line] == [
    "base: compiling, then 300 steps\n"
  ]
  assert len(lines) == 32 and max(map(len, lines)) < 80
  assert last.startswith("base: 300 steps in 53 s") and last.endswith("\n")


def test_a_stage_trained_before_has_no_line(clock):
  console = _console()
  progress = logs.Progress([("backbone", 200)], 100, "MRR", console)
  progress.take("base", "backbone", 200, loop.Started(0, 200))
  result = loop.Result({}, [100], [0.25], 200, 1.0)
  progress.take("base", "backbone", 200, result)
  assert not console.file.getvalue()
