"""Serving: routes a user to a plugin, gives the top K, exports the model.

A user of the training data is served by the plugin of its segment, as in the
evaluation, whatever history it comes with. Somebody new has the activeness of
the history that it brings, and belongs to the head if it is more active than
every user of the tail. Without any history the most popular items of the
training prefix are recommended.

A `Recommender` comes from trained parameters (`make`) or from one portable file
(`load`, written by `save`), and gives the same either way.
"""

import functools
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import polars as pl
from etils import epath

from pin_jax import disk
from pin_jax.data.splits import Split, training_counts
from pin_jax.models import plugins
from pin_jax.models.backbones import given
from pin_jax.models.memory import Memory, known_activeness
from pin_jax.types import InputError, PluginContext, PyTree

PREFIXES = ("all", "validation", "train")
_REMEMBERED = "remembered"  # a prefix too; older files have "train" alone
PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT, SCHEMA = "pin_jax recommender", 1  # of the portable file
_OF_ITEMS = (  # fields of a Memory
  "neighbours", "counts", "totals", "interactions", "popularity", "kernel"
)
_MOST_SCORES = 2**24  # of a chunk of users
_MOST_USERS = 256


class Routes(NamedTuple):
  """Who is served by what.

  Attributes:
    slots: parameters by slot: (backbone, one plugin's own, evidence: a Memory
      or None; in a Recommender what a Memory holds of items, as a dict).
    segments: [U] int32, by activeness; 1 = head.
    of_users: [U] int32, each user's slot.
    of_new: the slot of somebody new, by segment.
  """

  slots: tuple[plugins.Weights, ...]
  segments: np.ndarray
  of_users: np.ndarray
  of_new: tuple[int, ...]


class Users(NamedTuple):
  """The users of the training data.

  Attributes:
    ids: [U] original ids, ascending.
    items: [N] int32, their histories, one after another.
    offsets: [U+1] int64, where a user's begin.
    ends: prefix -> [U] int64, how much of a history it is: 'all' of it,
      what comes before the test target ('validation'), or what trains.
  """

  ids: np.ndarray
  items: np.ndarray
  offsets: np.ndarray
  ends: dict[str, np.ndarray]


class Recommender(NamedTuple):
  """What is needed to recommend.

  Attributes:
    scores: (*slot, inputs) -> [B, V+1], -inf for padding; see `_inputs`.
    routes: parameters, and whom they serve.
    users: of the training data.
    item_ids: [V] original ids, ascending.
    counts: [V+1] float32, training interactions of each item.
    length: L, what the backbone reads.
    recent: H, what the plugin reads; 0 = nothing.
    head_from: least activeness with which somebody new belongs to the head.
    origin: where it comes from: JSON.
    reads_activeness: whether the backbone does.
  """

  scores: Callable[..., jax.Array]
  routes: Routes
  users: Users
  item_ids: np.ndarray
  counts: np.ndarray
  length: int
  recent: int
  head_from: int
  origin: dict[str, Any]
  reads_activeness: bool = False

  def recommend(
    self,
    users: Sequence[Any] | None = None,
    histories: Sequence[Sequence[Any]] | None = None,
    **options: Any,
  ) -> pl.DataFrame:
    """`of_users` (None = all) or `of_histories`, then `recommend`."""
    requests = of_users(self, users) if histories is None else of_histories(
      self, histories, users
    )
    return recommend(self, requests, **options)


def make(
  model: plugins.Model,
  routes: Routes,
  split: Split,
  *,
  length: int,
  origin: Mapping[str, Any],
  remembered: np.ndarray | None = None,
) -> Recommender:
  """A recommender from trained parameters.

  Rows are not packed. A backbone that attends to the candidate takes one user
  after another, so that its activations are those of one.

  Args:
    model: backbone and plugin.
    routes: the parameters, and whom they serve.
    split: of the training data.
    length: L.
    origin: where the parameters come from, as JSON.
    remembered: [U], how much of each user's history the slots' evidence holds;
      None = the training prefix.

  Returns:
    The recommender.
  """
  data = split.interactions
  ends = {
    "all": data.lengths,
    "validation": np.where(split.test >= 0, split.test, data.lengths),
    "train": split.train_end,
    _REMEMBERED: split.train_end if remembered is None else remembered,
  }
  users = Users(
    data.user_ids, np.asarray(data.items, np.int32), data.offsets,
    {key: np.asarray(value, np.int64) for key, value in ends.items()},
  )
  tables = {id(s.evidence): _tables(s.evidence) for s in routes.slots}
  routes = Routes(
    tuple(s._replace(evidence=tables[id(s.evidence)]) for s in routes.slots),
    np.asarray(routes.segments, np.int32),
    np.asarray(routes.of_users, np.int32), tuple(routes.of_new),
  )
  return Recommender(
    jax.jit(_scores(model, data.num_items, length)), routes, users,
    data.item_ids, training_counts(split).astype(np.float32), length,
    model.plugin.recent if model.plugin else 0,
    head_from(split.activeness, routes.segments), dict(origin),
    model.backbone.reads_activeness,
  )


def _scores(
  model: plugins.Model, num_items: int, length: int
) -> Callable[..., jax.Array]:
  """`Recommender.scores`, a pure function of trees of arrays."""
  model = model._replace(backbone=model.backbone._replace(packed=0))

  def scores(
    backbone: PyTree, plugin: PyTree, tables: PyTree, inputs: dict[str, Any]
  ) -> jax.Array:
    frozen = plugins.adapted(model.plugin, plugin, backbone)
    rows = inputs["history"].shape[0]
    history = given(
      model.backbone, inputs["history"], inputs.get("behaviours")
    )
    states = model.backbone.at(
      model.backbone.encode(frozen, history, None), jnp.arange(rows),
      jnp.full(rows, length - 1),
    )
    memory, context = _read(tables, inputs)
    weights = plugins.Weights(frozen, plugin, memory)
    logits = plugins.logits(model, weights, states, context, None)
    logits = logits[:, : num_items + 1]
    return jnp.where(jnp.arange(num_items + 1) > 0, logits, -jnp.inf)

  def one_by_one(*slot: PyTree) -> jax.Array:
    *slot, inputs = slot
    shared = {k: inputs[k] for k in ("own",) if k in inputs}
    by_row = {k: x[:, None] for k, x in inputs.items() if k not in shared}
    if shared:
      starts = inputs["starts"]
      by_row["starts"] = jnp.stack([starts[:-1], starts[1:]], -1)
    return jax.lax.map(lambda x: scores(*slot, {**x, **shared})[0], by_row)

  return scores if model.backbone.tables else one_by_one


def _tables(memory: Memory | None) -> dict[str, PyTree] | None:
  """What a plugin's memory holds of items, without that of users."""
  if memory is None:
    return None
  relations = memory.related, memory.related_scores
  return {x: getattr(memory, x) for x in _OF_ITEMS} | {"relations": relations}


def _read(
  tables: dict[str, PyTree] | None, inputs: dict[str, Any]
) -> tuple[Memory | None, PluginContext | None]:
  """The memory and context of the B users, who are numbered 0..B-1."""
  if tables is None:
    return None, None
  related, scores = tables["relations"]
  memory = Memory(
    **{name: tables[name] for name in _OF_ITEMS}, related=related,
    related_scores=scores, activeness=inputs["activeness"],
    items=inputs["own"], starts=inputs["starts"],
    place=inputs["place"].reshape(-1),
  )
  rows, recent = inputs["recent"].shape
  place = jnp.arange(rows * recent).reshape(rows, recent)
  return memory, PluginContext(jnp.arange(rows), inputs["recent"], place)


def head_from(activeness: np.ndarray, segments: np.ndarray) -> int:
  """Least activeness of a newcomer of the head: above all of the tail's.

  The head ends where the tail begins in the order of
  `activeness.assign_segments`, in which a newcomer comes last among equals: it
  is of the tail where one of them is.
  """
  return int(activeness[segments == 0].max()) + 1


# Requests.


class Requests(NamedTuple):
  """Whom to recommend to.

  Attributes:
    names: [n] original ids, None where somebody new has none.
    users: [n] index of the user, -1 = new.
    items: flat histories.
    starts: [n] where each begins in `items`.
    ends: [n] where it ends.
  """

  names: list[Any]
  users: np.ndarray
  items: np.ndarray
  starts: np.ndarray
  ends: np.ndarray


def of_users(
  recommender: Recommender,
  ids: Sequence[Any] | None = None,
  *,
  prefix: str = "all",
) -> Requests:
  """Requests of users of the training data, by what is known of them.

  Args:
    recommender: who knows them.
    ids: original ids; None = all users.
    prefix: how much of their histories to read: 'all', 'validation' (what
      comes before the test target) or 'train'. The evaluation's test ranks are
      those of 'validation'.

  Raises:
    InputError: for an unknown user or prefix.
  """
  users = recommender.users
  if prefix not in PREFIXES:
    raise InputError(f"prefix={prefix!r} is unknown; use one of {PREFIXES}")
  if ids is None:
    index = np.arange(len(users.ids))
  else:
    index = _known(ids, users.ids, "user", "give its history")
  starts = users.offsets[:-1][index]
  return Requests(
    users.ids[index].tolist(), index, users.items, starts,
    starts + users.ends[prefix][index],
  )


def of_histories(
  recommender: Recommender,
  histories: Sequence[Sequence[Any]],
  ids: Sequence[Any] | None = None,
) -> Requests:
  """Requests of anybody who brings a history, oldest items first.

  Args:
    recommender: who knows the items.
    histories: original ids of items; may be empty.
    ids: original ids of users or None, one a history. A user of the training
      data is routed by its training interactions, all others by their
      histories, whose names may be words where the known ids are integers.

  Raises:
    InputError: for an unknown item.
  """
  names = [None] * len(histories) if ids is None else list(ids)
  if len(names) != len(histories):
    raise InputError(
      f"{len(names)} users have {len(histories)} histories; give one of each"
    )
  flat = [item for history in histories for item in history]
  items = 1 + _known(flat, recommender.item_ids, "item", "leave it out")
  ends = np.cumsum([len(history) for history in histories], dtype=np.int64)
  starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
  index, known = np.full(len(names), -1), recommender.users.ids
  text = known.dtype.kind == "O"
  named = [
    k for k, name in enumerate(names)
    if name is not None and (text or not _is_word(name))
  ]
  index[named] = _find([names[k] for k in named], known, "user")
  return Requests(names, index, items.astype(np.int32), starts, ends)


def _is_number(text: str) -> bool:
  """Whether a text is an int64's own spelling."""
  return re.fullmatch("0|-?[1-9][0-9]{0,18}", text) is not None


def _is_word(name: Any) -> bool:
  """Whether a name has a letter and is no number in any spelling."""
  try:
    float(name)
  except (TypeError, ValueError, OverflowError):
    return isinstance(name, str) and any(x.isalpha() for x in name)
  return False


def _find(values: Sequence[Any], known: np.ndarray, what: str) -> np.ndarray:
  """Where ids are among the known ones, which ascend; -1 = nowhere.

  They are read in the type of the known ones, never spelled anew.
  """
  text = known.dtype.kind == "O"
  ids = np.empty(len(values), object if text else np.int64)
  for place, value in enumerate(values):
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    spelled = isinstance(value, str) and (text or _is_number(value))
    if not (whole or spelled) or not (text or -(2**63) <= int(value) < 2**63):
      raise InputError(
        f"{what} {value!r} is no {'text' if text else 'integer'}, as the ids "
        f"of the model's {what}s are; give one"
      )
    ids[place] = str(value) if text else int(value)
  index = np.minimum(np.searchsorted(known, ids), len(known) - 1)
  return np.where(known[index] == ids, index, -1)


def _known(
  values: Sequence[Any], known: np.ndarray, what: str, remedy: str
) -> np.ndarray:
  """`_find`; raises InputError for an id that is nowhere."""
  index = _find(values, known, what)
  missing = np.flatnonzero(index < 0)
  if len(missing):
    raise InputError(
      f"{what} {values[missing[0]]!r} is unknown to the model (one of "
      f"{len(missing)} such of {len(values)}); check it or {remedy}"
    )
  return index


# Recommending.


def recommend(
  recommender: Recommender,
  requests: Requests,
  *,
  k: int = 10,
  mask_history: bool = True,
  allow: Sequence[Any] | None = None,
  deny: Sequence[Any] | None = None,
) -> pl.DataFrame:
  """The K best items of each request, exactly; ties go to the lower item.

  Args:
    recommender: what recommends.
    requests: of `of_users` or `of_histories`.
    k: K, 1..V.
    mask_history: whether items of the history are left out, all of them and
      not only those that the model reads.
    allow: original ids of the only items to recommend; None = all.
    deny: original ids of items never to recommend.

  Returns:
    A row an item, the requests in order: `request` (its number), `user`
    (original id, or null), `rank` from 1, `item` (original id), `score` (logit;
    of a popular item its training interactions), `segment` (0 tail, 1 head)
    and `source` ('model' or 'popularity'). A request has fewer than K rows
    where fewer items are left.

  Raises:
    InputError: for a K out of range, unknown items, or no item that is allowed.
  """
  num_items = len(recommender.item_ids)
  if not isinstance(k, int | np.integer) or not 1 <= k <= num_items:
    raise InputError(
      f"k={k!r} is out of range; give 1..{num_items}, the number of items"
    )
  allowed = _allowed(recommender.item_ids, allow, deny)
  segments, slots = route(recommender, requests)
  count = len(requests.users)
  items = np.zeros((count, k), np.int32)
  scores = np.full((count, k), -np.inf, np.float32)
  for index, found in _scored(recommender, requests, slots):
    found[:, ~allowed] = -np.inf
    if mask_history:
      found[_seen(requests, index)] = -np.inf
    best = jax.device_get(_top(found, min(_rounded(k), num_items)))
    scores[index], items[index] = (x[: len(index), :k] for x in best)
  return _table(recommender, requests, segments, slots, items, scores)


def route(
  recommender: Recommender, requests: Requests
) -> tuple[np.ndarray, np.ndarray]:
  """(segment [n], slot [n]) that serves each request; slot -1 = popularity."""
  users, lengths = requests.users, requests.ends - requests.starts
  head = (lengths >= recommender.head_from).astype(np.int32)
  of_new = np.asarray(recommender.routes.of_new)[head]
  known = users >= 0
  segments = np.where(known, recommender.routes.segments[users], head)
  slots = np.where(known, recommender.routes.of_users[users], of_new)
  return segments.astype(np.int32), np.where(lengths > 0, slots, -1)


def _allowed(
  item_ids: np.ndarray, allow: Sequence[Any] | None, deny: Sequence[Any] | None
) -> np.ndarray:
  """[V+1] bool, items that may be recommended."""
  allowed = np.ones(len(item_ids) + 1, bool)
  remedy = "leave it out of the list"
  if allow is not None:
    if not len(allow):
      raise InputError("allow is empty; name an item, or give no such list")
    allowed[:] = False
    allowed[1 + _known(allow, item_ids, "item", remedy)] = True
  if deny is not None:
    allowed[1 + _known(deny, item_ids, "item", remedy)] = False
  allowed[0] = False
  if not allowed.any():
    raise InputError(
      f"deny names all {len(deny)} items that may be recommended; shorten it"
    )
  return allowed


def _scored(
  recommender: Recommender, requests: Requests, slots: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (requests [n], scores [>= n, V+1]) of chunks, of one slot each."""
  size = max(_MOST_SCORES // len(recommender.counts), 1)
  size = min(1 << size.bit_length() - 1, _MOST_USERS)
  for slot in np.unique(slots):
    own = np.flatnonzero(slots == slot)
    for index in np.split(own, range(size, len(own), size)):
      rows = min(_rounded(len(index)), size)
      if slot < 0:
        yield index, np.tile(recommender.counts, (rows, 1))
        continue
      filled = np.pad(index, (0, rows - len(index)), mode="edge")
      inputs = _inputs(recommender, requests, filled)
      weights = recommender.routes.slots[slot]
      yield index, np.array(recommender.scores(*weights, inputs))


def _inputs(
  recommender: Recommender, requests: Requests, index: np.ndarray
) -> dict[str, np.ndarray]:
  """What is read of B requests; all but the first where the model asks for it.

  history: [B, L] int32, right-aligned, 0 = padding.
  behaviours: [B] int32, activeness, for a backbone that reads it.
  recent: [B, H] int32, the newest items first, 0 = none.
  activeness: [B] float32, standardised.
  own: [T] int32, the users' distinct training items, one after another.
  starts: [B+1] int32, where a user's begin.
  place: [B, H] int32, where a recent item lies in `own`; -1 = nowhere.
  """
  recent = recommender.recent
  inputs = {"history": _last(requests, index, recommender.length)}
  users = recommender.users
  known = requests.users[index]
  trained = users.ends["train"]
  remembered = users.ends.get(_REMEMBERED, trained)
  lengths = (requests.ends - requests.starts)[index]
  behaviours = np.where(known >= 0, trained[known], lengths)
  if recommender.reads_activeness:
    inputs["behaviours"] = behaviours.astype(np.int32)
  if not recent:
    return inputs
  newest = _last(requests, index, recent)[:, ::-1]
  own, place = [], np.full(newest.shape, -1, np.int32)
  starts = np.zeros(len(index) + 1, np.int32)
  for k, user in enumerate(known):
    items = ()
    if user >= 0:
      start = users.offsets[user]
      items = users.items[start : start + remembered[user]].tolist()
    at = {item: len(own) + n for n, item in enumerate(dict.fromkeys(items))}
    place[k] = [at.get(item, -1) for item in newest[k].tolist()]
    own.extend(at)
    starts[k + 1] = len(own)
  missing = _rounded(len(own)) - len(own)
  return inputs | {
    "recent": np.ascontiguousarray(newest),
    "activeness": known_activeness(behaviours, trained),
    "own": np.array(own + [0] * missing, np.int32),
    "starts": starts,
    "place": place,
  }


def _last(requests: Requests, index: np.ndarray, count: int) -> np.ndarray:
  """The last items of histories, right-aligned, 0 = none; [n, count]."""
  at = requests.ends[index, None] - np.arange(count, 0, -1)
  inside = at >= requests.starts[index, None]
  return np.where(inside, requests.items[np.maximum(at, 0)], 0).astype(np.int32)


def _seen(
  requests: Requests, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(row, item) of everything in some histories."""
  lengths = (requests.ends - requests.starts)[index]
  row = np.repeat(np.arange(len(index)), lengths)
  first = (requests.starts[index] - np.cumsum(lengths) + lengths)[row]
  return row, requests.items[first + np.arange(len(row))]


def _rounded(size: int) -> int:
  """The next power of four: what comes in any size compiles few programs.

  Every shape has a program of its own that stays in memory; so no two sizes
  that vary by themselves go into one program, but for the rows.
  """
  return 4 ** (((size - 1).bit_length() + 1) // 2) if size > 1 else 1


@functools.partial(jax.jit, static_argnames="k")
def _top(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """(scores, items) of the K best."""
  return jax.lax.top_k(scores, k)


def _table(
  recommender: Recommender, requests: Requests, segments: np.ndarray,
  slots: np.ndarray, items: np.ndarray, scores: np.ndarray,
) -> pl.DataFrame:
  request, column = np.nonzero(scores > -np.inf)
  names, kind = requests.names, pl.String
  spelled = [str(x) for x in names if x is not None]
  if recommender.users.ids.dtype.kind != "O" and all(map(_is_number, spelled)):
    kind = pl.Int64
  named = [x if x is None else kind.to_python()(x) for x in names]
  source = np.where(slots < 0, "popularity", "model")
  item_ids = recommender.item_ids[items[request, column] - 1]
  return pl.DataFrame({
    "request": request.astype(np.int64),
    "user": pl.Series(named, dtype=kind).gather(request),
    "rank": (column + 1).astype(np.int32),
    "item": pl.Series(item_ids.tolist()),
    "score": scores[request, column],
    "segment": segments[request],
    "source": pl.Series(source[request].tolist(), dtype=pl.String),
  })


# The portable file: an uncompressed zip, whose sums find damage.


def save(
  recommender: Recommender,
  path: epath.PathLike,
  platforms: Sequence[str] = PLATFORMS,
) -> None:
  """Writes all of a recommender into one file, see docs/serving.md.

  The program is that of `jax.export`, for any number of users at a time and all
  the platforms at once; nothing else of this library is needed to run it.

  Args:
    recommender: from `make`.
    path: of the file.
    platforms: of 'cpu', 'cuda', 'rocm' and 'tpu'.

  Raises:
    WriteError: if it cannot be written; the file is then as it was.
  """
  users, routes = recommender.users, recommender.routes
  slots, arrays = _flat(routes.slots)
  arrays["histories/items"] = users.items
  arrays["histories/offsets"] = users.offsets
  ends = {f"end_{key}": value for key, value in users.ends.items()}
  _write(path, {
    "format": FORMAT, "schema": SCHEMA,
    "platforms": list(platforms), "length": recommender.length,
    "recent": recommender.recent, "head_from": recommender.head_from,
    "newcomers": list(routes.of_new), "slots": slots,
    "arrays": {
      name: {"dtype": str(array.dtype), "shape": list(array.shape)}
      for name, array in arrays.items()
    },
    "origin": recommender.origin,
  }, {
    "program.jax": _export(recommender, platforms),
    **{
      name: array.astype(array.dtype.newbyteorder("<")).tobytes()
      for name, array in arrays.items()
    },
    "users.parquet": _parquet({
      "user": users.ids.tolist(), "segment": routes.segments,
      "slot": routes.of_users, **ends,
    }),
    "items.parquet": _parquet({
      "item": recommender.item_ids.tolist(),
      "interactions": recommender.counts[1:],
    }),
  })


def _write(
  path: epath.PathLike, manifest: dict[str, Any], members: dict[str, bytes]
) -> None:
  """Writes an archive, of the same bytes for the same content."""
  text = json.dumps({**manifest, "members": list(members)}, indent=1)
  with disk.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
    for name, data in {"manifest.json": text, **members}.items():
      archive.writestr(zipfile.ZipInfo(name), data)  # the same date always


def _flat(
  slots: Sequence[plugins.Weights],
) -> tuple[list[list[int]], dict[str, np.ndarray]]:
  """(numbers of each slot's trees, arrays by name); each tree once."""
  numbers, arrays, known = [], {}, {}
  for weights in slots:
    numbers.append([])
    for field, tree in zip(weights._fields, weights, strict=True):
      number = known.setdefault((field, id(tree)), len(known))
      numbers[-1].append(number)
      leaves = jax.tree_util.tree_leaves_with_path(tree)
      for k, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        arrays[f"{field}/{number}/{k}.{name}"] = jax.device_get(leaf)
  return numbers, arrays


def _inputs_like(recommender: Recommender) -> dict[str, jax.ShapeDtypeStruct]:
  """`_inputs` of B users with T training items in all, both symbolic."""
  rows, items = jax.export.symbolic_shape("b, t")
  recent = recommender.recent
  whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  inputs = {"history": whole(rows, recommender.length)}
  if recommender.reads_activeness:
    inputs["behaviours"] = whole(rows)
  if recent:
    inputs |= {
      "recent": whole(rows, recent), "place": whole(rows, recent),
      "activeness": jax.ShapeDtypeStruct((rows,), jnp.float32),
      "own": whole(items), "starts": whole(rows + 1),
    }
  return inputs


def _export(recommender: Recommender, platforms: Sequence[str]) -> bytes:
  """The program, for any number of users and of their training items."""
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    tuple(recommender.routes.slots[0]),
  )
  export = jax.export.export(recommender.scores, platforms=platforms)
  limit = "jax_traceback_in_locations_limit"
  before = jax.config.jax_traceback_in_locations_limit
  jax.config.update(limit, 0)  # the program names none of our files
  try:
    return export(*like, _inputs_like(recommender)).serialize()
  finally:
    jax.config.update(limit, before)


def _parquet(columns: dict[str, Any]) -> bytes:
  buffer = io.BytesIO()
  pl.DataFrame(columns).write_parquet(buffer)
  return buffer.getvalue()


def load(path: epath.PathLike) -> Recommender:
  """Reads a recommender from the file that `save` wrote; needs nothing else.

  Args:
    path: of the file.

  Returns:
    The recommender, whose scores are those of the saved one.

  Raises:
    InputError: if the file is absent or damaged, or made for another platform
      or by a version that cannot be read.
  """
  path = disk.place("path", path)
  if not path.is_file():
    raise InputError(f"{path} does not exist or is no file; check the path")
  remedy = f"copy it again, or export the job again with jax {jax.__version__}"
  with disk.reading(path, remedy):
    archive = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    manifest = json.loads(archive.read("manifest.json"))
    kind = manifest["format"], manifest["schema"]
    if kind != (FORMAT, SCHEMA):
      raise InputError(
        f"{path} is of format {kind[0]!r}, schema {kind[1]!r}, and not "
        f"{FORMAT!r}, {SCHEMA}; export the job again"
      )
    here = jax.export.default_export_platform()
    if here not in manifest["platforms"]:
      raise InputError(
        f"{path} is for {manifest['platforms']} and this process runs on "
        f"{here!r}; use one of these"
      )
    members = {name: archive.read(name) for name in manifest["members"]}
    return _from_members(manifest, members)


def _from_members(
  manifest: dict[str, Any], members: dict[str, bytes]
) -> Recommender:
  """Raises an exception of any kind where the members do not fit together."""
  exported = jax.export.deserialize(bytearray(members["program.jax"]))
  with disk.unheard():
    exported.mlir_module()  # which raises where the program cannot be read
  arrays = {}
  for name, of in manifest["arrays"].items():
    little = np.dtype(of["dtype"]).newbyteorder("<")
    array = np.frombuffer(members[name], little).reshape(of["shape"])
    arrays[name] = array.astype(of["dtype"], copy=False)
  offsets = arrays["histories/offsets"]
  num_items = exported.out_avals[0].shape[1] - 1
  ends = {f"end_{key}": key for key in (*PREFIXES, _REMEMBERED)}
  user_ids, users = _columns(
    members["users.parquet"], len(offsets) - 1, "user", segment=pl.Int32,
    slot=pl.Int32, **dict.fromkeys(ends, pl.Int64),
  )
  item_ids, items = _columns(
    members["items.parquet"], num_items, "item", interactions=pl.Float32
  )
  args, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
  made = Recommender(
    jax.jit(exported.call),
    Routes(
      _slots(manifest["slots"], arrays, args), users["segment"], users["slot"],
      tuple(map(int, manifest["newcomers"])),
    ),
    Users(
      user_ids, arrays["histories/items"], offsets,
      {key: users[name] for name, key in ends.items() if name in users},
    ),
    item_ids, np.append(np.float32(0), items["interactions"]),
    manifest["length"], manifest["recent"], int(manifest["head_from"]),
    manifest["origin"], "behaviours" in args[3],
  )
  _check_contents(made, exported.out_avals, args[3])
  return made


def _check_contents(
  made: Recommender, out: Sequence[Any], inputs: dict[str, Any]
) -> None:
  """Raises ValueError for the first thing in which two parts disagree."""
  users, num_items = made.users, len(made.item_ids)
  slots, segments, of_users, of_new = made.routes
  lengths = np.diff(users.offsets)
  tables = [slot.evidence for slot in slots if slot.evidence is not None]
  related = [t["relations"][0] for t in tables if t["relations"] is not None]
  within = lambda x, low, high: x.size and low <= x.min() and x.max() <= high
  said = lambda tree: {k: f"{x.dtype} {x.shape}" for k, x in tree.items()}
  for what, holds in {
    "the program takes other inputs": said(inputs) == said(_inputs_like(made)),
    "the program gives other scores": len(out) == 1
    and out[0].shape[1:] == (num_items + 1,) and out[0].dtype == np.float32,
    "offsets do not lay histories end to end": users.offsets.ndim == 1
    and users.offsets.dtype == np.int64 and users.offsets[0] == 0
    and lengths.min() >= 0 and users.offsets[-1] == len(users.items),
    "a history has an unknown item": users.items.dtype == np.int32
    and within(users.items, 1, num_items),
    "a prefix ends outside of its history": all(
      np.all((0 <= end) & (end <= lengths)) for end in users.ends.values()
    ),
    "a segment is unknown": within(segments, 0, 1),
    "a slot is unknown": within(of_users, 0, len(slots) - 1)
    and within(np.array(of_new), 0, len(slots) - 1)
    and len(of_new) == 2,
    "a neighbour is an unknown item": all(
      within(x, 0, num_items)
      for x in [*related, *(t["neighbours"] for t in tables)] if x.size
    ),
    "a number is not finite": all(
      jnp.isfinite(x).all() for x in jax.tree.leaves((slots, made.counts))
    ),
  }.items():
    if not holds:
      raise ValueError(what)


def _slots(
  slots: list[list[int]], arrays: dict[str, np.ndarray], args: Sequence[Any]
) -> tuple[plugins.Weights, ...]:
  """The trees of `_flat` again, in the shapes that the program takes."""
  @functools.cache
  def tree(field: str, number: int, like: int) -> PyTree:
    start = f"{field}/{number}/"
    names = [name for name in arrays if name.startswith(start)]
    names.sort(key=lambda x: int(x[len(start) :].split(".")[0]))
    leaves, structure = jax.tree.flatten(args[like])
    for name, aval in zip(names, leaves, strict=True):
      if arrays[name].shape != aval.shape or arrays[name].dtype != aval.dtype:
        raise ValueError(f"{name} is {arrays[name].shape}, not {aval.shape}")
    return structure.unflatten([jnp.asarray(arrays[name]) for name in names])

  fields = plugins.Weights._fields
  return tuple(
    plugins.Weights(*map(tree, fields, numbers, range(3))) for numbers in slots
  )


def _columns(
  data: bytes, rows: int, ids: str, **kinds: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """(original ids as `Interactions` has them, the other columns) of a table."""
  # Parquet may expand without bound; no more is read than is needed.
  table = disk.read_parquet(data, rows + 1)
  kinds = {
    name: kind for name, kind in kinds.items()
    if name in table.columns or name != f"end_{_REMEMBERED}"
  }
  if len(table) != rows:
    raise ValueError(f"a table has {len(table)} rows and not {rows}")
  column = table[ids]
  text = pl.String if column.dtype == pl.String else pl.Int64
  for name, kind in {ids: text, **kinds}.items():
    if table[name].dtype != kind or table[name].has_nulls():
      raise ValueError(f"column {name} is {table[name].dtype}, or has gaps")
  if not (column[1:] > column[:-1]).all():  # before any is copied
    raise ValueError(f"column {ids} does not ascend")
  found = np.empty(rows, object if text == pl.String else np.int64)
  found[:] = column.to_list()
  return found, {name: table[name].to_numpy() for name in kinds}
