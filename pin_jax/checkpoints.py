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

  def __init__(
    self, directory: epath.PathLike, *, keep: int = 1,
    tables: tuple[str, ...] = (),
  ) -> None:
    """Opens (and makes) the directory.

    Args:
      directory: where the checkpoints are.
      keep: how many of the newest steps are kept.
      tables: last names of leaves that may be restored with fewer or more rows
        than were saved, the padding of another mesh; what is missing is 0.
    """
    self._tables = tables
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
          tree=ocp.args.StandardRestore(
            template, strict=not self._only_rows_differ(step, template)
          ),
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

  def _only_rows_differ(self, step: int, template: PyTree) -> bool:
    """Whether tables have other rows than stored and all else is the same."""
    if not self._tables:
      return False
    path = self._directory / str(step) / "tree"
    try:
      stored = _shapes(ocp.StandardCheckpointer().metadata(path).item_metadata)
    except (ValueError, KeyError, OSError, TypeError, AttributeError):
      return False  # the restoration says what is wrong
    wanted = _shapes(template)
    differing = [k for k in wanted if stored.get(k) != wanted[k]]
    return bool(differing) and stored.keys() == wanted.keys() and all(
      key[-1] in self._tables and stored[key][1:] == wanted[key][1:]
      for key in differing
    )

  def wait(self) -> None:
    """Returns once everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases the manager's threads."""
    self._manager.close()


def _shapes(tree: PyTree) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Shapes of the leaves, by their paths as they are stored."""
  flat = ocp.tree.to_flat_dict(
    ocp.tree.serialize_tree(tree, keep_empty_nodes=True)
  )
  return {key: tuple(leaf.shape) for key, leaf in flat.items()}
