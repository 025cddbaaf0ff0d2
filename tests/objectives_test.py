"""Objectives: which logits the losses see, keys, memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from toys import bigram

from pin_jax.models import sasrec
from pin_jax.models.backbones import tied_score
from pin_jax.training import losses, negatives, objectives
from pin_jax.types import Backbone, Batch

ITEMS, WIDTH = 9, 4
TARGETS = jnp.asarray([[0, 0, 4, 4], [7, 2, 9, 1], [0, 5, 5, 3]])
HISTORY = jnp.where(TARGETS > 0, jnp.roll(TARGETS, 1, 1) % ITEMS + 1, 0)
BATCH = Batch(jnp.arange(3), HISTORY, TARGETS)
NAMES = tuple(losses.SAMPLED_LOSSES)


pytestmark = pytest.mark.usefixtures("compile_quickly", "few_at_a_time")


def _spec(name, shared=True, count=5, num_items=ITEMS):
  loss = losses.SAMPLED_LOSSES[name](count / (num_items - 1), 0.75)
  return losses.sampled(
    loss, negatives.uniform(num_items), count=count, shared=shared
  )


def _target_attention():
  """A model whose representation depends on the candidate."""

  def init(key):
    return {
      "items": jax.random.normal(key, (ITEMS + 1, WIDTH)),
      "bias": jnp.linspace(-1, 1, ITEMS + 1),
    }

  def represent(params, states, candidates):
    table = params["items"]
    table = table if candidates is None else table[candidates]
    return states[:, None] * jnp.tanh(
      jnp.broadcast_to(table, (len(states), *table.shape[-2:]))
    )

  return Backbone(
    init, lambda params, history, key=None: params["items"][history],
    lambda context, rows, columns: context[rows, columns], represent,
    tied_score,
  )


BACKBONES = {
  "sasrec": functools.partial(
    sasrec.sasrec, ITEMS, length=4, width=WIDTH, blocks=1, heads=1, dropout=0.0
  ),
  "attention": _target_attention,
}


def _row_loss(name, logits, target, items):
  """One position, by hand; `logits` of the whole catalogue, float64."""
  kept = [v for v in items if v != target]
  own, others = logits[target], logits[kept]
  sigmoid = scipy.special.expit
  if name == "sampled_softmax":
    estimate = np.exp(others).sum() * ITEMS / len(items)
    return -math.log(math.exp(own) / (math.exp(own) + estimate))
  if name == "bpr":
    return -np.log(sigmoid(own - others)).sum() / max(len(kept), 1)
  rate = len(items) / (ITEMS - 1)
  power = {"bce": 1, "gbce": rate * (0.75 * (1 - 1 / rate) + 1 / rate)}[name]
  terms = power * np.log(sigmoid(own)) + np.log(1 - sigmoid(others)).sum()
  return -terms / (1 + len(kept))


@pytest.mark.parametrize(
  ("name", "shared", "kind"),
  [(name, name != "bce", "attention") for name in NAMES]
  + [("sampled_softmax", False, "attention"), ("gbce", True, "sasrec")],
)
def test_group_loss_equals_a_loop_over_positions(name, shared, kind):
  backbone, spec = BACKBONES[kind](), _spec(name, shared)
  params = jax.jit(backbone.init)(jax.random.key(0))
  key = jax.random.key(5)
  run = jax.jit(objectives.group_losses(
    backbone, mean="interactions", loss=spec
  ).group_loss)
  got = run(params, objectives.GroupBatch(BATCH, None), key)
  drawn = np.asarray(spec.draw(jax.random.split(key)[1], BATCH).items)
  rows, columns = np.nonzero(TARGETS)

  @jax.jit
  def whole(params):
    states = backbone.at(backbone.encode(params, HISTORY, None), rows, columns)
    return backbone.score(
      params, backbone.represent(params, states, None), None
    )

  logits = whole(params)
  want = [
    _row_loss(
      name, np.asarray(logits[i], float), int(TARGETS[row, column]),
      drawn if shared else drawn[4 * row + column],
    )
    for i, (row, column) in enumerate(zip(rows, columns, strict=True))
  ]
  np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)


def test_dropout_and_negatives_have_keys_of_their_own():
  """With the softmax, dropout has the group's key itself."""
  backbone, params = bigram(ITEMS, dropout=0.5), {"table": jnp.eye(ITEMS + 1)}
  key, seen = jax.random.key(3), {}
  for name, spec in (("softmax", losses.SOFTMAX), ("bce", _spec("bce"))):
    encode = lambda params, history, key, name=name: (
      seen.setdefault(name, []).append(key), backbone.encode(params, history)
    )[1]
    if spec.loss is not None:
      spec = spec._replace(draw=lambda key, batch, draw=spec.draw: (
        seen.setdefault("draw", []).append(key), draw(key, batch)
      )[1])
    objectives.group_losses(
      backbone._replace(encode=encode), mean="users", loss=spec
    ).group_loss(params, objectives.GroupBatch(BATCH, None), key)
  own = {
    name: tuple(jax.random.key_data(keys[0]).tolist())
    for name, keys in seen.items()
  }
  assert own["softmax"] == tuple(jax.random.key_data(key).tolist())
  assert len(set(own.values())) == 3


def test_padding_and_own_targets_are_no_negatives():
  """All items drawn are the target: nothing is left to compare with."""
  constant = negatives.Proposal(
    lambda key, batch, shape: jnp.full(shape, 4, jnp.int32).at[..., 0].set(0),
    lambda items, batch, count: jnp.zeros(items.shape),
  )
  backbone = bigram(ITEMS)
  params = backbone.init(jax.random.key(0))
  targets = jnp.asarray([[0, 4, 4]])
  batch = Batch(jnp.zeros(1, int), jnp.asarray([[0, 2, 3]]), targets)
  for name, want in (("sampled_softmax", 0.0), ("bpr", 0.0)):
    loss = losses.SAMPLED_LOSSES[name](0.5, 0.0)
    spec = losses.sampled(loss, constant, count=3)
    run = jax.jit(jax.value_and_grad(objectives.group_losses(
      backbone, mean="users", loss=spec
    ).group_loss))
    value, grad = run(
      params, objectives.GroupBatch(batch, None), jax.random.key(0)
    )
    assert value == want
    np.testing.assert_array_equal(grad["table"], 0)


@pytest.mark.parametrize("shared", [True, False])
def test_no_logits_of_positions_by_catalogue(shared):
  """Nor of all positions by their negatives, but one chunk's at a time."""
  items, count, length, rows, chunk = 1501, 64, 8, 8, 4
  backbone = sasrec.sasrec(items, length=length, width=2, blocks=1, heads=1)
  history = jnp.ones((rows, length), jnp.int32)
  batch = Batch(jnp.arange(rows), history, history)
  params = jax.eval_shape(backbone.init, jax.random.key(0))

  def shapes(spec):
    loss = jax.value_and_grad(objectives.group_losses(
      backbone, mean="users", loss=spec
    ).group_loss)
    text = str(jax.make_jaxpr(loss)(
      params, objectives.GroupBatch(batch, None), jax.random.key(0)
    ))
    found = re.findall(r"\bf\d+\[([\d,]+)\]", text)
    return {tuple(map(int, s.split(","))) for s in found}

  sizes = shapes(_spec("bce", shared, count, items))
  assert (chunk, count) in sizes
  assert not {s for s in sizes if items in s or items + 1 in s} - {
    (items + 1,), (items + 1, 2)
  }
  assert (rows * length, count, 2) not in sizes
  sizes = shapes(losses.SOFTMAX)
  assert (chunk, items + 1) in sizes
  assert (rows * length, items + 1) not in sizes
