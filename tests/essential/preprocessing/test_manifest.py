"""`manifest build` describes foreign shards; `manifest verify` names every fault of a dataset."""

import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest

from vla_foundry.preprocessing import manifest
from vla_foundry.preprocessing.manifest import build_manifest, find_faults, verify_dataset
from vla_foundry.preprocessing.shard_writer import write_shard
from vla_foundry.preprocessing.text.packing import Records, write_records
from vla_foundry.robotics.episode_blocks import EpisodeCamera, EpisodeInfo, format_episode
from vla_foundry.shards import ManifestEntry, format_manifest, parse_index, parse_manifest
from vla_foundry.storage import uri
from vla_foundry.storage.npz import format_arrays


def write_tar(path: Path, names: list[str], *, content: bytes = b"content") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Three shards that others wrote, one of them in a folder below."""
    for number, shard in enumerate(("shards/00000", "00001", "00002")):
        names = [f"{key:03d}.{suffix}" for key in range(5 + number) for suffix in ("jpg", "txt", "JSON")]
        write_tar(tmp_path / "data" / f"{shard}.tar", names)
    return tmp_path / "data"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two shards that we wrote."""
    folder = tmp_path / "ours"
    samples = [(f"key{number}", {"json": b"{}" * (number + 1), "txt": b"text"}) for number in range(6)]
    entries = [write_shard(str(folder), f"shard_{number}", samples) for number in range(2)]
    (folder / "manifest.jsonl").write_text(format_manifest(entries), encoding="utf-8")
    return folder


def test_a_folder_of_datasets_is_not_made_one_dataset(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        (tmp_path / part).mkdir()
        with tarfile.open(tmp_path / part / "shard_000000.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
        build_manifest(str(tmp_path / part))
    with pytest.raises(ValueError, match=r"is not one dataset; it holds .*/train, .*/validation"):
        build_manifest(str(tmp_path))
    assert not (tmp_path / "manifest.jsonl").exists()


def test_build_describes_foreign_shards(foreign: Path):
    entries, is_new = build_manifest(str(foreign))
    assert is_new
    assert entries == parse_manifest((foreign / "manifest.jsonl").read_text(encoding="utf-8"), "")
    assert [(entry.shard, entry.num_sequences) for entry in entries] == [
        ("00001", 6),
        ("00002", 7),
        ("shards/00000", 5),
    ]
    index = parse_index((foreign / "shards/00000.index.json").read_text(encoding="utf-8"), "")
    assert [key for key, _ in index.samples] == ["000", "001", "002", "003", "004"]
    assert set(index.samples[0][1]) == {"jpg", "txt", "json"}
    assert verify_dataset(str(foreign)) == []
    assert build_manifest(str(foreign)) == (entries, False)


def test_build_fills_in_what_a_manifest_leaves_open(foreign: Path):
    lines = [{"shard": "shards/00000", "num_sequences": 5}, {"shard": "00002", "num_sequences": 7}]
    lines.append({"shard": "00001", "num_sequences": 6})
    (foreign / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    entries, is_new = build_manifest(str(foreign))
    assert is_new
    assert [entry.shard for entry in entries] == ["shards/00000", "00002", "00001"]  # the order is kept
    assert all(entry.num_bytes and entry.sha256 for entry in entries)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([("00001", 512), ("00002", 7), ("shards/00000", 5)], r"num_sequences 512 of shard '00001', which has 6\."),
        ([("00001", 6), ("00002", 7)], "does not list shard 'shards/00000'"),
        ([("00001", 6), ("00002", 7), ("shards/00000", 5), ("x", 1)], "lists shard 'x', which does not exist"),
    ],
)
def test_build_refuses_to_replace_a_differing_manifest(foreign: Path, lines: list, message: str):
    text = "".join(json.dumps({"shard": shard, "num_sequences": count}) + "\n" for shard, count in lines)
    (foreign / "manifest.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message + r".*Replace it with --overwrite true\.$"):
        build_manifest(str(foreign))
    assert (foreign / "manifest.jsonl").read_text(encoding="utf-8") == text
    assert build_manifest(str(foreign), overwrite=True)[1]
    assert verify_dataset(str(foreign)) == []


def test_build_names_a_broken_tar(foreign: Path):
    path = foreign / "00002.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"^00002: not a readable tar"):
        build_manifest(str(foreign))
    path.write_bytes(path.read_bytes()[:2048])  # cut between two members
    with pytest.raises(ValueError, match=r"^00002: the tar is cut off"):
        build_manifest(str(foreign))
    assert not (foreign / "manifest.jsonl").exists()


def test_tars_and_files_of_macos_are_read_as_webdataset_reads_them(tmp_path: Path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    names = ["README", "._0.png", "0.png", "._0.txt", "0.txt", "1.png", "1.txt", "LICENSE"]
    write_tar(tmp_path / "00000.tar", names)
    with tarfile.open(tmp_path / "00000.tar", "a") as tar:
        folder = tarfile.TarInfo("below")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    for name in ("._00000.tar", ".ipynb_checkpoints/00000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7" + bytes(400))
    entries, _ = build_manifest(str(tmp_path))
    assert [(entry.shard, entry.num_sequences) for entry in entries] == [("00000", 2)]
    assert verify_dataset(str(tmp_path)) == []
    index = parse_index((tmp_path / "00000.index.json").read_text(encoding="utf-8"), "")
    with open(tmp_path / "00000.tar", "rb") as file:
        samples = list(group_by_keys(tar_file_expander([{"url": "00000.tar", "stream": file}])))
    assert [key for key, _ in index.samples] == [sample["__key__"] for sample in samples] == ["0", "1"]


def test_build_and_verify_in_an_object_store(foreign: Path, s3_bucket: str):
    for path in foreign.rglob("*.tar"):
        uri.upload(str(path), f"{s3_bucket}/data/{path.relative_to(foreign)}")
    entries, _ = build_manifest(f"{s3_bucket}/data")
    assert entries == build_manifest(str(foreign))[0]
    assert verify_dataset(f"{s3_bucket}/data") == []
    uri.delete(f"{s3_bucket}/data/00002.tar")
    assert verify_dataset(f"{s3_bucket}/data") == ["00002: listed in the manifest, but there is no 00002.tar"]


def test_folder_without_tars_is_an_error(tmp_path: Path):
    (tmp_path / "x.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no \.tar files"):
        build_manifest(str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"manifest\.jsonl does not exist\. Write it with `vla-foundry manifest b"
    ):
        verify_dataset(str(tmp_path))


def faults_after(dataset: Path, change) -> list[str]:
    assert verify_dataset(str(dataset)) == []
    change(dataset)
    return verify_dataset(str(dataset))


def cut(dataset: Path) -> None:
    path = dataset / "shard_1.tar"
    path.write_bytes(path.read_bytes()[:5000])


def flip_a_bit(dataset: Path) -> None:
    path = dataset / "shard_1.tar"
    data = bytearray(path.read_bytes())
    data[512] ^= 1  # content of the first member
    path.write_bytes(data)


def change_manifest(dataset: Path) -> None:
    path = dataset / "manifest.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"num_sequences": 6', '"num_sequences": 7', 1), encoding="utf-8"
    )


def swap_index(dataset: Path) -> None:
    path = dataset / "shard_0.index.json"
    # of another tar, or made by others: an index without a checksum
    text = path.read_text(encoding="utf-8").partition(',"crc32"')[0] + "}"
    path.write_text(text.replace("key2", "key9"), encoding="utf-8")


def break_index(dataset: Path) -> None:
    (dataset / "shard_0.index.json").write_text("{", encoding="utf-8")


def add_shard(dataset: Path) -> None:
    shutil.copy(dataset / "shard_0.tar", dataset / "stray.tar")


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (cut, [r"shard_1: it has 5,000 bytes, and 20,480 in the manifest", "shard_1: not a readable tar"]),
        (flip_a_bit, ["shard_1: its bytes have another SHA-256 than in the manifest"]),
        (change_manifest, ["shard_0: it has 6 samples, and 7 in the manifest"]),
        (swap_index, ["shard_0: its index does not fit it: it says sample 'key9' where 'key2' is"]),
        (break_index, ["is not a shard index"]),
        (add_shard, ["stray: stray.tar is not listed in the manifest"]),
    ],
)
def test_verify_names_the_fault(dataset: Path, change, faults: list[str]):
    found = faults_after(dataset, change)
    assert len(found) == len(faults)
    assert all(expected in line for expected, line in zip(faults, found, strict=True))


def test_verify_compares_members_of_samples(foreign: Path):
    write_tar(foreign / "00002.tar", ["a.jpg", "a.txt", "b.png", "b.txt", "c.txt", "d.jpg", "d.txt", "d.cls", "a.x"])
    build_manifest(str(foreign))
    assert verify_dataset(str(foreign)) == [
        "00002: sample 'c' has no member .image",
        "00002: sample 'd' has a member .cls that others lack",
        "00002: sample 'a' has no member .image",
        "00002: sample 'a' has no member .txt",
        "00002: sample 'a' has a member .x that others lack",
        "00002: 1 more faults of this kind",
    ]


def test_verify_sees_a_tar_cut_between_members_without_checksums(foreign: Path):
    build_manifest(str(foreign))
    lines = [{"shard": "00001", "num_sequences": 5}]
    (foreign / "manifest.jsonl").write_text(json.dumps(lines[0]), encoding="utf-8")
    for name in ("shards/00000", "00002"):
        (foreign / f"{name}.tar").unlink()
    (foreign / "00001.index.json").unlink()
    path = foreign / "00001.tar"
    path.write_bytes(path.read_bytes()[: 5 * 3 * 1024])
    assert verify_dataset(str(foreign)) == ["00001: it has no end marker: the tar is cut off"]


@pytest.mark.parametrize(
    ("tokens", "ends", "offsets", "fault"),
    [
        ([[1, 2, 3]], [3], [0, 1], None),
        ([[1, 99, 3]], [3], [0, 1], "record 0 holds token 99, but the vocabulary has 10"),
        ([[1, 2, 3]], [4], [0, 1], "the document ends of record 0 are not in order"),
        ([[1, 2, 3]], [2, 2], [0, 2], "the document ends of record 0 are not in order"),
        ([[1, 2, 3], [4, 5, 6]], [3], [0, 1, 1], "do not divide its document ends"),
    ],
)
def test_verify_looks_into_token_records(tmp_path: Path, tokens: list, ends: list, offsets: list, fault: str | None):
    records = Records(
        tokens=np.array(tokens, np.uint16),
        document_ends=np.array(ends, np.uint32),
        document_offsets=np.array(offsets, np.uint64),
    )
    entry = write_records(str(tmp_path), "shard_0", records)
    (tmp_path / "manifest.jsonl").write_text(format_manifest([entry]), encoding="utf-8")
    (tmp_path / "provenance.json").write_text('{"dataset": {"vocab_size": 10}}', encoding="utf-8")
    found = verify_dataset(str(tmp_path))
    if fault is None:
        assert found == []
    else:
        [line] = found
        assert fault in line


def test_command_prints_faults_and_fails(dataset: Path, capsys: pytest.CaptureFixture[str]):
    manifest.main(["verify", str(dataset)])
    assert "no faults, 12 samples in 2 shards" in capsys.readouterr().out
    flip_a_bit(dataset)
    with pytest.raises(ValueError, match=r"has 1 faults\.$"):
        manifest.main(["verify", str(dataset)])
    assert capsys.readouterr().out == "shard_1: its bytes have another SHA-256 than in the manifest\n"
    with pytest.raises(ValueError, match=r"manifest 'biuld' is unknown\. Did you mean 'build'\?"):
        manifest.main(["biuld"])


def test_command_builds(foreign: Path, capsys: pytest.CaptureFixture[str]):
    manifest.main(["build", str(foreign)])
    assert "manifest.jsonl: written, 18 samples in 3 shards" in capsys.readouterr().out
    manifest.main(["build", str(foreign)])
    assert "manifest.jsonl: already right" in capsys.readouterr().out


CAMERA = EpisodeCamera(original_size=(2, 2), size=(2, 2), extension="jpg")
INFO = EpisodeInfo(episode_id="a", task=None, num_frames=2, fps=1.0, anchors=(0, 1), cameras={"top": CAMERA})
ARRAYS = {"state": np.zeros((2, 3)), "timestamp": np.arange(2.0), "extrinsics.top": np.eye(4)}
WHOLE = {
    "a.episode.json": format_episode(INFO).encode(),
    "a.lowdim.npz": format_arrays(ARRAYS),
    "a.top.000000.jpg": b"one",
    "a.top.000001.jpg": b"two",
}


def faults_of(members: list[tuple[str, bytes]], num_sequences: int = 2) -> list[str]:
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        entry = ManifestEntry(shard="s", num_sequences=num_sequences)
        return list(find_faults(cast(BinaryIO, file), entry))


def test_a_whole_shard_has_no_faults():
    assert faults_of(list(WHOLE.items())) == []


def without(arrays: dict[str, np.ndarray], name: str) -> bytes:
    return format_arrays({key: value for key, value in arrays.items() if key != name})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"a.lowdim.npz": b"PK"}, "member 'a.lowdim.npz': the .npz is truncated or not an .npz"),
        ({"a.lowdim.npz": without(ARRAYS, "timestamp")}, "episode 'a' has no array 'timestamp'"),
        (
            {"a.lowdim.npz": format_arrays(ARRAYS | {"state": np.zeros((3, 3))})},
            "the arrays and cameras of episode 'a' have different lengths: [2, 3]",
        ),
        ({"a.top.000001.jpg": b""}, "1 members of episode 'a' are empty"),
        ({"a.top.000002.jpg": b"x"}, "member 'a.top.000002.jpg' is of no camera or frame of its episode"),
    ],
)
def test_each_fault_of_an_episode_is_named(changes, fault):
    assert faults_of(list((WHOLE | changes).items())) == [fault]


def test_missing_arrays_and_episodes_that_stand_twice_are_named():
    members = [(name, content) for name, content in WHOLE.items() if name != "a.lowdim.npz"]
    assert faults_of(members) == ["episode 'a' has no member .lowdim.npz"]
    other = [(f"b{name[1:]}", content) for name, content in WHOLE.items()]
    twice = [*WHOLE.items(), *other, *WHOLE.items()]
    assert faults_of(twice, num_sequences=6) == ["episode 'a' appears 2 times"]


def test_the_manifest_counts_anchors():
    assert faults_of(list(WHOLE.items()), num_sequences=3) == ["it has 2 samples, and 3 in the manifest"]
