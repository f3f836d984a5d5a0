"""Waiting for something at most so long, without ever losing a cancellation.

Before Python 3.12 `asyncio.wait_for` swallows a cancellation that comes at the moment at which its work is done: it
returns the result instead (read in its source). A wait that Prefect cancels in that moment would then go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["within"]

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives, within so many seconds; where it takes longer, it is cancelled.

    Raises:
        asyncio.TimeoutError: It took longer.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        over = not task.done()
        if over:
            task.cancel()
            await asyncio.wait({task})
    if over:
        raise asyncio.TimeoutError
    return task.result()
