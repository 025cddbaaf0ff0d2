"""From a configuration to the objects of the library."""

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import schema
from experiments.methods import GATES, SEGMENTS, Stage
from experiments.problem import Problem, learnt_split
from pin_jax import aggregation
from pin_jax.aggregation.weightings import BY_TENSOR, WEIGHTINGS, preceded_by
from pin_jax.data import splits
from pin_jax.data.batches import Draw
from pin_jax.evaluation import ranking
from pin_jax.models import memory, plugins
from pin_jax.models.backbones import conditioned
from pin_jax.models.din import din
from pin_jax.models.gru4rec import gru4rec
from pin_jax.models.hstu import hstu
from pin_jax.models.plugins import (
  adapter,
  bottleneck,
  gated,
  low_rank,
  memory_mix,
  translation,
)
from pin_jax.models.precision import computed_in
from pin_jax.models.sasrec import sasrec
from pin_jax.scale import sharding
from pin_jax.training import losses, negatives, optimizers, sparse
from pin_jax.training.optimizers import Optimizer
from pin_jax.training.steps import Adjustment
from pin_jax.types import Backbone, InputError, Plugin, PyTree

BACKBONES = {"sasrec": sasrec, "gru4rec": gru4rec, "hstu": hstu, "din": din}
# name -> (keys of the `plugin` section that it takes, builder from what is
# around it: the backbone's params, width D, options of the memory).
PLUGINS: dict[str, tuple[set[str], Callable[..., Plugin]]] = {
  "bottleneck": ({"hidden"}, lambda like, d, m, o: bottleneck(d, **o)),
  "translation": (set(), lambda like, d, m, o: translation(d)),
  "adapter": ({"hidden"}, lambda like, d, m, o: adapter(like, width=d, **o)),
  "lora": ({"rank"}, lambda like, d, m, o: low_rank(like, **o)),
  "memory": (set(), lambda like, d, m, o: memory_mix(m)),
  "gated": (
    {"hidden", "reads_state"}, lambda like, d, m, o: gated(d, m, **o)
  ),
}
MIXING = ("memory", "gated")  # plugins that read the memory
# Of the methods that have gates whatever `plugin` says.
GATE = {"hidden": 16, "reads_state": False}
_GATE_LEARNING_RATE = 2e-2
PROPOSALS = ("uniform", "popularity", "in_batch")
OTHERS = "others"  # the block of the parameters that no pattern matches


def backbone_options(backbone: ConfigDict) -> dict[str, Any]:
  """The keys of the `backbone` section that the named backbone takes."""
  taken = inspect.signature(BACKBONES[backbone.name]).parameters
  return {key: value for key, value in backbone.items() if key in taken}


def memory_options(config: ConfigDict) -> memory.Options:
  """The `memory` section."""
  return memory.Options(**config.memory)


def make_plugin(
  config: ConfigDict, like: PyTree, *, widen: int = 1, repeats: bool = False
) -> Plugin:
  """Builds the plugin that the config names, for params or shapes `like`.

  Args:
    config: the whole configuration.
    like: the backbone's.
    widen: factor of `hidden` and `rank`, where several segments share it.
    repeats: `Problem.repeats`, for 'gated'.

  Raises:
    InputError: if the backbone does not suit it.
  """
  taken, build = PLUGINS[config.plugin.name]
  options = {key: config.plugin[key] for key in sorted(taken)}
  for key in taken & {"hidden", "rank"}:
    options[key] *= widen
  if config.plugin.name == "gated":
    options["own_repeats"] = repeats
  with schema.section("plugin"):
    return build(like, config.backbone.width, memory_options(config), options)


def proposal_shares(spec: str) -> dict[str, float]:
  """Reads `loss.proposal`: a name, or shares 'name:number,name:number'.

  Raises:
    InputError: for an unknown or repeated name, or a bad share.
  """
  shares: dict[str, float] = {}
  for item in spec.split(","):
    name, _, number = item.partition(":")
    share = schema.number(number or "1")
    if name not in PROPOSALS or name in shares or not 0 < share < math.inf:
      raise schema.bad(
        "loss.proposal", spec,
        f"use one of {list(PROPOSALS)}, or a positive share of several, each "
        "once, such as 'in_batch:0.5,uniform:0.5'",
      )
    shares[name] = share
  return shares


class Networks(NamedTuple):
  """What a job trains, and the devices it is laid out for.

  Attributes:
    backbone: the model.
    plugins: by `Stage.plugin`.
    layout: of the mesh.
    evidence: (refit) -> what plugins read besides, of the training prefix or
      of the prefix that `refit` learns from; made once.
  """

  backbone: Backbone
  plugins: dict[str, Plugin]
  layout: sharding.Layout = sharding.LOCAL
  evidence: Callable[[bool], memory.Memory] | None = None


def make_networks(
  config: ConfigDict, num_items: int,
  devices: Sequence[jax.Device] | None = None, *, repeats: bool = False,
) -> Networks:
  """Builds the backbone, of V items, and the plugins that the config names.

  `devices` are for `mesh`, by default those that are there; `repeats` is that
  of the Problem.
  """
  options = backbone_options(config.backbone)
  with schema.section("backbone"):
    backbone = BACKBONES[config.backbone.name](num_items, **options)
    backbone = computed_in(backbone, config.backbone.compute)
  backbone = backbone._replace(packed=config.backbone.pack_rows)
  if config.backbone.reads_activeness:
    backbone = conditioned(backbone)
  with schema.section("mesh"):
    layout = sharding.make_layout(
      backbone, num_items, devices=devices, **config.mesh
    )
  backbone = sharding.pad_catalogue(backbone, num_items, layout)
  like = jax.eval_shape(backbone.init, jax.random.key(0))
  made = {
    "own": make_plugin(config, like, repeats=repeats),
    "shared": make_plugin(
      config, like, widen=len(SEGMENTS), repeats=repeats
    ),
    **{
      name: gated(
        config.backbone.width, memory_options(config), own_repeats=repeats,
        **{**GATE, "hidden": widen * GATE["hidden"]},
      ) for name, widen in (("gates", 1), ("gate", len(SEGMENTS)))
    },
    "memory_alone": plugins.memory_alone(memory_options(config)),
  }
  return Networks(backbone, made, layout)


def networks_of(config: ConfigDict, problem: Problem) -> Networks:
  """The networks that suit a problem's catalogue and habits.

  Raises:
    InputError: for more items than a relation takes.
  """
  num_items = problem.split.interactions.num_items
  options = memory_options(config)
  with schema.section("memory"):
    memory.check(options, num_items)
  made = make_networks(config, num_items, repeats=problem.repeats)

  @functools.cache
  def evidence(refit: bool) -> memory.Memory:
    split = learnt_split(problem, "all" if refit else "none")
    # Activeness is read as when the plugins were fitted.
    built = memory.build(split, options, activeness=problem.split.activeness)
    return sharding.put_replicated(built, made.layout)

  return made._replace(evidence=evidence)


def make_weighting(
  key: str, spec: str, prior: np.ndarray, shares: np.ndarray
) -> aggregation.Weighting:
  """Builds a weighting, 'name' or 'name:option=number,…'.

  A rule that takes no prior of its own is preceded by it.

  Args:
    key: of the config, for the errors.
    spec: its value.
    prior: [G], P(d).
    shares: [G], the groups' shares of the training targets.

  Raises:
    InputError: for an unknown name, for an option that is unknown, repeated,
      missing or not the user's to set, or for a bad number.
  """
  name, _, text = spec.partition(":")
  if name not in WEIGHTINGS:
    raise schema.bad(key, spec, f"use one of {list(WEIGHTINGS)}")
  known = inspect.signature(WEIGHTINGS[name]).parameters
  of_data = {"prior": prior, "shares": shares, "num_groups": len(prior)}
  of_data |= {"start": shares, "end": prior}  # annealed: joint to adjusted
  arguments = {key: of_data[key] for key in known if key in of_data}
  options = [key for key in known if key not in of_data]
  for item in text.split(",") if text else ():
    option, _, written = item.partition("=")
    if option not in options or option in arguments:
      raise schema.bad(
        key, spec,
        f"{item!r} is no option, or repeated; options are {options}, each as "
        "option=number",
      )
    kind = schema.Key(None, known[option].annotation)
    number = schema.number(written)
    if not kind.accepts(number):
      raise schema.bad(key, spec, f"{item!r}: {kind.remedy}")
    arguments[option] = number
  for option in options:
    needed = known[option].default is inspect.Parameter.empty
    if needed and option not in arguments:
      raise schema.bad(key, spec, f"give {option}, as {name}:{option}=number")
  try:
    weighting = WEIGHTINGS[name](**arguments)
  except ValueError as error:
    raise schema.bad(key, spec, f"{error}; options are {options}") from error
  own = {"prior", "shares", "start"} & set(known)
  return weighting if own else preceded_by(prior, weighting)


def make_adjustment(
  pin: ConfigDict, prior: np.ndarray, shares: np.ndarray
) -> Adjustment:
  """Builds what the section `pin` says; prior and shares as `make_weighting`.

  Raises:
    InputError: for an unknown or contradictory setting.
  """
  weighting = make_weighting("pin.weighting", pin.weighting, prior, shares)
  given = {"path": pin.path, "diagnose_every": pin.diagnose_every}
  if not pin.blocks:
    by_tensor = pin.granularity == "tensor" or (
      pin.granularity == "rule" and pin.weighting.split(":")[0] in BY_TENSOR
    )
    return Adjustment(weighting, str if by_tensor else None, **given)
  bad = functools.partial(schema.bad, "pin.blocks", tuple(pin.blocks))
  if pin.granularity == "tensor":
    raise bad(
      "pin.granularity='tensor' makes every tensor a block already; give one "
      "of the two"
    )
  rules = {}
  for item in pin.blocks:
    pattern, _, spec = item.partition("=")
    if not (pattern and spec):
      raise bad(
        f"{item!r} must be pattern=weighting, such as 'items|bias=joint'"
      )
    try:
      re.compile(pattern)
    except re.error as error:
      raise bad(f"{pattern!r} is no regular expression ({error})") from error
    if pattern in (*rules, OTHERS):
      raise bad(
        f"{pattern!r} is repeated, or the name of what no pattern matches, "
        "which has pin.weighting; give each pattern once"
      )
    rules[pattern] = make_weighting("pin.blocks", spec, prior, shares)
  block_of = lambda leaf: next((p for p in rules if re.search(p, leaf)), OTHERS)
  return Adjustment({**rules, OTHERS: weighting}, block_of, **given)


def stage_adjustment(
  config: ConfigDict, rule: str | None, prior: np.ndarray, shares: np.ndarray
) -> Adjustment:
  """How a stage aggregates: as `pin` says, or by the rule that it names."""
  if rule is None:
    return make_adjustment(config.pin, prior, shares)
  pin = config.pin.copy_and_resolve_references()
  pin.weighting, pin.blocks = rule, ()
  return make_adjustment(pin, prior, shares)


def check_adjustments(
  config: ConfigDict, prior: np.ndarray, params: PyTree | None = None
) -> None:
  """Raises InputError where a weighting, or what goes with it, is wrong.

  Args:
    config: the whole configuration.
    prior: [G], P(d), or any other where it is not known yet.
    params: the backbone's, or their shapes; None where they are not known yet.
  """
  made = make_adjustment(config.pin, prior, prior)
  if params is None:
    return
  try:
    aggregation.aggregate(
      lambda *_: None, made.rules, path=made.path, blocks=made.blocks
    ).init(params)
  except ValueError as error:
    raise InputError(
      f"config keys pin.path={config.pin.path!r}, pin.weighting="
      f"{config.pin.weighting!r}, pin.blocks={tuple(config.pin.blocks)}: "
      f"{error}"
    ) from error


def make_loss(
  config: ConfigDict, split: splits.Split, groups: np.ndarray, num_groups: int,
  draw: Draw,
) -> losses.LossSpec:
  """Builds what training minimises, as `loss` says.

  Args:
    config: the whole configuration.
    split: whose training counts are the proposals'.
    groups: [U], whose batches a user is in; -1 = nobody's.
    num_groups: G.
    draw: how the batches are drawn.
  """
  options = config.loss
  if options.name == "softmax":
    return losses.SOFTMAX
  num_items = split.interactions.num_items
  make = {
    "uniform": lambda: negatives.uniform(num_items),
    "popularity": lambda: negatives.popularity(
      splits.training_counts(split), options.exponent
    ),
    "in_batch": lambda: negatives.in_batch(
      negatives.batch_counts(split, groups, num_groups, draw), groups
    ),
  }
  shares = proposal_shares(options.proposal)
  parts = [(share, make[name]()) for name, share in shares.items()]
  return losses.sampled(
    make_sampled_loss(options, num_items), negatives.mixture(parts),
    count=options.negatives, shared=options.candidates == "shared",
  )


def make_sampled_loss(
  options: ConfigDict, num_items: int
) -> losses.SampledLoss:
  """Builds the loss of sampled negatives that `loss.name` names.

  Raises:
    InputError: if gBCE has more negatives than there are items.
  """
  rate = options.negatives / max(num_items - 1, 1)
  with schema.section("loss"):
    return losses.SAMPLED_LOSSES[options.name](rate, options.calibration)


def make_optimizer(
  config: ConfigDict, stage: Stage, steps: int, backbone: Backbone
) -> Optimizer:
  """The optimizer of a stage; a backbone's alone averages, or has rows."""
  kind = "gate" if stage.plugin in GATES else stage.kind
  options = config.optimizer.to_dict()
  tables = options.pop("tables")
  rates = {
    "backbone": options.pop("learning_rate"),
    "plugin": options.pop("plugin_learning_rate"),
    "gate": _GATE_LEARNING_RATE,
    "classifier": 2e-3,
  }
  if kind != "backbone":
    options["average"] = 0.0
  made = optimizers.make_optimizer(
    max(steps, 1), learning_rate=rates[kind], **options
  )
  if kind != "backbone" or tables == "dense":
    return made
  return made._replace(
    transformation=sparse.row_sparse(made.transformation, backbone.tables),
    tables=backbone.tables,
  )


def num_steps(config: ConfigDict, stage: Stage) -> int:
  """Steps of a stage."""
  first, second = config.backbone_steps, config.plugin_steps
  return {
    "backbone": first,
    "plugin": second,
    "both": first + second,
    "none": 0,
    "refit": config.refit,
    "classifier": config.classifier_steps,
  }[stage.phase]


def sampling(config: ConfigDict, stage: Stage) -> tuple[str, str]:
  """How a stage's windows are drawn, and what its means are over."""
  return {
    "joint": (config.joint.draw, config.joint.mean),
    "groups": (config.pin.draw, config.pin.mean),
    "uniform": ("users", "users"),
    "plugin": (config.pin.plugin_draw, "interactions"),
    "validation": ("validation", "interactions"),
  }[stage.sampling]


def windows_of_step(config: ConfigDict, *, grouped: bool) -> int:
  """Windows that a step of stage 1 reads: of a group, or of everybody."""
  rows = config.batch_size // config.groups.num_groups
  if grouped:
    return rows
  return config.joint.batch_size or rows * config.groups.num_groups


Ranker = ranking.RankFn | ranking.SampledRankFn


def make_ranker(
  config: ConfigDict, problem: Problem, model: plugins.Model,
  layout: sharding.Layout = sharding.LOCAL,
) -> Ranker:
  """Builds the ranking that `evaluation` names, of test and validation."""
  data, options = problem.split.interactions, config.evaluation
  length = config.backbone.length
  if options.protocol == "sampled":
    return ranking.make_sampled_ranker(
      model, data, count=options.negatives, seed=options.seed, length=length
    )
  return ranking.make_ranker(
    model, num_items=data.num_items, length=length, layout=layout
  )
