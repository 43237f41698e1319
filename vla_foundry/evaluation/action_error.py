"""`vla-foundry action-error`: compare a policy's actions with those of held-out demonstrations, without a robot."""

import json
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vla_foundry.config.command_line import parse_command
from vla_foundry.inference.policy_files import PolicyFiles, load_policy_files
from vla_foundry.params.commands.evaluation import ActionErrorParams
from vla_foundry.storage.uri import write_text


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldError:
    """Mean squared errors of one action field, over its columns and over samples; unit: the field's, squared."""

    # (H,): the policy's error at each step from the anchor on
    policy: np.ndarray
    # (H,): the error of the best constant, which is the mean of the true actions at each step, column by column
    mean_action: np.ndarray
    # (H,): samples that have the step
    num_samples: np.ndarray

    @property
    def ratio(self) -> float:
        """The policy's error over that of the mean action, all steps together; 0: exact, 1: no better than the mean."""
        shares = self.num_samples / self.num_samples.sum()
        return float((self.policy * shares).sum() / max((self.mean_action * shares).sum(), 1e-300))


def measure_field(
    predicted: Float[np.ndarray, "N H C"], true: Float[np.ndarray, "N H C"], is_valid: Bool[np.ndarray, "N H"]
) -> FieldError:
    """Compare one field's predicted actions with the true ones, step by step; padding is ignored."""
    weights = is_valid[..., None].astype(np.float64)
    counts = is_valid.sum(0)
    total = np.maximum(weights.sum(0), 1.0)  # (H, 1)
    mean = (true * weights).sum(0) / total

    def mean_square(errors: Float[np.ndarray, "N H C"]) -> np.ndarray:
        return ((errors**2 * weights).sum(0) / total).mean(-1)

    return FieldError(policy=mean_square(predicted - true), mean_action=mean_square(true - mean), num_samples=counts)


def measure_action_error(params: ActionErrorParams) -> dict[str, FieldError]:
    """Predict the actions of a run's held-out samples with its policy; return {action field: errors}.

    Fields are compared as the model is trained on them: relative poses stay relative.

    Raises:
        FileNotFoundError: the run or its validation data does not exist.
        ValueError: the run does not hold a policy, or has no validation data.
    """
    files = load_policy_files(params.checkpoint, dataset=params.dataset)
    if count := len(params.val_dataset_manifest):
        held_out = {
            "manifest": params.val_dataset_manifest,
            "modality": ["robotics"] * count,
            "weighting": [1.0] * count,
        }
        data = replace(files.data, **{f"val_dataset_{name}": values for name, values in held_out.items()})
        files = replace(files, data=data)
    if not files.data.val_dataset_manifest:
        raise ValueError(
            f"The run of {params.checkpoint} has no validation data. Give some: "
            "--val_dataset_manifest FOLDER/manifest.jsonl."
        )
    true, predicted, is_valid = _predict(files, params)
    transform = files.actions.fields
    values, true_values = transform.invert(predicted), transform.invert(true)
    steps = slice(transform.anchor, None)
    return {
        field: measure_field(values[field][:, steps], true_values[field][:, steps], is_valid[:, steps])
        for field in transform.select.fields
    }


def _predict(files: PolicyFiles, params: ActionErrorParams) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return normalised actions of held-out samples, true and predicted (N, T, A), and a mask of steps to predict."""
    import torch

    from vla_foundry.data import create_dataloader
    from vla_foundry.models.policy import RoboticsBatchHandler
    from vla_foundry.world import World

    model: Any = files.load_model(params.checkpoint, device=params.device, use_ema=params.use_ema)
    device = next(model.parameters()).device
    handler: Any = RoboticsBatchHandler(files.params)
    loader = create_dataloader(
        replace(files.data, num_workers=0),
        World(),
        global_batch_size=params.batch_size,
        per_gpu_batch_size=params.batch_size,
        seed=params.seed,
        split="validation",
        total_samples=params.num_samples,
    )
    true, predicted, is_valid = [], [], []
    with closing(loader):
        for batch in loader.microbatches(0):
            seeds = torch.as_tensor(batch["positions"], dtype=torch.int64, device=device)
            inputs = handler.prepare_sampling(batch, device)
            actions = model.sample(inputs, seeds=seeds, num_steps=params.num_inference_steps)
            predicted.append(actions.cpu().numpy())
            true.append(np.asarray(batch["actions"]))
            is_valid.append(np.asarray(batch["future_mask"]))
    return np.concatenate(true), np.concatenate(predicted), np.concatenate(is_valid)


def format_action_errors(errors: Mapping[str, FieldError]) -> list[str]:
    """Format a table: root mean square errors at the first and last step, and the ratio of squares over all steps."""
    title = "error of held-out actions (RMS)"
    width = max(map(len, (title, *errors)))
    lines = [f"  {title:{width}}{'first step':>16}{'last step':>16}{'all, squared':>16}"]
    for field, error in errors.items():
        # an action that never changes leaves the constant no error
        ratio = f"{error.ratio:.2f}" if error.ratio < 1e6 else f"{error.ratio:.0e}"
        steps = (f"{error.policy[step] ** 0.5:.3f}/{error.mean_action[step] ** 0.5:.3f}" for step in (0, -1))
        lines.append(f"  {field:{width}}" + "".join(f"{text:>16}" for text in (*steps, ratio)))
    return [*lines, "  (policy / best constant action)"]


def _to_json(error: FieldError) -> dict[str, Any]:
    arrays = {name: getattr(error, name).tolist() for name in ("policy", "mean_action", "num_samples")}
    return {**arrays, "ratio": error.ratio}


def main(argv: list[str]) -> None:
    """Run `vla-foundry action-error`: print the table, and write the errors to a file on request."""
    params = parse_command(ActionErrorParams, argv, prog="vla-foundry action-error")
    errors = measure_action_error(params)
    if params.output is not None:
        write_text(
            params.output, json.dumps({field: _to_json(error) for field, error in errors.items()}, indent=1) + "\n"
        )
    sys.stdout.write("\n".join(format_action_errors(errors)) + "\n")
