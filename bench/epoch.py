"""A whole epoch of made-up captions and features, and how far it is from what the device can do at most.

    python bench/epoch.py --device cuda                                           as large as COCO's, on a GPU
    python bench/epoch.py --device cuda --photos 210000 --captions 1050000        as large as AI Challenger's
    python bench/epoch.py --photos 200 --captions 1000 --batch-size 50            to try it on a CPU

Features are random and resident, captions have COCO's lengths; batches are planned, read and learnt from as train.py
does it, dropout, clipping and Adam included, on a GPU by CUDA graphs (--no-cuda-graphs: without). An epoch before the
one that counts captures them; its time is told, too. The floating-point operations of the matrix products are counted
in one batch; the ceilings are a large matrix product and a large copy, measured here.
"""

from __future__ import annotations

import time
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
from captioning.runtime.meter import most_resident
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
    cells: int = 8  # native cells a side
    device: str = "auto"
    precision: str = "auto"
    cuda_graphs: bool = True


def made_up(bench: Bench, device: torch.device) -> CachedPhotos:
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(bench.vocabulary - len(SPECIAL))]
    vocabulary = Vocabulary("en", "whitespace", 1, (*SPECIAL, *words))
    counts = np.array(list(COCO_LENGTHS.values()))
    lengths = random.choice(list(COCO_LENGTHS), bench.captions, p=counts / counts.sum())
    said = iter(random.integers(0, len(words), int(lengths.sum())).tolist())
    captions = (tuple(words[i] for i in islice(said, length)) for length in lengths.tolist())
    of_each = np.diff(np.linspace(0, bench.captions, bench.photos + 1).astype(int))
    photos = (Photo("", str(i), "train", tuple(islice(captions, n))) for i, n in enumerate(of_each.tolist()))
    features = torch.empty(bench.photos, bench.cells**2, bench.channels, dtype=torch.float16, device=device)
    for part in features.split(1024):
        part.normal_().relu_()

    def read(rows: np.ndarray) -> Grid:
        places = torch.from_numpy(rows).to(device, non_blocking=True)
        return Grid(features.index_select(0, places), grid_pooling(bench.cells, bench.cells))

    return CachedPhotos(CaptionDataset(photos, vocabulary, 52), np.arange(bench.photos), read)


def epoch(bench: Bench, data: CachedPhotos, device: torch.device) -> tuple[list[float], int, int]:
    """-> the seconds of two epochs, their words, and the floating-point operations of a word in matrix products."""
    torch.manual_seed(0)
    precision = pick_precision(bench.precision, device)
    config = Train("data", "run", decoder=bench.decoder)
    sizes = {"vocabulary_size": bench.vocabulary, "channels": bench.channels, **as_plain_data(config)}
    decoder = build_decoder(bench.decoder, decoder_arguments(bench.decoder, sizes)).to(device).train()
    optimizer, parameters = make_optimizer(decoder.parameters()), list(decoder.parameters())
    objective = CrossEntropy(config).to(device)

    def gradients(batch: Batch) -> Loss:
        with autocast(device, precision):
            loss = objective(decoder, batch.photos, batch, LossWeights())
        loss.objective.backward()
        return loss._replace(objective=loss.objective.detach())

    replay = (
        CudaGraphRunner(gradients, parameters, device, precision)
        if bench.cuda_graphs and device.type == "cuda"
        else None
    )

    def learn(batch: Batch) -> Tensor:
        loss = replay(batch) if replay else gradients(batch.to(device, precision))
        nn.utils.clip_grad_value_(parameters, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not replay)
        return loss.objective

    with FlopCounterMode(display=False) as counter:
        first = data[plan_batches(data.split, bench.batch_size, range(len(data.split)))[0]]
        gradients(first.to(device, precision))
    optimizer.zero_grad(set_to_none=not replay)
    seconds = []
    for number in range(2):
        plan = plan_batches(data.split, bench.batch_size, epoch_order(len(data.split), 0, number))
        synchronise(device)
        began = time.perf_counter()
        losses = [learn(batch) for batch in tqdm(Prefetch(data, plan, pin=device.type == "cuda"), unit="update")]
        synchronise(device)
        seconds.append(time.perf_counter() - began)
        print(f"epoch {number + 1}: loss {losses[0].item():.3f}, then {losses[-1].item():.3f}; {seconds[-1]:.1f} s")
    words = int(data.split.target_counts().sum())
    return seconds, words, counter.get_total_flops() // len(first.targets)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """-> floating-point operations a second of a large matrix product, bytes a second of a large copy."""
    side, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    a = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def seconds(work) -> float:
        def done() -> None:
            work()
            synchronise(device)

        done()
        return min(timeit(done, number=1) for _ in range(5))

    return 2 * side**3 / seconds(lambda: a @ a), 2 * length / seconds(lambda: target.copy_(source))


def main(bench: Bench) -> None:
    device = pick_device(bench.device)
    data = made_up(bench, device)
    (_, seconds), words, operations = epoch(bench, data, device)
    most, bandwidth = ceilings(device, pick_precision(bench.precision, device))
    # Of each word at the least, forward and backward: the photo's cells and keys are read twice, the keys' gradient
    # is read and written; in half precision
    cells = bench.cells**2 * bench.channels
    touched = words * 2 * (2 * cells + 4 * 196 * Train.attention_size)
    print(
        f"{bench.captions:,} captions of {bench.photos:,} photos, {words:,} words: {seconds:.1f} s, "
        f"{bench.captions / seconds:,.0f} captions/s"
    )
    print(f"{words * operations / seconds / 1e12:.2f} TFLOP/s in matrix products, of {most / 1e12:.2f} at most")
    print(f"{touched / seconds / 1e9:.1f} GB/s for attention, of {bandwidth / 1e9:.1f} at most")
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else most_resident()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{bench.decoder}, batches of {bench.batch_size}; at most {memory / 1e9:.1f} GB")
    print(f"{name}, torch {torch.__version__}")


if __name__ == "__main__":
    main(tyro.cli(Bench))
