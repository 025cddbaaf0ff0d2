"""The launcher's exit codes and what a workdir accepts."""

import subprocess
import sys

import pytest
from etils import epath

from experiments import interruption, job, main, settings
from pin_jax.types import InputError, Interrupted, TrainingError
from tests import tiny


def _raising(error):
  def action():
    raise error

  return action


@pytest.mark.parametrize(("error", "code"), [
  (InputError("x=1: give 2"), 2),
  (TrainingError("base: nan"), 3),
  (OSError(28, "No space left on device"), 3),
  (Interrupted("base: after step 7"), interruption.EXIT_CODE),
])
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_line_and_a_code(
  error, code, debug, monkeypatch, capsys
):
  monkeypatch.setattr(sys, "argv", ["main"] + ["--debug"] * debug)
  assert main.exit_code(_raising(error)) == code
  text = capsys.readouterr().err
  assert ("Traceback" in text) == debug
  assert text.splitlines()[-1].startswith(f"error: {error}")
  assert debug or text.count("\n") == 1


def test_an_error_of_the_code_is_no_users_error():
  with pytest.raises(KeyError):
    main.exit_code(_raising(KeyError("bug")))


_BUSY = """
import os, signal, time
from experiments import interruption
with interruption.noticed(grace=600):
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(0.2)
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(600)
"""


def test_a_second_ctrl_c_ends_at_once():
  done = subprocess.run(
    [sys.executable, "-c", _BUSY], capture_output=True, text=True, check=False,
    timeout=300,
  )
  assert done.returncode == interruption.EXIT_CODE
  assert "saving; Ctrl-C again ends at once" in done.stderr
  assert "the same command continues" in done.stderr
  assert "Traceback" not in done.stderr


def test_a_workdir_of_before_a_key_is_still_the_jobs(tmp_path):
  folder, config = epath.Path(tmp_path), tiny.get_config()
  job.claim_workdir(folder, config, "data")
  text = (folder / "config.json").read_text()
  (folder / "config.json").write_text(
    text.replace(',\n    "non_finite": "stop"', "")
    .replace('"non_finite": "stop",', "")
  )
  assert "non_finite" not in (folder / "config.json").read_text()
  job.claim_workdir(folder, config, "data")
  config.non_finite = "skip"
  with pytest.raises(InputError, match="non_finite is 'stop' there"):
    job.claim_workdir(folder, config, "data")


def test_differences_fill_in_defaults():
  found = settings.differences(
    {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 0, "c": 2}}
  )
  assert list(found) == [("a.b", 1, 3)]

