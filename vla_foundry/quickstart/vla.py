"""The action stage: demonstrations of a simulated robot -> a policy, from the vision-language model -> closed loop."""

from pathlib import Path

from vla_foundry.evaluation.run import SUMMARY_NAME
from vla_foundry.quickstart.stages import Step, training_step, words_of

# each starts half open, so that the picture does not tell whether to open or to close: only the instruction does
TASKS = ("drawer-open-v3@half", "drawer-close-v3@half", "window-open-v3@half", "window-close-v3@half")
NUM_DEMOS = 50
NUM_EPISODES = 20
# control steps of an episode; policies were seen to take up to 130
MAX_STEPS = 200
FIELD_MAP = "config_presets/field_maps/metaworld.yaml"
PRESET = "config_presets/training_jobs/vla_quickstart.yaml"
# what is evaluated beside the model
BASELINES = ("null", "random")
ABLATIONS = ("other_images", "wrong_instruction", "vla_from_scratch")


def vla_steps(output_dir: Path, *, vlm_run: Path, num_processes: int) -> list[Step]:
    """Return the steps of the action stage; everything is written below `output_dir`.

    Args:
        vlm_run: folder of the vision-language run that the policy starts from.
        num_processes: processes that train.
    """
    demos, shards, run = output_dir / "demos", output_dir / "shards", output_dir / "runs" / "vla"
    return [
        Step(
            name="demos",
            what="Let scripted experts move the robot, and record them as a LeRobot dataset",
            words=words_of("demos", tasks=",".join(TASKS), episodes=NUM_DEMOS, output_dir=demos),
            outputs=(demos / "meta" / "demos.json",),
            folder=demos,
        ),
        _preprocess(demos, shards),
        training_step(
            "train_vla",
            "Train the policy, from the vision-language model",
            preset=PRESET,
            run=run,
            shards=shards,
            num_processes=num_processes,
            flags={"model.vision_language_backbone.resume_from_checkpoint": vlm_run},
        ),
        _evaluate(output_dir, "evaluate", "Let the policy move the robot", policy_name="vla", checkpoint=run),
        *(
            _evaluate(
                output_dir,
                f"evaluate_{name}",
                f"The same without a policy: {name} actions",
                policy_name=name,
                policy=name,
            )
            for name in BASELINES
        ),
    ]


def ablation_steps(output_dir: Path, *, vlm_run: Path, num_processes: int) -> list[Step]:
    """Return the steps that take something away from the policy: its pictures, its instruction, its training before.

    Args:
        vlm_run: folder of the vision-language run, of which the policy that starts from nothing has the architecture.
        num_processes: processes that train.
    """
    shards, run, scratch = output_dir / "shards", output_dir / "runs" / "vla", output_dir / "runs" / "vla_from_scratch"
    swapped = {task: _opposite_instruction(task) for task in TASKS}
    return [
        _evaluate(
            output_dir,
            "evaluate_other_images",
            "Show the policy pictures of another episode",
            policy_name="other_images",
            checkpoint=run,
            images="other_episode",
        ),
        _evaluate(
            output_dir,
            "evaluate_wrong_instruction",
            "Tell the policy the opposite",
            policy_name="wrong_instruction",
            checkpoint=run,
            instructions="{" + ", ".join(f"{task}: {text}" for task, text in swapped.items()) + "}",
        ),
        training_step(
            "train_vla_from_scratch",
            "Train the same policy from nothing",
            preset=PRESET,
            run=scratch,
            shards=shards,
            num_processes=num_processes,
            flags={
                "model.vision_language_backbone.vlm": f"include {vlm_run / 'config_model.yaml'}",
                # the config of a run that itself started from one
                "model.vision_language_backbone.vlm.transformer.resume_from_checkpoint": "null",
                "data.processor": vlm_run / "processor",
            },
        ),
        _evaluate(
            output_dir,
            "evaluate_from_scratch",
            "Let that policy move the robot",
            policy_name="vla_from_scratch",
            checkpoint=scratch,
        ),
    ]


def _preprocess(demos: Path, shards: Path) -> Step:
    return Step(
        name="preprocess_demos",
        what="Put the recordings into shards, a tenth of them held out",
        words=words_of(
            "preprocess robotics",
            type="lerobot",
            source_episodes=demos,
            output_dir=shards,
            field_map=FIELD_MAP,
            past_lowdim_steps=0,
            future_lowdim_steps=7,
            image_indices="[0]",
            max_padding_left=0,
            max_padding_right=7,
            validation_fraction=0.1,
            num_workers=0,
        ),
        outputs=(shards / "train" / "manifest.jsonl", shards / "validation" / "manifest.jsonl"),
        folder=shards,
    )


def _evaluate(output_dir: Path, step: str, what: str, *, policy_name: str, **flags: object) -> Step:
    folder = output_dir / "evaluation"
    results = folder / policy_name
    options = {
        "tasks": ",".join(TASKS),
        "episodes": f"0:{NUM_EPISODES}",
        "max_steps": MAX_STEPS,
        "output": folder,
        "name": policy_name,
    }
    words = words_of("evaluate", **options, **flags)
    # results of other weights or settings are not gone on with, but made again
    return Step(name=step, what=what, words=words, outputs=(results / SUMMARY_NAME,), folder=results)


def _opposite_instruction(task: str) -> str:
    thing, _, rest = task.partition("-")
    return f"{'close' if rest.startswith('open') else 'open'} the {thing}"
