"""Ten million items and more users than fit a device, on a pod.

  python -m benchmarks.plan --config=experiments/configs/industrial.py \
    --topology=v5e:4x4 --items=10000000 --users=100000000 \
    --interactions=2000000000

plans it without a TPU; argument data= and model= shape the mesh, 4 x 4 by
default. The data are a file: --config=…/industrial.py:path=my.parquet.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration."""
  values = base.parse(
    argument, path="interactions.parquet", data="4", model="4"
  )
  config = base.default()
  config.data = base.data_section("files", path=values["path"])
  config.mesh.update(data=int(values["data"]), model=int(values["model"]))
  config.backbone.update(length=200, width=256, heads=4, compute="bfloat16")
  config.loss.update(name="sampled_softmax", negatives=4096)
  config.optimizer.update(tables="row_sparse", learning_rate=1e-3)
  config.pin.diagnose_every = 0
  config.batch_size = 1280
  config.backbone_steps, config.plugin_steps = 100_000, 10_000
  config.validation.update(every=1000, users=10_000)
  return config
