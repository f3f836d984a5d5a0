"""Resolving an uncertain kickoff: somebody says whether it started a run, and the record goes on as if that had been
seen.

A person says it on the command line, or a webhook of the run. The crew's status call has the last word where it can be
asked, and no other record may hold the id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from prefect_crew.client.models import CrewStatus
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord, latest_start
from prefect_crew.states import CrewState

RESOLVED_BY_PERSON = "resolved: it never started"
LOST = "resolved: the crew's server has forgotten it"
LOOK_AGAIN = 2.0
"""Seconds after which the crew is asked once more about a run that its server does not know."""
Look = Callable[[str], Awaitable[CrewStatus]]
"""Asks the crew's status call about a kickoff id."""


async def unresolved(idempotency_key: str, records: RecordStore) -> RunRecord:
    """Return the record of a key that is to be resolved: its latest attempt, uncertain or a claim that nobody holds.

    Raises:
        CrewError: There is none, or there is nothing to resolve about it.
    """
    attempts = await records.attempts(idempotency_key)
    if not attempts:
        raise CrewError(f"No run has the key {idempotency_key!r}. prefect-crew runs lists those on record.")
    # The one that a call with the key would find: an attempt that did not start hides no other.
    record = latest_start(attempts) or attempts[-1]
    if not record.is_unresolved:
        is_now = f"it is {record.phase}"
        if record.kickoff_id:
            is_now = f"run {record.kickoff_id} is {record.state or 'started'}"
        raise CrewError(f"Run {idempotency_key!r} is not uncertain: {is_now}. There is nothing to resolve.")
    _check_over(record, record.phase)
    return record


async def resolve_started(
    record: RunRecord, kickoff_id: str, records: RecordStore, *, look: Look | None = None
) -> CrewState | None:
    """Write down that the kickoff started the run `kickoff_id`. The next call with its key waits for that run.

    Args:
        record: As `unresolved` returns it.
        kickoff_id: The run.
        records: Where the record lives.
        look: None where the crew cannot be asked.

    Returns:
        The run's state, None if it could not be asked for.

    Raises:
        ConfigurationError: Another record holds the id, or the crew's server does not know it. Nothing is changed.
        CrewError: The status call failed, or somebody else has resolved it since. Nothing is changed.
    """
    holder = await records.of_kickoff(kickoff_id)
    if holder is not None and (holder.idempotency_key, holder.attempt) != (record.idempotency_key, record.attempt):
        raise ConfigurationError(
            f"Run {kickoff_id} belongs to the idempotency key {holder.idempotency_key!r} (attempt {holder.attempt}). "
            f"It is not run {record.idempotency_key!r}. Nothing was changed. Look for another run on the crew's page, "
            "or say --never-started if there is none."
        )
    state = None if look is None else (await look(kickoff_id)).state
    if state is CrewState.UNKNOWN:
        raise ConfigurationError(
            f"The server of crew {record.crew} does not know run {kickoff_id}. Nothing was changed. Check the id on "
            "the crew's page; say --never-started if there is no such run."
        )
    _check_over(record, RecordPhase.STARTED)
    if record.phase is RecordPhase.CLAIMED and not record.permit:
        raise ConfigurationError(
            f"The kickoff of run {record.idempotency_key!r} was never sent: whoever claimed it ended before that. So "
            f"run {kickoff_id} is another one. Nothing was changed. Run again with the same key."
        )
    await _resolve(record, records, RecordPhase.STARTED, kickoff_id=kickoff_id)
    return state


async def resolve_never_started(record: RunRecord, records: RecordStore) -> None:
    """Write down that the kickoff started no run. The next call with its key starts one.

    Raises:
        CrewError: Somebody else has resolved it since. Nothing is changed.
    """
    await _resolve(record, records, RecordPhase.NOT_STARTED, reason=RESOLVED_BY_PERSON)


async def in_flight(idempotency_key: str, records: RecordStore) -> RunRecord:
    """Return the latest attempt at a key that was started and has not been seen to end.

    Raises:
        CrewError: There is none.
    """
    attempts = await records.attempts(idempotency_key)
    started = [one for one in attempts if one.phase is RecordPhase.STARTED]
    if not started:
        is_now = f"it is {attempts[-1].state or attempts[-1].phase}" if attempts else "no run has this key"
        raise CrewError(f"Run {idempotency_key!r} is not in flight: {is_now}. Only a run in flight can be lost.")
    return started[-1]


async def resolve_lost(record: RunRecord, records: RecordStore, *, look: Look | None = None) -> None:
    """Write down that a run's end will never be known: the crew's server has forgotten it.

    The next call with its key starts another, up to the crew's `max_kickoffs`, as after a failure.

    Args:
        record: As `in_flight` returns it.
        records: Where the record lives.
        look: None where the crew cannot be asked.

    Raises:
        ConfigurationError: The crew's server knows the run. Nothing is changed.
        CrewError: The status call failed, or the record says something else by now. Nothing is changed.
    """
    for pause in (0.0, LOOK_AGAIN):
        if look is None:
            break
        await asyncio.sleep(pause)  # one answer of a load balancer between two releases is no proof
        if (state := (await look(str(record.kickoff_id))).state) is not CrewState.UNKNOWN:
            raise ConfigurationError(
                f"The server of crew {record.crew} knows run {record.kickoff_id}: it is {state}. Nothing was changed. "
                "Run again with its key to wait for it and get its result."
            )
    lost = await records.resolve(record, RecordPhase.ENDED, state=CrewState.UNKNOWN, reason=LOST)
    current = await _current(record, records)
    if not lost or current is None or current.state is not CrewState.UNKNOWN:
        raise _resolved_by_another(record, current)


async def _resolve(
    record: RunRecord,
    records: RecordStore,
    phase: RecordPhase,
    *,
    kickoff_id: str | None = None,
    reason: str | None = None,
) -> None:
    _check_over(record, phase)
    if not await records.resolve(record, phase, kickoff_id=kickoff_id, reason=reason):
        current = await _current(record, records)
        if current is not None:
            _check_over(current, phase)
        raise _resolved_by_another(record, current)


def _check_over(record: RunRecord, phase: RecordPhase) -> None:
    """Raise CrewError if it is too early to say this of a kickoff."""
    # Its sender may know by now that it is uncertain; the request may be on its way all the same. Whatever the state of
    # the sender's flow run: its process may be alive.
    needs_wait = record.phase is RecordPhase.CLAIMED or phase is RecordPhase.NOT_STARTED
    if needs_wait and record.open_for:
        raise CrewError(
            f"The kickoff of run {record.idempotency_key!r} may still be sent, or on its way. Nothing was changed. "
            f"Resolve it in {record.open_for:.0f} s, if it is still uncertain then."
        )


async def _current(record: RunRecord, records: RecordStore) -> RunRecord | None:
    attempts = await records.attempts(record.idempotency_key)
    return next((one for one in attempts if one.attempt == record.attempt), None)


def _resolved_by_another(record: RunRecord, current: RunRecord | None) -> CrewError:
    """Return the error about a record that was changed since it was read: a webhook may resolve what a person reads."""
    is_now = "gone"
    if current is not None:
        is_now = f"{current.state or current.phase}, run {current.kickoff_id or 'unknown'}"
    return CrewError(f"Run {record.idempotency_key!r} was resolved by somebody else: it is {is_now} now.")
