"""Scripted crews: how they are read, errors that say where, and what they do while they run."""

import asyncio
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from prefect_crew.client.models import TaskResult, TokenUsage
from prefect_crew.devserver import Outcome, ProgramError, Run, load_program, load_script
from prefect_crew.devserver._scripts import BUNDLED, CrewScript, ScriptedProgram

X, T = "name: x\n", "name: x\ntasks:\n  - name: t\n    "


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("name: x\ntasks: [\n", [" is not YAML: .* line 3, column 1"]),
        ("- a\n", [": Input should be a valid dictionary"]),
        (X, [": tasks: it is missing"]),
        (f"{T}second: 3\n", [r": tasks.0.second: there is no such field \(did you mean seconds\?\)$"]),
        (
            f"{T}human: perhaps\n    agent: 3\n",
            [": tasks.0.agent: Input should be", ": tasks.0.human: Input should be a valid boolean"],
        ),
        (f"{T}\ninputs: [{{type: a}}]", [": inputs.0.name: it is missing"]),
    ],
    ids=lambda value: value[0][-30:] if isinstance(value, list) else "",
)
def test_errors_say_where(tmp_path: Path, text: str, lines: list[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml") as caught:
        load_script(tmp_path / "c.yaml")
    for line, expected in zip(str(caught.value).splitlines(), lines, strict=True):
        assert re.match(f"{tmp_path}/c.yaml{expected}", line)


def test_a_file_goes_before_a_bundled_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_script("echo").name == "echo"
    Path("echo").write_text("name: mine\ntasks: [{name: t}]")
    assert load_script("echo").name == "mine"
    Path("c.yaml").write_bytes(b"\xff\xfe\xff")
    for name, text in (("c.yaml", "can't decode"), ("d.yaml", "No such file or directory")):
        with pytest.raises(ValueError, match=rf"Cannot read the crew .*{name}: .*{text}.*echo, travel"):
            load_script(Path(name))
    Path("crew.py").write_text("def build(): ...")
    with pytest.raises(ValueError, match=r"crew\.py is Python code\. Name the function or class .*crew\.py:NAME"):
        load_program(Path("crew.py"))


def test_all_fields_of_a_script_are_described() -> None:
    for name in BUNDLED:
        script = load_script(name)
        assert script.name == name
        assert bool(script.description) is True
    schema = CrewScript.model_json_schema()
    for part in [schema, *(one for name, one in schema["$defs"].items() if name != "TokenUsage")]:
        for name, field in part["properties"].items():
            assert field.get("description", "").endswith("."), name


def run(text: str, *, speed: float = float("inf"), **inputs: Any) -> tuple[Outcome, list[Any]]:
    """Run a script, and return its outcome with what it reported."""
    reports: list[Any] = []

    def listener(run: Run, event: str, value: Any) -> None:
        if isinstance(value, TaskResult):
            reports.append((event, value.name, value.output))
        else:
            reports.append((event, value if event == "task_started" else (value.kind, value.content, value.tool)))

    run = Run(inputs, id="run-1", listener=listener)
    program = load_program(text, speed=speed)
    assert load_program(program) is program
    outcome = asyncio.run(program.execute(run))
    return outcome, [run.planned, *reports]


def one_task(task: str) -> str:
    return f"{T}{task}\n"


def test_tasks_see_inputs_and_earlier_tasks() -> None:
    outcome, reports = run(
        """
        name: x
        inputs: [who, {name: greeting, required: false, default: Hello}]
        tasks:
          - name: first
            steps: [{content: "a {{ who }}"}, {content: b, kind: tool, tool: web}]
            output: "{{ greeting }} {{ inputs['who'] }}"
          - {name: second-task, output: "{{ tasks.first.output }}! {{ previous }}! {{ kickoff_id }}"}
        usage: {total_tokens: 4}
        """,
        who="Ann",
    )
    assert outcome.output == "Hello Ann! Hello Ann! run-1"
    assert outcome.usage == TokenUsage(total_tokens=4)
    assert ("step", ("final_answer", outcome.output, None)) in reports, "a task without steps has this one"
    assert reports[:5] == [
        ["first", "second-task"],
        ("task_started", "first"),
        ("step", ("thought", "a Ann", None)),
        ("step", ("tool", "b", "web")),
        ("task_ended", "first", "Hello Ann"),
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{a: '{{ n }}', b: [1, true, null, 'é']}", {"a": "7", "b": [1, True, None, "é"]}),
        ("'{\"n\": {{ n }}}'", {"n": 7}),
    ],
    ids=["mapping", "template-of-json"],
)
def test_structured_results(data: str, expected: Any) -> None:
    outcome, _ = run(one_task(f"data: {data}"), n=7)
    assert outcome.data == expected
    assert outcome.output == json.dumps(expected, ensure_ascii=False)
    at_the_end, _ = run(f"{one_task('output: text')}data: {data}", n=7)
    assert at_the_end.data == expected
    assert at_the_end.output == "text"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("fail: 'out of {{ what }}'", "out of tokens"),
        ("output: '{{ missing }}'", "the template of the output of task t failed: 'missing' is undefined"),
        ("output: '{{ what.__class__.__mro__ }}'", "failed: access to attribute '__class__'"),
        ("output: '{% if what %}'", "the template of the output of task t failed: Unexpected end of template"),
        ("output: '{{ 1 / 0 }}'", "failed: division by zero"),
        ("data: '{{ what }}'", "the data of task t is not JSON"),
    ],
)
def test_failures(task: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        run(one_task(task), what="tokens")


@pytest.mark.parametrize(("speed", "seconds"), [(1, 0.2), (4, 0.05), (float("inf"), 0)])
def test_speed(monkeypatch: pytest.MonkeyPatch, speed: float, seconds: float) -> None:
    pauses, sleep = list[float](), asyncio.sleep

    async def noted(pause: float) -> None:
        if threading.current_thread() is threading.main_thread():  # not that of a server of other tests
            pauses.append(pause)
        await sleep(pause)

    monkeypatch.setattr(asyncio, "sleep", noted)
    run(one_task("seconds: '{{ n }}'\n    steps: [{content: a}]"), speed=speed, n=0.2)
    assert pauses == [seconds / 2] * 2


@pytest.mark.parametrize("speed", [0, -1, float("nan")])
def test_speed_that_is_none_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match=f"The speed is {speed:g}. Give a number above 0"):
        load_program("echo", speed=speed)


@pytest.mark.parametrize(
    ("budget", "interests", "duration", "age", "parts"),
    [
        ("1000 USD", "games, tech, hikes", "7 days", "35", ["# Kyoto, Japan: 7 days", "money: 1,000 USD", "**At 35**"]),
        ("€ 2,500.50", "HIKES; the sea", "2 weeks", "64", ["# Madeira, Portugal: 14 days", "€2,500", "senior"]),
        (900, "food", 1, 21, ["# Bologna, Italy: 1 day\n", "## The money: 900\n", "youth"]),
        (None, ["food", "wine"], 99999, True, ["# Bologna, Italy: 14 days"]),
    ],
)
def test_the_travel_crew(budget: Any, interests: Any, duration: Any, age: Any, parts: list[str]) -> None:
    travel = load_script("travel")
    assert 3 <= sum(float(task.seconds) for task in travel.tasks) <= 5, "long enough to see it run, and no longer"
    inputs = {"budget": budget, "interests": interests, "duration": duration, "age": age}
    outcome = asyncio.run(ScriptedProgram(travel, speed=float("inf")).execute(Run(inputs)))
    assert [part for part in parts if part not in outcome.output] == []
    assert "{{" not in outcome.output
    assert outcome.data["destination"] in outcome.output
    days = [line for line in outcome.output.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len({line.split("|", 2)[2] for line in days}) == len(days), "no two days are the same"
