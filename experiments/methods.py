"""Methods: which stages they train and what serves each segment.

Every method is a configuration of the same two steps; none has a trainer of
its own. All serve a user after the same number of steps, `backbone_steps` +
`plugin_steps`, but for the ablations `pin_backbone` and `pin_exact_backbone`,
which stop before stage 2, and `memory_alone`, which trains nothing. With
`refit`, so many steps more.

Rows of one table must have learnt from the same interactions. Where plugins
learn from validation targets, `base_validation` does too and is what the rows
are compared with; with `refit` every row learns from all validation targets in
the end.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ml_collections import ConfigDict

Users = Literal["all", "tail", "head"]
# Whose validation targets are among the training targets; 'half': those of the
# users that plugins learn from, where their draw is 'validation'.
Learnt = Literal["none", "half", "all"]
SEGMENTS = ("tail", "head")
GATES = ("gate", "gates")  # of Stage.plugin
LEARNT = {
  "none": "training targets",
  "half": "training targets and half of the users' validation targets",
  "all": "training targets and all validation targets",
}


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run of the loop.

  Attributes:
    name: unique; the checkpoints' directory.
    kind: what is trained: 'backbone', 'plugin' or 'classifier'.
    phase: whose steps it takes, 'backbone', 'plugin', 'both' or 'refit'.
    users: whom it learns from and is validated on.
    grouped: one gradient an activeness group (else one for all).
    exact: importance weights from this classifier stage.
    sampling: config section with `draw` and `mean`; 'validation': from the
      validation targets of half of the users.
    start: stage whose backbone it starts from (kind 'backbone') or freezes.
    plugin: what kind 'plugin' trains: a network for each segment ('own'), one
      of as many parameters for all users ('shared'), both as `plugin` says; the
      same of gates, whatever `plugin` says ('gates', 'gate'); or nothing
      ('memory_alone').
    assign: users' segments: by activeness, or drawn at random, as many users
      in each ('random').
    rule: weighting that combines the groups; None = `pin.weighting`.
    focal: whether the loss is `losses.focal`, as `loss.focusing` says.
    reads_activeness: whether its backbone is `backbones.conditioned`.
    learns: whose validation targets its backbone learns from besides. With
      'half' it is selected on the others', with 'all' not at all: it keeps its
      last step.
  """

  name: str
  kind: Literal["backbone", "plugin", "classifier"]
  phase: Literal["backbone", "plugin", "both", "classifier", "refit", "none"]
  users: Users = "all"
  grouped: bool = False
  exact: str | None = None
  sampling: Literal[
    "joint", "groups", "uniform", "plugin", "validation"
  ] = "joint"
  start: str | None = None
  plugin: Literal["own", "shared", "gates", "gate", "memory_alone"] = "own"
  assign: Literal["activeness", "random"] = "activeness"
  rule: str | None = None
  focal: bool = False
  reads_activeness: bool = False
  learns: Learnt = "none"


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the tables.

  Attributes:
    stages: in the order of training.
    serve: the stages whose weights serve tail and head users, each
      (backbone stage, plugin stage or None).
    swapped: tail users get the head users' plugin, and the other way round.
  """

  stages: tuple[Stage, ...]
  serve: tuple[tuple[str, str | None], tuple[str, str | None]]
  swapped: bool = False

  def stage(self, name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in self.stages if stage.name == name)


def _single(*stages: Stage) -> Method:
  """Served by the last stage."""
  return Method(stages, ((stages[-1].name, None),) * 2)


def _personalized(*stages: Stage) -> Method:
  """Served by the last two stages, a backbone and its plugins."""
  backbone, plugin = stages[-2:]
  return Method(stages, ((backbone.name, plugin.name),) * 2)


def _base(name: str, **options: Any) -> Method:
  """One model for all users that takes the steps of both stages."""
  return _single(Stage(name, "backbone", "both", **options))


_BASE = Stage("base", "backbone", "both")
_JOINT = Stage("joint", "backbone", "backbone")
_PIN = Stage(
  "pin/backbone", "backbone", "backbone", grouped=True, sampling="groups"
)
_CLASSIFIER = Stage(
  "classifier", "classifier", "classifier", start="base", sampling="groups"
)
_EXACT = dataclasses.replace(
  _PIN, name="pin-exact/backbone", exact="classifier"
)


def _plugins(name: str, start: Stage, **options: str) -> Stage:
  options = {"sampling": "plugin", **options}
  return Stage(name, "plugin", "plugin", start=start.name, **options)


def _gates(name: str, start: Stage, plugin: str) -> Stage:
  return _plugins(name, start, plugin=plugin, sampling="validation")


_PIN_PLUGINS = _plugins("pin/plugins", _PIN)
_MEMORY_ALONE = Stage(
  "memory-alone", "plugin", "none", sampling="plugin", start="joint",
  plugin="memory_alone",
)


def _fine_tuned(users: Users) -> Stage:
  return Stage(
    f"fine-tuned/{users}", "backbone", "plugin", users=users, start="joint"
  )


def _by_rule(rule: str) -> Method:
  """Stage 1 with another's rule, for as many steps as PIN takes in all."""
  name = rule.split(":")[0]
  return _base(
    name.replace("_", "-"), grouped=True, sampling="groups", rule=rule
  )


METHODS: dict[str, Method] = {
  "base": _single(_BASE),
  "base_validation": _base("base-validation", learns="half"),
  "pin": _personalized(_PIN, _PIN_PLUGINS),
  "pin_backbone": _single(_PIN),
  "pin_exact": _personalized(
    _BASE, _CLASSIFIER, _EXACT, _plugins("pin-exact/plugins", _EXACT)
  ),
  "pin_exact_backbone": _single(_BASE, _CLASSIFIER, _EXACT),
  "joint_plugins": _personalized(_JOINT, _plugins("joint/plugins", _JOINT)),
  "joint_shared": _personalized(
    _JOINT, _plugins("joint/shared", _JOINT, plugin="shared")
  ),
  "pin_shared": _personalized(
    _PIN, _plugins("pin/shared", _PIN, plugin="shared")
  ),
  "pin_random": _personalized(
    _PIN, _plugins("pin/random", _PIN, assign="random")
  ),
  "pin_swapped": dataclasses.replace(
    _personalized(_PIN, _PIN_PLUGINS), swapped=True
  ),
  "memory_alone": _personalized(_JOINT, _MEMORY_ALONE),
  "joint_gate": _personalized(_JOINT, _gates("joint/gate", _JOINT, "gate")),
  "pin_gates": _personalized(_PIN, _gates("pin/gates", _PIN, "gates")),
  "user_uniform": _base("user-uniform", sampling="uniform"),
  "base_activeness": _base("base-activeness", reads_activeness=True),
  "focal": _base("focal", focal=True),
  **{rule.split(":")[0]: _by_rule(rule) for rule in (
    "inverse_propensity", "group_dro", "streaming_dro", "cvar:alpha=0.4",
    "pcgrad", "upgrad", "consensus", "gradient_alignment",
  )},
  "tail_only": _base("tail-only", users="tail"),
  "head_only": _base("head-only", users="head"),
  "fine_tuned": Method(
    (_JOINT, _fine_tuned("tail"), _fine_tuned("head")),
    (("fine-tuned/tail", None), ("fine-tuned/head", None)),
  ),
}


def stages_of(methods: Mapping[str, Method]) -> tuple[Stage, ...]:
  """The stages that the methods need, each once, in order."""
  stages = [stage for m in methods.values() for stage in m.stages]
  return tuple(dict.fromkeys(stages))


def selected(config: Mapping[str, Any]) -> dict[str, Method]:
  """The methods that a job trains, by name; the first is compared with.

  Where a method learns from validation targets and the first of `methods` does
  not, 'base_validation' comes first, asked for or not; not so with `refit`.
  """
  names = [*config["methods"]]
  learnt = {name: learns(METHODS[name], config) for name in names}
  others = {learnt[name] for name in names if name != "base_validation"}
  if others - {learnt[names[0]]} == {"half"}:
    names = ["base_validation", *names]
  methods = {name: METHODS[name] for name in names}
  if not config.get("refit"):
    return methods
  return {name: _refitted(method) for name, method in methods.items()}


def _refitted(method: Method) -> Method:
  """The method with a last phase for each backbone that it serves by."""
  served = dict.fromkeys(backbone for backbone, _ in method.serve)
  more = {
    name: dataclasses.replace(
      method.stage(name), name=f"{name}/refit", phase="refit", start=name,
      learns="all",
    ) for name in served
  }
  return dataclasses.replace(
    method, stages=(*method.stages, *more.values()),
    serve=tuple((more[name].name, plugin) for name, plugin in method.serve),
  )


def learns(method: Method, config: Mapping[str, Any]) -> Learnt:
  """Whose validation targets a method learns from in a job of such a config."""
  if config.get("refit"):
    return "all"
  draw = config.get("pin", {}).get("plugin_draw")
  half = any(
    stage.learns == "half" or stage.phase != "none" and "validation" in (
      stage.sampling, draw if stage.sampling == "plugin" else None
    ) for stage in method.stages
  )
  return "half" if half else "none"


RULES = tuple(
  name for name, method in METHODS.items() if method.stages[-1].rule
)


def learnt_by(key: str, config: Mapping[str, Any]) -> str:
  """What the rows of a method's key have learnt from, in words."""
  return LEARNT[learns(METHODS[key], config) if key in METHODS else "none"]


def information(methods: Mapping[str, Method], config: ConfigDict) -> str:
  """What the rows have learnt from, in words; '' where it is training alone."""
  by: dict[str, list[str]] = {}
  for name, method in methods.items():
    by.setdefault(learns(method, config), []).append(name)
  if by.keys() <= {"none"}:
    return ""
  if len(by) == 1:
    return f"all rows have learnt from {LEARNT[next(iter(by))]}"
  return "; ".join(
    f"{', '.join(names)} learnt from {LEARNT[which]}"
    for which, names in by.items()
  ) + "; compare a row only with those that learnt from the same"


def compared(names: Sequence[str]) -> tuple[str, str]:
  """The method compared with, the first; and the one under test.

  That is PIN, where it is among them, else the last; controls are not.
  """
  tested = [name for name in names[1:] if name in ("pin", "pin_exact")]
  return names[0], [*names, *tested][-1]


def choose(
  validation: Mapping[str, Mapping[str, float]],
) -> dict[str, str]:
  """Segment -> key of the method that serves it best on validation.

  The first of equals; never a control, whose segments are not users' own.

  Args:
    validation: key -> segment -> mean of the metric.
  """
  control = lambda method: method.swapped or any(
    stage.assign == "random" for stage in method.stages
  )
  keys = [key for key in validation if not control(METHODS[key])] or [
    *validation
  ]
  return {
    segment: max(keys, key=lambda key: validation[key][segment])
    for segment in SEGMENTS
  }


def chosen(
  choice: Mapping[str, Any], methods: Mapping[str, Method] = METHODS
) -> Method:
  """The method that serves each segment by what was chosen for it.

  Args:
    choice: segment -> key, as of `choose`; what else it holds is not read.
    methods: of the job, as of `selected`.
  """
  parts = [methods[choice[segment]] for segment in SEGMENTS]
  stages = dict.fromkeys(stage for part in parts for stage in part.stages)
  serve = tuple(part.serve[s] for s, part in enumerate(parts))
  return Method(tuple(stages), serve)
