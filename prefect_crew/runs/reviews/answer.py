"""Answers to the questions of runs. Only this module sends answers, and it sends one answer to each question.

A function, the form, a link, a task and the command line turn a question into an answer. `answer_question` writes the
answer, takes the right to send it, sends it and writes that. It never repeats `/resume`: a second answer might go to
the next question.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from prefect_crew._internal.asyncio_tasks import OwnTask
from prefect_crew._internal.clock import utcnow
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew._internal.prefect_errors import PREFECT_ERRORS, naming_prefect_errors
from prefect_crew._text import one_line
from prefect_crew.artifacts.events import emit
from prefect_crew.client._callbacks import FlowQuestion, post_answer
from prefect_crew.client._retry_safety import POST_DEADLINE, KickoffFate, kickoff_fate
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
)
from prefect_crew.runs.database import in_store
from prefect_crew.runs.resolve import find_attempts, latest
from prefect_crew.runs.reviews.callbacks import forget_callback, read_callback
from prefect_crew.runs.reviews.questions import (
    MOST_TEXT,
    Asked,
    describe_answer,
    is_over,
    judged_output,
    marks_of,
    masked_request,
    request_of,
    reviews_of,
    round_of,
    shown_output,
    state_of,
    waiting_task,
    where_to_look,
)
from prefect_crew.runs.run import LiveRun, goes_on_as, read_attempt, read_status
from prefect_crew.states import CrewState
from prefect_crew.store import attempts, questions
from prefect_crew.store.decision import Attempt, AttemptState
from prefect_crew.store.questions import FLOW, Question
from prefect_crew.webhooks import webhooks_for

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks

MAX_NAME = 100
"""Characters of the giver's name."""
MOST_FEEDBACK = 20_000
"""Characters of a feedback that is stored."""
LOOKS, LOOK_AGAIN = 5, 1.0
"""The number of status calls, and the seconds between them, by which a caller without a wait checks that the crew
continues after its answer."""
SEND_WITHIN = 10.0
"""Seconds for which a cancelled caller waits for the answer to its POST."""
AT_ONCE = 8
"""Status calls at a time."""
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
CrewOf = Callable[[Attempt], Awaitable[Crew | None]]  # None if an attempt's crew is not a stored block


# The question at this moment


async def look(
    run: LiveRun, status: CrewStatus, *, after: float | None, if_approved: bool = True, task_id: str | None = None
) -> Asked | None:
    """Return the question that a run on record asks at a status, and write it if it is new. None if it asks nothing.

    With a `task_id`, the run counts as waiting: not every server reports a wait. `after`, `if_approved`: see `is_over`.

    Raises:
        StoreError, PREFECT_ERRORS: The crew database cannot be used.
    """
    assert run.attempt is not None  # noqa: S101  the callers looked
    now, attempt, rows = await in_store(questions.look, run.attempt.id)
    goes_on_as(run, attempt or run.attempt)
    last, before = rows[-1] if rows else None, rows[-2] if len(rows) > 1 else None
    is_alive = not status.state.ended and status.state is not CrewState.UNKNOWN
    asks_by_callback = last is not None and FLOW in last.marks and last.answer is None and is_alive
    named = task_id is not None and not status.state.ended
    if not (status.state is CrewState.WAITING or asks_by_callback or named):
        if last is not None and state_of(last, now) == "uncertain" and status.state is not CrewState.UNKNOWN:
            await in_store(questions.sent, last.id)  # the crew has moved on, so the answer arrived
        return None
    if named and waiting_task(status) is None:
        status = status.model_copy(update={"human_task_id": task_id})
    marks, output, task = marks_of(status), shown_output(status), task_id or waiting_task(status)
    text = None if output is None else run.redact(output)
    is_stored = text is not None and may_store(run) and len(text) <= MOST_TEXT
    is_name = task is not None and run.redact_name(task) == task
    facts = {"task": task if is_name else None, "text": text if is_stored else None}
    number = 1
    if last is not None:
        number = last.number + is_over(last, run.attempt, now, after, if_approved=if_approved)
    is_known = last is not None and number == last.number and questions.is_same(last.marks, marks)
    if last is None or not is_known or (not asks_by_callback and questions.new_facts(last, before, marks, facts)):
        last = await in_store(questions.ask, run.attempt, number, marks=marks, **facts)
        rows = await in_store(questions.questions_of, run.attempt.id)
    answer: dict[str, Any] = last.answer or {}
    if state_of(last, now) == "left" and "withheld" in answer:  # nobody else has its text: it is asked once more
        sender = uuid4().hex
        if await in_store(questions.send, last.id, sender, 0.0):
            await in_store(questions.not_sent, last.id, sender)
            return await look(run, status, after=after, if_approved=if_approved, task_id=task_id)
    is_of_it = FLOW not in last.marks and marks.items() <= last.marks.items()
    task = last.task if FLOW in last.marks else waiting_task(status) or last.task
    return Asked(last, state_of(last, now), rows, task or task_id, judged_output(status) if is_of_it else None, now)


def may_store(run: LiveRun) -> bool:
    """Return whether the crew database may have texts of a run."""
    return run.show == "full" and not (run.attempt is not None and run.attempt.secret_names)


# One answer


async def answer_question(
    run: LiveRun,
    review: Review,
    *,
    seen: ReviewRequest | None = None,
    task_id: str | None = None,
    round: int | None = None,  # noqa: A002 - the word of the domain
    webhooks: Webhooks | None = None,
    call: str | None = None,
    looks: int = LOOKS,
) -> tuple[ResumeAnswer, Review]:
    """Answer the question that a run on record asks at this moment, once. Return the server's answer, and the answer on
    record.

    Args:
        run: The run, in an open session.
        review: The answer, with its giver.
        seen: The question that the giver has seen. No other question is answered.
        task_id: The task; default: the task in the status. With a task, the run counts as waiting whatever its status
            says.
        round: The number of the question about its task; no other is answered.
        webhooks: The kickoff's webhooks, if they are not this package's own; default: those of the run's request.
        call: The name of the call, the same on each of its retries. A call that has answered sends no other answer.
        looks: The number of status calls by which this checks that the crew continues. A wait looks by itself.

    Raises:
        AlreadyAnsweredError: The question has its answer, or the run asks another one, or none any more.
        CrewLostError: The server does not know the run at this moment. Nothing was sent.
        StoreError, PREFECT_ERRORS: The crew database cannot be used. Nothing was sent.
        CrewError: The run does not wait.
        AnswerUncertainError: This answer, or an earlier one, was sent, and nobody knows whether it arrived.
        CrewAPIError, CrewConnectionError: The server refused the answer, or the answer surely did not arrive.
    """
    assert run.attempt is not None  # noqa: S101  the callers looked
    if call is not None:
        now, _, rows = await in_store(questions.look, run.attempt.id)
        answers = zip([row.answer for row in rows if row.answer is not None], reviews_of(rows, now), strict=True)
        own = next((review for answer, review in answers if answer.get("call") == call), None)
        if own is not None and own.outcome != "intended":
            return _repeat_answer(run, own), own
    asked = await _question_to_answer(run, seen, task_id, round)
    question, where = asked.question, _where(run, asked)
    if asked.state == "left":
        left, answer = await send_left(run, asked), question.answer
        if left is not None and call is not None and answer.get("call") == call:
            return _repeat_answer(run, left), left
    if asked.state != "open":
        raise _answered(asked, where, run)
    is_stored = may_store(run) and len(review.feedback) <= MOST_FEEDBACK and not run.redact.hides(review.feedback)
    stored = {"approve": review.approve, "option": review.option and run.redact(review.option), "call": call}
    task = asked.task or ""
    stored |= {"feedback": review.feedback} if is_stored else {"withheld": True}
    stored |= {"task": task} if run.redact_name(task) == task else {}
    by = run.redact(one_line(review.by))[:MAX_NAME]
    if not await in_store(questions.answer, question.id, stored, by):
        raise AlreadyAnsweredError(f"{where} was answered by somebody else at this moment. Nothing was sent.")
    return await _send(run, asked, review, webhooks, looks)


async def _question_to_answer(
    run: LiveRun,
    seen: ReviewRequest | None,
    task_id: str | None,
    round: int | None,  # noqa: A002 - the word of the domain
) -> Asked:
    """Return the question that a run asks at this moment, with its task. Raise if it asks none, or another one."""
    status = await read_status(run)
    asked = await look(run, status, after=run.crew.wait.next_round_after, task_id=task_id)
    if asked is None and seen is None:
        raise NotWaitingError(
            f"Run {run.kickoff_id} of crew {run.crew.label} does not wait for a person: it is {status.state}."
        )
    if asked is None and status.state is CrewState.UNKNOWN:  # it may be known again in a moment
        raise CrewLostError(**run.names)
    if asked is None:
        raise AlreadyAnsweredError(
            f"Run {run.kickoff_id} does not wait any more: it is {status.state}. Nothing was sent."
        )
    question, number, where = asked.question, round_of(asked.question, asked.questions), _where(run, asked)
    if seen is not None and (seen.id, seen.options) != (question.id, tuple(question.options or ())):
        raise AlreadyAnsweredError(f"{where} asks another question by now. Nothing was sent.")
    if round not in (None, number):
        raise AlreadyAnsweredError(f"{where} asks question {number}, not {round}. Nothing was sent.")
    if not asked.task:
        raise ConfigurationError(
            f"Run {run.kickoff_id} of crew {run.crew.label} waits, but its status does not name the task. Give it "
            "(task_id=…, --task); the crew's page and the human-input webhook show it."
        )
    return asked


def _where(run: LiveRun, asked: Asked) -> str:
    return f"Run {run.kickoff_id}, task {run.redact_name(asked.task or '')},"


async def send_left(run: LiveRun, asked: Asked) -> Review | None:
    """Send an answer that its giver left behind, as a process that died. Return it, None if somebody else sends it."""
    answer = asked.question.answer
    review = Review(
        approve=answer["approve"],
        feedback=answer.get("feedback") or "",
        option=answer.get("option"),
        by=asked.question.answered_by or "",
    )
    with contextlib.suppress(AlreadyAnsweredError):
        return (await _send(run, asked, review, None, 0))[1]
    return None


async def _send(
    run: LiveRun, asked: Asked, review: Review, webhooks: Webhooks | None, looks: int
) -> tuple[ResumeAnswer, Review]:
    """Take the right to send an answer on record, send it, and write the outcome. Only this function sends answers."""
    question, sender = asked.question, uuid4().hex
    seconds = POST_DEADLINE * max(run.crew.request_timeout, 30.0) + SEND_WITHIN
    if not await in_store(questions.send, question.id, sender, seconds):
        raise AlreadyAnsweredError(f"Somebody else sends the answer to run {run.kickoff_id}. This call sent nothing.")
    work = OwnTask()
    with work.uncut():  # a cancellation waits for the answer to the POST
        accepted = await work.run(_post(run, asked, review, sender, webhooks), within=SEND_WITHIN)
    written = _written(run, asked, review, "sent")
    if run.attempt is not None:
        facts = written.model_dump(include={"task_id", "round", "approve", "by"})
        emit("reviewed", run.attempt, **facts)
    for number in range(looks):
        await asyncio.sleep(LOOK_AGAIN if number else 0.0)  # at once, since a fast crew soon asks again
        with contextlib.suppress(CrewError, *PREFECT_ERRORS):
            state = (await run.session.client.status(run.current_id)).state
            if state is not CrewState.WAITING:
                if state is not CrewState.UNKNOWN:
                    await in_store(questions.moved_on, question.id)
                break
    return accepted, written


async def _post(run: LiveRun, asked: Asked, review: Review, sender: str, webhooks: Webhooks | None) -> ResumeAnswer:
    question = asked.question
    try:
        accepted = await _deliver(run, asked, review, webhooks)
    except BaseException as error:
        if kickoff_fate(error) is KickoffFate.UNCERTAIN:
            await _note(run, in_store(questions.uncertain, question.id, sender))
            if isinstance(error, CrewError):
                raise uncertain_error(run, _written(run, asked, review, "uncertain")) from error
        else:
            await _note(run, in_store(questions.not_sent, question.id, sender))
            if isinstance(error, CrewAPIError) and is_refusal(question, error):
                await forget_callback(question)
        raise
    new_id = accepted.kickoff_id if FLOW not in question.marks else None
    if new_id not in (None, run.current_id) and run.attempt is not None:
        await _note(run, _continue(run, run.attempt, str(new_id)))
    await _note(run, in_store(questions.sent, question.id))
    await forget_callback(question)
    return accepted


async def _continue(run: LiveRun, attempt: Attempt, new_id: str) -> None:
    started = await in_store(attempts.continued, attempt, new_id)
    goes_on_as(run, started.attempt or attempt)


async def _deliver(run: LiveRun, asked: Asked, review: Review, webhooks: Webhooks | None) -> ResumeAnswer:
    """Send an answer once: to the callback URL of a Flow's question, else to `/resume`."""
    question, attempt = asked.question, run.attempt
    if FLOW in question.marks:
        of_flow = FlowQuestion(
            kickoff_id=run.kickoff_id,
            callback_url=await read_callback(run.kickoff_id, question),
            options=tuple(question.options or ()),
        )
        return await post_answer(of_flow, review, allow_http=run.crew.allow_http)
    if webhooks is None and attempt is not None and attempt.has_webhooks:
        # Without the request, this process does not know the policy of the run.
        wait = WaitPolicy(timeout=None, human_timeout=None) if run.request is None else run.request.options.wait
        webhooks = webhooks_for(run.crew, attempt, round=question.number, wait=wait)
        if webhooks is None:
            run_logger().warning(NO_WEBHOOKS, run.kickoff_id)
    if webhooks is None and run.request is not None:
        webhooks = run.request.options.webhooks
    return await run.session.call(
        lambda client: client.resume(
            run.current_id, asked.task or "", review.feedback, review.approve, webhooks=webhooks
        )
    )


def _written(run: LiveRun, asked: Asked, review: Review, outcome: Literal["sent", "uncertain"]) -> Review:
    """Return an answer as it is on record."""
    number = round_of(asked.question, asked.questions)
    facts: dict[str, Any] = {"task_id": run.redact_name(asked.task or ""), "round": number, "outcome": outcome}
    facts |= {"by": run.redact(one_line(review.by))[:MAX_NAME], "option": review.option and run.redact(review.option)}
    feedback = run.redact_text(review.feedback) if run.show == "full" else ""
    return review.model_copy(update={**facts, "feedback": feedback, "at": utcnow()})


def is_refusal(question: Question, error: CrewAPIError) -> bool:
    """Return whether an error means that the question takes no answer: it has one, or the run does not wait."""
    return error.status_code in (REFUSALS_OF_FLOWS if FLOW in question.marks else REFUSALS)


async def _note(run: LiveRun, writing: Awaitable[Any]) -> None:
    """Await a write of an answer's outcome, and log its error, which does not change whether the answer was sent."""
    try:
        await writing
    except (*PREFECT_ERRORS, CrewError) as error:
        run_logger().warning("The outcome of the answer to run %s could not be recorded: %s", run.kickoff_id, error)


def uncertain_error(run: LiveRun, last: Review) -> CrewError:
    """Return the error about an answer that may have arrived: it is not sent again, and a person has to look."""
    return AnswerUncertainError(
        f"The answer to run {run.kickoff_id}, task {last.task_id}, question {last.round} (by {describe_answer(last)}) "
        f"was sent and nobody knows whether it arrived. It is not sent again automatically. {where_to_look(run)} If "
        "the run still waits, answer on that page. If it goes on under another id, run: prefect-crew runs resolve "
        f"{shlex.quote(run.idempotency_key or run.kickoff_id)} --kickoff-id ID. Then wait for the run again under the "
        "same key."
    )


def _answered(asked: Asked, where: str, run: LiveRun) -> CrewError:
    """Return the error of an answer to a question that has one."""
    last = reviews_of(asked.questions, asked.now)[-1]
    if asked.state == "uncertain":
        return uncertain_error(run, last)
    verb = "approved" if last.approve else "rejected"
    still = ", but the crew's server still shows the same question" if asked.state == "answered" else ""
    return AlreadyAnsweredError(
        f"{where} question {last.round} was already {verb} (by {describe_answer(last)}){still}. Nothing was sent. Look "
        "again in a moment: prefect-crew reviews ls."
    )


def _repeat_answer(run: LiveRun, earlier: Review) -> ResumeAnswer:
    """Return an answer of the server for a call that has answered in an earlier attempt."""
    if earlier.outcome != "sent":
        raise uncertain_error(run, earlier)
    message = f"Question {earlier.round} of task {earlier.task_id} was answered by an earlier attempt of this call."
    run_logger().info("Crew run %s: %s Nothing was sent.", run.kickoff_id, message)
    return ResumeAnswer(kickoff_id=run.kickoff_id, message=message)


# Answering from outside of a wait


async def answer_run(run: LiveRun, review: Review, **options: Any) -> tuple[ResumeAnswer, Review]:
    """Answer the question of a run whose session is not open. The options are those of `answer_question`."""
    with withholding(run.redact_text), naming_prefect_errors(f"Nothing was sent to run {run.kickoff_id}."):
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
    """Approve the output of a run, or reject it with feedback. A run that is not on record gets each answer.

    `answer_question` explains the other arguments, and the errors.
    """
    with naming_prefect_errors(f"Nothing was sent to run {run.kickoff_id}."):
        await read_attempt(run, is_needed=True)
    if run.attempt is not None:
        review = Review(approve=approve, feedback=feedback, by="resume_crew")
        return (await answer_run(run, review, task_id=task_id, webhooks=webhooks, call=call))[0]
    with withholding(run.redact_text):
        async with run.session as session:
            task = task_id or waiting_task(await read_status(run))
            if task is None:
                raise ConfigurationError(f"The status of run {run.kickoff_id} names no task. Give it: task_id=….")
            return await session.call(
                lambda client: client.resume(run.kickoff_id, task, feedback, approve, webhooks=webhooks)
            )


# The runs that wait for people


async def list_open_questions(crew_of: CrewOf) -> list[tuple[Attempt, ReviewRequest]]:
    """Return the runs that wait for a person, each with its question, masked, the longest waiting first.

    If the crew is a stored block, its server is asked for the status; else the crew database decides.
    """
    gate, opened = asyncio.Semaphore(AT_ONCE), await in_store(questions.open_questions)

    async def read(question: Question) -> tuple[Attempt, ReviewRequest] | None:
        async with gate:
            attempt = await in_store(attempts.get, question.attempt_id)
            request = None if attempt is None else await read_question(attempt, crew_of)
            return None if attempt is None or request is None else (attempt, request)

    return [run for run in await asyncio.gather(*map(read, opened)) if run is not None]


async def read_question(attempt: Attempt, crew_of: CrewOf) -> ReviewRequest | None:
    """Return the question of a run in flight, masked for people, with all answers on record; None if the run asks none.
    The task is "" if it is unknown."""
    crew = await crew_of(attempt)
    run = None if crew is None else LiveRun(crew, str(attempt.first_id), attempt)
    asked = request = None
    if run is not None:
        # If the server does not answer, only the crew database counts.
        with contextlib.suppress(CrewError), withholding(run.redact_text):
            async with run.session:
                status = await read_status(run)
            asked = await look(run, status, after=run.crew.wait.next_round_after)
            if asked is None or asked.state == "answered":
                return None
            request = masked_request(run, request_of(run.kickoff_id, asked))
    if asked is None or request is None:
        now, _, rows = await in_store(questions.look, attempt.id)
        if not rows or rows[-1].sent_at is not None:
            return None
        asked = Asked(rows[-1], state_of(rows[-1], now), rows, rows[-1].task, None, now)
        request = request_of(str(attempt.first_id), asked)
        if request.output is None:
            why = "its crew's server was not asked. Look at the crew's page, or give --crew."
            request = request.model_copy(update={"withheld": why})
    return request.model_copy(update={"answers": tuple(reviews_of(asked.questions, asked.now))})


async def find_run_in_flight(name: str) -> Attempt:
    """Return the attempt of the run in flight of an idempotency key or a kickoff id.

    Raises:
        CrewError: There is no such run, it has ended, or it has no kickoff id.
    """
    attempt = latest(await find_attempts(name))
    if attempt.state is not AttemptState.STARTED:
        has_ended = attempt.first_id is not None
        why = f"it has ended ({attempt.state})" if has_ended else f"its kickoff is {attempt.state}"
        raise NotWaitingError(f"Run {attempt.key!r} does not wait for a person: {why}.")
    return attempt
