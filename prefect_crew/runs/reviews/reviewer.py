"""What one wait does about people: who is told of a question, who answers it, and what if nobody does."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import AnsweredError, CrewError, ReviewLimitError
from prefect_crew.records.model import ReviewStore, SentReview
from prefect_crew.records.notes import forget_notes
from prefect_crew.runs.reviews.answer import answer_question, answers_record, uncertain_error
from prefect_crew.runs.reviews.form import FormReviewer
from prefect_crew.runs.reviews.questions import (
    Question,
    QuestionState,
    Review,
    ReviewChoice,
    ReviewFunction,
    ReviewRequest,
    describe_question,
    how_to_answer,
    waiting_task,
)
from prefect_crew.runs.reviews.tracker import QuestionTracker

if TYPE_CHECKING:
    from prefect_crew.crew import CrewSession
    from prefect_crew.runs.run import OpenRun

NOBODY = "nobody, in time"
"""Who answered, in the record of a rejection by `on_human_timeout`."""
GOES_ON_WITHIN = 20.0
"""Seconds for the crew to go on after an answer that came as people's time ended."""


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
        quiet: Write no log line about each question: the batch does, about many.
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
        self.questions = QuestionTracker(run, records, policy)
        self.question: Question | None = None
        self._function: ReviewFunction | None = None
        self._form: FormReviewer | None = None
        self._is_quiet = quiet or callable(review)
        self._has_extra_time = False
        if review == "form":
            self._form = FormReviewer(run, session, records, self.questions, policy)
        else:
            self._function = review

    @property
    def answers(self) -> list[SentReview]:
        """What people have answered so far, as far as it was read."""
        return self.questions.answers

    @property
    def notes(self) -> list[str]:
        """What the artifact says about who is waited for."""
        question = self.question
        if question is None or (self._function is not None and question.state is QuestionState.OPEN):
            return []
        form = "" if self._form is None else "The form is on this flow run's page: Resume. "
        return [f"{form}It {describe_question(self.run, question)}"]

    async def ask(self, status: CrewStatus) -> bool:
        """Take in a status; True if a question opened or closed, and everybody was told.

        Raises:
            TooManyRoundsError: It is asked once too often.
        """
        before, self.question = self.question, await self.questions.see(status)
        if self.question is None or self.question is before:
            return before is not self.question
        if before is not None and before.is_same_as(self.question):
            return True  # what is to be judged came to be known
        most = self.policy.max_rounds
        if most is not None and self.question.round > most:
            raise TooManyRoundsError(self.question)
        self._announce(self.question)
        return True

    def _announce(self, question: Question) -> None:
        """Tell automations who is waited for, and people as well unless a function or a batch sees to it."""
        run, page = self.run, None if self._form is None else self._form.page
        if run.record is not None:
            run.record.human_task = question.task
            emit(
                "waiting",
                run.record,
                task_id=question.task,
                round=question.round,
                answer=how_to_answer(run),
                page=page,
                crew_page=run.crew.page_url,
            )
        if not self._is_quiet or question.state is not QuestionState.OPEN:
            run_logger().warning("Crew run %s %s", run.kickoff_id, describe_question(run, question, page))

    async def answer(self) -> None:
        """Have what is asked answered, where a function or a form does so here.

        Raises:
            CrewError: The answer could not be given or sent.
        """
        question = self.question
        if self._function is None and self._form is None:
            return
        if question is not None and question.state is QuestionState.UNCERTAIN:
            raise uncertain_error(self.run, question.before[-1])
        if self._form is not None:
            await self._form.see(question)
        # What may be the question that was answered is for people alone: a function would approve what it has not seen.
        elif self._function is not None and question is not None and question.state is QuestionState.OPEN:
            await self._answer_by_function(self._function, question)

    async def _answer_by_function(self, function: ReviewFunction, question: Question) -> None:
        request = question.request
        asked = ReviewRequest(
            kickoff_id=question.kickoff_id,
            task_id=question.task_id,
            output=question.output,
            round=question.round,
            meta=self.run.meta,
            options=() if request is None else request.options,
            message=None if request is None else request.message,
        )
        # A plain function may take its time: in a thread, other runs do not wait for it.
        is_async = inspect.iscoroutinefunction(function)
        given: Any = function(asked) if is_async else await asyncio.to_thread(function, asked)
        review: Any = await given if inspect.isawaitable(given) else given
        if not isinstance(review, Review):
            raise CrewError(f"The review function returned a {type(review).__name__}, not a Review.")
        verdict = "approved" if review.approve else "rejected"
        run_logger().info(
            "Crew run %s: task %s, round %d: %s.", self.run.kickoff_id, question.task, question.round, verdict
        )
        try:
            _, sent = await answer_question(
                self.run,
                self.session,
                self.records,
                review,
                by=getattr(function, "__name__", "a function"),
                question=question,
                has_webhook=self.questions.has_webhook,
            )
        except AnsweredError as error:
            run_logger().warning("Crew run %s: the function's answer was not sent. %s", self.run.kickoff_id, error)
            self.questions.forget()
            return
        self.questions.note_answer(sent)

    async def more_time(self, status: CrewStatus | None) -> float:
        """Return how many more seconds people get, whose time is over: a rejection that nobody made begins it anew."""
        budget = self.policy.human_timeout
        if self._form is not None and await self._form.finish_answer():
            return GOES_ON_WITHIN
        if self.policy.on_human_timeout != "reject" or status is None or budget is None or self._has_extra_time:
            return 0.0
        self._has_extra_time = True
        try:
            await self._reject_late(status)
        except AnsweredError:
            return budget
        except (CrewError, httpx.HTTPError, PrefectException) as error:
            reason = self.run.redact(str(error))
            run_logger().warning("Run %s could not be rejected for lack of an answer: %s", self.run.kickoff_id, reason)
            return 0.0
        return budget

    async def _reject_late(self, status: CrewStatus) -> None:
        """Reject what a run asks, unless another process has done it: then the time that began anew is over as well."""
        task_id = waiting_task(status)
        given = await self.records.reviews(answers_record(self.run))
        if task_id is None or any(review.by == NOBODY for review in given):
            return
        await answer_question(
            self.run,
            self.session,
            self.records,
            Review(approve=False, feedback=self.policy.human_message),
            by=NOBODY,
            next_round_after=self.policy.next_round_after,
        )
        task = self.run.redact_name(task_id)
        run_logger().warning("Crew run %s: nobody answered task %s in time: rejected.", self.run.kickoff_id, task)
        self.questions.forget()

    def pausing(self, pause: Callable[[float], Awaitable[None]]) -> Callable[[float], Awaitable[None]]:
        """Return a pause that ends early when the form was filled in."""
        return pause if self._form is None else partial(self._form.pause, pause)

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
        """The wait is over, and so is the run if it has `ended`: take back what was put up for an answer."""
        if ended and self.run.record is not None and self.run.record.has_webhooks and self.answers:
            try:
                await forget_notes(self.run.record)
            except (httpx.HTTPError, PrefectException) as error:
                run_logger().debug("What run %s asked about stays: %s", self.run.kickoff_id, error)
        if self._form is not None:
            await self._form.aclose(ended=ended)
