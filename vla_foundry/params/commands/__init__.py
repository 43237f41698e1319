"""Params of commands, torch-free."""
