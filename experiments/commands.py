"""Launching programs: flags, exit codes, signals."""

import ast
import contextlib
import os
import pathlib
import re
import select
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import rich.console
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from experiments import processes
from pin_jax.types import InputError, Interrupted, TrainingError

SAVED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
_CONFIGS = "experiments/configs"
GRACE = 8.0  # seconds from a signal to the exit, saved or not
CODES = {
  InputError: 2, TrainingError: 3, OSError: 3, MemoryError: 3,
  jax.errors.JaxRuntimeError: 3, processes.Lost: processes.LOST,
  Interrupted: SAVED,
}
_FULL = "RESOURCE_EXHAUSTED"  # what JAX says where memory is
_PLACE = re.compile(r"\b([a-z][a-z0-9+.-]*)://[^,\s]*")


class Console(rich.console.Console):
  """Prints text as it is: no markup, no emoji, no colours by content."""

  def __init__(self, **options: Any) -> None:
    """Standard output, unless the options say otherwise."""
    plain = {"markup": False, "emoji": False, "highlight": False}
    super().__init__(**{"soft_wrap": True, **plain, **options})

  def on_broken_pipe(self) -> None:
    """Leaves a closed pipe to the launcher."""
    raise BrokenPipeError


class _OrNone(flags.ArgumentParser):
  """Reads None, or what another parser does; of several flags the last."""

  def __init__(self, parser: flags.ArgumentParser) -> None:
    self._parser = parser

  def parse(self, argument: Any) -> Any:
    """The value."""
    return None if argument == "None" else self._parser.parse(argument)

  def flag_type(self) -> str:
    """For --help."""
    return self._parser.flag_type()


class _Several(config_flags.tuple_parser.TupleParser):
  """Reads (0, 1) and ('base', 'pin'), and base,pin without quotes too."""

  def parse(self, argument: Any) -> tuple:
    """The tuple."""
    if isinstance(argument, str) and not set(argument) & set("()[]{}'\""):
      words = filter(None, map(str.strip, argument.split(",")))
      return tuple(map(_literal, words))
    return super().parse(argument)


def _literal(word: str) -> Any:
  """The number that a word is, else the word."""
  try:
    return ast.literal_eval(word)
  except (SyntaxError, ValueError):
    return word


for _kind, _parser in (
  (int, flags.IntegerParser()), (float, flags.FloatParser()),
  (str, flags.ArgumentParser()), (bool, flags.BooleanParser()),
  (tuple, _Several()),
):
  config_flags.register_flag_parser_for_type(_kind, _OrNone(_parser))


def launch(
  main: Callable[[Sequence[str]], int | None],
  config: flags.FlagHolder | None = None,
  *,
  words: bool = False,
  default: str | None = None,
) -> None:
  """Parses flags and runs a program; every bad end is one line and its code.

  Args:
    main: function of the program's name and its words; returns the exit code.
    config: the flag of a configuration file, where there is one.
    words: whether the program takes arguments that are no flags.
    default: configuration file where none is given.
  """
  parse = lambda argv: parse_with(argv, config, default)

  def checked(argv: Sequence[str]) -> int | None:
    if len(argv) > 1 and not words:
      raise InputError(f"unexpected arguments: {argv[1:]}; see --help")
    return main(argv)

  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  if hasattr(sys.stdout, "reconfigure"):  # a name may be beyond its encoding
    sys.stdout.reconfigure(errors="backslashreplace")
  if {x.strip("-") for x in sys.argv[1:] if x.startswith("-")} & {"h", "help"}:
    print(_help())
    sys.exit(0)
  keep_programs()
  try:
    code = exit_code(lambda: app.run(checked, flags_parser=parse))
    if code == processes.LOST:  # the runtime would wait for the others
      os._exit(code)
    sys.exit(code)
  except KeyboardInterrupt:
    print("interrupted; the same command starts it again", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)  # as shells count


def _help() -> str:
  """What the program says of itself, and its flags."""
  known = [
    flag for module, own in flags.FLAGS.flags_by_module_dict().items()
    for flag in own
    if module.startswith((sys.argv[0], "third_party")) or flag.name == "config"
  ]
  lines = [sys.modules["__main__"].__doc__.strip(), "", "Flags:"]
  for flag in sorted(known, key=lambda flag: flag.name):
    text = f"--{flag.name}  {flag.help.strip()}"
    if flag.default not in (None, False) and "default" not in text:
      text = f"{text.removesuffix('.')} (default {flag.default})"
    lines.append(textwrap.fill(
      text, 80, initial_indent="  ", subsequent_indent="    "
    ))
  return "\n".join([*lines, "", "docs/keys.md lists the settings of a job."])


def keep_programs() -> None:
  """Keeps compiled programs on disk for the next launch, up to 2 GB.

  They go to `pin_jax` in the user's cache directory, by the number of usable
  cores, which their results depend on. What JAX's own variables say holds
  instead: JAX_COMPILATION_CACHE_DIR names another directory, and
  JAX_ENABLE_COMPILATION_CACHE=False switches this off.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder = pathlib.Path(root, "pin_jax", f"{processes.usable_cores()}_cores")
  for name, value in (
    ("jax_compilation_cache_dir", os.fspath(folder)),
    ("jax_compilation_cache_max_size", 2**31),
    ("jax_persistent_cache_min_compile_time_secs", 0.1),
  ):
    if name.upper() not in os.environ:
      jax.config.update(name, value)


@contextlib.contextmanager
def noticed(grace: float = GRACE) -> Iterator[Callable[[], bool]]:
  """Notes SIGTERM and SIGINT while the block runs; for the main thread alone.

  A thread is woken even while the main one compiles or computes; after `grace`
  seconds it ends the process, and the newest checkpoint stands. A second SIGINT
  does so at once.

  Yields:
    A function: whether the signal has come.
  """
  signals = signal.SIGTERM, signal.SIGINT
  came, over = threading.Event(), threading.Event()
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch() -> None:
    while (number := os.read(reader, 1)[0]) not in signals:
      if over.is_set():
        return
    came.set()
    if number == signal.SIGINT:
      print(
        "\nsaving; Ctrl-C again ends at once", file=sys.stderr, flush=True
      )
    limit = time.monotonic() + grace
    while not over.is_set() and (left := limit - time.monotonic()) > 0:
      ready, _, _ = select.select([reader], [], [], left)
      if ready and os.read(reader, 1)[0] == signal.SIGINT:
        break
    if not over.is_set():
      print(
        "interrupted while busy; the same command continues from the last "
        "checkpoint", file=sys.stderr, flush=True,
      )
      os._exit(SAVED)

  before = {
    number: signal.signal(number, lambda *_: came.set()) for number in signals
  }
  awake = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=watch, daemon=True).start()
  try:
    yield came.is_set
  finally:
    over.set()
    signal.set_wakeup_fd(awake)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.write(writer, b"\0")
    os.close(writer)


def exit_code(action: Callable[[], None]) -> int:
  """Runs an action; an error of CODES becomes one line and its code, else 0."""
  try:
    try:
      action()
    finally:
      if sys.stdout:
        sys.stdout.flush()
  except tuple(CODES) as error:
    text = " ".join(str(error).splitlines())
    full = isinstance(error, MemoryError) or _FULL in text
    if isinstance(error, jax.errors.JaxRuntimeError) and not full:
      raise
    if any(re.fullmatch("--?debug(=true)?", x) for x in sys.argv):
      traceback.print_exc()
    if full:
      text = (
        f"memory is full ({text[:200]}); lower batch_size, loss.negatives, "
        "num_seeds or backbone.width"
      )
    if isinstance(error, BrokenPipeError):
      text = "standard output was closed before all was written to it"
    code = next(CODES[kind] for kind in CODES if isinstance(error, kind))
    again = "; the same command continues" * (code == SAVED)
    print(f"error: {text}{again}", file=sys.stderr)
    try:  # what cannot be written to standard output is no second error
      if sys.stdout:
        sys.stdout.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
  return 0


def parse_with(
  argv: Sequence[str], config: flags.FlagHolder | None = None,
  default: str | None = None,
) -> list[str]:
  """Parses flags, of which one may be a configuration; see `launch`.

  Returns:
    The arguments that are no flags.

  Raises:
    InputError: for whatever is wrong with them, or with the configuration.
  """
  for argument in argv[1:]:
    _check_argument(argument)
  argv = list(argv)
  if default and not any(re.match("--?config(=|$)", x) for x in argv):
    argv.insert(1, f"--config={default}")
  for place in range(1, len(argv)):
    flag = re.match("--?config=", argv[place])
    if flag or re.fullmatch("--?config", argv[place - 1]):
      start = flag.end() if flag else 0
      argv[place] = argv[place][:start] + config_file(argv[place][start:])
  try:
    rest = flags.FLAGS(argv)
    if config is not None:
      config.value.keys()  # a file that cannot be loaded fails on access
    return rest
  except (
    flags.Error, AttributeError, ImportError, KeyError, OSError, SyntaxError,
    TypeError, ValueError,
  ) as error:
    kind, text = "flags:", str(error)
    if isinstance(error, AttributeError | KeyError):
      why = error.args[0]  # or what it was raised for
      kind, text = "unknown config key", str(getattr(why, "args", [why])[0])
    raise InputError(f"{kind} {_in_one_line(text)}") from error


def config_file(text: str) -> str:
  """A configuration's file and argument, of a path or of a shipped one's name.

  Args:
    text: such as mine.py, quickstart, or files:path=my.csv; a shipped file is
      found from any folder, as experiments/configs/files.py too.

  Raises:
    InputError: if it is neither.
  """
  name, colon, argument = text.partition(":")
  path, folder = pathlib.Path(name), pathlib.Path(__file__).parent / "configs"
  if path.is_file():
    return text
  shipped = {file.stem: file for file in sorted(folder.glob("[a-z]*.py"))}
  del shipped["base"]  # what they share
  file = shipped.get(path.name.removesuffix(".py"))
  if file is None or os.fspath(path.parent) not in (".", _CONFIGS):
    raise InputError(
      f"--config={name} is no file here and not shipped; give a path or one of "
      f"{[*shipped]}"
    )
  return f"{file}{colon}{argument}"


def _check_argument(argument: str) -> None:
  """Raises InputError for nothing, or for a place that cannot be reached."""
  if re.fullmatch(r"(--?[\w.]+=)?", argument):
    raise InputError(
      f"argument {argument!r} is empty, as an unset shell variable is; give a "
      "value or leave it out"
    )
  place = _PLACE.search(argument)
  if place:
    try:
      epath.Path(place[0]).exists()
    except (ImportError, KeyError) as error:
      raise InputError(
        f"{argument}: {place[1]}:// cannot be reached ({error}); give a local "
        "path"
      ) from error


def _in_one_line(message: str) -> str:
  """The flag library's message without the tracebacks it may hold."""
  marker = f"{InputError.__name__}: "
  if marker in message:
    return message.rsplit(marker, 1)[1].strip()  # raised by a config file
  lines = [line.strip() for line in message.strip().splitlines()]
  if "Traceback" in message:
    lines = [lines[0], lines[-1]]
  return f"{' '.join(filter(None, lines))}; see --help"
