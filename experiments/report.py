"""Tables and plots of a run, computed from its result rows and nothing else.

    python -m experiments.report --workdir=DIR

reads DIR/rows.parquet (one row a model, seed and user) and, where present,
DIR/log.jsonl and DIR/summary.json; prints the tables and writes comparison.csv,
.md and .json and plots/ beside them. Where the job ranked sampled candidates,
rows_sampled.parquet gives comparison_sampled.csv, .md and .json instead.
"""

import json
import sys
from collections.abc import Sequence

import polars as pl
import rich.console
from absl import app, flags
from etils import epath

from experiments import truth
from experiments.logs import read_log
from experiments.plots import plot_activeness, plot_gradients, plot_groups
from experiments.tables import (
  NUM_RESAMPLES,
  SUFFIXES,
  comparison,
  model_rows,
  model_table,
  print_comparison,
  print_models,
  protocol_line,
  write_comparison,
)
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
    InputError: if rows.parquet is absent or does not allow the comparison.
  """
  workdir = epath.Path(workdir)
  console = console or rich.console.Console(highlight=False)
  rows, suffix = _read_rows(workdir)
  summary_path = workdir / "summary.json"
  summary = {}
  if summary_path.exists():
    summary = json.loads(summary_path.read_text())
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
  _print_cost(workdir, summary.get("cost", {}), console)
  print_models(models, console=console)
  if summary.get("closeness"):
    truth.print_closeness(summary["closeness"], console)
  if table is None:
    console.print(f"Protocol: {protocol}.", markup=False)
  else:
    print_comparison(table, cutoff=cutoff, console=console, **names)
  write_comparison(
    table, models, workdir, cutoff=cutoff, suffix=suffix, **names
  )
  _write_plots(
    workdir, rows, base, other, console, cutoff=cutoff,
    num_resamples=num_resamples,
  )
  written = [path for path in sorted(workdir.iterdir()) if path.is_file()]
  written += sorted((workdir / "plots").iterdir())
  console.print(f"written to {workdir}:", soft_wrap=True)
  for path in written:
    console.print(f"  {path}", soft_wrap=True, markup=False)
  return models if table is None else table


def _print_cost(
  workdir: epath.Path, cost: dict[str, dict], console: rich.console.Console
) -> None:
  """One line a run: steps, processor time, best validation."""
  path = workdir / "cpu_seconds.json"
  seconds = json.loads(path.read_text()) if path.exists() else {}
  for run, spent in cost.items():
    values = ", ".join(f"{x:.4f}" for x in spent["validation"])
    # Jobs of older versions hold the processor time in the summary.
    time = seconds.get(run, spent.get("cpu_seconds", float("nan")))
    skipped = f", {spent['skipped']} skipped" if "skipped" in spent else ""
    console.print(
      f"{run}: {spent['steps']:,} steps{skipped}, {time:.0f} CPU-seconds, "
      f"best validation {values} at step {spent['best_steps']}",
      markup=False, soft_wrap=True,
    )


def _read_rows(workdir: epath.Path) -> tuple[pl.DataFrame, str]:
  """The rows of the job's protocol, and the suffix of its files."""
  for suffix in SUFFIXES.values():
    path = workdir / f"rows{suffix}.parquet"
    if path.exists():
      with path.open("rb") as file:
        return pl.read_parquet(file), suffix
  raise InputError(
    f"{workdir} has no rows.parquet; name the workdir of a finished run"
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
  plots.mkdir(exist_ok=True)
  users = model_rows(rows, base).unique("user", maintain_order=True)
  columns = [users[c].to_numpy() for c in ("activeness", "group", "segment")]
  plot_activeness(*columns, plots / "activeness.png")
  if base != other:
    plot_groups(rows, base, other, plots / "groups_ndcg.png", **options)
  if not (workdir / "log.jsonl").exists():
    return
  records = read_log(workdir)
  runs = dict.fromkeys(
    r["run"] for r in records if len(r.get("norms", ())) > 1
  )
  for run in [run for run in runs if run.endswith("backbone")]:
    name = "gradients" + "".join(f"-{x}" for x in run.split("/")[:-1])
    try:
      plot_gradients(records, run, plots / f"{name}.png")
    except InputError as error:
      console.print(f"{name}.png not written: {error}", markup=False)


def _main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  values = flags.FLAGS
  try:
    write_report(
      values.workdir,
      base=values.base,
      other=values.other,
      cutoff=values.cutoff,
    )
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  # Defined here: an importing program has flags of its own.
  flags.DEFINE_string("workdir", None, "directory of the run", required=True)
  flags.DEFINE_string("base", None, "model to compare with")
  flags.DEFINE_string("other", None, "model under test")
  flags.DEFINE_integer("cutoff", 10, "K of the tables and plots")
  app.run(_main)
