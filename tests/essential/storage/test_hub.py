"""Errors of the Hugging Face hub, and of the client that speaks to it, become one line."""

import errno

import pytest
from huggingface_hub.errors import HfHubHTTPError

from vla_foundry.storage.hub import loading_published, named_errors

# without a network, the client raises an error that is not the hub's own, and of no class in Python
CLIENT = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def test_a_hub_that_cannot_be_reached_is_one_line() -> None:
    error = type("ConnectError", (CLIENT,), {})("[Errno 111] Connection refused")
    assert not isinstance(error, OSError)
    with (
        pytest.raises(ValueError, match=r"^hf://a/b/c cannot be reached: \[Errno 111\] Conn"),
        named_errors("hf://a/b/c"),
    ):
        raise error
    message = (
        r"^Tokenizer 'a/b' cannot be loaded: it is not on this machine, and the hub cannot be reached \(\[Errno 111"
    )
    with pytest.raises(ValueError, match=message), loading_published("Tokenizer 'a/b'"):
        raise error


def test_a_full_disk_is_not_a_fault_of_the_hub() -> None:
    with pytest.raises(OSError, match="No space left"), named_errors("hf://a/b/c"):
        raise OSError(errno.ENOSPC, "No space left on device")
