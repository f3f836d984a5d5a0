"""Keeping a run's own secrets out of errors: a server may say back what it was sent, in any answer about the run.

The client knows its token and what a call sends. What an earlier call has sent, such as the secret inputs of a run that
is asked for its status, only the caller knows, who says it for as long as it works on the run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["withheld", "withholding"]

_redact: ContextVar[Callable[[str], str] | None] = ContextVar("prefect_crew_withheld", default=None)


@contextmanager
def withholding(redact: Callable[[str], str]) -> Generator[None]:
    """Let errors of the client that are made meanwhile, in this context, tell what `redact` leaves of an answer."""
    reset = _redact.set(redact)
    try:
        yield
    finally:
        _redact.reset(reset)


def withheld(text: str) -> str:
    """Return what an error may tell here of a text that a server has sent."""
    redact = _redact.get()
    return text if redact is None else redact(text)
