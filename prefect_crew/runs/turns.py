"""Wait until an earlier turn of a session is over. An uncertain or lost turn blocks the session."""

from __future__ import annotations

import asyncio
import shlex
from contextlib import suppress
from datetime import datetime

from prefect_crew._internal.asyncio_tasks import OwnTask
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.run import render_run
from prefect_crew.client.models import CrewStatus
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import (
    CrewConnectionError,
    CrewError,
    CrewLostError,
    CrewTimeoutError,
    KickoffUncertainError,
    SessionBlockedError,
)
from prefect_crew.records.decision import Caller, Decision, decide
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, utcnow
from prefect_crew.records.sessions import Turn, is_over, record_of, turn_again
from prefect_crew.runs import stop
from prefect_crew.runs.claims import OtherClaim, take_back_shared_id
from prefect_crew.runs.polling import Phases, Watcher, poll
from prefect_crew.runs.run import LiveRun, close_run, read_status
from prefect_crew.runs.wait import end_and_report

LOOK_AGAIN = 2.0
"""Seconds, at most, between two looks at the turn of a row."""


class EarlierTurnError(Exception):
    """An earlier turn of the session is not over. Nothing was sent."""

    def __init__(self, turn: Turn) -> None:
        super().__init__(turn.number)
        self.turn = turn


async def wait_for_turn(
    turn: Turn, crew: Crew, records: RecordStore, *, caller: Caller, policy: WaitPolicy, asked_at: datetime
) -> None:
    """Wait until a turn is over. If its caller died before it could send a kickoff, void its claim.

    This call's limits, errors and cancellation do not touch the run. If nobody has stored the run's end, this call
    does.

    Raises:
        SessionBlockedError: The turn is uncertain or lost, or was in flight for a time limit of the policy (`timeout`,
            `human_timeout`), counted from `asked_at`.
        FlowRunCancelledError: The caller's flow run was cancelled.
        CrewError: The status call of the run failed. Prefect may try again after a
            CrewConnectionError, since nothing was sent.
    """
    claim, bystander = OtherClaim(records), _Bystander(caller)
    text = "Session %r: this call waits for turn %d, run %s."
    run_logger().info(text, turn.session, turn.number, turn.idempotency_key)
    while not is_over(turn, record := await record_of(turn, records)):
        await bystander.check()
        if record is None:
            if (again := await _pause(turn, policy, asked_at)) is None:
                return  # a person has deleted the turn
            turn = again
            continue
        ended = record.phase is RecordPhase.CLAIMED and await records.owner_ended(record)
        decision = decide(record, caller=caller, owner_ended=ended)
        if not await claim.is_settled(decision, record):
            continue
        other = await records.other_holder(record) if decision is Decision.REATTACH else None
        if decision is not Decision.REATTACH or other is not None:
            with suppress(KickoffUncertainError):  # it is about the turn, and the error below is about this call
                if other is not None:
                    await take_back_shared_id(record, records, other)
            key = shlex.quote(turn.idempotency_key)
            raise _blocked(
                turn,
                f"the kickoff of run {turn.idempotency_key!r} is uncertain",
                f"Look at the crew's page, then run: prefect-crew runs resolve {key} --kickoff-id ID, or "
                "--never-started; then run again.",
            )
        run, work = LiveRun(crew, str(record.kickoff_id), record, records=records), OwnTask()
        try:
            await work.run(_watch(run, turn, bystander, Phases(asked_at.timestamp()), policy, work))
        except (CrewLostError, CrewTimeoutError) as error:
            if not is_over(turn, await record_of(turn, records)):
                raise _not_over(turn, record, error) from error


class _Bystander(Watcher):
    """Checks, while a caller waits for its turn, whether the caller's flow run was cancelled."""

    def __init__(self, caller: Caller) -> None:
        self._flow_run_id = caller.flow_run_id

    async def on_status(self, status: CrewStatus) -> None:
        await self.check()

    async def on_error(self, error: CrewError) -> None:
        await self.check()

    async def check(self) -> None:
        """Raise FlowRunCancelledError if the flow run was cancelled."""
        if await stop.is_cancelled(self._flow_run_id):
            raise stop.nothing_started(self._flow_run_id)


async def _watch(
    run: LiveRun, turn: Turn, bystander: _Bystander, phases: Phases, policy: WaitPolicy, work: OwnTask
) -> None:
    """Poll the run of a turn until it has ended, whatever its end is. If nobody has closed it, close it."""
    pause = min(policy.max_interval, stop.LOOK_EVERY)
    record = run.record
    kicked_off_at = None if record is None else record.kicked_off_at
    # `grace` counts from the kickoff of the run, the limits from this call, which may be older.
    late = 0.0 if kicked_off_at is None else max(0.0, kicked_off_at.timestamp() - phases.kicked_off_at)
    changes = {"pending_timeout": None, "max_interval": pause, "grace": policy.grace + late}
    policy = policy.model_copy(update=changes)
    async with run.session:
        with withholding(run.redact_text):
            try:
                status = await poll(
                    lambda: read_status(run),
                    **run.names,
                    policy=policy,
                    phases=phases,
                    watcher=bystander,
                    first_look=True,
                    was_alive=True,
                )
            except CrewConnectionError as error:
                error.sent = False  # of the kickoff, which Prefect may try again
                raise
            record = await record_of(turn, run.records)
            if record is None or is_over(turn, record):
                return
            run.record = record
            end, report = end_and_report(run, status, record.human_seconds)
            with work.uncut():  # after the end, the counters, the span and the event must be written too
                is_closed = await close_run(record, run.records, end, report)
            work.raise_if_cancelled()
            if is_closed:
                await run.artifact.keep(lambda: render_run(run.view(status), run.artifact.earlier))
                await run.records.unlist(record)


async def _pause(turn: Turn, policy: WaitPolicy, asked_at: datetime) -> Turn | None:
    """Pause once for a turn that is a row of a batch whose ledger this call cannot read.

    Return the turn, read again; None if it is gone.

    Raises:
        SessionBlockedError: `policy.timeout` seconds are over since `asked_at`.
    """
    left = float("inf") if policy.timeout is None else policy.timeout - (utcnow() - asked_at).total_seconds()
    if left <= 0:
        raise _blocked(
            turn,
            f"it is row {turn.idempotency_key!r} of a batch and has not ended, and this call has waited for "
            f"{policy.timeout:g} s",
            "Call that batch again, which goes on with the row. If the ledger of the batch is gone, run: "
            f"prefect variable delete {turn.variable}.",
        )
    await asyncio.sleep(min(policy.max_interval, LOOK_AGAIN, left))
    return await turn_again(turn)


def _not_over(turn: Turn, record: RunRecord, error: CrewLostError | CrewTimeoutError) -> SessionBlockedError:
    run_id = shlex.quote(str(record.kickoff_id))
    if isinstance(error, CrewLostError):
        advice = f"To look: prefect-crew runs inspect {run_id}. If the crew's server has forgotten the run: "
        reason = f"run {record.kickoff_id} is lost: it is not known to the server of its crew"
        return _blocked(turn, reason, f"{advice}prefect-crew runs resolve {run_id} --lost.")
    state = error.last_state or "unseen"
    return _blocked(
        turn,
        f"run {record.kickoff_id} is still {state}, and this call has waited for {error.limit:g} s",
        f"Call again to wait on, or stop that run: {stop.cancel_command(record)}.",
    )


def _blocked(turn: Turn, reason: str, advice: str) -> SessionBlockedError:
    return SessionBlockedError(
        session=turn.session, turn=turn.number, run=turn.idempotency_key, reason=reason, advice=advice
    )
