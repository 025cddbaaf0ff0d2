"""Personalizing Intervened Network for long-tailed sequential behaviour.

  data = pin_jax.read("sales.csv")
  job = pin_jax.compare(data, "runs/mine")

`read` is that of `data.files`; `compare` trains the methods and compares them,
and `Job` is a finished comparison. Each is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from experiments.api import Job, compare
  from pin_jax.data.files import read

__all__ = ["Job", "compare", "read"]


def __getattr__(name: str) -> Any:
  if name == "read":
    from pin_jax.data.files import read

    return read
  if name in __all__:
    from experiments import api

    return getattr(api, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
