"""Checkpoints: a tree of arrays and a JSON record, saved by orbax."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from pin_jax.types import InputError, PyTree


class Checkpoints:
  """The checkpoints of one run in one directory; the newest is kept.

  Saves are asynchronous and atomic: a directory appears under its final name
  once it is complete.
  """

  def __init__(self, directory: epath.PathLike, *, keep: int = 1) -> None:
    """Opens (and makes) the directory; keeps the newest `keep` steps."""
    self._directory = epath.Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def save(self, step: int, tree: PyTree, record: dict[str, Any]) -> None:
    """Saves arrays and record under `step`; returns before they are on disk."""
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record)
      ),
      force=True,
    )

  def restore(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """The newest checkpoint, shaped like `like`; None where there is none.

    Raises:
      InputError: if the files do not hold a tree of that shape.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          tree=ocp.args.StandardRestore(template),
          record=ocp.args.JsonRestore(),
        ),
      )
    except (ValueError, KeyError, OSError, TypeError) as error:
      reason = str(error).strip().splitlines()[:1]
      raise InputError(
        f"checkpoint {self._directory / str(step)} cannot be read "
        f"({''.join(reason)[:200]}); delete that directory to train the run "
        "again, or use another workdir"
      ) from error
    return restored["tree"], restored["record"]

  def wait(self) -> None:
    """Returns once everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases the manager's threads."""
    self._manager.close()
