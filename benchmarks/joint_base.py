"""The joint base as a system of benchmarks/throughput.py.

SASRec as experiments/stages.py builds it for the stage 'base' of
experiments/configs/beauty.py: its step, its dispatch, its ranker; with the
softmax over the whole catalogue, width 64 and 255 windows a step.
"""

import os
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from experiments.build import make_networks
from experiments.configs import beauty
from experiments.methods import METHODS
from experiments.problem import Problem, make_problem, requests_for
from experiments.stages import Run, Trainer
from pin_jax.models import plugins
from pin_jax.training.loop import compile_steps
from pin_jax.training.steps import Operands
from third_party.peers import protocol


def full_softmax(config: ConfigDict) -> ConfigDict:
  """The config with a loss that every library has, at a common size."""
  config.loss.name, config.batch_size = "softmax", 255
  config.backbone.width, config.optimizer.learning_rate = 64, 2e-3
  config.backbone_steps, config.plugin_steps = 2000, 500
  return config


def prepare(
  config: ConfigDict, data: Problem, folder: str, seed: int = 0
) -> tuple[Trainer, Run, Operands]:
  """The stage 'base' as the main job trains it."""
  networks = make_networks(config, data.split.interactions.num_items)
  stage = METHODS["base"].stages[0]
  trainer = Trainer(config, data, networks, epath.Path(folder), (seed,))
  run = trainer.prepare(stage)
  return trainer, run, trainer.operands(stage, run)


class JointBase:
  """The system: see `protocol.System`."""

  def __init__(
    self, data: str, path: str, eval_users: int, seed: int, **settings: Any
  ) -> None:
    """Builds the stage on the data set at `path`; the config sets the rest."""
    del settings
    config = full_softmax(beauty.get_config(f"path={path}"))
    self.problem = make_problem(config)
    self.trainer, run, self.operands = prepare(
      config, self.problem, os.path.dirname(data), seed
    )
    self.state = run.start()
    self.ndcg = lambda params: run.evaluate(seed, params)["all"]
    self.start = jax.device_get(self.state)
    self.run = compile_steps(run.step)
    self.dispatch, self.t = config.dispatch, 0
    # Windows are drawn uniformly: a step has so many targets on average.
    windows = int(self.operands.pool.window_starts[-1])
    self.targets = (
      config.batch_size * self.problem.sequences.targets.sum() / windows
      * self.dispatch
    )
    self.requests = requests_for(
      self.problem, "test",
      protocol.chosen_users(protocol.read_data(data), eval_users),
    )

  def restart(self) -> None:
    """Back to the initial values."""
    self.state, self.t = jax.device_put(self.start), 0

  def train_dispatch(self) -> int:
    """The steps of one dispatch; returns their targets, on average."""
    self.state, log = self.run(self.state, self.operands, self.t, self.dispatch)
    self.t += self.dispatch
    jax.block_until_ready((self.state.params, log))
    return self.targets

  def train(self, seconds: float) -> int:
    """Whole dispatches until the time is over."""
    return round(protocol.repeat(self.train_dispatch, seconds))

  def evaluate(self) -> int:
    """Ranks the chosen users' test targets."""
    weights = plugins.Weights(self.state.params, None)
    rank = self.trainer.ranker(None)
    return len(rank(weights, self.operands.sequences, self.requests).rank)

  def validate(self) -> float:
    """NDCG@10 of all validation targets."""
    return self.ndcg(self.state.params)


if __name__ == "__main__":
  protocol.serve(JointBase)
