"""`vla-foundry data action-tokenizer --config_path FILE`: train a FAST tokenizer on the actions of a config."""

import os
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from vla_foundry.config.command_line import parse_command
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.data.loader import create_dataloader
from vla_foundry.params.commands.runs import ActionTokenizerParams
from vla_foundry.params.data.robotics import RoboticsDataParams
from vla_foundry.params.models.action_heads import DiscreteBinsParams, FastTokensParams
from vla_foundry.params.models.policy import RobotPolicyParams, check_chunk_lengths, describe_normalization
from vla_foundry.robotics.action_tokens import FastTokenizer
from vla_foundry.storage.uri import write_text
from vla_foundry.world import World

# windows that are read at once
_BATCH_SIZE = 256
# any limits do: the head that they belong to is not made
_WIDE_LIMITS = (-1e6, 1e6)


def main(argv: list[str]) -> None:
    """Run `vla-foundry data action-tokenizer`.

    Raises:
        ValueError: an error that the user can fix.
        FileNotFoundError: a file that the config names does not exist.
        IsADirectoryError: the output is a folder.
    """
    params = parse_command(ActionTokenizerParams, argv, prog="vla-foundry data action-tokenizer")
    if os.path.isdir(params.output):
        raise IsADirectoryError(f"output {params.output} is a folder. Name a file.")
    chunks, main = read_chunks(params)
    tokenizer = FastTokenizer.train(
        chunks,
        vocab_size=params.vocab_size,
        scale=params.scale,
        fields=main.action_fields,
        normalization=describe_normalization(main.normalization),
    )
    write_text(params.output, tokenizer.to_json())
    sys.stdout.write(f"{params.output}: {describe_tokenizer(tokenizer, chunks)}\n")


def describe_tokenizer(tokenizer: FastTokenizer, chunks: Float[np.ndarray, "N T A"]) -> str:
    """Return how well a tokenizer compresses chunks, in one line."""
    tokens = tokenizer.encode(chunks)
    decoded = np.stack([tokenizer.decode(ids) for ids in tokens])
    error = float(np.sqrt(np.square(decoded - chunks).mean()))
    mean, most = np.mean([len(ids) for ids in tokens]), max(len(ids) for ids in tokens)
    _, num_steps, width = chunks.shape
    return (
        f"{len(tokenizer.lengths)} tokens, {tokenizer.num_coefficients} of them single coefficients; a chunk of "
        f"{num_steps} x {width} = {num_steps * width} values takes {mean:.1f} tokens on average and at most {most} "
        f"(x {num_steps * width / mean:.1f} fewer), with a root mean square error of {error:.4f} in normalized units "
        f"({len(chunks):,} chunks)"
    )


def read_chunks(params: ActionTokenizerParams) -> tuple[Float[np.ndarray, "N T A"], RoboticsDataParams]:
    """Return normalised chunks of the steps to predict, as training gets them, and the params of the main robot.

    Chunks that reach past the end of an episode are left out.

    Raises:
        ValueError: the data is not of robots, has no such chunk, or cannot be read.
    """
    given = _without_tokenizer(params)
    resolved = resolve(given, read_facts(given, 1))
    data = resolved.data
    robots = check_chunk_lengths(data)
    if not robots:
        raise ValueError(f"data.type '{data.type}' has no actions. Use a config with data.type robotics.")
    chunks: list[np.ndarray] = []
    for robot in robots.values():
        # actions alone: no images, no text
        order = [name for name in robot.stage_order or robot.default_stages() if name != "choose_instruction"]
        part = replace(
            robot, camera_names=[], depth_cameras={}, image_size=1, use_language=False, stage_order=order, num_workers=0
        )
        loader = create_dataloader(part, World(), per_gpu_batch_size=_BATCH_SIZE, seed=resolved.hparams.seed)
        found, wanted = 0, min(params.num_samples, loader.num_samples)
        with closing(loader):
            for batch in loader.microbatches(0):
                future = batch["future_mask"].numpy()[:, robot.window.past :]
                whole = batch["actions"].numpy()[:, robot.window.past :][future.all(axis=1)]
                chunks.append(whole)
                found += len(future)
                if found >= wanted:
                    break
    joined = np.concatenate(chunks)
    if not len(joined):
        raise ValueError(
            "data.lowdim_future_timesteps reaches past the end of every episode, so that there is no whole chunk. "
            "Lower it."
        )
    main = data.main()
    assert isinstance(main, RoboticsDataParams), "checked above"
    return joined, main


def _without_tokenizer(params: ActionTokenizerParams) -> ActionTokenizerParams:
    """Return the params with another head in place of one whose tokenizer is yet to be made."""
    model = params.model
    if not isinstance(model, RobotPolicyParams):
        raise ValueError(f"model.type '{model.type}' is not a policy. Give the config of one.")
    if isinstance(model.action_head, FastTokensParams):
        model = replace(model, action_head=DiscreteBinsParams(limits=_WIDE_LIMITS))
    return replace(params, model=replace(model, action_tokens=None, insulate_backbone=False))
