"""What the crew worker needs of Prefect that is not public."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import prefect
import prefect.flow_engine
import pytest
from prefect.workers.base import BaseWorker

from prefect_crew._internal.flow_engine import check_prefect, shared
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.worker import CrewWorker


def test_the_installed_prefect_has_all_names():
    check_prefect()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (prefect.flow_engine, "capture_sigterm"),
        (prefect.flow_engine, "_send_heartbeats"),
        (prefect.results, "_aread_server_default_result_storage_block_id"),
        (prefect.flow_engine.AsyncFlowRunEngine, "handle_crash"),
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
    try:
        check_prefect()
    except ConfigurationError:
        assert is_refused
    else:
        assert not is_refused


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
