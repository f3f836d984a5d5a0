"""The crew's shared limit: it holds for every way to start a run, and its slots come back."""

import asyncio
import itertools
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from prefect import flow, get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelling

import prefect_crew as pc
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.devserver import CrewServer
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import limits
from prefect_crew.runs.limits import Slots, take_slots
from prefect_crew.tasks import stop_crew, wait_for_crew
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches, topics
from support.limits import new_limit
from support.records import attempts, new_record, put
from support.scripts import FAILS, JOURNAL, slow
from support.waiting import until, wait_until
from support.ways import WAYS

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.fixture(autouse=True)
def looks_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOOK_AGAIN", (0.02, 0.05))


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a batch look and tick each 0.1 s."""
    monkeypatch.setattr("prefect_crew.batches.runner.LOOK_EVERY", 0.1)
    monkeypatch.setattr("prefect_crew.batches.runner.TICK", 0.1)


async def held(crew: pc.DeployedCrew) -> int:
    """Return how many slots of a crew's limit are taken."""
    async with get_client() as client:
        return (await client.read_global_concurrency_limit_by_name(str(crew.concurrency_limit))).active_slots


@pytest.fixture
def batch(tmp_path: Path) -> Batches:
    return Batches(tmp_path)


def started_one_after_the_other(server: CrewServer) -> bool:
    """Whether each run was started after the one before it had ended."""
    spans = sorted((run.created_at, run.created_at + timedelta(seconds=run.execution_time)) for run in server.runs)
    return all(ended <= started for (_, ended), (started, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("way", "inside"), [*((way, True) for way in WAYS), ("run_crew", False), ("trigger", False), ("batch", False)]
)
async def test_a_limit_holds_for_every_way_to_start(crew_server: CrewServerFactory, way: str, inside: bool):
    server = crew_server(slow(0.1))
    crew = server.crew(concurrency_limit=await new_limit(1))

    async def both() -> None:
        await asyncio.gather(*(WAYS[way](crew, text) for text in "ab"))

    await (flow(both)() if inside else both())
    assert server.kickoffs == (4 if way == "batch" else 2)
    assert started_one_after_the_other(server)
    assert await held(crew) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("slots", [None, 0])
async def test_a_missing_or_empty_limit_starts_nothing(crew_server: CrewServerFactory, way: str, slots: int | None):
    server = crew_server(slow(0.1))
    crew = server.crew(concurrency_limit="nobody-made-it" if slots is None else await new_limit(slots))
    message = "'nobody-made-it', which does not exist" if slots is None else "which is below 1"
    with pytest.raises(Exception, match=message) as raised:
        await WAYS[way](crew, "a")
    errors = getattr(raised.value, "errors", {"one": raised.value})
    assert all(isinstance(error, pc.ConfigurationError) for error in errors.values())
    assert server.kickoffs == 0


# Batches


async def test_a_batch_beyond_the_limit_is_refused(crew_server: CrewServerFactory, batch: Batches):
    server = crew_server(slow(0.1))
    with pytest.raises(pc.ConfigurationError, match="Set max_in_flight to 3 or less"):
        await batch(server.crew(concurrency_limit=await new_limit(3)), topics(1), max_in_flight=5)
    assert server.kickoffs == 0


async def test_a_batch_that_waits_for_a_slot_says_so(crew_server: Any, batch: Batches, looks_often: None):
    server, phases, flow_runs = crew_server(slow(0.1)), list[str](), list[Any]()
    crew, name = server.crew(concurrency_limit=await new_limit(1)), f"waits {uuid.uuid4()}"
    other = await take_slots(crew_of(crew))

    @flow
    async def mine() -> None:
        flow_runs.append(flow_run.id)
        await batch(crew, topics(3), name=name, on_progress=lambda progress: phases.append(progress.phase))

    waiting = asyncio.ensure_future(mine())
    await until(lambda: "waiting" in phases, "it waits for a slot")
    text = "| In flight | 0, waiting for a free slot of the crew's concurrency limit |"

    async def is_shown() -> bool:
        return any(text in page for page in await batch.pages(name))

    await until(is_shown, "its page says so")
    async with get_client() as client:
        await client.set_flow_run_state(flow_runs[0], Cancelling(), force=True)
    with pytest.raises(pc.BatchCancelledError):
        await asyncio.wait_for(waiting, 60)
    assert server.kickoffs == 0
    assert await held(crew) == 1
    await other.release()
    assert (await batch(crew, topics(3), name=name)).completed == 3
    assert await held(crew) == 0


async def test_a_batch_leaves_others_their_turn(crew_server: Any, batch: Batches, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "PASSED_ON", 0.3)
    server = crew_server(slow(0.2))
    crew = server.crew(concurrency_limit=await new_limit(3))
    other = await take_slots(crew_of(crew))  # it is held until the end: the batch begins with what there is
    running = asyncio.ensure_future(batch(crew, topics(30)))
    await until(lambda: server.kickoffs >= 4, "the batch runs")
    single = await asyncio.wait_for(pc.arun_crew(crew, {"single": 1}), 60)
    assert not running.done(), "a single run has its turn before the batch has ended"
    assert single.output
    assert (await running).completed == 30
    assert server.kickoffs == 31

    async def is_free() -> bool:
        return await held(crew) == 1

    await until(is_free, "the slots are given back", seconds=60)  # less than the lease of a slot that is lost
    await other.release()


async def test_a_batchs_last_release_is_sent_once(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "PASSED_ON", 0.0)
    release, begun = limits.release, asyncio.Event()

    async def slow(lease: uuid.UUID, crew: str) -> None:
        begun.set()
        await release(lease, crew)
        await asyncio.sleep(1)

    monkeypatch.setattr(limits, "release", slow)
    crew = crew_server("echo").crew(concurrency_limit=await new_limit(2))
    await take_slots(crew_of(crew))
    async with limits.SlotPool(crew_of(crew)) as pool:
        assert await pool.take("row")
        pool.give_back("row")
        await asyncio.wait_for(begun.wait(), 30)
    assert await held(crew) == 1, "that of somebody else"


async def test_short_rows_pass_their_slots_on(crew_server: Any, batch: Batches, monkeypatch: pytest.MonkeyPatch):
    looks = AsyncMock(side_effect=limits._taken)
    monkeypatch.setattr(limits, "_taken", looks)
    monkeypatch.setattr(limits, "PASSED_ON", 60.0)
    crew = crew_server(slow(0.1)).crew(concurrency_limit=await new_limit(2))
    assert (await batch(crew, topics(20))).completed == 20
    assert looks.call_count <= 4
    assert await held(crew) == 0


@pytest.mark.parametrize("end", ["left", "refused token", "out of time"])
async def test_a_row_left_in_flight_keeps_its_slot(crew_server: Any, batch: Batches, looks_often: None, end: str):
    server, flow_runs = crew_server(slow(60)), list[Any]()
    crew = server.crew(concurrency_limit=await new_limit(2))
    wait = pc.WaitPolicy(timeout=0.5) if end == "out of time" else None

    @flow
    async def rows() -> None:
        flow_runs.append(flow_run.id)
        await batch(crew, topics(2), wait=wait, on_cancel="leave")

    running = asyncio.ensure_future(rows())
    await until(lambda: server.kickoffs == 2, "both rows are in flight")
    if end == "left":
        async with get_client() as client:
            await client.set_flow_run_state(flow_runs[0], Cancelling(), force=True)
    if end == "refused token":
        server.token = "another"
    await asyncio.gather(running, return_exceptions=True)
    assert server.kickoffs == 2
    assert await held(crew) == 2


# Single runs


async def test_two_waits_that_see_one_end_give_one_slot_back(crew_server: CrewServerFactory):
    crew = crew_server(slow(0.5)).crew(concurrency_limit=await new_limit(2))
    await take_slots(crew_of(crew))
    run = await crew.atrigger({"text": "a"})
    await asyncio.gather(*(wait_for_crew(crew, str(run.kickoff_id)) for _ in range(3)))
    assert await held(crew) == 1, "that of somebody else"


async def test_every_end_gives_the_slot_back(crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch):
    name = await new_limit(1)
    crew = crew_server(slow(60)).crew(concurrency_limit=name)
    run = await crew.atrigger({"text": "a"})
    assert await held(crew) == 1
    await stop_crew(crew, run.kickoff_id)
    assert await held(crew) == 0
    with pytest.raises(pc.CrewFailedError):
        await pc.arun_crew(crew_server(FAILS).crew(concurrency_limit=name))
    assert await held(crew) == 0
    echo = crew_server("echo").crew(concurrency_limit=name)
    run = await echo.atrigger({"text": "a"})
    await wait_for_crew(echo, str(run.kickoff_id))  # as another process, which does not know what the kickoff knew
    assert await held(crew) == 0
    with pytest.raises(pc.InvalidInputsError):
        await pc.arun_crew(echo, {})
    assert await held(crew) == 0
    monkeypatch.setattr(PrefectRecords, "claim", AsyncMock(side_effect=ObjectNotFound(Exception("refused"))))
    with pytest.raises(ObjectNotFound):
        await pc.arun_crew(echo, {"text": "a"})
    assert await held(crew) == 0


async def test_a_run_that_may_be_in_flight_keeps_its_slot(crew_server: CrewServerFactory):
    crew = crew_server("echo", faults=["kickoff:500"]).crew(concurrency_limit=await new_limit(1))
    with pytest.raises(pc.KickoffUncertainError):
        await pc.arun_crew(crew, {"text": "a"})
    assert await held(crew) == 1
    crew = crew_server(slow(60)).crew(concurrency_limit=await new_limit(1))
    with pytest.raises(pc.CrewTimeoutError):
        await pc.arun_crew(crew, {}, wait=pc.WaitPolicy(timeout=0.2))
    assert await held(crew) == 1


async def test_a_start_after_a_void_claim_takes_a_slot(crew_server: CrewServerFactory, key: str):
    server = crew_server(slow(60))
    crew = server.crew(concurrency_limit=await new_limit(1))
    await put(new_record(key, crew_url=server.url, inputs_digest=Inputs.of({}).digest, open_for=0.0))
    await crew.atrigger({}, idempotency_key=key)
    assert server.kickoffs == 1
    assert await held(crew) == 1


async def test_a_key_without_attempts_left_waits_for_no_slot(crew_server: CrewServerFactory, key: str):
    crew = crew_server(FAILS).crew(concurrency_limit=await new_limit(1), max_attempts=1)
    with pytest.raises(pc.CrewFailedError):
        await pc.arun_crew(crew, idempotency_key=key)
    assert await take_slots(crew_of(crew))
    with pytest.raises(pc.CrewFailedError, match="Nothing was started"):
        await asyncio.wait_for(pc.arun_crew(crew, idempotency_key=key), 20)


async def test_a_reattached_run_needs_no_slot(crew_server: CrewServerFactory, key: str):
    server = crew_server(slow(0.2))
    crew = server.crew(concurrency_limit=await new_limit(1))
    calls = [pc.arun_crew(crew, {"a": 1}, idempotency_key=key) for _ in range(3)]
    first, second = await asyncio.gather(*calls[:2])
    await take_slots(crew_of(crew))
    assert first.kickoff_id == second.kickoff_id == (await calls[2]).kickoff_id
    assert server.kickoffs == 1


async def test_a_lost_slot_is_replaced_if_one_is_free(crew_server: CrewServerFactory):
    crew = crew_server(slow(0.2)).crew(concurrency_limit=await new_limit(1))
    for is_taken in (False, True):
        run = await crew.atrigger({"a": 1})
        (record,) = await attempts(str(run.idempotency_key))
        await Slots(crew_of(crew), uuid.UUID(record.slot)).release()  # as the server does at the end of the lease
        taken = await take_slots(crew_of(crew)) if is_taken else None
        await run.await_for_completion()
        assert await held(crew) == (taken is not None), "that of somebody else"


async def test_a_lease_is_renewed_and_its_loss_logged(crew_server: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setattr(limits, "RENEW", 0.02)
    crew = crew_server("echo").crew(concurrency_limit=await new_limit(1))
    slots = await take_slots(crew_of(crew))
    async with slots.kept(), asyncio.timeout(20):
        await asyncio.sleep(0.2)
        assert "were lost" not in caplog.text
        await slots.release()  # as the server does when it has not heard of it for too long
        await until(lambda: "were lost" in caplog.text)


async def test_a_caller_that_waits_for_its_turn_holds_no_slot(crew_server: CrewServerFactory):
    server = crew_server(JOURNAL, speed=0.4)
    crew = server.crew(concurrency_limit=await new_limit(2))

    async def run(text: str, session: str) -> str:
        return (await pc.arun_crew(crew, {"note": text}, session=session)).output

    slow_turns = [asyncio.create_task(run("slow", "one")) for _ in range(2)]
    await asyncio.to_thread(wait_until, lambda: server.runs)
    assert await run("tea", "other") == "1 tea"
    assert [run.inputs["note"] for run in server.runs] == ["slow", "tea"]
    assert sorted(text[0] for text in await asyncio.gather(*slow_turns)) == ["1", "2"]
