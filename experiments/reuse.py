"""Names stages by what determines them, so that they are trained once.

A stage's directory is NAME-seed0-DIGEST. It holds checkpoints and stage.json:
all that its parameters follow from, of which the digest is made. Whatever job
asks for a stage of the same name takes it from there.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from experiments import build, schema, workdir
from experiments.methods import GATES, Stage, selected, stages_of
from experiments.problem import Problem
from pin_jax import disk
from pin_jax.training.checkpoints import Checkpoints
from pin_jax.types import InputError

# Sections and keys that no stage reads, or only as `_settings` puts them.
_NOT_READ = (
  "methods", "seeds", "num_seeds", "data", "split", "groups", "joint",
  "pin.draw", "pin.mean", "pin.plugin_draw", "batch_size", "backbone_steps",
  "plugin_steps", "classifier_steps", "refit", "dispatch", "mesh", "claims",
)


class Identity(NamedTuple):
  """What a stage is, of seeds that are trained at once.

  Attributes:
    name: of stage and seeds.
    about: all that its parameters follow from, as JSON.
    former: its directory's name in former versions.
  """

  name: str
  about: dict[str, Any]
  former: str

  @property
  def digest(self) -> str:
    """Of `about`; a setting at its default may also be absent there."""
    known = _flat(schema.defaults())
    settings = {
      key: value for key, value in self.about["settings"].items()
      if known.get(key, ...) != value
    }
    text = json.dumps({**self.about, "settings": settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

  @property
  def directory(self) -> str:
    """The name of its directory."""
    return f"{self.name}-{self.digest}"


def digests(problem: Problem) -> dict[str, str]:
  """What of the data stages depend on: interactions, groups and segments."""
  split = problem.split
  return {
    "interactions": _digest(
      split.train_end, split.validation, split.test,
      start=split.interactions.fingerprint,
    ),
    "groups": _digest(problem.groups), "segments": _digest(problem.segments),
  }


def _digest(*arrays: np.ndarray, start: str = "") -> str:
  digest = hashlib.sha256(start.encode())
  for array in arrays:
    digest.update(np.ascontiguousarray(array, np.int64).tobytes())
  return digest.hexdigest()[:16]


def identify(
  config: ConfigDict, data: Mapping[str, str], stage: Stage,
  seeds: Sequence[int], known: Mapping[str, Identity],
) -> Identity:
  """What determines a stage.

  Args:
    config: the whole configuration.
    data: as of `digests`.
    stage: which one.
    seeds: those that are trained at once.
    known: by name, at least the stages that it builds on.
  """
  read = {
    "interactions": True,
    "groups": stage.grouped or stage.kind == "classifier",
    "segments": stage.kind == "plugin" or stage.users != "all",
  }
  builds_on = {stage.start, stage.exact, stage.exact and "base"} - {None}
  fields = {field.name: field.default for field in dataclasses.fields(stage)}
  about = {
    "stage": {
      key: value for key, value in dataclasses.asdict(stage).items()
      if value != fields[key]
    },
    "seeds": [*seeds],
    "data": {key: value for key, value in data.items() if read[key]},
    "after": {name: known[name].digest for name in sorted(builds_on)},
    "settings": _settings(config, stage),
  }
  name = stage.name.replace("/", "-")
  of_seeds = "seed" + "s" * (len(seeds) > 1) + "-".join(map(str, seeds))
  return Identity(
    f"{name}-{of_seeds}", about,
    name if len(config.seeds) == 1 else f"{of_seeds}-{name}",
  )


def _settings(config: ConfigDict, stage: Stage) -> dict[str, Any]:
  """The settings that a stage reads, and what others come to for it."""
  left_out = [*_NOT_READ]
  if not stage.grouped:
    left_out += [
      "prior", "pin.weighting", "pin.granularity", "pin.blocks", "pin.path",
      "pin.diagnose_every",
    ]
  if not stage.exact:
    left_out += ["pin.clip_importance"]
  if stage.kind == "classifier":
    left_out += ["loss", "evaluation"]
  if stage.kind != "backbone":
    left_out += [
      "optimizer.average", "optimizer.tables", "optimizer.learning_rate"
    ]
  if stage.kind != "plugin":
    left_out += ["plugin", "memory", "optimizer.plugin_learning_rate"]
  elif stage.plugin == "memory_alone" or stage.plugin in GATES:
    left_out += ["plugin", "optimizer.plugin_learning_rate"]
  elif config.plugin.name not in build.MIXING:
    left_out += ["memory"]
  if stage.learns == "all":  # its last step is kept
    left_out += ["validation", "evaluation"]
  if not stage.focal:
    left_out += ["loss.focusing"]
  if config.loss.name == "softmax":
    left_out += [
      f"loss.{x}" for x in config.loss if x not in ("name", "focusing")
    ]
  draw, mean = build.sampling(config, stage)
  windows = config.batch_size
  if stage.kind == "backbone":
    windows = build.windows_of_step(config, grouped=stage.grouped)
  return {
    "steps": build.num_steps(config, stage), "windows": windows, "draw": draw,
    "mean": mean,
  } | {
    key: value for key, value in _flat(config.to_dict()).items()
    if not any(key == x or key.startswith(f"{x}.") for x in left_out)
  }


def _flat(config: dict[str, Any]) -> dict[str, Any]:
  """Dotted key -> value; of metrics the one that selects."""
  flat = dict(schema.flatten(schema.canonical(config)))
  metrics = flat.get("evaluation.metrics")
  return flat | ({"evaluation.metrics": metrics[:1]} if metrics else {})


def seed_groups(config: ConfigDict) -> list[tuple[int, ...]]:
  """The seeds, those together that are trained at once."""
  seeds, count = config.seeds, config.num_seeds
  return [
    tuple(seeds[k : k + count]) for k in range(0, len(seeds), count)
  ]


def identities(
  config: ConfigDict, data: Mapping[str, str]
) -> list[dict[str, Identity]]:
  """Of each of `seed_groups`: stage name -> identity, in order of training."""
  out = []
  for seeds in seed_groups(config):
    known = {}
    for stage in stages_of(selected(config)):
      known[stage.name] = identify(config, data, stage, seeds, known)
    out.append(known)
  return out


def adopt(
  directory: epath.Path, root: epath.Path, config: dict[str, Any],
  data: Mapping[str, str], changed: bool,
) -> None:
  """Renames the directories of a former version to today's names.

  Args:
    directory: the workdir.
    root: where stages are now.
    config: of the job that is there, as it was written.
    data: of that job, as of `digests`.
    changed: whether another configuration follows; the logs are put by.
  """
  whole = schema.completed(config)
  if _flat(config).keys() - _flat(whole.to_dict()).keys():
    return  # it knew what is no more
  own = directory / "checkpoints"
  for known in identities(whole, data):
    for identity in known.values():
      path, former = own / identity.directory, own / identity.former
      if former.is_dir() and not path.exists():
        _write(former, identity)
        former.rename(path)
  if changed:
    _put_logs_by(directory, root, whole, data)


def run_name(config: ConfigDict, stage: str, seed: int) -> str:
  """A stage's name in logs; led by the seed where there are several."""
  return f"seed{seed}/{stage}" if len(config.seeds) > 1 else stage


def _runs(
  root: epath.Path, config: ConfigDict, data: Mapping[str, str]
) -> Iterator[tuple[str, epath.Path]]:
  """(run's name, what leads the paths of its logs while they are put by)."""
  groups = zip(seed_groups(config), identities(config, data), strict=True)
  for seeds, known in groups:
    for name, identity in known.items():
      for seed in seeds:
        path = root / identity.directory / f"log-{seed}"
        yield run_name(config, name, seed), path


def _put_logs_by(
  directory: epath.Path, root: epath.Path, config: ConfigDict,
  data: Mapping[str, str],
) -> None:
  """Moves what a job has logged of its stages into their directories."""
  lines = _lines(directory)
  for run, path in _runs(root, config, data):
    if run in lines and path.parent.is_dir():
      disk.write({path.with_suffix(".jsonl"): "".join(lines[run])})
      _move(directory / "events" / run, path)
  disk.write({directory / "log.jsonl": ""})


def take_logs_back(
  directory: epath.Path, root: epath.Path, config: ConfigDict,
  data: Mapping[str, str],
) -> None:
  """Moves back what was put by; a kill at any moment does no harm.

  Args:
    directory: the workdir.
    root: where the stages are.
    config: of the job that is to log.
    data: its, as of `digests`.
  """
  lines, there = _lines(directory), []
  for run, path in _runs(root, config, data):
    text = path.with_suffix(".jsonl")
    if text.exists():
      records = map(json.loads, text.read_text().splitlines())
      lines[run] = [json.dumps({**x, "run": run}) + "\n" for x in records]
      _move(path, directory / "events" / run)
      there.append(text)
  if there:
    disk.write({directory / "log.jsonl": "".join(sum(lines.values(), []))})
  for text in there:
    text.unlink()


def _lines(directory: epath.Path) -> dict[str, list[str]]:
  """Run -> its lines of log.jsonl, whole ones."""
  path, lines = directory / "log.jsonl", {}
  if path.exists():
    for line in path.read_bytes().decode(errors="replace").splitlines():
      with contextlib.suppress(ValueError, KeyError, TypeError):
        lines.setdefault(json.loads(line)["run"], []).append(line + "\n")
  return lines


def _move(source: epath.Path, target: epath.Path) -> None:
  """Moves the event files of a directory into another."""
  for file in source.glob("events.out.*"):
    target.mkdir(parents=True, exist_ok=True)
    file.rename(target / file.name)


def _write(path: epath.Path, identity: Identity) -> None:
  """Writes stage.json into a stage's directory."""
  if not (path / "stage.json").exists():
    text = json.dumps(identity.about, indent=2) + "\n"
    disk.write({path / "stage.json": text})


def told(
  root: epath.Path, groups: Sequence[Mapping[str, Identity]]
) -> Iterator[str]:
  """Says which stages are there, and why the others are not.

  A stage that is there may be trained in part.
  """
  same, anew, new = [], [], []
  for identity in (x for group in groups for x in group.values()):
    if (root / identity.directory / "stage.json").exists():
      same.append(identity.name)
    elif others := [
      _differences(identity, path)
      for path in root.glob(f"{identity.name}-*/stage.json")
    ]:
      _, why = min(others)
      anew.append(f"trained anew: {identity.name} ({why})")
    else:
      new.append(identity.name)
  if same:
    yield f"trained before: {', '.join(same)}"
  yield from anew
  if new and (same or anew):
    yield f"new: {', '.join(new)}"


def _differences(identity: Identity, path: epath.Path) -> tuple[int, str]:
  """(in how much a stage is not that of a stage.json, and in what)."""
  theirs = dict(schema.flatten(workdir.read_json(path, settings={})))
  mine, known = dict(schema.flatten(identity.about)), _flat(schema.defaults())
  found, on = [], []
  for key in sorted(mine.keys() | theirs.keys()):
    section, _, name = key.partition(".")
    new, old = (x.get(key, known.get(name)) for x in (mine, theirs))
    if new == old:
      continue
    if section == "after":
      on.append(f"from another {name}")
    else:
      found.append(f"{name}: {new!r}, not {old!r}")
  return len(found + on), "; ".join(found or on)


@contextlib.contextmanager
def held(path: epath.Path, identity: Identity) -> Iterator[None]:
  """Makes a stage's directory, and lets one process after another into it.

  Raises:
    WriteError: if it cannot be written.
  """
  with contextlib.ExitStack() as stack:
    with disk.writing(path):
      path.mkdir(parents=True, exist_ok=True)
      if "://" not in os.fspath(path):  # a bucket has no locks
        stack.enter_context(disk.locked(path / "lock"))
      disk.clear(path)
    _write(path, identity)
    yield


def open_checkpoints(
  path: epath.Path, about: Mapping[str, Any], tables: tuple[str, ...] = (),
  *, versions: Mapping[str, str] | None = None, other_versions: bool = False,
  say: Callable[[str], None] = lambda line: None,
) -> Checkpoints:
  """Opens the checkpoints of a stage.

  Args:
    path: its directory.
    about: what determines it.
    tables: as of `Checkpoints`.
    versions: of what it is trained with, which must be those of its
      checkpoints; None where it is only read.
    other_versions: whether they may be others.
    say: as of `Checkpoints`.
  """
  about = {"stage": dict(about), "versions": dict(versions or {})}
  return Checkpoints(
    path, about=about, say=say, tables=tables,
    check=same_job(about, ("versions",) if other_versions else ()),
  )


def same_job(
  about: dict[str, Any], accepted: tuple[str, ...] = ()
) -> Callable[[dict[str, Any]], None]:
  """A check that a checkpoint belongs to the job that `about` describes.

  A name that only one of them knows is no difference: it is of a version that
  had no such thing. What differs in the `accepted` sections is let pass.
  """
  mine = dict(schema.flatten(json.loads(json.dumps(about))))

  def check(theirs: dict[str, Any]) -> None:
    theirs = dict(schema.flatten(theirs))
    for key in sorted(mine.keys() & theirs.keys()):
      section = key.partition(".")[0]
      if mine[key] != theirs[key] and section not in accepted:
        or_so = ", or --other_versions" if section == "versions" else ""
        raise InputError(
          f"{key} is {theirs[key]!r} there and {mine[key]!r} here; use what it "
          f"was made with{or_so}, or another workdir"
        )

  return check
