"""Many callers at the same moment: what one transaction has to exclude."""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from prefect_crew.store.attempts import (
    back_off,
    begin,
    ended,
    get,
    go_on,
    list_attempts,
    look,
    not_started,
    of_key,
    started,
)
from prefect_crew.store.database import Registration, Store, Transaction, transaction
from prefect_crew.store.decision import Allowance, AttemptState, Step
from prefect_crew.store.news import Place, read_news, tell
from prefect_crew.store.prune import keys_to_prune, prune_keys
from prefect_crew.store.spending import Use, used
from support.crew_database import CREW, Clock, add_news, begun, in_flight, once_more, over, request
from support.waiting import LIMIT, soon, until

SPAWNED = multiprocessing.get_context("spawn")


def begin_often(url: str, times: int) -> None:
    """Begin one key from a process of its own."""

    async def run() -> None:
        store = Store(url)
        decisions = await asyncio.gather(*(store.run(begin, request("one")) for _ in range(times)))
        assert {one.step for one in decisions} <= {Step.START, Step.BUSY}
        store.close()

    asyncio.run(run())


@pytest.mark.programs
async def test_eight_processes_with_fifty_begins_of_one_key_make_one_attempt(database_url: str):
    processes = [SPAWNED.Process(target=begin_often, args=(database_url, 50)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        await asyncio.to_thread(process.join)
    assert [process.exitcode for process in processes] == [0] * 8
    store = Store(database_url)
    assert len(await store.run(of_key, "one")) == 1
    store.close()


@pytest.mark.parametrize("of", ["limit", "budget"])
async def test_a_hundred_racers_stay_within_a_limit_and_within_a_budget_that_two_crews_share(
    database_url: str, of: str
):
    stores = [Store(database_url) for _ in range(4)]
    shared = [Allowance(scope="shared", per="day", max_cost=1.0, estimate_cost=0.1)]
    calls = [
        request(f"{number}", limit=10)
        if of == "limit"
        else request(f"{number}", crew_url=f"{CREW}/{number % 2}", allowances=shared)
        for number in range(100)
    ]
    runs = (stores[number % 4].run(begin, call) for number, call in enumerate(calls))
    steps = Counter([one.step for one in await asyncio.gather(*runs)])
    refused = Step.FULL if of == "limit" else Step.OVER_BUDGET
    assert steps == {Step.START: 10, refused: 90}
    assert await stores[0].run(used, "shared") == (Use() if of == "limit" else Use(runs=10, cost=1.0))
    for store in stores:
        store.close()


async def test_turns_of_one_session_are_one_at_a_time(timed_store: Store):
    calls = [request(f"{number}", session="s") for number in range(20)]
    decisions = await asyncio.gather(*(timed_store.run(begin, call) for call in calls))
    assert Counter([one.step for one in decisions]) == {Step.START: 1, Step.TURN: 19}


async def test_an_end_that_ten_callers_saw_is_written_by_one(timed_store: Store):
    attempt = await in_flight(timed_store, request(), "id")
    ends = (timed_store.run(ended, attempt, "id", AttemptState.COMPLETED, result=number) for number in range(10))
    assert Counter(end is not None for end in await asyncio.gather(*ends)) == {True: 1, False: 9}


# Cancelled callers


class Blocker:
    """Holds the lock of a key, from another store of the same database, until it is set free."""

    def __init__(self, url: str, key: str) -> None:
        self.store = Store(url)
        self.holds, self.free = threading.Event(), threading.Event()

        @transaction("write")
        def hold(transaction: Transaction) -> None:
            transaction.lock(f"key:{key}")
            self.holds.set()
            self.free.wait(LIMIT)

        self.hold = hold

    async def start(self) -> None:
        self.task = asyncio.create_task(self.store.run(self.hold))
        await asyncio.to_thread(self.holds.wait)

    async def end(self) -> None:
        self.free.set()
        await self.task
        self.store.close()


async def test_a_caller_that_is_cancelled_in_its_transaction_takes_it_back(database_url: str, timed_store: Store):
    call, blocker = request(), Blocker(database_url, "daily")
    await timed_store.run(look, call)  # the store is open
    await blocker.start()

    async def start() -> None:
        try:
            await timed_store.run(begin, call)
        except asyncio.CancelledError:
            assert await timed_store.run(not_started, call.key, call.owner)
            raise

    task = asyncio.create_task(start())
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.sleep(0.1)
    assert not task.done()  # it waits for the transaction, which has begun
    await blocker.end()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [attempt.state for attempt in await timed_store.run(of_key, call.key)] == [AttemptState.NOT_STARTED]


async def test_a_caller_that_is_cancelled_before_its_transaction_writes_nothing(database_url: str, timed_store: Store):
    blocker = Blocker(database_url, "daily")
    await timed_store.run(look, request())
    await blocker.start()
    waiting = list[asyncio.Task[Any]]()
    for _ in range(4):  # each thread that may run it waits
        waiting.append(asyncio.create_task(timed_store.run(begin, request())))
        await asyncio.sleep(0.1)
    task = asyncio.create_task(timed_store.run(begin, request("other")))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(task)
    await blocker.end()
    await asyncio.gather(*waiting)
    assert await timed_store.run(of_key, "other") == []


async def test_the_time_of_a_transaction_is_read_after_its_lock(database_url: str, timed_store: Store):
    blocker = Blocker(database_url, "daily")
    await blocker.start()
    task = asyncio.create_task(timed_store.run(begin, request()))
    await asyncio.sleep(1.0)
    freed_at = time.time()
    await blocker.end()
    attempt = (await task).attempt
    assert attempt is not None
    assert attempt.begun_at > freed_at - 0.05


# A pause, news, pruning


@pytest.mark.parametrize("is_of_key", [True, False], ids=["of its key", "of another key"])
async def test_of_a_pause_that_ends_and_a_second_caller_one_goes_on(database_url: str, is_of_key: bool):
    clock = Clock()
    stores = [Store(database_url, clock=clock) for _ in range(2)]
    for number in range(20):
        call = request(f"{number}")
        attempt = await begun(stores[0], call)
        await stores[0].run(back_off, attempt, 0.0)
        clock.now += 25 - 1e-3

        def tick(until: float = clock.now + 2e-3) -> None:
            while clock.now < until:
                clock.now += 1e-5

        thread = threading.Thread(target=tick)
        thread.start()
        other = once_more(call) if is_of_key else request(f"other {number}")
        goes_on, decision = await asyncio.gather(stores[0].run(go_on, attempt, 30.0), stores[1].run(begin, other))
        thread.join()
        first, *_ = await stores[0].run(of_key, call.key)
        assert not goes_on or first.state is AttemptState.POSTING
        assert not is_of_key or goes_on != (decision.step is Step.START)
    for store in stores:
        store.close()


@transaction("read")
def waits_for_lock(transaction: Transaction) -> bool:
    """Whether a transaction of this server of PostgreSQL waits for another one."""
    return bool(transaction.connection.scalar(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")))


@pytest.mark.postgres
async def test_an_id_that_arrives_while_a_call_of_another_key_gives_its_attempt_up_counts(
    empty_postgres: Callable[[], str],
):
    clock, allowances = Clock(), [Allowance(scope="shared", per="day", max_runs=2)]
    stores = [Store(empty_postgres(), clock=clock) for _ in range(2)]
    attempt = await begun(stores[0], request(allowances=allowances))
    assert await stores[0].run(back_off, attempt, 0.0)
    clock.now += 25
    has_begun, free = threading.Event(), threading.Event()

    @transaction("begin")
    def begin_slowly(transaction: Transaction) -> None:
        assert begin(transaction, request("other", allowances=allowances)).step is Step.START
        has_begun.set()
        free.wait(LIMIT)

    other = asyncio.create_task(stores[0].run(begin_slowly))
    await asyncio.to_thread(has_begun.wait)
    webhook = asyncio.create_task(stores[1].run(started, attempt, "id", 60.0))
    await until(lambda: stores[0].run(waits_for_lock))
    free.set()
    await other
    assert (await webhook).attempt == await stores[0].run(get, attempt.id)
    assert [one.state for one in await stores[0].run(of_key, "daily")] == [AttemptState.STARTED]
    assert await stores[0].run(used, "shared") == Use(runs=2)
    for store in stores:
        store.close()


@pytest.mark.postgres
async def test_news_that_become_visible_late_are_read_once(empty_postgres: Callable[[], str]):
    url = empty_postgres()
    late_store, store = Store(url), Store(url)
    written, free = threading.Event(), threading.Event()

    @transaction("write")
    def add_late(transaction: Transaction) -> None:
        tell(transaction, transaction.lock(), "topic", "late")
        written.set()
        free.wait(LIMIT)

    place: Place | None = None
    kinds: list[str] = []

    async def read() -> None:
        nonlocal place
        fresh, place = await store.run(read_news, ["topic"], place)
        kinds.extend(one.kind for one in fresh)

    await read()
    late = asyncio.create_task(late_store.run(add_late))
    await asyncio.to_thread(written.wait)
    await store.run(add_news, "topic", "early")
    await read()
    assert kinds == ["early"]
    free.set()
    await late
    await read()
    await read()
    assert kinds == ["early", "late"]
    late_store.close()
    store.close()


async def test_readers_see_the_same_during_a_prune(database_url: str):
    clock = Clock()
    store, pruner = Store(database_url, clock=clock), Store(database_url, clock=clock)
    await asyncio.gather(*(over(store, request(f"old {number}"), result="x") for number in range(60)))
    clock.now += 100
    kept = await in_flight(store, request("kept"))
    is_over = False

    async def read() -> int:
        reads = 0
        while not is_over:
            assert (await store.run(look, request("kept"))).step is Step.REATTACH
            assert kept in await store.run(list_attempts, limit=1)
            reads += 1
        return reads

    reader = asyncio.create_task(read())
    pruned = 0
    while keys := await pruner.run(keys_to_prune, clock.now - 50):
        pruned += await pruner.run(prune_keys, keys, clock.now - 50)
    is_over = True
    assert (pruned, await reader > 1) == (60, True)
    store.close()
    pruner.close()


@pytest.mark.postgres  # SQLite has one writer at a time
async def test_an_id_whose_holder_is_pruned_at_that_moment_is_free(empty_postgres: Callable[[], str]):
    url = empty_postgres()
    store, pruner = Store(url), Store(url)
    holder = await over(store, request("holder"))
    attempt = await begun(store, request())
    pruned = list[int]()

    def prune(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO crew_kickoff_ids") and not pruned:
            pruned.append(0)
            pruned.append(asyncio.run(pruner.run(prune_keys, ["holder"], time.time() + 1000)))

    sa.event.listen(store._engine, "after_cursor_execute", prune)
    result = await soon(store.run(started, attempt, str(holder.kickoff_id), 60.0))
    assert pruned == [0, 1]
    assert result.attempt is not None
    assert (result.attempt.kickoff_id, result.other_key) == (holder.kickoff_id, None)
    store.close()
    pruner.close()


# Another store


async def test_a_store_is_known_by_its_id_and_a_file_by_its_place(tmp_path: Path):
    async def registration(path: Path) -> Registration:
        store = Store(f"sqlite:///{path}")
        value = await store.registration()
        store.close()
        return value

    first = await registration(tmp_path / "a.db")
    assert first.where == str(tmp_path / "a.db")
    assert first.is_same(await registration(tmp_path / "a.db"))
    assert not first.is_same(await registration(tmp_path / "b.db"))
    shutil.copy(tmp_path / "a.db", tmp_path / "c.db")
    assert not first.is_same(await registration(tmp_path / "c.db")), "each goes on for itself"
    assert not first.is_same(Registration(id=first.id, where=first.where, host="another"))
    shared = Registration(id=first.id, where="postgresql://host/name", host=None)
    assert shared.is_same(Registration(id=first.id, where="postgresql://alias/name", host=None))
