"""The questions of a run while one call waits for the run: find the open question, inform people, get an answer."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from prefect_crew._internal.asyncio_tasks import call_in_thread, cancel_and_wait
from prefect_crew._internal.prefect_api import flow_run_id, run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew._text import excerpt
from prefect_crew.artifacts.events import LINK, emit
from prefect_crew.client.models import CrewStatus, Review, ReviewRequest
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import (
    CrewAPIError,
    CrewError,
    CrewLostError,
    CrewTimeoutError,
    NotWaitingError,
    StoreError,
)
from prefect_crew.runs.reviews.answer import answer_question, look, send_left, uncertain_error
from prefect_crew.runs.reviews.form import Form
from prefect_crew.runs.reviews.links import notify_people
from prefect_crew.runs.reviews.questions import (
    Asked,
    ReviewChoice,
    ReviewFunction,
    answer_commands,
    describe_question,
    how_to_answer,
)
from prefect_crew.runs.run import read_attempt
from prefect_crew.settings import CrewSettings
from prefect_crew.states import CrewState
from prefect_crew.store.questions import FLOW

if TYPE_CHECKING:
    from prefect_crew.runs.run import LiveRun

NOBODY = "nobody, in time"
"""The giver of a rejection by `on_human_timeout`."""
GOES_ON_WITHIN = 20.0
"""Seconds for the crew to continue after an answer that came as people's time ended."""
OUTPUT_WITHIN = 5.0
"""Seconds for which a question without an output waits for the webhook that brings it."""
STOP_WITHIN = 5.0
"""Seconds for a review function to end after its answer is no longer needed."""
REFUSALS = (400, 404, 409, 410)
"""Status codes of a server if the question of a form takes no answer, or not this one: a person sees what is asked."""
NOT_ON_RECORD = (
    "Crew run %s waits for a person. It is not in the crew database, so no question of it can be answered here: answer "
    "on the crew's page."
)


class People:
    """The questions of one run, and their answers, in one wait.

    `question` is the open question or None; `answers` are the answers on record at the last status.

    Args:
        run: The run, in an open session.
        policy: The time for people, and the most questions about one task.
        review: The source of answers. None: a person answers by link, on the command line or on the crew's page.
        stop: Stops the crew; True if its server accepted that.
        quiet: Write no log line about each question: a batch writes one line about many.
    """

    def __init__(
        self,
        run: LiveRun,
        policy: WaitPolicy,
        review: ReviewChoice | None,
        stop: Callable[[], Awaitable[bool]],
        quiet: bool = False,
    ) -> None:
        self.run, self.policy, self.stop, self.quiet = run, policy, stop, quiet
        self.question: ReviewRequest | None = None
        self.answers: list[Review] = []
        self._form = Form(flow_run_id(), run, policy) if review == "form" else None
        self._function: ReviewFunction | None = None if review == "form" else review
        self._asked: Asked | None = None
        self._thinking: asyncio.Task[Review] | None = None
        self._thinks_about = ""  # the id of the question that the review function got
        self._answered_elsewhere = ""  # the id of a question whose server takes no answer any more
        self._notifying: asyncio.Task[None] | None = None
        self._held_until: float | None = None  # a question without an output waits until then; monotonic
        self._has_extra_time = self._has_warned = False

    # The open question

    async def see_status(self, status: CrewStatus) -> bool:
        """Handle a status. Return True if a question opened or closed, so that the caller updates the artifact.

        Raises:
            CrewTimeoutError: The task has asked more often than `max_rounds` allows.
        """
        try:
            asked = await self._look(status)
        except (StoreError, *PREFECT_ERRORS) as error:
            run_logger().debug("The questions of run %s could not be read: %r", self.run.kickoff_id, error)
            return False
        before, was_unsure, question = self.question, self._unsure is not None, None
        if asked is not None and asked.question.id == self._answered_elsewhere:
            asked = None
        if asked is not None and asked.state in ("open", "uncertain") and not self._is_held(asked):
            meta = None if self.run.request is None else self.run.request.options.meta
            question = asked.request(self.run.kickoff_id, meta)
        self._asked, self.question = asked, question
        self.answers = self.answers if asked is None else asked.answers
        is_unsure = self._unsure is not None
        if before is not None and question is not None and before.id == question.id and was_unsure is is_unsure:
            return before != question  # only its output is new
        if self._notifying is not None:
            self._notifying.cancel()  # its link may still be in the queue
        if question is None:
            return before is not None
        most = self.policy.max_rounds
        if most is not None and question.round > most:
            stopped = self.policy.on_human_timeout == "stop" and await self.stop()
            after = "It was stopped." if stopped else "It still waits. Answer it on the crew's page, or stop it there."
            raise CrewTimeoutError(
                f"Run {self.run.kickoff_id} of crew {self.run.crew.label}: task "
                f"{excerpt(self.run.redact_name(question.task_id), 100)} has asked a person more than {most} times "
                f"(max_rounds). {after}",
                **self.run.names,
                phase="rounds",
                stopped=stopped,
            )
        self._announce(question)
        return True

    async def _look(self, status: CrewStatus) -> Asked | None:
        run = self.run
        if status.state is CrewState.WAITING and run.attempt is None and run.is_unread:
            await read_attempt(run)
        if run.attempt is not None:
            return await look(run, status, after=self.policy.next_round_after)
        if status.state is CrewState.WAITING and not self._has_warned:
            self._has_warned = True
            run_logger().warning(NOT_ON_RECORD, run.kickoff_id)
        return None

    def _is_held(self, asked: Asked) -> bool:
        """Return whether to wait some seconds for the webhook with the output, or with a Flow's question."""
        is_full = asked.output is not None or asked.state != "open"
        has_webhook = (self.run.has_webhooks and not is_full) or CrewSettings().review_secret is not None
        if FLOW in asked.question.marks or asked.state != "open" or not has_webhook:
            self._held_until = None
            return False
        if self._held_until is None:
            self._held_until = time.monotonic() + OUTPUT_WITHIN
        return time.monotonic() < self._held_until

    # Messages to people

    @property
    def _unsure(self) -> Review | None:
        """The answer to the open question that may have arrived."""
        return self.answers[-1] if self._asked is not None and self._asked.state == "uncertain" else None

    @property
    def notes(self) -> tuple[list[str], list[str]]:
        """The notes of the artifact about the open question, and the commands that answer it."""
        question, unsure = self.question, self._unsure
        if question is None or (self._function is not None and unsure is None):
            return [], []
        form = "" if self._form is None else "The form is on this flow run's page: Resume. "
        note = f"{form}It {describe_question(self.run, question, unsure)}"
        return [note], [] if unsure is not None else answer_commands(self.run)

    def _announce(self, question: ReviewRequest) -> None:
        """Emit an event about a question, and send a link to people. Log the question, unless a function answers it or
        a batch logs it."""
        unsure = self._unsure
        has_link = self._function is None and unsure is None and CrewSettings().answer_url is not None
        self._emit_waiting(question, has_link=has_link)
        if has_link:
            self._notifying = asyncio.create_task(self._notify(question))
        if unsure is not None or not (self.quiet or self._function is not None):
            form = "" if self._form is None else f" The form is on {self._form.page} (Resume)."
            how = "" if unsure is not None else f"{form} Answer: {how_to_answer(self.run)}"
            text = describe_question(self.run, question, unsure)
            run_logger().warning("Crew run %s %s%s", self.run.kickoff_id, text, how)

    def _emit_waiting(self, question: ReviewRequest, *, has_link: bool) -> None:
        run = self.run
        if run.attempt is not None:
            page = None if self._form is None else self._form.page
            facts: dict[str, Any] = {"task_id": run.redact_name(question.task_id), "round": question.round}
            facts |= {"answer": how_to_answer(run), "page": page, "crew_page": run.crew.page_url}
            emit("waiting", run.attempt, labels={LINK: "yes" if has_link else "no"}, **facts)

    async def _notify(self, question: ReviewRequest) -> None:
        """Send the link for a question, concurrently with the polls. If that fails, the automation sends its alert."""
        run = self.run
        try:
            await notify_people(run, question, self.policy)
        except CrewError as error:
            log = run_logger().debug if self.quiet else run_logger().warning
            reason, how = str(error).rstrip("."), how_to_answer(run)
            log("Crew run %s: the link to its question was not sent: %s. Answer: %s", run.kickoff_id, reason, how)
            self._emit_waiting(question, has_link=False)

    # Answers

    async def answer(self) -> bool:
        """Send the answer of the function or the form to the open question, if there is one; or an answer that its
        giver left behind. Return whether one was sent.

        Raises:
            CrewError: The function failed, or the answer could not be sent. A submitted form stays for the next
                attempt.
        """
        asked, question = self._asked, self.question
        try:
            if asked is not None and asked.state == "left":
                return await send_left(self.run, asked) is not None
            if self._function is None and self._form is None:
                return False
            if question is not None and (unsure := self._unsure) is not None:
                raise uncertain_error(self.run, unsure)
            if self._form is not None:
                await self._form.show(question)
            review = await self._review_of(question)
            return question is not None and review is not None and await self._send(question, review)
        except (StoreError, *PREFECT_ERRORS) as error:  # the next status tries again
            log = run_logger().debug if self._has_warned else run_logger().warning
            log("Crew run %s: %s The answer is tried again while the polls go on.", self.run.kickoff_id, error)
            self._has_warned = True
            return False

    async def _review_of(self, question: ReviewRequest | None) -> Review | None:
        """Return the answer to a question if the form or the function has given one by now, else None.

        The polls of the run go on while the function works. Stop a function whose question is not open any more.
        """
        if self._form is not None:
            return None if question is None else await self._form.look()
        if self._thinking is not None and (question is None or question.id != self._thinks_about):
            await self._stop_thinking()
        if question is None or self._function is None:
            return None
        if self._thinking is None:
            self._thinks_about = question.id
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
        thinking, self._thinking = self._thinking, None
        if thinking is not None:
            await cancel_and_wait(thinking, within=STOP_WITHIN)  # a function may ignore its cancellation

    async def _send(self, question: ReviewRequest, review: Review) -> bool:
        """Send an answer to a question. Return False if the question takes no answer now: the next status shows why."""
        run = self.run
        if self._form is not None:
            await self._form.take_down()
        try:
            _, answer = await answer_question(run, review, seen=question, looks=0)
        except (NotWaitingError, CrewLostError, CrewAPIError) as error:
            if isinstance(error, CrewAPIError) and (self._form is None or error.status_code not in REFUSALS):
                raise
            run_logger().warning(
                "Crew run %s: the answer of %s was not sent: %s", run.kickoff_id, review.by, run.redact(str(error))
            )
            self.question = self._asked = None
            if isinstance(error.__cause__, CrewAPIError):
                self._answered_elsewhere = question.id
            if not isinstance(error, CrewLostError):  # the server may know the run again at the next status call
                await self._drop_answer()
            return False
        await self._drop_answer()
        self.answers = [*(answer for answer in self.answers if answer.outcome != "intended"), answer]
        self.question, self._asked, self._has_warned = None, None, False
        verdict = "approved" if review.approve else "rejected"
        run_logger().info(
            "Crew run %s: task %s, question %d: %s by %s.",
            *(run.kickoff_id, answer.task_id, answer.round, verdict, answer.by),
        )
        return True

    async def _drop_answer(self) -> None:
        """Forget the answer of the function or the form: it was sent, or will never be sent."""
        await self._stop_thinking()
        if self._form is not None:
            await self._form.forget_answer()

    async def more_time(self) -> float:
        """Return the extra seconds for people after their time is over. An automatic rejection (`on_human_timeout`)
        restarts their time."""
        budget, question, rejects = self.policy.human_timeout, self.question, self.policy.on_human_timeout == "reject"
        if rejects and question is None and self._held_until is not None:
            return OUTPUT_WITHIN  # a question is about to open
        try:
            if self._form is not None and question is not None:
                review = await self._review_of(question)
                if review is not None and await self._send(question, review):
                    return GOES_ON_WITHIN
            await self._stop_thinking()
            if not rejects or budget is None or self._has_extra_time:
                return 0.0
            self._has_extra_time = True
            # If another process has rejected it automatically, the restarted time is over as well.
            if question is not None and self._unsure is None and not any(one.by == NOBODY for one in self.answers):
                await self._send(question, Review(approve=False, feedback=self.policy.human_message, by=NOBODY))
        except (*PREFECT_ERRORS, CrewError) as error:
            reason = self.run.redact(str(error))
            run_logger().warning("No answer to run %s could be sent at the end: %s", self.run.kickoff_id, reason)
            return 0.0
        return budget

    # Pauses, and the end

    async def pause(self, pause: Callable[[float], Awaitable[bool]], seconds: float) -> bool:
        """Pause. Return True at once if there is news, a person submits the form, or the function has decided."""
        if self._form is not None:
            return await self._form.pause(pause, seconds)
        if self._thinking is None or self._thinking.done():
            return await pause(seconds)
        pausing = asyncio.ensure_future(pause(seconds))
        try:
            await asyncio.wait({pausing, self._thinking}, return_when=asyncio.FIRST_COMPLETED)
            return self._thinking.done() or pausing.result()
        finally:
            await cancel_and_wait(pausing)

    def next_pause(self, delay: float) -> float:
        """Return the next pause, at most 1 s while an output to judge is about to arrive, or an answer to be sent."""
        is_ready = self._thinking is not None and self._thinking.done()
        return min(delay, 1.0) if is_ready or self._held_until is not None else delay

    async def aclose(self, *, ended: bool) -> None:
        """End with the wait: take the form down."""
        await self._stop_thinking()
        if self._notifying is not None:
            await cancel_and_wait(self._notifying)
        if self._form is not None:
            await self._form.aclose(ended=ended)
