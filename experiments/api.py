"""The main job from Python: what `main` runs, and what notebooks do.

  data = pin_jax.read("sales.csv")
  job = pin_jax.compare(data, "runs/mine", seeds=(0, 1, 2))
  print(job.verdict)
  job.plot("groups")
  job.recommender().recommend([17, 4], k=10)
"""

import copy
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
import polars as pl
from etils import epath
from ml_collections import ConfigDict

from experiments import (
  build,
  commands,
  job,
  report,
  results,
  schema,
  serve,
  sizes,
)
from experiments.configs import files
from experiments.workdir import write_rows
from pin_jax import disk, serving
from pin_jax.data.files import read
from pin_jax.data.interactions import Interactions
from pin_jax.types import InputError


def compare(
  data: Any,
  workdir: epath.PathLike,
  *,
  methods: Sequence[str] | None = None,
  recipe: str | None = None,
  run: Callable[[ConfigDict, epath.Path], None] | None = None,
  **options: Any,
) -> "Job":
  """Trains the methods on the same interactions and compares them.

  The same call continues an interrupted job and reprints a finished one.

  Args:
    data: from `pin_jax.read`, or what it reads: a path, a data frame, a dict of
      columns; or a whole configuration, as a module of `experiments.configs`
      returns it. Data that are in memory are kept in the workdir.
    workdir: directory of the job.
    methods: rows of the tables; None = those of the recipe.
    recipe: that of `experiments.configs.files`; None = its default.
    run: what runs a configuration in a workdir and prints; None = `job.run`.
    **options: any setting of docs/keys.md by its section, as
      `seeds=(0, 1, 2), backbone={"width": 128}`, or by its whole name, as
      `**{"backbone.width": 128}`.

  Returns:
    The finished job.

  Raises:
    InputError: for any bad input, before training starts.
    TrainingError: if a loss is not finite, or a checkpoint cannot be written.
    WriteError: if the disk is full or read-only.
  """
  commands.keep_programs()
  workdir = disk.place("workdir", workdir)
  if isinstance(data, ConfigDict):
    if recipe is not None:
      raise InputError(
        f"recipe={recipe!r} is an argument of a configuration; make it there"
      )
    config, kept = copy.deepcopy(data), None
  else:
    config, kept = _of_data(data, recipe, workdir)
  if methods is not None:
    options["methods"] = tuple(methods)
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict(dict(schema.flatten(options)))
  path = epath.Path(config.data.get("path") or "")
  if kept is not None and not path.exists():
    build.check(sizes.for_any_data(config))  # before anything is written
    write_rows(path, kept)
  what = repr(data) if isinstance(data, str) else "data"
  asked = "".join(f", {key}={value!r}" for key, value in options.items())
  call = f"pin_jax.compare({what}, {os.fspath(workdir)!r}{asked})"
  (run or functools.partial(job.run, command=call))(config, workdir)
  return Job(workdir)


def _of_data(
  data: Any, recipe: str | None, workdir: epath.Path
) -> tuple[ConfigDict, pl.DataFrame | None]:
  """The configuration of data, and what to keep of those in memory."""
  argument = f"path=data,recipe={recipe}" if recipe else "path=data"
  config = files.get_config(argument)
  if isinstance(data, str | os.PathLike):
    config.data.path = os.fspath(data)
    return config, None
  if not isinstance(data, Interactions):
    data = read(data)
  name = re.sub(r"[^\w.-]+", "_", data.name)
  folder = workdir / "data" / data.fingerprint[:16]  # never another's
  config.data.path = os.path.abspath(folder / f"{name}.parquet")
  users = np.repeat(np.arange(data.num_users), data.lengths)
  columns = {
    "user": pl.Series(data.user_ids.tolist()).gather(users),
    "item": pl.Series(data.item_ids.tolist()).gather(data.items - 1),
    "time": data.times,
  }
  return config, pl.DataFrame(
    {name: x for name, x in columns.items() if x is not None}
  )


class Job:
  """A finished job, by its workdir."""

  def __init__(self, workdir: epath.PathLike) -> None:
    """A workdir of `compare` or of the command."""
    self.workdir = disk.place("workdir", workdir).resolve()

  def __repr__(self) -> str:
    return f"Job({os.fspath(self.workdir)!r})"

  @functools.cached_property
  def analysis(self) -> results.Analysis:
    """Its rows, and the claims and levels that follow from them."""
    return results.analyse(results.read(self.workdir))

  @functools.cached_property
  def _report(self) -> list[report.Section]:
    return report.sections([self.analysis], results.NUM_RESAMPLES)

  @property
  def rows(self) -> pl.DataFrame:
    """A row a user, method and seed: every number follows from them."""
    return self.analysis.results.rows

  @property
  def answer(self) -> str:
    """What to serve to whom, as validation chose it; '' where it did not."""
    found = results.answer(self.analysis, results.NUM_RESAMPLES)
    sections = report.answer(self.analysis, found, os.fspath(self.workdir))
    return "\n".join(
      block.text for section in sections for block in section.blocks
      if isinstance(block, report.Text) and not block.code
    )

  @property
  def verdict(self) -> str:
    """What the numbers prove, in a few sentences."""
    return "\n".join(
      f"{block.title}: {block.outcome}. {block.text}"
      for block in self._report[0].blocks if isinstance(block, report.Verdict)
    )

  def table(self) -> pl.DataFrame:
    """The first metric of every method, and its change against the first.

    A row a method and part of the users (overall, tail, head), with 95 %
    intervals; changes are fractions, and p is NaN below three seeds.
    """
    job = self.analysis
    metric = results.metrics_of(job.results.config)[0]
    claims = {claim.model: claim for claim in job.claims[job.main]}
    lines = []
    for level in job.levels[job.main]:
      claim = claims.get(level.model)
      for part in ("overall", "tail", "head"):
        change = claim and getattr(claim, part)
        lines.append({
          "method": level.model, "users": part, "seeds": level.seeds,
          **_interval(metric, getattr(level, part)),
          **_interval("change", change or (None,) * 3),
          "p": claim and claim.p.get(part),
        })
    return pl.DataFrame(lines, infer_schema_length=None)

  def plot(self, name: str) -> matplotlib.figure.Figure:
    """A figure of the report: 'groups' or 'forest'.

    Raises:
      InputError: for a name that the report has no figure of.
    """
    drawn = {
      block.name.rsplit("-")[-1]: block.draw
      for section in self._report for block in section.blocks
      if isinstance(block, report.Figure)
    }
    if name not in drawn:
      raise InputError(f"plot {name!r} is unknown; use one of {list(drawn)}")
    return drawn[name]()

  def recommender(
    self, method: str | None = None, seed: int | None = None
  ) -> serving.Recommender:
    """What recommends; see `serve.recommender`.

    Raises:
      InputError: for a method or seed that the job does not have.
    """
    return serve.recommender(self.workdir, method=method, seed=seed)


def _interval(name: str, numbers: Sequence[float | None]) -> dict[str, Any]:
  ends = name, f"{name}_low", f"{name}_high"
  return dict(zip(ends, numbers[:3], strict=True))
