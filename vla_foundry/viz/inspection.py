"""`vla-foundry data inspect DIR | --training RUN`: draw a sample exactly as training sees it.

Robot data goes through the training loader: the figure shows what a model is trained on. A sample of text or of images
with captions is shown as its shard stores it.
"""

import io
import json
import os
import sys
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate, islice

from vla_foundry.config.command_line import CONFIG_FLAG, parse_command
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.data.loader import create_dataloader
from vla_foundry.data.pipelines.robotics import ChooseInstruction, RoboticsPipeline
from vla_foundry.data.pipelines.stages import read_record
from vla_foundry.data.reader import SampleShard, TokenShard
from vla_foundry.data.robotics import read_specs
from vla_foundry.params.commands.runs import InspectConfigParams, InspectParams
from vla_foundry.params.data.robotics import NormalizationParams, RoboticsDataParams
from vla_foundry.params.experiment import load_experiment_params_from_yaml
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.spec import DatasetSpec, read_spec
from vla_foundry.run_folder import CONFIG_NAME, STATISTICS_NAME
from vla_foundry.storage.uri import exists, join_uri, parent_uri
from vla_foundry.viz.data_report import format_report, measure
from vla_foundry.viz.episodes import find_manifest, open_shards
from vla_foundry.viz.robot_sample import RobotSample, take_sample
from vla_foundry.viz.sample_figure import draw_sample
from vla_foundry.world import World

_USAGE = """usage: vla-foundry data inspect DIR | --training RUN [--sample N] [--output FILE.png]
       vla-foundry data inspect --config_path FILE [--num_samples N] [--output SHEET.png] [--json true] [flags of train]
       vla-foundry data explore DIR [--port N]
       vla-foundry data action-tokenizer --config_path FILE [--output FILE.json] [flags of train]
       vla-foundry data download SOURCE ... --output FOLDER
"""
# smallest side of a figure's images, in pixels
_LEAST_SIDE = 64
# longest text shown, in characters
_MOST_TEXT = 1500
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def main(argv: list[str]) -> None:
    """Run `vla-foundry data`.

    Args:
        argv: `inspect`, then its flags.

    Raises:
        ValueError: an error that the user can fix.
        FileNotFoundError: a dataset or a config does not exist.
    """
    what = argv[0] if argv else "--help"
    if what in ("--help", "-h"):
        sys.stdout.write(_USAGE)
        return
    if what == "explore":
        from vla_foundry.viz import explorer

        explorer.main(argv[1:])
        return
    if what == "action-tokenizer":
        from vla_foundry.data import action_tokenizer

        action_tokenizer.main(argv[1:])
        return
    if what == "download":
        from vla_foundry.preprocessing import download

        download.main(argv[1:])
        return
    if what != "inspect":
        raise ValueError(unknown_name_message("data", what, ["download", "inspect", "explore", "action-tokenizer"]))
    prog = "vla-foundry data inspect"
    if any(word.partition("=")[0] == f"--{CONFIG_FLAG}" for word in argv):
        for line in inspect_config(parse_command(InspectConfigParams, argv[1:], prog=prog)):
            sys.stdout.write(f"{line}\n")
        return
    params = parse_command(InspectParams, argv[1:], prog=prog, positional=("dataset",))
    for line in inspect_data(params):
        sys.stdout.write(f"{line}\n")


def inspect_config(params: InspectConfigParams) -> list[str]:
    """Measure the data of a training config and return the report, line by line.

    Raises:
        ValueError: the config does not fit the data, or the data cannot be read.
        FileNotFoundError: a file that the config names does not exist.
    """
    report = measure(resolve(params, read_facts(params, 1)))
    return [json.dumps(report, indent=2)] if params.json else format_report(report)


def inspect_data(params: InspectParams) -> list[str]:
    """Draw a sample and return its description, line by line.

    Raises:
        ValueError: the sample does not exist, or the data cannot be read.
        FileNotFoundError: a dataset or a config does not exist.
    """
    if params.training is not None:
        sample = read_training_sample(params.training, params.sample)
    else:
        assert params.dataset is not None, "InspectParams wants either"
        manifest = find_manifest(params.dataset)
        spec = _read_spec(manifest)
        if spec is None:
            return show_stored_sample(manifest, params.sample, params.output)
        sample = read_dataset_sample(manifest, spec, params.sample)
    draw_sample(sample, params.output)
    dropped = [
        f"note: sample {params.sample} cannot be used ({reason}); training replaces it by this one"
        for reason in sample.dropped
    ]
    return [
        *dropped,
        f"episode {sample.episode_id}, frame {sample.anchor}, of {sample.shard}",
        f"instruction: {sample.instruction or '(none)'}",
        *(
            f"{field.name}: {', '.join(field.description.names)}"
            for field in [*sample.actions, *sample.proprioception]
            if field.description is not None and field.description.names
        ),
        f"{params.output}: {len(sample.images)} images, {len(sample.past_mask)} steps, "
        f"{len(sample.actions)} action and {len(sample.proprioception)} proprioception fields",
    ]


def _read_spec(manifest: str) -> DatasetSpec | None:
    try:
        return read_spec(manifest)
    except FileNotFoundError:
        return None


def read_training_sample(training: str, number: int) -> RobotSample:
    """Read a training sample of a run.

    Args:
        training: run folder or training config.
        number: index in training order.

    Raises:
        ValueError: the run is not trained on robot data, or its config does not fit the data.
        FileNotFoundError: the config, or a file that it names, does not exist.
    """
    path = join_uri(training, CONFIG_NAME) if os.path.isdir(training) else training
    params = load_experiment_params_from_yaml(path)
    params = resolve(params, read_facts(params, 1))
    data = params.data
    if not isinstance(data, RoboticsDataParams):
        raise ValueError(f"{path} trains on data.type {data.type}. Give the dataset itself: data inspect FOLDER.")
    pipeline = RoboticsPipeline(replace(data, num_workers=0))
    pipeline.stages = pipeline.stages.with_params(data)
    seed = params.hparams.seed if data.seed is None else data.seed
    return _read_sample(pipeline, number, seed=seed, global_batch_size=params.hparams.global_batch_size)


def read_dataset_sample(manifest: str, spec: DatasetSpec, number: int) -> RobotSample:
    """Read a sample of a dataset: all colour cameras and fields, images as stored, no augmentation.

    Args:
        manifest: manifest of the dataset.
        spec: spec of the dataset.
        number: index in the order of the manifest.

    Raises:
        ValueError: the sample does not exist, or the data cannot be read.
    """
    cameras = {name: camera for name, camera in spec.cameras.items() if not camera.is_depth}
    side = max((max(camera.size) for camera in cameras.values()), default=_LEAST_SIDE)
    has_statistics = exists(join_uri(parent_uri(manifest), STATISTICS_NAME))
    actions = [name for name, field in spec.fields.items() if field.role == "action"]
    params = RoboticsDataParams(
        dataset_manifest=[manifest],
        camera_names=list(cameras),
        # a dataset that does not name its actions: draw all fields over time
        action_fields=actions or list(spec.fields),
        proprioception_fields=[name for name in spec.fields if actions and name not in actions],
        image_size=max(side, _LEAST_SIDE),
        image_resizing_method="resize_fit",
        use_language=False,
        language_instruction_types=list(spec.language_types),
        normalization=NormalizationParams(enabled=has_statistics),
        shuffle=False,
        num_workers=0,
    )
    pipeline = RoboticsPipeline(params)
    # without a text processor, but the instruction is drawn as for one
    pipeline.stages = (ChooseInstruction(pipeline.params), *pipeline.stages)
    return _read_sample(pipeline, number, seed=0, global_batch_size=1)


def _read_sample(pipeline: RoboticsPipeline, number: int, *, seed: int, global_batch_size: int) -> RobotSample:
    loader = create_dataloader(
        pipeline.params,
        World(),
        global_batch_size=global_batch_size,
        per_gpu_batch_size=1,
        seed=seed,
        pipeline=pipeline,
    )
    try:
        if number >= loader.num_samples:
            raise ValueError(f"sample ({number}) must be below {loader.num_samples}, the number of samples.")
        batches = loader.microbatches(number // global_batch_size)
        batch = next(islice(batches, number % global_batch_size, None))
    finally:
        loader.close()
    fields = {
        name: field for _, spec in read_specs(pipeline.params.dataset_manifest) for name, field in spec.fields.items()
    }
    return take_sample(batch, 0, pipeline, fields)


def show_stored_sample(manifest: str, number: int, output: str) -> list[str]:
    """Return the content of a stored sample, line by line; write its first image to `output`.

    Args:
        manifest: manifest of the dataset.
        number: index in the order of the manifest.
        output: PNG to write.

    Raises:
        ValueError: the sample does not exist, or its shard is broken.
    """
    reader, entries = open_shards(manifest)
    ends = list(accumulate(entry.num_sequences for entry in entries))
    if number >= ends[-1]:
        raise ValueError(f"sample ({number}) must be below {ends[-1]}, the number of samples.")
    place = bisect_right(ends, number)
    row = number - (ends[place - 1] if place else 0)
    shard = reader.open(0, place)
    if isinstance(shard, TokenShard):
        return [f"record {row} of {shard.uri}", *_describe_record(shard, row, parent_uri(manifest))]
    if not isinstance(shard, SampleShard):
        raise ValueError(f"{shard.uri} holds robot episodes, but {manifest} has no robotics.json beside it.")
    return [f"sample {shard.key(row)} of {shard.uri}", *_describe_members(shard.read(row), output)]


def _describe_record(shard: TokenShard, row: int, folder: str) -> list[str]:
    record = read_record(shard, row)
    ids = record["input_ids"].tolist()
    ends = record["document_ends"].tolist()
    lines = [f"{len(ids)} tokens, {len(ends)} documents that end at {ends[:8]}"]
    tokenizer = join_uri(folder, "tokenizer")
    if not os.path.isdir(tokenizer):
        return [*lines, f"tokens: {ids[:64]} ..."]
    from vla_foundry.text.tokenizers import load_tokenizer

    return [*lines, _shorten(str(load_tokenizer(tokenizer).decode(ids[: ends[-1]])))]


def _describe_members(members: dict[str, bytes], output: str) -> list[str]:
    lines, images = [], [suffix for suffix in members if suffix.rpartition(".")[2] in _IMAGE_SUFFIXES]
    for suffix, content in members.items():
        if suffix in images or b"\0" in content:
            lines.append(f"{suffix}: {len(content):,} bytes")
        else:
            lines.append(f"{suffix}: {_shorten(content.decode('utf-8', 'replace'))}")
    if images:
        from PIL import Image

        with Image.open(io.BytesIO(members[images[0]])) as image:
            image.convert("RGB").save(output, "PNG")
        lines.append(f"{output}: {images[0]}")
    return lines


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} ..."
