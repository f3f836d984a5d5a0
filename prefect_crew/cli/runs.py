"""The commands `runs` and `costs`: list, inspect, stop and resolve runs, and add up their costs."""

from __future__ import annotations

import getpass
import shlex
import time
from collections.abc import Collection, Sequence
from datetime import date
from enum import StrEnum
from functools import partial
from typing import Annotated, Any
from uuid import UUID

from cyclopts import App, Group, Parameter, validators
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from prefect_crew._internal.clock import moment
from prefect_crew._text import excerpt
from prefect_crew.artifacts.escape import progress
from prefect_crew.cli import _output
from prefect_crew.cli._errors import OTHER
from prefect_crew.cli._options import CrewOfRun, Output, Yes, find_crew, missing_crew, need_crew
from prefect_crew.cli._prefect import page_url
from prefect_crew.client._parsing import as_object, text_of
from prefect_crew.client.models import CrewStatus, StopOutcome
from prefect_crew.costs import By, read_costs
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import CrewError
from prefect_crew.prices import Spending, money
from prefect_crew.runs.database import in_store
from prefect_crew.runs.keys import normalize_key
from prefect_crew.runs.owners import process_is_gone
from prefect_crew.runs.resolve import (
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
ORIGIN = ("execution_origin", "source", "triggered_by", "last_event")
"""What a hosted crew also says in the status of a run, from crewai 1.15.22 on; `source` is where the status is from."""
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


def todo(attempt: Attempt, word: Word, now: float, status: CrewStatus | None = None) -> str:
    """Return the next step of a person for the latest attempt of a key; empty if there is none.

    `status`: the crew's own word on it.
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
        return f"{call} starts another run, up to max_attempts of the crew."
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
    """List up to 500 runs that have not ended, those that need a person first. `batch failures` lists rows of batches.

    Args:
        state: Only runs in this state; can be repeated.
        all_: Also runs that have ended.
        crew: Only runs of this crew: its name or its URL.
        session: The turns of a session of a CrewAI Flow, also those that have ended, in their order.
    """
    session = session and normalize_key(session)
    is_open = not (state or all_ or session)
    states = {each for word in state for each in STATES.get(word, {S(word)})} if state else None
    listed = await in_store(
        attempts.list_attempts,
        states=states,
        with_rows=False,
        crew=crew,
        session=session,
        is_in_flight=is_open,
        limit=MOST,
    )
    ended, now, order = await ended_flow_runs(listed), await in_store(attempts.time_now), list(Word)
    lines = [(word_of(attempt, ended, now), attempt) for attempt in listed]
    lines = [line for line in lines if not state or line[0] in state]
    columns = ["State", "Run", "Crew", "Since"]
    if session is None:
        lines.sort(key=lambda line: (order.index(line[0]), -_since(line[1])))
    else:
        lines.reverse()
        columns.append("Turn")
    cells = [
        (str(word), short_name(attempt), attempt.crew, ago(_since(attempt), now), str(attempt.turn or ""))
        for word, attempt in lines
    ]
    empty = "No run is open. To list ended runs too, add --all." if is_open else "There is no such run."
    as_json = output and [_as_json(attempt, word, now) for word, attempt in lines]
    shown = [row[: len(columns)] for row in cells]
    _output.put_rows(columns, shown, empty=f"{empty} Rows of batches: prefect-crew batch ls.", json=as_json)
    if not output and any(todo(attempt, word, now) for word, attempt in lines):
        _output.note("To see what to do about a run: prefect-crew runs inspect RUN", "dim")


@app.command
async def inspect(run: KeyOrId, /, *, output: Output = None, crew: CrewOfRun = None) -> None:
    """Show every attempt at one idempotency key, and ask the crew about a run in flight."""
    found = await find_attempts(run)
    found = await in_store(attempts.of_key, found[0].key)
    ended, now, last, status = await ended_flow_runs(found), await in_store(attempts.time_now), latest(found), None
    origin: dict[str, Any] = {}
    loaded_crew = await find_crew(last, crew)
    if last.state is S.STARTED and loaded_crew is None:
        _output.note(f"The crew's server was not asked. {missing_crew(last)}")
    elif last.state is S.STARTED and loaded_crew is not None:
        live = LiveRun(loaded_crew, str(last.first_id), last)
        try:
            async with live.session:
                answer = await read_status(live)
            status = live.redact_status(answer)
            raw = {} if live.is_blind else as_object(answer.raw)
            origin = live.redact.tree({name: raw[name] for name in ORIGIN if raw.get(name)})
        except CrewError as error:
            _output.note(str(error))
        last = live.attempt or last
    documents: list[dict[str, Any]] = []
    for attempt in found:
        its_status = status if attempt.id == last.id else None
        attempt = last if attempt.id == last.id else attempt
        word = word_of(attempt, ended, now)
        asked = await in_store(questions.questions_of, attempt.id)
        facts: dict[str, Any] = {
            "questions": [*map(_question, asked)],
            "todo": todo(attempt, word, now, its_status),
        }
        if its_status is not None:
            facts["status"] = its_status.model_dump(mode="json", exclude={"raw": True, "tasks": True}) | origin
        documents.append(_as_json(attempt, word, now) | facts)
    if output:
        _output.put_json(documents)
        return
    for document in documents:
        _output.put(f"{document.pop('state').upper()}  {document.pop('idempotency_key')}")
        _output.put_facts(document)
    if status is not None:
        _put_status(status)
        _output.put_facts({name: excerpt(text_of(fact) or "") for name, fact in origin.items()})
    if last.state is S.COMPLETED:
        _output.put(f"Its result: prefect-crew result {shlex.quote(last.key)}")


def _question(question: Question) -> str:
    answer = "no answer yet" if question.answer is None else f"answered by {question.answered_by}"
    sent = ", not sent yet" if question.answer is not None and question.sent_at is None else ""
    return f"{question.number}, task {question.task or '–'}: {answer}{sent}"


def _put_status(status: CrewStatus) -> None:
    word = "waits for a person" if status.state is CrewState.WAITING else str(status.state)
    odd = "" if status.known_state else f" (it says {status.raw_state}, which counts as running)"
    server = f"{word}{odd}{progress(status)}"
    _output.put_facts({"the crew's server": server, "task": status.current_task, "error": status.error})


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
        "goes_on_as": None if attempt.kickoff_id == attempt.first_id else attempt.kickoff_id,
        "todo": todo(attempt, word, now),
        "since": moment(_since(attempt)).isoformat(),
        **{name: None if at is None else moment(at).isoformat() for name, at in times.items()},
        **{name: getattr(attempt, name) for name in SHOWN},
        "page": page_url(attempt.flow_run_id),
    }


@app.command
async def cancel(run: KeyOrId, /, *, crew: CrewOfRun = None) -> int:
    """Ask the crew's server to stop a run. Flow runs that wait for it then fail, and their retries start no other."""
    attempt = latest(await find_attempts(run))
    if attempt.first_id is None:
        raise CrewError(f"Run {run!r} has no kickoff id, so it cannot be stopped: its kickoff is {attempt.state}.")
    answer = await stop_run(LiveRun(await need_crew(attempt, crew), attempt.first_id, attempt))
    if answer.accepted:
        _output.put(f"Run {run}: {'stopped' if answer.outcome is StopOutcome.STOPPED else 'asked to stop'}.")
        return 0
    if answer.state is not None and answer.state.ended:
        _output.put(f"Run {run} had already ended: {answer.state}.")
        return OTHER
    why = answer.message or f"its server answered: {answer.outcome}. The crew's page may offer it"
    raise CrewError(f"Run {run} was not stopped: {why}.")


@app.command
async def resolve(
    key: Annotated[str, Parameter(name="KEY", help="The idempotency key; of a row of a batch: batch/NAME/ROW.")],
    /,
    *,
    kickoff_id: Annotated[str | None, Parameter(group=OUTCOME)] = None,
    never_started: Annotated[bool, Parameter(group=OUTCOME)] = False,
    lost: Annotated[bool, Parameter(group=OUTCOME)] = False,
    yes: Yes = False,
    crew: CrewOfRun = None,
) -> None:
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

    before, by = latest(await find_attempts(key)), getpass.getuser()
    again = "A call with this key" if before.batch is None else f"prefect-crew batch resume {shlex.quote(before.batch)}"
    loaded_crew = None if never_started else await find_crew(before, crew)
    look = None if loaded_crew is None else partial(_look, loaded_crew, before, kickoff_id is not None)
    if look is None and not never_started:
        _output.note(f"The crew's server was not asked. {missing_crew(before)}")
    if never_started:
        await resolve_never_started(key, by)
        sentence = f"{key} never started. {again} starts it."
    elif kickoff_id is not None:
        attempt, state = await resolve_started(key, kickoff_id, by, look=look)
        now = f", {state} now" if state else ""
        is_now = "is" if attempt.first_id == kickoff_id else f"was {attempt.first_id} and goes on as"
        sentence = f"{key} {is_now} run {kickoff_id}{now}. {again} waits for it and gets its result."
    else:
        attempt = await resolve_lost(key, by, look=look)
        sentence = f"run {attempt.first_id} of {attempt.key} is lost. {again} starts another."
    _output.put(f"Resolved: {sentence}")


async def _look(crew: Crew, attempt: Attempt, plainly: bool, kickoff_id: str) -> CrewStatus:
    """Ask a run's crew for its status. `plainly`: only what the server says counts. Else a run with an open question
    waits for a person, though a hosted crew's server does not know it."""
    async with CrewSession(crew) as session:
        if plainly:
            return await session.call(lambda client: client.status(kickoff_id))
        return await read_status(LiveRun(session, attempt.first_id or "", attempt))


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
