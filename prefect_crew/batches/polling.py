"""Waiting for the run of a row: the loop of `waiting`, with no more around it than its record needs."""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.ownership import note_asking
from prefect_crew.batches.rows import RowJob
from prefect_crew.batches.throttle import Rhythm
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import CrewSession, WaitPolicy
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import RunRecord, StoredResult
from prefect_crew.runs.listener import Waker, waker_for
from prefect_crew.runs.polling import Phases, Watcher, poll
from prefect_crew.runs.reviews.reviewer import People, TooManyRoundsError, stops_late
from prefect_crew.runs.run import OpenRun, close_record
from prefect_crew.runs.stop import close_stopped
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from prefect_crew.client.webhooks import Webhooks


ERROR_CAP = 2_000
SAY_EVERY = 60.0
"""Seconds between two log lines about a status call that does not answer, however many rows ask it."""


class RowWaiter:
    """Waits for the rows of one batch.

    Args:
        session: A session for the crew.
        ledger: Where the records live.
        policy: How to wait.
        learn: Whether the first look may be put off until some runs would have ended, as far as is known.
        webhooks: The user's own targets, for answers.
    """

    def __init__(
        self,
        session: CrewSession,
        ledger: Ledger,
        policy: WaitPolicy,
        *,
        learn: bool,
        webhooks: Webhooks | None = None,
    ) -> None:
        self.session = session
        self.ledger = ledger
        self.policy = policy
        self.webhooks = webhooks
        self._rhythm = Rhythm() if learn else None
        self._said_at = 0.0
        self._asked_at = 0.0
        self._asks = False

    async def wait(self, job: RowJob, record: RunRecord, *, first_look: bool) -> None:
        """Wait until a run has ended, and write its end down.

        Raises:
            CrewTimeoutError, CrewLostError, AuthenticationError, CrewError: As `poll`.
            ReviewLimitError: A task asks once too often.
            LedgerError: Its end cannot be written down.
        """
        kickoff_id = str(record.kickoff_id)
        phases = Phases.of(record)
        woken: AbstractAsyncContextManager[Waker | None]
        woken = waker_for(record.idempotency_key) if record.has_webhooks else nullcontext()
        run = OpenRun(
            self.session.crew.hiding(job.hidden), kickoff_id, record, job.inputs, owned=True, webhooks=self.webhooks
        )
        watcher = _Watcher(self, run, record)
        with run.withholding():
            async with woken as waker:
                watcher.waker = waker
                try:
                    status = await poll(
                        lambda: self.session.client.status(kickoff_id),
                        kickoff_id=kickoff_id,
                        crew=record.crew,
                        policy=self.policy,
                        phases=phases,
                        watcher=watcher,
                        first_look=first_look,
                    )
                except TooManyRoundsError as error:
                    stopped = self.policy.on_human_timeout == "stop" and await self.stop_late(record)
                    raise watcher.people.too_often(error.question, stopped=stopped) from None
                status = status if waker is None else waker.counted(status)
        run.renewed(self.session.crew)
        is_completed = status.state is CrewState.COMPLETED
        close_record(
            record,
            status,
            human_seconds=phases.human_seconds,
            error=None if is_completed else run.redact(status.error or "The crew gave no reason.")[:ERROR_CAP],
            result=run.redact.model(StoredResult.of(status.result())) if is_completed else None,
        )
        self._learn(record)
        await self.ledger.save(record)

    @property
    def first_look(self) -> float:
        """Seconds that the first pause of a wait may take, since runs are known to take as long; 0 where not."""
        return 0.0 if self._rhythm is None else self._rhythm.first_look

    def _learn(self, record: RunRecord) -> None:
        if self._rhythm is None or record.result is None:
            return
        seconds = record.result.execution_time
        if seconds is None and record.ended_at is not None and record.kicked_off_at is not None:
            # Seen too late by up to a pause: a little less each time leads to the truth from above.
            seconds = 0.9 * (record.ended_at - record.kicked_off_at).total_seconds()
        if seconds is not None:
            self._rhythm.take(seconds)

    async def stop_late(self, record: RunRecord) -> bool:
        """Stop a run that is over its time, and return whether it was."""
        try:
            answer = await self.session.client.stop(str(record.kickoff_id))
            await close_stopped(record, answer, self.ledger)
        except CrewError as trouble:
            run_logger().warning("Run %s is over its time and could not be stopped: %s", record.kickoff_id, trouble)
            return False
        return answer.accepted

    async def say_asked(self, record: RunRecord) -> None:
        """Say that a row waits for a person: to whoever asks the Prefect server, and once in a while in the log."""
        now = time.monotonic()
        if not self._asked_at or now - self._asked_at > SAY_EVERY:
            self._asked_at = now
            run_logger().warning(
                "Row %r of batch %s waits for a person: task %s of run %s. prefect-crew reviews lists all that do.",
                *(self.ledger.row_key(record.idempotency_key), self.ledger.batch, record.human_task, record.kickoff_id),
            )
        if not self._asks:
            try:
                await note_asking(self.ledger.batch, True)
                self._asks = True
            except (httpx.HTTPError, PrefectException) as error:
                run_logger().debug("That rows of batch %s wait for people is not noted: %s", self.ledger.batch, error)

    def say_trouble(self, error: CrewError) -> None:
        """Say in the log that the status call does not answer: once in a while, not for every row."""
        now = time.monotonic()
        if not self._said_at or now - self._said_at > SAY_EVERY:
            self._said_at = now
            run_logger().warning("%s This says nothing about the runs, which are asked for again.", error)


class _Watcher(Watcher):
    """What the wait for a row tells: what its record must survive a restart with, and who is waited for."""

    def __init__(self, waiter: RowWaiter, run: OpenRun, record: RunRecord) -> None:
        self._waiter = waiter
        self._run = run
        self._record = record
        self.waker: Waker | None = None
        self._people: People | None = None
        self._last: CrewStatus | None = None
        self._first_look = waiter.first_look

    @property
    def people(self) -> People:
        """What is done about people, where the crew asks any: most rows never do."""
        if self._people is None:
            waiter = self._waiter
            self._people = People(self._run, waiter.session, waiter.ledger, waiter.policy, None, quiet=True)
            self._people.questions.waker = self.waker
        return self._people

    async def saw(self, status: CrewStatus) -> None:
        self._last = status
        if status.state is CrewState.WAITING:
            task = self._record.human_task
            await self.people.ask(status)
            if self._record.human_task != task:
                await self._waiter.ledger.save(self._record)
            await self._waiter.say_asked(self._record)
        elif status.state.ended:
            if self._record.human_since is not None:
                emit("resumed", self._record)  # the turn after the answer was too short to be seen
        elif self._people is not None:
            await self._people.ask(status)

    async def pause(self, seconds: float) -> None:
        await (asyncio.sleep if self.waker is None else self.waker.pause)(seconds)

    def stretch(self, delay: float) -> float:
        if self.waker is not None:
            return self.waker.stretch(delay)
        first, self._first_look = self._first_look, 0.0
        return max(delay, first)

    async def more_time(self) -> float:
        return await self.people.more_time(self._last)

    async def stop(self, phase: str) -> bool:
        return stops_late(self._waiter.policy, phase) and await self._waiter.stop_late(self._record)

    async def person_turn(self, phases: Phases) -> None:
        phases.note_in(self._record)
        await self._waiter.ledger.save(self._record)
        if phases.human_since is None:
            emit("resumed", self._record)

    async def trouble(self, error: CrewError) -> None:
        self._waiter.say_trouble(error)
