"""`vla-foundry report DIR`: compare the policies of a folder, and write a page, tables and figures.

<output>/report.html              everything on one page, without a server or the network
<output>/report.md                its main tables
<output>/<table>.csv              each table in full; rates as fractions
<output>/violins.png, .svg        posteriors of the success rates over all tasks
<output>/heat_map.png, .svg       success rates by model and task
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vla_foundry.config.command_line import parse_command
from vla_foundry.evaluation.comparison.compare import AgainstPublished, Comparison, compare, compare_against
from vla_foundry.evaluation.comparison.family import FAMILY_NAME, Family, read_family
from vla_foundry.evaluation.comparison.published import find_published
from vla_foundry.evaluation.comparison.rollouts import Rollouts, count_outcomes, read_rollouts
from vla_foundry.evaluation.report.contents import Contents, collect, is_aggregate
from vla_foundry.evaluation.report.figures import draw_figures
from vla_foundry.evaluation.report.page import write_markdown, write_page
from vla_foundry.params.commands.evaluation import ComparisonParams, ReportParams
from vla_foundry.registry import unknown_name_message
from vla_foundry.storage.uri import write_bytes

PAGE_NAME = "report.html"
_RECORDINGS = (".mp4", ".webm", ".gif")
_PICTURES = ("contact_sheet.png", "pictures.png", "recording.html")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The policies of a folder, compared: what a reader picks is taken from it."""

    root: Path
    rollouts: Rollouts
    comparison: Comparison
    # models that have rollouts which count
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    # name of a published policy, and the comparisons with it
    against: str | None
    published: tuple[AgainstPublished, ...]
    # SHA-256 of the declared family; None: none was declared
    digest: str | None

    @property
    def title(self) -> str:
        """Return the title of the report."""
        return f"Comparison of policies: {self.root.resolve().name}"

    def pick(self, models: Sequence[str], tasks: Sequence[str]) -> Contents:
        """Return what a report of some models, and tasks or groups of tasks, shows; empty: of all.

        Raises:
            ValueError: a name is unknown.
        """
        return collect(
            self.rollouts,
            self.comparison,
            models=_pick("model", models, self.models, {}),
            tasks=_pick("task", tasks, self.tasks, _other_names(self.rollouts, self.tasks)),
            against=self.against,
            published=self.published,
            digest=self.digest,
        )

    def render(self, contents: Contents, folder: Path) -> dict[str, bytes]:
        """Return {file name: content} of a report that will lie in a folder."""
        files = {f"{name}.csv": table.to_csv().encode() for name, table in contents.tables.items()}
        files |= draw_figures(contents)
        files["report.md"] = write_markdown(contents, self.title).encode()
        files[PAGE_NAME] = write_page(contents, self.title, find_recordings(self.root), folder.resolve()).encode()
        return files


def compare_folder(params: ComparisonParams) -> Compared:
    """Read and compare the policies of a folder.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: a name is unknown, a result file or the family is broken, or more was run than planned.
    """
    root = Path(params.results)
    rollouts = read_rollouts(root, duplicates=params.duplicates)
    declared = read_family(root)
    comparison = compare(rollouts, _family(params, declared, rollouts))
    if not comparison.columns:
        raise ValueError(
            f"{root} holds no rollouts that count yet: all {len(rollouts.table)} are pending or invalid, or "
            f"{FAMILY_NAME} does not declare their model or task."
        )
    family = comparison.family
    comparison = replace(comparison, notes=(*_late_declarations(declared, rollouts), *comparison.notes))
    against = []
    if params.against is not None:
        rates = count_outcomes(rollouts.table)
        published = find_published(params.against)
        against = compare_against(rates, published, models=family.models, alpha=float(family.alpha))
        if not against:
            raise ValueError(
                f"against: no task here was published for {params.against}; it has: {', '.join(sorted(published))}."
            )
    there = {model for column in comparison.columns for model in column.models}
    return Compared(
        root=root,
        rollouts=rollouts,
        comparison=comparison,
        models=tuple(model for model in family.models if model in there),
        tasks=tuple(column.name for column in comparison.columns if not is_aggregate(column)),
        against=params.against,
        published=tuple(against),
        digest=declared.digest if declared else None,
    )


def write_report(params: ReportParams) -> Path:
    """Write the report of a folder.

    Returns:
        The page.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: a name is unknown, a result file or the family is broken, or more was run than planned.
    """
    compared = compare_folder(params)
    folder = Path(params.output) if params.output is not None else compared.root / "report"
    for name, content in compared.render(compared.pick(params.models, params.tasks), folder).items():
        write_bytes(str(folder / name), content)
    if params.against is None:
        # of an earlier report of other results
        (folder / "against.csv").unlink(missing_ok=True)
    return folder / PAGE_NAME


def _family(params: ComparisonParams, family: Family | None, rollouts: Rollouts) -> Family | None:
    if params.family is None or (family and family.scope == params.family):
        return family
    if family is None:
        models = sorted(set(rollouts.table["model"].to_pylist()))
        return Family(models=tuple(models), scope=params.family)
    if params.family == "column":
        raise ValueError(
            f"{FAMILY_NAME} declares the family 'all'; --family column would correct for fewer comparisons."
        )
    return replace(family, scope="all")


def _late_declarations(family: Family | None, rollouts: Rollouts) -> list[str]:
    """Return a warning if models have rollouts that were begun under another declaration than the present one."""
    digest = family and family.digest
    late = sorted(model for model, begun in rollouts.declared.items() if begun != {digest})
    if not late:
        return []
    changed = "declared or changed" if family else "removed"
    return [
        f"WARNING: {FAMILY_NAME} was {changed} after rollouts of {', '.join(late)} had begun. A family that is chosen "
        "with outcomes in sight does not hold its error."
    ]


def _pick(
    kind: str, picked: Sequence[str], known: Sequence[str], others: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Return the names that a reader picked, or all."""
    for name in picked:
        if name not in known and name not in others:
            raise ValueError(unknown_name_message(kind, name, [*known, *others]))
    chosen = {each for name in picked for each in ([name] if name in known else others[name])}
    return tuple(name for name in known if not picked or name in chosen)


def _other_names(rollouts: Rollouts, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the tasks of each group, and of each name that is shown for a task."""
    shown = {rollouts.task_names.get(task, task): (task,) for task in tasks}
    return shown | dict(rollouts.task_groups)


def find_recordings(root: Path) -> list[Path]:
    """Return videos and pictures below a folder of results, without following links to other folders."""
    found = []
    for folder, _, names in os.walk(root.resolve()):
        found += [Path(folder, name) for name in names if is_recording(name)]
    return sorted(found, key=lambda path: (len(path.parts), path))


def is_recording(name: str) -> bool:
    """Return whether a file of this name is a video or picture of episodes."""
    return name.endswith(_RECORDINGS) or name in _PICTURES


def main(argv: list[str]) -> None:
    """Run `vla-foundry report`: print the place of the page."""
    params = parse_command(ReportParams, argv, prog="vla-foundry report", positional=("results",))
    sys.stdout.write(f"{write_report(params)}\n")
