"""Sizes that are fitted to the data, whatever way their config was made."""


import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from experiments import job, problem, schema, sizes, sweep
from experiments.build import networks_of
from experiments.configs import base, files
from experiments.stages import check
from pin_jax.types import InputError


@pytest.fixture
def path(tmp_path):
  """90 users with 5 interactions, 10 with 61, in odd columns."""
  lines = [
    f"{u};{i};{i}" for u in range(100) for i in range(61 if u < 10 else 5)
  ]
  path = tmp_path / "odd.csv"
  path.write_text("who;what;time\n" + "\n".join(lines) + "\n")
  return path


DATA = {"separator": ";", "user": "who", "item": "what"}
# A window of 8 holds nine of ten users whole; it reads (90 * 5 + 10 * 8) / 100
# = 5.3 items, so 4000 / 5.3 / 5 windows a group are over the limit of 100; 90 +
# 10 * 8 windows in batches of 500.
WANT = {
  "backbone.length": 8, "backbone.dropout": 0.4, "backbone.pack_rows": 0,
  "memory.recent": 8, "batch_size": 500, "backbone_steps": 400,
  "plugin_steps": 100, "validation.every": 100, "loss.name": "softmax",
  "loss.negatives": 256, "groups.num_groups": 5, "groups.rule": "users",
  "groups.head_share": 0.2, "refit": 50,
  "memory.relations": ("cosine", "two_step", "linear"),
}


def _by_argument(path):
  given = ",".join(f"{key}={value}" for key, value in DATA.items())
  return files.get_config(f"path={path},{given}")


def _by_flags(path):
  values, argv = flags.FlagValues(), [
    "", f"--config=experiments/configs/files.py:path={path}",
    *(f"--config.data.{key}={value}" for key, value in DATA.items()),
  ]
  holder = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=argv
  )
  values(argv)
  return holder.value


@pytest.mark.parametrize("make", [_by_argument, _by_flags])
def test_sizes_follow_from_the_data(path, make):
  asked = make(path)
  config, _ = problem.prepare(asked)
  flat = dict(schema.flatten(config.to_dict()))
  assert {key: flat[key] for key in sizes.KEYS} == WANT
  line = sizes.told(asked, config)
  assert all(f"{key}={value!r}" in line for key, value in WANT.items())


def test_what_filters_leave_is_what_counts(path):
  """The ten alone: windows of 64, which hold 61 each."""
  config = _by_argument(path)
  config.data.k_core, config.data.min_length = 5, 6
  config, _ = problem.prepare(config)
  assert config.backbone.length == 64 and config.backbone.dropout == 0.2
  assert config.batch_size == 5 * (4000 // 61 // 5)


def test_what_is_given_stands_and_the_others_heed_it(path):
  config = _by_argument(path)
  config.update_from_flattened_dict({
    "backbone.length": 5, "groups.num_groups": 2, "dispatch": 30,
    "mesh.data": 2, "loss.name": "bce",
  })
  config = sizes.fitted(config, np.array([5] * 90 + [61] * 10),
                        np.array([3] * 90 + [59] * 10), 61)
  assert (config.backbone.length, config.groups.num_groups) == (5, 2)
  assert config.loss.name == "bce" and config.memory.recent == 5
  assert config.batch_size == 200 and config.validation.every == 120


def test_a_failed_look_is_that_error_and_nothing_is_left(path, tmp_path):
  config = files.get_config(f"path={path}")  # the columns are not given
  with pytest.raises(InputError, match="give user=<column>"):
    job.run(config, tmp_path / "w")
  config = _by_argument(path)
  config.data.k_core = 99
  with pytest.raises(InputError, match="k_core=99"):
    job.run(config, tmp_path / "w")
  assert not (tmp_path / "w").exists()


def test_a_bad_setting_is_named_before_the_data_are_read(tmp_path):
  for key, value in {"dispatch": 0, "backbone.length": 0}.items():
    config = files.get_config("path=nowhere.csv")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=f"{key}={value}"):
      job.run(config, tmp_path / "w")


@pytest.mark.parametrize(("short", "long", "want"), [
  ((29, 3), (71, 20), (5, "interactions", 0.2)),
  ((9, 3), (91, 20), (5, "users", 0.2)),
  ((450, 3), (50, 20), (2, "interactions", 0.05)),
  ((30, 3), (2, 9), (1, "users", 0.031)),
])
def test_all_groups_and_segments_have_targets(short, long, want):
  """Of many users with one training interaction, which is no target."""
  lengths = np.repeat([short[1], long[1]], [short[0], long[0]])
  rng = np.random.default_rng(0)
  rows = [(u, v) for u, n in enumerate(rng.permutation(lengths))
          for v in rng.permutation(30)[:n]]
  config = files.get_config("path=x")
  config.data = base.ConfigDict({"source": "files", "path": "x"})
  split = problem.splits.leave_one_out(
    problem.files.from_columns(*zip(*rows, strict=True))
  )
  config = sizes.fitted(config, lengths, split.activeness, 30)
  groups = config.groups
  assert (groups.num_groups, groups.rule, groups.head_share) == want
  found = problem.activeness.assign_groups(
    split.activeness, num_groups=groups.num_groups, rule=groups.rule
  )
  parts = problem.activeness.assign_segments(
    split.activeness, head_share=groups.head_share
  )
  learn = split.activeness > 1
  assert set(found[learn]) == set(range(groups.num_groups))
  assert set(parts[learn]) == {0, 1}


def test_a_tail_without_targets_is_refused_before_training(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text("user,item\n" + "".join(
    f"{u},{i}\n" for u in range(40) for i in range(3 if u > 5 else 9)
  ))
  config = files.get_config(f"path={path}")
  config.groups.head_share = 0.2
  with pytest.raises(InputError, match="groups.head_share: group 0 of 2 has"):
    job.run(config, tmp_path / "w")
  assert not (tmp_path / "w").exists()
  config.groups.head_share = None
  made, data = problem.prepare(config)
  check(made, data, networks_of(made, data))
  config.pin.plugin_draw, config.groups.head_share = "validation", 0.2
  made, data = problem.prepare(config)
  check(made, data, networks_of(made, data))


def test_three_interactions_each_are_the_cause(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text(
    "user,item\n" + "".join(f"{u},{i}\n" for u in range(40) for i in range(3))
  )
  for config in (files.get_config(f"path={path}"), base.default()):
    config.data = base.data_section("files", path=str(path))
    with pytest.raises(InputError, match="longest history: 3.*two of them"):
      problem.prepare(config)


def test_a_sweep_checks_settings_whose_sizes_are_open(tmp_path, path):
  file = tmp_path / "swept.py"
  file.write_text(
    "from experiments.configs.files import get_config\n"
    "def sweep():\n  return [{'backbone.length': 5}, {'dispatch': 20}]\n"
  )
  assert len(sweep.make_jobs(f"{file}:path={path}", tmp_path / "s")) == 2
