"""The root of all errors, and how they quote others."""

from __future__ import annotations

import copyreg
from typing import Any

__all__ = [
    "EXCERPT",
    "ConfigurationError",
    "CrewError",
    "excerpt",
]

EXCERPT = 500
"""Characters of an error body that an error keeps."""


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """Return `text` on one line, cut to `limit` characters with a note of how much is missing."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit]}… ({len(flat) - limit} more characters)"


class CrewError(Exception):
    """Root of all errors of this package. Catch it to catch everything that can go wrong with a crew."""

    def add(self, text: str) -> None:
        """Say something more after its text."""
        self.args = (f"{self} {text}",)

    def __reduce__(self) -> Any:
        # The subclasses take keyword arguments only, which BaseException's own reduce cannot replay.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigurationError(CrewError, ValueError):
    """What was given cannot be used: a URL, a token, an id, inputs that cannot be sent. Nothing was sent."""
