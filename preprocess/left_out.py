"""What is left out of a data set: counted by reason in the summary, listed in left_out.txt beside the data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.files import atomic_text
from preprocess.annotations import LeftOut, Record

LEFT_OUT_FILE = "left_out.txt"
WORDLESS = "a caption without words"
HUNDREDTHS = 100  # --allow-missing is proposed in these


def check_left_out(left_out: Sequence[LeftOut], records: Sequence[Record], allow_missing: float) -> None:
    """Raise UserError if more than the fraction `allow_missing` of the photos, or of the captions, is left out.

    What the makers of the data set marked does not count.
    """
    num_captions = sum(len(record.captions) for record in records)
    for kind, used in (("photo", len(records)), ("caption", num_captions)):
        bad = [item for item in left_out if item.kind == kind]
        fraction = len(bad) / max(len(bad) + used, 1)
        if fraction <= allow_missing:
            continue
        enough = math.ceil(HUNDREDTHS * fraction) / HUNDREDTHS
        raise UserError(
            f"{bad[0].where}: {bad[0].reason}; {len(bad):,} of {len(bad) + used:,} {kind}s ({fraction:.1%}) are missing"
            f" or unusable; check the annotations and the image folder, or leave them out with --allow-missing {enough}"
        )


def left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """A line for each reason, with its number."""
    return [f"{number:,} x {reason}" for reason, number in Counter(item.reason for item in left_out).most_common()]


def write_left_out(data: Path, left_out: Sequence[LeftOut]) -> None:
    """Write data/NAME/left_out.txt: a line for each, reason and place. Without any, there is no such file."""
    path = data / LEFT_OUT_FILE
    if not left_out:
        path.unlink(missing_ok=True)
        return
    with atomic_text(path) as file:
        for item in left_out:
            file.write(f"{item.reason}\t{item.where}\n".encode("utf-8", "backslashreplace").decode())
