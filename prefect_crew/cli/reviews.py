"""`prefect-crew reviews`: which runs wait for a person, and answering for one."""

from __future__ import annotations

import asyncio
import getpass
import shlex
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from prefect_crew.cli import _output
from prefect_crew.cli._errors import UsageError
from prefect_crew.cli._options import JSON, CrewAccess
from prefect_crew.cli._prefect import flow_run_url, reach_prefect
from prefect_crew.cli._progress import progress
from prefect_crew.cli.runs import ago, crew_of
from prefect_crew.exceptions import CrewError

if TYPE_CHECKING:
    from prefect_crew.crew import Crew
    from prefect_crew.records.model import RunRecord, SentReview
    from prefect_crew.runs.reviews.inbox import AskedRun, AskedStore


EXCERPT = 300
"""Characters of an output that the list shows."""
ID = Parameter(name="ID", help="The run: its kickoff id, or the beginning of it, or its idempotency key.")
CREW = Parameter(help="The crew, where its block is not stored under the name on record: a block or a URL.")
BY = Parameter(help="Who answers, for the record. Left out, this machine's user.")
TASK = Parameter(help="The task, where the status does not name it.")
OPTION = Parameter(help="The outcome, where a Flow goes on with one of several; the list shows them.")
ROUND = Parameter(help="Answer only if it is at this round of questions.")

app = App(name="reviews", help="Runs that wait for a person, and answering for one.", help_epilogue="")


def _reach() -> None:
    with progress(quiet=True) as shown:
        reach_prefect(shown)


@asynccontextmanager
async def open_stores() -> AsyncGenerator[tuple[list[AskedStore], list[str]]]:
    """Open all places where runs that wait are on record; give them, and a sentence for each that cannot be opened."""
    from prefect_crew.batches.stored import asking_batches
    from prefect_crew.records.store import PrefectRecords

    async with asking_batches() as (batches, missed):
        yield [PrefectRecords(), *(batch.ledger for batch in batches)], missed


@app.default
@app.command(name="list")
def list_reviews(*, json: Annotated[bool, JSON] = False) -> None:
    """List the runs that wait for a person, with what is to be judged and how to answer."""
    _reach()
    found, missed = asyncio.run(_asked())
    for sentence in missed:
        _output.note(sentence)
    if json:
        _output.put_json([_as_json(line, excerpt=True) for line in found])
        return
    if not found:
        _output.put("No run waits for a person.")
        return
    for line in found:
        for text in _about(line):
            _output.put(text)
        _put_output(line, EXCERPT)
        named = _named(line)
        option = f" (--option {' | '.join(map(shlex.quote, line.options))})" if line.options else ""
        _output.put(f"  → prefect-crew reviews approve {named}, or reject {named} --feedback TEXT{option}")


def _named(line: AskedRun) -> str:
    """Return the arguments that name a run in a command: with the URL of its crew where that is no stored block."""
    from prefect_crew.cli.runs import crew_argument

    of_url = crew_argument(line.record) == line.record.crew_url
    crew = f" --crew {shlex.quote(line.record.crew_url)}" if of_url else ""
    return f"{shlex.quote(line.kickoff_id)}{crew}"


async def _asked() -> tuple[list[AskedRun], list[str]]:
    from prefect_crew.runs.reviews.inbox import asked_runs

    stored: dict[tuple[str, str], Crew | None] = {}

    async def crew(record: RunRecord) -> Crew | None:
        name = record.crew, record.crew_url
        if name not in stored:
            stored[name] = await _crew(record, None, CrewAccess())
        return stored[name]

    async with open_stores() as (stores, missed):
        return await asked_runs(stores, crew), missed


async def _crew(record: RunRecord, crew: str | None, access: CrewAccess) -> Crew | None:
    try:
        return await crew_of(record, crew, access)
    except CrewError:
        if crew is not None:
            raise
        return None


@app.command
def show(
    run: Annotated[str, ID],
    /,
    *,
    crew: Annotated[str | None, CREW] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008 - never changed
) -> None:
    """Show all of what one run asks, and what was answered before."""
    _reach()
    line = asyncio.run(_one(run, crew, access))
    if json:
        _output.put_json(_as_json(line, excerpt=False))
        return
    for text in _about(line):
        _output.put(text)
    for review in line.given:
        _output.put(f"  {_told(review)}")
    _output.put()
    _put_output(line, None)


async def _one(given: str, crew: str | None, access: CrewAccess) -> AskedRun:
    from prefect_crew.runs.reviews.inbox import find_asked, look_at_question, requests_by_run

    async with open_stores() as (stores, _):
        record, records = await find_asked(given, stores)
        requests = await requests_by_run()
        line = await look_at_question(record, records, lambda record: _crew(record, crew, access), requests)
    if line is None:
        raise CrewError(f"Run {record.kickoff_id} of crew {record.crew} does not wait for a person.")
    return line


@app.command
def approve(
    run: Annotated[str, ID],
    /,
    *,
    feedback: Annotated[str, Parameter(help="Something for the crew to know as it goes on.")] = "",
    by: Annotated[str | None, BY] = None,
    task: Annotated[str | None, TASK] = None,
    option: Annotated[str | None, OPTION] = None,
    round: Annotated[int | None, ROUND] = None,  # noqa: A002 - the word of the domain
    crew: Annotated[str | None, CREW] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008
) -> None:
    """Approve what a run asks: the crew goes on. Whoever waits for the run goes on by itself."""
    _answer(run, True, feedback, by=by, task=task, option=option, round=round, crew=crew, json=json, access=access)


@app.command
def reject(
    run: Annotated[str, ID],
    /,
    *,
    feedback: Annotated[str, Parameter(help="What is to be done better, for the crew.")],
    by: Annotated[str | None, BY] = None,
    task: Annotated[str | None, TASK] = None,
    option: Annotated[str | None, OPTION] = None,
    round: Annotated[int | None, ROUND] = None,  # noqa: A002
    crew: Annotated[str | None, CREW] = None,
    json: Annotated[bool, JSON] = False,
    access: CrewAccess = CrewAccess(),  # noqa: B008
) -> None:
    """Reject what a run asks: the task is done again with the feedback."""
    _answer(run, False, feedback, by=by, task=task, option=option, round=round, crew=crew, json=json, access=access)


def _answer(
    run: str,
    approve: bool,
    feedback: str,
    *,
    by: str | None,
    task: str | None,
    option: str | None,
    round: int | None,  # noqa: A002
    crew: str | None,
    json: bool,
    access: CrewAccess,
) -> None:
    if not approve and not feedback.strip():
        raise UsageError("--feedback is empty: the crew needs to know what to do better.")
    _reach()
    record, sent = asyncio.run(
        _send(
            run,
            approve,
            feedback,
            by=by or user_name(),
            task=task,
            option=option,
            round=round,
            crew=crew,
            access=access,
        )
    )
    if json:
        _output.put_json(
            {"idempotency_key": record.idempotency_key, "kickoff_id": record.kickoff_id, **sent.model_dump(mode="json")}
        )
    else:
        _output.put(f"Run {record.kickoff_id}: {_told(sent)}")


async def _send(
    given: str,
    approve: bool,
    feedback: str,
    *,
    by: str,
    task: str | None,
    option: str | None,
    round: int | None,  # noqa: A002
    crew: str | None,
    access: CrewAccess,
) -> tuple[RunRecord, SentReview]:
    from prefect_crew.runs.reviews.answer import Review
    from prefect_crew.runs.reviews.inbox import answer_run, find_asked

    async with open_stores() as (stores, _):
        record, records = await find_asked(given, stores)
        found = await _crew(record, crew, access)
        if found is None:
            raise CrewError(
                f"The crew of run {record.kickoff_id}, {record.crew}, is no stored block of that address. Give --crew: "
                "a block, or the crew's URL with CREW_TOKEN."
            )
        review = Review(approve=approve, feedback=feedback, option=option)
        return record, await answer_run(record, found, records, review, by=by, task_id=task, round=round)


def user_name() -> str:
    """Return who answers, as this machine knows that person."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "the command line"


def _about(line: AskedRun) -> list[str]:
    record = line.record
    facts = [
        f"crew {record.crew}",
        f"run {record.kickoff_id}",
        f"since {line.since:%Y-%m-%d %H:%M:%S} UTC ({ago(line.since)})" if line.since else "since when nobody noted",
    ]
    if page := flow_run_url(record.flow_run_id):
        facts.append(page)
    asked = "" if line.seen else " (as was noted; its server was not asked)"
    return [
        f"{record.idempotency_key}: task {line.task_id or 'not named'}, round {line.round}{asked}",
        "  " + " · ".join(facts),
    ]


def _put_output(line: AskedRun, most: int | None) -> None:
    if line.output is None:
        why = line.withheld or ""
        _output.put(f"  What is to be judged is not shown: {why if most is None else why.partition(chr(10))[0]}")
    elif most is None:
        _output.put_markdown(line.output)
    else:
        flat = " ".join(line.output.split())
        _output.put(f"  {flat if len(flat) <= most else flat[:most] + '…'}")


def _told(review: SentReview) -> str:
    verb = "approved" if review.approve else "rejected"
    unsure = "" if review.outcome == "sent" else ", and nobody knows whether that arrived"
    said = f": {review.feedback}" if review.feedback else ""
    when = f"{review.at:%Y-%m-%d %H:%M:%S} UTC"
    return f"task {review.task_id}, round {review.round} {verb} by {review.by}, {when}{unsure}{said}"


def _as_json(line: AskedRun, *, excerpt: bool) -> dict[str, Any]:
    record, output = line.record, line.output
    if output is not None and excerpt:
        output = output[:EXCERPT]
    return {
        "crew": record.crew,
        "idempotency_key": record.idempotency_key,
        "kickoff_id": record.kickoff_id,
        "task_id": line.task_id,
        "round": line.round,
        "since": line.since.isoformat() if line.since else None,
        "output": output,
        "withheld": line.withheld,
        "seen": line.seen,
        "options": list(line.options),
        "answers": [review.model_dump(mode="json") for review in line.given],
        "flow_run_id": record.flow_run_id,
        "page": flow_run_url(record.flow_run_id),
    }
