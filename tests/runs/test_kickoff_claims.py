"""Opening a run whose key has a claim already, or whose caller or Prefect API goes away in the middle.

tests/proof/test_permit_worlds.py has what claims and permits of several callers do to each other.
"""

import asyncio
import signal
import threading
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import AsyncMock

import anyio
import httpx
import pytest
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run

import prefect_crew as pc
from prefect_crew._internal import prefect_api
from prefect_crew.client import _transport
from prefect_crew.client._client import CrewClient
from prefect_crew.client._retry_safety import kickoff_delay
from prefect_crew.client.inputs import Inputs
from prefect_crew.crew import Crew
from prefect_crew.devserver import CrewServer
from prefect_crew.records import store, variables
from prefect_crew.records.model import Lease, RecordPhase, RunRecord, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import claims
from prefect_crew.runs import kickoff as kickoff_module
from prefect_crew.states import CrewState
from support.flow_runs import acall_in_flow
from support.proxy import Proxy
from support.records import LONG_AGO, attempts, new_record, phases, put, start
from support.webhooks import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

RECORDS = PrefectRecords()
CLAIMED, STARTED = RecordPhase.CLAIMED, RecordPhase.STARTED
NOT_STARTED, UNCERTAIN = RecordPhase.NOT_STARTED, RecordPhase.UNCERTAIN
FAILED = {"phase": RecordPhase.ENDED, "state": CrewState.FAILED, "ended_at": utcnow()}


async def claim(key: str, server: CrewServer, *, permit: float | None = None, **fields: Any) -> RunRecord:
    """Claim a run with the input text: a, as somebody else; with a permit that is good for so many seconds."""
    digest = Inputs.of({"text": "a"}).digest
    known = {"crew": server.crew().label, "crew_url": server.url, "inputs_digest": digest, "good_for": 60.0}
    return await put(new_record(key, **known | fields), permit=permit)


# Claims of others


async def test_a_run_of_a_later_number_needs_no_check_of_inputs(server: CrewServer, key: str):
    # The first number is free, so the call claims it before it has read that the second one holds a run.
    server.faults.add("inputs:401@1-")
    await claim(key, server, permit=60.0, attempt=2, phase=STARTED, kickoff_id=(theirs := f"theirs {uuid.uuid4()}"))
    assert (await start(server, key)).kickoff_id == theirs
    assert server.requests["kickoff"] == 0


@pytest.mark.parametrize("given_back", [False, True])
async def test_a_claim_of_another_is_waited_for(server: CrewServer, key: str, given_back: bool):
    stored, theirs = await claim(key, server), f"theirs {uuid.uuid4()}"
    finding = asyncio.ensure_future(start(server, key))
    done, _ = await asyncio.wait({finding}, timeout=0.5)
    assert not done
    if not given_back:
        assert await RECORDS.permit(stored, 30)
        stored.kickoff_id, stored.kicked_off_at = theirs, utcnow()
    stored.phase = NOT_STARTED if given_back else STARTED
    await RECORDS.save(stored)
    assert (await finding).kickoff_id in ([run.id for run in server.runs] if given_back else [theirs])
    assert await phases(key) == [NOT_STARTED] * given_back + [STARTED]


async def test_a_voided_claim_is_no_conflict(server: CrewServer, key: str):
    theirs = await claim(key, server, good_for=LONG_AGO, inputs_digest="d" * 32)
    run = await start(server, key)
    assert [run.kickoff_id] == [sent.id for sent in server.runs]
    assert await phases(key) == [NOT_STARTED, STARTED]
    assert not await RECORDS.permit(theirs, 30), "its owner, were it alive, would get that error"


async def test_a_kickoff_of_a_lost_flow_run_is_uncertain(server: CrewServer, key: str):
    await claim(key, server, permit=60.0, flow_run_id=str(uuid.UUID(int=7)))
    with pytest.raises(pc.KickoffUncertainError, match="ended before it recorded the answer"):
        await asyncio.wait_for(start(server, key), 20)
    assert server.requests["kickoff"] == 0


async def test_a_retry_says_at_once_that_its_kickoff_is_uncertain(server: CrewServer, key: str):
    async def call() -> None:
        if flow_run.run_count == 1:  # its process was killed with a permit that is good for ten minutes
            await claim(key, server, permit=600, flow_run_id=str(flow_run.id), flow_run_count=1)
            raise RuntimeError("killed")
        await start(server, key)

    with pytest.raises(pc.KickoffUncertainError):
        await acall_in_flow(call, retries=1)
    assert server.requests["kickoff"] == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"text": "a"}, "this call lost each claim before its kickoff could be sent"), ({}, "Missing inputs: text")],
    ids=["to send it", "to check inputs"],
)
async def test_claims_that_are_over_start_nothing(
    server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, str], message: str
):
    monkeypatch.setattr(kickoff_module, "LIMITED_FOR", 0.5)
    monkeypatch.setattr(kickoff_module, "Lease", lambda seconds: Lease(LONG_AGO))
    with pytest.raises(pc.CrewError, match=message):
        await start(server, key, inputs)
    assert server.requests["kickoff"] == 0
    assert set(await phases(key)) == {NOT_STARTED}


async def test_an_id_of_another_record_is_uncertain(server: CrewServer, key: str):
    # A proxy that caches or deduplicates kickoffs gives one id to two of them.
    run = await start(server, key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrewClient, "kickoff", AsyncMock(return_value=run.kickoff_id))
        with pytest.raises(pc.KickoffUncertainError, match=f"which belongs to idempotency key '{key}'"):
            await start(server, f"{key} b")
    assert await phases(f"{key} b") == [UNCERTAIN]


@pytest.mark.parametrize("good_for", [60.0, LONG_AGO], ids=["of a caller", "of a claim that was given up"])
async def test_an_unreadable_permit_starts_nothing(server: CrewServer, key: str, monkeypatch: Any, good_for: float):
    # Somebody edited it, or another tool uses its name.
    create = store.create_variable

    async def spoilt(variable: dict[str, Any], **options: Any) -> str | None:
        if variable["tags"] == [store.ENTRY_TAG]:
            await create(variable | {"value": "edited"})
        return await create(variable, **options)

    monkeypatch.setattr(store, "create_variable", spoilt)
    if good_for < 0:
        await claim(key, server, good_for=good_for)
    with pytest.raises(pc.CrewError, match="this version cannot read it"):
        await asyncio.wait_for(start(server, key), 20)
    assert server.requests["kickoff"] == 0


# The numbers of a key


async def test_unstarted_kickoffs_use_up_no_number(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "MOST_ATTEMPTS", 6)
    await claim(key, server, **FAILED)
    refused = [await claim(key, server, attempt=attempt, permit=30.0) for attempt in (2, 3, 4, 5, 6)]
    for record in refused:
        record.phase, record.reason = NOT_STARTED, "ConnectError"
        await RECORDS.save(record)
    run = await start(server, key)
    assert [run.kickoff_id] == [one.id for one in server.runs]
    assert [(one.attempt, one.phase) for one in await attempts(key)] == [(1, RecordPhase.ENDED), (2, STARTED)]
    assert not await RECORDS.permit(refused[-1], 30, before=Lease(-1.0)), "nothing is sent for what was deleted"


async def test_a_resolution_stays_while_the_owner_may_live(server: CrewServer, key: str, monkeypatch: Any):
    monkeypatch.setattr(store, "MOST_ATTEMPTS", 1)
    theirs = await claim(key, server)
    (read,) = await attempts(key)
    assert await RECORDS.resolve(read, NOT_STARTED)
    with pytest.raises(pc.TooManyAttemptsError):
        await start(server, key)
    assert not await RECORDS.permit(theirs, 30)
    monkeypatch.setattr(store, "RESOLUTION_STANDS", -1.0)
    assert (await start(server, key)).kickoff_id


# Cancelled callers


async def cancelled_at(
    is_time: Any, server: CrewServer, key: str, way: str = "cancelled", *, after: float = 0.3
) -> None:
    """Cancel a call shortly after a moment, or a request to the server; or its flow times out: that cancels at each
    await."""
    scope = anyio.CancelScope()

    async def call() -> None:
        with scope if way != "cancelled" else nullcontext():
            await (asyncio.gather(start(server, key)) if way == "timed out in a gather" else start(server, key))
        assert way != "cancelled", "the cancellation is lost"
        raise asyncio.CancelledError  # the scope has taken its own

    calling = asyncio.ensure_future(call())
    await until(is_time if callable(is_time) else lambda: server.requests[is_time], "it is time")
    await asyncio.sleep(after)
    scope.cancel()
    if way == "cancelled":
        calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


@pytest.mark.parametrize(
    ("faults", "way", "expected"),
    [
        (["kickoff:latency=1"], "cancelled", [STARTED]),
        (["kickoff:latency=1"], "timed out", [STARTED]),
        (["kickoff:latency=1", "kickoff:404"], "cancelled", [NOT_STARTED]),
        (["kickoff:latency=1", "kickoff:500"], "cancelled", [UNCERTAIN]),
        (["kickoff:429=30"], "timed out in a gather", [NOT_STARTED]),
        (["inputs:latency=30"], "cancelled", []),
    ],
)
async def test_a_cancelled_kickoff_is_on_record(
    crew_server: Any, key: str, caplog: pytest.LogCaptureFixture, faults: list[str], way: str, expected: list[Any]
):
    server = crew_server("echo", faults=faults)
    await cancelled_at(faults[0].partition(":")[0], server, key, way)
    assert await phases(key) == expected
    assert server.kickoffs == expected.count(STARTED)
    assert server.requests["stop"] == 0
    assert ("is left running" in caplog.text) is (STARTED in expected)
    assert [record.kickoff_id for record in await attempts(key) if record.kickoff_id] == [run.id for run in server.runs]


async def test_a_kickoff_not_on_its_way_is_not_sent(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    connecting = asyncio.Event()

    async def kickoff(*_: Any, before_sending: Callable[[], None], **__: Any) -> str:
        connecting.set()
        await asyncio.sleep(0.3)
        before_sending()
        return "sent"

    monkeypatch.setattr(CrewClient, "kickoff", kickoff)
    await cancelled_at(connecting.is_set, server, key, after=0)
    assert await phases(key) == [NOT_STARTED]


async def test_a_token_without_renewal_starts_nothing(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Crew, "reloaded", AsyncMock(side_effect=TypeError("no block any more")))
    server.faults.add("kickoff:401")
    with pytest.raises(TypeError):
        await start(server, key)
    assert await phases(key) == [NOT_STARTED]


@pytest.mark.parametrize(
    ("cut", "phase"),
    [((CrewClient, "kickoff"), UNCERTAIN), ((PrefectRecords, "_name_kickoff"), STARTED)],
    ids=["in the midst of the kickoff", "over whose its id is"],
)
async def test_a_signal_leaves_an_id_on_record(server: CrewServer, key: str, monkeypatch: Any, cut: Any, phase: Any):
    monkeypatch.setattr(*cut, AsyncMock(side_effect=TerminationSignal(signal.SIGTERM)))
    with pytest.raises(TerminationSignal):
        await start(server, key)
    (record,) = await attempts(key)
    assert record.phase == phase
    assert record.kickoff_id == next((run.id for run in server.runs), None)


async def test_an_endless_post_is_not_waited_for(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kickoff_module, "FINISH", 0.2)
    server.faults.add("kickoff:timeout")
    # Not wait_for: its own cancellation is what `cancelled_at` expects.
    async with asyncio.timeout(20) as limit:
        await cancelled_at("kickoff", server, key)
    assert not limit.expired()
    # The POST that was left loses its connection as the caller's session closes, and may have written that down by now.
    assert await phases(key) in ([CLAIMED], [UNCERTAIN])


async def test_a_cancelled_start_waits_for_no_slow_save(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    begun = asyncio.Event()

    async def hang(*_: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(kickoff_module, "FINISH", 0.3)
    monkeypatch.setattr(PrefectRecords, "save", hang)
    server.faults.add("kickoff:404")
    async with asyncio.timeout(20) as limit:
        await cancelled_at(begun.is_set, server, key, after=0)
    assert not limit.expired(), "it ends without the save"


async def test_a_claim_is_given_back_despite_a_cancellation(server: CrewServer, key: str, monkeypatch: Any):
    withdraw, withdrawing = PrefectRecords.withdraw, asyncio.Event()

    async def slow_withdraw(records: PrefectRecords, record: RunRecord) -> None:
        withdrawing.set()
        await asyncio.sleep(0.3)
        await withdraw(records, record)

    monkeypatch.setattr(PrefectRecords, "withdraw", slow_withdraw)
    server.faults.add("inputs:401")
    await cancelled_at(withdrawing.is_set, server, key, after=0)
    assert await phases(key) == []


# Event loops that end, as that of `run_crew` in a flow that is not async where it times out or a worker shuts down


def end_the_loop(server: CrewServer, key: str, is_time: Callable[[], Any]) -> list[RunRecord]:
    """Call the crew, and end the event loop as Ctrl-C does once it is time. Return the attempts."""

    async def call() -> None:
        calling = asyncio.ensure_future(start(server, key))
        await until(is_time, "it is time")
        asyncio.get_running_loop().call_soon(signal.default_int_handler, signal.SIGINT, None)
        await calling

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(call())
    return asyncio.run(attempts(key))


def test_an_ended_loop_sees_its_kickoff_to_the_end(server: CrewServer, key: str):
    server.faults.add("kickoff:latency=1.0@1")
    (record,) = end_the_loop(server, key, lambda: server.requests["kickoff"])
    assert record.phase == STARTED
    assert record.kickoff_id == server.runs[0].id


@pytest.mark.parametrize(
    ("last", "seconds", "phase"),
    [("inputs", 60.0, NOT_STARTED), ("kickoff", 1.0, STARTED)],
    ids=["before the first byte of the kickoff", "while its id is written"],
)
def test_an_ended_loop_leaves_nothing_uncertain(
    server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch, last: str, seconds: float, phase: RecordPhase
):
    """It ends while the first new connection after the last request to the crew is made, which takes its time."""
    connect, held = asyncio.BaseEventLoop.create_connection, threading.Event()

    async def slow_connect(loop: Any, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if server.requests[last] and not held.is_set() and (str(port) in server.url) is (last == "inputs"):
            held.set()
            await asyncio.sleep(seconds)
        return await connect(loop, factory, host, port, **options)

    monkeypatch.setattr(_transport, "POST_KEEPALIVE", -1.0)  # the kickoff needs a connection of its own
    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", slow_connect)
    (record,) = end_the_loop(server, key, held.is_set)
    assert server.requests["kickoff"] == (phase is STARTED)
    assert record.phase is phase


# A Prefect API that is away


@pytest.mark.parametrize("what", ["claim", "permit"])
async def test_a_retry_knows_its_own_claim(server: CrewServer, key: str, proxy: Proxy, monkeypatch: Any, what: str):
    """Nothing was sent for it, so nobody waits until its time is up, and no person is asked."""
    create, save, tags = store.create_variable, PrefectRecords.save, {"claim": [], "permit": [store.ENTRY_TAG]}[what]
    away = httpx.ReadError("lost", request=httpx.Request("POST", f"{proxy.url}/api/variables/"))
    is_lost = False

    async def create_and_lose(variable: dict[str, Any], **options: Any) -> str | None:
        nonlocal is_lost
        ref = await create(variable, **options)
        if variable["tags"] == tags and not is_lost:
            is_lost = True
            monkeypatch.setattr(PrefectRecords, "save", AsyncMock(side_effect=away))  # it cannot be given back either
            raise away
        return ref

    monkeypatch.setattr(store, "create_variable", create_and_lose)
    retried = pc.kickoff_crew.with_options(retry_delay_seconds=[2.0])
    calling = asyncio.ensure_future(retried(server.crew(), {"text": "a"}, idempotency_key=key))
    await until(lambda: is_lost, "an answer is lost")
    await asyncio.sleep(0.5)
    monkeypatch.setattr(PrefectRecords, "save", save)
    kickoff_id = await asyncio.wait_for(calling, 20)
    assert server.requests["kickoff"] == 1
    given_up, started = await attempts(key)
    assert given_up.phase == NOT_STARTED
    assert given_up.entries == {"claim": 1, "permit": 2}[what]
    assert started.phase == STARTED
    assert started.kickoff_id == kickoff_id
    assert started.owner == given_up.owner


async def test_a_try_after_a_sent_kickoff_has_a_new_nonce(server: CrewServer, key: str, monkeypatch: Any):
    monkeypatch.setattr(kickoff_module, "LIMITED_FOR", 0.05)
    server.faults.add("kickoff:503=1@1")
    retried = pc.kickoff_crew.with_options(retry_delay_seconds=[0.1])
    await retried(server.crew(), {"text": "a"}, idempotency_key=key)
    refused, started = await attempts(key)
    assert refused.phase == NOT_STARTED
    assert started.phase == STARTED
    assert refused.owner != started.owner


async def test_a_refused_name_that_is_not_shown_is_asked_for_slowly(server: CrewServer, key: str, monkeypatch: Any):
    """A replica of the Prefect API that lags answers 409, and then does not list the name."""
    monkeypatch.setattr(claims, "AGAIN", 60.0)
    claimed = AsyncMock(return_value=False)
    monkeypatch.setattr(PrefectRecords, "claim", claimed)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(start(server, key), 3)
    assert claimed.call_count <= 2


async def test_an_unrecorded_id_is_reported(server: CrewServer, key: str, proxy: Proxy, caplog: Any, monkeypatch: Any):
    monkeypatch.setattr(variables, "SAVE_FOR", 0.5)
    server.faults.add("kickoff:latency=1.0")
    calling = asyncio.ensure_future(start(server, key))
    await until(lambda: server.requests["kickoff"], "the kickoff is sent")
    proxy.cut()
    run = await calling
    assert f"prefect-crew runs resolve '{key}' --kickoff-id {run.kickoff_id}" in caplog.text
    assert "could not be updated" in caplog.text
    proxy.restore()
    assert await phases(key) == [CLAIMED]


async def test_without_a_new_permit_nothing_is_sent_again(server: CrewServer, key: str, proxy: Proxy, monkeypatch: Any):
    server.faults.add("kickoff:429=0.2@1")

    def refuse_permits(problem: Exception) -> float | None:
        proxy.refuse = "POST /api/variables/"
        return kickoff_delay(problem)

    monkeypatch.setattr(kickoff_module, "kickoff_delay", refuse_permits)  # after the answer, before the next permit
    with pytest.raises(pc.PrefectRefusedError, match=r"HTTP 403.*Nothing was started"):
        await start(server, key)
    proxy.refuse = None
    assert server.requests["kickoff"] == 1
    assert await phases(key) == [NOT_STARTED]


async def test_a_lease_begins_before_its_request(key: str, monkeypatch: pytest.MonkeyPatch):
    """The Prefect server counts the time of a claim from its creation, which the caller does not see."""
    request, leases = prefect_api._request_once, [Lease(30.0, _wall=0.0), Lease(30.0, _wall=0.0)]
    record, lasting = new_record(key), list[bool]()

    async def send(client: Any, method: str, path: str, **options: Any) -> Any:
        if path == "/variables/":
            is_permit = bool(options["json"]["tags"])
            lasting.append(not leases[is_permit].is_over)
        return await request(client, method, path, **options)

    monkeypatch.setattr(prefect_api, "_request_once", send)
    assert await RECORDS.claim(record, leases[0])
    assert await RECORDS.permit(record, 30, before=leases[0], lease=leases[1])
    assert len(lasting) >= 2
    assert all(lasting)
