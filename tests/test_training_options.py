"""The settings of a training run that depend on its device."""

import pytest

from captioning.training.options import GPU_BATCH, PUBLISHED_BATCH, BatchDefaults
from config import Train


@pytest.mark.parametrize(
    "device, given, expected",
    [
        ("cpu", {}, PUBLISHED_BATCH),
        ("mps", {}, PUBLISHED_BATCH),
        ("cuda", {}, GPU_BATCH),
        ("cuda", {"batch_size": 32}, PUBLISHED_BATCH),
        ("cuda", {"batch_size": 100}, PUBLISHED_BATCH._replace(batch_size=100)),
        ("cuda", {"learning_rate": 1e-3}, GPU_BATCH._replace(learning_rate=1e-3)),
        ("cuda", {"fine_tune": True}, PUBLISHED_BATCH),
        ("cuda", {"objective": "cider", "start_from": "run"}, PUBLISHED_BATCH),
        ("cuda", {"warmup_epochs": 0.0}, GPU_BATCH._replace(warmup_epochs=0.0)),
        ("cpu", {"batch_size": 512, "learning_rate": 2e-3, "warmup_epochs": 2}, BatchDefaults(512, 2e-3, 2)),
    ],
)
def test_a_gpu_has_a_larger_default_batch_and_the_published_recipe_is_one_flag(device, given, expected):
    options = Train("data", "run", **given).for_device(device)
    assert (options.batch_size, options.learning_rate, options.warmup_epochs) == expected
    assert options.for_device("cpu") == options, "what is decided stays"
