"""Many short strings in two arrays, such as the ids of a data set."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence


class StringArray(Sequence[str]):
    """A sequence of strings, stored as UTF-8 in one bytearray.

    A list of str takes 60 bytes more per string, and again in every forked worker that reads it.
    """

    def __init__(self, strings: Iterable[str] = ()):
        self._data = bytearray()
        self._offsets = array("q", [0])  # string i is _data[_offsets[i] : _offsets[i + 1]]
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        """Add a string at the end."""
        self._data += string.encode("utf-8", "surrogatepass")  # a file's name may contain undecodable bytes
        self._offsets.append(len(self._data))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self._data[self._offsets[index] : self._offsets[index + 1]].decode("utf-8", "surrogatepass")
