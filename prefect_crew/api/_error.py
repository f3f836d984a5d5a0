"""The root of all errors, and how they quote others."""

from __future__ import annotations

import copyreg
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

__all__ = [
    "EXCERPT",
    "ConfigurationError",
    "CrewError",
    "InvalidCallError",
    "excerpt",
    "listed_names",
    "one_line",
    "plain",
    "with_guesses",
]

# What could move the cursor, change the title or turn the direction of a line, in text from a crew.
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
} | {ord(char): f"[U+{ord(char):04X}]" for char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}

EXCERPT = 500
"""Characters of an error body that an error keeps."""


def plain(text: str) -> str:
    """Return text from outside fit for a terminal: nothing in it steers the terminal."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Return text from outside as part of one line, of a log or of a terminal."""
    return " ".join(plain(text).split())


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """Return `text` on one line, cut to `limit` characters with a note of how much is missing."""
    flat = one_line(text)
    return flat if len(flat) <= limit else f"{flat[:limit]}… ({len(flat) - limit} more characters)"


_NAMES, _NAME = 30, 80
"""Names that an error lists, and characters of each: a server may name any number of any length."""


def listed_names(names: Sequence[str]) -> str:
    """Return names for people, on one line and not too many."""
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return f"{', '.join(excerpt(name, _NAME) for name in names[:_NAMES])}{more}"


def with_guesses(unknown: Sequence[str], known: Iterable[str]) -> str:
    """Return unknown names for people, each with the known one that is nearest to it, if one is near."""
    near = [name for name in islice(known, 200) if len(name) <= _NAME]  # what it costs grows with all of these

    def guessed(name: str) -> str:
        found = get_close_matches(name, near, n=1) if len(name) <= _NAME else []
        return f"{name} (did you mean {found[0]}?)" if found else name

    return listed_names([guessed(name) for name in unknown[:_NAMES]] + [*unknown[_NAMES:]])


class CrewError(Exception):
    """Root of all errors of this package. Catch it to catch everything that can go wrong with a crew.

    Attributes:
        run_key: The run's key, where the error is about a run that has one.
    """

    run_key: str | None = None

    def __init__(self, *args: Any) -> None:
        # A crew's words stand in most errors, and errors are printed to terminals and logs by others than us.
        super().__init__(*(plain(part) if isinstance(part, str) else part for part in args))

    def add(self, text: str) -> None:
        """Say something more after its text."""
        self.args = (plain(f"{self} {text}"),)

    def about(self, run_key: str, crew: str) -> None:
        """Name the run that it is about, where its text does not."""
        self.run_key = run_key
        if run_key not in str(self):
            self.add(f"This was about run {run_key!r} of crew {crew}.")

    def __reduce__(self) -> Any:
        # The subclasses take keyword arguments only, which BaseException's own reduce cannot replay.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class InvalidCallError(CrewError, RuntimeError):
    """A function or an object was used where, or when, it cannot be: a mistake in the code that calls it."""


class ConfigurationError(CrewError, ValueError):
    """What was given cannot be used: a URL, a token, an id, inputs that cannot be sent. Nothing was sent."""
