"""Summaries of jobs: exact up to rank 20, small, without ids."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import rich.console

from experiments import claims, render, report, sections, summaries
from experiments.configs import base
from pin_jax.types import InputError
from tests.toy_rows import NUM_ITEMS, make_log, make_rows


def make_workdir(path, rows=None, *, length=50, seeds=(0, 1), suffix=""):
  """A finished job's files, made up."""
  path.mkdir(parents=True)
  rows = make_rows(seeds=seeds, names=True) if rows is None else rows
  rows.write_parquet(path / f"rows{suffix}.parquet")
  config = base.default()
  config.data = {"source": "files", "path": "/somewhere/else/toy.parquet"}
  config.backbone.length, config.seeds = length, seeds
  config = {"config": config.to_dict(), "data": "f00"}
  (path / "config.json").write_text(json.dumps(config))
  log = [
    record | {"run": f"seed{seed}/pin/backbone"}
    for seed in seeds for record in make_log(steps=90)
  ]
  text = "".join(json.dumps(record) + "\n" for record in log)
  (path / "log.jsonl").write_text(text)
  cost = {
    "steps": 12, "best_steps": [8], "validation": [0.125], "cpu_seconds": 3.5
  }
  summary = {
    "data": "toy", "fingerprint": "f00", "notes": {"rows_read": 7},
    "split_notes": {}, "prior": [0.2] * 5, "base": "base", "other": "pin",
    "protocol": "leave-one-out", "num_items": NUM_ITEMS, "closeness": [],
    "cost": {f"seed{s}/{r}": cost for s in seeds for r in ("base", "pin/x")},
    "command": "python -m experiments.main --workdir=/somewhere/else/toy "
    '--config=experiments/configs/files.py:path=/somewhere/else/toy.parquet '
    '--config.pin.blocks="(\'a/b=joint\',)"',
    "versions": {"code": "abc", "jax": "0.0.7"},
  }
  (path / "summary.json").write_text(json.dumps(summary))
  return path


@pytest.fixture
def workdir(tmp_path):
  return make_workdir(tmp_path / "toy")


def _by_user(rows, column):
  """Ranks of each model and seed in the order of activeness and group."""
  return {
    key: frame.sort("activeness", "group", "segment", column)[column].to_list()
    for key, frame in rows.partition_by("model", "seed", as_dict=True).items()
  }


def test_ranks_come_back_up_to_the_cutoff(workdir, tmp_path):
  results = summaries.read(workdir)
  summaries.write(results, tmp_path / "out")
  again = summaries.read(tmp_path / "out")
  for column in ("rank", "rank_unmasked"):
    before = _by_user(results.rows, column)
    after = _by_user(again.rows, column)
    assert before.keys() == after.keys()
    for key, ranks in before.items():
      want = [rank if rank <= 20 else np.inf for rank in ranks]
      assert after[key] == want
  facts = ["group", "segment", "activeness", "candidates"]
  for rows in (results.rows, again.rows):
    assert rows.select(facts).sort(facts).equals(
      results.rows.select(facts).sort(facts)
    )
  assert again.protocol == results.protocol


def test_the_report_of_a_summary_is_that_of_the_rows(workdir, tmp_path):
  results = summaries.read(workdir)
  summaries.write(results, tmp_path / "out")
  texts = [
    render.markdown(sections.report([read], num_resamples=200))
    for read in (results, summaries.read(tmp_path / "out"))
  ]
  lines = [
    [
      line for line in text.splitlines()
      if not line.startswith(("Over ", "python -m "))
    ]  # how many gradients were logged; the command, which loses its paths
    for text in texts
  ]
  # Users are resampled in another order: means and their differences agree to
  # the last digit, ends of intervals to the resampling's error.
  assert len(lines[0]) == len(lines[1])
  plain = [[x.split(" [")[0] for x in own] for own in lines]
  assert plain[0] == plain[1]


def test_a_summary_names_no_folder(workdir, tmp_path):
  summaries.write(summaries.read(workdir), tmp_path / "out")
  text = (tmp_path / "out" / "job.json").read_text()
  assert "somewhere" not in text
  assert summaries.read(tmp_path / "out").summary["command"] == (
    "python -m experiments.main --workdir=runs/toy "
    "--config=experiments/configs/files.py:path=toy.parquet "
    '--config.pin.blocks="(\'a/b=joint\',)"'
  )


def test_paired_results_of_a_user_stay_paired(workdir, tmp_path):
  results = summaries.read(workdir)
  summaries.write(results, tmp_path / "out")
  again = summaries.read(tmp_path / "out")
  for read in (results, again):
    wide = claims.values_by_seed(read.rows, ["base", "pin"])
    product = (wide[0] * wide[1]).sum()
    own = claims.values_by_seed(results.rows, ["base", "pin"])
    assert product == pytest.approx((own[0] * own[1]).sum())


def test_a_summary_is_small_and_names_nobody(workdir, tmp_path):
  rng = np.random.default_rng(0)
  rows = pl.concat([
    make_rows(names=True).with_columns(
      user=pl.col("user") + f"-{copy}",
      rank=pl.lit(np.ceil(np.exp(rng.uniform(0, 9, 480)))),
      target=pl.lit(f"secret-{copy}"),
    )
    for copy in range(50)
  ])
  path = make_workdir(tmp_path / "large", rows)
  summaries.write(summaries.read(path), tmp_path / "out")
  ranks = (tmp_path / "out" / "ranks.parquet").read_bytes()
  assert len(ranks) < 1.5 * rows.height  # bytes a row, of two ranks
  text = (tmp_path / "out" / "job.json").read_text()
  assert len(text) < 60_000
  for part in (b"u7-", b"secret"):
    assert part not in ranks and part.decode() not in text
  assert "/somewhere" not in text and "toy.parquet" in text


def test_a_summary_keeps_gradients_of_one_seed(workdir, tmp_path):
  summaries.write(summaries.read(workdir), tmp_path / "out")
  again = summaries.read(tmp_path / "out")
  (run, records), = again.gradients.items()
  assert run == "seed0/pin/backbone" and 30 <= len(records) <= 60
  first = make_log(steps=90)[0]
  np.testing.assert_allclose(
    records[0]["cosines"], first["cosines"], rtol=1e-3, atol=1e-3
  )


def test_every_stage_that_combines_groups_keeps_its_gradients(
  workdir, tmp_path
):
  """Whatever its name; plugins log the norms of two segments, and no more."""
  whole = next(r for r in make_log() if r["conflict_rate"] is not None)
  joint = whole | {
    "norms": [1.0], "cosines": [[1.0]], "weights": [1.0], "loss": [1.0]
  }
  plugins = {"loss": [1.0, 2.0], "norms": [1.0, 2.0], "learning_rate": 0.1}
  between = whole | {"conflict_rate": None, "cosines": [[None] * 5] * 5}
  runs = "cvar", "seed1/group-dro", "pin-exact/backbone", "a/b"
  log = [
    {**record, "run": run, "step": t}
    for t in (1, 2) for run, record in (
      *((run, whole if t == 2 else between) for run in runs),
      ("backbone", joint), ("pin/plugins", plugins), ("x/backbone", plugins),
    )
  ]
  (workdir / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
  found = summaries.read(workdir).gradients
  assert {run: [r["step"] for r in own] for run, own in found.items()} == {
    run: [2] for run in runs
  }
  console = rich.console.Console(file=io.StringIO())
  report.write_report(workdir, console=console, num_resamples=50)
  names = {path.name for path in workdir.glob("plots/gradients*")}
  kept = "cvar", "seed1-group-dro", "pin-exact", "a-b"
  assert names == {f"gradients-{name}.png" for name in kept}
  assert "not written" not in console.file.getvalue()


def test_what_exact_adjustment_rests_on_is_kept_and_shown(workdir, tmp_path):
  records = [
    {"run": f"seed{seed}/{run}", "step": t, **values}
    for seed in (0, 1)
    for run, t, values in (
      ("classifier", 10, {"validation": {
        "log_likelihood": -1.5, "shares_log_likelihood": -1.6,
        "calibration_error": 0.25}}),
      ("classifier", 20, {"validation": {
        "log_likelihood": -1.25 - seed, "shares_log_likelihood": -1.625,
        "calibration_error": 0.125}}),
      ("pin-exact/backbone", 1, {"effective_share": [0.5, 1.0]}),
      ("pin-exact/backbone", 2, {"effective_share": [0.25, 0.5]}),
    )
  ]  # fmt: skip
  with (workdir / "log.jsonl").open("a") as log:
    log.writelines(json.dumps(record) + "\n" for record in records)
  results = summaries.read(workdir)
  summaries.write(results, tmp_path / "out")
  again = summaries.read(tmp_path / "out")
  assert [*results.adjustment] == again.adjustment == [
    {"run": "seed0/pin-exact/backbone", "log_likelihood": -1.25,
     "shares_log_likelihood": -1.625, "calibration_error": 0.125,
     "effective_share": [0.375, 0.75]},
    {"run": "seed1/pin-exact/backbone", "log_likelihood": -1.5,
     "shares_log_likelihood": -1.6, "calibration_error": 0.25,
     "effective_share": [0.375, 0.75]},
  ]  # fmt: skip
  text = render.markdown(sections.report([again], num_resamples=50))
  table = text.split("### Exact adjustment")[1]
  (line,) = [x for x in table.splitlines() if "seed0/pin-exact" in x]
  cells = [x.strip() for x in line.strip("|").split("|")]
  assert cells[1:] == ["−1.2500", "−1.6250", ".1250", "0.38", "0.75"]


def test_a_summary_of_before_is_read(workdir, tmp_path):
  """Summaries knew nothing of exact adjustment once."""
  summaries.write(summaries.read(workdir), tmp_path / "out")
  path = tmp_path / "out" / "job.json"
  content = json.loads(path.read_text())
  del content["adjustment"]
  path.write_text(json.dumps(content))
  assert not summaries.read(tmp_path / "out").adjustment


def test_ranks_of_another_kind_are_refused(tmp_path):
  rows = make_rows().with_columns(rank=pl.lit(3.25))
  path = make_workdir(tmp_path / "a", rows)
  with pytest.raises(InputError, match="3.25, neither whole nor half"):
    summaries.write(summaries.read(path), tmp_path / "out")


def test_run_names_without_seeds():
  assert summaries.without_seed("seed12/pin/backbone") == "pin/backbone"
  assert summaries.without_seed("pin/backbone") == "pin/backbone"
  assert summaries.without_seed("seedling/base") == "seedling/base"
  assert summaries.without_seed("base") == "base"


def test_a_directory_without_rows_is_refused(tmp_path):
  with pytest.raises(InputError, match="has no rows.parquet"):
    summaries.read(tmp_path)


def test_command(workdir, tmp_path):
  command = [sys.executable, "-m", "experiments.summaries"]
  done = subprocess.run(
    [*command, str(workdir), f"--output={tmp_path}/out"],
    capture_output=True, text=True, check=True,
  )
  paths = [pathlib.Path(x.split(": ")[0]) for x in done.stdout.splitlines()]
  assert [path.name for path in paths] == ["job.json", "ranks.parquet"]
  assert all(path.stat().st_size > 100 for path in paths)
