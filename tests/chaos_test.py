"""Short forms of the chaos and soak programs."""

import pytest

from tests import chaos, soak

SMALL = (
  "--config.methods=('base',)", "--config.backbone_steps=30",
  "--config.plugin_steps=10",
)


def test_a_killed_job_ends_as_if_it_had_not_been():
  survived, different = chaos.chaos(1, seed=1, arguments=SMALL)
  assert survived == 1
  assert different == []


@pytest.mark.slow
def test_a_job_killed_many_times_ends_as_if_it_had_not_been():
  survived, different = chaos.chaos(14, seed=2)
  assert survived == 14
  assert different == []


@pytest.mark.slow
def test_disk_is_bounded_however_often_a_run_saves():
  table = soak.soak(300, 10, say=lambda *args, **kwargs: None)
  assert len(table) == 30
  assert table[:, 3].max() <= 4  # two kept, one new, one on its way out
  assert table[-1, 2] < 2 * table[5, 2]
