"""Tables against plain numpy loops over the rows; plots are real images."""

import io
import json
import math
import statistics
import subprocess
import sys
import warnings

import matplotlib.image
import numpy as np
import polars as pl
import pytest
import rich.console
import scipy.special
import scipy.stats
import sklearn.metrics
from toy_rows import NUM_ITEMS, NUM_USERS
from toy_rows import make_log as _log
from toy_rows import make_rows as _rows

from experiments import plots, report, tables
from pin_jax.types import InputError

FAST = {"num_resamples": 200}


@pytest.fixture(autouse=True)
def _no_warnings():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def _by_hand(rows, model, column, keep, metric):
  """Mean over users of the mean over seeds, one row at a time."""
  per_user = {}
  for row in rows.iter_rows(named=True):
    if row["model"] == model and keep(row):
      rank = row[column]
      name, _, k = metric.partition("@")
      inside = rank <= float(k or "inf")
      gain = {"HR": 1, "NDCG": 1 / np.log2(1 + rank), "MRR": 1 / rank}[name]
      per_user.setdefault(row["user"], []).append(gain if inside else 0)
  return len(per_user), np.mean([np.mean(v) for v in per_user.values()])


KEEP = {
  "overall": lambda row: True,
  "head": lambda row: row["segment"] == 1,
  "tail": lambda row: row["segment"] == 0,
} | {f"group {g}": lambda row, g=g: row["group"] == g for g in range(5)}
COLUMNS = {"history masked": "rank", "history not masked": "rank_unmasked"}
METRICS = ["HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR"]


@pytest.mark.parametrize("names", [False, True])
def test_comparison_equals_a_loop_over_the_rows(names):
  rows = _rows(names=names)
  table = tables.comparison(rows, base="base", other="pin", **FAST)
  assert table.height == len(KEEP) * len(COLUMNS) * len(METRICS)
  assert table["slice"].unique(maintain_order=True).to_list() == list(KEEP)
  for line in table.iter_rows(named=True):
    if line["metric"] not in ("HR@5", "NDCG@10", "MRR"):
      continue
    arguments = COLUMNS[line["masking"]], KEEP[line["slice"]], line["metric"]
    users, base = _by_hand(rows, "base", *arguments)
    _, other = _by_hand(rows, "pin", *arguments)
    assert line["users"] == users
    np.testing.assert_allclose(
      [line["base"], line["other"], line["relative_change"]],
      [base, other, other / base - 1],
      rtol=1e-9,
    )
    assert math.isnan(line["p_value"])  # of two seeds
    if line["slice"] in ("overall", "tail"):
      assert line["low"] < line["relative_change"] < line["high"]


def test_comparison_interval_equals_a_numpy_bootstrap():
  rows = _rows(seeds=(3,))
  line = tables.comparison(rows, base="base", other="pin").row(
    by_predicate=(pl.col("slice") == "overall")
    & (pl.col("masking") == "history masked")
    & (pl.col("metric") == "MRR"),
    named=True,
  )
  ranks = [
    rows.filter(model=m).sort("user")["rank"].to_numpy()
    for m in ("base", "pin")
  ]
  base, other = 1 / ranks[0], 1 / ranks[1]
  rng = np.random.default_rng(2)
  draws = rng.integers(0, NUM_USERS, (4000, NUM_USERS))
  changes = other[draws].mean(1) / base[draws].mean(1) - 1
  low, high = np.percentile(changes, [2.5, 97.5])
  np.testing.assert_allclose(
    [line["low"], line["high"]], [low, high], atol=0.08 * (high - low)
  )


def test_comparison_states_each_slices_activeness_and_extra_cutoff():
  rows = _rows()
  table = tables.comparison(rows, base="base", other="pin", cutoff=3, **FAST)
  assert "NDCG@3" in table["metric"].to_list()
  for label, low, high in table.select(
    "slice", "min_activeness", "max_activeness"
  ).iter_rows():
    inside = [
      row["activeness"]
      for row in rows.iter_rows(named=True)
      if KEEP[label](row)
    ]
    assert (low, high) == (min(inside), max(inside))


def test_a_model_does_not_differ_from_itself():
  table = tables.comparison(_rows(), base="pin", other="pin", **FAST)
  changes = table.select("relative_change", "low", "high").to_numpy()
  np.testing.assert_allclose(np.nan_to_num(changes), 0, atol=1e-12)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda r: r.filter((pl.col("model") != "pin") | (pl.col("user") != 7)),
     "2 are only in the first"),
    (lambda r: r.filter((pl.col("model") != "pin") | (pl.col("seed") == 0)),
     "differ in user and seed"),
    (lambda r: r.filter(pl.col("model") != "pin"), "no model 'pin'"),
    (lambda r: pl.concat([r, r.head(1)]), "repeat a user and seed"),
    (lambda r: r.drop("rank"), "lack the columns"),
    (lambda r: r.with_columns(
      pl.when(model="pin").then("target").otherwise(9).alias("target")),
     "several values of 'target'"),
  ],
)  # fmt: skip
def test_models_that_cannot_be_compared_are_refused(change, message):
  with pytest.raises(InputError, match=message) as error:
    tables.comparison(change(_rows()), base="base", other="pin", **FAST)
  assert "\n" not in str(error.value)


def test_model_table_equals_a_loop_over_the_rows():
  rows = pl.concat([_rows(), _rows(["tail only", "user-uniform"], [0])])
  table = tables.model_table(rows)
  assert sorted(table["model"].unique()) == [
    "base", "pin", "tail only", "user-uniform",
  ]  # fmt: skip
  for line in table.iter_rows(named=True):
    assert line["seeds"] == (2 if line["model"] in ("base", "pin") else 1)
    for metric in ("NDCG@10", "HR@10"):
      for label in ("overall", "tail", "head"):
        _, want = _by_hand(
          rows, line["model"], COLUMNS[line["masking"]], KEEP[label], metric
        )
        assert line[f"{metric} {label}"] == pytest.approx(want, rel=1e-9)
    of_seeds = [
      _by_hand(
        rows.filter(seed=seed), line["model"], COLUMNS[line["masking"]],
        KEEP["overall"], "NDCG@10",
      )[1]
      for seed in range(line["seeds"])
    ]
    want = statistics.stdev(of_seeds) if line["seeds"] > 1 else math.nan
    assert line["std over seeds"] == pytest.approx(want, nan_ok=True)


def test_one_model_is_reported_without_a_comparison(tmp_path):
  rows = _rows(["base"])
  rows.write_parquet(tmp_path / "rows.parquet")
  console = rich.console.Console(file=io.StringIO())
  table = report.write_report(tmp_path, other="base", console=console, **FAST)
  assert table.equals(tables.model_table(rows))
  written = pl.read_csv(tmp_path / "comparison.csv")
  assert written["model"].to_list() == ["base", "base"]
  text = (tmp_path / "comparison.md").read_text()
  assert text.startswith("# base\n") and "against" not in text
  names = {path.name for path in (tmp_path / "plots").iterdir()}
  assert names == {"activeness.png"}


def test_model_table_refuses_different_users():
  rows = _rows().filter((pl.col("model") != "pin") | (pl.col("user") > 70))
  with pytest.raises(InputError, match="differ in user"):
    tables.model_table(rows)


def test_protocol_names_everything_a_reader_must_know():
  line = tables.protocol_line(_rows(), split="leave-one-out", num_items=300)
  for part in (
    "leave-one-out; full ranking over 300 items; ties at their average rank",
    "seeds 0, 1; intervals: 95 % percentile bootstrap, 2,000 resamples",
    "paired, over users crossed with seeds",
  ):
    assert part in line
  one = tables.protocol_line(_rows(seeds=(3,)), split="leave-one-out")
  assert "seed 3; " in one
  assert "over users, without the spread over training seeds" in one
  assert "\n" not in line


def test_protocol_does_not_call_sampled_candidates_a_full_ranking():
  line = tables.protocol_line(_rows(), num_items=5000)
  assert "ranking over 300 of 5,000 items" in line
  assert "full" not in line


def _printed(rows, width=80, base="base", other="pin"):
  stream = io.StringIO()
  console = rich.console.Console(file=stream, width=width, highlight=False)
  table = tables.comparison(rows, base=base, other=other, **FAST)
  protocol = tables.protocol_line(rows, split="temporal")
  tables.print_models(tables.model_table(rows), console=console)
  tables.print_comparison(
    table, base=base, other=other, protocol=protocol, console=console
  )
  return stream.getvalue()


def test_printed_tables_fit_80_columns_without_ansi_codes():
  text = _printed(_rows(["base", "pin backbone", "pin"]))
  assert "\x1b" not in text and "…" not in text
  assert max(map(len, text.splitlines())) <= 80
  for part in (
    "pin against base, history masked",
    "pin against base, history not masked",
    "NDCG@10",
    "HR@10",
    "group 4",
    "Protocol: temporal; full ranking over 300 items",
  ):
    assert part in text


def test_model_names_are_not_read_as_markup():
  rows = _rows(["base[0]", "pin[/red]"])
  assert "pin[/red]" in _printed(rows, base="base[0]", other="pin[/red]")


def test_markdown_json_and_csv_hold_the_numbers_and_the_protocol(tmp_path):
  rows = _rows(["base", "a|b"])
  names = {
    "base": "base",
    "other": "a|b",
    "protocol": tables.protocol_line(rows, split="leave-one-out"),
  }
  table = tables.comparison(rows, base="base", other="a|b", **FAST)
  models = tables.model_table(rows)
  tables.write_comparison(table, models, tmp_path, **names)

  markdown = (tmp_path / "comparison.md").read_text()
  assert names["protocol"] in markdown
  lines = [x for x in markdown.splitlines() if x.startswith("|")]
  widths = {x.replace("\\|", "").count("|") for x in lines}
  assert widths == {7, 10}
  first = table.filter(metric="NDCG@10").row(0, named=True)
  assert f"| {first['base']:.4f} | {first['other']:.4f} |" in markdown

  content = json.loads((tmp_path / "comparison.json").read_text())
  assert content["protocol"] == names["protocol"]
  assert len(content["comparison"]) == table.height
  assert content["comparison"][0]["base"] == table["base"][0]
  assert pl.read_csv(tmp_path / "comparison.csv").shape == table.shape


def test_undefined_numbers_become_null_and_not_available(tmp_path):
  rows = _rows().with_columns(rank=pl.lit(200.0))
  table = tables.comparison(rows, base="base", other="pin", **FAST)
  tables.write_comparison(
    table, tables.model_table(rows), tmp_path,
    base="base", other="pin", protocol="none",
  )  # fmt: skip
  content = json.loads((tmp_path / "comparison.json").read_text())
  assert content["comparison"][0]["relative_change"] is None
  assert "n/a [n/a, n/a]" in (tmp_path / "comparison.md").read_text()


def _check_image(path):
  pixels = matplotlib.image.imread(path)[..., :3]
  assert pixels.shape[0] > 400 and pixels.shape[1] > 800
  inked = np.mean(np.any(pixels < 0.95, axis=-1))
  assert 0.01 < inked < 0.6
  assert len(np.unique(np.round(pixels.reshape(-1, 3), 2), axis=0)) > 20
  for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
    assert np.all(edge > 0.99), "something runs off the picture"


@pytest.mark.parametrize("num_groups", [1, 10])
def test_plots_are_images(tmp_path, num_groups):
  rows = _rows(num_groups=num_groups)
  users = rows.filter(model="base", seed=0)
  columns = [users[c].to_numpy() for c in ("activeness", "group", "segment")]
  path = tmp_path / "activeness.png"
  plots.plot_activeness(*columns, path)
  _check_image(path)
  path = tmp_path / "groups.png"
  plots.plot_groups(rows, "base", "pin", path, **FAST)
  _check_image(path)
  path = tmp_path / "gradients.png"
  plots.plot_gradients(_log(num_groups=num_groups), "pin/backbone", path)
  _check_image(path)


def test_plot_groups_survives_groups_without_hits(tmp_path):
  rows = _rows().with_columns(rank=pl.lit(200.0))
  plots.plot_groups(rows, "base", "pin", tmp_path / "groups.png", **FAST)


def test_cosine_with_the_mean_equals_that_of_the_gradients():
  rng = np.random.default_rng(3)
  gradients = rng.normal(size=(7, 4, 20))
  norms = np.linalg.norm(gradients, axis=-1)
  units = gradients / norms[..., None]
  mean = gradients.mean(1)
  want = np.einsum("tgd,td->tg", units, mean)
  want /= np.linalg.norm(mean, axis=-1, keepdims=True)
  got = plots.cosine_with_mean(norms, units @ units.swapaxes(1, 2))
  np.testing.assert_allclose(got, want)


def test_plot_gradients_names_the_missing_run(tmp_path):
  constant = [
    record | {"cosines": [[None] * 5] * 5, "conflict_rate": None}
    for record in _log()
    if "norms" in record
  ]
  for records, run in [(_log(), "base"), (constant, "pin/backbone")]:
    with pytest.raises(InputError, match=f"of run '{run}'"):
      plots.plot_gradients(records, run, tmp_path / "gradients.png")


def test_command_recomputes_everything_from_the_workdir(tmp_path):
  _rows(["base", "pin"], (0, 1, 2)).write_parquet(tmp_path / "rows.parquet")
  log = "".join(json.dumps(record) + "\n" for record in _log())
  (tmp_path / "log.jsonl").write_text(log)
  summary = {"protocol": "leave-one-out", "num_items": NUM_ITEMS}
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  config = {"config": {"claims": {"non_inferiority_margin": 0.07}}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  command = [sys.executable, "-m", "experiments.report"]
  done = subprocess.run(
    [*command, f"--workdir={tmp_path}"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert "Protocol: leave-one-out; full ranking over 300 items" in done.stdout
  assert "\x1b" not in done.stdout
  verdict = json.loads((tmp_path / "comparison.json").read_text())["verdicts"]
  for text in (done.stdout, (tmp_path / "comparison.md").read_text()):
    assert verdict["pin"] in " ".join(text.split())
  assert "against base" in verdict["pin"] and " 7 %" in verdict["pin"]
  for name in ("activeness", "groups_ndcg", "gradients-pin"):
    _check_image(tmp_path / "plots" / f"{name}.png")
  for suffix in ("csv", "md", "json"):
    assert (tmp_path / f"comparison.{suffix}").stat().st_size > 500


def test_report_needs_rows_only(tmp_path):
  with pytest.raises(InputError, match="has no rows.parquet"):
    report.write_report(tmp_path)
  _rows(["joint", "pin"], names=True).write_parquet(tmp_path / "rows.parquet")
  console = rich.console.Console(file=io.StringIO(), width=80)
  report.write_report(tmp_path, base="joint", console=console, **FAST)
  assert "split not recorded" in console.file.getvalue()
  assert not list(tmp_path.glob("plots/gradients*"))


def test_broken_log_line_is_named(tmp_path):
  _rows().write_parquet(tmp_path / "rows.parquet")
  (tmp_path / "log.jsonl").write_text('{"run": "a"}\n{"run": \n')
  console = rich.console.Console(file=io.StringIO())
  with pytest.raises(InputError, match="line 2 is damaged"):
    report.write_report(tmp_path, console=console, **FAST)


# The sampled protocol.


def _sampled_rows(seeds=(0, 1), negatives=9):
  rows = _rows(seeds=seeds).drop("rank_unmasked", "candidates_unmasked")
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
  values = []
  for seed in (0, 1):
    chosen = [
      row for row in rows.iter_rows(named=True)
      if row["model"] == model and row["seed"] == seed and keep(row)
    ]
    labels, scores = [], []
    for row in chosen:
      labels.append([1] + [0] * 9)
      scores.append([row["score"], *row["negative_scores"]])
    if metric == "AUC":
      values.append(
        sklearn.metrics.roc_auc_score(np.ravel(labels), np.ravel(scores))
      )
    elif metric == "GAUC":
      values.append(np.mean([
        sklearn.metrics.roc_auc_score(x, y)
        for x, y in zip(labels, scores, strict=True)
      ]))
    else:
      values.append(sklearn.metrics.log_loss(
        np.ravel(labels), scipy.special.expit(np.ravel(scores))
      ))
  return np.mean(values)


def test_sampled_comparison_equals_scikit_learn():
  rows = _sampled_rows()
  table = tables.comparison(rows, base="base", other="pin", **FAST)
  assert table["masking"].unique().to_list() == ["sampled candidates"]
  metrics = [*METRICS, "AUC", "GAUC", "log loss"]
  assert table.height == len(KEEP) * len(metrics)
  for line in table.iter_rows(named=True):
    keep = KEEP[line["slice"]]
    for model, column in (("base", "base"), ("pin", "other")):
      if line["metric"] in METRICS:
        _, want = _by_hand(rows, model, "rank", keep, line["metric"])
      else:
        want = _sampled_by_hand(rows, model, keep, line["metric"])
      assert line[column] == pytest.approx(want, rel=1e-6), line
    assert line["low"] <= line["relative_change"] <= line["high"]


def test_sampled_report_has_files_and_a_header_of_its_own(tmp_path):
  rows = _sampled_rows()
  rows.write_parquet(tmp_path / "rows_sampled.parquet")
  console = rich.console.Console(file=io.StringIO(), width=80)
  report.write_report(tmp_path, console=console, **FAST)
  files = {path.name for path in tmp_path.iterdir() if path.is_file()}
  assert files == {"rows_sampled.parquet"} | {
    f"comparison_sampled.{kind}" for kind in ("csv", "md", "json")
  }
  text = (tmp_path / "comparison_sampled.md").read_text()
  for part in (
    "SAMPLED PROTOCOL, not comparable with full ranking", "against 9 items",
    "## Sampled candidates", "| AUC |", "| GAUC |", "| log loss |",
    "AUC overall",
  ):
    assert part in text, part
  assert "history masked" not in text and "full ranking over" not in text
  printed = console.file.getvalue().split("written to")[0]
  assert "SAMPLED PROTOCOL" in printed
  assert max(map(len, printed.splitlines())) <= 80


def test_sampled_and_full_rows_do_not_mix():
  with pytest.raises(InputError, match="lack the columns .*score"):
    tables.model_table(_sampled_rows().drop("score"))
  with pytest.raises(pl.exceptions.PolarsError):
    pl.concat([_rows(), _sampled_rows()])
