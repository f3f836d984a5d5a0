"""Scripted crews: YAML files that say what a crew does."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Hashable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from prefect_crew.client.models import CrewInput, TaskResult, TokenUsage
from prefect_crew.devserver.faults import Fault
from prefect_crew.devserver.runs import Outcome, ProgramError, Run

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


_CREWS = files("prefect_crew.devserver") / "crews"


class ScriptError(ValueError):
    """A script that cannot be used. The text names the file, the line, the field and what is wrong."""


def bundled_scripts() -> list[str]:
    """Return the names of the crews that come with this package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _CREWS.iterdir() if entry.name.endswith(".yaml"))


def load_script(path_or_name: str | os.PathLike[str]) -> CrewScript:
    """Read a script from a file, or one of this package's by its name.

    Raises:
        ScriptError: There is no such file or name, or what it holds is not a crew.
    """
    name = os.fspath(path_or_name)
    path = Path(name)
    if name in bundled_scripts() and not path.is_file():
        return parse_script((_CREWS / f"{name}.yaml").read_text(encoding="utf-8"), source=f"{name}.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        known = ", ".join(bundled_scripts())
        raise ScriptError(f"Cannot read the crew {name}: {reason}. Give a YAML file, or one of: {known}.") from error
    return parse_script(text, source=name)


def parse_script(text: str, *, source: str = "script") -> CrewScript:
    """Read a script from text. `source` is what errors call it.

    Raises:
        ScriptError: Not YAML, or not a crew.
    """
    try:
        node = cast("yaml.Node | None", yaml.compose(text, Loader=yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ScriptError(f"{source}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(value, dict):
        raise ScriptError(f"{source}:1:1: a crew is a mapping with a name and tasks, not {type(value).__name__}")
    try:
        if twice := _repeated(node):
            line, column = _position(twice)
            raise ScriptError(f"{source}:{line}:{column}: {_plain(twice.value)} is given twice")
        return CrewScript.model_validate(value)
    except ValidationError as error:
        raise ScriptError("\n".join(_lines(error, node, source))) from None
    except RecursionError:
        raise ScriptError(f"{source}:1:1: something in it holds itself, or is nested too deep") from None


def schema() -> dict[str, Any]:
    """Return the JSON schema of a crew script, as `crew.schema.json` publishes it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **CrewScript.model_json_schema()}


def _lines(error: ValidationError, root: yaml.Node | None, source: str) -> list[str]:
    said: dict[tuple[int, int, str], list[str]] = {}
    for item in error.errors(include_url=False, include_context=False):
        path = [part for part in item["loc"] if part not in _UNION_ARMS]
        mark = _find(root, path)
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{_plain(part)}" for part in path).lstrip(".")
        message = item["msg"].removeprefix("Value error, ")
        message = "there is no such field" if item["type"] == "extra_forbidden" else message
        said.setdefault((*mark, name), []).append(message)
    return [
        # Several messages about one place are the alternatives of a union.
        f"{source}:{line}:{column}: {f'{name}: ' if name else ''}{' or '.join(dict.fromkeys(messages))}"
        for (line, column, name), messages in sorted(said.items())
    ]


def _plain(key: str) -> str:
    return key if key.isprintable() else ascii(key)


_UNION_ARMS = ("str", "float")
"""What pydantic puts into an error's place for the alternatives of a union; nobody's field has these names."""


def _find(node: yaml.Node | None, path: list[Any]) -> tuple[int, int]:
    """Follow a path into the YAML as far as it goes; return the line and column there, from 1."""
    for part in path:
        child: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            child = next((value for key, value in node.value if key.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
        if child is None:
            break
        node = child
    return _position(node)


def _position(node: yaml.Node | None) -> tuple[int, int]:
    return (node.start_mark.line + 1, node.start_mark.column + 1) if node is not None else (1, 1)


def _repeated(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """Return a key that stands twice in one mapping: YAML would silently take the last."""
    children: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    return key
                seen.add(key.value)
            children.append(value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    return next((found for child in children if (found := _repeated(child))), None)


if __name__ == "__main__":
    target = Path(__file__).with_name("crew.schema.json")
    target.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
