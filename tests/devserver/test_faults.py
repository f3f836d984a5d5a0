"""Every fault of a call, over TCP and without a port: what a client sees, and what the server did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from prefect_crew.devserver import CrewServer, InProcessCrewServer, create_app, load_program
from prefect_crew.devserver.server import LocalServer
from support.servers import ClientOf, Finished

QUICK = "name: quick\ninputs: [text]\ntasks: [{name: one, output: '{{ text }}'}]"
SLOW = "name: slow\ninputs: [text]\ntasks: [{name: one, seconds: 60, output: '{{ text }}'}]"
KICKOFF: dict[str, Any] = {"inputs": {"text": "hello"}}


class Caller:
    """Sends single requests to a server of either kind, each over a connection of its own."""

    def __init__(self, server: LocalServer) -> None:
        self.server = server

    def __call__(self, method: str, path: str, *, timeout: float = 10, json: Any = None) -> httpx.Response:
        return asyncio.run(self.send(method, path, timeout=timeout, json=json))

    async def send(self, method: str, path: str, *, timeout: float = 10, json: Any = None) -> httpx.Response:
        transport = self.server.transport if isinstance(self.server, InProcessCrewServer) else None
        async with httpx.AsyncClient(
            base_url=self.server.url,
            headers=self.server.headers,
            timeout=timeout,
            transport=transport,
            trust_env=False,
            verify=False,
        ) as client:
            return await client.request(method, path, json=json)


@pytest.fixture(scope="module", params=["port", "in-process"])
def server(request: pytest.FixtureRequest) -> Iterator[LocalServer]:
    with CrewServer(QUICK) if request.param == "port" else InProcessCrewServer(QUICK) as running:
        yield running


@pytest.fixture
def call(server: LocalServer) -> Iterator[Caller]:
    server.counters.accepted.clear()
    yield Caller(server)
    server.faults.clear()


ANSWERS = [
    pytest.param("400", 400, id="400"),
    pytest.param("401", 401, id="401"),
    pytest.param("403", 403, id="403"),
    pytest.param("404", 404, id="404"),
    pytest.param("405", 405, id="405"),
    pytest.param("408", 408, id="408"),
    pytest.param("422", 422, id="422"),
    pytest.param("429", 429, id="429"),
    pytest.param("429-bare", 429, id="429-bare"),
    pytest.param("500", 500, id="500"),
    pytest.param("502", 502, id="502"),
    pytest.param("503", 503, id="503"),
    pytest.param("503-bare", 503, id="503-bare"),
    pytest.param("504", 504, id="504"),
    pytest.param("redirect", 307, id="redirect"),
    pytest.param("html", 200, id="html"),
    pytest.param("garbage", 200, id="garbage"),
    pytest.param("empty", 200, id="empty"),
    pytest.param("no-id", 200, id="no-id"),
]
BROKEN = [
    pytest.param("drop", httpx.RemoteProtocolError, id="drop"),
    pytest.param("reset", httpx.ReadError, id="reset"),
    pytest.param("cut", httpx.RemoteProtocolError, id="cut"),
    pytest.param("timeout", httpx.ReadTimeout, id="timeout"),
]


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize(("name", "status"), ANSWERS)
def test_a_kickoff_that_is_answered_wrongly(call: Caller, name: str, status: int, phase: str) -> None:
    call.server.faults.add(f"kickoff:{name}-{phase}-accept@1")
    answer = call("POST", "/kickoff", json=KICKOFF)
    assert answer.status_code == status
    assert "kickoff_id" not in answer.text or name == "garbage"
    assert call.server.kickoffs == (phase == "after")
    assert call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"]


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize(("name", "error"), BROKEN)
def test_a_kickoff_that_is_not_answered(call: Caller, name: str, error: type[Exception], phase: str) -> None:
    call.server.faults.add(f"kickoff:{name}-{phase}-accept@1")
    with pytest.raises(error):
        call("POST", "/kickoff", json=KICKOFF, timeout=0.3)
    assert call.server.kickoffs == (phase == "after")
    assert call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"]


@pytest.mark.parametrize(("name", "error"), BROKEN)
@pytest.mark.parametrize("method_path", ["GET /inputs", "GET /status/{id}", "POST /stop/{id}", "GET /"])
def test_other_calls_that_are_not_answered(call: Caller, name: str, error: type[Exception], method_path: str) -> None:
    kickoff_id = call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"]
    call.server.faults.add(f"any:{name}")
    method, path = method_path.format(id=kickoff_id).split()
    with pytest.raises(error):
        call(method, path, timeout=0.3)
    call.server.faults.clear()
    assert call("GET", f"/status/{kickoff_id}").status_code == 200


@pytest.mark.parametrize(
    ("name", "header"),
    [("429=3", "3"), ("503=0.5", "0.5"), ("429", "1"), ("429-bare", None), ("503-bare", None), ("500", None)],
)
def test_retry_after(call: Caller, name: str, header: str | None) -> None:
    call.server.faults.add(f"inputs:{name}")
    assert call("GET", "/inputs").headers.get("Retry-After") == header


def test_redirect_leads_to_another_path_of_this_server(call: Caller) -> None:
    call.server.faults.add("inputs:redirect")
    assert call("GET", "/inputs").headers["Location"] == "/elsewhere/inputs"


def test_what_is_not_json(call: Caller) -> None:
    call.server.faults.add("inputs:html@1", "inputs:garbage@2", "inputs:empty@3")
    assert call("GET", "/inputs").headers["Content-Type"].startswith("text/html")
    for _ in range(2):
        answer = call("GET", "/inputs")
        assert answer.headers["Content-Type"] == "application/json"
        with pytest.raises(ValueError, match=r"Expecting value|Unterminated"):
            answer.json()


def test_latency_comes_with_other_faults(call: Caller) -> None:
    call.server.faults.add("inputs:latency=0.2", "inputs:500@1")
    for status in (500, 200):
        began = time.monotonic()
        assert call("GET", "/inputs").status_code == status
        assert time.monotonic() - began >= 0.2


def test_timeout_with_a_value_ends_in_a_closed_connection(call: Caller) -> None:
    call.server.faults.add("inputs:timeout=0.1")
    with pytest.raises(httpx.RemoteProtocolError):
        call("GET", "/inputs")


def test_nothing_is_after_what_was_not_accepted(call: Caller) -> None:
    call.server.faults.add("kickoff:drop-after-accept")
    assert call("POST", "/kickoff", json={"inputs": {}}).status_code == 422


def test_the_nth_status(call: Caller) -> None:
    call.server.faults.add("status:500@2-3")
    kickoff_id = call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"]
    assert [call("GET", f"/status/{kickoff_id}").status_code for _ in range(5)] == [200, 500, 500, 200, 200]


@pytest.mark.parametrize("where", ["kickoff", "status"])
def test_early_404(call: Caller, where: str) -> None:
    call.server.faults.add(f"{where}:early-404=2@1")
    first, second = (call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"] for _ in range(2))
    assert [call("GET", f"/status/{first}").status_code for _ in range(4)] == [404, 404, 200, 200]
    assert call("GET", f"/status/{second}").status_code == 200


def test_early_404_by_time(call: Caller) -> None:
    call.server.faults.add("status:early-404-seconds=0.4")
    began = time.monotonic()
    kickoff_id = call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"]
    assert call("GET", f"/status/{kickoff_id}").status_code == 404
    while call("GET", f"/status/{kickoff_id}").status_code == 404:
        time.sleep(0.02)
    assert 0.4 <= time.monotonic() - began < 10


def test_forgotten(call: Caller) -> None:
    call.server.faults.add("status:forgotten@2")
    first = call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"]
    assert [call("GET", f"/status/{first}").status_code for _ in range(4)] == [200, 404, 404, 404]
    assert call("POST", f"/stop/{first}").status_code == 404
    second = call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"]
    assert call("GET", f"/status/{second}").status_code == 200


def test_stuck(call: Caller) -> None:
    call.server.faults.add("kickoff:stuck@1")
    stuck, free = (call("POST", "/kickoff", json=KICKOFF).json()["kickoff_id"] for _ in range(2))
    while call("GET", f"/status/{free}").json()["status"] != "completed":
        time.sleep(0.01)
    assert call("GET", f"/status/{stuck}").json()["status"] == "running"
    assert call("POST", f"/stop/{stuck}").status_code == 200
    assert call("GET", f"/status/{stuck}").json()["status"] == "stopped"


@pytest.mark.parametrize("name", ["500", "drop", "timeout"])
@pytest.mark.parametrize("phase", ["before", "after"])
def test_resume(name: str, phase: str) -> None:
    with InProcessCrewServer("name: r\ntasks: [{name: one, output: x, human: true}, {name: two, output: y}]") as server:
        call = Caller(server)
        server.faults.add(f"resume:{name}-{phase}-accept@1")
        kickoff_id = call("POST", "/kickoff", json={"inputs": {}}).json()["kickoff_id"]
        while call("GET", f"/status/{kickoff_id}").json()["status"] != "Pending Human Input":
            time.sleep(0.01)
        body = {"execution_id": kickoff_id, "task_id": "one", "human_feedback": "", "is_approve": True}
        try:
            assert call("POST", "/resume", json=body, timeout=0.3).status_code == 500
        except httpx.TransportError:
            assert name != "500"
        # Only where the first one was not accepted is there still something to answer.
        assert call("POST", "/resume", json=body).status_code == (200 if phase == "before" else 400)


def test_faults_of_the_script_and_its_seed() -> None:
    script = f"{QUICK}\nfaults: ['inputs:500%0.5']\nseed: 3"
    answers: list[list[int]] = []
    for seed in (None, 3, 4):
        with InProcessCrewServer(script, seed=seed) as server:
            call = Caller(server)
            answers.append([call("GET", "/inputs").status_code for _ in range(20)])
    assert answers[0] == answers[1] != answers[2]
    assert {200, 500} == set(answers[0])


def test_a_hanging_request_does_not_hold_up_the_end() -> None:
    with CrewServer(QUICK, faults=["inputs:timeout"]) as server:
        call = Caller(server)
        with pytest.raises(httpx.ReadTimeout):
            call("GET", "/inputs", timeout=0.1)

        async def hang() -> float:
            waiting = asyncio.create_task(call.send("GET", "/inputs", timeout=30))
            await asyncio.sleep(0.1)
            began = time.monotonic()
            await asyncio.to_thread(server.stop)
            with pytest.raises(httpx.RemoteProtocolError):
                await waiting
            return time.monotonic() - began

        assert asyncio.run(hang()) < 1.9  # uvicorn's patience with it would be 2 s


def test_a_reset_run_goes_on(client_of: ClientOf, finished: Finished) -> None:
    with CrewServer(QUICK, faults=["kickoff:reset-after-accept"]) as server:
        client = client_of(server)
        with pytest.raises(httpx.ReadError):
            client.post("/kickoff", json=KICKOFF)
        assert finished(client, server.runs[0].id)["status"] == "completed"


async def test_connection_faults_need_our_server() -> None:
    app = create_app(load_program("echo"), token="t", faults=["inputs:drop"])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        with pytest.raises(RuntimeError, match="need this package's own server"):
            await client.get("/inputs", headers={"Authorization": "Bearer t"})
