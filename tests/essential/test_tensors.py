"""Tensors are read as they were written, by any rows of them, from any number of files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vla_foundry.tensors import Part, as_parts, join_files, open_tensors, write_tensors


def write_divided(folder: Path, tensor: Tensor, num_files: int) -> list[Path]:
    """Write the rows of a tensor to several files, as torch.chunk divides them; the last may have none."""
    paths, first = [], 0
    for number, rows in enumerate(tensor.chunk(num_files)):
        paths.append(folder / f"{num_files}_{number}.safetensors")
        write_tensors(paths[-1], {"x": Part(rows.shape, rows.dtype, rows.detach, first)}, marks_parts=True)
        first += len(rows)
    return paths


@pytest.mark.parametrize("num_files", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_any_rows_are_read_from_any_number_of_files(tmp_path: Path, num_files: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(7 * 3 * 2).reshape(7, 3, 2).to(dtype)
    with open_tensors(write_divided(tmp_path, tensor, num_files)) as (entries, _):
        assert entries["x"].shape == tensor.shape
        assert torch.equal(entries["x"].read(), tensor)
        for first in range(8):
            for last in range(first, 8):
                found = entries["x"].read_rows(slice(first, last))
                assert found.dtype == dtype
                assert torch.equal(found, tensor[first:last])


def test_files_are_joined_to_one_that_any_reader_takes(tmp_path: Path) -> None:
    tensor, scalar = torch.randn(5, 2), torch.tensor(2.5)
    paths = [*write_divided(tmp_path, tensor, 3), tmp_path / "other.safetensors"]
    write_tensors(paths[-1], as_parts({"s": scalar}), {"base_sha256": "abc"}, marks_parts=True)
    join_files(paths, tmp_path / "joined.safetensors")
    whole = load_file(tmp_path / "joined.safetensors")
    assert torch.equal(whole["x"], tensor)
    assert torch.equal(whole["s"], scalar)
    with open_tensors([tmp_path / "joined.safetensors"]) as (_, metadata):
        assert metadata == [{"format": "pt", "base_sha256": "abc"}]


def test_missing_rows_and_strange_marks_are_one_line(tmp_path: Path) -> None:
    paths = write_divided(tmp_path, torch.randn(6, 2), 3)
    for missing in (0, 1):
        with (
            pytest.raises(ValueError, match="'x' begins at row"),
            open_tensors([path for path in paths if path != paths[missing]]),
        ):
            pass
    for mark in ("[]", "{", '{"x": {"saved_offsets": [0, 1]}}', '{"x": {"saved_offsets": "ab"}}', '{"x": {"a": 1}}'):
        write_tensors(tmp_path / "bad.safetensors", as_parts({"x": torch.zeros(2, 2)}), {"DCP_SHARDING_INFO": mark})
        with (
            pytest.raises(ValueError, match=r"bad\.safetensors"),
            open_tensors([tmp_path / "bad.safetensors"]),
        ):
            pass
    write_tensors(tmp_path / "scalar.safetensors", as_parts({"x": torch.zeros(())}))
    for other in (torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3), torch.zeros(())):
        part = Part(other.shape, other.dtype, other.detach, 6 if other.shape else 0)
        write_tensors(tmp_path / "other.safetensors", {"x": part}, marks_parts=True)
        files = paths if other.shape else [tmp_path / "scalar.safetensors"]
        with (
            pytest.raises(ValueError, match=r"other\.safetensors: 'x' is .*cannot continue"),
            open_tensors([*files, tmp_path / "other.safetensors"]),
        ):
            pass
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match="is not a readable"), open_tensors([tmp_path / "folder.safetensors"]):
        pass
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not a readable"), open_tensors([tmp_path / "torn.safetensors"]):
        pass
