"""Training: the loop, its objectives and its learning-rate schedules."""

from __future__ import annotations

from captioning.runtime.registry import Registry

# --objective -> a factory (options: TrainingOptions, train: CaptionDataset) -> Objective (objectives.py)
OBJECTIVES = Registry(
    "--objective",
    {
        "cross-entropy": "captioning.training.objectives:make_cross_entropy",
        "cider": "captioning.training.objectives:make_cider",
    },
)
# --schedule -> a function (options: TrainingOptions, epoch: float) -> factor of the learning rates (optimizer.py)
SCHEDULES = Registry(
    "--schedule",
    {
        "step": "captioning.training.optimizer:step_decay",
        "cosine": "captioning.training.optimizer:cosine_decay",
        "inverse-sqrt": "captioning.training.optimizer:inverse_sqrt_decay",
    },
)
