"""What determines a stage; workdirs that grow; stages that jobs share."""

import io
import json
import shutil
from unittest import mock

import numpy as np
import polars as pl
import pytest
import rich.console

from experiments import job, report, reuse, schema, serve
from experiments.problem import make_problem
from tests import events, tiny

pytestmark = pytest.mark.usefixtures("compile_quickly")

METHODS = (
  "base_validation", "base", "pin", "pin_exact", "joint_shared", "joint_gate",
  "memory_alone", "focal", "tail_only",
)
EXACT = {"pin-exact/backbone", "pin-exact/plugins"}
GROUPED = {"pin/backbone", "pin/plugins", *EXACT}
PLUGINS = {"pin/plugins", "pin-exact/plugins", "joint/shared"}
GATES = {"joint/gate", "memory-alone"}
ALL = {
  *GROUPED, *PLUGINS, *GATES, "base", "base-validation", "joint", "focal",
  "tail-only", "classifier",
}
# What a key changes; one that is not here changes every stage.
CHANGED = {
  **dict.fromkeys((
    "methods", "num_seeds", "refit", "dispatch", "mesh.data", "mesh.model",
    "claims.non_inferiority_margin", "loss.negatives", "loss.candidates",
    "loss.proposal", "loss.exponent", "loss.calibration",
  ), set()),  # the softmax has no negatives
  **dict.fromkeys((
    "prior.kind", "prior.values", "prior.exponent", "pin.weighting",
    "pin.granularity", "pin.blocks", "pin.path", "pin.diagnose_every",
  ), GROUPED),
  "pin.clip_importance": EXACT,
  **dict.fromkeys(("pin.draw", "pin.mean"), GROUPED | {"classifier"}),
  "pin.plugin_draw": PLUGINS | {"memory-alone"},
  **dict.fromkeys(
    ("joint.draw", "joint.mean", "joint.batch_size"),
    ALL - {"pin/backbone", "pin/plugins"},
  ),
  "loss.focusing": {"focal"},
  "classifier_steps": EXACT | {"classifier"},
  "plugin_steps": ALL - {"pin/backbone", "joint", "memory-alone"},
  **dict.fromkeys(
    ("plugin.name", "plugin.hidden", "plugin.rank", "plugin.reads_state"),
    PLUGINS,
  ),
  **{f"memory.{key}": GATES for key in schema.KEYS["memory"]},
  "optimizer.plugin_learning_rate": PLUGINS,
}


@pytest.fixture(scope="module")
def data():
  """The tiny job's."""
  return reuse.digests(make_problem(tiny.get_config()))


def _digests(data, **changes):
  """{stage: digest} of a job with every kind of stage."""
  made = schema.completed({**tiny.get_config().to_dict(), "methods": METHODS})
  with made.ignore_type():
    made.update_from_flattened_dict(changes)
  known = reuse.identities(made, data)[0]
  return {name: identity.digest for name, identity in known.items()}


def _another(key):
  """A value other than the default."""
  if key.choices or key.kind is bool:
    return next(x for x in key.choices or (True, False) if x != key.default)
  if key.kind is tuple:
    return tuple(reversed(key.default)) or (1,)
  return {int: 96, float: 0.0625, str: "another"}[key.kind]


def test_a_key_changes_the_stages_that_depend_on_it(data):
  known, found, expected = _digests(data), {}, {}
  assert known.keys() == ALL
  for name, key in schema.flatten(schema.KEYS):
    if name.split(".")[0] in ("data", "split", "groups", "seeds"):
      continue  # the data's digests have them, and seeds a stage each
    value = METHODS if name == "methods" else _another(key)
    changed = _digests(data, **{name: value})
    found[name] = {x for x in ALL if known[x] != changed[x]}
    expected[name] = CHANGED.get(name, ALL)
  assert found == expected


@pytest.mark.parametrize(("part", "changed"), [
  ("groups", GROUPED | {"classifier"}),
  ("segments", PLUGINS | GATES | {"tail-only"}),
  ("interactions", ALL),
])
def test_groups_change_what_is_grouped(data, part, changed):
  known, other = _digests(data), _digests({**data, part: "others"})
  assert {x for x in ALL if known[x] != other[x]} == changed


def _config(**changes):
  config = tiny.get_config()
  config.backbone_steps, config.plugin_steps = 20, 10
  config.update_from_flattened_dict(changes)
  return config


def _run(config, workdir, tables=lambda *_, **__: None, **options):
  """What the job says, a line an element."""
  console = rich.console.Console(file=io.StringIO(), width=100)
  with mock.patch.object(report, "write_report", tables):
    job.run(config, workdir, console, **options)
  return console.file.getvalue().splitlines()


def _trained(lines):
  return [x.split(": ")[0] for x in lines if ": compiling, then " in x]


def _ranks(workdir):
  rows = pl.read_parquet(workdir / "rows.parquet")
  return rows.sort("model", "seed", "user").drop("group", "segment")


@pytest.fixture(scope="module")
def grown(tmp_path_factory, compile_quickly):
  """(workdir, what it said) of a job, then one with more methods and seeds."""
  workdir = tmp_path_factory.mktemp("runs") / "w"
  more = {"methods": ("base", "joint_plugins", "pin"), "seeds": (0, 1)}
  return workdir, _run(_config(), workdir), _run(_config(**more), workdir), more


def test_a_job_with_more_to_train_trains_that_alone(grown, tmp_path):
  workdir, first, second, more = grown
  stages = {"base", "pin/backbone", "pin/plugins"}
  assert {*_trained(first)} == stages
  assert {*_trained(second)} == {
    "seed0/joint", "seed0/joint/plugins",
    *(f"seed1/{x}" for x in (*stages, "joint", "joint/plugins")),
  }
  said = [x for x in second if x.startswith(("trained", "new"))]
  assert said == [
    "trained before: base-seed0, pin-backbone-seed0, pin-plugins-seed0",
    "new: joint-seed0, joint-plugins-seed0, base-seed1, joint-seed1, "
    "joint-plugins-seed1, pin-backbone-seed1, pin-plugins-seed1",
  ]
  _run(_config(**more), tmp_path / "fresh")
  assert _ranks(workdir).equals(_ranks(tmp_path / "fresh"))


def test_a_changed_stage_is_trained_anew_and_the_reason_said(grown, tmp_path):
  copy = tmp_path / "w"
  shutil.copytree(grown[0], copy)
  said = _run(_config(plugin_steps=15), copy)
  assert [x for x in said if x.startswith("trained")] == [
    "trained before: pin-backbone-seed0",
    "trained anew: base-seed0 (steps: 35, not 30)",
    "trained anew: pin-plugins-seed0 (steps: 15, not 10)",
  ]
  assert _trained(said) == ["base", "pin/plugins"]
  said = _run(_config(**{"pin.weighting": "joint"}), copy)
  assert "trained anew: pin-plugins-seed0 (from another pin/backbone)" in said


def test_a_stage_that_comes_back_brings_its_logs(grown, tmp_path):
  copy = tmp_path / "w"
  shutil.copytree(grown[0], copy)
  tags = lambda: sorted(
    (e.step, v.tag, v.simple_value)
    for e in events.read(copy / "events" / "seed0" / "pin" / "backbone")
    for v in e.summary.value
  )
  text, seen = (copy / "log.jsonl").read_text(), tags()
  assert seen and '"seed1/joint"' in text
  _run(_config(**{"pin.weighting": "joint"}), copy)
  other = (copy / "log.jsonl").read_text()
  assert {json.loads(x)["run"] for x in other.splitlines()} == {
    "base", "pin/backbone", "pin/plugins"
  }
  assert not set(other.splitlines()) & set(text.splitlines())
  _run(_config(**grown[-1]), copy)
  again = (copy / "log.jsonl").read_text().splitlines()
  assert sorted(again) == sorted(text.splitlines())
  assert tags() == seen


def test_what_no_row_depends_on_prints_the_tables_anew(grown, monkeypatch):
  workdir, _, _, more = grown
  monkeypatch.setattr(job, "Trainer", None)
  said = _run(_config(**more, **{
    "claims.non_inferiority_margin": 0.3, "dispatch": 10,
    "evaluation.metrics": ("ndcg@10", "mrr"),
  }), workdir, report.write_report)
  assert any("is finished" in x for x in said)
  assert any("margin for head users 30 %" in x for x in said)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_a_workdir_of_a_former_version_grows_too(grown, tmp_path, seeds):
  """It has names without digests, and checkpoints that tell of the job."""
  copy, config = tmp_path / "w", _config(seeds=seeds)
  shutil.copytree(grown[0], copy)
  for path in copy.glob("checkpoints/joint-*"):
    shutil.rmtree(path)
  _run(config, copy)
  data = reuse.digests(make_problem(config))
  for known in reuse.identities(config, data):
    for identity in known.values():
      path = copy / "checkpoints" / identity.directory
      path.rename(path.with_name(identity.former))
      (path.with_name(identity.former) / "stage.json").unlink()
  assert serve.recommender(copy, method="pin").routes
  said = _run(_config(seeds=seeds, methods=("base", "fine_tuned", "pin")), copy)
  assert {x.removeprefix("seed0/").removeprefix("seed1/") for x in _trained(
    said
  )} == {"joint", "fine-tuned/tail", "fine-tuned/head"}


def test_jobs_share_stages_and_find_their_data_from_anywhere(
  tmp_path, monkeypatch
):
  here, there = tmp_path / "here", tmp_path / "there"
  here.mkdir()
  there.mkdir()
  monkeypatch.chdir(here)
  data = make_problem(_config()).split.interactions
  pl.DataFrame({
    "user": data.user_ids.repeat(data.lengths),
    "item": data.item_ids[data.items - 1],
  }).write_csv("mine.csv")
  config = _config(methods=("base", "pin_backbone"))
  config.data = {"source": "files", "path": "mine.csv"}
  _run(config, "one", stages="shared")
  config.pin.weighting = "joint"
  said = _run(config, "two", stages="shared")
  assert _trained(said) == ["pin/backbone"]
  monkeypatch.chdir(there)
  one, two = (
    serve.recommender(here / name, method="base") for name in ("one", "two")
  )
  np.testing.assert_array_equal(
    one.routes.slots[0].backbone["items"], two.routes.slots[0].backbone["items"]
  )
