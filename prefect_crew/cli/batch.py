"""The commands `batch`: a crew for every row of a data set."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

from cyclopts import App, Parameter
from prefect.client.orchestration import get_client
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from prefect_crew._text import listed_rows
from prefect_crew.batches.batch import StoredBatch, bad_rows_of, find_batch, state_of, stop_runs
from prefect_crew.batches.report import BatchReport
from prefect_crew.batches.run import aplan_batch, arun_batch
from prefect_crew.batches.runner import row_key
from prefect_crew.cli import _output
from prefect_crew.cli._errors import OTHER, ROWS
from prefect_crew.cli._options import (
    CrewName,
    CrewOfRun,
    Output,
    is_url,
    load,
    need_crew,
    read_pairs,
)
from prefect_crew.cli._output import Progress
from prefect_crew.cli._prefect import page_url
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import CrewError
from prefect_crew.runs.database import in_store
from prefect_crew.store.batches import cancel_batch, list_batches

COUNTS = ("failed", "conflicts", "uncertain", "in_flight", "kickoffs")
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
    """How rows become runs. All other options are those of `run_batch` in Python.

    Args:
        key_column: The column that holds the key of each row; if left out, a digest of the row's inputs.
        map: An input and its column, as NAME=COLUMN, or NAME='text with {{ COLUMN }}'; can be repeated.
        max_in_flight: Runs in flight at a time; 100 if left out.
        on_bad_row: If rows cannot be run, refuse the data set, or skip these rows.
        rows: Only these rows: START:STOP from 0, without STOP itself, such as 0:500000.
    """

    key_column: str | None = None
    map: Annotated[list[str] | None, Parameter(negative=())] = None
    max_in_flight: int | None = None
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    rows: str | None = None

    def options(self) -> dict[str, Any]:
        """Return the choices as arguments of `arun_batch` and `aplan_batch`. A plan has bad rows in it."""
        inputs = read_pairs("--map", self.map or (), "COLUMN") or None
        return {"key": self.key_column, "inputs": inputs, "max_in_flight": self.max_in_flight, "rows": self.rows}


@app.command
async def run(
    crew: CrewName,
    dataset: DataSet,
    /,
    *,
    name: str,
    export: str,
    choices: BatchChoices = BatchChoices(),
    on_failure: float | Literal["continue", "stop"] = "continue",
    output: Output = None,
) -> int:
    """Run a crew once for every row of a data set. Call it again to go on where it stopped.

    Args:
        name: The batch's name. The same call with it goes on where it stopped.
        export: The file or address for the results, .jsonl or .csv, or sql://BLOCK/TABLE; written when the
            batch ends or stops.
        on_failure: continue, stop (at the first failed row), or a number or share (below 1) of failed rows to stop at.
    """
    options: dict[str, Any] = {"on_failure": on_failure, "on_bad_row": choices.on_bad_row, **choices.options()}

    async def call(progress: Progress) -> BatchReport:
        loaded_crew: Any = await load(crew)
        watch = progress.watch_batch
        return await arun_batch(loaded_crew, dataset, name=name, export=export, on_progress=watch, **options)

    return await _run(name, call, output, by_name=not is_url(crew))


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
        report = await call(progress)
    except (asyncio.CancelledError, KeyboardInterrupt):
        name = progress.batch or name
        stop = f"prefect-crew batch cancel {shlex.quote(name)}"
        _output.note(f"To go on where it stopped: {_again(name, by_name)}. To stop the runs in flight: {stop}")
        raise
    name = progress.batch or name
    page = page_url(progress.flow_run_id)
    as_json = output and {**report.as_dict(), "flow_run_id": progress.flow_run_id, "flow_run_url": page}
    _output.put(str(report), json=as_json)
    if page:
        _output.note(page, "dim")
    failures = f"prefect-crew batch failures {shlex.quote(name)}"
    if report.uncertain:
        _output.note(f"A person has to resolve {report.uncertain:,} uncertain rows: {failures}")
    elif report.failed or report.bad_count:
        _output.note(f"Failed and bad rows: {failures}")
    if report.failed > report.conflicts + report.unfinished:
        _output.note(f"To start failed rows again, up to max_attempts of the crew: {_again(name, by_name)}")
    return 0 if report.ok else ROWS


def _again(name: str, by_name: bool) -> str:
    return f"prefect-crew batch resume {shlex.quote(name)}" if by_name else "make the same call again"


@app.command
async def plan(
    crew: CrewName,
    dataset: DataSet,
    /,
    *,
    name: str = "plan",
    seconds_per_run: float | None = None,
    output: Output = None,
    choices: BatchChoices = BatchChoices(),
) -> int:
    """Check every row, and print the number of runs, the time and the cost. Nothing is started.

    Args:
        name: The batch's name, to count only the rows that are left.
        seconds_per_run: How long one run takes; if left out, the mean of the batch's completed runs.
    """
    loaded_crew: Any = await load(crew)
    batch_plan = await aplan_batch(
        loaded_crew, dataset, name=name, seconds_per_run=seconds_per_run, **choices.options()
    )
    _output.put(str(batch_plan), json=output and batch_plan.as_dict())
    return ROWS if batch_plan.bad_count and choices.on_bad_row == "refuse" else 0


@app.command
async def ls(*, output: Output = None) -> None:
    """List the batches, the one that ran last first. `batch inspect` shows a status."""
    batches = await in_store(list_batches)
    as_json = output and [{"name": batch.name, "crew_url": batch.crew_url, "rows": batch.total} for batch in batches]
    rows = [(batch.name, f"{batch.total:,}", batch.crew_url) for batch in batches]
    _output.put_rows(("Batch", "Rows", "Crew"), rows, empty="The crew database has no batch.", json=as_json)


@app.command
async def inspect(name: Name, /, *, output: Output = None) -> None:
    """Show the status of a batch, also while another process runs it."""
    batch = await find_batch(name)
    report = await batch.report()
    if output:
        _output.put_json(report.as_dict())
        return
    _output.put(f"Batch {name}: {report.completed:,} of {report.total:,} rows completed")
    if report.phase == "running":
        _output.put("  A process runs it now")
    elif again := _how_to_go_on(batch, report):
        _output.put(f"  No process runs it. {again}")
    counts = {name: getattr(report, name) for name in COUNTS}
    bad = report.bad_count and listed_rows(report.bad, report.bad_count)
    not_run = report.skipped - report.bad_count - report.in_flight
    others = {"not run": not_run, "bad rows": bad, "it stopped": report.stopped, "export": report.export}
    _output.put_facts({**counts, **others})


def _how_to_go_on(batch: StoredBatch, report: BatchReport) -> str:
    """Return how to continue a batch; empty if every row has ended."""
    is_over = report.skipped == report.bad_count and not report.failed
    return "" if is_over else f"To go on where it stopped: {_again(batch.name, 'crew' in batch.call)}"


@app.command
async def failures(name: Name, /, *, output: Output = None) -> None:
    """List the rows that failed, are uncertain or cannot be run, with their runs and the reason."""
    batch = await find_batch(name)
    found, bad = await batch.failures(None if output else SHOWN), bad_rows_of(batch.entry)
    rows: list[dict[str, Any]] = [
        {
            "key": row.row_key,
            "state": state_of(row),
            "error": row.error,
            "kickoff_id": row.kickoff_id,
            "attempt": row.number,
            "idempotency_key": row_key(name, row.row_key),
        }
        for row in found
    ]
    rows += [{"line": row.line, "state": "bad", "error": row.reason} for row in bad.rows]
    cells = [
        (row.get("key") or f"line {row['line']}", row.get("kickoff_id") or "", row["state"], row["error"] or "")
        for row in rows
    ]
    header = ("Row", "Run", "State", "Error")
    _output.put_rows(header, cells, empty=f"No row of batch {name} failed.", json=output and rows)
    if len(found) == SHOWN and not output:
        _output.note(f"The first {SHOWN}; -o json shows all.")
    if bad.count:
        _output.note(f"{bad.count:,} bad rows cannot be run.")
    if first := next((row for row in found if state_of(row) in ("uncertain", "posting")), None):
        _output.note(
            f"To resolve an uncertain row, look at the crew's page, then: prefect-crew runs resolve "
            f"{shlex.quote(row_key(name, first.row_key))} --kickoff-id ID, or --never-started."
        )


@app.command
async def resume(name: Name, /, *, output: Output = None) -> int:
    """Go on with a batch where it stopped, with the options of its last call. Failed rows start again."""

    async def call(progress: Progress) -> BatchReport:
        again = (await find_batch(name)).arguments()
        return await arun_batch(again.pop("crew"), again.pop("dataset"), on_progress=progress.watch_batch, **again)

    return await _run(name, call, output)


@app.command
async def cancel(name: Name, /, *, crew: CrewOfRun = None) -> int:
    """Cancel the flow run that runs a batch. If no process runs the batch, stop the batch's runs in flight."""
    batch, code = await find_batch(name), 0
    if await batch.is_running():
        done = await _cancel_flow_run(batch.entry.flow_run_id)
        await in_store(cancel_batch, name)
    elif in_flight := await batch.in_flight():
        session = CrewSession(await need_crew(in_flight[0], crew))
        stopped, problems = await stop_runs(session, in_flight)
        for problem in problems:
            _output.note(problem)
        code = 0 if stopped else OTHER
        done = f"{stopped:,} of {len(in_flight):,} runs in flight were asked to stop."
        if stopped < len(in_flight):
            done += " The crew's server did not stop the others, which may have ended."
    else:
        code, done = OTHER, "no run is in flight."
    batch = await find_batch(name)
    _output.put(f"Batch {name}: {done} {_how_to_go_on(batch, await batch.report())}".rstrip())
    return code


async def _cancel_flow_run(run_id: str | None) -> str:
    """Ask Prefect to cancel a flow run that has not ended. The flow run then stops its runs."""
    async with get_client() as client:
        with suppress(ObjectNotFound):
            run = None if run_id is None else await client.read_flow_run(UUID(run_id))
            if run is not None and run.state is not None and not run.state.is_final():
                answer = await client.set_flow_run_state(run.id, Cancelling())
                if answer.status is not SetStateStatus.ACCEPT:
                    why = getattr(answer.details, "reason", None) or answer.status
                    raise CrewError(f"Prefect does not cancel flow run {run.name}, which runs this batch: {why}.")
                return f"flow run {run.name} is being cancelled."
    return "the process that runs it is asked to stop."


@app.command
async def export(
    name: Name,
    file: Annotated[
        str | None,
        Parameter(
            name="FILE",
            help="A .jsonl or .csv file, or sql://BLOCK/TABLE; if left out, the last call's export.",
        ),
    ] = None,
    /,
    *,
    overwrite: bool = False,
) -> None:
    """Write the results of all rows that have ended, also while the batch runs.

    Args:
        overwrite: Replace a file, or rows of a table, that are not an export of this batch.
    """
    _look_here()
    where, count = await (await find_batch(name)).export(file, overwrite=overwrite)
    _output.put(f"{count:,} lines of batch {name} are in {where}.")
