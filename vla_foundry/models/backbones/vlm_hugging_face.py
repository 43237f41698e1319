"""The backbone for any Hugging Face image-text model: hidden states of the last layers, without the output head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vla_foundry.batch import Batch
from vla_foundry.models.backbones.backbone import (
    Conditioning,
    LanguageModelBackbone,
    Suffix,
    Writing,
    arrange_rows,
    extend_columns,
    register_backbone,
    register_observation,
)
from vla_foundry.models.batch_handlers import NOT_INPUTS, normalize_batch_images, to_device
from vla_foundry.models.layers import take_token
from vla_foundry.models.registry import create_model
from vla_foundry.params.models.backbones import VLMBackboneParams

# batch keys of robot data that are not inputs of an image-text model
_ROBOT_KEYS = {
    *("image_mask", "actions", "proprioception", "past_mask", "future_mask", "is_padding", "action_dim_mask"),
    *("anchors", "intrinsics", "extrinsics", "action_tokens"),
}


class VLMBackbone(LanguageModelBackbone):
    """Maps images and an instruction to hidden states at the observation token or at every token (prefix)."""

    def __init__(self, params: VLMBackboneParams, model: Any) -> None:
        head, table = model.model.get_output_embeddings(), model.model.get_input_embeddings()
        super().__init__(model, params, width=model.hidden_dim, head=head, table=table, token_std=0.02)
        # what replaces embeddings, set during a forward
        self._replace: Callable[[Tensor], Tensor] | None = None
        # architectures process embeddings differently, but all of them look tokens up in this table
        table.register_forward_hook(self._replace_embeddings)

    def forward(
        self,
        input_ids: Int[Tensor, "B W"],
        *,
        attention_mask: Int[Tensor, "B W"] | None,
        pixel_values: Float[Tensor, "M ..."] | None,
        observation_places: Int[Tensor, " B"] | None,
        token_mask: Bool[Tensor, "B W"] | None,
        suffix: Suffix | None = None,
        **extras: Tensor,
    ) -> Conditioning:
        """Encode; for the arguments see VLMHF and VLMFoundryBackbone."""
        with self._replacing(input_ids, observation_places, suffix, extras):
            states = self.model.encode(
                input_ids,
                attention_mask,
                pixel_values=pixel_values,
                num_states=self.num_states,
                at=observation_places if suffix is None else None,
                **extras,
            )
        return self.read_states(states, observation_places, token_mask, suffix)

    def start_writing(
        self,
        input_ids: Int[Tensor, "B W"],
        *,
        attention_mask: Int[Tensor, "B W"] | None,
        pixel_values: Float[Tensor, "M ..."] | None,
        observation_places: Int[Tensor, " B"] | None,
        token_mask: Bool[Tensor, "B W"] | None,
        suffix: Suffix,
        **extras: Tensor,
    ) -> Writing:
        """See VLMFoundryBackbone."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self._replacing(input_ids, observation_places, suffix, extras):
            output = self.model.decode(
                input_ids, mask, pixel_values=pixel_values, logits_to_keep=1, output_hidden_states=True, **extras
            )
        assert output.hidden_states is not None
        last = suffix.starts + suffix.values.shape[1] - 1
        return Writing(take_token(output.hidden_states[-1], last).squeeze(1), mask, output.past_key_values)

    def continue_writing(self, writing: Writing, token: Float[Tensor, "B D"]) -> Writing:
        """See VLMFoundryBackbone."""
        mask = torch.cat([writing.mask, torch.ones_like(writing.mask[:, :1])], dim=1)
        self._replace = lambda embeds: token.unsqueeze(1).to(embeds.dtype)
        try:
            output = self.model.decode(
                torch.zeros_like(mask[:, :1]),
                mask,
                past_key_values=writing.cache,
                logits_to_keep=1,
                output_hidden_states=True,
            )
        finally:
            self._replace = None
        assert output.hidden_states is not None
        return Writing(output.hidden_states[-1][:, -1], mask, output.past_key_values)

    @contextmanager
    def _replacing(
        self, input_ids: Tensor, places: Tensor | None, suffix: Suffix | None, extras: dict[str, Tensor]
    ) -> Iterator[None]:
        """Put the observation token and a suffix into the embeddings that are looked up meanwhile."""
        starts = places if places is not None or suffix is None else suffix.starts
        if self.model.takes_prompt_types and starts is not None:
            # prompt tokens see each other in both directions, but not the tokens after them
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            extras["token_type_ids"] = (columns >= starts[:, None]).int()
        self._replace = partial(self.put_embeddings, places=places, suffix=suffix)
        try:
            yield
        finally:
            self._replace = None

    def _replace_embeddings(self, module: nn.Module, inputs: Any, embeds: Tensor) -> Tensor:
        # some architectures also look up single tokens
        return embeds if self._replace is None or embeds.ndim != 3 else self._replace(embeds)


@register_backbone("vlm_backbone")
def create_vlm_backbone(params: VLMBackboneParams, load_pretrained: bool = True) -> VLMBackbone:
    """Build the backbone, in fp32.

    Raises:
        ValueError: the model does not exist, or transformers does not support it.
    """
    return VLMBackbone(params, create_model(params.model_params(), load_pretrained=load_pretrained))


@register_observation("vlm_backbone")
def prepare_observation(params: VLMBackboneParams, batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """Return what VLMBackbone.forward takes; inputs other than tokens and images are passed on unchanged.

    Missing images stay visible as black images: model families differ in how they match tokens to images.
    """
    has_token = params.conditioning == "observation_token"
    rows = arrange_rows(batch, has_observation_token=has_token, is_trimmed=torch.device(device).type == "cpu")
    mask, is_prompt = rows.mask(), rows.mask(rows.num_text)
    width = rows.input_ids.shape[1]
    inputs: dict[str, Any] = {
        "input_ids": to_device(rows.input_ids, device),
        "attention_mask": None if mask.all() else to_device(mask.long(), device),
        "pixel_values": normalize_batch_images(batch, device),
        "observation_places": None if rows.places is None else to_device(rows.places, device),
        "token_mask": None if has_token or is_prompt.all() else to_device(is_prompt, device),
    }
    if "num_suffix" in batch:
        inputs["suffix_starts"] = to_device(rows.starts, device)
    for name, value in batch.items():
        if name in ("mm_token_type_ids", "token_type_ids"):
            inputs[name] = to_device(extend_columns(value, width), device)
        elif name not in NOT_INPUTS | _ROBOT_KEYS and isinstance(value, Tensor):
            inputs[name] = to_device(value, device)
    return inputs
