"""A policy trained on demonstrations of the toy simulator, evaluated in it."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.essential.evaluation.test_rollouts import ShuffledPool, by_seed, create_setup, list_episodes
from vla_foundry.config.command_line import parse
from vla_foundry.config.resolve import resolve
from vla_foundry.data.facts import read_facts
from vla_foundry.datagen.demos import record_demos
from vla_foundry.evaluation.cluster import ClusterActor, ClusterPool, _describe_end, choose_gpus
from vla_foundry.evaluation.evaluate import describe_setup, evaluate, open_candidate
from vla_foundry.evaluation.policy_actor import load_candidate
from vla_foundry.evaluation.rollout_worker import Reply, RolloutWorker, SimulatorSetup
from vla_foundry.evaluation.rollouts import Episode, create_pool, run_episodes
from vla_foundry.params import TrainExperimentParams
from vla_foundry.params.commands.datagen import DemosParams
from vla_foundry.params.commands.evaluation import EvaluateParams
from vla_foundry.params.commands.preprocessing_robotics import LeRobotParams
from vla_foundry.preprocessing.robotics.robotics_job import preprocess_robotics
from vla_foundry.preprocessing.tasks import ray_cluster
from vla_foundry.training.experiment import train
from vla_foundry.world import World

pytestmark = pytest.mark.usefixtures("toy_simulator")

FIELD_MAP = """
fields:
  observation.place: {unit: m}
  action.step: {source: action, columns: [0, 1], unit: cm, representation: delta}
  action.gripper: {source: action, columns: [1, 2], gripper: {open: -1, closed: 1}}
"""
CONFIG = """
model:
  type: diffusion_policy
  vision_language_backbone:
    type: vlm_foundry_backbone
    num_vlm_layers_to_use: 1
    vlm:
      vit: {hidden_dim: 32, inter_dim: 48, n_layers: 1, n_heads: 4, patch_size: 4, img_size: 16}
      transformer: {hidden_dim: 32, n_layers: 2, n_heads: 4, max_seq_len: 128}
  action_head:
    type: flow_transformer
    noise: {type: flow, num_inference_steps: 3}
    transformer: {hidden_dim: 32, n_layers: 1, n_heads: 2, max_seq_len: 64, vocab_size: 0}
data:
  type: robotics
  action_fields: [action.gripper, action.step]
  proprioception_fields: [observation.place]
  image_indices: [0]
  lowdim_past_timesteps: 0
  lowdim_future_timesteps: 3
  normalization: {epsilon: 0.5}
  num_workers: 0
  seq_len: 64
  allow_multiple_epochs: true
hparams: {global_batch_size: 8, per_gpu_batch_size: 8, precision: fp32, lr: 1e-3, warmup: 0}
num_checkpoints: 1
total_train_samples: 16
"""


@pytest.fixture(scope="module")
def run(toy_simulator: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps: what it does is far from right, and depends on all that it sees."""
    folder = tmp_path_factory.mktemp("policy")
    demos, data = folder / "demos", folder / "data"
    record_demos(
        DemosParams(
            simulator="toy",
            tasks=["easy"],
            episodes=3,
            cameras=["front"],
            image_size=16,
            num_workers=0,
            output_dir=str(demos),
        )
    )
    (folder / "map.yaml").write_text(FIELD_MAP, encoding="utf-8")
    options: dict[str, Any] = {"past_lowdim_steps": 0, "future_lowdim_steps": 3, "image_indices": [0]}
    options |= {"source_episodes": [str(demos)], "output_dir": str(data), "field_map": str(folder / "map.yaml")}
    preprocess_robotics(LeRobotParams(**options, num_workers=0))
    words = ["<unk>", "<|endoftext|>", "User", "Assistant", ":", "move", "right", "robot", "What", "should", "do", "?"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "train.yaml").write_text(CONFIG, encoding="utf-8")
    flags = ["--config_path", str(folder / "train.yaml"), "--data.dataset_manifest", str(data / "manifest.jsonl")]
    flags += ["--data.tokenizer", str(folder / "tokenizer"), "--save_path", str(folder), "--name", "toy_run"]
    params = parse(TrainExperimentParams, flags, prog="train").params
    train(resolve(params, read_facts(params, 1)), World())
    return folder / "toy_run"


def create_params(run: Path, output: Path, **values: Any) -> EvaluateParams:
    given: dict[str, Any] = {"tasks": ["easy", "hard"], "checkpoint": str(run), "episodes": "0:5", "num_workers": 1}
    given |= {"simulator": "toy", "device": "cpu", "output": str(output)}
    return EvaluateParams(**given | values)


def read_steps(folder: Path) -> dict[tuple[str, int], tuple[str, int]]:
    """{(task, seed): (outcome, steps)}; latencies differ from run to run."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/rollouts/*/results.json")]
    episodes = [episode for file in files for episode in file["evaluations"]]
    assert all(episode["latency_ms"] > 0 for episode in episodes)
    return {(e["skill_type"], e["scenario_index"]): (e["outcome"], e["num_steps"]) for e in episodes}


@pytest.fixture(scope="module")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[str, int]]:
    """What comes out with one process."""
    folder = tmp_path_factory.mktemp("alone")
    evaluate(create_params(run, folder))
    # the run keeps its success rates
    table = json.loads((run / "experiment.json").read_text(encoding="utf-8"))["evaluations"][0]
    assert (table["name"], table["metrics"]["easy"]["n"], len(table["metrics"]["easy"]["interval"])) == (
        "toy toy_run",
        5,
        2,
    )
    return read_steps(folder / "toy_run")


def test_a_policy_does_the_same_on_any_number_of_processes(
    run: Path, alone: dict[tuple[str, int], tuple[str, int]], tmp_path: Path
) -> None:
    assert len(alone) == 10
    assert len({steps for _, steps in alone.values()}) > 1
    evaluate(create_params(run, tmp_path, num_workers=3))
    assert read_steps(tmp_path / "toy_run") == alone


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_policy_does_the_same_for_1_4_and_16_environments(
    run: Path, alone: dict[tuple[str, int], tuple[str, int]], tmp_path: Path, batch_size: int
) -> None:
    """Whoever answers first, and whoever dies."""
    candidate = load_candidate(create_params(run, tmp_path, batch_size=batch_size), "front")
    setup = create_setup(cameras=candidate.cameras, image_size=candidate.image_size)
    actor = candidate.create_actor(RolloutWorker(setup).describe(task="easy"))
    episodes = [replace(each, instruction="move right") for each in list_episodes(["easy", "hard"], actor, 5)]
    found = []
    for num_workers in (1, 4, 16):
        pool = ShuffledPool(setup, num_workers, seed=num_workers, deaths=0.1)
        results = by_seed([*run_episodes(pool, episodes)])
        assert pool.died
        assert all(result.latency_p50_ms <= result.latency_p99_ms for result in results)
        found.append({(result.task, result.seed): (result.outcome, result.num_steps) for result in results})
    assert found[1:] == found[:1] * 2
    if batch_size == 1:
        assert found[0] == alone


def test_an_action_does_not_depend_on_who_else_asks(run: Path) -> None:
    for batch_size in (1, 4):
        actor, seen = first_actions(run, batch_size=batch_size)
        together = actor.act(seen)
        for slot in seen:
            actor, _ = first_actions(run, batch_size=batch_size)
            np.testing.assert_array_equal(actor.act({slot: seen[slot]})[slot], together[slot])


def test_a_served_policy_does_the_same(
    run: Path, alone: dict[tuple[str, int], tuple[str, int]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "vla_foundry.cli", "serve", "--checkpoint", str(run), "--device", "cpu"]
    server = subprocess.Popen(
        [*command, "--port", "0", "--websocket_port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    try:
        address = re.match(
            r"serving toy_run: grpc (127\.0\.0\.1:\d+), openpi ws://\S+, vla-eval ws://\S+/vla_eval$", line
        )
        assert address is not None, line
        params = create_params(run, tmp_path, checkpoint=None, policy_server=address[1])
        evaluate(params)
        assert read_steps(tmp_path / "toy_run") == alone
        # results of the checkpoint and of its server may be mixed
        evaluate(replace(params, policy_server=None, checkpoint=str(run)))
        for execution in ("blocking", "realtime"):
            values: dict[str, Any] = {
                "tasks": ["easy"],
                "episodes": "0:2",
                "simulated_latency_ms": 150.0,
                "execution": execution,
            }
            evaluate(create_params(run, tmp_path, name=f"{execution}_here", **values))
            values |= {"checkpoint": None, "policy_server": address[1]}
            evaluate(create_params(run, tmp_path, name=f"{execution}_served", **values))
            assert read_steps(tmp_path / f"{execution}_here") == read_steps(tmp_path / f"{execution}_served")
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=30)
        assert (server.returncode, out, err) == (0, "", "")
    finally:
        server.kill()
    with pytest.raises(ConnectionError, match="unavailable"):
        evaluate(replace(params, name="gone", server_timeout_s=5.0))
    with pytest.raises(ValueError, match="Give either a checkpoint"):
        create_params(run, tmp_path, policy_server=address[1])


def test_zero_latency_changes_nothing(run: Path, alone: dict[tuple[str, int], tuple[str, int]], tmp_path: Path) -> None:
    for execution in ("blocking", "async", "realtime"):
        evaluate(create_params(run, tmp_path, simulated_latency_ms=0.0, execution=execution, name=execution))
        assert read_steps(tmp_path / execution) == alone


def test_the_simulator_moves_on_while_the_policy_thinks(run: Path) -> None:
    """Ten steps of 0.1 s; two actions of each chunk are executed, and a prediction takes 150 ms, two steps."""
    sent = {}
    for execution in ("blocking", "async", "realtime"):
        actor, seen = first_actions(run, simulated_latency_ms=150.0, execution=execution)
        sent[execution], needed = [], []
        for _ in range(10):
            needed.append(actor.needs_images(0))
            sent[execution].append(actor.act(seen)[0])
        # the effort of the gripper is a target and stays, the step is a change and becomes 0
        is_still = [step[0] == 0 for step in sent[execution]]
        if execution == "blocking":
            assert [step for step in range(10) if is_still[step]] == [2, 3, 6, 7]
            assert all(sent[execution][step][1] == sent[execution][1][1] for step in (2, 3))
            assert [step for step in range(10) if needed[step]] == [0, 2, 6]
        else:
            assert not any(is_still)
            assert [step for step in range(10) if needed[step]] == [0, 2, 4, 6, 8]
    # the first chunk runs to the end of the second prediction
    np.testing.assert_array_equal(sent["async"][:4], sent["realtime"][:4])
    assert not np.array_equal(sent["async"], sent["realtime"])
    np.testing.assert_array_equal(sent["blocking"][:2], sent["async"][:2])
    # a chunk of four actions does not outlast 300 ms
    actor, seen = first_actions(run, simulated_latency_ms=300.0, execution="async")
    late = [actor.act(seen)[0] for _ in range(6)]
    assert [step for step in range(6) if late[step][0] == 0] == [4]
    assert late[4][1] == late[3][1]
    with pytest.raises(ValueError, match=r"simulated_latency_ms \(400\) is 4 control steps, and a chunk has 4 actions"):
        first_actions(run, simulated_latency_ms=400.0, execution="realtime")


def first_actions(run: Path, **values: Any) -> tuple[Any, dict[int, Reply]]:
    """An actor that has begun two episodes, and what its robots see."""
    params = create_params(run, Path("unused"), **values)
    candidate = load_candidate(params, "front")
    setup = SimulatorSetup(
        simulator="toy", cameras=candidate.cameras, picture_camera="front", image_size=(16, 16), max_steps=None
    )
    worker = RolloutWorker(setup)
    actor = candidate.create_actor(worker.describe(task="easy"))
    for slot in (0, 1):
        actor.begin(slot, 10 + slot, "move right")
        assert actor.needs_images(slot)
    return actor, {slot: worker.begin(task="easy", seed=10 + slot) for slot in (0, 1)}


def test_images_can_be_those_of_another_episode() -> None:
    """The pictures are those of the other start after the same actions; the fields are the episode's own."""
    setup = SimulatorSetup(
        simulator="toy", cameras=("front",), picture_camera="front", image_size=(16, 16), max_steps=None
    )
    workers = [RolloutWorker(setup) for _ in range(3)]
    found = [
        workers[0].begin(task="easy", seed=3, shown_seed=4),
        workers[1].begin(task="easy", seed=3),
        workers[2].begin(task="easy", seed=4),
    ]
    action = np.array([0.5, 0.1], np.float32)
    for with_images in (True, False, True):
        mixed, own, other = found
        np.testing.assert_array_equal(mixed.fields["place"], own.fields["place"])
        assert mixed.images.keys() == own.images.keys()
        for camera in mixed.images:
            np.testing.assert_array_equal(mixed.images[camera], other.images[camera])
            assert not np.array_equal(mixed.images[camera], own.images[camera])
        found = [worker.step(action=action, with_images=with_images) for worker in workers]


def test_noise_has_a_seed_of_its_own(run: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        actor, seen = first_actions(run, seed=seed)
        drawn.append(actor.act(seen)[0])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_latency_needs_a_policy_and_an_execution_needs_latency() -> None:
    for values, message in (
        ({"checkpoint": "run", "execution": "async"}, r"execution 'async' needs simulated_latency_ms"),
        ({"policy": "null", "simulated_latency_ms": 5.0}, r"simulated_latency_ms needs a checkpoint"),
        (
            {"policy_server": "here:1", "server_timeout_s": 1e9},
            r"server_timeout_s .* must be above 0 and at most 86400",
        ),
        ({"policy_server": "localhost:1", "ensemble_decay": 0.1}, r"ensemble_decay needs a checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateParams(tasks=["easy"], output="out", **values)


def test_rollouts_of_other_settings_are_not_mixed(run: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"tasks": ["easy"], "episodes": "0:2", "name": "mine"}
    evaluate(create_params(run, tmp_path, images="other_episode", **values))
    path = next((tmp_path / "mine").glob("easy/rollouts/*/results.json"))
    settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    assert (settings["images"], settings["open_loop_steps"]) == ("other_episode", 2)
    with pytest.raises(ValueError, match=r"made with other settings \(images other_episode -> own\)"):
        evaluate(create_params(run, tmp_path, **values))
    # so are those of versions that ran episodes in lock-step
    path.write_text(path.read_text(encoding="utf-8").replace('"batch_shape": "fixed",', ""), encoding="utf-8")
    with pytest.raises(ValueError, match=r"made with other settings \(batch_shape None -> fixed\)"):
        evaluate(create_params(run, tmp_path, **values, images="other_episode"))


def test_a_policy_whose_spec_was_changed_is_refused(run: Path, tmp_path: Path) -> None:
    spec = run / "robotics.json"
    text = spec.read_text(encoding="utf-8")
    try:
        spec.write_text(text.replace('"fps": 10.0', '"fps": 20.0'), encoding="utf-8")
        with pytest.raises(ValueError, match=r"robotics\.json has another 'fps'"):
            evaluate(create_params(run, tmp_path / "out"))
    finally:
        spec.write_text(text, encoding="utf-8")
    assert not (tmp_path / "out").exists()


def test_a_simulator_with_other_cameras_and_actions_is_refused_with_both(run: Path, tmp_path: Path) -> None:
    message = (
        r"The policy of .*toy_run does not fit simulator 'other_toy'\. toy camera 'front' is unknown\. "
        r"Registered: top\. .* has no field 'action\.gripper' or 'action\.step' "
        r"\(it has action, action\.speed, observation.*\), which the policy was trained on\."
    )
    with pytest.raises(ValueError, match=message):
        evaluate(create_params(run, tmp_path / "out", simulator="other_toy"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def cluster(toy_simulator: None) -> Iterator[Any]:
    """A Ray cluster of two nodes with two CPUs each, which evaluations of this process use."""
    with pytest.MonkeyPatch.context() as patch:
        # a busy machine may take long to start a node, or a process that imports torch
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        patch.setenv("RAY_worker_register_timeout_seconds", "300")
        # of toy_simulator.py; unlike spawned processes, Ray's have paths of their own
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        from ray.cluster_utils import Cluster

        options = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100 << 20}
        options |= {"no_monitor": True, "include_log_monitor": False}
        quick = {"include_dashboard": False, "_system_config": {"health_check_period_ms": 1000}}
        found = Cluster(initialize_head=True, head_node_args=options | quick)
        found.add_node(**options)
        with ray_cluster(None, found.address, flag="--cluster") as num_cpus:
            assert num_cpus == 4
            _skip_without_actors()
            yield found
        found.shutdown()


def _skip_without_actors() -> None:
    """Skip where Ray itself cannot keep an actor: on some networks its head takes a driver for dead at once."""
    import ray

    class Probe:
        def answer(self) -> int:
            return 1

    try:
        ray.get(ray.remote(Probe).remote().answer.remote(), timeout=60)
    except ray.exceptions.RayActorError as error:
        pytest.skip(f"Ray keeps no actor on this machine: {str(error).splitlines()[0]}")


@pytest.mark.slow
def test_a_cluster_does_the_same(
    run: Path, alone: dict[tuple[str, int], tuple[str, int]], tmp_path: Path, cluster: Any
) -> None:
    evaluate(create_params(run, tmp_path, cluster=cluster.address, num_workers=5, num_policies=2, gpus_per_policy=0.0))
    assert read_steps(tmp_path / "toy_run") == alone
    # the pictures are there too
    assert (tmp_path / "toy_run" / "contact_sheet.png").exists()
    for values, message in (
        ({"checkpoint": str(run / "gone")}, r"On node [\d.]+: .*gone.* All nodes must see the checkpoint"),
        (
            {"device": "auto", "num_policies": 3, "gpus_per_policy": 0.5},
            r"its 0 GPUs have room for 0\. Lower one of them",
        ),
        (
            {"tasks": ["nowhere"], "policy": "expert", "checkpoint": None},
            r"On node [\d.]+: toy task 'nowhere' is unknown\.",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate(create_params(run, tmp_path / "out", cluster=cluster.address, **values))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_workers_and_policies_that_die_are_started_again_elsewhere(
    run: Path, alone: dict[tuple[str, int], tuple[str, int]], cluster: Any
) -> None:
    """A simulator and a policy are killed in the middle, then a node."""
    import ray

    params = create_params(run, Path("unused"), cluster=cluster.address, num_policies=2, num_workers=4)
    with ExitStack() as stack:
        candidate = open_candidate(stack, params, "front")
        pool = stack.enter_context(create_pool(describe_setup(params, candidate), 4, on_cluster=True))
        actors = [candidate.create_actor(facts) for facts in pool.describe(params.tasks)]
        episodes = [
            Episode(task=task, seed=seed, instruction="move right", fps=10.0, actor=actor)
            for task, actor in zip(params.tasks, actors, strict=True)
            for seed in params.seeds
        ]
        results = run_episodes(pool, episodes[:5])
        found = [next(results)]
        assert isinstance(pool, ClusterPool)
        assert isinstance(actors[0], ClusterActor)
        ray.kill(pool.actors[0])
        ray.kill(actors[0].hosts.find(1))
        found += results
        results = run_episodes(pool, episodes[5:])
        found.append(next(results))
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        found += results
    assert {(each.task, each.seed): (each.outcome, each.num_steps) for each in found} == alone


def test_what_ray_guesses_is_not_why_an_actor_died() -> None:
    detail = "Worker exit detail: End of file. Some common causes include: (1) it was killed due to high memory usage."
    assert _describe_end(RayError(f"The actor died.\n {detail}")) == "process on the cluster ended: End of file."
    assert "is there enough memory?" in _describe_end(RayError("Worker exit detail: Out of memory."))


def test_policies_share_gpus_by_fractions() -> None:
    given: dict[str, Any] = {"tasks": ["easy"], "output": "out", "checkpoint": "run", "cluster": "auto"}
    for values, gpus, expected in (
        ({}, [0.0, 0.0], 0),
        ({}, [1.0, 0.0], 1),
        ({"device": "cpu"}, [1.0, 0.0], 0),
        ({"num_policies": 4, "gpus_per_policy": 0.5}, [1.0, 1.0], 0.5),
        ({"num_policies": 3, "gpus_per_policy": 1 / 3}, [1.0], 1 / 3),
        ({"num_policies": 9, "gpus_per_policy": 0.0}, [1.0], 0),
    ):
        assert choose_gpus(EvaluateParams(**given | values), gpus) == expected
    # what is left of two GPUs makes no third policy
    params = EvaluateParams(**given, num_policies=3, gpus_per_policy=0.6)
    with pytest.raises(ValueError, match=r"num_policies 3 with gpus_per_policy 0.6 do not fit .* room for 2"):
        choose_gpus(params, [1.0, 1.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_policies": 2}, "num_policies needs a cluster and a checkpoint"),
        ({"cluster": "auto", "device": "cuda:1"}, "device 'cuda:1' is a GPU of this machine"),
        ({"cluster": "auto", "device": "cpu", "gpus_per_policy": 0.5}, "must be 0 for device cpu"),
        ({"cluster": "auto", "simulator": "lbm"}, "'lbm' does not run on a cluster"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateParams(tasks=["easy"], output="out", checkpoint="run", **values)
