"""Configurations; every one starts from base.default()."""
