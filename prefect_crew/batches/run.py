"""`run_batch`: run a crew for each row of a data set, with a ledger, an export and a report."""

from __future__ import annotations

import asyncio
import json
import shlex
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from hashlib import sha256
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkerStatus
from prefect.context import FlowRunContext, TaskRunContext
from pydantic import BaseModel
from pydantic.errors import PydanticUserError
from pydantic_core import to_json

from prefect_crew._internal.asyncio_tasks import cancelled_once, sync_version
from prefect_crew._internal.prefect_api import flow_run_id, held_flow_run, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, naming_prefect_away
from prefect_crew.batches.database import LedgerAddress, ledger_address
from prefect_crew.batches.dataset import Dataset, DatasetFormat, aopen_dataset, shown_address, whole_address
from prefect_crew.batches.ledger import BatchEntry, Ledger
from prefect_crew.batches.options import (
    IN_FLIGHT,
    BatchOptions,
    InputsFrom,
    KeyFrom,
    OnFailure,
    plain_call,
)
from prefect_crew.batches.outcomes import RowState
from prefect_crew.batches.output import KEPT, open_output
from prefect_crew.batches.ownership import (
    BatchLock,
    begin_generation,
    bind,
    check_bound,
    note_waiting_for_people,
    read_binding,
)
from prefect_crew.batches.report import (
    FAILURES,
    UNCERTAIN_KEYS,
    BatchArtifact,
    BatchPlan,
    BatchProgress,
    BatchReport,
    OnProgress,
)
from prefect_crew.batches.rows import BadRows, Checked, RowPlan, expected_inputs, rejected_name
from prefect_crew.batches.runner import Runner
from prefect_crew.batches.tables import SQL, open_query
from prefect_crew.batches.throttle import BatchClient, Throttle, rows_at_once
from prefect_crew.batches.turns import note_before_rows_leave
from prefect_crew.blocks import DeployedCrew, load_crew
from prefect_crew.budgets import Budget
from prefect_crew.client.models import CrewInput
from prefect_crew.crew import Crew, CrewSession, WaitPolicy
from prefect_crew.exceptions import (
    BadRowsError,
    BatchBusyError,
    BatchChangedError,
    ConfigurationError,
    CrewError,
    LedgerError,
    LedgerMissingError,
)
from prefect_crew.prices import Spending, cost_of
from prefect_crew.records.budgets import check_estimates
from prefect_crew.records.keys import render_key, scheduled_start
from prefect_crew.records.owners import Owner, crash_dead_owner, this_owner
from prefect_crew.runs.limits import SlotPool
from prefect_crew.webhooks import webhooks_for

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks


MAX_NAME = 200
"""Characters of a batch's name."""
EXPORT_WITHIN = 10.0
"""Seconds for writing the output of a batch that was cancelled. Later the output stays unwritten."""
LOOK = 0.2
"""Seconds, at most, for which a look at a batch holds its lock."""


@naming_prefect_away("Make the same call again, which goes on where this call stopped.")
async def arun_batch(
    crew: DeployedCrew | str,
    dataset: Any,
    *,
    name: str,
    export: str,
    ledger: str | None = None,
    key: KeyFrom | None = None,
    session: KeyFrom | None = None,
    inputs: InputsFrom | None = None,
    max_in_flight: int | None = None,
    kickoffs_per_second: float | None = None,
    kickoffs_at_once: int = 64,
    on_failure: OnFailure = "continue",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    on_change: Literal["refuse", "continue"] = "refuse",
    on_cancel: Literal["stop", "drain", "leave"] = "stop",
    breaker: int | None = 20,
    retries: int = 0,
    retry_failed: bool | Collection[str] = False,
    max_kickoffs: int | None = None,
    wait: WaitPolicy | None = None,
    output_type: type[BaseModel] | None = None,
    meta: Mapping[str, Any] | None = None,
    webhooks: Webhooks | None = None,
    budgets: Sequence[Budget] = (),
    format: DatasetFormat | None = None,  # noqa: A002
    encoding: str = "utf-8-sig",
    delimiter: str | None = None,
    rows: str | None = None,
    on_progress: OnProgress | None = None,
) -> BatchReport:
    """Run a crew once for each row of a data set. A second call with the name goes on where the first stopped.

    The call runs no row again that is done, waits for rows in flight, and lists uncertain rows, which can be resolved.
    It checks every row before the first kickoff. Outside of a flow, the call runs a flow of its own.

    Args:
        crew: A crew, or the name of a stored block.
        dataset: CSV, TSV, JSON Lines, JSON or Parquet by path, URL or fsspec address; `sql://BLOCK?query=…`, the rows
            of a query in the database of a SQLAlchemy block; an iterable of mappings or rows; a pandas or polars data
            frame; anything with an Arrow stream; a cursor of the DB-API, or a result of SQLAlchemy. A cursor of sqlite3
            stops the event loop while it is read, unless its connection has `check_same_thread=False`.
        name: The batch's name. The name, `export` and an address as `dataset` may be templates over the scheduled time:
            `leads-{scheduled_start:%Y-%m-%d}`.
        export: The path or address of its lines, in the order of the rows: JSON Lines, compressed by its ending, or
            Parquet. Or `sql://BLOCK/TABLE`, a table of these columns and `batch`. It is written at the end, and when
            the batch stops; `prefect-crew batch export` writes it at any time. A line has key, inputs, state, output,
            data, tasks, kickoff_id, seconds, usage, error and crew_version.
        ledger: A path, the URL of a PostgreSQL database, or `secret://NAME` for a Prefect Secret block that holds one;
            left out, a file next to a local export.
        key: A column or a function of the row; left out, a digest of the inputs and the number of equal rows before.
        session: A column or a function of the row that names the session of its run, as for `run_crew`; empty: none.
            The rows of one session run one after the other.
        inputs: How a row becomes inputs: a function of the row, or by name a column, a template over the columns, a
            function of the row, or a constant that is not text; left out, the columns named like the crew's inputs.
        max_in_flight: Runs in flight at once, 100 if left out.
        kickoffs_per_second: A limit on the rate of kickoffs.
        kickoffs_at_once: Kickoffs under way at a time. At most so many rows are uncertain if the process dies.
        on_failure: "continue", "stop" at the first failed row, or a limit after which the batch stops: a number of
            failed rows, or a share below 1 of the rows that have ended.
        on_bad_row: "refuse" the data set, or "skip" the rows that cannot be run.
        on_change: "refuse" or "continue" when the rows or the crew differ from the last call.
        on_cancel: "stop", "drain" or "leave" the runs in flight when the flow run is cancelled.
        breaker: The batch stops after so many failed rows in a row; None: never. The same call goes on.
        retries: Further runs of a failed row, never beyond the crew's `max_attempts`.
        retry_failed: Start the failed rows of earlier calls again: all but lost rows, or the rows with these keys.
        max_kickoffs: A limit on the kickoffs of all calls together.
        wait: The policy to wait, in place of the crew's. Left out, the first poll comes when runs usually end.
        output_type: A pydantic model for `data`; a result that does not fit makes a failed row with its reason.
        meta: Any JSON object for the crew's webhooks; idempotency key and batch are added to it.
        webhooks: Targets of your own for the crew's webhooks.
        budgets: Limits for all rows together, in addition to the block's budgets. Rows without room in a budget are not
            started; the same call goes on with them.
        format: The format of a file, if its ending does not name it.
        encoding: The encoding of a file.
        delimiter: The character between the fields of a CSV file; left out, the header shows it.
        rows: A range START:STOP of row numbers from 0, the last one excluded, such as "0:500000" or "500000:", not for
            a query. A data set over several machines is several batches over ranges of it, each with a name and an
            export of its own.
        on_progress: Called with a `BatchProgress` about once a second. It must be quick and must not raise.

    Returns:
        The counts of rows by their states, the kickoffs, usage and cost, and the export. A failed row raises nothing:
        `report.ok` is True if all rows completed.

    Raises:
        DatasetError, BadRowsError: The data set cannot be read, or rows cannot be run. Nothing was started.
        BatchChangedError, LedgerMissingError, BatchBusyError: The batch has changed, is in use, or has another ledger.
            Nothing was started.
        LedgerError, ExportError: The ledger or the export failed on the way; the same call goes on.
        CrewError: The crew refused the token, or the options make no sense. Nothing was started.
    """
    options = BatchOptions(**{name: value for name, value in locals().items() if name in BatchOptions.model_fields})
    file: dict[str, Any] = {"format": format, "encoding": encoding, "delimiter": delimiter}
    job = await _batch_job(crew, dataset, options, name, export, ledger, **file)
    del dataset  # its rows may hold secrets, and error reporters show the local variables of all frames

    # Prefect stores parameters. This function carries all that must not or cannot be stored.
    @wraps(run_batch_flow.fn)
    async def run(*_: Any, **__: Any) -> BatchReport:
        return await _run_job(job, on_progress)

    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        return await run()
    own_flow = run_batch_flow.with_options()
    own_flow.fn = run
    names = {"crew": job.crew.label, "dataset": job.dataset.name, "export": shown_address(job.export)}
    return await cast("Any", own_flow)(batch=job.name, **names)


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
    await _check_ledger_is_shared(job)
    async with AsyncExitStack() as stack:
        batch = _Batch(job, on_progress)
        await batch.open(stack)
        return await batch.run()


async def _check_ledger_is_shared(job: BatchJob) -> None:
    """Refuse a new ledger in a file on a pool of several crew workers: another worker may take the flow run over.

    A later call finds its ledger, or raises LedgerMissingError. Raises ConfigurationError.
    """
    held = held_flow_run.get()
    if held is None or not held.pool or not job.ledger.is_local or await read_binding(job.name) is not None:
        return
    async with get_client() as client:
        workers = await client.read_workers_for_work_pool(held.pool)
    for worker in workers:
        if worker.name != held.worker and worker.status == WorkerStatus.ONLINE:
            raise ConfigurationError(
                f"Batch {job.name!r} has its ledger in a file of this machine ({job.ledger.public}), but the work pool "
                f"{held.pool} has a second worker, {worker.name}, which could not continue the batch. Give it a "
                "ledger in PostgreSQL. If that worker was stopped, wait until Prefect shows it as offline. Nothing was "
                "started."
            )


@naming_prefect_away("Nothing was started.")
async def aplan_batch(
    crew: DeployedCrew | str,
    dataset: Any,
    *,
    name: str = "plan",
    export: str = "batch.jsonl",
    ledger: str | None = None,
    seconds_per_run: float | None = None,
    key: KeyFrom | None = None,
    session: KeyFrom | None = None,
    inputs: InputsFrom | None = None,
    max_in_flight: int | None = None,
    kickoffs_per_second: float | None = None,
    kickoffs_at_once: int = 64,
    on_failure: OnFailure = "continue",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    on_change: Literal["refuse", "continue"] = "refuse",
    on_cancel: Literal["stop", "drain", "leave"] = "stop",
    breaker: int | None = 20,
    retries: int = 0,
    retry_failed: bool | Collection[str] = False,
    max_kickoffs: int | None = None,
    wait: WaitPolicy | None = None,
    output_type: type[BaseModel] | None = None,
    meta: Mapping[str, Any] | None = None,
    webhooks: Webhooks | None = None,
    budgets: Sequence[Budget] = (),
    format: DatasetFormat | None = None,  # noqa: A002
    encoding: str = "utf-8-sig",
    delimiter: str | None = None,
    rows: str | None = None,
) -> BatchPlan:
    """Read the data set, check every row, and return the number of rows, the time and the cost. Nothing is started.

    `seconds_per_run` is the duration of one run; left out, the mean of the runs in the ledger. The rest is as for
    `arun_batch`. Rows that cannot be run are in the plan.

    Raises:
        CrewError: The data set cannot be read, the crew refused the token, or the options make no sense.
    """
    options = BatchOptions(**{name: value for name, value in locals().items() if name in BatchOptions.model_fields})
    file: dict[str, Any] = {"format": format, "encoding": encoding, "delimiter": delimiter}
    job = await _batch_job(crew, dataset, options, name, export, ledger, **file)
    async with CrewSession(job.crew) as crew_session:
        plan = RowPlan(job.dataset, options, job.crew, await expected_inputs(crew_session) or ())
    checked = await asyncio.to_thread(plan.check)
    done, mean, spent = await _earlier_calls(job)
    duration, each = mean if seconds_per_run is None else seconds_per_run, cost_of(job.crew.price, None)
    if each is None and spent.cost is not None:
        each = spent.cost / spent.priced
    rest = max(checked.total - done, 0)
    most = options.max_in_flight or IN_FLIGHT
    seconds = None if duration is None else -(-rest // most) * duration
    if options.kickoffs_per_second is not None:
        seconds = max(seconds or 0.0, rest / options.kickoffs_per_second)
    return BatchPlan(
        name=job.name,
        rows=checked.total,
        done=done,
        bad=checked.bad,
        bad_count=checked.bad_count,
        max_in_flight=most,
        seconds=seconds,
        price=None if each is None else each * rest,
    )


plan_batch = sync_version(aplan_batch)


async def _earlier_calls(job: BatchJob) -> tuple[int, float | None, Spending]:
    """Return the number of rows that have completed or failed, and the mean duration and the use of all ended runs.

    Raises LedgerMissingError, LedgerError.
    """
    where = job.ledger
    if where.is_missing and (binding := await read_binding(job.name)) is not None:
        # The batch has run with another export or ledger. Without its ledger the plan would count its rows again.
        where = await ledger_address(str(binding.get("ledger")), "")
        if where.is_missing:
            raise LedgerMissingError(name=job.name, ledger=where.public)
    if where.is_missing:
        return 0, None, Spending()
    async with Ledger(where.full, job.name) as stored:
        done = sum(count for state, count in (await stored.counts()).items() if state.is_final)
        mean, _, _ = await stored.run_times()
        return done, mean, await stored.spending()


@dataclass(frozen=True)
class BatchJob:
    """A call of a batch, with its templates filled."""

    crew: Crew
    dataset: Dataset
    options: BatchOptions
    name: str
    export: str
    ledger: LedgerAddress

    @property
    def line_options(self) -> dict[str, Any]:
        """The settings on which the lines of the export depend."""
        kind = self.options.output_type
        return {
            "output_type": None if kind is None else f"{kind.__module__}.{kind.__qualname__} {_digest_of(kind)}",
            "secret_inputs": sorted(self.crew.secret_inputs),
        }


def _digest_of(output_type: type[BaseModel]) -> str:
    """Return a digest of the JSON schema of a type, which changes with its fields; empty if it has no schema.

    The schema has no defaults, since a set among them has another order in each process.
    """
    with suppress(PydanticUserError, ValueError):
        schema = to_json(output_type.model_json_schema())
        fields = json.loads(schema, object_hook=lambda part: {name: part[name] for name in part if name != "default"})
        return sha256(to_json(fields)).hexdigest()
    return ""


async def _batch_job(
    crew: DeployedCrew | str,
    dataset: Any,
    options: BatchOptions,
    name: str,
    export: str,
    ledger: str | None,
    **file: Any,
) -> BatchJob:
    """Return a call that is ready to be run or planned. `file` has the format, encoding and delimiter of a file.

    Raises ConfigurationError, DatasetError.
    """
    moment = await scheduled_start()
    full, where = render_key(name, moment), render_key(str(export), moment)
    if not full.strip() or len(full) > MAX_NAME or not full.isprintable():
        raise ConfigurationError(f"A batch needs a printable name of 1 to {MAX_NAME} characters, not {full[:60]!r}.")
    address = await ledger_address(ledger, where)

    def render(text: str) -> str:
        return render_key(text, moment) if "{scheduled_start" in text else text

    if isinstance(dataset, str) and dataset.startswith(SQL):
        if options.rows is not None:
            raise ConfigurationError(
                "rows= is no option for a query: a second machine would run the query again and number other rows. Put "
                "the range into the WHERE of the query. Nothing was started."
            )
        if file != FILE_DEFAULTS:
            raise ConfigurationError(f"{', '.join(file)} are options of files, not of a query. Nothing was started.")
        rows = await open_query(dataset, render)
    else:
        rows = await aopen_dataset(render(dataset) if isinstance(dataset, str) else dataset, **file)
    loaded_crew = (await load_crew(crew)).under(options.budgets, name=full, batch=full)
    await check_estimates(loaded_crew)
    return BatchJob(loaded_crew, rows, options, full, where, address)


FILE_DEFAULTS = {"format": None, "encoding": "utf-8-sig", "delimiter": None}


def _version_in(entry: BatchEntry | None) -> str | None:
    """Return the version of the crew at the last call of a batch, None if it is not known."""
    return None if entry is None or entry.call is None else entry.call.get("crew_version")


class _Batch:
    """One call of a batch: its rows are checked and its lock is held once it is open."""

    def __init__(self, job: BatchJob, on_progress: OnProgress | None) -> None:
        self.job = job
        self.on_progress = on_progress
        self.progress = BatchProgress(job.name)
        self.throttle = Throttle(job.options)
        self.session = CrewSession(job.crew, partial(BatchClient, throttle=self.throttle))
        self.ledger = Ledger(job.ledger.full, job.name)
        self.lock = BatchLock(self.ledger.database, job.name)
        self.output = open_output(job.export, output_type=job.options.output_type)
        self.artifact = BatchArtifact(job.name, job.crew)
        self.refresh_after = 0.0
        self.people_noted: bool | None = None
        self.is_lock_lost = False

    async def open(self, stack: AsyncExitStack) -> None:
        """Check the rows, take the lock, and bind the batch's name to its ledger. Raises CrewError."""
        job, ledger = self.job, self.ledger
        webhooks_for(job.crew, job.name)  # raises if settings make no sense, before anything is started
        self._tell("checking")
        await stack.enter_async_context(self.session)
        expected = await expected_inputs(self.session)
        self.plan = RowPlan(job.dataset, job.options, job.crew, expected or ())
        # Whether the batch is ours is known before its rows are read, which may take minutes.
        await stack.enter_async_context(ledger)
        await stack.enter_async_context(self.lock)
        if not (await self.lock.take() or await self.lock.take(after=LOOK)):
            raise BatchBusyError(name=job.name)
        ledger.is_exclusive = True
        self.before = before = await ledger.entry()  # what the ledger knew before this call
        check_bound(before, await read_binding(job.name), ledger)
        version = await self.session.version()
        owner = this_owner().model_dump(mode="json")
        by = {"flow_run_id": flow_run_id(), "owner": owner, "names_inputs": self._names_inputs(before, expected)}
        if before is not None and before.call is not None:
            if "owner" in before.call:
                await crash_dead_owner(Owner.model_validate(before.call["owner"]), work="batch")
            await ledger.note(call={**before.call, **by})  # reading the rows may take minutes
        self.exported = {} if before is None else before.exported or {}
        rejected = stack.enter_context(tempfile.TemporaryFile(prefix="prefect-crew-"))  # noqa: SIM115  the stack does
        self.checked = await self._check_rows(rejected)
        if version != await self.session.version():
            version = None  # each answer differs, such as by a time, so another digest means no other deployment
        self.progress.total = self.checked.total
        if before is not None and job.options.on_change == "refuse":
            await self._refresh()
            self._refuse_changes(before, self.checked, version if self._may_start else None)
        await self._enter({**by, "crew_version": version or _version_in(before)}, rejected)

    async def _check_rows(self, rejected: IO[bytes]) -> Checked:
        """Check the output, and every row unless the last export had the same rows. Raises CrewError."""
        job, earlier = self.job, self.exported.get("checked")
        await self.output.open()
        is_new = whole_address(job.export) not in self.exported.get("exports", ())
        await asyncio.to_thread(self.output.check, job.name, is_new=is_new)
        source = await asyncio.to_thread(self.plan.source)
        if earlier is not None and earlier["source"] == source and "order" in earlier:
            checked = Checked(**earlier)
        else:
            checked = replace(await asyncio.to_thread(self.plan.check, rejected), source=source)
        if checked.bad and (job.options.on_bad_row == "refuse" or not checked.total):
            alone = not checked.total
            raise BadRowsError(checked.bad, checked.bad_count, source=job.dataset.name, alone=alone)
        if not await self.lock.still_held():
            raise BatchBusyError(name=job.name)
        return checked

    async def _enter(self, facts: Mapping[str, Any], rejected: IO[bytes]) -> None:
        """Write the call to the ledger, with these further facts, and the rows that cannot run. Raises CrewError."""
        job, ledger, checked, before = self.job, self.ledger, self.checked, self.before
        call = plain_call(
            crew=job.crew.block,
            secret_inputs=job.crew.secret_inputs,
            dataset=job.dataset,
            export=job.export,
            ledger=job.ledger.public,
            options=job.options,
        )
        entry = await ledger.enter(
            crew_url=job.crew.url,
            fingerprint=checked.fingerprint,
            total=checked.total,
            call={**call, **facts},
            line_options=job.line_options,
        )
        await bind(entry, ledger, job.ledger.public)
        bad = BadRows(checked.bad_count, checked.bad, rejected_name(self.output.name) if checked.bad_count else None)
        self.progress.bad = bad
        if bad.count or entry.bad.count:
            await asyncio.to_thread(self.output.write_rejected, rejected if bad.count else None, job.name)
            await ledger.note(bad=asdict(bad) if bad.count else None)
        if before is not None:
            await ledger.note_orphaned()
            self.throttle.kickoffs = await ledger.kickoffs()
            is_same = (before.fingerprint, before.crew_url) == (entry.fingerprint, entry.crew_url)
            if not is_same or self.exported.get("order") != checked.order:
                if job.options.session is not None:
                    await note_before_rows_leave(ledger)
                await ledger.enter_changed(self.plan.jobs(), job.crew)
        self.kickoffs_before = self.throttle.kickoffs

    def _names_inputs(self, before: BatchEntry | None, expected: Sequence[CrewInput] | None) -> bool:
        """Return whether the crew names its inputs, by this call or an earlier one.

        Raises ConfigurationError if the crew named the inputs of the rows before, and cannot name them now.
        """
        if expected:
            return True
        has_named = bool(before and before.call and before.call.get("names_inputs"))
        if has_named and self.job.options.inputs is None:  # all columns would be inputs, and every row would change
            raise ConfigurationError(
                f"The crew {self.job.crew.url} names no inputs now (GET /inputs), and the rows of "
                f"batch {self.job.name!r} took their inputs by these names. Nothing was started. Make the same call "
                "again when it names them, or give inputs={NAME: COLUMN}."
            )
        return has_named

    def _refuse_changes(self, before: BatchEntry, checked: Checked, version: str | None) -> None:
        """Raise BatchChangedError if the crew, its version or the rows are not those of the last call."""
        name, url, version_before = self.job.name, self.job.crew.url, _version_in(before)
        if before.crew_url != url:
            raise BatchChangedError(name=name, difference=f"crew {before.crew_url}, not {url}")
        if version and version_before and version != version_before:
            difference = f"version {version_before} of the crew, not {version}"
            raise BatchChangedError(name=name, difference=difference)
        if before.fingerprint != checked.fingerprint:
            difference = f"{before.total} rows, not these {checked.total}"
            if checked.total == before.total:
                difference = (
                    f"the same number of rows, {before.total}, with another key or another input in at least one"
                )
            raise BatchChangedError(name=name, difference=difference)

    async def run(self) -> BatchReport:
        """Run the rows that are not done, write the output, and report. Raises CrewError."""
        await self._refresh()
        try:
            if not self._is_done:
                await self._run_rows()
        except BaseException as error:
            if not isinstance(error, LedgerError) and not self.is_lock_lost:
                await self._export_in_time()
            await self.artifact.update(self.progress, await self._report())
            raise
        self._tell("finishing")
        await self._refresh()
        if not self.is_lock_lost:
            await self._export()
            await self._note_people(bool([record async for record in self.ledger.may_ask()]))
        report = await self._report()
        self._tell("done")
        await self.artifact.update(self.progress, report)
        run_logger().info("%s", report)
        return report

    @property
    def _is_done(self) -> bool:
        """Whether every row has ended for good, so that only the output is left to write."""
        # A turn of a row may have to be noted as over.
        is_over = not self._may_start and self.job.options.session is None
        return self.before is not None and self._lines_stay and is_over

    @property
    def _may_start(self) -> bool:
        """Whether a row is left to start."""
        options = self.job.options
        retries = bool((options.retry_failed or options.retries) and self.progress.failed)
        return not self.progress.is_over or retries

    @property
    def _lines_stay(self) -> bool:
        """Whether this call judges and shows the results of earlier calls as they did."""
        return self.before is None or self.before.line_options == self.job.line_options

    async def _export(self) -> None:
        """Write the output, unless it is up to date."""
        address = whole_address(self.job.export)
        counts = {str(state): count for state, count in self.progress.counts.items()}
        now = {"output": address, "counts": counts, "lines": self.job.line_options, "checked": self.checked.stored}
        now |= {"order": self.checked.order, "kickoffs": await self.ledger.kickoffs()}
        if now.items() <= self.exported.items() and await asyncio.to_thread(self.output.exists):
            return
        # The file may have come into being since the start, by another batch, or by `batch export` of this one.
        is_new = address not in (await self.ledger.exported()).get("exports", ())
        await asyncio.to_thread(self.output.check, self.job.name, is_new=is_new, consequence=KEPT)
        await self.ledger.note_export(address, {})  # before the file exists: it is then known to be this batch's
        await self.output.write(self.ledger)
        await self.ledger.note_export(address, now)

    async def _export_in_time(self) -> None:
        """Write the output of a batch that was cancelled or has failed, within `EXPORT_WITHIN` seconds: Prefect soon
        kills a cancelled process."""
        try:
            await self._refresh()
            await asyncio.wait_for(self._export(), EXPORT_WITHIN)
        except (CrewError, TimeoutError) as error:
            run_logger().warning(
                "The export of batch %s was not written (%s). To write it, run: prefect-crew batch export %s",
                self.job.name,
                error or "it takes long",
                shlex.quote(self.job.name),
            )

    async def _refresh(self) -> None:
        """Read the progress from the ledger."""
        began, progress = time.monotonic(), self.progress
        counts = await self.ledger.counts()
        if counts != progress.counts:
            progress.counts = counts
            failed = self.ledger.rows_in([state for state in RowState if state.is_failed], limit=FAILURES)
            progress.failures = [row async for row in failed]
            uncertain = self.ledger.rows_in([RowState.UNCERTAIN], limit=UNCERTAIN_KEYS)
            progress.uncertain_keys = [row.key async for row in uncertain]
        self.refresh_after = time.monotonic() + 20 * (time.monotonic() - began)

    def _tell(self, phase: Literal["checking", "waiting", "running", "finishing", "done"]) -> None:
        self.progress.phase = phase
        if self.on_progress is not None:
            self.on_progress(self.progress)

    async def _run_rows(self) -> None:
        options = self.job.options
        async with AsyncExitStack() as stack:
            runner = Runner(
                self.session,
                self.throttle,
                self.ledger,
                options,
                max_in_flight=await rows_at_once(self.session.crew, options),
                on_end=self.progress.add,
                judge_again=not self._lines_stay,
            )
            if self.session.crew.concurrency_limit is not None:
                self.throttle.slots = await stack.enter_async_context(SlotPool(self.session.crew))
            self.lock.generation = await begin_generation(self.ledger, self.job.ledger.public)
            try:
                await runner.run_until_cancelled(self.plan.jobs(), lambda: self._tick(runner))
            finally:
                self.progress.in_flight = len(runner.waiting)

    async def _tick(self, runner: Runner) -> None:
        """Show the progress, about once a second."""
        progress = self.progress
        progress.in_flight = len(runner.waiting)
        progress.people = sum(record.human_since is not None for record in runner.waiting.values())
        progress.tick()
        if time.monotonic() > self.refresh_after:
            await self._refresh()
        self._tell("waiting" if self.throttle.waits_for_slot and not runner.waiting else "running")
        await self.artifact.update(progress)
        await self.session.version(if_due=True)
        if progress.people:
            await self._note_people(True)
        if not await self.lock.still_held():
            self.is_lock_lost = True  # the ledger, the output and the name are another process's
            runner.stop(
                "its lock was lost: another process has taken the batch over, or a file of its ledger was removed or "
                "replaced.",
                shut=True,
            )

    async def _note_people(self, waits: bool) -> None:
        if waits is self.people_noted:
            return
        try:
            await note_waiting_for_people(self.job.name, waits)
            self.people_noted = waits
        except PREFECT_ERRORS as error:
            log = "The Prefect server could not record whether rows of batch %s wait for people: %s"
            run_logger().debug(log, self.job.name, error)

    async def _report(self) -> BatchReport:
        progress, bad = self.progress, self.progress.bad
        try:
            kickoffs, spent = await self.ledger.kickoffs(), await self.ledger.spending()
        except LedgerError:
            kickoffs, spent = self.throttle.kickoffs, Spending()  # the error that ended the batch is raised
        return BatchReport(
            name=self.job.name,
            total=progress.whole,
            completed=progress.completed,
            failed=progress.failed,
            uncertain=progress.uncertain,
            skipped=progress.whole - progress.done,
            seconds=progress.seconds,
            export=self.output.name,
            stopped=self.throttle.stopped,
            kickoffs=kickoffs - self.kickoffs_before,
            bad_count=bad.count,
            bad=tuple(bad.rows[:FAILURES]),
            bad_export=bad.export,
            uncertain_keys=tuple(progress.uncertain_keys),
            errors=dict(progress.errors),
            conflicts=progress.counts.get(RowState.CONFLICT, 0),
            unfinished=sum(count for state, count in progress.counts.items() if state.is_unfinished),
            spending=spent,
        )
