"""SASRec's stack against numpy; the parts that other backbones reuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import ITEMS, LENGTH, WIDTH
from toys import noisy

from pin_jax.models.backbones import tied_score
from pin_jax.models.sasrec import sasrec
from pin_jax.types import InputError


def test_stacked_blocks_equal_a_numpy_transformer():
  backbone = sasrec(ITEMS, length=LENGTH, width=WIDTH, blocks=2)
  params = noisy(backbone.init)
  history = np.asarray([[0, 0, 0, 5, 2, 9, 4, 1], [7, 3, 11, 8, 12, 6, 10, 2]])
  states = jax.jit(backbone.encode)(params, history)[:, -1:]
  got = tied_score(params, states, None)
  for row, logits in zip(history, got, strict=True):
    want = references.sasrec(params, row[row > 0], blocks=2)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"width": 6, "heads": 4}, "width=6.*heads=4"),
    ({"width": 8, "heads": 0}, "heads=0"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"dropout": -0.1}, "dropout=-0.1"),
  ],
)
def test_bad_options_are_named_in_one_line(options, message):
  with pytest.raises(InputError, match=message) as error:
    sasrec(ITEMS, **options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["shared", "own", "one", "all"])
@pytest.mark.parametrize("per_candidate", [False, True])
def test_tied_score_equals_a_loop(form, per_candidate):
  rng = np.random.default_rng(0)
  params = {
    "items": rng.normal(size=(ITEMS + 1, WIDTH)).astype(np.float32),
    "bias": rng.normal(size=ITEMS + 1).astype(np.float32),
  }
  rows = 3
  candidates = {
    "shared": np.asarray([4, 0, 12, 4, 7]),
    "own": rng.integers(0, ITEMS + 1, (rows, 5)),
    "one": rng.integers(0, ITEMS + 1, (rows, 1)),
    "all": None,
  }[form]
  index = np.arange(ITEMS + 1) if form == "all" else candidates
  index = np.broadcast_to(index, (rows, index.shape[-1]))
  k = index.shape[1] if per_candidate else 1
  states = rng.normal(size=(rows, k, WIDTH)).astype(np.float32)
  got = jax.jit(tied_score)(params, states, candidates)
  want = np.zeros(index.shape)
  for m in range(rows):
    for c, v in enumerate(index[m]):
      state = states[m, c if per_candidate else 0].astype(np.float64)
      want[m, c] = state @ params["items"][v] + params["bias"][v]
  assert got.shape == index.shape and got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tied_score_accumulates_bfloat16_in_float32():
  ones = jnp.ones((2, 1001), jnp.bfloat16)
  params = {"items": ones, "bias": jnp.zeros(2)}
  got = tied_score(params, ones[:1, None], None)
  np.testing.assert_array_equal(got, [[1001, 1001]])
