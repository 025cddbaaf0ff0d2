"""Finished jobs as the report reads them, and summaries small enough to commit.

    python -m experiments.summaries WORKDIR --output=docs/results/beauty

writes, for a finished job,

    ranks.parquet  a row a user: segment, group, activeness, numbers of
                   candidates, and for every model and seed twice its rank, 0
                   where that is beyond 20
    job.json       the job's summary and configuration, a thinned record of the
                   group gradients

It takes about half a byte for every rank, and holds no user id, target or path.
Metrics with a cutoff of at most 20 follow from it exactly as from the rows,
their intervals and tests up to the resampling's error; `experiments.report`
reads either.
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from absl import flags
from etils import epath

from experiments import commands
from experiments.logs import read_log
from experiments.tables import (
  SUFFIXES,
  check_same_users,
  maskings,
  model_rows,
  protocol_line,
)
from experiments.workdir import read_json
from pin_jax import disk
from pin_jax.types import InputError

CUTOFF = 20  # the largest that a summary keeps
PATHS = "path", "data_dir", "manual_dir"  # of the config's data section
REMEDY = "restore it from a copy, or make it again"
RECORDS = 60  # of a run's group gradients
_GRADIENTS = (
  "step", "weights", "norms", "cosines", "conflict_rate", "effective_groups",
  "noise_conflict_rate", "noise_cosine",
)
_WORKDIR = re.compile(r"(--(?:workdir|beside)=)/(?:[^\s/]+/)*")
_FOLDER = re.compile(r"(?<=[=\"'])/(?:[^\s/,\"']+/)*")
_USER = ("group", "segment", "activeness", "candidates", "candidates_unmasked")


class Results(NamedTuple):
  """What a finished job, or the summary of one, left.

  Attributes:
    name: name of its directory.
    rows: a row a user, model and seed; see evaluation.
    lists: title of each list of candidates -> column of the rank in it.
    protocol: how the numbers came about, in one line.
    summary: content of summary.json, but for absolute paths in its command;
      {} where there is none.
    config: the configuration, {} where there is none.
    gradients: run -> records of its group gradients.
    adjustment: of each exactly adjusted backbone its `run`, the fit of its
      stratum classifier at the chosen step, and `effective_share`, [G], the
      effective number of a group's examples over their number, mean over steps.
    trials: of what `experiments.trials` chose: `settings`, and of each of
      `models` its `validation` in each setting, over which `seeds`, and the
      index of the `chosen` one; {} elsewhere.
  """

  name: str
  rows: pl.DataFrame
  lists: dict[str, str]
  protocol: str
  summary: dict[str, Any]
  config: dict[str, Any]
  gradients: dict[str, list[dict[str, Any]]]
  adjustment: Sequence[dict[str, Any]] = ()
  trials: Mapping[str, Any] = MappingProxyType({})


def read(path: epath.PathLike) -> Results:
  """Reads a workdir, or a summary of one.

  Args:
    path: the directory.

  Returns:
    The results, their rows checked for completeness.

  Raises:
    InputError: if there are no rows, or users or targets of the models differ.
  """
  path = disk.place("workdir", path)
  with disk.reading(path, REMEDY):
    whole = (path / "ranks.parquet").exists()
    return _read_summary(path) if whole else _read_job(path)


def _read_job(path: epath.Path) -> Results:
  rows, _ = read_rows(path)
  models = rows["model"].unique(maintain_order=True).to_list()
  check_same_users(rows, models, on=["user"])
  summary, config, gradients, adjustment = {}, {}, {}, []
  if (path / "summary.json").exists():
    summary = _without_paths(job_summary(path))
  if (path / "config.json").exists():
    config = config_of(path / "config.json")
  if (path / "log.jsonl").exists():
    records = read_log(path)
    gradients = _gradient_records(records)
    adjustment = _adjustment(records)
  return Results(
    path.resolve().name, rows, maskings(rows), _protocol(rows, summary),
    summary, config, gradients, adjustment,
  )


def config_of(path: epath.Path) -> dict[str, Any]:
  """The configuration in a job's config.json."""
  return read_json(path, config={})["config"]


def job_summary(workdir: epath.Path) -> dict[str, Any]:
  """summary.json, with each run's processor time of cpu_seconds.json."""
  summary = read_json(workdir / "summary.json")
  path = workdir / "cpu_seconds.json"
  seconds = read_json(path) if path.exists() else {}
  with disk.reading(workdir / "summary.json", REMEDY):
    for key in ("base", "other", "protocol", "data", "fingerprint"):
      if not isinstance(summary.get(key, ""), str):
        raise TypeError(f"{key} is {str(summary[key])[:50]!r}")
    for run, cost in summary.get("cost", {}).items():
      cost.setdefault("cpu_seconds", seconds.get(run, math.nan))
  return summary


def _protocol(rows: pl.DataFrame, summary: Mapping[str, Any]) -> str:
  line = protocol_line(
    rows,
    split=summary.get("protocol", "split not recorded"),
    num_items=summary.get("num_items"),
  )
  if "fingerprint" in summary:
    line += f"; data {summary['data']} {summary['fingerprint']}"
  return line


def read_rows(workdir: epath.Path) -> tuple[pl.DataFrame, str]:
  """The rows of the job's protocol, and the suffix of its files.

  Raises:
    InputError: if there are none.
  """
  for suffix in SUFFIXES.values():
    path = workdir / f"rows{suffix}.parquet"
    if path.exists():
      with disk.reading(path, REMEDY):
        return disk.read_parquet(path.read_bytes()), suffix
  raise InputError(
    f"{workdir} has no rows.parquet; name the workdir of a finished run"
  )


def _gradient_records(
  records: Iterable[Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
  """Records with a whole Gramian of several groups, by run.

  Where some steps of a run tell what noise alone does, these alone.
  """
  found: dict[str, list[dict[str, Any]]] = {}
  for record in records:
    if is_grouped(record) and record["conflict_rate"] is not None:
      kept = {
        key: record[key] for key in ("run", *_GRADIENTS) if key in record
      }
      found.setdefault(record["run"], []).append(kept)
  for run, own in found.items():
    looked = [r for r in own if r.get("noise_conflict_rate") is not None]
    found[run] = looked or own
  return found


def is_grouped(record: Mapping[str, Any]) -> bool:
  """Whether a step's record is of a stage that combines groups' gradients."""
  return "conflict_rate" in record and len(record.get("norms", ())) > 1


def _adjustment(
  records: Iterable[Mapping[str, Any]],
) -> list[dict[str, Any]]:
  """Of each exactly adjusted backbone what `Results.adjustment` says."""
  shares: dict[str, list[list[float]]] = {}
  fits: dict[str, dict[str, float]] = {}
  for record in records:
    run = record.get("run", "")
    if "effective_share" in record:
      shares.setdefault(run, []).append(record["effective_share"])
    fit = record.get("validation", {})
    if "calibration_error" in fit:
      best = fits.get(_seed_of(run), {}).get("log_likelihood", -math.inf)
      if fit["log_likelihood"] > best:
        fits[_seed_of(run)] = fit
  return [
    {
      "run": run, **fits.get(_seed_of(run), {}),
      "effective_share": np.mean(own, 0).tolist(),
    }
    for run, own in shares.items()
  ]


def _seed_of(run: str) -> str:
  return run.removesuffix(without_seed(run))


def write(results: Results, output: epath.PathLike) -> None:
  """Writes the summary of a job, see the module's docstring.

  Args:
    results: as from `read`.
    output: directory, made where it is missing.

  Raises:
    InputError: if a rank is no whole or half number.
    WriteError: if the disk is full or read-only; nothing is then written.
  """
  output = disk.place("output", output)
  ranks = io.BytesIO()
  _ranks(results).write_parquet(
    ranks, compression="zstd", compression_level=19, statistics=False
  )
  content = {
    "name": results.name,
    "lists": results.lists,
    "protocol": results.protocol,
    "summary": results.summary,
    "config": _without_folders(results.config),
    "gradients": {
      run: _thinned(own) for run, own in _first_seeds(results.gradients)
    },
    "adjustment": [
      {key: _rounded(value) for key, value in of_run.items()}
      for of_run in results.adjustment
    ],
    **({"trials": results.trials} if results.trials else {}),
  }
  text = json.dumps(content, ensure_ascii=False)
  disk.write({
    output / "ranks.parquet": ranks.getvalue(), output / "job.json": text + "\n"
  })


def _without_paths(summary: Mapping[str, Any]) -> dict[str, Any]:
  """The summary, its command with names in place of absolute paths."""
  if "command" not in summary:
    return dict(summary)
  command = _WORKDIR.sub(r"\1runs/", summary["command"])
  return {**summary, "command": _FOLDER.sub("", command)}


def _without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
  """The configuration with the name of its data file, not where it lies."""
  data = {
    key: epath.Path(value).name if key in PATHS and value else value
    for key, value in config.get("data", {}).items()
  }
  return {**config, **({"data": data} if data else {})}


def _ranks(results: Results) -> pl.DataFrame:
  """One line a user, most active last, a column a model, seed and list."""
  rows = results.rows
  models = rows["model"].unique(maintain_order=True).to_list()
  users = rows.unique("user").sort("activeness", "group", "segment", "user")
  facts = [name for name in _USER if name in rows.columns]
  columns = {"user": users["user"]}
  columns |= {name: users[name] for name in facts}
  wide = pl.DataFrame(columns)
  for model in models:
    for (seed,), own in model_rows(rows, model).group_by(
      "seed", maintain_order=True
    ):
      named = [
        _twice(own[column]).alias(json.dumps([model, seed, title]))
        for title, column in results.lists.items()
      ]
      wide = wide.join(
        own.select("user").with_columns(named), on="user", how="left",
        maintain_order="left",
      )
  return wide.drop("user")


def _twice(ranks: pl.Series) -> pl.Series:
  """2 * rank as a byte, 0 beyond the cutoff."""
  twice = 2 * ranks.to_numpy().astype(np.float64)
  kept = np.isfinite(twice) & (twice <= 2 * CUTOFF)
  if np.any(twice[kept] % 1):
    bad = ranks.to_numpy()[kept][twice[kept] % 1 > 0][0]
    raise InputError(
      f"a rank is {bad}, neither whole nor half; pass the rows that evaluation "
      "wrote"
    )
  return pl.Series(np.where(kept, twice, 0).astype(np.uint8))


def _first_seeds(
  gradients: Mapping[str, list[dict[str, Any]]],
) -> list[tuple[str, list[dict[str, Any]]]]:
  """Runs of each method's first seed."""
  first = {}
  for run, own in gradients.items():
    first.setdefault(without_seed(run), (run, own))
  return list(first.values())


def without_seed(run: str) -> str:
  """'seed3/pin/backbone' -> 'pin/backbone'."""
  head, _, tail = run.partition("/")
  return tail if head.removeprefix("seed").isdigit() and tail else run


def _thinned(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  stride = max(1, -(-len(records) // RECORDS))
  return [
    {key: _rounded(value) for key, value in record.items()}
    for record in records[::stride]
  ]


def _rounded(value: Any) -> Any:
  if isinstance(value, list):
    return [_rounded(x) for x in value]
  return float(f"{value:.4g}") if isinstance(value, float) else value


def _read_summary(path: epath.Path) -> Results:
  content = read_json(path / "job.json")
  wide = disk.read_parquet((path / "ranks.parquet").read_bytes())
  facts = [name for name in _USER if name in wide.columns]
  users = wide.select(facts).with_row_index("user")
  found: dict[tuple[str, int], dict[str, pl.Series]] = {}
  for name in wide.columns[len(facts) :]:
    model, seed, title = json.loads(name)
    column = content["lists"][title]
    twice = wide[name].cast(pl.Float64)
    rank = (twice / 2).replace(0.0, np.inf).alias(column)
    found.setdefault((model, seed), {})[column] = rank
  frames = [
    users.with_columns(
      pl.lit(model).alias("model"), pl.lit(seed, pl.Int32).alias("seed"),
      pl.lit(0).alias("target"), *columns.values(),
    ).filter(pl.all_horizontal(pl.col(list(columns)).is_not_null()))
    for (model, seed), columns in found.items()
  ]
  fields = {key: content[key] for key in Results._fields if key in content}
  return Results(rows=_completed(pl.concat(frames)), **fields)


def _completed(rows: pl.DataFrame) -> pl.DataFrame:
  """Columns that only rows of full ranking have, for the same checks."""
  missing = {
    name: pl.col(like)
    for name, like in (
      ("rank_unmasked", "rank"), ("candidates_unmasked", "candidates")
    )
    if name not in rows.columns
  }
  return rows.with_columns(**missing)


def _main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise InputError(f"arguments are {argv[1:]}; name one workdir")
  results = read(argv[1])
  if not results.summary:
    raise InputError(f"{argv[1]} has no summary.json; finish the job first")
  write(results, flags.FLAGS.output)
  for path in sorted(epath.Path(flags.FLAGS.output).iterdir()):
    print(f"{path}: {path.stat().length:,} bytes")


def launch(main: Callable[[Sequence[str]], None]) -> None:
  """Runs the main function of a command that writes a summary to --output."""
  flags.DEFINE_string(
    "output", None, "directory of the summary", required=True
  )
  commands.launch(main, words=True)


if __name__ == "__main__":
  launch(_main)
