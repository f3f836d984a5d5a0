"""One call of a batch: check, lock, run, write, report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.batches.cancel import run_until_cancelled
from prefect_crew.batches.database import LedgerPlace
from prefect_crew.batches.dataset import Dataset, shown_address, whole_address
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions
from prefect_crew.batches.outcomes import MISFIT, RowEnd
from prefect_crew.batches.output import Output, line_of
from prefect_crew.batches.ownership import (
    BatchLock,
    Bound,
    begin_generation,
    bind,
    binding_name,
    kept_here,
    note_asking,
)
from prefect_crew.batches.progress import FAILURES, BatchArtifact, BatchProgress, Failure, OnProgress
from prefect_crew.batches.report import BatchPlan, BatchReport
from prefect_crew.batches.rows import RowPlan, SetAside, SetAsideFile, expected_inputs, rejected_name
from prefect_crew.batches.runner import Runner, hold_concurrency_slots
from prefect_crew.batches.throttle import BatchSession, Throttle
from prefect_crew.client.models import CrewInput
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import BadRowsError, BatchBusyError, ConfigurationError, CrewError, LedgerError
from prefect_crew.records.model import RunRecord
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.webhook_resolve import Resolution, resolve_from_webhook
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState
from prefect_crew.webhooks import claim_of, webhooks_for


@dataclass(frozen=True)
class BatchJob:
    """A call of a batch.

    Attributes:
        crew, dataset, options: As they were given.
        name: The batch, its template filled.
        output: Where the lines go. `output_name` is the same for people.
        place: Where the ledger is.
        call: The call as plain values, or why it has none.
    """

    crew: Crew
    dataset: Dataset
    options: BatchOptions
    name: str
    output: str
    place: LedgerPlace
    call: Mapping[str, Any]

    @property
    def output_name(self) -> str:
        """The output for people."""
        return shown_address(self.output)

    def plan(self, expected: Sequence[CrewInput]) -> RowPlan:
        """Return how the rows become runs.

        Raises:
            ConfigurationError: A key that is a secret input, or a template that is none.
        """
        if isinstance(self.options.key, str) and self.options.key in self.crew.secret_inputs:
            raise ConfigurationError(
                f"The key column {self.options.key!r} is a secret input: keys stand in logs, artifacts and the ledger. "
                "Take another column, or leave key out."
            )
        return RowPlan(
            self.dataset,
            inputs=self.options.inputs,
            key=self.options.key,
            expected=expected,
            as_json=self.crew.inputs_as_json,
            deduplicate=self.options.deduplicate,
            secret=self.crew.secret_inputs,
            allow_extra=self.crew.allow_extra_inputs,
            rows=self.options.row_range,
        )

    @property
    def written(self) -> dict[str, Any]:
        """What the lines depend on besides the rows."""
        kind = self.options.output_type
        return {
            "output": shown_address(whole_address(self.output)),
            "order": self.options.order,
            "typed": None if kind is None else f"{kind.__module__}.{kind.__qualname__}",
            "masked": sorted(self.crew.secret_inputs),
        }


async def plan_of(job: BatchJob, seconds_per_run: float | None) -> BatchPlan:
    """Check every row of a batch, and say how many, how long and how much. Nothing is started.

    Args:
        job: The batch.
        seconds_per_run: The duration of one run; None takes the mean of those that the ledger has seen.
    """
    async with CrewSession(job.crew) as session:
        plan = job.plan(await expected_inputs(session))
    checked = await asyncio.to_thread(plan.check)
    done, mean = 0, None
    if not job.place.local or job.place.exists:
        async with Ledger(job.place.ledger, job.name) as ledger:
            counts = await ledger.counts()
            done = sum(counts.get(str(state), 0) for state in CrewState if state.ended) + counts.get(MISFIT, 0)
            mean = (await ledger.run_times()).mean
    duration = mean if seconds_per_run is None else seconds_per_run
    left = max(checked.total - done, 0)
    most = job.options.max_in_flight or IN_FLIGHT
    seconds = None if duration is None else -(-left // most) * duration
    if job.options.kickoffs_per_second is not None:
        seconds = max(seconds or 0.0, left / job.options.kickoffs_per_second)
    return BatchPlan(
        name=job.name,
        rows=checked.total,
        done=done,
        bad=checked.bad,
        bad_count=checked.bad_count,
        duplicates=checked.duplicates,
        max_in_flight=most,
        seconds=seconds,
        price=None if job.crew.price is None else job.crew.price * left,
        notes=plan.notes(),
    )


MOST = 200
"""Uncertain rows that are looked for. A process that dies leaves 16."""


async def resolve_by_webhooks(ledger: Ledger, crew: Crew) -> None:
    """Resolve what webhooks have told of, under the conditions of `resolve_from_webhook`. An error leaves it uncertain.

    Without a secret nobody has checked where a webhook came from, so none is believed.

    Raises:
        LedgerError: The ledger cannot be used.
    """
    if not CrewSettings().webhook_secret:
        return
    for record in [one for one in await ledger.unresolved() if one.hooked][:MOST]:
        try:
            ids = [one for one in await _told(record) if await PrefectRecords().of_kickoff(one) is None]
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().warning("What webhooks told of uncertain rows cannot be read: %s", error)
            return
        for kickoff_id in ids:
            outcome = await resolve_from_webhook(
                record.idempotency_key,
                kickoff_id,
                ledger,
                attempt=record.attempt,
                load=lambda found: _same(crew, found),
            )
            if outcome is Resolution.RESOLVED:
                run_logger().info(
                    "Row %r of batch %s is resolved: its kickoff started run %s, a webhook says.",
                    *(ledger.row_key(record.idempotency_key), ledger.batch, kickoff_id),
                )
                emit("resolved", record.model_copy(update={"kickoff_id": kickoff_id}))
                break


async def _same(crew: Crew, record: RunRecord) -> Crew | None:
    return crew if record.crew_url == crew.url else None


async def _told(record: RunRecord) -> list[str]:
    """Return the kickoff ids that webhooks of this very claim have named, each once."""
    about = {
        "resource": {"labels": {"prefect-crew.idempotency-key": [record.idempotency_key]}},
        "event": {"prefix": ["crew.webhook."]},
        "occurred": {"since": record.claimed_at.isoformat()},
    }
    async with get_client() as client:
        answer = await client.request("POST", "/events/filter", json={"filter": about, "limit": 50})
    found: dict[str, None] = {}
    for event in cast("list[dict[str, Any]]", answer.json()["events"]):
        payload: dict[str, Any] = event["payload"]
        said: dict[str, Any] = payload.get("said") or {}
        if payload.get("claim") == claim_of(record.owner) and said.get("kickoff_id"):
            found[str(said["kickoff_id"])] = None
    return list(found)


BEGIN_FOR = 60.0
"""Seconds for which a Prefect API that is away or busy is told of a call before its first row is started."""
BEGIN_EVERY = 5.0
"""Seconds between two generations while rows are started: a copy of the ledger that is older is known for one."""
SOON = 2.0
"""Seconds for which the Prefect API is told of a further one."""


@asynccontextmanager
async def open_batch(job: BatchJob, on_progress: OnProgress | None = None) -> AsyncGenerator[OpenBatch]:
    """Check the rows of a batch, lock it, and bind its name to its ledger.

    Raises:
        CrewError: It cannot be begun. Nothing was started.
    """
    options, progress = job.options, BatchProgress(job.name)
    webhooks_for(job.crew, job.name)  # settings that make no sense are said before anything is started
    async with AsyncExitStack() as stack:
        throttle = Throttle(options)
        session = BatchSession(job.crew, throttle)
        await stack.enter_async_context(session)
        if on_progress is not None:
            on_progress(progress)
        plan = job.plan(await expected_inputs(session))
        # Whether the batch is ours is known before its rows are read, which may take minutes.
        ledger = await stack.enter_async_context(Ledger(job.place.ledger, job.name))
        lock = await stack.enter_async_context(BatchLock(ledger.database, job.name))
        if not await lock.take():
            raise BatchBusyError(name=job.name)
        ledger.sole = lock.proves
        beside = ledger.database.path or Path.cwd() / binding_name(job.name)
        output = Output(job.output, beside=beside, output_type=options.output_type)
        kept = await kept_here(ledger)
        output.check(fresh=not await ledger.known())
        rejected = SetAsideFile()
        stack.callback(rejected.close)
        checked = await asyncio.to_thread(plan.check, rejected.put)
        for told in plan.notes():
            run_logger().warning("Batch %s: %s", job.name, told)
        if checked.bad and (options.on_bad_row == "refuse" or not checked.total):
            alone = not checked.total
            raise BadRowsError(checked.bad, checked.bad_count, source=job.dataset.name, alone=alone)
        if not await lock.still_held():
            raise BatchBusyError(name=job.name)
        bound = await bind(
            ledger,
            kept,
            crew_url=job.crew.url,
            fingerprint=checked.fingerprint,
            total=checked.total,
            go_on=options.on_change == "continue",
            place=job.place.told,
            call=job.call,
        )
        aside = SetAside(checked.bad_count, checked.bad, rejected_name(output.name) if checked.bad_count else None)
        if aside.count or (await ledger.set_aside()).count:
            await asyncio.to_thread(output.put_rejected, rejected.file if aside.count else None)
            await ledger.note_set_aside(aside)
        if bound.before is not None:
            await resolve_by_webhooks(ledger, session.crew)
            throttle.kickoffs = await ledger.bought()
        progress.total, progress.set_aside, progress.duplicates = checked.total, aside, checked.duplicates
        yield OpenBatch(job, session, throttle, ledger, lock, plan, output, bound, progress, on_progress)


class OpenBatch:
    """A batch that is open: its rows are checked, and its lock is held."""

    def __init__(
        self,
        job: BatchJob,
        session: BatchSession,
        throttle: Throttle,
        ledger: Ledger,
        lock: BatchLock,
        plan: RowPlan,
        output: Output,
        bound: Bound,
        progress: BatchProgress,
        on_progress: OnProgress | None,
    ) -> None:
        self.job = job
        self.ledger = ledger
        self.output = output
        self.bound = bound
        self.progress = progress
        self._session = session
        self._throttle = throttle
        self._lock = lock
        self._plan = plan
        self._on_progress = on_progress
        self._artifact = BatchArtifact(job.name, job.crew.label, show=job.crew.show)
        self._kickoffs_before = throttle.kickoffs
        self._begun = 0
        self._begin_after = 0.0

    async def run(self) -> BatchReport:
        """Run the rows that are not done, write all lines, and report.

        Raises:
            CrewError: The ledger or the output failed on the way.
        """
        ledger, progress, output = self.ledger, self.progress, self.output
        if self.is_done:
            await self._recall()
            if not await asyncio.to_thread(output.is_there):
                await asyncio.to_thread(output.finish)
        else:
            try:
                await self._run_rows()
            except BaseException:
                await self._artifact.update(progress, await self._report())
                raise
            finally:
                output.close()
            self._tell("finishing")
            await asyncio.to_thread(output.finish)
            await ledger.note_standing({"done": progress.over, "lines": progress.total, **self.job.written})
        await self._note_people()
        report = await self._report()
        self._tell("done")
        await self._artifact.update(progress, report)
        run_logger().info("%s", report)
        return report

    def _tell(self, phase: Literal["running", "finishing", "done"]) -> None:
        self.progress.phase = phase
        if self._on_progress is not None:
            self._on_progress(self.progress)

    async def _run_rows(self) -> None:
        options = self.job.options
        async with AsyncExitStack() as stack:
            runner = Runner(
                *(self._session, self._throttle, self.ledger, options),
                max_in_flight=await hold_concurrency_slots(self._session, options, stack),
                on_end=self._add,
            )
            self._lock.generation = await begin_generation(self.ledger, self.job.place.told, patience=BEGIN_FOR)
            self._begin_after = time.monotonic() + BEGIN_EVERY
            self.output.open(self._stays(), in_order=options.order == "input")
            try:
                await run_until_cancelled(
                    runner.run(self._plan.jobs()),
                    runner,
                    name=self.job.name,
                    on_cancel=options.on_cancel,
                    tick=lambda: self._tick(runner),
                )
            finally:
                await self._begin_generation(runner.started, now=True)
                self.progress.in_flight = len(runner.waiting)

    async def _add(self, end: RowEnd) -> None:
        self.progress.add(end)
        self.output.put(end.job.number, end.job.key, line_of(end, self.job.crew))

    async def _tick(self, runner: Runner) -> None:
        """Show how the batch stands. About once a second."""
        progress = self.progress
        progress.in_flight = len(runner.waiting)
        progress.people = sum(record.human_since is not None for record in runner.waiting.values())
        progress.tick()
        self._tell("running")
        self.output.flush()
        await self._artifact.update(progress)
        await self._begin_generation(runner.started)
        if not await self._lock.still_held():
            runner.stop(
                "its lock was lost: another process has taken the batch over, or the ledger's file was removed or "
                "replaced.",
                shut=True,
            )

    async def _begin_generation(self, started: int, *, now: bool = False) -> None:
        """Begin another generation once in a while, so that a copy made meanwhile is known for an older one.

        Args:
            started: How many rows were started so far; nothing is done where that is as it was.
            now: Do it now: no more will be started.
        """
        if started == self._begun or (time.monotonic() < self._begin_after and not now):
            return
        try:
            self._lock.generation = await begin_generation(self.ledger, self.job.place.told, patience=SOON)
            self._begun = started
        except (httpx.HTTPError, PrefectException, CrewError) as error:
            run_logger().warning("That batch %s has gone on cannot be noted: %s", self.job.name, error)
        self._begin_after = time.monotonic() + BEGIN_EVERY

    async def _note_people(self) -> None:
        """Note on the Prefect server whether rows are left that wait for people."""
        asks = bool([record async for record in self.ledger.may_ask()])
        try:
            await note_asking(self.job.name, asks)
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("Whether rows of batch %s wait for people is not noted: %s", self.job.name, error)

    def _stays(self) -> Callable[[str], bool]:
        """Return what says whether a line of an earlier call stays: that of a row neither run again nor judged anew."""
        options, before = self.job.options, self.bound.before
        noted: Mapping[str, Any] = (None if before is None else before.standing) or {}
        same = all(noted.get(name, value) == value for name, value in self.job.written.items() if name != "order")
        states = {str(CrewState.COMPLETED)} if same else set[str]()
        if same and not options.retry_failed and not options.retries:
            states.add(str(CrewState.FAILED))
        return states.__contains__

    # A batch that is done.

    @property
    def is_done(self) -> bool:
        """Return whether there was nothing left to do when it was opened, not even a line."""
        before, entry, options = self.bound.before, self.bound.entry, self.job.options
        if before is None or before.standing is None or options.retry_failed or options.retries:
            return False
        if before.fingerprint != entry.fingerprint or before.total != entry.total:
            return False
        noted = {"done": True, "lines": before.total, **self.job.written}
        return dict(before.standing) == noted and self.output.count() == before.total

    async def _recall(self) -> None:
        """Take how a batch that is done stands from its ledger, without a look at its rows."""
        progress, ledger = self.progress, self.ledger
        progress.completed = (await ledger.counts()).get(str(CrewState.COMPLETED), 0)
        progress.failed = progress.total - progress.completed
        progress.add_usage(await ledger.usage())
        if not progress.failed:
            return
        async for key, record in ledger.standing_attempts():
            state = str(record.state)
            progress.failures.append(Failure(key, record.kickoff_id, state, record.error or state, None))
            if len(progress.failures) == FAILURES:
                break

    async def _report(self) -> BatchReport:
        progress, job = self.progress, self.job
        total, aside = progress.whole, progress.set_aside
        try:
            kickoffs = await self.ledger.bought()
        except LedgerError:
            kickoffs = self._throttle.kickoffs  # what ended the batch is raised; this is only how it stands
        return BatchReport(
            name=job.name,
            total=total,
            completed=progress.completed,
            failed=progress.failed,
            uncertain=progress.uncertain,
            skipped=total - progress.done,
            seconds=progress.seconds,
            output=self.output.name,
            stopped=self._throttle.stopped,
            kickoffs=kickoffs - self._kickoffs_before,
            set_aside=aside.count,
            set_aside_rows=tuple(aside.rows[:FAILURES]),
            set_aside_output=aside.output,
            duplicates=progress.duplicates,
            uncertain_keys=tuple(progress.uncertain_keys),
            errors=dict(progress.errors),
            usage=progress.usage,
            cost=None if job.crew.price is None else job.crew.price * kickoffs,
        )
