"""Plans a job for a TPU slice that need not be there.

  python -m experiments.plan --config=experiments/configs/industrial.py \
    --topology=v5e:4x4 --items=10000000 --users=100000000 \
    --interactions=2000000000

Compiles the train step of stage 1 and the ranking of a chunk of users for the
described topology (libtpu is needed, pip install '.[tpu]', a TPU is not) and
prints what they take of a chip: memory, FLOPs, bytes, collectives by kind and
size, and the step time that follows from the chip's rates. Exit code 1 where it
does not fit, 2 for bad input.

Without --items, --users and --interactions the config's data are read for their
sizes. FLOPs are those of matrix products, bytes those of their operands and
results and of the step's arguments; loops whose length depends on the data
count at their longest; of two branches the cheaper counts, for diagnoses are
rare. The step time is the larger of what compute and memory need, plus the
collectives, as if nothing overlapped: an estimate, not a measurement.
"""

import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import flags, logging
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from experiments import build, commands, hlo, settings, sizes
from experiments.problem import prepare
from pin_jax import disk
from pin_jax.data import batches
from pin_jax.evaluation import catalogue
from pin_jax.models import plugins
from pin_jax.scale import sharding
from pin_jax.training import criteria, negatives
from pin_jax.training.loop import compile_steps
from pin_jax.training.steps import Operands, TrainState, init_state
from pin_jax.types import InputError, PyTree, Requests

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:4x4", "Slice to plan for, as libtpu names it."
)
_SIZES = {
  name: flags.DEFINE_integer(
    name, 0, f"Number of {name}; 0 = of the data.", lower_bound=0
  )
  for name in ("items", "users", "interactions")
}
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_HLO = flags.DEFINE_string("hlo", None, "Directory for the compiled text.")


class Chip(NamedTuple):
  """A chip's rates, a second: bfloat16 FLOPs, bytes of HBM, bytes of ICI.

  Attributes:
    memory: bytes of HBM.
    flops: peak of bfloat16 products, of which float32 products take one by
      default.
    hbm: bytes to and from memory.
    ici: bytes over all links between chips together.
  """

  memory: float
  flops: float
  hbm: float
  ici: float


# cloud.google.com/tpu/docs/v4, v5e, v5p; by `device_kind`.
CHIPS = {
  "TPU v4": Chip(32 * 2**30, 275e12, 1228e9, 2400e9 / 8),
  "TPU v5 lite": Chip(16 * 2**30, 197e12, 819e9, 1600e9 / 8),
  "TPU v5": Chip(95 * 2**30, 459e12, 2765e9, 4800e9 / 8),
}


class Sizes(NamedTuple):
  """What is known of the data."""

  items: int
  users: int
  interactions: int


class Plan(NamedTuple):
  """What one program takes of a chip, a step.

  Attributes:
    name: of the program.
    arguments: bytes of state, data and batch.
    temporaries: bytes beside them, the code included.
    flops: of matrix products.
    bytes: to and from memory.
    collectives: kind -> (how many, bytes of their results).
    largest: the largest of them, as text.
    seconds: estimated.
    fits: in the chip's memory.
    text: the compiled program.
  """

  name: str
  arguments: int
  temporaries: int
  flops: float
  bytes: float
  collectives: dict[str, tuple[float, float]]
  largest: str
  seconds: float
  fits: bool
  text: str


def make_plans(
  config: ConfigDict, sizes: Sizes, devices: list[jax.Device]
) -> list[Plan]:
  """Compiles and weighs the programs of a job.

  Args:
    config: the job's.
    sizes: of its data.
    devices: of the topology, `mesh.data` x `mesh.model` of which are used.

  Returns:
    The plans of the train step and of the ranking of one chunk of users.

  Raises:
    InputError: for settings that the planner does not know how to plan.
  """
  settings.check(config)
  kind = devices[0].device_kind
  if kind not in CHIPS:
    raise InputError(
      f"--topology: the rates of {kind!r} are not known; use one of "
      f"{list(CHIPS)}"
    )
  networks = build.make_networks(config, sizes.items, devices)
  if not networks.layout.tables:
    raise InputError(
      f"config key backbone.name={config.backbone.name!r} has no item table to "
      "split; plan another backbone"
    )
  return [
    weigh(name, steps, CHIPS[kind], networks.layout, *program)
    for name, steps, program in (
      ("train step", config.dispatch, train_program(config, networks, sizes)),
      ("ranking", 1, rank_program(config, networks, sizes)),
    )
  ]


def train_program(
  config: ConfigDict, networks: build.Networks, sizes: Sizes
) -> tuple:
  """(jitted function, its abstract arguments) of `dispatch` steps."""
  layout, groups = networks.layout, config.groups.num_groups
  shares = np.full(groups, 1 / groups)
  adjustment = build.make_adjustment(config.pin, shares, shares)
  step, optimizer = build.make_backbone_step(
    config, networks, adjustment, _criterion(config, sizes), grouped=True,
    draw=config.pin.draw, mean=config.pin.mean, steps=config.backbone_steps,
  )

  def start(key: jax.Array) -> TrainState:
    return init_state(
      networks.backbone.init(key), optimizer, adjustment.rules,
      blocks=adjustment.blocks, average=config.optimizer.average > 0,
    )

  key = jax.eval_shape(lambda: jax.random.key(0))
  pool = batches.Pool(
    *[_flat(sizes.users, layout)] * 2,
    jax.ShapeDtypeStruct((groups + 1,), jnp.int32),
    _flat(sizes.users + 1, layout),
  )
  operands = Operands(
    _whole(key, layout), _sequences(sizes, layout),
    pool._replace(group_starts=_whole(pool.group_starts, layout)), None,
  )
  first = _whole(jax.ShapeDtypeStruct((), jnp.int32), layout)
  state = _by_rule(jax.eval_shape(start, key), layout)
  run = compile_steps(step)
  return run, (state, operands, first, config.dispatch)


def rank_program(
  config: ConfigDict, networks: build.Networks, sizes: Sizes
) -> tuple:
  """(jitted function, its abstract arguments) of one chunk of users."""
  layout = networks.layout
  chunk = catalogue.users_at_once(sizes.items, layout)
  model = plugins.Model(networks.backbone, None)
  run = catalogue.rank_program(
    model, num_items=sizes.items, length=config.backbone.length,
    layout=layout,
  )
  params = jax.eval_shape(networks.backbone.init, jax.random.key(0))
  row = _whole(jax.ShapeDtypeStruct((1, chunk), jnp.int32), layout)
  seen = chunk * math.ceil(sizes.interactions / sizes.users)
  weights = plugins.Weights(_by_rule(params, layout), None)
  requests = Requests(row, row, row)
  return run, (weights, _sequences(sizes, layout), requests, seen)


def _criterion(config: ConfigDict, sizes: Sizes) -> criteria.Criterion:
  options = config.loss
  if options.name == "softmax":
    return criteria.SOFTMAX
  if options.proposal != "uniform":
    raise InputError(
      f"config key loss.proposal={options.proposal!r} depends on the data; "
      "plan with 'uniform'"
    )
  return criteria.sampled(
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


def weigh(
  name: str, steps: int, chip: Chip, layout: sharding.Layout, run: Any,
  args: tuple,
) -> Plan:
  """Compiles a program of some steps and weighs one of them."""
  traced = run.trace(*args)
  compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  text, memory = compiled.as_text(), compiled.memory_analysis()
  work = hlo.products(
    traced.jaxpr.jaxpr, layout.rows // layout.model, layout.rows,
    data=layout.data, model=layout.model,
  )
  found = hlo.collectives(text, work.trips)
  arguments = memory.argument_size_in_bytes + (
    memory.output_size_in_bytes - memory.alias_size_in_bytes
  )
  temporaries = (
    memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  )
  state = 2 * memory.alias_size_in_bytes  # read and written, at most
  moved = work.bytes / steps + state
  total = {}
  for one in found:
    count, size = total.get(one.kind, (0, 0))
    times = one.times / steps
    total[one.kind] = count + times, size + times * one.bytes
  wire = sum(
    size * (2 if kind == "all-reduce" else 1)
    for kind, (_, size) in total.items()
  )
  largest = max(found, key=lambda one: one.bytes, default=None)
  return Plan(
    name, arguments, temporaries, work.flops / steps, moved, total,
    largest.shape if largest else "none",
    max(work.flops / steps / chip.flops, moved / chip.hbm) + wire / chip.ici,
    arguments + temporaries <= chip.memory, text,
  )


def show(plans: list[Plan], title: str, chip: Chip) -> None:
  """Prints the plans as a table."""
  table = rich.table.Table(title=title)
  table.add_column("a chip")
  for plan in plans:
    table.add_column(plan.name, justify="right")
  gb = lambda x: f"{x / 2**30:.2f} GB"
  lines = [
    ("arguments", lambda p: gb(p.arguments)),
    ("temporaries", lambda p: gb(p.temporaries)),
    (f"of {gb(chip.memory)}",
     lambda p: gb(p.arguments + p.temporaries) + ("" if p.fits else " TOO MUCH")
    ),
    ("FLOPs", lambda p: f"{p.flops / 1e12:.3f} T"),
    ("bytes", lambda p: gb(p.bytes)),
    ("largest collective", lambda p: p.largest),
    ("estimated time", lambda p: f"{1e3 * p.seconds:.1f} ms"),
  ]
  for kind in hlo.KINDS:
    of = lambda p, kind=kind: p.collectives.get(kind, (0, 0))
    lines.append((kind, lambda p, of=of: f"{of(p)[0]:.0f}, {gb(of(p)[1])}"))
  for label, value in lines:
    table.add_row(label, *map(value, plans))
  commands.Console().print(table)


def describe(topology: str) -> list[jax.Device]:
  """The devices of a topology.

  Raises:
    InputError: if libtpu is absent or does not know it.
  """
  try:
    found = topologies.get_topology_desc(topology, platform="tpu")
  except Exception as error:  # libtpu raises what it likes
    reason = str(error).strip().splitlines()[:1]
    raise InputError(
      f"--topology={topology!r} cannot be described ({''.join(reason)[:200]}); "
      "install '.[tpu]' and give a slice such as v5e:4x4"
    ) from error
  return list(found.devices)


def main(_: list[str]) -> int:
  """Plans, prints, and says by the exit code whether it fits."""
  logging.set_verbosity(logging.ERROR)
  config = _CONFIG.value
  given = {name: flag.value for name, flag in _SIZES.items()}
  if not all(given.values()):
    config, problem = prepare(config)
    data = problem.split.interactions
    given = {
      "items": data.num_items, "users": data.num_users,
      "interactions": data.num_interactions,
    }
  config = sizes.for_any_data(config, **given)
  devices = describe(_TOPOLOGY.value)
  plans = make_plans(config, Sizes(**given), devices)
  for plan in plans:
    if _HLO.value:
      name = f"{plan.name.replace(' ', '_')}.txt"
      disk.write({disk.place("hlo", _HLO.value) / name: plan.text})
  if _JSON.value:
    print(json.dumps([
      {k: v for k, v in p._asdict().items() if k != "text"} for p in plans
    ]))
  else:
    mesh = f"{config.mesh.data} x {config.mesh.model} of {_TOPOLOGY.value}"
    show(plans, mesh, CHIPS[devices[0].device_kind])
  return 0 if all(plan.fits for plan in plans) else 1


def launch() -> None:
  """Entry point: exit code 1 where it does not fit, 2 for bad input."""
  flags.mark_flag_as_required("config")
  commands.launch(main, _CONFIG)


if __name__ == "__main__":
  launch()
