"""Simulators behind one interface, found by name."""

from vla_foundry.simulators.simulator import (
    ACTION,
    IMAGES,
    OBSERVATION,
    SIMULATORS,
    STATE,
    Layout,
    ObjectState,
    Observation,
    Simulator,
    SimulatorState,
    create_simulator,
    name_observation,
    register_simulator,
)

__all__ = [
    "ACTION",
    "IMAGES",
    "OBSERVATION",
    "SIMULATORS",
    "STATE",
    "Layout",
    "ObjectState",
    "Observation",
    "Simulator",
    "SimulatorState",
    "create_simulator",
    "name_observation",
    "register_simulator",
]
