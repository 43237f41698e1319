"""Tiny image-text models and processors of published families, made in code."""

from typing import Any

import torch
import transformers as hf

from tests.essential.byte_level import train_tokenizer

_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<img>", "</img>",
    "<IMG_CONTEXT>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>",
    "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
]  # fmt: skip
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_CROPPED: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_SQUARE: dict[str, Any] = {"size": {"height": 28, "width": 28}}
_GRID = [[28, 56], [56, 28], [56, 56]]
_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_QWEN = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

# what a processor is asked for besides, so that an image stays one tile as ours does by default
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "internvl": {"crop_to_patches": False},
    "aya_vision": {"crop_to_patches": False},
    "idefics3": {"do_image_splitting": False, "do_pad": False, "size": {"height": 28, "width": 28}},
}


def _create_tokenizer(**extra: str) -> Any:
    texts = ["Describe the image. A red cube lies on a green table."] * 3
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    return train_tokenizer(400, texts, _SPECIAL, **names, extra_special_tokens=extra)


def create_processor(name: str) -> Any:
    """A processor of one of the families, as its authors make it."""
    image = {
        "gemma3": "<start_of_image>",
        "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
        "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
        "internvl": "<IMG_CONTEXT>",
        "pixtral": "[IMG]",
    }.get(name, "<image>")
    common = {"tokenizer": _create_tokenizer(), "chat_template": _TEMPLATE.replace("IMAGE", image)}
    if name in ("llava", "vipllava"):
        return hf.LlavaProcessor(hf.CLIPImageProcessor(**_CROPPED), **common, **_LLAVA)
    if name == "llava_next":
        images = hf.LlavaNextImageProcessor(**_CROPPED, image_grid_pinpoints=_GRID)
        return hf.LlavaNextProcessor(images, **common, **_LLAVA)
    if name == "llava_onevision":
        images = hf.LlavaOnevisionImageProcessor(**_SQUARE, image_grid_pinpoints=_GRID)
        video = hf.LlavaOnevisionVideoProcessor()
        return hf.LlavaOnevisionProcessor(
            images, video_processor=video, num_image_tokens=4, vision_feature_select_strategy="full", **common
        )
    if name == "gemma3":
        marks = {"image_token": "<image_soft_token>", "boi_token": image, "eoi_token": "<end_of_image>"}
        common["tokenizer"] = _create_tokenizer(**marks)
        return hf.Gemma3Processor(hf.Gemma3ImageProcessor(**_SQUARE), image_seq_length=4, **common)
    if name in ("qwen2_vl", "qwen2_5_vl"):
        kind = hf.Qwen2VLProcessor if name == "qwen2_vl" else hf.Qwen2_5_VLProcessor
        return kind(hf.Qwen2VLImageProcessor(**_QWEN), video_processor=hf.Qwen2VLVideoProcessor(), **common)
    if name == "internvl":
        marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": image}
        common["tokenizer"] = _create_tokenizer(**marks, video_token="<video>")
        video = hf.InternVLVideoProcessor()
        return hf.InternVLProcessor(
            hf.GotOcr2ImageProcessor(**_SQUARE), video_processor=video, image_seq_length=4, **common
        )
    if name == "pixtral":
        images = hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
        return hf.PixtralProcessor(images, patch_size=14, **common)
    if name == "idefics3":
        images = hf.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
        return hf.Idefics3Processor(images, image_seq_len=1, **common)
    if name == "janus":  # does not say which token stands for an image
        marks = {"image_token": image, "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        common["tokenizer"] = _create_tokenizer(**marks)
        return hf.JanusProcessor(hf.JanusImageProcessor(**_SQUARE, min_size=14), num_image_tokens=4, **common)
    assert name == "aya_vision"
    sizes = {"patch_size": 14, "img_size": 28, "downsample_factor": 1}
    marks = {"start_of_img_token": "<|START_OF_IMG|>", "end_of_img_token": "<|END_OF_IMG|>"}
    images = hf.GotOcr2ImageProcessor(**_SQUARE)
    return hf.AyaVisionProcessor(images, **common, **sizes, **marks, img_patch_token="<|IMG_PATCH|>")


def _create_config(name: str) -> Any:
    text = {**_TEXT, "model_type": "llama"}
    if name == "idefics3":
        text["pad_token_id"] = 0
        return hf.Idefics3Config(vision_config=_VISION, text_config=text, scale_factor=2)
    vision = {**_VISION, "num_image_tokens": 4, "projection_dim": 32}
    vq = {"embed_dim": 8, "num_embeddings": 20, "latent_channels": 16, "base_channels": 32, "channel_multiplier": [1]}
    vq |= {"num_res_blocks": 1, "projection_dim": 32, "num_patches": 4, "image_token_embed_dim": 32}
    return hf.JanusConfig(text_config=text, vision_config=vision, vq_config=vq)


def create_model(name: str, image_token_id: int) -> Any:
    """A tiny model of the family, with weights large enough to tell right from wrong."""
    torch.manual_seed(0)
    vision: dict[str, Any] = _VISION
    if name == "llava":
        config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**_TEXT))
    elif name == "vipllava":
        config = hf.VipLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**vision),
            text_config=hf.LlamaConfig(**_TEXT),
            vision_feature_layers=[-2, -1],
        )
    elif name == "gemma3":
        text = hf.Gemma3TextConfig(**_TEXT, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
        config = hf.Gemma3Config(text_config=text, vision_config=hf.SiglipVisionConfig(**vision), mm_tokens_per_image=4)
    elif name == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
        config = hf.Qwen2VLConfig(text_config={**_TEXT, "rope_parameters": _MROPE}, vision_config=vision)
    elif name == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
        vision |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        config = hf.Qwen2_5_VLConfig(text_config={**_TEXT, "rope_parameters": _MROPE}, vision_config=vision)
    elif name == "internvl":
        vision = {**vision, "image_size": [28, 28], "patch_size": [7, 7]}
        config = hf.InternVLConfig(
            vision_config=hf.InternVLVisionConfig(**vision), text_config=hf.Qwen2Config(**_TEXT), downsample_ratio=0.5
        )
    elif name in ("idefics3", "janus"):
        config = _create_config(name)
    else:
        assert name == "aya_vision"
        vision = hf.SiglipVisionConfig(**vision)  # pyright: ignore[reportAssignmentType]
        config = hf.AyaVisionConfig(vision_config=vision, text_config=hf.Cohere2Config(**_TEXT), downsample_factor=1)
    for key in ("image_token_id", "image_token_index"):
        if hasattr(config, key):
            setattr(config, key, image_token_id)
    model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model
