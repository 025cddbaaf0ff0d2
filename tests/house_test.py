"""The house's rules, read off the source: imports go downwards only."""

import ast
import graphlib
import pathlib
import re

import pytest

from experiments import schema

ROOT = pathlib.Path(__file__).parents[1]

# A module imports from lower levels, or from its own without cycles.
LEVELS = {
  "pin_jax.types": 0,
  "pin_jax.disk": 0,
  "pin_jax.aggregation": 0,
  "pin_jax.data": 1,
  "pin_jax.models": 1,
  "pin_jax.scale": 1,
  "pin_jax.training": 2,
  "pin_jax.evaluation": 2,
  "pin_jax.serving": 3,
  "experiments": 4,
  "pin_jax": 5,  # the front door, which nothing of the package imports
  "third_party": 5,
  "benchmarks": 5,
}
FLAX = ("pin_jax.models",)
# Run under the environments of other libraries; import nothing of the package.
GUESTS = "third_party.peers"
BANNED = ("tensorflow", "pandas", "pickle", "importlib")
MAGIC = ("eval", "exec", "__import__")


def _name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sources():
  packages = ("pin_jax", "experiments", "third_party", "benchmarks")
  paths = [p for d in packages for p in sorted((ROOT / d).rglob("*.py"))]
  return {_name(p): ast.parse(p.read_text(), str(p)) for p in paths}


SOURCES = _sources()
PACKAGES = {
  _name(p) for p in ROOT.rglob("__init__.py") if _name(p) in SOURCES
}


def _within(module, package):
  return module == package or module.startswith(package + ".")


def _absolute(node, module):
  """The module that a `from ... import` names, dots resolved."""
  if not node.level:
    return node.module
  drop = node.level - (module in PACKAGES)
  base = module.split(".")[: len(module.split(".")) - drop]
  return ".".join(base + ([node.module] if node.module else []))


def _imports(module, tree):
  """Modules that a module imports, anywhere in its text."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = _absolute(node, module)
      for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in SOURCES or base not in SOURCES else base


def _level(module):
  found = [name for name in LEVELS if _within(module, name)]
  found = [n for n in found if n != "pin_jax" or module == "pin_jax"]
  assert found, f"{module} has no level; give it one in LEVELS"
  return LEVELS[max(found, key=len)]


IMPORTS = {m: sorted(set(_imports(m, tree))) for m, tree in SOURCES.items()}
INNER = {m: [i for i in IMPORTS[m] if i in SOURCES] for m in SOURCES}


def test_the_sources_are_found():
  assert {"pin_jax.training.loop", "pin_jax.models.sasrec"} <= set(SOURCES)
  assert "pin_jax.training.steps" in INNER["pin_jax.training.loop"]
  assert "jax" in IMPORTS["pin_jax.training.losses"]


def test_imports_are_resolved():
  text = (
    "import a.b\nfrom pin_jax.training import losses\n"
    "from pin_jax.types import X\n"
    "from . import splits\nfrom ..models import sasrec\nfrom c import d\n"
    "def f():\n  from pin_jax.training.loop import run\n"
  )
  assert list(_imports("pin_jax.data.batches", ast.parse(text))) == [
    "a.b",
    "pin_jax.training.losses",
    "pin_jax.types",
    "pin_jax.data.splits",
    "pin_jax.models.sasrec",
    "c.d",
    "pin_jax.training.loop",
  ]


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_go_downwards(module):
  for other in INNER[module]:
    assert _level(other) <= _level(module), f"{module} imports {other}"


def test_imports_have_no_cycles():
  try:
    order = list(graphlib.TopologicalSorter(INNER).static_order())
  except graphlib.CycleError as error:
    raise AssertionError(" -> ".join(error.args[1])) from None
  assert set(order) == set(SOURCES)


def test_the_idea_imports_nothing_of_the_package():
  for module in SOURCES:
    if _within(module, "pin_jax.aggregation"):
      assert all(_within(i, "pin_jax.aggregation") for i in INNER[module])


def test_the_package_imports_no_adapter_and_no_experiment():
  for module in SOURCES:
    if not _within(module, "pin_jax") or module == "pin_jax":
      continue
    for other in IMPORTS[module]:
      for outside in ("third_party", "experiments", "benchmarks", "tests"):
        assert not _within(other, outside), f"{module} imports {other}"


def test_flax_stays_in_its_rooms():
  users = {
    m for m in SOURCES if any(_within(i, "flax") for i in IMPORTS[m])
  }
  assert users
  for module in users:
    assert any(_within(module, room) for room in FLAX), module


@pytest.mark.parametrize("banned", BANNED)
def test_banned_modules_are_imported_nowhere(banned):
  users = [
    m for m in SOURCES
    if any(_within(i, banned) for i in IMPORTS[m]) and not _within(m, GUESTS)
  ]
  assert users == []


def test_guests_import_nothing_of_the_package():
  guests = [m for m in SOURCES if _within(m, GUESTS)]
  assert guests
  assert [m for m in guests if INNER[m]] == []


def test_no_name_is_resolved_through_strings():
  for module, tree in SOURCES.items():
    for node in ast.walk(tree):
      if isinstance(node, ast.Name) and node.id in MAGIC:
        raise AssertionError(f"{module}:{node.lineno} uses {node.id}")


PICKLED = {  # functions that may run what a file holds
  "load": ("np", "numpy", "jnp", "joblib", "torch", "marshal", "shelve"),
  "loads": ("marshal", "dill", "cloudpickle"),
  "deserialize": ("pl", "DataFrame", "LazyFrame"),
  "extractall": None,
  "unpack_archive": None,
}


def _unsafe_calls(tree):
  """Lines that load what may hold a pickle, or extract an archive."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call):
      continue
    refused = any(
      k.arg == "allow_pickle" and isinstance(k.value, ast.Constant)
      and k.value.value is False
      for k in node.keywords
    )
    if isinstance(node.func, ast.Attribute) and node.func.attr in PICKLED:
      owners = PICKLED[node.func.attr]
      owner = ast.unparse(node.func.value).split(".")[-1]
      if (owners is None or owner in owners) and not refused:
        yield node.lineno


def test_unsafe_calls_are_seen():
  text = (
    "np.load(f)\nnp.load(f, allow_pickle=False)\njson.load(f)\n"
    "pl.DataFrame.deserialize(f)\narchive.extractall(d)\n"
    "np.load(f, allow_pickle=True)\n"
  )
  assert list(_unsafe_calls(ast.parse(text))) == [1, 4, 5, 6]


def test_no_file_is_unpickled_or_extracted():
  for module, tree in SOURCES.items():
    assert list(_unsafe_calls(tree)) == [], module


def _strings(tree):
  """(line, text) of every string of a module, docstrings too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.lineno, node.value


def _launchers_words(text):
  """Flags, config keys and commands that a text names."""
  flags = re.findall(r"(?<![\w-])--[a-z]\w*", text)
  commands = re.findall(r"python -m |\bexperiments[./]\w+", text)
  dotted = re.findall(r"(?<![\w.])[a-z_]+\.[a-z_]+\b(?!\()", text)
  return flags + commands + [x for x in dotted if x in KEYS]


KEYS = {
  key for source in schema.SOURCES for key in schema.keys_of(source)
  if "." in key
}


def test_words_of_the_launcher_are_seen():
  for text in (
    "set pin.weighting", "give --config", "python -m x", "experiments.main",
  ):
    assert _launchers_words(text), text
  assert not _launchers_words("give `items`, a -- b, weights.max, optimizer")


def test_the_library_names_its_own_arguments_alone():
  for module, tree in SOURCES.items():
    if _within(module, "pin_jax"):
      for line, text in _strings(tree):
        assert not _launchers_words(text), f"{module}:{line}"
