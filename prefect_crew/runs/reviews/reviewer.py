"""The questions of a run while one call waits for the run: find the open question, inform people, get an answer."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from prefect_crew._internal.asyncio_tasks import call_in_thread, cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, is_away, naming_prefect_errors
from prefect_crew.artifacts.events import LINK, emit
from prefect_crew.client.models import CrewStatus, Review, ReviewRequest
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import (
    AlreadyAnsweredError,
    CrewAPIError,
    CrewError,
    CrewLostError,
    PrefectAwayError,
    ReviewLimitError,
)
from prefect_crew.records.model import utcnow
from prefect_crew.records.notes import forget_notes
from prefect_crew.runs.listener import Waker
from prefect_crew.runs.reviews.answer import (
    answer_question,
    is_refusal,
    open_question_of_flow,
    uncertain_error,
    with_kept_output,
)
from prefect_crew.runs.reviews.form import PREFECT_WITHIN, Form, masked_options
from prefect_crew.runs.reviews.links import notify_people
from prefect_crew.runs.reviews.questions import (
    ReviewChoice,
    ReviewFunction,
    answer_commands,
    describe_question,
    how_to_answer,
    is_same_question,
    judged_output,
    may_be_same,
    output_digest,
    question_of,
    waiting_task,
)
from prefect_crew.runs.run import answers_record
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState

if TYPE_CHECKING:
    from prefect_crew.runs.run import LiveRun

T = TypeVar("T")

NOBODY = "nobody, in time"  # the giver of a rejection by `on_human_timeout`, in the stored answer
GOES_ON_WITHIN = 20.0  # seconds for the crew to continue after an answer that came as people's time ended
REQUEST_WITHIN = 60.0
"""Seconds within which the question of a Flow may arrive after `/resume` has refused an answer to it."""
OUTPUT_WITHIN = 5.0  # seconds for which a question without an output waits for the output that its webhook brings
STOP_WITHIN = 5.0  # seconds for a review function to end after its answer is no longer needed
SEND_WITHIN = 5.0
"""Seconds for which a poll, or the end of the wait, waits for an answer that is being sent. After that the polls go on:
if the Prefect API does not answer, the request that saves the outcome of the answer is repeated for minutes."""
UNSAVED = 120.0  # seconds within which the sender of an answer may still store its outcome


@dataclass(repr=False, eq=False)
class People:
    """The questions of one run, and their answers, in one wait.

    `question` is the open question or None; `answers` are the answers on record at the last read.

    Args:
        run: The run, in an open session.
        policy: The time for people, and the most questions about one task.
        review: The source of answers. None: a person answers on the command line or the crew's page.
        stop: Stops the crew; True if its server accepted that.
        waker: Reports the run's webhooks.
        quiet: Write no log line about each question: a batch writes one line about many.
    """

    run: LiveRun
    policy: WaitPolicy
    review: ReviewChoice | None
    stop: Callable[[], Awaitable[bool]]
    waker: Waker | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        self.question: ReviewRequest | None = None
        self.answers: list[Review] = []
        self._form = Form(flow_run_id(), self.run, self.policy) if self.review == "form" else None
        self._function: ReviewFunction | None = None if self.review == "form" else self.review
        self._has_extra_time = self._has_answered = False
        # The task of the review function, until its answer is sent, and the question that it got.
        self._thinking: asyncio.Task[Review] | None = None
        self._thinks_about: ReviewRequest | None = None
        self._sending: asyncio.Task[bool] | None = None
        self._notifying: asyncio.Task[None] | None = None
        self._has_links = False  # whether a link went out: then answers come from elsewhere
        self._nonce = uuid4().hex  # of the next attempt to answer
        self._has_warned = False
        self._has_ended_pause = False  # a decision ends one pause only: if status calls fail, later pauses are full
        # The open question at the last status.
        self._open: ReviewRequest | None = None
        self._answered: Review | None = None  # the answer to the question that the status still shows
        record = self.run.record
        # Whether the run waited for a person, also before this wait, and no later status showed that it goes on.
        self._waited = record is not None and bool(record.human_seconds or record.human_since)
        self._looked_at = utcnow()
        self._held_until: float | None = None  # a question without an output waits until then; monotonic
        self._was_refused = False  # whether `/resume` refused the function's answer: a Flow's callback may take it

    # The open question

    async def see_status(self, status: CrewStatus) -> bool:
        """Handle a status. Return True if a question opened or closed, so that the caller updates the artifact.

        Raises:
            ReviewLimitError: The task has asked more often than `max_rounds` allows.
        """
        before, self.question = self.question, await self._open_question(status)
        question, most = self.question, self.policy.max_rounds
        if question is before:
            return False
        if before is not None and question is not None and is_same_question(before, question):
            return True  # only its output is new
        if self._notifying is not None:
            self._notifying.cancel()  # its link may still be in the queue
        if question is None:
            return True
        if most is not None and question.round > most:
            raise ReviewLimitError(
                kickoff_id=self.run.kickoff_id,
                task_id=self.run.redact_name(question.task_id),
                max_rounds=most,
                crew=self.run.crew.label,
                idempotency_key=self.run.idempotency_key,
                stopped=self.policy.on_human_timeout == "stop" and await self.stop(),
            )
        self._announce(question)
        return True

    async def _open_question(self, status: CrewStatus) -> ReviewRequest | None:
        """Return the open question or None. Returns the identical object while the question has not changed.

        An answered question that the server still shows is not open. The next question differs from it by another
        output, by another state in between, or by a webhook, which has the number of answers before it. After a
        rejection also time alone counts, since a rejected task may ask again in the same words.
        """
        try:
            if status.state is CrewState.WAITING:
                self._waited = True
                return await self._question_of_waiting(status)
            self._open = self._answered = self._held_until = None
            self._was_refused = False
            if self._waited and await self._read_answers() and status.state is not CrewState.UNKNOWN:
                self._waited = not await self._note_moved_on()
            return None
        finally:
            self._looked_at = utcnow()

    async def _question_of_waiting(self, status: CrewStatus) -> ReviewRequest | None:
        task_id, output, question = waiting_task(status), output_digest(status), self._open
        is_replaced = question is not None and self._has_links and await self._is_replaced(question)
        if question is not None and (self._sending is not None or (task_id is None and not is_replaced)):
            return question
        if question is not None and not is_replaced and self._is_still(question, str(task_id), output):
            if question.output_digest is None and output is not None:
                update = {"output_digest": output, "output": judged_output(status)}
                self._open = question.model_copy(update=update)
            elif question.output_digest is None and question.output == judged_output(status):
                self._open = await self._with_kept_output(question)
            return self._open
        # The receiver notes some seconds after an answer that the crew continues.
        if (self._answered is None or self._has_links) and not await self._read_answers(is_needed=True):
            return question
        # A Flow's status may lack the task; its question has it.
        of_flow = await self._read("The question of run %s", open_question_of_flow(self.run.kickoff_id, self.answers))
        has_webhook = self._has_webhook(len(self.answers))
        question = question_of(self.run, status, self.answers, of_flow, has_webhook=has_webhook)
        if question is None or question == self._open:
            return self._open
        self._open = self._answered = None
        if question.state == "answered":
            last = self.answers[-1]
            if last.approve or not last.is_older_than(self.policy.next_round_after, utcnow()):
                self._answered, self._held_until = last, None
                return None
            question = question.model_copy(update={"state": "open"})
        if question.output_digest is None and question.id is None:
            question = await self._with_kept_output(question)
        is_hooked = self.run.record is not None and self.run.record.has_webhooks
        is_late = question.output is None and is_hooked
        if question.id is None and (is_late or CrewSettings().review_secret is not None):
            # The webhook with the output, or the question of a Flow, may be on its way.
            self._held_until = self._held_until or time.monotonic() + OUTPUT_WITHIN
            if time.monotonic() < self._held_until:
                return None
        self._open, self._held_until = question, None
        return question

    async def _is_replaced(self, question: ReviewRequest) -> bool:
        """Return whether somebody else has answered the open question, or a webhook has brought another question of a
        Flow.
        """
        if not await self._read_answers():
            return False
        has_answer = len(self.answers) > len(question.answers) and self.answers[-1].outcome == "sent"
        of_flow = await self._read("The question of run %s", open_question_of_flow(self.run.kickoff_id, self.answers))
        return has_answer or (of_flow is not None and of_flow.id != question.id)

    def _is_still(self, question: ReviewRequest, task_id: str, output: str | None) -> bool:
        if question.id is not None:
            # Until the state changes, or somebody answers it. Another process may have been about to note its answer.
            return question.state == "open"
        is_same = question.task_id == task_id and may_be_same(question.output_digest, output)
        return is_same and not self._has_webhook(len(question.answers) + 1)

    def _has_webhook(self, answers: int) -> bool:
        """Return whether a webhook reported a question that came after this number of answers."""
        record = self.run.record
        return bool(answers and record and self.waker and self.waker.has_question_after(record.attempt, answers))

    async def _note_moved_on(self) -> bool:
        """Note in a person's last answer that the crew continued. Return False if the next status has to try again."""
        last = self.answers[-1] if self.answers else None
        if last is None or last.moved_on:
            return True
        if not last.is_older_than(0, self._looked_at):
            return False  # the status may be older than that answer
        if last.outcome == "intended" and not last.is_older_than(UNSAVED, utcnow()):
            return False  # the sender of the answer would overwrite this
        moved_on = last.model_copy(update={"moved_on": True})
        try:
            async with asyncio.timeout(PREFECT_WITHIN):  # the next look tries again
                await self.run.records.save_review(answers_record(self.run), len(self.answers), moved_on)
        except (*PREFECT_ERRORS, CrewError, TimeoutError) as error:
            run_logger().debug("It could not be recorded that run %s continues: %s", self.run.kickoff_id, error)
            return False
        self.answers[-1] = moved_on
        return True

    async def _with_kept_output(self, question: ReviewRequest) -> ReviewRequest:
        return await self._read("The output to judge of run %s", with_kept_output(self.run, question)) or question

    async def _read_answers(self, *, is_needed: bool = False) -> bool:
        """Read the answers on record. Return False if that fails. `is_needed`: no answer can be sent without them."""
        reading = self.run.records.reviews(answers_record(self.run))
        is_needed = is_needed and (self._function is not None or self._form is not None)
        answers = await self._read("The answers to run %s", reading, is_needed=is_needed)
        self.answers = self.answers if answers is None else answers
        return answers is not None

    async def _read(self, subject: str, reading: Awaitable[T], *, is_needed: bool = False) -> T | None:
        """Return the result of `reading`, None after some seconds or an error. `is_needed`: raise if the Prefect API
        refuses."""
        try:
            async with asyncio.timeout(PREFECT_WITHIN):
                return await reading
        except (*PREFECT_ERRORS, TimeoutError) as error:
            if is_needed and not isinstance(error, TimeoutError) and not is_away(error):
                with naming_prefect_errors(
                    f"Nothing was sent: run {self.run.kickoff_id} of crew {self.run.crew.label} waits for a person, "
                    "and the earlier answers cannot be read. Once that works, wait for the run again under its key."
                ):
                    raise
            run_logger().debug(f"{subject} could not be read: %r", self.run.kickoff_id, error)
            return None

    # Messages to people

    @property
    def notes(self) -> tuple[list[str], list[str]]:
        """The notes of the artifact about the open question, and the commands that answer it."""
        run, question = self.run, self.question
        if question is None or (self._function is not None and question.state == "open"):
            return [], []
        form = "" if self._form is None else "The form is on this flow run's page: Resume. "
        note = f"{form}It {describe_question(run, question, with_commands=False)}"
        if question.state == "uncertain":
            return [note], []
        return [note], [f"prefect-crew reviews inspect {run.as_argument()}", *answer_commands(run)]

    def _announce(self, question: ReviewRequest) -> None:
        """Emit an event about a question, and send a link to people. Log the question, unless a function answers it or
        a batch logs it."""
        run, page = self.run, None if self._form is None else self._form.page
        if run.record is not None:
            run.record.human_task = run.redact_name(question.task_id)
            is_for_people = self._function is None and question.state == "open"
            has_link = is_for_people and CrewSettings().answer_url is not None
            self._emit_waiting(question, has_link=has_link)
            if has_link:
                self._has_links = True
                self._notifying = asyncio.create_task(self._notify(question))
        is_quiet = self.quiet or self._function is not None
        if not is_quiet or question.state != "open":
            run_logger().warning("Crew run %s %s", run.kickoff_id, describe_question(run, question, page))

    def _emit_waiting(self, question: ReviewRequest, *, has_link: bool) -> None:
        run = self.run
        if (record := run.record) is not None:
            page = None if self._form is None else self._form.page
            facts: dict[str, Any] = {"answer": how_to_answer(run), "page": page, "crew_page": run.crew.page_url}
            labels = {LINK: "yes" if has_link else "no"}
            emit("waiting", record, labels=labels, task_id=record.human_task, round=question.round, **facts)

    async def _notify(self, question: ReviewRequest) -> None:
        """Send the link for a question, concurrently with the polls. If that fails, the automation sends its alert."""
        run = self.run
        try:
            await notify_people(run, question, self.policy)
        except CrewError as error:
            log = run_logger().debug if self.quiet else run_logger().warning
            reason, how = str(error).rstrip("."), how_to_answer(run)
            log("Crew run %s: the link to its question was not sent: %s. Answer: %s", run.kickoff_id, reason, how)
            if self.question is not None and is_same_question(self.question, question):
                self._emit_waiting(question, has_link=False)

    # Answers

    async def answer(self) -> None:
        """Send the answer of the function or the form to the open question, if there is one.

        Raises:
            CrewError: The function failed, or the answer could not be sent. A submitted form stays for the next
                attempt.
        """
        question = self.question
        if self._function is None and self._form is None:
            return
        try:
            if self._sending is not None:
                await self._is_sent(within=0.0)
                return
            if question is not None and question.state == "uncertain":
                raise uncertain_error(self.run, question.answers[-1])
            if self._form is not None:
                await self._form.show(question)
            review = await self._answer_to(question)
            if question is not None and review is not None:
                await self._send_beside(question, review)
        except PrefectAwayError as error:  # the next status tries again
            log = run_logger().debug if self._has_warned else run_logger().warning
            log("Crew run %s: %s The answer is tried again while the polls go on.", self.run.kickoff_id, error)
            self._has_warned = True

    async def _answer_to(self, question: ReviewRequest | None) -> Review | None:
        """Return the answer to a question if the form or the function has given one by now, else None.

        The polls of the run go on while the function works. Stop a function whose question is not open any more.
        """
        if self._form is not None:
            submitted = None if question is None else await self._form.look()
            if question is None or submitted is None:
                return None
            return submitted.review(question, masked_options(self.run, question))
        about = self._thinks_about
        if about is not None and (question is None or not is_same_question(about, question)):
            await self._stop_thinking()
        if question is None or self._function is None:
            return None
        if self._thinking is None:
            self._thinks_about, self._has_ended_pause = question, False
            self._thinking = asyncio.create_task(self._think(self._function, question))
            await asyncio.sleep(0)  # so that the answer of a fast function is sent now, and not after the next status
        return self._thinking.result() if self._thinking.done() else None

    async def _think(self, function: ReviewFunction, question: ReviewRequest) -> Review:
        # A sync function may take long: it runs in a thread, so that other runs do not wait for it.
        is_async = inspect.iscoroutinefunction(function)
        name = getattr(function, "__name__", "a function")
        next_step = (
            f"Nothing was sent, and run {question.kickoff_id} waits on: correct the function, then wait for the run "
            "again under the same key."
        )
        try:
            answer: Any = function(question) if is_async else await call_in_thread(function, question)
            review: Any = await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            # Otherwise a caller could take its error for an error of the crew's server or of the Prefect API.
            reason = self.run.redact_text(f"{type(error).__name__}: {error}").rstrip(".")
            raise CrewError(f"The review function {name} raised {reason}. {next_step}") from error
        if not isinstance(review, Review):
            raise CrewError(f"The review function {name} returned a {type(review).__name__}, not a Review. {next_step}")
        return review.model_copy(update={"by": review.by or name})

    async def _stop_thinking(self) -> None:
        thinking, self._thinking, self._thinks_about = self._thinking, None, None
        if thinking is not None:
            await cancel_and_wait(thinking, within=STOP_WITHIN)  # a function may ignore its cancellation

    async def _send_beside(self, question: ReviewRequest, review: Review) -> bool | None:
        """Send an answer concurrently with the polls. Return the result of `_send`, None if `_send` still runs."""
        self._sending = asyncio.create_task(self._send(question, review))
        return await self._is_sent(within=SEND_WITHIN)

    async def _is_sent(self, *, within: float) -> bool | None:
        sending = self._sending
        if sending is None or not (await asyncio.wait({sending}, timeout=within))[0]:
            return None
        self._sending = None
        return sending.result()

    async def _send(self, question: ReviewRequest, review: Review) -> bool:
        """Send an answer to a question. Return False if the question takes no answer now: the next status shows why.

        Raises:
            PrefectAwayError: The Prefect API does not answer. Nothing was sent; the answer stays for the next attempt.
        """
        if self._form is not None:
            await self._form.take_down()
        try:
            _, answer = await answer_question(self.run, review, question=question, nonce=self._nonce, looks=1)
        except (AlreadyAnsweredError, CrewLostError, CrewAPIError) as error:
            if isinstance(error, CrewAPIError) and not self._is_asked_anew(question, error):
                raise
            why = self.run.redact(str(error))
            run_logger().warning("Crew run %s: the answer of %s was not sent: %s", self.run.kickoff_id, review.by, why)
            self._open, self._answered, self._nonce = None, None, uuid4().hex
            if not isinstance(error, CrewLostError):  # the server may know the run again at the next status call
                await self._drop_answer()
            return False
        await self._drop_answer()
        self.answers = [*question.answers, answer]
        self._open, self._answered, self._was_refused = None, None if answer.moved_on else answer, False
        self._has_answered, self._nonce, self._has_warned = True, uuid4().hex, False
        verdict = "approved" if review.approve else "rejected"
        run_logger().info(
            "Crew run %s: task %s, question %d: %s by %s.",
            *(self.run.kickoff_id, answer.task_id, answer.round, verdict, answer.by),
        )
        return True

    def _is_asked_anew(self, question: ReviewRequest, error: CrewAPIError) -> bool:
        """Return whether to look for the open question again after the server has refused an answer."""
        if not is_refusal(question, error):
            return False
        if self._form is not None:
            return True  # a person sees the question before the next answer
        # A Flow takes its answer at another URL, and the webhook with its question may be on its way: the first
        # question, if `/resume` refused the answer, or the next one, if a person answered this one on the platform.
        may_be_flow = question.id is not None or CrewSettings().review_secret is not None
        if not may_be_flow or self._was_refused:
            return False
        self._held_until, self._was_refused = time.monotonic() + REQUEST_WITHIN, True
        return True

    async def _drop_answer(self) -> None:
        """Forget the answer of the function or the form: it was sent, or will never be sent."""
        await self._stop_thinking()
        if self._form is not None:
            await self._form.forget_answer()

    async def more_time(self) -> float:
        """Return the extra seconds for people after their time is over. An automatic rejection (`on_human_timeout`)
        restarts their time."""
        budget, kickoff_id, question = self.policy.human_timeout, self.run.kickoff_id, self.question
        try:
            is_sent = await self._is_sent(within=SEND_WITHIN)
            if self._sending is None and self._form is not None and question is not None:
                review = await self._answer_to(question)
                is_sent = review is not None and await self._send_beside(question, review)
            if is_sent or self._sending is not None:
                return GOES_ON_WITHIN
        except CrewError as error:
            run_logger().warning("The form's answer to run %s was not used: %s", kickoff_id, error)
        await self._stop_thinking()
        if self.policy.on_human_timeout != "reject" or budget is None or self._has_extra_time:
            return 0.0
        if question is None and self._held_until is not None:
            return OUTPUT_WITHIN  # a question is about to open
        self._has_extra_time = True
        try:
            answers = await self.run.records.reviews(answers_record(self.run))
            # If another process has rejected it automatically, the restarted time is over as well.
            if question is not None and not any(answer.by == NOBODY for answer in answers):
                review = Review(approve=False, feedback=self.policy.human_message, by=NOBODY)
                await self._send_beside(question, review)
        except (*PREFECT_ERRORS, CrewError) as error:
            reason = self.run.redact(str(error))
            run_logger().warning("Run %s could not be rejected for lack of an answer: %s", kickoff_id, reason)
            return 0.0
        return budget

    # Pauses, and the end

    async def pause(self, pause: Callable[[float], Awaitable[bool]], seconds: float) -> bool:
        """Pause. Return True at once if there is news, a person submits the form, or the function has decided."""
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
        """Return the next pause, at most 1 s while an output to judge is about to arrive."""
        return delay if self._held_until is None else min(delay, 1.0)

    def has_answered(self) -> bool:
        """Return whether this wait has sent an answer since the last call of this method."""
        has_answered, self._has_answered = self._has_answered, False
        return has_answered

    async def aclose(self, *, ended: bool) -> None:
        """End with the wait: take the form down. If the run has `ended`, delete the questions that webhooks brought."""
        if self._sending is not None:
            await asyncio.wait({self._sending}, timeout=SEND_WITHIN)
            await cancel_and_wait(self._sending, within=STOP_WITHIN)
        await self._stop_thinking()
        if self._notifying is not None:
            await cancel_and_wait(self._notifying)
        record = self.run.record
        if ended and record is not None:
            await self._read("The questions of run %s", forget_notes(record, len(self.answers)))
        if self._form is not None:
            await self._form.aclose(ended=ended)
