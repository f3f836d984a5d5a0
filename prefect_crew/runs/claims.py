"""Claims of other calls, and what is written about a claim whose kickoff may have left. For starts and for turns."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.telemetry import count_uncertain
from prefect_crew.exceptions import KickoffUncertainError
from prefect_crew.records.budgets import release
from prefect_crew.records.decision import Decision
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord

T = TypeVar("T")
AGAIN = 0.2
"""Seconds after which a claim of another call is read again; each later pause is twice as long, up to 2 s."""


@dataclass
class OtherClaim:
    """Checks whether a call's decision about another call's claim stands. If not, the call reads the claim again.

    The call reads the claim again while the other call may still send the kickoff, once more before it takes the claim
    as uncertain, and after it has voided a claim that the other call gave up.
    """

    records: RecordStore
    delay: float = field(default_factory=lambda: AGAIN)
    read_again: bool = False

    async def is_settled(self, decision: Decision, record: RunRecord) -> bool:
        """Return whether the decision about a record stands. If not, void the claim, or pause: read it again then."""
        if decision is Decision.VOID:
            reason = "the call that claimed it gave it up"
            if await self.records.resolve(record, RecordPhase.NOT_STARTED, reason=reason):
                await release(record)  # the estimates in a permit of this very call
            else:
                await asyncio.sleep(AGAIN)
        elif decision is Decision.CLAIMED_ELSEWHERE:
            await asyncio.sleep(self.delay)
            self.delay = min(self.delay * 2, 2.0)
        elif decision is not Decision.UNCERTAIN or record.phase is not RecordPhase.CLAIMED or self.read_again:
            return True
        # The claim was read before its owner's flow run: it may have become a run in between, so read it again.
        self.read_again = decision is Decision.UNCERTAIN
        return False


def uncertain(record: RunRecord) -> KickoffUncertainError:
    """Emit the event about an uncertain kickoff, once, and return the error."""
    reason = record.reason or "the process that sent it ended before it recorded the answer"
    emit("uncertain", record, once=True, reason=reason)
    return KickoffUncertainError(idempotency_key=record.idempotency_key, reason=reason, sent=record.sent)


async def take_back_shared_id(record: RunRecord, records: RecordStore, other: str) -> NoReturn:
    """Raise KickoffUncertainError, because another record, whose key is `other`, holds the same kickoff id.

    A proxy that caches or deduplicates requests may answer two kickoffs with one id. Only one record keeps that id.
    """
    run = record.kickoff_id
    record.reason = f"the crew's server answered with run {run}, which belongs to idempotency key {other!r}"
    record.phase, record.kickoff_id, record.kicked_off_at = RecordPhase.UNCERTAIN, None, None
    await save(record, records.save)
    count_uncertain(record)
    raise uncertain(record)


def loop_ends(error: BaseException) -> bool:
    """Return whether an error means that the event loop ends, and has cancelled the tasks in which anyio connects.

    If all of these are cancelled, anyio creates an empty group of errors, which raises ValueError.
    """
    task = asyncio.current_task()
    is_own = task is not None and task.cancelling() > 0  # somebody cancelled this task
    return type(error) in (asyncio.CancelledError, ValueError) and not is_own


async def save(record: RunRecord, write: Callable[[RunRecord], Awaitable[T]]) -> T | None:
    """Write a record by a method of its store. Repeat the write if the event loop ends, which cancels tasks only once.

    If the Prefect API fails, log an error with the command that resolves the run, and return None. The record then
    stays a claim, and later calls treat the claim as uncertain and start nothing.
    """
    try:
        try:
            return await write(record)
        except (asyncio.CancelledError, ValueError) as error:
            if not loop_ends(error):
                raise
            return await write(record)
    except PREFECT_ERRORS as error:
        run_logger().error(
            "Run %s is %s%s, and that could not be recorded (%s). Once the Prefect API is back: "
            "prefect-crew runs resolve %s %s",
            record.idempotency_key,
            record.phase,
            f", kickoff id {record.kickoff_id}" if record.kickoff_id else "",
            type(error).__name__,
            shlex.quote(record.idempotency_key),
            f"--kickoff-id {shlex.quote(record.kickoff_id)}" if record.kickoff_id else "--never-started",
        )
        return None
