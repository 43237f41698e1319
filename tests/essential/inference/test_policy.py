"""A policy in closed loop sees what training saw, keeps to its chunks, and draws by seed and step."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfFileSystem

from vla_foundry.cli import main as run_cli
from vla_foundry.data import create_dataloader
from vla_foundry.data.robotics import load_normalizer
from vla_foundry.hub.push import push
from vla_foundry.inference import Policy, RobotObservation
from vla_foundry.inference.policy_files import load_policy_files
from vla_foundry.inference.window_actions import encode_guidance
from vla_foundry.models import create_batch_handler
from vla_foundry.params.commands.sharing import HubPushParams
from vla_foundry.params.models.roles import LoRAParams
from vla_foundry.randomness import draw_index
from vla_foundry.robotics.spec import FieldDescription, GripperRange, NamedSpec
from vla_foundry.robotics.transforms import SelectFields
from vla_foundry.training.experiment import train
from vla_foundry.world import World

ACTUAL, ACTION = "robot__actual__poses__right::arm", "robot__action__poses__right::arm"
GRIPPER = "robot__action__grippers__right::hand"
OBSERVED = [f"{ACTUAL}__xyz", f"{ACTUAL}__rot_6d", f"{ACTION}__xyz", f"{ACTION}__rot_6d"]
COMMANDED = [f"{ACTION}__xyz", GRIPPER, f"{ACTION}__rot_6d"]


def observe(recording: Any, frame: int, **changes: Any) -> RobotObservation:
    values: dict[str, Any] = {
        "images": {name.rpartition(".")[2]: images[frame] for name, images in recording.images.items()},
        # a robot's own numbers have more digits than recorded ones
        "fields": {name: recording.fields[name][frame].astype(np.float64) for name in OBSERVED},
        "instruction": "lift the lid",
    }
    return RobotObservation(**values | changes)


def load(arm: Any, **options: Any) -> Policy:
    """A policy; each is loaded once, and what it did before is forgotten with `reset`."""
    return _load(arm.run, tuple(options.items()))


@lru_cache
def _load(run: Path, options: tuple[tuple[str, Any], ...]) -> Policy:
    return Policy.from_run(str(run), device="cpu", **dict(options))


def read_samples(arm: Any) -> list[dict[str, Any]]:
    """Validation's samples of the first recording, one a frame."""
    loader = create_dataloader(
        arm.params.data,
        World(),
        global_batch_size=1,
        per_gpu_batch_size=1,
        seed=0,
        split="validation",
        total_samples=28,
    )
    found = [batch for batch in loader.microbatches(0) if batch["episode_ids"] == ["episode_0"]]
    loader.close()
    return sorted(found, key=lambda batch: int(batch["anchors"][0]))


def test_a_policy_sees_what_training_saw(arm: Any) -> None:
    recording, policy = arm.recordings[0], load(arm)
    policy.reset(seed=0)
    samples = read_samples(arm)
    assert len(samples) > 8
    for frame, expected in enumerate(samples):
        assert int(expected["anchors"][0]) == frame
        policy.act(observe(recording, frame))
        found = policy.encode()
        for name in ("pixel_values", "input_ids", "proprioception", "past_mask", "image_mask", "action_dim_mask"):
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name]), (frame, name)
        assert found["documents"].lengths.tolist() == expected["documents"].lengths.tolist()
        if expected["past_mask"].any():
            is_past = expected["past_mask"]
            assert torch.equal(found["actions"][is_past], expected["actions"][is_past])
        # what was really done is what the recording says
        policy.correct({name: recording.fields[name][frame] for name in COMMANDED})


def test_a_policy_may_see_images_alone(silent_arm: Any) -> None:
    recording, policy = silent_arm.recordings[0], load(silent_arm)
    policy.reset(seed=0)
    for frame, expected in enumerate(read_samples(silent_arm)):
        action = policy.act(observe(recording, frame, fields={}, instruction=""))
        assert list(action) == [f"{ACTION}__xyz", f"{ACTION}__rot_6d"]
        found = policy.encode()
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        assert torch.equal(found["past_mask"], expected["past_mask"])
        if expected["past_mask"].any():
            is_past = expected["past_mask"]
            assert torch.equal(found["actions"][is_past], expected["actions"][is_past])
        rows = action[f"{ACTION}__rot_6d"].reshape(2, 3).astype(np.float64)
        np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=3e-7)
        policy.correct({name: recording.fields[name][frame] for name in action})


def take_nearest(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        (2 * np.arange(wanted) + 1) * side // (2 * wanted) for side, wanted in zip(depth.shape, size, strict=True)
    )
    return depth[rows[:, None], columns]


def test_depth_reaches_the_model_as_measured(silent_arm: Any) -> None:
    recording, policy = silent_arm.recordings[0], load(silent_arm)
    assert [camera.name for camera in policy.cameras] == ["rig.front", "rig.wrist", "depth"]
    stored = take_nearest(recording.images["rig.depth"][0], (16, 20))
    cropped = stored[2:15, 1:19]  # data.augmentation: 0.8 of the height, 0.9 of the width
    depth = take_nearest(cropped[:, 2:15], (16, 16)) / 1000
    expected = np.where(depth == 0, 0, np.rint(1 + 254 * np.clip((depth - 0.5) / 2, 0, 1)))
    assert 0 < (depth == 0).mean() < 0.5
    for metres in (False, True):
        policy.reset(seed=0)
        observation = observe(recording, 0, fields={}, instruction="")
        if metres:
            images = {**observation.images, "depth": observation.images["depth"].astype(np.float32) / 1000}
            observation = dataclasses.replace(observation, images=images)
        policy.act(observation)
        found = policy.encode()["pixel_values"]  # two times, three cameras
        np.testing.assert_array_equal(found[[2, 5]], np.broadcast_to(expected, (2, 3, 16, 16)))
    images = observe(recording, 0).images
    front = images["front"]
    for wrong, fault in ((front, "uint8"), (front[..., 0].astype(np.float64), "float64")):
        policy.reset(seed=0)
        with pytest.raises(ValueError, match=rf"camera 'depth' gives {fault} .*, not depth: uint16 \(H, W\) in milli"):
            policy.act(observe(recording, 0, images={**images, "depth": wrong}))


def test_exactly_the_asked_number_of_actions_is_executed(arm: Any) -> None:
    recording = arm.recordings[0]
    whole = load(arm, open_loop_steps=6)
    whole.reset(seed=3)
    chunk = [whole.act(observe(recording, frame)) for frame in range(6)]
    policy = load(arm, open_loop_steps=4)
    policy.reset(seed=3)
    before = policy.num_predicted
    for frame in range(10):
        action = policy.act(observe(recording, frame))
        assert policy.num_predicted - before == 1 + frame // 4
        is_the_same = all(np.array_equal(action[name], chunk[min(frame, 5)][name]) for name in COMMANDED)
        assert is_the_same is (frame < 4)
    assert list(action) == COMMANDED
    # half of the six predicted steps, unless told
    assert load(arm).open_loop_steps == 3
    with pytest.raises(ValueError, match=r"open_loop_steps \(7\) must be 1 .. 6"):
        load(arm, open_loop_steps=7)


def test_actions_are_absolute_and_in_units_of_the_data(arm: Any) -> None:
    recording, policy = arm.recordings[0], load(arm, open_loop_steps=6)
    policy.reset(seed=1)
    actions = [policy.act(observe(recording, 0)) for _ in range(6)]
    # the same normalized numbers, brought back by hand: T = T_ref T_relative
    policy.reset(seed=1)
    policy.act(observe(recording, 0))
    normalizer, model = load_normalizer(arm.run), policy.model
    handler: Any = create_batch_handler(arm.params)
    seeds = torch.tensor([draw_index(1 << 63, seed=1, position=0, purpose="policy.noise")])
    normalized = model.sample(handler.prepare_sampling(policy.encode(), "cpu"), seeds=seeds)[0].double().numpy()  # pyright: ignore[reportCallIssue]
    names = arm.params.data.action_fields
    columns = SelectFields.create(names, normalizer.widths).invert(normalizer.denormalize(normalized, names, anchor=2))
    rotation = recording.fields[f"{ACTUAL}__rot_6d"][0].reshape(2, 3)
    reference = np.stack([*rotation, np.cross(*rotation)])
    origin = recording.fields[f"{ACTUAL}__xyz"][0]
    for step, action in enumerate(actions):
        relative = columns[f"{ACTION}__xyz_relative"][2 + step]
        # of the data's type
        assert {values.dtype for values in action.values()} == {np.dtype(np.float32)}
        np.testing.assert_allclose(action[f"{ACTION}__xyz"], reference @ relative + origin, rtol=1e-7, atol=1e-9)
        assert np.array_equal(action[GRIPPER], columns[GRIPPER][2 + step].astype(np.float32))
        rows = action[f"{ACTION}__rot_6d"].reshape(2, 3).astype(np.float64)
        np.testing.assert_allclose(rows @ rows.T, np.eye(2), atol=3e-7)


def test_noise_depends_on_the_seed_and_the_step_alone(arm: Any) -> None:
    recording = arm.recordings[0]
    policy = load(arm, open_loop_steps=1)

    def roll(seed: int) -> np.ndarray:
        policy.reset(seed)
        return np.stack([policy.act(observe(recording, 0))[GRIPPER] for _ in range(4)])

    first = roll(5)
    assert np.array_equal(first, roll(5))
    assert not np.array_equal(first, roll(6))
    # the robot stands still, the noise does not
    assert len(np.unique(first[2:])) == 2


def roll(policy: Policy, recording: Any, num_steps: int) -> list[dict[str, np.ndarray] | None]:
    """Actions of an episode whose robot moves as recorded; None where the policy is late."""
    policy.reset(seed=4)
    frames = [min(step, 13) for step in range(num_steps)]
    return [policy.act_many({None: observe(recording, frame)}).get(None) for frame in frames]


@pytest.mark.parametrize("execution", ["async", "realtime"])
def test_without_delay_every_execution_is_synchronous(arm: Any, execution: str) -> None:
    recording = arm.recordings[0]
    expected = roll(load(arm), recording, 10)
    for found, action in zip(roll(load(arm, execution=execution, delay_steps=0), recording, 10), expected, strict=True):
        assert found is not None
        assert action is not None
        assert all(np.array_equal(found[name], action[name]) for name in COMMANDED)


def test_chunks_go_on_where_the_last_one_is(arm: Any) -> None:
    recording, distances = arm.recordings[0], {}
    # what is planned for steps 0 .. 5 from the first observation
    plan = roll(load(arm, open_loop_steps=6), recording, 6)
    for execution in ("async", "realtime"):
        policy = load(arm, open_loop_steps=2, execution=execution, delay_steps=2)
        actions = roll(policy, recording, 6)
        # while the second chunk is predicted (steps 2 and 3) the first one runs
        for action, planned in zip(actions[:4], plan[:4], strict=True):
            assert action is not None
            assert planned is not None
            assert all(np.array_equal(action[name], planned[name]) for name in COMMANDED)
        ends = [
            np.concatenate([values[step][name] for step in (4, 5) for name in COMMANDED]) for values in (actions, plan)
        ]  # pyright: ignore[reportOptionalSubscript]
        distances[execution] = np.linalg.norm(ends[0] - ends[1])
    assert 0 < distances["realtime"] < 0.8 * distances["async"]


def test_guidance_is_what_is_left_of_the_chunk_where_the_robot_is_now(arm: Any) -> None:
    recording = arm.recordings[0]
    policy = load(arm, open_loop_steps=2, execution="realtime", delay_steps=1)
    plan = roll(load(arm, open_loop_steps=6), recording, 6)
    roll(policy, recording, 2)
    policy.observe(observe(recording, 2))
    client = policy._clients[None]
    files = load_policy_files(str(arm.run))
    rest = (client.schedule.rest(2), client.history.references())
    guidance = encode_guidance([rest], 1, files.window_spec.window, files.actions, policy.device)
    assert guidance is not None
    # two steps of the past, one frozen, three soft, two new
    assert guidance.weights[0].gt(0).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    assert guidance.weights[0, 2] == 1
    made = files.actions.invert(guidance.target[0].numpy(), client.history.references())
    for number in range(4):
        for name in COMMANDED:
            np.testing.assert_allclose(made[name][number], plan[2 + number][name], atol=1e-5)  # pyright: ignore[reportOptionalSubscript]


def test_acting_does_not_wait_for_predictions_but_the_first(arm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = arm.recordings[0]
    policy = Policy(load(arm).model, load_policy_files(str(arm.run)), open_loop_steps=1, execution="realtime")
    may_go_on, sample = threading.Event(), policy.model.sample

    def wait_and_sample(*args: Any, **values: Any) -> Any:
        assert may_go_on.wait(60)
        return sample(*args, **values)

    may_go_on.set()
    monkeypatch.setattr(policy.model, "sample", wait_and_sample)
    policy.reset(seed=0)
    policy.act(observe(recording, 0))
    may_go_on.clear()
    # the chunk of 0 lasts until step 5
    for frame in range(1, 6):
        policy.act(observe(recording, frame))
    with pytest.raises(TimeoutError, match=r"next chunk is late: .* a chunk has 6 actions\. Hold the robot"):
        policy.act(observe(recording, 6))
    may_go_on.set()
    policy._thread.submit(lambda: None).result()
    # the chunk of 1 ends at step 6; the next one begins
    with pytest.raises(TimeoutError):
        policy.act(observe(recording, 7))
    policy._thread.submit(lambda: None).result()
    policy.act(observe(recording, 8))
    # measured: from 1 to 7, and from 7 to 8
    assert policy._delays.forecast() == 6


def test_robots_are_served_together_as_if_alone(arm: Any) -> None:
    policy = load(arm, open_loop_steps=1)
    alone: dict[str, list[dict[str, np.ndarray]]] = {}
    for number, name in enumerate("ab"):
        policy.reset(seed=number, client=name)
        frames = range(number, number + 5)
        alone[name] = [policy.act_many({name: observe(arm.recordings[number], frame)})[name] for frame in frames]
    for number, name in enumerate("ab"):
        policy.reset(seed=number, client=name)
    # the second robot begins a step later
    for step in range(6):
        due = {name: step - number for number, name in enumerate("ab") if 0 <= step - number < 5}
        observations = {
            name: observe(arm.recordings["ab".index(name)], "ab".index(name) + at) for name, at in due.items()
        }
        for name, action in policy.act_many(observations).items():
            for field in COMMANDED:
                np.testing.assert_allclose(action[field], alone[name][due[name]][field], atol=1e-5)
    policy.forget("a")
    with pytest.raises(ValueError, match=r"No episode of client 'a' was begun"):
        policy.act_many({"a": observe(arm.recordings[0], 0)})


def test_images_are_needed_where_a_chunk_looks(arm: Any) -> None:
    recording = arm.recordings[0]
    policy = load(arm, open_loop_steps=4)
    policy.reset(seed=2)
    policy.reset(seed=2, client="sparse")
    needed = []
    for frame in range(12):
        full = observe(recording, frame)
        needed.append(policy.needs_images("sparse"))
        bare = full if needed[-1] else dataclasses.replace(full, images={})
        expected = policy.act(full)
        found = policy.act_many({"sparse": bare})["sparse"]
        assert all(np.array_equal(expected[name], found[name]) for name in COMMANDED)
    # chunks begin at 0, 4 and 8, and look two steps back
    assert [frame for frame in range(12) if needed[frame]] == [0, 2, 4, 6, 8, 10]


def test_averaged_weights_act_unless_told_otherwise(arm: Any) -> None:
    recording = arm.recordings[0]

    def first_action(**options: Any) -> np.ndarray:
        policy = load(arm, **options)
        policy.reset(seed=0)
        return policy.act(observe(recording, 0))[GRIPPER]

    assert np.array_equal(first_action(), first_action(use_ema=True))
    assert not np.array_equal(first_action(), first_action(use_ema=False))
    assert not np.array_equal(first_action(), first_action(num_inference_steps=3))


def test_a_policy_with_adapters_acts_like_the_merged_one(arm: Any) -> None:
    lora = LoRAParams(targets=["vision_language_backbone.*"], train=["action_head.*"], alpha=64.0)
    start: dict[str, Any] = {"resume_from_checkpoint": str(arm.run), "resume_weights_only": True, "lora": lora}
    model = dataclasses.replace(arm.params.model, **start)
    params = dataclasses.replace(arm.params, name="adapted", model=model)
    train(params, World())
    adapted, merged = arm.run.with_name("adapted"), arm.run.with_name("merged")
    run_cli(["merge", "--checkpoint", str(adapted), "--output", str(merged)])
    actions = []
    for run in (arm.run, adapted, merged):
        policy = Policy.from_run(str(run), device="cpu")
        policy.reset(seed=0)
        actions.append(np.concatenate(list(policy.act(observe(arm.recordings[0], 0)).values())))
    np.testing.assert_allclose(actions[1], actions[2], rtol=1e-5, atol=1e-5)
    assert np.abs(actions[0] - actions[1]).max() > 1e-3


def test_what_an_observation_lacks_is_named(arm: Any) -> None:
    recording, policy = arm.recordings[0], load(arm)
    with pytest.raises(ValueError, match=r"No episode was begun. Call reset\(seed\) first"):
        Policy(policy.model, load_policy_files(str(arm.run))).act(observe(recording, 0))
    good = observe(recording, 0)
    fields = dict(good.fields)
    for changes, message in (
        ({"images": {}}, r"the image of camera 'rig\.front' is missing, 0 steps back; the images given were: none"),
        ({"images": {"top": good.images["front"]}}, r"camera 'rig\.front' is missing.*: top. Give it under that name"),
        ({"images": {**good.images, "wrist": np.zeros((20, 24, 3), np.uint8)}}, r"gives 24 x 20 .* it had 20 x 24"),
        ({"images": {**good.images, "wrist": np.zeros((24, 20, 3))}}, r"gives float64 .* not uint8"),
        (
            {"fields": {name: fields[name] for name in OBSERVED[1:]}},
            rf"needs the field '{OBSERVED[0]}', but the .* has {OBSERVED[3]}",
        ),
        ({"fields": fields | {OBSERVED[0]: np.array([0, np.nan, 1])}}, r"must be 3 finite numbers, got \[0\.0, nan"),
        ({"instruction": ""}, r"instruction"),
    ):
        bad = dataclasses.replace(good, **changes)
        policy.reset(seed=0)
        policy.reset(seed=0, client="a")
        with pytest.raises(ValueError, match=message):
            policy.act(bad)
        with pytest.raises(ValueError, match=message):
            policy.act_many({"a": good, None: bad})
        # nobody has taken a step
        assert policy.act_many({"a": good, None: good}).keys() == {"a", None}


def test_a_robot_that_means_something_else_is_refused(arm: Any) -> None:
    policy = load(arm)
    own = policy.spec
    same = dataclasses.replace(own, fields={**own.fields, OBSERVED[3]: FieldDescription(shape=(6,))})
    policy.check_robot(NamedSpec("the arm", same))
    turned = dataclasses.replace(own.fields[GRIPPER], gripper=GripperRange(open=0.0, closed=1.0))
    for changes, message in (
        ({"fps": 20.0}, r"has 10 frames a second and the arm 20"),
        (
            {"cameras": {}},
            r"the arm has no camera 'rig\.front' or 'rig\.wrist' \(it has none\), which the policy was trained on",
        ),
        (
            {"cameras": {name: dataclasses.replace(each, is_depth=True) for name, each in own.cameras.items()}},
            r"camera 'rig\.front': the policy was trained on colours, and the arm gives depth",
        ),
        ({"fields": {**same.fields, GRIPPER: turned}}, r"its gripper is"),
        (
            {"fields": {name: same.fields[name] for name in same.fields if name != GRIPPER}},
            r"the arm has no field '.*hand' \(it has robot__.*\), which the policy was trained on",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            policy.check_robot(NamedSpec("the arm", dataclasses.replace(same, **changes)))


def test_other_runs_are_no_policies(tmp_path: Path, arm: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist. Give a run folder"):
        Policy.from_run(str(tmp_path / "nothing"))
    (tmp_path / "config_model.yaml").write_text("type: transformer\nhidden_dim: 8\n", encoding="utf-8")
    text = (arm.run / "config.yaml").read_text(encoding="utf-8")
    start, end = text.index("\nmodel:"), text.index("\ndistributed:")
    model = "\nmodel: {type: transformer, hidden_dim: 8, n_layers: 1, n_heads: 1, vocab_size: 9, max_seq_len: 8}"
    (tmp_path / "config.yaml").write_text(text[:start] + model + text[end:], encoding="utf-8")
    with pytest.raises(ValueError, match=r"of type 'transformer', which is not a policy"):
        Policy.from_run(str(tmp_path))


def test_files_that_a_policy_was_not_trained_with_are_refused(tmp_path: Path, arm: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(arm.run, run)
    step = next((run / "checkpoints").glob("step_*"))
    Policy.from_run(str(step))
    normalizer = run / "normalizer.json"
    content = normalizer.read_text(encoding="utf-8")
    state = json.loads(content)
    state["fields"][GRIPPER]["center"][0][0] += 1
    normalizer.write_text(json.dumps(state), encoding="utf-8")
    for checkpoint in (run, step):
        with pytest.raises(
            ValueError, match=rf"trained with: the statistics of '{GRIPPER}' differ\. Put the run's own"
        ):
            Policy.from_run(str(checkpoint))
    normalizer.write_text(content, encoding="utf-8")
    spec = run / "robotics.json"
    content = spec.read_text(encoding="utf-8")
    spec.write_text(json.dumps(json.loads(content) | {"fps": 99.0}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"trained with: robotics\.json has another 'fps'"):
        Policy.from_run(str(run))
    spec.write_text(content, encoding="utf-8")
    tokenizer = run / "processor" / "tokenizer.json"
    values = json.loads(tokenizer.read_text(encoding="utf-8"))
    ids = values["model"]["vocab"]
    *_, first, second = ids
    ids[first], ids[second] = ids[second], ids[first]
    tokenizer.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=r"does not hold the files that .* was trained with: their tokens or merges"):
        Policy.from_run(str(run))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_policy_on_the_hub_acts_like_its_run(arm: Any, hub: Any) -> None:
    push(HubPushParams(source=str(arm.run), repo="org/arm"))
    acted = []
    for checkpoint in (str(arm.run), "hf://org/arm"):
        policy = Policy.from_run(checkpoint, device="cpu")
        policy.reset(3)
        acted.append(policy.act(observe(arm.recordings[0], 0)))
    assert acted[0].keys() == acted[1].keys()
    assert all(np.array_equal(acted[0][name], acted[1][name]) for name in acted[0])
    card = hub.files("org/arm")["README.md"].decode()
    assert "pipeline_tag: robotics" in card
    assert f"| `{GRIPPER}` | 1 | action |" in card
    # its spec was replaced on the hub
    _, files = hub.repositories["model", "org/arm"][-1]
    files["robotics.json"].content = json.dumps(json.loads(files["robotics.json"].content) | {"fps": 99.0}).encode()
    HfFileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match=r"hf://org/arm was trained with: robotics\.json has another 'fps'"):
        Policy.from_run("hf://org/arm", device="cpu")


def act_once(arm: Any, **options: Any) -> np.ndarray:
    policy = Policy.from_run(str(arm.run), device="cpu", **options)
    policy.reset(3)
    return np.concatenate(list(policy.act(observe(arm.recordings[0], 0)).values()))


def test_bf16_changes_last_digits_only(arm: Any) -> None:
    full, low = act_once(arm), act_once(arm, precision="bf16")
    assert low.dtype == full.dtype
    assert not np.array_equal(low, full)
    np.testing.assert_allclose(low, full, atol=0.05)
    assert Policy.from_run(str(arm.run), device="cpu", precision=None).precision == "fp32"


# in a process of its own: checks of types are no part of what is compiled
COMPARE_COMPILED = """
import sys
import numpy as np
from vla_foundry.inference import Policy

actions = []
for compile_blocks in (False, True):
    policy = Policy.from_run(sys.argv[1], device="cpu", compile_blocks=compile_blocks)
    policy.warm_up()
    policy.reset(3)
    batch = np.random.default_rng(0)
    images = {c.name: batch.integers(0, 256, (*c.original_size[::-1], 3), dtype=np.uint8) for c in policy.cameras}
    fields = {name: np.tile(np.eye(3).reshape(9)[:6], 2)[: field.width] for name, field in policy.observed.items()}
    from vla_foundry.inference import RobotObservation
    given = RobotObservation(images=images, fields=fields, instruction="lift the lid")
    actions.append(np.concatenate(list(policy.act(given).values())))
np.testing.assert_allclose(*actions, atol=1e-4)
assert not np.array_equal(*actions), "nothing was compiled"
"""


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="compiling needs a C++ compiler")
def test_compiled_blocks_change_last_digits_only(arm: Any) -> None:
    done = subprocess.run([sys.executable, "-c", COMPARE_COMPILED, str(arm.run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
