"""The types of the Python interface, for the type checker of `make lint`: nothing here runs."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from typing_extensions import assert_type

from captioning.caption import CaptionResult
from captioning.captioner import Captioner
from captioning.search.options import SearchOptions


def check_types(captioner: Captioner, image: Image.Image, tensor: Tensor, array: np.ndarray, paths: list[str]) -> None:
    assert_type(captioner.caption("photo.jpg"), CaptionResult)
    assert_type(captioner.caption("photo.jpg").text, str)
    assert_type(captioner.caption(Path("photo.jpg"), SearchOptions(beam_size=1)), CaptionResult)
    assert_type(captioner.caption(image), CaptionResult)
    assert_type(captioner.caption(tensor), CaptionResult)
    assert_type(captioner.caption(array), CaptionResult)
    assert_type(captioner.caption(b"the bytes of a photo"), CaptionResult)
    assert_type(captioner.caption(open("photo.jpg", "rb")), CaptionResult)
    assert_type(captioner.caption(path for path in paths), list[CaptionResult])
    assert_type(captioner.caption(paths), list[CaptionResult])
    assert_type(captioner.caption(["photo.jpg", image, tensor]), list[CaptionResult])
    assert_type(captioner.caption((image, tensor)), list[CaptionResult])
