"""Meta-World behind the interface: upright true pictures, reproducible episodes, experts that succeed."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("metaworld", reason="needs vla-foundry[simulators]")

from vla_foundry.simulators import Layout, Simulator, create_simulator
from vla_foundry.simulators.metaworld import CAMERAS, MetaworldSimulator, scene_tasks, task_names
from vla_foundry.simulators.metaworld_tasks import HALF_OPEN_STARTS

MIDDLE = Layout(object_place=(0.5, 0.5), openness=0.5, gripper_place=(0.1, 0.5, 0.9), gripper_opening=0.5)
HALF_OPEN_TASKS = sorted(f"{name}@half" for name in HALF_OPEN_STARTS)


@pytest.fixture(scope="module")
def drawer() -> Iterator[MetaworldSimulator]:
    with MetaworldSimulator("drawer-open-v3", cameras=("corner2", "workspace"), image_size=(64, 64)) as simulator:
        yield simulator


def play(simulator: Simulator, seed: int, num_steps: int) -> list[bytes]:
    """Everything that is sensed in the first steps of an expert's episode."""
    observations = [simulator.reset(seed=seed)[0]]
    for _ in range(num_steps):
        observations.append(simulator.step(simulator.expert())[0])
    return [array.tobytes() for one in observations for arrays in one.values() for array in arrays.values()]


def solves(task: str, seed: int, *, num_steps: int, acts: bool) -> bool:
    with create_simulator("metaworld", task, cameras=(), image_size=16) as simulator:
        simulator.reset(seed=seed)
        for _ in range(num_steps):
            if simulator.step(simulator.expert() if acts else np.zeros(4))[4]["success"]:
                return True
    return False


@pytest.mark.parametrize("camera", sorted(CAMERAS))
def test_a_coloured_ball_appears_upright_where_geometry_says(camera: str) -> None:
    """The ball hangs before the lens, moved up and to the right as a person who stands there would say."""
    mujoco: Any = importlib.import_module("mujoco")

    size, depth, upward, rightward = 96, 0.15, 0.03, 0.015
    with MetaworldSimulator("push-v3", cameras=(camera,), image_size=(size, size)) as simulator:
        simulator.reset(seed=0)
        simulator.render(camera)  # moves the model's camera to its place
        model, data = simulator._model, simulator._data
        index = model.camera(CAMERAS[camera].model_camera).id
        right, up, back = data.cam_xmat[index].reshape(3, 3).T.copy()
        # what stands upright: up is where the sky is, or, looking straight down, where the table goes on
        if up @ ((0, 0, 1) if abs(back[2]) < 0.95 else (0, 1, 0)) < 0:
            right, up = -right, -up
        ball = data.cam_xpos[index] - depth * back + upward * up + rightward * right
        geom = model.geom("objGeom").id
        model.geom_type[geom], model.geom_size[geom] = mujoco.mjtGeom.mjGEOM_SPHERE, 0.01
        model.geom_matid[geom], model.geom_rgba[geom] = -1, (1, 0, 1, 1)
        data.joint("objjoint").qpos[:3] = ball
        mujoco.mj_forward(model, data)
        red, green, blue = (simulator.render(camera)[..., channel].astype(int) for channel in range(3))
        rows, columns = np.nonzero((red > 90) & (blue > 90) & (green < 60))
        assert len(rows) > 20
        found = np.array([columns.mean() + 0.5, rows.mean() + 0.5])
        # a pinhole: distance from the centre is focal length x offset / depth, in pixels
        focal = size / 2 / np.tan(np.radians(model.cam_fovy[index]) / 2)
        expected = size / 2 + focal / depth * np.array([rightward, -upward])
        np.testing.assert_allclose(found, expected, atol=1.5)
        np.testing.assert_allclose(np.array(simulator.project(camera, ball)) * size, expected, atol=0.01)


def test_the_same_seed_gives_the_same_bytes_whatever_was_done_before(drawer: MetaworldSimulator) -> None:
    drawer.reset(seed=3)
    drawer.arrange(MIDDLE)
    used = play(drawer, 5, 4)
    with MetaworldSimulator("drawer-open-v3", cameras=("corner2", "workspace"), image_size=(64, 64)) as fresh:
        assert play(fresh, 5, 4) == used
    assert play(drawer, 6, 4) != used


def test_an_observation_holds_what_was_asked_for(drawer: MetaworldSimulator) -> None:
    observation, _ = drawer.reset(seed=0)
    assert {name: image.shape for name, image in observation["images"].items()} == {
        "corner2": (64, 64, 3),
        "workspace": (64, 64, 3),
    }
    assert all(image.dtype == np.uint8 and image.std() > 20 for image in observation["images"].values())
    assert {name: field.shape for name, field in observation["fields"].items()} == {
        "end_effector_position": (3,),
        "gripper_opening": (1,),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_finds_no_fault_with_it(drawer: MetaworldSimulator) -> None:
    check_env(drawer, skip_render_check=True)


def test_the_first_picture_shows_this_episode_and_not_the_last(drawer: MetaworldSimulator) -> None:
    for seed in (1, 2):
        drawer.reset(seed=seed)
        stands = drawer._model.body("drawer").pos
        handle = drawer.describe().objects[0].position
        np.testing.assert_allclose(handle[:2], [stands[0], stands[1] - 0.16], atol=1e-3)


def test_actions_move_the_hand_along_their_axes(drawer: MetaworldSimulator) -> None:
    for axis in range(3):
        drawer.reset(seed=0)
        before = drawer.sense()["end_effector_position"]
        for _ in range(10):
            drawer.step(np.eye(4)[axis])
        moved = drawer.sense()["end_effector_position"] - before
        assert moved[axis] > 0.03
        assert np.abs(np.delete(moved, axis)).max() < 0.02


@pytest.mark.parametrize("task", HALF_OPEN_TASKS)
def test_the_expert_solves_half_open_tasks_and_doing_nothing_does_not(task: str) -> None:
    assert solves(task, seed=0, num_steps=200, acts=True)
    assert not solves(task, seed=0, num_steps=100, acts=False)


@pytest.mark.parametrize("thing", ["drawer", "window"])
def test_half_open_pictures_do_not_tell_opening_from_closing(thing: str) -> None:
    pictures = []
    for verb in ("open", "close"):
        with MetaworldSimulator(f"{thing}-{verb}-v3@half", cameras=("corner2",), image_size=(64, 64)) as simulator:
            images = [simulator.reset(seed=seed)[0]["images"]["corner2"] for seed in range(3)]
            pictures.append(np.stack(images))
            openness = simulator.describe().objects[0].openness
            assert openness is not None
            assert 0.35 < openness < 0.65
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert np.abs(np.diff(pictures[0].astype(int), axis=0)).max() > 50


def test_arranged_scenes_are_what_the_layout_says() -> None:
    for task in scene_tasks():
        with MetaworldSimulator(task, cameras=(), image_size=(16, 16)) as simulator:
            for openness in (0.0, 1.0):
                state = simulator.arrange(
                    Layout(
                        object_place=(0.9, 0.9), openness=openness, gripper_place=(0.1, 0.2, 0.5), gripper_opening=1.0
                    )
                )
                assert state is not None
                thing = state.objects[0]
                assert thing.openness is None or thing.openness == pytest.approx(openness, abs=1e-6)
                np.testing.assert_allclose(state.gripper_position, [-0.24, 0.484, 0.16], atol=0.03)


def test_an_arm_inside_the_thing_is_told() -> None:
    with MetaworldSimulator("door-open-v3", cameras=(), image_size=(16, 16)) as simulator:
        inside = Layout(object_place=(0.5, 0.5), openness=0.9, gripper_place=(0.4, 0.45, 0.5), gripper_opening=1.0)
        assert simulator.arrange(inside) is None
        assert simulator.arrange(MIDDLE) is not None


def test_a_second_simulator_leaves_the_pictures_of_the_first_alone(drawer: MetaworldSimulator) -> None:
    drawer.reset(seed=0)
    before = drawer.render("corner2")
    with MetaworldSimulator("window-open-v3", cameras=("corner2",), image_size=(32, 32)) as other:
        other.reset(seed=0)
    np.testing.assert_array_equal(drawer.render("corner2"), before)


def test_what_cannot_be_is_one_line(drawer: MetaworldSimulator) -> None:
    with pytest.raises(ValueError, match=r"metaworld task 'drawer-open' is unknown\. Did you mean 'drawer-open-v3'"):
        MetaworldSimulator("drawer-open", cameras=(), image_size=(16, 16))
    with pytest.raises(ValueError, match="metaworld camera 'corner7' is unknown"):
        MetaworldSimulator("drawer-open-v3", cameras=("corner7",), image_size=(16, 16))
    drawer.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"):
        drawer.step(np.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        drawer.step(np.full(4, np.nan))
    with pytest.raises(ValueError, match="reach-v3 cannot arrange scenes"):
        MetaworldSimulator("reach-v3", cameras=(), image_size=(16, 16)).arrange(MIDDLE)
    drawer.arrange(MIDDLE)
    with pytest.raises(ValueError, match=r"Call reset\(seed\) first"):
        drawer.step(np.zeros(4))


def test_every_task_is_listed_with_its_half_open_variants() -> None:
    assert len(task_names()) == 54
    assert set(HALF_OPEN_TASKS) <= set(task_names())


def test_a_machine_that_cannot_draw_gets_one_line_with_the_command() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    code = (
        "from vla_foundry.simulators import create_simulator\n"
        "try: create_simulator('metaworld', 'push-v3', cameras=(), image_size=16)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment | {"MUJOCO_GL": "glfw"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "apt-get install libosmesa6" in done.stdout
    assert done.stdout.count("\n") == 1


def test_torch_optimizers_work_in_a_process_that_renders() -> None:
    # OSMesa and Triton, which creating an optimizer imports, bring an LLVM each
    code = (
        "from vla_foundry.simulators import create_simulator\n"
        "create_simulator('metaworld', 'push-v3', cameras=('corner2',), image_size=16)\n"
        "import torch\n"
        "torch.optim.AdamW([torch.zeros(1, requires_grad=True)])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
