"""Simulated worlds behind one interface, by name: reset, observe, apply, success, render, expert; no policy in them."""

from vla_foundry.simulators.base import (
    SIMULATORS,
    Layout,
    ObjectState,
    Observation,
    Simulator,
    SimulatorState,
    create_simulator,
    register_simulator,
)

__all__ = [
    "SIMULATORS",
    "Layout",
    "ObjectState",
    "Observation",
    "Simulator",
    "SimulatorState",
    "create_simulator",
    "register_simulator",
]
