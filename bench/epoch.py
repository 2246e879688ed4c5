"""The time of a training epoch on random captions and features, and its fraction of the device's peak performance.

    python bench/epoch.py --device cuda                                           the size of COCO, on a GPU
    python bench/epoch.py --device cuda --photos 210000 --captions 1050000        the size of AI Challenger
    python bench/epoch.py --photos 200 --captions 1000 --batch-size 50            a small run on a CPU

Features are on the device, captions have the lengths of COCO captions. Batches are planned, read and trained on as in
train.py, with dropout, clipping and Adam, on a GPU with CUDA graphs (--no-cuda-graphs: without). The first epoch
captures the graphs; the second one counts. Floating-point operations are those of the matrix products, counted in one
batch. Peak performance is measured with a large matrix product and a large copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from timeit import timeit

import numpy as np
import torch
import tyro
from decoders import COCO_LENGTHS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from captioning.dataset.batches import Batch, CachedPhotos, epoch_order, plan_batches
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.dataset.prefetch import Prefetch
from captioning.decoders.factory import build_decoder, decoder_arguments
from captioning.encoders.grid import Grid, grid_pooling
from captioning.runtime.device import autocast, pick_device, pick_precision
from captioning.runtime.meter import peak_resident_memory
from captioning.runtime.settings import as_plain_data
from captioning.training.cuda_graphs import CudaGraphRunner
from captioning.training.objectives import CrossEntropy, Loss, LossWeights
from captioning.training.optimizer import make_optimizer
from config import Train
from preprocess.captions import Photo
from preprocess.vocabulary import SPECIAL, Vocabulary


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
    precision: str = "auto"
    cuda_graphs: bool = True


def make_data(bench: Bench, device: torch.device) -> CachedPhotos:
    """Photos with random captions, and random features on the device."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(bench.vocabulary - len(SPECIAL))]
    vocabulary = Vocabulary("en", "whitespace", 1, (*SPECIAL, *words))
    counts = np.array(list(COCO_LENGTHS.values()))
    lengths = rng.choice(list(COCO_LENGTHS), bench.captions, p=counts / counts.sum())
    word_indices = iter(rng.integers(0, len(words), int(lengths.sum())).tolist())
    captions = (tuple(words[i] for i in islice(word_indices, length)) for length in lengths.tolist())
    per_photo = np.diff(np.linspace(0, bench.captions, bench.photos + 1).astype(int))
    photos = (Photo("", str(i), "train", tuple(islice(captions, n))) for i, n in enumerate(per_photo.tolist()))
    features = torch.empty(bench.photos, bench.grid_side**2, bench.channels, dtype=torch.float16, device=device)
    for part in features.split(1024):
        part.normal_().relu_()

    def read(rows: np.ndarray) -> Grid:
        indices = torch.from_numpy(rows).to(device, non_blocking=True)
        return Grid(features.index_select(0, indices), grid_pooling(bench.grid_side, bench.grid_side))

    return CachedPhotos(CaptionDataset(photos, vocabulary, 52), np.arange(bench.photos), read)


def train_two_epochs(bench: Bench, data: CachedPhotos, device: torch.device) -> tuple[list[float], int, int]:
    """The seconds of each epoch, the words of an epoch, and the floating-point operations per word."""
    torch.manual_seed(0)
    precision = pick_precision(bench.precision, device)
    config = Train("data", "run", decoder=bench.decoder)
    sizes = {"vocabulary_size": bench.vocabulary, "channels": bench.channels, **as_plain_data(config)}
    decoder = build_decoder(bench.decoder, decoder_arguments(bench.decoder, sizes)).to(device).train()
    parameters = list(decoder.parameters())
    optimizer = make_optimizer(parameters)
    objective = CrossEntropy(config).to(device)

    def backward(batch: Batch) -> Loss:
        with autocast(device, precision):
            loss = objective(decoder, batch.photos, batch, LossWeights())
        loss.objective.backward()
        return loss._replace(objective=loss.objective.detach())

    runner = None
    if bench.cuda_graphs and device.type == "cuda":
        runner = CudaGraphRunner(backward, parameters, device, precision)

    def train_step(batch: Batch) -> Tensor:
        loss = runner(batch) if runner else backward(batch.to(device, precision))
        nn.utils.clip_grad_value_(parameters, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not runner)
        return loss.objective

    with FlopCounterMode(display=False) as counter:
        first = data[plan_batches(data.split, bench.batch_size, range(len(data.split)))[0]]
        backward(first.to(device, precision))
    optimizer.zero_grad(set_to_none=not runner)
    seconds = []
    for number in range(2):
        plan = plan_batches(data.split, bench.batch_size, epoch_order(len(data.split), 0, number))
        synchronise(device)
        started = time.perf_counter()
        losses = [train_step(batch) for batch in tqdm(Prefetch(data, plan, pin=device.type == "cuda"), unit="update")]
        synchronise(device)
        seconds.append(time.perf_counter() - started)
        print(f"epoch {number + 1}: loss {losses[0].item():.3f} to {losses[-1].item():.3f}; {seconds[-1]:.1f} s")
    words = int(data.split.target_counts().sum())
    return seconds, words, counter.get_total_flops() // len(first.targets)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations per second of a large matrix product, and bytes per second of a large copy."""
    side, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def seconds(function: Callable[[], object]) -> float:
        def run() -> None:
            function()
            synchronise(device)

        run()  # warm-up
        return min(timeit(run, number=1) for _ in range(5))

    return 2 * side**3 / seconds(lambda: a @ a), 2 * length / seconds(lambda: target.copy_(source))


def main(bench: Bench) -> None:
    device = pick_device(bench.device)
    data = make_data(bench, device)
    (_, seconds), words, operations = train_two_epochs(bench, data, device)
    peak_operations, peak_bandwidth = measure_peaks(device, pick_precision(bench.precision, device))
    # At least, per word and in half precision: forward and backward pass read the photo's cells and keys, and the
    # backward pass reads and writes the gradient of the keys.
    elements = bench.grid_side**2 * bench.channels
    num_bytes = words * 2 * (2 * elements + 4 * 196 * Train.attention_size)
    print(
        f"{bench.captions:,} captions of {bench.photos:,} photos, {words:,} words: {seconds:.1f} s, "
        f"{bench.captions / seconds:,.0f} captions/s"
    )
    print(f"{words * operations / seconds / 1e12:.2f} TFLOP/s in matrix products, peak {peak_operations / 1e12:.2f}")
    print(f"{num_bytes / seconds / 1e9:.1f} GB/s for attention, peak {peak_bandwidth / 1e9:.1f}")
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_memory()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{bench.decoder}, batches of {bench.batch_size}; peak memory {memory / 1e9:.1f} GB")
    print(f"{name}, torch {torch.__version__}")


if __name__ == "__main__":
    main(tyro.cli(Bench))
