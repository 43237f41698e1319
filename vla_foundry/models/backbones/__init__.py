"""Backbones: what encodes a robot's observation for an action head."""
