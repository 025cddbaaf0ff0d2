"""Personalizing Intervened Network for long-tailed sequential behaviour."""
