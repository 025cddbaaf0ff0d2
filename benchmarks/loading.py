"""Times the loading of a large Parquet file, and its peak memory.

Writes a temporary file of long-tailed users in random row order, loads it in a
fresh process, and prints seconds and the peak resident memory of that process,
imports included:

    python -m benchmarks.loading --interactions=10000000

10 million interactions must load in less than 30 s and 2 GB. What is there
already, such as a directory that `experiments.store` made, is measured by
itself (pages of a mapped file count as resident, though they can be dropped):

    python -m benchmarks.loading --load=DIR
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import polars as pl


def main() -> None:
  """Runs the benchmark, or, with --load, one measured load."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--interactions", type=int, default=10_000_000)
  parser.add_argument("--items", type=int, default=100_000)
  parser.add_argument("--string_ids", action="store_true")
  parser.add_argument("--load", help="measure this file or directory")
  args = parser.parse_args()
  if args.load:
    print(json.dumps(measure(args.load), indent=2))
    return
  with tempfile.TemporaryDirectory() as directory:
    path = str(pathlib.Path(directory) / "interactions.parquet")
    write(path, args.interactions, args.items, args.string_ids)
    command = [sys.executable, "-m", "benchmarks.loading", f"--load={path}"]
    subprocess.run(command, check=True)


def write(path: str, rows: int, items: int, string_ids: bool) -> None:
  """Writes interactions whose users and items follow a long tail."""
  rng = np.random.default_rng(0)
  frame = pl.DataFrame({
    "user_id": _long_tailed(rng, rows, max(rows // 20, 1)),
    "item_id": _long_tailed(rng, rows, items),
    "timestamp": rng.integers(1_500_000_000, 1_600_000_000, rows),
  })
  if string_ids:
    frame = frame.with_columns(
      pl.format("{}{}", pl.lit(name), pl.col(name).cast(pl.String).str.zfill(9))
      .alias(name)
      for name in ("user_id", "item_id")
    )
  frame.write_parquet(path, row_group_size=1_000_000)


def measure(path: str) -> dict[str, float | int]:
  """Loads the file; returns seconds and peak memory of this process."""
  start = time.perf_counter()
  from pin_jax.data import files, stored

  imported = time.perf_counter()
  is_stored = (pathlib.Path(path) / "about.json").exists()
  data = stored.read(path) if is_stored else files.read(path)
  loaded = time.perf_counter()
  peak = peak_memory()
  data.fingerprint  # noqa: B018
  return {
    "import_seconds": round(imported - start, 2),
    "load_seconds": round(loaded - imported, 2),
    "fingerprint_seconds": round(time.perf_counter() - loaded, 2),
    "peak_gigabytes": round(peak / 1e9, 3),
    "num_users": data.num_users,
    "num_items": data.num_items,
    "num_interactions": data.num_interactions,
    "longest": int(data.lengths.max()),
  }


def peak_memory() -> int:
  """Returns the largest resident memory of this process so far, in bytes.

  Linux only. getrusage would not do: a child inherits its parent's maximum.
  """
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def _long_tailed(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
  """Returns ids in 0..count-1 with Zipf-like, shuffled frequencies."""
  # Inverse of the distribution function of a density ~ 1 / (rank + 10).
  low, high = np.log(10), np.log(count + 10)
  ranks = np.exp(rng.uniform(low, high, rows)) - 10
  return rng.permutation(count)[np.minimum(ranks.astype(np.int64), count - 1)]


if __name__ == "__main__":
  main()
