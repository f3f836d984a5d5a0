"""Waiting for something at most so long, without ever losing a cancellation.

Before Python 3.12 `asyncio.wait_for` swallows a cancellation that comes at the moment at which its work is done: it
returns the result instead (read in its source). A wait that Prefect cancels in that moment would then go on.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["end", "within"]

T = TypeVar("T")

AGAIN = 10.0
"""Seconds after which a task that was cancelled and goes on is cancelled once more."""
FINISHED = 60.0 if sys.version_info < (3, 11) else None
"""The same where a cancelled task may have something to finish, which a second one would cut off: a POST in flight, the
stop of a crew. None: never, where no cancellation is lost."""


async def end(*tasks: asyncio.Future[Any], finishing: bool = False) -> None:
    """Cancel tasks, and return when all have ended, however they did.

    On Python 3.10 a cancellation is lost now and then while a connection is made (measured with httpx 0.27, httpcore
    1.0 and anyio 4.13: about three in a hundred of those that fell into a request): whoever cancels once would wait
    for ever. So what goes on is cancelled once more, after `AGAIN` seconds, or `FINISHED` if it may be `finishing`.
    """
    while left := {task for task in tasks if not task.done()}:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=FINISHED if finishing else AGAIN)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # or asyncio complains that nobody has asked for it


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives, within so many seconds; where it takes longer, it is cancelled.

    Raises:
        TimeoutError: It took longer.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        over = not task.done()
        if over:
            await end(task)
    if over:
        raise TimeoutError
    return task.result()
