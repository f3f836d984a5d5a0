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
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from prefect_crew._internal.asyncio_tasks import OwnTask
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
    AnswerUncertainError,
    ConfigurationError,
    CrewAPIError,
    CrewError,
    CrewLostError,
    NoResultError,
    NotWaitingError,
)
from prefect_crew.runs.database import in_store
from prefect_crew.runs.resolve import find_attempts, latest
from prefect_crew.runs.reviews.callbacks import read_callback
from prefect_crew.runs.reviews.questions import (
    MOST_TEXT,
    Asked,
    describe_answer,
    is_over,
    marks_of,
    masked_request,
    review_of,
    shown_output,
    state_of,
    waiting_task,
    where_to_look,
)
from prefect_crew.runs.run import LiveRun, goes_on_as, read_attempt, read_status
from prefect_crew.states import CrewState
from prefect_crew.store import attempts, questions
from prefect_crew.store.decision import Attempt, AttemptState
from prefect_crew.store.questions import FLOW
from prefect_crew.webhooks import webhooks_for

if TYPE_CHECKING:
    from prefect_crew.client.webhooks import Webhooks

MAX_NAME = 100
"""Characters of the giver's name."""
LOOKS, LOOK_AGAIN = 5, 1.0
"""The number of status calls, and the seconds between them, by which a caller without a wait checks that the crew
continues after its answer."""
SEND_WITHIN = 10.0
"""Seconds for which a cancelled caller waits for the answer to its POST."""
NO_WEBHOOKS = (
    "After this answer run %s sends no webhooks: each answer has to ask for them again, and this process has no "
    "PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL and …_SECRET. Set them before the next answer."
)


# The question at this moment


async def look(run: LiveRun, status: CrewStatus, *, after: float | None, task_id: str | None = None) -> Asked | None:
    """Return the question that a run on record asks at a status, and write it if it is new. None if it asks nothing.

    With a `task_id`, the run counts as waiting: not every server reports a wait. `after`: see `is_over`.

    Raises:
        StoreError, PREFECT_ERRORS: The crew database cannot be used.
    """
    assert run.attempt is not None  # noqa: S101  the callers looked
    now, attempt, rows = await in_store(questions.look, run.attempt.id)
    goes_on_as(run, attempt or run.attempt)
    last, before = rows[-1] if rows else None, rows[-2] if len(rows) > 1 else None
    if status.state is not CrewState.WAITING and (task_id is None or status.state.ended):
        if last is not None and state_of(last, now) == "uncertain" and status.state is not CrewState.UNKNOWN:
            await in_store(questions.sent, last.id)  # the crew has moved on, so the answer arrived
        return None
    if task_id is not None:
        status = status.model_copy(update={"human_task_id": task_id})
    task, output, marks = waiting_task(status), shown_output(status), marks_of(status)
    is_stored = may_store(run) and output is not None and len(output) <= MOST_TEXT
    facts = {
        "task": task if task and run.redact_name(task) == task else None,
        "text": run.redact(output) if is_stored and output is not None else None,
    }
    number = 1 if last is None else last.number + is_over(last, run.attempt, now, after)
    is_known = last is not None and last.number == number and questions.is_same(last.marks, marks)
    is_of_flow = is_known and last is not None and FLOW in last.marks  # its webhook has told everything
    if last is None or not is_known or (not is_of_flow and questions.new_facts(last, before, marks, facts)):
        await in_store(questions.ask, run.attempt, number, marks=marks, **facts)
        rows = await in_store(questions.questions_of, run.attempt.id)
    last = rows[-1]
    if is_of_flow:
        return Asked(rows, now, last.task, last.text)
    # A status that is late shows the question before.
    judged = output or status.last_step if marks.items() <= last.marks.items() else None
    return Asked(rows, now, task or last.task, last.text or judged)


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
        webhooks: The kickoff's webhooks, if they are not this package's own; default: those of the run's request.
        call: The name of the call, the same on each of its retries. A call that has answered sends no other answer.
        looks: The number of status calls by which this checks that the crew continues. A wait looks by itself.

    Raises:
        NotWaitingError: The run does not wait, or not for this answer: the question has one, or it asks another one.
        CrewLostError: The server does not know the run at this moment. Nothing was sent.
        StoreError, PREFECT_ERRORS: The crew database cannot be used. Nothing was sent.
        AnswerUncertainError: This answer, or an earlier one, was sent, and nobody knows whether it arrived.
        CrewAPIError, CrewConnectionError: The server refused the answer, or the answer surely did not arrive.
    """
    assert run.attempt is not None  # noqa: S101  the callers looked
    if call is not None:
        now, _, rows = await in_store(questions.look, run.attempt.id)
        own = [row for row in rows if row.answer and row.answer.get("call") == call and row.sender is not None]
        if own:
            return _repeat_answer(run, review_of(own[0], rows, now))
    asked = await _question_to_answer(run, seen, task_id)
    question = asked.question
    if asked.state == "left":
        left = await send_left(run, asked)
        if left is not None and call is not None and question.answer.get("call") == call:
            return left
    if asked.state != "open":
        raise _answered(run, asked)
    by, within = run.redact(one_line(review.by))[:MAX_NAME], _post_within(run)
    answer = {"approve": review.approve, "option": review.option and run.redact(review.option), "call": call}
    if run.redact_name(asked.task or "") == asked.task:
        answer["task"] = asked.task
    is_stored = may_store(run) and not run.redact.hides([review.feedback, review.option or ""])
    if is_stored:
        answer["feedback"] = review.feedback

    async def take(sender: str) -> bool:
        if not is_stored:  # nobody else could send it, so the right to send it is taken at once
            return await in_store(questions.answer, question.id, answer, by, sender, within)
        is_written = await in_store(questions.answer, question.id, answer, by)
        return is_written and await in_store(questions.send, question.id, sender, within)

    answered = replace(question, answer=answer, answered_by=by, answered_at=asked.now)
    asked = replace(asked, questions=[*asked.questions[:-1], answered])
    sent = await _send(run, asked, review, take, webhooks, looks)
    if sent is None:
        raise NotWaitingError(f"{_where(run, asked)} was answered by somebody else at this moment. Nothing was sent.")
    return sent


async def _question_to_answer(run: LiveRun, seen: ReviewRequest | None, task_id: str | None) -> Asked:
    """Return the question that a run asks at this moment, with its task. Raise if it asks none, or another one."""
    status = await read_status(run)
    asked = await look(run, status, after=run.crew.wait.next_round_after, task_id=task_id)
    if asked is None and seen is not None and status.state is CrewState.UNKNOWN:
        raise CrewLostError(**run.names)  # it may be known again in a moment
    if asked is None:
        raise NotWaitingError(
            f"Run {run.kickoff_id} of crew {run.crew.label} does not wait for a person: it is {status.state}. Nothing "
            "was sent."
        )
    if seen is not None and (seen.id, seen.options) != (asked.question.id, tuple(asked.question.options or ())):
        raise NotWaitingError(f"{_where(run, asked)} asks another question by now. Nothing was sent.")
    if not asked.task:
        raise ConfigurationError(
            f"Run {run.kickoff_id} of crew {run.crew.label} waits, but its status does not name the task. Give it "
            "(task_id=…, --task); the crew's page and the human-input webhook show it."
        )
    return asked


async def send_left(run: LiveRun, asked: Asked) -> tuple[ResumeAnswer, Review] | None:
    """Send an answer that its giver left behind, as a process that died. Return None if somebody else sends it, or has
    answered elsewhere."""

    def take(sender: str) -> Awaitable[bool]:
        return in_store(questions.send, asked.question.id, sender, _post_within(run))

    with contextlib.suppress(NotWaitingError):
        return await _send(run, asked, asked.answers[-1], take, None, 0)
    return None


def _where(run: LiveRun, asked: Asked) -> str:
    return f"Run {run.kickoff_id}, task {run.redact_name(asked.task or '')},"


def _post_within(run: LiveRun) -> float:
    return POST_DEADLINE * max(run.crew.request_timeout, 30.0) + SEND_WITHIN


async def _send(
    run: LiveRun,
    asked: Asked,
    review: Review,
    take: Callable[[str], Awaitable[bool]],
    webhooks: Webhooks | None,
    looks: int,
) -> tuple[ResumeAnswer, Review] | None:
    """Take the right to send an answer, as a `sender`, send it, and write the outcome. Return None if somebody else
    sends it. Only this function sends."""
    question, sender, work = asked.question, uuid4().hex, OwnTask()

    async def take_and_post() -> ResumeAnswer | None:
        return await _post(run, asked, review, sender, webhooks) if await take(sender) else None

    with work.uncut():  # whoever has the right sends it: a cancellation waits for the answer to the POST
        accepted = await work.run(take_and_post(), within=SEND_WITHIN)
    if accepted is None:
        return None
    written = review_of(replace(question, sent_at=asked.now), asked.questions, asked.now)
    if run.attempt is not None:
        emit("reviewed", run.attempt, **written.model_dump(include={"task_id", "round", "approve", "by"}))
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
        is_uncertain = kickoff_fate(error) is KickoffFate.UNCERTAIN
        outcome = questions.uncertain if is_uncertain else questions.not_sent
        await _note(run, in_store(outcome, question.id, sender))
        if is_uncertain and isinstance(error, CrewError):
            raise uncertain_error(run, asked.answers[-1]) from error
        if FLOW in question.marks and isinstance(error, CrewAPIError) and error.status_code == 409:
            raise NotWaitingError(
                f"{_where(run, asked)} was answered elsewhere: by e-mail, on the platform's page, or by its deadline. "
                f"This answer does not count, and the run goes on by itself. The platform says: {error.body}"
            ) from error
        raise
    new_id = accepted.kickoff_id
    if FLOW not in question.marks and new_id not in (None, run.current_id) and run.attempt is not None:
        await _note(run, _continue(run, run.attempt, new_id))
    await _note(run, in_store(questions.sent, question.id))
    return accepted


async def _continue(run: LiveRun, attempt: Attempt, new_id: str) -> None:
    started = await in_store(attempts.continued, attempt, new_id)
    goes_on_as(run, started.attempt or attempt)


async def _note(run: LiveRun, writing: Awaitable[Any]) -> None:
    """Await a write of an answer's outcome, and log its error, which does not change whether the answer was sent."""
    try:
        await writing
    except (*PREFECT_ERRORS, CrewError) as error:
        run_logger().warning("The outcome of the answer to run %s could not be recorded: %s", run.kickoff_id, error)


async def _deliver(run: LiveRun, asked: Asked, review: Review, webhooks: Webhooks | None) -> ResumeAnswer:
    """Send an answer once: to the callback URL of a Flow's question, else to `/resume`."""
    question, attempt = asked.question, run.attempt
    if (flow_id := question.marks.get(FLOW)) is not None:
        url, options = await read_callback(run.kickoff_id, flow_id), tuple(question.options or ())
        of_flow = FlowQuestion(kickoff_id=run.kickoff_id, callback_url=url, options=options)
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


def uncertain_error(run: LiveRun, last: Review) -> CrewError:
    """Return the error about an answer that may have arrived: it is not sent again, and a person has to look."""
    return AnswerUncertainError(
        f"The answer to run {run.kickoff_id}, task {last.task_id}, question {last.round} (by {describe_answer(last)}) "
        "was sent and nobody knows whether "
        f"it arrived. It is not sent again automatically. {where_to_look(run)} If the run still waits, answer on that "
        "page. If it goes on under another id, run: prefect-crew runs resolve "
        f"{shlex.quote(run.idempotency_key or run.kickoff_id)} --kickoff-id ID. Then wait for the run again under the "
        "same key."
    )


def _answered(run: LiveRun, asked: Asked) -> CrewError:
    """Return the error of an answer to a question that has one."""
    last = asked.answers[-1]
    if asked.state == "uncertain":
        return uncertain_error(run, last)
    verb = "approved" if last.approve else "rejected"
    still = ", but the crew's server still shows the same question" if asked.state == "answered" else ""
    return NotWaitingError(
        f"{_where(run, asked)} question {last.round} was already {verb} (by {describe_answer(last)}){still}. Nothing "
        "was sent. Look again in a moment: prefect-crew reviews ls."
    )


def _repeat_answer(run: LiveRun, earlier: Review) -> tuple[ResumeAnswer, Review]:
    """Return the answer for a call that has answered in an earlier attempt."""
    if earlier.outcome != "sent":
        raise uncertain_error(run, earlier)
    message = f"Question {earlier.round} of task {earlier.task_id} was answered by an earlier attempt of this call."
    run_logger().info("Crew run %s: %s Nothing was sent.", run.kickoff_id, message)
    return ResumeAnswer(kickoff_id=run.kickoff_id, message=message), earlier


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
    """Approve the output of a run, or reject it with feedback. `answer_question` explains the other arguments.

    Raises:
        NoResultError: The run is not in the crew database, so that nobody knows whether it was answered.
        CrewError: The errors of `answer_question`.
    """
    with naming_prefect_errors(f"Nothing was sent to run {run.kickoff_id}."):
        await read_attempt(run, is_needed=True)
    if run.attempt is None:
        raise NoResultError(
            f"No run on record has the kickoff id {run.kickoff_id!r}. Nothing was sent. Answer on the crew's page."
        )
    review = Review(approve=approve, feedback=feedback, by="resume_crew")
    return (await answer_run(run, review, task_id=task_id, webhooks=webhooks, call=call))[0]


# The runs that wait for people


async def list_open_questions() -> list[tuple[Attempt, ReviewRequest]]:
    """Return the runs that wait for a person, each with its question, as the crew database has them, oldest first."""
    waiting: list[tuple[Attempt, ReviewRequest]] = []
    for question in await in_store(questions.open_questions):
        _, attempt, _ = await in_store(questions.look, question.attempt_id)
        request = None if attempt is None else await read_question(attempt, None)
        if attempt is not None and request is not None:
            waiting.append((attempt, request))
    return waiting


async def read_question(attempt: Attempt, crew: Crew | None) -> ReviewRequest | None:
    """Return the question of a run in flight, masked for people, with all answers on record; None if the run asks none.

    It is the one that the crew's server shows; without the crew, or an answer of its server, that of the crew database.
    """
    asked = request = None
    if crew is not None:
        run = LiveRun(crew, str(attempt.first_id), attempt)
        with contextlib.suppress(CrewError), withholding(run.redact_text):
            async with run.session:
                status = await read_status(run)
            asked = await look(run, status, after=crew.wait.next_round_after)
            if asked is None or asked.state == "answered":
                return None
            request = masked_request(run, asked.request(run.kickoff_id))
    if asked is None or request is None:
        now, _, rows = await in_store(questions.look, attempt.id)
        if not rows or rows[-1].sent_at is not None:
            return None
        asked = Asked(rows, now, rows[-1].task, rows[-1].text)
        request = asked.request(str(attempt.first_id))
        if request.output is None:
            why = "its crew's server was not asked. Look at the crew's page, or give --crew."
            request = request.model_copy(update={"withheld": why})
    return request.model_copy(update={"answers": tuple(asked.answers)})


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
