"""Kills a job at random moments until it ends, and compares the outcome.

  python -m tests.chaos --kills=50

The job of tests/tiny.py is launched, killed by SIGKILL in a phase drawn at
random (start, compile, step, save, evaluation, switch of stages, report) and
launched again by the same command, some times over, until it is let through.
Parameters, rows, tables, plots and logs must equal those of an uninterrupted
run byte for byte, events but for their wall times. Every other job begins with
a SIGTERM besides, which must end in the exit code that asks for another launch.
Prints the kills survived by phase; 50 kills take about twenty minutes.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

PHASES = (
  "start", "compile", "step", "save", "evaluation", "switch", "report"
)
# Seconds into a phase, and how often the phase is entered before, at most.
DELAYS = {"start": 3.0, "compile": 0.2, "save": 0.1, "report": 1.0}
VISITS = {"start": 1, "report": 1, "compile": 20, "switch": 10}
KILLS_OF_A_LIFE = 8
FILES = (
  "config.json", "log.jsonl", "rows.parquet", "summary.json",
  "comparison.csv", "comparison.md", "comparison.json", "plots/*.png",
)


def child(marker, arguments):
  """Runs the main job and writes the phase it is in to the marker."""
  handle = os.open(marker, os.O_WRONLY | os.O_CREAT)
  phases = ["start"]

  def mark():
    os.pwrite(handle, phases[-1].ljust(16).encode(), 0)

  @contextlib.contextmanager
  def phase(name):
    phases.append(name)
    mark()
    try:
      yield
    finally:
      phases.pop()
      mark()

  def within(owner, attribute, name):
    inner = getattr(owner, attribute)

    def outer(*args, **kwargs):
      with phase(name):
        return inner(*args, **kwargs)

    setattr(owner, attribute, outer)

  def results_within(owner, attribute, name):
    make = getattr(owner, attribute)

    def outer(*args, **kwargs):
      inner = make(*args, **kwargs)

      def result(*args, **kwargs):
        with phase(name):
          return inner(*args, **kwargs)

      return result

    setattr(owner, attribute, outer)

  mark()
  from jax._src import compiler

  from experiments import job, main, report, stages
  from pin_jax.training import checkpoints, loop

  within(compiler, "compile_or_get_cached", "compile")
  within(checkpoints.Checkpoints, "save", "save")
  within(stages.Trainer, "train", "switch")
  within(job, "method_rows", "evaluation")
  within(report, "write_report", "report")
  within(loop, "_deliver", "step")  # waits for the steps
  results_within(loop, "compile_steps", "step")
  results_within(stages, "make_ranker", "evaluation")
  sys.argv = ["experiments.main", *arguments]
  main.launch()


class Job:
  """One launch of the job."""

  def __init__(self, workdir, scratch, arguments=()):
    self._marker, self._workdir = scratch / "phase", workdir
    self._marker.write_text("start")
    environment = {
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    self._output = (scratch / "output").open("wb")
    self.process = subprocess.Popen(
      [
        sys.executable, "-m", "tests.chaos", f"--child={self._marker}",
        "--config=tests/tiny.py", f"--workdir={workdir}", *arguments,
      ],
      env=environment, stdout=self._output, stderr=subprocess.STDOUT,
    )

  def phase(self):
    """What its main thread does now."""
    return self._marker.read_text().strip() or "start"

  def saving(self):
    """Whether a save goes on, behind whatever the main thread does."""
    return any(self._workdir.glob("checkpoints/*/*orbax-checkpoint-tmp*"))

  def running(self):
    return self.process.poll() is None

  def kill_in(self, wanted, rng):
    """Kills it in a phase; returns the phase, None where it ended before."""
    entered, visits = False, rng.randint(1, VISITS.get(wanted, 5))
    while self.running():
      inside = self.phase() == wanted
      visits -= inside and not entered
      entered = inside
      if not visits and inside:
        time.sleep(rng.uniform(0, DELAYS.get(wanted, 0.003)))
        phase = "save" if self.saving() else self.phase()
        self.process.kill()
        code = self.process.wait()
        return phase if code == -signal.SIGKILL else None
      time.sleep(0.003)
    return None

  def end(self):
    """Waits; complains where it fails."""
    if self.process.wait():
      raise SystemExit(f"failed: {self.output()}")

  def terminate(self, rng):
    """Ends it by SIGTERM; (exit code, seconds it took)."""
    time.sleep(rng.uniform(5, 12))
    start = time.monotonic()
    self.process.terminate()
    return self.process.wait(), time.monotonic() - start

  def output(self):
    return pathlib.Path(self._output.name).read_text()


def events_of(workdir):
  """{run: [(step, tag, value)]} of the event files."""
  from tests import events

  return {
    str(run.relative_to(workdir)): [
      (event.step, value.tag, value.simple_value)
      for event in events.read(run)
      for value in event.summary.value
    ]
    for run in {path.parent for path in workdir.glob("events/**/events*")}
  }


def parameters_of(workdir):
  """{stage: {leaf: bytes}} of the newest checkpoints."""
  import jax
  import orbax.checkpoint as ocp

  found = {}
  for stage in sorted(workdir.glob("checkpoints/*/")):
    newest = max(int(p.name) for p in stage.iterdir() if p.name.isdecimal())
    with ocp.StandardCheckpointer() as reader:
      tree = reader.restore(stage / str(newest) / "tree")
    found[stage.name, newest] = {
      jax.tree_util.keystr(path): jax.device_get(leaf).tobytes()
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
  return found


def differences(workdir, reference):
  """Names of what is not the same in two workdirs."""
  names = {
    str(path.relative_to(root))
    for root in (workdir, reference) for pattern in FILES
    for path in root.glob(pattern)
  }

  def read(root, name):
    """The file, but for the workdir's name in the command it records."""
    path = root / name
    if not path.exists():
      return None
    return path.read_bytes().replace(str(root).encode(), b"WORKDIR")

  different = [
    name for name in sorted(names)
    if read(workdir, name) != read(reference, name)
  ]
  for name, of in (("events", events_of), ("parameters", parameters_of)):
    if of(workdir) != of(reference):
      different.append(name)
  return different


def live(workdir, scratch, wanted, rng, arguments, survived):
  """One job, killed in the wanted phases one after another, to its end."""
  for phase in wanted:
    job = Job(workdir, scratch, arguments)
    got = job.kill_in(phase, rng)
    if got is None:
      job.end()
      return
    survived[got] += 1
  Job(workdir, scratch, arguments).end()


def chaos(kills, seed=0, arguments=(), say=print):
  """Kills jobs so many times; ({phase: kills survived}, differences)."""
  from experiments.interruption import EXIT_CODE

  rng, survived = random.Random(seed), collections.Counter()
  different, lives = [], 0
  with tempfile.TemporaryDirectory() as folder:
    scratch = pathlib.Path(folder)
    Job(scratch / "reference", scratch, arguments).end()
    while survived.total() < kills:
      lives += 1
      workdir = scratch / "work"
      shutil.rmtree(workdir, ignore_errors=True)
      if lives % 2 == 0:
        shutil.rmtree(scratch / "cache")  # so that compiling takes its time
      if lives % 2 == 0:
        code, took = Job(workdir, scratch, arguments).terminate(rng)
        say(f"SIGTERM: exit code {code} after {took:.1f} s", flush=True)
        different += [f"exit code {code}"] * (code not in (EXIT_CODE, -15))
      left = min(kills - survived.total(), KILLS_OF_A_LIFE)
      order = rng.sample(PHASES[:-1] * 2, k=left - 1) + ["report"]
      live(workdir, scratch, order, rng, arguments, survived)
      found = differences(workdir, scratch / "reference")
      different += found
      counts = ", ".join(f"{p} {survived[p]}" for p in PHASES)
      say(
        f"life {lives}: {survived.total()} kills survived ({counts}); "
        f"different: {found or 'nothing'}", flush=True,
      )
  return survived, different


if __name__ == "__main__":
  if len(sys.argv) > 1 and sys.argv[1].startswith("--child="):
    child(sys.argv[1].partition("=")[2], sys.argv[2:])
  else:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(bool(chaos(options.kills, options.seed)[1]))
