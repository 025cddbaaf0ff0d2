import os
import pathlib
import subprocess
import sys
import zipfile

# The fake package makes an attempt to import TensorFlow visible even where
# TensorFlow is not installed.
FAKE = '__version__ = "0.0.0"\n'
IMPORTS = """
import pkgutil, sys
import pin_jax
for module in pkgutil.walk_packages(pin_jax.__path__, "pin_jax."):
  __import__(module.name)
"""
READ = """
import sys
from pin_jax.data.tfds import read_tfds
data = read_tfds("movielens/100k", data_dir="data", manual_dir="manual")
assert data.num_interactions == 4
data = read_tfds("movielens/100k", data_dir="data", download=False)
assert data.num_users == 2
"""
CHECK = """
names = sorted(n for n in sys.modules if n.partition(".")[0] == "tensorflow")
assert not names, names
assert "tensorflow" not in sys.modules
"""


def run(code, directory, *paths):
  root = pathlib.Path(__file__).parents[1]
  environment = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, [*paths, root])),
    "JAX_PLATFORMS": "cpu",
  }
  result = subprocess.run(
    [sys.executable, "-c", code + CHECK],
    cwd=directory,
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr[-2000:]


def test_importing_the_package_leaves_tensorflow_out(tmp_path):
  run(IMPORTS, tmp_path)


def test_preparing_and_reading_leaves_tensorflow_out(tmp_path):
  (tmp_path / "manual").mkdir()
  with zipfile.ZipFile(tmp_path / "manual" / "ml-100k.zip", "w") as archive:
    archive.writestr(
      "ml-100k/u.data", "1\t5\t3\t9\n1\t6\t4\t8\n2\t5\t5\t7\n2\t7\t1\t7\n"
    )
  fake = tmp_path / "fake" / "tensorflow"
  fake.mkdir(parents=True)
  (fake / "__init__.py").write_text(FAKE)
  run(READ, tmp_path, fake.parent)
