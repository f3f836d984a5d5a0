"""Flows that ask for the inputs of a crew or a pipeline.

Prefect makes the run form from the signature of the deployed flow, and one flow runs all crews, another flow all
pipelines. So `crew_flow` and `pipeline_flow` return a subclass of Flow whose signature is the form. A parameter that
the deployment holds, and the form leaves out, names the crew or holds the pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast
from uuid import UUID

from prefect import Flow
from prefect.types.entrypoint import EntrypointType
from pydantic import Field, TypeAdapter, ValidationError, WithJsonSchema

from prefect_crew._internal.asyncio_tasks import in_async_context, run_sync
from prefect_crew._internal.prefect_errors import naming_prefect_away
from prefect_crew.automations import TAG
from prefect_crew.blocks import load_crew, values_of_blocks
from prefect_crew.client.models import CrewResult
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.flows import run_deployed_crew
from prefect_crew.pipelines.definition import (
    PipelineDefinition,
    PipelineInput,
    as_pipeline_input,
    read_pipeline,
)
from prefect_crew.pipelines.graph import Pipeline
from prefect_crew.pipelines.run import PipelineResult, run_deployed_pipeline

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

T = TypeVar("T")

KEY_HELP = (
    "At most one run is started for a key, such as daily-{scheduled_start:%Y-%m-%d}. Left out, each flow run starts "
    "one."
)
SESSION_HELP = "The session of a CrewAI Flow: the run starts from the state of its last completed run."
SECRET_HELP = "The name of the Prefect Secret block with the value. The value itself would be stored with the flow run."  # noqa: S105
TEXT = ["string", "number", "boolean"]
"""JSON types of an input that is text, since `prefect deployment run` reads a bare number as a number."""
TYPES: dict[str, Any] = {"integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
_naming_prefect_away = naming_prefect_away("Deploy again, which updates a deployment that was made.")


class InputsFlow(Flow[..., Coroutine[Any, Any, T]]):
    """A flow whose run form asks for the inputs of one crew or one pipeline.

    Prefect reads the form when it makes a deployment: an import, a call and a flow run send no request for it. In the
    `parameters` of a deployment, `inputs` has the defaults, and `idempotency_key` may be a template over the time: with
    a schedule it is the key of the flow runs that the schedule makes, and not of those that a person starts.
    """

    def __init__(
        self,
        flow: Flow[..., Any],
        label: str,
        description: str,
        read_form: Callable[[Mapping[str, Any]], Awaitable[Form]],
        **fixed: Any,
    ) -> None:
        # Prefect names the entrypoint of a deployment by the module and the name of the function.
        super().__init__(_with_fixed(flow, description, fixed), name=flow.name, flow_run_name=flow.flow_run_name)
        self.label = label
        """The name of the crew or the pipeline."""
        self._flow_run_name = flow.flow_run_name
        self._read_form = read_form
        self._form: Form | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        """The run form, as Prefect reads it, twice each time."""
        self._form = self._form or run_sync(_await(self._read_form({})))
        return self._form.signature

    def with_options(self, **options: Any) -> InputsFlow[T]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a copy with other options, as Prefect does."""
        return self._copy(**super().with_options(**options).__dict__)

    def _copy(self, **attributes: Any) -> InputsFlow[T]:
        flow = copy(self)
        flow.__dict__.update(attributes)
        return flow

    @_naming_prefect_away
    async def ato_deployment(self, name: str | None = None, **options: Any) -> RunnerDeployment:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a deployment, ready to be applied. It takes all options that Prefect has.

        The default name is the name of the crew or the pipeline.

        Raises:
            ConfigurationError: A default does not fit, a secret one names no Secret block, or a session is
                given that no run can have.
            CrewError: The crew does not name its inputs.
        """
        parameters = dict(options.pop("parameters", None) or {})
        form = await self._read_form(parameters.pop("inputs", None) or {})
        options["parameters"] = {**parameters, **form.parameters}
        options["entrypoint_type"] = EntrypointType.MODULE_PATH  # Prefect's methods always give one
        options["tags"] = [TAG, *(tag for tag in options.get("tags") or () if tag != TAG)]
        deployment = await super(InputsFlow, self._copy(_form=form)).ato_deployment(name or self.label, **options)
        schedules, key = deployment.schedules or [], (deployment.parameters or {}).get("idempotency_key") or ""
        given = [parameters, *(schedule.parameters or {} for schedule in schedules)]
        if not form.has_session and any(each.get("session") for each in given):
            raise ConfigurationError(
                f"{form.owner} takes no session, so its runs would fail. Nothing was deployed. Save a crew as a Flow "
                "(--flow, or DeployedCrew(flow=True)), or name the sessions of a pipeline in its steps."
            )
        if schedules and "{" in key:  # the form would fill it in, for any inputs, and take the key of the scheduled run
            deployment.parameters = {name: value for name, value in deployment.parameters.items() if value is not key}
            for schedule in schedules:
                schedule.parameters = {"idempotency_key": key, **(schedule.parameters or {})}
        for schedule in schedules:  # Prefect stores these inputs too: a secret one names its block
            await form.with_defaults((schedule.parameters or {}).get("inputs") or {})
        return deployment

    def to_deployment(self, name: str | None = None, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a deployment as `ato_deployment` does; if the caller can await, the coroutine, as Prefect does."""
        deployment = self.ato_deployment(name, **options)
        return deployment if in_async_context() else run_sync(deployment)

    def serve(self, name: str | None = None, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Serve the flow from this process, as Prefect does. `name` is as for `ato_deployment`."""
        super().serve(name or self.label, **options)

    @_naming_prefect_away
    async def adeploy(self, name: str | None = None, work_pool_name: str | None = None, **options: Any) -> UUID:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deploy the flow to a work pool. This takes all options that Prefect has. Raises as `ato_deployment` does."""
        return await super().adeploy(name or self.label, work_pool_name, **options)

    def deploy(self, name: str | None = None, work_pool_name: str | None = None, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deploy as `adeploy` does; if the caller can await, return the coroutine, as Prefect does."""
        deployment = self.adeploy(name, work_pool_name, **options)
        return deployment if in_async_context() else run_sync(deployment)


def crew_flow(crew: str) -> InputsFlow[CrewResult]:
    """Return a flow that runs a stored crew, and whose run form asks for the inputs of the crew.

    `.deploy()`, `.serve()`, `.to_deployment()`, `flow.from_source`, `prefect deploy` and a call work as with each flow.
    A deployment that `.deploy()` makes runs the installed package, on any pool and without code storage: retries, a
    timeout and hooks of `with_options` hold for calls, and for a flow that `prefect deploy` or `from_source` takes from
    a module or a file of yours.

    Args:
        crew: The name of the block of the crew. A value of a secret input is the name of its Secret block.

    ```python
    crew_flow("travel").deploy("daily", work_pool_name="crews", cron="0 7 * * *", parameters={"inputs": {"age": 34}})
    ```
    """
    return InputsFlow(run_deployed_crew, crew, f"Run the crew {crew}.", partial(_crew_form, crew), crew=crew)


def pipeline_flow(file: str | PathLike[str]) -> InputsFlow[PipelineResult]:
    """Return a flow that runs the pipeline of a file, and whose run form asks for the inputs of the pipeline.

    The flow deploys like `crew_flow`. The deployment holds the content of the file, so deploy again after a change.

    Args:
        file: A file with a pipeline, YAML or JSON.

    Raises:
        ConfigurationError: The file cannot be read, or holds no pipeline.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The pipeline in {file} cannot be read: {error}.") from None
    pipeline = read_pipeline(text, str(file))
    description = pipeline.description or f"Run the pipeline {pipeline.name}."
    return InputsFlow(
        run_deployed_pipeline, pipeline.name, description, partial(_pipeline_form, pipeline), pipeline=pipeline
    )


def _with_fixed(flow: Flow[..., Any], description: str, fixed: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function of a flow of this package. Its `fixed` parameters get defaults; the run form omits them."""
    name, own = flow.fn.__name__, inspect.signature(flow.fn, eval_str=True)

    async def run(*args: Any, **options: Any) -> Any:
        return await flow.fn(**{**fixed, **signature.bind(*args, **options).arguments})

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=fixed[parameter.name])
        if parameter.name in fixed
        else parameter
        for parameter in own.parameters.values()
    ]
    signature = own.replace(parameters=sorted(parameters, key=lambda parameter: parameter.kind))
    run.__doc__, run.__module__, run.__name__, run.__qualname__ = description, "prefect_crew", name, name
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


async def describe_schedule(schedule: Any) -> str:
    """Return the rule of a deployment's schedule and its next time, in its own time zone."""
    rule = getattr(schedule, "cron", None) or getattr(schedule, "rrule", None) or f"every {schedule.interval}"
    dates = await _dates(schedule, n=1)
    zone = f" ({schedule.timezone})" if schedule.timezone else ""
    return f"{rule}{zone}. The next run: {f'{dates[0]:%Y-%m-%d %H:%M %Z}' if dates else 'none'}."


async def _dates(schedule: Any, **bounds: Any) -> list[datetime]:
    """Return dates of a schedule by `get_dates` of the server's schedules, since the client's have no such method."""
    from prefect.server.schemas import schedules as server

    rule = getattr(server, type(schedule).__name__).model_validate(schedule.model_dump())
    return await rule.get_dates(**bounds)


# Forms


@dataclass(frozen=True)
class Form:
    """The run form of a crew or a pipeline.

    Attributes:
        owner: The crew or the pipeline, for messages.
        inputs: The inputs by name, with the defaults of the deployment.
        required: The inputs that each run has to give if the deployment has no default.
        parameters: The parameters of the deployment: the crew or the pipeline, and the defaults.
        has_session: Whether a run may have a session: those of a crew that is saved as a Flow.
        takes_extra: Whether a run may give inputs that the crew does not name.
    """

    owner: str
    inputs: Mapping[str, PipelineInput]
    required: Sequence[str]
    parameters: Mapping[str, Any]
    has_session: bool = False
    takes_extra: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of the parameter `inputs`."""
        fields = {
            name: _field_of(name, item, name in self.required, position)
            for position, (name, item) in enumerate(self.inputs.items())
        }
        required, extra = [*self.required], self.takes_extra
        return {"type": "object", "properties": fields, "required": required, "additionalProperties": extra}

    @property
    def signature(self) -> inspect.Signature:
        """The form as a signature for Prefect: `inputs` with a field for each input, idempotency key, session."""
        of_inputs: Any = Annotated[dict[str, Any], WithJsonSchema(self.schema)]
        kind = inspect.Parameter.KEYWORD_ONLY
        default: Any = inspect.Parameter.empty if self.required else {}
        has_inputs = self.inputs or self.takes_extra
        fields = [inspect.Parameter("inputs", kind, default=default, annotation=of_inputs)] if has_inputs else []
        texts = {"idempotency_key": ("Idempotency key", KEY_HELP)}
        if self.has_session:
            texts["session"] = ("Session", SESSION_HELP)
        for name, (title, description) in texts.items():
            # As an extra, since Prefect gives every field its name as title.
            extra: Any = {"title": title, "description": description}
            of_text: Any = Annotated[str | None, Field(json_schema_extra=extra)]
            fields.append(inspect.Parameter(name, kind, default=None, annotation=of_text))
        return inspect.Signature(fields)

    async def with_defaults(self, defaults: Any) -> Form:
        """Return the form with these defaults. Raise ConfigurationError for a wrong one, or a secret one without
        block.
        """
        if not isinstance(defaults, Mapping):
            raise ConfigurationError(f"{self.owner} takes its inputs by name. Give inputs={{'NAME': …}}.")
        defaults = cast("Mapping[str, Any]", defaults)
        unknown = [name for name in defaults if name not in self.inputs]
        if unknown and not self.takes_extra:
            raise ConfigurationError(
                f"{self.owner} does not know the inputs {', '.join(unknown)}; it takes "
                f"{', '.join(self.inputs) or 'none'}."
            )
        fields = dict(self.inputs)
        for name in [name for name in defaults if name in fields]:
            kind = None if fields[name].secret else fields[name].type
            fields[name] = fields[name].model_copy(update={"default": _read_as(kind, name, defaults[name])})
        secrets = {name: item.default for name, item in fields.items() if item.secret and item.default is not None}
        await values_of_blocks(secrets, set(secrets))
        return replace(self, inputs=fields)


async def _crew_form(name: str, defaults: Mapping[str, Any]) -> Form:
    """Return the form of a stored crew: the inputs that the crew names. Raises ConfigurationError, CrewError."""
    crew = await load_crew(name)
    async with crew.client() as client:
        crew_inputs = await client.inputs()
    inputs = {
        item.name: as_pipeline_input(item).model_copy(update={"secret": item.name in crew.secret_inputs})
        for item in crew_inputs
    }
    if crew.allow_extra_inputs:  # a secret one has a field, which asks for the name of its block
        secret = PipelineInput(required=False, secret=True)
        inputs |= {name: secret for name in crew.secret_inputs if name not in inputs}
    # A run that gives `inputs` replaces those of the deployment, so defaults make none of them optional.
    required = [key for key, item in inputs.items() if item.required]
    form = Form(f"Crew {name!r}", inputs, required, {}, has_session=crew.flow, takes_extra=crew.allow_extra_inputs)
    form = await form.with_defaults(defaults)
    values = {key: form.inputs[key].default if key in inputs else value for key, value in defaults.items()}
    values = {key: value for key, value in values.items() if value is not None}
    return replace(form, parameters={"crew": name, **({"inputs": values} if values else {})})


async def _pipeline_form(pipeline: PipelineDefinition, defaults: Mapping[str, Any]) -> Form:
    """Return the form of a pipeline, after a check of all its steps. `defaults` replace those of its file.

    Raises ConfigurationError with all problems of a pipeline that cannot run, or if a default is for no input of it.
    """
    steps = pipeline.crew_steps()
    # The steps are checked with what every run has: all but inputs that may be left out and have no default.
    sure = [name for name, item in pipeline.inputs.items() if item.required or item.default is not None]
    checked = Pipeline(steps, dict.fromkeys(sure, ""))
    await checked.check()
    secret = Pipeline(steps, dict.fromkeys(pipeline.inputs, ""), checked.crews).secret_inputs
    blocks = {name: list(crew.secret_inputs) for name, crew in checked.crews.items()}
    problems = [*checked.problems, *checked.unreachable, *pipeline.stored_secrets(blocks)]
    if problems:
        raise ConfigurationError(
            f"Nothing was deployed, as the pipeline cannot run: {'; '.join(problems).rstrip('.')}."
        )
    inputs = {
        name: item.model_copy(update={"secret": item.secret or name in secret})
        for name, item in pipeline.inputs.items()
    }
    form = await Form(f"Pipeline {pipeline.name!r}", inputs, (), {}).with_defaults(defaults)
    pipeline = pipeline.model_copy(update={"inputs": dict(form.inputs)})
    stored = pipeline.model_dump(mode="json", exclude_defaults=True)  # as short as it was written
    required = [name for name, item in form.inputs.items() if item.needed]
    return replace(form, required=required, parameters={"pipeline": stored})


def _read_as(kind: str | None, name: str, value: Any) -> Any:
    """Return a default as a value of a JSON type, since all defaults on the command line are text."""
    if kind not in TYPES or not isinstance(value, str):
        return value
    try:
        return TypeAdapter(TYPES[kind]).validate_json(value)
    except ValidationError:
        raise ConfigurationError(f"The default of the input {name} must be JSON of the type {kind}.") from None


def _field_of(name: str, item: PipelineInput, required: bool, position: int) -> dict[str, Any]:
    kinds = ["string"] if item.secret else [item.type] if item.type and item.type != "string" else TEXT
    kinds = kinds if required else [*kinds, "null"]
    type_of: dict[str, Any] = {"type": kinds[0]} if len(kinds) == 1 else {"anyOf": [{"type": kind} for kind in kinds]}
    description = " ".join(part for part in (SECRET_HELP if item.secret else None, item.description) if part)
    about = {"title": name, "position": position, **({"description": description} if description else {})}
    has_default = item.default is not None or not required
    return {**about, **type_of, **({"default": item.default} if has_default else {})}
