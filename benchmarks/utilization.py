"""How close a joint training step comes to the machine's limit.

The model's FLOPs of a step, over the rates at which this machine multiplies
matrices of the step's shapes, give the CPU time of a step that did nothing
else; its share of the CPU time measured is the utilization:

    export XLA_FLAGS="--xla_cpu_multi_thread_eigen=false \
      intra_op_parallelism_threads=1"
    python -m benchmarks.utilization --config=beauty --path=FILE
    python -m benchmarks.utilization --config=ml1m --path=FILE

FLOPs are counted by hand (a multiply-add is 2; forward and backward are three
times forward) over the N real positions of a step and the P pairs of a position
and an item that it reads, no padding, no recomputation, no elementwise work, so
that all of these lower the share. Forward, with V items and width D:

    sasrec    blocks (N (8 + 4 expansion) D^2 + 4 P D) + 2 N V D
    hstu      blocks (10 N D^2 + 4 P D) + 2 N V D
    gru4rec   layers 12 N D^2 + 2 N V D
    din       2 P D H + P C (2 D H + 2 H + 2 D) + N C (6 D h + h^2 + h)

with H `attention_hidden`, h `hidden` and C the target and the negatives of
`sampled_softmax`; the others are trained on the softmax over the catalogue.
Rates and steps are timed in turn; the share is the median over the rounds.
`cost_analysis` is what XLA counts in the compiled step, padding and elementwise
work included, the body of every loop once.

`--config` names a config of experiments/configs; all settings are its, but for
the backbone's name and width, and the loss. One line of JSON a backbone and
width.

On one core, the other busy, SASRec on Beauty (--backbones=sasrec --rounds=5),
by an earlier version, at 255 windows a step: 44 % at width 64, 60 % at 256.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.joint_base import prepare
from experiments import build, problem
from experiments.configs import beauty, ml1m
from pin_jax.data import batches
from pin_jax.training.objectives import CHUNK
from pin_jax.training.steps import Operands

CONFIGS = {"beauty": beauty, "ml1m": ml1m}
_LEAST_SECONDS = 0.05  # of a measured rate, in all its repetitions


class Sizes(NamedTuple):
  """What a step computes on.

  Attributes:
    items: V.
    positions: N, real positions.
    pairs: P, pairs of a real position and an item of its history.
    candidates: C, scored at a position where the loss is sampled.
  """

  items: int
  positions: float
  pairs: float
  candidates: int = 0


class Work(NamedTuple):
  """Products of one kind: forward FLOPs, and [m, k] x [k, n] to time."""

  flops: float
  shapes: tuple[tuple[int, int, int], ...]


def forward_work(backbone: ConfigDict, sizes: Sizes) -> dict[str, Work]:
  """The FLOPs of a forward pass by kind of product.

  Args:
    backbone: section of a config.
    sizes: of the step.

  Returns:
    name -> work; half of an encoder's is timed as [N, D] x [D, D], half as
    [N, D] x [D, 4 D], the output's as its forward and its two backward
    products in chunks of positions.
  """
  width, rows = backbone.width, max(round(sizes.positions), 1)
  if backbone.name == "din":
    return _din_work(backbone, sizes)
  squares = width**2 * sizes.positions
  read = 4 * width * sizes.pairs
  encoder = {
    "sasrec": backbone.blocks * ((8 + 4 * backbone.expansion) * squares + read),
    "hstu": backbone.blocks * (10 * squares + read),
    "gru4rec": backbone.layers * 12 * squares,
  }[backbone.name]
  items = sizes.items
  return {
    "encoder": Work(
      encoder, ((rows, width, width), (rows, width, 4 * width))
    ),
    "output": Work(
      2 * sizes.positions * items * width,
      ((CHUNK, width, items), (CHUNK, items, width), (items, CHUNK, width)),
    ),
  }


def _din_work(backbone: ConfigDict, sizes: Sizes) -> dict[str, Work]:
  width, unit = backbone.width, backbone.attention_hidden
  hidden, many = backbone.hidden, sizes.candidates
  of_pair = 2 * width * unit + 2 * unit + 2 * width
  of_score = 6 * width * hidden + hidden**2 + hidden
  length = backbone.length
  return {
    "unit": Work(
      sizes.pairs * (2 * width * unit + many * of_pair),
      ((CHUNK * length, width, unit), (length, width, many * unit)),
    ),
    "predictor": Work(
      sizes.positions * many * of_score,
      ((CHUNK * many, 3 * width, hidden),),
    ),
  }


def joint_config(name: str, path: str, backbone: str, width: int) -> ConfigDict:
  """A data set's config with another backbone; DIN with sampled negatives."""
  config = CONFIGS[name].get_config(f"path={path}" if path else None)
  config.backbone.update(name=backbone, width=width)
  config.loss.name = "sampled_softmax" if backbone == "din" else "softmax"
  build.check(config)
  return config


def batch_rows(config: ConfigDict) -> int:
  """Windows of a joint step, a multiple of the number of groups."""
  return config.batch_size - config.batch_size % config.groups.num_groups


def mean_sizes(
  config: ConfigDict, operands: Operands, num_items: int
) -> Sizes:
  """Means over 32 batches drawn as the step draws them."""
  how = batches.Draw(
    batch_rows(config), config.backbone.length, config.joint.draw
  )
  draw = jax.jit(
    lambda key: how.batch(key, operands.sequences, operands.pool).targets
  )
  keys = jax.random.split(jax.random.key(2), 32)
  counts = np.stack([np.count_nonzero(draw(key), axis=-1) for key in keys])
  counts = counts.astype(np.float64)
  sampled = config.loss.name != "softmax"
  return Sizes(
    num_items, counts.sum() / len(keys),
    (counts * (counts + 1) / 2).sum() / len(keys),
    1 + config.loss.negatives if sampled else 0,
  )


def timed_product(shape: tuple[int, int, int]) -> Callable[[], float]:
  """() -> seconds of CPU per FLOP of an [m, k] x [k, n] product."""
  m, k, n = shape
  draw = lambda *shape: jax.random.normal(jax.random.key(0), shape)
  x, y, run = draw(m, k), draw(k, n), jax.jit(jnp.matmul)
  run(x, y).block_until_ready()

  def measure() -> float:
    start, times = time.process_time(), 0
    while time.process_time() - start < _LEAST_SECONDS:
      run(x, y).block_until_ready()
      times += 1
    return (time.process_time() - start) / (times * 2 * m * k * n)

  return measure


def measure(
  config: ConfigDict, data: problem.Problem, rounds: int
) -> dict[str, Any]:
  """Times step and products in turn; see the module."""
  with tempfile.TemporaryDirectory() as folder:
    _, run, operands = prepare(config, data, folder)
  step, state = jax.jit(run.step), run.start(0)
  sizes = mean_sizes(config, operands, data.split.interactions.num_items)
  work = forward_work(config.backbone, sizes)
  products = {
    name: [timed_product(shape) for shape in kind.shapes]
    for name, kind in work.items()
  }
  compiled = step.lower(state, operands, jnp.int32(0)).compile()
  seconds, limits, rates = [], [], []
  for t in range(rounds + 1):
    start = time.process_time()
    state, _ = jax.block_until_ready(compiled(state, operands, jnp.int32(t)))
    seconds.append(time.process_time() - start)
    per_flop = {
      name: np.mean([run() for run in runs]) for name, runs in products.items()
    }
    rates.append([1e-9 / x for x in per_flop.values()])
    limits.append(sum(3 * work[k].flops * x for k, x in per_flop.items()))
  seconds, limits, rates = (x[1:] for x in (seconds, limits, rates))
  flops = {name: 3e-9 * kind.flops for name, kind in work.items()}
  share = np.median(np.divide(limits, seconds))
  return {
    "positions": round(sizes.positions),
    "filled": round(
      sizes.positions / (batch_rows(config) * config.backbone.length), 3
    ),
    "gflops": {name: round(x, 3) for name, x in flops.items()},
    "gflops_per_second": dict(
      zip(work, np.median(rates, axis=0).round(2).tolist(), strict=True)
    ),
    "step_cpu_milliseconds": round(1e3 * float(np.median(seconds)), 1),
    "limit_milliseconds": round(1e3 * float(np.median(limits)), 1),
    "utilization": round(float(share), 3),
    "cost_analysis_gflops": round(1e-9 * xla_flops(compiled), 3),
  }


def xla_flops(compiled: Any) -> float:
  """What XLA counts in a compiled program, each loop's body once."""
  return float(compiled.cost_analysis().get("flops", np.nan))


def main() -> None:
  """Prints one line of JSON a backbone and width."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", required=True, choices=CONFIGS)
  parser.add_argument("--path", default="", help="data file of the config")
  parser.add_argument("--backbones", default="sasrec,gru4rec,hstu")
  parser.add_argument("--widths", default="64,256")
  parser.add_argument("--rounds", type=int, default=7)
  args = parser.parse_args()
  data = None
  for width in map(int, args.widths.split(",")):
    for name in args.backbones.split(","):
      config = joint_config(args.config, args.path, name, width)
      data = problem.make_problem(config) if data is None else data
      found = measure(config, data, args.rounds)
      row = {"config": args.config, "backbone": name, "width": width, **found}
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
