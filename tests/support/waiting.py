"""Wait for what comes in its own time: from asynchronous tests and from others."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def until(condition: Callable[[], Any], what: str = "it comes", *, seconds: float = 30.0) -> Any:
    """Return the first true value of a function or coroutine function; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        is_costly = inspect.isawaitable(value)  # it asks a server
        if value := await value if is_costly else value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} seconds"
        await asyncio.sleep(0.1 if is_costly else 0.02)


def wait_until(
    condition: Callable[[], T | None], what: str = "it comes", *, seconds: float = 60.0, pause: float = 0.02
) -> T:
    """Return the first true value of a function; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} seconds"
        time.sleep(pause)
