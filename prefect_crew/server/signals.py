"""What a server that is a program of its own needs: an end in order at a signal, and its line on standard output."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType
from typing import Any

import uvicorn

__all__ = ["to_stdout", "until_signalled"]


def to_stdout(line: str) -> None:
    """Print a line at once: whoever started this as a process reads it through a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def until_signalled(server: uvicorn.Server) -> Generator[None, None, None]:
    """Stop the server at the first SIGINT or SIGTERM, and at once at the second."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread; whoever runs this elsewhere stops it in another way
        return

    def handle(number: int, frame: FrameType | None) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
