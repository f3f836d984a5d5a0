"""The commands `reviews`: which runs wait for a person, and answering for one."""

from __future__ import annotations

import getpass
import shlex
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import App, Parameter

from prefect_crew.batches.stored import batches_waiting_for_people
from prefect_crew.cli import _output
from prefect_crew.cli._options import CrewOfRun, Output
from prefect_crew.cli._prefect import page_url
from prefect_crew.cli.runs import ago, crew_option, short_name
from prefect_crew.crew import Crew
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.model import RecordStore, RunRecord, SentReview
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import (
    PendingReview,
    answer_run,
    find_run_in_flight,
    list_pending_reviews,
    read_pending_review,
)
from prefect_crew.runs.reviews.questions import Review
from prefect_crew.runs.run import OpenRun

RunName = Annotated[str, Parameter(name="ID", help="The run: its idempotency key or its kickoff id.")]

app = App(name="reviews")


@Parameter(name="*")
@dataclass(frozen=True)
class AnswerOptions:
    """Options of both answers.

    Args:
        by: Who answers, for the record; if left out, this machine's user.
        task: The task, if the status does not name it.
        option: The outcome, for a CrewAI Flow that offers several; `reviews inspect` shows them.
        round: Answer only if the run asks in this round, which `reviews inspect` shows.
    """

    by: str | None = None
    task: str | None = None
    option: str | None = None
    round: int | None = None
    output: Output = None


@asynccontextmanager
async def _open_stores() -> AsyncGenerator[tuple[list[RecordStore], list[str]]]:
    """Open all places where runs that wait are on record; give them, and a sentence for each that cannot be opened."""
    async with batches_waiting_for_people() as (batches, missed):
        yield [PrefectRecords(), *(batch.ledger for batch in batches)], missed


@app.command
async def ls(*, output: Output = None) -> None:
    """List the runs that wait for a person, the longest waiting first."""
    stored: dict[tuple[str, str], Crew | None] = {}

    async def crew(record: RunRecord) -> Crew | None:
        name = record.crew, record.crew_url
        if name not in stored:
            stored[name] = await CrewOfRun().find(record)
        return stored[name]

    async with _open_stores() as (stores, missed):
        found = await list_pending_reviews(stores, crew)
    for sentence in missed:
        _output.note(sentence)
    rows = [
        (
            short_name(one.record),
            one.record.crew,
            one.task_id or "",
            str(one.round),
            (one.since and ago(one.since)) or "",
        )
        for one in found
    ]
    as_json = output and [_as_json(line) for line in found]
    header = ("Run", "Crew", "Task", "Round", "Since")
    _output.put_rows(header, rows, empty="No run waits for a person.", json=as_json)
    if found and not output:
        _output.note("What to judge, and how to answer: prefect-crew reviews inspect RUN", "dim")


@app.command
async def inspect(run: RunName, /, *, output: Output = None, crew: CrewOfRun = CrewOfRun()) -> None:
    """Show what one run asks, how to answer, and what was answered before."""
    async with _open_stores() as (stores, _):
        record, records = await find_run_in_flight(run, stores)
        line = await read_pending_review(record, records, crew.find)
    if line is None:
        raise CrewError(f"Run {record.kickoff_id} of crew {record.crew} does not wait for a person.")
    if output:
        _output.put_json(_as_json(line))
    else:
        _put(line)


@app.command
async def approve(
    run: RunName, /, *, feedback: str = "", options: AnswerOptions = AnswerOptions(), crew: CrewOfRun = CrewOfRun()
) -> None:
    """Approve what a run asks: the crew goes on, and so do the flow runs that wait for it.

    Args:
        feedback: A hint for the rest of the run.
    """
    await _answer(run, True, feedback, options, crew)


@app.command
async def reject(
    run: RunName, /, *, feedback: str, options: AnswerOptions = AnswerOptions(), crew: CrewOfRun = CrewOfRun()
) -> None:
    """Reject what a run asks: the task is done again with the feedback.

    Args:
        feedback: What the crew is to do better.
    """
    if not feedback.strip():
        raise ConfigurationError("--feedback is empty: the crew needs to know what to do better.")
    await _answer(run, False, feedback, options, crew)


async def _answer(run: str, approve: bool, feedback: str, options: AnswerOptions, crew: CrewOfRun) -> None:
    async with _open_stores() as (stores, _):
        record, records = await find_run_in_flight(run, stores)
        opened = OpenRun(await crew.need(record), str(record.kickoff_id), record)
        review, by = Review(approve=approve, feedback=feedback, option=options.option), options.by or _user_name()
        _, sent = await answer_run(opened, records, review, by=by, task_id=options.task, round=options.round)
    facts = {"idempotency_key": record.idempotency_key, "kickoff_id": record.kickoff_id}
    as_json = options.output and {**facts, **sent.model_dump(mode="json")}
    _output.put(f"Run {record.kickoff_id}: {_sentence(sent)}", json=as_json)


def _user_name() -> str:
    """Return who answers, as this machine knows that person."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "the command line"


def _put(line: PendingReview) -> None:
    """Write what a run asks, the earlier answers, and how to answer."""
    record = line.record
    noted = "" if line.seen else " (from the record; the crew's server was not asked)"
    _output.put(f"{record.idempotency_key}: task {line.task_id or 'not named'}, round {line.round}{noted}")
    since = f"since {line.since:%Y-%m-%d %H:%M:%S} UTC" if line.since else None
    facts = (f"crew {record.crew}", f"run {record.kickoff_id}", since, page_url(record.flow_run_id))
    _output.put("  " + " · ".join(filter(None, facts)))
    for review in line.answers:
        _output.put(f"  {_sentence(review)}")
    _output.put()
    if line.output is None:
        _output.put(f"  What is to be judged is not shown: {line.withheld or ''}")
    else:
        _output.put_markdown(line.output)
    # Where the status names no task, the answer has to: TASK where the record does not know it either.
    task = f" --task {shlex.quote(record.human_task or 'TASK')}" if line.task_id is None else ""
    run = f"{shlex.quote(str(record.kickoff_id))}{crew_option(record)}{task}"
    option = f" (--option {' | '.join(map(shlex.quote, line.options))})" if line.options else ""
    _output.put(f"\n  Answer: prefect-crew reviews approve {run}")
    _output.put(f"      or: prefect-crew reviews reject {run} --feedback TEXT{option}")


def _sentence(review: SentReview) -> str:
    verb = "approved" if review.approve else "rejected"
    unsure = "" if review.outcome == "sent" else ", and it is not known whether that arrived"
    feedback = f": {review.feedback}" if review.feedback else ""
    at = f"{review.at:%Y-%m-%d %H:%M:%S} UTC"
    return f"task {review.task_id}, round {review.round} {verb} by {review.by}, {at}{unsure}{feedback}"


def _as_json(line: PendingReview) -> dict[str, Any]:
    about = {"crew", "idempotency_key", "kickoff_id", "flow_run_id"}
    return {
        **line.record.model_dump(mode="json", include=about),
        **{name: getattr(line, name) for name in ("task_id", "round", "output", "withheld", "seen", "options")},
        "since": line.since and line.since.isoformat(),
        "answers": [review.model_dump(mode="json") for review in line.answers],
        "page": page_url(line.record.flow_run_id),
    }
