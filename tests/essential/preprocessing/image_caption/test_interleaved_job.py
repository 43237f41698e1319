"""`preprocess interleaved`: documents and the images that they name become shards that training reads."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.essential.images.test_video import encode_video
from vla_foundry.params.commands.preprocessing import PreprocessInterleavedParams
from vla_foundry.preprocessing.image_caption.interleaved_job import preprocess_interleaved
from vla_foundry.shards import index_shard


def picture(grey: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def run(source: Path, output: Path, **values: Any) -> dict[str, list[dict[str, bytes]]]:
    """Return the samples by their first text, and `report`."""
    preprocess_interleaved(
        PreprocessInterleavedParams(source=[str(source)], output=str(output), num_workers=0, **values)
    )
    found = {}
    for tar in sorted(output.glob("*.tar")):
        with tar.open("rb") as file:
            for _, spans in index_shard(file).samples:
                members = {}
                for suffix, span in spans.items():
                    file.seek(span.offset)
                    members[suffix] = file.read(span.size)
                parts = json.loads(members["json"])["parts"]
                found[next(part["text"] for part in parts if "text" in part)] = (parts, members)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    (folder / "pictures").mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(40))
    (folder / "b.gif").write_bytes(picture(80, "GIF"))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nonsense")
    (folder / "pictures" / "c.jpg").write_bytes(picture(120, "JPEG"))
    documents = [
        {"parts": [{"text": "one"}, {"image": "a.png"}, {"image": "b.gif"}, {"text": "end"}]},
        {"texts": [None, "two"], "images": ["pictures/c.jpg", None]},
        {"texts": ["three", None, "end"], "images": [None, "broken.jpg", None]},
        {"parts": [{"text": "four"}, {"image": "gone.png"}]},
        {"text": "five"},
    ]
    (folder / "list.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    matched = {"text_list": ["six"], "image_info": [{"image_name": "a.png", "matched_text_index": 0}]}
    (folder / "six.json").write_text(json.dumps(matched), encoding="utf-8")
    return folder


def test_documents_of_all_layouts_are_written_with_their_images(source: Path, tmp_path: Path) -> None:
    found = run(source, tmp_path / "out", max_bad_fraction=0.9)
    assert set(found) == {"one", "two", "six"}
    parts, members = found["one"]
    assert parts == [{"text": "one"}, {"image": "image_0.png"}, {"image": "image_1.png"}, {"text": "end"}]
    assert members["image_0.png"] == picture(40)
    assert found["two"][0] == [{"image": "image_0.jpg"}, {"text": "two"}]
    assert found["six"][0] == [{"image": "image_0.png"}, {"text": "six"}]
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["failed"] == {"bad image": 1, "missing file": 1, "no document": 1}


def test_videos_are_written_under_their_own_names(source: Path, tmp_path: Path) -> None:
    clip = encode_video("mp4", list(range(20)))
    (source / "clip.mp4").write_bytes(clip)
    parts = [{"text": "seven"}, {"image": "a.png"}, {"video": "clip.mp4"}, {"text": "end"}]
    (source / "seven.json").write_text(json.dumps({"parts": parts}), encoding="utf-8")
    parts, members = run(source, tmp_path / "out", max_bad_fraction=0.9)["seven"]
    assert parts == [{"text": "seven"}, {"image": "image_0.png"}, {"image": "video_1.mp4"}, {"text": "end"}]
    assert members["video_1.mp4"] == clip


def test_bad_images_may_be_left_out(source: Path, tmp_path: Path) -> None:
    found = run(source, tmp_path / "out", max_bad_fraction=0.9, skip_bad_images=True)
    assert found["three"][0] == [{"text": "three"}, {"text": " end"}]
    assert found["four"][0] == [{"text": "four"}]


def test_too_many_bad_documents_stop_the_job(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bad_fraction"):
        run(source, tmp_path / "out")


def test_a_folder_without_documents_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.png").write_bytes(picture(40))
    with pytest.raises(ValueError, match=r"raw has no documents: \.json files"):
        run(tmp_path / "raw", tmp_path / "out")
