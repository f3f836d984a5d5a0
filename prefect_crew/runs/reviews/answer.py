"""Answering for people: the runs that wait for one, and one answer a round, whoever gives it.

A function, the form, a task and the command line all answer through `answer_question`, which writes an answer down
before it is sent, and what became of it after: `/resume` is no more repeatable than `/kickoff`, and a second one might
answer the next question.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS
from prefect_crew.artifacts.events import emit
from prefect_crew.client._callbacks import FeedbackRequest, feedback_text, post_feedback
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import CrewStatus, ResumeAnswer
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import AnsweredError, CrewAPIError, CrewError, CrewLostError
from prefect_crew.records.decision import latest_start
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, SentReview, utcnow
from prefect_crew.records.notes import forget_request, kept_output, kept_requests
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.questions import (
    Question,
    QuestionState,
    Review,
    describe_answer,
    digest,
    next_round,
    question_digest,
    question_of,
    waiting_task,
    where_to_look,
)
from prefect_crew.runs.run import OpenRun, find_run
from prefect_crew.states import CrewState
from prefect_crew.webhooks import webhooks_for

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks

FEEDBACK_KEPT = 200  # characters of an answer that its record keeps
LOOKS, LOOK_AGAIN = 5, 1.0
"""How often a caller that waits for nothing else looks whether the crew goes on after its answer, and the seconds
between."""
ASKS = "prefect-crew-batch-asks"
"""The tag of a batch, on the Prefect server, of which some rows wait for people, or did at the last look."""
AT_ONCE = 8  # status calls at a time
ANSWERED_ELSEWHERE = (401, 403, 404, 409, 410)
"""What a callback answers where its token is used up, or was never one."""
CrewOf = Callable[[RunRecord], Awaitable[Crew | None]]  # None where a record's crew is not a stored block


# One answer


async def answer_question(
    run: OpenRun,
    session: CrewSession,
    records: RecordStore,
    review: Review,
    *,
    by: str,
    question: Question | None = None,
    task_id: str | None = None,
    round: int | None = None,  # noqa: A002 - the word of the domain
    webhooks: Webhooks | None = None,
    call: str | None = None,
) -> tuple[ResumeAnswer, SentReview]:
    """Answer what a run asks at this moment, once: the only place that answers for people.

    The answers on record are read before the status, and the new one is created under the next number: whoever answered
    in between has taken that number, so that an answer never goes to a question that nobody has looked at.

    Args:
        by: Who answers, for the record.
        question: The question that a wait has looked at. Another one is not answered.
        task_id: The task; left out, the one that the status names. Given, a status that does not say that anybody is
            waited for is taken as it is: not every server's does.
        round: The round that was looked at. Another one is not answered.
        webhooks: The kickoff's webhooks again, where they are not this package's own; left out, those that the run was
            opened with in this process.
        call: The name of the call, the same on every retry of it. A call that has answered before answers nothing more.

    Returns:
        The server's answer, and what is on record of it.

    Raises:
        AnsweredError: The question has its answer on record, is another one by now, or is being answered.
        CrewLostError: The server does not know the run at this moment. Nothing was sent.
        CrewError: Nothing waits, or nobody knows whether an earlier answer has arrived.
        CrewAPIError, CrewConnectionError: As the server answered, or did not. It is not sent again by itself.
    """
    kickoff_id, record = run.kickoff_id, answers_record(run)
    try:
        before = await records.reviews(record)
        if earlier := next((one for one in before if call is not None and one.call == call), None):
            return _repeat_answer(run, earlier), earlier
        request = await open_request(kickoff_id, before)
    except PREFECT_ERRORS as error:
        raise CrewError(
            f"What run {kickoff_id} asks, and its answers, cannot be read now ({error!r}). Nothing was sent."
        ) from error
    status = await session.call(lambda client: client.status(kickoff_id))
    current = _question_to_answer(run, status, before, request, task_id, question)
    if round is not None and round != current.round:
        raise CrewError(
            f"Run {kickoff_id}, task {current.task}, is at round {current.round}, not {round}. Nothing was sent."
        )
    named, number = waiting_task(status), len(before) + 1
    sent = SentReview(
        task_id=current.task,
        mark=digest(current.task_id),
        round=current.round,
        approve=review.approve,
        feedback=run.redact_text(review.feedback)[:FEEDBACK_KEPT] if run.show == "full" else "",
        by=by[:100],
        at=utcnow(),
        asked=question_digest(status),
        shown_mark=None if named is None else digest(named),
        call=call,
        request=None if request is None else request.id,
        option=review.option,
    )
    if request is None and webhooks is None and record.has_webhooks:
        webhooks = webhooks_for(run.crew, record, round=number)
    try:
        is_ours = await records.add_review(record, number, sent)
    except PREFECT_ERRORS as error:
        # It may stand there all the same, and is held then, as one that may have been sent.
        raise CrewError(
            f"The answer to run {kickoff_id} could not be put on record, so it was not sent: {error!r}."
        ) from error
    if not is_ours:
        raise AnsweredError(f"Somebody else answers run {kickoff_id} at this moment. Nothing was sent.")
    # No variable holds the words that are sent: error reporters show the local variables of all frames.
    try:
        if request is not None:
            accepted = await _post_to_callback(run, request, review, by=sent.by)
        else:
            accepted = await session.client.resume(
                kickoff_id, current.task_id, review.feedback, review.approve, webhooks=webhooks or run.webhooks
            )
    except BaseException as error:
        if kickoff_fate(error) is KickoffFate.UNCERTAIN:
            sent.outcome = "uncertain"
            await _write(run, records.save_review(record, number, sent))
        else:
            await _write(run, records.remove_review(record, number))
        raise
    # At once, since a fast crew soon asks again; a wait looks again by itself.
    looking = asyncio.ensure_future(_has_moved_on(run, session, 1 if question is not None else LOOKS))
    try:
        sent.outcome = "sent"
        await _write(run, records.save_review(record, number, sent))
        if run.record is not None:
            emit("reviewed", run.record, task_id=sent.task_id, round=sent.round, approve=sent.approve, by=sent.by)
        if await looking:
            sent.moved_on = True
            await _write(run, records.save_review(record, number, sent))
    finally:
        await cancel_and_wait(looking)
    return accepted, sent


async def open_request(
    kickoff_id: str, before: Sequence[SentReview], kept: Sequence[FeedbackRequest] | None = None
) -> FeedbackRequest | None:
    """Return what a Flow asks and nobody has answered from here, the latest of several; None if it asks nothing so.

    `kept` are what all Flows ask, where that has been read.

    Raises:
        PREFECT_ERRORS: The Prefect API is away or refuses.
    """
    sent = {one.request for one in before if one.outcome == "sent"}
    kept = await kept_requests(kickoff_id) if kept is None else kept
    return next((one for one in kept if one.kickoff_id == kickoff_id and one.id not in sent), None)


async def with_kept_output(run: OpenRun, question: Question) -> Question:
    """Return a question with what its webhook has brought, where the status does not show what is to be judged.

    Raises:
        PREFECT_ERRORS: The Prefect API is away or refuses.
    """
    if question.asked or question.request or run.record is None or not run.record.has_webhooks:
        return question
    kept = await kept_output(run.record, len(question.before))
    return question if kept is None else replace(question, output=kept)


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
    return CrewError(
        f"The answer to run {run.kickoff_id}, task {last.task_id}, round {last.round} (by {describe_answer(last)}) was "
        f"sent and nobody knows whether it arrived. It is not sent again automatically. {where_to_look(run)} If the "
        "run still waits, answer there. Then wait for it again under the same key."
    )


def _repeat_answer(run: OpenRun, earlier: SentReview) -> ResumeAnswer:
    """Return what an earlier attempt of the same call was answered with."""
    if earlier.outcome != "sent":
        raise uncertain_error(run, earlier)
    message = f"Round {earlier.round} of task {earlier.task_id} was answered by an earlier attempt of this call."
    run_logger().info("Crew run %s: %s Nothing was sent.", run.kickoff_id, message)
    return ResumeAnswer(kickoff_id=run.kickoff_id, message=message)


def _question_to_answer(
    run: OpenRun,
    status: CrewStatus,
    before: Sequence[SentReview],
    request: FeedbackRequest | None,
    task_id: str | None,
    question: Question | None,
) -> Question:
    """Return what a run asks at this moment, or raise where it asks nothing, something else, or has its answer."""
    kickoff_id, label, state = run.kickoff_id, run.crew.label, status.state
    is_over = state.ended or state is CrewState.UNKNOWN
    # A request says that somebody is waited for, whatever the status calls it.
    waits = state is CrewState.WAITING or (request is not None and not is_over)
    if question is not None:
        if state is CrewState.UNKNOWN:  # it may be known again in a moment: what the answer is to is not over
            raise CrewLostError(**run.names)
        if not waits:
            raise AnsweredError(f"Run {kickoff_id} does not wait any more: it is {state}. Nothing was sent.")
        task_id = waiting_task(status) or question.task_id
    elif is_over or not (waits or task_id):
        raise CrewError(f"Run {kickoff_id} of crew {label} does not wait for a person: it is {state}.")
    current = question_of(run, status, before, request, task_id=task_id)
    if current is None:
        raise CrewError(
            f"Run {kickoff_id} of crew {label} waits, and its status does not name the task. Give it (task_id=…, "
            "--task): the crew's page and the human-input webhook show it."
        )
    where = f"run {kickoff_id}, task {current.task}"
    if question is not None and not question.is_same_as(current):
        raise AnsweredError(f"What {where}, asks is something else by now. Nothing was sent.")
    shown = (question or current).state
    if shown is QuestionState.UNCERTAIN:
        raise uncertain_error(run, current.before[-1])
    if shown is QuestionState.ANSWERED:
        last, soon = current.before[-1], run.crew.wait.next_round_after
        # Where nothing shows that this is another question, time does in the end, for people.
        if soon is None or (utcnow() - last.at).total_seconds() < soon:
            raise AnsweredError(
                f"Round {last.round} of {where}, was already answered: {'approved' if last.approve else 'rejected'} "
                f"(by {describe_answer(last)}), but the crew's server still shows the same question. Nothing was sent. "
                "Look again in a moment: prefect-crew reviews ls."
            )
    return current


async def _write(run: OpenRun, writing: Coroutine[Any, Any, None]) -> None:
    """Write down what became of an answer; if that cannot be done, log it: it was sent, or was not, all the same."""
    try:
        await writing
    except (*PREFECT_ERRORS, CrewError) as error:
        run_logger().warning("What became of the answer to run %s could not be recorded: %s", run.kickoff_id, error)


async def _post_to_callback(run: OpenRun, request: FeedbackRequest, review: Review, *, by: str) -> ResumeAnswer:
    """Answer a Flow at its callback, and forget its request once that takes no more answers."""
    try:
        answer = await post_feedback(
            request,
            feedback_text(request, approve=review.approve, feedback=review.feedback, option=review.option),
            source=by,
            allow_http=run.crew.allow_http,
        )
    except CrewAPIError as error:
        if error.status_code in ANSWERED_ELSEWHERE:
            await _write(run, forget_request(request))
        raise
    await _write(run, forget_request(request))
    return answer


async def _has_moved_on(run: OpenRun, session: CrewSession, looks: int) -> bool:
    """Look whether the crew goes on, so that an equal question that comes next is known to be another one."""
    for look in range(looks):
        if look:
            await asyncio.sleep(LOOK_AGAIN)
        try:
            state = (await session.client.status(run.kickoff_id)).state
        except CrewError as error:
            run_logger().debug("It is not known whether run %s continues: %s", run.kickoff_id, error)
            return False
        if state is not CrewState.WAITING:
            return state is not CrewState.UNKNOWN
    return False


# Answering from outside of a wait


async def answer_run(
    run: OpenRun, records: RecordStore, review: Review, *, by: str, **options: Any
) -> tuple[ResumeAnswer, SentReview]:
    """Answer for the person that a run waits for: `answer_question` with a session of its own."""
    with withholding(run.redact_text):
        async with CrewSession(run.crew) as session:
            return await answer_question(run, session, records, review, by=by, **options)


async def resume_run(
    crew: Crew,
    kickoff_id: str,
    *,
    feedback: str,
    approve: bool,
    task_id: str | None = None,
    webhooks: Webhooks | None = None,
    call: str | None = None,
) -> ResumeAnswer:
    """Answer for the person that a run waits for, whether or not it is on record.

    `feedback` and `approve` are the answer: approve a task's output, or have it done again with the feedback.

    Raises:
        CrewError: As `answer_question`, which has the other arguments. Or the run may be a row of a batch.
    """
    run = await find_run(crew, kickoff_id)
    if run.record is None:
        await _refuse_row_of_batch(run)
    review = Review(approve=approve, feedback=feedback)
    answer, _ = await answer_run(
        run, PrefectRecords(), review, by="resume_crew", task_id=task_id, webhooks=webhooks, call=call
    )
    return answer


async def _refuse_row_of_batch(run: OpenRun) -> None:
    """Raise if a run without a record may be a row of a batch: the answers to that are on record in its ledger."""
    wanted = {"variables": {"tags": {"all_": [ASKS]}}, "limit": 200}
    try:
        async with get_client() as client:
            found = (await client.request("POST", "/variables/filter", json=wanted)).json()
    except PREFECT_ERRORS as error:
        raise CrewError(
            f"Whether run {run.kickoff_id} is a row of a batch cannot be read now ({error!r}). Nothing was sent."
        ) from error
    for batch in [one["value"] for one in found]:
        if batch.get("crew_url", run.crew.url) == run.crew.url:
            raise CrewError(
                f"Run {run.kickoff_id} is not on record on the Prefect server and may be a row of batch "
                f"{batch.get('batch')!r}, so nothing was sent. Answer a row with prefect-crew reviews approve "
                f"{shlex.quote(run.kickoff_id)}, or reject; any other run on the crew's own page."
            )


# What waits for people


@dataclass(frozen=True)
class PendingReview:
    """A run that waits for a person.

    `output` is what is to be judged as it may be shown, None where it may not, or is not known; `withheld` says why.
    `round` counts the task's questions from 1; `since` is UTC, None where nobody has noted it; `answers` are the
    earlier ones. `seen`: whether the crew's server was asked, else it is as whoever waits for the run has noted.
    """

    record: RunRecord
    task_id: str | None
    round: int
    since: datetime | None
    output: str | None = field(default=None, repr=False)
    withheld: str | None = None
    answers: tuple[SentReview, ...] = ()
    seen: bool = True
    options: tuple[str, ...] = ()


async def list_pending_reviews(stores: Sequence[RecordStore], crew_of: CrewOf) -> list[PendingReview]:
    """Return the runs in flight that wait for a person, the longest waiting first.

    Each crew's server is asked, where its block is stored; else what the record has counts.

    Raises:
        PREFECT_ERRORS: The Prefect API is away.
        LedgerError: The ledger of a batch cannot be read.
    """
    gate, requests = asyncio.Semaphore(AT_ONCE), await kept_requests()

    async def look(record: RunRecord, store: RecordStore) -> PendingReview | None:
        async with gate:
            return await read_pending_review(record, store, crew_of, requests)

    looks = [look(record, store) for store in stores async for record in store.may_ask()]
    found = [asked for asked in await asyncio.gather(*looks) if asked is not None]
    return sorted(found, key=lambda asked: asked.since or asked.record.kicked_off_at or asked.record.claimed_at)


async def read_pending_review(
    record: RunRecord, records: RecordStore, crew_of: CrewOf, requests: Sequence[FeedbackRequest] | None = None
) -> PendingReview | None:
    """Return what a run in flight asks, None if it asks nothing. `requests` are what all Flows ask.

    Raises:
        PREFECT_ERRORS: The Prefect API is away or refuses.
    """
    kickoff_id, crew = str(record.kickoff_id), await crew_of(record)
    run = None if crew is None else OpenRun(crew=crew, kickoff_id=kickoff_id, record=record)
    status = None
    if run is not None:
        # Without an answer, what is on record has to do.
        with contextlib.suppress(CrewError), withholding(run.redact_text):
            async with CrewSession(run.crew) as session:
                status = await session.call(lambda client: client.status(kickoff_id))
    waits = record.human_since is not None if status is None else status.state is CrewState.WAITING
    is_over = status is not None and (status.state.ended or status.state is CrewState.UNKNOWN)
    is_asked = requests is None or any(one.kickoff_id == kickoff_id for one in requests)
    if is_over or not (waits or is_asked):
        return None
    answers = tuple(await records.reviews(record))
    request = await open_request(kickoff_id, answers, requests)
    if not waits and request is None:
        return None
    output = None
    if run is None or status is None:
        task_id = record.human_task if request is None else request.task_id
        number = 1 if task_id is None else next_round(answers, task_id)
        withheld = "its crew's server was not asked. Look at the crew's page, or give --crew."
    else:
        question = question_of(run, status, answers, request)
        task_id, number = (None, 1) if question is None else (question.task, question.round)
        withheld = f"the status does not {'name the task' if question is None else 'show it'}. {where_to_look(run)}"
        if question is not None and (text := (await with_kept_output(run, question)).output) is not None:
            withheld = f"{len(text):,} characters that this crew does not show. {where_to_look(run)}"
            output, withheld = (run.redact(text), None) if run.show == "full" else (None, withheld)
    return PendingReview(
        record,
        task_id,
        number,
        record.human_since,
        output,
        withheld,
        answers,
        seen=status is not None,
        options=() if request is None else request.options,
    )


async def find_run_in_flight(name: str, stores: Sequence[RecordStore]) -> tuple[RunRecord, RecordStore]:
    """Return the run in flight that an idempotency key or a kickoff id names, and where it is on record.

    Raises:
        CrewError: There is none, or it has ended.
    """
    for store in stores:
        attempts = await store.attempts(name)
        record = latest_start(attempts) or attempts[-1] if attempts else await store.of_kickoff(name)
        # A ledger knows the runs of all batches that are kept in it.
        if record is None or not (attempts or await store.attempts(record.idempotency_key)):
            continue
        if record.phase is not RecordPhase.STARTED or record.kickoff_id is None:
            has_ended = record.phase is RecordPhase.ENDED
            why = f"it has ended ({record.state})" if has_ended else f"its kickoff is {record.phase}"
            raise CrewError(f"Run {record.idempotency_key!r} does not wait for a person: {why}.")
        return record, store
    raise CrewError(f"No run in flight is {name!r}. prefect-crew reviews ls lists those that wait for a person.")
