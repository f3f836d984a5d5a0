"""A batch that is cancelled: kickoffs stop at once; what is in flight is stopped, seen to its end, or left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.interrupts import cancel_and_wait, watch_ctrl_c
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.batches.outcomes import STOPPED_WITH_BATCH
from prefect_crew.batches.runner import Engine
from prefect_crew.exceptions import BatchCancelledError, CrewError
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.runs.stop import cancellation_asked, close_stopped, end_as_cancelled, is_cancelled

TICK = 1.0
"""Seconds between two looks at how the batch stands."""
LOOK_EVERY = 2.0
"""Seconds between two looks at whether the flow run was cancelled: each of them may let many kickoffs pass."""
ASK_WITHIN = 5.0
BUY_WITHIN = 10.0
STOP_WITHIN = 12.0
"""Seconds for each step of a cancellation: Prefect kills a cancelled process after about 30."""


async def watched(
    rows: Coroutine[Any, Any, None],
    engine: Engine,
    *,
    name: str,
    on_cancel: str,
    tick: Callable[[], Awaitable[None]],
) -> None:
    """Run all rows; on a cancellation do what `on_cancel` says, if somebody asked for it.

    Args:
        rows: Runs the rows.
        engine: What runs them.
        name: The batch.
        on_cancel: stop, drain or leave.
        tick: Called about once a second.

    Raises:
        BatchCancelledError: This flow run was cancelled, and nobody else ends it.
        asyncio.CancelledError: The task was cancelled. What is in flight was dealt with.
        CrewError: What the rows raise.
    """
    own = flow_run_id()
    work = asyncio.ensure_future(rows)
    look = asyncio.ensure_future(_look(own))
    ticking = asyncio.ensure_future(_tick_on(tick))  # to the end of the rows, also while a cancelled batch drains
    with watch_ctrl_c():
        try:
            await asyncio.wait({work, look, ticking}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return
            if ticking.done():
                ticking.result()
            look.result()
            await _cancelled(engine, work, ticking, name, on_cancel, asked=True)
            if own is not None:
                await end_as_cancelled(own)
            raise BatchCancelledError(name=name)
        except asyncio.CancelledError:
            if not work.done():
                await _cancelled(engine, work, ticking, name, on_cancel, asked=await _asked(own))
            raise
        finally:
            await cancel_and_wait(look, ticking, work)


async def _tick_on(tick: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(TICK)
        await tick()


async def _look(own: str | None) -> None:
    """Return once this flow run is found to be cancelled."""
    while True:
        await asyncio.sleep(TICK)
        if await is_cancelled(own, every=LOOK_EVERY):
            return


async def _asked(own: str | None) -> bool:
    try:
        return await asyncio.wait_for(cancellation_asked(own), ASK_WITHIN)
    except (httpx.HTTPError, PrefectException, TimeoutError):
        return False


async def _cancelled(
    engine: Engine,
    work: asyncio.Future[None],
    ticking: asyncio.Future[None],
    name: str,
    on_cancel: str,
    *,
    asked: bool,
) -> None:
    engine.stop("the batch was cancelled.")
    chosen = on_cancel if asked else "leave"
    if chosen == "drain":
        run_logger().info("%d runs of batch %s are in flight and seen to their end.", engine.in_flight, name)
        done, _ = await asyncio.wait({work, ticking}, return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            one.result()
        return
    # A kickoff that is under way gets its id first: cut off, it would be uncertain.
    await _within(engine.bought_out(), BUY_WITHIN)
    if chosen == "stop":
        if not await _within(_stop_runs(engine), STOP_WITHIN):
            run_logger().warning("Not every run in flight could be stopped in %.0f s.", STOP_WITHIN)
    else:
        run_logger().warning(
            "%d runs of batch %s are left in flight; the same call finds them again.", engine.in_flight, name
        )
    await cancel_and_wait(work)


async def _stop_runs(engine: Engine) -> None:
    """Ask the crew's server once for each run in flight to stop it, and write down what came of it."""
    unheard = 0

    async def stop(record: RunRecord) -> None:
        nonlocal unheard
        try:
            answer = await engine.session.client.stop(str(record.kickoff_id))
            record.reason = STOPPED_WITH_BATCH
            await close_stopped(record, answer, engine.ledger)
            if answer.accepted and record.phase is not RecordPhase.ENDED:
                record.reason = STOPPED_WITH_BATCH
                await engine.ledger.save(record)
            unheard += not answer.accepted
        except CrewError:
            unheard += 1

    records = list(engine.waiting.values())
    await asyncio.gather(*(stop(record) for record in records))
    run_logger().info("%d runs were asked to stop, %d of them to no avail.", len(records), unheard)


async def _within(waiting: Awaitable[None], seconds: float) -> bool:
    try:
        await asyncio.wait_for(waiting, seconds)
    except TimeoutError:
        return False
    return True
