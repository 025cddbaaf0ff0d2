"""Evaluation: `ranking`, its `metrics` and their `statistics`."""
