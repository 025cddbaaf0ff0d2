"""Serving: routes a user to a plugin, gives the top K, exports the model.

A user of the training data is served by the plugin of its segment, as in the
evaluation, whatever history it comes with. Somebody new has the activeness of
the history that it brings, and belongs to the head if it is more active than
every user of the tail. Without any history the most popular items of the
training prefix are recommended.

A `Recommender` comes from trained parameters (`make`) or from one portable file
(`load`, written by `save`), and gives the same either way. What it does not
know of a request is left out, with an `UnknownWarning`; the rest is served.
"""

import difflib
import functools
import io
import json
import re
import warnings
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
FORMAT, SCHEMA = "pin_jax recommender", 2  # of the portable file
_OF_USERS = ("activeness", "items", "starts", "place")  # of a Memory
_MOST_SCORES = 2**24  # of a chunk of users
_MOST_USERS = 256
_MOST_NEAR = 10_000  # ids that are compared letter by letter
_NAMED = 3  # unknown ids


class UnknownWarning(InputError, UserWarning):
  """Ids that a model does not know, and those nearest to them.

  `warnings.simplefilter("error", UnknownWarning)` makes it an error.
  """


class Routes(NamedTuple):
  """Who is served by what.

  Attributes:
    slots: parameters by slot: (backbone, one plugin's own, evidence: a Memory
      or None; in a Recommender what a Memory holds of items, as a dict).
    models: the number of each slot's model.
    segments: [U] int32, by activeness; 1 = head.
    of_users: [U] int32, each user's slot.
    of_new: the slot of somebody new, by segment.
  """

  slots: tuple[plugins.Weights, ...]
  models: tuple[int, ...]
  segments: np.ndarray
  of_users: np.ndarray
  of_new: tuple[int, ...]


class Program(NamedTuple):
  """The scores of a model.

  Attributes:
    scores: (*slot, inputs) -> [B, V+1], -inf for padding; see `_inputs`.
    recent: H, what the plugin reads; 0 = nothing.
    reads_activeness: whether the backbone does.
  """

  scores: Callable[..., jax.Array]
  recent: int = 0
  reads_activeness: bool = False


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
    programs: by number of the model.
    routes: parameters, and whom they serve.
    users: of the training data.
    item_ids: [V] original ids, ascending.
    counts: [V+1] float32, training interactions of each item.
    length: L, what the backbone reads.
    head_from: least activeness with which somebody new belongs to the head.
    origin: where it comes from: JSON.
  """

  programs: tuple[Program, ...]
  routes: Routes
  users: Users
  item_ids: np.ndarray
  counts: np.ndarray
  length: int
  head_from: int
  origin: dict[str, Any]

  def recommend(
    self,
    users: Sequence[Any] | None = None,
    *,
    histories: Sequence[Sequence[Any]] | None = None,
    prefix: str = "all",
    k: int = 10,
    mask_history: bool = True,
    allow: Sequence[Any] | None = None,
    deny: Sequence[Any] | None = None,
  ) -> pl.DataFrame:
    """The K best items of each request, exactly; ties go to the lower item.

    Args:
      users: original ids; without histories those of the training data, None =
        all of them; else None or names of those who bring a history.
      histories: of items, oldest first, one for each user; see `of_histories`.
      prefix: without histories, how much of the known ones; see `of_users`.
      k: K, 1..V.
      mask_history: whether items of the history are left out, all of them and
        not only those that the model reads.
      allow: original ids of the only items to recommend; None = all.
      deny: original ids of items never to recommend, which may be unknown.

    Returns:
      A row an item, the requests in order: `request` (its place among those
      asked for), `user` (original id, or null), `rank` from 1, `item` (original
      id), `score` (logit; of a popular item its training interactions),
      `segment` (0 tail, 1 head) and `source` ('model' or 'popularity'). A
      request has fewer than K rows where fewer items are left.

    Raises:
      InputError: for a K out of range, or where every user, every item of the
        histories or of `allow` is unknown, or no item is allowed.
    """
    num_items = len(self.item_ids)
    if not isinstance(k, int | np.integer) or not 1 <= k <= num_items:
      raise InputError(
        f"k={k!r} is out of range; give 1..{num_items}, the number of items"
      )
    if histories is None:
      requests = of_users(self, users, prefix=prefix)
    else:
      requests = of_histories(self, histories, users)
    allowed = _allowed(self.item_ids, allow, deny)
    segments, slots = route(self, requests)
    count = len(requests.users)
    items = np.zeros((count, k), np.int32)
    scores = np.full((count, k), -np.inf, np.float32)
    for index, found in _scored(self, requests, slots):
      found[:, ~allowed] = -np.inf
      if mask_history:
        seen = [requests.histories[request] for request in index]
        rows = np.repeat(np.arange(len(index)), [*map(len, seen)])
        found[rows, np.concatenate(seen)] = -np.inf
      best = jax.device_get(_top(found, min(_rounded(k), num_items)))
      scores[index], items[index] = (x[: len(index), :k] for x in best)
    return _table(self, requests, segments, slots, items, scores)


def make(
  models: Sequence[plugins.Model],
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
    models: backbones and plugins.
    routes: their parameters, and whom they serve.
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
    tuple(routes.models), np.asarray(routes.segments, np.int32),
    np.asarray(routes.of_users, np.int32), tuple(routes.of_new),
  )
  return Recommender(
    tuple(Program(
      jax.jit(_scores(model, data.num_items, length)),
      model.plugin.recent if model.plugin else 0,
      model.backbone.reads_activeness,
    ) for model in models),
    routes, users, data.item_ids, training_counts(split).astype(np.float32),
    length, head_from(split.activeness, routes.segments), dict(origin),
  )


def _scores(
  model: plugins.Model, num_items: int, length: int
) -> Callable[..., jax.Array]:
  """`Program.scores`, a pure function of trees of arrays."""
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


def _tables(memory: Memory | None) -> dict[str, jax.Array] | None:
  """What a plugin's memory holds of items, without that of users."""
  if memory is None:
    return None
  return {k: x for k, x in memory._asdict().items() if k not in _OF_USERS}


def _read(
  tables: dict[str, jax.Array] | None, inputs: dict[str, Any]
) -> tuple[Memory | None, PluginContext | None]:
  """The memory and context of the B users, who are numbered 0..B-1."""
  if tables is None:
    return None, None
  memory = Memory(
    **tables, activeness=inputs["activeness"], items=inputs["own"],
    starts=inputs["starts"], place=inputs["place"].reshape(-1),
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
    numbers: [n] the place of each among all that were asked for.
    names: [n] original ids, None where somebody new has none.
    users: [n] index of the user, -1 = new.
    histories: [n], int32 items of each, oldest first.
  """

  numbers: np.ndarray
  names: list[Any]
  users: np.ndarray
  histories: list[np.ndarray]


def of_users(
  recommender: Recommender,
  ids: Sequence[Any] | None = None,
  *,
  prefix: str = "all",
) -> Requests:
  """Requests of users of the training data, by what is known of them.

  Args:
    recommender: who knows them.
    ids: original ids; None = all users. Those unknown are left out.
    prefix: how much of their histories to read: 'all', 'validation' (what
      comes before the test target; the evaluation's test ranks) or 'train'.
  """
  users = recommender.users
  if prefix not in PREFIXES:
    raise InputError(f"prefix={prefix!r} is unknown; use one of {PREFIXES}")
  index = np.arange(len(users.ids))
  if ids is not None:
    index = _known(ids, users.ids, "users", "check them or give histories")
  numbers = np.flatnonzero(index >= 0)
  index = index[numbers]
  starts = users.offsets[:-1][index]
  ends = starts + users.ends[prefix][index]
  return Requests(numbers, users.ids[index].tolist(), index, [
    users.items[start:end] for start, end in zip(starts, ends, strict=True)
  ])


def of_histories(
  recommender: Recommender,
  histories: Sequence[Sequence[Any]],
  ids: Sequence[Any] | None = None,
) -> Requests:
  """Requests of anybody who brings a history, oldest items first.

  Args:
    recommender: who knows the items.
    histories: original ids of items; may be empty. Unknown items are left out.
    ids: of users, or None, one a history. A user of the training data is routed
      by its training interactions, all others by their histories.
  """
  names = [None] * len(histories) if ids is None else list(ids)
  if len(names) != len(histories):
    raise InputError(
      f"{len(names)} users have {len(histories)} histories; give one of each"
    )
  flat = [item for history in histories for item in history]
  items = 1 + _known(
    flat, recommender.item_ids, "items of histories",
    "give items of the training data",
  )
  parts = np.split(items.astype(np.int32), np.cumsum([*map(len, histories)]))
  return Requests(
    np.arange(len(names)), names, _find(names, recommender.users.ids),
    [part[part > 0] for part in parts[:-1]],
  )


def _is_int(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole(value: Any) -> int | None:
  """The int64 that an integer or its one spelling is, else None."""
  spelled = isinstance(value, str) and re.fullmatch("0|-?[1-9][0-9]*", value)
  if (_is_int(value) or spelled) and len(str(value)) < 21:
    number = int(value)
    return number if -(2**63) <= number < 2**63 else None
  return None


def _find(values: Sequence[Any], known: np.ndarray) -> np.ndarray:
  """Where ids are among the known ones, which ascend; -1 = nowhere.

  They are read in the type of the known ones, never spelled anew.
  """
  found = np.full(len(values), -1)
  for place, value in enumerate(values):
    if known.dtype.kind == "O":
      value = str(value) if _is_int(value) or isinstance(value, str) else None
    else:
      value = _whole(value)
    if value is not None:
      at = min(np.searchsorted(known, value), len(known) - 1)
      found[place] = at if known[at] == value else -1
  return found


def _known(
  values: Sequence[Any], known: np.ndarray, what: str, remedy: str
) -> np.ndarray:
  """`_find`; warns of unknown ids, or with a remedy refuses where all are."""
  values = values.tolist() if isinstance(values, np.ndarray) else values
  index = _find(values, known)
  missing = [values[place] for place in np.flatnonzero(index < 0)]
  if missing:
    distinct = {repr(value): value for value in missing}
    near = {x: nearest(v, known) for x, v in [*distinct.items()][:_NAMED]}
    named = [
      name + f" (near: {', '.join(map(repr, ids))})" * bool(ids)
      for name, ids in near.items()
    ] + ["…"] * (len(distinct) > _NAMED)
    text = (
      f"{len(missing):,} of {len(values):,} {what} "
      f"{'is' if len(missing) == 1 else 'are'} unknown to the model: "
      + ", ".join(named)
    )
    if not any(near.values()):
      text += f"; ids are such as {known[:1].tolist()[0]!r}"
    if remedy and len(missing) == len(values):
      raise InputError(f"{text}; {remedy}")
    warnings.warn(UnknownWarning(text), stacklevel=4)
  return index


def nearest(value: Any, known: np.ndarray) -> list[Any]:
  """The known ids, up to three, that an unknown one may be a slip of.

  Blanks around it and capitals do not count. One wrong letter, or two that are
  swapped, leave the first or the second half of an id as it was: only ids with
  the same half are compared letter by letter.

  Args:
    value: the unknown one, of any type.
    known: [n] ids, ascending.
  """
  plain = pl.Series(known.tolist()).cast(pl.String)
  plain = plain.str.strip_chars().str.to_lowercase()
  text = str(value).strip().lower()
  half = max(len(text) - 1, 0) // 2
  alike = plain.str.starts_with(text[:half]) | plain.str.ends_with(
    text[len(text) - half :]
  )
  lengths = plain.str.len_chars().cast(pl.Int64)
  places = (alike & ((lengths - len(text)).abs() < 3)).arg_true()
  of = {plain[x]: known[x : x + 1] for x in places.head(_MOST_NEAR).to_list()}
  return [of[x].tolist()[0] for x in difflib.get_close_matches(text, of)]


# Recommending.


def route(
  recommender: Recommender, requests: Requests
) -> tuple[np.ndarray, np.ndarray]:
  """(segment [n], slot [n]) that serves each request; slot -1 = popularity."""
  users, lengths = requests.users, np.array([*map(len, requests.histories)])
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
  if allow is not None:
    if not len(allow):
      raise InputError("allow is empty; name an item, or give no such list")
    allowed[:] = False
    allowed[1 + _known(allow, item_ids, "items to allow", "check them")] = True
  if deny is not None:
    allowed[1 + _known(deny, item_ids, "items to deny", "")] = False
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
      weights = recommender.routes.slots[slot]
      program = recommender.programs[recommender.routes.models[slot]]
      inputs = _inputs(recommender, program, requests, filled)
      yield index, np.array(program.scores(*weights, inputs))


def _inputs(
  recommender: Recommender, program: Program, requests: Requests,
  index: np.ndarray,
) -> dict[str, np.ndarray]:
  """What is read of B requests; all but the first where a model asks for it.

  history: [B, L] int32, right-aligned, 0 = padding.
  behaviours: [B] int32, activeness, for a backbone that reads it.
  recent: [B, H] int32, the newest items first, 0 = none.
  activeness: [B] float32, standardised.
  own: [T] int32, the users' distinct training items, one after another.
  starts: [B+1] int32, where a user's begin.
  place: [B, H] int32, where a recent item lies in `own`; -1 = nowhere.
  """
  inputs = {"history": _last(requests, index, recommender.length)}
  users = recommender.users
  known = requests.users[index]
  trained = users.ends["train"]
  remembered = users.ends.get(_REMEMBERED, trained)
  lengths = [len(requests.histories[request]) for request in index]
  behaviours = np.where(known >= 0, trained[known], lengths)
  if program.reads_activeness:
    inputs["behaviours"] = behaviours.astype(np.int32)
  if not program.recent:
    return inputs
  newest = _last(requests, index, program.recent)[:, ::-1]
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
  """The last items of histories, right-aligned, 0 = none; [n, count] int32."""
  out = np.zeros((len(index), count), np.int32)
  for row, request in enumerate(index):
    newest = requests.histories[request][-count:]
    out[row, count - len(newest) :] = newest
  return out


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
  names, kind = [*map(_whole, requests.names)], pl.Int64
  lost = names.count(None) > requests.names.count(None)
  if lost or recommender.users.ids.dtype.kind == "O":
    names = [x if x is None else str(x) for x in requests.names]
    kind = pl.String
  source = np.where(slots < 0, "popularity", "model")
  item_ids = recommender.item_ids[items[request, column] - 1]
  return pl.DataFrame({
    "request": requests.numbers[request].astype(np.int64),
    "user": pl.Series(names, dtype=kind).gather(request),
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

  The programs are those of `jax.export`, for any number of users at a time and
  all the platforms at once; nothing else of this library is needed to run them.

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
  members = {
    _member(number): _export(recommender, number, platforms)
    for number in range(len(recommender.programs))
  } | {
    name: array.tobytes() for name, array in arrays.items()
  } | {
    "users.parquet": _parquet({
      "user": users.ids.tolist(), "segment": routes.segments,
      "slot": routes.of_users, **ends,
    }),
    "items.parquet": _parquet({
      "item": recommender.item_ids.tolist(),
      "interactions": recommender.counts[1:],
    }),
  }
  text = json.dumps({
    "format": FORMAT, "schema": SCHEMA,
    "platforms": list(platforms), "length": recommender.length,
    "recent": [program.recent for program in recommender.programs],
    "head_from": recommender.head_from, "newcomers": list(routes.of_new),
    "models": list(routes.models), "slots": slots,
    "arrays": {
      name: {"dtype": str(array.dtype), "shape": list(array.shape)}
      for name, array in arrays.items()
    },
    "origin": recommender.origin, "members": list(members),
  }, indent=1)
  with disk.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
    for name, data in {"manifest.json": text, **members}.items():
      archive.writestr(zipfile.ZipInfo(name), data)  # the same date always


def _member(number: int) -> str:
  """The file of a model's program."""
  return f"program{number or ''}.jax"


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


def _export(
  recommender: Recommender, number: int, platforms: Sequence[str]
) -> bytes:
  """A model's program, for any B users with any T training items in all."""
  program, routes = recommender.programs[number], recommender.routes
  rows, items = jax.export.symbolic_shape("b, t")
  whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  inputs = {"history": whole(rows, recommender.length)}
  if program.reads_activeness:
    inputs["behaviours"] = whole(rows)
  if recent := program.recent:
    inputs |= {
      "recent": whole(rows, recent), "place": whole(rows, recent),
      "activeness": jax.ShapeDtypeStruct((rows,), jnp.float32),
      "own": whole(items), "starts": whole(rows + 1),
    }
  like = jax.eval_shape(tuple, routes.slots[routes.models.index(number)])
  export = jax.export.export(program.scores, platforms=platforms)
  limit = "jax_traceback_in_locations_limit"
  before = jax.config.jax_traceback_in_locations_limit
  jax.config.update(limit, 0)  # the program names none of our files
  try:
    return export(*like, inputs).serialize()
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
    if kind not in ((FORMAT, 1), (FORMAT, SCHEMA)):
      raise InputError(
        f"{path} is of format {kind[0]!r}, schema {kind[1]!r}, and not "
        f"{FORMAT!r}, {SCHEMA}; export the job again"
      )
    if kind[1] == 1:  # of one model
      manifest["recent"] = [manifest["recent"]]
      manifest["models"] = [0] * len(manifest["slots"])
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
  exported = [
    jax.export.deserialize(bytearray(members[_member(number)]))
    for number in range(len(manifest["recent"]))
  ]
  args = [jax.tree.unflatten(x.in_tree, x.in_avals)[0] for x in exported]
  arrays = {
    name: np.frombuffer(members[name], of["dtype"]).reshape(of["shape"])
    for name, of in manifest["arrays"].items()
  }
  users = disk.read_parquet(members["users.parquet"])
  items = disk.read_parquet(members["items.parquet"])
  return Recommender(
    tuple(
      Program(jax.jit(x.call), recent, "behaviours" in own[3])
      for x, recent, own in zip(
        exported, manifest["recent"], args, strict=True
      )
    ),
    Routes(
      _slots(manifest, arrays, args), tuple(manifest["models"]),
      users["segment"].to_numpy(), users["slot"].to_numpy(),
      tuple(manifest["newcomers"]),
    ),
    Users(
      _ids(users["user"]), arrays["histories/items"],
      arrays["histories/offsets"], {
        key: users[f"end_{key}"].to_numpy()
        for key in (*PREFIXES, _REMEMBERED) if f"end_{key}" in users.columns
      },
    ),
    _ids(items["item"]), np.append(np.float32(0), items["interactions"]),
    manifest["length"], manifest["head_from"], manifest["origin"],
  )


def _slots(
  manifest: dict[str, Any], arrays: dict[str, np.ndarray],
  args: Sequence[Sequence[PyTree]],
) -> tuple[plugins.Weights, ...]:
  """The trees of `_flat` again, of the kinds that the programs take."""
  trees, slots = {}, []
  for numbers, model in zip(
    manifest["slots"], manifest["models"], strict=True
  ):
    for field, number, like in zip(
      plugins.Weights._fields, numbers, args[model][:3], strict=True
    ):
      if number not in trees:
        start = f"{field}/{number}/"
        names = [name for name in arrays if name.startswith(start)]
        names.sort(key=lambda x: int(x.split("/")[2].split(".")[0]))
        leaves = [jnp.asarray(arrays[name]) for name in names]
        trees[number] = jax.tree.structure(like).unflatten(leaves)
    slots.append(plugins.Weights(*(trees[number] for number in numbers)))
  return tuple(slots)


def _ids(column: pl.Series) -> np.ndarray:
  """Original ids as `Interactions` has them."""
  kind = object if column.dtype == pl.String else np.int64
  return np.array(column.to_list(), kind)
