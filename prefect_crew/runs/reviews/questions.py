"""What a run asks a person: the next question told from the one before, and everybody told of it."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.client._callbacks import FeedbackRequest
from prefect_crew.client.models import CrewStatus
from prefect_crew.records.model import ReviewStore, SentReview, utcnow
from prefect_crew.records.notes import kept_output
from prefect_crew.runs.reviews.answer import (
    Question,
    Standing,
    asked_of,
    judged,
    kept_beside,
    note_moved_on,
    open_request,
    outputs_so_far,
    round_of,
    same_output,
    standing_of,
    standing_of_request,
    waiting_task,
)
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.crew import WaitPolicy
    from prefect_crew.runs.listener import Waker
    from prefect_crew.runs.run import OpenRun


OUTPUT_WITHIN = 5.0
"""Seconds for which a question of which the status shows nothing waits for what its webhook brings."""
SOON = 120.0
"""Seconds after an answer for which the status is read more often than the policy says, to see the crew go on."""


def how_to_answer(run: OpenRun) -> str:
    """Return the commands that answer, for logs, artifacts and events."""
    which = named_run(run)
    token = "" if run.crew.block else "The crew's token goes into CREW_TOKEN. "
    return (
        f"prefect-crew reviews approve {which}, or: prefect-crew reviews reject {which} --feedback TEXT. {token}"
        f"The crew's own page takes answers too{f': {run.crew.page_url}' if run.crew.page_url else '.'}"
    )


def named_run(run: OpenRun) -> str:
    """Return the arguments that name a run on the command line: with its crew where that is no stored block."""
    crew = "" if run.crew.block else f" --crew {shlex.quote(run.crew.url)}"
    return f"{shlex.quote(run.kickoff_id)}{crew}"


def where_to_look(run: OpenRun) -> str:
    """Return where a person finds what is not known here."""
    return f"Look at the crew's page: {run.crew.page_url}" if run.crew.page_url else "Look at the crew's page."


class Questions:
    """Tells from each status of a run whether a person is asked something, and whether that is new.

    `given` is what people have answered so far, as far as it was looked up.
    """

    def __init__(self, run: OpenRun, records: ReviewStore, policy: WaitPolicy) -> None:
        self.run = run
        self.policy = policy
        self.waker: Waker | None = None
        self.given: list[SentReview] = []
        self._records = records
        self._open: Question | None = None
        self._answered: SentReview | None = None
        """The answer to what the status still shows."""
        record = run.record
        # Also those that another process has seen.
        self._waited = record is not None and record.human_since is not None
        self._stale = record is not None and bool(record.human_seconds or record.human_since)
        self._looked_at = utcnow()
        self._without_output: float | None = None
        """Since when a question is held back because nothing to judge is known; monotonic."""

    async def saw(self, status: CrewStatus) -> Question | None:
        """Return what is asked, the same object as long as it is the same question; None if nothing is.

        An answered question that the server still shows is none. The next round is told from it by another output, by
        another state in between, or by a webhook, which says how many answers came before. Where nothing tells it, time
        does in the end, for people.
        """
        try:
            return await self._saw(status)
        finally:
            self._looked_at = utcnow()

    async def _saw(self, status: CrewStatus) -> Question | None:
        if status.state is not CrewState.WAITING:
            self._open, self._answered, self._without_output = None, None, None
            if self._stale or self._waited:
                await self._look_up()
            if self._waited and status.state is not CrewState.UNKNOWN:
                self._waited = not await self._went_on()
            return None
        self._waited = True
        task_id, asked = waiting_task(status), asked_of(status)
        open_ = self._open
        if task_id is None:
            # A Flow's status may name none, and its request does.
            request = await self._request() if open_ is None and await self._look_up() else None
            return open_ if request is None else self._of_request(request, status)
        if open_ is not None and self._still(open_, task_id, asked):
            if open_.asked is None and asked is not None:
                open_ = self._open = replace(open_, asked=asked, output=judged(status))
            elif open_.asked is None and open_.output == judged(status) and (kept := await self._kept()):
                open_ = self._open = replace(open_, output=kept)
            return open_
        if (self._answered is None or self._stale) and not await self._look_up():
            return open_
        if (request := await self._request()) is not None:
            return self._of_request(request, status)
        standing = standing_of(
            self.given,
            task_id,
            asked,
            now=utcnow(),
            next_round_after=self.policy.next_round_after,
            told=self.told(len(self.given)),
        )
        self._open, self._answered = None, None
        if standing is Standing.ANSWERED:
            self._answered = self.given[-1]
            return None
        output, wait = await self._to_judge(status, asked)
        if wait:
            return None
        self._without_output = None
        self._stale = True  # there will be an answer
        self._open = Question(
            self.run.kickoff_id,
            task_id,
            round_of(self.given, task_id),
            asked,
            output,
            tuple(self.given),
            by_time=standing is Standing.BY_TIME,
            uncertain=standing is Standing.UNCERTAIN,
            task=self.run.named(task_id),
            so_far=outputs_so_far(status),
        )
        return self._open

    async def _to_judge(self, status: CrewStatus, asked: str | None) -> tuple[str | None, bool]:
        """Return what is to be judged, and whether the question waits a moment for a webhook that may bring it."""
        output = judged(status)
        if asked is not None:
            return output, False
        if self._hooked:
            output = await self._kept() or output
        expects = (self._hooked and output is None) or CrewSettings().review_secret is not None
        return output, expects and self._held_back()

    async def _request(self) -> FeedbackRequest | None:
        try:
            return await open_request(self.run.kickoff_id, self.given)
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("What run %s asks could not be read: %s", self.run.kickoff_id, error)
            return None

    def _of_request(self, request: FeedbackRequest, status: CrewStatus) -> Question:
        self._answered, self._without_output, self._stale = None, None, True
        self._open = Question(
            self.run.kickoff_id,
            request.task_id,
            round_of(self.given, request.task_id),
            None,
            request.output,
            tuple(self.given),
            uncertain=standing_of_request(self.given, request) is Standing.UNCERTAIN,
            task=self.run.named(request.task_id),
            so_far=outputs_so_far(status),
            request=request,
        )
        return self._open

    def _still(self, open_: Question, task_id: str, asked: str | None) -> bool:
        if open_.request is not None:
            return True  # until the state changes, or somebody has answered it
        if open_.task_id != task_id or not same_output(open_.asked, asked):
            return False
        answers = len(open_.before)
        return not self.told(answers + 1) and not (open_.by_time and self.told(answers))

    async def _went_on(self) -> bool:
        """Note that the crew has gone on after the last answer; False if that is to be tried again.

        The status may have been read before an answer that was given since the look before: it proves nothing of that.
        """
        if self._stale or (self.given and self.given[-1].at > self._looked_at):
            return False
        return await note_moved_on(self.run, self._records, self.given)

    @property
    def _hooked(self) -> bool:
        return self.run.record is not None and self.run.record.hooked

    async def _kept(self) -> str | None:
        """Return what a webhook brought of what is asked now."""
        if not self._hooked or self.run.record is None:
            return None
        answers = len(self.given if self._open is None else self._open.before)
        try:
            return await kept_output(self.run.record, answers)
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("What run %s asks about could not be read: %s", self.run.kickoff_id, error)
            return None

    def _held_back(self) -> bool:
        """Return whether a question waits a moment longer for its webhook, which may be on its way."""
        now = time.monotonic()
        if self._without_output is None:
            self._without_output = now
        return now - self._without_output < OUTPUT_WITHIN

    def answered(self, sent: SentReview) -> None:
        """Note that what is asked has its answer."""
        self.given = [*(self._open.before if self._open is not None else self.given), sent]
        self._open, self._answered, self._stale = None, None if sent.moved_on else sent, False

    def forget(self) -> None:
        """Look anew at what is asked: it was answered elsewhere."""
        self._open, self._stale = None, True

    def soon(self) -> float | None:
        """Return after how many seconds a look would be welcome, since an answer has just been given; else None."""
        if self._without_output is not None:
            return 1.0
        if self._answered is None:
            return None
        since = (utcnow() - self._answered.at).total_seconds()
        return max(1.0, since) if since < SOON else None

    def told(self, answers: int) -> bool:
        """Return whether a webhook has told of a question that came after so many answers."""
        record = self.run.record
        if not answers or record is None or self.waker is None:
            return False
        return self.waker.asked_after(record.attempt, answers)

    def tell(self, question: Question, *, quiet: bool, page: str | None = None) -> None:
        """Tell automations who is waited for, and people as well unless that is to be `quiet`.

        `page` is where a form waits for the answer.
        """
        run = self.run
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
        if quiet and not (question.by_time or question.uncertain):
            return
        run_logger().warning("Crew run %s %s", run.kickoff_id, self.about(question, page))

    def about(self, question: Question, page: str | None = None) -> str:
        """Return what people are told about a question, as it goes on after the run's name."""
        run = self.run
        if question.uncertain:
            return (
                f"may wait for a person: task {question.task}, round {question.round}. An answer was sent "
                f"({question.before[-1].by}, {question.before[-1].at:%Y-%m-%d %H:%M:%S} UTC) and nobody knows whether "
                f"it arrived; it is not sent again. {where_to_look(run)} If the run still waits, answer there."
            )
        shown = question.output is not None and run.show == "full"
        look = f"See what is to be judged: prefect-crew reviews show {named_run(run)}." if shown else where_to_look(run)
        again = (
            "Nothing but time tells this question from the one that was answered last, so that no function is asked. "
            if question.by_time
            else ""
        )
        form = f"The form is on {page} (Resume). " if page else ""
        return (
            f"waits for a person: task {question.task}, round {question.round}. {again}{form}{look} "
            f"Answer: {how_to_answer(run)}"
        )

    async def _look_up(self) -> bool:
        try:
            self.given = await self._records.reviews(kept_beside(self.run))
        except (httpx.HTTPError, PrefectException) as error:
            run_logger().debug("The answers to run %s could not be read: %s", self.run.kickoff_id, error)
            return False
        self._stale = False
        return True
