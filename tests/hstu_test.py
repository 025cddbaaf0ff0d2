"""HSTU's stack of units against numpy; what its normaliser depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import ITEMS, LENGTH, WIDTH
from toys import noisy

from pin_jax.models.backbones import tied_score
from pin_jax.models.hstu import hstu
from pin_jax.types import InputError

HISTORY = np.asarray([[0, 0, 0, 5, 2, 9, 4, 1], [7, 3, 11, 8, 12, 6, 10, 2]])


@pytest.mark.parametrize("heads", [1, 4])
def test_stacked_units_equal_numpy(heads):
  backbone = hstu(ITEMS, length=LENGTH, width=WIDTH, blocks=2, heads=heads)
  params = noisy(backbone.init)
  states = jax.jit(backbone.encode)(params, HISTORY)[:, -1:]
  got = tied_score(params, states, None)
  for row, logits in zip(HISTORY, got, strict=True):
    want = references.hstu(params, row[row > 0], blocks=2, heads=heads)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_a_state_knows_distances_but_not_its_place_in_the_window():
  backbone = hstu(ITEMS, length=LENGTH, width=WIDTH, blocks=2)
  params = noisy(backbone.init)
  encode = jax.jit(backbone.encode)
  early = jnp.asarray([[0, 5, 2, 9, 0, 0, 0, 0]])
  late = jnp.asarray([[0, 0, 0, 0, 0, 5, 2, 9]])
  swapped = jnp.asarray([[0, 0, 0, 0, 0, 2, 5, 9]])
  first, second, third = (encode(params, x) for x in (early, late, swapped))
  np.testing.assert_allclose(first[0, 3], second[0, 7], rtol=1e-5, atol=1e-5)
  assert np.abs(second[0, 7] - third[0, 7]).max() > 1e-3


def test_heads_must_divide_the_width():
  with pytest.raises(InputError, match="width=6.*heads=4"):
    hstu(ITEMS, width=6, heads=4)
