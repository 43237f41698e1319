"""`vla-foundry data inspect DIR | --training RUN`: draw a sample just as training gets it.

Robot data go through the training loader: what is drawn is what a model is trained on. Of text and of images with
captions, a dataset's sample is shown as it is stored.
"""

import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vla_foundry.config.command_line import parse_command
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.data.loader import create_dataloader
from vla_foundry.data.pipelines.robotics import ChooseInstruction, RoboticsPipeline
from vla_foundry.data.robotics.datasets import read_specs
from vla_foundry.params.commands.runs import InspectParams
from vla_foundry.params.data.robotics import NormalizationParams, RoboticsDataParams
from vla_foundry.params.experiment import load_experiment_params_from_yaml
from vla_foundry.registry import unknown_name_message
from vla_foundry.robotics.spec import DatasetSpec, read_spec
from vla_foundry.run_folder import CONFIG_NAME, STATISTICS_NAME
from vla_foundry.shards import MANIFEST_NAME
from vla_foundry.storage.uri import exists, is_remote, join_uri, parent_uri
from vla_foundry.viz.robot_sample import RobotSample, take_sample
from vla_foundry.viz.sample_figure import draw_sample
from vla_foundry.viz.stored_sample import show_stored_sample
from vla_foundry.world import World

_LEAST_SIDE = 64


def main(argv: list[str]) -> None:
    """Run `vla-foundry data`.

    Args:
        argv: `inspect`, then its flags.

    Raises:
        ValueError: what the user can fix.
        FileNotFoundError: a dataset or a config is not there.
    """
    what = argv[0] if argv else "--help"
    if what in ("--help", "-h"):
        sys.stdout.write("usage: vla-foundry data inspect DIR | --training RUN [--sample N] [--output FILE.png]\n")
        return
    if what != "inspect":
        raise ValueError(unknown_name_message("data", what, ["inspect"]))
    params = parse_command(InspectParams, argv[1:], prog="vla-foundry data inspect", positional=("dataset",))
    for line in inspect_data(params):
        sys.stdout.write(f"{line}\n")


def inspect_data(params: InspectParams) -> list[str]:
    """Draw a sample, and return what there is to say of it, line by line.

    Raises:
        ValueError: there is no such sample, or the data can not be read.
        FileNotFoundError: a dataset or a config is not there.
    """
    if params.training is not None:
        sample = read_training_sample(params.training, params.sample)
    else:
        assert params.dataset is not None, "InspectParams wants either"
        manifest = params.dataset
        if not manifest.endswith(".jsonl"):
            manifest = join_uri(manifest, MANIFEST_NAME)
        if not is_remote(manifest):
            manifest = os.path.abspath(os.path.expanduser(manifest))
        spec = _read_spec(manifest)
        if spec is None:
            return show_stored_sample(manifest, params.sample, params.output)
        sample = read_dataset_sample(manifest, spec, params.sample)
    draw_sample(sample, params.output)
    dropped = [
        f"note: sample {params.sample} can not be used ({reason}); this is the one that training takes in its place"
        for reason in sample.dropped
    ]
    return [
        *dropped,
        f"episode {sample.episode_id}, frame {sample.anchor}, of {sample.shard}",
        f"instruction: {sample.instruction or '(none)'}",
        f"{params.output}: {len(sample.images)} images, {len(sample.past_mask)} steps, "
        f"{len(sample.actions)} action and {len(sample.proprioception)} proprioception fields",
    ]


def _read_spec(manifest: str) -> DatasetSpec | None:
    if not exists(manifest):
        raise FileNotFoundError(f"{manifest} does not exist. Name a folder that `vla-foundry preprocess` made.")
    try:
        return read_spec(manifest)
    except FileNotFoundError:
        return None


def read_training_sample(training: str, number: int) -> RobotSample:
    """Read a sample of what a run is trained on.

    Args:
        training: folder of a run, or a training config.
        number: place in the order of training.

    Raises:
        ValueError: the run is not trained on robot data, or its config does not fit them.
        FileNotFoundError: the config, or what it names, is not there.
    """
    path = join_uri(training, CONFIG_NAME) if Path(os.path.expanduser(training)).is_dir() else training
    params = load_experiment_params_from_yaml(path)
    params = resolve(params, read_facts(params, 1))
    data = params.data
    if not isinstance(data, RoboticsDataParams):
        raise ValueError(f"{path} trains on data.type {data.type}. Give the dataset itself: data inspect FOLDER.")
    pipeline = RoboticsPipeline(replace(data, num_workers=0))
    seed = params.hparams.seed if data.seed is None else data.seed
    return _read_sample(pipeline, number, seed=seed, global_batch_size=params.hparams.global_batch_size)


def read_dataset_sample(manifest: str, spec: DatasetSpec, number: int) -> RobotSample:
    """Read a sample of a dataset: all its colour cameras and fields, images as stored, nothing changed at random.

    Args:
        manifest: of the dataset.
        spec: its spec.
        number: place in the order of the manifest.

    Raises:
        ValueError: there is no such sample, or the data can not be read.
    """
    cameras = {name: camera for name, camera in spec.cameras.items() if not camera.is_depth}
    side = max((max(camera.size) for camera in cameras.values()), default=_LEAST_SIDE)
    has_statistics = exists(join_uri(parent_uri(manifest), STATISTICS_NAME))
    actions = [name for name, field in spec.fields.items() if field.role == "action"]
    params = RoboticsDataParams(
        dataset_manifest=[manifest],
        camera_names=list(cameras),
        # of a dataset that does not say which are actions, all are drawn in full
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
    pipeline.make_inputs = (ChooseInstruction(pipeline.params), *pipeline.make_inputs)
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
            raise ValueError(f"sample ({number}) must be below {loader.num_samples}, the samples that there are.")
        batches = loader.microbatches(number // global_batch_size)
        batch = next(islice(batches, number % global_batch_size, None))
    finally:
        loader.close()
    fields = {
        name: field for _, spec in read_specs(pipeline.params.dataset_manifest) for name, field in spec.fields.items()
    }
    return take_sample(batch, 0, pipeline, fields)
