"""Webhooks and event streams, as a real receiver gets them."""

import asyncio
import base64
import time
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from prefect_crew.devserver import CrewServer
from support.receiver import Receiver
from support.servers import Serve, finished, kickoff
from support.waiting import wait_until

SCRIPT = """
name: reported
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


def plain(receiver: Receiver) -> dict[str, str]:
    return {f"{kind}WebhookUrl": f"{receiver.url}/{kind}" for kind in ("task", "step", "crew")}


def start(client: httpx.Client, webhooks: dict[str, Any]) -> str:
    """Start a run of SCRIPT, and return its id once it waits for a person."""
    kickoff_id = kickoff(client, {"topic": "ants"}, meta=META, **webhooks)
    assert finished(client, kickoff_id)["status"] == "Pending Human Input"
    return kickoff_id


def approve(client: httpx.Client, kickoff_id: str, webhooks: dict[str, Any]) -> None:
    answer = {"execution_id": kickoff_id, "task_id": "write_task", "human_feedback": "", "is_approve": True}
    assert client.post("/resume", json=answer | webhooks).status_code == 200
    assert finished(client, kickoff_id)["status"] == "completed"


def ran(client: httpx.Client, webhooks: dict[str, Any]) -> str:
    kickoff_id = start(client, webhooks)
    approve(client, kickoff_id, webhooks)
    return kickoff_id


WRITTEN = "one two three four five six seven eight nine ten eleven ants"


def test_bodies(receiver: Receiver, serve: Serve) -> None:
    _, client = serve(SCRIPT)
    id_ = ran(client, {**plain(receiver), "humanInputWebhook": {"url": f"{receiver.url}/human"}})
    receiver.wait_for(lambda it: len(it.got) == 7)
    (research, write), (human,), (crew,) = (receiver.at(path) for path in ("/task", "/human", "/crew"))
    told = {"kickoff_id": id_, "meta": META}
    about = {"description": "Research ants", "name": "research_task", "expected_output": "Facts", "agent": "Researcher"}
    about |= {"summary": "one two three four five six seven eight nine ten...", "output": WRITTEN}
    assert research == {**told, **about, "output_json": {"topic": "ants"}}
    assert write["output"] == "text"
    tool = next(step for step in receiver.at("/step") if step["tool"])
    assert set(tool) == {"prompt", "thought", "tool", "tool_input", "result", "kickoff_id", "meta"}
    assert tool["tool"] == "search"
    assert tool["result"] == "found"
    assert tool["meta"] == META
    assert human == told | {"execution_id": id_, "task_id": "write_task", "task_output": "text"}
    usage = {"total_tokens": 9, "prompt_tokens": 5, "completion_tokens": 4}
    assert crew == told | {"result": "text", "result_json": {"words": 1}, "token_usage": usage}


async def test_a_mounted_app_sends_webhooks(receiver: Receiver) -> None:
    app = Starlette(routes=[Mount("/crew", CrewServer("echo", token="token-of-8").asgi)])
    headers = {"Authorization": "Bearer token-of-8"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://crew.test/crew", headers=headers) as client:
        body = {"inputs": {"text": "a"}, "crewWebhookUrl": f"{receiver.url}/crew"}
        assert (await client.post("/kickoff", json=body)).status_code == 200
        await asyncio.to_thread(receiver.wait_for, lambda got: bool(got.at("/crew")))


BASIC = f"Basic {base64.b64encode(b'ann:pw').decode()}"


@pytest.mark.parametrize(
    ("authentication", "header"),
    [
        ({"authentication": {"strategy": "bearer", "token": "s3cret"}}, "Bearer s3cret"),
        ({"authentication": {"strategy": "basic", "username": "ann", "password": "pw"}}, BASIC),
        ({}, None),
    ],
    ids=["bearer", "basic", "none"],
)
def test_authentication(receiver: Receiver, serve: Serve, authentication: dict[str, Any], header: str | None) -> None:
    target = {"url": f"{receiver.url}/x", **authentication}
    _, client = serve(SCRIPT)
    start(client, {"humanInputWebhook": target, "webhooks": {**target, "events": ["task_completed"]}})
    receiver.wait_for(lambda it: len(it.got) >= 2)
    assert len(receiver.got) == 2, "a human input, and the one kind of event that was asked for"
    assert {delivery.headers.get("Authorization") for delivery in receiver.got} == {header}
    assert {delivery.headers["Content-Type"] for delivery in receiver.got} == {"application/json"}


TYPES = {
    *("crew_kickoff_started", "task_started", "agent_execution_started", "agent_logs_execution"),
    *("agent_execution_completed", "task_completed", "human_feedback_requested", "crew_kickoff_completed"),
}


def test_a_stream(receiver: Receiver, serve: Serve) -> None:
    _, client = serve(SCRIPT)
    id_ = ran(client, {"webhooks": {"events": [*TYPES], "url": f"{receiver.url}/all"}})
    receiver.wait_for(lambda it: len(it.at("/all")) >= 14)
    events = [event for body in receiver.at("/all") for event in body["events"]]
    assert {event["type"] for event in events} == TYPES
    assert all(set(event) == {"id", "execution_id", "timestamp", "type", "data"} for event in events)
    assert {event["execution_id"] for event in events} == {id_}
    assert len({event["id"] for event in events}) == len(events)


@pytest.mark.parametrize(
    ("last", "end"),
    [
        ("seconds: 0.05, fail: broken", lambda client, run_id: None),
        ("seconds: 60", lambda client, run_id: client.post(f"/stop/{run_id}")),
        ("human: true", lambda client, run_id: finished(client, run_id) and approve(client, run_id, {})),
    ],
    ids=["failed", "stopped", "resumed-without-webhooks"],
)
def test_no_crew_webhook_but_for_success(receiver: Receiver, serve: Serve, last: str, end: Any) -> None:
    _, client = serve(f"name: x\ntasks: [{{name: t, output: x}}, {{name: write_task, {last}}}]")
    kickoff_id = kickoff(client, **plain(receiver))
    receiver.wait_for(lambda it: bool(it.at("/task")))
    end(client, kickoff_id)
    finished(client, kickoff_id)
    time.sleep(0.1)
    assert len(receiver.at("/task")) == 1
    assert receiver.at("/crew") == []


@pytest.mark.parametrize(
    ("faults", "tasks", "crews"),
    [
        (["webhook:lose"], [], 0),
        (["webhook-crew:lose"], ["t", "u"], 0),
        (["webhook:double", "webhook-task:lose@2"], ["t", "t"], 2),
        (["webhook-task:delay=2@1"], ["u", "t"], 1),
    ],
)
def test_faults(receiver: Receiver, serve: Serve, faults: list[str], tasks: list[str], crews: int) -> None:
    _, client = serve("name: x\ntasks: [{name: t}, {name: u}]", faults=faults)
    finished(client, kickoff(client, **plain(receiver) | {"stepWebhookUrl": None}))
    receiver.wait_for(lambda it: len(it.at("/task")) >= len(tasks) and len(it.at("/crew")) >= crews)
    time.sleep(0.1)
    came = [body["name"] for body in receiver.at("/task")]
    # Only a delay makes a certain order: each delivery has a connection of its own.
    assert (came if "delay" in faults[0] else sorted(came)) == tasks
    assert len(receiver.at("/crew")) == crews


@pytest.mark.parametrize(("answer", "delay"), [(200, 3600), (500, 0)], ids=["endless", "failing"])
def test_a_bad_receiver_costs_the_run_nothing(serve: Serve, answer: int, delay: float) -> None:
    _, client = serve("echo")
    with Receiver(answer=answer, delay=delay) as receiver:
        finished(client, kickoff(client, {"text": "x"}, crewWebhookUrl=f"{receiver.url}/crew"))
        receiver.wait_for(lambda it: len(it.got) == 1)


@pytest.mark.parametrize(
    ("url", "token", "reason"),
    [
        ("http://127.0.0.1:9/s3cret", "token", "ConnectError"),
        ("http://127.0.0.1:9/x", "tök-en", ""),
        ("http://127.0.0.1:99999/x", "s3cret", ""),
        ("http://xn--a/x", "s3cret", ""),
    ],
)
def test_a_failed_webhook_logs_no_secret(
    serve: Serve, caplog: pytest.LogCaptureFixture, url: str, token: str, reason: str
) -> None:
    _, client = serve("echo")
    target = {"url": url, "authentication": {"strategy": "bearer", "token": token}}
    finished(client, kickoff(client, {"text": "x"}, webhooks={**target, "events": ["task_completed"]}))
    wait_until(lambda: f"The stream webhook was not delivered: {reason}" in caplog.text)
    assert "s3cret" not in caplog.text
    assert "tök-en" not in caplog.text
