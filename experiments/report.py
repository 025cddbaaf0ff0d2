"""Tables and plots of a run, computed from its result rows and nothing else.

    python -m experiments.report --workdir=DIR

reads DIR/rows.parquet (one row a model, seed and user) and, where present,
DIR/log.jsonl and DIR/summary.json; prints the tables and writes comparison.csv,
.md and .json, activeness.png, groups_ndcg.png and gradients.png beside them.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np
import polars as pl
import rich.box
import rich.console
import rich.table
import rich.text
import scipy.ndimage
from absl import app, flags
from etils import epath

from pin_jax import metrics, statistics
from pin_jax.types import InputError

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
CUTOFFS = (5, 10, 20)
MASKINGS = {"history masked": "rank", "history not masked": "rank_unmasked"}
SEGMENTS = {0: "tail", 1: "head"}

_CANDIDATES = {"rank": "candidates", "rank_unmasked": "candidates_unmasked"}
_FACTS = [
  "group",
  "segment",
  "activeness",
  "target",
  "candidates",
  "candidates_unmasked",
]
_COLUMNS = ["model", "seed", "user", "rank", "rank_unmasked", *_FACTS]
# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#5A5A5A"
_STYLE = {
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 10.5,
  "axes.labelsize": 9.5,
  "font.size": 9,
  "legend.frameon": False,
}


# Rows.


def _models(rows: pl.DataFrame) -> list[str]:
  missing = [name for name in _COLUMNS if name not in rows.columns]
  if missing:
    raise InputError(
      f"rows lack the columns {missing}; pass the rows that evaluation wrote"
    )
  return rows["model"].unique(maintain_order=True).to_list()


def _model_rows(rows: pl.DataFrame, model: str) -> pl.DataFrame:
  """Rows of one model, ordered by user and seed."""
  present = _models(rows)
  if model not in present:
    raise InputError(f"rows have no model {model!r}; choose one of {present}")
  selected = rows.filter(pl.col("model") == model).sort("user", "seed")
  if selected.select("user", "seed").is_duplicated().any():
    raise InputError(
      f"rows of model {model!r} repeat a user and seed; keep one row of each"
    )
  return selected


def _check_same_users(
  rows: pl.DataFrame, models: Sequence[str], *, on: Sequence[str]
) -> None:
  """Raises unless all models were evaluated on the same users and targets."""
  keys = {m: _model_rows(rows, m).select(on).unique() for m in models}
  first = keys[models[0]]
  for model, key in keys.items():
    only_first = first.join(key, on=on, how="anti").height
    only_model = key.join(first, on=on, how="anti").height
    if only_first or only_model:
      raise InputError(
        f"models {models[0]!r} and {model!r} differ in {' and '.join(on)}: "
        f"{only_first} are only in the first and {only_model} only in the "
        "second; evaluate both on the same users and seeds"
      )
  for fact in _FACTS:
    values = rows.filter(pl.col("model").is_in(models)).group_by("user")
    bad = values.agg(pl.col(fact).n_unique().alias("n")).filter(pl.col("n") > 1)
    if bad.height:
      raise InputError(
        f"user {bad['user'][0]!r} has several values of {fact!r} in the rows;"
        " compare models on one split and one grouping"
      )


def _user_ids(frame: pl.DataFrame) -> np.ndarray:
  return frame["user"].rank("dense").to_numpy()


def _metric_names(cutoffs: Iterable[int]) -> dict[str, tuple[str, float]]:
  """Name of each metric -> (key in METRICS, cutoff)."""
  names = {}
  for key in ("hr", "ndcg"):
    names |= {f"{key.upper()}@{k}": (key, k) for k in cutoffs}
  return names | {"MRR": ("mrr", math.inf)}


def _metric_values(
  ranks: pl.Series, names: Mapping[str, tuple[str, float]]
) -> np.ndarray:
  """Values of every metric, [M, N]."""
  ranks = ranks.to_numpy()
  return np.stack([metrics.METRICS[key](ranks, k) for key, k in names.values()])


def _slices(frame: pl.DataFrame) -> dict[str, np.ndarray]:
  """Masks over the rows: overall, head, tail, then the groups."""
  segment, group = frame["segment"].to_numpy(), frame["group"].to_numpy()
  masks = {"overall": np.ones(frame.height, bool)}
  for index in sorted(set(segment.tolist()), reverse=True):
    masks[SEGMENTS.get(index, f"segment {index}")] = segment == index
  for index in sorted(set(group.tolist())):
    masks[f"group {index}"] = group == index
  return masks


# Tables.


def comparison(
  rows: pl.DataFrame,
  *,
  base: str,
  other: str,
  cutoff: int = 10,
  num_resamples: int = NUM_RESAMPLES,
) -> pl.DataFrame:
  """Compares two models on every slice, masking and metric.

  Args:
    rows: result rows, see evaluation.
    base: name of the model to compare with.
    other: name of the model under test.
    cutoff: K to report besides 5, 10 and 20.
    num_resamples: bootstrap resamples of the users.

  Returns:
    One line a slice, masking and metric: slice, masking, metric, users,
    min_activeness, max_activeness, base, other (means over users, of means over
    seeds), relative_change, low, high (fractions; .1 is +10 %).

  Raises:
    InputError: if a model is absent, or if the models differ in their users,
      seeds or targets.
  """
  _check_same_users(rows, [base, other], on=["user", "seed"])
  before, after = _model_rows(rows, base), _model_rows(rows, other)
  names = _metric_names(sorted({*CUTOFFS, cutoff}))
  lines = []
  for masking, column in MASKINGS.items():
    pair = np.stack([_metric_values(f[column], names) for f in (before, after)])
    for label, mask in _slices(before).items():
      place = {"slice": label, "masking": masking}
      lines += [
        place | line
        for line in _slice_lines(
          before.filter(mask), pair[..., mask], names, num_resamples
        )
      ]
  return pl.DataFrame(lines)


def _slice_lines(
  frame: pl.DataFrame,
  pair: np.ndarray,
  names: Iterable[str],
  num_resamples: int,
) -> list[dict[str, Any]]:
  """Lines of one slice and masking; `pair` holds both models, [2, M, N]."""
  change = statistics.relative_change(
    *pair,
    users=_user_ids(frame),
    confidence=CONFIDENCE,
    num_resamples=num_resamples,
  )
  columns = ("base", "other", "relative_change", "low", "high")
  return [
    {
      "metric": name,
      "users": frame["user"].n_unique(),
      "min_activeness": frame["activeness"].min(),
      "max_activeness": frame["activeness"].max(),
    }
    | dict(zip(columns, map(float, numbers), strict=True))
    for name, *numbers in zip(
      names, *_user_means(pair, frame), *change, strict=True
    )
  ]


def model_table(rows: pl.DataFrame, *, cutoff: int = 10) -> pl.DataFrame:
  """NDCG and HR of every model, overall and of each segment.

  Args:
    rows: result rows of any number of models, all on the same users.
    cutoff: K of both metrics.

  Returns:
    One line a masking and model, in the order of the rows: masking, model,
    seeds, users and 'NDCG@10 overall', 'NDCG@10 tail', ..., 'HR@10 head'. A
    model may have fewer seeds than another.

  Raises:
    InputError: if the models differ in their users or targets.
  """
  models = _models(rows)
  _check_same_users(rows, models, on=["user"])
  names = _metric_names([cutoff])
  lines = []
  for masking, column in MASKINGS.items():
    for model in models:
      frame = _model_rows(rows, model)
      slices, values = _slices(frame), _metric_values(frame[column], names)
      means = {
        label: _user_means(values[:, mask], frame.filter(mask))
        for label, mask in slices.items()
      }
      line = {
        "masking": masking,
        "model": model,
        "seeds": frame["seed"].n_unique(),
        "users": frame["user"].n_unique(),
      }
      for name in (f"NDCG@{cutoff}", f"HR@{cutoff}"):
        index = list(names).index(name)
        for label in ("overall", "tail", "head"):
          mean = means[label][index] if label in means else math.nan
          line[f"{name} {label}"] = float(mean)
      lines.append(line)
  return pl.DataFrame(lines)


def _user_means(values: np.ndarray, frame: pl.DataFrame) -> np.ndarray:
  """Means over users of means over seeds, [..., N] -> [...]."""
  return statistics.average_within_users(values, _user_ids(frame)).mean(-1)


def protocol_line(
  rows: pl.DataFrame,
  *,
  split: str = "split not recorded",
  num_items: int | None = None,
  num_resamples: int = NUM_RESAMPLES,
) -> str:
  """States in one line how the numbers came about.

  Args:
    rows: result rows.
    split: the split's own protocol line.
    num_items: V. None takes the number of candidates without masking to be V.
    num_resamples: as given to `comparison`.

  Returns:
    Split, ranking, ties, masking, seeds and interval method.
  """
  candidates = rows["candidates_unmasked"]
  low, high = candidates.min(), candidates.max()
  seeds = sorted(rows["seed"].unique().to_list())
  counts = f"{low:,}" if low == high else f"{low:,} to {high:,}"
  if low == high and num_items in (None, high):
    ranking = f"full ranking over {counts} items"
  else:
    whole = "" if num_items is None else f" of {num_items:,}"
    ranking = f"ranking over {counts}{whole} items"
  plural = "seed" if len(seeds) == 1 else "seeds"
  return (
    f"{split.rstrip('.')}; {ranking}; ties at their average rank; "
    "'history masked' removes the items of the user's history (except the "
    "target) from the candidates; "
    f"{plural} {', '.join(map(str, seeds))} (a user's results are averaged "
    f"over seeds first); intervals: {100 * CONFIDENCE:.0f} % percentile "
    f"bootstrap, paired over users, {num_resamples:,} resamples, without the "
    "spread over training seeds"
  )


def _value(value: float) -> str:
  return "n/a" if not math.isfinite(value) else f"{value:.4f}"


def _percent(value: float) -> str:
  return "n/a" if not math.isfinite(value) else f"{100 * value:+.1f}"


def _change(line: Mapping[str, Any]) -> str:
  """Relative change with its interval, in percent."""
  change, low, high = (
    _percent(line[key]) for key in ("relative_change", "low", "high")
  )
  return f"{change} [{low}, {high}]"


def _range(low: int, high: int) -> str:
  return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _sections(
  table: pl.DataFrame, masking: str, cutoff: int
) -> dict[str, list[list[str]]]:
  """Cells of one masking's table, by metric."""
  sections = {}
  for metric in (f"NDCG@{cutoff}", f"HR@{cutoff}"):
    chosen = table.filter(
      (pl.col("masking") == masking) & (pl.col("metric") == metric)
    )
    if not chosen.height:
      raise InputError(
        f"the comparison has no {metric}; make it with cutoff={cutoff}"
      )
    sections[metric] = [
      [
        line["slice"],
        _range(line["min_activeness"], line["max_activeness"]),
        f"{line['users']:,}",
        _value(line["base"]),
        _value(line["other"]),
        _change(line),
      ]
      for line in chosen.iter_rows(named=True)
    ]
  return sections


def _model_cells(models: pl.DataFrame, masking: str) -> list[list[str]]:
  chosen = models.filter(pl.col("masking") == masking).drop("masking", "users")
  return [
    [str(model), str(seeds), *map(_value, values)]
    for model, seeds, *values in chosen.iter_rows()
  ]


def _rich_table(title: str) -> rich.table.Table:
  return rich.table.Table(
    title=rich.text.Text(title),
    title_justify="left",
    title_style="bold",
    box=rich.box.SIMPLE_HEAD,
    pad_edge=False,
  )


def print_comparison(
  table: pl.DataFrame,
  *,
  base: str,
  other: str,
  protocol: str,
  cutoff: int = 10,
  console: rich.console.Console | None = None,
) -> None:
  """Prints NDCG and HR of the slices, one table a masking, and the protocol.

  Args:
    table: as `comparison` returns it.
    base: name of the model to compare with.
    other: name of the model under test.
    protocol: footnote, as `protocol_line` returns it.
    cutoff: K of both metrics.
    console: where to print; standard output by default.
  """
  console = console or rich.console.Console(highlight=False)
  for masking in MASKINGS:
    out = _rich_table(f"{other} against {base}, {masking}")
    out.add_column("slice", no_wrap=True)
    for header in ("activeness", "users", base, other, "change % [95 %]"):
      out.add_column(rich.text.Text(header), justify="right")
    for metric, lines in _sections(table, masking, cutoff).items():
      out.add_row(f"[bold]{metric}[/bold]")
      for line in lines:
        out.add_row(*line[:-1], rich.text.Text(line[-1]))
      out.add_section()
    console.print(out)
  console.print(f"Protocol: {protocol}.", markup=False)


def print_models(
  models: pl.DataFrame, *, console: rich.console.Console | None = None
) -> None:
  """Prints all models, one table a masking.

  Args:
    models: as `model_table` returns it.
    console: where to print; standard output by default.
  """
  console = console or rich.console.Console(highlight=False)
  headers = models.drop("masking", "users").columns
  for masking in MASKINGS:
    out = _rich_table(f"All models, {masking}")
    for index, header in enumerate(headers):
      header = header.replace(" ", "\n")
      out.add_column(header, justify="right" if index else "left")
    for line in _model_cells(models, masking):
      out.add_row(*map(rich.text.Text, line))
    console.print(out)


def _markdown_table(
  headers: Sequence[str], lines: Iterable[Sequence[str]], *, left: int
) -> str:
  rules = [":--" if i < left else "--:" for i in range(len(headers))]
  cells = [
    [cell.replace("|", "\\|") for cell in line]
    for line in [headers, rules, *lines]
  ]
  return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _markdown(
  table: pl.DataFrame,
  models: pl.DataFrame,
  *,
  base: str,
  other: str,
  protocol: str,
  cutoff: int,
) -> str:
  parts = [f"# {other} against {base}", f"Protocol: {protocol}."]
  for masking in MASKINGS:
    parts.append(f"## {masking.capitalize()}")
    for metric, lines in _sections(table, masking, cutoff).items():
      headers = [metric, "activeness", "users", base, other, "change % [95 %]"]
      parts.append(_markdown_table(headers, lines, left=1))
  for masking in MASKINGS:
    parts.append(f"## All models, {masking}")
    headers = models.drop("masking", "users").columns
    lines = _model_cells(models, masking)
    parts.append(_markdown_table(headers, lines, left=1))
  return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> Any:
  """JSON has no NaN: null instead."""
  bad = isinstance(value, float) and not math.isfinite(value)
  return None if bad else value


def write_comparison(
  table: pl.DataFrame,
  models: pl.DataFrame,
  workdir: epath.PathLike,
  *,
  base: str,
  other: str,
  protocol: str,
  cutoff: int = 10,
) -> None:
  """Writes comparison.csv, comparison.md and comparison.json.

  Args:
    table: as `comparison` returns it.
    models: as `model_table` returns it.
    workdir: existing directory to write to.
    base: name of the model to compare with.
    other: name of the model under test.
    protocol: as `protocol_line` returns it.
    cutoff: K of the tables in comparison.md; the other files hold all.
  """
  workdir = epath.Path(workdir)
  names = {"base": base, "other": other, "protocol": protocol}
  (workdir / "comparison.csv").write_text(table.write_csv())
  (workdir / "comparison.md").write_text(
    _markdown(table, models, cutoff=cutoff, **names)
  )
  lists = {"comparison": table, "models": models}
  content = names | {
    key: [
      {name: _plain(value) for name, value in line.items()}
      for line in frame.iter_rows(named=True)
    ]
    for key, frame in lists.items()
  }
  (workdir / "comparison.json").write_text(json.dumps(content, indent=2) + "\n")


# Plots.


def _figure(width: float, height: float) -> matplotlib.figure.Figure:
  return matplotlib.figure.Figure((width, height), layout="constrained")


def _save(figure: matplotlib.figure.Figure, path: epath.PathLike) -> None:
  with epath.Path(path).open("wb") as file:
    figure.savefig(file, format="png", dpi=150)


def _group_colors(num_groups: int) -> np.ndarray:
  """Ordered colours, dark for the least active."""
  return matplotlib.colormaps["viridis"](np.linspace(0.05, 0.78, num_groups))


def _spread(positions: Sequence[float], gap: float) -> np.ndarray:
  """Moves positions apart until neighbours are `gap` from each other."""
  positions = np.asarray(positions, np.float64)
  order = np.argsort(positions, kind="stable")
  moved = positions[order]
  for _ in range(200):
    lack = gap - np.diff(moved)
    push = np.where(lack > 0, lack / 2, 0)
    moved[:-1] -= push
    moved[1:] += push
  result = np.empty_like(moved)
  result[order] = moved
  return result


def _label_ends(
  axes: matplotlib.axes.Axes,
  x: float,
  values: Sequence[float],
  labels: Sequence[str],
  colors: Sequence[Any],
  gap: float = 0.055,
) -> None:
  """Writes each line's name at its right end."""
  low, high = axes.get_ylim()
  values = np.nan_to_num(values, nan=low)
  places = _spread(values, gap * (high - low))
  for place, label, color in zip(places, labels, colors, strict=True):
    axes.annotate(
      label,
      (x, place),
      xytext=(5, 0),
      textcoords="offset points",
      color=color,
      va="center",
      annotation_clip=False,
    )


def plot_activeness(
  activeness: np.ndarray,
  groups: np.ndarray,
  segments: np.ndarray,
  path: epath.PathLike,
) -> None:
  """Plots the long tail of activeness beside each group's shares.

  Args:
    activeness: [U] training interactions of each user.
    groups: [U] group of each user.
    segments: [U] segment of each user; 1 is head.
    path: PNG file to write.
  """
  activeness, groups = np.asarray(activeness), np.asarray(groups)
  segments = np.asarray(segments)
  with matplotlib.rc_context(_STYLE):
    figure = _figure(10, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _draw_long_tail(left, activeness, groups, segments)
    _draw_shares(right, activeness, groups)
    _save(figure, path)


def _draw_long_tail(
  axes: matplotlib.axes.Axes,
  activeness: np.ndarray,
  groups: np.ndarray,
  segments: np.ndarray,
) -> None:
  order = np.lexsort((-segments, -groups, -activeness))
  curve, members = activeness[order], groups[order]
  num_users, num_groups = len(curve), int(groups.max()) + 1
  share = 100 * np.arange(num_users + 1) / num_users
  curve = np.append(curve, curve[-1])
  top, bottom = max(curve[0], 2), max(curve[-1], 1)
  floor = bottom * (top / bottom) ** -0.13
  axes.set_yscale("log")
  axes.set_ylim(floor, top * (top / bottom) ** 0.13)
  for group, color in enumerate(_group_colors(num_groups)):
    inside = np.flatnonzero(members == group)
    if not inside.size:
      continue
    span = slice(inside[0], inside[-1] + 2)
    axes.fill_between(
      share[span],
      floor,
      curve[span],
      step="post",
      color=color,
      alpha=0.35,
      linewidth=0,
    )
    axes.text(
      share[span].mean(),
      floor * (top / bottom) ** 0.02,
      f"group {group}",
      ha="center",
      va="bottom",
      fontsize=8.5,
      rotation=90 if inside.size < 0.1 * num_users else 0,
    )
  axes.step(share, curve, where="post", color="black", linewidth=1.4)
  _draw_head_border(axes, activeness, segments)
  axes.set_xlim(0, 100)
  axes.set_xlabel("users, most active first (% of users)")
  axes.set_ylabel("activeness (training interactions, log scale)")
  axes.set_title(f"Activeness of {num_users:,} users")
  axes.yaxis.set_major_formatter("{x:,.0f}")


def _draw_head_border(
  axes: matplotlib.axes.Axes, activeness: np.ndarray, segments: np.ndarray
) -> None:
  head = segments == 1
  border = 100 * head.mean()
  share = 100 * activeness[head].sum() / max(activeness.sum(), 1)
  axes.axvline(border, color=_ORANGE, linestyle="--", linewidth=1.3)
  axes.annotate(
    f"head: {border:.0f} % of users, {share:.0f} % of interactions",
    (border, 0.97),
    xycoords=("data", "axes fraction"),
    xytext=(6, 0),
    textcoords="offset points",
    va="top",
    color=_ORANGE,
  )


def _draw_shares(
  axes: matplotlib.axes.Axes, activeness: np.ndarray, groups: np.ndarray
) -> None:
  num_groups = int(groups.max()) + 1
  users = np.bincount(groups, minlength=num_groups)
  interactions = np.bincount(groups, activeness, num_groups)
  place = np.arange(num_groups)
  series = [
    ("users", users, -0.2, _GREY),
    ("interactions", interactions, 0.2, _BLUE),
  ]
  for name, counts, shift, color in series:
    shares = 100 * counts / max(counts.sum(), 1)
    axes.barh(place + shift, shares, 0.38, color=color)
    for group, share in enumerate(shares):
      named = f"{share:.0f} %" + (f" of {name}" if group == 0 else "")
      axes.annotate(
        named,
        (share, group + shift),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=color,
      )
  labels = []
  for group in place:
    inside = activeness[groups == group]
    span = _range(inside.min(), inside.max()) if inside.size else "empty"
    labels.append(f"group {group}\n{span}")
  axes.set_yticks(place, labels)
  axes.tick_params(axis="y", length=0)
  axes.margins(x=0.16)
  axes.set_xlabel("share (%)")
  axes.set_ylabel("group and its range of activeness")
  axes.set_title("Each group's share of users and interactions")


def plot_groups(
  rows: pl.DataFrame,
  base: str,
  other: str,
  path: epath.PathLike,
  *,
  cutoff: int = 10,
  num_resamples: int = NUM_RESAMPLES,
) -> None:
  """Plots NDCG of each activeness group, history masked, and its change.

  Args:
    rows: result rows.
    base: name of the model to compare with.
    other: name of the model under test.
    path: PNG file to write.
    cutoff: K of NDCG.
    num_resamples: bootstrap resamples of the users.
  """
  table = comparison(
    rows, base=base, other=other, cutoff=cutoff, num_resamples=num_resamples
  ).filter(
    pl.col("slice").str.starts_with("group ")
    & (pl.col("masking") == "history masked")
    & (pl.col("metric") == f"NDCG@{cutoff}")
  )
  with matplotlib.rc_context(_STYLE):
    figure = _figure(max(7.5, 1.5 + 1.1 * table.height), 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    names, colors = (base, other), (_BLUE, _ORANGE)
    intervals = [
      _group_intervals(rows, name, cutoff, num_resamples) for name in names
    ]
    _draw_intervals(top, intervals[0], -0.1, _BLUE, "o")
    _draw_intervals(top, intervals[1], 0.1, _ORANGE, "s")
    top.set_ylim(bottom=0)
    top.set_ylabel(f"NDCG@{cutoff} (history masked)")
    top.set_title(f"NDCG@{cutoff} by activeness group, 95 % intervals")
    last = [estimates[-1] for estimates, _, _ in intervals]
    _label_ends(top, table.height - 0.85, last, names, colors, gap=0.075)
    _draw_changes(bottom, table, base, other)
    _save(figure, path)


def _group_intervals(
  rows: pl.DataFrame, model: str, cutoff: int, num_resamples: int
) -> np.ndarray:
  """Estimate, low and high of each group, [3, G]."""
  frame = _model_rows(rows, model)
  users = _user_ids(frame)
  values = metrics.ndcg(frame["rank"].to_numpy(), cutoff)
  intervals = [
    statistics.mean_interval(
      values[mask],
      users=users[mask],
      confidence=CONFIDENCE,
      num_resamples=num_resamples,
    )
    for label, mask in _slices(frame).items()
    if label.startswith("group ")
  ]
  return np.asarray(intervals).T


def _draw_intervals(
  axes: matplotlib.axes.Axes,
  intervals: np.ndarray,
  shift: float,
  color: str,
  marker: str,
) -> None:
  estimate, low, high = intervals
  axes.errorbar(
    np.arange(len(estimate)) + shift,
    estimate,
    np.nan_to_num([estimate - low, high - estimate]),
    fmt=marker,
    color=color,
    capsize=3,
  )


def _draw_changes(
  axes: matplotlib.axes.Axes, table: pl.DataFrame, base: str, other: str
) -> None:
  numbers = 100 * table.select("relative_change", "low", "high").to_numpy().T
  axes.axhline(0, color=_GREY, linewidth=0.9)
  _draw_intervals(axes, numbers, 0, "black", "D")
  for place, (change, *ends) in enumerate(numbers.T):
    known = np.isfinite(ends).all()
    if math.isfinite(change):
      axes.annotate(
        f"{change:+.1f} %" + ("" if known else "\n(no interval)"),
        (place, change),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
      )
  spans = map(_range, table["min_activeness"], table["max_activeness"])
  labels = [
    f"{label}\n{span}\n{users:,} users"
    for label, span, users in zip(
      table["slice"], spans, table["users"], strict=True
    )
  ]
  axes.set_xticks(range(table.height), labels)
  axes.set_xlim(-0.4, table.height - 0.5)
  axes.set_xlabel(
    "group, its range of activeness (training interactions), its users"
  )
  axes.set_ylabel("change (%)")
  axes.set_title(f"Relative change, {other} against {base}, paired over users")


def _gradient_series(
  log_records: Iterable[Mapping[str, Any]], run: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Steps [T], weights [T, G], norms [T, G] and cosines [T, G, G] of a run.

  Records of one step (of several seeds, or of a resumed run) are averaged.
  """
  keys = ("weights", "norms", "cosines")
  records = [
    r
    for r in log_records
    if r.get("run") == run and all(r.get(k) is not None for k in keys)
  ]
  if not np.isfinite([r["norms"] for r in records]).any():
    raise InputError(
      f"the log has no weights, norms and cosines of run {run!r}; name a run "
      "that recorded group gradients"
    )
  steps, index = np.unique([r["step"] for r in records], return_inverse=True)
  series = []
  for key in keys:
    values = np.asarray([r[key] for r in records], np.float64)
    sums = np.zeros((len(steps), *values.shape[1:]))
    np.add.at(sums, index, values)
    counts = np.bincount(index).reshape(-1, *[1] * (values.ndim - 1))
    series.append(sums / counts)
  return steps, *series


def _cosine_with_mean(norms: np.ndarray, cosines: np.ndarray) -> np.ndarray:
  """Cosine of each group's gradient with the unweighted mean gradient.

  With the Gramian A_ij = |g_i| |g_j| cos_ij and m the mean over groups,
  <g_i, m> = mean_j A_ij and |m|^2 = mean_ij A_ij.
  """
  gramian = norms[..., :, None] * norms[..., None, :] * cosines
  inner = gramian.mean(-1)
  length = np.sqrt(np.maximum(inner.mean(-1, keepdims=True), 0))
  with np.errstate(all="ignore"):
    return inner / (norms * length)


def _smooth(series: np.ndarray) -> np.ndarray:
  """Gaussian smoothing over a fiftieth of the steps, gaps left out."""
  sigma = max(len(series) / 50, 1e-3)
  known = np.isfinite(series)
  options = {"sigma": sigma, "axis": 0, "mode": "nearest"}
  total = scipy.ndimage.gaussian_filter1d(np.where(known, series, 0), **options)
  mass = scipy.ndimage.gaussian_filter1d(known.astype(float), **options)
  with np.errstate(all="ignore"):
    return np.where(mass > 1e-6, total / mass, np.nan)


def plot_gradients(
  log_records: Iterable[Mapping[str, Any]], run: str, path: epath.PathLike
) -> None:
  """Plots group weights and agreement of the group gradients over training.

  Args:
    log_records: objects of log.jsonl.
    run: which run's records to plot, such as 'pin/backbone'.
    path: PNG file to write.

  Raises:
    InputError: if the run recorded no group gradients.
  """
  steps, weights, norms, cosines = _gradient_series(log_records, run)
  with matplotlib.rc_context(_STYLE):
    figure = _figure(12, 3.9)
    first, second, third = figure.subplots(1, 3, width_ratios=[1.15, 1.15, 1])
    first.set_title("Group weights")
    first.set_ylabel("weight in the aggregated gradient")
    _draw_series(first, steps, weights, bottom=0)
    second.set_title("Agreement with the mean gradient")
    second.set_ylabel("cosine of group and mean gradient")
    _draw_series(second, steps, _cosine_with_mean(norms, cosines))
    _draw_cosines(third, cosines)
    figure.suptitle(
      f"{run}: group gradients (faint: logged, bold: smoothed)",
      x=0.01,
      ha="left",
      fontsize=11.5,
    )
    _save(figure, path)


def _draw_series(
  axes: matplotlib.axes.Axes,
  steps: np.ndarray,
  series: np.ndarray,
  *,
  bottom: float | None = None,
) -> None:
  num_groups = series.shape[1]
  colors = _group_colors(num_groups)
  smooth = _smooth(series)
  for group, color in enumerate(colors):
    axes.plot(steps, series[:, group], color=color, alpha=0.18, linewidth=0.7)
    axes.plot(steps, smooth[:, group], color=color, linewidth=1.8)
  if bottom is not None:
    axes.set_ylim(min(bottom, np.nanmin(series)), 1.08 * np.nanmax(series))
  axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
  labels = [f"group {group}" for group in range(num_groups)]
  _label_ends(axes, steps[-1], smooth[-1], labels, colors)
  axes.set_xlabel("training step")


def _draw_cosines(axes: matplotlib.axes.Axes, cosines: np.ndarray) -> None:
  mean = np.nanmean(cosines, axis=0)
  num_groups = len(mean)
  np.fill_diagonal(mean, np.nan)
  limit = max(np.max(np.abs(np.nan_to_num(mean))), 0.05)
  axes.set_facecolor("#EEEEEE")
  axes.imshow(mean, cmap="PuOr", vmin=-limit, vmax=limit)
  for row, column in np.argwhere(np.isfinite(mean)):
    value = mean[row, column]
    axes.text(
      column,
      row,
      f"{value:.2f}".replace("0.", "."),
      ha="center",
      va="center",
      color="white" if abs(value) > 0.6 * limit else "black",
      fontsize=min(9, 75 / num_groups),
    )
  axes.set_xticks(range(num_groups))
  axes.set_yticks(range(num_groups))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_xlabel("group")
  axes.set_ylabel("group")
  axes.set_title("Cosine of two groups' gradients,\nmean over training")


# The command.


def _read_log(path: epath.Path) -> list[dict[str, Any]]:
  records = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    try:
      if line.strip():
        records.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise InputError(
        f"{path} line {number} is not JSON ({error.msg}); remove the line"
      ) from error
  return records


def write_report(
  workdir: epath.PathLike,
  *,
  base: str | None = None,
  other: str | None = None,
  run: str = "pin/backbone",
  cutoff: int = 10,
  num_resamples: int = NUM_RESAMPLES,
  console: rich.console.Console | None = None,
) -> pl.DataFrame:
  """Recomputes, prints and writes every table and plot of a workdir.

  Reads rows.parquet; log.jsonl for the gradients; and from summary.json the
  keys `base`, `other`, `protocol` (the split's line) and `num_items`, each of
  them optional.

  Args:
    workdir: directory of the run, also written to.
    base: model to compare with; None takes the summary's, else 'base'.
    other: model under test; None takes the summary's, else 'pin'.
    run: run in log.jsonl whose group gradients are plotted, if it has any.
    cutoff: K of the tables and plots.
    num_resamples: bootstrap resamples of the users.
    console: where to print; standard output by default.

  Returns:
    The comparison table.

  Raises:
    InputError: if rows.parquet is absent or does not allow the comparison.
  """
  workdir = epath.Path(workdir)
  if not (workdir / "rows.parquet").exists():
    raise InputError(
      f"{workdir} has no rows.parquet; name the workdir of a finished run"
    )
  with (workdir / "rows.parquet").open("rb") as file:
    rows = pl.read_parquet(file)
  summary_path, log_path = workdir / "summary.json", workdir / "log.jsonl"
  summary = {}
  if summary_path.exists():
    summary = json.loads(summary_path.read_text())
  base = base or summary.get("base", "base")
  other = other or summary.get("other", "pin")

  table = comparison(
    rows, base=base, other=other, cutoff=cutoff, num_resamples=num_resamples
  )
  models = model_table(rows, cutoff=cutoff)
  names = {
    "base": base,
    "other": other,
    "protocol": protocol_line(
      rows,
      split=summary.get("protocol", "split not recorded"),
      num_items=summary.get("num_items"),
      num_resamples=num_resamples,
    ),
  }
  print_models(models, console=console)
  print_comparison(table, cutoff=cutoff, console=console, **names)
  write_comparison(table, models, workdir, cutoff=cutoff, **names)

  users = _model_rows(rows, base).unique("user", maintain_order=True)
  columns = [users[c].to_numpy() for c in ("activeness", "group", "segment")]
  plot_activeness(*columns, workdir / "activeness.png")
  plot_groups(
    rows,
    base,
    other,
    workdir / "groups_ndcg.png",
    cutoff=cutoff,
    num_resamples=num_resamples,
  )
  records = _read_log(log_path) if log_path.exists() else []
  if records:
    _plot_gradients_if_logged(records, run, workdir / "gradients.png", console)
  return table


def _plot_gradients_if_logged(
  records: list[dict[str, Any]],
  run: str,
  path: epath.Path,
  console: rich.console.Console | None,
) -> None:
  try:
    plot_gradients(records, run, path)
  except InputError as error:
    console = console or rich.console.Console(highlight=False)
    console.print(f"{path.name} not written: {error}", markup=False)


def _main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  values = flags.FLAGS
  try:
    write_report(
      values.workdir,
      base=values.base,
      other=values.other,
      run=values.run,
      cutoff=values.cutoff,
    )
  except InputError as error:
    raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
  # Defined here: an importing program has flags of its own.
  flags.DEFINE_string("workdir", None, "directory of the run", required=True)
  flags.DEFINE_string("base", None, "model to compare with")
  flags.DEFINE_string("other", None, "model under test")
  flags.DEFINE_string("run", "pin/backbone", "run whose gradients to plot")
  flags.DEFINE_integer("cutoff", 10, "K of the tables and plots")
  app.run(_main)
