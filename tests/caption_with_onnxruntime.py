"""Captions photos with an exported run and without Kantu or torch: onnxruntime, numpy and Pillow are enough.

python -m captioning.export checkpoints/att
python tests/caption_with_onnxruntime.py checkpoints/att/export photo.jpg
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps


class Captioner:
    def __init__(self, folder):
        self.about = json.loads((Path(folder) / "description.json").read_text("utf-8"))
        self.sessions = {
            name: InferenceSession(Path(folder) / part["file"], providers=["CPUExecutionProvider"])
            for name, part in self.about["parts"].items()
        }

    def run(self, name, **inputs):
        """A part's outputs, by name."""
        outputs = [output.name for output in self.sessions[name].get_outputs()]
        return dict(zip(outputs, self.sessions[name].run(None, inputs), strict=True))

    def open(self, path):
        """A photo -> (3, S, S) uint8. Kantu itself also puts what is transparent on white."""
        size = self.about["image_size"]
        with Image.open(path) as photo:
            if self.about["scaled_decoding"]:
                photo.draft(None, (2 * size, 2 * size))
            upright = ImageOps.exif_transpose(photo).convert("RGB")
        return np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)

    def write(self, photos):
        """Photos (B, 3, S, S) -> the words of each: always the likeliest next one, until it is the end."""
        about = self.about
        state = self.run("begin", **self.run("encoder", photos=photos))
        words, written = np.full(len(photos), about["start"]), []
        for _ in range(about["max_length"]):
            after = self.run("step", words=words, **state)
            after["log_probabilities"][..., about["never"]] = -np.inf
            words = after["log_probabilities"].argmax(1)
            written.append(words)
            state |= {name: after["next_" + name] for name in state if name.startswith("row_")}
        return [[*row, about["end"]][: [*row, about["end"]].index(about["end"])] for row in np.stack(written, 1)]

    def caption(self, paths):
        rows = self.write(np.stack([self.open(path) for path in paths]))
        return [self.about["joined_by"].join(self.about["words"][word] for word in row) for row in rows]


if __name__ == "__main__":
    for path, text in zip(sys.argv[2:], Captioner(sys.argv[1]).caption(sys.argv[2:]), strict=True):
        print(f"{path}: {text}")
