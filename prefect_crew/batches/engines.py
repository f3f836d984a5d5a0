"""The engine of a batch, put together from its options; and the crew's shared limit, held while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.batches.breaker import Breaker
from prefect_crew.batches.ends import RowEnd
from prefect_crew.batches.engine import Engine
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions
from prefect_crew.batches.pacing import BatchSession
from prefect_crew.batches.retries import RetryRule
from prefect_crew.batches.row_waits import RowWaiter
from prefect_crew.batches.work import EngineOptions
from prefect_crew.crew import CrewSession
from prefect_crew.limits import missing_limit, take_slots

__all__ = ["engine_of", "limited"]


def engine_of(
    session: BatchSession,
    ledger: Ledger,
    options: BatchOptions,
    *,
    on_end: Callable[[RowEnd], Awaitable[None]],
    most: int,
    bought: int,
) -> Engine:
    """Return what runs the rows of a batch in this process.

    Args:
        session: A session for the crew, whose pace is the batch's.
        ledger: Where the records live.
        options: The batch's options.
        on_end: Called with what became of each row.
        most: Runs in flight at once.
        bought: Kickoffs that count against `max_kickoffs` already.
    """
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    return Engine(
        session,
        ledger,
        RowWaiter(
            session,
            ledger,
            options.wait or session.crew.wait,
            learn=options.wait is None,
            webhooks=options.webhooks,
        ),
        EngineOptions(
            max_in_flight=most,
            rule=RetryRule(options.retries, options.retry_failed),
            max_kickoffs=options.max_kickoffs,
            stop_when=options.stop_when,
            output_type=options.output_type,
            meta={**(options.meta or {}), "batch": ledger.batch},
            webhooks=options.webhooks,
        ),
        pace=session.pace,
        breaker=Breaker(options.breaker, options.breaker_pause),
        on_end=on_end,
        flow_run=(None, 0) if flow_run is None else (str(flow_run.id), flow_run.run_count),
        bought=bought,
    )


async def limited(session: CrewSession, options: BatchOptions, stack: AsyncExitStack) -> int:
    """Hold slots of the crew's shared limit for as many rows as are in flight at once; return how many that are.

    Raises:
        ConfigurationError: There is no such limit, or it is smaller than what was asked for.
    """
    crew, chosen = session.crew, options.max_in_flight
    limit = crew.concurrency_limit
    if limit is None:
        return chosen or IN_FLIGHT
    async with get_client() as client:
        try:
            found = await client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            raise missing_limit(crew) from None
    most = chosen or min(IN_FLIGHT, found.limit)
    if most > found.limit:
        raise ConfigurationError(
            f"max_in_flight is {most}, and crew {crew.label} allows {found.limit} runs in flight in all "
            f"(concurrency limit {limit!r}). Give max_in_flight={found.limit} or less."
        )
    slots = await take_slots(crew, most)
    if slots is not None:
        stack.push_async_callback(slots.release)
        await stack.enter_async_context(slots.kept())
    return most
