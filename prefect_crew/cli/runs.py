"""`prefect-crew runs`: what the records say, settling what is uncertain, removing what is old."""

from __future__ import annotations

import asyncio
import shlex
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from prefect_crew.api.errors import ConfigurationError, CrewError
from prefect_crew.cli import terminal
from prefect_crew.cli.crews import JSON, CrewAccess, flag
from prefect_crew.cli.exits import UsageError
from prefect_crew.cli.prefect_side import flow_run_url, reach_prefect
from prefect_crew.cli.progress import progress

if TYPE_CHECKING:
    from datetime import datetime

    from prefect_crew.crew import Crew
    from prefect_crew.overview import RunLine
    from prefect_crew.record_store import PrefectRecords
    from prefect_crew.records import RunRecord

__all__ = ["ago", "app", "crew_of"]

KEY = Parameter(name="KEY", help="The run key, whole, as `runs` shows it.")

app = App(
    name="runs", help="Runs in flight, uncertain, waiting for a person or orphaned, from the records.", help_epilogue=""
)


def _records() -> PrefectRecords:
    with progress(quiet=True) as shown:
        reach_prefect(shown)
    from prefect_crew.record_store import PrefectRecords

    return PrefectRecords()


@app.default
@app.command(name="list")
def list_runs(
    *,
    phase: Annotated[
        list[str] | None,
        Parameter(
            help="Only these: uncertain, orphaned, waiting, in-flight, claimed, ended, not-started.", negative=()
        ),
    ] = None,
    uncertain: Annotated[bool, flag("The same as --phase uncertain.")] = False,
    all_: Annotated[bool, flag("Those that have ended as well.", name="--all")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """List the runs that are not done, with what to do about each."""
    from prefect_crew.overview import OPEN, Standing

    names = {str(one).replace(" ", "-"): one for one in Standing}
    wanted = [*(phase or ()), *(["uncertain"] if uncertain else [])]
    for name in wanted:
        if name not in names:
            raise UsageError(f"--phase {name}: choose among {', '.join(names)}.")
    chosen = {names[name] for name in wanted} if wanted else set(Standing) if all_ else set(OPEN)
    found = asyncio.run(_lines(_records(), with_done=not chosen <= set(OPEN)))
    lines = [line for line in found if line.standing in chosen]
    if json:
        terminal.put_json([_as_json(line) for line in lines])
        return
    if not lines:
        terminal.put("No such run is on record." if wanted or all_ else "No run is in flight, uncertain or waiting.")
        return
    for line in lines:
        for text in _about(line):
            terminal.put(text)


async def _lines(records: PrefectRecords, *, with_done: bool) -> list[RunLine]:
    from prefect_crew.overview import Standing, look_at
    from prefect_crew.records import RecordPhase, utcnow

    done = (RecordPhase.ENDED, RecordPhase.NOT_STARTED)
    wanted = [phase for phase in RecordPhase if with_done or phase not in done]
    found = [record for phase in wanted async for record in records.all(phase)]
    lines = [await look_at(record, records, utcnow()) for record in found]
    order = list(Standing)
    first = {Standing.UNCERTAIN: 0, Standing.ORPHANED: 1, Standing.WAITING: 2}
    return sorted(lines, key=lambda line: (first.get(line.standing, 3 + order.index(line.standing)), line.since))


def ago(since: datetime) -> str:
    """Return how long ago a moment was, as people say it."""
    from prefect_crew.records import utcnow

    seconds = max(0.0, (utcnow() - since).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _about(line: RunLine) -> list[str]:
    record = line.record
    state = f" {record.state}" if record.state and str(line.standing) == "ended" else ""
    attempt = f", attempt {record.attempt}" if record.attempt > 1 else ""
    head = f"{str(line.standing).upper()}{state}  {record.run_key}"
    facts = [
        f"crew {record.crew}{attempt}",
        f"run {record.kickoff_id}" if record.kickoff_id else "no kickoff id",
        f"since {line.since:%Y-%m-%d %H:%M:%S} UTC ({ago(line.since)})",
    ]
    page = flow_run_url(record.flow_run_id)
    if page or record.flow_run_id:
        facts.append(page or f"flow run {record.flow_run_id}")
    texts = [head, "  " + " · ".join(facts)]
    if record.reason and str(line.standing) == "uncertain":
        texts.append(f"  {record.reason}")
    if record.error:
        texts.append(f"  {record.error}")
    if line.todo:
        texts.append(f"  → {line.todo}")
    return texts


def _as_json(line: RunLine) -> dict[str, Any]:
    record = line.record.model_dump(mode="json", exclude={"result"})
    page = flow_run_url(line.record.flow_run_id)
    return {"standing": str(line.standing), "since": line.since.isoformat(), "todo": line.todo, "page": page, **record}


@app.command
def show(key: Annotated[str, KEY], /, *, json: Annotated[bool, JSON] = False) -> None:
    """Show every attempt at one run key. A kickoff id finds its run, too."""
    lines = asyncio.run(_attempts(key, _records()))
    if json:
        terminal.put_json([_as_json(line) for line in lines])
        return
    for line in lines:
        for text in _about(line):
            terminal.put(text)
        terminal.put(f"  inputs digest {line.record.inputs_digest} · {line.record.crew_url}")
    latest = lines[-1].record
    if latest.result is not None or str(latest.state) == "completed":
        terminal.put(f"Its result: {terminal.command('prefect-crew result')} {shlex.quote(latest.run_key)}")


async def _attempts(key: str, records: PrefectRecords) -> list[RunLine]:
    from prefect_crew.overview import look_at
    from prefect_crew.records import utcnow

    attempts = await records.attempts(key)
    if not attempts:
        holder = await records.of_kickoff(key)
        attempts = () if holder is None else await records.attempts(holder.run_key)
    if not attempts:
        raise CrewError(f"No run has the key {key!r}. prefect-crew runs --all lists those on record.")
    return [await look_at(record, records, utcnow()) for record in attempts]


@app.command
def settle(
    key: Annotated[str, KEY],
    /,
    *,
    kickoff_id: Annotated[str | None, Parameter(help="The run that the kickoff did start.")] = None,
    never_started: Annotated[bool, flag("The kickoff did not start a run.")] = False,
    lost: Annotated[bool, flag("The run was started, and the crew's server has forgotten it.")] = False,
    crew: Annotated[
        str | None, Parameter(help="The crew to ask about the id, where its block is not stored: a block or a URL.")
    ] = None,
    access: CrewAccess = CrewAccess(),  # noqa: B008 - never changed
) -> None:
    """Say what became of an uncertain kickoff, or of a lost run, after a look at the crew's page."""
    if [kickoff_id is not None, never_started, lost].count(True) != 1:
        raise UsageError("Say one of --kickoff-id ID, --never-started and --lost.")
    if lost:
        asyncio.run(_settle_lost(key, crew, access, _records()))
    else:
        asyncio.run(_settle(key, kickoff_id, crew, access, _records()))


async def _settle_lost(key: str, crew: str | None, access: CrewAccess, records: PrefectRecords) -> None:
    from prefect_crew.settling import in_flight, settle_lost

    record = await in_flight(key, records)
    found = await crew_of(record, crew, access)
    if found is None:
        terminal.note(
            f"Crew {record.crew} is no stored block, so its server was not asked whether it knows run "
            f"{record.kickoff_id}. Give --crew to have it asked."
        )
        await settle_lost(record, records)
    else:
        async with found.client() as client:
            await settle_lost(record, records, look=client.status)
    terminal.put(f"Settled: run {record.kickoff_id} of {key} is lost. Run again with this key to buy another.")


async def _settle(
    key: str, kickoff_id: str | None, crew: str | None, access: CrewAccess, records: PrefectRecords
) -> None:
    from prefect_crew.settling import settle_never_started, settle_started, unsettled

    record = await unsettled(key, records)
    if kickoff_id is None:
        await settle_never_started(record, records)
        terminal.put(f"Settled: {key} never started. Run again with this key to start it.")
        return
    found = await crew_of(record, crew, access)
    if found is None:
        terminal.note(
            f"Crew {record.crew} is no stored block, so its server was not asked whether it knows run {kickoff_id}. "
            "Give --crew to have it asked."
        )
        state = await settle_started(record, kickoff_id, records)
    else:
        async with found.client() as client:
            state = await settle_started(record, kickoff_id, records, look=client.status)
    terminal.put(
        f"Settled: {key} is run {kickoff_id}{f', {state} now' if state else ''}. "
        "Run again with this key to wait for it and get its result."
    )


async def crew_of(record: RunRecord, crew: str | None, access: CrewAccess) -> Crew | None:
    """Return the crew of a run: the one that is given, else the stored one; None where neither is its."""
    try:
        found = await access.load(crew or record.crew)
    except (ConfigurationError, UsageError):
        if crew is not None:
            raise
        return None
    if found.url == record.crew_url:
        return found
    if crew is None:
        return None
    raise ConfigurationError(f"Run {record.run_key!r} is of the crew at {record.crew_url}, not of {found.url}.")


@app.command
def prune(
    *,
    older_than: Annotated[str, Parameter(help="How long ago a run has ended: 90d, 12h, 2w. At least 1h.")] = "90d",
    dry_run: Annotated[bool, flag("Only count.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Remove old records of ended runs. A later call with such a key is then a new purchase."""
    from prefect_crew.pruning import parse_age
    from prefect_crew.pruning import prune as prune_records

    try:
        age = parse_age(older_than)
    except ValueError as error:
        raise UsageError(f"--older-than {error}") from None
    done = asyncio.run(prune_records(_records(), older_than=age, dry_run=dry_run))
    if json:
        terminal.put_json({"runs": done.runs, "notes": done.notes, "kept": done.kept, "dry_run": dry_run})
        return
    verb = "would be removed" if dry_run else "removed"
    terminal.put(f"{done.runs} records {verb}, {done.notes} left-over notes too; {done.kept} records stay.")
