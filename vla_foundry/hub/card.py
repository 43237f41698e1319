"""Write the card (README.md) of a published run or dataset from its config, spec, metrics and evaluations."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from vla_foundry.config.loading import dump_value
from vla_foundry.hub.cleaning import hide_path
from vla_foundry.hub.content import Content
from vla_foundry.hub.shards import read_header
from vla_foundry.params.commands.sharing import HubPushParams
from vla_foundry.params.data.mixture import MixtureDataParams
from vla_foundry.params.experiment import TrainExperimentParams
from vla_foundry.params.models.policy import RobotPolicyParams, list_starts
from vla_foundry.params.models.roles import LanguageModelParams
from vla_foundry.robotics.spec import DatasetSpec
from vla_foundry.run_folder import read_step
from vla_foundry.storage.uri import parent_uri

_HUB = "hf://"
_DATASETS = "hf://datasets/"
_INTENDED_USE = "Research. It was not tested for any other use"
_ROBOT_CAUTION = (
    "A policy commands a robot: outside the tasks, cameras and robots that it was trained on and evaluated with, its "
    "actions may be anything. Keep people out of reach, and limit forces and speeds below the policy."
)


def write_card(content: Content, params: HubPushParams) -> str:
    """Return the text of the card, with its front matter."""
    if content.kind == "run":
        front, body = _describe_run(content, params)
    else:
        front, body = _describe_dataset(content, params)
    front = {key: value for key, value in front.items() if value}
    licence = f"Licence: {params.license}." if params.license else "No licence was given."
    return f"---\n{dump_value(front)}---\n\n" + "\n".join([*body, "", "## Licence", licence]) + "\n"


def _describe_run(content: Content, params: HubPushParams) -> tuple[dict[str, Any], list[str]]:
    run = content.params
    model = run.model if run is not None else None
    task = None
    if isinstance(model, RobotPolicyParams):
        task = "robotics"
    elif model is not None:
        task = "text-generation" if isinstance(model, LanguageModelParams) else "image-to-text"
    starts = list_starts(model) if model is not None else []
    bases = [params.base_model] if params.base_model else [name for start in starts if (name := _hub_name(start))]
    parts = run.data.parts().values() if run is not None else ()
    manifests = [name for part in parts for name in part.dataset_manifest]
    used = {name.removeprefix(_DATASETS).partition("@")[0] for name in manifests if name.startswith(_DATASETS)}
    names = sorted({"/".join(name.split("/")[:2]) for name in used})
    front = {
        "license": params.license,
        "library_name": "vla_foundry",
        "pipeline_tag": task,
        "tags": ["vla_foundry", *([model.type] if model is not None else []), *params.tags],
        "datasets": params.datasets if params.datasets is not None else names,
        "base_model": list(dict.fromkeys(bases)),
    }
    name = params.repo.partition("/")[2]
    lines = [f"# {name}", "", _summarize(content), ""]
    lines += ["## Use", "```bash", *_commands(task, params.repo), "```", ""]
    lines += ["## Intended use", (params.intended_use or _INTENDED_USE).rstrip(".") + "."]
    lines += ["", _ROBOT_CAUTION] if task == "robotics" else []
    if content.spec is not None:
        lines += ["", "## Robot", *_describe_spec(content.spec)]
    if run is not None:
        lines += ["", "## Data", *_describe_data(run), "", "## Training", *_describe_training(run, content.record)]
    lines += ["", "## Evaluation", *_describe_evaluations(content.record.get("evaluations"))]
    return front, lines


def _hub_name(start: str) -> str | None:
    """Return ORG/NAME of a start that is on the hub."""
    if start.startswith(_HUB):
        return "/".join(start.removeprefix(_HUB).partition("@")[0].split("/")[:2])
    return start if start.count("/") == 1 and not start.startswith(("/", ".", "~")) and "://" not in start else None


def _summarize(content: Content) -> str:
    assert content.step_folder is not None
    weights = [path for name, path in content.files.items() if name.endswith(".safetensors") and "/model" in name]
    count = sum(
        math.prod(tensor["shape"])
        for path in weights
        for name, tensor in read_header(path)[0].items()
        if name != "__metadata__"
    )
    kind = content.params.model.type if content.params is not None else "imported model"
    has_ema = any("/ema" in name for name in content.files)
    return (
        f"A {kind} of {count:,} numbers, after {read_step(content.step_folder):,} steps"
        + (", with averaged weights beside it" if has_ema else "")
        + ". Trained with vla_foundry."
    )


def _commands(task: str | None, repo: str) -> list[str]:
    checkpoint = f"{_HUB}{repo}"
    pull = f"vla-foundry hub pull {checkpoint}    # or without: every --checkpoint takes {checkpoint}"
    if task == "robotics":
        return [
            f"vla-foundry serve --checkpoint {checkpoint}",
            f"vla-foundry evaluate --checkpoint {checkpoint} --simulator metaworld --tasks drawer-open-v3 --output out",
            pull,
        ]
    if task == "text-generation":
        return [f'vla-foundry generate --checkpoint {checkpoint} --prompt "Once upon a time"', pull]
    return [f"vla-foundry caption --checkpoint {checkpoint} --image photo.jpg", pull]


def _describe_spec(spec: DatasetSpec) -> list[str]:
    rate = f"{spec.fps:g} Hz" if spec.fps is not None else "an unknown rate"
    lines = [f"Cameras, and fields at {rate}:", "", "| camera | stored as | recorded as |", "|---|---|---|"]
    for name, camera in spec.cameras.items():
        original = "differs" if camera.original_size is None else _size(camera.original_size)
        depth = ", depth in mm" if camera.is_depth else ""
        lines.append(f"| `{name}` | {_size(camera.size)}{depth} | {original} |")
    lines += ["", "| field | width | role | unit | frame | means |", "|---|---|---|---|---|---|"]
    for name, field in spec.fields.items():
        meaning = ", ".join(filter(None, [field.representation, field.rotation]))
        lines.append(
            f"| `{name}` | {field.width} | {field.role} | {field.unit or ''} | {field.frame or ''} | {meaning} |"
        )
    return lines


def _size(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _describe_data(run: TrainExperimentParams) -> list[str]:
    shares = run.data.shares() if isinstance(run.data, MixtureDataParams) else {}
    lines = []
    for name, part in run.data.parts().items():
        share = f", {shares[name]:.1%} of the samples" if name in shares else ""
        lines += [f"- `{_last(manifest)}` ({part.type}{share})" for manifest in part.dataset_manifest]
    return lines or ["Not recorded."]


def _last(manifest: str) -> str:
    return hide_path(parent_uri(manifest))


def _describe_training(run: TrainExperimentParams, record: dict[str, Any]) -> list[str]:
    hparams, starts, end = run.hparams, record.get("starts") or [{}], record.get("end") or {}
    start = starts[-1]
    lines = [
        f"- {hparams.optimizer}, learning rate {hparams.lr:g} ({hparams.lr_scheduler}), global batch "
        f"{hparams.global_batch_size}, {hparams.precision}, seed {hparams.seed}",
    ]
    if end:
        early = f", stopped by {end['stopped_by']}" if end.get("stopped_by") else ""
        lines.append(f"- {end.get('samples', 0):,} samples in {end.get('step', 0):,} steps{early}")
    if start:
        changed = " with uncommitted changes" if start.get("is_dirty") else ""
        commit = f"commit {start['commit'][:12]}{changed}" if start.get("commit") else "an installed package"
        torch = (start.get("packages") or {}).get("torch", "?")
        lines.append(f"- {start.get('world_size')} x {start.get('device')}, torch {torch}, {commit}")
    for kind, losses in (record.get("losses") or {}).items():
        if losses:
            lines.append(f"- {kind} loss {losses[-1][1]:.4f} at step {losses[-1][0]:,}")
    if end:
        lines.append("- `experiment.json` holds all of it: `vla-foundry reproduce experiment.json` repeats the run")
    return lines


def _describe_evaluations(tables: Any) -> Iterator[str]:
    if not isinstance(tables, list) or not tables:
        yield "None was recorded."
        return
    for table in tables:
        yield f"**{table.get('name')}** (95% intervals)"
        yield ""
        yield "| metric | value | interval | n |"
        yield "|---|---|---|---|"
        for name, found in table["metrics"].items():
            values = found if isinstance(found, dict) else {"value": found}
            interval = values.get("interval")
            shown = f"{_number(interval[0])} to {_number(interval[1])}" if interval else ""
            yield f"| {name} | {_number(values.get('value'))} | {shown} | {values.get('n', '')} |"
        yield ""
        if table.get("settings"):
            yield f"Settings: `{json.dumps(table['settings'], ensure_ascii=False)}`"
            yield ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-" if value is None else str(value)


def _describe_dataset(content: Content, params: HubPushParams) -> tuple[dict[str, Any], list[str]]:
    is_lerobot = content.kind == "lerobot"
    is_robot = is_lerobot or content.spec is not None
    front = {
        "license": params.license,
        "task_categories": ["robotics"] if is_robot else None,
        "tags": ["LeRobot" if is_lerobot else "vla_foundry", *(["webdataset"] * (not is_lerobot)), *params.tags],
    }
    lines = [f"# {params.repo.partition('/')[2]}", ""]
    if is_lerobot:
        known = ("codebase_version", "robot_type", "fps", "total_episodes", "total_frames", "total_tasks")
        lines += ["A LeRobot dataset.", "", *(f"- {key}: {content.info[key]}" for key in known if key in content.info)]
        use = f"vla-foundry hub pull hf://datasets/{params.repo}"
    else:
        lines += ["Shards for training with vla_foundry (WebDataset tars with a manifest).", ""]
        lines += ["| manifest | samples | shards |", "|---|---|---|"]
        lines += [f"| `{name}` | {samples:,} | {shards:,} |" for name, (samples, shards) in content.manifests.items()]
        use = (
            f"vla-foundry train --data.dataset_manifest hf://datasets/{params.repo}/{next(iter(content.manifests))} ..."
        )
    lines += ["", "## Use", "```bash", use, "```", "", "## Intended use"]
    lines.append((params.intended_use or _INTENDED_USE).rstrip(".") + ".")
    if content.spec is not None:
        lines += ["", "## Robot", *_describe_spec(content.spec)]
    return front, lines
