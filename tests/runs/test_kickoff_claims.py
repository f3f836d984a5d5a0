"""Opening a run whose key has a claim already, or whose caller or Prefect API goes away in the middle."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import anyio
import httpx
import pytest
from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Failed

from prefect_crew import CrewFailedError, CrewResult, DeployedCrew, arun_crew, kickoff_crew
from prefect_crew._internal import prefect_api
from prefect_crew.client import _transport
from prefect_crew.client._client import CrewClient
from prefect_crew.client._retry_safety import kickoff_delay
from prefect_crew.client.inputs import Inputs
from prefect_crew.crew import Crew
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import (
    CrewError,
    InvalidInputsError,
    KickoffUncertainError,
    PrefectAwayError,
    PrefectRefusedError,
    ResolveError,
    TooManyAttemptsError,
)
from prefect_crew.records import store, variables
from prefect_crew.records.model import Lease, RecordPhase, RunRecord, utcnow
from prefect_crew.records.resolve import unresolved
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import claims
from prefect_crew.runs import kickoff as kickoff_module
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.proxy import Proxy
from support.records import LONG_AGO, attempts, key, new_record, phases, put
from support.scripts import FAILS, slow
from support.seen import Seen
from support.webhooks import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

RECORDS = PrefectRecords()


# Claims of others


async def claim(idempotency_key: str, crew: DeployedCrew, *, permit: float | None = None, **fields: Any) -> RunRecord:
    """Claim a run with the input text: a, as somebody else; with a permit that is good for so many seconds."""
    known = {
        "crew": crew.label,
        "crew_url": crew.url,
        "inputs_digest": Inputs.of({"text": "a"}).digest,
        "good_for": 60.0,
    }
    return await put(new_record(idempotency_key, **known | fields), permit=permit)


@pytest.mark.parametrize("given_back", [False, True])
async def test_who_finds_a_claim_waits_for_its_id_or_starts_a_run_where_it_is_given_back(
    crew_server: CrewServerFactory, given_back: bool
):
    server, idempotency_key, theirs = crew_server("echo"), key(), f"theirs {uuid.uuid4()}"
    stored = await claim(idempotency_key, server.crew())
    finding = asyncio.ensure_future(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))
    done, _ = await asyncio.wait({finding}, timeout=0.5)
    assert not done
    if given_back:
        stored.phase = RecordPhase.NOT_STARTED
    else:
        assert await RECORDS.permit(stored, 30)
        stored.phase, stored.kickoff_id, stored.kicked_off_at = RecordPhase.STARTED, theirs, utcnow()
    await RECORDS.save(stored)
    assert (await finding).kickoff_id in ({run.id for run in server.runs} if given_back else {theirs})
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED] * given_back + [RecordPhase.STARTED]


async def test_who_cannot_check_the_inputs_still_finds_the_run_of_a_later_number(crew_server: CrewServerFactory):
    # The first number is free, so the call claims it before it has read that the second one holds a run.
    server, idempotency_key, theirs = crew_server("echo", faults=["inputs:401@1-"]), key(), f"theirs {uuid.uuid4()}"
    await claim(idempotency_key, server.crew(), permit=60.0, attempt=2, phase=RecordPhase.STARTED, kickoff_id=theirs)
    run = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert (run.kickoff_id, server.requests["kickoff"]) == (theirs, 0)


@pytest.mark.parametrize(
    "fields",
    [{"good_for": LONG_AGO}, {"flow_run_id": str(uuid.uuid4())}, {"good_for": LONG_AGO, "inputs_digest": "d" * 32}],
    ids=["time is up", "flow run is gone", "other inputs"],
)
async def test_a_claim_that_nothing_was_sent_for_is_voided_and_the_run_is_started(
    crew_server: CrewServerFactory, fields: dict[str, Any]
):
    server, idempotency_key = crew_server("echo"), key()
    theirs = await claim(idempotency_key, server.crew(), **fields)
    run = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert [run.kickoff_id] == [one.id for one in server.runs]
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED, RecordPhase.STARTED]
    # Its owner, were it alive, would get that error.
    assert not await RECORDS.permit(theirs, 30)


@pytest.mark.parametrize(
    ("permit", "fields"),
    [(LONG_AGO, {}), (60.0, {"flow_run_id": str(uuid.UUID(int=7))})],
    ids=["time is up", "flow run is gone"],
)
async def test_a_kickoff_that_may_have_been_sent_is_uncertain(
    crew_server: CrewServerFactory, permit: float, fields: dict[str, Any]
):
    server, idempotency_key = crew_server("echo"), key()
    await claim(idempotency_key, server.crew(), permit=permit, **fields)
    with pytest.raises(KickoffUncertainError, match="ended before it recorded the answer"):
        await asyncio.wait_for(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key), 20)
    assert server.requests["kickoff"] == 0


# Claims and permits that are used too late, or not at all


async def resolved(crew_server: CrewServerFactory, phase: RecordPhase, **said: Any) -> tuple[Any, Any]:
    """Kick a crew off, and resolve the claim while its inputs are checked."""
    server, idempotency_key = crew_server("echo", faults=["inputs:latency=1"]), key()
    calling = asyncio.ensure_future(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))
    await until(lambda: server.requests["inputs"], "the inputs are checked")
    (stored,) = await attempts(idempotency_key)
    assert await RECORDS.resolve(stored, phase, **said)
    return (await calling).kickoff_id, server


async def test_a_claim_that_was_resolved_in_between_is_not_posted(crew_server: CrewServerFactory):
    theirs = f"theirs {uuid.uuid4()}"
    found, server = await resolved(crew_server, RecordPhase.STARTED, kickoff_id=theirs)
    assert (found, server.requests["kickoff"]) == (theirs, 0)
    started, server = await resolved(crew_server, RecordPhase.NOT_STARTED)
    assert [started] == [run.id for run in server.runs]


async def test_a_claim_next_to_another_that_it_was_not_decided_by_is_given_back(crew_server: CrewServerFactory):
    # As prune leaves a key whose earlier attempts it deletes while somebody starts a later one.
    server, idempotency_key = crew_server("echo", faults=["inputs:latency=1@1"]), key()
    theirs = f"theirs {uuid.uuid4()}"
    await claim(idempotency_key, server.crew(), attempt=2, phase=RecordPhase.STARTED, kickoff_id=theirs)
    for _ in range(3):
        run = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
        assert (run.kickoff_id, server.requests["kickoff"]) == (theirs, 0)
        assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED, RecordPhase.STARTED]


async def test_a_kickoff_whose_permit_is_over_is_not_sent_and_its_run_is_claimed_anew(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    leases: list[Lease] = []

    def lease(seconds: float) -> Lease:
        leases.append(Lease(LONG_AGO if len(leases) == 1 else seconds))  # the claim's, then its permit's
        return leases[-1]

    monkeypatch.setattr(kickoff_module, "Lease", lease)
    server, idempotency_key = crew_server("echo"), key()
    await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert len(leases) == 5
    assert (server.requests["kickoff"], server.kickoffs) == (1, 1)
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED, RecordPhase.STARTED]


async def test_permits_that_are_over_again_and_again_end_in_an_error(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff_module, "LIMITED_FOR", 0.5)
    monkeypatch.setattr(kickoff_module, "Lease", lambda seconds: Lease(LONG_AGO))
    server, idempotency_key = crew_server("echo"), key()
    with pytest.raises(CrewError, match="this call lost each claim before its kickoff could be sent"):
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert server.requests["kickoff"] == 0
    assert set(await phases(idempotency_key)) == {RecordPhase.NOT_STARTED}


async def test_an_id_that_another_record_holds_is_uncertain(crew_server: CrewServerFactory):
    # A proxy that caches or deduplicates kickoffs gives one id to two of them.
    server, first, second = crew_server("echo"), key(), key()
    run = await server.crew().atrigger({"text": "a"}, idempotency_key=first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrewClient, "kickoff", AsyncMock(return_value=run.kickoff_id))
        with pytest.raises(KickoffUncertainError, match=f"which belongs to idempotency key '{first}'"):
            await server.crew().atrigger({"text": "a"}, idempotency_key=second)
    assert await phases(second) == [RecordPhase.UNCERTAIN]


async def test_an_id_that_two_kickoffs_bring_at_the_same_moment_is_uncertain_for_one_of_them(
    crew_server: CrewServerFactory,
):
    server, keys, shared = crew_server("echo"), [key(), key()], f"shared {uuid.uuid4()}"
    both = asyncio.Barrier(2)

    async def kickoff(*_: Any, **__: Any) -> str:
        await both.wait()
        return shared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrewClient, "kickoff", kickoff)
        calls = [server.crew().atrigger({"text": "a"}, idempotency_key=one) for one in keys]
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["CrewRun", "KickoffUncertainError"]
    records = [record for one in keys for record in await attempts(one)]
    assert sorted(str(record.phase) for record in records) == ["started", "uncertain"]
    holder = await RECORDS.of_kickoff(shared)
    assert holder is not None
    assert holder.ref == next(record.ref for record in records if record.phase is RecordPhase.STARTED)


# Cancelled callers


async def cancelled_at(request: str, server: CrewServer, idempotency_key: str, way: str = "cancelled") -> None:
    """Cancel a call shortly after the server got a request of it; or its flow times out: that cancels at each await."""
    scope = anyio.CancelScope()

    async def call() -> None:
        with scope if way != "cancelled" else nullcontext():
            calls = [server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)]
            await (asyncio.gather(*calls) if way == "timed out in a gather" else calls[0])
        raise asyncio.CancelledError

    calling = asyncio.ensure_future(call())
    await until(lambda: server.requests[request], "the request is made")
    await asyncio.sleep(0.3)
    scope.cancel()
    if way == "cancelled":
        calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


@pytest.mark.parametrize("way", ["cancelled", "timed out", "timed out in a gather"])
async def test_a_kickoff_in_flight_is_seen_to_its_end_although_its_caller_is_cancelled(
    crew_server: CrewServerFactory, caplog: pytest.LogCaptureFixture, way: str
):
    server, idempotency_key = crew_server("echo", faults=["kickoff:latency=1.0@1"]), key()
    await cancelled_at("kickoff", server, idempotency_key, way)
    (record,) = await attempts(idempotency_key)
    assert (record.phase, record.kickoff_id) == (RecordPhase.STARTED, server.runs[0].id)
    assert "is left running" in caplog.text
    assert server.requests["stop"] == 0
    found = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert found.kickoff_id == record.kickoff_id


def end_the_loop(server: CrewServer, idempotency_key: str, is_time: Callable[[], Any], moment: str) -> None:
    """Call the crew, and end the event loop as Ctrl-C does once it is time."""

    async def call() -> None:
        calling = asyncio.ensure_future(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))
        await until(is_time, moment)
        asyncio.get_running_loop().call_soon(signal.default_int_handler, signal.SIGINT, None)
        await calling

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(call())


def test_a_kickoff_in_flight_is_seen_to_its_end_although_its_event_loop_ends(crew_server: CrewServerFactory):
    # So ends that of `run_crew` in a flow that is not async, where the flow times out or a worker shuts down.
    server, idempotency_key = crew_server("echo", faults=["kickoff:latency=1.0@1"]), key()
    end_the_loop(server, idempotency_key, lambda: server.requests["kickoff"], "the kickoff is sent")
    (record,) = asyncio.run(attempts(idempotency_key))
    assert (record.phase, record.kickoff_id) == (RecordPhase.STARTED, server.runs[0].id)


@pytest.mark.parametrize(("fault", "phase"), [("404", RecordPhase.NOT_STARTED), ("500", RecordPhase.UNCERTAIN)])
async def test_what_became_of_a_cancelled_callers_kickoff_is_on_record(
    crew_server: CrewServerFactory, fault: str, phase: RecordPhase
):
    server, idempotency_key = crew_server("echo", faults=["kickoff:latency=1.0@1", f"kickoff:{fault}@1"]), key()
    await cancelled_at("kickoff", server, idempotency_key)
    assert await phases(idempotency_key) == [phase]


@pytest.mark.parametrize(
    ("fault", "request_of_it", "way"),
    [
        ("inputs:latency=30", "inputs", "cancelled"),
        ("inputs:latency=30", "inputs", "timed out"),
        ("kickoff:429=30", "kickoff", "timed out in a gather"),
    ],
)
async def test_a_caller_that_is_cancelled_before_its_kickoff_gives_the_claim_back(
    crew_server: CrewServerFactory, fault: str, request_of_it: str, way: str
):
    server, idempotency_key = crew_server("echo", faults=[fault]), key()
    await cancelled_at(request_of_it, server, idempotency_key, way)
    # Without a permit its claim is deleted.
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED] * server.requests["kickoff"]
    assert server.kickoffs == 0


async def test_a_start_that_is_refused_again_and_again_leaves_no_record(crew_server: CrewServerFactory):
    server, idempotency_key = crew_server("echo"), key()
    for _ in range(3):
        with pytest.raises(InvalidInputsError, match="text"):
            await server.crew().atrigger({}, idempotency_key=idempotency_key)
        assert await phases(idempotency_key) == []
    run = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    (record,) = await attempts(idempotency_key)
    assert (record.attempt, record.kickoff_id) == (1, run.kickoff_id)


async def test_a_start_that_is_refused_once_its_claim_is_over_says_so_on_record(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff_module, "Lease", lambda seconds: Lease(LONG_AGO))
    server, idempotency_key = crew_server("echo"), key()
    with pytest.raises(InvalidInputsError):
        await server.crew().atrigger({}, idempotency_key=idempotency_key)
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED]


async def test_a_key_without_a_number_left_starts_nothing_and_says_what_to_do(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "MOST_ATTEMPTS", 2)
    server, idempotency_key = crew_server("echo"), key()
    failed = {"phase": RecordPhase.ENDED, "state": CrewState.FAILED, "ended_at": utcnow()}
    for attempt in (1, 2):
        await claim(idempotency_key, server.crew(), attempt=attempt, **failed)
    with pytest.raises(TooManyAttemptsError, match=r"Nothing was started. .* prefect-crew runs prune"):
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert not server.requests


async def test_kickoffs_that_did_not_start_do_not_use_up_the_numbers_of_a_key(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "MOST_ATTEMPTS", 6)
    server, idempotency_key = crew_server("echo"), key()
    failed = {"phase": RecordPhase.ENDED, "state": CrewState.FAILED, "ended_at": utcnow()}
    await claim(idempotency_key, server.crew(), **failed)
    refused = [await claim(idempotency_key, server.crew(), attempt=attempt, permit=30.0) for attempt in (2, 3, 4, 5, 6)]
    for record in refused:
        record.phase, record.reason = RecordPhase.NOT_STARTED, "ConnectError"
        await RECORDS.save(record)
    run = await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert [run.kickoff_id] == [one.id for one in server.runs]
    assert [(one.attempt, one.phase) for one in await attempts(idempotency_key)] == [
        (1, RecordPhase.ENDED),
        (2, RecordPhase.STARTED),
    ]
    assert not await RECORDS.permit(refused[-1], 30, before=Lease(-1.0)), "nothing is sent for what was deleted"


async def test_a_verdict_about_a_claim_stays_while_its_owner_may_be_alive(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store, "MOST_ATTEMPTS", 1)
    server, idempotency_key = crew_server("echo"), key()
    theirs = await claim(idempotency_key, server.crew())
    (read,) = await attempts(idempotency_key)
    assert await RECORDS.resolve(read, RecordPhase.NOT_STARTED)
    with pytest.raises(TooManyAttemptsError):
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert not await RECORDS.permit(theirs, 30)
    monkeypatch.setattr(store, "RESOLUTION_STANDS", -1.0)
    assert (await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)).kickoff_id


async def test_a_kickoff_that_is_not_on_its_way_yet_is_not_sent_once_its_caller_is_cancelled(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    connecting, connected = asyncio.Event(), asyncio.Event()

    async def kickoff(*_: Any, before_sending: Callable[[], None], **__: Any) -> str:
        connecting.set()
        await connected.wait()
        before_sending()
        return "sent"

    monkeypatch.setattr(CrewClient, "kickoff", kickoff)
    server, idempotency_key = crew_server("echo"), key()
    calling = asyncio.ensure_future(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))
    await connecting.wait()
    calling.cancel()
    await asyncio.wait({calling}, timeout=0.1)
    connected.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED]


@pytest.mark.parametrize("problem", ["cancelled", "no block any more"])
async def test_a_refused_token_that_cannot_be_renewed_has_started_nothing(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, problem: str
):
    reading = asyncio.Event()

    async def reloaded(self: Crew) -> None:
        reading.set()
        if problem == "cancelled":
            await asyncio.Event().wait()
        raise TypeError(problem)

    monkeypatch.setattr(Crew, "reloaded", reloaded)
    server, idempotency_key = crew_server("echo", faults=["kickoff:401"]), key()
    calling = asyncio.ensure_future(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))
    await reading.wait()
    if problem == "cancelled":
        calling.cancel()
    with pytest.raises(asyncio.CancelledError if problem == "cancelled" else TypeError):
        await calling
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED]


@pytest.mark.parametrize(
    ("cut", "phase"),
    [((CrewClient, "kickoff"), RecordPhase.UNCERTAIN), ((PrefectRecords, "_name_kickoff"), RecordPhase.STARTED)],
    ids=["in the midst of the kickoff", "over whose its id is"],
)
async def test_a_signal_is_not_taken_for_a_refusal_and_leaves_an_id_on_record(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, cut: tuple[Any, str], phase: RecordPhase
):
    async def interrupted(*_: Any, **__: Any) -> None:
        raise TerminationSignal(signal.SIGTERM)

    monkeypatch.setattr(*cut, interrupted)
    server, idempotency_key = crew_server("echo"), key()
    with pytest.raises(TerminationSignal):
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    (record,) = await attempts(idempotency_key)
    assert (record.phase, record.kickoff_id) == (phase, next((run.id for run in server.runs), None))


@pytest.mark.parametrize("good_for", [60.0, LONG_AGO], ids=["of a caller", "of a claim that was given up"])
async def test_a_permit_that_cannot_be_read_starts_nothing_and_is_reported(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, good_for: float
):
    # Somebody edited it, or another tool uses its name.
    server, idempotency_key = crew_server("echo"), key()
    create = store.create_variable

    async def spoilt(variable: dict[str, Any], **options: Any) -> str | None:
        if variable["tags"] == [store.ENTRY_TAG]:
            await create(variable | {"value": "edited"})
        return await create(variable, **options)

    monkeypatch.setattr(store, "create_variable", spoilt)
    if good_for < 0:
        await claim(idempotency_key, server.crew(), good_for=good_for)
    with pytest.raises(CrewError, match="this version cannot read it"):
        await asyncio.wait_for(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key), 20)
    assert server.requests["kickoff"] == 0


async def test_a_post_that_does_not_end_is_not_waited_for_for_ever(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff_module, "FINISH", 0.2)
    server, idempotency_key = crew_server("echo", faults=["kickoff:timeout"]), key()
    # Not wait_for: its own cancellation is what `cancelled_at` expects.
    async with asyncio.timeout(20) as limit:
        await cancelled_at("kickoff", server, idempotency_key)
    assert not limit.expired()
    # The POST that was left loses its connection as the caller's session closes, and may have written that down by now.
    assert await phases(idempotency_key) in ([RecordPhase.CLAIMED], [RecordPhase.UNCERTAIN])


@pytest.mark.parametrize("at", ["inputs", "kickoff"])
async def test_a_cancelled_start_does_not_wait_for_a_claim_that_is_given_back_slowly(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, at: str
):
    async def hang(*_: Any) -> None:
        begun.set()
        await asyncio.sleep(60)

    begun = asyncio.Event()
    monkeypatch.setattr(kickoff_module, "FINISH", 0.3)
    monkeypatch.setattr(PrefectRecords, "save", hang)
    fault = {"inputs": "inputs:latency=60", "kickoff": "kickoff:404"}[at]
    server, idempotency_key = crew_server("echo", faults=[fault]), key()
    calling = asyncio.ensure_future(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))
    if at == "inputs":
        await until(lambda: server.requests["inputs"], "the inputs are asked for")
    else:
        await asyncio.wait_for(begun.wait(), 20)  # the kickoff was refused
    calling.cancel()
    done, _ = await asyncio.wait({calling}, timeout=10)
    assert done, "it ends without the save"
    assert calling.cancelled()


async def test_a_retry_of_the_flow_run_says_at_once_that_its_kickoff_is_uncertain_and_only_resolving_waits(
    crew_server: CrewServerFactory,
):
    server, idempotency_key = crew_server("echo"), key()

    @flow(retries=1)
    async def trip() -> None:
        if flow_run.run_count == 1:  # its process was killed with a permit that is good for ten minutes
            await claim(idempotency_key, server.crew(), permit=600, flow_run_id=str(flow_run.id), flow_run_count=1)
            raise RuntimeError("killed")
        await arun_crew(server.crew(), {"text": "a"}, idempotency_key=idempotency_key)

    with pytest.raises(KickoffUncertainError):
        await trip()
    assert server.requests["kickoff"] == 0
    with pytest.raises(ResolveError, match=r"may still be sent, or on its way.*Resolve it in (59\d|6\d\d) s"):
        await unresolved(idempotency_key, RECORDS)


# A Prefect API that is away


async def test_nothing_is_sent_where_no_claim_can_be_written(crew_server: CrewServerFactory, proxy: Proxy):
    server = crew_server("echo")
    proxy.cut()
    with pytest.raises(PrefectAwayError, match=r"does not answer.*Nothing was started") as caught:
        await server.crew().atrigger({"text": "a"}, idempotency_key=key())
    assert isinstance(caught.value.__cause__, httpx.HTTPError)
    assert not server.requests


async def test_a_kickoff_task_is_retried_where_prefect_was_away_and_not_where_it_refused():
    for error, is_retried in ((PrefectAwayError("away"), True), (CrewError("refused"), False)):
        state: Any = Failed(data=error)
        assert kickoff_crew.retry_condition_fn is not None
        assert await kickoff_crew.retry_condition_fn(kickoff_crew, None, state) is is_retried  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("what", ["claim", "permit"])
async def test_a_retry_knows_its_own_claim_whose_answer_was_lost(
    crew_server: CrewServerFactory, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, what: str
):
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
    server, idempotency_key = crew_server("echo"), key()
    retried = kickoff_crew.with_options(retry_delay_seconds=[2.0])
    calling = asyncio.ensure_future(retried(server.crew(), {"text": "a"}, idempotency_key=idempotency_key))
    await until(lambda: is_lost, "an answer is lost")
    await asyncio.sleep(0.5)
    monkeypatch.setattr(PrefectRecords, "save", save)
    kickoff_id = await asyncio.wait_for(calling, 20)
    assert server.requests["kickoff"] == 1
    given_up, started = await attempts(idempotency_key)
    assert (given_up.phase, given_up.entries) == (RecordPhase.NOT_STARTED, {"claim": 1, "permit": 2}[what])
    assert (started.phase, started.kickoff_id, started.owner) == (RecordPhase.STARTED, kickoff_id, given_up.owner)


async def test_a_try_after_one_that_has_sent_a_kickoff_claims_under_a_nonce_of_its_own(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff_module, "LIMITED_FOR", 0.05)
    server, idempotency_key = crew_server("echo", faults=["kickoff:503=1@1"]), key()
    retried = kickoff_crew.with_options(retry_delay_seconds=[0.1])
    await retried(server.crew(), {"text": "a"}, idempotency_key=idempotency_key)
    refused, started = await attempts(idempotency_key)
    assert (refused.phase, started.phase) == (RecordPhase.NOT_STARTED, RecordPhase.STARTED)
    assert refused.owner != started.owner


async def test_a_name_that_is_refused_and_not_shown_is_not_asked_for_in_a_tight_loop(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    """A replica of the Prefect API that lags answers 409, and then does not list the name."""
    monkeypatch.setattr(claims, "AGAIN", 60.0)
    claimed = AsyncMock(return_value=False)
    monkeypatch.setattr(PrefectRecords, "claim", claimed)
    server = crew_server("echo")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(server.crew().atrigger({"text": "a"}, idempotency_key=key()), 3)
    assert claimed.call_count <= 2


async def test_an_id_that_cannot_be_recorded_is_reported_with_what_to_do(
    crew_server: CrewServerFactory,
    proxy: Proxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setattr(variables, "SAVE_FOR", 0.5)
    server, idempotency_key = crew_server("echo", faults=["kickoff:latency=1.0"]), key()
    calling = asyncio.ensure_future(server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))
    await until(lambda: server.requests["kickoff"], "the kickoff is sent")
    proxy.cut()
    run = await calling
    assert f"prefect-crew runs resolve '{idempotency_key}' --kickoff-id {run.kickoff_id}" in caplog.text
    assert "could not be updated" in caplog.text
    proxy.restore()
    assert await phases(idempotency_key) == [RecordPhase.CLAIMED]


async def test_without_a_new_permit_nothing_is_sent_again(
    crew_server: CrewServerFactory, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    server, idempotency_key = crew_server("echo", faults=["kickoff:429=0.2@1"]), key()

    def refuse_permits(problem: Exception) -> float | None:
        proxy.refuse = "POST /api/variables/"
        return kickoff_delay(problem)

    monkeypatch.setattr(kickoff_module, "kickoff_delay", refuse_permits)  # after the answer, before the next permit
    with pytest.raises(PrefectRefusedError, match=r"HTTP 403.*Nothing was started"):
        await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    proxy.refuse = None
    assert server.requests["kickoff"] == 1
    assert await phases(idempotency_key) == [RecordPhase.NOT_STARTED]


# Many callers at once: one run, equal results


@pytest.mark.parametrize("script", [slow(0.3), FAILS], ids=["slow", "failing"])
def test_twenty_callers_start_one_run(crew_server: CrewServerFactory, seen: Seen, script: str):
    server, idempotency_key = crew_server(script), key()

    async def result() -> Any:
        run = await server.crew().atrigger({}, idempotency_key=idempotency_key)
        await run.await_for_completion()
        return await run.afetch_result()

    async def race() -> list[Any]:
        return [*await asyncio.gather(*(result() for _ in range(20)), return_exceptions=True)]

    results = asyncio.run(race())
    assert server.kickoffs == 1
    assert {type(one) for one in results} == {CrewFailedError if script == FAILS else CrewResult}
    (kickoff_id,) = {one.kickoff_id for one in results}
    events = [one["event"] for one in seen.events(kickoff_id)]
    assert events.count("crew.failed" if script == FAILS else "crew.completed") == 1
    assert len(seen.records(idempotency_key)) == 1


async def test_a_claim_and_a_permit_that_wait_for_other_requests_begin_when_they_are_sent(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server, idempotency_key, began = crew_server("echo"), key(), list[float]()
    begin, once = Lease.begin, prefect_api._request_once

    def noted(lease: Lease) -> None:
        lease._wall, lease._monotonic = 0.0, 0.0  # what it waited for before does not count
        assert lease.is_over
        begin(lease)
        began.append(time.monotonic())

    async def sent(client: Any, method: str, path: str, *, json: Any) -> Any:
        if method == "POST" and str(json.get("name")).startswith("crew_run_"):
            began.append(0.0)
        return await once(client, method, path, json=json)

    monkeypatch.setattr(Lease, "begin", noted)
    monkeypatch.setattr(prefect_api, "_request_once", sent)
    await server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key)
    assert [bool(moment) for moment in began] == [True, False] * 2, "each begins right before its request"
    assert len(await attempts(idempotency_key)) == 1


def hold_connections(monkeypatch: pytest.MonkeyPatch, are_held: Callable[[Any], bool], *, seconds: float) -> Any:
    """Hold the first connection to a port of which `are_held` is true, and return what is set once it is held."""
    connect, held = asyncio.BaseEventLoop.create_connection, threading.Event()

    async def slow_connect(loop: Any, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if not held.is_set() and are_held(port):
            held.set()
            await asyncio.sleep(seconds)
        return await connect(loop, factory, host, port, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", slow_connect)
    return held


def test_a_loop_that_ends_before_the_first_byte_leaves_nothing_uncertain(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server, idempotency_key = crew_server("echo"), key()
    monkeypatch.setattr(_transport, "POST_KEEPALIVE", -1.0)  # the kickoff needs a connection of its own
    connecting = hold_connections(
        monkeypatch, lambda port: bool(server.requests["inputs"]) and str(port) in server.url, seconds=60
    )
    end_the_loop(server, idempotency_key, connecting.is_set, "the kickoff is about to be sent")
    assert server.requests["kickoff"] == 0
    assert asyncio.run(phases(idempotency_key)) == [RecordPhase.NOT_STARTED]


def test_an_id_is_on_record_although_the_loop_ends_while_it_is_written(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    server, idempotency_key = crew_server("echo"), key()
    connecting = hold_connections(
        monkeypatch, lambda port: bool(server.requests["kickoff"]) and str(port) not in server.url, seconds=1
    )
    end_the_loop(server, idempotency_key, connecting.is_set, "the id is about to be written")
    assert server.requests["kickoff"] == 1
    assert asyncio.run(phases(idempotency_key)) == [RecordPhase.STARTED]


async def cancel_after(event: asyncio.Event, call: Coroutine[Any, Any, Any]) -> None:
    """Make a call, and cancel it once the event is set."""
    calling = asyncio.ensure_future(call)
    await event.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


async def test_a_claim_is_given_back_although_its_caller_is_cancelled_meanwhile(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    withdraw, withdrawing = PrefectRecords.withdraw, asyncio.Event()

    async def slow_withdraw(records: PrefectRecords, record: RunRecord) -> None:
        withdrawing.set()
        await asyncio.sleep(0.3)
        await withdraw(records, record)

    monkeypatch.setattr(PrefectRecords, "withdraw", slow_withdraw)
    server, idempotency_key = crew_server("echo"), key()
    await cancel_after(withdrawing, server.crew().atrigger({"no": "text"}, idempotency_key=idempotency_key))
    assert await phases(idempotency_key) == []


async def test_a_cancelled_call_writes_nothing_over_a_claim_that_somebody_has_resolved(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    permit, asking = PrefectRecords.permit, asyncio.Event()

    async def slow_permit(records: PrefectRecords, record: RunRecord, good_for: float, **options: Any) -> bool:
        asking.set()
        await asyncio.sleep(0.3)
        stored = (await attempts(idempotency_key))[0]
        assert await RECORDS.resolve(stored, RecordPhase.STARTED, kickoff_id="theirs")
        return await permit(records, record, good_for, **options)

    monkeypatch.setattr(PrefectRecords, "permit", slow_permit)
    server, idempotency_key = crew_server("echo"), key()
    await cancel_after(asking, server.crew().atrigger({"text": "a"}, idempotency_key=idempotency_key))
    assert await phases(idempotency_key) == [RecordPhase.STARTED]
    assert server.requests["kickoff"] == 0
