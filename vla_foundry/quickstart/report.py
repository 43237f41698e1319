"""The quickstart's report: one HTML page of what is there so far, which needs no server, no network and no script."""

import base64
import difflib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vla_foundry.datagen.scene_captions import score_captions
from vla_foundry.evaluation.comparison.compare import Comparison
from vla_foundry.evaluation.pictures import animate_film
from vla_foundry.evaluation.report.command import PAGE_NAME, compare_folder
from vla_foundry.evaluation.report.drawings import Curve, draw_curves, draw_violins
from vla_foundry.evaluation.report.page import begin_page, figure, folded, section
from vla_foundry.evaluation.report.tables import Table, columns_of, escape
from vla_foundry.evaluation.results import EpisodeResult, find_results, read_results
from vla_foundry.params.commands.evaluation import ComparisonParams
from vla_foundry.parsing import parse_object
from vla_foundry.quickstart.llm import GENERATED_NAME, LOSSES_NAME
from vla_foundry.quickstart.steps import Step, read_times, shown_command
from vla_foundry.quickstart.vla import LABELS, NUM_FILMED, TASKS, decisions, format_ablations, rate_cells
from vla_foundry.quickstart.vlm import CAPTIONS_NAME, ROWS
from vla_foundry.run_folder import METRICS_NAME

# held-out scenes on the page: the first ones
_NUM_SCENES = 12
_STYLE = """img{max-width:100%;display:block;border-radius:4px;background:#eee}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:16px}
.films{grid-template-columns:repeat(auto-fill,minmax(min(100%,290px),1fr))}
@media(max-width:600px){.scenes{grid-template-columns:1fr 1fr}}
.pictures img{width:100%;aspect-ratio:1}.pair{display:grid;grid-template-columns:1fr 1fr;gap:6px}
.small{font-size:13px;margin:4px 0}mark{background:#ffd9d4;color:#111;text-decoration:line-through}
ins{background:#d5ecd5;color:#111;text-decoration:none}.right{color:#12591f;font-weight:600}
.wrong{color:#a11d16;font-weight:600}.missing{border-left:4px solid #b3261e;padding:2px 8px;background:#fbeeed}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f4f4f4;padding:6px 8px;margin:4px 0;font-size:13px}
.n{white-space:nowrap}"""
# what a damaged or foreign file raises
_FAULTS = (OSError, ValueError, LookupError, TypeError)


def write_page(output_dir: Path, steps: Sequence[Step], markers: Path) -> Path:
    """Write the page.

    Args:
        output_dir: folder of the quickstart; a stage that has not run, and a file that is missing or damaged, is said.
        steps: of the quickstart so far, in order.
        markers: folder of their times.

    Returns:
        The page.
    """
    parts = [
        begin_page("From text to a robot: the quickstart", _STYLE),
        "<p>One model in three stages: it learns words, then pictures, then actions. Everything here was made on this "
        "machine by the commands at the end of the page. Goals:<ul>",
        *(f"<li>{_guard(name, goal)}" for name, goal in _goals(output_dir)),
        "</ul>",
        _stage(output_dir, "llm", "1. A language model", _language_parts),
        _stage(output_dir, "vlm", "2. A vision-language model, which starts from it", _vision_parts),
        _stage(output_dir, "vla", "3. A policy, which starts from that", _action_parts),
        section("Times and commands", *_steps(steps, markers)),
        "</body></html>\n",
    ]
    page = output_dir / PAGE_NAME
    partial = page.with_suffix(".partial")
    partial.write_text("\n".join(parts), encoding="utf-8")
    partial.replace(page)
    return page


def _guard(what: str, draw: Callable[[], str]) -> str:
    """Return what is drawn, or say why it cannot be."""
    try:
        return draw()
    except FileNotFoundError as error:
        missing = f"{error.filename} does not exist yet." if error.filename else str(error)
        reason = f"{missing} Run the quickstart again: it makes what is missing."
    except _FAULTS as error:
        reason = f"it cannot be shown: {error}. Delete the file and run the quickstart again."
    return f"<p class=missing><b>{escape(what)}</b>: {escape(reason)}"


def _stage(output_dir: Path, name: str, title: str, draw: Callable[[Path], dict[str, Callable[[], str]]]) -> str:
    folder = output_dir / name
    if not folder.is_dir():
        return section(title, "<p>This stage has not run. <code>vla-foundry quickstart</code> runs all of them.")
    return section(title, *(_guard(what, part) for what, part in draw(folder).items()))


def _goals(output_dir: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each stage that has begun, and what says whether its goal is reached."""
    goals = {"llm": _language_goal, "vlm": _vision_goal, "vla": _action_goal}
    for name, goal in goals.items():
        if (output_dir / name).is_dir():
            yield name, lambda goal=goal, name=name: goal(output_dir / name)


def _goal(text: str, *, is_reached: bool) -> str:
    return f"{escape(text)}: {_verdict(is_reached, 'reached' if is_reached else 'missed')}"


def _language_goal(folder: Path) -> str:
    losses = _read_losses(folder)
    gain = losses["unigram"] - losses["held_out"]
    text = f"the language model predicts a token by {gain:.2f} nats better than word frequencies do (goal: 1)"
    return _goal(text, is_reached=gain >= 1)


def _vision_goal(folder: Path) -> str:
    scores = score_captions(*_read_captions(folder)[1:])
    found = [(scores[name].accuracy, goal, label) for name, (label, goal) in ROWS.items() if goal]
    accuracy, goal, label = min(found, key=lambda row: row[0] - row[1])
    text = f"the vision-language model describes scenes it has not seen; at worst, {label}: {accuracy:.0%}"
    return _goal(f"{text} (goal: {goal:.0%})", is_reached=accuracy >= goal)


def _action_goal(folder: Path) -> str:
    comparison = _compare(folder)
    mean = comparison.columns[-1]
    if missing := [label for model, label in LABELS.items() if model not in mean.means]:
        return escape(f"the policy is still to be compared with: {', '.join(missing)}")
    rates = {model: f"{mean.means[model]:.0%}" for model in LABELS}
    is_better = any(
        pair.better == "policy" and {pair.first, pair.second} == {"policy", "from_nothing"} for pair in mean.pairs
    )
    text = (
        f"the policy succeeds in {rates['policy']} of episodes (goal: 80%), the same from nothing in "
        f"{rates['from_nothing']}, no motion in {rates['null']}, random motion in {rates['random']}"
    )
    return _goal(text, is_reached=mean.means["policy"] >= 0.8 and is_better)


def _language_parts(folder: Path) -> dict[str, Callable[[], str]]:
    def losses() -> str:
        found = _read_losses(folder)
        rows = [(label, f"{found[name]:.3f}") for name, label in
                (("held_out", "this model"), ("unigram", "a unigram model, which ignores context"))]  # fmt: skip
        caption = "Loss on held-out documents, nats per token"
        return Table(name="losses", caption=caption, columns=columns_of(("text", "model", "loss")), rows=rows).to_html()

    def generated() -> str:
        return f"<p>How it continues two beginnings:<pre>{_lines(_read_lines(folder / GENERATED_NAME))}</pre>"

    return {
        "loss": lambda: _draw_losses({"language model": folder / "runs" / "llm"}),
        "losses": losses,
        "text": generated,
    }


def _vision_parts(folder: Path) -> dict[str, Callable[[], str]]:
    def scores() -> str:
        found = score_captions(*_read_captions(folder)[1:])
        rows = []
        for name, (label, goal) in ROWS.items():
            score = found[name]
            rows.append((label, score.accuracy, score.chance, score.constant, goal))
        columns = columns_of(("text", "right, of held-out scenes"), ("rate", "model", "chance", "constant", "goal"))
        note = "<p class=small>Constant: the best single answer for all pictures."
        return Table(name="scores", caption="Captions of held-out scenes", columns=columns, rows=rows).to_html() + note

    return {
        "loss": lambda: _draw_losses({"vision-language model": folder / "runs" / "vlm"}),
        "captions": lambda: _draw_captions(folder),
        "scores": scores,
    }


def _action_parts(folder: Path) -> dict[str, Callable[[], str]]:
    runs = {LABELS["policy"]: folder / "runs" / "vla", "from nothing": folder / "runs" / "vla_from_nothing"}
    ablations = folder / "ablations"
    shown = {
        "ablations": lambda: (
            f"<p>Without its own pictures or instruction:<pre>{_lines(format_ablations(ablations))}</pre>"
        )
    }
    return {
        "loss": lambda: _draw_losses(runs),
        "comparison": lambda: _draw_comparison(folder),
        **(shown if ablations.is_dir() else {}),
        "episodes": lambda: _draw_episodes(folder / "evaluation"),
        "errors of actions": lambda: (
            "<p>Errors of its actions on held-out demonstrations:<pre>"
            f"{_lines(_read_lines(folder / 'action_error.txt'))}</pre>"
        ),
    }


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(map(escape, lines))


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")


def _read_losses(folder: Path) -> dict[str, float]:
    found = _read_json(folder / LOSSES_NAME)
    return {name: float(found[name]) for name in ("held_out", "unigram")}


def _read_captions(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the pictures of held-out scenes, what the model said, and what is true."""
    rows = _read_json(folder / CAPTIONS_NAME)["captions"]
    names, captions, truths = ([str(row[key]) for row in rows] for key in ("picture", "caption", "truth"))
    return names, captions, truths


def _read_json(path: Path) -> dict:
    return parse_object(path.read_bytes(), str(path))


def _draw_losses(runs: dict[str, Path]) -> str:
    """Draw the losses in training of one or two runs, and those on held-out data as dots."""
    curves, rows = [], []
    for (name, run), mark in zip(runs.items(), ("line", "dashes"), strict=False):
        if not (run / METRICS_NAME).exists() and curves:
            continue
        found: dict[str, list[tuple[float, float]]] = {"train": [], "validation": []}
        for line in (run / METRICS_NAME).read_text(encoding="utf-8").splitlines():
            values = parse_object(line, str(run / METRICS_NAME))
            found.get(str(values["kind"]), []).append((float(values["step"]), float(values["loss"])))
        curves.append(Curve(name=name, points=found["train"], mark=mark))
        if found["validation"]:
            curves.append(Curve(name="held out", points=found["validation"], mark="dots"))
        rows += [(name, f"{step:g}", f"{loss:.4g}") for step, loss in found["train"]]
    table = Table(name="losses", caption="Losses in training", columns=columns_of(("text", "run", "step", "loss")),
                  rows=rows)  # fmt: skip
    drawing = draw_curves(curves, "Loss in training over steps; the table below has the numbers", unit="loss")
    return figure("Loss in training", drawing, folded("Table", table.to_html()))


def _draw_captions(folder: Path) -> str:
    """Show the first held-out scenes with what the model says about them: wrong words struck out, right ones added."""
    cards = []
    for name, caption, truth in list(zip(*_read_captions(folder), strict=True))[:_NUM_SCENES]:
        picture = (folder / "scenes" / "validation" / Path(name).name).read_bytes()
        is_right = caption.strip() == truth
        verdict = _verdict(is_right, "right" if is_right else "not in every word")
        said = escape(caption.strip()) if is_right else _mark_words(caption.strip(), truth)
        shown = _image(picture, "image/png", f"A held-out scene: {truth}")
        cards.append(f"<figure>{shown}<p class=small>{verdict}<p class=small>{said}</figure>")
    text = (
        f"<p>The first {len(cards)} held-out scenes, and the model's captions. Words that are wrong are <mark>struck "
        "out</mark>, and the <ins>true ones</ins> added. Places are cells of a 16 x 16 grid."
    )
    return f'{text}<div class="pictures scenes">{"".join(cards)}</div>'


def _mark_words(said: str, truth: str) -> str:
    first, second = said.split(), truth.split()
    parts = []
    for kind, start, end, true_start, true_end in difflib.SequenceMatcher(None, first, second, False).get_opcodes():
        ours, theirs = escape(" ".join(first[start:end])), escape(" ".join(second[true_start:true_end]))
        if kind == "equal":
            parts.append(ours)
        else:
            parts += [f"<mark>{ours}</mark>"] * bool(ours) + [f"<ins>{theirs}</ins>"] * bool(theirs)
    return " ".join(parts)


def _image(content: bytes, kind: str, text: str) -> str:
    return f'<img alt="{escape(text)}" src="{_address(content, kind)}">'


def _address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _verdict(is_right: bool, text: str) -> str:
    mark, name = ("✓", "right") if is_right else ("✗", "wrong")
    return f"<span class={name}>{mark} {escape(text)}</span>"


def _compare(folder: Path) -> Comparison:
    return compare_folder(ComparisonParams(results=str(folder / "evaluation"))).comparison


def _draw_comparison(folder: Path) -> str:
    compared = compare_folder(ComparisonParams(results=str(folder / "evaluation")))
    contents = compared.pick((), ())
    column = contents.columns[-1]
    violins = [replace(contents.violins[column.name, model], model=LABELS.get(model, model))
               for model in contents.shown_on(column)]  # fmt: skip
    heads, rows = rate_cells(compared.comparison)
    table = Table(
        name="policies",
        caption="Successes of rollouts; policies that share a letter are not told apart",
        columns=columns_of(("text", "policy", *heads)),
        rows=rows,
    )
    drawing = draw_violins(violins, "Posteriors of success rates over all tasks; the table below has the numbers")
    lines = "".join(f"<li>{escape(line)}" for line in (*decisions(compared.comparison), *compared.comparison.notes))
    more = folder / "evaluation" / "report" / PAGE_NAME
    link = f'<p><a href="vla/evaluation/report/{PAGE_NAME}">The whole comparison, and how its errors are controlled</a>'
    return (
        figure("Success in closed loop", drawing, table.to_html()) + f"<ul>{lines}</ul>{link if more.exists() else ''}"
    )


def _draw_episodes(results: Path) -> str:
    """Show the films of the first episodes of each task, both policies beside each other."""
    cards = []
    for task in TASKS:
        films = {model: _find_films(results / model / task) for model in ("policy", "from_nothing")}
        for seed in sorted(set().union(*films.values()))[:NUM_FILMED]:
            pair = "".join(_draw_film(LABELS[model], *found[seed]) for model, found in films.items() if seed in found)
            cards.append(
                f"<figure><figcaption>{escape(task)}, start {seed}</figcaption><div class=pair>{pair}</div></figure>"
            )
    if not cards:
        return "<p>No episode was filmed yet."
    text = "<p>The first starts of each task, as the policies see them. Films end with the episode, and begin again."
    return f'{text}<div class="pictures films">{"".join(cards)}</div>'


def _find_films(folder: Path) -> dict[int, tuple[EpisodeResult, Path]]:
    path = find_results(folder)
    if path is None:
        return {}
    found = {}
    for episode in read_results(path)[0]:
        film = path.parent / folder.name / f"demonstration_{episode.seed}" / "video.mp4"
        if episode.outcome is not None and film.exists():
            found[episode.seed] = episode, film
    return found


def _draw_film(label: str, episode: EpisodeResult, film: Path) -> str:
    animation, still = animate_film(film.read_bytes())
    verdict = _verdict(episode.outcome == "success", str(episode.outcome))
    image = _image(animation, "image/webp", f"{label}: {episode.instruction}, {episode.outcome}")
    calm = f'<source media="(prefers-reduced-motion:reduce)" srcset="{_address(still, "image/webp")}">'
    words = f"“{escape(str(episode.instruction))}” {verdict} after {episode.num_steps} steps"
    return f"<div><picture>{calm}{image}</picture><p class=small>{escape(label)}<p class=small>{words}</div>"


def _steps(steps: Sequence[Step], markers: Path) -> Iterator[str]:
    rows, commands = [], []
    for step in steps:
        seconds, cpu_seconds = read_times(markers, step) or (None, None)
        if not step.is_repeated:
            rows.append((step.what, seconds, cpu_seconds))
        if step.words:
            commands.append(f"<p class=small>{escape(step.what)}<pre>{escape(shlex.join(shown_command(step)))}</pre>")
    known = [row for row in rows if row[1] is not None]
    rows.append(("all of these", sum(row[1] for row in known), sum(row[2] for row in known)))
    caption = "What each step took, the last time that it ran"
    columns = columns_of(("text", "step"), ("seconds", "seconds", "CPU seconds"))
    yield Table(name="times", caption=caption, columns=columns, rows=rows).to_html()
    yield folded("The commands, each of which runs alone", *commands)
