"""A deployment of one crew whose parameters are that crew's inputs, so that Prefect's form asks for them by name.

Prefect runs a deployed flow by the flow function's signature, and every crew has another. So the deployment's
entrypoint holds what the signature is made of, and needs neither storage nor the crew's server when the flow is loaded:

    prefect_crew.deploying.travel(budget,interests,duration,age)

reads as the attribute `travel(budget,interests,duration,age)` of this module, which makes that flow. Wherever this
package is installed, a worker can run it. (Read in Prefect 3.7.1's and 3.9.1's source: an entrypoint without a colon
is imported as `module.attribute`, without any pull step.)
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, unquote

from prefect import Flow
from pydantic import Field, ValidationError

from prefect_crew.api._error import excerpt
from prefect_crew.api.errors import ConfigurationError
from prefect_crew.api.models import CrewInput, CrewResult
from prefect_crew.run_keys import render_run_key
from prefect_crew.runs import arun_crew
from prefect_crew.secret_blocks import values_of_blocks
from prefect_crew.tasks import loaded

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

    from prefect_crew.blocks import DeployedCrew

__all__ = ["FLOW_NAME", "Plan", "crew_flow", "deployment_of", "entrypoint_attribute", "parameter_names"]

FLOW_NAME = "deployed-crew"
_ATTRIBUTE = re.compile(r"(?P<crew>[^()]+)\((?P<inputs>[^()]*)\)")
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("integer", "int"), int),
    **dict.fromkeys(("number", "float"), float),
    **dict.fromkeys(("boolean", "bool"), bool),
    **dict.fromkeys(("array", "list"), list[Any]),
    **dict.fromkeys(("object", "dict"), dict[str, Any]),
}
# A number of JSON is as good as its text: `prefect deployment run … -p age=34` gives one.
_TEXT: Any = str | float | bool
_RUN_KEY = "run_key"
_RUN_KEY_HELP = (
    "The identity of one purchase, such as daily-{{ scheduled_start:%Y-%m-%d }}. Left out, every flow run buys its own."
)
_BY_BLOCK = "*"
_BLOCK_HELP = "The name of the Prefect Secret block that holds it: a value would be stored with the flow run."
# Prefect refuses these as names of a flow's parameters, or reads them as something else.
_TAKEN = {"self", "cls", "return_state", "wait_for"}


def parameter_names(inputs: Sequence[str]) -> dict[str, str]:
    """Return the flow's parameter for each input: its name where Python allows that, else the nearest to it."""
    names: dict[str, str] = {}
    for name in inputs:
        plain = re.sub(r"\W", "_", name).lstrip("_") or "input"
        if plain[0].isdigit() or keyword.iskeyword(plain) or plain in _TAKEN:
            plain = f"input_{plain}"
        while plain in names.values():
            plain += "_"
        names[name] = plain
    return names


def _run_key_name(names: Mapping[str, str]) -> str:
    """Return what our own parameter is called beside the inputs, one of which may have its name."""
    name = _RUN_KEY
    while name in names.values():
        name += "_"
    return name


def entrypoint_attribute(crew: str, inputs: Sequence[str], *, secret_inputs: Collection[str] = ()) -> str:
    """Return the attribute of this module that is the flow of a crew with these inputs; a star marks a secret one."""

    def encoded(text: str) -> str:
        return quote(text, safe="").replace(".", "%2E")  # dots would part it, as they do all attributes

    marked = (f"{_BY_BLOCK if name in secret_inputs else ''}{encoded(name)}" for name in inputs)
    return f"{encoded(crew)}({','.join(marked)})"


def __getattr__(name: str) -> Any:
    match = _ATTRIBUTE.fullmatch(name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    parts = [part for part in match["inputs"].split(",") if part]
    inputs = [CrewInput(name=unquote(part.removeprefix(_BY_BLOCK)), required=False) for part in parts]
    secret = [item.name for item, part in zip(inputs, parts, strict=True) if part.startswith(_BY_BLOCK)]
    # What is required and of which type was checked by the server, by the deployment's schema.
    return crew_flow(unquote(match["crew"]), inputs, secret_inputs=secret, typed=False)


def crew_flow(
    crew: str, inputs: Sequence[CrewInput], *, secret_inputs: Sequence[str] = (), typed: bool = True
) -> Flow[..., Any]:
    """Return a flow that runs a crew, with the crew's inputs as its parameters.

    Args:
        crew: The name of the crew's stored block.
        inputs: What the crew takes.
        secret_inputs: Inputs that are given as the name of a Prefect Secret block, since Prefect stores parameters.
        typed: Whether the signature says of which type an input is, and which ones are required.
    """
    names = parameter_names([item.name for item in inputs])
    run_key = _run_key_name(names)

    async def run(**given: Any) -> CrewResult:
        values = {name: given[parameter] for name, parameter in names.items() if given.get(parameter) is not None}
        block = (await loaded(crew)).hiding(secret_inputs)
        stored = [name for name in block.secret_inputs if name in values and name not in secret_inputs]
        if stored:
            raise ConfigurationError(
                f"The inputs {', '.join(stored)} are secret to crew {crew} by now, and this deployment asks for their "
                f"values. Nothing was started. Deploy it again, so that it asks for the names of Secret blocks: "
                f"prefect-crew deploy {crew}."
            )
        values = await values_of_blocks(values, secret_inputs)
        return await arun_crew(block, values, run_key=given.get(run_key) or None)

    parameters = [_parameter(item, names[item.name], item.name in secret_inputs, typed) for item in inputs]
    key = _described(str | None, "Run key", _RUN_KEY_HELP)
    parameters.append(inspect.Parameter(run_key, _KIND, default=None, annotation=key))
    signature = inspect.Signature(parameters, return_annotation=CrewResult)
    attribute = entrypoint_attribute(crew, [item.name for item in inputs], secret_inputs=secret_inputs)
    run.__name__ = run.__qualname__ = attribute
    run.__module__ = __name__
    run.__doc__ = f"Run the crew {crew}. The parameters are its inputs."
    run.__signature__ = signature  # type: ignore[attr-defined]
    # Prefect's own check of parameters would make a model of their names, some of which a model cannot have.
    return Flow(run, name=FLOW_NAME, validate_parameters=False)


# Keyword only: then what is required may follow what is not, and the form keeps the crew's own order.
_KIND = inspect.Parameter.KEYWORD_ONLY


def _described(kind: Any, title: str, description: str | None) -> Any:
    """Return a type with what a form shows of it. As extras, since Prefect gives every field its name as title."""
    texts = {"title": title, "description": description}
    return Annotated[kind, Field(json_schema_extra={key: text for key, text in texts.items() if text})]


def _parameter(item: CrewInput, name: str, secret: bool, typed: bool) -> inspect.Parameter:
    if not typed:
        return inspect.Parameter(name, _KIND, default=None, annotation=Any)
    base = str if secret else _TYPES.get((item.type or "").lower(), _TEXT)
    said = [_BLOCK_HELP if secret else None, item.description, None if item.required else _left_out(item, secret)]
    description = " ".join(part for part in said if part)
    about = _described(base if item.required else base | None, item.name, description)
    default: Any = inspect.Parameter.empty if item.required else None
    return inspect.Parameter(name, _KIND, default=default, annotation=about)


def _left_out(item: CrewInput, secret: bool) -> str:
    default = "" if secret or item.default is None else f": {excerpt(str(item.default), 200)}"
    return f"Left out, the crew takes its own default{default}."


@dataclass(frozen=True)
class Plan:
    """What a deployment is to be, beside its crew.

    `inputs` are the defaults of its parameters, by the inputs' own names, of a secret one the name of its Secret block;
    a schedule needs one for each required input. `interval` is in seconds. `run_key` may be a template over the
    scheduled time.
    """

    name: str
    inputs: Mapping[str, Any]
    run_key: str | None = None
    work_pool: str | None = None
    cron: str | None = None
    interval: float | None = None
    timezone: str | None = None
    concurrency_limit: int | None = None
    tags: Sequence[str] = ()
    has_schedule: bool = False

    @property
    def new_schedule(self) -> bool:
        """Whether it gets a schedule, in place of any that it has."""
        return self.cron is not None or self.interval is not None

    @property
    def scheduled(self) -> bool:
        """Whether it runs by itself."""
        return self.has_schedule or self.new_schedule


def deployment_of(crew: DeployedCrew, inputs: Sequence[CrewInput], plan: Plan) -> RunnerDeployment:
    """Return the deployment of a stored crew, ready to be applied or served.

    Args:
        crew: A block that was loaded by its name.
        inputs: What `GET /inputs` says.
        plan: The rest.

    Raises:
        ConfigurationError: Defaults for inputs that the crew does not know, a schedule without a default for each
            required input, or one that is none; a run key whose template is none, or on a schedule has no time in it.
    """
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    names = parameter_names([item.name for item in inputs])
    unknown = [name for name in plan.inputs if name not in names]
    if unknown:
        raise ConfigurationError(
            f"The crew does not know the inputs {', '.join(unknown)}; it takes {', '.join(names)}."
        )
    missing = [item.name for item in inputs if item.required and item.name not in plan.inputs]
    if plan.scheduled and missing:
        stays = "" if plan.new_schedule else f" The schedule that {FLOW_NAME}/{plan.name} has stays: delete it, or"
        raise ConfigurationError(
            "A schedule asks nobody, so it needs a default for each required input of the crew. Missing: "
            f"{', '.join(missing)}.{f'{stays} give them.' if stays else ''}"
        )
    defaults = {names[name]: value for name, value in plan.inputs.items()}
    if plan.run_key is not None:
        _check_run_key(plan.run_key, scheduled=plan.scheduled)
        defaults[_run_key_name(names)] = plan.run_key
    made = crew_flow(crew.label, inputs, secret_inputs=crew.secret_inputs)
    try:
        deployment = RunnerDeployment.from_flow(
            made,
            name=plan.name,
            schedule=_schedule(plan),
            parameters=defaults,
            concurrency_limit=plan.concurrency_limit,
            tags=["prefect-crew", *(tag for tag in plan.tags if tag != "prefect-crew")],
            work_pool_name=plan.work_pool,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValidationError as error:
        problems = "; ".join(f"{problem['msg']}" for problem in error.errors(include_url=False, include_input=False))
        raise ConfigurationError(f"The deployment cannot be made: {problems}.") from None
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"The deployment cannot be made: {error}") from error
    if not plan.new_schedule:
        # Prefect says that an empty list was given, and takes the schedules away that a deployment has.
        deployment.model_fields_set.discard("schedules")
    return deployment


def _check_run_key(run_key: str, *, scheduled: bool) -> None:
    """Say now what each of the runs would say, or what none of them would."""
    if render_run_key(run_key, datetime.now(timezone.utc)) == run_key and scheduled:
        raise ConfigurationError(
            f"The run key {run_key!r} is the same for every time of the schedule, so that all would get the "
            "first one's result. Put the time into it, such as daily-{{ scheduled_start:%Y-%m-%d }}."
        )


def _schedule(plan: Plan) -> Schedule | None:
    from prefect.schedules import Cron, Interval

    if plan.cron is not None and plan.interval is not None:
        raise ConfigurationError("A deployment has a cron schedule or an interval here, not both.")
    if plan.cron is not None:
        return Cron(plan.cron, timezone=plan.timezone)
    if plan.interval is not None:
        return Interval(timedelta(seconds=plan.interval), timezone=plan.timezone)
    return None
