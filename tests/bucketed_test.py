"""Bucketed encoding equals the plain one, and runs the short programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import ITEMS
from toys import assert_trees_close, bigram, noisy

from pin_jax.backbones.bucketed import bucketed
from pin_jax.backbones.din import din
from pin_jax.backbones.gru4rec import gru4rec
from pin_jax.backbones.hstu import hstu
from pin_jax.backbones.sasrec import (
  add_candidate_axis,
  sasrec,
  take_position,
  tied_score,
)
from pin_jax.layers import dropout as drop
from pin_jax.types import Backbone, InputError

LENGTH, WIDTH = 7, 4
COUNTS = np.asarray([3, 7, 0, 1, 4, 6, 5, 7, 2, 1])  # rows' lengths
BUILDERS = {
  "sasrec": functools.partial(sasrec, blocks=1),
  "gru4rec": gru4rec,
  "hstu": functools.partial(hstu, blocks=1),
  "din": functools.partial(din, attention_hidden=3, hidden=6),
}


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
  """The programs here take longer to compile than to run."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def _sums(num_items, *, length, width, dropout=0.0):
  """States are the sums of the embeddings so far."""
  del length

  def encode(params, history, key=None):
    x = params["items"][history] * (history > 0)[..., None]
    return jnp.cumsum(x if key is None else drop(x, dropout, key), axis=1)

  def init(key):
    table = jax.random.normal(key, (num_items + 1, width))
    return {"items": table, "bias": table[:, 0]}

  parts = take_position, add_candidate_axis, tied_score
  return Backbone(init, encode, *parts)


BUILDERS["sums"] = _sums


def _history():
  rng = np.random.default_rng(0)
  items = rng.integers(1, ITEMS + 1, (len(COUNTS), LENGTH))
  real = np.arange(LENGTH) >= LENGTH - COUNTS[:, None]
  return jnp.asarray(np.where(real, items, 0))


def _build(name, **more):
  backbone = BUILDERS[name](ITEMS, length=LENGTH, width=WIDTH, **more)
  return backbone, noisy(backbone.init)


def _loss(backbone, params, history, key=None):
  """Context, and a sum over the logits of every position."""
  rows, columns = jnp.indices(history.shape).reshape(2, -1)
  context = backbone.encode(params, history, key)
  states = backbone.at(context, rows, columns)
  candidates = jnp.arange(1, 6)
  represented = backbone.represent(params, states, candidates)
  logits = backbone.score(params, represented, candidates)
  return jnp.sum(jnp.sin(logits)), context


def _run(backbone, *arguments):
  loss = functools.partial(_loss, backbone)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(*arguments)


@pytest.mark.parametrize(
  ("name", "rows"),
  [("sasrec", 3), ("gru4rec", 3), ("hstu", 3), ("din", 3), ("sums", 64),
   ("sums", 1)],
)
def test_context_loss_and_gradient_equal_the_plain_ones(name, rows):
  backbone, params = _build(name)
  wrapped = bucketed(backbone, rows=rows)
  (want, context), grad = _run(backbone, params, _history())
  (got, got_context), got_grad = _run(wrapped, params, _history())
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert_trees_close(got_context, context)
  assert_trees_close(got_grad, grad)


@pytest.mark.parametrize("transform", ["map", "vmap"])
def test_a_stack_of_groups_equals_each_of_them(transform):
  backbone, params = _build("sums")
  wrapped = bucketed(backbone, rows=4, shortest=3)
  groups = _history().reshape(2, 5, LENGTH)

  def one(backbone, history):
    loss = functools.partial(_loss, backbone)
    return jax.value_and_grad(loss, has_aux=True)(params, history)[1]

  ours = functools.partial(one, wrapped)
  over = {
    "map": lambda x: jax.lax.map(ours, x), "vmap": jax.vmap(ours),
  }[transform]
  want = [one(backbone, history) for history in groups]
  want = jax.tree.map(lambda *x: jnp.stack(x), *want)
  assert_trees_close(jax.jit(over)(groups), want)


def test_dropout_follows_the_key():
  backbone, params = _build("sums", dropout=0.5)
  encode = jax.jit(bucketed(backbone, rows=4, shortest=3).encode)
  keys = jax.random.split(jax.random.key(0), 2)
  first, again, second = (
    np.asarray(encode(params, _history(), keys[i])) for i in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != second).any()
  steps = np.diff(first, axis=1, prepend=0)[_history() > 0]
  assert 0.3 < np.mean(np.abs(steps) < 1e-6) < 0.7


def test_a_chunk_runs_the_shortest_program_that_holds_it():
  """The context of this backbone tells the length that it was given."""

  def encode(params, history, key=None):
    return jnp.where(history > 0, history.shape[1], 0)

  plain = bigram(ITEMS)._replace(encode=encode)
  history = _history()
  wrapped = bucketed(plain, rows=2, shortest=2)
  got = np.asarray(jax.jit(wrapped.encode)(None, history))[:, -1]
  # Sorted in pairs: 0 1, 1 2, 3 4, 5 6, 7 7; programs of 2, 4 and 7.
  sizes = {0: 0, 1: 2, 2: 2, 3: 4, 4: 4, 5: 7, 6: 7, 7: 7}
  np.testing.assert_array_equal(got, [sizes[n] for n in COUNTS])


def test_a_context_without_the_axes_is_refused():
  total = lambda params, history, key: history.sum(-1)
  backbone = bigram(ITEMS)._replace(encode=total)
  with pytest.raises(ValueError, match="does not lead with"):
    bucketed(backbone, rows=4).encode(None, _history())


@pytest.mark.parametrize(
  ("options", "message"),
  [({"rows": 0}, "bucket_rows=0"), ({"rows": 2, "shortest": 0}, "shortest=0")],
)
def test_sizes_below_one_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    bucketed(bigram(ITEMS), **options)
