"""The report as console, page, Markdown and LaTeX; its figures."""

import base64
import html.parser
import io
import json
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree

import numpy as np
import pytest
from results_test import sampled_rows
from toy_rows import job_of, make_rows, make_workdir

from experiments import commands, figures, report, results
from pin_jax.types import InputError

MODELS = ("base", "pin <b>&", "pin", "x_1")
VOID = {"meta", "br", "hr", "img", "link", "input"}
FAST = {"num_resamples": 200}


@pytest.fixture(autouse=True)
def _no_warnings():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def _console(width=80):
  return commands.Console(file=io.StringIO(), width=width)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """Reports on two jobs: [html, Markdown, LaTeX], their directories."""
  root = tmp_path_factory.mktemp("pages")
  paths = [
    make_workdir(root / f"w{n}", make_rows(MODELS, range(3)), length=n)
    for n in (5, 20)
  ]
  written = report.write_report(
    paths, output=root / "out", console=_console(), **FAST
  )
  assert [path.name for path in written] == [
    "report.html", "report.tex", "report.md"
  ]
  page, latex, markdown = (path.read_text() for path in written)
  return [page, markdown, latex], paths


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
      attrs[key] for key in ("src", "href") if key in attrs and tag != "a"
    ]
    if tag not in VOID:
      self.stack.append(tag)

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
  page = pages[0][0]
  outline = _outline(page)
  assert len(set(outline.ids)) == len(outline.ids)
  assert {link[1:] for link in outline.links} <= set(outline.ids)
  start = "data:image/svg+xml;base64,"
  assert len(outline.sources) == 5
  for source in outline.sources:
    assert source.startswith(start)
    text = base64.b64decode(source.removeprefix(start))
    assert xml.etree.ElementTree.fromstring(text).tag.endswith("svg")
  assert not re.search(r"https?://|<script|@import|url\(", page)


def test_the_page_names_every_model_and_its_verdict(pages):
  (page, *_), paths = pages
  text = " ".join("".join(_outline(page).text).split())
  for model in MODELS:
    assert model in text
  for path in paths:
    job = results.analyse(results.read(path), None, 200)
    assert report.verdict(job, job.claim()) in text


def test_the_page_says_where_the_numbers_come_from(pages):
  page, markdown, _ = pages[0]
  common = (
    "python -m experiments.main --workdir=/somewhere/else/toy", "toy.parquet",
    "leave-one-out; full ranking over 300 items", "data toy f00",
    "users crossed with seeds",
  )
  for text, parts in (
    (page, (*common, "backbone.length", "jax 0.0.7")), (markdown, common)
  ):
    for part in parts:
      assert part in text, part


def test_tables_hold_the_numbers_of_the_rows(pages):
  (_, markdown, latex), paths = pages
  rows = results.read(paths[0]).rows
  for model in MODELS:
    own = rows.filter(model=model)
    for part in (own, own.filter(segment=0), own.filter(segment=1)):
      ranks = part["rank"].to_numpy()
      want = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()
      cell = f"{want:.4f}".replace("0.", ".")
      assert f"& {cell} [" in latex
      if model == "base":  # several jobs: the others' as changes of it
        assert cell in markdown.split("overall, tail, head: ")[1][:30]


def test_markdown_is_short_and_its_tables_rectangular(pages):
  markdown = pages[0][1]
  assert len(markdown) < 12_000  # two jobs of four models
  assert "history not masked" not in markdown.replace("'history", "")
  blocks = [b for b in markdown.split("\n\n") if b.startswith("|")]
  assert len(blocks) == 2
  for block in blocks:
    widths = {line.replace("\\|", "").count("|") for line in block.splitlines()}
    assert len(widths) == 1


def test_latex_is_balanced_and_escaped(pages):
  latex = pages[0][2]
  assert latex.count("% Protocol: leave-one-out") == 2
  latex = re.sub(r"(?m)^%.*\n", "", latex)
  for name in ("table", "tabular"):
    count = latex.count(f"\\begin{{{name}}}")
    assert count == latex.count(f"\\end{{{name}}}") > 15
  labels = re.findall(r"\\label\{(.*?)\}", latex)
  assert len(set(labels)) == len(labels)
  body = latex.replace("}{%\n", "}{\n")  # the end of a line, on purpose
  assert not re.search(r"(?<!\\)[%#_]", body)
  assert "−" not in body and "pin $<$b$>$\\&" in body
  for part in latex.split("\\toprule")[1:]:
    lines = part.split("\\bottomrule")[0].replace("\\&", "").splitlines()
    widths = {line.count("&") for line in lines if line.endswith("\\\\")}
    assert len(widths) == 1


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_few_seeds_are_marked_everywhere(tmp_path, seeds):
  rows = make_rows(MODELS, seeds)
  path = make_workdir(tmp_path / "few", rows, seeds=seeds)
  console = _console()
  report.write_report([path], console=console, **FAST)
  page, markdown, latex = (
    " ".join((path / f"report.{kind}").read_text().split())
    for kind in ("html", "md", "tex")
  )
  mark = f"{('one seed', 'two seeds')[len(seeds) - 1]}: nothing proven"
  for text in (page, markdown, " ".join(console.file.getvalue().split())):
    assert mark in text and "fewer than three seeds have no p" in text
    assert "No verdict: against base" in text and "--config.seeds=" in text
    assert "holds:" not in text and "refuted:" not in text
  pictures = [
    base64.b64decode(x).decode()
    for x in re.findall("base64,([^\"]*)", page)
  ]
  assert sum(mark in picture for picture in pictures) >= 2  # forest, groups
  assert "too few seeds" in latex and "& holds &" not in latex


def test_console_fits_80_columns_without_ansi_codes(tmp_path):
  rows = make_rows(["base", "pin_backbone", "pin", "[/red]"], range(3))
  path = make_workdir(tmp_path / "a", rows)
  console = _console()
  report.write_report([path], console=console, **FAST)
  text = console.file.getvalue()
  assert "\x1b" not in text and "…" not in text and "[/red]" in text
  lines = text.splitlines()
  tables = [
    line for i, line in enumerate(lines)
    if any("───" in x for x in lines[max(i - 6, 0) : i + 3]) and "  " in line
  ]
  assert len(tables) > 20 and max(map(len, tables)) <= 80
  for part in (
    "Change of NDCG@10 against base, history masked", "pin_backbone",
    "activeness", "Protocol: leave-one-out; full ranking over 300 items",
    "The claim", f"report.html, report.md, report.tex in {path}",
  ):
    assert part in text


def test_every_figure_is_drawn_in_a_file_of_its_own(pages, tmp_path):
  (page, *_), paths = pages
  written = report.write_report(
    paths, markdown=tmp_path / "docs" / "all.md", console=_console(),
    pictures=tmp_path / "figures", **FAST,
  )
  files = sorted((tmp_path / "figures").iterdir())
  assert sorted(map(str, written)) == sorted(
    map(str, [tmp_path / "docs" / "all.md", *files])
  )
  names = set(re.findall('alt="([^"]*)"', page))
  assert {path.stem for path in files} == names
  links = re.findall(r"\]\((\S+)\)", (tmp_path / "docs/all.md").read_text())
  assert "../figures/job-1-toy-backbone-length-5-groups.svg" in links
  assert all((tmp_path / "docs" / link).exists() for link in links)


def test_a_job_of_one_model_and_a_sampled_one(tmp_path):
  one = make_workdir(tmp_path / "one", make_rows(["base"]))
  sampled = make_workdir(
    tmp_path / "few", sampled_rows(), suffix="_sampled"
  )
  results.write_summary(results.read(sampled), tmp_path / "few-summary")
  for path in (sampled, tmp_path / "few-summary"):
    report.write_report(
      [one, path], output=tmp_path / "out", console=_console(), **FAST
    )
    text = (tmp_path / "out" / "report.md").read_text()
    few = text.split("## toy (few)")[1]
    assert "NDCG@10 against base, sampled candidates" in few
    assert "SAMPLED PROTOCOL, not comparable" in few
    assert "against 9 items" in few and "full ranking over" not in few
    latex = (tmp_path / "out" / "report.tex").read_text()
    assert ("AUC by activeness" in latex) == (path == sampled)
    single = text.split("## toy (one)")[1].split("\n## ")[0]
    assert "NDCG@10, history masked" in single
    assert "Change of NDCG" not in single


def test_lists_of_candidates_are_never_in_one_figure():
  jobs = [
    job_of(rows, data="toy")
    for rows in (make_rows(), sampled_rows(), make_rows(), sampled_rows())
  ]
  for number, job in enumerate(jobs):
    jobs[number] = job._replace(results=job.results._replace(name=str(number)))
  found = [
    block.draw.args for block in report.sections(jobs, 50)[0].blocks
    if isinstance(block, report.Figure)
  ]
  names = [f"toy ({number})" for number in range(4)]
  assert [[*claims] for claims, *_ in found] == [names[::2], names[1::2]]


def test_jobs_are_named_by_what_differs():
  def made(name, data="toy", **config):
    job = job_of(make_rows(), config=config, data=data)
    return job._replace(results=job.results._replace(name=name))

  wide = lambda name, width, **more: made(
    name, backbone={"width": width, "blocks": 2}, **more
  )
  for jobs, labels in (
    ([wide("a", 8)], ["toy"]),
    ([wide("a", 8), wide("b", 8, data="other")], ["toy", "other"]),
    ([wide("a", 8), wide("b", 16), made("c", data="other")],
     ["toy (backbone.width 8)", "toy (backbone.width 16)", "other"]),
    ([wide("a", 8), wide("a", 8)], ["toy (a) (1)", "toy (a) (2)"]),
    ([wide("a", 8), made("b", other={x: 1 for x in "uvw"})],
     ["toy (a)", "toy (b)"]),
  ):
    assert results.labels_of(jobs) == labels


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_keeps_every_number_whole_at_any_width(width):
  job = job_of(make_rows(["base", "pin_backbone", "pin"], range(3)))
  console = commands.Console(file=io.StringIO(), width=width)
  table = results.change_table(job, job.main)
  report.print_table(table, console)
  lines = console.file.getvalue().split(table.note)[0].splitlines()
  assert max(map(len, lines[1:])) <= max(width, 34)
  found = re.findall(r"\[.*?\]|\S+", " ".join(lines))
  for line in table.lines:
    for cell, column in zip(line, table.columns, strict=True):
      if column.kind in ("change", "p"):
        text = report.cell_text(cell, column.kind).split(" ", 1)
        assert {*text} <= {*found}
  places = [i for i, line in enumerate(lines) if "───" in line]
  assert (len(places) == 1) == (width == 200)
  values = [line.split("\t") for line in report.to_tsv(table).splitlines()]
  assert {len(line) for line in values} == {len(values[0])}
  assert float(values[1][2]) == pytest.approx(100 * table.lines[0][1].low)


def test_rows_alone_are_enough(tmp_path):
  make_rows(["joint", "pin"], names=True).write_parquet(
    tmp_path / "rows.parquet"
  )
  report.write_report([tmp_path], base="pin", console=_console(), **FAST)
  text = (tmp_path / "report.md").read_text()
  assert "Change of NDCG@10 against pin" in text
  assert "split not recorded" in text


def test_undefined_numbers_are_not_available(tmp_path):
  rows = make_rows(seeds=range(3)).with_columns(rank=200.0, rank_unmasked=200.0)
  path = make_workdir(tmp_path / "a", rows)
  report.write_report([path], console=_console(), **FAST)
  assert "| n/a [n/a, n/a] |" in (path / "report.md").read_text()


@pytest.mark.parametrize(("cell", "kind", "text"), [
  ("pin_shared", "model", "pin_shared"),
  (0.05141, "level", ".0514"), (-0.00321, "gap", "−.0032"),
  (1.0, "level", "1.0000"), (10.0, "level", "10.0000"),
  (results.Interval(0.01, -0.02, 0.034), "change", "+1.0 [−2.0, +3.4]"),
  ([0.01, -0.2], "change", "+1.0, −20.0"), (0.0004, "p", "< .001"),
  (0.04, "p", ".040"), (1.0, "p", "1.000"), (float("nan"), "p", "n/a"),
  (12345, "count", "12,345"), (0.5, "number", "0.50"),
])  # fmt: skip
def test_cells_as_text(cell, kind, text):
  assert report.cell_text(cell, kind) == text


def test_a_place_to_write_to_and_rows_to_read_are_needed(tmp_path):
  with pytest.raises(InputError, match="name a directory for the report"):
    report.write_report([tmp_path / "a", tmp_path / "b"])
  with pytest.raises(InputError, match="a has no rows.parquet"):
    report.write_report([tmp_path / "a"])
  path = make_workdir(tmp_path / "toy")
  (path / "log.jsonl").write_text('{"run": "a"}\n{"run": \n')
  with pytest.raises(InputError, match="line 2 is damaged"):
    report.write_report([path])


def test_command_writes_a_summary_and_the_results_page(tmp_path):
  path = make_workdir(tmp_path / "toy", make_rows(seeds=(0, 1, 2)))
  config = json.loads((path / "config.json").read_text())
  config["config"]["claims"]["non_inferiority_margin"] = 0.07
  (path / "config.json").write_text(json.dumps(config))
  command = [sys.executable, "-m", "experiments.report"]
  run = lambda *words: subprocess.run(
    [*command, *words], capture_output=True, text=True, check=False
  )
  done = run(str(path), f"--summary={tmp_path}/results/toy")
  assert done.returncode == 0, done.stderr
  page = tmp_path / "docs" / "results.md"
  done = run(str(tmp_path / "results/toy"), f"--markdown={page}")
  assert done.stdout.split()[-1] == str(page) and "\x1b" not in done.stdout
  text = page.read_text()
  assert text.startswith("# Long-tailed recommendation on toy\n")
  assert " 7 %" in text
  bad = run()
  assert bad.returncode == 2 and bad.stderr.startswith("error: name one or")
  bad = run(str(tmp_path / "results/toy"), "x", f"--summary={tmp_path}/s")
  assert bad.returncode == 2 and bad.stderr.count("\n") == 1


# Figures.


@pytest.mark.parametrize("num_groups", [1, 10])
def test_figures_are_drawn(num_groups):
  rows = make_rows(("base", "pin", "x"), num_groups=num_groups)
  job = job_of(rows)
  for make in (
    lambda: figures.groups(rows, ["base", "pin"], "rank", "NDCG@10"),
    lambda: figures.forest({"a": job.claim()}, 0.02, "title", "HR@5"),
  ):
    text = figures.svg(make())
    assert text == figures.svg(make())
    root = xml.etree.ElementTree.fromstring(text)
    assert root.attrib["width"].endswith("pt")
    assert len(list(root.iter())) > 60


def test_groups_without_hits_are_drawn():
  rows = make_rows().with_columns(rank=200.0)
  figures.svg(figures.groups(rows, ["base", "pin"], "rank", "NDCG@10"))


def test_the_figure_by_group_shows_the_means_of_the_rows():
  rows = make_rows(("base", "a"))
  top, bottom = figures.groups(rows, ["base", "a"], "rank", "NDCG@10").axes
  means = [
    [
      np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()
      for group in range(5)
      for ranks in [rows.filter(model=model, group=group)["rank"].to_numpy()]
    ]
    for model in ("base", "a")
  ]
  for bars, want in zip(top.containers, means, strict=True):
    np.testing.assert_allclose(bars.lines[0].get_ydata(), want)
  changes = 100 * (np.divide(means[1], means[0]) - 1)
  got = bottom.containers[0].lines[0].get_ydata()
  np.testing.assert_allclose(got, changes)


def _screen(path, choice, rows=None):
  """What is printed last of a job that chose so, and the numbers."""
  folder = make_workdir(path, rows)
  config = json.loads((folder / "config.json").read_text())
  config["config"]["methods"] = ["base", "memory_alone", "pin"]
  (folder / "config.json").write_text(json.dumps(config))
  summary = json.loads((folder / "summary.json").read_text())
  summary["choice"] = {**choice, "users": {"tail": 50, "head": 9}}
  summary["cost"] = {
    f"seed{seed}/{run}": {
      "steps": 1, "best_steps": [1], "validation": [0.1], "cpu_seconds": cost,
    } for seed in (0, 1)
    for run, cost in (("base", 3), ("pin/backbone", 5), ("pin/plugins", 7))
  }
  (folder / "summary.json").write_text(json.dumps(summary))
  console = _console(200)
  report.write_report([folder], console=console, **FAST)
  text = console.file.getvalue()
  job = results.analyse(results.read(folder), **FAST)
  return text[text.index("What to serve"):], results.answer(job, **FAST)


def test_the_last_screen_answers_with_what_validation_chose(tmp_path):
  rows = make_rows(("base", "memory_alone", "pin"), (0, 1), names=True)
  choice = {"tail": "pin", "head": "base"}
  screen, found = _screen(tmp_path / "w", choice, rows)
  assert screen.startswith("What to serve\nAre users with few behaviours")
  assert "head users keep base, but two seeds: nothing proven" in screen
  assert "costs 15 CPU-seconds of training a seed, base alone 3; 2 m" in screen
  assert f"experiments.serve --workdir={tmp_path / 'w'} --users=u" in screen
  assert screen.rstrip().splitlines()[-1].startswith("report.html, report.md")
  for part, segment in (("tail", 0), ("head", 1)):
    base, served = (
      np.mean([
        1 / np.log2(1 + rank) if rank <= 10 else 0
        for rank in rows.filter(model=key, segment=segment)["rank"]
      ]) for key in ("base", choice[part])
    )
    assert found.levels[part] == pytest.approx((base, served))
    change = getattr(found.claim, part)
    assert change.estimate == pytest.approx(served / base - 1)
  page = (tmp_path / "w" / "report.html").read_text()
  assert page.index("What to serve") < page.index("Verdict")


def test_nothing_better_than_the_comparator_is_a_no(tmp_path):
  rows = make_rows(("base", "memory_alone", "pin"), range(3), names=True)
  screen, _ = _screen(tmp_path / "w", dict.fromkeys(("tail", "head"), "base"),
                      rows)
  assert "No: on validation no model serves either better than base" in screen


@pytest.mark.parametrize(("gain", "loss", "said"), [
  (1.2, 1.0, "Yes: tail users +20.0 ["), (0.8, 1.0, "No, tail users or, by"),
  (1.2, 0.98, "Tail users are; that head users lose no more than 2 % is not"),
  (1.0, 1.0, "Head users lose no more than 2 %; that tail users are served"),
])
def test_three_seeds_answer_in_words(tmp_path, monkeypatch, gain, loss, said):
  """Values made of ranks, so that the changes are as wanted."""
  rows = make_rows(("base", "pin"), range(3), names=True)
  values = lambda frame, *_: np.where(
    frame["model"] == "base", 1, np.where(frame["segment"] == 1, loss, gain)
  ) * (1 + np.arange(len(frame)) % 7 / 100)
  monkeypatch.setattr(results, "_metric", values)
  choice = dict.fromkeys(("tail", "head"), "pin")
  assert said in _screen(tmp_path / "w", choice, rows)[0]
