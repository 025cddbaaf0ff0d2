"""Training and evaluation rates beside PyTorch, RecBole and RecTools.

    python -m benchmarks.throughput --path=amazon_beauty_s3rec.parquet \\
      --torch_python=T/bin/python --recbole_python=B/bin/python \\
      --rectools_python=R/bin/python

SASRec of the same sizes on the same split of the same data, with the softmax
over the whole catalogue, one thread on one core: the joint base of
experiments/configs/beauty.py (benchmarks/joint_base.py) and the peers of
third_party/peers, each under its own interpreter (what that needs, and what
differs, is in the peer's docstring). A peer without a flag is left out.

Every system lives in a process of its own for the whole run. A round times
ours and a peer, one right after the other and first in turn; all ratios are
ours over the peer's of the same round: median, lowest, highest. Rates are per
CPU-second, the processor time of the system's process. Building the model and
the first batch (compilation) come before, apart. Lines of JSON:

    start     CPU-seconds of building a system, and of its first batches
    train     real next-item positions trained on per CPU-second
    evaluate  users per CPU-second whose test target is ranked among all items
    quality   with --quality=NDCG: CPU-seconds of training until the validation
              NDCG@10 (all users, full ranking, history masked) first reaches
              it, from the initial values, compilation before. It validates at
              marks of training time that grow by --mark_ratio, so the time is
              known up to that factor: `below` is the last mark that fell short.
              Validation is timed apart; training ends at --cap_seconds.

The figures are in docs/performance.md.

torch.compile keeps programs on disk, so its first batches count only the first
time.
"""

import argparse
import inspect
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.joint_base import full_softmax
from experiments.configs import beauty
from experiments.methods import METHODS
from experiments.problem import make_problem
from experiments.stages import num_steps
from pin_jax.training import optimizers
from third_party import driver
from third_party.peers import protocol

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {
  **driver.ENVIRONMENT,
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false "
  "intra_op_parallelism_threads=1",
  "JAX_PLATFORMS": "cpu",
}


class Child:
  """A system in a process of its own; answers one request at a time.

  Requests: {"do": "start", settings}, {"do": "warm", "seconds"}, {"do":
  "train", "seconds"}, {"do": "evaluate"}, {"do": "reach", arguments of
  `protocol.reach`}.
  """

  def __init__(self, name: str, command: Sequence[str], folder: str) -> None:
    """Starts the process in a folder; it keeps to the cores of this one."""
    self.name = name
    self._errors = tempfile.TemporaryFile("w+")
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=self._errors, text=True, cwd=folder,
      env={**os.environ, **ENVIRONMENT},
    )

  def ask(self, do: str, **options: Any) -> dict[str, Any]:
    """The reply to a request.

    Raises:
      RuntimeError: with the end of the child's standard error if it died.
    """
    try:
      self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ""
    if not line:
      self._process.wait()
      self._errors.seek(0)
      raise RuntimeError(f"{self.name}: {self._errors.read()[-2000:]}")
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait()
    self._errors.close()


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
  """The command of every system, ours first."""
  found = {"ours": [sys.executable, "-m", "benchmarks.joint_base"]}
  scripts = {
    "torch eager": (args.torch_python, "torch_sasrec.py"),
    "torch compiled": (args.torch_python, "torch_sasrec.py", "--compile"),
    "recbole": (args.recbole_python, "recbole_sasrec.py"),
    "rectools": (args.rectools_python, "rectools_sasrec.py"),
  }
  for name, (python, script, *options) in scripts.items():
    if python:
      found[name] = [python, str(driver.PEERS / script), *options]
  return found


def write_inputs(path: str, folder: str, args: argparse.Namespace) -> dict:
  """Writes the data; returns the settings that start a system."""
  config = full_softmax(beauty.get_config(f"path={path}"))
  problem = make_problem(config)
  file = os.path.join(folder, "data.npz")
  protocol.write_data(file, driver.data_of(problem.split))
  sizes = {
    key: config.backbone[key]
    for key in ("length", "width", "blocks", "heads", "dropout", "expansion")
  }
  return {
    "data": file,
    "path": path,
    "seed": args.seed,
    "eval_users": args.eval_users,
    "batch_size": config.batch_size,
    "num_steps": num_steps(config, METHODS["base"].stages[0]),
    "optimizer": {**_defaults(), **config.optimizer.to_dict()},
    **sizes,
  }


def _defaults() -> dict[str, Any]:
  """What the optimizer takes besides the config's section."""
  taken = inspect.signature(optimizers.make_optimizer).parameters
  return {name: taken[name].default for name in ("b2", "final")}


def time_pair(
  first: Child, second: Child, do: str, seconds: dict[str, float]
) -> dict[str, float]:
  """CPU-second rates of two systems, one after the other, by name."""
  rates = {}
  for child in (first, second):
    options = {"seconds": seconds[child.name]} if do == "train" else {}
    reply = child.ask(do, **options)
    rates[child.name] = reply["count"] / reply["cpu_seconds"]
  return rates


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
  """Medians of [(ours, peer's)] rates, and their ratio's spread."""
  ratios = [ours / peer for ours, peer in pairs]
  median = lambda values: round(statistics.median(values), 2)
  return {
    "ours": median([ours for ours, _ in pairs]),
    "peer": median([peer for _, peer in pairs]),
    "ratio": median(ratios),
    "lowest": round(min(ratios), 2),
    "highest": round(max(ratios), 2),
  }


def measure_rates(
  children: Sequence[Child], args: argparse.Namespace
) -> list[dict[str, Any]]:
  """The lines of `train` and `evaluate` of every peer."""
  ours, *peers = children
  seconds = dict.fromkeys([c.name for c in children], args.peer_seconds)
  seconds["ours"] = args.seconds
  for child in peers:
    if child.name.startswith("torch"):
      seconds[child.name] = args.seconds
  pairs = {}
  for i in range(args.rounds):
    for peer in peers:
      order = (ours, peer) if i % 2 == 0 else (peer, ours)
      for do in ("train", "evaluate"):
        rates = time_pair(*order, do, seconds)
        pairs.setdefault((do, peer.name), []).append(
          (rates["ours"], rates[peer.name])
        )
  return [
    {"measure": do, "system": name, **summary(values)}
    for (do, name), values in sorted(pairs.items(), reverse=True)
  ]


def measure_quality(
  child: Child, args: argparse.Namespace
) -> dict[str, Any]:
  """The line of `quality` of a system."""
  reply = child.ask(
    "reach", target=args.quality, cap=args.cap_seconds,
    first=args.first_mark, ratio=args.mark_ratio,
  )
  spent = round(reply["cpu_seconds"], 1)
  return {
    "measure": "quality", "system": child.name, **reply,
    "cpu_seconds": spent if reply["reached"] else f"> {spent}",
    "validation_cpu_seconds": round(reply["validation_cpu_seconds"], 1),
  }


def parse_args() -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--path", required=True)
  for name in ("torch", "recbole", "rectools"):
    parser.add_argument(f"--{name}_python", help="interpreter of the peer")
  parser.add_argument("--rounds", type=int, default=5, help="0 = none")
  parser.add_argument(
    "--seconds", type=float, default=5.0, help="of training a round"
  )
  parser.add_argument(
    "--peer_seconds", type=float, default=15.0, help="the same of libraries"
  )
  parser.add_argument("--eval_users", type=int, default=4096)
  parser.add_argument("--quality", type=float, help="NDCG@10 to reach")
  parser.add_argument("--cap_seconds", type=float, default=600.0)
  parser.add_argument("--first_mark", type=float, default=5.0)
  parser.add_argument("--mark_ratio", type=float, default=1.15)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--core", type=int, default=0, help="all systems keep to it"
  )
  return parser.parse_args()


def say(**line: Any) -> None:
  """Prints a line of JSON."""
  print(json.dumps(line), flush=True)


def main() -> None:
  """Starts the systems, times them in turn, prints the lines."""
  args = parse_args()
  os.sched_setaffinity(0, {args.core})
  children = []
  with tempfile.TemporaryDirectory() as folder:
    settings = write_inputs(os.path.abspath(args.path), folder, args)
    try:
      for name, command in commands(args).items():
        # RecBole leaves logs where it runs.
        where = str(ROOT) if name == "ours" else folder
        children.append(child := Child(name, command, where))
        built = child.ask("start", **settings)
        warm = child.ask("warm", seconds=0.0)
        say(
          measure="start", system=name, build=round(built["cpu_seconds"], 1),
          first_batches=round(warm["cpu_seconds"], 1),
        )
      if args.rounds:
        for line in measure_rates(children, args):
          say(**line)
      if args.quality:
        for child in children:
          say(**measure_quality(child, args))
    finally:
      for child in children:
        child.close()


if __name__ == "__main__":
  main()
