"""Sweeps: directories from settings, resuming, failures, the table."""

import io
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import rich.console
from etils import epath
from summaries_test import make_workdir
from toy_rows import make_rows

from experiments import sweep
from experiments.methods import METHODS
from pin_jax.types import InputError

SETTINGS = """[
  {"backbone.length": 5, "seeds": (0, 1)},
  {"backbone.length": 20, "methods": ("base", "pin")},
]"""


def _config(path, settings=SETTINGS):
  path.write_text(
    "from experiments.configs import base\n"
    "def get_config(argument=None):\n"
    "  config = base.default()\n"
    "  config.batch_size = int(argument or 100)\n"
    "  return config\n"
    f"def sweep():\n  return {settings}\n"
  )
  return str(path)


def _console():
  return rich.console.Console(file=io.StringIO(), width=200)


def _job(root, name, code):
  return sweep.Job(
    epath.Path(root) / name, {"x": name}, (sys.executable, "-c", code)
  )


def test_jobs_carry_their_settings(tmp_path):
  config = _config(tmp_path / "c.py")
  first, second = sweep.make_jobs(f"{config}:50", tmp_path / "runs")
  assert first.command[1:] == [
    "-m", "experiments.main", f"--config={config}:50",
    f"--workdir={first.workdir}", "--config.backbone.length=5",
    "--config.seeds=(0, 1)",
  ]
  assert second.command[-1] == "--config.methods=('base', 'pin')"
  assert sweep.printed(second).endswith(
    """--config.backbone.length=20 --config.methods="('base', 'pin')\""""
  )


def test_the_directory_is_the_hash_of_the_settings(tmp_path):
  one = _config(tmp_path / "c.py")
  jobs = sweep.make_jobs(one, tmp_path / "a")
  names = [job.workdir.name for job in jobs]
  assert len(set(names)) == 2
  again = sweep.make_jobs(one, tmp_path / "b")
  assert [job.workdir.name for job in again] == names
  # Neither the order of the jobs, nor that of the keys, nor new jobs matter.
  other = _config(tmp_path / "c.py", """[
    {"batch_size": 60}, {"seeds": (0, 1), "backbone.length": 5},
  ]""")  # fmt: skip
  got = [job.workdir.name for job in sweep.make_jobs(other, tmp_path)]
  assert got[1] == names[0] and got[0] not in names
  argument = sweep.make_jobs(f"{other}:50", tmp_path)
  assert argument[1].workdir.name != names[0]


def test_another_configuration_never_finds_old_results(tmp_path):
  """Nor do other data under the same path; the table leaves them out."""
  data = tmp_path / "d.csv"
  data.write_text("user,item\n1,2\n")
  text = """
from ml_collections import ConfigDict
from experiments.configs import base
def get_config(argument=None):
  config = base.default()
  config.data = base.data_section("files", path=%r)
  config.prior.exponent = %s
  return config
def sweep():
  return [{"data.user": None, "batch_size": 60}]
"""
  root, path = tmp_path / "runs", tmp_path / "c.py"

  def only_job(exponent):
    path.write_text(text % (str(data), exponent))
    return sweep.make_jobs(str(path), root)[0]

  old = only_job("0.5")
  assert "--config.data.user=None" in old.command
  make_workdir(root / old.workdir.name, make_rows(["base", "pin"]), length=5)
  done = old._replace(command=(sys.executable, "-c", ""))
  assert sweep.run([done], parallel=1, console=_console()) == []
  assert only_job("0.5").done and only_job(".50").workdir == old.workdir
  new = only_job("0.75")
  assert new.workdir != old.workdir and not new.done
  with pytest.raises(InputError, match="no finished job of this config"):
    sweep.table(root, jobs=[new])
  assert set(sweep.table(root, jobs=[old, new])["job"]) == {old.workdir.name}
  data.write_text("user,item\n1,23\n")  # longer
  assert not only_job("0.5").done
  with pytest.raises(InputError, match="no finished job of this config"):
    sweep.table(root, jobs=[only_job("0.5")])


def test_brackets_in_a_table_are_printed(tmp_path):
  console = _console()
  lines = pl.DataFrame({"[x]": ["('[a-z]=joint',)"], "seeds": [3]})
  sweep.print_table(lines, console)
  text = console.file.getvalue()
  assert "[x]" in text and "('[a-z]=joint',)" in text


@pytest.mark.parametrize(("settings", "message"), [
  ("[]", r"returns \[\]; return a list of dictionaries"),
  ("[3]", "settings 0 of the sweep are 3; give a dictionary"),
  ("[{}, {'widht': 3}]", "settings 1 of the sweep: .*widht=3: unknown key"),
  ("[{'batch_size': 'x'}]", "settings 0 .*batch_size"),
  ("[{'batch_size': 2}]", "settings 0 of the sweep: config key batch_size=2"),
  ("[{'seeds': (1,)}, {'seeds': (1,)}]", "settings 1 .* repeat settings 0"),
  ("[{'batch_size': 30}, {'batch_size': 30, 'prior.exponent': 1}]",
   "settings 1 .* repeat settings 0"),
  ("[{'plugin.rank': None}]", "settings 0 .*plugin.rank=None: give a whole"),
])  # fmt: skip
def test_bad_settings_are_named_before_any_job(tmp_path, settings, message):
  config = _config(tmp_path / "c.py", settings)
  with pytest.raises(InputError, match=message) as error:
    sweep.make_jobs(config, tmp_path / "runs")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "runs").exists()


def test_bad_files_are_named(tmp_path):
  with pytest.raises(InputError, match="nowhere.py cannot be read"):
    sweep.make_jobs("nowhere.py", tmp_path)
  (tmp_path / "c.py").write_text("def get_config(:\n")
  with pytest.raises(InputError, match="c.py cannot be read .invalid syntax"):
    sweep.make_jobs(str(tmp_path / "c.py"), tmp_path)
  config = _config(tmp_path / "c.py")
  with pytest.raises(InputError, match="settings 0 .*invalid literal.*'many"):
    sweep.make_jobs(f"{config}:many", tmp_path)
  (tmp_path / "c.py").write_text("def get_config():\n  return None\n")
  with pytest.raises(InputError, match=r"has no sweep\(\)"):
    sweep.make_jobs(str(tmp_path / "c.py"), tmp_path)


def test_done_jobs_are_skipped_and_failed_ones_run_again(tmp_path):
  good, bad = (
    _job(tmp_path, name, f"open({str(tmp_path / name)!r} + '-ran', 'a')"
         f".write('x'); print('why'); raise SystemExit({code})")
    for name, code in (("good", 0), ("bad", 2))
  )  # fmt: skip
  for _ in range(2):
    console = _console()
    failed = sweep.run([good, bad], parallel=2, console=console)
    assert failed == [bad]
  text = console.file.getvalue()
  assert "1 of 2 jobs are done" in text and "1 of 1 jobs, " in text
  assert "bad failed with exit code 2" in text and "  why" in text
  assert (tmp_path / "good-ran").read_text() == "x"
  assert (tmp_path / "bad-ran").read_text() == "xx"
  assert good.done and not bad.done


def test_jobs_run_side_by_side(tmp_path):
  # Each waits for the other: one at a time would never end.
  code = (
    "import os, pathlib, time\n"
    f"own, other = (pathlib.Path({str(tmp_path)!r}) / x for x in %r)\n"
    "own.touch()\n"
    "while not other.exists(): time.sleep(.02)\n"
  )
  jobs = [
    _job(tmp_path, "a", code % (("1", "2"),)),
    _job(tmp_path, "b", code % (("2", "1"),)),
  ]
  console = _console()
  assert sweep.run(jobs, parallel=2, console=console) == []
  assert "s gone, about 0 s left" in console.file.getvalue()


def test_a_running_job_is_not_started_twice(tmp_path):
  job = _job(tmp_path, "a", "input()")
  job.workdir.mkdir()
  process = sweep._start(job._replace(
    command=(sys.executable, "-c", "import time; time.sleep(60)")
  ))  # as if the sweep had been killed and left it behind
  try:
    with pytest.raises(InputError, match="is running elsewhere"):
      sweep.run([job], parallel=1, console=_console())
  finally:
    process.kill()
    process.wait()
  assert sweep.run(
    [job._replace(command=(sys.executable, "-c", ""))], parallel=1,
    console=_console(),
  ) == []


def _finished(root, name, length, validation):
  path = make_workdir(root / name, make_rows(["base", "pin"]), length=length)
  summary = json.loads((path / "summary.json").read_text())
  for run, entry in summary["cost"].items():
    entry["validation"] = [validation + ("seed1" in run)]
  summary["cost"]["seed0/pin/plugins"] = {
    **entry, "validation": [0.5, 0.7]
  }  # one a segment: no single number
  (path / "summary.json").write_text(json.dumps(summary))
  config = json.loads((path / "config.json").read_text())
  config["config"]["methods"] = [name, "pin"]  # shows in the models instead
  (path / "config.json").write_text(json.dumps(config))
  (path / "done").touch()
  return path


def _change(base, own, segment):
  """Change of NDCG@10 in %, from two models' rows."""
  means = []
  for rows in (base, own):
    ranks = rows.filter(segment=segment)["rank"].to_numpy()
    means.append(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean())
  return 100 * (means[1] / means[0] - 1)


def test_table_compares_with_a_base_of_the_job_or_of_one_beside(tmp_path):
  for name, models in (
    ("beside", ["base", "joint"]), ("runs/a", ["x", "y", "pin"]),
    ("runs/b", ["x", "base", "y", "z", "pin"]),
  ):
    rows = make_rows(models)
    if name == "runs/b":  # the order of rows does not matter
      rows = rows.sample(fraction=1, shuffle=True, seed=1)
    (make_workdir(tmp_path / name, rows) / "done").touch()
  read = lambda name, model: pl.read_parquet(
    tmp_path / name / "rows.parquet"
  ).filter(model=model)
  for base, origin in (
    ("base", {"runs/a": "beside", "runs/b": "runs/b"}),
    ("joint", {"runs/a": "beside", "runs/b": "beside"}),
  ):
    table = sweep.table(
      tmp_path / "runs", base=base, beside=tmp_path / "beside"
    )
    for name, place in origin.items():
      line = table.filter(job=name[-1], model="pin").row(0, named=True)
      for segment, title in ((0, "tail %"), (1, "head %")):
        want = _change(read(place, base), read(name, "pin"), segment)
        shown, low, high = re.fullmatch(
          r"(\S+) \[(\S+), (\S+)\]", line[title].replace("−", "-")
        ).groups()
        assert float(shown) == pytest.approx(want, abs=0.051)
        assert float(low) < float(shown) < float(high)


def test_table_refuses_bases_that_do_not_compare(tmp_path):
  rows = make_rows(["pin"])
  (make_workdir(tmp_path / "runs/a", rows) / "done").touch()
  assert "tail %" not in sweep.table(tmp_path / "runs").columns
  with pytest.raises(InputError, match="--base=x: no job of .* has that model"):
    sweep.table(tmp_path / "runs", base="x")
  beside = make_workdir(tmp_path / "beside", make_rows(["base"]))
  with pytest.raises(InputError, match="no model 'x'; name one of .'base'"):
    sweep.table(tmp_path / "runs", base="x", beside=beside)
  with pytest.raises(InputError, match="is no workdir of a finished job"):
    sweep.table(tmp_path / "runs", beside=tmp_path)
  others = make_rows(["base"], seeds=(0, 2))
  beside = make_workdir(tmp_path / "others", others)
  with pytest.raises(InputError, match="jobs a and .*others differ in users"):
    sweep.table(tmp_path / "runs", beside=beside)


def test_table_from_the_result_files(tmp_path):
  paths = [
    _finished(tmp_path, name, length, validation)
    for name, length, validation in (("a", 5, 0.25), ("b", 20, 0.75))
  ]
  make_workdir(tmp_path / "unfinished")
  table = sweep.table(tmp_path)
  assert table.columns[:5] == [
    "job", "backbone.length", "model", "seeds", "validation"
  ]
  assert table.height == 4
  for line in table.iter_rows(named=True):
    path = paths["ab".index(line["job"])]
    rows = pl.read_parquet(path / "rows.parquet").filter(model=line["model"])
    assert line["backbone.length"] == {"a": "5", "b": "20"}[line["job"]]
    for part, keep in (
      ("overall", pl.lit(True)), ("tail", pl.col("segment") == 0),
      ("head", pl.col("segment") == 1),
    ):
      ranks = rows.filter(keep)["rank"].to_numpy()
      want = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()
      assert line[f"NDCG@10 {part}"] == pytest.approx(want)
    if line["model"] == "base":
      assert line["validation"] == {"a": 0.75, "b": 1.25}[line["job"]]
    else:
      assert np.isnan(line["validation"])
    assert (line["tail %"] == "") == (line["model"] == "base")
  console = _console()
  sweep.print_table(table, console)
  assert "1.2500" in console.file.getvalue()
  assert ("seeds prove nothing" in console.file.getvalue()) == (
    table["seeds"].min() < 3
  )


def test_a_table_needs_a_finished_job(tmp_path):
  make_workdir(tmp_path / "unfinished")
  with pytest.raises(InputError, match="holds no finished job"):
    sweep.table(tmp_path)


def test_validation_is_known_of_models_of_one_stage():
  cost = {"base": {"validation": [0.1]}, "tail-only": {"validation": [0.2]}}
  assert sweep._validation(cost) == {METHODS["base"].title: 0.1}


def _command(*arguments, **options):
  return subprocess.run(
    [sys.executable, "-m", "experiments.sweep", *arguments],
    capture_output=True, text=True, check=False, **options,
  )


def test_dry_run_prints_one_job_of_an_index(tmp_path):
  config = _config(tmp_path / "c.py")
  root = tmp_path / "runs"
  done = _command(
    f"--config={config}", f"--workdir={root}", "--index=1", "--dry_run"
  )
  assert done.returncode == 0, done.stderr
  want = sweep.printed(sweep.make_jobs(config, root)[1])
  assert done.stdout == want + "\n"
  assert not root.exists()


@pytest.mark.parametrize(("arguments", "message"), [
  (["--index=2"], "--index=2: give 0 to 1"),
  (["--parallel=many"], "flags: flag --parallel=many: "),
])  # fmt: skip
def test_bad_arguments_are_one_line_and_code_2(tmp_path, arguments, message):
  config = _config(tmp_path / "c.py")
  done = _command(f"--config={config}", f"--workdir={tmp_path}", *arguments)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {message}")
  assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_killed_sweep_continues(tmp_path):
  config = _config(tmp_path / "c.py", """[
    {"batch_size": size, "backbone_steps": 600, "plugin_steps": 20,
     "dispatch": 10, "validation.every": 20, "validation.users": 100,
     "methods": ("base",), "backbone.width": 8, "backbone.length": 5}
    for size in (10, 20)
  ]""")  # fmt: skip
  root = tmp_path / "runs"
  arguments = [f"--config={config}", f"--workdir={root}"]
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.sweep", *arguments],
    stdout=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 300
  while not list(root.glob("*/checkpoints/*")):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  assert process.wait() == 143
  assert not list(root.glob("*/done"))
  done = _command(*arguments, "--parallel=2")
  assert done.returncode == 0, done.stderr
  assert len(list(root.glob("*/done"))) == 2
  assert "2 of 2 jobs, " in done.stdout and "validation" in done.stdout
  log = next(root.glob("*/log.jsonl")).read_text().splitlines()
  assert len(log) == len(set(log))


@pytest.mark.slow
def test_what_runs_beside_a_job_changes_no_bit(tmp_path):
  """Products large enough for several threads, alone and side by side."""
  config = _config(tmp_path / "c.py", """[
    {"seeds": (seed,), "backbone_steps": 30, "plugin_steps": 20,
     "dispatch": 10, "validation.every": 10, "methods": ("base", "pin")}
    for seed in (0, 1)
  ]""")  # fmt: skip
  for parallel in (1, 2):
    done = _command(
      f"--config={config}", f"--workdir={tmp_path / str(parallel)}",
      f"--parallel={parallel}",
    )
    assert done.returncode == 0, done.stderr
  alone = sorted((tmp_path / "1").glob("*/*"))
  compared = [
    path for path in alone
    if path.name in ("rows.parquet", "log.jsonl", "comparison.csv")
  ]
  assert len(compared) == 6
  for path in compared:
    beside = tmp_path / "2" / path.relative_to(tmp_path / "1")
    assert beside.read_bytes() == path.read_bytes(), path
