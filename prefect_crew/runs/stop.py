"""Stop a crew: when somebody asks for it, and when somebody cancels the flow run that started it.

Under Prefect, a cancelled flow run, a timeout, the shutdown of a worker and Ctrl-C all arrive as the same cancellation
of a task. Only the flow run's state on the Prefect server shows the first case. The other cases leave the crew running:
the next call reattaches to the run.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import AsyncGenerator, Awaitable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import contexts_around, flow_run_id, held_flow_run, read_all, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.run import claims_shown, render_run
from prefect_crew.client import CrewClient
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import CrewStatus, StopAnswer, StopOutcome
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import CrewError, FlowRunCancelledError
from prefect_crew.prices import cost_of
from prefect_crew.records.decision import Caller
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord
from prefect_crew.records.notes import kept_note
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.variables import PAGE, Variable, pages_by_change, read_exact
from prefect_crew.runs.run import LiveRun, close_run, read_record
from prefect_crew.states import CrewState

T = TypeVar("T")
LOOK_EVERY = 10.0
"""Seconds between two requests of one process that ask whether its flow run was cancelled."""
LOOK_WITHIN = 5.0
"""Seconds that such a request may take, or a request around a stop: the caller waits for the crew, not for Prefect."""
STOP_WITHIN = 20.0
"""Seconds for all steps after a cancellation: Prefect kills a cancelled process after about 30 s."""
LATEST = 2000
"""The most Variables that `_latest_claims` reads to find runs without an artifact."""
CLOCKS_APART = timedelta(minutes=5)
"""The most by which the clock of the process that began a flow run may differ from the Prefect server's clock."""
_STOP_ASKED = "stop was asked for"
_TAKEN = [f"{_STOP_ASKED}: {outcome}" for outcome in (StopOutcome.STOPPED, StopOutcome.REQUESTED)]
_being_stopped = set[str]()
"""The kickoff ids of the runs for which this process sends `/stop` now. Several waits may be for one run."""


def started_by_runner() -> bool:
    """Return whether this process is a Prefect worker, or a runner or worker started it: Ctrl-C only shuts it down.

    A worker sets `PREFECT__WORKER_NAME` in its own environment and in the environment of the processes that it starts.
    """
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID") or os.environ.get("PREFECT__WORKER_NAME"))


# Is the flow run cancelled?


async def cancelled_on_server(run_id: str | None) -> str | None:
    """Return the id of a flow run, or of a flow run above it, that is cancelled or cancelling; None if none is.

    A person who cancels a flow run means its subflows too, but their own states do not change. A flow run of a
    deployment runs by itself: Prefect does not cancel it with the flow run that triggered it.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached.
    """
    if run_id is None:
        return None
    at: UUID | None = UUID(run_id)
    async with get_client() as client:
        while at is not None:
            try:
                flow_run = await client.read_flow_run(at)
                if flow_run.state is not None and (flow_run.state.is_cancelling() or flow_run.state.is_cancelled()):
                    return str(at)
                parent = flow_run.parent_task_run_id if flow_run.deployment_id is None else None
                at = None if parent is None else (await client.read_task_run(parent)).flow_run_id
            except ObjectNotFound:
                break
    return None


# The time of the last request about an attempt of a flow run, and its answer. Process-wide: the many waits of one flow
# run share one request, and a flow that goes on after its cancellation starts no further run.
_asked: dict[tuple[str, int], tuple[float, bool]] = {}


def _attempt(run_id: str) -> tuple[str, int]:
    """Return a flow run's id with the number of its attempt: a retry after a cancellation is not cancelled."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    return run_id, flow_run.run_count if flow_run is not None and str(flow_run.id) == run_id else 0


def is_known_cancelled(caller: Caller) -> bool:
    """Return whether this process already knows that a caller's flow run was cancelled or has ended. It makes no
    request."""
    held = held_flow_run.get()
    if held is not None and (held.was_cancelled or held.is_left):
        return True
    # A subflow has an id of its own.
    around = [context.flow_run for context in contexts_around(FlowRunContext)]
    attempts = [(str(flow_run.id), flow_run.run_count) for flow_run in around if flow_run is not None]
    attempts.append((str(caller.flow_run_id), caller.flow_run_count))
    return True in [_asked.get(attempt, (0.0, False))[1] for attempt in attempts]


async def is_cancelled(run_id: str | None, *, every: float | None = None) -> bool:
    """Return whether a flow run was cancelled that has no runner, or whose runner is the crew worker of this process.

    Any other runner sends a signal to its process. Without a runner, this asks the server at most once in `every`
    seconds (default `LOOK_EVERY`), and not earlier than that after the first call, since most waits are shorter. A
    Prefect API that does not answer is not a cancellation.
    """
    held = held_flow_run.get()
    if run_id is not None and held is not None and held.was_cancelled:
        return True
    if run_id is None or started_by_runner():
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
            cancelled_id = await cancelled_on_server(run_id)
    except (*PREFECT_ERRORS, TimeoutError):
        return False
    at = time.monotonic()
    cancelled = cancelled_id is not None or _asked.get(key, (at, False))[1]  # another wait may know it already
    _asked[key] = at, cancelled
    for context in contexts_around(FlowRunContext):
        if (flow_run := context.flow_run) is not None and str(flow_run.id) == cancelled_id:
            _asked[str(flow_run.id), flow_run.run_count] = at, True  # a flow run above starts nothing more either
    return cancelled


async def until_cancelled(run_id: str | None, work: Awaitable[T]) -> T:
    """Return the result of some work. If its flow run is cancelled first, cancel the work.

    Raises:
        FlowRunCancelledError: The flow run was cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_EVERY))[0]:
            if await is_cancelled(run_id) and not task.done():
                raise nothing_started(run_id)
        return await task
    finally:
        await cancel_and_wait(task)


def nothing_started(run_id: str | None) -> FlowRunCancelledError:
    """Return the error of a call that starts no run because its flow run was cancelled."""
    return FlowRunCancelledError(f"Flow run {run_id} was cancelled, so no run was started.")


# The runs of a flow run


async def open_runs_of(client: PrefectClient, flow_run: FlowRun) -> list[RunRecord]:
    """Return the runs that a flow run or its subflows started, or may have started, and whose records have no end.

    The artifacts of runs name their claims. A run has no artifact if its process was killed or its wait cancelled
    before. Then its claim is among the Variables that changed last.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API cannot be reached.
    """
    ids, at = [flow_run.id], 0
    while at < len(ids):  # the subflows, level by level
        parents = FlowRunFilterParentFlowRunId(any_=ids[at:])
        at = len(ids)
        children = await read_all(client.read_flow_runs, flow_run_filter=FlowRunFilter(parent_flow_run_id=parents))
        ids += [child.id for child in children if child.deployment_id is None]  # others run by themselves
    names, owners = await claims_shown(client, ids), {str(id_) for id_ in ids}
    since = flow_run.start_time or flow_run.created
    claims = [] if since is None else await _latest_claims(since, owners)
    for start in range(0, len(names), PAGE):
        claims += await read_exact(names[start : start + PAGE])
    records, _ = await PrefectRecords().readable([*{claim.id: claim for claim in claims}.values()])
    return [record for record in records if record.flow_run_id in owners and _is_open(record)]


def _is_open(record: RunRecord) -> bool:
    # A claim with a permit: its owner was killed while it sent the kickoff, or sends it now.
    is_sent = record.phase is RecordPhase.CLAIMED and record.entries > 0
    return is_sent or record.phase in (RecordPhase.STARTED, RecordPhase.UNCERTAIN)


async def _latest_claims(since: datetime, owners: Collection[str]) -> list[Variable]:
    """Return the claims of some flow runs among the Variables that were changed since a moment, `LATEST` at most."""
    claims, read = list[Variable](), 0
    async with aclosing(pages_by_change(since - CLOCKS_APART)) as pages:
        async for page in pages:
            if read >= LATEST:
                break
            claims += [variable for variable in page if variable.fields.get("flow_run_id") in owners]
            read += len(page)
    return claims


# Stop the crew


async def stop_run(run: LiveRun, *, idempotency_key: str | None = None, is_repeated: bool = True) -> StopAnswer:
    """Ask the crew's server to stop a run, and store the outcome.

    Without `is_repeated`, this sends nothing if the record notes that somebody has asked.

    Raises:
        CrewError: The request failed. An ended run, an unknown run and a missing `/stop` are answers, not errors.
    """
    kickoff_id = run.kickoff_id
    async with run.session as session, _alone(kickoff_id):
        await read_record(run, idempotency_key)
        if not is_repeated and run.record is not None and stop_was_asked(run.record):
            return StopAnswer(kickoff_id=kickoff_id, outcome=StopOutcome.REQUESTED)
        with withholding(run.redact_text):
            newest = run.current_id if run.record is None else await newest_id(run.record, run.records)
            answer = await session.call(lambda client: client.stop(newest))
            if run.record is not None and run.record.phase is RecordPhase.STARTED and answer.accepted:
                try:
                    await close_stopped(session.client, run.crew, run.record, answer, run.records)
                except PREFECT_ERRORS as error:
                    run_logger().warning("It could not be recorded that run %s was stopped: %s", kickoff_id, error)
                if run.record.ended_at is not None:
                    stopped = CrewStatus(kickoff_id=kickoff_id, state=CrewState.STOPPED)
                    await run.artifact.keep(lambda: render_run(run.view(stopped), run.artifact.earlier))
    return answer


async def stop_if_asked(session: CrewSession, record: RunRecord, records: RecordStore) -> bool:
    """After a cancellation: stop the crew if the flow run was cancelled. Return True if its server accepted that.

    Raises only a further cancellation.
    """

    async def stop() -> bool:
        if await cancelled_on_server(flow_run_id()):
            return not await is_of_another(record, records) and await stop_once(session, record, records)
        log.warning(
            "Crew run %s is left running at %s: its flow run was not cancelled. A call with idempotency key %r waits "
            "for it, and so does a retry of this flow run. To stop the crew, run: %s",
            record.kickoff_id,
            record.crew_url,
            record.idempotency_key,
            cancel_command(record),
        )
        return False

    log = run_logger()
    try:
        # Not `asyncio.timeout`: in a cancelled task, Python before 3.11.3 raises CancelledError for its timeout.
        return await asyncio.wait_for(stop(), STOP_WITHIN)
    except (CrewError, *PREFECT_ERRORS, TimeoutError) as error:
        kind = type(error).__name__
        text = "Crew run %s could not be stopped (%s: %s): it continues at %s."
        log.warning(text, record.kickoff_id, kind, error, record.crew_url)
        return False


def cancel_command(record: RunRecord) -> str:
    """Return the command that stops a run."""
    return f"prefect-crew runs cancel {shlex.quote(str(record.kickoff_id))}{crew_option(record)}"


def crew_option(record: RunRecord) -> str:
    """Return the option that names the crew of a record by its URL; empty if the crew is stored."""
    is_address = record.crew == record.crew_url.partition("://")[2].rstrip("/")
    return f" --crew {shlex.quote(record.crew_url)}" if is_address else ""


async def is_of_another(record: RunRecord, records: RecordStore) -> bool:
    """Return whether another flow run started a run and has not ended. If so, log that the run goes on.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API cannot be reached.
    """
    owner = record.flow_run_id
    if owner is None or owner == flow_run_id() or await records.owner_ended(record):
        return False
    # The state of a subflow does not show that its parent was cancelled, or that its process has ended.
    if await cancelled_on_server(owner):
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
    """Send `/stop` for a run, once, store the outcome, and return whether the crew's server accepted it.

    The record notes the stop first: the answer may be lost, and other waits for the run, and a worker, read the record.
    """
    kickoff_id, log = str(record.kickoff_id), run_logger()
    async with _alone(kickoff_id):
        before = record.reason
        if (stored := await _note_stop(record, records)) is not None:
            log.info("Crew run %s was asked to stop already, or has ended.", kickoff_id)
            return stored.state is CrewState.STOPPED or stored.reason in _TAKEN
        newest = await newest_id(record, records)
        try:
            answer = await session.call(lambda client: client.stop(newest))
        except CrewError as error:
            if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
                await _save_reason(before, record, records)
            raise
        if answer.accepted:
            text = "Crew run %s was asked to stop. The answer of the crew's server: %s."
            log.info(text, kickoff_id, answer.outcome)
        elif answer.outcome is StopOutcome.UNSUPPORTED:
            text = "Crew run %s continues at %s: its server has no /stop. Idempotency key %r will have its result."
            log.warning(text, kickoff_id, record.crew_url, record.idempotency_key)
        else:
            words = f" The crew's server says: {answer.message}" if answer.message else ""
            log.warning("Crew run %s was not stopped: %s.%s", kickoff_id, answer.outcome, words)
            await _save_reason(before, record, records)
        await close_stopped(session.client, session.crew, record, answer, records)
        return answer.accepted


async def newest_id(record: RunRecord, records: RecordStore) -> str:
    """Return the id under which a run goes on; its first one if the record's store does not answer within seconds."""
    newest = str(record.kickoff_id)
    try:
        async with asyncio.timeout(LOOK_WITHIN):
            answers = await records.reviews(record)
            newest = next((answer.continued_as for answer in reversed(answers) if answer.continued_as), newest)
            if answers and record.has_webhooks:
                newest = (await kept_note(record, len(answers))).kickoff_id or newest
    except (CrewError, *PREFECT_ERRORS, TimeoutError) as error:
        run_logger().debug("The answers to run %s could not be read: %r", record.kickoff_id, error)
    return newest


@asynccontextmanager
async def _alone(kickoff_id: str) -> AsyncGenerator[None]:
    """Let one caller of this process at a time stop a run."""
    while kickoff_id in _being_stopped:  # noqa: ASYNC110  the other caller may be in another event loop
        await asyncio.sleep(0.1)
    _being_stopped.add(kickoff_id)
    try:
        yield
    finally:
        _being_stopped.discard(kickoff_id)


async def _note_stop(record: RunRecord, records: RecordStore) -> RunRecord | None:
    """Note a `/stop` in the record. Return the stored record if it has such a note already, or the run has ended.

    Return None too if the Prefect API does not answer, which must not prevent a stop.
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
        run_logger().debug("It could not be noted that run %s is asked to stop: %s", record.kickoff_id, error)
        return None


async def _save_reason(reason: str | None, record: RunRecord, records: RecordStore) -> None:
    record.reason = reason
    with suppress(*PREFECT_ERRORS, TimeoutError):
        await asyncio.wait_for(records.save(record), LOOK_WITHIN)


def stop_was_asked(record: RunRecord) -> bool:
    """Return whether the record of a run in flight notes that somebody sent `/stop`."""
    return record.reason is not None and record.reason.startswith(_STOP_ASKED)


async def close_stopped(
    client: CrewClient, crew: Crew, record: RunRecord, answer: StopAnswer, records: RecordStore
) -> None:
    """Store the outcome of a `/stop`: the end if the server says that the run is stopped, else a note.

    The call that stores the end also emits the event, with the run's use: perhaps nobody else waits for the run.
    """
    if answer.outcome is StopOutcome.NOT_STOPPABLE:
        return  # the run has ended: the next poll sees how, and stores that
    attempts = await records.attempts(record.idempotency_key)
    stored = next((attempt for attempt in attempts if attempt.kickoff_id == record.kickoff_id), record)
    if stored.phase is RecordPhase.ENDED:
        return  # somebody else has stored the end, which is newer
    if answer.outcome is not StopOutcome.STOPPED:
        # If a batch stops its row, the record keeps that reason: the row's wait may store its end at any moment.
        if record.reason is None or stop_was_asked(record):
            record.reason = f"{_STOP_ASKED}: {answer.outcome}"
            await records.save(record)
        return
    status = CrewStatus(kickoff_id=answer.kickoff_id, state=CrewState.STOPPED)
    with suppress(CrewError, TimeoutError):  # without an answer, the use of the run stays unknown
        status = await asyncio.wait_for(client.status(status.kickoff_id), LOOK_WITHIN)
    if status.state is CrewState.COMPLETED:
        return  # it ended before the stop: the next poll stores its result
    used = {"usage": status.usage, "cost": cost_of(crew.price, status.usage)}
    end = {"state": CrewState.STOPPED, "reason": record.reason, **used}
    # A wait for the run may have stored the end in between.
    if await close_run(stored, records, end, {}):
        for name, value in stored.outcome().items():
            setattr(record, name, value)
        await records.unlist(stored)
