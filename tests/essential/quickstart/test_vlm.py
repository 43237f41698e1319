"""The preset and the report of the quickstart's vision-language stage."""

from vla_foundry.config.command_line import parse
from vla_foundry.datagen.scene_captions import describe_scene, score_captions
from vla_foundry.params import TrainExperimentParams
from vla_foundry.params.models.vlm import VLMParams
from vla_foundry.quickstart.llm import PRESET as LLM_PRESET
from vla_foundry.quickstart.vlm import PRESET, format_scores


def caption(row: int, state: str = "open") -> str:
    return describe_scene(
        {
            "object": "drawer",
            "part": "handle",
            "state": state,
            "object_row": row,
            "object_column": 3,
            "gripper_row": 2,
            "gripper_column": 6,
            "side": "left",
            "depth": "ahead",
            "height": "below",
        }
    )


def test_the_language_model_is_that_of_the_language_stage() -> None:
    data = ["--data.dataset_manifest", "a/manifest.jsonl"]
    llm = parse(TrainExperimentParams, ["--config_path", LLM_PRESET, *data], prog="train").params.model
    vlm = parse(TrainExperimentParams, ["--config_path", PRESET, *data], prog="train").params.model
    assert isinstance(vlm, VLMParams)
    own = {"resume_from_checkpoint", "resume_weights_only", "freeze"}
    assert {key: value for key, value in vars(vlm.transformer).items() if key not in own} == {
        key: value for key, value in vars(llm).items() if key not in own
    }


def test_the_table_shows_accuracy_beside_chance_and_goal() -> None:
    truths = [caption(row, ("closed", "open")[row % 2]) for row in range(1, 9)]
    lines = format_scores(score_captions([truths[0]] * 8, truths))
    state = next(line for line in lines if "its state" in line)
    assert state.split()[-4:] == ["50.0%", "50.0%", "50.0%", "85%"]
    position = next(line for line in lines if "where it is, within a cell" in line)
    assert position.split()[-4] == "25.0%"
