"""What finished jobs left, the claim under test, and tables of numbers.

Result rows, one a user, model and seed, become values, the values claims and
levels, and these tables: all as numbers. `experiments.report` renders them.
Models are called by their method's key throughout.

**The claim**: tail users are served better and head users no worse, tested for
every model against the comparator: superiority on tail users, and
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

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from etils import epath

from experiments import schema
from experiments.configs.base import default
from experiments.logs import read_log
from experiments.methods import METHODS, Method, learnt_by, selected
from experiments.workdir import read_json
from pin_jax import disk
from pin_jax.evaluation import metrics, statistics
from pin_jax.evaluation.statistics import Bootstrap, Change, Interval
from pin_jax.types import InputError

CONFIDENCE = 0.95
LEVEL = 0.05
NUM_RESAMPLES = 2000
MIN_SEEDS = 3  # fewer err too often for a verdict
SEGMENTS = {0: "tail", 1: "head"}
METRIC = schema.KEYS["evaluation"]["metrics"].default[0]
# evaluation.protocol -> suffix of its rows' file. Results of one are never
# in a table with those of the other.
SUFFIXES = {"full": "", "sampled": "_sampled"}
OUTCOMES = (
  "holds", "gain only", "no loss only", "refuted", "open", "too few seeds",
  "unequal information",
)
HOLDS, GAIN_ONLY, NO_LOSS_ONLY, REFUTED, OPEN, UNTESTED, UNEQUAL = OUTCOMES

_LISTS = {"history masked": "rank", "history not masked": "rank_unmasked"}
_SAMPLED_LISTS = {"sampled candidates": "rank"}
_FACTS = ["group", "segment", "activeness", "target", "candidates"]
_COLUMNS = ["model", "seed", "user", "rank", *_FACTS]
_FULL_COLUMNS = ["rank_unmasked", "candidates_unmasked"]
_SAMPLED_COLUMNS = ["score", "negative_scores"]
_GRADIENTS = "conflict_rate", "weights", "effective_groups"
REMEDY = "restore it from a copy, or make it again"
_FORMER = {  # what former versions called models, where it is not the key
  "joint_shared_plugin": "joint_shared", "pin_shared_plugin": "pin_shared",
  "pin_random_segments": "pin_random", "pin_swapped_plugins": "pin_swapped",
  "base_reads_activeness": "base_activeness", "focal_loss": "focal",
}


def key_of(name: str) -> str:
  """A model's key, also of its former name, such as 'joint + plugins'."""
  plain = re.sub("[^a-z]+", "_", name)
  key = _FORMER.get(plain, plain)
  return key if key in METHODS else name


def metrics_of(config: Mapping[str, Any]) -> tuple[str, ...]:
  """Names of the metrics of a job's tables; the claim is on the first."""
  default = schema.KEYS["evaluation"]["metrics"].default
  return tuple(config.get("evaluation", {}).get("metrics", default))


# What jobs left.


class Results(NamedTuple):
  """What a finished job, or the summary of one, left.

  Attributes:
    name: name of its directory.
    rows: a row a user, model and seed; see `job.result_rows`.
    lists: title of each list of candidates -> column of the rank in it.
    protocol: how the numbers came about, in one line.
    summary: content of summary.json; {} where there is none.
    config: the configuration, {} where there is none.
    gradients: stage -> means of its logged group gradients.
    trials: of what `experiments.sweep` chose: `settings`, and of each of
      `models` its `validation` in each setting, over which `seeds`, and the
      index of the `chosen` one; {} elsewhere.
  """

  name: str
  rows: pl.DataFrame
  lists: dict[str, str]
  protocol: str
  summary: dict[str, Any]
  config: dict[str, Any]
  gradients: dict[str, dict[str, Any]]
  trials: Mapping[str, Any] = MappingProxyType({})


def read(path: epath.PathLike) -> Results:
  """Reads the workdir of a finished job, or a summary as of `write_summary`.

  Raises:
    InputError: if there are no rows, or users or targets of the models differ,
      or a file is damaged.
  """
  path = disk.place("workdir", path)
  with disk.reading(path, REMEDY):
    if (path / "ranks.parquet").exists():
      return _read_summary(path)
    rows, _ = read_rows(path)
    same_users(rows, models_of(rows), on=["user"])
    records = read_log(path) if (path / "log.jsonl").exists() else []
    summary = _read_job_summary(path)
    config = path / "config.json"
    config = read_json(config, config={})["config"] if config.exists() else {}
    return Results(
      path.resolve().name, rows, lists_of(rows), protocol_line(rows, summary),
      summary, config, _gradient_means(records),
    )


def read_rows(workdir: epath.Path) -> tuple[pl.DataFrame, str]:
  """The rows of the job's protocol, and the suffix of their file.

  Raises:
    InputError: if there are none.
  """
  for suffix in SUFFIXES.values():
    path = workdir / f"rows{suffix}.parquet"
    if path.exists():
      with disk.reading(path, REMEDY):
        rows = disk.read_parquet(path.read_bytes())
        keys = {name: key_of(name) for name in rows["model"].unique()}
        return rows.with_columns(pl.col("model").replace(keys)), suffix
  raise InputError(
    f"{workdir} has no rows.parquet; name the workdir of a finished run"
  )


def _read_job_summary(workdir: epath.Path) -> dict[str, Any]:
  """summary.json, with each run's processor time of cpu_seconds.json."""
  path, times = workdir / "summary.json", workdir / "cpu_seconds.json"
  summary = read_json(path) if path.exists() else {}
  seconds = read_json(times) if times.exists() else {}
  with disk.reading(path, REMEDY):
    for key in ("base", "other", "protocol", "data", "fingerprint"):
      if not isinstance(summary.get(key, ""), str):
        raise TypeError(f"{key} is {str(summary[key])[:50]!r}")
    for run, cost in summary.get("cost", {}).items():
      cost.setdefault("cpu_seconds", seconds.get(run, math.nan))
    return _with_keys(summary)


def _with_keys(summary: dict[str, Any]) -> dict[str, Any]:
  """A summary with keys where that of a former version has titles."""
  for name in ("base", "other"):
    if name in summary:
      summary[name] = key_of(summary[name])
  for line in summary.get("closeness", []):
    line["model"] = key_of(line["model"])
  return summary


def _without_folders(command: str) -> str:
  """A command with names in place of absolute paths."""
  command = re.sub(r"(--workdir=)/(?:[^\s/]+/)*", r"\1runs/", command)
  return re.sub(r"(?<=[=\"'])/(?:[^\s/,\"']+/)*", "", command)


def _names_alone(config: Mapping[str, Any]) -> dict[str, Any]:
  """The configuration with the name of its data file, not where it lies."""
  data = {
    key: epath.Path(value).name
    if key in ("path", "data_dir", "manual_dir") and value else value
    for key, value in config.get("data", {}).items()
  }
  return {**config, **({"data": data} if data else {})}


def _gradient_means(
  records: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Means of each stage's records with a whole Gramian of several groups."""
  stages: dict[str, list[Mapping[str, Any]]] = {}
  for record in records:
    looked = record.get("conflict_rate") is not None
    if looked and len(record.get("norms", ())) > 1:
      stages.setdefault(without_seed(record["run"]), []).append(record)
  found = {}
  for stage, own in stages.items():
    cosines = np.asarray([r["cosines"] for r in own], np.float64)
    others = cosines[:, ~np.eye(cosines.shape[-1], dtype=bool)]
    mean = lambda name, own=own: np.mean(
      np.asarray([r.get(name) for r in own], np.float64), 0
    ).tolist()
    found[stage] = {
      "records": len(own), "cosine": float(np.nanmean(others)),
      **{name: mean(name) for name in _GRADIENTS},
    }
  return found


def without_seed(run: str) -> str:
  """'seed3/pin/backbone' -> 'pin/backbone'."""
  return re.sub(r"^seed\d+/(?=.)", "", run)


# Summaries small enough to commit.

_CUTOFF = 20  # a summary keeps the ranks up to the largest cutoff, or this
_OF_USER = "group", "segment", "activeness", "candidates", "candidates_unmasked"


def write_summary(results: Results, output: epath.PathLike) -> None:
  """Writes a job's results in about half a byte a rank, without ids.

  `ranks.parquet` has a row a user: segment, group, activeness, numbers of
  candidates, and for every model, seed and list twice its rank, 0 beyond the
  largest cutoff of the job's metrics. `job.json` has all else. These metrics
  follow exactly as from the rows, intervals and tests up to the resampling's
  error. Command and configuration name files, but not where they lie.

  Args:
    results: as from `read`.
    output: directory, made where it is missing.

  Raises:
    InputError: if a rank is no whole or half number.
    WriteError: if the disk is full or read-only; nothing is then written.
  """
  output = disk.place("output", output)
  ranks = io.BytesIO()
  _wide(results).write_parquet(
    ranks, compression="zstd", compression_level=19, statistics=False
  )
  content = results._asdict()
  del content["rows"]
  content |= {
    "trials": {**results.trials}, "config": _names_alone(results.config),
    "summary": {**results.summary},
  }
  if "command" in results.summary:
    content["summary"]["command"] = _without_folders(results.summary["command"])
  text = json.dumps(content, ensure_ascii=False)
  disk.write({
    output / "ranks.parquet": ranks.getvalue(), output / "job.json": text + "\n"
  })


def _wide(results: Results) -> pl.DataFrame:
  """One line a user, most active last, a column a model, seed and list."""
  rows = results.rows
  cutoffs = (x.partition("@")[2] for x in metrics_of(results.config))
  cutoff = max(_CUTOFF, *(float(x or math.inf) for x in cutoffs))
  wide = rows.unique("user").sort("activeness", "group", "segment", "user")
  wide = wide.select("user", *(c for c in _OF_USER if c in rows.columns))
  for model in models_of(rows):
    for (seed,), own in model_rows(rows, model).group_by(
      "seed", maintain_order=True
    ):
      named = [
        _twice(own[column], cutoff).alias(json.dumps([model, seed, title]))
        for title, column in results.lists.items()
      ]
      wide = wide.join(
        own.select("user").with_columns(named), on="user", how="left",
        maintain_order="left",
      )
  return wide.drop("user")


def _twice(ranks: pl.Series, cutoff: float) -> pl.Series:
  """2 * rank in as few bytes as it needs, 0 beyond the cutoff."""
  twice = 2 * ranks.to_numpy().astype(np.float64)
  kept = np.isfinite(twice) & (twice <= 2 * cutoff)
  if np.any(twice[kept] % 1):
    raise InputError(
      f"a rank is {twice[kept][twice[kept] % 1 > 0][0] / 2}, neither whole nor "
      "half; pass the rows that evaluation wrote"
    )
  twice = np.where(kept, twice, 0)
  return pl.Series(twice.astype(np.min_scalar_type(int(twice.max(initial=0)))))


def _read_summary(path: epath.Path) -> Results:
  content = read_json(path / "job.json")
  wide = disk.read_parquet((path / "ranks.parquet").read_bytes())
  facts = [name for name in _OF_USER if name in wide.columns]
  users = wide.select(facts).with_row_index("user")
  found: dict[tuple[str, int], dict[str, pl.Series]] = {}
  for name in wide.columns[len(facts) :]:
    model, seed, title = json.loads(name)
    column = content["lists"][title]
    rank = (wide[name].cast(pl.Float64) / 2).replace(0.0, np.inf)
    found.setdefault((key_of(model), seed), {})[column] = rank.alias(column)
  rows = pl.concat([
    users.with_columns(
      pl.lit(model).alias("model"), pl.lit(seed, pl.Int32).alias("seed"),
      pl.lit(0).alias("target"), *columns.values(),
    ).filter(pl.all_horizontal(pl.col(list(columns)).is_not_null()))
    for (model, seed), columns in found.items()
  ])
  for name, like in zip(_FULL_COLUMNS, ("rank", "candidates"), strict=True):
    if name not in rows.columns:  # of sampled candidates
      rows = rows.with_columns(pl.col(like).alias(name))
  fields = {key: content[key] for key in Results._fields if key in content}
  fields["summary"] = _with_keys(fields["summary"])
  for own in fields.get("trials", {}).get("models", []):
    own["model"] = key_of(own["model"])
  return Results(rows=rows, **fields)


# Rows, and how they came about.


def models_of(rows: pl.DataFrame) -> list[str]:
  """The models, in the order of the rows.

  Raises:
    InputError: if the rows lack a column.
  """
  own = _SAMPLED_COLUMNS if _is_sampled(rows) else _FULL_COLUMNS
  missing = [name for name in _COLUMNS + own if name not in rows.columns]
  if missing:
    raise InputError(
      f"rows lack the columns {missing}; pass the rows that evaluation wrote"
    )
  return rows["model"].unique(maintain_order=True).to_list()


def _is_sampled(rows: pl.DataFrame) -> bool:
  return "negative_scores" in rows.columns


def lists_of(rows: pl.DataFrame) -> dict[str, str]:
  """Title of each list of candidates -> column of the rank in it."""
  return _SAMPLED_LISTS if _is_sampled(rows) else _LISTS


def model_rows(rows: pl.DataFrame, model: str) -> pl.DataFrame:
  """Rows of one model, ordered by user and seed.

  Raises:
    InputError: if there are none, or a user and seed repeat.
  """
  present = models_of(rows)
  if model not in present:
    raise InputError(f"rows have no model {model!r}; choose one of {present}")
  selected = rows.filter(pl.col("model") == model).sort("user", "seed")
  if selected.select("user", "seed").is_duplicated().any():
    raise InputError(
      f"rows of model {model!r} repeat a user and seed; keep one row of each"
    )
  return selected


def same_users(
  rows: pl.DataFrame, models: Sequence[str], *, on: Sequence[str]
) -> list[pl.DataFrame]:
  """The rows of each model, as of `model_rows`.

  Raises:
    InputError: unless all were evaluated on the same users and targets.
  """
  frames = [model_rows(rows, model) for model in models]
  own = pl.concat(frames)
  counts = own.group_by(on).agg(pl.col("model").n_unique())
  lacking = counts.filter(pl.col("model") < len(models)).height
  if lacking:
    raise InputError(
      f"models {', '.join(map(repr, models))} differ in {' and '.join(on)}: "
      f"{lacking} of {counts.height} are not in all; evaluate them on the same "
      "users and seeds"
    )
  facts = [*_FACTS, *([] if _is_sampled(rows) else ["candidates_unmasked"])]
  kinds = own.group_by("user").agg(pl.col(facts).n_unique())
  for fact in facts:
    bad = kinds.filter(pl.col(fact) > 1)
    if bad.height:
      raise InputError(
        f"user {bad['user'][0]!r} has several values of {fact!r} in the rows;"
        " compare models on one split and one grouping"
      )
  return frames


def protocol_line(
  rows: pl.DataFrame, summary: Mapping[str, Any] = MappingProxyType({})
) -> str:
  """States in one line how the numbers came about.

  Args:
    rows: result rows.
    summary: content of summary.json.
  """
  seeds = sorted(rows["seed"].unique().to_list())
  plural, spread = "seeds", "users crossed with seeds"
  if len(seeds) == 1:
    plural, spread = "seed", "users, without the spread over training seeds"
  warning = few_seeds(len(seeds))
  ranking = (
    _sampled_ranking(rows) if _is_sampled(rows)
    else _full_ranking(rows)
  )
  line = (
    f"{summary.get('protocol', 'split not recorded').rstrip('.')}; {ranking}; "
    f"{plural} {', '.join(map(str, seeds))}; intervals: "
    f"{100 * CONFIDENCE:.0f} % percentile bootstrap, {NUM_RESAMPLES:,} "
    f"resamples, paired, over {spread}{warning and '; ' + warning}"
  )
  if "fingerprint" in summary:
    line += f"; data {summary['data']} {summary['fingerprint']}"
  return line


def _full_ranking(rows: pl.DataFrame) -> str:
  return (
    f"full ranking over {rows['candidates_unmasked'].max():,} items; ties at "
    "their average rank; "
    "'history masked' removes the items of the user's history (except the "
    "target) from the candidates"
  )


def _sampled_ranking(rows: pl.DataFrame) -> str:
  return (
    "SAMPLED PROTOCOL, not comparable with full ranking: the target against "
    f"{rows['candidates'][0] - 1:,} items drawn uniformly from those that the "
    "user never interacts with, held-out ones included, the same for every "
    "model; ties at their average rank; AUC of all impressions of a slice, "
    "GAUC the mean of its users' AUC, log loss of sigmoid(logit), not "
    "recalibrated to this share of positives, lower is better; the best step "
    "was chosen by the same protocol on the validation targets"
  )


def few_seeds(count: int) -> str:
  """'one seed: nothing proven', '' from MIN_SEEDS on."""
  if count >= MIN_SEEDS:
    return ""
  return f"{'one seed' if count == 1 else 'two seeds'}: nothing proven"


def number_range(low: int, high: int) -> str:
  """A range of whole numbers, one number where they are equal."""
  return f"{low:,}" if low == high else f"{low:,}–{high:,}"


# Values of metrics.


def values_of(
  rows: pl.DataFrame,
  models: Sequence[str],
  *,
  metric: str = METRIC,
  column: str = "rank",
) -> np.ndarray:
  """A metric of M models by seed and user, [M, S, U].

  Args:
    rows: result rows, of any slice of the users.
    models: of the same users and seeds.
    metric: as `metrics.metric` reads it; of sampled candidates also 'AUC',
      'GAUC' and 'log loss'.
    column: which rank.

  Raises:
    InputError: if the models differ in their users, seeds or targets, or a user
      is not there under every seed.
  """
  if not rows.height:
    return np.zeros((len(models), 0, 0))
  frames = same_users(rows, models, on=["user", "seed"])
  return statistics.by_seed(
    np.stack([_metric(frame, column, metric) for frame in frames]),
    frames[0]["user"].rank("dense"), frames[0]["seed"],
  )


def mean_metric(rows: pl.DataFrame, metric: str, column: str) -> float:
  """Mean of a metric over rows of one model; NaN for none."""
  if not rows.height:
    return math.nan
  return float(_metric(rows, column, metric).mean())


def _metric(frame: pl.DataFrame, column: str, metric: str) -> np.ndarray:
  """Values [N] of a metric in the rows of one model."""
  if metric in _OF_IMPRESSIONS:
    return _OF_IMPRESSIONS[metric](frame)
  return metrics.metric(metric)(frame[column].to_numpy())


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


_OF_IMPRESSIONS = {
  "AUC": _pooled_auc,
  "GAUC": lambda frame: metrics.user_auc(
    frame["rank"].to_numpy(), frame["candidates"].to_numpy()
  ),
  "log loss": lambda frame: metrics.log_loss(*_scores(frame)),
}


def mean_of(
  values: np.ndarray, num_resamples: int = NUM_RESAMPLES
) -> Interval:
  """Means of values [M, S, U] over users and seeds, with intervals, [M]."""
  return statistics.mean_interval(values, Bootstrap(CONFIDENCE, num_resamples))


def change_of(
  values: np.ndarray, margin: float = 0.0, num_resamples: int = NUM_RESAMPLES
) -> Change:
  """Changes of the other M - 1 models against the first, [M - 1]."""
  first, others = np.split(values, [1])
  return statistics.relative_change(
    np.broadcast_to(first, others.shape), others, margin=margin,
    bootstrap=Bootstrap(CONFIDENCE, num_resamples),
  )


SLICES = {"overall": pl.lit(True)} | {
  name: pl.col("segment") == s for s, name in SEGMENTS.items()
}


def groups_of(rows: pl.DataFrame) -> dict[int, pl.Expr]:
  """Which rows are of each group that is there."""
  return {g: pl.col("group") == g for g in rows["group"].unique().sort()}


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


# The claim.


class Claim(NamedTuple):
  """What is shown of a model against the comparator.

  Attributes:
    model: its key.
    seeds: how many both have.
    overall: change of all users, a fraction.
    tail: of tail users; its p of no gain.
    head: of head users; its p of a loss beyond the margin.
    of_seeds: 'tail' and 'head' -> each seed's own change.
    p: Holm's corrected p of 'tail' and of 'head', each over the models, and of
      'tail harm' and 'head harm', over both and the models; NaN below three
      seeds and at unequal information.
    outcome: one of OUTCOMES.
  """

  model: str
  seeds: int
  overall: Change
  tail: Change
  head: Change
  of_seeds: dict[str, list[float]]
  p: dict[str, float]
  outcome: str


def check_claims(
  rows: pl.DataFrame,
  *,
  base: str,
  margin: float,
  metric: str = METRIC,
  column: str = "rank",
  num_resamples: int = NUM_RESAMPLES,
  learnt: Mapping[str, str] = MappingProxyType({}),
) -> list[Claim]:
  """Tests the claim for every model against the comparator.

  Args:
    rows: result rows of any number of models.
    base: the comparator.
    margin: relative loss of head users that still counts as no worse.
    metric: of the changes.
    column: which rank.
    num_resamples: bootstrap resamples of users and seeds.
    learnt: model -> what it has learnt from. Those that have learnt from
      something else than the comparator are in no family and get no verdict.

  Returns:
    The claims, in the order of the models in the rows.

  Raises:
    InputError: if the comparator is absent, or users or targets differ.
  """
  model_rows(rows, base)  # present, and without repeated rows
  claims = {
    claim.model: claim
    for shared, models in with_the_same_seeds(rows, base)
    for claim in _changes(
      shared, [base, *models], margin, (metric, column), num_resamples
    )
  }
  claims = [claims[model] for model in models_of(rows) if model in claims]
  equal = lambda claim: learnt.get(claim.model) == learnt.get(base)
  tested = [c for c in claims if c.seeds >= MIN_SEEDS and equal(c)]
  for family in (["tail"], ["head"], ["tail harm", "head harm"]):
    pairs = [(claim, name) for claim in tested for name in family]
    raw = [
      getattr(getattr(claim, name[:4]), "p_harm" if name[4:] else "p_value")
      for claim, name in pairs
    ]
    for (claim, name), p in zip(pairs, statistics.holm(raw), strict=True):
      claim.p[name] = float(p)
  return [
    claim._replace(outcome=_outcome(claim) if equal(claim) else UNEQUAL)
    for claim in claims
  ]


def _changes(
  rows: pl.DataFrame, models: Sequence[str], margin: float,
  what: tuple[str, str], num_resamples: int,
) -> Iterable[Claim]:
  """Of models that share their seeds; the first is compared with."""
  changes, of_seeds = {}, {}
  for part, keep in SLICES.items():
    own = rows.filter(keep)
    values = values_of(own, models, metric=what[0], column=what[1])
    changes[part] = change_of(
      values, margin * (part == "head"), num_resamples
    )
    means = values.mean(-1) if own.height else np.full((len(models), 0), 0)
    with np.errstate(all="ignore"):
      of_seeds[part] = means[1:] / means[0] - 1
  for index, model in enumerate(models[1:]):
    yield Claim(
      model, rows["seed"].n_unique(),
      *(Change(*(float(x[index]) for x in c)) for c in changes.values()),
      {part: of_seeds[part][index].tolist() for part in ("tail", "head")},
      dict.fromkeys(("tail", "head", "tail harm", "head harm"), math.nan), OPEN,
    )


def _outcome(claim: Claim) -> str:
  if claim.seeds < MIN_SEEDS:
    return UNTESTED
  better, no_worse, *harmed = (p < LEVEL for p in claim.p.values())
  if any(harmed):
    return REFUTED
  if better and no_worse:
    return HOLDS
  if better or no_worse:
    return GAIN_ONLY if better else NO_LOSS_ONLY
  return OPEN


class Level(NamedTuple):
  """How well a model serves whom.

  Attributes:
    model: its key.
    seeds: how many it has.
    overall: the metric of all users.
    tail: of tail users.
    head: of head users.
    gap: head - tail, positive where tail users are worse off.
  """

  model: str
  seeds: int
  overall: Interval
  tail: Interval
  head: Interval
  gap: Interval


def levels(
  rows: pl.DataFrame,
  *,
  metric: str = METRIC,
  column: str = "rank",
  num_resamples: int = NUM_RESAMPLES,
) -> list[Level]:
  """How well every model serves whom, in the order of the rows.

  Raises:
    InputError: if a model's rows are incomplete.
  """
  together: dict[frozenset, list[str]] = {}
  for model, seeds in _seeds(rows).items():
    together.setdefault(seeds, []).append(model)
  draw = Bootstrap(CONFIDENCE, num_resamples)
  found = {}
  for seeds, models in together.items():
    own = rows.filter(pl.col("model").is_in(models))
    parts = {
      part: values_of(own.filter(keep), models, metric=metric, column=column)
      for part, keep in SLICES.items()
    }
    numbers = [
      *(mean_of(values, num_resamples) for values in parts.values()),
      statistics.gap(parts["head"], parts["tail"], draw),
    ]
    for index, model in enumerate(models):
      found[model] = Level(
        model, len(seeds),
        *(Interval(*(float(x[index]) for x in n)) for n in numbers),
      )
  return [found[model] for model in models_of(rows)]


# Tables of numbers.


class Analysis(NamedTuple):
  """A job's results and what follows from them.

  Attributes:
    results: the job's.
    base: the comparator.
    other: the model under test; the comparator where it is alone.
    margin: of non-inferiority on head users.
    claims: title of a list of candidates -> claims on its ranks.
    levels: title of a list of candidates -> levels of its ranks.
  """

  results: Results
  base: str
  other: str
  margin: float
  claims: dict[str, list[Claim]]
  levels: dict[str, list[Level]]

  @property
  def main(self) -> str:
    """Title of the list of candidates that the verdict speaks of."""
    return next(iter(self.results.lists))

  @property
  def data(self) -> str:
    """Name of the data."""
    return self.results.summary.get("data", self.results.name)

  @property
  def settings(self) -> dict[str, str]:
    """Dotted key -> value of the whole configuration, and the data's name."""
    found = schema.flatten({**self.results.config, "data": {}})
    return {"data": self.data, **{k: value_text(v) for k, v in found}}

  @property
  def metrics(self) -> tuple[str, ...]:
    """Titles of the tables' metrics; claims and levels are of the first."""
    return tuple(map(str.upper, metrics_of(self.results.config)))

  def claim(self) -> Claim | None:
    """Of the model under test, on the main list."""
    found = [c for c in self.claims[self.main] if c.model == self.other]
    return found[0] if found else None


def analyse(
  results: Results,
  base: str | None = None,
  num_resamples: int = NUM_RESAMPLES,
) -> Analysis:
  """Tests the claim and takes the levels on every list of candidates.

  Args:
    results: as from `read`.
    base: the comparator; None takes the job's own, else the first model.
    num_resamples: bootstrap resamples of users and seeds.

  Raises:
    InputError: if the job has no such model, or cannot be compared.
  """
  rows, models = results.rows, models_of(results.rows)
  base = key_of(base or results.summary.get("base", models[0]))
  if base not in models:
    raise InputError(
      f"{results.name} has no model {base!r}; choose --base of {models}"
    )
  declared = results.config.get("claims", default().claims)
  margin = declared["non_inferiority_margin"]
  metric = metrics_of(results.config)[0]
  learnt = {model: learnt_by(model, results.config) for model in models}
  claims = {
    title: check_claims(
      rows, base=base, margin=margin, metric=metric, column=column,
      learnt=learnt, num_resamples=num_resamples,
    )
    for title, column in results.lists.items()
  }
  tested = [claim.model for claim in next(iter(claims.values()))]
  asked = results.summary.get("other")
  return Analysis(
    results, base, asked if asked in tested else [base, *tested][-1], margin,
    claims,
    {
      title: levels(
        rows, metric=metric, column=column, num_resamples=num_resamples
      )
      for title, column in results.lists.items()
    },
  )


class Answer(NamedTuple):
  """What to serve, as validation chose it, and what that gives on the test.

  Attributes:
    choice: 'tail' and 'head' -> key of the model.
    chosen_on: how many users' validation targets chose.
    claim: that of the chosen models together against the comparator.
    levels: 'tail' and 'head' -> of the comparator and of the chosen model.
    cost: CPU-seconds of a seed's training, of the comparator and of all that
      the chosen models need; NaN where they are not known.
    examples: ids of a tail and a head user.
  """

  choice: dict[str, str]
  chosen_on: int
  claim: Claim
  levels: dict[str, tuple[float, float]]
  cost: tuple[float, float]
  examples: tuple[Any, ...]


def answer(job: Analysis, num_resamples: int = NUM_RESAMPLES) -> Answer | None:
  """What to serve to whom; None where the job made no choice."""
  own, found = job.results, job.results.summary.get("choice")
  rows, column = own.rows, own.lists[job.main]
  methods = selected(own.config) if found else {}
  if job.base not in methods:
    return None
  choice = {part: found[part] for part in SEGMENTS.values()}
  served = pl.concat([rows.filter(pl.col("model") == job.base), *(
    rows.filter(pl.col("model") == choice[part], pl.col("segment") == segment)
    .with_columns(pl.lit("chosen").alias("model"))
    for segment, part in SEGMENTS.items()
  )])
  learnt = {learnt_by(key, own.config) for key in choice.values()}
  [claim] = check_claims(
    served, base=job.base, margin=job.margin, metric=job.metrics[0],
    column=column, num_resamples=num_resamples, learnt={
      job.base: learnt_by(job.base, own.config), "chosen": "; ".join(learnt)
    },
  )
  level = lambda model, segment: mean_metric(
    served.filter(pl.col("model") == model, pl.col("segment") == segment),
    job.metrics[0], column,
  )
  first = rows.group_by("segment").agg(pl.col("user").first()).sort("segment")
  return Answer(
    choice, sum(found["users"].values()), claim,
    {
      part: (level(job.base, segment), level("chosen", segment))
      for segment, part in SEGMENTS.items()
    },
    tuple(
      _cpu_seconds(own, [methods[key] for key in keys])
      for keys in ([job.base], choice.values())
    ), tuple(first["user"]),
  )


def _cpu_seconds(own: Results, methods: Sequence[Method]) -> float:
  """Of the training that some methods need, a seed; the memory needs none."""
  alone = lambda m: {s for s in m.stages if s.plugin == "memory_alone"}
  names = {s.name for m in methods for s in alone(m) or m.stages}
  seeds = own.rows["seed"].n_unique()
  return sum(
    cost["cpu_seconds"] for run, cost in own.summary["cost"].items()
    if without_seed(run) in names
  ) / seeds


def value_text(value: Any) -> str:
  """A setting's value as a flag takes it."""
  return str(tuple(value) if isinstance(value, list) else value)


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
  """Keys whose values are not the same in all."""
  keys = dict.fromkeys(key for own in settings for key in own)
  return [
    key for key in keys if len({str(own.get(key)) for own in settings}) > 1
  ]


def labels_of(jobs: Sequence[Analysis]) -> list[str]:
  """A name of each job, no two alike: its data, and what differs besides.

  Where much does, or nothing, it is the name of the job's directory.
  """
  labels = []
  for job in jobs:
    like = [other.settings for other in jobs if other.data == job.data]
    keys = [key for key in differing(like) if key != "methods"]
    told = ", ".join(f"{key} {job.settings.get(key)}" for key in keys)
    if len(like) > 1 and (not keys or len(keys) > 3 or len(told) > 60):
      told = job.results.name
    labels.append(f"{job.data} ({told})" if told else job.data)
  return [
    label + f" ({labels[: i + 1].count(label)})" * (labels.count(label) > 1)
    for i, label in enumerate(labels)
  ]


class Column(NamedTuple):
  """A column of a table.

  Attributes:
    name: its header.
    kind: what its cells are, and so how they are written: 'model' (a key),
      'word', 'outcome', 'count', 'number', 'level' (of a metric), 'gap' (a
      signed level), 'change' (a fraction, shown in percent) or 'p'.
  """

  name: str
  kind: str = "word"


Cell = str | int | float | Interval | Change | Sequence[float]


class Table(NamedTuple):
  """A table of numbers.

  Attributes:
    title: above it.
    columns: what its columns hold.
    lines: cells; one with an estimate, low and high, or a list, counts as one.
    note: below it.
  """

  title: str
  columns: Sequence[Column]
  lines: Sequence[Sequence[Cell]]
  note: str = ""


_NO_P = (
  " Models with fewer than three seeds have no p and no verdict: their figures "
  "prove nothing."
)


def answer_table(job: Analysis, found: Answer) -> Table:
  """The model that each segment is served with, beside the comparator."""
  return Table(
    "Chosen on validation, scored on the test",
    [Column("users"), Column("model", "model"),
     Column(f"{job.metrics[0]} with it", "level"),
     Column(f"with {job.base}", "level"),
     Column("change %", "change")],
    [
      (part, key, *reversed(found.levels[part]), getattr(found.claim, part))
      for part, key in found.choice.items()
    ],
    f"The validation targets that chose are of {found.chosen_on:,} users, and "
    "no model had learnt from them.",
  )  # fmt: skip


def change_table(job: Analysis, title: str) -> Table:
  """Every model against the comparator, on a list of candidates."""
  claims = job.claims[title]
  return Table(
    f"Change of {job.metrics[0]} against {job.base}, {title}",
    [Column("model", "model"), Column("tail change %", "change"),
     Column("p", "p"), Column("head change %", "change"), Column("p", "p"),
     Column("p of harm", "p"), Column("claim", "outcome"),
     Column("overall change %", "change")],
    [
      (claim.model, claim.tail, claim.p["tail"], claim.head, claim.p["head"],
       float(np.fmin(claim.p["tail harm"], claim.p["head harm"])),
       claim.outcome, claim.overall)
      for claim in claims
    ],
    f"In brackets {100 * CONFIDENCE:.0f} % intervals."
    + _NO_P * any(claim.seeds < MIN_SEEDS for claim in claims),
  )  # fmt: skip


def level_table(job: Analysis, title: str) -> Table:
  """How well every model serves whom, on a list of candidates."""
  few = any(level.seeds < MIN_SEEDS for level in job.levels[title])
  return Table(
    f"{job.metrics[0]}, {title}",
    [Column("model", "model"), Column("seeds", "count"),
     *(Column(name, "level") for name in ("overall", "tail", "head")),
     Column("gap, head − tail", "gap")],
    [tuple(level) for level in job.levels[title]],
    "A positive gap: tail users are served worse." + _NO_P * few,
  )  # fmt: skip


def group_table(
  job: Analysis, title: str, metric: str, num_resamples: int
) -> Table:
  """The model under test against the comparator, by group."""
  models, rows = [job.base, job.other], job.results.rows
  column = job.results.lists[title]
  shared = [rows for rows, found in with_the_same_seeds(rows, job.base)
            if job.other in found][0]  # fmt: skip
  lines = []
  for group, keep in groups_of(shared).items():
    own = shared.filter(keep)
    values = values_of(own, models, metric=metric, column=column)
    change = change_of(values, num_resamples=num_resamples)
    spread = own["activeness"]
    lines.append((
      str(group), number_range(spread.min(), spread.max()),
      own["user"].n_unique(),
      *(float(x.mean()) for x in values),
      Change(*(float(x[0]) for x in change)),
    ))
  return Table(
    f"{metric} by activeness, {title}",
    [Column("group"), Column("activeness"), Column("users", "count"),
     *(Column(model, "level") for model in models),
     Column("change %", "change")],
    lines,
  )  # fmt: skip


def seed_table(job: Analysis, title: str) -> Table:
  """Each seed's own changes."""
  return Table(
    f"Each seed's change of {job.metrics[0]} in %, {title}",
    [Column("model", "model"), Column("tail", "change"),
     Column("head", "change")],
    [
      (claim.model, claim.of_seeds["tail"], claim.of_seeds["head"])
      for claim in job.claims[title]
    ],
  )  # fmt: skip


def metrics_table(job: Analysis, title: str) -> Table:
  """Means of all metrics."""
  rows, column = job.results.rows, job.results.lists[title]
  names = [*job.metrics, *(_OF_IMPRESSIONS if _is_sampled(rows) else ())]
  means = lambda own: (mean_metric(own, name, column) for name in names)
  return Table(
    f"Means over users and seeds, {title}",
    [Column("model", "model"), Column("users"),
     *(Column(name, "level") for name in names)],
    [
      (model, part, *means(model_rows(rows, model).filter(keep)))
      for model in models_of(rows) for part, keep in SLICES.items()
    ],
  )  # fmt: skip


def closeness_table(results: Results) -> Table:
  """How near the models are to the simulator's exact distributions."""
  return Table(
    "Distance from the simulator's exact distributions",
    [Column("model", "model"), Column("KL from P(y|do(x))", "level"),
     Column("KL from P(y|x)", "level"), Column("NDCG@10", "level")],
    [
      tuple(line[key] for key in
            ("model", "kl_interventional", "kl_observational", "ndcg"))
      for line in results.summary["closeness"]
    ],
    "KL in nats, lower is closer; NDCG@10 with the history not masked. The "
    "oracle P(y|x) is the best that a model reading the same window can do.",
  )  # fmt: skip


def cost_table(results: Results) -> Table:
  """Steps, validation and processor time of each stage, seeds together."""
  stages: dict[str, list[Mapping[str, Any]]] = {}
  for run, cost in results.summary["cost"].items():
    stages.setdefault(without_seed(run), []).append(cost)
  mean = lambda own, key: np.mean([c[key] for c in own], 0).tolist()
  total = sum(c["cpu_seconds"] for own in stages.values() for c in own)
  return Table(
    f"Training cost and validation {metrics_of(results.config)[0].upper()}",
    [Column("stage"), Column("runs", "count"), Column("steps"),
     Column("skipped", "count"), Column("best step", "count"),
     Column("best validation", "level"),
     Column("CPU-seconds a run", "count")],
    [
      (
        stage, len(own),
        number_range(*(f(c["steps"] for c in own) for f in (min, max))),
        sum(c.get("skipped", 0) for c in own),
        mean(own, "best_steps"), mean(own, "validation"),
        mean(own, "cpu_seconds"),
      )
      for stage, own in stages.items()
    ],
    "Means over seeds; several numbers in a cell are one a segment. At best "
    "step 0 a stage left its start as it was. "
    f"{total:,.0f} CPU-seconds in all.",
  )  # fmt: skip


def trials_table(results: Results) -> Table:
  """What validation chose for each model among a sweep's settings."""
  tried = results.trials["settings"]
  names = [", ".join(f"{k} {v}" for k, v in own.items()) for own in tried]
  own = results.trials["models"]
  seeds = sorted({seed for model in own for seed in model["seeds"]})
  return Table(
    f"Settings tried, by validation {metrics_of(results.config)[0].upper()}",
    [Column("model", "model"), *(Column(name, "level") for name in names),
     Column("chosen")],
    [(m["model"], *m["validation"], names[m["chosen"]]) for m in own],
    f"Mean over seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. "
    "Values of different models may be of different users: models of one "
    "segment, and those whose plugins learn from validation targets.",
  )  # fmt: skip


def gradient_table(results: Results) -> Table:
  """Conflicts, cosines and weights of each stage's group gradients."""
  names = "records", "conflict_rate", "cosine", "weights", "effective_groups"
  return Table(
    "Group gradients, means over logged steps and seeds",
    [Column("stage"), Column("records", "count"),
     Column("share in conflict", "number"), Column("cosine", "number"),
     Column("weights", "number"), Column("effective groups", "number")],
    [
      (stage, *(own[name] for name in names))
      for stage, own in results.gradients.items()
    ],
    "In conflict: pairs of groups with a negative cosine; gradients of batches "
    "that share nothing are so half of the time.",
  )  # fmt: skip


def settings_table(config: Mapping[str, Any]) -> Table:
  """A configuration's keys whose value is not the default."""
  return Table(
    "Settings that differ from the defaults",
    [Column("setting"), Column("value")],
    [
      (key, value_text(value))
      for key, value in changed_settings(config).items()
    ],
  )


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """Keys of a configuration whose value is not the default."""
  known = schema.canonical(default().to_dict())
  return {
    key: mine
    for key, mine, theirs in schema.differences(
      schema.canonical(config), known, known
    )
    if mine != theirs and mine is not None
  }
