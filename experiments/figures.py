"""Figures of results: one matplotlib figure each, and its SVG."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np
import polars as pl
import scipy.ndimage

from experiments.results import (
  METRIC,
  Claim,
  change_of,
  few_seeds,
  mean_of,
  number_range,
  slices_of,
  title_of,
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


def _colors(num_groups: int) -> np.ndarray:
  """Ordered colours, dark for the least active."""
  return matplotlib.colormaps["viridis"](np.linspace(0.05, 0.78, num_groups))


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


def activeness(rows: pl.DataFrame) -> matplotlib.figure.Figure:
  """Activeness over users, most active first, coloured by group.

  Args:
    rows: result rows of any models; their users are counted once.
  """
  users = rows.unique("user").sort(
    "activeness", "group", "segment", "user", descending=True
  )
  active, members, segments = (
    users[c].to_numpy() for c in ("activeness", "group", "segment")
  )
  head, count = segments == 1, len(active)
  owned = 100 * active[head].sum() / max(active.sum(), 1)
  with matplotlib.rc_context(_STYLE):
    figure = _figure(6, 3.6)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for group, color in enumerate(_colors(int(members.max()) + 1)):
      inside = np.flatnonzero(members == group)
      if inside.size:
        starts = inside[np.diff(active[inside], prepend=-1) != 0]
        edges = 100 / count * np.append(starts, inside[-1] + 1)
        axes.stairs(
          active[starts], edges, baseline=0.5, fill=True, color=color,
          alpha=0.5, label=f"group {group}",
        )
    axes.axvline(100 * head.mean(), color=_ORANGE, linestyle="--")
    axes.set_xlim(0, 100)
    axes.set_ylim(0.7 * max(active[-1], 1), 1.5 * max(active[0], 2))
    axes.legend()
    axes.set_xlabel("users, most active first (% of users)")
    axes.set_ylabel("activeness (training interactions)")
    axes.set_title(
      f"Activeness of {count:,} users\nhead (dashed): "
      f"{100 * head.mean():.0f} % of users, {owned:.0f} % of interactions"
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
  return figure


def forest(
  claims: Mapping[str, Claim], margin: float, title: str
) -> matplotlib.figure.Figure:
  """Changes of tail and head users with intervals, a row a claim.

  Args:
    claims: name of the row -> claim.
    margin: of non-inferiority, drawn as a line.
    title: above the plot.
  """
  with matplotlib.rc_context(_STYLE):
    figure = _figure(5.2, 1.4 + 0.42 * len(claims))
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
    axes.set_yticks(place, [
      name + ("\n" + few if (few := few_seeds(claim.seeds)) else "")
      for name, claim in claims.items()
    ])
    axes.set_ylim(-0.6, len(claims) - 0.4)
    axes.set_title(title)
    axes.set_xlabel(
      f"change of {METRIC} (%)\ndashed: −{100 * margin:g} %, the margin"
    )
    figure.legend(loc="outside lower center", ncols=2)
  return figure


def groups(
  rows: pl.DataFrame, models: Sequence[str], column: str
) -> matplotlib.figure.Figure:
  """Levels of each activeness group, and changes against the first model.

  Args:
    rows: result rows.
    models: the comparator and up to four others.
    column: which rank.
  """
  rows = rows.filter(pl.col("model").is_in(models))
  levels, changes, labels = {}, {}, []
  for name, keep in slices_of(rows).items():
    if not name.startswith("group "):
      continue
    own, index = rows.filter(keep), len(labels)
    for model in models:
      values = values_of(own.filter(model=model), [model], column=column)
      levels[model, index] = np.ravel(mean_of(values))
    for shared, others in with_the_same_seeds(own, models[0]):
      values = values_of(shared, [models[0], *others], column=column)
      for model, *numbers in zip(others, *change_of(values)[:3], strict=True):
        changes[model, index] = 100 * np.asarray(numbers)
    span = number_range(own["activeness"].min(), own["activeness"].max())
    labels.append(f"{name}\n{span}\n{own['user'].n_unique():,} users")
  few = few_seeds(rows["seed"].n_unique())
  with matplotlib.rc_context(_STYLE):
    figure = _figure(max(6, 1.5 + 1.1 * len(labels)), 5)
    both = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    for axes, found, label in zip(
      both, (levels, changes), (METRIC, "change (%)"), strict=True
    ):
      for order, (model, color) in enumerate(zip(models, COLORS, strict=False)):
        points = [(i, *x) for (own, i), x in found.items() if own == model]
        if points:
          place, *numbers = np.transpose(points)
          _bars(
            axes, place + 0.12 * order - 0.06 * (len(models) - 1), numbers,
            color=color, fmt="o", label=title_of(model),
          )
      axes.set_ylabel(label)
    both[0].set_ylim(bottom=0)
    both[0].legend()
    both[0].set_title(
      f"{METRIC} by activeness group, 95 % intervals" + (few and f" ({few})")
    )
    both[1].axhline(0, color=_GREY, linewidth=0.9)
    both[1].set_xticks(range(len(labels)), labels)
    both[1].set_xlabel("group, its training interactions a user, its users")
  return figure


def noise_of(
  records: Iterable[Mapping[str, Any]],
) -> tuple[float, float] | None:
  """Mean conflict rate and cosine of groups dealt at random, where logged."""
  found = [
    (r["noise_conflict_rate"], r["noise_cosine"])
    for r in records if r.get("noise_conflict_rate") is not None
  ]
  return tuple(np.mean(found, 0).tolist()) if found else None


def cosine_with_mean(norms: np.ndarray, cosines: np.ndarray) -> np.ndarray:
  """Cosine of each group's gradient with the unweighted mean gradient.

  With the Gramian A_ij = |g_i| |g_j| cos_ij and m the mean over groups,
  <g_i, m> = mean_j A_ij and |m|^2 = mean_ij A_ij.

  Args:
    norms: [..., G].
    cosines: [..., G, G].

  Returns:
    [..., G].
  """
  gramian = norms[..., :, None] * norms[..., None, :] * cosines
  inner = gramian.mean(-1)
  length = np.sqrt(np.maximum(inner.mean(-1, keepdims=True), 0))
  with np.errstate(all="ignore"):
    return inner / (norms * length)


def gradients(
  records: Sequence[Mapping[str, Any]], title: str
) -> matplotlib.figure.Figure:
  """Weights and agreement of a run's group gradients over training.

  Weights of the groups, each group's cosine with the mean gradient, the share
  of pairs in conflict, all pairs' mean cosine.

  Args:
    records: of the run, each with a whole Gramian; those of one step, of
      several seeds, are averaged.
    title: above the figure.
  """
  steps, index = np.unique([r["step"] for r in records], return_inverse=True)
  weights, norms, cosines, conflicts = (
    np.asarray([
      np.mean([records[i][key] for i in np.flatnonzero(index == t)], 0)
      for t in range(len(steps))
    ], np.float64)
    for key in ("weights", "norms", "cosines", "conflict_rate")
  )
  noise = noise_of(records)
  with matplotlib.rc_context(_STYLE):
    figure = _figure(12, 3.6)
    figure.suptitle(f"{title}: group gradients (faint: logged, bold: smoothed)")
    first, second, third, fourth = figure.subplots(1, 4)
    _draw_series(first, steps, weights, "Group weights")
    first.legend()
    _draw_series(
      second, steps, cosine_with_mean(norms, cosines),
      "Cosine with the mean gradient",
    )
    _draw_series(
      third, steps, 100 * conflicts[:, None],
      "Pairs in conflict (cosine < 0, %)",
    )
    third.set_ylim(0, 106)
    if noise:
      third.axhline(100 * noise[0], color=_GREY, linestyle="--")
      third.set_xlabel(f"dashed: noise alone, {100 * noise[0]:.0f} %")
    _draw_cosines(fourth, np.nanmean(cosines, 0), noise)
  return figure


def _draw_series(
  axes: matplotlib.axes.Axes, steps: np.ndarray, series: np.ndarray, title: str
) -> None:
  """A line for each column, faint as logged, bold smoothed over a fiftieth."""
  sigma = max(len(series) / 50, 1e-3)
  smooth = scipy.ndimage.gaussian_filter1d(
    np.nan_to_num(series), sigma, axis=0, mode="nearest"
  )
  for group, color in enumerate(_colors(series.shape[1])):
    axes.plot(steps, series[:, group], color=color, alpha=0.18, linewidth=0.7)
    axes.plot(steps, smooth[:, group], color=color, label=f"group {group}")
  axes.set_title(title)
  axes.set_xlabel("training step")


def _draw_cosines(
  axes: matplotlib.axes.Axes, mean: np.ndarray,
  noise: tuple[float, float] | None,
) -> None:
  """The mean cosine of every pair of groups."""
  np.fill_diagonal(mean, np.nan)
  limit = max(np.max(np.abs(np.nan_to_num(mean))), 0.05)
  axes.set_facecolor("#eeeeee")
  axes.imshow(mean, cmap="PuOr", vmin=-limit, vmax=limit)
  for row, column in np.argwhere(np.isfinite(mean)):
    value = mean[row, column]
    axes.text(
      column, row, f"{value:.2f}".replace("0.", "."), ha="center", va="center",
      color="white" if abs(value) > 0.6 * limit else "black",
      fontsize=min(9, 75 / len(mean)),
    )
  axes.set_xticks(range(len(mean)))
  axes.set_yticks(range(len(mean)))
  axes.set_xlabel("group")
  axes.set_title("Cosine of two groups' gradients" + (
    f"\nnoise alone {noise[1]:.2f}" if noise else ""
  ))
