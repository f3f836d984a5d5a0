"""Resolving an uncertain kickoff by its first webhook.

The signed URL says which start the webhook is about; the id in its body is only a claim. It counts once the crew's
status call knows it and no other record holds it, and never against the idempotency key in the body's own `meta`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum

from prefect_crew.client.models import CrewStatus
from prefect_crew.crew import Crew, CrewSession
from prefect_crew.exceptions import ConfigurationError, CrewError
from prefect_crew.records.model import RecordPhase, RecordStore, RunRecord
from prefect_crew.records.resolve import resolve_started
from prefect_crew.states import CrewState
from prefect_crew.webhooks import claim_of


class Resolution(StrEnum):
    """What became of an attempt to resolve."""

    RESOLVED = "resolved"
    """The record has the id now: the next call with its key waits for that run."""
    NOT_NEEDED = "not needed"
    """There is no such record, or it is known what became of its kickoff."""
    TOO_EARLY = "too early"
    """Whoever sent the kickoff may still write its outcome down."""
    NO_CREW = "no crew"
    """The crew is not stored as a block, or as one of another address: its server cannot be asked."""
    NOT_KNOWN = "not known"
    """The status call does not know the id, or not yet."""
    NO_ANSWER = "no answer"
    """The status call failed."""
    REFUSED = "refused"
    """Another record holds the id, or the webhook is of another claim or names another idempotency key itself."""

    @property
    def may_change(self) -> bool:
        """Whether the same attempt may succeed a little later."""
        return self in (Resolution.TOO_EARLY, Resolution.NOT_KNOWN, Resolution.NO_ANSWER)


class _NotKnownError(CrewError):
    """The status call answered that there is no such run."""


def attempt_of(attempts: Sequence[RunRecord], attempt: int | None) -> RunRecord | None:
    """Return the attempt of this number, or where none is given the latest that started, or may have started, a run."""
    if attempt is not None:
        return next((one for one in attempts if one.attempt == attempt), None)
    return next((one for one in reversed(attempts) if one.counts), None)


def unresolved(record: RunRecord) -> bool:
    """Return whether nobody has written down what became of the record's kickoff."""
    return record.phase in (RecordPhase.UNCERTAIN, RecordPhase.CLAIMED)


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
    """Resolve a run whose kickoff is uncertain by a webhook that came to its own URL. Harmless to call for any run.

    Args:
        idempotency_key: The run, from the signed URL.
        kickoff_id: The id in the webhook's body.
        records: Where records live.
        attempt: The attempt at the idempotency key, from the URL; left out, the latest that may have started a run.
        claim: The claim that the URL was made for, from the URL.
        said_key: The idempotency key in the body's `meta`, if there is one.
        load: Finds the crew that the status call is made to.

    Raises:
        httpx.HTTPError: The Prefect API is away or refuses.
    """
    record = attempt_of(await records.attempts(idempotency_key), attempt)
    if record is None or not unresolved(record):
        return Resolution.NOT_NEEDED
    if claim is not None and claim != claim_of(record.owner):
        return Resolution.REFUSED
    if said_key is not None and said_key != idempotency_key:
        return Resolution.REFUSED
    if record.phase is RecordPhase.CLAIMED and record.open_for:
        return Resolution.TOO_EARLY
    crew = await load(record)
    if crew is None:
        return Resolution.NO_CREW
    try:
        async with CrewSession(crew) as session:
            await resolve_started(record, kickoff_id, records, look=_looking(session))
    except _NotKnownError:
        return Resolution.NOT_KNOWN
    except ConfigurationError:
        return Resolution.REFUSED
    except CrewError:
        return Resolution.NO_ANSWER
    return Resolution.RESOLVED


def _looking(session: CrewSession) -> Callable[[str], Awaitable[CrewStatus]]:
    async def look(kickoff_id: str) -> CrewStatus:
        status = await session.call(lambda client: client.status(kickoff_id))
        if status.state is CrewState.UNKNOWN:
            raise _NotKnownError(f"The crew's server does not know run {kickoff_id}.")
        return status

    return look
