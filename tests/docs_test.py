"""What the documentation says against the code: examples, links, names."""

import ast
import doctest
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import schema
from pin_jax.aggregation import aggregator

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([
  *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("third_party/*.md")
])
WRITTEN = [*PAGES, ROOT / "docs" / "tutorial.py"]
SOURCES = [
  p for d in ("pin_jax", "experiments", "third_party", "benchmarks")
  for p in sorted((ROOT / d).rglob("*.py"))
]
KEYS = {key for source in schema.SOURCES for key in schema.keys_of(source)}

by_page = pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.name)


# Examples.


def _run(test):
  flags = doctest.ELLIPSIS
  runner = doctest.DocTestRunner(optionflags=flags)
  said = []
  found = runner.run(test, out=said.append)
  assert found.attempted and not found.failed, "".join(said)


@pytest.mark.usefixtures("compile_quickly")
def test_the_example_of_aggregation():
  [test] = [
    t for t in doctest.DocTestFinder(recurse=False).find(aggregator)
    if t.examples
  ]
  _run(test)


def test_no_example_is_left_out():
  """Every other one needs what no test may: the network."""
  documented = ast.Module | ast.ClassDef | ast.FunctionDef
  for path in SOURCES:
    for node in ast.walk(ast.parse(path.read_text())):
      text = isinstance(node, documented) and ast.get_docstring(node)
      examples = doctest.DocTestParser().get_examples(text or "")
      if path.stem != "aggregator":
        assert all(x.options.get(doctest.SKIP) for x in examples), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_of_pages(page):
  blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
  text = "\n".join(x for x in blocks if x.startswith(">>> "))
  if text:
    _run(doctest.DocTestParser().get_doctest(text, {}, page.name, None, 0))


def test_the_tutorial_runs_from_csv_to_comparison(tmp_path):
  environment = os.environ | {
    "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  ran = subprocess.run(
    [sys.executable, ROOT / "docs" / "tutorial.py"], env=environment,
    cwd=tmp_path, capture_output=True, text=True, check=False,
  )
  assert ran.returncode == 0, ran.stderr
  number = r"[+-]?\d+\.\d+"
  for part in ("tail", "head"):
    [found] = re.findall(
      rf"^{part}, \d+ users: base ({number}), PIN ({number}), change ({number})"
      rf" % \[({number}), ({number})\]$", ran.stdout, re.MULTILINE,
    )
    before, after, change, low, high = map(float, found)
    assert 0 < before < 1 and 0 < after < 1
    assert change == pytest.approx(100 * (after / before - 1), abs=0.15)
    assert low <= change <= high
  assert "refused: …/sales.csv has no user column" in ran.stdout
  assert not list(tmp_path.iterdir())


# Links and names.


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
  for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if not re.match(r"[a-z]+:|#", link):
      assert (page.parent / link.split("#")[0]).exists(), link


def _module_exists(name):
  path = ROOT.joinpath(*name.split("."))
  return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@by_page
def test_modules_that_commands_run_exist(page):
  ours = r"python -m ((?:experiments|benchmarks|tests)\.[\w.]*\w)"
  for name in re.findall(ours, page.read_text()):
    assert _module_exists(name), name


@by_page
def test_config_files_exist(page):
  for path in re.findall(r"--config=([\w/]+\.py)", page.read_text()):
    assert (ROOT / path).exists(), path


@by_page
def test_config_keys_exist(page):
  for key in re.findall(r"--config\.([\w.]*\w)", page.read_text()):
    section = any(known.startswith(f"{key}.") for known in KEYS)
    assert key in KEYS or section, key


def _defined(path):
  """Names at the top of a module, and the members of its classes."""
  body = ast.parse(path.read_text()).body
  body += [x for c in body if isinstance(c, ast.ClassDef) for x in c.body]
  for node in body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      yield from (t.id for t in targets if isinstance(t, ast.Name))


NAMES = {}
for _path in SOURCES:
  NAMES.setdefault(_path.stem, set()).update(_defined(_path))
NAMES["aggregation"] |= NAMES["aggregator"]  # the package hands them on


@pytest.mark.parametrize(
  "page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))],
  ids=lambda p: str(p.relative_to(ROOT)),
)
def test_functions_that_pages_name_exist(page):
  for module, name in re.findall(r"`(\w+)\.(\w+)[`(]", page.read_text()):
    if module in NAMES and name != "py":
      assert name in NAMES[module], f"{module}.{name}"


def test_the_checks_see_what_is_wrong():
  assert "assign_groups" in NAMES["activeness"]
  assert "backbone.width" in KEYS and "data.k_core" in KEYS
  assert "backbone.with" not in KEYS
  assert not _module_exists("experiments.mian")
  assert _module_exists("experiments.main")


def test_the_changelog_and_the_citation_are_of_this_version():
  version = re.search(r"^version = (\S+)", (ROOT / "setup.cfg").read_text(),
                      re.MULTILINE)[1]
  changes = (ROOT / "CHANGELOG.md").read_text()
  assert re.search(rf"^## \[?{re.escape(version)}\b", changes, re.MULTILINE)
  citation = (ROOT / "CITATION.cff").read_text()
  assert f"version: {json.dumps(version)}" in citation
