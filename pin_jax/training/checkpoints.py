"""Checkpoints: a tree of arrays and a JSON record, saved by orbax.

Every checkpoint says what it belongs to and holds digests of its arrays and of
its record, so that what is restored is either what was saved or refused: a
damaged one is passed over for the newest that is intact.

With several processes all save and restore together, into a directory that all
of them see: each writes and reads what lies on its devices, the first one alone
makes and deletes directories.
"""

import contextlib
import gc
import hashlib
import io
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from pin_jax.scale import sharding
from pin_jax.types import InputError, PyTree, TrainingError, at_least

SCHEMA = 2  # of the record; another one is not read
_BLOCK = 2**26  # bytes of a leaf that are gathered from processes at a time
_MEETING_SECONDS = 3600  # that a process waits for another's disk
_PARTS = {
  "schema": int, "about": dict, "leaves": dict, "arrays": str, "record": dict,
  "seal": str,
}
_meetings = itertools.count()  # all processes hold them in the same order


def _quieten() -> None:
  """What orbax raises, which is told in a line, is not printed besides.

  It logs the tracebacks, forgets futures that failed, and what tensorstore
  still has at work calls back into an event loop that has ended.
  """
  logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR
    or "orbax" not in record.pathname
  )
  logging.getLogger("asyncio").addFilter(
    lambda record: "exception was never retrieved" not in record.getMessage()
  )
  hook = sys.unraisablehook

  def told(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      hook(unraisable)

  sys.unraisablehook = told


_quieten()


class Checkpoints:
  """The checkpoints of one run in one directory; the newest are kept.

  Saves are asynchronous and atomic: a directory appears under its final name
  once it is complete, and older ones go only after that.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep: int = 2,
    about: Mapping[str, Any] | None = None,
    accepted: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
    tables: tuple[str, ...] = (),
  ) -> None:
    """Opens (and makes) the directory.

    Args:
      directory: of this run's checkpoints alone.
      keep: how many of the newest to keep.
      about: what they belong to, such as the config, the data's fingerprint
        and the libraries' versions; nested, as JSON.
      accepted: sections of `about` in which a difference is let pass.
      say: takes a line for each damaged checkpoint that is passed over.
      tables: last names of leaves that may be restored with fewer or more rows
        than were saved, the padding of another mesh; what is missing is 0.

    Raises:
      InputError: if `keep` is below 1, or no checkpoint can be read there.
      TrainingError: if the directory cannot be made.
    """
    at_least(1, keep=keep)
    check_directory(directory)
    self._directory = epath.Path(directory).absolute()
    self._keep, self._accepted, self._say = keep, accepted, say
    self._tables = tables
    self._about = json.loads(json.dumps(about or {}))
    self._saving: int | None = None
    self._manager = self._guarded(lambda: ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None, create=True, cleanup_tmp_directories=True
      ),
    ))

  @property
  def directory(self) -> epath.Path:
    """Where they are."""
    return self._directory

  def steps(self) -> list[int]:
    """The steps on disk, whole or damaged, ascending."""
    names = [path.name for path in self._directory.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())

  def save(self, step: int, tree: PyTree, record: dict[str, Any]) -> None:
    """Saves arrays and record under `step`; returns before they are on disk.

    Raises:
      TrainingError: if this or the last save fails, with a full disk or a
        read-only directory; what was there before stays.
    """
    self.wait()
    if step in self.steps():
      return
    self._saving = step
    sealed = _seal({
      "schema": SCHEMA,
      "about": self._about,
      "leaves": _leaves(tree),
      "arrays": _digest(tree),
      "record": record,
    })
    self._guarded(lambda: self._manager.save(
      step,
      args=ocp.args.Composite(
        tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(sealed)
      ),
      force=True,
    ))

  def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """The newest intact checkpoint; None where nothing was ever saved.

    Newer ones that are damaged are named by `say` and deleted.

    Args:
      like: arrays, or their shapes and types, in the tree that was saved.

    Raises:
      InputError: if none is intact, or if the newest intact one belongs to
        something else or holds another tree.
    """
    damaged = {}
    for step in reversed(self.steps()):
      try:
        restored = self._read(step, like)
      except _Damage as damage:
        damaged[step] = damage
        continue
      self._drop(damaged, step)
      return restored
    if damaged:
      newest = max(damaged)
      raise InputError(
        f"checkpoint {self._directory / str(newest)} cannot be read "
        f"({damaged[newest]}) and there is no older one that can; delete "
        f"{self._directory} to train the run again, or use another workdir"
      )
    return None

  def newest(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The newest checkpoint, which must be intact; deletes nothing.

    Args:
      like: as of `restore`.

    Raises:
      InputError: if it is absent or damaged, belongs to something else or
        holds another tree.
    """
    steps = self.steps()
    if not steps:
      raise InputError(
        f"{self._directory} holds no checkpoint; run the job again in another "
        "workdir"
      )
    try:
      return self._read(steps[-1], like)
    except _Damage as damage:
      raise InputError(
        f"checkpoint {self._directory / str(steps[-1])} cannot be read "
        f"({damage}); restore it from a copy, or run the job again in another "
        "workdir"
      ) from damage

  def wait(self) -> None:
    """Returns once everything saved is on disk; removes what is too old.

    Raises:
      TrainingError: if the save failed.
    """
    self._guarded(self._manager.wait_until_finished)
    self._saving = None
    _meet()
    for step in self.steps()[: -self._keep]:
      self._remove(step)
    _meet()

  def close(self) -> None:
    """Waits, then releases the manager's threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """One checkpoint; raises _Damage, or InputError for another job's."""
    sealed = self._part(step, record=ocp.args.JsonRestore())
    if not isinstance(sealed, dict) or "seal" not in sealed:
      raise _Damage("its record has no checksum; an older version wrote it")
    if _seal(sealed) != sealed:
      raise _Damage("its record does not match its checksum")
    for part, kind in _PARTS.items():
      if not isinstance(sealed.get(part), kind):
        raise _Damage(f"its record has no {part}")
    self._check(step, sealed, like)
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    stored = sealed["leaves"]
    tree = self._part(step, tree=ocp.args.StandardRestore(
      template, strict=stored == _leaves(like)
    ))
    if _digest(tree, stored) != sealed["arrays"]:
      raise _Damage("its arrays do not match their checksum")
    return tree, sealed["record"]

  def _part(self, step: int, **args: Any) -> Any:
    """Reads the tree or the record; whatever goes wrong is damage."""
    args = ocp.args.Composite(**args)
    damage = None
    # Reads that fail leave threads behind which print tracebacks.
    with contextlib.redirect_stderr(io.StringIO()):
      try:
        restored = self._manager.restore(step, args=args)
      except Exception as error:  # orbax and tensorstore raise many kinds
        damage = _Damage(_brief(error))
      if damage:
        gc.collect()
    if _anywhere(damage is not None):
      raise damage or _Damage("another process cannot read it")
    return next(iter(restored.values()))

  def _check(self, step: int, sealed: dict[str, Any], like: PyTree) -> None:
    """Raises InputError for the first thing in which a checkpoint differs."""
    path = self._directory / str(step)
    theirs, mine = sealed["about"], self._about
    found = [("schema", sealed["schema"], SCHEMA)] * (
      sealed["schema"] != SCHEMA
    )
    for key in mine.keys() & theirs.keys() - set(self._accepted):
      found += _differences(key, theirs[key], mine[key])
    for key, there, here in sorted(found, key=lambda x: x[0]):
      raise InputError(
        f"checkpoint {path} belongs to something else: {key} is {there!r} "
        f"there and {here!r} here; use what it was made with"
        + (", or --other_versions" if key.startswith("versions") else "")
        + ", or another workdir"
      )
    leaves = _leaves(like)
    for key in sorted(sealed["leaves"].keys() | leaves.keys()):
      there, here = (x.get(key, "absent") for x in (sealed["leaves"], leaves))
      if there != here and not self._only_rows_differ(key, there, here):
        raise InputError(
          f"checkpoint {path} holds another tree: {key} is {there} there and "
          f"{here} here; delete {self._directory} to train the run again, or "
          "use another workdir"
        )

  def _only_rows_differ(self, key: str, there: str, here: str) -> bool:
    """Whether a leaf is a table of other rows, there and here."""
    if key.rpartition("/")[2] not in self._tables or "absent" in (there, here):
      return False
    return _type_and_shape(there)[::2] == _type_and_shape(here)[::2]

  def _drop(self, damaged: dict[int, Exception], instead: int) -> None:
    for step, damage in damaged.items():
      path = self._directory / str(step)
      self._say(
        f"checkpoint {path} is damaged ({damage}); it is deleted and step "
        f"{instead} restored instead"
      )
      self._remove(step)
    if damaged:
      _meet()
      self._manager.reload()

  def _remove(self, step: int) -> None:
    if jax.process_index() == 0:
      self._guarded((self._directory / str(step)).rmtree)

  def _guarded(self, action: Callable[[], Any]) -> Any:
    """Runs what writes; a failure becomes one line with the remedy."""
    try:
      return action()
    except (OSError, ValueError, RuntimeError) as error:
      saving = "" if self._saving is None else f"/{self._saving}"
      with contextlib.suppress(OSError):  # it stands in the way of a rerun
        for path in self._directory.iterdir():
          if saving and path.name.startswith(f"{saving[1:]}.orbax-checkpoint"):
            path.rmtree()
      raise TrainingError(
        f"checkpoint {self._directory}{saving} cannot be written "
        f"({_brief(error)}); free space there or make it writable, and run "
        "the same command again: it continues from the last whole checkpoint"
      ) from error


def check_directory(directory: epath.PathLike) -> None:
  """Raises InputError for a path that orbax would read as a pattern."""
  found = sorted(set(os.fspath(directory)) & set("*?["))
  if found:
    raise InputError(
      f"{os.fspath(directory)!r} has {' '.join(found)} in it, and checkpoints "
      "there could not be read again; use a directory without * ? ["
    )


class _Damage(Exception):
  """What is wrong with a checkpoint, in a line."""


def _meet() -> None:
  """Returns once all processes are here."""
  meet = ocp.multihost.get_barrier_sync_fn()
  key = f"pin_jax_checkpoints_{next(_meetings)}"
  meet(key=key, timeout_ms=1000 * _MEETING_SECONDS)


def _anywhere(here: bool) -> bool:
  """Whether something is so in any process."""
  if jax.process_count() == 1:
    return here
  return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))


def _seal(record: dict[str, Any]) -> dict[str, Any]:
  """The record with the digest of everything else in it as `seal`."""
  rest = {key: value for key, value in record.items() if key != "seal"}
  text = json.dumps(rest, sort_keys=True)
  return {**rest, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _by_name(tree: PyTree) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _leaves(tree: PyTree) -> dict[str, str]:
  """Type and shape of every leaf by its name."""
  return {
    name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    for name, leaf in _by_name(tree)
  }


def _type_and_shape(leaf: str) -> tuple[str, int | None, list[int]]:
  """(type, rows, the other axes) of a leaf as `_leaves` writes it."""
  dtype, _, shape = leaf.partition("[")
  rows, *others = json.loads("[" + shape) or [None]
  return dtype, rows, others


def _digest(tree: PyTree, stored: Mapping[str, str] | None = None) -> str:
  """SHA-256 of the names, types, shapes and bytes of all leaves.

  With `stored`, the digest that the tree has with the rows of these leaves: it
  is cut to them, or filled up with zeros.
  """
  leaves = _leaves(tree)
  if stored is not None:
    leaves = {name: stored[name] for name in leaves}
  digest = hashlib.sha256(json.dumps(leaves).encode())
  for name, leaf in _by_name(tree):
    left = _type_and_shape(leaves[name])[1]
    for values in _blocks(leaf):
      if left is not None:
        values = values[:left]
        left -= len(values)
      digest.update(_bytes(values))
    if left:
      digest.update(_bytes(np.zeros((left, *leaf.shape[1:]), leaf.dtype)))
  return digest.hexdigest()


def _blocks(leaf: Any) -> Iterator[np.ndarray]:
  """A leaf on the host: whole, or by rows where several processes hold it."""
  if not sharding.apart(leaf):
    yield jax.device_get(leaf)
    return
  rows = max(_BLOCK * len(leaf) // leaf.nbytes, 1)
  for start in range(0, len(leaf), rows):
    count = min(rows, len(leaf) - start)
    yield sharding.fetch(jax.lax.dynamic_slice_in_dim(leaf, start, count))


def _bytes(values: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _differences(key: str, theirs: Any, mine: Any) -> list[tuple]:
  """(name, theirs, mine) wherever two nested values differ.

  A name that only one of them knows is no difference: it is of a version that
  had no such thing.
  """
  if isinstance(theirs, dict) and isinstance(mine, dict):
    return [
      found
      for name in sorted(theirs.keys() & mine.keys())
      for found in _differences(f"{key}.{name}", theirs[name], mine[name])
    ]
  return [(key, theirs, mine)] if theirs != mine else []


def _brief(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]
