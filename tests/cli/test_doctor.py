"""`doctor`: what it finds at real crew servers and a real Prefect server, and how it says it."""

import asyncio
import re
import socket
import time

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_crew.cli import _prefect
from prefect_crew.cli.doctor import Findings, check_crew, check_prefect
from prefect_crew.client._client import CrewClient
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import PrefectAwayError
from support.commands import Command
from support.prefect_server import PrefectServer
from support.raw import answer, answering, raw_server


async def look_at_crew(url: str, token: str = "token-1") -> Findings:
    findings = Findings()
    async with CrewClient(url, token, request_timeout=5) as client:
        await check_crew(client, findings)
    return findings


async def test_what_is_found_of_a_crew():
    with CrewServer("travel") as server:
        healthy = await look_at_crew(server.url, server.token)
        refused = await look_at_crew(server.url, "another-token")
        without_tls = await look_at_crew(server.url.replace("http:", "https:"))
        assert server.kickoffs == 0
    async with raw_server(answering(answer("{}", "404 Not Found"))) as url:
        no_crew = await look_at_crew(url)
    assert {finding.level for finding in healthy} == {"ok"}
    assert [finding.subject for finding in healthy] == ["URL", "token", "inputs", "version"]
    assert "budget, interests, duration, age" in healthy[-2].fact
    assert "another-token" not in str(refused)
    for findings, subject, advice in (
        (refused, "token", "User Bearer Token"),
        (without_tls, "server", "begins with http or https"),
        (no_crew, "inputs", "Check the crew's URL"),
        (await look_at_crew("http://127.0.0.1:1"), "server", "online on its page"),
    ):
        (problem,) = [finding for finding in findings if finding.level == "problem"]
        assert problem.subject == subject
        assert advice in problem.fact + problem.fix


@pytest.mark.parametrize("fault", ["inputs:404", "inputs:500"])
async def test_inputs_that_cannot_be_asked_for(fault: str):
    with CrewServer("echo", faults=[fault]) as server:
        *others, last = await look_at_crew(server.url, server.token)
    assert last.subject == "inputs"
    assert last.level == "problem"
    assert {finding.level for finding in others} == {"ok"}


async def test_what_is_found_of_prefect(prefect_api: PrefectServer):
    findings = Findings()
    await check_prefect(findings)
    assert [finding.subject for finding in findings] == ["Prefect server", "block type", "crew database"]
    assert not [finding for finding in findings if finding.level == "problem"]
    assert re.search(r", id [0-9a-f-]{36}, on this machine only$", findings[-1].fact)


PAGE = answer("<html>", headers="Content-Type: text/html\r\n")
NO_API = "check PREFECT_API_URL, which has to end in /api"


def refusal(code: int) -> bytes:
    return answer("{}", f"{code} Refused", "Content-Type: application/json\r\n")


@pytest.mark.parametrize(
    ("health", "others", "fact"),
    [
        pytest.param(refusal(404), refusal(401), NO_API, id="no-health"),
        pytest.param(PAGE, refusal(401), NO_API, id="page"),
        pytest.param(refusal(401), refusal(401), "Check PREFECT_API_KEY", id="key"),
        pytest.param(refusal(503), refusal(401), "does not answer (HTTP 503). Start that server", id="broken"),
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
            done = await asyncio.to_thread(here, "doctor", f"{crews.url}/greet")
            by_name = await asyncio.to_thread(here, "doctor", "never-stored")
    assert time.monotonic() - began < 5
    assert done.code == 1
    (problem,) = [line for line in done.out.splitlines() if line.startswith("✗")]
    assert problem.startswith("✗ Prefect API: ")
    assert url in problem
    assert fact in done.out
    assert "run: prefect-crew doctor" not in done.out.replace("Run", "run"), "that is this command"
    assert "✓ token: " in done.out
    problems = [line.partition(":")[0] for line in by_name.out.splitlines() if line.startswith("✗")]
    assert problems == ["✗ Prefect API", "✗ crew"]


def test_a_prefect_api_that_hangs_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_prefect, "ANSWER_WITHIN", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began, url = time.monotonic(), f"http://127.0.0.1:{server.getsockname()[1]}/api"
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(PrefectAwayError, match="does not answer"):
            _prefect._check()
    assert time.monotonic() - began < 1.5


def test_findings_are_written_line_by_line(
    here: Command, alone: Command, prefect_api: object, crews: CrewServer, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as refused:
        refused.setenv("CREW_TOKEN", "wrong-token")
        done = here("doctor", f"{crews.url}/greet")
    assert done.code == 1
    assert done.out.endswith("Problems: 1.\n")
    (problem,) = [line for line in done.out.splitlines() if line.startswith("✗")]
    assert problem.startswith("✗ token: ")
    assert "prefect-crew crews save" in problem
    assert "✗ crew: No crew is stored under the name 'never-stored'" in here("doctor", "never-stored").out
    done = alone("doctor", f"{crews.url}/greet", env={"PREFECT_API_URL": "nonsense"})
    assert done.code == 1
    assert "✗ Prefect API: The Prefect API nonsense does not answer" in done.out
    assert ".." not in done.out
    assert "✓ token: it is accepted" in done.out
    assert done.out.endswith("Problems: 1.\n")
    assert "Traceback" not in done.err
