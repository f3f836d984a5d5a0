"""A circuit breaker: when everything fails in a row, the batch pauses, tries one row, and gives up after a few."""

from __future__ import annotations

import asyncio

from prefect_crew.logs import run_logger

__all__ = ["Breaker"]

TRIES = 3
"""Rows that are tried, one after another, before the batch gives up."""


class Breaker:
    """Counts failures in a row over the rows of one batch, on one event loop.

    Args:
        limit: Failures in a row, without one row that completed, after which the batch pauses; None never does.
        pause: Seconds of the first pause; each further one is twice as long.
    """

    def __init__(self, limit: int | None, pause: float) -> None:
        self._limit = limit
        self._pause = pause
        self._in_a_row = 0
        self._tries = 0
        self._until: float | None = None
        self._trying = False
        self._changed = asyncio.Event()

    @property
    def open(self) -> bool:
        """Whether it holds rows back."""
        return self._until is not None

    async def admit(self) -> bool:
        """Wait until one more row may be bought; at once while things go well.

        Returns:
            Whether the row is the one that is tried: what becomes of it is told to `failed` or `not_tried`.
        """
        while self._until is not None:
            left = self._until - asyncio.get_running_loop().time()
            if left <= 0 and not self._trying:
                self._trying = True
                return True
            self._changed.clear()
            if left <= 0:
                await self._changed.wait()
            else:
                await _wait(self._changed, left)
        return False

    def not_tried(self) -> None:
        """Say that the row that was to be tried was not bought after all."""
        self._trying = False
        self._changed.set()

    def worked(self) -> None:
        """Note a row that completed."""
        self._in_a_row = self._tries = 0
        if self._until is not None:
            self._until, self._trying = None, False
            run_logger().info("A row has completed: the batch goes on.")
            self._changed.set()

    def failed(self, why: str, *, tried: bool = False) -> str | None:
        """Note a row that did not; `tried` is what `admit` has said of it.

        Returns:
            Why the batch gives up, None if it does not.
        """
        self._in_a_row += 1
        if self._limit is None or self._in_a_row < self._limit:
            return None
        if self._until is not None and not tried:
            return None  # it was in flight when the breaker opened
        if self._tries >= TRIES:
            return f"{self._in_a_row} rows failed in a row, the last one so: {why}"
        pause = self._pause * 2**self._tries
        self._tries += 1
        self._until, self._trying = asyncio.get_running_loop().time() + pause, False
        self._changed.set()
        run_logger().warning(
            "%d rows failed in a row, the last one so: %s The batch pauses for %.0f s, then tries one.",
            self._in_a_row,
            why if why.endswith(".") else f"{why}.",
            pause,
        )
        return None

    def release(self) -> None:
        """Hold nobody back any more: the batch buys nothing more, and those who wait are to see it."""
        self._until = None
        self._changed.set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
