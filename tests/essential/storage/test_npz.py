"""Arrays out of an .npz: NumPy's own reader is the authority."""

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vla_foundry.storage.npz import NpzFile, format_arrays


def write_npz(arrays: dict[str, Any], *, is_packed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if is_packed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@pytest.fixture
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    many = {f"robot__actual__joint_position__left::panda_{number}": rng.random((30, 7)) for number in range(120)}
    return many | {
        "half": rng.random((30, 3)).astype(np.float16),
        "mask": rng.random(30) < 0.5,
        "words": np.asarray(["open", "close it"] * 15),
        "one": np.float64(3.5),
        "fortran": np.asfortranarray(rng.random((30, 5))),
        "stack": rng.random((30, 4, 4)).astype(">f4"),
        "empty": np.zeros((0, 3)),
    }


@pytest.mark.parametrize("is_packed", [False, True])
def test_every_array_is_what_numpy_reads(arrays: dict[str, Any], is_packed: bool) -> None:
    content = write_npz(arrays, is_packed=is_packed)
    file, expected = NpzFile.from_bytes(content), np.load(io.BytesIO(content))
    assert file.names == expected.files
    for name in expected.files:
        assert file.read(name).dtype == expected[name].dtype
        assert np.array_equal(file.read(name), expected[name])
        assert file.shape(name) == expected[name].shape


@pytest.mark.parametrize("is_packed", [False, True])
def test_rows_are_a_part_of_the_array(arrays: dict[str, Any], is_packed: bool) -> None:
    file = NpzFile.from_bytes(write_npz(arrays, is_packed=is_packed))
    for name in ("half", "mask", "words", "fortran", "stack"):
        assert np.array_equal(file.read_rows(name, 7, 19), arrays[name][7:19])
    with pytest.raises(ValueError, match=r"30 rows, not 31|no rows 20 to 31"):
        file.read_rows("stack", 20, 31)


def test_rows_of_a_stored_array_are_read_without_the_others() -> None:
    content = write_npz({"a": np.zeros((10_000, 7)), "b": np.zeros((10_000, 7))}, is_packed=False)
    num_read = []

    def read(offset: int, size: int) -> bytes:
        num_read.append(size)
        return content[offset : offset + size]

    rows = NpzFile(read, len(content)).read_rows("b", 5000, 5016)
    assert rows.shape == (16, 7)
    assert sum(num_read) < 10_000


def test_a_shape_beyond_the_array_is_refused_instead_of_reading_its_neighbour() -> None:
    content = write_npz({"a": np.zeros((100, 7)), "b": np.ones((100, 7))}, is_packed=False)
    content = content.replace(b"'shape': (100, 7)", b"'shape': (110, 7)", 1)
    with pytest.raises(ValueError, match=r"array 'a' of \d+ bytes cannot have the shape \(110, 7\)"):
        NpzFile.from_bytes(content).read_rows("a", 99, 105)


def test_python_objects_are_refused() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, values=np.asarray([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="'values' has a broken header, or holds Python objects"):
        NpzFile.from_bytes(buffer.getvalue()).read("values")


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_in_values(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


@pytest.mark.parametrize(("damage", "message"), [(cut, "truncated"), (flip_in_values, "damaged")])
@pytest.mark.parametrize("is_packed", [False, True])
def test_damage_is_said(damage: Callable[[bytes], bytes], message: str, is_packed: bool) -> None:
    values = np.random.default_rng(0).random((200, 7))
    content = write_npz({"values": values}, is_packed=is_packed)
    with pytest.raises(ValueError, match=message):
        NpzFile.from_bytes(damage(content)).read("values")


def test_what_is_no_npz_is_said() -> None:
    for content in (b"", b"PK\5\6", b"x" * 100):
        with pytest.raises(ValueError, match=r"truncated or not an \.npz"):
            NpzFile.from_bytes(content)


def test_each_error_begins_with_the_file_s_name_once() -> None:
    content = write_npz({"values": np.arange(3)}, is_packed=True)

    def read(offset: int, size: int) -> bytes:
        return content[offset : offset + size]

    with pytest.raises(ValueError, match=r"^a\.npz: array 'values' of shape \(3,\) has no rows 0 to 4"):
        NpzFile(read, len(content), origin="a.npz").read_rows("values", 0, 4)
    with pytest.raises(ValueError, match=r"^a\.npz: the \.npz is truncated"):
        NpzFile(read, 9, origin="a.npz")
    damaged = flip_in_values(content)
    with pytest.raises(ValueError, match=r"^a\.npz: (?!a\.npz)"):
        NpzFile(lambda offset, size: damaged[offset : offset + size], len(content), origin="a.npz").read_rows(
            "values", 0, 1
        )


def test_an_unchecked_file_checks_an_array_before_its_first_rows() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, good=np.arange(12.0).reshape(6, 2), bad=np.arange(12.0).reshape(6, 2))
    content = bytearray(buffer.getvalue())
    place = content.rindex(np.float64(11.0).tobytes())  # the last row of `bad`
    content[place] ^= 1
    read = lambda offset, size: bytes(content[offset : offset + size])  # noqa: E731
    assert NpzFile(read, len(content)).read_rows("bad", 0, 2).tolist() == [[0, 1], [2, 3]]
    unchecked = NpzFile(read, len(content), is_checked=False)
    assert unchecked.read_rows("good", 0, 2).tolist() == [[0, 1], [2, 3]]
    for _ in range(2):
        with pytest.raises(ValueError, match="array 'bad' is damaged: its checksum differs"):
            unchecked.read_rows("bad", 0, 2)


@pytest.mark.parametrize("is_packed", [False, True])
def test_arrays_are_written_as_zipfile_and_numpy_write_them(arrays: dict[str, Any], is_packed: bool) -> None:
    written = arrays | {"file": np.arange(6.0), "é|x": np.arange(12).reshape(3, 4)[:, ::2], "turned": np.eye(2, 3).T}
    written = {name: np.asarray(array) for name, array in written.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in written.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array)
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = zipfile.ZIP_DEFLATED if is_packed else zipfile.ZIP_STORED
            archive.writestr(member, content.getvalue())
    assert format_arrays(written, compressed=is_packed) == buffer.getvalue()


def test_what_does_not_fit_is_not_written() -> None:
    with pytest.raises(ValueError, match="Python objects"):
        format_arrays({"a": np.asarray([{}])})
    many = dict.fromkeys(map(str, range(0xFFFE)), np.zeros(()))
    assert len(NpzFile.from_bytes(format_arrays(many)).names) == 0xFFFE
    with pytest.raises(ValueError, match="at most 65,534 arrays, not 65,535"):
        format_arrays({**many, "one more": np.zeros(())})
