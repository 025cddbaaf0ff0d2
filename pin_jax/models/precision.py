"""Mixed precision: bfloat16 in the products, float32 in what adds up."""

import jax
import jax.numpy as jnp

from pin_jax.types import Backbone, InputError, PyTree

COMPUTE = ("float32", "bfloat16")


def computed_in(backbone: Backbone, compute: str) -> Backbone:
  """The backbone that computes in another type than that of its params.

  The params stay float32, and with them what is done to them: optimizer,
  moving average, Gramians, aggregation. `encode`, `represent` and `score` see
  them cast, all but the item bias; gradients come back through the cast as
  float32. A gradient is rounded once a use of the params; the uses (rows of a
  table, steps of the GRU, chunks of the loss, groups) add up in float32.

  In the compute type: operands of the products, activations and residual
  stream, what `represent` returns. In float32 in any case: the products'
  accumulators, statistics of LayerNorm, attention logits and their softmax, the
  GRU's state and gates, dropout's factor, DIN's last layer, the logits with
  their item bias, every loss. bfloat16 has float32's range, so that there is no
  loss scaling. With float32 nothing changes, to the bit.

  Args:
    backbone: the backbone to wrap.
    compute: one of COMPUTE.

  Raises:
    InputError: for an unknown type.

  Reference:
    Micikevicius et al., ICLR 2018, arXiv 1710.03740 (master weights, float32
    accumulation); Kalamkar et al. 2019, arXiv 1905.12322 (bfloat16 without loss
    scaling); params, compute and output types are the policy of DeepMind's jmp.
    Deviations: LayerNorm's parameters are cast with the others. How the sums
    that broadcasting leaves behind (gradients of Dense biases and of positions)
    are accumulated is XLA's choice.
  """
  if compute not in COMPUTE:
    raise InputError(
      f"compute={compute!r} is unknown; use one of {list(COMPUTE)}"
    )

  def cast(tree: PyTree) -> PyTree:
    narrow = lambda x: (
      x.astype(compute) if jnp.issubdtype(x.dtype, jnp.floating) else x
    )
    return jax.tree.map(narrow, tree)

  def cast_params(params: dict[str, PyTree]) -> dict[str, PyTree]:
    return {k: v if k == "bias" else cast(v) for k, v in params.items()}

  return backbone._replace(
    encode=lambda params, *args: backbone.encode(cast_params(params), *args),
    represent=lambda params, *args: backbone.represent(
      cast_params(params), *args
    ),
    score=lambda params, representations, candidates: backbone.score(
      cast_params(params), cast(representations), candidates
    ).astype(jnp.float32),
  )
