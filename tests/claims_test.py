"""The claim's tests against loops over the rows and constructed cases."""

import math
import re
import statistics

import numpy as np
import polars as pl
import pytest
import scipy.stats
from toy_rows import make_rows

from experiments import claims
from experiments.configs import base
from pin_jax.types import InputError

FAST = {"num_resamples": 400}
PARTS = {"overall": (0, 1), "tail": (0,), "head": (1,)}


def _ndcg(rank):
  return 1 / math.log2(1 + rank) if rank <= 10 else 0.0


def _cube(rows, model, segments=(0, 1)):
  """NDCG@10 [S, U], one row at a time."""
  values = {}
  for row in rows.iter_rows(named=True):
    if row["model"] == model and row["segment"] in segments:
      values[row["seed"], row["user"]] = _ndcg(row["rank"])
  seeds, users = (sorted({key[i] for key in values}) for i in (0, 1))
  return np.array([[values[s, u] for u in users] for s in seeds])


def test_changes_equal_a_loop_over_the_rows():
  rows = make_rows(["base", "a", "b"], seeds=(0, 1, 2))
  table = claims.check_claims(rows, base="base", margin=0.02, **FAST)
  assert set(table["model"]) == {"a", "b"}
  for line in table.iter_rows(named=True):
    for part, segments in PARTS.items():
      first, other = (
        _cube(rows, model, segments) for model in ("base", line["model"])
      )
      want = other.mean() / first.mean() - 1
      assert line[f"{part}_change"] == pytest.approx(want)
      assert line[f"{part}_low"] < want < line[f"{part}_high"]
      if part != "overall":
        np.testing.assert_allclose(
          line[f"{part}_of_seeds"], other.mean(1) / first.mean(1) - 1
        )


def test_interval_resamples_users_and_seeds():
  rows = make_rows(["base", "a"], seeds=(0, 1, 2))
  table = claims.check_claims(
    rows, base="base", margin=0.02, num_resamples=4000
  )
  first, other = (_cube(rows, model, (0,)) for model in ("base", "a"))
  rng, draws = np.random.default_rng(0), []
  for _ in range(4000):
    index = np.ix_(
      rng.integers(0, 3, 3), rng.integers(0, first.shape[1], first.shape[1])
    )
    draws.append(other[index].mean() / first[index].mean() - 1)
  low, high = np.percentile(draws, [2.5, 97.5])
  got = [table["tail_low"][0], table["tail_high"][0]]
  np.testing.assert_allclose(got, [low, high], atol=0.08 * (high - low))


def test_p_values_are_corrected_over_the_models():
  rows = make_rows(["base", "a", "b", "c"])
  table = claims.check_claims(rows, base="base", margin=0.3, **FAST)
  for part in PARTS:
    raw = sorted(table[f"{part}_p"])
    want, worst = [], 0.0
    for rank, p in enumerate(raw):
      worst = max(worst, min(1, (3 - rank) * p))
      want.append(worst)
    np.testing.assert_allclose(sorted(table[f"{part}_adjusted"]), want)


def _made(tail, head, users=400, seeds=(0, 1)):
  """Base hits at rank 2 every other user; a model multiplies the hits."""
  frames = []
  for model, shares in (("base", (0.5, 0.5)), ("new", (tail, head))):
    for seed in seeds:
      segment = (np.arange(users) < users // 2).astype(int)
      hit = np.empty(users, bool)
      for index in (0, 1):
        own = np.flatnonzero(segment == index)
        hit[own] = np.arange(len(own)) < shares[index] * len(own)
      frames.append(pl.DataFrame({
        "model": model, "seed": seed, "user": np.arange(users),
        "group": 1 - segment, "segment": segment, "activeness": 3 + segment,
        "target": 1, "rank": np.where(hit, 2.0, 50.0), "candidates": 99,
        "rank_unmasked": np.where(hit, 2.0, 50.0), "candidates_unmasked": 100,
      }))  # fmt: skip
  return pl.concat(frames).sample(fraction=1, shuffle=True, seed=1)


@pytest.mark.parametrize(("tail", "head", "outcome", "words"), [
  (0.7, 0.5, "holds", "The claim holds: against base, tail users are served "
   "better"),
  (0.7, 0.3, "refuted", "head users lose more than the 2 % allowed"),
  (0.3, 0.5, "refuted", "tail users are served worse"),
  (0.5, 0.5, "no loss only", "for tail users no gain is shown"),
  (0.7, 0.49, "gain only", "a loss above 2 % is not ruled out"),
  (0.5, 0.49, "open", "The claim is not shown"),
])  # fmt: skip
def test_outcome_and_words(tail, head, outcome, words):
  rows = _made(tail, head)
  table = claims.check_claims(rows, base="base", margin=0.02, **FAST)
  line = table.row(0, named=True)
  assert line["outcome"] == outcome
  assert words in line["verdict"]
  assert f"{100 * (tail / 0.5 - 1):+.1f}".replace("-", "−") in line["verdict"]


def test_a_wide_margin_makes_a_small_loss_acceptable():
  rows = _made(0.7, 0.47)
  outcomes = [
    claims.check_claims(rows, base="base", margin=m, **FAST)["outcome"][0]
    for m in (0.02, 0.2)
  ]
  assert outcomes == ["gain only", "holds"]


def test_models_are_compared_on_the_seeds_they_share():
  rows = pl.concat([
    make_rows(["base"], seeds=(0, 1, 2)), make_rows(["a"], seeds=(1, 2)),
    make_rows(["b"], seeds=(2, 7)), make_rows(["c"], seeds=(9,)),
  ])  # fmt: skip
  table = claims.check_claims(rows, base="base", margin=0.02, **FAST)
  got = dict(table.select("model", "seeds").iter_rows())
  assert got == {"a": 2, "b": 1}
  line = table.filter(model="b").row(0, named=True)
  shared = rows.filter(seed=2)
  want = _cube(shared, "b").mean() / _cube(shared, "base").mean() - 1
  assert line["overall_change"] == pytest.approx(want)


def test_levels_gap_and_worst_group_equal_a_loop():
  rows = pl.concat([make_rows(["base", "a"]), make_rows(["b"], seeds=(0,))])
  table = claims.levels(rows, **FAST)
  assert sorted(table["model"]) == ["a", "b", "base"]
  for line in table.iter_rows(named=True):
    for part, segments in PARTS.items():
      want = _cube(rows, line["model"], segments).mean()
      assert line[part] == pytest.approx(want)
      assert line[f"{part}_low"] < want < line[f"{part}_high"]
    assert line["gap"] == pytest.approx(line["head"] - line["tail"])
    own = rows.filter(model=line["model"])
    groups = [
      statistics.mean(map(_ndcg, own.filter(group=g)["rank"])) for g in range(5)
    ]
    assert line["worst"] == pytest.approx(min(groups))
    assert line["worst_group"] == groups.index(min(groups))


def test_an_absent_comparator_is_refused():
  with pytest.raises(InputError, match="no model 'joint'"):
    claims.check_claims(make_rows(), base="joint", margin=0.02, **FAST)


def test_rows_without_head_users_have_no_verdict_on_them():
  rows = make_rows().filter(pl.col("segment") == 0)
  line = claims.check_claims(rows, base="base", margin=0.02, **FAST)
  assert math.isnan(line["head_change"][0])
  assert line["outcome"][0] == "open"


def test_power_by_hand():
  section = base.default().claims
  assumed, tail, head = claims.power_lines(
    section, {"tail": 8000, "head": 2000}, 4
  )
  for part in ("NDCG@10 of 0.05", "correlation 0.5", "2 % of the mean"):
    assert part in assumed
  gains = [1 / math.log2(1 + rank) for rank in range(1, 11)]
  # P(hit) sum(gains) / 10 = .05, and the hits' rank is uniform.
  hit = 0.05 / statistics.mean(gains)
  second = hit * statistics.mean(g**2 for g in gains)
  variance = (second - 0.05**2) / 0.05**2
  z = scipy.stats.norm.ppf(0.975)
  for line, users in ((tail, 8000), (head, 2000)):
    error = math.sqrt(2 * 0.5 * variance / users + 2 * 0.02**2 / 4)
    needed = 100 * (z + scipy.stats.norm.ppf(0.8)) * error
    assert f"{needed:.1f} %" in line
    assert f"{users:,} users, 4 seeds" in line
  chance = 100 * scipy.stats.norm.sf(z - 0.02 / error)
  assert f"with a probability of {chance:.0f} %" in head


def test_power_says_nothing_of_a_segment_without_users():
  lines = claims.power_lines(base.default().claims, {"tail": 9, "head": 0}, 1)
  assert len(lines) == 2 and re.search("tail, 9 users, 1 seed:", lines[1])
