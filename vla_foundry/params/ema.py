"""Exponential moving average of the weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

from vla_foundry.config.schema import BaseParams, Bounds, Fraction, NonNegativeInt

# a decay of 1 never takes in new weights
_Decay = Annotated[float, Bounds(least=0, below=1)]


@dataclass(frozen=True, kw_only=True)
class EMAParams(BaseParams):
    """`--ema.` Exponential moving average of the weights over steps."""

    # average the weights; validate and save the average too
    enabled: bool = False
    # vanilla: decay alpha; ema: the decay grows as 1 - (1 + step / inv_gamma)^-power
    type: Literal["vanilla", "ema"] = "ema"
    # decay of vanilla
    alpha: _Decay = 0.999
    # steps during which the average copies the weights
    update_after_step: NonNegativeInt = 0
    # time scale of the growth of ema's decay, steps
    inv_gamma: Annotated[float, Bounds(above=0, most=10**12)] = 1.0
    # exponent of the growth of ema's decay
    power: Annotated[float, Bounds(above=0, most=100)] = 0.75
    # smallest decay of ema
    min_value: _Decay = 0.0
    # largest decay of ema
    max_value: Fraction = 0.9999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_value > self.max_value:
            raise ValueError(f"min_value ({self.min_value}) must not be above max_value ({self.max_value}).")
