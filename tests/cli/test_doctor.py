"""`doctor`: what it finds at real crew servers and a real Prefect server, and how it says it."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_crew import crew_flow
from prefect_crew.cli import _prefect
from prefect_crew.cli.doctor import Finding, Findings, check_crew, check_prefect
from prefect_crew.client._client import CrewClient
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import PrefectAwayError
from prefect_crew.runs.database import in_store
from prefect_crew.store import workers
from support.commands import Command
from support.crew_pool import CrewPool
from support.prefect_server import PrefectServer
from support.raw import answer, answering, raw_server


async def look_at_crew(url: str, token: str = "token-1") -> Findings:
    findings = Findings(quiet=True)
    async with CrewClient(url, token, request_timeout=5) as client:
        await check_crew(client, findings)
    return findings


async def look_at_prefect(subject: str) -> list[Finding]:
    """Return what is found of a subject; with Prefect itself all is well."""
    findings = Findings(quiet=True)
    await check_prefect(findings)
    assert [finding.subject for finding in findings][:3] == ["Prefect server", "block type", "crew database"]
    assert not [finding for finding in findings if finding.level == "problem"]
    return [finding for finding in findings if finding.subject == subject]


async def test_what_is_found_of_a_crew():
    with CrewServer("travel") as server:
        healthy = await look_at_crew(server.url, server.token)
        refused = await look_at_crew(server.url, "another-token")
        without_tls = await look_at_crew(server.url.replace("http:", "https:"))
        assert server.kickoffs == 0
    async with raw_server(answering(answer("{}", "404 Not Found"))) as url:
        no_crew = await look_at_crew(url)
    assert {finding.level for finding in healthy} == {"ok"}
    assert [finding.subject for finding in healthy] == ["URL", "server", "token", "inputs", "version"]
    assert "budget, interests, duration, age" in healthy[-2].fact
    assert "another-token" not in str(refused)
    for findings, subject, fix in (
        (refused, "token", "User Bearer Token"),
        (without_tls, "TLS", "begins with http or https"),
        (no_crew, "crew", "Status tab"),
        (await look_at_crew("http://127.0.0.1:1"), "server", "online on its page"),
    ):
        (problem,) = [finding for finding in findings if finding.level == "problem"]
        assert problem.subject == subject
        assert fix in problem.fix


@pytest.mark.parametrize(("fault", "subject"), [("inputs:404", "crew"), ("inputs:500", "inputs")])
async def test_inputs_that_cannot_be_asked_for(fault: str, subject: str):
    with CrewServer("echo", faults=[fault]) as server:
        *others, last = await look_at_crew(server.url, server.token)
    assert last.subject == subject
    assert last.level == "problem"
    assert last.fix
    assert {finding.level for finding in others} == {"ok"}


async def test_prefect_and_a_pool_whose_worker_is_gone(prefect_api: PrefectServer, tmp_path: Path):
    with CrewPool(prefect_api, tmp_path, f"doctor-{uuid4().hex[:8]}") as pool:
        (finding,) = await look_at_prefect(f"crew pool {pool.name}")
        assert finding.level == "warning"
        assert finding.fact == "workers online: none; flow runs begun: 0"
        assert finding.fix == f"prefect worker start --pool {pool.name}"
        pool_id = pool.call("GET", f"/work_pools/{pool.name}")["id"]
        for name, heartbeat, held in (("here", 30, 2), ("there", 30, 0), ("gone", 0, 2), ("ended", 0, 0)):
            boot = uuid4().hex
            await in_store(workers.beat, boot, pool_id, name, "host", heartbeat)
            for _ in range(held):
                await in_store(workers.hold, str(uuid4()), boot)
        (finding,) = await look_at_prefect(f"crew pool {pool.name}")
    left = "workers online: here, there; flow runs begun: 4, 2 of them left by workers that are gone (gone)"
    assert finding.level == "warning"
    assert finding.fact == left
    assert "within two heartbeats" in finding.fix


PAGE = answer("<html>", headers="Content-Type: text/html\r\n")
NO_API = "Check PREFECT_API_URL, which has to end in /api"


def refusal(code: int) -> bytes:
    return answer("{}", f"{code} Refused", "Content-Type: application/json\r\n")


@pytest.mark.parametrize(
    ("health", "others", "fact"),
    [
        pytest.param(refusal(404), refusal(401), f"/health was answered with 404. {NO_API}", id="no-health"),
        pytest.param(PAGE, refusal(401), f"/health was answered with a page. {NO_API}", id="page"),
        pytest.param(refusal(401), refusal(401), "/health was answered with 401. Check PREFECT_API_KEY", id="key"),
        pytest.param(refusal(503), refusal(401), "/health was answered with 503. Start that server", id="broken"),
        pytest.param(answer("true"), refusal(401), "401 Unauthorized", id="key-of-the-rest"),
        pytest.param(answer("true"), PAGE, "JSONDecodeError", id="page-of-the-rest"),
        pytest.param(refusal(429), refusal(401), "401 Unauthorized", id="busy"),
    ],
)
async def test_a_prefect_api_that_is_none_is_a_problem(
    here: Command, crews: CrewServer, health: bytes, others: bytes, fact: str
):
    began = time.monotonic()
    server = raw_server(answering(lambda head: health if "/health HTTP" in head else others))
    async with server as url:
        with temporary_settings({PREFECT_API_URL: url}):
            done = await asyncio.to_thread(here, "doctor", f"{crews.url}/greet", "-o", "json")
            by_name = await asyncio.to_thread(here, "doctor", "never-stored", "-o", "json")
    assert time.monotonic() - began < 5
    assert done.code == 1
    (problem,) = [finding for finding in done.json["findings"] if finding["level"] == "problem"]
    assert problem["subject"] == "Prefect API"
    assert fact in problem["fact"]
    assert url in problem["fact"]
    assert [finding["level"] for finding in done.json["findings"] if finding["subject"] == "token"] == ["ok"]
    problems = [finding["subject"] for finding in by_name.json["findings"] if finding["level"] == "problem"]
    assert problems == ["Prefect API", "crew"]


def test_a_prefect_api_that_hangs_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_prefect, "ANSWER_WITHIN", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began, url = time.monotonic(), f"http://127.0.0.1:{server.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(PrefectAwayError, match="does not answer"):
            _prefect._check(url)
    assert time.monotonic() - began < 1.5


def test_findings_are_written_line_by_line(
    here: Command, alone: Command, prefect_api: object, crews: CrewServer, tmp_path: Path
):
    (wrong := tmp_path / "token").write_text("wrong-token")
    done = here("doctor", f"{crews.url}/greet", "--token-file", str(wrong), "-o", "json")
    assert done.code == 1
    assert done.json["problems"] == 1
    (problem,) = [finding for finding in done.json["findings"] if finding["level"] == "problem"]
    assert problem["subject"] == "token"
    assert "prefect-crew crews save" in problem["fix"]
    assert "✗ crew: No crew is stored under the name 'never-stored'" in here("doctor", "never-stored").out
    done = alone("doctor", f"{crews.url}/greet", env={"PREFECT_API_URL": "nonsense"})
    assert done.code == 1
    assert "✗ Prefect API: The Prefect API at nonsense does not answer" in done.out
    assert ".." not in done.out
    assert "✓ token: it is accepted" in done.out
    assert done.out.endswith("Problems: 1.\n")
    assert "Traceback" not in done.err


@contextlib.contextmanager
def form_crew(name: str, inputs: str, **fields: Any) -> Iterator[None]:
    with CrewServer(f"name: form\ninputs: {inputs}\ntasks: [{{name: t, output: x}}]\n") as server:
        block: Any = server.crew(**fields)
        block.save(name, overwrite=True, _sync=True)
        yield


def test_a_deployment_whose_form_is_out_of_date_is_named(prefect_api: PrefectServer, tmp_path: Path):
    name = f"form-{uuid4().hex[:8]}"

    def look() -> list[Finding]:
        return asyncio.run(look_at_prefect(f"deployment {name}"))

    (tmp_path / "flows.py").write_text(f"from prefect_crew import crew_flow\nours = crew_flow({name!r})\n")
    of_file: Any = Flow.from_source(str(tmp_path), "flows.py:ours")
    with form_crew(name, "[topic, audience]"):
        for flow in (crew_flow(name), crew_flow(name).with_options(name="trips"), of_file.with_options(name="of-file")):
            flow.to_deployment(name, parameters={"inputs": {"topic": "tea"}}).apply()
        assert look() == []
    with form_crew(name, "[topic, days]", secret_inputs=["topic"]):
        outdated = look()
    changes = "the input days is new, the input audience is gone, the input topic has changed."
    facts = {(finding.level, finding.fact) for finding in outdated}
    assert facts == {("warning", f"Its form is out of date: {changes}")}
    assert sorted(finding.fix.partition(": ")[2] for finding in outdated) == [
        f'crew_flow("{name}").with_options(name="trips").deploy("{name}", …) in Python',
        f"prefect deploy flows.py:ours --name {name}",
        f"prefect-crew deploy {name} --name {name}",
    ]
    not_compared = look()
    assert [finding.level for finding in not_compared] == ["warning"] * 3
    assert all("was not compared" in finding.fact for finding in not_compared)
