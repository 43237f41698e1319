"""Converters of recordings, one module each; base.py says how to write one."""
