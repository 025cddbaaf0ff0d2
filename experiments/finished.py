"""Reads what a finished job trained, to serve it."""

import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from experiments import settings, workdir
from experiments.build import networks_of
from experiments.configs.base import default
from experiments.job import of_results
from experiments.methods import Method, exact_form, selected
from experiments.problem import Problem, fingerprint, make_problem
from experiments.stages import Trainer, routed, same_job
from pin_jax import disk, serving
from pin_jax.evaluation import ranking
from pin_jax.training import checkpoints
from pin_jax.types import InputError


def recommender(
  directory: epath.PathLike, *, method: str = "pin", seed: int = 0
) -> serving.Recommender:
  """The recommender of a method and seed, with its selected parameters.

  The data are read again from where the job had them.

  Args:
    directory: the workdir of a finished job; nothing is written there.
    method: one of the job's.
    seed: one of the job's.

  Returns:
    The recommender.

  Raises:
    InputError: if the job is not finished or has no such method or seed, or
      if its data or checkpoints are not what they were.
  """
  directory = disk.place("workdir", directory)
  checkpoints.check_directory(directory)
  config, data = _config(directory)
  name = _chosen(directory, config, method, seed)
  problem = make_problem(config)
  if fingerprint(problem) != data:
    raise InputError(
      f"workdir {directory} is of data {data} and the config's data are now "
      f"{fingerprint(problem)}; put back what it was trained on"
    )
  trainer = _trainer(directory, config, problem, seed)
  chosen = selected(config)[name]
  for stage in chosen.stages:
    trainer.read(stage)
  return _made(chosen, seed, problem, trainer, {
    "method": name, "seed": seed, "data": data,
    "config": of_results(config),
  })


def _config(directory: epath.Path) -> tuple[ConfigDict, str]:
  """(config, for one device; fingerprint of the data) of a finished job."""
  needed = directory / "summary.json", directory / "config.json"
  if not all(path.exists() for path in needed):
    raise InputError(
      f"workdir {directory} holds no finished job; run it to its end with "
      "experiments.main, or check the path"
    )
  path = directory / "config.json"
  stored = workdir.read_json(path, config={}, data="")
  with disk.reading(path, "restore it from a copy, or run the job again"):
    defaults = default().to_dict()
    defaults["data"] = stored["config"]["data"]
    config = ConfigDict(_filled(defaults, stored["config"]))  # on one device
    settings.check(config)
  return config, stored["data"]


def _filled(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
  """The given values of what is known; what is not given has its default."""
  nested = lambda x: isinstance(x, dict)
  both = {
    key: _filled(defaults[key], given[key])
    for key in defaults.keys() & given.keys()
    if nested(defaults[key]) and nested(given[key])
  }
  return {key: both.get(key, given.get(key, defaults[key])) for key in defaults}


def _chosen(
  directory: epath.Path, config: ConfigDict, method: str, seed: int
) -> str:
  """The method's name among those of the job."""
  there, name = selected(config), exact_form(method, config)
  if name not in there:
    raise InputError(
      f"method {method!r} is not in workdir {directory}; use one of "
      f"{list(there)}"
    )
  if seed not in config.seeds:
    raise InputError(
      f"seed {seed} is not in workdir {directory}; use one of "
      f"{list(config.seeds)}"
    )
  return name


def _trainer(
  directory: epath.Path, config: ConfigDict, problem: Problem, seed: int
) -> Trainer:
  """A trainer of the seeds that were trained with this one."""
  first = config.seeds.index(seed) // config.num_seeds * config.num_seeds
  store = functools.partial(
    checkpoints.Checkpoints,
    check=same_job(
      {"config": of_results(config), "data": fingerprint(problem)}
    ),
  )
  networks = networks_of(config, problem)
  return Trainer(
    config, problem, networks, directory,
    tuple(config.seeds[first : first + config.num_seeds]), store,
  )


def _made(
  method: Method, seed: int, problem: Problem, trainer: Trainer,
  origin: dict[str, Any],
) -> serving.Recommender:
  """Lays a method's parameters out by slots."""
  slots, newcomers = [], []
  served_by = np.zeros(len(problem.segments), np.int32)
  first = {}
  for segment, entry in enumerate(method.serve):
    stage = entry[1] and method.stage(entry[1])
    if stage is None:
      plugin_of, count = np.zeros_like(served_by), 1
    else:
      plugin_of, count = routed(problem, method, stage)
    if entry not in first:
      first[entry] = len(slots)
      slots += _one_by_one(trainer.weights(seed, entry[0], stage), count)
    mine = problem.segments == segment
    served_by[mine] = first[entry] + plugin_of[mine]
    own = min(segment, count - 1)
    own = count - 1 - own if method.swapped else own
    newcomers.append(first[entry] + own)
  return serving.make(
    trainer.model(stage and stage.plugin), slots, problem.split,
    segments=problem.segments, served_by=served_by, newcomers=newcomers,
    length=trainer.length, origin=origin,
    remembered=trainer.remembered.train_end,
  )


def _one_by_one(
  weights: ranking.Weights, count: int
) -> list[ranking.Weights]:
  """The weights of each of `count` plugins that are stacked."""
  own = lambda k: jax.tree.map(lambda x: x[k], weights.plugins)
  return [weights._replace(plugins=own(k)) for k in range(count)]
