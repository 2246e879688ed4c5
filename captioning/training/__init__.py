"""The training loop, and what it optimises."""

from __future__ import annotations

from captioning.runtime.registry import Registry

# name -> (TrainingOptions, CaptionDataset to train on) -> Objective
OBJECTIVES = Registry(
    "--objective",
    {
        "cross-entropy": "captioning.training.objectives:make_cross_entropy",
        "cider": "captioning.training.objectives:make_cider",
    },
)
# name -> (TrainingOptions, epochs before an update) -> the factor of the learning rates
SCHEDULES = Registry(
    "--schedule",
    {
        "step": "captioning.training.optimizer:step_decay",
        "cosine": "captioning.training.optimizer:cosine_decay",
    },
)
