"""Both response formats, call by call, with a client that knows nothing of this package."""

import re
import uuid
from typing import Any

import httpx
import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import StopOutcome
from prefect_crew.states import CrewState
from support.receiver import Receiver
from support.servers import Serve, finished, kickoff
from support.waiting import until

INPUTS = {"budget": "1000 USD", "interests": "games, tech, relaxing hikes", "duration": "7 days", "age": "35"}
REVIEWED = """
name: reviewed
inputs: [topic]
tasks:
  - {name: research_task, agent: Researcher, output: "facts on {{ topic }} {{ round }}", human: true}
  - name: write_task
    agent: Writer
    output: "a text: {{ previous }}"
    fail: "{% if topic == 'bad' %}'NoneType' object is not subscriptable{% endif %}"
"""
FLOW = """
name: flow
flow: true
inputs: [topic, {name: tone, required: false, default: dry}]
tasks:
  - {name: write, output: "{{ state.turn }} {{ topic }}, {{ tone }}"}
"""
CREWS = {"travel": "travel", "reviewed": REVIEWED, "flow": FLOW}
STATE = "3f2b8c1e-9d47-4a6b-8f0e-5c1d2a7b9e64"
NOT_FOUND = {
    "state": "NOT FOUND",
    "status": "Task not found or Invalid kickoff id",
    **dict.fromkeys(("result", "result_json", "usage_metrics", "progress", "last_step", "last_executed_task")),
}
"""The live status of an unknown run, and of one that waits for a person."""


def client_of(name: str, response_format: str) -> Any:
    @pytest.fixture(scope="module", name=f"{'live_' if response_format == 'live' else ''}{name}")
    def client(serve_for_module: Serve) -> httpx.Client:
        return serve_for_module(CREWS[name], speed=20, response_format=response_format)[1]

    return client


travel, reviewed, flow = (client_of(name, "documented") for name in CREWS)
live_travel, live_reviewed, live_flow = (client_of(name, "live") for name in CREWS)

# The published contract


def test_inputs(travel: httpx.Client, flow: httpx.Client) -> None:
    assert travel.get("/inputs").json() == {"inputs": list(INPUTS), "required_inputs": list(INPUTS)}
    assert flow.get("/inputs").json() == {"inputs": ["topic", "tone"], "required_inputs": ["topic"]}
    assert kickoff(flow, {"topic": "tea"})


def test_inspect_answers_with_the_definition(travel: httpx.Client) -> None:
    definition = travel.get("/inspect").json()
    assert definition["name"] == "travel"
    assert [task["name"] for task in definition["tasks"]]
    assert travel.get("/inspect", headers={"Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize("response_format", ["documented", "live"])
def test_kickoff_answers_with_an_id_only(request: pytest.FixtureRequest, response_format: str) -> None:
    travel: httpx.Client = request.getfixturevalue("live_travel" if response_format == "live" else "travel")
    answer = travel.post("/kickoff", json={"inputs": INPUTS | {"id": "42"}, "meta": {"requestId": "travel-req-123"}})
    assert answer.status_code == 200
    assert re.fullmatch(r'\{"kickoff_id":"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"\}', answer.text), "no blanks"


def test_a_flow_takes_ids_of_states(flow: httpx.Client) -> None:
    first = kickoff(flow, {"topic": "tea", "id": STATE})
    assert finished(flow, first)["result"]["output"] == "1 tea, dry"
    second = kickoff(flow, {"topic": "tea"}, restoreFromStateId=STATE)
    assert finished(flow, second)["result"]["output"] == "2 tea, dry"
    third = kickoff(flow, {"topic": "tea"}, restoreFromStateId=second)
    assert finished(flow, third)["result"]["output"] == "3 tea, dry", "the id of a state is the kickoff id"
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


def test_what_is_not_there(travel: httpx.Client) -> None:
    for call in ("GET /status/nobody", "GET /nobody/status", "POST /stop/nobody"):
        answer = travel.request(*call.split())
        assert answer.status_code == 404
        assert set(answer.json()) == {"error", "message"}
        assert answer.json()["error"] == "Execution not found"
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
def test_401_comes_before_anything_else(travel: httpx.Client, header: str | None) -> None:
    token = travel.headers["Authorization"].removeprefix("Bearer ")
    headers = {} if header is None else {"Authorization": header.format(token=token).encode("latin-1")}
    for call in ("GET /inputs", "POST /kickoff", "GET /status/x", "POST /resume", "POST /stop/x", "GET /nothing"):
        method, path = call.split()
        answer = httpx.request(method, f"{travel.base_url}{path}", headers=headers)
        assert answer.status_code == 401
        assert set(answer.json()) == {"error", "message"}
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_only_the_health_page_needs_no_token(travel: httpx.Client) -> None:
    url = str(travel.base_url).rstrip("/")
    assert [httpx.get(page).text for page in (url, f"{url}/")] == ["Healthy"] * 2
    assert [httpx.get(f"{url}{path}").status_code for path in ("/nothing", "/nothing/", "//")] == [401] * 3


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
    body |= {"executionId": "of another API", "taskId": "of another API"}
    for round_, (approve, word) in enumerate(((False, "retrying"), (True, "resumed")), 1):
        waiting = finished(reviewed, kickoff_id)
        assert waiting["current_task"] == "research_task", "so that it can be answered without a webhook"
        assert waiting["task_output"] == f"facts on ants {round_}"
        for change, code in REFUSED:
            assert reviewed.post("/resume", json=body | change).status_code == code, change
        answer = reviewed.post("/resume", json=body | {"is_approve": approve})
        assert answer.status_code == 200
        assert set(answer.json()) == {"status", "message"}
        assert answer.json()["status"] == word
    assert reviewed.post("/resume", json=body).status_code == 400
    assert finished(reviewed, kickoff_id)["result"]["output"] == "a text: facts on ants 2"
    assert reviewed.post("/resume", json=body).status_code == 400


# As crews on AMP answered in October 2026


def test_live_inputs(live_travel: httpx.Client, live_flow: httpx.Client) -> None:
    assert live_travel.get("/inputs").json() == {"inputs": list(INPUTS)}
    assert live_flow.get("/inputs").json() == {"inputs": ["topic", "tone"]}


@pytest.mark.parametrize("body", [{}, {"inputs": {}}, {"inputs": {"topic": None}}], ids=str)
def test_live_missing_inputs(live_reviewed: httpx.Client, live_flow: httpx.Client, body: dict[str, Any]) -> None:
    answer = live_reviewed.post("/kickoff", json=body)
    assert answer.status_code == 422
    assert answer.json() == {"detail": "Missing inputs: topic"}
    started = live_flow.post("/kickoff", json=body)
    assert started.status_code == 200, "a Flow runs on its defaults"
    assert finished(live_flow, started.json()["kickoff_id"])["result"].endswith(", dry")


def test_live_bodies_that_cannot_be_read(live_travel: httpx.Client) -> None:
    answers = [live_travel.post("/kickoff", content=content) for content in (b"", b"{", b'{"inputs": ["budget"]}')]
    assert [answer.status_code for answer in answers] == [500, 500, 422]
    assert answers[0].text == "Internal Server Error"
    assert answers[2].json()["detail"][0]["loc"] == ["body", "inputs"]


def test_live_errors(live_travel: httpx.Client) -> None:
    for path in ("/", "/nothing"):
        answer = live_travel.get(path)
        assert answer.status_code == 404
        assert answer.json() == {"detail": "Not Found"}
    url = f"{live_travel.base_url}/inputs"
    answers = [httpx.get(url, headers=headers) for headers in ({}, {"Authorization": "Bearer wrong"})]
    assert [answer.status_code for answer in answers] == [401, 401]
    said = [answer.json()["detail"] for answer in answers]
    assert said == ["Not authenticated", "Invalid or missing authentication credentials"]
    for unknown in ("nobody", STATE, "%20"):
        answer = live_travel.get(f"/status/{unknown}")
        assert answer.status_code == 200
        assert answer.json() == NOT_FOUND


def test_a_live_crew_gets_text_and_a_live_flow_json(serve: Serve) -> None:
    server, crew = serve(
        "name: c\ninputs: [n]\ntasks: [{name: t, output: '{{ n is string }}'}]", response_format="live"
    )
    assert finished(crew, kickoff(crew, {"n": 3}))["result"] == "True"
    assert server.runs[0].inputs == {"n": "3"}
    server, flow = serve("name: f\nflow: true\ntasks: [{name: t}]", response_format="live")
    kickoff(flow, {"n": [3]})
    assert server.runs[0].inputs == {"n": [3]}


def test_a_live_flow_that_asks_is_paused(serve: Serve) -> None:
    _, flow = serve("name: f\nflow: true\ntasks: [{name: t, human: true, output: x}]", response_format="live")
    status = finished(flow, kickoff(flow))
    assert (status["state"], status["result"], status["progress"]["current"]) == ("PAUSED", None, "t")


def test_live_states_are_kept_under_kickoff_ids(live_flow: httpx.Client) -> None:
    def turn(inputs: dict[str, str], restore_from: str | None = None) -> tuple[str, str]:
        kickoff_id = kickoff(live_flow, {"topic": "tea", **inputs}, restoreFromStateId=restore_from)
        return kickoff_id, finished(live_flow, kickoff_id)["result"][0]

    first, count = turn({})
    assert count == "1"
    second, count = turn({}, restore_from=first)
    assert count == "2"
    assert turn({}, restore_from=second)[1] == "3"
    assert turn({}, restore_from=first)[1] == "2", "the state of the first run is as it was"
    assert turn({}, restore_from="nobody")[1] == "1", "no error"
    assert turn({"id": first})[1] == "2"
    assert turn({"id": first})[1] == "3", "inputs.id writes back under the old id"


def answer_to(question: dict[str, Any], receiver: Receiver, *, approve: bool) -> dict[str, Any]:
    """Return the body that answers a question from its webhook, in both spellings, with the webhook again."""
    return {
        "execution_id": question["execution_id"],
        "executionId": question["execution_id"],
        "task_id": question["task_id"],
        "taskId": question["task_id"],
        "human_feedback": "again",
        "is_approve": approve,
        "humanInputWebhookUrl": f"{receiver.url}/human",
        "crewWebhookUrl": f"{receiver.url}/crew",
    }


def asked(receiver: Receiver, number: int) -> dict[str, Any]:
    receiver.wait_for(lambda it: len(it.at("/human")) >= number)
    return receiver.at("/human")[number - 1]


@pytest.mark.parametrize("topic", ["ants", "bad"])
def test_a_live_run_goes_on_under_a_new_id(live_reviewed: httpx.Client, receiver: Receiver, topic: str) -> None:
    webhooks = {
        "humanInputWebhookUrl": f"{receiver.url}/human",
        "humanInputWebhook": {"url": f"{receiver.url}/documented"},
        "crewWebhookUrl": f"{receiver.url}/crew",
    }
    kickoff_id = kickoff(live_reviewed, {"topic": topic}, meta={"key": "k"}, **webhooks)
    for number, approve in ((1, False), (2, True)):
        question = asked(receiver, number)
        assert "Authorization" not in receiver.got[-1].headers
        assert question == {
            "kickoff_id": kickoff_id,
            "execution_id": kickoff_id,
            "task_id": str(uuid.UUID(question["task_id"])),
            "task_output": f"facts on {topic} {number}",
            "meta": {"key": "k"},
        }
        assert live_reviewed.get(f"/status/{kickoff_id}").json() == NOT_FOUND, "it waits, and nothing shows it"
        body = answer_to(question, receiver, approve=approve)
        answer = live_reviewed.post("/resume", json=body)
        assert answer.status_code == 200
        assert answer.json().keys() == {"kickoff_id"}
        assert answer.json()["kickoff_id"] != kickoff_id
        assert live_reviewed.get(f"/status/{kickoff_id}").json() == NOT_FOUND, "the old id is gone"
        assert live_reviewed.post("/resume", json=body).status_code == 200, "which starts nothing"
        kickoff_id = answer.json()["kickoff_id"]
    ended = finished(live_reviewed, kickoff_id)
    if topic == "bad":
        error = "'NoneType' object is not subscriptable"
        assert [ended[name] for name in ("state", "status", "result", "progress")] == ["FAILED", error, None, None]
        assert receiver.at("/crew") == []
    else:
        assert ended["state"] == "SUCCESS"
        assert ended["result"] == "a text: facts on ants 2"
        assert ended["last_executed_task"]["kickoff_id"] == kickoff_id
        assert ended["last_executed_task"]["meta"] == {"key": "k"}
        receiver.wait_for(lambda it: len(it.at("/crew")) == 1)
        assert receiver.at("/crew")[0]["kickoff_id"] == kickoff_id
    assert receiver.at("/documented") == []


def test_live_resume_wants_camel_case(live_reviewed: httpx.Client) -> None:
    body = {"execution_id": STATE, "task_id": STATE, "human_feedback": "", "is_approve": True}
    refused = live_reviewed.post("/resume", json=body)
    assert refused.status_code == 422
    missing = [
        {"loc": ["body", name], "msg": "Field required", "type": "missing"} for name in ("executionId", "taskId")
    ]
    assert refused.json() == {"detail": missing}
    answer = live_reviewed.post(
        "/resume", json={"executionId": "nobody", "taskId": STATE, "humanFeedback": "", "isApprove": True}
    )
    assert answer.status_code == 200
    assert live_reviewed.get(f"/status/{answer.json()['kickoff_id']}").json() == NOT_FOUND


def test_a_live_crew_takes_the_id_of_a_task_and_not_its_name(serve: Serve, receiver: Receiver) -> None:
    server, client = serve(REVIEWED, response_format="live")
    kickoff_id = kickoff(client, {"topic": "ants"}, humanInputWebhookUrl=f"{receiver.url}/human")
    body = answer_to(asked(receiver, 1), receiver, approve=True)
    assert client.post("/resume", json=body | {"taskId": "research_task"}).status_code == 200
    assert server.run(kickoff_id).state is CrewState.WAITING
    assert client.post(f"/stop/{kickoff_id}").json() == {"status": "stopped", "kickoffId": kickoff_id}


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


def live(state: str, ended: int, last: str, **more: Any) -> dict[str, Any]:
    """Return the live status of a run that has ended so many of its three tasks."""
    outputs = {"one": "out: 1", "two": "two", "three": "three"}
    agent, data = {"one": ("A", None), "two": ("B", {"n": 1}), "three": ("C", None)}[last]
    return {
        "state": state,
        "status": None,
        "result": None,
        "result_json": None,
        "usage_metrics": None,
        "progress": {"unit": "task", "completed": ended, "total": 3, "remaining": 3 - ended, "current": None},
        "last_step": {"agent": agent, "type": "final_answer", "content": outputs[last]},
        "last_executed_task": {
            "description": "the first" if last == "one" else "",
            "name": last,
            "expected_output": "",
            "summary": outputs[last],
            "agent": agent,
            "output": outputs[last],
            "output_json": data,
            "kickoff_id": "id",
            "meta": {"n": 1},
        },
        **more,
    }


RUNNING = {"unit": "task", "completed": 1, "total": 3, "remaining": 2, "current": "two"}
STEP_TWO = {"agent": "B", "type": "final_answer", "content": "two"}
BODIES: dict[str, dict[str, dict[str, Any]]] = {
    "documented": {
        "slow": {"status": "running", **AT_TWO},
        "waiting": {"status": "Pending Human Input", "task_output": "two", **AT_TWO},
        "good": {"status": "completed", "result": RESULT, **TOOK},
        "bad": {"status": "error", "error": "it broke", **TOOK},
        "stop": {"status": "stopped", **TOOK},
    },
    "live": {
        "slow": live("RUNNING", 1, "one", status="Task is Running", progress=RUNNING),
        "waiting": NOT_FOUND,
        "good": live(
            "SUCCESS", 3, "three", result="three", result_json={"answer": "42"}, usage_metrics={"total_tokens": 5}
        ),
        "bad": live("FAILED", 2, "two", status="it broke", progress=None, usage_metrics={"total_tokens": 5}),
        "stop": live("REVOKED", 1, "one", last_step=STEP_TWO),
    },
}


def timed(body: Any) -> Any:
    """Return a body with a word for each time that is one, and for each id of a run."""
    if isinstance(body, list):
        return [timed(item) for item in body]
    if not isinstance(body, dict):
        return body
    words = TOOK if body.get("execution_time", -1) >= 0 else {}
    words = words | {"kickoff_id": "id"} if "kickoff_id" in body else words
    return {name: timed(value) for name, value in body.items()} | words


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("response_format", BODIES)
async def test_our_client_reads_every_state(serve: Serve, response_format: str, kind: str) -> None:
    server, client = serve(SCRIPT, response_format=response_format)
    run = server.run(kickoff(client, {"kind": kind}, meta={"n": 1}))
    before = CrewState.RUNNING if kind == "slow" else CrewState.WAITING
    await until(lambda: run.state is before and len(run.tasks) == 1)
    if kind in ("good", "bad"):
        (question,) = run.questions.values()
        body = {"execution_id": run.id, "task_id": "two", "executionId": run.id, "taskId": question.uuid}
        assert client.post("/resume", json=body | {"human_feedback": "", "is_approve": True}).status_code == 200
    async with CrewClient(server.url, server.token) as own:
        if kind == "stop":
            await own.stop(run.id)
        await until(lambda: run.state is STATES[kind])
        status = await own.status(run.id)
    assert timed(status.raw) == BODIES[response_format][kind]
    is_hidden = (kind, response_format) == ("waiting", "live")
    assert status.state == (CrewState.UNKNOWN if is_hidden else STATES[kind])
    assert status.known_state is True
    assert status.output == ("three" if kind == "good" else None)
    assert status.error == ("it broke" if kind == "bad" else None)


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


def test_a_live_flow_counts_steps(live_flow: httpx.Client) -> None:
    body = finished(live_flow, kickoff(live_flow, {}))
    assert body["progress"] == {"unit": "step", "completed": 1, "total": None, "remaining": None, "current": None}
    assert body["last_executed_task"] is None, "crews only"
