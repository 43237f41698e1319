"""Draw the figures of docs/robotics_data.md, with the package's own windows, poses and normalizer.

Usage: python docs/figures/robotics_data.py
"""

from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from vla_foundry.robotics.accumulator import StatisticsAccumulator
from vla_foundry.robotics.fields import PoseGroup, Window
from vla_foundry.robotics.normalization import NormalizationRule, RoboticsNormalizer
from vla_foundry.robotics.rotations import matrix_to_rotation, rotation_to_matrix
from vla_foundry.robotics.transforms import RelativePoses
from vla_foundry.robotics.windows import create_windows
from vla_foundry.viz.sample_figure import FUTURE, PADDING, PAST

FOLDER = Path(__file__).parent
GREY, BLUE, ORANGE = "#555555", "#3182bd", "#e6550d"


def main() -> None:
    """Draw all of them."""
    rcParams.update(
        {"svg.hashsalt": "vla_foundry", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    )
    for name, draw in (
        ("layouts", draw_layouts),
        ("windows_and_masks", draw_windows),
        ("relative_actions", draw_relative),
        ("normalization", draw_normalization),
    ):
        draw().savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def draw_layouts() -> Figure:
    """What a shard of either layout holds of the same recording."""
    figure = Figure(figsize=(10, 3.9))
    axes = figure.subplots(1, 2)
    for axis, title in zip(
        axes, ("layout episodes: a frame is stored once", "layout samples: a sample is stored whole"), strict=True
    ):
        axis.set(xlim=(0, 10), ylim=(0, 7.4))
        axis.set_axis_off()
        axis.set_title(title, fontsize=10, loc="left", weight="bold")
    left, right = axes
    _box(left, 0.1, 5.9, 9.8, 0.9, "episode.json: rate, anchors, cameras, instructions", "#fdd0a2")
    _box(
        left,
        0.1,
        4.7,
        9.8,
        0.9,
        "lowdim.npz: every field (L, C), rows are read alone",
        "#c7e9c0",
    )
    for frame in range(8):
        _box(left, 0.1 + 1.23 * frame, 3.1, 1.13, 1.2, f"frame\n{frame}", "#c6dbef")
    _box(left, 0.1 + 1.23 * 2 - 0.06, 3.0, 1.23 * 2 + 0.02, 1.4, "", "none", edge=ORANGE)
    _arrow(left, (3.9, 2.95), (3.9, 2.1))
    text = (
        "when it is loaded: images -1, 0 and steps -1 ... +4 around anchor 3\n"
        "another training asks for others, of the same shards"
    )
    left.text(0.1, 1.2, text, fontsize=8.5, color=ORANGE)
    for row, anchor in enumerate((2, 3, 4)):
        y = 5.3 - 2.1 * row
        _box(right, 0.1, y, 2.0, 1.5, f"anchor {anchor}:\ntexts, place", "#fdd0a2")
        _box(right, 2.2, y, 1.3, 1.5, f"frame\n{anchor - 1}", "#c6dbef")
        _box(right, 3.6, y, 1.3, 1.5, f"frame\n{anchor}", "#c6dbef")
        _box(
            right,
            5.0,
            y,
            4.9,
            1.5,
            f"lowdim.npz: steps {anchor - 1} ... {anchor + 4},\nmasks, _relative fields",
            "#c7e9c0",
        )
    right.text(0.1, 0.3, "frames 2 and 3 are stored twice, each step six times", fontsize=8.5, color=ORANGE)
    return figure


def _box(
    axis: Axes, x: float, y: float, width: float, height: float, text: str, face: str, *, edge: str = GREY
) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.2))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": ORANGE})


def draw_windows() -> Figure:
    """The frames and masks of windows at the ends of an episode and in its middle."""
    window, num_frames, anchors = Window(past=2, future=4), 10, np.array([0, 1, 4, 7, 9])
    windows = create_windows(anchors, num_frames, window)
    figure = Figure(figsize=(9, 3.2))
    axis = figure.subplots()
    for row, anchor in enumerate(anchors):
        for step, offset in enumerate(window.offsets):
            masks = ((windows.past_mask, PAST), (windows.future_mask, FUTURE), (windows.is_padding, PADDING))
            color = next(color for mask, color in masks if mask[row, step])
            axis.add_patch(Rectangle((offset - 0.5, -row - 0.42), 1, 0.84, facecolor=color, edgecolor="white"))
            is_padding = windows.is_padding[row, step]
            text = f"({windows.frames[row, step]})" if is_padding else f"{windows.frames[row, step]}"
            axis.text(offset, -row, text, ha="center", va="center", color=GREY if is_padding else "black")
        axis.text(-2.7, -row, f"anchor {anchor}", ha="right", va="center")
    axis.plot([-0.5, -0.5], [0.5, -len(anchors) + 0.5], color="black", linewidth=1, linestyle=":")
    legend = (("past_mask: observed", PAST), ("future_mask: to be predicted", FUTURE), ("is_padding: neither", PADDING))
    for number, (text, color) in enumerate(legend):
        axis.add_patch(Rectangle((-2.5 + 2.7 * number, 0.95), 0.25, 0.35, facecolor=color))
        axis.text(-2.15 + 2.7 * number, 1.12, text, va="center", fontsize=8.5)
    axis.set(xlim=(-4.2, 5.2), ylim=(-len(anchors) + 0.3, 1.6), yticks=[])
    axis.set_xticks(list(window.offsets), [f"{offset:+d}" if offset else "anchor" for offset in window.offsets])
    axis.set_xlabel(f"steps; numbers are frames of an episode of {num_frames}, in brackets what padding copies")
    axis.spines[:].set_visible(False)
    return figure


def draw_relative() -> Figure:
    """The same motion in two places: different in the world, the same relative to the pose at the anchor."""
    figure = Figure(figsize=(9.5, 3.6))
    world, relative = figure.subplots(1, 2)
    steps = np.linspace(0, 1, 9)
    local = np.stack([0.3 * steps, 0.12 * np.sin(2.5 * steps), 0 * steps], axis=-1)
    turns = 1.2 * steps
    group = PoseGroup(name="hand", position_key="xyz", rotation_key="rot", rotation_format="axis_angle",
                      reference_position_key="xyz", reference_rotation_key="rot")  # fmt: skip
    for place, heading, color, name in (((0.1, 0.1), 0.3, BLUE, "episode A"), ((0.75, 0.5), 2.4, ORANGE, "episode B")):
        start = rotation_to_matrix(np.array([0, 0, heading]), "axis_angle")
        xyz = local @ start.T + [*place, 0]
        rotation = matrix_to_rotation(start @ rotation_to_matrix(_about_z(turns), "axis_angle"), "axis_angle")
        fields = {"xyz": xyz[None], "rot": rotation[None]}
        values = RelativePoses((group,), 0).apply(fields)
        _draw_poses(world, xyz, rotation, color, name)
        shift = 0.006 if color == ORANGE else 0.0  # else one would hide the other
        _draw_poses(relative, values["xyz_relative"][0] + shift, values["rot_relative"][0], color, name)
    world.set_title("absolute: T_t in the frame of the world", fontsize=10, loc="left")
    relative.set_title("relative: inv(T_anchor) T_t", fontsize=10, loc="left")
    for axis in (world, relative):
        axis.set_aspect("equal")
        axis.legend(fontsize=8, frameon=False)
        axis.set(xlabel="x, m", ylabel="y, m")
        axis.margins(0.15)
    return figure


def _about_z(angles: np.ndarray) -> np.ndarray:
    return np.stack([0 * angles, 0 * angles, angles], axis=-1)


def _draw_poses(axis: Axes, xyz: np.ndarray, rotation: np.ndarray, color: str, name: str) -> None:
    axis.plot(xyz[:, 0], xyz[:, 1], color=color, marker="o", markersize=3, label=name)
    forward = rotation_to_matrix(rotation, "axis_angle")[..., :2, 0]
    axis.quiver(*xyz[:, :2].T, *forward.T, color=color, scale=22, width=0.004, alpha=0.7)
    axis.plot(*xyz[0, :2], color=color, marker="s", markersize=7)


def draw_normalization() -> Figure:
    """What methods and scopes make of relative positions: spread grows with the step, and a few values lie far out."""
    rng = np.random.default_rng(0)
    window = Window(past=1, future=14)
    offsets = np.array(window.offsets)
    speed = rng.normal(0.004, 0.006, size=(4000, 1, 1))
    values = speed * offsets[None, :, None] + rng.normal(0, 0.002, size=(4000, 16, 1))
    values[:40] *= 6
    accumulator = StatisticsAccumulator(window.anchor)
    accumulator.update({"x_relative": values})
    statistics = accumulator.finish()
    figure = Figure(figsize=(10, 3.2))
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    field = statistics["x_relative"]
    mean, std = field.mean_per_timestep[:, 0], field.std_per_timestep[:, 0]
    axes[0].fill_between(offsets, mean - std, mean + std, color=BLUE, alpha=0.25, label="per_timestep: mean, std")
    axes[0].plot(offsets, mean, color=BLUE)
    axes[0].axhspan(
        field.mean[0] - field.std[0], field.mean[0] + field.std[0], color=ORANGE, alpha=0.15, label="global"
    )
    axes[0].set(title="statistics of a relative position, m", xlabel="step from the anchor")
    axes[0].legend(fontsize=7, loc="upper left")
    for scope, color in (("global", ORANGE), ("per_timestep", BLUE)):
        normalized = _normalize(values, statistics, window, NormalizationRule(method="std", scope=scope))
        axes[1].plot(offsets, normalized.std(axis=0)[:, 0], color=color, label=f"scope {scope}")
    axes[1].set(title="spread after normalization", xlabel="step from the anchor", ylim=(0, 2.4))
    axes[1].legend(fontsize=7)
    rules = [("std", False), ("min_max", True), ("percentile_1_99", True), ("percentile_5_95", True)]
    for row, (method, centered) in enumerate(rules):
        rule = NormalizationRule(method=method, centered=centered)  # pyright: ignore[reportArgumentType]
        normalized = _normalize(values, statistics, window, rule).reshape(-1)
        heights, edges = np.histogram(normalized, bins=np.linspace(-4, 4, 81))
        axes[2].fill_between(
            edges[:-1], -row, -row + 0.85 * heights / heights.max(), step="post", color=BLUE, alpha=0.6
        )
        axes[2].text(-3.95, -row + 0.3, method + (", centred" if centered else ""), fontsize=7.5)
    axes[2].axvspan(-1, 1, color=GREY, alpha=0.1)
    axes[2].set(title="what the model gets, by method", yticks=[], xlabel="normalised value", xlim=(-4, 4))
    for axis in axes:
        axis.title.set_fontsize(9)
    figure.tight_layout()
    return figure


def _normalize(values: np.ndarray, statistics: dict, window: Window, rule: NormalizationRule) -> np.ndarray:
    normalizer = RoboticsNormalizer.create(statistics, {"x_relative": rule}, window=window)
    return normalizer.normalize(values, "x_relative", anchor=window.anchor)


if __name__ == "__main__":
    main()
