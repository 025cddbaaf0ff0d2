"""Made-up results: rows of models, logs of group gradients, finished jobs."""

import json

import numpy as np
import polars as pl

from experiments import results
from experiments.configs import base

NUM_USERS, NUM_ITEMS = 120, 300


def make_rows(models=("base", "pin"), seeds=(0, 1), names=False, num_groups=5):
  rng = np.random.default_rng(0)
  users = np.arange(NUM_USERS)
  activeness = np.ceil(3 + rng.exponential(20, NUM_USERS)).astype(int)
  by_activeness = np.lexsort((users, activeness))
  groups = np.empty(NUM_USERS, int)
  groups[by_activeness] = users * num_groups // NUM_USERS
  segments = np.zeros(NUM_USERS, int)
  segments[by_activeness[-NUM_USERS // 5 :]] = 1
  frames = []
  for model in models:
    for seed in seeds:
      rank = np.ceil(np.exp(rng.uniform(0, 5, NUM_USERS)) * 2) / 2
      frames.append(
        pl.DataFrame(
          {
            "model": model,
            "seed": pl.Series([seed] * NUM_USERS, dtype=pl.Int32),
            "user": [f"u{u}" for u in users] if names else 7 * users,
            "group": groups.astype(np.int32),
            "segment": segments.astype(np.int32),
            "activeness": activeness.astype(np.int32),
            "target": 1 + users % NUM_ITEMS,
            "rank": rank,
            "candidates": (NUM_ITEMS - activeness).astype(np.int32),
            "rank_unmasked": rank + rng.integers(0, 9, NUM_USERS),
            "candidates_unmasked": pl.Series(
              [NUM_ITEMS] * NUM_USERS, dtype=pl.Int32
            ),
          }
        )
      )
  return pl.concat(frames).sample(fraction=1, shuffle=True, seed=1)


def make_log(run="pin/backbone", steps=60, num_groups=5):
  rng = np.random.default_rng(1)
  records = []
  for step in range(10, 10 * steps + 1, 10):
    gradients = rng.normal(size=(num_groups, 30)) + 0.5
    norms = np.linalg.norm(gradients, axis=1)
    cosines = gradients @ gradients.T / np.outer(norms, norms)
    weights = rng.dirichlet(np.full(num_groups, 30.0))
    records.append(
      {
        "run": run,
        "step": step,
        "weights": weights.tolist(),
        "norms": norms.tolist(),
        "conflict_rate": float((cosines < 0).mean()),
        "effective_groups": float(num_groups),
        "cosines": cosines.tolist(),
      }
    )
    records.append({"run": run, "step": step, "validation": {"overall": 0.1}})
  return records


def make_workdir(path, rows=None, *, length=50, seeds=(0, 1), suffix=""):
  """A finished job's files, made up."""
  path.mkdir(parents=True)
  rows = make_rows(seeds=seeds, names=True) if rows is None else rows
  rows.write_parquet(path / f"rows{suffix}.parquet")
  config = base.default()
  config.data = {"source": "files", "path": "/somewhere/else/toy.parquet"}
  config.backbone.length, config.seeds = length, seeds
  config = {"config": config.to_dict(), "data": "f00"}
  (path / "config.json").write_text(json.dumps(config))
  log = [
    record | {"run": f"seed{seed}/pin/backbone"}
    for seed in seeds for record in make_log(steps=90)
  ]
  text = "".join(json.dumps(record) + "\n" for record in log)
  (path / "log.jsonl").write_text(text)
  cost = {
    "steps": 12, "best_steps": [8], "validation": [0.125], "cpu_seconds": 3.5
  }
  summary = {
    "data": "toy", "fingerprint": "f00", "notes": {"rows_read": 7},
    "split_notes": {}, "prior": [0.2] * 5, "base": "base", "other": "pin",
    "protocol": "leave-one-out", "num_items": NUM_ITEMS, "closeness": [],
    "cost": {f"seed{s}/{r}": cost for s in seeds for r in ("base", "pin/x")},
    "command": "python -m experiments.main --workdir=/somewhere/else/toy "
    '--config=experiments/configs/files.py:path=/somewhere/else/toy.parquet '
    '--config.pin.blocks="(\'a/b=joint\',)"',
    "versions": {"code": "abc", "jax": "0.0.7"},
  }
  (path / "summary.json").write_text(json.dumps(summary))
  return path


def job_of(rows, *, config=None, base=None, num_resamples=400, **summary):
  """The analysis of rows, as if they were a job's."""
  own = results.Results(
    "toy", rows, results.lists_of(rows), "protocol", summary, config or {}, {}
  )
  return results.analyse(own, base, num_resamples)
