"""Aggregation over eight devices, in a process of its own.

The batch lies on the devices by rows, so that no device holds a group: a rule
that saw its device's gradients instead of the global ones would weigh them
differently.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from pin_jax.aggregation import weightings

ROOT = pathlib.Path(__file__).parents[1]
PATHS = ("stacked", "sequential")


def compute():
  """Prints {rule: {'one' or path: (weights, gradient)}} as JSON."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import AxisType, NamedSharding, PartitionSpec
  from paths_test import SIZE, rule

  from pin_jax import aggregation

  assert jax.device_count() == 8
  rng = np.random.default_rng(0)
  # Each row pulls elsewhere, so that the devices' own gradients disagree.
  batch = {
    "x": rng.normal(size=(SIZE, 16, 5)), "y": 3 * rng.normal(size=(SIZE, 16)),
  }
  batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
  params = {
    "w": jnp.asarray(rng.normal(size=5), jnp.float32), "b": jnp.float32(0.3),
  }

  def loss(params, rows, key):
    del key
    error = rows["x"] @ params["w"] + params["b"] - rows["y"]
    return jnp.mean(error**2)

  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  by_rows = NamedSharding(mesh, PartitionSpec(None, "data"))
  keys = jax.random.split(jax.random.key(0), SIZE)

  def run(path, batch):
    def step(params, batch):
      return {
        name: aggregation.aggregate(loss, rule(name), path=path).step(
          params, batch, keys, rule(name).init()
        )
        for name in weightings.WEIGHTINGS
      }

    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(step, compiler_options=quick)(params, batch)

  spread = jax.device_put(batch, by_rows)
  assert len({s.device for s in spread["x"].addressable_shards}) == 8
  found = {"one": run("stacked", batch)}
  found |= {path: run(path, spread) for path in PATHS}
  print(json.dumps({
    how: {
      name: [
        np.asarray(out.weights).tolist(),
        [*np.asarray(out.gradient["w"]).tolist(), float(out.gradient["b"])],
      ]
      for name, out in rules.items()
    }
    for how, rules in found.items()
  }))


@pytest.fixture(scope="module")
def found():
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
  }
  done = subprocess.run(
    [sys.executable, __file__], env=environment, capture_output=True, text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", list(weightings.WEIGHTINGS))
def test_the_rule_sees_the_global_gradients(found, name, path):
  for got, want in zip(found[path][name], found["one"][name], strict=True):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * scale)


if __name__ == "__main__":
  compute()
