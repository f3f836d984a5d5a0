"""The published contract, call by call, over a real port and with a client that knows nothing of this package."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import httpx
import pytest

from prefect_crew.devserver import CrewServer
from support.servers import ClientOf, Finished

INPUTS = {
    "budget": "1000 USD",
    "interests": "games, tech, ai, relaxing hikes, amazing food",
    "duration": "7 days",
    "age": "35",
}
REVIEWED = """
name: reviewed
inputs: [topic]
tasks:
  - {name: research_task, agent: Researcher, output: "facts on {{ topic }}", human: true}
  - {name: write_task, agent: Writer, output: "a text: {{ previous }}"}
"""
SLOW = """
name: slow
tasks:
  - {name: research_task, seconds: 1200, output: x}
  - {name: second, output: y}
  - {name: third, output: z}
"""


FLOW = """
name: flow
flow: true
inputs: [topic, {name: tone, required: false, default: dry}]
tasks:
  - {name: write, output: "{{ topic }}, {{ tone }}"}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[CrewServer]:
    with CrewServer({"travel": "travel", "reviewed": REVIEWED, "slow": SLOW, "flow": FLOW}, speed=20) as running:
        yield running


@pytest.fixture
def flow(server: CrewServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/flow", headers=server.headers) as client:
        yield client


@pytest.fixture
def travel(server: CrewServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/travel", headers=server.headers) as client:
        yield client


@pytest.fixture
def reviewed(server: CrewServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/reviewed", headers=server.headers) as client:
        yield client


@pytest.fixture
def slow(server: CrewServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/slow", headers=server.headers) as client:
        yield client


def test_inputs(travel: httpx.Client) -> None:
    answer = travel.get("/inputs")
    assert answer.status_code == 200
    names = ["budget", "interests", "duration", "age"]
    assert answer.json() == {"inputs": names, "required_inputs": names}


def test_optional_inputs_are_not_among_the_required_ones(flow: httpx.Client) -> None:
    assert flow.get("/inputs").json() == {"inputs": ["topic", "tone"], "required_inputs": ["topic"]}
    assert flow.post("/kickoff", json={"inputs": {"topic": "tea"}}).status_code == 200


STATE = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param({"inputs": {"topic": "tea", "id": "42"}}, "'inputs.id' must be a valid UUID", id="id"),
        pytest.param({"inputs": {"topic": "tea", "id": 42}}, "'inputs.id' must be a valid UUID", id="number"),
        pytest.param(
            {"inputs": {"topic": "tea"}, "restoreFromStateId": "42"},
            "'restoreFromStateId' must be a valid UUID",
            id="restore",
        ),
    ],
)
def test_a_state_that_is_no_uuid_is_refused_without_details(
    flow: httpx.Client, body: dict[str, object], said: str
) -> None:
    answer = flow.post("/kickoff", json=body)
    assert answer.status_code == 422
    assert answer.json().keys() == {"error", "message"}
    assert answer.json()["message"].startswith(said)


def test_a_flow_takes_the_id_of_its_state_and_a_state_to_restore(flow: httpx.Client, server: CrewServer) -> None:
    body = {"inputs": {"topic": "tea", "id": STATE}, "restoreFromStateId": STATE}
    kickoff_id = flow.post("/kickoff", json=body).json()["kickoff_id"]
    run = server.run(kickoff_id)
    assert (run.inputs["id"], run.restore_from) == (STATE, STATE)


def test_a_crew_may_have_an_input_called_id(travel: httpx.Client) -> None:
    assert travel.post("/kickoff", json={"inputs": {**INPUTS, "id": "42"}}).status_code == 200


def test_kickoff_answers_with_an_id_and_nothing_else(travel: httpx.Client) -> None:
    answer = travel.post("/kickoff", json={"inputs": INPUTS, "meta": {"requestId": "travel-req-123"}})
    assert answer.status_code == 200
    assert list(answer.json()) == ["kickoff_id"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", answer.json()["kickoff_id"])


def test_running_body(slow: httpx.Client) -> None:
    kickoff_id = slow.post("/kickoff", json={"inputs": {}}).json()["kickoff_id"]
    time.sleep(0.05)
    assert slow.get(f"/status/{kickoff_id}").json() == {
        "status": "running",
        "current_task": "research_task",
        "progress": {"completed_tasks": 0, "total_tasks": 3},
    }


def test_completed_body(travel: httpx.Client, finished: Finished) -> None:
    kickoff_id = travel.post("/kickoff", json={"inputs": INPUTS}).json()["kickoff_id"]
    body = finished(travel, kickoff_id)
    assert set(body) == {"status", "result", "execution_time"}
    assert body["status"] == "completed"
    assert 0 < body["execution_time"] < 10
    assert set(body["result"]) == {"output", "tasks"}
    assert "1,000 USD" in body["result"]["output"]
    assert [task["task_id"] for task in body["result"]["tasks"]] == [
        "research_destination",
        "plan_itinerary",
        "write_guide",
    ]
    for task in body["result"]["tasks"]:
        assert set(task) == {"task_id", "output", "agent", "execution_time"}
        assert task["output"]
        assert task["execution_time"] > 0


def test_failed_body(client_of: ClientOf, finished: Finished) -> None:
    with CrewServer("name: f\ntasks: [{name: t, fail: 'Task execution failed: {{ 1 + 1 }} tools are down'}]") as server:
        client = client_of(server)
        body = finished(client, client.post("/kickoff", json={"inputs": {}}).json()["kickoff_id"])
    assert body.pop("execution_time") >= 0
    assert body == {"status": "error", "error": "Task execution failed: 2 tools are down"}


@pytest.mark.parametrize("path", ["/status/{}", "/{}/status"])
def test_unknown_run(travel: httpx.Client, path: str) -> None:
    answer = travel.get(path.format("abcd1234-5678-90ef-ghij-klmnopqrstuv"))
    assert answer.status_code == 404
    assert answer.json()["error"] == "Execution not found"
    assert set(answer.json()) == {"error", "message"}


@pytest.mark.parametrize("path", ["/status/{}", "/{}/status"])
def test_both_status_paths(travel: httpx.Client, path: str) -> None:
    kickoff_id = travel.post("/kickoff", json={"inputs": INPUTS}).json()["kickoff_id"]
    assert travel.get(path.format(kickoff_id)).json()["status"] == "running"


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        pytest.param({"budget": "1", "interests": "x"}, ["duration", "age"], id="two-left-out"),
        pytest.param(INPUTS | {"age": None}, ["age"], id="null"),
        pytest.param({}, ["budget", "interests", "duration", "age"], id="none-given"),
    ],
)
def test_missing_inputs(travel: httpx.Client, server: CrewServer, given: dict[str, str], missing: list[str]) -> None:
    before = server.kickoffs
    answer = travel.post("/kickoff", json={"inputs": given})
    assert answer.status_code == 422
    assert set(answer.json()) == {"error", "message", "details"}
    assert answer.json()["details"] == {"missing_inputs": missing}
    assert server.kickoffs == before


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="cut-off"),
        pytest.param(b"[" * 100_000, id="nested-too-deep"),
        pytest.param(b"\xff\xfe", id="not-text"),
        pytest.param(b"[]", id="a-list"),
        pytest.param(b"{}", id="no-inputs"),
        pytest.param(b'{"inputs": ["budget"]}', id="inputs-as-list"),
        pytest.param(b'{"inputs": null}', id="inputs-null"),
        pytest.param(b'{"inputs": {}, "taskWebhookUrl": "ftp://x"}', id="webhook-not-http"),
        pytest.param(b'{"inputs": {}, "crewWebhookUrl": ""}', id="webhook-empty"),
        pytest.param(b'{"inputs": {}, "humanInputWebhook": {"url": ""}}', id="human-webhook-empty"),
        pytest.param(b'{"inputs": {}, "webhooks": {"url": "", "events": ["task_started"]}}', id="stream-empty"),
        pytest.param(b'{"inputs": {}, "humanInputWebhook": ""}', id="human-webhook-text"),
        pytest.param(b'{"inputs": {}, "humanInputWebhook": {"authentication": {}}}', id="webhook-without-url"),
        pytest.param(
            b'{"inputs": {}, "humanInputWebhook": {"url": "http://x", "authentication": {"strategy": "bearer"}}}',
            id="webhook-without-token",
        ),
    ],
)
def test_bad_kickoff(travel: httpx.Client, content: bytes) -> None:
    answer = travel.post("/kickoff", content=content)
    assert answer.status_code == 400
    assert set(answer.json()) == {"error", "message"}


def test_a_body_too_large_is_refused(travel: httpx.Client) -> None:
    answer = travel.post("/kickoff", content=b'{"inputs": {"budget": "' + b"x" * 17_000_000 + b'"}}')
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(None, id="missing"),
        pytest.param("Bearer wrong", id="wrong"),
        pytest.param("Bearer", id="empty"),
        pytest.param("Basic {token}", id="another-scheme"),
        pytest.param("{token}", id="no-scheme"),
        pytest.param("Bearer {token}x", id="longer"),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/inputs"),
        ("POST", "/kickoff"),
        ("GET", "/status/x"),
        ("POST", "/resume"),
        ("POST", "/stop/x"),
        ("GET", "/nothing"),
    ],
)
def test_401_comes_before_anything_else(server: CrewServer, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.format(token=server.token)}
    answer = httpx.request(method, f"{server.url}/travel{path}", headers=headers)
    assert answer.status_code == 401
    assert set(answer.json()) == {"error", "message"}
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_health_needs_no_token(server: CrewServer) -> None:
    with CrewServer("echo") as alone:
        urls = [alone.url, f"{alone.url}/", server.url, f"{server.url}/travel", f"{server.url}/travel/"]
        answers = [httpx.get(url) for url in urls]
    assert [(answer.status_code, answer.text) for answer in answers] == [(200, "Healthy")] * len(urls)


def test_only_what_is_there_is_open(server: CrewServer) -> None:
    assert [httpx.get(f"{server.url}{path}").status_code for path in ("/nothing", "/nothing/", "/travel//")] == [
        401
    ] * 3


def test_what_is_not_there(travel: httpx.Client) -> None:
    assert travel.get("/nothing").status_code == 404
    assert travel.get("/kickoff").status_code == 405
    assert travel.post("/inputs").status_code == 405


def test_resume(reviewed: httpx.Client, finished: Finished) -> None:
    kickoff_id = reviewed.post("/kickoff", json={"inputs": {"topic": "ants"}}).json()["kickoff_id"]
    waiting = finished(reviewed, kickoff_id)
    assert waiting["status"] == "Pending Human Input"
    assert waiting["current_task"] == "research_task"

    answer = {"execution_id": kickoff_id, "task_id": "research_task", "human_feedback": "Great", "is_approve": True}
    first = reviewed.post("/resume", json=answer)
    assert first.status_code == 200
    assert first.json()["status"] == "resumed"
    assert set(first.json()) == {"status", "message"}

    again = reviewed.post("/resume", json=answer)
    assert again.status_code == 400
    assert finished(reviewed, kickoff_id)["result"]["output"] == "a text: facts on ants"
    assert reviewed.post("/resume", json=answer).status_code == 400


def test_a_rejected_task_comes_back(reviewed: httpx.Client, finished: Finished) -> None:
    kickoff_id = reviewed.post("/kickoff", json={"inputs": {"topic": "ants"}}).json()["kickoff_id"]
    answer = {"execution_id": kickoff_id, "task_id": "research_task", "human_feedback": "More", "is_approve": False}
    finished(reviewed, kickoff_id)
    assert reviewed.post("/resume", json=answer).json()["status"] == "retrying"
    assert finished(reviewed, kickoff_id)["status"] == "Pending Human Input"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param({"execution_id": "nobody"}, 404, id="unknown-run"),
        pytest.param({"execution_id": None}, 400, id="no-run"),
        pytest.param({"task_id": None}, 400, id="no-task"),
        pytest.param({"human_feedback": None}, 400, id="no-feedback"),
        pytest.param({"task_id": "another"}, 400, id="another-task"),
        pytest.param({"is_approve": "yes"}, 400, id="approval-not-a-boolean"),
        pytest.param({"human_feedback": {}}, 400, id="feedback-not-a-text"),
        pytest.param({"crewWebhookUrl": "nowhere"}, 400, id="webhook-not-a-url"),
    ],
)
def test_bad_resume(reviewed: httpx.Client, finished: Finished, change: dict[str, object], code: int) -> None:
    kickoff_id = reviewed.post("/kickoff", json={"inputs": {"topic": "ants"}}).json()["kickoff_id"]
    finished(reviewed, kickoff_id)
    answer = {"execution_id": kickoff_id, "task_id": "research_task", "human_feedback": "", "is_approve": True}
    assert reviewed.post("/resume", json=answer | change).status_code == code
    assert reviewed.post("/resume", json=answer).status_code == 200


def test_stop(slow: httpx.Client) -> None:
    kickoff_id = slow.post("/kickoff", json={"inputs": {}}).json()["kickoff_id"]
    answer = slow.post(f"/stop/{kickoff_id}")
    assert (answer.status_code, answer.json()) == (200, {"status": "stopped", "kickoffId": kickoff_id})
    assert slow.get(f"/status/{kickoff_id}").json()["status"] == "stopped"
    again = slow.post(f"/stop/{kickoff_id}")
    assert (again.status_code, again.json()) == (400, {"detail": "Cannot stop execution. Current state: REVOKED"})


def test_stop_comes_too_late(travel: httpx.Client, finished: Finished) -> None:
    kickoff_id = travel.post("/kickoff", json={"inputs": INPUTS}).json()["kickoff_id"]
    finished(travel, kickoff_id)
    answer = travel.post(f"/stop/{kickoff_id}")
    assert (answer.status_code, answer.json()) == (400, {"detail": "Cannot stop execution. Current state: SUCCESS"})
    assert travel.get(f"/status/{kickoff_id}").json()["status"] == "completed"


def test_stop_of_an_unknown_run(slow: httpx.Client) -> None:
    assert slow.post("/stop/nobody").status_code == 404


def test_the_guides_own_sample(travel: httpx.Client) -> None:
    """The API guide's Python sample reads `status`, and the output in `result`; written here in its manner."""
    response = travel.post("/kickoff", json={"inputs": INPUTS})
    kickoff_id = response.json()["kickoff_id"]
    output = None
    for _ in range(1000):
        data = travel.get(f"/status/{kickoff_id}").json()
        if data["status"] == "completed":
            output = data["result"]["output"]
            break
        if data["status"] == "error":
            raise AssertionError(data["error"])
        time.sleep(0.01)
    assert output is not None
    assert output.startswith("# Kyoto, Japan: 7 days")
