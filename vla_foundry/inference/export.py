"""`vla-foundry export RUN`: a policy as two graphs: once per observation, and one denoising step.

    prefix(observation) -> context
    step(noised actions, times, context) -> the prediction of the noise process's target: velocity or noise

The number of rows is free, all else is fixed. The solver stays outside: `load_exported` returns a policy that runs it.
A regression head has no steps: its only graph, `prefix`, returns the actions.
"""

import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from vla_foundry.config.command_line import parse_command
from vla_foundry.inference.policy import Policy
from vla_foundry.inference.policy_files import PolicyFiles, load_policy_files
from vla_foundry.models.action_heads.action_head import ActionHead, ActionWindow, DrawKey
from vla_foundry.models.action_heads.flow_transformer import FlowTransformer
from vla_foundry.models.action_heads.noise import create_noise, draw_normals
from vla_foundry.models.backbones.backbone import Backbone, Conditioning
from vla_foundry.models.backbones.vit import ViTBackbone
from vla_foundry.models.backbones.vlm_foundry import VLMFoundryBackbone
from vla_foundry.models.policy import RoboticsBatchHandler, RobotPolicy
from vla_foundry.params.commands.runs import ExportParams
from vla_foundry.params.models.action_heads import DenoisingHeadParams, RegressionParams
from vla_foundry.storage.uri import read_object

DESCRIPTION_NAME = "export.json"
_SUFFIXES = {"torch_export": "pt2", "onnx": "onnx"}
_TRACED_ROWS = 3
_CHECKED_ROWS = (1, 2, 5)
_OPSET = 20
_BACKBONES = ("vlm_foundry_backbone", "clip_backbone", "vit_backbone")
Inputs = dict[str, Tensor]
Graph = Callable[[Inputs], list[Tensor]]


def read_observation(observation: dict[str, Any], num_images: int, max_tokens: int) -> Inputs:
    """Return the graph's tensors for a backbone's inputs (OBSERVATIONS): rows of one width, without host values.

    Raises:
        ValueError: an image is missing, or a row is longer than the graph's.
    """
    pixel_values: Tensor = observation["pixel_values"]
    ids: Tensor | None = observation.get("input_ids")
    num_rows = len(pixel_values) // num_images if ids is None else len(ids)
    if len(pixel_values) != num_rows * num_images or observation.get("image_mask") is not None:
        raise ValueError(f"An exported policy needs all {num_images} images of each observation.")
    inputs = {"pixel_values": pixel_values.unflatten(0, (num_rows, num_images))}
    if ids is None:
        return inputs
    documents, mask = observation.get("documents"), observation.get("attention_mask")
    if documents is not None:
        counts = torch.from_numpy(documents.count_tokens().astype(np.int64))
    else:
        counts = torch.full((num_rows,), ids.shape[1]) if mask is None else mask.sum(1)
    longest = int(counts.max())
    if longest > max_tokens:
        raise ValueError(f"An instruction needs {longest} tokens, but the exported rows have {max_tokens}.")
    return {**inputs, "input_ids": F.pad(ids[:, :max_tokens], (0, max(0, max_tokens - ids.shape[1]))), "counts": counts}


def _encode(backbone: Backbone, inputs: Inputs) -> Conditioning:
    """Encode an observation as the backbone does, without values of the host."""
    pixel_values = inputs["pixel_values"]
    if isinstance(backbone, VLMFoundryBackbone):
        return _encode_rows(backbone, inputs["input_ids"], inputs["counts"], pixel_values)
    images: dict[str, Any] = {"num_images": pixel_values.shape[1], "image_mask": None}
    if "input_ids" in inputs:
        ids = inputs["input_ids"]
        is_token = torch.arange(ids.shape[1]) < inputs["counts"][:, None]
        images |= {"input_ids": ids, "attention_mask": is_token.long()}
    elif not isinstance(backbone, ViTBackbone):
        images |= {"input_ids": None, "attention_mask": None}
    return backbone(pixel_values.flatten(0, 1), **images)


def _encode_rows(backbone: VLMFoundryBackbone, ids: Tensor, counts: Tensor, pixel_values: Tensor) -> Conditioning:
    model, (B, W) = backbone.model, ids.shape
    columns = torch.arange(W)
    is_token = columns < counts[:, None]
    places = None if backbone.observation_token is None else counts - 1
    is_image = (ids == model.image_token_id) & is_token
    if places is not None:
        is_image = is_image & (columns != places[:, None])
    # the image tokens of each row; all rows have equally many
    side = pixel_values.shape[-1]
    per_image = model.encode_images(torch.zeros(1, 3, side, side)).shape[1]
    found = torch.where(is_image, columns, W).sort(dim=1).values[:, : pixel_values.shape[1] * per_image]
    mask = None
    if not model.transformer.is_causal:
        mask = is_token[:, None, None].expand(B, 1, W, W)
    elif model.sees_ahead:
        is_first = is_image & ~F.pad(is_image[:, :-1], (1, 0))
        stretch = torch.where(is_image, is_first.long().cumsum(1), 0)
        same = (stretch[:, :, None] == stretch[:, None]) & is_image[:, None]
        mask = (same | (columns <= columns[:, None]))[:, None]
    return backbone(
        ids,
        pixel_values=pixel_values.flatten(0, 1),
        image_positions=(found + torch.arange(B)[:, None] * W).flatten(),
        documents=None,
        sees_ahead=None,
        observation_places=places,
        token_mask=is_token if places is None else None,
        mask=mask,
    )


class _Observer(nn.Module):
    """What happens once per observation, given as tensors in the order of `names`."""

    def __init__(self, model: RobotPolicy, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.head, self.names = model.vision_language_backbone, model.action_head, tuple(names)


class _Prefix(_Observer):
    """Encodes an observation for a head that denoises."""

    def flatten(self, *values: Tensor) -> tuple[list[Any], TreeSpec]:
        inputs = dict(zip(self.names, values, strict=True))
        empty = torch.empty(0)
        window = ActionWindow(empty, empty, empty, None, inputs.get("proprioception"), inputs.get("step_mask"))
        return tree_flatten(self.head.cache_context(_encode(self.backbone, inputs), window))

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self.flatten(*values)[0] if leaf is not None)


class _Actions(_Observer):
    """A policy whose head predicts actions in one pass."""

    def forward(self, *values: Tensor) -> tuple[Tensor]:
        inputs = dict(zip(self.names, values, strict=True))
        past, steps = inputs["past_mask"], inputs.get("step_mask")
        window = ActionWindow(inputs["actions"], past, ~past, None, inputs.get("proprioception"), steps)
        return (self.head.predict(_encode(self.backbone, inputs), window).float(),)


class _Step(nn.Module):
    """One call of the action head; leaves of its context that are no tensors are constants."""

    def __init__(self, head: FlowTransformer, leaves: Sequence[Any], structure: TreeSpec) -> None:
        super().__init__()
        self.head, self.is_given, self.structure = head, [leaf is not None for leaf in leaves], structure

    def forward(self, noised: Tensor, times: Tensor, *context: Tensor) -> tuple[Tensor]:
        left = iter(context)
        leaves = [next(left) if given else None for given in self.is_given]
        return (self.head.predict(noised, times, tree_unflatten(leaves, self.structure)).float(),)


class _GraphBackbone(nn.Module):
    """Passes the observation on to the graphs."""

    def forward(self, **observation: Any) -> dict[str, Any]:
        return observation


class _GraphHead(ActionHead):
    """Samples with the graphs, as FlowTransformer.sample_from or RegressionHead.sample do."""

    def __init__(self, graphs: dict[str, Graph], description: dict[str, Any], files: PolicyFiles) -> None:
        super().__init__()
        model: Any = files.params.model
        self.graphs, self.description = graphs, description
        self.process = create_noise(model.action_head.noise) if "step" in graphs else None
        # says where the policy runs
        self.place = nn.Parameter(torch.empty(0))

    def read(self, observation: dict[str, Any], window: ActionWindow) -> Inputs:
        facts = self.description
        inputs = read_observation(observation, facts["num_images"], facts["max_tokens"])
        return inputs | read_window(window, facts["prefix"]["inputs"])

    def sample(self, conditioning: Any, window: ActionWindow, key: DrawKey, num_steps: int | None) -> Tensor:
        free, held = window.free_mask(), window.held_actions()
        outputs = self.graphs["prefix"](self.read(conditioning, window))
        if self.process is None:
            return torch.where(free, outputs[0], held)
        context = dict(zip(self.description["prefix"]["outputs"], outputs, strict=True))
        noise = draw_normals(key.samples, window.actions.shape[1:], seed=key.seed, purpose=f"{key.stage} noise")
        return self.process.sample(
            lambda noised, time: self.graphs["step"](
                {"noised": noised, "times": noise.new_full((len(noise),), time), **context}
            )[0],
            noise,
            num_steps or self.process.params.num_inference_steps,
            lambda x: torch.where(free, x, held),
        )


def read_window(window: ActionWindow, names: Collection[str]) -> Inputs:
    """Return those of the graph's tensors that come from a window."""
    step_mask = torch.ones_like(window.past_mask) if window.step_mask is None else window.step_mask
    own = {
        "proprioception": window.proprioception,
        "step_mask": step_mask,
        "actions": window.held_actions(),
        "past_mask": window.past_mask,
    }
    return {name: value for name, value in own.items() if name in names and value is not None}


def export(params: ExportParams) -> dict[str, Any]:
    """Write the graphs of a policy and their description to a new folder, if they do what the policy does.

    Returns:
        The description.

    Raises:
        FileNotFoundError: the run does not exist or lacks a file.
        ValueError: the output exists, the policy cannot be exported, or a graph differs from it.
    """
    output = Path(params.output).absolute()
    if output.exists():
        raise ValueError(f"output {params.output} exists. Choose another name, or delete it.")
    files = load_policy_files(params.run, dataset=params.dataset)
    check_exportable(files)
    if params.format == "onnx":
        _import_onnxruntime()
    policy = Policy(files.load_model(params.run, device="cpu", use_ema=params.use_ema), files)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name[:40]}.", dir=output.parent) as scratch:
        aside = Path(scratch) / output.name
        aside.mkdir()
        description = write_graphs(policy, files, aside, params)
        aside.rename(output)
    return description


@torch.no_grad()
def write_graphs(policy: Policy, files: PolicyFiles, folder: Path, params: ExportParams) -> dict[str, Any]:
    """Write the graphs of a policy and their description to a folder; see `export`."""
    handler = RoboticsBatchHandler(files.params)
    max_tokens = params.max_tokens or (files.data.max_text_seq_len or files.data.seq_len) + 1
    description = _trace(policy, _imagine_inputs(policy, files, handler, _TRACED_ROWS), max_tokens, folder, params)
    exported = _load(folder, description, files)
    parity = {rows: _compare(policy, exported, _imagine_inputs(policy, files, handler, rows)) for rows in _CHECKED_ROWS}
    worst = max(max(errors.values()) for errors in parity.values())
    if not worst <= params.tolerance:
        raise ValueError(
            f"The graphs differ from the policy by {worst:.2g}, more than tolerance ({params.tolerance:g}). Nothing is "
            "written."
        )
    description["parity"] = {str(rows): errors for rows, errors in parity.items()}
    (folder / DESCRIPTION_NAME).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return description


def check_exportable(files: PolicyFiles) -> None:
    """Raise ValueError, one line, if graphs cannot hold the policy."""
    model: Any = files.params.model
    if not isinstance(model.action_head, DenoisingHeadParams | RegressionParams):
        raise ValueError(
            f"model.action_head.type '{model.action_head.type}' cannot be exported: it writes tokens one after another."
        )
    backbone = model.vision_language_backbone
    if backbone.type not in _BACKBONES:
        raise ValueError(
            f"model.vision_language_backbone.type '{backbone.type}' cannot be exported, only {', '.join(_BACKBONES)}."
        )
    if backbone.type == "vlm_foundry_backbone" and backbone.vlm.transformer.type != "transformer":
        kind = backbone.vlm.transformer.type
        raise ValueError(
            f"model.vision_language_backbone.vlm.transformer.type '{kind}' cannot be exported, only transformer."
        )
    if not files.cameras:
        raise ValueError("The policy sees no images; only policies with cameras can be exported.")


def _imagine_inputs(policy: Policy, files: PolicyFiles, handler: RoboticsBatchHandler, num_rows: int) -> dict[str, Any]:
    """Return inputs of random pictures and numbers, and instructions of different lengths."""
    generator = torch.Generator().manual_seed(num_rows)
    for row in range(num_rows):
        policy.reset(row, client=row)
        observation = dataclasses.replace(files.imagine_observation(), instruction=" ".join(["go"] * (row + 1)))
        policy.observe(observation, client=row)
    batch: Any = policy.encode(list(range(num_rows)))
    pixels = batch["pixel_values"]
    batch["pixel_values"] = torch.randint(0, 256, pixels.shape, generator=generator, dtype=torch.int64).to(pixels.dtype)
    if batch.get("proprioception") is not None:
        batch["proprioception"] = torch.randn(batch["proprioception"].shape, generator=generator)
    return handler.prepare_sampling(batch, "cpu")


def _trace(
    policy: Policy, inputs: dict[str, Any], max_tokens: int, folder: Path, params: ExportParams
) -> dict[str, Any]:
    """Write the graphs; return their description."""
    model: RobotPolicy = policy.model
    head, window = model.action_head, model._window(inputs)
    num_images = len(policy.cameras) * len(policy.image_indices)
    given = read_observation(inputs["observation"], num_images, max_tokens)
    names = ["proprioception", *(["step_mask"] if window.past_mask.shape[1] > policy.chunk_steps else [])]
    graphs: dict[str, tuple[nn.Module, Inputs, list[str]]]
    if isinstance(head, FlowTransformer):
        given |= read_window(window, names)
        prefix = _Prefix(model, list(given))
        leaves, structure = prefix.flatten(*given.values())
        context = {f"context_{number}": leaf for number, leaf in enumerate(leaf for leaf in leaves if leaf is not None)}
        noised = {"noised": torch.randn(window.actions.shape), "times": torch.rand(len(window.actions)), **context}
        step = _Step(head, leaves, structure)
        graphs = {"prefix": (prefix, given, list(context)), "step": (step, noised, ["prediction"])}
    else:
        given |= read_window(window, [*names, "actions", "past_mask"])
        graphs = {"prefix": (_Actions(model, list(given)), given, ["prediction"])}
    description: dict[str, Any] = {
        "format": params.format,
        "run": params.run.rstrip("/").rpartition("/")[2],
        "num_images": num_images,
        "max_tokens": max_tokens,
        "tolerance": params.tolerance,
    }
    if isinstance(head, FlowTransformer):
        description["noise"] = {"type": head.params.noise.type, **dataclasses.asdict(head.params.noise)}
    for name, (module, tensors, outputs) in graphs.items():
        _write_graph(module.eval(), tensors, outputs, folder / f"{name}.{_SUFFIXES[params.format]}", params.format)
        description[name] = {"inputs": {key: _describe(value) for key, value in tensors.items()}, "outputs": outputs}
    return description


def _describe(tensor: Tensor) -> dict[str, Any]:
    is_free = tensor.shape[0] == _TRACED_ROWS
    return {"shape": ["batch", *tensor.shape[1:]] if is_free else list(tensor.shape), "dtype": str(tensor.dtype)[6:]}


def _write_graph(module: nn.Module, inputs: Inputs, outputs: list[str], path: Path, kind: str) -> None:
    batch = torch.export.Dim("batch", min=1)
    shapes = [{0: batch} if len(value) == _TRACED_ROWS else None for value in inputs.values()]
    argument, first = ("context", 2) if isinstance(module, _Step) else ("values", 0)
    dynamic = dict(zip(("noised", "times"), shapes[:first], strict=False)) | {argument: tuple(shapes[first:])}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=dynamic)
            if kind == "torch_export":
                torch.export.save(program, path)
            else:
                names: dict[str, Any] = {"input_names": list(inputs), "output_names": outputs}
                torch.onnx.export(program, (), str(path), **names, opset_version=_OPSET, verbose=False)
    except Exception as error:  # the border to the exporters, which may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"torch cannot export the policy's {path.stem}: {reason}") from error


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"format onnx needs {error.name}, which is not installed: uv pip install 'vla-foundry[export]'"
        ) from None
    return onnxruntime


def _load(folder: Path, description: dict[str, Any], files: PolicyFiles) -> RobotPolicy:
    open_graph = _open_program if description["format"] == "torch_export" else _open_session
    suffix = _SUFFIXES[description["format"]]
    names = [name for name in ("prefix", "step") if name in description]
    graphs = {name: open_graph(folder / f"{name}.{suffix}") for name in names}
    model: Any = files.params.model
    head = _GraphHead(graphs, description, files)
    return RobotPolicy(_GraphBackbone(), head, action_dim=model.action_dim).eval()


def load_exported(folder: str, files: PolicyFiles) -> RobotPolicy:
    """Load an exported policy for `Policy(model, files)`; it runs on the CPU and cannot be guided.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken.
    """
    return _load(Path(folder), read_object(str(Path(folder) / DESCRIPTION_NAME)), files)


def _open_program(path: Path) -> Graph:
    module: Any = torch.export.load(path).module()
    return lambda inputs: list(module(*inputs.values()))


def _open_session(path: Path) -> Graph:
    runtime = _import_onnxruntime()
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # those that the graph does not read are gone
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {name: inputs[name].numpy() for name in names})]

    return run


def _compare(policy: Policy, exported: RobotPolicy, inputs: dict[str, Any]) -> dict[str, float]:
    """Return the largest errors of a step's prediction and of sampled actions."""
    model, head = policy.model, exported.action_head
    window = model._window(inputs)
    seeds = torch.arange(len(window.actions))
    noised = draw_normals(seeds, window.actions.shape[1:], seed=1, purpose="export")
    times = torch.linspace(0.1, 0.9, len(seeds))
    conditioning = model.vision_language_backbone(**inputs["observation"])
    outputs = head.graphs["prefix"](head.read(inputs["observation"], window))
    if "step" in head.graphs:
        given = dict(zip(head.description["prefix"]["outputs"], outputs, strict=True))
        found = head.graphs["step"]({"noised": noised, "times": times, **given})[0]
        expected = model.action_head.predict(noised, times, model.action_head.cache_context(conditioning, window))
    else:
        found, expected = outputs[0], model.action_head.predict(conditioning, window)
    return {
        "prediction": _largest_error(found, expected),
        "actions": _largest_error(exported.sample(inputs, seeds=seeds), model.sample(inputs, seeds=seeds)),
    }


def _largest_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def main(argv: list[str]) -> None:
    """Run `vla-foundry export`: print how far the graphs are from the policy."""
    params = parse_command(ExportParams, argv, prog="vla-foundry export", positional=("run",))
    for rows, errors in export(params)["parity"].items():
        figures = f"{errors['prediction']:.2g} of a step, {errors['actions']:.2g} of sampled actions"
        sys.stdout.write(f"batch {rows}: largest error {figures}\n")
    sys.stdout.write(f"{params.output}\n")
