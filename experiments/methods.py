"""Methods: which stages they train and what serves each segment.

Every method is a configuration of the same two steps; none has a trainer of
its own. All serve a user after the same number of steps, `backbone_steps` +
`plugin_steps`, but for the ablations `pin_backbone` and `pin_exact_backbone`,
which stop before stage 2, and `memory_alone`, which trains nothing.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

Users = Literal["all", "tail", "head"]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One run of `fit`.

  Attributes:
    name: unique; the checkpoints' directory.
    kind: what is trained: 'backbone', 'plugin' or 'classifier'.
    phase: whose steps it takes, 'backbone', 'plugin' or 'both'.
    users: whom it learns from and is validated on.
    grouped: one gradient an activeness group (else one for all).
    exact: importance weights from this classifier stage.
    sampling: config section with `draw` and `mean`.
    start: stage whose backbone it starts from (kind 'backbone') or freezes.
    plugin: what kind 'plugin' trains: a network for each segment ('own'), one
      of as many parameters for all users ('shared'), or nothing
      ('memory_alone').
    assign: users' segments: by activeness, or drawn at random, as many users
      in each ('random').
    rule: key of the config section `rules`, whose weighting combines the
      groups; None = `pin.weighting`.
    focal: whether the loss is `losses.focal`, as `loss.focusing` says.
    reads_activeness: whether the backbone that it trains from the start is
      `conditioned`, whatever `backbone.reads_activeness` says.
  """

  name: str
  kind: Literal["backbone", "plugin", "classifier"]
  phase: Literal["backbone", "plugin", "both", "classifier", "none"]
  users: Users = "all"
  grouped: bool = False
  exact: str | None = None
  sampling: Literal["joint", "groups", "uniform", "plugin"] = "joint"
  start: str | None = None
  plugin: Literal["own", "shared", "memory_alone"] = "own"
  assign: Literal["activeness", "random"] = "activeness"
  rule: str | None = None
  focal: bool = False
  reads_activeness: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the tables.

  Attributes:
    title: its name there.
    stages: in the order of training.
    serve: the stages whose weights serve tail and head users, each
      (backbone stage, plugin stage or None).
    swapped: tail users get the head users' plugin, and the other way round.
  """

  title: str
  stages: tuple[Stage, ...]
  serve: tuple[tuple[str, str | None], tuple[str, str | None]]
  swapped: bool = False

  def stage(self, name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in self.stages if stage.name == name)


def _single(title: str, stage: Stage) -> Method:
  return Method(title, (stage,), ((stage.name, None),) * 2)


def _personalized(title: str, *stages: Stage) -> Method:
  backbone, plugin = stages[-2:]
  return Method(title, stages, ((backbone.name, plugin.name),) * 2)


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
  return Stage(
    name, "plugin", "plugin", sampling="plugin", start=start.name, **options
  )


_PIN_PLUGINS = _plugins("pin/plugins", _PIN)
_MEMORY_ALONE = Stage(
  "memory-alone", "plugin", "none", sampling="plugin", start="joint",
  plugin="memory_alone",
)


def _fine_tuned(users: Users) -> Stage:
  return Stage(
    f"fine-tuned/{users}", "backbone", "plugin", users=users, start="joint"
  )


def _by_rule(name: str) -> Method:
  """Stage 1 with another's rule, for as many steps as PIN takes in all."""
  stage = Stage(
    name, "backbone", "both", grouped=True, sampling="groups",
    rule=name.replace("-", "_"),
  )
  return _single(name.replace("-", " "), stage)


METHODS: dict[str, Method] = {
  "base": _single("base", _BASE),
  "pin": _personalized("pin", _PIN, _PIN_PLUGINS),
  "pin_backbone": _single("pin backbone", _PIN),
  "pin_exact": _personalized(
    "pin exact", _BASE, _CLASSIFIER, _EXACT,
    _plugins("pin-exact/plugins", _EXACT),
  ),
  "pin_exact_backbone": Method(
    "pin exact backbone", (_BASE, _CLASSIFIER, _EXACT),
    ((_EXACT.name, None),) * 2,
  ),
  "joint_plugins": _personalized(
    "joint + plugins", _JOINT, _plugins("joint/plugins", _JOINT)
  ),
  "joint_shared": _personalized(
    "joint + shared plugin", _JOINT,
    _plugins("joint/shared", _JOINT, plugin="shared"),
  ),
  "pin_shared": _personalized(
    "pin, shared plugin", _PIN,
    _plugins("pin/shared", _PIN, plugin="shared"),
  ),
  "pin_random": _personalized(
    "pin, random segments", _PIN,
    _plugins("pin/random", _PIN, assign="random"),
  ),
  "pin_swapped": dataclasses.replace(
    _personalized("pin, swapped plugins", _PIN, _PIN_PLUGINS), swapped=True
  ),
  "memory_alone": _personalized("memory alone", _JOINT, _MEMORY_ALONE),
  "user_uniform": _single(
    "user-uniform",
    Stage("user-uniform", "backbone", "both", sampling="uniform"),
  ),
  "base_activeness": _single(
    "base, reads activeness",
    dataclasses.replace(
      _BASE, name="base-activeness", reads_activeness=True
    ),
  ),
  "focal": _single(
    "focal loss", dataclasses.replace(_BASE, name="focal", focal=True)
  ),
  "inverse_propensity": _by_rule("inverse-propensity"),
  "group_dro": _by_rule("group-dro"),
  "streaming_dro": _by_rule("streaming-dro"),
  "cvar": _by_rule("cvar"),
  "pcgrad": _by_rule("pcgrad"),
  "upgrad": _by_rule("upgrad"),
  "consensus": _by_rule("consensus"),
  "gradient_alignment": _by_rule("gradient-alignment"),
  "tail_only": _single(
    "tail only", Stage("tail-only", "backbone", "both", users="tail")
  ),
  "head_only": _single(
    "head only", Stage("head-only", "backbone", "both", users="head")
  ),
  "fine_tuned": Method(
    "fine-tuned",
    (_JOINT, _fine_tuned("tail"), _fine_tuned("head")),
    (("fine-tuned/tail", None), ("fine-tuned/head", None)),
  ),
}


def stages_of(names: tuple[str, ...]) -> tuple[Stage, ...]:
  """The stages that the named methods need, each once, in order."""
  stages = [stage for name in names for stage in METHODS[name].stages]
  return tuple(dict.fromkeys(stages))


_EXACT_FORM = {"pin": "pin_exact", "pin_backbone": "pin_exact_backbone"}


def method_names(names: Iterable[str], weighting: str) -> tuple[str, ...]:
  """The methods to run: with 'exact_backdoor', PIN in its exact form."""
  if weighting.split(":")[0] != "exact_backdoor":
    return tuple(names)
  return tuple(dict.fromkeys(_EXACT_FORM.get(name, name) for name in names))


def compared(names: Sequence[str]) -> tuple[str, str]:
  """The method compared with, the first; and the one under test.

  That is PIN, where it is among them, else the last; controls are not.
  """
  tested = [name for name in names[1:] if name in ("pin", "pin_exact")]
  return names[0], [*names, *tested][-1]
