"""The backbones in numpy: one history without padding at a time, by loops.

Each backbone maps (params, items) to the logits [V+1] after the last item;
`factor` multiplies the representation, as a plugin may; `later` counts the
columns of the window after that item; `told` is the user's activeness, where
the model reads it. BUILDERS make the models themselves, small and without
dropout.
"""

import functools
import math

import numpy as np
import scipy.special

from pin_jax.models import din as _din
from pin_jax.models import gru4rec as _gru4rec
from pin_jax.models import hstu as _hstu
from pin_jax.models import sasrec as _sasrec

ITEMS, LENGTH, WIDTH = 12, 8, 4
_SIZES = {"length": LENGTH, "width": WIDTH, "dropout": 0.0}
BUILDERS = {
  "sasrec": functools.partial(_sasrec.sasrec, ITEMS, blocks=1, **_SIZES),
  "gru4rec": functools.partial(_gru4rec.gru4rec, ITEMS, layers=1, **_SIZES),
  "hstu": functools.partial(_hstu.hstu, ITEMS, blocks=1, **_SIZES),
  "din": functools.partial(
    _din.din, ITEMS, attention_hidden=3, hidden=6, **_SIZES
  ),
}


def wide(params):
  """The tree in float64."""
  if isinstance(params, dict):
    return {name: wide(x) for name, x in params.items()}
  return np.asarray(params, np.float64)


def _norm(x, p=None):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  return x if p is None else x * p["scale"] + p["bias"]


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _silu(x):
  return x * scipy.special.expit(x)


def _prelu(x, p):
  return np.where(x > 0, x, x * p["negative_slope"])


def _dense(x, p):
  return x @ p["kernel"] + p.get("bias", 0)


def _tied(params, state):
  return params["items"] @ state + params["bias"]


def _inputs(p, items, scale, told):
  """What the model reads of each item [L, D]."""
  x = p["items"][items] * scale
  if told is None:
    return x
  return x + p["activeness"][min(int(told).bit_length() - 1, 15)]


def _softmax_attention(p, x):
  out = np.zeros_like(x) + p["out"]["bias"]
  for head in range(p["query"]["kernel"].shape[1]):
    query, key, value = (
      x @ p[n]["kernel"][:, head] + p[n]["bias"][head]
      for n in ("query", "key", "value")
    )
    for t in range(len(x)):
      logits = key[: t + 1] @ query[t] / math.sqrt(query.shape[-1])
      pooled = scipy.special.softmax(logits) @ value[: t + 1]
      out[t] += pooled @ p["out"]["kernel"][head]
  return out


def sasrec(params, items, factor=1, later=0, blocks=1, told=None):
  """A pre-norm transformer."""
  p = wide(params)
  end = len(p["positions"]) - later
  x = _inputs(p, items, math.sqrt(WIDTH), told)
  x = x + p["positions"][end - len(items) : end]
  for i in range(blocks):
    block = p[f"Block_{i}"]
    attention, mlp = block["CausalAttention_0"], block["MLP_0"]
    x = x + _softmax_attention(attention, _norm(x, block["LayerNorm_0"]))
    h = _gelu(_dense(_norm(x, block["LayerNorm_1"]), mlp["Dense_0"]))
    x = x + _dense(h, mlp["Dense_1"])
  return _tied(p, factor * _norm(x, p["LayerNorm_0"])[-1])


def gru(p, x):
  """States [L, H] of one layer after every row of x [L, D]."""
  h, states = np.zeros(len(p["bias"])), []
  for row in x:
    given = np.split(_dense(row, p["inputs"]), 3)
    own = np.split(h @ p["recurrent"], 3)
    reset = scipy.special.expit(given[0] + own[0])
    keep = scipy.special.expit(given[1] + own[1])
    new = np.tanh(given[2] + reset * (own[2] + p["bias"]))
    h = (1 - keep) * new + keep * h
    states.append(h)
  return np.asarray(states)


def gru4rec(params, items, factor=1, later=0, layers=1, told=None):
  """Stacked gated recurrent units."""
  del later
  p = wide(params)
  x = _inputs(p, items, math.sqrt(WIDTH), told)
  for i in range(layers):
    x = gru(p[f"GRU_{i}"], x)
  return _tied(p, factor * x[-1])


def hstu(params, items, factor=1, later=0, blocks=1, heads=2, told=None):
  """Gated pointwise attention."""
  del later
  p = wide(params)
  x = _inputs(p, items, math.sqrt(WIDTH), told)
  for i in range(blocks):
    unit = p[f"_Unit_{i}"]
    u, v, q, k = np.split(_silu(_dense(_norm(x), unit["Dense_0"])), 4, -1)
    read = np.zeros_like(x)
    for part in np.split(np.arange(WIDTH), heads):
      for t in range(len(x)):
        for s in range(t + 1):
          logit = q[t, part] @ k[s, part] + unit["positions"][t - s]
          read[t, part] += _silu(logit) / LENGTH * v[s, part]
    x = x + _dense(_norm(read) * u, unit["Dense_1"])
  return _tied(p, factor * _norm(x, p["LayerNorm_0"])[-1])


def din(params, items, factor=1, later=0, told=None):
  """Target attention without softmax, then a network."""
  del later
  p = wide(params)
  unit, predictor, logits = p["unit"], p["predictor"], []
  for candidate in p["items"]:
    read = np.zeros(WIDTH)
    for past in _inputs(p, items, 1, told):
      x = np.concatenate([past, candidate, past - candidate, past * candidate])
      h = _prelu(_dense(x, unit), unit["PReLU_0"])
      read += _dense(h, unit["Dense_0"]) * past
    read = factor * read
    h = np.concatenate([read, candidate, read * candidate])
    for i in range(2):
      h = _prelu(_dense(h, predictor[f"Dense_{i}"]), predictor[f"PReLU_{i}"])
    logits.append(_dense(h, predictor["Dense_2"])[0])
  return np.asarray(logits)
