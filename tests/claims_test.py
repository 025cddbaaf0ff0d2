"""The claim's tests against loops over the rows and constructed cases."""

import math
import re
import statistics

import numpy as np
import polars as pl
import pytest
import scipy.stats
from toy_rows import make_rows

from experiments import claims, commands, sections
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
  rows = make_rows(["base", "a", "b", "c"], seeds=(0, 1, 2))
  table = claims.check_claims(rows, base="base", margin=0.3, **FAST)
  families = [([f"{part}_p"], [f"{part}_adjusted"]) for part in PARTS]
  harm = ["tail_harm", "head_harm"]  # of all models, one family
  families.append((harm, [f"{name}_adjusted" for name in harm]))
  for raw, adjusted in families:
    raw, adjusted = (
      sorted(x for name in names for x in table[name])
      for names in (raw, adjusted)
    )
    want, worst = [], 0.0
    for rank, p in enumerate(raw):
      worst = max(worst, min(1, (len(raw) - rank) * p))
      want.append(worst)
    np.testing.assert_allclose(adjusted, want)


def _made(tail, head, users=400, seeds=(0, 1, 2)):
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


@pytest.mark.parametrize(("seeds", "words"), [
  ((3,), "one seed shows tail users at +40.0 ["),
  ((3, 5), "two seeds show tail users at +40.0 ["),
])  # fmt: skip
def test_no_verdict_below_three_seeds(seeds, words):
  for tail in (0.7, 0.1):
    line = claims.check_claims(
      _made(tail, 0.5, seeds=seeds), base="base", margin=0.02,
      more_seeds="run on", **FAST,
    ).row(0, named=True)
    assert line["outcome"] == "too few seeds"
    assert line["tail_p"] < 0.05 or line["tail_harm"] < 0.05
    assert all(math.isnan(line[key]) for key in line if "adjusted" in key)
    for word in ("holds", "refuted", "served", "shown"):
      assert word not in line["verdict"]
    assert line["verdict"].endswith("take three seeds or more: run on")
    assert words in line["verdict"] or tail == 0.1


def test_models_of_few_seeds_are_in_no_family():
  rows = pl.concat([
    _made(0.7, 0.5),
    *(
      _made(0.7, 0.5, seeds=(0,)).filter(model="new").with_columns(
        model=pl.lit(f"other {i}")
      ) for i in range(30)
    ),
  ])  # fmt: skip
  table = claims.check_claims(rows, base="base", margin=0.02, **FAST)
  assert dict(zip(table["model"], table["outcome"], strict=True)) == {
    "new": "holds", **{f"other {i}": "too few seeds" for i in range(30)},
  }
  new = table.filter(model="new")
  assert new["tail_adjusted"][0] == new["tail_p"][0]


def test_models_that_learnt_from_other_targets_have_no_verdict():
  """And are in no family: a row of equal information is tested as if alone."""
  rows = make_rows(
    ["base + validation", "base", "joint + plugins"], seeds=(0, 1, 2)
  )
  config = {"pin": {"plugin_draw": "validation"}}
  lines = sections.claim_lines(
    rows, {}, config, base="base + validation", **FAST
  )
  by_model = {line["model"]: line for line in lines}
  less, same = by_model["base"], by_model["joint + plugins"]
  assert less["outcome"] == "unequal information"
  assert math.isnan(less["tail_adjusted"]) and math.isfinite(less["tail_low"])
  assert less["verdict"].startswith(
    "No verdict: base has learnt from training targets, base + validation from "
    "training targets and half of the users' validation targets."
  )
  alone = claims.check_claims(
    rows.filter(pl.col("model") != "base"), base="base + validation",
    margin=0.02, **FAST,
  ).to_dicts()
  assert same == alone[0]
  again = sections.claim_lines(
    rows, {}, {**config, "refit": 5}, base="base", **FAST
  )
  assert [line["outcome"] for line in again] != ["unequal information"] * 2


def test_one_harm_among_many_models_is_not_enough():
  """An interval below zero that Holm's correction does not let through."""
  clean = _made(0.5, 0.5).filter(model="base")
  tail = clean.filter(segment=0)
  lost = tail.filter(rank=2)["user"].unique().sort()[:9].to_list()
  won = tail.filter(rank=50)["user"].unique().sort()[:1].to_list()
  harmed = clean.with_columns(
    model=pl.lit("harmed"),
    rank=pl.when(pl.col("user").is_in(lost)).then(50.0)
    .when(pl.col("user").is_in(won)).then(2.0).otherwise("rank"),
  )
  same = [clean.with_columns(model=pl.lit(f"same {i}")) for i in range(30)]
  lines = [
    claims.check_claims(rows, base="base", margin=0.02).row(
      by_predicate=pl.col("model") == "harmed", named=True
    )
    for rows in (pl.concat([clean, harmed]), pl.concat([clean, harmed, *same]))
  ]
  assert all(line["tail_high"] < 0 for line in lines)
  assert [line["outcome"] for line in lines] == ["refuted", "no loss only"]
  assert ["worse" in line["verdict"] for line in lines] == [True, False]


def _served(title, ranks, seeds=(0, 1)):
  """Rows of a model, `ranks` of two tail users and of two head users."""
  return pl.concat([
    pl.DataFrame({
      "model": title, "seed": seed, "user": np.arange(4), "group": 0,
      "segment": [0, 0, 1, 1], "activeness": 3, "target": 1, "rank": ranks,
      "candidates": 9, "rank_unmasked": ranks, "candidates_unmasked": 9,
    })  # fmt: skip
    for seed in seeds
  ])


@pytest.mark.parametrize(("title", "stage", "best", "said"), [
  ("pin", "pin/plugins", [0, 40],
   "stage 2 changed nothing for tail users: pin equals its backbone there"),
  ("pin, swapped plugins", "pin/plugins", [0, 40],
   "nothing for head users: pin, swapped plugins equals its backbone there"),
  ("pin", "pin/plugins", [0, 0], "stage 2 changed nothing for all users: pin"),
  ("pin, shared plugin", "pin/shared", [0], "changed nothing for all users"),
  ("pin, random segments", "pin/random", [0, 0], "nothing for all users"),
  ("pin, random segments", "pin/random", [0, 10], None),
  ("fine-tuned", "fine-tuned/head", [0],
   "nothing for head users: fine-tuned equals its start there"),
  ("memory alone", "memory-alone", [0], None),
  ("pin exact", "classifier", [0], "classifier of strata learnt nothing"),
  ("base", "base", [0], None),
  ("somebody else's", "base", [0], None),
])  # fmt: skip
def test_a_stage_that_changed_nothing_says_so(title, stage, best, said):
  rows = _served(title, [1.0, 2.0, 3.0, 4.0])
  steps = 0 if title == "memory alone" else 50
  cost = {
    f"seed{seed}/{stage}": {"steps": steps, "best_steps": best}
    for seed in (0, 1)
  }
  found = claims.unchanged(rows, cost)
  assert set(found) == ({title} if said else set())
  assert said is None or said in found[title] and "seed" not in found[title]
  one = claims.unchanged(rows, {f"seed1/{stage}": cost[f"seed1/{stage}"]})
  assert said is None or one[title].endswith("(seed 1)")
  alone = claims.unchanged(rows.filter(seed=0), {stage: cost[f"seed1/{stage}"]})
  assert alone == found


def test_equal_ranks_are_no_change_and_the_verdict_ends_with_it():
  rows = pl.concat([
    _served("base", [1.0, 1.0, 1.0, 1.0]),
    _served("pin backbone", [1.0, 2.0, 3.0, 4.0]),
    _served("pin", [1.0, 2.0, 3.0, 5.0]),
  ])
  remarks = claims.unchanged(rows, {})
  assert remarks == {
    "pin": "stage 2 changed nothing for tail users: pin equals its backbone "
    "there"
  }
  table = claims.check_claims(
    rows, base="base", margin=0.02, remarks=remarks, **FAST
  )
  verdicts = dict(table.select("model", "verdict").iter_rows())
  assert verdicts["pin"].endswith(f" Note: {remarks['pin']}.")
  assert "Note" not in verdicts["pin backbone"]


@pytest.mark.parametrize(("command", "seeds", "swept", "want"), [
  ("python -m experiments.main --config=a.py --workdir=/r/toy/", (4,), False,
   'python -m experiments.main --config=a.py --workdir=/r/toy-3seeds '
   "'--config.seeds=(4, 0, 1)'"),
  ("python -m experiments.main --config.seeds='(0,1)' --workdir 'a b'", (0, 1),
   False, "python -m experiments.main '--workdir=a b-3seeds' "
   "'--config.seeds=(0, 1, 2)'"),
  ("", (0,), False,
   "run the job with '--config.seeds=(0, 1, 2)' in another workdir"),
  ("x", (0, 2), True, "python -m experiments.sweep … --more_seeds=1"),
])  # fmt: skip
def test_the_command_that_adds_seeds(command, seeds, swept, want):
  assert commands.more_seeds(command, seeds, swept=swept) == want


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
  rows = make_rows(seeds=(0, 1, 2)).filter(pl.col("segment") == 0)
  line = claims.check_claims(rows, base="base", margin=0.02, **FAST)
  assert math.isnan(line["head_change"][0])
  assert line["outcome"][0] == "open"


def test_power_by_hand():
  section = base.default().claims
  means = {"tail": 0.04, "head": 0.1}
  assumed, tail, head = claims.power_lines(
    section, {"tail": 8000, "head": 2000}, means, 4
  )
  assert "NDCG@10 (tail 0.0400, head 0.1000)" in assumed
  gains = [1 / math.log2(1 + rank) for rank in range(1, 11)]
  z = scipy.stats.norm.ppf(0.975)
  for line, part, users in ((tail, "tail", 8000), (head, "head", 2000)):
    # P(hit) sum(gains) / 10 is the mean, and the hits' rank is uniform.
    hit = means[part] / statistics.mean(gains)
    second = hit * statistics.mean(g**2 for g in gains)
    variance = (second - means[part] ** 2) / means[part] ** 2
    error = math.sqrt(2 * 0.15 * variance / users + 2 * 0.02**2 / 4)
    needed = 100 * (z + scipy.stats.norm.ppf(0.8)) * error
    assert f"{needed:.1f} %" in line
    assert f"{users:,} users, 4 seeds" in line
  chance = 100 * scipy.stats.norm.sf(z - 0.02 / error)
  assert f"with a probability of {chance:.0f} %" in head


@pytest.mark.parametrize(("users", "levels", "seeds"), [
  ({"tail": 8000, "head": 0}, {"tail": 0.05, "head": 0.0}, 2),  # no verdict
  ({"tail": 0, "head": 0}, {"tail": 0.05}, 3),
  ({"tail": 8000}, {}, 3),  # not known
  ({"tail": 8000}, {"tail": 0.0}, 3),
  ({"tail": 8000}, {"tail": 0.5}, 3),  # above the mean gain: not evenly spread
  ({"tail": 100}, {"tail": 0.05}, 3),  # eleven hits
])  # fmt: skip
def test_power_is_left_out_where_it_would_be_wrong(users, levels, seeds):
  section = base.default().claims
  assert claims.power_lines(section, users, levels, seeds) == []


def test_power_is_that_of_real_jobs():
  """The stated error is about that of an interval a job then gave.

  Beauty, 17,890 tail users, three seeds: PIN against the base [+7.9, +14.5] %.
  """
  line = claims.power_lines(
    base.default().claims, {"tail": 17_890}, {"tail": 0.0507}, 3
  )[1]
  stated = float(re.search(r"gain of ([\d.]+) %", line)[1])
  z = scipy.stats.norm.ppf([0.975, 0.8])
  assert stated == pytest.approx((14.5 - 7.9) / 2 / z[0] * z.sum(), rel=0.3)
