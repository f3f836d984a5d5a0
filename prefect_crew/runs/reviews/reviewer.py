"""Who answers in one wait: a function, a form, or nobody in time."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.interrupts import cancel_and_wait
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import AnsweredError, CrewError, CrewTimeoutError, ReviewLimitError
from prefect_crew.records.model import ReviewStore, SentReview
from prefect_crew.records.notes import forget_notes
from prefect_crew.runs.reviews.answer import (
    Question,
    Review,
    ReviewChoice,
    ReviewFunction,
    ReviewRequest,
    answer_question,
    kept_beside,
    uncertain_error,
    waiting_task,
)
from prefect_crew.runs.reviews.form import FormReviewer
from prefect_crew.runs.reviews.questions import Questions

if TYPE_CHECKING:
    from prefect_crew.crew import CrewSession
    from prefect_crew.runs.listener import Waker
    from prefect_crew.runs.run import OpenRun


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

    async def resolve(self) -> None:
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

    async def resolve(self) -> None:
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


class TooManyRoundsError(Exception):
    """A task asks more often than the policy allows. Ends the wait; never seen outside of this package."""

    def __init__(self, question: Question) -> None:
        super().__init__(question.task)
        self.question = question


def stops_late(policy: WaitPolicy, phase: str) -> bool:
    """Return whether a crew is stopped when its budget of this phase is over, "human" among them."""
    if phase == "human" and policy.on_human_timeout is not None:
        return policy.on_human_timeout == "stop"
    return policy.on_timeout == "stop"


class People:
    """What the wait for one run does about people.

    Args:
        run, session, records: The run, and what it is reached by.
        policy: How long people may take, and how often they may be asked.
        review: What answers; None leaves that to whoever comes by.
        quiet: Write no log line about each question: somebody else does, about many.
    """

    def __init__(
        self,
        run: OpenRun,
        session: CrewSession,
        records: ReviewStore,
        policy: WaitPolicy,
        review: ReviewChoice | None,
        *,
        quiet: bool = False,
    ) -> None:
        self.run = run
        self.session = session
        self.records = records
        self.policy = policy
        self.questions = Questions(run, records, policy)
        self.question: Question | None = None
        self.reviewer: Reviewer | None = None
        self._function = callable(review)
        self._quiet = quiet
        self._page: str | None = None
        self._extra_given = False
        if review == "form":
            form = FormReviewer(run, session, records, self.questions, policy)
            self.reviewer, self._page = form, form.page
        elif review is not None:
            self.reviewer = FunctionReviewer(run, session, records, self.questions, review)

    @property
    def given(self) -> list[SentReview]:
        """What people have answered so far, as far as it was looked up."""
        return self.questions.given

    @property
    def notes(self) -> list[str]:
        """What the artifact says about who is waited for."""
        question = self.question
        if question is None or (self._function and not (question.by_time or question.uncertain)):
            return []
        form = "The form is on this flow run's page: Resume. " if self._page is not None else ""
        return [f"{form}It {self.questions.about(question)}"]

    async def ask(self, status: CrewStatus) -> bool:
        """Take in a status; True if a person is asked something new, of which everybody was told, or is done with it.

        Raises:
            TooManyRoundsError: It is asked once too often.
        """
        if self.reviewer is not None:
            await self.reviewer.resolve()
        before, self.question = self.question, await self.questions.saw(status)
        if self.question is None or self.question is before:
            return before is not self.question
        if before is not None and before.same_as(self.question):
            return True  # what is to be judged came to be known
        most = self.policy.max_rounds
        if most is not None and self.question.round > most:
            raise TooManyRoundsError(self.question)
        self.questions.tell(self.question, quiet=self._function or self._quiet, page=self._page)
        return True

    async def answer(self) -> None:
        """Have what is asked answered, where there is somebody to do so here.

        Raises:
            CrewError: The answer could not be given or sent.
        """
        if self.reviewer is None:
            return
        if self.question is not None and self.question.uncertain:
            raise uncertain_error(self.run, self.question.before[-1])
        # What may be the question that was answered is for people alone: a function would approve what it has not seen.
        await self.reviewer.saw(None if self._function and self.question and self.question.by_time else self.question)

    async def more_time(self, status: CrewStatus | None) -> float:
        """Return how many more seconds people get, whose time is over: a rejection that nobody made begins it anew."""
        budget = self.policy.human_timeout
        if self.reviewer is not None and await self.reviewer.last_call():
            return 20.0  # for the crew to go on
        if self.policy.on_human_timeout != "reject" or status is None or budget is None or self._extra_given:
            return 0.0
        self._extra_given = True
        try:
            if not await reject_late(
                self.run,
                self.session,
                self.records,
                status,
                self.policy.human_message,
                next_round_after=self.policy.next_round_after,
            ):
                # Another process has done it, and the time that began anew is over as well, or this one begins with it.
                return budget
        except AnsweredError:
            return budget
        except (CrewError, httpx.HTTPError, PrefectException) as error:
            run_logger().warning(
                "Run %s could not be rejected for lack of an answer: %s",
                self.run.kickoff_id,
                self.run.redact(str(error)),
            )
            return 0.0
        self.questions.forget()
        return budget

    def stretching(self, waker: Waker | None) -> Callable[[float], float]:
        """Return what makes pauses longer while webhooks are trusted, and shorter while an answer is on its way."""
        self.questions.waker = waker

        def stretch(delay: float) -> float:
            longer = delay if waker is None else waker.stretch(delay)
            soon = self.questions.soon()
            return longer if soon is None else min(longer, soon)

        return stretch

    def pausing(self, pause: Callable[[float], Awaitable[None]]) -> Callable[[float], Awaitable[None]]:
        """Return a pause that ends early when an answer has been given here."""

        async def sleep(seconds: float) -> None:
            answering = None if self.reviewer is None else self.reviewer.answering
            if answering is None or answering.done():
                await pause(seconds)
                return
            sleeping = asyncio.ensure_future(pause(seconds))
            try:
                await asyncio.wait({sleeping, answering}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not sleeping.done():
                    await cancel_and_wait(sleeping)
            if not sleeping.cancelled():
                sleeping.result()

        return sleep

    def stops_late(self, error: CrewTimeoutError) -> bool:
        """Return whether the crew is stopped now that a budget is over."""
        return stops_late(self.policy, error.phase)

    def too_often(self, question: Question, *, stopped: bool) -> ReviewLimitError:
        """Return the error that tells of one round too many."""
        return ReviewLimitError(
            kickoff_id=self.run.kickoff_id,
            task_id=question.task,
            max_rounds=question.round - 1,
            crew=self.run.crew.label,
            idempotency_key=self.run.idempotency_key,
            stopped=stopped,
        )

    async def aclose(self, *, ended: bool) -> None:
        """The wait is over, and so is the run if it has `ended`."""
        if ended and self.run.record is not None and self.run.record.hooked and self.questions.given:
            try:
                await forget_notes(self.run.record)
            except (httpx.HTTPError, PrefectException) as error:
                run_logger().debug("What run %s asked about stays: %s", self.run.kickoff_id, error)
        if self.reviewer is not None:
            await self.reviewer.aclose(ended=ended)
