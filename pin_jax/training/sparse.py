"""Row-sparse training of item tables: a step touches the rows it reads.

With sampled negatives a step reads a few thousand rows of a table of millions.
Here these rows are cut out as a small table, the loss is taken and
differentiated on it, the optimizer sees its moments for these rows alone, and
what it gives is added back in place. Nothing is ever of the table's size, so
the time of a step does not grow with the catalogue.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pin_jax.scale import sharding
from pin_jax.scale.sharding import LOCAL, Layout
from pin_jax.training.losses import LossSpec
from pin_jax.training.objectives import GroupBatch, group_negatives
from pin_jax.types import PyTree


def row_sparse(
  inner: optax.GradientTransformation, tables: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """An optimizer whose tables are updated in the rows that are touched.

  For a row v of a table, m and all other moments:

    m_v, update_v = inner(gradient_v, m_v)   if v is touched
    m_v stays, update_v = 0                  if not

  With Adam this is the lazy Adam: moments neither decay nor move a row between
  its touches, the bias correction counts all steps, decoupled weight decay acts
  on touched rows. Params that are no table are updated as by `inner`.

  Args:
    inner: acts on each element of its params by itself, up to one factor that
      they share, such as a clipped norm.
    tables: names, at the top of the params, of those with a row an item.

  Returns:
    The transformation. `init` takes the whole params. `update` takes gradients
    and params whose tables are cut down to the rows [N, ...], the whole state,
    and `rows=` [N] int32: ascending, each once, those beyond the table none.
    Its updates are cut down alike, see `add_rows`; the state is whole.

  Reference:
    LazyAdamOptimizer of TensorFlow Addons; torch.optim.SparseAdam.
  """
  inner = optax.with_extra_args_support(inner)

  def update(
    updates: PyTree, state: PyTree, params: PyTree, *, rows: jax.Array,
    **extra: Any,
  ) -> tuple[PyTree, PyTree]:
    of_table = {
      name: jax.tree.map(lambda _, mark=name in tables: mark, value)
      for name, value in updates.items()
    }
    marks = optax.tree_utils.tree_map_params(
      inner, lambda _, mark: mark, state, of_table,
      transform_non_params=lambda _: False,
    )
    cut = lambda mark, x: take_rows(x, rows) if mark else x
    few = jax.tree.map(cut, marks, state)
    updates, few = inner.update(updates, few, params, **extra)
    put = lambda mark, old, new: (
      old.at[rows].set(new, **_PLACE, mode="drop") if mark else new
    )
    return updates, jax.tree.map(put, marks, state, few)

  return optax.GradientTransformationExtraArgs(inner.init, update)


_PLACE = {"unique_indices": True, "indices_are_sorted": True}


def take_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
  """Rows [N, ...] of a table, zeros for those beyond it."""
  return table.at[rows].get(mode="fill", fill_value=0, **_PLACE)


def add_rows(
  params: PyTree, updates: PyTree, rows: jax.Array, tables: tuple[str, ...]
) -> PyTree:
  """`optax.apply_updates` where the tables' updates are of some rows only.

  Rows and tables are those of `row_sparse`. Given donated params, nothing but
  the rows is written.
  """
  others = {k: v for k, v in params.items() if k not in tables}
  of_others = {k: v for k, v in updates.items() if k not in tables}
  return optax.apply_updates(others, of_others) | {
    name: params[name].at[rows].add(updates[name], mode="drop", **_PLACE)
    for name in tables
  }


class View(NamedTuple):
  """A step's share of the tables.

  Attributes:
    rows: [N] int32 items that the step reads, as for `row_sparse`; the first
      is 0, padding.
    params: the backbone's, with tables [N, ...].
    groups: the batch and its negatives, which name rows of these instead of
      items.
  """

  rows: jax.Array
  params: PyTree
  groups: GroupBatch


def view(
  params: PyTree, groups: GroupBatch, keys: jax.Array, *, loss: LossSpec,
  tables: tuple[str, ...], layout: Layout = LOCAL,
) -> View:
  """Cuts out the rows that the groups' losses read.

  Args:
    params: whole.
    groups: [G, B] windows; the target of a position is the item that the next
      one reads, as `Draw` cuts them.
    keys: [G], of the groups' losses.
    loss: one of sampled negatives.
    tables: see `types.Backbone`.
    layout: the rows are brought to every device.

  Returns:
    The view; losses and gradients on it are those on the whole tables.
  """
  batch = sharding.lay(groups.batch, layout)
  drawn = group_negatives(loss, keys, batch)
  parts = (
    jnp.zeros(1, jnp.int32), batch.history, batch.targets[..., -1], drawn.items
  )
  items = jnp.concatenate([x.reshape(-1) for x in parts])
  size = len(params[tables[0]])
  count = min(len(items), size)
  rows, slots = jnp.unique(
    items, size=count, fill_value=size, return_inverse=True
  )
  rows = jnp.where(rows < size, rows, size + jnp.arange(count))
  borders = [1, 1 + batch.history.size, len(items) - drawn.items.size]
  _, history, last, negatives = jnp.split(slots.astype(jnp.int32), borders)
  history = history.reshape(batch.history.shape)
  last = last.reshape(*batch.history.shape[:-1], 1)
  targets = jnp.concatenate([history[..., 1:], last], -1)
  local = groups.batch._replace(
    history=history, targets=jnp.where(batch.targets > 0, targets, 0)
  )
  few = {name: take_rows(params[name], rows) for name in tables}
  return View(
    rows,
    {**params, **sharding.lay(few, layout)},
    groups._replace(
      batch=sharding.lay(local, layout, None, sharding.DATA),
      negatives=drawn._replace(items=negatives.reshape(drawn.items.shape)),
    ),
  )
