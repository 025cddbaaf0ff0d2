"""Times a PIN step against the joint step on the same sequences, pair-wise.

    python -m benchmarks.aggregation
    python -m benchmarks.aggregation --items=12000 --groups=5 --rows=250

Both steps are whole: gradient, aggregation, AdamW update, compiled once, on the
same windows (SASRec, lengths distributed as in the Amazon sets). Every round
runs each step once, in turn; a ratio is the median over rounds of processor
time over the joint step's of the same round, with the lowest and the highest.
Memory is the peak that the compiler plans for beside arguments and results.

Rows of the table:

    joint          one gradient over all windows
    joint, micro   the same gradient accumulated over G micro-batches (windows
                   dealt out regardless of group): what a PIN step that
                   accumulates group by group is to be compared with
    RULE, PATH     G group gradients, weighted by the rule on the path
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
from absl import app, flags

from pin_jax import aggregation
from pin_jax.aggregation import weightings
from pin_jax.models.sasrec import sasrec
from pin_jax.training import objectives
from pin_jax.types import Backbone, Batch, PyTree

_ITEMS = flags.DEFINE_multi_integer(
  "items", [3_500, 12_000, 100_000], "catalogue sizes V"
)
_GROUPS = flags.DEFINE_multi_integer("groups", [2, 5, 10, 20], "numbers G")
_ROWS = flags.DEFINE_integer("rows", 240, "windows a step, over all groups")
_LENGTH = flags.DEFINE_integer("length", 32, "L")
_WIDTH = flags.DEFINE_integer("width", 64, "D")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "rounds of the timing")
_RULES = flags.DEFINE_multi_string(
  "rules", ["backdoor", "upgrad"], "weightings to time"
)
_SEED = flags.DEFINE_integer("seed", 0, "of the windows and the parameters")


class Case(NamedTuple):
  """A compiled step: name, function of its state, peak bytes."""

  name: str
  run: Callable[[], Any]
  peak: int


def windows(num_items: int, groups: int) -> Batch:
  """Windows [G, B, L]; group g holds the g-th quantile of the lengths."""
  rng = np.random.default_rng(_SEED.value)
  rows = _ROWS.value // groups
  lengths = np.sort(1 + rng.geometric(0.25, groups * rows))
  lengths = np.minimum(lengths, _LENGTH.value).reshape(groups, rows, 1)
  items = rng.zipf(1.3, (groups, rows, _LENGTH.value + 1)) % num_items + 1
  real = np.arange(_LENGTH.value) >= _LENGTH.value - lengths
  history = np.where(real, items[..., :-1], 0).astype(np.int32)
  targets = np.where(real, items[..., 1:], 0).astype(np.int32)
  users = np.arange(groups * rows).reshape(groups, rows)
  return Batch(*map(jnp.asarray, (users, history, targets)))


def compile_step(
  name: str, backbone: Backbone, batch: Batch,
  weighting: aggregation.Weighting, path: str,
) -> Case:
  """Compiles one step on the batch [G, B, L]; its state is donated."""
  params = jax.jit(backbone.init)(jax.random.key(_SEED.value))
  losses = objectives.group_losses(backbone, mean="interactions")
  aggregator = aggregation.aggregate(
    losses.group_loss, weighting, path=path,
    weighted_loss=losses.weighted_loss,
  )
  optimizer = optax.adamw(1e-3)
  keys = jax.random.split(jax.random.key(_SEED.value), len(batch.users))
  groups = objectives.GroupBatch(batch, None)

  def step(state: PyTree, groups: PyTree, keys: jax.Array) -> PyTree:
    params, opt_state, rule_state = state
    out = aggregator.step(params, groups, keys, rule_state)
    updates, opt_state = optimizer.update(out.gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, opt_state, out.state), (out.losses, out.weights)

  state = params, optimizer.init(params), aggregator.init(params)
  run_step = jax.jit(step, donate_argnums=0)
  compiled = run_step.lower(state, groups, keys).compile()

  def run() -> None:
    nonlocal state
    state, logs = compiled(state, groups, keys)
    jax.block_until_ready((state, logs))

  return Case(name, run, compiled.memory_analysis().temp_size_in_bytes)


def cases(num_items: int, groups: int) -> list[Case]:
  """The joint step and every path of every rule."""
  backbone = sasrec(num_items, length=_LENGTH.value, width=_WIDTH.value)
  batch = windows(num_items, groups)
  shuffled = np.random.default_rng(_SEED.value).permutation(batch.users.size)
  deal = lambda x: x.reshape(-1, *x.shape[2:])[shuffled].reshape(x.shape)
  one = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)
  build = functools.partial(compile_step, backbone=backbone)
  whole = aggregation.backdoor([1])
  found = [build("joint", batch=one, weighting=whole, path="weighted")]
  shares = np.ones(groups)
  found.append(build(
    "joint, micro", batch=jax.tree.map(deal, batch),
    weighting=aggregation.backdoor(shares), path="accumulated",
  ))
  for rule in _RULES.value:
    make = weightings.WEIGHTINGS[rule]
    weighting = make(shares) if rule == "backdoor" else make()
    known = () if weighting.reads == "nothing" else ("accumulated", "weighted")
    found += [
      build(f"{rule}, {path}", batch=batch, weighting=weighting, path=path)
      for path in aggregation.PATHS if path not in known
    ]
  return found


def ratios(found: Sequence[Case]) -> tuple[list[list[float]], float]:
  """[case][round] processor time over the first case's, and that in s."""
  seconds = [[] for _ in found]
  for case in found:
    case.run()
  for _ in range(_ROUNDS.value):
    for times, case in zip(seconds, found, strict=True):
      start = time.process_time()
      case.run()
      times.append(time.process_time() - start)
  over = [
    [t / base for t, base in zip(times, seconds[0], strict=True)]
    for times in seconds
  ]
  return over, statistics.median(seconds[0])


def main(argv: Sequence[str]) -> None:
  """Prints one table for every catalogue and number of groups."""
  del argv
  console = rich.console.Console(width=100)
  for num_items in _ITEMS.value:
    for groups in _GROUPS.value:
      found = cases(num_items, groups)
      over, seconds = ratios(found)
      table = rich.table.Table(
        "step", "ratio", "lowest", "highest", "peak MB",
        title=(
          f"V = {num_items:,}, G = {groups}, {_ROWS.value} windows of "
          f"{_LENGTH.value}, D = {_WIDTH.value}, "
          f"{jax.default_backend()}: joint step {seconds:.3f} CPU-s"
        ),
      )
      for case, values in zip(found, over, strict=True):
        numbers = statistics.median(values), min(values), max(values)
        table.add_row(
          case.name, *(f"{x:.2f}" for x in numbers), f"{case.peak / 1e6:.0f}"
        )
      console.print(table)


if __name__ == "__main__":
  app.run(main)
