"""Tables and plots of a run, computed from its result rows and nothing else.

    python -m experiments.report --workdir=DIR

reads DIR/rows.parquet (one row a model, seed and user) and, where present,
DIR/log.jsonl and DIR/summary.json; prints the tables and writes comparison.csv,
.md and .json and plots/ beside them. Where the job ranked sampled candidates,
rows_sampled.parquet gives comparison_sampled.csv, .md and .json instead.

    python -m experiments.report DIR... --output=OUT

reads any number of finished jobs, or summaries of them (see
experiments.summaries), and writes one self-contained page OUT/report.html, and
its tables as OUT/report.md and OUT/report.tex. OUT is by default the workdir,
where there is one. `--markdown=FILE` writes only the Markdown, to FILE.
`--figures=DIR` writes every figure as an SVG file too, for papers and docs.
"""

from collections.abc import Sequence
from typing import Any

import polars as pl
import rich.console
from absl import flags
from etils import epath

from experiments import (
  claims,
  commands,
  render,
  sections,
  summaries,
  truth,
)
from experiments.logs import read_log
from experiments.plots import plot_activeness, plot_gradients, plot_groups
from experiments.tables import (
  NUM_RESAMPLES,
  comparison,
  model_rows,
  model_table,
  print_comparison,
  print_models,
  protocol_line,
  write_comparison,
)
from pin_jax import disk
from pin_jax.types import InputError


def write_report(
  workdir: epath.PathLike,
  *,
  base: str | None = None,
  other: str | None = None,
  cutoff: int = 10,
  num_resamples: int = NUM_RESAMPLES,
  console: rich.console.Console | None = None,
) -> pl.DataFrame:
  """Recomputes, prints and writes every table and plot of a workdir.

  Reads rows.parquet; log.jsonl for the gradients; and from summary.json the
  keys `base`, `other`, `protocol` (the split's line), `num_items`, `closeness`
  and `fingerprint`, each of them optional.

  Args:
    workdir: directory of the run, also written to.
    base: model to compare with; None takes the summary's, else 'base'.
    other: model under test; None takes the summary's, else 'pin'.
    cutoff: K of the tables and plots.
    num_resamples: bootstrap resamples of the users.
    console: where to print; standard output by default.

  Returns:
    The comparison table; where there is one model, the table of the models.

  Raises:
    InputError: if rows.parquet is absent or does not allow the comparison, or
      a file is damaged.
    WriteError: if the disk is full or read-only.
  """
  workdir = disk.place("workdir", workdir)
  console = console or commands.Console()
  with disk.reading(workdir, summaries.REMEDY):
    return _write_report(workdir, base, other, cutoff, num_resamples, console)


def _write_report(
  workdir: epath.Path,
  base: str | None,
  other: str | None,
  cutoff: int,
  num_resamples: int,
  console: rich.console.Console,
) -> pl.DataFrame:
  rows, suffix = summaries.read_rows(workdir)
  summary = {}
  if (workdir / "summary.json").exists():
    summary = summaries.job_summary(workdir)
  base = base or summary.get("base", "base")
  other = other or summary.get("other", "pin")

  table = None
  if base != other:
    table = comparison(
      rows, base=base, other=other, cutoff=cutoff, num_resamples=num_resamples
    )
  models = model_table(rows, cutoff=cutoff)
  protocol = protocol_line(
    rows,
    split=summary.get("protocol", "split not recorded"),
    num_items=summary.get("num_items"),
    num_resamples=num_resamples,
  )
  if "fingerprint" in summary:
    protocol += f"; data {summary['data']} {summary['fingerprint']}"
  names = {"base": base, "other": other, "protocol": protocol}
  verdicts = _verdicts(
    workdir, rows, summary, base, cutoff=cutoff, num_resamples=num_resamples
  )
  _print_cost(summary.get("cost", {}), console)
  print_models(models, console=console)
  if summary.get("closeness"):
    truth.print_closeness(summary["closeness"], console)
  if table is None:
    console.print(f"Protocol: {protocol}.", markup=False)
  else:
    print_comparison(table, cutoff=cutoff, console=console, **names)
  for model, verdict in verdicts.items():
    console.print(f"{model}: {verdict}", markup=False)
  write_comparison(
    table, models, workdir, cutoff=cutoff, suffix=suffix, verdicts=verdicts,
    **names,
  )
  _write_plots(
    workdir, rows, base, other, console, cutoff=cutoff,
    num_resamples=num_resamples,
  )
  written = [path for path in sorted(workdir.iterdir()) if path.is_file()]
  written += sorted((workdir / "plots").iterdir())
  console.print(f"written to {workdir}:", soft_wrap=True, markup=False)
  for path in written:
    console.print(f"  {path}", soft_wrap=True, markup=False)
  return models if table is None else table


def _verdicts(
  workdir: epath.Path, rows: pl.DataFrame, summary: dict[str, Any], base: str,
  **options: int,
) -> dict[str, str]:
  """In words, for every model but the base, what was shown of it.

  And for every one whether its last stage changed nothing.
  """
  path = workdir / "config.json"
  config = summaries.config_of(path) if path.exists() else {}
  found = sections.claim_lines(rows, summary, config, base=base, **options)
  remarks = claims.unchanged(rows, summary.get("cost", {}))
  own = {base: f"{remarks[base]}."} if base in remarks else {}
  return own | {line["model"]: line["verdict"] for line in found}


def _print_cost(
  cost: dict[str, dict], console: rich.console.Console
) -> None:
  """One line a run: steps, processor time, best validation."""
  for run, spent in cost.items():
    values = ", ".join(f"{x:.4f}" for x in spent["validation"])
    chosen = f"best validation {values} at" if values else "kept as it is at"
    skipped = f", {spent['skipped']} skipped" if "skipped" in spent else ""
    console.print(
      f"{run}: {spent['steps']:,} steps{skipped}, {spent['cpu_seconds']:.0f} "
      f"CPU-seconds, {chosen} step {spent['best_steps']}",
      markup=False, soft_wrap=True,
    )


def _write_plots(
  workdir: epath.Path,
  rows: pl.DataFrame,
  base: str,
  other: str,
  console: rich.console.Console,
  **options: int,
) -> None:
  plots = workdir / "plots"
  users = model_rows(rows, base).unique("user", maintain_order=True)
  columns = [users[c].to_numpy() for c in ("activeness", "group", "segment")]
  plot_activeness(*columns, plots / "activeness.png")
  if base != other:
    plot_groups(rows, base, other, plots / "groups_ndcg.png", **options)
  if not (workdir / "log.jsonl").exists():
    return
  records = read_log(workdir)
  runs = dict.fromkeys(r["run"] for r in records if summaries.is_grouped(r))
  for run in runs:
    of_run = run.removesuffix("/backbone").replace("/", "-")
    name = f"gradients-{of_run}"
    try:
      plot_gradients(records, run, plots / f"{name}.png")
    except InputError as error:
      console.print(f"{name}.png not written: {error}", markup=False)


def write_pages(
  workdirs: Sequence[epath.PathLike],
  *,
  base: str | None = None,
  output: epath.PathLike | None = None,
  markdown: epath.PathLike | None = None,
  drawings: epath.PathLike | None = None,
  num_resamples: int = NUM_RESAMPLES,
) -> list[epath.Path]:
  """Writes report.html, .md and .tex on finished jobs or their summaries.

  Args:
    workdirs: directories of the jobs or summaries.
    base: model to compare with; None takes each job's own.
    output: directory to write to; None takes the only workdir.
    markdown: file to write the Markdown to, instead of all others.
    drawings: directory to write every figure to, as SVG.
    num_resamples: bootstrap resamples of users and seeds.

  Returns:
    The files.

  Raises:
    InputError: if a directory has no rows, or no place to write to is named.
    WriteError: if the files cannot be written; all are then as they were.
  """
  if output is None and markdown is None and len(workdirs) > 1:
    raise InputError(
      f"{len(workdirs)} workdirs and no output; name a directory for the "
      "report, as --output=runs/report"
    )
  jobs = [summaries.read(path) for path in workdirs]
  with disk.reading(", ".join(map(str, workdirs)), summaries.REMEDY):
    content = sections.report(jobs, base=base, num_resamples=num_resamples)
  if markdown is not None:
    texts = {disk.place("markdown", markdown): render.markdown(content)}
  else:
    place = workdirs[0] if output is None else output
    stem = disk.place("output", place) / "report"
    texts = {
      stem.with_suffix(".html"): render.html(content),
      stem.with_suffix(".md"): render.markdown(content),
      stem.with_suffix(".tex"): render.latex(content),
    }
  if drawings is not None:
    made = render.drawings(content)
    folder = disk.place("figures", drawings)
    texts |= {folder / name: made[name] for name in made}
  disk.write(texts)
  return list(texts)


def _main(argv: Sequence[str]) -> None:
  values = flags.FLAGS
  if (values.workdir is None) == (len(argv) < 2):
    raise InputError(
      "name either --workdir=DIR or one or more directories; see --help"
    )
  if values.workdir is not None:
    write_report(
      values.workdir, base=values.base, other=values.other,
      cutoff=values.cutoff,
    )
    return
  for path in write_pages(
    argv[1:], base=values.base, output=values.output,
    markdown=values.markdown, drawings=values.figures,
  ):
    print(path)


def _launch() -> None:
  flags.DEFINE_string("workdir", None, "directory of one run to tabulate")
  flags.DEFINE_string("base", None, "model to compare with")
  flags.DEFINE_string("other", None, "model under test, with --workdir")
  flags.DEFINE_integer("cutoff", 10, "K of the tables, with --workdir")
  flags.DEFINE_string("output", None, "directory of the report")
  flags.DEFINE_string("markdown", None, "file to write only the Markdown to")
  flags.DEFINE_string("figures", None, "directory for the figures, as SVG")
  commands.launch(_main, words=True)


if __name__ == "__main__":
  _launch()
