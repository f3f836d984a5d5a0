"""The question that a run asks, and the difference between one question and the next. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal

from prefect_crew.client._parsing import waiting_output
from prefect_crew.client.models import CrewStatus, Review, ReviewRequest

if TYPE_CHECKING:
    from prefect_crew.runs.run import LiveRun


ReviewFunction = Callable[[ReviewRequest], "Review | Awaitable[Review]"]
ReviewChoice = ReviewFunction | Literal["form"]
"""The source of answers to the questions of a run: a function, or a person in Prefect's input form."""
QuestionState = Literal["open", "answered", "uncertain"]


def waiting_task(status: CrewStatus) -> str | None:
    """Return the task that waits: its id, else its name in `current_task`, as the documented status has it."""
    return status.human_task_id or status.current_task


def _shown_output(status: CrewStatus) -> str | None:
    task_id = waiting_task(status)
    of_task = next((task.output for task in reversed(status.tasks) if task.name == task_id and task.output), None)
    return of_task or waiting_output(status.raw)


def judged_output(status: CrewStatus) -> str | None:
    """Return the text that a person judges, None if the status shows none. The status that CrewAI documents shows none.

    The text is the output of the task that waits, else the status's `last_step`. The output of an earlier task does not
    count.
    """
    return _shown_output(status) or status.last_step


def digest(*facts: object) -> str:
    """Return a short digest of facts that may be long or secret."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def output_digest(status: CrewStatus) -> str | None:
    """Return a digest of the task that waits and of its output, None if the status shows no output.

    A message and a last step may change while the crew asks the same question, so neither is part of the digest.
    """
    output = _shown_output(status)
    return None if output is None else digest(waiting_task(status), output)


def may_be_same(digest: str | None, other: str | None) -> bool:
    """Return whether two digests may be of the same question: they are equal, or one of them is None."""
    return digest is None or other is None or digest == other


def place_of(question: ReviewRequest) -> tuple[object, ...]:
    """Return the facts that distinguish a question from all others of its run, except for the output.

    After an answer was taken back, another answer gets its number. So these are the answers, not their number.
    """
    answers = [(answer.task_digest, answer.at and answer.at.timestamp()) for answer in question.answers]
    return question.task_id, question.id, answers


def is_same_question(question: ReviewRequest, other: ReviewRequest) -> bool:
    """Return whether two reads show the same question; one of them may show more of it."""
    return place_of(question) == place_of(other) and may_be_same(question.output_digest, other.output_digest)


def next_round(answers: Sequence[Review], task_id: str) -> int:
    """Return the number of a task's next question after these answers, counted from 1."""
    return sum(answer.task_digest == digest(task_id) for answer in answers) + 1


def question_state(
    answers: Sequence[Review], task: str | None, shown: str | None, *, has_webhook: bool = False
) -> QuestionState:
    """Return the state of the question that a status shows: whether the answers on record contain its answer.

    Args:
        answers: The answers on record before the status was read, in order.
        task: The task that the status names, if any.
        shown: The status's `output_digest`.
        has_webhook: Whether a webhook reported a question that came after all these answers.
    """
    last = answers[-1] if answers else None
    if last is None or last.moved_on or has_webhook:
        return "open"
    about = last.shown_task_digest or last.task_digest  # an answer without a task may be to this question
    is_other_task = task is not None and about is not None and digest(task) != about
    if is_other_task or not may_be_same(shown, last.output_digest):
        return "open"
    return "answered" if last.outcome == "sent" else "uncertain"


def question_of(
    run: LiveRun,
    status: CrewStatus,
    answers: Sequence[Review],
    of_flow: ReviewRequest | None = None,
    *,
    task_id: str | None = None,
    has_webhook: bool = False,
) -> ReviewRequest | None:
    """Return the question that a run asks after these answers; None if the task is unknown.

    Args:
        run, status, answers: The run, its status, and the answers on record before the status was read.
        of_flow: The question of a Flow that a webhook brought, if it has no answer of this package.
        task_id: The task, if the status does not name it.
        has_webhook: See `question_state`.
    """
    task, output = waiting_task(status), output_digest(status)
    task_id = task_id or task if of_flow is None else of_flow.task_id
    if task_id is None:
        return None
    meta = None if run.request is None else run.request.options.meta
    about = {"round": next_round(answers, task_id), "answers": tuple(answers), "meta": meta}
    if of_flow is not None:
        is_answered = any(answer.question_id == of_flow.id for answer in answers)
        return of_flow.model_copy(update={**about, "state": "uncertain" if is_answered else "open"})
    question = ReviewRequest(
        kickoff_id=run.kickoff_id,
        task_id=task_id,
        output=judged_output(status),
        output_digest=output,
        state=question_state(answers, task, output, has_webhook=has_webhook),
    )
    return question.model_copy(update=about)


# Sentences for people


def answer_commands(run: LiveRun) -> list[str]:
    """Return the commands that answer the question."""
    which = run.as_argument()
    return [f"prefect-crew reviews approve {which}", f"prefect-crew reviews reject {which} --feedback TEXT"]


def how_to_answer(run: LiveRun) -> str:
    """Return how to answer, for logs and events."""
    page = f": {run.crew.page_url}" if run.crew.page_url else "."
    return f"{', or: '.join(answer_commands(run))}. {_token(run)}The crew's own page takes answers too{page}"


def _token(run: LiveRun) -> str:
    return "" if run.crew.block else "The crew's token goes into CREW_TOKEN. "


def where_to_look(run: LiveRun) -> str:
    """Return the sentence that sends a person to the crew's page."""
    return f"Look at the crew's page: {run.crew.page_url}" if run.crew.page_url else "Look at the crew's page."


def describe_answer(answer: Review) -> str:
    """Return the giver and the time of an answer."""
    return answer.by if answer.at is None else f"{answer.by}, {answer.at:%Y-%m-%d %H:%M:%S} UTC"


def describe_question(
    run: LiveRun, question: ReviewRequest, page: str | None = None, *, with_commands: bool = True
) -> str:
    """Return the message about a question, which follows the run's name. `page` is the page with the form."""
    where = f"task {run.redact_name(question.task_id)}, question {question.round}."
    if question.state == "uncertain":
        return (
            f"may wait for a person: {where} An answer was sent (by {describe_answer(question.answers[-1])}) and "
            f"nobody knows whether it arrived. It is not sent again. {where_to_look(run)} If it still waits, answer "
            "there."
        )
    parts = [f"waits for a person: {where}", f"The form is on {page} (Resume)." if page else ""]
    if question.output is None or run.show != "full":
        parts.append(where_to_look(run))
    elif with_commands:
        parts.append(f"See what is to be judged: prefect-crew reviews inspect {run.as_argument()}.")
    parts.append(f"Answer: {how_to_answer(run)}" if with_commands else _token(run).rstrip())
    return " ".join(filter(None, parts))
