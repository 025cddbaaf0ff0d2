"""Values, claims and tables against loops over the rows; summaries of jobs."""

import json
import math
import re

import numpy as np
import polars as pl
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
from toy_rows import job_of, make_log, make_rows, make_workdir

from experiments import report, results
from pin_jax.types import InputError

FAST = {"num_resamples": 400}
PARTS = {"overall": (0, 1), "tail": (0,), "head": (1,)}
KEEP = {
  "overall": lambda row: True,
  "tail": lambda row: row["segment"] == 0,
  "head": lambda row: row["segment"] == 1,
} | {f"group {g}": lambda row, g=g: row["group"] == g for g in range(5)}
COLUMNS = {"history masked": "rank", "history not masked": "rank_unmasked"}


def _gain(rank, metric):
  name, _, k = metric.partition("@")
  gain = {"HR": 1, "NDCG": 1 / math.log2(1 + rank), "MRR": 1 / rank}[name]
  return gain if rank <= float(k or "inf") else 0


def _by_hand(rows, model, keep, metric, column="rank"):
  """(users, mean over users of the mean over seeds), one row at a time."""
  per_user = {}
  for row in rows.iter_rows(named=True):
    if row["model"] == model and keep(row):
      per_user.setdefault(row["user"], []).append(_gain(row[column], metric))
  return len(per_user), np.mean([np.mean(v) for v in per_user.values()])


def _cube(rows, model, segments=(0, 1)):
  """NDCG@10 [S, U], one row at a time."""
  values = {}
  for row in rows.iter_rows(named=True):
    if row["model"] == model and row["segment"] in segments:
      values[row["seed"], row["user"]] = _gain(row["rank"], "NDCG@10")
  seeds, users = (sorted({key[i] for key in values}) for i in (0, 1))
  return np.array([[values[s, u] for u in users] for s in seeds])


# Tables.


@pytest.mark.parametrize("metric", ["HR@5", "NDCG@10", "HR@20", "MRR"])
@pytest.mark.parametrize("title", COLUMNS)
def test_the_table_by_group_equals_a_loop_over_the_rows(metric, title):
  rows = make_rows(names=metric == "HR@5")
  table = results.group_table(job_of(rows), title, metric, 200)
  assert [line[0] for line in table.lines] == [*map(str, range(5))]
  for group, spread, users, first, other, change in table.lines:
    keep = KEEP[f"group {group}"]
    arguments = keep, metric, COLUMNS[title]
    count, want = _by_hand(rows, "base", *arguments)
    _, theirs = _by_hand(rows, "pin", *arguments)
    assert users == count
    np.testing.assert_allclose(
      [first, other, change.estimate], [want, theirs, theirs / want - 1],
      rtol=1e-9,
    )
    assert not change.low >= change.estimate  # NaN where nobody hits
    inside = [
      row["activeness"] for row in rows.iter_rows(named=True) if keep(row)
    ]
    assert spread == f"{min(inside)}–{max(inside)}"


def test_interval_equals_a_bootstrap_of_users_and_seeds():
  rows = make_rows(["base", "a"], seeds=(0, 1, 2))
  claim, = results.check_claims(
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
  np.testing.assert_allclose(
    claim.tail[1:3], [low, high], atol=0.08 * (high - low)
  )


def test_levels_and_gap_equal_a_loop():
  rows = pl.concat([make_rows(["base", "a"]), make_rows(["b"], seeds=(0,))])
  found = results.levels(rows, **FAST)
  assert sorted(level.model for level in found) == ["a", "b", "base"]
  for level in found:
    for part, segments in PARTS.items():
      want = _cube(rows, level.model, segments).mean()
      estimate, low, high = getattr(level, part)
      assert estimate == pytest.approx(want) and low < want < high
    assert level.gap.estimate == pytest.approx(
      level.head.estimate - level.tail.estimate
    )


def test_other_metrics_are_means_over_the_rows():
  rows = make_rows()
  wanted = "ndcg@5", "hr@20", "mrr"
  job = job_of(rows, config={"evaluation": {"metrics": wanted}})
  table = results.metrics_table(job, "history not masked")
  names = [column.name for column in table.columns[2:]]
  assert names == ["NDCG@5", "HR@20", "MRR"]
  for model, part, *values in table.lines:
    want = [
      _by_hand(rows, model, KEEP[part], name, "rank_unmasked")[1]
      for name in names
    ]
    np.testing.assert_allclose(values, want)


@pytest.mark.parametrize(("change", "message"), [
  (lambda r: r.filter((pl.col("model") != "pin") | (pl.col("user") != 7)),
   "differ in user.*: 2 of 240 are not in all"),
  (lambda r: pl.concat([r, r.head(1)]), "repeat a user and seed"),
  (lambda r: r.drop("rank"), "lack the columns"),
  (lambda r: r.with_columns(
    pl.when(model="pin").then("target").otherwise(9).alias("target")),
   "several values of 'target'"),
])  # fmt: skip
def test_models_that_cannot_be_compared_are_refused(change, message):
  with pytest.raises(InputError, match=message) as error:
    job_of(change(make_rows()))
  assert "\n" not in str(error.value)


def test_an_absent_comparator_is_refused():
  with pytest.raises(InputError, match="toy has no model 'joint'; choose"):
    job_of(make_rows(), base="joint")


def test_protocol_names_everything_a_reader_must_know():
  line = results.protocol_line(
    make_rows(), {"protocol": "leave-one-out.", "num_items": 300}
  )
  for part in (
    "leave-one-out; full ranking over 300 items; ties at their average rank",
    "seeds 0, 1; intervals: 95 % percentile bootstrap, 2,000 resamples",
    "paired, over users crossed with seeds",
  ):
    assert part in line
  one = results.protocol_line(make_rows(seeds=(3,)))
  assert "split not recorded" in one and "seed 3; " in one
  assert "over users, without the spread over training seeds" in one


# The sampled protocol.


def sampled_rows(negatives=9):
  """Rows whose ranks are those of made-up scores."""
  rows = make_rows().drop("rank_unmasked", "candidates_unmasked")
  rng = np.random.default_rng(2)
  scores = rng.integers(0, 9, (rows.height, negatives + 1)) / 2  # many tie
  scores[:, 0] += 0.5
  scores = scores.astype(np.float32)
  ranks = [scipy.stats.rankdata(-row, method="average")[0] for row in scores]
  return rows.with_columns(
    rank=pl.Series(ranks),
    candidates=pl.lit(negatives + 1, pl.Int32),
    score=pl.Series(scores[:, 0]),
    negative_scores=pl.Series(scores[:, 1:]),
  )


def _sampled_by_hand(rows, model, keep, metric):
  """AUC pooled within each seed; the others a mean over users and seeds."""
  values, auc = [], sklearn.metrics.roc_auc_score
  for seed in (0, 1):
    chosen = [
      row for row in rows.iter_rows(named=True)
      if row["model"] == model and row["seed"] == seed and keep(row)
    ]
    labels = [[1] + [0] * 9] * len(chosen)
    scores = [[row["score"], *row["negative_scores"]] for row in chosen]
    values.append({
      "AUC": lambda x, y: auc(np.ravel(x), np.ravel(y)),
      "GAUC": lambda x, y: np.mean([*map(auc, x, y)]),
      "log loss": lambda x, y: sklearn.metrics.log_loss(
        np.ravel(x), scipy.special.expit(np.ravel(y))
      ),
    }[metric](labels, scores))
  return np.mean(values)


def test_sampled_metrics_equal_scikit_learn():
  rows = sampled_rows()
  job = job_of(rows)
  assert [*job.claims] == ["sampled candidates"]
  for metric in ("AUC", "GAUC", "log loss"):
    table = results.group_table(job, job.main, metric, 200)
    for group, _, _, *values, change in table.lines:
      want = [
        _sampled_by_hand(rows, model, KEEP[f"group {group}"], metric)
        for model in ("base", "pin")
      ]
      np.testing.assert_allclose(values, want, rtol=1e-6)
      assert change.low <= change.estimate <= change.high
  means = results.metrics_table(job, job.main)
  auc = [column.name for column in means.columns].index("AUC")
  want = _sampled_by_hand(rows, means.lines[0][0], KEEP["overall"], "AUC")
  assert means.lines[0][auc] == pytest.approx(want, rel=1e-6)


def test_sampled_and_full_rows_do_not_mix():
  with pytest.raises(InputError, match="lack the columns .*score"):
    job_of(sampled_rows().drop("score"))
  with pytest.raises(pl.exceptions.PolarsError):
    pl.concat([make_rows(), sampled_rows()])


# The claim.


def test_changes_equal_a_loop_over_the_rows():
  rows = make_rows(["base", "a", "b"], seeds=(0, 1, 2))
  found = results.check_claims(rows, base="base", margin=0.02, **FAST)
  assert {claim.model for claim in found} == {"a", "b"}
  for claim in found:
    for part, segments in PARTS.items():
      first, other = (
        _cube(rows, model, segments) for model in ("base", claim.model)
      )
      change = getattr(claim, part)
      want = other.mean() / first.mean() - 1
      assert change.estimate == pytest.approx(want)
      assert change.low < want < change.high
      if part != "overall":
        np.testing.assert_allclose(
          claim.of_seeds[part], other.mean(1) / first.mean(1) - 1
        )


@pytest.mark.parametrize("metric", ["HR@5", "MRR"])
def test_claims_and_levels_are_on_the_first_metric(metric):
  rows = make_rows()
  job = job_of(rows, config={"evaluation": {"metrics": [metric, "ndcg@10"]}})
  want = [_by_hand(rows, m, KEEP["tail"], metric)[1] for m in ("base", "pin")]
  by_model = {level.model: level.tail[0] for level in job.levels[job.main]}
  assert [by_model["base"], by_model["pin"]] == pytest.approx(want)
  assert job.claim().tail.estimate == pytest.approx(want[1] / want[0] - 1)
  for table in (results.change_table, results.level_table):
    assert metric in table(job, job.main).title


def test_p_values_are_corrected_over_the_models():
  rows = make_rows(["base", "a", "b", "c"], seeds=(0, 1, 2))
  found = results.check_claims(rows, base="base", margin=0.3, **FAST)
  for family in (["tail"], ["head"], ["tail harm", "head harm"]):
    raw = sorted(
      getattr(claim, name.split()[0])[4 if "harm" in name else 3]
      for claim in found for name in family
    )
    adjusted = sorted(claim.p[name] for claim in found for name in family)
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


def _judged(rows, margin=0.02):
  """The claim on the model under test, and the verdict in words."""
  job = job_of(rows, base="base", config={
    "claims": {"non_inferiority_margin": margin}
  }, other="new")
  return job.claim(), report.verdict(job, job.claim())


@pytest.mark.parametrize(("tail", "head", "margin", "outcome", "words"), [
  (0.7, 0.5, 0.02, "holds",
   "The claim holds: against base, tail users are served better"),
  (0.7, 0.3, 0.02, "refuted", "head users lose more than the 2 % allowed"),
  (0.3, 0.5, 0.02, "refuted", "tail users are served worse"),
  (0.5, 0.5, 0.02, "no loss only", "for tail users no gain is shown"),
  (0.7, 0.49, 0.02, "gain only", "a loss above 2 % is not ruled out"),
  (0.5, 0.49, 0.02, "open", "The claim is not shown"),
  (0.7, 0.47, 0.2, "holds", "lose no more than 20 %"),
])  # fmt: skip
def test_outcome_and_words(tail, head, margin, outcome, words):
  claim, text = _judged(_made(tail, head), margin)
  assert claim.outcome == outcome and words in text
  assert f"{100 * (tail / 0.5 - 1):+.1f}".replace("-", "−") in text


@pytest.mark.parametrize(("seeds", "words", "more"), [
  ((3,), "one seed shows tail users at +40.0 [", "3,0,1"),
  ((3, 5), "two seeds show tail users at +40.0 [", "3,5,0"),
])  # fmt: skip
def test_no_verdict_below_three_seeds(seeds, words, more):
  for tail in (0.7, 0.1):
    claim, text = _judged(_made(tail, 0.5, seeds=seeds))
    assert claim.outcome == "too few seeds"
    assert claim.tail.p_value < 0.05 or claim.tail.p_harm < 0.05
    assert all(map(math.isnan, claim.p.values()))
    for word in ("holds", "refuted", "served", "shown"):
      assert word not in text
    assert f"--config.seeds={more}" in text
    assert words in text or tail == 0.1


def test_models_of_few_seeds_are_in_no_family():
  rows = pl.concat([
    _made(0.7, 0.5),
    *(
      _made(0.7, 0.5, seeds=(0,)).filter(model="new").with_columns(
        model=pl.lit(f"other {i}")
      ) for i in range(30)
    ),
  ])  # fmt: skip
  found = results.check_claims(rows, base="base", margin=0.02, **FAST)
  outcomes = {claim.model: claim.outcome for claim in found}
  assert outcomes == {
    "new": "holds", **{f"other {i}": "too few seeds" for i in range(30)},
  }
  new = next(claim for claim in found if claim.model == "new")
  assert new.p["tail"] == new.tail.p_value


def test_models_that_learnt_from_other_targets_have_no_verdict():
  """And are in no family: a row of equal information is tested as if alone."""
  rows = make_rows(["base_validation", "base", "joint_plugins"], (0, 1, 2))
  config = {"pin": {"plugin_draw": "validation"}}
  job = job_of(rows, base="base_validation", config=config)
  by_model = {claim.model: claim for claim in job.claims[job.main]}
  less, same = by_model["base"], by_model["joint_plugins"]
  assert less.outcome == "unequal information"
  assert math.isnan(less.p["tail"]) and math.isfinite(less.tail.low)
  assert report.verdict(job, less).startswith(
    "No verdict: base has learnt from training targets, base_validation from "
    "training targets and half of the users' validation targets."
  )
  alone, = results.check_claims(
    rows.filter(pl.col("model") != "base"), base="base_validation",
    margin=0.02, **FAST,
  )
  assert same == alone
  job = job_of(rows, base="base", config={**config, "refit": 5})
  assert "unequal information" not in [
    claim.outcome for claim in job.claims[job.main]
  ]


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
  claims = [
    next(
      claim for claim in results.check_claims(rows, base="base", margin=0.02)
      if claim.model == "harmed"
    )
    for rows in (pl.concat([clean, harmed]), pl.concat([clean, harmed, *same]))
  ]
  assert all(claim.tail.high < 0 for claim in claims)
  assert [claim.outcome for claim in claims] == ["refuted", "no loss only"]


def test_models_are_compared_on_the_seeds_they_share():
  rows = pl.concat([
    make_rows(["base"], seeds=(0, 1, 2)), make_rows(["a"], seeds=(1, 2)),
    make_rows(["b"], seeds=(2, 7)), make_rows(["c"], seeds=(9,)),
  ])  # fmt: skip
  found = results.check_claims(rows, base="base", margin=0.02, **FAST)
  assert {claim.model: claim.seeds for claim in found} == {"a": 2, "b": 1}
  b = next(claim for claim in found if claim.model == "b")
  shared = rows.filter(seed=2)
  want = _cube(shared, "b").mean() / _cube(shared, "base").mean() - 1
  assert b.overall.estimate == pytest.approx(want)


def test_rows_without_head_users_have_no_verdict_on_them():
  rows = make_rows(seeds=(0, 1, 2)).filter(pl.col("segment") == 0)
  job = job_of(rows)
  assert math.isnan(job.claim().head.estimate)
  assert job.claim().outcome == "open"


# Jobs and their summaries.


@pytest.fixture
def workdir(tmp_path):
  return make_workdir(tmp_path / "toy")


@pytest.fixture
def pair(workdir, tmp_path):
  """Results as read from a job, and from its summary."""
  own = results.read(workdir)
  results.write_summary(own, tmp_path / "out")
  return own, results.read(tmp_path / "out")


def test_ranks_come_back_up_to_the_cutoff(pair):
  own, again = pair
  for column in ("rank", "rank_unmasked"):
    before, after = (
      {
        key: frame.sort("activeness", "group", "segment", column)[column]
        for key, frame in x.rows.partition_by(
          "model", "seed", as_dict=True
        ).items()
      }
      for x in pair
    )
    assert before.keys() == after.keys()
    for key, ranks in before.items():
      want = [rank if rank <= 20 else np.inf for rank in ranks]
      assert after[key].to_list() == want
  facts = ["group", "segment", "activeness", "candidates"]
  assert again.rows.select(facts).sort(facts).equals(
    own.rows.select(facts).sort(facts)
  )
  assert again.protocol == own.protocol


def test_paired_results_of_a_user_stay_paired(pair):
  products = [
    np.prod(results.values_of(x.rows, ["base", "pin"]), 0).sum()
    for x in pair
  ]
  assert products[0] == pytest.approx(products[1])


def test_the_report_of_a_summary_is_that_of_the_rows(pair):
  # Users are resampled in another order: means and their differences agree to
  # the last digit, ends of intervals to the resampling's error.
  first, second = (
    [
      re.sub(r" \[.*?\]|^python .*", "", line)
      for line in report.to_markdown(
        report.sections([results.analyse(x, None, 200)], 200)
      ).splitlines()
    ]
    for x in pair
  )
  assert first == second


def test_a_summary_is_small_and_names_nobody_and_no_folder(tmp_path):
  rng = np.random.default_rng(0)
  rows = pl.concat([
    make_rows(names=True).with_columns(
      user=pl.col("user") + f"-{copy}",
      rank=pl.lit(np.ceil(np.exp(rng.uniform(0, 9, 480)))),
      target=pl.lit(f"secret-{copy}"),
    )
    for copy in range(50)
  ])
  path = make_workdir(tmp_path / "large", rows)
  results.write_summary(results.read(path), tmp_path / "out")
  ranks = (tmp_path / "out" / "ranks.parquet").read_bytes()
  assert len(ranks) < 1.5 * rows.height  # bytes a row, of two ranks
  text = (tmp_path / "out" / "job.json").read_text()
  assert len(text) < 60_000
  for part in (b"u7-", b"secret"):
    assert part not in ranks and part.decode() not in text
  assert "somewhere" not in text and "toy.parquet" in text
  again = results.read(tmp_path / "out")
  assert again.config["data"]["path"] == "toy.parquet"
  assert again.summary["command"] == (
    "python -m experiments.main --workdir=runs/toy "
    "--config=experiments/configs/files.py:path=toy.parquet "
    '--config.pin.blocks="(\'a/b=joint\',)"'
  )


def test_every_stage_that_combines_groups_keeps_its_gradients(workdir):
  """Whatever its name; plugins log the norms of two segments, and no more."""
  whole = next(r for r in make_log() if r["conflict_rate"] is not None)
  joint = whole | {
    "norms": [1.0], "cosines": [[1.0]], "weights": [1.0], "loss": [1.0]
  }
  plugins = {"loss": [1.0, 2.0], "norms": [1.0, 2.0], "learning_rate": 0.1}
  between = whole | {"conflict_rate": None, "cosines": [[None] * 5] * 5}
  runs = "cvar", "seed1/group-dro", "pin-exact/backbone", "a/b"
  log = [
    {**record, "run": run, "step": t}
    for t in (1, 2) for run, record in (
      *((run, whole if t == 2 else between) for run in runs),
      ("backbone", joint), ("pin/plugins", plugins), ("x/backbone", plugins),
    )
  ]
  (workdir / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
  found = results.read(workdir).gradients
  assert [*found] == [*map(results.without_seed, runs)]
  assert {own["records"] for own in found.values()} == {1}


def test_conflicts_are_means_over_steps_and_seeds(workdir):
  cosines = [[1.0, 0.5], [0.5, 1.0]], [[1.0, -0.25], [-0.25, 1.0]]
  log = [
    {"run": run, "norms": [1.0, 2.0], "cosines": cosines[step % 2],
     "step": step, "weights": [0.25, 0.75], "conflict_rate": step / 10,
     "effective_groups": 2.0}
    for run in ("seed0/a", "seed1/a", "b") for step in range(4)
  ]  # fmt: skip
  (workdir / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log))
  results.write_summary(results.read(workdir), workdir.parent / "out")
  for path in (workdir, workdir.parent / "out"):
    a, b = report.cells(results.gradient_table(results.read(path)))
    assert a == ["a", "8", "0.15", "0.12", "0.25, 0.75", "2.00"]
    assert b == ["b", "4", "0.15", "0.12", "0.25, 0.75", "2.00"]


def test_titles_of_former_versions_become_keys(tmp_path):
  rows = make_rows(["joint + shared plugin", "pin", "Peer X"], (0, 1, 2))
  path = make_workdir(tmp_path / "old", rows)
  summary = json.loads((path / "summary.json").read_text())
  summary |= {
    "base": "joint + shared plugin", "other": "pin",
    "closeness": [{"model": "pin exact", "kl_interventional": 1,
                   "kl_observational": 1, "ndcg": 1}],
  }  # fmt: skip
  (path / "summary.json").write_text(json.dumps(summary))
  own = results.read(path)
  job = results.analyse(own, num_resamples=50)
  assert set(own.rows["model"]) == {"joint_shared", "pin", "Peer X"}
  assert (job.base, job.other) == ("joint_shared", "pin")
  assert own.summary["closeness"][0]["model"] == "pin_exact"
  # And in summaries, whatever else they hold.
  results.write_summary(own, tmp_path / "out")
  content = json.loads((tmp_path / "out" / "job.json").read_text())
  content["summary"]["base"] = "joint + shared plugin"
  content["trials"] = {"models": [{"model": "pin, shared plugin"}]}
  content["adjustment"] = []
  (tmp_path / "out" / "job.json").write_text(json.dumps(content))
  ranks = pl.read_parquet(tmp_path / "out" / "ranks.parquet")
  ranks.columns = [
    x.replace("joint_shared", "joint + shared plugin") for x in ranks.columns
  ]
  ranks.write_parquet(tmp_path / "out" / "ranks.parquet")
  again = results.read(tmp_path / "out")
  assert set(again.rows["model"]) == set(own.rows["model"])
  assert results.analyse(again, num_resamples=50).base == "joint_shared"
  assert again.trials["models"][0]["model"] == "pin_shared"


def test_ranks_of_another_kind_are_refused(tmp_path):
  rows = make_rows().with_columns(rank=pl.lit(3.25))
  path = make_workdir(tmp_path / "a", rows)
  with pytest.raises(InputError, match="3.25, neither whole nor half"):
    results.write_summary(results.read(path), tmp_path / "out")
