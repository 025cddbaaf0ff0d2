"""Times packed against plain rows on a data set.

CPU-milliseconds of a whole joint training step and of ranking 1,024 users, one
history a row and packed in turn within one process; the ratio is the median
over the repetitions:

    python -m benchmarks.packing --path=amazon_beauty_s3rec.parquet
"""

import argparse
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.build import BACKBONES
from pin_jax import aggregation
from pin_jax.data import batches, files, splits
from pin_jax.evaluation import ranking
from pin_jax.models import plugins
from pin_jax.training.optimizers import make_optimizer
from pin_jax.training.steps import (
  Adjustment,
  Operands,
  backbone_step,
  init_state,
)
from pin_jax.types import Backbone, PyTree, Requests


def main() -> None:
  """Prints one line of JSON a backbone."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--path", required=True)
  parser.add_argument("--backbones", default="sasrec,gru4rec,hstu")
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--batch_size", type=int, default=255)
  parser.add_argument("--length", type=int, default=32)
  parser.add_argument("--width", type=int, default=64)
  parser.add_argument("--repetitions", type=int, default=10)
  args = parser.parse_args()
  split = splits.leave_one_out(files.read(args.path))
  for name in args.backbones.split(","):
    plain = BACKBONES[name](
      split.interactions.num_items, length=args.length, width=args.width,
      dropout=0.5,
    )
    other = plain._replace(packed=args.rows)
    print(json.dumps({"backbone": name, **compare(plain, other, split, args)}))


def compare(
  plain: Backbone, other: Backbone, split: splits.Split,
  args: argparse.Namespace,
) -> dict[str, list[float]]:
  """[CPU-milliseconds plain, packed, ratio] of every kind of work."""
  params = jax.jit(plain.init)(jax.random.key(0))
  works = [
    workloads(backbone, params, split, args) for backbone in (plain, other)
  ]
  return {
    name: pairwise(*(work[name] for work in works), args.repetitions)
    for name in works[0]
  }


def workloads(
  backbone: Backbone, params: PyTree, split: splits.Split,
  args: argparse.Namespace,
) -> dict[str, Callable[[int], None]]:
  """Functions of the repetition's number, which draws the batch."""
  sequences = batches.make_sequences(split)
  targets = batches.training_targets(split)
  pool = batches.make_pool(
    targets, np.zeros(len(targets), int), num_groups=1, length=args.length
  )
  optimizer = make_optimizer(100)
  adjustment = Adjustment(aggregation.backdoor(np.ones(1)))
  draw = batches.Draw(args.batch_size, args.length)
  step = jax.jit(backbone_step(backbone, adjustment, optimizer, draw))
  state = init_state(params, optimizer, adjustment)
  operands = Operands(jax.random.key(1), sequences, pool, None)
  model = plugins.Model(backbone, None)
  rank = ranking.make_ranker(
    model, num_items=split.interactions.num_items, length=args.length
  )
  chosen = np.random.default_rng(0).choice(len(targets), 1024, replace=False)
  requests = Requests(
    chosen, np.asarray(split.test)[chosen], np.zeros(1024, int)
  )
  weights = plugins.Weights(params, None)
  return {
    "step": lambda i: jax.block_until_ready(
      step(state, operands, jnp.int32(i))[0].params
    ),
    "rank": lambda i: rank(weights, sequences, requests),
  }


def pairwise(
  first: Callable[[int], None], second: Callable[[int], None], times: int
) -> list[float]:
  """Median CPU-milliseconds of both and the median ratio."""
  spent = []
  for i in range(-1, times):
    row = []
    for run in (first, second):
      start = time.process_time()
      run(i + 1)
      row.append(1e3 * (time.process_time() - start))
    spent.append(row)
  spent = np.asarray(spent[1:])  # the first pair compiles
  ratio = np.median(spent[:, 0] / spent[:, 1])
  return [round(float(x), 2) for x in (*np.median(spent, axis=0), ratio)]


if __name__ == "__main__":
  main()
