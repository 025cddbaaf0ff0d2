"""bfloat16 products beside float32 params, sums and softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import ITEMS, LENGTH
from toys import bigram, noisy, split_of

from pin_jax import aggregation
from pin_jax.data import batches
from pin_jax.models.layers import GRU, dropout, lookup, product
from pin_jax.models.plugins import bottleneck
from pin_jax.models.precision import computed_in
from pin_jax.training import losses, objectives
from pin_jax.training.optimizers import make_optimizer
from pin_jax.training.steps import (
  Adjustment,
  Operands,
  backbone_step,
  init_state,
)
from pin_jax.types import Batch, InputError

WIDE = {"width": 8, "dropout": 0.25}
BUILDERS = {
  name: functools.partial(build, **WIDE)
  for name, build in references.BUILDERS.items()
}
BUILDERS["din"] = functools.partial(
  BUILDERS["din"], attention_hidden=8, hidden=80
)
# The products of float32: DIN's last layer.
WIDE_PRODUCTS = {"sasrec": 0, "gru4rec": 0, "hstu": 0, "din": 1}
STEPS = 80
SUMS = ("exp", "log", "reduce_sum", "reduce_max", "rsqrt", "cumsum")


pytestmark = pytest.mark.usefixtures("compile_quickly", "few_at_a_time")


@pytest.fixture(scope="module", params=BUILDERS)
def name(request):
  return request.param


def _group(rows=12):
  rng = np.random.default_rng(1)
  history = rng.integers(1, ITEMS + 1, (rows, LENGTH))
  first = rng.integers(0, LENGTH, (rows, 1))
  history = np.where(np.arange(LENGTH) >= first, history, 0)
  targets = np.where(history > 0, rng.integers(1, ITEMS + 1, history.shape), 0)
  batch = Batch(*map(jnp.asarray, (range(rows), history, targets)))
  return objectives.GroupBatch(batch, None)


def _loss(backbone):
  return objectives.group_losses(backbone, mean="users").group_loss


def _start(backbone):
  return noisy(backbone.init, scale=0.3)


def _equations(jaxpr):
  """All equations of a jaxpr, inner ones included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _equations(inner)


def _operand_types(jaxpr, names):
  """[(primitive, types of its float operands)] of the primitives named."""
  floats = lambda e: {
    v.aval.dtype.name for v in e.invars
    if jnp.issubdtype(v.aval.dtype, jnp.floating)
  }
  found = [
    (e.primitive.name, floats(e)) for e in _equations(jaxpr)
    if e.primitive.name in names
  ]
  return [(primitive, types) for primitive, types in found if types]


@pytest.fixture(scope="module")
def traced(name):
  """Jaxprs of the losses and of the gradient of their mean in bfloat16."""
  backbone = computed_in(BUILDERS[name](), "bfloat16")
  group = _group()
  rows, columns = np.nonzero(group.batch.targets)
  targets = group.batch.targets[rows, columns]

  def forward(params, group, key):  # chunks would form the gradient too
    context = backbone.encode(params, group.batch.history, key)
    states = backbone.at(context, rows, columns)
    represented = backbone.represent(params, states, None)
    logits = backbone.score(params, represented, None)
    return losses.softmax_cross_entropy(logits, targets)

  args = _start(backbone), group, jax.random.key(0)
  gradient = jax.grad(_loss(backbone))
  return jax.make_jaxpr(forward)(*args), jax.make_jaxpr(gradient)(*args)


def test_products_forward_and_backward_have_bfloat16_operands(name, traced):
  for passes, jaxpr in zip((1, 3), traced, strict=True):
    found = _operand_types(jaxpr.jaxpr, ("dot_general",))
    wide = [types for _, types in found if types != {"bfloat16"}]
    assert len(found) >= 3 * passes
    # Two chunk sizes; target and catalogue are scored together.
    assert len(wide) <= WIDE_PRODUCTS[name] * passes * 2, wide
    assert all(types == {"float32"} for types in wide)


def test_softmax_and_statistics_are_float32(traced):
  found = _operand_types(traced[0].jaxpr, SUMS)
  assert {"exp", "log", "reduce_sum", "reduce_max"} <= {p for p, _ in found}
  assert all(types == {"float32"} for _, types in found), found


@pytest.fixture(scope="module")
def results(name):
  """(loss, gradient) of bfloat16 and float32, same params, batch and key."""
  plain = BUILDERS[name]()
  args = _start(plain), _group(), jax.random.key(0)
  return [
    jax.device_get(jax.jit(jax.value_and_grad(_loss(backbone)))(*args))
    for backbone in (computed_in(plain, "bfloat16"), plain)
  ]


def _flat(tree):
  leaves = jax.tree.leaves(tree)
  return np.concatenate([np.ravel(x).astype(np.float64) for x in leaves])


def test_float32_is_the_same_program(name):
  plain = BUILDERS[name]()
  args = _start(plain), _group(), jax.random.key(0)
  texts = [
    jax.jit(jax.value_and_grad(_loss(b))).lower(*args).as_text()
    for b in (plain, computed_in(plain, "float32"))
  ]
  assert texts[0] == texts[1] and "bf16" not in texts[0]


def test_loss_and_gradient_are_close_to_those_of_float32(results):
  (loss, got), (want_loss, want) = results
  assert loss.dtype == np.float32 and loss != want_loss
  np.testing.assert_allclose(loss, want_loss, rtol=2 * 2**-8)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(got))
  pairs = jax.tree.map(
    lambda x, y: (_flat(x), _flat(y)), got, want
  )
  cosine = lambda x, y: x @ y / np.sqrt((x @ x) * (y @ y))
  assert cosine(_flat(got), _flat(want)) > 0.99
  for x, y in jax.tree.leaves(pairs, is_leaf=lambda p: isinstance(p, tuple)):
    if np.linalg.norm(y) > 1e-3 * np.linalg.norm(_flat(want)):
      assert cosine(x, y) > 0.99


def test_represent_is_narrow_and_plugins_take_it(name):
  backbone = computed_in(BUILDERS[name](), "bfloat16")
  params, plugin = _start(backbone), bottleneck(WIDE["width"], hidden=4)
  own = plugin.init(jax.random.key(0))
  history, candidates = _group(4).batch.history, jnp.asarray([3, 1, 4])

  @jax.jit
  def run(params, own):
    context = backbone.encode(params, history)
    states = backbone.at(context, jnp.arange(4), jnp.full(4, LENGTH - 1))
    x = backbone.represent(params, states, candidates)
    moved = plugin.apply(own, x)
    return x, moved, *(
      backbone.score(params, y, candidates) for y in (x, moved)
    )

  x, moved, logits, same = run(params, own)
  assert (x.dtype, moved.dtype) == (jnp.bfloat16, jnp.float32)
  assert logits.dtype == jnp.float32
  np.testing.assert_array_equal(same, logits)  # plugins start as the identity


def _scores(backbone, params, history):
  @jax.jit
  def run(params, history):
    rows, columns = jnp.indices(history.shape).reshape(2, -1)
    states = backbone.at(backbone.encode(params, history), rows, columns)
    x = backbone.represent(params, states, None)
    return backbone.score(params, x, None).reshape(*history.shape, -1)

  return np.asarray(run(params, history))


def test_gradients_of_packed_chunks_add_up_in_float32():
  backbone = computed_in(BUILDERS["sasrec"](), "bfloat16")._replace(packed=2)
  params, group = _start(backbone), _group()
  jaxpr = jax.make_jaxpr(jax.grad(_loss(backbone)))(
    params, group, jax.random.key(0)
  )
  carried = [
    v.aval.dtype.name for e in _equations(jaxpr.jaxpr)
    if e.primitive.name == "while"
    for v in e.outvars if v.aval.shape[:1] == (13,)
  ]
  assert carried and set(carried) == {"float32"}


def test_the_item_bias_is_not_rounded():
  backbone = computed_in(BUILDERS["gru4rec"](), "bfloat16")
  params = jax.tree.map(jnp.zeros_like, _start(backbone))
  params["bias"] = jnp.full(ITEMS + 1, 1 + 2**-12)
  got = _scores(backbone, params, np.asarray([[1, 2]]))
  np.testing.assert_array_equal(got, np.float32(1 + 2**-12))


# The parts, against sums by hand.


def test_lookups_add_up_in_float32():
  table = jnp.ones((2, 3), jnp.bfloat16)
  index = jnp.zeros(1000, jnp.int32)
  got = jax.grad(lambda t: lookup(t, index).astype(jnp.float32).sum())(table)
  assert got.dtype == jnp.bfloat16  # in which 256 + 1 = 256
  np.testing.assert_array_equal(got, [[1000] * 3, [0] * 3])


def test_product_accumulates_in_float32_and_rounds_the_gradient():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  x, y, g = draw(3, 40), draw(5, 40), draw(3, 5)
  wide = lambda a: np.asarray(a, np.float64)
  got, pull = jax.vjp(functools.partial(product, "md,cd->mc"), x, y)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, wide(x) @ wide(y).T, rtol=1e-5, atol=1e-5)
  for part, want in zip(
    pull(g.astype(jnp.float32)), (wide(g) @ wide(y), wide(g).T @ wide(x)),
    strict=True,
  ):
    assert part.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(part), want, rtol=2**-7, atol=2**-7)


def test_dropout_rescales_in_float32():
  x = jnp.full(4096, 3.0, jnp.bfloat16)
  out = dropout(x, 0.1, jax.random.key(0))
  assert out.dtype == jnp.bfloat16
  want = jnp.asarray(3 / 0.9, jnp.bfloat16)  # 3 / bfloat16(.9) rounds elsewhere
  assert want != x[0] / jnp.asarray(0.9, jnp.bfloat16)
  assert set(np.unique(np.asarray(out, np.float32))) == {0, float(want)}


def test_the_state_of_the_gru_keeps_small_steps():
  """A gate of almost 1 moves the state by less than bfloat16 resolves."""
  layer, steps = GRU(1), 400
  x, mask = jnp.zeros((1, steps, 1)), jnp.ones((1, steps), bool)
  variables = jax.tree.map(
    jnp.zeros_like, jax.eval_shape(layer.init, jax.random.key(0), x, mask)
  )
  # h' = (1 - z) tanh(5) + z h with 1 - z = sigmoid(-7).
  inputs = variables["params"]["inputs"]
  inputs["bias"] = jnp.asarray([0.0, 7.0, 5.0])
  narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)
  got = layer.apply(narrow, x.astype(jnp.bfloat16), mask)
  keep = 1 / (1 + np.exp(-7.0))
  want = np.tanh(5.0) * (1 - keep**steps)
  np.testing.assert_allclose(float(got[0, -1, 0]), want, rtol=2**-7)


# Training.


def test_only_the_known_types_are_offered():
  with pytest.raises(InputError, match="compute='float16'.*bfloat16"):
    computed_in(bigram(ITEMS), "float16")


def _cycles(rows=60):
  """Items follow each other in a cycle, but for a tenth of the steps."""
  rng = np.random.default_rng(0)
  sequences = []
  for _ in range(rows):
    items = [int(rng.integers(1, ITEMS + 1))]
    while len(items) < 8:
      jump = rng.random() < 0.1
      items.append(
        int(rng.integers(1, ITEMS + 1)) if jump else items[-1] % ITEMS + 1
      )
    sequences.append(items)
  split = split_of(sequences)
  pool = batches.make_pool(
    batches.training_targets(split), np.arange(rows) % 2, num_groups=2,
    length=7,
  )
  return batches.make_sequences(split), pool


def _training(backbone, learning_rate=0.1):
  """(step of (state, t), state before it)."""
  optimizer = make_optimizer(STEPS, learning_rate=learning_rate, average=0.9)
  adjustment = Adjustment(aggregation.backdoor([0.5, 0.5]), path="sequential")
  step = backbone_step(
    backbone, adjustment, optimizer, batches.Draw(16, 7)
  )
  params = jax.jit(backbone.init)(jax.random.key(0))
  state = init_state(params, optimizer, adjustment)
  operands = Operands(jax.random.key(1), *_cycles(), None)
  return lambda state, t: step(state, operands, t), state


def test_training_reaches_about_the_loss_of_float32():
  def losses(compute):
    step, state = _training(computed_in(bigram(ITEMS), compute))
    run = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(STEPS))[1]["loss"])
    return np.asarray(run(state))

  want, got = losses("float32"), losses("bfloat16")
  assert want[-10:].mean() < 0.5 * want[0].mean()
  np.testing.assert_allclose(got[-10:].mean(), want[-10:].mean(), rtol=0.02)


def test_what_training_keeps_and_logs_is_float32(name):
  step, state = _training(computed_in(BUILDERS[name](), "bfloat16"))
  kept, log = jax.eval_shape(step, state, jnp.int32(0))
  floats = [
    x.dtype.name for x in jax.tree.leaves((state, kept, log))
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  assert len(floats) > 20 and set(floats) == {"float32"}
