"""Any registered Gymnasium environment is a simulator by a field map; what does not fit is one line."""

from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.utils.env_checker import check_env

from vla_foundry.config.yaml_source import find_config
from vla_foundry.datagen.demos import main, record_demos
from vla_foundry.evaluation.evaluate import evaluate
from vla_foundry.params.commands.datagen import DemosParams
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.simulators import create_simulator
from vla_foundry.simulators.gymnasium import register_expert

ID = "test/Line-v0"
MAP = """
instruction: [go there]
fields:
  place: {source: robot/place, names: [x]}
  goal: {}
actions:
  target: {unit: mm, columns: [0, 1], rest: place, scale: 10}
  gripper: {columns: [1, 2], gripper: {open: 0, closed: 1}}
success: {info: done}
cameras:
  front: {}
  wrist: {source: pixels, resize: resize_no_crop}
expert: test-line
"""


class Line(gymnasium.Env):
    """A robot on a line of 100 mm; rewarded for its place."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    action_space = Box(np.array([0, 0], np.float32), np.array([100, 1], np.float32))
    observation_space = Dict(
        {"robot": Dict({"place": Box(0, 100)}), "goal": Box(0, 100), "pixels": Box(0, 255, (8, 8, 3), np.uint8)}
    )
    num_renders = 0

    def __init__(self, render_mode: str | None = None, is_discrete: bool = False) -> None:
        self.render_mode = render_mode
        if is_discrete:
            self.action_space = Discrete(3, start=-1)  # pyright: ignore[reportAttributeAccessIssue]

    def observe(self) -> dict[str, Any]:
        pixels = np.full((8, 8, 3), int(self.place), np.uint8)
        return {"robot": {"place": np.array([self.place])}, "goal": np.array([self.goal]), "pixels": pixels}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.goal = (float(number) for number in self.np_random.integers(0, 100, 2))
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        step = action if isinstance(action, int) else np.clip(action[0] - self.place, -20, 20)
        self.place = float(np.clip(self.place + step, 0, 100))
        is_done = abs(self.place - self.goal) < 1
        return self.observe(), self.place, is_done, False, {"done": is_done}

    def render(self) -> Any:
        Line.num_renders += 1
        return np.full((20, 40, 3), int(self.place), np.uint8)


gymnasium.register(ID, cast(Any, Line), max_episode_steps=12)
register_expert("test-line")(lambda line: lambda: np.array([line.goal, 1.0]))


@pytest.fixture
def field_map(tmp_path: Path) -> Path:
    path = tmp_path / "map.yaml"
    path.write_text(MAP, encoding="utf-8")
    return path


def create(field_map: Path, *cameras: str, size: tuple[int, int] = (20, 10)) -> Any:
    source: Any = {"env_id": ID, "field_map": str(field_map)}
    return create_simulator("gymnasium", "Line-v0", cameras=cameras, image_size=size, **source)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_map_names_fields_cameras_and_parts(field_map: Path) -> None:
    with create(field_map, "front", "wrist") as line:
        assert (line.instruction, line.robot, line.fps, line.max_steps) == ("go there", "Line-v0", 5, 12)
        assert line.field_names == {"place": ("x",), "goal": ("0",)}
        assert line.action_names == ("target.0", "gripper")
        assert [part.unit for part in line.action_parts.values()] == ["mm", None]
        np.testing.assert_array_equal(line.action_scale, [10, 0.5])
        assert line.rest_fields == {"target": "place"}
        observation, info = line.reset(seed=3)
        assert not info["success"]
        assert {name: image.shape for name, image in observation["images"].items()} == {
            "front": (10, 20, 3),
            "wrist": (10, 20, 3),
        }
        assert set(observation["images"]["wrist"].ravel()) == {int(observation["fields"]["place"][0])}
        while not info["success"]:
            _, _, _, _, info = line.step(line.expert())
        check_env(line, skip_render_check=True)


def test_pictures_are_rendered_only_if_asked_for(field_map: Path) -> None:
    with create(field_map, "front") as line:
        line.reset(seed=0)
        line.renders_images, before = False, Line.num_renders
        assert line.step(np.zeros(2))[0]["images"] == {}
        assert Line.num_renders == before


@pytest.mark.parametrize(
    ("success", "outcomes"),
    [
        ("{reward: 25}", [False, True, True]),
        ("{episode_return: 115}", [False, False, True]),
        ("{episode_return: 125}", [False, False, False]),
        ("{terminated: true}", [False, False, False]),
    ],
)
def test_success_is_a_reward_a_return_or_an_end(field_map: Path, success: str, outcomes: list[bool]) -> None:
    """From 0 the robot goes to 20, 40 and 60: the limit of three steps ends the episode."""
    field_map.write_text(MAP.replace("{info: done}", success) + "max_steps: 3\n", encoding="utf-8")
    with create(field_map) as line:
        line.reset(seed=0)
        line._environment.unwrapped.place, line._environment.unwrapped.goal = 0.0, 99.0
        assert [line.step(np.array([100.0, 0.0]))[4]["success"] for _ in range(3)] == outcomes


@pytest.mark.parametrize("value", [0.31, float("nan"), "no", None])
def test_a_share_of_what_is_done_is_not_success(
    field_map: Path, monkeypatch: pytest.MonkeyPatch, value: float | str | None
) -> None:
    line = create(field_map)
    line.reset(seed=0)
    step = Line.step
    monkeypatch.setattr(Line, "step", lambda *words: (*step(*words)[:4], {"done": value}))
    with pytest.raises(ValueError, match=r"info\['done'\] must say success: true or false, got"):
        line.step(np.zeros(2, np.float32))


def test_a_discrete_action_is_the_nearest_choice(field_map: Path) -> None:
    text = MAP.replace("target: {unit: mm, columns: [0, 1], rest: place, scale: 10}", "target: {}")
    text = text.replace("  gripper: {columns: [1, 2], gripper: {open: 0, closed: 1}}\n", "")
    field_map.write_text(text + "make: {is_discrete: true}\n", encoding="utf-8")
    with create(field_map) as line:
        assert (line.action_space.low[0], line.action_space.high[0]) == (-1.5, 1.5)
        place = line.reset(seed=1)[0]["fields"]["place"][0]
        for action, step in ((-1.5, -1), (0.4, 0), (0.6, 1), (9.0, 1)):
            after = line.step(np.array([action]))[0]["fields"]["place"][0]
            assert after - place == step
            place = after


def test_demos_and_evaluations_run_in_it(field_map: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"simulator": "gymnasium", "env_id": ID, "field_map": str(field_map)}
    demos = DemosParams(**given, output_dir=str(tmp_path / "demos"), episodes=2, num_workers=0, image_size=16)
    report = record_demos(demos)
    assert report["settings"]["cameras"] == ["front"]
    assert report["settings"]["field_map"]["success"] == {"info": "done"}
    assert list(report["tasks"]) == ["Line-v0"]
    assert record_demos(demos) == report
    field_map.write_text(MAP.replace("mm", "cm"), encoding="utf-8")
    with pytest.raises(ValueError, match="made with other settings"):
        record_demos(demos)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("goal: {}", "goal: {source: gaol}"), r"fields.goal: source 'gaol' is unknown\. Did you mean 'goal'"),
        (("[x]", "[x, y]"), r"names \['x', 'y'\] must be 1"),
        (("[1, 2]", "[1, 3]"), r"actions.gripper: columns \[1, 3\) must follow 1 and end by 2"),
        (("columns: [0, 1], rest", "columns: [0, 2], rest"), r"actions.gripper: columns \[1, 2\) must follow 2"),
        (("rest: place", "rest: plaice"), "actions.target.rest 'plaice' is none of fields: place, goal"),
        (("{info: done}", "{}"), "success must be one of"),
        (("goal: {}", "state: {source: goal}"), "fields.state: demos call all fields together 'state'"),
        (("wrist:", "left.wrist:"), "'left.wrist' must be letters, digits"),
        (("test-line", "test-lime"), "expert 'test-lime' is unknown"),
        (("expert: test-line", "make: {colour: red}"), f"env_id {ID} cannot be made: .*colour"),
    ],
)
def test_a_map_that_does_not_fit_is_one_line(field_map: Path, change: tuple[str, str], message: str) -> None:
    field_map.write_text(MAP.replace(*change), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        create(field_map)
    assert "\n" not in str(caught.value)


def test_an_episode_that_is_judged_when_its_time_is_up_is_recorded(field_map: Path, tmp_path: Path) -> None:
    values = MAP.replace("{info: done}", "{episode_return: 0}")
    field_map.write_text(f"{values}max_steps: 1\n", encoding="utf-8")
    source = {"simulator": "gymnasium", "env_id": ID, "field_map": str(field_map)}
    given: dict[str, Any] = {"episodes": 2, "image_size": 16, "num_workers": 0, "max_attempts": 1}
    report = record_demos(DemosParams(output_dir=str(tmp_path / "demos"), **source, **given))
    assert report["tasks"]["Line-v0"] == {"episodes": 2, "attempts": 2, "frames": 2}


def test_the_expert_of_a_plug_in_acts_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vla_foundry.config.command_line._named", [])
    Path("plug_in_of_a_pole.py").write_text(
        "from vla_foundry.simulators.gymnasium import register_expert\n"
        "register_expert('test-pole')(lambda pole: lambda: pole.state[2:3] > 0)\n",
        encoding="utf-8",
    )
    cartpole = Path(find_config("simulators/cartpole.yaml")).read_text(encoding="utf-8")
    Path("map.yaml").write_text(f"{cartpole.replace('475', '10')}expert: test-pole\n", encoding="utf-8")
    words = ["--simulator", "gymnasium", "--env_id", "CartPole-v1", "--field_map", "map.yaml", "--output_dir", "demos"]
    main(["--plugins", "plug_in_of_a_pole", *words, "--episodes", "1", "--image_size", "16", "--num_workers", "1"])
    assert Path("demos/meta/demos.json").exists()


def test_names_that_are_unknown_are_one_line(field_map: Path, tmp_path: Path) -> None:
    given: Any = {"simulator": "gymnasium", "policy": "null", "output": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="simulator 'gymnasium' needs field_map, such as simulators/reacher"):
        EvaluateParams(**given, env_id=ID)
    with pytest.raises(ValueError, match="env_id is for simulator 'gymnasium', not 'toy'"):
        EvaluateParams(**given | {"simulator": "toy"}, env_id=ID)
    with pytest.raises(ValueError, match=r"task of .*map.yaml 'line' is unknown\. Did you mean 'Line-v0'"):
        create_simulator("gymnasium", "line", cameras=(), image_size=8, env_id=ID, field_map=str(field_map))
    with pytest.raises(ValueError, match="env_id test/Lime-v0 cannot be made"):
        create_simulator(
            "gymnasium", "Lime-v0", cameras=(), image_size=8, env_id="test/Lime-v0", field_map=str(field_map)
        )
    with pytest.raises(ValueError, match=r"tasks is empty\. Name tasks of simulator 'metaworld'"):
        evaluate(EvaluateParams(**given | {"simulator": "metaworld"}))
    assert not (tmp_path / "out").exists()
