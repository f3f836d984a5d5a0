"""`run_batch`: run a crew for each row of a data set, with an export and a report."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, cast

from prefect import flow
from prefect.context import FlowRunContext, TaskRunContext
from prefect.states import Failed
from pydantic import BaseModel

from prefect_crew._internal.asyncio_tasks import cancelled_once, sync_version
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, naming_prefect_away
from prefect_crew.artifacts.events import emit_batch
from prefect_crew.batches.batch import pages_of, since_pass
from prefect_crew.batches.dataset import Dataset, open_dataset, shown_address, whole_address
from prefect_crew.batches.hold import Hold
from prefect_crew.batches.options import IN_FLIGHT, BatchOptions, InputsFrom, KeyFrom, OnFailure, stored_call
from prefect_crew.batches.output import KEPT, open_output
from prefect_crew.batches.report import BatchArtifact, BatchPlan, BatchReport, OnProgress, Phase, Tally
from prefect_crew.batches.rows import BadRows, RowPlan, expected_inputs
from prefect_crew.batches.runner import Runner
from prefect_crew.batches.tables import SQL, open_query
from prefect_crew.batches.throttle import BatchClient, Throttle
from prefect_crew.blocks import DeployedCrew, load_crew
from prefect_crew.budgets import Budget
from prefect_crew.crew import Crew, CrewSession, WaitPolicy
from prefect_crew.exceptions import (
    BatchBusyError,
    ConfigurationError,
    CrewError,
    FlowRunCancelledError,
    StoreError,
)
from prefect_crew.prices import cost_of
from prefect_crew.runs.budgets import allowances
from prefect_crew.runs.database import in_store
from prefect_crew.runs.keys import render_key, scheduled_start
from prefect_crew.store import batches
from prefect_crew.store.batches import Batch, BatchUse, Counts
from prefect_crew.store.decision import AttemptState

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks


MAX_NAME = 200
"""Characters of a batch's name."""
EXPORT_WITHIN = 10.0
"""Seconds for writing the output of a batch that was cancelled. Later the output stays unwritten."""
GUARD_WITHIN = 25.0
"""Seconds for the look whether the batch is still this process's, before its export is changed."""


@naming_prefect_away("Make the same call again, which goes on where this call stopped.")
async def arun_batch(
    crew: DeployedCrew | str,
    dataset: Any,
    *,
    name: str,
    export: str,
    key: KeyFrom | None = None,
    session: KeyFrom | None = None,
    inputs: InputsFrom | None = None,
    max_in_flight: int | None = None,
    kickoffs_at_once: int = 64,
    on_failure: OnFailure = "continue",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    breaker: int | None = 20,
    wait: WaitPolicy | None = None,
    output_type: type[BaseModel] | None = None,
    meta: Mapping[str, Any] | None = None,
    webhooks: Webhooks | None = None,
    budgets: Sequence[Budget] = (),
    rows: str | None = None,
    on_progress: OnProgress | None = None,
) -> BatchReport:
    """Run a crew once for each row of a data set. A second call with the name goes on where the first stopped.

    Rows are matched by key. New ones run, completed ones keep their result, or are conflicts if their inputs are others
    now, failed ones are started again up to the crew's `max_attempts`, and uncertain ones wait for a person. The call
    checks every row before the first kickoff. Outside of a flow, it runs a flow of its own, which fails unless all rows
    completed. Cancelling the flow run stops the runs in flight.

    Args:
        crew: A crew, or the name of a stored block.
        dataset: CSV, TSV, JSON Lines, JSON or Parquet by path, URL or fsspec address; `sql://BLOCK?query=…`, the rows
            of a query in the database of a SQLAlchemy block; an iterable of mappings or named rows; a pandas or polars
            data frame, or an Arrow table.
        name: The batch's name. The name, `export` and an address as `dataset` may be templates over the scheduled time:
            `leads-{scheduled_start:%Y-%m-%d}`.
        export: The path or address of its lines, in the order of the rows: JSON Lines or CSV, compressed by its
            ending. Or `sql://BLOCK/TABLE`, a table of these columns and `batch`. It is written at the end,
            and when the batch stops; `prefect-crew batch export` writes it at any time. A line has key, inputs, state,
            output, data, tasks, kickoff_id, seconds, usage, error and crew_version.
        key: A column or a function of the row; left out, a digest of the inputs and the number of equal rows before.
        session: A column or a function of the row that names the session of its run, as for `run_crew`; empty: none.
            The rows of one session run one after the other.
        inputs: How a row becomes inputs: a function of the row, or by name a column, a template over the columns, a
            function of the row, or a constant that is not text; left out, the columns named like the crew's inputs.
        max_in_flight: Runs in flight at once, 100 if left out.
        kickoffs_at_once: Kickoffs under way at a time. At most so many rows are uncertain if the process dies.
        on_failure: "continue", "stop" at the first failed row, or a limit after which the batch stops: a number of
            failed rows, or a share below 1 of the rows that have ended.
        on_bad_row: "refuse" the data set, or "skip" the rows that cannot be run.
        breaker: The batch stops after so many failed rows in a row; None: never. The same call goes on.
        wait: The policy to wait, in place of the crew's. Left out, the first poll comes when runs usually end.
        output_type: A pydantic model for `data`; a result that does not fit makes a failed row with its reason.
        meta: Any JSON object for the crew's webhooks; idempotency key and batch are added to it.
        webhooks: Targets of your own for the crew's webhooks.
        budgets: Limits for all rows together, in addition to the block's budgets. Rows without room in a budget are not
            started; the same call goes on with them.
        rows: A range START:STOP of row numbers from 0, the last one excluded, such as "0:500000" or "500000:", not for
            a query. A data set over several machines is several batches over ranges of it, each with a name and an
            export of its own.
        on_progress: Called with a `BatchReport` about once a second. It must be quick and must not raise.

    Returns:
        The counts of rows by their states, the kickoffs, usage and cost, and the export. A failed row raises nothing:
        `report.ok` is True if all rows completed.

    Raises:
        DatasetError: The data set cannot be read, or rows cannot be run. Nothing was started.
        ConfigurationError, BatchBusyError: The batch is another crew's, or another process runs it now.
        CrewError: The crew database or the export failed on the way; the same call goes on.
        CrewError: The crew refused the token, or the options make no sense. Nothing was started.
    """
    options = BatchOptions(**{name: value for name, value in locals().items() if name in BatchOptions.model_fields})
    job = await _batch_job(crew, dataset, options, name, export)
    del dataset  # its rows may hold secrets, and error reporters show the local variables of all frames

    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        return await _run_job(job, on_progress)
    reports = list[BatchReport]()

    # Prefect stores parameters. This function carries all that must not or cannot be stored.
    @wraps(run_batch_flow.fn)
    async def run_as_flow(*_: Any, **__: Any) -> Any:
        reports.append(await _run_job(job, on_progress))
        return reports[0] if reports[0].ok else Failed(message=str(reports[0]))

    own_flow = run_batch_flow.with_options()
    own_flow.fn = run_as_flow
    names = {"crew": job.crew.label, "dataset": job.dataset.name, "export": shown_address(job.export)}
    state = await cast("Any", own_flow)(batch=job.name, **names, return_state=True)
    return reports[0] if reports else await state.result()


run_batch = sync_version(arun_batch)


@flow(name="run-batch", flow_run_name="{batch}")
async def run_batch_flow(batch: str, crew: str, dataset: str, export: str) -> BatchReport:
    """Run the batch of a call of `run_batch` outside of a flow. The parameters are only for Prefect's page."""
    del crew, dataset, export
    raise ConfigurationError(
        f"Batch {batch!r} was defined in Python and cannot be retried from this run's parameters. Call run_batch "
        "again with the same name, which continues where the batch stopped, or retry a flow of yours around the call."
    )


@cancelled_once
async def _run_job(job: BatchJob, on_progress: OnProgress | None) -> BatchReport:
    try:
        async with AsyncExitStack() as stack:
            batch = _Call(job, on_progress)
            await batch.open(stack)
            report = await batch.run()
    except FlowRunCancelledError as error:
        emit_batch("cancelled", job.name, job.crew.label, reason=str(error))
        raise
    except BatchBusyError:  # it has not ended
        raise
    except CrewError as error:
        emit_batch("failed", job.name, job.crew.label, reason=str(error))
        raise
    facts = {
        name: getattr(report, name) for name in ("total", "completed", "failed", "uncertain", "skipped", "stopped")
    }
    emit_batch("completed" if report.ok else "failed", job.name, job.crew.label, reason=str(report), **facts)
    return report


@naming_prefect_away("Nothing was started.")
async def aplan_batch(
    crew: DeployedCrew | str,
    dataset: Any,
    *,
    name: str = "plan",
    export: str = "batch.jsonl",
    seconds_per_run: float | None = None,
    key: KeyFrom | None = None,
    session: KeyFrom | None = None,
    inputs: InputsFrom | None = None,
    max_in_flight: int | None = None,
    rows: str | None = None,
) -> BatchPlan:
    """Read the data set, check every row, and return the number of rows, the time and the cost. Nothing is started.

    `seconds_per_run` is the duration of one run; left out, the mean of the batch's completed runs. The rest is as for
    `arun_batch`. Rows that cannot be run are in the plan.

    Raises:
        CrewError: The data set cannot be read, the crew refused the token, or the options make no sense.
    """
    options = BatchOptions(key=key, session=session, inputs=inputs, max_in_flight=max_in_flight, rows=rows)
    job = await _batch_job(crew, dataset, options, name, export)
    async with CrewSession(job.crew) as crew_session:
        plan = RowPlan(job.dataset, options, job.crew, await expected_inputs(crew_session))
    rows_to_run, bad = await asyncio.to_thread(plan.check)
    counts = await in_store(batches.count_rows, job.name)
    use = await in_store(batches.use_of_batch, job.name)
    duration, each = use.seconds if seconds_per_run is None else seconds_per_run, cost_of(job.crew.price, None)
    if each is None and use.runs_with_cost:
        each = use.cost / use.runs_with_cost
    done = min(rows_to_run, counts.get(AttemptState.COMPLETED, 0))
    rest, most = rows_to_run - done, rows_at_once(job.crew, options)
    return BatchPlan(
        name=job.name,
        rows=rows_to_run,
        done=done,
        bad=bad.rows,
        bad_count=bad.count,
        max_in_flight=most,
        seconds=None if duration is None else -(-rest // most) * duration,
        price=None if each is None else each * rest,
    )


plan_batch = sync_version(aplan_batch)


@dataclass(frozen=True)
class BatchJob:
    """A call of a batch, with its templates filled."""

    crew: Crew
    dataset: Dataset
    options: BatchOptions
    name: str
    export: str


async def _batch_job(crew: DeployedCrew | str, dataset: Any, options: BatchOptions, name: str, export: str) -> BatchJob:
    """Return a call that is ready to be run or planned. Raises ConfigurationError, DatasetError."""
    moment = await scheduled_start()
    full, where = render_key(name, moment), render_key(str(export), moment)
    if not full.strip() or len(full) > MAX_NAME or not full.isprintable():
        raise ConfigurationError(f"A batch needs a printable name of 1 to {MAX_NAME} characters, not {full[:60]!r}.")

    def render(text: str) -> str:
        return render_key(text, moment) if "{scheduled_start" in text else text

    if isinstance(dataset, str) and dataset.startswith(SQL):
        if options.rows is not None:
            raise ConfigurationError(
                "rows= is no option for a query: a second machine would run the query again and number other rows. Put "
                "the range into the WHERE of the query. Nothing was started."
            )
        rows = await open_query(dataset, render)
    else:
        rows = open_dataset(render(dataset) if isinstance(dataset, str) else dataset)
    loaded_crew = (await load_crew(crew)).under(options.budgets, name=full, batch=full)
    allowances(loaded_crew, full)  # raises for a budget without an estimate
    return BatchJob(loaded_crew, rows, options, full, where)


def rows_at_once(crew: Crew, options: BatchOptions) -> int:
    """Return how many rows may be in flight at once: no more than the crew's limit."""
    return min(options.max_in_flight or IN_FLIGHT, crew.concurrency_limit or options.max_in_flight or IN_FLIGHT)


class _Call:
    """One call of a batch."""

    def __init__(self, job: BatchJob, on_progress: OnProgress | None) -> None:
        self.job = job
        self.on_progress = on_progress
        self.throttle = Throttle(job.options)
        self.session = CrewSession(job.crew, lambda crew: BatchClient(crew, job.options.kickoffs_at_once))
        self.output = open_output(job.export, job.name, output_type=job.options.output_type)
        self.hold = Hold(job.name)
        self.tally = Tally()
        self.artifact = BatchArtifact(job.name, job.crew)
        self.total, self.bad = 0, BadRows()
        self.counts: Counts = {}
        self.count_after = 0.0
        self.call: dict[str, Any] = {}

    async def open(self, stack: AsyncExitStack) -> None:
        """Check the rows, and take the batch. Raises CrewError."""
        job = self.job
        self._tell("checking")
        await stack.enter_async_context(self.session)
        expected = await expected_inputs(self.session)
        self.plan = RowPlan(job.dataset, job.options, job.crew, expected)
        before = await in_store(batches.get_batch, job.name)
        if before is not None:  # known before its rows are read, which may take minutes
            await self._take(stack, before)
        version = await self.session.version()
        self.session.crew = replace(self.session.crew, version=version)
        await self._check_rows(before)
        if before is None:
            before = await in_store(batches.open_batch, job.name, crew_url=job.crew.url, total=self.total)
            await self._take(stack, before)
        before = self.hold.batch
        earlier: Mapping[str, Any] = before.call or {}
        if version and earlier.get("crew_version") not in (None, version):
            text = "Batch %s: its crew was deployed anew (version %s, before %s). Rows that have completed stay."
            run_logger().info(text, job.name, version, earlier["crew_version"])
        stored = stored_call(
            crew=job.crew.block,
            secret_inputs=job.crew.secret_inputs,
            dataset=job.dataset.address,
            export=job.export,
            options=job.options,
        )
        self.call = {
            **stored,
            "whole_pass": since_pass(before),
            "crew_version": version or earlier.get("crew_version"),
        }
        bad = asdict(self.bad) if self.bad.count else None
        await self._change(total=self.total, call=self.call, bad_rows=bad)

    async def _take(self, stack: AsyncExitStack, before: Batch) -> None:
        if before.crew_url != self.job.crew.url:
            raise ConfigurationError(
                f"Batch {self.job.name!r} began with another crew: {before.crew_url}, not {self.job.crew.url}. Nothing "
                "was started. Choose another name."
            )
        await stack.enter_async_context(self.hold)

    async def _check_rows(self, before: Batch | None) -> None:
        """Check the output, and every row. Raises CrewError."""
        job = self.job
        await self.output.open()
        known = () if before is None else before.exported or ()
        await asyncio.to_thread(self.output.check, is_new=whole_address(job.export) not in known)
        self.total, self.bad = await asyncio.to_thread(self.plan.check)
        if self.bad.count and (job.options.on_bad_row == "refuse" or not self.total):
            raise self.bad.error(job.dataset.name, alone=not self.total)
        self.hold.check()

    async def _change(self, **values: Any) -> None:
        if not await in_store(batches.change_batch, self.job.name, self.hold.owner, **values):
            raise BatchBusyError(name=self.job.name)

    async def run(self) -> BatchReport:
        """Run the rows that are not done, write the output, and report. Raises CrewError."""
        await self._count()
        self.kickoffs_before = (await in_store(batches.use_of_batch, self.job.name)).runs
        try:
            self.hold.check()
            await self._run_rows()
            self.hold.check()
        except BaseException as error:
            self.hold.stopped_because = str(error) or type(error).__name__
            if not isinstance(error, StoreError | BatchBusyError):
                await self._export_in_time()
            await self.artifact.update(await self._last_report(), self.tally.failures)
            raise
        self.hold.stopped_because = self.throttle.stopped
        self._tell("finishing")
        await self._count()
        await self._export()
        report = await self._last_report()
        if self.on_progress is not None:
            self.on_progress(report)
        await self.artifact.update(report, self.tally.failures)
        run_logger().info("%s", report)
        return report

    async def _export(self) -> None:
        """Write the output, while the batch is this process's."""
        address, loop = whole_address(self.job.export), asyncio.get_running_loop()

        def guard() -> None:
            asyncio.run_coroutine_threadsafe(self.hold.renew(), loop).result(GUARD_WITHIN)

        # The file may have come into being since the start, by another batch, or by `batch export` of this one.
        entry = await in_store(batches.get_batch, self.job.name)
        is_new = entry is None or address not in (entry.exported or ())
        await asyncio.to_thread(self.output.check, is_new=is_new, advice="move it away", consequence=KEPT)
        await in_store(batches.note_export, self.job.name, address)  # before the file exists: it is then known
        lines = await self.output.write(pages_of(entry or self.hold.batch, self.session), guard)
        self.tally.misfits = max(self.tally.misfits, lines["invalid-output"])

    async def _export_in_time(self) -> None:
        """Write the output of a batch that was cancelled or has failed, within `EXPORT_WITHIN` seconds: Prefect soon
        kills a cancelled process."""
        try:
            await self._count()
            await asyncio.wait_for(self._export(), EXPORT_WITHIN)
        except (CrewError, *PREFECT_ERRORS, TimeoutError) as error:
            run_logger().warning(
                "The export of batch %s was not written (%s). To write it, run: prefect-crew batch export %s",
                self.job.name,
                error or "it takes long",
                shlex.quote(self.job.name),
            )

    async def _run_rows(self) -> None:
        job, hold = self.job, self.hold
        runner = Runner(
            self.session,
            self.throttle,
            hold,
            job.options,
            max_in_flight=rows_at_once(job.crew, job.options),
            on_end=self.tally.add,
        )
        hold.on_end = lambda: (
            runner.stop("another process has taken the batch over.", shut=True) if hold.is_lost else None
        )
        await runner.run_until_cancelled(self.plan.jobs(), lambda: self._tick(runner))
        if runner.is_whole and not hold.is_lost:
            # From now on, rows that have left the data set do not count.
            self.call["whole_pass"] = hold.batch.passes
            await self._change(call=self.call)

    # What people see

    async def _tick(self, runner: Runner) -> None:
        """Show the progress, about once a second."""
        if time.monotonic() > self.count_after:
            await self._count()
        runs = [*runner.waiting.values()]
        people = sum(run.attempt is not None and run.attempt.human_since is not None for run in runs)
        report = self._tell("running", people=people)
        await self.artifact.update(report, self.tally.failures)

    async def _count(self) -> None:
        """Count the rows by state, which may take long where there are millions."""
        began, since = time.monotonic(), self.call["whole_pass"]
        self.counts = await in_store(batches.count_rows, self.job.name, since_pass=since)
        self.count_after = time.monotonic() + max(1.0, 20 * (time.monotonic() - began))

    def _report(self, phase: Phase, use: BatchUse | None = None, **more: Any) -> BatchReport:
        facts = {"name": self.job.name, "total": self.total + self.bad.count, "export": self.output.name}
        return BatchReport.of(
            self.counts, self.tally, self.bad, use, phase=phase, **facts, stopped=self.throttle.stopped, **more
        )

    def _tell(self, phase: Phase, **more: Any) -> BatchReport:
        report = self._report(phase, **more)
        if self.on_progress is not None:
            self.on_progress(report)
        return report

    async def _last_report(self) -> BatchReport:
        with suppress(StoreError, *PREFECT_ERRORS):  # the error that ended the batch is raised
            use = await in_store(batches.use_of_batch, self.job.name)
            return self._report("done", use, kickoffs=use.runs - self.kickoffs_before)
        return self._report("done")
