"""Download the images of a list of URLs with img2dataset: uvx runs it in its own environment, for its old webdataset.

Run it again with the same folder to continue. The folder holds `urls/*.parquet` (ours), `tars/<number>.tar` with
`<number>_stats.json` and `<number>.parquet`, which say what became of each URL, and `img2dataset.log`.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_foundry.params.commands.preprocessing import PreprocessImageCaptionParams
from vla_foundry.preprocessing.image_caption.items import DOWNLOAD, Row
from vla_foundry.preprocessing.sources import Tally, import_pyarrow
from vla_foundry.storage.uri import read_object
from vla_foundry.world import num_cores

URL_COLUMN, CAPTION_COLUMN = "url", "caption"
_ROWS_PER_FILE = 1 << 20
_PYTHON = "3.11"
_NUM_LOG_LINES = 3
_SUCCESS = "success"


class UrlList:
    """Writes URLs with their captions as files that img2dataset reads.

    Args:
        folder: the download folder.
        extra_keys: further columns to keep.
    """

    def __init__(self, folder: Path, extra_keys: Sequence[str]) -> None:
        self._folder = folder / "urls"
        self._extra_keys = tuple(extra_keys)
        self._held: list[dict[str, Any]] = []
        self._num_files = 0

    def add(self, row: Row) -> None:
        """Add one URL."""
        extra = {key: row.values.get(key) for key in self._extra_keys}
        caption = row.caption or next(iter(row.values.get("caption", ())), "")  # of a list the first
        self._held.append({URL_COLUMN: row.url, CAPTION_COLUMN: caption, **extra})
        if len(self._held) >= _ROWS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        pa = import_pyarrow("a list of URLs")
        import pyarrow.parquet as pq

        if self._held:
            self._folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(self._held), self._folder / f"{self._num_files:06d}.parquet")
            self._num_files += 1
            self._held = []


def download(params: PreprocessImageCaptionParams, folder: Path) -> None:
    """Run img2dataset over `folder/urls`.

    Raises:
        ValueError: it cannot be run, or fails; one line with the end of its output.
    """
    command = [*_runner(params.img2dataset), *_arguments(params, folder)]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "TQDM_DISABLE": "1"}
    log = folder / "img2dataset.log"
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    lines = [line.strip() for line in log.read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()]
    if code != 0 or not list_tars(folder):
        said = " / ".join(lines[-_NUM_LOG_LINES:])[-400:] or "it printed nothing"
        raise ValueError(f"img2dataset failed (exit code {code}): {said}. Its whole output is in {log}.")


def _runner(package: str) -> list[str]:
    """Return the command that runs img2dataset: uvx in an environment of its own."""
    uvx = shutil.which("uvx")
    if uvx is None:
        raise ValueError(
            "URLs are downloaded by img2dataset, which uvx runs, and uvx is not installed. Install uv "
            "(https://docs.astral.sh/uv), or download the images yourself and list their paths."
        )
    return [uvx, "--python", _PYTHON, "--from", package, "img2dataset"]


def _arguments(params: PreprocessImageCaptionParams, folder: Path) -> list[str]:
    values: dict[str, Any] = {
        "url_list": folder / "urls",
        "input_format": "parquet",
        "url_col": URL_COLUMN,
        "caption_col": CAPTION_COLUMN,
        "output_folder": folder / "tars",
        "output_format": "webdataset",
        "number_sample_per_shard": params.samples_per_shard,
        "processes_count": params.num_workers or num_cores(),
        "thread_count": params.download_threads,
        "timeout": params.download_timeout,
        "retries": params.download_retries,
        # images are checked and scaled by our own code
        "disable_all_reencoding": True,
        "extract_exif": False,
        "enable_wandb": False,
        "incremental_mode": "incremental",
    }
    if params.extra_keys:
        values["save_additional_columns"] = json.dumps(params.extra_keys)
    return [f"--{name}={value}" for name, value in values.items()]


def list_tars(folder: Path) -> list[Path]:
    """Return the downloaded tars, in order."""
    return sorted((folder / "tars").glob("*.tar"))


def read_failures(folder: Path) -> Tally:
    """Count the downloads, and the failed ones by the reasons that img2dataset's statistics give."""
    failures = Tally()
    for path in sorted((folder / "tars").glob("*_stats.json")):
        stats: Mapping[str, Any] = read_object(str(path))
        reasons = {name: int(count) for name, count in stats.get("status_dict", {}).items()}
        failures.num_good += reasons.pop(_SUCCESS, 0)
        examples = _read_examples(path.with_name(path.name.replace("_stats.json", ".parquet"))) if reasons else {}
        for reason, count in reasons.items():
            first, *others = examples.get(reason, ["(unknown URL)"])
            failures.add(f"{DOWNLOAD}{reason}", first, count=count - len(others))
            for name in others:
                failures.add(f"{DOWNLOAD}{reason}", name)
    return failures


def _read_examples(path: Path) -> dict[str, list[str]]:
    """Return {reason: its first URLs} of one tar."""
    import pyarrow.parquet as pq

    if not path.is_file():
        return {}
    rows: Iterable[dict[str, Any]] = pq.read_table(path, columns=["url", "status", "error_message"]).to_pylist()
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != _SUCCESS:
            names = found.setdefault(str(row["error_message"] or row["status"]), [])
            if len(names) < 10:
                names.append(str(row["url"]))
    return found
