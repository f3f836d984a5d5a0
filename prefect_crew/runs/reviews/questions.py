"""What a run asks a person, and how one question is distinguished from the next. Nothing here waits, reads or sends."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefect_crew.client._callbacks import FeedbackRequest
from prefect_crew.client._parsing import waiting_output
from prefect_crew.client.models import CrewStatus
from prefect_crew.records.model import SentReview

if TYPE_CHECKING:
    from prefect_crew.runs.run import OpenRun


class ReviewRequest(BaseModel):
    """What a crew asks of a person.

    `round` counts from 1; `output` is what is to be judged, where it is known; `meta` is what the kickoff was given.
    `options` are the outcomes that a Flow can go on with, and `message` is its question.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    kickoff_id: str
    task_id: str
    output: str | None = Field(default=None, repr=False)
    round: int = 1
    meta: Mapping[str, Any] | None = Field(default=None, repr=False)
    options: tuple[str, ...] = ()
    message: str | None = Field(default=None, repr=False)


class Review(BaseModel):
    """An answer: approve the task's output, or have it done again with the feedback.

    `option` is one of the request's options. Left out, it is the one that says what `approve` does, if there is one.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    approve: bool
    feedback: str = Field(default="", repr=False)
    option: str | None = None


ReviewFunction = Callable[[ReviewRequest], "Review | Awaitable[Review]"]
ReviewChoice = ReviewFunction | Literal["form"]  # what answers: a function, or a person in Prefect's input form


class QuestionState(Enum):
    """What a question is, given the answers that are on record."""

    OPEN = "open"
    """It has no answer: something shows that it is another question than the one that was answered last."""
    ANSWERED = "answered"
    """It is the one that was answered, as far as anything shows."""
    UNCERTAIN = "uncertain"
    """It is the one whose answer may have arrived or not."""


@dataclass(frozen=True)
class Question:
    """What a run asks at this moment.

    `task_id` and `output`, what is to be judged, are the crew's own: they go to the crew and to whoever answers. `task`
    is the task as it may be shown. `round` counts the task's questions from 1; `asked` is the digest of what the status
    shows to be judged, None where it shows nothing; `before` are the earlier answers. `request` is what a Flow asks,
    which is answered at its callback.
    """

    kickoff_id: str
    task_id: str = field(repr=False)
    round: int
    asked: str | None
    output: str | None = field(default=None, repr=False)
    before: tuple[SentReview, ...] = field(default=(), repr=False)
    task: str = ""
    request: FeedbackRequest | None = field(default=None, repr=False)
    state: QuestionState = QuestionState.OPEN

    def is_same_as(self, other: Question) -> bool:
        """Return whether this is the same question, of which the other may know more.

        An answer that was taken back leaves its number to another one: so the answers before count, not how many.
        """
        mine, theirs = (
            (one.task_id, [(answer.mark, answer.at) for answer in one.before], one.request and one.request.id)
            for one in (self, other)
        )
        return mine == theirs and may_be_same(self.asked, other.asked)


def waiting_task(status: CrewStatus) -> str | None:
    """Return the task that waits, by its id, else by the name that the documented status has in `current_task`."""
    return status.human_task_id or status.current_task


def _shown_output(status: CrewStatus) -> str | None:
    task_id = waiting_task(status)
    of_task = next((task.output for task in reversed(status.tasks) if task.name == task_id and task.output), None)
    return of_task or waiting_output(status.raw)


def judged_output(status: CrewStatus) -> str | None:
    """Return what a person is to judge, where the status shows it: the documented one does not.

    That is the output of the task that waits, else the last step of it. An earlier task's output is none.
    """
    return _shown_output(status) or status.last_step


def digest(*facts: object) -> str:
    """Return a short digest of what may be long or secret."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def question_digest(status: CrewStatus) -> str | None:
    """Return a digest of the task that waits and of its output, None where the status does not show that.

    A message and a last step change while one and the same question is asked, so neither is part of it.
    """
    output = _shown_output(status)
    return None if output is None else digest(waiting_task(status), output)


def may_be_same(one: str | None, other: str | None) -> bool:
    """Return whether two digests may be of the same question: they are equal, or one of them is not known."""
    return one is None or other is None or one == other


def next_round(before: Sequence[SentReview], task_id: str) -> int:
    """Return which round of a task's questions comes after these answers, counted from 1."""
    return sum(earlier.mark == digest(task_id) for earlier in before) + 1


def question_state(
    before: Sequence[SentReview], task: str | None, asked: str | None, *, has_webhook: bool = False
) -> QuestionState:
    """Return the state of the question that a status shows, given the answers on record before it was read.

    Args:
        before: The answers, in order.
        task: The task that the status names, if any.
        asked: The status's `question_digest`.
        has_webhook: Whether a webhook tells of a question that came after all these answers.
    """
    last = before[-1] if before else None
    if last is None or last.moved_on or has_webhook:
        return QuestionState.OPEN
    about = last.shown_mark or last.mark  # an answer that does not say its task may be to this one
    is_other_task = task is not None and about is not None and digest(task) != about
    if is_other_task or not may_be_same(asked, last.asked):
        return QuestionState.OPEN
    return QuestionState.ANSWERED if last.outcome == "sent" else QuestionState.UNCERTAIN


def question_of(
    run: OpenRun,
    status: CrewStatus,
    before: Sequence[SentReview],
    request: FeedbackRequest | None = None,
    *,
    task_id: str | None = None,
    has_webhook: bool = False,
) -> Question | None:
    """Return the question that a status, or the request of a Flow, asks after these answers; None without a task.

    `task_id` is the task where the status does not name it. `request` has no answer that was sent.
    """
    named, asked = waiting_task(status), question_digest(status)
    if request is not None:
        task_id, asked, output = request.task_id, None, request.output
        is_answered = any(one.request == request.id for one in before)
        state = QuestionState.UNCERTAIN if is_answered else QuestionState.OPEN
    else:
        task_id, output = task_id or named, judged_output(status)
        state = question_state(before, named, asked, has_webhook=has_webhook)
    if task_id is None:
        return None
    return Question(
        run.kickoff_id,
        task_id,
        next_round(before, task_id),
        asked,
        output,
        tuple(before),
        task=run.redact_name(task_id),
        request=request,
        state=state,
    )


# Sentences for people


def answer_commands(run: OpenRun) -> list[str]:
    """Return the commands that answer."""
    which = run.as_argument()
    return [f"prefect-crew reviews approve {which}", f"prefect-crew reviews reject {which} --feedback TEXT"]


def how_to_answer(run: OpenRun) -> str:
    """Return how to answer, for logs and events."""
    page = f": {run.crew.page_url}" if run.crew.page_url else "."
    return f"{', or: '.join(answer_commands(run))}. {_token(run)}The crew's own page takes answers too{page}"


def _token(run: OpenRun) -> str:
    return "" if run.crew.block else "The crew's token goes into CREW_TOKEN. "


def where_to_look(run: OpenRun) -> str:
    """Return where a person finds what is not known here."""
    return f"Look at the crew's page: {run.crew.page_url}" if run.crew.page_url else "Look at the crew's page."


def describe_answer(answer: SentReview) -> str:
    """Return who gave an answer, and when."""
    return f"{answer.by}, {answer.at:%Y-%m-%d %H:%M:%S} UTC"


def describe_question(run: OpenRun, question: Question, page: str | None = None, *, with_commands: bool = True) -> str:
    """Return what people are told about a question, as it goes on after the run's name. `page` has the form."""
    where = f"task {question.task}, round {question.round}."
    if question.state is QuestionState.UNCERTAIN:
        return (
            f"may wait for a person: {where} An answer was sent (by {describe_answer(question.before[-1])}) and nobody "
            f"knows whether it arrived. It is not sent again. {where_to_look(run)} If it still waits, answer there."
        )
    parts = [f"waits for a person: {where}", f"The form is on {page} (Resume)." if page else ""]
    if question.output is None or run.show != "full":
        parts.append(where_to_look(run))
    elif with_commands:
        parts.append(f"See what is to be judged: prefect-crew reviews inspect {run.as_argument()}.")
    parts.append(f"Answer: {how_to_answer(run)}" if with_commands else _token(run).rstrip())
    return " ".join(filter(None, parts))
