"""The dashboard's page, made with Gradio. It holds no state: everything comes from files, at each look."""

import html
import json
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote, urlencode

import gradio as gr

from vla_foundry.config.schema import field_types
from vla_foundry.config.words import split_words
from vla_foundry.evaluation.dashboard.jobs import Job, Queue
from vla_foundry.evaluation.report.command import PAGE_NAME, find_recordings
from vla_foundry.evaluation.report.tables import Table, clean, columns_of, escape
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.run_folder import MODEL_CONFIG_NAME

if TYPE_CHECKING:
    from vla_foundry.evaluation.dashboard.server import LiveReport

# seconds between two looks at the results, and at the queue
_RESULTS_S, _QUEUE_S = 5, 2
_MAX_RECORDINGS = 1000
STYLE = """
.gradio-container {max-width: 1300px !important} #report iframe {width: 100%; height: 80vh; border: 0; background: #fff}
.scroll {overflow-x: auto} .scroll table {border-collapse: collapse}
.scroll :is(td, th) {padding: 2px 8px; text-align: left; border: 1px solid #bbb; white-space: nowrap}
.scroll caption {text-align: left; font-weight: 600}
#log textarea {font-family: monospace; font-size: 12px}
#recording :is(video, img) {max-width: 100%} .fault {color: #b00020; font-weight: 600; overflow-wrap: anywhere}
"""
# the frame is as high as the report; a newer report keeps the height, and what was unfolded
SCRIPT = """<script>
const unfolded = new Set();
function fit(frame) {
  const page = frame.contentDocument, size = () => {
    frame.style.height = page.documentElement.offsetHeight + 40 + 'px';
    document.getElementById('report').style.minHeight = frame.style.height;
  };
  for (const part of page.querySelectorAll('details')) {
    const title = part.querySelector('summary').textContent;
    part.open = unfolded.has(title);
    part.addEventListener('toggle', () => { part.open ? unfolded.add(title) : unfolded.delete(title); size(); });
  }
  new ResizeObserver(size).observe(page.documentElement);
}
</script>"""


def create_blocks(report: "LiveReport", queue: Queue) -> gr.Blocks:
    """Return the page."""
    title = f"Dashboard: {report.root.resolve().name}"
    with gr.Blocks(title=clean(title), analytics_enabled=False) as blocks:
        gr.HTML(f"<h1>{escape(title)}</h1>")
        with gr.Tab("Results"):
            _results(blocks, report)
        with gr.Tab("Recordings"):
            _recordings(blocks, report)
        with gr.Tab("Experiments"):
            _experiments(blocks, report, queue)
    # looks of several browsers do not wait for each other
    return blocks.queue(default_concurrency_limit=8, api_open=False)


def _results(blocks: gr.Blocks, report: "LiveReport") -> None:
    with gr.Row():
        models = gr.Dropdown(
            [], multiselect=True, label="Models (none: all)", elem_id="models", allow_custom_value=True
        )
        tasks = gr.Dropdown([], multiselect=True, label="Tasks (none: all)", elem_id="tasks", allow_custom_value=True)
        refresh = gr.Button("Refresh", elem_id="refresh", scale=0)
    exports, page, version = gr.HTML(), gr.HTML(elem_id="report"), gr.State("")

    def show(models: list[str], tasks: list[str], last: str = "") -> Any:
        now = report.version()
        if now == last:
            return [gr.skip()] * 5
        compared = report.compared()
        if isinstance(compared, str):
            return gr.skip(), gr.skip(), "", f"<p class=fault>{escape(compared)}</p>", now
        picked = {"models": models, "tasks": tasks}
        links = (_link(name, picked) for name in (PAGE_NAME, "report.md", "report.zip", *(f"{t}.csv" for t in _CSV)))
        address = escape(_address(PAGE_NAME, {**picked, "version": now}))
        allowed = "allow-same-origin allow-popups allow-downloads"
        frame = f'<iframe title=Report sandbox="{allowed}" onload=fit(this) src="{address}"></iframe>'
        choices = gr.Dropdown(choices=list(compared.models)), gr.Dropdown(choices=list(compared.tasks))
        return *choices, f"<p>Save: {' '.join(links)}</p>", frame, now

    outputs = [models, tasks, exports, page, version]
    blocks.load(show, [models, tasks], outputs, show_progress="hidden")
    gr.on([refresh.click, models.change, tasks.change], show, [models, tasks], outputs, show_progress="hidden")
    gr.Timer(_RESULTS_S).tick(show, [models, tasks, version], outputs, show_progress="hidden")


_CSV = ("rates", "pairs", "seeds", "failures", "budget")


def _address(name: str, picked: Mapping[str, Any]) -> str:
    return f"files/report/{quote(name)}?{urlencode(picked, doseq=True)}"


def _link(name: str, picked: Mapping[str, Sequence[str]]) -> str:
    return f'<a href="{escape(_address(name, {**picked, "save": "true"}))}" download>{name}</a>'


def _recordings(blocks: gr.Blocks, report: "LiveReport") -> None:
    choice = gr.Dropdown([], label="Episode", elem_id="recordings", allow_custom_value=True)
    viewer = gr.HTML(elem_id="recording")

    def places() -> Any:
        found = [os.path.relpath(path, report.root.resolve()) for path in find_recordings(report.root)]
        readable = [place for place in found if clean(place) == place][:_MAX_RECORDINGS]
        return gr.Dropdown(choices=readable, label=f"Episode ({len(readable)} of {len(found)} videos and pictures)")

    def show(place: str | None) -> str:
        if not place:
            return ""
        address = html.escape(f"files/{quote(place)}")
        if place.endswith((".mp4", ".webm")):
            return f'<video controls src="{address}"></video>'
        if place.endswith(".html"):
            return f'<a href="{address}" download>{escape(place)}</a>'
        return f'<img src="{address}" alt="{escape(place)}">'

    blocks.load(places, None, choice, show_progress="hidden")
    choice.focus(places, None, choice, show_progress="hidden")
    choice.change(show, choice, viewer, show_progress="hidden")


def _experiments(blocks: gr.Blocks, report: "LiveReport", queue: Queue) -> None:
    table, fault = gr.HTML(elem_id="jobs"), gr.HTML(elem_id="fault")
    with gr.Row():
        choice = gr.Dropdown([], label="Evaluation", elem_id="job", allow_custom_value=True, scale=4)
        buttons = {
            name: gr.Button(name, elem_id=name.replace(" ", "_").lower()) for name in ("Stop", "Go on", "Remove")
        }
    log = gr.Textbox(label="Log", lines=12, max_lines=12, interactive=False, autoscroll=True, elem_id="log")
    outputs = [table, choice, log]

    def show(job_id: str | None) -> Any:
        jobs = queue.jobs()
        labels = [(f"{job.name or job.id}: {job.flags.get('tasks', '')} ({job.state})", job.id) for job in jobs]
        job = next((job for job in jobs if job.id == job_id), jobs[-1] if jobs else None)
        chosen = gr.Dropdown(choices=[(clean(label), key) for label, key in labels], value=job and job.id)
        return _table(jobs, queue).to_html(), chosen, clean_log(queue.log(job)) if job else ""

    def act(name: str, job_id: str | None) -> Any:
        try:
            {"Stop": queue.stop, "Go on": queue.resume, "Remove": queue.remove}[name](job_id or "")
            problem = ""
        except OSError as error:
            problem = f"<p class=fault>{escape(str(error))}</p>"
        return *show(job_id), problem

    for name, button in buttons.items():
        button.click(lambda job_id, name=name: act(name, job_id), choice, [*outputs, fault], show_progress="hidden")
    blocks.load(show, choice, outputs, show_progress="hidden")
    choice.input(show, choice, outputs, show_progress="hidden")
    gr.Timer(_QUEUE_S).tick(show, choice, outputs, show_progress="hidden")
    with gr.Accordion("Queue an evaluation", open=False):
        fields = _form(queue)
        add = gr.Button("Queue", variant="primary", elem_id="queue")

    def queue_evaluation(*values: str | None) -> Any:
        given = {name: value or "" for name, value in zip(fields, values, strict=True)}
        try:
            more = _read_flags(given.pop("more"))
            job = queue.add(given | {"tasks": _as_list(given["tasks"])} | more)
            return *show(job.id), "<p>Queued."
        except (ValueError, OSError) as error:
            return *show(None), f"<p class=fault>{escape(str(error))}</p>"

    add.click(queue_evaluation, [*fields.values()], [*outputs, fault], show_progress="hidden")


# flag -> its first value, title and explanation
_FORM = {
    "policy": ("checkpoint", "Policy", "a checkpoint, or null, random or the simulator's expert"),
    "checkpoint": ("", "Checkpoint", "a run or step folder"),
    "name": ("", "Name", "in the results; empty: the run's"),
    "simulator": ("metaworld", "Simulator", "or that of a plug-in"),
    "tasks": ("", "Tasks", "separated by commas"),
    "episodes": ("0:50", "Seeds", "first:end"),
    "max_sample_size": ("", "Budget", "planned rollouts of each task; empty: as many as seeds"),
    "until_decided": ("", "Until decided against", "a policy of these results, or a published one; empty: run all"),
    "more": ("", "More flags", "of evaluate: --batch_size 8 --device cuda:1"),
}


def _form(queue: Queue) -> dict[str, Any]:
    runs = sorted(str(path.parent) for folder in queue.checkpoints for path in folder.glob(f"*/{MODEL_CONFIG_NAME}"))
    choices = {
        "policy": get_args(field_types(EvaluateParams)["policy"]),
        "checkpoint": [run for run in runs if clean(run) == run],
    }
    fields: dict[str, Any] = {}
    for first in range(0, len(_FORM), 3):
        with gr.Row():
            for name, (value, title, explanation) in list(_FORM.items())[first : first + 3]:
                common: dict[str, Any] = {
                    "value": value,
                    "label": title,
                    "info": explanation,
                    "elem_id": f"form_{name}",
                }
                fields[name] = (
                    gr.Dropdown(choices[name], allow_custom_value=True, **common)
                    if name in choices
                    else gr.Textbox(**common)
                )
    return fields


def _as_list(text: str) -> str:
    """Return names that are separated by commas as the command line takes them."""
    names = [name.strip() for name in re.split(r"[,\n]", text) if name.strip()]
    return json.dumps(names, ensure_ascii=False) if any(" " in name for name in names) else ",".join(names)


def _read_flags(text: str) -> dict[str, str]:
    found = split_words(shlex.split(text), lambda name: False)
    if found.positional or found.help_topic is not None:
        raise ValueError(f"More flags must be --flag VALUE ..., not '{text[:80]}'.")
    return {name: "true" if value is None else value for name, value in found.flags}


def _table(jobs: Sequence[Job], queue: Queue) -> Table:
    rows = []
    for job in reversed(jobs):
        found = queue.progress(job) if job.flags else None
        done = f"{found[0].num_trials + found[0].num_trivial} of {found[1]}" if found else ""
        rate = found[0].format() if found and found[0].num_trials else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(max(job.since, 0), 1e10)))
        rows.append((job.name or job.id, job.state, done, rate, since, job.flags.get("tasks"), job.note))
    columns = columns_of(("text", "policy", "state", "episodes", "successes", "since", "tasks", "note"))
    return Table(name="jobs", caption=f"Evaluations: {len(jobs)}, the newest first", columns=columns, rows=rows)


def clean_log(text: str) -> str:
    """Return a log as text to read, line by line."""
    return "\n".join(clean(line) for line in text.splitlines())
