"""Losses: the last axis is the list, leading axes are batch, never reduced.

The losses of sampled negatives take the target's logit and the negatives'
logits; which items are negatives is `negatives.py`'s. `chunked` turns any
per-row loss into a weighted sum whose memory does not grow with rows x
catalogue.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pin_jax.types import InputError, PyTree


def softmax_cross_entropy(
  logits: jax.Array,
  target: jax.Array,
  where: jax.Array | None = None,
) -> jax.Array:
  """-log softmax(logits)[target], unreduced.

  Args:
    logits: [..., C], any float type; accumulated in float32.
    target: [...] int, index into the last axis.
    where: optional [..., C] bool, candidates that take part.

  Returns:
    [...] float32, nats.
  """
  logits = logits.astype(jnp.float32)
  if where is not None:
    logits = jnp.where(where, logits, -jnp.inf)
  chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - chosen


def focal(loss: jax.Array, focusing: float) -> jax.Array:
  """(1 - p)^gamma loss, where p = e^-loss is the target's probability.

  Events that the model predicts well count less: head users', it is hoped, more
  often than tail users'.

  Args:
    loss: [...] cross-entropy of a softmax, nats.
    focusing: gamma >= 0; 0 leaves the loss as it is.

  Returns:
    [...].

  Reference: Lin et al., "Focal loss for dense object detection", ICCV 2017,
    equation 4.
  """
  missed = jnp.maximum(-jnp.expm1(-loss), jnp.finfo(loss.dtype).tiny)
  return missed**focusing * loss


def sampled_softmax(
  positive: jax.Array,
  negatives: jax.Array,
  log_counts: jax.Array,
  where: jax.Array | None = None,
) -> jax.Array:
  """Softmax cross-entropy with the normaliser estimated from negatives (logQ).

  -log( e^s+ / (e^s+ + sum_j e^(s_j - log n_j)) )

  with n_j the expected number of times that item j is drawn. Where the
  negatives are draws from all items and draws of the target are masked, the
  normaliser is unbiased, and loss and gradient approach those of
  `softmax_cross_entropy` with a bias of O(1 / C).

  Args:
    positive: [...] logit s+ of the target.
    negatives: [..., C] logits s_j.
    log_counts: [..., C] log n_j, which is log(C q_j) for C independent draws
      from q.
    where: optional [..., C] bool, negatives that take part.

  Returns:
    [...] float32, nats.

  Reference:
    Bengio & Senecal, IEEE Trans. Neural Networks 2008 (importance-sampled
    normaliser); Yi et al., RecSys 2019 (logQ for batch negatives).
    Deviation: the target is in the normaliser by construction, not by a draw,
    so its own logit is not corrected (as Khrylchenko et al., RecSys 2025,
    arXiv 2507.09331, argue); Yi et al. correct it too, which is biased.
  """
  positive = positive.astype(jnp.float32)
  corrected = negatives.astype(jnp.float32) - log_counts
  margins = corrected - positive[..., None]
  if where is not None:
    margins = jnp.where(where, margins, -jnp.inf)
  own = jnp.zeros_like(positive)[..., None]
  return jax.nn.logsumexp(jnp.concatenate([own, margins], axis=-1), axis=-1)


def binary_cross_entropy(
  positive: jax.Array,
  negatives: jax.Array,
  where: jax.Array | None = None,
  *,
  power: float = 1.0,
) -> jax.Array:
  """-(power log sigmoid(s+) + sum_j log(1 - sigmoid(s_j))) / (1 + k).

  k counts the negatives that take part. With `power` from `gbce_power` this is
  gBCE: sigmoid(s+)^power stands for the probability of the target.

  Args:
    positive: [...] logit s+ of the target.
    negatives: [..., C] logits s_j.
    where: optional [..., C] bool, negatives that take part.
    power: beta, 1 for the plain loss.

  Returns:
    [...] float32, nats a term.

  Reference:
    Petrov & Macdonald, RecSys 2023, arXiv 2308.07192, equations of BCE and
    gBCE. Deviation: masked negatives leave the divisor too.
  """
  positive = jax.nn.softplus(-positive.astype(jnp.float32))
  terms = jax.nn.softplus(negatives.astype(jnp.float32))
  total, count = _masked_sum(terms, where)
  return (power * positive + total) / (1 + count)


def gbce_power(rate: float, calibration: float) -> float:
  """beta = alpha (t (1 - 1 / alpha) + 1 / alpha) of gBCE.

  t = 0 gives 1 (plain BCE), t = 1 gives alpha (the positive's probability is
  then calibrated against the overconfidence of sampling).

  Args:
    rate: alpha = k / (V - 1), the share of the negatives that are sampled.
    calibration: t in [0, 1].

  Returns:
    beta.

  Raises:
    InputError: if `rate` is outside (0, 1] or `calibration` outside [0, 1].

  Reference:
    Petrov & Macdonald, RecSys 2023, arXiv 2308.07192.
  """
  if not 0 < rate <= 1:
    raise InputError(
      f"loss.negatives gives gBCE a sampling rate of {rate:g}, outside (0, 1]; "
      "give at most the number of items less one"
    )
  if not 0 <= calibration <= 1:
    raise InputError(
      f"loss.calibration={calibration} is outside [0, 1]; give t such as 0.75"
    )
  return rate * (calibration * (1 - 1 / rate) + 1 / rate)


def bayesian_personalized_ranking(
  positive: jax.Array,
  negatives: jax.Array,
  where: jax.Array | None = None,
) -> jax.Array:
  """Mean over the negatives of -log sigmoid(s+ - s_j); 0 without negatives.

  Args:
    positive: [...] logit s+ of the target.
    negatives: [..., C] logits s_j.
    where: optional [..., C] bool, negatives that take part.

  Returns:
    [...] float32, nats.

  Reference:
    Rendle et al., UAI 2009. Deviation: the mean over several negatives (the
    paper has one a step); the prior on the parameters is the optimizer's
    weight decay.
  """
  margins = negatives.astype(jnp.float32) - positive[..., None]
  total, count = _masked_sum(jax.nn.softplus(margins), where)
  return total / jnp.maximum(count, 1)


def _masked_sum(
  terms: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """(sum, number) of the terms that take part, over the last axis."""
  if where is None:
    where = jnp.ones(terms.shape, bool)
  where = jnp.broadcast_to(where, terms.shape)
  return jnp.where(where, terms, 0).sum(-1), where.sum(-1)


RowLoss = Callable[[PyTree, PyTree, PyTree, PyTree], jax.Array]


def chunked(
  row_loss: RowLoss, chunk: int, axis: str | None = None
) -> Callable[..., tuple]:
  """Sum_i scale_i * weight_i * row_loss_i, one chunk of rows alive at a time.

  The sum is `accumulated`; the chunks after the last row of non-zero weight
  cost nothing. A row of zero weight repeats a real one, so that what it holds
  cannot turn the gradient into NaN.

  Args:
    row_loss: (params, shared, inputs [M, ...], constants [M, ...]) -> [M].
    chunk: rows a chunk; the last ones are a quarter of that, if it divides.
    axis: name of a vmapped axis along which all go through as many chunks as
      the one with the most rows, so that the loop stays one loop.

  Returns:
    f(params, shared, inputs, constants, weights [M], scale [M]) -> (scalar,
    weight_i * row_loss_i [M]), float32. The scalar is differentiable in params
    and the floating-point inputs, constant in the others; the rows are
    constants.
  """

  def part(
    params: PyTree, shared: PyTree, inputs: PyTree, constants: PyTree
  ) -> tuple[jax.Array, jax.Array]:
    shared, repeated = shared
    constants, weights, scale = constants
    real = weights != 0

    def fill(x: jax.Array, other: jax.Array) -> jax.Array:
      return jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, other)

    inputs, constants = jax.tree.map(fill, (inputs, constants), repeated)
    losses = row_loss(params, shared, inputs, constants)
    losses = jnp.where(real, losses, 0) * weights
    return jnp.sum(losses * scale), losses

  total = accumulated(part, chunk, chunk // 4 if chunk % 4 == 0 else chunk)

  def run(
    params: PyTree,
    shared: PyTree,
    inputs: PyTree,
    constants: PyTree,
    weights: jax.Array,
    scale: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    real = weights != 0
    used = jnp.max(jnp.where(real, jnp.arange(len(real)) + 1, 0))
    used = used if axis is None else jax.lax.pmax(used, axis)
    first = jnp.argmax(real)
    repeated = jax.tree.map(lambda x: x[first], (inputs, constants))
    return total(
      params, (shared, repeated), inputs, (constants, weights, scale), used
    )

  return run


Part = Callable[
  [PyTree, PyTree, PyTree, PyTree], tuple[jax.Array, jax.Array]
]


def accumulated(part: Part, chunk: int, rest: int) -> Callable[..., tuple]:
  """Sum of a function over chunks of rows, its gradient formed on the way.

  The gradient is formed in the forward pass, chunk by chunk, so neither pass
  holds what more than a chunk needs and nothing is computed twice; that of
  params adds up in float32 at least. Rows from
  `used` on cost nothing but what fills up a chunk (under vmap: from the most
  used on).

  Args:
    part: (params, shared, inputs [c, ...], constants [c, ...]) -> (scalar,
      rows [c, ...] float32), called with c = `chunk` and c = `rest`.
    chunk: rows a chunk, while so many are left.
    rest: rows of the chunks after that, at most `chunk`.

  Returns:
    f(params, shared, inputs [M, ...], constants [M, ...], used) -> (scalar,
    rows [M, ...]). The scalar is differentiable in params and the
    floating-point inputs, constant in the others; the rows are constants, 0
    from the last chunk on.
  """

  def pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1))

  def loop(
    body: Callable, carry: PyTree, rows: PyTree, used: jax.Array
  ) -> PyTree:
    """Runs body(carry, rows of the chunk, first row) over the rows in use."""
    whole = (used + rest - 1) // chunk

    def step(carry: PyTree, first: jax.Array, size: int) -> PyTree:
      take = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size)
      return body(carry, jax.tree.map(take, rows), first)

    carry = jax.lax.fori_loop(
      0, whole, lambda i, c: step(c, i * chunk, chunk), carry
    )
    if rest == chunk:
      return carry
    left = jnp.maximum(used - whole * chunk, 0)
    return jax.lax.fori_loop(
      0, -(-left // rest),
      lambda i, c: step(c, whole * chunk + i * rest, rest), carry,
    )

  def put(whole: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0)

  def no_rows(*arguments: PyTree) -> jax.Array:
    _, rows = jax.eval_shape(part, *arguments)
    count = len(jax.tree.leaves(arguments[2:])[0])
    return pad(jnp.zeros((count, *rows.shape[1:]), jnp.float32))

  def cut(tree: PyTree, like: PyTree) -> PyTree:
    count = len(jax.tree.leaves(like)[0])
    return jax.tree.map(lambda x: x[:count], tree)

  @jax.custom_vjp
  def total(
    params: PyTree,
    shared: PyTree,
    inputs: PyTree,
    constants: PyTree,
    used: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    def body(carry: PyTree, rows: PyTree, first: jax.Array) -> PyTree:
      value, of_rows = part(params, shared, *rows)
      return carry[0] + value, put(carry[1], of_rows, first)

    zero = jnp.float32(0), no_rows(params, shared, inputs, constants)
    padded = jax.tree.map(pad, (inputs, constants))
    value, of_rows = loop(body, zero, padded, used)
    return value, cut(of_rows, (inputs, constants))

  def forward(
    params: PyTree,
    shared: PyTree,
    inputs: PyTree,
    constants: PyTree,
    used: jax.Array,
  ) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
    def chunk_part(
      params: PyTree, inputs: PyTree, constants: PyTree
    ) -> tuple[jax.Array, jax.Array]:
      return part(params, shared, inputs, constants)

    def body(carry: PyTree, rows: PyTree, first: jax.Array) -> PyTree:
      value, of_rows, of_params, of_inputs = carry
      (more, new_rows), (params_part, inputs_part) = jax.value_and_grad(
        chunk_part, (0, 1), has_aux=True, allow_int=True
      )(params, *rows)
      return (
        value + more,
        put(of_rows, new_rows, first),
        jax.tree.map(jnp.add, of_params, params_part),
        jax.tree.map(
          lambda whole, x: put(whole, x, first) if _is_float(x) else whole,
          of_inputs, inputs_part,
        ),
      )

    padded = jax.tree.map(pad, (inputs, constants))
    zero = (
      jnp.float32(0),
      no_rows(params, shared, inputs, constants),
      jax.tree.map(_zeros_wide, params),
      jax.tree.map(jnp.zeros_like, padded[0]),
    )
    value, of_rows, of_params, of_inputs = loop(body, zero, padded, used)
    of_params = jax.tree.map(lambda x, p: x.astype(p.dtype), of_params, params)
    rows = inputs, constants
    return (value, cut(of_rows, rows)), (of_params, cut(of_inputs, rows))

  def backward(residuals: PyTree, cotangents: tuple) -> tuple:
    of_params, of_inputs = jax.tree.map(
      lambda x: (x * cotangents[0]).astype(x.dtype) if _is_float(x) else None,
      residuals,
    )
    return of_params, None, of_inputs, None, None

  total.defvjp(forward, backward)
  return total


def _zeros_wide(x: jax.Array) -> jax.Array:
  """Zeros like x, to add up in: float32 where x is narrower."""
  wide = jnp.promote_types(x.dtype, jnp.float32) if _is_float(x) else x.dtype
  return jnp.zeros(x.shape, wide)


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)
