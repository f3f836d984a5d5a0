"""Wait for one run under Prefect, with an artifact, a log and events."""

from __future__ import annotations

import asyncio
import shlex
import time
from contextlib import AsyncExitStack
from dataclasses import replace
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
from prefect_crew.exceptions import (
    CrewError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    FlowRunCancelledError,
    StoreError,
)
from prefect_crew.runs import stop
from prefect_crew.runs.news import news_of
from prefect_crew.runs.polling import NO_ANSWER, Wait
from prefect_crew.runs.request import RunOptions
from prefect_crew.runs.resolve import resolve_by_evidence
from prefect_crew.runs.reviews.form import Form
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.runs.reviews.reviewer import People
from prefect_crew.runs.run import CREW_STATES, LiveRun, parse_data, read_attempt, read_result, result_of, write_end
from prefect_crew.states import CrewState
from prefect_crew.store.decision import TIMEOUT, AttemptState

SHOW_EVERY = 30.0
"""Seconds, at least, between two updates of the artifact of a run that goes on."""
NO_WEBHOOKS = (
    "hosted crews tell of their questions by webhook only, and this run has no webhooks to a receiver of ours "
    "(PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL)."
)


async def wait_for_run(run: LiveRun, options: RunOptions | None = None) -> CrewResult[Any]:
    """Wait until a run has ended and return its result. Raises the errors of `wait_for_crew`.

    The first wait after the kickoff has the attempt already; a later wait reads it.
    """
    work = OwnTask()
    return await work.run(_wait(run, options or RunOptions(), work))


async def _wait(run: LiveRun, options: RunOptions, work: OwnTask) -> CrewResult[Any]:
    async with run.session:
        if not run.is_fresh:
            await read_attempt(run)
        with withholding(run.redact_text):
            # No variable holds the result: error reporters show the local variables of all frames.
            if run.attempt is None or run.attempt.ended_at is None:
                return parse_data(await _RunWait(run, options, work).result(), options.output_type, run=run)
            run.is_fresh, own = False, flow_run_id()
            # An earlier attempt of the flow run may have left its form.
            if own is not None and options.review == "form":
                await Form(own, run, options.wait or run.crew.wait).aclose(ended=True)
            return parse_data(await read_result(run), options.output_type, run=run)


class _RunWait(Wait):
    """One wait for one run, which shows it and stops it."""

    def __init__(self, run: LiveRun, options: RunOptions, work: OwnTask) -> None:
        super().__init__(run, options.wait or run.crew.wait, is_new=run.owned)
        self.review: ReviewChoice | None = options.review
        self.work = work
        self.log, self.own = run_logger(), flow_run_id()
        self.last: CrewStatus | None = None
        self._stack = AsyncExitStack()
        self._in_trouble = self._has_stopped = self._is_stale = False
        self._shows_end = True
        self._showing: asyncio.Task[None] | None = None
        # If this process has kicked the run off, its artifact is shown at once.
        self._shown_at = time.monotonic() if run.owned else 0.0

    async def result(self) -> CrewResult:
        """Wait until the run has ended, and return its result."""
        run, has_ended = self.run, False
        if self.review is not None and run.attempt is not None and not run.has_webhooks:
            self.log.info("Crew run %s: %s", run.kickoff_id, NO_WEBHOOKS)
        async with self._stack:
            if run.has_webhooks:
                await self._read_news()
            if not run.is_fresh:
                await self.hold_slot()
            # An earlier attempt of the flow run may have left a form.
            if self.review == "form" or self.human_seconds or self.human_since:
                await self._meet_people()
            if run.artifact.is_new:
                self._show_beside()
            run.is_fresh = False  # from here on, this wait stops the crew of a cancelled flow run
            try:
                status = await self.until_end()
                has_ended = True
            except ENDINGS:
                await self._end_showing()  # the request may still be queued
                await self._stop_if_asked()
                raise
            except FlowRunCancelledError:
                work = OwnTask()
                with work.uncut():  # a crew worker cancels the task at the same moment
                    error = await work.run(self._after_cancellation(), within=stop.STOP_WITHIN)
                work.raise_if_cancelled()
                raise error from None
            except (CrewTimeoutError, CrewLostError, *NO_ANSWER) as error:
                await self._give_up(error)
                raise
            finally:
                if self.people is not None:
                    await self.people.aclose(ended=has_ended)
                if not has_ended:
                    await self._end_showing()
            self.log.info("Crew run %s %s.", run.kickoff_id, status.state)
            if self._shows_end:
                await self._show(status)
            return result_of(run, status)

    async def _read_news(self) -> None:
        if self.news is None and self.run.attempt is not None:
            self.news = await self._stack.enter_async_context(news_of(self.run.attempt.id))

    async def _meet_people(self) -> People:
        if self.people is None:
            await self._read_news()
            self.people = People(self.run, self.policy, self.review, stop=self.stop)
        return self.people

    async def on_status(self, status: CrewStatus) -> bool:
        run, before, self.last = self.run, self.last, status
        run.notify(status)
        if self._in_trouble:
            self._in_trouble = False
            self.log.info("Crew run %s: the status call answers again.", run.kickoff_id)
        if run.attempt is None and status.idempotency_key and (before is None or not before.idempotency_key):
            await self._resolve(status.idempotency_key)
        if not status.known_state and (before is None or before.raw_state != status.raw_state):
            text = "Crew run %s has the state %r, which is not documented and counts as running."
            self.log.warning(text, run.kickoff_id, run.redact_name(status.raw_state or ""))
        if status.current_task is not None and (before is None or before.current_task != status.current_task):
            task = "" if run.show == "none" or run.is_blind else run.redact(str(status.current_task))[:200]
            self.log.info("Crew run %s: %s%s", run.kickoff_id, task, progress(status))
        if status.state is CrewState.WAITING:
            await self._meet_people()
        is_asked = self.people is not None and await self.people.see_status(status)
        if status.state.ended:
            return False
        shown = ("state", "current_task", "progress")
        self._is_stale |= before is None or any(getattr(before, name) != getattr(status, name) for name in shown)
        if is_asked:
            await self._show()
        has_answered = self.people is not None and await self.people.answer()
        await self._see_time()
        return has_answered

    async def on_error(self, error: CrewError) -> None:
        if not self._in_trouble:
            self._in_trouble = True
            self.log.warning("%s The run may be fine; it is polled again.", self.run.redact(str(error)))
        await self._see_time()

    async def _see_time(self) -> None:
        if self._is_stale and time.monotonic() - self._shown_at >= SHOW_EVERY:
            self._show_beside()
        if await stop.is_cancelled(self.own):
            raise stop.nothing_started(self.own)

    async def _resolve(self, key: str) -> None:
        """Resolve the uncertain kickoff of the key that a status names: then this is the run of that key."""
        run = self.run
        try:
            run.attempt = await resolve_by_evidence(key, run.crew.url, run.kickoff_id)
        except (*PREFECT_ERRORS, CrewError) as error:
            self.log.debug("It could not be looked whether key %s is uncertain: %r", key, error)
        if run.attempt is not None:
            self.log.info("Idempotency key %s is resolved: its kickoff started run %s.", key, run.kickoff_id)

    async def hold_slot(self, *, is_human: bool | None = None) -> None:
        try:
            await super().hold_slot(is_human=is_human)
        except (StoreError, *PREFECT_ERRORS) as error:
            self.log.warning("The wait for run %s could not be recorded: %s", self.run.kickoff_id, error)

    async def pause(self, seconds: float) -> bool:
        pausing = super().pause(seconds)
        if seconds <= stop.LOOK_EVERY or self.own is None:
            return await pausing
        return await stop.until_cancelled(self.own, pausing)

    # The end

    async def stop(self) -> bool:
        run = self.run
        try:
            if run.attempt is not None and await stop.is_of_another(run.attempt):
                return False
            self._has_stopped = True
            return (await stop.stop_once(run, TIMEOUT)).accepted
        except (CrewError, *PREFECT_ERRORS) as error:
            self.log.warning("Crew run %s could not be stopped: %s", run.kickoff_id, run.redact(str(error)))
            return False

    async def _stop_if_asked(self) -> bool:
        """Stop the crew if a person cancelled the flow run, and show that. Return True if its server accepted it."""
        run = self.run
        if run.is_unread:
            await read_attempt(run)
        if run.attempt is None or run.attempt.ended_at is not None or self._has_stopped:  # /stop is sent once
            return False
        is_taken = await stop.stop_if_asked(run)
        if is_taken and run.attempt.ended_at is not None:
            await self._show(CrewStatus(kickoff_id=run.kickoff_id, state=CREW_STATES[run.attempt.state]))
        return is_taken

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

    async def _give_up(self, error: CrewError) -> None:
        """Tell people that this wait ends without the end of the run."""
        run, note = self.run, str(error)
        if isinstance(error, CrewLostError):
            if run.attempt is not None:
                emit("lost", run.attempt, once=True)
                end_run(replace(run.attempt, state=AttemptState.LOST, ended_at=self.now()))
            await self._show(CrewStatus(kickoff_id=run.kickoff_id, state=CrewState.UNKNOWN), note=note)
            return
        if isinstance(error, CrewTimeoutError):
            if run.attempt is not None:
                emit("timed_out", run.attempt, phase=error.phase, limit=error.limit)
        else:
            again = f"Call again with idempotency key {run.idempotency_key!r} to wait for it. Nothing is started then."
            later = f"See it later: prefect-crew runs inspect {shlex.quote(run.kickoff_id)}."
            advice = f"The run may continue there. {later if run.idempotency_key is None else again}"
            error.add(advice)
            # The server's answer may contain any text of the crew.
            note = str(error) if run.show == "full" else f"The status call gives no answer. {advice}"
        if not run.owned:
            await read_attempt(run)
        if run.attempt is None or run.attempt.state is AttemptState.STARTED:  # else another wait has shown the end
            await self._show(note=note)

    async def end(self, status: CrewStatus) -> None:
        """Write the end. This wait shows it if it has written it or has started the run."""
        run, owned = self.run, self.run.owned
        if run.is_unread:  # the crew database did not answer when the wait began
            await read_attempt(run)
        if run.attempt is not None and run.attempt.ended_at is None:
            try:
                with self.work.uncut():  # after the end, the span and the event must be written too
                    self._shows_end = await write_end(run, status) or owned
            except (*PREFECT_ERRORS, CrewError) as problem:
                self.log.warning("The end of run %s could not be recorded: %s", run.kickoff_id, problem)
            self.work.raise_if_cancelled()

    # The artifact

    def _show_beside(self) -> None:
        """Update the artifact concurrently with the wait: the polls go on while the request waits for its turn."""
        if self._showing is None or self._showing.done():
            self._showing = asyncio.create_task(self._show())

    async def _end_showing(self) -> None:
        if self._showing is not None:
            await cancel_and_wait(self._showing)

    async def _show(self, status: CrewStatus | None = None, *, note: str | None = None) -> None:
        """Update the artifact to this status, or to the last one at the moment at which the request is sent."""
        run = self.run
        if (showing := self._showing) is not None and showing is not asyncio.current_task():
            if run.artifact.is_new:  # the other request is still queued: this one creates the artifact
                await cancel_and_wait(showing)
            await asyncio.wait({showing})  # otherwise two requests would create the artifact
        notes, to_do = ([], []) if self.people is None else self.people.notes
        notes += [note] if note else []

        def text() -> str:
            self._shown_at, self._is_stale = time.monotonic(), False
            answers = () if self.people is None else self.people.answers
            view = run.view(status or self.last, notes=[*map(run.redact, notes)], to_do=to_do, reviews=answers)
            return render_run(view, run.artifact.earlier)

        is_first, last = run.artifact.id is None, status or self.last
        await run.artifact.keep(text)
        if run.artifact.id is None:  # the Prefect API refused it or did not answer
            self._is_stale = True
        elif is_first and (last is None or not last.state.ended):
            run.notify(None)  # the caller can now link to the artifact
