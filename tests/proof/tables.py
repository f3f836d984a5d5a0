"""The outcome tables of faults.md, as cases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Case", "cases"]

PAGE = Path(__file__).with_name("faults.md")
HEAD = re.compile(r"(?:fault|wrong answer) at the (kickoff|inputs|status|answer|stop)")
PLACES = {"answer": "resume"}
WHEN = {"status": "@2"}


@dataclass(frozen=True)
class Case:
    """One fault of one row: where it is, its text, and the row's other cells."""

    place: str
    fault: str
    expected: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place} {self.fault}"

    @property
    def text(self) -> str:
        """The fault as the local crew server reads it: once, at a status call at the second."""
        return f"{self.place}:{self.fault}{WHEN.get(self.place, '@1')}"


@cache
def cases() -> tuple[Case, ...]:
    """Return every case of every table of the page."""
    return tuple(_cases(PAGE.read_text(encoding="utf-8").splitlines()))


def _cases(lines: list[str]) -> Iterator[Case]:
    place = None
    for line in lines:
        if not line.startswith("|"):
            place = None
            continue
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if head := HEAD.fullmatch(first):
            place = PLACES.get(head[1], head[1])
        elif place and not set(first) <= set("- "):
            expected = tuple(cell.strip("`") for cell in cells)
            yield from (Case(place, fault.strip("`"), expected) for fault in first.split())
