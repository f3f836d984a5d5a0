"""`doctor`: what it finds at real crew servers and a real Prefect server, and how it says it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_crew import crew_flow
from prefect_crew.cli import _prefect
from prefect_crew.cli.doctor import Findings, check_crew, check_prefect
from prefect_crew.client._client import CrewClient
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import PrefectAwayError
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


def test_what_is_found_of_a_crew():
    with CrewServer("travel") as server:
        healthy = look_at(server.url, server.token)
        refused = look_at(server.url, "another-token")
        without_tls = look_at(server.url.replace("http:", "https:"), server.token)
        assert server.kickoffs == 0
    with answering(others=404) as url:
        no_crew = look_at(url, "token-1")
    subjects = ("URL", "server", "token", "inputs", "version")
    assert [(one.subject, one.level) for one in healthy] == [(subject, "ok") for subject in subjects]
    assert "budget, interests, duration, age" in healthy[-2].fact
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


async def test_prefect_and_a_pool_whose_worker_is_gone(prefect_api: PrefectServer, tmp_path: Path):
    async def look(pool: str) -> tuple[str, str, str]:
        found = Findings(quiet=True)
        await check_prefect(found)
        assert [one.subject for one in found][:3] == ["Prefect server", "block type", "records"]
        assert not [one for one in found if one.level == "problem"]
        (about,) = [one for one in found if one.subject == f"crew pool {pool}"]
        return about.level, about.fact, about.fix

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


class _Answers(BaseHTTPRequestHandler):
    """Answers `/health` with `health`, and all else with `others`; a text is a page."""

    health: int | str = "true"
    others: int | str = 401

    def do_GET(self) -> None:
        answer = self.health if self.path.endswith("/health") else self.others
        body = (answer if isinstance(answer, str) else "{}").encode()
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Not on stderr."""


@contextlib.contextmanager
def answering(**answers: int | str) -> Iterator[str]:
    """Give the URL of a server that answers so."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("", (_Answers,), answers)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"health": 404}, "/health was answered with 404. Check PREFECT_API_URL, which has to end in /api"),
        ({"health": "<html>"}, "/health was answered with a page. Check PREFECT_API_URL, which has to end in /api"),
        ({"health": 401}, "/health was answered with 401. Check PREFECT_API_KEY"),
        ({"health": 503}, "/health was answered with 503. Start that server"),
        ({"others": 401}, "401 Unauthorized"),
        ({"others": "<html>"}, "JSONDecodeError"),
        ({"health": 429}, "401 Unauthorized"),
    ],
    ids=str,
)
def test_a_prefect_api_that_is_none_is_a_problem(here, crews: CrewServer, answers: dict[str, int | str], said: str):
    began = time.monotonic()
    with answering(**answers) as url, temporary_settings({PREFECT_API_URL: url}):
        done = here("doctor", f"{crews.url}/greet", "-o", "json")
        by_name = here("doctor", "never-stored", "-o", "json")
    assert time.monotonic() - began < 5
    assert (done.code, done.json["problems"]) == (1, 1)
    (problem,) = [one for one in done.json["findings"] if one["level"] == "problem"]
    assert (problem["subject"], said in problem["fact"], url in problem["fact"]) == ("Prefect API", True, True)
    assert [one["level"] for one in done.json["findings"] if one["subject"] == "token"] == ["ok"]
    assert [one["subject"] for one in by_name.json["findings"] if one["level"] == "problem"] == ["Prefect API", "crew"]


def test_a_prefect_api_that_hangs_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_prefect, "ANSWER_WITHIN", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began, url = time.monotonic(), f"http://127.0.0.1:{server.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(PrefectAwayError, match="does not answer"):
            _prefect._check(url)
    assert time.monotonic() - began < 1.5


def test_findings_are_written_line_by_line(here, alone, prefect_api: PrefectServer, crews: CrewServer):
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


def test_a_deployment_whose_form_is_out_of_date_is_named(prefect_api: PrefectServer, tmp_path: Path):
    name = f"form-{uuid4().hex[:8]}"

    @contextlib.contextmanager
    def stored(inputs: str, **fields: Any) -> Iterator[None]:
        with CrewServer(f"name: form\ninputs: {inputs}\ntasks: [{{name: t, output: x}}]\n") as server:
            block: Any = server.crew(**fields)
            block.save(name, overwrite=True, _sync=True)
            yield

    def look() -> list[tuple[str, str, str]]:
        found = Findings(quiet=True)
        asyncio.run(check_prefect(found))
        return [(one.level, one.fact, one.fix) for one in found if one.subject == f"deployment {name}"]

    (tmp_path / "flows.py").write_text(f"from prefect_crew import crew_flow\nours = crew_flow({name!r})\n")
    of_file: Any = Flow.from_source(str(tmp_path), "flows.py:ours")
    flows = (crew_flow(name), crew_flow(name).with_options(name="trips"), of_file.with_options(name="of-file"))
    with stored("[topic, audience]"):
        for flow in flows:
            flow.to_deployment(name, parameters={"inputs": {"topic": "tea"}}).apply()
        assert look() == []
    with stored("[topic, days]", secret_inputs=["topic"]):
        found = look()
    changes = "the input days is new, the input audience is gone, the input topic has changed."
    assert {one[:2] for one in found} == {("warning", f"Its form is out of date: {changes}")}
    assert sorted(fix.partition(": ")[2] for _, _, fix in found) == [
        f'crew_flow("{name}").with_options(name="trips").deploy("{name}", …) in Python',
        f"prefect deploy flows.py:ours --name {name}",
        f"prefect-crew deploy {name} --name {name}",
    ]
    assert [(level, "was not compared" in difference) for level, difference, _ in look()] == [("warning", True)] * 3
