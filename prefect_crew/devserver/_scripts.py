"""Scripted crews: YAML files with the tasks of a crew and their outputs."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prefect_crew._text import problems_of
from prefect_crew.client.models import CrewInput, TaskResult, TokenUsage
from prefect_crew.devserver._runs import Outcome, Program, ProgramError, Run

_JINJA = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)
BUNDLED = ("echo", "travel")
"""The crews that come with this package."""


class _Part(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


class InputSpec(_Part):
    """One input of the crew."""

    name: str = Field(min_length=1, description="Name of the input.")
    type: str = Field(default="string", description="Type that GET /inputs reports. Values are not checked.")
    required: bool = Field(default=True, description="A kickoff without a required input is answered with 422.")
    description: str | None = Field(default=None, description="Purpose of the input.")
    default: Any = Field(default=None, description="Value that templates see if a kickoff leaves the input out.")


class StepSpec(_Part):
    """One thing that an agent does within a task; step webhooks report it."""

    kind: str = Field(default="thought", description="Kind of step, such as thought or tool.")
    content: str = Field(description="Text of the step: a template.")
    tool: str | None = Field(default=None, description="Name of the tool used.")


class TaskSpec(_Part):
    """One task of the crew. Tasks run one after another."""

    name: str = Field(min_length=1, description="Name of the task, and its id in status bodies and webhooks.")
    agent: str | None = Field(default=None, description="Role of the agent.")
    description: str | None = Field(default=None, description="Description of the task: a template.")
    expected_output: str | None = Field(default=None, description="The output that the task should give: a template.")
    seconds: float | str = Field(default=0.0, description="How long it takes: a number, or a template that gives one.")
    output: str = Field(default="", description="Output of the task: a template.")
    data: Any = Field(
        default=None, description="A structured result: a mapping or list of templates, or a template that gives JSON."
    )
    fail: str | None = Field(
        default=None, description="The error to fail with: a template. The task does not fail if it renders to nothing."
    )
    human: bool = Field(
        default=False, description="After the task, a person must approve it. The crew does a rejected task again."
    )
    steps: list[StepSpec] = Field(default_factory=list[StepSpec], description="Spread evenly over the task's seconds.")


def _as_input(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class CrewScript(_Part):
    """A whole crew."""

    name: str = Field(min_length=1, description="Name of the crew.")
    description: str | None = Field(default=None, description="Description of the crew.")
    flow: bool = Field(
        default=False,
        description="Whether it is a Flow: its end is streamed, and it keeps a `state` under its kickoff id.",
    )
    inputs: list[Annotated[InputSpec, BeforeValidator(_as_input, json_schema_input_type=str | InputSpec)]] = Field(
        default_factory=list[InputSpec], description="Names of the inputs, or more about each."
    )
    tasks: list[TaskSpec] = Field(min_length=1, description="Tasks of the crew, in order.")
    output: str | None = Field(default=None, description="The result, a template; left out, the last task's output.")
    data: Any = Field(default=None, description="The structured result; left out, the last task's data.")
    usage: TokenUsage | None = Field(default=None, description="Tokens that a run reports.")


class ScriptedProgram:
    """Runs a script. Its seconds are divided by `speed`: 10 is ten times as fast, `float("inf")` takes no time.
    Raises ValueError if it is not above 0.

    `states` has the states of a Flow by their ids, as CrewAI's `@persist` keeps them: after each task.
    """

    def __init__(self, script: CrewScript, *, speed: float = 1.0) -> None:
        if not speed > 0:  # nor NaN
            raise ValueError(f"The speed is {speed:g}. Give a number above 0; inf takes no time.")
        self.script = script
        self.speed = speed
        self.name = script.name
        self.flow = script.flow
        self.states: dict[str, dict[str, Any]] = {}

    def inputs(self) -> list[CrewInput]:
        return [CrewInput(**spec.model_dump()) for spec in self.script.inputs]

    def definition(self) -> dict[str, Any]:
        return self.script.model_dump(mode="json")

    async def execute(self, run: Run) -> Outcome:
        script = self.script
        inputs = {spec.name: "" if spec.default is None else spec.default for spec in script.inputs} | dict(run.inputs)
        results, state = dict[str, TaskResult](), self._state_of(run)
        scope: dict[str, Any] = {**inputs, "inputs": inputs, "tasks": results, "previous": "", "kickoff_id": run.id}
        scope["state"] = state
        run.plan([task.name for task in script.tasks])
        for task in script.tasks:
            try:
                result = results[task.name] = await self._reviewed(run, task, scope)
            except ProgramError:
                run.usage = script.usage  # a crew that failed has used its tokens as well
                raise
            scope["previous"] = result.output
            if self.flow:
                self.states[state["id"]] = {**state, **inputs, "id": state["id"], "output": result.output}
            run.task_ended(result)
        last = results[script.tasks[-1].name]
        data = last.data if script.data is None else _filled_data(script.data, scope, "data")
        text = (last.output or "") if script.output is None else _filled(script.output, scope, "output")
        return Outcome(output=text or _text_of(data), data=data, usage=script.usage)

    def _state_of(self, run: Run) -> dict[str, Any]:
        """Return the state from which a run starts: a copy of the state to restore, else its own of before, else none.

        Its id is the kickoff id, or the input `id`. As in CrewAI, a state that is not known gives no error. `turn`
        counts the runs of a chain of states.
        """
        own = str(run.inputs.get("id") or run.id)
        before = self.states.get(str(run.restore_from)) or self.states.get(own) or {"turn": 0, "output": ""}
        return {**before, "id": own, "turn": before["turn"] + 1}

    async def _reviewed(self, run: Run, task: TaskSpec, scope: Mapping[str, Any]) -> TaskResult:
        """Do a task, again for each rejection."""
        feedback = ""
        for round_ in count(1):
            result = await self._attempt(run, task, {**scope, "feedback": feedback, "round": round_})
            if not task.human or (answer := await run.ask(task_id=task.name, output=result.output or "")).approve:
                return result
            feedback = answer.feedback
        raise AssertionError  # a count has no end

    async def _attempt(self, run: Run, task: TaskSpec, scope: Mapping[str, Any]) -> TaskResult:
        def field(name: str) -> str:
            return _filled(str(getattr(task, name) or ""), scope, f"{name} of task {task.name}")

        run.task_started(task.name, agent=task.agent)
        pause = float(field("seconds") or 0) / self.speed / (len(task.steps) + 1)
        began = asyncio.get_running_loop().time()
        for step in task.steps:
            await asyncio.sleep(pause)
            content = _filled(step.content, scope, f"step of task {task.name}")
            run.step(agent=task.agent, kind=step.kind, content=content, tool=step.tool)
        await asyncio.sleep(pause)
        if failure := field("fail").strip():
            raise ProgramError(failure)
        data = _filled_data(task.data, scope, f"data of task {task.name}")
        output = field("output") or _text_of(data)
        if not task.steps:
            run.step(agent=task.agent, kind="final_answer", content=output)
        return TaskResult(
            name=task.name,
            agent=task.agent,
            output=output,
            data=data,
            execution_time=round(asyncio.get_running_loop().time() - began, 3),
            description=field("description") or None,
            raw={"expected_output": field("expected_output")},
        )


def _text_of(data: Any) -> str:
    """Return the text of a structured result, as CrewAI does: its JSON."""
    return "" if data is None else json.dumps(data, ensure_ascii=False)


def _filled(value: Any, scope: Mapping[str, Any], where: str) -> Any:
    """Return a value with each text in it filled as a template."""
    if isinstance(value, dict):
        return {name: _filled(part, scope, where) for name, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_filled(part, scope, where) for part in cast("list[Any]", value)]
    if not isinstance(value, str):
        return value
    try:
        return _JINJA.from_string(value).render(scope)
    except Exception as error:
        raise ProgramError(f"the template of the {where} failed: {error}") from error


def _filled_data(data: Any, scope: Mapping[str, Any], where: str) -> Any:
    value = _filled(data, scope, where)
    try:
        return json.loads(value) if isinstance(data, str) else value
    except ValueError as error:
        raise ProgramError(f"the {where} is not JSON: {error}") from error


def load_script(source: str | os.PathLike[str]) -> CrewScript:
    """Return a script from its text (several lines), from a file, or by the name of a crew of this package.

    Raises:
        ValueError: There is no such file or name, or its content is no crew.
    """
    text = name = os.fspath(source)
    if "\n" in text:
        name = "script"
    else:
        bundled = Path(__file__).with_name("crews") / f"{name}.yaml"
        path = bundled if name in BUNDLED and not Path(name).is_file() else Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            names = ", ".join(BUNDLED)
            raise ValueError(f"Cannot read the crew {name}: {error}. Give a YAML file, or one of: {names}.") from error
    try:
        return CrewScript.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        fields = {field for model in (CrewScript, TaskSpec, StepSpec, InputSpec) for field in model.model_fields}
        raise ValueError("\n".join(f"{name}: {problem}" for problem in problems_of(error, sorted(fields)))) from None


Spec = str | os.PathLike[str] | CrewScript | Program
"""A crew to serve; see `load_program`."""


def load_program(spec: Spec, *, speed: float = 1.0) -> Program:
    """Return a crew that the server can run. `speed` divides the seconds of a script.

    Args:
        spec: `module:factory` or `path/to/file.py:factory` for CrewAI code (needs the extra `crewai`), the path of a
            YAML file, its text (several lines), the name of a crew of this package ("echo" or "travel"), a script, or
            a program, which is returned as it is.

    Raises:
        ValueError: The script is wrong or does not exist.
        ProgramNotFoundError: CrewAI is not installed, or the factory does not exist or builds no crew.
    """
    if isinstance(spec, CrewScript):
        return ScriptedProgram(spec, speed=speed)
    if not isinstance(spec, (str, os.PathLike)):
        return spec
    text = os.fspath(spec)
    if re.fullmatch(r"([A-Za-z_][\w.]*|.+\.py):[A-Za-z_][\w.]*", text) and not Path(text).exists():
        from prefect_crew.devserver._crewai import load_crewai

        return load_crewai(text)
    if text.endswith(".py"):
        raise ValueError(f"{text} is Python code. Name the function or class that builds the crew: {text}:NAME.")
    return ScriptedProgram(load_script(text), speed=speed)
