"""Made-up results: rows of models, and the log of group gradients."""

import numpy as np
import polars as pl

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
        "loss": norms.tolist(),
        "weights": weights.tolist(),
        "norms": norms.tolist(),
        "conflict_rate": float((cosines < 0).mean()),
        "effective_groups": float(num_groups),
        "cosines": cosines.tolist(),
        "noise_conflict_rate": 0.25,
        "noise_cosine": 0.125,
        "learning_rate": 1e-3,
      }
    )
    records.append({"run": run, "step": step, "validation": {"overall": 0.1}})
  return records
