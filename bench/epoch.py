"""The time of a training epoch on random captions and features, and its fraction of the device's peak performance.

    python bench/epoch.py --device cuda                                           the size of COCO, on a GPU
    python bench/epoch.py --device cuda --photos 210000 --captions 1050000        the size of AI Challenger
    python bench/epoch.py --photos 200 --captions 1000 --batch-size 50            a small run on a CPU

Features are on the device, captions have the lengths of COCO captions. The Trainer of train.py trains; on a GPU with
its fast path (--no-fast-path, --no-cuda-graphs, --no-kernels: without). The first epoch tries the fast path and
captures CUDA graphs; the second one counts. Floating-point operations are those of the matrix products, counted in
one batch. Peak performance is measured with a large matrix product and a large copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from ceilings import peak_bandwidth, peak_operations
from synthetic import coco_lengths, make_photos, make_training_data, make_vocabulary
from trainer_runs import make_trainer, operations_per_word, train_epoch

from captioning.decoders.factory import decoder_arguments
from captioning.runtime.device import pick_device, pick_precision
from captioning.training.options import TrainingOptions


@dataclass(frozen=True)
class Bench:
    photos: int = 113_287
    captions: int = 566_435
    batch_size: int = 512  # captions
    decoder: str = "attention"
    vocabulary: int = 9490
    channels: int = 2048
    grid_side: int = 8  # native cells per side
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    fast_path: bool = True
    cuda_graphs: bool = True
    kernels: bool = True


def main(bench: Bench) -> None:
    device = pick_device(bench.device)
    options = TrainingOptions(
        Path("data"),
        "bench",
        decoder=bench.decoder,
        batch_size=bench.batch_size,
        precision=bench.precision,
        fast_path=bench.fast_path,
        cuda_graphs=bench.cuda_graphs,
        kernels=bench.kernels,
        preview_photos=0,
    )
    rng = np.random.default_rng(0)
    vocabulary = make_vocabulary(bench.vocabulary)
    photos = list(make_photos(rng, vocabulary, bench.photos, coco_lengths(rng, bench.captions)))
    data = make_training_data(photos, photos[:1], vocabulary, bench.grid_side, bench.channels, device)
    trainer = make_trainer(options, vocabulary, data, device)
    for number in (1, 2):
        metrics = train_epoch(trainer)
        print(f"epoch {number}: loss {metrics['train_loss']:.3f}; {metrics['train_seconds']:.1f} s")
    seconds = metrics["train_seconds"]
    words = int(data.train.split.target_counts().sum())
    print(
        f"{bench.captions:,} captions of {bench.photos:,} photos, {words:,} words: {seconds:.1f} s, "
        f"{metrics['captions_per_second']:,.0f} captions/s, waiting {metrics['waiting']:.1%}"
    )
    operations = words * operations_per_word(options, vocabulary, data, device)
    print_fractions(bench, device, seconds, words, operations)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{bench.decoder}, batches of {bench.batch_size}; peak memory {metrics['peak_memory_gb']:.1f} GB")
    print(f"{name}, torch {torch.__version__}")


def print_fractions(bench: Bench, device: torch.device, seconds: float, words: int, operations: float) -> None:
    """Print what an epoch of these seconds, words and operations reaches of the device's peak performance."""
    side, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    peak = peak_operations(device, pick_precision(bench.precision, device), side)
    # At least, per word and in half precision: forward and backward pass read the photo's cells and keys, and the
    # backward pass reads and writes the gradient of the keys.
    elements = bench.grid_side**2 * bench.channels
    attention_size = decoder_arguments("attention", {"attention_size": None})["attention_size"]
    num_bytes = words * 2 * (2 * elements + 4 * 196 * attention_size)
    print(f"{operations / seconds / 1e12:.2f} TFLOP/s in matrix products, peak {peak / 1e12:.2f}")
    print(f"{num_bytes / seconds / 1e9:.1f} GB/s for attention, peak {peak_bandwidth(device, length) / 1e9:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Bench))
