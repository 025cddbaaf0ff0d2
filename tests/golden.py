"""Jobs whose results may not change: compared with tests/golden.json.

  python -m tests.golden            # all of them, or those that are named
  python -m tests.golden --write    # after a change that is meant

Each job gives the losses of its first steps (equal to 1e-4) and every user's
rank under every method (equal for 98 % of the users: a tie that rounding breaks
otherwise moves a rank).
"""

import io
import json
import os
import pathlib
import sys
import tempfile

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
import rich.console  # noqa: E402
from etils import epath  # noqa: E402

from experiments import job  # noqa: E402
from experiments.logs import read_log  # noqa: E402
from tests import tiny  # noqa: E402

FILE = pathlib.Path(__file__).with_suffix(".json")
LOSSES = 3  # first steps of each stage
JOBS = {
  "base_and_pin": {"pin.diagnose_every": 3},
  "pin_exact": {"methods": ("base", "pin_exact")},
  "rules": {"methods": ("base", "pcgrad", "group_dro", "consensus")},
  "gated": {
    "methods": ("base_validation", "memory_alone", "joint_shared", "pin"),
    "plugin.name": "gated", "pin.plugin_draw": "validation",
    "memory.recent": 3, "memory.relations": ("cosine", "two_step", "linear"),
  },
  "refit": {
    "methods": ("base", "pin"), "plugin.name": "gated", "refit": 10,
    "pin.plugin_draw": "validation", "memory.recent": 3,
  },
  "sampled": {
    "loss.name": "sampled_softmax", "loss.negatives": 9,
    "loss.proposal": "in_batch:0.5,popularity:0.5",
  },
  "packed": {"backbone.pack_rows": 4},
  "gru4rec": {"backbone.name": "gru4rec", "backbone.blocks": 2},
  "mesh": {"mesh.model": 2},
  "seeds": {"seeds": (0, 1), "num_seeds": 2},
}


def run(name: str) -> dict:
  """The first losses and the ranks of a job, as JSON."""
  config = tiny.get_config()
  config.backbone_steps, config.plugin_steps = 20, 10
  config.classifier_steps = 10
  config.update_from_flattened_dict(JOBS[name])
  with tempfile.TemporaryDirectory() as folder:
    console = rich.console.Console(file=io.StringIO())
    job.run(config, epath.Path(folder) / "w", console)
    rows = pl.read_parquet(pathlib.Path(folder) / "w" / "rows.parquet")
    log = read_log(epath.Path(folder) / "w")
  losses: dict[str, list] = {}
  for record in log:
    if "loss" in record and record["step"] <= LOSSES:
      losses.setdefault(record["run"], []).append(record["loss"])
  ranks = {
    f"{model}, seed {seed}": own.sort("user")["rank"].to_list()
    for (model, seed), own in rows.group_by("model", "seed")
  }
  return {"losses": losses, "ranks": ranks}


def differences(got: dict, want: dict) -> list[str]:
  """What of a job is not as it was."""
  wrong = []
  for part, same in (
    ("losses", lambda a, b: np.allclose(a, b, rtol=1e-4)),
    ("ranks", lambda a, b: np.mean(np.equal(a, b)) >= 0.98),
  ):
    wrong += [
      f"{part} of {key}" for key in sorted(got[part].keys() | want[part].keys())
      if np.shape(got[part].get(key)) != np.shape(want[part].get(key))
      or not same(got[part][key], want[part][key])
    ]
  return wrong


def main(arguments: list[str]) -> int:
  """Runs jobs; compares, or writes, what they give."""
  write = "--write" in arguments
  names = [x for x in arguments if x != "--write"] or [*JOBS]
  known = json.loads(FILE.read_text()) if FILE.exists() else {}
  bad = 0
  for name in names:
    got = json.loads(json.dumps(run(name)))
    if write:
      known[name] = got
      continue
    wrong = differences(got, known[name])
    bad += bool(wrong)
    print(f"{name}: {'; '.join(wrong) or 'as it was'}", flush=True)
  if write:
    FILE.write_text(json.dumps(known, separators=(",", ":")) + "\n")
  return bad


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
