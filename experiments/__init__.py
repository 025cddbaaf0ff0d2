"""Experiments: the main job, its configs and its report."""
