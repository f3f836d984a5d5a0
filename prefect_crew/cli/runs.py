"""`prefect-crew runs`: what the records say, resolving what is uncertain, pruning what is old."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter, validators

from prefect_crew.cli import _output
from prefect_crew.cli._errors import UsageError
from prefect_crew.cli._options import CREW_OF_RUN, JSON, CrewAccess
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.model import RecordPhase, RunRecord, latest_start
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.client.models import CrewStatus
    from prefect_crew.crew import Crew
    from prefect_crew.records.store import PrefectRecords


class Condition(StrEnum):
    """What a run is, as far as its record and the flow runs around it tell. What needs a person comes first."""

    UNCERTAIN = "uncertain"
    """A kickoff was sent, and it is not known whether it started a run."""
    ORPHANED = "orphaned"
    """It was started, and the flow runs that waited for it have ended."""
    WAITING = "waiting"
    """For a person."""
    IN_FLIGHT = "in-flight"
    CLAIMED = "claimed"
    """Its kickoff is being sent."""
    ENDED = "ended"
    NOT_STARTED = "not-started"


OPEN = (Condition.UNCERTAIN, Condition.ORPHANED, Condition.WAITING, Condition.IN_FLIGHT, Condition.CLAIMED)


@dataclass(frozen=True)
class RunLine:
    """A record and what it means. `todo` is empty where nothing has to be done."""

    record: RunRecord
    condition: Condition
    todo: str

    @property
    def since(self) -> datetime:
        """Since when it is so, UTC."""
        record = self.record
        at = {Condition.WAITING: record.human_since, Condition.ENDED: record.ended_at}
        return at.get(self.condition, record.kicked_off_at) or record.claimed_at


async def look_at(record: RunRecord, records: PrefectRecords) -> RunLine:
    """Return what a record means, asking after its flow runs only where that matters."""
    owner_ended = record.phase is RecordPhase.CLAIMED and await records.owner_ended(record)
    has_waiters = record.phase is not RecordPhase.STARTED or bool(await records.other_waiters(record, None))
    condition = condition_of(record, owner_ended=owner_ended, has_waiters=has_waiters)
    is_passed = (
        condition is Condition.ORPHANED and latest_start(await records.attempts(record.idempotency_key)) != record
    )
    return RunLine(record, condition, todo(record, condition, is_passed=is_passed))


def condition_of(record: RunRecord, *, owner_ended: bool, has_waiters: bool) -> Condition:
    """Return what a run is.

    Args:
        record: Its record.
        owner_ended: Whether the flow run that claimed it is known to have ended.
        has_waiters: Whether a flow run that has not ended waits for it.
    """
    if record.phase is RecordPhase.CLAIMED:
        if record.open_for and not owner_ended:
            return Condition.CLAIMED
        return Condition.UNCERTAIN if record.permit else Condition.NOT_STARTED
    if record.phase is RecordPhase.STARTED:
        if not has_waiters:
            return Condition.ORPHANED
        return Condition.IN_FLIGHT if record.human_since is None else Condition.WAITING
    return {RecordPhase.ENDED: Condition.ENDED, RecordPhase.UNCERTAIN: Condition.UNCERTAIN}.get(
        record.phase, Condition.NOT_STARTED
    )


def todo(record: RunRecord, condition: Condition, *, is_passed: bool = False) -> str:
    """Return what a person does about a run; `is_passed`: its key leads to a later attempt."""
    key, kickoff_id = shlex.quote(record.idempotency_key), shlex.quote(record.kickoff_id or "ID")
    if condition is Condition.UNCERTAIN:
        resolve = f"prefect-crew runs resolve {key} --kickoff-id ID, or --never-started"
        return f"Look at the crew's page, then: {resolve}."
    if condition is Condition.ORPHANED:
        person = " It waits for a person." if record.human_since is not None else ""
        goes_on = "Its key leads to a later attempt" if is_passed else "Run again with its key to go on"
        return (
            f"No flow run waits for it.{person} {goes_on}. If the crew's server has forgotten it: "
            f"prefect-crew runs resolve {key} --lost."
        )
    if condition is Condition.WAITING:
        return f"Answer: prefect-crew reviews approve {kickoff_id}{crew_option(record)}, or reject ID --feedback TEXT."
    if condition is Condition.ENDED and record.state is not CrewState.COMPLETED:
        return "Run again with its key to start another, as far as the crew's max_kickoffs allows."
    return ""


def crew_option(record: RunRecord) -> str:
    """Return the option that names the crew of a record, where that is a URL and no stored block."""
    is_address = record.crew == record.crew_url.partition("://")[2].rstrip("/")
    return f" --crew {shlex.quote(record.crew_url)}" if is_address else ""


async def crew_of(record: RunRecord, crew: str | None, access: CrewAccess) -> Crew | None:
    """Return the crew of a run: the one that is given, else the stored one; None where that is not its crew."""
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
    raise ConfigurationError(f"Run {record.idempotency_key!r} is of the crew at {record.crew_url}, not of {found.url}.")


@asynccontextmanager
async def status_call(
    record: RunRecord, crew: str | None, access: CrewAccess
) -> AsyncGenerator[Callable[[str], Awaitable[CrewStatus]] | None]:
    """Give the status call of a run's crew; None, and a note, where the crew is not known."""
    found = await crew_of(record, crew, access)
    if found is None:
        _output.note(
            f"Crew {record.crew} is no stored block of that address, so its server was not asked. Give --crew to have "
            "it asked."
        )
        yield None
    else:
        async with found.client() as client:
            yield client.status


app = App(name="runs", help="Runs in flight, uncertain, waiting for a person or orphaned, from the records.")
KEY = Parameter(name="KEY", help="The idempotency key, whole, as `runs` shows it.")
FATE = Group("What became of it, one of", validator=validators.LimitedChoice(1, 1), sort_key=0)


def _records() -> PrefectRecords:
    reach_prefect()
    from prefect_crew.records.store import PrefectRecords

    return PrefectRecords()


@app.default
@app.command(name="list")
def list_runs(
    *,
    only: Annotated[list[Condition] | None, Parameter(help="Only these; may be given again.")] = None,
    all_: Annotated[bool, Parameter(name="--all", help="Those that have ended as well.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """List the runs that have not ended, with what to do about each."""
    chosen = set(only or (Condition if all_ else OPEN))
    records = _records()

    async def look() -> list[RunLine]:
        ended = (RecordPhase.ENDED, RecordPhase.NOT_STARTED)
        phases = [phase for phase in RecordPhase if not chosen <= set(OPEN) or phase not in ended]
        found = [record for phase in phases async for record in records.all(phase)]
        lines = [await look_at(record, records) for record in found]
        order = list(Condition)
        return sorted(
            (line for line in lines if line.condition in chosen),
            key=lambda line: (order.index(line.condition), line.since),
        )

    lines = asyncio.run(look())
    if json:
        _output.put_json([_as_json(line) for line in lines])
        return
    if not lines:
        _output.put("No such run is on record." if only or all_ else "No run is in flight, uncertain or waiting.")
    for line in lines:
        _put(_about(line))


@app.command
def show(
    key: Annotated[str, Parameter(name="KEY", help="The idempotency key, or a kickoff id.")],
    /,
    *,
    crew: Annotated[str | None, CREW_OF_RUN] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Show every attempt at one idempotency key, and ask the crew about one in flight."""
    records = _records()

    async def look() -> tuple[list[RunLine], CrewStatus | None]:
        attempts = await records.attempts(key)
        if not attempts and (holder := await records.of_kickoff(key)):
            attempts = await records.attempts(holder.idempotency_key)
        if not attempts:
            raise CrewError(f"No run has the key {key!r}. prefect-crew runs --all lists those on record.")
        lines, latest, status = [await look_at(one, records) for one in attempts], attempts[-1], None
        if latest.phase is RecordPhase.STARTED and latest.kickoff_id is not None:
            async with status_call(latest, crew, access) as look:
                try:
                    status = await look(latest.kickoff_id) if look else None
                except CrewError as error:
                    _output.note(str(error))
        return lines, status

    lines, status = asyncio.run(look())
    if json:
        found = [_as_json(line) for line in lines]
        if status is not None:
            found[-1]["status"] = status.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}})
        _output.put_json(found)
        return
    for line in lines:
        _put(_about(line))
        _output.put(f"  inputs digest {line.record.inputs_digest} · {line.record.crew_url}")
    if status is not None:
        _put(_about_status(status))
    latest = lines[-1].record
    if latest.result is not None or latest.state is CrewState.COMPLETED:
        _output.put(f"Its result: {_output.command('prefect-crew result')} {shlex.quote(latest.idempotency_key)}")


def _put(lines: Iterator[str]) -> None:
    for line in lines:
        _output.put(line)


def _about(line: RunLine) -> Iterator[str]:
    record = line.record
    state = f" {record.state}" if record.state and line.condition is Condition.ENDED else ""
    yield f"{line.condition.upper()}{state}  {record.idempotency_key}"
    attempt = f", attempt {record.attempt}" if record.attempt > 1 else ""
    page = flow_run_url(record.flow_run_id) or (f"flow run {record.flow_run_id}" if record.flow_run_id else None)
    facts = (
        f"crew {record.crew}{attempt}",
        f"run {record.kickoff_id}" if record.kickoff_id else "no kickoff id",
        f"since {moment(line.since)}",
        page,
    )
    yield "  " + " · ".join(filter(None, facts))
    if record.reason and line.condition is Condition.UNCERTAIN:
        yield f"  {record.reason}"
    if record.error:
        yield f"  {record.error}"
    if line.todo:
        yield f"  → {line.todo}"


def _about_status(status: CrewStatus) -> Iterator[str]:
    word = "waits for a person" if status.state is CrewState.WAITING else str(status.state)
    odd = "" if status.known_state else f" (it says {status.raw_state}, which counts as running)"
    yield f"  The crew's server: {word}{odd}"
    facts: dict[str, object] = {
        "Task": status.current_task,
        "Tasks done": f"{status.completed_tasks or 0} of {status.total_tasks}" if status.total_tasks else None,
        "Progress": None if status.progress is None or status.total_tasks else f"{status.progress:.0%}",
        "Message": status.message if status.state is not CrewState.FAILED else None,
        "Error": status.error,
    }
    for name, fact in facts.items():
        if fact not in (None, ""):
            yield f"  {name}: {' '.join(str(fact).split())}"


def moment(since: datetime) -> str:
    """Return a moment in UTC, and how long ago it was."""
    from prefect_crew.records.model import utcnow

    seconds = max(0.0, (utcnow() - since).total_seconds())
    units = (("d", 86400), ("h", 3600), ("min", 60))
    ago = next((f"{seconds / size:.0f} {unit}" for unit, size in units if seconds >= 2 * size), f"{seconds:.0f} s")
    return f"{since:%Y-%m-%d %H:%M:%S} UTC ({ago})"


def _as_json(line: RunLine) -> dict[str, Any]:
    record = line.record.model_dump(mode="json", exclude={"result"})
    page = flow_run_url(line.record.flow_run_id)
    about = {"condition": str(line.condition), "since": line.since.isoformat(), "todo": line.todo, "page": page}
    return {**about, **record}


@app.command
def resolve(
    key: Annotated[str, KEY],
    /,
    *,
    kickoff_id: Annotated[str | None, Parameter(help="The run that the kickoff did start.", group=FATE)] = None,
    never_started: Annotated[bool, Parameter(help="The kickoff did not start a run.", group=FATE)] = False,
    lost: Annotated[
        bool, Parameter(help="The run was started, and the crew's server has forgotten it.", group=FATE)
    ] = False,
    crew: Annotated[str | None, CREW_OF_RUN] = None,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Say what became of an uncertain kickoff, or of a lost run, after a look at the crew's page."""
    records = _records()

    async def say() -> str:
        from prefect_crew.records.resolve import (
            in_flight,
            resolve_lost,
            resolve_never_started,
            resolve_started,
            unresolved,
        )

        if lost:
            record = await in_flight(key, records)
            async with status_call(record, crew, access) as look:
                await resolve_lost(record, records, look=look)
            return f"run {record.kickoff_id} of {key} is lost. Run again with this key to start another."
        record = await unresolved(key, records)
        if kickoff_id is None:
            await resolve_never_started(record, records)
            return f"{key} never started. Run again with this key to start it."
        async with status_call(record, crew, access) as look:
            state = await resolve_started(record, kickoff_id, records, look=look)
        now = f", {state} now" if state else ""
        return f"{key} is run {kickoff_id}{now}. Run again with this key to wait for it and get its result."

    _output.put(f"Resolved: {asyncio.run(say())}")


@app.command
def prune(
    *,
    older_than: Annotated[
        timedelta, Parameter(help="How long ago a run has ended: 90d, 12h, 2w. At least 1h.", show_default="90d")
    ] = timedelta(days=90),
    dry_run: Annotated[bool, Parameter(help="Only count.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Remove old records of ended runs. A later call with such a key then starts a new run."""
    from prefect_crew.records.prune import prune as prune_records

    done = asyncio.run(prune_records(_records(), older_than=older_than, dry_run=dry_run))
    if json:
        _output.put_json({"runs": done.runs, "notes": done.notes, "kept": done.kept, "dry_run": dry_run})
        return
    verb = "would be removed" if dry_run else "removed"
    _output.put(f"{done.runs} records {verb}, {done.notes} left-over notes too; {done.kept} records stay.")
