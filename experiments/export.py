"""Writes what a finished job trained into one portable file.

  python -m experiments.export --workdir=DIR --method=pin --output=model.pin

`pin_jax.serving.load` reads it, and experiments.recommend takes it as --model;
docs/serving.md has its layout.
"""

from collections.abc import Sequence

import rich.console
from absl import flags, logging
from etils import epath

from experiments import commands, finished
from pin_jax import disk, serving
from pin_jax.types import InputError


def export(
  directory: epath.PathLike,
  output: epath.PathLike,
  *,
  method: str = "pin",
  seed: int = 0,
  console: rich.console.Console,
) -> None:
  """Exports a method of a finished job.

  Args:
    directory: the job's workdir.
    output: the file to write.
    method: one of the job's.
    seed: one of the job's.
    console: where to print.

  Raises:
    InputError: if the job is not finished or has no such method or seed.
    WriteError: if the file cannot be written; it is then as it was.
  """
  output = disk.place("output", output)
  if not output.parent.is_dir() or output.is_dir():
    raise InputError(
      f"--output={output} is no file in a directory that exists; make its "
      "directory or name another file"
    )
  made = finished.recommender(directory, method=method, seed=seed)
  serving.save(made, output)
  console.print(
    f"{method}, seed {seed}, of {directory}: {len(made.users.ids):,} users, "
    f"{len(made.item_ids):,} items, {output.stat().length:,} bytes in {output}",
    markup=False, soft_wrap=True,
  )


def _main(_: Sequence[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  values = flags.FLAGS
  export(
    values.workdir, values.output, method=values.method, seed=values.seed,
    console=commands.Console(),
  )


def _launch() -> None:
  flags.DEFINE_string("workdir", None, "directory of the job", required=True)
  flags.DEFINE_string("output", None, "file to write", required=True)
  flags.DEFINE_string("method", "pin", "one of the job's methods")
  flags.DEFINE_integer("seed", 0, "one of the job's seeds")
  commands.launch(_main)


if __name__ == "__main__":
  _launch()
