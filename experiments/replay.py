"""Takes a step again that was not finite, from what the job saved of it.

  python -m experiments.replay --workdir=DIR

reads DIR/checkpoints/non_finite/, where a job stopped with the state before
the step at fault, and prints the log of that step, beside what it was then, and
the parameters that are not finite after it.
"""

import io
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
import rich.console
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from experiments import commands, logs, settings, workdir
from experiments.configs.base import default
from experiments.methods import Stage, selected, stages_of
from experiments.problem import make_problem
from experiments.trainer import Trainer, networks_of
from pin_jax import checkpoints
from pin_jax.types import InputError, PyTree


def replay(directory: epath.PathLike, console: rich.console.Console) -> None:
  """Takes the step of a workdir's dump again and prints what it gives.

  Args:
    directory: the workdir of a job that stopped at a number not finite.
    console: where to print.

  Raises:
    InputError: if the workdir holds no dump, or not a whole one.
  """
  directory = epath.Path(directory)
  dumps = directory / "checkpoints" / "non_finite"
  if not dumps.exists():
    raise InputError(
      f"--workdir={directory} holds no step to take again; name the workdir "
      "of a job that stopped at a number that is not finite"
    )
  with workdir.held(directory), tempfile.TemporaryDirectory() as folder:
    stage, trainer = _stage_of(directory, dumps, epath.Path(folder))
    run = trainer.prepare(stage)
    state, operands = trainer.start(run), trainer.operands(stage, run)
    best = state.params if state.average is None else state.average
    store = checkpoints.Checkpoints(
      dumps / trainer.directory(stage), tables=trainer.tables
    )
    (state, _), record = store.restore((state, best))
    step = store.steps()[-1]
    store.close()
    new, log = jax.jit(trainer.step(run))(state, operands, np.int32(step))
  console.print(f"{stage.name}: step {step} of {directory}", markup=False)
  _print_log(log, record["log"], console)
  _print_params(new.params, console)


def _stage_of(
  directory: epath.Path, dumps: epath.Path, scratch: epath.Path
) -> tuple[Stage, Trainer]:
  """The stage of the dump, with a trainer that read those before it."""
  config = settings.read_json(directory / "config.json")["config"]
  config = ConfigDict({**config, "mesh": default().mesh})  # one device
  settings.check(config)
  problem = make_problem(config)
  networks = networks_of(config, problem)
  silent = rich.console.Console(file=io.StringIO())
  for first in range(0, len(config.seeds), config.num_seeds):
    trainer = Trainer(
      config, problem, networks, directory,
      tuple(config.seeds[first : first + config.num_seeds]),
      logs.RunLog(scratch), logs.JobProgress(1, silent),
    )
    for stage in stages_of(selected(config)):
      if (dumps / trainer.directory(stage)).exists():
        return stage, trainer
      trainer.train(stage)
  raise InputError(f"{dumps} holds no stage of the config; delete it")


def _print_log(
  log: dict[str, jax.Array], then: dict, console: rich.console.Console
) -> None:
  for key in sorted(log):
    value = np.asarray(log[key])
    same = np.array_equal(value, np.asarray(then[key]), equal_nan=True)
    note = "as then" if same else f"then {then[key]}"
    console.print(f"  {key}: {value.tolist()} ({note})", markup=False)


def _print_params(params: PyTree, console: rich.console.Console) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    bad = int((~np.isfinite(leaf)).sum())
    if bad:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      console.print(f"  {name}: {bad:,} of {leaf.size:,} are not finite")


def _main(_: Sequence[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  replay(flags.FLAGS.workdir, commands.Console())


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "directory of the job", required=True)
  commands.launch(_main)
