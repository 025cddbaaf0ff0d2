"""The FLOP formulas against what XLA counts in a forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import utilization
from benchmarks.utilization import Sizes, forward_work
from experiments import build
from experiments.configs import base

ITEMS, WIDTH, ROWS = 300, 128, 8


def _config(name, length, **options):
  config = base.default()
  config.backbone.update(name=name, width=WIDTH, length=length, **options)
  return config


def _counted(config, candidates):
  """XLA's count of all logits of rows without padding, compiled."""
  backbone = build.make_networks(config, ITEMS).backbone
  shape = (ROWS, config.backbone.length)

  def run(params, history):
    rows, columns = jnp.indices(shape).reshape(2, -1)
    states = backbone.at(backbone.encode(params, history), rows, columns)
    x = backbone.represent(params, states, candidates)
    return backbone.score(params, x, candidates)

  params = jax.eval_shape(backbone.init, jax.random.key(0))
  history = jax.ShapeDtypeStruct(shape, np.int32)
  return utilization.xla_flops(jax.jit(run).lower(params, history).compile())


@pytest.mark.parametrize(
  ("name", "length", "options"),
  [
    ("sasrec", 12, {}),
    ("sasrec", 12, {"blocks": 3, "expansion": 2}),
    ("hstu", 12, {}),
    # XLA counts a loop's body once: one step, so that there is no other.
    ("gru4rec", 1, {}),
    ("gru4rec", 1, {"layers": 3}),
    ("din", 6, {}),
    ("din", 6, {"attention_hidden": 8, "hidden": 200}),
  ],
)
def test_flops_are_those_that_xla_counts(name, length, options):
  config = _config(name, length, **options)
  candidates = jnp.arange(1, 41) if name == "din" else None
  positions = ROWS * length
  # The program computes all pairs, those with later items too.
  sizes = Sizes(
    ITEMS + 1, positions, positions * length, 40 if name == "din" else 0
  )
  work = forward_work(config.backbone, sizes)
  total = sum(kind.flops for kind in work.values())
  np.testing.assert_allclose(_counted(config, candidates), total, rtol=0.05)


def test_flops_of_sasrec_by_hand():
  config = _config("sasrec", 2, blocks=1, expansion=4)
  work = forward_work(config.backbone, Sizes(10, 2, 3))
  # Two positions: four D x D products, two of D x 4 D; three pairs, twice D.
  encoder = 2 * 2 * (4 * WIDTH**2 + 2 * 4 * WIDTH**2) + 3 * 2 * 2 * WIDTH
  assert work["encoder"].flops == encoder
  assert work["output"].flops == 2 * 2 * 10 * WIDTH


@pytest.mark.slow
def test_a_step_is_measured_on_its_own_positions(tmp_path):
  rng = np.random.default_rng(0)
  counts = rng.integers(5, 20, 40)
  rows = [
    f"{user},{rng.integers(30)},{time}"
    for user, count in enumerate(counts) for time in range(count)
  ]
  path = tmp_path / "some.csv"
  path.write_text("\n".join(["user,item,time", *rows]))
  config = utilization.joint_config("beauty", str(path), "gru4rec", 8)
  config.batch_size, config.backbone.pack_rows = 40, 0
  data = utilization.problem.make_problem(config)
  found = utilization.measure(config, data, 1)
  # One window a user (fewer than 32 targets), drawn alike; two are held out.
  mean = (counts - 3).mean() * 40
  assert abs(found["positions"] - mean) < 0.1 * mean
  assert found["filled"] == round(found["positions"] / (40 * 32), 3)
  assert found["step_cpu_milliseconds"] > 0 and found["utilization"] > 0
