"""MovieLens-100k: 943 users, 1,682 items, 100,000 ratings.

  python -m experiments.main --config=ml100k \
    --workdir=runs/ml100k

About three minutes on one CPU core. Expect, history masked, a base of NDCG@10
.085 and PIN at -5 % [-14, +4] for tail users (one seed: nothing proven): the
data set is too small to tell methods apart, and there to try things out.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE, source=tfds, recipe=…"""
  config, recipe = base.movielens(argument, "ml-100k.inter", "movielens/100k")
  config.backbone.update(length=50, dropout=0.5)
  config.batch_size = 60
  config.optimizer.learning_rate = 1.5e-3
  config.backbone_steps, config.plugin_steps = 900, 200
  base.recipe(config, recipe)
  return config
