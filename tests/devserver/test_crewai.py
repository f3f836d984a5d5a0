"""Real crews and flows behind the server: how they are loaded, what they take, give, report, ask and fail with, and
what a client that nobody here wrote makes of it: the tool with which CrewAI's crews call other crews."""

import asyncio
import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefect_crew.devserver import CrewServer, ProgramNotFoundError, Run, load_program
from support.environment import isolated
from support.servers import Serve, finished, kickoff
from support.waiting import LIMIT, wait_until

pytestmark = [pytest.mark.crewai, pytest.mark.filterwarnings("ignore::DeprecationWarning:crewai")]

CREWS = str(Path(__file__).with_name("real_crews.py"))
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(name="crew")
def crew_fixture(serve: Serve) -> Serve:
    """Give a function that serves a factory of `real_crews.py`, or of a file of the examples."""

    def start(spec: str, response_format: str = "documented") -> tuple[CrewServer, httpx.Client]:
        return serve(str(EXAMPLES / spec) if ":" in spec else f"{CREWS}:{spec}", response_format=response_format)

    return start


def calls() -> Counter[str]:
    return sys.modules["real_crews"].CALLS


def waits_in_a_thread(run_id: str) -> bool:
    return any(thread.name == f"crew run {run_id}" for thread in threading.enumerate())


def resume(client: httpx.Client, run_id: str, task: str, *, approve: bool, feedback: str) -> str:
    body = {"execution_id": run_id, "task_id": task, "is_approve": approve, "human_feedback": feedback}
    answer = client.post("/resume", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["status"]


def shown(server: CrewServer, run_id: str) -> str:
    """Return what the person is shown."""
    (question,) = server.run(run_id).questions.values()
    return question.output


def test_a_crew_gives_text_tasks_agents_and_usage(crew: Serve) -> None:
    server, client = crew("travel_crew.py:build", "live")
    body = finished(client, kickoff(client, {"topic": "Lisbon", "audience": "families"}, meta={"n": 1}))
    assert body["state"] == "SUCCESS"
    assert body["progress"] == {"unit": "task", "completed": 2, "total": 2, "remaining": 0, "current": None}
    research, write = server.runs[0].tasks
    assert research.name == "research"
    assert research.agent == "Travel researcher"
    assert str(research.description).startswith("Find out what families should know about Lisbon")
    assert research.execution_time
    assert str(research.output).splitlines()[2] in body["result"], "the second task saw the first one's notes"
    assert write.output == body["last_executed_task"]["output"] == body["result"]
    assert body["last_executed_task"]["meta"] == {"n": 1}
    usage = body["usage_metrics"]
    assert usage["successful_requests"] == 2
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert body["last_step"]["agent"] == "Guide writer"


@pytest.mark.parametrize(
    ("spec", "planned", "ended", "error"),
    [
        pytest.param("Classic", ["write"], ["write"], None, id="crew-base-class"),
        pytest.param("structured", ["plan"], ["plan"], None, id="structured-result"),
        pytest.param("parallel", ["left", "right", "both"], ["both", "left", "right"], None, id="tasks-at-once"),
        pytest.param("Wide", ["left", "right", "last"], ["last", "left", "right"], None, id="methods-at-once"),
        pytest.param("failing", ["try"], [], "no luck", id="model-fails"),
        pytest.param("Failing", ["begin", "go_on"], ["begin"], "the flow ran dry", id="flow-fails"),
        pytest.param("leaves", ["leave"], [], "SystemExit", id="exits"),
        pytest.param("Paused", [], [], "The flow asks people by its own provider", id="own-provider"),
    ],
)
def test_other_crews_and_flows(crew: Serve, spec: str, planned: list[str], ended: list[str], error: str | None) -> None:
    server, client = crew(spec, "live")
    before = calls()["failing"]
    run_id = kickoff(client, {"topic": "rent"})
    body = finished(client, run_id)
    assert body["state"] == ("FAILED" if error else "SUCCESS")
    assert (error or "") in (body["status"] or "")
    assert bool(body["result_json"]) is (spec in ("structured", "Wide"))
    assert server.run(run_id).planned == planned, "methods among which something chooses are no plan"
    assert sorted(str(task.name) for task in server.run(run_id).tasks) == ended
    assert calls()["failing"] - before == (3 if spec == "failing" else 0), "CrewAI itself tries three times"
    assert spec != "Wide" or body["usage_metrics"]["successful_requests"] == 2


def test_runs_at_once_keep_words_and_tokens_apart(crew: Serve) -> None:
    server, client = crew("travel_crew.py:build", "live")
    # Every topic is longer by a word, and so is everything that quotes it.
    topics = [" ".join(["Far"] * n + [f"Town{n}"]) for n in range(10)]
    alone = [
        finished(client, kickoff(client, {"topic": topic, "audience": "all"}))["usage_metrics"] for topic in topics
    ]
    run_ids = [kickoff(client, {"topic": topic, "audience": "all"}) for topic in topics]
    bodies = [finished(client, run_id) for run_id in run_ids]
    for topic, run_id, body in zip(topics, run_ids, bodies, strict=True):
        assert body["result"].startswith(f"## A day in {topic} for all\n")
        run = server.run(run_id)
        assert run.last_step is not None
        assert all(f" {topic}" in str(said) for said in (*(task.output for task in run.tasks), run.last_step.content))
    assert [body["usage_metrics"] for body in bodies] == alone
    assert len({usage["total_tokens"] for usage in alone}) > 5, "counts that differ, so that a mix would show"


@pytest.mark.parametrize(("spec", "calls_of"), [("slow", "slow"), ("Slow", "slow flow")], ids=["crew", "flow"])
def test_a_stopped_run_ends_at_its_next_step(crew: Serve, spec: str, calls_of: str) -> None:
    server, client = crew(spec, "live")
    before = calls()[calls_of]
    run_id = kickoff(client)
    wait_until(lambda: len(server.run(run_id).tasks) == 1)
    assert client.post(f"/stop/{run_id}").status_code == 200
    assert finished(client, run_id)["state"] == "REVOKED"
    wait_until(lambda: not waits_in_a_thread(run_id))
    assert calls()[calls_of] - before <= 2, "of six or three"
    assert client.get(f"/status/{run_id}").json()["state"] == "REVOKED"


def test_a_flow_needs_its_required_state(crew: Serve) -> None:
    server, client = crew("report_flow.py:ReportFlow")
    fields = ["topic", "sections", "notes"]
    assert client.get("/inputs").json() == {"inputs": fields, "required_inputs": ["topic"]}
    topic, sections, _ = server.program.inputs()
    assert topic.type == "str"
    assert topic.required is True
    assert topic.default is None
    assert sections.type == "int"
    assert sections.required is False
    assert sections.default == 2
    assert sections.description == "How many sections it has, at most three."
    answer = client.post("/kickoff", json={"inputs": {"sections": "1"}})
    assert answer.status_code == 422
    assert answer.json()["details"] == {"missing_inputs": ["topic"]}
    answer = client.post("/kickoff", json={"inputs": {"topic": "rent", "id": "1"}})
    assert answer.status_code == 422
    assert "details" not in answer.json()


def test_the_state_of_a_flow_has_the_id_of_its_kickoff(crew: Serve) -> None:
    _, client = crew("Counting", "live")
    assert client.get("/inputs").json() == {"inputs": ["id", "count"]}, "all fields of its state, and none is required"

    def turn(inputs: dict[str, Any], restore_from: str | None = None) -> tuple[str, str, int]:
        kickoff_id = kickoff(client, inputs, restoreFromStateId=restore_from)
        return kickoff_id, *json.loads(finished(client, kickoff_id)["result"]).values()

    first, state, count = turn({})
    assert (state, count) == (first, 1)
    second, state, count = turn({}, first)
    assert (state, count) == (second, 2)
    assert turn({}, "nobody")[2] == 1
    assert turn({"id": first})[1:] == (first, 2)
    assert turn({"id": first})[1:] == (first, 3), "it writes back under the old id"
    failed = finished(client, kickoff(client, {"count": ["a list"]}))
    assert failed["state"] == "FAILED", "the types of a Flow's values are its state's"


def test_a_rejected_task_is_done_again(crew: Serve) -> None:
    server, client = crew("reviewed_crew.py:build")
    run_id = kickoff(client, {"topic": "a picnic"})
    for feedback in ("name the place", ""):
        body = finished(client, run_id)
        assert body["status"] == "Pending Human Input"
        assert body["current_task"] == "draft"
        assert body["task_output"] == shown(server, run_id)
        assert shown(server, run_id).startswith("## An announcement of a picnic")
        assert resume(client, run_id, "draft", approve=False, feedback=feedback) == "retrying"
    finished(client, run_id)
    last = shown(server, run_id)
    assert last.endswith("- name the place\n- This is not approved. Improve it.")
    assert resume(client, run_id, "draft", approve=True, feedback="never mind") == "resumed"
    body = finished(client, run_id)
    tasks, output = body["result"]["tasks"], body["result"]["output"]
    assert [(task["task_id"], task["agent"]) for task in tasks] == [("draft", "Writer"), ("polish", "Editor")]
    assert tasks[0]["output"] == last, "what was approved is what goes on"
    assert "> - name the place" in output
    assert "never mind" not in output
    usage = server.run(run_id).usage
    assert usage is not None
    assert usage.successful_requests == 4


def test_a_nameless_task_has_its_description(crew: Serve) -> None:
    _, client = crew("nameless")
    run_id = kickoff(client, {"topic": "rent"})
    name = finished(client, run_id)["current_task"]
    assert name == "Write about rent in a way that nobody has written about it…"
    assert resume(client, run_id, name, approve=True, feedback="") == "completed"
    assert finished(client, run_id)["result"]["tasks"][0]["task_id"] == name


def test_a_flow_may_ask_for_anything(crew: Serve) -> None:
    server, client = crew("Asking")
    run_id = kickoff(client)
    finished(client, run_id)
    assert shown(server, run_id) == "What is your name?"
    resume(client, run_id, "greet", approve=True, feedback="Ada")
    assert finished(client, run_id)["result"]["output"] == "Hello, Ada!"


@pytest.mark.parametrize("spec", ["nameless", "reviewed_flow.py:ReviewedFlow"], ids=["crew", "flow"])
@pytest.mark.parametrize("how", ["stop", "server-ends"])
def test_no_thread_waits_for_a_question_that_is_over(crew: Serve, spec: str, how: str) -> None:
    server, client = crew(spec)
    run_id = kickoff(client, {"topic": "rent"})
    assert finished(client, run_id)["status"] == "Pending Human Input"
    assert waits_in_a_thread(run_id)
    if how == "stop":
        assert client.post(f"/stop/{run_id}").status_code == 200
        assert finished(client, run_id)["status"] == "stopped"
    else:
        server.stop()
    wait_until(lambda: not waits_in_a_thread(run_id))


def recorded(**inputs: Any) -> tuple[Run, list[Any]]:
    """Return a run, and the list of what is reported to it, in order."""
    reports: list[Any] = []

    def listener(run: Run, event: str, value: Any) -> None:
        asyncio.get_running_loop()  # raises where this is not called on the event loop
        if event == "step":
            reports.append((event, value.agent, value.kind, value.content, value.tool))
        else:
            reports.append((event, getattr(value, "name", value), getattr(value, "agent", run.current_agent)))

    return Run(inputs, listener=listener), reports


async def test_a_tool_s_use_is_reported_in_order() -> None:
    run, reports = recorded()
    await load_program(f"{CREWS}:with_tool").execute(run)
    assert run.planned == ["look"]
    assert reports == [
        ("task_started", "look", "Scout"),
        ("step", "Scout", "tool", "21 degrees in Lisbon", "weather"),
        ("step", "Scout", "thought", "I should look.", None),
        ("step", "Scout", "final_answer", "It is 21 degrees.", None),
        ("task_ended", "look", "Scout"),
    ]


@pytest.mark.parametrize(
    ("spec", "name", "inputs"),
    [
        (f"{EXAMPLES}/travel_crew.py:build", "travel_crew", ["audience", "topic"]),
        (f"{EXAMPLES}/report_flow.py:ReportFlow", "ReportFlow", ["topic", "sections", "notes"]),
        (f"{CREWS}:Classic", "Classic", ["topic"]),
        (f"{CREWS}:with_json_in_prompt", "real_crews", ["topic"]),
        (f"{CREWS}:Wide", "Wide", []),
    ],
    ids=["crew", "flow", "crew-base-class", "braces-that-are-no-input", "state-is-a-dictionary"],
)
def test_a_program_knows_its_name_and_inputs(spec: str, name: str, inputs: list[str]) -> None:
    program = load_program(spec)
    assert program.name == name
    assert [item.name for item in program.inputs()] == inputs


MINE = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import travel_crew
class Crews:
    class Travel:
        @staticmethod
        def build():
            return travel_crew.build()
"""


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("my_crews:Crews.Travel.build", "my_crews"),
        ("./my_crews_too.py:Crews.Travel.build", "my_crews_too"),
        ("laid_out.crew:Crews.Travel.build", "crew"),
        ("src/laid_out/crew.py:Crews.Travel.build", "crew"),
    ],
)
def test_where_a_factory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, name: str) -> None:
    package = tmp_path / "src" / "laid_out"  # as `crewai create crew` lays it out
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tool.py").write_text("NAME = 'tool'")
    (package / "crew.py").write_text(f"from laid_out.tool import NAME\n{MINE}")
    for file in ("my_crews.py", "my_crews_too.py"):
        (tmp_path / file).write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_program(spec).name == name
    for module in [name for name in sys.modules if name.partition(".")[0] == "laid_out"]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("no_such_module:build", "no_such_module:build cannot be loaded: ModuleNotFoundError"),
        ("no/such/file.py:build", "cannot be loaded: ModuleNotFoundError: No module named 'file'"),
        (f"{CREWS}:no_such_function", "cannot be loaded: AttributeError: .*'no_such_function'"),
        (f"{CREWS}:_SAME", "cannot be loaded: TypeError: .*not callable. Name a function without arguments"),
        (f"{CREWS}:same", "it returned the same object twice"),
        (f"{CREWS}:nothing", "it returned NoneType. Name a function without arguments that returns a new Crew or Flow"),
        (f"{CREWS}:broken", "cannot be loaded: RuntimeError: the recipe is lost"),
        (f"{CREWS}:job", "cannot be loaded: TypeError"),
    ],
    ids=lambda value: value.rpartition(":")[2] if ":" in value else "",
)
def test_what_cannot_be_served_is_said(spec: str, text: str) -> None:
    with pytest.raises(ProgramNotFoundError, match=text):
        load_program(spec)


def test_without_crewai_an_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crewai", None)
    monkeypatch.delitem(sys.modules, "prefect_crew.devserver._crewai", raising=False)
    with pytest.raises(ProgramNotFoundError, match=r"pip install 'prefect-crew\[crewai\]', with Python below 3.14"):
        load_program(f"{EXAMPLES}/travel_crew.py:build")


def test_crewais_environment_is_set(tmp_path: Path) -> None:
    code = f"""if True:
        import os, sys
        from prefect_crew.devserver import load_program
        assert "crewai" not in sys.modules
        load_program("{EXAMPLES}/travel_crew.py:build")
        from crewai_core.paths import db_storage_path
        print(db_storage_path())
        print(os.environ["CREWAI_TRACING_ENABLED"], os.environ["CREWAI_DISABLE_TELEMETRY"])
    """
    environment = isolated(tmp_path, {"CREWAI_DISABLE_TELEMETRY": "yes, please"})
    del environment["CREWAI_TRACING_ENABLED"]
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert ran.returncode == 0, ran.stderr
    storage, said = ran.stdout.splitlines()
    assert said == "false yes, please"
    assert Path(storage).name.startswith("prefect-crew-")
    assert not Path(storage).exists(), "it goes with the process"


STATE_OF_AI = """
name: state-of-ai
inputs: [year]
tasks:
  - {name: report, output: "The state of AI in {{ year }}", fail: "{% if year == '1890' %}no AI yet{% endif %}"}
"""


def test_crewai_s_own_tool_runs_a_crew(serve: Serve) -> None:
    from crewai_tools import InvokeCrewAIAutomationTool
    from pydantic import Field

    server, client = serve(STATE_OF_AI, response_format="live")
    tool: Any = InvokeCrewAIAutomationTool(
        crew_api_url=server.url,
        crew_bearer_token=server.token,
        crew_name="State of AI Report",
        crew_description="Reports on the state of AI in a year.",
        crew_inputs={name: Field(..., description=f"The {name}") for name in client.get("/inputs").json()["inputs"]},
    )
    assert tool.run(year="2025").startswith("The state of AI in 2025")
    assert server.kickoffs == 1
    assert server.requests["status"] <= 2
    failed = tool.run(year="1890")
    assert failed.startswith("Error: Crew task failed. Response: {")
    assert "no AI yet" in failed
    server.token = "rotated"
    assert tool.run(year="2025").startswith("Error: Failed to kickoff crew. Response: {'detail': 'Invalid or")
