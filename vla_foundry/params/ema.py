"""Exponential moving average of the weights."""

from dataclasses import dataclass
from typing import Literal

from vla_foundry.config.schema import BaseParams, Fraction


@dataclass(frozen=True, kw_only=True)
class EMAParams(BaseParams):
    """`--ema.` Exponential moving average of the weights over steps."""

    # average the weights; validate and save the average too
    enabled: bool = False
    # vanilla: decay alpha; ema: the decay grows as 1 - (1 + step / inv_gamma)^-power
    type: Literal["vanilla", "ema"] = "ema"
    # decay of vanilla
    alpha: Fraction = 0.999
    # steps during which the average copies the weights
    update_after_step: int = 0
    # time scale of the growth of ema's decay, steps
    inv_gamma: float = 1.0
    # exponent of the growth of ema's decay
    power: float = 0.75
    # smallest decay of ema
    min_value: Fraction = 0.0
    # largest decay of ema
    max_value: Fraction = 0.9999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_value > self.max_value:
            raise ValueError(f"min_value ({self.min_value}) must not be above max_value ({self.max_value}).")
        if self.inv_gamma <= 0 or self.update_after_step < 0:
            raise ValueError(
                f"inv_gamma ({self.inv_gamma}) must be above 0 and update_after_step ({self.update_after_step}) >= 0."
            )
