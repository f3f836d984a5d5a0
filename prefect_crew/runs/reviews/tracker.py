"""What a run asks from look to look: whether a person is asked something, and whether that is new."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.client._callbacks import FeedbackRequest
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import WaitPolicy
from prefect_crew.records.model import ReviewStore, SentReview, utcnow
from prefect_crew.records.notes import kept_output
from prefect_crew.runs.reviews.answer import answers_record, note_moved_on, open_request
from prefect_crew.runs.reviews.questions import (
    Question,
    QuestionState,
    judged_output,
    may_be_same,
    next_round,
    outputs_so_far,
    question_digest,
    question_state,
    request_state,
    waiting_task,
)
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.runs.listener import Waker
    from prefect_crew.runs.run import OpenRun

T = TypeVar("T")

OUTPUT_WITHIN = 5.0
"""Seconds for which a question of which the status shows nothing waits for what its webhook brings."""
SOON = 120.0
"""Seconds after an answer for which the status is read more often than the policy says, to see the crew go on."""


class QuestionTracker:
    """Tells from each status of a run whether a person is asked something, and whether that is new.

    `answers` are what people have answered so far, as far as it was read.
    """

    def __init__(self, run: OpenRun, records: ReviewStore, policy: WaitPolicy) -> None:
        self.run = run
        self.policy = policy
        self.waker: Waker | None = None
        self.answers: list[SentReview] = []
        self._records = records
        self._open: Question | None = None
        self._answered: SentReview | None = None
        """The answer to what the status still shows."""
        record = run.record
        # Also those that another process has seen.
        self._waited = record is not None and record.human_since is not None
        self._is_stale = record is not None and bool(record.human_seconds or record.human_since)
        self._looked_at = utcnow()
        self._without_output: float | None = None
        """Since when a question is held back because nothing to judge is known; monotonic."""

    async def see(self, status: CrewStatus) -> Question | None:
        """Return what is asked, the same object as long as it is the same question; None if nothing is.

        An answered question that the server still shows is none. The next round is told from it by another output, by
        another state in between, or by a webhook, which says how many answers came before. Where nothing tells it, time
        does in the end, for people.
        """
        try:
            if status.state is CrewState.WAITING:
                self._waited = True
                return await self._see_waiting(status)
            self._open, self._answered, self._without_output = None, None, None
            if self._is_stale or self._waited:
                await self._read_answers()
            if self._waited and status.state is not CrewState.UNKNOWN:
                self._waited = not await self._went_on()
            return None
        finally:
            self._looked_at = utcnow()

    async def _see_waiting(self, status: CrewStatus) -> Question | None:
        task_id, asked, question = waiting_task(status), question_digest(status), self._open
        if task_id is None:
            # A Flow's status may name none, and its request does.
            request = await self._request() if question is None and await self._read_answers() else None
            return question if request is None else self._ask(status, request.task_id, request=request)
        if question is not None and self._is_still(question, task_id, asked):
            if question.asked is None and asked is not None:
                self._open = replace(question, asked=asked, output=judged_output(status))
            elif question.asked is None and question.output == judged_output(status):
                kept = await self._kept_output(len(question.before))
                self._open = question if kept is None else replace(question, output=kept)
            return self._open
        if (self._answered is None or self._is_stale) and not await self._read_answers():
            return question
        if (request := await self._request()) is not None:
            return self._ask(status, request.task_id, request=request)
        state = question_state(
            self.answers,
            task_id,
            asked,
            now=utcnow(),
            next_round_after=self.policy.next_round_after,
            has_webhook=self.has_webhook(len(self.answers)),
        )
        self._open = self._answered = None
        if state is QuestionState.ANSWERED:
            self._answered = self.answers[-1]
            return None
        output = judged_output(status)
        if asked is None:
            output = await self._kept_output(len(self.answers)) or output
            if (output is None and self._is_hooked) or CrewSettings().review_secret is not None:
                # Its webhook, or the request of a Flow, may be on its way.
                self._without_output = self._without_output or time.monotonic()
                if time.monotonic() - self._without_output < OUTPUT_WITHIN:
                    return None
        return self._ask(status, task_id, asked=asked, output=output, state=state)

    def _ask(
        self,
        status: CrewStatus,
        task_id: str,
        *,
        asked: str | None = None,
        output: str | None = None,
        state: QuestionState = QuestionState.OPEN,
        request: FeedbackRequest | None = None,
    ) -> Question:
        self._without_output, self._answered = None, None
        self._is_stale = True  # there will be an answer
        self._open = Question(
            self.run.kickoff_id,
            task_id,
            next_round(self.answers, task_id),
            asked,
            output if request is None else request.output,
            tuple(self.answers),
            task=self.run.redact_name(task_id),
            so_far=outputs_so_far(status),
            request=request,
            state=state if request is None else request_state(self.answers, request),
        )
        return self._open

    def _is_still(self, question: Question, task_id: str, asked: str | None) -> bool:
        if question.request is not None:
            return True  # until the state changes, or somebody has answered it
        if question.task_id != task_id or not may_be_same(question.asked, asked):
            return False
        answers, is_by_time = len(question.before), question.state is QuestionState.OPEN_BY_TIME
        return not self.has_webhook(answers + 1) and not (is_by_time and self.has_webhook(answers))

    async def _went_on(self) -> bool:
        """Note that the crew has gone on after the last answer; False if that is to be tried again.

        The status may have been read before an answer that was given since the look before: it proves nothing of that.
        """
        if self._is_stale or (self.answers and self.answers[-1].at > self._looked_at):
            return False
        return await note_moved_on(self.run, self._records, self.answers)

    @property
    def _is_hooked(self) -> bool:
        return self.run.record is not None and self.run.record.has_webhooks

    async def _kept_output(self, answers: int) -> str | None:
        """Return what a webhook brought of the question after so many answers."""
        if not self._is_hooked or self.run.record is None:
            return None
        return await self._read("What run %s asks about", kept_output(self.run.record, answers))

    async def _request(self) -> FeedbackRequest | None:
        return await self._read("What run %s asks", open_request(self.run.kickoff_id, self.answers))

    async def _read_answers(self) -> bool:
        given = await self._read("The answers to run %s", self._records.reviews(answers_record(self.run)))
        self.answers, self._is_stale = self.answers if given is None else given, given is None
        return given is not None

    async def _read(self, what: str, reading: Awaitable[T]) -> T | None:
        try:
            return await reading
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug(f"{what} could not be read: %s", self.run.kickoff_id, error)
            return None

    def note_answer(self, sent: SentReview) -> None:
        """Note that what is asked has its answer."""
        self.answers = [*(self.answers if self._open is None else self._open.before), sent]
        self._open, self._answered, self._is_stale = None, None if sent.moved_on else sent, False

    def forget(self) -> None:
        """Look anew at what is asked: it was answered elsewhere."""
        self._open, self._is_stale = None, True

    def next_look(self) -> float | None:
        """Return after how many seconds a look would be welcome, since an answer has just been given; else None."""
        if self._without_output is not None:
            return 1.0
        if self._answered is None:
            return None
        since = (utcnow() - self._answered.at).total_seconds()
        return max(1.0, since) if since < SOON else None

    def has_webhook(self, answers: int) -> bool:
        """Return whether a webhook tells of a question that came after so many answers."""
        record = self.run.record
        return bool(answers and record and self.waker and self.waker.has_question_after(record.attempt, answers))
