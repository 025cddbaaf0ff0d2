"""The report's page, Markdown and LaTeX: complete, sound, self-contained."""

import html.parser
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import polars as pl
import pytest
import rich.console
from summaries_test import make_workdir
from toy_rows import make_rows

from experiments import claims, figures, render, report, sections, summaries
from pin_jax.types import InputError

MODELS = ("base", "pin <b>&", "pin", "x_1")
VOID = {"meta", "br", "hr", "img", "link", "input"}
FAST = {"num_resamples": 200}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """Reports on two windows of one data set: [html, Markdown, LaTeX], jobs."""
  root = tmp_path_factory.mktemp("pages")
  paths = [
    make_workdir(root / f"w{n}", make_rows(MODELS, range(3)), length=n)
    for n in (5, 20)
  ]
  written = report.write_pages(paths, output=root / "out", **FAST)
  assert [path.name for path in written] == [
    "report.html", "report.md", "report.tex"
  ]
  return [path.read_text() for path in written], paths


class _Outline(html.parser.HTMLParser):
  """Checks nesting; collects ids, links, sources and text."""

  def __init__(self):
    super().__init__()
    self.stack, self.ids, self.links, self.sources = [], [], [], []
    self.text = []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.ids += [attrs["id"]] if "id" in attrs else []
    self.links += [attrs["href"]] if tag == "a" else []
    self.sources += [
      attrs[key] for key in ("src", "href", "xlink:href")
      if key in attrs and tag != "a"
    ]
    if tag not in VOID:
      self.stack.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.stack.pop()

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    if not {"style", "script"} & set(self.stack):
      self.text.append(data)


def _outline(text):
  outline = _Outline()
  outline.feed(text)
  assert not outline.stack
  return outline


def test_the_page_is_sound_and_loads_nothing(pages):
  (page, _, _), _ = pages
  outline = _outline(page)
  assert len(set(outline.ids)) == len(outline.ids)
  assert {link[1:] for link in outline.links} <= set(outline.ids)
  for source in outline.sources:
    assert source.startswith(("#", "data:image/png;base64,")), source
  for address in re.findall(r"https?://[^\s\"'<>]+", page):
    assert address.startswith("http://www.w3.org/"), address  # namespaces
  assert "<script" not in page and "@import" not in page
  for word in re.findall(r"url\(([^)]*)\)", page):
    assert word.strip("'\"").startswith("#")


def test_references_inside_figures_resolve(pages):
  (page, _, _), _ = pages
  ids = set(_outline(page).ids)
  used = re.findall(r"url\(#([^)]+)\)|xlink:href=\"#([^\"]+)\"", page)
  assert len(used) > 10
  assert {a or b for a, b in used} <= ids


def test_every_colour_has_a_light_and_a_dark_value(pages):
  (page, _, _), _ = pages
  style = page[page.index("<style>") : page.index("</style>")]
  light, dark = style.split("prefers-color-scheme: dark")
  # White and near-black on the cells of the heat map are the same on both.
  used = set(re.findall(r"var\(--c([0-9a-f]{6})", page)) - {"ffffff", "1a1a1a"}
  assert len(used) > 6
  for colour in used:
    assert f"--c{colour}: #" in light and f"--c{colour}: #" in dark, colour


def test_the_page_names_every_model_and_its_verdict(pages):
  (page, _, _), paths = pages
  text = " ".join("".join(_outline(page).text).split())
  for model in MODELS:
    assert model in text
  for path in paths:
    table = claims.check_claims(
      summaries.read(path).rows, base="base", margin=0.02, **FAST
    )
    assert table.filter(model="pin")["verdict"][0] in text


def test_the_page_says_where_the_numbers_come_from(pages):
  (page, markdown, _), _ = pages
  for text in (page, markdown):
    for part in (
      "python -m experiments.main --workdir=runs/toy", "jax 0.0.7",
      "leave-one-out; full ranking over 300 items", "data toy f00",
      "users crossed with seeds", "backbone.length", "toy.parquet",
    ):
      assert part in text, part
    assert "/somewhere" not in text


def test_tables_hold_the_numbers_of_the_rows(pages):
  (_, markdown, latex), paths = pages
  rows = summaries.read(paths[0]).rows
  for model in MODELS:
    for keep in (pl.lit(True), pl.col("segment") == 0, pl.col("segment") == 1):
      ranks = rows.filter(keep, model=model)["rank"].to_numpy()
      want = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()
      cell = f"{want:.4f}".replace("0.", ".")
      assert f"| {cell} [" in markdown and f"& {cell} [" in latex


def test_markdown_tables_are_rectangular(pages):
  (_, markdown, _), _ = pages
  blocks = [b for b in markdown.split("\n\n") if b.startswith("|")]
  assert len(blocks) > 8
  for block in blocks:
    widths = {line.replace("\\|", "").count("|") for line in block.splitlines()}
    assert len(widths) == 1


def test_latex_is_balanced_and_escaped(pages):
  (_, _, latex), _ = pages
  for name in ("table", "tabular"):
    count = latex.count(f"\\begin{{{name}}}")
    assert count == latex.count(f"\\end{{{name}}}") > 5
  labels = re.findall(r"\\label\{(.*?)\}", latex)
  assert len(set(labels)) == len(labels)
  body = "\n".join(latex.splitlines()[1:])
  body = body.replace("}{%\n", "}{\n")  # the end of a line, on purpose
  assert not re.search(r"(?<!\\)[%#_]", body)
  assert "−" not in body and "pin $<$b$>$\\&" in body
  for part in latex.split("\\toprule")[1:]:
    lines = part.split("\\bottomrule")[0].replace("\\&", "").splitlines()
    widths = {line.count("&") for line in lines if line.endswith("\\\\")}
    assert len(widths) == 1


def test_the_gap_is_shown_over_windows(pages):
  (page, markdown, _), paths = pages
  assert "Window length" in page and page.count('id="windows-1-') > 3
  section = markdown.split("## Window length")[1].split("\n## ")[0]
  for path, length in zip(paths, (5, 20), strict=True):
    levels = claims.levels(summaries.read(path).rows, **FAST)
    gap = levels.filter(model="base")["gap"][0]
    cell = f"{gap:+.4f}".replace("0.", ".").replace("-", "−")
    assert re.search(rf"\| base \| {length} \|.*{re.escape(cell)}", section)


def test_conflicts_stand_beside_those_of_noise(pages):
  (page, markdown, _), _ = pages
  for text in (page, " ".join(markdown.split())):
    assert "which is what noise alone gives, 25.0 % and 0.12)" in text
  assert "dashed: noise alone" in page


def test_gradients_of_old_logs_and_of_some_steps(tmp_path):
  records = [
    {"run": "backbone", "norms": [1.0, 2.0], "cosines": np.eye(2).tolist(),
     "step": step, "weights": [0.5, 0.5], "conflict_rate": 0.5,
     "effective_groups": 2.0}
    for step in range(4)
  ]  # fmt: skip
  found = summaries._gradient_records(records)["backbone"]
  assert len(found) == 4
  assert "noise alone gives was not logged" in sections._gradient_words(found)
  told = {"noise_conflict_rate": 0.375, "noise_cosine": 0.25}
  records[2] |= told
  records[0] |= dict.fromkeys(told)  # a step between two looks
  found = summaries._gradient_records(records)["backbone"]
  assert [record["step"] for record in found] == [2]
  assert "gives, 37.5 % and 0.25)" in sections._gradient_words(found)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_few_seeds_are_marked_everywhere(tmp_path, seeds):
  rows = make_rows(MODELS, seeds)
  path = make_workdir(tmp_path / "few", rows, seeds=seeds)
  summary = json.loads((path / "summary.json").read_text())
  summary["cost"] = {
    f"seed{seed}/pin/plugins"[6 * (len(seeds) == 1):]: {
      "steps": 9, "best_steps": [0, 5], "validation": [0.1, 0.1],
      "cpu_seconds": 1.0,
    } for seed in seeds
  }
  (path / "summary.json").write_text(json.dumps(summary))
  report.write_pages([path], **FAST)
  page, markdown, latex = (
    " ".join((path / f"report.{kind}").read_text().split())
    for kind in ("html", "md", "tex")
  )
  mark = f"{('one seed', 'two seeds')[len(seeds) - 1]}: nothing proven"
  assert page.count(mark) > 6  # forest, curves, facts, protocol
  for text in (page, markdown):
    assert mark in text and "fewer than three seeds have no p" in text
    assert "No verdict: against base" in text
    assert "--workdir=runs/toy-3seeds" in text
    assert "stage 2 changed nothing for tail users: pin equals" in text
    assert "holds:" not in text and "refuted:" not in text
  assert "too few seeds" in latex and "& holds &" not in latex
  console = rich.console.Console(file=io.StringIO(), width=80)
  report.write_report(path, console=console, **FAST)
  for text in (console.file.getvalue(), (path / "comparison.md").read_text()):
    text = " ".join(text.split())
    assert mark in text and "No verdict: against base" in text
    assert "stage 2 changed nothing for tail users: pin equals" in text


def test_every_figure_is_drawn_in_a_file_of_its_own(pages, tmp_path):
  (page, _, _), paths = pages
  written = report.write_pages(
    paths, markdown=tmp_path / "all.md", drawings=tmp_path / "figures", **FAST
  )
  files = sorted((tmp_path / "figures").iterdir())
  assert sorted(map(str, written)) == sorted(
    map(str, [tmp_path / "all.md", *files])
  )
  assert len(files) == page.count("<svg")
  assert {"windows-1.svg", "windows-2.svg"} < {path.name for path in files}
  for path in files:
    root = xml.etree.ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["width"].endswith("pt")
    assert "var(" not in path.read_text()


def test_windows_differ_in_nothing_but_what_follows_from_them(tmp_path):
  names = {"a": 5, "b": 20, "c": 20, "d": 5}
  jobs = []
  for name, length in names.items():
    results = summaries.read(make_workdir(tmp_path / name, length=length))
    results.config["batch_size"] = 100 // length
    results.config["backbone"]["pack_rows"] = 40 // length
    results.config["memory"]["recent"] = min(length, 10)
    if name > "b":
      results.config["backbone_steps"] = len(jobs)
    jobs.append(sections.Job(results, None, 50))
  families = [
    [job.results.name for job in family] for family in sections._families(jobs)
  ]
  assert families == [["a", "b"]]


def test_a_job_of_one_model_and_a_sampled_one(tmp_path):
  one = make_workdir(tmp_path / "one", make_rows(["base"]))
  rows = make_rows().drop("rank_unmasked", "candidates_unmasked")
  rows = rows.with_columns(
    score=pl.lit(0.5), negative_scores=pl.lit([0.1, 0.2]),
    candidates=pl.lit(3),
  )
  sampled = make_workdir(tmp_path / "few", rows, suffix="_sampled")
  summaries.write(summaries.read(sampled), tmp_path / "few-summary")
  path = tmp_path / "few-summary"
  report.write_pages([one, path], output=tmp_path / "out", **FAST)
  text = (tmp_path / "out" / "report.md").read_text()
  few = text.split("## toy (few)")[1]
  assert "NDCG@10, sampled candidates" in few
  assert "SAMPLED PROTOCOL, not comparable" in few
  assert "history masked" not in few
  single = text.split("## toy (one)")[1].split("\n## ")[0]
  assert "NDCG@10, history masked" in single
  assert "Change of NDCG" not in single


def test_rows_alone_are_enough(tmp_path):
  make_rows(names=True).write_parquet(tmp_path / "rows.parquet")
  report.write_pages([tmp_path], base="pin", **FAST)
  text = (tmp_path / "report.md").read_text()
  assert "Change of NDCG@10 against pin" in text
  assert "split not recorded" in text


def test_classes_of_activeness_by_hand():
  active = np.repeat([1, 2, 3, 9], [30, 20, 45, 25])
  # 30 + 20 reach forty; 45 do; the last 25 are more than half of forty.
  assert figures.activeness_classes(active) == [(1, 2), (3, 3), (9, 9)]
  active = np.repeat([1, 2, 3], [50, 45, 15])
  assert figures.activeness_classes(active) == [(1, 1), (2, 3)]
  assert figures.activeness_classes(np.array([4, 4])) == [(4, 4)]


def test_curve_numbers_equal_a_loop():
  rows = make_rows(("base", "a"))
  levels, changes = figures._curve_numbers(
    rows, ["base", "a"], column="rank", cutoff=10
  )
  classes = figures.activeness_classes(rows.unique("user")["activeness"])
  for index, (low, high) in enumerate(classes):
    own = rows.filter(pl.col("activeness").is_between(low, high))
    means = {}
    for model in ("base", "a"):
      ranks = own.filter(model=model)["rank"].to_numpy()
      gains = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0)
      means[model] = gains.mean()
      x, estimate, below, above = levels[model][:, index]
      assert x == pytest.approx(own.unique("user")["activeness"].mean())
      assert estimate == pytest.approx(means[model])
      assert below < estimate < above
    assert changes["a"][1, index] == pytest.approx(
      means["a"] / means["base"] - 1
    )


def test_latex_text():
  got = render.latex_text("5 % of a_b & {c} −1")
  assert got == r"5 \% of a\_b \& \{c\} $-$1"


def test_several_jobs_need_a_place_to_write_to(tmp_path):
  with pytest.raises(InputError, match="name a directory for the report"):
    report.write_pages([tmp_path / "a", tmp_path / "b"])
  with pytest.raises(InputError, match="a has no rows.parquet"):
    report.write_pages([tmp_path / "a"])
  make_workdir(tmp_path / "toy")
  with pytest.raises(InputError, match="toy has no model 'best'; choose"):
    report.write_pages([tmp_path / "toy"], base="best")


def test_command_writes_the_results_page(tmp_path):
  workdir = make_workdir(tmp_path / "toy")
  summaries.write(summaries.read(workdir), tmp_path / "results" / "toy")
  page = tmp_path / "docs" / "results.md"
  command = [
    sys.executable, "-m", "experiments.report", str(tmp_path / "results/toy"),
    f"--markdown={page}",
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.split() == [str(page)]
  assert page.read_text().startswith("# Long-tailed recommendation on toy\n")
  bad = subprocess.run(
    command[:3], capture_output=True, text=True, check=False
  )
  assert bad.returncode == 2 and bad.stderr.startswith("error: name either")
  assert bad.stderr.count("\n") == 1
