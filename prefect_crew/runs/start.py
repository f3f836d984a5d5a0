"""Start a run at most once: look, check the inputs, write the attempt, send `POST /kickoff`, and store the kickoff id.

A kickoff is sent only within `SEND_WITHIN` seconds from before the last transaction that gave the right to it, and
nobody else touches the attempt before its deadline, which is later. Two cases remain: a machine that freezes between
the last look at the clock and the first byte, and a request that the network delivers after the deadline.
"""

from __future__ import annotations

import asyncio
import random
import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeVar

from prefect_crew._internal.asyncio_tasks import OwnTask
from prefect_crew._internal.clock import moment
from prefect_crew._internal.prefect_api import held_flow_run, left_behind, run_logger
from prefect_crew._internal.prefect_errors import naming_prefect_away
from prefect_crew._text import listed_names, with_guesses
from prefect_crew.artifacts.events import emit
from prefect_crew.artifacts.run import render_run
from prefect_crew.client._client import NOTHING_STARTED
from prefect_crew.client._retry_safety import BARE_DELAY, KickoffFate, kickoff_delay, kickoff_fate
from prefect_crew.client.inputs import Unshown, missing_inputs, unknown_inputs
from prefect_crew.client.models import CrewInput
from prefect_crew.client.redaction import withholding
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import (
    AuthenticationError,
    BatchBusyError,
    ConfigurationError,
    CrewAPIError,
    CrewError,
    CrewStoppedError,
    FlowRunCancelledError,
    IdempotencyConflictError,
    InvalidInputsError,
    KickoffUncertainError,
    NotStartedError,
    ResponseFormatError,
    SessionBlockedError,
    StoreError,
)
from prefect_crew.runs.budgets import budget_error, warn_of_budgets
from prefect_crew.runs.database import in_store
from prefect_crew.runs.keys import RunIdentity, identify
from prefect_crew.runs.owners import crash_dead_owner
from prefect_crew.runs.request import RunRequest
from prefect_crew.runs.resolve import log_second
from prefect_crew.runs.run import NOT_SHOWN, LiveRun, look_once, no_attempt_left
from prefect_crew.runs.stop import cancel_command, is_known_cancelled, nothing_started, stop_if_asked, until_cancelled
from prefect_crew.store import attempts
from prefect_crew.store.decision import SEND_WITHIN, STARTS, Attempt, AttemptState, Decision, Request, Step
from prefect_crew.webhooks import UNLIMITED, webhooks_for

T = TypeVar("T")
LIMITED_FOR = 600.0
"""Seconds for which a kickoff is sent again while the server answers 429, or 503 with `Retry-After`."""
FINISH = 25.0
"""Seconds for the work that a cancelled start still does, such as waiting for the answer to a POST: Prefect kills a
cancelled process after about 30 s."""
LEAST_DELAY = 0.1
"""Seconds, at least, before a kickoff is sent for the second time; each later pause is at least twice as long."""
WRITE_AGAIN = (0.5, 1.0, 2.0, 5.0)
"""Seconds before a kickoff id is written again, after each failure in a row; the last one for all further failures."""
LOOK_AGAIN = (0.2, 2.0)
"""Seconds before a call looks again while another call may send the kickoff: the first pause, and the longest."""
FULL_AGAIN = (1.0, 10.0)
"""The same while the crew has as many runs in flight as it may have, or an earlier turn of a session is not over."""


def _clocks() -> tuple[float, float]:
    """Return the time by two clocks: somebody may set the first; the second counts while the machine sleeps."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.time(), time.monotonic() if boot is None else time.clock_gettime(boot)


async def start_run(run: LiveRun, identity: RunIdentity) -> Decision:
    """Find the run of an idempotency key, or start it. Return the decision, with the run's attempt and the time at
    which this call first looked.

    `run` has an open session and its request. Raises the errors of `run_crew`.
    """
    assert run.request is not None  # noqa: S101  its maker has set it
    work = OwnTask()
    return await work.run(_Start(run, run.request, identity, work).start(), within=FINISH)


@dataclass
class _Start:
    """One call of `start_run`."""

    run: LiveRun
    request: RunRequest
    identity: RunIdentity
    work: OwnTask
    began: float = field(default_factory=time.monotonic)
    pauses: dict[Step, float] = field(default_factory=dict[Step, float])

    async def start(self) -> Decision:
        """Decide, and send the kickoff, until there is a run or an error."""
        request = self.request.for_store(self.identity)
        has_checked = self.request.row is not None
        # Each try of a row asks for itself. A public function was called before this.
        age = 0.0 if self.request.row is not None else self.request.options.age
        while True:
            self._raise_if_cancelled()
            if has_checked:
                # A cancellation waits until it is on record what became of the attempt. Nothing is sent after it.
                with self.work.uncut():
                    decision = await self._begin(request)
                self.work.raise_if_cancelled()
            else:
                decision = await in_store(attempts.look, request)
            if request.asked_at is None:
                request = replace(request, asked_at=decision.now - age)
            if decision.step in STARTS and not has_checked:
                # For a run that is found, the check costs the crew's server no request.
                await check_inputs(self.run.session, self.request)
                has_checked = True
            elif decision.step in (*STARTS, Step.REATTACH, Step.RETURN):
                if decision.step not in STARTS:
                    self._log(decision)
                return replace(decision, now=request.asked_at or decision.now)
            else:
                await self._wait_or_raise(decision)

    @property
    def _is_cancelled(self) -> bool:
        return self.work.is_cancelled or is_known_cancelled(self.identity)

    def _raise_if_cancelled(self) -> None:
        """Raise CancelledError if the caller was cancelled, and FlowRunCancelledError if only its flow run was: the
        caller may outlive it."""
        self.work.raise_if_cancelled()
        if is_known_cancelled(self.identity):
            raise nothing_started(self.identity.flow_run_id)

    def _log(self, decision: Decision) -> None:
        attempt = decision.attempt
        if self.request.row is not None or attempt is None:
            return
        run = f"found run {attempt.first_id}"
        match decision.step:
            case Step.START:
                text = "a run is being started"
            case Step.START_AGAIN:
                text = "the last run of this key gave no result, and another run is being started"
            case Step.REATTACH:
                text = f"{run}, which is in flight. This call waits for it and starts nothing"
            case _:
                is_used = attempt.state is AttemptState.COMPLETED
                rest = "Its result is used and nothing is started" if is_used else "Nothing is started"
                text = f"{run}, which has {attempt.state}. {rest}"
        run_logger().info("Crew %s: %s. (key %s)", attempt.crew, text, attempt.key)
        if decision.step in STARTS and attempt.session is not None:
            start = "an empty state" if attempt.restored is None else f"the state of run {attempt.restored}"
            run_logger().info("Session %r: turn %d starts from %s.", attempt.session, attempt.turn, start)

    async def _begin(self, request: Request) -> Decision:
        """Write the attempt, if this call may start a run, and send its kickoff."""
        window = _clocks()  # before the transaction that gives the right to send the kickoff
        decision = await in_store(attempts.begin, request)
        if decision.step not in STARTS or decision.attempt is None:
            return decision
        self._log(decision)
        if decision.overruns:
            warn_of_budgets(self.request.crew, decision)
        started = await self._post_until_taken(decision.attempt, request, window)
        # The batch of a row decides what becomes of it.
        if self._is_cancelled and (self.work.is_cancelled or self.request.row is None):
            await stop_if_asked(LiveRun(self.run.session, str(started.first_id), started))
        return replace(decision, attempt=started)

    async def _wait_or_raise(self, decision: Decision) -> None:
        """Wait until another call, or a run of the crew, may have moved on. Raise if this call can start nothing."""
        step, attempt, crew = decision.step, decision.attempt, self.request.crew
        if step is Step.OVER_BUDGET:
            raise budget_error(crew, decision)
        if step is Step.NOT_HELD and self.request.row is not None:
            raise BatchBusyError(name=self.request.row.batch)
        reason = f"{crew.concurrency_limit} runs of the crew, its concurrency limit, are in flight"
        if attempt is not None:
            if step is Step.TURN:
                self._check_turn(attempt, decision.now)
            elif step is not Step.BUSY:
                raise _refusal(attempt, decision)
            reason = f"turn {attempt.turn} of session {attempt.session!r} is not over"
        if step is Step.BUSY:
            reason = "another call is about to start the run of this key"
        if self.request.row is not None and self.request.row.on_wait is not None:
            self.request.row.on_wait()
        first, longest = LOOK_AGAIN if step is Step.BUSY else FULL_AGAIN
        if step not in self.pauses and self.request.row is None:
            run_logger().info(
                "Crew %s: %s. This call waits. (key %s)", crew.label, reason, self.identity.idempotency_key
            )
        pause = self.pauses.get(step, first)
        self.pauses[step] = min(pause * 2, longest)
        pause *= random.uniform(0.75, 1.25)  # noqa: S311  no secret
        await until_cancelled(self.identity.flow_run_id, asyncio.sleep(pause))
        if step is Step.TURN and attempt is not None and attempt.state is AttemptState.STARTED:
            # Perhaps nobody else waits for it.
            await look_once(LiveRun(self.run.session, str(attempt.first_id), attempt))

    def _check_turn(self, attempt: Attempt, now: float) -> None:
        """Raise SessionBlockedError if an earlier turn is uncertain, or this call has waited for its time."""
        limit, key = (self.request.options.wait or self.request.crew.wait).timeout, shlex.quote(attempt.key)
        if attempt.state is AttemptState.UNCERTAIN or (attempt.first_id is None and attempt.is_free(now)):
            reason = "nobody knows whether its kickoff started a run"
            advice = "Look at the crew's page, then run: prefect-crew runs resolve "
            advice += f"{key} --kickoff-id ID, or --never-started."
        elif limit is not None and time.monotonic() - self.began > limit:
            reason = f"run {attempt.first_id or attempt.key} is still {attempt.state}, and this call has waited"
            reason += f" for {limit:g} s"
            advice = (
                f"Call again to wait on, or stop that run: {cancel_command(attempt)}. If the crew's server has "
                f"forgotten it, run: prefect-crew runs resolve {key} --lost."
            )
        else:
            return
        raise session_blocked(str(attempt.session), attempt.turn or 0, reason, advice)

    # Post

    async def _post_until_taken(self, attempt: Attempt, request: Request, window: tuple[float, float]) -> Attempt:
        """Send the kickoff of this call's attempt, store its id, and return the attempt.

        Raises:
            KickoffUncertainError: The kickoff was sent, and nobody knows whether it started a run.
            CrewError: The kickoff surely started no run. The attempt says so.
        """
        loop, least = asyncio.get_running_loop(), LEAST_DELAY
        until = loop.time() + LIMITED_FOR
        while True:
            client = self.run.session.client
            try:
                started = await self._post(attempt, window)
                await asyncio.sleep(0)  # so that a cancellation at the moment of the answer is noticed
            except KickoffUncertainError:
                raise
            except CrewError as problem:
                # The batch decides when a refused row is sent again: other rows wait with it.
                delay = None if self.request.row is not None else kickoff_delay(problem)
                # `Retry-After` may be 0, or a date that is over by our clock.
                pause, least = max(delay or 0.0, least), min(least * 2, BARE_DELAY)
                may_send = False
                if not self._is_cancelled and isinstance(problem, AuthenticationError):
                    may_send = await self.run.session.renew(client)
                elif not self._is_cancelled and delay is not None and loop.time() + pause <= until:
                    run_logger().warning("%s The kickoff is sent again in %.0f s.", problem, pause)
                    may_send = await in_store(attempts.back_off, attempt, pause)
                    with suppress(FlowRunCancelledError, TimeoutError):  # known, and seen below
                        async with asyncio.timeout(pause if may_send else 0):
                            await until_cancelled(self.identity.flow_run_id, self.work.cancelled.wait())
                window = _clocks()
                if (
                    may_send
                    and not self._is_cancelled
                    and await in_store(attempts.go_on, attempt, request.post_seconds)
                ):
                    continue
                # With a reason, a row of a batch has failed.
                reason = None if kickoff_fate(problem) is KickoffFate.RETRY else self._text_of(problem)
                await in_store(attempts.not_started, attempt.key, attempt.owner, reason)
                self._raise_if_cancelled()
                raise
            else:
                return started

    def _text_of(self, problem: BaseException) -> str:
        """Return the text of a kickoff's error for the crew database, if that may have it."""
        is_shown = self.request.crew.show == "full" and not self.request.inputs.secret_names
        return self.run.redact_text(str(problem))[:500] if is_shown else NOT_SHOWN

    async def _post(self, attempt: Attempt, window: tuple[float, float]) -> Attempt:
        """Send one `POST /kickoff` and store its outcome. Return the attempt with the id. If the kickoff surely started
        no run, raise and store nothing."""
        request, options, has_left = self.request, self.request.options, False

        def last_look() -> None:
            nonlocal has_left
            seconds = max(now - then for now, then in zip(_clocks(), window, strict=True))
            if seconds > SEND_WITHIN or self._is_cancelled:
                raise NotStartedError(
                    f"Run {attempt.key!r} was not started: the time to send its kickoff was over. The crew database "
                    "answers too slowly, or this machine was asleep. Run again with the same key."
                )
            self.identity.nonce.has_sent = has_left = True

        webhooks = options.webhooks or webhooks_for(request.crew, attempt, settings=request.settings, wait=options.wait)
        # With the attempt, a person finds the run of an attempt among those of its key.
        names = {"idempotency_key": attempt.key, "run_attempt": attempt.number}
        try:
            with withholding(self.run.redact_text):
                kickoff_id = await self.run.session.client.kickoff(
                    request.inputs,
                    meta=Unshown({**(options.meta or {}), **names}),
                    webhooks=webhooks,
                    restore_from=attempt.restored or request.inputs.restore_from,
                    before_sending=last_look,
                )
        except BaseException as error:
            if not has_left and _loop_ends(error):
                raise NotStartedError(
                    f"Run {attempt.key!r} was not started: its event loop ended before its kickoff could be sent."
                ) from None
            if kickoff_fate(error) is not KickoffFate.UNCERTAIN:
                raise
            reason = f"{type(error).__name__}: {self._text_of(error)}"
            await _write(lambda: in_store(attempts.uncertain, attempt, reason), attempt, "…")
            if not isinstance(error, Exception):
                raise
            raise uncertain(attempt, reason) from error
        if request.row is None:
            # Before anything else: if a later step fails, a person finds the id in a log.
            run_logger().info("Crew %s was kicked off: run %s", attempt.crew, kickoff_id)
        timeout = (options.wait or request.crew.wait).timeout  # so long it holds its slot, if nobody reattaches
        seconds = UNLIMITED if timeout is None else timeout
        what = f"--kickoff-id {shlex.quote(kickoff_id)}"
        started = await _write(lambda: in_store(attempts.started, attempt, kickoff_id, seconds), attempt, what)
        if started.other_key is not None:
            reason = f"its answer names run {kickoff_id} of key {started.other_key!r}"
            raise uncertain(started.attempt or attempt, reason)
        log_second(started)
        return started.attempt or replace(attempt, first_id=kickoff_id, kickoff_id=kickoff_id)


async def _write(write: Callable[[], Awaitable[T]], attempt: Attempt, what: str) -> T:
    """Write what became of a kickoff that was sent, again and again while this process lives: later calls wait."""
    for number in count():
        try:
            return await write()
        except StoreError as error:
            if not number:
                run_logger().error(
                    "Run %s could not be recorded yet; it is tried again. %s If this process ends before: "
                    "prefect-crew runs resolve %s %s",
                    *(attempt.key, error, shlex.quote(attempt.key), what),
                )
            await asyncio.sleep(WRITE_AGAIN[min(number, len(WRITE_AGAIN) - 1)])
        except (asyncio.CancelledError, ValueError) as error:
            if not _loop_ends(error):
                raise
    raise AssertionError


def _loop_ends(error: BaseException) -> bool:
    """Return whether an error means that the event loop ends, and has cancelled the tasks in which anyio connects.

    If all of these are cancelled, anyio creates an empty group of errors, which raises ValueError.
    """
    task = asyncio.current_task()
    is_own = task is not None and task.cancelling() > 0  # somebody cancelled this task
    return type(error) in (asyncio.CancelledError, ValueError) and not is_own


def uncertain(attempt: Attempt, reason: str | None = None) -> KickoffUncertainError:
    """Emit the event about an uncertain kickoff, once, and return the error."""
    reason = reason or attempt.error or "the process that sent it ended before it recorded the answer"
    emit("uncertain", attempt, once=True, reason=reason)
    return KickoffUncertainError(
        f"The kickoff of run {attempt.key!r} is uncertain: {reason.rstrip('.')}. Sent: crew {attempt.crew}, at "
        f"{moment(attempt.begun_at):%Y-%m-%d %H:%M:%S} UTC, inputs digest {attempt.inputs_digest}, attempt "
        f"{attempt.number}. The run may go on and is not started again. Look at the crew's page, then run: "
        f"prefect-crew runs resolve {shlex.quote(attempt.key)} --kickoff-id ID, or --never-started; then run again "
        "with the same key.",
        idempotency_key=attempt.key,
        crew=attempt.crew,
    )


def session_blocked(session: str, turn: int, reason: str, advice: str) -> SessionBlockedError:
    """Return the error of a call whose session cannot go on after a turn."""
    return SessionBlockedError(
        f"Session {session!r} cannot go on after turn {turn}: {reason}. Nothing was started. {advice}"
    )


def _refusal(attempt: Attempt, decision: Decision) -> CrewError:
    """Return the error of a call whose key has an attempt that allows no other."""
    key, differences = attempt.key, decision.differences
    if decision.step is Step.UNCERTAIN:
        return uncertain(attempt)
    if decision.step is Step.STOPPED:
        advice = "A retry of the flow run does not start it again. A new call with the key starts another run."
        return CrewStoppedError(kickoff_id=str(attempt.first_id), crew=attempt.crew, idempotency_key=key, advice=advice)
    parts = [f"crew {attempt.crew} at {attempt.crew_url}"] if "crew" in differences else []
    if names := [repr(name) for name in differences if name not in ("crew", "inputs")]:
        parts.append(f"other values of {', '.join(names)}")
    elif "inputs" in differences:
        parts.append("other inputs")
    return IdempotencyConflictError(
        f"Idempotency key {key!r} belongs to another run: {' and '.join(parts)}. Nothing was started. Use another key, "
        f"or look at that run with prefect-crew runs inspect {shlex.quote(key)}.",
        idempotency_key=key,
        kickoff_id=attempt.first_id,
    )


# One run for a caller


async def open_run(request: RunRequest, *, inside_own_task: bool = False) -> LiveRun:
    """Find the run of a request, or start it, for a caller that does not wait for it. Raises the errors of
    `run_crew`."""
    run = LiveRun(request.crew, request=request)
    await kick_off(run, request, inside_own_task=inside_own_task)
    run.remember()
    if run.owned:
        await run.artifact.keep(lambda: render_run(run.view(None)))  # in `run_crew`, the wait shows the artifact
    return run


@naming_prefect_away("Nothing was started. Run again with the same key.")
async def kick_off(run: LiveRun, request: RunRequest, *, inside_own_task: bool = False) -> None:
    """Find or start a request's run, and set `run.kickoff_id` and `run.attempt`. Raises the errors of `run_crew`."""
    run.request, crew, options = request, request.crew, request.options
    identity = await identify(
        crew.label,
        request.inputs.digest,
        idempotency_key=options.idempotency_key,
        name=options.name,
        force_new=options.force_new,
        inside_own_task=inside_own_task,
    )
    try:
        async with run.session:
            decision = await start_run(run, identity)
    except CrewError as error:
        held = held_flow_run.get()
        if isinstance(error, FlowRunCancelledError) and held is not None and held.is_left:
            raise left_behind(held) from None  # the start has given its attempt back
        error.about(identity.idempotency_key, crew.label)
        raise
    attempt = decision.attempt
    assert attempt is not None  # noqa: S101  a run has one
    run.attempt, run.kickoff_id, run.is_fresh = attempt, str(attempt.first_id), True
    run.owned = decision.step in STARTS
    run.is_found = not run.owned
    if not run.owned:
        await crash_dead_owner(attempt.flow_run_id, attempt.flow_run_count, attempt.process, attempt.begun_at)
        if decision.step is Step.RETURN and attempt.state is not AttemptState.COMPLETED:
            had_ended = attempt.ended_at is not None and attempt.ended_at <= decision.now
            run.advice = no_attempt_left(crew) if had_ended else None
    run.notify(None)


async def check_inputs(session: CrewSession, request: RunRequest) -> None:
    """Check the inputs against `GET /inputs`. If the request fails, log that and go on.

    A web page or a redirect as the answer raises: `/kickoff` would answer in the same way, and nobody would know
    whether it started a run.

    Raises:
        InvalidInputsError: Inputs are missing, or the crew does not know some and `allow_extra_inputs` is False.
        AuthenticationError, ConfigurationError: The server refuses the token; the URL is not the URL of a crew.
    """
    expected: Sequence[CrewInput] = session.crew.expected_inputs or ()
    if session.crew.expected_inputs is None:
        try:
            expected = await session.call(lambda client: client.inputs())
        except AuthenticationError:
            raise
        except CrewError as error:
            check_is_crew(error, session.crew)
            run_logger().warning("The crew's inputs could not be checked before the kickoff: %s", error)
    missing = missing_inputs(expected, request.inputs.encoded)
    unknown = [] if request.crew.allow_extra_inputs else unknown_inputs(expected, request.inputs.encoded)
    if not missing and not unknown:
        return
    text, names = "", [item.name for item in expected]
    if missing:
        text += (
            f"Missing inputs: {listed_names(missing)}. A Flow needs none of its inputs: save it with --flow, or "
            "DeployedCrew(flow=True). "
        )
    if unknown:
        text += f"Unknown inputs: {with_guesses(unknown, names)}. The crew takes: {listed_names(names)}. "
    text += NOTHING_STARTED
    if unknown:
        text += " To send the unknown inputs anyway, set allow_extra_inputs=True on the block."
    raise InvalidInputsError(text, missing_inputs=missing, unknown_inputs=unknown, before_kickoff=True)


def check_is_crew(error: CrewError, crew: Crew) -> None:
    """Raise ConfigurationError if an error of `GET /inputs` shows that the server sent a web page or a redirect."""
    if isinstance(error, ResponseFormatError):
        is_page = error.body.lstrip().startswith("<")
    else:
        is_page = isinstance(error, CrewAPIError) and 300 <= error.status_code < 400
    if is_page:
        raise ConfigurationError(
            f"{crew.url} is not the URL of a crew: GET /inputs was answered with a web page or a redirect. ({error}) "
            "Nothing was started. Correct the crew's URL, then make the same call again."
        ) from error
