"""Encode and decode protocol buffer messages (proto3) that are declared as dataclasses, without protobuf's library.

    @dataclass
    class Pose:
        name: str = wire(1, "string")
        xyz: Numbers = wire(2, "double", repeated=True)     # packed; decoded as a numpy array
        parent: "Parent | None" = wire(3, Parent)

Fields keep the order of their numbers, default values are left out, and unknown fields are skipped, as in proto3.
Source: https://protobuf.dev/programming-guides/encoding/
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import count
from typing import Any, TypeVar

import numpy as np

M = TypeVar("M")
# values of a repeated number; decoded: an array
Numbers = np.ndarray | Sequence[float] | Sequence[int]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOATS = {"double": ("<f8", _FIXED64), "float": ("<f4", _FIXED32)}
_SIGNED, _UNSIGNED = ("int32", "int64", "enum"), ("uint32", "uint64", "bool")
_DEFAULTS: dict[str, Any] = {"string": "", "bytes": b"", "double": 0.0, "float": 0.0, "bool": False}
_MAX_VARINT_BYTES = 10
# of a message and all messages in it; more would keep a server busy for minutes
_MAX_FIELDS = 20_000


class WireError(ValueError):
    """The bytes are not the message."""


@dataclass(frozen=True)
class _Field:
    name: str
    number: int
    # a scalar type of protobuf, "map" (string to string), or a message class
    kind: Any
    repeated: bool

    @property
    def wire_type(self) -> int:
        if self.kind in _FLOATS:
            return _FLOATS[self.kind][1]
        return _VARINT if self.kind in (*_SIGNED, *_UNSIGNED) else _BYTES


def wire(number: int, kind: Any, *, repeated: bool = False) -> Any:
    """Declare a dataclass field: its number, and its protobuf type, "map" (string to string) or message class."""
    settings: dict[str, Any] = {"metadata": {"number": number, "kind": kind, "repeated": repeated}}
    if repeated:
        return field(default_factory=list, **settings)
    if kind == "map":
        return field(default_factory=dict, **settings)
    return field(default=_DEFAULTS.get(kind, 0) if isinstance(kind, str) else None, **settings)


@cache
def _fields_of(message: type) -> tuple[_Field, ...]:
    found = [_Field(each.name, **each.metadata) for each in fields(message)]  # pyright: ignore[reportArgumentType]
    return tuple(sorted(found, key=lambda each: each.number))


def encode(message: Any) -> bytes:
    """Return the bytes of a message.

    Raises:
        struct.error, OverflowError, TypeError: a value is not of its field's type.
    """
    parts: list[bytes] = []
    for each in _fields_of(type(message)):
        value = getattr(message, each.name)
        if each.kind == "map":
            for key, text in value.items():
                parts.append(_chunk(each.number, _chunk(1, key.encode()) + _chunk(2, text.encode())))
        elif each.repeated and each.wire_type != _BYTES:
            packed = _pack(each.kind, value)
            parts += [_chunk(each.number, packed)] if packed else []
        else:
            values = value if each.repeated else [value] if _is_set(each, value) else []
            parts += [_encode_one(each, one) for one in values]
    return b"".join(parts)


def _is_set(each: _Field, value: Any) -> bool:
    if not isinstance(each.kind, str):
        return value is not None
    # proto3 omits 0.0 but not -0.0
    return bool(value) or (each.kind in _FLOATS and bool(np.signbit(value)))


def _encode_one(each: _Field, value: Any) -> bytes:
    if each.wire_type == _BYTES:
        if not isinstance(each.kind, str):
            return _chunk(each.number, encode(value))
        return _chunk(each.number, value.encode() if each.kind == "string" else value)
    return _varint(each.number << 3 | each.wire_type) + _pack(each.kind, [value])


def _pack(kind: str, values: Any) -> bytes:
    if kind in _FLOATS:
        return np.asarray(values, dtype=_FLOATS[kind][0]).tobytes()
    return b"".join(_varint(int(value)) for value in values)


def _chunk(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(payload)) + payload


def _varint(value: int) -> bytes:
    # negative numbers are 64-bit two's complement
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def decode(message: type[M], data: bytes | memoryview, counter: Iterator[int] | None = None) -> M:
    """Parse a message; `bytes` fields are copies.

    Args:
        message: its class.
        data: its bytes.
        counter: counts the fields of the whole message, if this one is part of another.

    Raises:
        WireError: the bytes are not the message, or hold absurdly many fields; the text names the field.
    """
    counter = counter or count()
    payloads: dict[int, list[tuple[int, Any]]] = {}
    for number, wire_type, payload in _split(memoryview(data), message.__name__, counter):
        payloads.setdefault(number, []).append((wire_type, payload))
    values: dict[str, Any] = {}
    for each in _fields_of(message):
        if each.number in payloads:
            where = f"{message.__name__}.{each.name}"
            try:
                values[each.name] = _decode_field(each, payloads[each.number], where, counter)
            except (struct.error, UnicodeDecodeError, ValueError) as error:
                raise error if isinstance(error, WireError) else WireError(f"{where}: {error}") from None
    return message(**values)


def _split(data: memoryview, name: str, counter: Iterator[int]) -> Iterator[tuple[int, int, Any]]:
    """Yield the number, wire type and payload of each field; varints as unsigned numbers."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position, name)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise WireError(f"{name}: a field has the number 0")
        if next(counter) >= _MAX_FIELDS:
            raise WireError(f"{name}: the message has more than {_MAX_FIELDS} fields")
        if wire_type == _VARINT:
            value, position = _read_varint(data, position, name)
            yield number, wire_type, value
            continue
        if wire_type == _BYTES:
            size, position = _read_varint(data, position, name)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise WireError(f"{name}: field {number} has the unknown wire type {wire_type}")
        if size > len(data) - position:
            raise WireError(f"{name}: field {number} is cut off")
        yield number, wire_type, data[position : position + size]
        position += size


def _read_varint(data: memoryview, position: int, name: str) -> tuple[int, int]:
    value = 0
    for shift in range(_MAX_VARINT_BYTES):
        if position >= len(data):
            raise WireError(f"{name}: the message is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value & (1 << 64) - 1, position
    raise WireError(f"{name}: a number has more than {_MAX_VARINT_BYTES} bytes")


def _decode_field(each: _Field, payloads: list[tuple[int, Any]], where: str, counter: Iterator[int]) -> Any:
    for wire_type, _ in payloads:
        if wire_type != each.wire_type and not (each.repeated and wire_type == _BYTES):
            raise WireError(f"{where} has wire type {wire_type}, not {each.wire_type}")
    if each.kind == "map":
        return dict(_decode_pair(payload, where, counter) for _, payload in payloads)
    if each.repeated and each.wire_type != _BYTES:
        return _unpack_all(each.kind, payloads, where)
    if each.wire_type != _BYTES:
        return _unpack(each.kind, payloads[-1][1])
    if each.kind == "string":
        texts = [str(payload, "utf-8") for _, payload in payloads]
        return texts if each.repeated else texts[-1]
    if each.kind == "bytes":
        blobs = [bytes(payload) for _, payload in payloads]
        return blobs if each.repeated else blobs[-1]
    if each.repeated:
        return [decode(each.kind, payload, counter) for _, payload in payloads]
    # a message in several pieces is merged, which is what decoding the joined bytes does
    whole = b"".join(payload for _, payload in payloads) if len(payloads) > 1 else payloads[0][1]
    return decode(each.kind, whole, counter)


def _decode_pair(data: memoryview, where: str, counter: Iterator[int]) -> tuple[str, str]:
    found = {1: "", 2: ""}
    for number, wire_type, payload in _split(data, where, counter):
        if number in found:
            if wire_type != _BYTES:
                raise WireError(f"{where} holds a pair that is not two strings")
            found[number] = str(payload, "utf-8")
    return found[1], found[2]


def _unpack(kind: str, payload: Any) -> Any:
    if kind in _FLOATS:
        return float(np.frombuffer(payload, dtype=_FLOATS[kind][0])[0])
    if kind == "bool":
        return payload != 0
    return payload - (1 << 64) if kind in _SIGNED and payload >> 63 else payload


def _unpack_all(kind: str, payloads: list[tuple[int, Any]], where: str) -> np.ndarray:
    """Return the values of a repeated number, packed or not."""
    if kind in _FLOATS:
        return np.frombuffer(b"".join(payload for _, payload in payloads), dtype=_FLOATS[kind][0]).copy()
    values: list[Any] = []
    for wire_type, payload in payloads:
        if wire_type == _VARINT:
            values.append(_unpack(kind, payload))
            continue
        position = 0
        while position < len(payload):
            value, position = _read_varint(payload, position, where)
            values.append(_unpack(kind, value))
    return np.array(values, dtype=bool if kind == "bool" else np.uint64 if kind in _UNSIGNED else np.int64)
