"""From a configuration to the objects of the library.

Beside the checks and the job the only reader of a ConfigDict.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import schema
from experiments.problem import SEGMENTS, Problem, learnt_split
from pin_jax import aggregation
from pin_jax.aggregation.weightings import BY_TENSOR, WEIGHTINGS, preceded_by
from pin_jax.data import splits
from pin_jax.evaluation import ranking
from pin_jax.models import plugins, relations
from pin_jax.models.conditioned import conditioned
from pin_jax.models.din import din
from pin_jax.models.gru4rec import gru4rec
from pin_jax.models.hstu import hstu
from pin_jax.models.plugins import (
  Consultation,
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
from pin_jax.training import (
  losses,
  negatives,
  optimizers,
  sparse,
)
from pin_jax.training.optimizers import Optimizer
from pin_jax.training.steps import Adjustment
from pin_jax.types import (
  Backbone,
  InputError,
  Plugin,
  PyTree,
)

BACKBONES = {"sasrec": sasrec, "gru4rec": gru4rec, "hstu": hstu, "din": din}
# name -> (keys of the `plugin` section that it takes, builder from what is
# around it: the backbone's params, width D, channels of the memory and
# relations K, consultation).
PLUGINS: dict[str, tuple[set[str], Callable[..., Plugin]]] = {
  "bottleneck": ({"hidden"}, lambda like, d, k, c, o: bottleneck(d, **o)),
  "translation": (set(), lambda like, d, k, c, o: translation(d)),
  "adapter": ({"hidden"}, lambda like, d, k, c, o: adapter(like, width=d, **o)),
  "lora": ({"rank"}, lambda like, d, k, c, o: low_rank(like, **o)),
  "memory": (set(), lambda like, d, k, c, o: memory_mix(k, c)),
  "gated": (
    {"hidden", "reads_state"}, lambda like, d, k, c, o: gated(d, k, c, **o)
  ),
}
MIXING = ("memory", "gated")  # plugins that read the memory
PROPOSALS = ("uniform", "popularity", "in_batch")


OTHERS = "others"  # the block of the parameters that no pattern matches


def backbone_options(backbone: ConfigDict) -> dict[str, Any]:
  """The keys of the `backbone` section that the named backbone takes."""
  taken = inspect.signature(BACKBONES[backbone.name]).parameters
  return {key: value for key, value in backbone.items() if key in taken}


def consultation(config: ConfigDict) -> Consultation:
  """How the config asks the memory."""
  return Consultation(**{
    key: config.memory[key] for key in Consultation._fields
  })


def make_plugin(
  config: ConfigDict, like: PyTree, *, widen: int = 1, repeats: bool = False
) -> Plugin:
  """Builds the plugin that the config names.

  Args:
    config: the whole configuration.
    like: the backbone's params, or their shapes.
    widen: factor of `hidden` and `rank`, for a plugin that several segments
      share.
    repeats: `Problem.repeats`, for 'gated'.

  Raises:
    InputError: if the backbone does not suit it.
  """
  taken, build = PLUGINS[config.plugin.name]
  options = {key: config.plugin[key] for key in sorted(taken)}
  for key in taken & {"hidden", "rank"}:
    options[key] *= widen
  if config.plugin.name == "gated":
    options["repeats"] = repeats
  return build(
    like, config.backbone.width,
    len(config.memory.channels) + len(config.memory.relations),
    consultation(config), options,
  )


def proposal_shares(spec: str) -> dict[str, float]:
  """Reads `loss.proposal`: a name, or shares 'name:number,name:number'.

  Raises:
    InputError: for an unknown or repeated name, or a bad share.
  """
  shares = {}
  for item in spec.split(","):
    name, _, number = item.partition(":")
    try:
      share = float(number or 1)
    except ValueError:
      share = math.nan
    if name not in PROPOSALS or name in shares or not 0 < share < math.inf:
      raise schema.bad(
        "loss.proposal", spec,
        f"use one of {list(PROPOSALS)}, or a positive share of several, each "
        "once, such as 'in_batch:0.5,uniform:0.5'",
      )
    shares[name] = share
  return shares


def weighting_options(key: str, spec: str) -> tuple[str, dict[str, float]]:
  """Reads a weighting, 'name' or 'name:option=number,…'.

  Args:
    key: of the config, for the errors.
    spec: its value.

  Returns:
    The name, one of WEIGHTINGS, and the options by name.

  Raises:
    InputError: for an unknown name, for an option that is unknown, repeated or
      not the user's to set, or a bad number.
  """
  name, colon, text = spec.partition(":")
  if name not in WEIGHTINGS:
    raise schema.bad(key, spec, f"use one of {list(WEIGHTINGS)}")
  parameters = inspect.signature(WEIGHTINGS[name]).parameters.values()
  known = {
    parameter.name: schema.Key(None, parameter.annotation)
    for parameter in parameters
    if parameter.annotation in (int, float) and parameter.name != "num_groups"
  }
  given: dict[str, float] = {}
  for item in text.split(",") if colon else ():
    option, _, written = item.partition("=")
    if option not in known or option in given:
      raise schema.bad(
        key, spec,
        f"{item!r} is no option, or repeated; options are {list(known)}, each "
        "as option=number"
      )
    try:
      number = float(written)
    except ValueError:
      number = math.nan
    if number.is_integer():
      number = int(number)
    if not known[option].accepts(number):
      raise schema.bad(key, spec, f"{item!r}: {known[option].remedy}")
    given[option] = number
  for one in parameters:
    if one.name in known.keys() - given and one.default is one.empty:
      raise schema.bad(
        key, spec, f"give {one.name}, as {name}:{one.name}=number"
      )
  return name, given


def named_blocks(blocks: Iterable[str]) -> dict[str, str]:
  """Reads `pin.blocks`: pattern -> weighting.

  Raises:
    InputError: for what is no pattern=weighting, or repeated.
  """
  named: dict[str, str] = {}
  for item in blocks:
    pattern, _, spec = item.partition("=")
    try:
      re.compile(pattern)
    except re.error as error:
      raise schema.bad(
        "pin.blocks", tuple(blocks),
        f"{pattern!r} is no regular expression ({error})",
      ) from error
    if not (pattern and spec):
      raise schema.bad(
        "pin.blocks", tuple(blocks),
        f"{item!r} must be pattern=weighting, such as 'items|bias=joint'",
      )
    if pattern in (*named, OTHERS):
      raise schema.bad(
        "pin.blocks", tuple(blocks),
        f"{pattern!r} is repeated, or the name of what no pattern matches, "
        "which has pin.weighting; give each pattern once",
      )
    weighting_options("pin.blocks", spec)
    named[pattern] = spec
  return named


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
  evidence: Callable[[bool], plugins.Evidence] | None = None


def make_networks(
  config: ConfigDict, num_items: int,
  devices: Sequence[jax.Device] | None = None, *, repeats: bool = False,
) -> Networks:
  """Builds the backbone and the plugin that the config names.

  Args:
    config: the whole configuration.
    num_items: V.
    devices: for `mesh`; by default those that are there.
    repeats: `Problem.repeats`.
  """
  options = backbone_options(config.backbone)
  backbone = BACKBONES[config.backbone.name](num_items, **options)
  backbone = computed_in(backbone, config.backbone.compute)
  backbone = backbone._replace(packed=config.backbone.pack_rows)
  if config.backbone.reads_activeness:
    backbone = conditioned(backbone)
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
    "memory_alone": plugins.memory_alone(consultation(config)),
  }
  return Networks(backbone, made, layout)


def networks_of(config: ConfigDict, problem: Problem) -> Networks:
  """The networks that suit a problem's catalogue and habits.

  Raises:
    InputError: for more items than a relation takes.
  """
  num_items = problem.split.interactions.num_items
  relations.check(tuple(config.memory.relations), num_items)
  made = make_networks(config, num_items, repeats=problem.repeats)

  @functools.cache
  def evidence(refit: bool) -> plugins.Evidence:
    split = learnt_split(problem, "all" if refit else "none")
    return sharding.put_replicated(
      make_evidence(config.memory, split, problem.split), made.layout
    )

  return made._replace(evidence=evidence)


def make_evidence(
  options: ConfigDict, split: splits.Split, first: splits.Split
) -> plugins.Evidence:
  """What the `memory` section asks for.

  Args:
    options: the section.
    split: whose training prefix is remembered.
    first: whose activeness is read, as when the plugins were fitted.

  Raises:
    InputError: for a bad option, or too many items for a relation.
  """
  counting = {
    key: options[key] for key in ("window", "decay", "neighbours")
  }
  fitting = {
    key: options[key] for key in (
      "shrink", "popularity_power", "ridge", "next_ridge", "recent",
      "history_decay",
    )
  }
  related = relations.relate(
    split, tuple(options.relations), **fitting, **counting
  )
  made = plugins.make_evidence(
    split, relations=related, channels=tuple(options.channels), **counting
  )
  known = plugins.known_activeness(first.activeness, first.activeness)
  return made._replace(activeness=jnp.asarray(known))


def make_weighting(
  key: str, spec: str, prior: np.ndarray, shares: np.ndarray
) -> aggregation.Weighting:
  """Builds a weighting that a config key names.

  A rule that takes no prior of its own is preceded by it.

  Args:
    key: of the config, for the errors.
    spec: its value, see `weighting_options`.
    prior: [G], P(d).
    shares: [G], the groups' shares of the training targets.

  Raises:
    InputError: for an unknown name or option, or a bad number.
  """
  name, options = weighting_options(key, spec)
  given = {"prior": prior, "shares": shares, "num_groups": len(prior)}
  given |= {"start": shares, "end": prior}  # annealed: joint to adjusted
  known = inspect.signature(WEIGHTINGS[name]).parameters
  arguments = {name: given[name] for name in known if name in given}
  try:
    weighting = WEIGHTINGS[name](**arguments, **options)
  except (TypeError, ValueError) as error:
    free = [name for name in known if name not in given]
    raise InputError(
      f"config key {key}={spec!r}: {error}; options are {free}"
    ) from error
  own = {"prior", "shares", "start"} & set(known)
  return weighting if own else preceded_by(prior, weighting)


def make_adjustment(
  pin: ConfigDict, prior: np.ndarray, shares: np.ndarray
) -> Adjustment:
  """Builds what `pin.weighting`, `pin.granularity` and `pin.blocks` say.

  Args:
    pin: the config's section.
    prior: [G], P(d).
    shares: [G], the groups' shares of the training targets.

  Raises:
    InputError: for an unknown or contradictory setting.
  """
  weighting = make_weighting("pin.weighting", pin.weighting, prior, shares)
  given = {"path": pin.path, "diagnose_every": pin.diagnose_every}
  named = named_blocks(pin.blocks)
  if named and pin.granularity == "tensor":
    raise InputError(
      f"config key pin.blocks={tuple(pin.blocks)}: pin.granularity='tensor' "
      "makes every tensor a block already; give one of the two"
    )
  if named:
    rules = {
      pattern: make_weighting("pin.blocks", spec, prior, shares)
      for pattern, spec in named.items()
    }
    block_of = lambda leaf: next(
      (p for p in named if re.search(p, leaf)), OTHERS
    )
    return Adjustment({**rules, OTHERS: weighting}, block_of, **given)
  by_tensor = pin.granularity == "tensor" or (
    pin.granularity == "rule" and pin.weighting.split(":")[0] in BY_TENSOR
  )
  return Adjustment(weighting, str if by_tensor else None, **given)


def stage_adjustment(
  config: ConfigDict, rule: str | None, prior: np.ndarray, shares: np.ndarray
) -> Adjustment:
  """How a stage aggregates: as `pin` says, or by the rule that it names.

  Raises:
    InputError: for a bad specification, naming its config key.
  """
  if rule is None:
    return make_adjustment(config.pin, prior, shares)
  pin = config.pin.copy_and_resolve_references()
  pin.weighting, pin.blocks = rule, ()
  return make_adjustment(pin, prior, shares)


def make_loss(
  config: ConfigDict,
  split: splits.Split,
  groups: np.ndarray,
  *,
  num_groups: int,
  draw: str,
) -> losses.LossSpec:
  """Builds what training minimises, as `loss` says.

  Args:
    config: the whole configuration.
    split: whose training counts are the proposals'.
    groups: [U], whose batches a user is in; -1 = nobody's.
    num_groups: G.
    draw: how the batches are drawn, see `negatives.batch_counts`.
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
      negatives.batch_counts(
        split, groups, num_groups=num_groups, length=config.backbone.length,
        draw=draw,
      ), groups,
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
  return losses.SAMPLED_LOSSES[options.name](rate, options.calibration)


def make_optimizer(
  config: ConfigDict, kind: str, steps: int, backbone: Backbone
) -> Optimizer:
  """The optimizer of a kind of stage; the first alone averages, or has rows."""
  options = config.optimizer.to_dict()
  tables = options.pop("tables")
  rates = {
    "backbone": options.pop("learning_rate"),
    "plugin": options.pop("plugin_learning_rate"),
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


def windows_of_step(config: ConfigDict, *, grouped: bool) -> int:
  """Windows that a step of stage 1 reads: of a group, or of everybody."""
  rows = config.batch_size // config.groups.num_groups
  if grouped:
    return rows
  return config.joint.batch_size or rows * config.groups.num_groups


Ranker = ranking.RankFn | ranking.SampledRankFn


def make_ranker(
  config: ConfigDict, problem: Problem, model: ranking.Model,
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
