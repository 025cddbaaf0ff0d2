"""Backbones, one a file, and plugins.

`sasrec`, `gru4rec`, `hstu`, `din`: the architectures; `backbones` and `layers`:
what they share; `plugins`: what personalises them; `memory` and `relations`:
the item neighbours that some plugins mix in; `packing`, `precision`: speed.
"""
