"""Plans a job for a TPU slice that need not be there.

  python -m benchmarks.plan --config=experiments/configs/industrial.py \
    --topology=v5e:4x4 --items=10000000 --users=100000000 \
    --interactions=2000000000

Compiles the train step of stage 1 and the ranking of a chunk of users for the
described topology (libtpu is needed, pip install '.[tpu]', a TPU is not) and
prints what they take of a chip, as the compiler says: memory, FLOPs, bytes
read and written, collectives by kind and size. A loop counts once, so that a
dispatch is one step. Exit code 1 where it does not fit, 2 for bad input.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from experiments import build, commands, sizes
from experiments.methods import METHODS
from pin_jax.data import batches
from pin_jax.evaluation import ranking
from pin_jax.models import plugins
from pin_jax.scale import sharding
from pin_jax.training import losses, negatives
from pin_jax.training.loop import compile_steps
from pin_jax.training.steps import (
  Operands,
  TrainState,
  backbone_step,
  init_state,
)
from pin_jax.types import InputError, PyTree, Requests

# GB of HBM by `device_kind`: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e.
MEMORY = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}


class Sizes(NamedTuple):
  """What is known of the data."""

  items: int
  users: int
  interactions: int


class Collective(NamedTuple):
  """A collective of a compiled program: its kind, result, and bytes of it."""

  kind: str
  shape: str
  bytes: int


def compile_all(
  config: ConfigDict, sizes: Sizes, devices: list[jax.Device]
) -> dict[str, Any]:
  """Compiles the programs of a job.

  Args:
    config: the job's.
    sizes: of its data.
    devices: of the topology, `mesh.data` x `mesh.model` of which are used.

  Returns:
    The compiled train step and ranking of one chunk of users, by name.

  Raises:
    InputError: for settings that cannot be planned without the data.
  """
  build.check(config)
  networks = build.make_networks(config, sizes.items, devices)
  if not networks.layout.tables:
    raise InputError(
      f"config key backbone.name={config.backbone.name!r} has no item table to "
      "split; plan another backbone"
    )
  programs = {
    "train step": _train_program(config, networks, sizes),
    "ranking": _rank_program(config, networks, sizes),
  }
  return {
    name: run.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    for name, (run, args) in programs.items()
  }


def _train_program(
  config: ConfigDict, networks: build.Networks, sizes: Sizes
) -> tuple:
  """(jitted function, its abstract arguments) of a dispatch of steps."""
  layout, groups = networks.layout, config.groups.num_groups
  shares = np.full(groups, 1 / groups)
  adjustment = build.make_adjustment(config.pin, shares, shares)
  optimizer = build.make_optimizer(
    config, METHODS["pin"].stages[0], config.backbone_steps, networks.backbone
  )
  draw = batches.Draw(
    build.windows_of_step(config, grouped=True), config.backbone.length,
    config.pin.draw, config.pin.mean,
  )
  step = backbone_step(
    networks.backbone, adjustment, optimizer, draw,
    loss=_loss(config, sizes), layout=layout,
  )

  def start(key: jax.Array) -> TrainState:
    return init_state(networks.backbone.init(key), optimizer, adjustment)

  key = jax.eval_shape(lambda: jax.random.key(0))
  pool = batches.Pool(
    *[_flat(sizes.users, layout)] * 2,
    _whole(jax.ShapeDtypeStruct((groups + 1,), jnp.int32), layout),
    _flat(sizes.users + 1, layout),
  )
  operands = Operands(
    _whole(key, layout), _sequences(sizes, layout), pool, None
  )
  first = _whole(jax.ShapeDtypeStruct((), jnp.int32), layout)
  state = _by_rule(jax.eval_shape(start, key), layout)
  return compile_steps(step), (state, operands, first, config.dispatch)


def _rank_program(
  config: ConfigDict, networks: build.Networks, sizes: Sizes
) -> tuple:
  """(jitted function, its abstract arguments) of one chunk of users."""
  layout = networks.layout
  run, chunk, _ = ranking.rank_program(
    plugins.Model(networks.backbone, None), num_items=sizes.items,
    length=config.backbone.length, layout=layout,
  )
  params = jax.eval_shape(networks.backbone.init, jax.random.key(0))
  row = _whole(jax.ShapeDtypeStruct((1, chunk), jnp.int32), layout)
  seen = chunk * math.ceil(sizes.interactions / sizes.users)
  weights = plugins.Weights(_by_rule(params, layout), None)
  return run, (
    weights, _sequences(sizes, layout), (Requests(row, row, row),), seen
  )


def _loss(config: ConfigDict, sizes: Sizes) -> losses.LossSpec:
  options = config.loss
  if options.name == "softmax":
    return losses.SOFTMAX
  if options.proposal != "uniform":
    raise InputError(
      f"config key loss.proposal={options.proposal!r} depends on the data; "
      "plan with 'uniform'"
    )
  return losses.sampled(
    build.make_sampled_loss(options, sizes.items),
    negatives.uniform(sizes.items), count=options.negatives,
    shared=options.candidates == "shared",
  )


def _flat(size: int, layout: sharding.Layout) -> jax.ShapeDtypeStruct:
  padded = -(-size // layout.mesh.size) * layout.mesh.size
  return jax.ShapeDtypeStruct(
    (padded,), jnp.int32, sharding=sharding.flat_sharding(layout)
  )


def _sequences(sizes: Sizes, layout: sharding.Layout) -> batches.Sequences:
  users = _flat(sizes.users, layout)
  return batches.Sequences(_flat(sizes.interactions, layout), users, users)


def _whole(x: jax.ShapeDtypeStruct, layout: sharding.Layout) -> PyTree:
  everywhere = NamedSharding(layout.mesh, PartitionSpec())
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)


def _by_rule(tree: PyTree, layout: sharding.Layout) -> PyTree:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree, sharding.shardings(tree, layout),
  )


def collectives(text: str) -> list[Collective]:
  """The collectives of a compiled program's text, each once."""
  kinds = "all-(?:reduce|gather|to-all)|reduce-scatter|collective-permute"
  return [
    Collective(kind, " ".join(f"{k}[{d}]" for k, d in parts), sum(
      _BYTES.get(k, 4) * math.prod(int(n) for n in d.split(",") if n)
      for k, d in parts
    ))
    for shape, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    for parts in [re.findall(r"(\w+)\[([\d,]*)\]", shape)]
  ]


def memory(compiled: Any) -> tuple[int, int]:
  """Bytes of a chip: (state, data and batch; what there is besides)."""
  found = compiled.memory_analysis()
  return (
    found.argument_size_in_bytes + found.output_size_in_bytes
    - found.alias_size_in_bytes,
    found.temp_size_in_bytes + found.generated_code_size_in_bytes,
  )


def describe(topology: str) -> list[jax.Device]:
  """The devices of a topology.

  Raises:
    InputError: if libtpu is absent or does not know it, or its kind of chip is
      not in MEMORY.
  """
  try:
    found = topologies.get_topology_desc(topology, platform="tpu").devices
  except Exception as error:  # libtpu raises what it likes
    reason = str(error).strip().splitlines()[:1]
    raise InputError(
      f"flag --topology={topology!r} cannot be described "
      f"({''.join(reason)[:200]}); install '.[tpu]' and give a slice such as "
      "v5e:4x4"
    ) from error
  if found[0].device_kind not in MEMORY:
    raise InputError(
      f"flag --topology={topology!r}: the memory of {found[0].device_kind!r} "
      f"is not known; use one of {list(MEMORY)}"
    )
  return list(found)


def main(_: list[str]) -> int:
  """Plans, prints, and says by the exit code whether it fits."""
  logging.set_verbosity(logging.ERROR)
  values = flags.FLAGS
  given = {name: values[name].value for name in Sizes._fields}
  config = sizes.for_any_data(values.config, **given)
  devices = describe(values.topology)
  most, fits = MEMORY[devices[0].device_kind], True
  for name, compiled in compile_all(config, Sizes(**given), devices).items():
    arguments, temporaries = (size / 2**30 for size in memory(compiled))
    fits &= arguments + temporaries <= most
    cost = compiled.cost_analysis()
    print(
      f"{name}: {arguments + temporaries:.2f} of {most} GB a chip "
      f"({arguments:.2f} of state and data), {cost['flops'] / 1e12:.3f} TFLOP, "
      f"{cost['bytes accessed'] / 2**30:.2f} GB read and written"
    )
    found = collectives(compiled.as_text())
    for kind in sorted({one.kind for one in found}):
      own = [one for one in found if one.kind == kind]
      largest = max(own, key=lambda one: one.bytes)
      print(
        f"  {kind}: {len(own)}, {sum(x.bytes for x in own) / 2**20:.2f} MB; "
        f"the largest {largest.shape}"
      )
  return 0 if fits else 1


if __name__ == "__main__":
  config_flag = config_flags.DEFINE_config_file(
    "config", None, "Configuration file."
  )
  flags.DEFINE_string(
    "topology", "v5e:4x4", "Slice to plan for, as libtpu names it."
  )
  for field in Sizes._fields:
    flags.DEFINE_integer(field, None, f"Number of {field}.", lower_bound=1)
  flags.mark_flags_as_required(["config", *Sizes._fields])
  commands.launch(main, config_flag)
