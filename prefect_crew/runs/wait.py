"""Waiting for one run under Prefect: the loop of `waiting` with a record, an artifact, a log and events around it."""

from __future__ import annotations

import asyncio
import shlex
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.background import beside_here
from prefect_crew._internal.interrupts import ENDINGS, cancelled_once, watch_ctrl_c
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.markdown import progress
from prefect_crew.client.models import CrewResult, CrewStatus
from prefect_crew.crew import Crew, CrewSession, WaitPolicy
from prefect_crew.exceptions import (
    AuthenticationError,
    CrewError,
    CrewFailedError,
    CrewLostError,
    CrewStoppedError,
    CrewTimeoutError,
)
from prefect_crew.records.model import RecordPhase, StoredResult, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.limits import Slots, slot_of
from prefect_crew.runs.listener import Waker, waker_for
from prefect_crew.runs.polling import NO_ANSWER, Phases, wait_until_ended
from prefect_crew.runs.progress import tell
from prefect_crew.runs.reviews.questions import ReviewChoice
from prefect_crew.runs.reviews.reviewer import People, TooManyRoundsError
from prefect_crew.runs.run import OpenRun, find_run, recorded_result, result_of, typed
from prefect_crew.runs.stop import cancelled_meanwhile, close_stopped, mark_cancelled, stop_if_asked, stop_once
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from pydantic import BaseModel


SHOW_EVERY = 5.0
"""Seconds, at least, between two updates of the artifact of a run that goes on."""
_ENDS = {CrewState.COMPLETED: "completed", CrewState.FAILED: "failed", CrewState.STOPPED: "stopped"}


@cancelled_once
async def wait_for_run(
    crew: Crew,
    kickoff_id: str,
    *,
    idempotency_key: str | None = None,
    wait: WaitPolicy | None = None,
    output_type: type[BaseModel] | None = None,
    review: ReviewChoice | None = None,
) -> CrewResult:
    """Wait until a run has ended and return its result. `review` answers when it waits for a person.

    Raises:
        CrewFailedError, CrewStoppedError, CrewLostError: How it ended instead.
        CrewTimeoutError: A time budget is over.
        OutputTypeError: It completed, and its result does not fit `output_type`.
        CrewError: The status call gave no answer for too long.
    """
    run = await find_run(crew, kickoff_id, idempotency_key)
    waiting = _result_of(crew, run, wait or crew.wait, review)
    # No variable holds the result: error reporters show the local variables of all frames.
    return await waiting if output_type is None else typed(await waiting, output_type, run=run)


async def _result_of(crew: Crew, run: OpenRun, wait: WaitPolicy, review: ReviewChoice | None) -> CrewResult:
    async with CrewSession(crew, withhold=run.withholding()) as session:
        waiter = _Waiter(run, session, wait, review)
        if run.record is not None and run.record.phase is RecordPhase.ENDED:
            return await waiter.recorded()
        async with slot_of(crew, run.record) as slots:
            return await _with_slots(waiter, slots)


async def _with_slots(waiter: _Waiter, slots: Slots | None) -> CrewResult:
    """Wait, and give the run's slot back once it is not in flight any more."""
    over = True
    try:
        return await waiter.result()
    except BaseException as error:
        ended = isinstance(error, CrewFailedError | CrewStoppedError | CrewLostError)
        record = waiter.run.record
        over = ended or getattr(error, "stopped", False) or (record is not None and record.phase is RecordPhase.ENDED)
        raise
    finally:
        if slots is not None and over:
            await slots.release()


class _CancelledOnServerError(Exception):
    """This flow run was cancelled, and no runner will tell it."""


class _Waiter:
    """One wait for one run: what `wait_until_ended` tells, and what is done at its end."""

    def __init__(
        self, run: OpenRun, session: CrewSession, policy: WaitPolicy, review: ReviewChoice | None = None
    ) -> None:
        self.run = run
        self.session = session
        self.policy = policy
        self.records = PrefectRecords()
        self.log = run_logger()
        self.own = flow_run_id()
        self.people = People(run, session, self.records, policy, review)
        self.phases = Phases(kicked_off_at=time.time())
        self.last: CrewStatus | None = None
        self.troubled = False
        self.waker: Waker | None = None
        # A run that was kicked off right here has just been shown.
        self._shown_at = time.monotonic() if run.owned else 0.0
        self._stale = False
        self._artifact_trouble = False

    async def recorded(self) -> CrewResult:
        """Return what is on record of a run that has ended."""
        try:
            return await recorded_result(self.run, self.session)
        finally:
            await self.people.aclose(ended=True)

    async def result(self) -> CrewResult:
        run, ended = self.run, False
        with watch_ctrl_c():
            joined = await self._join()
            try:
                status = await self._wait()
                ended = True
            except ENDINGS:
                if run.record is not None:
                    await stop_if_asked(self.session, run.record, self.records)
                raise
            except _CancelledOnServerError:
                raise await self._stopped_by_cancellation() from None
            except CrewTimeoutError as error:
                raise await self._timed_out(error) from error.__cause__
            except TooManyRoundsError as error:
                stopped = self.policy.on_human_timeout == "stop" and await self._stop_late()
                raise self.people.too_often(error.question, stopped=stopped) from None
            except CrewLostError as error:
                raise await self._lost(error) from None
            except NO_ANSWER as error:
                error.add(run.once_it_answers)
                raise
            finally:
                await self.people.aclose(ended=ended)
                await self._leave(joined)
        self.log.info("Crew run %s %s.", run.kickoff_id, _ENDS[status.state])
        beside = beside_here()
        if beside is None or status.state is not CrewState.COMPLETED:
            # A failure is on record before anybody hears of it, since whoever does may buy again.
            await self._close(status)
        else:
            beside.write_down(self._close(status))
        return result_of(run, status)

    async def _wait(self) -> CrewStatus:
        record = self.run.record
        if record is not None and record.kicked_off_at is not None:
            self.phases = Phases(
                kicked_off_at=record.kicked_off_at.timestamp(),
                human_seconds=record.human_seconds,
                human_since=None if record.human_since is None else record.human_since.timestamp(),
            )
        hooked = record is not None and record.hooked
        async with waker_for(self.run.idempotency_key if hooked else None) as waker:
            self.waker = waker
            pause = self.people.pausing(asyncio.sleep if waker is None else waker.pause)
            status = await wait_until_ended(
                lambda: self.session.client.status(self.run.kickoff_id),
                kickoff_id=self.run.kickoff_id,
                policy=self.policy,
                phases=self.phases,
                watcher=self,
                first_look=not self.run.owned,
                pause=pause,
                stretch=self.people.stretching(waker),
                more_time=lambda: self.people.more_time(self.last),
            )
            return status if waker is None else waker.counted(status)

    # What wait_until_ended tells.

    async def saw(self, status: CrewStatus) -> None:
        if self.troubled:
            self.troubled = False
            self.log.info("Crew run %s: the status call answers again.", self.run.kickoff_id)
        before, self.last = self.last, status
        self.run.task_seen = status.current_task or self.run.task_seen
        tell(self.run, status)
        # A failed crew sends no webhook, so that one was not missed.
        hooked = status.state in (CrewState.COMPLETED, CrewState.WAITING)
        if self.waker is not None and hooked and (before is None or before.state is not status.state):
            self.waker.missed()
        if before is None or before.raw_state != status.raw_state:
            self._log_state(status)
        task_changed = status.current_task is not None and (
            before is None or before.current_task != status.current_task
        )
        if task_changed:
            self.log.info("Crew run %s: %s%s", self.run.kickoff_id, self._task(status), progress(status))
        asked = await self.people.ask(status)
        if status.state.ended:
            return
        state_changed = before is None or before.state is not status.state
        if state_changed or task_changed or (before is not None and before.progress != status.progress):
            self._stale = True
        if self._stale or asked:
            await self._show(status, force=asked)
        await self.people.answer()
        if await cancelled_meanwhile(self.own):
            raise _CancelledOnServerError

    def _task(self, status: CrewStatus) -> str:
        return "" if self.run.show == "none" or self.run.blind else self.run.redact(str(status.current_task))[:200]

    def _log_state(self, status: CrewStatus) -> None:
        if not status.known_state:
            self.log.warning(
                "Crew run %s has the state %r, which nobody has documented: it counts as running.",
                self.run.kickoff_id,
                self.run.named(status.raw_state or ""),
            )

    async def person_turn(self, phases: Phases) -> None:
        record = self.run.record
        since = phases.human_since
        if record is None:
            return
        record.human_seconds = phases.human_seconds
        record.human_since = None if since is None else datetime.fromtimestamp(since, UTC)
        if since is None:
            emit("resumed", record)
        try:
            if not await self._closed_already():
                await self.records.save(record)
        except (httpx.HTTPError, PrefectException) as error:
            self.log.warning("Whether run %s waits for a person is not on record: %s", self.run.kickoff_id, error)

    async def trouble(self, error: CrewError, seconds: float) -> None:
        if not self.troubled:
            self.troubled = True
            self.log.warning(
                "%s This says nothing about the run, which is asked for again.", self.run.redact(str(error))
            )
        if await cancelled_meanwhile(self.own):
            raise _CancelledOnServerError

    async def refused(self, error: AuthenticationError) -> bool:
        renewed = await self.session.renew()
        if renewed:
            self.run.renewed(self.session.crew)
            self.log.info(
                "Crew run %s: the stored block has a new token, which is used from now on.", self.run.kickoff_id
            )
        return renewed

    # What is done at the end.

    async def _join(self) -> bool:
        """Note that this flow run waits for somebody else's run, so that they do not stop it under us."""
        record = self.run.record
        if record is None or self.run.owned or self.own is None or record.flow_run_id == self.own:
            return False
        try:
            await self.records.add_waiter(record, self.own)
        except (httpx.HTTPError, PrefectException) as error:
            self.log.warning("That this flow run waits for run %s is not on record: %s", self.run.kickoff_id, error)
            return False
        return True

    async def _leave(self, joined: bool) -> None:
        if not joined:
            return
        assert self.run.record is not None  # noqa: S101  only who joined leaves
        assert self.own is not None  # noqa: S101
        try:
            await self.records.remove_waiter(self.run.record, self.own)
        except (httpx.HTTPError, PrefectException) as error:
            self.log.debug("The note that this flow run waits for run %s stays: %s", self.run.kickoff_id, error)

    async def _close(self, status: CrewStatus) -> None:
        """Write the end down, show it, tell automations: once, by whoever closes the record."""
        run, record = self.run, self.run.record
        if record is not None:
            record.ended_at = utcnow()
            if record.human_since is not None:  # the person's turn ended with the run
                record.human_seconds += max(0.0, (record.ended_at - record.human_since).total_seconds())
                record.human_since = None
            if await self._closed_already():
                return
            masked = run.masked(status)
            record.phase, record.state = RecordPhase.ENDED, status.state
            record.error = (masked.error or "")[:500] or None
            if status.state is CrewState.COMPLETED and run.show == "full":
                result = status.result()
                kept = StoredResult.of(result)
                if not run.redact.hides(kept.model_dump(mode="json")):
                    record.result = kept
            try:
                await self.records.save(record)
            except (httpx.HTTPError, PrefectException) as error:
                self.log.warning("The end of run %s is not on record: %s", run.kickoff_id, error)
            emit(
                _ENDS[status.state],
                record,
                once=True,
                state=str(status.state),
                error=record.error,
                execution_time=status.execution_time,
            )
        await self._show(status, force=True)

    async def _closed_already(self) -> bool:
        """Return whether another waiter has closed the record of a run that is not ours."""
        if self.run.record is None or self.run.owned:
            return False
        try:
            standing = await self.records.of_kickoff(self.run.kickoff_id)
        except (httpx.HTTPError, PrefectException):
            return False
        return standing is not None and standing.phase is RecordPhase.ENDED

    async def _stopped_by_cancellation(self) -> CrewError:
        record = self.run.record
        stopped = record is not None and await stop_if_asked(self.session, record, self.records)
        if self.own is not None:
            try:
                await mark_cancelled(self.own)
            except (httpx.HTTPError, PrefectException) as error:
                self.log.warning("This flow run stays in Cancelling: %s", error)
        label, kickoff_id = self.run.crew.label, self.run.kickoff_id
        if stopped:
            return CrewStoppedError(kickoff_id=kickoff_id, crew=label, idempotency_key=self.run.idempotency_key)
        return CrewError(
            f"The flow run was cancelled, and with it the wait for run {kickoff_id} of crew {label}, which runs on at "
            f"{self.run.crew.url}. Its result is there for whoever waits for it: "
            f"prefect-crew runs show {shlex.quote(kickoff_id)}."
        )

    async def _timed_out(self, error: CrewTimeoutError) -> CrewTimeoutError:
        run, record = self.run, self.run.record
        stopped = False
        if self.people.stops_late(error):
            stopped = await self._stop_late()
        full = CrewTimeoutError(
            kickoff_id=run.kickoff_id,
            phase=error.phase,
            budget=error.budget,
            last_state=error.last_state,
            crew=run.crew.label,
            idempotency_key=run.idempotency_key,
            stopped=stopped,
        )
        if record is not None:
            emit("timed_out", record, phase=error.phase, budget=error.budget)
        await self._show(self.last, force=True, note=str(full))
        return full

    async def _stop_late(self) -> bool:
        """Stop a run that is over its time; False where somebody else waits for it, or it cannot be stopped."""
        record = self.run.record
        try:
            if record is None:
                return (await self.session.asked(lambda client: client.stop(self.run.kickoff_id))).accepted
            if others := await self.records.other_waiters(record, self.own):
                self.log.warning("Crew run %s is left running: %s wait for it too.", self.run.kickoff_id, others)
                return False
            answer = await stop_once(self.session, record)
            await close_stopped(record, answer, self.records)
        except (CrewError, httpx.HTTPError, PrefectException) as error:
            self.log.warning("Crew run %s could not be stopped: %s", self.run.kickoff_id, self.run.redact(str(error)))
            return False
        return answer.accepted

    async def _lost(self, error: CrewLostError) -> CrewLostError:
        run, record = self.run, self.run.record
        full = CrewLostError(
            kickoff_id=run.kickoff_id,
            crew=run.crew.label,
            idempotency_key=run.idempotency_key,
            last_state=error.last_state,
        )
        if record is not None:
            emit("lost", record, once=True)
        await self._show(CrewStatus(kickoff_id=run.kickoff_id, state=CrewState.UNKNOWN), force=True, note=str(full))
        return full

    async def _show(self, status: CrewStatus | None, *, force: bool = False, note: str | None = None) -> None:
        """Bring the artifact up to date, every few seconds at most, and complain once if that does not work."""
        now = time.monotonic()
        if not force and now - self._shown_at < SHOW_EVERY:
            return
        self._shown_at, self._stale = now, False
        notes = [self.run.redact(one) for one in (*self.people.notes, *([note] if note else []))]
        view = self.run.view(status, notes=notes, reviews=self.people.given)
        trouble = await self.run.shown_by().update(view)
        if trouble and not self._artifact_trouble:
            self._artifact_trouble = True
            self.log.warning("The artifact of run %s could not be updated: %s", self.run.kickoff_id, trouble)
