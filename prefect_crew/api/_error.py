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
    """Root of all errors of this package. Catch it to catch everything that can go wrong with a crew.

    Attributes:
        run_key: The run's key, where the error is about a run that has one.
    """

    run_key: str | None = None

    def add(self, text: str) -> None:
        """Say something more after its text."""
        self.args = (f"{self} {text}",)

    def about(self, run_key: str, crew: str) -> None:
        """Name the run that it is about, where its text does not."""
        self.run_key = run_key
        if run_key not in str(self):
            self.add(f"This was about run {run_key!r} of crew {crew}.")

    def __reduce__(self) -> Any:
        # The subclasses take keyword arguments only, which BaseException's own reduce cannot replay.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigurationError(CrewError, ValueError):
    """What was given cannot be used: a URL, a token, an id, inputs that cannot be sent. Nothing was sent."""
