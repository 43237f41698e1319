"""`vla-foundry preprocess image_caption`: find images and captions, download URLs, write checked shards.

A task writes one shard: either a stretch of the shuffled pairs and paths, or one downloaded tar. Each image is decoded
once, so anything that training could not use is found, named and counted here. `report.json` gives the number of
failures by reason, and the first names of each.
"""

import itertools
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vla_foundry.params.commands.preprocessing import ImageJobParams, PreprocessImageCaptionParams
from vla_foundry.parsing import parse_object
from vla_foundry.preprocessing.image_caption.download import UrlList, download, list_tars, read_failures
from vla_foundry.preprocessing.image_caption.items import (
    DOWNLOAD,
    NO_URL,
    STORED_ENDINGS,
    VIDEO_ENDINGS,
    BadRow,
    Item,
    Sources,
    create_images,
    create_texts,
    is_download,
    item_of_row,
    list_sources,
    read_list,
)
from vla_foundry.preprocessing.output import REPORT_NAME, OutputFolder, check_apart, digest_of, hold_folder, record_task
from vla_foundry.preprocessing.shard_writer import open_shard
from vla_foundry.preprocessing.sources import Tally, digest_of_versions, say_ignored
from vla_foundry.preprocessing.tasks import Task, run_unfinished
from vla_foundry.progress import say
from vla_foundry.shards import ManifestEntry, index_shard
from vla_foundry.storage.uri import absolute_uri, is_remote
from vla_foundry.text.captions import Unusable

COMMAND = "preprocess image_caption"
# raise it when the same settings give other bytes than before
SETTINGS_VERSION = 2
# params that shape the output's bytes
_SETTING_FIELDS = (
    "url_key",
    "caption_key",
    "extra_keys",
    "samples_per_shard",
    "max_side",
    "jpeg_quality",
    "seed",
)


def preprocess_image_caption(params: PreprocessImageCaptionParams) -> None:
    """Write images and captions as a dataset of modality `image_caption`, or resume where a killed run stopped.

    Raises:
        ValueError: the output folder will not do, too much of the source fails, or img2dataset cannot be run.
        FileNotFoundError: a source does not exist.
    """
    check_apart(params.source, params.output)
    sources = list_sources(params.source)
    values = {name: value for name, value in asdict(params).items() if name in _SETTING_FIELDS}
    if params.all_captions:  # outputs from before the option keep their settings
        values["all_captions"] = True
    settings = {"command": COMMAND, "version": SETTINGS_VERSION, "params": values, "source": sources.describe()}
    output = OutputFolder(params.output, settings, inputs=digest_of_versions(sources.files))
    with output.begin(overwrite=params.overwrite) as done:
        if done is None:
            say(summarize(output.read_facts()))
            return
        started = time.monotonic()
        say_ignored(sources.ignored, "belong to no image")
        failures = Tally()
        folder = _download_folder(params, output.settings)
        with nullcontext() if folder is None else hold_folder(str(folder), flag="--download_folder"):
            items = list_items(params, sources, folder, failures)
            tars = _download(params, folder, failures)
            names = ("caption_key", "max_side", "jpeg_quality", "all_captions")
            options = {name: getattr(params, name) for name in names}
            results = run_tasks(params, divide_into_tasks(params, items, tars), done, options, COMMAND)
            publish(output, params, failures, results, kind="image_caption")
            if folder is not None:
                shutil.rmtree(folder if params.download_folder else folder.parent, ignore_errors=True)
        say(f"{time.monotonic() - started:.1f} s")


def _download_folder(params: PreprocessImageCaptionParams, settings: Mapping[str, Any]) -> Path | None:
    """Return where downloads go; None if the output is remote and no folder was given.

    Its name is a digest of all that the downloads depend on: what was downloaded for another list is never used.
    """
    if params.download_folder is None and is_remote(params.output):
        return None
    if params.download_folder is None:
        parent = Path(f"{absolute_uri(params.output)}.download")
    else:
        parent = Path(absolute_uri(params.download_folder), "image_caption_download")
    names = ("url_key", "caption_key", "extra_keys", "samples_per_shard")
    return parent / digest_of([settings["source"], *(settings["params"][name] for name in names)])[:16]


def list_items(
    params: PreprocessImageCaptionParams, sources: Sources, downloads: Path | None, failures: Tally
) -> list[Item]:
    """Return the pairs and the rows that are paths, and write the rows that are URLs to the download folder.

    Raises:
        ValueError: there are URLs, but no folder to download to.
    """
    items = list(sources.pairs)
    urls = None
    for file in sources.lists:
        for row in read_list(file, params.url_key, params.caption_key, params.extra_keys):
            if isinstance(row, BadRow):
                failures.add(row.reason, row.name)
            elif not is_download(row.url):
                items.append(item_of_row(row, file.uri))
            elif downloads is None:
                raise ValueError(
                    f"{file.uri} lists URLs and --output is remote: give --download_folder FOLDER on this machine."
                )
            else:
                urls = urls or UrlList(downloads, params.extra_keys)
                urls.add(row)
    if urls is not None:
        urls.flush()
    return items


def _download(params: PreprocessImageCaptionParams, folder: Path | None, failures: Tally) -> list[Path]:
    if folder is None or not (folder / "urls").is_dir():
        return []
    say(f"downloading with {params.img2dataset} to {folder}")
    download(params, folder)
    found = read_failures(folder)
    flag = "--max_failed_downloads"
    found.check(params.max_failed_downloads, flag=flag, what="downloads failed", is_judged=_is_download, is_final=True)
    say(f"downloaded {found.num_good:,} images; {found.counts.total():,} failed")
    found.num_good = 0  # they are counted when they are written
    failures.add_json(found.to_json())
    return list_tars(folder)


def _is_download(reason: str) -> bool:
    return reason.startswith(DOWNLOAD)


def _check(failures: Tally, params: ImageJobParams, *, is_final: bool) -> None:
    failures.check(
        params.max_bad_fraction,
        flag="--max_bad_fraction",
        what="images failed",
        is_judged=lambda reason: reason != NO_URL and not _is_download(reason),
        is_final=is_final,
    )


def divide_into_tasks(params: ImageJobParams, items: Sequence[Any], tars: Iterable[Path]) -> list[Task]:
    """Divide the work into tasks of one shard each: a pure function of the items, the seed and the tars."""
    order = np.random.default_rng([params.seed, len(items)]).permutation(len(items)).tolist()
    stretches = [
        order[first : first + params.samples_per_shard] for first in range(0, len(order), params.samples_per_shard)
    ]
    payloads: list[tuple[int, list[Any] | Path]] = [
        (len(stretch), [items[index] for index in stretch]) for stretch in stretches
    ]
    payloads += [(params.samples_per_shard, tar) for tar in tars]
    return [
        Task(number=number, name=f"shard {number}", weight=weight, payload=payload)
        for number, (weight, payload) in enumerate(payloads)
    ]


def run_tasks(
    params: ImageJobParams, tasks: list[Task], done: dict[int, Any], options: Mapping[str, Any], title: str
) -> list[dict[str, Any]]:
    """Run the tasks that are not done, and return the results of all in order; `options` go to the items."""
    failures = Tally()
    for result in done.values():
        failures.add_json(result["failures"])

    def check(result: dict[str, Any]) -> None:
        failures.add_json(result["failures"])
        _check(failures, params, is_final=False)

    return run_unfinished(
        write_task,
        tasks,
        done,
        shared={"folder": absolute_uri(params.output), "options": options},
        title=title,
        noun="shards",
        num_workers=params.num_workers,
        ray_address=params.ray_address,
        check=check,
    )


def write_task(shared: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Write the shard of one task, and record that it is done."""
    import torch

    torch.set_num_threads(1)  # tasks share out the cores
    failures = Tally()
    shard = f"shard_{task.number:06d}"
    made = (
        _samples_of_tar(shared, task.payload) if isinstance(task.payload, Path) else _samples_of(shared, task.payload)
    )
    usable = _count(made, failures)
    first = next(usable, None)
    entries: list[dict[str, Any]] = []
    num_images = 0
    if first is not None:
        with open_shard(shared["folder"], shard) as writer:
            for members in itertools.chain([first], usable):
                writer.add(f"{shard}_{failures.num_good:06d}", members)
                failures.num_good += 1
                num_images += sum(name.rpartition(".")[2] in (*STORED_ENDINGS, *VIDEO_ENDINGS) for name in members)
        assert writer.entry is not None, "open_shard sets the entry"
        entries.append(asdict(writer.entry))
    result = {"entries": entries, "failures": failures.to_json(), "images": num_images}
    record_task(shared["folder"], task.number, result)
    return result


def _count(made: Iterator[tuple[str, dict[str, bytes] | Unusable]], failures: Tally) -> Iterator[dict[str, bytes]]:
    """Yield the members of the samples that could be made, and count the others."""
    for name, sample in made:
        if isinstance(sample, Unusable):
            count_failure(failures, name, sample)
        else:
            yield sample


def count_failure(failures: Tally, name: str, error: Unusable) -> None:
    """Count what could not be made, with its name and what was wrong as the example."""
    detail = " ".join(str(error).split())
    failures.add(error.reason, f"{name} ({detail})" if detail else name)


def _samples_of(shared: Mapping[str, Any], items: Iterable[Any]) -> Iterator[tuple[str, dict[str, bytes] | Unusable]]:
    for item in items:
        try:
            yield from ((item.name, sample) for sample in item.read(shared["options"]))
        except Unusable as error:
            yield item.name, error


def _samples_of_tar(shared: Mapping[str, Any], path: Path) -> Iterator[tuple[str, dict[str, bytes] | Unusable]]:
    """Read what img2dataset wrote: images, captions and what is known about them."""
    options = shared["options"]
    for key, members in _read_tar(path):
        name = f"{path.stem}/{key}"
        try:
            url = parse_object(members.get("json", b"{}"), f"{name}.json").get("url")
            name = url if isinstance(url, str) else name
            images = [members[suffix] for suffix in STORED_ENDINGS if suffix in members]
            texts = create_texts(members.get("txt"), members.get("json"), caption_key="caption")[0]
            yield (
                name,
                {**create_images(images, max_side=options["max_side"], jpeg_quality=options["jpeg_quality"]), **texts},
            )
        except Unusable as error:
            yield name, Unusable(f"{DOWNLOAD}{error.reason}", str(error))


def _read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    with open(path, "rb") as file:
        try:
            samples = index_shard(file).samples
        except ValueError as error:
            raise ValueError(f"{path} is broken ({error}). Delete it with its _stats.json, and run again.") from None
        for key, spans in samples:
            members = dict[str, bytes]()
            for suffix, span in spans.items():
                file.seek(span.offset)
                members[suffix] = file.read(span.size)
            yield key, members


def publish(
    output: OutputFolder, params: ImageJobParams, failures: Tally, results: list[dict[str, Any]], *, kind: str
) -> None:
    """Publish the dataset, and report what failed.

    Raises:
        ValueError: there is no sample, or too much failed.
    """
    for result in results:  # in order of the shards, so that examples do not depend on who was first
        failures.add_json(result["failures"])
    _check(failures, params, is_final=True)
    entries = [ManifestEntry(**entry) for result in results for entry in result["entries"]]
    for line in failures.describe():
        say(line)
    if not entries:
        raise ValueError("--source gave no sample: all failed, for the reasons above.")
    facts = {
        "kind": kind,
        "num_images": sum(result["images"] for result in results),
        "num_failed": failures.counts.total(),
    }
    counts = failures.to_json()
    report = json.dumps(counts, indent=2, ensure_ascii=False) + "\n"
    say(summarize(output.publish(entries, facts=facts, counts=counts, files={REPORT_NAME: report.encode("utf-8")})))


def summarize(facts: Mapping[str, Any]) -> str:
    """Return what was written, in a line."""
    return (
        f"{facts['num_sequences']:,} samples, {facts['num_images']:,} images, {facts['num_bytes'] / 1e6:,.1f} MB in "
        f"{facts['num_shards']:,} shards; {facts['num_failed']:,} failed ({REPORT_NAME})"
    )
