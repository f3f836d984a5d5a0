"""Commands about batches."""

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
from prefect_crew.cli._options import CREW, CREW_OF_RUN, JSON, CrewAccess, read_pairs, wait_policy
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.cli._progress import Progress, progress
from prefect_crew.cli.runs import status_call
from prefect_crew.exceptions import ConfigurationError

if TYPE_CHECKING:
    from prefect_crew.batches.ledger import LedgerRow
    from prefect_crew.batches.report import BatchReport
    from prefect_crew.batches.rows import SetAside
    from prefect_crew.batches.stored import BatchStatus


DATASET = Parameter(
    name="DATASET",
    help="CSV, TSV, JSON Lines, JSON or Parquet: a path, a URL, any fsspec address; compressed or not.",
)
NAME = Parameter(name="NAME", help="The batch's name.")
LEDGER = Parameter(help="Its ledger, where the one on record does not do: a path, a PostgreSQL URL, or secret://NAME.")

app = App(name="batch", help="Batches: a crew for every row of a data set.")


@Parameter(name="*")
@dataclass(frozen=True)
class BatchChoices:
    """How rows become runs."""

    ledger: Annotated[
        str | None,
        Parameter(help="A path, a PostgreSQL URL, or secret://NAME. Left out: a file next to a local output."),
    ] = None
    key: Annotated[str | None, Parameter(help="The column that tells rows apart. Left out: a digest of inputs.")] = None
    input_: Annotated[
        list[str] | None,
        Parameter(
            name=["--input", "-i"],
            help="An input, as name=COLUMN or name='text with {{ COLUMN }}'; may be given again.",
        ),
    ] = None
    format: Annotated[
        Literal["csv", "tsv", "jsonl", "json", "parquet"] | None, Parameter(help="Where the name does not tell.")
    ] = None
    encoding: Annotated[str, Parameter(help="Of a text file.")] = "utf-8-sig"
    max_in_flight: Annotated[int | None, Parameter(help="Runs at a time; 100 if left out.")] = None
    kickoffs_per_second: Annotated[float | None, Parameter(help="A limit on the rate of kickoffs.")] = None
    on_bad_row: Annotated[
        Literal["refuse", "set-aside"], Parameter(help="Refuse the data set, or set rows aside that cannot be run.")
    ] = "refuse"
    deduplicate: Annotated[bool, Parameter(help="Equal rows are one run.")] = False
    rows: Annotated[
        str | None, Parameter(help="Only a range of rows, as START:STOP from 0, the last one excluded: 0:500000.")
    ] = None

    def options(self) -> dict[str, Any]:
        """Return them as `arun_batch` and `aplan_batch` take them."""
        inputs = read_pairs(self.input_ or (), "COLUMN, or as a template over the columns")
        return {
            "ledger": self.ledger,
            "key": self.key,
            "inputs": inputs or None,
            "format": self.format,
            "encoding": self.encoding,
            "max_in_flight": self.max_in_flight,
            "kickoffs_per_second": self.kickoffs_per_second,
            "on_bad_row": self.on_bad_row,
            "deduplicate": self.deduplicate,
            "rows": self.rows,
        }


@app.command
def run(
    crew: Annotated[str, CREW],
    dataset: Annotated[str, DATASET],
    /,
    *,
    name: Annotated[str, Parameter(help="The batch's name: the same call with it goes on where it stopped.")],
    output: Annotated[str, Parameter(help="Where the lines go in the end, or when it stops: JSON Lines, or .parquet.")],
    on_failure: Annotated[
        str, Parameter(help="continue, stop at the first failed row, after how many, or after which share below 1.")
    ] = "continue",
    on_change: Annotated[
        Literal["refuse", "continue"], Parameter(help="What to do when rows or crew are others than before.")
    ] = "refuse",
    on_cancel: Annotated[
        Literal["stop", "drain", "leave"], Parameter(help="What becomes of runs in flight at Ctrl-C or a cancellation.")
    ] = "stop",
    retries: Annotated[int, Parameter(help="Further kickoffs of a row that fails.")] = 0,
    retry_on: Annotated[
        list[str] | None,
        Parameter(
            help="Only after errors of this class (CrewFailedError, CrewStoppedError, CrewLostError, OutputTypeError); "
            "may be given again; CLASS=N for a number of its own.",
        ),
    ] = None,
    retry_failed: Annotated[bool, Parameter(help="Start the failed rows of earlier calls again.")] = False,
    max_kickoffs: Annotated[int | None, Parameter(help="A limit on kickoffs, of all calls together.")] = None,
    breaker: Annotated[
        int, Parameter(help="Failed rows in a row after which it pauses, then tries one at a time; 0 never does.")
    ] = 20,
    kickoffs_at_once: Annotated[
        int, Parameter(help="Kickoffs under way at a time: at most so many rows are uncertain after a crash.")
    ] = 16,
    timeout: Annotated[float | None, Parameter(help="Seconds that a run may take, pending and running.")] = None,
    output_type: Annotated[
        str | None, Parameter(help="A pydantic model that results have to fit, as module:Model.")
    ] = None,
    json: Annotated[bool, JSON] = False,
    choices: BatchChoices = BatchChoices(),
    access: CrewAccess = CrewAccess(),
) -> int:
    """Run a crew once for every row of a data set; call it again to go on where it stopped."""
    options: dict[str, Any] = {
        **choices.options(),
        "name": name,
        "output": output,
        "on_failure": _limit(on_failure),
        "on_change": on_change,
        "on_cancel": on_cancel,
        "retries": _retries(retries, retry_on),
        "retry_failed": retry_failed,
        "max_kickoffs": max_kickoffs,
        "breaker": breaker or None,
        "kickoffs_at_once": kickoffs_at_once,
    }
    if output_type is not None:
        look_here()
        options["output_type"] = output_type

    async def call() -> BatchReport:
        from prefect_crew.batches.run import arun_batch

        found = await access.load(crew)
        if timeout is not None:
            options["wait"] = wait_policy(found, timeout)
        return await arun_batch(found, dataset, on_progress=shown.watch_batch, **options)

    with progress() as shown:
        reach_prefect(shown)
        report = started(name, call)
    return put_report(report, shown, as_json=json)


def _limit(text: str) -> Any:
    """Read what `on_failure` is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _retries(count: int, classes: list[str] | None) -> int | dict[str, int]:
    """Read --retries and --retry-on: a count for all errors, or one for each class."""
    if not classes:
        return count
    found: dict[str, int] = {}
    for given in classes:
        kind, sign, number = given.partition("=")
        if sign and not number.isdecimal():
            raise UsageError(f"--retry-on {given!r}: give CLASS, or CLASS=N with how often.")
        # Whoever names a class and no number wants one retry.
        found[kind.strip()] = int(number) if sign else count or 1
    return found


def look_here() -> None:
    """Let modules in the working directory be imported, as `python -m` does."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def started(name: str, call: Callable[[], Coroutine[Any, Any, BatchReport]]) -> BatchReport:
    """Run a batch, and say how to go on with it if Ctrl-C ends it."""
    try:
        return asyncio.run(call())
    except KeyboardInterrupt:
        _output.note(f"To go on where it stopped: {_program('resume', shlex.quote(name))}")
        raise


def put_report(report: BatchReport, shown: Progress, *, as_json: bool) -> int:
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
    batch = shlex.quote(report.name)
    if report.uncertain:
        _output.note(
            f"{report.uncertain:,} rows are uncertain, to be resolved by a person: {_program('failures', batch)}"
        )
    elif report.failed:
        _output.note(f"What failed: {_program('failures', batch)}. To start it again: {_program('retry', batch)}")
    if report.set_aside:
        _output.note(f"What was set aside: {_program('failures', batch)}")
    return ROWS


def _program(command: str, batch: str) -> str:
    return f"{_output.command('prefect-crew batch')} {command} {batch}"


@app.command
def plan(
    crew: Annotated[str, CREW],
    dataset: Annotated[str, DATASET],
    /,
    *,
    name: Annotated[str, Parameter(help="The batch, to see what is left of it.")] = "plan",
    output: Annotated[str, Parameter(help="Its output; its ledger is next to it.")] = "batch.jsonl",
    seconds_per_run: Annotated[
        float | None, Parameter(help="How long one run takes. Left out: the mean of what the ledger has seen.")
    ] = None,
    json: Annotated[bool, JSON] = False,
    choices: BatchChoices = BatchChoices(),
    access: CrewAccess = CrewAccess(),
) -> int:
    """Check every row, and say how many runs, how long and how much. Nothing is started."""
    options = choices.options()
    reach_prefect()

    async def planned() -> Any:
        from prefect_crew.batches.run import aplan_batch

        found = await access.load(crew)
        return await aplan_batch(found, dataset, name=name, output=output, seconds_per_run=seconds_per_run, **options)

    found = asyncio.run(planned())
    if json:
        _output.put_json(found.as_dict())
    else:
        _output.put(str(found))
    return ROWS if found.bad_count and choices.on_bad_row == "refuse" else 0


@app.command
def retry(
    name: Annotated[str, NAME],
    /,
    *,
    key: Annotated[list[str] | None, Parameter(help="Only this row; may be given again.")] = None,
    ledger: Annotated[str | None, LEDGER] = None,
    json: Annotated[bool, JSON] = False,
) -> int:
    """Start the failed rows of a batch again, with the options of its last call, and go on with what is left."""
    return go_on(name, ledger, retry_failed=tuple(key) if key else True, json=json)


@app.command
def resume(
    name: Annotated[str, NAME],
    /,
    *,
    ledger: Annotated[str | None, LEDGER] = None,
    json: Annotated[bool, JSON] = False,
) -> int:
    """Go on with a batch where it stopped, with the options of its last call."""
    return go_on(name, ledger, retry_failed=False, json=json)


def go_on(name: str, ledger: str | None, *, retry_failed: bool | tuple[str, ...], json: bool) -> int:
    """Call a batch again by its name."""

    async def call() -> BatchReport:
        from prefect_crew.batches.run import arun_batch
        from prefect_crew.batches.stored import open_stored_batch

        async with open_stored_batch(name, ledger) as batch:
            if isinstance(retry_failed, tuple):
                await batch.check_failed(retry_failed)
            again = batch.call(retry_failed=retry_failed)
        return await arun_batch(again.pop("crew"), again.pop("dataset"), on_progress=shown.watch_batch, **again)

    look_here()  # for an output_type
    with progress() as shown:
        reach_prefect(shown)
        report = started(name, call)
    code = put_report(report, shown, as_json=json)
    if retry_failed and report.failed and not report.kickoffs and report.stopped is None:
        _output.note(
            "No row was started again: that is so once a row had as many kickoffs as max_kickoffs of the crew's block "
            "allows, where its run is lost and it is not named (--key KEY), and where its key had other inputs before."
        )
    return code


SET_ASIDE = "set-aside"


@app.default
def overview(*, json: Annotated[bool, JSON] = False) -> None:
    """List the batches that the Prefect server knows, and where their ledgers are."""
    list_batches(json=json)


@app.command(name="list")
def list_batches(
    pattern: Annotated[str, Parameter(name="NAME", help="Only these: * stands for any text, as in 'leads/*'.")] = "*",
    /,
    *,
    json: Annotated[bool, JSON] = False,
) -> None:
    """List the batches that the Prefect server knows, and where their ledgers are."""
    reach_prefect()
    from prefect_crew.batches.stored import list_batches as list_stored

    found = [(name, ledger) for name, ledger in asyncio.run(list_stored()) if fnmatchcase(name, pattern)]
    if json:
        _output.put_json([{"name": name, "ledger": ledger} for name, ledger in found])
    else:
        _output.put_rows(("Batch", "Ledger"), found, empty="The Prefect server knows no batch.")


@app.command
def inspect(
    name: Annotated[str, Parameter(name="NAME", help="The batch's name. 'leads/*' adds up all that begin so.")],
    /,
    *,
    ledger: Annotated[str | None, LEDGER] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Show how a batch stands: also while it runs, in whichever process."""
    reach_prefect()
    is_pattern = any(sign in name for sign in "*?[")

    async def look() -> list[BatchStatus]:
        from prefect_crew.batches.stored import list_batches as list_stored
        from prefect_crew.batches.stored import open_stored_batch

        names = [one for one, _ in await list_stored() if fnmatchcase(one, name)] if is_pattern else [name]
        found: list[BatchStatus] = []
        for one in names:
            async with open_stored_batch(one, ledger) as batch:
                found.append(await batch.status())
        return found

    found = asyncio.run(look())
    if is_pattern:
        _put_sum(found, name, as_json=json)
    elif json:
        _output.put_json(found[0].as_dict())
    else:
        for line in _about(found[0]):
            _output.put(line)


SUMMED = ("total", "completed", "failed", "uncertain", "in_flight", "left", "set_aside", "kickoffs")


def _put_sum(found: list[BatchStatus], pattern: str, *, as_json: bool) -> None:
    """Write how several batches stand, and all of them together."""
    whole = {count: sum(getattr(one, count) for one in found) for count in SUMMED}
    if as_json:
        _output.put_json({**whole, "batches": [one.as_dict() for one in found]})
        return
    rows = [(one.name, *(f"{getattr(one, count):,}" for count in SUMMED)) for one in found]
    if found:
        rows.append(("together", *(f"{count:,}" for count in whole.values())))
    titles = ("Batch", *(count.replace("_", " ").capitalize() for count in SUMMED))
    _output.put_rows(titles, rows, empty=f"The Prefect server knows no batch {pattern}.")


def _about(found: BatchStatus) -> list[str]:
    from prefect_crew.artifacts.markdown import duration
    from prefect_crew.batches.rows import SetAside

    lines = [f"Batch {found.name}: {found.completed:,} of {found.total:,} rows completed"]
    parts = (("failed", found.failed), ("uncertain", found.uncertain), ("in flight", found.in_flight))
    more = (("not started yet", found.left), ("set aside", found.set_aside))
    counts = [f"{count:,} {word}" for word, count in (*parts, *more) if count]
    lines += [f"  {' · '.join(counts)}"] if counts else []
    if found.running:
        lines.append("  A process runs it now")
    elif found.running is False and (found.left or found.in_flight):
        resume = f"{_output.command('prefect-crew batch resume')} {shlex.quote(found.name)}"
        if found.why_not is not None:
            resume = f"make the same call again ({found.why_not})"
        lines.append(f"  No process runs it. To go on where it stopped: {resume}")
    if found.waiting:
        lines.append(f"  {found.waiting:,} in flight wait for a person: {_output.command('prefect-crew reviews')}")
    if found.set_aside:
        aside = SetAside(found.set_aside, found.set_aside_rows)
        lines.append(f"  Set aside: {'; '.join(aside.shown(5))}. All are in {found.set_aside_output}")
    seconds = ""
    if found.median is not None and found.longest is not None:
        seconds = f" · a row takes {duration(found.median)} (median), at most {duration(found.longest)}"
    lines.append(f"  {found.kickoffs:,} kickoffs{seconds}")
    if found.output:
        lines.append(f"  Output: {found.output}")
    lines.append(f"  Ledger: {found.ledger}")
    return lines


@app.command
def failures(
    name: Annotated[str, NAME],
    /,
    *,
    limit: Annotated[int, Parameter(help="How many are shown; with --json all are.")] = 100,
    ledger: Annotated[str | None, LEDGER] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """List the rows that failed, are uncertain or were set aside, with their runs and why."""
    reach_prefect()
    most = None if json else limit
    found, aside = asyncio.run(_failures(name, ledger, most))
    if json:
        bad = [{"key": None, "line": row.line, "state": SET_ASIDE, "error": row.reason} for row in aside.rows]
        _output.put_json([*map(_as_json, found), *bad])
        return
    rows = [(row.key, (row.record and row.record.kickoff_id) or "", str(row.state), row.error or "") for row in found]
    rows += [(f"line {row.line}", "", SET_ASIDE, row.reason) for row in aside.rows[:limit]]
    _output.put_rows(("Row", "Run", "State", "Error"), rows, empty=f"No row of batch {name} failed.")
    if most is not None and len(found) == most:
        _output.note(f"The first {most}. --limit shows more, --json all.")
    if aside.count:
        _output.note(f"Rows that were set aside cannot be run. All {aside.count:,} are in {aside.output}.")
    if any(str(row.state) in ("uncertain", "claimed") for row in found):
        _output.note(
            f"An uncertain row is resolved after a look at the crew's page: "
            f"{_output.command('prefect-crew batch resolve')} NAME ROW --kickoff-id ID, or --never-started."
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
def export(
    name: Annotated[str, NAME],
    output: Annotated[
        str | None, Parameter(name="OUTPUT", help="JSON Lines or .parquet. Left out: the output of its last call.")
    ] = None,
    /,
    *,
    ledger: Annotated[str | None, LEDGER] = None,
) -> None:
    """Write the lines of all rows that have ended, also while the batch runs."""
    reach_prefect()
    look_here()  # for an output_type

    async def write() -> tuple[str, int]:
        from prefect_crew.batches.stored import open_stored_batch

        async with open_stored_batch(name, ledger) as batch:
            return await batch.export(output)

    where, count = asyncio.run(write())
    _output.put(f"{count:,} lines of batch {name} are in {where}.")


@app.command
def resolve(
    name: Annotated[str, NAME],
    row: Annotated[str, Parameter(name="ROW", help="The row's key.")],
    /,
    *,
    kickoff_id: Annotated[str | None, Parameter(help="The run that the kickoff did start.")] = None,
    never_started: Annotated[bool, Parameter(help="The kickoff did not start a run.")] = False,
    crew: Annotated[str | None, CREW_OF_RUN] = None,
    ledger: Annotated[str | None, LEDGER] = None,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Say what became of an uncertain row's kickoff, after a look at the crew's page."""
    if (kickoff_id is None) is not never_started:
        raise UsageError("Say either --kickoff-id ID or --never-started.")
    reach_prefect()
    asyncio.run(_resolve(name, row, kickoff_id, crew, ledger, access))


async def _resolve(
    name: str, row: str, kickoff_id: str | None, crew: str | None, ledger: str | None, access: CrewAccess
) -> None:
    from prefect_crew.batches.ownership import BatchLock
    from prefect_crew.batches.stored import open_stored_batch
    from prefect_crew.exceptions import BatchBusyError
    from prefect_crew.records.resolve import resolve_never_started, resolve_started, unresolved
    from prefect_crew.records.store import PrefectRecords

    async with open_stored_batch(name, ledger) as batch, BatchLock(batch.ledger.database, name) as lock:
        if not await lock.take():
            raise BatchBusyError(name=name)
        batch.ledger.is_exclusive = lock.proves
        if not await batch.ledger.attempts(batch.ledger.idempotency_key(row)):
            raise ConfigurationError(f"Batch {name!r} has started no run for a row {row!r}.")
        record = await unresolved(batch.ledger.idempotency_key(row), batch.ledger)
        again = f"{_output.command('prefect-crew batch resume')} {shlex.quote(name)}"
        if kickoff_id is None:
            await resolve_never_started(record, batch.ledger)
            _output.put(f"Resolved: row {row} never started. {again} starts it.")
            return
        holder = await PrefectRecords().of_kickoff(kickoff_id)
        if holder is not None:
            raise ConfigurationError(
                f"Run {kickoff_id} belongs to the idempotency key {holder.idempotency_key!r} (attempt "
                f"{holder.attempt}): it cannot be "
                f"that of row {row!r} too. Nothing was changed. Look for another run on the crew's page, or say "
                "--never-started if there is none."
            )
        async with status_call(record, crew, access) as look:
            state = await resolve_started(record, kickoff_id, batch.ledger, look=look)
        _output.put(
            f"Resolved: row {row} is run {kickoff_id}{f', {state} now' if state else ''}. {again} waits for it."
        )
