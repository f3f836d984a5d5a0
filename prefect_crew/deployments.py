"""Deployments of a crew, a pipeline or a flow of one's own, whose flow a worker imports by its path.

None needs code storage or a pull step: wherever the packages are installed, a worker can run them. The run form asks
for the inputs of the crew or the pipeline by name.

Prefect runs a deployed flow by the flow function's signature, and every crew has another. So the entrypoint of a
crew's deployment holds what the signature is made of, and the crew's server is not needed when the flow is loaded:

    prefect_crew.deployments.travel(budget,interests,duration,age)

reads as the attribute `travel(budget,interests,duration,age)` of this module, which makes that flow. (Read in Prefect
3.7.1's and 3.9.1's source: an entrypoint without a colon is imported as `module.attribute`, without any pull step.)

All deployed pipelines are runs of one flow, `prefect_crew.run_deployed_pipeline`. The steps are a parameter that the
deployment holds and the form leaves out; the pipeline's inputs are the fields of the parameter `inputs`.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, unquote
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter
from prefect.client.schemas.filters import FlowRunFilterExpectedStartTime as Expected
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled
from prefect.utilities.callables import parameter_schema
from pydantic import Field, TypeAdapter, ValidationError, WithJsonSchema

from prefect_crew._text import excerpt
from prefect_crew.blocks import load_crew
from prefect_crew.client.models import CrewInput, CrewResult
from prefect_crew.exceptions import ConfigurationError
from prefect_crew.flows import arun_crew
from prefect_crew.pipelines.check import PipelineCrews
from prefect_crew.pipelines.definition import PipelineDefinition, PipelineInput
from prefect_crew.pipelines.graph import PipelineGraph
from prefect_crew.pipelines.run import PipelineResult, run_deployed_pipeline
from prefect_crew.records.keys import render_key
from prefect_crew.runs.secret_blocks import values_of_blocks

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import DeploymentSchedule
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

    from prefect_crew.crew import Crew


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
_KEY = "idempotency_key"
_KEY_HELP = (
    "The identity under which runs are started at most once, such as daily-{{ scheduled_start:%Y-%m-%d }}. Left out, "
    "every flow run starts its own."
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


def _idempotency_key_name(names: Mapping[str, str]) -> str:
    """Return what our own parameter is called beside the inputs, one of which may have its name."""
    name = _KEY
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
    idempotency_key = _idempotency_key_name(names)

    async def run(**given: Any) -> CrewResult:
        values = {name: given[parameter] for name, parameter in names.items() if given.get(parameter) is not None}
        found = (await load_crew(crew)).hiding(secret_inputs)
        stored = [name for name in found.secret_inputs if name in values and name not in secret_inputs]
        if stored:
            raise ConfigurationError(
                f"The inputs {', '.join(stored)} are secret to crew {crew} by now, and this deployment asks for their "
                f"values. Nothing was started. Deploy it again, so that it asks for the names of Secret blocks: "
                f"prefect-crew deploy {crew}."
            )
        values = await values_of_blocks(values, secret_inputs)
        return await arun_crew(found, values, idempotency_key=given.get(idempotency_key) or None)

    parameters = [_parameter(item, names[item.name], item.name in secret_inputs, typed) for item in inputs]
    key = _described(str | None, "Idempotency key", _KEY_HELP)
    parameters.append(inspect.Parameter(idempotency_key, _KIND, default=None, annotation=key))
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
    a schedule needs one for each required input. `interval` is in seconds. `idempotency_key` may be a template over the
    scheduled time.
    """

    name: str
    inputs: Mapping[str, Any]
    idempotency_key: str | None = None
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


def deployment_of(crew: Crew, inputs: Sequence[CrewInput], plan: Plan) -> RunnerDeployment:
    """Return the deployment of a stored crew, ready to be applied or served.

    Args:
        crew: The crew of a stored block.
        inputs: What `GET /inputs` says.
        plan: The rest.

    Raises:
        ConfigurationError: Defaults for inputs that the crew does not know, a schedule without a default for each
            required input, or one that is none; an idempotency key whose template is none, or on a schedule has no
            time in it.
    """
    names = parameter_names([item.name for item in inputs])
    unknown = [name for name in plan.inputs if name not in names]
    if unknown:
        raise ConfigurationError(
            f"The crew does not know the inputs {', '.join(unknown)}; it takes {', '.join(names)}."
        )
    _check_schedule(plan, FLOW_NAME, [item.name for item in inputs if item.required and item.name not in plan.inputs])
    kinds = {item.name: _TYPES.get((item.type or "").lower()) for item in inputs if item.name not in crew.secret_inputs}
    defaults = {names[name]: _read_as(kinds.get(name), name, value) for name, value in plan.inputs.items()}
    if plan.idempotency_key is not None:
        _check_key(plan.idempotency_key, scheduled=plan.scheduled)
        defaults[_idempotency_key_name(names)] = plan.idempotency_key
    return _deployment(crew_flow(crew.label, inputs, secret_inputs=crew.secret_inputs), plan, defaults)


def _deployment(made: Flow[..., Any], plan: Plan, parameters: Mapping[str, Any]) -> RunnerDeployment:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    try:
        deployment = RunnerDeployment.from_flow(
            made,
            name=plan.name,
            schedule=_schedule(plan),
            parameters=dict(parameters),
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


def _check_schedule(plan: Plan, flow_name: str, missing: Sequence[str]) -> None:
    if plan.scheduled and missing:
        stays = "" if plan.new_schedule else f" The schedule that {flow_name}/{plan.name} has stays: delete it, or"
        raise ConfigurationError(
            "A schedule asks nobody, so it needs a default for each required input. Missing: "
            f"{', '.join(missing)}.{f'{stays} give them.' if stays else ''}"
        )


def _read_as(kind: Any, name: str, value: Any) -> Any:
    """Return a default as a value of its input's type: on the command line all are text."""
    if kind is None or not isinstance(value, str):
        return value
    try:
        return TypeAdapter(kind).validate_json(value)
    except ValidationError:
        said = next((said for said, one in _TYPES.items() if one == kind), str(kind))
        raise ConfigurationError(f"The default of the input {name} is to be JSON of the type {said}.") from None


def _check_key(idempotency_key: str, *, scheduled: bool) -> None:
    """Say now what each of the runs would say, or what none of them would."""
    if render_key(idempotency_key, datetime.now(UTC)) == idempotency_key and scheduled:
        raise ConfigurationError(
            f"The idempotency key {idempotency_key!r} is the same for every time of the schedule, so that all would "
            f"get the "
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


# Pipelines


async def resolved_pipeline(pipeline: PipelineDefinition, defaults: Mapping[str, Any]) -> PipelineDefinition:
    """Return a pipeline as it is deployed: with all its inputs, their defaults, and the secret ones marked.

    Args:
        pipeline: What its file says.
        defaults: Values for its inputs, laid over those of the file; of a secret one the name of its Secret block.

    Raises:
        ConfigurationError: The pipeline cannot run, with all that is wrong; or a default is for no input of it.
    """
    steps = pipeline.crew_steps()
    bare = PipelineGraph(steps, {})
    own = len(bare.problems)  # it knows no inputs yet, so what it says itself is not the last word
    crews = PipelineCrews(bare)
    await crews.load()
    await crews.ask()
    unasked = [*bare.problems[own:], *crews.unreachable]
    pipeline = pipeline.with_inputs(crews.expected)
    unknown = [name for name in defaults if name not in pipeline.inputs]
    if unknown:
        raise ConfigurationError(
            f"Pipeline {pipeline.name!r} does not know the inputs {', '.join(unknown)}; it takes "
            f"{', '.join(pipeline.inputs) or 'none'}."
        )
    # The graph is checked with what every run has: all but the inputs that may be left out and have no default.
    names = [name for name, item in pipeline.inputs.items() if item.required or item.default is not None]
    crews = PipelineCrews(PipelineGraph(steps, dict.fromkeys(names, "")), crews.crews, crews.expected)
    crews.check_inputs()
    every = PipelineCrews(PipelineGraph(steps, dict.fromkeys(pipeline.inputs, "")), crews.crews)
    secret = every.secret_inputs | {name for name, item in pipeline.inputs.items() if item.secret}
    blocks = {name: list(crew.secret_inputs) for name, crew in crews.crews.items()}
    problems = [*unasked, *crews.graph.problems, *pipeline.stored_secrets(blocks)]
    if problems:
        raise ConfigurationError(f"The pipeline cannot run, nothing was deployed: {'; '.join(problems)}.")
    inputs = {name: _with_default(name, item, name in secret, defaults) for name, item in pipeline.inputs.items()}
    pipeline = pipeline.model_copy(update={"inputs": inputs})
    named = {name: item.default for name, item in inputs.items() if item.secret and item.default is not None}
    await values_of_blocks(named, set(named))  # before they are stored with the deployment
    return pipeline


def _with_default(name: str, item: PipelineInput, secret: bool, defaults: Mapping[str, Any]) -> PipelineInput:
    update: dict[str, Any] = {"secret": secret}
    if name in defaults:
        update["default"] = _read_as(None if secret else _TYPES.get(item.type or ""), name, defaults[name])
    return item.model_copy(update=update)


def pipeline_deployment(pipeline: PipelineDefinition, plan: Plan) -> RunnerDeployment:
    """Return the deployment of a pipeline, ready to be applied or served.

    Args:
        pipeline: It as `resolved_pipeline` returns it.
        plan: The rest; its `inputs` are in the pipeline already.

    Raises:
        ConfigurationError: As for `deployment_of`.
    """
    needed = [name for name, item in pipeline.inputs.items() if item.needed]
    _check_schedule(plan, run_deployed_pipeline.name, needed)
    # It is stored as short as it was written.
    parameters: dict[str, Any] = {"pipeline": pipeline.model_dump(mode="json", exclude_defaults=True)}
    if plan.idempotency_key is not None:
        _check_key(plan.idempotency_key, scheduled=plan.scheduled)
        parameters[_KEY] = plan.idempotency_key
    return _deployment(_pipeline_form(pipeline, needed), plan, parameters)


def _pipeline_form(pipeline: PipelineDefinition, needed: Sequence[str]) -> Flow[..., Any]:
    """Return a flow that stands for `run_deployed_pipeline` where Prefect makes the form: it has its path."""

    async def run(**_: Any) -> PipelineResult:
        raise NotImplementedError

    fields = {name: _field_of(name, item, number) for number, (name, item) in enumerate(pipeline.inputs.items())}
    schema = {"type": "object", "properties": fields, "required": list(needed), "additionalProperties": False}
    inputs: Any = Annotated[dict[str, Any], WithJsonSchema(schema)]
    default: Any = inspect.Parameter.empty if needed else {}
    key = _described(str | None, "Idempotency key", _KEY_HELP)
    parameters = [inspect.Parameter("inputs", _KIND, default=default, annotation=inputs)] if fields else []
    parameters.append(inspect.Parameter(_KEY, _KIND, default=None, annotation=key))
    run.__module__, run.__name__ = "prefect_crew", "run_deployed_pipeline"
    run.__doc__ = pipeline.description or f"Run the pipeline {pipeline.name}."
    run.__signature__ = inspect.Signature(parameters, return_annotation=PipelineResult)  # type: ignore[attr-defined]
    return Flow(run, name=run_deployed_pipeline.name, validate_parameters=False)


def _field_of(name: str, item: PipelineInput, position: int) -> dict[str, Any]:
    kinds = ["string"] if item.secret else [item.type] if item.type and item.type != "string" else _TEXT_IN_JSON
    kinds = kinds if item.needed else [*kinds, "null"]
    one = {"type": kinds[0]} if len(kinds) == 1 else {"anyOf": [{"type": kind} for kind in kinds]}
    said = " ".join(part for part in (_BLOCK_HELP if item.secret else None, item.description) if part)
    about = {"title": name, "position": position, **({"description": said} if said else {})}
    return {**about, **one, **({} if item.needed else {"default": item.default})}


# As for a crew's input: a number of JSON is as good as its text.
_TEXT_IN_JSON = ["string", "number", "boolean"]


# Flows of one's own


def needed_parameters(flow: Flow[..., Any]) -> tuple[list[str], list[str]]:
    """Return the names of a flow's parameters, and of those that have to be given."""
    schema = parameter_schema(flow)
    return list(schema.properties), list(schema.required or ())


def flow_deployment(entrypoint: str, plan: Plan) -> RunnerDeployment:
    """Return the deployment of an asynchronous flow that can be imported, ready to be applied or served.

    Args:
        entrypoint: Its import path, such as `my_package.flows.my_flow`.
        plan: The rest; its `inputs` are defaults of the flow's parameters.

    Raises:
        ConfigurationError: It cannot be imported, or is synchronous; otherwise as for `deployment_of`.
    """
    from prefect_crew.worker import load_flow  # prefect.workers takes 0.3 s to import

    made = load_flow(entrypoint)
    names, needed = needed_parameters(made)
    unknown = [name for name in plan.inputs if name not in names]
    if unknown:
        raise ConfigurationError(
            f"The flow has no parameters {', '.join(unknown)}; it has {', '.join(names) or 'none'}."
        )
    _check_schedule(plan, made.name, [name for name in needed if name not in plan.inputs])
    fields = parameter_schema(made).properties
    kinds = {name: _TYPES.get(fields[name].get("type", "")) for name in names}
    defaults = {name: _read_as(kinds[name], name, value) for name, value in plan.inputs.items()}
    deployment = _deployment(made, plan, defaults)
    deployment.entrypoint = entrypoint  # whatever the function is called within its module
    return deployment


MOST = 1000
"""Times in one call; also what Prefect's schedules give in one go."""
PAGE = 200


@dataclass(frozen=True)
class BackfilledRun:
    """One time of the range. `created`: by this call; with `dry_run` it would be, and there is no flow run yet."""

    scheduled_for: datetime
    created: bool
    flow_run_id: UUID | None
    state: str


async def backfill(
    deployment: str,
    start: date,
    end: date,
    every: timedelta | None = None,
    *,
    schedule: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> list[BackfilledRun]:
    """Create the flow runs of a deployment that a range of time lacks. A second call creates nothing twice.

    The runs are picked up by the deployment's workers, the earliest first and as many at once as its concurrency limit
    lets. A run that ended badly is listed with its state and not made anew: `prefect flow-run retry ID` is for that.

    Args:
        deployment: Its name, `flow/deployment`.
        start, end: Dates or datetimes, both within the range. Without a time zone they are UTC, as idempotency keys
            are; a date
            as the end means the whole of that day.
        every: The pause between two times, counted from `start`. Left out, the times are those of the schedule.
        schedule: The slug of the schedule whose times, or with `every` whose parameters, are meant. Needed where there
            are several. An inactive one will do.
        parameters: Parameters for all these runs, laid over those of the schedule and of the deployment.
        dry_run: Create nothing.

    Returns:
        The times in their order, those with a flow run from before among them.

    Raises:
        ConfigurationError: There is no such deployment or schedule, the range makes no sense or has more than a
            thousand times, or the deployment would give every time the same run or drop some. Nothing was created.
        httpx.HTTPError: The Prefect API is away. What was created by then stays, and a second call goes on.
    """
    first, last = _first(start), _last(end)
    if first > last:
        raise ConfigurationError(f"The range ends ({last:%Y-%m-%d %H:%M}) before it begins ({first:%Y-%m-%d %H:%M}).")
    async with get_client() as client:
        target = await _backfilled_deployment(client, deployment)
        chosen = _backfilled_schedule(target, schedule, required=every is None)
        times = await _times(chosen, first, last, every)
        given = {**(chosen.parameters if chosen else {}), **(parameters or {})}
        _refuse_trouble(target, {**(target.parameters or {}), **given}, times)
        standing = await _standing(client, target.id, chosen, times)
        runs: list[BackfilledRun] = []
        for moment in times:
            run = standing.get(moment)
            if run is None and not dry_run:
                run = await client.create_flow_run_from_deployment(
                    target.id,
                    parameters=given,
                    state=Scheduled(scheduled_time=moment),  # pyright: ignore[reportArgumentType]  it takes any datetime
                    tags=["backfill"],
                    # For two calls at the same time: Prefect then gives both the same flow run.
                    idempotency_key=_key(target.id, chosen, moment),
                )
            state = "to be created" if run is None else (run.state and run.state.name) or "Scheduled"
            runs.append(BackfilledRun(moment, moment not in standing, run.id if run else None, state))
        return runs


def _first(start: date) -> datetime:
    return _utc(start if isinstance(start, datetime) else datetime.combine(start, time.min))


def _last(end: date) -> datetime:
    return _utc(end if isinstance(end, datetime) else datetime.combine(end, time.max))


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


async def _backfilled_deployment(client: PrefectClient, name: str) -> DeploymentResponse:
    try:
        return await client.read_deployment_by_name(name)
    except (ObjectNotFound, ValueError) as error:
        raise ConfigurationError(
            f"There is no deployment {name!r}. prefect deployment ls lists them, as flow/deployment."
        ) from error


def _backfilled_schedule(target: DeploymentResponse, slug: str | None, *, required: bool) -> DeploymentSchedule | None:
    known = target.schedules or []
    if slug is not None:
        found = [one for one in known if one.slug == slug]
        if not found:
            raise ConfigurationError(f"{target.name} has no schedule {slug!r}. It has: {_slugs(known) or 'none'}.")
        return found[0]
    if len(known) > 1:
        raise ConfigurationError(f"{target.name} has several schedules. Give schedule=…, one of: {_slugs(known)}.")
    if not known and required:
        raise ConfigurationError(f"{target.name} has no schedule to take the times from. Give every=….")
    return known[0] if known else None


def _slugs(schedules: Sequence[DeploymentSchedule]) -> str:
    return ", ".join(one.slug or "(without a slug)" for one in schedules)


async def _times(
    schedule: DeploymentSchedule | None, first: datetime, last: datetime, every: timedelta | None
) -> list[datetime]:
    """Return the times of the range in UTC, at most one more than may be."""
    if every is not None:
        if every <= timedelta(0):
            raise ConfigurationError(f"The pause between two times must be longer than nothing, not {every}.")
        count = min((last - first) // every, MOST) + 1
        return [first + number * every for number in range(count)]
    assert schedule is not None  # noqa: S101  _backfilled_schedule saw to it
    # Heavy, and of no use to anything else here.
    from prefect.server.schemas import schedules as server

    kind = getattr(server, type(schedule.schedule).__name__)
    rule = kind.model_validate(schedule.schedule.model_dump())
    times: list[datetime] = []
    after = first
    while len(times) <= MOST:
        page = [_utc(moment) for moment in await rule.get_dates(n=PAGE, start=after, end=last)]
        times += page
        if len(page) < PAGE:
            break
        after = page[-1] + timedelta(microseconds=1)
    return times[: MOST + 1]


def _refuse_trouble(target: DeploymentResponse, parameters: Mapping[str, Any], times: Sequence[datetime]) -> None:
    """Raise what would go wrong silently."""
    if len(times) > MOST:
        raise ConfigurationError(f"That are more than {MOST} times: fill a shorter range first.")
    if times and times[-1] > datetime.now(UTC):
        raise ConfigurationError(
            f"{times[-1]:%Y-%m-%d %H:%M} UTC has not come yet: a backfill is for times that have gone by."
        )
    key = parameters.get("idempotency_key")
    if isinstance(key, str) and "scheduled_start" not in key and len(times) > 1:
        raise ConfigurationError(
            f"The idempotency key {key!r} is the same for every time, so that all would get one run. Put the time "
            f"into it, "
            "such as {{ scheduled_start:%Y-%m-%d }}, or leave it out."
        )
    limit, options = target.global_concurrency_limit, target.concurrency_options
    drops = options is not None and options.collision_strategy is ConcurrencyLimitStrategy.CANCEL_NEW
    if limit is not None and drops and len(times) > limit.limit:
        raise ConfigurationError(
            f"{target.name} drops runs beyond {limit.limit} at once (CANCEL_NEW), so that most of these {len(times)} "
            "would be cancelled. Set its collision strategy to ENQUEUE while you fill."
        )


def _key(deployment_id: UUID, schedule: DeploymentSchedule | None, moment: datetime) -> str:
    which = "" if schedule is None else f"{schedule.slug or schedule.id} "
    return f"backfill {deployment_id} {which}{moment.isoformat()}"


def _made_by(run: FlowRun, schedule: DeploymentSchedule | None) -> bool:
    """Return whether the schedule, any one if none is given, made the flow run. A deploy may renew a schedule's id."""
    by = run.created_by
    if by is None or by.type != "SCHEDULE":
        return False
    return schedule is None or by.id == schedule.id or (schedule.slug is not None and by.display_value == schedule.slug)


async def _standing(
    client: PrefectClient, deployment_id: UUID, schedule: DeploymentSchedule | None, times: Sequence[datetime]
) -> dict[datetime, FlowRun]:
    """Return, by their times, the flow runs that the schedule or an earlier backfill made."""
    standing: dict[datetime, FlowRun] = {}
    if not times:
        return standing
    expected = Expected.model_validate({"after_": times[0], "before_": times[-1]})
    offset = 0
    while True:
        page = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(expected_start_time=expected),
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])),
            limit=PAGE,
            offset=offset,
        )
        for run in page:
            moment = _utc(run.expected_start_time) if run.expected_start_time else None
            if moment and (run.idempotency_key == _key(deployment_id, schedule, moment) or _made_by(run, schedule)):
                standing.setdefault(moment, run)
        if len(page) < PAGE:
            return standing
        offset += PAGE
