"""Evaluation against loops over users and items, scipy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from pin_jax.data.batches import make_sequences
from pin_jax.data.interactions import from_columns
from pin_jax.data.splits import leave_one_out
from pin_jax.evaluation import ranking
from pin_jax.evaluation.ranking import (
  Requests,
  draw_unseen,
  make_log_probabilities,
  make_ranker,
  make_sampled_ranker,
)
from pin_jax.models import sasrec as lib
from pin_jax.models.backbones import tied_score
from pin_jax.models.plugins import Model, Weights, bottleneck, init_stacked
from pin_jax.types import Backbone, Plugin

ITEMS, LENGTH, WIDTH, USERS = 30, 5, 4, 23


@pytest.fixture(scope="module")
def split():
  rng = np.random.default_rng(0)
  sizes = rng.integers(3, 20, USERS)
  users = np.repeat(np.arange(USERS), sizes)
  items = rng.integers(0, ITEMS, len(users))
  items[:ITEMS] = np.arange(ITEMS)
  return leave_one_out(from_columns(users, items))


@pytest.fixture(scope="module")
def sequences(split):
  return make_sequences(split)


@pytest.fixture(scope="module")
def requests(split):
  """Everybody's test target, then odd positions, one without a history."""
  rng = np.random.default_rng(1)
  users = np.concatenate([np.arange(USERS), [4, 4, 0, 7]])
  positions = np.concatenate([split.test, split.validation[[4, 4, 0]], [0]])
  return Requests(users, positions, rng.integers(0, 2, len(users)))


def _bag():
  """State = sum of the window's embeddings; integers stay exact."""
  return Backbone(
    init=lambda key: None,
    encode=lambda p, history, key: jnp.cumsum(p["items"][history], axis=1),
    at=lambda context, rows, columns: context[rows, columns],
    represent=lambda params, states, candidates: states[:, None],
    score=tied_score,
  )


def _scale():
  return Plugin(lambda key: jnp.ones(()), lambda p, x: p * x)


@pytest.fixture(scope="module")
def params():
  """Small integers, so that many scores tie, with duplicated items."""
  rng = np.random.default_rng(2)
  items = rng.integers(-2, 3, (ITEMS + 1, WIDTH)).astype(np.float32)
  bias = rng.integers(-1, 2, ITEMS + 1).astype(np.float32)
  items[0] = 0
  for copy, original in ((29, 2), (17, 2), (9, 8)):
    items[copy], bias[copy] = items[original], bias[original]
  return {"items": items, "bias": bias}


FACTORS = np.asarray([1.0, -3.0], np.float32)


def _logits(params, history, factor=1):
  state = params["items"][history[-LENGTH:]].sum(0)
  return factor * params["items"] @ state + params["bias"]


def _reference(split, params, requests, factors):
  """(rank, candidates, rank_unmasked, candidates_unmasked) of a request."""
  data = split.interactions
  for user, position, segment in zip(*requests, strict=True):
    start = data.offsets[user]
    history = data.items[start : start + position]
    target = data.items[start + position]
    scores = _logits(params, history, factors[segment])
    out = []
    for left_out in (set(history), set()):
      listed = [
        v for v in range(1, ITEMS + 1) if v == target or v not in left_out
      ]
      ranks = scipy.stats.rankdata(-scores[listed], method="average")
      out += [ranks[listed.index(target)], len(listed)]
    yield out


def _assert_equal(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_fixtures_cover_the_edges(split, params, requests):
  data = split.interactions
  assert data.num_items == ITEMS
  repeats = [
    data.items[s + t] in data.items[s : s + t]
    for s, t in zip(data.offsets[:-1], split.test, strict=True)
  ]
  assert any(repeats) and not all(repeats)
  want = np.asarray(list(_reference(split, params, requests, [1, 1])))
  assert (want[:, 0] % 1).any() and (want[:, 0] != want[:, 2]).any()


@pytest.fixture(params=[(128, 8), (5, 8), (5, 8, 30), (128, 8, 8)])
def chunk(request, monkeypatch):
  chunk = ranking.Chunk(*request.param)
  monkeypatch.setattr(ranking, "chunk_of", lambda *_: chunk)


@pytest.mark.parametrize("with_plugin", [False, True])
def test_ranks_equal_a_loop_over_users(
  split, sequences, params, requests, chunk, with_plugin
):
  model = Model(_bag(), _scale() if with_plugin else None)
  factors = FACTORS if with_plugin else np.ones(2, np.float32)
  rank = make_ranker(model, num_items=ITEMS, length=LENGTH)
  got = rank(Weights(params, factors), sequences, requests)
  want = np.asarray(list(_reference(split, params, requests, factors)))
  _assert_equal(got, want.T)
  assert (got.candidates_unmasked == ITEMS).all()


def test_scores_of_nan_never_help(sequences, split, params, chunk):
  user = 3
  start, position = split.interactions.offsets[user], split.test[user]
  history = split.interactions.items[start : start + position]
  target = split.interactions.items[start + position]
  rank = make_ranker(Model(_bag(), None), num_items=ITEMS, length=LENGTH)
  request = Requests(*(np.asarray([x]) for x in (user, position, 0)))
  run = lambda bias: rank(
    Weights({**params, "bias": bias}, None), sequences, request
  )
  scores = _logits(params, history)
  others = np.setdiff1d(np.arange(1, ITEMS + 1), [target])
  worst = others[np.argmin(scores[others])]
  assert scores[worst] < scores[target]
  plain = run(params["bias"])
  bias = params["bias"].copy()
  bias[worst] = np.nan
  assert run(bias).rank_unmasked == plain.rank_unmasked + 1
  bias = params["bias"].copy()
  bias[target] = np.nan
  got = run(bias)
  assert got.rank_unmasked == ITEMS
  assert got.rank == got.candidates == plain.candidates
  got = run(np.full_like(bias, np.nan))
  assert got.rank_unmasked == ITEMS and got.rank == got.candidates


def _random_params(init):
  rng = np.random.default_rng(4)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture(scope="module")
def sasrec():
  """SASRec with random weights, a plugin, and duplicated items."""
  backbone = lib.sasrec(ITEMS, length=LENGTH, width=WIDTH, blocks=1)
  plugin = bottleneck(WIDTH, hidden=2)
  params = _random_params(backbone.init)
  items, bias = np.array(params["items"]), np.array(params["bias"])
  items[[30, 11, 19]], bias[[30, 11, 19]] = items[1], bias[1]
  params = {**params, "items": jnp.asarray(items), "bias": jnp.asarray(bias)}
  plugins = _random_params(lambda key: init_stacked(plugin, key, 2))
  return Model(backbone, plugin), Weights(params, plugins)


@pytest.mark.parametrize("kept", [6000, 2500])
def test_ranks_are_those_of_other_chunks_to_the_last_bit(monkeypatch, kept):
  """All items score alike but for rounding, so ranks show every bit of it."""
  rng = np.random.default_rng(6)
  items, users = 6000, 300
  split = leave_one_out(from_columns(
    np.repeat(np.arange(users), 60), rng.permutation(users * 60) % items
  ))
  backbone = lib.sasrec(items, length=20, width=64, blocks=1)
  params = _random_params(backbone.init)
  noise = 1 + 1e-6 * jax.random.uniform(jax.random.key(0), (items + 1, 64))
  params |= {
    "items": params["items"][:1] * noise, "bias": jnp.zeros(items + 1)
  }
  usual, ranks = ranking.chunk_of(items), []
  for some in (10_000, kept):
    own = usual._replace(kept=some)
    monkeypatch.setattr(ranking, "chunk_of", lambda *_, own=own: own)
    rank = make_ranker(Model(backbone, None), num_items=items, length=20)
    ranks.append(rank(
      Weights(params, None), make_sequences(split),
      Requests(np.arange(users), split.test, np.zeros(users)),
    ))
  assert len(np.unique(ranks[0].rank)) > 40
  _assert_equal(*ranks)


def test_log_probabilities_equal_scipy(
  split, sequences, params, requests, chunk
):
  got = make_log_probabilities(
    Model(_bag(), _scale()), num_items=ITEMS, length=LENGTH
  )(Weights(params, FACTORS), sequences, requests)
  assert got.shape == (len(requests.users), ITEMS)
  np.testing.assert_allclose(np.exp(got).sum(-1), 1, rtol=1e-5)
  data = split.interactions
  for row, user, position, segment in zip(got, *requests, strict=True):
    start = data.offsets[user]
    history = data.items[start : start + position]
    logits = _logits(params, history, FACTORS[segment]).astype(np.float64)
    want = scipy.special.log_softmax(logits[1:])
    np.testing.assert_allclose(row, want, rtol=1e-5, atol=1e-5)


def test_nobody_to_rank_gives_empty_results(split, sequences, sasrec):
  model, weights = sasrec
  nobody = Requests(*(np.zeros(0, np.int32) for _ in Requests._fields))
  sizes = {"num_items": ITEMS, "length": LENGTH}
  ranks = make_ranker(model, **sizes)(weights, sequences, nobody)
  assert all(x.shape == (0,) for x in ranks)
  rows = make_log_probabilities(model, **sizes)(weights, sequences, nobody)
  assert rows.shape == (0, ITEMS)
  rank = make_sampled_ranker(
    model, split.interactions, length=LENGTH, count=9
  )
  got = rank(weights, sequences, nobody)
  assert got.rank.shape == (0,) and got.negative_scores.shape == (0, 9)


# Sampled ranking.


def _owned(data, user):
  return set(data.items[data.offsets[user] : data.offsets[user + 1]].tolist())


def test_drawn_items_are_distinct_and_never_interacted_with(split, requests):
  data = split.interactions
  drawn = draw_unseen(data, requests, count=9, seed=0)
  for user, row in zip(requests.users, drawn.tolist(), strict=True):
    assert len(set(row)) == 9
    assert not set(row) & _owned(data, user)
    assert 1 <= min(row) and max(row) <= ITEMS


def test_drawn_items_are_uniform(split):
  data, user = split.interactions, 3
  counts = np.zeros(ITEMS + 1)
  requests = Requests(*(np.asarray([x]) for x in (user, 2, 0)))
  for seed in range(3000):
    counts[draw_unseen(data, requests, count=4, seed=seed)[0]] += 1
  free = sorted(set(range(1, ITEMS + 1)) - _owned(data, user))
  assert counts[free].sum() == counts.sum() == 12_000
  assert scipy.stats.chisquare(counts[free]).pvalue > 1e-3


def test_drawn_items_follow_from_seed_user_and_target(split, requests):
  data = split.interactions
  draw = lambda requests, seed=0: draw_unseen(
    data, requests, count=9, seed=seed
  )
  whole = draw(requests)
  alone = draw(Requests(*(x[4:5] for x in requests)))
  np.testing.assert_array_equal(alone, whole[4:5])
  assert set(draw(requests, 1)[4]) != set(whole[4])
  assert set(whole[4]) != set(whole[USERS])  # user 4's validation target
  np.testing.assert_array_equal(whole[USERS], whole[USERS + 1])


@pytest.mark.parametrize("with_plugin", [False, True])
def test_sampled_ranks_equal_a_loop_over_users(
  split, sequences, params, requests, chunk, with_plugin
):
  data = split.interactions
  factors = FACTORS if with_plugin else np.ones(2, np.float32)
  model = Model(_bag(), _scale() if with_plugin else None)
  rank = make_sampled_ranker(model, data, length=LENGTH, count=9, seed=3)
  got = rank(Weights(params, factors), sequences, requests)
  drawn = draw_unseen(data, requests, count=9, seed=3)
  assert got.negative_scores.shape == drawn.shape
  np.testing.assert_array_equal(got.candidates, 10)
  for i, (user, position, segment) in enumerate(zip(*requests, strict=True)):
    start = data.offsets[user]
    logits = _logits(
      params, data.items[start : start + position], factors[segment]
    )
    target = data.items[start + position]
    assert got.score[i] == logits[target]
    np.testing.assert_array_equal(got.negative_scores[i], logits[drawn[i]])
    listed = np.concatenate([[logits[target]], logits[drawn[i]]])
    assert got.rank[i] == scipy.stats.rankdata(-listed, method="average")[0]
