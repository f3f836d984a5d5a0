"""Answering for people: the runs that wait for one, and one answer a round, whoever gives it.

A function, the form, a task and the command line all answer through `answer_question`, which writes an answer down
before it is sent, and what became of it after: `/resume` is no more repeatable than `/kickoff`, and a second one might
answer the next question.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.client._callbacks import FeedbackRequest, feedback_text, post_feedback
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client.models import CrewStatus, ResumeAnswer
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import AnsweredError, CrewAPIError, CrewError, CrewLostError
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, SentReview, utcnow
from prefect_crew.records.notes import forget_request, kept_output, kept_requests
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.questions import (
    Question,
    QuestionState,
    Review,
    digest,
    judged_output,
    next_round,
    outputs_so_far,
    question_digest,
    question_of,
    request_state,
    waiting_task,
    where_to_look,
)
from prefect_crew.runs.run import OpenRun, find_run
from prefect_crew.states import CrewState
from prefect_crew.webhooks import webhooks_for

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks

FEEDBACK_KEPT = 200
"""Characters of an answer that its record keeps."""
LOOKS = 5
"""How often a caller that waits for nothing else looks whether the crew goes on after its answer."""
LOOK_AGAIN = 1.0
"""Seconds between two looks at whether the crew goes on after an answer."""
ASKS = "prefect-crew-batch-asks"
"""The tag of a batch, on the Prefect server, of which some rows wait for people, or did at the last look."""
AT_ONCE = 8
"""Status calls at a time."""
CrewOf = Callable[[RunRecord], Awaitable[Crew | None]]
"""Gives the crew of a record, None where its block is not stored."""


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
        run, session: The run, and what it is reached by.
        records: Where answers are kept.
        review: The answer.
        by: Who answers, for the record.
        question: The question that a wait has looked at. Another one is not answered.
        task_id: The task; left out, the one that the status names. Given, a status that does not say that anybody is
            waited for is taken as it is: not every server's does.
        round: The round that was looked at. Another one is not answered.
        webhooks: The kickoff's webhooks again, where they are not this package's own; left out, those that the run was
            opened with in this process.
        call: The name of the call, the same on every retry of it. A call that has answered before answers nothing more.

    Raises:
        AnsweredError: The question has its answer on record, is another one by now, or is being answered.
        CrewLostError: The server does not know the run at this moment. Nothing was sent.
        CrewError: Nothing waits, or nobody knows whether an earlier answer has arrived.
        CrewAPIError, CrewConnectionError: As the server answered, or did not. It is not sent again by itself.
    """
    kickoff_id, record = run.kickoff_id, answers_record(run)
    try:
        before = await records.reviews(record)
        earlier = next((one for one in before if call is not None and one.call == call), None)
        request = None if earlier else await open_request(kickoff_id, before)
    except (httpx.HTTPError, PrefectException) as error:
        raise CrewError(
            f"What run {kickoff_id} asks, and its answers, cannot be read now ({error!r}). Nothing was sent."
        ) from error
    if earlier is not None:
        return _repeat_answer(run, earlier), earlier
    status = await session.call(lambda client: client.status(kickoff_id))
    current = _current_question(run, status, before, request, task_id, question)
    task, shown, number = current.task_id, current.task, len(before) + 1
    if question is not None and not question.is_same_as(current):
        raise AnsweredError(f"Run {kickoff_id}, task {shown}, asks something else by now. Nothing was sent.")
    _refuse_answered(run, before, (question or current).state)
    if round is not None and round != current.round:
        raise CrewError(f"Run {kickoff_id}, task {shown}, is at round {current.round}, not {round}. Nothing was sent.")
    named = waiting_task(status)
    sent = SentReview(
        task_id=shown,
        mark=digest(task),
        round=current.round,
        approve=review.approve,
        feedback=(run.redact_text(review.feedback) or "")[:FEEDBACK_KEPT] if run.show == "full" else "",
        by=by[:100],
        at=utcnow(),
        asked=question_digest(status),
        shown_mark=None if named is None else digest(named),
        call=call,
        request=None if request is None else request.id,
        option=review.option,
    )
    if request is None and webhooks is None and record.has_webhooks:
        webhooks = webhooks_for(
            run.crew, record.idempotency_key, attempt=record.attempt, owner=record.owner, round=number
        )
    await _claim_answer(run, records, record, number, sent)
    # No variable holds the words that are sent: error reporters show the local variables of all frames.
    try:
        if request is not None:
            accepted = await _post_to_callback(run, request, review, by=sent.by)
        else:
            accepted = await session.client.resume(
                kickoff_id, task, review.feedback, review.approve, webhooks=webhooks or run.webhooks
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
        f"nobody knows whether it arrived. It is not sent again automatically: look at the crew's page{page}, and "
        "answer there if the run still waits. Then wait for it again under the same key."
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


def _current_question(
    run: OpenRun,
    status: CrewStatus,
    before: Sequence[SentReview],
    request: FeedbackRequest | None,
    task_id: str | None,
    question: Question | None,
) -> Question:
    """Return what a run asks at this moment, where it can be answered."""
    kickoff_id, label = run.kickoff_id, run.crew.label
    is_over = status.state.ended or status.state is CrewState.UNKNOWN
    if question is not None and status.state is CrewState.UNKNOWN:
        # It may be known again in a moment: what the answer is to is not over.
        raise CrewLostError(kickoff_id=kickoff_id, crew=label, idempotency_key=run.idempotency_key)
    # A request says that somebody is waited for, whatever the status calls it.
    if request is None or is_over:
        if question is not None and status.state is not CrewState.WAITING:
            raise AnsweredError(f"Run {kickoff_id} does not wait any more: it is {status.state}. Nothing was sent.")
        if is_over or (status.state is not CrewState.WAITING and task_id is None):
            raise CrewError(f"Run {kickoff_id} of crew {label} does not wait for a person: it is {status.state}.")
    if question is not None:
        task_id = waiting_task(status) or question.task_id
    current = question_of(
        run, status, before, request, task_id=task_id, next_round_after=run.crew.wait.next_round_after
    )
    if current is None:
        raise CrewError(
            f"Run {kickoff_id} of crew {label} waits, and its status does not name the task. Give it (task_id=…, "
            "--task): the crew's page and the human-input webhook show it."
        )
    return current


def _refuse_answered(run: OpenRun, before: Sequence[SentReview], state: QuestionState) -> None:
    if state is QuestionState.UNCERTAIN:
        raise uncertain_error(run, before[-1])
    if state is QuestionState.ANSWERED:
        last = before[-1]
        raise AnsweredError(
            f"Round {last.round} of run {run.kickoff_id}, task {last.task_id}, was already answered: "
            f"{'approved' if last.approve else 'rejected'} ({_when(last)}), but the crew's server still shows the "
            "same question. Nothing was sent. Look again in a moment: prefect-crew reviews ls."
        )


async def _claim_answer(run: OpenRun, records: RecordStore, record: RunRecord, number: int, sent: SentReview) -> None:
    try:
        is_ours = await records.add_review(record, number, sent)
    except (httpx.HTTPError, PrefectException) as error:
        # It may stand there all the same, and is held then, as one that may have been sent.
        raise CrewError(
            f"The answer to run {run.kickoff_id} could not be put on record, so it was not sent: {error!r}."
        ) from error
    if not is_ours:
        raise AnsweredError(f"Somebody else answers run {run.kickoff_id} at this moment. Nothing was sent.")


async def _write(run: OpenRun, writing: Coroutine[Any, Any, None]) -> None:
    """Write down what became of an answer; if that cannot be done, log it: it was sent, or was not, all the same."""
    try:
        await writing
    except (httpx.HTTPError, PrefectException, CrewError) as error:
        run_logger().warning("What became of the answer to run %s could not be recorded: %s", run.kickoff_id, error)


async def _post_to_callback(run: OpenRun, request: FeedbackRequest, review: Review, *, by: str) -> ResumeAnswer:
    try:
        answer = await post_feedback(
            request,
            feedback_text(request, approve=review.approve, feedback=review.feedback, option=review.option),
            source=by,
            allow_http=run.crew.allow_http,
        )
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
        run_logger().debug("The stored question of run %s could not be removed: %s", run.kickoff_id, error)


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
    run: OpenRun,
    records: RecordStore,
    review: Review,
    *,
    by: str,
    task_id: str | None = None,
    round: int | None = None,  # noqa: A002 - the word of the domain
    webhooks: Webhooks | None = None,
    call: str | None = None,
) -> tuple[ResumeAnswer, SentReview]:
    """Answer for the person that a run waits for, and return the server's answer and what is on record of it.

    Raises:
        CrewError: As `answer_question`, which has the arguments.
    """
    async with CrewSession(run.crew, withhold=run.withholding()) as session:
        return await answer_question(
            run, session, records, review, by=by, task_id=task_id, round=round, webhooks=webhooks, call=call
        )


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
    except (httpx.HTTPError, PrefectException) as error:
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

    @property
    def kickoff_id(self) -> str:
        """The run's id."""
        return str(self.record.kickoff_id)


async def list_pending_reviews(stores: Sequence[RecordStore], crew_of: CrewOf) -> list[PendingReview]:
    """Return the runs in flight that wait for a person, the longest waiting first.

    Each crew's server is asked, where its block is stored; else what the record has counts.

    Raises:
        httpx.HTTPError: The Prefect API is away.
        LedgerError: The ledger of a batch cannot be read.
    """
    gate, requests = asyncio.Semaphore(AT_ONCE), await _requests_by_run()

    async def look(record: RunRecord, store: RecordStore) -> PendingReview | None:
        async with gate:
            return await read_pending_review(record, store, crew_of, requests)

    looks = [look(record, store) for store in stores async for record in store.may_ask()]
    found = [asked for asked in await asyncio.gather(*looks) if asked is not None]
    return sorted(found, key=lambda asked: asked.since or asked.record.kicked_off_at or asked.record.claimed_at)


async def _requests_by_run() -> dict[str, FeedbackRequest]:
    return {one.kickoff_id: one for one in await kept_requests()}


async def read_pending_review(
    record: RunRecord,
    records: RecordStore,
    crew_of: CrewOf,
    requests: Mapping[str, FeedbackRequest] | None = None,
) -> PendingReview | None:
    """Return what a run in flight asks, None if it asks nothing. `requests` are what all Flows ask, by kickoff id.

    Raises:
        httpx.HTTPError, PrefectException: The Prefect API is away or refuses.
    """
    kickoff_id, crew = str(record.kickoff_id), await crew_of(record)
    requests = await _requests_by_run() if requests is None else requests
    run = None if crew is None else OpenRun(crew=crew, kickoff_id=kickoff_id, record=record)
    status = None if run is None else await _status(run)
    waits = record.human_since is not None if status is None else status.state is CrewState.WAITING
    is_over = status is not None and (status.state.ended or status.state is CrewState.UNKNOWN)
    request = None if is_over else requests.get(kickoff_id)
    if not waits and request is None:
        return None
    answers = tuple(await records.reviews(record))
    if request is not None and request_state(answers, request) is QuestionState.ANSWERED:
        request = None
    if not waits and request is None:
        return None
    seen = run is not None and (status is not None or request is not None)
    task_id = record.human_task if request is None else request.task_id
    number = 1 if task_id is None else next_round(answers, task_id)
    output, withheld = None, "its crew's server was not asked. Look at the crew's page, or give --crew."
    if run is not None and seen:
        status = status or CrewStatus(kickoff_id=kickoff_id, state=CrewState.WAITING)
        question = question_of(run, status, answers, request, next_round_after=None)
        task_id, number = (None, 1) if question is None else (question.task, question.round)
        output, withheld = await _shown(run, status, question, len(answers))
    options = () if request is None else request.options
    return PendingReview(record, task_id, number, record.human_since, output, withheld, answers, seen, options)


async def _status(run: OpenRun) -> CrewStatus | None:
    try:
        async with CrewSession(run.crew, withhold=run.withholding()) as session:
            return await session.call(lambda client: client.status(run.kickoff_id))
    except CrewError:
        return None  # then what is on record has to do


async def _shown(
    run: OpenRun, status: CrewStatus, question: Question | None, answers: int
) -> tuple[str | None, str | None]:
    """Return what is to be judged as it may be shown, else why it is not."""
    output, where = judged_output(status) if question is None else question.output, where_to_look(run)
    is_known = question is not None and (question.asked is not None or question.request is not None)
    if not is_known and run.record is not None and run.record.has_webhooks:
        output = await kept_output(run.record, answers) or output
    if output is not None and run.show == "full":
        return run.redact(output), None
    if output is not None:
        return None, f"{len(output):,} characters that this crew does not show. {where}"
    so_far = outputs_so_far(status) if run.show == "full" else None
    others = "" if so_far is None else f" Other tasks gave:\n\n{run.redact(so_far)}"
    return None, f"the status does not show it. {where}{others}"


async def find_run_in_flight(name: str, stores: Sequence[RecordStore]) -> tuple[RunRecord, RecordStore]:
    """Return the run in flight that an idempotency key, a kickoff id or the beginning of one names, and where it is on
    record.

    Raises:
        CrewError: There is none, several begin so, or it has ended.
    """
    named = await _named(name, stores)
    if named is None:
        raise CrewError(f"No run in flight is {name!r}. prefect-crew reviews ls lists those that wait for a person.")
    record = named[0]
    if record.phase is RecordPhase.ENDED:
        raise CrewError(f"Run {record.idempotency_key!r} does not wait for a person: it has ended ({record.state}).")
    if record.phase is not RecordPhase.STARTED or record.kickoff_id is None:
        raise CrewError(f"Run {record.idempotency_key!r} does not wait for a person: its kickoff is {record.phase}.")
    return named


async def _named(name: str, stores: Sequence[RecordStore]) -> tuple[RunRecord, RecordStore] | None:
    for store in stores:
        if attempts := await store.attempts(name):
            return attempts[-1], store
    for store in stores:
        record = await store.of_kickoff(name)
        # A ledger knows the runs of all batches that are kept in it.
        if record is not None and await store.attempts(record.idempotency_key):
            return record, store
    found = [
        (one, store)
        for store in stores
        async for one in store.may_ask()
        if str(one.kickoff_id).startswith(name) or one.idempotency_key.startswith(name)
    ]
    if len(found) > 1:
        ids = ", ".join(str(one.kickoff_id) for one, _ in found[:5])
        raise CrewError(f"{len(found)} runs in flight begin with {name!r}: {ids}. Give more of it.")
    return found[0] if found else None
