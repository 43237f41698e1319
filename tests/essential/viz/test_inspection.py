import json
import re
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.essential.byte_level import train_tokenizer
from tests.essential.data.conftest import write_samples as write_samples
from vla_foundry.cli import main
from vla_foundry.params.commands.runs import InspectParams
from vla_foundry.preprocessing.text.packing import RecordPacker, write_records
from vla_foundry.robotics.spec import DatasetSpec, parse_spec
from vla_foundry.shards import format_manifest
from vla_foundry.viz import data_report
from vla_foundry.viz.explorer import Explorer
from vla_foundry.viz.inspection import inspect_data, read_dataset_sample
from vla_foundry.viz.robot_sample import RobotSample
from vla_foundry.viz.sample_figure import draw_sample


def read_sample(folder: Path, number: int) -> RobotSample:
    spec: DatasetSpec = parse_spec((folder / "robotics.json").read_text(encoding="utf-8"), "robotics.json")
    return read_dataset_sample(str(folder / "manifest.jsonl"), spec, number)


def open_picture(path: Path) -> np.ndarray:
    """A picture's pixels (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_sample_is_what_the_episode_holds_around_its_anchor(robot_data):
    sample = read_sample(robot_data.folder, 8 + 3)
    assert (sample.episode_id, sample.anchor, sample.instruction) == ("episode_1", 3, "move thing 1")
    assert sample.shard == str(robot_data.folder / "shard_000000.tar")
    (action,) = sample.actions
    stored = robot_data.fields["episode_1"]["action.arm"]
    # frames 1 to 6: two steps before the anchor, three after
    np.testing.assert_allclose(action.raw, stored[1:7], atol=1e-6)
    statistics = json.loads((robot_data.folder / "stats.json").read_text(encoding="utf-8"))["action.arm"]
    expected = (stored[1:7] - np.array(statistics["mean"])) / np.array(statistics["std"])
    np.testing.assert_allclose(action.normalized, expected, atol=1e-5)
    (state,) = sample.proprioception
    np.testing.assert_allclose(state.raw, robot_data.fields["episode_1"]["state"][1:4], atol=1e-6)


def test_images_are_time_major_and_those_of_the_shard(robot_data):
    sample = read_sample(robot_data.folder, 4)
    names = [("front", 3), ("wrist", 3), ("front", 4), ("wrist", 4)]
    assert [(camera, 4 + offset) for offset in sample.image_indices for camera in sample.cameras] == names
    for image, (camera, frame) in zip(sample.images, names, strict=True):
        expected = robot_data.images["episode_0", camera, frame].astype(int)
        assert image.shape == (96, 96, 3)  # fitted into a square, 96 x 80 between black bars
        assert np.abs(image[8:88].astype(int) - expected).max() <= 2
        assert image[:7].max() == image[89:].max() == 0


def test_masks_say_where_the_episode_ends(robot_data):
    sample = read_sample(robot_data.folder, 6)
    assert sample.past_mask.tolist() == [True, True, False, False, False, False]
    assert sample.future_mask.tolist() == [False, False, True, True, False, False]
    assert sample.is_padding.tolist() == [False, False, False, False, True, True]


def test_without_statistics_values_are_drawn_as_they_are(tmp_path, write_data):
    data = write_data(tmp_path / "data", statistics=False)
    sample = read_sample(data.folder, 2)
    assert not sample.is_normalized
    np.testing.assert_array_equal(sample.actions[0].normalized, sample.actions[0].raw)
    np.testing.assert_array_equal(sample.actions[0].raw, data.fields["episode_0"]["action.arm"][:6])


def test_a_dataset_without_instructions_and_cameras_is_drawn(tmp_path, write_data):
    # a unit that would be a faulty formula
    data = write_data(tmp_path / "data", language_types=(), cameras=(), unit="$\\m$")
    lines = inspect_data(InspectParams(dataset=str(data.folder), output=str(tmp_path / "s.png")))
    assert "instruction: (none)" in lines
    Explorer(str(data.folder)).draw_fields(0, 2).savefig(tmp_path / "f.png")


def test_the_names_of_columns_are_shown(robot_data, tmp_path):
    lines = inspect_data(InspectParams(dataset=str(robot_data.folder), output=str(tmp_path / "s.png")))
    assert "state: elbow, wrist" in lines


def test_the_same_sample_is_the_same_picture(robot_data, tmp_path):
    sample = read_sample(robot_data.folder, 1)
    for name in ("one", "two"):
        draw_sample(sample, str(tmp_path / f"{name}.png"))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    draw_sample(read_sample(robot_data.folder, 2), str(tmp_path / "other.png"))
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    picture = open_picture(tmp_path / "one.png")
    # the middle of the front camera's image: frame 1 is (20, 0, 0)
    assert (np.abs(picture.astype(int) - [20, 0, 0]).max(axis=-1) <= 3).sum() > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "other.png", "two.png"]


def test_the_command_says_what_it_has_drawn(robot_data, tmp_path, capsys):
    output = tmp_path / "new" / "sample.png"
    main(["data", "inspect", str(robot_data.folder), "--sample", "9", "--output", str(output)])
    printed = capsys.readouterr().out
    assert f"episode episode_1, frame 1, of {robot_data.folder}/shard_000000.tar" in printed
    assert "instruction: move thing 1" in printed
    assert f"{output}: 4 images, 6 steps, 1 action and 1 proprioception fields" in printed
    assert open_picture(output).shape[1] == 1200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["look"], "data 'look' is unknown"),
        (["inspect"], "Give either a dataset"),
        (["inspect", "DATA", "--sample", "16"], r"sample \(16\) must be below 16"),
        (["inspect", "DATA", "--output", "s.jpg"], "must be a .png file"),
        (["inspect", "/nowhere/at/all"], "/nowhere/at/all/manifest.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_line(words, message, robot_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["data", *(str(robot_data.folder) if word == "DATA" else word for word in words)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1


def test_a_sample_that_cannot_be_used_is_said_to_be_replaced(tmp_path, write_data):
    data = write_data(tmp_path / "data")
    path = data.folder / "shard_000000.tar"
    with tarfile.open(path) as tar:
        span = next(member for member in tar if member.name == "episode_0.front.000005.jpg")
    with path.open("r+b") as file:
        file.seek(span.offset_data)
        file.write(bytes(span.size))
    manifest = data.folder / "manifest.jsonl"  # a shard that differs from its checksum would be left out as a whole
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    kept = [json.dumps({key: value for key, value in entry.items() if key != "sha256"}) for entry in entries]
    manifest.write_text("\n".join(kept) + "\n", encoding="utf-8")
    lines = inspect_data(InspectParams(dataset=str(data.folder), sample=5, output=str(tmp_path / "s.png")))
    assert lines[0].startswith("note: sample 5 cannot be used (bad image)")


def test_images_with_captions_are_shown_as_stored(tmp_path):
    image = BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(image, "JPEG")
    with tarfile.open(tmp_path / "shard_000000.tar", "w") as tar:
        for name, content in (("a.jpg", image.getvalue()), ("a.txt", b"a red field")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))
    (tmp_path / "manifest.jsonl").write_text('{"shard": "shard_000000", "num_sequences": 1}\n', encoding="utf-8")
    output = tmp_path / "s.png"
    lines = inspect_data(InspectParams(dataset=str(tmp_path), output=str(output)))
    assert "txt: a red field" in lines
    assert open_picture(output).shape == (30, 40, 3)


TRAINING = """
name: look
total_train_samples: 16
model:
  type: diffusion_policy
  vision_language_backbone:
    type: vit_backbone
    vit: {img_size: 32, patch_size: 8, hidden_dim: 32, n_heads: 2, n_layers: 1}
  action_head:
    type: flow_transformer
    transformer: {hidden_dim: 32, n_heads: 2, n_layers: 1, vocab_size: 0, is_causal: false}
data:
  type: robotics
  dataset_manifest: [MANIFEST]
  action_fields: [action.arm]
  proprioception_fields: [state]
  camera_names: [wrist]
  lowdim_past_timesteps: 1
  normalization: {method: min_max}
  augmentation: {enabled: true, image: {color_jitter: {enabled: true, brightness: 0.5}}}
hparams: {global_batch_size: 4, per_gpu_batch_size: 2, warmup: 0.1}
"""


def test_what_a_run_trains_on_is_drawn_with_its_fields_order_and_augmentation(robot_data, tmp_path):
    from vla_foundry.config.resolve import resolve
    from vla_foundry.data import create_dataloader
    from vla_foundry.data.facts import read_facts
    from vla_foundry.params.experiment import load_experiment_params_from_yaml
    from vla_foundry.viz.inspection import read_training_sample
    from vla_foundry.world import World

    config = tmp_path / "config.yaml"
    config.write_text(TRAINING.replace("MANIFEST", str(robot_data.folder / "manifest.jsonl")), encoding="utf-8")
    sample = read_training_sample(str(tmp_path), 6)
    params = load_experiment_params_from_yaml(str(config))
    params = resolve(params, read_facts(params, 1))
    assert params.data.seed is not None
    loader = create_dataloader(params.data, World(), global_batch_size=4, per_gpu_batch_size=4, seed=params.data.seed)
    batch = next(loader.microbatches(1))
    loader.close()
    # sample 6 is row 2 of the second global batch
    assert (sample.position, sample.episode_id, sample.anchor) == (6, batch["episode_ids"][2], int(batch["anchors"][2]))
    np.testing.assert_array_equal(sample.actions[0].normalized, batch["actions"][2].numpy())
    assert sample.cameras == ["wrist"]
    assert [image.shape for image in sample.images] == [(32, 32, 3)] * 2
    stored = robot_data.images[sample.episode_id, "wrist", sample.anchor]
    assert np.abs(sample.images[1].mean(axis=(0, 1)) - stored.mean(axis=(0, 1))).max() > 2  # other colours
    assert len(sample.past_mask) == 1 + 1 + 3


def test_a_run_without_robot_data_is_refused(tmp_path):
    config = tmp_path / "config.yaml"
    (tmp_path / "manifest.jsonl").write_text('{"shard": "shard_000000", "num_sequences": 8}\n', encoding="utf-8")
    config.write_text(
        "total_train_samples: 8\nmodel: {type: transformer, hidden_dim: 32, n_heads: 2, n_layers: 1, vocab_size: 64}\n"
        f"data: {{type: text, dataset_manifest: [{tmp_path}/manifest.jsonl], seq_len: 16}}\n"
        "hparams: {global_batch_size: 4, per_gpu_batch_size: 4, warmup: 0.1}\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match=r"trains on data\.type text"):
        inspect_data(InspectParams(training=str(config), output=str(tmp_path / "s.png")))


def test_a_config_is_measured_before_training(robot_data, tmp_path, capsys):
    config, sheet = tmp_path / "config.yaml", tmp_path / "new" / "sheet.png"
    config.write_text(TRAINING.replace("MANIFEST", str(robot_data.folder / "manifest.jsonl")), encoding="utf-8")
    words = ["data", "inspect", "--config_path", str(config), "--num_samples", "8", "--output", str(sheet)]
    main([*words, "--json", "true"])
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 8
    assert report["mix"] == {"robotics": {"weight": 1.0, "share": 1.0, "samples": 8}}
    measured = report["datasets"]["robotics"]
    assert measured["tokens"] is None  # no language
    assert {"read", "normalize_actions", "normalize_proprioception", "prepare_images", "batch"} <= measured[
        "ms_per_sample"
    ].keys()
    assert measured["bad_samples"] == {}
    assert open_picture(sheet).shape[1] == 6 * 224
    main(words)
    assert "robotics: 8 samples, 100.0% (its weight: 100.0%)" in capsys.readouterr().out


@pytest.fixture
def texts(tmp_path) -> dict[str, str]:
    """Manifests of 8 and 4 records of 17 tokens."""
    manifests = {}
    for name, count in (("short", 8), ("long", 4)):
        packer = RecordPacker(17, "uint16")
        for _ in range(count):
            packer.add(np.full(17, 3, np.uint16), np.asarray([17]))
        (tmp_path / name).mkdir()
        entry = write_records(str(tmp_path / name), "shard_000000", packer.take(count))
        (tmp_path / name / "manifest.jsonl").write_text(format_manifest([entry]), encoding="utf-8")
        manifests[name] = str(tmp_path / name / "manifest.jsonl")
    return manifests


def test_the_realised_mix_of_a_mixture_is_counted(texts, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    part = "{{type: text, dataset_manifest: [{}], seq_len: 16}}"
    config.write_text(
        "total_train_samples: 8\nmodel: {type: transformer, hidden_dim: 32, n_heads: 2, n_layers: 1, vocab_size: 64}\n"
        f"data: {{type: mixture, datasets: {{a: {part.format(texts['short'])}, b: {part.format(texts['long'])}}}, "
        "weights: {a: 3, b: 1}, modality_block: 1}\n"
        "hparams: {global_batch_size: 4, per_gpu_batch_size: 1, warmup: 0.1}\n",
        encoding="utf-8",
    )
    # more samples than the data has: training would need epochs, the report does not
    main(["data", "inspect", "--config_path", str(config), "--num_samples", "40", "--json", "true"])
    report = json.loads(capsys.readouterr().out)
    assert {name: (mix["samples"], mix["share"], mix["weight"]) for name, mix in report["mix"].items()} == {
        "a": (30, 0.75, 0.75),
        "b": (10, 0.25, 0.25),
    }
    tokens = report["datasets"]["b"]["tokens"]
    assert tokens == {"min": 17, "p50": 17, "p95": 17, "max": 17, "seq_len": 16, "truncated_share": 0.0}
    assert report["datasets"]["b"]["padding_share"] == 0.0
    assert report["contact_sheet"] is None
    assert not list(tmp_path.glob("*.png"))


def test_documents_are_measured_and_shown_with_their_text(tmp_path, write_samples, monkeypatch, capsys):
    picture = BytesIO()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(picture, "PNG")
    image = [{"image": "0.png"}]
    documents = [[{"text": "a"}], [{"text": "a"}, *image, {"text": "a" * 9}], [*image, {"text": "a" * 99}]]
    samples = [
        {"json": json.dumps({"parts": parts}).encode()} | ({} if number == 0 else {"0.png": picture.getvalue()})
        for number, parts in enumerate(documents)
    ]
    manifest = write_samples(tmp_path / "documents", [samples])
    train_tokenizer(257, ["a"], ["<|endoftext|>"], eos_token="<|endoftext|>").save_pretrained(tmp_path / "tokenizer")
    config = tmp_path / "config.yaml"
    config.write_text(
        "total_train_samples: 3\nhparams: {global_batch_size: 3, per_gpu_batch_size: 3, warmup: 0.1}\n"
        "model: {type: vlm, transformer: {hidden_dim: 32, n_heads: 2, n_layers: 1, max_seq_len: 64, vocab_size: 264},\n"
        "  vit: {hidden_dim: 32, n_heads: 2, n_layers: 1, img_size: 16, patch_size: 8}}\n"
        f"data: {{type: interleaved, dataset_manifest: [{manifest}], seq_len: 31, tokenizer: {tmp_path}/tokenizer}}\n",
        encoding="utf-8",
    )
    texts = []
    monkeypatch.setattr(data_report, "_draw_sheet", lambda tiles, path: texts.extend(text for _, _, text in tiles))
    main(["data", "inspect", "--config_path", str(config), "--num_samples", "3", "--json", "true"])
    measured = json.loads(capsys.readouterr().out)["datasets"]["interleaved"]
    # an image has 4 tokens; a document that is cut counts as seq_len + 2
    assert measured["tokens"] == {"min": 2, "p50": 15, "p95": 33, "max": 33, "seq_len": 31, "truncated_share": 1 / 3}
    assert {"read", "read_document", "prepare_pictures", "encode_document", "batch"} <= measured["ms_per_sample"].keys()
    # rows of 31 + 1 tokens: 2 + 15 and 32 of them are filled
    assert measured["padding_share"] == pytest.approx(15 / 64)
    assert sorted(texts) == ["<image>" + "a" * 99, "a<image>aaaaaaaaa"]
