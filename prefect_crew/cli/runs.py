"""The commands `runs` and `costs`: list, inspect, stop, resolve and prune runs, and add up their costs."""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

from cyclopts import App, Group, Parameter, validators

from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.batches.ownership import BatchLock
from prefect_crew.batches.stored import list_batches, open_stored_batch
from prefect_crew.cli import _output
from prefect_crew.cli._errors import OTHER
from prefect_crew.cli._options import CrewOfRun, Ledger, Output, Yes
from prefect_crew.cli._prefect import page_url
from prefect_crew.client.models import StopOutcome
from prefect_crew.costs import By, grouped, read_costs
from prefect_crew.exceptions import (
    BatchBusyError,
    ConfigurationError,
    CrewError,
    RunNotFoundError,
    UnreadableRecordError,
)
from prefect_crew.prices import Spending, money
from prefect_crew.records.decision import latest_start
from prefect_crew.records.keys import escape_name, normalize_key
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, utcnow
from prefect_crew.records.prune import prune as prune_records
from prefect_crew.records.resolve import (
    Look,
    check_unused,
    in_flight,
    resolve_lost,
    resolve_never_started,
    resolve_started,
    unresolved,
)
from prefect_crew.records.sessions import note_given_up, note_over
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import answer_without_id, resolve_answer
from prefect_crew.runs.run import LiveRun, read_status
from prefect_crew.runs.stop import crew_option, newest_id, stop_run
from prefect_crew.states import CrewState


class Condition(StrEnum):
    """The condition of a run by its record and its flow run. The conditions that need a person come first.

    `uncertain`: a kickoff was sent, and nobody knows whether it started a run. `orphaned`: the flow run that started
    it has ended. `waiting`: for a person. `claimed`: its kickoff is being sent.
    """

    UNCERTAIN = "uncertain"
    ORPHANED = "orphaned"
    WAITING = "waiting"
    IN_FLIGHT = "in-flight"
    CLAIMED = "claimed"
    ENDED = "ended"
    NOT_STARTED = "not-started"


OPEN = (Condition.UNCERTAIN, Condition.ORPHANED, Condition.WAITING, Condition.IN_FLIGHT, Condition.CLAIMED)


@dataclass(frozen=True)
class RunLine:
    """A record and its condition."""

    record: RunRecord
    condition: Condition

    @property
    def since(self) -> datetime:
        """The time since when it is in its condition, UTC."""
        record = self.record
        at = {Condition.WAITING: record.human_since, Condition.ENDED: record.ended_at}
        return at.get(self.condition, record.kicked_off_at) or record.claimed_at

    @property
    def word(self) -> str:
        """The word for people: the state of a run that has ended, else its condition."""
        return str((self.condition is Condition.ENDED and self.record.state) or self.condition)


async def look_at(record: RunRecord, records: PrefectRecords) -> RunLine:
    """Return a record with its condition. Prefect is asked about its flow run only where that matters."""
    is_open = record.phase in (RecordPhase.CLAIMED, RecordPhase.STARTED)
    return RunLine(record, condition_of(record, owner_ended=is_open and await records.owner_ended(record)))


def condition_of(record: RunRecord, *, owner_ended: bool) -> Condition:
    """Return the condition of a run. `owner_ended`: whether the flow run that claimed it has surely ended."""
    if record.phase is RecordPhase.CLAIMED:
        if record.open_for and not owner_ended:
            return Condition.CLAIMED
        return Condition.UNCERTAIN if record.entries else Condition.NOT_STARTED
    if record.phase is RecordPhase.STARTED:
        if owner_ended or record.flow_run_id is None:
            return Condition.ORPHANED
        return Condition.IN_FLIGHT if record.human_since is None else Condition.WAITING
    return {RecordPhase.ENDED: Condition.ENDED, RecordPhase.UNCERTAIN: Condition.UNCERTAIN}.get(
        record.phase, Condition.NOT_STARTED
    )


def todo(record: RunRecord, condition: Condition, state: CrewState | None = None) -> str:
    """Return the next step of a person for a run, which has this state on its server; empty if there is none."""
    key, kickoff_id = shlex.quote(record.idempotency_key), shlex.quote(record.kickoff_id or "ID")
    answer = f"It waits for a person: prefect-crew reviews inspect {kickoff_id}{crew_option(record)}."
    if condition is Condition.UNCERTAIN:
        resolve = f"prefect-crew runs resolve {key} --kickoff-id ID, or --never-started"
        return f"Look at the crew's page, then: {resolve}."
    if condition is Condition.ORPHANED and state is CrewState.COMPLETED:
        return f"It has completed, and nobody took its result: prefect-crew result {kickoff_id}{crew_option(record)}."
    if condition is Condition.ORPHANED:
        owner = "No flow run started it." if record.flow_run_id is None else "The flow run that started it has ended."
        return (
            f"{owner}{'' if record.human_since is None else f' {answer}'} A call with its key waits for the latest "
            f"attempt. If the crew's server has forgotten this one: prefect-crew runs resolve {kickoff_id} --lost."
        )
    if condition is Condition.WAITING:
        return answer
    if condition is Condition.ENDED and record.state is not CrewState.COMPLETED:
        return "Run again with its key to start another, as far as the crew's max_attempts allows."
    return ""


def short_name(record: RunRecord) -> str:
    """Return the name of a run in a table: its key, or its kickoff id if the key is long, as derived keys are."""
    return record.idempotency_key if len(record.idempotency_key) <= 45 else record.kickoff_id or record.idempotency_key


@asynccontextmanager
async def _status_call(
    record: RunRecord, records: RecordStore, crew: CrewOfRun, *, with_webhooks: bool = True
) -> AsyncGenerator[Look | None]:
    """Yield the method that asks a run's crew for a status. If the crew is not known, write a note and yield None.

    `with_webhooks`: a run of which a webhook says that it waits for a person does so, though its server knows it not.
    """
    loaded_crew = await crew.find(record)
    if loaded_crew is None:
        _output.note(f"The crew's server was not asked. {crew.missing(record)}")
        yield None
    else:
        run = LiveRun(loaded_crew, str(record.kickoff_id), record, records=records)
        async with run.session as session:
            yield (
                lambda kickoff_id: (
                    read_status(run)
                    if with_webhooks and kickoff_id == record.kickoff_id
                    else session.call(lambda client: client.status(kickoff_id))
                )
            )


app = App(name="runs")
SHARE = 0.5
"""The share of the Prefect server's time that `prune` takes. It is large, since a person waits."""
KeyOrId = Annotated[str, Parameter(name="KEY", help="The run's idempotency key, or its kickoff id.")]
OUTCOME = Group("The outcome, one of", validator=validators.LimitedChoice(1, 1), sort_key=0)


async def _attempts(name: str, records: PrefectRecords) -> Sequence[RunRecord]:
    """Return all attempts at a key, or at the key of a kickoff id. Raises RunNotFoundError if there is none."""
    attempts = await records.attempts(name)
    if not attempts and (holder := await records.of_kickoff(name)):
        attempts = await records.attempts(holder.idempotency_key)
    if not attempts and name.startswith("batch/"):
        raise RunNotFoundError(
            name=name, advice="A row is in the ledger of its batch: prefect-crew batch inspect NAME."
        )
    if not attempts:
        raise RunNotFoundError(name=name)
    return attempts


@app.command
async def ls(
    *,
    only: list[Condition] | None = None,
    all_: Annotated[bool, Parameter(name="--all")] = False,
    session: str | None = None,
    output: Output = None,
) -> None:
    """List the runs that have not ended. The runs that need a person come first.

    Args:
        only: Only runs in this condition; can be repeated.
        all_: Also runs that have ended.
        session: The turns of a session of a CrewAI Flow, also those that have ended, in their order.
    """
    session, all_ = session and normalize_key(session), all_ or session is not None
    conditions, records, order = set(only or (Condition if all_ else OPEN)), PrefectRecords(), list(Condition)
    ended = (RecordPhase.ENDED, RecordPhase.NOT_STARTED)
    phases = [phase for phase in RecordPhase if not conditions <= set(OPEN) or phase not in ended]
    looks = [await look_at(record, records) async for record in records.all(*phases)]
    lines = sorted(
        (line for line in looks if line.condition in conditions and session in (None, line.record.session)),
        key=lambda line: (order.index(line.condition), -line.since.timestamp()),
    )
    columns = ["State", "Run", "Crew", "Since"]
    if session is not None:
        lines.sort(key=lambda line: (line.record.crew_url, line.record.turn or 0))
        columns.append("Turn")
    cells = [
        (line.word, short_name(line.record), line.record.crew, ago(line.since), str(line.record.turn or ""))
        for line in lines
    ]
    rows = [row[: len(columns)] for row in cells]
    empty = "No such run is on record." if only or all_ else "No run is open. To list ended runs too, add --all."
    empty += " Rows of batches: prefect-crew batch ls."
    as_json = output and [_as_json(line) for line in lines]
    _output.put_rows(columns, rows, empty=empty, json=as_json)
    if not output and any(todo(line.record, line.condition) for line in lines):
        _output.note("To see what to do about a run: prefect-crew runs inspect RUN", "dim")


@app.command
async def inspect(run: KeyOrId, /, *, output: Output = None, crew: CrewOfRun = CrewOfRun()) -> None:
    """Show every attempt at one idempotency key, and ask the crew about an attempt in flight."""
    records = PrefectRecords()
    attempts = await _attempts(run, records)
    lines, status, newest = [await look_at(attempt, records) for attempt in attempts], None, None
    latest = latest_start(attempts) or attempts[-1]
    if latest.kickoff_id is not None:
        newest = await newest_id(latest, records)
        if latest.phase is RecordPhase.STARTED:
            async with _status_call(latest, records, crew) as look:
                try:
                    status = await look(latest.kickoff_id) if look else None
                except CrewError as error:
                    _output.note(str(error))
    if output:
        documents = [_as_json(line) for line in lines]
        documents[attempts.index(latest)] |= {"goes_on_as": newest}
        if status is not None:
            document = status.model_dump(mode="json", exclude={"raw": True, "tasks": {"__all__": {"raw"}}})
            documents[attempts.index(latest)] |= {"status": document}
        _output.put_json(documents)
        return
    for line in lines:
        record = line.record
        _output.put(f"{line.word.upper()}  {record.idempotency_key}")
        _put_facts(
            {
                "Attempt": record.attempt,
                "Crew": f"{record.crew} at {record.crew_url}",
                "Version": record.crew_version,
                "Kickoff id": record.kickoff_id,
                "Goes on as": newest if record is latest and newest != record.kickoff_id else None,
                "Since": f"{line.since:%Y-%m-%d %H:%M:%S} UTC ({ago(line.since)} ago)",
                "Flow run": page_url(record.flow_run_id) or record.flow_run_id,
                "Inputs": f"digest {record.inputs_digest}",
                "Reason": record.reason if line.condition is Condition.UNCERTAIN else None,
                "Error": record.error,
                "To do": todo(record, line.condition, status.state if status and record is latest else None),
            }
        )
    if status is not None:
        word = "waits for a person" if status.state is CrewState.WAITING else str(status.state)
        odd = "" if status.known_state else f" (it says {status.raw_state}, which counts as running)"
        _put_facts(
            {
                "The crew's server": f"{word}{odd}",
                "Task": status.current_task,
                "Tasks done": f"{status.completed_tasks or 0} of {status.total_tasks}" if status.total_tasks else None,
                "Steps done": None if status.total_tasks else status.completed_tasks,
                "Progress": None if status.progress is None or status.total_tasks else f"{status.progress:.0%}",
                "Error": status.error,
            }
        )
    if latest.result is not None or latest.state is CrewState.COMPLETED:
        _output.put(f"Its result: prefect-crew result {shlex.quote(latest.idempotency_key)}")


def _put_facts(facts: Mapping[str, object]) -> None:
    for name, fact in facts.items():
        if fact not in (None, ""):
            _output.put(f"  {name}: {' '.join(str(fact).split())}")


def ago(since: datetime) -> str:
    """Return how long ago a moment was, such as 3 min."""
    seconds = max(0.0, (utcnow() - since).total_seconds())
    units = (("d", 86400), ("h", 3600), ("min", 60))
    return next((f"{seconds / size:.0f} {unit}" for unit, size in units if seconds >= 2 * size), f"{seconds:.0f} s")


SHOWN = {
    *("idempotency_key", "attempt", "crew", "crew_url", "kickoff_id", "state", "error", "reason", "inputs_digest"),
    *("claimed_at", "kicked_off_at", "ended_at", "human_since", "human_task", "flow_run_id", "usage", "cost"),
    *("session", "turn", "crew_version"),
}
"""Fields of a record that JSON has."""


def _as_json(line: RunLine) -> dict[str, Any]:
    page = page_url(line.record.flow_run_id)
    state = {"condition": str(line.condition), "todo": todo(line.record, line.condition)}
    about = {**state, "since": line.since.isoformat(), "page": page}
    return {**about, **line.record.model_dump(mode="json", include=SHOWN)}


@app.command
async def cancel(run: KeyOrId, /, *, output: Output = None, crew: CrewOfRun = CrewOfRun()) -> int:
    """Ask the crew's server to stop a run. Flow runs that wait for it then fail."""
    attempts = await _attempts(run, PrefectRecords())
    record_of_id = next((attempt for attempt in attempts if attempt.kickoff_id == run), None)
    record = record_of_id or latest_start(attempts) or attempts[-1]
    if record.kickoff_id is None:
        raise CrewError(f"Run {run!r} has no kickoff id, so it cannot be stopped: its kickoff is {record.phase}.")
    answer = await stop_run(LiveRun(await crew.need(record), record.kickoff_id))
    if answer.accepted:
        sentence = f"Run {run}: {'stopped' if answer.outcome is StopOutcome.STOPPED else 'asked to stop'}."
    elif answer.state is not None and answer.state.ended:
        sentence = f"Run {run} had already ended: {answer.state}."
    else:
        why = answer.message or {
            StopOutcome.UNSUPPORTED: "the crew's server has no /stop. The crew's page may offer it",
            StopOutcome.UNKNOWN_RUN: "the server does not know this run",
        }.get(answer.outcome, "the server gave no reason")
        raise CrewError(f"Run {run} was not stopped: {why}.")
    _output.put(sentence, json=output and answer.model_dump(mode="json", exclude={"raw"}))
    return 0 if answer.accepted else OTHER


@app.command
def resolve(
    key: Annotated[str, Parameter(name="KEY", help="The idempotency key; of a row of a batch: batch/NAME/ROW.")],
    /,
    *,
    kickoff_id: Annotated[str | None, Parameter(group=OUTCOME)] = None,
    never_started: Annotated[bool, Parameter(group=OUTCOME)] = False,
    lost: Annotated[bool, Parameter(group=OUTCOME)] = False,
    ledger: Ledger = None,
    yes: Yes = False,
    crew: CrewOfRun = CrewOfRun(),
) -> Coroutine[Any, Any, None]:
    """Record the outcome of an uncertain kickoff, or of a lost run. First look for the run on the crew's page.

    Args:
        kickoff_id: The kickoff started the run with this id; or the run goes on with this id after a person's answer.
        never_started: The kickoff started no run.
        lost: The kickoff started a run, and the crew's server has forgotten the run. KEY may be the run's kickoff id.
    """
    if kickoff_id is None:
        _output.confirm(
            f"Run {key!r}: the next call with its key will start a new run, even if this one goes on. Go on?", yes=yes
        )

    async def write() -> None:
        async with _open_store(key, ledger) as (records, batch):
            again = f"prefect-crew batch resume {shlex.quote(batch)}" if batch else "A call with this key"
            answered = None if kickoff_id is None else await answer_without_id(key, records)
            record = answered or await (in_flight if lost else unresolved)(key, records)
            if never_started:
                await resolve_never_started(record, records)
                sentence = f"{key} never started. {again} starts it."
            elif kickoff_id is None:
                async with _status_call(record, records, crew) as look:
                    await resolve_lost(record, records, look=look)
                if batch:
                    row = shlex.quote(key.removeprefix(f"batch/{escape_name(batch)}/"))
                    again = f"prefect-crew batch retry {shlex.quote(batch)} --row {row}"
                sentence = f"run {record.kickoff_id} of {record.idempotency_key} is lost. {again} starts another."
            else:
                if batch:  # a ledger does not know the runs outside of its batches
                    await check_unused(kickoff_id, record, PrefectRecords())
                resolve_run = resolve_started if answered is None else resolve_answer
                async with _status_call(record, records, crew, with_webhooks=False) as look:
                    state = await resolve_run(record, kickoff_id, records, look=look)
                now = f", {state} now" if state else ""
                is_now = "is" if answered is None else f"was {record.kickoff_id} and goes on as"
                sentence = f"{key} {is_now} run {kickoff_id}{now}. {again} waits for it and gets its result."
            if batch:
                with suppress(*PREFECT_ERRORS, UnreadableRecordError):  # a later call of the batch does it
                    await note_over([record])
                    await note_given_up([record], records)
        _output.put(f"Resolved: {sentence}")

    return write()


@asynccontextmanager
async def _open_store(key: str, ledger: str | None) -> AsyncGenerator[tuple[RecordStore, str | None]]:
    """Open the store of a key's record. For a row this is its batch's ledger, locked, with the batch's name."""
    names = [name for name, _ in await list_batches()] if key.startswith("batch/") else []
    name = next((name for name in names if key.startswith(f"batch/{escape_name(name)}/")), None)
    if name is None:
        yield PrefectRecords(), None
        return
    async with open_stored_batch(name, ledger) as batch, BatchLock(batch.ledger.database, name) as lock:
        if not await lock.take():
            raise BatchBusyError(name=name)
        batch.ledger.is_exclusive = True
        if not await batch.ledger.attempts(key):
            row = batch.ledger.row_key(key)
            raise ConfigurationError(f"Batch {name!r} has no run of a row {row!r}. Check the key or resume the batch.")
        yield batch.ledger, name


@app.command
async def prune(
    *, older_than: timedelta | None = None, dry_run: bool = False, yes: Yes = False, output: Output = None
) -> None:
    """Remove old records of ended runs. A later call with such a key then starts a new run.

    Args:
        older_than: How long ago a run and its flow runs ended: 90d, 12h, at least 1h; left out, 30d or the setting.
        dry_run: Only count.
    """
    records = PrefectRecords()
    done = await prune_records(records, older_than=older_than, dry_run=True, share=SHARE)
    if not dry_run:
        if done.runs:
            question = f"Remove {done.runs} run records? A later call with one of their keys starts a new run."
            _output.confirm(question, yes=yes)
        done = await prune_records(records, older_than=older_than, share=SHARE)
    verb = "would be removed" if dry_run else "removed"
    sentence = (
        f"{done.runs} records {verb}. {done.kept} of this age stay: their runs are open, or flow runs may ask for them."
    )
    _output.put(sentence, json=output and {**vars(done), "dry_run": dry_run})


async def costs(
    *,
    by: By = "crew",
    from_: Annotated[date | None, Parameter(name="--from")] = None,
    to: date | None = None,
    output: Output = None,
) -> None:
    """Add up runs that have ended, on the day of their end in UTC.

    Args:
        by: The groups to add up.
        from_: The first day, such as 2026-05-01.
        to: The last day.
    """
    rows, missed = await read_costs([by], since=from_, until=to)
    groups, total = grouped(rows, by), Spending.sum(row.spending for row in rows)
    rows_shown = [_cells(name, spending) for name, spending in groups.items()]
    if len(rows_shown) > 1:
        rows_shown.append(_cells("together", total))
    sums = [{"name": name, **spending.as_dict()} for name, spending in groups.items()]
    as_json = output and {"by": by, "groups": sums, "total": total.as_dict(), "missing": missed}
    titles = (by.capitalize(), "Runs", "Tokens", "Cost", "Without tokens")
    _output.put_rows(titles, rows_shown, empty="No run has ended in this time.", json=as_json)
    for line in ([f"{total.unknown}."] if total.unknown else []) + missed:
        _output.note(line, "yellow")


def _cells(name: str, spending: Spending) -> tuple[str, ...]:
    """Return a row of the table: how many runs, their tokens and their cost."""
    tokens = f"{spending.tokens:,}" if spending.reported else "–"
    return name, f"{spending.runs:,}", tokens, money(spending.cost), f"{spending.runs - spending.reported:,}"
