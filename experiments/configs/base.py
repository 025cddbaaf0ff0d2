"""The full configuration with its defaults; every config starts from it."""

import os
import pathlib

from ml_collections import ConfigDict, config_dict

from pin_jax.types import InputError


def default() -> ConfigDict:
  """Every key that an experiment may set, with its default."""
  return ConfigDict({
    # Rows of the tables; see experiments/methods.py.
    "methods": ("base", "pin_backbone", "pin"),
    # One run of every method a seed; intervals average a user over seeds.
    "seeds": (0,),
    # How many of them are trained at once, as one vectorised run: much faster
    # on an accelerator, in `num_seeds` times the memory; 1 = one after another.
    "num_seeds": 1,
    # `source` is 'simulator', 'files', 'stored' or 'tfds'; the other keys are
    # the arguments of its reader.
    "data": {"source": "simulator"},
    # 'leave_one_out', or 'temporal' with the shares of interactions that lie
    # after the validation and the test cut.
    "split": {"protocol": "leave_one_out", "validation": 0.1, "test": 0.1},
    "groups": {
      "num_groups": 5,
      "rule": "users",  # 'users', 'interactions', 'thresholds', 'head_share'
      "thresholds": (),
      "head_share": 0.2,  # of users; also the border of the segments
    },
    # P(d): 'users', 'uniform', 'interactions' or 'custom' with `values`; raised
    # to the power `exponent` and normalised again.
    "prior": {"kind": "users", "values": (), "exponent": 1.0},
    # 'sasrec', 'gru4rec', 'hstu' or 'din'. The others leave a key that is not
    # theirs at its default.
    "backbone": {
      "name": "sasrec",
      "length": 50,
      "width": 64,
      "dropout": 0.2,
      "blocks": 2,  # sasrec, hstu
      "heads": 2,  # sasrec, hstu
      "expansion": 4,  # sasrec
      "layers": 1,  # gru4rec
      "attention_hidden": 36,  # din
      "hidden": 80,  # din
      # Lay short histories one after another in rows of L and encode so many
      # rows at a time; 0 = a history a row, all at once. Saves time where most
      # of a batch is padding, and on CPU where a batch outgrows the caches.
      "pack_rows": 0,
      # Type of the products' operands: 'float32', or 'bfloat16' for
      # accelerators. Params, optimizer and sums are float32 in any case.
      "compute": "float32",
      # Adds an embedding of the user's training activeness to what the model
      # reads; the method 'base_activeness' does so for the base alone.
      "reads_activeness": False,
    },
    # 'bottleneck', 'translation', 'adapter', 'lora', 'memory' or 'gated'. The
    # others leave a key that is not theirs at its default.
    "plugin": {
      "name": "bottleneck",
      "hidden": 32,  # bottleneck, adapter, gated
      "rank": 4,  # lora
      "reads_state": True,  # gated
    },
    # Item-to-item transitions of the training prefix, for 'memory' and 'gated'.
    "memory": {
      "channels": ("around", "after", "next"),
      "window": 5,  # places that count as a transition
      "decay": 0.7,  # weight of each further place
      "neighbours": 50,  # kept an item
      "recent": 10,  # items of a history that are looked up, at most `length`
      "history_decay": 0.8,  # weight of each older one
      "shrink": 2.0,  # added to the row sums
      "popularity_power": 0.25,  # scores are divided by popularity^power
      # Of 'cosine', 'two_step', 'linear' and 'next': reach items that never
      # stood near one of the history. They hold the user's own items too, so
      # that plugins need `pin.plugin_draw` 'validation'.
      "relations": (),
      "ridge": 100.0,  # of 'linear'
      "next_ridge": 100.0,  # of 'next'
    },
    # draw: windows by 'interactions' or 'users'; mean: over 'interactions'
    # (positions) or 'users' (rows). plugin_draw may also be 'validation': stage
    # 2 then learns from the validation targets of half of the users and is
    # selected on the others'.
    # `joint.batch_size` is for joint stages, where PIN's windows are longer or
    # shorter on average, to give both as many targets; 0 = `batch_size`.
    "joint": {
      "draw": "interactions", "mean": "interactions", "batch_size": 0
    },
    "pin": {
      "draw": "interactions",
      "mean": "interactions",
      "plugin_draw": "interactions",
      "plugin_mean": "interactions",
      # A name of pin_jax.weightings.WEIGHTINGS; 'cagrad:c=0.4' sets options.
      "weighting": "backdoor",
      # Over the 'whole' gradient, each 'tensor' by itself, or as the 'rule' was
      # published.
      "granularity": "rule",
      # Parameters with a weighting of their own: ('items|bias=joint',) gives
      # those whose name matches the regular expression the joint gradient.
      "blocks": (),
      # 'auto', or a name of pin_jax.aggregation.PATHS.
      "path": "auto",
      "diagnose_every": 10,  # steps between looks at the Gramian; 0 = off
      "clip_importance": 10.0,
    },
    # Weightings of the methods of these names, as `pin.weighting`; they share
    # PIN's draw, mean, granularity and path.
    "rules": {
      "inverse_propensity": "inverse_propensity",
      "group_dro": "group_dro",
      "streaming_dro": "streaming_dro",
      "cvar": "cvar:alpha=0.4",
      "pcgrad": "pcgrad",
      "upgrad": "upgrad",
      "consensus": "consensus",
      "gradient_alignment": "gradient_alignment",
    },
    # 'softmax' over the whole catalogue, or of sampled negatives
    # 'sampled_softmax' (logQ-corrected), 'gbce', 'bce' or 'bpr'; the other keys
    # are theirs.
    "loss": {
      "name": "softmax",
      "negatives": 256,
      "candidates": "shared",  # by a batch's positions, or each its 'own'
      # 'uniform', 'popularity', 'in_batch', or shares of the negatives, such as
      # 'in_batch:0.5,uniform:0.5'.
      "proposal": "uniform",
      "exponent": 1.0,  # of the training counts in 'popularity'
      "calibration": 0.75,  # t of gbce
      "focusing": 2.0,  # gamma of the method 'focal'
    },
    "batch_size": 250,  # windows a step, shared out over the groups
    "backbone_steps": 1500,
    "plugin_steps": 300,
    "classifier_steps": 300,
    "optimizer": {
      "learning_rate": 2e-3,
      "plugin_learning_rate": 1e-3,
      "classifier_learning_rate": 2e-3,
      "warmup": 50,
      "final": 0.01,
      "b2": 0.98,
      "weight_decay": 0.0,
      "clip": 5.0,
      "average": 0.0,
      # How the item tables are updated: 'dense', or with sampled negatives
      # 'row_sparse': the rows that a step reads, and their moments, alone.
      "tables": "dense",
    },
    "validation": {
      "every": 100,
      "users": 0,  # validate on so many users, drawn once; 0 = all
      "patience": 0,  # validations without improvement before a stop; 0 = off
    },
    "evaluation": {
      # 'full' ranking, or 'sampled': the target among so many `negatives`,
      # drawn by `seed`, not by the runs' seeds. Never in one table.
      "protocol": "full",
      "negatives": 99,
      "seed": 0,
      # What one device holds of the scores at a time; results do not depend
      # on it. A larger catalogue is scored twice. A mesh goes by small tiles.
      "user_chunk": 256,
      "item_chunk": 65_536,
    },
    "dispatch": 10,  # steps a dispatch
    # Devices: every batch is split over `data` of them, the item tables over
    # `model`, the interactions over all; 1 x 1 is one device. Results do not
    # depend on it, and a job may go on with another mesh.
    "mesh": {"data": 1, "model": 1},
    # What the report tests, declared before training: tail users better, head
    # users no worse than by the margin, a relative loss of NDCG@10. `power` is
    # the probability with which the printed effects are found.
    "claims": {"non_inferiority_margin": 0.02, "power": 0.8},
    # A loss, gradient or parameter that is not finite: 'stop', and keep the
    # state before that step (experiments/replay.py takes it again), or 'skip'
    # the step and count it.
    "non_finite": "stop",
  })


def data_path(name: str) -> str:
  """Path of a data file under $PIN_JAX_DATA (default ../shared/data)."""
  root = pathlib.Path(__file__).parents[3] / "shared" / "data"
  return str(pathlib.Path(os.environ.get("PIN_JAX_DATA", root)) / name)


def parse(argument: str | None, **defaults: str) -> dict[str, str]:
  """Reads the `key=value,…` after a config's file name.

  Args:
    argument: the text after the colon, or None.
    **defaults: the keys that the config knows.

  Returns:
    The values, as strings.

  Raises:
    InputError: for a key that the config does not know.
  """
  values = dict(defaults)
  for item in filter(None, (argument or "").split(",")):
    key, _, value = item.partition("=")
    if key not in defaults or not value:
      raise InputError(
        f"config argument {item!r} is unknown; give key=value with a key of "
        f"{sorted(defaults)}"
      )
    values[key] = value
  return values


def files_section(path: str, **columns: str) -> ConfigDict:
  """The `data` section of a file; every key of the reader can be overridden."""
  optional = ("user", "item", "time", "separator")
  return ConfigDict({
    "source": "files",
    "path": path,
    **{
      key: config_dict.placeholder(str) if not columns.get(key)
      else columns[key]
      for key in optional
    },
    "duplicates": "keep",
    "k_core": 0,
    "min_length": 1,
    "max_history": config_dict.placeholder(int),
  })


def gated(config: ConfigDict) -> None:
  """Sets a gate over what other users did as plugin, and its ablation."""
  # The gate's few parameters learn from the validation targets of half of the
  # users: on training targets the backbone knows the answers.
  config.plugin.update(name="gated", hidden=16, reads_state=False)
  config.pin.plugin_draw = "validation"
  config.optimizer.plugin_learning_rate = 2e-2
  config.memory.relations = ("cosine", "two_step", "linear")
  config.methods = (
    "base", "memory_alone", "joint_shared", "joint_plugins", "pin_backbone",
    "pin",
  )


def amazon(argument: str | None, file: str) -> ConfigDict:
  """What the sparse review data sets share."""
  config = default()
  values = parse(argument, path=data_path(file))
  config.data = files_section(values["path"])
  config.backbone.update(length=32, width=128, dropout=0.5, pack_rows=8)
  config.loss.update(name="sampled_softmax", negatives=2048)
  config.optimizer.learning_rate = 3e-3
  config.batch_size, config.validation.every = 460, 250
  config.backbone_steps, config.plugin_steps = 1250, 250
  gated(config)
  return config


def movielens(argument: str | None, file: str, name: str) -> ConfigDict:
  """What the MovieLens data sets share."""
  config = default()
  values = parse(argument, path=data_path(file), source="files")
  if values["source"] == "tfds":
    config.data = ConfigDict({
      "source": "tfds",
      "name": name,
      "data_dir": config_dict.placeholder(str),
      "manual_dir": config_dict.placeholder(str),
    })
  else:
    config.data = files_section(values["path"])
  return config
