"""Answers to the questions of runs. Only this module sends answers, and it sends one answer to each question.

A function, the form, a task and the command line turn a question into an answer. `answer_question` stores the answer,
sends it and stores whether it arrived. It never repeats `/resume`: a second answer might go to the next question.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from prefect.client.orchestration import get_client

from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, naming_prefect_errors
from prefect_crew._text import one_line
from prefect_crew.artifacts.events import emit
from prefect_crew.client._callbacks import post_answer
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.client._transport import encoded_id
from prefect_crew.client.models import CrewStatus, ResumeAnswer, Review, ReviewRequest
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, WaitPolicy
from prefect_crew.exceptions import (
    AlreadyAnsweredError,
    AnswerUncertainError,
    ConfigurationError,
    CrewAPIError,
    CrewError,
    CrewLostError,
    NotWaitingError,
    RunNotFoundError,
)
from prefect_crew.records.decision import latest_start
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, utcnow
from prefect_crew.records.notes import forget_question, kept_note, kept_questions
from prefect_crew.records.resolve import check_unused
from prefect_crew.runs.reviews.questions import (
    describe_answer,
    digest,
    is_same_question,
    next_round,
    output_digest,
    question_of,
    waiting_task,
    where_to_look,
)
from prefect_crew.runs.run import LiveRun, answers_record, goes_on_as, read_record, read_status
from prefect_crew.states import CrewState
from prefect_crew.webhooks import webhooks_for

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks

FEEDBACK_KEPT = 200  # characters of a feedback that are stored
MAX_NAME = 100  # characters of the giver's name
LOOKS, LOOK_AGAIN = 5, 1.0
"""The number of status calls, and the seconds between them, by which a caller without a wait checks that the crew
continues after its answer."""
ASKS = "prefect-crew-batch-asks"
"""The tag on the Variable of a batch of which some rows wait for people, or did at the last look."""
AT_ONCE = 8  # status calls at a time
REFUSALS = (400, 404, 409)
"""Status codes of `/resume` if the run does not wait, or does not wait for this answer."""
REFUSALS_OF_FLOWS = (401, 403, 404, 409, 410)
"""Status codes of a callback URL if its token is used up or invalid."""
NO_WEBHOOKS = (
    "After this answer run %s sends no webhooks: each answer has to ask for them again, and this process has no "
    "PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL. Waits of the run go on polling, and its next question may come without the "
    "output to judge: look at the crew's page. Before the next answer, set the URL and "
    "PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET here."
)
CrewOf = Callable[[RunRecord], Awaitable[Crew | None]]  # None if a record's crew is not a stored block


# One answer


async def answer_question(
    run: LiveRun,
    review: Review,
    *,
    question: ReviewRequest | None = None,
    task_id: str | None = None,
    round: int | None = None,  # noqa: A002 - the word of the domain
    webhooks: Webhooks | None = None,
    call: str | None = None,
    nonce: str | None = None,
    looks: int = LOOKS,
) -> tuple[ResumeAnswer, Review]:
    """Answer the question that a run asks at this moment, once.

    This reads the answers on record before the status, and creates the new answer under the next number. If somebody
    has answered in between, that number is taken, so that no answer goes to a question that its giver has not seen.
    With `round`, this answers only the question with that number.

    Args:
        run: The run, in an open session.
        review: The answer, with its giver.
        question: The question that a wait has seen. Another question is not answered.
        task_id: The task; default: the task in the status. With a task, the run counts as waiting whatever its status
            says: not every server reports a wait.
        webhooks: The kickoff's webhooks, if they are not this package's own; default: the webhooks of the run's request
            in this process.
        call: The name of the call, the same on each of its retries. A call that has answered sends no other answer.
        nonce: The name of this attempt to answer. Pass it again after a PrefectAwayError: the answer may be on record.
        looks: The number of status calls by which this checks that the crew continues. A wait looks again by itself.

    Returns:
        The server's answer, and the stored answer.

    Raises:
        AlreadyAnsweredError: The question has its answer on record, the run asks another question, or somebody answers
            now.
        CrewLostError: The server does not know the run at this moment. Nothing was sent.
        PrefectAwayError: The Prefect API does not answer. Nothing was sent.
        CrewError: The run does not wait, or the Prefect API refuses.
        AnswerUncertainError: This answer, or an earlier one, was sent, and nobody knows whether it arrived.
        CrewAPIError, CrewConnectionError: The server refused the answer, or the answer surely did not arrive.
    """
    with naming_prefect_errors(_unsent(run, review, "the earlier answers cannot be read")):
        answers = await run.records.reviews(answers_record(run))
        if earlier := next((answer for answer in answers if call is not None and answer.call == call), None):
            return _repeat_answer(run, earlier), earlier
        if answers and answers[-1].nonce == nonce and answers[-1].outcome == "intended":
            answers.pop()  # this attempt has stored the answer and has not sent it
        of_flow = await open_question_of_flow(run.kickoff_id, answers)
    status = await read_status(run)
    current = _question_to_answer(run, status, answers, of_flow, task_id, question)
    where = f"Run {run.kickoff_id}, task {run.redact_name(current.task_id)},"
    if round is not None and round != current.round:
        raise AlreadyAnsweredError(f"{where} asks question {current.round}, not {round}. Nothing was sent.")
    _check_unanswered(run, where, current, question or current)
    written = _to_write_down(run, status, current, review).model_copy(
        update={"call": call, "nonce": nonce or uuid4().hex}
    )
    return await _send_answer(run, current, review, written, webhooks, looks)


def _to_write_down(run: LiveRun, status: CrewStatus, question: ReviewRequest, review: Review) -> Review:
    """Return an answer for storage: masked, and with the facts that distinguish its question from the next."""
    task = waiting_task(status)
    return review.model_copy(
        update={
            "feedback": run.redact_text(review.feedback)[:FEEDBACK_KEPT] if run.show == "full" else "",
            "option": review.option and run.redact(review.option),
            "by": run.redact(one_line(review.by))[:MAX_NAME],
            "at": utcnow(),
            "task_id": run.redact_name(question.task_id),
            "round": question.round,
            "task_digest": digest(question.task_id),
            "shown_task_digest": None if task is None else digest(task),
            "output_digest": output_digest(status),
            "question_id": question.id,
            # A caller may pass a `Review` that was sent before: its outcome does not apply to this answer.
            "outcome": "intended",
            "moved_on": False,
        }
    )


async def _send_answer(
    run: LiveRun,
    question: ReviewRequest,
    review: Review,
    written: Review,
    webhooks: Webhooks | None,
    looks: int,
) -> tuple[ResumeAnswer, Review]:
    """Store an answer, send it, and store whether it arrived and whether the crew continues. Only this function sends
    answers."""
    records, record, number = run.records, answers_record(run), len(question.answers) + 1
    with naming_prefect_errors(_unsent(run, review, "this answer cannot be stored")):
        is_ours = await records.add_review(record, number, written)
    if not is_ours:
        raise AlreadyAnsweredError(f"Somebody else answers run {run.kickoff_id} at this moment. Nothing was sent.")
    try:
        accepted = await _post(run, question, review, number, webhooks)
    except BaseException as error:
        if kickoff_fate(error) is KickoffFate.UNCERTAIN:
            await _note(run, records.save_review(record, number, written.model_copy(update={"outcome": "uncertain"})))
            if isinstance(error, CrewError):
                raise uncertain_error(run, written) from error
        else:
            await _note(run, records.remove_review(record, number, written))
        raise
    new_id = accepted.kickoff_id if question.callback_url is None and accepted.kickoff_id != run.current_id else None
    written = written.model_copy(update={"outcome": "sent", "continued_as": new_id})
    goes_on_as(run, new_id or run.current_id)
    # At once, since a fast crew soon asks again.
    looking = asyncio.ensure_future(_has_moved_on(run, looks))
    try:
        await _note(run, records.save_review(record, number, written))
        if run.record is not None:
            facts = written.model_dump(include={"task_id", "round", "approve", "by"})
            emit("reviewed", run.record, **facts)
        if await looking:
            written = written.model_copy(update={"moved_on": True})
            await _note(run, records.save_review(record, number, written))
    finally:
        await cancel_and_wait(looking)
    return accepted, written


async def _post(
    run: LiveRun, question: ReviewRequest, review: Review, number: int, webhooks: Webhooks | None
) -> ResumeAnswer:
    """Send an answer once: to the callback URL of a Flow's question, else to `/resume`."""
    if question.callback_url is None:
        if webhooks is None and answers_record(run).has_webhooks:
            # Without the request, this process does not know the policy of the run.
            wait = WaitPolicy(timeout=None, human_timeout=None) if run.request is None else run.request.options.wait
            webhooks = webhooks_for(run.crew, answers_record(run), round=number, wait=wait)
            if webhooks is None:
                run_logger().warning(NO_WEBHOOKS, run.kickoff_id)
        if webhooks is None and run.request is not None:
            webhooks = run.request.options.webhooks
        return await run.session.client.resume(
            run.current_id, question.task_id, review.feedback, review.approve, webhooks=webhooks
        )
    try:
        answer = await post_answer(question, review, allow_http=run.crew.allow_http)
    except CrewAPIError as error:
        if is_refusal(question, error):
            await _note(run, forget_question(question))
        raise
    await _note(run, forget_question(question))
    return answer


def is_refusal(question: ReviewRequest, error: CrewAPIError) -> bool:
    """Return whether an error means that the question takes no answer: it has one, or the run does not wait."""
    return error.status_code in (REFUSALS if question.callback_url is None else REFUSALS_OF_FLOWS)


async def _note(run: LiveRun, writing: Coroutine[Any, Any, None]) -> None:
    """Await a write of an answer's outcome, and log its error, which does not change whether the answer was sent."""
    try:
        await writing
    except (*PREFECT_ERRORS, CrewError) as error:
        run_logger().warning("The outcome of the answer to run %s could not be recorded: %s", run.kickoff_id, error)


async def _has_moved_on(run: LiveRun, looks: int) -> bool:
    """Return whether one of `looks` status calls shows that the crew continues. Then an equal question is a new one."""
    for look in range(looks):
        if look:
            await asyncio.sleep(LOOK_AGAIN)
        try:
            state = (await run.session.client.status(run.current_id)).state
        except CrewError as error:
            run_logger().debug("It is not known whether run %s continues: %s", run.kickoff_id, error)
            return False
        if state is not CrewState.WAITING:
            return state is not CrewState.UNKNOWN
    return False


# The question at this moment


async def current_question(run: LiveRun) -> ReviewRequest:
    """Return the question that a run asks at this moment, unmasked. Output that its status lacks is the webhook's.

    Raises:
        NotWaitingError: The run asks none.
        CrewError: The status names no task, or the crew's server or the Prefect API does not answer, or refuses.
    """
    with naming_prefect_errors(f"The question of run {run.kickoff_id} cannot be read. Nothing was sent."):
        answers = await run.records.reviews(answers_record(run))
        of_flow = await open_question_of_flow(run.kickoff_id, answers)
    status = await read_status(run)
    question = _question_to_answer(run, status, answers, of_flow, None, None)
    with naming_prefect_errors(f"The output of run {run.kickoff_id} cannot be read. Nothing was sent."):
        return await with_kept_output(run, question)


async def open_question_of_flow(kickoff_id: str, answers: Sequence[Review]) -> ReviewRequest | None:
    """Return the question of a Flow that a webhook brought; None if there is none, or its answer was sent.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached or refuses.
    """
    question = (await kept_questions(kickoff_id)).get(kickoff_id)
    return None if question is None or _is_sent(question, answers) else question


def _is_sent(question: ReviewRequest, answers: Sequence[Review]) -> bool:
    return any(answer.question_id == question.id and answer.outcome == "sent" for answer in answers)


async def with_kept_output(run: LiveRun, question: ReviewRequest) -> ReviewRequest:
    """Return a question with the output that its webhook brought, if the status does not show the output.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached or refuses.
    """
    if question.output_digest or question.id or run.record is None or not run.record.has_webhooks:
        return question
    output = (await kept_note(run.record, len(question.answers))).output
    return question if output is None else question.model_copy(update={"output": output})


def _unsent(run: LiveRun, review: Review, reason: str) -> str:
    return (
        f"Nothing was sent: the answer of {review.by} to run {run.kickoff_id} of crew {run.crew.label} has to be on "
        f"record first, and {reason}. Once the cause is gone, answer again, or wait for the run again under its key."
    )


def uncertain_error(run: LiveRun, last: Review) -> CrewError:
    """Return the error about an answer that may have arrived: it is not sent again, and a person has to look."""
    return AnswerUncertainError(
        f"The answer to run {run.kickoff_id}, task {last.task_id}, question {last.round} (by {describe_answer(last)}) "
        f"was sent and nobody knows whether it arrived. It is not sent again automatically. {where_to_look(run)} If "
        "the run still waits, answer on that page. If it goes on under another id, run: prefect-crew runs resolve "
        f"{shlex.quote(answers_record(run).idempotency_key)} --kickoff-id ID. Then wait for the run again under the "
        "same key."
    )


def _repeat_answer(run: LiveRun, earlier: Review) -> ResumeAnswer:
    """Return an answer of the server for a call that has answered in an earlier attempt."""
    if earlier.outcome != "sent":
        raise uncertain_error(run, earlier)
    message = f"Question {earlier.round} of task {earlier.task_id} was answered by an earlier attempt of this call."
    run_logger().info("Crew run %s: %s Nothing was sent.", run.kickoff_id, message)
    return ResumeAnswer(kickoff_id=run.kickoff_id, message=message)


def _question_to_answer(
    run: LiveRun,
    status: CrewStatus,
    answers: Sequence[Review],
    of_flow: ReviewRequest | None,
    task_id: str | None,
    last_seen: ReviewRequest | None,
) -> ReviewRequest:
    """Return the question that a run asks at this moment. Raise if it asks none, or another one than `last_seen`."""
    kickoff_id, label, state = run.kickoff_id, run.crew.label, status.state
    # A hosted crew that waits is not known to the status call: a person who names its task knows more.
    is_over = state.ended or (state is CrewState.UNKNOWN and task_id is None)
    # A Flow that has asked waits, whatever its status says.
    waits = state is CrewState.WAITING or (of_flow is not None and not is_over)
    if last_seen is not None:
        if state is CrewState.UNKNOWN:  # it may be known again in a moment: the question may still be open
            raise CrewLostError(**run.names)
        if not waits:
            raise AlreadyAnsweredError(f"Run {kickoff_id} does not wait any more: it is {state}. Nothing was sent.")
        task_id = waiting_task(status) or last_seen.task_id
    elif is_over or not (waits or task_id):
        raise NotWaitingError(f"Run {kickoff_id} of crew {label} does not wait for a person: it is {state}.")
    current = question_of(run, status, answers, of_flow, task_id=task_id)
    if current is None:
        raise ConfigurationError(
            f"Run {kickoff_id} of crew {label} waits, but its status does not name the task. Give it (task_id=…, "
            "--task); the crew's page and the human-input webhook show it."
        )
    if last_seen is not None and not is_same_question(last_seen, current):
        task = run.redact_name(current.task_id)
        raise AlreadyAnsweredError(f"Run {kickoff_id}, task {task}, asks another question by now. Nothing was sent.")
    return current


def _check_unanswered(run: LiveRun, where: str, current: ReviewRequest, last_seen: ReviewRequest) -> None:
    """Raise if a question has its answer, or may have it."""
    if last_seen.state == "open":
        return
    last = current.answers[-1]
    if last_seen.state == "uncertain":
        raise uncertain_error(run, last)
    # If nothing else distinguishes this question from the answered one, people may answer it after a while.
    if not last.is_older_than(run.crew.wait.next_round_after, utcnow()):
        raise AlreadyAnsweredError(
            f"{where} question {last.round} was already {'approved' if last.approve else 'rejected'} (by "
            f"{describe_answer(last)}), but the crew's server still shows the same question. Nothing was sent. Look "
            "again in a moment: prefect-crew reviews ls."
        )


# An answer that may have arrived


async def answer_without_id(name: str, records: RecordStore) -> RunRecord | None:
    """Return the run in flight of a key or id to whose last answer nobody knows the reply; None if there is none."""
    attempts = await records.attempts(name)
    record = (latest_start(attempts) or attempts[-1]) if attempts else await records.of_kickoff(name)
    if record is None or record.phase is not RecordPhase.STARTED:
        return None
    answers = await records.reviews(record)
    return record if answers and answers[-1].outcome != "sent" else None


async def resolve_answer(
    record: RunRecord,
    kickoff_id: str,
    records: RecordStore,
    *,
    look: Callable[[str], Awaitable[CrewStatus]] | None = None,
) -> CrewState | None:
    """Store that the last answer arrived, and that the run goes on as `kickoff_id`. Return its state, None without
    `look`.

    Raises:
        ConfigurationError: The crew's server does not know the id, or it is another run's. Nothing is changed.
    """
    await check_unused(encoded_id(kickoff_id) and kickoff_id, record, records)
    state = None if look is None else (await look(kickoff_id)).state
    if state is CrewState.UNKNOWN:
        raise ConfigurationError(
            f"The server of crew {record.crew} does not know run {kickoff_id}. Nothing was changed."
        )
    answers = await records.reviews(record)
    new_id = None if kickoff_id == record.kickoff_id else kickoff_id
    sent = answers[-1].model_copy(update={"outcome": "sent", "continued_as": new_id, "moved_on": True})
    await records.save_review(record, len(answers), sent)
    return state


# Answering from outside of a wait


async def answer_run(run: LiveRun, review: Review, **options: Any) -> tuple[ResumeAnswer, Review]:
    """Answer the question of a run whose session is not open. The options are those of `answer_question`."""
    with withholding(run.redact_text):
        async with run.session:
            return await answer_question(run, review, **options)


async def resume_run(
    run: LiveRun,
    *,
    feedback: str,
    approve: bool,
    task_id: str | None = None,
    webhooks: Webhooks | None = None,
    call: str | None = None,
) -> ResumeAnswer:
    """Approve the output of a run, or reject it with feedback. The run may have no record.

    `answer_question` explains the other arguments.

    Raises:
        CrewError: The errors of `answer_question`. Or the run may be a row of a batch.
    """
    await read_record(run)
    if run.record is None:
        await _refuse_row_of_batch(run)
    review = Review(approve=approve, feedback=feedback, by="resume_crew")
    answer, _ = await answer_run(run, review, task_id=task_id, webhooks=webhooks, call=call)
    return answer


async def _refuse_row_of_batch(run: LiveRun) -> None:
    """Raise if a run without a record may be a row of a batch: the ledger of a batch stores the answers to its rows."""
    filter_ = {"variables": {"tags": {"all_": [ASKS]}}, "limit": 200}
    with naming_prefect_errors(
        f"Nothing was sent: run {run.kickoff_id} may be a row of a batch. Answer again once the Prefect API answers."
    ):
        async with get_client() as client:
            batches = (await client.request("POST", "/variables/filter", json=filter_)).json()
    for batch in [variable["value"] for variable in batches]:
        if batch.get("crew_url", run.crew.url) == run.crew.url:
            raise RunNotFoundError(
                name=run.kickoff_id,
                advice=f"The run may be a row of batch {batch.get('batch')!r}, so nothing was sent. Answer a row with "
                f"prefect-crew reviews approve {shlex.quote(run.kickoff_id)}, or reject; any other run on the crew's "
                "own page.",
            )


# The runs that wait for people


async def list_open_questions(stores: Sequence[RecordStore], crew_of: CrewOf) -> list[tuple[RunRecord, ReviewRequest]]:
    """Return the runs in flight that wait for a person, each with its question, the longest waiting first.

    If the crew is a stored block, its server is asked for the status; else the record decides.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached or refuses.
        LedgerError: The ledger of a batch cannot be read.
    """
    gate = asyncio.Semaphore(AT_ONCE)
    runs = [(record, store) for store in stores async for record in store.may_ask()]
    of_flows = await kept_questions(*(str(record.kickoff_id) for record, _ in runs))

    async def look(record: RunRecord, store: RecordStore) -> tuple[RunRecord, ReviewRequest] | None:
        async with gate:
            question = await read_question(record, store, crew_of, of_flows.get(str(record.kickoff_id)))
            return None if question is None else (record, question)

    waiting = [run for run in await asyncio.gather(*(look(*run) for run in runs)) if run is not None]

    def since(run: tuple[RunRecord, ReviewRequest]) -> Any:
        return run[0].human_since or run[0].kicked_off_at or run[0].claimed_at

    return sorted(waiting, key=since)


async def read_question(
    record: RunRecord, records: RecordStore, crew_of: CrewOf, of_flow: ReviewRequest | None
) -> ReviewRequest | None:
    """Return the question of a run in flight, masked for people, None if the run asks none.

    The task is "" if it is unknown. `of_flow` is the stored question of a Flow.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached or refuses.
    """
    kickoff_id, crew = str(record.kickoff_id), await crew_of(record)
    run = None if crew is None else LiveRun(crew, kickoff_id, record)
    status = None
    if run is not None:
        # If the server does not answer, only the record counts.
        with contextlib.suppress(CrewError), withholding(run.redact_text):
            async with run.session:
                status = await read_status(run)
    waits = record.human_since is not None if status is None else status.state is CrewState.WAITING
    is_over = status is not None and (status.state.ended or status.state is CrewState.UNKNOWN)
    if is_over or not (waits or of_flow):
        return None
    answers = tuple(await records.reviews(record))
    if of_flow is not None and _is_sent(of_flow, answers):
        of_flow = None
    if not waits and of_flow is None:
        return None
    question = None if run is None or status is None else question_of(run, status, answers, of_flow)
    if run is None or status is None or question is None:
        task_id = "" if status is not None else record.human_task if of_flow is None else of_flow.task_id
        withheld = "its crew's server was not asked. Look at the crew's page, or give --crew."
        if run is not None and status is not None:
            withheld = f"the status does not name the task. {where_to_look(run)}"
        return ReviewRequest(
            kickoff_id=kickoff_id,
            task_id=task_id or "",
            round=next_round(answers, task_id) if task_id else 1,
            answers=answers,
            options=() if of_flow is None else of_flow.options,
            withheld=withheld,
        )
    question = await with_kept_output(run, question)
    changes: dict[str, Any] = dict.fromkeys(("output", "message", "meta", "callback_url"))
    changes["task_id"] = run.redact_name(question.task_id)
    if question.output is None:
        changes["withheld"] = f"the status does not show it. {where_to_look(run)}"
    elif run.show != "full":
        count = len(question.output)
        changes["withheld"] = f"{count:,} characters that this crew does not show. {where_to_look(run)}"
    else:
        changes["output"] = run.redact(question.output)
    return question.model_copy(update=changes)


async def find_run_in_flight(name: str, stores: Sequence[RecordStore]) -> tuple[RunRecord, RecordStore]:
    """Return the run in flight of an idempotency key or a kickoff id, and the store that has its record.

    Raises:
        CrewError: There is no such run, it has ended, or its record has no kickoff id.
    """
    for store in stores:
        attempts = await store.attempts(name)
        record = latest_start(attempts) or attempts[-1] if attempts else await store.of_kickoff(name)
        # A ledger finds a kickoff id among the runs of all its batches, also of other batches than this store's.
        if record is None or not (attempts or await store.attempts(record.idempotency_key)):
            continue
        if record.phase is not RecordPhase.STARTED or record.kickoff_id is None:
            has_ended = record.phase is RecordPhase.ENDED
            why = f"it has ended ({record.state})" if has_ended else f"its kickoff is {record.phase}"
            raise NotWaitingError(f"Run {record.idempotency_key!r} does not wait for a person: {why}.")
        return record, store
    raise RunNotFoundError(name=name, listing="prefect-crew reviews ls")
