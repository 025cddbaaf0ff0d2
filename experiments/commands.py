"""Launching programs, and writing down how they were launched."""

import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from experiments.tables import MIN_SEEDS
from pin_jax.types import InputError

INTERRUPTED = 128 + signal.SIGINT  # as shells count


def launch(
  main: Callable[[Sequence[str]], int | None],
  config: flags.FlagHolder | None = None,
) -> None:
  """Parses flags and runs a program; bad input, or Ctrl-C, is one line.

  Args:
    main: function of the arguments that are no flags; returns the exit code,
      where it is not 2 for bad input or `INTERRUPTED` for Ctrl-C.
    config: the flag of a configuration file, where there is one.
  """
  parse = _parse if config is None else lambda argv: parse_with(argv, config)
  try:
    app.run(main, flags_parser=parse)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    text = " ".join(str(error).split())
    raise InputError(f"flags: {text}; see --help") from error


def parse_with(argv: Sequence[str], config: flags.FlagHolder) -> list[str]:
  """Parses flags of which one is a configuration.

  Args:
    argv: the command line.
    config: as ml_collections.config_flags defines it.

  Returns:
    The arguments that are no flags.

  Raises:
    InputError: for whatever is wrong with them, or with the configuration.
  """
  try:
    rest = flags.FLAGS(argv)
    config.value.keys()  # a file that cannot be loaded fails on access
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


def check_no_arguments(argv: Sequence[str]) -> None:
  """Raises InputError for words on the command line that are no flags."""
  if len(argv) > 1:
    raise InputError(f"unexpected arguments: {argv[1:]}; see --help")


def command_line(arguments: Sequence[str]) -> str:
  """A command to be pasted into a shell; values in double quotes."""
  return " ".join(map(_quoted, arguments))


def more_seeds(command: str, seeds: Sequence[int], *, swept: bool) -> str:
  """How to get the seeds that a verdict takes, as a command where it is known.

  Args:
    command: that ran the job, '' where nothing is known of it.
    seeds: that were trained.
    swept: whether the job is one of a sweep's models at their chosen settings.
  """
  others = [seed for seed in range(MIN_SEEDS + len(seeds)) if seed not in seeds]
  lacking = others[: max(MIN_SEEDS - len(seeds), 0)]
  if swept:
    numbers = ",".join(map(str, lacking))
    return f"python -m experiments.sweep … --more_seeds={numbers}"
  wanted = f"--config.seeds={(*seeds, *lacking)}"
  words, kept, workdir = iter(shlex.split(command)), [], "runs/job"
  for word in words:
    name, equals, value = word.partition("=")
    if name.lstrip("-") in ("workdir", "config.seeds"):
      value = value if equals else next(words, "")
      workdir = value if name.endswith("workdir") else workdir
    else:
      kept.append(word)
  if "experiments.main" not in kept:
    return f"run the job with {command_line([wanted])} in another workdir"
  new = f"--workdir={workdir.rstrip('/')}-{len(seeds) + len(lacking)}seeds"
  return command_line([*kept, new, wanted])


def _quoted(argument: str) -> str:
  name, equals, value = argument.partition("=")
  plain = shlex.quote(argument) == argument
  if plain or not equals or set(value) & set('"$`\\!'):
    return shlex.quote(argument)
  return f'{shlex.quote(name)}="{value}"'
