"""Wait for one run under Prefect: `poll` with a record, an artifact, a log and events around it."""

from __future__ import annotations

import asyncio
import shlex
import time
from contextlib import AsyncExitStack
from typing import Any

from prefect_crew._internal.asyncio_tasks import ENDINGS, OwnTask, cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.escape import progress
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.run import render_run
from prefect_crew.artifacts.telemetry import end_run
from prefect_crew.client.models import CrewResult, CrewStatus
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, WaitPolicy, known_version
from prefect_crew.exceptions import (
    CrewError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    FlowRunCancelledError,
)
from prefect_crew.records.model import RecordPhase, RunRecord, StoredResult, utcnow
from prefect_crew.records.resolve import Resolution, resolve_from_webhook
from prefect_crew.runs import stop
from prefect_crew.runs.limits import slot_of
from prefect_crew.runs.listener import Waker, waker_for
from prefect_crew.runs.options import RunOptions
from prefect_crew.runs.polling import NO_ANSWER, Phases, Watcher, poll
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.runs.reviews.reviewer import People
from prefect_crew.runs.run import (
    LiveRun,
    close_run,
    end_of,
    parse_data,
    read_record,
    read_result,
    read_status,
    result_of,
)
from prefect_crew.runs.stop import is_cancelled, is_of_another, stop_if_asked, stop_once
from prefect_crew.states import CrewState

NOTED_WITHIN = 5.0
"""Seconds for which a wait, at its end, lets a note about people's time be saved."""
NOT_SHOWN = "not shown"
"""The error, in the record and the event, of a run whose crew has `show="none"`."""
SHOW_EVERY = 5.0
"""Seconds, at least, between two updates of the artifact of a run that goes on."""


NO_WEBHOOKS = (
    "hosted crews tell of their questions by webhook only, and this run has no webhooks to a receiver of ours "
    "(PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL)."
)


async def wait_for_run(run: LiveRun, options: RunOptions | None = None) -> CrewResult[Any]:
    """Wait until a run has ended and return its result. Raises the errors of `wait_for_crew`.

    The first wait after the kickoff has the record already; a later wait reads it.
    """
    work = OwnTask()
    return await work.run(_wait_for_run(run, options or RunOptions(), work))


async def _wait_for_run(run: LiveRun, options: RunOptions, work: OwnTask) -> CrewResult[Any]:
    async with run.session:
        if not run.is_fresh:
            # The key in the options may be a template; the record has the rendered key.
            await read_record(run, run.idempotency_key or options.idempotency_key)
        is_started = run.record is not None and run.record.phase is RecordPhase.STARTED
        if options.review is not None and is_started and not (run.record and run.record.has_webhooks):
            run_logger().info("Crew run %s: %s", run.kickoff_id, NO_WEBHOOKS)
        waiting = _result(_Waiter(run, options.wait or run.crew.wait, options.review, work))
        # No variable holds the result: error reporters show the local variables of all frames.
        return parse_data(await waiting, options.output_type, run=run)


async def _result(waiter: _Waiter) -> CrewResult:
    """Wait for the run and return its result."""
    run = waiter.run
    with withholding(run.redact_text):
        if run.record is not None and run.record.phase is RecordPhase.ENDED:
            run.is_fresh = False
            if waiter.own is not None:
                waiter.meet_people()
            try:
                return await read_result(run)
            finally:
                if waiter.people is not None:
                    await waiter.people.aclose(ended=True)
        slots = await slot_of(run.crew, run.record) if run.crew.concurrency_limit else None
        if slots is None:
            return await waiter.wait()
        async with slots.kept():
            try:
                return await waiter.wait()
            finally:
                has_ended = waiter.last is not None and waiter.last.state.ended
                # The caller that stores the end releases a lease that the record names.
                if has_ended and (run.record is None or run.record.slot != str(slots.lease)):
                    await slots.release()


def end_and_report(run: LiveRun, status: CrewStatus, human: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the end of a run and the payload of its event, for `close_run`, masked; `human` as in `end_of`."""
    result = None
    if status.state is CrewState.COMPLETED and run.show == "full":
        result = StoredResult.of(status.result())
        if run.redact.hides(result.model_dump(mode="json")):
            result = None
    shown = NOT_SHOWN if status.error and run.show == "none" else run.redact_text(status.error or "")
    error = shown[:500] or None
    end = end_of(run.crew, status, human, error, result)
    return end, {"error": error, "execution_time": status.execution_time}


class _CancelledOnServerError(Exception):
    """This flow run was cancelled, and it has no runner that would send a signal."""


class _Waiter(Watcher):
    """One wait for one run: it handles each status, and the end."""

    def __init__(self, run: LiveRun, policy: WaitPolicy, review: ReviewChoice | None, work: OwnTask) -> None:
        self.run, self.policy, self.work = run, policy, work
        self.review: ReviewChoice | None = review
        self.log = run_logger()
        self.own = flow_run_id()
        self.phases = Phases.of(run.record)
        self.last: CrewStatus | None = None
        self.waker: Waker | None = None
        self.people: People | None = None
        self._noting: asyncio.Task[None] | None = None
        self._in_trouble = self._has_stopped = False
        self._is_stale = False
        self._showing: asyncio.Task[None] | None = None
        self._is_looking = False
        # If this process has kicked the run off, its artifact was shown just now.
        self._shown_at = time.monotonic() if run.owned else 0.0

    def meet_people(self, *, asked: bool = False) -> None:
        """Create `people` if the run has a question, or may have one. Most runs never ask.

        With `review="form"` at once: an earlier attempt of the flow run may have left a form.
        """
        if asked or self.review == "form" or self.phases.human_seconds or self.phases.human_since:
            self.people = self.people or People(
                self.run, self.policy, self.review, stop=self._stop_late, waker=self.waker
            )

    async def wait(self) -> CrewResult:
        """Wait until the run has ended, and return its result."""
        run, record, ended = self.run, self.run.record, False
        async with AsyncExitStack() as stack:
            if record is not None and record.has_webhooks:
                self.waker = await stack.enter_async_context(waker_for(record.idempotency_key, run.crew.url))
            self.meet_people()
            if run.artifact.is_new:
                # Concurrently with the wait. If the process dies and somebody cancels the flow run, the worker finds
                # the run by its artifact.
                self._show_beside()
            run.is_fresh = False  # from here on, this wait stops the crew of a cancelled flow run
            try:
                status = await poll(
                    lambda: read_status(run),
                    **run.names,
                    policy=self.policy,
                    phases=self.phases,
                    watcher=self,
                    first_look=not run.owned,
                    was_alive=record is not None and not run.owned,
                )
                ended = True
                status = status if self.waker is None else await self.waker.with_usage(status, run.current_id)
            except ENDINGS:
                await self._end_showing()  # the request may still be queued
                await self._stop_if_asked()
                raise
            except _CancelledOnServerError:
                work = OwnTask()
                with work.uncut():  # a crew worker cancels the task at the same moment
                    error = await work.run(self._after_cancellation(), within=stop.STOP_WITHIN)
                work.raise_if_cancelled()
                raise error from None
            except CrewTimeoutError as error:
                if record is not None:
                    emit("timed_out", record, phase=error.phase, limit=error.limit)
                await self._show_unless_closed(str(error))
                raise
            except CrewLostError as error:
                if record is not None:
                    emit("lost", record, once=True)
                    end_run(record.model_copy(update={"state": CrewState.UNKNOWN, "ended_at": utcnow()}))
                lost = CrewStatus(kickoff_id=run.kickoff_id, state=CrewState.UNKNOWN)
                await self._show(lost, note=str(error))
                raise
            except NO_ANSWER as error:
                error.add(self._once_it_answers())
                # The server's answer may contain any text of the crew.
                bare = f"The status call gives no answer. {self._once_it_answers()}"
                await self._show_unless_closed(str(error) if run.show == "full" else bare)
                raise
            finally:
                await self._end_noting(NOTED_WITHIN)
                if self.people is not None:
                    await self.people.aclose(ended=ended)
                if not ended:
                    await self._end_showing()
        self.log.info("Crew run %s %s.", run.kickoff_id, status.state)
        await self._close(status)
        return result_of(run, status)

    # The methods that `poll` calls

    async def on_status(self, status: CrewStatus) -> None:
        run, before, self.last = self.run, self.last, status
        run.notify(status)
        if run.record is None and status.idempotency_key is not None and (before is None or not before.idempotency_key):
            await self._resolve(status.idempotency_key)
        is_new_state = before is None or before.state is not status.state
        is_new_task = status.current_task is not None and (before is None or before.current_task != status.current_task)
        if self._in_trouble:
            self._in_trouble = False
            self.log.info("Crew run %s: the status call answers again.", run.kickoff_id)
        if not status.known_state and (before is None or before.raw_state != status.raw_state):
            self.log.warning(
                "Crew run %s has the state %r, which is not documented and counts as running.",
                run.kickoff_id,
                run.redact_name(status.raw_state or ""),
            )
        if is_new_task:
            task = "" if run.show == "none" or run.is_blind else run.redact(str(status.current_task))[:200]
            self.log.info("Crew run %s: %s%s", run.kickoff_id, task, progress(status))
        self.meet_people(asked=status.state is CrewState.WAITING)
        is_asked = self.people is not None and await self.people.see_status(status)
        if status.state.ended:
            return
        if is_new_state or is_new_task or (before is not None and before.progress != status.progress):
            self._is_stale = True
        if is_asked:
            await self._show()
        elif self._is_stale and time.monotonic() - self._shown_at >= SHOW_EVERY:
            self._show_beside()
        if self.people is not None:
            await self.people.answer()
        if await is_cancelled(self.own):
            raise _CancelledOnServerError

    async def _resolve(self, key: str) -> None:
        """Resolve the uncertain kickoff of the key that a status names: then this is the run of that key."""

        async def crew_of(record: RunRecord) -> Crew | None:
            return self.run.crew if record.crew_url == self.run.crew.url else None

        run = self.run
        try:
            outcome = await resolve_from_webhook(key, run.kickoff_id, run.records, said_key=key, load=crew_of)
            if outcome is Resolution.RESOLVED:
                await read_record(run, key)
                self.log.info("Idempotency key %s is resolved: its kickoff started run %s.", key, run.kickoff_id)
        except (*PREFECT_ERRORS, CrewError) as error:
            self.log.debug("It could not be looked whether key %s is uncertain: %r", key, error)

    async def on_human_wait(self, phases: Phases) -> None:
        record = self.run.record
        if record is None:
            return
        phases.note_in(record)
        if phases.human_since is None:
            emit("resumed", record)
        # Concurrently with the polls: if the Prefect API does not answer, a save is repeated for minutes.
        await self._end_noting(0.0)
        self._noting = asyncio.create_task(self._note(record))

    async def _note(self, record: RunRecord) -> None:
        try:
            if self.run.owned or await self._closed() is None:
                await self.run.records.save(record)
        except PREFECT_ERRORS as error:
            self.log.warning("The time of run %s with people could not be recorded: %s", self.run.kickoff_id, error)

    async def _end_noting(self, within: float) -> None:
        """Let the note about people's time be saved for `within` seconds, then cancel it: the record changes next."""
        noting, self._noting = self._noting, None
        if noting is not None:
            await asyncio.wait({noting}, timeout=within)
            await cancel_and_wait(noting)

    async def on_unknown(self, seconds: float) -> None:
        self.log.warning(
            "Crew run %s is not known to its server now. It is polled for %g s: a hosted crew that waits for a person "
            "looks the same.",
            self.run.kickoff_id,
            seconds,
        )

    async def on_error(self, error: CrewError) -> None:
        if not self._in_trouble:
            self._in_trouble = True
            self.log.warning("%s The run may be fine; it is polled again.", self.run.redact(str(error)))
        if self._is_stale and time.monotonic() - self._shown_at >= SHOW_EVERY:
            self._show_beside()
        if await is_cancelled(self.own):
            raise _CancelledOnServerError

    async def pause(self, seconds: float) -> bool:
        """Pause between two status calls, and check during a long pause whether the flow run was cancelled. Return True
        if there is news."""
        pause = super().pause if self.waker is None else self.waker.pause
        pausing = pause(seconds) if self.people is None else self.people.pause(pause, seconds)
        if seconds <= stop.LOOK_EVERY or self.own is None:
            return await pausing
        try:
            return await stop.until_cancelled(self.own, pausing)
        except FlowRunCancelledError:
            raise _CancelledOnServerError from None

    def next_pause(self, delay: float) -> float:
        return delay if self.people is None else self.people.next_pause(delay)

    def has_answered(self) -> bool:
        return self.people is not None and self.people.has_answered()

    async def more_time(self) -> float:
        return 0.0 if self.people is None else await self.people.more_time()

    async def stop(self, phase: str) -> bool:
        return self.policy.stops(phase) and await self._stop_late()

    # The end

    async def _stop_late(self) -> bool:
        """Stop a run after its time limit. Return False if another flow run started it, or the stop failed."""
        run, record = self.run, self.run.record
        await self._end_noting(NOTED_WITHIN)
        try:
            if record is not None and await is_of_another(record, self.run.records):
                return False
            self._has_stopped = True
            if record is not None:
                return await stop_once(self.run.session, record, self.run.records)
            return (await self.run.session.call(lambda client: client.stop(run.current_id))).accepted
        except (CrewError, *PREFECT_ERRORS) as error:
            self.log.warning("Crew run %s could not be stopped: %s", run.kickoff_id, run.redact(str(error)))
            return False

    async def _stop_if_asked(self) -> bool:
        """Stop the crew if a person cancelled the flow run, and show that. Return True if its server accepted it."""
        if self.run.is_unread:
            await read_record(self.run)
        record = self.run.record
        if record is None or self._has_stopped:  # /stop is sent once
            return False
        await self._end_noting(NOTED_WITHIN)
        is_taken = await stop_if_asked(self.run.session, record, self.run.records)
        if is_taken and record.phase is RecordPhase.ENDED:
            await self._show(CrewStatus(kickoff_id=self.run.kickoff_id, state=CrewState.STOPPED))
        return is_taken

    async def _close(self, status: CrewStatus) -> None:
        """Store the end, and show it if this wait closes the run or has started it."""
        run, is_closed = self.run, False
        if run.is_unread:  # the Prefect API did not answer when the wait began
            await read_record(run)
        record = run.record
        if record is not None and record.phase is not RecordPhase.ENDED:
            if run.owned and record.kicked_off_at is not None:  # a look since then is newer than that of the claim
                version = known_version(run.crew.url, since=record.kicked_off_at)
                record.crew_version = version or record.crew_version
            end, report = end_and_report(run, status, self.phases.human_seconds)
            try:
                with self.work.uncut():  # after the end, the counters, the span and the event must be written too
                    is_closed = await close_run(record, run.records, end, report)
            except (*PREFECT_ERRORS, CrewError) as problem:
                self.log.warning("The end of run %s could not be recorded: %s", run.kickoff_id, problem)
                emit(str(status.state), record, once=True, state=str(status.state), **report)
            else:
                if not (is_closed or run.owned):
                    return
            self.work.raise_if_cancelled()
        await self._show(status)
        if record is not None and is_closed:  # after the artifact, which people look at first
            await run.records.unlist(record)

    async def _closed(self) -> RunRecord | None:
        """Read the record again. Return it if somebody else has closed it, else None."""
        if self.run.record is None:
            return None
        try:
            attempts = await self.run.records.attempts(self.run.record.idempotency_key)
        except PREFECT_ERRORS:
            return None
        ended = (attempt for attempt in attempts if attempt.phase is RecordPhase.ENDED)
        return next((attempt for attempt in ended if attempt.kickoff_id == self.run.kickoff_id), None)

    async def _after_cancellation(self) -> CrewError:
        """Stop the crew, unless another flow run, which has not ended, started the run. Return the error to raise.

        The Prefect server itself ends the flow run, which is Cancelling, some minutes later.
        """
        run = self.run
        if await self._stop_if_asked():
            return CrewStoppedError(**run.names)
        return FlowRunCancelledError(
            f"The flow run was cancelled while it waited for run {run.kickoff_id} of crew {run.crew.label}, which "
            f"continues at {run.crew.url}. See what it does: prefect-crew runs inspect {shlex.quote(run.kickoff_id)}."
        )

    async def _show_unless_closed(self, note: str) -> None:
        """Show in the artifact that this wait has given up, unless another wait has stored the end."""
        if self.run.owned or await self._closed() is None:
            await self._show(note=note)

    def _show_beside(self) -> None:
        """Update the artifact concurrently with the wait: the polls go on while the request waits for its turn."""
        if self._showing is None or self._showing.done():
            self._showing = asyncio.create_task(self._show())

    async def _end_showing(self) -> None:
        if self._showing is not None:
            await cancel_and_wait(self._showing)

    async def _show(self, status: CrewStatus | None = None, *, note: str | None = None) -> None:
        """Update the artifact to this status, or to the last one at the moment at which the request is sent."""
        if (showing := self._showing) is not None and showing is not asyncio.current_task():
            # The other request is still queued: this one creates the artifact. No end waits for a look at the version.
            if self.run.artifact.is_new or self._is_looking:
                await cancel_and_wait(showing)
            await asyncio.wait({showing})  # otherwise two requests would create the artifact
        notes, to_do = ([], []) if self.people is None else self.people.notes
        notes += [note] if note else []
        answers = () if self.people is None else self.people.answers

        def text() -> str:
            self._shown_at, self._is_stale = time.monotonic(), False
            redacted = [self.run.redact(text) for text in notes]
            view = self.run.view(status or self.last, notes=redacted, to_do=to_do, reviews=answers)
            return render_run(view, self.run.artifact.earlier)

        is_first = self.run.artifact.id is None
        await self.run.artifact.keep(text)
        if self.run.artifact.id is None:  # the Prefect API refused it or did not answer
            self._is_stale = True
        last = status or self.last
        has_ended = last is not None and last.state.ended
        if is_first and self.run.artifact.id is not None and not has_ended:
            self.run.notify(None)  # the caller can now link to the artifact
        if is_first and self.run.owned and not has_ended and self._showing is asyncio.current_task():
            # Concurrently with the wait, and after the kickoff, so that no start waits for it.
            self._is_looking = True
            try:
                await self.run.session.version(if_due=True)
            finally:
                self._is_looking = False

    def _once_it_answers(self) -> str:
        run = self.run
        if run.idempotency_key is None:
            return f"The run may continue there. See it later: prefect-crew runs inspect {shlex.quote(run.kickoff_id)}."
        return (
            f"The run may continue there. Call again with idempotency key {run.idempotency_key!r} to wait for it. "
            "Nothing is started then."
        )
