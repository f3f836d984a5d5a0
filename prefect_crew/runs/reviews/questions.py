"""The question that a run asks, for the person or function that answers it, and the sentences about it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefect_crew._internal.clock import moment
from prefect_crew.client._callbacks import FlowQuestion
from prefect_crew.client._parsing import as_list, text_of, waiting_output
from prefect_crew.client.models import CrewStatus, Review, ReviewRequest
from prefect_crew.store.decision import Attempt
from prefect_crew.store.questions import Marks, Question

if TYPE_CHECKING:
    from prefect_crew.runs.run import LiveRun


ReviewFunction = Callable[[ReviewRequest], "Review | Awaitable[Review]"]
ReviewChoice = ReviewFunction | Literal["form"]
"""The source of answers to the questions of a run: a function, or a person in Prefect's input form."""
MOST_TEXT = 200_000
"""Characters of a text to judge. A longer one is not stored: nobody can judge a part of it."""
LEFT_AFTER = 5.0
"""Seconds after which an answer without a sender was left behind: its giver sends it at once."""


def waiting_task(status: CrewStatus) -> str | None:
    """Return the task that waits: its id, else its name in `current_task`, as the documented status has it."""
    return status.human_task_id or status.current_task


def shown_output(status: CrewStatus) -> str | None:
    """Return the output of the task that waits, None if the status does not show it."""
    task_id = waiting_task(status)
    of_task = next((task.output for task in reversed(status.tasks) if task.name == task_id and task.output), None)
    return of_task or waiting_output(status.raw)


def text_to_judge(question: FlowQuestion) -> str | None:
    """Return the text that a Flow asks about: its output, then its state, since the output may be a placeholder.

    Each value of the state has its name above it. A list has a line for each item.
    """
    parts = [question.output]
    for name, value in question.state.items():
        text = "\n".join(f"- {item}" for item in map(text_of, as_list(value)) if item) or text_of(value)
        if text and name != "id" and value not in ([], {}, question.output):  # the id is the kickoff id
            parts.append(f"**{name}**\n\n{text}")
    if sum(map(len, filter(None, parts))) > MOST_TEXT:
        parts[1:] = ["The state of the Flow is too long to be shown here. Look at the crew's page."]
    return "\n\n".join(filter(None, parts)) or None


def digest(*facts: object) -> str:
    """Return a short digest of facts that may be long or secret."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def marks_of(status: CrewStatus) -> Marks:
    """Return the marks of the question that a status shows. A message and a last step may change meanwhile."""
    facts = {"task": waiting_task(status), "output": shown_output(status)}
    return {name: digest(fact) for name, fact in facts.items() if fact is not None}


State = Literal["open", "left", "answering", "answered", "uncertain"]


def state_of(question: Question, now: float) -> State:
    """Return how far a question is: without an answer; with one that its giver left behind, or sends now; answered; or
    uncertain, since nobody knows whether the answer arrived."""
    if question.answer is None:
        return "open"
    if question.sent_at is not None:
        return "answered"
    if question.sender is None:
        return "left" if now > (question.answered_at or now) + LEFT_AFTER else "answering"
    return "uncertain" if now >= (question.send_deadline or now) else "answering"


def is_over(last: Question, attempt: Attempt, now: float, after: float | None) -> bool:
    """Return whether a run that waits asks something else than its last question, though it looks the same.

    The run went on since the answer was sent; or `after` seconds are over, since a rejected task may ask again in the
    same words.
    """
    until = last.sent_at or (None if last.sender is None else last.send_deadline)
    if until is None or until > now:
        return False
    if attempt.human_since is None or attempt.human_since > until:
        return True
    is_rejected = last.sent_at is not None and not last.answer["approve"]
    return is_rejected and after is not None and now - until >= after


@dataclass(frozen=True)
class Asked:
    """The question that a run asks, the last one of `questions`, as of `now`. `output` is the text to judge."""

    questions: Sequence[Question]
    now: float
    task: str | None = field(repr=False)
    output: str | None = field(repr=False)

    @property
    def question(self) -> Question:
        """The question."""
        return self.questions[-1]

    @property
    def state(self) -> State:
        """How far it is."""
        return state_of(self.question, self.now)

    @property
    def answers(self) -> list[Review]:
        """All answers to the questions of the run, masked as they are stored."""
        return reviews_of(self.questions, self.now)

    def request(self, kickoff_id: str, meta: Mapping[str, Any] | None = None) -> ReviewRequest:
        """Return the question for its function or its page."""
        question = self.question
        return ReviewRequest(
            kickoff_id=kickoff_id,
            task_id=self.task or "",
            output=self.output,
            round=round_of(question, self.questions),
            answers=tuple(reviews_of(self.questions[:-1], self.now)),
            meta=meta,
            options=tuple(question.options or ()),
            message=question.message,
            id=question.id,
        )


def round_of(question: Question, questions: Sequence[Question]) -> int:
    """Return the number of a question among those about its task, from 1."""
    task, mark = question.task, question.marks.get("task")
    same = [q for q in questions if (task and q.task == task) or (mark and q.marks.get("task") == mark)]
    return sum(q.number < question.number for q in same) + 1


def reviews_of(questions: Sequence[Question], now: float) -> list[Review]:
    """Return the answers on record, the first one first, masked as they are stored."""
    return [review_of(question, questions, now) for question in questions if question.answer is not None]


def review_of(question: Question, questions: Sequence[Question], now: float) -> Review:
    """Return the answer on record to one of a run's questions, masked as it is stored."""
    answer, state = question.answer, state_of(question, now)
    return Review(
        approve=answer["approve"],
        feedback=answer.get("feedback") or "",
        option=answer.get("option"),
        by=question.answered_by or "",
        at=None if question.answered_at is None else moment(question.answered_at),
        task_id=question.task or answer.get("task") or "",
        round=round_of(question, questions),
        outcome="sent" if state == "answered" else "uncertain" if state == "uncertain" else "intended",
    )


def masked_request(run: LiveRun, request: ReviewRequest) -> ReviewRequest:
    """Return a question as people may see it."""
    message = run.redact(request.message) if request.message and run.show == "full" else None
    changes: dict[str, Any] = {"message": message, "meta": None, "task_id": run.redact_name(request.task_id)}
    if request.output is None:
        changes["withheld"] = f"neither the status nor a webhook shows it. {where_to_look(run)}"
    elif run.show != "full":
        changes["withheld"] = f"{len(request.output):,} characters that this crew does not show. {where_to_look(run)}"
        changes["output"] = None
    else:
        changes["output"] = run.redact(request.output)
    return request.model_copy(update=changes)


# Sentences for people


def answer_commands(run: LiveRun) -> list[str]:
    """Return the commands that answer the question."""
    which = run.as_argument()
    return [f"prefect-crew reviews approve {which}", f"prefect-crew reviews reject {which} --feedback TEXT"]


def how_to_answer(run: LiveRun) -> str:
    """Return how to answer, for logs and events."""
    page = f": {run.crew.page_url}" if run.crew.page_url else "."
    token = "" if run.crew.block else "The crew's token goes into CREW_TOKEN. "
    return f"{', or: '.join(answer_commands(run))}. {token}The crew's own page takes answers too{page}"


def where_to_look(run: LiveRun) -> str:
    """Return the sentence that sends a person to the crew's page."""
    return f"Look at the crew's page: {run.crew.page_url}" if run.crew.page_url else "Look at the crew's page."


def describe_answer(answer: Review) -> str:
    """Return the giver and the time of an answer."""
    return answer.by if answer.at is None else f"{answer.by}, {answer.at:%Y-%m-%d %H:%M:%S} UTC"


def describe_question(run: LiveRun, request: ReviewRequest, unsure: Review | None) -> str:
    """Return the sentences about a question, which follow the run's name. `unsure`: its answer that may have
    arrived."""
    where = f"task {run.redact_name(request.task_id)}, question {request.round}."
    if unsure is not None:
        return (
            f"may wait for a person: {where} An answer was sent (by {describe_answer(unsure)}) and nobody knows "
            f"whether it arrived. It is not sent again. {where_to_look(run)} If it still waits, answer there."
        )
    is_shown = request.output is not None and run.show == "full"
    look = f"See what is to be judged: prefect-crew reviews inspect {run.as_argument()}."
    return f"waits for a person: {where} {look if is_shown else where_to_look(run)}"
