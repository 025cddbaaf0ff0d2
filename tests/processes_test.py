"""Jobs of two processes, over the loopback, against the same job of one."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

from experiments import job, processes
from pin_jax.types import InputError
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = (  # of the smallest job that has groups
  "--config=tests/tiny.py", "--config.methods=('pin_backbone',)",
  "--config.backbone_steps=10", "--config.backbone.name=gru4rec",
  "--config.validation.every=5",
  "--config.backbone.length=5", "--config.backbone.blocks=2",
)
HEARTBEAT = 4  # seconds
END = 300  # seconds that nothing takes, on the slowest machine


launches = []


@pytest.fixture(autouse=True)
def _cleared():
  yield
  while launches:
    launches.pop().clear()


class Launch:
  """The processes of one launch; `settings` of each are in a list."""

  def __init__(self, workdir, count, devices=1, settings=SETTINGS):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    place = [f"--coordinator={address}", f"--num_processes={count}",
             f"--heartbeat={HEARTBEAT}"]
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }
    launches.append(self)
    self.processes = [
      subprocess.Popen(
        [sys.executable, __file__, f"--workdir={workdir}",
         *(settings[k] if isinstance(settings, list) else settings),
         *([*place, f"--process_id={k}"] if count > 1 else [])],
        cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      )
      for k in range(count)
    ]

  def end(self):
    """[(exit code, standard error)] of all."""
    said = [process.communicate(timeout=END)[1] for process in self.processes]
    codes = [process.returncode for process in self.processes]
    return list(zip(codes, said, strict=True))

  def clear(self):
    """Leaves nothing behind, whatever has become of the test."""
    for k, process in enumerate(self.processes):
      if process.poll() is None:
        self.kill(k)
        process.wait()

  def kill(self, k):
    """Kills a process and what it has started, without a warning."""
    os.killpg(self.processes[k].pid, signal.SIGKILL)


def wait_for(launch, workdir, step):
  """Until a checkpoint of that step is written."""
  pattern = f"checkpoints/pin-backbone-*/{step}"
  limit = time.monotonic() + END
  while not list(workdir.glob(pattern)):
    alive = all(p.poll() is None for p in launch.processes)
    assert alive and time.monotonic() < limit, launch.end()
    time.sleep(0.01)


def logged(workdir):
  """(losses, validations, rows) of a finished job."""
  text = (workdir / "log.jsonl").read_text()
  records = [json.loads(line) for line in text.splitlines()]
  losses = [r["loss"] for r in records if "loss" in r]
  values = [r["validation"] for r in records if "validation" in r]
  return np.asarray(losses), values, pl.read_parquet(workdir / "rows.parquet")


def assert_same(workdir, reference):
  losses, values, rows = logged(workdir)
  wanted = logged(reference)
  np.testing.assert_allclose(losses, wanted[0], rtol=1e-5)
  assert values == wanted[1]
  assert rows.equals(wanted[2])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """The job of one process with one device."""
  workdir = tmp_path_factory.mktemp("processes") / "one"
  launch = Launch(workdir, 1)
  assert launch.end() == [(0, "")]
  return workdir


def assert_lost(code, said):
  """Our one line, or the runtime's own abortion where that is faster."""
  if code != -signal.SIGABRT:
    assert code == processes.LOST
    assert "error: another process of the job is lost" in said


def test_two_processes_of_which_one_is_killed_end_with_the_result_of_one(
  reference
):
  workdir = reference.parent / "two"
  settings = (*SETTINGS, "--config.mesh.data=2")
  launch = Launch(workdir, 2, settings=settings)
  wait_for(launch, workdir, 5)
  launch.kill(1)
  killed = time.monotonic()
  (code, said), _ = launch.end()
  assert_lost(code, said)
  assert time.monotonic() - killed < END / 2
  assert not (workdir / "summary.json").exists()
  again = Launch(workdir, 2, settings=settings).end()
  assert again == [(0, ""), (0, "")]
  assert_same(workdir, reference)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_whoever_is_killed(reference, victim):
  workdir = reference.parent / f"victim{victim}"
  settings = (*SETTINGS, "--config.mesh.data=2", "--config.mesh.model=2")
  launch = Launch(workdir, 2, devices=2, settings=settings)
  wait_for(launch, workdir, 5)
  launch.kill(victim)
  assert_lost(*launch.end()[1 - victim])
  again = Launch(workdir, 2, devices=2, settings=settings).end()
  assert again == [(0, ""), (0, "")]
  assert_same(workdir, reference)


@pytest.mark.slow
def test_sigterm_to_one_ends_both_and_the_next_launch_goes_on(tmp_path):
  """Once all is compiled: a process that is busy for 10 s ends by itself."""
  workdir = tmp_path / "terminated"
  settings = (
    *SETTINGS, "--config.mesh.data=2", "--config.backbone_steps=400",
  )
  launch = Launch(workdir, 2, settings=settings)
  wait_for(launch, workdir, 10)
  launch.processes[1].terminate()
  for code, said in launch.end():
    assert code == 75 and "the same command continues" in said
  again = Launch(workdir, 2, settings=settings).end()
  assert again == [(0, ""), (0, "")]
  text = (workdir / "log.jsonl").read_text()
  records = [json.loads(line) for line in text.splitlines()]
  assert [r["step"] for r in records if "loss" in r] == [*range(1, 401)]


@pytest.mark.slow
def test_what_one_refuses_all_refuse(tmp_path):
  """The second one does not see the file."""
  rows = [f"{u},{i}" for u in range(30) for i in range(u % 5, u % 5 + 6)]
  file = tmp_path / "0.csv"
  file.write_text("\n".join(["user_id,item_id", *rows]))
  launch = Launch(tmp_path / "work", 2, settings=[
    (f"--config=experiments/configs/files.py:path={path}",
     "--config.mesh.data=2", "--config.groups.num_groups=2",
     "--config.batch_size=8")
    for path in (file, tmp_path / "1.csv")
  ])
  (code, said), (own_code, own) = launch.end()
  assert (code, own_code) == (2, 2)
  assert said.startswith("error: process 1: ") and "1.csv does not" in said
  assert own.startswith("error: ") and "1.csv does not exist" in own
  assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("place", "flag"), [
  (processes.Place("10.0.0.1:1", 2), "coordinator"),
  (processes.Place("10.0.0.1", 2, 0), "coordinator"),
  (processes.Place("10.0.0.1:1", 2, 2), "process_id"),
  (processes.Place("10.0.0.1:99999", 2, 0), "coordinator"),
  (processes.Place("10.0.0.1:0", 2, 0), "coordinator"),
  (processes.Place("10.0.0.1:\u0661", 2, 0), "coordinator"),
  (processes.Place("", 2, 0), "coordinator"),
])
def test_a_place_that_is_none(place, flag):
  with pytest.raises(InputError, match=f"--{flag}="):
    processes.check_place(place)


def test_one_process_is_alone():
  assert processes.is_first()
  asked = lambda: True
  assert processes.any_of(asked) is asked
  assert processes.together(lambda: 3) == 3
  processes.agree("data set", "x")


def test_other_meshes_are_told_apart_before_the_data_are_read(
  tmp_path, monkeypatch
):
  config = tiny.get_config()
  gather = lambda text: [text, text.replace('"data": 1', '"data": 2')]
  monkeypatch.setattr(processes, "_gather", gather)
  monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
  with pytest.raises(InputError, match="process 1 has another mesh .*2.* and"):
    job.run(config, tmp_path / "w")
  assert not (tmp_path / "w").exists()


if __name__ == "__main__":  # the main job without its plots
  from experiments import commands, main, report

  report.write_report = lambda directories, console: None
  commands.launch(main.main, main.CONFIG, default=main.DEFAULT)
