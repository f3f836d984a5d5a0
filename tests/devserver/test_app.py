"""The published contract, call by call, with a client that knows nothing of this package; and the response formats."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import StopOutcome
from prefect_crew.devserver import CrewServer
from prefect_crew.states import CrewState
from support.servers import Serve, finished, kickoff
from support.waiting import until

INPUTS = {"budget": "1000 USD", "interests": "games, tech, relaxing hikes", "duration": "7 days", "age": "35"}
REVIEWED = """
name: reviewed
inputs: [topic]
tasks:
  - {name: research_task, agent: Researcher, output: "facts on {{ topic }}", human: true}
  - {name: write_task, agent: Writer, output: "a text: {{ previous }}"}
"""
FLOW = """
name: flow
flow: true
inputs: [topic, {name: tone, required: false, default: dry}]
tasks:
  - {name: write, output: "{{ topic }}, {{ tone }}"}
"""
CREWS = {"travel": "travel", "reviewed": REVIEWED, "flow": FLOW}
STATE = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"


@pytest.fixture(scope="module")
def server(serve_for_module: Serve) -> CrewServer:
    return serve_for_module(CREWS, speed=20)[0]


def client_fixture(name: str) -> Any:
    @pytest.fixture(scope="module", name=name)
    def client(server: CrewServer) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=f"{server.url}/{name}", headers=server.headers, trust_env=False) as opened:
            yield opened

    return client


travel, reviewed, flow = (client_fixture(name) for name in CREWS)


def test_inputs(travel: httpx.Client, flow: httpx.Client) -> None:
    assert travel.get("/inputs").json() == {"inputs": list(INPUTS), "required_inputs": list(INPUTS)}
    assert flow.get("/inputs").json() == {"inputs": ["topic", "tone"], "required_inputs": ["topic"]}
    assert kickoff(flow, {"topic": "tea"})


def test_inspect_answers_with_the_definition(travel: httpx.Client, server: CrewServer) -> None:
    definition = travel.get("/inspect").json()
    assert definition["name"] == server.crews["travel"].program.name
    assert [task["name"] for task in definition["tasks"]]
    assert travel.get("/inspect", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_kickoff_answers_with_an_id_only(travel: httpx.Client) -> None:
    answer = travel.post("/kickoff", json={"inputs": INPUTS | {"id": "42"}, "meta": {"requestId": "travel-req-123"}})
    assert answer.status_code == 200
    assert re.fullmatch(r'\{"kickoff_id":"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"\}', answer.text), "no blanks"


def test_a_flow_takes_ids_of_states(flow: httpx.Client, server: CrewServer) -> None:
    run = server.run(kickoff(flow, {"topic": "tea", "id": STATE}, restoreFromStateId=STATE))
    assert run.inputs["id"] == STATE
    assert run.restore_from == STATE
    for more, named in (({"id": "42"}, "inputs.id"), ({"id": 42}, "inputs.id"), ({}, "restoreFromStateId")):
        answer = flow.post("/kickoff", json={"inputs": {"topic": "tea", **more}, "restoreFromStateId": "42"})
        assert answer.status_code == 422
        assert answer.json().keys() == {"error", "message"}
        assert answer.json()["message"] == f"'{named}' must be a valid UUID."


def test_missing_inputs(travel: httpx.Client) -> None:
    answer = travel.post("/kickoff", json={"inputs": {"budget": "1", "interests": "x", "age": None}})
    assert answer.status_code == 422
    assert answer.json().keys() == {"error", "message", "details"}
    assert answer.json()["details"] == {"missing_inputs": ["duration", "age"]}


def test_stop(reviewed: httpx.Client) -> None:
    kickoff_id = kickoff(reviewed, {"topic": "ants"})
    assert finished(reviewed, kickoff_id) == reviewed.get(f"/{kickoff_id}/status").json()
    answer = reviewed.post(f"/stop/{kickoff_id}")
    assert answer.status_code == 200
    assert answer.json() == {"status": "stopped", "kickoffId": kickoff_id}
    again = reviewed.post(f"/stop/{kickoff_id}")
    assert again.status_code == 400
    assert again.json() == {"detail": "Cannot stop execution. Current state: REVOKED"}


def test_what_is_not_there(travel: httpx.Client, reviewed: httpx.Client) -> None:
    for call in ("GET /status/nobody", "GET /nobody/status", "POST /stop/nobody"):
        answer = travel.request(*call.split())
        assert answer.status_code == 404
        assert set(answer.json()) == {"error", "message"}
        assert answer.json()["error"] == "Execution not found"
    of_another_crew = kickoff(reviewed, {"topic": "ants"})
    assert travel.get(f"/status/{of_another_crew}").status_code == 404
    answers = [travel.request(*call.split()) for call in ("GET /nothing", "GET /kickoff", "POST /inputs")]
    assert [answer.status_code for answer in answers] == [404, 405, 405]
    assert [set(answer.headers.get("allow", "").split(", ")) for answer in answers] == [{""}, {"POST"}, {"GET", "HEAD"}]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[]", b"{}", b'{"inputs": ["budget"]}'),
        b'{"inputs": {}, "taskWebhookUrl": "ftp://x"}',
        b'{"inputs": {}, "webhooks": {"url": "", "events": ["task_started"]}}',
        b'{"inputs": {}, "humanInputWebhook": {"url": "http://x", "authentication": {"strategy": "bearer"}}}',
    ],
    ids=lambda content: content[:90].decode(errors="replace"),
)
def test_bad_kickoff(travel: httpx.Client, content: bytes) -> None:
    answer = travel.post("/kickoff", content=content)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error", "message"}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic {token}", "Bearer {token}x", "Bearer \xe9"])
def test_401_comes_before_anything_else(server: CrewServer, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.format(token=server.token).encode("latin-1")}
    for call in ("GET /inputs", "POST /kickoff", "GET /status/x", "POST /resume", "POST /stop/x", "GET /nothing"):
        method, path = call.split()
        answer = httpx.request(method, f"{server.url}/travel{path}", headers=headers)
        assert answer.status_code == 401
        assert set(answer.json()) == {"error", "message"}
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_only_the_health_pages_need_no_token(server: CrewServer, serve: Serve) -> None:
    alone, _ = serve("echo")
    urls = [alone.url, f"{alone.url}/", server.url, f"{server.url}/travel", f"{server.url}/travel/"]
    assert [httpx.get(url).text for url in urls] == ["Healthy"] * len(urls)
    closed = [f"{server.url}{path}" for path in ("/nothing", "/nothing/", "/travel//")]
    assert [httpx.get(url).status_code for url in closed] == [401] * 3


REFUSED: list[tuple[dict[str, Any], int]] = [
    ({"execution_id": "nobody"}, 404),
    ({"execution_id": None}, 400),
    ({"task_id": "another"}, 400),
    ({"is_approve": "yes"}, 400),
    ({"human_feedback": {}}, 400),
    ({"crewWebhookUrl": "nowhere"}, 400),
]


def test_resume(reviewed: httpx.Client) -> None:
    kickoff_id = kickoff(reviewed, {"topic": "ants"})
    body = {"execution_id": kickoff_id, "task_id": "research_task", "human_feedback": "Great", "is_approve": True}
    for approve, word in ((False, "retrying"), (True, "resumed")):
        assert finished(reviewed, kickoff_id)["current_task"] == "research_task"
        for change, code in REFUSED:
            assert reviewed.post("/resume", json=body | change).status_code == code, change
        answer = reviewed.post("/resume", json=body | {"is_approve": approve})
        assert answer.status_code == 200
        assert set(answer.json()) == {"status", "message"}
        assert answer.json()["status"] == word
    assert reviewed.post("/resume", json=body).status_code == 400
    assert finished(reviewed, kickoff_id)["result"]["output"] == "a text: facts on ants"
    assert reviewed.post("/resume", json=body).status_code == 400


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"response_format": "x"}, "Formats: documented, union, live"),
        ({"speed": 0}, "speed must be above 0"),
        ({"max_runs": 0}, "max_runs, the number of runs at once, must be above 0"),
        ({"max_runs": -1}, "max_runs, the number of runs at once, must be above 0"),
        ({"faults": ["kickoff:explode"]}, "'kickoff' has no fault 'explode'"),
        ({"spec": "nowhere.yaml"}, r"Cannot read the crew nowhere.yaml.*echo, travel"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CrewServer(**{"spec": "echo"} | options)


# What each response format says of each state, and that our own client reads all of it

SCRIPT = """
name: speaking
inputs: [kind, {name: tone, required: false, type: text, description: How it sounds., default: dry}]
tasks:
  - {name: one, agent: A, description: the first, output: "out: 1"}
  - {name: two, agent: B, seconds: "{{ 60 if kind == 'slow' else 0 }}", output: two, data: {n: 1}, human: true}
  - {name: three, agent: C, output: "three", fail: "{% if kind == 'bad' %}it broke{% endif %}"}
data: {answer: "42"}
usage: {total_tokens: 5}
"""
STATES = {
    "slow": CrewState.RUNNING,
    "waiting": CrewState.WAITING,
    "good": CrewState.COMPLETED,
    "bad": CrewState.FAILED,
    "stop": CrewState.STOPPED,
}
AT_TWO = {"current_task": "two", "progress": {"completed_tasks": 1, "total_tasks": 3}}
TOOK = {"execution_time": "seconds"}
RESULT = {
    "output": "three",
    "tasks": [
        {"task_id": "one", "output": "out: 1", "agent": "A", **TOOK},
        {"task_id": "two", "output": "two", "agent": "B", **TOOK},
        {"task_id": "three", "output": "three", "agent": "C", **TOOK},
    ],
}
ONE = {"name": "one", "agent": "A", "description": "the first", "output": "out: 1"}
THREE = {"name": "three", "agent": "C", "description": None, "output": "three"}
MORE = {"result_json": {"answer": "42"}, "token_usage": {"total_tokens": 5}}
BODIES: dict[str, dict[str, dict[str, Any]]] = {
    "documented": {
        "slow": {"status": "running", **AT_TWO},
        "waiting": {"status": "Pending Human Input", **AT_TWO},
        "good": {"status": "completed", "result": RESULT, **TOOK},
        "bad": {"status": "error", "error": "it broke", **TOOK},
        "stop": {"status": "stopped", **TOOK},
    },
    "live": {
        "slow": {"state": "STARTED", "last_executed_task": ONE},
        "waiting": {"state": "PENDING_HUMAN_INPUT", "last_executed_task": ONE},
        "good": {"state": "SUCCESS", "result": "three", "result_json": {"answer": "42"}, "last_executed_task": THREE},
        "bad": {"state": "FAILED", "status": "it broke", "result": None},
        "stop": {"state": "REVOKED", "last_executed_task": ONE},
    },
    "union": {
        "slow": {"state": "STARTED", "status": "running", "last_executed_task": ONE, **AT_TWO},
        "waiting": {"state": "PENDING_HUMAN_INPUT", "task_id": "two", "task_output": "two", **AT_TWO},
        "good": {"state": "SUCCESS", "status": "completed", "result": "three", "output": "three", **MORE},
        "bad": {"state": "FAILED", "status": "error", "result": "it broke", "error": "it broke", **TOOK},
        "stop": {"state": "REVOKED", "status": "stopped", "error": None, **TOOK},
    },
}
"""Of "union", the parts that strict clients look for. tests/devserver/test_crewai.py has the rest of it."""


def timed(body: Any) -> Any:
    """Return a body with a word for each time that is one."""
    if isinstance(body, list):
        return [timed(item) for item in body]
    if not isinstance(body, dict):
        return body
    times = TOOK if body.get("execution_time", -1) >= 0 else {}
    return {name: timed(value) for name, value in body.items()} | times


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("response_format", BODIES)
async def test_our_client_reads_every_state(serve: Serve, response_format: str, kind: str) -> None:
    server, _ = serve(SCRIPT, response_format=response_format)
    before = CrewState.RUNNING if kind == "slow" else CrewState.WAITING
    async with CrewClient(server.url, server.token) as client:
        run = server.run(await client.kickoff({"kind": kind}))
        await until(lambda: run.state is before and len(run.tasks) == 1)
        if kind in ("good", "bad"):
            await client.resume(run.id, "two", "", True)
        if kind == "stop":
            await client.stop(run.id)
        await until(lambda: run.state is STATES[kind])
        status = await client.status(run.id)
    body, expected = timed(status.raw), BODIES[response_format][kind]
    assert body == (body | expected if response_format == "union" else expected)
    assert status.state == STATES[kind]
    assert status.known_state is True
    assert status.output == ("three" if kind == "good" else None)
    assert status.error == ("it broke" if kind == "bad" else None)
    assert status.human_task_id == ("two" if (kind, response_format) == ("waiting", "union") else None)


@pytest.mark.parametrize("response_format", BODIES)
async def test_our_client_reads_inputs_and_refusals(serve: Serve, response_format: str) -> None:
    server, _ = serve("echo", response_format=response_format)
    async with CrewClient(server.url, server.token) as client:
        ended = server.run(await client.kickoff({"text": "a"}))
        await until(lambda: ended.state is CrewState.COMPLETED)
        inputs = await client.inputs()
        unknown, nobody, late = await client.status("nobody"), await client.stop("nobody"), await client.stop(ended.id)
    assert unknown.state is CrewState.UNKNOWN
    assert nobody.outcome is StopOutcome.UNKNOWN_RUN
    assert late.outcome == StopOutcome.NOT_STOPPABLE
    assert late.state == CrewState.COMPLETED
    assert [(item.name, item.required) for item in inputs] == [("text", True)]


def test_live_inputs_and_refusals(serve: Serve) -> None:
    _, client = serve(SCRIPT, response_format="live")
    tone = {"type": "text", "description": "How it sounds.", "default": "dry"}
    kind, *others = client.get("/inputs").json()["inputs"]
    assert kind["name"] == "kind"
    assert others == [{"name": "tone", "required": False, **tone}]
    refused = client.post("/kickoff", json={"inputs": {}})
    assert refused.json() == {"detail": "Missing required inputs: kind", "missing_inputs": ["kind"]}


async def test_a_queue_is_pending(serve: Serve) -> None:
    server, _ = serve("name: q\ntasks: [{name: t, seconds: 60}]", response_format="union", max_runs=1)
    async with CrewClient(server.url, server.token) as client:
        first, second = await client.kickoff({}), await client.kickoff({})
        await until(lambda: server.run(first).state is CrewState.RUNNING)
        assert (await client.status(second)).state is CrewState.PENDING
        await client.stop(first)
        await until(lambda: server.run(second).state is CrewState.RUNNING)
