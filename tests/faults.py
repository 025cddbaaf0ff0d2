"""Faults and what is done about each: one row each.

  python -m tests.faults

prints the table. `faults_test.py` runs every row: it ends with the row's exit
code (0 where the work goes on), and what is said holds the row's words. Rows
check by themselves that nothing was lost.
"""

import contextlib
import io
import logging
import os
import pathlib
import resource
import shutil
import signal
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from etils import epath

from experiments import (
  commands,
  job,
  logs,
  report,
  results,
  serve,
  workdir,
)
from pin_jax import disk
from pin_jax.training import loop, steps
from pin_jax.training.checkpoints import Checkpoints
from tests import events, tiny
from tests.toy_rows import make_rows, make_workdir

ROWS = {}  # name: (function of (folder, say), exit code, words)


def row(name, code, *words):
  """Registers a function of a folder and `say` under a name."""

  def register(action):
    ROWS[name] = (action, code, words)
    return action

  return register


def _tree(seed):
  rng = np.random.default_rng(seed)
  return {"table": rng.normal(size=(40, 16)).astype(np.float32)}


def _store(folder, say=lambda line: None):
  return Checkpoints(folder / "run", say=say)


def _saved(folder, *steps):
  store = _store(folder)
  for step in steps:
    store.save(step, _tree(step), {"step": step})
  store.close()


def _restored(folder, say, step):
  """Restores and insists on the tree of a step, bit by bit."""
  store = _store(folder, say)
  tree, record = store.restore(_tree(0))
  assert record == {"step": step}
  np.testing.assert_array_equal(tree["table"], _tree(step)["table"])
  store.save(9, _tree(9), {"step": 9})  # the run goes on and saves again
  store.wait()
  assert store.steps()[-1] == 9
  store.close()


def _largest(folder, step, part):
  files = (folder / "run" / str(step) / part).rglob("*")
  return max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGES = {
  "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
  "empty": lambda p: p.write_bytes(b""),
  "deleted": lambda p: p.unlink(),
  "bit-flipped": _flip,
}


def _damaged(part, damage):
  def fall_back(folder, say):
    _saved(folder, 3, 9)
    DAMAGES[damage](_largest(folder, 9, part))
    _restored(folder, say, 3)

  def fail(folder, say):
    _saved(folder, 3, 9)
    for step in (3, 9):
      DAMAGES[damage](_largest(folder, step, part))
    _store(folder, say).restore(_tree(0))

  name = f"checkpoint's {part} {damage}"
  words = "run/9 is damaged", "step 3 restored instead"
  ROWS[name] = (fall_back, 0, words)
  ROWS[f"{name}, and the older one's"] = (
    fail, 2, ("run/9 cannot be read", "no older one", "delete")
  )


for part in ("tree", "record"):
  for damage in DAMAGES:
    _damaged(part, damage)


@row("checkpoint half written by a killed save", 0)
def _(folder, say):
  _saved(folder, 3)
  shutil.copytree(
    folder / "run" / "3", folder / "run" / "9.orbax-checkpoint-tmp"
  )
  _restored(folder, say, 3)
  assert not list((folder / "run").glob("*tmp*"))


@row("checkpoint's directory half deleted", 0, "run/9 is damaged", "step 3")
def _(folder, say):
  _saved(folder, 3, 9)
  shutil.rmtree(folder / "run" / "9" / "tree")
  _restored(folder, say, 3)


@row("all checkpoints deleted", 0)
def _(folder, say):
  _saved(folder, 3, 9)
  for step in ("3", "9"):
    shutil.rmtree(folder / "run" / step)
  assert _store(folder, say).restore(_tree(0)) is None


@contextlib.contextmanager
def _disk_full(size):
  """Writes beyond a size fail, as they do on a full disk.

  So do those of log lines where a test runner keeps them in a file; they are
  not what is tested.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  told, logging.raiseExceptions = logging.raiseExceptions, False
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    logging.raiseExceptions = told


@contextlib.contextmanager
def _read_only(folder):
  """The folder cannot be written, not even by root."""
  root = os.geteuid() == 0
  folder.chmod(0o555)
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)
    folder.chmod(0o755)


@row("disk full during a save", 3, "run/9 cannot be written", "free space",
     "continues")
def _(folder, say):
  _saved(folder, 3)
  store = _store(folder, say)
  try:
    with _disk_full(500):
      store.save(9, _tree(9), {"step": 9})
      store.wait()
  finally:
    assert sorted(os.listdir(folder / "run")) == ["3"]
    _restored(folder, say, 3)


@row("directory read-only during a save", 3, "run/9 cannot be written",
     "make it writable")
def _(folder, say):
  _saved(folder, 3)
  store = _store(folder, say)
  try:
    with _read_only(folder / "run"):
      store.save(9, _tree(9), {"step": 9})
      store.wait()
  finally:
    _restored(folder, say, 3)


_JOB_ROWS = make_rows(seeds=(0,))
QUIET = rich.console.Console(file=io.StringIO())
OUTPUTS = {  # what is written: function of (job's folder, folder to write to)
  "report": lambda job, to: report.write_report(
    [job], output=to, pictures=to / "figures", console=QUIET, num_resamples=20
  ),
  "summary": lambda job, to: results.write_summary(results.read(job), to),
  "recommendations": lambda job, to: serve.writer(
    to / "recs.parquet"
  )(_JOB_ROWS),
  "exported model": lambda job, to: _export(to / "m.pin"),
}


def _export(path):
  with disk.replacing(path) as file:  # as `serving.save` does
    file.write(bytes(9000))


def _everything(folder):
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  return {p.relative_to(folder): p.read_bytes() for p in files}


def _not_written(output, harm, before):
  """Nothing is there that was not there before, and all that was."""

  def action(folder, say):
    job, to = (make_workdir(folder / x, _JOB_ROWS) for x in ("job", "to"))
    write = lambda: OUTPUTS[output](job, to)
    if before:
      write()
    there = _everything(to)
    try:
      with _disk_full(500) if harm == "disk full" else _read_only(to):
        write()
    finally:
      assert _everything(to) == there

  name = f"{harm}, {output} written" + " again" * before
  ROWS[name] = (action, 3, ("cannot be written", "free space"))


for output in OUTPUTS:
  _not_written(output, "disk full", before=True)
  _not_written(output, "directory read-only", before=False)


@row("workdir read-only at the start", 3, "cannot be written", "free space")
def _(folder, say):
  (folder / "w").mkdir()
  with _read_only(folder / "w"):
    job.run(tiny.get_config(), folder / "w", QUIET)


@row("first job in a workdir in use", 2, "is in use by another")
def _(folder, say):
  try:
    with workdir.held(epath.Path(folder)):
      job.run(tiny.get_config(), folder, QUIET)
  finally:
    assert not (folder / "config.json").exists()


@row("checkpoint's record of nothing", 2, "is damaged", "delete it")
def _(folder, say):
  _saved(folder, 3)
  store = Checkpoints(folder / "checkpoints" / "toy")
  store.save(4, (State(jnp.zeros(2)), jnp.zeros(2)), {"stale": 0})
  store.close()
  _trained(folder, _step())


@row("disk full while logging", 3, "log.jsonl cannot be written",
     "File too large")
def _(folder, say):
  log = logs.RunLog(epath.Path(folder))
  log.rewind("base", -1)
  with _disk_full(500):
    try:
      for step in range(9):
        log.steps("base", step, {"loss": np.ones((1, 40))})
    finally:
      with contextlib.suppress(OSError):
        log.close()
      assert log._file.closed  # and nothing is written as it goes


@row("two processes on one workdir", 2, "is in use by another", "--workdir")
def _(folder, say):
  directory = epath.Path(folder)
  with workdir.held(directory), workdir.held(directory):
    pass


class State(NamedTuple):
  """Of a model with one weight."""

  params: jax.Array
  average: None = None


def _step(loss_at=-1, gradient_at=-1):
  """Counts up; the loss, or the new weight, is not finite at one step."""

  def step(state, operands, t):
    loss = jnp.where(t == loss_at, jnp.nan, 1.0 * t)[None]
    change = jnp.where(t == gradient_at, jnp.inf, 1.0)
    return State(state.params + change), {"loss": loss}

  return step


def _trained(folder, step, watch=lambda event: None, **options):
  """The events of a toy's training."""
  store = Checkpoints(folder / "checkpoints" / "toy")
  try:
    return [watch(event) or event for event in loop.run(
      step, State(jnp.zeros(2)), None,
      loop.Plan(12, 4, ("all",), dispatch=2, names=("toy",)),
      lambda k, params: {"all": 1.0}, checkpoints=store, **options,
    )]
  finally:
    store.close()


@row("loss not finite", 3, "toy: the loss of group [0] is nan at step 6",
     "JAX_DEBUG_NANS", "learning rate")
def _(folder, say):
  _trained(folder, _step(loss_at=6))


@row("gradient not finite, losses finite", 3, "a parameter is not finite",
     "JAX_DEBUG_NANS")
def _(folder, say):
  _trained(folder, _step(gradient_at=9))


def _skipped(events):
  logs = [event.logs for event in events if isinstance(event, loop.Steps)]
  return np.flatnonzero(np.concatenate([x["skipped"] for x in logs])).tolist()


@row("gradient not finite, skipped", 0)
def _(folder, say):
  events = _trained(folder, steps.skipping(_step(gradient_at=9)))
  assert _skipped(events) == [9]
  assert events[-1].last_step == 12


@row("loss not finite, skipped", 0)
def _(folder, say):
  events = _trained(folder, steps.skipping(_step(loss_at=5)))
  assert _skipped(events) == [5]
  store = Checkpoints(folder / "checkpoints" / "toy")
  (state, _), _ = store.restore((State(jnp.zeros(2)), jnp.zeros(2)))
  store.close()
  np.testing.assert_array_equal(state.params, [11, 11])


def _interrupted_by(number, folder):
  def watch(event):
    if isinstance(event, loop.Validation) and event.step == 4:
      os.kill(os.getpid(), number)

  with commands.noticed() as interrupted:
    try:
      _trained(folder, _step(), watch, interrupted=interrupted)
    finally:
      first, *_, last = _trained(folder, _step())
      np.testing.assert_array_equal(last.best, [4, 4])
      assert first.step == 4


@row("SIGTERM while training", 75, "toy: interrupted after step", "continues")
def _(folder, say):
  _interrupted_by(signal.SIGTERM, folder)


@row("Ctrl-C while training", 75, "toy: interrupted after step", "continues")
def _(folder, say):
  _interrupted_by(signal.SIGINT, folder)


def _two_lives(folder, harm):
  """A log whose run is killed after step 3, harmed, resumed from step 2."""
  path = epath.Path(folder)
  values = {"loss": np.arange(1.0, 9.0)}
  part = lambda a, b: {key: value[a:b] for key, value in values.items()}
  log = logs.RunLog(path)
  log.rewind("toy", -1)
  log.steps("toy", 0, part(0, 1))
  log.steps("toy", 1, part(1, 2))
  log.evaluation("toy", 2, {"all": 0.5})
  log.steps("toy", 2, part(2, 3))
  log.close()
  harm(folder / "log.jsonl", folder / "events" / "toy")
  log = logs.RunLog(path)
  log.rewind("toy", 2)
  log.steps("toy", 2, part(2, 3))
  log.close()
  records = logs.read_log(path)
  assert [r["step"] for r in records] == [1, 2, 2, 3]
  steps = [event.step for event in events.read(folder / "events" / "toy")]
  assert steps == [1, 2, 2, 3]


@row("log and events of steps after the checkpoint", 0)
def _(folder, say):
  _two_lives(folder, lambda *_: None)


@row("log's and events' last records cut short", 0)
def _(folder, say):
  def harm(log, directory):
    for path in (log, next(directory.glob("events*"))):
      path.write_bytes(path.read_bytes()[:-5])

  _two_lives(folder, harm)


@row("log killed before the first checkpoint", 0)
def _(folder, say):
  log = logs.RunLog(epath.Path(folder))
  for _ in range(2):
    log.rewind("toy", -1)
    log.evaluation("toy", 0, {"all": 0.1})
    log.steps("toy", 0, {"loss": np.ones(3)})
  log.close()
  steps = [r["step"] for r in logs.read_log(epath.Path(folder))]
  assert steps == [0, 1, 2, 3]


def answer(name, folder):
  """(exit code, what is said) of a row."""
  action, _, _ = ROWS[name]
  lines, error = [], io.StringIO()
  pathlib.Path(folder).chmod(0o755)
  with contextlib.redirect_stderr(error):
    code = commands.exit_code(
      lambda: action(pathlib.Path(folder), lines.append)
    )
  return code, "\n".join([*lines, error.getvalue().strip()]).strip()


if __name__ == "__main__":
  for name in ROWS:
    with tempfile.TemporaryDirectory() as place:
      code, text = answer(name, place)
    text = text.replace(place, "FOLDER").replace("\n", "\n     ")
    print(f"{name}\n  {code}  {text or '(nothing to say; nothing is lost)'}")
