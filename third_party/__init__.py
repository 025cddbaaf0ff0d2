"""Adapters to other people's baselines and data."""
