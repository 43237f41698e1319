"""What jobs over documents share: plan, run the tasks that are not done yet, count, publish, report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vla_foundry.params.commands.preprocessing import TextJobParams
from vla_foundry.preprocessing.job import Task, run_tasks
from vla_foundry.preprocessing.output import OutputFolder, format_provenance, record_task
from vla_foundry.preprocessing.text.plan import plan_tasks, shuffled_documents
from vla_foundry.preprocessing.text.sources import Piece, list_sources, read_unit
from vla_foundry.preprocessing.text.tally import Tally
from vla_foundry.progress import say
from vla_foundry.shards import ManifestEntry
from vla_foundry.storage.uri import absolute_uri

# raised when the same plan would give other bytes than it gave before
PLAN_VERSION = 1
# params that do not shape the output
_PLAIN_FIELDS = ("source", "output", "num_workers", "ray_address", "overwrite", "max_bad_fraction")


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """What one kind of job over documents does, and what it makes."""

    # as the user types it
    command: str
    # (shared, task) -> the result of `finish_task`
    function: Callable[[Any, Task], Any]
    # what the function needs; `folder`, `seed` and `text_key` are added
    shared: Mapping[str, Any]
    # about how many bytes of text a task takes
    task_bytes: int
    # what else determines the output's bytes, beside params and source; stands for params of the same name
    plan: Mapping[str, Any]
    # facts for the provenance; counts are added
    dataset: Mapping[str, Any]
    # further files of the dataset, {path within the folder: content}
    files: Mapping[str, bytes]


def run_text_job(params: TextJobParams, job: TextJob) -> None:
    """Run a job over documents from start to finish, or from where a killed run left it.

    Raises:
        ValueError: the output folder holds something else, or too much of the source is bad.
        FileNotFoundError: a source does not exist.
    """
    check_apart(params.source, params.output)
    sources = list_sources(params.source)
    values = {name: value for name, value in asdict(params).items() if name not in (*_PLAIN_FIELDS, *job.plan)}
    plan = {"command": job.command, "version": PLAN_VERSION, "params": values, "source": sources.describe(), **job.plan}
    output = OutputFolder(params.output, plan)
    state = output.begin(overwrite=params.overwrite)
    if state == "complete":
        say(f"{params.output} is complete; nothing to do.")
        _report(output.read_provenance()["dataset"])
        return
    if sources.ignored:
        endings = ", ".join(f"{count:,} {ending}" for ending, count in sorted(sources.ignored.items()))
        say(f"files that hold no text are left out: {endings}")
    tasks = plan_tasks(sources.files, seed=params.seed, task_bytes=job.task_bytes)
    start = time.monotonic()
    results = _run_tasks(params, job, tasks, output.finished() if state == "begun" else {}, sources.weight)
    _finish(output, sources.weight, results, params, job)
    say(f"{sources.weight / 1e6:,.1f} MB in {time.monotonic() - start:.1f} s")


def _run_tasks(
    params: TextJobParams, job: TextJob, tasks: list[Task], done: dict[int, Any], num_bytes: int
) -> list[dict[str, Any]]:
    """Run the tasks that are not done, and return the results of all in order."""
    if done:
        say(f"going on: {len(done):,} of {len(tasks):,} tasks are done")
    tally, results = Tally(), dict(done)
    for result in done.values():
        tally.add_json(result["tally"])
    for task, result in run_tasks(
        job.function,
        [task for task in tasks if task.number not in done],
        shared={
            **job.shared,
            "folder": absolute_uri(params.output),
            "seed": params.seed,
            "text_key": params.text_key,
        },
        title=job.command,
        num_workers=params.num_workers,
        ray_address=params.ray_address,
        done_weight=sum(task.weight for task in tasks if task.number in done),
    ):
        results[task.number] = result
        tally.add_json(result["tally"])
        tally.check(params.max_bad_fraction, num_bytes, is_final=False)
    return [results[task.number] for task in tasks]


def _finish(
    output: OutputFolder, num_bytes: int, results: list[dict[str, Any]], params: TextJobParams, job: TextJob
) -> None:
    tally = Tally()
    for result in results:  # in order of the tasks, so that examples do not depend on who was first
        tally.add_json(result["tally"])
    tally.check(params.max_bad_fraction, num_bytes, is_final=True)
    entries = [ManifestEntry(**entry) for result in results for entry in result["entries"]]
    if not entries:
        raise ValueError(f"--source has no documents: {'; '.join(tally.describe()) or 'no rows'}.")
    totals = {name: sum(result["totals"][name] for result in results) for name in results[0]["totals"]}
    facts = {
        **job.dataset,
        "num_documents": tally.num_documents,
        **totals,
        "num_sequences": sum(entry.num_sequences for entry in entries),
        "num_shards": len(entries),
        "num_bytes": sum(entry.num_bytes or 0 for entry in entries),
    }
    output.publish(entries, format_provenance(output.plan, facts, tally.to_json()), job.files)
    for line in tally.describe():
        say(line)
    _report(facts)


def read_documents(shared: Mapping[str, Any], task: Task, tally: Tally, *, max_bytes: int) -> Iterator[Piece]:
    """Read and shuffle the documents of a task, in pieces of at most `max_bytes` bytes."""
    rows = (row for unit in task.payload for row in read_unit(unit, text_key=shared["text_key"], max_bytes=max_bytes))
    return shuffled_documents(rows, tally, seed=shared["seed"], task_number=task.number)


def finish_task(
    shared: Mapping[str, Any], task: Task, *, entries: list[ManifestEntry], tally: Tally, totals: Mapping[str, int]
) -> dict[str, Any]:
    """Record that a task is done, and return its result.

    Args:
        shared: of the job.
        task: the task.
        entries: its shards.
        tally: its rows.
        totals: numbers that are summed over tasks into the dataset's facts.
    """
    result = {"entries": [asdict(entry) for entry in entries], "tally": tally.to_json(), "totals": dict(totals)}
    record_task(shared["folder"], task.number, result)
    return result


def shard_name(task: Task, number: int) -> str:
    """Name of the number-th shard of a task."""
    return f"shard_{task.number:06d}_{number:03d}"


def check_apart(source: Sequence[str], output: str) -> None:
    """Refuse an output folder within a source folder: a second run would read what the first one wrote.

    Raises:
        ValueError: it lies there.
    """
    for place in source:
        if absolute_uri(output).startswith(absolute_uri(place) + "/") or absolute_uri(output) == absolute_uri(place):
            raise ValueError(f"--output {output} lies within --source {place}. Write to a folder outside it.")


def _report(facts: Mapping[str, Any]) -> None:
    line = f"{facts['num_documents']:,} documents in {facts['num_sequences']:,} samples, {facts['num_shards']:,} shards"
    if "num_tokens" in facts:
        size = facts["num_tokens"] + facts["num_padding"]
        line += f"; {facts['num_tokens']:,} tokens, {100 * facts['num_padding'] / size:.2f}% padding"
    say(line)
