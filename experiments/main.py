"""Trains the joint base and PIN on the same data and compares them.

  python -m experiments.main --config=experiments/configs/quickstart.py \
    --workdir=runs/quickstart

Any setting: --config.backbone.width=128; arguments of a config:
--config=experiments/configs/files.py:path=my.csv. Relaunching the same command
continues an interrupted job and reprints a finished one.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from pin_jax.types import InputError, TrainingError

_CONFIG = config_flags.DEFINE_config_file(
  "config", "experiments/configs/quickstart.py",
  "Configuration file, with arguments after a colon.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the job; made where it is missing."
)
flags.mark_flag_as_required("workdir")


def main(_: list[str]) -> None:
  """Runs the job."""
  from experiments import job  # after the flags: importing jax takes seconds

  job.run(_CONFIG.value, _WORKDIR.value)


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except InputError:
    raise
  except (
    flags.Error, AttributeError, ImportError, KeyError, OSError, TypeError,
    ValueError,
  ) as error:
    lines = str(error).strip().strip('"').splitlines() or [repr(error)]
    raise InputError(f"flags: {' '.join(lines)[:400]}; see --help") from error


def launch() -> None:
  """Entry point: exit code 2 for bad input, 3 where training fails."""
  try:
    app.run(main, flags_parser=_parse)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except TrainingError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(3)


if __name__ == "__main__":
  launch()
