"""Read the `meta` folder of a LeRobot dataset (versions 2.0, 2.1 and 3.0): features, tasks, places of episodes.

Version 2 has one file of rows and one video per episode, and tables in JSON lines. Version 3 puts many episodes into
one file; its parquet tables say where each begins. Both identify an episode by its `episode_index`; the order of the
tables does not matter.
"""

import itertools
import math
import posixpath
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vla_foundry.parsing import parse_object
from vla_foundry.preprocessing.robotics.converters.lerobot_files import read_columns, read_schema
from vla_foundry.shards import MAX_COUNT
from vla_foundry.storage.uri import exists, join_uri, list_visible, read_object, read_text

_VERSIONS = {"2.0": 2, "2.1": 2, "3.0": 3}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# what follows the colon in {episode_index:06d}
_PATH_FORMAT = re.compile(r"0?[0-9]{0,2}d?")
_MAX_FPS = 1_000_000
_CAMERA_TYPES = ("image", "video")
_NUM_CHANNELS = (1, 3, 4)
# features that say where a row belongs; those named next.* say how an episode ended
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index", "subtask_index")
_NUMBER_TYPES = (
    *(f"float{bits}" for bits in (16, 32, 64)),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "bool",
)


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One entry of `features` in info.json."""

    # float32, int64, bool, string, image, video, ...
    dtype: str
    shape: tuple[int, ...]
    # name of each number (joints); () if unknown
    names: tuple[str, ...] = ()
    # a video that holds depth
    is_depth_video: bool = False
    # images: the names list the width before the height
    is_width_first: bool = False

    @property
    def is_camera(self) -> bool:
        """True for images and videos."""
        return self.dtype in _CAMERA_TYPES

    @property
    def is_number(self) -> bool:
        """True for numbers and switches."""
        return self.dtype in _NUMBER_TYPES

    @property
    def width(self) -> int:
        """Numbers per row."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(W, H) of an image, in each reading of the shape: channels last or first.

        LeRobot writes both, names the dimensions in many ways, and never compares them with the images.
        """
        first, second, third = self.shape
        sizes = [(second, first)] if third in _NUM_CHANNELS or first not in _NUM_CHANNELS else []
        sizes += [(third, second)] if first in _NUM_CHANNELS else []
        return [(height, width) for width, height in sizes] if self.is_width_first else sizes


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of info.json, and the tasks."""

    # the dataset's folder
    root: str
    # 2 or 3
    major: int
    # frames per second
    fps: float
    features: dict[str, Feature]
    # number of episodes
    total_episodes: int
    # path templates
    data_path: str
    # "": none
    video_path: str
    # episodes per folder, in version 2
    chunks_size: int
    # task_index -> text
    tasks: dict[int, str] = field(default_factory=dict)

    def uri(self, template: str, **values: Any) -> str:
        """Fill in a template of a path within the dataset.

        Raises:
            ValueError: the template has other keys than LeRobot's, or leads out of the dataset.
        """
        try:
            for _, name, form, _ in string.Formatter().parse(template):
                # a width of ten digits would fill the memory
                if name is not None and not (name.isidentifier() and _PATH_FORMAT.fullmatch(form or "")):
                    raise ValueError(f"{{{name}:{form}}} is not a number's name and width, as {{episode_index:06d}}")
            path = template.format(**values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.root}/meta/info.json has the path '{template}', which cannot be filled in ({error})."
            ) from None
        if posixpath.normpath(path).startswith(("..", "/")):
            raise ValueError(f"{self.root}/meta/info.json has the path '{template}', which leads out of the dataset.")
        return join_uri(self.root, path)

    @property
    def cameras(self) -> list[str]:
        """Features that are images or videos."""
        return [name for name, feature in self.features.items() if feature.is_camera]

    @property
    def signals(self) -> list[str]:
        """Numeric features without bookkeeping."""
        return [
            name
            for name, feature in self.features.items()
            if feature.is_number and name not in _BOOKKEEPING and not name.startswith("next.")
        ]


@dataclass(frozen=True, kw_only=True)
class VideoSpan:
    """The place of an episode in a video file."""

    uri: str
    # seconds
    start: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EpisodeEntry:
    """The place of an episode; sent to the process that reads it."""

    root: str
    index: int
    # rows
    length: int
    # texts of its tasks
    tasks: tuple[str, ...]
    # file of its rows
    data_uri: str
    # `index` of its first row; None: not in the tables
    first_row: int | None
    # camera -> its video
    videos: dict[str, VideoSpan]


def read_info(root: str) -> DatasetInfo:
    """Read meta/info.json.

    Raises:
        ValueError: it or the table of tasks is missing, broken, or of an unknown version.
    """
    uri = join_uri(root, "meta", "info.json")
    try:
        values = read_object(uri)
    except FileNotFoundError:
        hint = ""
        if _HUB_NAME.fullmatch(root) and not exists(root):
            hint = f" The dataset of this name on the Hugging Face hub is hf://datasets/{root}."
        raise ValueError(f"{root} is not a LeRobot dataset: it has no meta/info.json.{hint}") from None
    version = str(values.get("codebase_version")).removeprefix("v")
    if version not in _VERSIONS:
        raise ValueError(
            f"{uri}: codebase_version '{values.get('codebase_version')}' cannot be read, only {', '.join(_VERSIONS)}. "
            "Convert the dataset with the lerobot library."
        )
    try:
        info = DatasetInfo(
            root=root,
            major=_VERSIONS[version],
            fps=_fps_of(values["fps"]),
            features={name: _parse_feature(name, value) for name, value in values["features"].items()},
            total_episodes=_count_of(values["total_episodes"], "total_episodes", 0),
            data_path=_text_of(values["data_path"], "data_path"),
            video_path=_text_of(values.get("video_path") or "", "video_path"),
            chunks_size=_count_of(values.get("chunks_size") or 1000, "chunks_size"),
        )
    except KeyError as error:
        raise ValueError(f"{uri} lacks the key {error}.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{uri} is not as LeRobot writes it ({error}).") from None
    for name, feature in info.features.items():
        if feature.is_camera and (len(feature.shape) != 3 or min(feature.shape) < 1):
            raise ValueError(f"{uri}: camera '{name}' must have a shape of three sizes, got {list(feature.shape)}.")
    return replace(info, tasks=_read_tasks(info))


def _fps_of(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= _MAX_FPS:
        raise ValueError(f"fps must be a number above 0, and at most {_MAX_FPS:,}, got {value!r}")
    return float(value)


def _count_of(value: Any, key: str, least: int = 1) -> int:
    number = whole_number(value)
    if number is None or not least <= number <= MAX_COUNT:
        raise ValueError(f"{key} must be a whole number from {least} to 2^48, got {value!r}")
    return number


def _text_of(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {value!r}")
    return value


def _parse_feature(feature: str, value: dict[str, Any]) -> Feature:
    details = value.get("info") or value.get("video_info") or {}
    shape = tuple(_count_of(size, f"features.{feature}.shape", 0) for size in value["shape"])
    names = _column_names(value.get("names"))
    return Feature(
        dtype=str(value["dtype"]),
        shape=shape,
        names=tuple(names) if len(names) == math.prod(shape) else (),
        is_width_first=[name[:1].lower() for name in names if name[:1].lower() in ("w", "h")] == ["w", "h"],
        is_depth_video=bool(details.get("video.is_depth_map")),
    )


def _column_names(names: Any) -> list[str]:
    """Flatten the names of a feature: a list, {group: list}, {name: column}, or these within each other."""
    if isinstance(names, str):
        return [names]
    if not isinstance(names, Mapping):
        return [name for part in names for name in _column_names(part)] if isinstance(names, list) else []
    if all(isinstance(column, int | float) for column in names.values()):
        return [str(name) for name in sorted(names, key=lambda name: names[name])]
    pairs = [(group, name) for group, part in names.items() for name in _column_names(part)]
    is_unique = len({name for _, name in pairs}) == len(pairs)
    return [name if is_unique else f"{group}.{name}" for group, name in pairs]


def _read_tasks(info: DatasetInfo) -> dict[int, str]:
    """Read the texts of the tasks: {task_index: text}."""
    if info.major == 2:
        uri = join_uri(info.root, "meta", "tasks.jsonl")
        rows = [(uri, number, row.get("task_index"), row.get("task")) for number, row in _json_lines(uri)]
    else:
        uri = join_uri(info.root, "meta", "tasks.parquet")
        table = read_columns(uri)
        column = _text_column(uri, table)
        if "task_index" not in table or column is None:
            raise ValueError(f"{uri} must have the column task_index and one of texts, got {', '.join(table)}.")
        pairs = zip(table["task_index"], table[column], strict=True)
        rows = [(uri, number, index, text) for number, (index, text) in enumerate(pairs)]
    tasks: dict[int, str] = {}
    for where, number, value, text in rows:
        index = whole_number(value)
        if index is None or not isinstance(text, str):
            raise ValueError(
                f"{where} row {number}: a task needs task_index (a number) and text, got {value!r}, {text!r}."
            )
        if tasks.setdefault(index, text) != text:
            raise ValueError(f"{where} row {number}: task_index {index} is given twice.")
    return tasks


def _text_column(uri: str, table: Mapping[str, list[Any]]) -> str | None:
    """Return the column of a version 3 task table that holds the texts: as in LeRobot the index of pandas, if it
    holds texts; else `task`; else the first with texts."""
    pandas = parse_object((read_schema(uri).metadata or {}).get(b"pandas", b"{}"), f"{uri}: its pandas metadata")
    texts = [name for name, values in table.items() if all(isinstance(value, str) for value in values)]
    return next((name for name in [*pandas.get("index_columns", ()), "task", *texts] if name in texts), None)


def whole_number(value: Any) -> int | None:
    """Return a whole number, which tables may hold as a float; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and math.isfinite(value) and value == int(value) else None


def list_episodes(info: DatasetInfo) -> list[EpisodeEntry]:
    """List all episodes by their index.

    Raises:
        ValueError: a table is missing, broken, or contradicts itself or info.json.
    """
    entries = sorted(_entries_of_v2(info) if info.major == 2 else _entries_of_v3(info), key=lambda entry: entry.index)
    where = f"{info.root}/meta/episodes" + (".jsonl" if info.major == 2 else "")
    for entry, following in itertools.pairwise(entries):
        if entry.index == following.index:
            raise ValueError(f"{where}: episode_index {entry.index} appears twice.")
    if len(entries) != info.total_episodes:
        raise ValueError(
            f"{where} holds {len(entries)} episodes, but info.json says total_episodes {info.total_episodes}."
        )
    return entries


def _entries_of_v2(info: DatasetInfo) -> Iterator[EpisodeEntry]:
    uri = join_uri(info.root, "meta", "episodes.jsonl")
    for number, row in _json_lines(uri):
        index, length, tasks = whole_number(row.get("episode_index")), whole_number(row.get("length")), row.get("tasks")
        tasks = [tasks] if isinstance(tasks, str) else tasks or []
        if index is None or length is None or not isinstance(tasks, list):
            raise ValueError(
                f"{uri} line {number + 1}: an episode needs episode_index, length (numbers) and tasks (a list)."
            )
        values = {"episode_chunk": index // info.chunks_size, "episode_index": index}
        videos = {}
        for camera in info.cameras:
            if info.features[camera].dtype == "video":
                videos[camera] = VideoSpan(uri=info.uri(info.video_path, video_key=camera, **values))
        yield EpisodeEntry(
            root=info.root,
            index=index,
            length=length,
            tasks=tuple(str(task) for task in tasks),
            data_uri=info.uri(info.data_path, **values),
            first_row=None,
            videos=videos,
        )


def _json_lines(uri: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = read_text(uri).split("\n")  # JSON strings may hold other line separators
    except FileNotFoundError:
        raise ValueError(f"{uri} is missing.") from None
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        yield number, parse_object(line, f"{uri} line {number + 1}")


def _entries_of_v3(info: DatasetInfo) -> Iterator[EpisodeEntry]:
    folder = join_uri(info.root, "meta", "episodes")
    video_cameras = [camera for camera in info.cameras if info.features[camera].dtype == "video"]
    spans = ["chunk_index", "file_index", "from_timestamp", "to_timestamp"]
    columns = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    columns += ["dataset_from_index", "dataset_to_index"]
    columns += [f"videos/{camera}/{name}" for camera in video_cameras for name in spans]
    try:
        uris = [uri for uri in list_visible(folder) if uri.endswith(".parquet")]
    except FileNotFoundError:
        uris = []
    if not uris:
        raise ValueError(f"{folder} holds no table of episodes (chunk-000/file-000.parquet).")
    for uri in uris:
        table = read_columns(uri, columns)
        for number in range(len(table["episode_index"])):
            yield _entry_of_row(
                info, {name: table[name][number] for name in columns}, f"{uri} row {number}", video_cameras
            )


def _entry_of_row(info: DatasetInfo, row: dict[str, Any], where: str, video_cameras: list[str]) -> EpisodeEntry:
    missing = next((name for name, value in row.items() if value is None), None)
    if missing is not None:
        raise ValueError(f"{where}: '{missing}' is null.")
    for name, value in row.items():
        if name != "tasks" and not name.endswith("_timestamp"):
            row[name] = whole_number(value)
            if row[name] is None:
                raise ValueError(f"{where}: '{name}' must be a whole number, got {value!r}.")
    length, first, end = row["length"], row["dataset_from_index"], row["dataset_to_index"]
    if end - first != length:
        raise ValueError(
            f"{where}: episode {row['episode_index']} has length {length}, but dataset_from_index {first} and "
            f"dataset_to_index {end}."
        )
    videos = {}
    for camera in video_cameras:
        chunk, file, start, stop = (
            row[f"videos/{camera}/{name}"] for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        )
        if not (start >= 0 and abs((stop - start) * info.fps - length) <= 1):
            raise ValueError(
                f"{where}: episode {row['episode_index']} has length {length} ({length / info.fps:g} s), but its video "
                f"of '{camera}' goes from_timestamp {start:g} to_timestamp {stop:g}."
            )
        uri = info.uri(info.video_path, video_key=camera, chunk_index=chunk, file_index=file)
        videos[camera] = VideoSpan(uri=uri, start=float(start))
    return EpisodeEntry(
        root=info.root,
        index=row["episode_index"],
        length=length,
        tasks=tuple(row["tasks"]),
        data_uri=info.uri(info.data_path, chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]),
        first_row=first,
        videos=videos,
    )
