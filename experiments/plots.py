"""Plots of a run, computed from its result rows and its log."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np
import polars as pl
import scipy.ndimage
from etils import epath

from experiments.tables import (
  CONFIDENCE,
  NUM_RESAMPLES,
  comparison,
  few_seeds,
  maskings,
  model_rows,
  number_range,
  slices,
  user_ids,
)
from pin_jax import disk
from pin_jax.evaluation import metrics, statistics
from pin_jax.types import InputError

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#5A5A5A"
STYLE = {
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 10.5,
  "axes.labelsize": 9.5,
  "font.size": 9,
  "legend.frameon": False,
}


def _figure(width: float, height: float) -> matplotlib.figure.Figure:
  return matplotlib.figure.Figure((width, height), layout="constrained")


def _save(figure: matplotlib.figure.Figure, path: epath.PathLike) -> None:
  with disk.replacing(path) as file:
    figure.savefig(file, format="png", dpi=150)


def group_colors(num_groups: int) -> np.ndarray:
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
  with matplotlib.rc_context(STYLE):
    figure = _figure(10, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    draw_long_tail(left, activeness, groups, segments)
    draw_shares(right, activeness, groups)
    _save(figure, path)


def draw_long_tail(
  axes: matplotlib.axes.Axes,
  activeness: np.ndarray,
  groups: np.ndarray,
  segments: np.ndarray,
) -> None:
  """Draws activeness over users, most active first, coloured by group."""
  order = np.lexsort((-segments, -groups, -activeness))
  curve, members = activeness[order], groups[order]
  num_users, num_groups = len(curve), int(groups.max()) + 1
  share = 100 * np.arange(num_users + 1) / num_users
  curve = np.append(curve, curve[-1])
  top, bottom = max(curve[0], 2), max(curve[-1], 1)
  floor = bottom * (top / bottom) ** -0.13
  axes.set_yscale("log")
  axes.set_ylim(floor, top * (top / bottom) ** 0.13)
  for group, color in enumerate(group_colors(num_groups)):
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


def draw_shares(
  axes: matplotlib.axes.Axes, activeness: np.ndarray, groups: np.ndarray
) -> None:
  """Draws each group's shares of users and interactions."""
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
    span = number_range(inside.min(), inside.max()) if inside.size else "empty"
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
  """Plots NDCG of each activeness group and its change.

  Of the first list of candidates: history masked, or sampled.

  Args:
    rows: result rows.
    base: name of the model to compare with.
    other: name of the model under test.
    path: PNG file to write.
    cutoff: K of NDCG.
    num_resamples: bootstrap resamples of the users.
  """
  masking = next(iter(maskings(rows)))
  table = comparison(
    rows, base=base, other=other, cutoff=cutoff, num_resamples=num_resamples
  ).filter(
    pl.col("slice").str.starts_with("group ")
    & (pl.col("masking") == masking)
    & (pl.col("metric") == f"NDCG@{cutoff}")
  )
  with matplotlib.rc_context(STYLE):
    figure = _figure(max(7.5, 1.5 + 1.1 * table.height), 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    names, colors = (base, other), (_BLUE, _ORANGE)
    intervals = [
      _group_intervals(rows, name, cutoff, num_resamples) for name in names
    ]
    _draw_intervals(top, intervals[0], -0.1, _BLUE, "o")
    _draw_intervals(top, intervals[1], 0.1, _ORANGE, "s")
    top.set_ylim(bottom=0)
    top.set_ylabel(f"NDCG@{cutoff} ({masking})")
    few = few_seeds(rows["seed"].n_unique())
    top.set_title(
      f"NDCG@{cutoff} by activeness group, 95 % intervals"
      + (few and f" ({few})")
    )
    last = [estimates[-1] for estimates, _, _ in intervals]
    _label_ends(top, table.height - 0.85, last, names, colors, gap=0.075)
    _draw_changes(bottom, table, base, other)
    _save(figure, path)


def _group_intervals(
  rows: pl.DataFrame, model: str, cutoff: int, num_resamples: int
) -> np.ndarray:
  """Estimate, low and high of each group, [3, G]."""
  frame = model_rows(rows, model)
  users, seeds = user_ids(frame), frame["seed"].to_numpy()
  values = metrics.ndcg(frame["rank"].to_numpy(), cutoff)
  intervals = [
    statistics.mean_interval(
      values[mask],
      users=users[mask],
      seeds=seeds[mask],
      confidence=CONFIDENCE,
      num_resamples=num_resamples,
    )
    for label, mask in slices(frame).items()
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
  spans = map(number_range, table["min_activeness"], table["max_activeness"])
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


_GRADIENT_KEYS = (
  "weights", "norms", "cosines", "conflict_rate", "effective_groups"
)


def gradient_series(
  log_records: Iterable[Mapping[str, Any]], run: str
) -> tuple[np.ndarray, ...]:
  """Steps [T] and what `_GRADIENT_KEYS` name of a run, [T, ...] each.

  Only steps whose whole Gramian was formed. Records of one step (of several
  seeds, or of a resumed run) are averaged.
  """
  records = [
    r
    for r in log_records
    if r.get("run") == run and r.get("conflict_rate") is not None
  ]
  if not records:
    raise InputError(
      f"the log has no step of run {run!r} with the Gramian of its groups; "
      "name a run with group gradients, trained with pin.diagnose_every > 0"
    )
  steps, index = np.unique([r["step"] for r in records], return_inverse=True)
  series = []
  for key in _GRADIENT_KEYS:
    values = np.asarray([r[key] for r in records], np.float64)
    sums = np.zeros((len(steps), *values.shape[1:]))
    np.add.at(sums, index, values)
    counts = np.bincount(index).reshape(-1, *[1] * (values.ndim - 1))
    series.append(sums / counts)
  return steps, *series


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
  """Plots weights and agreement of the group gradients over training.

  Weights of the groups, how many they effectively are, each group's cosine with
  the mean gradient, the share of pairs in conflict, all pairs' mean cosine.

  Args:
    log_records: objects of log.jsonl.
    run: which run's records to plot, such as 'pin/backbone'.
    path: PNG file to write.

  Raises:
    InputError: if the run recorded no group gradients.
  """
  log_records = list(log_records)
  steps, weights, norms, cosines, conflicts, effective = gradient_series(
    log_records, run
  )
  noise = noise_of(r for r in log_records if r.get("run") == run)
  with matplotlib.rc_context(STYLE):
    figure = _figure(12, 5.6)
    places = figure.subplot_mosaic(
      [["weights", "agreement", "cosines"],
       ["effective", "conflicts", "cosines"]],
      height_ratios=[1.9, 1], width_ratios=[1.15, 1.15, 1],
    )
    first, second = places["weights"], places["agreement"]
    first.set_title("Group weights")
    first.set_ylabel("weight in the aggregated gradient")
    draw_series(first, steps, weights, bottom=0)
    second.set_title("Agreement with the mean gradient")
    second.set_ylabel("cosine of group and mean gradient")
    draw_series(second, steps, cosine_with_mean(norms, cosines))
    draw_cosines(places["cosines"], cosines, noise)
    draw_line(
      places["effective"], steps, effective, "Effective number of groups",
      top=weights.shape[1],
    )
    draw_line(
      places["conflicts"], steps, 100 * conflicts,
      "Pairs of groups in conflict (cosine < 0, %)", top=100,
      noise=noise and 100 * noise[0],
    )
    figure.suptitle(
      f"{run}: group gradients (faint: logged, bold: smoothed)",
      x=0.01,
      ha="left",
      fontsize=11.5,
    )
    _save(figure, path)


def draw_series(
  axes: matplotlib.axes.Axes,
  steps: np.ndarray,
  series: np.ndarray,
  *,
  bottom: float | None = None,
) -> None:
  """Draws a series for each group, faint as logged and bold smoothed."""
  num_groups = series.shape[1]
  colors = group_colors(num_groups)
  smooth = _smooth(series)
  for group, color in enumerate(colors):
    axes.plot(steps, series[:, group], color=color, alpha=0.18, linewidth=0.7)
    axes.plot(steps, smooth[:, group], color=color, linewidth=1.8)
  if bottom is not None:
    axes.set_ylim(min(bottom, np.nanmin(series)), 1.08 * np.nanmax(series))
  axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
  labels = [f"group {group}" for group in range(num_groups)]
  ends = smooth[-1]
  if num_groups > 1 and np.allclose(smooth, smooth[:, :1]):
    labels, ends, colors = ["all groups"], ends[:1], colors[-1:]
  _label_ends(axes, steps[-1], ends, labels, colors)
  axes.set_xlabel("training step")


def draw_line(
  axes: matplotlib.axes.Axes,
  steps: np.ndarray,
  series: np.ndarray,
  title: str,
  *,
  top: float,
  noise: float | None = None,
) -> None:
  """Draws one series, faint as logged and bold smoothed, and noise beside."""
  if noise is not None:
    axes.axhline(noise, color=_GREY, linestyle="--", linewidth=1.3)
    title += f"\ndashed: noise alone, groups dealt at random, {noise:.0f}"
  axes.plot(steps, series, color=_BLUE, alpha=0.18, linewidth=0.7)
  axes.plot(steps, _smooth(series), color=_BLUE, linewidth=1.8)
  axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
  axes.set_ylim(0, 1.06 * top)
  axes.set_title(title)
  axes.set_xlabel("training step")


def draw_cosines(
  axes: matplotlib.axes.Axes,
  cosines: np.ndarray,
  noise: tuple[float, float] | None = None,
) -> None:
  """Draws the mean cosine of every pair of groups; `noise` of `noise_of`."""
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
      color="white" if abs(value) > 0.6 * limit else "#1a1a1a",
      fontsize=min(9, 75 / num_groups),
    )
  axes.set_xticks(range(num_groups))
  axes.set_yticks(range(num_groups))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_xlabel("group")
  axes.set_ylabel("group")
  title = "Cosine of two groups' gradients,\nmean over training"
  if noise is not None:
    title += f"; noise alone {noise[1]:.2f}".replace("0.", ".")
  axes.set_title(title)
