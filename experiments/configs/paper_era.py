"""The protocol of older papers: pointwise training, sampled candidates.

  python -m experiments.main --config=paper_era \
    --workdir=runs/paper_era

Binary cross-entropy with four uniform negatives a position, windows of ten
behaviours, and the target ranked among 99 items that the user never interacts
with; AUC, GAUC, log loss, HR and NDCG. Only the abstract of the paper is known
to us, so that these settings are what such papers commonly use, not the
paper's. The results stand apart from those of full ranking and
are not comparable with it.

On MovieLens-100k about four minutes on one CPU core. Expect a base of AUC .905
and NDCG@10 .439 among the 100, and PIN at -0.6 % [-1.0, -0.2] AUC and -1 %
[-4, +2] NDCG@10 (one seed: nothing proven). The log loss (base .129) is above
that of a constant guess of 1 % (.056): training sees a positive for every four
negatives, evaluation one for every 99, and nothing recalibrates.
"""

from ml_collections import ConfigDict

from experiments.configs import base


def get_config(argument: str | None = None) -> ConfigDict:
  """Returns the configuration; argument: path=FILE (Parquet, CSV, .inter)."""
  config = base.default()
  values = base.parse(argument, path=base.data_path("ml-100k.inter"))
  config.data = base.data_section("files", path=values["path"])
  config.loss.update(
    name="bce", negatives=4, proposal="uniform", candidates="own"
  )
  config.evaluation.update(protocol="sampled", negatives=99)
  config.backbone.update(length=10, dropout=0.2)
  config.backbone_steps, config.plugin_steps = 1500, 300
  return config
