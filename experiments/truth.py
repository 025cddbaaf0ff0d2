"""How close trained models are to the simulator's exact distributions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from pin_jax.data import simulator
from pin_jax.evaluation import metrics

INTERVENTIONAL = "oracle P(y|do(x))"
OBSERVATIONAL = "oracle P(y|x)"


def closeness(
  world: simulator.World,
  history: np.ndarray,
  target: np.ndarray,
  models: Mapping[str, np.ndarray],
) -> pl.DataFrame:
  """KL divergence of every model from the exact distributions, and NDCG@10.

      KL(P(.|do(x)) || model),  KL(P(.|x) || model),  nats, mean over events

  P(y|x) is taken under the distribution of training events. The oracles rank
  by the exact distributions themselves: at test events, the observational one
  is the best that any model reading the same window can do in expectation.

  Args:
    world: the exact model.
    history: [n, L] windows at the test events.
    target: [n] their targets, 1..V.
    models: name -> [n, V] log-probabilities.

  Returns:
    One line a model, the oracles last: model, kl_interventional,
    kl_observational, ndcg (history not masked: users repeat items here).
  """
  exact = jax.jit(
    lambda h: (
      simulator.interventional(world, h),
      simulator.observational(world, h, event="training"),
      simulator.observational(world, h, event="test"),
    )
  )
  chunks = [exact(jnp.asarray(h)) for h in np.array_split(history, 16)]
  do, see, best = (np.concatenate(x) for x in zip(*chunks, strict=True))
  oracles = {INTERVENTIONAL: np.log(do), OBSERVATIONAL: np.log(best)}
  divergence = lambda p, log_q: np.mean(simulator.kl_divergence(p, log_q))
  rank = lambda log_q: metrics.average_rank(log_q, np.asarray(target) - 1)
  return pl.DataFrame([
    {
      "model": name,
      "kl_interventional": float(divergence(do, log_q)),
      "kl_observational": float(divergence(see, log_q)),
      "ndcg": float(metrics.ndcg(np.asarray(rank(log_q)), 10).mean()),
    }
    for name, log_q in {**models, **oracles}.items()
  ])


def average(tables: list[pl.DataFrame]) -> list[dict[str, Any]]:
  """Means over seeds; one dictionary a model."""
  if not tables:
    return []
  merged = pl.concat(tables).group_by("model", maintain_order=True).mean()
  return merged.to_dicts()
