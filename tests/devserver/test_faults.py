"""Faults: what their texts mean, and what a client sees over TCP. tests/proof/test_network.py tries every one."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from prefect_crew.devserver import CrewServer, Fault, Faults
from support.servers import Serve, finished, kickoff
from support.waiting import wait_until


@pytest.mark.parametrize(
    ("text", "value", "hits"),
    [
        ("kickoff:drop-after-accept", None, [1, 2, 3, 4, 5, 6]),
        ("kickoff:no-id@3", None, [3]),
        ("any:latency@1,4", 1.0, [1, 4]),
        ("status:429=2.5@2-4", 2.5, [2, 3, 4]),
        (" webhook-crew:lose@5- ", None, [5, 6]),
    ],
)
def test_a_text_says_what_and_when(text: str, value: float | None, hits: list[int]) -> None:
    fault = Fault.parse(text)
    place, name = text.strip().partition("@")[0].partition("=")[0].split(":")
    assert (fault.where, fault.name, fault.value) == (place, name, value)
    assert [number for number in range(1, 7) if fault.hits(number)] == hits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kickof:500", "'kickof' is no place for a.*inputs, kickoff, status, resume, stop, inspect, any, webhook"),
        ("kickoff:explode", "'kickoff' has no fault 'explode'. It has latency, 400, .* no-id, .*-before-accept"),
        ("kickoff:stuck-after-accept", "has no fault 'stuck-after-accept'"),
        ("kickoff:drop=2", "takes no value"),
        ("kickoff:latency=-1", "is not a fault. Write PLACE:NAME"),
        ("kickoff:500@0", "is no list of call numbers"),
        ("500", "is not a fault. Write PLACE:NAME"),
    ],
)
def test_errors_say_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fault.parse(text)


def test_faults_count_from_when_they_were_added() -> None:
    faults = Faults(["status:500@1"])
    names = [[fault.name for fault in faults.draw("status", "any")] for _ in range(2)]
    faults.add("status:502@1", Fault("any", "latency", on=1))
    names += [[fault.name for fault in faults.draw("status", "any")] for _ in range(2)]
    faults.add("status:500")
    faults.clear()
    names += [[fault.name for fault in faults.draw("status", "any")]]
    assert names == [["500"], [], ["502", "latency"], [], []]


KICKOFF: dict[str, Any] = {"inputs": {"text": "hello"}}


Served = tuple[CrewServer, httpx.Client]


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve("name: quick\ninputs: [text]\ntasks: [{name: one, output: '{{ text }}'}]")


CUT = httpx.RemoteProtocolError
BROKEN = {"drop": CUT, "reset": httpx.ReadError, "cut": CUT, "timeout": httpx.ReadTimeout}


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize(("name", "error"), BROKEN.items(), ids=BROKEN)
def test_an_unanswered_call(served: Served, name: str, error: type[Exception], phase: str) -> None:
    server, client = served
    server.faults.add(f"kickoff:{name}-{phase}-accept@1", f"inputs:{name}")
    with pytest.raises(error):
        client.post("/kickoff", json=KICKOFF, timeout=0.3)
    with pytest.raises(error):
        client.get("/inputs", timeout=0.3)
    assert server.kickoffs == (phase == "after")
    assert finished(client, kickoff(client, **KICKOFF))


def test_faults_of_headers_bodies_and_latency(served: Served) -> None:
    server, client = served
    names = ("429=3", "503=0.5", "429", "429-bare", "500", "redirect", "html", "empty")
    server.faults.add(*(f"inputs:{name}@{number}" for number, name in enumerate(names, 1)), "inputs:latency=0.2@1,9")
    began = time.monotonic()
    answers = [client.get("/inputs") for _ in range(9)]
    assert time.monotonic() - began >= 0.4
    assert [answer.headers.get("Retry-After") for answer in answers] == ["3", "0.5", "1", *[None] * 6]
    assert answers[5].headers["Location"] == "/elsewhere/inputs"
    assert answers[6].headers["Content-Type"].startswith("text/html")
    assert (answers[7].headers["Content-Type"], answers[7].text) == ("application/json", "")


def test_a_kickoff_outlives_its_client(served: Served) -> None:
    server, client = served
    server.faults.add("kickoff:latency=0.3", "inputs:timeout=0.1")
    with pytest.raises(httpx.RemoteProtocolError):  # a timeout with a value ends in a closed connection
        client.get("/inputs")
    with pytest.raises(httpx.ReadTimeout):
        client.post("/kickoff", json=KICKOFF, timeout=0.1)
    assert server.kickoffs == 0
    wait_until(lambda: server.kickoffs == 1)


@pytest.mark.parametrize(
    ("fault", "statuses"),
    [
        ("status:500@2-3", [200, 500, 500, 200]),
        ("status:early-404=2@1", [404, 404, 200, 200]),
        ("status:forgotten@2", [200, 404, 404, 404]),
    ],
)
def test_status_calls(served: Served, fault: str, statuses: list[int]) -> None:
    server, client = served
    server.faults.add(fault)
    first, second = kickoff(client, **KICKOFF), kickoff(client, **KICKOFF)
    assert [client.get(f"/status/{first}").status_code for _ in statuses] == statuses
    assert client.get(f"/status/{second}").status_code == 200
    assert client.post(f"/stop/{first}").status_code == (404 if "forgotten" in fault else 400)


def test_no_fault_comes_after_what_was_refused(serve: Serve) -> None:
    _, client = serve("name: x\ninputs: [a]\ntasks: [{name: t}]", faults=["kickoff:drop-after-accept"])
    assert client.post("/kickoff", json={"inputs": {}}).status_code == 422


@pytest.mark.parametrize(("phase", "kickoffs"), [("before", 0), ("after", 1)])
def test_a_crash_and_a_restart(serve: Serve, phase: str, kickoffs: int) -> None:
    server, client = serve("echo", faults=[f"kickoff:crash-{phase}-accept@1"])
    with pytest.raises(httpx.ReadError):
        client.post("/kickoff", json=KICKOFF)
    assert server.crashed.wait(5)
    with pytest.raises(httpx.ConnectError):
        client.get("/inputs")
    server.restart()
    assert not server.crashed.is_set()
    assert client.get("/inputs").status_code == 200
    assert len(server.runs) == kickoffs == server.kickoffs
    wait_until(lambda: all(run.output == "hello" for run in server.runs))
