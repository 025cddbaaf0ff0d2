"""The main job from Python, and what names a configuration."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

import pin_jax
from experiments import commands, job, serve
from experiments.configs import quickstart
from pin_jax.data import files, interactions
from pin_jax.types import InputError
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
SIZES = {
  "methods": ("base", "pin"), "backbone_steps": 10, "plugin_steps": 10,
  "batch_size": 20, "dispatch": 5, "backbone.width": 8,
  "groups": {"num_groups": 2}, "validation": {"every": 10},
}


def columns(seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(4, 20, 60)
  users = np.repeat([f"c{u:02d}" for u in range(60)], lengths)
  return {
    "user": users, "item": rng.integers(0, 12, len(users)) * 10,
    "time": rng.integers(0, 10**6, len(users)),
  }


def given(seed=0):
  mine = columns(seed)
  return interactions.from_columns(
    mine["user"], mine["item"], mine["time"], name="my sales"
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_quickly):
  folder = tmp_path_factory.mktemp("api")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    return pin_jax.compare(given(), "mine", **SIZES), folder / "mine"


def test_importing_the_package_imports_nothing_else(tmp_path):
  code = (
    "import sys, pin_jax\n"
    "assert not {'jax', 'polars', 'experiments'} & set(sys.modules)\n"
    "assert callable(pin_jax.read) and callable(pin_jax.compare)\n"
  )
  subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, check=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    pin_jax.nothing  # noqa: B018


def test_data_in_memory_are_kept_and_found_from_anywhere(
  finished, tmp_path, monkeypatch, capsys
):
  _, folder = finished
  [kept] = folder.glob("data/*/my_sales.parquet")
  assert files.read(kept).fingerprint == given().fingerprint
  monkeypatch.chdir(tmp_path)
  pin_jax.compare(given(), folder, **SIZES)
  assert "is finished; reprinting its tables" in capsys.readouterr().out
  with pytest.raises(InputError, match="is of other data"):
    pin_jax.compare(given(seed=1), folder, **SIZES)
  shutil.copytree(folder, tmp_path / "moved")
  kept.rename(tmp_path / "elsewhere.parquet")
  try:
    moved = pin_jax.Job("moved").recommender()
    assert moved.recommend(["c07"], k=2).height == 2
  finally:
    (tmp_path / "elsewhere.parquet").rename(kept)


def test_rows_are_those_of_the_command(finished, tmp_path):
  """The same data and settings, from a file and without the call."""
  from experiments.configs.files import get_config

  pl.DataFrame(columns()).write_parquet(tmp_path / "x.parquet")
  config = get_config(f"path={tmp_path / 'x.parquet'}")
  config.methods, config.backbone_steps = ("base", "pin"), 10
  config.plugin_steps, config.batch_size, config.dispatch = 10, 20, 5
  config.backbone.width, config.groups.num_groups = 8, 2
  config.validation.every = 10
  job.run(config, tmp_path / "w", commands.Console(quiet=True))
  assert finished[0].rows.equals(pl.read_parquet(tmp_path / "w/rows.parquet"))


def test_the_table_follows_from_the_rows(finished):
  table, rows = finished[0].table(), finished[0].rows
  gain = pl.when(pl.col("rank") <= 10).then(1 / (pl.col("rank") + 1).log(2))
  of_all, means = rows.with_columns(gain=gain.otherwise(0)), {}
  for name, own in (
    ("overall", of_all), ("tail", of_all.filter(segment=0)),
    ("head", of_all.filter(segment=1)),
  ):
    for model in ("base", "pin"):
      means[model, name] = own.filter(model=model)["gain"].mean()
      [line] = table.filter(method=model, users=name).to_dicts()
      assert line["ndcg@10"] == pytest.approx(means[model, name])
      assert line["ndcg@10_low"] <= line["ndcg@10"] <= line["ndcg@10_high"]
    change = means["pin", name] / means["base", name] - 1
    assert line["change"] == pytest.approx(change)
    assert line["change_low"] <= change <= line["change_high"]
  assert table.filter(method="base")["change"].is_null().all()


def test_verdict_and_plots_are_the_reports(finished):
  mine, folder = finished
  assert "No verdict: against base, one seed shows" in mine.verdict
  assert mine.verdict == pin_jax.Job(str(folder)).verdict
  for name in ("groups", "forest"):
    assert mine.plot(name).axes
  with pytest.raises(InputError, match="plot 'gruops' is unknown.*groups"):
    mine.plot("gruops")


def test_the_recommender_is_that_of_the_command(finished, tmp_path):
  mine, folder = finished
  path = str(tmp_path / "x.parquet")
  serve.serve(
    serve.Options(str(folder), users="c03", k=4, output=path),
    commands.Console(quiet=True),
  )
  want = pl.read_parquet(path)
  assert mine.recommender().recommend(["c03"], k=4).equals(want)
  new = mine.recommender().recommend(histories=[[10, 30], []], k=3)
  assert new["source"].unique().sort().to_list() == ["model", "popularity"]


@pytest.mark.parametrize(("settings", "words"), [
  ({"backbone": {"widht": 3}}, "backbone.widht=3: .*did you mean"),
  ({"backbone": 3}, "backbone=3"),
  ({"batch_size": "many"}, "batch_size='many': give a whole number"),
  ({"methods": ("bass",)}, "methods=.*'bass'"),
])
def test_a_bad_setting_is_named_and_nothing_is_written(
  settings, words, tmp_path
):
  with pytest.raises(InputError, match=words):
    pin_jax.compare(given(), tmp_path / "w", **settings)
  assert not list(tmp_path.iterdir())


def test_a_whole_configuration_is_taken_and_left_as_it_is(tmp_path):
  config, seen = tiny.get_config(), []
  pin_jax.compare(
    config, tmp_path, seeds=(3,), run=lambda *arguments: seen.append(arguments)
  )
  assert tuple(seen[0][0].seeds) == (3,) and tuple(config.seeds) == (0,)
  with pytest.raises(InputError, match="recipe='gated'"):
    pin_jax.compare(config, tmp_path, recipe="gated")


@pytest.mark.parametrize("name", [
  "quickstart", "quickstart.py", "experiments/configs/quickstart.py",
])
def test_a_shipped_configuration_is_found_from_any_folder(
  name, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  shipped = quickstart.__file__
  assert commands.config_file(name) == shipped
  assert commands.config_file(f"{name}:a=b:c") == f"{shipped}:a=b:c"
  if name.endswith(".py"):  # one's own comes first
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    assert commands.config_file(name) == name


@pytest.mark.parametrize("name", ["base", "no/quickstart.py", "quikstart"])
def test_what_is_no_configuration_is_said_with_those_there_are(
  name, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=f"--config={name} .*'quickstart'"):
    commands.config_file(name)
