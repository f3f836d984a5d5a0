"""Waiting for the run of a row: the loop of `runs.polling`, with no more around it than its record needs."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.outcomes import ERROR_CAP
from prefect_crew.batches.ownership import note_waiting_for_people
from prefect_crew.batches.rows import RowJob
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import RunRecord, StoredResult
from prefect_crew.runs.listener import Waker, waker_for
from prefect_crew.runs.polling import Phases, Watcher, poll
from prefect_crew.runs.reviews.reviewer import People
from prefect_crew.runs.run import OpenRun, close_record
from prefect_crew.runs.stop import close_stopped
from prefect_crew.states import CrewState

LOG_EVERY = 60.0
"""Seconds between two log lines about the same kind of thing, however many rows meet it."""


class RunTimes:
    """How long runs take, so that the first poll does not come long before one can have ended.

    `first_poll` is the duration of the fastest tenth in seconds, 0 while nothing is known: a run that takes longer is
    polled as its policy says from then on.
    """

    def __init__(self) -> None:
        self.first_poll = 0.0
        self._seconds: deque[float] = deque(maxlen=200)
        self._new = 0

    def add(self, record: RunRecord) -> None:
        """Add a run that completed: its execution time, or, where the server tells none, the time until it was seen."""
        seconds = None if record.result is None else record.result.execution_time
        if seconds is None:
            if record.ended_at is None or record.kicked_off_at is None:
                return
            # Seen too late by up to a pause: a little less each time leads to the truth from above.
            seconds = 0.9 * (record.ended_at - record.kicked_off_at).total_seconds()
        self._seconds.append(seconds)
        self._new += 1
        if self._new >= 20 or len(self._seconds) in (5, 10):
            self._new = 0
            self.first_poll = sorted(self._seconds)[len(self._seconds) // 10]


class RowPoller:
    """Waits for the runs of one batch's rows, and writes their ends down. One for a batch in one process."""

    def __init__(self, session: CrewSession, ledger: Ledger, options: BatchOptions) -> None:
        self.session = session
        self.ledger = ledger
        self.policy = options.wait or session.crew.wait
        self._webhooks = options.webhooks
        self.run_times = RunTimes() if options.wait is None else None
        self._logged_at: dict[str, float] = {}
        self._people_noted = False

    async def wait(self, job: RowJob, record: RunRecord, *, first_look: bool) -> None:
        """Wait until a run has ended, and write its end down. `first_look`: poll at once.

        Raises:
            CrewTimeoutError, CrewLostError, AuthenticationError, CrewError: As `poll`.
            ReviewLimitError: A task asks once too often.
            LedgerError: Its end cannot be written down.
        """
        kickoff_id, phases = str(record.kickoff_id), Phases.of(record)
        crew = self.session.crew.hiding(job.hidden)
        run = OpenRun(crew, kickoff_id, record, job.inputs, owned=True, webhooks=self._webhooks)
        with run.withholding():
            async with waker_for(record.idempotency_key if record.has_webhooks else None) as waker:
                status = await poll(
                    lambda: self.session.client.status(kickoff_id),
                    kickoff_id=kickoff_id,
                    crew=record.crew,
                    policy=self.policy,
                    phases=phases,
                    watcher=_Watcher(self, run, record, waker),
                    first_look=first_look,
                )
                status = status if waker is None else waker.add_usage(status)
        run.use_token_of(self.session.crew)
        has_result = status.state is CrewState.COMPLETED
        close_record(
            record,
            status,
            human_seconds=phases.human_seconds,
            error=None if has_result else run.redact(status.error or "The crew gave no reason.")[:ERROR_CAP],
            result=run.redact.model(StoredResult.of(status.result())) if has_result else None,
        )
        if has_result and self.run_times is not None:
            self.run_times.add(record)
        await self.ledger.save(record)

    async def stop(self, record: RunRecord) -> bool:
        """Stop a run that is over its time, and return whether it was."""
        try:
            answer = await self.session.client.stop(str(record.kickoff_id))
            await close_stopped(record, answer, self.ledger)
        except CrewError as error:
            run_logger().warning("Run %s is over its time and could not be stopped: %s", record.kickoff_id, error)
            return False
        return answer.accepted

    def log_seldom(self, kind: str, message: str, *args: object) -> None:
        """Log a warning, but not again for a minute."""
        now = time.monotonic()
        if kind not in self._logged_at or now - self._logged_at[kind] > LOG_EVERY:
            self._logged_at[kind] = now
            run_logger().warning(message, *args)

    async def note_person(self, record: RunRecord) -> None:
        """Say that a row waits for a person: in the log, and to whoever asks the Prefect server."""
        batch = self.ledger.batch
        self.log_seldom(
            "person",
            "Row %r of batch %s waits for a person: task %s of run %s. prefect-crew reviews ls lists all that do.",
            *(self.ledger.row_key(record.idempotency_key), batch, record.human_task, record.kickoff_id),
        )
        if not self._people_noted:
            try:
                await note_waiting_for_people(batch, True)
                self._people_noted = True
            except (httpx.HTTPError, PrefectException) as error:
                run_logger().debug("That rows of batch %s wait for people is not noted: %s", batch, error)


class _Watcher(Watcher):
    """What is done while one row's run is polled."""

    def __init__(self, poller: RowPoller, run: OpenRun, record: RunRecord, waker: Waker | None) -> None:
        self._poller = poller
        self._run = run
        self._record = record
        self._waker = waker
        self._people: People | None = None
        self._first_pause = 0.0 if poller.run_times is None else poller.run_times.first_poll

    @property
    def people(self) -> People:
        """What is done about people. Most rows never ask any, so it is made when it is needed."""
        if self._people is None:
            poller = self._poller
            self._people = People(
                self._run,
                poller.session,
                poller.ledger,
                poller.policy,
                None,
                stop=lambda: poller.stop(self._record),
                waker=self._waker,
                quiet=True,
            )
        return self._people

    async def on_status(self, status: CrewStatus) -> None:
        if status.state is CrewState.WAITING:
            task = self._record.human_task
            await self.people.ask(status)
            if self._record.human_task != task:
                await self._poller.ledger.save(self._record)
            await self._poller.note_person(self._record)
        elif status.state.ended:
            if self._record.human_since is not None:
                emit("resumed", self._record)  # the crew went on and ended between two polls
        elif self._people is not None:
            await self._people.ask(status)

    async def pause(self, seconds: float) -> None:
        await (asyncio.sleep if self._waker is None else self._waker.pause)(seconds)

    def stretch(self, delay: float) -> float:
        if self._waker is not None:
            return self._waker.stretch(delay)
        first, self._first_pause = self._first_pause, 0.0
        return max(delay, first)

    async def more_time(self) -> float:
        return await self.people.more_time()

    async def stop(self, phase: str) -> bool:
        return self._poller.policy.stops(phase) and await self._poller.stop(self._record)

    async def on_person_turn(self, phases: Phases) -> None:
        phases.note_in(self._record)
        await self._poller.ledger.save(self._record)
        if phases.human_since is None:
            emit("resumed", self._record)

    async def on_error(self, error: CrewError) -> None:
        self._poller.log_seldom("trouble", "%s This says nothing about the runs, which are polled again.", error)
