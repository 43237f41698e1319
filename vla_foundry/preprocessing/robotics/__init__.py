"""Recordings of robots -> shards."""

from vla_foundry.preprocessing.robotics.converters.base import BaseRoboticsConverter, register_converter

__all__ = ["BaseRoboticsConverter", "register_converter"]
