"""The client of `vla-foundry serve`: `RemotePolicy` acts like a policy in this process; needs numpy and grpcio only."""

from typing import TYPE_CHECKING, Any

from vla_foundry.client.observation import RobotObservation

if TYPE_CHECKING:
    from vla_foundry.client.remote_policy import RemotePolicy

__all__ = ["RemotePolicy", "RobotObservation"]


def __getattr__(name: str) -> Any:
    # lazy: observations are used without a server too, where grpcio may not be installed
    if name == "RemotePolicy":
        from vla_foundry.client.remote_policy import RemotePolicy

        return RemotePolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
