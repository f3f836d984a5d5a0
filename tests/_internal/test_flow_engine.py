"""What the crew worker needs of Prefect that is not public."""

from __future__ import annotations

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
from prefect.client.schemas.objects import State
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
async def test_a_flow_that_ends_does_not_wait_on_its_event_loop_for_a_submitted_task():
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


async def test_reads_of_one_id_share_the_next_request_and_never_one_that_was_made_before_the_call():
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
    assert (await first, [await task for task in later]) == (1, [3, 3, 2])
    assert requests == [key, another, key]


async def test_thousands_of_requests_wait_for_their_turn_before_httpx():
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
async def test_a_flow_that_has_ended_is_not_run_again_where_its_state_cannot_be_written(
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

    async def confirm(held: HeldFlowRun, state: State[Any]) -> None:
        if state.is_final():
            await client.read_flow_run(held.flow_run.id)

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        async with AsyncClientContext.get_or_create() as context:
            client = context.client
            flow_run = await client.create_flow_run(ends)
            state = await run_held_flow(ends, HeldFlowRun(flow_run, confirm))
    assert (calls, state.type.value, proxy.refuse) == (1, ending, None)
