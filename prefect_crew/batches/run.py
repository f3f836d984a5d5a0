"""`run_batch`: a data set in, a crew run a row, a ledger that forgets nothing, a report."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Annotated, Any, cast

from prefect import flow
from prefect.context import FlowRunContext, TaskRunContext
from pydantic import Field

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.batches.datasets import Dataset, DatasetFormat, open_dataset
from prefect_crew.batches.job import BatchJob, expected_inputs
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.report import BatchPlan, BatchReport
from prefect_crew.blocks import DeployedCrew
from prefect_crew.dual import refuse_running_loop
from prefect_crew.run_keys import render_run_key, scheduled_start
from prefect_crew.sessions import CrewSession
from prefect_crew.tasks import loaded

__all__ = ["aplan_batch", "arun_batch", "plan_batch", "run_batch", "run_rows_of"]

_live: ContextVar[BatchJob | None] = ContextVar("prefect_crew_batch", default=None)


async def arun_batch(
    crew: DeployedCrew | str,
    dataset: Any,
    *,
    name: str,
    output: str,
    ledger: str | None = None,
    format: DatasetFormat | None = None,  # noqa: A002
    encoding: str = "utf-8-sig",
    **options: Any,
) -> BatchReport:
    """Run a crew once for each row of a data set. A second call with the name goes on where the first stopped.

    Rows that are done are not run again, rows in flight are waited for, uncertain ones are listed and can be settled.
    Every row is checked before anything is kicked off.

    Args:
        crew: A crew, or the name of a stored block.
        dataset: CSV, TSV, JSON Lines, JSON or Parquet by path, URL or fsspec address; an iterable of mappings; a pandas
            or polars data frame; an Arrow table.
        name: The batch's name, which may be a template over the scheduled time: `leads-{{ scheduled_start:%Y-%m-%d }}`.
        output: The path or address of its lines: JSON Lines that grow, or `.parquet` at the end. A line has key,
            inputs, state, output, data, tasks, kickoff_id, seconds, usage and error.
        ledger: A path or a URL of SQLite or PostgreSQL; left out, a file beside a local output.
        format, encoding: Those of a file whose name does not tell.
        options: As BatchOptions has them.

            - `inputs`: how a row becomes inputs: by name, a template over its columns, a column's name, or a function
              of the row; left out, the columns of the crew's names.
            - `key`: a column or a function; left out, a digest of the inputs plus the occurrence number.
              `deduplicate`: equal rows are one run.
            - `max_in_flight` (100), `kickoffs_per_second`, `max_kickoffs` in all, `wait`, `meta`.
            - `on_failure`: "continue", "stop", how many rows may fail, or which share below 1.
            - `retries`: further purchases of a failed row, in all or by the class of its error, never beyond the crew's
              `max_kickoffs`. `retry_failed`: buy the failed rows of earlier calls again.
            - `on_bad_row`: "refuse" or "set-aside" rows that cannot be run.
            - `on_change`: "refuse" or "continue" when the rows or the crew are others than before.
            - `on_cancel`: "stop", "drain" or "leave" what is in flight when the flow run is cancelled.
            - `order`: "ended" or "input".
            - `output_type`: a pydantic model for `data`; what does not fit is a failed row with its reason.
            - `chunk_size` (200) rows a Prefect task; `task_per_row` for small sets that people want to watch.

    Raises:
        DatasetError, BadRowsError: The data set cannot be read, or rows cannot be run. Nothing was started.
        BatchChangedError, LedgerMissingError: The name belongs to something else. Nothing was started.
        LedgerError, OutputError: They failed on the way; the same name goes on.
        CrewError: The crew refused the token, or the options make no sense.
    """
    job = await _job(crew, dataset, name, output, ledger, format, encoding, options)
    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        return await job.run()
    token = _live.set(job)
    try:
        return await cast("Any", run_rows_of)(
            batch=job.name, crew=job.crew.label, dataset=job.dataset.name, output=output
        )
    finally:
        _live.reset(token)


def run_batch(crew: DeployedCrew | str, dataset: Any, *, name: str, output: str, **options: Any) -> BatchReport:
    """Run a crew once for each row of a data set: `arun_batch` for sync code.

    Raises:
        RuntimeError: An event loop runs in this thread, which this call would block: await `arun_batch` there.
        CrewError: As `arun_batch`.
    """
    refuse_running_loop("run_batch", "arun_batch")
    return asyncio.run(arun_batch(crew, dataset, name=name, output=output, **options))


@flow(name="run-batch", flow_run_name="{batch}")
async def run_rows_of(
    batch: Annotated[str, Field(description="The batch's name.")],
    crew: Annotated[str, Field(description="The crew.")],
    dataset: Annotated[str, Field(description="The data set.")],
    output: Annotated[str, Field(description="Where the lines go.")],
) -> BatchReport:
    """Run a batch that `run_batch` was called with outside of a flow."""
    del crew, dataset, output
    job = _live.get()
    if job is None:
        raise ConfigurationError(
            f"Batch {batch!r} was given by code and cannot be made from this run's parameters. Call run_batch again "
            "with the same name, which goes on where it stopped, or write a flow around it and retry that."
        )
    return await job.run()


async def aplan_batch(
    crew: DeployedCrew | str,
    dataset: Any,
    *,
    name: str,
    output: str = "batch.jsonl",
    ledger: str | None = None,
    format: DatasetFormat | None = None,  # noqa: A002
    encoding: str = "utf-8-sig",
    seconds_per_run: float | None = None,
    **options: Any,
) -> BatchPlan:
    """Read the data set, check every row, and say how many, how long and how much. Nothing is started.

    `seconds_per_run` is the duration of one run; left out, the mean of what the ledger has seen. The rest is as for
    `arun_batch`.
    """
    job = await _job(crew, dataset, name, output, ledger, format, encoding, options)
    async with CrewSession(job.crew) as session:
        plan = job.plan(await expected_inputs(session))
    checked = await asyncio.to_thread(plan.check)
    done, seen = 0, None
    if job.ledger_exists:
        async with Ledger(job.ledger_url, job.name) as book:
            done, seen = await book.past()
    duration = seconds_per_run if seconds_per_run is not None else seen
    left = max(checked.total - done, 0)
    limit = job.options.max_in_flight
    return BatchPlan(
        name=job.name,
        rows=checked.total,
        done=done,
        bad=checked.bad,
        bad_count=checked.bad_count,
        duplicates=checked.duplicates,
        max_in_flight=limit,
        seconds=None if duration is None else -(-left // limit) * duration,
        price=None if job.crew.price is None else job.crew.price * left,
    )


def plan_batch(crew: DeployedCrew | str, dataset: Any, *, name: str, **options: Any) -> BatchPlan:
    """`aplan_batch` for sync code."""
    refuse_running_loop("plan_batch", "aplan_batch")
    return asyncio.run(aplan_batch(crew, dataset, name=name, **options))


async def _job(
    crew: DeployedCrew | str,
    dataset: Any,
    name: str,
    output: str,
    ledger: str | None,
    kind: DatasetFormat | None,
    encoding: str,
    options: Mapping[str, Any],
) -> BatchJob:
    try:
        chosen = BatchOptions(**options)
    except TypeError as error:
        raise ConfigurationError(f"run_batch: {str(error).replace('BatchOptions.__init__() ', '')}.") from None
    rows = dataset if isinstance(dataset, Dataset) else open_dataset(dataset, format=kind, encoding=encoding)
    full = render_run_key(name, await scheduled_start())
    if not full.strip() or len(full) > 200:
        raise ConfigurationError(f"A batch needs a name of 1 to 200 characters, {full[:60]!r} has {len(full)}.")
    return BatchJob(await loaded(crew), rows, chosen, name=full, output=output, ledger=ledger)
