"""Runs of a deployment for times that have gone by: one flow run for each, and none twice.

Each flow run is scheduled for its own time, so that `{{ scheduled_start:… }}` in a run key means that time, as if the
schedule had made it; a time that has a flow run, made by the schedule or by an earlier backfill, gets no other.

Why not Prefect's own: `POST /deployments/{id}/schedule` takes times in the past, but makes runs that the next
`prefect deploy` deletes while they wait, says nothing about what it made, and knows active schedules only;
`run_deployment` makes one run at a time (read in the source of 3.7.1 and 3.9.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter
from prefect.client.schemas.filters import FlowRunFilterExpectedStartTime as Expected
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled

from prefect_crew.api.errors import ConfigurationError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import DeploymentSchedule
    from prefect.client.schemas.responses import DeploymentResponse

__all__ = ["MOST", "BackfilledRun", "backfill"]

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
        start, end: Dates or datetimes, both within the range. Without a time zone they are UTC, as run keys are; a date
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
        target = await _deployment(client, deployment)
        chosen = _schedule(target, schedule, required=every is None)
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


async def _deployment(client: PrefectClient, name: str) -> DeploymentResponse:
    try:
        return await client.read_deployment_by_name(name)
    except (ObjectNotFound, ValueError) as error:
        raise ConfigurationError(
            f"There is no deployment {name!r}. prefect deployment ls lists them, as flow/deployment."
        ) from error


def _schedule(target: DeploymentResponse, slug: str | None, *, required: bool) -> DeploymentSchedule | None:
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
    assert schedule is not None  # noqa: S101  _schedule saw to it
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
    key = parameters.get("run_key")
    if isinstance(key, str) and "scheduled_start" not in key and len(times) > 1:
        raise ConfigurationError(
            f"The run key {key!r} is the same for every time, so that all would get one run. Put the time into it, "
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
