"""What the documentation says against the code: examples, links, names."""

import ast
import doctest
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import commands, schema
from pin_jax.aggregation import aggregator
from pin_jax.types import InputError

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


def _blocks(page):
  return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def _run(test):
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
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


def test_examples_of_the_data_page():
  page = ROOT / "docs" / "data.md"
  text = "\n".join(x for x in _blocks(page) if x.startswith(">>> "))
  _run(doctest.DocTestParser().get_doctest(text, {}, page.name, None, 0))


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("page", ["README.md", "docs/README.md"])
def test_plain_examples(page):
  [block] = [x for x in _blocks(ROOT / page) if "group_loss" in x]
  names = {}
  exec(block, names)  # noqa: S102
  grads = jax.vmap(jax.grad(names["group_loss"]), (None, 0, 0))(
    names["params"], names["groups"], names["keys"]
  )
  leaves = zip(*map(jax.tree.leaves, (names["out"].gradient, grads)),
               strict=True)
  for got, grad in leaves:
    want = 0.8 * grad[0] + 0.2 * grad[1]
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.usefixtures("compile_quickly")
def test_the_ten_lines_of_python(tmp_path, monkeypatch, capsys):
  """With fewer methods and steps."""
  monkeypatch.chdir(tmp_path)
  rows = (
    f"{u},{(u * i) % 31},{i}" for u in range(40) for i in range(4 + u % 9)
  )
  (tmp_path / "sales.csv").write_text("\n".join(["user,item,time", *rows]))
  [text] = [x for x in _blocks(ROOT / "README.md") if "import pin_jax" in x]
  assert len(text.splitlines()) <= 10
  place = 'workdir="runs/sales"'
  exec(text.replace(place, (  # noqa: S102
    f"{place}, methods=('base', 'memory_alone'), backbone_steps=10, refit=0, "
    "plugin_steps=10, validation={'every': 10}"
  )), {})
  assert (tmp_path / "groups.svg").stat().st_size > 1000
  said = capsys.readouterr().out
  assert "Are users with few behaviours (tail) served better" in said
  assert "memory_alone" in said and "shape: (20, 7)" in said


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


def _module_exists(name):
  path = ROOT.joinpath(*name.split("."))
  return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def _wrong(page, text):
  """What the text names that is not there."""
  folders = "pin_jax|experiments|third_party|benchmarks|tests|docs"
  for link in re.findall(r"\]\(([^)\s]+)\)", text):
    if not re.match(r"[a-z]+:|#", link):
      if not (page.parent / link.split("#")[0]).exists():
        yield link
  for path in re.findall(rf"`((?:{folders})/[\w./]*)`", text):
    if not (ROOT / path).exists() and path != "docs/api/":
      yield path
  for name in re.findall(r"python -m ((?:experiments|benchmarks|tests|"
                         r"third_party)\.[\w.]*\w)", text):
    if not _module_exists(name):
      yield name
  for name in re.findall(r"--config=([\w/.]*\w)", text):
    try:
      commands.config_file(name)
    except InputError:
      if name != "mine.py":  # the reader's own
        yield name
  for key in re.findall(r"--config\.([a-z][\w.]*\w)", text):
    if key not in KEYS and not any(x.startswith(f"{key}.") for x in KEYS):
      yield key


@by_page
def test_what_pages_name_exists(page):
  assert not list(_wrong(page, page.read_text()))


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
    if module in NAMES and name not in ("py", "html"):
      assert name in NAMES[module], f"{module}.{name}"


def test_the_checks_see_what_is_wrong():
  wrong = (
    "[a](no.md) [b](README.md) `pin_jax/typos.py` `pin_jax/types.py` "
    "python -m experiments.mian python -m experiments.main "
    "--config=no --config=toys:path=x.csv --config=experiments/configs/no.py "
    "--config.backbone.with=1 --config.backbone.width=1 --config.backbone"
  )
  assert list(_wrong(ROOT / "README.md", wrong)) == [
    "no.md", "pin_jax/typos.py", "experiments.mian", "no",
    "experiments/configs/no.py", "backbone.with",
  ]
  assert "assign_groups" in NAMES["activeness"]


def test_the_changelog_and_the_citation_are_of_this_version():
  version = re.search(r"^version = (\S+)", (ROOT / "setup.cfg").read_text(),
                      re.MULTILINE)[1]
  changes = (ROOT / "CHANGELOG.md").read_text()
  assert re.search(rf"^## \[?{re.escape(version)}\b", changes, re.MULTILINE)
  citation = (ROOT / "CITATION.cff").read_text()
  assert f"version: {json.dumps(version)}" in citation
