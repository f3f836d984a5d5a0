"""What the records say about runs that are not done, and what a person does about each. Prefect is only asked."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from prefect_crew.api.models import CrewState
from prefect_crew.records import RecordPhase, RunRecord, latest_purchase

__all__ = ["Lookout", "RunLine", "Standing", "classify", "crew_argument", "look_at"]


class Standing(StrEnum):
    """Where a run stands, as far as its record and the flow runs around it tell."""

    CLAIMED = "claimed"
    """Somebody is posting its kickoff at this moment."""
    IN_FLIGHT = "in flight"
    WAITING = "waiting"
    """For a person."""
    ORPHANED = "orphaned"
    """It was started, and whoever waited for it has ended."""
    UNCERTAIN = "uncertain"
    """A kickoff was sent and nobody knows its fate."""
    ENDED = "ended"
    NOT_STARTED = "not started"


OPEN = (Standing.UNCERTAIN, Standing.ORPHANED, Standing.WAITING, Standing.IN_FLIGHT, Standing.CLAIMED)
"""Those that are not done, the one that needs a person most first."""


@dataclass(frozen=True)
class RunLine:
    """A record and what it comes to. `since` is UTC; `todo` is empty where nothing has to be done."""

    record: RunRecord
    standing: Standing
    since: datetime
    todo: str


class Lookout(Protocol):
    """What `look_at` asks of a record store. Each method may raise whatever its storage raises."""

    async def owner_ended(self, record: RunRecord) -> bool:
        """Return whether the flow run that claimed the record is known to have ended."""
        ...

    async def other_waiters(self, record: RunRecord, flow_run_id: str | None) -> list[str]:
        """Return the flow runs other than `flow_run_id` that wait for the run and have not ended."""
        ...

    async def attempts(self, run_key: str) -> Sequence[RunRecord]:
        """Return all attempts at a key, the first one first."""
        ...


async def look_at(record: RunRecord, store: Lookout, now: datetime) -> RunLine:
    """Return the line of a record, asking after its flow runs only where that matters."""
    owner_ended = record.phase is RecordPhase.CLAIMED and await store.owner_ended(record)
    attended = record.phase is not RecordPhase.STARTED or bool(await store.other_waiters(record, None))
    passed = not attended and latest_purchase(await store.attempts(record.run_key)) != record
    return classify(record, now, owner_ended=owner_ended, attended=attended, passed=passed)


def classify(record: RunRecord, now: datetime, *, owner_ended: bool, attended: bool, passed: bool = False) -> RunLine:
    """Return the line of a record. Pure.

    Args:
        record: The record.
        now: The time, UTC.
        owner_ended: Whether the owner's flow run is known to have ended, for one that is claimed.
        attended: Whether a flow run that goes on waits for it, for one that is started.
        passed: Whether its key leads to a later attempt.
    """
    standing = _standing(record, now, owner_ended, attended)
    since = {
        Standing.WAITING: record.human_since,
        Standing.ENDED: record.ended_at,
    }.get(standing, record.kicked_off_at)
    return RunLine(record, standing, since or record.claimed_at, _todo(record, standing, passed))


def _standing(record: RunRecord, now: datetime, owner_ended: bool, attended: bool) -> Standing:
    if record.phase is RecordPhase.ENDED:
        return Standing.ENDED
    if record.phase is RecordPhase.NOT_STARTED:
        return Standing.NOT_STARTED
    if record.phase is RecordPhase.UNCERTAIN:
        return Standing.UNCERTAIN
    if record.phase is RecordPhase.CLAIMED:
        if not (owner_ended or record.open_for == 0):
            return Standing.CLAIMED
        return Standing.UNCERTAIN if record.permit else Standing.NOT_STARTED
    if not attended:
        return Standing.ORPHANED
    return Standing.WAITING if record.human_since is not None else Standing.IN_FLIGHT


def crew_argument(record: RunRecord) -> str:
    """Return the crew as a command takes it: its block, or its URL where the record has only an address."""
    address = record.crew_url.partition("://")[2].rstrip("/")
    return record.crew_url if record.crew == address else record.crew


def _todo(record: RunRecord, standing: Standing, passed: bool) -> str:
    crew, kickoff_id = shlex.quote(crew_argument(record)), shlex.quote(record.kickoff_id or "ID")
    if standing is Standing.UNCERTAIN:
        return (
            f"Look at the crew's page, then: prefect-crew runs settle {shlex.quote(record.run_key)} --kickoff-id ID, "
            "or --never-started."
        )
    if standing is Standing.ORPHANED:
        person = " It waits for a person." if record.human_since is not None else ""
        goes_on = "Its key leads to a later attempt; look" if passed else "Run again with its key to go on, or look"
        return (
            f"Nobody waits for it.{person} {goes_on}: prefect-crew status {crew} {kickoff_id}. "
            f"If the crew's server has forgotten it: prefect-crew runs settle {shlex.quote(record.run_key)} --lost."
        )
    if standing is Standing.WAITING:
        of_url = f" --crew {crew}" if crew_argument(record) == record.crew_url else ""
        return f"Answer: prefect-crew reviews approve {kickoff_id}{of_url}, or reject ID --feedback TEXT."
    if standing is Standing.ENDED and record.state is not CrewState.COMPLETED:
        return "Run again with its key to buy another, as far as the crew's max_kickoffs allows."
    return ""
