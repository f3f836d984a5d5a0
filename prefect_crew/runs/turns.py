"""Wait until an earlier turn of a session is over. An uncertain or lost turn blocks the session."""

from __future__ import annotations

import asyncio
import shlex
from dataclasses import replace

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import CrewError, SessionBlockedError
from prefect_crew.records.budgets import release
from prefect_crew.records.decision import Caller, Decision, decide
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord
from prefect_crew.records.sessions import Turn, is_over, record_of
from prefect_crew.runs.options import RunOptions
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.wait import wait_for_run

AGAIN = 0.2
"""Seconds after which the claim of an earlier turn is read again; each later pause is twice as long, up to 2 s."""


class EarlierTurnError(Exception):
    """An earlier turn of the session is not over. Nothing was sent."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn.number)
        self.turn = turn


async def wait_for_turn(
    turn: Turn, crew: Crew, records: RecordStore, *, caller: Caller, wait: WaitPolicy | None = None
) -> None:
    """Wait until a turn is over. If its caller died before it could send a kickoff, void its claim.

    Raises:
        SessionBlockedError: The turn is uncertain or lost, or did not end within the time of the policy.
    """
    delay, read_again = AGAIN, False
    names = turn.session, turn.number, turn.idempotency_key
    run_logger().info("Session %r: this call waits for turn %d, run %s.", *names)
    while not is_over(record := await record_of(turn, records)):
        assert record is not None  # noqa: S101  for type checkers: without a record, the turn is over
        ended = record.phase is RecordPhase.CLAIMED and await records.owner_ended(record)
        decision = decide(record, caller=caller, owner_ended=ended)
        if decision is Decision.REATTACH:
            await _wait_for_end(turn, record, crew, records, wait)
        elif decision is Decision.VOID:
            if await records.resolve(record, RecordPhase.NOT_STARTED, reason="the call that claimed it gave it up"):
                await release(record)
        elif decision is Decision.CLAIMED_ELSEWHERE:
            await asyncio.sleep(delay)
            delay = min(delay * 2, 2.0)
        elif record.phase is RecordPhase.CLAIMED and not read_again:
            # The claim was read before its owner's flow run: it may have become a run in between.
            read_again = True
        else:
            key = shlex.quote(turn.idempotency_key)
            raise _blocked(
                turn,
                f"the kickoff of run {turn.idempotency_key!r} is uncertain",
                f"Look at the crew's page, then run: prefect-crew runs resolve {key} --kickoff-id ID, or "
                "--never-started; then run again.",
            )


async def _wait_for_end(
    turn: Turn, record: RunRecord, crew: Crew, records: RecordStore, wait: WaitPolicy | None
) -> None:
    """Poll the run of a turn until it has ended, whatever its end is."""
    run = LiveRun(replace(crew, on_status=None), str(record.kickoff_id), record, records=records)
    try:
        await wait_for_run(run, RunOptions(idempotency_key=turn.idempotency_key, wait=wait))
    except CrewError as error:
        if is_over(await record_of(turn, records)):
            return
        run_id = shlex.quote(run.kickoff_id)
        advice = f"To look: prefect-crew runs inspect {run_id}. If the crew's server has forgotten the run: "
        raise _blocked(turn, str(error), f"{advice}prefect-crew runs resolve {run_id} --lost.") from error


def _blocked(turn: Turn, reason: str, advice: str) -> SessionBlockedError:
    return SessionBlockedError(
        session=turn.session, turn=turn.number, run=turn.idempotency_key, reason=reason, advice=advice
    )
