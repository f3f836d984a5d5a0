"""One way to wait for what comes in its own time, and one limit: it costs nothing while things go well."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")

LIMIT = 120.0
"""Seconds that a test waits for anything. Shorter ones fail by chance on a busy machine."""


class TooLateError(Exception):
    """What a test waits for did not come within the limit; on a busy machine that may be chance."""


async def until(condition: Callable[[], Any], what: str = "it comes") -> Any:
    """Return the first true value of a function or coroutine function. Raises TooLateError."""
    deadline = time.monotonic() + LIMIT
    while True:
        value = condition()
        is_costly = inspect.isawaitable(value)  # it asks a server
        if value := await value if is_costly else value:
            return value
        check(deadline, what)
        await asyncio.sleep(0.1 if is_costly else 0.02)


def wait_until(
    condition: Callable[[], T | None], what: str = "it comes", *, seconds: float = LIMIT, pause: float = 0.02
) -> T:
    """Return the first true value of a function. Raises TooLateError."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        check(deadline, what)
        time.sleep(pause)


async def soon(awaitable: Awaitable[T], what: str = "its end") -> T:
    """Return what it returns, cancelled at the limit. Raises TooLateError."""
    limit = asyncio.timeout(LIMIT)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():
            raise TooLateError(f"{what}: not within the limit") from None
        raise


def check(deadline: float, what: str) -> None:
    """Raise TooLateError after the deadline, a time of `time.monotonic`."""
    if time.monotonic() > deadline:
        raise TooLateError(f"{what}: not within the limit")
