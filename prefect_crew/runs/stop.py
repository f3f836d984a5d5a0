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
from collections.abc import Awaitable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import contexts_around, flow_run_id, held_flow_run, read_all, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.run import render_run
from prefect_crew.client.models import CrewStatus, StopAnswer, StopOutcome
from prefect_crew.client.redaction import withholding
from prefect_crew.exceptions import CrewError, FlowRunCancelledError, StoreError
from prefect_crew.runs.database import in_store
from prefect_crew.runs.owners import process_is_gone
from prefect_crew.runs.run import CREW_STATES, LiveRun, read_attempt, write_end
from prefect_crew.states import CrewState
from prefect_crew.store import attempts
from prefect_crew.store.decision import Attempt, AttemptState

if TYPE_CHECKING:
    from prefect_crew.runs.keys import RunIdentity

T = TypeVar("T")
LOOK_EVERY = 10.0
"""Seconds between two requests of one process that ask whether its flow run was cancelled."""
LOOK_WITHIN = 5.0
"""Seconds that such a request may take, or a request around a stop: the caller waits for the crew, not for Prefect."""
STOP_WITHIN = 20.0
"""Seconds for all steps after a cancellation: Prefect kills a cancelled process after about 30 s."""
MOST_OPEN = 10_000
"""Runs of one flow run that are looked for."""
PERSON = "a person"
"""The `stop_asked_by` of a stop that somebody asked for: a cancellation, a command, a task."""


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
    return next((str(flow_run.id) for flow_run in await _with_those_above(run_id) if _is_cancelled(flow_run)), None)


def _is_cancelled(flow_run: FlowRun) -> bool:
    state = flow_run.state
    return state is not None and (state.is_cancelling() or state.is_cancelled())


async def _with_those_above(run_id: str | None) -> list[FlowRun]:
    """Return a flow run and those above it. It is empty without a flow run, or if somebody has deleted it."""
    above, at = list[FlowRun](), None if run_id is None else UUID(run_id)
    async with get_client() as client:
        with suppress(ObjectNotFound):
            while at is not None:
                flow_run = await client.read_flow_run(at)
                above.append(flow_run)
                parent = flow_run.parent_task_run_id if flow_run.deployment_id is None else None
                at = None if parent is None else (await client.read_task_run(parent)).flow_run_id
    return above


# The time of the last request about an attempt of a flow run, and its answer. Process-wide: the many waits of one flow
# run share one request, and a flow that goes on after its cancellation starts no further run.
_asked: dict[tuple[str, int], tuple[float, bool]] = {}


def _attempt(run_id: str) -> tuple[str, int]:
    """Return a flow run's id with the number of its attempt: a retry after a cancellation is not cancelled."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    return run_id, flow_run.run_count if flow_run is not None and str(flow_run.id) == run_id else 0


def is_known_cancelled(caller: RunIdentity) -> bool:
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


async def open_runs_of(client: PrefectClient, flow_run: FlowRun) -> list[Attempt]:
    """Return the attempts of a flow run and its subflows that started a run, or may have, and have no end. Without the
    rows of batches: the flow run of a batch stops those itself.

    Raises:
        StoreError, PREFECT_ERRORS: The crew database or the Prefect API cannot be used.
    """
    ids, at = [flow_run.id], 0
    while at < len(ids):  # the subflows, level by level
        parents = FlowRunFilterParentFlowRunId(any_=ids[at:])
        at = len(ids)
        children = await read_all(client.read_flow_runs, flow_run_filter=FlowRunFilter(parent_flow_run_id=parents))
        ids += [child.id for child in children if child.deployment_id is None]  # others run by themselves
    names = [str(id_) for id_ in ids]
    open_attempts = await in_store(attempts.list_attempts, is_in_flight=True, flow_run_ids=names, limit=MOST_OPEN)
    return [a for a in open_attempts if a.batch is None and a.state is not AttemptState.BACKING_OFF]


# Stop the crew


async def stop_run(run: LiveRun, *, is_repeated: bool = True) -> StopAnswer:
    """Ask the crew's server to stop a run, and show the outcome.

    Without `is_repeated`, this sends nothing if somebody has asked before.

    Raises:
        CrewError: The request failed. An ended run, an unknown run and a missing `/stop` are answers, not errors.
    """
    async with run.session:
        await read_attempt(run)
        with withholding(run.redact_text):
            answer = await stop_once(run, is_repeated=is_repeated)
            if answer.outcome is StopOutcome.STOPPED and run.attempt and run.attempt.state in CREW_STATES:
                ended = CrewStatus(kickoff_id=run.kickoff_id, state=CREW_STATES[run.attempt.state])
                await run.artifact.keep(lambda: render_run(run.view(ended), run.artifact.earlier))
    return answer


async def stop_once(run: LiveRun, by: str = PERSON, *, is_repeated: bool = False) -> StopAnswer:
    """Send `/stop` for a run in an open session, once for all callers, and store the outcome. `by`: PERSON, or TIMEOUT.

    If somebody has asked before, this sends nothing, unless it `is_repeated`: then its caller tells the person.
    """
    log, kickoff_id, is_first = run_logger(), run.kickoff_id, True
    try:
        if run.attempt is not None:
            # A crew database that does not answer within seconds must not prevent a stop.
            async with asyncio.timeout(LOOK_WITHIN):
                is_first = await in_store(attempts.ask_to_stop, run.attempt, by)
                run.attempt = await in_store(attempts.get, run.attempt.id) or run.attempt
    except (StoreError, *PREFECT_ERRORS, TimeoutError) as error:
        log.debug("It could not be noted that run %s is asked to stop: %s", kickoff_id, error)
    attempt = run.attempt
    if not (is_first or is_repeated):
        log.info("Crew run %s was asked to stop already, or has ended.", kickoff_id)
        goes_on = attempt is None or attempt.state in (AttemptState.STOPPED, AttemptState.STARTED)
        return StopAnswer(
            kickoff_id=kickoff_id, outcome=StopOutcome.REQUESTED if goes_on else StopOutcome.NOT_STOPPABLE
        )
    answer = await run.session.call(lambda client: client.stop(run.current_id))
    if answer.accepted and not is_repeated:
        log.info("Crew run %s was asked to stop. The answer of the crew's server: %s.", kickoff_id, answer.outcome)
    elif answer.outcome is StopOutcome.UNSUPPORTED and not is_repeated:
        text = "Crew run %s continues at %s: its server has no /stop. Idempotency key %r will have its result."
        log.warning(text, kickoff_id, run.crew.url, run.idempotency_key)
    elif not is_repeated:
        words = f" The crew's server says: {answer.message}" if answer.message else ""
        log.warning("Crew run %s was not stopped: %s.%s", kickoff_id, answer.outcome, words)
    if answer.outcome is StopOutcome.STOPPED and attempt is not None and attempt.state is AttemptState.STARTED:
        # How the run has ended, and its use. Without an answer that stays unknown.
        status = CrewStatus(kickoff_id=kickoff_id, state=CrewState.STOPPED)
        with suppress(CrewError, TimeoutError):
            status = await asyncio.wait_for(run.session.client.status(run.current_id), LOOK_WITHIN)
        if not status.state.ended:
            status = status.model_copy(update={"state": CrewState.STOPPED, "error": None})
        try:
            await write_end(run, status)
        except (StoreError, *PREFECT_ERRORS) as error:
            log.warning("It could not be recorded that run %s was stopped: %s", kickoff_id, error)
    return answer


async def stop_if_asked(run: LiveRun) -> bool:
    """After a cancellation: stop the crew if the flow run was cancelled. Return True if its server accepted that.

    The run has an attempt and an open session. Raises only a further cancellation.
    """
    log, attempt = run_logger(), run.attempt
    if attempt is None:
        return False

    async def stop() -> bool:
        if await cancelled_on_server(flow_run_id()):
            return not await is_of_another(attempt) and (await stop_once(run)).accepted
        log.warning(
            "Crew run %s is left running at %s: its flow run was not cancelled. A call with idempotency key %r waits "
            "for it, and so does a retry of this flow run. To stop the crew, run: %s",
            *(attempt.first_id, attempt.crew_url, attempt.key, cancel_command(attempt)),
        )
        return False

    try:
        # Not `asyncio.timeout`: in a cancelled task, Python before 3.11.3 raises CancelledError for its timeout.
        return await asyncio.wait_for(stop(), STOP_WITHIN)
    except (CrewError, *PREFECT_ERRORS, TimeoutError) as error:
        kind = type(error).__name__
        text = "Crew run %s could not be stopped (%s: %s): it continues at %s."
        log.warning(text, attempt.first_id, kind, error, attempt.crew_url)
        return False


def cancel_command(attempt: Attempt) -> str:
    """Return the command that stops a run."""
    return f"prefect-crew runs cancel {shlex.quote(attempt.first_id or attempt.key)}{crew_option(attempt)}"


def crew_option(attempt: Attempt) -> str:
    """Return the option that names the crew of an attempt by its URL; empty if the crew is stored."""
    is_address = attempt.crew == attempt.crew_url.partition("://")[2].rstrip("/")
    return f" --crew {shlex.quote(attempt.crew_url)}" if is_address else ""


async def is_of_another(attempt: Attempt) -> bool:
    """Return whether another flow run started a run and has not ended. If so, log that the run goes on.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API cannot be reached.
    """
    owner = attempt.flow_run_id
    if owner is None or owner == flow_run_id() or (attempt.process is not None and process_is_gone(attempt.process)):
        return False
    # The state of a subflow does not show that its parent was cancelled, or that its process has ended.
    above = await _with_those_above(owner)
    has_ended = not above or (above[0].state is not None and above[0].state.is_final())
    if has_ended or any(map(_is_cancelled, above)):
        return False
    run_logger().warning(
        "Crew run %s is left running at %s: flow run %s started it and has not ended. To stop the crew, cancel that "
        "flow run, or: %s",
        *(attempt.first_id, attempt.crew_url, owner, cancel_command(attempt)),
    )
    return True
