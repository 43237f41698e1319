"""Pipelines: one module per modality."""

from vla_foundry.data.pipelines.named import Stages, WebDatasetStage
from vla_foundry.data.pipelines.stages import Pipeline, Sample, Stage, register_pipeline
from vla_foundry.params.data.stages import register_stage

__all__ = ["Pipeline", "Sample", "Stage", "Stages", "WebDatasetStage", "register_pipeline", "register_stage"]
