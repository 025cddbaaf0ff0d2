"""Other people's models and data: adapters, with a small library in the loop.
"""

import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import rich.console
import tiny

from experiments import job, report, results, serve
from experiments.configs import base
from experiments.problem import make_problem
from pin_jax.types import InputError
from third_party import driver, recbole, rectools

# Scores by popularity in training; items without it cannot be scored. The sign
# of the scores is its one parameter: it is right after every second epoch.
FAKE = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np, worker

class Fake:
  def __init__(self, data, settings):
    print("chatter")  # must not reach the driver
    options = settings.options
    if "fail" in options:
      raise ValueError(options["fail"])
    with open(options["count"], "a") as file:
      file.write(f"{{settings.seed}} {{settings.sizes['length']}}\\n")
    prefixes = list(data.histories(data.train_end))
    self.counts = np.bincount(
      np.concatenate(prefixes), minlength=data.num_items + 1
    ).astype(float)
    self.sign = 0
  def fit(self, watch):
    over = False
    while not over:
      self.sign = 1 if watch.epochs % 2 else -1
      over = watch.batch()
      over |= watch.epoch()
  def state(self):
    return self.sign
  def load(self, state):
    self.sign = state
  def scores(self, users, positions):
    scores = np.where(self.counts > 0, self.sign * self.counts, -np.inf)
    for rows in np.array_split(np.arange(len(users))[::-1], 3):
      yield rows, np.tile(scores, (len(rows), 1))

worker.run(Fake)
"""


@pytest.fixture
def fake(tmp_path):
  """A library: the version of numpy here counts as its own."""
  script = tmp_path / "fake_worker.py"
  script.write_text(FAKE.format(folder=str(driver.PEERS)))
  return driver.Peer("Fake", "numpy", np.__version__, script)


@pytest.fixture
def plan(tmp_path):
  options = {"count": str(tmp_path / "count.txt")}
  return driver.Plan(sys.executable, "Popular", options, epochs=3)


@pytest.fixture
def quiet():
  return rich.console.Console(quiet=True)


def _ours():
  """The configuration of a job of ours on the data of `tiny`."""
  config = tiny.get_config()
  config.backbone_steps, config.plugin_steps = 20, 10
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compile_quickly):
  """Its workdir."""
  path = tmp_path_factory.mktemp("job") / "tiny"
  job.run(_ours(), path, rich.console.Console(quiet=True), command="ours")
  return path


def _config(split, tmp_path):
  """Leave-one-out of the simulator, or a temporal split of a file."""
  config = tiny.get_config()
  if split == "temporal":
    rng = np.random.default_rng(0)
    lines = ["user,item,timestamp"]
    for user in range(40):
      start = rng.uniform(0, 60)
      lines += [
        f"u{user},i{rng.integers(25)},{start + 7 * t}"
        for t in range(rng.integers(2, 9))
      ]
    (tmp_path / "toy.csv").write_text("\n".join(lines) + "\n")
    config.data = base.data_section("files", path=str(tmp_path / "toy.csv"))
    config.split = {"protocol": "temporal", "validation": 0.2, "test": 0.2}
  return config


def _by_hand(problem, part):
  """user id -> (target id, rank and candidates masked, unmasked)."""
  split, data = problem.split, problem.split.interactions
  histories = [
    data.items[a:b].tolist()
    for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)
  ]
  popular = {}
  for history, end in zip(histories, split.train_end, strict=True):
    for item in history[:end]:
      popular[item] = popular.get(item, 0) + 1
  found = {}
  for user, position in enumerate(getattr(split, part)):
    if position < 0:
      continue
    target, seen = histories[user][position], set(histories[user][:position])
    numbers = []
    for hidden in (seen - {target}, set()):
      left = set(range(1, data.num_items + 1)) - hidden
      scores = sorted((popular.get(item, 0) for item in left), reverse=True)
      own = popular.get(target, 0)
      places = [i for i, score in enumerate(scores, 1) if score == own]
      numbers += [sum(places) / len(places), len(left)]
    found[data.user_ids[user]] = (data.item_ids[target - 1], *numbers)
  return found


@pytest.mark.parametrize("split", ["leave_one_out", "temporal"])
def test_ranks_are_those_of_a_loop(tmp_path, fake, plan, quiet, split):
  config = _config(split, tmp_path)
  driver.run(config, fake, plan, tmp_path / "w", console=quiet)
  rows = pl.read_parquet(tmp_path / "w" / "rows.parquet")
  problem = make_problem(config)
  want = _by_hand(problem, "test")
  columns = (
    "user", "target", "rank", "candidates", "rank_unmasked",
    "candidates_unmasked",
  )
  got = {user: tuple(rest) for user, *rest in rows.select(columns).rows()}
  assert got == want
  assert rows["model"].unique().to_list() == ["Fake Popular"]
  users = problem.split.interactions.user_ids.tolist()
  for name, values in (
    ("segment", problem.segments), ("group", problem.groups),
    ("activeness", problem.split.train_end),
  ):
    of = dict(zip(users, values.tolist(), strict=True))
    assert rows[name].to_list() == [of[user] for user in rows["user"]]
  # The state after the second of three epochs is the best on validation.
  ranks = np.array([x[1] for x in _by_hand(problem, "validation").values()])
  ndcg = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()
  summary = json.loads((tmp_path / "w" / "summary.json").read_text())
  cost = summary["cost"]["numpy/Popular"]
  assert cost["best_steps"] == [2] and cost["steps"] == cost["epochs"] == 3
  assert cost["validation"] == [pytest.approx(ndcg)]
  assert summary["versions"]["python of Fake"] == sys.version.split()[0]


def test_a_finished_seed_is_not_trained_again(tmp_path, fake, plan, quiet):
  config, path = tiny.get_config(), tmp_path / "w"
  driver.run(config, fake, plan, path, console=quiet)
  first = (path / "rows.parquet").read_bytes()
  # Killed while it trained: what is there of seed 1 is no result.
  (path / "peer" / "seed1").mkdir()
  (path / "peer" / "seed1" / "ranks.npz").write_bytes(b"half")
  config.seeds = (0, 1)
  driver.run(config, fake, plan, path, console=quiet)
  length = config.backbone.length
  assert (tmp_path / "count.txt").read_text() == f"0 {length}\n1 {length}\n"
  rows = pl.read_parquet(path / "rows.parquet")
  assert rows["seed"].unique().sort().to_list() == [0, 1]
  assert rows.schema == pl.read_parquet(first).schema
  runs = json.loads((path / "cpu_seconds.json").read_text())
  assert list(runs) == ["seed0/numpy/Popular", "seed1/numpy/Popular"]


def test_stands_beside_our_models(tmp_path, fake, plan, quiet, finished):
  path = tmp_path / "w"
  driver.run(
    tiny.get_config(), fake, plan, path, beside=finished, command="theirs",
    console=quiet,
  )
  ours = pl.read_parquet(finished / "rows.parquet")
  rows = pl.read_parquet(path / "rows.parquet")
  assert rows.head(ours.height).equals(ours)
  assert rows["model"].unique(maintain_order=True).to_list()[-1] == (
    "Fake Popular"
  )
  means = results.metrics_table(
    results.analyse(results.read(path), num_resamples=50), "history masked"
  )
  column = [column.name for column in means.columns].index("HR@10")
  for line in means.lines:
    if line[1] == "overall":
      hits = rows.filter(model=line[0])["rank"] <= 10
      assert line[column] == pytest.approx(hits.mean())
  own = results.read(path)
  assert own.summary["command"] == "ours\ntheirs"
  assert "claims" in own.config
  results.write_summary(own, tmp_path / "out")
  for source in (path, tmp_path / "out"):
    page, = report.write_report(
      [source], markdown=tmp_path / "page.md", num_resamples=50, console=quiet
    )
    assert "Fake Popular" in page.read_text()
  # A job does not take these workdirs for its own.
  console = rich.console.Console(quiet=True)
  with pytest.raises(InputError, match="holds the results of another library"):
    job.run(_ours(), path, console)
  with pytest.raises(InputError):
    serve.recommender(path)
  # A third library beside the two.
  more = fake._replace(name="More")
  driver.run(
    tiny.get_config(), more, plan, tmp_path / "x", beside=path, console=quiet
  )
  assert len(results.read(tmp_path / "x").rows["model"].unique()) == 4
  # Without it, the workdir is of the library's model alone again.
  driver.run(tiny.get_config(), fake, plan, path, console=quiet)
  assert results.read(path).rows["model"].unique().to_list() == [
    "Fake Popular"
  ]
  assert results.read(path).config == {}
  with pytest.raises(InputError, match="holds the results of another library"):
    job.run(_ours(), path, console)
  with pytest.raises(InputError, match="holds no finished job"):
    serve.recommender(path)


@pytest.fixture
def refused(tmp_path, fake, plan, quiet):
  """What a run says that is refused, given what is other of it."""

  def run(config=None, *, peer=None, beside=None, **changes):
    with pytest.raises(InputError) as caught:
      driver.run(
        config or tiny.get_config(), fake._replace(**peer or {}),
        plan._replace(**changes), tmp_path / "w", beside=beside, console=quiet,
      )
    assert "\n" not in str(caught.value)
    return str(caught.value)

  return run


def test_results_of_other_data_seeds_or_models_are_refused(
  tmp_path, fake, plan, quiet, refused, finished
):
  config = tiny.get_config()
  config.data.seed = 1
  text = refused(config, beside=finished)
  assert f"--beside={finished} has fingerprint" in text
  assert not (tmp_path / "w").exists()
  config.data.seed, config.seeds = tiny.get_config().data.seed, (0, 1)
  text = refused(config, beside=finished)
  assert "has seeds [0] and here are [0, 1]" in text
  assert "has no rows.parquet" in refused(beside=tmp_path / "no")
  driver.run(tiny.get_config(), fake, plan, tmp_path / "done", console=quiet)
  text = refused(beside=tmp_path / "done")
  assert "has a model 'Fake Popular' already" in text


@pytest.mark.parametrize(("harm", "text"), [
  ("split", "has protocol 'another'"),
  ("targets", "holds other users or targets"),
])
def test_results_of_other_targets_are_refused(
  tmp_path, refused, finished, harm, text
):
  rows = pl.read_parquet(finished / "rows.parquet")
  summary = json.loads((finished / "summary.json").read_text())
  if harm == "split":
    summary["protocol"] = "another"
  else:
    rows = rows.with_columns(target=pl.col("target") % 30 + 1)
  (tmp_path / "job").mkdir()
  rows.write_parquet(tmp_path / "job" / "rows.parquet")
  (tmp_path / "job" / "summary.json").write_text(json.dumps(summary))
  assert text in refused(beside=tmp_path / "job")


def test_workdirs_of_others_are_refused(tmp_path, fake, plan, quiet, refused):
  config = tiny.get_config()
  driver.run(config, fake, plan, tmp_path / "w", console=quiet)
  assert "epochs is 3 there and 5 here" in refused(epochs=5)
  (tmp_path / "w" / "peer.json").unlink()
  (tmp_path / "w" / "config.json").write_text("{}")
  assert "belongs to a job" in refused()
  config.evaluation.protocol = "sampled"
  assert "evaluation.protocol='sampled'" in refused(config)


@pytest.mark.parametrize(("changes", "text"), [
  ({"epochs": None}, "the budget is absent"),
  ({"cpu_seconds": 3.0}, "the budget is {'cpu_seconds': 3.0, 'epochs': 3}"),
  ({"epochs": 0}, "the budget is {'epochs': 0}"),
  ({"validations": 0}, "validations=0"),
  ({"python": "/no/python"}, "cannot be run (No such file or directory)"),
  ({"python": "/bin/true"}, "it is no Python interpreter"),
  ({"peer": {"version": "0.1"}},
   f"has numpy {np.__version__} and 0.1 is needed"),
  ({"peer": {"package": "no-such-package"}},
   "has no-such-package not installed"),
])
def test_what_cannot_be_run_is_refused(refused, changes, text):
  assert text in refused(**changes)


def test_a_library_that_fails_says_why(tmp_path, plan, refused):
  text = refused(options={**plan.options, "fail": "no such thing"})
  assert "exit code 1 and said last: ValueError: no such thing" in text
  log = tmp_path / "w" / "peer" / "seed0" / "log.txt"
  assert str(log) in text and "chatter" in log.read_text()


def test_options_are_read_as_json_or_text():
  texts = ["a=1e-3", "b=BPR", 'c={"d": null}', "e=", "f=x=y", "g=true"]
  assert driver.options_of(texts) == {
    "a": 0.001, "b": "BPR", "c": {"d": None}, "e": "", "f": "x=y", "g": True
  }
  for texts in (["a"], ["=3"], ["a=1", "a=2"]):
    with pytest.raises(InputError, match="give name=value"):
      driver.options_of(texts)


def test_versions_match_by_whole_parts(fake, monkeypatch):
  found = {"python": "3.11.7", "torch": None}

  def accepts(version, needed):
    text = json.dumps({**found, "numpy": version})
    done = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(driver.subprocess, "run", lambda *_, **__: done)
    try:
      driver.versions(fake._replace(version=needed), sys.executable)
    except InputError:
      return False
    return True

  assert accepts("0.19.0", "0.19") and accepts("0.19", "0.19")
  assert not accepts("0.190.0", "0.19") and not accepts("1.2.10", "1.2.1")


class TestWatch:

  @pytest.fixture
  def run(self, monkeypatch):
    """A run whose clock is its own; returns (clock, function of settings)."""
    monkeypatch.syspath_prepend(str(driver.PEERS))
    import worker

    class Clock:
      now, loads = 0.0, 0

      def scores(self, users, positions):
        self.now += 100.0  # validation is timed apart
        scores = np.zeros((len(users), 4))
        scores[:, 1 + self.loads % 3] = 1
        self.loads += 1
        yield np.arange(len(users)), scores

      def state(self):
        return self.loads

    clock = Clock()
    monkeypatch.setattr(worker.time, "process_time", lambda: clock.now)
    data = worker.protocol.Data(
      np.array([1, 2, 3, 1, 2]), np.array([0, 3, 5]), np.array([1, 1]),
      np.array([1, 1]), np.array([2, -1]), 3,
    )

    def start(**budget):
      empty = {"cpu_seconds": None, "epochs": None, "validations": 4}
      settings = worker.Settings("", "", "", 0, {}, {}, **{**empty, **budget})
      return worker.Watch(clock, data, settings, lambda line: None)

    return clock, start

  def test_validates_at_marks_of_training_time(self, run):
    clock, start = run
    watch, over = start(cpu_seconds=8.0), []
    for _ in range(5):
      clock.now += 1.75
      over.append(watch.batch())
    # Marks 2, 4, 6, 8: reached after 3.5, 5.25, 7 and 8.75 seconds.
    assert over == [False, False, False, False, True]
    assert [x[:2] for x in watch.curve] == [
      [3.5, 2], [5.25, 3], [7.0, 4], [8.75, 5]
    ]
    assert watch.spent() == 8.75 and watch.validation_seconds == 400
    # Both targets are item 2: the second of every three looks is right.
    assert watch.best == 1.0 and watch.best_step == 3 and watch.state == 2

  def test_a_long_batch_passes_marks(self, run):
    clock, start = run
    watch = start(cpu_seconds=8.0)
    clock.now += 6.5
    assert not watch.batch() and len(watch.curve) == 1
    clock.now += 1.0
    assert not watch.batch() and len(watch.curve) == 1
    clock.now += 1.0
    assert watch.batch() and len(watch.curve) == 2
    assert not watch.epoch()

  def test_validates_after_every_epoch(self, run):
    _, start = run
    watch = start(epochs=2)
    over = [watch.batch(), watch.batch(), watch.epoch(), watch.batch()]
    assert over == [False] * 4 and watch.epoch()
    assert [x[1] for x in watch.curve] == [2, 3]

  def test_every_user_is_scored(self, run, monkeypatch):
    clock, start = run
    clock.scores = lambda users, positions: iter(
      [(np.array([1]), np.zeros((1, 4)))]
    )
    with pytest.raises(ValueError, match="1 users were not scored"):
      start(epochs=1).epoch()


@pytest.mark.parametrize(("flags", "text"), [
  (["--python=/nowhere"], "--python=/nowhere cannot be run"),
  (["--python=x", "--config.backbone.wdith=3"], "unknown config key"),
  (["--python=x", "--option=a"], "--option=a; give name=value"),
  ([], "--python must have a value"),
])
def test_errors_of_a_command_are_one_line(tmp_path, flags, text):
  done = subprocess.run(
    [
      sys.executable, "-m", "third_party.recbole", "--config=tests/tiny.py",
      "--epochs=1", f"--workdir={tmp_path}/w", *flags,
    ],
    capture_output=True, text=True, check=False,
  )
  assert done.returncode == 2
  lines = done.stderr.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: ")
  assert text in lines[0]


# Under the library's interpreter: what the worker feeds and reads, against what
# the library itself makes of the same data.
CHECKS = {
  "recbole": """
import sys
sys.path.insert(0, {folder!r})
import json, numpy as np, protocol, worker, recbole_worker as own
settings = worker.Settings(**json.load(open("settings.json")))
data = protocol.read_data(settings.data)
peer = own.RecBole(data, settings)
# The library's own augmentation of the training prefixes, row for row.
feat = peer.loader.dataset.inter_feat
back = {{int(v): k for k, v in enumerate(peer.user_ids)}}
users = np.array([back[int(x)] for x in feat["user_id"]])
positions, reached = [], {{}}  # rows are in order of time, users mixed
for user in users:
  positions.append(reached.get(user, 1))
  reached[user] = positions[-1] + 1
positions = np.array(positions)
assert len(users) == data.targets.sum()
assert (np.bincount(users, minlength=len(data.targets)) == data.targets).all()
made = peer.requests(users, positions)
for key in ("user_id", "item_id_list", "item_length"):
  assert (made[key] == feat[key]).all(), key
target = peer.item_ids[data.items[data.starts[users] + positions]]
assert (target == feat["item_id"].numpy()).all()
assert peer.model.n_items == data.num_items + 1
""",
  "rectools": """
import sys
sys.path.insert(0, {folder!r})
import json, numpy as np, protocol, worker, rectools_worker as own
settings = worker.Settings(**json.load(open("settings.json")))
data = protocol.read_data(settings.data)
peer = own.RecTools(data, settings)
peer.fit(worker.Watch(peer, data, settings, print))
# The library's own ten best unseen items, where the target is among them.
ranks = worker.rank(peer, data, data.test)[0]
found = peer.model.recommend(
  users=np.arange(len(data.test)), k=10, filter_viewed=True,
  dataset=own.make_dataset(data.histories(data.test)),
)
target = data.items[data.starts + data.test]
hit = found[found["item_id"].to_numpy() == target[found["user_id"]]]
seen = [t in h for t, h in zip(target, data.histories(data.test))]
want = {{u: r for u, r in zip(hit["user_id"], hit["rank"])}}
got = {{u: r for u, r in enumerate(ranks) if r <= 10 and not seen[u]}}
assert len(want) > 10 and want == got, (want, got)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "model"), [
  (recbole, "SASRec"), (recbole, "GRU4Rec"), (recbole, "BERT4Rec"),
  (rectools, "SASRec"), (rectools, "BERT4Rec"),
])
def test_the_libraries_themselves(tmp_path, quiet, finished, adapter, model):
  package = adapter.PEER.package
  variable = f"PIN_JAX_{package.upper()}_PYTHON"
  python = os.environ.get(variable)
  if python is None:
    pytest.skip(
      f"no interpreter with {package}; make one as third_party/README.md says "
      f"and set {variable}"
    )
  plan = driver.Plan(python, model, {}, epochs=3)
  path = tmp_path / "w"
  driver.run(
    tiny.get_config(), adapter.PEER, plan, path, beside=finished,
    console=quiet,
  )
  rows = pl.read_parquet(path / "rows.parquet")
  own = rows.filter(pl.col("model") == f"{adapter.PEER.name} {model}")
  assert own["rank"].is_between(1, own["candidates"]).all()
  assert own["rank_unmasked"].n_unique() > 5
  if model == "SASRec":
    script = tmp_path / "check.py"
    script.write_text(CHECKS[package].format(folder=str(driver.PEERS)))
    subprocess.run(
      [python, str(script)], cwd=path / "peer" / "seed0", check=True
    )
  bad = plan._replace(options={"no_such_option": 1})
  with pytest.raises(InputError, match="has no option 'no_such_option'"):
    driver.run(
      tiny.get_config(), adapter.PEER, bad, tmp_path / "x", console=quiet
    )
