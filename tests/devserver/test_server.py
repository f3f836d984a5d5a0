"""Servers, their ends, and faults over TCP.

tests/proof/test_network.py tries every fault.
"""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from prefect_crew.client.models import CrewInput, TaskResult
from prefect_crew.devserver import Answer, CrewServer, Fault, Faults, Outcome, Run
from prefect_crew.states import CrewState
from support.servers import Serve, finished, kickoff
from support.waiting import LIMIT, wait_until

SLEEPS = """
name: sleeps
inputs: [text, {name: seconds, required: false, default: 0.2}]
tasks:
  - {name: a, seconds: "{{ seconds }}", output: "{{ text }}", fail: "{{ 'no' if text == 'bad' else '' }}"}
  - {name: b, seconds: "{{ seconds }}", output: "{{ text }}!"}
"""


def test_a_stopped_server_frees_its_port(serve: Serve) -> None:
    server, client = serve(SLEEPS)
    run = server.run(kickoff(client, {"text": "x"}))
    with pytest.raises(OSError, match="in use"):
        CrewServer("echo", port=server.port).start()
    with pytest.raises(RuntimeError, match="runs already"):
        server.start()
    server.stop()
    server.stop()
    with pytest.raises(httpx.ConnectError):
        client.get("/inputs")
    assert run.state is CrewState.RUNNING
    assert not [thread for thread in threading.enumerate() if thread.name == f"crew server {server.url}"]
    with CrewServer("echo", port=server.port):
        assert client.get("/").text == "Healthy"


def test_a_hanging_request_does_not_hold_the_end(serve: Serve) -> None:
    server, client = serve("echo", faults=["inputs:timeout"])
    with ThreadPoolExecutor(1) as thread:
        hanging = thread.submit(client.get, "/inputs", timeout=LIMIT)
        wait_until(lambda: server.requests["inputs"])
        server.stop()
        assert isinstance(hanging.exception(), httpx.RemoteProtocolError), "the server ends it, not the client"


class Odd:
    """A program that does what the protocol does not forbid."""

    name = "odd"

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(name="what")]

    async def execute(self, run: Run) -> Outcome:
        if isinstance(what := run.inputs["what"], str) and what in RAISED:
            raise RAISED[what][0]
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        run.task_ended(TaskResult(name="late", output="too late"))
        return Outcome(output="done all the same", data={"object": object})


RAISED: dict[str, tuple[BaseException, str]] = {
    "raise": (KeyError("nobody expected this"), "KeyError: 'nobody expected this'"),
    "cancel": (asyncio.CancelledError(), "the crew was cancelled from within"),
    "exit": (SystemExit("enough"), "SystemExit: enough"),
}


def test_whatever_a_program_raises_fails_its_run(serve: Serve) -> None:
    server, client = serve(Odd())
    for what, (_, error) in RAISED.items():
        body = finished(client, kickoff(client, {"what": what}))
        assert body["status"] == "error"
        assert body["error"] == error
    run = server.run(kickoff(client, {"what": "ignore it"}))
    wait_until(lambda: run.state is CrewState.RUNNING)
    assert client.post(f"/stop/{run.id}").status_code == 200
    time.sleep(0.1)
    assert client.get(f"/status/{run.id}").json()["status"] == "stopped"
    assert run.tasks == []
    assert client.get("/inspect").status_code == 404, "it has no definition"


async def test_the_end_of_a_run_ends_its_questions() -> None:
    run = Run({})
    run.begin()
    asking = [asyncio.create_task(run.ask(task_id="review", output="x")) for _ in range(2)]
    await asyncio.sleep(0)
    run.end(CrewState.STOPPED)
    assert run.answer("review", Answer(approve=True, feedback="")) is None
    ends = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(error) for error in ends] == [asyncio.CancelledError] * 2


# Faults


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
    assert fault.where == place
    assert fault.name == name
    assert fault.value == value
    assert [number for number in range(1, 7) if fault.hits(number)] == hits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kickof:500", "'kickof' is no place for a.*inputs, kickoff, status, resume, stop, inspect, any, webhook"),
        ("kickoff:explode", "'kickoff' has no fault 'explode'. It has latency, hold, 400, .* no-id, .*-before-accept"),
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
    assert answers[7].headers["Content-Type"] == "application/json"
    assert answers[7].text == ""


def test_a_kickoff_outlives_its_client(served: Served) -> None:
    server, client = served
    server.faults.add("kickoff:hold", "inputs:timeout=0.1")
    with pytest.raises(httpx.RemoteProtocolError):  # a timeout with a value ends in a closed connection
        client.get("/inputs")
    with pytest.raises(httpx.ReadTimeout):
        client.post("/kickoff", json=KICKOFF, timeout=0.1)
    wait_until(lambda: server.held == 1)
    assert server.kickoffs == 0
    server.release()
    wait_until(lambda: server.kickoffs == 1)


@pytest.mark.parametrize(("fault", "started"), [("kickoff:hold@1", 0), ("kickoff:hold-after-accept@1", 1)])
def test_a_request_is_held_until_it_is_released(served: Served, fault: str, started: int) -> None:
    server, client = served
    server.faults.add(fault)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(client.post, "/kickoff", json=KICKOFF)
        wait_until(lambda: server.held == 1)
        assert server.kickoffs == started
        assert answer.running()
        server.release()
        assert answer.result().status_code == 200
    assert (server.held, server.kickoffs) == (0, 1)


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
