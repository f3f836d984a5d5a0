"""Stop a crew: when somebody asks for it, and when the flow run that started it is cancelled.

Under Prefect a cancelled flow run, a timeout, a worker that is shut down and Ctrl-C all arrive as one and the same
cancellation of a task. Only the flow run's state on the Prefect server tells the first one from the others, which leave
the crew running: the next call reattaches to the run.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from prefect_crew._internal.prefect_api import flow_run_id, read_all_flow_runs, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.run import claims_shown
from prefect_crew.client import CrewClient
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import CrewStatus, StopAnswer, StopOutcome
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.variables import PAGE, Variable, read_exact, server_time, variables_in
from prefect_crew.runs.limits import Slots
from prefect_crew.runs.run import LiveRun, close_run, cost_of_run, read_record
from prefect_crew.states import CrewState

LOOK_EVERY = 10.0
"""Seconds between two questions of one process whether a flow run of its own has been cancelled."""
LOOK_WITHIN = 5.0
"""Seconds that such a question may take, or one for what a stopped run used: what is waited for is the crew."""
STOP_WITHIN = 20.0
"""Seconds for all that is done on a cancellation: Prefect kills a cancelled process after about 30."""
FIRST_LATEST = 20
"""Variables in the first of these pages: a flow run that began a moment ago needs no more."""
LATEST = 2000
"""Variables that are looked through for a run whose artifact is missing, at most."""
CLOCKS_APART = timedelta(minutes=5)
"""How much the clock of the process that began a flow run may differ from that of the Prefect server."""
_STOP_ASKED = "stop was asked for"
_TAKEN = [f"{_STOP_ASKED}: {outcome}" for outcome in (StopOutcome.STOPPED, StopOutcome.REQUESTED)]
_being_stopped = set[str]()
"""The kickoff ids of runs that this process asks to stop at this moment. Several waits may be for one run."""


def started_by_runner() -> bool:
    """Return whether a Prefect runner or worker started this process, or is it: Ctrl-C shuts that down, no more.

    A worker names itself in its own environment, and in that of the processes that it starts.
    """
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID") or os.environ.get("PREFECT__WORKER_NAME"))


# Is the flow run cancelled?


async def is_cancelled_on_server(run_id: str | None) -> bool:
    """Return whether a flow run, or one around it, is cancelled or being cancelled.

    Whoever cancels a flow means its subflows too, whose own states do not say so.

    Raises:
        PREFECT_ERRORS: The Prefect API is away.
    """
    if run_id is None:
        return False
    at: UUID | None = UUID(run_id)
    async with get_client() as client:
        while at is not None:
            try:
                flow_run = await client.read_flow_run(at)
                if flow_run.state is not None and (flow_run.state.is_cancelling() or flow_run.state.is_cancelled()):
                    return True
                parent = flow_run.parent_task_run_id
                at = None if parent is None else (await client.read_task_run(parent)).flow_run_id
            except ObjectNotFound:
                break
    return False


# When the server was last asked about an attempt of a flow run, and what it said. Process-wide: many waits of one flow
# run ask once together, and a flow that goes on after its cancellation starts nothing more.
_asked: dict[tuple[str, int], tuple[float, bool]] = {}


def _attempt(run_id: str) -> tuple[str, int]:
    """Return a flow run with the number of its attempt: one that is retried after a cancellation starts afresh."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    return run_id, flow_run.run_count if flow_run is not None and str(flow_run.id) == run_id else 0


def is_known_cancelled(run_id: str | None) -> bool:
    """Return whether this process has seen that a flow run was cancelled. Asks nobody."""
    return run_id is not None and _asked.get(_attempt(run_id), (0.0, False))[1]


async def is_cancelled(run_id: str | None, *, every: float | None = None) -> bool:
    """Return whether a flow run was cancelled that no runner would tell of it.

    The server is asked once in so many seconds at most, and not before so many have passed: most waits are shorter. An
    API that is away is not a cancellation.
    """
    if run_id is None or started_by_runner():
        # A runner sends a signal.
        return False
    key, now = _attempt(run_id), time.monotonic()
    at, cancelled = _asked.setdefault(key, (now, False))
    if cancelled or now - at < (LOOK_EVERY if every is None else every):
        return cancelled
    _asked[key] = now, False
    if len(_asked) > 1000:
        del _asked[next(iter(_asked))]
    try:
        async with asyncio.timeout(LOOK_WITHIN):
            cancelled = await is_cancelled_on_server(run_id)
    except (*PREFECT_ERRORS, TimeoutError):
        return False
    _asked[key] = time.monotonic(), cancelled
    return cancelled


# The runs of a flow run


async def open_runs_of(client: PrefectClient, flow_run: FlowRun) -> list[RunRecord]:
    """Return the runs that a flow run or a subflow of it has started, and that have not ended by their records.

    Their artifacts name their claims. A process that was killed before it had made an artifact, and a wait that was
    cancelled before, leave runs without one: their claims are among the Variables that changed last.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    ids, at = [flow_run.id], 0
    while at < len(ids):  # the subflows, level by level
        parents = FlowRunFilterParentFlowRunId(any_=ids[at:])
        at = len(ids)
        children = await read_all_flow_runs(client, flow_run_filter=FlowRunFilter(parent_flow_run_id=parents))
        ids += [child.id for child in children]
    names, owners = await claims_shown(client, ids), {str(id_) for id_ in ids}
    claims = await _latest_claims(client, flow_run.start_time, owners)
    for start in range(0, len(names), PAGE):
        claims += await read_exact(names[start : start + PAGE])
    records, _ = await PrefectRecords().readable([*{claim.id: claim for claim in claims}.values()])
    is_open = (RecordPhase.STARTED, RecordPhase.UNCERTAIN)
    return [record for record in records if record.flow_run_id in owners and record.phase in is_open]


async def _latest_claims(client: PrefectClient, since: datetime | None, owners: Collection[str]) -> list[Variable]:
    """Return the claims of flow runs among the Variables that changed last, back to a moment, `LATEST` at most."""
    claims, offset, limit = list[Variable](), 0, FIRST_LATEST
    while offset < LATEST:
        json = {"limit": limit, "offset": offset, "sort": "UPDATED_DESC"}
        response = await client.request("POST", "/variables/filter", json=json)
        page = variables_in(response)
        claims += [variable for variable in page if variable.fields.get("flow_run_id") in owners]
        until = server_time(response) - timedelta(seconds=page[-1].idle) if page else None
        if len(page) < limit or until is None or (since is not None and until < since - CLOCKS_APART):
            break
        offset, limit = offset + limit, PAGE
    return claims


# Stop the crew


async def stop_run(run: LiveRun, *, idempotency_key: str | None = None) -> StopAnswer:
    """Ask the crew's server to stop a run, and write down what came of it.

    Raises:
        CrewError: The server could not be asked. An ended run, an unknown one and a missing `/stop` are answers.
    """
    kickoff_id = run.kickoff_id
    async with run.session as session:
        await read_record(run, idempotency_key)
        with withholding(run.redact_text):
            answer = await session.call(lambda client: client.stop(kickoff_id))
            if run.record is not None and run.record.phase is RecordPhase.STARTED and answer.accepted:
                try:
                    await close_stopped(session.client, run.crew, run.record, answer, run.records)
                except PREFECT_ERRORS as error:
                    run_logger().warning("It could not be recorded that run %s was stopped: %s", kickoff_id, error)
                if run.record.ended_at is not None:
                    stopped = CrewStatus(kickoff_id=kickoff_id, state=CrewState.STOPPED)
                    await run.artifact.show(lambda: run.view(stopped))
                if run.record.slot is not None:
                    await Slots(run.crew, UUID(run.record.slot)).release()
    return answer


async def stop_if_asked(session: CrewSession, record: RunRecord, records: RecordStore) -> bool:
    """On a cancellation: stop the crew if that was asked for; True if its server took that.

    Raises nothing but a further cancellation.
    """

    async def stop() -> bool:
        if await is_cancelled_on_server(flow_run_id()):
            return not await is_of_another(record, records) and await stop_once(session, record, records)
        log.warning(
            "Crew run %s is left running at %s: its flow run was not cancelled. A call with idempotency key %r waits "
            "for it, and so does a retry of this flow run. To stop the crew: %s",
            record.kickoff_id,
            record.crew_url,
            record.idempotency_key,
            cancel_command(record),
        )
        return False

    log = run_logger()
    try:
        # Not `asyncio.timeout`: in a task that was cancelled, Python before 3.11.3 raises CancelledError for it.
        return await asyncio.wait_for(stop(), STOP_WITHIN)
    except (CrewError, *PREFECT_ERRORS, TimeoutError) as error:
        kind = type(error).__name__
        text = "Crew run %s could not be stopped (%s: %s): it continues at %s."
        log.warning(text, record.kickoff_id, kind, error, record.crew_url)
        return False


def cancel_command(record: RunRecord) -> str:
    """Return the command that stops a run, whoever waits for it."""
    address = record.crew_url.partition("://")[2].rstrip("/")
    crew = f" --crew {shlex.quote(record.crew_url)}" if record.crew == address else ""
    return f"prefect-crew runs cancel {shlex.quote(str(record.kickoff_id))}{crew}"


async def is_of_another(record: RunRecord, records: RecordStore) -> bool:
    """Return whether another flow run, which has not ended, started a run. The run then goes on, and the log says so.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away.
    """
    owner = record.flow_run_id
    if owner is None or owner == flow_run_id() or await records.owner_ended(record):
        return False
    # A subflow says nothing of a cancellation of its parent, nor of the process that it ran in.
    if await is_cancelled_on_server(owner):
        return False
    run_logger().warning(
        "Crew run %s is left running at %s: flow run %s started it and has not ended. To stop the crew, cancel that "
        "flow run, or: %s",
        record.kickoff_id,
        record.crew_url,
        owner,
        cancel_command(record),
    )
    return True


async def stop_once(session: CrewSession, record: RunRecord, records: RecordStore) -> bool:
    """Ask the crew's server to stop a run, once, write down what came of it, and return whether it took that.

    The record says so first: the answer may be lost, and others who wait for the run, and a worker, look there.
    """
    kickoff_id, log = str(record.kickoff_id), run_logger()
    while kickoff_id in _being_stopped:  # noqa: ASYNC110  another wait sends it, maybe in another event loop
        await asyncio.sleep(0.1)
    _being_stopped.add(kickoff_id)
    try:
        before = record.reason
        if (stored := await _note_stop(record, records)) is not None:
            log.info("Crew run %s was asked to stop already, or has ended.", kickoff_id)
            return stored.state is CrewState.STOPPED or stored.reason in _TAKEN
        try:
            answer = await session.call(lambda client: client.stop(kickoff_id))
        except CrewError as error:
            if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
                await _save_reason(before, record, records)
            raise
        if answer.accepted:
            log.info("Crew run %s was asked to stop: %s.", kickoff_id, answer.outcome)
        elif answer.outcome is StopOutcome.UNSUPPORTED:
            text = "Crew run %s continues at %s: its server has no /stop. Idempotency key %r will have its result."
            log.warning(text, kickoff_id, record.crew_url, record.idempotency_key)
        else:
            log.warning("Crew run %s was not stopped: %s. %s", kickoff_id, answer.outcome, answer.message or "")
            await _save_reason(before, record, records)
        await close_stopped(session.client, session.crew, record, answer, records)
        return answer.accepted
    finally:
        _being_stopped.discard(kickoff_id)


async def _note_stop(record: RunRecord, records: RecordStore) -> RunRecord | None:
    """Note that a stop is asked for; return the record as it stands where that was noted before, or the run has ended.

    A Prefect API that is away keeps nobody from stopping a run.
    """

    async def note() -> RunRecord | None:
        attempts = await records.attempts(record.idempotency_key)
        stored = next((attempt for attempt in attempts if attempt.kickoff_id == record.kickoff_id), None)
        if stored is not None and (stored.phase is RecordPhase.ENDED or stop_was_asked(stored)):
            return stored
        record.reason = _STOP_ASKED
        await records.save(record)
        return None

    try:
        return await asyncio.wait_for(note(), LOOK_WITHIN)
    except (*PREFECT_ERRORS, TimeoutError) as error:
        run_logger().debug("That run %s is asked to stop could not be noted: %s", record.kickoff_id, error)
        return None


async def _save_reason(reason: str | None, record: RunRecord, records: RecordStore) -> None:
    record.reason = reason
    with suppress(*PREFECT_ERRORS, TimeoutError):
        await asyncio.wait_for(records.save(record), LOOK_WITHIN)


def stop_was_asked(record: RunRecord) -> bool:
    """Return whether the record of a run that is in flight says that its server was asked to stop it."""
    return record.reason is not None and record.reason.startswith(_STOP_ASKED)


async def close_stopped(
    client: CrewClient, crew: Crew, record: RunRecord, answer: StopAnswer, records: RecordStore
) -> None:
    """Write down what a stop came to: the end where the server says so, else only that it was asked for.

    An end is reported to automations as well, with what the run used: nobody else may look at it.
    """
    if answer.outcome is StopOutcome.NOT_STOPPABLE:
        return  # it has ended: whoever looks sees how, and writes it down
    attempts = await records.attempts(record.idempotency_key)
    stored = next((attempt for attempt in attempts if attempt.kickoff_id == record.kickoff_id), record)
    if stored.phase is RecordPhase.ENDED:
        return  # somebody else saw the end, and what is here is older
    if answer.outcome is not StopOutcome.STOPPED:
        # A row that is stopped with its batch keeps that reason: its wait may write its end at any moment.
        if record.reason is None or stop_was_asked(record):
            record.reason = f"{_STOP_ASKED}: {answer.outcome}"
            await records.save(record)
        return
    status = CrewStatus(kickoff_id=str(record.kickoff_id), state=CrewState.STOPPED)
    with suppress(CrewError, TimeoutError):  # without an answer nobody knows what it used
        status = await asyncio.wait_for(client.status(status.kickoff_id), LOOK_WITHIN)
    used = {"usage": status.usage, "cost": cost_of_run(crew, status)}
    end = {"state": CrewState.STOPPED, "reason": record.reason, **used}
    # Whoever waits for the run may have seen in between how it ended.
    if await close_run(stored, records, end, report={}):
        for name, value in stored.outcome().items():
            setattr(record, name, value)
        await records.unlist(stored)
