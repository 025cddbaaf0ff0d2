"""Times the loading of a large Parquet file, and its peak memory.

Writes a temporary file of long-tailed users in random row order, loads it in a
fresh process, and prints seconds and the peak resident memory of that process,
imports included:

    python -m benchmarks.loading --interactions=10000000

10 million interactions must load in less than 30 s and 2 GB. What is there
already, such as 100 million from `experiments.simulate` (at most 4 GB; from the
form 'stored', which leaves them on disk, little), is measured by itself:

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

_CHUNK = 1_000_000


def main() -> None:
  """Runs the benchmark, or, with --load, one measured load."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--interactions", type=int, default=10_000_000)
  parser.add_argument("--users", type=int, help="default: interactions / 20")
  parser.add_argument("--items", type=int, default=100_000)
  parser.add_argument("--string_ids", action="store_true")
  parser.add_argument("--sorted", action="store_true", help="sorted rows")
  parser.add_argument("--k_core", type=int, default=0)
  parser.add_argument("--load", help="measure this file or directory")
  args = parser.parse_args()
  if args.load:
    print(json.dumps(measure(args.load, args.k_core)))
    return
  with tempfile.TemporaryDirectory() as directory:
    path = str(pathlib.Path(directory) / "interactions.parquet")
    write(
      path,
      rows=args.interactions,
      users=args.users or max(args.interactions // 20, 1),
      items=args.items,
      string_ids=args.string_ids,
      in_order=args.sorted,
    )
    command = [sys.executable, "-m", "benchmarks.loading", f"--load={path}"]
    command.append(f"--k_core={args.k_core}")
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
  print(json.dumps({"options": vars(args), **json.loads(output)}, indent=2))


def write(
  path: str, *, rows: int, users: int, items: int, string_ids: bool,
  in_order: bool,
) -> None:
  """Writes interactions whose users and items follow a long tail."""
  rng = np.random.default_rng(0)
  columns = {
    "user_id": _long_tailed(rng, rows, users),
    "item_id": _long_tailed(rng, rows, items),
    "timestamp": rng.integers(1_500_000_000, 1_600_000_000, rows),
  }
  frame = pl.DataFrame(columns)
  del columns
  if in_order:
    frame = frame.sort("user_id", "timestamp")
  if string_ids:
    frame = frame.with_columns(
      pl.format("AE{}USER", pl.col("user_id").cast(pl.String).str.zfill(10)),
      pl.format("B{}", pl.col("item_id").cast(pl.String).str.zfill(9)),
    )
    frame.columns = ["user_id", "item_id", "timestamp"]
  frame.write_parquet(path, row_group_size=_CHUNK)


def measure(path: str, k_core: int) -> dict[str, float | int]:
  """Loads the file; returns seconds and peak memory of this process."""
  start = time.perf_counter()
  from pin_jax.data import files, stored

  imported = time.perf_counter()
  if (pathlib.Path(path) / "about.json").exists():
    data = stored.read(path)
  else:
    data = files.read(path, k_core=k_core)
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
