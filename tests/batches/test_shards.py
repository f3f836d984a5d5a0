"""Batches beyond one machine: what a shard is given, how rows are split, and two workers of which one dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.states import Cancelled, Cancelling, Completed, Failed, Pending, Running, Scheduled

from prefect_crew import WaitPolicy, arun_batch
from prefect_crew.batches.batch import open_batch
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.ownership import WHOLE, BatchLock, binding_name, read_binding
from prefect_crew.batches.run import batch_job
from prefect_crew.batches.shards import (
    LEFT_LOOKS,
    Parent,
    Shard,
    batch_shard,
    flow_runs,
    open_shard_runs,
    shard_call,
    shard_options,
    shard_part,
)
from prefect_crew.batches.shards import PARENT_LOOKS_EVERY as LOOK_EVERY
from prefect_crew.batches.stored import known_batch
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import BatchBusyError, ConfigurationError, LedgerMissingError
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches, postgres_ledger
from support.deployed import ROOT, command, wait_until
from support.postgres import Postgres
from support.prefect_server import PrefectServer, connected
from support.processes import Process
from support.scripts import script
from support.workers import Worker

ECHO = script({"seconds": 0.05, "output": "on {{ topic }}"}, inputs=["topic"])
WAIT = WaitPolicy(initial=0.05, factor=1, jitter=0)

# What a shard is given


def test_what_holds_for_the_batch_is_split_evenly():
    options = BatchOptions(max_in_flight=11, kickoffs_per_second=9, max_kickoffs=20, on_failure=3, order="input")
    shares = [shard_options(options, shard, 3, bought=6) for shard in range(3)]
    assert [share["max_in_flight"] for share in shares] == [4, 4, 3]
    assert [share["max_kickoffs"] for share in shares] == [5, 5, 4]
    assert {share["kickoffs_per_second"] for share in shares} == {3}
    assert {share["on_failure"] for share in shares} == {"continue"}
    assert "order" not in shares[0]
    assert json.dumps(shares)


def test_less_than_one_for_each_shard_is_refused():
    with pytest.raises(ConfigurationError, match="max_in_flight is 2, less than one for each of 3 shards"):
        shard_options(BatchOptions(max_in_flight=2), 2, 3, bought=0)


async def test_flow_runs_are_read_to_the_last_page_and_those_that_have_ended_are_left_out(
    prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch
):
    del prefect_api
    monkeypatch.setattr("prefect_crew.batches.shards.PAGE", 2)
    tag = f"many {uuid.uuid4().hex}"
    async with get_client() as client:
        over, open_ = (Completed(), Failed(), Cancelled()), (Scheduled(), Running(), Cancelling(), Pending(), Running())
        made: list[UUID] = [
            (await client.create_flow_run(batch_shard, tags=[tag], state=cast("Any", state))).id
            for state in (*over, *open_)
        ]
    assert {run.id for run in await open_shard_runs(tag)} == set(made[3:])
    assert len(await flow_runs(FlowRunFilter(id=FlowRunFilterId(any_=made)))) == len(made)


@pytest.fixture
def stored(prefect_api: PrefectServer, crew_server: CrewServerFactory) -> tuple[CrewServer, str]:
    """A crew server, and the name of its stored block."""
    del prefect_api
    server = crew_server(ECHO, port=True)
    name = f"crew-{uuid.uuid4().hex[:8]}"
    server.crew().save(name, _sync=True)  # pyright: ignore
    return server, name  # pyright: ignore


def rows_file(folder: Path, count: int) -> str:
    path = folder / "rows.csv"
    path.write_text("topic\n" + "".join(f"topic {number}\n" for number in range(count)))
    return str(path)


def without_password(address: str) -> str:
    """Return the address of a PostgreSQL of ours, which lets everybody in, without its password."""
    return address.replace(":unused@", "@")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"crew": "block"}, "its crew is no stored block", id="crew"),
        pytest.param({"dataset": [{"topic": "tea"}]}, "its data set was given by code", id="data set"),
        pytest.param({"key": lambda row: row["topic"]}, "key is a function", id="function"),
        pytest.param({"ledger": None}, "Shards need a ledger in PostgreSQL", id="SQLite"),
        pytest.param({"ledger": "password"}, r"holds a password.*secret://batch-ledger", id="password"),
    ],
)
async def test_what_another_machine_could_not_have_is_refused_before_anything_is_bought(
    stored: tuple[CrewServer, str], tmp_path: Path, postgres_address: str, change: dict[str, Any], message: str
):
    server, name = stored
    ledger = without_password(postgres_address)
    given: dict[str, Any] = {"crew": name, "dataset": rows_file(tmp_path, 3), "ledger": ledger}
    given.update(change)
    if given["crew"] == "block":
        given["crew"] = server.crew()
    if given["ledger"] == "password":
        given["ledger"] = postgres_address.replace(":unused@", ":sesame@")
    crew, dataset = given.pop("crew"), given.pop("dataset")
    with pytest.raises(ConfigurationError, match=message) as caught:
        await arun_batch(
            crew, dataset, name="x", output=str(tmp_path / "o.jsonl"), shards=2, deployment="batch-shard/none", **given
        )
    assert "sesame" not in str(caught.value)
    assert server.kickoffs == 0
    assert await read_binding("x") is None, "a batch that was refused has taken its name"


async def test_shards_and_deployment_go_together(stored: tuple[CrewServer, str], tmp_path: Path, postgres_address: str):
    _, name = stored
    ledger = without_password(postgres_address)
    given: dict[str, Any] = {"name": "x", "output": str(tmp_path / "o.jsonl"), "ledger": ledger}
    with pytest.raises(ConfigurationError, match="give both"):
        await arun_batch(name, rows_file(tmp_path, 3), shards=2, **given)
    with pytest.raises(ConfigurationError, match=r"no deployment 'batch-shard/none'. Deploy the flow batch_shard"):
        await arun_batch(name, rows_file(tmp_path, 3), shards=2, deployment="batch-shard/none", **given)


# Shards in this process


async def test_shards_run_their_own_rows_once_and_the_batch_is_finished_from_the_ledger(
    stored: tuple[CrewServer, str], tmp_path: Path, postgres_address: str
):
    server, name = stored
    secret = f"ledger-{uuid.uuid4().hex[:8]}"
    await cast("Any", Secret(value=cast("Any", postgres_address)).save(secret))
    given: dict[str, Any] = {"name": "split", "output": str(tmp_path / "out.jsonl"), "ledger": f"secret://{secret}"}
    job = await batch_job(name, rows_file(tmp_path, 60), BatchOptions(wait=WAIT), **given)
    async with open_batch(job, shared=True) as batch:
        generation = await batch.begin()
        calls = [shard_call(batch, shard, 3, generation) for shard in range(3)]
        assert postgres_address not in json.dumps(calls)
        with pytest.raises(LedgerMissingError):
            await batch_shard("split", 0, 3, {**calls[0], "ledger_id": "another"})
        first = await batch_shard("split", 0, 3, calls[0])
        assert 0 < first["completed"] < 60
        assert server.kickoffs == first["completed"]
        rest = await asyncio.gather(batch_shard("split", 1, 3, calls[1]), batch_shard("split", 2, 3, calls[2]))
        assert first["completed"] + sum(one["completed"] for one in rest) == 60
        again = await batch_shard("split", 0, 3, calls[0])
        assert again == first
        async with BatchLock(batch.ledger.database, "split") as other:
            assert await other.take(shard_part(1, 3))
            assert await batch.lock.is_held(shard_part(1, 3))
            with pytest.raises(BatchBusyError, match="Shard 1 of 3 of batch 'split'"):
                await batch_shard("split", 1, 3, calls[1])
        assert not await batch.lock.is_held(shard_part(1, 3))
        with pytest.raises(BatchBusyError):
            await arun_batch(name, rows_file(tmp_path, 60), **given)
    report = await arun_batch(name, rows_file(tmp_path, 60), wait=WAIT, **given)
    assert (report.completed, report.kickoffs, server.kickoffs) == (60, 0, 60)
    assert len(Batches(tmp_path).lines()) == 60


async def test_a_shard_that_stops_halts_the_others(
    stored: tuple[CrewServer, str], tmp_path: Path, postgres_address: str
):
    server, name = stored
    server.faults.add("kickoff:401@1")
    given: dict[str, Any] = {"name": "halted", "output": str(tmp_path / "out.jsonl"), "ledger": postgres_address}
    job = await batch_job(name, rows_file(tmp_path, 20), BatchOptions(wait=WAIT), **given)
    async with open_batch(job, shared=True) as batch:
        found = await batch_shard("halted", 0, 2, shard_call(batch, 0, 2, await batch.begin()))
        assert "401" in found["stopped"]
        assert await batch.ledger.halted() == found["stopped"]
    report = await arun_batch(name, rows_file(tmp_path, 20), wait=WAIT, **given)
    assert report.ok, "the next call begins anew"


async def test_locks_are_shared_taken_and_freed_with_their_connection(postgres_address: str):
    async with Ledger(postgres_address, "b") as ledger:
        async with BatchLock(ledger.database, "b") as one:
            assert await one.take(WHOLE, shared=True)
            async with BatchLock(ledger.database, "b") as two:
                assert await two.take(WHOLE, shared=True)
                assert not await two.take(WHOLE)
                await one.give_back(WHOLE)
                await two.give_back(WHOLE)
                assert await two.take(WHOLE)
                assert not await one.take(WHOLE, shared=True)
            assert await one.take(WHOLE)
            # Its connection breaks, and somebody else comes first.
            pid = (await one._connection.exec_driver_sql("SELECT pg_backend_pid()")).scalar()
            kill = f"SELECT pg_terminate_backend({pid})"
            await ledger.database.run(lambda connection: connection.exec_driver_sql(kill).close())
            async with BatchLock(ledger.database, "b") as three:
                while not await three.take(WHOLE):
                    await asyncio.sleep(0.05)
                assert not await one.still_held()
            await three.__aexit__()
        async with BatchLock(ledger.database, "b") as four:
            assert await four.take(WHOLE)
            assert await four.still_held()


@pytest.mark.parametrize("dead", [False, True], ids=["done", "dead"])
async def test_a_shard_that_has_given_its_lock_back_is_not_dead_while_its_flow_run_ends(
    stored: tuple[CrewServer, str], tmp_path: Path, postgres_address: str, dead: bool
):
    _, name = stored
    batch_name = f"ending {dead}"
    given: dict[str, Any] = {"name": batch_name, "output": str(tmp_path / "out.jsonl"), "ledger": postgres_address}
    job = await batch_job(name, rows_file(tmp_path, 4), BatchOptions(wait=WAIT), **given)
    async with open_batch(job, shared=True) as batch, get_client() as client:
        run = await client.create_flow_run(batch_shard, state=cast("Any", Running()))
        shard = Shard(0, run.id, f"{batch_name} shard 0 of 1", since=time.monotonic())
        parent = Parent(batch, shards=1, deployment="batch-shard/shards")
        parent._shards.append(shard)
        async with BatchLock(batch.ledger.database, batch_name) as lock:
            assert await lock.take(shard_part(0, 1))
            await parent._look()
            assert shard.locked
            await lock.give_back(shard_part(0, 1))
        assert LEFT_LOOKS * LOOK_EVERY >= 10, "Prefect writes logs and the result before it ends a flow run"
        for _ in range(LEFT_LOOKS - 1):
            await parent._look()
            assert not shard.over
        if not dead:
            await client.set_flow_run_state(run.id, Completed())
        await parent._look()
        assert shard.over
        state = (await client.read_flow_run(run.id)).state
        assert (bool(parent._dead), state and state.type.value) == (dead, "CRASHED" if dead else "COMPLETED")


# Two workers


@pytest.fixture
def deployed(prefect_server_on_postgres: PrefectServer, tmp_path: Path, crew_server: CrewServerFactory) -> Any:
    """A crew stored on a Prefect server on PostgreSQL, with the shards' flow deployed on a pool of its own."""
    server = prefect_server_on_postgres
    env = server.env(home=tmp_path / "home")
    command("prefect", "work-pool", "create", "shards", "--type", "process", "--overwrite", env=env)
    command(
        *("prefect", "--no-prompt", "deploy", "flows/batch.py:batch_shard", "--name", "shards", "--pool", "shards"),
        env=env,
        cwd=ROOT,
    )
    crew = crew_server(script({"seconds": 1.0, "output": "on {{ topic }}"}, inputs=["topic"]), port=True)
    with connected(server, tmp_path / "home"):
        crew.crew().save("shard-crew", overwrite=True, _sync=True)  # pyright: ignore
        yield server, crew


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_of_two_workers_one_dies_and_its_rows_are_finished(
    deployed: tuple[PrefectServer, CrewServer], tmp_path: Path, postgres: Postgres, notes: list[str]
):
    api, crew = deployed
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    workers = [Worker(api, "shards", folder=folder, name=folder.name, limit=1) for folder in folders]
    ledger = without_password(postgres_ledger(postgres))

    async def parent() -> Any:
        return await arun_batch(
            "shard-crew",
            rows_file(tmp_path, 400),
            name="sharded",
            output=str(tmp_path / "out.jsonl"),
            ledger=ledger,
            max_in_flight=20,
            shards=2,
            deployment="batch-shard/shards",
            wait=WaitPolicy(initial=0.2, factor=1, max_interval=1.0),
        )

    async def both() -> Any:
        running = asyncio.ensure_future(parent())
        await asyncio.to_thread(lambda: wait_until(lambda: crew.kickoffs >= 60, seconds=150, what="both shards"))
        dead = next(worker for worker in workers if "shard 1 of 2" in worker.log.read_text())
        await asyncio.to_thread(dead.kill)
        killed, bought = time.monotonic(), crew.kickoffs
        report = await running
        notes.append(
            f"shards: {bought} of 400 rows bought when a worker died; all ended {time.monotonic() - killed:.0f} s later"
        )
        return report

    with workers[0], workers[1]:
        report = asyncio.run(both())
    assert report.completed + report.uncertain == 400
    assert report.uncertain <= 16
    assert max(crew.kickoffs_by_key.values()) == 1
    assert crew.kickoffs <= 400
    assert len(Batches(tmp_path).lines()) == report.completed
    assert sorted(asyncio.run(states("sharded"))) == ["COMPLETED", "CRASHED"]


PARENT = """
import sys
from prefect_crew import WaitPolicy, run_batch

name, rows, output, ledger = sys.argv[1:]
run_batch("shard-crew", rows, name=name, output=output, ledger=ledger, max_in_flight=20, shards=2,
    deployment="batch-shard/shards", wait=WaitPolicy(initial=0.2, factor=1, max_interval=1.0))
"""


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("with_shards", [False, True], ids=["parent", "parent-and-shards"])
def test_a_batch_whose_parent_was_killed_goes_on_with_its_shards(
    deployed: tuple[PrefectServer, CrewServer], tmp_path: Path, postgres: Postgres, with_shards: bool
):
    api, crew = deployed
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    workers = [Worker(api, "shards", folder=folder, name=folder.name, limit=1) for folder in folders]
    output, ledger = str(tmp_path / "out.jsonl"), without_password(postgres_ledger(postgres))
    name = "orphaned-with-shards" if with_shards else "orphaned"
    arguments = [name, rows_file(tmp_path, 400), output, ledger]
    parent = Process(
        [sys.executable, "-c", PARENT, *arguments], log=tmp_path / "parent.log", env=api.env(home=tmp_path / "home")
    )
    with workers[0], workers[1]:
        with parent:
            wait_until(lambda: crew.kickoffs >= 60 or not parent.running, seconds=300, what="both shards")
            assert parent.running, parent.tail()
            parent.kill()
        if with_shards:
            for worker in workers:
                for pid in set(worker.process.family()) - {worker.process.pid}:
                    os.kill(pid, signal.SIGKILL)
            bought = crew.kickoffs
            assert bought < 400
        report = asyncio.run(
            arun_batch(
                *("shard-crew", arguments[1]),
                name=name,
                output=output,
                ledger=ledger,
                max_in_flight=20,
                shards=2,
                deployment="batch-shard/shards",
                wait=WaitPolicy(initial=0.2, factor=1, max_interval=1.0),
            )
        )
    assert report.completed + report.uncertain == 400
    assert report.uncertain <= (32 if with_shards else 0), "a shard that goes on loses nothing"
    assert max(crew.kickoffs_by_key.values()) == 1
    assert len(Batches(tmp_path).lines()) == report.completed
    runs = asyncio.run(states(name))
    assert runs.count("COMPLETED") == 2, "it is gone on with in shards, not in one process"
    assert len(runs) == (4 if with_shards else 2)


async def states(batch: str) -> list[str]:
    async with get_client() as client:
        found = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[binding_name(batch)]))
        )
    return [run.state.type.value for run in found if run.state is not None]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_a_worker_the_parent_does_the_rows_itself(
    deployed: tuple[PrefectServer, CrewServer], tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
):
    _, crew = deployed
    monkeypatch.setattr("prefect_crew.batches.shards.BEGUN_WITHIN", 2.0)
    report = asyncio.run(
        arun_batch(
            "shard-crew",
            rows_file(tmp_path, 20),
            name="alone",
            output=str(tmp_path / "out.jsonl"),
            ledger=without_password(postgres_ledger(postgres)),
            shards=2,
            deployment="batch-shard/shards",
        )
    )
    assert (report.completed, crew.kickoffs) == (20, 20)
    assert asyncio.run(states("alone")) == ["CANCELLED", "CANCELLED"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_failed_row_is_bought_again_once_a_call_and_the_name_alone_goes_on_with_shards(
    deployed: tuple[PrefectServer, CrewServer],
    tmp_path: Path,
    postgres: Postgres,
    crew_server: CrewServerFactory,
    monkeypatch: pytest.MonkeyPatch,
):
    picky = script({"output": "x", "fail": "{{ 'no' if topic in ('topic 3', 'topic 4') else '' }}"}, inputs=["topic"])
    crew = crew_server(picky, port=True)
    block: Any = crew.crew().model_copy(update={"max_kickoffs": 9})
    block.save("picky-crew", overwrite=True)
    monkeypatch.setattr("prefect_crew.batches.shards.BEGUN_WITHIN", 2.0)
    given: dict[str, Any] = {
        "name": "again",
        "output": str(tmp_path / "out.jsonl"),
        "ledger": without_password(postgres_ledger(postgres)),
        "wait": WAIT,
        "shards": 2,
        "deployment": "batch-shard/shards",
    }
    first = asyncio.run(arun_batch("picky-crew", rows_file(tmp_path, 8), **given))
    assert (first.completed, first.failed, crew.kickoffs) == (6, 2, 8)
    again = asyncio.run(arun_batch("picky-crew", rows_file(tmp_path, 8), retry_failed=True, **given))
    assert (again.failed, again.kickoffs, crew.kickoffs) == (2, 2, 10)

    async def by_name() -> Any:
        async with known_batch("again") as known:
            call = known.call(retry_failed=True)
        return await arun_batch(call.pop("crew"), call.pop("dataset"), **call)

    third = asyncio.run(by_name())
    assert (third.failed, third.kickoffs, crew.kickoffs) == (2, 2, 12)
    assert len(asyncio.run(states("again"))) == 6, "two flow runs a call"
