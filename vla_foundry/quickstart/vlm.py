"""The vision-language stage: simulated scenes -> shards -> a model that starts from the LLM and captions them."""

import json
from collections.abc import Mapping
from pathlib import Path

from vla_foundry.datagen.scene_captions import AttributeScore, score_captions
from vla_foundry.datagen.scenes import SPLITS
from vla_foundry.inference.caption import Question, answer, load_captioner
from vla_foundry.quickstart.steps import Sizes, Stage, Step, count_trainers, training_step, words_of

# objects whose state is visible at 64 pixels; that of a button is not
TASKS = ("drawer-open-v3", "window-open-v3", "door-open-v3", "faucet-open-v3", "stick-push-v3")
PRESET = "config_presets/training_jobs/vlm_quickstart.yaml"
# held-out scenes whose captions are printed
SHOWN = (0, 1, 2)
# attribute -> its label in the report, and the accuracy to reach
ROWS: dict[str, tuple[str, float | None]] = {
    "object": ("object", 0.9),
    # some 240 held-out scenes have one, so that 90 right of 100 come out as anything from 86 to 94
    "state": ("its state", 0.85),
    "object_position": ("where it is, within a cell", 0.9),
    "gripper_position": ("where the gripper is, within a cell", 0.9),
    "side": ("to the left or right", None),
    "depth": ("ahead or behind", None),
    "height": ("above or below", None),
    "object_position_exact": ("where it is, the very cell", None),
    "caption": ("the whole caption", None),
}
# in the stage's folder: what is said of each held-out scene, and what is true
CAPTIONS_NAME = "captions.json"


def create_vlm_stage(output_dir: Path, sizes: Sizes) -> Stage:
    """Build the vision-language stage, which writes below `<output_dir>/vlm` and starts from the run in `llm`."""
    folder, llm_run = output_dir / "vlm", output_dir / "llm" / "runs" / "llm"
    scenes, shards, run = folder / "scenes", folder / "shards", folder / "runs" / "vlm"
    summary, captions = folder / "summary.txt", folder / CAPTIONS_NAME
    held_out = scenes / "validation"

    def preprocess(split: str) -> Step:
        target = shards / split
        return Step(
            name=f"preprocess_scenes_{split}",
            what=f"Write the {split} scenes to shards",
            seconds=6,
            words=words_of("preprocess image_caption", source=scenes / split, output=target, num_workers=0),
            outputs=(target / "manifest.jsonl",),
            folder=target,
        )

    flags = {"num_scenes": sizes.scenes, "num_validation_scenes": sizes.held_out_scenes, "tasks": ",".join(TASKS)}
    steps = (
        Step(
            name="scenes",
            what="Render scenes in MuJoCo and describe them in words",
            seconds=65,
            words=words_of("scenes", output=scenes, **flags),
            outputs=tuple(scenes / split for split in SPLITS),
            folder=scenes,
        ),
        *(preprocess(split) for split in SPLITS),
        training_step(
            "train_vlm",
            "Train the vision-language model, starting from the language model",
            seconds=230,
            preset=PRESET,
            run=run,
            shards=shards,
            num_processes=count_trainers(),
            flags={"model.transformer.resume_from_checkpoint": llm_run},
        ),
        Step(
            name="caption",
            what="Caption three held-out scenes",
            seconds=6,
            words=(
                *words_of("caption", checkpoint=run),
                *(word for index in SHOWN for word in ("--image", str(held_out / f"{index:08d}.png"))),
            ),
        ),
        Step(
            name="vlm_report",
            what="Caption all held-out scenes and score the captions",
            seconds=6,
            function=lambda: write_vlm_report(run, held_out, summary=summary, captions=captions),
            outputs=(summary, captions),
        ),
    )
    return Stage(steps=steps, summary=summary)


def write_vlm_report(run: Path, scenes: Path, *, summary: Path, captions: Path) -> str:
    """Caption held-out scenes and score the captions, attribute by attribute.

    Args:
        run: folder of the vision-language run.
        scenes: folder of the held-out scenes: 00000000.png, .txt ...
        summary: text file to write.
        captions: JSON file to write: the caption of each scene, and the true one.

    Returns:
        The summary.

    Raises:
        ValueError: there are no scenes, or the run does not hold a vision-language model.
    """
    pictures = sorted(scenes.glob("*.png"))
    if not pictures:
        raise ValueError(f"{scenes} holds no pictures. Draw them with `vla-foundry scenes`.")
    images = [path.read_bytes() for path in pictures]
    truths = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in pictures]
    captioner = load_captioner(str(run))
    prompt = captioner.default_prompt
    predictions = answer(captioner, [Question((image,), prompt) for image in images], batch_size=64, max_new_tokens=80)
    text = "\n".join(
        (
            f"Vision-language stage: captions of {len(truths)} held-out scenes",
            *format_scores(score_captions(predictions, truths)),
        )
    )
    rows = [
        {"picture": path.name, "caption": caption, "truth": truth}
        for path, caption, truth in zip(pictures, predictions, truths, strict=True)
    ]
    captions.write_text(json.dumps({"captions": rows}, indent=1) + "\n", encoding="utf-8")
    summary.write_text(text + "\n", encoding="utf-8")
    return text


def format_scores(scores: Mapping[str, AttributeScore]) -> list[str]:
    """Format a table: each attribute's accuracy beside chance, the best constant answer and the goal."""
    lines = [f"  {'right, of held-out scenes':<37}{'model':>7}{'chance':>9}{'constant':>10}{'goal':>7}"]
    for name, (label, goal) in ROWS.items():
        score = scores[name]
        shown_goal = "" if goal is None else f"{goal:.0%}"
        lines.append(
            f"  {label:<37}{score.accuracy:>7.1%}{score.chance:>9.1%}{score.constant:>10.1%}{shown_goal:>7}".rstrip()
        )
    return [*lines, "  (constant: the best single answer for all pictures)"]
