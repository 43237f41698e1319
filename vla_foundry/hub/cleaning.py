"""Take local paths out of files that are published, and refuse to publish secrets."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vla_foundry.config.loading import dump_value
from vla_foundry.parsing import MAX_BYTES, parse_json, parse_yaml
from vla_foundry.provenance import hide_folder, hide_home
from vla_foundry.robotics.spec import SPEC_NAME
from vla_foundry.run_folder import CONFIG_NAME, EXPERIMENT_NAME, PREPROCESSING_CONFIG_NAME

# files of these names hold what a model reads, such as a vocabulary, which may well look like a path
_VERBATIM = re.compile(r"(tokenizer|vocab|added_tokens|special_tokens_map|stats|normalizer)\.json|merges\.txt")
_KEY_SUFFIXES = (".env", ".pem", ".key", ".netrc")
# preprocessing writes no paths to them, but names of cameras and fields, which may look like one (HDF5)
_NAMES = (PREPROCESSING_CONFIG_NAME, SPEC_NAME)
# values that say where and by whom a run was made
_PRIVATE: dict[str, Any] = {
    "save_path": "experiments", "remote_sync": None, "resolve_configs_path": None, "wandb_entity": None,
}  # fmt: skip
_IN_TEXT = re.compile(r"(?<![\w/.~:<])~?/(?:[\w.@+%~-]+/)+[\w.@+%~-]*")
_HOMES = re.compile(r"(~|/home/[^/]+|/Users/[^/]+|/root)(/|$)")
_LOCAL = re.compile(rb"(?<![\w.~-])/(home|Users|root)/[\w.-]+")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)
_MIN_SECRET = 8
# a binary file has a zero among its first bytes
_START = 1 << 16
_SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}",
    "an AWS key": rb"(?<![A-Z0-9])A(KIA|SIA)[0-9A-Z]{16}(?![A-Z0-9])",
    "a GitHub token": rb"(?<![A-Za-z0-9])(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an API key": rb"(?<![\w-])sk-[A-Za-z0-9_-]{20,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": rb"[a-z0-9]://[^/\s:@\"']+:[^/\s:@\"']+@[\w-]",
    "a signed URL": rb"X-Amz-Signature=|[?&]sig=[A-Za-z0-9%]{20,}",
}


def clean_text(name: str, text: str) -> str:
    """Return a file of JSON or YAML without local paths: of each, its last folder and its name are left.

    Args:
        name: path in the repository.
    """
    base = name.rpartition("/")[2]
    if _VERBATIM.fullmatch(base) or base in _NAMES or not base.endswith((".json", ".yaml", ".yml")):
        return text
    is_json = base.endswith(".json")
    values = parse_json(text, name) if is_json else parse_yaml(text, name)
    cleaned = _clean(values)
    if base == CONFIG_NAME:
        cleaned = _without_private(cleaned)
    elif base == EXPERIMENT_NAME and isinstance(cleaned, dict):
        cleaned["config"] = _without_private(cleaned.get("config", {}))
    if cleaned == values:
        return text
    return json.dumps(cleaned, indent=1, ensure_ascii=False) + "\n" if is_json else dump_value(cleaned)


def _without_private(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _PRIVATE.get(key, value) for key, value in config.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_hide(key) if isinstance(key, str) else key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return _hide(value) if isinstance(value, str) else value


def _hide(text: str) -> str:
    """Hide a local path, or those in a text."""
    text = hide_home(text)
    if re.match(r"(~|/[^/]+)/[^\s/]", text) or text == "~":
        return hide_path(text)
    return _IN_TEXT.sub(lambda match: hide_path(match[0]), text)


def hide_path(path: str) -> str:
    """Return the last folder and the name of a local path, without the user's home; a URI stays whole."""
    return hide_folder(_HOMES.sub("", path, count=1)) or "."


def read_secrets(environment: Mapping[str, str] | None = None) -> list[bytes]:
    """Return the values of this process's environment that are secrets by their name."""
    given = (os.environ if environment is None else environment).items()
    return [value.encode() for name, value in given if _SECRET_NAME.search(name) and _is_secret(value)]


def _is_secret(value: str) -> bool:
    # a file that holds the secret is none
    return len(value) >= _MIN_SECRET and not value.startswith(("/", "~")) and not value.isdigit()


def _has_local_path(text: bytes) -> bool:
    home = os.path.expanduser("~").encode()
    return _LOCAL.search(text) is not None or (len(home) > 1 and home + b"/" in text)


def find_private(name: str, path: Path, secrets: Iterable[bytes]) -> str | None:
    """Say what must not be published about a file, but not its value; None: nothing was found.

    Files of text are searched for what looks like a secret or a local path, all files for values of `secrets`.
    """
    if name.endswith(_KEY_SUFFIXES):
        return "secrets, by its name"
    overlap, tail = max([64, *map(len, secrets)]), b""
    with path.open("rb") as file:
        is_text = path.stat().st_size <= MAX_BYTES and b"\0" not in file.read(_START)
        file.seek(0)
        while chunk := file.read(MAX_BYTES if is_text else 1 << 24):
            window = tail + chunk
            if any(secret in window for secret in secrets):
                return "the value of a secret in this environment"
            if is_text:
                found = next((what for what, mark in _SECRETS.items() if re.search(mark, window)), None)
                if found is not None:
                    return f"what looks like {found}"
                if not _VERBATIM.fullmatch(name.rpartition("/")[2]) and _has_local_path(window):
                    return "a local path"
            tail = window[-overlap:]
    return None
