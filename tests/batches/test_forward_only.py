"""What the ledger says of an attempt never goes backwards, however late a write lands and whoever makes it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import pytest

from prefect_crew.batches.ledger import Ledger
from prefect_crew.exceptions import CrewError
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.records.resolve import resolve_never_started, resolve_started, unresolved
from prefect_crew.runs.kickoff import ClaimLostError
from prefect_crew.states import CrewState
from support.batches import record_of
from support.records import LONG_AGO

CLAIMED, NOT_STARTED, UNCERTAIN = RecordPhase.CLAIMED, RecordPhase.NOT_STARTED, RecordPhase.UNCERTAIN
STARTED, ENDED = RecordPhase.STARTED, RecordPhase.ENDED
FORWARD = {
    CLAIMED: {CLAIMED, NOT_STARTED, UNCERTAIN, STARTED, ENDED},
    NOT_STARTED: {NOT_STARTED, STARTED, ENDED},
    UNCERTAIN: {UNCERTAIN, NOT_STARTED, STARTED, ENDED},
    STARTED: {STARTED, ENDED},
    ENDED: {ENDED},
}
"""What may follow what. An id beats "not started": whoever has it knows better."""


def at(record: RunRecord, phase: RecordPhase, **facts: Any) -> RunRecord:
    """Return what is known of an attempt at a later time."""
    if phase in (STARTED, ENDED):
        facts.setdefault("kickoff_id", "run 1")
    if phase is ENDED:
        facts.setdefault("state", CrewState.COMPLETED)
    return record.model_copy(update={"phase": phase, **facts})


async def stored(ledger: Ledger, record: RunRecord) -> RunRecord:
    (found,) = [one for one in await ledger.attempts(record.idempotency_key) if one.attempt == record.attempt]
    return found


async def save_anyhow(ledger: Ledger, record: RunRecord) -> bool:
    """Save, and return whether it was refused."""
    try:
        await ledger.save(record)
    except (ClaimLostError, CrewError):
        return True
    return False


@pytest.mark.parametrize("by_owner", [True, False], ids=["owner", "another"])
async def test_no_phase_is_followed_by_an_earlier_one(ledger_address: str, by_owner: bool):
    async with Ledger(ledger_address, "b") as ledger, Ledger(ledger_address, "b") as other:
        for number, (before, after) in enumerate(itertools.product(RecordPhase, RecordPhase)):
            record = record_of(ledger, f"k{number}", good_for=LONG_AGO)
            assert await ledger.claim(record)
            await ledger.save(at(record, before))
            ledger._own_claims.add(record.owner)  # as one that is still under way
            forward = after in FORWARD[before] and (by_owner or after is not CLAIMED)
            was_refused = await save_anyhow(ledger if by_owner else other, at(record, after, reason="later"))
            found = await stored(ledger, record)
            assert (found.phase, found.reason) == ((after, "later") if forward else (before, None)), (before, after)
            assert forward or by_owner is not was_refused or after is CLAIMED, "who does not own it is refused"


async def test_a_late_write_of_the_owner_does_not_undo_what_a_person_resolved(
    ledger_address: str, caplog: pytest.LogCaptureFixture
):
    async with Ledger(ledger_address, "b") as ledger, Ledger(ledger_address, "b") as person:
        for key, late in (("k1", NOT_STARTED), ("k2", UNCERTAIN), ("k3", STARTED)):
            record = record_of(ledger, key, good_for=LONG_AGO)
            assert await ledger.claim(record)
            found = await unresolved(record.idempotency_key, person)
            await resolve_started(found, f"seen {key}", person)
            with caplog.at_level(logging.WARNING):
                await ledger.save(at(record, late, kickoff_id="answered" if late is STARTED else None))
            assert (await stored(person, record)).kickoff_id == f"seen {key}"
        record = record_of(ledger, "k4", good_for=LONG_AGO)
        assert await ledger.claim(record)
        await resolve_never_started(await unresolved(record.idempotency_key, person), person)
        with pytest.raises(ClaimLostError):
            await ledger.save(at(record, CLAIMED, open_for=60.0))
        assert (await stored(person, record)).phase is NOT_STARTED
        await ledger.save(at(record, STARTED))
        assert (await stored(person, record)).kickoff_id == "run 1", "an id beats a verdict"
    assert "answered" in caplog.text, "the id that was not written down"


async def test_a_claim_that_may_still_be_posted_is_not_resolved(ledger_address: str):
    async with Ledger(ledger_address, "b") as ledger, Ledger(ledger_address, "b") as person:
        person.is_exclusive = True  # as one who has taken the lock of an owner that lives, and has lost it
        record = record_of(ledger, "k")
        assert await ledger.claim(record)
        with pytest.raises(CrewError, match="may still be sent"):
            await unresolved(record.idempotency_key, person)
        (found,) = await person.attempts(record.idempotency_key)
        # The ledger refuses it as well, whatever the clock of whoever resolves says.
        assert not await person.resolve(found, NOT_STARTED)
        assert not await person.resolve(found, STARTED, kickoff_id="run 7")
        assert (await stored(ledger, record)).phase is CLAIMED
        # The crew's server asked the owner to wait, and claims it for longer, by its own clock.
        old = record_of(ledger, "old", good_for=LONG_AGO)
        assert await ledger.claim(old)
        found = await unresolved(old.idempotency_key, person)
        await ledger.save(at(old, CLAIMED, open_for=60.0))
        with pytest.raises(CrewError, match="may still be sent, or on its way"):
            await resolve_never_started(found, person)


async def test_an_uncertain_kickoff_that_may_be_on_its_way_is_not_said_to_have_never_started(ledger_address: str):
    """Whatever clock the machine of whoever resolves has: the ledger tells how long, and holds to it."""
    async with Ledger(ledger_address, "b") as ledger, Ledger(ledger_address, "b") as person:
        record = record_of(ledger, "k", good_for=30.0, post_deadline=1.0)
        assert await ledger.claim(record)
        await ledger.save(at(record, UNCERTAIN))
        found = await unresolved(record.idempotency_key, person)
        assert 30 < found.open_for <= 36
        with pytest.raises(CrewError, match=r"may still be sent, or on its way.*Resolve it in 3\d s"):
            await resolve_never_started(found, person)
        assert not await person.resolve(found, NOT_STARTED)
        assert (await stored(ledger, record)).phase is UNCERTAIN
        # An id is more than a word that there is none, and need not wait.
        await resolve_started(found, "seen", person)
        assert (await stored(ledger, record)).kickoff_id == "seen"


async def test_writes_of_one_attempt_that_share_a_commit_are_made_in_their_order(ledger_address: str):
    async with Ledger(ledger_address, "b") as ledger:
        record = record_of(ledger, "k")
        writes = [
            ledger.claim(record),
            ledger.save(at(record, UNCERTAIN)),
            ledger.save(at(record, STARTED)),
            ledger.save(at(record, ENDED)),
        ]
        tasks = [asyncio.ensure_future(write) for write in writes]
        await asyncio.gather(*tasks)
        assert ledger.writer.commits < 3
        assert (await stored(ledger, record)).phase is ENDED


async def test_a_claim_that_was_resolved_before_its_owner_knew_of_it_is_not_its_own(ledger_address: str):
    """Its commit was made again since nobody knew of the first: in between somebody has resolved it."""
    async with Ledger(ledger_address, "b") as ledger, Ledger(ledger_address, "b") as person:
        record = record_of(ledger, "k", good_for=LONG_AGO)
        assert await ledger.claim(record)
        await resolve_never_started(await unresolved(record.idempotency_key, person), person)
        assert not await ledger.claim(record)
        assert (await stored(person, record)).phase is NOT_STARTED


async def test_what_is_found_out_replaces_only_what_it_was_found_out_of(ledger_address: str):
    async with Ledger(ledger_address, "b") as ledger, Ledger(ledger_address, "b") as person:
        record = record_of(ledger, "k")
        assert await ledger.claim(record)
        await ledger.save(at(record, STARTED))
        read = await stored(person, record)
        await ledger.save(at(record, ENDED))
        assert not await person.resolve(read, ENDED, state=CrewState.UNKNOWN)
        assert (await stored(ledger, record)).state is CrewState.COMPLETED
        assert read.phase is STARTED
        other = record_of(ledger, "k2")
        assert await ledger.claim(other)
        await ledger.save(at(other, STARTED))
        read = await stored(person, other)
        assert await person.resolve(read, ENDED, state=CrewState.STOPPED)
        assert (await stored(ledger, other)).model_dump() == read.model_dump()
