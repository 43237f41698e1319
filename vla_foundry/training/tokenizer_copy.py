"""Keep the tokenizer or the processor with the run, so that the run folder alone is enough to use the model."""

import os
import shutil
from pathlib import Path

from vla_foundry.params.data.base import DataParams
from vla_foundry.params.data.images import ImageProcessorParams
from vla_foundry.params.data.text import TextDataParams
from vla_foundry.run_folder import PROCESSOR_FOLDER, TOKENIZER_FOLDER
from vla_foundry.storage.uri import download, is_remote, join_uri, list_files, parent_uri


def copy_tokenizer(data: DataParams, run_folder: Path) -> None:
    """Copy data.tokenizer, or else the one beside the first manifest, to the run; nothing if there is none.

    Where data has images, its processor goes there instead, with its tokenizer.

    Raises:
        FileNotFoundError: data.tokenizer names a remote folder that is not there.
        ValueError: data.tokenizer or data.processor names what can not be loaded.
    """
    if isinstance(data, ImageProcessorParams):
        if data.tokenizer_name() is not None:
            _save_processor(data, run_folder / PROCESSOR_FOLDER)
        return
    target = run_folder / TOKENIZER_FOLDER
    if target.is_dir() or not isinstance(data, TextDataParams):
        return
    if data.tokenizer is None:
        beside = join_uri(parent_uri(data.dataset_manifest[0]), TOKENIZER_FOLDER)
        try:
            _copy_folder(beside, target)
        except FileNotFoundError:
            return
    elif is_remote(data.tokenizer) or os.path.isdir(data.tokenizer):
        _copy_folder(data.tokenizer, target)
    else:
        _save_named(data.tokenizer, target)


def _save_processor(data: ImageProcessorParams, target: Path) -> None:
    if target.is_dir():
        return
    from vla_foundry.data.pipelines.image_caption import create_image_processor

    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    create_image_processor(data).save(aside)
    aside.rename(target)


def _copy_folder(source: str, target: Path) -> None:
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for file in list_files(source):
        download(file, str(aside / file.removeprefix(source).lstrip("/")))
    aside.rename(target)


def _save_named(name: str, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name).save_pretrained(str(target))
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"data.tokenizer '{name}' can not be loaded: {reason}") from None
