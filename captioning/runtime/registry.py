"""Named implementations, imported when they are first used.

A decoder, an encoder family, an objective, a schedule, an annotation reader and a logger are each one entry of a
registry. The command line offers a registry's names as choices, so nothing lists them a second time. An entry may be
given as "module:attribute"; listing the names then imports neither torch nor the implementations.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from captioning.errors import UserError


class Registry(Mapping[str, Any]):
    """name -> implementation. `DECODERS["lstm"]` imports captioning.decoders.lstm and returns its class."""

    def __init__(self, kind: str, entries: Mapping[str, Any]):
        """kind: what an entry is, for error messages. entries: name -> implementation or "module:attribute"."""
        self.kind = kind
        self._entries = dict(entries)

    def register(self, name: str, implementation: Any) -> None:
        """Add an implementation, or replace the one with this name."""
        self._entries[name] = implementation

    def __getitem__(self, name: str) -> Any:
        """Import and return an implementation. Raises UserError if the name is not registered."""
        if name not in self._entries:
            raise UserError(f"{self.kind} {name!r}: must be one of {', '.join(self._entries)}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
