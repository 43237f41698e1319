"""`vla-foundry caption`: caption images with a run's vision-language model.

Images and prompts go through the run's own processor, with the same code as in training.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vla_foundry.config.command_line import parse_command
from vla_foundry.data.kept import check_kept_inputs
from vla_foundry.inference.loading import (
    choose_device,
    find_end_tokens,
    find_run_folder,
    load_run_model,
    load_run_processor,
)
from vla_foundry.params.commands.runs import CaptionParams
from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.image_caption import ImageCaptionDataParams, ImageTextDataParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.experiment import load_params_from_yaml
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.params.models.vlm import VLMHFParams, VLMParams
from vla_foundry.run_folder import CONFIG_NAME, MODEL_CONFIG_NAME
from vla_foundry.storage.uri import join_uri, read_bytes
from vla_foundry.text.chat import IMAGE_MARKER, Turn, place_images

if TYPE_CHECKING:
    from torch import nn

    from vla_foundry.images.processor import Processor

_IMAGE_FLAG = "--image"


@dataclass(frozen=True)
class Question:
    """Images and a question about them."""

    # encoded images: JPEG, PNG, WebP
    images: tuple[bytes, ...]
    # <image> marks where images go; without it they come first
    prompt: str
    # of the images, for errors
    name: str = "an image"


@dataclass(frozen=True, eq=False)
class Captioner:
    """A model that answers questions about images, with its processor and data params."""

    model: "nn.Module"
    processor: "Processor"
    # data params of the run: prompts and image crops
    data: ImageTextDataParams
    # the model takes its processor's outputs besides tokens and pixels
    takes_extras: bool

    @property
    def default_prompt(self) -> str:
        """The first prompt that the run was trained with, if it needs nothing filled in; documents have none."""
        from vla_foundry.text.chat import template_fields

        if not isinstance(self.data, ImageCaptionDataParams):
            return IMAGE_MARKER
        prompt = self.data.prompts[0]
        if template_fields(prompt):
            raise ValueError(f"The run's prompt {prompt!r} has fields. Give one with --prompt.")
        return prompt


def load_captioner(checkpoint: str, *, device: str = "auto", use_ema: bool | None = None) -> Captioner:
    """Load a run's model and processor.

    Raises:
        FileNotFoundError: the run does not exist or has no processor.
        ValueError: it was not trained on images and text, or does not fit its checkpoint.
    """
    run_folder = find_run_folder(checkpoint)
    model_params = load_params_from_yaml(ModelParams, join_uri(run_folder, MODEL_CONFIG_NAME))
    if not isinstance(model_params, (VLMParams, VLMHFParams)):
        raise ValueError(
            f"checkpoint {checkpoint} holds a model of type '{model_params.type}', not a vision-language model (vlm, "
            "vlm_hf)."
        )
    data = load_params_from_yaml(DataParams, join_uri(run_folder, CONFIG_NAME))
    parts = [*data.datasets.values()] if isinstance(data, MixtureDataParams) else [data]
    # captions first: their prompts ask
    order = (ImageCaptionDataParams, ImageTextDataParams)
    found = next((part for kind in order for part in parts if isinstance(part, kind)), None)
    if found is None:
        raise ValueError(
            f"checkpoint {checkpoint} was trained on data of type '{data.type}', not on image_caption or interleaved."
        )
    check_kept_inputs(run_folder, checkpoint)
    processor = load_run_processor(run_folder)
    target = choose_device(device)
    model = load_run_model(model_params, run_folder, checkpoint, use_ema, target)
    return Captioner(model, processor, found, takes_extras=isinstance(model_params, VLMHFParams))


def encode_question(captioner: Captioner, question: Question) -> dict[str, Any]:
    """Encode images and a prompt as validation does, up to where the answer begins, or a document goes on.

    Raises:
        ValueError: an image cannot be decoded, or the prompt does not match the images.
    """
    from vla_foundry.data.pipelines.augment import CENTRE, prepare_images
    from vla_foundry.images.processor import TOKEN_KEYS

    try:
        images, _ = prepare_images(question.images, captioner.data.augmentation, CENTRE)
    except ValueError as error:
        raise ValueError(f"{question.name}: {error}") from error
    content = place_images(question.prompt, len(images))
    if isinstance(captioner.data, ImageCaptionDataParams):
        return captioner.processor.encode(images, [Turn("user", content)])
    texts = content.split(IMAGE_MARKER)
    parts = [part for text in texts for part in (None, text) if part != ""][1:]
    inputs = captioner.processor.encode_document(images, parts, max_tokens=sys.maxsize)
    # without the token that ends the document
    return {name: value[:-1] if name in TOKEN_KEYS else value for name, value in inputs.items()}


def create_prompt_batch(captioner: Captioner, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the questions as rows that end with their prompts, and the images in the order of their tokens.

    Returns:
        input_ids and attention_mask [B, T], pixel_values and the model's other inputs, on the model's device.
    """
    import numpy as np
    import torch

    from vla_foundry.data.pipelines.rows import join_samples
    from vla_foundry.images.processor import TOKEN_KEYS
    from vla_foundry.models.batch_handlers import normalize_batch_images

    samples = [{"inputs": encode_question(captioner, question)} for question in questions]
    lengths = [len(sample["inputs"]["input_ids"]) for sample in samples]
    longest = max(lengths)
    batch = join_samples(samples, [[n] for n in range(len(samples))], longest, processor=captioner.processor)
    device = next(captioner.model.parameters()).device
    inputs: dict[str, Any] = {"pixel_values": normalize_batch_images(batch, device)}
    for name in TOKEN_KEYS:
        if name in batch and (name == "input_ids" or (captioner.takes_extras and name != "target_mask")):
            rows = [np.roll(row, longest - size) for row, size in zip(batch[name], lengths, strict=True)]
            inputs[name] = torch.from_numpy(np.stack(rows)).to(device)
    mask = [[0] * (longest - size) + [1] * size for size in lengths]
    inputs["attention_mask"] = torch.tensor(mask, device=device)
    if captioner.takes_extras:
        extras = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        inputs |= {name: value.to(device) for name, value in extras.items() if name != "pixel_values"}
    return inputs


def answer(
    captioner: Captioner,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """Answer each question as if it were alone in the batch.

    Raises:
        ValueError: see `encode_question`; or a prompt leaves no room for an answer.
    """
    from vla_foundry.inference.decoding import generate

    end_token_ids = captioner.processor.stop_token_ids()
    end_token_ids += find_end_tokens(captioner.model, captioner.processor.tokenizer)
    answers: list[str] = []
    for first in range(0, len(questions), batch_size):
        part = questions[first : first + batch_size]
        inputs = create_prompt_batch(captioner, part)
        continuations = generate(
            captioner.model,
            inputs.pop("input_ids"),
            inputs.pop("attention_mask"),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            end_token_ids=end_token_ids,
            seeds=[_seed_of(question, seed) for question in part],
            prompt_inputs=inputs,
        )
        answers += [captioner.processor.decode(continuation.tokens) for continuation in continuations]
    return answers


def _seed_of(question: Question, seed: int) -> int:
    """Return a seed that does not depend on the other questions."""
    digest = hashlib.sha256(f"{seed}\0{question.prompt}\0".encode())
    for image in question.images:
        digest.update(hashlib.sha256(image).digest())
    return int.from_bytes(digest.digest()[:8], "little")


def gather_images(argv: Sequence[str]) -> list[str]:
    """Merge all --image values into one list: `--image a.png b.png`, or a repeated flag."""
    words: list[str] = []
    images: list[str] = []
    is_image = False
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            is_image = name == _IMAGE_FLAG
            if is_image:
                images += [value] if equals else []
                continue
        (images if is_image else words).append(word)
    return [*words, f"{_IMAGE_FLAG}={json.dumps(images)}"] if images else words


def main(argv: list[str]) -> None:
    """Run `vla-foundry caption`: print each image's name and what it shows."""
    params = parse_command(CaptionParams, gather_images(argv), prog="vla-foundry caption")
    images = [read_bytes(name) for name in params.image]
    captioner = load_captioner(params.checkpoint, device=params.device, use_ema=params.use_ema)
    prompt = captioner.default_prompt if params.prompt is None else params.prompt
    groups = [tuple(images)] if params.together else [(image,) for image in images]
    names = [", ".join(params.image)] if params.together else params.image
    answers = answer(
        captioner,
        [Question(group, prompt, name) for group, name in zip(groups, names, strict=True)],
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        batch_size=params.batch_size,
    )
    for name, text in zip(names, answers, strict=True):
        sys.stdout.write(f"{name}: {text}\n")
