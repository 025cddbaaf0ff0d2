"""Bad inputs and what is said about each: one row each.

  python -m tests.bad_inputs

prints the table. `bad_inputs_test.py` runs every row: one line that holds the
row's words (the input, its value, the remedy), exit code 2, no traceback, and
no workdir made.
"""

import contextlib
import io
import pathlib
import sys
import tempfile
import zipfile
from unittest import mock

import jax
import numpy as np
import rich.console
import tensorflow_datasets
from absl import app, flags

from experiments import (
  commands,
  job,
  main,
  report,
  serve,
)
from experiments.reuse import same_job
from pin_jax import serving
from pin_jax.data import (
  activeness,
  batches,
  crowd,
  files,
  simulator,
  splits,
  stored,
  tfds,
)
from pin_jax.data.interactions import from_columns
from pin_jax.evaluation import metrics, ranking
from pin_jax.models import plugins
from pin_jax.models.sasrec import sasrec
from pin_jax.training import loop
from pin_jax.training.checkpoints import Checkpoints
from pin_jax.training.optimizers import make_optimizer
from pin_jax.types import Requests
from tests import tiny, toys
from tests.toy_rows import make_workdir

ROWS = {}  # name: (function of a folder, words of the message)


def row(name, *words):
  """Registers a function of a folder under a name."""

  def register(action):
    ROWS[name] = (action, words)
    return action

  return register


def _file(name, content, *words, reader=files.read, row_name=None, **options):
  """A file with such content, as bytes or text, read."""

  def action(folder):
    path = folder / name
    if content is not None:
      data = content.encode() if isinstance(content, str) else content
      path.write_bytes(data)
    reader(path, **options)

  ROWS[row_name or f"file: {content!r:.40}"] = (action, words)


GOOD = "user,item,timestamp\n1,2,3\n"
_file("a.csv", None, "a.csv does not exist", "check the path",
      row_name="file: absent")
_file("a.csv", "", "a.csv is empty", "0 bytes")
_file("a.csv", "user,item\n", "header but no rows", "check how it was made")
_file("a.xls", b"\xd0\xcf\x11\xe0\0\0\0\0", "no text in UTF-8", "save it as")
_file("a.csv", "who,item\n1,2\n", "no user column", "give user=<column>")
_file("a.csv", "user,what\n1,2\n", "no item column", "give item=<column>")
_file("a.csv", GOOD, "no column 'when'", "give time=<column>", time="when",
      row_name="file: time column absent")
_file("a.csv", "user,item\n1,\n", "line 2", "item", "is empty", "drop")
_file("a.csv", "user,item\n,2\n", "line 2", "user", "is empty")
_file("a.csv", "user,item,timestamp\n1,2,x\n", "= 'x'", "correct it")
_file("a.csv", "user,item,timestamp\n1,2,nan\n", "nan", "not finite")
_file("a.csv", "user,item,timestamp\n1,2,2024-01-01\n3,4,5x\n", "line 3",
      "'5x'", "neither a number nor a date")
_file("a.csv", b"user,item\n\x81,2\n", "no text in UTF-8", "save it as CSV")
_file("a.csv", "user,item\n1,2,3,4\n", "a.csv cannot be read", "separator")
_file("a.csv", GOOD, "separator='\"'", "give one character", separator='"',
      row_name="file: separator")
_file("a.csv", GOOD, "duplicates='all'", "one of", duplicates="all",
      row_name="file: duplicates")
_file("a.csv", GOOD, "k_core=-1", "whole number of at least 0", k_core=-1,
      row_name="file: k_core")
_file("a.csv", GOOD, "min_length=0", "at least 1", min_length=0,
      row_name="file: min_length")
_file("a.csv", GOOD, "no user", "k_core=5", "lower them", k_core=5,
      row_name="file: nothing left")
_file("a.inter", "user_id:token\titem_id:token\n1\n", "line 2", "is empty",
      row_name="inter: short line")
_file("a.parquet", GOOD, "a.parquet cannot be read", "check its format",
      row_name="parquet: text")
_file("a.parquet", b"PAR1" + bytes(60) + b"PAR1", "cannot be read",
      row_name="parquet: half written")


_file("a.csv", 'user,item\n"",2\n', "line 2", "user", "is empty")
_file("a.csv", "users\n1\n", "only ['users']", "give separator=")
_file("a.csv", "0,1,2\n5,6,7\n", "line 1 is 0,1,2", "write names there")
_file("a.csv", f"user,item,time\n1,2,{10**20}\n1,3,{10**20 + 1}\n", "line 3",
      "are one as float64", "coarser unit", row_name="file: times that merge")
_file("a.csv", "user,item,time\n1,2,2024-01-01 00:00:00.0000000001\n", "line 2",
      "finer than microseconds", "coarser unit", row_name="file: picoseconds")


def _columns(name, *words, times=None, users=(1, 2)):
  """Columns of two rows."""
  ROWS[f"columns: {name}"] = (
    lambda folder: from_columns(users, [1, 2], times), words
  )


_columns("floats that merged", "users[0] = 9007199254740992.0", "2^53",
         "integers or strings", users=[2.0**53, 1.0])
_columns("small floats that merged", "users[1]", "2^24", "give integers",
         users=np.array([1, 2**24], np.float32))
_columns("an empty id", "users[1] is empty", "drop such rows", users=["a", ""])
_columns("times as large floats", "times[0] = 1.7e+18", "coarser unit",
         times=[1.7e18, 1.6e18])
_columns("times beyond int64", "times span 1 to 9223372036854775808",
         "coarser unit", times=[1, 2**63])


def _path(name, path, *words):
  """A path that is none, for the readers and for what writes."""
  ROWS[f"path: {name}, to read"] = (lambda folder: files.read(path), words)
  ROWS[f"path: {name}, to store"] = (
    lambda folder: stored.write(_data(), path), words
  )


_path("empty", "", "''", "is no path", "name a file")
_path("of another machine", "s3://x/a.csv", "=s3://x/a.csv is not", "copy it")
_path("no text", 3, "=3 is no path")


def _harmed(name, array, change, *words):
  """A store of which one array is changed."""

  def action(folder):
    stored.write(_data(), folder / "s")
    file = folder / "s" / f"{array}.npy"
    np.save(file, change(np.load(file)))
    stored.read(folder / "s")

  ROWS[f"stored: {name}"] = (action, (*words, "store the interactions anew"))


_harmed("lengths moved", "lengths", lambda x: x + [1, -1], "fingerprint")
_harmed("negative lengths", "lengths", lambda x: -x, "fingerprint")
_harmed("ids too few", "user_ids", lambda x: x[1:], "fingerprint")
_harmed("items are text", "items", lambda x: x.astype(str), "fingerprint")


def _world(name, value, *words):
  """A world with one parameter set."""
  ROWS[f"simulator: {name}={value!r}"] = (
    lambda folder: simulator.WorldSpec(**{name: value}),
    (f"{name}=", *words),
  )


_world("num_items", 10**9, "at most")
_world("borders", (4, "a"), "(4, 'a')", "ascending lengths")
_world("rank", float("nan"), "whole number")
_world("confounding", 1.5, "give 0 to 1")


@row("file: a directory", "is a directory", "name one file in it")
def _(folder):
  (folder / "a.csv").mkdir()
  files.read(folder / "a.csv")


def _data():
  return from_columns([1] * 6 + [2] * 6, [*range(6)] * 2, list(range(12)))


@row("sampler: draw", "draw='all' is unknown", "one of")
def _(folder):
  nothing = batches.Sequences(*[np.zeros(0, np.int32)] * 3)
  batches.Draw(batch_size=1, length=1, draw="all").batch(
    jax.random.key(0), nothing, None
  )


@row("candidates: too many", "count=9 is more", "at most")
def _(folder):
  requests = Requests(*np.array([[0], [2], [0]]))
  ranking.draw_unseen(_data(), requests, count=9, seed=0)


TREE = {"x": np.ones(3, np.float32)}


def _saved(folder, **about):
  store = Checkpoints(folder / "saved", about={"config": {"a": 1}, **about})
  store.save(5, TREE, {})
  store.close()
  return folder / "saved"


def _restored(folder, like=None, **about):
  store = Checkpoints(folder, check=same_job(about))
  try:
    store.restore(like or TREE)
  finally:
    store.close()


@row("checkpoint: only one, damaged", "cannot be read", "no older one")
def _(folder):
  saved = _saved(folder)
  (saved / "5" / "record" / "metadata").write_text("{")
  _restored(saved)


@row("tfds: bomb", "expands to more than", "as no ratings do", "delete it")
def _(folder):
  with zipfile.ZipFile(
    folder / "ml-100k.zip", "w", zipfile.ZIP_DEFLATED
  ) as archive:
    archive.writestr("ml-100k/u.data", "1\t2\t3\t4\n" * (1 << 16))
  with mock.patch.object(tfds, "_LEAST_BYTES", 1 << 12):
    tfds.read_tfds(
      "movielens/100k", data_dir=folder / "prepared", manual_dir=folder
    )


for _name, *_words, _action in (
  ("stored: items that wrap", "items span 4294967297", "not 1 to 2",
   lambda folder: stored.write_chunks(
     folder / "s", lengths=np.array([1]), items=[np.array([2**32 + 1])],
     user_ids=np.array([1]), item_ids=np.array([1, 2]), name="x", notes={})),
  ("simulate: users", "num_users=2147483648", "less than 2^31",
   lambda folder: crowd.Crowd(num_users=2**31, num_items=9,
     num_interactions=2**35)),
  ("columns: lengths", "differ in length", "give equal ones",
   lambda folder: from_columns([1, 2], [1])),
  ("columns: shape", "users has shape (2, 2)", "flat column",
   lambda folder: from_columns(np.ones((2, 2), int), [1, 2])),
  ("columns: types", "mixes types", "give integers or strings",
   lambda folder: from_columns([1, "a"], [1, 2])),
  ("columns: fractions", "items[1] = 1.5", "no id",
   lambda folder: from_columns([1, 2], [1.0, 1.5])),
  ("columns: none", "0 rows", "check the source",
   lambda folder: from_columns([], [])),
  ("split: short users", "3 interactions", "check the user column",
   lambda folder: splits.leave_one_out(from_columns([1, 2], [1, 2]))),
  ("split: no times", "has no times", "use leave_one_out",
   lambda folder: splits.temporal_fractions(from_columns([1] * 5, range(5)))),
  ("split: shares", "validation=0.9, test=0.9", "sum is below 1",
   lambda folder: splits.temporal_fractions(_data(), validation=0.9, test=0.9)),
  ("split: order", "validation_time=5", "test_time=3", "ascending",
   lambda folder: splits.temporal(_data(), validation_time=5, test_time=3)),
  ("groups: rule", "'age'", "one of",
   lambda folder: activeness.assign_groups(np.arange(4), num_groups=2,
     rule="age")),
  ("groups: number", "num_groups",
   lambda folder: activeness.assign_groups(np.arange(4), num_groups=0)),
  ("prior: length", "custom", "2",
   lambda folder: activeness.prior(
     "custom", np.array([0, 1]), np.array([1, 1]), 2, (1.0,))),
  ("pool: range", "groups span 0..7", "give -1..1",
   lambda folder: batches.make_pool(np.ones(2), np.array([0, 7]), num_groups=2,
     length=2)),
  ("pool: windows", "length=1 makes 2147483648 windows", "give a longer",
   lambda folder: batches.make_pool(np.array([2**31]), np.zeros(1, int),
     num_groups=1, length=1)),
  ("pool: length", "length=0", "at least 1",
   lambda folder: batches.make_pool(np.ones(2), np.zeros(2), num_groups=1,
     length=0)),
  ("metric: rank", "ranks contain 0.0", "pass ranks of 1",
   lambda folder: metrics.ndcg([0.0], 10)),
  ("metric: cutoff", "cutoff k is 0", "at least 1",
   lambda folder: metrics.reciprocal_rank([1.0], 0)),
  ("backbone: heads", "width=10", "heads=3",
   lambda folder: sasrec(10, length=4, width=10, heads=3)),
  ("optimizer: steps", "num_steps=0", "at least 1",
   lambda folder: make_optimizer(0)),
  ("optimizer: rate", "learning_rate=-1", "positive",
   lambda folder: make_optimizer(10, learning_rate=-1)),
  ("loop: dispatch", "dispatch=3", "evaluate_every=4", "divisor",
   lambda folder: list(loop.run(
     None, None, None, loop.Plan(4, 4, dispatch=3)))),
  ("checkpoint: config", "config.a is 1 there and 2 here", "workdir",
   lambda folder: _restored(_saved(folder), config={"a": 2})),
  ("checkpoint: data", "data is 'abc' there and 'abd' here",
   lambda folder: _restored(_saved(folder, data="abc"), data="abd")),
  ("checkpoint: versions", "versions.jax is '1' there", "--other_versions",
   lambda folder: _restored(_saved(folder, versions={"jax": "1"}),
     versions={"jax": "2"})),
  ("checkpoint: cores", "versions.cores is '1' there", "--other_versions",
   lambda folder: _restored(_saved(folder, versions={"cores": "1"}),
     versions={"cores": "2"})),
  ("checkpoint: shape", "x is float32[3] there and float32[4] here", "delete",
   lambda folder: _restored(_saved(folder), {"x": np.ones(4, np.float32)})),
  ("checkpoint: leaf", "y is absent there", "delete",
   lambda folder: _restored(
     _saved(folder), {**TREE, "y": np.ones(2, np.float32)})),
  ("tfds: name", "unknown data set 'films/1'", "one of",
   lambda folder: tfds.read_tfds("films/1", data_dir=folder)),
  ("tfds: a pattern", "data_dir=", "takes for patterns", "use another",
   lambda folder: tfds.read_tfds("movielens/1m", data_dir=folder / "d[1]")),
  ("report: no rows", "has no rows.parquet", "finished run",
   lambda folder: report.write_report([folder])),
  ("serving: prefix", "prefix='test'", "one of",
   lambda folder: serving.of_users(_recommender(), prefix="test")),
  ("serving: users and histories", "1 users have 2 histories", "one of each",
   lambda folder: serving.of_histories(_recommender(), [[], []], ["ann"])),
  ("model: absent", "m.pin does not exist", "check the path",
   lambda folder: serving.load(folder / "m.pin")),
  ("workdir: method to serve", "method 'best' is not in", "['base', 'pin']",
   lambda folder: serve.recommender(_finished(folder), method="best")),
  ("workdir: seed to serve", "seed 3 is not in", "use one of [0]",
   lambda folder: serve.recommender(_finished(folder), seed=3)),
  ("workdir: other data, to serve", "is of data 0000", "put back",
   lambda folder: serve.recommender(_finished(folder))),
  ("checkpoint: a pattern for a name", "has ? [ in it", "use a directory",
   lambda folder: Checkpoints(folder / "a[b]?")),
):
  ROWS[_name] = (_action, _words)


def _config(key, value, *words, **more):
  """The main job with one config key set, or more of them (__ for a dot)."""

  def action(folder):
    config = tiny.get_config()
    given = {name.replace("__", "."): x for name, x in more.items()}
    for name, one in {key: value, **given}.items():
      *path, last = name.split(".")
      section = config
      for part in path:
        section = section[part]
      with config.ignore_type(), config.unlocked():
        section[last] = one
    job.run(config, folder / "w", rich.console.Console(file=io.StringIO()))

  ROWS[f"config: {key}={value!r} {more or ''}"] = (action, words)


NAN, INF = float("nan"), float("inf")
for _row in (
  ("widht", 3, "widht=3", "unknown key"),
  ("backbone.widht", 3, "backbone.widht=3", "did you mean backbone.width"),
  ("batch_size", "many", "batch_size='many'", "whole number from 2"),
  ("batch_size", 10**12, "batch_size=1000000000000", "to 16777216"),
  ("batch_size", True, "batch_size=True", "whole number"),
  ("batch_size", 2, "batch_size=2", "groups.num_groups=3"),
  ("num_seeds", 2, "num_seeds=2", "number of seeds, 1, must be a multiple"),
  ("backbone.length", 10.0, "backbone.length=10.0", "whole number"),
  ("backbone.width", 0, "backbone.width=0", "from 1 to"),
  ("backbone.width", 7, "backbone.width=7", "multiple of backbone.heads=2"),
  ("backbone.dropout", 1.0, "backbone.dropout=1.0", "below 1"),
  ("backbone.name", "bert", "'bert'", "one of"),
  ("backbone.name", "gru4rec", "blocks=1", "'gru4rec' does not take it"),
  ("backbone.layers", 2, "layers=2", "'sasrec' does not take it"),
  ("plugin.reads_state", 1, "reads_state=1", "True or False"),
  ("memory.neighbours", 2**63, "memory.neighbours=9223", "to 65536"),
  ("memory.shrink", NAN, "memory.shrink=nan", "number from 0"),
  ("memory.decay", INF, "memory.decay=inf", "number from 1e-09 to 1"),
  ("memory.channels", ("after", "after"), "'after')", "each once"),
  ("memory.relations", ("likeness",), "'likeness'", "one of"),
  ("optimizer.learning_rate", -1.0, "learning_rate=-1.0", "number from"),
  ("optimizer.learning_rate", NAN, "learning_rate=nan", "number from"),
  ("optimizer.warmup", None, "warmup=None", "whole number from 0"),
  ("prior.exponent", -1.0, "prior.exponent=-1.0", "number from 0"),
  ("prior.values", (0.5, "1"), "prior.values=(0.5, '1')", "number from 0"),
  ("prior.kind", "custom", "section prior", "values with 'custom'"),
  ("groups.rule", "age", "groups.rule='age'", "one of"),
  ("groups.thresholds", (2, NAN), "(2, nan)", "whole number from 0"),
  ("groups.thresholds", (3, 5), "(3, 5)", "rule='thresholds' and only"),
  ("pin.weighting", "best", "pin.weighting='best'", "one of"),
  *(("pin.weighting", spec, f"pin.weighting={spec!r}", *words)
    for spec, *words in (
      ("annealed_backdoor:steps=2.5", "'steps=2.5'", "whole number"),
      ("gradvac:num_groups=7", "'num_groups=7'", "are ['beta']"),
      ("gradvac:beta=nan", "'beta=nan'", "number from 0"),
      ("group_dro:step_size=-1", "'step_size=-1'", "number from 0"),
      ("cagrad:c=0.1,c=0.2", "'c=0.2'", "repeated"),
      ("cagrad:c=x", "'c=x'", "number"),
      ("cvar:", "give alpha", "cvar:alpha=number"),
      ("annealed_backdoor", "give steps", "annealed_backdoor:steps=number"),
    )),
  ("pin.blocks", ("items=cagrad:c=-1",), "pin.blocks=", "'c=-1'"),
  ("pin.blocks", ("a=joint", "a=mgda"), "'a' is repeated", "each pattern"),
  ("pin.blocks", ("others=joint",), "'others' is", "pin.weighting"),
  ("pin.blocks", ("items=joint", "nowhere=joint"), "'nowhere'", "leaves: "),
  ("pin.blocks", ("items",), "'items' must be pattern=weighting"),
  ("pin.blocks", ("(=joint",), "'(' is no regular expression"),
  ("pin.blocks", ("items=best",), "'best': use one of"),
  ("loss.name", "mse", "loss.name='mse'", "one of"),
  ("loss.negatives", 0, "loss.negatives=0", "whole number"),
  ("loss.exponent", INF, "loss.exponent=inf", "number from 0"),
  ("loss.calibration", 1.5, "loss.calibration=1.5", "number from 0"),
  ("loss.focusing", -1.0, "loss.focusing=-1.0", "number from 0"),
  *(("loss.proposal", spec, f"loss.proposal={spec!r}", words)
    for spec, words in (
      ("hard", "one of"), ("uniform:x", "positive share"),
      ("uniform,uniform", "each once"), ("uniform:0,in_batch", "positive"),
    )),
  ("evaluation.protocol", "quick", "evaluation.protocol='quick'", "one of"),
  ("evaluation.metrics", ("ndgc@10",), "evaluation.metrics: metric 'ndgc@10'",
   "give one of"),
  ("methods", ("best",), "methods=('best',)", "one of"),
  ("methods", ("base", "base"), "('base', 'base')", "each once"),
  ("seeds", (), "seeds=()", "at least 1 of"),
  ("seeds", (0.0,), "seeds=(0.0,)", "whole number from 0"),
  ("seeds", (2**31,), "seeds=(2147483648,)", "to 2147483647"),
  ("seeds", (1, 1), "seeds=(1, 1)", "each once"),
  ("non_finite", "ignore", "non_finite='ignore'", "one of"),
  ("validation.every", 7, "validation.every=7", "multiple of dispatch"),
  ("data.borders", (3, 4), "longest history: 3", "nothing to learn"),
  ("data.source", "web", "data.source='web'", "one of"),
  ("data.path", "x.csv", "data.path='x.csv'", "does not use it"),
  ("data.num_items", 10**6, "num_items=1000000", "from 2 to 10000"),
  ("data.confounding", NAN, "confounding=nan", "number from 0 to 1"),
  ("data.borders", (4, 6.5), "borders=(4, 6.5)", "whole number from 3"),
  ("data.seed", None, "data.seed=None", "whole number from 0"),
):
  _config(*_row)
_config("loss.name", "gbce", "made for 'uniform'", loss__proposal="in_batch")
_config("loss.name", "gbce", "config section loss", "rate=1.03448",
        loss__negatives=30)
_config("evaluation.protocol", "sampled", "99", "more")
_config("pin.path", "weighted", "pin.path='weighted'", "that read nothing",
        pin__weighting="pcgrad")
_config("pin.path", "weighted", "use 'accumulated'", pin__granularity="tensor")
_config("pin.blocks", ("items=joint",), "one of the two",
        pin__granularity="tensor")
_config("memory.relations", ("cosine",), "'cosine'", "plugin_draw='validation'",
        plugin__name="gated", memory__recent=3)


def _flags(name, *words, **workdir):
  """The command line; the workdir is W, W/x where W is a file."""

  def action(folder):
    arguments = [x.replace("FOLDER", str(folder)) for x in name.split()]
    flags.FLAGS.unparse_flags()
    with _arguments(["experiments.main", *arguments]):
      with contextlib.suppress(SystemExit):
        app.run(main.main, flags_parser=lambda argv: commands.parse_with(
          argv, main.CONFIG, main.DEFAULT
        ))

  ROWS[f"flags: {name}"] = (action, words)


@contextlib.contextmanager
def _arguments(argv):
  """Puts other arguments on the command line."""
  before, sys.argv = sys.argv, argv
  try:
    yield
  finally:
    sys.argv = before


TINY = "--config=tests/tiny.py --workdir=FOLDER"
_flags("--config=tests/tiny.py", "workdir", "--help")
_flags(f"{TINY}/w --wrokdir=x", "wrokdir", "--help")
_flags(f"{TINY}/w --config.widht=3", "unknown config key", "widht")
_flags(f"{TINY}/w --config.batch_size=many", "batch_size", "many")
_flags("--config=nowhere.py --workdir=FOLDER/w", "nowhere.py")
_flags(
  "--config=experiments/configs/files.py --workdir=FOLDER/w",
  "files needs a path",
)
_flags(
  "--config=experiments/configs/files.py:path=FOLDER/x.csv,k=3 "
  "--workdir=FOLDER/w", "'k=3'", "key of",
)
_flags("--config=tests/tiny.py --workdir=/proc/w", "/proc/w", "--workdir")
_flags("--config=tests/tiny.py --workdir=", "'--workdir='", "unset shell")
_flags("--config= --workdir=FOLDER/w", "'--config='", "give a value")
_flags(f"{TINY}/w --config.pin.weighting=", "weighting='", "leave it out")
_flags(f"{TINY}/w --config.seeds=(1.5,)", "seeds=(1.5,)", "whole number")
_flags(f"{TINY}/w --config.dispatch=None", "dispatch=None", "whole number")
_flags("--config=tests/tiny.py --workdir=s3://b/w", "s3://b/w", "local path")
_flags(f"{TINY}/w --coordinator=h:99999 --num_processes=2 --process_id=0",
       "--coordinator=h:99999", "1 to 65535")
_flags(f"{TINY}/w --coordinator=h:1 --num_processes=2 --process_id=0 "
       "--heartbeat=9999999999", "--heartbeat=9999999999", "[1, 1000000]")


def _words(program, name, *words):
  """The command line of another program, as its launcher reads it."""

  def action(folder):
    values = flags.FlagValues()
    flags.DEFINE_string("output", None, "", flag_values=values)
    flags.DEFINE_string("users", None, "", flag_values=values)
    with mock.patch.object(commands.flags, "FLAGS", values):
      with contextlib.suppress(SystemExit):
        app.run(lambda argv: None, argv=[program, *name],
                flags_parser=commands.parse_with)

  ROWS[f"{program}: {' '.join(map(repr, name))}"] = (action, words)


_words("serve", ["--users="], "'--users='", "unset shell variable")
_words("serve", ["--users", ""], "argument ''", "unset shell variable")
_words("serve", ["--export=hdfs://b/x"], "hdfs:// cannot be reached", "local")
_words("report", ["runs/a", ""], "argument ''", "leave it out")


def _recommender():
  """Two users 'ann' and 'bob', six items 'a' to 'f'; nothing is trained."""
  data = from_columns(["ann"] * 6 + ["bob"] * 6, list("abcdef") * 2)
  model = plugins.Model(toys.bigram(6), plugins.translation(7))
  params = model.backbone.init(jax.random.key(0))
  weights = plugins.Weights(params, np.zeros(7, np.float32))
  routes = serving.Routes(
    [weights], [0], np.array([0, 1]), np.zeros(2, int), (0, 0)
  )
  return serving.make(
    [model], routes, splits.leave_one_out(data), length=3, origin={},
  )


def _serving(name, *words, users=("ann",), histories=None, **options):
  """A recommendation to users or for histories."""

  def action(folder):
    whom = {"users": users} if histories is None else {"histories": histories}
    _recommender().recommend(**whom, **{"k": 3, **options})

  ROWS[f"serving: {name}"] = (action, words)


_serving("unknown users", "2 of 2 users are unknown", "'amn' (near: 'ann')",
         "give histories", users=("amn", "zoe"))
_serving("unknown items", "1 of 1 items of histories is", "items of the train",
         histories=[["x"]])
_serving("unknown items to allow", "'bb' (near: 'b')", "check them",
         allow=["bb"])
_serving("fractional item", "1.5; ids are such as 'a'", histories=[[1.5]])
_serving("id with a space", "' ann' (near: 'ann')", users=(" ann",))
_serving("k of 0", "k=0", "give 1..6", k=0)
_serving("k over the catalogue", "k=7", "give 1..6", k=7)
_serving("empty allow list", "allow is empty", "name an item", allow=[])
_serving("everything denied", "deny names all 2", "shorten it",
         allow=["a", "b"], deny=["b", "a"])


@row("model: text", "m.pin is damaged or not what", "export the job")
def _(folder):
  (folder / "m.pin").write_text("nothing of the kind " * 9)
  serving.load(folder / "m.pin")


@row("workdir: unfinished, to serve", "holds no finished job", "to its end")
def _(folder):
  job.claim_workdir(folder, tiny.get_config(), "0" * 16)
  serve.recommender(folder)


def _finished(folder):
  """What a finished job leaves, without what it trained."""
  job.claim_workdir(folder, tiny.get_config(), "0" * 16)
  (folder / "summary.json").write_text("{}")
  return str(folder)


def _serve(name, *words, **options):
  """The command; FOLDER stands for the row's folder."""

  def action(folder):
    place = lambda x: x.replace("FOLDER", str(folder))
    (folder / "empty.txt").write_text("\n")
    (folder / "h.xls").write_text("x")
    (folder / "h.json").write_text('[{"user": "ann"}]')
    (folder / "f.json").write_text('[{"items": 1.5}]')
    if options.get("history"):
      serving.save(_recommender(), folder / "m.pin", platforms=("cpu",))
    given = {
      k: place(v) if isinstance(v, str) else v for k, v in options.items()
    }
    serve.serve(serve.Options(**given), console=None)

  ROWS[f"serve: {name}"] = (action, words)


ANN = {"model": "m.pin", "users": "ann"}
_serve("nobody", "0 of --users", "give one", model="m.pin")
_serve("both", "2 of --users", "give one", **ANN, all_users=True)
_serve("no model", "--workdir=DIR", "--help", users="ann")
_serve("file of users", "--users=x.txt does not exist", model="m.pin",
       users="x.txt")
_serve("no users", "is empty", "name at", model="m.pin",
       users="FOLDER/empty.txt")
_serve("an unset variable", "--users= is empty", "name at", model="m.pin",
       users="")
_serve("an unset variable among ids", "has an empty id", model="m.pin",
       users="a,,b")
_serve("histories of fractions", "row 1 has no list", "`items`",
       model="FOLDER/m.pin", history="FOLDER/f.json")
_serve("empty allow list", "--allow= is empty", **ANN, allow="")
_serve("suffix of the output", "suffix '.xls'", "one of", **ANN,
       output="x.xls")
_serve("folder of the output", "is no directory", "make it first", **ANN,
       output="FOLDER/x/recs.json")
_serve("no output", "output='' is no path", **ANN, output="")
_serve("absent histories", "does not exist", "check the path",
       model="FOLDER/m.pin", history="FOLDER/n.json")
_serve("histories without items", "give lists of items", model="FOLDER/m.pin",
       history="FOLDER/h.json")
_serve("no table of histories", "h.xls", "no user column", model="FOLDER/m.pin",
       history="FOLDER/h.xls")
_serve("prefix of histories", "--prefix=train", "leave it out", model="m.pin",
       history="h.json", prefix="train")
_serve("place of the export", "no file in a directory that exists",
       "name another", workdir="w", export="FOLDER/x/m.pin")
_serve("export and users", "recommends nothing", "neither", workdir="w",
       export="m.pin", users="ann")


def _in_workdir(name, prepare, *words):
  """The job in a workdir that something is wrong with."""

  def action(folder):
    config = tiny.get_config()
    prepare(folder, config)
    job.run(config, folder, rich.console.Console(file=io.StringIO()))

  ROWS[f"workdir: {name}"] = (action, words)


def _claimed(change):
  def prepare(folder, config):
    other = tiny.get_config()
    change(other)
    job.claim_workdir(folder, other, "0" * 16)

  return prepare


_in_workdir(
  "of another simulation", _claimed(lambda c: c.data.update(num_users=90)),
  "data.num_users is 90 there and 80 here", "another --workdir",
)
_in_workdir(
  "of other data", _claimed(lambda c: None), "data is '0000", "--workdir",
)
_in_workdir(
  "with a damaged config.json",
  lambda folder, config: (folder / "config.json").write_text("{"),
  "config.json is damaged", "delete it",
)


for text in ("", " ", "a\0b"):
  _in_workdir(
    f"named {text!r}",
    lambda folder, config, text=text: job.run(config, text),
    "is no path", "name a file or directory",
  )
for text in ("a[0]", "a*", "a?"):
  _in_workdir(
    f"with a pattern for a name, {text}",
    lambda folder, config, text=text: job.run(config, folder / "w" / text),
    text, "could not be read again", "without * ? [",
  )
for text in ("[]", "null", "{}", '{"config": 3, "data": "0"}', "\0"):
  _in_workdir(
    f"with {text!r} for a config.json",
    lambda folder, config, text=text: (folder / "config.json").write_text(text),
    "config.json is damaged", "delete it",
  )
_in_workdir(
  "in the place of a file",
  lambda folder, config: ((folder / "f").write_text(""), job.run(
    config, folder / "f" / "w"
  )), "f/w cannot be written", "name another place",
)


@row("report: damaged rows", "rows.parquet is damaged", "restore it")
def _(folder):
  (folder / "rows.parquet").write_bytes(b"PAR1" + bytes(99) + b"PAR1")
  report.write_report([folder])


@row("report: log of another encoding", "log.jsonl line 1 is damaged", "delete")
def _(folder):
  make_workdir(folder / "job")
  (folder / "job" / "log.jsonl").write_bytes('{"run": "é"}'.encode("latin1"))
  report.write_report([folder / "job"])


@row("report: no place", "output=' ' is no path", "name a file or directory")
def _(folder):
  make_workdir(folder / "job")
  report.write_report([folder / "job"], output=" ", num_resamples=10)


@row("workdir: of no job, to serve", "config.json is damaged", "delete it")
def _(folder):
  for name in ("config", "summary"):
    (folder / f"{name}.json").write_text("[]")
  serve.recommender(folder)


def answer(name, folder):
  """(exit code, what standard error says) of a row."""
  action, _ = ROWS[name]
  tensorflow_datasets.disable_progress_bar()
  said = io.StringIO()
  with contextlib.redirect_stderr(said):
    code = commands.exit_code(lambda: action(pathlib.Path(folder)))
  return code, said.getvalue()


if __name__ == "__main__":
  table = []
  for name in ROWS:
    with tempfile.TemporaryDirectory() as place:
      code, text = answer(name, place)
      table.append((name, code, text.strip().replace(place, "FOLDER")))
  for name, code, text in table:
    print(f"{name}\n  {code}  {text}")
  print(f"{len(table)} bad inputs, {sum(c == 2 for _, c, _ in table)} of them "
        "answered with exit code 2")
