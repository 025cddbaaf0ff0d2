"""Readers of interactions, and the simulator."""
