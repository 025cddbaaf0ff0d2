"""GRU4Rec's stack of layers against numpy."""

import jax
import numpy as np
import references
from references import ITEMS, LENGTH, WIDTH
from toys import noisy

from pin_jax.models.backbones import tied_score
from pin_jax.models.gru4rec import gru4rec

HISTORY = np.asarray([[0, 0, 0, 5, 2, 9, 4, 1], [7, 3, 11, 8, 12, 6, 10, 2]])


def test_stacked_layers_equal_numpy():
  backbone = gru4rec(ITEMS, length=LENGTH, width=WIDTH, layers=2)
  params = noisy(backbone.init)
  states = jax.jit(backbone.encode)(params, HISTORY)[:, -1:]
  got = tied_score(params, states, None)
  for row, logits in zip(HISTORY, got, strict=True):
    want = references.gru4rec(params, row[row > 0], layers=2)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_dropout_acts_behind_the_last_layer():
  backbone = gru4rec(ITEMS, length=LENGTH, width=WIDTH, dropout=0.5)
  params = noisy(backbone.init)
  states = jax.jit(backbone.encode)(params, HISTORY, jax.random.key(1))
  assert 0.2 < np.mean(np.asarray(states[1]) == 0) < 0.8
