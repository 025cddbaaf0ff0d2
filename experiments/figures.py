"""Figures of results: one matplotlib figure each, and its SVG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np
import polars as pl

from experiments.results import (
  Claim,
  change_of,
  few_seeds,
  groups_of,
  mean_of,
  number_range,
  values_of,
  with_the_same_seeds,
)

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = "#0072b2", "#d55e00", "#009e73", "#a8488a", "#8a6d00"
_BLUE, _ORANGE, _GREY = *COLORS[:2], "#5a5a5a"
_STYLE = {
  "axes.spines.top": False, "axes.spines.right": False,
  "axes.titlelocation": "left", "axes.titlesize": 10, "axes.labelsize": 9,
  "font.size": 9, "legend.frameon": False,
}  # fmt: skip


def svg(figure: matplotlib.figure.Figure) -> bytes:
  """The figure as an SVG file, the same whenever it is drawn."""
  stream = io.BytesIO()
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pin"}):
    figure.savefig(stream, format="svg", metadata={"Date": None})
  return stream.getvalue()


def _figure(width: float, height: float) -> matplotlib.figure.Figure:
  return matplotlib.figure.Figure((width, height), layout="constrained")


def _bars(
  axes: matplotlib.axes.Axes, place: np.ndarray, numbers: np.ndarray,
  *, sideways: bool = False, **options: Any,
) -> None:
  """Draws estimates with their intervals; numbers are [3, N]."""
  estimate, low, high = numbers
  ends = np.nan_to_num([estimate - low, high - estimate]).clip(0)
  points = (estimate, place) if sideways else (place, estimate)
  axes.errorbar(
    *points, **{"xerr" if sideways else "yerr": ends}, capsize=2.5, **options
  )


def forest(
  claims: Mapping[str, Claim], margin: float, title: str, metric: str
) -> matplotlib.figure.Figure:
  """Changes of tail and head users with intervals, a row a claim.

  Args:
    claims: name of the row -> claim.
    margin: of non-inferiority, drawn as a line.
    title: above the plot.
    metric: that changes, in words.
  """
  with matplotlib.rc_context(_STYLE):
    names = [
      "\n".join(filter(None, (*textwrap.wrap(name, 32), few_seeds(x.seeds))))
      for name, x in claims.items()
    ]
    longest = max(len(line) for name in names for line in name.split("\n"))
    figure = _figure(4.3 + 0.07 * longest, 1.4 + 0.42 * len(claims))
    axes = figure.add_subplot()
    axes.axvline(0, color=_GREY, linewidth=0.9)
    axes.axvline(-100 * margin, color=_ORANGE, linewidth=0.9, linestyle="--")
    place = np.arange(len(claims))[::-1]
    for part, shift, color, mark in (
      ("tail", 0.15, _BLUE, "o"), ("head", -0.15, _ORANGE, "s"),
    ):
      numbers = [getattr(claim, part)[:3] for claim in claims.values()]
      _bars(
        axes, place + shift, 100 * np.transpose(numbers), sideways=True,
        color=color, fmt=mark, markersize=5, label=f"{part} users",
      )
    axes.set_yticks(place, names)
    axes.set_ylim(-0.6, len(claims) - 0.4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    axes.set_xlabel(
      f"change of {metric} (%)\ndashed: −{100 * margin:g} %, the margin"
    )
    figure.legend(loc="outside lower center", ncols=2)
  return figure


def groups(
  rows: pl.DataFrame, models: Sequence[str], column: str, metric: str
) -> matplotlib.figure.Figure:
  """Levels of each activeness group, and changes against the first model.

  Args:
    rows: result rows.
    models: the comparator and up to four others.
    column: which rank.
    metric: of the levels.
  """
  rows = rows.filter(pl.col("model").is_in(models))
  levels, changes, labels = {}, {}, []
  for index, (group, keep) in enumerate(groups_of(rows).items()):
    own = rows.filter(keep)
    for model in models:
      values = values_of(
        own.filter(model=model), [model], metric=metric, column=column
      )
      levels[model, index] = np.ravel(mean_of(values))
    for shared, others in with_the_same_seeds(own, models[0]):
      values = values_of(
        shared, [models[0], *others], metric=metric, column=column
      )
      for model, *numbers in zip(others, *change_of(values)[:3], strict=True):
        changes[model, index] = 100 * np.asarray(numbers)
    span = number_range(own["activeness"].min(), own["activeness"].max())
    labels.append(f"group {group}\n{span}\n{own['user'].n_unique():,} users")
  few = few_seeds(rows["seed"].n_unique())
  with matplotlib.rc_context(_STYLE):
    figure = _figure(max(6, 1.5 + 1.1 * len(labels)), 5)
    both = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    for axes, found, label in zip(
      both, (levels, changes), (metric, "change (%)"), strict=True
    ):
      for order, (model, color) in enumerate(zip(models, COLORS, strict=False)):
        points = [(i, *x) for (own, i), x in found.items() if own == model]
        if points:
          place, *numbers = np.transpose(points)
          _bars(
            axes, place + 0.12 * order - 0.06 * (len(models) - 1), numbers,
            color=color, fmt="o", label=model,
          )
      axes.set_ylabel(label)
    both[0].set_ylim(bottom=0)
    both[0].legend()
    both[0].set_title(
      f"{metric} by activeness group, 95 % intervals" + (few and f" ({few})")
    )
    both[1].axhline(0, color=_GREY, linewidth=0.9)
    both[1].set_xticks(range(len(labels)), labels)
    both[1].set_xlabel("group, its training interactions a user, its users")
  return figure
