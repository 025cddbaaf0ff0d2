"""Backbones (one a file), plugins, and what they are made of.

`layers`, `sasrec` and its peers; `memory` and `relations`, the item
neighbours; `plugins`; then `packing`, `precision` and `conditioned`.
"""
