"""Scripted crews: YAML files that say what a crew does."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import yaml
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import SandboxedEnvironment
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from prefect_crew.client.models import CrewInput, TaskResult, TokenUsage
from prefect_crew.devserver._faults import Fault
from prefect_crew.devserver._runs import Outcome, ProgramError, Run

_JINJA = SandboxedEnvironment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)


class _Part(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


def _check_template(value: Any) -> Any:
    """Refuse a template that Jinja2 cannot read when the script is read, and not when it is first used."""
    if isinstance(value, str):
        try:
            _JINJA.parse(value)
        except TemplateSyntaxError as error:
            raise ValueError(f"not a template: {error.message} (line {error.lineno} of the text)") from None
    elif isinstance(value, dict):
        _check_template(list(cast("dict[Any, Any]", value).values()))
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            _check_template(item)
    return cast("Any", value)


def _check_seconds(value: float | str) -> float | str:
    if isinstance(value, float) and not 0 <= value < float("inf"):
        raise ValueError("must be 0 or more")
    return _check_template(value)


def _check_fault(text: str) -> str:
    Fault.parse(text)
    return text


def _as_input(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Template = Annotated[str, AfterValidator(_check_template)]
Data = Annotated[Any, AfterValidator(_check_template)]


class InputSpec(_Part):
    """One input of the crew."""

    name: str = Field(min_length=1, description="Name of the input.")
    type: str = Field(default="string", description="What GET /inputs says its type is; nothing is checked.")
    required: bool = Field(default=True, description="A kickoff without a required input is answered with 422.")
    description: str | None = Field(default=None, description="What the input is for.")
    default: Any = Field(default="", description="What templates see when the input is not given.")


class StepSpec(_Part):
    """One thing that an agent does within a task; step webhooks report it."""

    kind: str = Field(default="thought", description="Kind of step, such as thought or tool.")
    content: Template = Field(description="What the agent says or finds: a template.")
    tool: str | None = Field(default=None, description="Name of the tool used.")


class TaskSpec(_Part):
    """One task of the crew. Tasks run one after another."""

    name: str = Field(min_length=1, description="Name of the task, and its id in status bodies and webhooks.")
    agent: str | None = Field(default=None, description="Role of the agent.")
    description: Template | None = Field(default=None, description="What the task is: a template.")
    expected_output: Template | None = Field(default=None, description="What the task should give: a template.")
    seconds: Annotated[float | str, AfterValidator(_check_seconds)] = Field(
        default=0.0, description="How long it takes: a number, or a template that gives one."
    )
    output: Template = Field(default="", description="What it gives: a template.")
    data: Data = Field(
        default=None, description="A structured result: a mapping or list of templates, or a template that gives JSON."
    )
    fail: Template | None = Field(
        default=None, description="The error to fail with: a template. What renders to nothing does not fail."
    )
    human: bool = Field(default=False, description="After the task, a person must approve it or reject it.")
    max_rounds: int = Field(default=3, ge=1, description="The crew fails when a task was rejected this many times.")
    steps: list[StepSpec] = Field(default_factory=list[StepSpec], description="Spread evenly over the task's seconds.")


_TEMPLATES = {
    **dict.fromkeys(("description", "expected_output", "seconds", "output", "data", "fail"), True),
    "steps": {"__all__": {"content"}},
}
"""The fields of a task that are templates."""
_SCOPE = ("inputs", "tasks", "previous", "kickoff_id", "feedback", "round")
"""What a template sees beside the inputs."""


def _texts(value: Any) -> Iterator[str]:
    """Give all texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in cast("Iterable[Any]", value.values() if isinstance(value, dict) else value):
            yield from _texts(item)


class CrewScript(_Part):
    """A whole crew."""

    name: str = Field(min_length=1, description="Name of the crew.")
    description: str | None = Field(default=None, description="What the crew does.")
    flow: bool = Field(
        default=False, description="Whether it is a Flow: its input `id` must be a UUID, and its end is streamed."
    )
    inputs: list[Annotated[InputSpec, BeforeValidator(_as_input, json_schema_input_type=str | InputSpec)]] = Field(
        default_factory=list[InputSpec], description="Names of the inputs, or more about each."
    )
    tasks: list[TaskSpec] = Field(min_length=1, description="What the crew does, in order.")
    output: Template | None = Field(
        default=None, description="The result, a template; left out, the last task's output."
    )
    data: Data = Field(default=None, description="The structured result; left out, the last task's data.")
    usage: TokenUsage | None = Field(default=None, description="Tokens that a run reports.")
    calls: dict[str, TokenUsage] = Field(
        default_factory=dict[str, TokenUsage], description="Tokens by model, of which a stream of events tells."
    )
    faults: list[Annotated[str, AfterValidator(_check_fault)]] = Field(
        default_factory=list[str], description="What the server does wrong, such as kickoff:drop-after-accept@1."
    )

    @model_validator(mode="after")
    def _unique(self) -> CrewScript:
        for what, names in (("inputs", [i.name for i in self.inputs]), ("tasks", [t.name for t in self.tasks])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what} with the same name: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _known_names(self) -> CrewScript:
        # Each run would fail at such a name, after it has begun. A crew that names no inputs takes any.
        names = [spec.name for spec in self.inputs]
        texts = _texts(self.model_dump(include={"tasks": {"__all__": _TEMPLATES}, "output": True, "data": True}))
        used = {name for text in texts for name in find_undeclared_variables(_JINJA.parse(text))}
        known = {*names, *_SCOPE, *cast("dict[str, Any]", _JINJA.globals)}  # pyright: ignore[reportUnknownMemberType]
        unknown = sorted(used - known)
        if names and unknown:
            raise ValueError(f"a template uses {', '.join(unknown)}, and the inputs are {', '.join(names)}")
        return self


class ScriptedProgram:
    """Runs a script.

    Args:
        script: The crew.
        speed: Seconds of the script are divided by it; 10 is ten times as fast, `float("inf")` takes no time.
    """

    def __init__(self, script: CrewScript, *, speed: float = 1.0) -> None:
        if not speed > 0:
            raise ValueError(f"speed must be above 0, not {speed:g}: 2 is twice as fast.")
        self.script = script
        self.speed = speed
        self.name = script.name
        self.flow = script.flow

    def inputs(self) -> list[CrewInput]:
        """Return the script's inputs, each with its default only where the script has one."""
        return [
            CrewInput.model_validate(spec.model_dump(exclude_unset=True) | {"type": spec.type})
            for spec in self.script.inputs
        ]

    async def execute(self, run: Run) -> Outcome:
        """Run all tasks one after another.

        Raises:
            ProgramError: A task says so, a template needs what is not there, or a task was rejected too often.
        """
        script = self.script
        inputs = {spec.name: spec.default for spec in script.inputs} | dict(run.inputs)
        results: dict[str, TaskResult] = {}
        scope: dict[str, Any] = {**inputs, "inputs": inputs, "tasks": results, "previous": "", "kickoff_id": run.id}
        run.plan([task.name for task in script.tasks])
        for call in script.calls.items():
            run.listener(run, "called", call)
        for task in script.tasks:
            try:
                result = results[task.name] = await self._reviewed(run, task, scope)
            except ProgramError:
                run.usage = script.usage  # a crew that failed has used its tokens as well
                raise
            scope["previous"] = result.output
            run.task_ended(result)
        last = results[script.tasks[-1].name]
        data = last.data if script.data is None else _render_data(script.data, scope, "data")
        text = (last.output or "") if script.output is None else _render(script.output, scope, "output")
        return Outcome(output=text or _text_of(data), data=data, usage=script.usage)

    async def _reviewed(self, run: Run, task: TaskSpec, scope: Mapping[str, Any]) -> TaskResult:
        feedback = ""
        for round_ in range(1, task.max_rounds + 1):
            result = await self._attempt(run, task, {**scope, "feedback": feedback, "round": round_})
            if not task.human:
                return result
            answer = await run.ask(task_id=task.name, output=result.output or "")
            if answer.approve:
                return result
            feedback = answer.feedback
        raise ProgramError(f"task {task.name} was rejected {task.max_rounds} times, last with: {feedback}")

    async def _attempt(self, run: Run, task: TaskSpec, scope: Mapping[str, Any]) -> TaskResult:
        def field(name: str) -> str:
            return _render(getattr(task, name) or "", scope, f"{name} of task {task.name}")

        description = field("description") or None
        run.task_started(task.name, agent=task.agent, description=description)
        seconds = _seconds(task, scope)
        pause = seconds / self.speed / (len(task.steps) + 1)
        began = asyncio.get_running_loop().time()
        for step in task.steps:
            await asyncio.sleep(pause)
            content = _render(step.content, scope, f"step of task {task.name}")
            run.step(agent=task.agent, kind=step.kind, content=content, tool=step.tool)
        await asyncio.sleep(pause)
        if failure := field("fail").strip():
            raise ProgramError(failure)
        data = None if task.data is None else _render_data(task.data, scope, f"data of task {task.name}")
        output = field("output") or _text_of(data)
        if not task.steps:
            run.step(agent=task.agent, kind="final_answer", content=output)
        return TaskResult(
            name=task.name,
            agent=task.agent,
            output=output,
            data=data,
            execution_time=round(asyncio.get_running_loop().time() - began, 3),
            description=description,
            raw={"expected_output": field("expected_output")},
        )


def _text_of(data: Any) -> str:
    """Return the text of a structured result, as CrewAI does: its JSON."""
    return "" if data is None else json.dumps(data, ensure_ascii=False)


def _render(template: str, scope: Mapping[str, Any], where: str) -> str:
    try:
        return _JINJA.from_string(template).render(scope)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ProgramError(f"the {where} could not be written: {error}") from error


def _render_data(data: Any, scope: Mapping[str, Any], where: str) -> Any:
    if not isinstance(data, str):
        return _render_all(data, scope, where)
    try:
        return json.loads(_render(data, scope, where))
    except ValueError as error:
        raise ProgramError(f"the {where} is not JSON: {error}") from error


def _render_all(value: Any, scope: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, str):
        return _render(value, scope, where)
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {str(key): _render_all(item, scope, where) for key, item in items}
    if isinstance(value, list):
        return [_render_all(item, scope, where) for item in cast("list[Any]", value)]
    return value


def _seconds(task: TaskSpec, scope: Mapping[str, Any]) -> float:
    if not isinstance(task.seconds, str):
        return task.seconds
    text = _render(task.seconds, scope, f"seconds of task {task.name}")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ProgramError(f"the seconds of task {task.name} must be a number of 0 or more, not {text!r}")
    return seconds


_CREWS = files("prefect_crew.devserver") / "crews"


class ScriptError(ValueError):
    """A script that cannot be used. The text names the file, the field and what is wrong."""


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
        names = ", ".join(bundled_scripts())
        raise ScriptError(f"Cannot read the crew {name}: {reason}. Give a YAML file, or one of: {names}.") from error
    return parse_script(text, source=name)


def parse_script(text: str, *, source: str = "script") -> CrewScript:
    """Read a script from text. `source` is what errors call it.

    Raises:
        ScriptError: Not YAML, or not a crew.
    """
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ScriptError(f"{source}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(value, dict):
        raise ScriptError(f"{source}: a crew is a mapping with a name and tasks, not {type(value).__name__}")
    try:
        return CrewScript.model_validate(value)
    except ValidationError as error:
        raise ScriptError("\n".join(_error_lines(error, source))) from None
    except RecursionError:
        raise ScriptError(f"{source}: something in it holds itself, or is nested too deep") from None


def schema() -> dict[str, Any]:
    """Return the JSON schema of a crew script, as `crew.schema.json` publishes it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **CrewScript.model_json_schema()}


_UNION_ARMS = ("str", "float")
"""What pydantic puts into an error's place for the alternatives of a union; no field has these names."""


_FIELDS = {name for part in (CrewScript, TaskSpec, StepSpec, InputSpec) for name in part.model_fields}


def _error_lines(error: ValidationError, source: str) -> list[str]:
    """Return a line for each field that is wrong; the alternatives of a union share one."""
    messages: dict[str, list[str]] = {}
    for item in error.errors(include_url=False, include_context=False):
        path = [part for part in item["loc"] if part not in _UNION_ARMS]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            near = get_close_matches(str(path[-1]), _FIELDS, n=1)
            message = "there is no such field" + (f": did you mean {near[0]}?" if near else "")
        messages.setdefault(f"{source}: {name}: " if name else f"{source}: ", []).append(message)
    return [f"{where}{' or '.join(dict.fromkeys(texts))}" for where, texts in messages.items()]


if __name__ == "__main__":
    target = Path(__file__).with_name("crew.schema.json")
    target.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
