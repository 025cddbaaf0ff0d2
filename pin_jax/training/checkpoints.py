"""Checkpoints: a tree of arrays and a JSON record, saved by orbax.

Orbax saves asynchronously and atomically, and each process writes and reads
what lies on its own devices. It restores a flipped bit silently, so every
checkpoint holds digests of its arrays and of its record: what is restored is
either what was saved or refused, and a damaged checkpoint is passed over for
the newest that is intact.
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
from pin_jax.types import InputError, PyTree, TrainingError

SCHEMA = 2  # of the record; another one is not read
_KEEP = 2  # the newest
_CHUNK = 2**26  # bytes of a leaf that are gathered from processes at a time
_MEETING_SECONDS = 3600  # that a process waits for another's disk
_meetings = itertools.count()  # all processes hold them in the same order


class Checkpoints:
  """The checkpoints of one run in one directory; the two newest are kept.

  A directory appears under its final name once it is complete, and older ones
  go only after that. Several processes save and restore together, into a
  directory that all of them see; the first makes and deletes directories.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    about: Mapping[str, Any] | None = None,
    check: Callable[[dict[str, Any]], None] = lambda about: None,
    say: Callable[[str], None] = lambda line: None,
    tables: tuple[str, ...] = (),
  ) -> None:
    """Opens (and makes) the directory.

    Args:
      directory: of this run's checkpoints alone.
      about: what they belong to, such as the config, the data's fingerprint
        and the libraries' versions; JSON, saved with each of them.
      check: takes what a checkpoint was saved with as `about`; raises
        InputError where it is not to be restored.
      say: takes a line for each damaged checkpoint that is passed over.
      tables: last names of leaves that may be restored with fewer or more rows
        than were saved, the padding of another mesh; what is missing is 0.

    Raises:
      InputError: if no checkpoint can be read there.
      TrainingError: if the directory cannot be made.
    """
    check_directory(directory)
    self.directory = epath.Path(directory).absolute()
    self._about, self._tables = dict(about or {}), tables
    self._check, self._say = check, say
    self._saving = ""
    self._manager = self._guarded(lambda: ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
    ))

  def steps(self) -> list[int]:
    """The steps on disk, whole or damaged, ascending."""
    names = [path.name for path in self.directory.iterdir()]
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
    self._saving = str(step)
    leaves = _leaves(tree)
    sealed = _sealed({
      "schema": SCHEMA, "about": self._about, "leaves": leaves,
      "arrays": _digest(tree, leaves), "record": record,
    })
    self._guarded(lambda: self._manager.save(
      step, force=True, args=ocp.args.Composite(
        tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(sealed)
      ),
    ))

  def restore(
    self, like: PyTree, *, older: bool = True
  ) -> tuple[PyTree, dict[str, Any]] | None:
    """The newest intact checkpoint; None where nothing was ever saved.

    Newer ones that are damaged are named by `say` and deleted.

    Args:
      like: arrays, or their shapes and types, in the tree that was saved.
      older: whether an older one will do where the newest is damaged.

    Raises:
      InputError: if none is intact, or if the newest intact one belongs to
        something else or holds another tree.
    """
    steps = self.steps()[::-1]
    damaged: dict[int, _Damage] = {}
    for step in steps if older else steps[:1]:
      try:
        restored = self._read(step, like)
      except _Damage as damage:
        damaged[step] = damage
        continue
      for other, damage in damaged.items():
        self._say(
          f"checkpoint {self.directory / str(other)} is damaged ({damage}); it "
          f"is deleted and step {step} restored instead"
        )
        self._remove(other)
      if damaged:
        _meet()
        self._manager.reload()
      return restored
    if damaged:
      nor = " and there is no older one that can" if older else ""
      raise InputError(
        f"checkpoint {self.directory / str(steps[0])} cannot be read "
        f"({damaged[steps[0]]}){nor}; restore it from a copy, or delete "
        f"{self.directory} to train the run again"
      )
    return None

  def wait(self) -> None:
    """Returns once everything saved is on disk; removes what is too old.

    Raises:
      TrainingError: if the save failed.
    """
    self._guarded(self._manager.wait_until_finished)
    self._saving = ""
    _meet()
    for step in self.steps()[:-_KEEP]:
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
    path, leaves = self.directory / str(step), _leaves(like)
    sealed = self._part(step, record=ocp.args.JsonRestore())
    if not isinstance(sealed, dict) or _sealed(sealed) != sealed:
      raise _Damage("its record does not match its checksum")
    if sealed["schema"] != SCHEMA:
      raise InputError(
        f"checkpoint {path} has schema {sealed['schema']}, not {SCHEMA}; use "
        "the version that made it, or another directory"
      )
    try:
      self._check(sealed["about"])
    except InputError as error:
      raise InputError(
        f"checkpoint {path} belongs to something else: {error}"
      ) from None
    stored = sealed["leaves"]
    for key in sorted(stored.keys() | leaves.keys()):
      there, here = (x.get(key, "absent") for x in (stored, leaves))
      table = key.rpartition("/")[2] in self._tables
      if there != here and not (table and _row(there) == _row(here)):
        raise InputError(
          f"checkpoint {path} holds another tree: {key} is {there} there and "
          f"{here} here; delete {self.directory} to train the run again, or "
          "use another directory"
        )
    tree = self._part(step, tree=ocp.args.StandardRestore(
      jax.tree.map(ocp.utils.to_shape_dtype_struct, like),
      strict=stored == leaves,
    ))
    if _digest(tree, stored) != sealed["arrays"]:
      raise _Damage("its arrays do not match their checksum")
    return tree, sealed["record"]

  def _part(self, step: int, **args: Any) -> Any:
    """Reads the tree or the record; whatever goes wrong is damage."""
    damage = None
    # Reads that fail leave threads behind which print tracebacks.
    with contextlib.redirect_stderr(io.StringIO()):
      try:
        restored = self._manager.restore(
          step, args=ocp.args.Composite(**args)
        )
      except Exception as error:  # orbax and tensorstore raise many kinds
        damage = _Damage(_brief(error))
      if damage:
        gc.collect()
    if _anywhere(damage is not None):
      raise damage or _Damage("another process cannot read it")
    return next(iter(restored.values()))

  def _remove(self, step: int) -> None:
    if jax.process_index() == 0:
      self._guarded((self.directory / str(step)).rmtree)

  def _guarded(self, action: Callable[[], Any]) -> Any:
    """Runs what writes; a failure becomes one line with the remedy."""
    try:
      return action()
    except (OSError, ValueError, RuntimeError) as error:
      path = self.directory / self._saving
      with contextlib.suppress(OSError):  # it stands in the way of a rerun
        for left in self.directory.glob(f"{path.name}.orbax-checkpoint*"):
          left.rmtree()
      raise TrainingError(
        f"checkpoint {path} cannot be written ({_brief(error)}); free space "
        "there or make it writable, and run the same command again: it "
        "continues from the last whole checkpoint"
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
  ocp.multihost.get_barrier_sync_fn()(
    key=f"pin_jax_checkpoints_{next(_meetings)}",
    timeout_ms=1000 * _MEETING_SECONDS,
  )


def _anywhere(here: bool) -> bool:
  """Whether something is so in any process."""
  if jax.process_count() == 1:
    return here
  return bool(np.any(multihost_utils.process_allgather(np.asarray(here))))


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
  """The record with the digest of everything else in it as `seal`."""
  rest = {key: value for key, value in record.items() if key != "seal"}
  text = json.dumps(rest, sort_keys=True)
  return {**rest, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _by_name(tree: PyTree) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _leaves(tree: PyTree) -> dict[str, str]:
  """Type and shape of every leaf by its name, such as 'float32[9, 4]'."""
  return {
    name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    for name, leaf in _by_name(tree)
  }


def _row(leaf: str) -> tuple[str, list[int]] | None:
  """(type, shape) of a row of a leaf as `_leaves` writes it, or None."""
  dtype, bracket, shape = leaf.partition("[")
  return (dtype, json.loads(bracket + shape)[1:]) if bracket else None


def _digest(tree: PyTree, leaves: Mapping[str, str]) -> str:
  """SHA-256 of names, types, shapes, bytes; tables are cut or padded to shape.
  """
  of_tree = {name: leaves[name] for name, _ in _by_name(tree)}
  digest = hashlib.sha256(json.dumps(of_tree).encode())
  for name, leaf in _by_name(tree):
    left = [*json.loads("[" + of_tree[name].partition("[")[2]), None][0]
    for values in _chunks(leaf):
      if left is not None:
        values = values[:left]
        left -= len(values)
      digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    if left:
      rest = np.zeros((left, *leaf.shape[1:]), leaf.dtype)
      digest.update(rest.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _chunks(leaf: Any) -> Iterator[np.ndarray]:
  """A leaf on the host: whole, or by rows where several processes hold it."""
  if not sharding.apart(leaf):
    yield jax.device_get(leaf)
    return
  rows = max(_CHUNK * len(leaf) // leaf.nbytes, 1)
  for start in range(0, len(leaf), rows):
    count = min(rows, len(leaf) - start)
    yield sharding.fetch(jax.lax.dynamic_slice_in_dim(leaf, start, count))


def _brief(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


def _quieten() -> None:
  """What orbax raises, which is said in a line, is not printed besides."""
  logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR
    or "orbax" not in record.pathname
  )
  logging.getLogger("asyncio").addFilter(
    lambda record: "exception was never retrieved" not in record.getMessage()
  )
  hook = sys.unraisablehook
  sys.unraisablehook = lambda found: (
    str(found.exc_value) == "Event loop is closed" or hook(found)
  )


_quieten()
