"""The word lists of `words.txt`: names, goods, towns, days, and plain English words to copy and quote."""

from __future__ import annotations

from pathlib import Path


def read_word_lists(path: Path) -> dict[str, list[str]]:
    """Lists by name; a line `# name` starts one."""
    lists: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            words = lists[line[2:]] = []
        else:
            words += line.split()
    return lists


LISTS = read_word_lists(Path(__file__).with_name("words.txt"))
FIRST_NAMES, PET_NAMES, TOWNS = LISTS["first names"], LISTS["pet names"], LISTS["towns"]
GOODS, COLOURS, DAYS, WORDS = LISTS["goods"], LISTS["colours"], LISTS["days"], LISTS["plain words"]
