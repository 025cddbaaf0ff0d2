"""A sequential model of RecBole 1.2.1 as a run of third_party/driver.py.

Its own data set, augmentation, loader, model and `Trainer.fit`, with its
defaults but for the sizes. The training file holds the training prefixes and
nothing else; an item file names the whole catalogue, so that every item has an
embedding. Validation and test rank the scores of its `full_sort_predict` for
the last items of a history.

Nothing is patched: no checkpoint is written or read, which is where torch >=
2.6 would refuse RecBole's.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import protocol
import torch
import worker
from recbole.config import Config
from recbole.data import create_dataset, create_samplers
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.utils import get_model, get_trainer, init_seed

USERS = 512  # scored at a time
FOREVER = 10**9  # epochs; the watch ends the training


class Enough(Exception):
  """Ends a training that is over."""


class Watched:
  """A loader that tells a watch of the batches once they are trained on."""

  def __init__(self, loader: Any, watch: worker.Watch) -> None:
    """Wraps RecBole's loader."""
    self._loader, self._watch = loader, watch

  def __getattr__(self, name: str) -> Any:
    """What RecBole's trainer asks of its loader."""
    return getattr(self._loader, name)

  def __len__(self) -> int:
    """Batches an epoch."""
    return len(self._loader)

  def __iter__(self) -> Iterator[Any]:
    """One epoch."""
    for batch in self._loader:
      yield batch
      if self._watch.batch():
        raise Enough
    if self._watch.epoch():
      raise Enough


def write_atomic(folder: str, histories: Iterable[np.ndarray]) -> None:
  """Writes FOLDER/data/data.inter; times are positions within the user."""
  os.makedirs(os.path.join(folder, "data"), exist_ok=True)
  with open(os.path.join(folder, "data", "data.inter"), "w") as file:
    file.write("user_id:token\titem_id:token\ttimestamp:float\n")
    for user, history in enumerate(histories):
      for t, item in enumerate(history):
        file.write(f"{user}\t{item}\t{t}\n")


def write_catalogue(folder: str, num_items: int) -> None:
  """Writes FOLDER/data/data.item, every item once."""
  with open(os.path.join(folder, "data", "data.item"), "w") as file:
    file.write("item_id:token\n")
    file.writelines(f"{item}\n" for item in range(1, num_items + 1))


def options_of(
  folder: str, seed: int, sizes: dict[str, Any]
) -> dict[str, Any]:
  """RecBole's settings for our sizes: softmax over the catalogue, CPU."""
  return {
    "data_path": folder,
    "checkpoint_dir": folder,
    "use_gpu": False,
    "show_progress": False,
    "seed": seed,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": sizes["length"],
    "n_layers": sizes["blocks"],
    "n_heads": sizes["heads"],
    "hidden_size": sizes["width"],
    "embedding_size": sizes["width"],
    "inner_size": sizes["expansion"] * sizes["width"],
    "num_layers": sizes.get("layers", 1),
    "hidden_dropout_prob": sizes["dropout"],
    "attn_dropout_prob": sizes["dropout"],
    "dropout_prob": sizes["dropout"],
    "loss_type": "CE",
    "train_neg_sample_args": None,
  }


def make_config(settings: worker.Settings) -> Config:
  """RecBole's defaults with our sizes, then the options.

  Raises:
    ValueError: for an option that RecBole does not have.
  """
  base = options_of(settings.folder, settings.seed, settings.sizes)
  base["load_col"] |= {"item": ["item_id"]}
  base["epochs"] = settings.epochs or FOREVER
  base["eval_args"] = {
    "split": {"RS": [1.0]}, "order": "TO", "mode": "full", "group_by": None,
  }
  make = lambda options: Config(
    model=settings.model, dataset="data", config_dict=options
  )
  known = make(base).final_config_dict
  unknown = sorted(settings.options.keys() - known.keys())
  if unknown:
    raise ValueError(
      f"RecBole's {settings.model} has no option {unknown[0]!r}; see its "
      "properties/*.yaml"
    )
  return make({**base, **settings.options})


class RecBole:
  """The peer: see `worker.Peer`."""

  def __init__(self, data: protocol.Data, settings: worker.Settings) -> None:
    """Builds the data set, the loader, the model and the trainer."""
    torch.set_num_threads(1)
    write_atomic(settings.folder, data.histories(data.train_end))
    write_catalogue(settings.folder, data.num_items)
    self.data, self.config = data, make_config(settings)
    init_seed(self.config["seed"], self.config["reproducibility"])
    dataset = create_dataset(self.config)
    built = dataset.build()
    sampler, *_ = create_samplers(self.config, dataset, built)
    self.loader = get_dataloader(self.config, "train")(
      self.config, built[0], sampler, shuffle=self.config["shuffle"]
    )
    self.model = get_model(self.config["model"])(self.config, built[0])
    self.trainer = get_trainer(
      self.config["MODEL_TYPE"], self.config["model"]
    )(self.config, self.model)
    self.length = self.config["MAX_ITEM_LIST_LENGTH"]
    ids = lambda field, tokens: np.array([
      dataset.field2token_id[field][str(token)] for token in tokens
    ])
    self.item_ids = np.zeros(data.num_items + 1, np.int64)
    self.item_ids[1:] = ids("item_id", range(1, data.num_items + 1))
    self.user_ids = ids("user_id", range(len(data.starts)))

  def fit(self, watch: worker.Watch) -> None:
    """Trains with RecBole's own loop."""
    with contextlib.suppress(Enough):
      self.trainer.fit(
        Watched(self.loader, watch), saved=False, verbose=False,
        show_progress=False,
      )

  def state(self) -> dict[str, torch.Tensor]:
    """See `worker.Peer`."""
    return {k: v.clone() for k, v in self.model.state_dict().items()}

  def load(self, state: dict[str, torch.Tensor]) -> None:
    """See `worker.Peer`."""
    self.model.load_state_dict(state)

  @torch.no_grad()
  def scores(
    self, users: np.ndarray, positions: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """See `worker.Peer`."""
    training = self.model.training
    self.model.eval()
    for start in range(0, len(users), USERS):
      rows = np.arange(start, min(start + USERS, len(users)))
      batch = self.requests(users[rows], positions[rows])
      found = self.model.full_sort_predict(batch).view(len(rows), -1)
      scores = found.numpy()[:, self.item_ids]  # column 0 stays the padding
      yield rows, scores
    self.model.train(training)

  def requests(self, users: np.ndarray, positions: np.ndarray) -> Interaction:
    """Histories as RecBole's loaders lay them out: left-aligned, the last L."""
    items = np.zeros((len(users), self.length), np.int64)
    counts = np.minimum(positions, self.length)
    histories = self.data.histories(positions, users)
    for row, count, history in zip(items, counts, histories, strict=True):
      row[:count] = self.item_ids[history[-count:]]
    return Interaction({
      "user_id": torch.from_numpy(self.user_ids[users]),
      "item_id_list": torch.from_numpy(items),
      "item_length": torch.from_numpy(counts.astype(np.int64)),
    })


if __name__ == "__main__":
  worker.run(RecBole)
