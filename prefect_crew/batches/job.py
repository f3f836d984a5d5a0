"""One call of a batch: read the rows twice, keep the ledger, run the rows in chunks, write the output, report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from typing import Any, cast

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectException

from prefect_crew.api.errors import AuthenticationError, ConfigurationError, CrewError
from prefect_crew.api.models import CrewInput, CrewState
from prefect_crew.batches.binding import bind
from prefect_crew.batches.datasets import Dataset
from prefect_crew.batches.engine import Engine, EngineOptions, RowEnd
from prefect_crew.batches.ledger import Ledger, ledger_url
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.output import OutputFile, line_of
from prefect_crew.batches.pacing import BatchClient, Pace
from prefect_crew.batches.report import BatchArtifacts, BatchReport, Standing
from prefect_crew.batches.rows import BadRowsError, Checked, RowJob, RowPlan
from prefect_crew.blocks import DeployedCrew
from prefect_crew.interrupts import watch_ctrl_c
from prefect_crew.logs import run_logger
from prefect_crew.outcomes import typed
from prefect_crew.records import RecordPhase
from prefect_crew.redaction import MASK
from prefect_crew.sessions import CrewSession
from prefect_crew.stopping import cancellation_asked, cancelled_meanwhile, flow_run_id

__all__ = ["BatchJob", "expected_inputs"]

TICK = 1.0
"""Seconds between two looks at how the batch stands."""
STOP_WITHIN = 20.0
_ENDED = {str(state) for state in CrewState if state.ended}


async def expected_inputs(session: CrewSession) -> list[CrewInput]:
    """Return what the crew names as its inputs; empty where it does not say.

    Raises:
        AuthenticationError: The token is refused, also after a reload of a stored block.
    """
    try:
        return await session.client.inputs()
    except AuthenticationError:
        if not await session.renew():
            raise
        return await session.client.inputs()
    except CrewError as error:
        run_logger().warning("The crew's inputs are not known, so rows are not checked for them: %s", error)
        return []


class _Chunk:
    """Rows for one task. A plain class, so that Prefect does not look through thousands of parameters."""

    def __init__(self, engine: Engine, jobs: Sequence[RowJob]) -> None:
        self.engine = engine
        self.jobs = jobs

    @property
    def label(self) -> str:
        first, last = self.jobs[0].number + 1, self.jobs[-1].number + 1
        return f"row {first}" if first == last else f"rows {first}-{last}"


def _chunk_name(parameters: dict[str, Any]) -> str:
    return cast("_Chunk", parameters["chunk"]).label


@task(cache_policy=NO_CACHE, tags=["prefect-crew"], task_run_name=cast("Any", _chunk_name))
async def run_rows(chunk: _Chunk) -> None:
    """Run some rows of a batch."""
    await chunk.engine.run(chunk.jobs)


class BatchJob:
    """A batch under way in this process."""

    def __init__(
        self, crew: DeployedCrew, dataset: Dataset, options: BatchOptions, *, name: str, output: str, ledger: str | None
    ) -> None:
        self.crew = crew
        self.dataset = dataset
        self.options = options
        self.name = name
        self.output = output
        self.ledger_url = ledger_url(ledger, output)
        self._held: dict[int, dict[str, Any]] = {}
        self._next = 0

    @property
    def ledger_exists(self) -> bool:
        """Whether there is a ledger to look into; one that is reached by URL may be there."""
        if not self.ledger_url.startswith("sqlite"):
            return True
        return Path(self.ledger_url.partition(":///")[2]).exists()

    async def run(self) -> BatchReport:
        """Run it to its end and report.

        Raises:
            CrewError: It could not be begun, or the ledger or the output failed on the way.
        """
        started = time.monotonic()
        pace = Pace(kickoffs_per_second=self.options.kickoffs_per_second)
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(CrewSession(self.crew, lambda crew: BatchClient(crew, pace)))
            plan = self.plan(await expected_inputs(session))
            checked = await asyncio.to_thread(plan.check)
            if checked.bad and self.options.on_bad_row == "refuse":
                raise BadRowsError(checked.bad, checked.bad_count, source=self.dataset.name)
            ledger = await stack.enter_async_context(Ledger(self.ledger_url, self.name))
            await bind(
                ledger,
                crew_url=self.crew.url,
                fingerprint=checked.fingerprint,
                total=checked.total,
                go_on=self.options.on_change == "continue",
            )
            await self._limit(stack)
            output = OutputFile(self.output, spool=self._spool())
            output.open(self._keeps)
            standing = Standing(total=checked.total, set_aside=checked.bad_count)
            artifacts = BatchArtifacts(self.name, self.crew.label)
            engine = self._engine(session, ledger, standing, output)
            try:
                await self._watched(engine, plan.jobs(), standing, artifacts)
            finally:
                self._write_held(output)
                output.close()
            await asyncio.to_thread(output.finish, output_type=self.options.output_type)
            report = self._report(checked, standing, engine, time.monotonic() - started)
            await artifacts.end(standing, report, self.crew.price)
        run_logger().info("%s", report)
        return report

    def plan(self, expected: Sequence[CrewInput]) -> RowPlan:
        """Return how the rows become runs."""
        return RowPlan(
            dataset=self.dataset,
            inputs=self.options.inputs,
            key=self.options.key,
            expected=expected,
            as_json=self.crew.inputs_as_json,
            deduplicate=self.options.deduplicate,
        )

    def _spool(self) -> Path | None:
        """Return where the lines grow until the end, for an output that cannot grow in its place."""
        if self.ledger_url.startswith("sqlite"):
            return Path(self.ledger_url.partition(":///")[2]).with_suffix(".lines.jsonl")
        return Path.cwd() / f".{self.name}.lines.jsonl".replace("/", "_")

    def _keeps(self, key: str, state: str) -> bool:
        """Say whether a line of an earlier call stays: only that of a row that is not run again."""
        del key
        return state in _ENDED and (state == str(CrewState.COMPLETED) or not self.options.retry_failed)

    def _engine(self, session: CrewSession, ledger: Ledger, standing: Standing, output: OutputFile) -> Engine:
        options = self.options
        context = FlowRunContext.get()
        flow_run = None if context is None else context.flow_run

        async def ended(end: RowEnd) -> None:
            error = None if end.error is None else str(end.error)
            kind = None if end.error is None else type(end.error).__name__
            if error is None and end.record is not None:
                error = end.record.error
                kind = "CrewFailedError" if error else None
            standing.take(end.job.key, end.record, error, kind, found=end.found)
            self._put(end, error, output)

        return Engine(
            self.crew,
            session,
            ledger,
            EngineOptions(
                wait=options.wait or self.crew.wait,
                max_in_flight=options.max_in_flight,
                retries=options.retries,
                retry_failed=options.retry_failed,
                max_kickoffs=options.max_kickoffs,
                stop_when=options.stop_when,
                output_type=options.output_type,
                meta={**(options.meta or {}), "batch": self.name},
            ),
            ended=ended,
            flow_run_id=None if flow_run is None else str(flow_run.id),
            flow_run_count=0 if flow_run is None else flow_run.run_count,
        )

    # The output.

    def _put(self, end: RowEnd, error: str | None, output: OutputFile) -> None:
        line = self._line(end, error)
        if self.options.order == "ended":
            if line is not None:
                output.write(line)
            return
        self._held[end.job.number] = line or {}
        while self._next in self._held:
            held = self._held.pop(self._next)
            self._next += 1
            if held:
                output.write(held)

    def _write_held(self, output: OutputFile) -> None:
        """Write what still waits for a row before it that did not end."""
        for number in sorted(self._held):
            if self._held[number]:
                output.write(self._held[number])
        self._held.clear()

    def _line(self, end: RowEnd, error: str | None) -> dict[str, Any] | None:
        """Return a row's line; None for an uncertain one, which has no end yet."""
        record, job = end.record, end.job
        if record is not None and record.phase is RecordPhase.UNCERTAIN:
            return None
        inputs = {name: MASK if name in self.crew.secret_inputs else value for name, value in job.inputs.items()}
        if record is None:
            return {"key": job.key, "inputs": inputs, "state": "not-started", "tasks": [], "error": error}
        line = line_of(job.key, inputs, record)
        if end.error is not None:
            line["error"] = error
            line["data"] = None
        elif self.options.output_type is not None and record.result is not None and record.kickoff_id is not None:
            data = typed(record.result.result(record.kickoff_id), self.options.output_type).data
            line["data"] = data.model_dump(mode="json")
        return line

    # Running.

    async def _watched(
        self, engine: Engine, jobs: Iterator[RowJob], standing: Standing, artifacts: BatchArtifacts
    ) -> None:
        """Run all rows; on a cancellation do what `on_cancel` says, if somebody asked for it."""
        work = asyncio.ensure_future(self._run_rows(engine, jobs))
        watch = asyncio.ensure_future(self._tick(engine, standing, artifacts, work))
        with watch_ctrl_c():
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                await self._cancelled(engine, work)
                raise
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)

    async def _run_rows(self, engine: Engine, jobs: Iterator[RowJob]) -> None:
        size = 1 if self.options.task_per_row else self.options.chunk_size
        room = asyncio.Semaphore(self.options.max_in_flight // size + 2)
        running: set[asyncio.Task[None]] = set()

        async def chunk(rows: Sequence[RowJob]) -> None:
            try:
                await run_rows(_Chunk(engine, rows))
            finally:
                room.release()

        try:
            while engine.stopped is None:
                await room.acquire()
                rows = await asyncio.to_thread(lambda: list(islice(jobs, size)))
                if not rows:
                    break
                failed = [one for one in running if one.done() and not one.cancelled() and one.exception()]
                running = {one for one in running if not one.done() or one in failed}
                if failed:
                    break
                running.add(asyncio.ensure_future(chunk(rows)))
            await asyncio.gather(*running)
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _tick(
        self, engine: Engine, standing: Standing, artifacts: BatchArtifacts, work: asyncio.Future[None]
    ) -> None:
        own = flow_run_id()
        while True:
            await asyncio.sleep(TICK)
            standing.in_flight = engine.tally.in_flight
            await artifacts.progress(standing)
            if await cancelled_meanwhile(own):
                engine.stop("this flow run was cancelled.")
                work.cancel()
                return

    async def _cancelled(self, engine: Engine, work: asyncio.Future[None]) -> None:
        engine.stop("the batch was cancelled.")
        try:
            asked = await asyncio.wait_for(cancellation_asked(flow_run_id()), STOP_WITHIN / 2)
        except (httpx.HTTPError, PrefectException, TimeoutError, asyncio.TimeoutError):
            asked = False
        if asked and self.options.on_cancel == "drain":
            await asyncio.shield(work)
            return
        in_flight = dict(engine.in_flight)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        if not asked or self.options.on_cancel != "stop":
            run_logger().warning(
                "%d rows of batch %s are left in flight; the same name finds them again.", len(in_flight), self.name
            )
            return
        try:
            await asyncio.wait_for(engine.stop_all(in_flight), STOP_WITHIN)
        except (TimeoutError, asyncio.TimeoutError):
            run_logger().warning("Not every row in flight could be stopped in %.0f s.", STOP_WITHIN)

    async def _limit(self, stack: AsyncExitStack) -> None:
        """Hold slots of the crew's shared limit for as many rows as are in flight at once."""
        limit = self.crew.concurrency_limit
        if limit is None:
            return
        from prefect.concurrency.asyncio import concurrency

        async with get_client() as client:
            try:
                found = await client.read_global_concurrency_limit_by_name(limit)
            except ObjectNotFound:
                raise ConfigurationError(
                    f"Crew {self.crew.label} names the concurrency limit {limit!r}, which does not exist: "
                    f"prefect gcl create {limit} --limit N."
                ) from None
        if self.options.max_in_flight > found.limit:
            raise ConfigurationError(
                f"max_in_flight is {self.options.max_in_flight}, and crew {self.crew.label} allows {found.limit} runs "
                f"in flight in all (concurrency limit {limit!r}). Give max_in_flight={found.limit} or less."
            )
        await stack.enter_async_context(concurrency(limit, occupy=self.options.max_in_flight, strict=True))

    def _report(self, checked: Checked, standing: Standing, engine: Engine, seconds: float) -> BatchReport:
        total = checked.total + checked.bad_count
        return BatchReport(
            name=self.name,
            total=total,
            completed=standing.completed,
            failed=standing.failed,
            uncertain=standing.uncertain,
            skipped=total - standing.done,
            seconds=seconds,
            output=self.output,
            stopped=None if engine.stopped is None else str(engine.stopped),
            kickoffs=engine.tally.kickoffs,
            uncertain_keys=tuple(standing.uncertain_keys),
            errors=dict(standing.errors),
            usage=standing.tokens,
        )
