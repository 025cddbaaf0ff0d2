"""The examples of CONTRIBUTING.md: one's own metric, loss, weighting, data.

The batteries of `weightings_test` cover the weighting besides.
"""

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import toys

import pin_jax
from pin_jax.aggregation import weightings
from pin_jax.evaluation import metrics
from pin_jax.training import losses

TABLES = metrics.METRICS, losses.SAMPLED_LOSSES, weightings.WEIGHTINGS


@pytest.fixture
def page(monkeypatch, tmp_path):
  """What the examples define; the library's tables forget it in the end."""
  monkeypatch.chdir(tmp_path)
  before = [dict(table) for table in TABLES]
  yield toys.of_page(metrics=metrics, losses=losses, weightings=weightings)
  for table, kept in zip(TABLES, before, strict=True):
    table.clear()
    table.update(kept)


def test_the_functions_are_their_formulae(page):
  np.testing.assert_allclose(
    page["rank_biased_precision"](np.array([1.0, 2.5, 3, 4]), 3),
    [1, 0.8**1.5, 0.64, 0],
  )
  positive, negatives = jnp.array([2.0, 0.5]), jnp.array([[0.0, 1.5], [1, 3]])
  where = jnp.array([[True, True], [True, False]])
  got = page["hinge"](positive, negatives, jnp.zeros(2), where)
  np.testing.assert_allclose(got, [0.25, 1.5])


def test_one_line_each_makes_a_job(page):
  """On columns of one's own; the metric selects, and the tables show it."""
  options = {
    "recipe": "published", "methods": ("base", "pin"),
    "evaluation.metrics": ("rbp@10", "ndcg@10"), "loss.name": "hinge",
    "loss.negatives": 4, "pin.weighting": "inverse_norms",
    "backbone_steps": 10, "plugin_steps": 10, "batch_size": 20, "dispatch": 5,
    "backbone.width": 8, "groups.num_groups": 2, "validation.every": 10,
  }
  job = pin_jax.compare(page["shop"](), "runs/shop", **options)
  rows = pl.read_parquet("runs/shop/rows.parquet")
  assert set(rows["model"]) == {"base", "pin"} and len(rows) == 120
  ranks = rows.filter(model="base")["rank"].to_numpy()
  shown = job.table().filter(method="base", users="overall")
  mean = page["rank_biased_precision"](ranks, 10).mean()
  assert mean == pytest.approx(shown["rbp@10"][0], abs=1e-6)
