"""RecBole 1.2.1's SASRec as a system of benchmarks/throughput.py.

Its own data set, loaders, `Trainer._train_epoch` and `Trainer.evaluate`, with
its defaults but for the sizes, so in training a batch is 2,048 augmented
sequences of one target each and in evaluation 4,096 users, history not masked
(its loader masks none for sequential models). `validate` masks the history and
ranks the scores of its `full_sort_predict`, so that NDCG@10 means the same for
all systems.

Needs recbole==1.2.1, setuptools<81, numpy<2, pandas<3 and scipy<1.15 with
Python 3.11. Nothing is patched: no checkpoint is written or read, which is
where torch >= 2.6 would refuse RecBole's.
"""

import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import protocol
import recbole_worker
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed


def make_config(folder: str, settings: dict[str, Any]) -> Config:
  """RecBole's defaults with the sizes of the settings."""
  return Config(model="SASRec", dataset="data", config_dict={
    **recbole_worker.options_of(folder, settings["seed"], settings),
    "eval_args": {
      "split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"
    },
    "metrics": ["NDCG", "Hit"],
    "topk": [protocol.CUTOFF],
    "valid_metric": f"NDCG@{protocol.CUTOFF}",
  })


class RecBole:
  """The system: see `protocol.System`."""

  def __init__(self, data: str, **settings: Any) -> None:
    """Builds the data set, the loaders, the model and the trainer."""
    torch.set_num_threads(1)
    self.data = protocol.read_data(data)
    folder = os.path.dirname(data)
    recbole_worker.write_atomic(
      folder, self.data.histories(self.data.test + 1)
    )
    self.config = make_config(folder, settings)
    init_seed(self.config["seed"], self.config["reproducibility"])
    self.dataset = create_dataset(self.config)
    self.loader, self.valid, test = data_preparation(
      self.config, self.dataset
    )
    self.model = SASRec(self.config, self.loader.dataset)
    self.begin = {k: v.clone() for k, v in self.model.state_dict().items()}
    users = protocol.chosen_users(self.data, settings["eval_users"])
    whose = self.owners(test.dataset.inter_feat)
    subset = test.dataset.copy(
      test.dataset.inter_feat[np.flatnonzero(np.isin(whose, users))]
    )
    self.test = FullSortEvalDataLoader(self.config, subset, None)
    tokens = self.dataset.id2token("item_id", np.arange(1, self.model.n_items))
    self.item_of = np.concatenate([[0], tokens.astype(np.int64)])
    self.restart()

  def owners(self, interactions: Any) -> np.ndarray:
    """The users of interactions, as the driver numbers them."""
    tokens = self.dataset.id2token("user_id", interactions["user_id"].numpy())
    return np.asarray(tokens).astype(np.int64)

  def restart(self) -> None:
    """Back to the initial values."""
    self.model.load_state_dict(self.begin)
    self.trainer = Trainer(self.config, self.model)
    self.trainer.eval_collector.data_collect(self.loader)
    self.stream = itertools.chain.from_iterable(itertools.repeat(self.loader))

  def train(self, seconds: float) -> int:
    """Whole batches of `_train_epoch` until the time is over."""
    count, start = 0, time.process_time()

    def batches() -> Iterator[Any]:
      nonlocal count
      while not count or time.process_time() - start < seconds:
        batch = next(self.stream)
        count += len(batch)
        yield batch

    self.trainer._train_epoch(batches(), 0)
    return count

  def evaluate(self) -> int:
    """Ranks the chosen users' test targets."""
    self.trainer.evaluate(self.test, load_best_model=False)
    return len(self.test.dataset)

  @torch.no_grad()
  def validate(self) -> float:
    """NDCG@10 of all validation targets."""
    self.model.eval()
    gains = np.zeros(len(self.data.starts))
    for interaction, *_ in self.valid:
      users = self.owners(interaction)
      scores = np.full((len(users), self.data.num_items + 1), -np.inf)
      scores[:, self.item_of] = self.model.full_sort_predict(interaction)
      positions = self.data.validation[users]
      target = self.data.items[self.data.starts[users] + positions]
      seen = protocol.seen_items(self.data, users, positions)
      ranks = protocol.ranks_of(scores, target, *seen)
      gains[users] = protocol.ndcg(ranks.rank)
    return float(gains.mean())


if __name__ == "__main__":
  protocol.serve(RecBole)
