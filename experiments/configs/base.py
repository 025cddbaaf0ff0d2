"""The full configuration with its defaults; every config starts from it."""

import os
import pathlib
from typing import Any

from ml_collections import ConfigDict, config_dict

from experiments import schema
from pin_jax.types import InputError

_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_S3REC = "https://github.com/aHuiWang/CIKM2020-S3Rec/blob/master/data"
# Files of `data_path` -> where the data come from, and how they get there.
_PUBLIC = {
  "ml-100k.inter": (
    f"{_GROUPLENS}/ml-100k.zip",
    "--config=experiments/configs/ml100k.py:path=ml-100k.zip",
  ),
  "ml-1m.parquet": (
    f"{_GROUPLENS}/ml-1m.zip",
    "--config=experiments/configs/ml1m.py:path=ml-1m.zip",
  ),
  "amazon_beauty_s3rec.parquet": (
    f"{_S3REC}/Beauty.txt",
    "python -m third_party.s3rec Beauty.txt --output={path}",
  ),
  "amazon_toys_s3rec.parquet": (
    f"{_S3REC}/Toys_and_Games.txt",
    "python -m third_party.s3rec Toys_and_Games.txt --output={path}",
  ),
  "yelp_llmesr.parquet": (
    "data/yelp/handled/inter.txt of https://github.com/liuqidong07/LLM-ESR",
    "python -m third_party.llm_esr inter.txt --output={path}",
  ),
}


def default() -> ConfigDict:
  """Every key that an experiment may set, with its default.

  A size of `experiments.sizes.KEYS` that is None is fitted to the data.
  """
  return ConfigDict(schema.defaults())


def data_path(name: str) -> str:
  """Path of a data file under $PIN_JAX_DATA (default ../shared/data)."""
  root = pathlib.Path(__file__).parents[3] / "shared" / "data"
  return str(pathlib.Path(os.environ.get("PIN_JAX_DATA", root)) / name)


def check_public(path: str) -> None:
  """Raises InputError, with its source, where a public data set is missing."""
  name = pathlib.Path(path).name
  if name in _PUBLIC and not os.path.exists(path):
    url, command = _PUBLIC[name]
    raise InputError(
      f"{path} does not exist; download {url}, then give "
      + command.format(path=path)
    )


def parse(argument: str | None, **defaults: str) -> dict[str, str]:
  """Reads the `key=value,…` after a config's file name.

  Args:
    argument: the text after the colon, or None.
    **defaults: the keys that the config knows, and their values.

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


def data_section(source: str, **given: Any) -> ConfigDict:
  """The `data` section of a source, whole, so that any key can be overridden.

  Args:
    source: one of `schema.SOURCES`.
    **given: values of its keys; those that are empty keep their defaults.
  """
  section = {"source": source}
  for name, key in schema.SOURCES[source].items():
    free = key.default in (None, schema.NEEDED)
    default = config_dict.placeholder(key.kind) if free else key.default
    section[name] = given.get(name) or default
  return ConfigDict(section)


def gated(config: ConfigDict) -> None:
  """Sets a gate over what other users did as plugin, and its ablation."""
  # The gate's few parameters learn from the validation targets of half of the
  # users: on training targets the backbone knows the answers.
  config.plugin.update(name="gated", hidden=16, reads_state=False)
  config.pin.plugin_draw = "validation"
  config.optimizer.plugin_learning_rate = 2e-2
  config.memory.relations = ("cosine", "two_step", "linear")
  config.methods = (
    "base_validation", "base", "memory_alone", "joint_shared", "joint_plugins",
    "pin_backbone", "pin",
  )


def amazon(argument: str | None, file: str) -> ConfigDict:
  """What the sparse review data sets share."""
  config = default()
  values = parse(argument, path=data_path(file))
  config.data = data_section("files", path=values["path"])
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
    config.data = data_section("tfds", name=name)
  else:
    config.data = data_section("files", path=values["path"])
  return config
