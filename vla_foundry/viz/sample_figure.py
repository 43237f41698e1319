"""Draw a robot sample as a PNG: instruction, images, masks, raw and normalised actions, proprioception."""

from typing import TYPE_CHECKING, Any

import numpy as np

from vla_foundry.robotics.fields import image_name
from vla_foundry.storage.local import replace_file
from vla_foundry.viz.robot_sample import FieldValues, RobotSample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# colours of steps: observed, to be predicted, padding
PAST, FUTURE, PADDING = "#9ecae1", "#a1d99b", "#d9d9d9"
# inches
_WIDTH, _TITLE, _IMAGE, _MASKS, _FIELD, _FEW, _UPRIGHT = 12.0, 1.1, 2.6, 0.9, 1.7, 2.4, 4.0
_MOST_LEGEND = 9
# from this many fields on, their names are rotated
_MANY = 8
# above this normalised value the axis is logarithmic
_FAR = 20


def draw_sample(sample: RobotSample, path: str) -> None:
    """Draw a sample and write the file atomically.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "Drawing needs matplotlib, which is not installed: uv pip install 'vla-foundry[evaluation]'."
        ) from None
    parts: list[tuple[float, Any]] = [(_TITLE, _draw_title)]
    if sample.images:
        parts.append((_image_height(sample), _draw_images))
    parts.append((_MASKS, _draw_masks))
    parts += [(_FIELD, lambda part, _, field=field: _draw_field(part, sample, field)) for field in sample.actions]
    if sample.proprioception:
        parts.append((_FEW if len(sample.proprioception) < _MANY else _UPRIGHT, _draw_proprioception))
    heights = [height for height, _ in parts]
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=100)
    canvas = FigureCanvasAgg(figure)
    rows = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    # texts of the data are no formulas
    with rc_context({"text.parse_math": False}):
        for row, (_, draw) in zip(rows, parts, strict=True):
            draw(row, sample)
    with replace_file(path) as temporary:
        # without matplotlib's version, so that the same sample gives the same file
        canvas.print_figure(temporary, format="png", metadata={"Software": None})


def _draw_title(part: "SubFigure", sample: RobotSample) -> None:
    instruction = _cut(sample.instruction or "(no instruction)", 110)
    part.text(0.02, 0.78, instruction, fontsize=14, weight="bold", va="center")
    place = f"episode {sample.episode_id}, frame {sample.anchor}  ·  sample {sample.position}"
    part.text(0.02, 0.42, place, fontsize=10, va="center")
    part.text(0.02, 0.14, _cut(sample.shard, 150), fontsize=8, color="grey", va="center")


def _image_height(sample: RobotSample) -> float:
    return len(sample.image_indices) * min(_IMAGE, 0.96 * _WIDTH / max(len(sample.cameras), 1)) + 0.2


def _draw_images(part: "SubFigure", sample: RobotSample) -> None:
    names = [(camera, offset) for offset in sample.image_indices for camera in sample.cameras]
    part.subplots_adjust(left=0.02, right=0.98, top=0.94, bottom=0.02, wspace=0.05, hspace=0.15)
    axes = part.subplots(len(sample.image_indices), len(sample.cameras), squeeze=False).reshape(-1)
    for axis, (camera, offset), image, is_seen in zip(axes, names, sample.images, sample.image_mask, strict=True):
        axis.imshow(image, interpolation="nearest")
        title = image_name(camera, offset)
        axis.set_title(
            title if is_seen else f"{title} (masked)", fontsize=8, color="black" if is_seen else "red", pad=2
        )
        axis.set_axis_off()


def _draw_masks(part: "SubFigure", sample: RobotSample) -> None:
    axis = part.subplots()
    part.subplots_adjust(left=0.07, right=0.98, top=0.72, bottom=0.30)
    steps = _steps(sample)
    _shade(axis, sample, alpha=1.0)
    for step, is_padding in zip(steps, sample.is_padding, strict=True):
        if is_padding:
            axis.text(step, 0.5, "x", ha="center", va="center", color="dimgrey")
    axis.set(xlim=(steps[0] - 0.5, steps[-1] + 0.5), ylim=(0, 1), yticks=[])
    axis.set_xticks(steps, [str(step) for step in steps], fontsize=7)
    counts = [int(mask.sum()) for mask in (sample.past_mask, sample.future_mask, sample.is_padding)]
    axis.set_title(
        f"steps from the anchor: {counts[0]} observed (past_mask, blue), {counts[1]} to be predicted (future_mask, "
        f"green), {counts[2]} padding (is_padding, x)",
        fontsize=8,
        loc="left",
    )


def _steps(sample: RobotSample) -> np.ndarray:
    return np.arange(len(sample.past_mask)) - sample.anchor_index


def _shade(axis: "Axes", sample: RobotSample, *, alpha: float) -> None:
    masks = ((sample.past_mask, PAST), (sample.future_mask, FUTURE), (sample.is_padding, PADDING))
    for mask, color in masks:
        for step in _steps(sample)[mask]:
            axis.axvspan(step - 0.5, step + 0.5, color=color, alpha=alpha, linewidth=0)


def _draw_field(part: "SubFigure", sample: RobotSample, field: FieldValues) -> None:
    left, right = part.subplots(1, 2)
    part.subplots_adjust(left=0.07, right=0.91, top=0.80, bottom=0.16, wspace=0.14)
    steps = _steps(sample)
    normalized = "normalised" if sample.is_normalized else "as the model gets it: not normalised"
    for axis, values, title in ((left, field.raw, _describe(field)), (right, field.normalized, normalized)):
        _shade(axis, sample, alpha=0.35)
        axis.axvline(0, color="black", linewidth=0.8, linestyle=":")
        for column in range(values.shape[1]):
            shown = np.where(sample.is_padding, np.nan, values[:, column])
            known = field.description
            label = str(column) if known is None else known.label(column)
            axis.plot(steps, shown, marker=".", markersize=3, linewidth=1, label=label)
        axis.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
        axis.tick_params(labelsize=7)
        axis.set_title(title, fontsize=8, loc="left")
    if field.raw.shape[1] <= _MOST_LEGEND:
        right.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False)


def _describe(field: FieldValues) -> str:
    known = field.description
    if known is None:
        return field.name
    facts = [known.unit, known.frame, known.representation, known.rotation]
    return f"{field.name}  ({', '.join(fact for fact in facts if fact)})"


def _draw_proprioception(part: "SubFigure", sample: RobotSample) -> None:
    axis = part.subplots()
    is_few = len(sample.proprioception) < _MANY
    part.subplots_adjust(left=0.07, right=0.98, top=0.9, bottom=0.44 if is_few else 0.66)
    values = np.concatenate([field.normalized[-1] for field in sample.proprioception])
    starts = np.cumsum([0] + [field.normalized.shape[1] for field in sample.proprioception])
    axis.bar(np.arange(len(values)), values, color="#756bb1")
    for start in starts[1:-1]:
        axis.axvline(start - 0.5, color="black", linewidth=0.5, linestyle=":")
    labels = [_cut(field.name, 52) for field in sample.proprioception]
    axis.set_xticks((starts[:-1] + starts[1:] - 1) / 2, labels, rotation=20 if is_few else 90, fontsize=6)
    if is_few:
        for label in axis.get_xticklabels():
            label.set_horizontalalignment("right")
    if np.abs(values).max() > _FAR:  # otherwise one dimension would hide the others
        axis.set_yscale("symlog", linthresh=_FAR)
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlim(-0.7, len(values) - 0.3)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_title("proprioception at the anchor, as the model gets it", fontsize=8, loc="left")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
