"""Answering for a person, once a round, whoever does it: a function, the form, a task or the command line.

`/resume` is no more repeatable than `/kickoff`: a second one might answer the next question. So every answer goes
through `answer_question`, which writes it down before it is sent, and what became of it after.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from prefect.exceptions import PrefectException

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.client._callbacks import FeedbackRequest, feedback_text, post_feedback
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import CrewStatus, ResumeAnswer
from prefect_crew.exceptions import AnsweredError, CrewAPIError, CrewError
from prefect_crew.records.model import ReviewStore, RunRecord, SentReview, utcnow
from prefect_crew.records.notes import forget_request, kept_requests
from prefect_crew.runs.reviews.questions import (
    Question,
    QuestionState,
    Review,
    digest,
    may_be_same,
    next_round,
    question_digest,
    question_state,
    request_state,
    waiting_task,
)
from prefect_crew.states import CrewState
from prefect_crew.webhooks import webhooks_for

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks
    from prefect_crew.crew import CrewSession
    from prefect_crew.runs.run import OpenRun

FEEDBACK_KEPT = 200
"""Characters of an answer that its record keeps."""
LOOKS = 5
"""How often a caller that waits for nothing else looks whether the crew goes on after its answer."""
LOOK_AGAIN = 1.0
"""Seconds between two looks at whether the crew goes on after an answer."""
UNSAVED = 120.0
"""Seconds for which whoever sends an answer may still write down what became of it."""


async def answer_question(
    run: OpenRun,
    session: CrewSession,
    records: ReviewStore | None,
    review: Review,
    *,
    by: str,
    task_id: str | None = None,
    round: int | None = None,  # noqa: A002 - the word of the domain
    question: Question | None = None,
    has_webhook: Callable[[int], bool] = lambda _: False,
    next_round_after: float | None = None,
    webhooks: Webhooks | None = None,
    looks: int = 1,
    call: str | None = None,
) -> tuple[ResumeAnswer, SentReview]:
    """Answer what a run asks at this moment, once: the only place that answers for people.

    The answers on record are read before the status, and the new one is created under the next number: whoever answered
    in between has taken that number, so that an answer never goes to a question that nobody has looked at.

    Args:
        run, session: The run, and what it is reached by.
        records: Where answers are kept; None where there is no Prefect API, and so nothing that outlasts this call.
        review: The answer.
        by: Who answers, for the record.
        task_id: The task; left out, the one that the status names. Given, a status that does not say that anybody is
            waited for is taken as it is: not every server's does.
        round: The round that was looked at. Another one is not answered.
        question: The question that was looked at. Another one is not answered.
        has_webhook: Returns whether a webhook tells of a question that came after so many answers.
        next_round_after: The policy's, for whoever may answer on the strength of time alone; None for nobody.
        webhooks: The kickoff's webhooks again, where they are not this package's own; left out, those that the run was
            opened with in this process.
        looks: How often the status is read after an accepted answer, to see whether the crew goes on.
        call: The name of the call, the same on every retry of it. A call that has answered before answers nothing more.

    Raises:
        AnsweredError: The question has its answer on record, is another one by now, or is being answered.
        CrewError: Nothing waits, or nobody knows whether an earlier answer has arrived.
        CrewAPIError, CrewConnectionError: As the server answered, or did not. It is not sent again by itself.
    """
    kickoff_id, record = run.kickoff_id, answers_record(run)
    try:
        before = [] if records is None else await records.reviews(record)
        earlier = next((one for one in before if call is not None and one.call == call), None)
        request = None if records is None or earlier else await open_request(kickoff_id, before)
    except (httpx.HTTPError, PrefectException) as error:
        raise CrewError(
            f"What run {kickoff_id} asks, and its answers, cannot be read now ({error!r}). Nothing was sent."
        ) from error
    if earlier is not None:
        return _repeat_answer(run, earlier), earlier
    status = await session.call(lambda client: client.status(kickoff_id))
    task = _task_to_answer(run, status, task_id, question, request)
    asked, named, shown = question_digest(status), waiting_task(status), run.redact_name(task)
    state = (
        request_state(before, request)
        if request is not None
        else question_state(
            before,
            named,
            asked,
            now=utcnow(),
            next_round_after=next_round_after,
            has_webhook=has_webhook(len(before)),
        )
    )
    _refuse_answered(run, before, state)
    current = next_round(before, task)
    if round is not None and round != current:
        raise CrewError(f"Run {kickoff_id}, task {shown}, is at round {current}, not {round}. Nothing was sent.")
    if question is not None and (
        len(question.before) != len(before)
        or not may_be_same(question.asked, asked)
        or (question.request and question.request.id) != (request and request.id)
    ):
        raise AnsweredError(f"Run {kickoff_id}, task {shown}, asks something else by now. Nothing was sent.")
    sent = SentReview(
        task_id=shown,
        mark=digest(task),
        round=current,
        approve=review.approve,
        feedback=(run.redact_text(review.feedback) or "")[:FEEDBACK_KEPT] if run.show == "full" else "",
        by=by[:100],
        at=utcnow(),
        asked=asked,
        shown_mark=None if named is None else digest(named),
        call=call,
        request=None if request is None else request.id,
        option=review.option,
    )
    answer = _Answer(run, records, record, len(before) + 1, sent)
    if request is not None:
        text = feedback_text(request, approve=review.approve, feedback=review.feedback, option=review.option)
        accepted = await answer.send(_post_to_callback(run, request, text, sent.by))
    else:
        if webhooks is None and record.has_webhooks:
            webhooks = webhooks_for(
                run.crew, record.idempotency_key, attempt=record.attempt, owner=record.owner, round=answer.number
            )
        hooks = webhooks or run.webhooks
        accepted = await answer.send(
            session.client.resume(kickoff_id, task, review.feedback, review.approve, webhooks=hooks)
        )
    await answer.see_crew_go_on(session, looks)
    return accepted, sent


async def open_request(kickoff_id: str, before: Sequence[SentReview]) -> FeedbackRequest | None:
    """Return what a Flow asks and nobody has answered from here, the first of several; None if it asks nothing so.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    kept = await kept_requests(kickoff_id)
    return next((one for one in kept if request_state(before, one) is not QuestionState.ANSWERED), None)


def answers_record(run: OpenRun) -> RunRecord:
    """Return the record whose answers are read and written: the run's, or a stand-in that is never stored itself."""
    return run.record or RunRecord(
        idempotency_key=f"kickoff id {run.kickoff_id}",
        attempt=1,
        crew=run.crew.label,
        crew_url=run.crew.url,
        inputs_digest="",
        owner="",
        claimed_at=utcnow(),
        kickoff_id=run.kickoff_id,
    )


def uncertain_error(run: OpenRun, last: SentReview) -> CrewError:
    """Return the error that says why an answer that may have arrived is not sent again, and how to go on."""
    page = f" ({run.crew.page_url})" if run.crew.page_url else ""
    return CrewError(
        f"The answer to run {run.kickoff_id}, task {last.task_id}, round {last.round} ({_when(last)}) was sent and "
        f"nobody knows whether it arrived. It is not sent again on a guess: look at the crew's page{page}, and answer "
        "there if the run still waits. Then wait for it again under the same key."
    )


def _when(answer: SentReview) -> str:
    return f"{answer.at:%Y-%m-%d %H:%M:%S} UTC, by {answer.by}"


def _repeat_answer(run: OpenRun, earlier: SentReview) -> ResumeAnswer:
    """Return what an earlier attempt of the same call was answered with."""
    if earlier.outcome != "sent":
        raise uncertain_error(run, earlier)
    message = f"Round {earlier.round} of task {earlier.task_id} was answered by an earlier attempt of this call."
    run_logger().info("Crew run %s: %s Nothing was sent.", run.kickoff_id, message)
    return ResumeAnswer(kickoff_id=run.kickoff_id, message=message)


def _task_to_answer(
    run: OpenRun, status: CrewStatus, task_id: str | None, question: Question | None, request: FeedbackRequest | None
) -> str:
    """Return the task that an answer is for, where the run can be answered."""
    kickoff_id, label = run.kickoff_id, run.crew.label
    is_over = status.state.ended or status.state is CrewState.UNKNOWN
    if request is not None and not is_over:
        return request.task_id  # the request says that somebody is waited for, whatever the status calls it
    if question is not None and status.state is not CrewState.WAITING:
        raise AnsweredError(f"Run {kickoff_id} does not wait any more: it is {status.state}. Nothing was sent.")
    if is_over or (status.state is not CrewState.WAITING and task_id is None):
        raise CrewError(f"Run {kickoff_id} of crew {label} does not wait for a person: it is {status.state}.")
    task = task_id or (waiting_task(status) if question is None else question.task_id)
    if task is None:
        raise CrewError(
            f"Run {kickoff_id} of crew {label} waits, and its status does not name the task. Give it (task_id=…, "
            "--task): the crew's page and the human-input webhook show it."
        )
    return task


def _refuse_answered(run: OpenRun, before: Sequence[SentReview], state: QuestionState) -> None:
    if state is QuestionState.UNCERTAIN:
        raise uncertain_error(run, before[-1])
    if state is QuestionState.ANSWERED:
        last = before[-1]
        raise AnsweredError(
            f"Round {last.round} of run {run.kickoff_id}, task {last.task_id}, has its answer on record: "
            f"{'approved' if last.approve else 'rejected'} ({_when(last)}), and the crew's server still shows the same "
            "question. Nothing was sent. Look again in a moment: prefect-crew reviews."
        )


async def _post_to_callback(run: OpenRun, request: FeedbackRequest, text: str, by: str) -> ResumeAnswer:
    try:
        answer = await post_feedback(request, text, source=by, allow_http=run.crew.allow_http)
    except CrewAPIError as error:
        if error.status_code in (401, 403, 404, 409, 410):  # answered elsewhere: its token is used up, or was never one
            await _forget(run, request)
        raise
    await _forget(run, request)
    return answer


async def _forget(run: OpenRun, request: FeedbackRequest) -> None:
    try:
        await forget_request(request)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("What run %s asked stays: %s", run.kickoff_id, error)


@dataclass
class _Answer:
    """One answer on its way, and where it is on record."""

    run: OpenRun
    records: ReviewStore | None
    record: RunRecord
    number: int
    sent: SentReview

    async def send(self, sending: Coroutine[Any, Any, ResumeAnswer]) -> ResumeAnswer:
        """Send the answer, on record before it leaves, and write down what became of it."""
        try:
            await self._create()
        except BaseException:
            sending.close()
            raise
        try:
            answer = await sending
        except BaseException as error:
            if kickoff_fate(error) is KickoffFate.UNCERTAIN:
                self.sent.outcome = "uncertain"
                await self._save()
            elif self.records is not None:
                await self._written(self.records.remove_review(self.record, self.number))
            raise
        sent = self.sent
        sent.outcome = "sent"
        await self._save()
        if self.records is not None and self.run.record is not None:
            emit("reviewed", self.run.record, task_id=sent.task_id, round=sent.round, approve=sent.approve, by=sent.by)
        return answer

    async def _create(self) -> None:
        kickoff_id = self.run.kickoff_id
        try:
            is_ours = self.records is None or await self.records.add_review(self.record, self.number, self.sent)
        except (httpx.HTTPError, PrefectException) as error:
            # It may stand there all the same, and is held then, as one that may have been sent.
            raise CrewError(
                f"The answer to run {kickoff_id} could not be put on record, so it was not sent: {error!r}."
            ) from error
        if not is_ours:
            raise AnsweredError(f"Somebody else answers run {kickoff_id} at this moment. Nothing was sent.")

    async def _save(self) -> None:
        if self.records is not None:
            await self._written(self.records.save_review(self.record, self.number, self.sent))

    async def _written(self, writing: Coroutine[Any, Any, None]) -> None:
        try:
            await writing
        except (httpx.HTTPError, PrefectException, CrewError) as error:
            run_logger().warning("What became of the answer to run %s is not on record: %s", self.run.kickoff_id, error)

    async def see_crew_go_on(self, session: CrewSession, looks: int) -> None:
        """Look whether the crew goes on, so that an equal question that comes next is known to be another one."""
        for look in range(0 if self.records is None else looks):
            if look:
                await asyncio.sleep(LOOK_AGAIN)
            try:
                state = (await session.client.status(self.run.kickoff_id)).state
            except CrewError as error:
                run_logger().debug("Whether run %s goes on could not be seen: %s", self.run.kickoff_id, error)
                return
            if state is not CrewState.WAITING:
                if state is not CrewState.UNKNOWN:
                    self.sent.moved_on = True
                    await self._save()
                return


async def note_moved_on(run: OpenRun, records: ReviewStore, before: Sequence[SentReview]) -> bool:
    """Note at the last answer that the crew was seen to go on after it; False if that has to be tried again."""
    last = before[-1] if before else None
    if last is None or last.moved_on:
        return True
    if last.outcome == "intended" and (utcnow() - last.at).total_seconds() < UNSAVED:
        return False  # whoever sends it would write over this
    last.moved_on = True
    try:
        await records.save_review(answers_record(run), len(before), last)
    except (httpx.HTTPError, PrefectException, CrewError) as error:
        last.moved_on = False
        run_logger().debug("That run %s goes on is not on record: %s", run.kickoff_id, error)
        return False
    return True
