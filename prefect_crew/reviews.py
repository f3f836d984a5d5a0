"""People in the loop: what is asked, what is answered, and an answer that is sent once a round.

`/resume` is no more repeatable than `/kickoff`: a second one might answer the next question. So each answer is written
down before it is sent, beside the run's record, and what became of it after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import httpx
from prefect.exceptions import PrefectException
from pydantic import BaseModel, ConfigDict

from prefect_crew.api.certainty import KickoffFate, kickoff_fate
from prefect_crew.api.errors import AnsweredError, CrewError
from prefect_crew.api.models import CrewStatus, ResumeAnswer
from prefect_crew.api.parsing import waiting_output
from prefect_crew.events import emit
from prefect_crew.logs import run_logger
from prefect_crew.receiver.targets import webhooks_for
from prefect_crew.records import ReviewStore, SentReview, utcnow

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks
    from prefect_crew.open_runs import OpenRun
    from prefect_crew.sessions import CrewSession

__all__ = [
    "AnsweredError",
    "Review",
    "ReviewChoice",
    "ReviewFunction",
    "ReviewRequest",
    "asked_of",
    "is_late",
    "judged",
    "round_of",
    "send_review",
    "waiting_task",
]

SETTLE = 10.0
"""Seconds after an accepted answer for which the same question still counts as that one, not as the next round."""
FEEDBACK_KEPT = 200
"""Characters of an answer that its record keeps."""


class ReviewRequest(BaseModel):
    """What a crew asks of a person. `round` counts from 1; `output` is what is to be judged, where it is known."""

    model_config = ConfigDict(frozen=True)

    kickoff_id: str
    task_id: str
    output: str | None = None
    round: int = 1
    meta: Mapping[str, Any] | None = None


class Review(BaseModel):
    """An answer: approve the task's output, or have it done again with the feedback."""

    model_config = ConfigDict(frozen=True)

    approve: bool
    feedback: str = ""


ReviewFunction = Callable[[ReviewRequest], "Review | Awaitable[Review]"]
ReviewChoice = ReviewFunction | Literal["form"]
"""What answers: a function, or a person in Prefect's input form."""


def waiting_task(status: CrewStatus) -> str | None:
    """Return the task that waits, by its id, else by the name that the documented status has in `current_task`."""
    return status.human_task_id or status.current_task


def judged(status: CrewStatus) -> str | None:
    """Return what a person is to judge, where the status shows it: the documented one does not.

    That is the output of the task that waits, else the last step of it. An earlier task's output is none.
    """
    task_id = waiting_task(status)
    of_task = next((task.output for task in reversed(status.tasks) if task.name == task_id and task.output), None)
    return of_task or waiting_output(status.raw) or status.last_step


def asked_of(status: CrewStatus) -> str:
    """Return a digest of what a status asks a person, to tell one question from the next."""
    facts = (waiting_task(status), judged(status), status.output, status.message)
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _mark_of(task_id: str) -> str:
    return hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _is_about(review: SentReview, task_id: str) -> bool:
    """Return whether an answer on record is about a task, by the id of the crew's server or as it may be shown."""
    return task_id == review.task_id or review.mark == _mark_of(task_id)


def round_of(before: Sequence[SentReview], task_id: str) -> int:
    """Return which round of a task's questions comes after these answers, counted from 1."""
    return sum(_is_about(earlier, task_id) for earlier in before) + 1


def is_late(before: Sequence[SentReview], task_id: str, asked: str) -> bool:
    """Return whether a question is most likely the one that was answered a moment ago: the server moves on slowly."""
    last = before[-1] if before else None
    if last is None or not _is_about(last, task_id) or last.asked != asked or last.outcome != "sent":
        return False
    return (utcnow() - last.at).total_seconds() < SETTLE


async def send_review(
    run: OpenRun,
    session: CrewSession,
    records: ReviewStore,
    *,
    task_id: str,
    review: Review,
    by: str,
    round: int | None = None,  # noqa: A002 - the word of the domain
    asked: str | None = None,
    webhooks: Webhooks | None = None,
) -> ResumeAnswer:
    """Send an answer once, on record before it leaves.

    Args:
        run, session, records: The run, and what it is reached by.
        task_id: The task that waits.
        review: The answer.
        by: Who answers, for the record.
        round: The round that was looked at; where another answer of that round is on record, this one is not sent.
        asked: What `asked_of` gave for the question.
        webhooks: The kickoff's webhooks again, where they are not this package's own; left out, those that the run was
            opened with in this process.

    Raises:
        AnsweredError: An answer of this round is on record, or somebody else answers at this moment.
        CrewError: There is one of which nobody knows whether it arrived.
        CrewAPIError, CrewConnectionError: As the server answered, or did not. It is not sent again by itself.
    """
    record = run.record
    if webhooks is None and not (record is not None and record.hooked):
        webhooks = run.webhooks
    if record is None:
        return await session.client.resume(run.kickoff_id, task_id, review.feedback, review.approve, webhooks=webhooks)
    before = await records.reviews(record)
    shown = run.named(task_id)
    _refuse_second(run, before, task_id, round=round, asked=asked)
    sent = SentReview(
        task_id=shown,
        mark=None if shown == task_id else _mark_of(task_id),
        round=round_of(before, task_id),
        approve=review.approve,
        feedback=(run.told(review.feedback) or "")[:FEEDBACK_KEPT] if run.show == "full" else "",
        by=by[:100],
        at=utcnow(),
        asked=asked,
    )
    number = len(before) + 1
    if not await records.add_review(record, number, sent):
        raise AnsweredError(
            f"Somebody else answers run {run.kickoff_id} at this moment. Look at what became of it first."
        )
    hooks = webhooks
    if hooks is None and record.hooked:
        hooks = webhooks_for(run.crew, record.run_key, attempt=record.attempt, round=number)
    try:
        answer = await session.client.resume(run.kickoff_id, task_id, review.feedback, review.approve, webhooks=hooks)
    except BaseException as error:
        if kickoff_fate(error) is KickoffFate.UNCERTAIN:
            sent.outcome = "uncertain"
            await _settled(run, records.save_review(record, number, sent))
        else:
            await _settled(run, records.remove_review(record, number))
        raise
    sent.outcome = "sent"
    await _settled(run, records.save_review(record, number, sent))
    emit("reviewed", record, task_id=shown, round=sent.round, approve=review.approve, by=sent.by)
    return answer


def _refuse_second(
    run: OpenRun,
    before: Sequence[SentReview],
    task_id: str,
    *,
    round: int | None,  # noqa: A002
    asked: str | None,
) -> None:
    last = before[-1] if before else None
    if last is None or not _is_about(last, task_id):
        return
    when = f"{last.at:%Y-%m-%d %H:%M:%S} UTC, by {last.by}"
    another = asked is not None and last.asked is not None and asked != last.asked
    # A question with another output shows that the one before was answered, whoever did it.
    if last.outcome in ("intended", "uncertain") and not another:
        raise CrewError(
            f"The answer to run {run.kickoff_id}, task {last.task_id}, round {last.round} ({when}) was sent and nobody "
            "knows whether it arrived. It is not sent again on a guess: look at the crew's page and answer there."
        )
    if round is not None and round < round_of(before, task_id):
        raise AnsweredError(
            f"Round {round} of run {run.kickoff_id}, task {last.task_id}, has its answer on record: "
            f"{'approved' if last.approve else 'rejected'} ({when}). Nothing was sent."
        )


async def _settled(run: OpenRun, writing: Coroutine[Any, Any, None]) -> None:
    try:
        await writing
    except (httpx.HTTPError, PrefectException, CrewError) as error:
        run_logger().warning("What became of the answer to run %s is not on record: %s", run.kickoff_id, error)
