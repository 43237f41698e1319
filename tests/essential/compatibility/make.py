"""Write small files of every kind with the code of a checkout, and what that code makes of them, to one archive.

    cd <a checkout of that version> && uv run python <this file> <new working folder> <archive.tar.gz>

It uses commands and the public Python surface only, so it runs with every version. test_compatibility.py imports
`read_samples` and `act` from here, to see whether today's code still makes the same of the files.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import vla_foundry
from vla_foundry.data import create_dataloader
from vla_foundry.inference import Policy, RobotObservation
from vla_foundry.params import load_experiment_params_from_yaml
from vla_foundry.world import World

CHECKOUT = Path(vla_foundry.__file__).resolve().parents[1]
_WORDS = "<unk> <|endoftext|> User Assistant : \\n The the a robot has to lift lid red green square circle . cup on"
WORDS = _WORDS.split()
NUM_FRAMES, IMAGE_SIZE = 5, 12
CAMERAS = ("front", "wrist")
XYZ, ROTATION = "robot__actual__poses__right::arm__xyz", "robot__actual__poses__right::arm__rot_6d"
ACTION_XYZ, ACTION_ROTATION = "robot__action__poses__right::arm__xyz", "robot__action__poses__right::arm__rot_6d"
GRIPPER = "robot__action__grippers__right::hand"
FIELD_MAP = {
    "episodes": "data/demo_*",
    "cameras": {name: {"source": f"obs/{name}"} for name in CAMERAS},
    "fields": {
        XYZ: {"source": "obs/xyz", "unit": "m", "frame": "world"},
        ROTATION: {"source": "obs/rot_6d", "rotation": "rot_6d_rows", "frame": "world"},
        ACTION_XYZ: {"source": "actions", "columns": [0, 3], "unit": "m", "frame": "world"},
        ACTION_ROTATION: {"source": "actions", "columns": [3, 9], "rotation": "rot_6d_rows", "frame": "world"},
        GRIPPER: {"source": "actions", "columns": [9, 10], "gripper": {"open": 1, "closed": 0}},
    },
    "pose_groups": [
        {"name": "actual", "position_key": XYZ, "rotation_key": ROTATION},
        {"name": "action", "position_key": ACTION_XYZ, "rotation_key": ACTION_ROTATION},
    ],
}
SHARED = {
    "save_path": "runs",
    "total_train_samples": 16,
    "num_checkpoints": 2,
    "log_every_n_steps": 1,
    "wandb": False,
    "hparams": {
        "global_batch_size": 4,
        "per_gpu_batch_size": 2,
        "precision": "fp32",
        "lr": 1e-2,
        "warmup": 1,
        "grad_clip_norm": 1.0,
        "wd": 0.1,
    },
}
VIT = {"hidden_dim": 4, "inter_dim": 8, "n_layers": 1, "n_heads": 2, "patch_size": 6, "img_size": IMAGE_SIZE}
LLM = {"hidden_dim": 4, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "vocab_size": 24, "ffn_type": "gelu"}
HEAD = {"hidden_dim": 4, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "vocab_size": 0, "ffn_type": "gelu"}
ROBOT_DATA = {
    "type": "robotics",
    "tokenizer": "tokenizer",
    "dataset_manifest": ["robot_episodes/manifest.jsonl"],
    "image_indices": [-1, 0],
    "prompts": ["<image><image><image><image>The robot has to {instruction}."],
    "proprioception_fields": [XYZ, f"{ACTION_ROTATION}_relative"],
    "action_fields": [f"{ACTION_XYZ}_relative", GRIPPER, f"{ACTION_ROTATION}_relative"],
    "num_workers": 0,
    "seq_len": 48,
    "allow_multiple_epochs": True,
}
OF_IMPORTED_POLICIES = {
    "type": "flow_transformer",
    "final_norm": False,
    "time_conditioning": "add",
    "time_encoding": "table",
    "noise": {"num_timesteps": 20, "clamp_range": [-1.5, 1.5], "sampling_time_shift": 0.05, "num_inference_steps": 4},
    "transformer": {**HEAD, "rope_bf16_frequencies": True, "norm_type": "lp_layer_norm", "qk_norm": True},
}
BACKBONE = {"type": "vlm_foundry_backbone", "num_vlm_layers_to_use": 2}
FRESH = {**BACKBONE, "vlm": {"vit": VIT, "transformer": LLM}}


def policy(head: dict[str, Any], backbone: dict[str, Any], **data: Any) -> dict[str, Any]:
    """The config of a policy."""
    model = {"type": "diffusion_policy", "vision_language_backbone": backbone, "action_head": head}
    return {"model": model, "data": ROBOT_DATA | data}


RUNS: dict[str, dict[str, Any]] = {
    "llm": {
        "model": {"type": "transformer", **LLM, "ffn_type": "swiglu", "n_layers": 1, "weight_tying": True},
        "data": {
            "type": "text",
            "seq_len": 16,
            "num_workers": 0,
            "dataset_manifest": ["text/manifest.jsonl"],
            "val_dataset_manifest": ["text/manifest.jsonl"],
        },
        "total_val_samples": 4,
        "ema": {"enabled": True, "type": "vanilla", "alpha": 0.5},
    },
    "vlm": {
        "model": {"type": "vlm", "vit": VIT | {"projector_pixel_shuffle_factor": 2}, "transformer": LLM},
        "data": {
            "type": "image_caption",
            "tokenizer": "tokenizer",
            "dataset_manifest": ["captions/manifest.jsonl"],
            "prompts": ["<image>The"],
            "seq_len": 16,
            "num_workers": 0,
            "allow_multiple_epochs": True,
        },
    },
    "flow": policy(
        {"type": "flow_transformer", "transformer": HEAD, "num_action_head_repeats": 2},
        {**BACKBONE, "resume_from_checkpoint": "runs/vlm"},
    ),
    "regression": policy(
        {"type": "regression", "transformer": HEAD, "conditioning": "cross_attention"},
        {"type": "vit_backbone", "vit": VIT},
        dataset_manifest=["robot_samples/manifest.jsonl"],
        action_fields=[ACTION_XYZ, ACTION_ROTATION],
        proprioception_fields=[],
        tokenizer=None,
    ),
    "ddpm": policy(
        {"type": "ddpm_transformer", "transformer": HEAD, "time_conditioning": "concat"},
        {**FRESH, "conditioning": "prefix"},
    ),
    "imported_options": policy(OF_IMPORTED_POLICIES, {**FRESH, "final_norm": False}),
}
EVALUATION = (
    "--plugins toy_simulator --policy random --simulator toy --tasks easy,hard --num_workers 1 --camera front "
    "--image_size 16 --batch_size 2 --max_sample_size 4 --num_pictured 0 --output evaluation"
)
POLICIES = ("flow", "regression", "ddpm", "imported_options")


def create_rotations(seed: int) -> np.ndarray:
    """The first two rows of rotation matrices that turn smoothly, (L, 6)."""
    values = np.array([0.1, 0.2, 0.3, 1.0]) + np.random.default_rng(seed).normal(size=(NUM_FRAMES, 4)).cumsum(0) / 20
    x, y, z, w = (values / np.linalg.norm(values, axis=1, keepdims=True)).T
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)]
    rows += [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)]
    return np.stack(rows, axis=1)


def create_recording(seed: int) -> dict[str, np.ndarray]:
    """What a robot recorded: fields (L, C) and images (L, H, W, 3), by name."""
    draw = np.random.default_rng(seed)
    ramp = np.arange(IMAGE_SIZE)[:, None] * 9 + np.arange(IMAGE_SIZE) * 4
    images = ramp[None, :, :, None] + np.arange(NUM_FRAMES)[:, None, None, None] * 6 + np.array([0, 30, 60])
    return {
        XYZ: draw.normal(size=(NUM_FRAMES, 3)).cumsum(0) / 10,
        ROTATION: create_rotations(seed),
        ACTION_XYZ: draw.normal(size=(NUM_FRAMES, 3)).cumsum(0) / 10,
        ACTION_ROTATION: create_rotations(seed + 10),
        GRIPPER: draw.random((NUM_FRAMES, 1)).round(),
        **{name: (images + 20 * number).astype(np.uint8) for number, name in enumerate(CAMERAS)},
    }


def write_sources() -> None:
    """Write what is preprocessed: text, captioned images, recordings, and a tokenizer."""
    Path("source/pairs").mkdir(parents=True)
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS[6:], size=int(draw.integers(5, 30)))) for _ in range(24)]
    Path("source/text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    for number, color in enumerate(((200, 30, 20), (20, 190, 40), (210, 40, 30))):
        image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 240, np.uint8)
        image[3 : 7 + number, 2:9] = color
        Image.fromarray(image).save(f"source/pairs/{number}.png")
        Path(f"source/pairs/{number}.txt").write_text(f"a {'green' if number == 1 else 'red'} square", encoding="utf-8")
    with h5py.File("source/robot.hdf5", "w") as file:
        for seed in range(2):
            recording = create_recording(seed)
            group = file.create_group(f"data/demo_{seed}")
            group["actions"] = np.concatenate([recording[name] for name in (ACTION_XYZ, ACTION_ROTATION, GRIPPER)], 1)
            group["obs/xyz"], group["obs/rot_6d"] = recording[XYZ], recording[ROTATION]
            for name in CAMERAS:
                group[f"obs/{name}"] = recording[name]
    Path("source/field_map.yaml").write_text(yaml.safe_dump(FIELD_MAP), encoding="utf-8")
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<unk>")
    fast.save_pretrained("tokenizer")


def run(words: str) -> None:
    """Run a command of vla-foundry in this folder."""
    paths = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests/essential/evaluation")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-m", "vla_foundry.cli", *words.split()], check=True, env=environment)


def write_shards() -> None:
    """Preprocess every kind of source."""
    run("preprocess text --source source/text.jsonl --output text --tokenizer tokenizer --seq_len 16 --num_workers 0")
    run("preprocess image_caption --source source/pairs --output captions --num_workers 0")
    for layout in ("episodes", "samples"):
        words = f"--source_episodes source/robot.hdf5 --output_dir robot_{layout} --layout {layout} --fps 10"
        words += " --field_map source/field_map.yaml --past_lowdim_steps 1 --future_lowdim_steps 2 --num_workers 0"
        run(f"preprocess robotics --type hdf5 {words} --instruction lift")


def train(name: str) -> list[float]:
    """Train four steps, take away what follows the second, and return the losses of the third and the fourth."""
    Path("configs").mkdir(exist_ok=True)
    Path(f"configs/{name}.yaml").write_text(yaml.safe_dump(SHARED | RUNS[name], sort_keys=False), encoding="utf-8")
    run(f"train --config_path configs/{name}.yaml --name {name}")
    folder = Path("runs") / name
    shutil.rmtree(folder / "checkpoints/step_00000004")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= 2), encoding="utf-8"
    )
    return read_losses(lines)


def read_losses(lines: list[dict[str, Any]]) -> list[float]:
    """The losses of the third and the fourth step."""
    return [line["loss"] for line in lines if line["kind"] == "train" and line["step"] > 2]


def read_samples(name: str) -> dict[str, Any]:
    """What the loader of a run makes of its first eight samples: digests of whole numbers, and floats as they are."""
    params = load_experiment_params_from_yaml(f"runs/{name}/config.yaml")
    loader = create_dataloader(params.data, World(), global_batch_size=8, per_gpu_batch_size=8, seed=5)
    batches = loader.microbatches(0)
    batch = next(iter(batches))
    loader.close()
    found: dict[str, Any] = {}
    for key, value in batch.items():
        if key == "documents":
            parts = (value.lengths, value.num_per_row, value.is_padding)
            found |= {f"documents.{number}": part.tolist() for number, part in enumerate(parts)}
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            found[key] = np.round(value.double().numpy(), 7).tolist()
        elif key == "shards":
            found[key] = [Path(path).name for path in value]
        elif isinstance(value, torch.Tensor):
            digest = hashlib.sha256(value.numpy().tobytes()).hexdigest()
            found[key] = [str(value.dtype), list(value.shape), digest]
        else:
            found[key] = json.loads(json.dumps(value))
    return found


def act(name: str) -> list[dict[str, list[float]]]:
    """The first three actions of a policy that sees a recording."""
    policy = Policy.from_run(f"runs/{name}", device="cpu", open_loop_steps=2)
    policy.reset(seed=7)
    recording, actions = create_recording(5), []
    for frame in range(3):
        fields = {} if name == "regression" else {key: recording[key][frame] for key in FIELD_MAP["fields"]}
        images = {camera: recording[camera][frame] for camera in CAMERAS}
        instruction = "" if name == "regression" else "lift"
        found = policy.act(RobotObservation(images=images, fields=fields, instruction=instruction))
        actions.append({key: np.asarray(value, np.float64).tolist() for key, value in found.items()})
    return actions


def hide_paths() -> None:
    """Replace the path of the program in the provenance of runs."""
    for path in Path("runs").glob("*/experiment.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        for start in record["starts"]:
            start["command"][0] = "vla-foundry"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_archive(path: Path) -> None:
    """Pack this folder; the same files make the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(file for file in Path().rglob("*") if file.is_file()):
            entry = tarfile.TarInfo(file.as_posix())
            entry.size = file.stat().st_size
            tar.addfile(entry, io.BytesIO(file.read_bytes()))
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


def main(folder: Path, archive: Path) -> None:
    archive = archive.resolve()
    folder.mkdir(parents=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    write_sources()
    write_shards()
    losses = {name: train(name) for name in RUNS}
    run(f"evaluate {EVALUATION} --episodes 0:2")
    expected = {
        "losses": losses,
        "samples": {name: read_samples(name) for name in RUNS},
        "actions": {name: act(name) for name in POLICIES},
    }
    Path("expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")
    hide_paths()
    for left_over in ("source", "configs"):
        shutil.rmtree(left_over)
    write_archive(archive)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
