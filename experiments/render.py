"""One report as an HTML page, as Markdown and as LaTeX tables."""

import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jinja2

from experiments import figures
from experiments.tables import markdown_table, markdown_text


class Text(NamedTuple):
  """A paragraph."""

  kind = "text"
  text: str


class Code(NamedTuple):
  """Lines to be copied, such as a command."""

  kind = "code"
  text: str


class Facts(NamedTuple):
  """Names and values."""

  kind = "facts"
  pairs: Sequence[tuple[str, str]]


class Table(NamedTuple):
  """A table; its first `left` columns are words.

  Attributes:
    title: above it.
    headers: of the columns.
    lines: cells as text.
    left: number of columns that are words.
    note: below it.
  """

  kind = "table"
  title: str
  headers: Sequence[str]
  lines: Sequence[Sequence[str]]
  left: int = 1
  note: str = ""


class Figures(NamedTuple):
  """SVG elements side by side; on the page, or each in a file."""

  kind = "figures"
  elements: Sequence[str]


class Verdict(NamedTuple):
  """What was shown, in words.

  Attributes:
    outcome: one of those of `claims`.
    title: of what.
    text: sentences.
  """

  kind = "verdict"
  outcome: str
  title: str
  text: str


class Fold(NamedTuple):
  """Blocks that the page shows on demand."""

  kind = "fold"
  title: str
  blocks: Sequence["Block"]


Block = Text | Code | Facts | Table | Figures | Verdict | Fold


class Section(NamedTuple):
  """A section with an anchor."""

  anchor: str
  title: str
  blocks: Sequence[Block]


class Report(NamedTuple):
  """Everything that the page says.

  Attributes:
    title: of the page.
    lead: the first paragraph.
    sections: in order.
    group_counts: numbers of groups that figures colour.
  """

  title: str
  lead: str
  sections: Sequence[Section]
  group_counts: Sequence[int]


def html(report: Report) -> str:
  """The report as one page that loads nothing from elsewhere."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  light, dark = figures.stylesheet(report.group_counts)
  template = environment.get_template("report.html")
  return template.render(report=report, light=light, dark=dark)


def _unfolded(blocks: Iterable[Block]) -> Iterable[Block]:
  for block in blocks:
    if isinstance(block, Fold):
      yield from _unfolded(block.blocks)
    else:
      yield block


def markdown(report: Report) -> str:
  """The report as Markdown, without its figures."""
  parts = [f"# {markdown_text(report.title)}", markdown_text(report.lead)]
  for section in report.sections:
    parts.append(f"## {markdown_text(section.title)}")
    parts += filter(None, map(_markdown_block, _unfolded(section.blocks)))
  return "\n\n".join(parts) + "\n"


def drawings(report: Report) -> dict[str, str]:
  """Every figure as an SVG file of its own: name, section and number, -> text.

  On white and with its colours and fonts spelled out, where the page's are
  variables.
  """
  return {
    f"{section.anchor}-{number}.svg": _standalone(element)
    for section in report.sections
    for number, element in enumerate(
      (
        element for block in _unfolded(section.blocks)
        if isinstance(block, Figures) for element in block.elements
      ), 1,
    )
  }


def _standalone(element: str) -> str:
  text = re.sub(r"var\(--c[0-9a-f]+, (#[0-9a-f]+)\)", r"\1", element)
  text = text.replace("var(--sans)", "sans-serif")
  head, rest = text.split(">", 1)
  width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head).groups()
  return (
    f'{head} width="{width}pt" height="{height}pt">\n'
    f'<rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'
  )


def _markdown_block(block: Block) -> str:
  plain = markdown_text
  match block:
    case Text(text):
      return plain(text)
    case Code(text):
      fence = "`" * max(3, *(len(x) + 1 for x in re.findall("`+", text)), 0)
      return f"{fence}bash\n{text}\n{fence}"
    case Facts(pairs):
      return "\n".join(f"- {plain(k)}: {plain(v)}" for k, v in pairs)
    case Verdict(outcome, title, text):
      return f"**{plain(title)}: {plain(outcome)}.** {plain(text)}"
    case Table(title, headers, lines, left, note):
      table = markdown_table(headers, lines, left=left)
      title, note = f"### {plain(title)}", plain(note)
      return "\n\n".join(filter(None, [title, table, note]))
  return ""


_LATEX = {
  "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#",
  "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}", "−": "$-$", "±": r"$\pm$", "–": "--",
  "…": r"\dots{}", "<": "$<$", ">": "$>$", "|": r"\textbar{}",
}  # fmt: skip


def latex_text(text: str) -> str:
  """Text with what LaTeX reads as commands escaped."""
  return "".join(_LATEX.get(character, character) for character in text)


def latex(report: Report) -> str:
  """The tables as LaTeX floats, to be \\input; they need booktabs."""
  parts = ["% \\usepackage{booktabs,graphicx}"]
  for section in report.sections:
    parts += [
      _latex_table(block, section, number)
      for number, block in enumerate(_unfolded(section.blocks))
      if isinstance(block, Table)
    ]
  return "\n\n".join(parts) + "\n"


def _latex_table(table: Table, section: Section, number: int) -> str:
  columns = "l" * table.left + "r" * (len(table.headers) - table.left)
  lines = [
    " & ".join(map(latex_text, line)) + r" \\"
    for line in [table.headers, *table.lines]
  ]
  caption = f"{section.title}: {table.title}. {table.note}".strip()
  label = re.sub(r"[^a-z0-9]+", "-", section.anchor.lower())
  return "\n".join([
    r"\begin{table}",
    rf"\caption{{{latex_text(caption)}}}",
    rf"\label{{tab:{label}-{number}}}",
    r"\centering\resizebox{\textwidth}{!}{%",
    rf"\begin{{tabular}}{{{columns}}}",
    r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule",
    r"\end{tabular}}",
    r"\end{table}",
  ])
