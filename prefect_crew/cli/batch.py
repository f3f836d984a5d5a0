"""The commands `batch`: a crew for every row of a data set."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._errors import ROWS, UsageError, by_options
from prefect_crew.cli._options import CrewAccess, CrewName, CrewOfRun, Output, Timeout, Yes, read_pairs, wait_policy
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.cli._progress import Progress
from prefect_crew.cli.runs import crew_of, needs_crew
from prefect_crew.exceptions import CrewError

if TYPE_CHECKING:
    from prefect_crew.batches.ledger import LedgerRow
    from prefect_crew.batches.report import BatchReport
    from prefect_crew.batches.rows import SetAside
    from prefect_crew.batches.stored import BatchStatus, StoredBatch
    from prefect_crew.records.model import RunRecord


SET_ASIDE = "set-aside"
DataSet = Annotated[
    str,
    Parameter(
        name="DATASET",
        help="CSV, TSV, JSON Lines, JSON or Parquet: a path, a URL or an fsspec address; compressed or not.",
    ),
]
Name = Annotated[str, Parameter(name="NAME", help="The batch's name.")]
Ledger = Annotated[
    str | None,
    Parameter(
        name="--ledger",
        help="The ledger, if the one on record cannot be opened: a path, a PostgreSQL URL or secret://NAME.",
    ),
]

app = App(name="batch", help="Run a crew for every row of a data set, and follow such batches.")


@Parameter(name="*")
@dataclass(frozen=True)
class BatchChoices:
    """How rows become runs.

    Args:
        ledger: A path, a PostgreSQL URL or secret://NAME; if left out, a file next to a local export.
        key: The column that holds the key of each row, not a key as in `run`; if left out, a digest of the inputs.
        inputs: An input, as name=COLUMN, not name=value as in `run`, or name='text with {{ COLUMN }}'; can be repeated.
        format: The file's format, if its name does not tell.
        encoding: The encoding of a text file.
        max_in_flight: Runs in flight at a time; 100 if left out.
        kickoffs_per_second: A limit on the rate of kickoffs.
        on_bad_row: Refuse the data set if rows cannot be run, or set those rows aside.
        deduplicate: Run equal rows once.
        rows: Only these rows: START:STOP from 0, without STOP itself, such as 0:500000.
    """

    ledger: str | None = None
    key: str | None = None
    inputs: Annotated[list[str] | None, Parameter(name=["--input", "-i"])] = None
    format: Literal["csv", "tsv", "jsonl", "json", "parquet"] | None = None
    encoding: str = "utf-8-sig"
    max_in_flight: int | None = None
    kickoffs_per_second: float | None = None
    on_bad_row: Literal["refuse", "set-aside"] = "refuse"
    deduplicate: bool = False
    rows: str | None = None

    def options(self) -> dict[str, Any]:
        """Return them as `arun_batch` and `aplan_batch` take them."""
        inputs = read_pairs(self.inputs or (), "COLUMN, or as a template over the columns")
        return {**vars(self), "inputs": inputs or None}


@Parameter(name="*")
@dataclass(frozen=True)
class RunChoices(BatchChoices):
    """How a batch goes on when rows fail, and when it is called again or cancelled.

    Args:
        on_failure: continue; stop at the first failed row; or stop after this number, or share below 1, of them.
        on_change: What to do when the rows or the crew have changed.
        on_cancel: What to do with runs in flight at Ctrl-C or a cancellation: stop, wait for (drain), or leave them.
        retries: How many more times to kick off a failed row, or CLASS=N for one class of error; can be repeated.
        retry_failed: Start the failed rows of earlier calls again.
        max_kickoffs: A limit on kickoffs, of all calls together.
        breaker: Pause after so many failed rows in a row, then try one at a time; 0 never pauses.
        kickoffs_at_once: Kickoffs sent at a time; no more rows than this are uncertain after a crash. Left out: 16, and
            up to 128 where answers take long.
        output_type: A pydantic model that results have to fit, as module:Model.
    """

    on_failure: float | Literal["continue", "stop"] = "continue"
    on_change: Literal["refuse", "continue"] = "refuse"
    on_cancel: Literal["stop", "drain", "leave"] = "stop"
    retries: list[str] | None = None
    retry_failed: bool = False
    max_kickoffs: int | None = None
    breaker: int = 20
    kickoffs_at_once: int | None = None
    output_type: str | None = None

    def options(self) -> dict[str, Any]:
        """Return them as `arun_batch` takes them."""
        return {**super().options(), "retries": _retries(self.retries), "breaker": self.breaker or None}


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
) -> int:
    """Run a crew once for every row of a data set. Call it again to go on where it stopped.

    Args:
        name: The batch's name. The same call with it goes on where it stopped.
        export: The file or address for the results, JSON Lines or .parquet; written when the batch ends or stops.
    """
    options = choices.options()
    if choices.output_type is not None:
        _look_here()
    if choices.retry_failed:
        _confirm_retry(name, yes)

    async def call(shown: Progress) -> BatchReport:
        from prefect_crew.batches.run import arun_batch

        found = await access.load(crew)
        given: dict[str, Any] = {"name": name, "output": export, "wait": wait_policy(found, timeout), **options}
        return await arun_batch(found, dataset, on_progress=shown.watch_batch, **given)

    return _put_report(*_run(name, call), as_json=output is not None)


def _confirm_retry(name: str, yes: bool) -> None:
    _output.confirm(f"Start a new run for failed rows of batch {name}?", yes=yes)


def _retries(given: list[str] | None) -> int | dict[str, int]:
    """Read --retries: a count for all errors, or one for each class."""
    if given is not None and len(given) == 1 and given[0].isdecimal():
        return int(given[0])
    found = read_pairs(given or (), "N", what="--retries", name="CLASS")
    if not all(number.isdecimal() for number in found.values()):
        raise UsageError(f"--retries {' '.join(given or ())}: give a number, or CLASS=N.")
    return {kind: int(number) for kind, number in found.items()} or 0


def _look_here() -> None:
    """Let modules in the working directory be imported, as `python -m` does."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def _run(name: str, call: Callable[[Progress], Coroutine[Any, Any, BatchReport]]) -> tuple[BatchReport, Progress]:
    """Run a batch, and say how to go on with it if Ctrl-C ends it."""
    with Progress() as shown:
        reach_prefect(shown)
        try:
            return asyncio.run(call(shown)), shown
        except KeyboardInterrupt:
            _output.note(f"To go on where it stopped: prefect-crew batch resume {shlex.quote(name)}")
            raise


def _put_report(report: BatchReport, shown: Progress, *, as_json: bool) -> int:
    """Write what a batch came to; return the exit code."""
    page = flow_run_url(shown.flow_run_id)
    if as_json:
        _output.put_json({**report.as_dict(), "flow_run_id": shown.flow_run_id, "flow_run_url": page})
    else:
        _output.put(by_options(str(report)))
        if page:
            _output.note(page, "dim")
    if report.ok:
        return 0
    failures = f"prefect-crew batch failures {shlex.quote(report.name)}"
    if report.uncertain:
        _output.note(f"A person has to resolve {report.uncertain:,} uncertain rows: {failures}")
    elif report.failed:
        _output.note(f"What failed: {failures}. To start it again: prefect-crew batch retry {shlex.quote(report.name)}")
    if report.set_aside:
        _output.note(f"What was set aside: {failures}")
    return ROWS


@app.command
def plan(
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
    """Check every row, and say how many runs, how long and how much. Nothing is started.

    Args:
        name: The batch, to see what is left of it.
        export: Its file of results, next to which its ledger is.
        seconds_per_run: How long one run takes; if left out, the mean of the runs in the ledger.
    """
    options = choices.options()
    reach_prefect()

    async def planned() -> Any:
        from prefect_crew.batches.run import aplan_batch

        found = await access.load(crew)
        return await aplan_batch(found, dataset, name=name, output=export, seconds_per_run=seconds_per_run, **options)

    found = asyncio.run(planned())
    if output:
        _output.put_json(found.as_dict())
    else:
        _output.put(by_options(str(found)))
    return ROWS if found.bad_count and choices.on_bad_row == "refuse" else 0


@app.command
def ls(
    pattern: Annotated[str, Parameter(name="NAME", help="Only these; * stands for any text, as in 'leads/*'.")] = "*",
    /,
    *,
    output: Output = None,
) -> None:
    """List the batches that the Prefect server knows, and where their ledgers are."""
    reach_prefect()
    found = asyncio.run(_list(pattern))
    if output:
        _output.put_json([{"name": name, "ledger": ledger} for name, ledger in found])
    else:
        _output.put_rows(("Batch", "Ledger"), found, empty="The Prefect server knows no such batch.")


async def _list(pattern: str) -> list[tuple[str, str]]:
    from prefect_crew.batches.stored import list_batches

    return [(name, ledger) for name, ledger in await list_batches() if fnmatchcase(name, pattern)]


@app.command
def inspect(
    name: Annotated[str, Parameter(name="NAME", help="The batch's name. 'leads/*' adds up all that begin so.")],
    /,
    *,
    ledger: Ledger = None,
    output: Output = None,
) -> None:
    """Show how a batch stands, also while another process runs it."""
    reach_prefect()
    is_pattern = any(sign in name for sign in "*?[")

    async def look() -> list[BatchStatus]:
        from prefect_crew.batches.stored import open_stored_batch

        found: list[BatchStatus] = []
        for one in [one for one, _ in await _list(name)] if is_pattern else [name]:
            async with open_stored_batch(one, ledger) as batch:
                found.append(await batch.status())
        return found

    found = asyncio.run(look())
    if is_pattern:
        _put_sum(found, as_json=output is not None)
    elif output:
        _output.put_json(found[0].as_dict())
    else:
        for line in _about(found[0]):
            _output.put(line)


SUMMED = ("total", "completed", "failed", "uncertain", "in_flight", "left", "set_aside", "kickoffs")


def _put_sum(found: list[BatchStatus], *, as_json: bool) -> None:
    """Write how several batches stand, and all of them together."""
    whole = {count: sum(getattr(one, count) for one in found) for count in SUMMED}
    if as_json:
        _output.put_json({**whole, "batches": [one.as_dict() for one in found]})
        return
    rows = [(one.name, *(f"{getattr(one, count):,}" for count in SUMMED)) for one in found]
    if found:
        rows.append(("together", *(f"{count:,}" for count in whole.values())))
    titles = ("Batch", *(count.replace("_", " ").capitalize() for count in SUMMED))
    _output.put_rows(titles, rows, empty="The Prefect server knows no such batch.")


def _about(found: BatchStatus) -> list[str]:
    from prefect_crew.artifacts.escape import duration
    from prefect_crew.batches.rows import SetAside

    lines = [f"Batch {found.name}: {found.completed:,} of {found.total:,} rows completed"]
    parts = (("failed", found.failed), ("uncertain", found.uncertain), ("in flight", found.in_flight))
    more = (("not started yet", found.left), ("set aside", found.set_aside))
    counts = [f"{count:,} {word}" for word, count in (*parts, *more) if count]
    lines += [f"  {' · '.join(counts)}"] if counts else []
    if found.running:
        lines.append("  A process runs it now")
    elif found.running is False and (found.left or found.in_flight):
        again = f"prefect-crew batch resume {shlex.quote(found.name)}"
        if found.why_not:
            again = f"make the same call again ({found.why_not})"
        lines.append(f"  No process runs it. To go on where it stopped: {again}")
    if found.waiting:
        lines.append(f"  {found.waiting:,} in flight wait for a person: prefect-crew reviews ls")
    if found.set_aside:
        aside = SetAside(found.set_aside, found.set_aside_rows)
        lines.append(f"  Set aside: {'; '.join(aside.shown(5))}. All are in {found.set_aside_output}")
    seconds = ""
    if found.median is not None and found.longest is not None:
        seconds = f" · a row takes {duration(found.median)} (median), at most {duration(found.longest)}"
    lines.append(f"  {found.kickoffs:,} kickoffs{seconds}")
    if found.output:
        lines.append(f"  Export: {found.output}")
    lines.append(f"  Ledger: {found.ledger}")
    return lines


@app.command
def failures(
    name: Name,
    /,
    *,
    limit: int = 100,
    ledger: Ledger = None,
    output: Output = None,
) -> None:
    """List the rows that failed, are uncertain or were set aside, with their runs and the reason.

    Args:
        limit: How many are shown; -o json shows all.
    """
    reach_prefect()
    most = None if output else limit
    found, aside = asyncio.run(_failures(name, ledger, most))
    if output:
        bad = [{"key": None, "line": row.line, "state": SET_ASIDE, "error": row.reason} for row in aside.rows]
        _output.put_json([*map(_as_json, found), *bad])
        return
    rows = [(row.key, (row.record and row.record.kickoff_id) or "", str(row.state), row.error or "") for row in found]
    rows += [(f"line {row.line}", "", SET_ASIDE, row.reason) for row in aside.rows[:limit]]
    _output.put_rows(("Row", "Run", "State", "Error"), rows, empty=f"No row of batch {name} failed.")
    if most is not None and len(found) == most:
        _output.note(f"The first {most}. --limit shows more, -o json all.")
    if aside.count:
        _output.note(f"Rows that were set aside cannot be run. All {aside.count:,} are in {aside.output}.")
    if first := next((row.record for row in found if str(row.state) in ("uncertain", "claimed")), None):
        _output.note(
            f"To resolve an uncertain row, look at the crew's page, then: prefect-crew runs resolve "
            f"{shlex.quote(first.idempotency_key)} --kickoff-id ID, or --never-started."
        )


async def _failures(name: str, ledger: str | None, most: int | None) -> tuple[list[LedgerRow], SetAside]:
    from prefect_crew.batches.stored import open_stored_batch

    async with open_stored_batch(name, ledger) as batch:
        return [row async for row in batch.failures(most)], batch.entry.set_aside


def _as_json(row: LedgerRow) -> dict[str, Any]:
    shown = {"idempotency_key", "kickoff_id", "attempt", "kicked_off_at", "ended_at"}
    about = {} if row.record is None else row.record.model_dump(mode="json", include=shown)
    return {"key": row.key, "state": str(row.state), "error": row.error or None, **about}


@app.command
def retry(
    name: Name,
    /,
    *,
    key: list[str] | None = None,
    ledger: Ledger = None,
    yes: Yes = False,
    output: Output = None,
) -> int:
    """Start the failed rows of a batch again, with the options of its last call, and go on with what is left.

    Args:
        key: Only the row with this key; can be repeated.
    """
    _confirm_retry(name, yes)
    return _go_on(name, ledger, retry_failed=tuple(key) if key else True, as_json=output is not None)


@app.command
def resume(name: Name, /, *, ledger: Ledger = None, output: Output = None) -> int:
    """Go on with a batch where it stopped, with the options of its last call."""
    return _go_on(name, ledger, retry_failed=False, as_json=output is not None)


def _go_on(name: str, ledger: str | None, *, retry_failed: bool | tuple[str, ...], as_json: bool) -> int:
    """Call a batch again by its name."""

    async def call(shown: Progress) -> BatchReport:
        from prefect_crew.batches.run import arun_batch
        from prefect_crew.batches.stored import open_stored_batch

        async with open_stored_batch(name, ledger) as batch:
            if isinstance(retry_failed, tuple):
                await batch.check_failed(retry_failed)
            again = batch.call(retry_failed=retry_failed)
        return await arun_batch(again.pop("crew"), again.pop("dataset"), on_progress=shown.watch_batch, **again)

    _look_here()  # for an output_type
    report, shown = _run(name, call)
    code = _put_report(report, shown, as_json=as_json)
    if retry_failed and report.failed and not report.kickoffs and report.stopped is None:
        _output.note(
            "No row was started again: each had as many kickoffs as the crew's max_kickoffs allows, is lost and not "
            "named by --key, or had other inputs before."
        )
    return code


@app.command
def cancel(name: Name, /, *, crew: CrewOfRun = None, ledger: Ledger = None, access: CrewAccess = CrewAccess()) -> None:
    """Cancel a batch: the flow run that runs it, else stop its runs that are still in flight."""
    reach_prefect()

    async def end() -> str:
        from prefect_crew.batches.outcomes import RowState
        from prefect_crew.batches.ownership import BatchLock
        from prefect_crew.batches.stored import open_stored_batch

        async with open_stored_batch(name, ledger) as batch, BatchLock(batch.ledger.database, name) as lock:
            rows = batch.ledger.rows_in([RowState.STARTED, RowState.CLAIMED])
            records = [row.record async for row in rows if row.record is not None]
            if not await lock.take():
                return await _cancel_flow_runs({record.flow_run_id for record in records if record.flow_run_id})
            batch.ledger.is_exclusive = lock.proves
            return await _stop_runs(batch, [record for record in records if record.kickoff_id], crew, access)

    _output.put(
        f"Batch {name}: {asyncio.run(end())} To go on with it later: prefect-crew batch resume {shlex.quote(name)}"
    )


async def _cancel_flow_runs(ids: set[str]) -> str:
    """Ask Prefect to cancel the flow runs that have not ended, which do what `on_cancel` says."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.states import Cancelling

    async with get_client() as client:
        wanted = FlowRunFilter.model_validate({"id": FlowRunFilterId.model_validate({"any_": sorted(ids)})})
        found = await client.read_flow_runs(flow_run_filter=wanted) if ids else []
        open_runs = [run for run in found if run.state is not None and not run.state.is_final()]
        for run in open_runs:
            await client.set_flow_run_state(run.id, Cancelling())
    if not open_runs:
        raise CrewError("A process runs this batch, and its flow run is not known. Cancel it on Prefect's page.")
    return f"flow run {', '.join(run.name for run in open_runs)} is being cancelled."


async def _stop_runs(batch: StoredBatch, records: list[RunRecord], crew: str | None, access: CrewAccess) -> str:
    """Ask the crew's server to stop runs that nobody waits for."""
    from prefect_crew.batches.outcomes import STOPPED_WITH_BATCH
    from prefect_crew.runs.stop import close_stopped

    if not records:
        return "no run is in flight."
    found = await crew_of(records[0], crew, access)
    if found is None:
        raise needs_crew(records[0])
    stopped = 0
    async with found.client() as client:
        for record in records:
            try:
                answer = await client.stop(str(record.kickoff_id))
            except CrewError as error:
                _output.note(f"Run {record.kickoff_id} was not stopped: {error}")
                continue
            record.reason = STOPPED_WITH_BATCH
            await close_stopped(record, answer, batch.ledger)
            stopped += answer.accepted
    return f"{stopped:,} of {len(records):,} runs in flight were asked to stop."


@app.command
def export(
    name: Name,
    file: Annotated[
        str | None, Parameter(name="FILE", help="JSON Lines or .parquet; if left out, that of the batch's last call.")
    ] = None,
    /,
    *,
    ledger: Ledger = None,
) -> None:
    """Write the results of all rows that have ended, also while the batch runs."""
    reach_prefect()
    _look_here()  # for an output_type

    async def write() -> tuple[str, int]:
        from prefect_crew.batches.stored import open_stored_batch

        async with open_stored_batch(name, ledger) as batch:
            return await batch.export(file)

    where, count = asyncio.run(write())
    _output.put(f"{count:,} lines of batch {name} are in {where}.")
