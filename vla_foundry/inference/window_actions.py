"""The actions in a policy's window: done ones, the rest of the last chunk (real-time chunking), and a chunk."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float32

from vla_foundry.client.chunks import Command, prefix_weights
from vla_foundry.client.messages import split_rows
from vla_foundry.models.action_heads.noise import Guidance
from vla_foundry.models.batch_handlers import to_device
from vla_foundry.robotics.fields import Window
from vla_foundry.robotics.spec import FieldDescription
from vla_foundry.robotics.transforms import ActionTransform


def encode_past(
    past: Mapping[str, np.ndarray] | None, window: Window, transform: ActionTransform
) -> Float32[np.ndarray, "T C"]:
    """Return a window that holds the actions before the anchor, and zeros from there on.

    Args:
        past: see EpisodeHistory.past_actions.
        window: the model's window.
        transform: from commands to the model's actions.
    """
    actions = np.zeros((window.num_steps, transform.fields.select.width), np.float32)
    if past is not None:
        actions[: window.anchor] = transform.apply(past)[0][: window.anchor]
    return actions


def encode_guidance(
    rests: Sequence[tuple[Sequence[Command], Mapping[str, np.ndarray]]],
    delay_steps: int,
    window: Window,
    transform: ActionTransform,
    device: torch.device,
) -> Guidance | None:
    """Return what is left of several robots' chunks as their new windows see it; None: nothing.

    Args:
        rests: each robot's commands from now on, and where it is now (the reference fields of relative poses).
        delay_steps: how many of them will run before the new chunk.
        window: the model's window.
        transform: from commands to the model's actions.
        device: where the model is.
    """
    weights = np.zeros((len(rests), window.num_steps), np.float32)
    target = np.zeros((*weights.shape, transform.fields.select.width), np.float32)
    for row, (rest, references) in enumerate(rests):
        weights[row, window.anchor :] = prefix_weights(window.future + 1, delay_steps, len(rest))
        if not weights[row].any():
            continue
        # fill the window: steps of weight 0 may hold any pose
        steps = np.clip(np.arange(-window.anchor, window.future + 1), 0, len(rest) - 1)
        fields = {name: np.stack([rest[step][name] for step in steps]) for name in rest[0]}
        # poses become relative to where the robot is now
        target[row] = transform.apply(fields, references=references)[0]
    if not weights.any():
        return None
    return Guidance(*(to_device(torch.from_numpy(values), device) for values in (target, weights)))


def decode_commands(
    normalized: Float32[np.ndarray, "T C"],
    references: Mapping[str, np.ndarray],
    transform: ActionTransform,
    described: Mapping[str, FieldDescription],
) -> Sequence[Command]:
    """Return a robot's commands from the anchor on; float32, or float64 where the data are (or integers that need it).

    Args:
        normalized: the model's actions over the window.
        references: where the robot was (the reference fields of relative poses).
        transform: from commands to the model's actions.
        described: the commands' fields.
    """
    commands = {
        name: values.astype(np.promote_types(described[name].dtype, np.float32))
        for name, values in transform.invert(normalized, references).items()
    }
    return split_rows(commands)
