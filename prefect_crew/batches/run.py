"""`run_batch`: a data set in, a crew run a row, a ledger that forgets nothing, a report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from prefect import flow
from prefect.context import FlowRunContext, TaskRunContext
from pydantic import BaseModel, Field

from prefect_crew._internal.callables import sync_version
from prefect_crew._internal.interrupts import cancelled_once
from prefect_crew.batches.batch import BatchJob, open_batch, plan_of
from prefect_crew.batches.database import check_adoptable, ledger_address
from prefect_crew.batches.dataset import Dataset, DatasetFormat, open_dataset
from prefect_crew.batches.options import KICKOFFS_AT_ONCE, BatchOptions, OnFailure, Retries, plain_call
from prefect_crew.batches.progress import OnProgress
from prefect_crew.batches.report import BatchPlan, BatchReport
from prefect_crew.batches.rows import InputsFrom, KeyFrom
from prefect_crew.blocks import DeployedCrew, load_crew
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.records.keys import render_key, scheduled_start

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks


MAX_NAME = 200
"""Characters of a batch's name."""


async def arun_batch(
    crew: DeployedCrew | Crew | str,
    dataset: Any,
    *,
    name: str,
    output: str,
    ledger: str | None = None,
    key: KeyFrom | None = None,
    inputs: InputsFrom | None = None,
    max_in_flight: int | None = None,
    kickoffs_per_second: float | None = None,
    kickoffs_at_once: int = KICKOFFS_AT_ONCE,
    on_failure: OnFailure = "continue",
    on_bad_row: Literal["refuse", "set-aside"] = "refuse",
    on_change: Literal["refuse", "continue"] = "refuse",
    on_cancel: Literal["stop", "drain", "leave"] = "stop",
    breaker: int | None = 20,
    breaker_pause: float = 30.0,
    deduplicate: bool = False,
    retries: Retries = 0,
    retry_failed: bool | Collection[str] = False,
    max_kickoffs: int | None = None,
    wait: WaitPolicy | None = None,
    output_type: type[BaseModel] | None = None,
    meta: Mapping[str, Any] | None = None,
    webhooks: Webhooks | None = None,
    format: DatasetFormat | None = None,  # noqa: A002
    encoding: str = "utf-8-sig",
    rows: str | None = None,
    on_progress: OnProgress | None = None,
) -> BatchReport:
    """Run a crew once for each row of a data set. A second call with the name goes on where the first stopped.

    Rows that are done are not run again, rows in flight are waited for, uncertain ones are listed and can be resolved.
    Every row is checked before anything is kicked off. Outside of a flow it runs a flow of its own.

    Args:
        crew: A crew, or the name of a stored block.
        dataset: CSV, TSV, JSON Lines, JSON or Parquet by path, URL or fsspec address; an iterable of mappings; a pandas
            or polars data frame; an Arrow table.
        name: The batch's name. It, `output` and a path as `dataset` may be templates over the scheduled time:
            `leads-{{ scheduled_start:%Y-%m-%d }}`.
        output: The path or address of its lines, in the order of the rows: JSON Lines, compressed by its ending, or
            Parquet. It is written at the end, and when the batch stops; `prefect-crew batch export` writes it while the
            batch runs. A line has key, inputs, state, output, data, tasks, kickoff_id, seconds, usage and error.
        ledger: A path, the URL of a PostgreSQL database, or `secret://NAME` for a Prefect Secret block that holds one;
            left out, a file next to a local output.
        key: A column or a function of the row; left out, a digest of the inputs and how many equal ones came before.
        inputs: How a row becomes inputs: a function of the row, or by name a column, a template over the columns, a
            function of the row, or a constant that is no text; left out, the columns of the crew's names.
        max_in_flight: Runs in flight at once, 100 if left out.
        kickoffs_per_second: A limit on the rate of kickoffs.
        kickoffs_at_once: Kickoffs under way at a time, in each process. If it dies, at most so many rows are uncertain.
        on_failure: "continue", "stop" at the first failed row, after how many failed rows, or after which share below 1
            of the rows that ended.
        on_bad_row: "refuse" the data set, or "set-aside" the rows that cannot be run.
        on_change: "refuse" or "continue" when the rows or the crew are others than before.
        on_cancel: "stop", "drain" or "leave" what is in flight when the flow run is cancelled.
        breaker: Failed rows in a row after which the batch pauses; None never does. It then tries single rows, and
            gives up after three that failed.
        breaker_pause: Seconds of the first pause, each further one is twice as long.
        deduplicate: Equal rows are one run.
        retries: Further runs of a failed row, in all or by the class of its error (CrewFailedError,
            CrewStoppedError, CrewLostError, OutputTypeError), never beyond the crew's `max_kickoffs`.
        retry_failed: Start the failed rows of earlier calls again: all, or those of these keys.
        max_kickoffs: Kickoffs of all calls together.
        wait: How to wait, in place of the crew's policy. Left out, a first look is also put off until runs are known to
            end.
        output_type: A pydantic model for `data`; a result that does not fit makes a failed row with its reason.
        meta: Any JSON object for the crew's webhooks; idempotency key and batch are added to it.
        webhooks: Targets of your own for the crew's webhooks.
        format, encoding: Those of a file whose name does not tell.
        rows: A range START:STOP of row numbers from 0, the last one excluded, such as "0:500000" or "500000:". A data
            set over several machines is several batches over ranges of it, each with a name and an output of its own.
        on_progress: Called with a `BatchProgress` about once a second. It must be quick and must not raise.

    Raises:
        DatasetError, BadRowsError: The data set cannot be read, or rows cannot be run. Nothing was started.
        BatchChangedError, LedgerMissingError, BatchBusyError: The name belongs to something else. Nothing was started.
        LedgerError, OutputError: They failed on the way; the same call goes on.
        CrewError: The crew refused the token, or the options make no sense. Nothing was started.
    """
    options = BatchOptions(
        key=key,
        inputs=inputs,
        max_in_flight=max_in_flight,
        kickoffs_per_second=kickoffs_per_second,
        kickoffs_at_once=kickoffs_at_once,
        on_failure=on_failure,
        on_bad_row=on_bad_row,
        on_change=on_change,
        on_cancel=on_cancel,
        breaker=breaker,
        breaker_pause=breaker_pause,
        deduplicate=deduplicate,
        retries=retries,
        retry_failed=retry_failed,
        max_kickoffs=max_kickoffs,
        wait=wait,
        output_type=output_type,
        meta=meta,
        webhooks=webhooks,
        rows=rows,
    )
    job = await batch_job(
        *(crew, dataset, options),
        name=name,
        output=output,
        ledger=ledger,
        format=format,
        encoding=encoding,
    )
    del dataset  # its rows may hold secrets, and error reporters show the local variables of all frames

    # What Prefect's stored parameters must not or cannot hold reaches the flow by this function.
    @wraps(run_batch_flow.fn)
    async def run(*_: Any, **__: Any) -> BatchReport:
        return await run_job(job, on_progress)

    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        return await run()
    own_flow = run_batch_flow.with_options()
    own_flow.fn = run
    names = {"crew": job.crew.label, "dataset": job.dataset.name, "output": job.output_name}
    return await cast("Any", own_flow)(batch=job.name, **names)


run_batch = sync_version(arun_batch)


@flow(name="run-batch", flow_run_name="{batch}")
async def run_batch_flow(
    batch: Annotated[str, Field(description="The batch's name.")],
    crew: Annotated[str, Field(description="The crew.")],
    dataset: Annotated[str, Field(description="The data set.")],
    output: Annotated[str, Field(description="Where the lines go.")],
) -> BatchReport:
    """Run a batch that `run_batch` was called with outside of a flow."""
    del crew, dataset, output
    raise ConfigurationError(
        f"Batch {batch!r} was given by code and cannot be made from this run's parameters. Call run_batch again with "
        "the same name, which goes on where it stopped, or write a flow around it and retry that."
    )


@cancelled_once
async def run_job(job: BatchJob, on_progress: OnProgress | None) -> BatchReport:
    """Run a batch in this process."""
    await check_adoptable(job.ledger, job.name)
    async with open_batch(job, on_progress) as batch:
        return await batch.run()


async def aplan_batch(
    crew: DeployedCrew | Crew | str,
    dataset: Any,
    *,
    name: str = "plan",
    output: str = "batch.jsonl",
    ledger: str | None = None,
    seconds_per_run: float | None = None,
    format: DatasetFormat | None = None,  # noqa: A002
    encoding: str = "utf-8-sig",
    **options: Any,
) -> BatchPlan:
    """Read the data set, check every row, and say how many, how long and how much. Nothing is started.

    `seconds_per_run` is the duration of one run; left out, the mean of what the ledger has seen. The rest is as for
    `arun_batch`.

    Raises:
        DatasetError: The data set cannot be read. Rows that cannot be run are in the plan.
        CrewError: The crew refused the token, or the options make no sense.
    """
    try:
        chosen = BatchOptions(**options)
    except TypeError as error:
        raise TypeError(str(error).replace("BatchOptions.__init__()", "plan_batch()")) from None
    job = await batch_job(
        crew, dataset, chosen, name=name, output=output, ledger=ledger, format=format, encoding=encoding
    )
    return await plan_of(job, seconds_per_run)


plan_batch = sync_version(aplan_batch)


async def batch_job(
    crew: DeployedCrew | Crew | str,
    dataset: Any,
    options: BatchOptions,
    *,
    name: str,
    output: str,
    ledger: str | None,
    format: DatasetFormat | None = None,  # noqa: A002
    encoding: str = "utf-8-sig",
) -> BatchJob:
    """Return a batch that is ready to be run, or looked at.

    Raises:
        ConfigurationError: The name, the ledger or the output make no sense.
        DatasetError: The data set is none.
    """
    moment = await scheduled_start()
    full, where = render_key(name, moment), render_key(str(output), moment)
    if not full.strip() or len(full) > MAX_NAME or not full.isprintable():
        raise ConfigurationError(f"A batch needs a printable name of 1 to {MAX_NAME} characters, not {full[:60]!r}.")
    if isinstance(dataset, str) and "{{" in dataset:
        dataset = render_key(dataset, moment)
    rows = dataset if isinstance(dataset, Dataset) else open_dataset(dataset, format=format, encoding=encoding)
    address = await ledger_address(ledger, where)
    chosen = await load_crew(crew)
    call = plain_call(
        crew=chosen.block,
        secret_inputs=chosen.secret_inputs,
        dataset=rows,
        output=where,
        ledger=address.public,
        options=options,
    )
    return BatchJob(chosen, rows, options, name=full, output=where, ledger=address, call=call)
