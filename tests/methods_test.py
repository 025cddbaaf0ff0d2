"""Rows learn from the same interactions, and from no test target."""

import dataclasses
import io

import jax
import numpy as np
import polars as pl
import pytest
import rich.console
from etils import epath

from experiments import build, job, serve, stages, workdir
from experiments.methods import (
  choose,
  chosen,
  compared,
  information,
  selected,
)
from experiments.problem import make_problem
from pin_jax.data import batches, splits
from tests import tiny
from tests.job_test import positions

pytestmark = pytest.mark.usefixtures("compile_quickly")
GATED = ("base", "base_validation", "memory_alone", "joint_plugins")


def _config(**changes):
  config = tiny.get_config()
  config.methods = GATED
  config.plugin.name, config.pin.plugin_draw = "gated", "validation"
  config.optimizer.plugin_learning_rate = 0.05
  config.memory.update(recent=3, relations=("cosine",))
  config.backbone_steps, config.plugin_steps, config.refit = 10, 10, 10
  config.update_from_flattened_dict(changes)
  build.check(config)
  return config


def _trainer(config, problem, directory):
  return stages.Trainer(
    config, problem, build.networks_of(config, problem), epath.Path(directory),
    (0,),
  )


@pytest.mark.parametrize(("changes", "names"), [
  ({"methods": ("base", "pin"), "pin.plugin_draw": "validation"},
   ["base_validation", "base", "pin"]),
  ({"methods": ("joint_shared", "pin"), "pin.plugin_draw": "validation"},
   ["joint_shared", "pin"]),
  ({"methods": ("base", "base_validation"), "pin.plugin_draw": "validation"},
   ["base", "base_validation"]),
  ({"methods": ("base", "memory_alone"), "pin.plugin_draw": "validation"},
   ["base", "memory_alone"]),
  ({"methods": ("base", "pin"), "pin.plugin_draw": "users"}, ["base", "pin"]),
  ({"methods": ("base", "pin_gates"), "pin.plugin_draw": "users"},
   ["base_validation", "base", "pin_gates"]),
  ({"methods": ("base", "pin"), "pin.plugin_draw": "validation", "refit": 5},
   ["base", "pin"]),
])
def test_what_learns_from_more_is_compared_with_what_does_too(changes, names):
  config = _config(**{"refit": 0, "plugin.name": "memory",
                      "memory.relations": (), **changes})
  assert [*selected(config)] == names
  assert compared(names)[0] == names[0]


def test_the_table_says_what_its_rows_learnt_from():
  def said(**changes):
    config = _config(**changes)
    return information(selected(config), config)

  assert said(refit=0) == (
    "base_validation, joint_plugins learnt from training targets and half "
    "of the users' validation targets; base, memory_alone learnt from training "
    "targets; compare a row only with those that learnt from the same"
  )
  assert said() == (
    "all rows have learnt from training targets and all validation targets"
  )
  plain = {"plugin.name": "memory", "memory.relations": (), "refit": 0}
  assert not said(methods=("base", "joint_plugins"), **plain,
                  **{"pin.plugin_draw": "users"})


def test_a_longer_prefix_holds_the_validation_target_and_no_more():
  split = make_problem(_config()).split
  users = np.arange(len(split.train_end)) % 3 > 0
  split = dataclasses.replace(
    split, validation=np.where(np.arange(len(users)) % 5, split.validation, -1)
  )
  grown = splits.with_validation(split, users)
  for u, (end, more) in enumerate(
    zip(split.train_end, grown.train_end, strict=True)
  ):
    wanted = [*range(end)]
    if users[u] and split.validation[u] >= 0:
      wanted += [split.validation[u]]
    assert [*range(more)] == wanted
  np.testing.assert_array_equal(grown.test, split.test)
  np.testing.assert_array_equal(grown.validation, split.validation)


def _read_targets(made, stage):
  """{(user, position)} of all the targets that a stage's batches hold."""
  run = made.prepare(stage)
  sizes = {"batch_size": 5000, "length": made.length}
  key = jax.random.key(1)
  if isinstance(run.pool, batches.HeldOut):
    batch = batches.Draw(**sizes, draw="validation").batch(
      key, made.sequences, run.pool
    )
  else:
    batch = batches.Draw(**sizes, draw="interactions").batch(
      key, made.sequences, run.pool
    )
  columns = np.arange(made.length) - made.length + 1
  users = np.broadcast_to(batch.users[..., None], batch.targets.shape)
  places = np.asarray(batch.last)[..., None] + 1 + columns
  real = np.asarray(batch.targets) > 0
  return {*zip(users[real].tolist(), places[real].tolist(), strict=True)}


def test_every_stage_reads_the_targets_that_it_says_and_no_other(tmp_path):
  gates = "joint_gate", "pin_gates"
  config = _config(methods=(*GATED, "tail_only", *gates), seeds=(0,))
  problem = make_problem(config)
  made = _trainer(config, problem, tmp_path)
  made.trained = {  # nothing is trained here
    name: {0: None}
    for name in ("base", "base-validation", "joint", "pin/backbone")
  }
  split = problem.split
  fitted = _fitted(len(split.train_end))
  methods = selected(config)
  for stage in {s for m in methods.values() for s in m.stages}:
    learnt = set()
    for user, end in enumerate(split.train_end.tolist()):
      if stage.users == "tail" and problem.segments[user]:
        continue
      held_out = {(user, end)}  # the validation target follows the prefix
      if stage.kind == "plugin":
        learnt |= held_out if fitted[user] else set()
        continue
      learnt |= {(user, place) for place in range(1, end)}
      if stage.learns == "all" or stage.learns == "half" and fitted[user]:
        learnt |= held_out
    if stage.phase != "none":
      assert _read_targets(made, stage) == learnt, stage.name
  last = [methods[name].stage(methods[name].serve[0][0]) for name in methods]
  assert {stage.learns for stage in last} == {"all"}


def _fitted(num_users):
  return np.random.default_rng(0).permutation(num_users) < num_users // 2


def _with_other_targets(problem, part, users):
  """The problem with another item as the target of some users."""
  data, position = problem.split.interactions, getattr(problem.split, part)
  items = data.items.copy()
  place = (data.offsets[:-1] + position)[users]
  items[place] = items[place] % data.num_items + 1
  split = dataclasses.replace(
    problem.split, interactions=dataclasses.replace(data, items=items)
  )
  return problem._replace(
    split=split, sequences=batches.host_sequences(split)
  )


@pytest.fixture(scope="module")
def refitted(tmp_path_factory, compile_quickly):
  """The workdir of a job with a last phase."""
  directory = tmp_path_factory.mktemp("runs") / "refit"
  console = rich.console.Console(file=io.StringIO(), width=200)
  job.run(_config(), directory, console)
  assert "all rows have learnt from" in console.file.getvalue()
  return directory


def test_nothing_that_is_learnt_depends_on_a_test_target(refitted, tmp_path):
  config = _config()
  problem = make_problem(config)
  other = _with_other_targets(problem, "test", problem.segments >= 0)
  changed = problem.sequences.items != other.sequences.items
  assert changed.sum() == len(problem.segments)
  learnt = []
  for data, place in ((problem, refitted), (other, tmp_path)):
    made = _trainer(config, data, place)
    for stage in job.stages_of(selected(config)):
      made.train(stage)  # the first time it is read
    evidence, before = map(made._networks.evidence, (True, False))
    more = evidence.interactions.sum() - before.interactions.sum()
    assert more == len(problem.segments)  # a validation target of everybody
    np.testing.assert_array_equal(evidence.activeness, before.activeness)
    best = {name: runs[0].best for name, runs in made.trained.items()}
    learnt.append((best, evidence._replace(place=None)))  # of all interactions
  jax.tree.map(np.testing.assert_array_equal, *learnt)


def test_refit_moves_backbones_and_leaves_gates(refitted):
  config = _config()
  made = _trainer(config, make_problem(config), refitted)
  for stage in job.stages_of(selected(config)):
    made.read(stage)
  best = {name: runs[0].best for name, runs in made.trained.items()}
  for k, slot in enumerate(
    serve.recommender(refitted, method="joint_plugins").routes.slots
  ):
    own = jax.tree.map(lambda x, k=k: x[k], best["joint/plugins"])
    jax.tree.map(np.testing.assert_array_equal, slot.plugins, own)
    jax.tree.map(
      np.testing.assert_array_equal, slot.backbone, best["joint/refit"]
    )
  assert any(
    (a != b).any() for a, b in zip(
      *map(jax.tree.leaves, (best["joint/refit"], best["joint"])), strict=True
    )
  )
  cost = workdir.read_json(epath.Path(refitted) / "summary.json")["cost"]
  refits = {name: x for name, x in cost.items() if name.endswith("/refit")}
  assert {*refits} == {
    "base/refit", "base-validation/refit", "joint/refit"
  }
  for spent in refits.values():
    assert spent["steps"] == 10 and spent["best_steps"] == [10]
    assert not spent["validation"]


def test_refitted_rows_are_what_is_served(refitted):
  rows = pl.read_parquet(refitted / "rows.parquet")
  keys = rows["model"].unique(maintain_order=True).to_list()
  assert keys == [*selected(_config())]
  for method in ("base", "joint_plugins"):
    own, found = positions(refitted, method, mask_history=False)
    assert len(found) == len(own) == 80
    assert found["position"].to_list() == found["rank_unmasked"].to_list()


def test_the_choice_is_the_best_on_validation_of_each_segment():
  found = {
    "base": {"tail": 0.2, "head": 0.5}, "pin": {"tail": 0.3, "head": 0.4},
    "joint_gate": {"tail": 0.3, "head": 0.5},
    "pin_swapped": {"tail": 0.9, "head": 0.9},  # controls
    "pin_random": {"tail": 0.9, "head": 0.9},
  }
  assert choose(found) == {"tail": "pin", "head": "base"}
  method = chosen({"tail": "pin", "head": "base", "users": {}})
  assert method.serve == (("pin/backbone", "pin/plugins"), ("base", None))
  assert [stage.name for stage in method.stages] == [
    "pin/backbone", "pin/plugins", "base"
  ]


def test_the_choice_reads_targets_from_which_nobody_learnt(refitted, tmp_path):
  config = _config()
  problem = make_problem(config)
  fitted = _fitted(len(problem.segments))
  other = _with_other_targets(problem, "validation", fitted)
  test = _with_other_targets(problem, "test", problem.segments >= 0)
  made = _trainer(config, problem, refitted)
  for stage in job.stages_of(selected(config)):
    made.read(stage)
  found = {}
  for name, data in (("same", problem), ("others", other), ("test", test)):
    read = _trainer(config, data, tmp_path)  # another problem's memory
    read.trained = made.trained
    read.weights = made.weights
    found[name] = {
      key: job.validated(key, 0, data, read, half=True) for key in GATED
    }
  for name in ("others", "test"):
    jax.tree.map(np.testing.assert_array_equal, found[name], found["same"])
  everybody = job.validated("base", 0, problem, made, half=False)
  for part, ranks in everybody.items():
    own = problem.segments == ("tail", "head").index(part)
    assert len(ranks) == own.sum()
    np.testing.assert_array_equal(
      found["same"]["base"][part], ranks[~fitted[own]]
    )
  choice = workdir.read_json(epath.Path(refitted) / "summary.json")["choice"]
  for key, own in found["same"].items():  # of the rows before the refit
    ndcg = np.where(own["tail"] <= 10, 1 / np.log2(1 + own["tail"]), 0)
    assert choice["validation"][key]["tail"] == pytest.approx(ndcg.mean())
