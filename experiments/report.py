"""Reports on finished jobs: on the console, as HTML, Markdown and LaTeX.

    python -m experiments.report DIR... --output=OUT

reads any number of workdirs of finished jobs, or summaries of them, prints
their tables and writes OUT/report.html (one page with all figures, loading
nothing), report.md and report.tex. OUT is by default the workdir, where there
is one. What the page folds away is not in the
Markdown, which stays short. --markdown=FILE writes only the Markdown, to FILE;
--figures=DIR every figure as SVG besides.

    python -m experiments.report DIR --summary=docs/results/beauty

writes a summary of a job that is small enough to commit, instead.
"""

import base64
import functools
import itertools
import math
import os
import pathlib
import re
import shlex
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jinja2
import matplotlib.figure
import rich.console
import rich.text
from absl import flags
from etils import epath

from experiments import commands, figures, results
from experiments.methods import learnt_by
from experiments.results import (
  GAIN_ONLY,
  HOLDS,
  LEVEL,
  MIN_SEEDS,
  NO_LOSS_ONLY,
  NUM_RESAMPLES,
  REFUTED,
  UNEQUAL,
  UNTESTED,
  Analysis,
  Cell,
  Claim,
  Results,
  Table,
  few_seeds,
)
from pin_jax import disk
from pin_jax.types import InputError

_MODELS = 3  # in the figure by group
_ERRS = {1: 15, 2: 5}  # seeds -> % that a test meant to err in 2.5 % errs in
_TESTS = (
  "p is one-sided, doubled, and corrected over the models by Holm's method: "
  "for tail users of the hypothesis that nothing is gained, for head users "
  "that more than the margin is lost. The claim holds where both are below "
  ".05. It is refuted where p of harm is: the smaller one, corrected over both "
  "and the models, of the hypotheses that tail users lose nothing and head "
  "users no more than the margin. Models with fewer than three seeds, or that "
  "have learnt from other interactions than the comparator, have no p and no "
  "verdict."
)


# What a report is made of; tables are those of `results`.


class Text(NamedTuple):
  """A paragraph; `code` where it is to be copied, as a command."""

  text: str
  code: bool = False


class Verdict(NamedTuple):
  """What was shown of a model: the outcome, of what, sentences."""

  outcome: str
  title: str
  text: str


class Figure(NamedTuple):
  """A figure: its file's name without suffix, and what draws it."""

  name: str
  draw: Callable[[], matplotlib.figure.Figure]


class Fold(NamedTuple):
  """Blocks that only the page shows, on demand."""

  title: str
  blocks: Sequence["Block"]


Block = Text | Verdict | Figure | Table | Fold


class Section(NamedTuple):
  """A section with the anchor that links and files are named after."""

  anchor: str
  title: str
  blocks: Sequence[Block]


def sections(jobs: Sequence[Analysis], num_resamples: int) -> list[Section]:
  """The report on one or more jobs: verdicts, then every job."""
  labels, several = results.labels_of(jobs), len(jobs) > 1
  out = [_overview(jobs, labels)]
  for number, (job, label) in enumerate(zip(jobs, labels, strict=True), 1):
    plain = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    anchor = f"job-{number}-{plain}"
    out.append(
      Section(anchor, label, _blocks(job, anchor, num_resamples, several))
    )
  return out


def answer(
  job: Analysis, found: results.Answer | None, workdir: str,
  folded: bool = False,
) -> list[Section]:
  """The question, what the job answers, and how to serve it, if it chose.

  Processor time is no result: `folded` away, report.md does not hold it.
  """
  if found is None:
    return []
  base, models = job.base, dict.fromkeys(found.choice.values())
  cost, of_base = reversed(found.cost)
  costs = [Text(
    f"It costs {cost:,.0f} CPU-seconds of training a seed, {base} alone "
    f"{of_base:,.0f}; {len(models)} model{'s' * (len(models) > 1)} to serve."
  )] if cost == cost else []  # fmt: skip
  users = shlex.quote(",".join(map(str, found.examples)))
  return [Section("answer", "What to serve", [
    Text(
      "Are users with few behaviours (tail) served better, and active users "
      f"(head) no worse, than by {base}?"
    ),
    Text(_answered(job, found)), results.answer_table(job, found),
    *([Fold("What it costs", costs)] if folded and costs else costs),
    Text(
      f"python -m experiments.serve --workdir={shlex.quote(workdir)} "
      f"--users={users}", code=True
    ),
  ])]  # fmt: skip


def _answered(job: Analysis, found: results.Answer) -> str:
  """The answer to the question, in a sentence or two."""
  claim, base = found.claim, job.base
  margin, seeds = f"{100 * job.margin:g} %", claim.seeds
  if {*found.choice.values()} == {job.base}:
    return f"No: on validation no model serves either better than {base} does."
  shown = ", ".join(
    f"{part} users {cell_text(getattr(claim, part), 'change')} %"
    if key != job.base else f"{part} users keep {base}"
    for part, key in found.choice.items()
  )
  if claim.outcome == UNEQUAL:
    return (
      f"That cannot be said: {shown}, but the models have learnt from other "
      "interactions, and the difference is that of the information too."
    )
  if claim.outcome == UNTESTED:
    hoped = claim.tail.estimate > 0 and claim.head.estimate >= -job.margin
    return (
      f"{'Perhaps' if hoped else 'Probably not'}: {shown}, but "
      f"{few_seeds(seeds)}. For a verdict take three seeds or more: "
      f"{_more_seeds(job.results)}"
    )
  said = {
    HOLDS: "Yes",
    REFUTED: f"No, tail users or, by more than {margin}, head users are served "
    "worse",
    GAIN_ONLY: "Tail users are; that head users lose no more than "
    f"{margin} is not shown",
    NO_LOSS_ONLY: f"Head users lose no more than {margin}; that tail users "
    "are served better is not shown",
  }
  return f"{said.get(claim.outcome, 'Neither is shown')}: {shown}."


def _overview(jobs: Sequence[Analysis], labels: Sequence[str]) -> Section:
  """Verdicts: of one job on every model, else on each job's tested one."""
  blocks: list[Block] = []
  for job, label in zip(jobs, labels, strict=True):
    claims = [job.claim()] if len(jobs) > 1 else [
      claim for claim in job.claims[job.main]
      if claim.outcome not in (UNEQUAL, UNTESTED) or claim.model == job.other
    ]
    blocks += [
      Verdict(
        claim.outcome, f"{label}: {claim.model}", verdict(job, claim)
      )
      for claim in filter(None, claims)
    ]
  if not blocks:
    return Section("verdict", "Verdict", [
      Text("Every job has one model: there is nothing to compare.")
    ])  # fmt: skip
  if any(block.outcome not in (UNTESTED, UNEQUAL) for block in blocks):
    blocks.append(Fold("How this is tested", [Text(_TESTS)]))
  kind_of = lambda job: (job.metrics[0], job.main)
  for metric, title in dict.fromkeys(map(kind_of, jobs)):  # each by itself
    own = {
      label: job.claim() for job, label in zip(jobs, labels, strict=True)
      if kind_of(job) == (metric, title) and job.claim()
    }
    if len(own) > 1:
      margin = max(job.margin for job in jobs)
      blocks.append(Figure(f"jobs-{len(blocks)}", functools.partial(
        figures.forest, own, margin,
        f"The model under test of each job, {title}", metric,
      )))  # fmt: skip
  return Section("verdict", "Verdict", blocks)


def _blocks(
  job: Analysis, anchor: str, num_resamples: int, several: bool
) -> list[Block]:
  """What a report says of a job; beside others it folds levels away."""
  own, main, metric = job.results, job.main, job.metrics[0]
  rows, column = own.rows, own.lists[main]
  draw = lambda name, *arguments: Figure(
    f"{anchor}-{name}", functools.partial(getattr(figures, name), *arguments)
  )
  changes = lambda title: (
    [results.change_table(job, title)] if job.claims[title] else []
  )
  tables = lambda title: [*changes(title), results.level_table(job, title)]
  levels: list[Block] = [results.level_table(job, main)]
  blocks: list[Block] = [Text(_facts(job))]
  if own.summary.get("command"):
    blocks.append(Text(own.summary["command"], code=True))
  blocks += changes(main)
  more: list[Block] = []
  claims = {claim.model: claim for claim in job.claims[main]}
  if claims:
    models = dict.fromkeys(
      [job.base, job.other, *(claim.model for claim in claims.values())]
    )
    models = [*models][:_MODELS]
    more.append(results.seed_table(job, main))
    blocks += [
      draw("forest", claims, job.margin,
           f"Change against {job.base}, {main}", metric),
      draw("groups", rows, models, column, metric),
    ]  # fmt: skip
    sampled = "negative_scores" in rows.columns
    levels += [
      results.group_table(job, main, metric, num_resamples)
      for metric in [metric, *(("AUC", "GAUC", "log loss") if sampled else ())]
    ]
  brief = several and bool(claims)
  blocks += [Fold("Levels, by activeness", levels)] if brief else levels
  more.append(results.metrics_table(job, main))
  if own.summary.get("closeness"):
    blocks.append(results.closeness_table(own))
  if own.trials:
    blocks.append(results.trials_table(own))
  blocks.append(Text(f"Protocol: {own.protocol}."))
  blocks += [
    Fold(f"The same with the {title}", tables(title))
    for title in list(own.lists)[1:]
  ]
  blocks.append(Fold("Each seed, other metrics", more))
  if own.gradients:
    blocks.append(Fold("Group gradients", [results.gradient_table(own)]))
  if own.summary.get("cost"):
    blocks.append(Fold("Training cost", [results.cost_table(own)]))
  if own.summary or own.config:
    blocks.append(Fold("Data and settings", _settings(own)))
  return blocks


def _facts(job: Analysis) -> str:
  own = job.results
  seeds = sorted(own.rows["seed"].unique())
  parts = [f"{own.rows['user'].n_unique():,} test users"]
  if "num_items" in own.summary:
    parts.append(f"{own.summary['num_items']:,} items")
  about = own.summary.get("description")
  if about:
    parts.append(
      f"{about['interactions']:,} training interactions, a user's median "
      f"{about['median']:g} and mean {about['mean']:.1f}, Gini "
      f"{about['gini']:.2f}; head: {100 * about['head_users']:.0f} % of users "
      f"with {100 * about['head_interactions']:.0f} % of interactions"
    )
  if own.config:
    backbone = own.config["backbone"]
    parts.append(
      f"backbone {backbone['name']}, width {backbone['width']}, window "
      f"{backbone['length']}"
    )
  few = few_seeds(len(seeds))
  parts.append(f"seeds {', '.join(map(str, seeds))}" + (few and f" ({few})"))
  [level] = [x for x in job.levels[job.main] if x.model == job.base]
  of_base = (
    cell_text(interval[0], "level")
    for interval in (level.overall, level.tail, level.head)
  )
  parts.append(
    f"compared with {job.base} ({job.metrics[0]} overall, tail, "
    f"head: {', '.join(of_base)}), margin for head users {100 * job.margin:g} %"
  )
  return "; ".join(parts) + "."


def _settings(own: Results) -> list[Block]:
  blocks: list[Block] = []
  for title, key in (("Reading", "notes"), ("Split", "split_notes")):
    facts = ", ".join(f"{k} {v}" for k, v in own.summary.get(key, {}).items())
    blocks += [Text(f"{title}: {facts}.")] if facts else []
  if "prior" in own.summary:
    numbers = ", ".join(f"{p:.3f}" for p in own.summary["prior"])
    blocks.append(
      Text(f"P(d) of the groups, least active first: {numbers}.")
    )
  if own.summary.get("versions"):
    found = (f"{k} {v}" for k, v in own.summary["versions"].items())
    blocks.append(Text(f"Computed with {', '.join(found)}."))
  return [*blocks, results.settings_table(own.config)]


# Numbers in words.


def verdict(job: Analysis, claim: Claim) -> str:
  """One to three sentences that say what was shown and what was not."""
  base, model = job.base, claim.model
  allowed = f"{100 * job.margin:g} %"
  tail, head = (cell_text(x, "change") for x in (claim.tail, claim.head))
  learnt = lambda key: learnt_by(key, job.results.config)
  if claim.outcome == UNEQUAL:
    return (
      f"No verdict: {model} has learnt from {learnt(claim.model)}, {base} "
      f"from {learnt(job.base)}. The difference (tail users {tail} %, head "
      f"users {head} %) is that of the information too."
    )
  if claim.outcome == UNTESTED:
    said = {1: "one seed shows", 2: "two seeds show"}[claim.seeds]
    return (
      f"No verdict: against {base}, {said} tail users at {tail} % and head "
      f"users at {head} % (margin {allowed}). From so few a test that is to "
      f"err in 2.5 % of all cases errs in some {_ERRS[claim.seeds]} %. For a "
      f"verdict take three seeds or more: {_more_seeds(job.results)}"
    )
  words, numbers = [], []
  for part, change, better, worse, neither in (
    ("tail", tail, "tail users are served better", "tail users are served "
     "worse", "for tail users no gain is shown"),
    ("head", head, f"head users are shown to lose no more than {allowed}",
     f"head users lose more than the {allowed} allowed",
     f"for head users a loss above {allowed} is not ruled out"),
  ):  # fmt: skip
    p, harm = claim.p[part], claim.p[f"{part} harm"]
    words.append(better if p < LEVEL else worse if harm < LEVEL else neither)
    numbers.append(f"{change} %, " + (
      f"p of harm {cell_text(harm, 'p')}" if harm < LEVEL
      else f"p {cell_text(p, 'p')}"
    ))
  opening = {HOLDS: "The claim holds", REFUTED: "The claim is refuted"}.get(
    claim.outcome, "The claim is not shown"
  )
  return (
    f"{opening}: against {base}, {words[0]} ({numbers[0]}), and {words[1]} "
    f"({numbers[1]})."
  )


def _more_seeds(own: Results) -> str:
  seeds = sorted(own.rows["seed"].unique())
  others = [seed for seed in range(MIN_SEEDS + len(seeds)) if seed not in seeds]
  more = others[: max(MIN_SEEDS - len(seeds), 0)]
  if own.trials:
    return f"--more_seeds={','.join(map(str, more))} of experiments.sweep"
  all_seeds = ",".join(map(str, (*seeds, *more)))
  return f"--config.seeds={all_seeds} in the same workdir"


def cell_text(cell: Cell, kind: str) -> str:
  """A table's cell, such as '.0514 [.0490, .0540]' or '+1.0 [−2.0, +3.0]'."""
  if isinstance(cell, str):
    return cell
  if isinstance(cell, tuple):
    estimate, low, high = (cell_text(x, kind) for x in cell[:3])
    return f"{estimate} [{low}, {high}]"
  if isinstance(cell, list):
    return ", ".join(cell_text(x, kind) for x in cell)
  if not math.isfinite(cell):
    return "n/a"
  if kind == "p" and cell < 0.001:
    return "< .001"
  if kind == "change":
    return f"{100 * cell:+.1f}".replace("-", "−")
  form = {"count": ",.0f", "number": ".2f", "gap": "+.4f", "p": ".3f"}
  text = f"{cell:{form.get(kind, '.4f')}}".replace("-", "−")
  return text if kind in ("count", "number") else re.sub(r"\b0\.", ".", text)


def cells(table: Table) -> list[list[str]]:
  """All cells of a table as text."""
  return [
    [cell_text(x, c.kind) for x, c in zip(line, table.columns, strict=True)]
    for line in table.lines
  ]


def words_of(table: Table) -> list[bool]:
  """Which columns are words, for the left."""
  return [c.kind in ("model", "word", "outcome") for c in table.columns]


# Renderers.


def _unfolded(blocks: Iterable[Block], inside: bool) -> Iterable[Block]:
  """The blocks, and those in folds where they are wanted."""
  for block in blocks:
    if isinstance(block, Fold):
      yield from block.blocks if inside else ()
    else:
      yield block


def to_console(report: Sequence[Section], to: rich.console.Console) -> None:
  """Prints what is not folded away; on a terminal broken between words."""
  say = functools.partial(to.print, soft_wrap=not to.is_terminal)
  for section in report:
    say(rich.text.Text(f"\n{section.title}", "bold"))
    for block in _unfolded(section.blocks, inside=False):
      match block:
        case Text(text, code=code):
          say(text, soft_wrap=code or not to.is_terminal)
        case Verdict(outcome, title, text):
          say(f"{title}: {outcome}. {text}")
        case Table():
          print_table(block, to)


def print_table(table: Table, to: rich.console.Console) -> None:
  """Prints a table whole at any width: columns that do not fit go below.

  What the verdicts say is left out: outcomes, and intervals of levels.
  """
  left, lines, columns = words_of(table), cells(table), []
  shown = [i for i, c in enumerate(table.columns) if c.kind != "outcome"]
  labels = [*itertools.takewhile(left.__getitem__, shown)]
  most = max(to.width // (2 * max(len(labels), 1)), 12)  # of a label
  for i in shown:
    own = []
    for line in lines:
      estimate, interval, rest = line[i].partition(" [")
      parts = [estimate] if interval else textwrap.wrap(line[i], most) or [""]
      if interval and table.columns[i].kind == "change":
        parts.append(f"[{rest}")
      own.append(parts)
    name = table.columns[i].name
    width = max([len(x) for x in itertools.chain(*own, name.split())])
    side = str.ljust if left[i] else str.rjust
    columns.append([
      [side(part, width) for part in parts]
      for parts in (textwrap.wrap(name, width), *own)
    ])
  deep = max(len(column[0]) for column in columns)
  for column in columns:  # headers stand on the line
    gap = " " * len(column[0][0])
    column[0] = [gap] * (deep - len(column[0])) + column[0]
  rows = []
  for some in _beside(columns, len(labels), to.width):
    for number, line in enumerate(zip(*some, strict=True)):
      blank = [" " * len(parts[0]) for parts in line]
      for parts in itertools.zip_longest(*line):
        rows.append("  ".join(
          part or gap for part, gap in zip(parts, blank, strict=True)
        ))  # fmt: skip
      if not number:
        rows.append("  ".join("─" * len(gap) for gap in blank))
    rows.append("")
  to.print(rich.text.Text(table.title, "bold"))
  to.print("\n".join(row.rstrip() for row in rows[:-1]))
  if table.note:
    to.print(table.note, soft_wrap=not to.is_terminal)
  to.print()


def _beside(
  columns: Sequence[Sequence], labels: int, most: int
) -> list[list[Sequence]]:
  """Columns that fit a width, the labels before each of them."""
  found = [[*columns[:labels]]]
  for column in columns[labels:]:
    if len(found[-1]) > labels and (
      sum(len(own[0][0]) + 2 for own in (*found[-1], column)) - 2 > most
    ):
      found.append([*columns[:labels]])
    found[-1].append(column)
  return found


def to_tsv(table: Table) -> str:
  """A table as tab-separated values, an interval's ends in columns of theirs.

  Changes are in percent, as in the other forms; what is not there is empty.
  """
  def number(x: float, kind: str) -> str:
    return f"{100 * x if kind == 'change' else x:.6g}" if x == x else ""

  def texts(cell: Cell, kind: str) -> list[str]:
    few = cell[:3] if isinstance(cell, tuple) else (cell, math.nan, math.nan)
    few = few[: 3 if kind == "change" else 1]
    return [
      " ".join(x.split()) if isinstance(x, str) else number(x, kind)
      for x in few
    ]

  names = [
    f"{column.name}{end}" for column in table.columns
    for end in ("", " low", " high")[: 3 if column.kind == "change" else 1]
  ]
  kinds = [column.kind for column in table.columns]
  lines = [
    [*itertools.chain(*map(texts, line, kinds))] for line in table.lines
  ]
  return "".join("\t".join(line) + "\n" for line in [names, *lines])


def to_html(report: Sequence[Section]) -> str:
  """One page that loads nothing from elsewhere."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.globals |= {"cells": cells, "words_of": words_of, "picture": (
    lambda figure: base64.b64encode(figures.svg(figure.draw())).decode()
  )}
  environment.filters["kind"] = lambda block: type(block).__name__
  template = environment.get_template("report.html")
  return template.render(title=_title(report), sections=report)


def _title(report: Sequence[Section]) -> str:
  names = dict.fromkeys(
    s.title.split(" (")[0] for s in report if s.anchor.startswith("job-")
  )
  return f"Long-tailed recommendation on {', '.join(names)}"


def to_markdown(report: Sequence[Section], pictures: str | None = None) -> str:
  """The report without what is folded away.

  Args:
    report: its sections.
    pictures: path of the figures' directory as seen from the file; None leaves
      the figures out.
  """
  plain = markdown_text
  parts = [f"# {plain(_title(report))}"]
  for section in report:
    parts.append(f"## {plain(section.title)}")
    for block in _unfolded(section.blocks, inside=False):
      match block:
        case Text(text, code=True):
          ticks = [len(x) + 1 for x in re.findall("`+", text)]
          fence = "`" * max(3, 0, *ticks)
          parts.append(f"{fence}bash\n{text}\n{fence}")
        case Text(text):
          parts.append(plain(text))
        case Verdict(outcome, title, text):
          parts.append(f"**{plain(title)}: {plain(outcome)}.** {plain(text)}")
        case Figure(name) if pictures is not None:
          parts.append(f"![{name}]({pictures}/{name}.svg)")
        case Table(title, columns, _, note):
          parts += [f"### {plain(title)}", markdown_table(
            [column.name for column in columns], cells(block), words_of(block)
          ), *([plain(note)] if note else [])]  # fmt: skip
  return "\n\n".join(parts) + "\n"


_MARKDOWN = str.maketrans({
  **{character: f"\\{character}" for character in "\\`*_|~"},
  "<": "&lt;", ">": "&gt;", "&": "&amp;",
})  # fmt: skip


def markdown_text(text: str) -> str:
  """Text in a line, with what Markdown reads as its own, or HTML, escaped."""
  text = " ".join(text.splitlines()).translate(_MARKDOWN)
  return text.replace("](", "]\\(").replace("][", "]\\[")


def markdown_table(
  headers: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[bool]
) -> str:
  """A Markdown table; columns of words are on the left."""
  table = [[markdown_text(cell) for cell in line] for line in [headers, *lines]]
  table.insert(1, [":--" if word else "--:" for word in left])
  return "\n".join(f"| {' | '.join(line)} |" for line in table)


_LATEX = {
  "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
  "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$", "–": "--",
  "…": r"\dots{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}",
}  # fmt: skip


def latex_text(text: str) -> str:
  """Text with what LaTeX reads as commands escaped."""
  return "".join(_LATEX.get(character, character) for character in text)


def to_latex(report: Sequence[Section]) -> str:
  """All tables as LaTeX floats, to be \\input; they need booktabs."""
  parts = ["% \\usepackage{booktabs,graphicx}"]
  for section in report:
    parts += [
      f"% {line}" for block in section.blocks if isinstance(block, Text)
      and block.text.startswith("Protocol: ")
      for line in block.text.splitlines()
    ]
    tables = [block for block in _unfolded(section.blocks, inside=True)
              if isinstance(block, Table)]  # fmt: skip
    for number, table in enumerate(tables):
      kinds = "".join("l" if word else "r" for word in words_of(table))
      head, *lines = (
        " & ".join(map(latex_text, line)) + r" \\"
        for line in [[c.name for c in table.columns], *cells(table)]
      )
      caption = f"{section.title}: {table.title}. {table.note}".strip()
      parts.append("\n".join([
        r"\begin{table}", rf"\caption{{{latex_text(caption)}}}",
        rf"\label{{tab:{section.anchor}-{number}}}",
        r"\centering\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule",
        *lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}",
      ]))  # fmt: skip
  return "\n\n".join(parts) + "\n"


def write_report(
  workdirs: Sequence[epath.PathLike],
  *,
  base: str | None = None,
  output: epath.PathLike | None = None,
  markdown: epath.PathLike | None = None,
  pictures: epath.PathLike | None = None,
  num_resamples: int = NUM_RESAMPLES,
  console: rich.console.Console | None = None,
) -> list[epath.Path]:
  """Prints and writes the report on finished jobs, see the module.

  Args:
    workdirs: directories of the jobs, or of summaries of them.
    base: model to compare with; None takes each job's own.
    output: directory to write to; None takes the only workdir.
    markdown: file to write the Markdown to, instead of all others.
    pictures: directory to write every figure to, as SVG.
    num_resamples: bootstrap resamples of users and seeds.
    console: where to print; standard output by default.

  Returns:
    The files.

  Raises:
    InputError: if a directory cannot be read or compared, or no place to write
      to is named.
    WriteError: if the files cannot be written; all are then as they were.
  """
  if output is None and markdown is None and len(workdirs) > 1:
    raise InputError(
      f"{len(workdirs)} workdirs and no output; name a directory for the "
      "report, as --output=runs/report"
    )
  read = [results.read(path) for path in workdirs]
  with disk.reading(", ".join(map(str, workdirs)), results.REMEDY):
    jobs = [results.analyse(own, base, num_resamples) for own in read]
    report, last = sections(jobs, num_resamples), []
    if len(jobs) == 1:
      found = results.answer(jobs[0], num_resamples)
      report[:0] = answer(jobs[0], found, f"runs/{read[0].name}", folded=True)
      last = answer(jobs[0], found, os.fspath(workdirs[0]))
    place = workdirs[0] if output is None else output
    stem = disk.place("output", place) / "report"
    path, link, files = stem.with_suffix(".md"), None, {}
    if markdown is not None:
      path = disk.place("markdown", markdown)
    else:
      files = {
        stem.with_suffix(".html"): to_html(report),
        stem.with_suffix(".tex"): to_latex(report),
      }
    if pictures is not None:
      folder = disk.place("figures", pictures)
      link = os.path.relpath(folder, path.parent)
      files |= {
        folder / f"{block.name}.svg": figures.svg(block.draw())
        for section in report
        for block in _unfolded(section.blocks, inside=True)
        if isinstance(block, Figure)
      }
    files[path] = to_markdown(report, link)
  console = console or commands.Console()
  to_console([*report[len(last):], *last], console)
  disk.write(files)
  names = sorted(os.path.relpath(file, path.parent) for file in files)
  console.print(
    f"{', '.join(names)} in {path.parent}" if names[1:] else str(path),
    soft_wrap=True,
  )
  return list(files)


def _main(argv: Sequence[str]) -> None:
  values = flags.FLAGS
  if len(argv) < 2:
    raise InputError("name one or more directories; see --help")
  if values.summary is None:
    write_report(
      argv[1:], base=values.base, output=values.output,
      markdown=values.markdown, pictures=values.figures,
    )
    return
  own = results.read(argv[1])
  if len(argv) > 2 or not own.summary:
    raise InputError(
      f"--summary of {', '.join(argv[1:])}: name one workdir that holds "
      "summary.json, as a finished job's does"
    )
  results.write_summary(own, values.summary)
  print(values.summary)


def _launch() -> None:
  flags.DEFINE_string("base", None, "model to compare with")
  flags.DEFINE_string("output", None, "directory of the report")
  flags.DEFINE_string("markdown", None, "file to write only the Markdown to")
  flags.DEFINE_string("figures", None, "directory for the figures, as SVG")
  flags.DEFINE_string("summary", None, "directory for a summary of one job")
  commands.launch(_main, words=True)


if __name__ == "__main__":
  _launch()
