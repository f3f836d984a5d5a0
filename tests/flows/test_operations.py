"""The flows to deploy as they are: a batch of a file, pruning, recovering."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import prefect
import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Crashed, Failed, Paused, Pending, Running

from prefect_crew import BatchFailedError, arun_crew
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.operations import batch_file, prune_records, recover
from prefect_crew.records.store import PrefectRecords
from support.prefect_server import PrefectServer
from support.records import let_pass
from support.scripts import PICKY


async def test_a_file_is_run_and_what_failed_fails_the_flow(save_crew: Any, tmp_path: Path):
    server = save_crew("batch-picky", PICKY)
    (tmp_path / "rows.csv").write_text("topic\ntea\nbad milk\n")
    flow: Any = batch_file
    call = ("batch-picky", str(tmp_path / "rows.csv"), "of a file", str(tmp_path / "out.jsonl"))
    for _ in range(2):
        with pytest.raises(BatchFailedError, match="1 of 2 rows completed, 1 failed"):
            await flow(*call)
        assert server.kickoffs == 2
    more: dict[str, Any] = {"inputs": {"topic": "{{ topic | length }}"}, "max_in_flight": 1}
    with pytest.raises(ConfigurationError, match=r"wait\.initial: Input should be greater than 0"):
        await flow(*call[:2], "with options", str(tmp_path / "other.jsonl"), options={"wait": {"initial": -1}})
    more["wait"] = {"initial": 0.1, "timeout": 60}
    report = await flow(*call[:2], "with options", str(tmp_path / "other.jsonl"), options=more)
    assert report["completed"] == 2


async def test_a_password_as_a_parameter_is_refused_and_not_repeated(echo: CrewServer):
    operation: Any = batch_file
    for ledger in ("postgresql://me:hunter2@db.test/x", "postgresql://db.test/x?password=hunter2"):
        with pytest.raises(ConfigurationError, match=r"holds a password.*secret://NAME") as refused:
            await operation("batch-echo", "rows.csv", "a batch", "out.jsonl", ledger=ledger)
        assert "hunter2" not in str(refused.value)
    assert echo.kickoffs == 0


# The sweep: old ended runs go, everything else stays

SaveCrew = Callable[..., CrewServer]


async def test_old_ended_runs_go_and_a_dry_run_only_counts(save_crew: SaveCrew, monkeypatch: pytest.MonkeyPatch):
    save_crew("prune-echo")
    for key in ("prune-old", "prune-young"):
        await arun_crew("prune-echo", {"text": key}, idempotency_key=key)
    with monkeypatch.context() as patch:
        let_pass(patch, "prune-old", 29)
        assert "removed" in await prune_records()
    assert await PrefectRecords().attempts("prune-old"), "30 days are not over"
    let_pass(monkeypatch, "prune-old", 31)

    assert "would go" in await prune_records(dry_run=True)
    assert await PrefectRecords().attempts("prune-old")

    assert "removed" in await prune_records(older_than_days=32)
    assert await PrefectRecords().attempts("prune-old")

    assert "removed" in await prune_records()
    assert not await PrefectRecords().attempts("prune-old")
    assert await PrefectRecords().attempts("prune-young")


async def test_a_setting_says_how_long_records_are_kept(save_crew: SaveCrew, monkeypatch: pytest.MonkeyPatch):
    save_crew("prune-echo")
    await arun_crew("prune-echo", {"text": "kept"}, idempotency_key="prune-kept")
    let_pass(monkeypatch, "prune-kept", 31)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS", "60")
    await prune_records()
    assert await PrefectRecords().attempts("prune-kept")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_KEEP_RECORDS_DAYS", "7")
    await prune_records()
    assert not await PrefectRecords().attempts("prune-kept")


# Crashed flow runs are begun again, a limited number of times, and nothing else is


@flow
def fragile() -> None:
    """Is never run here: only its runs' states matter."""


async def new_run(*states: State, deployed: bool = True) -> FlowRun:
    """Make a flow run that goes through these states."""
    async with get_client() as client:
        if deployed:
            flow_id = await client.create_flow(fragile)
            deployment_id = await client.create_deployment(flow_id, f"recover-{uuid4()}")
            run = await client.create_flow_run_from_deployment(deployment_id)
        else:
            run = await client.create_flow_run(fragile)
        for state in states:
            await client.set_flow_run_state(run.id, state, force=True)
        return await client.read_flow_run(run.id)


async def state_of(flow_run_id: UUID) -> str:
    async with get_client() as client:
        run = await client.read_flow_run(flow_run_id)
    assert run.state is not None
    return run.state.type.value


async def recovered(flow_run_id: UUID, **options: int) -> str:
    """Run the flow without its retries, which would make a failing test slow."""
    return await recover.with_options(retries=0)(flow_run_id, **options)


async def test_the_limit_holds_over_many_crashes(prefect_api: PrefectServer):
    run = await new_run(Running(), Crashed())
    said: list[str] = []
    for _ in range(4):
        said.append(await recovered(run.id, max_attempts=3))
        if await state_of(run.id) == "SCHEDULED":
            async with get_client() as client:
                await client.set_flow_run_state(run.id, Running(), force=True)
                await client.set_flow_run_state(run.id, Crashed(), force=True)
    assert said[:2] == ["scheduled again, attempt 2 of 3", "scheduled again, attempt 3 of 3"]
    assert said[2].startswith("given up after 3 attempts")
    assert said[3] == said[2]
    assert await state_of(run.id) == "CRASHED"


async def test_a_run_that_dies_before_it_begins_has_a_limit_as_well(prefect_api: PrefectServer):
    run = await new_run(Pending(), Crashed(), Pending(), Crashed())
    assert run.run_count == 0
    assert (await recovered(run.id, max_attempts=2)).startswith("given up after 2 attempts")


async def test_a_form_that_was_answered_is_no_attempt(prefect_api: PrefectServer):
    run = await new_run()
    async with get_client() as client:
        for state in (Running(), Paused(), Running(), Paused(), Running(), Crashed()):
            await client.set_flow_run_state(run.id, state)
    assert await recovered(run.id, max_attempts=2) == "scheduled again, attempt 2 of 2"


async def test_up_to_prefect_3_9_2_the_first_form_of_a_flow_run_takes_one_of_its_retries(prefect_api: PrefectServer):
    run = await new_run()
    async with get_client() as client:
        policy = run.empirical_policy.model_copy(update={"retries": 1, "retry_delay": 0})
        await client.update_flow_run(run.id, empirical_policy=policy)
        for state in (Running(), Paused(), Running(), Failed()):
            await client.set_flow_run_state(run.id, state)
        name = (await client.read_flow_run(run.id)).state_name
    version = tuple(map(int, prefect.__version__.split(".")[:3]))
    assert name == ("Failed" if version < (3, 9, 3) else "AwaitingRetry")


@pytest.mark.parametrize(
    "last",
    [Failed(message="CrewFailedError"), Completed(), Cancelled(), Running()],
    ids=["failed", "completed", "cancelled", "running"],
)
async def test_what_is_no_crash_is_left_alone(prefect_api: PrefectServer, last: State):
    run = await new_run(Running(), last)
    assert (await recovered(run.id)).startswith("left alone")
    assert await state_of(run.id) == last.type.value


async def test_a_run_without_a_deployment_is_left_alone_and_one_that_is_gone_is_an_error(prefect_api: PrefectServer):
    run = await new_run(Running(), Crashed(), deployed=False)
    assert "no deployment" in await recovered(run.id)
    assert await state_of(run.id) == "CRASHED"
    with pytest.raises(ConfigurationError, match="Nothing was scheduled"):
        await recovered(uuid4())
