"""Recordings of robots -> shards."""

from vla_foundry.preprocessing.robotics.converters.converter import (
    ArrayFrames,
    BaseRoboticsConverter,
    Episode,
    EpisodeRef,
    register_converter,
)

__all__ = ["ArrayFrames", "BaseRoboticsConverter", "Episode", "EpisodeRef", "register_converter"]
