"""Every path and every block structure, for every rule, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import RULES, assert_trees_close

from pin_jax import aggregation
from pin_jax.aggregation import aggregator, weightings
from pin_jax.models import sasrec
from pin_jax.training import objectives
from pin_jax.types import Batch

SIZE = 4
PRIOR = np.array([0.1, 0.4, 0.3, 0.2])

def rule(name):
  return RULES[name](PRIOR)


pytestmark = pytest.mark.usefixtures("compile_quickly", "few_at_a_time")


# loss_g = ||A_g x - c_g||^2 / 2 with x = (a, b / c) flat.

SHAPES = {"a": (3,), "b": {"c": (2, 2)}}
RNG = np.random.default_rng(4)
MATRICES = RNG.normal(size=(SIZE, 5, 7)).astype(np.float32)
CENTRES = RNG.normal(size=(SIZE, 5)).astype(np.float32)
START = RNG.normal(size=7).astype(np.float32)


def params_of(vector):
  return {"a": vector[:3], "b": {"c": vector[3:].reshape(2, 2)}}


def least_squares(params, batch, key):
  del key
  matrix, centre = batch
  x = jnp.concatenate([params["a"], params["b"]["c"].reshape(-1)])
  return 0.5 * jnp.sum((matrix @ x - centre) ** 2)


def fused(params, batches, keys, weights):
  losses = jax.vmap(least_squares, (None, 0, 0))(params, batches, keys)
  return jnp.vdot(weights, losses), losses


def by_hand(x):
  """Losses [G] and gradients [G, 7] in float64."""
  residual = np.einsum("gij,j->gi", MATRICES.astype(np.float64), x) - CENTRES
  losses = 0.5 * (residual**2).sum(1)
  return losses, np.einsum("gij,gi->gj", MATRICES, residual)


def weigh_by_hand(weighting, gradients, losses, state):
  gramian = jnp.asarray(gradients @ gradients.T, jnp.float32)
  weights, state = weighting.update(
    gramian, jnp.asarray(losses, jnp.float32), state
  )
  return np.asarray(weights, np.float64), state


def paths_for(reads):
  """The paths that give a rule what it reads."""
  known = ["accumulated", "weighted"] if reads == "nothing" else []
  return ["stacked", "sequential", *known]


CASES = [
  (name, path) for name in RULES for path in paths_for(rule(name).reads)
]


def run_steps(weighting, path, blocks=None, steps=2):
  """Two aggregations from one state to the next, each at its own x."""
  init, step = aggregation.aggregate(
    least_squares, weighting, path=path, blocks=blocks, weighted_loss=fused
  )
  run, state, out = jax.jit(step), init(params_of(START)), []
  for t in range(steps):
    out.append(run(
      params_of(jnp.asarray(START + t)), (MATRICES, CENTRES),
      jax.random.split(jax.random.key(0), SIZE), state,
    ))
    state = out[-1].state
  return out


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize(("name", "path"), CASES)
def test_every_rule_on_every_path_equals_numpy(name, path):
  weighting = rule(name)
  state = weighting.init()
  for t, out in enumerate(run_steps(weighting, path)):
    losses, gradients = by_hand(START + t)
    weights, state = weigh_by_hand(weighting, gradients, losses, state)
    np.testing.assert_allclose(out.losses, losses, rtol=1e-5)
    scale = np.abs(weights).max()
    np.testing.assert_allclose(out.weights, weights, atol=1e-4 * scale)
    # The gradient that the path's own weights ask for, to 1e-5.
    want = np.asarray(out.weights, np.float64) @ gradients
    scale = np.abs(gradients * np.asarray(out.weights)[:, None]).max()
    np.testing.assert_allclose(flat(out.gradient), want, atol=1e-5 * scale)
    want = gradients @ gradients.T
    known = {"accumulated": np.eye(SIZE, dtype=bool), "weighted": False}
    want = np.where(known.get(path, True), want, np.nan)
    scale = (gradients**2).sum()
    np.testing.assert_allclose(out.gramian, want, atol=1e-5 * scale)


@pytest.mark.parametrize("name", RULES)
def test_each_tensor_by_itself_equals_one_rule_a_tensor(name):
  """Block by block in numpy, the state of each block its own."""
  weighting = rule(name)
  for path in [p for p in paths_for(weighting.reads) if p != "weighted"]:
    states = [weighting.init(), weighting.init()]
    for t, out in enumerate(run_steps(weighting, path, blocks=str)):
      losses, gradients = by_hand(START + t)
      assert list(out.weights) == ["a", "b/c"]
      for k, part in enumerate((slice(0, 3), slice(3, 7))):
        weights, states[k] = weigh_by_hand(
          weighting, gradients[:, part], losses, states[k]
        )
        got = np.asarray(list(out.weights.values())[k], np.float64)
        np.testing.assert_allclose(
          got, weights, atol=2e-4 * np.abs(weights).max()
        )
        scale = np.abs(gradients[:, part] * got[:, None]).max()
        np.testing.assert_allclose(
          flat(out.gradient)[part], got @ gradients[:, part],
          atol=1e-5 * scale,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("reads", ["nothing", "losses", "gradients"])
@pytest.mark.parametrize("blocks", [None, str])
def test_narrow_parameters_add_up_in_float32(dtype, reads, blocks):
  """37 gradients of 300 and of 1/64: in the narrow type their sum goes astray.

  The square of 300 is more than float16 holds.
  """
  size = 37
  params = {"a": jnp.ones(3, dtype), "b": jnp.ones(2, dtype)}
  loss = lambda p, batch, key: (300 * p["a"]).sum() + (p["b"] / 64).sum()
  narrow = lambda p, batch, keys, w: (
    w.astype(dtype).sum() * loss(p, None, None), w
  )
  rule = aggregation.backdoor(np.ones(size))._replace(reads=reads)
  paths = [p for p in paths_for(reads) if p != "weighted" or blocks is None]
  for path in (*paths, "auto"):
    init, step = aggregation.aggregate(
      loss, rule, path=path, blocks=blocks, weighted_loss=narrow
    )
    out = jax.jit(step)(
      params, jnp.zeros(size), jax.random.split(jax.random.key(0), size),
      init(params),
    )
    for name, want in (("a", 300), ("b", 1 / 64)):
      assert out.gradient[name].dtype == dtype, path
      np.testing.assert_array_equal(
        np.asarray(out.gradient[name], np.float64), want, err_msg=path
      )
    assert out.losses.dtype == out.gramian.dtype == jnp.float32
    squares = np.diagonal(out.gramian)
    if not np.isnan(squares).all():
      np.testing.assert_allclose(squares, 3 * 300**2 + 2 / 64**2, rtol=1e-5)


@pytest.mark.parametrize("path", ["stacked", "accumulated", "auto"])
def test_named_blocks_have_rules_of_their_own(path):
  """One tensor by the joint gradient; the other's prior moves on."""
  rules = {"table": weightings.joint(PRIOR), "encoder": rule(
    "annealed_backdoor"
  )}
  blocks = lambda leaf: "table" if leaf == "a" else "encoder"
  for t, out in enumerate(run_steps(rules, path, blocks=blocks)):
    _, gradients = by_hand(START + t)
    weights = PRIOR * (1 - t / 3) + t / 3 / SIZE
    np.testing.assert_allclose(out.weights["table"], PRIOR, rtol=1e-6)
    np.testing.assert_allclose(out.weights["encoder"], weights, rtol=1e-5)
    np.testing.assert_allclose(
      out.gradient["a"], PRIOR @ gradients[:, :3], rtol=1e-4
    )
    np.testing.assert_allclose(
      flat(out.gradient["b"]), weights @ gradients[:, 3:], rtol=1e-4
    )
    assert out.state == {"table": (), "encoder": t + 1}


@pytest.mark.parametrize(("rules", "blocks", "message"), [
  ({"a": rule("mgda")}, None, "weightings for the blocks .*'a'.* need blocks"),
  ({"a": rule("mgda")}, str, r"have blocks \['a', 'b/c'\].*for \['a'\]"),
  ({"a": rule("mgda"), "b/c": rule("mgda"), "d": rule("mgda")}, str,
   r"for \['a', 'b/c', 'd'\]"),
])
def test_blocks_and_rules_must_match(rules, blocks, message):
  with pytest.raises(ValueError, match=message):
    run_steps(rules, "auto", blocks=blocks)


def test_one_backward_pass_has_the_same_weights_for_all_blocks():
  with pytest.raises(ValueError, match="one backward pass.*'accumulated'"):
    run_steps(rule("backdoor"), "weighted", blocks=str)


def test_leaf_names():
  names = aggregation.leaf_names({"b": {"c": 0}, "a": [0, 1]})
  assert names == ["a/0", "a/1", "b/c"]


@pytest.mark.parametrize(("reads", "fused", "backend", "size", "want"), [
  ("nothing", True, "gpu", 100, "weighted"),
  ("nothing", False, "gpu", 100, "accumulated"),
  ("nothing", True, "cpu", 5 * 10**7, "accumulated"),
  ("nothing", True, "cpu", 5 * 10**7 + 1, "weighted"),
  ("nothing", False, "cpu", 9**9, "accumulated"),
  ("losses", True, "cpu", 100, "sequential"),
  ("gradients", True, "tpu", 9**12, "stacked"),
])
def test_automatic_path(monkeypatch, reads, fused, backend, size, want):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert aggregator._automatic(reads, size, fused) == want


def test_informed_rules_keep_their_weights_and_form_the_gramian():
  rules = {"a": rule("backdoor"), "b/c": rule("cvar")}
  assert aggregation.informed(rules)["b/c"].reads == "gradients"
  cheap = run_steps(rule("backdoor"), "auto", steps=1)[0]
  telling = run_steps(
    aggregation.informed(rule("backdoor")), "auto", steps=1
  )[0]
  assert np.isnan(cheap.gramian).any()
  assert np.isfinite(telling.gramian).all()
  assert_trees_close(telling.gradient, cheap.gradient)


ITEMS, LENGTH, ROWS = 30, 6, 5


@pytest.mark.parametrize("mean", objectives.MEANS)
def test_weighted_loss_equals_the_groups_one_by_one(mean):
  """Of a sequence model."""
  backbone = sasrec.sasrec(
    ITEMS, length=LENGTH, width=4, blocks=1, heads=1, dropout=0.3, expansion=1
  )
  rng = np.random.default_rng(7)
  shapes = jax.eval_shape(backbone.init, jax.random.key(0))
  params = jax.tree.map(
    lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), shapes
  )
  items = rng.integers(1, ITEMS + 1, (SIZE, ROWS, LENGTH + 1))
  lengths = rng.integers(0, LENGTH + 1, (SIZE, ROWS, 1))
  lengths[2] = 0  # an empty group
  real = np.arange(LENGTH) >= LENGTH - lengths
  history, targets = (
    jnp.asarray(np.where(real, x, 0), jnp.int32)
    for x in (items[..., :-1], items[..., 1:])
  )
  importance = jnp.asarray(rng.exponential(size=real.shape), jnp.float32)
  batch = Batch(jnp.zeros((SIZE, ROWS), jnp.int32), history, targets)
  groups = objectives.GroupBatch(batch, importance)
  keys = jax.random.split(jax.random.key(5), SIZE)
  losses = objectives.group_losses(backbone, mean=mean)
  one = jax.jit(jax.value_and_grad(losses.group_loss))
  of_group = lambda g: jax.tree.map(lambda x: x[g], (groups, keys))
  values, grads = zip(
    *(one(params, *of_group(g)) for g in range(SIZE)), strict=True
  )
  weights = jnp.array([0.5, 0.0, 0.3, 0.2])
  (total, of_groups), gradient = jax.jit(
    jax.value_and_grad(losses.weighted_loss, has_aux=True)
  )(params, groups, keys, weights)
  np.testing.assert_allclose(of_groups, values, rtol=1e-5)
  np.testing.assert_allclose(total, np.dot(weights, values), rtol=1e-5)
  assert_trees_close(gradient, jax.tree.map(
    lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)), *grads
  ))
