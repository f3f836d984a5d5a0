"""Real crews and flows behind the real server: what they take, give, say on the way and fail with."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.devserver.programs import load_program
from prefect_crew.devserver.server import CrewServer
from support.servers import ClientOf, Finished

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

CREWS = str(Path(__file__).with_name("real_crews.py"))
EXAMPLES = Path(__file__).parents[2] / "examples"
Serve = Callable[[str], tuple[CrewServer, httpx.Client]]


@pytest.fixture
def serve(client_of: ClientOf) -> Iterator[Serve]:
    """Give a function that serves a factory of `real_crews.py`, or of a file of the examples."""
    servers: list[CrewServer] = []

    def start(spec: str) -> tuple[CrewServer, httpx.Client]:
        full = str(EXAMPLES / spec) if ":" in spec else f"{CREWS}:{spec}"
        servers.append(CrewServer(full, dialect="union"))
        servers[-1].start()
        return servers[-1], client_of(servers[-1])

    yield start
    for server in servers:
        server.stop()


def calls() -> Counter[str]:
    return sys.modules["real_crews"].CALLS


def thread_of(run_id: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"crew run {run_id}"]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.005)


def kickoff(client: httpx.Client, **inputs: Any) -> str:
    answer = client.post("/kickoff", json={"inputs": inputs})
    assert answer.status_code == 200, answer.text
    return answer.json()["kickoff_id"]


# A crew


def test_a_crew_gives_its_text_tasks_agents_and_usage(serve: Serve, finished: Finished) -> None:
    _, client = serve("travel_crew.py:build")
    body = finished(client, kickoff(client, topic="Lisbon", audience="families"))
    assert body["state"] == "SUCCESS"
    assert body["output"].startswith("## A day in Lisbon for families")
    assert [(task["name"], task["agent"]) for task in body["tasks"]] == [
        ("research", "Travel researcher"),
        ("write", "Guide writer"),
    ]
    assert all(task["execution_time"] > 0 for task in body["tasks"])
    assert body["tasks"][0]["description"].startswith("Find out what families should know about Lisbon")
    assert body["tasks"][0]["output"].splitlines()[2] in body["output"], "the second task saw the first one's notes"
    assert body["tasks"][1]["output"] == body["output"]
    usage = body["token_usage"]
    assert usage["successful_requests"] == 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert body["progress"] == {"completed_tasks": 2, "total_tasks": 2}
    assert body["last_step"]["agent"] == "Guide writer"


def test_missing_inputs_start_nothing(serve: Serve) -> None:
    server, client = serve("travel_crew.py:build")
    assert set(client.get("/inputs").json()["required_inputs"]) == {"topic", "audience"}
    answer = client.post("/kickoff", json={"inputs": {"topic": "Lisbon"}})
    assert answer.status_code == 422
    assert answer.json()["details"] == {"missing_inputs": ["audience"]}
    assert server.kickoffs == 0


def test_a_failing_model_fails_the_run_with_its_own_words_after_three_tries(serve: Serve, finished: Finished) -> None:
    _, client = serve("failing")
    before = calls()["failing"]
    body = finished(client, kickoff(client, topic="luck"))
    assert (body["state"], body["error"]) == ("FAILED", "no luck")
    assert calls()["failing"] - before == 3


def test_a_structured_result_is_data(serve: Serve, finished: Finished) -> None:
    server, client = serve("structured")
    run_id = kickoff(client)
    body = finished(client, run_id)
    assert body["result_json"]["title"] == "A plan"
    assert len(body["result_json"]["stops"]) == 2
    assert server.run(run_id).tasks[0].data == body["result_json"]


@pytest.mark.parametrize("spec", ["Classic", "parallel"], ids=["crew-base-class", "tasks-at-once"])
def test_other_shapes_of_crews_run_too(serve: Serve, finished: Finished, spec: str) -> None:
    _, client = serve(spec)
    body = finished(client, kickoff(client, topic="rent"))
    names = {"Classic": ["write"], "parallel": ["both", "left", "right"]}[spec]
    assert (body["state"], sorted(task["name"] for task in body["tasks"])) == ("SUCCESS", names)


def test_ten_runs_at_once_keep_their_words_and_tokens_apart(serve: Serve, finished: Finished) -> None:
    server, client = serve("travel_crew.py:build")
    # Every topic is longer by a word, and so is everything that quotes it.
    topics = [" ".join(["Far"] * n + [f"Town{n}"]) for n in range(10)]
    alone = [finished(client, kickoff(client, topic=topic, audience="all"))["token_usage"] for topic in topics]
    run_ids = [kickoff(client, topic=topic, audience="all") for topic in topics]
    bodies = [finished(client, run_id) for run_id in run_ids]
    for topic, run_id, body in zip(topics, run_ids, bodies, strict=True):
        assert body["output"].startswith(f"## A day in {topic} for all\n")
        assert [task["name"] for task in body["tasks"]] == ["research", "write"]
        for said in (*(task["output"] for task in body["tasks"]), server.run(run_id).last_step.content):  # type: ignore[union-attr]
            assert f" {topic}" in said
    assert [body["token_usage"] for body in bodies] == alone
    assert len({usage["total_tokens"] for usage in alone}) > 5, "counts that differ, so that a mix would show"


@pytest.mark.slow
def test_a_hundred_runs_at_once_are_all_right(serve: Serve, finished: Finished) -> None:
    _, client = serve("travel_crew.py:build")
    run_ids = [kickoff(client, topic=f"Town{n}", audience="all") for n in range(100)]
    bodies = [finished(client, run_id) for run_id in run_ids]
    assert [body["output"].splitlines()[0] for body in bodies] == [f"## A day in Town{n} for all" for n in range(100)]
    assert {body["token_usage"]["successful_requests"] for body in bodies} == {2}


def test_a_stopped_crew_ends_at_its_next_model_call(serve: Serve, finished: Finished) -> None:
    server, client = serve("slow")
    before = calls()["slow"]
    run_id = kickoff(client)
    until(lambda: server.run(run_id).tasks)
    assert client.post(f"/stop/{run_id}").status_code == 200
    assert finished(client, run_id)["state"] == "REVOKED"
    until(lambda: not thread_of(run_id))
    assert 1 <= calls()["slow"] - before < 6
    assert client.get(f"/status/{run_id}").json()["state"] == "REVOKED"


# A flow


def test_a_flow_gives_its_result_and_its_methods_as_tasks(serve: Serve, finished: Finished) -> None:
    _, client = serve("report_flow.py:ReportFlow")
    body = finished(client, kickoff(client, topic="tea", sections="1"))
    assert body["state"] == "SUCCESS"
    assert body["result_json"]["title"] == "Report on tea"
    assert len(body["result_json"]["sections"]) == 1, "text becomes what the state's field asks for"
    assert [(task["name"], task["agent"]) for task in body["tasks"]] == [("research", "Analyst"), ("report", None)]
    assert body["token_usage"]["successful_requests"] == 1
    assert body["progress"] == {"completed_tasks": 2, "total_tasks": 2}


def test_a_flow_needs_what_its_state_marks_as_required(serve: Serve) -> None:
    _, client = serve("report_flow.py:ReportFlow")
    assert client.get("/inputs").json() == {"inputs": ["topic", "sections"], "required_inputs": ["topic"]}, (
        "of the state's fields those that are required or described"
    )
    answer = client.post("/kickoff", json={"inputs": {"sections": "1"}})
    assert (answer.status_code, answer.json()["details"]) == (422, {"missing_inputs": ["topic"]})
    answer = client.post("/kickoff", json={"inputs": {"topic": "rent", "id": "1"}})
    assert (answer.status_code, "details" in answer.json()) == (422, False)


def test_what_a_flow_tells_of_its_inputs() -> None:
    program = load_program(str(EXAMPLES / "report_flow.py:ReportFlow"))
    assert [item.model_dump() for item in program.inputs()] == [
        {
            "name": "topic",
            "type": "str",
            "description": "What the report is about.",
            "required": True,
            "default": None,
        },
        {
            "name": "sections",
            "type": "int",
            "description": "How many sections it has, at most three.",
            "required": False,
            "default": 2,
        },
    ]


def test_a_flow_starts_from_a_state_that_it_is_told_to_restore(serve: Serve, finished: Finished) -> None:
    _, client = serve("Counting")
    first = finished(client, kickoff(client))
    state = json.loads(first["result"])["id"]
    answer = client.post("/kickoff", json={"inputs": {}, "restoreFromStateId": state})
    assert json.loads(finished(client, answer.json()["kickoff_id"])["result"])["count"] == 2


def test_methods_at_the_same_time_have_their_own_agents(serve: Serve, finished: Finished) -> None:
    _, client = serve("Wide")
    assert client.get("/inputs").json() == {"inputs": [], "required_inputs": []}, (
        "a state that is a dictionary declares nothing"
    )
    body = finished(client, kickoff(client, topic="rent"))
    agents = {task["name"]: task["agent"] for task in body["tasks"]}
    assert agents == {"left": "Left", "right": "Right", "last": None}
    assert body["token_usage"]["successful_requests"] == 2
    assert sorted(body["result_json"]) == ["a", "b"]


def test_a_failing_flow_fails_the_run_with_its_own_words(serve: Serve, finished: Finished) -> None:
    _, client = serve("Failing")
    body = finished(client, kickoff(client))
    assert (body["state"], body["error"]) == ("FAILED", "the flow ran dry")
    assert [task["name"] for task in body["tasks"]] == ["begin"]


def test_a_stopped_flow_ends_before_its_next_method(serve: Serve, finished: Finished) -> None:
    server, client = serve("Slow")
    before = calls()["slow flow"]
    run_id = kickoff(client)
    until(lambda: server.run(run_id).current_task == "two")
    client.post(f"/stop/{run_id}")
    assert finished(client, run_id)["state"] == "REVOKED"
    until(lambda: not thread_of(run_id))
    assert calls()["slow flow"] - before == 1
