"""The simulator against enumeration of every sequence of a tiny world."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pin_jax import types
from pin_jax.data import simulator


def _stationary_by_eig(transition):
  values, vectors = np.linalg.eig(transition.T)
  vector = np.real(vectors[:, np.argmin(np.abs(values - 1))])
  return vector / vector.sum()


def tiny_world(lengths, *, zeros=False):
  """V = 4, G = 2, lengths 3..5; `zeros` forbids some moves in one stratum."""
  rng = np.random.default_rng(7)
  transition = rng.dirichlet(np.full(4, 0.7), size=(2, 4))
  if zeros:
    transition[0, 0] = [0.5, 0.0, 0.5, 0.0]
    transition[:, 2, 3] = 0.0
    transition /= transition.sum(-1, keepdims=True)
  initial = np.stack([_stationary_by_eig(t) for t in transition])
  length_pmf = np.zeros((2, 6))
  length_pmf[:, 3:] = lengths
  return simulator.World(
    prior=np.array([0.6, 0.4]),
    initial=initial,
    transition=transition,
    length_pmf=length_pmf,
  )


WORLDS = {
  "overlapping": tiny_world([[0.2, 0.5, 0.3], [0.1, 0.3, 0.6]]),
  "disjoint": tiny_world([[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]]),
  "no_training_events_in_0": tiny_world([[1.0, 0.0, 0.0], [0.0, 0.4, 0.6]]),
  "forbidden_moves": tiny_world(
    [[0.2, 0.5, 0.3], [0.1, 0.3, 0.6]], zeros=True
  ),
}


def enumerate_events(world, length, event):
  """{window: [G, V] expected events of a random user with that window}."""
  events = {}
  for d, n in itertools.product(range(2), range(3, 6)):
    for sequence in itertools.product(range(4), repeat=n):
      mass = world.prior[d] * world.length_pmf[d, n]
      mass *= world.initial[d, sequence[0]]
      for x, y in itertools.pairwise(sequence):
        mass *= world.transition[d, x, y]
      targets = range(1, n - 2) if event == "training" else [n - 1]
      for t in targets:
        recent = [v + 1 for v in sequence[max(0, t - length) : t]]
        window = tuple([0] * (length - len(recent)) + recent)
        table = events.setdefault(window, np.zeros((2, 4)))
        table[d, sequence[t]] += mass
  return {w: table for w, table in events.items() if table.sum() > 0}


def stacked(world, length, event):
  events = enumerate_events(world, length, event)
  histories = jnp.asarray(np.array(list(events)), jnp.int32)
  return histories, np.array(list(events.values()))


CASES = pytest.mark.parametrize(
  ("world", "length", "event"),
  [
    pytest.param(WORLDS[name], length, event, id=f"{name}-{length}-{event}")
    for name in WORLDS
    for length in (1, 2, 7)
    for event in ("training", "test")
  ],
)


def evaluate(function, world, histories, **options):
  """Calls with one batch size throughout, so that few programs compile."""
  padded = jnp.pad(histories, ((0, 400 - len(histories)), (0, 0)))
  return np.asarray(function(world, padded, **options))[: len(histories)]


class TestAgainstEnumeration:
  @CASES
  def test_every_distribution(self, world, length, event):
    histories, joint = stacked(world, length, event)
    get = lambda function, **options: evaluate(
      function, world, histories, **options
    )
    normal = lambda x: x / x.sum(-1, keepdims=True)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    posterior = get(simulator.stratum_posterior, event=event)
    close(posterior, normal(joint.sum(2)))
    possible = joint.sum(2) > 0
    choice = get(simulator.conditional)
    close(choice[possible], normal(joint[possible]))
    seen = get(simulator.observational, event=event)
    close(seen, normal(joint.sum(1)))

  @pytest.mark.parametrize("length", [1, 2, 7])
  def test_interventional(self, length):
    world = WORLDS["overlapping"]
    histories, joint = stacked(world, length, "test")
    choice = joint / joint.sum(2, keepdims=True)
    want = 0.6 * choice[:, 0] + 0.4 * choice[:, 1]
    got = evaluate(simulator.interventional, world, histories)
    np.testing.assert_allclose(got, want, atol=1e-5)


class TestDistributions:
  @pytest.mark.parametrize("history", [
    [0, 0, 0], [0, 3, 4], [1, 2, 1, 2, 1]  # empty, impossible, too long
  ])
  def test_what_no_event_has_read_has_no_posterior(self, history):
    world, history = WORLDS["forbidden_moves"], jnp.array([history])
    for event in ("training", "test"):
      got = simulator.observational(world, history, event=event)
      np.testing.assert_array_equal(got, np.zeros((1, 4)))
    if not history.any():
      got = simulator.conditional(world, history)[0]
      np.testing.assert_allclose(got, world.initial, atol=1e-6)

  def test_long_windows_keep_float32_precision(self):
    alike = simulator.make_world(
      simulator.WorldSpec(num_items=20, confounding=0.02), seed=3
    )
    world = dataclasses.replace(
      alike, length_pmf=np.repeat(alike.length_pmf[-1:], 5, axis=0)
    )
    history = np.random.default_rng(0).integers(1, 21, size=(4, 100))
    log_p = np.log(world.prior[:, None] * world.initial[:, history[:, 0] - 1])
    for x, y in zip(history.T[:-1], history.T[1:], strict=True):
      log_p += np.log(world.transition[:, x - 1, y - 1])
    want = np.exp(log_p - log_p.max(0))
    want = (want / want.sum(0)).T
    assert want.max() < 0.99
    got = simulator.stratum_posterior(world, jnp.array(history), event="test")
    np.testing.assert_allclose(got, want, atol=1e-5)

  @pytest.mark.parametrize("event", ["training", "test"])
  def test_without_confounding_seeing_is_doing(self, event):
    world = simulator.make_world(
      simulator.WorldSpec(num_items=30, confounding=0.0), seed=0
    )
    history = np.random.default_rng(1).integers(1, 31, size=(20, 6))
    history[:10, :2] = 0
    seen = simulator.observational(world, jnp.array(history), event=event)
    done = simulator.interventional(world, jnp.array(history))
    np.testing.assert_allclose(seen, done, atol=1e-6)

  def test_with_confounding_seeing_is_not_doing(self):
    world = simulator.make_world(simulator.WorldSpec(num_items=30), seed=0)
    history = jnp.array(np.random.default_rng(1).integers(1, 31, size=(20, 6)))
    seen = simulator.observational(world, history, event="training")
    done = simulator.interventional(world, history)
    assert simulator.kl_divergence(seen, jnp.log(done)).min() > 1e-3

  def test_unknown_event(self):
    with pytest.raises(types.InputError, match="event='validation'"):
      simulator.observational(
        WORLDS["overlapping"], jnp.array([[1, 2]]), event="validation"
      )


class TestKlDivergence:
  def test_by_hand(self):
    got = simulator.kl_divergence(
      jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]),
      jnp.log(jnp.array([[0.25, 0.75, 0.0], [0.2, 0.4, 0.4]])),
    )
    want = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), np.log(2.5)]
    np.testing.assert_allclose(got, want, rtol=1e-6)

  def test_of_itself_is_zero_and_without_support_infinite(self):
    p = jnp.array([0.1, 0.9])
    assert simulator.kl_divergence(p, jnp.log(p)) == 0
    assert simulator.kl_divergence(p, jnp.array([-jnp.inf, 0.0])) == jnp.inf


class TestMakeWorld:
  def test_initial_is_stationary(self):
    world = simulator.make_world(simulator.WorldSpec(num_items=100), seed=0)
    for initial, transition in zip(
      world.initial, world.transition, strict=True
    ):
      state = np.full(100, 0.01)
      for _ in range(200):
        state = state @ transition
      np.testing.assert_allclose(initial, state, atol=1e-12)
      np.testing.assert_allclose(
        initial, _stationary_by_eig(transition), atol=1e-10
      )

  def test_distributions_sum_to_one(self):
    world = simulator.make_world(simulator.WorldSpec(), seed=0)
    assert world.prior.shape == (5,)
    assert world.initial.shape == (5, 300)
    assert world.transition.shape == (5, 300, 300)
    assert world.length_pmf.shape == (5, 151)
    for field in ("prior", "initial", "transition", "length_pmf"):
      values = getattr(world, field)
      assert values.dtype == np.float64
      assert (values >= 0).all()
      np.testing.assert_allclose(values.sum(-1), 1, rtol=1e-12)

  def test_preferences_are_of_low_rank_and_rotate(self, monkeypatch):
    monkeypatch.setattr(simulator, "_POPULARITY_EXPONENT", 0.0)

    def preferences(confounding):
      world = simulator.make_world(simulator.WorldSpec(
        num_items=40, rank=3, confounding=confounding
      ), seed=0)
      logits = np.log(world.transition)
      return logits - logits.mean(-1, keepdims=True)

    rotated = preferences(0.3)
    singular = np.linalg.svd(rotated.reshape(-1, 40), compute_uv=False)
    assert singular[2] > 1 and singular[3] < 1e-9
    angle = 0.3 * np.pi / 2
    np.testing.assert_allclose(
      rotated,
      np.cos(angle) * preferences(0.0) + np.sin(angle) * preferences(1.0),
      atol=1e-9,
    )

  def test_without_preferences_choice_is_a_tilted_power_law(self):
    world = simulator.make_world(simulator.WorldSpec(
      num_items=10, borders=(3, 4, 5, 6), scale=0.0, confounding=0.5,
    ), seed=0)
    for transition, exponent in zip(
      world.transition, (0.675, 0.6, 0.525), strict=True
    ):
      want = np.arange(1, 11.0) ** -exponent
      got = np.sort(transition, axis=1)[:, ::-1]
      np.testing.assert_allclose(got, np.tile(want / want.sum(), (10, 1)))

  def test_lengths_are_a_power_law_in_disjoint_ranges(self):
    world = simulator.make_world(simulator.WorldSpec(
      num_items=5, borders=(3, 5, 9)
    ), seed=0)
    low, high = world.length_pmf
    np.testing.assert_allclose(low[4] / low[3], (3 / 4) ** 1.5)
    np.testing.assert_allclose(high[8] / high[5], (5 / 8) ** 1.5)
    assert list(np.flatnonzero(low)) == [3, 4]
    assert list(np.flatnonzero(high)) == [5, 6, 7, 8]

  def test_confounding_changes_nothing_else(self):
    none = simulator.make_world(simulator.WorldSpec(confounding=0.0), seed=0)
    some = simulator.make_world(simulator.WorldSpec(confounding=0.5), seed=0)
    np.testing.assert_array_equal(none.length_pmf, some.length_pmf)
    for transition in none.transition:
      np.testing.assert_array_equal(transition, none.transition[0])
    assert np.abs(some.transition[0] - some.transition[1]).max() > 0.05

  @pytest.mark.parametrize(("name", "value"), [
    ("confounding", 1.5), ("confounding", float("nan")), ("num_items", 1),
    ("num_items", 2**40), ("num_items", 6.5), ("num_items", True),
    ("borders", (5,)), ("borders", (2, 5)), ("borders", (5, 5)),
    ("borders", (3, "a")), ("borders", (4, 6.5)), ("borders", (3, 10**9)),
    ("rank", 1),
  ])
  def test_bad_parameters(self, name, value):
    with pytest.raises(types.InputError, match=f"^{name}=") as error:
      simulator.WorldSpec(**{name: value})
    assert "\n" not in str(error.value)

  @pytest.mark.parametrize("seed", [-1, None, 0.5])
  def test_bad_seed(self, seed):
    with pytest.raises(types.InputError, match="^seed="):
      simulator.make_world(simulator.WorldSpec(), seed=seed)


@pytest.fixture(scope="module")
def world():
  return simulator.make_world(simulator.WorldSpec(num_items=8), seed=0)


@pytest.fixture(scope="module")
def drawn(world):
  return simulator.simulate(world, num_users=5_000, seed=1)


class TestSimulate:
  def test_strata_follow_the_prior(self, world, drawn):
    counts = np.bincount(drawn[1], minlength=5)
    assert stats.chisquare(counts, 5_000 * world.prior).pvalue > 1e-4

  def test_lengths_follow_the_strata(self, world, drawn):
    data, strata = drawn
    lengths = np.diff(data.offsets)
    for d, pmf in enumerate(world.length_pmf):
      counts = np.bincount(lengths[strata == d], minlength=len(pmf))
      assert (counts[pmf == 0] == 0).all()
      common = pmf * counts.sum() >= 5
      observed = np.append(counts[common], counts[~common].sum())
      expected = np.append(pmf[common], pmf[~common].sum()) * counts.sum()
      kept = expected > 0
      p = stats.chisquare(observed[kept], expected[kept]).pvalue
      assert p > 1e-4

  def test_first_and_late_items_are_stationary(self, world, drawn):
    data, strata = drawn
    starts = data.offsets[:-1]
    for d in range(5):
      for position in (0, 4):  # every user has five items
        items = data.items[starts[strata == d] + position] - 1
        counts = np.bincount(items, minlength=8)
        expected = world.initial[d] * counts.sum()
        assert stats.chisquare(counts, expected).pvalue > 1e-4

  def test_transitions_follow_the_strata(self, world, drawn):
    data, strata = drawn
    owner = np.repeat(np.arange(5_000), np.diff(data.offsets))
    inside = owner[1:] == owner[:-1]
    counts = np.zeros((5, 8, 8))
    np.add.at(
      counts,
      (
        strata[owner[1:][inside]],
        data.items[:-1][inside] - 1,
        data.items[1:][inside] - 1,
      ),
      1,
    )
    visits = counts.sum(-1, keepdims=True)
    p = world.transition
    deviation = (counts - visits * p) / np.sqrt(visits * p * (1 - p))
    assert np.abs(deviation).max() < 4.5  # 320 cells
    assert 0.8 < np.mean(deviation**2) < 1.2

  def test_forbidden_moves_never_occur(self):
    data, strata = simulator.simulate(
      WORLDS["forbidden_moves"], num_users=2_000, seed=0
    )
    owner = np.repeat(np.arange(2_000), np.diff(data.offsets))
    moves = (owner[1:] == owner[:-1]) & (data.items[:-1] == 3)
    assert moves.sum() > 100
    assert not (moves & (data.items[1:] == 4)).any()
    moves = (owner[1:] == owner[:-1]) & (data.items[:-1] == 1)
    moves &= strata[owner[1:]] == 0
    assert set(data.items[1:][moves]) == {1, 3}

  def test_items_keep_their_numbers(self):
    world = simulator.make_world(simulator.WorldSpec(), seed=0)
    data, strata = simulator.simulate(world, num_users=3, seed=0)
    assert data.num_users == 3 == len(strata) and data.num_items == 300
    assert len(np.unique(data.items)) < 300
    np.testing.assert_array_equal(data.item_ids, np.arange(1, 301))
    assert data.item_ids.dtype == np.int64
    assert data.items.dtype == np.int32 and data.offsets.dtype == np.int64
    assert data.items.min() >= 1 and data.items.max() <= 300

  def test_seed_determines_the_data(self, world, drawn):
    again, strata = simulator.simulate(world, num_users=5_000, seed=1)
    np.testing.assert_array_equal(again.items, drawn[0].items)
    np.testing.assert_array_equal(strata, drawn[1])
    other, _ = simulator.simulate(world, num_users=5_000, seed=2)
    assert not np.array_equal(other.offsets, again.offsets)

  @pytest.mark.parametrize("count", [0, 2**40, None])
  def test_bad_numbers_of_users(self, world, count):
    with pytest.raises(types.InputError, match=f"num_users={count}"):
      simulator.simulate(world, num_users=count, seed=0)
