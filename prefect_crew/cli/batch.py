"""The commands `batch`: a crew for every row of a data set."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from uuid import UUID

from cyclopts import App, Parameter
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew._text import listed_rows
from prefect_crew.artifacts.escape import duration
from prefect_crew.batches.ledger import LedgerRow
from prefect_crew.batches.outcomes import STOPPED_WITH_BATCH, RowState, state_of
from prefect_crew.batches.ownership import BatchLock
from prefect_crew.batches.report import BatchReport
from prefect_crew.batches.run import aplan_batch, arun_batch
from prefect_crew.batches.runner import stop_row
from prefect_crew.batches.stored import BatchStatus, StoredBatch, list_batches, open_stored_batch
from prefect_crew.cli import _output
from prefect_crew.cli._errors import OTHER, ROWS
from prefect_crew.cli._options import (
    CrewAccess,
    CrewName,
    CrewOfRun,
    Ledger,
    Output,
    Timeout,
    Yes,
    is_url,
    read_pairs,
    wait_policy,
)
from prefect_crew.cli._output import Progress
from prefect_crew.cli._prefect import page_url
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import CrewError, UnreadableRecordError
from prefect_crew.records.model import RunRecord
from prefect_crew.records.sessions import note_over

STOPS_AT_ONCE = 50
"""Requests to stop a run, at a time."""
SHOWN = 100
"""Failed rows in the table of `failures`."""
DataSet = Annotated[
    str,
    Parameter(
        name="DATASET",
        help="CSV, TSV, JSON Lines, JSON or Parquet: a path, a URL or an fsspec address; compressed or not. Or "
        "sql://BLOCK?query=…, the rows of a query, percent-encoded.",
    ),
]
Name = Annotated[str, Parameter(name="NAME", help="The batch's name.")]

app = App(name="batch")


@Parameter(name="*")
@dataclass(frozen=True)
class BatchChoices:
    """How rows become runs.

    Args:
        ledger: A path, secret://NAME, or a PostgreSQL URL, whose password other users of this machine can see; if left
            out, a file next to a local export.
        key_column: The column that holds the key of each row; if left out, a digest of the row's inputs.
        session_column: The column that names the session of a CrewAI Flow; rows of a session run one after the other.
        map: An input and its column, as NAME=COLUMN, or NAME='text with {{ COLUMN }}'; can be repeated.
        max_in_flight: Runs in flight at a time; 100 if left out.
        on_bad_row: If rows cannot be run, refuse the data set, or skip these rows.
        rows: Only these rows: START:STOP from 0, without STOP itself, such as 0:500000.
    """

    ledger: str | None = None
    key_column: str | None = None
    session_column: str | None = None
    map: Annotated[list[str] | None, Parameter(negative=())] = None
    max_in_flight: int | None = None
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    rows: str | None = None

    def options(self) -> dict[str, Any]:
        """Return the choices as arguments of `arun_batch` and `aplan_batch`."""
        options = {
            **vars(self),
            "key": self.key_column,
            "session": self.session_column,
            "inputs": read_pairs("--map", self.map or (), "COLUMN") or None,
        }
        del options["key_column"], options["session_column"], options["map"]
        return options


@Parameter(name="*")
@dataclass(frozen=True)
class RunChoices(BatchChoices):
    """How a batch goes on when rows fail, and when it is called again.

    Args:
        on_failure: continue, stop (at the first failed row), or a number or share (below 1) of failed rows to stop at.
        on_change: Whether to refuse or to continue if the rows or the crew have changed.
        retries: How many more times to kick off a failed row.
        retry_failed: Start the failed rows of earlier calls again.
        max_kickoffs: A limit on kickoffs, of all calls together.
    """

    on_failure: float | Literal["continue", "stop"] = "continue"
    on_change: Literal["refuse", "continue"] = "refuse"
    retries: int = 0
    retry_failed: bool = False
    max_kickoffs: int | None = None


@app.command
def run(
    crew: CrewName,
    dataset: DataSet,
    /,
    *,
    name: str,
    export: str,
    timeout: Timeout = None,
    choices: RunChoices = RunChoices(),
    yes: Yes = False,
    output: Output = None,
    access: CrewAccess = CrewAccess(),
) -> Coroutine[Any, Any, int]:
    """Run a crew once for every row of a data set. Call it again to go on where it stopped.

    Args:
        name: The batch's name. The same call with it goes on where it stopped.
        export: The file or address for the results, JSON Lines or .parquet, or sql://BLOCK/TABLE; written when the
            batch ends or stops.
    """
    options = choices.options()
    if choices.retry_failed:
        _confirm_retry(name, yes)

    async def call(progress: Progress) -> BatchReport:
        loaded_crew = await access.load(crew)
        arguments: dict[str, Any] = {
            "name": name,
            "export": export,
            "wait": wait_policy(loaded_crew, timeout),
            **options,
        }
        return await arun_batch(cast("Any", loaded_crew), dataset, on_progress=progress.watch_batch, **arguments)

    return _run(name, call, output, by_name=not is_url(crew))


def _confirm_retry(name: str, yes: bool) -> None:
    _output.confirm(f"Start a new run for failed rows of batch {name}?", yes=yes)


def _look_here() -> None:
    """Let Python import modules of the working directory, for a batch with an output_type, as `python -m` does."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


async def _run(
    name: str,
    call: Callable[[Progress], Awaitable[BatchReport]],
    output: str | None,
    *,
    by_name: bool = True,
) -> int:
    """Run a batch, print its report and how to continue it; return the exit code.

    `by_name`: whether its name is enough to continue it, because its crew is stored.
    """
    _look_here()
    progress = Progress()
    try:
        with progress:
            report = await call(progress)
    except (asyncio.CancelledError, KeyboardInterrupt):
        shell_name = shlex.quote(progress.batch or name)
        again = f"prefect-crew batch resume {shell_name}" if by_name else "make the same call again"
        stop = f"prefect-crew batch cancel {shell_name}"
        _output.note(f"To go on where it stopped: {again}. To stop the runs in flight: {stop}")
        raise
    shell_name = shlex.quote(progress.batch or name)
    page = page_url(progress.flow_run_id)
    as_json = output and {**report.as_dict(), "flow_run_id": progress.flow_run_id, "flow_run_url": page}
    _output.put(str(report), json=as_json)
    if page:
        _output.note(page, "dim")
    failures = f"prefect-crew batch failures {shell_name}"
    if report.uncertain:
        _output.note(f"A person has to resolve {report.uncertain:,} uncertain rows: {failures}")
    elif report.failed > report.conflicts + report.unfinished:
        again = f"prefect-crew batch retry {shell_name}" if by_name else "make the same call with --retry-failed"
        _output.note(f"Failed rows: {failures}. To start them again: {again}")
    elif report.failed:
        _output.note(f"Failed rows: {failures}")
    if report.bad_count:
        _output.note(f"Bad rows: {failures}")
    return 0 if report.ok else ROWS


@app.command
async def plan(
    crew: CrewName,
    dataset: DataSet,
    /,
    *,
    name: str = "plan",
    export: str = "batch.jsonl",
    seconds_per_run: float | None = None,
    output: Output = None,
    choices: BatchChoices = BatchChoices(),
    access: CrewAccess = CrewAccess(),
) -> int:
    """Check every row, and print the number of runs, the time and the cost. Nothing is started.

    Args:
        name: The batch's name, to count only the rows that are left.
        export: The batch's file of results. Its ledger is next to that file.
        seconds_per_run: How long one run takes; if left out, the mean of the runs in the ledger.
    """
    loaded_crew = await access.load(crew)
    arguments: dict[str, Any] = {"seconds_per_run": seconds_per_run, **choices.options()}
    batch_plan = await aplan_batch(cast("Any", loaded_crew), dataset, name=name, export=export, **arguments)
    _output.put(str(batch_plan), json=output and batch_plan.as_dict())
    return ROWS if batch_plan.bad_count and choices.on_bad_row == "refuse" else 0


@app.command
async def ls(
    pattern: Annotated[str, Parameter(name="NAME", help="Only these; * stands for any text, as in 'leads/*'.")] = "*",
    /,
    *,
    output: Output = None,
) -> None:
    """List the batches on the Prefect server, and the addresses of their ledgers. `batch inspect` shows a status."""
    batches = await _list(pattern)
    as_json = output and [{"name": name, "ledger": ledger} for name, ledger in batches]
    _output.put_rows(("Batch", "Ledger"), batches, empty=NONE, json=as_json)


async def _list(pattern: str) -> list[tuple[str, str]]:
    return [(name, ledger) for name, ledger in await list_batches() if pattern == name or fnmatchcase(name, pattern)]


@app.command
async def inspect(
    name: Annotated[str, Parameter(name="NAME", help="The batch's name. 'leads/*' adds up all batches that match.")],
    /,
    *,
    ledger: Ledger = None,
    output: Output = None,
) -> int:
    """Show the status of a batch, also while another process runs it."""
    fitting = await _list(name) if any(sign in name for sign in "*?[") else []
    if not fitting or name in dict(fitting):  # a name may have such signs in it
        async with open_stored_batch(name, ledger) as batch:
            status = await batch.status()
        _output.put("\n".join(_about(status)), json=output and asdict(status))
        return 0
    statuses, missed = list[BatchStatus](), list[str]()
    for fitting_name, _ in fitting:
        try:
            async with open_stored_batch(fitting_name, ledger) as batch:
                statuses.append(await batch.status())
        except CrewError as error:
            missed.append(f"Batch {fitting_name!r} is not counted: {error}")
    _put_sum(statuses, missed, output)
    for sentence in missed:
        _output.note(sentence, "yellow")
    return 0 if statuses else OTHER


NONE = "The Prefect server knows no such batch."
SUMMED = ("total", "completed", "failed", "stopped", "uncertain", "in_flight", "left", "bad_count", "kickoffs")


def _put_sum(statuses: list[BatchStatus], missed: list[str], output: str | None) -> None:
    """Print the status of several batches, and their sums. `missed` has a sentence for each batch without a ledger."""
    whole = {count: sum(getattr(status, count) for status in statuses) for count in SUMMED}
    rows = [(status.name, *(f"{getattr(status, count):,}" for count in SUMMED)) for status in statuses]
    if statuses:
        rows.append(("together", *(f"{count:,}" for count in whole.values())))
    header = ("Batch", *(_word(count).capitalize() for count in SUMMED))
    as_json = output and {**whole, "batches": [asdict(status) for status in statuses], "missing": missed}
    _output.put_rows(header, rows, empty="No ledger of these batches can be opened here.", json=as_json)


def _word(count: str) -> str:
    return "bad" if count == "bad_count" else count.replace("_", " ")


def _how_to_go_on(status: BatchStatus) -> str:
    """Return how to continue a batch; empty if it has run every row."""
    if not (status.left or status.in_flight or status.owed):
        return ""
    again = f"prefect-crew batch resume {shlex.quote(status.name)}"
    return f"To go on where it stopped: {f'make the same call again ({status.why_not})' if status.why_not else again}"


def _about(status: BatchStatus) -> Iterator[str]:
    yield f"Batch {status.name}: {status.completed:,} of {status.total:,} rows completed"
    words = {count: _word(count) for count in SUMMED[2:-1]}
    words |= {"stopped": "of them stopped", "left": "not started yet"}
    counts = (f"{count:,} {summary}" for word, summary in words.items() if (count := getattr(status, word)))
    if summary := " · ".join(counts):
        yield f"  {summary}"
    if status.running:
        yield "  A process runs it now"
    elif again := _how_to_go_on(status):
        yield f"  No process runs it. {again}"
    if status.waiting:
        yield f"  {status.waiting:,} in flight wait for a person: prefect-crew reviews ls"
    if status.bad_count:
        listed = listed_rows(status.bad, status.bad_count)
        yield f"  Bad rows: {listed}. All are in {status.bad_export}"
    seconds = ""
    if status.median is not None and status.longest is not None:
        seconds = f" · a row takes {duration(status.median)} (median), at most {duration(status.longest)}"
    yield f"  {status.kickoffs:,} kickoffs{seconds}"
    if status.export:
        yield f"  Export: {status.export}"
    yield f"  Ledger: {status.ledger}"


@app.command
async def failures(name: Name, /, *, ledger: Ledger = None, output: Output = None) -> None:
    """List the rows that failed, are uncertain or cannot be run, with their runs and the reason."""
    async with open_stored_batch(name, ledger) as batch:
        rows_of_ledger, bad = [row async for row in batch.failures(None if output else SHOWN)], batch.entry.bad
    if output:
        lines = [{"key": None, "line": row.line, "state": "bad", "error": row.reason} for row in bad.rows]
        _output.put_json([*map(_as_json, rows_of_ledger), *lines])
        return
    rows = [
        (row.key, (row.record and row.record.kickoff_id) or "", str(row.state), row.error or "")
        for row in rows_of_ledger
    ]
    rows += [(f"line {row.line}", "", "bad", row.reason) for row in bad.rows[:SHOWN]]
    _output.put_rows(("Row", "Run", "State", "Error"), rows, empty=f"No row of batch {name} failed.")
    if len(rows_of_ledger) == SHOWN:
        _output.note(f"The first {SHOWN}; -o json shows all.")
    if bad.count:
        _output.note(f"Bad rows cannot be run. All {bad.count:,} are in {bad.export}.")
    if first := next((row.record for row in rows_of_ledger if str(row.state) in ("uncertain", "claimed")), None):
        _output.note(
            f"To resolve an uncertain row, look at the crew's page, then: prefect-crew runs resolve "
            f"{shlex.quote(first.idempotency_key)} --kickoff-id ID, or --never-started."
        )


def _as_json(row: LedgerRow) -> dict[str, Any]:
    fields = {"idempotency_key", "kickoff_id", "attempt", "kicked_off_at", "ended_at"}
    about = {} if row.record is None else row.record.model_dump(mode="json", include=fields)
    return {"key": row.key, "state": str(row.state), "error": row.error or None, **about}


@app.command
async def retry(
    name: Name,
    /,
    *,
    row: list[str] | None = None,
    on_change: Literal["refuse", "continue"] = "refuse",
    ledger: Ledger = None,
    yes: Yes = False,
    output: Output = None,
) -> int:
    """Start the failed rows of a batch again, with the options of its last call, and go on with the rows that are left.

    Args:
        row: Only the row with this key; can be repeated.
        on_change: Whether to refuse or to continue if the rows or the crew have changed.
    """
    _confirm_retry(name, yes)
    return await _go_on(name, ledger, tuple(row) if row else True, output, on_change=on_change)


@app.command
async def resume(
    name: Name,
    /,
    *,
    on_change: Literal["refuse", "continue"] = "refuse",
    ledger: Ledger = None,
    output: Output = None,
) -> int:
    """Go on with a batch where it stopped, with the options of its last call.

    Args:
        on_change: Whether to refuse or to continue if the rows or the crew have changed.
    """
    return await _go_on(name, ledger, False, output, on_change=on_change)


async def _go_on(
    name: str,
    ledger: str | None,
    retry_failed: bool | tuple[str, ...],
    output: str | None,
    *,
    on_change: Literal["refuse", "continue"] = "refuse",
) -> int:
    """Call a batch again by its name."""

    async def call(progress: Progress) -> BatchReport:
        async with open_stored_batch(name, ledger) as batch:
            if isinstance(retry_failed, tuple):
                await batch.check_failed(retry_failed)
            again = batch.call(retry_failed=retry_failed, on_change=on_change)
        report = await arun_batch(again.pop("crew"), again.pop("dataset"), on_progress=progress.watch_batch, **again)
        if retry_failed and report.failed and not report.kickoffs and report.stopped is None:
            _output.note(
                "No row was started again: each had as many kickoffs as the crew's max_attempts allows, is lost and "
                "not named by --row, or has a result for other inputs."
            )
        return report

    return await _run(name, call, output)


@app.command
async def cancel(name: Name, /, *, ledger: Ledger = None, crew: CrewOfRun = CrewOfRun()) -> int:
    """Cancel the flow run that runs a batch. If no process runs the batch, stop the batch's runs in flight."""
    async with open_stored_batch(name, ledger) as batch, BatchLock(batch.ledger.database, name) as lock:
        code = 0
        if await lock.take():
            batch.ledger.is_exclusive = True
            records = [record for record in await batch.ledger.in_flight() if state_of(record) is not RowState.LOST]
            stopped = 0
            for url in sorted({record.crew_url for record in records}):
                stopped += await _stop_runs(batch, [record for record in records if record.crew_url == url], crew)
            code = 0 if stopped else OTHER
            counts = f"{stopped:,} of {len(records):,} runs in flight were asked to stop."
            if stopped < len(records):
                counts += " The crew's server did not stop the others, which may have ended."
            done = counts if records else "no run is in flight."
        else:
            done = await _cancel_flow_run(batch.flow_run_id)
        _output.put(f"Batch {name}: {done} {_how_to_go_on(await batch.status())}".rstrip())
    return code


async def _cancel_flow_run(run_id: str | None) -> str:
    """Ask Prefect to cancel a flow run that has not ended. The flow run then does what `on_cancel` says."""
    async with get_client() as client:
        with suppress(ObjectNotFound):
            run = None if run_id is None else await client.read_flow_run(UUID(run_id))
            if run is not None and run.state is not None and not run.state.is_final():
                answer = await client.set_flow_run_state(run.id, Cancelling())
                if answer.status is not SetStateStatus.ACCEPT:
                    why = getattr(answer.details, "reason", None) or answer.status
                    raise CrewError(f"Prefect does not cancel flow run {run.name}, which runs this batch: {why}.")
                return f"flow run {run.name} is being cancelled."
    raise CrewError(
        "A process runs this batch, and no unfinished flow run is on record for it. Find that flow run on Prefect's "
        "page and cancel it."
    )


async def _stop_runs(batch: StoredBatch, records: list[RunRecord], crew: CrewOfRun) -> int:
    """Ask one crew's server to stop runs that nobody waits for, many at a time; return how many it stops."""
    gate = asyncio.Semaphore(STOPS_AT_ONCE)
    try:
        crew_of_runs = await crew.need(records[0])
    except CrewError as error:
        _output.note(f"{len(records):,} runs on {records[0].crew_url} were not stopped: {error}")
        return 0
    async with CrewSession(crew_of_runs) as session:

        async def stop(record: RunRecord) -> bool:
            async with gate:
                try:
                    return await stop_row(session, record, STOPPED_WITH_BATCH, batch.ledger)
                except CrewError as error:
                    _output.note(f"Run {record.kickoff_id} was not stopped: {error}")
                    return False

        stopped = await asyncio.gather(*map(stop, records))
    with suppress(*PREFECT_ERRORS, UnreadableRecordError):  # a later call of the batch does it
        await note_over(records)
    return sum(stopped)


@app.command
async def export(
    name: Name,
    file: Annotated[
        str | None,
        Parameter(
            name="FILE",
            help="A .jsonl or .parquet file, or sql://BLOCK/TABLE; if left out, the last call's export.",
        ),
    ] = None,
    /,
    *,
    overwrite: bool = False,
    ledger: Ledger = None,
) -> None:
    """Write the results of all rows that have ended, also while the batch runs.

    Args:
        overwrite: Replace a file, or rows of a table, that are not an export of this batch.
    """
    _look_here()
    async with open_stored_batch(name, ledger) as batch:
        where, count = await batch.export(file, overwrite=overwrite)
    _output.put(f"{count:,} lines of batch {name} are in {where}.")
