"""What the crew worker needs of Prefect that is not public."""

import asyncio
import contextlib
import re
import threading
import time
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import httpx
import prefect
import prefect.flow_engine
import prefect.task_runners
import pytest
from prefect import flow, task
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import AsyncClientContext
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.workers.base import BaseWorker

from prefect_crew._internal import flow_engine
from prefect_crew._internal.flow_engine import (
    HeldFlowRun,
    check_prefect,
    many_flow_runs,
    queue_requests,
    run_held_flow,
    shared,
)
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.worker import CrewWorker
from support.prefect_server import PrefectServer
from support.proxy import Proxy
from support.waiting import until


def test_the_installed_prefect_has_all_names():
    check_prefect()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (prefect.flow_engine, "capture_sigterm"),
        (prefect.flow_engine, "_send_heartbeats"),
        (prefect.results, "_aread_server_default_result_storage_block_id"),
        (prefect.flow_engine.AsyncFlowRunEngine, "handle_crash"),
        (prefect.task_runners.ThreadPoolTaskRunner, "cancel_all"),
        (BaseWorker, "_emit_flow_run_submitted_event"),
    ],
)
async def test_a_worker_refuses_a_prefect_without_a_name(monkeypatch: pytest.MonkeyPatch, place: object, name: str):
    monkeypatch.delattr(place, name)
    with pytest.raises(ConfigurationError, match=rf"that {prefect.__version__} lacks: .*{name}.* 3\.8\.6 to 3\.9\.1"):
        await CrewWorker("a pool").setup()


@pytest.mark.parametrize(("version", "is_refused"), [("3.9.3", True), ("3.9.4.dev2", False), ("3.10.0", False)])
def test_a_name_may_be_absent_from_a_version_on(monkeypatch: pytest.MonkeyPatch, version: str, is_refused: bool):
    monkeypatch.delattr(prefect.flow_engine, "observe_flow_run_suspension")
    monkeypatch.setattr(prefect, "__version__", version)
    with pytest.raises(ConfigurationError) if is_refused else contextlib.nullcontext():
        check_prefect()


@pytest.mark.usefixtures("prefect_api")
async def test_an_ended_flow_blocks_for_no_submitted_task():
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    @task
    def work() -> None:
        begun.set()
        may_end.wait(20)
        ended.set()

    @flow
    async def submits() -> None:
        work.submit()
        await asyncio.Event().wait()

    with many_flow_runs(print):
        running = asyncio.create_task(submits())
        await until(begun.is_set, "the task has begun")
        cancelled_at = time.monotonic()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert time.monotonic() - cancelled_at < 10
        may_end.set()
        await until(ended.is_set, "the task goes on to its end")


@pytest.mark.usefixtures("prefect_api")
async def test_a_task_runner_still_waits_where_no_event_loop_runs():
    begun, ended = threading.Event(), threading.Event()

    @task
    def work() -> None:
        begun.set()
        time.sleep(0.5)
        ended.set()

    @flow
    def submits() -> None:
        work.submit()
        begun.wait(20)

    with many_flow_runs(print):
        await asyncio.to_thread(submits)
        assert ended.is_set()


async def test_reads_of_an_id_share_the_next_request():
    requests, may_end = list[UUID](), asyncio.Event()

    async def read(key: UUID) -> int:
        requests.append(key)
        number = len(requests)
        await may_end.wait()
        return number

    read_shared, key, another = shared(read), uuid4(), uuid4()
    first = asyncio.create_task(read_shared(key))
    await asyncio.sleep(0.01)
    later = [asyncio.create_task(read_shared(one)) for one in (key, key, key, another)]
    await asyncio.sleep(0.01)
    assert requests == [key, another]
    later.pop(0).cancel()
    may_end.set()
    assert await first == 1
    assert [await task for task in later] == [3, 3, 2]
    assert requests == [key, another, key]


async def test_thousands_of_requests_queue_before_httpx():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(0.1)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api"
        client: Any = PrefectClient(url, httpx_settings={"timeout": httpx.Timeout(30.0, pool=2.0)})
        client.read_flow_run = partial(client.request, "GET")  # without a flow run in the answer
        queue_requests(client, client)
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            async with client:
                requests = [asyncio.create_task(client.read_flow_run("/flow_runs/1")) for _ in range(400)]
                await asyncio.sleep(0)
                for cancelled in requests[50:80]:
                    cancelled.cancel()
                await client.request("GET", "/work_pools/1")  # such as a heartbeat: it waits for 16 requests
                assert sum(request.done() for request in requests) < 100
                done = await asyncio.gather(*requests, return_exceptions=True)
    assert sum(isinstance(outcome, httpx.Response) for outcome in done) == 370


WRITE, LOOK = "POST .*/set_state", "GET .*/flow_runs/.*"


@pytest.mark.parametrize(
    ("refused", "answer", "times", "ending"),
    [
        (LOOK, "", 4, "COMPLETED"),
        (WRITE, "", 4, "COMPLETED"),
        (LOOK, "500", 7, "COMPLETED"),
        (WRITE, "500", 3, "COMPLETED"),
        (WRITE, "500", 9, "CRASHED"),
    ],
    ids=["no look", "no write", "refused look", "refused write", "write refused for long"],
)
@pytest.mark.parametrize("timeout", [None, 0.4])
async def test_an_ended_flow_whose_state_waits_runs_once(
    prefect_api: PrefectServer,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    refused: str,
    answer: str,
    times: int,
    ending: str,
    timeout: float | None,
):
    monkeypatch.setattr(flow_engine, "AWAY_PAUSE", 0.2)
    calls, tasks = 0, list[asyncio.Task[None]]()

    async def refuse() -> None:
        before, proxy.refuse, proxy.answer = len(proxy.requests), refused, answer
        await until(lambda: sum(bool(re.search(refused, one)) for one in proxy.requests[before:]) >= times, "refusals")
        proxy.refuse = None

    @flow(timeout_seconds=timeout)
    async def ends() -> int:
        nonlocal calls
        calls += 1
        tasks.append(asyncio.create_task(refuse()))
        await asyncio.sleep(0)
        return calls

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        async with AsyncClientContext.get_or_create() as context:
            flow_run = await context.client.create_flow_run(ends)
            state = await run_held_flow(ends, HeldFlowRun(flow_run, read_again))
    assert calls == 1
    assert state.type.value == ending
    assert proxy.refuse is None


async def read_again(held: HeldFlowRun, state: State[Any]) -> FlowRun | None:
    """Read the flow run before its last state, as the worker does."""
    async with AsyncClientContext.get_or_create() as context:
        return await context.client.read_flow_run(held.flow_run.id) if state.is_final() else None


@pytest.mark.parametrize("fails", [1, 2])
async def test_a_state_whose_answer_is_lost_is_kept(
    prefect_api: PrefectServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fails: int
):
    monkeypatch.setattr(flow_engine, "AWAY_PAUSE", 0.2)
    calls = 0

    @flow(retries=1)
    async def fails_first() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            proxy.lose = WRITE
        if calls <= fails:
            raise RuntimeError("the mail server is down")

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        async with AsyncClientContext.get_or_create() as context:
            flow_run = await context.client.create_flow_run(fails_first)
            state = await run_held_flow(fails_first, HeldFlowRun(flow_run, read_again))
    assert proxy.lose is None
    assert calls == 2
    assert state.type.value == ("COMPLETED" if fails == 1 else "FAILED")


async def test_a_retry_whose_begin_waits_is_made(
    prefect_api: PrefectServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flow_engine, "AWAY_PAUSE", 0.2)
    calls, begins = 0, 0

    @flow(retries=1)
    async def fails_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("the mail server is down")

    async def confirm(held: HeldFlowRun, state: State[Any]) -> FlowRun | None:
        """Read the flow run before each state, as a worker does that was away for long."""
        nonlocal begins
        if calls == 1 and state.is_running():
            begins += 1
            proxy.answer, proxy.refuse = "", WRITE if begins == 1 else None
        async with AsyncClientContext.get_or_create() as context:
            return await context.client.read_flow_run(held.flow_run.id)

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        async with AsyncClientContext.get_or_create() as context:
            flow_run = await context.client.create_flow_run(fails_once)
            state = await run_held_flow(fails_once, HeldFlowRun(flow_run, confirm))
    assert begins == 2
    assert calls == 2
    assert state.type.value == "COMPLETED"


@pytest.mark.parametrize("is_cancelled_first", [False, True])
async def test_an_ended_flow_is_not_handed_over(
    prefect_api: PrefectServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, is_cancelled_first: bool
):
    monkeypatch.setattr(flow_engine, "AWAY_PAUSE", 0.2)
    monkeypatch.setattr(flow_engine, "CANCEL_AGAIN_AFTER", 0.5)
    begun = asyncio.Event()

    @flow
    async def ends() -> str:
        begun.set()
        if is_cancelled_first:
            with contextlib.suppress(asyncio.CancelledError):  # as a flow may do
                await asyncio.sleep(60)
        proxy.refuse, proxy.answer = WRITE, ""
        return "done"

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        async with AsyncClientContext.get_or_create() as context:
            held = HeldFlowRun(await context.client.create_flow_run(ends), read_again)
            running = held.task = asyncio.ensure_future(run_held_flow(ends, held))  # type: ignore[assignment]
            await until(begun.is_set, "the flow has begun")
            if not is_cancelled_first:
                await until(lambda: proxy.refuse is not None, "the flow has ended")
            for _ in range(20):  # as a worker does that shuts down
                held.end("handed over", "The worker shuts down.")
                await asyncio.sleep(0.1)
            proxy.refuse = None
            state = await running
    assert state.type.value == "COMPLETED"
