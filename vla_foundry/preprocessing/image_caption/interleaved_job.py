"""`vla-foundry preprocess interleaved`: documents that name their images, in folders and lists, to checked shards.

A document is a `.json` file or a row of a list, in a layout of `text/interleaved.py`. It names its images by paths
relative to itself. Each image is checked and stored as `image_<number>.<ending>`, and the document as `parts`.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vla_foundry.params.commands.preprocessing import PreprocessInterleavedParams
from vla_foundry.parsing import parse_record
from vla_foundry.preprocessing.image_caption.image_caption_job import (
    count_failure,
    divide_into_tasks,
    publish,
    run_tasks,
    summarize,
)
from vla_foundry.preprocessing.image_caption.items import (
    IMAGE_ENDINGS,
    Sources,
    create_images,
    locate,
    name_member,
    read_file,
)
from vla_foundry.preprocessing.output import OutputFolder, check_apart
from vla_foundry.preprocessing.sources import (
    SourceFile,
    Tally,
    Unreadable,
    digest_of_versions,
    list_columns,
    list_source_files,
    open_parquet,
    read_batches,
    read_json_rows,
    rows_of,
    say_ignored,
)
from vla_foundry.progress import say
from vla_foundry.storage.uri import name_of
from vla_foundry.text.captions import Unusable
from vla_foundry.text.interleaved import LAYOUTS, Part, Picture, read_document

COMMAND = "preprocess interleaved"
# raise it when the same settings give other bytes than before
SETTINGS_VERSION = 2
_LIST_KINDS = ("jsonl", "ndjson", "parquet")
_SETTING_FIELDS = ("samples_per_shard", "max_side", "jpeg_quality", "seed", "image_folder", "skip_bad_images")
_PARQUET_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class DocumentItem:
    """One document to be written."""

    # what the user knows it as: path within its source, or list and row
    name: str
    # file whose folder image names are relative to
    origin: str
    # the document; None: it is the content of `origin`
    parts: Sequence[Part] | None

    def read(self, options: Mapping[str, Any]) -> list[dict[str, bytes]]:
        """Read the images and return the members of the document's sample.

        Raises:
            Unusable: an image is missing or broken, and bad images are not skipped; or the document is bad.
        """
        parts = self.parts
        if parts is None:
            try:
                values = parse_record(read_file(self.origin), "it")
            except ValueError as error:
                raise error if isinstance(error, Unusable) else Unusable("bad JSON", str(error)) from None
            parts = read_document(values)
        stored: list[dict[str, str]] = []
        files: dict[str, bytes] = {}
        for part in parts:
            if isinstance(part, str):
                last = stored[-1].get("text", " ") if stored else " "  # a text: an image between them was left out
                gap = "" if last[-1:].isspace() or part[:1].isspace() else " "
                stored.append({"text": gap + part})
                continue
            try:
                made = self._read_image(part, options)
            except Unusable:
                if not options["skip_bad_images"]:
                    raise
                continue
            ((suffix, data),) = made.items()
            name = name_member(len(files), suffix)
            files[name] = data
            stored.append({"image": name})
        document = json.dumps({"parts": stored}, ensure_ascii=False).encode("utf-8")
        return [{**files, "json": document}]

    def _read_image(self, picture: Picture, options: Mapping[str, Any]) -> dict[str, bytes]:
        if not picture.name:
            raise Unusable("missing image", "an image has no name")
        if picture.name.lower().startswith(("http://", "https://")):
            raise Unusable("image is a URL", f"{picture.name}: download it, and name the file")
        folder = options["image_folder"]
        data = read_file(locate(picture.name, self.origin if folder is None else f"{folder.rstrip('/')}/."))
        return create_images([data], max_side=options["max_side"], jpeg_quality=options["jpeg_quality"])


def preprocess_interleaved(params: PreprocessInterleavedParams) -> None:
    """Write documents as a dataset of modality `interleaved`, or resume where a killed run stopped.

    Raises:
        ValueError: the output folder will not do, or too much of the source fails.
        FileNotFoundError: a source does not exist.
    """
    check_apart(params.source, params.output)
    items, sources = _list_documents(params.source)
    values = {name: value for name, value in asdict(params).items() if name in _SETTING_FIELDS}
    settings = {"command": COMMAND, "version": SETTINGS_VERSION, "params": values, "source": sources.describe()}
    output = OutputFolder(params.output, settings, inputs=digest_of_versions(sources.files))
    with output.begin(overwrite=params.overwrite) as done:
        if done is None:
            say(summarize(output.read_facts()))
            return
        started = time.monotonic()
        say_ignored(sources.ignored, "hold no documents")
        failures = Tally()
        items += [item for file in sources.lists for item in _read_list(file, failures)]
        options = {name: values[name] for name in ("max_side", "jpeg_quality", "image_folder", "skip_bad_images")}
        results = run_tasks(params, divide_into_tasks(params, items, []), done, options, COMMAND)
        publish(output, params, failures, results, kind="interleaved")
        say(f"{time.monotonic() - started:.1f} s")


def _list_documents(places: Sequence[str]) -> tuple[list[DocumentItem], Sources]:
    """Return the documents that are files, and the lists of others."""
    found = list_source_files(places)
    items: list[DocumentItem] = []
    sources = Sources(pairs=[], lists=[], files=[file for files in found for file in files], ignored=Counter())
    for place, files in zip(places, found, strict=True):
        lists = [file for file in files if file.kind in _LIST_KINDS]
        documents = [file for file in files if file.kind == "json" and not file.packing]
        if not lists and not documents:
            raise ValueError(
                f"--source {place} has no documents: .json files, or lists of them ({', '.join(_LIST_KINDS)})."
            )
        sources.lists.extend(lists)
        items += [DocumentItem(name=file.name, origin=file.uri, parts=None) for file in documents]
        others = (file for file in files if file not in lists and file not in documents)
        sources.ignored.update(file.ending for file in others if file.kind not in IMAGE_ENDINGS)
    return items, sources


def _read_list(file: SourceFile, failures: Tally) -> Iterator[DocumentItem]:
    number = -1
    try:
        for number, values in enumerate(_read_rows(file)):
            name = f"{name_of(file.uri)} row {number}"
            try:
                if isinstance(values, Exception):
                    raise Unusable("not Unicode" if isinstance(values, UnicodeDecodeError) else "bad JSON", str(values))
                yield DocumentItem(name=name, origin=file.uri, parts=read_document(values))
            except Unusable as error:
                count_failure(failures, name, error)
    except Unreadable as error:
        raise ValueError(f"{file.uri}: {error}.") from None
    if number < 0:
        raise ValueError(f"{file.uri} has no rows.")


def _read_rows(file: SourceFile) -> Iterator[Any]:
    if file.kind != "parquet":
        yield from (row for _, row in read_json_rows(file))
        return
    with open_parquet(file) as parquet:
        names = {path.partition(".")[0] for path in list_columns(parquet)}
        layout = next((keys for keys in LAYOUTS if names.issuperset(keys)), None)
        if layout is None:
            wanted = ", or ".join(" and ".join(keys) for keys in LAYOUTS)
            raise ValueError(f"{file.uri} has no columns {wanted}, only {', '.join(sorted(names)) or 'none'}.")
        for batch in read_batches(parquet, layout, _PARQUET_ROWS):
            yield from rows_of(batch)
