"""From a configuration to the objects of the library."""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import schema
from experiments.methods import GATES, SEGMENTS, Stage, selected, stages_of
from experiments.problem import Problem, learnt_split
from pin_jax import aggregation
from pin_jax.aggregation.weightings import BY_TENSOR, WEIGHTINGS, preceded_by
from pin_jax.data import splits
from pin_jax.data.batches import Draw
from pin_jax.evaluation import metrics, ranking
from pin_jax.models import memory, plugins
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
GATE = {"name": "gated", "hidden": 16, "reads_state": False}
_GATE_LEARNING_RATE = 2e-2
PROPOSALS = ("uniform", "popularity", "in_batch")
OTHERS = "others"  # the block of the parameters that no pattern matches


def backbone_options(backbone: ConfigDict) -> dict[str, Any]:
  """The keys of the `backbone` section that the named backbone takes."""
  taken = inspect.signature(BACKBONES[backbone.name]).parameters
  return {key: value for key, value in backbone.items() if key in taken}


def make_plugin(
  config: ConfigDict, kind: str, like: PyTree, *, repeats: bool = False
) -> Plugin:
  """Builds the plugin of a stage, for params or shapes `like`.

  Args:
    config: the whole configuration.
    kind: `Stage.plugin`. One for all users has as many parameters as those of
      the segments together.
    like: the backbone's.
    repeats: `Problem.repeats`, for gates.

  Raises:
    InputError: if the backbone does not suit it.
  """
  recalled = memory.Options(**config.memory)
  if kind == "memory_alone":
    return plugins.memory_alone(recalled)
  own = {**config.plugin, **(GATE if kind in GATES else {})}
  taken, build = PLUGINS[own["name"]]
  options = {key: own[key] for key in sorted(taken)}
  if kind in ("shared", "gate"):
    for key in taken & {"hidden", "rank"}:
      options[key] *= len(SEGMENTS)
  if own["name"] == "gated":
    options["own_repeats"] = repeats
  with schema.section("plugin"):
    return build(like, config.backbone.width, recalled, options)


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
  with schema.section("mesh"):
    layout = sharding.make_layout(
      backbone, num_items, devices=devices, **config.mesh
    )
  backbone = sharding.pad_catalogue(backbone, num_items, layout)
  like = jax.eval_shape(backbone.init, jax.random.key(0))
  made = {
    kind: make_plugin(config, kind, like, repeats=repeats)
    for kind in ("own", "shared", *GATES, "memory_alone")
  }
  return Networks(backbone, made, layout)


def networks_of(config: ConfigDict, problem: Problem) -> Networks:
  """The networks that suit a problem's catalogue and habits.

  Raises:
    InputError: for more items than a relation takes.
  """
  num_items = problem.split.interactions.num_items
  options = memory.Options(**config.memory)
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
  pin: ConfigDict, prior: np.ndarray, shares: np.ndarray,
  rule: str | None = None,
) -> Adjustment:
  """Builds what the section `pin` says; prior and shares as `make_weighting`.

  A stage's own `rule` stands in for `weighting` and `blocks`.

  Raises:
    InputError: for an unknown or contradictory setting.
  """
  spec = rule or pin.weighting
  weighting = make_weighting("pin.weighting", spec, prior, shares)
  given = {"path": pin.path, "diagnose_every": pin.diagnose_every}
  if rule or not pin.blocks:
    by_tensor = pin.granularity == "tensor" or (
      pin.granularity == "rule" and spec.split(":")[0] in BY_TENSOR
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


# What keys must be to each other: checked at launch, before any long work.

_OF_ANY = {  # of any backbone or plugin; configs set `hidden` for all plugins
  "backbone": {"name", "pack_rows", "compute"},
  "plugin": {"name", "hidden"},
}
# What these minimise makes the softmax of the logits an estimate of P(y|x).
PROPER = ("softmax", "sampled_softmax")


def check(config: ConfigDict) -> None:
  """Checks a whole configuration: keys, values, and what they are together.

  Raises:
    InputError: for the first key or value that is wrong.
  """
  schema.check_keys(config)
  check_adjustments(config, np.ones(config.groups.num_groups))
  proposal_shares(config.loss.proposal)
  with schema.section("evaluation.metrics"):
    for name in config.evaluation.metrics:
      metrics.metric(name)
  values = dict(schema.flatten(config.to_dict()))
  for rules in (_of_others, _of_methods, _of_scale, _of_rows, _of_disk):
    for wrong, key, remedy in rules(config):
      if wrong:
        raise schema.bad(key, values[key], remedy)


Rules = Iterator[tuple[bool, str, str]]  # (whether it is broken, key, remedy)


def _of_others(config: ConfigDict) -> Rules:
  """Keys that the named backbone or plugin does not take."""
  for section, taken in (
    ("backbone", backbone_options(config.backbone)),
    ("plugin", PLUGINS[config.plugin.name][0]),
  ):
    for name, key in schema.KEYS[section].items():
      yield (
        name not in {*taken, *_OF_ANY[section]}
        and config[section][name] != key.default,
        f"{section}.{name}",
        f"{config[section].name!r} does not take it; leave it at "
        f"{key.default!r} or set one of {sorted(taken)}",
      )


def _of_methods(config: ConfigDict) -> Rules:
  """What methods, losses and batches need."""
  backbone, loss, memory = config.backbone, config.loss, config.memory
  mixes = config.plugin.name in MIXING
  windows = max(config.batch_size, config.joint.batch_size)
  known = ("softmax", *losses.SAMPLED_LOSSES)
  yield from (
    (loss.name not in known, "loss.name", f"use one of {[*known]}"),
    ("heads" in backbone_options(backbone)
     and backbone.width % backbone.heads > 0, "backbone.width",
     f"give a multiple of backbone.heads={backbone.heads}"),
    (mixes and len(memory.relations) > 0
     and config.pin.plugin_draw != "validation", "memory.relations",
     "they hold what users did in training, so that plugins need "
     "pin.plugin_draw='validation'; set that, or no relations"),
    ((mixes or bool(_kinds(config) & {*GATES}))
     and memory.recent > backbone.length, "memory.recent",
     f"give at most backbone.length={backbone.length}, what the model reads"),
    (len(config.seeds) % config.num_seeds > 0, "num_seeds",
     f"the number of seeds, {len(config.seeds)}, must be a multiple of it"),
    (loss.name == "gbce" and _not_uniform(config), "loss.proposal",
     "loss.name='gbce' is made for 'uniform' negatives"),
    ("focal" in config.methods and loss.name not in PROPER, "loss.name",
     f"the method 'focal' takes one of {PROPER}"),
    (config.batch_size < config.groups.num_groups, "batch_size",
     f"give at least groups.num_groups={config.groups.num_groups}"),
    (windows * backbone.length > schema.MOST, "batch_size",
     f"a step would read backbone.length={backbone.length} times as many "
     f"positions, over {schema.MOST}; lower one of the two"),
    (config.validation.every % config.dispatch > 0, "validation.every",
     f"give a multiple of dispatch={config.dispatch}"),
  )


def _of_scale(config: ConfigDict) -> Rules:
  """What several devices need."""
  data, model, kinds = config.mesh.data, config.mesh.model, _kinds(config)
  yield from (
    (data * model > 1 and config.num_seeds > 1, "num_seeds",
     "several devices train one seed at a time; set 1"),
    (model > 1 and (_mixed(config) or "memory_alone" in kinds), "mesh.model",
     "plugins that mix the memory into the logits read the whole catalogue; "
     "set 1, or another plugin.name and methods without 'memory_alone' and "
     "gates"),
    (data > 1 and config.backbone.pack_rows > 0, "backbone.pack_rows",
     f"rows are not packed across mesh.data={data} devices; set 0"),
    (config.joint.batch_size % data > 0, "joint.batch_size",
     f"give a multiple of mesh.data={data}"),
    *((share % data > 0, "batch_size",
       f"{share} windows a {whose} must be a multiple of mesh.data={data}")
      for whose, share in (
        ("group", config.batch_size // config.groups.num_groups),
        ("segment", config.batch_size // 2),
        ("shared plugin", config.batch_size if "shared" in kinds else 0),
      )),
  )


def _of_rows(config: ConfigDict) -> Rules:
  """What row-sparse tables need."""
  if config.optimizer.tables == "dense":
    return
  for wrong, key, remedy in (
    (config.loss.name == "softmax", "loss.name",
     "it reads every row; use a sampled loss such as 'sampled_softmax'"),
    (config.optimizer.average > 0, "optimizer.average",
     "it writes every row; set 0"),
    (config.backbone.name == "din", "backbone.name",
     "it has no table that can be cut by rows; use another"),
  ):
    yield wrong, key, f"optimizer.tables='row_sparse': {remedy}, or set 'dense'"


def _of_disk(config: ConfigDict) -> Rules:
  """What interactions that stay on disk need."""
  if config.data.source != "stored" or not config.data.stream:
    return
  memory = "the memory is made of all interactions; "
  for wrong, key, remedy in (
    (config.num_seeds > 1, "num_seeds", "set 1"),
    (config.split.protocol != "leave_one_out", "split.protocol",
     "times are not stored; set 'leave_one_out'"),
    (_mixed(config), "plugin.name",
     f"{memory}use another, and methods without gates"),
    ("memory_alone" in _kinds(config), "methods",
     f"{memory}leave 'memory_alone' out"),
    (_exact(config), "methods",
     "exact adjustment needs them on the device; leave it out"),
    (config.loss.name != "softmax" and _not_uniform(config), "loss.proposal",
     "set 'uniform'"),
  ):
    yield wrong, key, (
      f"data.stream=True leaves the interactions on disk: {remedy}, or set "
      "data.stream=False"
    )


def _kinds(config: ConfigDict) -> set[str]:
  """Of `Stage.plugin`, those that are trained."""
  return {
    stage.plugin for stage in stages_of(selected(config))
    if stage.kind == "plugin"
  }


def _mixed(config: ConfigDict) -> bool:
  kinds = _kinds(config)
  return bool(kinds & {*GATES} or kinds and config.plugin.name in MIXING)


def _exact(config: ConfigDict) -> bool:
  return any(s.kind == "classifier" for s in stages_of(selected(config)))


def _not_uniform(config: ConfigDict) -> bool:
  return set(proposal_shares(config.loss.proposal)) != {"uniform"}
