"""The commands `reviews`: list the runs that wait for a person, and answer one."""

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
from prefect_crew.cli.runs import ago, short_name
from prefect_crew.client.models import Review, ReviewRequest
from prefect_crew.crew import Crew
from prefect_crew.exceptions import ConfigurationError, NotWaitingError
from prefect_crew.records.model import RecordStore, RunRecord
from prefect_crew.records.notes import kept_questions
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import answer_run, find_run_in_flight, list_open_questions, read_question
from prefect_crew.runs.reviews.questions import describe_answer
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.stop import crew_option

RunName = Annotated[str, Parameter(name="ID", help="The run: its idempotency key or its kickoff id.")]

app = App(name="reviews")


@Parameter(name="*")
@dataclass(frozen=True)
class AnswerOptions:
    """Options of both answers.

    Args:
        by: The name of the person, for the record; if left out, this machine's user.
        task: The task, if the status does not name it.
        option: The outcome, for a CrewAI Flow that offers several; `reviews inspect` shows them.
    """

    by: str | None = None
    task: str | None = None
    option: str | None = None
    round: Annotated[
        int | None, Parameter(help="Answer only if the question has this number, which `reviews inspect` shows.")
    ] = None
    output: Output = None


@asynccontextmanager
async def _open_stores() -> AsyncGenerator[tuple[list[RecordStore], list[str]]]:
    """Yield the stores that have records of waiting runs, and a sentence for each that cannot be opened."""
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
        waiting = await list_open_questions(stores, crew)
    for sentence in missed:
        _output.note(sentence)
    rows = [
        (
            short_name(record),
            record.crew,
            question.task_id,
            str(question.round),
            (record.human_since and ago(record.human_since)) or "",
        )
        for record, question in waiting
    ]
    as_json = output and [_as_json(*run) for run in waiting]
    header = ("Run", "Crew", "Task", "Question", "Since")
    _output.put_rows(header, rows, empty="No run waits for a person.", json=as_json)
    if waiting and not output:
        _output.note("To see a question and how to answer it, run: prefect-crew reviews inspect RUN", "dim")


@app.command
async def inspect(run: RunName, /, *, output: Output = None, crew: CrewOfRun = CrewOfRun()) -> None:
    """Show the question of one run, how to answer it, and the answers before."""
    async with _open_stores() as (stores, _):
        record, records = await find_run_in_flight(run, stores)
        kickoff_id = str(record.kickoff_id)
        of_flow = (await kept_questions(kickoff_id)).get(kickoff_id)
        question = await read_question(record, records, crew.find, of_flow)
    if question is None:
        raise NotWaitingError(f"Run {kickoff_id} of crew {record.crew} does not wait for a person.")
    if output:
        _output.put_json(_as_json(record, question))
    else:
        _put(record, question)


@app.command
async def approve(
    run: RunName, /, *, feedback: str = "", options: AnswerOptions = AnswerOptions(), crew: CrewOfRun = CrewOfRun()
) -> None:
    """Approve the output that a run shows: the crew continues, and so do the flow runs that wait for it.

    Args:
        feedback: A hint for the rest of the run.
    """
    await _answer(run, True, feedback, options, crew)


@app.command
async def reject(
    run: RunName, /, *, feedback: str, options: AnswerOptions = AnswerOptions(), crew: CrewOfRun = CrewOfRun()
) -> None:
    """Reject the output that a run shows: the task is done again with the feedback.

    Args:
        feedback: A text for the crew, such as "Shorter, and name the prices."
    """
    if not feedback.strip():
        raise ConfigurationError("--feedback is empty. Write what the crew has to do better.")
    await _answer(run, False, feedback, options, crew)


async def _answer(run: str, approve: bool, feedback: str, options: AnswerOptions, crew: CrewOfRun) -> None:
    async with _open_stores() as (stores, _):
        record, records = await find_run_in_flight(run, stores)
        live_run = LiveRun(await crew.need(record), str(record.kickoff_id), record, records=records)
        review = Review(approve=approve, feedback=feedback, option=options.option, by=options.by or _user_name())
        _, written = await answer_run(live_run, review, task_id=options.task, round=options.round)
    facts = {"idempotency_key": record.idempotency_key, "kickoff_id": record.kickoff_id}
    as_json = options.output and {**facts, **written.model_dump(mode="json")}
    _output.put(f"Run {record.kickoff_id}: {_sentence(written)}", json=as_json)


def _user_name() -> str:
    """Return the name of this machine's user."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "the command line"


def _put(record: RunRecord, question: ReviewRequest) -> None:
    """Write a question, the earlier answers, and how to answer."""
    _output.put(f"{record.idempotency_key}: task {question.task_id or 'not named'}, question {question.round}")
    since = f"since {record.human_since:%Y-%m-%d %H:%M:%S} UTC" if record.human_since else None
    facts = (f"crew {record.crew}", f"run {record.kickoff_id}", since, page_url(record.flow_run_id))
    _output.put("  " + " · ".join(filter(None, facts)))
    for answer in question.answers:
        _output.put(f"  {_sentence(answer)}")
    _output.put()
    if question.output is None:
        _output.put(f"  The output to judge is not shown: {question.withheld or ''}")
    else:
        _output.put_markdown(question.output)
    # If the status names no task, the answer has to name it; TASK, if the record does not have it either.
    task = "" if question.task_id else f" --task {shlex.quote(record.human_task or 'TASK')}"
    run = f"{shlex.quote(str(record.kickoff_id))}{crew_option(record)}{task}"
    option = f" (--option {' | '.join(map(shlex.quote, question.options))})" if question.options else ""
    _output.put(f"\n  Answer: prefect-crew reviews approve {run}")
    _output.put(f"      or: prefect-crew reviews reject {run} --feedback TEXT{option}")


def _sentence(answer: Review) -> str:
    verb = "approved" if answer.approve else "rejected"
    unsure = "" if answer.outcome == "sent" else ", and nobody knows whether the answer arrived"
    feedback = f": {answer.feedback}" if answer.feedback else ""
    return f"task {answer.task_id}, question {answer.round} {verb} by {describe_answer(answer)}{unsure}{feedback}"


def _as_json(record: RunRecord, question: ReviewRequest) -> dict[str, Any]:
    about = {"crew", "idempotency_key", "kickoff_id", "flow_run_id"}
    return {
        **record.model_dump(mode="json", include=about),
        **question.model_dump(mode="json", include={"round", "output", "withheld", "options", "answers"}),
        "task_id": question.task_id or None,
        "since": record.human_since and record.human_since.isoformat(),
        "page": page_url(record.flow_run_id),
    }
