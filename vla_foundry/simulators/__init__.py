"""Simulators behind one interface, found by name."""

from vla_foundry.simulators.simulator import (
    ACTION,
    IMAGES,
    OBSERVATION,
    SIMULATORS,
    STATE,
    Layout,
    ObjectState,
    SceneSimulator,
    Simulator,
    SimulatorState,
    complete_params,
    create_simulator,
    describe_source,
    find_source,
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
    "SceneSimulator",
    "Simulator",
    "SimulatorState",
    "complete_params",
    "create_simulator",
    "describe_source",
    "find_source",
    "name_observation",
    "register_simulator",
]
