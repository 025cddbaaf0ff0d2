"""Sweeps: directories from settings, resuming, failures, the table."""

import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from etils import epath
from toy_rows import make_rows, make_workdir

from experiments import commands, report, results, sweep
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
  return commands.Console(file=io.StringIO(), width=200)


def _job(root, name, code):
  return sweep.Job(
    epath.Path(root) / name, {"x": name}, (sys.executable, "-c", code)
  )


def test_jobs_carry_their_settings(tmp_path):
  config = _config(tmp_path / "c.py")
  first, second = sweep.make_jobs(f"{config}:50", tmp_path / "runs")
  assert first.command[1:] == [
    "-m", "experiments.main", f"--config={config}:50",
    f"--workdir={first.workdir}",
    f"--stages={first.workdir.parent / '.stages'}",
    "--config.backbone.length=5",
    "--config.seeds=(0, 1)",
  ]
  assert second.command[-1] == "--config.methods=('base', 'pin')"
  printed = shlex.split(sweep.printed(second))
  assert printed == ["python", *second.command[1:]]


def test_settings_come_from_the_command_line():
  rest, fixed, swept = sweep.split_arguments([
    "--config=c.py", "--sweep=x.json", "--sweep.backbone.width=32,64",
    "--sweep.backbone.name=sasrec,gru4rec", "--sweep.seeds=0,(1,2)",
    "--config.seeds=(0,1)", "--config.methods=base,pin",
    "--config.loss.proposal=in_batch:0.5,uniform:0.5", "-config.mesh.data=2",
    "--sweep.memory.relations=(),('linear',)", "--sweep.x=1e-3",
  ])
  assert rest == ["--config=c.py", "--sweep=x.json"]
  assert fixed == {
    "seeds": (0, 1), "methods": ("base", "pin"), "mesh.data": 2,
    "loss.proposal": "in_batch:0.5,uniform:0.5",
  }
  assert swept == {
    "backbone.width": [32, 64], "backbone.name": ["sasrec", "gru4rec"],
    "seeds": [(0,), (1, 2)], "memory.relations": [(), ("linear",)],
    "x": [1e-3],
  }


@pytest.mark.parametrize("text", [
  '{"backbone.width": [8, 16], "seeds": [[0, 1]]}',
  '[{"backbone.width": 8, "seeds": [0, 1]}, '
  '{"backbone.width": 16, "seeds": [0, 1]}]',
])  # fmt: skip
def test_settings_come_from_a_file(tmp_path, text):
  (tmp_path / "s.json").write_text(text)
  listed = sweep.read_settings(tmp_path / "s.json")
  jobs = sweep.make_jobs("tests/tiny.py", tmp_path, listed, {"dispatch": 10})
  assert [job.settings["backbone.width"] for job in jobs] == [8, 16]
  assert jobs[1].command[6:] == [
    "--config.dispatch=10", "--config.backbone.width=16",
    "--config.seeds=(0, 1)",
  ]
  assert jobs[0].workdir.name.startswith("width=8-seeds=0-1-")
  (tmp_path / "s.json").write_text('{"backbone.width": 8}')
  with pytest.raises(InputError, match="s.json is damaged.*give a list of"):
    sweep.read_settings(tmp_path / "s.json")


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
    sweep.finished(root, [new])
  own, = sweep.finished(root, [old, new])
  assert own.name == old.workdir.name
  data.write_text("user,item\n1,23\n")  # longer
  assert not only_job("0.5").done
  with pytest.raises(InputError, match="no finished job of this config"):
    sweep.finished(root, [only_job("0.5")])


@pytest.mark.parametrize(("settings", "message"), [
  ("[]", r"lists \[\]; give a list of dictionaries"),
  ("[3]", "settings 0 of the sweep, 3: give a dictionary"),
  ("[{}, {'widht': 3}]", "settings 1 of the sweep, .*widht=3: unknown key"),
  ("[{'batch_size': 'x'}]", "settings 0 .*batch_size"),
  ("[{'batch_size': 2}]", "settings 0 .*: config key batch_size=2"),
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
  with pytest.raises(InputError, match=r"has no sweep\(\); give --sweep.KEY"):
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


def _ndcg(rows):
  ranks = rows["rank"].to_numpy()
  return np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()


def _table(root, **options):
  """The sweep's table, a dictionary a line."""
  table = sweep.table(sweep.finished(root), **options)
  names = [column.name for column in table.columns]
  return [dict(zip(names, line, strict=True)) for line in table.lines]


def test_table_compares_with_a_base_of_the_job(tmp_path):
  for name, models in (("a", ["x", "y"]), ("b", ["x", "base", "y", "pin"])):
    path = make_workdir(tmp_path / "runs" / name, make_rows(models))
    (path / "done").touch()
    summary = json.loads((path / "summary.json").read_text())
    del summary["cost"]
    (path / "summary.json").write_text(json.dumps(summary))
  for base, jobs in ((None, "b"), ("y", "ab")):
    for line in _table(tmp_path / "runs", base=base):
      for segment, part in ((0, "tail"), (1, "head")):
        change = line[f"{part} change %"]
        if line["model"] == (base or "base") or line["job"] not in jobs:
          assert change == ""
          continue
        rows = pl.read_parquet(tmp_path / "runs" / line["job"] / "rows.parquet")
        first, other = (
          _ndcg(rows.filter(segment=segment, model=model))
          for model in (base or "base", line["model"])
        )
        assert change.estimate == pytest.approx(other / first - 1)
        assert change.low < change.estimate < change.high
  with pytest.raises(InputError, match="--base=z: no job has that model"):
    _table(tmp_path / "runs", base="z")


# Stage -> validation by rate: base is best at .001, the plugins at .002 for all
# users (0.8 tail, 0.2 head), at .003 for head users alone.
BASE = {0.001: [0.4], 0.002: [0.3], 0.003: [0.2]}
PLUGINS = {0.001: [0.2, 0.5], 0.002: [0.3, 0.3], 0.003: [0.1, 0.9]}


def _trial(root, rate, *, seeds=(0,), models=("base", "pin"), name=None):
  """A finished job of one learning rate."""
  path = root / (name or f"job{1000 * rate:g}")
  shift = int(1000 * rate) + 10 * seeds[0]
  rows = make_rows(models, seeds).sort("model").with_columns(
    rank=pl.col("rank") + shift, rank_unmasked=pl.col("rank_unmasked") + shift
  )
  make_workdir(path, rows, seeds=seeds)
  config = json.loads((path / "config.json").read_text())
  config["config"]["optimizer"]["learning_rate"] = rate
  config["config"]["methods"] = models  # shows in the models instead
  (path / "config.json").write_text(json.dumps(config))
  summary = json.loads((path / "summary.json").read_text())
  spent = next(iter(summary["cost"].values()))
  summary["cost"] = {
    (f"seed{seed}/" if len(seeds) > 1 else "") + stage: {
      **spent, "validation": values[rate]
    }
    for seed in seeds
    for stage, values in (
      ("base", BASE), ("pin/backbone", BASE), ("pin/plugins", PLUGINS)
    )
  }
  (path / "summary.json").write_text(json.dumps(summary))
  (path / "done").touch()
  return path


@pytest.fixture
def root(tmp_path):
  for rate in BASE:
    _trial(tmp_path / "runs", rate)
  return tmp_path / "runs"


def test_table_from_the_result_files(root):
  make_workdir(root / "unfinished")
  lines = _table(root)
  assert [*lines[0]][:5] == [
    "optimizer.learning_rate", "model", "seeds", "validation", "overall"
  ]
  assert len(lines) == 6
  for line in lines:
    rate = float(line["optimizer.learning_rate"])
    rows = pl.read_parquet(root / line["job"] / "rows.parquet").filter(
      model=line["model"]
    )
    for part, own in (
      ("overall", rows), ("tail", rows.filter(segment=0)),
      ("head", rows.filter(segment=1)),
    ):
      assert line[part] == pytest.approx(_ndcg(own))
    want = {"base": BASE, "pin": PLUGINS}[line["model"]][rate]
    want = want[0] if len(want) == 1 else 0.8 * want[0] + 0.2 * want[1]
    assert line["validation"] == pytest.approx(want)
    assert (line["tail change %"] == "") == (line["model"] == "base")
  console = _console()
  report.print_table(sweep.table(sweep.finished(root)), console)
  text = console.file.getvalue()
  assert ".4000" in text and "seeds prove nothing" in text
  done = _command(f"--workdir={root}", "--table")  # into a pipe
  piped = pl.read_csv(io.StringIO(done.stdout), separator="\t")
  want = [line["validation"] for line in lines]
  assert piped["validation"].to_list() == pytest.approx(want)
  low = lines[1]["tail change %"].low
  assert piped["tail change % low"][1] == pytest.approx(100 * low, rel=1e-5)


def _read(root):
  return sweep.by_setting(sweep.finished(root))


def test_each_model_has_the_setting_that_validation_prefers(root):
  found = _read(root)
  assert [dict(s) for s in found.settings] == [
    {"optimizer.learning_rate": rate} for rate in BASE
  ]
  base, pin = sweep.choose(found)
  assert (base["model"], base["chosen"], base["seeds"]) == ("base", 0, [0])
  np.testing.assert_allclose(base["validation"], [0.4, 0.3, 0.2])
  assert (pin["model"], pin["chosen"]) == ("pin", 1)
  np.testing.assert_allclose(pin["validation"], [0.26, 0.3, 0.26])


def test_rows_are_those_of_the_chosen_jobs(root, tmp_path):
  found = _read(root)
  best = sweep.best("best", found, sweep.choose(found))
  for model, job in (("base", "job1"), ("pin", "job2")):
    want = pl.read_parquet(root / job / "rows.parquet").filter(model=model)
    got = best.rows.filter(model=model)
    assert got.sort("user").equals(want.sort("user"))
  # Of what hangs on the settings that differ, nothing.
  assert best.config["optimizer"]["learning_rate"] == "as chosen"
  assert "cost" not in best.summary and not best.gradients
  done = _command(f"--workdir={root}", f"--output={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  again = results.read(tmp_path / "out")
  assert again.trials == best.trials
  line = report.cells(results.trials_table(again))[1]
  assert line == [
    "pin", ".2600", ".3000", ".2600", "optimizer.learning_rate 0.002"
  ]


def test_more_seeds_count_as_the_same_setting(root):
  _trial(root, 0.002, seeds=(1, 2), models=("pin",), name="more")
  found = _read(root)
  pin = sweep.choose(found)[1]
  assert (pin["chosen"], pin["seeds"]) == (1, [0])  # what all settings have
  rows = sweep.best("best", found, sweep.choose(found)).rows
  seeds = rows.group_by("model").agg(pl.col("seed").unique().sort())
  assert dict(seeds.iter_rows()) == {"base": [0], "pin": [0, 1, 2]}


def test_what_cannot_be_chosen_among_is_refused(root, tmp_path):
  _trial(root, 0.002, models=("pin",), name="twice")
  found = _read(root)
  with pytest.raises(InputError, match="model 'pin' repeat a user and seed"):
    sweep.best("best", found, sweep.choose(found))
  shutil.rmtree(root / "twice")
  path = root / "job2" / "rows.parquet"
  pl.read_parquet(path).with_columns(group=0).write_parquet(path)
  found = _read(root)
  with pytest.raises(InputError, match="several values of 'group'"):
    sweep.best("best", found, sweep.choose(found))
  _trial(tmp_path / "b", 0.001)
  _trial(tmp_path / "b", 0.002, seeds=(1, 2))
  with pytest.raises(InputError, match="'base' has no training seed in all"):
    sweep.choose(_read(tmp_path / "b"))


def test_a_sweep_gives_more_seeds_to_what_was_chosen(tmp_path):
  config = _config(
    tmp_path / "c.py", [{"optimizer.learning_rate": x} for x in BASE]
  )
  jobs = sweep.make_jobs(config, tmp_path / "runs")
  for job, rate in zip(jobs, BASE, strict=True):
    with pytest.raises(InputError, match="is not done, and more seeds are for"):
      sweep.more_jobs(config, tmp_path / "runs", jobs, [1, 2])
    _trial(tmp_path / "runs", rate, name=job.workdir.name)
  more = sweep.more_jobs(config, tmp_path / "runs", jobs, [1, 2])
  assert [job.settings for job in more] == [
    {
      "optimizer.learning_rate": rate, "seeds": (1, 2), "methods": (method,)
    }
    for rate, method in ((0.001, "base"), (0.002, "pin"))
  ]
  assert not {job.workdir for job in more} & {job.workdir for job in jobs}
  with pytest.raises(InputError, match="seed 0 is in the sweep already"):
    sweep.more_jobs(config, tmp_path / "runs", jobs, [0, 1])


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
  assert "2 of 2 jobs, " in done.stderr and "validation" in done.stdout
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
    if path.name in ("rows.parquet", "log.jsonl", "report.md")
  ]
  assert len(compared) == 6
  for path in compared:
    beside = tmp_path / "2" / path.relative_to(tmp_path / "1")
    assert beside.read_bytes() == path.read_bytes(), path
