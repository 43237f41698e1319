"""`vla-foundry view WHAT`: write episodes, training batches or rollouts as a recording for the rerun viewer."""

import os
import shlex
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.config.command_line import parse_command
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.data.pipelines.stages import RECORDING
from vla_foundry.params.commands.runs import ViewParams
from vla_foundry.params.experiment import load_experiment_params_from_yaml
from vla_foundry.run_folder import CONFIG_NAME
from vla_foundry.shards import MANIFEST_NAME
from vla_foundry.storage.local import replace_file
from vla_foundry.storage.uri import exists, is_remote, join_uri
from vla_foundry.text.tokenizers import load_tokenizer
from vla_foundry.viz.data_report import read_batches, read_pictures
from vla_foundry.viz.episodes import StoredEpisode, StoredEpisodes

if TYPE_CHECKING:
    from rerun import RecordingStream

_APPLICATION = "vla-foundry"
_VIDEOS = (".mp4", ".webm")
# more episodes are counted, not named
_MOST_NAMES = 10
# values of a batch that are drawn over the steps of a window: (steps, columns) for each sample
_STEPPED = ("actions", "proprioception")
_MASKS = ("past_mask", "future_mask", "is_padding")


def main(argv: list[str]) -> None:
    """Run `vla-foundry view`.

    Raises:
        ValueError: rerun is not installed, or there is nothing to see.
        FileNotFoundError: what to view does not exist.
    """
    params = parse_command(ViewParams, argv, prog="vla-foundry view", positional=("what",))
    sys.stdout.write(f"{write_recording(params)}\n")


def write_recording(params: ViewParams) -> str:
    """Write the recording, and return what was written and how to see it.

    Raises:
        ValueError: rerun is not installed, there is nothing to see, or the disk is full.
        FileNotFoundError: what to view does not exist.
    """
    try:
        import rerun
    except ImportError:
        raise ValueError("view needs rerun, which is not installed: uv pip install 'vla-foundry[viewer]'.") from None
    log = _choose(params.what)
    stream = rerun.RecordingStream(_APPLICATION, recording_id=os.path.basename(params.what.rstrip("/")) or "view")
    with replace_file(params.output) as temporary:
        # rerun's own error would not say what is wrong
        open(temporary, "wb").close()
        stream.save(temporary)
        found = log(stream, params)
        try:
            stream.flush()
        except RuntimeError as error:
            raise ValueError(f"{params.output} cannot be written; is the disk full? rerun says: {error}") from None
        stream.disconnect()
        if not found:
            raise ValueError(f"{params.what} has nothing from number {params.first} on. Give a smaller --first.")
    return f"{params.output}: {found}; see it with: rerun {shlex.quote(params.output)}"


def _choose(what: str) -> "Callable[[RecordingStream, ViewParams], str]":
    """Return what writes a recording of a dataset, a training config or a folder of rollouts."""
    if exists(join_uri(what, MANIFEST_NAME)) or what.endswith(".jsonl"):
        return _log_episodes
    if what.endswith((".yaml", ".yml")) or exists(join_uri(what, CONFIG_NAME)):
        return _log_batches
    if not is_remote(what) and not os.path.exists(what):
        raise FileNotFoundError(f"{what} does not exist. Name a dataset, a training config, a run or rollouts.")
    return _log_rollouts


def _log_episodes(stream: "RecordingStream", params: ViewParams) -> str:
    episodes = StoredEpisodes(params.what)
    names = []
    for episode in islice(episodes, params.first, params.first + params.count):
        names.append(episode.info.episode_id)
        _log_episode(stream, episode, list(episodes.spec.fields))
    if len(names) > _MOST_NAMES:
        return f"{len(names):,} episodes"
    return f"episodes {', '.join(names)}" if names else ""


def _log_episode(stream: "RecordingStream", episode: StoredEpisode, fields: list[str]) -> None:
    import rerun

    info = episode.info
    root = rerun.escape_entity_path_part(info.episode_id)
    frames = np.arange(info.num_frames)
    indexes = [
        rerun.TimeColumn("frame", sequence=frames),
        rerun.TimeColumn("time", duration=frames / info.fps),
    ]
    for camera, about in info.cameras.items():
        files = [episode.read_frame(camera, int(frame)) for frame in frames]
        if None in files:
            continue
        is_depth = about.extension == "png"
        kind: Any = rerun.EncodedDepthImage if is_depth else rerun.EncodedImage
        # depth is stored in millimetres
        more = {"meter": np.full(len(files), 1000.0)} if is_depth else {}
        media = [f"image/{'png' if is_depth else 'jpeg'}"] * len(files)
        stream.send_columns(
            f"{root}/cameras/{rerun.escape_entity_path_part(camera)}",
            indexes,
            kind.columns(blob=files, media_type=media, **more),
        )
    for name, values in episode.read_fields(fields).items():
        place = f"{root}/fields/{rerun.escape_entity_path_part(name)}"
        stream.send_columns(place, indexes, rerun.Scalars.columns(scalars=values))
    stream.log(f"{root}/instruction", rerun.TextDocument(episode.instruction), static=True)


def _log_batches(stream: "RecordingStream", params: ViewParams) -> str:
    import rerun

    what = params.what
    path = what if what.endswith((".yaml", ".yml")) else join_uri(what, CONFIG_NAME)
    config = load_experiment_params_from_yaml(path)
    config = resolve(config, read_facts(config, 1))
    name = getattr(config.data, "tokenizer", None)
    tokenizer = load_tokenizer(name) if isinstance(name, str) else None
    # the order is a function: nothing before the global batch of the first sample is read
    first_batch = params.first // config.hparams.global_batch_size
    number = first_batch * config.hparams.global_batch_size
    end = params.first + params.count
    for dataset, batch in read_batches(config, end - number, first_global_batch=first_batch):
        samples = RECORDING.samples or [{"input_ids": row} for row in batch["input_ids"]]
        for row, sample in enumerate(samples):
            if params.first <= number < end:
                stream.set_time("sample", sequence=number)
                pictures, text = read_pictures(sample)
                if not text and "input_ids" in sample and tokenizer is not None:
                    text = str(tokenizer.decode(sample["input_ids"].tolist()))
                stream.log(f"{dataset}/text", rerun.TextDocument(text))
                for place, picture in enumerate(pictures):
                    stream.log(f"{dataset}/images/{place}", rerun.Image(picture))
                _log_steps(stream, dataset, batch, row)
            number += 1
    seen = min(number, end) - params.first
    return f"{seen} samples as training reads them" if seen > 0 else ""


def _log_steps(stream: "RecordingStream", name: str, batch: dict[str, Any], row: int) -> None:
    """Log a robot sample's window as a chart of each array, since its steps are no time of the recording."""
    import rerun

    for key in _STEPPED:
        if key in batch:
            for column, values in enumerate(np.asarray(batch[key][row]).T):
                stream.log(f"{name}/{key}/{column}", rerun.BarChart(values.astype(np.float32)))
    for key in _MASKS:
        if key in batch:
            stream.log(f"{name}/{key}", rerun.BarChart(np.asarray(batch[key][row]).astype(np.uint8)))


def _log_rollouts(stream: "RecordingStream", params: ViewParams) -> str:
    import rerun

    root = Path(params.what)
    videos = sorted(path for path in root.rglob("*") if path.suffix in _VIDEOS)
    if not videos:
        raise ValueError(
            f"{root} holds no dataset, no run and no video. Record videos with: vla-foundry evaluate --save_videos all"
        )
    chosen = videos[params.first : params.first + params.count]
    for path in chosen:
        video = rerun.AssetVideo(path=path)
        place = rerun.new_entity_path(list(path.relative_to(root).with_suffix("").parts))
        stream.log(place, video, static=True)
        times = video.read_frame_timestamps_nanos()
        stream.send_columns(
            place,
            [rerun.TimeColumn("time", duration=np.asarray(times) * 1e-9)],
            rerun.VideoFrameReference.columns_nanos(times),
        )
    return f"{len(chosen)} of {len(videos)} rollouts" if chosen else ""
