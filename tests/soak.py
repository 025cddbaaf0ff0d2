"""Trains long and saves often: is memory flat, is the disk bounded?

  python -m tests.soak --steps=10000 --every=50

Prints, at every tenth of the way, resident memory and what the checkpoints
take; at the end the slope of memory over the second half and the largest and
last sizes on disk. Two to three minutes.
"""

import argparse
import os
import pathlib
import tempfile

import numpy as np

from experiments import job, logs
from tests import tiny


def resident():
  """Bytes of this process in memory."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


def on_disk(folder):
  """(bytes, checkpoints) below a folder that another thread writes to."""
  size = 0
  for root, _, names in os.walk(folder):
    for name in names:
      try:
        size += os.stat(os.path.join(root, name)).st_size
      except FileNotFoundError:
        continue
  return size, sum(1 for path in folder.glob("*/*") if path.is_dir())


def soak(steps, every, say=print):
  """Trains; [n, 4] step, memory, bytes of checkpoints, their number."""
  config = tiny.get_config()
  config.methods = ("base",)
  config.backbone_steps, config.plugin_steps = steps - every, every
  config.dispatch, config.validation.every = min(10, every), every
  samples = []
  inner = logs.RunLog.evaluation
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)

    def evaluation(self, run, step, values):
      inner(self, run, step, values)
      samples.append((step, resident(), *on_disk(workdir / "checkpoints")))
      if step * 10 % steps == 0:
        megabytes = [x / 2**20 for x in samples[-1][1:3]]
        say(
          f"step {step:,}: {megabytes[0]:.1f} MiB resident, checkpoints "
          f"{megabytes[1]:.2f} MiB in {samples[-1][3]} directories",
          flush=True,
        )

    logs.RunLog.evaluation = evaluation
    try:
      job.run(config, workdir)
    finally:
      logs.RunLog.evaluation = inner
  return np.array(samples, float)


def slope(samples):
  """Growth of memory over the second half, bytes a step."""
  half = samples[len(samples) // 2 :]
  return np.polyfit(half[:, 0], half[:, 1], 1)[0]


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", type=int, default=10_000)
  parser.add_argument("--every", type=int, default=50)
  options = parser.parse_args()
  table = soak(options.steps, options.every)
  print(
    f"memory: {slope(table) * 1000 / 2**10:+.1f} KiB per 1,000 steps over the "
    f"second half; checkpoints: at most {table[:, 2].max() / 2**20:.2f} MiB in "
    f"{table[:, 3].max():.0f} directories, {table[-1, 2] / 2**20:.2f} MiB last"
  )
