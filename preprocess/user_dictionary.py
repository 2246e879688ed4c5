"""A user dictionary of jieba: words that it must know, such as names and the terms of a trade.

    云台
    遛狗绳 20
    全地形车 5 n

A line is a word, its frequency if that is known, and a part of speech, which captions do not need. The form is jieba's:
https://github.com/fxsjy/jieba
"""

from __future__ import annotations

import re
from pathlib import Path

from captioning.errors import UserError
from preprocess.content import read_text
from preprocess.tokenizers import normalize

LINE = re.compile(r"(?P<word>.+?)(?:\s+(?P<frequency>[0-9]{1,9}))?(?:\s+[a-z]+)?")


def read_user_dictionary(path: Path) -> tuple[str, ...]:
    """The entries of a user dictionary: "word" or "word frequency", the word as it is in captions, each word once.

    Words that no caption can have, since they hold punctuation or spaces, are left out, which one line says. Raises
    UserError for a file that cannot be read or holds no other words, and for a frequency of 0.
    """
    text, _ = read_text(path)
    entries: dict[str, str] = {}
    impossible = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (match := LINE.fullmatch(line.strip())):
            continue  # an empty line
        frequency = match["frequency"]
        if frequency and not int(frequency):
            raise UserError(f"{path}:{number}: a frequency must be at least 1; correct or remove it")
        word = normalize(match["word"])
        if len(word.split()) == 1:
            entries[word.strip()] = f"{word.strip()} {frequency}" if frequency else word.strip()
        else:
            impossible.append(match["word"])
    if impossible:
        first = ", ".join(word[:20] for word in impossible[:3])
        print(f"{path}: {len(impossible):,} words are left out, since captions lose their punctuation: {first}")
    if not entries:
        raise UserError(f"{path}: holds no words; give a word a line, and its frequency if that is known")
    return tuple(entries.values())
