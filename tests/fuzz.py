"""Coverage-guided fuzzing of the text readers, for a bounded time.

  python -m tests.fuzz --seconds=60

Feeds mutated .inter and .csv files to the readers; whatever is raised but an
InputError of one line, or whatever hangs, ends the run with the input that did
it in the directory --artifacts. Needs atheris, which is in the extra 'dev'.
"""

import argparse
import pathlib
import sys
import tempfile

import atheris

with atheris.instrument_imports(include=["pin_jax"]):
  from pin_jax.data import files
  from pin_jax.types import InputError

SEEDS = {
  "inter": b"user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3.5\n",
  "csv": b'user,item,date\n"a, b",7,2024-01-02\n,x,2024-01-02T03:04:05Z\n',
  "tsv": b"uid\tiid\tts\n007\t8\t9\n\t\t\n",
}
OPTIONS = ({}, {"k_core": 2}, {"duplicates": "last"}, {"max_history": 1})


def feed(path, data):
  """Reads bytes as a file; the first byte picks the format and options."""
  kind = data[0] if data else 0
  file = path / f"input.{tuple(SEEDS)[kind % len(SEEDS)]}"
  file.write_bytes(data[1:])
  try:
    got = files.read(file, **OPTIONS[kind // len(SEEDS) % len(OPTIONS)])
  except InputError as error:
    if "\n" in str(error).replace(str(file), ""):
      raise RuntimeError(f"more than one line: {error}") from error
    return
  if not got.num_interactions == got.offsets[-1] == len(got.items) > 0:
    raise RuntimeError("rows were lost")


def fuzz(seconds, artifacts):
  """Runs until the time is over; the process then exits."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz"))
  corpus = folder / "corpus"
  corpus.mkdir()
  for kind, (name, data) in enumerate(SEEDS.items()):
    (corpus / name).write_bytes(bytes([kind]) + data)
  arguments = [
    sys.argv[0], f"-max_total_time={seconds}", f"-artifact_prefix={artifacts}/",
    "-timeout=20", "-max_len=512", "-print_final_stats=1", str(corpus),
  ]
  atheris.Setup(arguments, lambda data: feed(folder, data))
  atheris.Fuzz()


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--seconds", type=int, default=60)
  parser.add_argument("--artifacts", default=tempfile.gettempdir())
  options = parser.parse_args()
  fuzz(options.seconds, options.artifacts)
