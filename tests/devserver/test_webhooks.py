"""Webhooks of both generations and event streams, as a real receiver gets them."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from prefect_crew.devserver import CrewServer
from support.receiver import Receiver
from support.servers import ClientOf, Finished

SCRIPT = """
name: told
inputs: [topic]
tasks:
  - name: research_task
    agent: Researcher
    description: "Research {{ topic }}"
    expected_output: Facts
    output: "one two three four five six seven eight nine ten eleven {{ topic }}"
    data: {topic: "{{ topic }}"}
    steps:
      - {content: thinking}
      - {content: found, kind: tool, tool: search}
  - {name: write_task, agent: Writer, seconds: 0.05, output: "text", human: true}
data: {words: 1}
usage: {total_tokens: 9, prompt_tokens: 5, completion_tokens: 4}
"""
META = {"requestId": "r-1"}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


def plain(receiver: Receiver) -> dict[str, str]:
    return {f"{kind}WebhookUrl": f"{receiver.url}/{kind}" for kind in ("task", "step", "crew")}


def kickoff(client: httpx.Client, webhooks: dict[str, Any]) -> str:
    answer = client.post("/kickoff", json={"inputs": {"topic": "ants"}, "meta": META, **webhooks})
    assert answer.status_code == 200, answer.text
    return answer.json()["kickoff_id"]


def approve(client: httpx.Client, kickoff_id: str, webhooks: dict[str, Any]) -> None:
    answer = {"execution_id": kickoff_id, "task_id": "write_task", "human_feedback": "", "is_approve": True}
    assert client.post("/resume", json=answer | webhooks).status_code == 200


def ran(server: CrewServer, client_of: ClientOf, finished: Finished, webhooks: dict[str, Any]) -> str:
    client = client_of(server)
    kickoff_id = kickoff(client, webhooks)
    assert finished(client, kickoff_id)["status"] == "Pending Human Input"
    approve(client, kickoff_id, webhooks)
    assert finished(client, kickoff_id)["status"] == "completed"
    return kickoff_id


def test_the_first_generation(receiver: Receiver, client_of: ClientOf, finished: Finished) -> None:
    with CrewServer(SCRIPT) as server:
        id_ = ran(
            server, client_of, finished, {**plain(receiver), "humanInputWebhook": {"url": f"{receiver.url}/human"}}
        )
        receiver.wait_for(lambda it: len(it.got) == 7)
    tasks = receiver.at("/task")
    for task in tasks:
        assert task.pop("execution_time") >= 0
    assert tasks == [
        {
            "kickoff_id": id_,
            "task_id": "research_task",
            "status": "completed",
            "output": "one two three four five six seven eight nine ten eleven ants",
            "agent": "Researcher",
        },
        {"kickoff_id": id_, "task_id": "write_task", "status": "completed", "output": "text", "agent": "Writer"},
    ]
    assert {
        "kickoff_id": id_,
        "task_id": "research_task",
        "agent": "Researcher",
        "step_type": "tool",
        "content": "found",
    } in (receiver.at("/step"))
    assert receiver.at("/human") == [
        {"execution_id": id_, "task_id": "write_task", "task_output": "text", "meta": META}
    ]
    (crew,) = receiver.at("/crew")
    assert crew.pop("execution_time") > 0
    assert [task["task_id"] for task in crew["result"].pop("tasks")] == ["research_task", "write_task"]
    assert crew == {"kickoff_id": id_, "status": "completed", "result": {"output": "text"}, "meta": META}


def test_the_later_generation(receiver: Receiver, client_of: ClientOf, finished: Finished) -> None:
    with CrewServer(SCRIPT, generation="later") as server:
        id_ = ran(
            server, client_of, finished, {**plain(receiver), "humanInputWebhook": {"url": f"{receiver.url}/human"}}
        )
        receiver.wait_for(lambda it: len(it.got) == 7)
    assert receiver.at("/task")[0] == {
        "description": "Research ants",
        "name": "research_task",
        "expected_output": "Facts",
        "summary": "one two three four five six seven eight nine ten...",
        "agent": "Researcher",
        "output": "one two three four five six seven eight nine ten eleven ants",
        "output_json": {"topic": "ants"},
        "kickoff_id": id_,
        "meta": META,
    }
    tool = next(step for step in receiver.at("/step") if step["tool"])
    assert set(tool) == {"prompt", "thought", "tool", "tool_input", "result", "kickoff_id", "meta"}
    assert (tool["tool"], tool["result"], tool["meta"]) == ("search", "found", META)
    assert receiver.at("/human") == [{"kickoff_id": id_, "task_id": "write_task", "output": "text", "meta": META}]
    assert receiver.at("/crew") == [
        {
            "kickoff_id": id_,
            "result": "text",
            "result_json": {"words": 1},
            "token_usage": {"total_tokens": 9, "prompt_tokens": 5, "completion_tokens": 4},
            "meta": META,
        }
    ]


def test_resume_without_webhooks_ends_them(receiver: Receiver, client_of: ClientOf, finished: Finished) -> None:
    with CrewServer(SCRIPT) as server:
        client = client_of(server)
        kickoff_id = kickoff(client, plain(receiver))
        finished(client, kickoff_id)
        receiver.wait_for(lambda it: len(it.at("/task")) == 1)
        approve(client, kickoff_id, {})
        assert finished(client, kickoff_id)["status"] == "completed"
        time.sleep(0.2)
    assert receiver.at("/crew") == []
    assert len(receiver.at("/task")) == 1


@pytest.mark.parametrize(
    ("authentication", "header"),
    [
        pytest.param({"strategy": "bearer", "token": "s3cret"}, "Bearer s3cret", id="bearer"),
        pytest.param(
            {"strategy": "basic", "username": "ann", "password": "pw"},
            f"Basic {base64.b64encode(b'ann:pw').decode()}",
            id="basic",
        ),
        pytest.param(None, None, id="none"),
    ],
)
def test_authentication(
    receiver: Receiver, client_of: ClientOf, finished: Finished, authentication: Any, header: str | None
) -> None:
    target = {"url": f"{receiver.url}/x", **({"authentication": authentication} if authentication else {})}
    with CrewServer(SCRIPT) as server:
        client = client_of(server)
        finished(
            client, kickoff(client, {"humanInputWebhook": target, "webhooks": {**target, "events": ["task_started"]}})
        )
        receiver.wait_for(lambda it: len(it.got) >= 2)
    assert {delivery.headers.get("Authorization") for delivery in receiver.got} == {header}
    assert {delivery.headers["Content-Type"] for delivery in receiver.got} == {"application/json"}


ALL_TYPES = [
    "crew_kickoff_started",
    "task_started",
    "agent_execution_started",
    "agent_logs_execution",
    "agent_execution_completed",
    "task_completed",
    "human_feedback_requested",
    "crew_kickoff_completed",
]


@pytest.mark.parametrize("realtime", [True, False], ids=["realtime", "batched"])
def test_streams(receiver: Receiver, client_of: ClientOf, finished: Finished, realtime: bool) -> None:
    stream = {"events": ALL_TYPES, "url": f"{receiver.url}/all", "realtime": realtime}
    few = {"events": ["crew_kickoff_completed"], "url": f"{receiver.url}/few", "realtime": realtime}
    with CrewServer(SCRIPT) as server:
        id_ = ran(server, client_of, finished, {"webhooks": [stream, few]})
        receiver.wait_for(lambda it: "crew_kickoff_completed" in str(it.at("/all")) and bool(it.at("/few")))
        receiver.wait_for(lambda it: sum(len(body["events"]) for body in it.at("/all")) == 14)
    events = [event for body in receiver.at("/all") for event in body["events"]]
    assert {event["type"] for event in events} == set(ALL_TYPES)
    assert all(set(event) == {"id", "execution_id", "timestamp", "type", "data"} for event in events)
    assert {event["execution_id"] for event in events} == {id_}
    assert len({event["id"] for event in events}) == len(events)
    if realtime:
        assert all(len(body["events"]) == 1 for body in receiver.at("/all"))
    else:
        assert len(receiver.at("/all")) < len(events)
    assert [event["type"] for body in receiver.at("/few") for event in body["events"]] == ["crew_kickoff_completed"]


@pytest.mark.parametrize("generation", ["first", "later"])
@pytest.mark.parametrize("end", ["failed", "stopped"])
def test_no_crew_webhook_but_for_success(
    receiver: Receiver, client_of: ClientOf, finished: Finished, generation: str, end: str
) -> None:
    script = "name: x\ntasks: [{name: t, output: x}, {name: u, seconds: 0.05, fail: broken}]"
    if end == "stopped":
        script = "name: x\ntasks: [{name: t, output: x}, {name: u, seconds: 60}]"
    with CrewServer(script, generation=generation) as server:
        client = client_of(server)
        kickoff_id = client.post("/kickoff", json={"inputs": {}, **plain(receiver)}).json()["kickoff_id"]
        receiver.wait_for(lambda it: bool(it.at("/task")))
        if end == "stopped":
            client.post(f"/stop/{kickoff_id}")
        finished(client, kickoff_id)
        time.sleep(0.2)
    assert len(receiver.at("/task")) == 1
    assert receiver.at("/crew") == []


@pytest.mark.parametrize(
    ("faults", "tasks", "crews"),
    [
        pytest.param(["webhook:lose"], 0, 0, id="all-lost"),
        pytest.param(["webhook-crew:lose"], 2, 0, id="crew-lost"),
        pytest.param(["webhook-task:lose@1"], 1, 1, id="first-task-lost"),
        pytest.param(["webhook-crew:double"], 2, 2, id="crew-doubled"),
        pytest.param(["webhook:double", "webhook-task:lose@2"], 2, 2, id="doubled-and-lost"),
    ],
)
def test_lost_and_doubled(
    receiver: Receiver, client_of: ClientOf, finished: Finished, faults: list[str], tasks: int, crews: int
) -> None:
    with CrewServer("name: x\ntasks: [{name: t}, {name: u}]", faults=faults) as server:
        client = client_of(server)
        hooks = {**plain(receiver), "stepWebhookUrl": None}
        finished(client, client.post("/kickoff", json={"inputs": {}, **hooks}).json()["kickoff_id"])
        receiver.wait_for(lambda it: len(it.at("/task")) >= tasks and len(it.at("/crew")) >= crews)
        time.sleep(0.1)
    assert (len(receiver.at("/task")), len(receiver.at("/crew"))) == (tasks, crews)


def test_delayed_webhooks_come_out_of_order(receiver: Receiver, client_of: ClientOf, finished: Finished) -> None:
    with CrewServer("name: x\ntasks: [{name: t}, {name: u}]", faults=["webhook-task:delay=0.4@1"]) as server:
        client = client_of(server)
        finished(client, client.post("/kickoff", json={"inputs": {}, **plain(receiver)}).json()["kickoff_id"])
        receiver.wait_for(lambda it: len(it.at("/task")) == 2)
    assert [body["task_id"] for body in receiver.at("/task")] == ["u", "t"]


@pytest.mark.parametrize("trouble", ["slow", "failing", "away"])
def test_a_bad_receiver_costs_the_run_nothing(
    client_of: ClientOf, finished: Finished, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = Receiver(answer=500, delay=3 if trouble == "slow" else 0)
    with receiver, CrewServer("echo") as server:
        if trouble == "away":
            receiver.close()
        client = client_of(server)
        began = time.monotonic()
        body = {"inputs": {"text": "x"}, "crewWebhookUrl": f"{receiver.url}/hidden-in-the-url"}
        finished(client, client.post("/kickoff", json=body).json()["kickoff_id"])
        assert time.monotonic() - began < 2
        if trouble != "slow":
            deadline = time.monotonic() + 5
            while not server.runtime.sender.sent:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert dict(server.runtime.sender.sent) == {("crew", 0 if trouble == "away" else 500): 1}
    assert "hidden-in-the-url" not in caplog.text
