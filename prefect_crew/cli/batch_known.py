"""`prefect-crew batch list | status | failures | settle`: what the ledger of a batch knows."""

from __future__ import annotations

import asyncio
import shlex
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_crew.api.errors import ConfigurationError
from prefect_crew.cli import terminal
from prefect_crew.cli.batch import LEDGER, NAME, app
from prefect_crew.cli.crews import JSON, CrewAccess, flag
from prefect_crew.cli.exits import UsageError
from prefect_crew.cli.prefect_side import reach_prefect
from prefect_crew.cli.progress import progress
from prefect_crew.cli.runs import crew_of

if TYPE_CHECKING:
    from prefect_crew.batches.known import BatchStanding
    from prefect_crew.batches.set_aside import SetAside
    from prefect_crew.records import RunRecord

__all__ = ["app"]

SET_ASIDE = "set-aside"


def _reach() -> None:
    with progress(quiet=True) as shown:
        reach_prefect(shown)


@app.default
@app.command(name="list")
def list_batches(*, json: Annotated[bool, JSON] = False) -> None:
    """List the batches that the Prefect server knows, and where their ledgers are."""
    _reach()
    from prefect_crew.batches.known import all_batches

    found = asyncio.run(all_batches())
    if json:
        terminal.put_json([{"name": name, "ledger": ledger} for name, ledger in found])
    else:
        terminal.put_rows(("Batch", "Ledger"), found, empty="The Prefect server knows no batch.")


@app.command
def status(
    name: Annotated[str, NAME],
    /,
    *,
    ledger: Annotated[str | None, LEDGER] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Show how a batch stands: also while it runs, in whichever process."""
    _reach()

    async def look() -> BatchStanding:
        from prefect_crew.batches.known import known_batch

        async with known_batch(name, ledger) as batch:
            return await batch.standing()

    found = asyncio.run(look())
    if json:
        terminal.put_json(found.as_dict())
        return
    for line in _about(found):
        terminal.put(line)


def _about(found: BatchStanding) -> list[str]:
    from prefect_crew.batches.set_aside import SetAside
    from prefect_crew.rendering import duration

    lines = [f"Batch {found.name}: {found.completed:,} of {found.total:,} rows completed"]
    parts = (("failed", found.failed), ("uncertain", found.uncertain), ("in flight", found.in_flight))
    more = (("not started yet", found.left), ("set aside", found.set_aside))
    counts = [f"{count:,} {word}" for word, count in (*parts, *more) if count]
    lines += [f"  {' · '.join(counts)}"] if counts else []
    if found.running:
        lines.append("  A process runs it now")
    elif found.running is False and (found.left or found.in_flight):
        resume = f"{terminal.command('prefect-crew batch resume')} {shlex.quote(found.name)}"
        if found.why_not is not None:
            resume = f"make the same call again ({found.why_not})"
        lines.append(f"  No process runs it. To go on where it stopped: {resume}")
    if found.people:
        lines.append(f"  {found.people:,} in flight wait for a person: {terminal.command('prefect-crew reviews')}")
    if found.set_aside:
        aside = SetAside(found.set_aside, found.set_aside_rows)
        lines.append(f"  Set aside: {'; '.join(aside.shown(5))}. All are in {found.set_aside_output}")
    seconds = ""
    if found.median is not None and found.slowest is not None:
        seconds = f" · a row takes {duration(found.median)} (median), at most {duration(found.slowest)}"
    lines.append(f"  {found.kickoffs:,} kickoffs{seconds}")
    lines += [f"  Output: {found.output}"] if found.output else []
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
    _reach()
    most = None if json else limit
    found, aside = asyncio.run(_failures(name, ledger, most))
    if json:
        bad = [{"key": None, "line": row.line, "state": SET_ASIDE, "error": row.reason} for row in aside.rows]
        terminal.put_json([*(_as_json(key, record) for key, record in found), *bad])
        return
    rows = [(key, record.kickoff_id or "", _state(record), _why(record)) for key, record in found]
    rows += [(f"line {row.line}", "", SET_ASIDE, row.reason) for row in aside.rows[:limit]]
    terminal.put_rows(("Row", "Run", "State", "Error"), rows, empty=f"No row of batch {name} failed.")
    if most is not None and len(found) == most:
        terminal.note(f"The first {most}. --limit shows more, --json all.")
    if aside.count:
        terminal.note(f"Rows that were set aside cannot be run. All {aside.count:,} are in {aside.output}.")
    if any(_state(record) == "uncertain" for _, record in found):
        terminal.note(
            f"An uncertain row is settled after a look at the crew's page: "
            f"{terminal.command('prefect-crew batch settle')} NAME ROW --kickoff-id ID, or --never-started."
        )


async def _failures(name: str, ledger: str | None, most: int | None) -> tuple[list[tuple[str, RunRecord]], SetAside]:
    from prefect_crew.batches.known import known_batch

    found: list[tuple[str, RunRecord]] = []
    async with known_batch(name, ledger) as batch:
        async for key, record in batch.failures():
            found.append((key, record))
            if len(found) == most:
                break
        return found, await batch.ledger.set_aside()


def _state(record: RunRecord) -> str:
    from prefect_crew.batches.ends import standing_word

    return standing_word(record) or "uncertain"  # or a claim that nobody holds any more, which is the same


def _why(record: RunRecord) -> str:
    return record.error or record.reason or ""


def _as_json(key: str, record: RunRecord) -> dict[str, Any]:
    about = record.model_dump(mode="json", include={"run_key", "kickoff_id", "attempt", "kicked_off_at", "ended_at"})
    return {"key": key, "state": _state(record), "error": _why(record) or None, **about}


@app.command
def settle(
    name: Annotated[str, NAME],
    row: Annotated[str, Parameter(name="ROW", help="The row's key.")],
    /,
    *,
    kickoff_id: Annotated[str | None, Parameter(help="The run that the kickoff did start.")] = None,
    never_started: Annotated[bool, flag("The kickoff did not start a run.")] = False,
    crew: Annotated[
        str | None, Parameter(help="The crew to ask about the id, where its block is not stored: a block or a URL.")
    ] = None,
    ledger: Annotated[str | None, LEDGER] = None,
    access: CrewAccess = CrewAccess(),  # noqa: B008 - never changed
) -> None:
    """Say what became of an uncertain row's kickoff, after a look at the crew's page."""
    if (kickoff_id is None) is not never_started:
        raise UsageError("Say either --kickoff-id ID or --never-started.")
    _reach()
    asyncio.run(_settle(name, row, kickoff_id, crew, ledger, access))


async def _settle(
    name: str, row: str, kickoff_id: str | None, crew: str | None, ledger: str | None, access: CrewAccess
) -> None:
    from prefect_crew.batches.known import known_batch
    from prefect_crew.batches.locks import BatchBusyError, BatchLock
    from prefect_crew.record_store import PrefectRecords
    from prefect_crew.settling import settle_never_started, settle_started, unsettled

    async with known_batch(name, ledger) as batch, BatchLock(batch.ledger.database, name) as lock:
        if not await lock.take():
            raise BatchBusyError(name=name)
        batch.ledger.sole = lock.proves
        if not await batch.ledger.attempts(batch.ledger.run_key(row)):
            raise ConfigurationError(f"Batch {name!r} has bought nothing for a row {row!r}.")
        record = await unsettled(batch.ledger.run_key(row), batch.ledger)
        again = f"{terminal.command('prefect-crew batch resume')} {shlex.quote(name)}"
        if kickoff_id is None:
            await settle_never_started(record, batch.ledger)
            terminal.put(f"Settled: row {row} never started. {again} buys it.")
            return
        holder = await PrefectRecords().of_kickoff(kickoff_id)
        if holder is not None:
            raise ConfigurationError(
                f"Run {kickoff_id} belongs to the run key {holder.run_key!r} (attempt {holder.attempt}): it cannot be "
                f"that of row {row!r} too. Nothing was changed. Look for another run on the crew's page, or say "
                "--never-started if there is none."
            )
        found = await crew_of(record, crew, access)
        if found is None:
            terminal.note(
                f"Crew {record.crew} is no stored block, so its server was not asked whether it knows run "
                f"{kickoff_id}. Give --crew to have it asked."
            )
            state = await settle_started(record, kickoff_id, batch.ledger)
        else:
            async with found.client() as client:
                state = await settle_started(record, kickoff_id, batch.ledger, look=client.status)
        terminal.put(
            f"Settled: row {row} is run {kickoff_id}{f', {state} now' if state else ''}. {again} waits for it."
        )
