"""The claim under test, from result rows: tail users better, head no worse.

For every model against the comparator: superiority on tail users, and
non-inferiority on head users by a margin declared before training. Each of the
two families of tests is corrected over the models by Holm's method; the claim
holds for a model where both of its hypotheses fall. Every test is one-sided at
half the level, so the chance of any false claim stays below the level.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from experiments.tables import (
  CONFIDENCE,
  NUM_RESAMPLES,
  check_same_users,
  model_rows,
  user_ids,
)
from pin_jax import metrics, statistics

LEVEL = 1 - CONFIDENCE
OUTCOMES = "holds", "gain only", "no loss only", "refuted", "open"
HOLDS, GAIN_ONLY, NO_LOSS_ONLY, REFUTED, OPEN = OUTCOMES
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
) -> pl.DataFrame:
  """Tests the claim for every model against the comparator.

  Args:
    rows: result rows of any number of models.
    base: the comparator.
    margin: relative loss of head users that still counts as no worse.
    column: which rank.
    cutoff: K of NDCG.
    num_resamples: bootstrap resamples of users and seeds.

  Returns:
    One line a model: model, seeds, for `part` of overall, tail and head
    `part`_base, `part`_other, `part`_change, `part`_low, `part`_high,
    `part`_p, `part`_adjusted (Holm's, over the models; overall and tail of H0:
    change <= 0, head of H0: change <= -margin), tail_of_seeds and
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
  for part in ("overall", "tail", "head"):
    adjusted = statistics.holm([line[f"{part}_p"] for line in lines])
    for line, value in zip(lines, adjusted, strict=True):
      line[f"{part}_adjusted"] = float(value)
  for line in lines:
    line["outcome"] = _outcome(line, margin)
    line["verdict"] = _in_words(line, base, margin)
  return pl.DataFrame(lines)


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
  keys = [f"{part}_{key}" for key in ("change", "low", "high", "p")]
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


def _outcome(line: Mapping[str, Any], margin: float) -> str:
  better, no_worse = (
    line[f"{part}_adjusted"] < LEVEL for part in ("tail", "head")
  )
  if line["tail_high"] < 0 or line["head_high"] < -margin:
    return REFUTED
  if better and no_worse:
    return HOLDS
  if better or no_worse:
    return GAIN_ONLY if better else NO_LOSS_ONLY
  return OPEN


def percent(value: float, digits: int = 1) -> str:
  """A signed percentage; 'n/a' where it is not a number."""
  if not math.isfinite(value):
    return "n/a"
  text = f"{100 * value:+.{digits}f}"
  return text.replace("-", "−")


def p_text(value: float) -> str:
  """A p-value in three digits."""
  if not math.isfinite(value):
    return "n/a"
  return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def interval_text(line: Mapping[str, Any], part: str) -> str:
  """'+1.0 [-2.0, +3.0]', in percent."""
  change, low, high = (
    percent(line[f"{part}_{key}"]) for key in ("change", "low", "high")
  )
  return f"{change} [{low}, {high}]"


def _in_words(line: Mapping[str, Any], base: str, margin: float) -> str:
  """One or two sentences that say what was shown and what was not."""
  allowed = f"{100 * margin:g} %"
  tail, head = (line[f"{part}_adjusted"] < LEVEL for part in ("tail", "head"))
  if tail:
    first = "tail users are served better"
  elif line["tail_high"] < 0:
    first = "tail users are served worse"
  else:
    first = "for tail users no gain is shown"
  if head:
    second = f"head users are shown to lose no more than {allowed}"
  elif line["head_high"] < -margin:
    second = f"head users lose more than the {allowed} allowed"
  elif line["head_high"] < 0:
    second = f"head users lose, be it more or less than {allowed}"
  else:
    second = f"for head users a loss above {allowed} is not ruled out"
  numbers = [
    f"{interval_text(line, part)} %, p {p_text(line[f'{part}_adjusted'])}"
    for part in ("tail", "head")
  ]
  opening = {HOLDS: "The claim holds", REFUTED: "The claim is refuted"}.get(
    line["outcome"], "The claim is not shown"
  )
  return (
    f"{opening}: against {base}, {first} ({numbers[0]}), and {second} "
    f"({numbers[1]})."
  )


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
  num_seeds: int,
  cutoff: int = 10,
) -> list[str]:
  """Says before training what the design can show.

  Hits are taken to be spread evenly over the ranks 1..K, which gives a user's
  NDCG with mean m the variance m sum_r g_r^2 / sum_r g_r - m^2, g the gains.

  Args:
    claims: the config section of that name.
    users: number of test users of each segment, 'tail' and 'head'.
    num_seeds: seeds of every model.
    cutoff: K.

  Returns:
    One line on the assumptions, and one for each segment.
  """
  mean = claims["assumed_ndcg"]
  gains = metrics.ndcg(np.arange(1, cutoff + 1), cutoff)
  spread = math.sqrt((gains**2).sum() / gains.sum() / mean - 1)
  lines = [
    f"power, assuming NDCG@{cutoff} of {mean:g}, hits spread evenly over ranks "
    f"1 to {cutoff}, correlation {claims['assumed_correlation']:g} between two "
    "models' results of a user and a standard deviation over seeds of "
    f"{100 * claims['assumed_seed_spread']:g} % of the mean "
    "(--config.claims), before correction for several models:"
  ]
  for segment, count in users.items():
    if not count:
      continue
    error = statistics.relative_error(
      num_users=count, num_seeds=num_seeds, spread=spread,
      correlation=claims["assumed_correlation"],
      seed_spread=claims["assumed_seed_spread"],
    )
    lines.append(_power_line(segment, count, num_seeds, error, claims))
  return lines


def _power_line(
  segment: str,
  count: int,
  num_seeds: int,
  error: float,
  claims: Mapping[str, float],
) -> str:
  effect = statistics.smallest_effect(error, power=claims["power"])
  wanted = f"{100 * claims['power']:.0f} %"
  seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
  line = f"  {segment}, {count:,} users, {seeds}: "
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
