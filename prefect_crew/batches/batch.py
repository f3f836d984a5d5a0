"""One call of a batch: check, lock, run, write, report."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.batches.cancel import run_until_cancelled
from prefect_crew.batches.database import LedgerAddress
from prefect_crew.batches.dataset import Dataset, shown_address, whole_address
from prefect_crew.batches.ledger import BatchEntry, Ledger
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions
from prefect_crew.batches.outcomes import RowState
from prefect_crew.batches.output import Output
from prefect_crew.batches.ownership import (
    BatchLock,
    begin_generation,
    bind,
    note_waiting_for_people,
    read_known,
)
from prefect_crew.batches.progress import FAILURES, UNCERTAIN_KEYS, BatchArtifact, BatchProgress, OnProgress
from prefect_crew.batches.report import BatchPlan, BatchReport
from prefect_crew.batches.rows import RowPlan, SetAside, SetAsideFile, expected_inputs, rejected_name
from prefect_crew.batches.runner import Runner, hold_concurrency_slots
from prefect_crew.batches.throttle import BatchSession, Throttle
from prefect_crew.client.models import CrewInput
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import BadRowsError, BatchBusyError, ConfigurationError, CrewError, LedgerError
from prefect_crew.records.model import RunRecord
from prefect_crew.records.resolve import Resolution, resolve_from_webhook
from prefect_crew.records.store import PrefectRecords
from prefect_crew.settings import CrewSettings
from prefect_crew.webhooks import claim_of, webhooks_for


@dataclass(frozen=True)
class BatchJob:
    """A call of a batch.

    Attributes:
        crew, dataset, options: As they were given.
        name: The batch, its template filled.
        output: Where the lines go. `output_name` is the same for people.
        ledger: Where the ledger is.
        call: The call as plain values, or why it has none.
    """

    crew: Crew
    dataset: Dataset
    options: BatchOptions
    name: str
    output: str
    ledger: LedgerAddress
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
    def line_options(self) -> dict[str, Any]:
        """What the lines of the output depend on besides the rows."""
        kind = self.options.output_type
        return {
            "output_type": None if kind is None else f"{kind.__module__}.{kind.__qualname__}",
            "secret_inputs": sorted(self.crew.secret_inputs),
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
    if not job.ledger.is_local or job.ledger.exists:
        async with Ledger(job.ledger.full, job.name) as ledger:
            done = sum(count for state, count in (await ledger.counts()).items() if state.is_final)
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
    for record in [one for one in await ledger.unresolved() if one.has_webhooks][:MOST]:
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


EXPORT_WITHIN = 10.0
"""Seconds within which the output of a batch that was cancelled is written, or not."""
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
        ledger = await stack.enter_async_context(Ledger(job.ledger.full, job.name))
        lock = await stack.enter_async_context(BatchLock(ledger.database, job.name))
        if not await lock.take():
            raise BatchBusyError(name=job.name)
        ledger.is_exclusive = lock.proves
        output = Output(job.output, output_type=options.output_type)
        known = await read_known(ledger)
        output.check(is_new=whole_address(job.output) not in _exported(known.before).get("outputs", ()))
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
        entry = await bind(
            ledger,
            known,
            crew_url=job.crew.url,
            fingerprint=checked.fingerprint,
            total=checked.total,
            go_on=options.on_change == "continue",
            public=job.ledger.public,
            call=job.call,
            line_options=job.line_options,
        )
        aside = SetAside(checked.bad_count, checked.bad, rejected_name(output.name) if checked.bad_count else None)
        if aside.count or entry.set_aside.count:
            await asyncio.to_thread(output.write_rejected, rejected.file if aside.count else None)
            await ledger.note(set_aside=asdict(aside) if aside.count else None)
        before = known.before
        if before is not None:
            if lock.proves:
                await ledger.note_orphaned()
            await resolve_by_webhooks(ledger, session.crew)
            throttle.kickoffs = await ledger.kickoffs()
            if before.fingerprint != entry.fingerprint:
                await ledger.enter_changed(plan.jobs(), job.crew)
        progress.total, progress.set_aside, progress.duplicates = checked.total, aside, checked.duplicates
        yield OpenBatch(job, session, throttle, ledger, lock, plan, output, before, progress, on_progress)


def _exported(entry: BatchEntry | None) -> Mapping[str, Any]:
    return {} if entry is None else entry.exported or {}


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
        before: BatchEntry | None,
        progress: BatchProgress,
        on_progress: OnProgress | None,
    ) -> None:
        self.job = job
        self.ledger = ledger
        self.output = output
        self._before = before
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
        self._refresh_after = 0.0

    async def run(self) -> BatchReport:
        """Run the rows that are not done, write the output, and report.

        Raises:
            CrewError: The ledger or the output failed on the way.
        """
        await self._refresh()
        try:
            if not self._is_done:
                await self._run_rows()
        except BaseException as error:
            if not isinstance(error, LedgerError):
                await self._export_in_time()
            await self._artifact.update(self.progress, await self._report())
            raise
        self._tell("finishing")
        await self._refresh()
        await self._export()
        await self._note_people()
        report = await self._report()
        self._tell("done")
        await self._artifact.update(self.progress, report)
        run_logger().info("%s", report)
        return report

    @property
    def _is_done(self) -> bool:
        """Whether every row has ended for good, so that nothing is left to do but for the output."""
        options = self.job.options
        retries = bool((options.retry_failed or options.retries) and self.progress.failed)
        return self._before is not None and self._lines_stay and self.progress.is_over and not retries

    @property
    def _lines_stay(self) -> bool:
        """Whether the results of earlier calls are judged and shown as they were then."""
        return self._before is None or self._before.line_options == self.job.line_options

    async def _export(self) -> None:
        """Write the output, unless it is there as it would be written."""
        address = whole_address(self.job.output)
        counts = {str(state): count for state, count in self.progress.counts.items()}
        before = _exported(self._before)
        now = {"output": address, "counts": counts, "lines": self.job.line_options}
        if all(before.get(name) == value for name, value in now.items()) and await asyncio.to_thread(
            self.output.exists
        ):
            return
        outputs = sorted({*before.get("outputs", ()), address})
        await self.ledger.note(exported={"outputs": outputs})  # what is written of it is this batch's, whatever happens
        await self.output.write(self.ledger)
        await self.ledger.note(exported={**now, "outputs": outputs})

    async def _export_in_time(self) -> None:
        """Write the output of a batch that was cancelled or has failed. Prefect kills a cancelled process soon."""
        try:
            await self._refresh()
            await asyncio.wait_for(self._export(), EXPORT_WITHIN)
        except (CrewError, TimeoutError) as error:
            run_logger().warning(
                "The output of batch %s was not written (%s). To write it: prefect-crew batch export %s",
                *(self.job.name, error or "it takes long", shlex.quote(self.job.name)),
            )

    async def _refresh(self) -> None:
        """Read how the batch stands from its ledger."""
        began, progress = time.monotonic(), self.progress
        counts = await self.ledger.counts()
        changed, progress.counts = counts != progress.counts, counts
        if changed:
            failed = [state for state in RowState if state.is_failed]
            progress.failures = [row async for row in self.ledger.rows_in(failed, limit=FAILURES)]
            uncertain = self.ledger.rows_in([RowState.UNCERTAIN], limit=UNCERTAIN_KEYS)
            progress.uncertain_keys = [row.key async for row in uncertain]
        self._refresh_after = time.monotonic() + 20 * (time.monotonic() - began)

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
                on_end=self.progress.add,
                judge_again=not self._lines_stay,
            )
            self._lock.generation = await begin_generation(self.ledger, self.job.ledger.public, give_up_after=BEGIN_FOR)
            self._begin_after = time.monotonic() + BEGIN_EVERY
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

    async def _tick(self, runner: Runner) -> None:
        """Show how the batch stands. About once a second."""
        progress = self.progress
        progress.in_flight = len(runner.waiting)
        progress.people = sum(record.human_since is not None for record in runner.waiting.values())
        progress.tick()
        if time.monotonic() > self._refresh_after:
            await self._refresh()
        self._tell("running")
        await self._artifact.update(progress)
        await self._begin_generation(runner.started)
        if not await self._lock.still_held():
            runner.stop(
                "its lock was lost: another process has taken the batch over, or the ledger's file was removed or "
                "replaced.",
                shut=True,
            )

    async def _begin_generation(self, started: int, *, now: bool = False) -> None:
        """Begin another generation once in a while, so that a copy made in between is known for an older one.

        Args:
            started: How many rows were started so far; nothing is done where that is as it was.
            now: Do it now: no more will be started.
        """
        if started == self._begun or (time.monotonic() < self._begin_after and not now):
            return
        try:
            self._lock.generation = await begin_generation(self.ledger, self.job.ledger.public, give_up_after=SOON)
            self._begun = started
        except (httpx.HTTPError, PrefectException, CrewError) as error:
            run_logger().warning("That batch %s has gone on cannot be noted: %s", self.job.name, error)
        self._begin_after = time.monotonic() + BEGIN_EVERY

    async def _note_people(self) -> None:
        """Note on the Prefect server whether rows are left that wait for people."""
        waits = bool([record async for record in self.ledger.may_ask()])
        try:
            await note_waiting_for_people(self.job.name, waits)
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("Whether rows of batch %s wait for people is not noted: %s", self.job.name, error)

    async def _report(self) -> BatchReport:
        progress, job = self.progress, self.job
        total, aside = progress.whole, progress.set_aside
        try:
            kickoffs, usage = await self.ledger.kickoffs(), await self.ledger.usage()
        except LedgerError:
            kickoffs, usage = self._throttle.kickoffs, None  # what ended the batch is raised
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
            usage=usage,
            cost=None if job.crew.price is None else job.crew.price * kickoffs,
        )
