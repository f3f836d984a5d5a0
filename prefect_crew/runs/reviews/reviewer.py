"""What one wait does about people: it sees what is asked, tells whom, and has a function or the form answer."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from prefect_crew._internal.asyncio_tasks import call_in_thread, cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.events import emit
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import AnsweredError, CrewAPIError, CrewError, CrewLostError, ReviewLimitError
from prefect_crew.records.model import RecordStore, SentReview, utcnow
from prefect_crew.records.notes import forget_notes
from prefect_crew.runs.listener import Waker
from prefect_crew.runs.reviews.answer import (
    ANSWERED_ELSEWHERE,
    answer_question,
    answers_record,
    open_request,
    uncertain_error,
    with_kept_output,
)
from prefect_crew.runs.reviews.form import PREFECT_WITHIN, Form
from prefect_crew.runs.reviews.questions import (
    Question,
    QuestionState,
    Review,
    ReviewChoice,
    ReviewFunction,
    ReviewRequest,
    answer_commands,
    describe_question,
    how_to_answer,
    judged_output,
    may_be_same,
    question_digest,
    question_of,
    waiting_task,
)
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.crew import CrewSession
    from prefect_crew.runs.run import OpenRun

T = TypeVar("T")

NOBODY = "nobody, in time"  # who answered, in the record of a rejection by `on_human_timeout`
GOES_ON_WITHIN = 20.0  # seconds for the crew to go on after an answer that came as people's time ended
REFUSALS = (400, 404, 409)  # what `/resume` answers where the run does not wait, or not for this answer
REQUEST_WITHIN = 60.0
"""Seconds that the request of a Flow may take to arrive, where `/resume` has refused an answer to it."""
OUTPUT_WITHIN = 5.0  # seconds for which a question of which the status shows nothing waits for what its webhook brings
STOP_WITHIN = 5.0  # seconds for a review function to end, once nobody waits for its answer
UNSAVED = 120.0  # seconds for which whoever sends an answer may still write down what became of it


@dataclass(repr=False, eq=False)
class People:
    """What the wait for one run does about people.

    `question` is what is asked, None if nothing is; `answers` are what people have answered, as far as it was read.

    Args:
        run, session, records: The run, and what it is reached by.
        policy: How long people may take, and how often they may be asked.
        review: What answers; None leaves that to whoever comes by.
        stop: Stops the crew; True if its server took that.
        waker: Tells of the run's webhooks.
        quiet: Write no log line about each question: the batch does, about many.
    """

    run: OpenRun
    session: CrewSession
    records: RecordStore
    policy: WaitPolicy
    review: ReviewChoice | None
    stop: Callable[[], Awaitable[bool]]
    waker: Waker | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        self.question: Question | None = None
        self.answers: list[SentReview] = []
        self._form = Form(flow_run_id(), self.run, self.policy) if self.review == "form" else None
        self._function: ReviewFunction | None = None if self.review == "form" else self.review
        self._has_extra_time = self._has_answered = False
        # The review function while it thinks, and the question that it was given.
        self._thinking: asyncio.Task[Review] | None = None
        self._thinks_about: Question | None = None
        self._has_ended_pause = False  # once for each decision: where looks fail, the pauses between them stay
        # What tells one question from the next, from look to look.
        self._open: Question | None = None
        self._answered: SentReview | None = None  # the answer to what the status still shows
        record = self.run.record
        # Whether it waited for a person, also if another process has seen it, and was not seen to go on since.
        self._waited = record is not None and bool(record.human_seconds or record.human_since)
        self._looked_at = utcnow()
        self._held_until: float | None = None  # a question of which nothing to judge is known; monotonic
        self._was_refused = False  # whether the function's answer was, which may belong at a Flow's callback

    # What is asked

    async def ask(self, status: CrewStatus) -> bool:
        """Take in a status; True if a question opened or closed, and everybody was informed.

        Raises:
            ReviewLimitError: It is asked once too often.
        """
        before, self.question = self.question, await self._see(status)
        question, most = self.question, self.policy.max_rounds
        if question is None or question is before:
            return before is not question
        if before is not None and before.is_same_as(question):
            return True  # what is to be judged came to be known
        if most is not None and question.round > most:
            raise ReviewLimitError(
                kickoff_id=self.run.kickoff_id,
                task_id=question.task,
                max_rounds=most,
                crew=self.run.crew.label,
                idempotency_key=self.run.idempotency_key,
                stopped=self.policy.on_human_timeout == "stop" and await self.stop(),
            )
        self._announce(question)
        return True

    async def _see(self, status: CrewStatus) -> Question | None:
        """Return what is asked, the same object as long as it is the same question; None if nothing is.

        An answered question that the server still shows is none. The next round differs from it by another output, by
        another state in between, or by a webhook, which says how many answers came before; after a rejection also by
        time alone, since a task that was rejected may ask again in the same words.
        """
        try:
            if status.state is CrewState.WAITING:
                self._waited = True
                return await self._see_waiting(status)
            self._open = self._answered = self._held_until = None
            self._was_refused = False
            if self._waited and await self._read_answers() and status.state is not CrewState.UNKNOWN:
                self._waited = not await self._note_moved_on()
            return None
        finally:
            self._looked_at = utcnow()

    async def _see_waiting(self, status: CrewStatus) -> Question | None:
        task_id, asked, question = waiting_task(status), question_digest(status), self._open
        if question is not None and task_id is None:
            return question
        if question is not None and self._is_still(question, str(task_id), asked):
            if question.asked is None and asked is not None:
                self._open = replace(question, asked=asked, output=judged_output(status))
            elif question.asked is None and question.output == judged_output(status):
                self._open = await self._with_kept_output(question)
            return self._open
        if self._answered is None and not await self._read_answers():
            return question
        # A Flow's status may name no task, and its request does.
        request = await self._read("What run %s asks", open_request(self.run.kickoff_id, self.answers))
        has_webhook = self._has_webhook(len(self.answers))
        found = question_of(self.run, status, self.answers, request, has_webhook=has_webhook)
        if found is None:
            return None
        self._open = self._answered = None
        if found.state is QuestionState.ANSWERED:
            last, soon = self.answers[-1], self.policy.next_round_after
            if last.approve or soon is None or (utcnow() - last.at).total_seconds() < soon:
                self._answered, self._held_until = last, None
                return None
            found = replace(found, state=QuestionState.OPEN)
        if found.asked is None and request is None:
            found = await self._with_kept_output(found)
            is_hooked = self.run.record is not None and self.run.record.has_webhooks
            if (found.output is None and is_hooked) or CrewSettings().review_secret is not None:
                # Its webhook, or the request of a Flow, may be on its way.
                self._held_until = self._held_until or time.monotonic() + OUTPUT_WITHIN
                if time.monotonic() < self._held_until:
                    return None
        self._open, self._held_until = found, None
        return found

    def _is_still(self, question: Question, task_id: str, asked: str | None) -> bool:
        if question.request is not None:
            return True  # until the state changes, or somebody has answered it
        is_same = question.task_id == task_id and may_be_same(question.asked, asked)
        return is_same and not self._has_webhook(len(question.before) + 1)

    def _has_webhook(self, answers: int) -> bool:
        """Return whether a webhook tells of a question that came after so many answers."""
        record = self.run.record
        return bool(answers and record and self.waker and self.waker.has_question_after(record.attempt, answers))

    async def _note_moved_on(self) -> bool:
        """Note at the last answer that the crew was seen to go on after it; False if that is to be tried again."""
        last = self.answers[-1] if self.answers else None
        if last is None or last.moved_on:
            return True
        if last.at > self._looked_at:
            return False  # the status may have been read before that answer: it proves nothing of it
        if last.outcome == "intended" and (utcnow() - last.at).total_seconds() < UNSAVED:
            return False  # whoever sends it would write over this
        moved_on = last.model_copy(update={"moved_on": True})
        try:
            async with asyncio.timeout(PREFECT_WITHIN):  # the next look tries again
                await self.records.save_review(answers_record(self.run), len(self.answers), moved_on)
        except (*PREFECT_ERRORS, CrewError, TimeoutError) as error:
            run_logger().debug("It could not be recorded that run %s continues: %s", self.run.kickoff_id, error)
            return False
        self.answers[-1] = moved_on
        return True

    async def _with_kept_output(self, question: Question) -> Question:
        return await self._read("What run %s asks about", with_kept_output(self.run, question)) or question

    async def _read_answers(self) -> bool:
        given = await self._read("The answers to run %s", self.records.reviews(answers_record(self.run)))
        self.answers = self.answers if given is None else given
        return given is not None

    async def _read(self, what: str, reading: Awaitable[T]) -> T | None:
        try:
            async with asyncio.timeout(PREFECT_WITHIN):
                return await reading
        except (*PREFECT_ERRORS, TimeoutError) as error:
            run_logger().debug(f"{what} could not be read: %r", self.run.kickoff_id, error)
            return None

    # Who is informed

    @property
    def notes(self) -> tuple[list[str], list[str]]:
        """What the artifact says about who is waited for, and the commands that go with it."""
        run, question = self.run, self.question
        if question is None or (self._function is not None and question.state is QuestionState.OPEN):
            return [], []
        form = "" if self._form is None else "The form is on this flow run's page: Resume. "
        note = f"{form}It {describe_question(run, question, with_commands=False)}"
        if question.state is QuestionState.UNCERTAIN:
            return [note], []
        return [note], [f"prefect-crew reviews inspect {run.as_argument()}", *answer_commands(run)]

    def _announce(self, question: Question) -> None:
        """Tell automations who is waited for, and people as well unless a function or a batch sees to it."""
        run, page = self.run, None if self._form is None else self._form.page
        if run.record is not None:
            run.record.human_task = question.task
            facts: dict[str, Any] = {"answer": how_to_answer(run), "page": page, "crew_page": run.crew.page_url}
            emit("waiting", run.record, task_id=question.task, round=question.round, **facts)
        is_quiet = self.quiet or self._function is not None
        if not is_quiet or question.state is not QuestionState.OPEN:
            run_logger().warning("Crew run %s %s", run.kickoff_id, describe_question(run, question, page))

    # Who answers

    async def answer(self) -> None:
        """Have what is asked answered, where a function or a form does so here.

        Raises:
            CrewError: The answer could not be given or sent. What was filled in is kept for the next attempt.
        """
        question = self.question
        if self._function is None and self._form is None:
            return
        if question is not None and question.state is QuestionState.UNCERTAIN:
            raise uncertain_error(self.run, question.before[-1])
        if self._form is not None:
            await self._form.show(question)
            await self._answer_by_form(self._form)
        elif self._function is not None:
            await self._answer_by_function(self._function, question)

    async def _answer_by_function(self, function: ReviewFunction, question: Question | None) -> None:
        """Have the function think about the question, and send its answer once it has come: the wait goes on meanwhile.

        What it thinks about a question that is not asked any more is dropped.
        """
        about = self._thinks_about
        if about is not None and (question is None or not about.is_same_as(question)):
            await self._stop_thinking()
        if question is None:
            return
        if self._thinking is None:
            self._thinks_about, self._has_ended_pause = question, False
            self._thinking = asyncio.create_task(self._think(function, question))
            await asyncio.sleep(0)  # a function that decides at once is not waited for until the next look
        if not self._thinking.done():
            return
        review = self._thinking.result()
        await self._stop_thinking()
        name, request = _name_of(function), question.request
        try:
            await self._send(question, review, by=name)
        except CrewAPIError as error:
            # The request of a Flow, which takes its answer elsewhere, may be on its way: the first one, where the crew
            # has refused the answer, or the next one, where this was answered on the platform.
            is_refusal = error.status_code in (REFUSALS if request is None else ANSWERED_ELSEWHERE)
            may_be_flow = request is not None or CrewSettings().review_secret is not None
            if not is_refusal or not may_be_flow or self._was_refused:
                raise
            self._look_anew(name, error)
            self._held_until, self._was_refused = time.monotonic() + REQUEST_WITHIN, True

    async def _think(self, function: ReviewFunction, question: Question) -> Review:
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
        try:
            answer: Any = function(asked) if is_async else await call_in_thread(function, asked)
            review: Any = await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            # Else its error would be read as one of the crew's server, or of the Prefect API.
            reason = self.run.redact_text(f"{type(error).__name__}: {error}")
            raise CrewError(
                f"The review function {_name_of(function)} raised {reason.rstrip('.')}. Nothing was sent, and run "
                f"{question.kickoff_id} waits on: correct the function, then wait for the run again under the same key."
            ) from error
        if not isinstance(review, Review):
            raise CrewError(
                f"The review function returned a {type(review).__name__}, not a Review. Nothing was sent, and run "
                f"{question.kickoff_id} waits on: correct the function, then wait for the run again under the same key."
            )
        return review

    async def _stop_thinking(self) -> None:
        thinking, self._thinking, self._thinks_about = self._thinking, None, None
        if thinking is not None:
            await cancel_and_wait(thinking, within=STOP_WITHIN)  # a function may take no cancellation

    async def _answer_by_form(self, form: Form) -> bool:
        """Send what was filled in, if anything was; False if nothing was sent."""
        question, filled = form.question, await form.look()
        if question is None or filled is None:
            return False
        await form.take_down()
        try:
            sent = await self._send(question, filled.review(question), by=filled.name.strip() or "the form")
        except CrewAPIError as error:
            if error.status_code not in (REFUSALS if question.request is None else ANSWERED_ELSEWHERE):
                raise
            sent = False
            self._look_anew("the form", error)
        # What was filled in is kept until then: the next look, or the next process, finds it.
        if sent is not None:
            await form.forget_answer()
        return bool(sent)

    async def _send(self, question: Question, review: Review, *, by: str) -> bool | None:
        """Send an answer; False if the question has one already, None if the server does not know the run right now."""
        try:
            _, sent = await answer_question(self.run, self.session, self.records, review, by=by, question=question)
        except (AnsweredError, CrewLostError) as error:
            self._look_anew(by, error)
            return None if isinstance(error, CrewLostError) else False
        self.answers = [*question.before, sent]
        self._open, self._answered, self._was_refused = None, None if sent.moved_on else sent, False
        self._has_answered = True
        verdict = "approved" if review.approve else "rejected"
        run_logger().info(
            "Crew run %s: task %s, round %d: %s by %s.", self.run.kickoff_id, question.task, question.round, verdict, by
        )
        return True

    def _look_anew(self, by: str, error: CrewError) -> None:
        """Say that an answer was not sent, and look anew at what is asked."""
        why = self.run.redact(str(error))
        run_logger().warning("Crew run %s: the answer of %s was not sent: %s", self.run.kickoff_id, by, why)
        self._open = self._answered = None

    async def more_time(self) -> float:
        """Return how many more seconds people get, whose time is over: a rejection that nobody made begins it anew."""
        budget, kickoff_id = self.policy.human_timeout, self.run.kickoff_id
        try:
            if self._form is not None and await self._answer_by_form(self._form):
                return GOES_ON_WITHIN
        except CrewError as error:
            run_logger().warning("The form's answer to run %s was not used: %s", kickoff_id, error)
        await self._stop_thinking()
        if self.policy.on_human_timeout != "reject" or budget is None or self._has_extra_time:
            return 0.0
        question = self.question
        if question is None and self._held_until is not None:
            return OUTPUT_WITHIN  # it is about to be asked
        self._has_extra_time = True
        try:
            given = await self.records.reviews(answers_record(self.run))
            # Where another process has rejected it, the time that began anew is over as well.
            if question is not None and not any(review.by == NOBODY for review in given):
                await self._send(question, Review(approve=False, feedback=self.policy.human_message), by=NOBODY)
        except (*PREFECT_ERRORS, CrewError) as error:
            reason = self.run.redact(str(error))
            run_logger().warning("Run %s could not be rejected for lack of an answer: %s", kickoff_id, reason)
            return 0.0
        return budget

    # Pauses, and the end

    async def pause(self, pause: Callable[[float], Awaitable[bool]], seconds: float) -> bool:
        """Pause, and end it as soon as there is news, the form was filled in or the function has decided: True then."""
        if self._form is not None:
            return await self._form.pause(pause, seconds)
        if self._thinking is None or self._has_ended_pause:
            return await pause(seconds)
        pausing = asyncio.ensure_future(pause(seconds))
        try:
            await asyncio.wait({pausing, self._thinking}, return_when=asyncio.FIRST_COMPLETED)
            self._has_ended_pause = self._thinking.done()
            return self._has_ended_pause or pausing.result()
        finally:
            await cancel_and_wait(pausing)

    def next_pause(self, delay: float) -> float:
        """Return a shorter pause where what is to be judged is about to arrive."""
        return delay if self._held_until is None else min(delay, 1.0)

    def has_answered(self) -> bool:
        """Return whether an answer was sent since this was last asked."""
        sent, self._has_answered = self._has_answered, False
        return sent

    async def aclose(self, *, ended: bool) -> None:
        """The wait is over, and so is the run if it has `ended`: take back what was put up for an answer."""
        await self._stop_thinking()
        record = self.run.record
        if ended and record is not None:
            await self._read("What is kept of run %s", forget_notes(record))
        if self._form is not None:
            await self._form.aclose(ended=ended)


def _name_of(function: ReviewFunction) -> str:
    return getattr(function, "__name__", "a function")
