"""A model small enough to check by hand, and how to compare trees."""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np

from pin_jax import aggregation
from pin_jax.aggregation import weightings
from pin_jax.data import splits
from pin_jax.data.interactions import from_columns
from pin_jax.types import Backbone

# name -> (prior -> Weighting), the prior in the order of the groups.
RULES = {
  name: lambda prior, rule=rule: rule()
  for name, rule in weightings.WEIGHTINGS.items()
} | {
  "backdoor": aggregation.backdoor,
  "joint": weightings.joint,
  "annealed_backdoor": lambda p: weightings.annealed_backdoor(
    p, np.ones(len(p)), 3
  ),
  "inverse_propensity": lambda p: weightings.inverse_propensity(p, 0.5),
  "group_dro": lambda p: weightings.group_dro(p, 0.1),
  "streaming_dro": lambda p: weightings.streaming_dro(p, 0.1),
  "cvar": lambda p: weightings.cvar(p, 0.4),
  "famo": lambda p: weightings.famo(len(p)),
  "gradvac": lambda p: weightings.gradvac(len(p), 0.5),
}

PAGE = pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md"


def of_page(**modules):
  """What the examples of CONTRIBUTING.md define; its job is not run."""
  nowhere = types.SimpleNamespace(
    METRICS={}, SAMPLED_LOSSES={}, WEIGHTINGS={}, compare=lambda *_, **__: None
  )
  names = "metrics", "losses", "weightings", "pin_jax"
  there = {
    "np": np, "jnp": jnp, "jax": jax, "aggregation": aggregation,
    **dict.fromkeys(names, nowhere), **modules,
  }
  for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
    if not code.startswith("import "):  # `there` has the modules
      exec(code, there)
  return there


def bigram(num_items, *, init=jax.random.normal, dropout=0.0):
  """Reads the last item only; logits are a row of a table."""
  size = num_items + 1

  def encode(params, history, key=None):
    context = jax.nn.one_hot(history, size)
    if key is None or not dropout:
      return context
    return context * jax.random.bernoulli(key, 1 - dropout, context.shape)

  def score(params, representations, candidates):
    logits = representations[:, 0] @ params["table"]
    if candidates is None:
      return logits
    index = jnp.broadcast_to(candidates, (len(logits), candidates.shape[-1]))
    return jnp.take_along_axis(logits, index, axis=-1)

  return Backbone(
    init=lambda key: {"table": init(key, (size, size))},
    encode=encode,
    at=lambda context, rows, columns: context[rows, columns],
    represent=lambda params, states, candidates: states[:, None],
    score=score,
  )


def split_of(rows):
  """The leave-one-out split of users' items, oldest first."""
  return splits.leave_one_out(from_columns(
    [user for user, row in enumerate(rows) for _ in row],
    [int(item) for row in rows for item in row],
    times=[time for row in rows for time, _ in enumerate(row)],
  ))


def training_rows(split):
  """Each user's training items, oldest first."""
  data = split.interactions
  return [
    data.items[first : first + end].tolist()
    for first, end in zip(data.offsets[:-1], split.train_end, strict=True)
  ]


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
