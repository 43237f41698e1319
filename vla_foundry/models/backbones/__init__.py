"""Backbones encode a robot's observation for an action head."""
