"""The claim under test, from result rows: tail users better, head no worse.

For every model against the comparator: superiority on tail users, and
non-inferiority on head users by a margin declared before training. Each of the
two families of tests is corrected over the models by Holm's method; the claim
holds for a model where both of its hypotheses fall. A third family holds the
tests of harm, of tail users and beyond the margin of head users; the claim is
refuted where one falls.

Every test is one-sided at half the level, .025. As far as each errs no more
often than that, so does each family, Holm's correction included: the chance of
any false 'holds' is at most .05, of any false 'refuted' .025, of either .075.
With the spread over seeds that jobs have, a test was measured to err in 15 % of
all cases at one seed, 5 % at two and 2.5 % from three on (simulated, the more
users the more: 14 to 20, 5 to 8, 3 to 5 %). So no verdict is given below three.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl

from experiments.methods import METHODS, Method
from experiments.tables import (
  CONFIDENCE,
  MIN_SEEDS,
  NUM_RESAMPLES,
  SEGMENTS,
  change_text,
  check_same_users,
  maskings,
  model_rows,
  user_ids,
)
from pin_jax.evaluation import metrics, statistics

LEVEL = round(1 - CONFIDENCE, 12)
OUTCOMES = (
  "holds", "gain only", "no loss only", "refuted", "open", "too few seeds",
  "unequal information",
)
HOLDS, GAIN_ONLY, NO_LOSS_ONLY, REFUTED, OPEN, UNTESTED, UNEQUAL = OUTCOMES
_ERRS = {1: 15, 2: 5}  # seeds -> % that a test meant to err in 2.5 % errs in
# Between two seeds of one model, measured on Beauty.
_CORRELATION, _SEED_SPREAD = 0.85, 0.02
_LEAST_HITS = 20  # fewer are not nearly normal
_TAIL, _HEAD = 0, 1


def values_by_seed(
  rows: pl.DataFrame,
  models: Sequence[str],
  *,
  column: str = "rank",
  cutoff: int = 10,
  keep: pl.Expr | None = None,
) -> np.ndarray:
  """NDCG of every user under every seed and model.

  Args:
    rows: result rows.
    models: M models of the same users and seeds.
    column: which rank.
    cutoff: K.
    keep: of the rows; None keeps all.

  Returns:
    [M, S, U].

  Raises:
    InputError: if the models differ in their users or seeds.
  """
  check_same_users(rows, models, on=["user", "seed"])
  kept = rows if keep is None else rows.filter(keep)
  if not kept.height:
    return np.zeros((len(models), 1, 0))
  frames = [model_rows(kept, model) for model in models]
  values = [metrics.ndcg(f[column].to_numpy(), cutoff) for f in frames]
  seeds = frames[0]["seed"].to_numpy()
  return statistics.by_seed(np.stack(values), user_ids(frames[0]), seeds)


def _seeds(rows: pl.DataFrame) -> dict[str, frozenset]:
  """Seeds of every model, in the order of the rows."""
  found = rows.group_by("model", maintain_order=True).agg("seed")
  return {model: frozenset(seeds) for model, seeds in found.iter_rows()}


def with_the_same_seeds(
  rows: pl.DataFrame, base: str
) -> list[tuple[pl.DataFrame, list[str]]]:
  """Rows of the seeds that models share with the comparator, and the models.

  Models with one set of seeds come together, in the order of the rows.
  """
  own = _seeds(rows)
  together: dict[frozenset, list[str]] = {}
  for model, seeds in own.items():
    if model != base and seeds & own[base]:
      together.setdefault(seeds & own[base], []).append(model)
  return [
    (rows.filter(pl.col("seed").is_in(sorted(seeds))), models)
    for seeds, models in together.items()
  ]


def mean_of(
  cubes: np.ndarray, num_resamples: int = NUM_RESAMPLES
) -> statistics.Interval:
  """Means of values [..., S, U] with their intervals."""
  return statistics.mean_interval(
    np.reshape(cubes, (*cubes.shape[:-2], -1)), **_units(cubes),
    confidence=CONFIDENCE, num_resamples=num_resamples,
  )


def change_of(
  first: np.ndarray,
  others: Sequence[np.ndarray],
  *,
  margin: float = 0.0,
  num_resamples: int = NUM_RESAMPLES,
) -> statistics.Change:
  """Changes of M others against the first; all values [S, U]."""
  bases = np.broadcast_to(first, (len(others), *first.shape))
  return statistics.relative_change(
    *(np.reshape(x, (len(others), first.size)) for x in (bases, others)),
    **_units(first), margin=margin, confidence=CONFIDENCE,
    num_resamples=num_resamples,
  )


def _units(cube: np.ndarray) -> dict[str, np.ndarray]:
  """User and seed of each value of [..., S, U], laid out flat."""
  num_seeds, size = cube.shape[-2:]
  return {
    "users": np.tile(np.arange(size), num_seeds),
    "seeds": np.repeat(np.arange(num_seeds), size),
  }


def check_claims(
  rows: pl.DataFrame,
  *,
  base: str,
  margin: float,
  column: str = "rank",
  cutoff: int = 10,
  num_resamples: int = NUM_RESAMPLES,
  more_seeds: str = "train more seeds",
  remarks: Mapping[str, str] = MappingProxyType({}),
) -> pl.DataFrame:
  """Tests the claim for every model against the comparator.

  Args:
    rows: result rows of any number of models.
    base: the comparator.
    margin: relative loss of head users that still counts as no worse.
    column: which rank.
    cutoff: K of NDCG.
    num_resamples: bootstrap resamples of users and seeds.
    more_seeds: how to get more seeds, said of models with fewer than three.
    remarks: what the verdict on a model ends with, see `unchanged`.

  Returns:
    One line a model: model, seeds, for `part` of overall, tail and head
    `part`_base, `part`_other, `part`_change, `part`_low, `part`_high,
    `part`_p and `part`_harm with Holm's `part`_adjusted and
    `part`_harm_adjusted (p over the models, of H0: change <= 0, for head users
    change <= -margin; harm over the models' tail and head together, of H0:
    change >= 0 or -margin; NaN below three seeds), tail_of_seeds and
    head_of_seeds (each seed's own change), outcome and verdict.

  Raises:
    InputError: if the comparator is absent, or users or targets differ.
  """
  model_rows(rows, base)  # present, and without repeated rows
  options = {"column": column, "cutoff": cutoff}
  lines = [
    line
    for shared, models in with_the_same_seeds(rows, base)
    for line in _changes(shared, base, models, margin, num_resamples, options)
  ]
  order = rows["model"].unique(maintain_order=True).to_list()
  lines.sort(key=lambda line: order.index(line["model"]))
  for family in (["overall"], ["tail"], ["head"], ["tail_harm", "head_harm"]):
    _adjust(lines, family)
  for line in lines:
    line["outcome"] = _outcome(line)
    words = _in_words(line, base, margin)
    if line["outcome"] == UNTESTED:
      words = _untested_words(line, base, margin, more_seeds)
    remark = remarks.get(line["model"])
    line["verdict"] = words + (f" Note: {remark}." if remark else "")
  return pl.DataFrame(lines)


def _adjust(lines: Sequence[dict[str, Any]], family: Sequence[str]) -> None:
  """Adds Holm's p-values of a family, of the lines with enough seeds."""
  raw = {name: name if "harm" in name else f"{name}_p" for name in family}
  tested = [
    (line, name) for line in lines for name in family
    if line["seeds"] >= MIN_SEEDS
  ]
  for line in lines:
    line |= {f"{name}_adjusted": math.nan for name in family}
  adjusted = statistics.holm([line[raw[name]] for line, name in tested])
  for (line, name), value in zip(tested, adjusted, strict=True):
    line[f"{name}_adjusted"] = float(value)


def _changes(
  rows: pl.DataFrame,
  base: str,
  models: Sequence[str],
  margin: float,
  num_resamples: int,
  options: Mapping[str, Any],
) -> Iterable[dict[str, Any]]:
  """Lines of models that share their seeds, before correction."""
  lines = [{"model": m, "seeds": rows["seed"].n_unique()} for m in models]
  for part, keep, allowed in (
    ("overall", None, 0.0),
    ("tail", pl.col("segment") == _TAIL, 0.0),
    ("head", pl.col("segment") == _HEAD, margin),
  ):
    first, *others = values_by_seed(rows, [base, *models], keep=keep, **options)
    change = change_of(
      first, others, margin=allowed, num_resamples=num_resamples
    )
    for line, other, *numbers in zip(lines, others, *change, strict=True):
      line |= _named(part, first, other, numbers)
  return lines


def _named(
  part: str, base: np.ndarray, other: np.ndarray, numbers: Sequence[float]
) -> dict[str, Any]:
  keys = [f"{part}_{key}" for key in ("change", "low", "high", "p", "harm")]
  means = [float(x.mean()) if x.size else math.nan for x in (base, other)]
  named = {f"{part}_base": means[0], f"{part}_other": means[1]}
  named |= dict(zip(keys, map(float, numbers), strict=True))
  if part != "overall":
    pairs = zip(base, other, strict=True)
    named[f"{part}_of_seeds"] = [
      float(o.mean() / b.mean() - 1) if b.size and b.mean() else math.nan
      for b, o in pairs
    ]
  return named


def _outcome(line: Mapping[str, Any]) -> str:
  if line["seeds"] < MIN_SEEDS:
    return UNTESTED
  better, no_worse, *harmed = (
    line[f"{name}_adjusted"] < LEVEL
    for name in ("tail", "head", "tail_harm", "head_harm")
  )
  if any(harmed):
    return REFUTED
  if better and no_worse:
    return HOLDS
  if better or no_worse:
    return GAIN_ONLY if better else NO_LOSS_ONLY
  return OPEN


def without_verdict(
  line: Mapping[str, Any], base: str, learnt: str, base_learnt: str
) -> dict[str, Any]:
  """The line of a model that has learnt from other interactions than the base.

  Args:
    line: of `check_claims`.
    base: the comparator.
    learnt: what the model has learnt from.
    base_learnt: what the comparator has.
  """
  tail, head = (interval_text(line, part) for part in ("tail", "head"))
  none = {key: math.nan for key in line if key.endswith("_adjusted")}
  return {**line, **none, "outcome": UNEQUAL, "verdict": (
    f"No verdict: {line['model']} has learnt from {learnt}, {base} from "
    f"{base_learnt}. The difference (tail users {tail} %, head users {head} %) "
    "is that of the information too."
  )}


def p_text(value: float) -> str:
  """A p-value in three digits."""
  if not math.isfinite(value):
    return "n/a"
  return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def interval_text(line: Mapping[str, Any], part: str) -> str:
  """'+1.0 [−2.0, +3.0]', in percent."""
  return change_text(*(line[f"{part}_{k}"] for k in ("change", "low", "high")))


def _in_words(line: Mapping[str, Any], base: str, margin: float) -> str:
  """One or two sentences that say what was shown and what was not."""
  allowed = f"{100 * margin:g} %"
  words, numbers = [], []
  for part, better, worse, neither in (
    ("tail", "tail users are served better", "tail users are served worse",
     "for tail users no gain is shown"),
    ("head", f"head users are shown to lose no more than {allowed}",
     f"head users lose more than the {allowed} allowed",
     f"for head users a loss above {allowed} is not ruled out"),
  ):  # fmt: skip
    p_value, harm = line[f"{part}_adjusted"], line[f"{part}_harm_adjusted"]
    words.append(
      better if p_value < LEVEL else worse if harm < LEVEL else neither
    )
    shown = f"p of harm {p_text(harm)}" if harm < LEVEL else (
      f"p {p_text(p_value)}"
    )
    numbers.append(f"{interval_text(line, part)} %, {shown}")
  opening = {HOLDS: "The claim holds", REFUTED: "The claim is refuted"}.get(
    line["outcome"], "The claim is not shown"
  )
  return (
    f"{opening}: against {base}, {words[0]} ({numbers[0]}), and {words[1]} "
    f"({numbers[1]})."
  )


def _untested_words(
  line: Mapping[str, Any], base: str, margin: float, more_seeds: str
) -> str:
  """What one or two seeds show, and how to get a verdict."""
  count = line["seeds"]
  said = "one seed shows" if count == 1 else "two seeds show"
  tail, head = (interval_text(line, part) for part in ("tail", "head"))
  return (
    f"No verdict: against {base}, {said} tail users at {tail} % and head users "
    f"at {head} % (margin {100 * margin:g} %). From so few a test that is to "
    f"err in 2.5 % of all cases errs in some {_ERRS[count]} %. For a verdict "
    f"take three seeds or more: {more_seeds}"
  )


def unchanged(
  rows: pl.DataFrame, cost: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
  """Says which models' last stage left its start as it was, and for whom.

  That is where the selected checkpoint is the start, or where a model ranks
  every target of a segment as its backbone, another model of the rows, does.

  Args:
    rows: result rows.
    cost: of each run, `steps` and `best_steps` (one, or one a plugin).

  Returns:
    Title of a model -> a sentence without its full stop.
  """
  remarks = {}
  by_title = {method.title: method for method in METHODS.values()}
  for model, seeds in _seeds(rows).items():
    method = by_title.get(model)
    if method is None:
      continue
    same = [_same_seeds(rows, cost, method, segment) for segment in SEGMENTS]
    users = [
      ("all users", same[0] & same[1]),
      *(
        (f"{name} users", same[s] - same[1 - s]) for s, name in SEGMENTS.items()
      ),
    ]
    stage = method.stage(method.serve[0][1] or method.serve[0][0])
    start = "its backbone" if stage.kind == "plugin" else "its start"
    said = [
      f"stage 2 changed nothing for {whom}: {model} equals {start} there"
      + _of_seeds(found, seeds)
      for whom, found in users if found
    ]
    fits = [s for s in method.stages if s.kind == "classifier"]
    found = {x for s in fits for x in seeds if _chose_start(cost, s.name, x)}
    if found:
      said.append(
        f"the classifier of strata learnt nothing: {model} weights all "
        "examples of a group alike" + _of_seeds(found, seeds)
      )
    if said:
      remarks[model] = "; ".join(said)
  return remarks


def _of_seeds(found: set[int], seeds: Iterable[int]) -> str:
  if found == set(seeds):
    return ""
  plural = "s" if len(found) > 1 else ""
  return f" (seed{plural} {', '.join(map(str, sorted(found)))})"


def _chose_start(
  cost: Mapping[str, Mapping[str, Any]], stage: str, seed: int,
  slot: int | None = None,
) -> bool:
  """Whether a stage that was trained is selected as it began."""
  spent = cost.get(f"seed{seed}/{stage}", cost.get(stage))
  if not spent or not spent["steps"]:
    return False
  best = spent["best_steps"]
  own = best if slot is None or len(best) == 1 else [best[slot]]
  return not any(own)


def _same_seeds(
  rows: pl.DataFrame,
  cost: Mapping[str, Mapping[str, Any]],
  method: Method,
  segment: int,
) -> set[int]:
  """Seeds under which a method's last stage changed nothing for a segment."""
  backbone, plugin = method.serve[segment]
  stage = method.stage(plugin or backbone)
  if stage.start is None or stage.phase == "none":
    return set()
  own = rows.filter(model=method.title, segment=segment)
  slot = 1 - segment if method.swapped else segment
  if stage.assign == "random":
    slot = None  # users of a segment have either plugin: both must be
  found = {
    seed for seed in own["seed"].unique()
    if _chose_start(cost, stage.name, seed, slot)
  }
  titles = [
    m.title for m in METHODS.values() if m.serve == ((stage.start, None),) * 2
  ]
  columns = ["seed", "user", *maskings(rows).values()]
  theirs = rows.filter(
    pl.col("model").is_in(titles), segment=segment
  ).select(columns).sort("seed", "user")
  for (seed,), ranks in own.select(columns).sort("user").group_by("seed"):
    if ranks.equals(theirs.filter(seed=seed)):
      found.add(seed)
  return found


def levels(
  rows: pl.DataFrame,
  *,
  column: str = "rank",
  cutoff: int = 10,
  num_resamples: int = NUM_RESAMPLES,
) -> pl.DataFrame:
  """How well every model serves whom: parts, signed gap, worst group.

  Args:
    rows: result rows of any number of models.
    column: which rank.
    cutoff: K of NDCG.
    num_resamples: bootstrap resamples of users and seeds.

  Returns:
    One line a model: model, seeds, users; `x`, `x`_low and `x`_high for x of
    overall, tail, head, gap (head - tail, positive where the tail is worse off)
    and worst (the group served worst), and worst_group, its number.

  Raises:
    InputError: if a model's rows are incomplete.
  """
  together: dict[frozenset, list[str]] = {}
  for model, seeds in _seeds(rows).items():
    together.setdefault(seeds, []).append(model)
  lines = {}
  for models in together.values():
    own = rows.filter(pl.col("model").is_in(models))
    cubes = {
      name: values_by_seed(own, models, keep=keep, column=column, cutoff=cutoff)
      for name, keep in _parts(rows).items()
    }
    for model, line in zip(models, _levels(cubes, num_resamples), strict=True):
      facts = own.filter(pl.col("model") == model)
      lines[model] = {
        "model": model, "seeds": facts["seed"].n_unique(),
        "users": facts["user"].n_unique(), **line,
      }
  order = rows["model"].unique(maintain_order=True)
  return pl.DataFrame([lines[model] for model in order])


def _levels(
  cubes: Mapping[str, np.ndarray], num_resamples: int
) -> Iterable[dict[str, Any]]:
  """Numbers of each of M models from their values [M, S, U_part]."""
  draw = {"confidence": CONFIDENCE, "num_resamples": num_resamples}
  groups = {
    int(name.split()[1]): cube
    for name, cube in cubes.items() if name.startswith("group")
  }
  worst = statistics.worst_group([*groups.values()], **draw)
  found = {
    name: mean_of(cubes[name], num_resamples)
    for name in ("overall", "tail", "head")
  }
  found["gap"] = statistics.gap(cubes["head"], cubes["tail"], **draw)
  found["worst"] = worst[1:]
  for index in range(len(worst.index)):
    line = {"worst_group": [*groups][int(worst.index[index])]}
    for name, numbers in found.items():
      keys = (name, f"{name}_low", f"{name}_high")
      line |= {k: float(x[index]) for k, x in zip(keys, numbers, strict=True)}
    yield line


def _parts(rows: pl.DataFrame) -> dict[str, pl.Expr | None]:
  parts: dict[str, pl.Expr | None] = {"overall": None}
  parts |= {
    "tail": pl.col("segment") == _TAIL, "head": pl.col("segment") == _HEAD,
  }
  for group in sorted(rows["group"].unique()):
    parts[f"group {group}"] = pl.col("group") == group
  return parts


def power_lines(
  claims: Mapping[str, float],
  users: Mapping[str, int],
  levels: Mapping[str, float],
  num_seeds: int,
  cutoff: int = 10,
) -> list[str]:
  """Says, once the comparator is trained, what the design can show.

  Hits are taken to be spread evenly over the ranks 1..K, which gives a user's
  NDCG with mean m the variance m sum_r g_r^2 / sum_r g_r - m^2, g the gains.

  Args:
    claims: the config section of that name.
    users: number of test users of each segment, 'tail' and 'head'.
    levels: m, the comparator's NDCG of each segment on validation.
    num_seeds: seeds of every model.
    cutoff: K.

  Returns:
    One line on the assumptions and one for each segment of which they hold:
    with a level, `_LEAST_HITS` expected hits and no more than all users hit.
    [] where that is none, or where there are too few seeds for a verdict.
  """
  gains = metrics.ndcg(np.arange(1, cutoff + 1), cutoff)
  lines = []
  for segment, count in users.items():
    mean = levels.get(segment, math.nan)
    hits = count * mean / gains.mean()
    if num_seeds < MIN_SEEDS or not _LEAST_HITS <= hits <= count:
      continue
    error = statistics.relative_error(
      num_users=count, num_seeds=num_seeds, correlation=_CORRELATION,
      spread=math.sqrt((gains**2).sum() / gains.sum() / mean - 1),
      seed_spread=_SEED_SPREAD,
    )
    lines.append(_power_line(segment, count, num_seeds, error, claims))
  if not lines:
    return []
  shown = ", ".join(f"{name} {levels[name]:.4f}" for name in levels)
  return [
    f"power, from the comparator's validation NDCG@{cutoff} ({shown}), hits "
    f"spread evenly over ranks 1 to {cutoff}, and for other models a "
    f"correlation of {_CORRELATION:g} with a user's results and a standard "
    f"deviation over seeds of {100 * _SEED_SPREAD:g} % of the mean, as between "
    "two seeds of one model on Beauty; before correction for several models:",
    *lines,
  ]


def _power_line(
  segment: str,
  count: int,
  num_seeds: int,
  error: float,
  claims: Mapping[str, float],
) -> str:
  effect = statistics.smallest_effect(error, power=claims["power"])
  wanted = f"{100 * claims['power']:.0f} %"
  line = f"  {segment}, {count:,} users, {num_seeds} seeds: "
  if segment == "tail":
    return line + (
      f"a gain of {100 * effect:.1f} % or more is found with a probability of "
      f"at least {wanted}"
    )
  margin = claims["non_inferiority_margin"]
  chance = statistics.power_of(margin, error)
  return line + (
    f"a model that changes nothing is shown to lose no more than the margin of "
    f"{100 * margin:g} % with a probability of {100 * chance:.0f} %; for "
    f"{wanted} the margin would have to be {100 * effect:.1f} %"
  )
