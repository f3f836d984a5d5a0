"""The crew worker does what Prefect's own tests ask of any worker: tests/workers of Prefect, in our own words.

Kept: pools, templates, deployments that are gone, polling, heartbeats, `--run-once`, and what the command line reads of
a worker's type. Against a real Prefect server.

Not applicable, and why:
- the command, image, environment and labels of a job, and merging them: a flow run has no infrastructure of its own;
- `prefect.worker.*` labels on a flow run, and the state Submitting: left out, each is a request for each flow run;
- `BaseWorker.submit` of a flow without a deployment: a crew worker imports flows by the path of their deployment;
- `kill_infrastructure` raises NotImplementedError: it is implemented (tests/test_worker.py, as is cancelling);
- the exit code of a process and its explanation: Prefect's engine writes the state, in the worker's process;
- the worker channel, its reconnects and its snapshots: the worker inherits these and changes none of it;
- queues, limits, priorities, prefetching, paused pools: Prefect's server and BaseWorker decide what a worker gets;
- tests of mocks alone: of the client's contexts, of the logger's name, of old signatures.
"""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID

import pytest
from prefect.exceptions import ObjectNotFound
from prefect.workers.utilities import (
    get_available_work_pool_types,
    get_default_base_job_template_for_infrastructure_type,
)

from prefect_crew.worker import CrewWorker, CrewWorkerResult
from support.crew_pool import IMPORTABLE, USER_FLOWS, CrewPool
from support.prefect_server import PrefectServer
from support.waiting import until


@pytest.fixture
def pool(prefect_api: PrefectServer, tmp_path: Path) -> Iterator[CrewPool]:
    """A work pool that its first worker creates."""
    pool = CrewPool(prefect_api, tmp_path)
    yield pool
    pool.__exit__()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> AsyncMock:
    """In place of the flow: nothing runs, and nothing looks at the pool."""
    ran = AsyncMock(return_value=CrewWorkerResult(identifier="", status_code=0))
    monkeypatch.setattr(CrewWorker, "run", ran)
    monkeypatch.setattr(CrewWorker, "_look", AsyncMock())
    monkeypatch.setattr(CrewWorker, "_give_all_back", AsyncMock())
    return ran


async def look(worker: CrewWorker) -> None:
    """Look once for flow runs, and wait until all of them have begun."""
    await worker.get_and_submit_flow_runs()
    await until(lambda: not worker._submitting_flow_run_ids)


async def test_a_worker_creates_and_describes_its_pool(pool: CrewPool, ran: AsyncMock):
    async with CrewWorker(pool.name, create_pool_if_not_found=False) as worker:
        await look(worker)
        with pytest.raises(ObjectNotFound):
            await worker.client.read_work_pool(pool.name)
    async with CrewWorker(pool.name, name="first") as worker:
        found = await worker.client.read_work_pool(pool.name)
        assert found.type == "crew"
        assert found.base_job_template == CrewWorker.get_default_base_job_template()
        online = [one.name for one in await worker.client.read_workers_for_work_pool(pool.name)]
        assert "first" in online, "its heartbeat"
        assert worker.get_status()["name"] == "first"
        assert worker.get_status()["work_pool"]["name"] == pool.name
        assert os.environ["PREFECT__WORKER_NAME"] == "first"
    assert "PREFECT__WORKER_NAME" not in os.environ
    with pytest.raises(ValueError, match="cannot contain"):
        CrewWorker(pool.name, name="with/slash")


@pytest.mark.parametrize("gone", ["cancelled", "flow run", "deployment"])
async def test_a_run_that_may_not_begin_gives_its_place_back(
    pool: CrewPool, ran: AsyncMock, monkeypatch: pytest.MonkeyPatch, gone: str
):
    async with CrewWorker(pool.name, limit=1) as worker:
        deployment = pool.deploy("gone", f"{USER_FLOWS}.greet")
        run_id = pool.start(deployment)
        responses = await worker._get_scheduled_flow_runs()
        if gone == "cancelled":
            pool.set_state(run_id, "CANCELLED")
        elif gone == "flow run":
            await worker.client.delete_flow_run(UUID(run_id))
        else:  # right after it is Pending: before, the server deletes the flow run as well
            update = worker.client.update_flow_run

            async def update_and_delete(*args: Any, **options: Any) -> Any:
                await worker.client.delete_deployment(UUID(deployment))
                return await update(*args, **options)

            monkeypatch.setattr(worker.client, "update_flow_run", update_and_delete)
        worker._get_scheduled_flow_runs = AsyncMock(return_value=responses)
        await look(worker)
        worker._release_limit_slot(UUID(run_id))  # twice does no harm
        assert ran.await_count == 0
        assert worker.limiter.borrowed_tokens == 0
        if gone != "flow run":
            assert pool.flow_run(run_id)["state_name"] == "Cancelled"


@pytest.mark.parametrize(
    ("job_variables", "problem"),
    [({}, "without_effect"), ({"name": "{{ prefect.blocks.secret.nowhere }}"}, "ObjectNotFound")],
    ids=["value of another type", "missing block"],
)
async def test_a_template_that_does_not_fit_crashes_the_run(
    pool: CrewPool, ran: AsyncMock, job_variables: dict[str, str], problem: str
):
    template = {
        "job_configuration": {"name": "{{ name }}", "without_effect": "{{ number }}"},
        "variables": {"type": "object", "properties": {"name": {"type": "string"}, "number": {"default": 3}}},
    }
    async with CrewWorker(pool.name, base_job_template=template) as worker:
        run_id = pool.start(pool.deploy(problem, f"{USER_FLOWS}.greet", job_variables=job_variables))
        await look(worker)
    run = pool.flow_run(run_id)
    assert run["state_name"] == "Crashed"
    assert problem in run["state"]["message"]
    assert ran.await_count == 0


async def test_a_worker_that_runs_once_waits_for_its_runs(pool: CrewPool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WORKER_MODULES", USER_FLOWS)
    monkeypatch.syspath_prepend(IMPORTABLE)
    async with CrewWorker(pool.name):
        pass
    deployment = pool.deploy("once", f"{USER_FLOWS}.greet")
    runs = [pool.start(deployment, name=name) for name in ("Ada", "Eve")]
    worker, said = CrewWorker(pool.name, name="once"), list[str]()
    await worker.start(run_once=True, printer=said.append)
    assert [pool.flow_run(run_id)["state_name"] for run_id in runs] == ["Completed", "Completed"]
    assert said == ["Worker 'once' started!", "Worker 'once' stopped!"]
    assert worker.is_worker_still_polling(query_interval_seconds=10)
    worker._last_polled_time -= timedelta(minutes=10)
    assert not worker.is_worker_still_polling(query_interval_seconds=10)


@pytest.mark.usefixtures("prefect_api")
async def test_prefect_finds_the_type_of_worker_and_its_template():
    assert "crew" in await get_available_work_pool_types()
    template = await get_default_base_job_template_for_infrastructure_type("crew")
    assert template == CrewWorker.get_default_base_job_template()
    assert CrewWorker.get_worker_class_from_type("crew") is CrewWorker
    assert CrewWorker.get_logo_url().startswith("https://")
    assert CrewWorker.get_documentation_url().startswith("https://")
    # The server hands it flow runs that were Cancelling for too long.
    assert CrewWorker("a pool").handled_cleanup_kinds
