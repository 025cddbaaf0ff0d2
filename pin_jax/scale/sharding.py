"""Meshes and partition rules: what lies on which device.

A mesh has two axes. Over `data` the rows of every group's batch are split, over
`model` the rows of the item tables with their optimizer state, over both the
interactions; everything else is replicated. The program stays the one of a
single device: XLA's partitioner puts in the collectives, so that a group's
gradient is that of the whole batch before any weighting sees it. Without a mesh
nothing here changes anything.

The devices may be those of several processes, each of which runs the same
program on the same operands and holds what lies on its own devices.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pin_jax.types import Backbone, InputError, PyTree

DATA, MODEL = "data", "model"
SHARDS = "shards"  # the vmapped axis of `over_shards`


class Layout(NamedTuple):
  """A mesh and what is split over its model axis.

  Attributes:
    mesh: with axes `data` and `model`; None = one device.
    tables: names of the params that are split by rows.
    rows: rows of these, padded to a multiple of the model axis.
  """

  mesh: Mesh | None = None
  tables: tuple[str, ...] = ()
  rows: int = 0

  @property
  def data(self) -> int:
    """Devices along `data`."""
    return 1 if self.mesh is None else self.mesh.shape[DATA]

  @property
  def model(self) -> int:
    """Devices along `model`."""
    return 1 if self.mesh is None else self.mesh.shape[MODEL]


LOCAL = Layout()


def make_layout(
  backbone: Backbone,
  num_items: int,
  *,
  data: int = 1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Layout:
  """Lays a backbone out over data x model devices; over one, it is `LOCAL`.

  Args:
    backbone: its `tables` are split.
    num_items: V.
    data: devices along `data`.
    model: devices along `model`.
    devices: by default those of all processes.

  Returns:
    The layout.

  Raises:
    InputError: if there are fewer devices, or no table to split; with several
      processes also if there are more.
  """
  there = jax.devices() if devices is None else devices
  if jax.process_count() > 1 and data * model < len(there):
    raise InputError(
      f"data={data}, model={model} leave {len(there) - data * model} of the "
      f"{len(there)} devices of {jax.process_count()} processes without work; "
      f"give numbers whose product is {len(there)}"
    )
  if data * model == 1 and devices is None:
    return LOCAL
  if data * model > len(there):
    raise InputError(
      f"data={data}, model={model} need {data * model} devices and there are "
      f"{len(there)}; lower them"
    )
  if model > 1 and not backbone.tables:
    raise InputError(
      f"model={model}: the backbone has no item table that can be split; set 1"
    )
  axes = (AxisType.Auto,) * 2
  mesh = jax.make_mesh(
    (data, model), (DATA, MODEL), axes, devices=there[: data * model]
  )
  rows = -(-(num_items + 1) // model) * model
  return Layout(mesh, backbone.tables, rows)


def pad_catalogue(
  backbone: Backbone, num_items: int, layout: Layout
) -> Backbone:
  """The backbone with tables of `layout.rows` rows, so that they split evenly.

  The rows beyond item V start at zero, have a logit of -inf and a gradient of
  zero: the others are those of the backbone as it was, from `init` on. Where no
  row is missing, it is the backbone itself.
  """
  extra = layout.rows - (num_items + 1)
  if layout.model == 1 or not extra:
    return backbone

  def init(key: jax.Array) -> PyTree:
    params = backbone.init(key)
    pad = lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
    return params | {name: pad(params[name]) for name in backbone.tables}

  def score(
    params: PyTree, representations: jax.Array, candidates: jax.Array | None
  ) -> jax.Array:
    logits = backbone.score(params, representations, candidates)
    if candidates is not None or logits.shape[-1] != layout.rows:
      return logits
    return jnp.where(jnp.arange(layout.rows) <= num_items, logits, -jnp.inf)

  return backbone._replace(init=init, score=score)


def shardings(tree: PyTree, layout: Layout) -> PyTree:
  """The rules: tables by rows over `model`, all else on every device.

  A leaf (or its shape) is a table, or the state of one, if the last name in its
  path is a table's and it has as many rows.
  """

  def rule(path: tuple, leaf: Any) -> NamedSharding:
    name = getattr(path[-1], "key", None) if path else None
    split = name in layout.tables and leaf.shape[:1] == (layout.rows,)
    spec = PartitionSpec(MODEL) if split else PartitionSpec()
    return NamedSharding(layout.mesh, spec)

  return jax.tree_util.tree_map_with_path(rule, tree)


def constrain(tree: PyTree, layout: Layout) -> PyTree:
  """The tree, laid out by the rules; for use inside of jit."""
  if layout.mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, shardings(tree, layout))


def built(function: Callable[..., PyTree], layout: Layout) -> Callable:
  """`jit(function)` whose result comes into being laid out by the rules."""
  return jax.jit(lambda *args: constrain(function(*args), layout))


def lay(tree: PyTree, layout: Layout, *axes: str | None) -> PyTree:
  """The tree, split by the mesh's axes; for use inside of jit.

  Args:
    tree: arrays.
    layout: of a mesh, or LOCAL, where nothing happens.
    *axes: what the first axes of all leaves are split over, DATA, MODEL or
      None; with none of them every leaf is whole on every device.
  """
  if layout.mesh is None:
    return tree
  split = NamedSharding(layout.mesh, PartitionSpec(*axes))
  return jax.lax.with_sharding_constraint(tree, split)


def spread_flat(tree: PyTree, layout: Layout) -> PyTree:
  """Flat arrays over all devices, each with a slice; the last filled up.

  The filling repeats the last element, so that what is sorted stays so. A
  process puts nothing but its own devices' slices there; without a mesh, all
  goes on the one device. The tree has host arrays [N].
  """
  if layout.mesh is None:
    return jax.tree.map(jnp.asarray, tree)

  def spread(x: np.ndarray) -> jax.Array:
    x = np.asarray(x) if len(x) else np.zeros(1, x.dtype)
    whole = -(-len(x) // layout.mesh.size) * layout.mesh.size

    def own(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[0].indices(whole)
      missing = stop - max(min(stop, len(x)), start)
      return np.pad(x[start:stop], (0, missing), constant_values=x[-1])

    return jax.make_array_from_callback((whole,), flat_sharding(layout), own)

  return jax.tree.map(spread, tree)


def flat_sharding(layout: Layout) -> NamedSharding:
  """A slice of a flat array on each device of the mesh."""
  return NamedSharding(layout.mesh, PartitionSpec((DATA, MODEL)))


def put_replicated(tree: PyTree, layout: Layout) -> PyTree:
  """Host arrays, whole on every device; without a mesh, on the one there is.
  """
  if layout.mesh is None:
    return jax.tree.map(jnp.asarray, tree)
  everywhere = NamedSharding(layout.mesh, PartitionSpec())
  put = lambda x: jax.make_array_from_callback(
    x.shape, everywhere, x.__getitem__
  )
  return jax.tree.map(lambda x: put(np.asarray(x)), tree)


def fetch(tree: PyTree) -> PyTree:
  """Copies on the host, wherever the arrays lie.

  What lies on the devices of several processes is sent to all of them, so that
  all have to ask.
  """

  def whole(x: Any) -> Any:
    return multihost_utils.process_allgather(x, tiled=True) if apart(x) else x

  return jax.device_get(jax.tree.map(whole, tree))


def apart(x: Any) -> bool:
  """Whether an array lies in pieces on the devices of several processes."""
  here = not isinstance(x, jax.Array) or x.is_fully_addressable
  return not (here or x.is_fully_replicated)


def kept(step: Callable[..., tuple], layout: Layout) -> Callable[..., tuple]:
  """A training step that leaves its state where the rules have it.

  The state's buffers can then be donated, and the next dispatch runs the same
  program. Logs are whole on every device.
  """
  if layout.mesh is None:
    return step

  def run(state: PyTree, *args: PyTree) -> tuple[PyTree, PyTree]:
    state, log = step(state, *args)
    return constrain(state, layout), lay(log, layout)

  return run


def over_shards(loss: Callable[..., tuple], layout: Layout) -> Callable:
  """A loss of windows, as a sum over the shards of their rows.

  A loop over chunks of positions would have each chunk on one device while the
  others wait. Here every device goes through the positions of its own windows,
  as many at a time, and the params' gradients are added up after the loop. The
  result is the same function, that of `objectives.next_item_loss`, up to
  rounding.
  """
  count = layout.data
  if count == 1:
    return loss

  def cut(x: jax.Array) -> jax.Array:
    return lay(x.reshape(count, -1, *x.shape[1:]), layout, DATA)

  def run(
    params: PyTree, shared: PyTree, context: PyTree, targets: jax.Array,
    weights: jax.Array, scale: jax.Array | None = None, negatives: Any = None,
  ) -> tuple[jax.Array, jax.Array]:
    scale = jnp.ones(targets.shape) if scale is None else scale
    own = negatives is not None and negatives.items.ndim == 2
    rows = jax.tree.map(cut, (context, targets, weights, scale))
    if own:
      negatives = jax.tree.map(cut, negatives)
    value, losses = jax.vmap(
      loss, (None, None, 0, 0, 0, 0, 0 if own else None), axis_name=SHARDS
    )(params, shared, *rows, negatives)
    return value.sum(), losses.reshape(targets.shape)

  return run
