"""The data of a job: split, groups, segments, prior, and their fingerprint."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import schema, sizes
from experiments.configs import base
from experiments.methods import GATES, SEGMENTS, Learnt, selected, stages_of
from pin_jax.aggregation import weightings
from pin_jax.data import activeness, batches, files, simulator, splits, stored
from pin_jax.data.interactions import Interactions
from pin_jax.data.stored import Stored
from pin_jax.models import memory
from pin_jax.types import InputError, Requests


def load_data(data: ConfigDict) -> tuple[Interactions, Any]:
  """Loads the interactions, and the simulator's world where there is one.

  Raises:
    InputError: for data that are absent or bad.
  """
  options = {k: v for k, v in data.items() if v is not None}
  source = options.pop("source")
  with schema.section("data"):
    if source == "simulator":
      seed, users = options.pop("seed", 0), options.pop("num_users", 4000)
      world = simulator.make_world(simulator.WorldSpec(**options), seed=seed)
      return simulator.simulate(world, num_users=users, seed=seed + 1)[0], world
    if source == "files":
      path = options.pop("path")
      base.check_public(path)
      return files.read(path, **options), None
    if source == "stored":
      return stored.read(**{"stream": False, **options}), None
    from pin_jax.data import tfds  # slow to import, seldom used

    return tfds.read_tfds(**options), None


class Problem(NamedTuple):
  """The data of a job, ready for training; arrays are [U] unless said.

  Attributes:
    split: interactions with their training, validation and test parts.
    groups: activeness group.
    segments: 0 tail, 1 head.
    prior: [G], P(d).
    sequences: interactions, on the host.
    world: the simulator's exact model, or None.
    repeats: `memory.holds_repeats`; looked up for gates alone, else False.
  """

  split: splits.Split
  groups: np.ndarray
  segments: np.ndarray
  prior: np.ndarray
  sequences: batches.Sequences
  world: Any
  repeats: bool = False


def make_problem(config: ConfigDict) -> Problem:
  """The data of a config whose sizes are known; see `prepare`."""
  return prepare(config)[1]


def prepare(config: ConfigDict) -> tuple[ConfigDict, Problem]:
  """Loads the data, splits it and derives groups, segments and the prior.

  Args:
    config: as it is once every override is known, and checked.

  Returns:
    The config with its sizes fitted to the data, and the problem.

  Raises:
    InputError: for bad data.
  """
  interactions, world = load_data(config.data)
  if config.split.protocol == "leave_one_out":
    split = splits.leave_one_out(interactions)
  else:
    split = splits.temporal_fractions(
      interactions,
      validation=config.split.validation,
      test=config.split.test,
    )
  kept = split.interactions
  config = sizes.fitted(config, kept.lengths, split.activeness, kept.num_items)
  targets = batches.training_targets(split)
  if not targets.any():
    raise InputError(
      f"no user of {interactions.name!r} has two training interactions (the "
      f"longest history: {interactions.lengths.max()}), so that there is "
      "nothing to learn; leave-one-out holds two of them out, so give longer "
      "histories"
    )
  rule = config.groups
  users = split.activeness, split.interactions.user_ids
  with schema.section("groups"):
    groups = activeness.assign_groups(
      *users, num_groups=rule.num_groups, rule=rule.rule,
      thresholds=tuple(rule.thresholds) or None,
    )
    segments = activeness.assign_segments(*users, head_share=rule.head_share)
  with schema.section("prior"):
    prior = activeness.prior(
      config.prior.kind, groups, targets, rule.num_groups,
      tuple(config.prior.get("values")) or None,
    )
    prior = weightings.tempered(prior, config.prior.exponent)
  sequences = batches.host_sequences(split)
  gates = config.plugin.name == "gated" or any(
    stage.plugin in GATES for stage in stages_of(selected(config))
  )
  asked = gates and not isinstance(interactions, Stored)
  return config, Problem(
    split, groups, segments, prior, sequences, world,
    asked and memory.holds_repeats(split),
  )


def in_segment(problem: Problem, users: str) -> np.ndarray:
  """[U] bool, the users of a segment ('tail', 'head') or 'all'."""
  if users == "all":
    return np.ones(len(problem.segments), bool)
  return problem.segments == SEGMENTS.index(users)


def requests_for(
  problem: Problem, part: str, users: np.ndarray
) -> Requests:
  """Requests to rank the `part` ('validation' or 'test') targets of users."""
  positions = getattr(problem.split, part)
  return Requests(
    users.astype(np.int32), positions[users].astype(np.int32),
    problem.segments[users].astype(np.int32),
  )


def fingerprint(problem: Problem) -> str:
  """Digest of the data and its split, for every result."""
  digest = hashlib.sha256(problem.split.interactions.fingerprint.encode())
  for array in (problem.split.train_end, problem.groups, problem.segments):
    digest.update(np.ascontiguousarray(array, np.int64).tobytes())
  return digest.hexdigest()[:16]


def fitted_users(num_users: int) -> np.ndarray:
  """[U] bool, the half of the users whose validation targets stage 2 learns."""
  drawn = np.random.default_rng(0).permutation(num_users)
  return drawn < num_users // 2


def learnt_split(problem: Problem, learns: Learnt) -> splits.Split:
  """The split with the validation targets that are learnt from."""
  if learns == "none":
    return problem.split
  everybody = np.ones(len(problem.segments), bool)
  users = everybody if learns == "all" else fitted_users(len(everybody))
  return splits.with_validation(problem.split, users)
