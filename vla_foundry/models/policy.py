"""Robot policies (VLAs): a backbone encodes images and instruction, an action head predicts a chunk of actions.

conditioning = backbone(observation)
loss         = action head(conditioning, window of actions and proprioception)
actions      = action head.sample(conditioning, window)

The head of the paper is in action_heads/flow_transformer.py.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_foundry.batch import Batch, LossOutput
from vla_foundry.models.action_heads.action_head import ActionWindow, DrawKey, HeadWidths, create_action_head
from vla_foundry.models.action_heads.tokens import TokenHead, create_action_tokenizer, tokenize_actions
from vla_foundry.models.backbones.backbone import (
    OBSERVATIONS,
    Conditioning,
    Suffix,
    create_backbone,
)
from vla_foundry.models.batch_handlers import to_device
from vla_foundry.models.registry import BatchHandler, create_batch_handler, register_batch_handler, register_model
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.models.action_heads import TokenHeadParams
from vla_foundry.params.models.backbones import BackboneParams, VLMBackboneParams, VLMFoundryBackboneParams
from vla_foundry.params.models.policy import RobotPolicyParams
from vla_foundry.robotics.action_tokens import FastTokenizer
from vla_foundry.run_folder import FAST_TOKENIZER_NAME
from vla_foundry.tensors import Entry

# in checkpoints of the earlier implementation: the backbone, and the head's modules by the first part of their names
_OLD_BACKBONE = "vision_language_backbone._model."
_OLD_HEAD = {
    *("time_encoding", "output_layer", "action_encode", "condition_encode", "proprioception_encode", "transformer"),
}
# tensors of these checkpoints that are not loaded: name prefix -> reason
LEFT_OUT = {
    "transformer.embeddings.": "the action head reads no tokens",
    "transformer.output.": "the action head writes no tokens",
    "transformer.norm.": "the action head's last state was read before this norm",
    "sinusoidal_position_": "this table is computed",
    "scheduler.": "constants of the noise process are computed",
}
_TOKEN_TABLES = ("embeddings.weight", "embed_tokens.weight")
_OUTPUT_HEADS = ("output.weight", "lm_head.weight")


class RobotPolicy(nn.Module):
    """Maps observations to a loss or to actions."""

    def __init__(
        self,
        vision_language_backbone: Any,
        action_head: Any,
        *,
        action_dim: int,
        action_tokens: TokenHead | None = None,
        action_tokens_weight: float = 1.0,
        insulate_backbone: bool = False,
    ) -> None:
        super().__init__()
        # each may be one of several classes
        self.vision_language_backbone: Any = vision_language_backbone
        self.action_head: Any = action_head
        self.action_tokens = action_tokens
        self.action_dim, self.action_tokens_weight = action_dim, action_tokens_weight
        self.insulate_backbone = insulate_backbone

    def forward(self, *, language: dict[str, Any] | None = None, **robot: Any) -> LossOutput:
        """Return the loss of robot samples, or of text and captions, which train the backbone alone.

        Args:
            language: inputs of the language model; None: the samples are of robots.
            robot: arguments of `robot_loss`.
        """
        return self.robot_loss(**robot) if language is None else self.vision_language_backbone.model(**language)

    def robot_loss(
        self,
        *,
        observation: dict[str, Any],
        actions: Float[Tensor, "B T A"],
        past_mask: Bool[Tensor, "B T"],
        future_mask: Bool[Tensor, "B T"],
        samples: Int[Tensor, " B"],
        seed: int,
        proprioception: Float[Tensor, "B P D"] | None = None,
        action_dim_mask: Bool[Tensor, "B A"] | None = None,
        step_mask: Bool[Tensor, "B T"] | None = None,
        action_tokens: Int[Tensor, "B K"] | None = None,
    ) -> LossOutput:
        """Return the loss; RoboticsBatchHandler prepares the arguments from a batch.

        Noise and times depend only on (seed, sample) and on whether the model is training: in validation a sample
        always gets the same ones.

        Args:
            observation: the backbone's keyword arguments.
            samples: position of each sample in the plan.
            seed: the run's seed.
            step_mask: False at padding; None: no padding.

        Returns:
            LossOutput whose count is the number of valid action values: predicted steps x existing dimensions.
        """
        window = ActionWindow(
            actions, past_mask, future_mask, action_dim_mask, proprioception, step_mask, tokens=action_tokens
        )
        observation = dict(observation)
        writer = self.action_head if isinstance(self.action_head, TokenHead) else self.action_tokens
        if writer is not None:
            suffix = writer.embed_suffix(window, action_tokens)
            observation["suffix"] = Suffix(suffix, observation.pop("suffix_starts"))
        conditioning: Conditioning = self.vision_language_backbone(**observation)
        key = DrawKey(samples, seed, "training" if self.training else "validation")
        seen = conditioning._replace(tokens=conditioning.tokens.detach()) if self.insulate_backbone else conditioning
        loss: LossOutput = self.action_head(seen, window, key)
        if self.action_tokens is None:
            return loss
        tokens = self.action_tokens(conditioning, window, key)
        logs = {"action_loss": loss.sum.detach(), "token_loss": tokens.sum.detach(), **loss.logs, **tokens.logs}
        return loss._replace(sum=loss.sum + self.action_tokens_weight * tokens.sum, logs=logs)

    @torch.no_grad()
    def sample(
        self,
        inputs: dict[str, Any],
        *,
        seeds: Int[Tensor, " B"],
        num_steps: int | None = None,
    ) -> Float[Tensor, "B T A"]:
        """Return normalised fp32 actions: observed steps unchanged, the others predicted.

        Args:
            inputs: output of RoboticsBatchHandler.prepare_sampling. `actions` may be omitted if no step is observed
                (past_mask); only observed steps are read. `guidance` is optional.
            seeds: one per sample; a sample's noise depends on its seed only, not on the batch.
            num_steps: sampling steps; None: the noise process's default.
        """
        assert "action_tokens" not in inputs, "these are inputs of training; use prepare_sampling"
        observation, window = inputs["observation"], self._window(inputs)
        if isinstance(self.action_head, TokenHead):
            return self.action_head.write(self.vision_language_backbone, observation, window)
        conditioning = self.vision_language_backbone(**observation)
        return self.action_head.sample(conditioning, window, DrawKey(seeds, 0, "sampling"), num_steps)

    def _window(self, inputs: dict[str, Any]) -> ActionWindow:
        past_mask: Tensor = inputs["past_mask"]
        actions: Tensor | None = inputs.get("actions")
        if actions is None:
            actions = torch.zeros((*past_mask.shape, self.action_dim), device=past_mask.device)
        return ActionWindow(
            actions.float(),
            past_mask,
            inputs["future_mask"],
            inputs.get("action_dim_mask"),
            inputs.get("proprioception"),
            inputs.get("step_mask"),
            inputs.get("guidance"),
        )

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the backbone and of the head."""
        return [*self.vision_language_backbone.blocks(), *self.action_head.blocks()]

    def init_weights(self) -> None:
        """Initialise the weights of both parts."""
        self.vision_language_backbone.init_weights()
        self.action_head.init_weights()
        if self.action_tokens is not None:
            self.action_tokens.init_weights()

    def num_flops_per_token(self, seq_len: int) -> float:
        """Return the backbone's FLOPs; the head is not counted because its tokens are not part of a row."""
        return self.vision_language_backbone.num_flops_per_token(seq_len)

    @staticmethod
    def translate_weights(entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return a checkpoint's entries under our names, if the earlier implementation wrote it; else as they are.

        The observation token was the last row of the token tables; here it is a separate parameter.
        """
        has_token = not any("text_projection" in name for name in entries)
        found: dict[str, Entry] = {}
        for name, entry in entries.items():
            if name.startswith(_OLD_BACKBONE):
                inner = name.removeprefix(_OLD_BACKBONE)
                new = f"vision_language_backbone.model.{inner}"
                is_table = inner.endswith(_TOKEN_TABLES) and "vision" not in inner and "vit." not in inner
                if has_token and (is_table or inner.endswith(_OUTPUT_HEADS)):
                    if is_table:
                        found["vision_language_backbone.observation_token"] = Entry(
                            torch.Size(entry.shape[1:]), lambda e=entry: e.read()[-1]
                        )
                    others = torch.Size((entry.shape[0] - 1, *entry.shape[1:]))
                    entry = Entry(others, lambda e=entry: e.read()[:-1])
                found[new] = entry
            elif not name.startswith(tuple(LEFT_OUT)):
                found[f"action_head.{name}" if name.partition(".")[0] in _OLD_HEAD else name] = entry
        return found

    def save_files(self, folder: Path) -> None:
        """Write the architecture of the Hugging Face parts and the action tokenizer; with_model_files reads them."""
        self.vision_language_backbone.save_files(folder)
        for part in (self.action_head, self.action_tokens):
            if isinstance(part, TokenHead) and isinstance(part.tokenizer, FastTokenizer):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / FAST_TOKENIZER_NAME).write_text(part.tokenizer.to_json(), encoding="utf-8")


@register_model("diffusion_policy")
@register_model("regression_policy")
def create_policy(params: RobotPolicyParams, load_pretrained: bool = True) -> RobotPolicy:
    """Build the policy; if the backbone names a checkpoint, start from its weights.

    Raises:
        ValueError: a width is missing, or a checkpoint does not fit.
        FileNotFoundError: the checkpoint does not exist.
    """
    if params.action_dim is None or params.proprioception_dim is None:
        name = "action_dim" if params.action_dim is None else "proprioception_dim"
        raise ValueError(f"model.{name} is missing. Give --model.{name} N, or data of type robotics.")
    backbone = create_backbone(params.vision_language_backbone, load_pretrained)
    widths = HeadWidths(
        action_dim=params.action_dim,
        proprioception_dim=params.proprioception_dim,
        conditioning_dim=backbone.conditioning_dim,
        num_states=backbone.num_states,
        token_dim=backbone.width,
    )
    return RobotPolicy(
        backbone,
        create_action_head(params.action_head, widths),
        action_dim=params.action_dim,
        action_tokens=None if params.action_tokens is None else TokenHead(params.action_tokens, widths),
        action_tokens_weight=params.action_tokens_weight,
        insulate_backbone=params.insulate_backbone,
    )


@register_batch_handler("diffusion_policy")
@register_batch_handler("regression_policy")
class RoboticsBatchHandler:
    """Samples of images, an instruction, proprioception and a window of actions."""

    def __init__(self, params: TrainExperimentParams) -> None:
        if not isinstance(params.model, RobotPolicyParams):
            raise ValueError(f"model.type '{params.model.type}' is not a policy. Use --model.type diffusion_policy.")
        self.backbone = params.model.vision_language_backbone
        self.seed = params.hparams.seed
        self._prepare_observation = OBSERVATIONS.get(self.backbone.type)
        self._language = _create_language_handler(params, self.backbone) if params.data.has_language() else None
        model = params.model
        # in sampling, only a head that acts with tokens needs room for them
        self._writes = isinstance(model.action_head, TokenHeadParams)
        writer = model.action_head if isinstance(model.action_head, TokenHeadParams) else model.action_tokens
        self._tokenizer = None
        if writer is not None:
            assert model.action_dim is not None, "create_policy checks it"
            self._tokenizer = create_action_tokenizer(writer, model.action_dim)
        self._reads_proprioception = bool(model.proprioception_dim)

    def prepare(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return what RobotPolicy.forward takes."""
        if self._language is not None and batch["modality"] != "robotics":
            return {"language": self._language.prepare(batch, device)}
        positions = torch.as_tensor(batch["positions"], dtype=torch.int64)
        if not len(positions):  # in validation, a rank without samples has a row of padding
            positions = positions.new_zeros(1)
        inputs = {"samples": to_device(positions, device), "seed": self.seed}
        if self._tokenizer is not None:
            is_rounded = torch.device(device).type != "cpu"
            tokens = tokenize_actions(self._tokenizer, batch, is_rounded=is_rounded)
            inputs["action_tokens"] = to_device(tokens, device)
            batch = self._with_suffix(batch, tokens.shape[1])
        return self._prepare_robot(batch, device) | inputs

    def prepare_sampling(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        """Return what RobotPolicy.sample takes; the batch needs neither plan positions nor future actions.

        Raises:
            ValueError: steps are observed, but there are no actions.
        """
        if batch.get("actions") is None and batch["past_mask"].any():
            raise ValueError("past_mask says that steps are observed, but there are no actions.")
        return self._prepare_robot(self._with_suffix(batch, 0) if self._writes else batch, device)

    def _with_suffix(self, batch: Batch, num_tokens: int) -> Batch:
        """Return the batch with room in its rows for proprioception and action tokens.

        Raises:
            ValueError: the model reads proprioception, but there is none.
        """
        num_steps = 0
        if self._reads_proprioception:
            if batch.get("proprioception") is None:
                raise ValueError("The policy reads proprioception, but the batch has none.")
            num_steps = batch["proprioception"].shape[1]
        return {**batch, "num_suffix": num_steps + num_tokens}

    def _prepare_robot(self, batch: Batch, device: torch.device | str) -> dict[str, Any]:
        past_mask, future_mask = batch["past_mask"], batch["future_mask"]
        inputs: dict[str, Any] = {
            "observation": self._prepare_observation(self.backbone, batch, device),
            "past_mask": to_device(past_mask, device),
            "future_mask": to_device(future_mask, device),
        }
        # decide on the host: attention without a mask is faster
        step_mask = past_mask | future_mask
        inputs["step_mask"] = None if step_mask.all() else to_device(step_mask, device)
        action_dim_mask: Tensor | None = batch.get("action_dim_mask")
        if action_dim_mask is not None and not action_dim_mask.all():
            inputs["action_dim_mask"] = to_device(action_dim_mask, device)
        for name in ("actions", "proprioception"):
            if batch.get(name) is not None:
                inputs[name] = to_device(batch[name], device)
        return inputs

    def count_targets(self, inputs: dict[str, Any]) -> Tensor:
        """Return the number of valid action values, predicted steps x existing dimensions; or of supervised tokens."""
        if self._language is not None and "language" in inputs:
            return self._language.count_targets(inputs["language"])
        future_mask: Tensor = inputs["future_mask"]
        num_steps = future_mask.sum(1)
        action_dim_mask: Tensor | None = inputs.get("action_dim_mask")
        if action_dim_mask is None:
            return num_steps.sum() * inputs["actions"].shape[-1]
        return (num_steps * action_dim_mask.sum(1)).sum()


def _create_language_handler(params: TrainExperimentParams, backbone: BackboneParams) -> BatchHandler:
    """Create the batch handler of the language model in a backbone.

    Raises:
        ValueError: the backbone has none.
    """
    if isinstance(backbone, VLMBackboneParams):
        return create_batch_handler(dataclasses.replace(params, model=backbone.model_params()))
    if isinstance(backbone, VLMFoundryBackboneParams) and backbone.vlm is not None:
        return create_batch_handler(dataclasses.replace(params, model=backbone.vlm))
    raise ValueError(
        f"model.vision_language_backbone.type '{backbone.type}' writes no text, so it cannot learn from text or "
        "captions in data.datasets. Use vlm_foundry_backbone or vlm_backbone."
    )
