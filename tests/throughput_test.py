"""The driver of the throughput benchmark, with a small system in the loop."""

import argparse
import json
import sys

import numpy as np
import pytest

from benchmarks import throughput
from pin_jax.data import interactions, splits
from third_party import driver
from third_party.peers import protocol

FAKE = """
import sys
sys.path.insert(0, {folder!r})
import protocol

class Fake:
  def __init__(self, speed):
    print("chatter")  # must not reach the wire
    self.speed = speed
  def train(self, seconds):
    return self.speed * protocol.repeat(lambda: 1, 0.0)
  def evaluate(self):
    return 7
  def validate(self):
    raise ValueError("no such thing")
  def restart(self):
    pass

protocol.serve(Fake)
"""


class Timed:
  """A system whose clock is its own: every call takes what it is told."""

  def __init__(self, monkeypatch, values):
    self.now, self.values, self.trained = 0.0, list(values), []
    monkeypatch.setattr(protocol.time, "process_time", lambda: self.now)

  def train(self, seconds):
    self.trained.append(seconds)
    self.now += seconds + 0.5  # batches are whole
    return 1

  def evaluate(self):
    self.now += 2.0
    return 10

  def validate(self):
    self.now += 3.0
    return self.values.pop(0)

  def restart(self):
    self.trained.clear()


@pytest.fixture
def fake(tmp_path):
  script = tmp_path / "fake.py"
  script.write_text(FAKE.format(folder=str(driver.PEERS)))
  child = throughput.Child("fake", [sys.executable, str(script)], str(tmp_path))
  yield child
  child.close()


def test_child_answers_in_turn(fake):
  assert set(fake.ask("start", speed=3)) == {"cpu_seconds"}
  assert fake.ask("warm", seconds=0.0)["cpu_seconds"] >= 0
  assert fake.ask("train", seconds=0.0)["count"] == 3
  assert fake.ask("evaluate")["count"] == 7


def test_a_child_that_dies_tells_why(fake):
  fake.ask("start", speed=3)
  with pytest.raises(RuntimeError, match="(?s)fake: .*no such thing"):
    fake.ask("reach", target=1.0, cap=0.0, first=0.0, ratio=2.0)


class TestReach:
  def test_marks_grow_until_the_target(self, monkeypatch):
    system = Timed(monkeypatch, [0.01, 0.02, 0.03, 0.04])
    reply = protocol.reach(system, target=0.03, cap=100.0, first=4.0, ratio=2.0)
    # Marks 4, 8, 16; every training overshoots by half a second.
    assert system.trained == [4.0, 8 - 4.5, 16 - 8.5]
    assert reply == {
      "reached": True,
      "cpu_seconds": 16.5,
      "below": 8.5,
      "validation_cpu_seconds": 9.0,
      "curve": [[4.5, 0.01], [8.5, 0.02], [16.5, 0.03]],
    }

  def test_gives_up_at_the_cap(self, monkeypatch):
    system = Timed(monkeypatch, [0.01] * 9)
    reply = protocol.reach(system, target=0.03, cap=10.0, first=4.0, ratio=2.0)
    assert not reply["reached"]
    assert [t for t, _ in reply["curve"]] == [4.5, 8.5, 10.5]

  def test_marks_that_a_long_batch_passed_are_skipped(self, monkeypatch):
    system = Timed(monkeypatch, [0.0, 0.0, 1.0])
    protocol.reach(system, target=0.5, cap=100.0, first=0.1, ratio=2.0)
    # 0.6 is past 0.2 and 0.4: the next mark is 0.8, then (at 1.3) 1.6.
    np.testing.assert_allclose(system.trained, [0.1, 0.8 - 0.6, 1.6 - 1.3])

  def test_the_line_says_whether_the_cap_came_first(self):
    args = argparse.Namespace(
      quality=0.03, cap_seconds=9.0, first_mark=1.0, mark_ratio=2.0
    )
    reply = {
      "reached": False, "cpu_seconds": 9.04, "below": 5.0, "curve": [],
      "validation_cpu_seconds": 1.0,
    }

    class Slow:
      name = "slow"

      def ask(self, do, **options):
        assert (do, options["cap"], options["target"]) == ("reach", 9.0, 0.03)
        return reply

    assert throughput.measure_quality(Slow(), args)["cpu_seconds"] == "> 9.0"
    reply["reached"] = True
    assert throughput.measure_quality(Slow(), args)["cpu_seconds"] == 9.0


def test_ratios_are_of_the_same_round():
  # Medians of the rates alone would give 20 / 10 = 2.
  pairs = [(10.0, 1.0), (20.0, 10.0), (30.0, 20.0)]
  assert throughput.summary(pairs) == {
    "ours": 20.0, "peer": 10.0, "ratio": 2.0, "lowest": 1.5, "highest": 10.0
  }
  pairs = [(10.0, 5.0), (20.0, 1.0), (30.0, 10.0)]
  assert throughput.summary(pairs)["ratio"] == 3.0


def test_rounds_alternate_who_is_first():
  calls = []

  class System:
    def __init__(self, name, rate):
      self.name, self.rate = name, rate

    def ask(self, do, **options):
      calls.append((do, self.name, options.get("seconds")))
      return {"count": self.rate * 2, "cpu_seconds": 2.0}

  args = argparse.Namespace(rounds=2, seconds=1.0, peer_seconds=9.0)
  children = [System("ours", 60), System("torch eager", 30), System("x", 2)]
  lines = throughput.measure_rates(children, args)
  train = [call[1:] for call in calls if call[0] == "train"]
  assert train == [
    ("ours", 1.0), ("torch eager", 1.0), ("ours", 1.0), ("x", 9.0),
    ("torch eager", 1.0), ("ours", 1.0), ("x", 9.0), ("ours", 1.0),
  ]
  assert {(r["measure"], r["system"]): r["ratio"] for r in lines} == {
    ("train", "torch eager"): 2.0, ("train", "x"): 30.0,
    ("evaluate", "torch eager"): 2.0, ("evaluate", "x"): 30.0,
  }


@pytest.fixture
def split():
  rows = {3: [5, 6, 7], 1: [5, 5, 8, 9, 6], 2: [9, 6, 5, 7]}
  users = [user for user, items in rows.items() for _ in items]
  return splits.leave_one_out(interactions.from_columns(
    np.array(users), np.concatenate(list(rows.values())),
    np.arange(len(users)), name="toy",
  ))


def test_the_file_holds_every_history(tmp_path, split):
  path = str(tmp_path / "data.npz")
  protocol.write_data(path, driver.data_of(split))
  read = protocol.read_data(path)
  assert read.num_items == 5
  # Users 1, 2, 3; items 5..9 are 1..5.
  whole = [[1, 1, 4, 5, 2], [5, 2, 1, 3], [1, 2, 3]]
  for counts, kept in (
    (read.train_end, [3, 2, 1]), (read.validation, [3, 2, 1]),
    (read.test, [4, 3, 2]), (read.test + 1, [5, 4, 3]),
  ):
    histories = [x.tolist() for x in read.histories(counts)]
    assert histories == [x[:n] for x, n in zip(whole, kept, strict=True)]
  chosen = np.array([2, 0])
  (last, first) = read.histories(read.test[chosen], chosen)
  assert (last.tolist(), first.tolist()) == ([1, 2], [1, 1, 4, 5])
  row, seen = protocol.seen_items(read, chosen, read.validation[chosen])
  assert row.tolist() == [0, 1, 1, 1]
  assert seen.tolist() == [1, 1, 1, 4]
  assert read.targets.tolist() == [2, 1, 0]


def test_all_choose_the_same_users():
  data = protocol.Data(np.zeros(9), np.arange(10), *[np.zeros(9, int)] * 3, 1)
  first = protocol.chosen_users(data, 4)
  assert len(set(first)) == 4 and first.tolist() == sorted(first)
  assert protocol.chosen_users(data, 4).tolist() == first.tolist()
  assert protocol.chosen_users(data, 99).tolist() == list(range(9))


def test_ranks_by_hand():
  scores = np.array([
    [9.0, 3, 5, 3, 4, 6],
    [9.0, 1, 1, 1, 1, 1],
    [9.0, -np.inf, 2, -np.inf, 0, -np.inf],
    [9.0, np.nan, 2, 3, 4, 5],
  ])
  # Row 0: target 3 (score 3), seen 5 and the target itself; above: 2, 4, and
  # unmasked 5; tied: 1. Row 1: five tied, one seen. Row 2: the target has no
  # score, nor do 3 and 5, of which 5 is seen. Row 3: the target is no number.
  found = protocol.ranks_of(
    scores, np.array([3, 2, 1, 1]), np.array([0, 0, 1, 2]),
    np.array([5, 3, 1, 5]),
  )
  assert found.rank.tolist() == [3.5, 2.5, 3.5, 5]
  assert found.candidates.tolist() == [4, 4, 4, 5]
  assert found.rank_unmasked.tolist() == [4.5, 3, 4, 5]
  assert found.candidates_unmasked.tolist() == [5] * 4


def test_ndcg_by_hand():
  np.testing.assert_allclose(
    protocol.ndcg(np.array([1.0, 3.0, 10.0, 10.5])),
    [1.0, 0.5, 1 / np.log2(11), 0.0],
  )


def test_a_peer_without_a_flag_is_left_out():
  args = argparse.Namespace(
    torch_python="/t", recbole_python=None, rectools_python=None
  )
  found = throughput.commands(args)
  assert list(found) == ["ours", "torch eager", "torch compiled"]
  assert found["torch compiled"][0] == "/t"
  assert found["torch compiled"][-1] == "--compile"


def test_settings_are_the_configs(tmp_path):
  path = tmp_path / "toy.csv"
  rows = [f"{u},{u + t},{t}" for u in range(9) for t in range(5)]
  path.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
  args = argparse.Namespace(seed=3, eval_users=4)
  settings = throughput.write_inputs(str(path), str(tmp_path), args)
  assert json.loads(json.dumps(settings)) == settings
  assert settings["length"] == 32 and settings["width"] == 64
  assert settings["batch_size"] == 255 and settings["num_steps"] == 2500
  assert settings["optimizer"]["learning_rate"] == 2e-3
  assert protocol.read_data(settings["data"]).targets.tolist() == [2] * 9
