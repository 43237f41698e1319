"""What a denoising head expects of its noise process, and the registry of these."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from vla_foundry.params.models.noise import NoiseParams
from vla_foundry.registry import Registry

# (noised actions (B, T, A), time (B,)) -> what the head predicts, (B, T, A)
Predict = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class NoiseProcess(Protocol):
    """Between actions, at time 0, and standard normal noise, at time 1."""

    params: Any

    def spread_times(self, uniforms: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Turn uniform draws into the times of training."""
        ...

    def add_noise(
        self, actions: Float[Tensor, "N T A"], noise: Float[Tensor, "N T A"], times: Float[Tensor, " N"]
    ) -> Float[Tensor, "N T A"]:
        """Return the noised actions at these times."""
        ...

    def target(self, actions: Float[Tensor, "N T A"], noise: Float[Tensor, "N T A"]) -> Float[Tensor, "N T A"]:
        """Return what the head is to predict."""
        ...

    def sample(
        self, predict: Predict, noise: Float[Tensor, "B T A"], num_steps: int, hold: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B T A"]:
        """Go from noise to actions.

        Args:
            predict: the head.
            noise: where to start, at time 1.
            num_steps: how many steps to take.
            hold: puts what is known into noised actions: observed steps, and 0 where there is no dimension. Applied
                to everything that `predict` is given, and to the result.
        """
        ...


NOISES: "Registry[Callable[[Any], NoiseProcess]]" = Registry(
    "model.action_head.noise.type", package="vla_foundry.models", decorator="register_noise"
)


def register_noise(name: str) -> Callable[[Callable[..., NoiseProcess]], Callable[..., NoiseProcess]]:
    """Register a factory of params as the noise process called `name`."""
    return NOISES.register(name)


def create_noise(params: NoiseParams) -> NoiseProcess:
    """Build the noise process that `params` describe."""
    return NOISES.get(params.type)(params)
