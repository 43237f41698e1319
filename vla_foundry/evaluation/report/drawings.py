"""Figures of a report as inline SVG: 400 units wide, so that a phone shows them at full size; one row per model.

Marks differ in shape and lightness, not in colour alone. The page puts a table with the same numbers below each.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vla_foundry.evaluation.report.tables import clean, escape, percent

_WIDTH = 400
_LEFT, _RIGHT = 8, 392
_DARK, _MIDDLE, _LIGHT, _WARN = "#1b3a5c", "#7d9bbd", "#d8e2ee", "#b3261e"
# characters of a label
_LONGEST = 62


@dataclass(frozen=True, kw_only=True)
class Violin:
    """The posterior of a success rate, and what is marked on it."""

    model: str
    # right of the name
    note: str
    letters: str
    # of the Beta distribution
    parameters: tuple[float, float]
    rate: float
    interval: tuple[float, float]
    # rate of starts that succeed by themselves
    floor: float = 0.0


def violin_outline(parameters: tuple[float, float], num_points: int = 33) -> tuple[np.ndarray, np.ndarray]:
    """Return success rates and the posterior's density there, in units of the largest."""
    a, b = parameters
    mean, deviation = a / (a + b), (a * b / (a + b + 1)) ** 0.5 / (a + b)
    rates = np.linspace(max(0.0, mean - 4 * deviation), min(1.0, mean + 4 * deviation), num_points)
    inside = np.clip(rates, 1e-12, 1 - 1e-12)
    log_density = (a - 1) * np.log(inside) + (b - 1) * np.log1p(-inside)
    return rates, np.exp(log_density - log_density.max())


def draw_violins(violins: Sequence[Violin], label: str) -> str:
    """Draw posteriors below each other, with the 95% interval, the rate, and the floor as a dashed line."""
    parts = [_axis(0.0, 1.0, 14 + 36 * len(violins))]
    for number, violin in enumerate(violins):
        top = 36 * number
        rates, heights = violin_outline(violin.parameters)
        xs, half, middle = _place(rates), 9 * heights, top + 27
        upper = " ".join(f"{x:.1f},{middle - y:.1f}" for x, y in zip(xs, half, strict=True))
        lower = " ".join(f"{x:.1f},{middle + y:.1f}" for x, y in zip(xs[::-1], half[::-1], strict=True))
        low, high = _place(np.array(violin.interval))
        parts.append(_label(top, violin.model, f"{violin.note}  {violin.letters}"))
        parts.append(f'<polygon points="{upper} {lower}" fill="{_MIDDLE}" stroke="{_DARK}" stroke-width=".8"/>')
        if violin.floor:
            at = _place(np.array([violin.floor]))[0]
            parts.append(f'<path d="M{at:.1f} {middle - 9}v18" stroke="{_WARN}" stroke-dasharray="3 2"/>')
        parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#000" stroke-width="1.5"/>')
        parts.append(f'<circle cx="{_place(np.array([violin.rate]))[0]:.1f}" cy="{middle}" r="2.5"/>')
    return _svg(parts, 36 * len(violins) + 28, label)


def draw_differences(rows: Sequence[tuple[str, float, tuple[float, float], bool]], label: str) -> str:
    """Draw differences with their intervals: (name, difference, interval, is separated); filled dots are separated."""
    parts = [_axis(-1.0, 1.0, 14 + 26 * len(rows))]
    for number, (name, difference, interval, is_separated) in enumerate(rows):
        middle = 26 * number + 21
        at, low, high = _place((np.array([difference, *interval]) + 1) / 2)
        parts.append(_label(26 * number, name, ""))
        parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}" stroke="#000"/>')
        fill = "#000" if is_separated else "#fff"
        parts.append(f'<circle cx="{at:.1f}" cy="{middle}" r="3" fill="{fill}" stroke="#000"/>')
    return _svg(parts, 26 * len(rows) + 28, label)


# outcome of an episode -> height of its mark, its place from the top of the strip, and its colour
_SEED_MARKS = {
    "success": (10, 5.0, _DARK),
    "trivial": (10, 5.0, _MIDDLE),
    "failure": (2, 9.0, "#8a8a8a"),
    "invalid": (4, 2.0, _WARN),
}


def draw_seeds(rows: Sequence[tuple[str, Sequence[str | None]]], label: str) -> str:
    """Draw the outcome of each seed: full bars for successes, low ones for failures, and high red ones for invalid."""
    num_seeds = max((len(outcomes) for _, outcomes in rows), default=1) or 1
    paths: dict[str, list[str]] = {kind: [] for kind in _SEED_MARKS}
    parts = []
    for number, (name, outcomes) in enumerate(rows):
        top = 28 * number
        parts.append(_label(top, name, ""))
        for kind, start, size in _stretches(outcomes):
            if kind in paths:
                paths[kind].append(f"M{start} {top + 15 + _SEED_MARKS[kind][1]:g}h{size}")
    scale = (_RIGHT - _LEFT) / num_seeds
    parts.append(f'<g transform="translate({_LEFT},0) scale({scale:.4f},1)" fill="none">')
    for kind, pieces in paths.items():
        height, _, color = _SEED_MARKS[kind]
        if pieces:
            parts.append(f'<path d="{"".join(pieces)}" stroke="{color}" stroke-width="{height}"/>')
    return _svg([*parts, "</g>"], 28 * len(rows) + 4, label)


def _stretches(outcomes: Iterable[str | None]) -> list[tuple[str | None, int, int]]:
    """Return stretches of equal outcomes: (outcome, start, length)."""
    found: list[tuple[str | None, int, int]] = []
    for place, outcome in enumerate(outcomes):
        if found and found[-1][0] == outcome:
            found[-1] = outcome, found[-1][1], found[-1][2] + 1
        else:
            found.append((outcome, place, 1))
    return found


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line, or dots, over the steps of a run."""

    name: str
    # (step, value), in the order of the steps
    points: Sequence[tuple[float, float]]
    # how it is drawn
    mark: Literal["line", "dashes", "dots"] = "line"


# height of the field of curves, and where it begins
_FIELD, _FIELD_TOP, _FIELD_LEFT = 170, 22, 40


def draw_curves(curves: Sequence[Curve], label: str, *, unit: str) -> str:
    """Draw curves over steps; values that differ tenfold or more go on a logarithmic axis.

    Args:
        unit: what the values are.

    Raises:
        ValueError: no curve has a finite value.
    """
    kept = [[point for point in curve.points if math.isfinite(point[1])] for curve in curves]
    steps, values = zip(*(point for points in kept for point in points), strict=True) if any(kept) else ((), ())
    if not values:
        raise ValueError(f"{label}: there are no values to draw.")
    low, high, last = min(values), max(values), max(steps)
    is_log = low > 0 and high >= 10 * low
    scale = math.log if is_log else float
    bottom, height = scale(low), (scale(high) - scale(low)) or 1.0

    def place(step: float, value: float) -> tuple[float, float]:
        x = _FIELD_LEFT + step / (last or 1) * (_RIGHT - _FIELD_LEFT)
        return x, _FIELD_TOP + _FIELD * (1 - (scale(value) - bottom) / height)

    parts = []
    for tick in _ticks(low, high, is_log=is_log):
        _, y = place(0.0, tick)
        parts.append(f'<path d="M{_FIELD_LEFT} {y:.1f}H{_RIGHT}" stroke="#ccc"/>')
        parts.append(f'<text x="{_FIELD_LEFT - 4}" y="{y + 4:.1f}" font-size="11" text-anchor="end">{tick:g}</text>')
    x = float(_FIELD_LEFT)
    for curve, points in zip(curves, kept, strict=True):
        shown = [place(*point) for point in points]
        sample = [(x + 9.0, 10.0)] if curve.mark == "dots" else [(x, 10.0), (x + 18.0, 10.0)]
        parts += [_mark(curve.mark, sample), _mark(curve.mark, shown)]
        parts.append(f'<text x="{x + 22:g}" y="14" font-size="11">{escape(curve.name)}</text>')
        x += 34 + round(5.8 * len(curve.name))
    under = _FIELD_TOP + _FIELD + 16
    parts.append(f'<text x="{_FIELD_LEFT}" y="{under}" font-size="11">{escape(unit)}{", logarithmic" * is_log}</text>')
    parts.append(f'<text x="{_RIGHT}" y="{under}" font-size="11" text-anchor="end">step {last:g}</text>')
    return _svg(parts, under + 6, label)


def _ticks(low: float, high: float, *, is_log: bool) -> list[float]:
    """Return round values between two: 1, 2 and 5 times powers of ten, or about four even ones."""
    if is_log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [value for power in powers for factor in (1, 2, 5) if low <= (value := factor * 10.0**power) <= high]
    size = 10.0 ** math.floor(math.log10((high - low) or abs(high) or 1.0))
    step = next(factor * size for factor in (0.2, 0.25, 0.5, 1, 2, 2.5) if (high - low) / (factor * size) <= 5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _mark(mark: str, points: Sequence[tuple[float, float]]) -> str:
    if mark == "dots":
        return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_WARN}"/>' for x, y in points)
    dashes = ' stroke-dasharray="5 3"' if mark == "dashes" else ""
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    color = _WARN if dashes else _DARK
    return f'<polyline points="{way}" fill="none" stroke="{color}" stroke-width="1.8"{dashes}/>'


# patterns of the parts of a bar, in their order
_PATTERNS = (_DARK, "#fff", "url(#hatch)", "url(#cross)", "url(#dots)", _LIGHT)
# used by all figures of a page, and put into it once
PATTERNS = (
    '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
    + "".join(
        f'<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<rect width="6" height="6" fill="#fff"/><path d="{path}" stroke="{_WARN}" stroke-width="1.2"/></pattern>'
        for name, path in (("hatch", "M0 6L6 0"), ("cross", "M0 6L6 0M0 0L6 6"), ("dots", "M2 3h2"))
    )
    + "</defs></svg>"
)


def draw_bars(rows: Sequence[tuple[str, Sequence[int], str]], kinds: Sequence[str], label: str) -> str:
    """Draw stacked bars of (name, counts by kind, note), all as long as the largest sum, with a legend."""
    largest = max((sum(counts) for _, counts, _ in rows), default=1) or 1
    parts, x = [], _LEFT
    for kind, pattern in zip(kinds, _PATTERNS, strict=False):
        parts.append(f'<rect x="{x}" y="4" width="10" height="10" fill="{pattern}" stroke="#000" stroke-width=".5"/>')
        parts.append(f'<text x="{x + 13}" y="13" font-size="10">{escape(kind)}</text>')
        x += 20 + round(5.4 * len(kind))
    for number, (name, counts, note) in enumerate(rows):
        top, x = 20 + 28 * number, float(_LEFT)
        parts.append(_label(top, name, note))
        for count, pattern in zip(counts, _PATTERNS, strict=False):
            width = count / largest * (_RIGHT - _LEFT)
            if count:
                parts.append(
                    f'<rect x="{x:.1f}" y="{top + 15}" width="{width:.1f}" height="9" fill="{pattern}" '
                    'stroke="#000" stroke-width=".5"/>'
                )
            x += width
    return _svg(parts, 28 * len(rows) + 26, label)


def _place(shares: np.ndarray) -> np.ndarray:
    return _LEFT + shares * (_RIGHT - _LEFT)


def _axis(low: float, high: float, bottom: int) -> str:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = _LEFT + share * (_RIGHT - _LEFT)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        shown = percent(low + share * (high - low)).removesuffix(".0")
        parts.append(f'<path d="M{x:g} 14V{bottom - 10}" stroke="#ccc"/>')
        parts.append(f'<text x="{x:g}" y="{bottom + 8}" font-size="11" text-anchor="{anchor}">{shown}%</text>')
    return "".join(parts)


def _label(top: int, name: str, note: str) -> str:
    longest = _LONGEST - len(note) - 6 if note else _LONGEST
    shown = clean(name)
    shown = shown if len(shown) <= longest else f"{shown[: max(8, longest - 1)]}\N{HORIZONTAL ELLIPSIS}"
    right = f'<text x="{_RIGHT}" y="{top + 12}" font-size="11.5" text-anchor="end">{escape(note)}</text>'
    return f'<text x="{_LEFT}" y="{top + 12}" font-size="11.5">{escape(shown)}</text>{right if note else ""}'


def _svg(parts: Iterable[str], height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
