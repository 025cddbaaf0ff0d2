"""Several runs at once: run k is the single run with its seed.

The reference is the loop of one run: tests/training_test.py checks it by hand.
"""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import rich.console
from etils import epath
from toys import assert_trees_close, bigram
from training_test import (
  NUM_ITEMS,
  assert_trees_equal,
  counting_step,
  data_of,
  random_sequences,
)

from experiments import job, report, serve
from experiments.logs import read_log
from pin_jax.aggregation import weightings
from pin_jax.data.batches import Draw
from pin_jax.models import gru4rec, plugins
from pin_jax.training import checkpoints, loop
from pin_jax.training.optimizers import make_optimizer
from pin_jax.training.steps import (
  Adjustment,
  Operands,
  TrainState,
  backbone_step,
  init_state,
  join_runs,
  many,
  plugin_step,
)
from pin_jax.types import TrainingError
from tests import tiny

LENGTH, STEPS, SEEDS = 4, 20, (0, 1, 5)
# The toy's few products are summed in one order with and without the axis; the
# GRU's small matrix products are not, which leaves the last bits of float32.
# (SASRec would not do: its keys' biases have no gradient but rounding, and Adam
# scales that up.)
BACKBONES = {
  "toy": (bigram(NUM_ITEMS, dropout=0.3), 0),
  "gru": (
    gru4rec.gru4rec(NUM_ITEMS, length=LENGTH, width=4, dropout=0.3), 1e-6
  ),
}


pytestmark = pytest.mark.usefixtures("compile_quickly")


def compare(got, want, tolerance):
  if tolerance:
    assert_trees_close(got, want, tolerance)
  else:
    assert_trees_equal(got, want)


def of_run(tree, k):
  return jax.tree.map(lambda x: x[k], tree)


def key_of(seed, name):
  return jax.random.fold_in(jax.random.key(seed), name)


def stage_1(backbone, *, diagnose_every=4):
  """-> (step, seed -> (state, operands)) with state in every part."""
  sequences, pool = data_of(
    random_sequences([3, 5, 7, 9, 12, 4]), [0, 0, 1, 1, 1, 0], LENGTH
  )
  rule = weightings.streaming_dro([0.4, 0.6], 0.1)
  adjustment = Adjustment(rule, diagnose_every=diagnose_every)
  optimizer = make_optimizer(
    STEPS, learning_rate=0.05, warmup=3, average=0.8
  )
  step = backbone_step(
    backbone, adjustment, optimizer, Draw(3, LENGTH, mean="users")
  )
  init = jax.jit(backbone.init)

  def start(seed):
    state = init_state(init(key_of(seed, 0)), optimizer, adjustment)
    key = key_of(seed, 1)
    return state, Operands(key, sequences, pool, None)

  return step, start


def stage_2():
  """The same for plugins, on a backbone of each seed's own."""
  backbone = bigram(NUM_ITEMS)
  plugin = plugins.bottleneck(NUM_ITEMS + 1, hidden=3)
  sequences, pool = data_of(
    random_sequences([4, 6, 5, 7]), [0, 0, 1, 1], LENGTH
  )
  optimizer = make_optimizer(STEPS, learning_rate=0.05, warmup=0)
  step = plugin_step(
    backbone, plugin, optimizer, Draw(2, LENGTH, "users", "users")
  )
  init = jax.jit(lambda key: plugins.init_stacked(plugin, key, 2))

  def start(seed):
    state = init_state(init(key_of(seed, 2)), optimizer, stacked=True)
    frozen = backbone.init(key_of(seed, 0))
    return state, Operands(key_of(seed, 3), sequences, pool, frozen)

  return step, start


def joined(start, seeds=SEEDS):
  states, operands = zip(*map(start, seeds), strict=True)
  return join_runs(states), Operands(
    join_runs([x.key for x in operands]), operands[0].sequences,
    operands[0].pool, join_runs([x.frozen for x in operands]),
  )


@jax.jit
def wave(params):
  """Validation values that go up and down as params change, by slot."""
  leaf = jax.tree.leaves(params)[-1]
  slots = leaf.reshape(2, -1) if leaf.ndim == 3 else leaf.reshape(1, -1)
  values = jnp.sin(40 * slots.std(-1))
  return {str(slot): value for slot, value in enumerate(values)}


def plan_of(*, stacked=False, **options):
  options = {"num_steps": STEPS, "evaluate_every": 4, "dispatch": 2} | options
  select = ("0", "1") if stacked else ("0",)
  return loop.Plan(select=select, stacked=stacked, **options)


def note(event, logs, values):
  """Keeps what an event says, by step."""
  if isinstance(event, loop.Steps):
    logs[event.start] = event.logs
  if isinstance(event, loop.Validation):
    values[event.step] = dict(event.values)


def fit_one(step, start, seed, **options):
  """-> (result, logs by step, values by step)."""
  logs, values = {}, {}
  for event in loop.run(
    step, *start(seed), plan_of(**options), lambda k, params: wave(params)
  ):
    note(event, logs, values)
  return event, logs, values


def fit_all(step, start, *, checkpoints=None, watch=lambda event: None,
            **options):
  """The same of all seeds at once; [N] of each."""
  logs, values, results = [{} for _ in SEEDS], [{} for _ in SEEDS], []
  names = tuple(f"seed{s}" for s in SEEDS)
  for event in loop.run(
    many(step), *joined(start), plan_of(names=names, **options),
    lambda k, params: wave(params), checkpoints=checkpoints,
  ):
    note(event, logs[event.run], values[event.run])
    watch(event)
    if isinstance(event, loop.Result):
      results.append(event)
  return list(zip(results, logs, values, strict=True))


def unrolled(step, state, operands):
  body = lambda s, t: step(s, operands, t)
  return jax.lax.scan(body, state, jnp.arange(STEPS))


@pytest.mark.parametrize("name", [
  "toy",
  *(pytest.param(x, marks=pytest.mark.slow) for x in BACKBONES if x != "toy"),
])
def test_the_state_of_run_k_is_that_of_seed_k(name):
  backbone, tolerance = BACKBONES[name]
  step, start = stage_1(backbone)
  several = many(step)
  together = jax.jit(lambda *args: unrolled(several, *args))(*joined(start))
  alone = jax.jit(lambda *args: unrolled(step, *args))
  for k, seed in enumerate(SEEDS):
    state, logs = alone(*start(seed))
    compare(of_run(together[0], k), state, tolerance)
    compare(
      together[1]["loss"][:, k], logs["loss"], tolerance
    )
  with pytest.raises(AssertionError):
    assert_trees_close(of_run(together[0], 0), of_run(together[0], 1), 0.01)


@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_fit_finds_for_run_k_is_what_it_finds_alone(stage, patience):
  step, start = stage_1(BACKBONES["toy"][0]) if stage == 1 else stage_2()
  tolerance = 0 if stage == 1 else 1e-6
  options = {"patience": patience, "stacked": stage == 2}
  options["evaluate_first"] = stage == 2
  together = fit_all(step, start, **options)
  stops = set()
  for seed, (result, logs, values) in zip(SEEDS, together, strict=True):
    alone, own_logs, own_values = fit_one(step, start, seed, **options)
    compare(result.best, alone.best, tolerance)
    assert result.best_steps == alone.best_steps
    np.testing.assert_allclose(
      result.best_values, alone.best_values, rtol=20 * tolerance
    )
    assert result.last_step == alone.last_step
    assert values.keys() == own_values.keys()
    compare(logs, own_logs, 10 * tolerance)
    stops.add(result.last_step)
  assert (len(stops) > 1) == bool(patience)  # the seeds stop apart


def _conds(jaxpr):
  """How many branches a program has, those of its parts included."""
  parts = jax.tree.leaves(
    [equation.params for equation in jaxpr.eqns],
    is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
  )
  own = sum(equation.primitive.name == "cond" for equation in jaxpr.eqns)
  return own + sum(
    _conds(getattr(x, "jaxpr", x)) for x in parts
    if hasattr(x, "eqns") or hasattr(x, "jaxpr")
  )


def test_a_look_every_few_steps_stays_a_branch():
  conds = {}
  backbone = BACKBONES["toy"][0]
  for every in (0, 4):
    step, start = stage_1(backbone, diagnose_every=every)
    at_own = jax.vmap(step, (0, Operands(0, None, None, 0), 0))
    conds[every] = [
      _conds(jax.make_jaxpr(f)(*args, t).jaxpr)
      for f, args, t in (
        (step, start(0), jnp.int32(0)),
        (many(step), joined(start), jnp.int32(0)),
        (at_own, joined(start), jnp.zeros(len(SEEDS), jnp.int32)),
      )
    ]
  one, together, at_own_steps = np.subtract(conds[4], conds[0])
  assert one == together > at_own_steps


# The loop alone, with a step that counts and scripted values.


def scripted(values, *, step=None, **options):
  """Two runs; -> (results, steps delivered and evaluations of each)."""
  calls = [([], []) for _ in values]
  scripts = [iter(own) for own in values]

  def several(state, operands, t):
    state, log = (step or counting_step())(state, operands, t)
    loss = jnp.zeros((len(values), 2)).at[-1].set(log["loss"])
    return state, {"loss": loss, "t": jnp.full(len(values), t)}

  params = {"w": jnp.arange(len(values)) * 100.0}
  results = []
  for event in loop.run(
    several, TrainState(params, (), (), None), None,
    plan_of(names=("first", "second"), **{"num_steps": 40, **options}),
    lambda k, params: {"0": next(scripts[k])},
  ):
    if isinstance(event, loop.Steps):
      calls[event.run][0].extend(event.logs["t"].tolist())
    if isinstance(event, loop.Validation):
      calls[event.run][1].append(event.step)
    if isinstance(event, loop.Result):
      results.append(event)
  return results, calls


def test_each_run_stops_and_is_selected_by_itself():
  results, calls = scripted(
    [[0.5, 0.4, 0.5, 9, 9], [0.1, 0.2, 0.3, 0.2, 0.2]], patience=2
  )
  assert [r[1:4] for r in results] == [([4], [0.5], 12), ([12], [0.3], 20)]
  assert [float(r.best["w"]) for r in results] == [4, 112]
  for (steps, evaluations), last in zip(calls, (12, 20), strict=True):
    assert steps == list(range(last))
    assert evaluations == list(range(4, last + 1, 4))


def test_a_loss_that_is_not_finite_names_its_run():
  step = counting_step(bad_at=7)
  with pytest.raises(TrainingError, match=r"^second: .*\[1\].*nan at step 7"):
    scripted([[0.1] * 9] * 2, step=step)


def test_a_stopped_run_may_diverge():
  results, _ = scripted(
    [[0.1, 0.2, 0.3, 0.3], [0.2, 0.1]], step=counting_step(bad_at=9),
    patience=1,
  )
  assert [r.last_step for r in results] == [16, 8]


class Stop(Exception):
  """Stands for a crash."""


def test_resumed_equals_uninterrupted(tmp_path):
  step, start = stage_1(BACKBONES["toy"][0])
  whole = fit_all(step, start, patience=1)
  last = [result.last_step for result, *_ in whole]
  crash = sorted(set(last))[1]  # one run has stopped, the others go on
  resumed = []

  def watch(event):
    if isinstance(event, loop.Started):
      resumed.append(event)

  def dying(event):
    watch(event)
    if isinstance(event, loop.Validation) and event.step == crash:
      raise Stop

  for one in (dying, watch):
    saved = checkpoints.Checkpoints(tmp_path)
    again = None
    try:
      again = fit_all(step, start, patience=1, checkpoints=saved, watch=one)
    except Stop:
      pass
    saved.close()
  assert resumed == [(k, -1) for k in range(len(last))] + [
    (k, min(t, crash - 4)) for k, t in enumerate(last)
  ]
  for (result, logs, _), (want, own_logs, _) in zip(again, whole, strict=True):
    assert_trees_equal(result.best, want.best)
    assert result[1:4] == want[1:4]
    kept = {t: log for t, log in own_logs.items() if t >= crash - 4}
    assert_trees_equal(logs, kept)


def test_cost_is_shared_out_among_the_running(monkeypatch):
  now = iter([10.0, 14.0, 20.0, 23.0])  # at the start, after validations
  monkeypatch.setattr(loop.time, "process_time", lambda: next(now))
  results, _ = scripted([[0.1, 0.1], [0.1, 0.2, 0.2]], patience=1)
  assert [r.cpu_seconds for r in results] == [2 + 3, 2 + 3 + 3]


# The job.


def tiny_config(num_seeds):
  config = tiny.get_config()
  config.backbone_steps, config.plugin_steps = 12, 8
  config.classifier_steps = 8
  config.pin.diagnose_every = 4
  config.dispatch, config.validation.every = 4, 4
  config.seeds, config.num_seeds = (0, 1), num_seeds
  return config


@pytest.fixture
def _no_tables(monkeypatch):
  """Tables and plots take longer than the training of these jobs."""
  monkeypatch.setattr(report, "write_report", lambda *args, **kwargs: None)


def run_job(config, workdir):
  console = rich.console.Console(file=io.StringIO(), width=100)
  job.run(config, workdir, console)
  rows = pl.read_parquet(workdir / "rows.parquet")
  summary = json.loads((workdir / "summary.json").read_text())
  return rows, read_log(epath.Path(workdir)), summary["cost"]


def assert_jobs_equal(one_by_one, at_once):
  (rows, log, cost), (others, other_log, other_cost) = one_by_one, at_once
  assert others.equals(rows)
  assert other_cost.keys() == cost.keys()
  for run, expected in cost.items():
    got = other_cost[run]
    assert got["steps"] == expected["steps"]
    assert got["best_steps"] == expected["best_steps"]
    np.testing.assert_allclose(got["validation"], expected["validation"])
  for run in cost:
    own, got = (
      [r for r in records if r["run"] == run] for records in (log, other_log)
    )
    assert [r["step"] for r in got] == [r["step"] for r in own]
    for a, b in zip(got, own, strict=True):
      assert a.keys() == b.keys()
      if "loss" in a:
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
  assert {r["run"] for r in other_log} == set(cost)


@pytest.mark.usefixtures("_no_tables")
@pytest.mark.slow
def test_a_job_of_seeds_at_once_is_the_job_of_one_after_another(
  tmp_path, monkeypatch
):
  one_by_one = run_job(tiny_config(1), tmp_path / "one")
  whole = loop.run

  def dying(step, state, operands, plan, *args, **kwargs):
    for event in whole(step, state, operands, plan, *args, **kwargs):
      yield event
      steps = isinstance(event, loop.Steps) and event.start
      if plan.names[event.run] == "seed1/pin/backbone" and steps >= 8:
        raise Stop

  monkeypatch.setattr(loop, "run", dying)
  with pytest.raises(Stop):
    run_job(tiny_config(2), tmp_path / "two")
  monkeypatch.setattr(loop, "run", whole)
  at_once = run_job(tiny_config(2), tmp_path / "two")
  assert_jobs_equal(one_by_one, at_once)
  runs = {"base", "pin/backbone", "pin/plugins"}
  assert set(at_once[2]) == {f"seed{k}/{run}" for k in (0, 1) for run in runs}
  for run in at_once[2]:
    assert list((tmp_path / "two" / "events" / run).glob("events*"))
  entries = (tmp_path / "two" / "checkpoints").iterdir()
  names = {path.name.rpartition("-")[0] for path in entries if path.is_dir()}
  assert names == {f"{run.replace('/', '-')}-seeds0-1" for run in runs}


@pytest.mark.slow
@pytest.mark.usefixtures("_no_tables")
def test_every_stage_trains_seeds_at_once(tmp_path):
  jobs = []
  for num_seeds in (1, 2):
    config = tiny_config(num_seeds)
    config.methods = ("base", "pin_exact", "fine_tuned")
    config.validation.patience, config.optimizer.average = 1, 0.5
    jobs.append(run_job(config, tmp_path / str(num_seeds)))
  assert_jobs_equal(*jobs)
  served = [
    serve.recommender(tmp_path / n, method="pin_exact", seed=1).routes.slots
    for n in ("1", "2")
  ]
  assert_trees_close(*served, 1e-3)
