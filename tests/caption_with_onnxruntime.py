"""Caption photos with an exported run, without Kantu or torch: needs onnxruntime, numpy and Pillow only.

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
        self.description = json.loads((Path(folder) / "description.json").read_text("utf-8"))
        self.sessions = {
            name: InferenceSession(Path(folder) / part["file"], providers=["CPUExecutionProvider"])
            for name, part in self.description["parts"].items()
        }

    def run(self, name, **inputs):
        """Run encoder, begin or step -> its outputs, by name."""
        outputs = [output.name for output in self.sessions[name].get_outputs()]
        return dict(zip(outputs, self.sessions[name].run(None, inputs), strict=True))

    def open(self, path):
        """A photo -> (3, S, S) uint8. Unlike Kantu, this does not put transparent images on white."""
        size = self.description["image_size"]
        with Image.open(path) as photo:
            if self.description["scaled_decoding"]:
                photo.draft(None, (2 * size, 2 * size))
            upright = ImageOps.exif_transpose(photo).convert("RGB")
        interpolation = Image.Resampling[self.description["interpolation"].upper()]
        return np.asarray(upright.resize((size, size), interpolation)).transpose(2, 0, 1)

    def generate(self, photos):
        """Greedy decoding: photos (B, 3, S, S) uint8 -> the word ids of each, without <start> and <end>."""
        end = self.description["end"]
        state = self.run("begin", **self.run("encoder", photos=photos))
        words = np.full(len(photos), self.description["start"])
        steps = []
        for _ in range(self.description["max_length"]):
            outputs = self.run("step", words=words, **state)
            outputs["log_probabilities"][..., self.description["never"]] = -np.inf
            words = outputs["log_probabilities"].argmax(1)
            steps.append(words)
            state |= {name: outputs["next_" + name] for name in state if name.startswith("row_")}
        captions = [[*caption, end] for caption in np.stack(steps, 1)]
        return [caption[: caption.index(end)] for caption in captions]

    def caption(self, paths):
        captions = self.generate(np.stack([self.open(path) for path in paths]))
        words = self.description["words"]
        return [self.description["joined_by"].join(words[word] for word in caption) for caption in captions]


if __name__ == "__main__":
    for path, text in zip(sys.argv[2:], Captioner(sys.argv[1]).caption(sys.argv[2:]), strict=True):
        print(f"{path}: {text}")
