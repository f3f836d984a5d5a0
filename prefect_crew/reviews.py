"""People in the loop: what asks, what answers, and an answer that is sent once a round.

`/resume` is no more repeatable than `/kickoff`: a second one might answer the next question. So each answer is written
down before it is sent, beside the run's record, and what became of it after.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
from prefect.exceptions import PrefectException
from pydantic import BaseModel, ConfigDict

from prefect_crew.api.certainty import KickoffFate, kickoff_fate
from prefect_crew.api.errors import CrewError
from prefect_crew.api.models import CrewState, CrewStatus, ResumeAnswer
from prefect_crew.events import emit
from prefect_crew.logs import run_logger
from prefect_crew.receiver.targets import webhooks_for
from prefect_crew.record_store import PrefectRecords
from prefect_crew.records import SentReview, utcnow

if TYPE_CHECKING:
    from prefect_crew.api.webhooks import Webhooks
    from prefect_crew.open_runs import OpenRun
    from prefect_crew.sessions import CrewSession

__all__ = ["Review", "ReviewFunction", "ReviewRequest", "Reviewer", "send_review", "waiting_task"]

SETTLE = 10.0
"""Seconds after an accepted answer for which the same question still counts as that one, not as the next round."""


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


def waiting_task(status: CrewStatus) -> str | None:
    """Return the task that waits, by its id, else by the name that the documented status has in `current_task`."""
    return status.human_task_id or status.current_task


async def send_review(
    run: OpenRun,
    session: CrewSession,
    records: PrefectRecords,
    *,
    task_id: str,
    review: Review,
    by: str,
    webhooks: Webhooks | None = None,
) -> ResumeAnswer:
    """Send an answer once, on record before it leaves.

    Raises:
        CrewError: An earlier answer of this round is on record and nobody knows whether it arrived, or somebody else
            answers at this moment.
        CrewAPIError, CrewConnectionError: As the server answered, or did not. It is not sent again by itself.
    """
    record = run.record
    if record is None:
        return await session.client.resume(run.kickoff_id, task_id, review.feedback, review.approve, webhooks=webhooks)
    before = await records.reviews(record)
    last = before[-1] if before else None
    if last is not None and last.task_id == task_id and last.outcome in ("intended", "uncertain"):
        raise CrewError(
            f"The answer to run {run.kickoff_id}, task {task_id}, round {last.round} was sent and nobody knows whether "
            "it arrived. It is not sent again on a guess: look at the crew's page and answer there."
        )
    sent = SentReview(
        task_id=task_id,
        round=sum(earlier.task_id == task_id for earlier in before) + 1,
        approve=review.approve,
        feedback=run.redact(review.feedback)[:200] if run.show == "full" else "",
        by=by,
        at=utcnow(),
    )
    number = len(before) + 1
    if not await records.add_review(record, number, sent):
        raise CrewError(f"Somebody else answers run {run.kickoff_id} at this moment. Look at what became of it first.")
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
    emit("reviewed", record, task_id=task_id, round=sent.round, approve=review.approve, by=by)
    return answer


async def _settled(run: OpenRun, writing: Coroutine[Any, Any, None]) -> None:
    try:
        await writing
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().warning("What became of the answer to run %s is not on record: %s", run.kickoff_id, error)


@dataclass
class Reviewer:
    """Answers the questions of one run with a function, once a round."""

    run: OpenRun
    session: CrewSession
    records: PrefectRecords
    answer: ReviewFunction
    meta: Mapping[str, Any] | None = None
    _sent: dict[str, tuple[float, str | None]] = field(default_factory=dict[str, tuple[float, str | None]])

    async def saw(self, status: CrewStatus) -> None:
        """Answer if the status asks something new. An error of the function, or of the sending, ends the wait."""
        if status.state is not CrewState.WAITING:
            self._sent.clear()
            return
        task_id = waiting_task(status)
        if task_id is None:
            return
        at, output = self._sent.get(task_id, (0.0, None))
        # The server may take a moment to move on; the same question after that is the next round.
        if at and output == status.output and time.monotonic() - at < SETTLE:
            return
        record = self.run.record
        sent = [] if record is None else await self.records.reviews(record)
        earlier = sum(one.task_id == task_id for one in sent)
        request = ReviewRequest(
            kickoff_id=self.run.kickoff_id,
            task_id=task_id,
            output=_judged(status),
            round=earlier + 1,
            meta=self.meta,
        )
        given = self.answer(request)
        review = await given if inspect.isawaitable(given) else given
        if not isinstance(review, Review):  # pyright: ignore[reportUnnecessaryIsInstance]  users' functions
            raise CrewError(f"The review function returned a {type(review).__name__}, not a Review.")
        run_logger().info(
            "Crew run %s: task %s, round %d: %s.",
            self.run.kickoff_id,
            task_id,
            request.round,
            "approved" if review.approve else "rejected",
        )
        by = getattr(self.answer, "__name__", "a function")
        await send_review(self.run, self.session, self.records, task_id=task_id, review=review, by=by)
        self._sent[task_id] = (time.monotonic(), status.output)


def _judged(status: CrewStatus) -> str | None:
    """Return what a person is to judge: the last task's output, where the status shows any."""
    return next((task.output for task in reversed(status.tasks) if task.output), None)
