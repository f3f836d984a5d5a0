"""What answers while a run is waited for: a function, or, when people's time is over, nobody."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from prefect_crew.api.errors import CrewError
from prefect_crew.api.models import CrewStatus
from prefect_crew.logs import run_logger
from prefect_crew.records import ReviewStore
from prefect_crew.reviewing.questions import Questions
from prefect_crew.reviews import (
    AnsweredError,
    Question,
    Review,
    ReviewFunction,
    ReviewRequest,
    answer_question,
    kept_beside,
    waiting_task,
)

if TYPE_CHECKING:
    from prefect_crew.crew import CrewSession
    from prefect_crew.open_runs import OpenRun

__all__ = ["NOBODY", "FunctionReviewer", "Reviewer", "reject_late"]

NOBODY = "nobody, in time"
"""Who answered, in the record of a rejection by `on_human_timeout`."""


class Reviewer(Protocol):
    """Answers the questions of one run."""

    async def saw(self, question: Question | None) -> None:
        """Take what is asked now, None where nothing is. An error of the answering or the sending ends the wait."""
        ...

    @property
    def answering(self) -> asyncio.Task[None] | None:
        """What is under way until an answer has been given, if anything is."""
        ...

    async def settle(self) -> None:
        """Wait until an answer that is being sent is on record as sent."""
        ...

    async def last_call(self) -> bool:
        """Have an answer sent that was given before people's time was over; True if there was one."""
        ...

    async def aclose(self, *, ended: bool) -> None:
        """The wait is over, and so is the run if it has `ended`: take back what was put up for an answer."""
        ...


async def _called(answer: ReviewFunction, request: ReviewRequest) -> Any:
    """Return what a function answers; a plain one in a thread: it may take its time, and other runs do not wait."""
    given = answer(request) if inspect.iscoroutinefunction(answer) else await asyncio.to_thread(answer, request)
    return await given if inspect.isawaitable(given) else given


@dataclass
class FunctionReviewer:
    """Answers with a function, once a round."""

    run: OpenRun
    session: CrewSession
    records: ReviewStore
    questions: Questions
    answer: ReviewFunction

    async def saw(self, question: Question | None) -> None:
        """Answer at once."""
        if question is None:
            return
        request = ReviewRequest(
            kickoff_id=question.kickoff_id,
            task_id=question.task_id,
            output=question.output,
            round=question.round,
            meta=self.run.meta,
            options=() if question.request is None else question.request.options,
            message=None if question.request is None else question.request.message,
        )
        review = await _called(self.answer, request)
        if not isinstance(review, Review):  # pyright: ignore[reportUnnecessaryIsInstance]  users' functions
            raise CrewError(f"The review function returned a {type(review).__name__}, not a Review.")
        run_logger().info(
            "Crew run %s: task %s, round %d: %s.",
            self.run.kickoff_id,
            question.task,
            question.round,
            "approved" if review.approve else "rejected",
        )
        try:
            _, sent = await answer_question(
                self.run,
                self.session,
                self.records,
                review,
                by=getattr(self.answer, "__name__", "a function"),
                seen=question,
                told=self.questions.told,
            )
        except AnsweredError as error:
            run_logger().warning("Crew run %s: the function's answer was not sent. %s", self.run.kickoff_id, error)
            self.questions.forget()
            return
        self.questions.answered(sent)

    @property
    def answering(self) -> asyncio.Task[None] | None:
        """A function answers at once."""
        return None

    async def settle(self) -> None:
        """It was waited for when it was given."""

    async def last_call(self) -> bool:
        """It answered at once."""
        return False

    async def aclose(self, *, ended: bool) -> None:
        """Nothing was put up."""


async def reject_late(
    run: OpenRun,
    session: CrewSession,
    records: ReviewStore,
    status: CrewStatus,
    message: str,
    *,
    next_round_after: float | None,
) -> bool:
    """Reject what a run asks, since people's time for it is over; False if that was done before, or cannot be.

    Raises:
        CrewError: The rejection could not be sent, or somebody answers at this moment.
    """
    task_id = waiting_task(status)
    given = await records.reviews(kept_beside(run))
    if task_id is None or any(review.by == NOBODY for review in given):
        return False
    await answer_question(
        run,
        session,
        records,
        Review(approve=False, feedback=message),
        by=NOBODY,
        next_round_after=next_round_after,
    )
    run_logger().warning(
        "Crew run %s: nobody answered task %s in time, so it was rejected.", run.kickoff_id, run.named(task_id)
    )
    return True
