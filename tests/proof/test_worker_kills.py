"""Crew workers that are killed, restarted and cut off from the Prefect server, with flow runs in flight."""

from __future__ import annotations

import asyncio
import collections
import random
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from prefect_crew.client.models import CrewInput
from prefect_crew.devserver import CrewServer, Outcome, Run
from prefect_crew.store.attempts import of_key
from prefect_crew.store.database import Store
from support.crew_pool import USER_FLOWS, CrewOnCommand, CrewPool
from support.deployed import wait_until
from support.postgres import Postgres
from support.prefect_server import PrefectServer
from support.workers import Worker

pytestmark = pytest.mark.slow

REVIEWED = """
name: reviewed
inputs: [topic]
tasks:
  - {name: draft, human: true, output: "On {{ topic }}."}
  - {name: print, output: "Printed: {{ tasks.draft.output }}"}
"""


class Lasting:
    """A crew whose runs last as many seconds as their inputs say."""

    name = "lasting"

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="topic"), CrewInput(name="seconds")]

    async def execute(self, run: Run) -> Outcome:
        await asyncio.sleep(float(run.inputs["seconds"]))
        return Outcome(f"About {run.inputs['topic']}")


def kill(worker: Worker) -> None:
    worker.kill()


def stop(worker: Worker) -> None:
    worker.process.send(signal.SIGTERM)
    assert worker.process.wait() == 0


# People


@pytest.fixture
def small(prefect_server: PrefectServer, tmp_path: Path) -> Iterator[CrewPool]:
    with CrewPool(prefect_server, tmp_path, heartbeat=3) as pool:
        yield pool


def see_form(pool: CrewPool, flow_run_id: str) -> None:
    """Wait for the form on a flow run's page: its fields are stored a moment after the pause."""

    def is_up() -> bool:
        listed = pool.call("POST", f"/flow_runs/{flow_run_id}/input/filter", {"prefix": "crew-review-", "limit": 20})
        return any(one["key"].endswith("-schema") for one in listed)

    wait_until(is_up, what="the form's fields")


def answer_form(pool: CrewPool, flow_run_id: str) -> None:
    """Fill in the form on a flow run's page."""
    see_form(pool, flow_run_id)
    answered = pool.call(
        "POST",
        f"/flow_runs/{flow_run_id}/resume",
        {"run_input": {"decision": "approve", "feedback": "Fine.", "name": "Grace"}},
    )
    assert answered["status"] == "ACCEPT", answered


@pytest.mark.parametrize("end", [stop, kill])
@pytest.mark.parametrize("answered", ["while the worker is gone", "afterwards"])
def test_a_form_outlives_its_worker(small: CrewPool, end: Callable[[Worker], None], answered: str):
    crew = small.add_crew("reviewed", REVIEWED)
    deployment = small.deploy("reviewed")
    worker = small.worker("one")
    run_id = small.start(deployment, crew="reviewed", inputs={"topic": "tea"}, review="form")
    small.wait_for(run_id, "PAUSED")
    see_form(small, run_id)
    if answered != "afterwards" and end is kill:
        end(worker)
        answer_form(small, run_id)
    elif answered != "afterwards":
        answer_form(small, run_id)
        end(worker)
    else:
        end(worker)
    small.worker("one")
    if answered == "afterwards":
        paused = small.flow_run(run_id)["state_id"] if end is kill else None
        wait_until(
            lambda: (run := small.flow_run(run_id))["state_type"] == "PAUSED" and run["state_id"] != paused,
            what="the form of the next worker",
        )
        answer_form(small, run_id)
    run = small.wait_for(run_id)
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert crew.kickoffs == 1
    assert crew.requests["resume"] == 1
    assert [one.output for one in crew.runs] == ["Printed: On tea."]


# Retries


@pytest.mark.parametrize("end", [stop, kill])
def test_a_flow_run_that_waits_for_a_retry_outlives_its_worker(small: CrewPool, end: Callable[[Worker], None]):
    deployment = small.deploy("retried", f"{USER_FLOWS}.fails_once_and_waits")
    worker = small.worker("one")
    run_id = small.start(deployment)
    waiting = small.wait_for(run_id, "SCHEDULED", name="AwaitingRetry")
    end(worker)
    small.worker("one")
    run = small.wait_for(run_id)
    assert run["state_name"] == "Completed", run["state"]["message"]
    again = [one for one in small.history(run_id) if one["name"] == "Running"][-1]
    due = datetime.fromisoformat(waiting["state"]["state_details"]["scheduled_time"])
    early = due - datetime.fromisoformat(again["timestamp"])
    assert early < timedelta(seconds=1), "the retry's delay holds; Prefect rounds it to whole seconds"


# The Prefect server


@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_the_prefect_server_may_be_away_for_a_minute(
    prefect_template: Path | None, tmp_path: Path, notes: list[str], how: str
):
    program = CrewOnCommand()
    with (
        PrefectServer(tmp_path / "server", template=prefect_template) as server,
        CrewPool(server, tmp_path, heartbeat=3) as pool,
    ):
        crew = pool.add_crew("on-command", program)
        deployment = pool.deploy("on-command")
        for name in ("one", "two"):
            pool.worker(name)
        runs = [pool.start(deployment, crew="on-command", inputs={"topic": f"topic {number}"}) for number in range(5)]
        wait_until(lambda: crew.kickoffs == 5, what="five kickoffs")
        if how == "killed":
            server.kill()
        else:
            server.process.send(signal.SIGSTOP)
        program.ended = True  # while nobody can be informed
        time.sleep(60)
        if how == "killed":
            server.start()
        else:
            server.process.send(signal.SIGCONT)
        back = time.monotonic()
        for run_id in runs:
            assert pool.wait_for(run_id)["state_name"] == "Completed"
        notes.append(f"Prefect {how} for 60 s, 5 runs: Completed {time.monotonic() - back:.0f} s after its return")
        assert crew.kickoffs == len(crew.runs) == 5


# Kills


class Cluster:
    """Two crew workers on one pool, Prefect on PostgreSQL, and a crew whose runs last as long as their inputs say."""

    def __init__(self, pool: CrewPool) -> None:
        self.pool = pool
        self.crew: CrewServer = pool.add_crew("lasting", Lasting(), wait={"initial": 0.3, "max_interval": 2.0})
        self.deployment = pool.deploy("lasting")
        self.workers: dict[str, Worker] = {}
        self.runs: list[str] = []

    def start_worker(self, name: str) -> None:
        self.workers[name] = self.pool.worker(name)

    def start_runs(self, durations: list[float]) -> None:
        for seconds in durations:
            inputs = {"topic": f"topic {len(self.runs)}", "seconds": f"{seconds:.1f}"}
            key = f"{self.pool.name} {len(self.runs)}"  # the server is shared
            self.runs.append(self.pool.start(self.deployment, crew="lasting", inputs=inputs, idempotency_key=key))

    def open(self) -> int:
        """Return how many flow runs have not ended."""
        kinds = ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]
        body = {"flow_runs": {"id": {"any_": self.runs}, "state": {"type": {"any_": kinds}}}}
        return self.pool.call("POST", "/flow_runs/count", body)

    def check(self) -> collections.Counter[str]:
        """Fail unless each key was kicked off once at most, and every flow run ended well or honestly."""
        ends: collections.Counter[str] = collections.Counter()
        completed = list[str]()
        for run_id in self.runs:
            run = self.pool.flow_run(run_id)
            uncertain = "KickoffUncertainError" in (run["state"]["message"] or "")
            ends["uncertain" if uncertain else run["state_name"]] += 1
            if run["state_name"] == "Completed":
                completed.append(run["parameters"]["idempotency_key"])
        assert asyncio.run(self.states(completed)) == {"completed"}, "what has completed is on record"
        assert max(self.crew.kickoffs_by_key.values()) == 1, "no second kickoff"
        assert set(ends) <= {"Completed", "uncertain"}, ends
        assert len(self.crew.kickoffs_by_key) == self.crew.kickoffs == len(self.crew.runs)
        assert self.crew.kickoffs >= ends["Completed"]
        return ends

    async def states(self, keys: list[str]) -> set[str]:
        """Return the states of the last attempts of these keys."""
        store = Store(self.pool.database_url)
        states = {str((await store.run(of_key, key))[-1].state) for key in keys}
        store.close()
        return states

    def seconds_until_all_ended(self, seconds: float) -> float:
        start = time.monotonic()
        wait_until(lambda: self.open() == 0, seconds=seconds, what="the end of all flow runs", pause=1.0)
        return time.monotonic() - start


@pytest.fixture
def cluster(postgres: Postgres, prefect_server_on_postgres: PrefectServer, tmp_path: Path) -> Iterator[Cluster]:
    del postgres
    with CrewPool(prefect_server_on_postgres, tmp_path, heartbeat=3) as pool:
        yield Cluster(pool)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [pytest.param(5, marks=pytest.mark.timeout(300)), pytest.param(40)])
def test_workers_killed_at_random_moments(cluster: Cluster, notes: list[str], kills: int, pytestconfig: pytest.Config):
    chance = random.Random(pytestconfig.getoption("seed"))
    names = ["one", "two"]
    for name in names:
        cluster.start_worker(name)
    begun, restarts = time.monotonic(), 0
    in_flight = 20
    cluster.start_runs([chance.uniform(0, 30) for _ in range(in_flight)])
    for number in range(kills):
        time.sleep(chance.uniform(0, 3))
        name = chance.choice(list(cluster.workers))
        cluster.workers.pop(name).kill()
        # Some come back under their name, some machines never do.
        again = name if chance.random() < 0.5 else f"worker-{number}"
        restarts += again == name
        time.sleep(chance.uniform(0, 2))
        cluster.start_worker(again)
        cluster.start_runs([chance.uniform(0, 30) for _ in range(max(0, in_flight - cluster.open()))])
    left = cluster.seconds_until_all_ended(250)
    ends = cluster.check()
    notes.append(
        f"{kills} SIGKILLs, {restarts} restarts under the same name: {len(cluster.runs)} flow runs, "
        f"{cluster.crew.kickoffs} kickoffs, {dict(ends)}, {time.monotonic() - begun:.0f} s, of which {left:.0f} s "
        "after the last restart"
    )


@pytest.mark.timeout(600)
def test_a_rolling_restart_under_load(cluster: Cluster, notes: list[str]):
    names = ["one", "two"]
    for name in names:
        cluster.start_worker(name)
    count, begun = 200, time.monotonic()
    chance = random.Random(11)
    cluster.start_runs([chance.uniform(20, 60) for _ in range(count)])
    took = list[float]()
    for number in range(3):
        goal = (number + 1) * count // 4
        wait_until(lambda goal=goal: cluster.crew.kickoffs >= goal, seconds=200, what=f"{goal} kickoffs")
        name = names[number % 2]
        worker, start = cluster.workers.pop(name), time.monotonic()
        stop(worker)
        took.append(time.monotonic() - start)
        assert "flow runs go back to the pool" in worker.process.output
        assert "flow runs that did not end" not in worker.process.output
        assert name not in {holder for holder, _ in cluster.pool.holders().values()}, "all went back to the pool"
        cluster.start_worker(name)
    cluster.seconds_until_all_ended(300)
    ends = cluster.check()
    assert ends == {"Completed": count}
    assert cluster.crew.kickoffs == count
    notes.append(
        f"rolling restart: {count} flow runs, {count} kickoffs, SIGTERM to exit "
        f"{', '.join(f'{seconds:.0f}' for seconds in took)} s, {time.monotonic() - begun:.0f} s in all"
    )
