"""Scripted crews: what a crew does, told in a YAML file.

    name: greeter
    inputs: [who]
    tasks:
      - name: greet
        agent: Host
        seconds: 0.5
        output: "Hello, {{ who }}!"

Texts are Jinja2 templates, run in its sandbox, over the inputs by name (`who`, or `inputs["who"]`), the earlier tasks
(`tasks.greet.output`, `tasks.greet.data`; `previous` is the last output), `feedback` and `round` where a person has
rejected the task, and `kickoff_id`. `crew.schema.json` beside this module is the schema, for editors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Annotated, Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from prefect_crew.api.models import CrewInput, TaskResult, TokenUsage
from prefect_crew.server.faults import Fault
from prefect_crew.server.program import Outcome, ProgramError, Run

__all__ = ["CrewScript", "InputSpec", "ScriptedProgram", "StepSpec", "TaskSpec"]

_JINJA = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _checked(template: Any) -> Any:
    """Refuse a template that Jinja2 cannot read, where it stands and not when it is first used."""
    if isinstance(template, str):
        try:
            _JINJA.parse(template)
        except TemplateSyntaxError as error:
            raise ValueError(f"not a template: {error.message} (line {error.lineno} of the text)") from None
    elif isinstance(template, dict):
        for value in template.values():  # pyright: ignore[reportUnknownVariableType]
            _checked(value)
    elif isinstance(template, list):
        for value in template:  # pyright: ignore[reportUnknownVariableType]
            _checked(value)
    return template  # pyright: ignore[reportUnknownVariableType]


class InputSpec(_Part):
    """One input of the crew."""

    name: str = Field(min_length=1, description="Name of the input.")
    type: str = Field(default="string", description="What GET /inputs says its type is; nothing is checked.")
    required: bool = Field(default=True, description="A kickoff without a required input is answered with 422.")
    description: str | None = Field(default=None, description="What the input is for.")
    default: Any = Field(default="", description="What templates see when the input is not given.")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _fault(text: str) -> str:
    Fault.parse(text)
    return text


class StepSpec(_Part):
    """One thing that an agent does within a task; step webhooks tell of it."""

    kind: str = Field(default="thought", description="Kind of step, such as thought or tool.")
    content: str = Field(description="What the agent says or finds: a template.")
    tool: str | None = Field(default=None, description="Name of the tool used.")

    _template = field_validator("content")(_checked)


class TaskSpec(_Part):
    """One task of the crew. Tasks run one after another."""

    name: str = Field(min_length=1, description="Name of the task, and its id in status bodies and webhooks.")
    agent: str | None = Field(default=None, description="Role of the agent.")
    description: str | None = Field(default=None, description="What the task is: a template.")
    expected_output: str | None = Field(default=None, description="What the task should give: a template.")
    seconds: float | str = Field(default=0.0, description="How long it takes: a number, or a template that gives one.")
    output: str = Field(default="", description="What it gives: a template.")
    data: Any = Field(
        default=None, description="A structured result: a mapping or list of templates, or a template that gives JSON."
    )
    fail: str | None = Field(
        default=None, description="The error to fail with: a template. What renders to nothing does not fail."
    )
    human: bool = Field(default=False, description="After the task, a person must approve it or reject it.")
    max_rounds: int = Field(default=3, ge=1, description="The crew fails when a task was rejected this many times.")
    steps: list[StepSpec] = Field(default_factory=list[StepSpec], description="Spread evenly over the task's seconds.")

    _templates = field_validator("description", "expected_output", "output", "data", "fail")(_checked)

    @field_validator("seconds")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, str):
            return _checked(value)
        if not 0 <= value < float("inf"):
            raise ValueError("must be 0 or more")
        return value


class CrewScript(_Part):
    """A whole crew."""

    name: str = Field(min_length=1, description="Name of the crew.")
    description: str | None = Field(default=None, description="What the crew does.")
    flow: bool = Field(
        default=False, description="Whether it is a Flow: its input `id` must be a UUID, and its end is streamed."
    )
    inputs: list[Annotated[InputSpec, BeforeValidator(_named, json_schema_input_type=str | InputSpec)]] = Field(
        default_factory=list[InputSpec], description="Names of the inputs, or more about each."
    )
    tasks: list[TaskSpec] = Field(min_length=1, description="What the crew does, in order.")
    output: str | None = Field(default=None, description="The result, a template; left out, the last task's output.")
    data: Any = Field(default=None, description="The structured result; left out, the last task's data.")
    usage: TokenUsage | None = Field(default=None, description="Tokens that a run reports.")
    faults: list[Annotated[str, AfterValidator(_fault)]] = Field(
        default_factory=list[str], description="What the server does wrong, such as kickoff:drop-after-accept@1."
    )
    seed: int = Field(default=0, description="Seed of the faults that come at random.")

    _templates = field_validator("output", "data")(_checked)

    @model_validator(mode="after")
    def _unique(self) -> CrewScript:
        for what, names in (("inputs", [i.name for i in self.inputs]), ("tasks", [t.name for t in self.tasks])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what} with the same name: {', '.join(twice)}")
        return self


class ScriptedProgram:
    """Runs a script.

    Args:
        script: The crew.
        speed: Seconds of the script are divided by it; 10 is ten times as fast, `float("inf")` takes no time.
    """

    def __init__(self, script: CrewScript, *, speed: float = 1.0) -> None:
        if not speed > 0:
            raise ValueError(f"speed must be above 0, not {speed:g}: 2 is twice as fast")
        self.script = script
        self.speed = speed
        self._inputs = [
            CrewInput(
                name=spec.name,
                type=spec.type,
                description=spec.description,
                required=spec.required,
                default=spec.default if "default" in spec.model_fields_set else None,
            )
            for spec in script.inputs
        ]

    @property
    def name(self) -> str:
        """The script's name."""
        return self.script.name

    @property
    def flow(self) -> bool:
        """Whether the script is a Flow."""
        return self.script.flow

    def inputs(self) -> list[CrewInput]:
        """The script's inputs."""
        return list(self._inputs)

    async def execute(self, run: Run) -> Outcome:
        """Run all tasks one after another.

        Raises:
            ProgramError: A task says so, a template needs what is not there, or a task was rejected too often.
        """
        given = {spec.name: spec.default for spec in self.script.inputs} | dict(run.inputs)
        done: dict[str, TaskResult] = {}
        scope: dict[str, Any] = {**given, "inputs": given, "tasks": done, "previous": "", "kickoff_id": run.id}
        run.plan([task.name for task in self.script.tasks])
        for task in self.script.tasks:
            result = await self._task(run, task, scope)
            done[task.name] = result
            scope["previous"] = result.output
            run.task_ended(result)
        last = done[self.script.tasks[-1].name]
        data = last.data if self.script.data is None else _data(self.script.data, scope, "data")
        text = (last.output or "") if self.script.output is None else _text(self.script.output, scope, "output")
        if not text and data is not None:
            text = json.dumps(data, ensure_ascii=False)  # as CrewAI does: the text of a structured result is its JSON
        return Outcome(output=text, data=data, usage=self.script.usage)

    async def _task(self, run: Run, task: TaskSpec, scope: Mapping[str, Any]) -> TaskResult:
        scope = {**scope, "feedback": "", "round": 1}
        while True:
            result = await self._attempt(run, task, scope)
            if not task.human:
                return result
            answer = await run.ask(task_id=task.name, output=result.output or "")
            if answer.approve:
                return result
            if scope["round"] >= task.max_rounds:
                raise ProgramError(
                    f"task {task.name} was rejected {scope['round']} times, last with: {answer.feedback}"
                )
            scope = {**scope, "feedback": answer.feedback, "round": scope["round"] + 1}

    async def _attempt(self, run: Run, task: TaskSpec, scope: Mapping[str, Any]) -> TaskResult:
        def field(name: str, template: str | None) -> str | None:
            return None if template is None else _text(template, scope, f"{name} of task {task.name}")

        description = field("description", task.description)
        run.task_started(task.name, agent=task.agent, description=description)
        seconds = _seconds(task, scope)
        began = asyncio.get_running_loop().time()
        for step in task.steps:
            await asyncio.sleep(seconds / self.speed / (len(task.steps) + 1))
            content = _text(step.content, scope, f"step of task {task.name}")
            run.step(agent=task.agent, kind=step.kind, content=content, tool=step.tool)
        await asyncio.sleep(seconds / self.speed / (len(task.steps) + 1))
        if failure := (field("fail", task.fail) or "").strip():
            raise ProgramError(failure)
        data = None if task.data is None else _data(task.data, scope, f"data of task {task.name}")
        output = field("output", task.output) or ""
        if not output and data is not None:
            output = json.dumps(data, ensure_ascii=False)
        if not task.steps:
            run.step(agent=task.agent, kind="final_answer", content=output)
        return TaskResult(
            name=task.name,
            agent=task.agent,
            output=output,
            data=data,
            execution_time=round(asyncio.get_running_loop().time() - began, 3),
            description=description,
            raw={"expected_output": field("expected_output", task.expected_output) or ""},
        )


def _text(template: str, scope: Mapping[str, Any], where: str) -> str:
    try:
        return _JINJA.from_string(template).render(scope)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ProgramError(f"the {where} could not be written: {error}") from error


def _data(template: Any, scope: Mapping[str, Any], where: str) -> Any:
    if isinstance(template, str):
        text = _text(template, scope, where)
        try:
            return json.loads(text)
        except ValueError as error:
            raise ProgramError(f"the {where} is not JSON: {error}") from error
    return _filled(template, scope, where)


def _filled(value: Any, scope: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, str):
        return _text(value, scope, where)
    if isinstance(value, Mapping):
        return {str(key): _filled(item, scope, where) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list):
        return [_filled(item, scope, where) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _seconds(task: TaskSpec, scope: Mapping[str, Any]) -> float:
    if not isinstance(task.seconds, str):
        return task.seconds
    text = _text(task.seconds, scope, f"seconds of task {task.name}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ProgramError(f"the seconds of task {task.name} must be a number of 0 or more, not {text!r}")
    return seconds
