"""Resolving: what became of an uncertain kickoff, of a run that its server forgot, of an answer without a reply.

An id is evidence: an answer of the crew's server, a webhook whose signed URL names the attempt, or `meta` in a status.
A person's word counts from the attempt's deadline on, since until then the kickoff may be sent, or be on its way.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable
from typing import Literal

from prefect_crew._internal.clock import moment
from prefect_crew._internal.prefect_api import run_logger
from prefect_crew.artifacts.events import emit
from prefect_crew.client._transport import encoded_id
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import ConfigurationError, CrewError, NoResultError
from prefect_crew.runs.database import in_store
from prefect_crew.runs.keys import normalize_key
from prefect_crew.runs.reviews.callbacks import forget_callbacks
from prefect_crew.states import CrewState
from prefect_crew.store import attempts, questions
from prefect_crew.store.attempts import Started
from prefect_crew.store.decision import PREPARING, Attempt, AttemptState
from prefect_crew.webhooks import UNLIMITED

Look = Callable[[str], Awaitable[CrewStatus]]
"""Makes the crew's status call for a kickoff id."""
LOOK_AGAIN = 2.0
"""Seconds after which `resolve_lost` asks a second time about a run that the crew's server does not know."""


async def find_attempts(name: str) -> list[Attempt]:
    """Return the attempts of an idempotency key, or the one with a kickoff id. Raises NoResultError."""
    found = await in_store(attempts.of_key, normalize_key(name)) or await in_store(attempts.of_kickoff_id, name)
    if not found:
        raise NoResultError(f"No run has the key or kickoff id {name!r}. To list them: prefect-crew runs ls --all.")
    return found


def latest(found: list[Attempt]) -> Attempt:
    """Return the latest attempt that started a run or may have, else the last one."""
    started = [attempt for attempt in found if attempt.state is not AttemptState.NOT_STARTED]
    return (started or found)[-1]


async def resolve_by_evidence(key: str, crew_url: str, kickoff_id: str) -> Attempt | None:
    """Write the id of a run whose status names its key, if the kickoff of that key is uncertain. Return the attempt,
    None if there is nothing to resolve."""
    for attempt in await in_store(attempts.of_key, key):
        may_be_its = attempt.crew_url == crew_url and attempt.kickoff_id is None
        if may_be_its and attempt.state in (*PREPARING, AttemptState.UNCERTAIN):
            return await write_evidence(attempt, kickoff_id)
    return None


async def write_evidence(attempt: Attempt, kickoff_id: str) -> Attempt | None:
    """Write the kickoff id of an attempt that evidence names. Return the attempt if it has that id now."""
    seconds = WaitPolicy().timeout or UNLIMITED
    started = await in_store(attempts.started, attempt, kickoff_id, seconds)
    log_second(started)
    is_its = started.other_key is None and started.attempt is not None and started.attempt.first_id == kickoff_id
    return started.attempt if is_its else None


def log_second(started: Started) -> None:
    """Log, and emit once, that a key has two runs at the same time."""
    attempt, second = started.attempt, started.second
    if attempt is not None and second is not None:
        run_logger().error(
            "Idempotency key %s has two runs: %s and %s. Somebody had resolved the first as never started, or one "
            "kickoff has started both. Look at both on the crew's page. This key: prefect-crew runs inspect %s",
            *(attempt.key, attempt.first_id, second, shlex.quote(attempt.key)),
        )
        emit("second_run", attempt, once=True, second=second)


# By a person


async def resolve_started(
    name: str, kickoff_id: str, by: str, *, look: Look | None = None
) -> tuple[Attempt, CrewState | None]:
    """Write a person's word that an uncertain kickoff started a run with this id; or, for a run whose last answer may
    not have arrived, under which id it goes on. Return the attempt, and the run's state, None without `look`.

    Raises:
        ConfigurationError: Another attempt has the id, or the crew's server does not know it. Nothing is changed.
        CrewError: There is no such key, it is too early, there is nothing to resolve, or the status call failed.
    """
    encoded_id(kickoff_id)  # raises if the text cannot be an id
    attempt = await _unresolved(name)
    status = None if look is None else await look(kickoff_id)
    state = None if status is None else status.state
    if status is not None and status.idempotency_key not in (None, attempt.key):
        raise ConfigurationError(
            f"Run {kickoff_id} is of the idempotency key {status.idempotency_key!r}, by its own meta. Nothing was "
            "changed. Look for another run on the crew's page, or give --never-started if there is none."
        )
    if state is CrewState.UNKNOWN:
        raise ConfigurationError(
            f"The server of crew {attempt.crew} does not know run {kickoff_id}. Nothing was changed. Check the id on "
            "the crew's page; give --never-started if there is no such run."
        )
    seconds = WaitPolicy().timeout or UNLIMITED
    resolved = await in_store(
        attempts.resolve, attempt, AttemptState.STARTED, by, kickoff_id=kickoff_id, timeout=seconds
    )
    changed = _resolved(attempt, AttemptState.STARTED, resolved, kickoff_id)
    if attempt.state is AttemptState.STARTED:  # the answer has arrived
        asked = await in_store(questions.questions_of, attempt.id)
        if asked and asked[-1].sender is not None and asked[-1].sent_at is None:
            await in_store(questions.sent, asked[-1].id)
    return changed, state


async def resolve_never_started(name: str, by: str) -> Attempt:
    """Write a person's word that an uncertain kickoff started no run. The next call with its key starts one.

    Raises:
        CrewError: There is no such key, it is too early, or there is nothing to resolve.
    """
    attempt = await _unresolved(name)
    if attempt.state is AttemptState.STARTED:
        raise CrewError(f"Run {attempt.key!r} is not uncertain: run {attempt.first_id} is started.")
    resolved = await in_store(attempts.resolve, attempt, AttemptState.NOT_STARTED, by)
    return _resolved(attempt, AttemptState.NOT_STARTED, resolved, None)


async def resolve_lost(name: str, by: str, *, look: Look | None = None) -> Attempt:
    """Write a person's word that the crew's server has forgotten a run, so that nobody will know its end.

    The next call with its key starts another run, up to the crew's `max_attempts`, as after a failure.

    Raises:
        ConfigurationError: The crew's server knows the run. Nothing is changed.
        CrewError: There is no such run in flight, or the status call failed.
    """
    found = await find_attempts(name)
    started = [attempt for attempt in found if attempt.state is AttemptState.STARTED]
    if not started:
        raise CrewError(
            f"Run {name!r} is not in flight: it is {latest(found).state}. Only a run in flight can be lost."
        )
    attempt = started[-1]
    for pause in () if look is None else (0.0, LOOK_AGAIN):
        await asyncio.sleep(pause)  # one answer is no proof: it may come from an old server during a release
        if look and (state := (await look(str(attempt.kickoff_id))).state) is not CrewState.UNKNOWN:
            raise ConfigurationError(
                f"The server of crew {attempt.crew} knows run {attempt.kickoff_id}: it is {state}. Nothing was "
                "changed. Run again with its key to wait for it and get its result."
            )
    resolved = await in_store(attempts.resolve, attempt, AttemptState.LOST, by)
    lost = _resolved(attempt, AttemptState.LOST, resolved, None)
    await forget_callbacks(lost)
    return lost


async def _unresolved(name: str) -> Attempt:
    """Return the attempt of a key or id that a person may resolve: an uncertain one, or a run in flight whose last
    answer may not have arrived.

    Raises:
        NoResultError, CrewError: There is none, or it is too early.
    """
    found = await find_attempts(name)
    now = await in_store(attempts.time_now)
    waiting = [a for a in found if a.kickoff_id is None and (a.state in PREPARING or a.state is AttemptState.UNCERTAIN)]
    if waiting:
        attempt = waiting[-1]
        if not attempt.is_free(now):
            raise _too_early(attempt, now)
        return attempt
    attempt = latest(found)
    if attempt.state is AttemptState.STARTED:
        asked = await in_store(questions.questions_of, attempt.id)
        if asked and asked[-1].sender is not None and asked[-1].sent_at is None:
            return attempt
    run = attempt.first_id
    is_now = f"run {run} is {attempt.state}" if run else f"it is {attempt.state}"
    raise CrewError(f"Run {name!r} is not uncertain: {is_now}. There is nothing to resolve.")


def _too_early(attempt: Attempt, now: float) -> CrewError:
    at = moment(attempt.deadline or now)
    return CrewError(
        f"The kickoff of run {attempt.key!r} may still be sent, or on its way. Nothing was changed. Look again at "
        f"{at:%H:%M:%S} UTC, in {max(1.0, (attempt.deadline or now) - now):.0f} s: the run may have appeared on the "
        "crew's page by then. Only if it has not, it was never started."
    )


def _resolved(
    attempt: Attempt,
    to: Literal[AttemptState.STARTED, AttemptState.NOT_STARTED, AttemptState.LOST],
    resolved: Started,
    kickoff_id: str | None,
) -> Attempt:
    """Return the attempt after it was resolved. Raise if somebody else has changed it since, or the id is another's."""
    current = resolved.attempt
    if resolved.other_key is not None:
        raise ConfigurationError(
            f"Run {kickoff_id} belongs to the idempotency key {resolved.other_key!r}, not to {attempt.key!r}. Nothing "
            "was changed. Look for another run on the crew's page, or give --never-started if there is none."
        )
    is_done = current is not None and current.state is to
    if current is None or not is_done or (kickoff_id is not None and current.kickoff_id != kickoff_id):
        is_now = "gone" if current is None else f"{current.state}, run {current.first_id or 'unknown'}"
        raise CrewError(f"Run {attempt.key!r} was resolved by somebody else. Now it is {is_now}.")
    return current
