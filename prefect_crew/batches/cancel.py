"""A batch that is cancelled: kickoffs stop at once; what is in flight is stopped, waited for, or left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.batches.outcomes import STOPPED_WITH_BATCH
from prefect_crew.batches.runner import Runner
from prefect_crew.exceptions import BatchCancelledError
from prefect_crew.runs.stop import cancellation_asked, is_cancelled, watch_ctrl_c

TICK = 1.0
"""Seconds between two looks at how the batch stands."""
LOOK_EVERY = 2.0
"""Seconds between two looks at whether the flow run was cancelled: each of them may let many kickoffs pass."""
ASK_WITHIN = 5.0
KICK_OFF_WITHIN = 10.0
STOP_WITHIN = 12.0
"""Seconds for each step of a cancellation: Prefect kills a cancelled process after about 30."""


async def run_until_cancelled(
    rows: Coroutine[Any, Any, None],
    runner: Runner,
    *,
    name: str,
    on_cancel: str,
    tick: Callable[[], Awaitable[None]],
) -> None:
    """Run all rows of a batch; on a cancellation do what `on_cancel` says, if somebody asked for it, else leave them.

    `tick` is called about once a second, until the rows have ended.

    Raises:
        BatchCancelledError: This flow run was cancelled, and nobody else ends it.
        asyncio.CancelledError: The task was cancelled. What is in flight was dealt with.
        CrewError: What the rows or a tick raise.
    """
    own = flow_run_id()
    work = asyncio.ensure_future(rows)
    with watch_ctrl_c():
        try:
            await _tick_during(work, tick, own)
            if not work.done():
                await _end(runner, work, tick, name, on_cancel)
                raise BatchCancelledError(name=name)
        except asyncio.CancelledError:
            if not work.done():
                await _end(runner, work, tick, name, on_cancel if await _was_asked(own) else "leave")
            raise
        finally:
            await cancel_and_wait(work)


async def _tick_during(
    work: asyncio.Future[None], tick: Callable[[], Awaitable[None]], own: str | None, *, drains: bool = False
) -> None:
    """Return once the rows have ended, or the flow run is cancelled unless it `drains`; raise what either raises."""
    ticking = asyncio.ensure_future(_tick(tick, own, drains=drains))
    try:
        done, _ = await asyncio.wait((work, ticking), return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            one.result()
    finally:
        await cancel_and_wait(ticking)


async def _tick(tick: Callable[[], Awaitable[None]], own: str | None, *, drains: bool) -> None:
    while drains or not await is_cancelled(own, every=LOOK_EVERY):
        await asyncio.sleep(TICK)
        await tick()


async def _was_asked(own: str | None) -> bool:
    try:
        return await asyncio.wait_for(cancellation_asked(own), ASK_WITHIN)
    except (httpx.HTTPError, PrefectException, TimeoutError):
        return False


async def _end(
    runner: Runner, work: asyncio.Future[None], tick: Callable[[], Awaitable[None]], name: str, on_cancel: str
) -> None:
    runner.stop("the batch was cancelled.")
    if on_cancel == "drain":
        run_logger().info("Batch %s waits for %d runs in flight.", name, len(runner.waiting))
        await _tick_during(work, tick, None, drains=True)
        return
    # A kickoff that is under way gets its id first: cut off, it would be uncertain.
    await _within(runner.throttle.idle(), KICK_OFF_WITHIN)
    if on_cancel == "stop":
        if not await _within(runner.stop_runs(STOPPED_WITH_BATCH), STOP_WITHIN):
            run_logger().warning("Not every run in flight could be stopped in %.0f s.", STOP_WITHIN)
    else:
        run_logger().warning(
            "%d runs of batch %s are left in flight; the same call reattaches to them.", len(runner.waiting), name
        )
    await cancel_and_wait(work)


async def _within(waiting: Awaitable[None], seconds: float) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(waiting, seconds)
        return True
    return False
