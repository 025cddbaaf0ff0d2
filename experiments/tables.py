"""Tables computed from result rows and nothing else."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import rich.box
import rich.console
import rich.table
import rich.text
from etils import epath

from pin_jax import disk
from pin_jax.evaluation import metrics, statistics
from pin_jax.types import InputError

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
MIN_SEEDS = 3  # fewer err too often for a verdict, see claims
CUTOFFS = (5, 10, 20)
MASKINGS = {"history masked": "rank", "history not masked": "rank_unmasked"}
SEGMENTS = {0: "tail", 1: "head"}
# evaluation.protocol -> suffix of its rows and comparison files. Results of
# one are never beside those of the other.
SUFFIXES = {"full": "", "sampled": "_sampled"}

_SAMPLED = {"sampled candidates": "rank"}  # in place of MASKINGS
_FACTS = ["group", "segment", "activeness", "target", "candidates"]
_COLUMNS = ["model", "seed", "user", "rank", *_FACTS]
_FULL_COLUMNS = ["rank_unmasked", "candidates_unmasked"]
_SAMPLED_COLUMNS = ["score", "negative_scores"]


def is_sampled(rows: pl.DataFrame) -> bool:
  """Whether the targets were ranked among sampled candidates."""
  return "negative_scores" in rows.columns


def maskings(rows: pl.DataFrame) -> dict[str, str]:
  """Title of each list of candidates -> column of the rank in it."""
  return _SAMPLED if is_sampled(rows) else MASKINGS


def _facts(rows: pl.DataFrame) -> list[str]:
  return _FACTS if is_sampled(rows) else [*_FACTS, "candidates_unmasked"]


def _models(rows: pl.DataFrame) -> list[str]:
  own = _SAMPLED_COLUMNS if is_sampled(rows) else _FULL_COLUMNS
  missing = [name for name in _COLUMNS + own if name not in rows.columns]
  if missing:
    raise InputError(
      f"rows lack the columns {missing}; pass the rows that evaluation wrote"
    )
  return rows["model"].unique(maintain_order=True).to_list()


def model_rows(rows: pl.DataFrame, model: str) -> pl.DataFrame:
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


def check_same_users(
  rows: pl.DataFrame, models: Sequence[str], *, on: Sequence[str]
) -> None:
  """Raises unless all models were evaluated on the same users and targets."""
  keys = {m: model_rows(rows, m).select(on).unique() for m in models}
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
  for fact in _facts(rows):
    values = rows.filter(pl.col("model").is_in(models)).group_by("user")
    bad = values.agg(pl.col(fact).n_unique().alias("n")).filter(pl.col("n") > 1)
    if bad.height:
      raise InputError(
        f"user {bad['user'][0]!r} has several values of {fact!r} in the rows;"
        " compare models on one split and one grouping"
      )


def user_ids(frame: pl.DataFrame) -> np.ndarray:
  """A number for the user of each row, the same over models and seeds."""
  return frame["user"].rank("dense").to_numpy()


Names = Mapping[str, tuple[str, float]]


def _metric_names(rows: pl.DataFrame, cutoffs: Iterable[int]) -> Names:
  """Name of each metric -> (key in METRICS or _IMPRESSION_METRICS, cutoff)."""
  names = {}
  for key in ("hr", "ndcg"):
    names |= {f"{key.upper()}@{k}": (key, k) for k in cutoffs}
  names |= {"MRR": ("mrr", math.inf)}
  if is_sampled(rows):
    names |= {key: (key, math.inf) for key in _IMPRESSION_METRICS}
  return names


def _metric_values(
  frame: pl.DataFrame, column: str, names: Names
) -> np.ndarray:
  """Values of every metric over the rows of one slice, [M, N]."""
  ranks = frame[column].to_numpy()
  return np.stack([
    metrics.METRICS[key](ranks, k) if key in metrics.METRICS
    else _IMPRESSION_METRICS[key](frame)
    for key, k in names.values()
  ])


def _scores(frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
  """Logits of the targets [N] and of their negatives [N, C]."""
  negatives = frame["negative_scores"].explode().to_numpy()
  return frame["score"].to_numpy(), negatives.reshape(frame.height, -1)


def _pooled_auc(frame: pl.DataFrame) -> np.ndarray:
  """Components of the AUC of the slice's impressions, pooled within a seed."""
  positive, negatives = _scores(frame)
  seeds, values = frame["seed"].to_numpy(), np.zeros(frame.height)
  for seed in np.unique(seeds):
    own = seeds == seed
    values[own] = metrics.auc_components(positive[own], negatives[own])
  return values


_IMPRESSION_METRICS = {
  "AUC": _pooled_auc,
  "GAUC": lambda frame: metrics.user_auc(
    frame["rank"].to_numpy(), frame["candidates"].to_numpy()
  ),
  "log loss": lambda frame: metrics.log_loss(*_scores(frame)),
}


def slices(frame: pl.DataFrame) -> dict[str, np.ndarray]:
  """Masks over the rows: overall, head, tail, then the groups."""
  segment, group = frame["segment"].to_numpy(), frame["group"].to_numpy()
  masks = {"overall": np.ones(frame.height, bool)}
  for index in sorted(set(segment.tolist()), reverse=True):
    masks[SEGMENTS.get(index, f"segment {index}")] = segment == index
  for index in sorted(set(group.tolist())):
    masks[f"group {index}"] = group == index
  return masks


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
    num_resamples: bootstrap resamples of users and seeds.

  Returns:
    One line a slice, masking and metric: slice, masking, metric, users,
    min_activeness, max_activeness, base, other (means over users, of means over
    seeds), relative_change, low, high (fractions; .1 is +10 %), p_value (that
    the change is not positive; NaN below three seeds).

  Raises:
    InputError: if a model is absent, or if the models differ in their users,
      seeds or targets.
  """
  check_same_users(rows, [base, other], on=["user", "seed"])
  before, after = model_rows(rows, base), model_rows(rows, other)
  names = _metric_names(rows, sorted({*CUTOFFS, cutoff}))
  lines = []
  for masking, column in maskings(rows).items():
    for label, mask in slices(before).items():
      pair = before.filter(mask), after.filter(mask)
      values = np.stack([_metric_values(f, column, names) for f in pair])
      place = {"slice": label, "masking": masking}
      lines += [
        place | line
        for line in _slice_lines(pair[0], values, names, num_resamples)
      ]
  return pl.DataFrame(lines)


def _slice_lines(
  frame: pl.DataFrame,
  pair: np.ndarray,
  names: Names,
  num_resamples: int,
) -> list[dict[str, Any]]:
  """Lines of one slice and masking; `pair` holds both models, [2, M, N]."""
  change = statistics.relative_change(
    *pair,
    users=user_ids(frame),
    seeds=frame["seed"].to_numpy(),
    confidence=CONFIDENCE,
    num_resamples=num_resamples,
  )
  columns = ("base", "other", "relative_change", "low", "high", "p_value")
  tested = frame["seed"].n_unique() >= MIN_SEEDS
  change = (*change[:3], np.where(tested, change.p_value, np.nan))
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
  """NDCG and HR (sampled: AUC) of every model, overall and by segment.

  Args:
    rows: result rows of any number of models, all on the same users.
    cutoff: K of both metrics.

  Returns:
    One line a masking and model, in the order of the rows: masking, model,
    seeds, users and 'NDCG@10 overall', its 'std over seeds' (NaN for one),
    'NDCG@10 tail', ..., 'HR@10 head'. A model may have fewer seeds than
    another.

  Raises:
    InputError: if the models differ in their users or targets.
  """
  models = _models(rows)
  check_same_users(rows, models, on=["user"])
  names = _metric_names(rows, [cutoff])
  shown = [f"NDCG@{cutoff}", "AUC" if is_sampled(rows) else f"HR@{cutoff}"]
  lines = []
  for masking, column in maskings(rows).items():
    for model in models:
      frame = model_rows(rows, model)
      parts = {label: frame.filter(m) for label, m in slices(frame).items()}
      means = {
        label: _user_means(_metric_values(part, column, names), part)
        for label, part in parts.items()
      }
      line = {
        "masking": masking,
        "model": model,
        "seeds": frame["seed"].n_unique(),
        "users": frame["user"].n_unique(),
      }
      for name in shown:
        index = list(names).index(name)
        for label in ("overall", "tail", "head"):
          mean = means[label][index] if label in means else math.nan
          line[f"{name} {label}"] = float(mean)
          if label == "overall" and name == shown[0]:
            values = _metric_values(frame, column, names)[index]
            line["std over seeds"] = _std_over_seeds(values, frame)
      lines.append(line)
  return pl.DataFrame(lines)


def _std_over_seeds(values: np.ndarray, frame: pl.DataFrame) -> float:
  """Standard deviation of the seeds' means; NaN for one seed."""
  means = frame.select("seed", value=values).group_by("seed").mean()["value"]
  return math.nan if len(means) < 2 else float(means.std())


def _user_means(values: np.ndarray, frame: pl.DataFrame) -> np.ndarray:
  """Means over users of means over seeds, [..., N] -> [...]."""
  return statistics.by_seed(values, user_ids(frame)).mean((-2, -1))


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
  seeds = sorted(rows["seed"].unique().to_list())
  plural, spread = "seeds", "users crossed with seeds"
  if len(seeds) == 1:
    plural, spread = "seed", "users, without the spread over training seeds"
  warning = few_seeds(len(seeds))
  ranking = (
    _sampled_ranking(rows) if is_sampled(rows)
    else _full_ranking(rows, num_items)
  )
  return (
    f"{split.rstrip('.')}; {ranking}; "
    f"{plural} {', '.join(map(str, seeds))}; intervals: "
    f"{100 * CONFIDENCE:.0f} % percentile bootstrap, {num_resamples:,} "
    f"resamples, paired, over {spread}{warning and '; ' + warning}"
  )


def few_seeds(count: int) -> str:
  """'one seed: nothing proven', '' from MIN_SEEDS on."""
  if count >= MIN_SEEDS:
    return ""
  return f"{'one seed' if count == 1 else 'two seeds'}: nothing proven"


def _full_ranking(rows: pl.DataFrame, num_items: int | None) -> str:
  candidates = rows["candidates_unmasked"]
  low, high = candidates.min(), candidates.max()
  counts = f"{low:,}" if low == high else f"{low:,} to {high:,}"
  if low == high and num_items in (None, high):
    ranking = f"full ranking over {counts} items"
  else:
    whole = "" if num_items is None else f" of {num_items:,}"
    ranking = f"ranking over {counts}{whole} items"
  return (
    f"{ranking}; ties at their average rank; "
    "'history masked' removes the items of the user's history (except the "
    "target) from the candidates"
  )


def _sampled_ranking(rows: pl.DataFrame) -> str:
  count = rows["candidates"][0] - 1
  return (
    "SAMPLED PROTOCOL, not comparable with full ranking: the target against "
    f"{count:,} items drawn uniformly from those that the user never interacts "
    "with, held-out ones included, the same for every model; ties at their "
    "average rank; AUC of all impressions of a slice, GAUC the mean of its "
    "users' AUC, log loss of sigmoid(logit), not recalibrated to this share "
    "of positives, lower is better; the best step was chosen by the same "
    "protocol on the validation targets"
  )


def _value(value: float) -> str:
  return "n/a" if not math.isfinite(value) else f"{value:.4f}"


def percent(value: float) -> str:
  """A signed percentage; 'n/a' where it is not a number."""
  if not math.isfinite(value):
    return "n/a"
  return f"{100 * value:+.1f}".replace("-", "−")


def change_text(change: float, low: float, high: float) -> str:
  """Relative change and its interval in percent: '+1.0 [-2.0, +3.0]'."""
  return f"{percent(change)} [{percent(low)}, {percent(high)}]"


def _change(line: Mapping[str, Any]) -> str:
  return change_text(line["relative_change"], line["low"], line["high"])


def number_range(low: int, high: int) -> str:
  """Writes a range of whole numbers, as one number where they are equal."""
  return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _sections(
  table: pl.DataFrame, masking: str, cutoff: int
) -> dict[str, list[list[str]]]:
  """Cells of one masking's table, by metric."""
  present = set(table["metric"])
  own = [name for name in _IMPRESSION_METRICS if name in present]
  sections = {}
  for metric in (f"NDCG@{cutoff}", f"HR@{cutoff}", *own):
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
        number_range(line["min_activeness"], line["max_activeness"]),
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


def _lists(table: pl.DataFrame) -> list[str]:
  """The lists of candidates that a table speaks of."""
  return table["masking"].unique(maintain_order=True).to_list()


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
  """Prints the slices' metrics, one table a masking, and the protocol.

  Args:
    table: as `comparison` returns it.
    base: name of the model to compare with.
    other: name of the model under test.
    protocol: footnote, as `protocol_line` returns it.
    cutoff: K of both metrics.
    console: where to print; standard output by default.
  """
  console = console or rich.console.Console(highlight=False)
  for masking in _lists(table):
    out = _rich_table(f"{other} against {base}, {masking}")
    out.add_column("slice", no_wrap=True)
    for header in ("activeness", "users", base, other, "change % [95 %]"):
      out.add_column(rich.text.Text(header), justify="right")
    for metric, lines in _sections(table, masking, cutoff).items():
      out.add_row(rich.text.Text(metric, "bold"))
      for line in lines:
        out.add_row(*map(rich.text.Text, line))
      out.add_section()
    console.print(out)
  console.print(f"Protocol: {protocol}.", markup=False)


def print_models(
  models: pl.DataFrame, *, console: rich.console.Console | None = None
) -> None:
  """Prints all models, one table a masking, 80 columns wide.

  Args:
    models: as `model_table` returns it.
    console: where to print; standard output by default.
  """
  console = console or rich.console.Console(highlight=False)
  models = models.drop("std over seeds")  # in the files, where there is room
  headers = models.drop("masking", "users").columns
  for masking in _lists(models):
    out = _rich_table(f"All models, {masking}")
    for index, header in enumerate(headers):
      header = rich.text.Text(header.replace(" ", "\n"))
      out.add_column(header, justify="right" if index else "left")
    for line in _model_cells(models, masking):
      out.add_row(*map(rich.text.Text, line))
    console.print(out)


_MARKDOWN = str.maketrans({
  **{character: f"\\{character}" for character in "\\`*_|~"},
  "<": "&lt;", ">": "&gt;", "&": "&amp;",
})  # fmt: skip


def markdown_text(text: str) -> str:
  """Text in a line, with what Markdown reads as its own, or HTML, escaped."""
  text = " ".join(text.splitlines()).translate(_MARKDOWN)
  return text.replace("](", "]\\(").replace("][", "]\\[")


def markdown_table(
  headers: Sequence[str], lines: Iterable[Sequence[str]], *, left: int
) -> str:
  """A Markdown table whose first `left` columns are words."""
  rules = [":--" if i < left else "--:" for i in range(len(headers))]
  cells = [[markdown_text(cell) for cell in x] for x in [headers, *lines]]
  cells.insert(1, rules)
  return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _markdown(
  table: pl.DataFrame | None,
  models: pl.DataFrame,
  *,
  base: str,
  other: str,
  protocol: str,
  cutoff: int,
  verdicts: Mapping[str, str],
) -> str:
  title = base if table is None else f"{other} against {base}"
  text = markdown_text
  parts = [f"# {text(title)}", f"Protocol: {text(protocol)}."]
  if verdicts:
    said = [f"- {text(m)}: {text(v)}" for m, v in verdicts.items()]
    parts.append("\n".join(said))
  for masking in [] if table is None else _lists(table):
    parts.append(f"## {masking.capitalize()}")
    for metric, lines in _sections(table, masking, cutoff).items():
      headers = [metric, "activeness", "users", base, other, "change % [95 %]"]
      parts.append(markdown_table(headers, lines, left=1))
  for masking in _lists(models):
    parts.append(f"## All models, {masking}")
    headers = models.drop("masking", "users").columns
    lines = _model_cells(models, masking)
    parts.append(markdown_table(headers, lines, left=1))
  return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> Any:
  """JSON has no NaN: null instead."""
  bad = isinstance(value, float) and not math.isfinite(value)
  return None if bad else value


def write_comparison(
  table: pl.DataFrame | None,
  models: pl.DataFrame,
  workdir: epath.PathLike,
  *,
  base: str,
  other: str,
  protocol: str,
  cutoff: int = 10,
  suffix: str = "",
  verdicts: Mapping[str, str] | None = None,
) -> None:
  """Writes comparison.csv, comparison.md and comparison.json, or none.

  Args:
    table: as `comparison` returns it; None where there is one model, of which
      comparison.csv then tells.
    models: as `model_table` returns it.
    workdir: existing directory to write to.
    base: name of the model to compare with.
    other: name of the model under test.
    protocol: as `protocol_line` returns it.
    cutoff: K of the tables in comparison.md; the other files hold all.
    suffix: after 'comparison', a value of SUFFIXES.
    verdicts: what was shown of each model but the base, in words.
  """
  stem = epath.Path(workdir) / f"comparison{suffix}"
  names = {"base": base, "other": other, "protocol": protocol}
  lists = {"models": models}
  if table is not None:
    lists = {"comparison": table, **lists}
  content = names | {"verdicts": {**(verdicts or {})}} | {
    key: [
      {name: _plain(value) for name, value in line.items()}
      for line in frame.iter_rows(named=True)
    ]
    for key, frame in lists.items()
  }
  disk.write({
    stem.with_suffix(".csv"): next(iter(lists.values())).write_csv(),
    stem.with_suffix(".md"): _markdown(
      table, models, cutoff=cutoff, verdicts=verdicts or {}, **names
    ),
    stem.with_suffix(".json"): json.dumps(content, indent=2) + "\n",
  })
