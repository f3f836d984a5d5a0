"""Reading scripts: what is accepted, and errors that say where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from prefect_crew.devserver import CrewScript, ScriptError, load_script
from prefect_crew.devserver import scripts as module
from prefect_crew.devserver.scripts import bundled_scripts, parse_script, schema

FULL = """
name: full
description: Everything at once.
inputs:
  - topic
  - {name: audience, type: string, required: false, description: Who reads it., default: everyone}
tasks:
  - name: research
    agent: Researcher
    description: "Look at {{ topic }}"
    expected_output: facts
    seconds: "{{ 0.1 if audience == 'everyone' else 2 }}"
    output: "facts"
    data: {topic: "{{ topic }}", words: [1, "{{ audience }}"]}
    steps: [{content: "reading about {{ topic }}", kind: tool, tool: search}]
    human: true
    max_rounds: 2
  - {name: write, fail: "{% if topic == 'x' %}no{% endif %}", seconds: 2}
output: "{{ tasks.write.output }}"
data: '{"a": 1}'
usage: {total_tokens: 10}
faults: ["status:500@1"]
seed: 4
"""


def test_everything_at_once() -> None:
    script = parse_script(FULL)
    assert [spec.name for spec in script.inputs] == ["topic", "audience"]
    assert script.inputs[1].default == "everyone"
    assert script.tasks[0].max_rounds == 2


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        pytest.param("name: x\ntasks: [\n", ["c.yaml:3:1: not YAML: "], id="not-yaml"),
        pytest.param("- a\n", ["c.yaml:1:1: a crew is a mapping with a name and tasks, not list"], id="a-list"),
        pytest.param("", ["c.yaml:1:1: a crew is a mapping with a name and tasks, not NoneType"], id="empty"),
        pytest.param("name: x\n", ["c.yaml:1:1: tasks: Field required"], id="no-tasks"),
        pytest.param("name: x\ntasks: []\n", ["c.yaml:2:8: tasks: List should have at least 1 item"], id="empty-tasks"),
        pytest.param(
            "name: x\ntasks:\n  - name: t\n    second: 3\n",
            ["c.yaml:4:13: tasks[0].second: there is no such field"],
            id="misspelt",
        ),
        pytest.param(
            "name: x\ntasks:\n  - name: t\n    seconds: -3\n",
            ["c.yaml:4:14: tasks[0].seconds: must be 0 or more"],
            id="negative",
        ),
        pytest.param(
            "name: x\ntasks:\n  - name: t\n    seconds: .inf\n",
            ["c.yaml:4:14: tasks[0].seconds: must be 0 or more"],
            id="endless",
        ),
        pytest.param(
            "name: x\ntasks:\n  - name: t\n    output: |\n      {% if a %}\n      b\n",
            ["c.yaml:4:13: tasks[0].output: not a template: Unexpected end of template"],
            id="template",
        ),
        pytest.param(
            "name: x\ntasks:\n  - {name: t, data: {a: ['{{']}}\n",
            ["tasks[0].data: not a template"],
            id="template-within-data",
        ),
        pytest.param(
            "name: x\ntasks:\n  - name: t\n    human: perhaps\n    agent: 3\n",
            [
                "c.yaml:4:12: tasks[0].human: Input should be a valid boolean",
                "c.yaml:5:12: tasks[0].agent: Input should be",
            ],
            id="two-at-once",
        ),
        pytest.param("name: x\ntasks: [{name: t}, {name: t}]\n", ["tasks with the same name: t"], id="same-task-twice"),
        pytest.param(
            "name: x\ninputs: [a, {name: a}]\ntasks: [{name: t}]\n", ["inputs with the same name: a"], id="input-twice"
        ),
        pytest.param(
            "name: x\ntasks:\n  - name: t\n    name: u\n", ["c.yaml:4:5: name is given twice"], id="key-twice"
        ),
        pytest.param(
            "name: x\ninputs: [{type: a}]\ntasks: [{name: t}]\n",
            ["c.yaml:2:10: inputs[0].name: Field"],
            id="input-name",
        ),
        pytest.param(
            "name: x\ntasks: [{name: t}]\nfaults: ['status:explode']\n", ["faults[0]: There is no fault"], id="fault"
        ),
        pytest.param("name: x\ntasks: [{name: t, data: &d [*d]}]\n", ["something in it holds itself"], id="cycle"),
        pytest.param(
            "name: x\ntasks: [{name: t, output: a, human: !!python/object:os.x {}}]\n", ["not YAML"], id="unsafe"
        ),
    ],
)
def test_errors_say_where(tmp_path: Path, text: str, lines: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ScriptError) as caught:
        load_script(path)
    said = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert len(said) == len(lines)
    for line, start in zip(said, lines, strict=True):
        assert start in line
        assert line.startswith("c.yaml:")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ScriptError, match=r"Cannot read the crew nowhere\.yaml: No such file or directory"):
        load_script("nowhere.yaml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ScriptError, match="it is not UTF-8 text"):
        load_script(tmp_path / "c.yaml")


def test_a_file_goes_before_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_script("echo").name == "echo"
    (tmp_path / "echo").write_text("name: mine\ntasks: [{name: t}]")
    assert load_script("echo").name == "mine"


@pytest.mark.parametrize("name", bundled_scripts())
def test_bundled_scripts_are_fine(name: str) -> None:
    script = load_script(name)
    assert script.name == name
    assert script.description


def test_the_published_schema_is_current() -> None:
    published = Path(module.__file__).with_name("crew.schema.json")
    assert json.loads(published.read_text(encoding="utf-8")) == schema(), (
        "run: python -m prefect_crew.devserver.scripts"
    )


def test_every_field_of_the_schema_is_described() -> None:
    definitions = [schema(), *(one for name, one in schema()["$defs"].items() if name != "TokenUsage")]
    for definition in definitions:
        for name, field in definition["properties"].items():
            assert field.get("description", "").endswith("."), name


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_no_yaml_raises_anything_else(value: object) -> None:
    try:
        parse_script(yaml.safe_dump(value))
    except ScriptError as error:
        lines = str(error).splitlines()
    else:
        lines = ["script:1:1: "]
    assert all(re.match(r"script:\d+:\d+: ", line) for line in lines)


@given(
    st.dictionaries(
        st.sampled_from([*CrewScript.model_fields, "other"]),
        st.none()
        | st.integers()
        | st.text(max_size=5)
        | st.lists(st.dictionaries(st.sampled_from(["name", "seconds"]), st.text())),
    )
)
def test_no_mapping_raises_anything_else(value: dict[str, object]) -> None:
    try:
        parse_script(yaml.safe_dump(value))
    except ScriptError as error:
        assert re.match(r"script:\d+:\d+: ", str(error))  # noqa: PT017 - a valid script is fine too
