"""A model small enough to check by hand, and how to compare trees."""

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax.types import Backbone


def bigram(num_items, *, init=jax.random.normal, dropout=0.0):
  """Reads the last item only; logits are a row of a table."""
  size = num_items + 1

  def encode(params, history, key=None):
    context = jax.nn.one_hot(history, size)
    if key is None or not dropout:
      return context
    return context * jax.random.bernoulli(key, 1 - dropout, context.shape)

  return Backbone(
    init=lambda key: {"table": init(key, (size, size))},
    encode=encode,
    at=lambda context, rows, columns: context[rows, columns],
    represent=lambda params, states, candidates: states[:, None],
    score=lambda params, representations, candidates: (
      representations[:, 0] @ params["table"]
    ),
  )


def noisy(init, seed=0, scale=0.5):
  """Random parameters of the shapes that `init` gives."""
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
  return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


def assert_trees_close(got, expected, tolerance=1e-5):
  """Within `tolerance` of each element or of the largest of the tree."""
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance * largest
    ),
    got, expected,
  )
