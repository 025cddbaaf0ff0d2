"""Bootstrap intervals against plain numpy, and their coverage."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats

from pin_jax.evaluation import statistics
from pin_jax.evaluation.statistics import Bootstrap
from pin_jax.types import InputError


@pytest.fixture(autouse=True)
def _no_warnings():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    yield


def _pair(num_users=300, seed=0):
  rng = np.random.default_rng(seed)
  base = rng.exponential(1.0, num_users)
  return base, base * rng.uniform(0.6, 1.7, num_users)


def test_pairing_makes_the_interval_narrow():
  base, _ = _pair()
  other = 1.1 * base
  paired = statistics.relative_change(base, other)
  broken = statistics.relative_change(base, other[::-1])
  assert paired.estimate == pytest.approx(0.1)
  np.testing.assert_allclose([paired.low, paired.high], 0.1, atol=1e-12)
  assert broken.high - broken.low > 0.1


def test_leading_axes_share_their_resamples_and_batches_change_nothing(
  monkeypatch
):
  base, other = np.stack([_pair(seed=s) for s in range(6)], axis=1)
  base, other = (x.reshape(2, 3, 1, -1) for x in (base, other))
  together = statistics.relative_change(base, other)
  monkeypatch.setattr(statistics, "_BATCH_ELEMENTS", 10 * base.shape[-1])
  assert together.low.shape == (2, 3)
  alone = statistics.relative_change(base[1, 2], other[1, 2])
  np.testing.assert_allclose([field[1, 2] for field in together], alone)


def test_result_follows_from_the_seed():
  base, other = _pair()
  run = lambda seed: statistics.relative_change(
    base, other, bootstrap=Bootstrap(seed=seed)
  )
  assert run(3) == run(3) != run(4)


@pytest.mark.parametrize("num_users", [0, 1])
def test_fewer_than_two_users_have_no_interval(num_users):
  ones = np.ones(num_users)
  change = statistics.relative_change(ones, 2 * ones)
  mean = statistics.mean_interval(ones)
  assert np.isnan([*change[1:], *mean[1:]]).all()
  if num_users:
    assert (change.estimate, mean.estimate) == (1, 1)
  else:
    assert np.isnan([change.estimate, mean.estimate]).all()


@pytest.mark.parametrize("other", [np.zeros(20), np.ones(20)])
def test_zero_base_mean_is_nan(other):
  assert np.isnan(statistics.relative_change(np.zeros(20), other)).all()


def test_a_base_that_some_resamples_miss_has_no_interval():
  base = np.eye(1, 50)[0]
  change = statistics.relative_change(base, np.ones(50))
  assert change.estimate == pytest.approx(49)
  assert math.isnan(change.low) and math.isnan(change.high)


def test_bad_input_names_the_remedy():
  with pytest.raises(InputError, match="one user id and one seed for each"):
    statistics.by_seed(np.ones(3), [1, 2], [0, 0])
  with pytest.raises(InputError, match="3 rows of 2 users and 2 seeds"):
    statistics.by_seed(np.ones(3), [1, 2, 1], [0, 0, 1])


# Users crossed with seeds.


def _cube(rng, num_seeds, num_users, *, of_seeds, of_users, of_both):
  """Values [S, U] with the three kinds of spread, mean 0."""
  return (
    of_seeds * rng.normal(size=(num_seeds, 1))
    + of_users * rng.normal(size=(1, num_users))
    + of_both * rng.normal(size=(num_seeds, num_users))
  )


def _numpy_crossed(statistic, num_seeds, num_users, resamples=3000):
  rng = np.random.default_rng(98)
  draws = []
  for _ in range(resamples):
    seeds = rng.integers(0, num_seeds, num_seeds)
    users = rng.integers(0, num_users, num_users)
    draws.append(statistic(np.ix_(seeds, users)))
  return np.asarray(draws)


def test_rows_are_laid_out_by_seed_and_user():
  cube = np.arange(24.0).reshape(2, 3, 4)
  order = np.random.default_rng(7).permutation(12)
  seeds, users = (x.ravel()[order] for x in np.indices((3, 4)))
  names = np.array(["a", "b", "c", "d"], object)[users]
  got = statistics.by_seed(cube.reshape(2, 12)[:, order], names, seeds)
  np.testing.assert_array_equal(got, cube)


def test_crossed_bootstrap_equals_a_numpy_loop():
  rng = np.random.default_rng(0)
  base = 3 + _cube(rng, 4, 60, of_seeds=0.3, of_users=1, of_both=1)
  other = 1.1 * base + 0.5 * rng.normal(size=base.shape)
  got = statistics.relative_change(base, other, margin=0.05)
  draws = _numpy_crossed(lambda i: other[i].mean() / base[i].mean() - 1, 4, 60)
  low, high = np.percentile(draws, [2.5, 97.5])
  assert got.estimate == pytest.approx(other.mean() / base.mean() - 1)
  np.testing.assert_allclose(
    [got.low, got.high], [low, high], atol=0.1 * (high - low)
  )
  mean = statistics.mean_interval(base)
  draws = _numpy_crossed(lambda i: base[i].mean(), 4, 60)
  low, high = np.percentile(draws, [2.5, 97.5])
  np.testing.assert_allclose(mean[1:], [low, high], atol=0.1 * (high - low))


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_p_value_agrees_with_scipys_paired_t_test(margin):
  rng = np.random.default_rng(1)
  base = 5 + rng.normal(size=400)
  for shift in (-0.08, 0.02, 0.05, 0.11):
    other = base * (1 - margin) + shift + rng.normal(0, 1, 400)
    want = scipy.stats.ttest_rel(
      other, (1 - margin) * base, alternative="greater"
    ).pvalue
    got = statistics.relative_change(
      base, other, margin=margin, bootstrap=Bootstrap(num_resamples=8000)
    ).p_value
    assert got == pytest.approx(min(1, 2 * want), abs=0.03)


def test_p_value_by_hand():
  # Two users: both draws are the first (1/4), the second (1/4), or one each.
  # The change is -1, 3 or 1, so a quarter of the draws is not positive.
  change = statistics.relative_change(
    [1.0, 1.0], [0.0, 4.0], bootstrap=Bootstrap(num_resamples=20_000)
  )
  assert change.estimate == 1
  assert change.p_value == pytest.approx(0.5, abs=0.02)
  certain = statistics.relative_change(
    [1.0, 1.0], [2.0, 2.0], bootstrap=Bootstrap(num_resamples=999)
  )
  assert certain.p_value == pytest.approx(2 / 1000)


def test_p_values_say_what_the_interval_says():
  """p < alpha if and only if the bound excludes the border, ties and all."""
  kinds, decided = {"none": 0, "gain": 0, "harm": 0}, 0
  for seed in range(400):
    rng = np.random.default_rng(seed)
    users, resamples = rng.integers(2, 30), int(rng.choice([40, 199, 399]))
    values = [0.0, 0.5, 1.0] if seed % 2 else np.linspace(0, 1, 97)
    base, other = rng.choice(values, (2, users)) + 0.1
    if seed % 3 == 0:
      other = np.where(rng.random(users) < 0.8, base, other)
    if seed % 7 == 0:
      other = 0.95 * base  # every draw ties with the border, up to rounding
    margin = float(rng.choice([0, 0.05, 0.2]))
    confidence = float(rng.choice([0.8, 0.9, 0.95]))
    change = statistics.relative_change(
      base, other, margin=margin,
      bootstrap=Bootstrap(confidence, resamples, seed),
    )
    alpha = {0.8: 0.2, 0.9: 0.1, 0.95: 0.05}[confidence]
    assert (change.p_value < alpha) == (change.low > -margin), seed
    assert (change.p_harm < alpha) == (change.high < -margin), seed
    kind = "gain" if change.p_value < alpha else "none"
    kinds["harm" if change.p_harm < alpha else kind] += 1
    decided += min(abs(change.low + margin), abs(change.high + margin)) < 1e-9
  assert min(kinds.values()) > 20 and decided > 20  # on the border itself


def test_ends_by_hand():
  # Draws are -1, 3 (a quarter each) or 1. With R = 199 and 95 % the ends are
  # the 4th draws from either side, with 20 % the 79th.
  for confidence, ends in ((0.95, (-1, 3)), (0.2, (1, 1))):
    change = statistics.relative_change(
      [1.0, 1.0], [0.0, 4.0], bootstrap=Bootstrap(confidence, 199)
    )
    assert (change.low, change.high) == ends


def test_too_few_resamples_have_no_interval():
  for resamples, known in ((39, False), (40, True)):
    change = statistics.relative_change(
      np.ones(9), np.arange(9.0), bootstrap=Bootstrap(0.95, resamples)
    )
    assert np.isfinite([change.low, change.high]).all() == known
    assert change.p_value >= 0.05 or known


def _covers(num_seeds, trials, **spread):
  """Share of trials whose 95 % interval covers, and that find an effect."""
  covered = found = 0
  for trial in range(trials):
    rng = np.random.default_rng(trial)
    base = 5 + _cube(rng, num_seeds, 80, **spread)
    other = 5 + _cube(rng, num_seeds, 80, **spread)
    change = statistics.relative_change(
      base, other, bootstrap=Bootstrap(0.95, 199, trial)
    )
    covered += change.low <= 0 <= change.high
    found += change.p_value < 0.05
  return covered / trials, found / trials


@pytest.mark.parametrize(("num_seeds", "spread", "least"), [
  # A typical ranking job: users differ most, seeds a little.
  (3, {"of_seeds": 0.1, "of_users": 1, "of_both": 1}, 0.92),
  # A user's results under two seeds share nothing: on the safe side.
  (3, {"of_seeds": 0, "of_users": 0.1, "of_both": 1}, 0.97),
  (1, {"of_seeds": 0, "of_users": 1, "of_both": 1}, 0.92),
])  # fmt: skip
def test_coverage_and_false_positives_of_the_crossed_test(
  num_seeds, spread, least
):
  covered, found = _covers(num_seeds, 600, **spread)
  assert covered >= least
  # Of 2.5 % where the interval is exact; 3 standard errors of 600 trials.
  assert found <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 600)


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "least", "most"), [
  (1, 0.11, 0.18), (2, 0.03, 0.08), (3, 0, 0.045), (5, 0, 0.04),
])  # fmt: skip
def test_how_often_a_test_errs_with_the_spread_that_jobs_have(
  num_seeds, least, most
):
  """Two seeds correlate .85 per user, their means differ by 2 %.

  Users are 600 with .8 of the spread of the mean, whose standard error is that
  of 9,000 users of Beauty. Three models; both one-sided tests at 2.5 %.
  """
  trials, users, wrong = 400, 600, 0
  for trial in range(trials):
    rng = np.random.default_rng(trial)
    of_user = 0.8 * math.sqrt(0.85) * rng.normal(size=users)
    cubes = 1 + of_user + np.stack([
      _cube(rng, num_seeds, users, of_seeds=0.02, of_users=0,
            of_both=0.8 * math.sqrt(0.15)) for _ in range(4)
    ])  # fmt: skip
    change = statistics.relative_change(
      np.broadcast_to(cubes[0], cubes[1:].shape), cubes[1:],
      bootstrap=Bootstrap(0.95, 399, trial),
    )
    wrong += np.mean([change.p_value < 0.05, change.p_harm < 0.05])
  assert least <= wrong / trials <= most


def test_seeds_alone_at_three_seeds_cover_75_in_100():
  # All three seeds equal has probability 1/27 > 2.5 %: the interval ends at the
  # smallest and largest seed, and misses with probability 2 / 2^3.
  covered, _ = _covers(3, 400, of_seeds=0.5, of_users=0, of_both=1e-3)
  assert covered == pytest.approx(0.75, abs=3 * math.sqrt(0.75 * 0.25 / 400))


def test_gap_equals_a_numpy_loop():
  rng = np.random.default_rng(4)
  head = 2 + _cube(rng, 3, 40, of_seeds=0.5, of_users=1, of_both=0.3)
  tail = 1 + _cube(rng, 3, 160, of_seeds=0.5, of_users=1, of_both=0.3)
  got = statistics.gap(head, tail, Bootstrap(num_resamples=4000))
  draws = []
  for _ in range(4000):
    seeds = rng.integers(0, 3, 3)
    draws.append(
      head[np.ix_(seeds, rng.integers(0, 40, 40))].mean()
      - tail[np.ix_(seeds, rng.integers(0, 160, 160))].mean()
    )
  low, high = np.percentile(draws, [2.5, 97.5])
  assert got.estimate == pytest.approx(head.mean() - tail.mean())
  np.testing.assert_allclose(got[1:], [low, high], atol=0.08 * (high - low))
  np.testing.assert_allclose(statistics.gap(tail, head).estimate, -got.estimate)


def test_the_gap_needs_two_users():
  assert np.isnan(statistics.gap(np.ones((1, 1)), np.ones((1, 9)))[1:]).all()
  empty = statistics.gap(np.ones((1, 0)), np.ones((1, 9)))
  assert np.isnan(empty).all()


# Several tests at once.


def test_holm_by_hand():
  # .01 x 4, .02 x 3, .03 x 2, then .05 x 1 lies below what stands before it.
  got = statistics.holm([0.05, 0.01, 0.03, 0.02])
  np.testing.assert_allclose(got, [0.06, 0.04, 0.06, 0.06])
  got = statistics.holm([0.5, math.nan, 0.001])
  np.testing.assert_allclose(got, [1, math.nan, 0.003])
  assert statistics.holm([]).size == 0
