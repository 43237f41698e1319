"""The report as one HTML page that needs no server and no network, and as Markdown."""

import html
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from vla_foundry.evaluation.comparison.compare import Column, PairResult
from vla_foundry.evaluation.comparison.family import FAMILY_NAME
from vla_foundry.evaluation.report.contents import (
    KINDS,
    Contents,
    is_aggregate,
    ordered_pair,
    shown_pairs,
)
from vla_foundry.evaluation.report.drawings import PATTERNS, draw_bars, draw_differences, draw_seeds, draw_violins
from vla_foundry.evaluation.report.tables import Table, escape, escape_markdown, percent

# nothing is loaded or run, whatever the data held
_HEAD = """<!doctype html><html lang=en><head><meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name=viewport content="width=device-width,initial-scale=1"><title>{title}</title><style>
body{{font:15px/1.45 system-ui,sans-serif;color:#111;background:#fff;max-width:1240px;margin:0 auto}}
body{{padding:0 12px 40px}}h1{{font-size:1.5em}}h2{{margin-top:1.8em;border-bottom:2px solid #1b3a5c}}
h1,figcaption,summary,li,p{{overflow-wrap:anywhere}}td,th{{overflow-wrap:break-word}}
.cards{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:16px;align-items:start}}
figure{{margin:8px 0;min-width:0}}figcaption{{font-weight:600;margin:4px 0}}
svg[role]{{width:100%;max-width:560px;height:auto;display:block;font-family:inherit}}
svg text{{paint-order:stroke;stroke:#fff;stroke-width:3px}}
.scroll{{overflow-x:auto;max-width:100%;margin:6px 0}}table{{border-collapse:collapse;font-size:13px}}
caption{{text-align:left;font-weight:600;padding:4px 0}}tbody th{{max-width:26em;min-width:10em;font-weight:400}}
th,td{{border:1px solid #bbb;padding:2px 6px;text-align:left;vertical-align:top}}.seeds td{{min-width:12em}}
.n,.heat td{{text-align:right;white-space:nowrap}}.heat th{{font-weight:400;max-width:12em;min-width:5.5em}}
.heat thead th{{vertical-align:bottom;max-width:6.5em}}.heat small{{display:block}}
details{{border:1px solid #ccc;border-radius:4px;padding:4px 8px;margin:6px 0;min-width:0}}
summary{{cursor:pointer;padding:4px 0}}
{style}
@media print{{td{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}}}</style></head><body>"""
# the heat map's shades, from white to dark, in steps of 10%
_NUM_SHADES = 11
# so many pairs are told in words
_FEW_PAIRS = 10


def write_page(contents: Contents, title: str, recordings: Sequence[Path], folder: Path) -> str:
    """Return the page.

    Args:
        recordings: videos and pictures to link.
        folder: where the page will lie.
    """
    parts = [begin_page(title, _shades())]
    parts += [_facts(contents), _overview(contents), _heat_map(contents), _violins(contents), _differences(contents)]
    if contents.against is not None:
        parts.append(section("Against a published policy", contents.tables["against"].to_html()))
    parts += [_seeds(contents), _failures(contents), _floor(contents), _budget(contents)]
    parts.append(_recordings(recordings, folder))
    return "\n".join(parts) + "</body></html>\n"


def begin_page(title: str, style: str = "") -> str:
    """Return the beginning of a page, up to its title.

    Args:
        style: CSS besides that of all pages.
    """
    return f"{_HEAD.format(title=escape(title), style=style)}{PATTERNS}<h1>{escape(title)}</h1>"


def describe(contents: Contents) -> list[str]:
    """Say how the comparison was made, a line each."""
    family = contents.comparison.family
    over = "each task, and the mean over tasks," if family.scope == "column" else "all tasks and their mean together"
    declared = (
        f"{FAMILY_NAME} declares the family (SHA-256 {contents.digest[:16]})."
        if contents.digest
        else "No family was declared beforehand."
    )
    shown = len(contents.models)
    compared = {model for column in contents.comparison.columns for model in column.models}
    others = sorted(set(contents.rollouts.table["model"].unique().to_pylist()) - compared)
    aside = f"Not compared, being outside the family or without a rollout that counts: {', '.join(others)}."
    return [
        f"All pairs of {len(family.models)} models are compared. {declared}"
        + (f" {shown} of them are shown here, which changes no letter." if shown < len(family.models) else ""),
        f"Two models that share a letter are not told apart. If all are equal, any are told apart on {over} with a "
        f"probability of at most {percent(float(family.alpha))}%.",
        "Tasks are compared by a sequential test (STEP), the mean over tasks by a group-sequential one: both may be "
        "looked at while rollouts come in, up to the number that was planned.",
        "Invalid episodes, in which the simulator or the infrastructure failed, are not trials.",
        *([aside] if others else []),
        *contents.comparison.notes,
        *_verdicts(contents),
    ]


def _verdicts(contents: Contents) -> Iterator[str]:
    """Say which pairs the last column tells apart, if they are few, and how much of the budget was run."""
    column = contents.columns[-1]
    pairs = shown_pairs(column, contents.models)
    for pair in pairs if len(pairs) <= _FEW_PAIRS else ():
        first, second, *_ = ordered_pair(pair, column)
        if pair.better is None:
            verdict = f"{first} and {second} are not told apart after"
        else:
            verdict = f"{pair.better} is better than {second if pair.better == first else first}, decided after"
        yield f"{contents.title(column)}: {verdict} {pair.num_rollouts} of {column.n_max} rollouts of each."
    _, _, planned, run, *_ = zip(*contents.tables["budget"].rows, strict=True)
    yield f"{sum(run):,} of {sum(planned):,} planned rollouts were run; {sum(planned) - sum(run):,} are saved so far."


def write_markdown(contents: Contents, title: str) -> str:
    """Return the report as Markdown; the pairs of single tasks and the seeds are in the CSV files only."""
    last = contents.columns[-1].name
    tables = [
        contents.tables["rates"].only(last, f"{last}: success rates with the 95% interval of the posterior"),
        _rates_by_task(contents),
        contents.tables["pairs"].only(last, f"{last}: differences of pairs with the 95% interval of each alone"),
        *(contents.tables[name] for name in ("against", "readings", "failures", "reasons", "trivial", "budget")
          if name in contents.tables),
    ]  # fmt: skip
    parts = [
        f"# {escape_markdown(title)}\n",
        "\n".join(f"- {escape_markdown(line)}" for line in describe(contents)) + "\n",
    ]
    parts += [f"**{escape_markdown(table.caption)}**\n\n{table.to_markdown()}" for table in tables if table.rows]
    return "\n".join(parts)


def _rates_by_task(contents: Contents) -> Table:
    columns = [column for column in contents.columns if not is_aggregate(column)]
    rows = []
    for model in contents.models:
        found = [contents.violins.get((column.name, model)) for column in columns]
        rows.append((model, *(each and f"{percent(each.rate)} {each.letters}" for each in found)))
    titles = {"model": "text"} | {column.name: "text" for column in columns}
    return Table(name="by_task", caption="Success rates in percent and letters, by task", columns=titles, rows=rows)


def section(title: str, *parts: str) -> str:
    """Return a section of a page: a title, which is HTML, and its parts."""
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def figure(title: str, drawing: str, table: str) -> str:
    """Return a drawing with its title above and a table with its numbers below."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}{table}</figure>"


def folded(title: str, *parts: str) -> str:
    """Return what a reader unfolds by a click on its title."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def _facts(contents: Contents) -> str:
    lines = "".join(f"<li>{escape(line)}" for line in describe(contents))
    return f"<ul>{lines}</ul>"


def _draw_violins(contents: Contents, column: Column) -> str:
    violins = [contents.violins[column.name, model] for model in contents.shown_on(column)]
    label = f"{contents.title(column)}: posteriors of success rates; the table below has the numbers"
    return draw_violins(violins, label)


def _overview(contents: Contents) -> str:
    column = contents.columns[-1]
    text = (
        "<p>Each shape is the posterior of a success rate (uniform prior), the line its 95% interval, the dot the "
        "rate. A dashed line is the floor: the rate of a policy that does nothing."
    )
    left = f"<p>Left out, because some model lacks it: {escape(', '.join(column.left_out))}." if column.left_out else ""
    table = contents.tables["rates"].only(column.name, f"{contents.title(column)}: success rates")
    return section(
        "Success rates",
        text,
        left,
        figure(contents.title(column), _draw_violins(contents, column), table.to_html()),
        contents.tables["readings"].to_html(),
    )


def _violins(contents: Contents) -> str:
    cards = []
    for column in contents.columns:
        if not is_aggregate(column) and len(contents.columns) > 1:
            table = contents.tables["rates"].only(column.name, f"{contents.title(column)}: success rates")
            drawing = _draw_violins(contents, column)
            cards.append(figure(contents.title(column), drawing, folded("Table", table.to_html())))
    return section("Each task", f'<div class="cards">{"".join(cards)}</div>') if cards else ""


def _heat_map(contents: Contents) -> str:
    columns = [column for column in contents.columns if not is_aggregate(column)]
    # a line may break after an arrow
    head = "".join(f"<th scope=col>{escape(contents.title(column))}" for column in columns).replace("→", "→<wbr>")
    rows = []
    for model in contents.models:
        cells = [_heat_cell(contents, column, model) for column in columns]
        rows.append(f"<tr><th scope=row>{escape(model)}{''.join(cells)}")
    caption = "Success rate in percent, and letters within the task; darker is higher"
    return section(
        "Heat map",
        f'<div class="scroll heat" tabindex=0 role=region aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr><th scope=col>model{head}<tbody>{''.join(rows)}</table></div>",
    )


def _heat_cell(contents: Contents, column: Column, model: str) -> str:
    violin = contents.violins.get((column.name, model))
    if violin is None:
        return "<td>-"
    shade = round(violin.rate * (_NUM_SHADES - 1))
    return f"<td class=h{shade}>{percent(violin.rate)}<small>{violin.letters}</small>"


def _shades() -> str:
    rules = []
    for number in range(_NUM_SHADES):
        share = number / (_NUM_SHADES - 1)
        red, green, blue = (round(255 + share * (dark - 255)) for dark in (16, 48, 82))
        rules.append(f".h{number}{{background:rgb({red},{green},{blue});color:{'#fff' if share > 0.45 else '#000'}}}")
    return "".join(rules)


def _differences(contents: Contents) -> str:
    parts = []
    for column in reversed(contents.columns):
        pairs = shown_pairs(column, contents.models)
        if pairs:
            parts.append(_pairs_of(contents, column, pairs))
    text = (
        "<p>Rate of the first model minus that of the second, with the 95% interval of this pair alone. A filled dot: "
        "the pair is separated in its family. Rollouts of each: how many the decision took."
    )
    return section("Differences between pairs", text, *parts) if parts else ""


def _pairs_of(contents: Contents, column: Column, pairs: Sequence[PairResult]) -> str:
    rows = []
    for pair in pairs:
        first, second, difference, interval = ordered_pair(pair, column)
        rows.append((f"{first} \N{MINUS SIGN} {second}", difference, interval, pair.better is not None))
    num_separated = sum(pair.better is not None for pair in pairs)
    title = contents.title(column)
    drawing = draw_differences(rows, f"{title}: differences of pairs; the table below has the numbers")
    table = contents.tables["pairs"].only(column.name, f"{title}: differences of pairs")
    return folded(f"{title}: {num_separated} of {len(pairs)} pairs separated", drawing, table.to_html())


def _seeds(contents: Contents) -> str:
    parts = []
    for column in contents.columns:
        models = contents.shown_on(column)
        if is_aggregate(column) or not models:
            continue
        seeds = sorted({seed for model in models for seed in contents.outcomes[model, column.name]})
        rows = [(model, [contents.outcomes[model, column.name].get(seed) for seed in seeds]) for model in models]
        title = f"{contents.title(column)}: seeds {seeds[0]} to {seeds[-1]}"
        drawing = draw_seeds(rows, f"{title}, outcome of each; the table below lists them")
        table = contents.tables["seeds"].only(column.name, title).to_html()
        parts.append(folded(title, drawing, f'<div class="seeds">{table}</div>'))
    text = (
        "<p>One mark per seed, from left to right. Full bar: success; light full bar: success of a start that succeeds "
        "by itself; low mark: failure; high red mark: invalid; nothing: not run."
    )
    return section("Every seed", text, *parts)


def _failures(contents: Contents) -> str:
    table, reasons = contents.tables["failures"], contents.tables["reasons"]
    rows = [(row[0], row[1:], f"{sum(row[3:6])} invalid") for row in table.rows]
    drawing = draw_bars(rows, KINDS, "Episodes by outcome; the table has the numbers")
    more = reasons.to_html() if reasons.rows else "<p>No episode left a message."
    return section("Failures and invalid episodes", figure(table.caption, drawing, table.to_html()), more)


def _floor(contents: Contents) -> str:
    table = contents.tables["trivial"]
    if not table.rows:
        return section("Floor", "<p>No start is known to succeed by itself. A null policy shows whether there are any.")
    rows = [(f"{row[0]}: {row[1]}", (row[2], row[3] - row[2]), f"{percent(row[4])}%") for row in table.rows]
    drawing = draw_bars(
        rows, ("trivial", "other starts"), "Starts that succeed by themselves; the table has the numbers"
    )
    text = "<p>The null policy, or nearly every model of the set, succeeds on these starts before a policy can act."
    return section("Floor", text, figure(table.caption, drawing, table.to_html()))


def _budget(contents: Contents) -> str:
    table = contents.tables["budget"]
    rows = [(row[0], (row[3], row[4]), f"{row[3]:,} of {row[2]:,}") for row in table.rows]
    drawing = draw_bars(rows, ("run", "not run"), "Rollouts run and planned; the table has the numbers")
    return section("Budget", figure(table.caption, drawing, table.to_html()))


def _recordings(paths: Sequence[Path], folder: Path) -> str:
    if not paths:
        return section("Recordings", "<p>There are no videos or pictures below the results.")
    links = []
    for path in paths:
        place = os.path.relpath(path, folder)
        href = html.escape(quote(os.fsencode(place).replace(os.sep.encode(), b"/")))
        links.append(f'<li><a href="{href}" target=_blank>{escape(place)}</a>')
    return section("Recordings", folded(f"{len(paths)} videos and pictures", f"<ul>{''.join(links)}</ul>"))
