"""All config dataclasses; importing them does not import torch."""

from typing import TYPE_CHECKING

import vla_foundry.params.migrations  # noqa: F401  (old names load in whatever part of params is used)
from vla_foundry.registry import import_lazily

if TYPE_CHECKING:
    from vla_foundry.config.loading import dump_params
    from vla_foundry.params.data.base import DataParams, register_data_params
    from vla_foundry.params.distributed import DistributedParams
    from vla_foundry.params.ema import EMAParams
    from vla_foundry.params.experiment import (
        TrainExperimentParams,
        load_experiment_params_from_yaml,
        load_params_from_yaml,
    )
    from vla_foundry.params.hparams import HyperParams
    from vla_foundry.params.models.roles import ModelParams, register_model_params

__all__ = [
    "DataParams",
    "DistributedParams",
    "EMAParams",
    "HyperParams",
    "ModelParams",
    "TrainExperimentParams",
    "dump_params",
    "load_experiment_params_from_yaml",
    "load_params_from_yaml",
    "register_data_params",
    "register_model_params",
]

__getattr__, __dir__ = import_lazily(
    __name__,
    {
        "DataParams": "vla_foundry.params.data.base",
        "DistributedParams": "vla_foundry.params.distributed",
        "EMAParams": "vla_foundry.params.ema",
        "HyperParams": "vla_foundry.params.hparams",
        "ModelParams": "vla_foundry.params.models.roles",
        "TrainExperimentParams": "vla_foundry.params.experiment",
        "dump_params": "vla_foundry.config.loading",
        "load_experiment_params_from_yaml": "vla_foundry.params.experiment",
        "load_params_from_yaml": "vla_foundry.params.experiment",
        "register_data_params": "vla_foundry.params.data.base",
        "register_model_params": "vla_foundry.params.models.roles",
    },
)
