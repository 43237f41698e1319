"""The two figures of a report for papers and slides, as PNG and SVG, drawn by matplotlib."""

import io
import warnings

import numpy as np

from vla_foundry.evaluation.report.contents import Contents, is_aggregate
from vla_foundry.evaluation.report.drawings import violin_outline
from vla_foundry.evaluation.report.tables import clean, percent

_BLUE = "#7d9bbd"


def draw_figures(contents: Contents) -> dict[str, bytes]:
    """Return {file name: content}: the violins of the last column, and the heat map.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "A report needs matplotlib, which is not installed: uv pip install 'vla-foundry[evaluation]'."
        ) from None
    files = {}
    # the same data gives the same file
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        # a letter that the font lacks is a box in the PNG; the SVG has it as text
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        for name, draw in (("violins", _draw_violins), ("heat_map", _draw_heat_map)):
            figure = Figure(dpi=110)
            FigureCanvasAgg(figure)
            draw(contents, figure)
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                file = io.BytesIO()
                figure.savefig(file, format=suffix, metadata=metadata)
                files[f"{name}.{suffix}"] = file.getvalue()
    return files


def _draw_violins(contents: Contents, figure) -> None:
    column = contents.columns[-1]
    models = contents.shown_on(column)
    figure.set_size_inches(9, 1.2 + 0.34 * len(models))
    axes = figure.add_axes((0.36, 0.8 / figure.get_figheight(), 0.55, 1 - 1.2 / figure.get_figheight()))
    for row, model in enumerate(models):
        violin = contents.violins[column.name, model]
        rates, heights = violin_outline(violin.parameters)
        axes.fill_between(rates, row - 0.4 * heights, row + 0.4 * heights, color=_BLUE, linewidth=0)
        axes.plot(violin.interval, (row, row), color="black", linewidth=1)
        axes.text(1.02, row, violin.letters, va="center", transform=axes.get_yaxis_transform())
        if violin.floor:
            axes.plot((violin.floor, violin.floor), (row - 0.4, row + 0.4), color="black", linestyle=":")
    axes.plot([contents.violins[column.name, model].rate for model in models], range(len(models)), "k.")
    axes.set_yticks(range(len(models)), [_short(model) for model in models])
    axes.set(xlim=(0, 1), ylim=(len(models) - 0.5, -0.5), xlabel=f"success rate, {_short(contents.title(column))}")
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)


def _draw_heat_map(contents: Contents, figure) -> None:
    columns = [column for column in contents.columns if not is_aggregate(column)]
    models, num = contents.models, len(contents.columns)
    rates = np.full((len(models), len(columns)), np.nan)
    for y, model in enumerate(models):
        for x, column in enumerate(columns):
            if violin := contents.violins.get((column.name, model)):
                rates[y, x] = violin.rate
    width, height = 4 + 0.6 * num, 3 + 0.3 * len(models)
    figure.set_size_inches(width, height)
    axes = figure.add_axes((3.4 / width, 0.1 / height, 0.6 * len(columns) / width, 0.3 * len(models) / height))
    axes.imshow(rates, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (y, x), rate in np.ndenumerate(rates):
        if not np.isnan(rate):
            color = "white" if rate > 0.6 else "black"
            axes.text(x, y, percent(rate), ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(models)), [_short(model) for model in models])
    axes.set_xticks(range(len(columns)), [_short(contents.title(column)) for column in columns])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    for label in axes.get_xticklabels():
        label.set(rotation=60, ha="left", rotation_mode="anchor")


def _short(text: str) -> str:
    text = clean(text)
    return text if len(text) <= 40 else f"{text[:39]}\N{HORIZONTAL ELLIPSIS}"
