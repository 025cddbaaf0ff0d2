"""What a compiled program does: products, and collectives by kind and size."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jax.extend import core

KINDS = (
  "all-reduce", "all-gather", "reduce-scatter", "all-to-all",
  "collective-permute",
)
_BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
  "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}


class Collective(NamedTuple):
  """A collective of a program, on one device.

  Attributes:
    kind: one of KINDS.
    shape: of its result, as text.
    bytes: of its result.
    times: how often it runs.
  """

  kind: str
  shape: str
  bytes: int
  times: float


class Products(NamedTuple):
  """Matrix products of a program, on one device.

  Attributes:
    flops: two for a multiplication with its addition.
    bytes: of the operands and results.
    trips: longest loop whose length depends on the data.
  """

  flops: float
  bytes: float
  trips: int


def products(
  jaxpr: Any, part: int, rows: int, *, data: int, model: int
) -> Products:
  """Counts the products of a traced program, as the devices share them.

  Rows of batches are split over `data`; a product with the rows of an item
  table, or a piece of them, over `model` too.

  Args:
    jaxpr: of the program of all devices.
    part: rows of a table on one device.
    rows: of a table; all axes of at least `part`, up to this, are a table's.
    data: devices along `data`.
    model: devices along `model`.
  """
  flops = moved = 0.0
  trips = longest = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      shapes = [v.aval.shape for v in (*equation.invars, *equation.outvars)]
      axes = equation.params["dimension_numbers"][0][0]
      contracted = math.prod(shapes[0][axis] for axis in axes)
      split = model > 1 and any(
        d % model == 0 and (d == rows or d >= part) for s in shapes for d in s
      )
      share = data * (model if split else 1)
      flops += 2 * math.prod(shapes[2]) * contracted / share
      sizes = [v.aval.dtype.itemsize * math.prod(v.aval.shape)
               for v in (*equation.invars, *equation.outvars)]
      moved += sum(sizes) / share
      continue
    inner = [
      products(sub, part, rows, data=data, model=model)
      for sub in _inner(equation)
    ]
    if not inner:
      continue
    name, times = equation.primitive.name, 1
    if name == "scan":
      times = equation.params["length"]
    elif name == "while":
      times, longest = _trips(equation, longest)
      trips = max(trips, times)
    if name == "cond":
      inner = [min(inner, key=lambda one: one.flops)]
    flops += times * sum(one.flops for one in inner)
    moved += times * sum(one.bytes for one in inner)
    trips = max(trips, *(one.trips for one in inner))
  return Products(flops, moved, trips)


def _inner(equation: Any) -> list[Any]:
  """The programs within an equation."""
  found = []
  for value in equation.params.values():
    for one in value if isinstance(value, tuple | list) else (value,):
      if isinstance(one, core.ClosedJaxpr):
        found.append(one.jaxpr)
      elif isinstance(one, core.Jaxpr):
        found.append(one)
  return found


def _straight(jaxpr: Any) -> Iterator[Any]:
  """The equations of a program and of its calls, but not of its loops."""
  for equation in jaxpr.eqns:
    yield equation
    if equation.primitive.name not in ("scan", "while"):
      for sub in _inner(equation):
        yield from _straight(sub)


def _trips(equation: Any, longest: int) -> tuple[int, int]:
  """(turns of a loop over chunks of rows, rows that loops have covered).

  A loop that takes slices of rows can turn as often as there are slices; what
  one loop has covered, the next one, of smaller slices, does not.
  """
  body = equation.params["body_jaxpr"].jaxpr
  turns, covered = 0, 0
  for inner in _straight(body):
    # vmap makes a gather of one start out of a dynamic slice.
    one_start = inner.primitive.name == "gather" and (
      math.prod(inner.invars[1].aval.shape[:-1]) == 1
    )
    if inner.primitive.name == "dynamic_slice" or one_start:
      pairs = zip(
        inner.invars[0].aval.shape, inner.params["slice_sizes"], strict=True
      )
      ratios = [(-(-size // max(cut, 1)), size) for size, cut in pairs]
      turns, covered = max((turns, covered), max(ratios, default=(0, 0)))
  if covered and covered <= longest:
    return 0, longest
  return max(turns, 1), max(longest, covered)


def collectives(text: str, trips: int = 1) -> list[Collective]:
  """Reads the collectives off a compiled program.

  Args:
    text: of the program of one device.
    trips: turns of a loop whose length the compiler does not know.
  """
  computations, name = {}, ""
  for line in text.splitlines():
    opens = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if opens:
      name = "" if line.startswith("ENTRY") else opens[1]
      computations[name] = []
    elif name in computations:
      computations[name].append(line)
  found = []
  pattern = re.compile(
    rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\("
  )

  def visit(name: str, times: float) -> None:
    for line in computations.get(name, ()):
      match = pattern.search(line)
      if match:
        found.append(Collective(
          match[2], _short(match[1]), _size(match[1]), times
        ))
      body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
      if body:
        known = re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        until = re.search(r"condition=%?([\w.\-]+)", line)
        known = known or _bounds(computations.get(until[1], ()))
        visit(body[1], times * (int(known[0]) if known else max(trips, 1)))
        continue
      for called in re.findall(
        r"(?:calls|to_apply|branch_computations=\{|true_computation"
        r"|false_computation)=?%?([\w.\-]+)", line
      ):
        visit(called, times)

  visit("", 1)
  return found


def _bounds(condition: Iterable[str]) -> list[str]:
  """The number that a loop's condition compares with, if it is one."""
  found = [re.search(r"s32\[\]\S* constant\((\d+)\)", x) for x in condition]
  numbers = [match[1] for match in found if match]
  return numbers if len(numbers) == 1 else []


def _size(shape: str) -> int:
  return sum(
    _BYTES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d)
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
  )


def _short(shape: str) -> str:
  parts = [f"{k}[{d}]" for k, d in re.findall(r"(\w+)\[([\d,]*)\]", shape)]
  return max(parts, key=_size, default="none")
