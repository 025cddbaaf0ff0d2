"""Training and evaluation over eight devices, in a process of its own."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from toys import RULES

from experiments import build, stages
from experiments.configs import base
from experiments.methods import METHODS
from experiments.problem import make_problem, requests_for
from pin_jax import aggregation
from pin_jax.evaluation import ranking
from pin_jax.models import memory, plugins
from pin_jax.models.backbones import conditioned
from pin_jax.models.sasrec import sasrec
from pin_jax.scale import sharding
from pin_jax.types import InputError

ROOT = pathlib.Path(__file__).parents[1]
STEPS, ITEMS = 50, 40
CASES = {  # data, model
  "quick": ((4, 2),), "slow": ((8, 1), (1, 4)),
}
CHUNK = ranking.Chunk(8, 12)  # one device takes four, two take two each
STAGES = {
  stage.name: dataclasses.replace(stage, reads_activeness=True)
  for stage in METHODS["pin"].stages
}


def config(data=1, model=1, **changes):
  made = base.default()
  made.data = ConfigDict({
    "source": "simulator", "seed": 0, "num_users": 90, "num_items": ITEMS,
    "borders": (4, 6, 9, 30),
  })
  made.groups.num_groups = 3
  # The cheapest to compile; the slow battery takes SASRec.
  made.backbone.update(name="gru4rec", length=5, width=8, dropout=0.1)
  made.plugin.hidden = 4
  made.batch_size = 48
  made.backbone_steps = made.plugin_steps = STEPS
  made.dispatch = made.validation.every = STEPS
  made.pin.diagnose_every = 0
  made.mesh.update(data=data, model=model)
  made.update_from_flattened_dict(changes)
  return made


def trained(made, workdir, names=tuple(STAGES)):
  """The trainer of a config once it has trained the stages."""
  build.check(made)
  problem = make_problem(made)
  networks = build.make_networks(made, ITEMS)
  out = stages.Trainer(made, problem, networks, epath.Path(workdir), (0,))
  for name in names:
    out.train(STAGES[name])
  return out


def params_of(out):
  """Each stage's params as lists by name, tables without their padding."""
  return {
    stage: {
      name: np.asarray(leaf)[: ITEMS + 1].tolist()
      for name, leaf in zip(
        aggregation.leaf_names(found[0].best),
        jax.tree.leaves(jax.device_get(found[0].best)), strict=True,
      )
    }
    for stage, found in out.trained.items()
  }


def compute_training(workdir):
  """One device, eight, and the checkpoints of eight read on one and four."""
  rule = {"pin.weighting": "upgrad"}
  eight = trained(config(4, 2, **rule), f"{workdir}/eight")
  table = eight.trained["pin/backbone"][0].best["items"]
  shards = {str(s.index): s.data.shape for s in table.addressable_shards}
  return {
    "one": params_of(trained(config(**rule), f"{workdir}/one")),
    "eight": params_of(eight),
    "read_on_one": params_of(trained(config(**rule), f"{workdir}/eight")),
    "read_on_four": params_of(
      trained(config(1, 4, **rule), f"{workdir}/eight")
    ),
    "shards": list(shards.values()),
  }


def compute_ranks(cases, nearly=False, told=False, **changes):
  """Ranks over meshes, and the same by one device.

  Args:
    cases: meshes.
    nearly: whether the items' rows differ by no more than their last bits.
    told: whether the backbone reads activeness.
    **changes: of the config.
  """
  ranking.chunk_of = lambda *_: CHUNK
  made = config(**changes)
  problem = make_problem(made)
  networks = build.make_networks(made, ITEMS)
  backbone, plugin = networks.backbone, networks.plugins["own"]
  if told:
    backbone = conditioned(backbone)
  params = backbone.init(jax.random.key(0))
  half = params["items"][1 : 1 + ITEMS // 2]
  params["items"] = jnp.concatenate([half[:1], half, half])  # ties
  if told:
    params["activeness"] = jax.random.normal(
      jax.random.key(3), params["activeness"].shape
    )
  if nearly:
    noise = jax.random.uniform(jax.random.key(2), params["items"].shape)
    params["items"] = half[:1] * (1 + 3e-7 * noise)
    params["bias"] *= 0
  stacked = jax.tree.map(
    lambda x: x + jax.random.normal(jax.random.key(1), x.shape),
    plugins.init_stacked(plugin, jax.random.key(0), 2),
  )
  evidence = None
  if plugin.mix:
    evidence = memory.build(problem.split, memory.Options(
      channels=("after",), window=3, decay=0.6, neighbours=8,
      relations=tuple(made.memory.relations),
    ))
  users = np.flatnonzero(problem.split.test >= 0)[:70]
  requests = requests_for(problem, "test", users)
  model = plugins.Model(backbone, plugin)
  weights = plugins.Weights(params, stacked, evidence)
  sizes = {"num_items": ITEMS, "length": 5}
  ranks = ranking.make_ranker(model, **sizes)(
    weights, problem.sequences, requests
  )
  out = {"one": [x.tolist() for x in ranks], "meshes": {}}
  for data, rows in cases:
    layout = sharding.make_layout(backbone, ITEMS, data=data, model=rows)
    padded = sharding.pad_catalogue(backbone, ITEMS, layout)
    spread, extra = dict(params), layout.rows - len(params["items"])
    spread["items"] = jnp.pad(params["items"], [(0, extra), (0, 0)])
    spread["bias"] = jnp.pad(params["bias"], (0, extra))
    spread = sharding.built(lambda x: x, layout)(spread)
    args = (
      weights._replace(backbone=spread),
      sharding.spread_flat(problem.sequences, layout), requests,
    )
    model = plugins.Model(padded, plugin)
    ranks = ranking.make_ranker(model, **sizes, layout=layout)(*args)
    out["meshes"][f"{data} x {rows}"] = [x.tolist() for x in ranks]
  return out


def compute_weightings(workdir):
  """{rule: params after stage 1 by one device and by eight}."""
  names = ("pin/backbone",)
  return {
    f"{rule}, {loss}": [
      params_of(trained(
        config(*mesh, **{
          "pin.weighting": rule, "loss.name": loss,
          "backbone.name": "sasrec", "backbone.blocks": 1,
        }),
        f"{workdir}/{rule}-{loss}-{mesh[0]}", names,
      ))["pin/backbone"]
      for mesh in ((1, 1), (4, 2))
    ]
    for rule, loss in _battery()
  }


def _battery():
  """Rules by softmax, two by sampled softmax."""
  specs = {
    "annealed_backdoor": "annealed_backdoor:steps=20", "cvar": "cvar:alpha=0.4",
  }
  return [(specs.get(rule, rule), "softmax") for rule in RULES] + [
    ("backdoor", "sampled_softmax"), ("upgrad", "sampled_softmax"),
  ]


def over_eight_devices(what, workdir):
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
  }
  done = subprocess.run(
    [sys.executable, __file__, what, str(workdir)], env=environment,
    capture_output=True, text=True, check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  return over_eight_devices("quick", tmp_path_factory.mktemp("eight"))


def assert_close(got, want, tolerance=1e-5):
  assert got.keys() == want.keys()
  largest = max(np.abs(x).max() for x in want.values())
  for name in want:
    np.testing.assert_allclose(
      got[name], want[name], rtol=tolerance, atol=tolerance * largest,
      err_msg=name,
    )


@pytest.mark.parametrize("stage", list(STAGES))
def test_eight_devices_train_as_one(found, stage):
  assert_close(found["training"]["eight"][stage],
               found["training"]["one"][stage])


def test_the_table_lies_by_rows(found):
  """41 rows over a model axis of two: 42 with padding, 21 a device."""
  assert found["training"]["shards"] == [[21, 8], [21, 8]]


@pytest.mark.parametrize("reader", ["read_on_one", "read_on_four"])
def test_checkpoints_move_between_meshes(found, reader):
  assert found["training"][reader] == found["training"]["eight"]


def check_ranks(ranks):
  for mesh in ranks["meshes"].values():
    assert mesh == ranks["one"]


def test_ranks_over_eight_devices_are_those_of_one(found):
  assert np.any(np.asarray(found["ranks"]["one"][0]) % 1)  # there are ties
  check_ranks(found["ranks"])


def test_scores_are_those_of_one_device_to_the_last_bit(found):
  """All items score alike but for rounding, so ranks show every bit of it."""
  assert len(np.unique(found["nearly"]["one"][2])) > 20
  check_ranks(found["nearly"])


def test_plugins_that_mix_read_the_items_of_a_chunk(found):
  check_ranks(found["mixed"])


@pytest.mark.slow
def test_every_weighting_and_mesh(tmp_path):
  found = over_eight_devices("slow", tmp_path)
  check_ranks(found["ranks"])
  for name, (one, eight) in found["training"].items():
    try:
      assert_close(eight, one)
    except AssertionError as error:
      raise AssertionError(f"{name}: {error}") from error


def test_one_device_has_no_mesh():
  backbone = sasrec(5, length=3, width=4)
  layout = sharding.make_layout(backbone, 5)
  assert layout == sharding.LOCAL
  assert sharding.pad_catalogue(backbone, 5, layout) is backbone
  step, loss = (lambda *_: None), (lambda *_: None)
  assert sharding.kept(step, layout) is step
  assert sharding.over_shards(loss, layout) is loss


@pytest.mark.parametrize(
  "key, value, mesh",
  [
    ("mesh.model", 99, (1, 99)), ("batch_size", 40, (4, 1)),
    ("backbone.pack_rows", 2, (2, 1)), ("num_seeds", 2, (1, 2)),
    ("plugin.name", "gated", (1, 2)), ("joint.batch_size", 42, (4, 1)),
  ],
)
def test_what_does_not_go_over_devices_is_named(key, value, mesh):
  changes = {key: value, "memory.recent": 5}
  if key == "num_seeds":
    changes["seeds"] = (0, 1)
  made = config(*mesh, **changes)
  made.methods = ("base", "pin")
  if key == "plugin.name":
    key, value = "mesh.model", 2
  elif key == "mesh.model":
    key = "section mesh: data=1, model"
  with pytest.raises(InputError, match=f"{key}={value}"):
    build.check(made)
    build.make_networks(made, ITEMS)


if __name__ == "__main__":
  what, where = sys.argv[1:]
  train = {"quick": compute_training, "slow": compute_weightings}[what]
  mixed = {
    "plugin.name": "gated", "memory.channels": ("after",), "memory.recent": 5,
    "memory.relations": ("cosine",), "pin.plugin_draw": "validation",
  }
  print(json.dumps({
    "ranks": compute_ranks(CASES[what]),
    "mixed": compute_ranks(((4, 1),), told=True, **mixed),
    "nearly": compute_ranks(CASES[what], nearly=True),
    "training": train(where),
  }))
