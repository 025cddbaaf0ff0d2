"""Trains the joint base and PIN on the same data and compares them.

  python -m experiments.main --config=experiments/configs/quickstart.py \
    --workdir=runs/quickstart

Any setting: --config.backbone.width=128; arguments of a config:
--config=experiments/configs/files.py:path=my.csv. Relaunching the same command
continues an interrupted job and reprints a finished one.
"""

import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.commands import command_line
from pin_jax.types import InputError, TrainingError

_DEFAULT = "experiments/configs/quickstart.py"
_CONFIG = config_flags.DEFINE_config_file(
  "config", None,
  f"Configuration file, with arguments after a colon (default {_DEFAULT}).",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the job; made where it is missing."
)
flags.mark_flag_as_required("workdir")


def main(_: list[str]) -> None:
  """Runs the job."""
  logging.set_verbosity(logging.WARNING)
  from experiments import job  # after the flags: importing jax takes seconds

  command = ["python", "-m", "experiments.main", *sys.argv[1:]]
  job.run(_CONFIG.value, _WORKDIR.value, command=command_line(command))


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; whatever is wrong with them becomes an InputError."""
  if not any(re.match("--?config(=|$)", argument) for argument in argv):
    argv = [argv[0], f"--config={_DEFAULT}", *argv[1:]]
  try:
    rest = flags.FLAGS(argv)
    _CONFIG.value.keys()  # a file that cannot be loaded fails on access
    return rest
  except (
    flags.Error, AttributeError, ImportError, KeyError, OSError, TypeError,
    ValueError,
  ) as error:
    unknown = isinstance(error, AttributeError | KeyError)
    kind = "unknown config key" if unknown else "flags:"
    raise InputError(f"{kind} {_in_one_line(str(error))}") from error


def _in_one_line(message: str) -> str:
  """The flag library's message without the tracebacks it may hold."""
  marker = f"{InputError.__name__}: "
  if marker in message:
    return message.rsplit(marker, 1)[1].strip()  # raised by a config file
  lines = [x.strip() for x in message.strip("\"' \n").splitlines()]
  if "Traceback" in message:
    lines = [lines[0], lines[-1]]
  text = " ".join(filter(None, lines)).replace("\\'", "'").replace("\\n", " ")
  return f"{text}; see --help"


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
