"""Kills a job at random moments until it ends, and compares the outcome.

  python -m tests.chaos --kills=50

The job of tests/tiny.py is launched, killed by SIGKILL at a random moment and
launched again by the same command, some times over, until it is let through.
Parameters, rows, tables, plots and logs must equal those of an uninterrupted
run byte for byte, events but for their wall times. Every other job compiles
anew and begins with a SIGTERM besides, which must end in the exit code that
asks for another launch. 50 kills take about twenty minutes.
"""

import argparse
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

KILLS_OF_A_LIFE = 8
FILES = (
  "config.json", "log.jsonl", "rows.parquet", "summary.json",
  "report.md",
)


def launched(workdir, scratch, arguments, seconds=None, number=signal.SIGKILL):
  """Runs the job, for so long at most, then sends a signal; its exit code."""
  environment = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  command = [
    sys.executable, "-m", "experiments.main", "--config=tests/tiny.py",
    f"--workdir={workdir}", *arguments,
  ]
  with (scratch / "output").open("wb") as output:
    process = subprocess.Popen(
      command, env=environment, stdout=output, stderr=subprocess.STDOUT
    )
    try:
      code = process.wait(seconds)
    except subprocess.TimeoutExpired:
      process.send_signal(number)
      code = process.wait()
  if code > 0 and number == signal.SIGKILL:
    raise SystemExit(f"failed: {(scratch / 'output').read_text()}")
  return code


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


def chaos(kills, seed=0, arguments=(), say=print):
  """Kills jobs so many times; (kills survived, differences)."""
  from experiments.commands import SAVED

  rng, survived, saving, lives = random.Random(seed), 0, 0, 0
  different = []
  with tempfile.TemporaryDirectory() as folder:
    scratch = pathlib.Path(folder)
    workdir, start = scratch / "killed" / "job", time.monotonic()
    reference = scratch / "whole" / "job"  # of one name: reports say it
    launched(reference, scratch, arguments)
    whole = time.monotonic() - start
    while survived < kills:
      lives += 1
      shutil.rmtree(workdir, ignore_errors=True)
      if lives % 2 == 0:
        shutil.rmtree(scratch / "cache")  # so that compiling takes its time
        code = launched(
          workdir, scratch, arguments, rng.uniform(5, 12), signal.SIGTERM
        )
        say(f"SIGTERM: exit code {code}", flush=True)
        different += [f"exit code {code}"] * (code not in (SAVED, -15, 0))
      for _ in range(min(kills - survived, KILLS_OF_A_LIFE)):
        moment = rng.uniform(0, whole)
        if launched(workdir, scratch, arguments, moment) == 0:
          break
        survived += 1
        saving += any(workdir.glob("checkpoints/*/*orbax-checkpoint-tmp*"))
      launched(workdir, scratch, arguments)
      found = differences(workdir, reference)
      different += found
      say(
        f"life {lives}: {survived} kills survived, {saving} of them within a "
        f"save; different: {found or 'nothing'}", flush=True,
      )
  return survived, different


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  sys.exit(bool(chaos(options.kills, options.seed)[1]))
