"""Serving: routing, exact top K, agreement with the evaluation, the file."""

import io
import json
import operator
import os
import pathlib
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import rich.console

from experiments import serve
from pin_jax import serving
from pin_jax.data import activeness, batches, splits
from pin_jax.data.interactions import from_columns
from pin_jax.evaluation import ranking
from pin_jax.models import memory, plugins
from pin_jax.models.din import din
from pin_jax.models.gru4rec import gru4rec
from pin_jax.models.hstu import hstu
from pin_jax.models.sasrec import sasrec
from pin_jax.types import InputError, Requests
from tests.toys import noisy

pytestmark = pytest.mark.usefixtures("compile_quickly")

V, L, D, H = 23, 6, 4, 3
CASES = ("sasrec bottleneck", "gru4rec memory", "hstu lora", "din gated")


def make_split():
  """37 users of 3 to 17 interactions with repeated items; ids are no indices.
  """
  rng = np.random.default_rng(3)
  lengths = rng.integers(3, 18, 37)
  users = np.repeat(100 + 3 * np.arange(37), lengths)
  drawn = np.minimum(rng.geometric(0.1, lengths.sum()), V)
  drawn[:V] = np.arange(1, V + 1)
  times = np.concatenate([np.arange(n) for n in lengths])
  items = [f"item{x:02}" for x in drawn]
  return splits.leave_one_out(from_columns(users, items, times))


def make_model(case):
  """(model, its weights with the segments' plugins stacked)."""
  name, plugin = case.split()
  options = memory_options(plugin)
  backbone = {
    "sasrec": lambda: sasrec(V, length=L, width=D, blocks=1, heads=1),
    "gru4rec": lambda: gru4rec(V, length=L, width=D),
    "hstu": lambda: hstu(V, length=L, width=D, blocks=1, heads=1),
    "din": lambda: din(V, length=L, width=D, attention_hidden=3, hidden=4),
  }[name]()
  params = noisy(backbone.init)
  made = {
    "bottleneck": lambda: plugins.bottleneck(D, hidden=D),
    "memory": lambda: plugins.memory_mix(options),
    "lora": lambda: plugins.low_rank(params, rank=2),
    "gated": lambda: plugins.gated(D, options, hidden=3, own_repeats=True),
  }[plugin]()
  stacked = noisy(lambda key: plugins.init_stacked(made, key, 2), seed=1)
  evidence = memory.build(SPLIT, options) if made.mix else None
  model = plugins.Model(backbone, made)
  return model, plugins.Weights(params, stacked, evidence)


def memory_options(plugin):
  return memory.Options(
    channels=("around", "next"), neighbours=5, recent=H,
    relations=("linear", "cosine") if plugin == "gated" else (),
  )


SPLIT = make_split()
SEGMENTS = activeness.assign_segments(SPLIT.activeness)


@pytest.fixture(scope="module")
def made():
  """Case -> (model, weights, recommender)."""
  out = {}
  for case in CASES:
    model, weights = make_model(case)
    own = (
      jax.tree.map(operator.itemgetter(k), weights.plugins) for k in range(2)
    )
    slots = [weights._replace(plugins=x) for x in own]
    out[case] = model, weights, serving.make(
      [model], serving.Routes(slots, (0, 0), SEGMENTS, SEGMENTS, (0, 1)),
      SPLIT, length=L, origin={"method": case, "seed": 0},
    )
  return out


def ranks_of(table, targets):
  """Rank of each user's target, ties at their average; nan where absent."""
  out = np.full(len(targets), np.nan)
  for k, part in table.partition_by("request", as_dict=True).items():
    scores = dict(zip(part["item"], part["score"], strict=True))
    if targets[k[0]] in scores:
      own = scores.pop(targets[k[0]])
      rest = np.array(list(scores.values()))
      out[k[0]] = 1 + (rest > own).sum() + 0.5 * (rest == own).sum()
  return out


@pytest.mark.parametrize("case", CASES)
def test_positions_in_the_list_are_the_ranks_of_the_evaluation(made, case):
  model, weights, recommender = made[case]
  data = SPLIT.interactions
  users = np.arange(data.num_users)
  ranks = ranking.make_ranker(model, num_items=V, length=L)(
    weights, batches.make_sequences(SPLIT),
    Requests(users, SPLIT.test, SEGMENTS),
  )
  targets = data.item_ids[data.items[data.offsets[:-1] + SPLIT.test] - 1]
  table = recommender.recommend(prefix="validation", k=V)
  got = ranks_of(table, targets)
  new = ~np.isnan(got)  # the list leaves out a target that is a repeat
  repeats = [
    data.items[s + t] in data.items[s : s + t]
    for s, t in zip(data.offsets[:-1], SPLIT.test, strict=True)
  ]
  np.testing.assert_array_equal(new, ~np.array(repeats))
  assert 10 < new.sum() < len(new)
  np.testing.assert_array_equal(got[new], ranks.rank[new])
  whole = recommender.recommend(prefix="validation", k=V, mask_history=False)
  np.testing.assert_array_equal(ranks_of(whole, targets), ranks.rank_unmasked)


class Fixed:
  """A recommender whose scores are given, and what they are."""

  def __init__(self, made):
    rng = np.random.default_rng(0)
    self.scores = rng.integers(0, 6, V + 1).astype(np.float32)  # many ties
    self.scores[0] = -np.inf
    score = lambda b, p, t, inputs: jnp.tile(
      self.scores, (len(inputs["history"]), 1)
    )
    self.recommender = made["sasrec bottleneck"][2]._replace(
      programs=(serving.Program(score),)
    )

  def expected(self, k, left_out, allow=range(1, V + 1)):
    """[(item, score)] by sorting."""
    items = [v for v in allow if v not in left_out]
    best = sorted(items, key=lambda v: (-self.scores[v], v))[:k]
    return [(f"item{v:02}", self.scores[v]) for v in best]

  def lists(self, count, **options):
    table = self.recommender.recommend(**options)
    assert (
      table["rank"] == table.select(
        pl.int_range(1, pl.len() + 1).over("request")
      ).to_series()
    ).all()
    parts = table.partition_by("request", as_dict=True)
    return [
      list(parts[k,].select("item", "score").iter_rows()) if (k,) in parts
      else [] for k in range(count)
    ]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("k", [4, V])
def test_the_top_is_what_sorting_gives(made, k, mask):
  fixed = Fixed(made)
  ids = [100, 103, 208, 103]
  data = SPLIT.interactions
  lists = fixed.lists(
    4, users=ids, prefix="train", k=k, mask_history=mask, deny=["item05"],
    allow=[f"item{v:02}" for v in range(3, V)],
  )
  for user, got in zip(ids, lists, strict=True):
    u = (user - 100) // 3
    start = data.offsets[u]
    history = data.items[start : start + SPLIT.train_end[u]].tolist()
    left_out = {5, *(history if mask else ())}
    assert got == fixed.expected(k, left_out, range(3, V))


@pytest.mark.parametrize("case", ["sasrec bottleneck", "din gated"])
def test_programs_do_not_grow_with_what_varies_from_call_to_call(made, case):
  """Lists of any length, of any number of users, of histories of any length."""
  program = made[case][2].programs[0]
  scores = jax.jit(program.scores.__wrapped__)
  recommender = made[case][2]._replace(
    programs=(program._replace(scores=scores),)
  )
  rng = np.random.default_rng(0)
  programs = serving._top, scores
  before = [program._cache_size() for program in programs]
  for k in range(1, V + 1):
    users, length = 1 + k % 7, rng.integers(1, 40)
    history = recommender.item_ids[rng.integers(0, V, length)].tolist()
    recommender.recommend(histories=[history] * users, k=k)
    recommender.recommend(SPLIT.interactions.user_ids[:users], k=k)
  grown = [p._cache_size() - b for p, b in zip(programs, before, strict=True)]
  # 1, 4 or 16 rows; lists of 1, 4, 16 or V; 1 .. 256 items.
  assert grown[0] <= 3 * 4
  assert grown[1] <= 3 * 5


def test_lists_of_given_histories(made):
  fixed = Fixed(made)
  histories = [["item03"] * 9, [], ["item01", "item02"]]
  lists = fixed.lists(3, histories=histories, k=V)
  assert lists[0] == fixed.expected(V, {3})
  assert lists[2] == fixed.expected(V, {1, 2})
  every = [f"item{v:02}" for v in range(1, V + 1)]
  assert fixed.lists(1, histories=[every], k=V) == [[]]


def test_no_history_gives_what_is_most_popular_in_training(made):
  recommender = made["din gated"][2]
  data = SPLIT.interactions
  counts = np.zeros(V + 1, int)
  for start, end in zip(data.offsets[:-1], SPLIT.train_end, strict=True):
    for item in data.items[start : start + end]:
      counts[item] += 1
  best = sorted(range(1, V + 1), key=lambda v: (-counts[v], v))[:7]
  table = recommender.recommend([None, 106], histories=[[], []], k=7)
  for part in table.partition_by("request"):
    assert part["item"].to_list() == [f"item{v:02}" for v in best]
    assert part["score"].to_list() == counts[best].tolist()
  assert set(table["source"]) == {"popularity"}
  assert table["user"].to_list() == [None] * 7 + [106] * 7


def test_names_of_new_users_come_back_as_they_are(made):
  recommender = made["din gated"][2]
  for names in ([106, "7", None], [2**63, 1.5, None], ["", " 7", "9" * 19]):
    table = recommender.recommend(names, histories=[["item01"]] * 3, k=1)
    whole = table["user"].dtype == pl.Int64
    assert table["user"].to_list() == [
      x if x is None else int(x) if whole else str(x) for x in names
    ]
    assert whole == (names[0] == 106)


def test_newcomers_come_last_among_equals():
  counts = np.array([5, 5, 5, 3, 2, 5, 1, 4, 2, 9])
  for share in (0.1, 0.3, 0.5, 0.8):
    segments = activeness.assign_segments(counts, head_share=share)
    border = serving.head_from(counts, segments)
    for count in range(11):
      all_counts, tails = [*counts, count], [*(segments == 0), True]
      order = sorted(
        range(11), key=lambda u: (-all_counts[u], u == 10, tails[u])
      )
      tail = [u < 10 and segments[u] == 0 for u in order]
      assert (count >= border) == (order.index(10) < tail.index(True))


def test_users_are_routed_by_their_training_interactions(made):
  recommender = made["din gated"][2]
  tail, head = (int(np.flatnonzero(SEGMENTS == s)[0]) for s in (0, 1))
  names = [100 + 3 * tail, 100 + 3 * head, None, None, 7, 7]
  border = recommender.head_from
  lengths = [border + 5, 1, border, border - 1, border, 0]
  requests = serving.of_histories(
    recommender, [["item01"] * n for n in lengths], names
  )
  segments, slots = serving.route(recommender, requests)
  np.testing.assert_array_equal(segments, [0, 1, 1, 0, 1, 0])
  np.testing.assert_array_equal(slots, [0, 1, 1, 0, 1, -1])
  known = serving.of_users(recommender, prefix="all")
  np.testing.assert_array_equal(
    serving.route(recommender, known)[0], SEGMENTS
  )


@pytest.mark.parametrize("case", ["gru4rec memory", "din gated"])
def test_somebody_new_is_scored_as_a_user_that_was_never_counted(made, case):
  """Against the evaluation with a user added who has no training prefix."""
  model, weights, recommender = made[case]
  history = ["item04", "item01", "item09", "item04", "item02"]
  data = SPLIT.interactions
  users = np.append(np.repeat(data.user_ids, data.lengths), [999] * 6)
  items = [*data.item_ids[data.items - 1], *history, "item01"]
  both = from_columns(users, items)
  split = splits.leave_one_out(both)
  ends = np.append(SPLIT.train_end, 0).astype(np.int32)
  split = splits.dataclasses.replace(split, train_end=ends)
  logs = np.log(SPLIT.train_end)
  own = (np.log(len(history)) - logs.mean()) / logs.std()
  evidence = memory.build(split, memory_options(case.split()[1]))._replace(
    activeness=jnp.append(weights.evidence.activeness, np.float32(own))
  )
  expected = ranking.make_log_probabilities(model, num_items=V, length=L)(
    weights._replace(evidence=evidence), batches.make_sequences(split),
    Requests(np.array([37]), np.array([5]), np.array([0])),
  )
  table = recommender.recommend(
    histories=[history], k=V, mask_history=False
  ).sort("item")
  assert table["segment"][0] == 0
  got = jax.nn.log_softmax(table["score"].to_numpy())
  np.testing.assert_allclose(got, expected[0], atol=1e-4)


def everything(recommender):
  """Lists of all users and of some who are new."""
  users = serving.of_users(recommender)
  histories = [
    recommender.item_ids[history - 1].tolist() for history in users.histories
  ]
  histories += [["item03", "item01"], [], ["item07"] * 30]
  return recommender.recommend(
    [*users.names, None, None, 1], histories=histories, k=V
  )


READER = """
import pathlib, sys
from pin_jax import serving
from tests.serving_test import everything

folder = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
  path = folder / f"{name}.pin"
  table = everything(serving.load(path))
  table.write_parquet(path.with_suffix(".parquet"))
"""


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
  """A folder with every case as a file."""
  folder = tmp_path_factory.mktemp("models")
  for case, (*_, recommender) in made.items():
    serving.save(recommender, folder / f"{case.replace(' ', '-')}.pin")
  return folder


def test_a_fresh_process_gives_the_same_lists(made, saved):
  environment = {
    **os.environ,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": ":".join(sys.path),
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  subprocess.run(
    [sys.executable, "-c", READER, str(saved), "hstu-lora", "din-gated"],
    check=True, env=environment, cwd=pathlib.Path(__file__).parents[1],
  )
  for case in ("hstu lora", "din gated"):
    got = pl.read_parquet(saved / f"{case.replace(' ', '-')}.parquet")
    expected = everything(made[case][2])
    assert got.height > 500
    assert got.drop("score").equals(expected.drop("score")), case
    np.testing.assert_allclose(got["score"], expected["score"], rtol=1e-5)


def test_the_file_holds_what_the_documents_say(saved):
  path = saved / "din-gated.pin"
  with zipfile.ZipFile(path) as archive:
    names = set(archive.namelist())
    assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
    manifest = json.loads(archive.read("manifest.json"))
    program = jax.export.deserialize(bytearray(archive.read("program.jax")))
    users = pl.read_parquet(io.BytesIO(archive.read("users.parquet")))
  assert names == {"manifest.json", *manifest["members"]}
  assert {"users.parquet", "items.parquet", "histories/items"} <= names
  assert sum(name.startswith("backbone/") for name in names) == len(
    jax.tree.leaves(make_model("din gated")[1].backbone)
  )
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert str(program.out_avals[0].shape) == "(b, 24)"
  assert users["user"].to_list() == SPLIT.interactions.user_ids.tolist()
  assert users["segment"].to_list() == SEGMENTS.tolist()
  assert manifest["origin"] == {"method": "din gated", "seed": 0}


def test_two_exports_are_the_same_bytes_and_name_no_path(made, saved, tmp_path):
  serving.save(made["sasrec bottleneck"][2], tmp_path / "again.pin")
  again = (tmp_path / "again.pin").read_bytes()
  assert again == (saved / "sasrec-bottleneck.pin").read_bytes()
  assert b"site-packages" not in again and b"serving.py" not in again


def refused(path):
  """What a file that cannot be served is told: one line."""
  with pytest.raises(InputError) as caught:
    serving.load(path)
  text = str(caught.value)
  assert "\n" not in text and path.name in text
  return text


def same(one, two):
  """Whether two recommenders are equal in all but their programs' objects."""
  one, two = (jax.tree.leaves(x._replace(programs=())) for x in (one, two))
  return len(one) == len(two) and all(map(np.array_equal, one, two))


def test_no_damage_gives_another_model(saved, tmp_path):
  """Refused, but for bits of the archive that nobody reads, such as a date."""
  whole = (saved / "hstu-lora.pin").read_bytes()
  path = tmp_path / "damaged.pin"
  rng = np.random.default_rng(0)
  of_archive = whole.rindex(b"PK\1\2")  # the last member's entry
  ends = [0, 1, 30, *range(of_archive, len(whole))]
  unread, meant = 0, serving.load(saved / "hstu-lora.pin")
  for at in [*ends, *rng.integers(0, len(whole), 200)]:
    flipped = bytearray(whole)
    flipped[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(flipped)
    try:
      assert same(serving.load(path), meant)
      unread += 1
    except InputError:
      assert "damaged" in refused(path)
  assert unread < 60
  for size in [0, 10, 64, *rng.integers(0, len(whole), 20), len(whole) - 1]:
    path.write_bytes(whole[:size])
    assert "damaged" in refused(path)


def rewritten(source, target, change):
  """A file whose members are changed."""
  with zipfile.ZipFile(source) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  change(members)
  with zipfile.ZipFile(target, "w") as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return target


def in_manifest(**values):
  def change(members):
    manifest = {**json.loads(members["manifest.json"]), **values}
    members["manifest.json"] = json.dumps(manifest).encode()

  return change


CONTENTS = {
  "a member is missing": (lambda m: m.pop("items.parquet"), "items.parquet"),
  "no manifest": (lambda m: m.pop("manifest.json"), "manifest.json"),
  "another schema": (in_manifest(schema=9), "schema 9"),
  "another platform": (in_manifest(platforms=["tpu"]), "runs on 'cpu'"),
  "no arrays": (in_manifest(arrays={}), "export the job again"),
  "no slots": (in_manifest(slots=[[0]]), "export the job again"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_what_is_no_such_file_is_refused(
  case, saved, tmp_path
):
  harm, words = CONTENTS[case]
  path = rewritten(saved / "gru4rec-memory.pin", tmp_path / "bad.pin", harm)
  assert words in refused(path)


def test_a_file_of_the_former_version_is_read(made, saved, tmp_path):
  """It has one model."""
  def former(members):
    manifest = json.loads(members["manifest.json"])
    manifest |= {"schema": 1, "recent": manifest["recent"][0]}
    del manifest["models"]
    members["manifest.json"] = json.dumps(manifest).encode()

  path = rewritten(saved / "din-gated.pin", tmp_path / "old.pin", former)
  assert same(serving.load(path), made["din gated"][2])


@pytest.fixture(scope="module")
def mixed(made):
  """Tail users are served by one model, head users by another."""
  tail, head = made["gru4rec memory"][2], made["din gated"][2]
  routes = serving.Routes(
    (tail.routes.slots[0], head.routes.slots[1]), (0, 1), SEGMENTS, SEGMENTS,
    (0, 1),
  )
  return tail._replace(
    programs=tail.programs + head.programs, routes=routes, origin={}
  )


@pytest.mark.parametrize("loaded", [False, True])
def test_segments_served_by_two_models(made, mixed, loaded, tmp_path):
  if loaded:
    serving.save(mixed, tmp_path / "m.pin", ["cpu"])
    mixed = serving.load(tmp_path / "m.pin")
  got = everything(mixed)
  alone = [everything(made[case][2]) for case in (
    "gru4rec memory", "din gated"
  )]
  expected = pl.concat(
    table.filter(pl.col("segment") == segment)
    for segment, table in enumerate(alone)
  ).sort("request", "rank")
  assert got.drop("score").equals(expected.drop("score"))
  np.testing.assert_allclose(got["score"], expected["score"], rtol=1e-4)
  assert not alone[0].drop("score").equals(alone[1].drop("score"))


def run(saved, **options):
  console = rich.console.Console(file=io.StringIO(), width=100)
  model = str(saved / "din-gated.pin")
  serve.serve(serve.Options(model=model, **options), console)
  return console.file.getvalue()


def test_the_command_reads_and_writes_files(made, saved, tmp_path):
  recommender = made["din gated"][2]
  expected = recommender.recommend(prefix="train", k=4, deny=["item03"])
  for suffix, read in (
    ("parquet", pl.read_parquet), ("json", pl.read_json), ("csv", pl.read_csv),
    ("jsonl", pl.read_ndjson),
  ):
    text = run(
      saved, all_users=True, prefix="train", k=4, deny="item03",
      output=str(tmp_path / f"a.{suffix}"),
    )
    assert "148 items for 37 of 37 requests, by din gated, seed 0" in text
    columns = ["user", "rank", "item", "segment", "source"]
    got = read(tmp_path / f"a.{suffix}")
    assert got.select(columns).rows() == expected.select(columns).rows()
    np.testing.assert_allclose(got["score"], expected["score"], rtol=1e-6)
  given = pl.DataFrame({
    "user": [103, None, 999], "items": [["item01"], [], ["item02", "item03"]]
  })
  given.write_parquet(tmp_path / "h.parquet")
  given.write_json(tmp_path / "h.json")
  given.write_ndjson(tmp_path / "h.jsonl")
  for name in ("h.parquet", "h.json", "h.jsonl"):
    _, *lines = run(saved, history=str(tmp_path / name), k=2).splitlines()
    users = [line.split()[0] for line in lines]
    assert users == ["103"] * 2 + ["(new)"] * 2 + ["999"] * 2
    assert ["popularity" in line for line in lines] == [0, 0, 1, 1, 0, 0]
  (tmp_path / "ids.txt").write_text("103\n\n106\n")
  of_file = run(saved, users=str(tmp_path / "ids.txt"))
  assert of_file == run(saved, users="103,106") and of_file.count("\n") == 21


def test_the_command_serves_the_others_and_says_who_is_unknown(
  saved, tmp_path, capsys
):
  lists = run(saved, users="103,160000,106", k=3, deny="item99,item01")
  assert lists == run(saved, users="103,106", k=3, deny="item01")
  assert capsys.readouterr().err.splitlines()[:2] == [
    "warning: 1 of 3 users is unknown to the model: '160000'; ids are "
    "such as 100; left out",
    "warning: 1 of 2 items to deny is unknown to the model: 'item99' (near: "
    "'item19', 'item09', 'item23'); left out",
  ]
  with pytest.raises(InputError, match="1 of 3 users .* '160000'"):
    run(saved, users="103,160000,106", strict=True)
  assert len(run(saved, users="103", k=3).splitlines()) == 4  # not from then on


def test_new_users_come_as_interactions(saved, tmp_path):
  """A file such as the job reads; histories are in the order of the times."""
  path = tmp_path / "new.csv"
  path.write_text(
    "user,item,timestamp\nu7,item02,5\nu7,item01,4\n103,item03,1\n"
  )
  asked = serve.read_histories(path, {"user": "user", "separator": None})
  assert asked == ([["item03"], ["item01", "item02"]], ["103", "u7"])
  (tmp_path / "h.json").write_text(json.dumps([
    {"user": user, "items": items}
    for items, user in zip(*asked, strict=True)
  ]))
  lists = [run(saved, history=str(x), k=2) for x in (path, tmp_path / "h.json")]
  assert lists[0] == lists[1] and "u7" in lists[0]
  with pytest.raises(InputError, match="no column 'who'"):
    serve.read_histories(path, {"user": "who"})
