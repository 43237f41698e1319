"""Pipelines: one module per modality."""

from vla_foundry.data.pipelines.stages import Pipeline, Sample, Stage, WebDatasetStage, register_pipeline

__all__ = ["Pipeline", "Sample", "Stage", "WebDatasetStage", "register_pipeline"]
