"""`doctor`: what it finds at real crew servers and a real Prefect server, and how it says it."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

from prefect_crew.cli.doctor import Findings, check_crew, check_prefect
from prefect_crew.client._client import CrewClient
from prefect_crew.devserver import CrewServer
from prefect_crew.records.store import PrefectRecords
from support.crew_pool import CrewPool
from support.prefect_server import PrefectServer


def look_at(url: str, token: str) -> Findings:
    async def look() -> Findings:
        found = Findings(quiet=True)
        async with CrewClient(url, token, request_timeout=5) as client:
            await check_crew(client, found)
        return found

    return asyncio.run(look())


def test_what_is_found_of_a_crew(tmp_path: Path):
    with CrewServer("travel") as server:
        healthy = look_at(server.url, server.token)
        refused = look_at(server.url, "another-token")
        without_tls = look_at(server.url.replace("http:", "https:"), server.token)
        assert server.kickoffs == 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, directory=str(tmp_path))) as files:
        threading.Thread(target=files.serve_forever).start()
        no_crew = look_at(f"http://127.0.0.1:{files.server_port}", "token-1")
        files.shutdown()
    assert [(one.subject, one.level) for one in healthy] == [(x, "ok") for x in ("URL", "server", "token", "inputs")]
    assert "budget, interests, duration, age" in healthy[-1].found
    assert "another-token" not in str(refused)
    for found, subject, fix in (
        (refused, "token", "User Bearer Token"),
        (without_tls, "TLS", "begins with http or https"),
        (no_crew, "crew", "Status tab"),
        (look_at("http://127.0.0.1:1", "token-1"), "server", "online on its page"),
    ):
        (problem,) = [one for one in found if one.level == "problem"]
        assert (problem.subject, fix in problem.fix) == (subject, True)
    for fault, level in (("inputs:404", "warning"), ("inputs:500", "problem")):
        with CrewServer("echo", faults=[fault]) as server:
            *others, last = look_at(server.url, server.token)
        assert (last.subject, last.level, bool(last.fix)) == ("inputs", level, True)
        assert {one.level for one in others} == {"ok"}


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Not on stderr."""


async def test_prefect_and_a_pool_whose_worker_is_gone(prefect_api: PrefectServer, tmp_path: Path):
    async def look(pool: str) -> tuple[str, str, str]:
        found = Findings(quiet=True)
        await check_prefect(found)
        assert [one.subject for one in found][:3] == ["Prefect server", "block type", "records"]
        assert not [one for one in found if one.level == "problem"]
        (about,) = [one for one in found if one.subject == f"crew pool {pool}"]
        return about.level, about.found, about.fix

    with CrewPool(prefect_api, tmp_path, f"doctor-{uuid4().hex[:8]}") as pool:
        start = f"prefect worker start --pool {pool.name}"
        assert await look(pool.name) == ("warning", "workers online: none; flow runs begun: 0", start)
        deployment = pool.deploy("a")
        for name in ("here", "there"):
            pool.call("POST", f"/work_pools/{pool.name}/workers/heartbeat", {"name": name})
        for owner, *states in (
            ("here", "PENDING", "RUNNING"),
            ("gone", "PENDING", "RUNNING"),
            ("gone", "PENDING"),
            ("gone", "PENDING", "RUNNING", "COMPLETED"),
            (None, "PENDING"),  # a worker may be about to take it
        ):
            run_id = pool.start(deployment)
            for state in states:
                pool.set_state(run_id, state)
            if owner is not None:
                pool.call("PATCH", f"/flow_runs/{run_id}", {"infrastructure_pid": f"{owner}/1"})
        level, found, fix = await look(pool.name)
    assert (level, "within two heartbeats" in fix) == ("warning", True)
    assert found == ("workers online: here, there; flow runs begun: 4, 2 of them left by workers that are gone (gone)")
    assert not [record async for record in PrefectRecords().all() if record.crew == "doctor"]


def test_what_is_found_is_written_line_by_line_also_if_prefect_is_away(
    here, alone, prefect_api: PrefectServer, crews: CrewServer
):
    done = here("doctor", f"{crews.url}/greet", "--token", "wrong-token", "-o", "json")
    assert (done.code, done.json["problems"]) == (1, 1)
    (problem,) = [one for one in done.json["findings"] if one["level"] == "problem"]
    assert (problem["subject"], "prefect-crew crews save" in problem["fix"]) == ("token", True)
    done = here("doctor", "never-stored")
    assert done.code == 1
    assert "✗ crew: No crew is stored under the name 'never-stored'" in done.out
    done = alone("doctor", f"{crews.url}/greet", env={"PREFECT_API_URL": "http://127.0.0.1:1/api"})
    assert done.code == 1
    assert "✗ Prefect API: The Prefect API at http://127.0.0.1:1/api does not answer" in done.out
    assert "✓ token: it is accepted" in done.out
    assert done.out.endswith("Problems: 1.\n")
    assert "Traceback" not in done.err
