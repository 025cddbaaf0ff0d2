"""RecTools 0.19's SASRec as a system of benchmarks/throughput.py.

Its own data preparation, loaders, model, `training_step` and Adam, with its
defaults but for the sizes and the dropout rate (128 sessions a batch, a softmax
over the items that occur in training), and its own `recommend` with k = 10 and
`filter_viewed` in evaluation. The step is called without Lightning's loop
around it, which can only help it. A target outside the ten, or one that does
not occur in training, counts 0 in NDCG@10.

Needs rectools[torch]==0.19.*.
"""

import warnings
from typing import Any

import numpy as np
import pandas as pd
import protocol
import rectools_worker
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


class RecTools:
  """The system: see `protocol.System`."""

  def __init__(self, data: str, **settings: Any) -> None:
    """Builds the data sets and the model."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    self.seed = settings["seed"]
    self.data = protocol.read_data(data)
    self.users = protocol.chosen_users(self.data, settings["eval_users"])
    self.training, self.known = (  # before the held-out targets
      rectools_worker.make_dataset(self.data.histories(positions))
      for positions in (self.data.validation, self.data.test)
    )
    self.model = SASRecModel(**rectools_worker.options_of(settings))
    self.restart()

  def restart(self) -> None:
    """Back to the start, as its `fit` does before Lightning takes over."""
    torch.manual_seed(self.seed)
    self.model._build_model_from_dataset(self.training)
    self.model.is_fitted = True
    self.module = self.model.lightning_model
    self.module.on_train_start()
    self.optimizer = self.module.configure_optimizers()
    self.loader = self.model.data_preparator.get_dataloader_train()
    self.stream = iter(self.loader)

  def next_batch(self) -> dict[str, torch.Tensor]:
    """The next batch of the endless stream of epochs."""
    batch = next(self.stream, None)
    if batch is None:
      self.stream = iter(self.loader)
      batch = next(self.stream)
    return batch

  def train_batch(self) -> int:
    """One step; returns its targets."""
    batch = self.next_batch()
    loss = self.module.training_step(batch, 0)
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()
    return int((batch["y"] != 0).sum())

  def train(self, seconds: float) -> int:
    """Whole batches until the time is over."""
    self.module.train()
    return protocol.repeat(self.train_batch, seconds)

  def recommend(self, users: np.ndarray, dataset: Dataset) -> pd.DataFrame:
    """The ten best unseen items of every user."""
    return self.model.recommend(
      users=users, dataset=dataset, k=protocol.CUTOFF, filter_viewed=True
    )

  def evaluate(self) -> int:
    """Recommends to the chosen users before their test targets."""
    found = self.recommend(self.users, self.known)
    return found[Columns.User].nunique()

  def validate(self) -> float:
    """NDCG@10 of all validation targets."""
    users = np.arange(len(self.data.starts))
    found = self.recommend(users, self.training)
    target = self.data.items[self.data.starts + self.data.validation]
    hit = found[Columns.Item].to_numpy() == target[found[Columns.User]]
    ranks = found[Columns.Rank].to_numpy()[hit]
    return float(protocol.ndcg(ranks).sum() / len(users))


if __name__ == "__main__":
  protocol.serve(RecTools)
