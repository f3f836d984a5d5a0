"""The commands `runs` and `costs`: list, inspect, stop, resolve and prune runs, and add up their costs."""

from __future__ import annotations

import getpass
import shlex
import time
from collections.abc import AsyncGenerator, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import date, timedelta
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from cyclopts import App, Group, Parameter, validators
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from prefect_crew._internal.clock import moment
from prefect_crew.cli import _output
from prefect_crew.cli._errors import OTHER
from prefect_crew.cli._options import CrewOfRun, Output, Yes
from prefect_crew.cli._prefect import page_url
from prefect_crew.client.models import CrewStatus, StopOutcome
from prefect_crew.costs import By, read_costs
from prefect_crew.crew import CrewSession
from prefect_crew.exceptions import CrewError
from prefect_crew.prices import Spending, money
from prefect_crew.runs import prune as pruning
from prefect_crew.runs.database import in_store
from prefect_crew.runs.keys import normalize_key
from prefect_crew.runs.owners import process_is_gone
from prefect_crew.runs.resolve import (
    Look,
    find_attempts,
    latest,
    resolve_lost,
    resolve_never_started,
    resolve_started,
)
from prefect_crew.runs.run import LiveRun, read_status
from prefect_crew.runs.stop import crew_option, stop_run
from prefect_crew.states import CrewState
from prefect_crew.store import attempts, questions
from prefect_crew.store.decision import Attempt, AttemptState
from prefect_crew.store.questions import Question

S = AttemptState
MOST = 500
"""Runs that a list shows at most."""
PAGE = 200
"""The most flow runs in one answer of the Prefect server."""


class Word(StrEnum):
    """The state of an attempt in words for people. Those that need a person come first.

    `unattended`: it is started, and the flow run that started it has ended, or none has. `waiting`: for a person.
    """

    UNCERTAIN = "uncertain"
    UNATTENDED = "unattended"
    WAITING = "waiting"
    STARTED = "started"
    BACKING_OFF = "backing-off"
    POSTING = "posting"
    LOST = "lost"
    FAILED = "failed"
    STOPPED = "stopped"
    COMPLETED = "completed"
    NOT_STARTED = "not-started"


STATES: dict[Word, set[AttemptState]] = {
    Word.UNCERTAIN: {S.UNCERTAIN, S.POSTING},
    Word.UNATTENDED: {S.STARTED},
    Word.WAITING: {S.STARTED},
    Word.BACKING_OFF: {S.BACKING_OFF},
    Word.NOT_STARTED: {S.NOT_STARTED, S.BACKING_OFF},
}
"""The states of the store with these words; the other words are states themselves."""


def word_of(attempt: Attempt, ended: Collection[str | None], now: float) -> Word:
    """Return the word for an attempt. `ended`: flow runs that have ended, and None."""
    if attempt.state is S.POSTING and attempt.is_free(now):
        return Word.UNCERTAIN
    if attempt.state is S.BACKING_OFF and attempt.is_free(now):
        return Word.NOT_STARTED
    if attempt.state is S.STARTED and attempt.human_since is not None:
        return Word.WAITING
    if attempt.state is S.STARTED and attempt.flow_run_id in ended:
        return Word.UNATTENDED
    return Word(attempt.state.replace("_", "-"))


async def ended_flow_runs(listed: Sequence[Attempt]) -> set[str | None]:
    """Return the flow runs of started attempts that have ended, or whose process has, and None.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached.
    """
    started = [attempt for attempt in listed if attempt.state is S.STARTED and attempt.flow_run_id is not None]
    gone = {attempt.flow_run_id for attempt in started if attempt.process and process_is_gone(attempt.process)}
    ids = sorted({str(attempt.flow_run_id) for attempt in started} - gone)
    alive = set[str]()
    async with get_client() as client:
        for start in range(0, len(ids), PAGE):
            page = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(each) for each in ids[start : start + PAGE]]))
            for run in await client.read_flow_runs(flow_run_filter=page, limit=PAGE):
                if run.state is None or not run.state.is_final():
                    alive.add(str(run.id))
    return {None, *gone, *(each for each in ids if each not in alive)}


def todo(attempt: Attempt, word: Word, now: float, status: CrewStatus | None = None, *, left: int | None = None) -> str:
    """Return the next step of a person for the latest attempt of a key; empty if there is none.

    `status`: the crew's own word on it. `left`: the attempts that the key has left, None if the crew is not known.
    """
    key, run = shlex.quote(attempt.key), f"{shlex.quote(attempt.first_id or 'ID')}"
    call = "A call with its key" if attempt.batch is None else f"prefect-crew batch resume {shlex.quote(attempt.batch)}"
    if attempt.replaced:
        return ""
    if word is Word.UNCERTAIN:
        resolve = f"prefect-crew runs resolve {key} --kickoff-id ID, or --never-started"
        if not attempt.is_free(now):
            at = moment(attempt.deadline or now)
            return (
                f"Its kickoff may arrive until {at:%H:%M:%S} UTC. Look at the crew's page after that, then: {resolve}."
            )
        return f"Look at the crew's page, then: {resolve}."
    if word in (Word.UNATTENDED, Word.STARTED, Word.WAITING) and status is not None:
        if status.state is CrewState.UNKNOWN:
            return (
                "The crew's server does not know it. If the crew's page does not show it either, run: "
                f"prefect-crew runs resolve {run} --lost. {call} then starts another."
            )
        if status.state is CrewState.COMPLETED and word is Word.UNATTENDED:
            return f"It has completed, and nobody took its result: prefect-crew result {run}{crew_option(attempt)}."
    if word is Word.WAITING:
        return f"It waits for a person: prefect-crew reviews inspect {run}{crew_option(attempt)}."
    if word is Word.UNATTENDED:
        owner = "No flow run started it." if attempt.flow_run_id is None else "The flow run that started it has ended."
        return f"{owner} {call} waits for it. To ask its server: prefect-crew runs inspect {run}."
    if word in (Word.LOST, Word.FAILED, Word.STOPPED):
        if left is not None and left <= 0:
            more = ", give --force-new, or take another key" if attempt.batch is None else ""
            return f"Its key has no attempt left: raise max_attempts of the crew{more}."
        return f"{call} starts another run{', up to max_attempts of the crew' if left is None else ''}."
    return ""


def short_name(attempt: Attempt) -> str:
    """Return the name of a run in a table: its key, or its kickoff id if the key is long, as derived keys are."""
    return attempt.key if len(attempt.key) <= 45 else attempt.first_id or attempt.key


app = App(name="runs")
KeyOrId = Annotated[str, Parameter(name="KEY", help="The run's idempotency key, or its kickoff id.")]
OUTCOME = Group("The outcome, one of", validator=validators.LimitedChoice(1, 1), sort_key=0)


@app.command
async def ls(
    *,
    state: list[Word] | None = None,
    all_: Annotated[bool, Parameter(name="--all")] = False,
    crew: str | None = None,
    session: str | None = None,
    output: Output = None,
) -> None:
    """List the runs that have not ended. The runs that need a person come first.

    Args:
        state: Only runs in this state; can be repeated.
        all_: Also runs that have ended.
        crew: Only runs of this crew: its name or its URL.
        session: The turns of a session of a CrewAI Flow, also those that have ended, in their order.
    """
    session = session and normalize_key(session)
    is_open = not (state or all_ or session)
    wanted: dict[str, Any] = {"crew": crew, "session": session, "is_in_flight": is_open, "limit": MOST}
    states = {each for word in state for each in STATES.get(word, {S(word)})} if state else None
    listed = await in_store(attempts.list_attempts, states=states, with_rows=False, **wanted)
    is_cut = len(listed) == MOST
    if session is None and (is_open or Word.UNCERTAIN in (state or ())):  # a row may need a person too
        rows = await in_store(attempts.list_attempts, states=STATES[Word.UNCERTAIN], **wanted)
        listed += [row for row in rows if row.batch is not None and row.is_free(time.time())]
    ended, now, order = await ended_flow_runs(listed), await in_store(attempts.time_now), list(Word)
    lines = [(word_of(attempt, ended, now), attempt) for attempt in listed]
    lines = [line for line in lines if not state or line[0] in state]
    columns = ["State", "Run", "Crew", "Since"]
    if session is None:
        lines.sort(key=lambda line: (order.index(line[0]), -_since(line[1])))
    else:
        lines.sort(key=lambda line: (line[1].crew_url, line[1].turn or 0))
        columns.append("Turn")
    cells = [
        (str(word), short_name(attempt), attempt.crew, ago(_since(attempt), now), str(attempt.turn or ""))
        for word, attempt in lines
    ]
    empty = "No run is open. To list ended runs too, add --all." if is_open else "There is no such run."
    as_json = output and [_as_json(attempt, word, now) for word, attempt in lines]
    shown = [row[: len(columns)] for row in cells]
    _output.put_rows(columns, shown, empty=f"{empty} Rows of batches: prefect-crew batch ls.", json=as_json)
    if is_cut:
        _output.note(f"These are the latest {MOST}. --crew, --state and --session list fewer.", "dim")
    if not output and any(todo(attempt, word, now) for word, attempt in lines):
        _output.note("To see what to do about a run: prefect-crew runs inspect RUN", "dim")


@app.command
async def inspect(run: KeyOrId, /, *, output: Output = None, crew: CrewOfRun = CrewOfRun()) -> None:
    """Show every attempt at one idempotency key, and ask the crew about a run in flight."""
    found = await find_attempts(run)
    found = await in_store(attempts.of_key, found[0].key)
    ended, now, last, status = await ended_flow_runs(found), await in_store(attempts.time_now), latest(found), None
    loaded_crew = await crew.find(last)
    if last.state is S.STARTED and loaded_crew is None:
        _output.note(f"The crew's server was not asked. {crew.missing(last)}")
    elif last.state is S.STARTED and loaded_crew is not None:
        live = LiveRun(loaded_crew, str(last.first_id), last)
        try:
            async with live.session:
                status = live.redact_status(await read_status(live))
        except CrewError as error:
            _output.note(str(error))
        last = live.attempt or last
    left = None
    if loaded_crew is not None:
        left = loaded_crew.max_attempts - sum(attempt.may_count(now) for attempt in found)
    documents: list[dict[str, Any]] = []
    for attempt in found:
        is_last = attempt.id == last.id
        attempt = last if is_last else attempt
        word = word_of(attempt, ended, now)
        asked = await in_store(questions.questions_of, attempt.id)
        next_step = todo(attempt, word, now, status if is_last else None, left=left)
        if output:
            document = _as_json(attempt, word, now) | {"todo": next_step, "questions": [*map(_question, asked)]}
            if is_last and status is not None:
                document["status"] = status.model_dump(mode="json", exclude={"raw": True, "tasks": True})
            documents.append(document)
            continue
        _output.put(f"{word.upper()}  {attempt.key}")
        _put_facts(_facts(attempt, asked, now) | {"To do": next_step})
    if output:
        _output.put_json(documents)
        return
    if status is not None:
        _put_status(status)
    if last.state is S.COMPLETED:
        _output.put(f"Its result: prefect-crew result {shlex.quote(last.key)}")


def _facts(attempt: Attempt, asked: Sequence[Question], now: float) -> dict[str, object]:
    since = _since(attempt)
    facts: dict[str, object] = {
        "Attempt": attempt.number,
        "Crew": f"{attempt.crew} at {attempt.crew_url}",
        "Version": attempt.crew_version,
        "Kickoff id": attempt.first_id,
        "Goes on as": attempt.kickoff_id if attempt.kickoff_id != attempt.first_id else None,
        "Since": f"{moment(since):%Y-%m-%d %H:%M:%S} UTC ({ago(since, now)} ago)",
        "Flow run": page_url(attempt.flow_run_id) or attempt.flow_run_id,
        "Batch": attempt.batch and f"{attempt.batch}, row {attempt.row_key}",
        "Session": attempt.session and f"{attempt.session}, turn {attempt.turn}",
        "Inputs": f"digest {attempt.inputs_digest}",
        "Cost": None if attempt.cost is None else money(attempt.cost),
        "Resolved by": attempt.resolved_by,
        "Asked to stop by": attempt.stop_asked_by,
    }
    for question in asked:
        answer = "no answer yet" if question.answer is None else f"answered by {question.answered_by}"
        sent = ", not sent yet" if question.answer is not None and question.sent_at is None else ""
        facts[f"Question {question.number}"] = f"task {question.task or '–'}, {answer}{sent}"
    return facts | {"Reason" if attempt.state is S.UNCERTAIN else "Error": attempt.error}


def _put_status(status: CrewStatus) -> None:
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


def _put_facts(facts: Mapping[str, object]) -> None:
    for name, fact in facts.items():
        if fact not in (None, ""):
            _output.put(f"  {name}: {' '.join(str(fact).split())}")


def _since(attempt: Attempt) -> float:
    """Return the time since when an attempt is in its state."""
    waiting = attempt.human_since if attempt.state is S.STARTED else None
    return waiting or attempt.ended_at or attempt.started_at or attempt.begun_at


def ago(since: float, now: float | None = None) -> str:
    """Return how long ago a time was, such as 3 min."""
    seconds = max(0.0, (time.time() if now is None else now) - since)
    units = (("d", 86400), ("h", 3600), ("min", 60))
    return next((f"{seconds / size:.0f} {unit}" for unit, size in units if seconds >= 2 * size), f"{seconds:.0f} s")


SHOWN = (
    *("crew", "crew_url", "error", "inputs_digest", "flow_run_id", "usage", "cost", "session", "turn"),
    *("crew_version", "batch", "row_key", "resolved_by", "stop_asked_by"),
)
TIMES = ("begun_at", "started_at", "ended_at", "human_since", "deadline")


def _as_json(attempt: Attempt, word: Word, now: float) -> dict[str, Any]:
    times = {name: getattr(attempt, name) for name in TIMES}
    return {
        "idempotency_key": attempt.key,
        "attempt": attempt.number,
        "state": str(word),
        "kickoff_id": attempt.first_id,
        "goes_on_as": attempt.kickoff_id,
        "todo": todo(attempt, word, now),
        "since": moment(_since(attempt)).isoformat(),
        **{name: None if at is None else moment(at).isoformat() for name, at in times.items()},
        **{name: getattr(attempt, name) for name in SHOWN},
        "page": page_url(attempt.flow_run_id),
    }


def _question(question: Question) -> dict[str, Any]:
    names = ("asked_at", "answered_at", "sent_at")
    times = {name: getattr(question, name) for name in names}
    plain = {name: None if at is None else moment(at).isoformat() for name, at in times.items()}
    return {"number": question.number, "task": question.task, "answered_by": question.answered_by, **plain}


@app.command
async def cancel(run: KeyOrId, /, *, output: Output = None, crew: CrewOfRun = CrewOfRun()) -> int:
    """Ask the crew's server to stop a run. Flow runs that wait for it then fail, and their retries start no other."""
    attempt = latest(await find_attempts(run))
    if attempt.first_id is None:
        raise CrewError(f"Run {run!r} has no kickoff id, so it cannot be stopped: its kickoff is {attempt.state}.")
    answer = await stop_run(LiveRun(await crew.need(attempt), attempt.first_id, attempt))
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
        before, by = latest(await find_attempts(key)), getpass.getuser()
        batch = before.batch
        again = "A call with this key" if batch is None else f"prefect-crew batch resume {shlex.quote(batch)}"
        if never_started:
            await resolve_never_started(key, by)
            sentence = f"{key} never started. {again} starts it."
        elif kickoff_id is not None:
            async with _status_call(before, crew, plainly=True) as look:
                attempt, state = await resolve_started(key, kickoff_id, by, look=look)
            now = f", {state} now" if state else ""
            is_now = "is" if attempt.first_id == kickoff_id else f"was {attempt.first_id} and goes on as"
            sentence = f"{key} {is_now} run {kickoff_id}{now}. {again} waits for it and gets its result."
        else:
            async with _status_call(before, crew) as look:
                attempt = await resolve_lost(key, by, look=look)
            sentence = f"run {attempt.first_id} of {attempt.key} is lost. {again} starts another."
        _output.put(f"Resolved: {sentence}")

    return write()


@asynccontextmanager
async def _status_call(attempt: Attempt, crew: CrewOfRun, *, plainly: bool = False) -> AsyncGenerator[Look | None]:
    """Yield the status call of a run's crew. If the crew is not known, write a note and yield None.

    For the run's own id, a run with an open question waits for a person, though a hosted crew's server does not know
    it. `plainly`: only what the server says counts.
    """
    loaded_crew = await crew.find(attempt)
    if loaded_crew is None:
        _output.note(f"The crew's server was not asked. {crew.missing(attempt)}")
        yield None
        return
    async with CrewSession(loaded_crew) as session:
        run = LiveRun(session, attempt.first_id or "", attempt)

        async def look(kickoff_id: str) -> CrewStatus:
            if kickoff_id == attempt.kickoff_id and not plainly:
                return await read_status(run)
            return await session.call(lambda client: client.status(kickoff_id))

        yield look


@app.command
async def prune(
    *, older_than: timedelta | None = None, dry_run: bool = False, yes: Yes = False, output: Output = None
) -> None:
    """Delete runs and batches that ended long ago. A later call with such a key then starts a new run.

    Args:
        older_than: How long ago they ended: 90d, 12h, at least 1h; left out, 30d or the setting.
        dry_run: Only count.
    """
    done = await pruning.prune(older_than=older_than, dry_run=True)
    if not dry_run:
        if done.runs or done.batches:
            question = f"Delete {_number(done)}? A later call with one of their keys starts a new run."
            _output.confirm(question, yes=yes)
        done = await pruning.prune(older_than=older_than)
    sentence = f"{_number(done)} {'would be' if dry_run else 'were'} deleted."
    _output.put(sentence, json=output and {**asdict(done), "dry_run": dry_run})


def _number(pruned: pruning.Pruned) -> str:
    return f"{pruned.runs:,} runs and {pruned.batches:,} batches"


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
    sums = await read_costs(by, since=from_, until=to)
    total, rows = sums.total, [_cells(name, spending) for name, spending in sums.groups.items()]
    if len(rows) > 1:
        rows.append(_cells("together", total))
    groups = [{"name": name, **spending.as_dict()} for name, spending in sums.groups.items()]
    as_json = output and {"by": by, "groups": groups, "total": total.as_dict(), "missing": sums.notes}
    titles = (by.capitalize(), "Runs", "Tokens", "Cost", "Without tokens")
    _output.put_rows(titles, rows, empty="No run has ended in this time.", json=as_json)
    for line in ([f"{total.unknown}."] if total.unknown else []) + sums.notes:
        _output.note(line, "yellow")


def _cells(name: str, spending: Spending) -> tuple[str, ...]:
    """Return a row of the table: how many runs, their tokens and their cost."""
    tokens = f"{spending.tokens:,}" if spending.reported else "–"
    return name, f"{spending.runs:,}", tokens, money(spending.cost), f"{spending.runs - spending.reported:,}"
