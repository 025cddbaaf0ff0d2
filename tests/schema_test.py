"""The schema: complete, true to the library, one job whatever way is taken."""

import dataclasses
import math
import pathlib

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from experiments import build, commands, job, schema, sweep
from experiments.configs import base, ml1m
from pin_jax import aggregation
from pin_jax.data import activeness, batches, interactions, simulator
from pin_jax.models import memory
from pin_jax.models.precision import COMPUTE
from pin_jax.training import objectives
from pin_jax.types import InputError
from tests import tiny

KEYS = {
  name: key for source in schema.SOURCES
  for name, key in schema.keys_of(source).items()
}


@pytest.mark.parametrize(("name", "choices"), [
  ("groups.rule", activeness.GROUP_RULES),
  ("prior.kind", activeness.PRIORS),
  ("backbone.name", build.BACKBONES),
  ("backbone.compute", COMPUTE),
  ("plugin.name", build.PLUGINS),
  ("memory.channels", memory.CHANNELS),
  ("memory.relations", memory.RELATIONS),
  ("joint.draw", batches.DRAWS),
  ("pin.mean", objectives.MEANS),
  ("pin.plugin_draw", (*batches.DRAWS, "validation")),
  ("pin.path", ("auto", *aggregation.PATHS)),
  ("data.duplicates", interactions.DUPLICATES),
  ("data.source", schema.SOURCES),
])  # fmt: skip
def test_choices_are_those_of_the_library(name, choices):
  key = KEYS[name]
  assert (key.item or key).choices == tuple(choices)


def test_the_simulators_defaults_are_its_own():
  for field in dataclasses.fields(simulator.WorldSpec):
    if key := schema.SOURCES["simulator"].get(field.name):
      assert key.default == field.default, field.name


def test_every_range_is_finite_and_holds_its_default():
  for name, key in KEYS.items():
    for one in filter(None, (key, key.item)):
      assert math.isfinite(one.least) and math.isfinite(one.most), name
      if one.kind in (int, float):
        over = (one.most + 1, one.least - 1, math.nan, math.inf, -math.inf)
        wrong = (True, "1", [1], *over)
        assert not any(map(one.accepts, wrong)), name
    if key.default is not schema.NEEDED:
      assert key.accepts(key.default), name
    assert key.none == (key.default is None), name


def _by_flags(*arguments, config="tests/tiny.py"):
  """A config as a command line changes it."""
  argv = ["main", f"--config={config}", *arguments]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file(
    "config", None, "", flag_values=values, sys_argv=argv
  )
  values(argv)
  return holder.value


def _set(name, value):
  """The tiny config as code changes it, whatever the type."""
  config = tiny.get_config()
  config.update_from_flattened_dict({name: value})
  return config


WAYS = {  # strategy of a value, keys that take it
  ("memory.shrink", "prior.exponent", "optimizer.weight_decay"):
    st.integers(0, 100) | st.floats(0, 100),
  ("batch_size", "validation.users", "evaluation.seed"): st.integers(30, 99),
  ("seeds",): st.lists(st.integers(0, 2**31 - 1), min_size=1, unique=True),
  ("prior.values",): st.lists(st.integers(0, 9) | st.floats(0, 9), max_size=4),
  ("memory.relations",): st.lists(
    st.sampled_from(memory.RELATIONS), unique=True
  ),
  ("plugin.reads_state",): st.booleans(),
  ("pin.weighting", "loss.name"): st.sampled_from(["joint", "bpr", "None."]),
}
_ONE = st.one_of([
  st.tuples(st.sampled_from(names), values) for names, values in WAYS.items()
])


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(_ONE)
def test_the_same_setting_by_another_way_is_the_same_job(chosen):
  name, value = chosen
  forms = [value]
  if isinstance(value, list):
    forms = [value, tuple(value)]
  elif not isinstance(value, bool) and isinstance(KEYS[name].default, float):
    forms = [value, float(value)]
  made = [_set(name, form) for form in forms]
  made += [_by_flags(f"--config.{name}={form}") for form in forms]
  made.append(_by_flags(
    f"--config.{name}={KEYS[name].default}", f"--config.{name}={value}"
  ))
  section, _, last = name.rpartition(".")
  if section:  # the whole section anew, as a config file may
    fresh = tiny.get_config()
    fresh[section] = ConfigDict({**fresh[section], last: value})
    made.append(fresh)
  claims = [job.of_results(config) for config in made]
  assert all(claim == claims[0] for claim in claims)
  assert len({sweep.job_name(config) for config in made}) == 1


def test_an_optional_key_left_out_is_the_key_at_its_default():
  with_all, without = tiny.get_config(), tiny.get_config()
  with_all.data = ConfigDict({**with_all.data, "confounding": 0.4})
  assert job.of_results(with_all) == job.of_results(without)
  with_all.data.confounding = 0.5
  assert job.of_results(with_all) != job.of_results(without)


def test_an_argument_of_a_config_is_the_flag_of_the_same_key():
  by_argument = ml1m.get_config("path=some.csv")
  by_code = ml1m.get_config()
  by_code.data.path = "some.csv"
  assert job.of_results(by_argument) == job.of_results(by_code)
  by_flag = _by_flags(
    "--config.data.path=some.csv", "--config.data.user=None",
    config="experiments/configs/ml1m.py:path=other.csv",
  )
  assert sweep.job_name(by_flag) == sweep.job_name(by_argument)
  assert sweep.job_name(by_flag) != sweep.job_name(ml1m.get_config())


def test_of_a_tuple_flag_given_twice_the_last_stands():
  config = _by_flags(
    "--config.methods=('base','pin')", "--config.seeds=3",
    "--config.methods=pin_backbone", "--config.seeds", "(4, 5)",
  )
  assert (config.methods, config.seeds) == (("pin_backbone",), (4, 5))


def test_what_older_versions_wrote_is_the_same_job():
  """Retired keys at the values that are now fixed; no other value."""
  config = schema.canonical(tiny.get_config().to_dict())
  old = {**config, "optimizer": {**config["optimizer"], "b2": 0.98},
         "rules": {"cvar": "cvar:alpha=0.4"},
         "evaluation": {**config["evaluation"], "user_chunk": 7}}
  assert schema.canonical(old) == config
  old["optimizer"]["b2"] = 0.9
  found = schema.differences(config, schema.canonical(old), config)
  assert [*found] == [("optimizer.b2", None, 0.9)]


def test_the_page_of_keys_is_current():
  page = pathlib.Path(__file__).parents[1] / "docs" / "keys.md"
  assert page.read_text() == schema.page(), "python -m experiments.schema"
  assert all(key.meaning for key in KEYS.values())


def test_none_is_none_on_the_command_line():
  column = base.data_section("files", path="x.csv", user="who")
  values, argv = flags.FlagValues(), ["main", "--config.data.user=None",
                                      "--config.data.max_history=None"]
  holder = config_flags.DEFINE_config_dict(
    "config", ConfigDict({"data": column}), flag_values=values, sys_argv=argv
  )
  values(argv)
  assert holder.value.data.user is None
  assert holder.value.data.max_history is None
  assert commands.Console  # whose module registers the parsers


@pytest.mark.parametrize(("name", "said", "words"), [
  ("backbone", "heads=3: too many",
   "config section backbone: heads=3: too many"),
  ("pin.weighting", "c=-1: too small",
   "config key pin.weighting: c=-1: too small"),
  ("backbone", "config key dispatch=0: no", "config key dispatch=0: no"),
])  # fmt: skip
def test_an_error_of_the_library_says_which_section_it_comes_from(
  name, said, words
):
  with pytest.raises(InputError) as raised, schema.section(name):
    raise InputError(said)
  assert str(raised.value) == words
