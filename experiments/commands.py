"""Launching programs, and writing down how they were launched."""

import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from pin_jax.types import InputError

INTERRUPTED = 128 + signal.SIGINT  # as shells count


def launch(main: Callable[[Sequence[str]], int | None]) -> None:
  """Parses flags and runs a program; bad input, or Ctrl-C, is one line.

  Args:
    main: function of the arguments that are no flags; returns the exit code,
      where it is not 2 for bad input or `INTERRUPTED` for Ctrl-C.
  """
  try:
    app.run(main, flags_parser=_parse)
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


def command_line(arguments: Sequence[str]) -> str:
  """A command to be pasted into a shell; values in double quotes."""
  return " ".join(map(_quoted, arguments))


def _quoted(argument: str) -> str:
  name, equals, value = argument.partition("=")
  plain = shlex.quote(argument) == argument
  if plain or not equals or set(value) & set('"$`\\!'):
    return shlex.quote(argument)
  return f'{shlex.quote(name)}="{value}"'
