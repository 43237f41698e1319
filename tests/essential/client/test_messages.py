"""policy.proto and pyproject.toml say what the Python client says."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vla_foundry
from vla_foundry.client import messages
from vla_foundry.client.messages import decode_raw_image, raw_image

CLIENT = Path(messages.__file__).parent


def read_proto() -> tuple[dict[str, dict[int, tuple[str, str]]], str]:
    """Return {message: {number: (name, type)}}, and the text without comments."""
    text = re.sub(r"//[^\n]*", "", (CLIENT / "policy.proto").read_text(encoding="utf-8"))
    field = re.compile(r"(repeated \w+|map<string, string>|\w+) (\w+) = (\d+);")
    found = {
        name: {int(number): (field_name, kind) for kind, field_name, number in field.findall(body)}
        for name, body in re.findall(r"message (\w+) \{(.*?)\}", text, re.DOTALL)
    }
    return found, text


def type_of(settings: Any) -> str:
    kind = settings["kind"]
    if kind == "map":
        return "map<string, string>"
    name = {"enum": "Encoding"}.get(kind, kind) if isinstance(kind, str) else kind.__name__
    return f"repeated {name}" if settings["repeated"] else name


def test_proto_declares_the_messages_and_methods() -> None:
    found, text = read_proto()
    kinds = [kind for kind in vars(messages).values() if dataclasses.is_dataclass(kind)]
    assert found == {
        kind.__name__: {
            field.metadata["number"]: (field.name, type_of(field.metadata)) for field in dataclasses.fields(kind)
        }
        for kind in kinds
        if isinstance(kind, type)
    }
    rpcs = dict((name, pair) for name, *pair in re.findall(r"rpc (\w+)\((\w+)\) returns \((\w+)\);", text))
    assert rpcs == {name: [one.__name__, other.__name__] for name, (one, other) in messages.METHODS.items()}
    package, service = re.findall(r"package ([\w.]+);", text)[0], re.findall(r"service (\w+)", text)[0]
    assert f"{package}.{service}" == messages.SERVICE
    enum = dict(re.findall(r"(\w+) = (\d);", re.findall(r"enum Encoding \{(.*?)\}", text, re.DOTALL)[0]))
    assert enum == {name: str(getattr(messages, name)) for name in ("RAW", "JPEG", "PNG")}


def test_the_client_has_the_package_version() -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == vla_foundry.__version__


def test_depth_travels_in_millimetres() -> None:
    depth = np.array([[0, 400], [1500, 65535]], np.uint16)
    np.testing.assert_array_equal(decode_raw_image(raw_image("d", depth)), depth)
    metres = np.array([[np.nan, -1, np.inf], [0.4004, 1.5, 70]], np.float32)
    np.testing.assert_array_equal(decode_raw_image(raw_image("d", metres)), [[0, 0, 0], [400, 1500, 0]])
    with pytest.raises(ValueError, match=r"'d' is float64 \(2, 2\)"):
        raw_image("d", depth / 1000)
