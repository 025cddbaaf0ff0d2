"""SASRec in plain PyTorch, as fast as we could make it on one CPU core.

Run by benchmarks/throughput.py. It has the sizes, the initial values, the
windows, the optimizer and its schedule, and the loss of the joint base. What
makes it fast:

- Only real positions exist: they lie packed in [N, D], so that no layer but
  attention sees padding and every state has a target.
- Attention runs on chunks of rows of like length, each padded to its longest
  row on the right, where the causal mask hides it.
- The softmax goes by chunks of positions whose logits stay in the cache, one
  column a position, which is the layout that the products like best; its
  gradient is formed in the forward pass, so that no logit is kept or computed
  twice.
- AdamW is fused. In evaluation, only the last position of the last block is
  computed beyond its keys and values.

With `--compile`, torch.compile compiles what does not depend on the lengths of
the rows (all of a block but attention), once for any number of positions. The
whole encoder would be compiled again for every batch.
"""

import argparse
import math
from typing import Any, NamedTuple

import numpy as np
import protocol
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

LOGIT_ROWS = 48  # positions whose logits are alive at a time
ROWS = 64  # rows of a chunk in attention
USERS = 64  # users whose scores are alive at a time


class Packed(NamedTuple):
  """Windows without their padding, shortest first.

  Attributes:
    items: [N] what is read.
    targets: [N] what follows.
    positions: [N] counted so that a window's last is L - 1.
    cells: of every chunk, where its positions lie in [rows, longest].
    shapes: of every chunk, (rows, longest).
    last: [B] index of every window's last position.
  """

  items: torch.Tensor
  targets: torch.Tensor
  positions: torch.Tensor
  cells: list[torch.Tensor]
  shapes: list[tuple[int, int]]
  last: torch.Tensor


def pack(
  items: np.ndarray, first: np.ndarray, count: np.ndarray, length: int
) -> Packed:
  """Packs the windows of `count` items, and targets, from `first` on."""
  order = np.argsort(count, kind="stable")
  first, count = first[order], count[order]
  ends = np.cumsum(count)
  row = np.repeat(np.arange(len(count)), count)
  column = np.arange(ends[-1]) - (ends - count)[row]
  index = first[row] + column
  cells, shapes = [], []
  for start in range(0, len(count), ROWS):
    stop = min(start + ROWS, len(count))
    longest = int(count[stop - 1])
    part = slice(ends[start] - count[start], ends[stop - 1])
    cells.append(
      torch.from_numpy((row[part] - start) * longest + column[part])
    )
    shapes.append((stop - start, longest))
  as_tensor = lambda x: torch.from_numpy(x.astype(np.int64))
  return Packed(
    as_tensor(items[index]), as_tensor(items[index + 1]),
    as_tensor(length - count[row] + column), cells, shapes,
    as_tensor(ends - 1),
  )


class Block(nn.Module):
  """Pre-norm transformer block on packed positions."""

  def __init__(
    self, width: int, heads: int, hidden: int, dropout: float
  ) -> None:
    """Makes the layers."""
    super().__init__()
    self.heads, self.dropout = heads, dropout
    self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in "ab")
    self.qkv = nn.Linear(width, 3 * width)
    self.out = nn.Linear(width, width)
    self.up = nn.Linear(width, hidden)
    self.down = nn.Linear(hidden, width)

  def forward(
    self, x: torch.Tensor, cells: list[torch.Tensor],
    shapes: list[tuple[int, int]], last: torch.Tensor | None,
  ) -> torch.Tensor:
    """Maps [N, D] to [N, D], or to [B, D] where `last` chooses positions."""
    read = self.attend(self.enter(x), cells, shapes)
    if last is not None:
      x, read = x[last], read[last]
    return self.leave(x, read)

  def enter(self, x: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values; [N, D] -> [N, 3 D]."""
    return self.qkv(self.norms[0](x))

  def leave(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """What follows attention; [N, D] twice -> [N, D]."""
    x = x + self.drop(self.out(read))
    h = F.gelu(self.up(self.norms[1](x)), approximate="tanh")
    return x + self.drop(self.down(self.drop(h)))

  def attend(
    self, qkv: torch.Tensor, cells: list[torch.Tensor],
    shapes: list[tuple[int, int]],
  ) -> torch.Tensor:
    """Causal attention within rows, chunk by chunk; [N, 3 D] -> [N, D]."""
    rate = self.dropout if self.training else 0.0
    parts, start = [], 0
    for cell, (rows, longest) in zip(cells, shapes, strict=True):
      part = qkv[start : start + len(cell)]
      start += len(cell)
      padded = part.new_zeros(rows * longest, part.shape[1])
      padded = padded.index_copy(0, cell, part)
      query, key, value = padded.view(
        rows, longest, 3, self.heads, -1
      ).permute(2, 0, 3, 1, 4)
      read = F.scaled_dot_product_attention(
        query, key, value, dropout_p=rate, is_causal=True
      )
      read = read.transpose(1, 2).reshape(rows * longest, -1)
      parts.append(read[cell])
    return torch.cat(parts)

  def drop(self, x: torch.Tensor) -> torch.Tensor:
    """Dropout, in training."""
    return F.dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
  """SASRec's states of packed positions; `items` is tied to the output."""

  def __init__(self, num_items: int, settings: dict[str, Any]) -> None:
    """Makes the layers and draws the initial values."""
    super().__init__()
    width, self.dropout = settings["width"], settings["dropout"]
    self.items = nn.Parameter(
      torch.randn(num_items + 1, width) * width**-0.5
    )
    self.bias = nn.Parameter(torch.zeros(num_items + 1))
    self.positions = nn.Parameter(
      torch.randn(settings["length"], width) * 0.02
    )
    self.blocks = nn.ModuleList(
      Block(
        width, settings["heads"], settings["expansion"] * width, self.dropout
      )
      for _ in range(settings["blocks"])
    )
    self.norm = nn.LayerNorm(width, eps=1e-6)
    for module in self.modules():
      if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)

  def forward(
    self, items: torch.Tensor, positions: torch.Tensor,
    cells: list[torch.Tensor], shapes: list[tuple[int, int]],
    last: torch.Tensor | None,
  ) -> torch.Tensor:
    """States [N, D], or [B, D] of the `last` positions."""
    x = F.embedding(items, self.items) * math.sqrt(self.items.shape[1])
    x = x + F.embedding(positions, self.positions)
    x = F.dropout(x, self.dropout, self.training)
    for block in self.blocks[:-1]:
      x = block(x, cells, shapes, None)
    return self.norm(self.blocks[-1](x, cells, shapes, last))


class Softmax(torch.autograd.Function):
  """Mean cross-entropy over the catalogue; gradients in the forward pass."""

  @staticmethod
  def forward(
    ctx: Any, states: torch.Tensor, items: torch.Tensor, bias: torch.Tensor,
    targets: torch.Tensor,
  ) -> torch.Tensor:
    """The loss of states [N, D] and targets [N]."""
    of_states = torch.empty_like(states)
    of_items, of_bias = torch.zeros_like(items), torch.zeros_like(bias)
    loss, scale = states.new_zeros(()), 1 / len(states)
    logits, slope = (items.new_empty(len(items), LOGIT_ROWS) for _ in "ab")
    for first in range(0, len(states), LOGIT_ROWS):
      part = slice(first, first + LOGIT_ROWS)
      rows, target = states[part], targets[None, part]
      if len(rows) < LOGIT_ROWS:
        logits, slope = (items.new_empty(len(items), len(rows)) for _ in "ab")
      torch.mm(items, rows.T, out=logits).add_(bias[:, None])
      torch.softmax(logits, 0, out=slope)
      loss -= slope.gather(0, target).clamp_min_(1e-30).log_().sum() * scale
      slope.scatter_add_(0, target, items.new_full(target.shape, -1))
      torch.mm(slope.T, items, out=of_states[part])
      of_items.addmm_(slope, rows, alpha=scale)
      of_bias.add_(slope.sum(1), alpha=scale)
    ctx.save_for_backward(of_states.mul_(scale), of_items, of_bias)
    return loss

  @staticmethod
  def backward(ctx: Any, cotangent: torch.Tensor) -> tuple:
    """The gradients that the forward pass left (its value is the root)."""
    return *ctx.saved_tensors, None


class Twin:
  """The system: see `protocol.System`."""

  def __init__(
    self, data: str, compiled: bool, **settings: Any
  ) -> None:
    """Builds the model and lists the windows."""
    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    self.rng = np.random.default_rng(settings["seed"])
    self.data = protocol.read_data(data)
    self.settings, self.length = settings, settings["length"]
    self.users = protocol.chosen_users(self.data, settings["eval_users"])
    self.model = Encoder(self.data.num_items, settings)
    self.start = {k: v.clone() for k, v in self.model.state_dict().items()}
    if compiled:
      Block.enter = torch.compile(Block.enter, dynamic=True)
      Block.leave = torch.compile(Block.leave, dynamic=True)
    windows = -(-self.data.targets // self.length)
    self.owner = np.repeat(np.arange(len(windows)), windows)
    self.tile = np.arange(len(self.owner)) - np.repeat(
      np.cumsum(windows) - windows, windows
    )
    self.restart()

  def restart(self) -> None:
    """Back to the initial values."""
    self.model.load_state_dict(self.start)
    options = self.settings["optimizer"]
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(), lr=0.0, betas=(0.9, options["b2"]), eps=1e-8,
      weight_decay=options["weight_decay"], fused=True,
    )
    self.step = 0

  def draw(self) -> Packed:
    """Draws windows uniformly, each user's tiling at a random offset."""
    window = self.rng.integers(
      len(self.owner), size=self.settings["batch_size"]
    )
    users, tile = self.owner[window], self.tile[window]
    count = self.data.targets[users]
    offset = self.rng.integers(-count % self.length + 1)
    first = tile * self.length - offset
    last = np.minimum(first + self.length, count)
    first = np.maximum(first, 0)
    return pack(
      self.data.items, self.data.starts[users] + first, last - first,
      self.length,
    )

  def rate(self) -> float:
    """Linear warm-up, then cosine decay."""
    options, steps = self.settings["optimizer"], self.settings["num_steps"]
    peak, final = options["learning_rate"], options["final"]
    warmup = min(options["warmup"], steps // 2)
    if self.step < warmup:
      return peak * self.step / warmup
    share = min((self.step - warmup) / (steps - warmup), 1.0)
    cosine = (1 + math.cos(math.pi * share)) / 2
    return peak * ((1 - final) * cosine + final)

  def train_batch(self) -> int:
    """One step; returns its targets."""
    batch, model = self.draw(), self.model
    model.train()
    states = self.model(
      batch.items, batch.positions, batch.cells, batch.shapes, None
    )
    loss = Softmax.apply(states, model.items, model.bias, batch.targets)
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    clip = self.settings["optimizer"]["clip"]
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in self.optimizer.param_groups:
      group["lr"] = self.rate()
    self.optimizer.step()
    self.step += 1
    return len(batch.targets)

  def train(self, seconds: float) -> int:
    """Whole steps until the time is over."""
    return protocol.repeat(self.train_batch, seconds)

  @torch.no_grad()
  def ranks(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Ranks of targets, history masked, in any order of the users; [n]."""
    self.model.eval()
    users = users[np.argsort(positions[users], kind="stable")]
    out = []
    for start in range(0, len(users), USERS):
      part = users[start : start + USERS]
      counts = positions[part]
      ends = self.data.starts[part] + counts
      kept = np.minimum(counts, self.length)
      batch = pack(self.data.items, ends - kept, kept, self.length)
      states = self.model(
        batch.items, batch.positions, batch.cells, batch.shapes, batch.last
      )
      row, seen = protocol.seen_items(self.data, part, counts)
      as_tensor = lambda x: torch.from_numpy(x.astype(np.int64))
      out.append(rank(
        states, self.model.items, self.model.bias,
        as_tensor(self.data.items[ends]), as_tensor(row), as_tensor(seen),
      ))
    return torch.cat(out).numpy()

  def evaluate(self) -> int:
    """Ranks the chosen users' test targets."""
    return len(self.ranks(self.users, self.data.test))

  def validate(self) -> float:
    """NDCG@10 of all validation targets."""
    users = np.arange(len(self.data.starts))
    ranks = self.ranks(users, self.data.validation)
    return float(protocol.ndcg(ranks).mean())


def rank(
  states: torch.Tensor, items: torch.Tensor, bias: torch.Tensor,
  target: torch.Tensor, row: torch.Tensor, seen: torch.Tensor,
) -> torch.Tensor:
  """Ranks of the targets [n] among unseen items, ties at their average."""
  logits = torch.mm(items, states.T).add_(bias[:, None])  # [V + 1, n]
  own = logits.gather(0, target[None])
  logits[0] = -math.inf
  logits[seen, row] = -math.inf
  logits.scatter_(0, target[None], own)
  # above - below, in floats: counting booleans takes several times as long.
  above = logits.sub_(own).sign_().sum(0)
  return (above + len(logits) + 1) / 2


def main() -> None:
  """Serves the driver."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--compile", action="store_true")
  compiled = parser.parse_args().compile
  protocol.serve(lambda **options: Twin(compiled=compiled, **options))


if __name__ == "__main__":
  main()
