"""Choosing each model's setting on validation, over a sweep's jobs."""

import json

import numpy as np
import polars as pl
import pytest
from summaries_test import make_workdir
from toy_rows import make_rows

from experiments import render, sections, summaries, sweep, trials
from pin_jax.types import InputError

# Stage -> validation by rate: base is best at .001, the plugins at .002 for all
# users (0.8 tail, 0.2 head), at .003 for head users alone.
BASE = {0.001: [0.4], 0.002: [0.3], 0.003: [0.2]}
PLUGINS = {0.001: [0.2, 0.5], 0.002: [0.3, 0.3], 0.003: [0.1, 0.9]}


def _job(root, rate, *, seeds=(0,), models=("base", "pin"), name=None):
  """A finished job of one learning rate."""
  path = root / (name or f"job{1000 * rate:g}")
  shift = int(1000 * rate) + 10 * seeds[0]
  rows = make_rows(models, seeds).sort("model").with_columns(
    rank=pl.col("rank") + shift, rank_unmasked=pl.col("rank_unmasked") + shift
  )
  make_workdir(path, rows, seeds=seeds)
  config = json.loads((path / "config.json").read_text())
  config["config"]["optimizer"]["learning_rate"] = rate
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
    _job(tmp_path / "runs", rate)
  return tmp_path / "runs"


def _read(root):
  return trials.read(trials.finished(root))


def test_each_model_has_the_setting_that_validation_prefers(root):
  found = _read(root)
  assert [dict(s) for s in found.settings] == [
    {"optimizer.learning_rate": rate} for rate in BASE
  ]
  base, pin = trials.choose(found)
  assert (base.model, base.chosen, base.seeds) == ("base", 0, [0])
  np.testing.assert_allclose(base.validation, [0.4, 0.3, 0.2])
  assert (pin.model, pin.chosen) == ("pin", 1)
  np.testing.assert_allclose(pin.validation, [0.26, 0.3, 0.26])


def test_rows_are_those_of_the_chosen_jobs(root, tmp_path):
  found = _read(root)
  results = trials.merged("best", found, trials.choose(found))
  for model, job in (("base", "job1"), ("pin", "job2")):
    want = pl.read_parquet(root / job / "rows.parquet").filter(model=model)
    got = results.rows.filter(model=model)
    assert got.sort("user").equals(want.sort("user"))
  # Of what hangs on the settings that differ, nothing.
  assert results.config["optimizer"]["learning_rate"] == "as chosen"
  assert "cost" not in results.summary and not results.gradients
  summaries.write(results, tmp_path / "out")
  again = summaries.read(tmp_path / "out")
  assert again.trials == results.trials
  text = render.markdown(sections.report([again], num_resamples=50))
  line = next(x for x in text.splitlines() if x.startswith("| pin | .2600"))
  assert "| .3000 (chosen) | .2600 |" in line


def test_more_seeds_count_as_the_same_setting(root):
  _job(root, 0.002, seeds=(1, 2), models=("pin",), name="more")
  found = _read(root)
  pin = trials.choose(found)[1]
  assert (pin.chosen, pin.seeds) == (1, [0])  # what all settings have
  rows = trials.merged("best", found, trials.choose(found)).rows
  seeds = rows.group_by("model").agg(pl.col("seed").unique().sort())
  assert dict(seeds.iter_rows()) == {"base": [0], "pin": [0, 1, 2]}


def test_a_seed_of_a_model_counts_once(root):
  _job(root, 0.002, models=("pin",), name="twice")
  found = _read(root)
  with pytest.raises(InputError, match="has model 'pin' of seed 0, as another"):
    trials.merged("best", found, trials.choose(found))


def test_settings_are_compared_over_the_same_seeds(tmp_path):
  _job(tmp_path, 0.001)
  _job(tmp_path, 0.002, seeds=(1, 2))
  with pytest.raises(InputError, match="'base' has no training seed in all"):
    trials.choose(_read(tmp_path))


def test_jobs_of_other_users_are_refused(root):
  path = root / "job2"
  rows = pl.read_parquet(path / "rows.parquet")
  rows.with_columns(group=0 * pl.col("group")).write_parquet(
    path / "rows.parquet"
  )
  found = _read(root)
  with pytest.raises(InputError, match="jobs job1 and job2 differ in users"):
    trials.merged("best", found, trials.choose(found))


def test_a_sweep_gives_more_seeds_to_what_was_chosen(tmp_path):
  config = tmp_path / "c.py"
  config.write_text(
    "from experiments.configs import base\n"
    "def get_config(argument=None):\n  return base.default()\n"
    "def sweep():\n"
    f"  return [{{'optimizer.learning_rate': x}} for x in {[*BASE]}]\n"
  )
  jobs = sweep.make_jobs(str(config), tmp_path / "runs")
  for job, rate in zip(jobs, BASE, strict=True):
    with pytest.raises(InputError, match="is not done, and more seeds are for"):
      sweep.more_jobs(str(config), tmp_path / "runs", [1, 2])
    _job(tmp_path / "runs", rate, name=job.workdir.name)
  more = sweep.more_jobs(str(config), tmp_path / "runs", [1, 2])
  assert [job.settings for job in more] == [
    {
      "optimizer.learning_rate": rate, "seeds": (1, 2), "methods": (method,)
    }
    for rate, method in ((0.001, "base"), (0.002, "pin"))
  ]
  assert not {job.workdir for job in more} & {job.workdir for job in jobs}
  with pytest.raises(InputError, match="seed 0 is in the sweep already"):
    sweep.more_jobs(str(config), tmp_path / "runs", [0, 1])
