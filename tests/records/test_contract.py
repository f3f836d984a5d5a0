"""What every store of run records promises (`RecordStore`): the Variables of a Prefect server, and ledgers."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.batches.ledger import Ledger
from prefect_crew.client.models import Review, TokenUsage
from prefect_crew.exceptions import CrewError, RunNotFoundError
from prefect_crew.records.model import Lease, RecordPhase, RecordStore, RunRecord, StoredResult, utcnow
from prefect_crew.records.resolve import resolve_never_started, resolve_started, unresolved
from prefect_crew.records.store import PrefectRecords
from prefect_crew.states import CrewState
from support.batches import postgres_ledger
from support.records import CLAIMED, ENDED, LONG_AGO, NOT_STARTED, STARTED, UNCERTAIN, new_record, put

OpenStore = Callable[[], AbstractAsyncContextManager[Any]]


@pytest.fixture(params=["variables", "sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Give the function by which each process opens the store."""
    if request.param == "variables":
        request.getfixturevalue("prefect_api")
        return lambda: nullcontext(PrefectRecords())
    if request.param == "sqlite":
        return lambda: Ledger(str(tmp_path / "ledger.db"), "b")
    address = postgres_ledger(request.getfixturevalue("postgres"))
    return lambda: Ledger(address, "b")


@pytest.fixture
async def store(open_store: OpenStore) -> AsyncIterator[RecordStore]:
    async with open_store() as store:
        yield store


@pytest.fixture
async def other(open_store: OpenStore) -> AsyncIterator[RecordStore]:
    """Give the same store as another process has it open, which believes that it is the only one."""
    async with open_store() as store:
        store.is_exclusive = True
        yield store


def row(name: str | None = None, **facts: Any) -> RunRecord:
    """Return the claim of a row of the batch "b": its key suits a ledger, and so a Prefect server."""
    return new_record(f"batch/b/{name or uuid.uuid4()}", **facts)


def new_id() -> str:
    return f"run {uuid.uuid4()}"


async def stored(store: RecordStore, record: RunRecord) -> RunRecord:
    """Return the only attempt at a key, as the store has it."""
    (found,) = await store.attempts(record.idempotency_key)
    return found


# Claims


async def test_one_caller_claims_an_attempt(store: RecordStore, other: RecordStore):
    name, callers = new_id(), [store, other] * 4
    claims = [row(name) for _ in callers]
    won = await asyncio.gather(*(caller.claim(claim) for caller, claim in zip(callers, claims, strict=True)))
    assert won.count(True) == 1
    caller, claim = callers[won.index(True)], claims[won.index(True)]
    assert (await stored(other, claim)).owner == claim.owner
    assert await caller.claim(claim), "a request that is sent again finds the claim of its own caller"


async def test_attempts_come_in_the_order_of_their_numbers(store: RecordStore, other: RecordStore):
    name = new_id()
    claims = {number: row(name, attempt=number) for number in (2, 1, 3)}  # a server's clock may be set back
    for claim in claims.values():
        assert await store.claim(claim)
    assert [attempt.attempt for attempt in await other.attempts(claims[1].idempotency_key)] == [1, 2, 3]
    assert await store.confirm(claims[3], [claims[1], claims[2]])


@pytest.mark.parametrize(
    "name", ["daily-2026-05-01", "a/b c%_d", "每日報告", "\u200fשלום"], ids=["plain", "wildcards", "chinese", "rtl"]
)
async def test_a_key_has_records_of_its_own(store: RecordStore, other: RecordStore, name: str):
    record = await put(row(f"{name} {uuid.uuid4()}"), store)
    assert (await stored(other, record)).model_dump() == record.model_dump()
    assert await other.attempts(f"{record.idempotency_key}x") == []


async def test_the_time_of_a_claim_begins_when_it_is_written(store: RecordStore):
    """A start that has waited long for the counter of a budget has all of its time to send the kickoff."""
    lease = Lease(30.0, _wall=time.time() - 60.0)
    assert lease.is_over
    assert await store.claim(row(), lease)
    assert not lease.is_over


async def test_a_claim_that_is_taken_back_does_not_count(store: RecordStore, other: RecordStore):
    record = await put(row(), store)
    record.phase = NOT_STARTED
    await store.withdraw(record)
    assert not [attempt for attempt in await other.attempts(record.idempotency_key) if attempt.counts]


async def test_a_record_without_a_claim_is_not_saved(store: RecordStore):
    with pytest.raises((httpx.HTTPStatusError, RunNotFoundError)):
        await asyncio.wait_for(store.save(row(phase=NOT_STARTED)), 10)


# Runs


@pytest.mark.parametrize("kickoff_id", ["run", "a\0b", "\U0001f642" * 400, "../%2e"], ids=["id", "nul", "long", "up"])
async def test_what_one_caller_writes_another_reads(store: RecordStore, other: RecordStore, kickoff_id: str):
    kickoff_id = f"{kickoff_id} {uuid.uuid4()}"
    record = await put(row(), store, permit=30.0)
    assert await other.of_kickoff(kickoff_id) is None
    record.phase, record.kickoff_id, record.kicked_off_at = STARTED, kickoff_id, utcnow()
    record.result = StoredResult(output="ü 🙂 \0 \u202e", data={"nul": "\0"}, usage=TokenUsage(total_tokens=3))
    assert await store.save_started(record) is None
    reads = [await stored(other, record), await other.of_kickoff(kickoff_id)]
    assert [read and read.model_dump() for read in reads] == [record.model_dump()] * 2
    assert await other.of_kickoff(f"{kickoff_id} 2") is None
    assert await store.end(record, state=CrewState.COMPLETED, cost=0.5)
    reads = [await stored(other, record), await other.of_kickoff(kickoff_id)]
    assert [read and read.model_dump() for read in reads] == [record.model_dump()] * 2
    assert record.phase == ENDED
    assert record.state == CrewState.COMPLETED
    assert record.cost == 0.5


async def test_one_record_holds_a_kickoff_id(store: RecordStore, other: RecordStore):
    callers, kickoff_id = [store, other] * 2, new_id()
    records = [await put(row(), caller, permit=30.0) for caller in callers]
    for record in records:
        record.phase, record.kickoff_id = STARTED, kickoff_id
    # At the same moment, as where a proxy gives one answer to kickoffs that are under way together.
    starts = (caller.save_started(record) for caller, record in zip(callers, records, strict=True))
    others = await asyncio.gather(*starts)
    number = others.index(None)
    holder, caller = records.pop(number), callers.pop(number)
    assert others == [*[holder.idempotency_key] * number, None, *[holder.idempotency_key] * (3 - number)]
    assert await caller.save_started(holder) is None, "a request that is sent again finds what it has written"
    assert await caller.other_holder(holder) is None
    records[0].phase, records[0].kickoff_id = UNCERTAIN, None
    await callers[0].save(records[0])
    assert (await stored(other, records[0])).phase is UNCERTAIN
    found = await other.of_kickoff(kickoff_id)
    assert found is not None
    assert found.idempotency_key == holder.idempotency_key


async def test_one_caller_closes_a_run(store: RecordStore, other: RecordStore):
    record = await put(row(phase=STARTED, kickoff_id=new_id()), store)
    reads = [record, *[await stored(other, record) for _ in range(3)]]
    ends = (
        caller.end(read, state=CrewState.FAILED, error=f"end {number}")
        for number, (caller, read) in enumerate(zip([store, other] * 2, reads, strict=True))
    )
    closed = await asyncio.gather(*ends)
    assert closed.count(True) == 1
    assert {read.error for read in (*reads, await stored(other, record))} == {f"end {closed.index(True)}"}


async def test_an_end_replaces_a_lost_run(store: RecordStore, other: RecordStore):
    record = await put(row(phase=STARTED, kickoff_id=new_id()), store)
    assert await other.resolve(await stored(other, record), ENDED, state=CrewState.UNKNOWN)
    assert not (await stored(store, record)).is_final
    assert await store.end(record, state=CrewState.COMPLETED)
    assert (await stored(other, record)).state is CrewState.COMPLETED


async def test_a_run_in_flight_may_ask(store: RecordStore, other: RecordStore):
    record = await put(row(phase=STARTED, kickoff_id=new_id()), store)
    claim = await put(row(), store)
    record.human_since, record.human_task = utcnow(), "draft"
    await store.save(record)
    asking = {run.idempotency_key: run.human_task async for run in other.may_ask()}
    assert asking[record.idempotency_key] == "draft"
    assert claim.idempotency_key not in asking
    assert await store.end(record, state=CrewState.COMPLETED)
    await store.unlist(record)
    assert record.idempotency_key not in {run.idempotency_key async for run in other.may_ask()}


# Resolutions


async def test_no_permit_follows_a_resolution(store: RecordStore, other: RecordStore):
    record = await put(row(good_for=LONG_AGO), store)
    assert await other.resolve(await stored(other, record), NOT_STARTED)
    assert not await store.permit(record, 30.0)
    assert (await stored(other, record)).phase is NOT_STARTED


@pytest.mark.parametrize("late", [UNCERTAIN, NOT_STARTED, STARTED])
@pytest.mark.parametrize("resolved", [NOT_STARTED, STARTED, ENDED])
async def test_a_late_write_undoes_no_resolution(
    store: RecordStore, other: RecordStore, resolved: RecordPhase, late: RecordPhase
):
    record, run = await put(row(), store, permit=LONG_AGO), {"kickoff_id": new_id()}
    facts = {NOT_STARTED: {}, STARTED: run, ENDED: {**run, "state": CrewState.COMPLETED}}[resolved]
    assert await other.resolve(await stored(other, record), resolved, **facts)
    record.phase, record.kickoff_id = late, run["kickoff_id"] if late is STARTED else None
    await store.save(record)
    found = await stored(other, record)
    # An id says more than "not started", and an end says most.
    assert found.phase is max(resolved, late, key=[UNCERTAIN, NOT_STARTED, STARTED, ENDED].index)
    assert found.kickoff_id == (None if found.phase is NOT_STARTED else run["kickoff_id"])


async def test_only_what_was_read_is_resolved(store: RecordStore, other: RecordStore):
    record = await put(row(phase=STARTED, kickoff_id=new_id()), store)
    read = await stored(other, record)
    assert await store.end(record, state=CrewState.COMPLETED)
    assert not await other.resolve(read, ENDED, state=CrewState.UNKNOWN)
    assert (await stored(store, record)).state is CrewState.COMPLETED
    assert read.phase is STARTED


@pytest.mark.parametrize("resolved_as", [STARTED, NOT_STARTED])
async def test_the_slower_of_two_resolvers_gets_an_error(
    store: RecordStore, other: RecordStore, resolved_as: RecordPhase
):
    record, kickoff_id = await put(row(phase=UNCERTAIN), store), new_id()
    read = await unresolved(record.idempotency_key, other)
    await resolve_started(await unresolved(record.idempotency_key, store), kickoff_id, store)
    with pytest.raises(CrewError, match=f"was resolved by somebody else\\. Now it is started, run {kickoff_id}"):
        await (resolve_started(read, new_id(), other) if resolved_as is STARTED else resolve_never_started(read, other))
    assert (await stored(store, record)).kickoff_id == kickoff_id


async def test_one_of_two_resolutions_gets_a_kickoff_id(store: RecordStore, other: RecordStore):
    """Two people find the same run on the crew's page, each for a row of their own, and neither sees the other's."""
    callers, kickoff_id = (store, other), new_id()
    records = [await put(row(phase=UNCERTAIN), store) for _ in callers]
    reads = [await stored(caller, record) for caller, record in zip(callers, records, strict=True)]
    resolutions = (
        caller.resolve(read, STARTED, kickoff_id=kickoff_id) for caller, read in zip(callers, reads, strict=True)
    )
    taken = await asyncio.gather(*resolutions)
    assert taken.count(True) == 1
    refused = await stored(other, records[taken.index(False)])
    assert refused.phase == UNCERTAIN
    assert refused.kickoff_id is None


@pytest.mark.parametrize("phase", [CLAIMED, UNCERTAIN])
async def test_a_kickoff_on_its_way_is_not_resolved_as_none(store: RecordStore, other: RecordStore, phase: RecordPhase):
    """The store's clock says how long a kickoff may be on its way, whatever became of the owner's flow run."""
    record = await put(row(phase=phase, post_deadline=1.0, flow_run_id=str(uuid.uuid4())), store, permit=30.0)
    assert await other.owner_ended(record)
    found = await stored(other, record)
    assert 30 < found.open_for <= 36
    on_its_way = r"may still be sent, or on its way\. Nothing was changed\. Resolve it in 3\d s"
    with pytest.raises(CrewError, match=on_its_way):
        await resolve_never_started(found, other)
    assert (await stored(store, record)).phase is phase
    if phase is CLAIMED:
        with pytest.raises(CrewError, match=on_its_way):
            await unresolved(record.idempotency_key, other)
    else:  # an id says more, and need not wait
        await resolve_started(await unresolved(record.idempotency_key, other), kickoff_id := new_id(), other)
        assert (await stored(store, record)).kickoff_id == kickoff_id


async def test_a_further_permit_is_seen_by_an_earlier_reader(store: RecordStore, other: RecordStore):
    """The crew's server asked the owner to wait, and the owner may send the kickoff for longer."""
    record = await put(row(), store, permit=LONG_AGO)
    read = await unresolved(record.idempotency_key, other)
    assert await store.permit(record, 60.0)
    with pytest.raises(CrewError, match="may still be sent, or on its way"):
        await resolve_never_started(read, other)
    assert (await stored(store, record)).phase is CLAIMED


# People's answers


async def test_an_answer_of_a_number_is_written_once(store: RecordStore, other: RecordStore):
    record = await put(row(phase=STARTED, kickoff_id=new_id()), store)
    answers = [
        Review(task_id="draft", round=1, approve=False, feedback="wärmer \0", by="Grace", at=utcnow(), nonce=f"{n}")
        for n in range(8)
    ]
    adding = (caller.add_review(record, 1, one) for caller, one in zip([store, other] * 4, answers, strict=True))
    won = await asyncio.gather(*adding)
    assert won.count(True) == 1
    first, second = answers[won.index(True)], answers[won.index(False)]
    assert await other.reviews(record) == [first]
    assert await other.reviews(record.model_copy(update={"attempt": 2, "kickoff_id": new_id()})) == []
    assert await store.add_review(record, 2, second)
    sent = second.model_copy(update={"outcome": "sent"})
    await other.save_review(record, 2, sent)
    for removed, left in ((second, [first, sent]), (first, [sent])):
        await store.remove_review(record, 1, removed)
        assert await other.reviews(record) == left
