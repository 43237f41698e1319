"""Write LeRobot datasets of version 3.0: a few parquet and mp4 files of many episodes, and tables that index them.

    data/chunk-000/file-000.parquet            rows of many episodes, a row group each; images as PNG unless videos
    videos/<camera>/chunk-000/file-000.mp4     frames of many episodes
    meta/info.json, stats.json, tasks.parquet  features, statistics, the text of each task_index
    meta/episodes/chunk-000/file-000.parquet   per episode: length, task, where its rows and frames lie, statistics

Columns, types and metadata match the lerobot library's own writer (0.4).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vla_foundry.preprocessing.robotics.lerobot_recording import (
    FRAMES,
    INDEX_COLUMNS,
    ColumnStatistics,
    EpisodePart,
    LeRobotFeatures,
    VideoJoiner,
    describe_video,
    merge_statistics,
    read_part,
    vector_array,
    vector_statistics,
)

_CHUNK_SIZE = 1000
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_DATA_PATH = f"data/{_FILE}.parquet"
_VIDEO_PATH = f"videos/{{video_key}}/{_FILE}.mp4"
_EPISODES_PATH = f"meta/episodes/{_FILE}.parquet"
_EPISODES_PER_FILE = 10_000
_EPISODES_PER_ROW_GROUP = 100
_MEGABYTE = 1 << 20


class LeRobotWriter:
    """Writes a dataset to a new folder, episode by episode; it is readable only after `finish`.

    Memory: one episode, and a table of up to 100. The same episodes in the same order give the same bytes.

    Args:
        folder: must not exist, or be empty.
        data_megabytes, video_megabytes: size of files; an episode that would exceed it starts the next file.
    """

    def __init__(
        self, folder: Path, features: LeRobotFeatures, *, data_megabytes: int = 100, video_megabytes: int = 200
    ) -> None:
        self._folder, self._features = folder, features
        self._megabytes = (data_megabytes, video_megabytes)
        self._data = _DataFiles(folder, _schema_of(features), data_megabytes * _MEGABYTE)
        self._videos = {
            name: _VideoFiles(folder, name, features.fps, video_megabytes * _MEGABYTE)
            for name in features.cameras
            if features.video
        }
        self._episodes = _EpisodeFiles(folder)
        self._statistics: dict[str, ColumnStatistics] = {}
        self._tasks: dict[str, int] = {}
        self._num_episodes = self._num_frames = 0

    def add_episode(self, part_folder: Path) -> None:
        """Append a recorded episode (see lerobot_recording).

        Raises:
            FileNotFoundError: the episode was not recorded.
            ValueError: it was recorded with other features.
        """
        part = read_part(part_folder)
        columns = self._columns_of(part)
        statistics = part.picture_statistics | {
            name: vector_statistics(values.reshape(part.length, -1))
            for name, values in columns.items()
            if isinstance(values, np.ndarray)
        }
        # in the order of the features
        statistics = {name: statistics[name] for name in _feature_names(self._features)}
        row: dict[str, Any] = {"episode_index": self._num_episodes, "tasks": [part.task], "length": part.length}
        row |= self._data.append(columns, part)
        row |= {"dataset_from_index": self._num_frames, "dataset_to_index": self._num_frames + part.length}
        for files in self._videos.values():
            row |= files.append(part)
        row |= {f"stats/{name}/{key}": value for name, of in statistics.items() for key, value in of.items()}
        self._episodes.append(row)
        for name, values in statistics.items():
            before = self._statistics.get(name)
            self._statistics[name] = values if before is None else merge_statistics(before, values)
        self._num_episodes += 1
        self._num_frames += part.length

    def finish(self) -> None:
        """Close all files and write the metadata.

        Raises:
            ValueError: no episode was added.
        """
        if not self._num_episodes:
            raise ValueError("a LeRobot dataset needs at least one episode.")
        self._data.close()
        for files in self._videos.values():
            files.close()
        self._episodes.close()
        meta = self._folder / "meta"
        _write_tasks(meta / "tasks.parquet", list(self._tasks))
        _write_json(meta / "stats.json", self._statistics)
        _write_json(meta / "info.json", self._describe())

    def _columns_of(self, part: EpisodePart) -> dict[str, Any]:
        """Return the episode's columns: arrays of numbers [L] or [L, C], and Arrow arrays of images."""
        from pyarrow import parquet

        features, length = self._features, part.length
        table = parquet.read_table(part.folder / FRAMES)
        stored = [*features.vectors, *(() if features.video else features.cameras)]
        if set(table.column_names) != set(stored) or set(part.picture_statistics) != set(features.cameras):
            raise ValueError(f"'{part.folder}' was recorded with other columns than {stored}. Record it again.")
        columns: dict[str, Any] = {}
        for name in stored:
            column = table[name].combine_chunks()
            is_picture = name in features.cameras
            columns[name] = column if is_picture else _numbers_of(column, len(features.vectors[name]))
        frames = np.arange(length)
        task = self._tasks.setdefault(part.task, len(self._tasks))
        indices = (
            frames / features.fps,
            frames,
            np.full(length, self._num_episodes),
            frames + self._num_frames,
            np.full(length, task),
        )
        return columns | dict(zip(INDEX_COLUMNS, indices, strict=True))

    def _describe(self) -> dict[str, Any]:
        return {
            "codebase_version": "v3.0",
            "robot_type": self._features.robot_type,
            "total_episodes": self._num_episodes,
            "total_frames": self._num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK_SIZE,
            "data_files_size_in_mb": self._megabytes[0],
            "video_files_size_in_mb": self._megabytes[1],
            "fps": self._features.fps,
            "splits": {"train": f"0:{self._num_episodes}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH if self._features.video else None,
            "features": _describe_features(self._features),
        }


class _DataFiles:
    """The parquet files of frames."""

    def __init__(self, folder: Path, schema: Any, max_bytes: int) -> None:
        self._folder, self._schema, self._max_bytes = folder, schema, max_bytes
        self._number = self._num_bytes = 0
        self._writer: Any = None

    def append(self, columns: dict[str, Any], part: EpisodePart) -> dict[str, int]:
        """Write an episode as one row group; return its place."""
        import pyarrow as pa

        if self._writer is not None and self._num_bytes + part.num_bytes > self._max_bytes:
            self.close()
            self._number += 1
        if self._writer is None:
            self._writer = _open_parquet(self._folder / _DATA_PATH.format(**_place(self._number)), self._schema)
            self._num_bytes = 0
        arrays = [_arrow_of(columns[field.name], field.type) for field in self._schema]
        self._writer.write_table(pa.table(arrays, schema=self._schema), row_group_size=part.length)
        self._num_bytes += part.num_bytes
        return {f"data/{key}": value for key, value in _place(self._number).items()}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _VideoFiles:
    """The mp4 files of one camera."""

    def __init__(self, folder: Path, camera: str, fps: int, max_bytes: int) -> None:
        self._folder, self._camera, self._fps, self._max_bytes = folder, camera, fps, max_bytes
        self._number = self._num_bytes = 0
        self._joiner: VideoJoiner | None = None

    def append(self, part: EpisodePart) -> dict[str, Any]:
        """Copy an episode's frames; return their place."""
        source = part.folder / f"{self._camera}.mp4"
        num_bytes = source.stat().st_size
        if self._joiner is not None and self._num_bytes + num_bytes > self._max_bytes:
            self.close()
            self._number += 1
        if self._joiner is None:
            path = self._folder / _VIDEO_PATH.format(video_key=self._camera, **_place(self._number))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._joiner, self._num_bytes = VideoJoiner(path, fps=self._fps), 0
        start = self._joiner.seconds
        self._joiner.append(source)
        self._num_bytes += num_bytes
        place: dict[str, Any] = {**_place(self._number), "from_timestamp": start, "to_timestamp": self._joiner.seconds}
        return {f"videos/{self._camera}/{key}": value for key, value in place.items()}

    def close(self) -> None:
        if self._joiner is not None:
            self._joiner.close()
            self._joiner = None


class _EpisodeFiles:
    """The parquet files of meta/episodes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[dict[str, Any]] = []
        self._num_rows = 0
        self._writer: Any = None

    def append(self, row: dict[str, Any]) -> None:
        place = _place(self._num_rows // _EPISODES_PER_FILE)
        self._rows.append(row | {f"meta/episodes/{key}": value for key, value in place.items()})
        self._num_rows += 1
        if len(self._rows) == _EPISODES_PER_ROW_GROUP:
            self._flush()
        if self._num_rows % _EPISODES_PER_FILE == 0:
            self.close()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows)
        if self._writer is None:
            place = {key: self._rows[0][f"meta/episodes/{key}"] for key in _place(0)}
            self._writer = _open_parquet(self._folder / _EPISODES_PATH.format(**place), table.schema)
        self._writer.write_table(table)
        self._rows = []


def _place(number: int) -> dict[str, int]:
    """Return the chunk and file index of the `number`-th file of a kind."""
    return {"chunk_index": number // _CHUNK_SIZE, "file_index": number % _CHUNK_SIZE}


def _open_parquet(path: Path, schema: Any) -> Any:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    # no dictionaries: hardly any values repeat
    return parquet.ParquetWriter(path, schema, compression="snappy", use_dictionary=False)


def _numbers_of(column: Any, width: int) -> np.ndarray:
    flat = column if width == 1 else column.flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(-1, width)


def _arrow_of(values: Any, kind: Any) -> Any:
    import pyarrow as pa

    if not isinstance(values, np.ndarray):
        return values.cast(kind)
    return pa.array(values, kind) if values.ndim == 1 else vector_array(values).cast(kind)


def _schema_of(features: LeRobotFeatures) -> Any:
    """Return the Arrow schema of data files, with the metadata that marks images for Hugging Face datasets."""
    import pyarrow as pa

    fields: list[Any] = []
    notes: dict[str, Any] = {}
    for name, feature in _describe_features(features).items():
        if feature["dtype"] == "video":
            continue
        if feature["dtype"] == "image":
            kind, note = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}
        else:
            kind, note = pa.type_for_alias(feature["dtype"]), {"dtype": feature["dtype"], "_type": "Value"}
            (width,) = feature["shape"]
            if width > 1:
                kind, note = pa.list_(kind, width), {"feature": note, "length": width, "_type": "List"}
        fields.append(pa.field(name, kind))
        notes[name] = note
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": notes}})})


def _feature_names(features: LeRobotFeatures) -> list[str]:
    return [*features.cameras, *features.vectors, *INDEX_COLUMNS]


def _describe_features(features: LeRobotFeatures) -> dict[str, dict[str, Any]]:
    """Return the features of info.json."""
    described: dict[str, dict[str, Any]] = {}
    for name, size in features.cameras.items():
        described[name] = {"dtype": "image", "shape": [*size, 3], "names": ["height", "width", "channels"]}
        if features.video:
            described[name] |= {"dtype": "video", "info": describe_video(fps=features.fps, size=size)}
    for name, parts in features.vectors.items():
        described[name] = {"dtype": "float32", "shape": [len(parts)], "names": list(parts)}
    for name in INDEX_COLUMNS:
        dtype = "float32" if name == "timestamp" else "int64"
        described[name] = {"dtype": dtype, "shape": [1], "names": None}
    return described


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """Write the table of tasks as pandas does, with the text as index."""
    import pyarrow as pa
    from pyarrow import parquet

    index = "__index_level_0__"
    column = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    text = {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"}
    note = {
        "index_columns": [index],
        "column_indexes": [{"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}],
        "columns": [column, text],
        "pandas_version": "2.2.0",
    }
    schema = pa.schema([("task_index", pa.int64()), (index, pa.string())], metadata={"pandas": json.dumps(note)})
    table = pa.table([pa.array(range(len(tasks)), pa.int64()), pa.array(tasks, pa.string())], schema=schema)
    parquet.write_table(table, path, compression="snappy")


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=4, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
