"""Many short texts, such as the ids of a data set, without an object for each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence


class StringArray(Sequence[str]):
    """A list of str would take 60 bytes more for each, and again in every worker that looks at them."""

    def __init__(self, texts: Iterable[str] = ()):
        self.block, self.ends = bytearray(), array("q", [0])  # text i is block[ends[i] : ends[i + 1]], as utf-8
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self.block += text.encode("utf-8", "surrogatepass")  # a file's name may be no text
        self.ends.append(len(self.block))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place: int) -> str:
        return self.block[self.ends[place] : self.ends[place + 1]].decode("utf-8", "surrogatepass")
