"""The main job end to end on tiny data: results, resuming, bad input."""

import inspect
import io
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import rich.console
import scipy.stats
from etils import epath
from ml_collections import ConfigDict

from experiments import (
  build,
  job,
  problem,
  report,
  results,
  serve,
  sizes,
  stages,
)
from experiments.configs import base, files, ml1m, paper_era, quickstart
from experiments.logs import read_log
from experiments.methods import METHODS, RULES, compared, stages_of
from pin_jax import aggregation, serving
from pin_jax.evaluation import metrics
from pin_jax.training import loop
from pin_jax.types import InputError, TrainingError
from tests import events, tiny

pytestmark = pytest.mark.usefixtures("compile_quickly")


def _config(**data):
  config = tiny.get_config()
  config.data = ConfigDict(data) if data else config.data
  config.methods = base.default().methods
  config.backbone_steps, config.plugin_steps = 12, 8
  config.classifier_steps = 8
  config.pin.diagnose_every = 4
  config.dispatch, config.validation.every = 4, 4
  return config


def _console():
  return rich.console.Console(file=io.StringIO(), width=100)


def _run(config, workdir):
  console = _console()
  job.run(config, workdir, console)
  return console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_quickly):
  """A workdir in which every method has run, or one like it."""
  workdir = tmp_path_factory.mktemp("runs") / "all"
  config = _config()
  left_out = {  # trained elsewhere, or like one that stays
    "base", "base_validation", "base_activeness", "user_uniform", "focal",
    "head_only", "pin_shared", "joint_gate", "pin_gates", *RULES,
  }
  config.methods = ("base", *(name for name in METHODS if name not in left_out))
  text = _run(config, workdir)
  return config, workdir, text


def test_every_method_has_one_row_a_user(finished):
  config, workdir, _ = finished
  rows = pl.read_parquet(workdir / "rows.parquet")
  assert set(rows["model"]) == set(config.methods)
  counts = rows.group_by("model").agg(pl.len(), pl.col("user").n_unique())
  assert set(counts["len"]) == set(counts["user"]) == {80}
  assert (rows["rank"] <= rows["candidates"]).all()
  assert (rows["candidates"] <= rows["candidates_unmasked"]).all()
  assert set(rows["candidates_unmasked"]) == {30}


def test_rows_hold_each_users_held_out_item(finished):
  config, workdir, _ = finished
  rows = pl.read_parquet(workdir / "rows.parquet").filter(model="pin")
  data, _ = problem.load_data(config.data)
  for row in rows.iter_rows(named=True):
    start, end = data.offsets[row["user"]], data.offsets[row["user"] + 1]
    assert row["target"] == data.item_ids[data.items[end - 1] - 1]
    assert row["activeness"] == end - start - 2


def test_validations_are_logged_by_segment_too(finished):
  _, workdir, text = finished
  rows = pl.read_parquet(workdir / "rows.parquet").filter(model="pin")
  sizes = rows.group_by("segment").len().sort("segment")["len"].to_numpy()
  found = [r for r in read_log(epath.Path(workdir)) if "validation" in r]
  of_all = [r for r in found if r["run"] == "pin/backbone"]
  assert of_all
  for record in of_all:
    values = record["validation"]
    mean = np.dot(sizes, [values["tail"], values["head"]]) / sizes.sum()
    assert values["all"] == pytest.approx(mean, abs=1e-6)
  tail_alone = [r["validation"] for r in found if r["run"] == "tail-only"]
  assert {tuple(values) for values in tail_alone} == {("tail",)}
  directory = workdir / "events" / "pin" / "backbone"
  tags = {v.tag for e in events.read(directory) for v in e.summary.value}
  assert {f"validation/{name}" for name in ("all", "tail", "head")} <= tags
  assert {"conflict_rate", "cosines/0/1", "cosines/1/2"} <= tags
  assert "cosines/0/0" not in tags
  assert "pin/backbone: compiling, then " in text


def test_a_metric_of_ones_own_selects_and_is_shown(tmp_path, monkeypatch):
  """One function, one line: of 30 items none ranks beyond 30."""
  half = lambda ranks, k: 0.5 * (ranks <= k)
  monkeypatch.setitem(metrics.METRICS, "half", half)
  config = _config()
  config.methods = ("base", "pin_backbone")
  config.evaluation.metrics = ("half@30", "mrr")
  _run(config, tmp_path)
  logged = [r["validation"] for r in read_log(tmp_path) if "validation" in r]
  assert {x for values in logged for x in values.values()} == {0.5}
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["cost"]["base"]["validation"] == [0.5]
  text = (tmp_path / "report.md").read_text()
  assert "Change of HALF@30 against base" in text and "NDCG@10 by" not in text


def positions(workdir, method, **options):
  """(rows, position of each user's target in its list; nan where masked)."""
  recommender = serve.recommender(workdir, method=method)
  table = recommender.recommend(prefix="validation", k=30, **options)
  rows = pl.read_parquet(workdir / "rows.parquet").filter(
    model=method
  )
  level = pl.col("rank").mean().over("request", "score")  # ties
  found = table.with_columns(position=level).join(
    rows, left_on=["user", "item"], right_on=["user", "target"],
    suffix="_evaluated",
  )
  return rows, found


@pytest.mark.parametrize("method", [
  "pin", "fine_tuned", "memory_alone",
  *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("base", "pin_swapped", "pin_random", "pin_exact")
  ),
])
def test_what_is_served_is_what_was_evaluated(finished, method):
  _, workdir, _ = finished
  rows, found = positions(workdir, method)
  assert 20 < len(found) < len(rows)  # the others' targets are repeats
  assert found["position"].to_list() == found["rank_evaluated"].to_list()
  assert found["segment"].to_list() == found["segment_evaluated"].to_list()
  rows, found = positions(workdir, method, mask_history=False)
  assert len(found) == len(rows)
  assert found["position"].to_list() == found["rank_unmasked"].to_list()


def test_what_validation_chose_serves_each_segment(finished, monkeypatch):
  """By default; here by models of two kinds."""
  _, workdir, _ = finished
  choice, read = {"tail": "pin", "head": "memory_alone"}, serve.read_json
  assert read(workdir / "summary.json")["choice"].keys() >= choice.keys()
  monkeypatch.setattr(
    serve, "read_json", lambda *args, **x: read(*args, **x) | {"choice": choice}
  )
  got, *alone = (
    serve.recommender(workdir, method=method).recommend(k=30)
    for method in (None, *choice.values())
  )
  expected = pl.concat(
    table.filter(segment=segment) for segment, table in enumerate(alone)
  ).sort("request", "rank")
  assert got.drop("score").equals(expected.drop("score"))
  np.testing.assert_allclose(got["score"], expected["score"], rtol=1e-4)
  assert not alone[0].drop("score").equals(alone[1].drop("score"))


def test_serving_refuses_a_checkpoint_that_is_damaged(finished, tmp_path):
  _, workdir, _ = finished
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  stage = next(copy.glob("checkpoints/base-*"))
  newest = max(int(p.name) for p in stage.iterdir() if p.name.isdecimal())
  (stage / str(newest) / "record" / "metadata").write_text("{")
  before = sorted(copy.rglob("*"))
  with pytest.raises(InputError, match="base-.* cannot be read"):
    serve.recommender(copy, method="base")
  assert sorted(copy.rglob("*")) == before
  shutil.rmtree(stage)
  with pytest.raises(InputError, match="base-.* is absent"):
    serve.recommender(copy, method="base")


@pytest.mark.parametrize(("names", "pair"), [
  (("base", "pin", "pin_swapped"), ("base", "pin")),
  (("base", "pin_exact", "focal"), ("base", "pin_exact")),
  (("pin", "base"), ("pin", "base")),
  (("base", "tail_only"), ("base", "tail_only")),
  (("base",), ("base", "base")),
])
def test_pin_is_what_is_tested(names, pair):
  assert compared(names) == pair


def test_equal_budgets():
  config = _config()
  others = ("pin_backbone", "pin_exact_backbone", "memory_alone")
  full = [m for name, m in METHODS.items() if name not in others]
  for method in full:
    for backbone, plugin in method.serve:
      by_name = {stage.name: stage for stage in method.stages}
      steps, name = 0, plugin or backbone
      while name is not None:
        stage = by_name[name]
        steps += stages.num_steps(config, stage)
        name = stage.start if stage.phase == "plugin" else None
      assert steps == 20, method


def test_a_rule_has_its_own_weighting():
  """The mean of the worst half of two groups: all weight on the worse."""
  adjust = lambda rule: build.make_adjustment(
    _config().pin, np.full(2, 0.5), np.full(2, 0.5), rule
  ).rules
  losses = jnp.asarray([1.0, 3.0])
  assert METHODS["cvar"].stages[0].rule == "cvar:alpha=0.4"
  for rule, want in (("cvar:alpha=0.5", [0, 1]), (None, [0.5, 0.5])):
    weighting = adjust(rule)
    got, _ = weighting.update(jnp.eye(2), losses, weighting.init())
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_shared_stages_are_trained_once():
  names = [stage.name for stage in stages_of({
    name: METHODS[name] for name in ("pin", "pin_backbone", "base")
  })]
  assert names == ["pin/backbone", "pin/plugins", "base"]


def test_controls_route_users_as_they_say(finished):
  config, _, _ = finished
  data = problem.make_problem(config)
  for name, expected in (
    ("pin", data.segments), ("pin_swapped", 1 - data.segments),
    ("pin_shared", np.zeros_like(data.segments)),
  ):
    method = METHODS[name]
    stage, segments, _ = stages.routed(data, method, method.serve[0])
    assert stage.name == method.serve[0][1]
    np.testing.assert_array_equal(segments, expected)
  segments, count = stages.assigned(data, METHODS["pin_random"].stages[-1])
  assert count == 2 and segments.sum() == data.segments.sum()
  assert (segments != data.segments).any()


@pytest.mark.parametrize(("plugin", "loss"), [
  ("gated", "softmax"), ("memory", "sampled_softmax"),
])
@pytest.mark.slow
def test_stage_two_learns_from_validation_targets(tmp_path, plugin, loss):
  config = _config()
  config.plugin.name, config.pin.plugin_draw = plugin, "validation"
  config.memory.recent, config.loss.name = 3, loss
  config.memory.relations = ("cosine", "two_step", "linear")
  config.loss.negatives = 10
  config.optimizer.plugin_learning_rate = 0.05
  config.methods = ("memory_alone", "joint_shared", "joint_plugins")
  _run(config, tmp_path / "run")
  rows = pl.read_parquet(tmp_path / "run" / "rows.parquet")
  ranks = rows.pivot("model", index="user", values="rank")
  # The memory sees four of five users' transitions; it knows something.
  assert (rows.filter(model="memory_alone")["rank"] < 15).mean() > 0.5
  for name in ("joint_shared", "joint_plugins"):
    assert (ranks[name] != ranks["memory_alone"]).any()


@pytest.mark.slow
def test_joint_stages_may_read_more_windows(finished, tmp_path):
  _, workdir, _ = finished
  config = _config()
  config.methods, config.joint.batch_size = ("pin_backbone", "base"), 48
  _run(config, tmp_path / "run")
  losses = {}
  for windows, path in ((24, workdir), (48, tmp_path / "run")):
    for record in read_log(epath.Path(path)):
      if "loss" in record:
        key = windows, record["run"]
        losses.setdefault(key, []).append(record["loss"])
  assert losses[48, "pin/backbone"] == losses[24, "pin/backbone"]
  config.joint.batch_size, config.methods = 24, ("base",)
  _run(config, tmp_path / "as_many")
  log = read_log(epath.Path(tmp_path / "as_many"))
  as_many = [r["loss"] for r in log if "loss" in r]
  assert as_many[0] != losses[48, "base"][0]
  config.joint.batch_size = 0
  _run(config, tmp_path / "default")
  log = read_log(epath.Path(tmp_path / "default"))
  assert [r["loss"] for r in log if "loss" in r] == as_many


def test_log_holds_every_step_and_group(finished):
  _, workdir, _ = finished
  records = [
    json.loads(x) for x in (workdir / "log.jsonl").read_text().splitlines()
  ]
  steps = [
    r for r in records if r["run"] == "pin/backbone" and "loss" in r
  ]
  assert [r["step"] for r in steps] == list(range(1, 13))
  for t, record in enumerate(steps):
    assert np.shape(record["loss"]) == (3,)
    assert np.shape(record["cosines"]) == (3, 3)
    assert (record["conflict_rate"] is None) == (t % 4 > 0)
    if t % 4 == 0:  # pin.diagnose_every
      np.testing.assert_allclose(np.diag(record["cosines"]), 1, atol=1e-5)
    np.testing.assert_allclose(sum(record["weights"]), 1, atol=1e-5)
  shares = [
    record["effective_share"]
    for record in records
    if record["run"] == "pin-exact/backbone" and "loss" in record
  ]
  assert np.shape(shares) == (12, 3)
  assert np.min(shares) > 0 and np.max(shares) < 1.001
  assert list((workdir / "events" / "pin" / "backbone").glob("events*"))


def test_outputs_and_protocol(finished):
  _, workdir, text = finished
  for kind in ("html", "md", "tex"):
    assert (workdir / f"report.{kind}").stat().st_size > 5000
  for part in (
    "leave-one-out", "full ranking over 30 items", "ties at their average",
    "s left", str(workdir),
  ):
    assert part in text, part
  assert "KL from" in (workdir / "report.md").read_text()


def test_one_seed_is_said_to_prove_nothing(finished):
  _, _, text = finished
  before = text[: text.index("s left")]
  assert "one seed: nothing proven; --config.seeds=" in before
  assert "No verdict: against base" in text


def test_summary_says_how_the_results_came_about(finished):
  _, workdir, _ = finished
  versions = json.loads((workdir / "summary.json").read_text())["versions"]
  assert versions["jax"] == jax.__version__
  assert versions["polars"] == pl.__version__
  assert versions["code"] and versions["device"]


def test_results_page_of_a_tiny_job_and_of_its_summary(finished, tmp_path):
  config, workdir, _ = finished
  results.write_summary(results.read(workdir), tmp_path / "results" / "all")
  size = sum(p.stat().st_size for p in (tmp_path / "results/all").iterdir())
  assert size < (workdir / "log.jsonl").stat().st_size
  pages = {}
  for name, path in (("job", workdir), ("summary", tmp_path / "results/all")):
    pages[name] = tmp_path / f"{name}.md"
    report.write_report(
      [path], markdown=pages[name], num_resamples=200, console=_console()
    )
  first, second = (
    [line.split(" [")[0] for line in path.read_text().splitlines()]
    for path in pages.values()
  )
  assert [x for x in first if x.startswith("|")] == [
    x for x in second if x.startswith("|")
  ]
  shown = {line.split(" |")[0] for line in first}
  assert {"| " + x.replace("_", r"\_") for x in config.methods} <= shown


def _aggregated(config, prior, shares):
  """Weights [blocks][G] by name of a made-up tree."""
  rules, blocks, *_ = build.make_adjustment(config.pin, prior, shares)
  params = {"items": jnp.ones(2), "block": {"kernel": jnp.ones(3)}}
  loss = lambda params, x, key: x * sum(
    jnp.sum(leaf) for leaf in jax.tree.leaves(params)
  )
  init, step = aggregation.aggregate(loss, rules, blocks=blocks)
  keys = jax.random.split(jax.random.key(0), 2)
  return step(params, jnp.array([1.0, -3.0]), keys, init(params)).weights


def test_granularity_and_blocks_of_a_config():
  prior, shares = np.array([0.5, 0.5]), np.array([0.2, 0.8])
  config = _config()
  np.testing.assert_allclose(_aggregated(config, prior, shares), prior)
  config.pin.blocks = ("items|bias=joint",)
  weights = _aggregated(config, prior, shares)
  np.testing.assert_allclose(weights["items|bias"], shares, rtol=1e-6)
  np.testing.assert_allclose(weights["others"], prior)
  config.pin.blocks = ()
  config.pin.weighting = "consensus"  # published for each tensor by itself
  assert set(_aggregated(config, prior, shares)) == {"items", "block/kernel"}
  config.pin.granularity = "whole"
  assert _aggregated(config, prior, shares).shape == (2,)


def test_prior_exponent():
  config = _config()
  want = problem.make_problem(config).prior ** 0.5
  config.prior.exponent = 0.5
  np.testing.assert_allclose(
    problem.make_problem(config).prior, want / want.sum(), rtol=1e-6
  )


@pytest.mark.slow
def test_another_weighting_runs(tmp_path):
  config = _config()
  config.pin.weighting = "pcgrad:seed=3"
  config.methods = ("pin_backbone", "pcgrad")
  _run(config, tmp_path)
  rows = pl.read_parquet(tmp_path / "rows.parquet")
  assert rows["rank"].is_finite().all()


@pytest.mark.slow
def test_a_sampled_loss_beats_the_untrained_model(tmp_path):
  config = _config()
  config.loss.update(
    name="sampled_softmax", negatives=8, exponent=0.5,
    proposal="in_batch:0.5,popularity:0.5",
  )
  config.methods = ("base", "pin")
  config.backbone_steps, config.plugin_steps = 60, 20
  config.dispatch = config.validation.every = 20
  config.optimizer.learning_rate = 0.02
  _run(config, tmp_path)
  cost = json.loads((tmp_path / "summary.json").read_text())["cost"]
  chance = np.mean([
    1 / np.log2(1 + rank) if rank <= 10 else 0 for rank in range(1, 31)
  ])  # of the 30 items in any order, no history masked
  assert cost["base"]["validation"][0] > 1.2 * chance
  assert "KL from" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_paper_era_protocol_beats_the_untrained_model(tmp_path):
  config = _config()
  config.loss.update(paper_era.get_config().loss)
  config.evaluation.update(protocol="sampled", negatives=4)
  config.data.num_items = 200
  config.methods = ("base", "pin")
  config.backbone_steps, config.plugin_steps = 60, 20
  config.dispatch = config.validation.every = 20
  config.optimizer.learning_rate = 0.02
  _run(config, tmp_path)
  assert not list(tmp_path.glob("rows.parquet"))
  rows = pl.read_parquet(tmp_path / "rows_sampled.parquet")
  assert set(rows["candidates"]) == {5}
  for row in rows.iter_rows(named=True):
    listed = np.asarray([row["score"], *row["negative_scores"]])
    assert row["rank"] == scipy.stats.rankdata(-listed)[0]
  done = results.analyse(results.read(tmp_path), num_resamples=50)
  auc = results.group_table(done, done.main, "AUC", 50)
  assert auc.lines[0][3] > 0.6  # of the base; 0.5 without training
  assert "SAMPLED PROTOCOL" in (tmp_path / "report.md").read_text()


def test_finished_job_reprints_without_training(finished, monkeypatch):
  config, workdir, text = finished
  monkeypatch.setattr(loop, "run", None)  # training would fail
  again = _run(config, workdir)
  assert "is finished" in again
  assert text.split("\nVerdict", 1)[1] == again.split("\nVerdict", 1)[1]


def test_string_ids_come_back(tmp_path):
  rng = np.random.default_rng(0)
  rows = [
    (f"user-{u:02d}", f"item {rng.integers(12)}", f"2024-01-{d + 1:02d}")
    for u in range(30)
    for d in rng.permutation(4 + u % 7)
  ]
  path = tmp_path / "my.csv"
  pl.DataFrame(rows, ["who", "item_id", "date"], orient="row").write_csv(path)
  config = _config()
  config.data = files.get_config(f"path={path},user=who").data
  config.methods = ("base",)
  _run(config, tmp_path / "work")
  out = pl.read_parquet(tmp_path / "work" / "rows.parquet")
  assert out["user"].unique().sort().to_list() == sorted({r[0] for r in rows})
  last = {u: item for u, item, _ in sorted(rows, key=lambda r: (r[0], r[2]))}
  assert dict(zip(out["user"], out["target"], strict=True)) == last


def test_nan_loss_stops_with_one_line(tmp_path):
  config = _config()
  config.optimizer.learning_rate = config.optimizer.weight_decay = 1e3
  with pytest.raises(TrainingError, match="base: the loss .* at step"):
    _run(config, tmp_path)


def test_three_groups_over_two_users(tmp_path):
  (tmp_path / "a.csv").write_text(
    "user,item\n" + "".join(f"{u},{i}\n" for u in (1, 2) for i in range(5))
  )
  config = _config(source="files", path=str(tmp_path / "a.csv"))
  with pytest.raises(InputError, match="num_groups"):
    _run(config, tmp_path / "w")
  assert not (tmp_path / "w").exists()


def test_a_group_without_targets_is_refused_before_training(tmp_path):
  lines = [f"{u},{i}" for u in range(9) for i in range(6 if u > 5 else 3)]
  (tmp_path / "a.csv").write_text("user,item\n" + "\n".join(lines) + "\n")
  config = _config(source="files", path=str(tmp_path / "a.csv"))
  config.methods = ("base", "pin")
  with pytest.raises(InputError, match="group 0 of 3 has no user with two"):
    _run(config, tmp_path / "run")
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_short_users_are_dropped_and_counted(tmp_path):
  lines = [f"{u},{i}" for u in range(20) for i in range(3 + u % 5)]
  lines += ["98,1", "99,1", "99,2"]
  (tmp_path / "a.csv").write_text("user,item\n" + "\n".join(lines) + "\n")
  config = _config(source="files", path=str(tmp_path / "a.csv"))
  config.methods = ("base",)
  text = _run(config, tmp_path / "w")
  assert "users_dropped 2" in text


def test_the_backbone_packs_as_many_rows_as_the_config_says():
  config = _config()
  assert build.make_networks(config, 30).backbone.packed == 0
  config.backbone.pack_rows = 5
  assert build.make_networks(config, 30).backbone.packed == 5


def test_the_compute_type_reaches_the_encoder():
  config = _config()
  config.backbone.compute = "bfloat16"
  build.check(config)
  backbone = build.make_networks(config, 30).backbone
  params = jax.eval_shape(backbone.init, jax.random.key(0))
  history = jax.ShapeDtypeStruct((2, 6), np.int32)
  context = jax.eval_shape(backbone.encode, params, history)
  assert context.dtype.name == "bfloat16"
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("name", build.BACKBONES)
def test_naming_a_backbone_is_enough(name):
  config = base.amazon(None, "any.parquet")
  config.backbone.name = name
  build.check(config)
  options = build.backbone_options(config.backbone)
  assert {"length": 32, "width": 128, "dropout": 0.5}.items() <= options.items()
  assert callable(build.BACKBONES[name](30, **options).encode)


def test_every_key_of_a_backbone_is_taken_and_none_has_two_defaults():
  section = base.default().backbone.to_dict()
  taken = set()
  for make in build.BACKBONES.values():
    for key, parameter in inspect.signature(make).parameters.items():
      if key in section:
        assert parameter.default == section[key]
        taken.add(key)
  assert taken == set(section) - {"name", "pack_rows", "compute"}


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "plugin"), [
  ("sasrec", "adapter"), ("gru4rec", "memory"), ("hstu", "lora"),
  ("din", "gated"), ("sasrec", "translation"),
])
def test_every_backbone_and_plugin_is_served(tmp_path, backbone, plugin):
  config = _config()
  if backbone in ("din", "gru4rec"):
    config.backbone.blocks = base.default().backbone.blocks
  config.backbone.name, config.plugin.name = backbone, plugin
  config.plugin.hidden, config.memory.recent = 4, 3
  config.optimizer.learning_rate = 0.02
  config.methods = ("pin",)
  _run(config, tmp_path)
  _, found = positions(tmp_path, "pin", mask_history=False)
  assert len(found) == 80
  assert found["position"].to_list() == found["rank_unmasked"].to_list()
  made = serve.recommender(tmp_path)
  serving.save(made, tmp_path / "model.pin")
  loaded = serving.load(tmp_path / "model.pin")
  lists = [
    x.recommend(k=5) for x in (made, loaded)
  ]
  assert lists[0].drop("score").equals(lists[1].drop("score"))


def test_a_command_line_error_is_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.main", f"--workdir={tmp_path}/w",
     "--config=experiments/configs/files.py:path=nowhere.csv"],
    capture_output=True, text=True, check=False,
  )
  assert done.returncode == 2
  assert "nowhere.csv does not exist" in done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("config", [
  quickstart.get_config(), paper_era.get_config(),
  *(ml1m.get_config(f"source={source}") for source in ("files", "tfds")),
])
def test_shipped_configs_pass_the_check(config):
  build.check(sizes.for_any_data(config))


def test_temporal_split_ranks_only_users_with_a_later_target(tmp_path):
  rng = np.random.default_rng(1)
  rows = [
    (u, int(rng.integers(1, 15)), int(t))
    for u in range(60)
    for t in np.sort(rng.choice(1000, 4 + u % 9, replace=False))
  ]
  path = tmp_path / "a.parquet"
  pl.DataFrame(rows, ["user", "item", "timestamp"], orient="row").write_parquet(
    path
  )
  config = _config(source="files", path=str(path))
  config.split.update(protocol="temporal", validation=0.2, test=0.2)
  config.methods = ("base",)
  text = _run(config, tmp_path / "w")
  out = pl.read_parquet(tmp_path / "w" / "rows.parquet")
  times = np.sort([t for _, _, t in rows])
  cut = np.quantile(times, 0.8, method="lower")
  later = {u for u, _, t in rows if t >= cut}
  assert set(out["user"]) <= later
  assert len(out) > 0.7 * len(later)
  first = {}
  for user, item, time in sorted(rows, key=lambda r: r[2]):
    if time >= cut:
      first.setdefault(user, item)
  pairs = zip(out["user"], out["target"], strict=True)
  agree = [first[user] == item for user, item in pairs]
  assert np.mean(agree) > 0.9  # the cut is a quantile, give or take one row
  assert "temporal" in text
