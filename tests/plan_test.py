"""The planner: what it reads off programs, and a real TPU compilation."""

import jax
import jax.numpy as jnp
import pytest

from experiments import hlo
from experiments.configs import industrial

TEXT = """\
HloModule m

%body (p: (s32[])) -> (s32[]) {
  %r = f32[8,256]{1,0:T(8,128)} all-reduce(%x), replica_groups={}, to_apply=%add
}

%inner.1 (p: (s32[])) -> (s32[]) {
  %g = s32[4,5]{1,0} all-gather-start(%y), dimensions={0}
}

%outer (p: (s32[])) -> (s32[]) {
  %w = (s32[]) while(%t), condition=%c, body=%inner.1
  %q = (f32[2]{0}, bf16[3]{0}) all-reduce(%x, %z), to_apply=%add
}

ENTRY %main (p: (s32[])) -> (s32[]) {
  %a = (s32[]) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"10"}}
  %b = (s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_collectives_by_hand():
  found = {(x.kind, x.shape): (x.bytes, x.times)
           for x in hlo.collectives(TEXT, trips=7)}
  assert found == {
    ("all-gather", "s32[4,5]"): (80, 70),  # 10 times an unknown loop of 7
    ("all-reduce", "f32[2]"): (8 + 6, 10),
    ("all-reduce", "f32[8,256]"): (8 * 256 * 4, 3),
  }


def test_products_by_hand():
  def program(x, table, y):
    logits = x @ table.T  # [8, 16] x [16, 64]
    body = lambda c, _: (c @ y, None)  # [8, 16] x [16, 16]
    return jax.lax.scan(body, x, None, length=5)[0], logits

  shapes = [
    jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 16), (64, 16), (16, 16))
  ]
  jaxpr = jax.make_jaxpr(program)(*shapes).jaxpr
  one = hlo.products(jaxpr, 64, 64, data=1, model=1)
  assert one.flops == 2 * 8 * 16 * 64 + 5 * 2 * 8 * 16 * 16
  split = hlo.products(jaxpr, 32, 64, data=4, model=2)
  assert split.flops == 2 * 8 * 16 * 64 / 8 + 5 * 2 * 8 * 16 * 16 / 4


def test_a_loop_over_chunks_counts_at_its_longest():
  """Chunks of 8 of 32 rows, then of 2 for the rest: four turns and none."""
  def program(x, y, used):
    def part(size):
      return lambda i, c: c + (
        jax.lax.dynamic_slice_in_dim(x, i * size, size) @ y
      ).sum()

    total = jax.lax.fori_loop(0, used // 8, part(8), 0.0)
    return jax.lax.fori_loop(0, used % 8 // 2, part(2), total)

  both = jax.vmap(program, (0, None, None))
  for shards, function in ((1, program), (2, both)):
    x = jnp.ones((32, 3) if shards == 1 else (2, 32, 3))
    jaxpr = jax.make_jaxpr(function)(x, jnp.ones((3, 5)), 32).jaxpr
    found = hlo.products(jaxpr, 99, 99, data=1, model=1)
    assert found.flops == shards * 4 * 2 * 8 * 3 * 5
    assert found.trips == 4


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
  from experiments import plan

  sizes = plan.Sizes(items=100_000, users=1000, interactions=9000)
  devices = plan.describe("v5e:2x4")
  train, rank = plan.make_plans(small(2, 4, loss, tables), sizes, devices)
  for one in (train, rank):
    assert "f32[25001,128]" in one.text  # a device's part
    assert "[100004,128]" not in one.text  # the whole
    assert one.fits and one.flops > 0
    for found in hlo.collectives(one.text):
      if found.kind != "all-reduce":
        assert found.bytes < 25_001 * 128, found  # a quarter of a part
  gradient = 25_001 * 128 * 4
  largest = max(x.bytes for x in hlo.collectives(train.text))
  assert (largest >= gradient) == (tables == "dense")
