"""The output folder of a job: resume it, refuse to mix two configurations, publish the dataset with its provenance.

While a job runs, it holds a lock on the folder. `_progress/plan.json` records everything that determines its output,
and a task writes `_progress/task_<number>.json` once all its shards are in place. At the end provenance.json is
written, then the manifest, and `_progress` is deleted: a folder with a manifest is complete.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any

import vla_foundry
from vla_foundry.parsing import as_json
from vla_foundry.progress import say
from vla_foundry.provenance import read_git_commit, read_package_versions
from vla_foundry.run_folder import lock_folder
from vla_foundry.shards import MANIFEST_NAME, PROVENANCE_NAME, ManifestEntry, format_manifest, parse_manifest
from vla_foundry.storage.uri import (
    absolute_uri,
    delete,
    is_hidden,
    is_remote,
    join_uri,
    list_relative,
    name_of,
    read_json,
    read_object,
    read_text,
    write_bytes,
    write_text,
)

PROGRESS_FOLDER = "_progress"
# what failed, by reason, where a job reports that
REPORT_NAME = "report.json"
# what a dataset may hold beside its shards
_OWN_FILES = (
    PROVENANCE_NAME,
    REPORT_NAME,
    "stats.json",
    "robotics.json",
    "preprocessing_config.yaml",
    "processing_metadata.json",
)
# the name and the key "plan" of provenance.json are those of published datasets
SETTINGS_NAME = "plan.json"
_INPUTS_KEY = "inputs"
_NUM_THREADS = 16
# packages that may shape the bytes of a dataset
_PACKAGES = ("av", "h5py", "numpy", "pillow", "pyarrow", "ray", "tokenizers", "torch", "torchvision", "transformers")


class OutputFolder:
    """The folder that a job writes its dataset to.

    Args:
        uri: local or s3://.
        settings: everything that determines the bytes of the dataset, as JSON values.
        flag: how the user names the folder, for messages.
        inputs: fingerprint of the versions of the source files; results of tasks are kept only while it stays the same.
    """

    def __init__(
        self, uri: str, settings: Mapping[str, Any], *, flag: str = "--output", inputs: str | None = None
    ) -> None:
        self.uri = uri
        self._flag = flag
        self._inputs = inputs
        self.settings = as_json(settings)

    @contextmanager
    def begin(self, *, overwrite: bool) -> Iterator[dict[int, Any] | None]:
        """Hold the folder for this process and make it ready.

        Args:
            overwrite: replace a dataset that was made, or begun, with other settings.

        Yields:
            Results of the tasks that an earlier run finished, {task number: result}; None: the dataset is complete.

        Raises:
            ValueError: another process holds the folder, or it holds something else, or a dataset of other settings;
                the message says what differs.
        """
        with hold_folder(self.uri, flag=self._flag):
            is_complete = self._prepare(overwrite)
            if is_complete:
                say(f"{self.uri} is complete; nothing to do.")
            yield None if is_complete else self._read_results()

    def _prepare(self, overwrite: bool) -> bool:
        """Look at what is there and make the folder ready; return whether the dataset is complete."""
        files = self._files()
        if not files:
            self._write_settings()
            return False
        found = self._found_settings(files)
        if found is None:
            example = min(files)
            raise ValueError(f"{self._flag} {self.uri} holds other files ('{example}', ...). Choose an empty folder.")
        is_modified = found.pop(_INPUTS_KEY, self._inputs) != self._inputs
        differences = settings_differences(found, self.settings) or self._missing_shards(files)
        differences += ["source files that were modified since then"] if is_modified else []
        if differences and not overwrite:
            verb = "was made" if MANIFEST_NAME in files else "was begun"
            raise ValueError(
                f"{self._flag} {self.uri} {verb} with {'; '.join(differences[:3])}. "
                "Choose another folder, or replace it with --overwrite true."
            )
        if differences:
            self._clear(files)
            self._write_settings()
            return False
        self._delete_temporaries()
        if _is_complete(files):
            self._delete_progress(files)
        return _is_complete(files)

    def read_facts(self) -> dict[str, Any]:
        """Return the facts of a complete dataset."""
        return read_object(join_uri(self.uri, PROVENANCE_NAME))["dataset"]

    def _read_results(self) -> dict[int, Any]:
        prefix = f"{PROGRESS_FOLDER}/task_"
        names = [name for name in self._files() if name.startswith(prefix) and name.endswith(".json")]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            results = list(pool.map(lambda name: read_json(join_uri(self.uri, name)), names))
        numbers = [int(name.removeprefix(prefix).removesuffix(".json")) for name in names]
        return dict(sorted(zip(numbers, results, strict=True), key=itemgetter(0)))

    def publish(
        self,
        entries: Sequence[ManifestEntry],
        *,
        facts: Mapping[str, Any],
        counts: Mapping[str, Any],
        files: Mapping[str, bytes],
    ) -> dict[str, Any]:
        """Write extra files, the provenance and last the manifest; then the progress files go.

        Args:
            entries: the lines of the manifest.
            facts: what readers rely on (kind, vocab_size, ...); the numbers of samples, shards and bytes are added.
            counts: what went in, came out and was skipped.
            files: {path within the folder: content}.

        Returns:
            All facts.

        Raises:
            ValueError: a shard that a task has written cannot be seen from here.
        """
        self._check_visible(entries)
        for name, content in files.items():
            write_bytes(join_uri(self.uri, name), content)
        facts = {
            **facts,
            "num_sequences": sum(entry.num_sequences for entry in entries),
            "num_shards": len(entries),
            "num_bytes": sum(entry.num_bytes or 0 for entry in entries),
        }
        write_text(join_uri(self.uri, PROVENANCE_NAME), format_provenance(self.settings, facts, counts))
        write_text(join_uri(self.uri, MANIFEST_NAME), format_manifest(entries))
        self._delete_progress(self._files())
        return facts

    def _check_visible(self, entries: Sequence[ManifestEntry]) -> None:
        sizes = self._files()
        for entry in entries:
            if sizes.get(f"{entry.shard}.tar") != entry.num_bytes:
                raise ValueError(
                    f"Shard {entry.shard} was written but is not whole in {self.uri} as seen from here. "
                    f"On a cluster, {self._flag} must be a folder that all nodes share, or s3://."
                )

    def _files(self) -> dict[str, int]:
        """Return {path within the folder: size} without hidden files, such as temporary ones."""
        try:
            return {name: size for name, size in list_relative(self.uri).items() if not is_hidden(name)}
        except FileNotFoundError:
            return {}

    def _found_settings(self, files: Mapping[str, int]) -> dict[str, Any] | None:
        if _is_complete(files):
            return read_object(join_uri(self.uri, PROVENANCE_NAME)).get("plan")
        progress = f"{PROGRESS_FOLDER}/{SETTINGS_NAME}"
        return read_object(join_uri(self.uri, progress)) if progress in files else None

    def _missing_shards(self, files: Mapping[str, int]) -> list[str]:
        if not _is_complete(files):
            return []
        entries = parse_manifest(read_text(join_uri(self.uri, MANIFEST_NAME)), MANIFEST_NAME)
        names = [f"{entry.shard}.tar" for entry in entries if files.get(f"{entry.shard}.tar") != entry.num_bytes]
        return [f"{name}, which is now missing or cut" for name in names]

    def _write_settings(self) -> None:
        _write_json(join_uri(self.uri, PROGRESS_FOLDER, SETTINGS_NAME), {**self.settings, _INPUTS_KEY: self._inputs})

    def _delete_all(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(lambda name: delete(join_uri(self.uri, name)), names))

    def _delete_progress(self, files: Iterable[str]) -> None:
        # the settings last: without them, the rest would be taken for foreign files
        settings = f"{PROGRESS_FOLDER}/{SETTINGS_NAME}"
        self._delete_all(name for name in files if name.startswith(f"{PROGRESS_FOLDER}/") and name != settings)
        delete(join_uri(self.uri, settings))
        if not is_remote(self.uri):
            shutil.rmtree(Path(absolute_uri(self.uri), PROGRESS_FOLDER), ignore_errors=True)

    def _clear(self, files: Mapping[str, int]) -> None:
        """Delete a dataset. If this is interrupted, its settings still mark the folder as ours, and as no dataset."""
        self._delete_temporaries()
        settings = join_uri(PROGRESS_FOLDER, SETTINGS_NAME)
        _write_json(join_uri(self.uri, settings), {"command": "deleting what was here before"})
        delete(join_uri(self.uri, MANIFEST_NAME))
        own = (".tar", ".index.json")
        folders = (f"{PROGRESS_FOLDER}/", "tokenizer/")
        self._delete_all(
            name
            for name in files
            if name != settings and (name.endswith(own) or name.startswith(folders) or name in _OWN_FILES)
        )

    def _delete_temporaries(self) -> None:
        """Delete what a killed run left half-written; remote stores have no such files."""
        if is_remote(self.uri):
            return
        self._delete_all(name for name in list_relative(self.uri) if _is_temporary(name))


def hold_folder(uri: str, *, flag: str = "--output") -> AbstractContextManager[None]:
    """Hold an output folder for this process; nobody can hold a folder in an object store.

    Raises:
        ValueError: another process holds it.
    """
    return nullcontext() if is_remote(uri) else lock_folder(Path(absolute_uri(uri)), what="output folder", flag=flag)


def check_apart(source: Sequence[str], output: str) -> None:
    """Refuse an output folder within a source folder: a second run would read the output of the first.

    Raises:
        ValueError: the output lies there.
    """
    for place in source:
        if absolute_uri(output).startswith(absolute_uri(place) + "/") or absolute_uri(output) == absolute_uri(place):
            raise ValueError(f"--output {output} lies within --source {place}. Write to a folder outside it.")


def record_task(folder: str, number: int, result: Any) -> None:
    """Record that a task is done; the task itself calls this when all its shards are in place."""
    _write_json(join_uri(folder, PROGRESS_FOLDER, f"task_{number:06d}.json"), result)


def _is_complete(files: Iterable[str]) -> bool:
    # an earlier `manifest build` wrote a manifest alone, of what an unfinished job had written
    return {MANIFEST_NAME, PROVENANCE_NAME} <= set(files)


def _write_json(uri: str, values: Any) -> None:
    write_text(uri, json.dumps(values, indent=1) + "\n")


def _is_temporary(path: str) -> bool:
    name = name_of(path)
    return name.startswith(".") and name.endswith(".tmp")


def settings_differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Name the leaves in which two sets of settings differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*new, *old]))
        return [
            line
            for name in names
            for line in settings_differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
        ]
    was, now = (json.dumps(value) if value is None or isinstance(value, bool) else repr(value) for value in (old, new))
    return [] if old == new else [f"{path} {was} (now {now})"]


def digest_of(values: Any) -> str:
    """SHA-256 of the canonical JSON of `values`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the packages that may shape the bytes of a dataset."""
    own = {"python": platform.python_version(), "vla_foundry": vla_foundry.__version__}
    return own | read_package_versions(_PACKAGES)


def format_provenance(settings: Mapping[str, Any], dataset: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """Format provenance.json, which names no user, host, time or absolute path.

    Args:
        settings: what determines the dataset's bytes (command, params, source, ...); a later run is compared with it.
        dataset: facts that readers rely on (kind, vocab_size, eos_token_id, seq_len, ...).
        counts: what went in, came out and was skipped.
    """
    values = {
        "dataset": dict(dataset),
        "plan": dict(settings),
        "counts": dict(counts),
        "versions": read_versions(),
        "git_commit": read_git_commit(),
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
