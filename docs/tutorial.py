"""From a CSV to a comparison of PIN with the joint base, cell by cell.

  python docs/tutorial.py

Plain Python; editors that know the percent format (VS Code, Spyder, PyCharm,
jupytext) open it as a notebook. It needs the installed package and about a
minute of one CPU core. The models are tiny and trained for a few hundred steps,
the data are simulated: this shows how the library is used, not how well the
method does.
"""

# %% [markdown]
# # 1. A CSV
#
# Strings for users and items, ISO dates, rows in no order. The behaviour comes
# from the simulator, in which inactive and active users prefer different items.

# %%
import datetime
import pathlib
import tempfile

import jax
import numpy as np
import polars as pl

import pin_jax
from pin_jax import aggregation
from pin_jax.data import activeness, batches, files, simulator, splits
from pin_jax.evaluation import metrics, ranking, statistics
from pin_jax.models import plugins
from pin_jax.models.gru4rec import gru4rec
from pin_jax.training import loop, objectives
from pin_jax.training.optimizers import make_optimizer
from pin_jax.training.steps import (
  Adjustment,
  Operands,
  backbone_step,
  init_state,
  plugin_step,
)
from pin_jax.types import InputError, PyTree, Requests

world = simulator.make_world(
  simulator.WorldSpec(num_items=40, borders=(5, 8, 14, 40)), seed=0
)
drawn, _ = simulator.simulate(world, num_users=600, seed=1)
who = np.repeat(np.arange(drawn.num_users), drawn.lengths)
days = np.arange(len(who)) - drawn.offsets[who]  # a behaviour a day
first = datetime.date(2024, 1, 1)
table = pl.DataFrame({
  "client": [f"c{user:04d}" for user in who],
  "item_id": [f"sku-{item:03d}" for item in drawn.items],
  "bought": [str(first + datetime.timedelta(int(day))) for day in days],
}).sample(fraction=1.0, shuffle=True, seed=0)

folder = tempfile.TemporaryDirectory()
path = pathlib.Path(folder.name) / "sales.csv"
table.write_csv(path)
print(table.head(3))

# %% [markdown]
# # 2. Reading
#
# `item_id` is a name that the reader knows, the other two have to be named;
# what it cannot read it refuses in one line. Rows are sorted by user and time,
# items numbered 1..V by their sorted ids (0 is padding); the ids travel along.

# %%
try:
  files.read(path)
except InputError as error:
  print("refused:", str(error).replace(folder.name, "…"))

data = files.read(path, user="client", time="bought", k_core=5)
print(data.num_users, "users,", data.num_items, "items,",
      data.num_interactions, "interactions")
print(data.notes)
print(data.user_ids[0], "bought", data.item_ids[data.items[:3] - 1], "first")

# %% [markdown]
# # 3. The split, and who is active
#
# The last behaviour of each user is for the test, the one before it for
# validation. Activeness counts what is left for training. The adjustment sums
# over `groups`; users of a segment (0 tail, 1 head) share a plugin.

# %%
NUM_GROUPS, LENGTH, WIDTH = 3, 3, 16
split = splits.leave_one_out(data)
users = split.activeness, data.user_ids
groups = activeness.assign_groups(*users, num_groups=NUM_GROUPS)
segments = activeness.assign_segments(*users, head_share=0.2)
targets = batches.training_targets(split)
prior = activeness.prior("users", groups, targets, NUM_GROUPS)
share = activeness.prior("interactions", groups, targets, NUM_GROUPS)
for part in activeness.describe(split.activeness, groups, segments)["groups"]:
  print(part)
print("P(d), of users:         ", prior.round(3))
print("shares of interactions: ", share.round(3))

# %% [markdown]
# Were P(d) the share of interactions, the aggregated gradient would be that of
# joint training. The two lines above differ; that difference is what the
# adjustment acts by.
#
# # 4. One gradient aggregation step, by hand
#
# A batch holds as many windows of every group. Each group has one loss and one
# gradient; their Gramian is all that a rule for the weights may read of them.

# %%
backbone = gru4rec(data.num_items, length=LENGTH, width=WIDTH, dropout=0.0)
params = jax.jit(backbone.init)(jax.random.key(0))
sequences = batches.make_sequences(split)
by_group = batches.make_pool(
  targets, groups, num_groups=NUM_GROUPS, length=LENGTH
)
draw = jax.jit(batches.Draw(batch_size=32, length=LENGTH).batch)
batch = draw(jax.random.key(1), sequences, by_group)
print("histories [G, B, L]:", batch.history.shape)

group_loss = objectives.group_losses(backbone, mean="interactions").group_loss
windows = objectives.GroupBatch(batch, importance=None)
keys = jax.random.split(jax.random.key(2), NUM_GROUPS)
value_and_grad = jax.value_and_grad(group_loss)
weighting = aggregation.backdoor(prior)


@jax.jit
def by_hand(params: PyTree, state: PyTree) -> tuple:
  """The method on one slide."""
  losses, grads = jax.vmap(value_and_grad, (None, 0, 0))(params, windows, keys)
  gramian = aggregation.gramian(grads)
  weights, state = weighting.update(gramian, losses, state)
  return losses, gramian, weights, aggregation.combine(weights, grads)


losses, gramian, weights, gradient = by_hand(params, weighting.init())
print("losses [G]:", losses)
print("Gramian [G, G]:\n", gramian)
print("weights [G]:", weights)

# %% [markdown]
# `aggregation.aggregate(group_loss, weighting)` builds that step for any loss,
# rule and parameters, on the cheapest of several equal paths; training uses it.
#
# # 5. Training the joint base and PIN
#
# Joint training is the same step with one group. PIN takes its backbone from
# the groups' gradients, freezes it and trains a plugin for each segment. The
# base gets as many steps as both stages of PIN together, and every stage keeps
# the params of its best validation.

# %%
BACKBONE_STEPS, PLUGIN_STEPS, BATCH, EVERY = 200, 100, 60, 50


def requests(part: str) -> Requests:
  """The users with a target in 'validation' or 'test'."""
  positions = getattr(split, part)
  users = np.flatnonzero(positions >= 0)
  return Requests(users, positions[users], segments[users])


def ranker(plugin: plugins.Plugin | None) -> ranking.RankFn:
  """The full ranking of targets among the items outside the history."""
  return ranking.make_ranker(
    plugins.Model(backbone, plugin), num_items=data.num_items, length=LENGTH
  )


def train_backbone(
  groups: np.ndarray, prior: np.ndarray, steps: int
) -> PyTree:
  """Stage 1 with a group for every entry of the prior."""
  count = len(prior)
  pool = batches.make_pool(targets, groups, num_groups=count, length=LENGTH)
  adjustment = Adjustment(aggregation.backdoor(prior))
  optimizer = make_optimizer(steps, learning_rate=1e-2)
  draw = batches.Draw(BATCH // count, LENGTH)
  step = backbone_step(backbone, adjustment, optimizer, draw)

  def evaluate(run: int, params: PyTree) -> dict[str, float]:
    ranks = rank(plugins.Weights(params, None), sequences, validation)
    return {"all": metrics.ndcg(ranks.rank, 10).mean()}

  for event in loop.run(
    step, init_state(params, optimizer, adjustment),
    Operands(jax.random.key(3), sequences, pool, None),
    loop.Plan(steps, EVERY, select=("all",), dispatch=EVERY), evaluate,
  ):
    if isinstance(event, loop.Validation):
      print(f"  step {event.step}: {event.values['all']:.4f}")
  return event.best


rank, validation = ranker(None), requests("validation")
print("base, NDCG@10 on validation")
base = train_backbone(
  np.zeros_like(groups), np.ones(1), BACKBONE_STEPS + PLUGIN_STEPS
)
print("PIN, stage 1")
adjusted = train_backbone(groups, prior, BACKBONE_STEPS)

# %%
plugin = plugins.bottleneck(WIDTH, hidden=WIDTH // 2)
rank_plugged = ranker(plugin)
optimizer = make_optimizer(PLUGIN_STEPS, learning_rate=5e-3)
by_segment = batches.make_pool(targets, segments, num_groups=2, length=LENGTH)
step = plugin_step(
  backbone, plugin, optimizer, batches.Draw(BATCH // 2, LENGTH)
)


def evaluate_plugins(run: int, params: PyTree) -> dict[str, float]:
  """Validation of tail and head, each of which keeps its own best step."""
  served = plugins.Weights(adjusted, params)
  ndcg = metrics.ndcg(rank_plugged(served, sequences, validation).rank, 10)
  tail, head = (ndcg[validation.segments == s].mean() for s in (0, 1))
  return {"tail": tail, "head": head}


print("PIN, stage 2, tail and head")
start = plugins.init_stacked(plugin, jax.random.key(4), 2)
plan = loop.Plan(
  PLUGIN_STEPS, EVERY, select=("tail", "head"), dispatch=EVERY, stacked=True,
  evaluate_first=True,
)
for event in loop.run(
  step, init_state(start, optimizer, stacked=True),
  Operands(jax.random.key(5), sequences, by_segment, adjusted), plan,
  evaluate_plugins,
):
  if isinstance(event, loop.Validation):
    tail, head = event.values.values()
    print(f"  step {event.step}: tail {tail:.4f}, head {head:.4f}")
personal = event.best

# %% [markdown]
# # 6. Ranking and comparison
#
# Every model ranks the test target of each user among all items, so that the
# comparison is paired. The interval is a bootstrap over users; with one seed it
# says nothing of the spread over seeds (`seeds=` takes them in). Below three
# seeds the main job gives no verdict.

# %%
test = requests("test")
of_base = rank(plugins.Weights(base, None), sequences, test)
of_pin = rank_plugged(plugins.Weights(adjusted, personal), sequences, test)
rows = pl.DataFrame({
  "user": data.user_ids[test.users].tolist(),
  "segment": test.segments,
  "base": metrics.ndcg(of_base.rank, 10),
  "pin": metrics.ndcg(of_pin.rank, 10),
})
for number, name in enumerate(("tail", "head")):
  own = rows.filter(pl.col("segment") == number)
  change = statistics.relative_change(own["base"], own["pin"])
  print(
    f"{name}, {len(own)} users: base {own['base'].mean():.4f}, PIN "
    f"{own['pin'].mean():.4f}, change {100 * change.estimate:+.1f} % "
    f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
  )
print("one seed: nothing proven")

# %% [markdown]
# # 7. The same in one call
#
# `pin_jax.compare` does all this with checkpoints, logs, tables and plots, as
# `python -m experiments.main --config=files:path=my.csv --workdir=runs/mine`
# does. Here it trains for a few steps, to show what it leaves.
# docs/protocols.md says what such a comparison shows and what it does not.

# %%
job = pin_jax.compare(
  data, pathlib.Path(folder.name) / "job", methods=("base", "pin"),
  backbone_steps=50, plugin_steps=50, refit=0, validation={"every": 50},
  backbone={"length": LENGTH, "width": WIDTH}, batch_size=BATCH,
)
print(job.table())
print(job.recommender().recommend(data.user_ids[:2].tolist(), k=3))

# %%
folder.cleanup()
