"""Wait for one run under Prefect: `poll` with an attempt, an artifact, a log and events around it."""

from __future__ import annotations

import asyncio
import shlex
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from prefect_crew._internal.asyncio_tasks import ENDINGS, OwnTask, cancel_and_wait
from prefect_crew._internal.clock import utcnow
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.escape import progress
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.run import render_run
from prefect_crew.artifacts.telemetry import end_run
from prefect_crew.client.models import CrewResult, CrewStatus
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import (
    CrewError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
    FlowRunCancelledError,
    StoreError,
)
from prefect_crew.runs import stop
from prefect_crew.runs.database import in_store
from prefect_crew.runs.news import Subscription, news_of
from prefect_crew.runs.polling import NO_ANSWER, Phases, Watcher, poll
from prefect_crew.runs.request import RunOptions
from prefect_crew.runs.resolve import resolve_by_evidence
from prefect_crew.runs.reviews.form import Form
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.runs.reviews.reviewer import People
from prefect_crew.runs.run import LiveRun, parse_data, read_attempt, read_result, read_status, result_of, write_end
from prefect_crew.runs.stop import is_cancelled, is_of_another, stop_if_asked, stop_once
from prefect_crew.states import CrewState
from prefect_crew.store import attempts
from prefect_crew.store.decision import TIMEOUT, AttemptState
from prefect_crew.webhooks import UNLIMITED

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
    return await work.run(_wait_for_run(run, options or RunOptions(), work))


async def _wait_for_run(run: LiveRun, options: RunOptions, work: OwnTask) -> CrewResult[Any]:
    async with run.session:
        if not run.is_fresh:
            await read_attempt(run)
        is_started = run.attempt is not None and run.attempt.state is AttemptState.STARTED
        if options.review is not None and is_started and not run.has_webhooks:
            run_logger().info("Crew run %s: %s", run.kickoff_id, NO_WEBHOOKS)
        waiter = _Waiter(run, options.wait or run.crew.wait, options.review, work)
        # No variable holds the result: error reporters show the local variables of all frames.
        return parse_data(await waiter.wait(), options.output_type, run=run)


class _CancelledOnServerError(Exception):
    """This flow run was cancelled, and it has no runner that would send a signal."""


class _Waiter(Watcher):
    """One wait for one run: it handles each status, and the end."""

    def __init__(self, run: LiveRun, policy: WaitPolicy, review: ReviewChoice | None, work: OwnTask) -> None:
        self.run, self.policy, self.work = run, policy, work
        self.review: ReviewChoice | None = review
        self.log = run_logger()
        self.own = flow_run_id()
        self.phases = Phases.of(run.attempt)
        self.last: CrewStatus | None = None
        self.news: Subscription | None = None
        self.people: People | None = None
        self.stack = AsyncExitStack()
        self._in_trouble = self._has_stopped = False
        self._is_stale = False
        self._showing: asyncio.Task[None] | None = None
        self._is_looking = False
        # If this process has kicked the run off, its artifact was shown just now.
        self._shown_at = time.monotonic() if run.owned else 0.0

    async def meet_people(self, *, asked: bool = False) -> None:
        """Create `people` if the run has a question, or may have one, and read its news. Most runs never ask.

        With `review="form"` at once: an earlier attempt of the flow run may have left a form.
        """
        may_ask = asked or self.review == "form" or self.phases.human_seconds or self.phases.human_since
        if self.people is not None or not may_ask:
            return
        if asked and self.news is None and self.run.attempt is not None:
            self.news = await self.stack.enter_async_context(news_of(self.run.attempt.id))
        self.people = People(self.run, self.policy, self.review, stop=self._stop_late, news=self.news)

    async def wait(self) -> CrewResult:
        """Wait until the run has ended, and return its result."""
        run, ended = self.run, False
        async with self.stack:
            self.stack.enter_context(withholding(run.redact_text))
            if run.attempt is not None and run.attempt.ended_at is not None:
                run.is_fresh = False
                # An earlier attempt of the flow run may have left its form.
                if self.own is not None and self.review == "form":
                    await Form(self.own, run, self.policy).aclose(ended=True)
                return await read_result(run)
            if run.attempt is not None and (run.has_webhooks or self.phases.human_since):
                self.news = await self.stack.enter_async_context(news_of(run.attempt.id))
            if not run.is_fresh:
                await self._hold_slot()
            await self.meet_people()
            if run.artifact.is_new:
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
                    was_alive=run.attempt is not None and not run.owned,
                )
                ended = True
                if status.usage is None and self.news is not None:
                    status = status.model_copy(update={"usage": self.news.usage})
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
            except (CrewTimeoutError, CrewLostError, *NO_ANSWER) as error:
                await self._give_up(error)
                raise
            finally:
                if self.people is not None:
                    await self.people.aclose(ended=ended)
                if not ended:
                    await self._end_showing()
            self.log.info("Crew run %s %s.", run.kickoff_id, status.state)
            await self._close(status)
            return result_of(run, status)

    async def _give_up(self, error: CrewError) -> None:
        """Tell people that this wait ends without the end of the run."""
        run = self.run
        if isinstance(error, CrewTimeoutError):
            if run.attempt is not None:
                emit("timed_out", run.attempt, phase=error.phase, limit=error.limit)
            await self._show_unless_closed(str(error))
        elif isinstance(error, CrewLostError):
            if run.attempt is not None:
                emit("lost", run.attempt, once=True)
                end_run(replace(run.attempt, state=AttemptState.LOST, ended_at=utcnow().timestamp()))
            lost = CrewStatus(kickoff_id=run.kickoff_id, state=CrewState.UNKNOWN)
            await self._show(lost, note=str(error))
        else:
            advice = f"See it later: prefect-crew runs inspect {shlex.quote(run.kickoff_id)}."
            if run.idempotency_key is not None:
                advice = (
                    f"Call again with idempotency key {run.idempotency_key!r} to wait for it. Nothing is started then."
                )
            advice = f"The run may continue there. {advice}"
            error.add(advice)
            # The server's answer may contain any text of the crew.
            bare = f"The status call gives no answer. {advice}"
            await self._show_unless_closed(str(error) if run.show == "full" else bare)

    # The methods that `poll` calls

    async def on_status(self, status: CrewStatus) -> bool:
        run, before, self.last = self.run, self.last, status
        run.notify(status)
        if (
            run.attempt is None
            and status.idempotency_key is not None
            and (before is None or not before.idempotency_key)
        ):
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
        await self.meet_people(asked=status.state is CrewState.WAITING)
        is_asked = self.people is not None and await self.people.see_status(status)
        if status.state.ended:
            return False
        if is_new_state or is_new_task or (before is not None and before.progress != status.progress):
            self._is_stale = True
        if is_asked:
            await self._show()
        elif self._is_stale and time.monotonic() - self._shown_at >= SHOW_EVERY:
            self._show_beside()
        has_answered = self.people is not None and await self.people.answer()
        if await is_cancelled(self.own):
            raise _CancelledOnServerError
        return has_answered

    async def _resolve(self, key: str) -> None:
        """Resolve the uncertain kickoff of the key that a status names: then this is the run of that key."""
        run = self.run
        try:
            run.attempt = await resolve_by_evidence(key, run.crew.url, run.kickoff_id)
        except (*PREFECT_ERRORS, CrewError) as error:
            self.log.debug("It could not be looked whether key %s is uncertain: %r", key, error)
        if run.attempt is not None:
            self.log.info("Idempotency key %s is resolved: its kickoff started run %s.", key, run.kickoff_id)

    async def on_human_wait(self, phases: Phases) -> None:
        if self.run.attempt is None:
            return
        if phases.human_since is None:
            emit("resumed", self.run.attempt)
        await self._hold_slot(is_human=phases.human_since is not None)

    async def _hold_slot(self, *, is_human: bool | None = None) -> None:
        """Say that this call waits for the run, and whether the run waits for a person: so long it holds its slot."""
        limit = self.policy.human_timeout if is_human else self.policy.timeout
        if self.run.attempt is None:
            return
        try:
            attempt = await in_store(
                attempts.waited_for, self.run.attempt, UNLIMITED if limit is None else limit, is_human=is_human
            )
            self.run.attempt = attempt or self.run.attempt
        except (StoreError, *PREFECT_ERRORS) as error:
            self.log.warning("The wait for run %s could not be recorded: %s", self.run.kickoff_id, error)

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
        pause = super().pause if self.news is None else self.news.pause
        pausing = pause(seconds) if self.people is None else self.people.pause(pause, seconds)
        if seconds <= stop.LOOK_EVERY or self.own is None:
            return await pausing
        try:
            return await stop.until_cancelled(self.own, pausing)
        except FlowRunCancelledError:
            raise _CancelledOnServerError from None

    def next_pause(self, delay: float) -> float:
        return delay if self.people is None else self.people.next_pause(delay)

    async def more_time(self) -> float:
        return 0.0 if self.people is None else await self.people.more_time()

    async def stop(self, phase: str) -> bool:
        return self.policy.stops(phase) and await self._stop_late()

    # The end

    async def _stop_late(self) -> bool:
        """Stop a run after its time limit. Return False if another flow run started it, or the stop failed."""
        run = self.run
        try:
            if run.attempt is not None and await is_of_another(run.attempt):
                return False
            self._has_stopped = True
            return (await stop_once(run, TIMEOUT)).accepted
        except (CrewError, *PREFECT_ERRORS) as error:
            self.log.warning("Crew run %s could not be stopped: %s", run.kickoff_id, run.redact(str(error)))
            return False

    async def _stop_if_asked(self) -> bool:
        """Stop the crew if a person cancelled the flow run, and show that. Return True if its server accepted it."""
        run = self.run
        if run.is_unread:
            await read_attempt(run)
        if run.attempt is None or self._has_stopped:  # /stop is sent once
            return False
        is_taken = await stop_if_asked(run)
        if is_taken and run.attempt.ended_at is not None:
            await self._show(CrewStatus(kickoff_id=run.kickoff_id, state=CrewState.STOPPED))
        return is_taken

    async def _close(self, status: CrewStatus) -> None:
        """Store the end, and show it if this wait closes the run or has started it."""
        run, owned = self.run, self.run.owned
        if run.is_unread:  # the crew database did not answer when the wait began
            await read_attempt(run)
        if run.attempt is not None and run.attempt.ended_at is None:
            try:
                with self.work.uncut():  # after the end, the span and the event must be written too
                    is_closed = await write_end(run, status)
            except (*PREFECT_ERRORS, CrewError) as problem:
                self.log.warning("The end of run %s could not be recorded: %s", run.kickoff_id, problem)
            else:
                if not (is_closed or owned):
                    return
            self.work.raise_if_cancelled()
        await self._show(status)

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
        if not self.run.owned:
            await read_attempt(self.run)
        if self.run.attempt is None or self.run.attempt.ended_at is None:
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
