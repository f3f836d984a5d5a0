"""Resolving an uncertain kickoff: a person or a webhook reports whether it started a run, and the record takes that.

A person uses the command line. If the crew can be asked, its status call decides, and no other record may hold the
kickoff id. The signed URL of a webhook proves which start the webhook is about; the id in its body proves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import Any

from prefect_crew.client._transport import encoded_id
from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import (
    ConfigurationError,
    CrewError,
    RunNotFoundError,
)
from prefect_crew.records.budgets import release
from prefect_crew.records.decision import latest_start
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, claim_of
from prefect_crew.records.notes import kept_note
from prefect_crew.states import CrewState

RESOLVED_BY_PERSON = "resolved: it never started"
LOST = "resolved: the crew's server has forgotten it"
LOOK_AGAIN = 2.0
"""Seconds after which `resolve_lost` asks a second time about a run that the crew's server does not know."""
Look = Callable[[str], Awaitable[CrewStatus]]
"""Makes the crew's status call for a kickoff id."""


async def unresolved(idempotency_key: str, records: RecordStore) -> RunRecord:
    """Return the latest attempt at a key that is uncertain, or a claim whose owner can send nothing more.

    Raises:
        CrewError: The key has no attempt, or nothing to resolve, or the resolution is too early.
    """
    attempts = await records.attempts(idempotency_key)
    if not attempts:
        raise RunNotFoundError(name=idempotency_key)
    record = latest_start(attempts) or attempts[-1]
    if not record.is_unresolved:
        # A forced attempt may follow an unresolved one, which still blocks its session.
        blocking = [attempt for attempt in attempts if attempt.is_unresolved and attempt.session is not None]
        record = blocking[-1] if blocking else record
    if not record.is_unresolved:
        run = record.kickoff_id
        is_now = f"run {run} is {record.state or 'started'}" if run else f"it is {record.phase}"
        raise CrewError(f"Run {idempotency_key!r} is not uncertain: {is_now}. There is nothing to resolve.")
    _check_over(record, record.phase)
    return record


async def resolve_started(
    record: RunRecord, kickoff_id: str, records: RecordStore, *, look: Look | None = None
) -> CrewState | None:
    """Store that the kickoff started the run `kickoff_id`. The next call with its key waits for that run.

    `record` is the result of `unresolved`; `look` is None if nobody can ask the crew. Returns the run's state, None
    without `look`.

    Raises:
        ConfigurationError: Another record holds the id, or the crew's server does not know it. Nothing is changed.
        CrewError: The status call failed, or somebody else has resolved the run since. Nothing is changed.
    """
    encoded_id(kickoff_id)  # raises if the text cannot be an id
    await check_unused(kickoff_id, record, records)
    status = None if look is None else await look(kickoff_id)
    state = None if status is None else status.state
    if status is not None and status.idempotency_key not in (None, record.idempotency_key):
        raise ConfigurationError(
            f"Run {kickoff_id} is of the idempotency key {status.idempotency_key!r}, by its own meta. Nothing was "
            "changed. Look for another run on the crew's page, or give --never-started if there is none."
        )
    if state is CrewState.UNKNOWN and not await _waits(record, kickoff_id):
        raise ConfigurationError(
            f"The server of crew {record.crew} does not know run {kickoff_id}. Nothing was changed. Check the id on "
            "the crew's page; give --never-started if there is no such run."
        )
    _check_over(record, RecordPhase.STARTED)
    if record.phase is RecordPhase.CLAIMED and not record.entries:
        raise ConfigurationError(
            f"Nobody sent a kickoff for run {record.idempotency_key!r}: the process that claimed this run ended before "
            f"sending. So run {kickoff_id} belongs to something else. Nothing was changed. "
            "Run again with the same key: then the kickoff is sent."
        )
    try:
        await _resolve(record, records, RecordPhase.STARTED, kickoff_id=kickoff_id)
    except CrewError:
        await check_unused(kickoff_id, record, records)  # another record may have got the id since
        raise
    return state


async def check_unused(kickoff_id: str, record: RunRecord, records: RecordStore) -> None:
    """Raise ConfigurationError if another record of the store holds a kickoff id."""
    holder = await records.of_kickoff(kickoff_id)
    if holder is not None and (holder.idempotency_key, holder.attempt) != (record.idempotency_key, record.attempt):
        raise ConfigurationError(
            f"Run {kickoff_id} is attempt {holder.attempt} at the idempotency key {holder.idempotency_key!r}, not a "
            f"run of the key {record.idempotency_key!r}. Nothing was changed. Look for another run on the crew's page, "
            "or give --never-started if there is none."
        )


async def resolve_never_started(record: RunRecord, records: RecordStore) -> None:
    """Store that the kickoff started no run. The next call with its key starts a run.

    Raises:
        CrewError: Somebody else has resolved the run since. Nothing is changed.
    """
    await _resolve(record, records, RecordPhase.NOT_STARTED, reason=RESOLVED_BY_PERSON)
    await release(record)


async def in_flight(name: str, records: RecordStore) -> RunRecord:
    """Return the run in flight of an idempotency key (the latest) or of a kickoff id.

    Raises:
        RunNotFoundError: No run has the key or the id.
        CrewError: No run is in flight.
    """
    attempts = await records.attempts(name)
    if not attempts and (holder := await records.of_kickoff(name)):
        attempts = [holder]
    started = [attempt for attempt in attempts if attempt.phase is RecordPhase.STARTED]
    if not attempts:
        raise RunNotFoundError(name=name)
    if not started:
        latest = latest_start(attempts) or attempts[-1]
        is_now = f"it is {latest.state or latest.phase}"
        raise CrewError(f"Run {name!r} is not in flight: {is_now}. Only a run in flight can be lost.")
    return started[-1]


async def resolve_lost(record: RunRecord, records: RecordStore, *, look: Look | None = None) -> None:
    """Store that the crew's server has forgotten a run, so that nobody will know its end.

    The next call with its key starts another run, up to the crew's `max_attempts`, as after a failure. `record` is the
    result of `in_flight`; `look` is None if nobody can ask the crew.

    Raises:
        ConfigurationError: The crew's server knows the run. Nothing is changed.
        CrewError: The status call failed, or somebody else has changed the record. Nothing is changed.
    """
    for pause in () if look is None else (0.0, LOOK_AGAIN):
        await asyncio.sleep(pause)  # one answer is no proof: it may come from an old server during a release
        if look and (state := (await look(str(record.kickoff_id))).state) is not CrewState.UNKNOWN:
            raise ConfigurationError(
                f"The server of crew {record.crew} knows run {record.kickoff_id}: it is {state}. Nothing was changed. "
                "Run again with its key to wait for it and get its result."
            )
    lost = await records.resolve(record, RecordPhase.ENDED, state=CrewState.UNKNOWN, reason=LOST)
    current = await _current(record, records)
    if not lost or current is None or current.state is not CrewState.UNKNOWN:
        raise _resolved_by_another(record, current)
    await records.unlist(record)


async def _resolve(record: RunRecord, records: RecordStore, phase: RecordPhase, **facts: Any) -> None:
    _check_over(record, phase)
    if not await records.resolve(record, phase, **facts):
        current = await _current(record, records)
        if current is not None:
            _check_over(current, phase)
        raise _resolved_by_another(record, current)


def _check_over(record: RunRecord, phase: RecordPhase) -> None:
    """Raise CrewError if it is too early to resolve a kickoff to this phase."""
    # The sender may have stored that the kickoff is uncertain; its request may still be on its way. The state of the
    # sender's flow run does not matter: its process may be alive.
    needs_wait = record.phase is RecordPhase.CLAIMED or phase is RecordPhase.NOT_STARTED
    if needs_wait and record.open_for:
        raise CrewError(
            f"The kickoff of run {record.idempotency_key!r} may still be sent, or on its way. Nothing was changed. "
            f"Resolve it in {record.open_for:.0f} s, if it is still uncertain then."
        )


async def _current(record: RunRecord, records: RecordStore) -> RunRecord | None:
    return attempt_of(await records.attempts(record.idempotency_key), record.attempt)


def _resolved_by_another(record: RunRecord, current: RunRecord | None) -> CrewError:
    """Return the error about a record that somebody changed after our read, since a person and a webhook may meet."""
    is_now = "gone"
    if current is not None:
        is_now = f"{current.state or current.phase}, run {current.kickoff_id or 'unknown'}"
    return CrewError(f"Run {record.idempotency_key!r} was resolved by somebody else. Now it is {is_now}.")


# By a webhook


class Resolution(StrEnum):
    """The outcome of an attempt to resolve a run by a webhook."""

    RESOLVED = "resolved"
    """The record has the id now: the next call with its key waits for that run."""
    NOT_NEEDED = "not needed"
    """There is no such record, or the record is not uncertain."""
    TOO_EARLY = "too early"
    """The sender of the kickoff may still store its outcome."""
    NO_CREW = "no crew"
    """No block stores the crew with this address, so nobody can ask its server."""
    NOT_KNOWN = "not known"
    """The crew's server does not know the id, or does not know it yet."""
    NO_ANSWER = "no answer"
    """The status call failed, or somebody changed the record at that moment."""
    REFUSED = "refused"
    """Another record holds the id, or the webhook is of another claim, or its body has another idempotency key."""

    @property
    def may_change(self) -> bool:
        """Whether the same attempt may succeed a little later."""
        return self in (Resolution.TOO_EARLY, Resolution.NOT_KNOWN, Resolution.NO_ANSWER)


def attempt_of(attempts: Sequence[RunRecord], attempt: int | None) -> RunRecord | None:
    """Return the attempt with this number; without a number, the latest attempt that started a run or may have."""
    if attempt is None:
        return latest_start(attempts)
    return next((candidate for candidate in attempts if candidate.attempt == attempt), None)


async def _waits(record: RunRecord, kickoff_id: str) -> bool:
    """Return whether a webhook said that the run waits for a person: a hosted crew's status then does not know it."""
    note = await kept_note(record, 0)
    return note.task_id is not None and note.kickoff_id == kickoff_id


async def resolve_from_webhook(
    idempotency_key: str,
    kickoff_id: str,
    records: RecordStore,
    *,
    attempt: int | None = None,
    claim: str | None = None,
    said_key: str | None = None,
    load: Callable[[RunRecord], Awaitable[Crew | None]],
) -> Resolution:
    """Resolve an uncertain kickoff by a webhook that came to the run's own URL. The call is harmless for any other run.

    Args:
        idempotency_key, attempt, claim: From the signed URL: the run, its attempt (None: the latest that may have
            started a run), and the claim of the URL.
        kickoff_id, said_key: From the body: the id, and the idempotency key in `meta`, if there is one.
        records: The record store.
        load: Finds the crew for the status call.

    Raises:
        PREFECT_ERRORS: The Prefect API cannot be reached or refuses.
    """
    record = attempt_of(await records.attempts(idempotency_key), attempt)
    if record is None or not record.is_unresolved:
        return Resolution.NOT_NEEDED
    if claim not in (None, claim_of(record.owner)) or said_key not in (None, idempotency_key):
        return Resolution.REFUSED
    if record.phase is RecordPhase.CLAIMED and record.open_for:
        return Resolution.TOO_EARLY
    if (crew := await load(record)) is None:
        return Resolution.NO_CREW
    try:
        async with CrewSession(crew) as session:
            status = await session.call(lambda client: client.status(kickoff_id))
        if status.state is CrewState.UNKNOWN and not await _waits(record, kickoff_id):
            return Resolution.NOT_KNOWN
        await resolve_started(record, kickoff_id, records)
    except ConfigurationError:
        return Resolution.REFUSED
    except CrewError:
        return Resolution.NO_ANSWER
    return Resolution.RESOLVED
