"""What scripted crews do while they run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import pytest

from prefect_crew.client.models import TaskResult
from prefect_crew.devserver.runs import Answer, Outcome, ProgramError
from prefect_crew.devserver.scripts import ScriptedProgram, load_script, parse_script


class Recorder:
    """A `Run` that keeps what the program tells, and answers from a list."""

    id = "run-1"
    stop_requested = False

    def __init__(self, inputs: Mapping[str, Any], answers: list[Answer]) -> None:
        self.inputs = inputs
        self.answers = answers
        self.told: list[Any] = []
        self.asked: list[str] = []

    def plan(self, tasks: list[str]) -> None:
        self.told.append(("plan", *tasks))

    def task_started(self, name: str, *, agent: str | None = None, description: str | None = None) -> None:
        self.told.append(("started", name, agent, description))

    def task_ended(self, task: TaskResult) -> None:
        self.told.append(("ended", task.name, task.output))

    def step(self, *, agent: str | None, kind: str, content: str, tool: str | None = None) -> None:
        self.told.append(("step", kind, content, tool))

    async def ask(self, *, task_id: str, output: str) -> Answer:
        self.asked.append(output)
        return self.answers.pop(0)


def run(text: str, *answers: Answer, speed: float = float("inf"), **inputs: Any) -> tuple[Outcome, Recorder]:
    recorder = Recorder(inputs, list(answers))
    return asyncio.run(ScriptedProgram(parse_script(text), speed=speed).execute(recorder)), recorder


def test_tasks_see_inputs_and_earlier_tasks() -> None:
    outcome, recorder = run(
        """
        name: x
        inputs: [who, {name: greeting, required: false, default: Hello}]
        tasks:
          - {name: first, agent: A, description: "greet {{ who }}", output: "{{ greeting }} {{ inputs['who'] }}"}
          - {name: second-task, output: "{{ tasks.first.output }}! {{ previous }}! {{ kickoff_id }}"}
        usage: {total_tokens: 4}
        """,
        who="Ann",
    )
    assert outcome.output == "Hello Ann! Hello Ann! run-1"
    assert outcome.usage is not None
    assert (outcome.usage.total_tokens, outcome.usage.prompt_tokens) == (4, None)
    assert recorder.told == [
        ("plan", "first", "second-task"),
        ("started", "first", "A", "greet Ann"),
        ("step", "final_answer", "Hello Ann", None),
        ("ended", "first", "Hello Ann"),
        ("started", "second-task", None, None),
        ("step", "final_answer", "Hello Ann! Hello Ann! run-1", None),
        ("ended", "second-task", "Hello Ann! Hello Ann! run-1"),
    ]


def test_steps() -> None:
    _, recorder = run(
        "name: x\ntasks: [{name: t, steps: [{content: 'a {{ n }}'}, {content: b, kind: tool, tool: web}]}]", n=1
    )
    assert recorder.told[2:4] == [("step", "thought", "a 1", None), ("step", "tool", "b", "web")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(
            "{a: '{{ n }}', b: [1, true, null, '{{ n }}']}", {"a": "7", "b": [1, True, None, "7"]}, id="mapping"
        ),
        pytest.param("['{{ n }}', {c: d}]", ["7", {"c": "d"}], id="list"),
        pytest.param("'{\"n\": {{ n }}}'", {"n": 7}, id="template-of-json"),
        pytest.param("3", 3, id="number"),
    ],
)
def test_structured_results(data: str, expected: Any) -> None:
    outcome, _ = run(f"name: x\ntasks: [{{name: t, data: {data}}}]", n=7)
    assert outcome.data == expected
    at_the_end, _ = run(f"name: x\ntasks: [{{name: t, output: text}}]\ndata: {data}", n=7)
    assert (at_the_end.data, at_the_end.output) == (expected, "text")


def test_the_text_of_a_structured_result_is_its_json() -> None:
    outcome, _ = run("name: x\ntasks: [{name: t, data: {a: [é]}}]")
    assert outcome.output == '{"a": ["é"]}'


@pytest.mark.parametrize(
    ("task", "said"),
    [
        pytest.param("fail: 'out of {{ what }}'", "out of tokens", id="says-so"),
        pytest.param(
            "output: '{{ missing }}'",
            "the output of task t could not be written: 'missing' is undefined",
            id="undefined",
        ),
        pytest.param(
            "output: '{{ what.__class__.__mro__ }}'",
            "could not be written: access to attribute '__class__'",
            id="sandbox",
        ),
        pytest.param("output: '{{ 1 / 0 }}'", "could not be written: division by zero", id="arithmetic"),
        pytest.param("output: '{{ [] | first + 1 }}'", "the output of task t could not be written", id="types"),
        pytest.param("data: '{{ what }}'", "the data of task t is not JSON", id="not-json"),
        pytest.param(
            "seconds: '{{ what }}'", "the seconds of task t must be a number of 0 or more, not 'tokens'", id="seconds"
        ),
        pytest.param("seconds: '-1'", "must be a number of 0 or more", id="negative-seconds"),
        pytest.param("seconds: 'nan'", "must be a number of 0 or more", id="nan-seconds"),
    ],
)
def test_failures(task: str, said: str) -> None:
    with pytest.raises(ProgramError, match=said):
        run(f"name: x\ntasks:\n  - name: t\n    {task}\n", what="tokens")


def test_a_failure_that_renders_to_nothing_is_none() -> None:
    outcome, _ = run(
        "name: x\ntasks: [{name: t, output: ok, fail: \"{% if what == 'bad' %}no{% endif %}\"}]", what="good"
    )
    assert outcome.output == "ok"


REVIEWED = """
name: x
tasks:
  - name: draft
    output: "draft {{ round }}{% if feedback %} ({{ feedback }}){% endif %}"
    human: true
    max_rounds: 2
  - {name: final, output: "final {{ previous }}"}
"""


def test_a_rejected_task_runs_again_with_the_feedback() -> None:
    outcome, recorder = run(REVIEWED, Answer(False, "shorter"), Answer(True, ""))
    assert recorder.asked == ["draft 1", "draft 2 (shorter)"]
    assert outcome.output == "final draft 2 (shorter)"
    assert [told[1:] for told in recorder.told if told[0] == "ended"] == [
        ("draft", "draft 2 (shorter)"),
        ("final", "final draft 2 (shorter)"),
    ]


def test_too_many_rounds() -> None:
    with pytest.raises(ProgramError, match="task draft was rejected 2 times, last with: no"):
        run(REVIEWED, Answer(False, "shorter"), Answer(False, "no"))


@pytest.mark.parametrize(("speed", "seconds"), [(1, 0.3), (3, 0.1), (float("inf"), 0)])
def test_speed(speed: float, seconds: float) -> None:
    began = time.monotonic()
    outcome, _ = run(
        "name: x\ntasks: [{name: t, seconds: '{{ n }}', output: x, steps: [{content: a}]}]", speed=speed, n=0.3
    )
    assert seconds <= time.monotonic() - began < seconds + 2
    assert outcome.output == "x"


TRAVEL = load_script("travel")


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        pytest.param(
            {
                "budget": "1000 USD",
                "interests": "games, tech, ai, relaxing hikes, amazing food",
                "duration": "7 days",
                "age": "35",
            },
            ["# Kyoto, Japan: 7 days", "## The money: 1,000 USD", "| 7 |", "**At 35**"],
            id="the-apis-example",
        ),
        pytest.param(
            {"budget": "€ 2,500.50", "interests": "HIKES; the sea", "duration": "2 weeks", "age": "64"},
            ["# Madeira, Portugal: 14 days", "## The money: €2,500", "| 14 |", "senior"],
            id="hikes",
        ),
        pytest.param(
            {"budget": 900, "interests": "food", "duration": 1, "age": 21},
            ["# Bologna, Italy: 1 day\n", "## The money: 900\n", "| 1 |", "youth card"],
            id="numbers",
        ),
        pytest.param(
            {"budget": "", "interests": "", "duration": "a while", "age": "none of your business"},
            ["# Kyoto, Japan: 5 days", "## The money: 1,000"],
            id="nothing-to-go-by",
        ),
        pytest.param(
            {"budget": None, "interests": ["food", "wine"], "duration": 99999, "age": True},
            ["# Bologna, Italy: 14 days"],
            id="odd-types",
        ),
    ],
)
def test_the_travel_crew(inputs: dict[str, Any], parts: list[str]) -> None:
    outcome = asyncio.run(ScriptedProgram(TRAVEL, speed=float("inf")).execute(Recorder(inputs, [])))
    for part in parts:
        assert part in outcome.output
    assert "{{" not in outcome.output
    assert "\n\n\n" not in outcome.output
    assert outcome.data["destination"] in outcome.output
    days = [
        line for line in outcome.output.splitlines() if line.startswith("| ") and line.split("|")[1].strip().isdigit()
    ]
    assert len({line.split("|", 2)[2] for line in days}) == len(days), "no two days are the same"


def test_the_travel_crew_takes_three_to_five_seconds() -> None:
    assert len(TRAVEL.tasks) == 3
    assert 3 <= sum(float(task.seconds) for task in TRAVEL.tasks) <= 5
