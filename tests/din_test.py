"""DIN: candidates in inner chunks, memory, what the history may change."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import ITEMS, LENGTH, WIDTH
from toys import assert_trees_close, noisy

from pin_jax.models.din import din

HISTORY = np.asarray([[0, 0, 0, 5, 2, 9, 4, 1], [7, 3, 11, 8, 12, 6, 10, 2]])
UNIT = 3


pytestmark = pytest.mark.usefixtures("compile_quickly")


def _build(**more):
  return din(
    ITEMS, length=LENGTH, width=WIDTH, attention_hidden=UNIT, hidden=6, **more
  )


def _last_logits(backbone, candidates, history=HISTORY):
  def run(params):
    context = backbone.encode(params, history, None)
    states = backbone.at(context, jnp.arange(2), jnp.full(2, LENGTH - 1))
    represented = backbone.represent(params, states, candidates)
    return backbone.score(params, represented, candidates)

  return run


@pytest.fixture
def candidates_at_once(monkeypatch):
  """Sets how many candidates of two rows live at a time; their activations."""

  def set_to(count):
    most = 2 * LENGTH * UNIT * count
    monkeypatch.setattr("pin_jax.models.din._MAX_ELEMENTS", most)
    return most

  return set_to


@pytest.mark.parametrize("form", ["shared", "own", "all"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_inner_chunks_change_nothing(candidates_at_once, form, chunk):
  candidates = {
    "shared": jnp.asarray([4, 0, 12, 4, 7]),
    "own": jnp.asarray([[4, 0, 12, 4, 7], [1, 2, 3, 4, 5]]),
    "all": None,
  }[form]
  params = noisy(_build().init)

  def run():
    logits = _last_logits(_build(), candidates)
    loss = lambda p: jnp.sum(jnp.sin(logits(p)))
    return jax.jit(jax.value_and_grad(loss))(params)

  want = run()
  candidates_at_once(chunk)
  assert_trees_close(run(), want)


def test_memory_of_the_activation_unit_follows_the_budget(candidates_at_once):
  backbone = _build()
  params = noisy(backbone.init)

  def largest():
    states = jnp.asarray(HISTORY), jnp.ones(HISTORY.shape)
    loss = lambda p: backbone.represent(p, states, None).sum()
    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return max(math.prod(map(int, s.split(","))) for s in shapes)

  whole = largest()
  few = candidates_at_once(5)
  assert largest() == few and whole >= few * (ITEMS + 1) / 5


def test_dropout_leaves_out_items_and_keeps_the_mean():
  backbone = _build(dropout=0.25)
  history = jnp.ones((2000, LENGTH), jnp.int32).at[:, :2].set(0)
  _, factors, _ = backbone.encode(None, history, jax.random.key(1))
  factors = np.asarray(factors)
  np.testing.assert_array_equal(factors[:, :2], 0)
  assert set(np.unique(factors)) == {0, np.float32(1 / 0.75)}
  sigma = math.sqrt(0.25 / 0.75 / factors[:, 2:].size)
  assert abs(factors[:, 2:].mean() - 1) < 5 * sigma
