"""The full configuration with its defaults; every config starts from it."""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from experiments import schema
from pin_jax.types import InputError

_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_S3REC = "https://github.com/aHuiWang/CIKM2020-S3Rec/blob/master/data"
# Files of `data_path` -> where the data come from, and what reads them there.
_PUBLIC = {
  "ml-100k.inter": (
    f"{_GROUPLENS}/ml-100k.zip",
    "--config=ml100k:path=ml-100k.zip",
  ),
  "ml-1m.parquet": (
    f"{_GROUPLENS}/ml-1m.zip",
    "--config=ml1m:path=ml-1m.zip",
  ),
  "amazon_beauty_s3rec.parquet": (
    f"{_S3REC}/Beauty.txt",
    "--config=beauty:path=Beauty.txt",
  ),
  "amazon_toys_s3rec.parquet": (
    f"{_S3REC}/Toys_and_Games.txt",
    "--config=toys:path=Toys_and_Games.txt",
  ),
  "yelp_llmesr.parquet": (
    "data/yelp/handled/inter.txt of https://github.com/liuqidong07/LLM-ESR",
    "--config=yelp:path=inter.txt",
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
      f"{path} does not exist; download {url}, then give {command}"
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


def leave_to_data(config: ConfigDict, keys: Iterable[str]) -> None:
  """Makes sizes None, so that they are fitted to the data; types stay."""
  known = schema.keys_of(None)
  for key in keys:
    section, _, name = key.rpartition(".")
    own = config[section] if section else config
    own[name] = config_dict.placeholder(known[key].kind)


RECIPES = "answer", "published", "gated"


def recipe(
  config: ConfigDict, name: str, weights: Mapping[str, Any] | None = None
) -> None:
  """Sets which methods a job compares, and what PIN's plugins are.

  'answer': what is worth serving, namely the joint base, item neighbours, one
  gate on the joint backbone, PIN as published and PIN with gates; in the end
  all of them have learnt from all validation targets. 'published': the base,
  PIN as published and its backbone. 'gated': PIN whose plugins are gates over
  what other users did, its ablations, and a base that has learnt from as much.

  Args:
    config: everything else.
    name: one of RECIPES.
    weights: settings of 'gated' besides, such as those of P(d).

  Raises:
    InputError: for an unknown name.
  """
  if name == "answer":
    config.methods = "base", "memory_alone", "joint_gate", "pin", "pin_gates"
    leave_to_data(config, ("refit", "memory.relations", "memory.recent"))
    return
  if name not in RECIPES:
    raise InputError(
      f"config argument recipe={name!r} is unknown; use one of {[*RECIPES]}"
    )
  config.refit = 0
  if name == "published":
    config.memory.relations = ()
    return
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
  config.update_from_flattened_dict(weights or {})


def amazon(
  argument: str | None, file: str, weights: Mapping[str, Any] | None = None
) -> ConfigDict:
  """What the sparse review data sets share; `weights` as `recipe` has them."""
  config = default()
  values = parse(argument, path=data_path(file), recipe="gated")
  config.data = data_section("files", path=values["path"])
  config.backbone.update(length=32, width=128, dropout=0.5, pack_rows=8)
  config.loss.update(name="sampled_softmax", negatives=2048)
  config.optimizer.learning_rate = 3e-3
  config.batch_size, config.validation.every = 460, 250
  config.backbone_steps, config.plugin_steps = 1250, 250
  if values["recipe"] == "published":  # as it was before these were searched
    config.backbone.width, config.loss.name = 64, "softmax"
    config.optimizer.learning_rate, config.batch_size = 2e-3, 255
    config.backbone_steps, config.plugin_steps = 2000, 500
  recipe(config, values["recipe"], weights)
  return config


def movielens(
  argument: str | None, file: str, name: str, usual: str = "published"
) -> tuple[ConfigDict, str]:
  """(what the MovieLens data sets share, the recipe; `usual` unless given)."""
  config = default()
  values = parse(
    argument, path=data_path(file), source="files", recipe=usual
  )
  if values["source"] == "tfds":
    config.data = data_section("tfds", name=name)
  else:
    config.data = data_section("files", path=values["path"])
  return config, values["recipe"]
