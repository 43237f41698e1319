"""The vision-language stage: scenes drawn by a simulator -> shards -> a model that says what it sees, from the LLM."""

from pathlib import Path

from vla_foundry.datagen.scenes import SPLITS
from vla_foundry.quickstart.stages import Step, training_step, words_of

# things whose states can be told from 64 pixels; a pressed button can not
TASKS = ("drawer-open-v3", "window-open-v3", "door-open-v3", "faucet-open-v3", "stick-push-v3")
NUM_SCENES = 9000
NUM_VALIDATION_SCENES = 500
PRESET = "config_presets/training_jobs/vlm_quickstart.yaml"
# held-out scenes that are captioned before the user's eyes
SHOWN = (0, 1, 2)


def vlm_steps(output_dir: Path, *, llm_run: Path, num_processes: int) -> list[Step]:
    """Return the steps of the vision-language stage; everything is written below `output_dir`.

    Args:
        llm_run: folder of the language run that the model starts from.
        num_processes: processes that train.
    """
    scenes, shards, run = output_dir / "scenes", output_dir / "shards", output_dir / "runs" / "vlm"

    def preprocess(split: str) -> Step:
        folder = shards / split
        return Step(
            name=f"preprocess_scenes_{split}",
            what=f"Put the {split} scenes into shards",
            words=words_of("preprocess image_caption", source=scenes / split, output=folder, num_workers=0),
            outputs=(folder / "manifest.jsonl",),
            folder=folder,
        )

    return [
        Step(
            name="scenes",
            what="Draw scenes in MuJoCo and say in words what is where",
            words=words_of(
                "scenes",
                output=scenes,
                num_scenes=NUM_SCENES,
                num_validation_scenes=NUM_VALIDATION_SCENES,
                tasks=",".join(TASKS),
            ),
            outputs=tuple(scenes / split for split in SPLITS),
            folder=scenes,
        ),
        *(preprocess(split) for split in SPLITS),
        training_step(
            "train_vlm",
            "Train the vision-language model, from the language model",
            preset=PRESET,
            run=run,
            shards=shards,
            num_processes=num_processes,
            flags={"model.transformer.resume_from_checkpoint": llm_run},
        ),
    ]


def caption_step(output_dir: Path) -> Step:
    """Return the step that captions a few held-out scenes."""
    words = words_of("caption", checkpoint=output_dir / "runs" / "vlm")
    for index in SHOWN:
        words += words_of("", image=output_dir / "scenes" / "validation" / f"{index:08d}.png")
    return Step(name="caption", what="Say what three held-out scenes show", words=words)
