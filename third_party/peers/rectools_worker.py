"""A transformer of RecTools 0.19 as a run of third_party/driver.py.

Its own data preparation, loaders, model and Lightning module under Lightning's
`Trainer`, with its defaults but for the sizes. It gives no embedding to an
item that does not occur in a training history of two items or more: such items
cannot be scored. Validation and test rank the products of its embeddings of
users and items.
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import protocol
import pytorch_lightning as lightning
import torch
import worker
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel

MODELS = {"SASRec": SASRecModel, "BERT4Rec": BERT4RecModel}
USERS = 512  # scored at a time


class Watching(lightning.Callback):
  """Tells a watch of Lightning's batches and epochs."""

  def __init__(self, watch: worker.Watch) -> None:
    """Wraps the watch."""
    self._watch = watch

  def __deepcopy__(self, memo: Any) -> "Watching":
    """RecTools copies its trainer; the watch stays the one."""
    return self

  def on_train_batch_end(
    self, trainer: lightning.Trainer, *rest: Any
  ) -> None:
    """Ends the training where the watch says so."""
    trainer.should_stop |= self._watch.batch()

  def on_train_epoch_end(
    self, trainer: lightning.Trainer, module: lightning.LightningModule
  ) -> None:
    """Ends the training where the watch says so."""
    trainer.should_stop |= self._watch.epoch()


def make_dataset(histories: Iterable[np.ndarray]) -> Dataset:
  """RecTools' data set of users 0, 1, …; times are positions in seconds."""
  histories = list(histories)
  counts = [len(history) for history in histories]
  times = np.concatenate([np.arange(count) for count in counts])
  return Dataset.construct(pd.DataFrame({
    Columns.User: np.repeat(np.arange(len(counts)), counts),
    Columns.Item: np.concatenate(histories),
    Columns.Weight: 1.0,
    Columns.Datetime: pd.to_datetime(times, unit="s"),
  }))


def options_of(sizes: dict[str, Any]) -> dict[str, Any]:
  """RecTools' arguments for our sizes: softmax over the catalogue."""
  return {
    "session_max_len": sizes["length"], "n_factors": sizes["width"],
    "n_blocks": sizes["blocks"], "n_heads": sizes["heads"],
    "dropout_rate": sizes["dropout"], "loss": "softmax",
  }


def check(settings: worker.Settings) -> None:
  """Raises ValueError for a model or option that there is not."""
  if settings.model not in MODELS:
    raise ValueError(
      f"no model {settings.model!r} of RecTools; choose one of {list(MODELS)}"
    )
  known = inspect.signature(MODELS[settings.model].__init__).parameters
  unknown = sorted(settings.options.keys() - known.keys())
  if unknown:
    raise ValueError(
      f"RecTools' {settings.model} has no option {unknown[0]!r}; choose among "
      f"{sorted(known)}"
    )


class RecTools:
  """The peer: see `worker.Peer`."""

  def __init__(self, data: protocol.Data, settings: worker.Settings) -> None:
    """Builds the model; RecTools makes the parameters when it trains."""
    check(settings)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lightning.seed_everything(settings.seed)
    self.data, self.settings = data, settings
    self.loaders: dict[bytes, Any] = {}

  def fit(self, watch: worker.Watch) -> None:
    """Trains with RecTools' own `fit`."""

    def trainer() -> lightning.Trainer:
      return lightning.Trainer(
        max_epochs=self.settings.epochs or -1, callbacks=[Watching(watch)],
        enable_progress_bar=False, enable_model_summary=False, logger=False,
        enable_checkpointing=False, devices=1, accelerator="cpu",
      )

    options = options_of(self.settings.sizes) | self.settings.options
    self.model = MODELS[self.settings.model](
      get_trainer_func=trainer, **options
    )
    histories = self.data.histories(self.data.train_end)
    self.model.fit(make_dataset(histories))

  def state(self) -> dict[str, torch.Tensor]:
    """See `worker.Peer`."""
    state = self.model.torch_model.state_dict()
    return {k: v.clone() for k, v in state.items()}

  def load(self, state: dict[str, torch.Tensor]) -> None:
    """See `worker.Peer`."""
    self.model.torch_model.load_state_dict(state)

  def loader(self, users: np.ndarray, positions: np.ndarray) -> tuple:
    """(RecTools' loader of histories, rows into users that it holds)."""
    key = users.tobytes() + positions.tobytes()
    if key not in self.loaders:
      preparator = self.model.data_preparator
      dataset = preparator.transform_dataset_u2i(
        make_dataset(self.data.histories(positions, users)),
        np.arange(len(users)),
      )
      loader = preparator.get_dataloader_recommend(
        dataset, self.model.recommend_batch_size
      )
      rows = dataset.user_id_map.external_ids.astype(np.int64)
      self.loaders[key] = loader, rows
    return self.loaders[key]

  @torch.no_grad()
  def scores(
    self, users: np.ndarray, positions: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """See `worker.Peer`; a history without a known item scores none."""
    module, preparator = self.model.lightning_model, self.model.data_preparator
    training = module.training
    loader, rows = self.loader(users, positions)
    states, items = module._get_user_item_embeddings(loader, None)
    known = preparator.get_known_items_sorted_internal_ids()
    columns = preparator.get_known_item_ids().astype(np.int64)
    items = items[known].T
    nothing = lambda count: np.full(
      (count, self.data.num_items + 1), -np.inf, np.float32
    )
    for start in range(0, len(rows), USERS):
      part = rows[start : start + USERS]
      scores = nothing(len(part))
      scores[:, columns] = (states[start : start + USERS] @ items).numpy()
      yield part, scores
    cold = np.setdiff1d(np.arange(len(users)), rows)
    if len(cold):
      yield cold, nothing(len(cold))
    module.train(training)


if __name__ == "__main__":
  worker.run(RecTools)
