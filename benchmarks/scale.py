"""Step time and memory against the sizes of catalogue and user base.

SASRec of width 64 with sampled softmax, 256 negatives, 50 windows of length 50
from each of five groups, the item table updated by rows (or, for comparison,
--tables=dense):

    python -m benchmarks.scale --items=10000 --items=10000000
    python -m benchmarks.scale --users=10000 --users=10000000

The first of the sizes is measured beside each of the others, turn by turn in
one process; printed are the ratios of their processor time a step (median,
lowest and highest over the rounds), what the compiled program plans for, and
the peak of the process that held this size alone.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax import aggregation
from pin_jax.data import batches
from pin_jax.models.sasrec import sasrec
from pin_jax.training import losses, negatives, sparse
from pin_jax.training.loop import compile_steps
from pin_jax.training.optimizers import make_optimizer
from pin_jax.training.steps import (
  Adjustment,
  Operands,
  TrainState,
  backbone_step,
  init_state,
)

_GROUPS, _STEPS, _ITEMS, _USERS, _PER_USER = 5, 5, 10_000, 10_000, 10


def main() -> None:
  """Runs the benchmark, or, with --pair, one measured pair of sizes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--items", type=int, action="append")
  parser.add_argument("--users", type=int, action="append")
  parser.add_argument("--tables", choices=("row_sparse", "dense"),
                      default="row_sparse")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--width", type=int, default=64)
  parser.add_argument("--pair", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.pair:
    print(json.dumps(measure(json.loads(args.pair), args)))
    return
  items, users = args.items or [_ITEMS], args.users or [_USERS]
  sizes = [(v, users[0]) for v in items] + [(items[0], u) for u in users[1:]]
  options = [
    f"--tables={args.tables}", f"--rounds={args.rounds}",
    f"--width={args.width}",
  ]
  for size in sizes:
    alone = _run([size], options)
    pair = _run([sizes[0], size], options)
    print(json.dumps({
      "items": size[0], "users": size[1],
      "seconds_a_step": alone["seconds"][0],
      "ratio": pair["ratio"], "planned_gb": alone["planned_gb"][0],
      "peak_gb": alone["peak_gb"],
    }), flush=True)


def _run(sizes: list[tuple[int, int]], options: list[str]) -> dict[str, Any]:
  command = [sys.executable, "-m", "benchmarks.scale", *options]
  command.append(f"--pair={json.dumps(sizes)}")
  return json.loads(subprocess.run(
    command, check=True, stdout=subprocess.PIPE
  ).stdout)


def measure(
  sizes: list[tuple[int, int]], args: argparse.Namespace
) -> dict[str, Any]:
  """Times the steps of one or two sizes, turn by turn."""
  runs = [_make(*size, args.tables, args.width) for size in sizes]
  seconds = np.asarray([
    [run() for run, _ in runs] for _ in range(args.rounds)
  ])
  ratio = seconds[:, -1] / seconds[:, 0]
  return {
    "seconds": np.median(seconds, 0).round(4).tolist(),
    "ratio": [
      round(float(f(ratio)), 3) for f in (np.median, np.min, np.max)
    ],
    "planned_gb": [planned for _, planned in runs],
    "peak_gb": round(
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2
    ),
  }


def _make(
  num_items: int, num_users: int, tables: str, width: int
) -> tuple[Callable[[], float], float]:
  """(() -> processor seconds a step, planned memory) of one size."""
  length = 50
  backbone = sasrec(num_items, length=length, width=width)
  optimizer = make_optimizer(10_000)
  if tables == "row_sparse":
    optimizer = optimizer._replace(
      transformation=sparse.row_sparse(
        optimizer.transformation, backbone.tables
      ), tables=backbone.tables,
    )
  adjustment = Adjustment(aggregation.backdoor(np.ones(_GROUPS)))
  step = backbone_step(
    backbone, adjustment, optimizer, batches.Draw(50, length),
    loss=losses.sampled(
      losses.sampled_softmax, negatives.uniform(num_items), count=256
    ),
  )

  @jax.jit  # alike everywhere: drawing would take more memory than training
  def start(key: jax.Array) -> TrainState:
    shapes = jax.eval_shape(backbone.init, key)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01), shapes)
    return init_state(params, optimizer, adjustment)

  state = start(jax.random.key(0))
  operands = Operands(
    jax.random.key(1), *_data(num_items, num_users, length), None
  )
  compiled = compile_steps(step).lower(
    state, operands, 0, _STEPS
  ).compile()
  memory = compiled.memory_analysis()
  planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  state, logs = compiled(state, operands, 0)
  jax.block_until_ready(logs)
  t = _STEPS

  def run() -> float:
    nonlocal state, t
    clock = time.process_time()
    state, logs = compiled(state, operands, t)
    jax.block_until_ready(logs)
    t += _STEPS
    return (time.process_time() - clock) / _STEPS

  return run, round(planned / 2**30, 2)


def _data(
  num_items: int, num_users: int, length: int
) -> tuple[batches.Sequences, batches.Pool]:
  """Users of ten to thirty items each, in five groups."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(_PER_USER, 3 * _PER_USER, num_users)
  starts = np.cumsum(lengths) - lengths
  items = rng.integers(1, num_items + 1, lengths.sum(), np.int32)
  as_int32 = lambda x: jnp.asarray(x, jnp.int32)
  sequences = batches.Sequences(
    as_int32(items), as_int32(starts), as_int32(lengths - 1)
  )
  groups = np.arange(num_users) % _GROUPS
  pool = batches.make_pool(
    lengths - 1, groups, num_groups=_GROUPS, length=length
  )
  return sequences, pool


if __name__ == "__main__":
  main()
