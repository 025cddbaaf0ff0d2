"""Figures of the report's page: SVG text whose colours follow the page.

Every colour becomes a CSS variable, named after the colour itself and defined
by `stylesheet` for a light and a dark page.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.colors
import matplotlib.figure
import numpy as np
import polars as pl

from experiments import plots
from experiments.claims import (
  change_of,
  mean_of,
  values_by_seed,
  with_the_same_seeds,
)
from experiments.tables import few_seeds

# Of the light page -> of the dark one; the first is the comparator's.
_SERIES = {
  "#0072b2": "#56b4e9",
  "#d55e00": "#ff9248",
  "#009e73": "#34d399",
  "#a8488a": "#e79fcb",
  "#8a6d00": "#e6c229",
}
COLORS = tuple(_SERIES)
_INK = {"#000000": "#e8e6e3", "#5a5a5a": "#a5a29c", "#eeeeee": "#2c2c2e"}
_CLASSES, _CLASS_USERS = 10, 40
_RESAMPLES = 1000
_SIZE = 4.5, 3.1  # inches


def stylesheet(group_counts: Iterable[int]) -> tuple[str, str]:
  """Definitions of the figures' colours, for a light and for a dark page."""
  pairs = _SERIES | _INK
  for count in set(group_counts):
    dark = matplotlib.colormaps["viridis"](np.linspace(0.35, 1, count))
    light = map(matplotlib.colors.to_hex, plots.group_colors(count))
    pairs |= dict(zip(light, map(matplotlib.colors.to_hex, dark), strict=True))
  return tuple(
    " ".join(f"--c{c[0][1:]}: {c[which]};" for c in pairs.items())
    for which in (0, 1)
  )


def _svg(figure: matplotlib.figure.Figure, name: str) -> str:
  """The figure as an <svg> element that scales with the page."""
  with matplotlib.rc_context({"svg.hashsalt": name}):
    stream = io.StringIO()
    figure.savefig(
      stream, format="svg", transparent=True,
      metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
  text = stream.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
  text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
  text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", text)
  text = re.sub(
    r"(fill|stroke|stop-color): (#[0-9a-f]{6})", r"\1: var(--c\2, \2)", text
  ).replace("var(--c#", "var(--c")
  return _with_own_ids(text, name).strip()


def _with_own_ids(text: str, name: str) -> str:
  """Drops ids that nothing refers to, and makes the others unique."""
  used = {a or b for a, b in re.findall(r'url\(#(.+?)\)|href="#(.+?)"', text)}

  def replaced(match: re.Match) -> str:
    return f' id="{name}-{match[1]}"' if match[1] in used else ""

  text = re.sub(r'\s+id="([^"]+)"', replaced, text)
  return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)


def _begin(
  title: str, width: float = _SIZE[0], height: float = _SIZE[1]
) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
  figure = matplotlib.figure.Figure((width, height), layout="constrained")
  axes = figure.add_subplot()
  axes.set_title(title)
  return figure, axes


def _style() -> Any:
  return matplotlib.rc_context(
    plots.STYLE
    | {
      "svg.fonttype": "none",
      "axes.titlesize": 10,
      "axes.labelsize": 9,
      "axes.titleweight": "bold",
      "font.size": 9,
      "text.color": "#000000",
      "axes.edgecolor": "#5a5a5a",
      "axes.labelcolor": "#000000",
      "xtick.color": "#5a5a5a",
      "ytick.color": "#5a5a5a",
      "xtick.labelcolor": "#000000",
      "ytick.labelcolor": "#000000",
    }
  )


def long_tail(rows: pl.DataFrame, name: str) -> list[str]:
  """The long tail of activeness, and each group's shares.

  Args:
    rows: result rows of any models; their users are counted once.
    name: unique on the page.

  Returns:
    Two SVG elements.
  """
  users = rows.unique("user").sort("user")
  columns = [users[c].to_numpy() for c in ("activeness", "group", "segment")]
  figures = []
  with _style():
    for draw, arguments in (
      (plots.draw_long_tail, columns), (plots.draw_shares, columns[:2]),
    ):
      figure, axes = _begin("")
      draw(axes, *arguments)
      figures.append(_svg(figure, f"{name}-{draw.__name__}"))
  return figures


def forest(
  lines: Sequence[Mapping[str, Any]], margin: float, name: str, title: str
) -> str:
  """Changes of tail and head users with intervals, a row a model.

  Args:
    lines: each with model, seeds and tail_change, tail_low, tail_high, the
      same of head; see claims.
    margin: of non-inferiority, drawn as a line.
    name: unique on the page.
    title: above the plot.

  Returns:
    An SVG element.
  """
  with _style():
    figure, axes = _begin(title, height=1.3 + 0.42 * len(lines))
    axes.axvline(0, color="#5a5a5a", linewidth=0.9)
    axes.axvline(
      -100 * margin, color=COLORS[1], linewidth=0.9, linestyle=(0, (4, 3))
    )
    place = np.arange(len(lines))[::-1]
    for part, shift, color, mark in (
      ("tail", 0.15, COLORS[0], "o"), ("head", -0.15, COLORS[1], "s"),
    ):
      numbers = np.asarray([
        [line[f"{part}_{key}"] for key in ("change", "low", "high")]
        for line in lines
      ]).T * 100
      _interval_bars(axes, numbers, place + shift, color, mark)
      axes.plot([], [], mark, color=color, label=f"{part} users")
    axes.set_yticks(place, [
      _shortened(line["model"]) + _marked("\n", line["seeds"])
      for line in lines
    ])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel(
      f"change of NDCG@10 (%)\ndashed: −{100 * margin:g} %, the margin"
    )
    figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, name)


def _marked(lead: str, num_seeds: int) -> str:
  """`lead` and that so few seeds prove nothing; '' where they are enough."""
  few = few_seeds(num_seeds)
  return few and lead + few


def _shortened(text: str, length: int = 26) -> str:
  return text if len(text) <= length else text[: length - 1] + "…"


def _interval_bars(
  axes: matplotlib.axes.Axes,
  numbers: np.ndarray,
  place: np.ndarray,
  color: str,
  mark: str,
) -> None:
  estimate, low, high = numbers
  ends = np.nan_to_num([estimate - low, high - estimate])
  axes.errorbar(
    estimate, place, xerr=np.maximum(ends, 0), fmt=mark, color=color,
    capsize=2.5, markersize=5,
  )


def activeness_classes(activeness: np.ndarray) -> list[tuple[int, int]]:
  """At most ten classes of users of similar activeness, least active first.

  Whole values of activeness stay together, and no class but the last falls
  below forty users or a tenth of them.

  Args:
    activeness: [U].

  Returns:
    The smallest and largest activeness of each class.
  """
  values, counts = np.unique(activeness, return_counts=True)
  size = max(_CLASS_USERS, -(-len(activeness) // _CLASSES))
  starts, inside = [0], 0
  for index, left in enumerate(np.cumsum(counts[::-1])[::-1]):
    if inside >= size and left >= size // 2:
      starts.append(index)
      inside = 0
    inside += counts[index]
  ends = [*starts[1:], len(values)]
  return [
    (int(values[start]), int(values[end - 1]))
    for start, end in zip(starts, ends, strict=True)
  ]


def curves(
  rows: pl.DataFrame,
  models: Sequence[str],
  name: str,
  *,
  column: str = "rank",
  cutoff: int = 10,
) -> list[str]:
  """NDCG over activeness with bands; the first model is compared with.

  Args:
    rows: result rows.
    models: the comparator and up to four others.
    name: unique on the page.
    column: which rank.
    cutoff: K.

  Returns:
    Two SVG elements, the second on the change against the first model; one
    element where there is one model.
  """
  levels, changes = _curve_numbers(rows, models, column=column, cutoff=cutoff)
  few = _marked("\n", rows["seed"].n_unique())
  with _style():
    figure, axes = _begin(f"NDCG@{cutoff} by activeness{few}")
    _draw_bands(axes, levels, models, COLORS)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"NDCG@{cutoff}, 95 % bands")
    _finish_curves(figure, axes)
    figures = [_svg(figure, f"{name}-levels")]
    if changes:
      figure, axes = _begin(f"Change against {models[0]}{few}")
      axes.axhline(0, color="#5a5a5a", linewidth=0.9)
      shown = {m: 100 * np.asarray(v) for m, v in changes.items()}
      for numbers in shown.values():
        numbers[0] /= 100  # activeness is no percentage
      _draw_bands(axes, shown, models[1:], COLORS[1:])
      axes.set_ylabel("change (%), 95 % bands")
      _finish_curves(figure, axes)
      figures.append(_svg(figure, f"{name}-changes"))
  return figures


def _finish_curves(
  figure: matplotlib.figure.Figure, axes: matplotlib.axes.Axes
) -> None:
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter("{x:,.0f}")
  axes.xaxis.set_minor_formatter("")
  axes.set_xlabel("activeness (training interactions, log scale)")
  figure.legend(loc="outside lower center", ncols=3, fontsize=9)


def _curve_numbers(
  rows: pl.DataFrame, models: Sequence[str], **options: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Model -> mean activeness, estimate, low and high of each class, [4, N]."""
  rows = rows.filter(pl.col("model").is_in(models))
  levels, changes = ({model: [] for model in models} for _ in range(2))
  for low, high in activeness_classes(rows.unique("user")["activeness"]):
    own = rows.filter(pl.col("activeness").is_between(low, high))
    x = float(own.unique("user")["activeness"].mean())
    for model in models:
      cubes = values_by_seed(
        own.filter(pl.col("model") == model), [model], **options
      )
      levels[model].append([x, *np.ravel(mean_of(cubes, _RESAMPLES))])
    for shared, others in with_the_same_seeds(own, models[0]):
      first, *rest = values_by_seed(shared, [models[0], *others], **options)
      found = change_of(first, rest, num_resamples=_RESAMPLES)[:3]
      for model, *numbers in zip(others, *found, strict=True):
        changes[model].append([x, *numbers])
  return tuple(
    {model: np.transpose(points) for model, points in numbers.items() if points}
    for numbers in (levels, changes)
  )


def _draw_bands(
  axes: matplotlib.axes.Axes,
  numbers: Mapping[str, np.ndarray],
  models: Sequence[str],
  colors: Sequence[str],
) -> None:
  for model, color in zip(models, colors, strict=False):
    if model not in numbers:
      continue
    x, estimate, low, high = numbers[model]
    axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(
      x, estimate, color=color, marker="o", markersize=3.5, linewidth=1.8,
      label=_shortened(model),
    )


def windows(
  series: Mapping[str, np.ndarray],
  colors: Mapping[str, str],
  name: str,
  *,
  title: str,
  label: str,
) -> str:
  """A quantity over the length of the model's window, a line a model.

  Args:
    series: model -> [4, N]: length, estimate, low, high.
    colors: of the models to show.
    name: unique on the page.
    title: above the plot.
    label: of the vertical axis.

  Returns:
    An SVG element.
  """
  with _style():
    figure, axes = _begin(title)
    axes.axhline(0, color="#5a5a5a", linewidth=0.9)
    shown = [model for model in colors if model in series]
    for index, model in enumerate(shown):
      x, estimate, low, high = series[model]
      axes.errorbar(
        x * 1.03 ** (index - (len(shown) - 1) / 2), estimate,
        np.nan_to_num([estimate - low, high - estimate]).clip(0),
        color=colors[model], marker="o", markersize=4, capsize=2.5,
        linewidth=1.5, label=_shortened(model),
      )
    ticks = np.unique(np.concatenate([x for x, *_ in series.values()]))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel("window length (behaviours that the model reads)")
    axes.set_ylabel(label)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return _svg(figure, name)


def gradients(
  records: Sequence[Mapping[str, Any]], run: str, name: str
) -> list[str]:
  """Weights, agreement, conflicts and cosines of a run's group gradients.

  Args:
    records: of that run, each with a whole Gramian.
    run: its name.
    name: unique on the page.

  Returns:
    Four SVG elements.
  """
  steps, weights, norms, cosines, conflicts, _ = plots.gradient_series(
    records, run
  )
  noise, figures = plots.noise_of(records), []
  with _style():
    for key, title in (
      ("weights", "Group weights"),
      ("agreement", "Cosine with the mean gradient"),
      ("conflicts", "Pairs of groups in conflict (%)"),
      ("cosines", ""),
    ):
      figure, axes = _begin(title)
      if key == "weights":
        plots.draw_series(axes, steps, weights, bottom=0)
      elif key == "agreement":
        plots.draw_series(axes, steps, plots.cosine_with_mean(norms, cosines))
      elif key == "conflicts":
        plots.draw_line(
          axes, steps, 100 * conflicts, title, top=100,
          noise=noise and 100 * noise[0],
        )
      else:
        plots.draw_cosines(axes, cosines, noise)
      figures.append(_svg(figure, f"{name}-{key}"))
  return figures
