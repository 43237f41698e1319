"""Messages are protobuf's, byte for byte: compared with hand-written bytes and with protobuf's own library."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from vla_foundry.client.wire import Numbers, WireError, decode, encode, wire


@dataclass
class Inner:
    name: str = wire(1, "string")
    values: Numbers = wire(2, "double", repeated=True)


@dataclass
class Outer:
    flag: bool = wire(1, "bool")
    count: int = wire(2, "uint32")
    offset: int = wire(3, "int64")
    choice: int = wire(4, "enum")
    ratio: float = wire(5, "double")
    small: float = wire(6, "float")
    text: str = wire(7, "string")
    data: bytes = wire(8, "bytes")
    inner: Inner | None = wire(9, Inner)
    inners: Sequence[Inner] = wire(10, Inner, repeated=True)
    numbers: Numbers = wire(11, "int32", repeated=True)
    halves: Numbers = wire(12, "float", repeated=True)
    texts: Sequence[str] = wire(13, "string", repeated=True)
    pairs: Mapping[str, str] = wire(16, "map")


def protobuf_class(kind: type, pool: dict[type, Any]) -> type[message.Message]:
    """The same message in protobuf's library."""
    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto3")
    types = descriptor_pb2.FieldDescriptorProto
    for each in pool:
        described = file.message_type.add(name=each.__name__)
        for field in fields(each):
            settings = field.metadata
            repeated = settings["repeated"] or settings["kind"] == "map"
            proto = described.field.add(name=field.name, number=settings["number"], label=3 if repeated else 1)
            if settings["kind"] == "map":
                entry = described.nested_type.add(name="PairsEntry", options={"map_entry": True})
                for number, name in ((1, "key"), (2, "value")):
                    entry.field.add(name=name, number=number, label=1, type=types.TYPE_STRING)
                proto.type, proto.type_name = types.TYPE_MESSAGE, f".t.{each.__name__}.PairsEntry"
            elif isinstance(settings["kind"], type):
                proto.type, proto.type_name = types.TYPE_MESSAGE, f".t.{settings['kind'].__name__}"
            else:
                # an open enum is an int32 on the wire
                proto.type = getattr(types, f"TYPE_{settings['kind'].replace('enum', 'int32').upper()}")
    found = descriptor_pool.DescriptorPool()
    found.Add(file)
    return message_factory.GetMessageClass(found.FindMessageTypeByName(f"t.{kind.__name__}"))


PROTOBUF = protobuf_class(Outer, {Inner: None, Outer: None})


def draw_outer(rng: np.random.Generator) -> Outer:
    def text() -> str:
        return "".join(rng.choice(list("aé世\0")) for _ in range(rng.integers(0, 4)))

    def inner() -> Inner:
        return Inner(text(), rng.normal(size=rng.integers(0, 4)).tolist())

    return Outer(
        flag=bool(rng.integers(2)),
        count=int(rng.choice([0, 1, 127, 128, 2**32 - 1])),
        offset=int(rng.choice([0, -1, 2**62, -(2**63)])),
        choice=int(rng.integers(0, 3)),
        ratio=float(rng.choice([0.0, -0.0, math.inf, 0.1])),
        small=float(np.float32(rng.choice([0.0, 0.1, -3.0]))),
        text=text(),
        data=rng.bytes(int(rng.integers(0, 300))),
        inner=inner() if rng.integers(2) else None,
        inners=[inner() for _ in range(rng.integers(0, 3))],
        numbers=[int(value) for value in rng.integers(-(2**31), 2**31, rng.integers(0, 4))],
        halves=[float(value) for value in rng.normal(size=rng.integers(0, 4)).astype(np.float32)],
        texts=[text() for _ in range(rng.integers(0, 3))],
        pairs={text() or "k": text()} if rng.integers(2) else {},
    )


def as_protobuf(outer: Outer) -> message.Message:
    values = {field.name: getattr(outer, field.name) for field in fields(Outer)}
    values["inners"] = [vars(each) for each in outer.inners]
    values["inner"] = None if outer.inner is None else vars(outer.inner)
    return PROTOBUF(**{name: value for name, value in values.items() if value is not None})


def as_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (Inner, Outer)):
        return {name: as_plain(each) for name, each in vars(value).items()}
    return [as_plain(each) for each in value] if isinstance(value, list) else value


def test_bytes_are_those_of_protobuf_and_come_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        outer = draw_outer(rng)
        data = encode(outer)
        theirs = as_protobuf(outer)
        assert data == theirs.SerializeToString(deterministic=True)
        assert as_plain(decode(Outer, data)) == as_plain(outer)
        assert np.signbit(decode(Outer, data).ratio) == np.signbit(outer.ratio)


def test_hand_written_bytes() -> None:
    # field 7 "hi", field 11 packed [1, 300], field 9 {1: "a"}
    data = bytes.fromhex("3a026869 4a03 0a0161 5a03 01ac02".replace(" ", ""))
    found = decode(Outer, data)
    assert (found.text, found.numbers.tolist(), found.inner) == ("hi", [1, 300], Inner("a", []))
    assert encode(Outer(text="hi", inner=Inner("a"), numbers=[1, 300])) == data


def test_forms_that_encoders_may_choose() -> None:
    # numbers that are not packed, an unknown field 99, a message in two pieces, and the last of two texts
    data = bytes.fromhex("5801 5802 9806 05 4a03 0a0161 4a0a 1208 000000000000f03f 3a0161 3a0162".replace(" ", ""))
    found = decode(Outer, data)
    assert np.asarray(found.numbers).tolist() == [1, 2]
    assert (found.text, found.inner.name, found.inner.values.tolist()) == ("b", "a", [1.0])
    theirs = PROTOBUF.FromString(data)
    assert (list(theirs.numbers), theirs.text, theirs.inner.name) == ([1, 2], "b", "a")


def test_broken_bytes_are_refused_or_read_as_protobuf_reads_them() -> None:
    rng = np.random.default_rng(1)
    num_refused = 0
    for number in range(1500):
        data = bytearray(encode(draw_outer(rng)))
        for _ in range(rng.integers(1, 4)):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        cut = bytes(data[: rng.integers(len(data) + 1)] if number % 2 else data)
        try:
            found = decode(Outer, cut)
        except WireError:
            num_refused += 1
            continue
        # raises if protobuf refuses them
        theirs = PROTOBUF.FromString(cut)
        assert found.data == theirs.data
        assert found.text == theirs.text
        assert [each.name for each in found.inners] == [each.name for each in theirs.inners]
    assert 300 < num_refused < 1400


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\x3a\x05hi", "Outer: field 7 is cut off"),
        (b"\x3a\x02\xff\xff", "Outer.text: 'utf-8' codec can't decode"),
        (b"\x38\x01", "Outer.text has wire type 0, not 2"),
        (b"\x10" + b"\xff" * 11, "Outer: a number has more than 10 bytes"),
        (b"\x00\x01", "Outer: a field has the number 0"),
        (b"\x62\x03abc", "Outer.halves: "),
        # 2 bytes a message: 64 MiB of them would take minutes and gigabytes
        (b"\x52\x00" * 30_000, "Outer: the message has more than 20000 fields"),
        (b"\x52\x04\x7a\x00\x7a\x00" * 10_000, "Inner: the message has more than 20000 fields"),
    ],
)
def test_a_fault_names_its_field(data: bytes, fault: str) -> None:
    with pytest.raises(WireError, match=fault):
        decode(Outer, data)
