"""Trains the joint base and PIN on the same data and compares them.

  python -m experiments.main --config=files:path=my.csv --workdir=runs/mine

A configuration is named by its path or, where it is shipped, by its name, with
its arguments after a colon. Any setting: --config.backbone.width=128. The same
command continues an interrupted job and reprints a finished one.

On several hosts, the same on each, with a mesh over all their devices and a
workdir that all of them see: --distributed where SLURM, Open MPI, Kubernetes or
a TPU pod says who they are, else

  --config.mesh.data=16 --coordinator=HOST:1234 --num_processes=2 --process_id=0

Exit codes: 0 finished, 2 bad input, 3 training or writing failed, or memory was
full, 4 another process lost, 75 interrupted by SIGTERM or Ctrl-C after saving.
After the last two the same command continues.
"""

import contextlib
import functools
import shlex
import sys

from absl import flags, logging
from ml_collections import config_flags

from experiments import commands, processes

DEFAULT = "quickstart"
CONFIG = config_flags.DEFINE_config_file(
  "config", None,
  f"Configuration, with arguments after a colon (default {DEFAULT}).",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the job; made where it is missing."
)
_STAGES = flags.DEFINE_string(
  "stages", None,
  "Directory of trained stages that several jobs share; the workdir's own "
  "where it is not given.",
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
_NUM_PROCESSES, _PROCESS_ID, _HEARTBEAT = (
  flags.DEFINE_integer(
    name, default, meaning, lower_bound=least, upper_bound=10**6
  )
  for name, default, meaning, least in (
    ("num_processes", None, "How many there are; with --coordinator.", 1),
    ("process_id", None, "Which one this is, from 0; with --coordinator.", 0),
    ("heartbeat", processes.Place().heartbeat,
     "Seconds without a sign of life until another process is lost.", 1),
  )
)
flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
flags.mark_flag_as_required("workdir")


def main(_: list[str]) -> None:
  """Runs the job, alone or with other processes."""
  logging.set_verbosity(logging.WARNING)
  place = processes.Place(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value,
    _HEARTBEAT.value,
  )
  processes.check_place(place)
  command = ["python", "-m", "experiments.main", *sys.argv[1:]]
  with contextlib.ExitStack() as stack:
    if _DISTRIBUTED.value or place.coordinator:
      stack.enter_context(processes.joined(place))
    interrupted = stack.enter_context(commands.noticed())
    from experiments import api, job  # after the flags, for they take seconds

    run = functools.partial(
      job.run, command=shlex.join(command), interrupted=interrupted,
      stages=_STAGES.value, other_versions=_OTHER_VERSIONS.value,
    )
    api.compare(CONFIG.value, _WORKDIR.value, run=run)


if __name__ == "__main__":
  commands.launch(main, CONFIG, default=DEFAULT)
