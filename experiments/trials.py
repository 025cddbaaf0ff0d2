"""Every model of a sweep at the setting that it does best with on validation.

  python -m experiments.trials runs/rules --output=docs/results/rules

reads the finished jobs of a sweep, chooses for every model one of the settings
in which they differ, and writes its rows there as experiments.summaries does,
for experiments.report. Test results play no part in the choice. Jobs that
differ only in their seeds or methods are of one setting; settings are compared
over the seeds that a model has in all of them, so that the chosen ones may get
more: `python -m experiments.sweep … --more_seeds=1,2`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from absl import flags
from etils import epath

from experiments import schema, summaries
from experiments.methods import METHODS, Method
from pin_jax import disk
from pin_jax.types import InputError

_FREE = "seeds", "methods"  # keys in which jobs of one setting may differ


class Trials(NamedTuple):
  """What a sweep's finished jobs tell of a model.

  Attributes:
    model: its title.
    method: its name.
    validation: of each setting, in their order, the mean over seeds.
    seeds: that were compared.
    chosen: index of the best setting, the first of equals.
  """

  model: str
  method: str
  validation: Sequence[float]
  seeds: Sequence[int]
  chosen: int


class Sweep(NamedTuple):
  """The finished jobs of a sweep by setting.

  Attributes:
    settings: those keys, and their values, that differ between settings.
    jobs: of each setting its jobs.
  """

  settings: Sequence[Mapping[str, Any]]
  jobs: Sequence[Sequence[summaries.Results]]


def finished(root: epath.PathLike) -> list[epath.Path]:
  """Directories of a sweep's finished jobs.

  Raises:
    InputError: if there is none.
  """
  root = disk.place("workdir", root)
  if not root.is_dir():
    raise InputError(f"{root} is no directory; name that of a sweep")
  paths = sorted(root.iterdir())
  done = [path for path in paths if (path / "done").exists()]
  if not done:
    raise InputError(f"{root} holds no finished job; run the sweep first")
  return done


def read(workdirs: Sequence[epath.PathLike]) -> Sweep:
  """Sorts finished jobs by their settings.

  Args:
    workdirs: of the jobs.

  Returns:
    The settings, in the order of their values, and their jobs.
  """
  found = [summaries.read(path) for path in workdirs]
  together: dict[str, list[summaries.Results]] = {}
  flat = {}
  for results in found:
    own = dict(schema.flatten(results.config))
    own = {key: own[key] for key in own if key not in _FREE}
    name = json.dumps(own, sort_keys=True)
    together.setdefault(name, []).append(results)
    flat[name] = own
  differing = differing_keys(flat)
  chosen = {
    name: {key: own.get(key) for key in differing}
    for name, own in flat.items()
  }
  order = sorted(flat, key=lambda name: _sortable(chosen[name]))
  return Sweep(
    [chosen[name] for name in order], [together[name] for name in order]
  )


def differing_keys(flat: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Dotted keys whose values are not the same in all jobs."""
  keys = dict.fromkeys(key for own in flat.values() for key in own)
  return [
    key for key in keys
    if len({json.dumps(own.get(key)) for own in flat.values()}) > 1
  ]


def _sortable(chosen: Mapping[str, Any]) -> list[tuple[str, float | str]]:
  return [
    ("", value) if isinstance(value, int | float) else (str(value), 0)
    for value in chosen.values()
  ]


def choose(sweep: Sweep) -> list[Trials]:
  """The best setting of every model, by validation.

  A model's validation is that of the stages that serve tail and head users,
  weighted by how many users these are.

  Args:
    sweep: as from `read`.

  Returns:
    The trials, in the order of the models in the first job.

  Raises:
    InputError: if a model is none of METHODS, or has no seed in all of its
      settings.
  """
  methods = {method.title: name for name, method in METHODS.items()}
  models = dict.fromkeys(
    model for jobs in sweep.jobs for results in jobs
    for model in results.rows["model"].unique(maintain_order=True)
  )
  trials = []
  for model in models:
    if model not in methods:
      raise InputError(
        f"model {model!r} is no method of experiments/methods.py, so that its "
        "validation is not known; leave its job out"
      )
    name = methods[model]
    of_settings = [_of_seeds(METHODS[name], jobs) for jobs in sweep.jobs]
    seeds = sorted(set.intersection(*(set(own) for own in of_settings if own)))
    if not seeds:
      raise InputError(
        f"model {model!r} has no training seed in all of its settings; run "
        "them with the same"
      )
    values = [
      float(np.mean([own[seed] for seed in seeds])) if own else float("nan")
      for own in of_settings
    ]
    trials.append(Trials(model, name, values, seeds, int(np.nanargmax(values))))
  return trials


def _of_seeds(
  method: Method, jobs: Sequence[summaries.Results]
) -> dict[int, float]:
  """Seed -> validation of a method, of the jobs that ran it."""
  out = {}
  for results in jobs:
    rows = results.rows.filter(model=method.title)
    head = (rows["segment"] == 1).mean() or 0.0
    cost = results.summary["cost"]
    several = len(results.config["seeds"]) > 1
    for seed in rows["seed"].unique().sort():
      prefix = f"seed{seed}/" if several else ""
      parts = [
        _served(cost[prefix + (plugin or backbone)]["validation"], segment)
        for segment, (backbone, plugin) in enumerate(method.serve)
      ]
      out[seed] = (1 - head) * parts[0] + head * parts[1]
  return out


def _served(validation: Sequence[float], segment: int) -> float:
  """What a stage has for a segment: one value for all users, or one each."""
  return validation[segment if len(validation) > 1 else 0]


def merged(
  name: str, sweep: Sweep, trials: Sequence[Trials]
) -> summaries.Results:
  """The results of every model at its chosen setting, as of one job.

  Args:
    name: of the result.
    sweep: as from `read`.
    trials: as from `choose`.

  Returns:
    The results, settings that differ 'as chosen'. What is of one setting alone
    is left out: the stages' cost and the group gradients; the fit of the
    stratum classifier is that of the exactly adjusted backbone's setting.

  Raises:
    InputError: if jobs of a setting have a model with the same seed twice, or
      the jobs differ in users, targets, segments or groups.
  """
  first = sweep.jobs[0][0]
  facts = ["user", "target", "segment", "group", "activeness"]
  users = first.rows.select(facts).unique().sort("user")
  frames = []
  for own in trials:
    seen: set[int] = set()
    for results in sweep.jobs[own.chosen]:
      rows = results.rows.filter(model=own.model)
      again = seen & set(rows["seed"])
      if again:
        raise InputError(
          f"{results.name} has model {own.model!r} of seed {min(again)}, as "
          "another job of its setting has; keep one of them"
        )
      seen |= set(rows["seed"])
      if rows.height and not rows.select(facts).unique().sort("user").equals(
        users
      ):
        raise InputError(
          f"jobs {first.name} and {results.name} differ in users, targets, "
          "segments or groups; choose among jobs of the same data and groups"
        )
      frames.append(rows)
  left = "cost", "command"
  kept = {k: v for k, v in first.summary.items() if k not in left}
  config = json.loads(json.dumps(first.config))
  for key in sweep.settings[0]:
    *sections, last = key.split(".")
    within = config
    for section in sections:
      within = within[section]
    within[last] = "as chosen"
  rows = pl.concat(frames)
  config["seeds"] = rows["seed"].unique().sort().to_list()
  config["methods"] = [own.method for own in trials]
  lines = [
    {
      "model": own.model, "validation": list(own.validation),
      "seeds": list(own.seeds), "chosen": own.chosen,
    }
    for own in trials
  ]
  exact = [own for own in trials if own.method == "pin_exact_backbone"]
  adjustment = [
    fit for own in exact for results in sweep.jobs[own.chosen]
    for fit in results.adjustment
  ]
  return first._replace(
    name=name, rows=rows, summary=kept, config=config,
    gradients={}, adjustment=adjustment,
    trials={"settings": [dict(s) for s in sweep.settings], "models": lines},
  )


def _main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise InputError(f"arguments are {argv[1:]}; name one sweep's directory")
  sweep = read(finished(argv[1]))
  trials = choose(sweep)
  output = disk.place("output", flags.FLAGS.output)
  for own in trials:
    values = ", ".join(f"{x:.4f}" for x in own.validation)
    print(f"{own.model}: {sweep.settings[own.chosen]} of {values}")
  summaries.write(merged(output.name, sweep, trials), output)
  print(output)


if __name__ == "__main__":
  summaries.launch(_main)
