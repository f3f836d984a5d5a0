"""Commands about run records: list, show, resolve, prune."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from cyclopts import App, Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._errors import UsageError
from prefect_crew.cli._options import JSON, CrewAccess, flag
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.cli._progress import progress
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.model import RecordPhase, RunRecord, latest_start
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from datetime import datetime

    from prefect_crew.crew import Crew
    from prefect_crew.records.model import RunRecord
    from prefect_crew.records.store import PrefectRecords


class Standing(StrEnum):
    """Where a run stands, as far as its record and the flow runs around it tell."""

    CLAIMED = "claimed"
    """Somebody is posting its kickoff at this moment."""
    IN_FLIGHT = "in flight"
    WAITING = "waiting"
    """For a person."""
    ORPHANED = "orphaned"
    """It was started, and whoever waited for it has ended."""
    UNCERTAIN = "uncertain"
    """A kickoff was sent and nobody knows its fate."""
    ENDED = "ended"
    NOT_STARTED = "not started"


OPEN = (Standing.UNCERTAIN, Standing.ORPHANED, Standing.WAITING, Standing.IN_FLIGHT, Standing.CLAIMED)
"""Those that are not done, the one that needs a person most first."""


@dataclass(frozen=True)
class RunLine:
    """A record and what it comes to. `since` is UTC; `todo` is empty where nothing has to be done."""

    record: RunRecord
    standing: Standing
    since: datetime
    todo: str


class Lookout(Protocol):
    """What `look_at` asks of a record store. Each method may raise whatever its storage raises."""

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return whether the flow run that claimed the record is known to have ended."""
        ...

    async def other_waiters(self, record: RunRecord, flow_run_id: str | None) -> list[str]:
        """Return the flow runs other than `flow_run_id` that wait for the run and have not ended."""
        ...

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key, the first one first."""
        ...


async def look_at(record: RunRecord, store: Lookout, now: datetime) -> RunLine:
    """Return the line of a record, asking after its flow runs only where that matters."""
    owner_ended = record.phase is RecordPhase.CLAIMED and await store.owner_ended(record)
    attended = record.phase is not RecordPhase.STARTED or bool(await store.other_waiters(record, None))
    passed = not attended and latest_start(await store.attempts(record.idempotency_key)) != record
    return classify(record, now, owner_ended=owner_ended, attended=attended, passed=passed)


def classify(record: RunRecord, now: datetime, *, owner_ended: bool, attended: bool, passed: bool = False) -> RunLine:
    """Return the line of a record. Pure.

    Args:
        record: The record.
        now: The time, UTC.
        owner_ended: Whether the owner's flow run is known to have ended, for one that is claimed.
        attended: Whether a flow run that goes on waits for it, for one that is started.
        passed: Whether its key leads to a later attempt.
    """
    standing = _standing(record, now, owner_ended, attended)
    since = {
        Standing.WAITING: record.human_since,
        Standing.ENDED: record.ended_at,
    }.get(standing, record.kicked_off_at)
    return RunLine(record, standing, since or record.claimed_at, _todo(record, standing, passed))


def _standing(record: RunRecord, now: datetime, owner_ended: bool, attended: bool) -> Standing:
    if record.phase is RecordPhase.ENDED:
        return Standing.ENDED
    if record.phase is RecordPhase.NOT_STARTED:
        return Standing.NOT_STARTED
    if record.phase is RecordPhase.UNCERTAIN:
        return Standing.UNCERTAIN
    if record.phase is RecordPhase.CLAIMED:
        if not (owner_ended or record.open_for == 0):
            return Standing.CLAIMED
        return Standing.UNCERTAIN if record.permit else Standing.NOT_STARTED
    if not attended:
        return Standing.ORPHANED
    return Standing.WAITING if record.human_since is not None else Standing.IN_FLIGHT


def crew_argument(record: RunRecord) -> str:
    """Return the crew as a command takes it: its block, or its URL where the record has only an address."""
    address = record.crew_url.partition("://")[2].rstrip("/")
    return record.crew_url if record.crew == address else record.crew


def _todo(record: RunRecord, standing: Standing, passed: bool) -> str:
    crew, kickoff_id = shlex.quote(crew_argument(record)), shlex.quote(record.kickoff_id or "ID")
    if standing is Standing.UNCERTAIN:
        return (
            f"Look at the crew's page, then: prefect-crew runs resolve {shlex.quote(record.idempotency_key)} "
            f"--kickoff-id ID, "
            "or --never-started."
        )
    if standing is Standing.ORPHANED:
        person = " It waits for a person." if record.human_since is not None else ""
        goes_on = "Its key leads to a later attempt; look" if passed else "Run again with its key to go on, or look"
        return (
            f"Nobody waits for it.{person} {goes_on}: prefect-crew status {crew} {kickoff_id}. "
            f"If the crew's server has forgotten it: prefect-crew runs resolve {shlex.quote(record.idempotency_key)} "
            f"--lost."
        )
    if standing is Standing.WAITING:
        of_url = f" --crew {crew}" if crew_argument(record) == record.crew_url else ""
        return f"Answer: prefect-crew reviews approve {kickoff_id}{of_url}, or reject ID --feedback TEXT."
    if standing is Standing.ENDED and record.state is not CrewState.COMPLETED:
        return "Run again with its key to buy another, as far as the crew's max_kickoffs allows."
    return ""


KEY = Parameter(name="KEY", help="The idempotency key, whole, as `runs` shows it.")

app = App(
    name="runs", help="Runs in flight, uncertain, waiting for a person or orphaned, from the records.", help_epilogue=""
)


def _records() -> PrefectRecords:
    with progress(quiet=True) as shown:
        reach_prefect(shown)
    from prefect_crew.records.store import PrefectRecords

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

    names = {str(one).replace(" ", "-"): one for one in Standing}
    wanted = [*(phase or ()), *(["uncertain"] if uncertain else [])]
    for name in wanted:
        if name not in names:
            raise UsageError(f"--phase {name}: choose among {', '.join(names)}.")
    chosen = {names[name] for name in wanted} if wanted else set(Standing) if all_ else set(OPEN)
    found = asyncio.run(_lines(_records(), with_done=not chosen <= set(OPEN)))
    lines = [line for line in found if line.standing in chosen]
    if json:
        _output.put_json([_as_json(line) for line in lines])
        return
    if not lines:
        _output.put("No such run is on record." if wanted or all_ else "No run is in flight, uncertain or waiting.")
        return
    for line in lines:
        for text in _about(line):
            _output.put(text)


async def _lines(records: PrefectRecords, *, with_done: bool) -> list[RunLine]:
    from prefect_crew.records.model import RecordPhase, utcnow

    done = (RecordPhase.ENDED, RecordPhase.NOT_STARTED)
    wanted = [phase for phase in RecordPhase if with_done or phase not in done]
    found = [record for phase in wanted async for record in records.all(phase)]
    lines = [await look_at(record, records, utcnow()) for record in found]
    order = list(Standing)
    first = {Standing.UNCERTAIN: 0, Standing.ORPHANED: 1, Standing.WAITING: 2}
    return sorted(lines, key=lambda line: (first.get(line.standing, 3 + order.index(line.standing)), line.since))


def ago(since: datetime) -> str:
    """Return how long ago a moment was, as people say it."""
    from prefect_crew.records.model import utcnow

    seconds = max(0.0, (utcnow() - since).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _about(line: RunLine) -> list[str]:
    record = line.record
    state = f" {record.state}" if record.state and str(line.standing) == "ended" else ""
    attempt = f", attempt {record.attempt}" if record.attempt > 1 else ""
    head = f"{str(line.standing).upper()}{state}  {record.idempotency_key}"
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
    """Show every attempt at one idempotency key. A kickoff id finds its run, too."""
    lines = asyncio.run(_attempts(key, _records()))
    if json:
        _output.put_json([_as_json(line) for line in lines])
        return
    for line in lines:
        for text in _about(line):
            _output.put(text)
        _output.put(f"  inputs digest {line.record.inputs_digest} · {line.record.crew_url}")
    latest = lines[-1].record
    if latest.result is not None or str(latest.state) == "completed":
        _output.put(f"Its result: {_output.command('prefect-crew result')} {shlex.quote(latest.idempotency_key)}")


async def _attempts(key: str, records: PrefectRecords) -> list[RunLine]:
    from prefect_crew.records.model import utcnow

    attempts = await records.attempts(key)
    if not attempts:
        holder = await records.of_kickoff(key)
        attempts = () if holder is None else await records.attempts(holder.idempotency_key)
    if not attempts:
        raise CrewError(f"No run has the key {key!r}. prefect-crew runs --all lists those on record.")
    return [await look_at(record, records, utcnow()) for record in attempts]


@app.command
def resolve(
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
        asyncio.run(_resolve_lost(key, crew, access, _records()))
    else:
        asyncio.run(_resolve(key, kickoff_id, crew, access, _records()))


async def _resolve_lost(key: str, crew: str | None, access: CrewAccess, records: PrefectRecords) -> None:
    from prefect_crew.records.resolve import in_flight, resolve_lost

    record = await in_flight(key, records)
    found = await crew_of(record, crew, access)
    if found is None:
        _output.note(
            f"Crew {record.crew} is no stored block, so its server was not asked whether it knows run "
            f"{record.kickoff_id}. Give --crew to have it asked."
        )
        await resolve_lost(record, records)
    else:
        async with found.client() as client:
            await resolve_lost(record, records, look=client.status)
    _output.put(f"Resolved: run {record.kickoff_id} of {key} is lost. Run again with this key to buy another.")


async def _resolve(
    key: str, kickoff_id: str | None, crew: str | None, access: CrewAccess, records: PrefectRecords
) -> None:
    from prefect_crew.records.resolve import resolve_never_started, resolve_started, unresolved

    record = await unresolved(key, records)
    if kickoff_id is None:
        await resolve_never_started(record, records)
        _output.put(f"Resolved: {key} never started. Run again with this key to start it.")
        return
    found = await crew_of(record, crew, access)
    if found is None:
        _output.note(
            f"Crew {record.crew} is no stored block, so its server was not asked whether it knows run {kickoff_id}. "
            "Give --crew to have it asked."
        )
        state = await resolve_started(record, kickoff_id, records)
    else:
        async with found.client() as client:
            state = await resolve_started(record, kickoff_id, records, look=client.status)
    _output.put(
        f"Resolved: {key} is run {kickoff_id}{f', {state} now' if state else ''}. "
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
    raise ConfigurationError(f"Run {record.idempotency_key!r} is of the crew at {record.crew_url}, not of {found.url}.")


@app.command
def prune(
    *,
    older_than: Annotated[str, Parameter(help="How long ago a run has ended: 90d, 12h, 2w. At least 1h.")] = "90d",
    dry_run: Annotated[bool, flag("Only count.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Remove old records of ended runs. A later call with such a key is then a new purchase."""
    from prefect_crew.records.store import parse_age
    from prefect_crew.records.store import prune as prune_records

    try:
        age = parse_age(older_than)
    except ValueError as error:
        raise UsageError(f"--older-than {error}") from None
    done = asyncio.run(prune_records(_records(), older_than=age, dry_run=dry_run))
    if json:
        _output.put_json({"runs": done.runs, "notes": done.notes, "kept": done.kept, "dry_run": dry_run})
        return
    verb = "would be removed" if dry_run else "removed"
    _output.put(f"{done.runs} records {verb}, {done.notes} left-over notes too; {done.kept} records stay.")
