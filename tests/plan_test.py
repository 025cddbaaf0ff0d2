"""The planner: a real compilation for a TPU, where libtpu is installed."""

import pytest

from benchmarks import plan
from experiments.configs import industrial

TEXT = """
  %r = f32[8,256]{1,0:T(8,128)} all-reduce(%x), replica_groups={}, to_apply=%add
  %g = s32[4,5]{1,0} all-gather-start(%y), dimensions={0}
  %q = (f32[2]{0}, bf16[3]{0}) all-reduce(%x, %z), to_apply=%add
  %f = f32[9]{0} fusion(%y), calls=%all-reduce
"""


def test_what_the_planner_reads_off_a_program():
  assert plan.collectives(TEXT) == [
    ("all-reduce", "f32[8,256]", 8 * 256 * 4),
    ("all-gather", "s32[4,5]", 80),
    ("all-reduce", "f32[2] bf16[3]", 8 + 6),
  ]


def small(data, model, loss, tables):
  made = industrial.get_config(f"data={data},model={model}")
  made.backbone.update(length=8, width=128, blocks=1, heads=1)
  made.loss.update(name=loss, negatives=64)
  made.optimizer.tables = tables
  made.batch_size, made.dispatch = 40, 2
  return made


@pytest.mark.parametrize(
  "loss, tables",
  [("sampled_softmax", "row_sparse"), ("softmax", "dense")],
)
def test_no_device_gathers_the_item_table(loss, tables):
  """100,001 rows over four devices: 25,001 each, which stay where they are."""
  pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")
  sizes = plan.Sizes(items=100_000, users=1000, interactions=9000)
  devices = plan.describe("v5e:2x4")
  programs = plan.compile_all(small(2, 4, loss, tables), sizes, devices)
  for compiled in programs.values():
    text = compiled.as_text()
    assert "f32[25001,128]" in text  # a device's rows
    assert "[100004,128]" not in text  # the whole
    assert 0 < sum(plan.memory(compiled)) < 2**30
    for found in plan.collectives(text):
      if found.kind != "all-reduce":
        assert found.bytes < 25_001 * 128, found  # a quarter of a device's
  gradient = 25_001 * 128 * 4
  found = plan.collectives(programs["train step"].as_text())
  assert (max(x.bytes for x in found) >= gradient) == (tables == "dense")
