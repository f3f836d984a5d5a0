"""Start a run: what is checked, sent and logged, and what becomes of a start whose caller or crew database goes away.

tests/outcomes has what a second call does after each answer, and after each death.
"""

import asyncio
import logging
import signal
import threading
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any
from unittest.mock import AsyncMock

import anyio
import httpx
import pytest

import prefect_crew as pc
from prefect_crew.client import _transport
from prefect_crew.client._client import CrewClient
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import NotStartedError, StoreError
from prefect_crew.runs import start as start_module
from prefect_crew.runs.database import in_store
from prefect_crew.store import attempts
from prefect_crew.store.decision import AttemptState
from prefect_crew.testing import CrewServerFactory
from support.scripts import FAILS, script, slow
from support.seen import Seen
from support.waiting import LIMIT, until
from support.webhooks import BODIES, events_of, url_of

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")

TRIP = script({"output": "{{ city }}"}, inputs=["city"])
TONED = script({"output": "{{ city }}"}, inputs=["city", {"name": "tone", "required": False, "default": "dry"}])
NOT_STARTED, UNCERTAIN, STARTED = AttemptState.NOT_STARTED, AttemptState.UNCERTAIN, AttemptState.STARTED


async def start(server: CrewServer, key: str, inputs: Any = None, **options: Any) -> pc.CrewRun:
    """Find the run of a key with the inputs (text: a), or start it, for a caller that does not wait."""
    return await server.crew().atrigger({"text": "a"} if inputs is None else inputs, idempotency_key=key, **options)


async def states(key: str) -> list[AttemptState]:
    return [attempt.state for attempt in await in_store(attempts.of_key, key)]


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        ("echo", ["found run {run}, which has completed. Its result is used and nothing is started"]),
        (
            FAILS,
            [
                "the last run of this key gave no result, and another run is being started",
                "found run {run}, which has failed. Nothing is started",
            ],
        ),
    ],
    ids=["completed", "failed"],
)
async def test_the_log_says_what_a_call_does(crew_server: Any, key: str, caplog: Any, spec: str, ends: list[str]):
    crew, expected = crew_server(spec).crew(max_attempts=2), list[str]()
    in_flight = "found run {run}, which is in flight. This call waits for it and starts nothing"
    for step in ("a run is being started", in_flight, *ends):
        run = await crew.atrigger({"text": "a"} if spec == "echo" else {}, idempotency_key=key)
        expected.append(f"Crew {crew.label}: {step.format(run=run.kickoff_id)}. (key {key})")
        if len(expected) > 1:
            with suppress(pc.CrewFailedError):
                await run.await_for_completion()
    assert [one.getMessage() for one in caplog.records if f"(key {key})" in one.getMessage()] == expected


# Inputs


@pytest.mark.parametrize(
    ("inputs", "missing", "unknown", "problem"),
    [
        (
            {"days": 3},
            ["city"],
            ["days"],
            "Missing inputs: city. A Flow needs none of its inputs: save it with --flow, or DeployedCrew(flow=True). "
            "Unknown inputs: days.",
        ),
        (
            {"city": "Lisbon", "tones": 1, "size": 3},
            *([], ["tones", "size"]),
            "Unknown inputs: tones (did you mean tone?), size.",
        ),
    ],
)
async def test_refused_inputs_may_be_corrected(
    crew_server: CrewServerFactory, key: str, inputs: Any, missing: list[str], unknown: list[str], problem: str
):
    server = crew_server(TONED)
    with pytest.raises(pc.InvalidInputsError) as caught:
        await start(server, key, inputs)
    error = caught.value
    assert (error.missing_inputs, error.unknown_inputs) == (missing, unknown)
    assert error.before_kickoff
    assert str(error) == (
        f"{problem} The crew takes: city, tone. Nothing was started. To list the crew's inputs, run: prefect-crew "
        "inputs CREW. To send the unknown inputs anyway, set allow_extra_inputs=True on the block. "
        f"Crew {server.crew().label}, idempotency key {key!r}."
    )
    assert server.requests["kickoff"] == 0
    await start(server, key, {"city": "Lisbon", "tone": "dry"})
    assert await states(key) == [STARTED]


@pytest.mark.parametrize(
    ("spec", "allow", "given"),
    [
        (TRIP, True, {"city": "Lisbon", "color": "red", "size": "3"}),
        (TRIP, False, {"city": "x", "crewai_trigger_payload": "{}", "id": str(uuid.UUID(int=7))}),
        (script({"output": "x"}), False, {"anything": "goes"}),
    ],
    ids=["where the block allows them", "injected", "of a crew that names none"],
)
async def test_extra_inputs_are_sent_without_a_word(crew_server: Any, caplog: Any, spec: str, allow: bool, given: Any):
    server = crew_server(spec)
    run = await server.crew(allow_extra_inputs=allow).atrigger(given)
    assert server.run(run.kickoff_id).inputs == given
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_flow_that_refuses_its_id_has_started_nothing(crew_server: CrewServerFactory, key: str):
    server = crew_server(script({"output": "{{ city }}"}, inputs=["city"], flow=True))
    says = r"'inputs\.id' must be a valid UUID\. Nothing was started\."
    with pytest.raises(pc.InvalidInputsError, match=says) as caught:
        await start(server, key, {"city": "Lisbon", "id": "42"})
    assert "Give every required input" not in str(caught.value)
    assert server.kickoffs == 0
    assert await states(key) == [NOT_STARTED]


async def test_a_kickoff_carries_key_meta_and_webhooks(crew_server: CrewServerFactory, key: str):
    server, inputs = crew_server(TRIP), {"city": ["Lisbon", "Porto"], "days": 3}
    given: dict[str, Any] = {"meta": {"order": 7, "idempotency_key": "not this one"}}
    given["webhooks"] = pc.Webhooks(crew="http://127.0.0.1:9/crew")
    for as_json, expected in ((False, {"city": '["Lisbon","Porto"]', "days": "3"}), (True, inputs)):
        crew, this_key = server.crew(flow=as_json, allow_extra_inputs=True), f"{key} {as_json}"
        sent = server.run((await crew.atrigger(inputs, idempotency_key=this_key, **given)).kickoff_id)
        assert sent.inputs == expected
        assert sent.meta == {"order": 7, "idempotency_key": this_key, "run_attempt": 1}
        assert sent.targets.crew == "http://127.0.0.1:9/crew"


# Tokens


async def test_only_the_token_of_a_block_is_renewed(crew_server: Any, key: str, caplog: pytest.LogCaptureFixture):
    """The attempt says where a run is; its caller, what may be shown of it."""
    server, other = crew_server(TRIP), crew_server(TRIP)
    name = f"moved-{uuid.uuid4().hex[:8]}"
    await server.crew().asave(name)
    crew = await pc.DeployedCrew.aload(name)
    crew.show = "none"
    server.token = other.token = "the-new-token"
    await other.crew().asave(name, overwrite=True)
    run = await crew.atrigger({"city": "Lisbon"}, idempotency_key=key)
    assert (server.unauthorized, server.kickoffs, other.requests["kickoff"]) == (1, 1, 0)
    assert (await run.afetch_result()).output == "Lisbon"
    (attempt,) = await in_store(attempts.of_key, key)
    assert attempt.crew_url == server.url
    assert await in_store(attempts.result_of, attempt.id) is None, "show='none' was set on the object in use, and holds"
    assert "has a new token" in caplog.text


# Answers, and the time to send


@pytest.mark.parametrize(("fault", "most"), [("429=0", 5), ("429=3600", 1)])
async def test_a_server_that_stays_busy_is_left(server: CrewServer, key: str, monkeypatch: Any, fault: str, most: int):
    monkeypatch.setattr(start_module, "LIMITED_FOR", 1.0)
    server.faults.add(f"kickoff:{fault}")
    with pytest.raises(pc.CrewAPIError) as caught:
        await start(server, key)
    assert caught.value.retry_after == float(fault.partition("=")[2])
    assert server.requests["kickoff"] <= most
    assert await states(key) == [NOT_STARTED]


async def test_an_id_of_another_key_is_uncertain(server: CrewServer, key: str):
    # A proxy that caches or deduplicates kickoffs gives one id to two of them.
    run = await start(server, key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrewClient, "kickoff", AsyncMock(return_value=run.kickoff_id))
        with pytest.raises(pc.KickoffUncertainError, match=f"names run {run.kickoff_id} of key '{key}'"):
            await start(server, f"{key} b")
    assert await states(f"{key} b") == [UNCERTAIN]


async def test_two_ids_of_one_kickoff_are_logged_and_in_one_event(
    receiver: str, crew_server: CrewServerFactory, key: str, caplog: pytest.LogCaptureFixture
):
    """A proxy has sent the kickoff twice: the webhook of one run comes before the answer, which names the other."""
    server = crew_server(slow(60), faults=["kickoff:hold-after-accept"])
    starting = asyncio.create_task(start(server, key, {}))
    await until(lambda: server.held, "the answer is on its way")
    (first,), hooks = server.runs, server.runs[0].targets
    async with httpx.AsyncClient(trust_env=False) as client:
        (
            await client.post(url_of(hooks, "crew"), json={**BODIES["crew-first"], "kickoff_id": "the other"})
        ).raise_for_status()
    server.release()
    assert (await starting).kickoff_id == "the other"
    (line,) = [one.getMessage() for one in caplog.records if "has two runs" in one.getMessage()]
    (event,) = await events_of(key, prefix="crew.second_run")
    assert (event["payload"]["kickoff_id"], event["payload"]["second"]) == ("the other", first.id)
    assert f"{key} has two runs: the other and {first.id}." in line


@pytest.mark.parametrize(
    "fields",
    [{}, {"show": "summary"}, {"show": "none"}, {"secret_inputs": ["text"]}],
    ids=["full", "summary", "none", "secret"],
)
async def test_the_servers_text_after_an_uncertain_kickoff_is_shown_as_the_crew_says(
    crew_server: CrewServerFactory, key: str, seen: Seen, fields: dict[str, Any]
):
    server = crew_server("echo", faults=["kickoff:500-after-accept"])
    errors = list[str]()
    for _ in range(2):
        with pytest.raises(pc.KickoffUncertainError) as caught:
            await server.crew(**fields).atrigger({"text": "a"}, idempotency_key=key)
        errors.append(str(caught.value))
    (attempt,) = await in_store(attempts.of_key, key)
    (event,) = await asyncio.to_thread(seen.events, f"{key}/1")
    assert event["event"] == "crew.uncertain"
    for text in (str(attempt.error), event["payload"]["reason"], *errors):
        assert "CrewAPIError" in text
        assert ("was asked for" in text) is (not fields)


def slow_begins(monkeypatch: pytest.MonkeyPatch, seconds: float, count: int) -> None:
    """Let the first transactions that begin an attempt take their time, as on a disk that is busy."""
    left = [seconds] * count

    async def slow(work: Any, *args: Any, **options: Any) -> Any:
        decision = await in_store(work, *args, **options)
        if work is attempts.begin and left:
            await asyncio.sleep(left.pop())
        return decision

    monkeypatch.setattr(start_module, "in_store", slow)


async def test_no_kickoff_is_sent_after_its_window(server: CrewServer, key: str, monkeypatch: Any):
    """The window counts from before the transaction. Prefect, or the caller, tries again."""
    monkeypatch.setattr(start_module, "SEND_WITHIN", 1.0)
    slow_begins(monkeypatch, 1.1, 1)
    with pytest.raises(NotStartedError, match="the time to send its kickoff was over") as raised:
        await start(server, key)
    assert kickoff_fate(raised.value) is KickoffFate.RETRY
    run = await start(server, key)
    assert server.requests["kickoff"] == 1
    assert [attempt.first_id for attempt in await in_store(attempts.of_key, key)] == [None, run.kickoff_id]


async def test_an_id_is_written_again_until_it_is_stored(server: CrewServer, key: str, monkeypatch: Any, caplog: Any):
    left = [StoreError("The disk is full.", operation="started", started="yes") for _ in range(3)]

    async def full(work: Any, *args: Any, **options: Any) -> Any:
        if work is attempts.started and left:
            raise left.pop()
        return await in_store(work, *args, **options)

    monkeypatch.setattr(start_module, "WRITE_AGAIN", (0.01,))
    monkeypatch.setattr(start_module, "in_store", full)
    run = await start(server, key)
    assert caplog.text.count("could not be recorded yet") == 1
    assert f"prefect-crew runs resolve '{key}' --kickoff-id {run.kickoff_id}" in caplog.text
    assert (await start(server, key)).kickoff_id == run.kickoff_id
    assert server.requests["kickoff"] == 1


# Cancelled callers


async def cancelled_at(is_time: Any, server: CrewServer, key: str, way: str = "cancelled") -> None:
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
    await asyncio.sleep(0.3)
    scope.cancel()
    if way == "cancelled":
        calling.cancel()
    server.release()
    with pytest.raises(asyncio.CancelledError):
        await calling


@pytest.mark.parametrize(
    ("faults", "way", "expected"),
    [
        (["kickoff:hold"], "cancelled", [STARTED]),
        (["kickoff:hold"], "timed out", [STARTED]),
        (["kickoff:hold", "kickoff:404"], "cancelled", [NOT_STARTED]),
        (["kickoff:hold", "kickoff:500"], "cancelled", [UNCERTAIN]),
        (["kickoff:429=30"], "timed out in a gather", [NOT_STARTED]),
        (["inputs:latency=30"], "cancelled", []),
    ],
)
async def test_a_cancelled_kickoff_is_recorded(
    crew_server: Any, key: str, caplog: pytest.LogCaptureFixture, faults: list[str], way: str, expected: list[Any]
):
    server = crew_server("echo", faults=faults)
    await cancelled_at(
        (lambda: server.held) if "kickoff:hold" in faults else faults[0].partition(":")[0], server, key, way
    )
    assert await states(key) == expected
    assert server.kickoffs == expected.count(STARTED)
    assert server.requests["stop"] == 0
    assert ("is left running" in caplog.text) is (STARTED in expected)
    found = await in_store(attempts.of_key, key)
    assert [attempt.first_id for attempt in found if attempt.first_id] == [run.id for run in server.runs]


@pytest.mark.parametrize("place", ["between the transaction and the POST", "before the first byte"])
async def test_a_cancelled_call_sends_no_kickoff(server: CrewServer, key: str, monkeypatch: Any, place: str):
    begun = asyncio.Event()

    async def kickoff(*_: Any, before_sending: Callable[[], None], **__: Any) -> str:
        begun.set()
        await asyncio.sleep(0.6)
        before_sending()
        return "sent"

    if place == "before the first byte":
        monkeypatch.setattr(CrewClient, "kickoff", kickoff)
    else:
        slow_begins(monkeypatch, 0.6, 1)
    await cancelled_at(begun.is_set if place == "before the first byte" else "inputs", server, key)
    assert server.requests["kickoff"] == 0
    assert await states(key) == [NOT_STARTED]


async def test_an_endless_post_is_not_waited_for(server: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start_module, "FINISH", 0.2)
    server.faults.add("kickoff:timeout")
    # Not wait_for: its own cancellation is what `cancelled_at` expects.
    async with asyncio.timeout(LIMIT) as limit:
        await cancelled_at("kickoff", server, key)
    assert not limit.expired()
    # The POST that was left loses its connection as the caller's session closes, and may have written that down by now.
    assert await states(key) in ([AttemptState.POSTING], [UNCERTAIN])


@pytest.mark.parametrize("last", ["inputs", "kickoff"])
def test_an_ended_loop_leaves_nothing_uncertain(server: CrewServer, key: str, monkeypatch: Any, last: str):
    """Ctrl-C ends the event loop while the connection for the kickoff is made, or while its answer is on its way."""
    connect, connecting = asyncio.BaseEventLoop.create_connection, threading.Event()

    async def slow_connect(loop: Any, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if server.requests["inputs"] and str(port) in server.url:
            connecting.set()
            await asyncio.sleep(60)
        return await connect(loop, factory, host, port, **options)

    async def call() -> None:
        calling = asyncio.ensure_future(start(server, key))
        await until(connecting.is_set if last == "inputs" else lambda: server.requests["kickoff"], "it is time")
        asyncio.get_running_loop().call_soon(signal.default_int_handler, signal.SIGINT, None)
        await calling

    server.faults.add("kickoff:latency=1.0@1")
    if last == "inputs":
        monkeypatch.setattr(_transport, "POST_KEEPALIVE", -1.0)  # the kickoff needs a connection of its own
        monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", slow_connect)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(call())
    (attempt,) = asyncio.run(in_store(attempts.of_key, key))
    assert attempt.state is (NOT_STARTED if last == "inputs" else STARTED)
    assert [run.id for run in server.runs] == ([] if last == "inputs" else [attempt.first_id])


async def test_a_run_that_fails_before_the_first_look_of_a_call_is_that_calls_failure(
    crew_server: CrewServerFactory, key: str, monkeypatch: pytest.MonkeyPatch
):
    server, may_look, identify, is_held = crew_server(FAILS), asyncio.Event(), start_module.identify, False

    async def held(*args: Any, **options: Any) -> Any:
        nonlocal is_held
        is_held = True
        await may_look.wait()
        return await identify(*args, **options)

    async def fail() -> Any:
        with pytest.raises(pc.CrewFailedError) as raised:
            await pc.arun_crew(server.crew(), {}, idempotency_key=key)
        return raised.value.kickoff_id

    monkeypatch.setattr(start_module, "identify", held)
    late = asyncio.create_task(fail())
    await until(lambda: is_held, "the late call")
    monkeypatch.setattr(start_module, "identify", identify)
    first = await fail()
    may_look.set()
    assert await late == first
    assert server.kickoffs == 1
    assert await fail() != first, "a call that is made now starts another"
