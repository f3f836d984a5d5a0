"""People in the loop: what is asked, what is answered, and one answer a round, by whomever it is given.

`/resume` is no more repeatable than `/kickoff`: a second one might answer the next question. So every answer goes
through `answer_question`, which writes it down before it is sent, beside the run's record, and what became of it after.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, cast

import httpx
from prefect.exceptions import PrefectException
from pydantic import BaseModel, ConfigDict, Field

from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.client._callbacks import FeedbackRequest, feedback_text, post_feedback
from prefect_crew.client._parsing import waiting_output
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import CrewStatus, ResumeAnswer
from prefect_crew.exceptions import AnsweredError, CrewAPIError, CrewError
from prefect_crew.records.model import ReviewStore, RunRecord, SentReview, utcnow
from prefect_crew.records.notes import forget_request, kept_requests
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


class ReviewRequest(BaseModel):
    """What a crew asks of a person.

    `round` counts from 1; `output` is what is to be judged, where it is known; `meta` is what the kickoff was given.
    `options` are the outcomes that a Flow can go on with, and `message` is its question.
    """

    model_config = ConfigDict(frozen=True)

    kickoff_id: str
    task_id: str
    output: str | None = Field(default=None, repr=False)
    round: int = 1
    meta: Mapping[str, Any] | None = Field(default=None, repr=False)
    options: tuple[str, ...] = ()
    message: str | None = Field(default=None, repr=False)


class Review(BaseModel):
    """An answer: approve the task's output, or have it done again with the feedback.

    `option` is one of the request's options. Left out, it is the one that says what `approve` does, if there is one.
    """

    model_config = ConfigDict(frozen=True)

    approve: bool
    feedback: str = Field(default="", repr=False)
    option: str | None = None


ReviewFunction = Callable[[ReviewRequest], "Review | Awaitable[Review]"]
ReviewChoice = ReviewFunction | Literal["form"]
"""What answers: a function, or a person in Prefect's input form."""


@dataclass(frozen=True)
class Question:
    """What a run asks at this moment.

    `task_id` and `output`, what is to be judged, are the crew's own: they go to the crew and to whoever answers. `task`
    is the task as it may be shown, `so_far` what other tasks have given. `round` counts the task's questions from 1;
    `asked` is the digest of what the status shows to be judged, None where it shows nothing; `before` is what was
    answered already. `by_time`: only the time since the last answer says that this is another question than the one
    before. `uncertain`: it was answered, and nobody knows whether the answer arrived. `request` is what a Flow asks,
    which is answered at its callback.
    """

    kickoff_id: str
    task_id: str = field(repr=False)
    round: int
    asked: str | None
    output: str | None = field(default=None, repr=False)
    before: tuple[SentReview, ...] = field(default=(), repr=False)
    task: str = ""
    so_far: str | None = field(default=None, repr=False)
    request: FeedbackRequest | None = field(default=None, repr=False)
    by_time: bool = False
    uncertain: bool = False

    def same_as(self, other: Question) -> bool:
        """Return whether this is the same question, of which the other may know more."""
        return (self.task_id, len(self.before)) == (other.task_id, len(other.before)) and same_output(
            self.asked, other.asked
        )


def waiting_task(status: CrewStatus) -> str | None:
    """Return the task that waits, by its id, else by the name that the documented status has in `current_task`."""
    return status.human_task_id or status.current_task


def _shown_output(status: CrewStatus) -> str | None:
    task_id = waiting_task(status)
    of_task = next((task.output for task in reversed(status.tasks) if task.name == task_id and task.output), None)
    return of_task or waiting_output(status.raw)


def judged(status: CrewStatus) -> str | None:
    """Return what a person is to judge, where the status shows it: the documented one does not.

    That is the output of the task that waits, else the last step of it. An earlier task's output is none.
    """
    return _shown_output(status) or status.last_step


def outputs_so_far(status: CrewStatus) -> str | None:
    """Return what tasks have given so far, for whoever cannot be shown what is to be judged; None if nothing did."""
    done = [(task.name or "task", task.output) for task in status.tasks if task.output]
    raw: Any = status.raw
    last: Any = cast("dict[str, Any]", raw).get("last_executed_task") if isinstance(raw, dict) else None
    text: Any = cast("dict[str, Any]", last).get("output") if isinstance(last, dict) else None
    if not done and isinstance(text, str) and text:
        done = [(status.last_task or "last task", text)]
    return "\n\n".join(f"### {name}\n\n{output}" for name, output in done) or None


def asked_of(status: CrewStatus) -> str | None:
    """Return a digest of the task that waits and of its output, None where the status does not show that.

    A message and a last step change while one and the same question is asked, so neither is part of it.
    """
    output = _shown_output(status)
    if output is None:
        return None
    facts = (waiting_task(status), output)
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def same_output(one: str | None, other: str | None) -> bool:
    """Return whether two digests may be of the same question: they are equal, or one of them is not known."""
    return one is None or other is None or one == other


def _mark_of(task_id: str) -> str:
    return hashlib.sha256(task_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _is_about(review: SentReview, task_id: str) -> bool:
    """Return whether an answer on record is about a task, by the id of the crew's server or as it may be shown."""
    return task_id == review.task_id or review.mark == _mark_of(task_id)


def round_of(before: Sequence[SentReview], task_id: str) -> int:
    """Return which round of a task's questions comes after these answers, counted from 1."""
    return sum(_is_about(earlier, task_id) for earlier in before) + 1


class Standing(Enum):
    """How a question stands to the answers that are on record."""

    OPEN = "open"
    """It has no answer: something shows that it is another question than the one that was answered last."""
    BY_TIME = "open by time"
    """Nothing shows that it is another one, but the last answer was accepted long ago."""
    ANSWERED = "answered"
    """It is the one that was answered, as far as anything shows."""
    UNCERTAIN = "uncertain"
    """It is the one whose answer may have arrived or not."""


def standing_of(
    before: Sequence[SentReview],
    task: str | None,
    asked: str | None,
    *,
    now: datetime,
    next_round_after: float | None,
    told: bool = False,
) -> Standing:
    """Return how the question that a status shows stands to the answers that were on record before it was read. Pure.

    Args:
        before: The answers, in order.
        task: The task that the status names, if any.
        asked: What `asked_of` gives for the status.
        now: The time, UTC.
        next_round_after: Seconds after an accepted answer from which an equal question counts as the next one; None
            for never.
        told: Whether a webhook has told of a question that came after all these answers.
    """
    last = before[-1] if before else None
    if last is None or last.moved_on or told:
        return Standing.OPEN
    if task is not None and not (last.shown_mark == _mark_of(task) or (not last.shown_mark and _is_about(last, task))):
        return Standing.OPEN
    if not same_output(asked, last.asked):
        return Standing.OPEN
    if last.outcome != "sent":
        return Standing.UNCERTAIN
    late = next_round_after is not None and (now - last.at).total_seconds() >= next_round_after
    return Standing.BY_TIME if late else Standing.ANSWERED


def standing_of_request(before: Sequence[SentReview], request: FeedbackRequest) -> Standing:
    """Return how a Flow's request stands to the answers on record: each has an id of its own. Pure."""
    given = [one for one in before if one.request == request.id]
    if not given:
        return Standing.OPEN
    return Standing.ANSWERED if given[-1].outcome == "sent" else Standing.UNCERTAIN


async def open_request(kickoff_id: str, before: Sequence[SentReview]) -> FeedbackRequest | None:
    """Return what a Flow asks and nobody has answered from here, the first of several; None if it asks nothing so.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    kept = await kept_requests(kickoff_id)
    return next((one for one in kept if standing_of_request(before, one) is not Standing.ANSWERED), None)


async def answer_question(
    run: OpenRun,
    session: CrewSession,
    records: ReviewStore | None,
    review: Review,
    *,
    by: str,
    task_id: str | None = None,
    round: int | None = None,  # noqa: A002 - the word of the domain
    seen: Question | None = None,
    told: Callable[[int], bool] | None = None,
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
        seen: The question that was looked at. Another one is not answered.
        told: Returns whether a webhook has told of a question that came after so many answers.
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
    kickoff_id = run.kickoff_id
    record = kept_beside(run)
    before = [] if records is None else await _answers(kickoff_id, records, record)
    if earlier := next((one for one in before if call is not None and one.call == call), None):
        return _given_before(run, earlier), earlier
    request = None if records is None else await _request(kickoff_id, before)
    status = await session.asked(lambda client: client.status(kickoff_id))
    task = _task_of(run, status, task_id, seen, request)
    asked, named, shown = asked_of(status), waiting_task(status), run.named(task)
    standing = standing_of(
        before,
        named,
        asked,
        now=utcnow(),
        next_round_after=next_round_after,
        told=told is not None and told(len(before)),
    )
    if request is not None:
        standing = standing_of_request(before, request)
    _refuse_answered(run, before, standing)
    now = round_of(before, task)
    if round is not None and round != now:
        raise CrewError(f"Run {kickoff_id}, task {shown}, is at round {now}, not {round}. Nothing was sent.")
    if seen is not None and (
        len(seen.before) != len(before)
        or not same_output(seen.asked, asked)
        or (seen.request and seen.request.id) != (request and request.id)
    ):
        raise AnsweredError(f"Run {kickoff_id}, task {shown}, asks something else by now. Nothing was sent.")
    sent = SentReview(
        task_id=shown,
        mark=None if shown == task else _mark_of(task),
        round=now,
        approve=review.approve,
        feedback=(run.told(review.feedback) or "")[:FEEDBACK_KEPT] if run.show == "full" else "",
        by=by[:100],
        at=utcnow(),
        asked=asked,
        shown_mark=None if named is None else _mark_of(named),
        call=call,
        request=None if request is None else request.id,
        option=review.option,
    )
    number = len(before) + 1
    if webhooks is None and record.hooked:
        webhooks = webhooks_for(
            run.crew, record.idempotency_key, attempt=record.attempt, owner=record.owner, round=number
        )
    elif webhooks is None:
        webhooks = run.webhooks
    if request is None:
        sending = session.client.resume(kickoff_id, task, review.feedback, review.approve, webhooks=webhooks)
    else:
        text = feedback_text(request, approve=review.approve, feedback=review.feedback, option=review.option)
        sending = _posted(run, request, text, by)
    answer = await _recorded(run, None if records is None else _Place(records, record, number, sent), sending)
    sent.outcome = "sent"
    if records is not None:
        await _see_it_go_on(run, session, _Place(records, record, number, sent), looks)
    return answer, sent


def _given_before(run: OpenRun, earlier: SentReview) -> ResumeAnswer:
    if earlier.outcome != "sent":
        raise uncertain_error(run, earlier)
    said = f"Round {earlier.round} of task {earlier.task_id} was answered by an earlier attempt of this call."
    run_logger().info("Crew run %s: %s Nothing was sent.", run.kickoff_id, said)
    return ResumeAnswer(kickoff_id=run.kickoff_id, message=said)


async def _posted(run: OpenRun, request: FeedbackRequest, text: str, by: str) -> ResumeAnswer:
    try:
        answer = await post_feedback(request, text, source=by[:100], allow_http=run.crew.allow_http)
    except CrewAPIError as error:
        if error.status_code in (401, 403, 404, 409, 410):
            # Its token is used up, or was never one: it was answered elsewhere, and nothing more can be done with it.
            await _forgotten(run, request)
        raise
    await _forgotten(run, request)
    return answer


async def _forgotten(run: OpenRun, request: FeedbackRequest) -> None:
    try:
        await forget_request(request)
    except (httpx.HTTPError, PrefectException) as error:
        run_logger().debug("What run %s asked stays: %s", run.kickoff_id, error)


async def _request(kickoff_id: str, before: Sequence[SentReview]) -> FeedbackRequest | None:
    try:
        return await open_request(kickoff_id, before)
    except (httpx.HTTPError, PrefectException) as error:
        raise CrewError(f"What run {kickoff_id} asks cannot be read now ({error!r}). Nothing was sent.") from error


def _task_of(
    run: OpenRun, status: CrewStatus, task_id: str | None, seen: Question | None, request: FeedbackRequest | None
) -> str:
    """Return the task that an answer is for, where the run can be answered."""
    kickoff_id, label = run.kickoff_id, run.crew.label
    if request is not None and not status.state.ended and status.state is not CrewState.UNKNOWN:
        return request.task_id  # the request says that somebody is waited for, whatever the status calls it
    if seen is not None and status.state is not CrewState.WAITING:
        raise AnsweredError(f"Run {kickoff_id} does not wait any more: it is {status.state}. Nothing was sent.")
    waits = status.state is CrewState.WAITING or (task_id is not None and not status.state.ended)
    if not waits or status.state is CrewState.UNKNOWN:
        raise CrewError(f"Run {kickoff_id} of crew {label} does not wait for a person: it is {status.state}.")
    task = task_id or (waiting_task(status) if seen is None else seen.task_id)
    if task is None:
        raise CrewError(
            f"Run {kickoff_id} of crew {label} waits, and its status does not name the task. Give it (task_id=…, "
            "--task): the crew's page and the human-input webhook show it."
        )
    return task


@dataclass
class _Place:
    """Where one answer is on record."""

    records: ReviewStore
    record: RunRecord
    number: int
    sent: SentReview

    async def create(self) -> bool:
        return await self.records.add_review(self.record, self.number, self.sent)

    async def save(self) -> None:
        await self.records.save_review(self.record, self.number, self.sent)

    async def remove(self) -> None:
        await self.records.remove_review(self.record, self.number)


async def _recorded(run: OpenRun, place: _Place | None, sending: Coroutine[Any, Any, ResumeAnswer]) -> ResumeAnswer:
    """Send an answer, on record before it leaves, and write down what became of it."""
    if place is None:
        return await sending
    try:
        created = await place.create()
    except BaseException as error:
        sending.close()
        if not isinstance(error, (httpx.HTTPError, PrefectException)):
            raise
        # It may stand there all the same, and is held then, as one that may have been sent.
        raise CrewError(
            f"The answer to run {run.kickoff_id} could not be put on record, so it was not sent: {error!r}."
        ) from error
    if not created:
        sending.close()
        raise AnsweredError(f"Somebody else answers run {run.kickoff_id} at this moment. Nothing was sent.")
    try:
        answer = await sending
    except BaseException as error:
        if kickoff_fate(error) is KickoffFate.UNCERTAIN:
            place.sent.outcome = "uncertain"
            await _written(run, place.save())
        else:
            await _written(run, place.remove())
        raise
    place.sent.outcome = "sent"
    await _written(run, place.save())
    if run.record is not None:
        sent = place.sent
        emit("reviewed", run.record, task_id=sent.task_id, round=sent.round, approve=sent.approve, by=sent.by)
    return answer


def uncertain_error(run: OpenRun, last: SentReview) -> CrewError:
    """Return the error that says why an answer that may have arrived is not sent again, and how to go on."""
    page = f" ({run.crew.page_url})" if run.crew.page_url else ""
    return CrewError(
        f"The answer to run {run.kickoff_id}, task {last.task_id}, round {last.round} ({_when(last)}) was sent and "
        f"nobody knows whether it arrived. It is not sent again on a guess: look at the crew's page{page}, and answer "
        "there if the run still waits. Then wait for it again under the same key."
    )


def _when(given: SentReview) -> str:
    return f"{given.at:%Y-%m-%d %H:%M:%S} UTC, by {given.by}"


def _refuse_answered(run: OpenRun, before: Sequence[SentReview], standing: Standing) -> None:
    if standing in (Standing.OPEN, Standing.BY_TIME):
        return
    last = before[-1]
    if standing is Standing.UNCERTAIN:
        raise uncertain_error(run, last)
    raise AnsweredError(
        f"Round {last.round} of run {run.kickoff_id}, task {last.task_id}, has its answer on record: "
        f"{'approved' if last.approve else 'rejected'} ({_when(last)}), and the crew's server still shows the same "
        "question. Nothing was sent. Look again in a moment: prefect-crew reviews."
    )


async def _answers(kickoff_id: str, records: ReviewStore, record: RunRecord) -> list[SentReview]:
    try:
        return await records.reviews(record)
    except (httpx.HTTPError, PrefectException) as error:
        raise CrewError(f"The answers to run {kickoff_id} cannot be read now ({error!r}). Nothing was sent.") from error


def kept_beside(run: OpenRun) -> RunRecord:
    """Return the record that answers are kept beside: the run's, or a stand-in that is never stored itself."""
    if run.record is not None:
        return run.record
    now = utcnow()
    return RunRecord(
        idempotency_key=f"kickoff id {run.kickoff_id}",
        attempt=1,
        crew=run.crew.label,
        crew_url=run.crew.url,
        inputs_digest="",
        owner="",
        claimed_at=now,
        kickoff_id=run.kickoff_id,
    )


async def _see_it_go_on(run: OpenRun, session: CrewSession, place: _Place, looks: int) -> None:
    """Look whether the crew goes on, so that an equal question that comes next is known to be another one."""
    for look in range(looks):
        if look:
            await asyncio.sleep(LOOK_AGAIN)
        try:
            status = await session.client.status(run.kickoff_id)
        except CrewError as error:
            run_logger().debug("Whether run %s goes on could not be seen: %s", run.kickoff_id, error)
            return
        if status.state is CrewState.WAITING:
            continue
        if status.state is not CrewState.UNKNOWN:
            place.sent.moved_on = True
            await _written(run, place.save())
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
        await records.save_review(kept_beside(run), len(before), last)
    except (httpx.HTTPError, PrefectException, CrewError) as error:
        last.moved_on = False
        run_logger().debug("That run %s goes on is not on record: %s", run.kickoff_id, error)
        return False
    return True


async def _written(run: OpenRun, writing: Coroutine[Any, Any, None]) -> None:
    try:
        await writing
    except (httpx.HTTPError, PrefectException, CrewError) as error:
        run_logger().warning("What became of the answer to run %s is not on record: %s", run.kickoff_id, error)
