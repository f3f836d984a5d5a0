"""`doctor`: what it finds at real crew servers and a real Prefect server, and how it says it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest

from prefect_crew.cli.doctor import Finding, check_crew, check_prefect, is_older
from prefect_crew.client._client import CrewClient
from prefect_crew.devserver import CrewServer
from prefect_crew.records.store import PrefectRecords
from support.crew_pool import CrewPool
from support.prefect_server import PrefectServer


def findings(url: str, token: str) -> dict[str, Finding]:
    """Return what is found at a crew, by subject; of a subject that is found twice the second."""

    async def collect() -> dict[str, Finding]:
        return {finding.subject: finding async for finding in check_crew(CrewClient(url, token, request_timeout=5))}

    return asyncio.run(collect())


def problems(found: dict[str, Finding]) -> dict[str, str]:
    return {subject: finding.fix for subject, finding in found.items() if finding.level == "problem"}


def test_a_healthy_crew():
    with CrewServer("travel") as server:
        found = findings(server.url, server.token)
        assert server.kickoffs == 0
    assert [(subject, one.level) for subject, one in found.items()] == [
        (subject, "ok") for subject in ("URL", "server", "token", "inputs", "status")
    ]
    assert "budget, interests, duration, age" in found["inputs"].found
    with CrewServer("name: x\ninputs: [topic, {name: id, required: false}]\ntasks: [{name: t, output: x}]") as server:
        reserved = findings(server.url, server.token)["inputs"]
    assert (reserved.level, "called id" in reserved.found, "UUID" in reserved.fix) == ("warning", True, True)


def test_what_is_wrong_with_the_address_or_the_token(tmp_path: Path):
    with CrewServer("travel") as server:
        refused = findings(server.url, "another-token")
        without_tls = findings(server.url.replace("http:", "https:"), server.token)
    files = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(tmp_path)))
    threading.Thread(target=files.serve_forever).start()
    try:
        no_crew = findings(f"http://127.0.0.1:{files.server_port}", "token-1")
    finally:
        files.shutdown()
        files.server_close()
    assert "another-token" not in str(refused)
    for found, subject, fix in (
        (refused, "token", "User Bearer Token"),
        (without_tls, "TLS", "begin with http"),
        (no_crew, "crew", "Status tab"),
        (findings("http://127.0.0.1:1", "token-1"), "server", "online on its page"),
    ):
        assert list(problems(found)) == [subject]
        assert fix in problems(found)[subject]


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Not on stderr."""


@pytest.mark.parametrize(
    ("fault", "subject", "level"),
    [
        pytest.param("inputs:404", "inputs", "warning", id="no-inputs"),
        pytest.param("inputs:500", "inputs", "problem", id="failing-inputs"),
        pytest.param("status:500", "status", "problem", id="failing-status"),
        pytest.param("status:401", "status", "problem", id="status-refused"),
    ],
)
def test_a_crew_with_something_wrong(fault: str, subject: str, level: str):
    with CrewServer("echo", faults=[fault]) as server:
        found = findings(server.url, server.token)
    assert found[subject].level == level
    assert found[subject].fix
    others = {one.level for name, one in found.items() if name not in (subject, "token")}
    assert others == {"ok"}


@pytest.mark.parametrize(
    ("version", "than", "expected"),
    [
        ("3.7.8", "3.8.0", True),
        ("3.10.0", "3.9.9", False),
        ("3.9.0.dev4", "3.8.0", False),
        ("3.9.1+2.g12ab", "3.9.1", False),
    ],
)
def test_is_older(version: str, than: str, expected: bool):
    assert is_older(version, than) is expected


async def test_prefect(prefect_api: PrefectServer):
    found = {finding.subject: finding async for finding in check_prefect()}
    assert list(found)[:4] == ["Prefect", "Prefect server", "block type", "records"]
    assert not [one for one in found.values() if one.level == "problem"]
    assert found["records"].level == "ok"
    assert not [record async for record in PrefectRecords().all() if record.crew == "doctor"]


# Pools of crew workers


async def pool_findings(pool: str) -> list[Finding]:
    return [finding async for finding in check_prefect() if finding.subject == f"crew pool {pool}"]


@pytest.fixture
def pool(prefect_api: PrefectServer, tmp_path: Path) -> Iterator[CrewPool]:
    with CrewPool(prefect_api, tmp_path, f"doctor-{uuid4().hex[:8]}") as pool:
        yield pool


def begun(pool: CrewPool, deployment: str, owner: str | None, *states: str) -> None:
    """Make a flow run that a worker has taken, in the last of these states."""
    run_id = pool.start(deployment)
    for state in states:
        pool.set_state(run_id, state)
    if owner is not None:
        pool.call("PATCH", f"/flow_runs/{run_id}", {"infrastructure_pid": f"{owner}/1"})


async def test_a_pool_without_a_worker(pool: CrewPool):
    (finding,) = await pool_findings(pool.name)
    assert finding.level == "warning"
    assert finding.found == "No worker is online."
    assert finding.fix == f"prefect worker start --pool {pool.name}"


async def test_a_pool_whose_worker_is_gone(pool: CrewPool):
    deployment = pool.deploy("a")
    for name in ("here", "there"):
        pool.call("POST", f"/work_pools/{pool.name}/workers/heartbeat", {"name": name})
    begun(pool, deployment, "here", "PENDING", "RUNNING")
    begun(pool, deployment, "gone", "PENDING", "RUNNING")
    begun(pool, deployment, "gone", "PENDING")
    begun(pool, deployment, "gone", "PENDING", "RUNNING", "COMPLETED")
    begun(pool, deployment, None, "PENDING")  # a worker may be about to take it
    pool.start(deployment)
    online, waiting = await pool_findings(pool.name)
    assert (online.level, online.found) == ("ok", "2 workers online (here, there), 4 flow runs begun")
    assert (waiting.level, waiting.found) == (
        "warning",
        "Worker gone is gone and left 2 flow runs.",
    )
    assert f"prefect worker start --pool {pool.name} --name gone" in waiting.fix


async def test_a_pool_that_is_paused(pool: CrewPool):
    pool.call("PATCH", f"/work_pools/{pool.name}", {"is_paused": True})
    paused, _ = await pool_findings(pool.name)
    assert (paused.level, paused.fix) == ("warning", f"prefect work-pool resume {pool.name}")


# The command


def test_what_is_found_is_written_line_by_line(here, prefect_api: PrefectServer, crews: CrewServer):
    done = here("doctor", f"{crews.url}/greet")
    assert done.code == 0
    assert f"✓ Prefect API: {prefect_api.api_url} answers" in done.out
    assert "✓ inputs: the crew takes who" in done.out
    assert done.out.endswith("Problems: 0.\n")
    done = here("doctor", f"{crews.url}/greet", "--token", "wrong-token", "-o", "json")
    assert (done.code, done.json["problems"]) == (1, 1)
    (problem,) = [one for one in done.json["findings"] if one["level"] == "problem"]
    assert (problem["subject"], "prefect-crew crews save" in problem["fix"]) == ("token", True)
    done = here("doctor", "never-stored")
    assert done.code == 1
    assert "✗ crew: No crew is stored under the name 'never-stored'" in done.out


def test_a_crew_is_looked_at_even_if_prefect_is_away(alone, crews: CrewServer):
    done = alone("doctor", f"{crews.url}/greet", env={"PREFECT_API_URL": "http://127.0.0.1:1/api"})
    assert done.code == 1
    assert "✗ Prefect API: The Prefect API at http://127.0.0.1:1/api does not answer" in done.out
    assert "✓ token: it is accepted" in done.out
    assert done.out.endswith("Problems: 1.\n")
    assert "Traceback" not in done.err
