"""What the crew worker needs of Prefect that is not public."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from uuid import UUID, uuid4

import httpx
import prefect
import prefect.flow_engine
import prefect.task_runners
import pytest
from prefect import flow, task
from prefect.client.orchestration import PrefectClient
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.workers.base import BaseWorker

from prefect_crew._internal.flow_engine import check_prefect, many_flow_runs, queue_requests, shared
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.worker import CrewWorker
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


async def test_thousands_of_requests_wait_for_a_connection_and_those_of_the_worker_do_not():
    answered = list[str]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                await asyncio.sleep(0.05)
                answered.append(head.split()[1])
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api"
        client = PrefectClient(url, httpx_settings={"timeout": httpx.Timeout(5.0, pool=0.5)})
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            async with client:
                queue_requests(client)
                of_flow_runs = [asyncio.create_task(client.request("GET", "/flow_runs/1")) for _ in range(400)]
                await asyncio.sleep(0)
                await client.request("GET", "/work_pools/crews")
                assert len(answered) < 100
                await asyncio.gather(*of_flow_runs)
    assert len(answered) == 401
