"""Times packed against plain rows on a data set.

CPU-milliseconds of a step of the joint base and of ranking 1,024 users, one
history a row and packed in turn within one process; the ratio is the median
over the repetitions:

    python -m benchmarks.packing --path=amazon_beauty_s3rec.parquet
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.joint_base import full_softmax, prepare
from experiments.configs import beauty
from experiments.problem import make_problem, requests_for
from pin_jax.models import plugins


def main() -> None:
  """Prints one line of JSON a backbone."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--path", required=True)
  parser.add_argument("--backbones", default="sasrec,gru4rec,hstu")
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--repetitions", type=int, default=10)
  args = parser.parse_args()
  for name in args.backbones.split(","):
    config = full_softmax(beauty.get_config(f"path={args.path}"))
    config.backbone.name = name
    works = []
    for rows in (0, args.rows):
      config.backbone.pack_rows = rows
      works.append(workloads(config))
    print(json.dumps({"backbone": name} | {
      key: pairwise(*(work[key] for work in works), args.repetitions)
      for key in works[0]
    }))


def workloads(config: ConfigDict) -> dict[str, Callable[[int], None]]:
  """Functions of the repetition's number, which draws the batch."""
  problem = make_problem(config)
  with tempfile.TemporaryDirectory() as folder:
    trainer, run, operands = prepare(config, problem, folder)
  state, step, rank = run.start(), jax.jit(run.step), trainer.ranker(None)
  users = np.flatnonzero(problem.split.test >= 0)
  chosen = np.random.default_rng(0).choice(users, 1024, replace=False)
  requests = requests_for(problem, "test", chosen)
  weights = plugins.Weights(state.params, None)
  return {
    "step": lambda i: jax.block_until_ready(
      step(state, operands, jnp.int32(i))[0].params
    ),
    "rank": lambda i: rank(weights, operands.sequences, requests),
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
