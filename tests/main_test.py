"""The launcher's exit codes and what a workdir accepts."""

import io
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from experiments import commands, job
from pin_jax.training import steps
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
  (Interrupted("base: after step 7"), commands.SAVED),
])
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_line_and_a_code(
  error, code, debug, monkeypatch, capsys
):
  monkeypatch.setattr(sys, "argv", ["main"] + ["--debug"] * debug)
  assert commands.exit_code(_raising(error)) == code
  text = capsys.readouterr().err
  assert ("Traceback" in text) == debug
  assert text.splitlines()[-1].startswith(f"error: {error}")
  assert debug or text.count("\n") == 1


@pytest.mark.parametrize("error", [
  MemoryError("Unable to allocate 7 TiB"),
  jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"),
])
def test_full_memory_is_one_line(error, capsys):
  assert commands.exit_code(_raising(error)) == 3
  text = capsys.readouterr().err
  assert text.startswith("error: memory is full (") and text.count("\n") == 1
  assert "lower batch_size" in text
  with pytest.raises(jax.errors.JaxRuntimeError):
    commands.exit_code(_raising(jax.errors.JaxRuntimeError("INTERNAL: bug")))


_PRINTS = """
from absl import flags
from experiments import commands

def main(argv):
  if argv[1:] == ["all"]:
    for _ in range(10**5):
      print("a line")
  commands.Console().print("[b]\\u00fcber[/] :smile: \\udcff")

commands.launch(main, words=True)
"""


def _prints(*arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", _PRINTS, *arguments], stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, env={**os.environ, **environment},
  )


def test_a_closed_pipe_is_one_line():
  process = _prints("all")
  assert process.stdout.readline() == b"a line\n"
  process.stdout.close()
  assert process.wait(timeout=300) == 3
  text = process.stderr.read().decode()
  assert text == (
    "error: standard output was closed before all was written to it\n"
  )


@pytest.mark.parametrize(("encoding", "said"), [
  ("ascii", rb"[b]\xfcber[/] :smile: \udcff"),
  ("utf-8", "[b]über[/] :smile: ".encode() + rb"\udcff"),
])
def test_names_are_printed_as_they_are(encoding, said):
  process = _prints(PYTHONIOENCODING=encoding)
  out, err = process.communicate(timeout=300)
  assert (out, err, process.returncode) == (said + b"\n", b"", 0)


def test_most_steps_skipped_is_no_success(tmp_path, monkeypatch):
  """A stage that leaves out 6 of 10 steps between two validations stops."""
  config = tiny.get_config()
  config.non_finite = "skip"

  def failing(*args, **kwargs):
    def step(state, operands, t):  # 5 of the first ten, 6 of the second
      bad = (t < 5) | (t >= 10) & (t < 16)
      return state, {"loss": jnp.where(bad, jnp.nan, 1.0)[None]}

    return step

  monkeypatch.setattr(steps, "backbone_step", failing)
  with pytest.raises(TrainingError, match="base: 6 of the 10 steps before step "
                                          "20 were not finite"):
    job.run(config, tmp_path / "w", commands.Console(file=io.StringIO()))


def test_an_error_of_the_code_is_no_users_error():
  with pytest.raises(KeyError):
    commands.exit_code(_raising(KeyError("bug")))


_BUSY = """
import os, signal, time
from experiments import commands
with commands.noticed(grace=600):
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
  assert done.returncode == commands.SAVED
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
  (folder / "summary.json").write_text("{}")
  job.claim_workdir(folder, config, "data")
  assert (folder / "summary.json").exists()
  config.non_finite = "skip"
  job.claim_workdir(folder, config, "data")
  assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("program", [
  "main", "serve", "report", "sweep", "store",
])
def test_help_fits_a_screen(program):
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{program}", "--help"],
    capture_output=True, text=True, check=True, timeout=300,
  )
  lines = done.stdout.splitlines()
  assert len(lines) <= 40 and max(map(len, lines)) <= 80
  assert "docs/keys.md" in lines[-1] and "--" in done.stdout


@pytest.mark.parametrize(("text", "value"), [
  ("base,pin", ("base", "pin")), ("('base', 'pin')", ("base", "pin")),
  ("0,1", (0, 1)), ("(0,1)", (0, 1)), ("3", (3,)), ("()", ()),
  ("items|bias=joint,", ("items|bias=joint",)), ("None", None),
])
def test_tuples_need_no_quotes(text, value):
  assert commands._OrNone(commands._Several()).parse(text) == value


def test_programs_are_kept_unless_jax_is_told_otherwise(monkeypatch, tmp_path):
  kept = {}
  config = types.SimpleNamespace(
    jax_compilation_cache_dir=None, update=kept.__setitem__
  )
  monkeypatch.setattr(commands.jax, "config", config)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  commands.keep_programs()
  folder = pathlib.Path(kept["jax_compilation_cache_dir"])
  assert folder.parent == tmp_path / "pin_jax"
  kept.clear()
  config.jax_compilation_cache_dir = "elsewhere"
  commands.keep_programs()
  assert not kept
