"""The question that a run asks, for the person or function that answers it, and the sentences about it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prefect_crew._internal.clock import moment
from prefect_crew.client._parsing import waiting_output
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
WITHHELD_FOR = 60.0
"""The same for an answer whose text is not stored, so that nobody else can send it."""


def waiting_task(status: CrewStatus) -> str | None:
    """Return the task that waits: its id, else its name in `current_task`, as the documented status has it."""
    return status.human_task_id or status.current_task


def shown_output(status: CrewStatus) -> str | None:
    """Return the output of the task that waits, None if the status does not show it."""
    task_id = waiting_task(status)
    of_task = next((task.output for task in reversed(status.tasks) if task.name == task_id and task.output), None)
    return of_task or waiting_output(status.raw)


def judged_output(status: CrewStatus) -> str | None:
    """Return the text that a person judges, None if the status shows none. The status that CrewAI documents shows none.

    The text is the output of the task that waits, else the status's `last_step`. The output of an earlier task does not
    count.
    """
    return shown_output(status) or status.last_step


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
        pause = WITHHELD_FOR if "withheld" in question.answer else LEFT_AFTER
        return "left" if now > (question.answered_at or now) + pause else "answering"
    return "uncertain" if now >= (question.send_deadline or now) else "answering"


def is_over(last: Question, attempt: Attempt, now: float, after: float | None, *, if_approved: bool) -> bool:
    """Return whether a run that waits asks something else than its last question, though it looks the same.

    The run went on since the answer was sent; or `after` seconds are over, since a rejected task may ask again in the
    same words. `if_approved`: the time counts for an approved task as well.
    """
    until = last.sent_at or (None if last.sender is None else last.send_deadline)
    if until is None or until > now:
        return False
    if attempt.human_since is None or attempt.human_since > until:
        return True
    has_time = last.sent_at is not None and after is not None and now - until >= after
    return has_time and (if_approved or not last.answer["approve"])


@dataclass(frozen=True)
class Asked:
    """The question that a run asks at a status, with its state, and all questions of the run up to it. `shown` is the
    text to judge in that status."""

    question: Question
    state: State
    questions: Sequence[Question]
    task: str | None
    shown: str | None
    now: float


def round_of(question: Question, questions: Sequence[Question]) -> int:
    """Return the number of a question among those about its task, from 1."""
    task, mark = question.task, question.marks.get("task")
    same = [q for q in questions if (task and q.task == task) or (mark and q.marks.get("task") == mark)]
    return sum(q.number < question.number for q in same) + 1


def reviews_of(questions: Sequence[Question], now: float) -> list[Review]:
    """Return the answers on record, the first one first, masked as they are stored."""
    reviews: list[Review] = []
    for question in questions:
        if question.answer is None:
            continue
        state = state_of(question, now)
        reviews.append(
            Review(
                **{name: question.answer.get(name) for name in ("approve", "option")},
                feedback=question.answer.get("feedback") or "",
                by=question.answered_by or "",
                at=None if question.answered_at is None else moment(question.answered_at),
                task_id=question.task or question.answer.get("task") or "",
                round=round_of(question, questions),
                outcome={"answered": "sent", "uncertain": "uncertain"}.get(state, "intended"),  # pyright: ignore[reportArgumentType]
            )
        )
    return reviews


def request_of(kickoff_id: str, asked: Asked, meta: Mapping[str, Any] | None = None) -> ReviewRequest:
    """Return a question for its function or its page: with the text on record, else with that of the status."""
    question = asked.question
    return ReviewRequest(
        kickoff_id=kickoff_id,
        task_id=asked.task or "",
        output=question.text or asked.shown,
        round=round_of(question, asked.questions),
        answers=tuple(reviews_of(asked.questions[:-1], asked.now)),
        meta=meta,
        options=tuple(question.options or ()),
        message=question.message,
        id=question.id,
    )


def masked_request(run: LiveRun, request: ReviewRequest) -> ReviewRequest:
    """Return a question as people may see it in a terminal."""
    changes: dict[str, Any] = {"message": None, "meta": None, "task_id": run.redact_name(request.task_id)}
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
    run: LiveRun, request: ReviewRequest, unsure: Review | None, page: str | None = None, *, with_commands: bool = True
) -> str:
    """Return the message about a question, which follows the run's name. `unsure`: its answer that may have arrived;
    `page`: the page with the form."""
    where = f"task {run.redact_name(request.task_id)}, question {request.round}."
    if unsure is not None:
        return (
            f"may wait for a person: {where} An answer was sent (by {describe_answer(unsure)}) and nobody knows "
            f"whether it arrived. It is not sent again. {where_to_look(run)} If it still waits, answer there."
        )
    parts = [f"waits for a person: {where}", f"The form is on {page} (Resume)." if page else ""]
    if request.output is None or run.show != "full":
        parts.append(where_to_look(run))
    elif with_commands:
        parts.append(f"See what is to be judged: prefect-crew reviews inspect {run.as_argument()}.")
    parts.append(f"Answer: {how_to_answer(run)}" if with_commands else _token(run).rstrip())
    return " ".join(filter(None, parts))
