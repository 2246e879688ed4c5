"""Each Chinese page keeps step with its English page: headings, commands, tables, numbers and names in code.

Sections are compared in pairs. What must be equal: the levels of the headings; the blocks of code, apart from comments;
the numbers and the names in `code` of every row of a table. What the Chinese text must hold too, in any order: the
numbers and the names in `code` of the English text. It may hold more, since dates and counts are digits there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CHINESE = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs" / "zh-CN").glob("*.md"))]
FIRST_IN_CHINESE = {"README.md": "AI Challenger, step by step"}  # sections that come first there
WHAT_TO_DO = 'Say there what the English page says; see "Translations" in CONTRIBUTING.md.'
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


class Section(NamedTuple):
    level: int
    title: str
    body: str


class Item(NamedTuple):
    """Something that both pages must have: equal keys in equal order, and the text that a message shows."""

    key: object
    text: str


def english_page(chinese: Path) -> Path:
    return ROOT / "README.md" if chinese.parent == ROOT else ROOT / "docs" / chinese.name


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def sections(page: str) -> list[Section]:
    """Return the page's sections; lines of code that begin with # are no headings."""
    found, title, level, body, in_code = [], "", 0, [], False
    for line in page.splitlines(keepends=True):
        in_code ^= line.lstrip().startswith("```")
        heading = None if in_code else re.match(r"(#+) (.*)", line)
        if heading:
            found.append(Section(level, title, "".join(body)))
            level, title, body = len(heading[1]), heading[2], []
        else:
            body.append(line)
    return [*found[1:], Section(level, title, "".join(body))]


def in_chinese_order(found: list[Section], first: str | None) -> list[Section]:
    """Return the English sections with the one called `first` right after the page's title."""
    moved = [section for section in found if section.title == first]
    rest = [section for section in found if section.title != first]
    return [*rest[:1], *moved, *rest[1:]]


def commands(body: str) -> list[Item]:
    """Return the lines of the blocks of code: data as they are, commands joined and without their comments."""
    found = []
    for language, code in FENCE.findall(body):
        if language != "text":
            code = re.sub(r"(?m)(^|\s+)# .*", "", code.replace("\\\n", " "))
            code = "\n".join(" ".join(line.split()) for line in code.splitlines())
        found += [Item((language, line), line) for line in code.splitlines() if line]
    return found


def numbers(text: str) -> list[str]:
    return re.findall(r"(?:(?<!\w)[+-])?\d+(?:[.,]\d+)*(?:e-?\d+)?", text)


def names_in_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def text_and_rows(body: str) -> tuple[str, list[Item]]:
    """Return the text without code and tables, and the rows of the tables. Links within the repository are left out."""
    lines = re.sub(r"\]\((?!http)[^)]*\)", "]", FENCE.sub("", body)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    text = "\n".join(line for line in lines if not line.startswith("|"))
    return text, [Item((sorted(numbers(row)), sorted(names_in_code(row))), row) for row in rows]


def lacking(wanted: list[Item], present: list[Item]) -> Iterator[Item]:
    left = Counter(repr(item.key) for item in present)
    for item in wanted:
        left[repr(item.key)] -= 1
        if left[repr(item.key)] < 0:
            yield item


def equal_items(what: str, pages: tuple[str, str], english: list[Item], chinese: list[Item]) -> Iterator[str]:
    more, less = list(lacking(english, chinese)), list(lacking(chinese, english))
    for item in more:
        yield f"{pages[0]} has {what} that {pages[1]} lacks: {item.text}"
    for item in less:
        yield f"{pages[1]} has {what} that {pages[0]} lacks: {item.text}"
    if not more and not less and [item.key for item in english] != [item.key for item in chinese]:
        moved = next(a.text for a, b in zip(english, chinese, strict=True) if a.key != b.key)
        yield f"{pages[1]} has {what} in another place than {pages[0]}: {moved}"


def differences_of_section(pages: tuple[str, str], english: str, chinese: str) -> Iterator[str]:
    yield from equal_items("a command or a line of an example", pages, commands(english), commands(chinese))
    (text, rows), (chinese_text, chinese_rows) = text_and_rows(english), text_and_rows(chinese)
    yield from equal_items("a table's row with figures or names", pages, rows, chinese_rows)
    for what, find in (("numbers", numbers), ("names in code", names_in_code)):
        wanted, present = ([Item(found, found) for found in find(part)] for part in (text, chinese_text))
        if more := [item.text for item in lacking(wanted, present)]:
            yield f"{pages[0]} has {what} that {pages[1]} lacks, or has fewer times: {', '.join(more)}"


def differences(pages: tuple[str, str], english: str, chinese: str, first: str | None = None) -> list[str]:
    """Return what the Chinese page lacks or has too much, a line each."""
    ours, theirs = in_chinese_order(sections(english), first), sections(chinese)
    if [section.level for section in ours] != [section.level for section in theirs]:
        headings = [[f"{'#' * level} {title}" for level, title, _ in page] for page in (ours, theirs)]
        found = [f"{page} has the headings: {'; '.join(part)}" for page, part in zip(pages, headings, strict=True)]
        return [*found, *differences_of_section(pages, english, chinese)]
    found = []
    for our, their in zip(ours, theirs, strict=True):
        in_section = differences_of_section(pages, f"{our.title}\n{our.body}", f"{their.title}\n{their.body}")
        found += [f'under "{our.title}" ("{their.title}"): {difference}' for difference in in_section]
    return found


@pytest.mark.parametrize("chinese", CHINESE, ids=name)
def test_a_chinese_page_has_the_headings_commands_figures_and_names_of_the_english_page(chinese):
    english = english_page(chinese)
    pages = (name(english), name(chinese))
    texts = (english.read_text("utf-8"), chinese.read_text("utf-8"))
    found = differences(pages, *texts, FIRST_IN_CHINESE.get(name(english)))
    if found:
        pytest.fail("\n".join([*found, WHAT_TO_DO]), pytrace=False)


@pytest.mark.parametrize("chinese", CHINESE, ids=name)
def test_both_pages_begin_with_a_link_to_each_other(chinese):
    english = english_page(chinese)
    for page, other in ((english, chinese), (chinese, english)):
        links = re.findall(r"\]\(([^)]+)\)", "".join(page.read_text("utf-8").splitlines(keepends=True)[:4]))
        assert other in [(page.parent / link).resolve() for link in links], f"{name(page)}: no link to {name(other)}"


PAGE = """# Title
Reads 1,000 photos with `--flag`.
```bash
python train.py data/x \\
    --epochs 3    # a comment
# another
```
| score | 12.3 (`cider`) |
## More
```text
a.jpg#0 # data
```
"""


def test_another_comment_and_more_numbers_are_no_difference():
    chinese = PAGE.replace("a comment", "注释").replace("Reads 1,000 photos", "2026 年读取 1,000 张图片")
    assert PAGE != chinese and not differences(("en", "zh"), PAGE, chinese)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("--epochs 3", "--epochs 4", "en has a command or a line of an example that zh lacks: python train.py"),
        ("a.jpg#0 # data", "a.jpg#0", "en has a command or a line of an example that zh lacks: a.jpg#0 # data"),
        ("12.3", "12.4", "en has a table's row with figures or names that zh lacks: | score | 12.3"),
        ("`cider`", "`bleu`", "en has a table's row with figures or names that zh lacks: | score | 12.3"),
        ("1,000", "1,001", "en has numbers that zh lacks, or has fewer times: 1,000"),
        ("`--flag`", "`--other`", "en has names in code that zh lacks, or has fewer times: --flag"),
        ("## More", "### More", "en has the headings: # Title; ## More"),
        ("## More\n", "", "zh has the headings: # Title"),
    ],
)
def test_a_page_out_of_step_is_told_what_it_lacks(old, new, said):
    found = differences(("en", "zh"), PAGE, PAGE.replace(old, new, 1))
    assert any(said in line for line in found), found


def test_rows_in_another_order_are_named():
    rows, swapped = "# T\n| a | 1 |\n| b | 2 |\n", "# T\n| b | 2 |\n| a | 1 |\n"
    assert "in another place" in differences(("en", "zh"), rows, swapped)[0]


def test_a_section_that_comes_first_in_chinese_is_compared_with_its_own():
    english, chinese = "# T\n## A\n1\n## B\n2\n", "# T\n## 乙\n2\n## 甲\n1\n"
    assert differences(("en", "zh"), english, chinese) and not differences(("en", "zh"), english, chinese, "B")
