"""The row-sparse optimizer against numpy loops and the dense step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import RULES, assert_trees_close

from experiments import build
from experiments.configs import base
from pin_jax.data.batches import Draw, Sequences, make_pool
from pin_jax.models.gru4rec import gru4rec
from pin_jax.training import losses, negatives, sparse
from pin_jax.training.loop import compile_steps
from pin_jax.training.optimizers import Optimizer
from pin_jax.training.steps import (
  Adjustment,
  Operands,
  backbone_step,
  init_state,
)
from pin_jax.types import InputError

pytestmark = pytest.mark.usefixtures("compile_quickly")
TABLES = ("items", "bias")
RATE, B1, B2, EPS, DECAY = 0.1, 0.9, 0.98, 1e-8, 0.05


def numpy_lazy_adam(params, touched, gradients):
  """Decoupled-decay Adam whose moments move where `touched` says, [T, V]."""
  params = {k: v.astype(np.float64) for k, v in params.items()}
  first = {k: np.zeros_like(v) for k, v in params.items()}
  second = {k: np.zeros_like(v) for k, v in params.items()}
  for t, gradient in enumerate(gradients):
    for name, value in params.items():
      rows = np.flatnonzero(touched[t]) if name in TABLES else range(len(value))
      for v in rows:
        g = gradient[name][v]
        m = first[name][v] = B1 * first[name][v] + (1 - B1) * g
        s = second[name][v] = B2 * second[name][v] + (1 - B2) * g**2
        m, s = m / (1 - B1 ** (t + 1)), s / (1 - B2 ** (t + 1))
        value[v] = value[v] - RATE * (m / (np.sqrt(s) + EPS) + DECAY * value[v])
  return params, first, second


def test_row_sparse_adam_against_a_loop():
  rng = np.random.default_rng(0)
  size, steps = 9, 12
  params = {
    "items": rng.normal(size=(size, 3)), "bias": rng.normal(size=size),
    "kernel": rng.normal(size=(4, 2)),
  }
  touched = rng.random((steps, size)) < 0.4
  gradients = [
    {k: rng.normal(size=v.shape) for k, v in params.items()}
    for _ in range(steps)
  ]
  want, first, second = numpy_lazy_adam(params, touched, gradients)

  optimizer = sparse.row_sparse(
    optax.adamw(RATE, B1, B2, EPS, weight_decay=DECAY), TABLES
  )
  got = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  state = optimizer.init(got)

  @jax.jit
  def step(got, state, gradient, rows):
    few = {
      k: sparse.take_rows(v, rows) if k in TABLES else v
      for k, v in got.items()
    }
    updates, state = optimizer.update(gradient, state, few, rows=rows)
    return sparse.add_rows(got, updates, rows, TABLES), state

  for t, gradient in enumerate(gradients):
    rows = np.flatnonzero(touched[t])
    fill = size + np.arange(size - len(rows))  # none
    for name in TABLES:
      few = np.zeros((size, *gradient[name].shape[1:]))
      few[: len(rows)] = gradient[name][rows]
      gradient[name] = few
    gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
    got, state = step(got, state, gradient, np.concatenate([rows, fill]))
  assert_trees_close(got, want, 1e-5)
  assert_trees_close(state[0].mu, first, 1e-5)
  assert_trees_close(state[0].nu, second, 1e-5)


ITEMS, LENGTH = 60, 4


def steps_of(row_sparse, optimizer, shared, proposal, rule, num_steps):
  """Params after some steps of stage 1 on random data, and the logs."""
  rng = np.random.default_rng(1)
  lengths = rng.integers(2, 12, 20)
  starts = np.cumsum(lengths) - lengths
  items = rng.integers(1, 30, lengths.sum())  # half of them never occur
  groups = np.arange(20) % 2
  as_int32 = lambda x: jnp.asarray(x, jnp.int32)
  sequences = Sequences(
    as_int32(items), as_int32(starts), as_int32(lengths - 1)
  )
  pool = make_pool(lengths - 1, groups, num_groups=2, length=LENGTH)
  counts = np.bincount(items, minlength=ITEMS + 1)
  proposal = {
    "uniform": lambda: negatives.uniform(ITEMS),
    "in_batch": lambda: negatives.in_batch(np.stack([counts] * 2), groups),
  }[proposal]()
  loss = losses.sampled(
    losses.SAMPLED_LOSSES["sampled_softmax"](0.1, 0), proposal, count=5,
    shared=shared,
  )
  backbone = gru4rec(ITEMS, length=LENGTH, width=4, dropout=0.2)
  if row_sparse:
    optimizer = sparse.row_sparse(optimizer, backbone.tables)
  weighting = RULES[rule]([0.3, 0.7])
  optimizer = Optimizer(
    optimizer, lambda *_: 0.0, tables=backbone.tables if row_sparse else ()
  )
  adjustment = Adjustment(weighting, diagnose_every=2)
  step = backbone_step(
    backbone, adjustment, optimizer, Draw(3, LENGTH),
    loss=loss,
  )
  params = backbone.init(jax.random.key(0))
  state = init_state(params, optimizer, adjustment)
  operands = Operands(jax.random.key(2), sequences, pool, None)
  state, logs = compile_steps(step)(state, operands, 0, num_steps)
  return params, state, logs


@pytest.mark.parametrize(
  "shared, proposal, rule",
  [
    (False, "in_batch", "upgrad"),
    pytest.param(True, "uniform", "backdoor", marks=pytest.mark.slow),
  ],
)
def test_sgd_by_rows_is_sgd(shared, proposal, rule):
  """Without moments there is nothing lazy: both ways are the same."""
  case = optax.sgd(0.5), shared, proposal, rule, 8
  start, dense, dense_logs = steps_of(False, *case)
  _, rows, logs = steps_of(True, *case)
  assert_trees_close(rows.params, dense.params)
  assert float(jnp.abs(dense.params["items"] - start["items"]).max()) > 0.01
  np.testing.assert_allclose(logs["loss"], dense_logs["loss"], rtol=1e-5)
  np.testing.assert_allclose(logs["norms"], dense_logs["norms"], rtol=1e-4)
  assert np.isfinite(logs["cosines"][::2]).all()
  np.testing.assert_allclose(logs["cosines"], dense_logs["cosines"], atol=1e-4)
  if proposal == "in_batch":  # items from 30 up are never read
    for name in TABLES:
      np.testing.assert_array_equal(
        rows.params[name][30:], start[name][30:]
      )


@pytest.mark.parametrize(
  "changes, key",
  [
    ({"loss.name": "softmax"}, "loss.name='softmax'"),
    ({"optimizer.average": 0.9}, "optimizer.average=0.9"),
    ({"backbone.name": "din"}, "backbone.name='din'"),
  ],
)
def test_what_reads_or_writes_every_row_is_refused(changes, key):
  config = base.default()
  config.loss.name, config.optimizer.tables = "sampled_softmax", "row_sparse"
  build.check(config)
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=key):
    build.check(config)
