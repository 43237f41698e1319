"""Find a run and load its model on the requested device."""

import tempfile
from typing import TYPE_CHECKING, Any

from vla_foundry.params.models.policy import list_starts, with_model_files
from vla_foundry.params.models.roles import ModelParams
from vla_foundry.run_folder import (
    CONFIG_NAME,
    MODEL_CONFIG_NAME,
    MODEL_FILES_FOLDER,
    PROCESSOR_FOLDER,
    run_folder_candidates,
)
from vla_foundry.storage.hub import fetch_to_cache
from vla_foundry.storage.uri import download, exists, is_remote, join_uri, list_files

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vla_foundry.images.processor import Processor


def find_run_folder(checkpoint: str) -> str:
    """Return the run folder that contains a checkpoint.

    Raises:
        FileNotFoundError: the checkpoint does not exist, or is not inside a run folder.
    """
    if not is_remote(checkpoint) and not exists(checkpoint):
        raise FileNotFoundError(
            f"checkpoint {checkpoint} does not exist. Give a run folder or one of its step folders."
        )
    for folder in run_folder_candidates(checkpoint):
        if exists(join_uri(folder, MODEL_CONFIG_NAME)):
            return folder
    raise FileNotFoundError(
        f"checkpoint {checkpoint} is not in a run folder: there is no {MODEL_CONFIG_NAME} above it."
    )


def choose_device(name: str) -> "torch.device":
    """Return the device called `name`; "auto" selects a GPU if there is one.

    Raises:
        ValueError: the device does not exist.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device '{name}' does not exist: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu."
        )
    return device


def load_run_model(
    params: ModelParams, run_folder: str, checkpoint: str, use_ema: bool | None, device: "torch.device"
) -> "nn.Module":
    """Load a run's model for inference; adapters (LoRA) are merged into the weights they adapt.

    Args:
        params: the params of the run's model.
        run_folder: the run's folder; architectures saved in it need not be published any more.
        checkpoint: run folder, or step folder within it.
        use_ema: use the averaged weights; None uses them if there are any.
        device: device to put the model on.

    Raises:
        FileNotFoundError: the weights that adapters belong to are missing.
        ValueError: the weights do not match the model.
    """
    from vla_foundry.models import create_model
    from vla_foundry.models.layers import merge_adapters
    from vla_foundry.models.weights import describe_base, has_ema, load_model_checkpoint

    try:
        model = create_model(with_run_files(params, run_folder), load_pretrained=params.lora is not None)
    except (FileNotFoundError, ValueError) as error:
        if params.lora is None:
            raise
        raise type(error)(
            f"{checkpoint} holds adapters (LoRA) of {', '.join(list_starts(params))}: {error} Put it back, or name "
            f"where it is now in {run_folder}/{MODEL_CONFIG_NAME} and {CONFIG_NAME}."
        ) from None
    use_ema = has_ema(checkpoint) if use_ema is None else use_ema
    load_model_checkpoint(model, checkpoint, use_ema=use_ema, base=describe_base(model, params))
    merge_adapters(model)
    return model.to(device).eval()


def with_run_files(params: ModelParams, run_folder: str) -> ModelParams:
    """Return the params with Hugging Face parts read from the run's own copies of their files."""
    files = join_uri(run_folder, MODEL_FILES_FOLDER)
    if files.startswith("hf://") and exists(files):
        files = fetch_to_cache(files)
    is_here = not is_remote(files) and exists(files)
    return with_model_files(params, files, only_tokenizers=not is_here)


def find_end_tokens(model: "nn.Module", tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: the tokenizer's own, and those that the model's published parts list.

    A published model may have had another tokenizer, so its tokens count only if they are added tokens here.
    """
    from vla_foundry.text.tokenizers import as_token_ids

    settings = [getattr(module, "generation_config", None) for module in model.modules()]
    published = [token for found in settings for token in as_token_ids(getattr(found, "eos_token_id", None))]
    return [
        *as_token_ids(tokenizer.eos_token_id),
        *(token for token in published if token in tokenizer.added_tokens_decoder),
    ]


def load_run_processor(run_folder: str) -> "Processor":
    """Load a run's processor.

    Raises:
        FileNotFoundError: the run has no processor.
        ValueError: the processor cannot be loaded.
    """
    from vla_foundry.images.processor import load_processor

    folder = join_uri(run_folder, PROCESSOR_FOLDER)
    if not exists(folder):
        raise FileNotFoundError(f"{run_folder} has no processor: it has no folder {PROCESSOR_FOLDER}.")
    if not is_remote(folder):
        return load_processor(folder)
    with tempfile.TemporaryDirectory(prefix="vla_foundry_processor_") as copy:
        for file in list_files(folder):
            download(file, f"{copy}/{file.removeprefix(folder).strip('/')}")
        return load_processor(copy)
