"""The page of the vision-language stage: what the model says of held-out scenes, against what needs no picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vla_foundry.datagen.scene_captions import AttributeScore, score_captions
from vla_foundry.inference.caption import Question, answer, load_captioner

# attribute -> its name on the page, and the share that should be right
_ROWS: dict[str, tuple[str, float | None]] = {
    "object": ("object", 0.9),
    "state": ("its state", 0.9),
    "object_position": ("where it is, within a cell", 0.9),
    "gripper_position": ("where the gripper is, within a cell", 0.9),
    "side": ("to the left or right", None),
    "depth": ("ahead or behind", None),
    "height": ("above or below", None),
    "object_position_exact": ("where it is, the very cell", None),
    "caption": ("the whole caption", None),
}
_NUM_DRAWN = 8


def write_vlm_report(run: Path, scenes: Path, *, summary: Path, figure: Path) -> str:
    """Caption held-out scenes and compare what is said with the truth, attribute by attribute.

    Args:
        run: folder of the vision-language run.
        scenes: folder of the held-out scenes: 00000000.png, .txt ...
        summary: text file to write.
        figure: PNG to write: some scenes with what was said of them.

    Returns:
        The summary.

    Raises:
        ValueError: there are no scenes, or the run is none of a vision-language model.
    """
    pictures = sorted(scenes.glob("*.png"))
    if not pictures:
        raise ValueError(f"{scenes} holds no pictures. Draw them with `vla-foundry scenes`.")
    images = [path.read_bytes() for path in pictures]
    truths = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in pictures]
    captioner = load_captioner(str(run))
    prompt = captioner.default_prompt
    said = answer(captioner, [Question((image,), prompt) for image in images], batch_size=64, max_new_tokens=80)
    text = "\n".join(
        (
            f"Vision-language stage: captions of {len(truths)} held-out scenes",
            *format_scores(score_captions(said, truths)),
            f"  pictures with captions  {figure}",
        )
    )
    draw_captions(pictures[:_NUM_DRAWN], said, truths, figure)
    summary.write_text(text + "\n", encoding="utf-8")
    return text


def format_scores(scores: Mapping[str, AttributeScore]) -> list[str]:
    """Write a table: each attribute's accuracy beside chance, the best constant answer and the goal."""
    lines = [f"  {'right, of held-out scenes':<37}{'model':>7}{'chance':>9}{'constant':>10}{'goal':>7}"]
    for name, (label, goal) in _ROWS.items():
        score = scores[name]
        shown_goal = "" if goal is None else f"{goal:.0%}"
        lines.append(
            f"  {label:<37}{score.accuracy:>7.1%}{score.chance:>9.1%}{score.constant:>10.1%}{shown_goal:>7}".rstrip()
        )
    return [*lines, "  (constant: the one answer that is right most often, whatever the picture)"]


def draw_captions(pictures: Sequence[Path], said: Sequence[str], truths: Sequence[str], path: Path) -> None:
    """Draw scenes with what was said of them; what is true is added where that differs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(-(-len(pictures) // 4), 4, figsize=(14, 5 * -(-len(pictures) // 4)), dpi=90)
    for axis, picture, caption, truth in zip(axes.flat, pictures, said, truths, strict=False):
        axis.imshow(pyplot.imread(picture), interpolation="nearest")
        lines = caption.strip().replace(". ", ".\n")
        if caption.strip() != truth:
            lines += "\n(true) " + truth.replace(". ", ".\n")
        axis.set_title(lines, fontsize=8, loc="left", color="#222222" if caption.strip() == truth else "#c44e52")
    for axis in axes.flat:
        # not set_axis_off: the titles would then not be made room for
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
