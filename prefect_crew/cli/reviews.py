"""The commands `reviews`: list the runs that wait for a person, and answer one."""

from __future__ import annotations

import getpass
import shlex
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import App, Parameter

from prefect_crew._internal.clock import moment
from prefect_crew.cli import _output
from prefect_crew.cli._options import CrewOfRun, Output, find_crew, need_crew
from prefect_crew.cli._prefect import page_url
from prefect_crew.cli.runs import ago, short_name
from prefect_crew.client._callbacks import READ_BY_A_MODEL
from prefect_crew.client.models import Review, ReviewRequest
from prefect_crew.exceptions import ConfigurationError, NotWaitingError
from prefect_crew.runs.reviews.answer import answer_run, find_run_in_flight, list_open_questions, read_question
from prefect_crew.runs.reviews.questions import describe_answer
from prefect_crew.runs.run import LiveRun
from prefect_crew.runs.stop import crew_option
from prefect_crew.store.decision import Attempt

RunName = Annotated[str, Parameter(name="ID", help="The run: its idempotency key or its kickoff id.")]

app = App(name="reviews")


@Parameter(name="*")
@dataclass(frozen=True)
class AnswerOptions:
    """Options of both answers.

    Args:
        by: The name of the person, for the record; if left out, this machine's user.
        task: The task, if the status does not name it.
        option: The outcome, for a CrewAI Flow that offers several; `reviews inspect` shows them. With feedback, a model
            of the Flow reads the outcome from the text, and may read another one.
    """

    by: str | None = None
    task: str | None = None
    option: str | None = None


@app.command
async def ls(*, output: Output = None) -> None:
    """List the runs that wait for a person, the longest waiting first."""
    waiting = await list_open_questions()
    rows = [
        (
            short_name(attempt),
            attempt.crew,
            question.task_id,
            str(question.round),
            "" if attempt.human_since is None else ago(attempt.human_since),
        )
        for attempt, question in waiting
    ]
    as_json = output and [_as_json(*run) for run in waiting]
    header = ("Run", "Crew", "Task", "Question", "Since")
    _output.put_rows(header, rows, empty="No run waits for a person.", json=as_json)
    if waiting and not output:
        _output.note("To see a question and how to answer it, run: prefect-crew reviews inspect RUN", "dim")


@app.command
async def inspect(run: RunName, /, *, output: Output = None, crew: CrewOfRun = None) -> None:
    """Show the question of one run, how to answer it, and the answers before."""
    attempt = await find_run_in_flight(run)
    question = await read_question(attempt, await find_crew(attempt, crew=crew))
    if question is None:
        raise NotWaitingError(f"Run {attempt.first_id} of crew {attempt.crew} does not wait for a person.")
    if output:
        _output.put_json(_as_json(attempt, question))
    else:
        _put(attempt, question)


@app.command
async def approve(
    run: RunName, /, *, feedback: str = "", options: AnswerOptions = AnswerOptions(), crew: CrewOfRun = None
) -> None:
    """Approve the output that a run shows: the crew continues, and so do the flow runs that wait for it.

    Args:
        feedback: A hint for the rest of the run.
    """
    await _answer(run, True, feedback, options, crew)


@app.command
async def reject(
    run: RunName, /, *, feedback: str = "", options: AnswerOptions = AnswerOptions(), crew: CrewOfRun = None
) -> None:
    """Reject the output that a run shows: the task is done again with the feedback.

    Args:
        feedback: A text for the crew, such as "Shorter, and name the prices." Only a Flow takes an option without it.
    """
    if not feedback.strip() and options.option is None:
        raise ConfigurationError("--feedback is empty. Write what the crew has to change. A Flow takes --option alone.")
    await _answer(run, False, feedback, options, crew)


async def _answer(run: str, approve: bool, feedback: str, options: AnswerOptions, crew: CrewOfRun) -> None:
    attempt = await find_run_in_flight(run)
    live_run = LiveRun(await need_crew(attempt, crew), str(attempt.first_id), attempt)
    review = Review(approve=approve, feedback=feedback, option=options.option, by=options.by or getpass.getuser())
    _, written = await answer_run(live_run, review, task_id=options.task)
    _output.put(f"Run {attempt.first_id}: {_sentence(written)}")


def _put(attempt: Attempt, question: ReviewRequest) -> None:
    """Write a question, the earlier answers, and how to answer."""
    _output.put(f"{attempt.key}: task {question.task_id or 'not named'}, question {question.round}")
    since = f"since {moment(attempt.human_since):%Y-%m-%d %H:%M:%S} UTC" if attempt.human_since else None
    facts = (f"crew {attempt.crew}", f"run {attempt.first_id}", since, page_url(attempt.flow_run_id))
    _output.put("  " + " · ".join(filter(None, facts)))
    for answer in question.answers:
        _output.put(f"  {_sentence(answer)}")
    _output.put()
    if question.message:
        _output.put_markdown(f"{question.message}\n")
    if question.output is None:
        _output.put(f"  The output to judge is not shown: {question.withheld or ''}")
    else:
        _output.put_markdown(question.output)
    task = "" if question.task_id else " --task TASK"  # if the status names none, the answer has to name it
    run = f"{shlex.quote(str(attempt.first_id))}{crew_option(attempt)}{task}"
    option = f" (--option {' | '.join(map(shlex.quote, question.options))})" if question.options else ""
    _output.put(f"\n  Answer: prefect-crew reviews approve {run}{option}")
    _output.put(f"      or: prefect-crew reviews reject {run}{option or ' --feedback TEXT'}")
    if option:
        _output.put(f"  {READ_BY_A_MODEL}")


def _sentence(answer: Review) -> str:
    verb = "approved" if answer.approve else "rejected"
    unsure = "" if answer.outcome == "sent" else ", and nobody knows whether the answer arrived"
    feedback = f": {answer.feedback}" if answer.feedback else ""
    return f"task {answer.task_id}, question {answer.round} {verb} by {describe_answer(answer)}{unsure}{feedback}"


def _as_json(attempt: Attempt, question: ReviewRequest) -> dict[str, Any]:
    return {
        "crew": attempt.crew,
        "idempotency_key": attempt.key,
        "kickoff_id": attempt.first_id,
        "flow_run_id": attempt.flow_run_id,
        **question.model_dump(mode="json", include={"round", "message", "output", "withheld", "options", "answers"}),
        "task_id": question.task_id or None,
        "since": attempt.human_since and moment(attempt.human_since).isoformat(),
        "page": page_url(attempt.flow_run_id),
    }
