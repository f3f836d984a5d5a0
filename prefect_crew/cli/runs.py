"""The commands `runs`: what the records say, stopping a run, resolving what is uncertain, pruning what is old."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Group, Parameter, validators

from prefect_crew.cli import _output
from prefect_crew.cli._errors import UsageError
from prefect_crew.cli._options import CrewAccess, CrewOfRun, Output, Yes
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.client.models import StopOutcome
from prefect_crew.exceptions import BatchBusyError, ConfigurationError, CrewError, NotFoundError
from prefect_crew.records.decision import latest_start
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, utcnow
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.client.models import CrewStatus, StopAnswer
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


def todo(record: RunRecord, condition: Condition, *, is_passed: bool = False, names_task: bool | None = None) -> str:
    """Return what a person does about a run.

    Args:
        record: Its record.
        condition: What it is.
        is_passed: Whether its key leads to a later attempt.
        names_task: Whether its status names the task that waits; left out, whether the record does.
    """
    key, kickoff_id = shlex.quote(record.idempotency_key), shlex.quote(record.kickoff_id or "ID")
    if condition is Condition.UNCERTAIN:
        resolve = f"prefect-crew runs resolve {key} --kickoff-id ID, or --never-started"
        return f"Look at the crew's page, then: {resolve}."
    if condition is Condition.ORPHANED:
        person = " It waits for a person." if record.human_since is not None else ""
        goes_on = "Its key leads to a later attempt" if is_passed else "Run again with its key to wait for it"
        return (
            f"No flow run waits for it.{person} {goes_on}. If the crew's server has forgotten it: "
            f"prefect-crew runs resolve {key} --lost."
        )
    if condition is Condition.WAITING:
        names_task = record.human_task is not None if names_task is None else names_task
        options = f"{crew_option(record)}{'' if names_task else task_option(record)}"
        return f"Answer: prefect-crew reviews approve {kickoff_id}{options}, or reject ID --feedback TEXT."
    if condition is Condition.ENDED and record.state is not CrewState.COMPLETED:
        return "Run again with its key to start another, as far as the crew's max_kickoffs allows."
    return ""


def crew_option(record: RunRecord) -> str:
    """Return the option that names the crew of a record, where that is a URL and no stored crew."""
    is_address = record.crew == record.crew_url.partition("://")[2].rstrip("/")
    return f" --crew {shlex.quote(record.crew_url)}" if is_address else ""


def task_option(record: RunRecord) -> str:
    """Return the option that names the task of a run whose status does not: TASK where the record does not either."""
    return f" --task {shlex.quote(record.human_task or 'TASK')}"


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


def needs_crew(record: RunRecord) -> CrewError:
    """Return the error that the crew of a run has to be given."""
    return CrewError(
        f"The crew of run {record.kickoff_id}, {record.crew}, is not stored with the URL {record.crew_url}. Give "
        "--crew: that URL, with CREW_TOKEN, or the name of a stored crew."
    )


@asynccontextmanager
async def _status_call(
    record: RunRecord, crew: str | None, access: CrewAccess
) -> AsyncGenerator[Callable[[str], Awaitable[CrewStatus]] | None]:
    """Give the status call of a run's crew; None, and a note, where the crew is not known."""
    found = await crew_of(record, crew, access)
    if found is None:
        _output.note(f"The crew's server was not asked. {needs_crew(record)}")
        yield None
    else:
        async with found.client() as client:
            yield client.status


app = App(name="runs", help="Runs on record: list, stop, resolve and prune them.")
KeyOrId = Annotated[str, Parameter(name="KEY", help="The run's idempotency key, or its kickoff id.")]
OUTCOME = Group("What became of it, one of", validator=validators.LimitedChoice(1, 1), sort_key=0)


def _records() -> PrefectRecords:
    reach_prefect()
    from prefect_crew.records.store import PrefectRecords

    return PrefectRecords()


async def _attempts(name: str, records: PrefectRecords) -> list[RunRecord]:
    """Return all attempts at a key, or at the key of a kickoff id; an empty list where there is none."""
    attempts = await records.attempts(name)
    if not attempts and (holder := await records.of_kickoff(name)):
        attempts = await records.attempts(holder.idempotency_key)
    return list(attempts)


def _no_run(name: str) -> CrewError:
    return CrewError(f"No run on record has the key or kickoff id {name!r}. To list them: prefect-crew runs ls --all.")


@app.command
def ls(
    *,
    only: list[Condition] | None = None,
    all_: Annotated[bool, Parameter(name="--all")] = False,
    output: Output = None,
) -> None:
    """List the runs that have not ended. Those that need a person come first.

    Args:
        only: Only these; can be repeated.
        all_: Also those that have ended.
    """
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
            key=lambda line: (order.index(line.condition), -line.since.timestamp()),
        )

    lines = asyncio.run(look())
    if output:
        _output.put_json([_as_json(line) for line in lines])
        return
    rows = [(_state(line), line.record.idempotency_key, line.record.crew, ago(line.since)) for line in lines]
    empty = "No such run is on record." if only or all_ else "No run is open. To list ended ones too: --all."
    _output.put_rows(("State", "Key", "Crew", "Since"), rows, empty=empty)
    if any(line.todo for line in lines):
        _output.note("What to do about a run: prefect-crew runs inspect KEY", "dim")


@app.command
def inspect(
    run: KeyOrId,
    /,
    *,
    crew: CrewOfRun = None,
    output: Output = None,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Show every attempt at one idempotency key, and ask the crew about one in flight."""
    records = _records()

    async def look() -> tuple[list[RunLine], CrewStatus | None]:
        attempts = await _attempts(run, records)
        if not attempts:
            raise _no_run(run)
        lines, latest, status = [await look_at(one, records) for one in attempts], attempts[-1], None
        if latest.phase is RecordPhase.STARTED and latest.kickoff_id is not None:
            async with _status_call(latest, crew, access) as look:
                try:
                    status = await look(latest.kickoff_id) if look else None
                except CrewError as error:
                    _output.note(str(error))
        if status is not None and lines[-1].condition is Condition.WAITING:
            names_task = (status.human_task_id or status.current_task) is not None
            lines[-1] = replace(lines[-1], todo=todo(latest, Condition.WAITING, names_task=names_task))
        return lines, status

    lines, status = asyncio.run(look())
    if output:
        found = [_as_json(line) for line in lines]
        if status is not None:
            found[-1]["status"] = status.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}})
        _output.put_json(found)
        return
    for line in lines:
        for text in _about(line):
            _output.put(text)
    for text in () if status is None else _about_status(status):
        _output.put(text)
    latest = lines[-1].record
    if latest.result is not None or latest.state is CrewState.COMPLETED:
        _output.put(f"Its result: prefect-crew result {shlex.quote(latest.idempotency_key)}")


def _state(line: RunLine) -> str:
    ended = line.condition is Condition.ENDED and line.record.state
    return str(line.record.state) if ended else str(line.condition)


def _about(line: RunLine) -> Iterator[str]:
    record = line.record
    yield f"{_state(line).upper()}  {record.idempotency_key}"
    page = flow_run_url(record.flow_run_id) or record.flow_run_id
    facts = {
        "Attempt": record.attempt,
        "Crew": f"{record.crew} at {record.crew_url}",
        "Kickoff id": record.kickoff_id,
        "Since": f"{line.since:%Y-%m-%d %H:%M:%S} UTC ({ago(line.since)} ago)",
        "Flow run": page,
        "Inputs": f"digest {record.inputs_digest}",
        "Reason": record.reason if line.condition is Condition.UNCERTAIN else None,
        "Error": record.error,
        "To do": line.todo,
    }
    yield from _facts(facts)


def _about_status(status: CrewStatus) -> Iterator[str]:
    word = "waits for a person" if status.state is CrewState.WAITING else str(status.state)
    odd = "" if status.known_state else f" (it says {status.raw_state}, which counts as running)"
    yield f"  The crew's server: {word}{odd}"
    facts = {
        "Task": status.current_task,
        "Tasks done": f"{status.completed_tasks or 0} of {status.total_tasks}" if status.total_tasks else None,
        "Progress": None if status.progress is None or status.total_tasks else f"{status.progress:.0%}",
        "Error": status.error,
    }
    yield from _facts(facts)


def _facts(facts: Mapping[str, object]) -> Iterator[str]:
    for name, fact in facts.items():
        if fact not in (None, ""):
            yield f"  {name}: {' '.join(str(fact).split())}"


def ago(since: datetime) -> str:
    """Return how long ago a moment was, such as 3 min."""
    seconds = max(0.0, (utcnow() - since).total_seconds())
    units = (("d", 86400), ("h", 3600), ("min", 60))
    return next((f"{seconds / size:.0f} {unit}" for unit, size in units if seconds >= 2 * size), f"{seconds:.0f} s")


def _as_json(line: RunLine) -> dict[str, Any]:
    record = line.record.model_dump(mode="json", exclude={"result"})
    page = flow_run_url(line.record.flow_run_id)
    about = {"condition": str(line.condition), "since": line.since.isoformat(), "todo": line.todo, "page": page}
    return {**about, **record}


@app.command
def cancel(
    run: KeyOrId,
    /,
    *,
    crew: CrewOfRun = None,
    output: Output = None,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Ask the crew's server to stop a run. Flow runs that wait for it then fail."""

    records = _records()

    async def stop() -> StopAnswer:
        from prefect_crew.runs.stop import stop_run

        attempts = await _attempts(run, records)
        if not attempts:
            if crew is None:
                raise _no_run(run)
            return await stop_run(await access.load(crew), run)
        record = attempts[-1]
        if record.kickoff_id is None:
            raise CrewError(f"Run {run!r} has no kickoff id, so it cannot be stopped: its kickoff is {record.phase}.")
        found = await crew_of(record, crew, access)
        if found is None:
            raise needs_crew(record)
        return await stop_run(found, record.kickoff_id)

    answer = asyncio.run(stop())
    if answer.outcome is StopOutcome.UNSUPPORTED:
        raise CrewError(f"Run {run} continues: the crew's server has no /stop. The crew's page may offer it.")
    if answer.outcome is StopOutcome.UNKNOWN_RUN:
        said = answer.message or "the server does not know this run"
        raise NotFoundError(status_code=404, method="POST", path="/stop", message=said, kickoff_id=run)
    has_ended = answer.state is not None and answer.state.ended
    if answer.outcome is StopOutcome.NOT_STOPPABLE and not has_ended:
        raise CrewError(f"Run {run} was not stopped: {answer.message or 'the server gave no reason'}.")
    if output:
        _output.put_json(answer.model_dump(mode="json", exclude={"raw"}))
    elif answer.accepted:
        _output.put(f"Run {run}: {'stopped' if answer.outcome is StopOutcome.STOPPED else 'asked to stop'}.")
    else:
        _output.put(f"Run {run} had already ended: {answer.state}.")


@app.command
def resolve(
    key: Annotated[str, Parameter(name="KEY", help="The idempotency key; of a row of a batch: batch/NAME/ROW.")],
    /,
    *,
    kickoff_id: Annotated[str | None, Parameter(group=OUTCOME)] = None,
    never_started: Annotated[bool, Parameter(group=OUTCOME)] = False,
    lost: Annotated[bool, Parameter(group=OUTCOME)] = False,
    crew: CrewOfRun = None,
    ledger: str | None = None,
    yes: Yes = False,
    access: CrewAccess = CrewAccess(),
) -> None:
    """Say what became of an uncertain kickoff, or of a lost run. Look at the crew's page before.

    Args:
        key: The idempotency key; of a row of a batch: batch/NAME/ROW.
        kickoff_id: The kickoff started this run.
        never_started: The kickoff started no run.
        lost: The run was started, and the crew's server has forgotten it.
        ledger: Of a row: the batch's ledger, if the one on record cannot be opened.
    """
    if kickoff_id is None:
        _output.confirm(
            f"The next call with the key {key!r} will start a new run, even if this one goes on. Go on?", yes=yes
        )
    reach_prefect()

    async def say() -> str:
        from prefect_crew.records.resolve import (
            in_flight,
            resolve_lost,
            resolve_never_started,
            resolve_started,
            unresolved,
        )

        async with _open_store(key, ledger) as (records, batch):
            again = f"prefect-crew batch resume {shlex.quote(batch)}" if batch else "A call with this key"
            if lost and batch:
                raise UsageError(f"--lost is not for rows of a batch: prefect-crew batch retry {shlex.quote(batch)}.")
            record = await (in_flight if lost else unresolved)(key, records)
            if never_started:
                await resolve_never_started(record, records)
                return f"{key} never started. {again} starts it."
            async with _status_call(record, crew, access) as look:
                if kickoff_id is None:
                    await resolve_lost(record, records, look=look)
                    return f"run {record.kickoff_id} of {key} is lost. {again} starts another."
                if batch:
                    await _check_unused(kickoff_id, record)
                state = await resolve_started(record, kickoff_id, records, look=look)
            now = f", {state} now" if state else ""
            return f"{key} is run {kickoff_id}{now}. {again} waits for it and gets its result."

    _output.put(f"Resolved: {asyncio.run(say())}")


async def _check_unused(kickoff_id: str, record: RunRecord) -> None:
    """Refuse the id of another run: a ledger does not know the runs outside of its batches."""
    from prefect_crew.records.store import PrefectRecords

    holder = await PrefectRecords().of_kickoff(kickoff_id)
    if holder is not None and holder.idempotency_key != record.idempotency_key:
        raise ConfigurationError(
            f"Run {kickoff_id} belongs to the idempotency key {holder.idempotency_key!r} (attempt {holder.attempt}), "
            f"not to {record.idempotency_key!r}. Nothing was changed. Look for another run on the crew's page, or give "
            "--never-started if there is none."
        )


@asynccontextmanager
async def _open_store(key: str, ledger: str | None) -> AsyncGenerator[tuple[RecordStore, str | None]]:
    """Open where the record of a key is. Of a row: its batch's ledger, locked, with the batch's name."""
    from prefect_crew.batches.ownership import BatchLock
    from prefect_crew.batches.stored import list_batches, open_stored_batch
    from prefect_crew.records.keys import escape_name
    from prefect_crew.records.store import PrefectRecords

    names = [name for name, _ in await list_batches()] if key.startswith("batch/") else []
    name = next((name for name in names if key.startswith(f"batch/{escape_name(name)}/")), None)
    if name is None:
        yield PrefectRecords(), None
        return
    async with open_stored_batch(name, ledger) as batch, BatchLock(batch.ledger.database, name) as lock:
        if not await lock.take():
            raise BatchBusyError(name=name)
        batch.ledger.is_exclusive = lock.proves
        if not await batch.ledger.attempts(key):
            row = batch.ledger.row_key(key)
            raise ConfigurationError(f"Batch {name!r} has started no run for a row {row!r}.")
        yield batch.ledger, name


@app.command
def prune(
    *,
    older_than: timedelta | None = None,
    dry_run: bool = False,
    yes: Yes = False,
    output: Output = None,
) -> None:
    """Remove old records of ended runs. A later call with such a key then starts a new run.

    Args:
        older_than: How long ago a run and its flow runs have ended: 90d, 12h, 2w. At least 1h; left out, 30d or what
            PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS says.
        dry_run: Only count.
    """
    from prefect_crew.records.prune import prune as prune_records

    records = _records()
    done = asyncio.run(prune_records(records, older_than=older_than, dry_run=True))
    if not dry_run:
        if done.runs:
            question = f"Remove {done.runs} run records? A later call with one of their keys starts a new run."
            _output.confirm(question, yes=yes)
        done = asyncio.run(prune_records(records, older_than=older_than))
    if output:
        _output.put_json({"runs": done.runs, "notes": done.notes, "kept": done.kept, "dry_run": dry_run})
        return
    verb = "would be removed" if dry_run else "removed"
    _output.put(f"{done.runs} records {verb}, {done.notes} left-over notes too; {done.kept} records stay.")
