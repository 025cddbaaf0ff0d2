"""What the report says of finished jobs, section by section."""

import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from experiments import claims, commands, figures, plots, schema
from experiments.claims import interval_text, p_text
from experiments.configs.base import default
from experiments.methods import learnt_by
from experiments.render import (
  Block,
  Code,
  Facts,
  Figures,
  Fold,
  Report,
  Section,
  Table,
  Text,
  Verdict,
)
from experiments.summaries import PATHS, Results, without_seed
from experiments.tables import (
  CONFIDENCE,
  MIN_SEEDS,
  NUM_RESAMPLES,
  few_seeds,
  number_range,
  percent,
)
from pin_jax.evaluation import metrics
from pin_jax.types import InputError

CURVES = 2  # models beside the comparator in the plots over activeness
_CUTOFFS = 5, 10, 20
_HOLM = (
  "p is one-sided, doubled, and corrected over the models by Holm's method: "
  "for tail users of the hypothesis that nothing is gained, for head users "
  "that more than the margin is lost. The claim holds where both are below "
  ".05. It is refuted where p of harm is: the smaller one, corrected over both "
  "and the models, of the hypotheses that tail users lose nothing and head "
  "users no more than the margin."
)
_UNEQUAL = (
  " Models that have learnt from other interactions than the comparator have "
  "none either."
)
_UNTESTED = (
  " Models with fewer than three seeds have no p and no verdict: their figures "
  "prove nothing."
)


def base_of(results: Results, base: str | None = None) -> str:
  """The comparator: as asked for, else the job's own, else the first model.

  Raises:
    InputError: if the job has no such model.
  """
  models = results.rows["model"].unique(maintain_order=True).to_list()
  chosen = base or results.summary.get("base", models[0])
  if chosen not in models:
    raise InputError(
      f"{results.name} has no model {chosen!r}; choose --base of {models}"
    )
  return chosen


def margin_of(config: Mapping[str, Any]) -> float:
  """The margin that a job's configuration declares, else the default."""
  declared = config.get("claims", default().claims)
  return declared["non_inferiority_margin"]


def claim_lines(
  rows: pl.DataFrame,
  summary: Mapping[str, Any],
  config: Mapping[str, Any],
  *,
  base: str,
  swept: bool = False,
  **options: Any,
) -> list[dict[str, Any]]:
  """What is shown of each model, with all that a job knows besides its rows.

  Args:
    rows: result rows.
    summary: content of summary.json, or {}.
    config: the configuration, or {}.
    base: the comparator.
    swept: whether the rows are of a sweep's chosen settings.
    **options: the others of `claims.check_claims`.

  Returns:
    The lines of `claims.check_claims`.
  """
  seeds = rows["seed"].unique().sort().to_list()
  more = commands.more_seeds(summary.get("command", ""), seeds, swept=swept)
  models = rows["model"].unique(maintain_order=True).to_list()
  learnt = {model: learnt_by(model, config) for model in models}
  equal = [model for model in models if learnt[model] == learnt.get(base)]
  remarks = claims.unchanged(rows, summary.get("cost", {}))
  found = {}
  for compared in (equal, [base, *(m for m in models if m not in equal)]):
    lines = claims.check_claims(
      rows.filter(pl.col("model").is_in(compared)), base=base,
      margin=margin_of(config), more_seeds=more, remarks=remarks, **options,
    ).to_dicts()
    found |= {line["model"]: line for line in lines}
  return [
    found[model] if model in equal else claims.without_verdict(
      found[model], base, learnt[model], learnt[base]
    )
    for model in models if model in found
  ]


class Job:
  """A job's results with the tables that several sections share."""

  def __init__(
    self,
    results: Results,
    base: str | None = None,
    num_resamples: int = NUM_RESAMPLES,
  ) -> None:
    """Tests the claim and takes the levels on every list of candidates."""
    self.results = results
    self.base = base_of(results, base)
    self.margin = margin_of(results.config)
    self.models = results.rows["model"].unique(maintain_order=True).to_list()
    options = {"num_resamples": num_resamples}
    self.claims = {
      title: claim_lines(
        results.rows, results.summary, results.config, base=self.base,
        swept=bool(results.trials), column=column, **options,
      )
      for title, column in results.lists.items()
    }
    self.remarks = claims.unchanged(
      results.rows, results.summary.get("cost", {})
    )
    self.few = few_seeds(results.rows["seed"].n_unique())
    self.levels = {
      title: claims.levels(results.rows, column=column, **options).to_dicts()
      for title, column in results.lists.items()
    }

  @property
  def main(self) -> str:
    """Title of the list of candidates that the verdict speaks of."""
    return next(iter(self.results.lists))

  def chosen(self) -> dict[str, Any] | None:
    """The line of the model under test: the job's own choice, else the last."""
    lines = {line["model"]: line for line in self.claims[self.main]}
    if not lines:
      return None
    return lines.get(self.results.summary.get("other"), [*lines.values()][-1])


def report(
  jobs: Sequence[Results],
  *,
  base: str | None = None,
  num_resamples: int = NUM_RESAMPLES,
) -> Report:
  """Puts the report together.

  Args:
    jobs: results of one or more finished jobs.
    base: the comparator; None takes each job's own.
    num_resamples: bootstrap resamples of users and seeds.

  Returns:
    The report, for `render`.

  Raises:
    InputError: if a job has no such comparator, or cannot be compared.
  """
  read = [Job(results, base, num_resamples) for results in jobs]
  anchors = _anchors([job.results.name for job in read])
  sections = [_overview(read)]
  sections += filter(None, [_windows(read)])
  sections += [
    _section(job, anchor) for job, anchor in zip(read, anchors, strict=True)
  ]
  names = list(dict.fromkeys(_data(job.results) for job in read))
  counts = [job.results.rows["group"].max() + 1 for job in read]
  return Report(
    f"Long-tailed recommendation on {_listed(names)}",
    "Are users with few behaviours served better, and users with many no "
    "worse? Every number below is computed from one row a user, model and "
    "training seed.",
    sections, counts,
  )


def _listed(names: Sequence[str]) -> str:
  return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _anchors(names: Sequence[str]) -> list[str]:
  """Distinct names that are fit for a link."""
  plain = [re.sub(r"[^a-z0-9]+", "-", name.lower()) for name in names]
  return [f"job-{i}-{name.strip('-')}" for i, name in enumerate(plain, 1)]


def _data(results: Results) -> str:
  return results.summary.get("data", results.name)


def _overview(jobs: Sequence[Job]) -> Section:
  blocks: list[Block] = []
  for job in jobs:
    line = job.chosen()
    if line is not None:
      title = f"{_data(job.results)}: {line['model']}"
      title += f" ({job.results.name})" if len(jobs) > 1 else ""
      blocks.append(Verdict(line["outcome"], title, line["verdict"]))
  tested = [
    (job, line) for job in jobs for line in job.claims[job.main]
  ]
  if not tested:
    blocks.append(Text("Every job has one model: there is nothing to compare."))
  elif len(jobs) > 1:
    blocks.append(_all_forest(jobs))
  if len(tested) > 1:
    outcomes = [line["outcome"] for _, line in tested]
    few, unequal = map(outcomes.count, (claims.UNTESTED, claims.UNEQUAL))
    untested = few + unequal
    words = [
      f"Over all jobs and models, the claim held in "
      f"{outcomes.count(claims.HOLDS)} of {len(tested) - untested} tests."
    ] if untested < len(tested) else []
    for count, why in (
      (few, "for want of three seeds"), (unequal, "at unequal information")
    ):
      if count:
        words.append(f"Not tested, {why}: {count} of {len(tested)}.")
    blocks.append(Text(" ".join(words)))
  if len(jobs) > 1 and tested:
    blocks.append(Fold("All tests", [_all_claims(tested)]))
  return Section("verdict", "Verdict", blocks)


def _all_forest(jobs: Sequence[Job]) -> Figures:
  """The model under test of every job."""
  lines = [
    line | {"model": job.results.name}
    for job in jobs if (line := job.chosen()) is not None
  ]
  margin = max(job.margin for job in jobs)
  title = "The model under test of each job"
  return Figures([figures.forest(lines, margin, "all-forest", title)])


def _all_claims(tested: Sequence[tuple[Job, dict[str, Any]]]) -> Table:
  return Table(
    "All jobs",
    ("job", "data", "model", "against", "tail change %", "p",
     "head change %", "p", "p of harm", "claim"),
    [
      (
        job.results.name, _data(job.results), line["model"], job.base,
        *_tested(line), line["outcome"],
      )
      for job, line in tested
    ],
    left=4, note="NDCG@10, first list of candidates of each job. "
    + _tests(line for _, line in tested),
  )  # fmt: skip


def _tests(lines: Iterable[Mapping[str, Any]]) -> str:
  """What the p-values of a table are, and which models have none."""
  outcomes = [line["outcome"] for line in lines]
  unequal = claims.UNEQUAL in outcomes
  return _HOLM + _UNTESTED * (claims.UNTESTED in outcomes) + _UNEQUAL * unequal


def _tested(line: Mapping[str, Any]) -> list[str]:
  return [
    text
    for part in ("tail", "head")
    for text in (interval_text(line, part), p_text(line[f"{part}_adjusted"]))
  ] + [
    p_text(np.fmin(line["tail_harm_adjusted"], line["head_harm_adjusted"]))
  ]


def _section(job: Job, anchor: str) -> Section:
  results = job.results
  blocks = [
    Facts(_facts(job)),
    Figures(figures.long_tail(results.rows, anchor)),
    *_shown(job, anchor),
    *(
      Fold(f"The same with the {title}", _tables(job, title))
      for title in list(results.lists)[1:]
    ),
    Fold("Each seed, other cutoffs", [
      *_of_seeds(job, job.main), _other_cutoffs(job, job.main)
    ]),
    *_gradients(results, anchor),
    *_adjustment(results),
    *_closeness(results),
    *_cost(results),
    *_trials(results),
    Fold("Data, protocol and settings", _protocol(results)),
    *_origin(results),
  ]
  title = _data(results)
  if results.name != title:
    title += f" ({results.name})"
  return Section(anchor, title, blocks)


def _facts(job: Job) -> list[tuple[str, str]]:
  results = job.results
  rows, config = results.rows, results.config
  seeds = sorted(rows["seed"].unique())
  users = rows.unique("user")
  pairs = [("test users", f"{users.height:,}")]
  if "num_items" in results.summary:
    pairs.append(("items", f"{results.summary['num_items']:,}"))
  about = results.summary.get("description", {})
  if about:
    pairs += [
      ("training interactions", f"{about['interactions']:,}"),
      ("activeness, median and mean",
       f"{about['median']:g} and {about['mean']:.1f}"),
      ("head", f"{100 * about['head_users']:.0f} % of users, "
       f"{100 * about['head_interactions']:.0f} % of interactions"),
      ("Gini of activeness", f"{about['gini']:.2f}"),
    ]
  if config:
    backbone = config["backbone"]
    pairs.append((
      "backbone", f"{backbone['name']}, width {backbone['width']}, window "
      f"{backbone['length']}",
    ))
  return [
    *pairs,
    ("seeds", ", ".join(map(str, seeds)) + (job.few and f" ({job.few})")),
    ("compared with", job.base),
    ("margin for head users", f"{100 * job.margin:g} %"),
  ]  # fmt: skip


def _ranged(line: Mapping[str, Any], key: str, signed: bool = False) -> str:
  """A level with its interval: '.0514 [.0490, .0540]'."""
  estimate, low, high = (
    _level(line[k], signed) for k in (key, f"{key}_low", f"{key}_high")
  )
  return f"{estimate} [{low}, {high}]"


def _level(value: float, signed: bool = False) -> str:
  if not math.isfinite(value):
    return "n/a"
  text = f"{value:+.4f}" if signed else f"{value:.4f}"
  return text.replace("0.", ".", 1).replace("-", "−")


def _shown(job: Job, anchor: str) -> list[Block]:
  """The tables of the main list, each with its figures."""
  *changes, levels = _tables(job, job.main)
  column, lines = job.results.lists[job.main], job.claims[job.main]
  others = [line["model"] for line in lines]
  chosen = job.chosen()
  if chosen is not None:  # the model under test, then the first ones
    others = list(dict.fromkeys([chosen["model"], *others]))[:CURVES]
  own, *change = figures.curves(
    job.results.rows, [job.base, *others], f"{anchor}-curves", column=column
  )
  if lines:
    title = f"Change against {job.base}, {job.main}"
    name = f"{anchor}-forest"
    change = [figures.forest(lines, job.margin, name, title), *change]
  shown = [*changes, Figures(change)] if change else changes
  return [*shown, levels, Figures([own])]


def _tables(job: Job, title: str) -> list[Block]:
  """Changes, where there is something to compare, and levels."""
  levels, tested = job.levels[title], job.claims[title]
  tables: list[Block] = []
  if tested:
    tables.append(Table(
      f"Change of NDCG@10 against {job.base}, {title}",
      ("model", "claim", "tail change %", "p", "head change %", "p",
       "p of harm", "overall change %"),
      [
        (
          line["model"], line["outcome"], *_tested(line),
          interval_text(line, "overall"),
        )
        for line in tested
      ],
      left=2, note=f"In brackets {100 * CONFIDENCE:.0f} % intervals. "
      + _tests(tested) + "".join(f" Note: {x}." for x in job.remarks.values()),
    ))  # fmt: skip
  tables.append(Table(
    f"NDCG@10, {title}",
    ("model", "seeds", "overall", "tail", "head", "gap, head − tail",
     "worst group"),
    [
      (
        line["model"], str(line["seeds"]),
        *(_ranged(line, key) for key in ("overall", "tail", "head")),
        _ranged(line, "gap", signed=True),
        f"group {line['worst_group']}: {_ranged(line, 'worst')}",
      )
      for line in levels
    ],
    note="A positive gap: tail users are served worse."
    + _UNTESTED * any(line["seeds"] < MIN_SEEDS for line in levels),
  ))  # fmt: skip
  return tables


def _of_seeds(job: Job, title: str) -> list[Block]:
  """Each seed's own changes, where there are several."""
  lines = [line for line in job.claims[title] if line["seeds"] > 1]
  if not lines:
    return []
  return [Table(
    f"Each seed's change of NDCG@10 in %, {title}",
    ("model", "tail", "head"),
    [
      (
        line["model"],
        *(
          ", ".join(map(percent, line[f"{part}_of_seeds"]))
          for part in ("tail", "head")
        ),
      )
      for line in lines
    ],
  )]  # fmt: skip


def _other_cutoffs(job: Job, title: str) -> Table:
  rows, column = job.results.rows, job.results.lists[title]
  parts = {
    "overall": pl.lit(True), "tail": pl.col("segment") == 0,
    "head": pl.col("segment") == 1,
  }
  lines = []
  for model in job.models:
    own = rows.filter(pl.col("model") == model)
    for name, keep in parts.items():
      ranks = own.filter(keep)[column].to_numpy()
      values = [
        metric(ranks, k).mean() if len(ranks) else math.nan
        for metric in (metrics.ndcg, metrics.hit_rate)
        for k in _CUTOFFS
      ]
      lines.append((model, name, *map(_level, values)))
  headers = [f"{name}@{k}" for name in ("NDCG", "HR") for k in _CUTOFFS]
  return Table(
    f"Means over users and seeds, {title}", ("model", "users", *headers),
    lines, left=2,
  )


def _gradients(results: Results, anchor: str) -> list[Block]:
  """Diagnostics of each method's group gradients, its seeds averaged."""
  together: dict[str, list[dict[str, Any]]] = {}
  for run, records in results.gradients.items():
    name = without_seed(run)
    together.setdefault(name, []).extend(r | {"run": name} for r in records)
  return [
    Fold(
      f"Group gradients of {run}",
      [
        Text(_gradient_words(records)),
        Figures(figures.gradients(records, run, f"{anchor}-gradients-{i}")),
      ],
    )
    for i, (run, records) in enumerate(together.items())
  ]


def _gradient_words(records: Sequence[Mapping[str, Any]]) -> str:
  conflicts = np.mean([r["conflict_rate"] for r in records])
  effective = np.mean([r["effective_groups"] for r in records])
  count = len(records[0]["norms"])
  cosines = np.asarray([r["cosines"] for r in records], np.float64)
  others = ~np.eye(count, dtype=bool)
  noise = plots.noise_of(records)
  beside = "what noise alone gives was not logged" if noise is None else (
    f"groups of as many windows dealt at random, which is what noise alone "
    f"gives, {100 * noise[0]:.1f} % and {noise[1]:.2f}"
  )
  return (
    f"Over {len(records):,} logged steps, {100 * conflicts:.1f} % of the pairs "
    f"of groups were in conflict (negative cosine), two groups' gradients had "
    f"a mean cosine of {np.nanmean(cosines[:, others]):.2f} ({beside}), and "
    f"the weights counted for {effective:.1f} of {count} groups."
  )


def _adjustment(results: Results) -> list[Block]:
  """Fit of the stratum classifiers, effective sample sizes of their weights."""
  if not results.adjustment:
    return []
  counts = range(len(results.adjustment[0]["effective_share"]))
  fit = "log_likelihood", "shares_log_likelihood", "calibration_error"
  lines = [
    (
      of_run["run"],
      *(_level(of_run.get(name, math.nan)) for name in fit),
      *(f"{share:.2f}" for share in of_run["effective_share"]),
    )
    for of_run in results.adjustment
  ]
  return [Fold("Exact adjustment", [Table(
    "Exact adjustment",
    ("run", "log P(d|x)", "log share", "calibration error",
     *(f"group {d}" for d in counts)),
    lines,
    note="Mean log-likelihood in nats of the users' groups under the fitted "
    "classifier and under the groups' shares, classwise calibration error, and "
    "of each group the effective number of its weighted examples over their "
    "number (mean over the steps).",
  )])]  # fmt: skip


def _closeness(results: Results) -> list[Block]:
  lines = results.summary.get("closeness")
  if not lines:
    return []
  keys = ("kl_interventional", "kl_observational", "ndcg")
  return [Table(
    "Distance from the simulator's exact distributions",
    ("model", "KL from P(y|do(x))", "KL from P(y|x)", "NDCG@10"),
    [(line["model"], *(f"{line[key]:.4f}" for key in keys)) for line in lines],
    note="KL in nats, lower is closer; NDCG@10 with the history not masked.",
  )]  # fmt: skip


def _cost(results: Results) -> list[Block]:
  """Steps, validation and processor time of each stage, seeds together."""
  stages: dict[str, list[Mapping[str, Any]]] = {}
  for run, cost in results.summary.get("cost", {}).items():
    stages.setdefault(without_seed(run), []).append(cost)
  if not stages:
    return []
  lines = []
  for stage, costs in stages.items():
    best = np.asarray([c["validation"] for c in costs], np.float64)
    when = np.asarray([c["best_steps"] for c in costs], np.float64)
    steps = [c["steps"] for c in costs]
    lines.append((
      stage, str(len(costs)), number_range(min(steps), max(steps)),
      ", ".join(f"{x:,.0f}" for x in when.mean(0)),
      ", ".join(_level(x) for x in best.mean(0)),
      f"{np.mean([c['cpu_seconds'] for c in costs]):,.0f}",
    ))
  total = sum(c["cpu_seconds"] for own in stages.values() for c in own)
  return [Table(
    "Training cost and validation",
    ("stage", "runs", "steps", "best step", "best validation NDCG@10",
     "CPU-seconds a run"),
    lines,
    note=f"Means over seeds; several numbers in a cell are one a segment. "
    f"{total:,.0f} CPU-seconds in all.",
  )]  # fmt: skip


def _trials(results: Results) -> list[Block]:
  """What was chosen on validation for each model, where anything was."""
  if not results.trials:
    return []
  tried = results.trials["settings"]
  names = [
    ", ".join(f"{key} {value}" for key, value in chosen.items())
    for chosen in tried
  ]
  seeds = sorted({s for own in results.trials["models"] for s in own["seeds"]})
  return [Table(
    "Settings tried, by validation NDCG@10",
    ("model", *names),
    [
      (
        own["model"],
        *(
          _level(value) + " (chosen)" * (i == own["chosen"])
          for i, value in enumerate(own["validation"])
        ),
      )
      for own in results.trials["models"]
    ],
    note=f"Mean over seed{'s' * (len(seeds) > 1)} "
    f"{', '.join(map(str, seeds))}. Values of different models may "
    "be of different users: models of one segment, and those whose plugins "
    "learn from validation targets.",
  )]  # fmt: skip


def _protocol(results: Results) -> list[Block]:
  blocks: list[Block] = [Text(f"Protocol: {results.protocol}.")]
  summary = results.summary
  for title, key in (("Reading", "notes"), ("Split", "split_notes")):
    facts = ", ".join(f"{k} {v}" for k, v in summary.get(key, {}).items())
    if facts:
      blocks.append(Text(f"{title}: {facts}."))
  if "prior" in summary:
    numbers = ", ".join(f"{p:.3f}" for p in summary["prior"])
    blocks.append(Text(f"P(d) of the groups, least active first: {numbers}."))
  if results.config:
    changed = changed_settings(results.config)
    blocks.append(Table(
      "Settings that differ from the defaults", ("setting", "value"),
      [(key, _setting(key, value)) for key, value in changed.items()], left=2,
    ))  # fmt: skip
  return blocks


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """Keys of a configuration whose value is not the default."""
  known = schema.canonical(default().to_dict())
  return {
    key: mine
    for key, mine, theirs in schema.differences(config, known, known)
    if mine != theirs and mine is not None
  }


def _setting(key: str, value: Any) -> str:
  """A setting as text; of a path the file's name alone."""
  if key in [f"data.{name}" for name in PATHS]:
    return pathlib.PurePath(value).name
  return json.dumps(value) if isinstance(value, list) else str(value)


def _origin(results: Results) -> list[Block]:
  summary = results.summary
  blocks: list[Block] = []
  if summary.get("command"):
    blocks.append(Code(summary["command"]))
  if summary.get("versions"):
    versions = (f"{k} {v}" for k, v in summary["versions"].items())
    blocks.append(Text(f"Computed with {', '.join(versions)}."))
  return blocks


def _windows(jobs: Sequence[Job]) -> Section | None:
  """Gap and changes over window length, where jobs differ in nothing else."""
  blocks: list[Block] = []
  for number, family in enumerate(_families(jobs), 1):
    shown = _window_figures(family, f"windows-{number}")
    blocks += [
      Figures(shown), Fold("All models", [_window_table(family)]),
    ]
  if not blocks:
    return None
  return Section("windows", "Window length", [
    Text(
      "A model that reads the whole history can tell how active a user is; "
      "one that reads a short window cannot. Above zero, tail users are "
      "served worse than head users."
    ),
    *blocks,
  ])  # fmt: skip


def _families(jobs: Sequence[Job]) -> Iterable[list[Job]]:
  """Jobs that differ in their window's length, shortest first.

  And in what follows it: windows a step, how they are packed, items that the
  memory looks up.
  """
  families: dict[str, dict[int, Job]] = {}
  for job in jobs:
    config = job.results.config
    if not config or job.results.trials:
      continue
    backbone = {**config["backbone"]}
    length = backbone.pop("length")
    backbone.pop("pack_rows", None)
    rest = {**config, "backbone": backbone, "data": _data(job.results)}
    rest["memory"] = {**rest["memory"], "recent": 0}
    for key in ("seeds", "num_seeds", "methods", "batch_size"):
      rest.pop(key)
    key = json.dumps([rest, job.base], sort_keys=True)
    families.setdefault(key, {})[length] = job
  for family in families.values():
    if len(family) > 1:
      yield [family[length] for length in sorted(family)]


def _window_figures(family: Sequence[Job], name: str) -> list[str]:
  """The gap, and the changes for tail and for head users."""
  first = family[0]
  models = [first.base]
  if first.chosen() is not None:
    models = list(
      dict.fromkeys([first.base, first.chosen()["model"], *first.models])
    )
  colors = dict(zip(models, figures.COLORS, strict=False))
  gaps = _over_windows(
    (job, line, "gap", 1) for job in family for line in job.levels[job.main]
  )
  data = f"{_data(first.results)}, {first.main}"
  few = [job.results.config["backbone"]["length"] for job in family if job.few]
  mark = few and f"\n(few seeds, nothing proven: {', '.join(map(str, few))})"
  shown = [figures.windows(
    gaps, colors, f"{name}-gap", title=f"Gap on {data}{mark or ''}",
    label="NDCG@10 of head − tail users",
  )]  # fmt: skip
  for part in ("tail", "head"):
    changes = _over_windows(
      (job, line | {part: line[f"{part}_change"]}, part, 100)
      for job in family for line in job.claims[job.main]
    )
    if changes:
      shown.append(figures.windows(
        changes, colors, f"{name}-{part}",
        title=f"Change for {part} users against {first.base}{mark or ''}",
        label="change of NDCG@10 (%)",
      ))  # fmt: skip
  return shown


def _over_windows(
  points: Iterable[tuple[Job, Mapping[str, Any], str, float]],
) -> dict[str, np.ndarray]:
  """Model -> [4, N]: length, estimate, low, high; of (job, line, key, unit)."""
  series: dict[str, list[list[float]]] = {}
  for job, line, key, unit in points:
    length = job.results.config["backbone"]["length"]
    numbers = [unit * line[k] for k in (key, f"{key}_low", f"{key}_high")]
    series.setdefault(line["model"], []).append([length, *numbers])
  return {model: np.transpose(points) for model, points in series.items()}


def _window_table(family: Sequence[Job]) -> Table:
  changes = {
    (job.results.name, line["model"]): line
    for job in family for line in job.claims[job.main]
  }
  lines = []
  for job in family:
    config = job.results.config
    for line in job.levels[job.main]:
      change = changes.get((job.results.name, line["model"]))
      lines.append((
        line["model"], str(config["backbone"]["length"]),
        str(config["batch_size"]), _ranged(line, "tail"),
        _ranged(line, "head"), _ranged(line, "gap", signed=True),
        *(
          interval_text(change, part) if change else ""
          for part in ("tail", "head")
        ),
      ))  # fmt: skip
  return Table(
    f"By window length, {_data(family[0].results)}, {family[0].main}",
    ("model", "window", "windows a step", "tail", "head", "gap, head − tail",
     "tail change %", "head change %"),
    lines, note=f"NDCG@10; changes against {family[0].base}."
    + _UNTESTED * any(job.few for job in family),
  )  # fmt: skip
