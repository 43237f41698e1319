"""A simulated robot in the terms of robot data: what its observations and actions are called, and what they mean.

These are the names that `vla-foundry demos` records, so that a policy trained on demonstrations finds its fields.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vla_foundry.evaluation.rollout_worker import RobotFacts
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.layout import FieldLayout
from vla_foundry.robotics.spec import CameraDescription, DatasetSpec, FieldDescription

OBSERVATION, IMAGES, ACTION = "observation", "observation.images", "action"
_STATE = f"{OBSERVATION}.state"


def describe_robot(facts: RobotFacts, cameras: Sequence[str], image_size: int) -> DatasetSpec:
    """Return what a simulated robot senses and does as a spec, to be compared with that of a policy."""
    fields = {
        f"{OBSERVATION}.{name}": FieldDescription(shape=(len(parts),)) for name, parts in facts.field_names.items()
    }
    fields[_STATE] = FieldDescription(shape=(sum(len(parts) for parts in facts.field_names.values()),))
    fields[ACTION] = FieldDescription(shape=(facts.action_dim,), role="action")
    fields |= {f"{ACTION}.{name}": replace(part, role="action") for name, part in facts.action_parts.items()}
    size = (image_size, image_size)
    return DatasetSpec(
        layout="episodes",
        fps=float(facts.fps),
        past_lowdim_steps=0,
        future_lowdim_steps=0,
        image_indices=(0,),
        padding_strategy="copy",
        cameras={f"{IMAGES}.{name}": CameraDescription(size=size, original_size=size) for name in cameras},
        fields=fields,
    )


def name_observation(
    images: Mapping[str, np.ndarray], fields: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (images, fields) of an observation under their names in the spec."""
    named = {f"{OBSERVATION}.{name}": values for name, values in fields.items()}
    named[_STATE] = np.concatenate(list(fields.values()))
    return {f"{IMAGES}.{name}": image for name, image in images.items()}, named


def create_action_layout(facts: RobotFacts, action_fields: Sequence[str]) -> FieldLayout:
    """Return how a robot's action is put together from the fields that a policy predicts.

    Raises:
        ValueError: a field is none of this robot's, or some of its numbers are not predicted.
    """
    if list(action_fields) == [ACTION]:
        return FieldLayout((ACTION,), (facts.action_dim,))
    parts = {f"{ACTION}.{name}": part.width for name, part in facts.action_parts.items()}
    for field in action_fields:
        if field not in parts:
            raise ValueError(unknown_name_message(f"action field of {facts.robot}", field, [ACTION, *parts]))
    missing = [name for name in parts if name not in action_fields]
    if missing:
        raise ValueError(f"The policy predicts {', '.join(action_fields)}, but {facts.robot} needs {missing[0]} too.")
    return FieldLayout(tuple(parts), tuple(parts.values()))
