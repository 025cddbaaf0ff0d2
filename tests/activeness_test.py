"""Groups, segments and priors on numbers that can be checked by hand."""

import numpy as np
import pytest
import scipy.stats

from experiments import problem
from experiments.configs import base
from pin_jax.data import activeness, stored
from pin_jax.data.interactions import from_columns
from pin_jax.types import InputError

LONG_TAIL = np.array([1, 1, 2, 2, 3, 4, 5, 8, 20, 54])  # sums to 100


def shuffled(seed=0, users=103):
  return np.random.default_rng(seed).zipf(1.6, users).clip(max=500)


class TestAssignGroups:

  def test_equal_users(self):
    groups = activeness.assign_groups(LONG_TAIL, num_groups=5)
    assert groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert groups.dtype == np.int32

  @pytest.mark.parametrize("num_groups", [1, 2, 5, 7, 103])
  def test_equal_users_properties(self, num_groups):
    values = shuffled()
    groups = activeness.assign_groups(values, num_groups=num_groups)
    sizes = np.bincount(groups, minlength=num_groups)
    assert sizes.max() - sizes.min() <= 1
    for g in range(num_groups - 1):
      assert values[groups == g].max() <= values[groups == g + 1].min()

  def test_ties_are_broken_by_the_ids(self):
    groups = activeness.assign_groups(
      np.full(6, 3), ["ann", "bob", "cat", "dan", "eve", "fay"], num_groups=3
    )  # ascending: dan, cat, eve, fay, bob, ann
    assert groups.tolist() == [0, 0, 2, 2, 1, 1]

  def test_equal_interactions(self):
    # A user's middle falls at: .5 1.5 3 5 7.5 11 15.5 22 36 73 (of 100).
    groups = activeness.assign_groups(
      LONG_TAIL, num_groups=2, rule="interactions"
    )
    assert groups.tolist() == [0] * 9 + [1]
    groups = activeness.assign_groups(
      LONG_TAIL, num_groups=3, rule="interactions"
    )
    assert groups.tolist() == [0] * 8 + [1, 2]

  def test_thresholds(self):
    groups = activeness.assign_groups(
      LONG_TAIL, num_groups=3, rule="thresholds", thresholds=[2, 8]
    )
    assert groups.tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]

  @pytest.mark.parametrize("options, message", [
    ({"num_groups": 11}, "num_groups=11 does not suit 10 users"),
    ({"num_groups": 0}, "num_groups=0"),
    ({"rule": "quantiles"}, "'quantiles' is unknown"),
    ({"rule": "interactions"}, r"groups \[.*\] of num_groups=5 empty"),
    ({"rule": "thresholds"}, "thresholds=None"),
    ({"thresholds": [1, 2, 3, 4]}, "only then"),
    ({"rule": "thresholds", "thresholds": [1]}, "give 4 borders"),
    ({"rule": "thresholds", "thresholds": [1, 3, 3, 4]}, "do not ascend"),
    ({"rule": "thresholds", "thresholds": [1, 2, 3, np.nan]}, "ascend"),
    ({"rule": "thresholds", "thresholds": [2, 3, 4, 99]}, r"groups \[4\]"),
  ])
  def test_bad_options(self, options, message):
    with pytest.raises(InputError, match=message):
      activeness.assign_groups(LONG_TAIL, **options)

  @pytest.mark.parametrize("values, message", [
    ([], "shape"),
    ([[1, 2]], "shape"),
    ([1, -1], r"activeness\[1\] = -1"),
    ([np.nan, 1], r"activeness\[0\] = nan"),
  ])
  def test_bad_activeness(self, values, message):
    with pytest.raises(InputError, match=message):
      activeness.assign_groups(values, num_groups=1)


class TestAssignSegments:

  def test_top_fifth(self):
    segments = activeness.assign_segments(LONG_TAIL)
    assert segments.tolist() == [0] * 8 + [1, 1]
    assert segments.dtype == np.int32

  def test_ties_go_to_the_lower_hash(self):
    segments = activeness.assign_segments(
      np.array([3, 5, 3, 5, 5]), ["ann", "bob", "cat", "dan", "eve"],
      head_share=0.4,
    )
    assert segments.tolist() == [0, 0, 0, 1, 1]

  @pytest.mark.parametrize("share, size", [
    (0.2, 21), (0.001, 1), (0.999, 102), (0.5, 52)
  ])
  def test_sizes(self, share, size):
    segments = activeness.assign_segments(shuffled(), head_share=share)
    assert segments.sum() == size

  def test_unsigned_input(self):
    segments = activeness.assign_segments(LONG_TAIL.astype(np.uint8))
    assert segments.tolist() == [0] * 8 + [1, 1]

  @pytest.mark.parametrize("share", [0, 1, -0.1, np.nan])
  def test_bad_share(self, share):
    with pytest.raises(InputError, match="head_share="):
      activeness.assign_segments(LONG_TAIL, head_share=share)

  def test_one_user(self):
    with pytest.raises(InputError, match="at least 2"):
      activeness.assign_segments([4])

  def test_head_is_the_top_group(self):
    values = shuffled(users=100)
    groups = activeness.assign_groups(values, num_groups=5)
    segments = activeness.assign_segments(values, head_share=0.2)
    np.testing.assert_array_equal(segments == 1, groups == 4)


class TestTies:

  def test_hash_is_blake2b_of_the_text(self):
    # As `printf ann | b2sum -l 64` prints it.
    want = [0x8d3adf6abf23f3a5, 0xe75017cace788f82]
    assert activeness.id_hash(["ann", "7"]).tolist() == want
    assert activeness.id_hash(np.array([7])).tolist() == want[1:]

  @pytest.mark.parametrize("rule", ["users", "interactions"])
  @pytest.mark.parametrize("text", [False, True])
  def test_the_order_of_users_does_not_matter(self, rule, text):
    values = shuffled(4).clip(max=3)
    ids = [f"é{n}" for n in range(103)] if text else np.arange(103) - 50
    order = np.random.default_rng(0).permutation(103)
    groups = activeness.assign_groups(values, ids, num_groups=4, rule=rule)
    again = activeness.assign_groups(
      values[order], np.asarray(ids)[order], num_groups=4, rule=rule
    )
    np.testing.assert_array_equal(again, groups[order])
    segments = activeness.assign_segments(values, ids)
    np.testing.assert_array_equal(
      activeness.assign_segments(values[order], np.asarray(ids)[order]),
      segments[order],
    )

  def test_indices_tell_nothing_of_the_group(self):
    groups = activeness.assign_groups(np.full(2000, 3))
    assert scipy.stats.kruskal(
      *(np.flatnonzero(groups == g) for g in range(5))
    ).pvalue > 0.01

  def test_one_id_a_user(self):
    for assign in (activeness.assign_groups, activeness.assign_segments):
      with pytest.raises(InputError, match=r"ids have shape \(2,\)"):
        assign(LONG_TAIL, ["a", "b"])

  @pytest.mark.parametrize("source", ["files", "stored", "streamed"])
  def test_every_source_brings_its_ids(self, source, tmp_path):
    """Four equal users; ascending hashes: 12, 41, 7, 100."""
    users, items = np.repeat([41, 7, 100, 12], 4), [1, 2, 3, 4] * 4
    times = np.arange(16)
    config = base.default()
    if source == "files":
      path = tmp_path / "data.csv"
      rows = zip(users, items, times, strict=True)
      path.write_text("user,item,time\n" + "\n".join(
        ",".join(map(str, row)) for row in rows
      ))
      config.data = {"source": "files", "path": str(path)}
    else:
      path = tmp_path / "stored"
      stored.write(from_columns(users, items, times), path)
      config.data = {
        "source": "stored", "path": str(path), "stream": source == "streamed"
      }
    config.groups.num_groups = 2
    made = problem.make_problem(config)
    assert made.split.interactions.user_ids.tolist() == [7, 12, 41, 100]
    assert made.groups.tolist() == [0, 1, 1, 0]
    assert made.segments.tolist() == [0, 1, 0, 0]


class TestPrior:

  GROUPS = np.array([0, 0, 0, 1, 2])
  COUNTS = np.array([1, 1, 2, 4, 12])

  @pytest.mark.parametrize("kind, values, expected", [
    ("users", None, [3 / 5, 1 / 5, 1 / 5]),
    ("uniform", None, [1 / 3, 1 / 3, 1 / 3]),
    ("interactions", None, [4 / 20, 4 / 20, 12 / 20]),
    ("custom", [1, 0, 3], [1 / 4, 0, 3 / 4]),
  ])
  def test_formula(self, kind, values, expected):
    weights = activeness.prior(kind, self.GROUPS, self.COUNTS, 3, values)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, expected, rtol=1e-15)

  @pytest.mark.parametrize("arguments, message", [
    (("pareto", GROUPS, COUNTS, 3), "'pareto' is unknown"),
    (("custom", GROUPS, COUNTS, 3), "values=None"),
    (("users", GROUPS, COUNTS, 3, [1, 1, 1]), "only then"),
    (("custom", GROUPS, COUNTS, 3, [1, 1]), "give 3 finite"),
    (("custom", GROUPS, COUNTS, 3, [1, 1, -1]), "numbers >= 0"),
    (("custom", GROUPS, COUNTS, 3, [1, 1, np.nan]), "finite"),
    (("custom", GROUPS, COUNTS, 3, [0, 0, 0]), "sums to 0"),
    (("interactions", GROUPS, 0 * COUNTS, 3), "sums to 0"),
  ])
  def test_bad_input(self, arguments, message):
    with pytest.raises(InputError, match=message):
      activeness.prior(*arguments)


class TestDescribe:

  def test_by_hand(self):
    groups = activeness.assign_groups(LONG_TAIL)
    segments = activeness.assign_segments(LONG_TAIL)
    summary = activeness.describe(LONG_TAIL, groups, segments)
    assert summary["users"] == 10
    assert summary["interactions"] == 100
    assert (summary["min"], summary["max"]) == (1, 54)
    assert (summary["median"], summary["mean"]) == (3.5, 10)
    assert summary["head_users"] == 0.2
    assert summary["head_interactions"] == 0.74
    assert summary["groups"][1] == {
      "group": 1, "users": 2, "interactions": 4, "min": 2, "max": 2
    }

  def test_gini_is_half_the_relative_mean_difference(self):
    values = shuffled(3)
    zeros = np.zeros(len(values), int)
    differences = np.abs(values[:, None] - values[None, :]).mean()
    summary = activeness.describe(values, zeros, zeros)
    np.testing.assert_allclose(
      summary["gini"], differences / (2 * values.mean()), rtol=1e-12
    )

  def test_gini_of_equals_is_zero(self):
    zeros = np.zeros(4, int)
    assert activeness.describe(np.full(4, 7), zeros, zeros)["gini"] == 0
    assert activeness.describe(zeros, zeros, zeros)["gini"] == 0
