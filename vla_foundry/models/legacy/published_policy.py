"""Translate the config and weights of policies from the earlier implementation.

Where the original numerics differ from ours, the translation sets these params to reproduce them:

| param                                | imported | why                                                           |
|--------------------------------------|----------|---------------------------------------------------------------|
| backbone final_norm (native)         | false    | hidden states are read before the final norm                  |
| backbone text_norm_before_projection | true     | CLIP: the instruction is normalised before its projection     |
| action_head final_norm               | false    | the head's last hidden state is read before the final norm    |
| action_head time_encoding            | table    | each time had a trained row                                   |
| noise num_timesteps                  | theirs   | trained at times 0, 1/n, ..., (n-1)/n                         |
| noise clamp_range                    | theirs   | noised actions are clamped                                    |
| noise sampling_time_shift            | 1/n      | during sampling, the head received a time one step too small  |

Three differences remain. If the sampling steps did not divide the number of times, sampling went past 0; here it ends
at 0. The head saw padded action steps; here they are hidden. The observation token came after a row's padding and saw
it; here it comes right after the text, so only rows without padding give the same numbers.
"""

from collections.abc import Mapping
from typing import Any

import torch

from vla_foundry.models.weights import Entry

_BACKBONE = "vision_language_backbone._model."
# modules of the head, by the first part of their names
_HEAD = {
    *("time_encoding", "output_layer", "action_encode", "condition_encode", "proprioception_encode", "transformer"),
}
# tensors that we leave out: name prefix -> reason
LEFT_OUT = {
    "transformer.embeddings.": "the action head reads no tokens",
    "transformer.output.": "the action head writes no tokens",
    "transformer.norm.": "the action head's last state was read before this norm",
    "sinusoidal_position_": "this table is computed",
    "scheduler.": "constants of the noise process are computed",
}
_TABLES = ("embeddings.weight", "embed_tokens.weight")
_HEADS = ("output.weight", "lm_head.weight")
_HEAD_KEYS = ("num_action_head_repeats", "input_noise_std")
_BACKBONE_KEYS = {
    "vlm_foundry_backbone": ("num_vlm_layers_to_use", "freeze"),
    "vlm_backbone": ("num_vlm_layers_to_use", "freeze", "hf_pretrained"),
    "clip_backbone": ("freeze", "hf_pretrained", "disable_text", "freeze_text_encoder", "freeze_image_encoder"),
    "vit_backbone": ("freeze",),
}


def translate_config(config: dict[str, Any], vlm_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the model section of an earlier run as plain keys and values of DiffusionPolicyParams.

    Args:
        config: a config_model.yaml of type diffusion_policy.
        vlm_config: model config of the vision-language model it started from, for a vlm_foundry_backbone.

    Raises:
        ValueError: its noise process never worked in the earlier implementation.
    """
    if not config.get("use_flow_matching_scheduler") or config.get("use_diffusers_scheduler"):
        raise ValueError("Only policies trained with use_flow_matching_scheduler can be imported; no others worked.")
    old_noise = config["noise_scheduler"]
    num_times = old_noise["num_timesteps"]
    noise = {
        "type": "flow",
        "num_timesteps": num_times,
        "clamp_range": old_noise["clamp_range"],
        "sampling_time_shift": 1 / num_times,
    }
    head = {
        "type": "flow_transformer",
        "transformer": {**config["transformer"], "vocab_size": 0},
        "time_conditioning": config["diffusion_step_conditioning"],
        "time_encoding": "table",
        "final_norm": False,
        "noise": noise,
        **{key: config[key] for key in _HEAD_KEYS if config.get(key) is not None},
    }
    return {
        "type": "diffusion_policy",
        "vision_language_backbone": _translate_backbone(config["vision_language_backbone"], vlm_config),
        "action_head": head,
        "action_dim": config["action_dim"],
        "proprioception_dim": config["proprioception_dim"],
    }


def _translate_backbone(old: dict[str, Any], vlm_config: dict[str, Any] | None) -> dict[str, Any]:
    kind = old["type"]
    if kind not in _BACKBONE_KEYS:
        raise ValueError(f"vision_language_backbone.type '{kind}' is none of {', '.join(_BACKBONE_KEYS)}.")
    new = {"type": kind, **{key: old[key] for key in _BACKBONE_KEYS[kind] if key in old}}
    if kind == "vlm_foundry_backbone":
        if vlm_config is None:
            raise ValueError(
                "A vlm_foundry_backbone needs the config of the vision-language model it was started from."
            )
        new |= {"vlm": vlm_config, "final_norm": False}
    elif kind == "clip_backbone":
        new["text_norm_before_projection"] = True
    elif kind == "vit_backbone":
        own = {"type", "freeze", "resume_from_checkpoint", "resume_weights_only"}
        new["vit"] = {key: value for key, value in old.items() if key not in own}
    return new


def translate_weights(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries of an earlier implementation's checkpoint under our names.

    The observation token was the last row of the token tables; here it is a separate parameter.
    """
    has_token = not any("text_projection" in name for name in entries)
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        if name.startswith(_BACKBONE):
            inner = name.removeprefix(_BACKBONE)
            new = f"vision_language_backbone.model.{inner}"
            is_table = inner.endswith(_TABLES) and "vision" not in inner and "vit." not in inner
            if has_token and (is_table or inner.endswith(_HEADS)):
                if is_table:
                    found["vision_language_backbone.observation_token"] = _last_row(entry)
                entry = _other_rows(entry)
            found[new] = entry
        elif name.startswith(tuple(LEFT_OUT)):
            continue
        else:
            found[f"action_head.{name}" if name.partition(".")[0] in _HEAD else name] = entry
    return found


def _last_row(entry: Entry) -> Entry:
    return Entry(torch.Size(entry.shape[1:]), lambda: entry.read()[-1])


def _other_rows(entry: Entry) -> Entry:
    return Entry(torch.Size((entry.shape[0] - 1, *entry.shape[1:])), lambda: entry.read()[:-1])
