"""How well JPEG decoding and the CNN overlap: photos/s of each alone, and of an extraction, which does both.

    python bench/extraction.py PHOTOS              a folder of photos, repeated until there are --photos
    python bench/extraction.py PHOTOS --device cuda --photos 20000 --batch-size 256 --compile --nvjpeg
    python bench/extraction.py PHOTOS --decoding-only       CPU time per photo, by Pillow alone and as done now

If the same CPU cores decode and run the CNN, the best possible time of an extraction is the sum of both times, which
is 1 / (1/decode + 1/CNN) photos/s; with a GPU it is the longer of the two. Weights are random: they take the same time.

--decoding-only decodes and resizes in this process, on one core, the two ways in turn. It reports the least CPU time
that each batch took in any round, so other programs on the machine hardly matter, and how much the pixels differ.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from timeit import timeit

import numpy as np
import PIL
import simplejpeg
import torch
import tyro
from extraction_runs import decode_all, encode_all, extract_all
from tyro.conf import Positional

from captioning.encoders.gpu_decoding import check_nvjpeg
from captioning.encoders.images import (
    PILLOW,
    SIMPLEJPEG_AND_TORCH,
    Transform,
    read_photos,
    split_batches,
)
from captioning.encoders.loading import calibrate_batch_norm, load_encoder
from captioning.runtime.device import encoder_precision, pick_device
from preprocess.folders import has_photo_ending


@dataclass(frozen=True)
class Bench:
    folder: Positional[Path]  # of photos
    photos: int = 480
    encoder: str = "resnet101"
    image_size: int = 256
    precision: str = "bfloat16"
    batch_size: int = 32
    workers: int = os.cpu_count() or 1
    nvjpeg: bool = False  # as in extract_features.py
    scaled_decoding: bool = False  # as in extract_features.py
    decoding_only: bool = False  # compare the ways to decode and resize, and do nothing else
    compile: bool = False
    device: str = "auto"
    rounds: int = 3


def main(bench: Bench) -> None:
    files = sorted(path for path in bench.folder.rglob("*") if has_photo_ending(path.name))
    paths = [str(path) for path in itertools.islice(itertools.cycle(files), bench.photos)]
    if bench.decoding_only:
        compare_decoding(bench, paths)
        return
    device = pick_device(bench.device)
    encoder = load_encoder(bench.encoder, "random", bench.image_size)
    encoder.transform = replace(encoder.transform, nvjpeg=bench.nvjpeg, scaled_decoding=bench.scaled_decoding)
    if bench.nvjpeg:
        check_nvjpeg(device)
    # without calibration the features would overflow float16
    calibrate_batch_norm(encoder, paths[:64], bench.batch_size, bench.workers)
    encoder = encoder.to(device).eval().requires_grad_(False)
    precision = encoder_precision(bench.precision, device)
    if bench.compile:
        print(f"--compile took {encoder.compile_for(bench.batch_size, precision):.0f} s")
    plan = split_batches(list(range(len(paths))), bench.batch_size)
    best = {"decode": 0.0, "CNN": 0.0, "extraction": 0.0}
    for _ in range(bench.rounds):
        functions = {
            "decode": lambda: decode_all(encoder, paths, plan, device, bench.workers),
            "CNN": lambda: encode_all(encoder, len(plan), bench.batch_size, precision, device),
            "extraction": lambda: extract_all(encoder, paths, plan, precision, bench.workers),
        }
        for name, function in functions.items():
            best[name] = max(best[name], len(paths) / timeit(function, number=1))
    if device.type == "cpu":
        bound = 1 / (1 / best["decode"] + 1 / best["CNN"])
        formula = "1 / (1/decode + 1/CNN)"
    else:
        bound = min(best["decode"], best["CNN"])
        formula = "the slower of the two"
    for name, rate in best.items():
        print(f"{name:>12}  {rate:8.1f} photos/s")
    print(f"{'upper bound':>12}  {bound:8.1f} photos/s, {formula}")
    print(f"the extraction reaches {best['extraction'] / bound:.0%} of the upper bound")
    print(
        f"{len(files)} photos repeated to {len(paths):,}; {bench.encoder}, {bench.image_size} px, {bench.precision}, "
        f"{bench.workers} workers, {device}{', nvJPEG' * bench.nvjpeg}{', compiled' * bench.compile}, "
        f"torch {torch.__version__}"
    )


def compare_decoding(bench: Bench, paths: list[str]) -> None:
    """Print the CPU time per photo of each way to decode and resize, and the differences of their pixels."""
    torch.set_num_threads(1)
    transforms = [
        Transform(bench.image_size, scaled_decoding=bench.scaled_decoding, decoding=decoding)
        for decoding in (PILLOW, SIMPLEJPEG_AND_TORCH)
    ]
    plan = split_batches(range(len(paths)), bench.batch_size)
    seconds = np.full((2, len(plan)), np.inf)  # the least of all rounds
    greatest, total = 0, 0.0
    for first in [True] + [False] * (bench.rounds - 1):
        for i, indices in enumerate(plan):
            photos = []
            for way, transform in enumerate(transforms):
                start = time.process_time()
                photos.append(read_photos(paths, indices, transform).photos)
                seconds[way, i] = min(seconds[way, i], time.process_time() - start)
            if first:
                difference = (photos[0].short() - photos[1].short()).abs()
                greatest = max(greatest, int(difference.max()))
                total += len(indices) * float(difference.float().mean())
    per_photo = seconds.sum(1) / len(paths)
    for transform, cost in zip(transforms, per_photo, strict=True):
        print(f"{transform.decoding:>16}  {1000 * cost:5.2f} ms of a core per photo, {1 / cost:6.1f} photos/s")
    print(
        f"{per_photo[0] / per_photo[1]:.2f} times as fast; the pixels differ by {total / len(paths):.3f} grey levels "
        f"on average, by {greatest} at most"
    )
    print(
        f"{len(paths)} photos of {bench.folder}, {bench.image_size} px{', scaled' * bench.scaled_decoding}, "
        f"{bench.rounds} rounds; Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}, "
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    )


if __name__ == "__main__":
    main(tyro.cli(Bench))
