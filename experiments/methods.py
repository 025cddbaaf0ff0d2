"""Methods: which stages they train and what serves each segment.

Every method is a configuration of the same two steps; none has a trainer of
its own. All serve a user after the same number of steps, `backbone_steps` +
`plugin_steps`, but for the ablation `pin_backbone`, which stops before stage 2.
"""

import dataclasses
from collections.abc import Iterable
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
  """

  name: str
  kind: Literal["backbone", "plugin", "classifier"]
  phase: Literal["backbone", "plugin", "both", "classifier"]
  users: Users = "all"
  grouped: bool = False
  exact: str | None = None
  sampling: Literal["joint", "groups", "uniform", "plugin"] = "joint"
  start: str | None = None


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the tables.

  Attributes:
    title: its name there.
    stages: in the order of training.
    serve: the stages whose weights serve tail and head users, each
      (backbone stage, plugin stage or None).
  """

  title: str
  stages: tuple[Stage, ...]
  serve: tuple[tuple[str, str | None], tuple[str, str | None]]


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
_CLASSIFIER = Stage("classifier", "classifier", "classifier", start="base")
_EXACT = dataclasses.replace(
  _PIN, name="pin-exact/backbone", exact="classifier"
)


def _plugins(name: str, start: Stage) -> Stage:
  return Stage(name, "plugin", "plugin", sampling="plugin", start=start.name)


def _fine_tuned(users: Users) -> Stage:
  return Stage(
    f"fine-tuned/{users}", "backbone", "plugin", users=users, start="joint"
  )


METHODS: dict[str, Method] = {
  "base": _single("base", _BASE),
  "pin": _personalized("pin", _PIN, _plugins("pin/plugins", _PIN)),
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
  "user_uniform": _single(
    "user-uniform",
    Stage("user-uniform", "backbone", "both", sampling="uniform"),
  ),
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
