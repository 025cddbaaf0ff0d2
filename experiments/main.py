"""Trains the joint base and PIN on the same data and compares them.

  python -m experiments.main --config=experiments/configs/quickstart.py \
    --workdir=runs/quickstart

Any setting: --config.backbone.width=128; arguments of a config:
--config=experiments/configs/files.py:path=my.csv. Relaunching the same command
continues an interrupted job and reprints a finished one.

On several hosts, the same on each, with a mesh over all their devices and a
workdir that all of them see: --distributed where SLURM, Open MPI, Kubernetes or
a TPU pod says who they are, else

  … --config.mesh.data=16 --coordinator=10.0.0.1:1234 --num_processes=2 \
    --process_id=0

Exit codes: 0 finished, 2 bad input, 3 training or writing failed, or memory was
full, 4 another process lost, 75 interrupted by SIGTERM or Ctrl-C after saving.
After 4 and 75 the same command continues.
"""

import re
import sys

from absl import flags, logging
from ml_collections import config_flags

from experiments import commands, processes

_DEFAULT = "experiments/configs/quickstart.py"
_CONFIG = config_flags.DEFINE_config_file(
  "config", None,
  f"Configuration file, with arguments after a colon (default {_DEFAULT}).",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the job; made where it is missing."
)
_OTHER_VERSIONS = flags.DEFINE_bool(
  "other_versions", False,
  "Continue what other versions of the libraries, or another kind of device, "
  "began; results may then differ in their last bits.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False,
  "Join the job's other processes, which the environment names.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Join those of the first process, host:port."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many there are; with --coordinator."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which one this is, from 0; with --coordinator."
)
_HEARTBEAT = flags.DEFINE_integer(
  "heartbeat", processes.Place().heartbeat,
  "Seconds without a sign of life until another process is lost.",
)
_PATIENCE = flags.DEFINE_integer(
  "patience", processes.Place().patience,
  "Seconds to wait at the start for the other processes.",
)
flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
flags.mark_flag_as_required("workdir")


def main(_: list[str]) -> None:
  """Runs the job, alone or with other processes."""
  logging.set_verbosity(logging.WARNING)
  place = processes.Place(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value,
    _HEARTBEAT.value, _PATIENCE.value,
  )
  processes.check_place(place)
  if not (_DISTRIBUTED.value or place.coordinator):
    _run()
    return

  with processes.joined(place):
    _run()


def _run() -> None:
  from experiments import interruption

  command = ["python", "-m", "experiments.main", *sys.argv[1:]]
  with interruption.noticed() as interrupted:
    from experiments import job  # after the flags: importing jax takes seconds

    job.run(
      _CONFIG.value, _WORKDIR.value, command=commands.command_line(command),
      other_versions=_OTHER_VERSIONS.value, interrupted=interrupted,
    )


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; whatever is wrong with them becomes an InputError."""
  if not any(re.match("--?config(=|$)", argument) for argument in argv):
    argv = [argv[0], f"--config={_DEFAULT}", *argv[1:]]
  return commands.parse_with(argv, _CONFIG)


def launch() -> None:
  """Entry point; every exit but a finished job's is one line."""
  commands.launch(main, parse=_parse)


if __name__ == "__main__":
  launch()
